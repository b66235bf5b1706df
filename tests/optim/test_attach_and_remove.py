"""Multipliers are attached to one optimizer, once, and leave no trace when they are removed or it is copied."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.split_by_hand import (
    OPTIMIZERS,
    SCALES,
    ByHand,
    Groups,
    Plan,
    assert_same,
    backward,
    network,
    two_groups,
    weights,
)
from torch.optim import lr_scheduler as schedules

from lightning_unitscale.engine.plan.step_scales import StepScale
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates


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
