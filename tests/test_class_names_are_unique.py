"""Two classes of one name make a reader ask each time which one is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_unitscale"


def test_no_two_public_classes_share_a_name() -> None:
    files = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(str(file.relative_to(PACKAGE)))
    assert {name: places for name, places in files.items() if len(places) > 1} == {}
