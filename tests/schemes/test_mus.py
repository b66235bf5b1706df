"""µnit Scaling: its table over width and depth, the model written out by hand, few casts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_transformer import TOKENS, Transformer, heads, loss, norm, scaled
from torch import Tensor

from lightning_unitscale import UnitScalingError, scale_learning_rates


def by_hand(net: Any, tau: float) -> Tensor:
    """√(1-τ)·x + √τ·f(x) as the paper writes it, of weights at RMS 1; activations as they are."""

    def linear(x: Tensor, layer: Any) -> Tensor:
        return x @ layer.weight.T / math.sqrt(layer.in_features)

    def add(x: Tensor, branch: Tensor) -> Tensor:
        return math.sqrt(1 - tau) * x + math.sqrt(tau) * branch

    def attention(b: Any, h: Tensor) -> Tensor:
        q, k, v = (heads(linear(h, layer)) for layer in (b.q, b.k, b.v))
        return linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2), b.o)

    def mlp(b: Any, h: Tensor) -> Tensor:
        return linear(F.silu(linear(h, b.gate)) * linear(h, b.up), b.down)

    x = net.embedding.weight[TOKENS]
    for b in net.blocks:
        x = add(x, norm(attention(b, x)) if b.post else attention(b, norm(x)))
        x = add(x, norm(mlp(b, x)) if b.post else mlp(b, norm(x)))
    return norm(x) @ net.readout.weight.T / net.readout.in_features


@pytest.mark.parametrize("tau", [0.1, 0.4])
@pytest.mark.parametrize(("width", "depth"), [(8, 1), (16, 2), (24, 4)])
def test_the_function_is_the_papers(width: int, depth: int, tau: float) -> None:
    net, _ = scaled(depth, width, scheme="mus", storage="unit", hyperparameters={"tau": tau})
    torch.testing.assert_close(net(TOKENS), by_hand(net, tau), rtol=1e-9, atol=1e-12)


def test_one_res_post_norm_block_is_the_papers() -> None:
    """The norm at the end of a branch takes the factor in its gain; its input may have any scale."""
    net, plan = scaled(1, gains=True, post=True, scheme="mus", storage="unit", hyperparameters={"tau": 0.2})
    skip, branch = math.sqrt(0.8), math.sqrt(0.2)
    for index, name in enumerate(("blocks.0.norm1.weight", "blocks.0.norm2.weight")):
        site = next(site for site in plan.sites if name in site.params)
        assert site.multiplier == pytest.approx(branch / skip ** (index + 1))
    # Inside the block the stream lacks one √(1-τ), which every product of two linear maps carries on to a norm
    x = net.embedding.weight[TOKENS]
    block = net.blocks[0]
    first = x + branch / skip * norm(block.attention(x))
    torch.testing.assert_close(block(x), first + branch / skip**2 * norm(block.mlp(first)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [8, 32, 64])
@pytest.mark.parametrize("depth", [1, 3])
def test_learning_rates(width: int, depth: int) -> None:
    """√(base_width / fan_in) for hidden weights, 1 for all others, whatever the depth."""
    _, plan = scaled(
        depth, width, gains=True, scheme="mus", storage="unit", lr_units="umup", hyperparameters={"base_width": 32}
    )
    for name, rate in plan.lr_multipliers.items():
        hidden = plan.parameters[name].role == "hidden"
        fan_in = plan.parameters[name].shape[-1]
        assert rate == pytest.approx(math.sqrt(32 / fan_in) if hidden else 1.0), name


def test_operands_of_hidden_matmuls_alone_are_cast() -> None:
    _, plan = scaled(1, scheme="mus", format="bf16")
    cast = {site.params[0] for site in plan.cast_sites}
    assert cast == {f"blocks.0.{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    (readout,) = (site for site in plan.sites if site.role == "readout")
    assert readout.format_reason == "a readout: µS casts hidden matmuls alone"


def test_who_asks_for_the_cast_of_a_readout_gets_it() -> None:
    _, plan = scaled(1, scheme="mus", overrides={"readout": {"format": "bf16"}})
    assert [site.params[0] for site in plan.cast_sites] == ["readout.weight"]


def test_sgd_has_no_rule_in_its_own_units_and_one_in_ordinary_ones() -> None:
    net, plan = scaled(1, scheme="mus", lr_units="umup")
    with pytest.raises(UnitScalingError, match=r"scheme='mus' has no learning rates of its own .* family 'sgd'"):
        scale_learning_rates(torch.optim.SGD(net.parameters(), lr=0.1), plan)
    net, plan = scaled(1, scheme="mus")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scale_learning_rates(optimizer, plan)
    before = loss(net)
    before.backward()
    optimizer.step()
    assert loss(net) < before


@pytest.mark.parametrize("tau", [0, 1.0, -0.1, math.inf])
def test_a_share_is_between_0_and_1(tau: float) -> None:
    with pytest.raises(UnitScalingError, match=r"tau=.* of scheme='mus' must be"):
        scaled(1, scheme="mus", hyperparameters={"tau": tau})
    with pytest.raises(
        UnitScalingError, match=r"scheme='umup' has no hyperparameter 'tau' \(those of 'mus', 'unit' have\)"
    ):
        scaled(1, scheme="umup", hyperparameters={"tau": tau})


def test_an_unscaled_twin_has_another_function() -> None:
    net, _ = scaled(2, scheme="mus")
    assert not torch.allclose(net(TOKENS), Transformer(2)(TOKENS))
