"""The gate of the gradients: it names what a backward pass gets wrong, and lets honest models be."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from support import zoo
from support.functions import Reversal
from support.prepared import build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import UnitScaling, UnitScalingError, unit_scale
from lightning_unitscale import prepare as preparing
from lightning_unitscale.engine.checks import verify_gradients as gate
from lightning_unitscale.engine.record import recorder
from lightning_unitscale.engine.runtime.install import rules_in_force
from lightning_unitscale.ops.scaled_product import ScaledProduct

WIDTH, CLASSES, BATCH = 16, 6, 32
Net = Callable[[], nn.Module]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(BATCH, WIDTH, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator)


def loss_of(module: nn.Module) -> Tensor:
    x, y = data()
    return F.cross_entropy(module(x), y)


def prepare(module: nn.Module, **options: Any) -> list[str]:
    """The plan's notes on gradients, of a model with explicit factors."""
    plan = unit_scale(module, loss_of, **{"storage": "unit", **options})
    assert rules_in_force(module) is not None
    return [note for note in plan.notes if note.startswith("gradients")]


class OwnLinear(torch.autograd.Function):
    """x wᵀ that saves its operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g = gradient.to(weight.dtype)  # under autocast they differ
        return (g @ weight).to(x.dtype), g.T @ x.to(weight.dtype)


class Through(torch.autograd.Function):
    """Rounds; backward as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Stack(nn.Module):
    """Residual blocks with something done to the stream between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x, blocks: int = 3) -> None:
        super().__init__()
        self.between = between
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(blocks)
        )
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.between(x + block(x))
        return self.last(x)  # type: ignore[no-any-return]


class OwnLayer(nn.Module):
    """One of many layers has a backward pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = Stack()
        self.before.last = nn.Linear(WIDTH, WIDTH)
        self.odd = nn.Linear(WIDTH, WIDTH, bias=False)
        self.after = Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(OwnLinear.apply(self.before(x), self.odd.weight))  # type: ignore[no-any-return]


def seeded(make: Net) -> nn.Module:
    torch.manual_seed(0)
    return make()


@contextmanager
def functions_unseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recorder as it would be if it knew nothing of autograd.Functions."""

    @contextmanager
    def nobody_watches(run: Any) -> Iterator[None]:
        yield

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "watching_functions", nobody_watches)
        yield


# --- what is wrong is named -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_inside_a_function_is_named(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    module = seeded(OwnLayer)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def step(module: nn.Module) -> Tensor:
        x, y = data()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return F.cross_entropy(module(x).float(), y)

    with functions_unseen(monkeypatch), pytest.raises(UnitScalingError, match=r"odd\.weight") as error:
        unit_scale(module, step, storage="unit", hyperparameters={"readout_exponent": 1.0})  # bf16 rounds less of it
    assert "skip" in str(error.value)
    assert rules_in_force(module) is None
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter, before[name], rtol=1e-6)


def test_skip_as_the_message_says_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(OwnLayer)
    with functions_unseen(monkeypatch):
        assert prepare(module, skip=["odd.weight"]) == []


def test_the_functions_of_the_step_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaledProduct, "setup_context", staticmethod(_forgets_its_factor))
    with pytest.raises(UnitScalingError, match=r"autograd\.Functions in this step: OwnLinear"):
        prepare(seeded(OwnLayer))


def test_an_operation_with_a_wrong_backward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaledProduct, "setup_context", staticmethod(_forgets_its_factor))
    with pytest.raises(UnitScalingError, match=r"last\.weight \(× "):
        prepare(seeded(Stack))


def test_one_wrong_weight_of_many_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *_ = ctx.saved_tensors
        wide = gradient.shape[-1] == 3 * WIDTH  # the one layer of this width
        return ctx.a * gradient @ weight, (1.0 if wide else ctx.a) * gradient.T @ x, ctx.b * gradient.sum(0), None, None

    setup = ScaledProduct.setup_context

    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        setup(ctx, inputs, output)
        ctx.b = inputs[4]

    monkeypatch.setattr(ScaledProduct, "setup_context", staticmethod(setup_context))
    monkeypatch.setattr(ScaledProduct, "backward", staticmethod(backward))

    def make() -> nn.Module:
        stack = Stack(blocks=4)
        stack.blocks[2][1], stack.blocks[2][3] = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        return stack

    with pytest.raises(UnitScalingError) as error:
        prepare(seeded(make))
    assert "blocks.2.1.weight (× 4)" in str(error.value)
    assert "blocks.3" not in str(error.value)


def _forgets_its_factor(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.a, ctx.b = 1.0, inputs[4]
    ctx.save_for_backward(*inputs[:2])


# --- honest models ----------------------------------------------------------------------------------------------


def hard(x: Tensor) -> Tensor:
    return x + F.one_hot(x.argmax(-1), WIDTH)


def reentrant(x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=True)  # type: ignore[no-any-return]


class CheckpointedTwice(nn.Module):
    """A layer with an explicit factor, run again lazily by a backward pass inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = (nn.Linear(WIDTH, size) for size in (WIDTH, WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(self.hidden, x, use_reentrant=False)  # type: ignore[no-any-return]

        return self.last(checkpoint(inner, self.first(x), use_reentrant=True))  # type: ignore[no-any-return]


class Frozen(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(40, WIDTH, sparse=True), Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.table((10 * x).long().abs() % 40).mean(1))  # type: ignore[no-any-return]


CHECKED: dict[str, Net] = {
    "plain": Stack,
    "dropout": lambda: Stack(nn.Dropout(0.5)),
    "batch norm": lambda: Stack(nn.BatchNorm1d(WIDTH)),
    "argmax": lambda: Stack(hard),
    "own backward": OwnLayer,
    "reentrant checkpoints": lambda: Stack(reentrant),
    "a checkpoint inside a reentrant one": CheckpointedTwice,
    "frozen": Frozen,
    "sparse": Sparse,
}
BY_DESIGN: dict[str, Net] = {
    "straight through": lambda: Stack(Through.apply),
    "gradient reversal": lambda: Stack(Reversal.apply),
    "stopped gradients": lambda: Stack(lambda x: x + x.detach().tanh()),
}


@pytest.mark.filterwarnings("error::UserWarning:lightning_unitscale")
@pytest.mark.parametrize("name", CHECKED)
def test_honest_gradients_are_checked_in_silence(name: str) -> None:
    assert prepare(seeded(CHECKED[name])) == []


@pytest.mark.filterwarnings("error::UserWarning:lightning_unitscale")
@pytest.mark.parametrize("name", BY_DESIGN)
def test_gradients_that_are_no_slopes_by_design_are_left_to_their_author(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "is_far_above", lambda before, after: False)  # what is rounded changes the loss
    notes = prepare(seeded(BY_DESIGN[name]))
    assert any("in the untouched model too" in note or "the loss is 0, jumps" in note for note in notes)


def test_a_step_that_cannot_be_differentiated_is_noted() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("no backward here")

    assert prepare(seeded(lambda: Stack(Once.apply))) == ["gradients were not checked: RuntimeError: no backward here"]


@pytest.mark.parametrize("name", ["several-losses", "gan", "training-step", "other-methods"])
def test_each_loss_of_manual_optimization_is_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo.LIGHTNING_CASES[name]
    callback = UnitScaling(storage="unit")
    pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(zoo.lightning_module(case), zoo.loader(case, batches=2))
    assert callback.plan is not None
    assert not [note for note in callback.plan.notes if note.startswith("gradients")]


def test_a_small_llama_takes_five_passes() -> None:
    case = zoo.CASES["llama-sdpa"]
    batch, passes = case.batch(0), 0

    def step(module: nn.Module) -> Tensor:
        nonlocal passes
        passes += 1
        return case.loss(module, batch)

    unit_scale(build(case), step, storage="unit")
    assert passes == 2 * 2 + 1  # untouched and prepared: recorded, and moved by a trial step; moved along the gradients


def test_folded_models_without_factors_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_Gate", None)
    unit_scale(seeded(lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, CLASSES))), loss_of)


def state(module: nn.Module) -> list[Any]:
    tensors = [*module.parameters(), *module.buffers()]
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    return [[(t.clone(), t.grad, t._version, id(t)) for t in tensors], *generators]


@pytest.mark.parametrize("sabotaged", [False, True])
def test_no_trace_is_left(sabotaged: bool) -> None:
    """Also not where the untouched model had to be asked."""

    def make() -> nn.Module:
        return Stack(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), *[_Apply()] * sabotaged))

    states = []
    for verify in (False, True):
        module = seeded(make)
        unit_scale(module, loss_of, storage="unit", verify=verify, hyperparameters={"readout_exponent": 1.0})
        states.append((state(module), loss_of(module).item()))
    (one, loss), (other, loss_after) = states
    assert loss == loss_after
    for (a, grad, *_), (b, grad_after, *_) in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
        assert grad is None
        assert grad_after is None
    assert torch.equal(one[1], other[1])
    assert one[2:] == other[2:]


class _Apply(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Through.apply(x)  # type: ignore[no-any-return]


def test_a_single_number_is_moved_like_any_parameter() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
            self.gate = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.gate * self.first(x).relu())

    model = Gated()
    assert prepare(model) == []
    assert model.gate.item() == 0.5
