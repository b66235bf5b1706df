"""What makes a weight of a parameter (noise, a mask) and what makes an activation of it (a position) are kept apart.

Where factors stay explicit, in a stream without a batch, in which both are of one size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.by_day import by_day
from torch import Tensor, nn

from lightning_unitscale import Plan, scale_learning_rates, unit_scale

SIZE, CLASSES = 8, 5  # of a stream [SIZE, SIZE]
Body = Callable[["Net", Tensor], Tensor]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Noisy(nn.Module):
    """A linear layer with noise on its weight, the same each time; to torch it is drawn."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.weight, self.always = nn.Parameter(torch.randn(SIZE, SIZE) / SIZE**0.5), always

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.always):
            return x @ self.weight
        return x @ (self.weight + 0.1 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))


class Net(nn.Module):
    """An embedding, a body of which both kinds are made, a tied readout."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.table = body, nn.Parameter(torch.randn(CLASSES, SIZE))
        self.position, self.array = (nn.Parameter(torch.randn(SIZE, SIZE) / 50) for _ in range(2))
        self.weight, self.gain = nn.Parameter(torch.randn(SIZE, SIZE) / 3), nn.Parameter(torch.ones(SIZE, SIZE))
        self.experts = nn.ModuleList(Noisy(always=True) for _ in range(3))
        self.noisy, self.linear = Noisy(always=False), nn.Linear(SIZE, SIZE)
        self.register_buffer("mask", (torch.rand(SIZE, SIZE) > 0.3).double())
        self.register_buffer("places", torch.arange(SIZE))
        self.expert = 0

    def logits(self, ids: Tensor) -> Tensor:
        return F.linear(F.layer_norm(self.body(self, self.table[ids]), (SIZE,)), self.table)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(ids).flatten(0, -2), ids.roll(1, -1).flatten())


def added_then_noisy(net: Net, x: Tensor) -> Tensor:
    return x + torch.relu(net.noisy(x + net.position))


def noisy_then_added(net: Net, x: Tensor) -> Tensor:
    return F.linear(x + torch.relu(net.noisy(x)) + net.position, net.linear.weight)


def masked_beside_gain(net: Net, x: Tensor) -> Tensor:
    return x + F.linear(torch.relu(x * net.gain), net.weight * net.mask) @ net.linear.weight


def looked_up_beside_places(net: Net, x: Tensor) -> Tensor:
    return x + torch.relu((x + net.array[net.places]) @ net.weight[net.places])


def one_function_twice(net: Net, x: Tensor) -> Tensor:
    return x + torch.relu(net.linear(x - (net.position - 0.01)))


def difference_of_positions(net: Net, x: Tensor) -> Tensor:
    return x + torch.relu(net.noisy(x + (net.position + net.array)))


def in_place(net: Net, x: Tensor) -> Tensor:
    return x + torch.relu(net.noisy(x.clone().add_(net.position)))


def one_expert(net: Net, x: Tensor) -> Tensor:
    return x + torch.relu(net.experts[net.expert](x + net.position))


def looked_up_by_drawn_places(net: Net, x: Tensor) -> Tensor:
    drawn = torch.randint(0, SIZE, (SIZE,), generator=torch.Generator().manual_seed(0))
    return x + torch.relu(net.linear(x + net.array[drawn]))


def both_of_one(net: Net, x: Tensor) -> Tensor:
    return x + torch.relu(x + net.weight) @ (net.weight + 0.1 * net.mask)


BODIES: list[Body] = [
    added_then_noisy,
    noisy_then_added,
    masked_beside_gain,
    looked_up_beside_places,
    one_function_twice,
    difference_of_positions,
    in_place,
    one_expert,
    looked_up_by_drawn_places,
    both_of_one,
]


@cache
def batch(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, CLASSES, (*shape, SIZE), generator=torch.Generator().manual_seed(seed))


def prepared(body: Body, storage: str, *shape: int) -> tuple[Net, Plan]:
    net, ids = Net(body), batch(0, *shape)  # drawn before the step, which would have them for noise
    return net, unit_scale(net, lambda m: m(ids), storage=storage)


def trained(net: Net, plan: Plan, *shape: int) -> list[float]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-6)
    scale_learning_rates(optimizer, plan)
    found = []
    for step in range(3):
        net.expert = step
        optimizer.zero_grad()
        loss = net(batch(step, *shape))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def evaluated(net: Net, *shape: int) -> list[Tensor]:
    net.eval()
    with torch.no_grad():
        found = [net.logits(batch(7, *size)) for size in (shape, (), (1,), (3,))]
    net.train()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=["no batch", "one", "three"])
@pytest.mark.parametrize("body", BODIES)
def test_storages_agree_in_training_and_in_evaluation(body: Body, shape: tuple[int, ...]) -> None:
    (folded, plan), (unit, unit_plan) = (prepared(body, storage, *shape) for storage in ("folded", "unit"))
    for ours, theirs in zip(evaluated(unit, *shape), evaluated(folded, *shape), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert trained(unit, unit_plan, *shape) == pytest.approx(trained(folded, plan, *shape), rel=1e-8)
    for ours, theirs in zip(evaluated(unit, *shape), evaluated(folded, *shape), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("body", by_day(BODIES, BODIES[:3]))
def test_compiled_and_reloaded_it_is_the_same(body: Body) -> None:
    unit, _ = prepared(body, "unit")
    expected = evaluated(unit)
    loaded = Net(body)
    loaded.load_state_dict(copy.deepcopy(unit.state_dict()))
    for ours, theirs in zip(evaluated(loaded), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    compiled = torch.compile(unit, backend="eager")
    loss = compiled(batch(3))
    torch.testing.assert_close(loss, unit(batch(3)), rtol=1e-12, atol=0)


def test_one_parameter_for_both_is_left_alone_with_the_two_places() -> None:
    _, plan = prepared(both_of_one, "unit")
    reason = plan.parameters["weight"].reason
    assert "makes a weight of it by add" in reason and "both_of_one (test_weights_made_with_others.py" in reason
    assert plan.parameters["weight"].stored == 1.0


def test_an_expert_that_did_not_run_has_its_noise_followed_like_one_that_did() -> None:
    _, plan = prepared(one_expert, "unit")
    assert plan.parameters["experts.2.weight"].role == "hidden"
    assert plan.followed_with_others["experts.2.weight"] == plan.followed_with_others["experts.0.weight"]
    assert Plan.from_dict(plan.to_dict()).followed_with_others == plan.followed_with_others


def test_what_is_added_to_rows_that_were_looked_up_is_a_position() -> None:
    _, plan = prepared(one_function_twice, "unit")
    assert plan.parameters["position"].role == "position"
    _, plan = prepared(masked_beside_gain, "unit")
    assert plan.parameters["gain"].reason.startswith("multiplies activations")
