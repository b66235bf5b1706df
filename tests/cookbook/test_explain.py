"""`unitscale explain`: what the plan in a checkpoint says, and clear errors."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_unitscale import Plan, cli, unit_scale


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(16, 8)
    plan = unit_scale(model, lambda m: m(x).square().mean())
    path = tmp_path_factory.mktemp("run") / "last=1.ckpt"
    torch.save({"state_dict": model.state_dict(), "unit_scaling_plan": plan.to_dict()}, path)
    return path, plan


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process and gives back what it printed, or the message it ended with."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["unitscale", "explain", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            cli.main()
        except SystemExit as error:
            return str(error)
        return capsys.readouterr().out

    return run


def test_a_name_is_explained_as_the_plan_explains_it(
    explain: Callable[..., str], checkpoint: tuple[Path, Plan]
) -> None:
    path, plan = checkpoint
    printed = explain("2.weight", "0.*", f"ckpt_path={path}")
    for name in ("2.weight", "0.weight", "0.bias"):
        assert plan.explain(name) in printed


def test_without_a_name_the_plan_is_shown(explain: Callable[..., str], checkpoint: tuple[Path, Plan]) -> None:
    path, plan = checkpoint
    assert explain(f"ckpt_path={path}").strip() == plan.summary().strip()
    run = path.parent / "a run"
    (run / ".hydra").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").symlink_to(path)
    assert explain(f"ckpt_path={run}").strip() == plan.summary().strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2.weight"], "say which checkpoint"),
        (["2.weight", "ckpt_path=nowhere.ckpt"], "no such file"),
        (["2.wieght", "ckpt_path={path}"], "Did you mean '2.weight'?"),
        (["nothing.*", "ckpt_path={path}"], "nothing is called like nothing.*"),
        (["2.weight", "ckpt_path={path}", "checkpoint=a"], "no setting checkpoint"),
    ],
)
def test_what_is_wrong_is_one_message(
    explain: Callable[..., str], checkpoint: tuple[Path, Plan], arguments: list[str], message: str
) -> None:
    said = explain(*(argument.format(path=checkpoint[0]) for argument in arguments))
    assert said.startswith("error: ")
    assert message in said


def test_an_export_has_no_plan_and_what_it_was_made_from_is_named(explain: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").touch()
    (tmp_path / "run" / ".hydra").mkdir()
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("model: {path: outputs/pretrain/a/checkpoints/last.ckpt}")
    for folder in ("run", "run/model"):
        said = explain(f"ckpt_path={tmp_path / folder}")
        assert "exported weights, which are plain and have no plan" in said
        assert said.endswith("ckpt_path=outputs/pretrain/a/checkpoints/last.ckpt")
    (tmp_path / "run" / "checkpoints").mkdir()  # of a fine-tuning
    assert explain(f"ckpt_path={tmp_path / 'run' / 'model'}").endswith(f"ckpt_path={tmp_path / 'run'}")


def test_a_reader_that_closes_the_pipe_ends_it_without_a_traceback(
    checkpoint: tuple[Path, Plan], tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lightning_unitscale.cli", "explain", f"ckpt_path={checkpoint[0]}"]
    with os.fdopen(write, "w") as pipe:
        ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 128 + 13
