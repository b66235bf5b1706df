"""Every `unitscale …` in a README is a command that there is, with parts and settings that it has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from lightning_unitscale.cookbook.arguments import for_hydra
from lightning_unitscale.cookbook.config import register, shipped
from lightning_unitscale.cookbook.help import commands

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "conf/README.md", "recipes/README.md", "lightning_unitscale/README.md"]
NO_CONFIGURATION = {"explain", "init", "doctor", "completion", "--help"}
INSTALLED_ASIDE = ("hparams_search=optuna", "hydra/launcher=", "hydra.launcher.")


def written(document: str) -> Iterator[str]:
    """The commands of a document: lines of its bash blocks, and what stands in backticks."""
    text = (ROOT / document).read_text(encoding="utf-8")
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
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        if "-m" in arguments:  # every combination; here the first
            overrides = [re.sub(r"^([\w.]+=[^\[,]+),.*", r"\1", override) for override in overrides]
        hydra.compose(name, overrides=overrides)


def test_there_are_commands_to_look_at() -> None:
    assert {document for document, _ in COMMANDS} >= {"README.md", "conf/README.md", "recipes/README.md"}
