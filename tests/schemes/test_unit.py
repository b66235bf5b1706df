"""Unit Scaling: the model written with the functions of the `unit-scaling` package; residual rules in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import unit_scaling.functional as U
from support import zoo
from support.prepared import prepared
from support.small_transformer import TOKENS, heads, norm, scaled
from torch import Tensor, nn

from lightning_unitscale import UnitScalingError, unit_scale

# √E[silu(z)²], z ~ N(0, 1), by Gauss-Hermite quadrature
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
SILU_RMS = math.sqrt(float((_WEIGHTS * (_NODES / (1 + np.exp(-_NODES))) ** 2).sum()) / math.sqrt(2 * math.pi))


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


@pytest.mark.parametrize("tau", [None, 0.2])
@pytest.mark.parametrize(("width", "depth"), [(8, 1), (16, 4), (32, 2)])
def test_multipliers_are_those_of_the_papers_table(width: int, depth: int, tau: float | None) -> None:
    """m^-½ for X [b, m] W [m, n] where n is not m too, and the residual rule in the last matrix of each branch."""
    net, plan = scaled(depth, width, scheme="unit", storage="unit", hyperparameters={"tau": tau})
    for name, weight in net.named_parameters():
        assert float(weight.detach().square().mean()) == pytest.approx(1)
        expected = 1 if name == "embedding.weight" else weight.shape[1] ** -0.5
        if name.endswith(("o.weight", "down.weight")):
            l = 2 * int(name.split(".")[1]) + name.endswith("down.weight") + 1  # noqa: E741 (the paper's)
            skips = [math.sqrt(k / (k + 1) if tau is None else 1 - tau) for k in range(1, l + 1)]
            expected *= math.sqrt(1 / (l + 1) if tau is None else tau) / math.prod(skips)
        if name.endswith("down.weight"):  # it takes the gated activation, whose constant is put here
            expected /= SILU_RMS
        assert plan.parameters[name].multiplier == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("function", "mean", "papers"),
    [
        (nn.ReLU(), (2 * math.pi) ** -0.5, math.sqrt(2 / (1 - 1 / math.pi))),
        (nn.GELU(), (4 * math.pi) ** -0.5, 1.701),  # E[z Φ(z)] = E[φ(z)]
        (nn.Tanh(), 0.0, 1.593),
    ],
)
def test_activations_are_the_papers_but_for_the_mean(function: nn.Module, mean: float, papers: float) -> None:
    """Theirs is 1/std, ours 1/RMS, and RMS² = std² + mean²."""
    net = nn.Sequential(nn.Linear(8, 8), function, nn.Linear(8, 1))
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    plan = unit_scale(net, lambda net: F.mse_loss(net(x), x[:, :1]), scheme="unit", storage="unit", verify=False)
    (ours,) = (site.multiplier for site in plan.sites if site.role == "activation")
    assert (ours**-2 - mean**2) ** -0.5 == pytest.approx(papers, rel=5e-4)


def test_what_a_sigmoid_or_softmax_makes_is_left_alone() -> None:
    for function in (nn.Sigmoid(), nn.Softmax(-1)):
        net = nn.Sequential(nn.Linear(8, 8), function, nn.Linear(8, 1))
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        plan = unit_scale(net, lambda net: F.mse_loss(net(x), x[:, :1]), scheme="unit", storage="unit", verify=False)  # noqa: B023
        assert [site.multiplier for site in plan.sites if site.role == "activation"] in ([], [1.0])
        assert plan.parameters["2.weight"].multiplier == pytest.approx(8**-0.5)


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
