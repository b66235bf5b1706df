"""Blocks that the recorded step happened not to run count in the depth, and have the rule of those like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unitscale import Plan, unit_scale
from lightning_unitscale.engine.record.random_draws import random_state

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(-1)
DRAWS = [(0.4, 0), (0.4, 1), (0.4, 3), (0.8, 5)]  # (share left out, seed); 3 leaves all of them out


class Block(nn.Module):
    def __init__(self, share: float, post_norm: bool, rescaled: bool) -> None:
        super().__init__()
        self.share, self.post_norm, self.rescaled = share, post_norm, rescaled
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < self.share:
            return x
        branch = self.down(F.gelu(self.up(x if self.post_norm else self.norm(x))))
        if self.rescaled and self.training:
            branch = branch / (1 - self.share)
        return self.norm(x + branch) if self.post_norm else x + branch


class Net(nn.Module):
    def __init__(self, share: float, post_norm: bool = False, rescaled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block(share, post_norm, rescaled) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def prepared(model: nn.Module, seed: int, **options: object) -> Plan:
    torch.manual_seed(seed)
    return unit_scale(model, loss_of, **options)  # type: ignore[arg-type]


def constants(plan: Plan) -> dict[str, object]:
    names = ("role", "multiplier", "stored", "unit_lr", "sgd_lr", "depth_lr", "relative_lr", "reason")
    return {
        name: [pytest.approx(v, rel=1e-9) if isinstance(v := getattr(p, key), float) else v for key in names]
        for name, p in plan.parameters.items()
    }


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize(("share", "seed"), DRAWS)
@pytest.mark.parametrize("post_norm", [False, True], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("rescaled", [False, True], ids=["plain", "rescaled"])
def test_every_draw_gives_the_plan_of_the_whole_model(
    storage: str, share: float, seed: int, post_norm: bool, rescaled: bool
) -> None:
    whole, drawn = Net(0.0, post_norm, rescaled), Net(share, post_norm, rescaled)
    # A step with few blocks, each five times as large, may begin too high for the gate.
    wanted = prepared(whole, 0, storage=storage, verify=False)
    plan = prepared(drawn, seed, storage=storage, verify=False)
    assert constants(plan) == constants(wanted)
    assert torch.allclose(drawn.eval()(X), whole.eval()(X), rtol=1e-4, atol=1e-6)


def test_drawing_again_leaves_the_random_numbers_alone() -> None:
    model = Net(0.4)
    torch.manual_seed(3)
    before = random_state()
    unit_scale(model, loss_of)
    assert random_state() == before


def test_a_step_that_uses_every_parameter_is_recorded_once() -> None:
    calls: list[int] = []
    unit_scale(Net(-1.0), lambda m: (calls.append(1), loss_of(m))[1], lr_units="umup", verify=False)
    assert len(calls) == 1


class Tasks(nn.Module):
    """One of three heads in each step, in turn or by chance, behind blocks that may be left out."""

    def __init__(self, turn: Callable[[Tasks], int], share: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.step = turn, 0
        self.net = Net(share)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 1), "c": nn.Linear(4, 8)})

    def loss(self, tasks: str) -> Tensor:
        h = F.relu(self.net(X))
        losses = {
            "a": lambda: F.cross_entropy(self.heads["a"](h), Y),
            "b": lambda: F.mse_loss(self.heads["b"](h)[:, 0], X[:, 0]),
            "c": lambda: F.mse_loss(self.heads["c"](h), X),
        }
        return torch.stack([losses[task]() for task in tasks]).sum()

    def forward(self) -> Tensor:
        self.step += 1
        return self.loss("abc"[self.turn(self)])


TURNS: dict[str, Callable[[Tasks], int]] = {
    "in turn": lambda m: m.step % 3,
    "by chance": lambda m: int(torch.randint(0, 3, ())),
    "seldom": lambda m: 2 if m.step % 4 == 0 else m.step % 2,
}


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("turn", TURNS)
def test_heads_that_have_their_turn_later_are_planned_as_if_all_had_it_at_once(
    turn: str, share: float, storage: str
) -> None:
    options = {"storage": storage, "lr_units": "umup", "verify": False}
    torch.manual_seed(0)
    model = Tasks(TURNS[turn], share)
    plan = unit_scale(model, lambda m: m(), **options)  # type: ignore[arg-type]
    at_once = unit_scale(Tasks(TURNS[turn]), lambda m: m.loss("abc"), **options)  # type: ignore[arg-type]
    assert model.step == 0
    assert constants(plan) == constants(at_once)


def test_a_block_left_out_that_is_to_be_skipped_is_skipped() -> None:
    plan = prepared(Net(0.4), 1, skip=["blocks.*"])
    assert all(p.multiplier == 1.0 and p.reason for name, p in plan.parameters.items() if name.startswith("blocks"))


class Experts(nn.Module):
    """One expert of three gets data in the recorded step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.router = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.router(x).softmax(-1)[:, :1] * self.experts[1](x))


def test_experts_without_data_are_no_branches_of_their_own() -> None:
    plan = prepared(Experts(), 0)
    causes = [f.cause for p in plan.sites for f in p.causes.get("experts.1.2.weight", [])]
    assert any("L = 0.5" in cause for cause in causes)
    assert plan.parameters["experts.0.2.weight"].multiplier == plan.parameters["experts.1.2.weight"].multiplier


def test_a_layer_with_other_parts_is_no_sibling_though_its_weight_is_called_alike() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.GELU())])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](x)

    plan = prepared(Net(), 0, storage="unit")
    assert plan.parameters["layers.0.0.weight"].role == "unused"


class Growing(nn.Module):
    """Stages are added in front of those there are, as in progressive growing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stage = 0
        self.entries = nn.ModuleList(nn.Linear(8, 16) for _ in range(3))
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU(0.2)) for _ in range(3))
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.entries[self.stage](x), 0.2)
        for stage in range(self.stage, -1, -1):
            x = self.stages[stage](x)
        return self.last(x)


def test_a_stage_added_later_is_one_function_in_both_storages() -> None:
    """Its activation goes into weights that have the factor of the one before them already."""
    losses: dict[str, list[float]] = {}
    for storage in ("folded", "unit"):
        model = Growing()
        prepared(model, 0, storage=storage)
        losses[storage] = []
        for model.stage in range(3):
            losses[storage].append(loss_of(model).item())
    assert losses["folded"] == pytest.approx(losses["unit"], rel=1e-6)


def _to_all(x: Tensor, block: nn.Module, rows: Tensor) -> Tensor:
    return x + block(x)


def _by_index_add(x: Tensor, block: nn.Module, rows: Tensor) -> Tensor:
    return x.index_add(0, rows, block(x[rows]), alpha=len(x) / len(rows))


def _by_scatter_add(x: Tensor, block: nn.Module, rows: Tensor) -> Tensor:
    places = rows[:, None].expand(-1, x.shape[1])
    return torch.scatter_add(x, 0, places, block(x.gather(0, places)))


def _by_index_put(x: Tensor, block: nn.Module, rows: Tensor) -> Tensor:
    return x.index_put((rows,), block(x[rows]), accumulate=True)


def _by_assignment(x: Tensor, block: nn.Module, rows: Tensor) -> Tensor:
    x = x.clone()
    x[rows] = x[rows] + block(x[rows])
    return x


class Parted(nn.Module):
    """Every second block runs on half of the rows, as in DINOv2's stochastic depth and in mixtures of depths."""

    def __init__(self, added: Callable[[Tensor, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.added = added
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            x = self.added(x, block, x[:, 0].topk(16).indices) if index % 2 else x + block(x)
        return self.last(x)


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("added", [_by_index_add, _by_scatter_add, _by_index_put, _by_assignment])
def test_a_block_on_a_part_of_the_batch_is_a_branch(
    added: Callable[[Tensor, nn.Module, Tensor], Tensor], storage: str
) -> None:
    whole, parted = prepared(Parted(_to_all), 0, storage=storage), prepared(Parted(added), 0, storage=storage)
    names = [f"blocks.{index}.3.weight" for index in range(4)]
    assert [parted.parameters[name].multiplier for name in names] == pytest.approx(
        [whole.parameters[name].multiplier for name in names], rel=1e-9
    )
