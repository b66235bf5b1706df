"""u-μP's hyperparameters: the function written out by hand, step sizes in closed form, parts of a model by glob."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import zoo
from support.prepared import prepared
from support.small_transformer import HEAD_DIM, TOKENS, VOCAB, Transformer, heads, loss, norm, scaled
from torch import Tensor, nn
from unit_scaling.core.functional import transformer_residual_scaling_rule

from lightning_unitscale import Plan, UnitScalingError, unit_scale
from lightning_unitscale.schemes.umup import UMuP

WIDTH = 16


def by_hand(net: Any, alpha: dict[str, float]) -> Tensor:
    """u-μP's forward pass as the paper writes it, of weights at RMS 1: residual additions by its τ rule."""
    z, weights = np.polynomial.hermite_e.hermegauss(200)
    z = torch.from_numpy(z)
    bend = alpha.get("alpha_ffn_act", 1.0)
    squared = (z * torch.sigmoid(bend * z)).square()  # what the library calls silu with mult=bend
    silu_rms = math.sqrt(float((torch.from_numpy(weights) * squared).sum()) / math.sqrt(2 * math.pi))
    tau = transformer_residual_scaling_rule(alpha.get("alpha_res", 1.0), alpha.get("alpha_res_attn_ratio", 1.0))
    layers = 2 * len(net.blocks)

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return x @ layer.weight.T / math.sqrt(layer.in_features)

    def add(x: Tensor, branch: Tensor, index: int) -> Tensor:
        t = tau(index, layers)
        return (x + t * branch) / math.sqrt(1 + t**2)

    x = net.embedding.weight[TOKENS]
    for index, b in enumerate(net.blocks):
        h = norm(x)
        q, k, v = (heads(linear(h, layer)) for layer in (b.q, b.k, b.v))
        scale = alpha.get("alpha_attn", 1.0) / HEAD_DIM ** alpha.get("attn_exponent", 0.5)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        x = add(x, linear(mixed.transpose(-2, -3).flatten(-2), b.o), 2 * index)
        h = norm(x)
        g = linear(h, b.gate)
        x = add(x, linear(g * torch.sigmoid(bend * g) / silu_rms * linear(h, b.up), b.down), 2 * index + 1)
    exponent = alpha.get("readout_exponent", 0.5)
    few = min(1.0, 0.45 * math.log(VOCAB)) if exponent < 1 else 1.0
    readout = alpha.get("alpha_out", 1.0) * few / WIDTH**exponent
    return norm(x) @ net.readout.weight.T * readout


PAPER = {"attn_exponent": 1.0, "readout_exponent": 1.0}
ALPHAS: list[dict[str, float]] = [
    {},
    PAPER,
    {"alpha_attn": 2.5},
    {"alpha_ffn_act": 0.5},
    {"alpha_ffn_act": 2.0, "alpha_out": 0.25},
    {"alpha_res": 0.5},
    {"alpha_res": 2.0, "alpha_res_attn_ratio": 0.25},
    {**PAPER, "alpha_attn": 0.5, "alpha_ffn_act": 3.0, "alpha_res": 0.3, "alpha_res_attn_ratio": 2.0, "alpha_out": 4.0},
]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_the_function_is_the_papers(alpha: dict[str, float], depth: int) -> None:
    net, _ = scaled(depth, storage="unit", hyperparameters=alpha)
    assert all(float(weight.detach().square().mean()) == pytest.approx(1.0) for weight in net.parameters())
    torch.testing.assert_close(net(TOKENS), by_hand(net, alpha), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_storages_have_one_function(alpha: dict[str, float]) -> None:
    one, other = (scaled(2, storage=storage, hyperparameters=alpha)[0] for storage in ("folded", "unit"))
    torch.testing.assert_close(one(TOKENS), other(TOKENS), rtol=1e-10, atol=1e-12)


def test_learning_rates_of_embeddings_and_readouts() -> None:
    plain, other = (
        scaled(2, lr_units="umup", hyperparameters=given)[1].lr_multipliers
        for given in ({}, {"eta_emb": 3, "eta_out": 2})
    )
    ratios = {name: other[name] / plain[name] for name in plain}
    assert ratios.pop("embedding.weight") == pytest.approx(3.0)
    assert ratios.pop("readout.weight") == pytest.approx(2 / 0.6)
    assert set(ratios.values()) == {1.0}


def test_in_standard_units_the_embedding_has_its_own_relative_step_times_the_ratio() -> None:
    (_, plain), (_, other) = (scaled(1, hyperparameters=given) for given in ({}, {"eta_emb": 3}))
    ratio = other.lr_multipliers["embedding.weight"] / plain.lr_multipliers["embedding.weight"]
    assert ratio == pytest.approx(3.0)


@pytest.mark.parametrize("drawn", [1.0, 0.02])
def test_in_standard_units_an_embedding_steps_at_least_at_the_hidden_weights_eta(drawn: float) -> None:
    """Of T5 or torch's own, at RMS 1, it would hardly move.

    A rate of 1 is η = √fan_in / RMS for hidden weights; an embedding's step is η / √fan_out.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, VOCAB))
    nn.init.normal_(model[0].weight, std=drawn)
    nn.init.normal_(model[1].weight, std=0.5)
    rms = model[0].weight.square().mean().sqrt().item(), model[1].weight.square().mean().sqrt().item()
    tokens = torch.arange(VOCAB)
    plan = unit_scale(model, lambda m: F.cross_entropy(m(tokens), tokens), lr_units="standard")
    embedding, at_eta = plan.parameters["0.weight"], WIDTH**0.5 / rms[1] / WIDTH**0.5
    assert embedding.relative_lr == pytest.approx(max(1 / rms[0], at_eta), rel=0.05)  # sixteenths of an octave
    assert ("hidden weights" in embedding.causes["relative_lr"][0].cause) == (drawn == 1.0)


@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0])
def test_depth_exponent(depth: int, exponent: float) -> None:
    """Branches × L^-p, their learning rates × L^(p-1): what all branches change in one step is free of L."""
    hyperparameters = {"base_depth": 1.0, "depth_exponent": exponent}
    _, plan = scaled(depth, storage="unit", lr_units="umup", hyperparameters=hyperparameters)
    for name, fan_in in (("o", WIDTH), ("down", 2 * WIDTH), ("q", WIDTH)):
        weight = plan.parameters[f"blocks.{depth - 1}.{'q' if name == 'q' else name}.weight"]
        branch = 1.0 if name == "q" else depth**-exponent
        site = next(site for site in plan.sites if weight.name in site.params)
        assert site.multiplier == pytest.approx(fan_in**-0.5 * branch)
        assert plan.lr_multipliers[weight.name] == pytest.approx(fan_in**-0.5 * depth ** (exponent - 1))


def test_up_to_the_base_depth_it_is_the_papers_and_then_completeps() -> None:
    def constants(depth: int) -> tuple[float, float]:
        _, plan = scaled(depth, storage="unit", lr_units="umup", hyperparameters={"base_depth": 3.0})
        site = next(site for site in plan.sites if "blocks.0.o.weight" in site.params)
        return site.multiplier * WIDTH**0.5, plan.lr_multipliers["blocks.0.o.weight"] * WIDTH**0.5

    assert constants(2) == pytest.approx((2**-0.5, 2**-0.5))
    assert constants(3) == pytest.approx((3**-0.5, 3**-0.5))
    assert constants(12) == pytest.approx((3**-0.5 / 4, 3**-0.5))


OUTPUTS: dict[str, Any] = {
    "cross entropy": (F.cross_entropy, "logits"),
    "soft cap, shift, probabilities": (lambda y, t: (5 * torch.tanh(y / 5) + 1).log_softmax(-1)[:, 0].sum(), "logits"),
    "odds": (lambda y, t: F.binary_cross_entropy_with_logits(y, F.one_hot(t).to(y.dtype)), "odds"),
    "probabilities, each by itself": (lambda y, t: (y - 4).sigmoid().square().mean(), "odds"),
    "squares": (lambda y, t: y.square().mean(), "targets"),
    "positive": (lambda y, t: F.softplus(y).square().mean(), "targets"),
    "cosines": (lambda y, t: F.cross_entropy(F.normalize(y) @ F.normalize(y).T, t), "targets"),
}


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_step_of_the_readout_changes_outputs_alike_at_every_width(kind: str, exponent: float, width: int) -> None:
    """By fan_in · multiplier · rate, of RMS-1 features; what is no logit starts small, as in the paper."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3)).double()
    x, targets = torch.randn(3, 8, dtype=torch.float64), torch.arange(3)
    loss, outputs = OUTPUTS[kind]
    plan = unit_scale(
        model,
        lambda net: loss(net(x), targets),
        storage="unit",
        lr_units="umup",
        activations=False,
        hyperparameters={"readout_exponent": exponent, "eta_out": 2.0, "eta_odds": 5.0, "eta_target": 3.0},
    )
    multiplier = plan.parameters["2.weight"].multiplier
    as_drawn = outputs == "logits" and exponent < 1
    assert multiplier == pytest.approx(0.45 * math.log(3) * width**-exponent if as_drawn else 1 / width)
    step = width * multiplier * plan.lr_multipliers["2.weight"]
    of_logits = 2.0 * math.log(3) if as_drawn else 2.0
    assert step == pytest.approx({"logits": of_logits, "odds": 5.0, "targets": 3.0}[outputs])


@pytest.mark.parametrize(("classes", "outputs"), [(1, "odds"), (2, "odds"), (3, "logits")])
def test_a_softmax_of_two_is_a_sigmoid_of_their_difference(classes: int, outputs: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, classes))
    loss = F.cross_entropy if classes > 1 else F.binary_cross_entropy_with_logits
    targets = torch.zeros(4, dtype=torch.long) if classes > 1 else torch.zeros(4, 1)
    x = torch.randn(4, 8)
    plan = unit_scale(model, lambda m: loss(m(x), targets), storage="unit", lr_units="umup", activations=False)
    small = plan.parameters["2.weight"].multiplier == pytest.approx(1 / 16)
    assert small == (outputs == "odds")
    assert (plan.lr_multipliers["2.weight"] == UMuP().eta_odds) == (outputs == "odds")


@pytest.mark.parametrize("tokens", [5, 300])
def test_a_tokens_own_logit_is_about_ln_v_where_the_readout_is_the_embedding(tokens: int) -> None:
    """So a model that only repeats its input begins near the loss of guessing, whatever V."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(tokens, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.table(ids), self.table.weight)

    ids = torch.arange(tokens)
    net = Tied()
    plan = unit_scale(net, lambda m: F.cross_entropy(m(ids), ids.roll(1)), hyperparameters={"alpha_tied": 1.2})
    (site,) = (site for site in plan.sites if site.role == "readout")
    assert site.multiplier == pytest.approx(1.2 * math.log(tokens) / 64)
    own = net(ids).diagonal().mean()
    assert float(own) == pytest.approx(1.2 * math.log(tokens), rel=0.05)


@pytest.mark.parametrize("start", [0.0, 1e-6, 1.3])
def test_learned_scales_step_as_gains_do_however_small_they_start(start: float) -> None:
    """A LayerScale of 1e-6 with steps relative to itself would never let its branch begin."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH)
            self.branch, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
            self.gamma = nn.Parameter(torch.full((WIDTH,), start))
            self.temperature = nn.Parameter(torch.tensor(1.1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.head(h + self.gamma * self.branch(self.norm(h))) * self.temperature

    x, classes = torch.randn(6, 8), torch.arange(6) % 3
    plan = unit_scale(Scaled(), lambda m: F.cross_entropy(m(x), classes), lr_units="umup")
    fan_in = (8 * WIDTH) ** 0.5  # of the hidden weights, whose rates in folded storage this is
    assert plan.lr_multipliers["gamma"] == pytest.approx(1 / round(fan_in))
    assert plan.lr_multipliers["temperature"] == pytest.approx(1 / round(fan_in))
    assert plan.lr_multipliers["norm.weight"] == pytest.approx(1 / WIDTH)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_branches_with_a_norm_behind_have_their_share_of_the_sum_so_far(exponent: float) -> None:
    """BERT, two layers: each branch × α/√(L^2p + Σα²) by its kind."""
    depth = {"base_depth": 1.0, "depth_exponent": exponent}
    hyperparameters = {"alpha_res": 2.0, "alpha_res_attn_ratio": 0.5, **depth}
    _, plan = prepared(zoo.CASES["bert-sdpa"], storage="unit", hyperparameters=hyperparameters)
    alpha_mlp = 2.0 * math.sqrt(2 / 1.25)
    alphas = [0.5 * alpha_mlp, alpha_mlp] * 2
    ends = ("attention.output.dense", "output.dense")
    for index, alpha in enumerate(alphas):
        name = f"bert.encoder.layer.{index // 2}.{ends[index % 2]}.weight"
        site = next(site for site in plan.sites if name in site.params)
        tau = alpha / math.sqrt(2 ** (2 * exponent) + sum(a**2 for a in alphas[:index]))
        assert site.multiplier == pytest.approx(tau * plan.parameters[name].shape[1] ** -0.5)


# --- parts of a model -------------------------------------------------------------------------------------------------


def test_a_glob_gives_hyperparameters_to_a_part() -> None:
    _, plan = scaled(2, storage="unit", overrides={"blocks.0": {"alpha_attn": 2.0, "alpha_res": 0.5}})
    _, other = scaled(2, storage="unit")
    changed = {
        f"{site.name} ({site.role})": site.multiplier / twin.multiplier
        for site, twin in zip(plan.sites, other.sites, strict=True)
        if site.multiplier != twin.multiplier
    }
    assert changed == {
        "blocks.0.attention:scaled_dot_product_attention (attention)": 2.0,
        "blocks.0.o:linear (hidden)": 0.5,
        "blocks.0.down:linear (hidden)": 0.5,
    }


@pytest.mark.parametrize(
    ("name", "part", "place"),
    [
        ("alpha_attn", "blocks.0", "blocks.0.attention:scaled_dot_product_attention"),  # α_attn-softmax
        ("alpha_ffn_act", "blocks.0", "blocks.0.gate.weight"),  # α_ffn-act
        ("alpha_res", "blocks.0", "blocks.0.down.weight"),  # α_res
        ("alpha_res_attn_ratio", "blocks.0", "blocks.0.o.weight"),  # α_res-attn-ratio
        ("alpha_out", "readout", "readout.weight"),  # α_loss-softmax
    ],
)
def test_each_of_the_papers_is_had_by_the_whole_or_a_part(name: str, part: str, place: str) -> None:
    _, plain = scaled(2)
    _, whole = scaled(2, hyperparameters={name: 3.0})
    _, partly = scaled(2, overrides={part: {name: 3.0}})
    assert name not in plain.explain(place).replace("alpha_res = 1, ratio = 1", "")
    for plan in (whole, partly):
        assert re.search(rf"× \S+: ({name} |.*{'ratio' if 'ratio' in name else name} = 3)|{name};", plan.explain(place))
        assert plan.explain(place) != plain.explain(place)
    others = [key for key in plain.parameters if not key.startswith(part) and key != "embedding.weight"]
    assert all(partly.parameters[key].multiplier == plain.parameters[key].multiplier for key in others)
    if part != "readout":
        last = place.replace("blocks.0", "blocks.1")
        assert whole.explain(last) != plain.explain(last) == partly.explain(last)


def test_later_branches_know_what_a_glob_gave_to_earlier_ones() -> None:
    """With a norm behind each addition, the first branch of four at α = 2 leaves the others a smaller share."""
    _, plan = prepared(zoo.CASES["bert-sdpa"], storage="unit", overrides={"*.layer.0.attention*": {"alpha_res": 2.0}})
    name = "bert.encoder.layer.0.output.dense.weight"
    site = next(site for site in plan.sites if name in site.params)
    assert site.multiplier == pytest.approx((2 + 2.0**2) ** -0.5 * plan.parameters[name].shape[1] ** -0.5)


def test_the_plan_says_which_hyperparameter_a_factor_is_and_keeps_it() -> None:
    _, plan = scaled(
        1, hyperparameters={"alpha_attn": 2.0, "alpha_out": 0.5}, overrides={"embedding": {"eta_emb": 4.0}}
    )
    assert "× 2: alpha_attn (hyperparameters)" in plan.explain("blocks.0.attention:scaled_dot_product_attention")
    folded = "alpha_attn; of the attention blocks.0.attention:scaled_dot_product_attention, folded (hyperparameters)"
    assert f"× 2: {folded}" in plan.explain("blocks.0.q.weight")
    assert "× 0.5: alpha_out (hyperparameters)" in plan.explain("readout.weight")
    assert "× 4: eta_emb (hyperparameters)" in plan.explain("embedding.weight")
    assert Plan.from_dict(plan.to_dict()).options["hyperparameters"] == {"alpha_attn": 2.0, "alpha_out": 0.5}


def test_an_activation_whose_input_no_weight_makes_is_left_alone_and_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(F.silu(h) + h)

    plan = unit_scale(Twice(), lambda m: m(torch.ones(4, 8)).square().mean(), hyperparameters={"alpha_ffn_act": 2.0})
    assert any("alpha_ffn_act left an activation" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["llama-eager", "gpt2-sdpa", "resnet", "t5-sdpa"])
def test_all_of_them_at_once_in_both_storages(name: str) -> None:
    hyperparameters = dict.fromkeys(
        ("alpha_attn", "alpha_ffn_act", "alpha_res", "alpha_res_attn_ratio", "alpha_out"), 0.7
    )
    case, losses = zoo.CASES[name], []
    for storage in ("folded", "unit"):
        model, _ = prepared(case, storage=storage, hyperparameters=hyperparameters)
        losses.append(case.loss(model, case.batch(1)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hyperparameters": {"alpha_attn": 0}}, "alpha_attn=0 of scheme='umup' must be a number above 0"),
        ({"hyperparameters": {"alpha_res": -1.0}}, "alpha_res=-1.0 of scheme='umup' must be a number above 0"),
        ({"hyperparameters": {"alpha_out": math.nan}}, "alpha_out=nan of scheme='umup' must be a number above 0"),
        ({"hyperparameters": {"alpha_out": "1"}}, "alpha_out='1' of scheme='umup' must be a number above 0"),
        ({"hyperparameters": {"alpha_atn": 1.0}}, "hyperparameters key='alpha_atn' is not known.*mean 'alpha_attn'"),
        ({"hyperparameters": 2.0}, "hyperparameters=2.0 must map names to values"),
        (
            {"scheme": "preserve", "hyperparameters": {"alpha_attn": 1.0}},
            "'preserve' has no hyperparameter 'alpha_attn'",
        ),
        ({"overrides": {"*": {"alpha_attn": -2}}}, "alpha_attn=-2 of scheme='umup' must be a number above 0"),
        ({"overrides": {"*": {"alpha_atn": 2}}}, r"overrides\['\*'\] key='alpha_atn' is not known.*mean 'alpha_attn'"),
    ],
)
def test_wrong_hyperparameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnitScalingError, match=message):
        scaled(1, **options)


def test_an_override_that_decides_nothing_is_refused() -> None:
    net = Transformer(1)
    before = [weight.detach().clone() for weight in net.parameters()]
    with pytest.raises(UnitScalingError, match=r"overrides\['blocks.0.q'\]: alpha_attn changes nothing there"):
        unit_scale(net, loss, overrides={"blocks.0.q": {"alpha_attn": 2.0}})
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))
