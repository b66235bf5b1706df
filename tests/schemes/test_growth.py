"""Coordinates grow alike at every size: what some Adam steps at one learning rate change the residual stream by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_transformer import TOKENS, Transformer, loss, scaled

from lightning_unitscale import scale_learning_rates

WIDTHS, DEPTHS, STEPS = (16, 64, 256), (2, 6, 18), 4


def growth(net: Any, plan: Any, rate: float) -> float:
    """RMS of the change of the stream, normalised, beside the one before."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, eps=1e-12)
    if plan is not None:
        scale_learning_rates(optimizer, plan)
    with torch.no_grad():
        before = net.norm(net.stream(TOKENS))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
    with torch.no_grad():
        return float((net.norm(net.stream(TOKENS)) - before).square().mean().sqrt())


def spread(sizes: list[tuple[int, int]], rate: float, **options: Any) -> float:
    """The largest growth by the smallest."""
    found = [
        growth(
            *(scaled(depth, width, lr_units="umup", **options) if options else (Transformer(depth, width), None)), rate
        )
        for depth, width in sizes
    ]
    return max(found) / min(found)


RULES: list[tuple[dict[str, Any], float]] = [
    ({"scheme": "umup"}, 2**-7),
    ({"scheme": "umup", "hyperparameters": {"base_depth": 1.0}}, 2**-7),
    ({"scheme": "mus", "hyperparameters": {"base_width": 16}}, 2**-10),
    ({"scheme": "completep", "hyperparameters": {"base_width": 16, "init_std": 0.25, "alpha_in": 4}}, 2**-12),
]


@pytest.mark.parametrize(("options", "rate"), RULES, ids=str)
def test_flat_in_width(options: dict[str, Any], rate: float) -> None:
    assert spread([(2, width) for width in WIDTHS], rate, **options) < 1.4


@pytest.mark.parametrize(("options", "rate"), [RULES[1], RULES[3]], ids=str)
def test_flat_in_depth(options: dict[str, Any], rate: float) -> None:
    assert spread([(depth, 16) for depth in DEPTHS], rate, **options) < 1.4


def test_half_the_exponent_lets_them_grow_with_depth() -> None:
    options, rate = RULES[3]
    halved = {**options, "hyperparameters": {**options["hyperparameters"], "alpha": 0.5}}
    assert spread([(depth, 16) for depth in DEPTHS], rate, **halved) > 1.6


def test_an_untouched_model_s_are_not() -> None:
    assert spread([(2, width) for width in WIDTHS], 2**-12) > 3
    assert spread([(depth, 16) for depth in DEPTHS], 2**-12) > 2
