"""Learning-rate multipliers: every step equals that of an optimizer whose groups were really split, by hand."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from support.split_by_hand import (
    OPTIMIZERS,
    SCALES,
    STEPS,
    ByHand,
    Groups,
    Plan,
    assert_same,
    backward,
    loss_of,
    network,
    two_groups,
    weights,
)
from torch import Tensor, nn

from lightning_unitscale.engine.plan.step_scales import StepScale
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates


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
