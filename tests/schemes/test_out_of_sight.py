"""What can't be done is said: complex weights, models run by torch.func; prepared models can be exported."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from lightning_unitscale import UnitScalingError, unit_scale


class Ensemble(nn.Module):
    """Three networks, run at once by vmap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(3)]
        stacked, _ = stack_module_state(parts)
        self.template = [parts[0].to("meta")]
        self.names, self.weights = list(stacked), nn.ParameterList([w.detach() for w in stacked.values()])

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.weights, strict=True))
        return torch.vmap(lambda w: functional_call(self.template[0], w, (x,)))(weights)


def test_an_ensemble_by_vmap_is_refused_by_name_and_preserved_as_it_is() -> None:
    ensemble, x = Ensemble(), torch.randn(5, 8)
    before = ensemble(x)
    with pytest.raises(UnitScalingError, match=r"torch\.func"):
        unit_scale(ensemble, lambda m: m(x).square().mean())
    plan = unit_scale(ensemble, lambda m: m(x).square().mean(), "preserve")
    assert torch.equal(ensemble(x), before)
    assert all("torch.func" in parameter.reason for parameter in plan.parameters.values())


class Fourier(nn.Module):
    """Complex weights between real ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)
        self.mixed = nn.Linear(9, 9, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(torch.fft.irfft(self.mixed(torch.fft.rfft(self.before(x))), n=16)))


@pytest.mark.parametrize("format", ["bf16", "fp16", "fp8"])
def test_complex_weights_stay_in_the_compute_dtype(format: str) -> None:
    model, x = Fourier(), torch.randn(64, 16)
    before = model(x).detach()
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format=format)
    site = next(site for site in plan.sites if "mixed.weight" in site.params)
    assert "complex" in site.format_reason
    assert (model(x) - before).norm() < 0.1 * before.norm()


def test_gradients_of_scaled_complex_weights_are_finite_differences() -> None:
    model, x = Fourier(), torch.randn(4, 16, dtype=torch.float64)
    for layer, dtype in ((model.before, torch.double), (model.after, torch.double), (model.mixed, torch.cdouble)):
        layer.to(dtype)
    unit_scale(model, lambda m: m(x).square().mean(), storage="unit")
    weight = model.mixed.weight
    model(x).square().mean().backward()
    direction, step, losses = torch.randn_like(weight), 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * step)
            losses.append(float(model(x).square().mean()))
            weight.add_(direction, alpha=-sign * step)
    expected = (losses[0] - losses[1]) / (2 * step)
    assert float((weight.grad.conj() * direction).real.sum()) == pytest.approx(expected, rel=1e-5)


class Tied(nn.Module):
    """A table used both ways, so that a factor stays explicit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(30, 16), nn.Linear(16, 16)

    def forward(self, i: Tensor) -> Tensor:
        return F.linear(torch.relu(self.layer(self.table(i))), self.table.weight)


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_a_prepared_model_can_be_exported(storage: str) -> None:
    model, i = Tied(), torch.arange(24).reshape(4, 6)
    unit_scale(model, lambda m: F.cross_entropy(m(i).flatten(0, 1), i.flatten()), storage=storage)
    program = torch.export.export(model.eval(), (i,))
    torch.testing.assert_close(program.module()(i), model(i), rtol=1e-5, atol=1e-6)
