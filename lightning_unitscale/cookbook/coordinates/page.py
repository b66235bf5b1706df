"""Table and page of `unitscale coord_check`."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no display, no global state
from rich.table import Table

from lightning_unitscale.cookbook.coordinates.slopes import Series, Sizes, failing, slopes
from lightning_unitscale.cookbook.tables import new_table
from lightning_unitscale.monitor.page import image, section, table, write_page

Found = Mapping[Series, Sizes]


def verdicts(found: Found, tolerance: float) -> Table:
    """For each scheme, axis and learning rate: how many modules pass, and the steepest of each kind."""
    shown = new_table("Coordinates", ["scheme", "along", "learning rate"], ["modules that pass", "start", "change", ""])
    shown.caption = (
        f"the steepest slopes, and whose; PASS: no start grows, no change grows or vanishes by ± {tolerance:g}"
    )
    failed = failing(found, tolerance)
    for case in dict.fromkeys(series[:3] for series in found):
        of_module = {series[3]: slopes(sizes) for series, sizes in found.items() if series[:3] == case}
        failures = [series[3] for series in failed if series[:3] == case]
        start = max(of_module, key=lambda name: _height(of_module[name].start))
        change = max(of_module, key=lambda name: abs(_height(of_module[name].change)))
        shown.add_row(
            *(*case, f"{len(of_module) - len(failures)} of {len(of_module)}"),
            *(f"{of_module[start].start:+.2f} {start}", f"{of_module[change].change:+.2f} {change}"),
            "FAIL" if failures else "PASS",
        )
    return shown


def _height(slope: float) -> float:
    return slope if slope == slope else 0.0  # a NaN is no slope


def write_coordinates_page(folder: Path, found: Found, tolerance: float) -> Path:
    """Writes `coord_check.html` and a PNG file for each axis and learning rate, and returns the page."""
    parts = []
    for knob, speed in dict.fromkeys((series[1], series[2]) for series in found):
        shown = {series: sizes for series, sizes in found.items() if series[1:3] == (knob, speed)}
        chart = image(folder / f"{knob}_{speed}.png", coordinate_chart(shown), f"Coordinates against {knob}")
        rows = table(["module", *_header(shown)], _rows(shown, tolerance))
        parts.append(section(html.escape(f"Against {knob}, {speed} learning rate"), chart, rows))
    return write_page(folder / "coord_check.html", "Coordinate check", parts)


def _schemes(found: Found) -> list[str]:
    return list(dict.fromkeys(series[0] for series in found))


def _header(found: Found) -> Iterator[str]:
    for scheme in _schemes(found):
        yield from (f"{scheme}: start", "change", "")


def _rows(found: Found, tolerance: float) -> Iterator[list[str]]:
    failed = failing(found, tolerance)
    for module in dict.fromkeys(series[3] for series in found):
        cells = [html.escape(module)]
        for scheme in _schemes(found):
            for series in found:
                if (series[0], series[3]) == (scheme, module):
                    item = slopes(found[series])
                    cells += [f"{item.start:+.2f}", f"{item.change:+.2f}", "fails" if series in failed else ""]
        yield cells


def coordinate_chart(found: Found) -> Figure:
    """A column for each scheme: starts above, changes below, a line for each module."""
    schemes = _schemes(found)
    figure = Figure(figsize=(4 * len(schemes), 6), layout="constrained")
    rows = figure.subplots(2, len(schemes), sharex=True, sharey="row", squeeze=False)
    for (scheme, knob, _, _), sizes in found.items():
        at = sorted(sizes)
        for which, name in enumerate(("mean |x|, start", "mean |change|")):
            axes = rows[which, schemes.index(scheme)]
            axes.plot(at, [sizes[size][which] for size in at], marker=".", linewidth=0.9, alpha=0.7)
            axes.set(xscale="log", yscale="log", xlabel=knob, title=scheme if which == 0 else "")
            axes.set_ylabel(name if scheme == schemes[0] else "")
            axes.grid(alpha=0.3)
    return figure
