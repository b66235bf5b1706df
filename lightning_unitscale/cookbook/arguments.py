"""What a user types becomes what Hydra reads.

pretrain experiment=transfer -m model.width=64,128    flags may stand anywhere
data.path=~/notes, ckpt_path=a=b.ckpt, prompt=C#      a value that Hydra's grammar refuses is taken as it stands
ckpt_path=outputs/…/last.ckpt                         the other settings are those that its run began with
ckpt_path=outputs/run, model.path=outputs/run         a run's folder stands for its last checkpoint
model.path=outputs/export/run                         and that of an export for the model in it
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lightning_unitscale.near_names import may_be_hub_name, not_found, typed_path

HUB = ("model.path", "teacher.path")  # settings whose value is a path, or a name on the Hugging Face hub
PATHS = (*HUB, "ckpt_path", "data.path", "rows", "prompt_file")
EXPORTED = "model"  # in the folder of a run: what `unitscale export` and `finetune` write for transformers
MULTIRUN = ("-m", "--multirun")
_COMPOUND = re.compile(r"[\[({'\"$]")  # a value that begins so means something to Hydra, right or wrong


def for_hydra(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments in Hydra's order and grammar, with those of the run that is continued.

    Args:
        command: of `unitscale`.
        arguments: what was typed after it.
    """
    overrides = [readable(with_last_checkpoint(argument)) for argument in arguments if _is_override(argument)]
    flags = [argument for argument in arguments if not _is_override(argument)]
    return [*flags, *began_with(command, overrides), *overrides]


def with_last_checkpoint(argument: str) -> str:
    """The argument; where it names a run's folder as a model, or as what goes on, with its last checkpoint.

    Of an export, which has none, with the model that it wrote.
    """
    key, _, value = argument.partition("=")
    if key not in (*HUB, "ckpt_path") or not value:
        return argument
    folder = typed_path(value)
    last = folder / "checkpoints" / "last.ckpt"
    if not (folder / ".hydra").is_dir():
        return argument
    if last.exists():
        return f"{key}={last}"
    written = folder / EXPORTED
    return f"{key}={written}" if key in HUB and (written / "config.json").is_file() else argument


def wrong_path(arguments: Sequence[str]) -> str:
    """What to say of the first path among the arguments at which nothing is; empty where there is none.

    Patterns, several values of a multirun, and what may be a name on the Hugging Face hub are left to their readers.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") not in PATHS or value in ("", "null") or _COMPOUND.match(value) or glob.has_magic(value):
            continue
        several = "," in value and not {*MULTIRUN}.isdisjoint(arguments)
        exists = typed_path(value).exists()
        if not several and not exists and not (key in HUB and may_be_hub_name(value)):
            return f"{key}={value}: {not_found(value)}"
    return ""


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def readable(override: str) -> str:
    """`key=value` with the home folder in place of `~`, and quoted where Hydra could not read it."""
    key, equals, value = override.partition("=")
    if not equals or key.startswith("~"):
        return override
    if value == "~" or value.startswith("~/"):
        value = str(Path(value).expanduser())
    whole = f"{key}={value}"
    if _COMPOUND.match(value) or _parsed([whole]) is not None:
        return whole
    value = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{value}'"


def _parsed(overrides: Sequence[str]) -> list[Override] | None:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return None


def began_with(command: str, overrides: Sequence[str]) -> list[str]:
    """What the run of `ckpt_path` was started with, but for what is given anew and where it wrote.

    A group that is chosen anew (`data=text`) takes the recorded settings of that group with it. Nothing where the
    checkpoint has no record, or is of another command, which says so itself.
    """
    given = list(keys_of(overrides))
    path = next((value for key, value in given if key == "ckpt_path"), None)
    if not isinstance(path, str) or not path:
        return []
    record = Path(path).expanduser().resolve().parent.parent / ".hydra"
    if not (record / "overrides.yaml").is_file() or not (record / "hydra.yaml").is_file():
        return []
    if OmegaConf.select(OmegaConf.load(record / "hydra.yaml"), "hydra.job.config_name") != command:
        return []
    recorded = [str(override) for override in OmegaConf.load(record / "overrides.yaml")]
    anew = {key for key, _ in given} | {"ckpt_path"}
    kept = [
        override
        for override, (key, _) in zip(recorded, keys_of(recorded), strict=True)
        if key not in anew and not any(key.startswith(f"{other}.") for other in anew)
    ]
    if kept:
        print(f"continuing with the settings of {record.parent}: {' '.join(kept)}")
    return kept


def single_runs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Overrides of single runs among which each value of a multirun stands at least once; not every combination.

    Ranges without steps, which only a sweeper can draw from, are left out.
    """
    choices = []
    for text, override in zip(overrides, _parsed(overrides) or (), strict=False):
        if not override.is_sweep_override():
            choices.append([text])
        elif override.is_discrete_sweep():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
    first = [values[0] for values in choices]
    yield first
    for place, values in enumerate(choices):
        yield from ([*first[:place], value, *first[place + 1 :]] for value in values[1:])


def keys_of(overrides: Sequence[str]) -> Iterator[tuple[str, object]]:
    """What each override sets, a setting or a group, and to what."""
    for override in _parsed(overrides) or []:
        yield override.key_or_group, override.value()
