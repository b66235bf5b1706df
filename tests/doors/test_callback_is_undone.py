"""Beginnings and ends of `UnitScaling`: after an exception, in a second fit, in copies, beside foreign patches."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    OnExceptionCheckpoint,
)
from support.training import STEPS, Language, batches, build, fit, trainer
from support.zoo_batches import Batch, next_token_batch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unitscale import UnitScaling, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
from lightning_unitscale.options import STORAGES
from lightning_unitscale.strategy import UnitScalingStrategy


class Stop(pl.Callback):
    """Raises after three steps, in a place of choice."""

    def __init__(self, error: BaseException, place: str) -> None:
        self.error, self.place = error, place

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.place == "hook" and trainer.global_step == 3:
            raise self.error

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.place == "step" and trainer.global_step == 3:
            raise self.error


@pytest.mark.parametrize("place", ["hook", "step"])
@pytest.mark.parametrize("door", ["callback", "strategy", "both"])
@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_exceptions_undo_the_patches(tmp_path: Path, error: BaseException, door: str, place: str) -> None:
    module = build()
    callbacks = [UnitScaling(storage="unit")] if door != "strategy" else []
    named = {} if door == "callback" else {"strategy": UnitScalingStrategy(storage="unit")}
    saving = OnExceptionCheckpoint(tmp_path, filename="exception")
    loop = trainer(tmp_path, Stop(error, place), saving, *callbacks, enable_checkpointing=True, **named)
    methods = set(vars(loop.strategy))
    optimizers: list[Any] = []
    loop.callbacks.append(Remember(optimizers))  # type: ignore[attr-defined]
    with pytest.raises((ValueError, SystemExit)):
        loop.fit(module, batches())
    assert not {
        name for name in set(vars(loop.strategy)) - methods if callable(getattr(type(loop.strategy), name, None))
    }
    (optimizer,) = optimizers
    assert "step" not in vars(optimizer) and "_unit_scaled_step" not in vars(optimizer)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 3e-3
    assert plan_of(module) is not None

    assert module.losses[:3] == fit(tmp_path, UnitScaling(storage="unit"), max_steps=3).losses

    resumed = build()
    go_on = trainer(tmp_path, UnitScaling(storage="unit"), max_steps=STEPS)
    go_on.fit(resumed, batches(), ckpt_path=tmp_path / "exception.ckpt")
    assert len(resumed.losses) == STEPS - 3


class Remember(pl.Callback):
    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.optimizers += trainer.optimizers


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("door", ["callback", "strategy"])
def test_second_fit_and_second_model(tmp_path: Path, preparations: list[Any], door: str, storage: str) -> None:
    def make(steps: int) -> pl.Trainer:
        if door == "callback":
            return trainer(tmp_path, UnitScaling(storage=storage), max_steps=steps)
        return trainer(tmp_path, strategy=UnitScalingStrategy(storage=storage), max_steps=steps)

    loop, module = make(5), build()
    loop.fit(module, batches())
    loop.fit_loop.epoch_loop.max_steps = 10
    loop.fit(module, batches())
    assert preparations == [module] and len(module.losses) == 10

    # The twin goes on by hand from where the first fit ended, with a new optimizer, as Lightning does.
    twin = build()
    for _ in range(2):
        plan = plan_of(twin) or unit_scale(twin, lambda model: model.loss(next_token_batch(0)), storage=storage)
        optimizer = twin.configure_optimizers()
        scale_learning_rates(optimizer, plan)
        twin.log = lambda *args, **kwargs: None
        for step in range(5):
            optimizer.zero_grad()
            twin.training_step(next_token_batch(step), step).backward()
            optimizer.step()
    assert module.losses == twin.losses

    other = build()
    loop.fit_loop.epoch_loop.max_steps = 15
    loop.fit(other, batches())
    assert preparations == [module, other]
    assert other.losses == twin.losses[:5]

    again = build()  # the same callback in another Trainer
    fit(
        tmp_path,
        *loop.callbacks[:1] if door == "callback" else [UnitScaling(storage=storage)],
        module=again,
        max_steps=5,
    )
    assert again.losses == other.losses


@pytest.mark.parametrize("storage", STORAGES)
def test_copies_of_a_trained_model(tmp_path: Path, storage: str) -> None:
    module = fit(tmp_path, UnitScaling(storage=storage)).eval()
    batch = next_token_batch(99)
    expected = module.loss(batch)
    module.trainer = None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.loss(batch), expected)
        assert plan_of(twin) is not plan_of(module)
        with torch.no_grad():
            twin.head.weight.mul_(2)
        assert not torch.equal(twin.loss(batch), expected)
        assert torch.equal(module.loss(batch), expected)


def test_a_foreign_patch_of_the_strategy_survives(tmp_path: Path) -> None:
    seen: list[int] = []

    class Patch(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            trainer.strategy.on_train_batch_start = lambda batch, batch_idx: seen.append(batch_idx)

    loop = trainer(tmp_path, Patch(), UnitScaling(), max_steps=3)
    loop.fit(build(), batches())
    assert seen == [0, 1, 2]
    loop.strategy.on_train_batch_start(None, 7)
    assert seen == [0, 1, 2, 7]


class SkipsBatches(Language):
    """Lightning leaves a batch out whose step returns None."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if batch_idx else None


@pytest.mark.parametrize("storage", STORAGES)
def test_a_first_batch_without_loss_is_left_out(tmp_path: Path, storage: str) -> None:
    callback = UnitScaling(storage=storage)
    with pytest.warns(UserWarning, match="the step on batch 0 gives no loss"):
        module = fit(tmp_path, callback, module=SkipsBatches())
    assert callback.plan is not None
    assert plan_of(module) is callback.plan


def test_a_module_without_optimizers_goes_through_its_batches(tmp_path: Path) -> None:
    class NoOptimizer(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
            self.losses: list[float] = []

        def training_step(self, batch: Tensor) -> Tensor:
            loss = self.net(batch).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> None:
            return None

    loop = trainer(tmp_path, UnitScaling(), max_steps=3)
    loop.fit(module := NoOptimizer(), DataLoader(torch.ones(6, 8), batch_size=2))
    assert len(module.losses) >= 3
    assert len(set(module.losses[-3:])) == 1
    assert plan_of(module) is not None
