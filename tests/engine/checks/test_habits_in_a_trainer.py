"""Habits around a Trainer that write to weights or keep copies of them: right numbers, a warning, or a refusal."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_unitscale import UnitScaling, UnitScalingError

X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
each_storage = pytest.mark.parametrize("storage", ["folded", "unit"])
Habit = Callable[["Learner"], None]


class Lookahead(torch.optim.Adam):
    """Slow weights, kept by the optimizer from before the first step, to which the fast ones are pulled back."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def pull(self) -> None:
        """To the middle."""
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for parameter, kept in zip(group["params"], slow, strict=True):
                kept.lerp_(parameter.data, 0.5)
                parameter.data.copy_(kept)


class Learner(pl.LightningModule):
    """Three layers; `in_step` and `after_step` are the habits."""

    def __init__(self, in_step: Habit | None = None, after_step: Habit | None = None, optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        self.start = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.in_step, self.after_step, self.optimizer = in_step, after_step, optimizer or torch.optim.Adam
        self.losses: list[float] = []
        self.distances: list[float] = []

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        if self.in_step is not None:
            self.in_step(self)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.after_step is not None and self.global_step == 2:
            self.after_step(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=1e-3, eps=1e-12)


def fitted(model: Learner, storage: str, *callbacks: pl.Callback) -> tuple[UnitScaling, list[str]]:
    """Six steps; the callback and what was warned of."""
    callback = UnitScaling(storage=storage, optimizer_family="adam")
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.Trainer(max_steps=6, accelerator="cpu", callbacks=[callback, *callbacks], **options).fit(  # type: ignore[arg-type]
            model, DataLoader(TensorDataset(X, Y), batch_size=32)
        )
    return callback, [str(w.message) for w in caught if "unit scaling: " in str(w.message)]


@each_storage
@pytest.mark.parametrize("options", [{}, {"use_global_unstructured": False}], ids=["globally", "by layer"])
def test_pruning_in_a_trainer_is_refused_before_anything_is_changed(storage: str, options: dict[str, bool]) -> None:
    model = Learner()
    before = copy.deepcopy(model.net.state_dict())
    with pytest.raises(UnitScalingError, match="ModelPruning compares the magnitudes"):
        fitted(model, storage, ModelPruning(pruning_fn="l1_unstructured", amount=0.5, **options))
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def _clamp(model: Learner) -> None:
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.clamp_(-0.05, 0.05)


def _clamp_data(model: Learner) -> None:
    for parameter in model.net.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def _normalise_rows(model: Learner) -> None:
    weight = model.net[0].weight
    weight.data = nn.functional.normalize(weight.data, dim=1)  # type: ignore[operator, arg-type]


@each_storage
@pytest.mark.parametrize("write", [_clamp, _clamp_data, _normalise_rows])
def test_a_step_that_writes_to_weights_is_warned_of_by_its_code(write: Habit, storage: str) -> None:
    _, said = fitted(Learner(in_step=write), storage)
    assert any(("net.0.weight" in line and "training_step" in line) or write.__name__ in line for line in said)
    assert any("written outside the optimizer" in line and "preserve" in line for line in said)


def _prune_globally(model: Learner) -> None:
    layers = [(model.net[index], "weight") for index in (0, 2, 4)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)


def _prune_for_good(model: Learner) -> None:
    prune.l1_unstructured(model.net[2], "weight", amount=0.5)
    prune.remove(model.net[2], "weight")


@each_storage
@pytest.mark.parametrize(
    ("habit", "message"), [(_prune_globally, "pruned or reparametrised"), (_prune_for_good, "written outside")]
)
def test_pruning_by_hand_is_warned_of(habit: Habit, message: str, storage: str) -> None:
    _, said = fitted(Learner(after_step=habit), storage)
    assert any(message in line and "net.2.weight" in line and "preserve" in line for line in said)


def _rewind(model: Learner) -> None:
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            parameter.copy_(model.start[name])


@each_storage
def test_a_rewind_to_the_start_gives_the_first_loss_again(storage: str) -> None:
    """As a lottery ticket's: its originals, kept since before preparation, were rescaled with the weights."""
    model = Learner(after_step=_rewind)
    _, said = fitted(model, storage)
    assert model.losses[2] == pytest.approx(model.losses[0], rel=1e-5)
    assert any("written outside" in line for line in said)


def test_slow_weights_of_an_optimizer_move_alike_in_both_storages() -> None:
    """They are averages of functions then, not of one that is scaled and one that is not."""
    found = []
    for storage in ("folded", "unit"):
        model = Learner(after_step=lambda m: m.optimizers(use_pl_optimizer=False).pull(), optimizer=Lookahead)
        callback, _ = fitted(model, storage)
        assert callback.plan is not None
        assert any("Lookahead.slow[0][0] is a copy of net.0.weight" in note for note in callback.plan.notes)
        assert model.losses[2] < model.losses[0] + 0.1
        found.append(model.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def _measure(model: Learner) -> None:
    moved = [(p.detach() - model.start[name]).norm() for name, p in model.net.named_parameters()]
    model.distances.append(sum(map(float, moved)))


@each_storage
def test_a_distance_to_a_snapshot_for_a_log_line_changes_nothing(storage: str) -> None:
    plain, measured = Learner(), Learner(in_step=_measure)
    (callback, _), (other, _) = fitted(plain, storage), fitted(measured, storage)
    assert measured.losses == plain.losses
    assert callback.plan is not None
    assert other.plan is not None
    assert [p.role for p in callback.plan.parameters.values()] == [p.role for p in other.plan.parameters.values()]
    assert measured.distances[0] == 0.0 < measured.distances[1]


class _Snapshot(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start = [p.detach().clone() for p in module.parameters()]


@each_storage
def test_a_snapshot_of_a_callback_is_rescaled_with_the_weights(storage: str) -> None:
    snapshot, model = _Snapshot(), Learner()
    callback, _ = fitted(model, storage, snapshot)
    assert callback.plan is not None
    assert sum("_Snapshot.start" in note for note in callback.plan.notes) == len(snapshot.start)
    for kept, started in zip(snapshot.start, model.start.values(), strict=True):
        assert torch.equal(kept, started)


class _Tied(Learner):
    def __init__(self, **habits: Any) -> None:
        super().__init__(**habits)
        self.extra = nn.Linear(32, 32)
        self.net.insert(2, self.extra)


@each_storage
def test_weights_shared_after_preparation_are_warned_of(storage: str) -> None:
    _, said = fitted(_Tied(after_step=lambda m: setattr(m.net[3], "weight", m.extra.weight)), storage)
    assert any("net.3.weight replaced by another parameter" in line for line in said)


class _Averaged(Learner):
    """Moves an average that it registers, as a momentum encoder and `AveragedModel` do."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(self.net)
        self.write = write

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self.average.module.parameters(), self.net.parameters(), strict=True):
                self.write(kept, parameter)


@each_storage
@pytest.mark.parametrize(
    "write", [lambda kept, p: kept.lerp_(p, 0.1), lambda kept, p: setattr(kept, "data", 0.9 * kept.data + 0.1 * p.data)]
)
def test_an_average_in_the_model_is_let_be(write: Callable[[Tensor, Tensor], Any], storage: str) -> None:
    _, said = fitted(_Averaged(write), storage)
    assert not said


class _Perturbed(Learner):
    """Sharpness-aware steps by manual optimization, that put the weights elsewhere through `.data`."""

    automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], _: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        parameters = list(self.parameters())
        before = [p.data.clone() for p in parameters]
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        size = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm() + 1e-12
        for p in parameters:
            p.data = p.data + 0.05 * p.grad / size
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        for p, value in zip(parameters, before, strict=True):
            p.data = value
        optimizer.step()
        optimizer.zero_grad()


@each_storage
def test_a_perturbation_through_data_is_warned_of_and_leaves_the_plan_as_it_is(storage: str) -> None:
    (callback, _), (other, said) = fitted(Learner(), storage), fitted(_Perturbed(), storage)
    assert callback.plan is not None
    assert other.plan is not None
    expected = {name: p.multiplier for name, p in callback.plan.parameters.items()}
    assert {name: p.multiplier for name, p in other.plan.parameters.items()} == pytest.approx(expected)
    assert any("written outside" in line and "training_step" in line for line in said)
