"""The tree in engine/README.md is the tree as it is: `python tests/test_package_tree.py` writes it anew.

Phrases are kept; what is new gets the first sentence of its own docstring, to be shortened by hand.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "lightning_unitscale" / "engine" / "README.md"
BLOCK = re.compile(r"(?<=```text\n)lightning_unitscale/\n.*?(?=```)", re.DOTALL)
COLUMN = 26


def first_sentence(file: Path) -> str:
    """Of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].split(". ")[0].rstrip(".")


def names_in(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")


def phrases_of(tree: str) -> dict[str, str]:
    """What is said of each entry, by its name in the tree."""
    return dict(re.findall(r"^ {0,2}(\S+) +(\S.*)$", tree, re.MULTILINE))


def tree(phrases: dict[str, str]) -> Iterator[str]:
    """The package's own files and rooms with a phrase each, the files of a room by name; then the recipes."""
    package, recipes = ROOT / "lightning_unitscale", ROOT / "recipes"
    yield "lightning_unitscale/"
    for name in names_in(package):
        said = phrases.get(f"{name}.py") or first_sentence(package / f"{name}.py")
        yield f"  {f'{name}.py':{COLUMN}}{said}"
    rooms = sorted({file.parent for file in package.rglob("*.py")} - {package})
    for room in rooms:
        name = f"{room.relative_to(package)}/"
        if names := names_in(room):
            yield f"  {name:{COLUMN}}{phrases.get(name) or first_sentence(room / '__init__.py')}"
            yield textwrap.fill(" ".join(names), 116, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for folder in (recipes, *sorted({file.parent for file in recipes.rglob("*.py")} - {recipes})):
        name = f"{folder.relative_to(ROOT)}/"
        yield f"{name:{COLUMN + 2}}{phrases[name]}"
        yield textwrap.fill(" ".join(names_in(folder)), 116, initial_indent=" " * 6, subsequent_indent=" " * 6)


def written(readme: str) -> str:
    return BLOCK.sub(lambda found: "\n".join(tree(phrases_of(found[0]))) + "\n", readme)


def test_the_readme_has_the_tree_as_it_is() -> None:
    readme = README.read_text(encoding="utf-8")
    assert BLOCK.search(readme)
    assert written(readme) == readme, "python tests/test_package_tree.py writes the tree anew"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
