"""Multipliers under schedulers, in state dicts, and with groups that are added later."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.split_by_hand import (
    OPTIMIZERS,
    SCALES,
    SCHEDULES,
    STEPS,
    ByHand,
    Plan,
    advance,
    assert_same,
    backward,
    network,
    two_groups,
)
from torch.optim import lr_scheduler as schedules

from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates


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
