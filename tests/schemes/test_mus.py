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


SIZES = pytest.mark.parametrize(("width", "depth"), [(8, 1), (16, 4), (32, 2), (64, 3)])
BASE = 16


def row(plan: Any, name: str) -> str:
    """The paper's name of the weight's type; those that its table does not have learn as input layers do."""
    return {"hidden": "hidden", "readout": "final"}.get(plan.parameters[name].role, "input")


def fan_in(plan: Any, name: str) -> int:
    return plan.parameters[name].shape[-1]


@SIZES
def test_multipliers_are_those_of_table_2(width: int, depth: int) -> None:
    """Weights at variance 1; 1, 1/fan_in and 1/√fan_in, and in the last matrix of a branch what equation 11 adds."""
    tau = 0.4
    net, plan = scaled(depth, width, scheme="mus", storage="unit", hyperparameters={"tau": tau})
    assert {row(plan, name) for name in plan.parameters} == {"input", "final", "hidden"}
    for name, weight in net.named_parameters():
        assert float(weight.detach().square().mean()) == pytest.approx(1)  # init. variance
        expected = {"input": 1, "final": 1 / fan_in(plan, name), "hidden": fan_in(plan, name) ** -0.5}[row(plan, name)]
        if name.endswith(("o.weight", "down.weight")):
            position = 2 * int(name.split(".")[1]) + name.endswith("down.weight")  # of the branch in the stream, from 0
            expected *= math.sqrt(tau) / math.sqrt(1 - tau) ** (position + 1)
        assert plan.parameters[name].multiplier == pytest.approx(expected), name


@SIZES
def test_learning_rates_are_those_of_table_2(width: int, depth: int) -> None:
    """η_new = η_base √(d_base / d_new) for hidden layers alone; embedding, norms and LM head keep η at any depth."""
    options = {"scheme": "mus", "storage": "unit", "lr_units": "umup", "gains": True}
    _, plan = scaled(depth, width, hyperparameters={"base_width": BASE}, **options)
    _, base = scaled(depth, BASE, hyperparameters={"base_width": BASE}, **options)
    for name, rate in plan.lr_multipliers.items():
        table = fan_in(plan, name) ** -0.5 if row(plan, name) == "hidden" else 1.0
        at_base = fan_in(base, name) ** -0.5 if row(plan, name) == "hidden" else 1.0
        assert rate / base.lr_multipliers[name] == pytest.approx(table / at_base), name
        is_square = fan_in(base, name) == BASE
        assert not is_square or base.lr_multipliers[name] == pytest.approx(1.0), name


@pytest.mark.parametrize("storage", ["folded", "unit"])
@SIZES
def test_weight_decay_is_the_same_at_all_widths(width: int, depth: int, storage: str) -> None:
    """Fully decoupled: a step shrinks each matrix by η λ, whatever its own rate is."""
    _, plan = scaled(depth, width, gains=True, scheme="mus", storage=storage, lr_units="umup")
    for name, scale in plan.step_scales("adam", decoupled_decay=True).items():
        assert scale.lr * scale.weight_decay == pytest.approx(1), name


@SIZES
def test_attention_is_as_usual(width: int, depth: int) -> None:
    _, plan = scaled(depth, width, scheme="mus", storage="unit")
    assert not [site for site in plan.sites if site.role in ("attention", "activation") and site.multiplier != 1]


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
