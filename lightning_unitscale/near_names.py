"""What someone may have meant who named a thing that is not there: a word, a glob of names, a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SHOWN = 5  # names of a folder, or of a model


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A question that names what is near; empty where nothing is.

    Args:
        word: what was given.
        known: what there is.
        prefix: stands before each of the names in the question.
    """
    near = [f"{prefix}{match}" for match in get_close_matches(word, list(known), n=3)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def suggests_arguments(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, whose error about an argument that it has not names the near one.

    Raises:
        TypeError: as Python does.
    """
    known = [*signature(call).parameters]

    @wraps(call)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for name in kwargs:
            if name not in known:
                hint = did_you_mean(name, known)
                raise TypeError(f"{call.__qualname__}() got an unexpected keyword argument {name!r}.{hint}")
        return call(*args, **kwargs)

    return checked


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a parameter's name, or the name of a module it belongs to, matches a glob."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(prefix, glob) for prefix in prefixes for glob in globs)


def near_glob(glob: str, names: Collection[str]) -> str:
    """A question that names a glob which does match: parts corrected, other parts of the model before it or none.

    Where there is none, some of the names.

    Args:
        glob: what matches nothing.
        names: of parameters and modules.
    """
    parts = dict.fromkeys(part for name in names for part in name.split("."))

    words = {word: part for part in parts for word in part.split("_")}  # gate of gate_proj

    def nearest(part: str) -> str:
        if any(fnmatchcase(name, part) for name in parts):
            return part
        word = part.strip("*")
        near = get_close_matches(word, parts, 1) or [words[found] for found in get_close_matches(word, words, 1)]
        return near[0] if near else part

    corrected = ".".join(nearest(part) for part in glob.split("."))
    for candidate in (corrected, f"*.{corrected}", corrected.removeprefix("*.")):
        if any(matches(name, (candidate,)) for name in names):
            return f"Did you mean {candidate!r}?"
    shown = list(names)[:SHOWN]
    return f"It has {', '.join(shown)}{' …' if len(names) > len(shown) else ''}"


def typed_path(value: str | Path) -> Path:
    """A path as it was typed, with the home folder in place of `~`; of users who are not there, as it stands."""
    return Path(os.path.expanduser(value))  # noqa: PTH111 (Path.expanduser raises for those)


def not_found(path: str | Path) -> str:
    """That there is no such file or folder; with the nearest path that there is, or what lies where it should be."""
    where = typed_path(path)
    if where.exists():
        return "it is a folder, and a file is needed" if where.is_dir() else "it is a file, and a folder is needed"
    message = "no such file or folder" + ("" if where.is_absolute() else f" (looked in {Path.cwd()})")
    there = next(parent for parent in where.absolute().parents if parent.exists())
    missing, *below = where.absolute().relative_to(there).parts
    names = sorted(entry.name for entry in there.iterdir()) if there.is_dir() else []
    shown = where
    for _ in (missing, *below):
        shown = shown.parent
    near = [shown / name for name in get_close_matches(missing, names, 3)]
    near = [path.joinpath(*below) for path in near if path.joinpath(*below).exists()] or near
    if near:
        return f"{message}. Did you mean {' or '.join(map(str, near))}?"
    if there == Path.cwd() or not names:
        return message
    return f"{message}; {shown} has {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"


def may_be_hub_name(path: str) -> bool:
    """Whether what is no path here may be the name of a model on the Hugging Face hub: `name` or `owner/name`."""
    if Path(path).exists() or Path(path).suffix == ".ckpt" or path[0] in "./~":
        return False
    owner, slash, _ = path.rpartition("/")
    return "/" not in owner and not (slash and Path(owner).is_dir())  # else its beginning is here, its end misspelt
