"""`UnitScaling` in a Trainer: against the untouched model, by every door, and beside other callbacks."""

import copy
import pickle
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
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.callbacks.weight_averaging import EMAWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from support.by_day import by_day
from support.training import STEPS, Language, assert_same_state, batches, build, fit, trainer
from support.zoo import LIGHTNING_CASES, Batch, loader, next_token_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_unitscale import UnitScaling, lifecycle, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
from lightning_unitscale.strategy import UnitScalingStrategy

STORAGES = ("folded", "unit")


class Seen(pl.Callback):
    """What the world outside sees of a run: losses, logged values, learning rates, gradients, order of the batches."""

    def __init__(self) -> None:
        self.losses: list[Any] = []
        self.logged: list[Any] = []
        self.rates: list[Any] = []
        self.gradients: list[Any] = []
        self.batches: list[int] = []

    def differences(self, other: "Seen") -> list[str]:
        """What differs; comparing the lists in an assert would print them for minutes."""
        names = ("losses", "logged", "rates", "gradients", "batches")
        return [name for name in names if repr(getattr(self, name)) != repr(getattr(other, name))]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.batches.append(int(next(iter(batch.values())).sum()))
        self.losses.append(float(outputs["loss"]) if outputs else None)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.gradients.append([p.grad.double().norm().item() for p in pl_module.parameters() if p.grad is not None])


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for each model that is prepared."""
    prepared: list[Any] = []
    original = lifecycle.prepare

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.append(module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(lifecycle, "prepare", counted)
    return prepared


# ---------------------------------------------------------------------------------------------------------------------
# One room, several doors
# ---------------------------------------------------------------------------------------------------------------------


def by_hand(options: dict[str, Any]) -> Language:
    """The loop that Lightning's is here, with `unit_scale`: no callback, no strategy, no Trainer."""
    module = build()
    module.log = lambda *args, **kwargs: None
    plan = unit_scale(module, lambda model: model.loss(next_token_batch(0)), **options)
    optimizer = module.configure_optimizers()
    scale_learning_rates(optimizer, plan)
    for step in range(STEPS):
        loss = module.training_step(next_token_batch(step % 5), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    del module.log
    return module


@pytest.mark.parametrize("storage", STORAGES)
def test_every_door_gives_one_training(tmp_path: Path, preparations: list[Any], storage: str) -> None:
    expected = by_hand({"storage": storage})
    callback = UnitScaling(storage=storage)
    runs = {
        "callback": fit(tmp_path, callback),
        "strategy": fit(tmp_path, strategy=UnitScalingStrategy(storage=storage)),
        "both": fit(tmp_path, UnitScaling(storage=storage), strategy="unitscale"),
        "both, same options": fit(
            tmp_path, UnitScaling(storage=storage), strategy=UnitScalingStrategy(storage=storage)
        ),
    }
    if storage == "folded":
        runs["by name"] = fit(tmp_path, strategy="unitscale")
    assert len(preparations) == len(runs)
    assert callback.plan is plan_of(runs["callback"])
    assert callback.plan.storage == storage
    assert expected.losses[-1] < expected.losses[0] - 0.2
    for name, run in runs.items():
        assert run.losses == expected.losses, name
        assert_same_state(run, expected)
    untouched = fit(tmp_path)
    assert untouched.losses != expected.losses


def train(case_name: str, folder: Path, *callbacks: pl.Callback, **options: Any) -> tuple[pl.LightningModule, Seen]:
    case, seen = LIGHTNING_CASES[case_name], Seen()
    torch.manual_seed(0)
    module = case.build()
    fit(folder, seen, *callbacks, module=module, data=loader(case, 4), max_steps=12, **options)
    return module, seen


@pytest.mark.parametrize("name", LIGHTNING_CASES)
def test_modules_in_unusual_places(tmp_path: Path, preparations: list[Any], name: str) -> None:
    untouched, seen = train(name, tmp_path)
    preserved, preserved_seen = train(name, tmp_path, UnitScaling("preserve"))
    assert_same_state(preserved, untouched)
    assert not preserved_seen.differences(seen)

    _, folded_seen = train(name, tmp_path, UnitScaling())
    _, named_seen = train(name, tmp_path, strategy="unitscale")
    assert not named_seen.differences(folded_seen)
    unit = UnitScaling(storage="unit")
    _, unit_seen = train(name, tmp_path, unit)
    assert len(preparations) == 4
    assert {"losses", "logged"} & set(folded_seen.differences(seen))
    assert unit.plan is not None and unit.plan.explicit_sites
    # Adam's eps aside, which both storages multiply to match, only rounding is left between two implementations.
    for one, other in zip(folded_seen.losses, unit_seen.losses, strict=True):
        assert one == pytest.approx(other, rel=2e-4) if one is not None else other is None
    for one, other in zip(folded_seen.logged, unit_seen.logged, strict=True):
        assert one == pytest.approx(other, rel=2e-3)


def test_gan_scales_both_optimizers(tmp_path: Path) -> None:
    callback = UnitScaling()
    train("gan", tmp_path, callback)
    assert callback.plan is not None
    roles = callback.plan.roles
    assert {
        name: roles[name] for name in ("generator.0.weight", "discriminator.0.weight", "discriminator.2.weight")
    } == {
        "generator.0.weight": "hidden",
        "discriminator.0.weight": "hidden",
        "discriminator.2.weight": "readout",
    }


# ---------------------------------------------------------------------------------------------------------------------
# `preserve` is the identity
# ---------------------------------------------------------------------------------------------------------------------

IDENTITY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({}, {}),
    "sgd momentum": ({"optimizer": "sgd", "lr": 0.05}, {}),
    "clip norm": ({}, {"gradient_clip_val": 0.1}),
    "clip value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulate": ({"dropout": 0.2}, {"accumulate_grad_batches": 3}),
    "schedule, dropout": ({"schedule": True, "dropout": 0.2}, {"val_check_interval": 2, "num_sanity_val_steps": 2}),
    "bf16 mixed": ({"dropout": 0.2}, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", IDENTITY)
def test_preserve_is_the_identity(tmp_path: Path, name: str, storage: str) -> None:
    model, options = IDENTITY[name]

    def run(*callbacks: pl.Callback) -> tuple[Language, Seen]:
        seen, module = Seen(), build(**model)
        torch.manual_seed(1)
        shuffled = DataLoader([next_token_batch(seed) for seed in range(7)], batch_size=None, shuffle=True)
        trainer(tmp_path, seen, *callbacks, max_steps=STEPS, **options).fit(module, shuffled, batches(2))
        return module, seen

    (untouched, theirs), (preserved, ours) = run(), run(UnitScaling("preserve", storage=storage))
    assert len(theirs.losses) >= STEPS and "train_loss_epoch" in theirs.logged[-1]
    assert not ours.differences(theirs)
    assert preserved.losses == untouched.losses
    assert_same_state(preserved, untouched)


# ---------------------------------------------------------------------------------------------------------------------
# Beside other parts of Lightning and torch
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Beginnings and ends
# ---------------------------------------------------------------------------------------------------------------------


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
