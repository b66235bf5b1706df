"""Parts of Lightning beside unit scaling: training with them is a plain loop's, or an uninterrupted run's, number for
number.

What has tests of its own is not repeated: averages (EMA, SWA), BackboneFinetuning, precisions, compiling, activation
checkpointing, GANs, several fits and models in `test_callback`; resuming in `test_checkpoint`; processes in `test_ddp`
and `test_model_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
)
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from support.training import Language, batches, trainer
from support.zoo import Batch, next_token_batch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, IterableDataset

from lightning_unitscale import UnitScaling, UnitScalingError, load_checkpoint, scale_learning_rates, unit_scale

QUICK = ("umup", "unit")  # the others by night
EVERY = [QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
    ("umup", "folded"), ("preserve", "folded"), ("preserve", "unit"),
))]  # fmt: skip
every_way = pytest.mark.parametrize(("scheme", "storage"), EVERY)


def model(cls: type[Language] = Language, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(batch_norm=False, **options)


def raw_loop(
    scheme: str,
    storage: str,
    seen: Sequence[int],
    accumulate: int = 1,
    clip: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Language:
    """Training without Lightning on the batches `seen`, by number."""
    module = model(**options)
    optimizers = module.configure_optimizers()
    optimizer, schedule = optimizers, None
    if isinstance(optimizers, dict):
        optimizer, schedule = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    plan = unit_scale(module, lambda m: m.loss(next_token_batch(seen[0])), scheme, storage=storage)  # type: ignore[operator]
    scale_learning_rates(optimizer, plan)
    for count, number in enumerate(seen, start=1):
        (module.loss(next_token_batch(number)) / accumulate).backward()
        if count % accumulate == 0 or count == len(seen):
            if clip is not None:
                clip(list(module.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
    return module


def assert_same_weights(module: pl.LightningModule, expected: pl.LightningModule) -> None:
    for (name, value), other in zip(module.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# --- training is a plain loop's ---------------------------------------------------------------------------------------


class Rows(IterableDataset[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        yield from (next_token_batch(number) for number in range(6))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Batch]:
        return batches(6)


class Combined(Language):
    """Both loaders' batches come in one dict."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["first"], batch_idx)


class Manual(Language):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@dataclass
class Feature:
    """A way to train, and which batches it comes to.

    Attributes:
        callbacks: made for each run, in its folder.
        raw: what the plain loop does more.
    """

    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Path], list[Any]] = lambda folder: []
    data: Callable[[], Any] = lambda: batches(6)
    seen: Sequence[int] = range(6)
    cls: type[Language] = Language
    module: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    validates: bool = False


FEATURES: dict[str, Feature] = {
    "accumulation": Feature({"accumulate_grad_batches": 3}, raw={"accumulate": 3}),
    "accumulation, a schedule": Feature(
        {"accumulate_grad_batches": 2}, raw={"accumulate": 2}, module={"schedule": True}
    ),
    "a schedule": Feature(module={"schedule": True}),
    "clipping by norm": Feature({"gradient_clip_val": 0.1}, raw={"clip": lambda p: clip_grad_norm_(p, 0.1)}),
    "clipping by value": Feature(
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        raw={"clip": lambda p: clip_grad_value_(p, 1e-3)},
    ),
    "fast_dev_run": Feature({"fast_dev_run": 2}, seen=range(2), validates=True),
    "overfit_batches": Feature({"overfit_batches": 2, "max_epochs": 3}, seen=[0, 1] * 3),
    "limit_train_batches": Feature({"limit_train_batches": 4}, seen=range(4)),
    "limit_train_batches, a share": Feature({"limit_train_batches": 0.5}, seen=range(3)),
    "limit_val_batches": Feature({"limit_val_batches": 1}, validates=True),
    "a sanity check": Feature({"num_sanity_val_steps": 2}, validates=True),
    "val_check_interval": Feature({"val_check_interval": 2}, validates=True),
    "two epochs": Feature({"max_epochs": 2}, seen=[*range(6), *range(6)]),
    "max_time": Feature({"max_time": "00:01:00:00"}),
    "Timer": Feature(callbacks=lambda folder: [Timer("00:01:00:00")]),
    "the simple profiler": Feature({"profiler": "simple"}),
    "the advanced profiler": Feature({"profiler": "advanced"}),
    "detect_anomaly": Feature({"detect_anomaly": True}),
    "deterministic": Feature({"deterministic": True}),
    "no inference mode": Feature({"inference_mode": False}, validates=True),
    "LearningRateMonitor": Feature(callbacks=lambda folder: [LearningRateMonitor("step")], options={"logger": True}),
    "EarlyStopping": Feature(
        {"max_epochs": 3},
        callbacks=lambda folder: [EarlyStopping("val_loss", min_delta=100.0, patience=1)],
        seen=[*range(6), *range(6)],
        validates=True,
    ),
    "ModelCheckpoint": Feature(
        {"enable_checkpointing": True},
        callbacks=lambda folder: [ModelCheckpoint(folder, monitor="val_loss", save_last=True)],
        validates=True,
    ),
    "IterableDataset": Feature(data=lambda: DataLoader(Rows(), batch_size=None)),
    "LightningDataModule": Feature(data=Data),
    "CombinedLoader": Feature(
        data=lambda: CombinedLoader({"first": batches(6), "second": batches(6, 50)}, "min_size"), cls=Combined
    ),
    "two workers": Feature(
        data=lambda: DataLoader([next_token_batch(n) for n in range(6)], batch_size=None, num_workers=2)
    ),
    "manual optimization": Feature(cls=Manual),
    "reloading loaders": Feature({"reload_dataloaders_every_n_epochs": 1}),
    "use_distributed_sampler": Feature({"use_distributed_sampler": False}),
    "barebones": Feature({"barebones": True}),
}


TRIED_BY_DAY = (
    "accumulation",
    "clipping by norm",
    "fast_dev_run",
    "overfit_batches",
    "a sanity check",
    "EarlyStopping",
)
BY_NAME = [name if name in TRIED_BY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in FEATURES]


@every_way
@pytest.mark.parametrize("name", BY_NAME)
def test_training_is_a_plain_loop_s(tmp_path: Path, name: str, scheme: str, storage: str) -> None:
    feature = FEATURES[name]
    options: dict[str, Any] = {"max_epochs": 1, **feature.options}
    if options.get("logger"):
        options["logger"] = CSVLogger(tmp_path)
    if name == "barebones":
        options = {**options, "logger": None, "enable_checkpointing": None}
        options |= {"enable_progress_bar": None, "enable_model_summary": None, "num_sanity_val_steps": None}
    module = model(feature.cls, **feature.module)
    loop = trainer(tmp_path, UnitScaling(scheme, storage=storage), *feature.callbacks(tmp_path), **options)
    loop.fit(module, feature.data(), batches(3, first=100) if feature.validates else None)
    assert_same_weights(module, raw_loop(scheme, storage, list(feature.seen), **feature.raw, **feature.module))
    assert loop.global_step == -(-len(feature.seen) // feature.raw.get("accumulate", 1))


# --- the Tuner as callbacks -------------------------------------------------------------------------------------------


class Tuned(Language):
    """Has the attributes that the finders set."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lr, self.batch_size = 3e-3, 2

    def train_dataloader(self) -> DataLoader[Any]:
        rows = [{name: value[0] for name, value in next_token_batch(seed).items()} for seed in range(32)]
        return DataLoader(rows, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        return batches(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


FINDERS: dict[str, Callable[[], pl.Callback]] = {
    "LearningRateFinder": lambda: LearningRateFinder(1e-4, 1e-2, num_training_steps=5, update_attr=True),
    "BatchSizeFinder": lambda: BatchSizeFinder(steps_per_trial=2, init_val=2, max_trials=2),
}


@every_way
@pytest.mark.parametrize("name", FINDERS)
def test_after_a_finder_training_is_as_without_it(tmp_path: Path, name: str, scheme: str, storage: str) -> None:
    found = model(Tuned)
    trainer(tmp_path, UnitScaling(scheme, storage=storage), FINDERS[name](), max_steps=4).fit(found)
    alone = model(Tuned)
    alone.lr, alone.batch_size = found.lr, found.batch_size
    trainer(tmp_path, UnitScaling(scheme, storage=storage), max_steps=4).fit(alone)
    assert_same_weights(found, alone)


class PlanWhenTrainingStarts(pl.Callback):
    def __init__(self, callback: UnitScaling) -> None:
        self.callback, self.seen = callback, [object()]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = [self.callback.plan]


@pytest.mark.parametrize("name", FINDERS)
def test_the_plan_of_a_trial_does_not_outlive_it(tmp_path: Path, name: str) -> None:
    callback = UnitScaling()
    look = PlanWhenTrainingStarts(callback)
    trainer(tmp_path, callback, FINDERS[name](), look, max_steps=2).fit(model(Tuned))
    assert look.seen == [None]
    assert callback.plan is not None


# --- before, after and without training -------------------------------------------------------------------------------


@every_way
def test_evaluation_before_training_is_the_untouched_model_s(tmp_path: Path, scheme: str, storage: str) -> None:
    loop = trainer(tmp_path, UnitScaling(scheme, storage=storage), max_epochs=1)
    module, untouched = model(), model()
    for run in (loop.validate, loop.test):
        expected = getattr(trainer(tmp_path), run.__name__)(untouched, batches(2, 100), verbose=False)
        assert run(module, batches(2, 100), verbose=False) == expected
    predicted = loop.predict(module, batches(2, 100))
    assert predicted is not None
    for ours, theirs in zip(predicted, trainer(tmp_path).predict(untouched, batches(2, 100)), strict=True):  # type: ignore[arg-type]
        assert torch.equal(ours, theirs)
    loop.fit(module, batches(6))
    assert_same_weights(module, raw_loop(scheme, storage, range(6)))


@every_way
def test_evaluation_after_training_is_of_the_trained_function(tmp_path: Path, scheme: str, storage: str) -> None:
    loop = trainer(tmp_path, UnitScaling(scheme, storage=storage), max_epochs=1)
    module = model()
    loop.fit(module, batches(6))
    expected = raw_loop(scheme, storage, range(6)).eval()
    with torch.no_grad():
        loss = sum(float(expected.loss(next_token_batch(number))) for number in (100, 101)) / 2
    for run, name in ((loop.validate, "val_loss"), (loop.test, "test_loss")):
        assert run(module, batches(2, 100), verbose=False)[0][name] == pytest.approx(loss, rel=1e-5)
    saved = tmp_path / "a.ckpt"
    loop.save_checkpoint(saved, weights_only=True)
    fresh = trainer(tmp_path)
    assert fresh.test(model(), batches(2, 100), ckpt_path=saved, verbose=False, weights_only=True)[0][
        "test_loss"
    ] == pytest.approx(loss, rel=1e-5)


@every_way
def test_best_and_last_and_weights_alone_are_kept(tmp_path: Path, scheme: str, storage: str) -> None:
    for folder, alone in (("all", False), ("weights", True)):
        keep = ModelCheckpoint(
            tmp_path / folder,
            every_n_train_steps=2,
            save_top_k=-1,
            filename="{step}",
            save_last=True,
            save_weights_only=alone,
        )
        options: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": True}
        trainer(tmp_path, UnitScaling(scheme, storage=storage), keep, **options).fit(model(), batches(6))
    for steps in (2, 4, 6):
        for folder in ("all", "weights"):
            loaded = model()
            load_checkpoint(loaded, tmp_path / folder / f"step={steps}.ckpt")
            assert_same_weights(loaded, raw_loop(scheme, storage, range(steps)))
    resumed = model()
    loop = trainer(tmp_path, UnitScaling(scheme, storage=storage), max_epochs=2)
    loop.fit(resumed, batches(6), ckpt_path=tmp_path / "all" / "last.ckpt")
    assert_same_weights(resumed, raw_loop(scheme, storage, [*range(6), *range(6)]))


# --- optimizers -------------------------------------------------------------------------------------------------------


class WithLBFGS(Language):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


def test_lbfgs_is_refused_without_a_family_that_would_be_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UnitScalingError, match="one step size for all parameters") as refusal:
        trainer(tmp_path, UnitScaling(), max_steps=2).fit(model(WithLBFGS), batches())
    assert "family" not in str(refusal.value)


def test_lbfgs_trains_under_preserve_as_untouched(tmp_path: Path) -> None:
    preserved, untouched = model(WithLBFGS), model(WithLBFGS)
    trainer(tmp_path, UnitScaling("preserve"), max_steps=3).fit(preserved, batches())
    trainer(tmp_path, max_steps=3).fit(untouched, batches())
    assert_same_weights(preserved, untouched)


# --- from configuration -----------------------------------------------------------------------------------------------


@every_way
def test_lightning_cli_and_hydra_train_alike(tmp_path: Path, scheme: str, storage: str) -> None:
    arguments = {"scheme": scheme, "storage": storage}
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    node = {"class_path": "lightning_unitscale.UnitScaling", "init_args": arguments}
    cli = LightningCLI(
        Language,
        trainer_defaults={**quiet, "max_epochs": 1},
        save_config_callback=None,
        run=False,
        args={"trainer": {"callbacks": [node]}, "model": {"batch_norm": False}},
    )
    module = model()
    cli.trainer.fit(module, batches(6))
    callbacks = [{"_target_": "lightning_unitscale.UnitScaling", **arguments}]
    made = instantiate({"_target_": "pytorch_lightning.Trainer", **quiet, "max_epochs": 1, "callbacks": callbacks})
    other = model()
    made.fit(other, batches(6))
    expected = raw_loop(scheme, storage, range(6))
    assert_same_weights(module, expected)
    assert_same_weights(other, expected)
