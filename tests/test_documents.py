"""Every folder that a contributor changes says how, and links between documents lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from lightning_unitscale.cookbook.help import help_of
from lightning_unitscale.monitor.scalars import for_progress_bar

ROOT = Path(__file__).parent.parent
ROOMS = [f"lightning_unitscale/{room}" for room in ("engine", "schemes", "ops", "optim", "blocks")]
EXPECTED = {".github/CONTRIBUTING.md", ".github/CHANGELOG.md", *(f"{room}/README.md" for room in ROOMS)}
EXPECTED |= {"README.md", "conf/README.md", "recipes/README.md", "tests/README.md"}
FOUND = {str(file.relative_to(ROOT)) for file in (ROOT / "lightning_unitscale").rglob("*.md")}


def anchors(document: Path) -> set[str]:
    """The headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", sorted(EXPECTED | FOUND))
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    assert path.is_file()
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):  # not looked up: tests need no network
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_what_the_progress_shows_is_explained_where_one_looks() -> None:
    shown = re.findall(r'"(\w+(?:_%|_db))"', inspect.getsource(for_progress_bar))
    assert set(shown) == {"x_near_1_%", "snr_db", "lost_%"}
    explained = (ROOT / "recipes" / "README.md").read_text()
    for name in (*shown, "val/loss@100", "val/loss, of counted pairs of tokens"):
        assert f"| `{name}` |" in explained
        assert name in explained and (not name.endswith(("%", "db")) or name in help_of("pretrain"))
