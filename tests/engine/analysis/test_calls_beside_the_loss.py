"""What a step does beside its loss follows the loss's path, and decides nothing: roles, structure, folds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import Plan, scale_learning_rates, unit_scale

STORAGES = ("folded", "unit")
each_storage = pytest.mark.parametrize("storage", STORAGES)
Beside = Callable[["Agent", Tensor], Tensor]  # returns the input of the forward pass that is learned


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ACTIONS = torch.arange(16) % 4


class Agent(nn.Module):
    """Two activations and an attention, spelled out once to learn and once to act."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.query, self.key = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = F.scaled_dot_product_attention(self.query(h)[None], self.key(h)[None], h[None])[0]
        return self.out(F.relu(self.second(h)))

    def act(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = F.scaled_dot_product_attention(self.query(h)[None], self.key(h)[None], h[None])[0]
        h = F.relu(F.linear(h, self.second.weight, self.second.bias))
        return h @ self.out.weight.T + self.out.bias


def nothing(agent: Agent, x: Tensor) -> Tensor:
    return x


def a_forward_pass_for_the_accuracy(agent: Agent, x: Tensor) -> Tensor:
    with torch.no_grad():
        assert agent(x).argmax(-1).shape == ACTIONS.shape
    return x


def acting_before_learning(agent: Agent, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x + 0 * F.one_hot(agent(x).argmax(-1), 4).to(x)


def acting_by_another_method(agent: Agent, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x + 0 * F.one_hot(agent.act(x).argmax(-1), 4).to(x)


def feeding_it_what_it_said(agent: Agent, x: Tensor) -> Tensor:
    with torch.no_grad():
        agent(torch.softmax(agent(x), -1))
    return x


def a_detached_second_pass(agent: Agent, x: Tensor) -> Tensor:
    return x + 0 * agent(agent(x)).detach()


def the_scale_of_a_layer(agent: Agent, x: Tensor) -> Tensor:
    with torch.no_grad():
        assert F.relu(agent.second(torch.ones(2, 16))).norm() > 0
    return x


HABITS = (
    a_forward_pass_for_the_accuracy,
    acting_before_learning,
    acting_by_another_method,
    feeding_it_what_it_said,
    a_detached_second_pass,
    the_scale_of_a_layer,
)
each_habit = pytest.mark.parametrize("beside", HABITS, ids=lambda habit: habit.__name__)


def loss_of(agent: Agent, beside: Beside) -> Tensor:
    return F.cross_entropy(agent(beside(agent, X)), ACTIONS)


def prepared(beside: Beside, storage: str) -> tuple[Agent, Plan]:
    agent = Agent()
    return agent, unit_scale(agent, lambda a: loss_of(a, beside), storage=storage)


def constants(plan: Plan) -> dict[str, tuple[object, ...]]:
    return {n: (p.role, p.multiplier, p.stored, plan.lr_multipliers[n], p.reason) for n, p in plan.parameters.items()}


def losses(beside: Beside, storage: str) -> list[float]:
    agent, plan = prepared(beside, storage)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-2, eps=1e-14)
    scale_learning_rates(optimizer, plan)
    found = []
    for _ in range(4):
        loss = loss_of(agent, beside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@each_storage
@each_habit
def test_a_call_beside_the_loss_changes_no_constant(beside: Beside, storage: str) -> None:
    assert constants(prepared(beside, storage)[1]) == constants(prepared(nothing, storage)[1])


@each_storage
@each_habit
def test_a_model_trains_as_without_the_call(beside: Beside, storage: str) -> None:
    assert losses(beside, storage) == pytest.approx(losses(nothing, "folded"), rel=1e-9)


@each_storage
def test_another_method_that_acts_computes_what_the_forward_pass_does(storage: str) -> None:
    agent, _ = prepared(acting_by_another_method, storage)
    assert torch.allclose(agent.act(X), agent(X), rtol=1e-10)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Learner(nn.Module):
    """A value network and its target, called without gradients in the same step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online = nn.Sequential(nn.Linear(4, 16), Block(), Block(), nn.Linear(16, 4))
        self.target = copy.deepcopy(self.online)

    def loss(self) -> Tensor:
        with torch.no_grad():
            wanted = self.target(X.flip(0)).amax(-1)
        return F.mse_loss(self.online(X).gather(1, ACTIONS[:, None])[:, 0], wanted)


@each_storage
def test_a_target_network_stays_a_copy_of_its_online_network(storage: str) -> None:
    learner = Learner()
    plan = unit_scale(learner, lambda m: m.loss(), storage=storage)
    with torch.no_grad():
        for parameter in learner.online.parameters():
            parameter.mul_(1.5)
    learner.target.load_state_dict(learner.online.state_dict())
    assert torch.equal(learner.target(X), learner.online(X))
    assert {plan.roles[f"{net}.3.weight"] for net in ("online", "target")} == {"readout"}


class TwoWays(nn.Module):
    """One weight behind an activation at two places of the loss's path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))

    def again(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flip(0))))


def test_an_activation_at_two_places_is_folded_into_a_weight_once() -> None:
    found = []
    for storage in STORAGES:
        model = TwoWays()
        unit_scale(model, lambda m: F.cross_entropy(m(X) + m.again(X), ACTIONS), storage=storage)
        found.append(model(X))
    assert torch.allclose(*found, rtol=1e-10)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.body(x))
        return self.left(h), self.right(h)


def test_the_head_of_another_steps_loss_is_a_readout() -> None:
    model = TwoHeads()
    plan = unit_scale(model, lambda m: F.cross_entropy(m(X)[0], ACTIONS))
    assert plan.roles["left.weight"] == plan.roles["right.weight"] == "readout"
    assert plan.parameters["left.weight"].multiplier == plan.parameters["right.weight"].multiplier
