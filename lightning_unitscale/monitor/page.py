"""One self-contained HTML page: sections, tables, charts, images that are inlined and lie beside it as files too."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_unitscale.monitor.charts import Curve

ASSETS = Path(__file__).parent / "assets"

PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
<h1>{title}</h1>
{sections}
<script>
{script}</script>
</html>
"""


def write_page(file: Path, title: str, sections: Iterable[str]) -> Path:
    """Writes the page, and returns its file.

    Args:
        file: its folder is there.
        title: plain text.
        sections: HTML.
    """
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "chart.js"))
    page = PAGE.format(title=html.escape(title), style=style, script=script, sections="\n".join(sections))
    file.write_text(page, encoding="utf-8")
    return file


def section(heading: str, *content: str) -> str:
    """A heading and HTML below it."""
    return "\n".join((f"<h2>{heading}</h2>", *content))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Cells are HTML; an empty header has no row.

    Args:
        texts: how many of the first columns are of text; numbers stand on the right.
    """

    def line_of(tag: str, cells: Sequence[str]) -> str:
        classes = [' class="text"' if place < texts else "" for place in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{kind}>{cell}" for kind, cell in zip(classes, cells, strict=True))

    head = line_of("th", header) if header else ""
    body = "".join(line_of("td", row) for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def definitions(entries: Mapping[str, str]) -> str:
    """Names with what they mean, as HTML."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries.items()) + "</dl>"


def line(name: str, curve: Curve, *, dashed: bool = False, thin: bool = False) -> dict[str, Any]:
    """A line of a `chart`."""
    points = [[step, value] for step, value in curve if isfinite(value)]
    return {"name": name, "points": points, "dashed": dashed, "thin": thin}


def chart(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines that are drawn where the page is read, and can be hovered and zoomed."""
    return f'<div class="chart" data-chart="{html.escape(json.dumps(lines))}"></div>'


def image(file: Path, figure: Figure, description: str) -> str:
    """The figure, saved in a PNG file and inlined; `description` is read where it is not seen."""
    figure.savefig(file, dpi=110)
    return inline_image(file, html.escape(description))


def inline_image(file: Path, description: str) -> str:
    """A PNG file, inlined."""
    return f'<img src="data:image/png;base64,{in_base64(file)}" alt="{description}">'


def in_base64(file: Path) -> str:
    """The file's bytes, as pages inline them."""
    return base64.b64encode(file.read_bytes()).decode()
