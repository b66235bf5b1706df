"""Every folder that a contributor changes says how, and links between documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = [f"lightning_unitscale/{room}" for room in ("engine", "schemes", "ops", "optim")]
DOCUMENTS = [
    "README.md",
    *(f".github/{name}.md" for name in ("CONTRIBUTING", "CHANGELOG")),
    *(f"{folder}/README.md" for folder in (*ROOMS, "recipes", "conf", "tests")),
]


def anchors(document: Path) -> set[str]:
    """The headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
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
