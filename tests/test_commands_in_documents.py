"""Every `unitscale …` in a document is a command that there is, with parts and settings that it has.

Nightly, those of the README that take minutes are run as they stand, with overrides that make them short.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook.arguments import for_hydra
from lightning_unitscale.cookbook.config import register, shipped
from lightning_unitscale.cookbook.help import commands

ROOT = Path(__file__).parent.parent
FOLDERS = (".github", "conf", "lightning_unitscale", "recipes", "tests")
DOCUMENTS = [
    "README.md",
    *(str(file.relative_to(ROOT)) for folder in FOLDERS for file in (ROOT / folder).rglob("*.md")),
]
NO_CONFIGURATION = {"explain", "init", "doctor", "completion", "--help"}
INSTALLED_ASIDE = ("hparams_search=optuna", "hydra/launcher=", "hydra.launcher.")


def written(document: str) -> Iterator[str]:
    """The commands of a document: lines of its bash blocks, and what stands in backticks."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from re.findall(r"^unitscale .+$", block, re.MULTILINE)
    yield from (found.replace("\n", " ") for found in re.findall(r"`(unitscale [^`]+)`", text))


COMMANDS = sorted({(document, command) for document in DOCUMENTS for command in written(document)})


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_a_command_in_a_document_composes_as_it_is_written(document: str, command: str) -> None:
    command = command.replace("<task>", "segmentation")
    name, *arguments = shlex.split(command.partition(" #")[0])[1:]
    if name in NO_CONFIGURATION or "<name>" in command:
        return
    assert name in commands()
    if "--config-dir" in arguments:  # options of the reader's own
        return
    overrides = [word for word in for_hydra(name, arguments) if not word.startswith(("-", *INSTALLED_ASIDE))]
    overrides = [override.split("|")[0] for override in overrides]  # seed=1|2|3: one of them
    overrides = [override for override in overrides if not re.fullmatch(r"\w+='?…'?", override)]  # an option of a group
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        if "-m" in arguments:  # every combination; here the first
            overrides = [re.sub(r"^([\w.]+=[^\[,]+),.*", r"\1", override) for override in overrides]
        hydra.compose(name, overrides=overrides)


def test_there_are_commands_to_look_at() -> None:
    assert {document for document, _ in COMMANDS} >= {"README.md", "conf/README.md", "recipes/README.md"}


SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "logger=csv")
SMALL = {  # what is added to a command
    "pretrain": (*SHORT, "schedule.warmup_steps=1"),
    "finetune": (*SHORT, "schedule.warmup_steps=1", "patience=1", "test_before=false", "+trainer.limit_test_batches=1"),
    "distill": (
        *(*SHORT, "schedule.warmup_steps=1", "+trainer.limit_test_batches=1"),
        "teacher.base=['experiment=tiny']",
        "task.sequence_length=32",
    ),
}
RUN = ("pretrain", "finetune", "distill", "inference", "export", "report")
OF_README = [
    command
    for document, command in COMMANDS
    if document == "README.md" and command.split()[1] in RUN and command != "unitscale export"
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which someone has followed the README: runs of a small model, one that talks, and notes at home."""
    folder = tmp_path_factory.mktemp("reader")
    for name, settings in (("first", ()), ("talks", ("experiment=dialogue", "model.width=64", "model.depth=1"))):
        tiny = () if settings else ("experiment=tiny",)
        run_recipe("pretrain", folder, *tiny, *settings, *SMALL["pretrain"], f"hydra.run.dir=outputs/pretrain/{name}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("What I thought of today, and of the days before it.\n" * 200)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", OF_README)
def test_a_command_of_the_readme_runs(command: str, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(begun))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    name, *arguments = shlex.split(command)[1:]
    first, talks = (f"outputs/pretrain/{run}" for run in ("first", "talks"))
    arguments = [
        argument.replace("model.path=…", f"model.path={talks if 'mode=chat' in command else first}")
        for argument in arguments
    ]
    arguments = [
        argument.replace("outputs/pretrain/…", first).replace("[a,b]", f"[{first},{talks}]") for argument in arguments
    ]
    added = () if {"--help"} & set(arguments) else SMALL.get(name, ())
    assert run_recipe(name, begun, *arguments, *added)[1].strip()
