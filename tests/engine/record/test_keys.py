"""Which parameters a tensor is made of: recorder, observer and interceptor must agree."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_unitscale import unit_scale
from lightning_unitscale.engine.record.keys import ParameterKey
from lightning_unitscale.engine.runtime.observer import OperandObserver
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator


def test_a_key_is_a_plain_string_that_knows_its_names() -> None:
    key = ParameterKey.of(["b", "a", "b"])
    assert key == "a+b"
    assert key.names == ("a", "b")
    assert ParameterKey("").names == ()
    assert [type(name) for name in ParameterKey("a").names] == [str]
    assert key.renamed({"a": "z", "b": "y"}.__getitem__) == "y+z"
    assert type(json.loads(json.dumps(key))) is str
    for same in (copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert (same, same.names) == (key, key.names)


class LowRank(nn.Module):
    """W + A B, by a layer's own function inside a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(8, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + F.linear(self.a, self.b)


class Made(nn.Module):
    """A layer whose weight is made of parameters, between two plain ones."""

    def __init__(self, make: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.weight, self.gain = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8, 1) + 0.5)
        self.experts, self.low_rank = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 8, bias=False)
        self.register_buffer("mask", (torch.rand(8, 8) > 0.3).float())
        parametrize.register_parametrization(self.low_rank, "weight", LowRank())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.first(x), self.make(self)).tanh())


LOW_RANK = tuple(f"low_rank.parametrizations.weight.{name}" for name in ("0.a", "0.b", "original"))
MAKINGS: dict[str, tuple[Callable[[Any], Tensor], tuple[str, ...]]] = {
    "the parameter": (lambda m: m.weight, ("weight",)),
    "a view": (lambda m: m.weight.t().contiguous().view(8, 8), ("weight",)),
    "a cast": (lambda m: m.weight.double().type_as(m.first.weight), ("weight",)),
    "a cast that changes nothing": (lambda m: m.weight.to(m.first.weight.dtype).contiguous(), ("weight",)),
    "a slice that the data chose": (lambda m: m.experts[torch.tensor(1)], ("experts",)),
    "an expression": (lambda m: m.gain * m.weight / m.weight.norm(dim=1, keepdim=True), ("gain", "weight")),
    "with a constant": (lambda m: m.weight * m.mask, ("weight",)),
    "a product in a parametrization": (lambda m: m.low_rank.weight, LOW_RANK),
}


def loss_of(module: nn.Module) -> Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return module(x).square().mean()


@pytest.mark.parametrize("making", MAKINGS)
def test_recorder_observer_and_interceptor_agree(making: str) -> None:
    make, names = MAKINGS[making]
    torch.manual_seed(0)
    built, losses = Made(make), {}
    for storage in ("folded", "unit"):
        module = copy.deepcopy(built)
        plan = unit_scale(module, loss_of, storage=storage)
        losses[storage] = loss_of(module).item()
        observer = OperandObserver(module, lambda use, operand: Accumulator(torch.float32))
        with observer:
            loss_of(module)
        assert observer.found.keys() == {site.use for site in plan.sites if site.op == "linear"}
        assert ParameterKey.of(names) in {use.key for use in observer.found}
    assert losses["unit"] == pytest.approx(losses["folded"], rel=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert loss_of(compiled).item() == pytest.approx(losses["unit"], rel=1e-5)


class Ended(Made):
    """Weights and constants make activations: of a lookup, a layer on learned queries, a buffer written to."""

    def forward(self, x: Tensor) -> Tensor:
        looked_up = F.embedding(torch.arange(8), self.weight)
        queries = F.linear(looked_up, self.first.weight)
        written = torch.zeros(8, 8)
        written += queries
        return self.last(written * self.gain) + 0 * x[:8, :4]


def test_a_name_ends_where_an_activation_is_made() -> None:
    torch.manual_seed(0)
    module = Ended(lambda m: m.weight)
    plan = unit_scale(module, loss_of, "preserve")
    observer = OperandObserver(module, lambda use, operand: Accumulator(torch.float32))
    with observer:
        loss_of(module)
    expected = {("first.weight", "linear"), ("last.weight", "linear")}
    assert {site.use for site in plan.sites if site.op == "linear"} == expected
    assert set(observer.found) == expected
