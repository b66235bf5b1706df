"""Parts of Lightning beside unit scaling: training with them is a plain loop's, or an uninterrupted run's, number for
number.

What no plain loop does has tests of its own: BackboneFinetuning, GANs, averages of models with BatchNorm and the Tuner
in `test_callback` and `test_callback_beside_others`; resuming in `test_checkpoint`; processes in `test_ddp` and
`test_model_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from support.muon_and_adam import MuonAndAdam
from support.training import Language, Wrapped, batches, trainer
from support.zoo_batches import Batch, next_token_batch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_unitscale import UnitScaling, UnitScalingError, load_checkpoint, scale_learning_rates, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of

QUICK = ("umup", "unit")  # the others by night
EVERY = [QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
    ("umup", "folded"), ("preserve", "folded"), ("preserve", "unit"),
))]  # fmt: skip
every_way = pytest.mark.parametrize(("scheme", "storage"), EVERY)


def model(cls: type[Language] = Language, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(batch_norm=False, **options)


Weights = list[Tensor]


def raw_loop(
    scheme: str,
    storage: str,
    seen: Sequence[int],
    cls: type[Language] = Language,
    accumulate: int | Sequence[int] = 1,
    clip: Callable[[Any], Any] | None = None,
    final: Callable[[list[Weights]], Weights] | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Language:
    """Training without Lightning on the batches `seen`, by number.

    Args:
        accumulate: how many batches make a step; or so many from each batch on.
        final: the weights that training ends with, from those after each step.
        autocast: around forward passes.
    """
    module = model(cls, **options).to(dtype)
    optimizers = module.configure_optimizers()
    optimizer, schedule = optimizers, None
    if isinstance(optimizers, dict):
        optimizer, schedule = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]

    def loss_of(m: Any, number: int) -> Tensor:
        with autocast or nullcontext():
            loss: Tensor = m.loss(next_token_batch(number))
        return loss

    plan = unit_scale(module, lambda m: loss_of(m, seen[0]), scheme, storage=storage)
    scale_learning_rates(optimizer, plan)
    pieces = [accumulate] * len(seen) if isinstance(accumulate, int) else accumulate
    after: list[Weights] = []
    waiting = 0
    for index, (number, count) in enumerate(zip(seen, pieces, strict=True)):
        (loss_of(module, number) / count).backward()
        waiting += 1
        if waiting == count or index + 1 == len(seen):
            waiting = 0
            if clip is not None:
                clip(list(module.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            after.append([p.detach().clone() for p in module.parameters()])
    if final is not None:
        for parameter, value in zip(module.parameters(), final(after), strict=True):
            parameter.data.copy_(value)
    return module  # type: ignore[no-any-return]


def assert_same_weights(module: pl.LightningModule, expected: pl.LightningModule, noise: str = "") -> None:
    for (name, value), other in zip(module.named_parameters(), expected.parameters(), strict=True):
        if name == noise:
            continue
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
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()


class WithTwoOptimizers(Manual):
    """Each parameter is in one of them, so that the two are what one would be."""

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.AdamW(part, lr=self.hparams["lr"]) for part in (parameters[:7], parameters[7:])]


class WithTwoFamilies(Language):
    """One optimizer, Muon for the matrices of the block and Adam for the rest."""

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.block.parameters() if p.dim() == 2]
        others = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        return MuonAndAdam([{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}])


class Compiled(Wrapped):
    compiled = True


class Checkpointed(Wrapped):
    checkpointing = True


class CheckpointedReentrant(Language):
    def forward(self, ids: Tensor) -> Tensor:
        x = checkpoint(self.block, self.embedding(ids), use_reentrant=True)
        return self.head(self.norm(x.flatten(0, 1)))


class LogsOnly(Language):
    """Keeps no list of losses, which would break a graph of the whole step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss


def compiled(module: pl.LightningModule) -> Any:
    return torch.compile(module, backend="aot_eager")


def compiled_in_place(module: pl.LightningModule) -> Any:
    module.compile(backend="aot_eager")
    return module


def halved_each_time(after: list[Weights]) -> Weights:
    average = after[0]
    for weights in after[1:]:
        average = [0.5 * (old + new) for old, new in zip(average, weights, strict=True)]
    return average


def mean_after_two_epochs(after: list[Weights]) -> Weights:
    return [(one + other) / 2 for one, other in zip(after[5], after[11], strict=True)]


@dataclass
class Feature:
    """A way to train, and which batches it comes to.

    Attributes:
        callbacks: made for each run, in its folder.
        fitted: what is given to `fit`, made of the module.
        raw: what the plain loop does more.
    """

    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Path], list[Any]] = lambda folder: []
    data: Callable[[], Any] = lambda: batches(6)
    seen: Sequence[int] = range(6)
    cls: type[Language] = Language
    module: dict[str, Any] = field(default_factory=dict)
    fitted: Callable[[pl.LightningModule], Any] = lambda module: module
    raw: dict[str, Any] = field(default_factory=dict)
    validates: bool = False


FEATURES: dict[str, Feature] = {
    "accumulation": Feature({"accumulate_grad_batches": 3}, raw={"accumulate": 3}),
    "accumulation, a schedule": Feature(
        {"accumulate_grad_batches": 2}, raw={"accumulate": 2}, module={"schedule": True}
    ),
    "accumulation by a scheduler": Feature(
        {"max_epochs": 2},
        callbacks=lambda folder: [GradientAccumulationScheduler({0: 1, 1: 3})],
        seen=[*range(6), *range(6)],
        raw={"accumulate": [1] * 6 + [3] * 6},
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
    "the profiler of torch": Feature({"profiler": "pytorch"}),
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
    "several optimizers": Feature(cls=WithTwoOptimizers),
    "an optimizer of two families": Feature(cls=WithTwoFamilies, raw={"cls": WithTwoFamilies}),
    "compile, inner": Feature(cls=Compiled),
    "compile, whole": Feature(cls=LogsOnly, fitted=compiled),
    "compile, in place": Feature(cls=LogsOnly, fitted=compiled_in_place),
    "checkpointing": Feature(cls=Checkpointed),
    "checkpointing, reentrant": Feature(cls=CheckpointedReentrant),
    "EMA": Feature(callbacks=lambda folder: [EMAWeightAveraging(decay=0.5)], raw={"final": halved_each_time}),
    "WeightAveraging": Feature(
        callbacks=lambda folder: [WeightAveraging(avg_fn=lambda old, new, count: 0.5 * (old + new))],
        raw={"final": halved_each_time},
    ),
    "SWA": Feature(
        {"max_epochs": 3},  # from the second epoch on, at the rate that there is
        callbacks=lambda folder: [StochasticWeightAveraging(swa_lrs=3e-3, swa_epoch_start=2)],
        seen=[*range(6)] * 3,
        raw={"final": mean_after_two_epochs},
    ),
    "bf16-mixed": Feature({"precision": "bf16-mixed"}, raw={"autocast": torch.autocast("cpu", torch.bfloat16)}),
    "bf16-true": Feature({"precision": "bf16-true"}, raw={"dtype": torch.bfloat16}),
    "64-true": Feature({"precision": "64-true"}, raw={"dtype": torch.float64}),
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
    loop.fit(feature.fitted(module), feature.data(), batches(3, first=100) if feature.validates else None)
    # The key's bias has the gradient 0; compiled it is another rounding, along which Adam takes whole steps.
    noise = "block.attention.k.bias" if name.startswith("compile") else ""
    expected = raw_loop(scheme, storage, list(feature.seen), **feature.raw, **feature.module)
    assert_same_weights(module, expected, noise)
    if isinstance(every := feature.raw.get("accumulate", 1), int) and feature.cls is not WithTwoOptimizers:
        assert loop.global_step == -(-len(feature.seen) // every)
    torch._dynamo.reset()


@every_way
def test_fits_in_a_row_and_a_second_model_are_plain_loops(tmp_path: Path, scheme: str, storage: str) -> None:
    loop = trainer(tmp_path, UnitScaling(scheme, storage=storage), max_epochs=1)
    adamw, sgd = {"optimizer": "adamw"}, {"optimizer": "sgd", "lr": 0.05}
    first, second = model(**adamw), model(**sgd)
    loop.fit(first, batches(6))
    loop.fit_loop.max_epochs = 2  # a Trainer goes on counting
    loop.fit(second, batches(6))
    for module, options in ((first, adamw), (second, sgd)):
        assert_same_weights(module, raw_loop(scheme, storage, range(6), **options))
    loop.fit_loop.max_epochs = 3
    loop.fit(first, batches(6))  # under the same plan, with an optimizer of its own
    expected = raw_loop(scheme, storage, range(6))
    optimizer, plan = expected.configure_optimizers(), plan_of(expected)
    assert plan is not None
    scale_learning_rates(optimizer, plan)
    for number in range(6):
        optimizer.zero_grad()
        expected.loss(next_token_batch(number)).backward()
        optimizer.step()
    assert_same_weights(first, expected)


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
