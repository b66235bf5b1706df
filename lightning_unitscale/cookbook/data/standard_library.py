"""Data that every Python has: the sources of its standard library, as documents and as labelled examples."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_unitscale.cookbook.data.examples import Labelled, Pair
from lightning_unitscale.errors import InputError

_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_NOT_OURS = ("test", "idlelib", "lib2to3", "site-packages")
_SENTENCE = re.compile(r"[A-Z][a-z'-]* [\w'-]+ [\w'-]")
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


def source_snippets(snippet_bytes: int, max_bytes: int = 3_000_000) -> list[Labelled]:
    """Beginnings of functions, comments and docstrings of the standard library, each labelled with what it is.

    Quotes, comment signs and line breaks are taken away, so that only the words tell.

    Args:
        snippet_bytes: length of a snippet; those of less than a third of it are left out.
        max_bytes: see `python_sources`.

    Returns:
        Examples of the classes code, comment and docstring, whose `group` is their file. A text that several files have
        is left out, so a split by group leaks nothing.
    """
    files_of: dict[str, set[str]] = {}
    found = []
    for file, source in python_sources(max_bytes=max_bytes).items():
        for label, text in _parts_of(source.decode(errors="replace")):
            snippet = " ".join(text.split()).encode()[:snippet_bytes].decode(errors="ignore")
            if len(snippet) >= snippet_bytes // 3:
                files_of.setdefault(snippet, set()).add(file)
                found.append(Labelled(snippet, label, group=file))
    return [example for example in found if len(files_of[example.text]) == 1]


def _parts_of(source: str) -> Iterator[tuple[str, str]]:
    """Class -> text: every docstring, every function without docstrings, every block of lines that are comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                yield "docstring", docstring
                node.body = node.body[1:] or [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield "code", ast.unparse(node)
    for block in _COMMENTS.findall(source):
        yield "comment", re.sub(r"^\s*#[#!: ]*", "", block, flags=re.MULTILINE)


def docstrings(max_bytes: int = 100_000_000) -> list[Pair]:
    """What a docstring of the standard library says after its first line, and that line; those of a file stay together.

    In front of the text stands the name of what it describes: "open_binary: If the resource does not …". A text that
    several files have is left out, so a split by file leaks nothing; so are first lines that are no sentence of at
    least three words, such as examples and signatures.

    Args:
        max_bytes: see `python_sources`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = sorted(file.parent.name for file in root.glob("[a-z]*/__init__.py") if file.parent.name not in _NOT_OURS)
    sources = {**python_sources(max_bytes=max_bytes), **python_sources(packages, max_bytes=max_bytes)}
    found: dict[str, list[Pair]] = {}
    for file, source in sources.items():
        try:
            nodes = list(ast.walk(ast.parse(source.decode(errors="replace"))))
        except (SyntaxError, ValueError):
            continue  # of lib2to3's tests, and for other versions
        for node in nodes:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                head, _, body = (ast.get_docstring(node) or "").partition("\n")
                text = " ".join(body.split())
                if text and _SENTENCE.match(head):
                    name = getattr(node, "name", Path(file).stem)
                    found.setdefault(text, []).append(Pair(f"{name}: {text}", head.strip(), group=file))
    return [pairs[0] for pairs in found.values() if len({pair.group for pair in pairs}) == 1]


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
