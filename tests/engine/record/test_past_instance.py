"""Methods run by `super()` or by their class: their calls are those of the method that ran them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import unit_scale


class Base(nn.Module):
    """Two activations, of which `features` runs both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(F.gelu(self.a(x)))))

    def head(self, h: Tensor) -> Tensor:
        h = h + F.gelu(h)  # which takes no factor, so that calls must be counted
        return self.d(F.gelu(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Flat(Base):
    """All of it in one method."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(F.gelu(self.b(F.gelu(self.a(x)))))
        h = h + F.gelu(h)
        return self.d(F.gelu(h))


class OfParent(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


class OfParentInline(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        h = h + F.gelu(h)
        return self.d(F.gelu(h))


class OfGrandparent(OfParentInline):
    def forward(self, x: Tensor) -> Tensor:
        return super(OfGrandparent, self).forward(x)  # noqa: UP008


class ByClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Base.forward(self, x))


class OtherMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = super().features(x)
        h = h + F.gelu(h)
        return self.d(F.gelu(h))


class FromHelper(OtherMethod):
    def helper(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


def _decorated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any) -> Any:
        return method(self, *args)

    return wrapper


class Decorated(OfParentInline):
    @_decorated
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Again(Base):
    """Runs its own `forward` once more by the instance: a frame of its own."""

    def forward(self, x: Tensor, inner: bool = True) -> Tensor:
        if inner:
            return self.head(self.forward(x, inner=False))
        return self.c(F.gelu(self.b(F.gelu(self.a(x)))))


def prepared(build: type[Base], storage: str) -> tuple[dict[str, float], Tensor]:
    """The multipliers of its plan, and what it returns under it."""
    x, model = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), build()
    plan = unit_scale(model, lambda m: F.cross_entropy(m(x), torch.arange(12) % 4), storage=storage)
    return {name: p.multiplier for name, p in plan.parameters.items()}, model(x).detach()


@pytest.fixture(scope="module")
def written_out() -> tuple[dict[str, float], Tensor]:
    return prepared(Flat, "folded")


@pytest.mark.parametrize(
    "kind", [OfParent, OfParentInline, OfGrandparent, ByClass, OtherMethod, FromHelper, Decorated, Again]
)
def test_a_subclass_gets_the_plan_and_the_function_of_its_code_written_out(
    kind: type[Base], written_out: tuple[dict[str, float], Tensor]
) -> None:
    multipliers, output = prepared(kind, "unit")  # where factors stand in the code
    assert multipliers == pytest.approx(written_out[0])
    torch.testing.assert_close(output, written_out[1])
