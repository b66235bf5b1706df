"""`UnitScaling` beside other callbacks, the Tuner, precisions, checkpointing and compilation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.callbacks.weight_averaging import EMAWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from support.by_day import by_day
from support.seen import Seen
from support.training import Language, assert_same_state, batches, build, fit, trainer
from support.zoo_batches import Batch, next_token_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_unitscale import UnitScaling
from lightning_unitscale.options import STORAGES
from lightning_unitscale.strategy import UnitScalingStrategy


class Sized(Language):
    """Has the attributes that the Tuner sets."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.lr, self.batch_size = 3e-3, 2
        self.sizes: list[int] = []

    def train_dataloader(self) -> Any:
        rows = [{name: value[0] for name, value in next_token_batch(seed).items()} for seed in range(32)]
        return DataLoader(rows, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return batches(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch["labels"]))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("door", ["callback", "strategy"])
def test_tuner_leaves_the_training_as_it_was(tmp_path: Path, door: str, storage: str) -> None:
    def make() -> tuple[Sized, pl.Trainer]:
        torch.manual_seed(0)
        options: dict[str, Any] = {"max_steps": 6}
        if door == "strategy":
            return Sized(), trainer(tmp_path, strategy=UnitScalingStrategy(storage=storage), **options)
        return Sized(), trainer(tmp_path, UnitScaling(storage=storage), **options)

    tuned, tuning = make()
    Tuner(tuning).scale_batch_size(tuned, max_trials=2, steps_per_trial=2, init_val=2)
    finder = Tuner(tuning).lr_find(tuned, num_training=5, update_attr=False, min_lr=1e-4, max_lr=1e-2)
    assert finder is not None and len(finder.results["loss"]) >= 4
    tuned.losses.clear()
    tuned.sizes.clear()
    tuning.fit(tuned)

    twin, training = make()
    twin.batch_size = tuned.batch_size
    training.fit(twin)
    assert tuned.sizes == twin.sizes and twin.sizes[0] > 2
    assert tuned.losses == twin.losses
    assert_same_state(tuned, twin)


class FromStepFour(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= 4


AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "ema": partial(EMAWeightAveraging, decay=0.8),
    "late": FromStepFour,
    "swa": partial(StochasticWeightAveraging, swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1),
}


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", by_day(AVERAGING, ["late"]))
def test_weight_averaging(tmp_path: Path, name: str, order: int) -> None:
    def run(*callbacks: pl.Callback) -> tuple[Language, Seen]:
        module, seen = build(batch_norm=name != "swa"), Seen()
        loop = trainer(tmp_path, seen, *callbacks, max_epochs=4, val_check_interval=2, precision="64-true")
        loop.fit(module, batches(4), batches(2, first=50))
        loop.validate(module, batches(2, first=50), verbose=False)
        seen.logged.append({"val_loss": float(loop.callback_metrics["val_loss"])})
        return module, seen

    def with_averaging(*callbacks: pl.Callback) -> list[pl.Callback]:
        return [AVERAGING[name](), *callbacks][:: -1 if order else 1]

    untouched, theirs = run(*with_averaging())
    preserved, ours = run(*with_averaging(UnitScaling("preserve")))
    assert not ours.differences(theirs)
    assert_same_state(preserved, untouched)
    _, folded = run(*with_averaging(UnitScaling()))
    _, unit = run(*with_averaging(UnitScaling(storage="unit")))
    _, plain = run(UnitScaling(storage="unit"))
    for one, other in zip(folded.logged, unit.logged, strict=True):
        assert one == pytest.approx(other, rel=1e-7)
    assert abs(plain.logged[-1]["val_loss"] - unit.logged[-1]["val_loss"]) > 2e-4, "averaging changed nothing"


@pytest.mark.parametrize("storage", STORAGES)
def test_weight_averaging_is_saved_and_resumed(tmp_path: Path, storage: str) -> None:
    def run(steps: int, ckpt: Path | None = None) -> tuple[pl.Trainer, Language]:
        module = build(batch_norm=False)
        loop = trainer(tmp_path, UnitScaling(storage=storage), EMAWeightAveraging(decay=0.8), max_steps=steps)
        loop.fit(module, batches(1), batches(1), ckpt_path=ckpt)
        return loop, module

    first = trainer(
        tmp_path, UnitScaling(storage=storage), EMAWeightAveraging(decay=0.8), SaveAt(6, tmp_path), max_steps=12
    )
    whole = build(batch_norm=False)
    first.fit(whole, batches(1), batches(1))
    _, resumed = run(12, tmp_path / "at.ckpt")
    assert resumed.losses == whole.losses[6:]
    assert_same_state(resumed, whole)


class SaveAt(pl.Callback):
    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.path = step, folder / "at.ckpt"

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class WithBackbone(Language):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.embedding(ids)).flatten(0, 1)
        return self.head(self.norm(self.backbone(x)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


def test_backbone_finetuning(tmp_path: Path) -> None:
    def run(*callbacks: pl.Callback) -> tuple[Language, Seen]:
        torch.manual_seed(0)
        module, seen = WithBackbone(), Seen()
        thawing = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
        fit(tmp_path, thawing, seen, *callbacks, module=module, data=batches(4), max_epochs=4, max_steps=-1)
        return module, seen

    untouched, theirs = run()
    preserved, ours = run(UnitScaling("preserve"))
    assert not ours.differences(theirs)
    assert_same_state(preserved, untouched)

    callback = UnitScaling()
    scaled, seen = run(callback)
    assert callback.plan is not None and callback.plan.parameters["backbone.0.weight"].reason
    assert seen.rates == theirs.rates and seen.rates[0] != seen.rates[-1]
    assert seen.losses[-1] < seen.losses[0]
    assert not torch.equal(scaled.backbone[0].weight, WithBackbone().backbone[0].weight)


def test_learning_rate_monitor_shows_the_users_rate(tmp_path: Path) -> None:
    def run(*callbacks: pl.Callback) -> str:
        logger = CSVLogger(tmp_path, name="")
        module = build(schedule=True)
        fit(tmp_path, LearningRateMonitor("step"), *callbacks, module=module, logger=logger, log_every_n_steps=1)
        rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("lr-AdamW")
        return [row.split(",")[column] for row in rows[1:]]

    assert run(UnitScaling()) == run()


def test_hooks_and_gradients_see_the_stored_parameters(tmp_path: Path) -> None:
    """Norm clipping acts on true gradients: clipped at the value it had, nothing changes; below, it does."""
    plain, clipped, loose = Seen(), Seen(), Seen()
    fit(tmp_path, UnitScaling(), plain)
    norm = max(sum(g**2 for g in gradients) ** 0.5 for gradients in plain.gradients)
    fit(tmp_path, UnitScaling(), loose, gradient_clip_val=1.01 * norm)
    fit(tmp_path, UnitScaling(), clipped, gradient_clip_val=0.1 * norm)
    assert loose.losses == plain.losses
    assert max(sum(g**2 for g in gradients) ** 0.5 for gradients in clipped.gradients) < 0.101 * norm


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path: Path, precision: str, storage: str) -> None:
    exact = fit(tmp_path, UnitScaling(storage="folded"))
    module = fit(tmp_path, UnitScaling(storage=storage), precision=precision)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert all(p.dtype is dtype for p in module.parameters())
    tolerance = 1e-4 if precision == "64-true" else 0.05
    assert module.losses == pytest.approx(exact.losses, rel=tolerance)


class Checkpointed(Language):
    def forward(self, ids: Tensor) -> Tensor:
        x = checkpoint(self.block, self.dropout(self.embedding(ids)), use_reentrant=False)
        return self.head(self.dropout(self.norm(x.flatten(0, 1))))


@pytest.mark.parametrize("storage", STORAGES)
def test_activation_checkpointing(tmp_path: Path, storage: str) -> None:
    torch.manual_seed(0)
    module = Checkpointed(dropout=0.2)
    fit(tmp_path, UnitScaling(storage=storage), module=module)
    twin = fit(tmp_path, UnitScaling(storage=storage), module=build(dropout=0.2))
    assert module.losses == twin.losses


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("whole", [True, False])
def test_compiled(tmp_path: Path, storage: str, whole: bool) -> None:
    eager = fit(tmp_path, UnitScaling(storage=storage), max_steps=4)
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = LogsOnly()
    data = batches()
    if whole:
        compiled: Any = torch.compile(module, backend="aot_eager")
        loop = trainer(tmp_path, UnitScaling(storage=storage), max_steps=4)
        loop.fit(compiled, data, batches(1))
        assert "log" not in module.__dict__
    else:
        module.block.mlp = torch.compile(module.block.mlp, backend="aot_eager")
        loop = trainer(tmp_path, UnitScaling(storage=storage), max_steps=4)
        loop.fit(module, data, batches(1))
    assert float(loop.callback_metrics["train_loss"]) == pytest.approx(eager.losses[-1], rel=1e-5)
    torch._dynamo.reset()


class LogsOnly(Language):
    """Keeps no list, which would break the graph."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss
