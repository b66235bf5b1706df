"""Unit Scaling: the model written with the functions of the `unit-scaling` package; residual rules in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import unit_scaling.functional as U
from support import zoo
from support.prepared import prepared
from support.small_transformer import TOKENS, heads, norm, scaled
from torch import Tensor

from lightning_unitscale import UnitScalingError


def by_the_package(net: Any, silu_rms: float, tau: float | None) -> Tensor:
    """The forward pass in the package's functions, of weights at RMS 1."""

    def add(x: Tensor, branch: Tensor, position: int) -> Tensor:
        ratio = 1 / math.sqrt(position) if tau is None else math.sqrt(tau / (1 - tau))
        return U.residual_add(branch, x, tau=ratio)  # (x + ratio · branch) / √(1 + ratio²)

    x = U.embedding(TOKENS, net.embedding.weight)
    for index, b in enumerate(net.blocks):
        h = norm(x)
        q, k, v = (heads(U.linear(h, layer.weight, None)) for layer in (b.q, b.k, b.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        x = add(x, U.linear(mixed, b.o.weight, None), 2 * index + 1)
        h = norm(x)
        gated = F.silu(U.linear(h, b.gate.weight, None)) / silu_rms * U.linear(h, b.up.weight, None)
        x = add(x, U.linear(gated, b.down.weight, None), 2 * index + 2)
    return U.linear(norm(x), net.readout.weight, None)


@pytest.mark.parametrize("tau", [None, 0.2, 0.5])
@pytest.mark.parametrize(("width", "depth"), [(8, 1), (16, 2), (24, 3)])
def test_the_function_is_the_packages(width: int, depth: int, tau: float | None) -> None:
    net, plan = scaled(depth, width, scheme="unit", storage="unit", hyperparameters={"tau": tau})
    activation = next(site for site in plan.sites if site.role == "activation")
    expected = by_the_package(net, 1 / activation.multiplier, tau)
    torch.testing.assert_close(net(TOKENS), expected, rtol=1e-6, atol=1e-7)


def test_the_activation_s_constant_is_near_the_packages_which_was_fitted() -> None:
    _, plan = scaled(1, scheme="unit")
    ours = next(site for site in plan.sites if site.role == "activation").multiplier
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    theirs = float(U.silu_glu(torch.ones_like(z), z)[0] / F.silu(z)[0])
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("width", [8, 32])
def test_all_weights_have_the_same_rate(width: int) -> None:
    _, plan = scaled(2, width, gains=True, scheme="unit", storage="unit", lr_units="umup")
    assert set(plan.lr_multipliers.values()) == {1.0}


@pytest.mark.parametrize("tau", [None, 0.2])
def test_branches_with_a_norm_behind_are_weighed_against_the_skip_alone(tau: float | None) -> None:
    """BERT: b/a of each addition, 1/√l of the running mean's l-th."""
    _, plan = prepared(zoo.CASES["bert-sdpa"], scheme="unit", storage="unit", hyperparameters={"tau": tau})
    for index in range(4):
        name = f"bert.encoder.layer.{index // 2}.{('attention.output', 'output')[index % 2]}.dense.weight"
        ratio = (index + 1) ** -0.5 if tau is None else math.sqrt(tau / (1 - tau))
        site = next(site for site in plan.sites if name in site.params)
        assert site.multiplier == pytest.approx(ratio * plan.parameters[name].shape[1] ** -0.5)


@pytest.mark.parametrize("tau", [0, 1.0, -0.1, math.nan, "0.5"])
def test_a_share_is_between_0_and_1(tau: Any) -> None:
    with pytest.raises(UnitScalingError, match=r"tau=.* of scheme='unit' must be"):
        scaled(1, scheme="unit", hyperparameters={"tau": tau})
