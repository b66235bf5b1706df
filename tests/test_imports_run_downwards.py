"""The rooms of the package from the ground up: no file imports from a room above its own, nor two files each other.

What a function imports when it is called counts as an import from its room, and so does what types need.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_unitscale"
ROOT = Path(__file__).parent.parent

# From the ground up. Rooms of one floor may use each other. A file is in the room with the longest name that its own
# begins with: `engine` is its empty `__init__` alone, and PACKAGE its `__init__`, the list of what users import.
FLOORS = [
    ("engine", "on_import"),
    ("errors", "near_names", "warn_user", "formats", "block_formats", "options", "namespaces"),
    ("hydra_plugin", "ops"),
    ("blocks",),
    ("engine.record",),
    ("engine.analysis",),
    ("engine.plan",),
    ("engine.runtime",),
    ("engine.checks",),
    ("optim",),
    ("schemes",),
    ("record_step", "in_force"),
    ("prepare",),
    ("loss_scale",),
    ("averages", "checkpoint", "loading", "sharded_checkpoint", "whole_checkpoints"),
    ("wrapped_methods", "before_wrapping"),
    ("run_optimizers", "same_options"),
    ("lifecycle",),
    ("strategy",),
    ("callback", "spawned", "plain_torch", "non_finite_steps"),
    ("attachments",),
    ("autoload",),
    ("monitor",),
    (PACKAGE,),
    ("export",),
    ("cookbook",),
    ("cli",),
    ("recipes",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(file: Path) -> str:
    """`engine.plan.fold`; `ops` for its `__init__`; `recipes.pretrain`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__").removeprefix(f"{PACKAGE}.")


FILES = {module_name(file): file for folder in (PACKAGE, "recipes") for file in sorted((ROOT / folder).rglob("*.py"))}


def longest_of(known: Container[str], name: str) -> str | None:
    """Of `a.b.c`, `a.b` and `a`, the first that is known."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def room_of(module: str) -> str:
    room = longest_of(FLOOR_OF, module)
    assert room, f"{module} is in no room of FLOORS"
    return room


def import_statements(node: ast.AST, in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif in_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from import_statements(child, in_functions)


def imported(file: Path, in_functions: bool) -> Iterator[str]:
    """The modules of the package and the recipes that a file imports."""
    for node in import_statements(ast.parse(file.read_text(encoding="utf-8")), in_functions):
        targets = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write the whole name in place of a relative import"
            targets = [f"{node.module}.{target}" for target in targets]
        for target in targets:
            if target.split(".")[0] == PACKAGE:
                yield longest_of(FILES, target.removeprefix(f"{PACKAGE}.")) or PACKAGE
            elif recipe := longest_of(FILES, f"recipes.{target}"):  # recipes have their own folder on the path
                yield recipe


def test_every_file_is_in_a_room_and_every_room_has_a_file() -> None:
    assert {room_of(module) for module in FILES} == set(FLOOR_OF)


def test_no_import_runs_upwards() -> None:
    upwards = [
        f"{module} imports {target}"
        for module, file in FILES.items()
        for target in sorted(set(imported(file, in_functions=True)))
        if FLOOR_OF[room_of(target)] > FLOOR_OF[room_of(module)]
    ]
    assert not upwards


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: set(imported(file, in_functions=False)) - {module} for module, file in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))
