"""Code that reads or writes stored values beside the plan: penalties, determinants, snapshots, clamps, pruning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import UnitScalingError, scale_learning_rates, unit_scale

PENALTIES: dict[str, Callable[[Net], Tensor]] = {
    "L1": lambda m: sum(p.abs().sum() for p in m.net.parameters()),
    "L2": lambda m: sum(p.pow(2).sum() for p in m.net.parameters()),
    "norm of norms": lambda m: torch.stack([p.norm() for p in m.net.parameters()]).norm(),
    "as one vector": lambda m: nn.utils.parameters_to_vector(m.net.parameters()).square().sum(),
    "flattened": lambda m: torch.cat([p.flatten() for p in m.net.parameters()]).norm(),
    "foreach": lambda m: torch.stack(torch._foreach_norm(list(m.net.parameters()))).sum(),
    "to the start": lambda m: sum(
        ((p - q).square() + q * p).sum() for p, q in zip(m.net.parameters(), m.start, strict=True)
    ),
    "mse": lambda m: sum(F.mse_loss(2 * p, q) for p, q in zip(m.net.parameters(), m.start, strict=True)),
    "orthogonal": lambda m: (m.net[2].weight @ m.net[2].weight.T - torch.eye(16)).square().sum(),
    "logdet": lambda m: torch.linalg.slogdet(m.net[2].weight)[1],
    "spectral": lambda m: torch.linalg.matrix_norm(m.net[2].weight, 2),
    "path norm": lambda m: m.paths().sum(),
}


class Net(nn.Module):
    """Three layers with a penalty on their weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        self.start = [p.detach().clone() for p in self.net.parameters()]

    def paths(self) -> Tensor:
        """The network of the weights' magnitudes, on ones."""
        x = torch.ones(1, 8)
        for layer in self.net:
            x = F.linear(x, layer.weight.abs(), layer.bias.abs()) if isinstance(layer, nn.Linear) else x
        return x

    def penalty(self) -> Tensor:
        return PENALTIES[self.kind](self)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), torch.arange(len(x)) % 4) + 0.01 * self.penalty()


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.filterwarnings("ignore:unit scaling leaves")
def test_a_penalty_on_weights_starts_as_the_untouched_models(kind: str, storage: str) -> None:
    model, x = Net(kind), torch.randn(12, 8)
    before = model.penalty()
    plan = unit_scale(model, lambda m: m(x), storage=storage)
    torch.testing.assert_close(model.penalty(), before, rtol=1e-4, atol=1e-5)
    assert not plan.parameters["net.0.weight"].reason  # scaling goes on


def test_a_weight_whose_determinant_is_taken_is_left_alone_with_the_reason() -> None:
    model, x = Net("logdet"), torch.randn(12, 8)
    with pytest.warns(UserWarning, match="determinant"):
        plan = unit_scale(model, lambda m: m(x), verify=False)
    parameter = plan.parameters["net.2.weight"]
    assert "determinant" in parameter.reason
    assert parameter.multiplier == parameter.stored == parameter.initial_factor == 1


@pytest.mark.parametrize("kind", ["L2", "to the start"])
def test_a_weight_that_penalties_alone_read_stays_as_it_is(kind: str) -> None:
    model, x = Net(kind), torch.randn(12, 8)
    model.net.append(nn.Identity()).register_parameter("spare", nn.Parameter(torch.randn(5, 5)))
    model.start.insert(0, torch.zeros(5, 5))
    before = model.penalty().item()
    plan = unit_scale(model, lambda m: m(x))
    assert plan.parameters["net.spare"].initial_factor == plan.parameters["net.spare"].multiplier == 1.0
    assert model.penalty().item() == pytest.approx(before, rel=1e-4)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_copies_kept_in_dicts_and_lists_are_rescaled_with_the_weights(storage: str) -> None:
    model, x = plain(), torch.randn(12, 8)
    model.shadow = {"average": [p.detach().clone() for p in model.parameters()]}
    plan = unit_scale(model, lambda m: m(x).square().mean(), storage=storage)
    for parameter, kept in zip(model.parameters(), model.shadow["average"], strict=True):
        assert torch.equal(parameter, kept)
    assert any("shadow" in note for note in plan.notes)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_clamp_after_the_step_is_noticed_once(through_data: bool) -> None:
    model, x = plain(), torch.randn(12, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, unit_scale(model, lambda m: m(x).square().mean()))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(4):
            with torch.enable_grad():
                model(x).square().mean().backward()
            optimizer.step()
            for p in model.parameters():
                (p.data if through_data else p).clamp_(-0.01, 0.01)
    said = [str(w.message) for w in caught if "written outside" in str(w.message)]
    assert len(said) == 1
    assert "0.weight" in said[0] and "preserve" in said[0]


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_an_average_made_before_the_model_was_prepared_is_its_function_or_refused(storage: str) -> None:
    model, x = plain(), torch.randn(12, 8)
    average = torch.optim.swa_utils.AveragedModel(model)
    unit_scale(model, lambda m: m(x).square().mean(), storage=storage)
    if storage == "unit":
        with pytest.raises(UnitScalingError, match="made of Sequential before"):
            average.update_parameters(model)
        average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    torch.testing.assert_close(average(x), model(x))


def test_a_head_put_in_while_training_is_named_when_the_optimizer_gets_it() -> None:
    model, x = plain(), torch.randn(12, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, unit_scale(model, lambda m: m(x).square().mean()))
    model(x).square().mean().backward()
    optimizer.step()
    model[2] = nn.Linear(16, 4)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(UserWarning, match=r"replaced: 2\.bias, 2\.weight"):
        optimizer.step()


def test_an_inner_gradient_step_is_refused_by_the_name_of_its_code() -> None:
    model, x = plain(), torch.randn(12, 8)

    def adapted(m: nn.Module) -> Tensor:
        named = dict(m.named_parameters())
        gradients = torch.autograd.grad(m(x).square().mean(), list(named.values()), create_graph=True)
        new = {n: p - 0.1 * g for (n, p), g in zip(named.items(), gradients, strict=True)}
        return torch.func.functional_call(m, new, (x,)).square().mean()

    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UnitScalingError, match="adapted"):
        unit_scale(model, adapted)
    assert all(map(torch.equal, before, model.parameters()))
    unit_scale(model, adapted, scheme="preserve")


class Flow(nn.Module):
    """A linear map as P L U, whose log-determinant is read off its factors (Glow), and an additive shift."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        p, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(8, 8))[0])
        self.register_buffer("p", p)
        self.register_buffer("signs", upper.diag().sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.logs = nn.Parameter(upper.diag().abs().log())
        self.shift = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

    def map(self, x: Tensor) -> Tensor:
        upper = self.upper.triu(1) + torch.diag(self.signs * self.logs.exp())
        return x @ (self.p @ (self.lower.tril(-1) + torch.eye(8)) @ upper).T

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.map(x).chunk(2, -1)
        return 0.5 * torch.cat([a, b + self.shift(a)], -1).square().sum(-1).mean() - self.logs.sum()


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_a_determinant_read_off_the_factors_of_a_weight_is_that_of_the_weight(storage: str) -> None:
    model, x = Flow(), torch.randn(12, 8)
    before = model.map(x)
    plan = unit_scale(model, lambda m: m(x), storage=storage, verify=False)
    torch.testing.assert_close(model.map(x), before)
    assert "log-determinant" in plan.parameters["logs"].reason
    assert all("one weight with logs" in plan.parameters[name].reason for name in ("lower", "upper"))
    assert not plan.parameters["shift.0.weight"].reason


class Noisy(nn.Linear):
    """Noise on the weight: none, added, multiplied or as a mask, or drawn into a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__(16, 16)
        self.kind = kind
        self.register_buffer("noise", torch.zeros(16, 16))

    def drawn(self) -> Tensor:
        weight = self.weight
        if self.kind == "added":
            return weight + 1e-3 * torch.randn_like(weight)
        if self.kind == "by rows":
            return weight * (1 + 1e-3 * torch.randn(16, 1))
        if self.kind == "masked":
            return weight * (torch.rand_like(weight) > 1e-3)
        return weight + 1e-3 * self.noise.normal_() if self.kind == "in a buffer" else weight * torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.drawn(), self.bias)


@pytest.mark.parametrize("kind", ["added", "by rows", "masked", "in a buffer"])
def test_a_weight_with_noise_is_a_weight(kind: str) -> None:
    found = []
    for noise in ("none", kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Noisy(noise), nn.ReLU(), nn.Linear(16, 4))
        plan = unit_scale(model, lambda m: F.cross_entropy(m(torch.ones(12, 8)), torch.arange(12) % 4))
        found.append([(p.role, round(p.multiplier, 3)) for p in plan.parameters.values()])
    assert found[0] == found[1]
