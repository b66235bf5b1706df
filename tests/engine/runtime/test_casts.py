"""Casts of one layer by hand: what is cast, and that no cast weight is stale."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.casts import by_hand, two_layers
from support.prepared import build as zoo_build
from support.prepared import gradients, prepared
from support.training import fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import (
    UnitScaling,
    UnitScalingError,
    remove_unit_scaling,
    unit_scale,
)
from lightning_unitscale.cookbook.measuring.pass_counter import PassCounter
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.runtime import casts
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.formats import OPERANDS, cast
from lightning_unitscale.ops.products import MatrixProducts


def test_the_function_is_that_of_the_cast_operands() -> None:
    model, plan = two_layers()
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(x), by_hand(model, x, plan), rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # training's numerics
        assert torch.equal(model.eval()(x), model.train()(x))


def test_without_operand_scales() -> None:
    _, plan = two_layers(weights=False, activations=False, gradients=False)
    assert all(set(site.operand_scales.values()) == {1.0} for site in plan.cast_sites)
    _, plan = two_layers()
    assert all(site.operand_scales["weight"] > 1 and site.operand_scales["gradient"] > 1 for site in plan.cast_sites)


def test_a_zero_operand_is_not_guessed_at(tmp_path: Path) -> None:
    """Behind a weight of 0 no gradient tells its scale: nothing is cast until one does, and the user is told."""
    case = zoo.CASES["dit"]
    with pytest.warns(UserWarning, match=r"14 sites stay in the compute dtype.*all 0"):
        model, _ = prepared(case, scheme="preserve", format="fp8")
    plain = zoo_build(case)
    assert gradients(case, model)[0] == gradients(case, plain)[0]
    callback = UnitScaling("preserve", format="fp8", recalibrate=(1000,), verify=False)
    torch.manual_seed(0)
    fit(tmp_path, callback, module=zoo.CaseModule(case), data=zoo.loader(case, 9), max_steps=9)
    assert callback.plan is not None
    assert callback.plan.measured_at == [0, 1, 3]  # by then all have been seen
    assert all(site.operand_scales["gradient"] > 1 for site in callback.plan.cast_sites)


def change_with_optimizer(layer: nn.Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=1.0).step()


class DataSGD(torch.optim.SGD):
    """Writes to `.data`, as older optimizers do: the version of the parameter stays."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(1.0)


CHANGES = {
    "optimizer": change_with_optimizer,
    "data-optimizer": lambda layer: DataSGD([layer.weight], lr=1.0).step(),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assign": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=True),
    "copy_": lambda layer: torch.no_grad()(layer.weight.copy_)(layer.weight + 1),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cast_weight_is_never_stale(change: str) -> None:
    model, plan = two_layers()
    x = torch.randn(8, 32)
    before = model(x)
    CHANGES[change](model[0])
    after = model(x)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, by_hand(model, x, plan), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loop_without_an_optimizer(frozen: bool) -> None:
    """Writes to `.data`, which counts no version up, and takes no step of any optimizer."""
    model, plan = two_layers()
    model[2].requires_grad_(not frozen)
    x = torch.randn(64, 32)
    for _ in range(3):
        y = model(x)
        assert torch.allclose(y, by_hand(model, x, plan), rtol=1e-5, atol=1e-5)
        y.square().mean().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.5 * parameter.grad
        model.zero_grad()


def test_a_computed_weight_is_never_stale() -> None:
    case = zoo.CASES["weight-norm"]
    model, _ = prepared(case, format="fp8", verify=False)
    for step in range(3):
        fresh = copy.deepcopy(model)
        for site in casts_in_force(fresh).values():
            site._weight = None
        losses = [case.loss(module, case.batch(0)) for module in (model, fresh)]
        assert losses[0].item() == losses[1].item(), step
        with torch.no_grad():
            for p in model.parameters():
                p.data = p.data * 1.5  # the computed weight may lie where the last one did
        del losses


def test_weights_are_cast_once_for_accumulated_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = two_layers()
    model[2].requires_grad_(False)
    counted: list[tuple[int, ...]] = []

    def counting(tensor: Tensor, *args: Any) -> Tensor:
        counted.append(tuple(tensor.shape))
        return cast(tensor, *args)

    monkeypatch.setattr("lightning_unitscale.ops.cast_for_products.cast", counting)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    for _ in range(2):
        counted.clear()
        for _ in range(4):
            model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
        assert counted.count((48, 32)) == 1
        assert counted.count((16, 48)) <= 1  # frozen


def test_on_tensor_cores_a_kept_weight_serves_both_passes() -> None:
    """ "meta" stands for CUDA: three casts for the first batch, of which the weight's is in both layouts; then two."""
    site = Site(
        "", "forward", "linear", "hidden", params=["w"], format="fp8", operand_scales=dict.fromkeys(OPERANDS, 1.0)
    )
    casting = casts.WeightCast(site)
    with torch.device("meta"):
        weight, x = (torch.empty(64, 64, requires_grad=True) for _ in range(2))
    counted = []
    for frozen_input in (True, False, False):  # what was cast for the forward pass alone does not serve a backward pass
        with PassCounter(64 * 64) as counter:
            casting(x.detach() if frozen_input else x, weight, MatrixProducts()).backward(x.detach())
        counted.append(sum("fp8_cast" in name for name, _ in counter.passes))
    assert counted == [3, 3, 2]


def test_a_graph_that_is_captured_casts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cast from before would be the weight of every replay."""
    model, _ = two_layers()
    x = torch.randn(8, 32)
    y = model(x)
    kept = [site._weight for site in casts_in_force(model).values()]
    monkeypatch.setattr(casts, "_is_captured", lambda weight: True)
    for site in casts_in_force(model).values():
        monkeypatch.setattr(site, "_weight", None)
    assert torch.equal(model(x), y)
    assert all(kept)
    assert not any(site._weight for site in casts_in_force(model).values())


def test_copies_run_their_own_weights() -> None:
    model, _ = two_layers()
    x = torch.randn(8, 32)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other[0].weight.zero_()
        assert not torch.equal(other(x), y)
        assert torch.equal(model(x), y)


def test_removing_gives_the_plain_function() -> None:
    model, _ = two_layers()
    x = torch.randn(8, 32)
    plain = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    plain.load_state_dict(dict(model.state_dict()))  # a dict carries no plan
    assert not torch.equal(model(x), plain(x))
    assert torch.equal(remove_unit_scaling(model)(x), plain(x))


class OneImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).mean((-1, -2))


def test_a_convolution_takes_one_sample_after_batches() -> None:
    model, images = OneImage(), torch.randn(4, 3, 8, 8)
    unit_scale(model, lambda m: m(images).square().mean(), "preserve", format="fp8")
    assert torch.allclose(model(images[0]), model(images)[0], atol=1e-6)


class Applied(nn.Module):
    """Its weight multiplies from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


def test_a_call_that_became_another_is_named() -> None:
    model, x = Applied(), torch.randn(32, 16)
    unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    with pytest.raises(UnitScalingError, match=r"Applied\.forward: the operands of matmul .*vector"):
        model(x[:, 0])


class Masked(nn.Module):
    """A parametrization with a buffer."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_a_masked_weight_is_measured() -> None:
    layer, x = nn.Linear(32, 48), torch.randn(64, 32)
    nn.utils.parametrize.register_parametrization(layer, "weight", Masked((torch.rand(48, 32) > 0.9).float()))
    model = nn.Sequential(layer, nn.ReLU())
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    (site,) = plan.cast_sites
    assert set(site.measured) == {"x", "weight", "gradient"}
    assert site.measured["weight"]["rms"] == pytest.approx(float(layer.weight.square().mean().sqrt()), rel=1e-5)
    sx, sw = site.operand_scales["x"], site.operand_scales["weight"]
    x_hat, w_hat = (cast(t, torch.float8_e4m3fn, s).float() / s for t, s in ((x, sx), (layer.weight, sw)))
    assert torch.allclose(model(x), F.relu(F.linear(x_hat, w_hat, layer.bias)), atol=1e-6)


def test_a_cast_that_is_not_made_is_no_cast_of_the_plan() -> None:
    """Pruning computes the weight in a hook, before anything of the plan is entered."""
    model, x = nn.Linear(32, 48), torch.randn(64, 32)
    nn.utils.prune.random_unstructured(model, "weight", 0.5)
    with pytest.warns(UserWarning, match="out of reach of an interceptor"):
        plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    assert plan.cast_sites == []
