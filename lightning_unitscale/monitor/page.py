"""One self-contained HTML page: sections, tables, and images that are inlined and lie beside it as PNG files too."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
  img {{ max-width: 100% }} pre {{ overflow-x: auto; background: #f5f5f5; padding: 1rem; font-size: 13px }}
  td, th {{ padding-right: 1.5rem; text-align: right; font-variant-numeric: tabular-nums; font-weight: normal }}
  td:first-child, th:first-child {{ text-align: left }} th {{ border-bottom: 1px solid #999 }}
</style>
<h1>{title}</h1>
{sections}
</html>
"""


def write_page(file: Path, title: str, sections: Iterable[str]) -> Path:
    """Writes the page, and returns its file.

    Args:
        file: its folder is there.
        title: plain text.
        sections: HTML.
    """
    file.write_text(PAGE.format(title=html.escape(title), sections="\n".join(sections)), encoding="utf-8")
    return file


def section(heading: str, *content: str) -> str:
    """A heading and HTML below it."""
    return "\n".join((f"<h2>{heading}</h2>", *content))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; an empty header has no row."""
    head = "<tr>" + "".join(f"<th>{cell}" for cell in header) if header else ""
    return "<table>" + head + "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows) + "</table>"


def image(file: Path, figure: Figure, description: str) -> str:
    """The figure, saved in a PNG file and inlined; `description` is read where it is not seen."""
    figure.savefig(file, dpi=110)
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'
