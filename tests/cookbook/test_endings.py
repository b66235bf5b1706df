"""Runs that end before their end: what is said, and what is left of them."""

from __future__ import annotations

import errno
import html
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from support.finetuning import TEXT
from support.recipe_runs import run_recipe

from lightning_unitscale import cli
from lightning_unitscale.cookbook.callbacks import LastCheckpoint, StopWhenDiverged
from lightning_unitscale.cookbook.checks import validate_before_the_end
from lightning_unitscale.cookbook.config import register, shipped
from lightning_unitscale.cookbook.run_report import RunReport, not_learned
from lightning_unitscale.cookbook.runs import DIVERGED
from lightning_unitscale.cookbook.tasks import LanguageModeling
from lightning_unitscale.cookbook.whole_files import WholeFiles

TINY = ["experiment=tiny", "trainer.enable_progress_bar=false", "logger=csv"]


def press_ctrl_c_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """During the forward pass of that step."""
    training_step = LanguageModeling.training_step

    def pressed(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModeling, "training_step", pressed)


def test_a_diverged_run_says_so_at_that_step_and_leaves_its_report(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run_recipe("pretrain", tmp_path, *TINY, "optimizer.lr=1e9", "trainer.max_steps=20")
    assert end.value.code == DIVERGED == 3
    folder = tmp_path / "run"
    page = (folder / "report" / "index.html").read_text()
    diverged = re.search(r"training diverged: the loss of step (\d+) is nan", page)
    assert diverged is not None
    assert "optimizer.lr=0.001" in page  # not a tenth of 1e9
    assert '<pre class="sample">' in page
    assert json.loads((folder / "report" / "metrics.json").read_text())["steps"] == int(diverged[1]) < 20
    assert "train/loss" in (folder / "csv" / "metrics.csv").read_text()


def test_a_run_whose_last_step_diverged_says_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModeling, "validation_step", lambda module, *_: module.log("val/loss", math.nan))
    with pytest.raises(SystemExit) as end:
        run_recipe("pretrain", tmp_path, *TINY, "monitor=none")
    assert end.value.code == DIVERGED
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "training diverged: the held-out loss after step 2 is nan. Try a smaller" in page


def test_of_several_runs_one_that_diverged_is_a_result(tmp_path: Path) -> None:
    several = ["-m", "optimizer.lr=1e9,1e-3", "hydra.sweep.dir=runs"]
    _, printed = run_recipe("pretrain", tmp_path, *TINY, "trainer.max_steps=5", "monitor=none", *several)
    assert re.search(r"0  optimizer\.lr=1000000000\.0 +inf\n  1  optimizer\.lr=0\.001 +\d.*best", printed)


@pytest.mark.slow
def test_fine_tuning_that_diverged_has_its_report_and_that_status(tmp_path: Path) -> None:
    run_recipe("pretrain", tmp_path, *TINY, "monitor=none", "hydra.run.dir=base")
    with pytest.raises(SystemExit) as end:
        run_recipe("finetune", tmp_path, *TEXT, "model.path=base", "optimizer.lr=1e9", "trainer.max_steps=20")
    assert end.value.code == DIVERGED
    assert "training diverged: the loss of step" in (tmp_path / "run" / "report" / "index.html").read_text()


def test_a_run_that_learned_nothing_says_so_and_names_a_rate(tmp_path: Path) -> None:
    settings = [*TINY, "trainer.max_steps=20", "monitor=none"]
    folder, printed = run_recipe("pretrain", tmp_path, *settings, "optimizer.lr=1", "unitscale=none")
    said = re.search(r"finished, but next to nothing was learned: the held-out loss is .*, where the first .*", printed)
    assert said is not None and "and a blind guess has 5.549. " in said[0]  # ln 257
    assert said[0].endswith("Try another learning rate: optimizer.lr=0.001")
    assert html.escape(said[0]) in (folder / "report" / "index.html").read_text()
    _, printed = run_recipe("pretrain", tmp_path, *settings, "optimizer.lr=1e-3", "hydra.run.dir=learned")
    assert "nothing was learned" not in printed


@pytest.mark.parametrize(
    ("metrics", "first", "steps", "said"),
    [
        ({"val/loss": 7.0}, 6.0, 100, "the held-out loss is 7, where the first step's was 6. "),
        ({"val/loss": 5.99}, 6.0, 100, "the held-out loss is 5.99"),
        ({"val/loss": 5.5}, 6.0, 100, ""),
        ({"val/loss": 7.0}, 6.0, 5, ""),  # too short
        ({"val/loss": 7.0}, None, 100, ""),  # a run of an earlier version goes on
        ({"test/loss": 2.0, "test/loss, before": 1.5}, 2.0, 100, "the test loss is 2, where it was 1.5 before. "),
        ({"test/loss": 1.4, "test/loss, before": 1.5}, 1.0, 100, ""),
    ],
)
def test_what_was_learned_is_measured_by_what_was_there(
    metrics: dict[str, float], first: float | None, steps: int, said: str
) -> None:
    watch = StopWhenDiverged(1e-3)
    watch.first_loss = first
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, callbacks=[watch])
    trainer.strategy.connect(pl.LightningModule())
    trainer.strategy.optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])]
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
    found = not_learned(trainer, metrics)
    assert (said in found and "optimizer.lr=0.0001" in found) if said else found == ""


@pytest.mark.parametrize(
    ("rate", "better"), [(100.0, 1e-3), (2e-3, 1e-3), (1e-3, 1e-4), (5e-4, 5e-5), (1e-4, 1e-3), (1e-9, 1e-3)]
)
def test_the_rate_to_try_is_the_usual_one_or_a_tenth(rate: float, better: float) -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    trainer.strategy.optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])]
    assert StopWhenDiverged(rate).rate_to_try(trainer) == pytest.approx(better)


def test_a_run_that_was_killed_has_a_page_with_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunReport, "end", lambda *args, **kwargs: None)  # what a kill does not come to
    folder, _ = run_recipe("pretrain", tmp_path, *TINY, "trainer.max_steps=3", "trainer.val_check_interval=1")
    _, printed = run_recipe("report", tmp_path, f"run={folder}", "hydra.run.dir=page")
    page = (folder / "report" / "index.html").read_text()
    assert str(folder / "report" / "index.html") in printed
    assert "not ended: it was killed, or is still running" in page
    for fact in (
        "unitscale pretrain ",
        "peak learning rate 0.001",
        "tokens in the training data",
        f"torch {torch.__version__}",
    ):
        assert fact in page
    assert re.search(r"The last held-out loss, of step [23]: <b>\d", page)


def test_ctrl_c_is_answered_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGINT)
    callback = LastCheckpoint(tmp_path / "last.ckpt")
    try:
        callback.on_train_start(pl.Trainer(logger=False, enable_checkpointing=False), pl.LightningModule())
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopping after this step, and saving it" in capfd.readouterr().err


def test_an_interrupted_run_leaves_a_report_and_goes_on_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    settings = [*TINY, "trainer.max_steps=4", "optimizer.lr=2e-3"]
    whole, _ = run_recipe("pretrain", tmp_path, *settings, "hydra.run.dir=whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        press_ctrl_c_at(2, patch)
        run_recipe("pretrain", tmp_path, *settings)
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"stopped at step 3; go on with ckpt_path={last}" in page
    _, printed = run_recipe("pretrain", tmp_path, f"ckpt_path={last}", "hydra.run.dir=again")  # and nothing else
    assert "continuing with the settings" in printed and "optimizer.lr=2e-3" in printed
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "again")
    ]
    assert whole.name == "run" and ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_goes_on_with_its_own_model_and_a_changed_size_is_named(tmp_path: Path) -> None:
    run, _ = run_recipe("pretrain", tmp_path, *TINY, "monitor=none")
    again = ["hydra.run.dir=again", f"ckpt_path={run}"]
    for change, message in (
        ("model.width=128", r"model\.width=128, and the run of ckpt_path=.*began with 64\..*leave it out"),
        ("model.config.hidden_size=32", r"model\.config\.hidden_size=32, and the run of ckpt_path=.* began with 64"),
        ("model=gpt2", r"model\.\S+=\S+, and the run of ckpt_path="),
    ):
        with pytest.raises(SystemExit, match=message):
            run_recipe("pretrain", tmp_path, *again, change)
    run_recipe("pretrain", tmp_path, *again, "model.attention=eager", "trainer.max_steps=3")  # no size


@pytest.mark.slow
def test_an_interrupted_teacher_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["model.width=64", "model.depth=1", "trainer.max_steps=4", "task.sequence_length=16", "data.batch_size=2"]
    teacher = [f"teacher.base={base}", "task.sequence_length=16", "trainer.enable_progress_bar=false"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        press_ctrl_c_at(1, patch)
        run_recipe("distill", tmp_path, *teacher)
    kept = tmp_path / "run" / "teacher_unfinished.ckpt"
    assert torch.load(kept, weights_only=True)["global_step"] == 2
    again = [*base, "trainer.enable_progress_bar=false", "task.sample.prompt=A", f"ckpt_path={kept}"]
    run_recipe("pretrain", tmp_path, *again, "hydra.run.dir=teacher")
    assert torch.load(tmp_path / "teacher" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("where", ["hydra.run.dir=/proc/nothing/run", f"hydra.run.dir={__file__}/run"])
def test_a_folder_that_cannot_be_made_is_named(where: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: the folder of the run, .* can't be made .*hydra\.run\.dir="):
        run_recipe("pretrain", tmp_path, where)


# --- a disk that is full ----------------------------------------------------------------------------------------------

LIMITED = """
import resource, signal, sys, torch
from lightning_unitscale.cookbook.whole_files import WholeFiles
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the operating system refuses the rest
WholeFiles().save_checkpoint({"weights": torch.zeros(100_000)}, sys.argv[1])
"""


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, file)
    run = subprocess.run([sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True)
    assert "File too large" in run.stderr
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_lightning_writes_the_recipes_checkpoints_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: WholeFiles, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(WholeFiles, "save_checkpoint", full)
    with pytest.raises(
        SystemExit, match=r"error: .*last\.ckpt could not be written .*No space left on device.*go on with ckpt_path="
    ):
        run_recipe("pretrain", tmp_path, *TINY)


@pytest.mark.parametrize("recipe", ["finetune", "distill"])
def test_one_setting_makes_a_run_short(recipe: str) -> None:
    """`trainer.max_steps=20` alone: its only validation comes at its end."""
    register()
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        cfg = compose(recipe, overrides=["trainer.max_steps=20", "trainer.accumulate_grad_batches=2"])
    validate_before_the_end(cfg)
    assert cfg.trainer.val_check_interval == 40


@pytest.mark.parametrize(
    ("settings", "warm_up"),
    [
        ([], 30),
        (["trainer.max_steps=3000"], 30),
        (["trainer.max_steps=50"], 5),
        (["trainer.max_steps=4"], 1),
        (["trainer.max_steps=50", "schedule.warmup_steps=40"], 40),
        (["debug=limit"], 2),
    ],
)
def test_a_short_training_has_a_short_warm_up_unless_one_is_given(settings: list[str], warm_up: int) -> None:
    register()
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        assert compose("pretrain", overrides=settings).schedule.warmup_steps == warm_up


def test_a_shorter_warm_up_is_said(tmp_path: Path) -> None:
    small = ["model.width=32", "model.head_width=32", "model.depth=1", "data.batch_size=2", "task.sequence_length=32"]
    quick = [*small, "trainer.max_steps=20", "trainer.limit_val_batches=1", "monitor=none", "logger=csv"]
    _, printed = run_recipe("pretrain", tmp_path, *quick)
    assert "schedule.warmup_steps=2, at most a tenth of trainer.max_steps" in printed
    _, printed = run_recipe("pretrain", tmp_path, *quick, "schedule.warmup_steps=5")
    assert "schedule.warmup_steps=" not in printed


def test_the_message_is_not_preceded_by_hydras(tmp_path: Path) -> None:
    command = [sys.executable, "-m", cli.__name__, "pretrain", "model.width=100"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "error: model.width=100" in run.stderr and "Error executing" not in run.stderr, run.stderr
    assert "torchao" not in run.stderr and "Enum subclass" not in run.stderr  # of packages that it makes no use of
