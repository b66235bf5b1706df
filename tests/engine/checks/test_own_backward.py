"""Steps whose backward pass is not autograd's alone: reversible layers, `backward` in a Function, hooks, reversals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.functions import GradientScale, Reversal
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import Plan, UnitScalingError, unit_scale

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(24) % 4
each_storage = pytest.mark.parametrize("storage", ["folded", "unit"])


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class ReversibleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = feed_forward(16), feed_forward(16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], -1)

    def back(self, y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The input and its gradient, of the output and its; parameters get theirs."""
        (a, b), (of_a, of_b) = y.chunk(2, -1), gradient.chunk(2, -1)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            g = self.g(a)
            g.backward(of_b)
            b = (b - g).detach().requires_grad_()
            of_a = of_a + a.grad
            f = self.f(b)
            torch.autograd.backward(f, of_a)
        return torch.cat([a - f, b], -1).detach(), torch.cat([of_a, of_b + b.grad], -1)


class Reversible(torch.autograd.Function):
    """Keeps its output alone, and makes its input anew on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        for block in blocks:
            x = block(x)
        ctx.y, ctx.blocks = x.detach(), blocks
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        y = ctx.y
        for block in reversed(ctx.blocks):
            y, gradient = block.back(y, gradient)
        return gradient, None


class RevNet(nn.Module):
    def __init__(self, run: Callable[[Tensor, nn.ModuleList], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.first, self.last = nn.Linear(8, 16), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(ReversibleBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.run(torch.cat([x, x], -1), self.blocks))


class RunAgain(torch.autograd.Function):
    """A checkpoint that takes a dummy in place of parameters, and calls `backward` itself."""

    @staticmethod
    def forward(ctx: Any, dummy: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run, ctx.x = run, x
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            ctx.run(x).backward(gradient)
        return None, None, x.grad


class Blocks(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = own
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(feed_forward(16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            run = lambda x, block=block: x + block(x)  # noqa: E731
            x = RunAgain.apply(torch.zeros((), requires_grad=True), run, x) if self.own else run(x)
        return self.last(x)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def prepared(
    model: nn.Module, storage: str, loss: Callable[[Any], Tensor] = loss_of, **options: Any
) -> tuple[Plan, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = unit_scale(model, loss, storage=storage, **options)
    return plan, [str(w.message) for w in caught if "unit scaling" in str(w.message)]


def assert_slopes(model: nn.Module) -> None:
    model.zero_grad()
    loss_of(model).backward()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        direction = torch.randn(parameter.shape, generator=generator)
        assert parameter.grad is not None
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter += sign * 1e-5 * direction
                values.append(loss_of(model).item())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((parameter.grad * direction).sum().item(), abs=1e-6)


def _plainly(x: Tensor, blocks: nn.ModuleList) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


@each_storage
def test_a_reversible_network_has_no_factor_that_its_way_back_does_not_know(storage: str) -> None:
    plain, own = RevNet(_plainly), RevNet(Reversible.apply)
    plan, _ = prepared(plain, storage)
    assert any(site.module == "blocks.0" for site in plan.explicit_sites)  # which `back` would not undo
    plan, said = prepared(own, storage)
    assert not said
    assert not any(site.module == "blocks.0" for site in plan.explicit_sites)
    assert any("blocks.0" in note and "left alone" in note for note in plan.notes)
    assert_slopes(own)


@each_storage
def test_a_function_that_calls_backward_itself_has_the_plan_and_rates_of_plain_calls(storage: str) -> None:
    (theirs, _), (ours, said) = (prepared(Blocks(own), storage) for own in (False, True))
    assert not said
    assert ours.lr_multipliers == pytest.approx(theirs.lr_multipliers, rel=1e-6)


class Adversarial(nn.Module):
    """Domain-adversarial: the features' gradient of the second head is reversed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.features = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.classes = nn.Linear(16, 4)
        self.domains = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def loss(self) -> Tensor:
        x = self.features(X)
        return F.cross_entropy(self.classes(x), Y) + F.cross_entropy(
            self.domains(Reversal.apply(GradientScale.apply(x))), Y % 2
        )


def test_a_reversal_that_weighs_more_under_the_plan_is_not_refused() -> None:
    small_heads = {"readout_exponent": 1.0}  # which send little back: what is reversed weighs more
    plan, said = prepared(Adversarial(), "unit", lambda m: m.loss(), hyperparameters=small_heads)
    assert not said
    assert any("no factor is missing" in note for note in plan.notes)


class FixedPoint(nn.Module):
    """A deep equilibrium model: a hook solves for the gradient, which needs a map that contracts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        nn.init.orthogonal_(self.inner.weight, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(15):
                z = torch.tanh(self.inner(z) + x)
        z = torch.tanh(self.inner(z) + x)
        if z.requires_grad:
            start = z.detach().requires_grad_()
            again = torch.tanh(self.inner(start) + x)

            def solve(gradient: Tensor) -> Tensor:
                found = gradient
                for _ in range(15):
                    found = torch.autograd.grad(again, start, found, retain_graph=True)[0] + gradient
                return found

            z.register_hook(solve)  # type: ignore[no-untyped-call]
        return self.last(z)


@each_storage
def test_an_iteration_that_converges_no_more_is_warned_of_or_refused(storage: str) -> None:
    try:
        _, said = prepared(FixedPoint(), storage)
    except UnitScalingError as error:  # rounding grows at each turn, so that storages may differ
        said = [str(error)]
    assert any("not the slope of the loss" in line and "inner" in line and "skip" in line for line in said)


def _virtual_adversarial(model: nn.Module) -> Tensor:
    """The inner backward pass is for the input's gradient alone."""
    with torch.no_grad():
        target = model(X).softmax(-1)
    step = torch.ones_like(X).requires_grad_()
    F.kl_div(model(X + 0.1 * step).log_softmax(-1), target).backward()
    assert step.grad is not None
    found = F.normalize(step.grad)
    model.zero_grad()
    return loss_of(model) + F.kl_div(model(X + 0.1 * found).log_softmax(-1), target)


@each_storage
def test_a_backward_pass_to_the_input_in_the_step_is_followed(storage: str) -> None:
    plan, _ = prepared(Blocks(False), storage, _virtual_adversarial)
    theirs, _ = prepared(Blocks(False), storage)
    assert plan.roles == theirs.roles
    assert [p.multiplier for p in plan.parameters.values()] == pytest.approx(
        [p.multiplier for p in theirs.parameters.values()], rel=1e-9
    )
