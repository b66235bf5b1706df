"""The options are the same at every door: names, order, defaults, and what reaches the engine."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.training import build
from support.zoo_batches import next_token_batch

from lightning_unitscale import UnitScaling, unit_scale
from lightning_unitscale.cookbook import config
from lightning_unitscale.options import PLAN_OPTIONS, Options
from lightning_unitscale.strategy import UnitScalingStrategy

DEFAULTS = {option.name: getattr(Options(), option.name) for option in fields(Options)}
WITH_FAMILY = {**DEFAULTS, "optimizer_family": None}  # what a Trainer's doors can be told beside the options
OTHER_VALUES: dict[str, Any] = {
    "scheme": "preserve",
    "format": "bf16",
    "storage": "unit",
    "weights": False,
    "activations": False,
    "gradients": False,
    "lr_units": "umup",
    "skip": ["head*"],
    "overrides": {"head*": {"multiplier": 2.0}},
    "hyperparameters": {"alpha_attn": 2.0},
    "recalibrate": [7],
    "verify": False,
}


def plain(value: Any) -> Any:
    """None, (), [] and {} say the same: nothing is given; a tuple says what a list says."""
    return None if value in ((), [], {}) else list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("door", "before", "options"), [(UnitScaling, [], WITH_FAMILY), (unit_scale, ["module", "step"], DEFAULTS)]
)
def test_signatures(door: Callable[..., Any], before: list[str], options: dict[str, Any]) -> None:
    arguments = inspect.signature(door).parameters
    assert list(arguments) == [*before, *options]
    for name, default in options.items():
        assert plain(arguments[name].default) == plain(default), name


def test_the_callback_documents_every_option_in_order() -> None:
    arguments = inspect.getdoc(UnitScaling).split("Args:")[1].split("Attributes:")[0]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == list(WITH_FAMILY)


def test_the_configuration_schema() -> None:
    node = OmegaConf.to_container(OmegaConf.structured(config.UnitScalingNode))
    options = {name: value for name, value in node.items() if not name.startswith("_")}
    assert list(options) == list(WITH_FAMILY)
    assert {name: plain(value) for name, value in options.items()} == {n: plain(v) for n, v in WITH_FAMILY.items()}
    elsewhere = OmegaConf.load(config.PACKAGE / "hydra_plugin" / "conf" / "callbacks" / "unitscale.yaml").unitscale
    assert elsewhere == OmegaConf.create(node)


def test_the_table_in_the_readme() -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| option \| default \|.*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert table is not None
    said = {
        name: default
        for names, default in re.findall(r"^\| (`.*?) \| (.*?) \|", table[0], re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert set(said) == set(WITH_FAMILY)
    for name, default in said.items():
        if default.endswith("…"):
            assert WITH_FAMILY[name][:4] == tuple(map(int, re.findall(r"\d+", default)))
        else:
            assert plain(ast.literal_eval(default.strip("`"))) == plain(WITH_FAMILY[name]), name


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_option_arrives(name: str) -> None:
    given = {name: OTHER_VALUES[name]}
    options = Options(**given)
    assert options != Options()
    assert UnitScaling(**given).unit_scaling.settings == (options, None)
    assert UnitScalingStrategy(**given).unit_scaling.settings == (options, None)
    checked = {} if name == "verify" else {"verify": False}  # a hidden readout starts far above the untouched one
    plan = unit_scale(build(), lambda model: model.loss(next_token_batch(0)), **given, **checked)
    options = Options(**given, **checked)
    assert plan.options == options.to_dict()


def test_which_options_decide_a_plan() -> None:
    assert set(DEFAULTS) - set(PLAN_OPTIONS) == {"recalibrate", "verify"}
