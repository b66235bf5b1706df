"""The configuration in conf/: what a file states is what a run gets, and every recipe has its short run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from support.by_day import by_day
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook import config
from lightning_unitscale.cookbook.arguments import for_hydra
from lightning_unitscale.schemes import SCHEMES, find

CONF = config.shipped("conf")
COMMANDS = [file.stem for file in sorted(CONF.glob("*.yaml")) if file.stem != "common"]


def composed(name: str, *overrides: str) -> DictConfig:
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def leaves(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> value, interpolations as they are written."""
    if isinstance(node, dict) and node:
        return {key: value for name, child in node.items() for key, value in leaves(child, (*path, name)).items()}
    return {path: node}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_file_states_is_what_a_run_gets(name: str) -> None:
    """An experiment is there to change it, so it is left out where the file names one."""
    written: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    experiment = any("experiment" in part for part in written.pop("defaults") if isinstance(part, dict))
    written.pop("hydra", None)
    found: Any = OmegaConf.to_container(composed(name, *(["~experiment"] if experiment else [])))
    values = leaves(found)
    for path, value in leaves(written).items():
        assert values[path] == value, ".".join(path)


def test_an_experiment_changes_what_the_file_states() -> None:
    assert composed("finetune").model.base is not None
    assert composed("finetune", "experiment=digits").patience == 6


@pytest.mark.parametrize("name", ["speech_synthesis", "audio_editing", "image_classification", "detection", "digits"])
def test_an_experiment_can_do_without_unit_scaling(name: str) -> None:
    assert composed("pretrain", f"experiment={name}").unitscale.lr_units == "umup"
    assert not composed("pretrain", f"experiment={name}", "unitscale=none").unitscale


def test_a_model_with_a_decoder_brings_its_head_along() -> None:
    assert composed("pretrain", "experiment=speech_recognition").task.head == "AutoModelForCTC"
    found = composed("pretrain", "experiment=speech_recognition", "model=whisper")
    assert found.task.head == "AutoModelForSpeechSeq2Seq"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_s_file_lists_its_hyperparameters_at_their_defaults(name: str) -> None:
    found = composed("pretrain", f"unitscale={name}").unitscale
    assert found.scheme == name
    assert found.hyperparameters == asdict(find(name))


@pytest.mark.parametrize("name", ["alpha_attn", "alpha_ffn_act", "alpha_res", "alpha_res_attn_ratio", "alpha_out"])
def test_a_hyperparameter_is_an_override_like_any_other(name: str) -> None:
    cfg = composed("pretrain", f"unitscale.hyperparameters.{name}=2")
    assert instantiate(cfg.unitscale).unit_scaling.options.hyperparameters[name] == 2
    part = composed("pretrain", f"+unitscale.overrides={{*.layers.0.*:{{{name}:2}}}}")
    assert instantiate(part.unitscale).unit_scaling.options.overrides == {"*.layers.0.*": {name: 2}}


def test_a_hyperparameter_that_is_not_known_is_refused_by_hydra() -> None:
    with pytest.raises(ConfigCompositionException, match="alpha_atn"):
        composed("pretrain", "unitscale.hyperparameters.alpha_atn=2")


def test_callbacks_are_chosen_left_out_and_added() -> None:
    names = set(composed("finetune").callbacks)
    assert {"best", "early_stopping", "learning_rate", "last", "progress"} <= names
    assert set(composed("finetune", "callbacks=[best,last]").callbacks) == {"best", "last"}
    mine = composed("finetune", "~callbacks.early_stopping", "+callbacks.mine._target_=my_package.Mine").callbacks
    assert set(mine) == names - {"early_stopping"} | {"mine"}


@pytest.mark.parametrize("recipe", by_day(["pretrain", "finetune", "distill"], ["pretrain"]))
def test_debug_is_a_run_of_two_steps_without_logs(recipe: str, tmp_path: Path) -> None:
    smaller = {
        "pretrain": ["model.width=64", "model.depth=1"],
        "finetune": ["model.base=['model.width=64','model.depth=1']"],  # of a base, too, only two steps are trained
        "distill": ["teacher.base=['model.width=64','model.depth=1']"],
    }
    quiet = "trainer.enable_progress_bar=false"
    folder, printed = run_recipe(recipe, tmp_path, "debug=default", quiet, *smaller[recipe])
    for file in folder.glob("*.ckpt"):
        assert torch.load(file, weights_only=True)["global_step"] == 2
    assert "report" in printed
    reports = [json.loads(file.read_text()) for file in folder.rglob("metrics.json")]
    assert reports
    assert {report["steps"] for report in reports} == {2}
    assert not list(folder.rglob("metrics.csv")) and not list(folder.rglob("events*"))


@pytest.mark.parametrize("key", ["model.path", "teacher.path", "ckpt_path"])
def test_a_runs_folder_stands_for_its_last_checkpoint(key: str, tmp_path: Path) -> None:
    """A folder that is no run's, or whose run has saved nothing yet, stays what was typed."""
    run, model = tmp_path / "run", tmp_path / "model"
    (run / ".hydra").mkdir(parents=True)
    model.mkdir()
    assert for_hydra("pretrain", [f"{key}={run}"]) == [f"{key}={run}"]
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert for_hydra("pretrain", [f"{key}={run}"]) == [f"{key}={run}/checkpoints/last.ckpt"]
    assert for_hydra("pretrain", [f"{key}={model}"]) == [f"{key}={model}"]
    assert for_hydra("pretrain", [f"data.path={run}"]) == [f"data.path={run}"]
