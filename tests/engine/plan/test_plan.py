"""The plan as data: what it says, how it is stored, edited and matched with a model."""

import copy
import gc
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.prepared import build, prepared
from torch import Tensor, nn

from lightning_unitscale import Plan, UnitScalingError, remove_unit_scaling, scale_learning_rates, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.schemes.umup import UMuP

NAMES = ("sequential", "llama-sdpa", "gpt2-eager", "lstm", "resnet", "weight-norm", "experts-loop")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


INPUTS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def step(module: nn.Module) -> torch.Tensor:
    return module(INPUTS).square().mean()


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


# ---------------------------------------------------------------------------------------------------------------------
# Plain containers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, storage: str) -> None:
    _, plan = prepared(zoo.CASES[name], storage=storage)
    data = plan.to_dict()
    assert is_plain(data)
    read = Plan.from_dict(json.loads(json.dumps(data)))
    assert read.to_dict() == data
    assert read.parameters == plan.parameters
    assert read.sites == plan.sites
    assert read.lr_multipliers == plan.lr_multipliers
    assert read.summary() == plan.summary()


def test_options_with_every_field_are_plain() -> None:
    plan = unit_scale(mlp(), step, skip=("2",), overrides={"0.weight": {"multiplier": 0.5}}, recalibrate=(1, 2))
    assert is_plain(plan.to_dict())


def test_safe_loading(tmp_path: Path) -> None:
    plan = unit_scale(mlp(), step)
    torch.save(plan.to_dict(), tmp_path / "plan.pt")
    assert Plan.from_dict(torch.load(tmp_path / "plan.pt", weights_only=True)).to_dict() == plan.to_dict()


def test_a_read_plan_shares_nothing_with_what_was_read() -> None:
    data = unit_scale(mlp(), step).to_dict()
    before = copy.deepcopy(data)
    read = Plan.from_dict(data)
    read.sites[0].multipliers.clear()
    read.parameters["0.weight"].shape.append(3)
    read.notes.append("changed")
    assert data == before


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"version": 2},
        {"parameters": {}},
        {"version": 2, "parameters": {}},
        {"version": 2, "parameters": 1},
    ],
)
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(UnitScalingError, match=r"not a (whole )?unit-scaling plan"):
        Plan.from_dict(data)


def test_another_version_is_refused() -> None:
    data = unit_scale(mlp(), step).to_dict() | {"version": 99}
    with pytest.raises(UnitScalingError, match="version 99"):
        Plan.from_dict(data)


# ---------------------------------------------------------------------------------------------------------------------
# Editing
# ---------------------------------------------------------------------------------------------------------------------


def test_override_of_a_role() -> None:
    plain = unit_scale(mlp(), step, storage="unit")
    assert plain.roles["4.weight"] == "readout"
    plan = unit_scale(mlp(), step, storage="unit", overrides={"4.weight": {"role": "hidden"}}, verify=False)
    assert plan.roles == plain.roles | {"4.weight": "hidden"}

    def site(of: Plan) -> float:
        return next(site.multiplier for site in of.sites if site.params[:1] == ["4.weight"])

    assert site(plain) == pytest.approx(1 / 16)
    assert site(plan) == pytest.approx(16**-0.5)


def test_the_role_of_a_weight_said_of_its_whole_layer_leaves_the_bias_a_bias() -> None:
    plain = unit_scale(mlp(), step)
    plan = unit_scale(mlp(), step, overrides={"4": {"role": "hidden"}}, verify=False)
    assert plan.roles == plain.roles | {"4.weight": "hidden"}


@pytest.mark.parametrize("name", ["1", "1.weight", "0.bias"])
def test_what_is_no_weight_of_a_matmul_is_refused_the_role_of_one(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(8, 16)
    with pytest.raises(UnitScalingError, match=rf"overrides\['{name}'\]: role='hidden' is for weights of matmuls"):
        unit_scale(model, lambda net: net(x).square().mean(), overrides={name: {"role": "hidden"}})


class OneOfTwoExperts(nn.Module):
    """The second expert gets nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts[0](x).relu())


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_an_expert_without_data_is_left_alone_where_all_weights_are(storage: str) -> None:
    model, x = OneOfTwoExperts(), torch.randn(8, 16)
    before = copy.deepcopy(model.experts)
    plan = unit_scale(model, lambda net: net(x).square().mean(), weights=False, storage=storage)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.experts.parameters(), strict=True))
    assert plan.lr_multipliers["experts.1.weight"] == plan.lr_multipliers["experts.0.weight"] == 1.0


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_override_of_a_multiplier(storage: str) -> None:
    """A multiplier replaces that of the weight's own rule, and the function is that much larger."""
    with zoo.default_dtype(torch.float64):
        outputs = []
        for override in ({}, {"4.weight": {"multiplier": 2 / 16}}):
            model = mlp()
            inputs = INPUTS.double()
            plan = unit_scale(model, lambda m, x=inputs: m(x).square().mean(), storage=storage, overrides=override)
            outputs.append(model(inputs) - plan_bias(plan, model))
    assert outputs[0].abs().max() > 0
    torch.testing.assert_close(outputs[1], 2 * outputs[0])


def plan_bias(plan: Plan, model: nn.Module) -> torch.Tensor:
    site = next(site for site in plan.sites if site.params[:1] == ["4.weight"])
    return model[4].bias * site.factors["4.bias"]


@pytest.mark.parametrize("family", ["adam", "sgd", "muon"])
def test_override_of_a_learning_rate_multiplier(family: str) -> None:
    plan = unit_scale(mlp(), step, lr_units="umup", overrides={"2.*": {"lr_multiplier": 0.25}})
    plain = unit_scale(mlp(), step, lr_units="umup")
    scales, before = (p.step_scales(family, decoupled_decay=True) for p in (plan, plain))
    assert [name for name in scales if scales[name] != before[name]] == ["2.weight", "2.bias"]
    assert {scales[name].lr for name in ("2.weight", "2.bias")} == {0.25}
    assert scales["2.weight"].weight_decay == pytest.approx(4)


def test_later_overrides_add_to_earlier_ones() -> None:
    overrides = {"*": {"lr_multiplier": 2.0}, "0": {"lr_multiplier": 3.0}, "0.bias": {"skip": True}}
    plan = unit_scale(mlp(), step, overrides=overrides)
    assert plan.lr_multipliers == dict.fromkeys(plan.parameters, 2.0) | {"0.weight": 3.0, "0.bias": 3.0}
    assert plan.parameters["0.bias"].reason == "skipped by the options"


@pytest.mark.parametrize("options", [{"skip": ("2",)}, {"skip": "2"}, {"overrides": {"2": {"skip": True}}}])
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_skip(options: dict[str, Any], storage: str) -> None:
    model, untouched = mlp(), mlp()
    plan = unit_scale(model, step, storage=storage, **options)
    for name in ("2.weight", "2.bias"):
        assert (name, "skipped by the options") in plan.skipped
        assert torch.equal(model.get_parameter(name), untouched.get_parameter(name))
        assert plan.parameters[name].stored == plan.parameters[name].multiplier == 1.0
        assert plan.lr_multipliers[name] == 1.0
    assert not torch.equal(model[0].weight, untouched[0].weight)
    assert "skipped by the options" in plan.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ("decoder.*",)}, r"skip: the glob 'decoder\.\*' matches no parameter or module of Sequential"),
        ({"overrides": {"1.weight": {"skip": True}}}, r"overrides: the glob '1\.weight' matches no .*0\.weight"),
        ({"skip": ("1.wieght", "2.wieght")}, r"skip: the glob '1\.wieght' matches no .*It has 0\.weight"),
        ({"skip": ("*.0.weight",)}, r"skip: the glob '\*\.0\.weight' matches no .*Did you mean '0\.weight'\?"),
        ({"skip": ("*.waight",)}, r"skip: the glob '\*\.waight' matches no .*Did you mean '\*\.weight'\?"),
        ({"overrides": {"0": {"multiplyer": 2}}}, "Did you mean 'multiplier'"),
        ({"skip": ("*",)}, "nothing in Sequential can be scaled"),
        ({"scheme": "mup"}, "Did you mean 'umup'"),
        ({"storage": "units"}, "Did you mean 'unit'"),
        ({"lr_units": "umap"}, "lr_units='umap'"),
        ({"format": "fp9"}, "format='fp9' is not known.*Did you mean 'fp8'"),
        ({"verify": 1}, "verify=1 must be True or False"),
    ],
)
def test_wrong_options_are_named_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model, untouched = mlp(), mlp()
    with pytest.raises(UnitScalingError, match=message):
        unit_scale(model, step, **options)
    assert plan_of(model) is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))
    unit_scale(model, step)


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        ({"0.weight": {"role": "hiden"}}, "hiden"),
        ({"0.weight": {"multiplier": "large"}}, "large"),
        ({"0.weight": {"multiplier": 0.0}}, "0.0"),
        ({"0.weight": {"lr_multiplier": -1.0}}, "-1.0"),
        ({"0.weight": {"lr_multiplier": float("nan")}}, "nan"),
    ],
)
def test_wrong_values_of_overrides_are_named(overrides: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UnitScalingError, match=wrong):
        unit_scale(mlp(), step, overrides=overrides)


def test_preparing_twice_is_refused() -> None:
    model = mlp()
    plan = unit_scale(model, step)
    with pytest.raises(UnitScalingError, match="Sequential is already unit-scaled"):
        unit_scale(model, step)
    assert plan_of(model) is plan
    remove_unit_scaling(model)
    unit_scale(model, step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(value: float) -> None:
    model = mlp()
    with pytest.raises(UnitScalingError, match=f"loss of the rehearsed step of Sequential is {value}"):
        unit_scale(model, lambda module: step(module) * value)
    assert plan_of(model) is None


@pytest.mark.parametrize("make", [torch.randn, torch.rand, torch.ones])
def test_inputs_made_inside_the_step(make: Any) -> None:
    """Noise of a GAN or a diffusion model is data, not a part of the weights."""
    plan = unit_scale(mlp(), lambda module: module(make(32, 8)).square().mean())
    assert set(plan.roles.values()) == {"hidden", "readout", "bias"}


def test_step_without_loss() -> None:
    with pytest.raises(UnitScalingError, match="gave no loss"):
        unit_scale(mlp(), lambda module: None)


def test_step_that_returns_no_single_number() -> None:
    with pytest.raises(UnitScalingError, match=r"returned a tensor of shape \(\d+, \d+\) where its loss"):
        unit_scale(model := mlp(), lambda module: module(torch.ones(3, 8)))
    assert plan_of(model) is None


def test_nothing_to_scale() -> None:
    with pytest.raises(UnitScalingError, match="nothing in ReLU can be scaled"):
        unit_scale(nn.ReLU(), lambda module: module(torch.ones(2, requires_grad=True)).sum())


def test_all_frozen() -> None:
    with pytest.raises(UnitScalingError, match="frozen"):
        unit_scale(mlp().requires_grad_(False), lambda module: step(module) + torch.zeros((), requires_grad=True))


# ---------------------------------------------------------------------------------------------------------------------
# The model a plan is for
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.append(nn.Linear(4, 4)), r"added: 5\.bias, 5\.weight"),
        (lambda model: model.pop(4), r"missing: 4\.bias, 4\.weight"),
        (
            lambda model: setattr(model[2], "weight", nn.Parameter(torch.ones(8, 16))),
            r"other shape: 2\.weight \[16, 16\] -> \[8, 16\]",
        ),
    ],
)
def test_a_model_that_does_not_match_is_refused(change: Any, message: str) -> None:
    plan = unit_scale(mlp(), step)
    other = mlp()
    plan.check_matches(other)
    change(other)
    with pytest.raises(UnitScalingError, match=message):
        plan.check_matches(other)


def test_a_plan_knows_its_model_but_does_not_keep_it() -> None:
    model = mlp()
    plan = unit_scale(model, step)
    assert {name: id(p) for name, p in plan.named_parameters().items()} == {
        name: id(p) for name, p in model.named_parameters()
    }
    del model
    gc.collect()
    with pytest.raises(UnitScalingError, match="not in force on any model"):
        plan.named_parameters()


def test_a_copied_model_has_a_plan_of_its_own() -> None:
    model = mlp()
    plan = unit_scale(model, step)
    copied = copy.deepcopy(model)
    other = plan_of(copied)
    assert other is not None
    assert other is not plan
    assert other.named_parameters()["0.weight"] is copied[0].weight
    assert plan.named_parameters()["0.weight"] is model[0].weight


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def test_properties() -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    plan = unit_scale(model, step)
    assert plan.roles == {f"{i}.{kind}": role for i, w in ((0, "hidden"), (2, "hidden"), (4, "readout"))
                          for kind, role in (("weight", w), ("bias", "bias"))}  # fmt: skip
    assert plan.skipped == [("2.bias", "frozen")]
    assert plan.is_plain
    assert not plan.explicit_sites
    unit = unit_scale(mlp(), step, storage="unit")
    assert not unit.is_plain
    assert {site.name for site in unit.explicit_sites if site.params} == {"0:linear", "2:linear", "4:linear"}


def test_first_relative_updates_are_those_of_the_plain_model() -> None:
    """lr_units="standard": lr(W) / RMS(W) is what it was for every hidden weight, to a sixteenth of an octave."""
    untouched, model = mlp(), mlp()
    plan = unit_scale(model, step)
    for name in ("0.weight", "2.weight"):
        before = untouched.get_parameter(name).square().mean().sqrt()
        after = model.get_parameter(name).detach().square().mean().sqrt()
        assert plan.lr_multipliers[name] / float(after) == pytest.approx(1 / float(before), rel=0.022)


def test_readout_steps_keep_their_proportion_to_hidden_ones() -> None:
    """lr_units="standard": 4η/fan_in, where a hidden weight's relative step 1/RMS(W) is η/√fan_in; √2 is ReLU's."""
    untouched = mlp()
    etas = [
        layer.in_features**0.5 / float(layer.weight.square().mean().sqrt()) for layer in (untouched[0], untouched[2])
    ]
    plan = unit_scale(mlp(), step)
    own = plan.lr_multipliers["4.weight"] / plan.parameters["4.weight"].step_limit
    assert own == pytest.approx(4 * (etas[0] * etas[1]) ** 0.5 * 2**0.5 / 16, rel=0.022)


def test_readout_without_hidden_weights_keeps_its_own_step() -> None:
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    plan = unit_scale(model, step)
    assert plan.lr_multipliers["4.weight"] == pytest.approx(plan.parameters["4.weight"].step_limit)


@pytest.mark.parametrize("std", [1e-6, 1e-4])
def test_a_weight_drawn_near_zero_beside_usual_ones_starts_there_and_takes_the_user_s_step(std: float) -> None:
    model = mlp()
    nn.init.normal_(model[2].weight, std=std)
    before = model[2].weight.detach().clone()
    plan = unit_scale(model, step)
    lr, stored = plan.lr_multipliers["2.weight"], plan.parameters["2.weight"].stored
    torch.testing.assert_close(model[2].weight.detach(), before * stored)
    limit = plan.parameters["2.weight"].step_limit
    assert lr / limit / plan.parameters["2.weight"].multiplier == pytest.approx(4.0)  # sqrt(fan_in), the rate of zeros
    assert plan.lr_multipliers["0.weight"] / limit == pytest.approx(
        plan.parameters["0.weight"].stored / plan.parameters["0.weight"].initial_rms, rel=0.05
    )


def test_a_model_drawn_near_zero_as_a_whole_has_bounded_steps() -> None:
    model = mlp()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1e-10)
    plan = unit_scale(model, step)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert parameter.detach().square().mean().sqrt() == pytest.approx(plan.parameters[name].stored, rel=1e-5)
            assert plan.lr_multipliers[name] < 1e4
    assert any("is drawn with RMS 1e-10" in note for note in plan.notes)


@pytest.mark.parametrize("width", [32, 64])
def test_rates_in_units_of_umup(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 11))
    ids = torch.arange(11)
    plan = unit_scale(model, lambda m: m(ids).square().mean(), storage="unit", lr_units="umup")
    assert plan.lr_multipliers["0.weight"] == pytest.approx(width**-0.5)
    assert plan.lr_multipliers["1.weight"] == pytest.approx(width**-0.5)
    assert plan.lr_multipliers["3.weight"] == UMuP().eta_target
    scales = plan.step_scales("adam", decoupled_decay=True)
    for scale in scales.values():
        assert scale.lr * scale.weight_decay == pytest.approx(1)
    assert scales["1.weight"].eps == pytest.approx(plan.parameters["1.weight"].multiplier)
    sgd = plan.step_scales("sgd", decoupled_decay=False)
    assert sgd["1.weight"].lr == pytest.approx(width)
    assert sgd["1.weight"].eps == 1.0


@pytest.mark.parametrize("name", ["llama-sdpa", "whisper-sdpa", "lora"])
def test_summary_shows_every_site_and_reason(name: str) -> None:
    _, plan = prepared(zoo.CASES[name])
    text = plan.summary()
    assert text.startswith(f"unit scaling: scheme=umup, storage=folded, lr_units=standard; {count_scaled(plan)} ")
    shown = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert not any(name.endswith("…") for name in shown)
    squeezed = "".join(text.split())
    assert all("".join(site.reason.split())[:20] in squeezed for site in plan.sites)
    assert all(note.split()[0] in text for note in plan.notes)
    count = len(plan.explicit_sites)
    assert f"{count} {'site stays' if count == 1 else 'sites stay'}" in text or plan.is_plain


def count_scaled(plan: Plan) -> int:
    return sum(not parameter.reason for parameter in plan.parameters.values())


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_summary_fits_a_terminal_and_loses_no_name(width: int) -> None:
    _, plan = prepared(zoo.CASES["llama-sdpa"])
    head, *lines = plan.summary(width=width).splitlines()
    assert max(map(len, lines)) <= width and head == plan.summary().splitlines()[0]
    names = "".join(re.split(r" {2,}", line.strip())[0] for line in lines)  # the first cells, which may be broken
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj"):
        assert re.search(rf"model\.layers\.\S+{name}:linear", names)
    squeezed = "".join(plan.summary(width=width).split())
    assert all("".join(site.reason.split()) in squeezed for site in plan.sites)
    assert plan.summary(width=1000) == plan.summary()


def test_summary_of_a_deep_model_is_short() -> None:
    torch.manual_seed(0)
    layers = [module for _ in range(12) for module in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    inputs = torch.randn(2, 16)
    plan = unit_scale(model, lambda m: m(inputs).square().mean())
    lines = plan.summary().splitlines()
    assert len(lines) < 20
    assert any("{2,4,6,8,10,12,14,16,18,20,22}:linear" in line and " 11 " in line for line in lines)
    short = plan.summary(rows=1)
    assert "more rows" in short
    assert len(short) < len(plan.summary())


def test_rows_of_different_rules_have_different_names_and_none_is_cut() -> None:
    torch.manual_seed(0)
    layers = [module for _ in range(5) for module in (nn.Linear(16, 16), nn.ReLU())]
    long = "a_name_" * 30
    model = nn.Sequential(OrderedDict([(long, nn.Sequential(*layers)), ("head", nn.Linear(16, 4))]))
    inputs = torch.randn(2, 16)
    plan = unit_scale(model, lambda m: m(inputs).square().mean())
    names = [line.split()[0] for line in plan.summary().splitlines() if ":" in line][1:]
    assert names == [f"{long}.0:linear", f"{long}.{{2,4,6,8}}:linear", "head:linear", f"{long}.*:relu"]


def test_summary_shows_unused_parameters() -> None:
    model = mlp()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    plan = unit_scale(model, step)
    assert plan.roles["spare"] == "unused"
    assert ("spare", "no torch call of the recorded step used it") in plan.skipped
    assert "spare" in plan.summary()


def test_scale_learning_rates_takes_the_plan() -> None:
    case = zoo.CASES["sequential"]
    model, plan = prepared(case, storage="unit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert "StepScale" in repr(scale_learning_rates(optimizer, plan))
    plain = build(case)
    with pytest.raises(UnitScalingError):
        scale_learning_rates(torch.optim.AdamW(plain.parameters(), lr=1e-3), plan)


def test_a_transposition_by_einsum_above_a_softmax_is_no_attention() -> None:
    class Transposing(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](torch.einsum("bij->bji", self[0](x)).softmax(-1))

    x = torch.randn(2, 8, 8)
    plan = unit_scale(Transposing(nn.Linear(8, 8), nn.Linear(8, 8)), lambda model: model(x).square().mean())
    assert {site.role for site in plan.sites} == {"hidden", "readout", "product"}
