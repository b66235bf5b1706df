"""The help of a command, and what the Tab key offers: from the files in `conf` and `recipes` alone.

Neither torch nor Lightning is imported for it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lightning_unitscale.cookbook.config import register, shipped

PAGE = """\
{docstring}

Parts, chosen by group=option ({marks} what is taken by default):
{groups}

Settings, changed by key=value (+key=value adds one, ~key takes one away):

{settings}"""
FLAGS = ("-m", "--help", "--cfg", "--config-dir")
SHELLS = {
    "bash": """\
_unitscale() {
    local IFS=$'\\n'
    COMPREPLY=($(unitscale completion words "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    local word="${COMP_LINE:0:COMP_POINT}"; word="${word##* }"
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#${word%%=*}=}"); fi
}
complete -o default -F _unitscale unitscale""",
    "zsh": """\
_unitscale() {
    local -a found
    found=("${(@f)$(unitscale completion words "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    compadd -S '' -- $found
}
compdef _unitscale unitscale""",
    "fish": """\
complete -c unitscale -f -a '(unitscale completion words (commandline -cp) 2>/dev/null)'""",
}


def commands() -> dict[str, str]:
    """Name -> first line of the docstring, for each recipe."""
    return {file.stem: docstring(file).partition("\n")[0] for file in sorted(shipped("recipes").glob("[a-z]*.py"))}


def docstring(file: Path) -> str:
    """Of a module, which is not run."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def help_of(command: str) -> str:
    """What `unitscale <command> --help` prints."""
    text = docstring(shipped("recipes") / f"{command}.py")
    if not (shipped("conf") / f"{command}.yaml").is_file():
        return text
    chosen, found = groups(command), options(command)
    width = max(map(len, found), default=0)
    lines = [
        f"  {group:{width}}  {', '.join(f'[{name}]' if name == chosen[group] else name for name in names)}"
        for group, names in found.items()
    ]
    settings = OmegaConf.to_yaml(composed(command))
    return PAGE.format(docstring=text, marks="[…]:", groups="\n".join(lines), settings=settings.rstrip())


def composed(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The settings of a command."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        return hydra.compose(command, list(overrides))


def groups(command: str) -> dict[str, Any]:
    """Group -> the option that the command takes by default, in the order of its file."""
    found: dict[str, Any] = {}
    for part in _defaults(command):
        if isinstance(part, str) and part not in ("_self_", "common"):
            found |= groups(part)  # a command that makes runs of another one
        elif OmegaConf.is_dict(part):
            found |= {key: value for key, value in part.items() if not str(key).startswith("override ")}
    return found


def options(command: str) -> dict[str, list[str]]:
    """Group -> the options that this command can run.

    An option that is for some commands alone names them in its first lines: `# unitscale finetune, distill: …`.
    """
    conf = shipped("conf")
    return {
        group: [file.stem for file in sorted((conf / group).glob("*.yaml")) if is_for(command, group, file.stem)]
        for group in groups(command)
    }


def is_for(command: str, group: str, option: str) -> bool:
    """Whether this command can run that option; what is none of ours may be for any."""
    file = shipped("conf") / group / f"{option}.yaml"
    for line in file.read_text(encoding="utf-8").splitlines()[:2] if file.is_file() else ():
        if line.startswith("# unitscale "):
            named = line.removeprefix("# unitscale ").partition(":")[0]
            return not {command, *_runs_of(command)}.isdisjoint(re.split(r", | \| ", named))
    return True


def _defaults(command: str) -> list[Any]:
    return list(OmegaConf.select(OmegaConf.load(shipped("conf") / f"{command}.yaml"), "defaults") or [])


def _runs_of(command: str) -> list[str]:
    """The commands that this one makes runs of."""
    return [part for part in _defaults(command) if isinstance(part, str) and part not in ("_self_", "common")]


# ----------------------------------------------------------------------------------------------------------------------
# The Tab key


def completions(line: str) -> Iterator[str]:
    """What can stand in place of the last word of a command line."""
    words = line.split(" ")[1:]
    last = words[-1] if words else ""
    if len(words) < 2:
        yield from (name for name in (*commands(), "completion") if name.startswith(last))
        return
    command = words[0]
    if command == "completion":
        yield from (shell for shell in SHELLS if shell.startswith(last))
    elif (shipped("conf") / f"{command}.yaml").is_file():
        yield from _settings_like(command, last)


def _settings_like(command: str, word: str) -> Iterator[str]:
    key, equals, value = word.partition("=")
    found = options(command)
    if equals:
        yield from (f"{key}={name}" for name in found.get(key, ()) if name.startswith(value))
        return
    yield from (flag for flag in FLAGS if word and flag.startswith(word))
    yield from (f"{group}=" for group in found if group.startswith(word))
    parent, _, _ = word.rpartition(".")
    node: Any = OmegaConf.select(composed(command), parent, throw_on_missing=False) if parent else composed(command)
    if not OmegaConf.is_dict(node):
        return
    for name in node:
        whole = f"{parent}.{name}" if parent else str(name)
        if whole.startswith(word):
            yield f"{whole}." if OmegaConf.is_dict(node._get_node(name)) else f"{whole}="


def completion(arguments: Sequence[str]) -> str:
    """What `unitscale completion bash|zsh|fish` prints; `words` is how the printed functions ask."""
    if arguments and arguments[0] == "words":
        return "\n".join(dict.fromkeys(completions(" ".join(arguments[1:]))))
    if len(arguments) == 1 and arguments[0] in SHELLS:
        return SHELLS[arguments[0]]
    raise SystemExit(
        'error: say which shell: eval "$(unitscale completion bash)" in ~/.bashrc, likewise zsh in ~/.zshrc; '
        "unitscale completion fish > ~/.config/fish/completions/unitscale.fish"
    )
