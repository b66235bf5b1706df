"""The plan as a table for people: layers that repeat are one row."""

from __future__ import annotations

import re
from collections import Counter
from io import StringIO

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


def summarize(plan: Plan, rows: int | None = None) -> str:
    """The plan as text, names in full; `rows` limits the number of site rows.

    Sites of layers that repeat are one row, `layers.*.mlp`; where rows of different rules would be called the same, the
    numbers stand there, `layers.{0-2,5}.mlp`.
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
    table = Table(box=SIMPLE_HEAD)
    casts = any(site.format or site.format_reason for site in plan.sites)
    columns = ["site", "count", "role", "multiplier", "kept in", "format", "learning rate ×", "remark"]
    for column in columns if casts else [column for column in columns if column != "format"]:
        number = column in ("count", "multiplier", "learning rate ×")
        table.add_column(
            column, justify="right" if number else "left", max_width=_REMARK if column == "remark" else None
        )
    alike = Counter(name for name, *_ in groups)
    lr = plan.lr_multipliers
    for (name, role, multiplier, kept, format, remark), sites in list(groups.items())[:rows]:
        rates = sorted({lr[key] for site in sites for key in site.params[:1] if key in lr})
        rate = " … ".join(dict.fromkeys(f"{r:.3g}" for r in (rates[:1] + rates[-1:])))
        shown = _called([site.name for site in sites], starred=alike[name] == 1)
        table.add_row(shown, str(len(sites)), role, multiplier, kept, *([format] if casts else []), rate, remark)
    placed = {name for site in plan.sites for key in site.params for name in key.names}
    for reason, names in _by_reason(plan, placed).items():
        table.add_row(
            f"{names[0]}{' …' if len(names) > 1 else ''}",
            str(len(names)),
            "unused",
            "",
            "-",
            *([""] if casts else []),
            "",
            reason,
        )
    text = StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None)
    console.print(headline(plan))
    console.print(table)
    if rows is not None and len(groups) > rows:
        console.print(f"… and {len(groups) - rows} more rows")
    for note in plan.notes:
        console.print(f"note: {note}")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


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
