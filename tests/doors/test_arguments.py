"""What is typed after `unitscale <command>`: flags anywhere, values as they stand, a run's own settings kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_unitscale.cookbook.arguments import for_hydra, single_runs
from lightning_unitscale.cookbook.help import SHELLS, completions, help_of, options


def values(arguments: list[str]) -> dict[str, object]:
    """As Hydra reads them."""
    parsed = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
    return {override.key_or_group: override.value() for override in parsed}


def test_flags_may_stand_between_settings() -> None:
    typed = ["experiment=transfer", "-m", "model.width=64,128", "--config-dir", "mine", "~debug"]
    assert for_hydra("pretrain", typed) == [
        "-m",
        "--config-dir",
        "mine",
        "experiment=transfer",
        "model.width=64,128",
        "~debug",
    ]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data.path=~/notes", "/home/me/notes"),
        ("data.path=~", "/home/me"),
        ("data.path=~/my notes (old)", "/home/me/my notes (old)"),
        ("ckpt_path=epoch=3-step=10.ckpt", "epoch=3-step=10.ckpt"),
        ("prompt=C# isn't C", "C# isn't C"),
        ("prompt='a b'", "a b"),
        ("path=a.b", "a.b"),
        ("lr=1e-3", 1e-3),
        ("widths=[1,2]", [1, 2]),
    ],
)
def test_a_value_means_what_stands_there(typed: str, meant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (value,) = values(for_hydra("pretrain", [typed])).values()
    assert getattr(value, "text", value) == meant or value == meant


def record(folder: Path, command: str, *overrides: str) -> Path:
    """A checkpoint with what Hydra notes of its run."""
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(list(overrides), folder / ".hydra" / "overrides.yaml")
    OmegaConf.save({"hydra": {"job": {"config_name": command}}}, folder / ".hydra" / "hydra.yaml")
    return folder / "checkpoints" / "last.ckpt"


def test_a_run_goes_on_with_its_own_settings_and_those_given_anew(tmp_path: Path) -> None:
    began = ["experiment=tiny", "data=text", "data.path=a", "optimizer.lr=2", "ckpt_path=before.ckpt"]
    path = record(tmp_path / "run", "pretrain", *began)
    assert values(for_hydra("pretrain", [f"ckpt_path={path}"])) == {
        "experiment": "tiny",
        "data": "text",
        "data.path": "a",
        "optimizer.lr": 2,
        "ckpt_path": str(path),
    }
    anew = values(for_hydra("pretrain", [f"ckpt_path={path}", "data=topics", "optimizer.lr=3"]))
    assert anew == {"experiment": "tiny", "data": "topics", "optimizer.lr": 3, "ckpt_path": str(path)}
    assert for_hydra("finetune", [f"ckpt_path={path}"]) == [f"ckpt_path={path}"]  # another command's run
    assert for_hydra("pretrain", ["ckpt_path=elsewhere/last.ckpt"]) == ["ckpt_path=elsewhere/last.ckpt"]


def test_the_folder_of_an_export_stands_for_the_model_in_it(tmp_path: Path) -> None:
    record(tmp_path / "run", "export")
    written = tmp_path / "run" / "model"
    written.mkdir()
    (written / "config.json").touch()
    assert for_hydra("inference", [f"model.path={tmp_path / 'run'}"]) == [f"model.path={written}"]
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"  # of a fine-tuning, which has both
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert for_hydra("inference", [f"model.path={tmp_path / 'run'}"]) == [f"model.path={checkpoint}"]


def test_each_value_of_a_multirun_is_in_a_single_run() -> None:
    runs = list(single_runs(["a=1", "b=2,3", "c=range(0,3)", "d=interval(0,1)", "e=[1,2]"]))
    assert runs == [
        ["a=1", "b=2", "c=0", "e=[1,2]"],
        ["a=1", "b=3", "c=0", "e=[1,2]"],
        ["a=1", "b=2", "c=1", "e=[1,2]"],
        ["a=1", "b=2", "c=2", "e=[1,2]"],
    ]


# --- help and the Tab key ---------------------------------------------------------------------------------------------


def test_help_lists_what_the_command_can_run() -> None:
    shown = help_of("pretrain")
    assert "[llama]" in shown and "\n  lr: 0.001" in shown and "unitscale pretrain data=text" in shown
    assert {"baseline", "tiny", "transfer", "dialogue", "detection"} <= set(options("pretrain")["experiment"])
    assert not {"code", "distill_digits"} & set(options("pretrain")["experiment"])
    assert {"topics", "text", "hf"} <= set(options("pretrain")["data"])
    assert "labelled_file" not in options("pretrain")["data"]
    assert {"digits", "topics"} <= set(options("finetune")["data"])
    assert "schema" not in options("pretrain")
    assert options("formats") == options("pretrain")  # whose runs are runs of that recipe


@pytest.mark.parametrize(
    ("line", "among", "never"),
    [
        ("unitscale pre", {"pretrain"}, {"finetune"}),
        ("unitscale pretrain opt", {"optimizer=", "optimizer."}, {"data="}),
        ("unitscale pretrain optimizer.", {"optimizer.lr=", "optimizer.betas="}, set()),
        ("unitscale pretrain model.width=64 data=t", {"data=text", "data=topics"}, {"data=hf"}),
        ("unitscale completion f", {"fish"}, {"bash"}),
        ("unitscale nonsense x", set(), {"x"}),
    ],
)
def test_tab_offers_commands_groups_options_and_settings(line: str, among: set[str], never: set[str]) -> None:
    found = set(completions(line))
    assert among <= found and not never & found


# Each shell: its script with the word `data=t` under the cursor, and what it then offers.
TYPED = {
    "bash": (
        """{script}
compopt() {{ :; }}
COMP_LINE="unitscale pretrain data=t"; COMP_POINT=${{#COMP_LINE}}
_unitscale
printf '%s\\n' "${{COMPREPLY[@]}}\"""",
        ["text", "topics"],  # bash has taken `data=` for a word of its own
    ),
    "zsh": (
        """compdef() {{ :; }}
compadd() {{ print -l -- "${{@[4,-1]}}"; }}
{script}
words=(unitscale pretrain data=t); CURRENT=3
_unitscale""",
        ["data=text", "data=topics"],
    ),
    "fish": ("""{script}\ncomplete -C "unitscale pretrain data=t\"""", ["data=text", "data=topics"]),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_the_words_that_are_offered(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "unitscale").write_text(
        "#!/bin/sh\n[ \"$*\" = 'completion words unitscale pretrain data=t' ] && echo data=text && echo data=topics\n"
    )
    (tmp_path / "unitscale").chmod(0o755)
    script, offered = TYPED[shell]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [shell, "-c", script.format(script=SHELLS[shell])]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.stdout.split() == offered, shown.stderr
