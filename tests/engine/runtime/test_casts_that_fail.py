"""What goes wrong with casts is seen: operands that no scale fits, wrong products, devices without the format."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.casts import OPTIONS, is_eager, two_layers
from support.training import Language, assert_same_state, build, fit
from support.zoo_batches import Batch, next_token_batch
from torch import Tensor
from torch.nn import functional as F

from lightning_unitscale import (
    UnitScaling,
    UnitScalingError,
    unit_scale,
)
from lightning_unitscale.engine.checks import calibration
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.engine.runtime.observer import entered_observers
from lightning_unitscale.formats import FORMATS
from lightning_unitscale.ops.products import MatrixProducts


class Spiking(Language):
    """From step 1 on, the head's input is 2^16 times what it was, and the next time 2^-16."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.block(self.embedding(ids)).flatten(0, 1))
        factor = 2.0 ** (16 * (-1) ** self.trainer.global_step) if self.trainer.global_step else 1.0
        return self.head(x * factor) / factor


def test_a_site_that_no_scale_fits_falls_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Spiking(batch_norm=False)
    callback = UnitScaling("preserve", **OPTIONS, verify=False)
    with pytest.warns(UserWarning, match="head:linear stays in the compute dtype from now on: at step 2 casting its"):
        fit(tmp_path, callback, module=module, max_steps=5)
    plan = callback.plan
    assert plan is not None
    (left,) = [site for site in plan.sites if site.params and site.params[0] == "head.weight"]
    assert left.format is None
    assert "at step 2 casting its" in left.format_reason
    assert ("head.weight", "linear") not in casts_in_force(module)
    assert len(plan.cast_sites) == len(casts_in_force(module)) > 0
    assert all(torch.tensor(loss).isfinite() for loss in module.losses)
    loaded = Plan.from_dict(plan.to_dict())
    assert [site.name for site in loaded.cast_sites] == [site.name for site in plan.cast_sites]


class Infinite(Language):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.block(self.embedding(ids)).flatten(0, 1))
        if self.trainer.global_step == 1:
            x = torch.cat([x[:1] * float("inf"), x[1:]])
        return self.head(x).nan_to_num(0.0, 0.0, 0.0)


def test_a_non_finite_operand_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Infinite(batch_norm=False)
    with pytest.warns(UserWarning, match=r"at step 1 the x of head:linear \(head\.weight\) has \d+ elements"):
        fit(tmp_path, UnitScaling("preserve", **OPTIONS, verify=False), module=module, max_steps=2)


def test_a_wrong_product_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, message in (
        ("forward", r"its output is off by"),
        ("grad_x", r"its gradient of x is off by 1\.00%"),
        ("grad_weight", r"its gradient of weight is off by 1\.00%"),
    ):
        right = getattr(MatrixProducts, method)
        with monkeypatch.context() as patch:
            patch.setattr(MatrixProducts, method, lambda *args, right=right: right(*args) * 1.01)
            with pytest.warns(UserWarning, match=message):
                model, plan = two_layers()
        assert plan.cast_sites == []
        assert casts_in_force(model) == {}
        assert all(re.search(message, site.format_reason) for site in plan.sites if site.params)
        x = torch.randn(4, 32)
        assert torch.equal(model(x), model[2]._call_impl(F.relu(model[0]._call_impl(x))))


@pytest.mark.filterwarnings("ignore:unit scaling. with casts")
def test_a_wrong_scale_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "exponent", lambda *args: 0.3)  # no power of two
    with pytest.warns(UserWarning, match="alone changed the product"):
        _, plan = two_layers()
    assert plan.cast_sites == []


class Failing(Language):
    at = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if len(self.losses) > self.at:
            raise ValueError("on purpose")
        return loss


@pytest.mark.parametrize("door", ["callback", "strategy"])
def test_an_exception_in_a_measured_step_leaves_nothing_behind(tmp_path: Path, door: str) -> None:
    from lightning_unitscale.strategy import UnitScalingStrategy

    torch.manual_seed(0)
    module = Failing()
    module.at = 1  # step 1 is measured again
    ways: Any = (
        ([UnitScaling(**OPTIONS)], {}) if door == "callback" else ([], {"strategy": UnitScalingStrategy(**OPTIONS)})
    )
    with pytest.raises(ValueError, match="on purpose"):
        fit(tmp_path, *ways[0], module=module, max_steps=5, **ways[1])
    assert entered_observers() == []
    assert torch._C._len_torch_function_stack() == 0
    assert not is_eager()


def test_overrides_that_cannot_be(tmp_path: Path) -> None:
    model, batch = build(batch_norm=False), next_token_batch(0)
    for overrides, message in (
        (
            {"norm.weight": {"format": "fp8"}},
            r"overrides\['norm.weight'\]: format='fp8', but no matmul there can be cast",
        ),
        ({"embedding": {"format": "fp8"}}, r"overrides\['embedding'\].*a lookup makes no product"),
        ({"head": {"format": "fp9"}}, r"overrides\['head'\] format='fp9' is not known"),
    ):
        with pytest.raises(UnitScalingError, match=message):
            unit_scale(model, lambda m: m.loss(batch), overrides=overrides)
    plan = unit_scale(model, lambda m: m.loss(batch), overrides={"head": {"format": "bf16"}})
    assert [site.params[0] for site in plan.cast_sites] == ["head.weight"]


def test_a_device_without_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "supports", lambda dtype, device: dtype not in FORMATS["fp8"].dtypes)
    module, before = build(), build()
    with pytest.raises(UnitScalingError, match=r"format='fp8': the device cpu has no torch\.float8_e4m3fn"):
        fit(tmp_path, UnitScaling(**OPTIONS), module=module)
    assert plan_of(module) is None
    assert_same_state(module, before)


class Penalized(Language):
    def loss(self, batch: Batch) -> Tensor:
        x = self.embedding(batch["input_ids"]).detach().requires_grad_()
        y = self.head(x).square().mean()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return y + gradient.square().sum()


def test_a_gradient_penalty_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(), pytest.raises(UnitScalingError, match="create_graph=True"):
        warnings.simplefilter("ignore")
        fit(tmp_path, UnitScaling("preserve", **OPTIONS), module=Penalized(batch_norm=False), max_steps=3)
