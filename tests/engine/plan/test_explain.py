"""A plan says why: each number is the product of factors with a cause, and the tables agree with it."""

import re
from math import prod, sqrt
from typing import Any

import pytest
import torch
from support import zoo
from support.prepared import prepared
from torch import nn

from lightning_unitscale import Plan, UnitScalingError, unit_scale
from lightning_unitscale.engine.plan.explain import quantities
from lightning_unitscale.engine.plan.rows import rows

NAMES = (
    *("sequential", "llama-sdpa", "gpt2-eager", "t5-eager", "lstm", "resnet", "weight-norm", "experts-loop", "lora"),
    *("whisper-sdpa", "albert-eager"),
)
NAMES = tuple(name for name in NAMES if name in zoo.CASES)


def mlp(**options: Any) -> tuple[nn.Sequential, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    nn.init.normal_(model[2].weight, std=0.02)
    x = torch.randn(32, 16)
    return model, unit_scale(model, lambda m: m(x).square().mean(), **options)


@pytest.mark.parametrize("lr_units", ["standard", "umup"])
@pytest.mark.parametrize("storage", ["folded", "unit"])
@pytest.mark.parametrize("name", NAMES)
def test_the_factors_multiply_to_the_numbers_in_force(name: str, storage: str, lr_units: str) -> None:
    _, plan = prepared(zoo.CASES[name], storage=storage, lr_units=lr_units)
    for parameter in plan.parameters.values():
        found = {quantity.name: quantity for quantity in quantities(plan, parameter.name)}
        for quantity in found.values():
            assert prod(f.value for f in quantity.factors) == pytest.approx(quantity.value, rel=1e-9), quantity
        assert found["multiplier"].value == parameter.multiplier
        assert found["stored ×"].value == parameter.stored
        assert found["learning rate ×"].value == plan.lr_multipliers[parameter.name]
    for site in plan.sites:
        for quantity in quantities(plan, site.name):
            assert prod(f.value for f in quantity.factors) == pytest.approx(quantity.value, rel=1e-9), quantity


@pytest.mark.parametrize("name", NAMES)
def test_every_factor_has_a_cause_and_a_rule_s_factor_a_source(name: str) -> None:
    _, plan = prepared(zoo.CASES[name])
    factors = [factor for site in plan.sites for causes in site.causes.values() for factor in causes]
    assert factors
    assert all(factor.cause and factor.source for factor in factors)


def test_a_multiplier_is_explained_by_rule_and_neighbour() -> None:
    _, plan = mlp()
    text = plan.explain("2.weight")
    assert re.search(r"multiplier +0\.0220971\n", text)  # √2 / 64
    assert "0.01562: fan_in^-1, fan_in = 64 (u-μP, arXiv 2407.17465, table 2)" in text
    assert re.search(r"1\.414: 1 / RMS 0\.7071 .*; of the activation .*relu.*, folded", text)
    assert plan.parameters["2.weight"].multiplier == pytest.approx(sqrt(2) / 64)


def test_the_explanation_of_a_site_names_the_weights_that_took_its_factor() -> None:
    _, plan = mlp()
    activation = next(site for site in plan.sites if site.role == "activation")
    assert "folded into weights (2.weight)" in plan.explain(activation.name)
    _, plan = mlp(storage="unit")
    assert "explicit in the forward pass" in plan.explain(activation.name)


def test_what_is_left_alone_says_why() -> None:
    _, plan = mlp(skip=["0"])
    assert "left alone: skipped by the options" in plan.explain("0.weight")


def test_a_module_is_explained_by_its_parameters_and_sites() -> None:
    _, plan = mlp()
    text = plan.explain("2")
    assert plan.explain("2.weight") in text
    assert plan.explain("2.bias") in text
    assert plan.explain("2:linear") in text
    assert "0.weight" not in text


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    _, plan = mlp()
    with pytest.raises(UnitScalingError, match=r"no parameter, module or site '2\.wieght'. Did you mean '2\.weight'"):
        plan.explain("2.wieght")


def test_causes_travel_with_the_plan() -> None:
    _, plan = mlp()
    assert Plan.from_dict(plan.to_dict()).explain("2.weight") == plan.explain("2.weight")


@pytest.mark.parametrize("name", ["sequential", "llama-sdpa", "gpt2-eager"])
def test_the_summary_agrees_with_the_parameters(name: str) -> None:
    _, plan = prepared(zoo.CASES[name])
    summary = plan.summary()
    for parameter in plan.parameters.values():
        if parameter.role in ("hidden", "readout") and not parameter.reason:
            assert f"{parameter.multiplier:.3g}" in summary


def test_rows_have_one_shape_and_a_data_frame_where_pandas_is() -> None:
    pandas = pytest.importorskip("pandas")
    _, plan = mlp()
    found = rows(plan)
    assert len({tuple(row) for row in found}) == 1
    frame = plan.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == [row["name"] for row in found]


def test_without_pandas_a_frame_is_a_list_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_unitscale.engine.plan.rows.find_spec", lambda name: None)
    _, plan = mlp()
    assert plan.to_frame() == rows(plan)


def test_a_notebook_shows_a_table_and_a_shell_one_line() -> None:
    _, plan = mlp()
    assert "<table>" in plan._repr_html_()
    assert "2.weight" in plan._repr_html_()
    assert repr(plan).startswith("<Plan: unit scaling: scheme=umup")
    assert "\n" not in repr(plan)
