"""What earlier versions left in run folders loads, or one line says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.tasks import LanguageModeling
from lightning_unitscale.cookbook.tokenizers import is_of_bytes

QUIET = ["trainer.enable_progress_bar=false", "logger=csv", "monitor=none", "trainer.limit_val_batches=null"]
TINY = ["experiment=tiny", *QUIET, "data.held_out=0.02"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training's folder as it was when the recipe had a LightningModule of its own."""
    folder, _ = run_recipe("pretrain", tmp_path_factory.mktemp("earlier"), *TINY)
    file = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    settings = checkpoint["hyper_parameters"]
    checkpoint["hyper_parameters"] = {name: settings[name] for name in ("model", "optimizer", "schedule")}
    torch.save(checkpoint, file)
    record: Any = OmegaConf.load(folder / ".hydra" / "config.yaml")
    record.task = {"sequence_length": record.task.sequence_length, "sample": record.task.sample}
    record.data.documents._target_ = "lightning_unitscale.data.python_topics"
    OmegaConf.save(record, folder / ".hydra" / "config.yaml")
    return folder


def test_a_checkpoint_of_pretraining_loads_and_goes_on(run: Path, tmp_path: Path) -> None:
    file = run / "checkpoints" / "last.ckpt"
    found = load_pretrained(str(file))
    assert found.head == "AutoModelForCausalLM"
    assert found.tokenizer is not None
    assert is_of_bytes(found.tokenizer)
    module = LanguageModeling.load_from_checkpoint(file, weights_only=True)
    for name, value in found.model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value), name
    end = ["trainer.max_steps=3", "trainer.val_check_interval=1"]
    folder, _ = run_recipe("pretrain", tmp_path, *TINY, *end, f"ckpt_path={file}")
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_recorded_class_that_is_gone_is_one_line(run: Path, tmp_path: Path) -> None:
    evaluate = ["mode=evaluate", f"model.path={run}/checkpoints/last.ckpt"]
    with pytest.raises(SystemExit) as raised:
        run_recipe("inference", tmp_path, *evaluate)
    message = str(raised.value)
    assert "\n" not in message
    assert "lightning_unitscale.data.python_topics" in message
    assert message.endswith("data=topics")
    _, printed = run_recipe("inference", tmp_path, *evaluate, "data=topics", "data.held_out=0.02")
    assert "bits_per_byte" in printed

    shutil.copytree(run, tmp_path / "fine-tuned")
    record: Any = OmegaConf.load(run / ".hydra" / "config.yaml")
    record.data.documents._target_ = "lightning_unitscale.cookbook.data.python_topics"
    target = "lightning_unitscale.tasks.LanguageModeling"
    record.task = {"_target_": target, "head": "AutoModelForCausalLM", "data": "documents", "sequence_length": 32}
    OmegaConf.save(record, tmp_path / "fine-tuned" / ".hydra" / "config.yaml")
    with pytest.raises(SystemExit, match=r"lightning_unitscale\.tasks\.LanguageModeling.* task=\w+$"):
        run_recipe("inference", tmp_path, "mode=evaluate", f"model.path={tmp_path}/fine-tuned/checkpoints/last.ckpt")


def test_a_recorded_configuration_run_again_is_one_line(run: Path, tmp_path: Path) -> None:
    target = "data.documents._target_=lightning_unitscale.data.python_topics"
    with pytest.raises(SystemExit) as raised:
        run_recipe("pretrain", tmp_path, *TINY, target)
    assert str(raised.value).startswith(f"error: {target} can't be imported.")
    assert str(raised.value).endswith("data=...")
