"""Learning-rate multipliers: every step equals that of an optimizer whose groups were really split, by hand."""

from __future__ import annotations

import copy
import csv
import gc
import pickle
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from pytorch_lightning.callbacks import BackboneFinetuning, LearningRateMonitor
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import lr_scheduler as schedules

from lightning_unitscale.engine.plan.step_scales import StepScale
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.families import optimizer_family
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
from lightning_unitscale.optim.scaled_step import ScaledStep

STEPS = 6


class Plan:
    """Stands for `engine.plan.plan.Plan`: constants by parameter name."""

    largest_eta: float | None = None
    unfollowed_schedule: tuple[int, ...] = ()
    parameters: ClassVar[dict[str, object]] = {}
    divided_gradients: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module, scales: dict[str, StepScale], coupled: dict[str, StepScale] | None = None):
        self.model, self.scales, self.coupled = module, scales, coupled or scales
        self.asked: list[tuple[str, bool]] = []

    def step_scales(self, family: str, *, decoupled_decay: bool) -> dict[str, StepScale]:
        self.asked.append((family, decoupled_decay))
        return self.scales if decoupled_decay else self.coupled

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def differences(self, module: nn.Module) -> dict[str, list[str]]:
        return {"missing": [], "other shape": [], "replaced": []}


SCALES = {
    "0.weight": StepScale(lr=0.25, weight_decay=4.0, eps=0.5),
    "0.bias": StepScale(),
    "2.weight": StepScale(lr=3.0, weight_decay=1 / 3, eps=7.0),
    "2.bias": StepScale(lr=0.25, weight_decay=4.0, eps=0.5),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(module: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return (module(x) - 1).square().mean()


def backward(module: nn.Module, step: int) -> Tensor:
    module.zero_grad()
    loss = loss_of(module, step)
    loss.backward()
    return loss


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


Groups = list[dict[str, Any]]


class ByHand:
    """The oracle: groups split for good, hyperparameters copied times their factors from unsplit groups every step."""

    def __init__(self, module: nn.Module, make: Callable[[Any], torch.optim.Optimizer], scales: dict[str, StepScale]):
        self.module = module
        names = {parameter: name for name, parameter in module.named_parameters()}
        # Carries the user's hyperparameters, and a scheduler if there is one; it is never stepped itself.
        self.users = make(two_groups(module))
        self.origin: list[tuple[int, StepScale]] = []
        split: Groups = []
        for index, group in enumerate(self.users.param_groups):
            for scale in dict.fromkeys(scales.get(names[p], StepScale()) for p in group["params"]):
                split.append({"params": [p for p in group["params"] if scales.get(names[p], StepScale()) == scale]})
                self.origin.append((index, scale))
        self.optimizer = make(split)

    def step(self) -> None:
        for piece, (index, scale) in zip(self.optimizer.param_groups, self.origin, strict=True):
            for key, value in self.users.param_groups[index].items():
                if key != "params":
                    piece[key] = value * getattr(scale, key, 1.0) if key in vars(scale) else value
        self.optimizer.step()


def two_groups(module: nn.Module) -> Groups:
    parameters = list(module.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.3}]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, eps=1e-3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=False),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.02), weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, weight_decay=0.1, momentum=0.9, centered=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_of_groups_split_by_hand(name: str) -> None:
    module, expected = network(), network()
    optimizer = OPTIMIZERS[name](two_groups(module))
    scale_learning_rates(optimizer, Plan(module, SCALES))
    by_hand = ByHand(expected, OPTIMIZERS[name], SCALES)
    groups = list(optimizer.param_groups)
    before = [dict(group) for group in groups]
    for step in range(STEPS):
        backward(module, step), backward(expected, step)
        optimizer.step(), by_hand.step()
        assert all(mine is group for mine, group in zip(optimizer.param_groups, groups, strict=True))
        assert groups == before
    assert_same(module, expected)


def test_muon() -> None:
    module, expected = network(), network()
    matrices = [p for p in module.parameters() if p.ndim == 2]
    optimizer = torch.optim.Muon(matrices, lr=0.02)
    plan = Plan(module, SCALES)
    scale_learning_rates(optimizer, plan)
    pieces = [
        {"params": [expected[i].weight], "lr": 0.02 * scale.lr, "weight_decay": 0.1 * scale.weight_decay}
        | {"eps": 1e-7 * scale.eps}
        for i, scale in ((0, SCALES["0.weight"]), (2, SCALES["2.weight"]))
    ]
    by_hand = torch.optim.Muon(pieces)
    for step in range(STEPS):
        backward(module, step), backward(expected, step)
        optimizer.step(), by_hand.step()
    assert_same(module, expected)
    assert plan.asked == [("muon", True)]


@settings(max_examples=25, deadline=None)
@given(
    factors=st.lists(
        st.tuples(*[st.sampled_from([1.0, 0.5, 0.1, 8.0]) | st.floats(1e-3, 1e3)] * 3), min_size=4, max_size=4
    ),
    name=st.sampled_from(["adamw", "adam", "sgd", "adamw-fused"]),
)
def test_any_multipliers(factors: list[tuple[float, float, float]], name: str) -> None:
    scales = {parameter: StepScale(*given) for parameter, given in zip(SCALES, factors, strict=True)}
    module, expected = network(), network()
    optimizer = OPTIMIZERS[name](two_groups(module))
    scale_learning_rates(optimizer, Plan(module, scales))
    before = [dict(group) for group in optimizer.param_groups]
    by_hand = ByHand(expected, OPTIMIZERS[name], scales)
    for step in range(3):
        backward(module, step), backward(expected, step)
        optimizer.step(), by_hand.step()
    assert_same(module, expected)
    assert optimizer.param_groups == before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multipliers_of_one_take_the_plain_step(name: str) -> None:
    module, expected = network(), network()
    optimizer, plain = OPTIMIZERS[name](module.parameters()), OPTIMIZERS[name](expected.parameters())
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale())))
    seen: list[int] = []
    inner = optimizer.param_groups[0]
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            seen.append(id(optimizer.param_groups[0]))
            return backward(module, step)

        optimizer.step(closure)
        plain.step(lambda step=step: backward(expected, step))
    assert set(seen) == {id(inner)}
    assert_same(module, expected)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, [lambda step: 0.9**step] * len(o.param_groups)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=STEPS, eta_min=1e-3),
    "one-cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.05, total_steps=STEPS + 1),
    "cyclic": lambda o: schedules.CyclicLR(
        o, base_lr=0.01, max_lr=0.05, step_size_up=2, cycle_momentum="momentum" in o.defaults or "betas" in o.defaults
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, T_max=4)], milestones=[2]
    ),
}


def advance(scheduler: Any) -> None:
    scheduler.step(1.0) if isinstance(scheduler, schedules.ReduceLROnPlateau) else scheduler.step()


@pytest.mark.parametrize("order", ["scheduler first", "multipliers first"])
@pytest.mark.parametrize("name", ["adamw", "adamw-tensor-lr", "sgd"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers(schedule: str, name: str, order: str) -> None:
    module, expected = network(), network()
    optimizer = OPTIMIZERS[name](two_groups(module))
    by_hand = ByHand(expected, OPTIMIZERS[name], SCALES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "optimizer.step() has been overridden", "before optimizer.step()"
        warnings.filterwarnings("ignore", message="The epoch parameter")  # SequentialLR's own affair
        if order == "multipliers first":
            scale_learning_rates(optimizer, Plan(module, SCALES))
        scheduler = SCHEDULES[schedule](optimizer)
        if order == "scheduler first":
            scale_learning_rates(optimizer, Plan(module, SCALES))
        rates = []
        users_schedule = SCHEDULES[schedule](by_hand.users)
        by_hand.users.step()  # without gradients: only tells the scheduler that a step was made
        for step in range(STEPS):
            backward(module, step), backward(expected, step)
            by_hand.step(), optimizer.step()
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            assert rates[-1] == [float(group["lr"]) for group in by_hand.users.param_groups]
            advance(scheduler), advance(users_schedule)
    assert len({rate for rate, _ in rates}) > 1
    assert_same(module, expected)


def test_closure_and_hooks_see_the_users_groups_once() -> None:
    module, expected = network(), network()
    optimizer, by_hand = OPTIMIZERS["adamw"](two_groups(module)), ByHand(expected, OPTIMIZERS["adamw"], SCALES)
    groups = list(optimizer.param_groups)
    seen: list[tuple[str, bool]] = []

    def note(event: str) -> None:
        seen.append((event, [id(g) for g in optimizer.param_groups] == [id(g) for g in groups]))

    optimizer.register_step_pre_hook(lambda *_: note("early pre"))
    optimizer.register_step_post_hook(lambda *_: note("early post"))
    scale_learning_rates(optimizer, Plan(module, SCALES))
    optimizer.register_step_pre_hook(lambda *_: note("late pre"))
    optimizer.register_step_post_hook(lambda *_: note("late post"))

    def closure() -> Tensor:
        note("closure")
        assert torch.is_grad_enabled()
        optimizer.param_groups[0]["lr"] = 0.01  # takes effect in this very step, as it does in plain torch
        return backward(module, 0)

    by_hand.users.param_groups[0]["lr"] = 0.01
    loss = optimizer.step(closure=closure)
    assert torch.equal(loss, backward(expected, 0))
    by_hand.step()
    assert seen == [(event, True) for event in ("early pre", "late pre", "closure", "early post", "late post")]
    assert_same(module, expected)


class Failing(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        self.counted = [group["lr"] for group in self.param_groups]
        raise RuntimeError("out of memory")


def test_groups_come_back_when_the_step_fails() -> None:
    module = network()
    optimizer = Failing(two_groups(module), lr=0.02)
    groups = list(optimizer.param_groups)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        assert optimizer.counted == [0.02 * 0.25, 0.02, 0.02 * 3, 0.02 * 0.25]
        assert all(mine is group for mine, group in zip(optimizer.param_groups, groups, strict=True))
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_groups_come_back_when_the_closure_fails() -> None:
    module = network()
    optimizer = OPTIMIZERS["adamw"](two_groups(module))
    groups = list(optimizer.param_groups)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert all(mine is group for mine, group in zip(optimizer.param_groups, groups, strict=True))


class Counting(torch.optim.SGD):
    """Keeps state in its groups: a number, a tensor counted in place, a list, and the learning rate itself."""

    def step(self, closure: Any = None) -> Any:
        self.seen = [(group["k"], int(group["ticks"]), list(group["log"])) for group in self.param_groups]
        for group in self.param_groups:
            group["k"] += 1
            group["ticks"].add_(1)
            group["log"].append(group["k"])
            group["fresh"] = True
            group["lr"] *= 0.5
        return super().step(closure)


@pytest.mark.parametrize("lr", [0.4, torch.tensor(0.4)])
def test_state_in_groups_is_kept_once(lr: float | Tensor) -> None:
    module = network()
    groups = [{"params": list(module.parameters()), "k": 0, "ticks": torch.tensor(0), "log": []}]
    optimizer = Counting(groups, lr=lr)
    (group,) = optimizer.param_groups
    own_lr = group["lr"]
    scale_learning_rates(optimizer, Plan(module, SCALES))
    for step in range(3):
        backward(module, step)
        optimizer.step()
        assert optimizer.seen == [(step, step, list(range(1, step + 1)))] * 3
    assert group["k"] == 3 and int(group["ticks"]) == 3 and group["log"] == [1, 2, 3] and group["fresh"]
    assert float(group["lr"]) == pytest.approx(0.05)
    assert (group["lr"] is own_lr) == isinstance(lr, Tensor)


def test_parameter_names_stay_with_their_parameters() -> None:
    module = network()
    seen: list[list[str]] = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            names = {parameter: name for name, parameter in module.named_parameters()}
            for group in self.param_groups:
                assert [names[p] for p in group["params"]] == group["param_names"]
                seen.append(group["param_names"])

    optimizer = Watching(module.named_parameters(), lr=0.1)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    optimizer.step()
    assert seen == [["0.weight", "2.bias"], ["0.bias"], ["2.weight"]]


def test_subclass_that_calls_its_parents_step() -> None:
    class Polite(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            assert len(self.param_groups) == 4  # still split: it may go on to use learning rates
            return loss

    module, expected = network(), network()
    optimizer = Polite(two_groups(module), lr=0.02, weight_decay=0.1, eps=1e-3)
    by_hand = ByHand(expected, OPTIMIZERS["adamw"], SCALES)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    for step in range(STEPS):
        optimizer.step(lambda step=step: backward(module, step))
        backward(expected, step)
        by_hand.step()
    assert_same(module, expected)


def test_state_dict_is_the_plain_one_and_resumes() -> None:
    straight = network()
    optimizer = OPTIMIZERS["adamw"](two_groups(straight))
    scheduler = schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=10)
    scale_learning_rates(optimizer, Plan(straight, SCALES))
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
        backward(straight, step)
        optimizer.step(), scheduler.step()
    assert [group["params"] for group in saved[1]["param_groups"]] == [[0, 1, 2], [3]]

    resumed = network()
    optimizer = OPTIMIZERS["adamw"](two_groups(resumed))
    scheduler = schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=10)
    scale_learning_rates(optimizer, Plan(resumed, SCALES))
    resumed.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1]), scheduler.load_state_dict(saved[2])
    for step in range(3, 6):
        backward(resumed, step)
        optimizer.step(), scheduler.step()
    assert_same(straight, resumed)


def test_groups_added_later_are_scaled() -> None:
    module, expected = network(), network()
    optimizer = torch.optim.AdamW(module[0].parameters(), lr=0.02, weight_decay=0.1, eps=1e-3)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    by_hand = torch.optim.AdamW(
        [
            {"params": [parameter], "lr": 0.02 * scale.lr, "weight_decay": 0.1 * scale.weight_decay}
            | {"eps": 1e-3 * scale.eps}
            for parameter, scale in zip(expected.parameters(), SCALES.values(), strict=True)
        ]
    )
    for step in range(STEPS):
        backward(module, step), backward(expected, step)
        if step < 3:
            for parameter in expected[2].parameters():
                parameter.grad = None
        if step == 3:
            optimizer.add_param_group({"params": list(module[2].parameters())})
        optimizer.step(), by_hand.step()
    assert_same(module, expected)


def test_parameters_outside_the_plan_take_plain_steps() -> None:
    module, extra = network(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*module.parameters(), extra], lr=0.1)
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale(lr=2.0))))
    backward(module, 0)
    extra.grad = torch.ones(3)
    before = [p - 0.2 * p.grad for p in module.parameters()]
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(weights(module), [p.detach() for p in before])


def test_tied_weights_are_found_by_either_name() -> None:
    module = nn.ModuleDict({"embedding": nn.Linear(2, 2, bias=False), "readout": nn.Linear(2, 2, bias=False)})
    module["readout"].weight = module["embedding"].weight
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    attached = scale_learning_rates(optimizer, Plan(module, {"readout.weight": StepScale(lr=2.0)}), module=module)
    assert "StepScale(lr=2.0, weight_decay=1.0, eps=1.0, floor=1.0, gradient=1.0): 1 parameters" in repr(attached)


def test_decay_is_asked_for_group_by_group() -> None:
    module, expected = network(), network()
    coupled = dict.fromkeys(SCALES, StepScale(weight_decay=5.0))
    plan = Plan(module, dict.fromkeys(SCALES, StepScale(weight_decay=0.5)), coupled)
    first, second = module[0].parameters(), module[2].parameters()
    groups: Groups = [{"params": list(first), "decoupled_weight_decay": True}, {"params": list(second)}]
    optimizer = torch.optim.Adam(groups, lr=0.02, weight_decay=0.1)
    scale_learning_rates(optimizer, plan)
    by_hand = torch.optim.Adam(
        [
            {"params": list(expected[0].parameters()), "decoupled_weight_decay": True, "weight_decay": 0.1 * 0.5},
            {"params": list(expected[2].parameters()), "weight_decay": 0.1 * 5.0},
        ],
        lr=0.02,
    )
    for step in range(STEPS):
        backward(module, step), backward(expected, step)
        optimizer.step(), by_hand.step()
    assert_same(module, expected)
    assert sorted(plan.asked) == [("adam", False), ("adam", True)]
    for groups, factor in ((optimizer.param_groups, 1.0), (by_hand.param_groups, 5.0)):
        groups[0].update(decoupled_weight_decay=False, weight_decay=0.1 * factor)
    optimizer.step(), by_hand.step()
    assert_same(module, expected)


def test_parameters_that_change_places_keep_their_multipliers() -> None:
    module, expected = network(), network()
    optimizer, by_hand = OPTIMIZERS["sgd"](module.parameters()), ByHand(expected, OPTIMIZERS["sgd"], SCALES)
    by_hand.users.param_groups[1]["weight_decay"] = 0.1
    scale_learning_rates(optimizer, Plan(module, SCALES))
    optimizer.param_groups[0]["params"].reverse()
    backward(module, 0), backward(expected, 0)
    optimizer.step(), by_hand.step()
    assert_same(module, expected)


def test_an_optimizer_of_the_same_parameters_is_left_alone() -> None:
    module, expected = network(), network()
    other, plain = OPTIMIZERS["sgd"](module.parameters()), OPTIMIZERS["sgd"](expected.parameters())
    scale_learning_rates(OPTIMIZERS["sgd"](module.parameters()), Plan(module, SCALES))
    backward(module, 0), backward(expected, 0)
    other.step(), plain.step()
    assert_same(module, expected)


def test_attaching_again_replaces_and_removing_undoes() -> None:
    module, expected = network(), network()
    optimizer, by_hand = OPTIMIZERS["sgd"](two_groups(module)), ByHand(expected, OPTIMIZERS["sgd"], SCALES)
    first = scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale(lr=100.0))))
    schedules.LambdaLR(optimizer, lambda _: 1.0)  # buries the first attachment in its own wrapper
    second = scale_learning_rates(optimizer, Plan(module, SCALES))
    first.remove()  # by then without effect
    for step in range(3):
        backward(module, step), backward(expected, step)
        optimizer.step(), by_hand.step()
    assert_same(module, expected)
    second.remove(), second.remove()
    for step in range(3):
        backward(module, step), backward(expected, step)
        before = [dict(group) for group in optimizer.param_groups]
        optimizer.step(), torch.optim.SGD.step(_unscaled(by_hand, before))
    assert_same(module, expected)


def _unscaled(by_hand: ByHand, groups: Groups) -> torch.optim.Optimizer:
    for piece, (index, _) in zip(by_hand.optimizer.param_groups, by_hand.origin, strict=True):
        piece.update({key: value for key, value in groups[index].items() if key != "params"})
    return by_hand.optimizer


def test_removal_leaves_no_trace() -> None:
    module = network()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    before = dict(vars(optimizer))
    scale_learning_rates(optimizer, Plan(module, SCALES))
    assert isinstance(optimizer.step, types.MethodType)
    scale_learning_rates(optimizer, Plan(module, SCALES)).remove()
    assert vars(optimizer) == before


def test_optimizer_is_freed_without_the_garbage_collector() -> None:
    module = network()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    scale_learning_rates(optimizer, Plan(module, SCALES))
    reference = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_plain_optimizers(copied: Callable[[Any], Any]) -> None:
    module = network()
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    scale_learning_rates(optimizer, Plan(module, SCALES))
    backward(module, 0)
    optimizer.step()
    twin = copied(optimizer)
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    values = weights(module)
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(values, weights(module), strict=True))


def test_grad_scaler() -> None:
    module, expected = network(), network()
    optimizer, by_hand = OPTIMIZERS["sgd"](two_groups(module)), ByHand(expected, OPTIMIZERS["sgd"], SCALES)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(STEPS):
        module.zero_grad()
        loss = loss_of(module, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        backward(expected, step)
        by_hand.step()
    assert_same(module, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}])
def test_on_gpu(options: dict[str, bool]) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        lr = torch.tensor(0.02, device="cuda") if "capturable" in options else 0.02
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, **options)

    module, expected = network().cuda(), network().cuda()
    optimizer, by_hand = make(two_groups(module)), ByHand(expected, make, SCALES)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    rates = [0.02, 0.01, 0.03, 0.02]
    graph: torch.cuda.CUDAGraph | None = None
    for step, rate in enumerate(rates):
        for one in (module, expected):
            for i, parameter in enumerate(one.parameters()):
                generator = torch.Generator().manual_seed(10 * step + i)
                gradient = torch.randn(parameter.shape, generator=generator).cuda()
                parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
        for group in [*optimizer.param_groups, *by_hand.users.param_groups]:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        if "capturable" in options and step == 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        graph.replay() if graph is not None else optimizer.step()
        by_hand.step()
    assert_same(module, expected)


class TwiceEvaluating(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


def test_second_evaluation_of_the_closure() -> None:
    module, expected = network(), network()
    optimizer = TwiceEvaluating(module.parameters(), lr=0.1)
    scale_learning_rates(optimizer, Plan(module, SCALES))
    with pytest.raises(UnitScalingError, match="TwiceEvaluating evaluates its closure more than once"):
        optimizer.step(lambda: backward(module, 0))

    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale(lr=2.0))))
    by_hand = TwiceEvaluating(expected.parameters(), lr=0.2)
    optimizer.step(lambda: backward(module, 0)), by_hand.step(lambda: backward(expected, 0))
    assert_same(module, expected)


@pytest.mark.parametrize("max_iter", [1, 5])
def test_lbfgs_needs_equal_multipliers(max_iter: int) -> None:
    module, expected = network(), network()
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=max_iter)
    with pytest.raises(UnitScalingError, match="LBFGS takes one step size"):
        scale_learning_rates(optimizer, Plan(module, SCALES), family="sgd")
    with pytest.raises(UnitScalingError, match="it takes one step size for all parameters") as refusal:
        scale_learning_rates(optimizer, Plan(module, SCALES))
    assert "family" not in str(refusal.value)  # for any is refused, as above
    assert "_unit_scaled_step" not in vars(optimizer)
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale())))
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale(lr=0.5))), family="sgd")
    by_hand = torch.optim.LBFGS(expected.parameters(), lr=0.05, max_iter=max_iter)
    for step in range(3):
        optimizer.step(lambda step=step: backward(module, step))
        by_hand.step(lambda step=step: backward(expected, step))
    assert_same(module, expected)


@pytest.mark.parametrize(
    ("cls", "family"),
    [
        (torch.optim.AdamW, "adam"),
        (torch.optim.SparseAdam, "adam"),
        (torch.optim.SGD, "sgd"),
        (torch.optim.RAdam, "adam_sized"),
        (torch.optim.Adafactor, "relative"),
        (type("Mine", (torch.optim.NAdam,), {}), "adam"),
        (type("Lion", (torch.optim.Optimizer,), {"__init__": lambda self, p: super(type(self), self).__init__(p, {})}),
         "adam"),
    ],
)  # fmt: skip
def test_families(cls: Any, family: str) -> None:
    assert optimizer_family(cls(network().parameters())) == family


@pytest.mark.parametrize("cls", ["Adadelta", "ASGD", "Rprop"])
def test_unknown_family_names_the_class_and_the_way_out(cls: str) -> None:
    module = network()
    optimizer = getattr(torch.optim, cls)(module.parameters())
    with pytest.raises(UnitScalingError, match=rf"optimizer {cls} needs: it.*family=\"adam\".*family=\"sgd\""):
        scale_learning_rates(optimizer, Plan(module, SCALES))
    assert "_unit_scaled_step" not in vars(optimizer)
    scale_learning_rates(optimizer, Plan(module, dict.fromkeys(SCALES, StepScale())))


def test_other_refusals() -> None:
    module = network()
    plan = Plan(module, SCALES)
    with pytest.raises(
        UnitScalingError, match="'adamw' is not known; choose one of 'adam', 'adam_sized', 'relative', 'sgd', 'muon'"
    ):
        scale_learning_rates(OPTIMIZERS["sgd"](module.parameters()), plan, family="adamw")
    with pytest.raises(UnitScalingError, match="None of the parameters of the SGD"):
        scale_learning_rates(OPTIMIZERS["sgd"](network().parameters()), plan)
    with pytest.raises(UnitScalingError, match="initial_accumulator_value"):
        optimizer_family(torch.optim.Adagrad(module.parameters(), initial_accumulator_value=0.1))
    with pytest.raises(UnitScalingError, match=r"eps=\(None, 0.001\) is to be multiplied by \(0.5, 1.0\)"):
        optimizer = torch.optim.Adafactor(module.parameters())
        scale_learning_rates(optimizer, plan, family="adam")
        optimizer.step()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    optimizer.step = lambda closure=None: None
    scale_learning_rates(optimizer, plan)
    with pytest.raises(UnitScalingError, match="step of this SGD was replaced"):
        optimizer.step()


def test_wrapped_optimizer_is_looked_through() -> None:
    module = network()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    scale_learning_rates(LightningOptimizer(optimizer), Plan(module, SCALES))
    assert isinstance(vars(optimizer)["_unit_scaled_step"], ScaledStep)


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, expected = network(), network()
        options = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}
        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, **options)
        by_hand = ByHand(expected, OPTIMIZERS["adamw"], SCALES)
        by_hand.users.param_groups[1]["weight_decay"] = 0.1
        scale_learning_rates(optimizer, Plan(module, SCALES))
        scheduler, users_schedule = SCHEDULES["lambda"](optimizer), SCHEDULES["lambda"](by_hand.users)
        by_hand.users.step()
        for step in range(STEPS):
            backward(module, step), backward(expected, step)
            optimizer.step(), by_hand.step()
            scheduler.step(), users_schedule.step()
        assert_same(module, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["compiled first", "multipliers first"])
def test_compiled_step(order: str) -> None:
    module, expected = network(), network()
    optimizer = OPTIMIZERS["adamw-tensor-lr"](two_groups(module))
    by_hand = ByHand(expected, OPTIMIZERS["adamw-tensor-lr"], SCALES)
    if order == "compiled first":
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        scale_learning_rates(optimizer, Plan(module, SCALES))
        step_compiled = optimizer.step
    else:
        scale_learning_rates(optimizer, Plan(module, SCALES))
        step_compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(3):
        backward(module, step), backward(expected, step)
        step_compiled(), by_hand.step()
        for group in [*optimizer.param_groups, *by_hand.users.param_groups]:
            group["lr"].mul_(0.5)
    torch.testing.assert_close(weights(module), weights(expected))


class Lit(pl.LightningModule):
    def __init__(self, name: str = "adamw") -> None:
        super().__init__()
        self.name = name
        self.net = network()
        self.seen: list[tuple[int, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.name](two_groups(self.net))
        scheduler = schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append((len(optimizer.param_groups), optimizer.param_groups[0]["lr"]))


class Attach(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scales = {f"net.{name}": scale for name, scale in SCALES.items()}
        for optimizer in trainer.optimizers:
            scale_learning_rates(optimizer, Plan(pl_module, scales))


def batches() -> torch.utils.data.DataLoader[Any]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[Attach(), *callbacks], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_lightning_run(tmp_path: Path) -> None:
    lit, expected = Lit(), network()
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, LearningRateMonitor("step"), max_epochs=2, gradient_clip_val=0.05, logger=logger)
    run.fit(lit, batches())

    by_hand = ByHand(expected, OPTIMIZERS["adamw"], SCALES)
    schedule = schedules.OneCycleLR(by_hand.users, max_lr=0.05, total_steps=9)
    rates = []
    for _ in range(2):
        for (x,) in batches():
            expected.zero_grad()
            (expected(x) - 1).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
            rates.append(by_hand.users.param_groups[0]["lr"])
            by_hand.step()
            schedule.step()
    assert_same(lit.net, expected)
    assert lit.seen == [(2, rate) for rate in rates]
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [float(row["lr-AdamW/pg1"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx(rates)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resume(tmp_path: Path) -> None:
    straight, first, resumed = Lit(), Lit(), Lit()
    trainer(tmp_path, max_epochs=2, logger=False, enable_checkpointing=False).fit(straight, batches())
    run = trainer(tmp_path, max_epochs=1, logger=False, enable_checkpointing=False)
    run.fit(first, batches())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer(tmp_path, max_epochs=2, logger=False, enable_checkpointing=False)
    again.fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(straight, resumed)
    (saved,) = torch.load(tmp_path / "last.ckpt")["optimizer_states"]
    assert [len(group["params"]) for group in saved["param_groups"]] == [3, 1]


class Finetuned(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[0], self.net[2]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_backbone_finetuning(tmp_path: Path) -> None:
    lit, expected = Finetuned(), network()
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05, lambda_func=lambda _: 1.0)
    trainer(tmp_path, unfreeze, max_epochs=2, logger=False, enable_checkpointing=False).fit(lit, batches())
    for epoch in range(2):
        for (x,) in batches():
            expected.zero_grad()
            (expected(x) - 1).square().mean().backward()
            for (name, parameter), scale in zip(expected.named_parameters(), SCALES.values(), strict=True):
                rate = 0.1 if name.startswith("2") else 0.05 * epoch
                parameter.data -= rate * scale.lr * parameter.grad
    torch.testing.assert_close(weights(lit.net), weights(expected))
