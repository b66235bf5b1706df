"""The plan as a table for people: layers that repeat are one row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from io import StringIO
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_unitscale.engine.plan.explain import folded_into
from lightning_unitscale.engine.plan.factors import product
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import Site

_NUMBER = re.compile(r"(?<![^.:])\d+(?![^.:])")
_WIDTH = 1000  # as wide as it needs: names are never cut
_REMARK = 60
_LEAST_ROOM = 20  # for names; a terminal that has less wraps the lines itself
_LESS = ("count", "remark")  # what a table that is too wide leaves out
_COLUMNS = {  # whether it holds numbers
    "site": False,
    "count": True,
    "role": False,
    "multiplier": True,
    "kept in": False,
    "format": False,
    "learning rate ×": True,
    "remark": False,
}


def summarize(plan: Plan, rows: int | None = None, width: int | None = None) -> str:
    """The plan as text, names in full; `rows` limits the number of site rows, `width` the columns of text.

    Sites of layers that repeat are one row, `layers.*.mlp`; where rows of different rules would be called the same, the
    numbers stand there, `layers.{0-2,5}.mlp`. A table that is too wide has its names on several lines, and its remarks
    below it.
    """
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in plan.sites:
        total = _multiplier(plan, site)
        kept = "-" if total == 1.0 else "weights" if site.folded else "forward"
        remark = "; ".join(filter(None, (site.reason, site.format_reason, site.upcast and f"upcast: {site.upcast}")))
        key = (
            _NUMBER.sub("*", site.name),
            site.role,
            f"{total:.3g}",
            kept,
            site.format or "-",
            remark,
        )
        groups.setdefault(key, []).append(site)
    alike = Counter(name for name, *_ in groups)
    lr = plan.lr_multipliers
    cells: list[tuple[str, ...]] = []
    for (name, role, multiplier, kept, format, remark), sites in list(groups.items())[:rows]:
        rates = sorted({lr[key] for site in sites for key in site.params[:1] if key in lr})
        rate = " … ".join(dict.fromkeys(f"{r:.3g}" for r in (rates[:1] + rates[-1:])))
        shown = _called([site.name for site in sites], starred=alike[name] == 1)
        cells.append((shown, str(len(sites)), role, multiplier, kept, format, rate, remark))
    placed = {name for site in plan.sites for key in site.params for name in key.names}
    for reason, names in _by_reason(plan, placed).items():
        first = f"{names[0]}{' …' if len(names) > 1 else ''}"
        cells.append((first, str(len(names)), "unused", "", "-", "", "", reason))
    text = StringIO()
    console = Console(file=text, width=width or _WIDTH, color_system=None)
    console.print(headline(plan), soft_wrap=True)
    left_out = () if any(site.format or site.format_reason for site in plan.sites) else ("format",)
    table = _table(cells, left_out)
    if width is None or console.measure(table, options=console.options.update(width=_WIDTH)).maximum <= width:
        console.print(table)
    else:
        without = (*_LESS, *left_out)
        beside = _table([("", *rest) for _, *rest in cells], without)
        room = max(_LEAST_ROOM, width - console.measure(beside).maximum + len("site"))
        narrow = _table([(_on_lines(name, room), *rest) for name, *rest in cells], without)
        Console(file=text, width=_WIDTH, color_system=None).print(narrow)
        for name, *_, remark in cells:
            if remark:
                console.print(f"{name}: {remark}")
    if rows is not None and len(groups) > rows:
        console.print(f"… and {len(groups) - rows} more rows")
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _table(rows: Sequence[Sequence[str]], left_out: Collection[str]) -> Table:
    """Rows of cells in the order of `_COLUMNS`."""
    table = Table(box=SIMPLE_HEAD)
    for column, is_number in _COLUMNS.items():
        if column not in left_out:
            width = _REMARK if column == "remark" else None
            justify: Literal["left", "right"] = "right" if is_number else "left"
            table.add_column(column, justify=justify, max_width=width, no_wrap=column != "remark")
    for row in rows:
        table.add_row(*(cell for column, cell in zip(_COLUMNS, row, strict=True) if column not in left_out))
    return table


def _on_lines(name: str, room: int) -> str:
    """Broken behind dots and before the operation, and within a word that is longer than `room` alone."""
    lines = [""]
    for part in re.findall(r"[^.:]+(?:\.\*)?\.?|:[^.]*", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > room:
            lines.append("  ")
        while len(lines[-1]) + len(part) > room:
            cut = room - len(lines[-1])
            lines[-1] += part[:cut]
            part = part[cut:]
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _called(names: list[str], starred: bool) -> str:
    """One name for sites that differ in their numbers alone: a star for each number that differs, or which they are."""
    texts, *others = zip(*(_NUMBER.split(name) for name in names), strict=True)
    words = [texts[0], *(other[0] for other in others)]
    columns = list(zip(*([int(number) for number in _NUMBER.findall(name)] for name in names), strict=True))
    name: str = words[0]
    for numbers, word in zip(columns, words[1:], strict=True):
        different = sorted(set(numbers))
        name += (str(different[0]) if len(different) == 1 else "*" if starred else f"{{{_ranges(different)}}}") + word
    return name


def _ranges(numbers: list[int]) -> str:
    """`0-2,5`"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _multiplier(plan: Plan, site: Site) -> float:
    """From the weight at RMS 1 to the model's function, with what folds into it; a parameter-free site's own factor."""
    if not site.params:
        return site.multiplier
    return site.multiplier * product(folded_into(plan, site.params[0], site.op))


def _by_reason(plan: Plan, placed: set[str]) -> dict[str, list[str]]:
    """The parameters that no site uses."""
    found: dict[str, list[str]] = {}
    for parameter in plan.parameters.values():
        if parameter.name not in placed:
            found.setdefault(parameter.reason, []).append(parameter.name)
    return found


def counted(number: int, what: str) -> str:
    """A number of things, in the singular where it is one."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def headline(plan: Plan) -> str:
    """The plan in one line."""
    scaled = sum(not parameter.reason for parameter in plan.parameters.values())
    left_alone = len(plan.parameters) - scaled
    explicit = len(plan.explicit_sites)
    where = f"{counted(explicit, 'site')} {'stays' if explicit == 1 else 'stay'} in the forward pass"
    where = where if explicit else "nothing stays in the forward pass"
    formats = Counter(site.format for site in plan.cast_sites)
    casts = "".join(f"; {format} at {counted(count, 'site')}" for format, count in formats.items())
    return (
        f"unit scaling: scheme={plan.scheme}, storage={plan.storage}, lr_units={plan.lr_units}; "
        f"{counted(scaled, 'parameter')} planned, {left_alone} left alone; {where}{casts}"
    )
