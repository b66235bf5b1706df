"""The plan as rows of plain values: for pandas, for notebooks."""

from __future__ import annotations

import html
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.plan.summary import headline

_SHOWN = ("name", "kind", "role", "multiplier", "stored", "learning rate ×", "reason")
_MOST_ROWS = 60  # in a notebook


def rows(plan: Plan) -> list[dict[str, Any]]:
    """One row a parameter, then one a site; all have the same columns."""
    rates = plan.lr_multipliers
    parameters = [
        _row(
            name=parameter.name,
            kind="parameter",
            role=parameter.role,
            shape="×".join(map(str, parameter.shape)),
            multiplier=parameter.multiplier,
            stored=parameter.stored,
            initial_rms=parameter.initial_rms,
            learning_rate=rates[parameter.name],
            reason=parameter.reason,
        )
        for parameter in plan.parameters.values()
    ]
    return parameters + [_site_row(site) for site in plan.sites]


def _site_row(site: Site) -> dict[str, Any]:
    return _row(
        name=site.name,
        kind="site",
        role=site.role,
        parameters=", ".join(site.params),
        multiplier=site.multiplier,
        folded=site.folded,
        format=site.format or "",
        reason="; ".join(filter(None, (site.reason, site.format_reason, site.upcast and f"upcast: {site.upcast}"))),
    )


def _row(
    *,
    name: str,
    kind: str,
    role: str,
    multiplier: float,
    reason: str,
    shape: str = "",
    parameters: str = "",
    stored: float | None = None,
    initial_rms: float | None = None,
    learning_rate: float | None = None,
    folded: bool | None = None,
    format: str = "",
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "role": role,
        "shape": shape,
        "parameters": parameters,
        "multiplier": multiplier,
        "stored": stored,
        "initial RMS": initial_rms,
        "learning rate ×": learning_rate,
        "folded": folded,
        "format": format,
        "reason": reason,
    }


def frame(plan: Plan) -> Any:
    """The rows as a `pandas.DataFrame` if pandas is installed, else as they are."""
    if find_spec("pandas") is None:
        return rows(plan)
    return import_module("pandas").DataFrame(rows(plan))


def html_table(plan: Plan) -> str:
    """The first rows as HTML, under the headline."""
    found = rows(plan)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in _SHOWN)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(row[column]))}</td>" for column in _SHOWN) + "</tr>"
        for row in found[:_MOST_ROWS]
    )
    more = f"<p>… and {len(found) - _MOST_ROWS} more rows: plan.to_frame()</p>" if len(found) > _MOST_ROWS else ""
    return f"<p>{html.escape(headline(plan))}</p><table><tr>{head}</tr>{body}</table>{more}"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
