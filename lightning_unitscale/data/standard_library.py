"""Data that every Python has: the sources of its standard library, as documents and as labelled examples."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_unitscale.data.examples import Labelled, Pair
from lightning_unitscale.errors import InputError

_NAME = re.compile(rb"\b[a-z]+(?:_[a-z]+)+\b")


def python_sources(packages: Sequence[str] = (), max_bytes: int = 1_000_000) -> dict[str, bytes]:
    """Source files of the standard library: name -> text.

    Args:
        packages: names of packages ("asyncio"), searched through their folders; default: the modules that are files.
        max_bytes: of all files together; those that come last by name are left out.

    Raises:
        InputError: a package is not part of this Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for package in packages:
        if not (root / package).is_dir():
            raise InputError(f"data.packages: this Python's standard library ({root}) has no package {package}")
    files = [file for package in packages for file in (root / package).rglob("*.py")] or list(root.glob("*.py"))
    documents: dict[str, bytes] = {}
    for file in sorted(files):
        text = file.read_bytes()
        if text.strip() and len(text) <= max_bytes:
            documents[str(file.relative_to(root))] = text
            max_bytes -= len(text)
    return documents


def package_snippets(packages: Sequence[str], snippet_bytes: int, max_bytes: int = 10_000_000) -> list[Labelled]:
    """Snippets of source code, each labelled with the package that its file belongs to.

    Args:
        packages: the labels.
        snippet_bytes: length of a snippet; whole lines, so up to one line less.
        max_bytes: see `python_sources`.

    Returns:
        Examples whose `group` is their file, so that a split by group leaks nothing.
    """
    return [
        Labelled(snippet, label=file.partition("/")[0], group=file)
        for file, text in python_sources(packages, max_bytes).items()
        for snippet in _snippets(text.decode(errors="replace"), snippet_bytes)
    ]


def _snippets(text: str, length: int) -> Iterator[str]:
    snippet = ""
    for line in text.splitlines(keepends=True):
        if snippet and len(snippet) + len(line) > length:
            if len(snippet) > length // 2:
                yield snippet
            snippet = ""
        snippet += line[:length]


def split_names(max_length: int = 24) -> list[Pair]:
    """Names from the standard library's sources, and the same names run together.

    Returns:
        Pairs such as ("readnextline", "read_next_line"): where do the words begin?
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = [file.parent.name for file in root.glob("[a-z]*/__init__.py") if file.parent.name != "test"]
    sources = {**python_sources(max_bytes=100_000_000), **python_sources(packages, max_bytes=100_000_000)}
    found = {name for text in sources.values() for name in _NAME.findall(text) if len(name) <= max_length}
    names = sorted(name.decode() for name in found)
    return [Pair(name.replace("_", ""), name) for name in names]
