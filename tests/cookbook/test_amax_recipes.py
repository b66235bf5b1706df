"""`unitscale=amax` in the recipes: from random weights and from a pretrained folder, to text and plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipe_runs import run_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.pretrained import load_pretrained

TOKENS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
QUICK = [
    *("model.width=32", "model.depth=2", "model.head_width=16", "task.sequence_length=32", "data.batch_size=4"),
    *("trainer.enable_progress_bar=false", "trainer.limit_val_batches=4", "logger=csv", "monitor=none"),
]
STEPS = [
    "trainer.max_steps=30",
    "trainer.val_check_interval=15",
    "schedule.warmup_steps=2",
    "optimizer.lr=1e-2",
]
FINE = [
    *QUICK[3:],
    "+trainer.limit_test_batches=4",
    "data.documents._target_=lightning_unitscale.cookbook.data.python_topics",
]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run_recipe("pretrain", tmp_path_factory.mktemp("pretrain"), *QUICK, *STEPS, "unitscale=amax")


@pytest.fixture(scope="module")
def folder(pretrained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `unitscale export` makes of it."""
    where = tmp_path_factory.mktemp("export")
    run_recipe("export", where, f"model.path={pretrained[0] / 'checkpoints' / 'last.ckpt'}", "output=plain")
    return where / "plain"


def test_pretraining_learns_and_shows_the_plan(pretrained: tuple[Path, str]) -> None:
    _, printed = pretrained
    assert "divided by max|gradient| / √d" in printed
    (loss,) = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("val/loss ")]
    assert loss < 4.5  # log 257 = 5.55 is guessing


def test_its_checkpoint_is_the_exported_folder(pretrained: tuple[Path, str], folder: Path) -> None:
    checkpoint = load_pretrained(str(pretrained[0] / "checkpoints" / "last.ckpt"))
    assert checkpoint.plan is not None
    assert checkpoint.plan.scheme == "amax"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(plain), logits(checkpoint.model), rtol=1e-4, atol=1e-5)


def test_text_comes_out_of_it(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    _, printed = run_recipe(
        "inference",
        tmp_path,
        f"model.path={pretrained[0] / 'checkpoints' / 'last.ckpt'}",
        "prompt=The",
        "generation.max_new_tokens=4",
    )
    assert "The" in printed


def test_finetuning_keeps_the_function_of_a_pretrained_folder(folder: Path, tmp_path: Path) -> None:
    settings = ["trainer.max_steps=2", "trainer.val_check_interval=1", "schedule.warmup_steps=1", "optimizer.lr=1e-12"]
    run, printed = run_recipe("finetune", tmp_path, *FINE, *settings, f"model.path={folder}", "unitscale=amax")
    assert "scheme=amax" in printed
    checkpoint = torch.load(next((run / "checkpoints").glob("last.ckpt")), weights_only=True)
    plan = plan_in(checkpoint)
    assert plan is not None
    assert plan.keeps_function
    assert any(p.from_initial != 1 for p in plan.parameters.values())
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, run / "model"))
    assert torch.allclose(logits(before), logits(after), rtol=1e-4, atol=1e-5)


def test_finetuning_that_would_change_it_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds trained weights"):
        run_recipe(
            "finetune", tmp_path, *FINE, "trainer.max_steps=2", "trainer.val_check_interval=1", f"model.path={folder}",
            "unitscale=amax", "unitscale.hyperparameters.keep_function=false", "test_before=false",
        )  # fmt: skip


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'umup' has no hyperparameter 'keep_function'"):
        run_recipe("pretrain", tmp_path, *QUICK, *STEPS, "+unitscale.hyperparameters.keep_function=true")
