"""Fine-tuning that was stopped goes on, and so does a model that this package trained, in its own parametrization."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import PeftModel
from support.by_day import by_day
from support.finetuning import TEXT, logits, words
from support.recipe_runs import run_recipe
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.model_path import load_pretrained

# --- stopping and going on --------------------------------------------------------------------------------------------

# Two validations in each half, the best of them in the first; dropout, so that random numbers have to go on too.
HALF = 4
GOING_ON = [f"schedule.decay_steps={2 * HALF}", "patience=9", "optimizer.lr=1", "monitor=none", "test_before=false"]
KINDS = {
    "full": [],
    "frozen": ["model.freeze=[model.layers.0]", "+model.changes.attention_dropout=0.1"],
    "lora": ["lora=all_linear", "lora.r=2", "lora.lora_dropout=0.1"],
}
GO_ON = """
import json, sys
from pathlib import Path
from support.recipe_runs import run_recipe
for folder, arguments in json.loads(sys.argv[1]):
    run_recipe("finetune", Path(folder), *arguments)
"""


@pytest.fixture(scope="module")
def halves(llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Kind -> checkpoints folders of one run of 2n steps, and of n steps and, in a new process, n more."""
    folders, going_on = {}, []
    for kind, settings in KINDS.items():
        common = [*TEXT, *settings, *GOING_ON]
        parts = [tmp_path_factory.mktemp(f"{kind}-{part}") for part in ("whole", "first", "second")]
        start = [f"model.path={llama}"]
        run_recipe("finetune", parts[0], *common, *start, f"trainer.max_steps={2 * HALF}")
        run_recipe("finetune", parts[1], *common, *start, f"trainer.max_steps={HALF}")
        checkpoint = parts[1] / "run" / "checkpoints" / "last.ckpt"
        going_on.append((str(parts[2]), [*common, f"trainer.max_steps={2 * HALF}", f"ckpt_path={checkpoint}"]))
        folders[kind] = (parts[0] / "run", parts[2] / "run")
    process = subprocess.run(
        [sys.executable, "-c", GO_ON, json.dumps(going_on)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert process.returncode == 0, process.stderr
    return folders


def assert_equal(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{number}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("kind", by_day(KINDS, ["full"]))
def test_two_halves_equal_the_whole_bit_for_bit(kind: str, halves: dict[str, tuple[Path, Path]]) -> None:
    whole, second = halves[kind]
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, second)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "unit_scaling_plan", "global_step"):
        assert_equal(ends[0][key], ends[1][key], key)
    for name in ("EarlyStopping", "RandomNumbers"):
        states = [{key: value for key, value in end["callbacks"].items() if name in key} for end in ends]
        assert len(states[0]) == 1
        assert_equal(*states, name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_counts_on(kind: str, halves: dict[str, tuple[Path, Path]]) -> None:
    metrics = [json.loads((run / "report" / "metrics.json").read_text()) for run in halves[kind]]
    for name in ("best val/loss", "test/loss", "steps", "parameters trained"):
        assert metrics[0][name] == metrics[1][name], name
    plain = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in halves[kind]]
    assert_equal(dict(plain[0]), dict(plain[1]), "model")


def test_an_adapter_of_two_halves_names_the_base(halves: dict[str, tuple[Path, Path]], llama: str) -> None:
    _, second = halves["lora"]
    base = json.loads((second / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == llama
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), second / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(second / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)


class Press(pl.Callback):
    """Ctrl-C in the step with this number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [3, 4], ids=["between validations", "at a validation"])
def test_interrupt_loses_nothing_and_leaves_a_report(
    step: int, halves: dict[str, tuple[Path, Path]], llama: str, tmp_path: Path
) -> None:
    common = [*TEXT, *KINDS["lora"], *GOING_ON]
    common += [f"trainer.max_steps={2 * HALF}"]
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as raised:
        make = pl.Trainer.__init__
        patch.setattr(
            pl.Trainer,
            "__init__",
            lambda self, *, callbacks, **others: make(self, callbacks=[*callbacks, Press(step)], **others),
        )
        run_recipe("finetune", tmp_path / "a", *common, f"model.path={llama}")
    assert raised.value.code == 130
    metrics = json.loads((tmp_path / "a" / "run" / "report" / "metrics.json").read_text())
    assert metrics["steps"] == step
    assert "best val/loss" in metrics
    assert (tmp_path / "a" / "run" / "report" / "index.html").is_file()
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "last.ckpt"
    run, _ = run_recipe("finetune", tmp_path / "b", *common, f"ckpt_path={checkpoint}")
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (halves["lora"][0], run)]
    for key in ("state_dict", "optimizer_states"):
        assert_equal(ends[0][key], ends[1][key], key)


def test_what_does_not_go_on(
    halves: dict[str, tuple[Path, Path]], continued: tuple[Path, str], llama: str, tmp_path: Path
) -> None:
    checkpoint = halves["lora"][0] / "checkpoints" / "last.ckpt"
    for settings, message in (
        ([f"ckpt_path={continued[0] / 'base.ckpt'}"], "not of a run of unitscale finetune"),
        ([f"ckpt_path={checkpoint}", "lora=all_linear", "lora.r=4"], "its run began with lora="),
        ([f"ckpt_path={checkpoint}", "model.freeze=[model.layers.0]"], "its run began with model.freeze=nothing"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_recipe("finetune", tmp_path, *TEXT, *settings)
    moved = torch.load(checkpoint, weights_only=True)
    (state,) = (state for key, state in moved["callbacks"].items() if "BestCheckpoint" in key)
    state["best_model_path"] = str(tmp_path / "moved.ckpt")
    torch.save(moved, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit, match=r"the best checkpoint of this run so far, .*moved\.ckpt, is not there"):
        run_recipe("finetune", tmp_path, *TEXT, f"ckpt_path={tmp_path / 'last.ckpt'}", "trainer.max_steps=9")


# --- a model of this package goes on ----------------------------------------------------------------------------------


def test_umup_checkpoint_goes_on_in_its_own_parametrization(continued: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = continued
    assert "own parametrization goes on: umup" in printed
    files = (folder / "base.ckpt", folder / "checkpoints" / "best.ckpt")
    plans = [plan_in(torch.load(file, weights_only=True)) for file in files]
    before, after = (plan for plan in plans if plan is not None)
    assert before.scheme == after.scheme == "umup"
    assert before.parameters["model.lm_head.weight"].eta_limit != after.parameters["model.lm_head.weight"].eta_limit
    for plan in (before, after):  # the largest useful rate is that of each run's own optimizer
        for parameter in plan.parameters.values():
            parameter.set_constant("eta_limit", [])
    assert before.lr_multipliers == pytest.approx(after.lr_multipliers)
    assert len(set(before.lr_multipliers.values())) > 1


def test_the_plan_can_be_left_behind(continued: tuple[Path, str], tmp_path: Path) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *TEXT, f"model.path={base}", "model.keep_plan=false")
    assert "goes on" not in printed
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    assert plan.scheme == "preserve"


def test_another_scheme_of_the_command_line_takes_the_place_of_the_plan(
    continued: tuple[Path, str], tmp_path: Path
) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *TEXT, f"model.path={base}", "unitscale=amax")
    assert "goes on" not in printed
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    assert plan.scheme == "amax"
    first, second = (
        json.loads((run / "report" / "metrics.json").read_text())["test/loss, before"] for run in (continued[0], folder)
    )
    assert second == pytest.approx(first, rel=1e-5)  # the function is kept
    last = folder / "checkpoints" / "last.ckpt"
    (tmp_path / "again").mkdir()
    _, printed = run_recipe("finetune", tmp_path / "again", *TEXT, f"ckpt_path={last}", "unitscale=amax")
    assert "goes on: amax" in printed


def test_multipliers_of_a_umup_checkpoint_are_at_work(continued: tuple[Path, str], tmp_path: Path) -> None:
    """Adam's first step moves every element by its group's learning rate, whatever the gradient."""
    base = continued[0] / "base.ckpt"
    once = ["trainer.max_steps=1", "trainer.val_check_interval=1", "optimizer.weight_decay=0", "optimizer.eps=1e-30"]
    folder, _ = run_recipe("finetune", tmp_path, *TEXT, *once, f"model.path={base}", "test_before=false")
    start, end = (torch.load(f, weights_only=True) for f in (base, folder / "checkpoints" / "last.ckpt"))
    plan = plan_in(end)
    assert plan is not None
    for name, multiplier in plan.lr_multipliers.items():
        step = (end["state_dict"][name] - start["state_dict"][name]).abs()
        assert float(step[step > 0].median()) == pytest.approx(1e-2 * multiplier, rel=1e-2), name


def test_a_umup_checkpoint_takes_a_new_head(continued: tuple[Path, str], tmp_path: Path) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *words(tmp_path), f"model.path={base}")
    assert "new, with random weights: score.weight" in printed
    assert "unit scaling: scheme=preserve" in printed
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert torch.equal(logits(plain), logits(load_pretrained(str(folder / "checkpoints" / "best.ckpt")).model))
