"""The static loss scale of FP16 in flight: true gradients, of numbers that FP16 alone would have lost."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unitscale import UnitScaling
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.strategy import UnitScalingStrategy

BATCH = 8


class Regression(pl.LightningModule):
    """A loss so small that its gradients lie at the lower end of FP16."""

    def __init__(self, manual: str = "") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
        self.automatic_optimization = not manual
        self.manual = manual
        self.gradients: list[dict[str, Tensor]] = []
        self.seen_after_backward: list[dict[str, Tensor]] = []

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - x[..., :32]).float().square().mean() * 1e-3

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        if self.manual:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            if self.manual == "by Lightning":
                self.manual_backward(loss)
            else:
                loss.backward()
            self.on_before_optimizer_step(optimizer)
            optimizer.step()
        return loss

    def on_after_backward(self) -> None:
        self.seen_after_backward.append(self._copied())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(self._copied())

    def _copied(self) -> dict[str, Tensor]:
        return {name: p.grad.float() for name, p in self.named_parameters() if p.grad is not None}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


def data(batches: int = 12, huge: int | None = None) -> DataLoader[Any]:
    x = torch.randn(batches * BATCH, 16, 64, generator=torch.Generator().manual_seed(0))
    if huge is not None:
        x[huge * BATCH : (huge + 1) * BATCH] *= 1e3
    return DataLoader(TensorDataset(x), batch_size=BATCH)


def fit(
    precision: str,
    callback: UnitScaling | None,
    steps: int = 1,
    *,
    manual: str = "",
    huge: int | None = None,
    **more: Any,
) -> Regression:
    pl.seed_everything(0, verbose=False)
    module = Regression(manual)
    options: dict[str, Any] = {"enable_checkpointing": False, "accelerator": "cpu", **more}
    trainer = pl.Trainer(
        max_steps=steps,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[callback] if callback else [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data(huge=huge))
    return module


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}


@pytest.mark.parametrize("manual", ["", "by Lightning"])
@pytest.mark.parametrize("door", ["callback", "strategy"])
def test_gradients_are_true_and_no_longer_lost(manual: str, door: str) -> None:
    exact = fit("32-true", UnitScaling(), manual=manual).gradients[0]
    callback = UnitScaling(format="fp16") if door == "callback" else None
    strategy: Any = {"strategy": UnitScalingStrategy(format="fp16")} if door == "strategy" else {}
    ours = fit("16-true", callback, manual=manual, **strategy)
    plain = fit("16-true", UnitScaling(), manual=manual)
    near, far = distance(ours.gradients[0], exact), distance(plain.gradients[0], exact)
    assert max(near.values()) < 0.1  # what is left is FP16's own rounding of `.grad`
    assert max(far.values()) > 0.3
    assert all(near[name] <= far[name] + 0.01 for name in near)
    assert max(distance(ours.gradients[0], ours.seen_after_backward[0]).values()) == 0


def test_accumulated_gradients_are_sums_of_true_ones() -> None:
    exact = fit("32-true", UnitScaling(), accumulate_grad_batches=3).gradients[0]
    ours = fit("16-true", UnitScaling(format="fp16"), accumulate_grad_batches=3).gradients[0]
    assert max(distance(ours, exact).values()) < 0.1


def test_scale_is_a_power_of_two_that_leaves_room_and_is_resumed(tmp_path: Path) -> None:
    callback = UnitScaling(format="fp16")
    module = fit("16-true", callback, enable_checkpointing=True, default_root_dir=tmp_path)
    plan = callback.plan
    assert plan is not None
    assert plan.loss_scale is not None
    assert math.log2(plan.loss_scale).is_integer()
    assert plan.loss_scale > 1
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["unit_scaling_plan"]["loss_scale"] == plan.loss_scale
    assert not any(p._backward_hooks for p in module.parameters())


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("32-true", {"format": "fp16"}),
        ("16-true", {"format": "fp16", "gradients": False}),
        ("16-true", {"format": None}),
    ],
)
def test_no_scale_where_none_is_wanted(precision: str, options: dict[str, Any]) -> None:
    assert plan_of(fit(precision, UnitScaling(**options))).loss_scale is None  # type: ignore[union-attr]


def test_backward_called_without_lightning_is_left_alone() -> None:
    ours = fit("16-true", UnitScaling(format="fp16"), manual="by hand").gradients[0]
    plain = fit("16-true", UnitScaling(), manual="by hand").gradients[0]
    assert max(distance(ours, plain).values()) == 0


def test_overflow_leaves_the_step_out_and_says_so() -> None:
    callback = UnitScaling(format="fp16", verify=False)
    weights: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            weights.append(torch.cat([p.detach().float().flatten() for p in pl_module.parameters()]))
            scales.append(callback.plan.loss_scale)  # type: ignore[union-attr]

    scales: list[Any] = []
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=6,
        precision="16-true",
        callbacks=[callback, Watch()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Regression(), data(huge=3))
    (message,) = [str(w.message) for w in caught if "is left out" in str(w.message)]
    assert "step 3" in message
    assert "net." in message
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    assert scales[3] == scales[2] / 16
    assert all(w.isfinite().all() for w in weights)
