"""Print the README's tables: `PYTHONPATH=tests python -m support.tables [casts] [names…]`, of models or of casts.

Models: for each of the zoo, whether it trains under each scheme and storage, what stays explicit when folded, how far
the two storages' losses differ over 40 AdamW steps, and the share of matmul operands and outputs whose RMS lies within
a factor of 2 and of 4 of 1 at initialisation, untouched and under u-μP in unit storage.

Casts: for each of the twelve, the share in percent of the matmul operands' elements other than 0 that a cast to FP8
flushes to zero or saturates: activations and weights in e4m3, gradients in e5m2, of the untouched model and under u-μP
in unit storage, as they are and times a power of two for each operand, measured on another batch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_unitscale import Plan, UnitScalingError, scale_learning_rates, unit_scale
from lightning_unitscale.formats import FORMATS, exponent
from lightning_unitscale.monitor import Snapshot, measure
from support import zoo

STEPS = 40
CASTS = ("plain", "plain × 2^k", "umup", "umup × 2^k")


def prepared(case: zoo.Case, scheme: str, storage: str) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model, batch = case.build(), case.batch(0)
    return model, unit_scale(model, lambda m: case.loss(m, batch), scheme, storage=storage)


def train(case: zoo.Case, scheme: str, storage: str) -> list[float]:
    model, plan = prepared(case, scheme, storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, eps=1e-20, weight_decay=0.1)
    scale_learning_rates(optimizer, plan)
    losses = []
    for step in range(STEPS):
        loss = case.loss(model, case.batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def operands(plan: Plan, when: str) -> Iterator[float]:
    """RMS of every input and weight of every scaled matmul, `when` "rms_before" or "rms_after" the plan."""
    for site in plan.sites:
        after = site.rms_after
        measured = after if when == "rms_after" else site.rms_before
        for name, rms in measured.items():
            if after and rms > 0 and name not in ("output", "bias"):
                yield rms


def share(plan: Plan, when: str, factor: float) -> str:
    found = list(operands(plan, when))
    return f"{100 * sum(1 / factor <= rms <= factor for rms in found) / len(found):.0f}" if found else "-"


def row(case: zoo.Case) -> list[str]:
    dtype = torch.float64 if case.has_float64 else torch.float32
    with zoo.default_dtype(dtype):
        folded, unit = train(case, "umup", "folded"), train(case, "umup", "unit")
        train(case, "preserve", "folded")
        _, plan = prepared(case, "umup", "folded")
        _, unit_plan = prepared(case, "umup", "unit")
    difference = max(abs(a - b) for a, b in zip(folded, unit, strict=True))
    kept = sorted({site.role for site in plan.explicit_sites})
    shares = [share(unit_plan, when, factor) for when in ("rms_before", "rms_after") for factor in (2, 4)]
    return [case.name, "yes", f"{difference:.0e}", ", ".join(kept) or "nothing", *shares]


def lost(snapshot: Snapshot, operands: tuple[str, ...]) -> str:
    """Share in percent of the elements other than 0."""
    measurements = [m for operand in operands for m in snapshot.of(operand)]
    elements = sum(sum(m.exponents.counts) for m in measurements)
    gone = sum(m.cast.flushed * sum(m.exponents.counts) + m.cast.saturated * m.cast.elements for m in measurements)
    return f"{100 * gone / elements:.2f}"


def constants(snapshot: Snapshot) -> dict[tuple[tuple[str, str], str], float]:
    """The powers of two that bring each operand to an RMS of about 1."""
    return {
        ((m.parameter, m.op), m.operand): 2.0
        ** exponent(m.unscaled.rms, m.unscaled.largest, FORMATS[snapshot.format].numbers(m.operand))
        for m in snapshot.measurements
    }


def cast_row(case: zoo.Case) -> list[str]:
    torch.manual_seed(0)
    plain = case.build()
    scaled, _ = prepared(case, "umup", "unit")
    shares: dict[str, list[str]] = {"forward": [], "backward": []}
    for model in (plain, scaled):
        as_it_is = measure(model, lambda m: case.loss(m, case.batch(0)))
        another = measure(model, lambda m: case.loss(m, case.batch(1)))
        times_constants = measure(model, lambda m: case.loss(m, case.batch(0)), scales=constants(another))
        for snapshot in (as_it_is, times_constants):
            shares["forward"].append(lost(snapshot, ("x", "weight")))
            shares["backward"].append(lost(snapshot, ("gradient",)))
    return [case.name, *shares["forward"], *shares["backward"]]


def print_casts(names: list[str]) -> None:
    table = Table("model", *(f"{part}: {kind}" for part in ("e4m3", "e5m2") for kind in CASTS))
    for name in names or zoo.TWELVE:
        table.add_row(*cast_row(zoo.CASES[name]))
    Console(width=130).print(table)


def print_models(names: list[str]) -> None:
    cases = {**zoo.CASES, **zoo.UNSEEN}
    table = Table(
        "model", "trains", "folded vs unit", "stays explicit when folded", "plain ≤2", "≤4", "scaled ≤2", "≤4"
    )
    for name in names or cases:
        try:
            table.add_row(*row(cases[name]))
        except UnitScalingError as error:
            table.add_row(name, f"no: {error}")
    Console(width=130).print(table)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["casts"]:
        print_casts(sys.argv[2:])
    else:
        print_models(sys.argv[1:])
