"""The sections of a report on what the monitor measured: operands of matmuls, their casts, updates, drift."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from math import log2
from pathlib import Path

from lightning_unitscale.monitor.charts import HEADINGS, drift_chart, exponent_chart, short_names
from lightning_unitscale.monitor.page import image, section, table
from lightning_unitscale.monitor.snapshot import Snapshot

WORST = 15  # rows
BAD_SNR = 20.0  # dB; healthy casts to e4m3 have 31, to e5m2 25
NEAR = 4.0  # times or a part of 1: an RMS that is near it

HOW_TO_READ = """\
Each bar is one operand of one matmul: from the smallest 1 % of its elements to the largest; the dot is its RMS. \
Dark red: flushed to zero (below) or saturated (above) in {format}; light red: held with less precision. The grey bars \
on the right are what each format holds, its light part with less precision."""
CAST = """\
Bars are drawn as the casts of this run see them, times each operand's power of two: dots near 0, far from the \
red."""
NOT_CAST = """\
Nothing was cast in this run, so nothing of this was lost: this is what a cast with no constants would meet. Folded \
storage keeps the constants of unit scaling inside the weights, and gradients have the scale of the loss. With a \
format (<code>unitscale.format=fp8</code>) each operand gets one power of two that brings its dot near 0."""

UPDATES = """\
Alignment with the layer's input: ½ for unrelated, 1 for fully aligned. Kurtosis: 3 for normal activations, more with
outliers. A learning rate is too high where updates of weights that are not small reach the size of the weights."""


def operand_sections(report: Path, snapshots: Sequence[Snapshot]) -> Iterator[str]:
    """Exponents plain beside scaled, worst sites, drift."""
    run = [snapshot for snapshot in snapshots if snapshot.label == "run"]
    if not run:
        return
    plain = [snapshot for snapshot in snapshots if snapshot.label != "run"]
    shown = list(dict.fromkeys((*plain, run[0], run[-1])))
    yield section(
        "Exponents of matmul operands",
        f"<p>{_verdict(run[-1])} {_near_1(run[0], plain)}</p>",
        image(report / "exponents.png", exponent_chart(shown), "Range of every operand beside the formats' ranges"),
        f'<p class="soft">{HOW_TO_READ.format(format=run[-1].format)} {CAST if _is_cast(run[-1]) else NOT_CAST}</p>',
    )
    if _is_cast(run[-1]):
        yield section(f"Worst casts at step {run[-1].step}", _worst(run[-1]))
    if run[-1].updates:
        yield section(f"Largest updates at step {run[-1].step}", f"<p>{UPDATES}</p>", _updates(run[-1]))
    if len(run) > 1:
        yield section("Drift over training", image(report / "drift.png", drift_chart(run), "RMS of operands by step"))


def _verdict(snapshot: Snapshot) -> str:
    if not _is_cast(snapshot):
        return "Nothing was cast."
    casts = [m.cast for m in snapshot.measurements if m.scale is not None]
    bad = sum(cast.snr_db < BAD_SNR for cast in casts)
    lost = max(cast.flushed + cast.saturated for cast in casts)
    return (
        f"Cast to {snapshot.format} at step {snapshot.step}, {bad} of {len(casts)} operands have a "
        f"signal-to-noise ratio below {BAD_SNR:.0f} dB; the largest share of one operand that is flushed or saturated "
        f"is {lost:.2%}."
    )


def _near_1(run: Snapshot, plain: Sequence[Snapshot]) -> str:
    """Activations of the run and of the untouched model, at the same step."""
    shares = {"of this run": run} | {
        f"of the model without unit scaling ({other.label})": other for other in plain if other.step == run.step
    }
    words = [f"{_share_near_1(snapshot):.0%} {whose}" for whose, snapshot in shares.items()]
    return f"Activations with an RMS within a factor of {NEAR:.0f} of 1 at step {run.step}: {', '.join(words)}."


def _share_near_1(snapshot: Snapshot) -> float:
    found = [1 / NEAR <= m.unscaled.rms <= NEAR for m in snapshot.of("x")]
    return sum(found) / len(found) if found else 0.0


def _is_cast(snapshot: Snapshot) -> bool:
    return any(m.scale is not None for m in snapshot.measurements)


def _worst(snapshot: Snapshot) -> str:
    """The operands that the cast changes most, each beside a cast without its constant at the same step."""
    casts = [m for m in snapshot.measurements if m.scale is not None]
    sites = [m.site for m in snapshot.measurements]
    names = dict(zip(sites, short_names(sites), strict=True))
    header = ["site", "operand", "RMS", "largest", "constant", "flushed", "saturated", "SNR dB", "without the constant"]
    rows = [
        [
            html.escape(names[m.site]),
            m.operand if m.operand not in HEADINGS else HEADINGS[m.operand].lower(),
            f"{m.unscaled.rms:.2g}",
            f"{m.unscaled.largest:.2g}",
            f"2<sup>{log2(m.scale or 1.0):.0f}</sup>",
            f"{m.cast.flushed:.2%}",
            f"{m.cast.saturated:.2%}",
            f"{m.cast.snr_db:.1f}",
            f"{m.unscaled.snr_db:.1f}",
        ]
        for m in sorted(casts, key=lambda m: m.cast.snr_db)[:WORST]
    ]
    return table(header, rows, texts=2)


def _updates(snapshot: Snapshot) -> str:
    """The parameters that the step changed most, relative to what they were."""
    largest = sorted(snapshot.updates, key=lambda update: update.relative or 0.0, reverse=True)[:WORST]
    kurtosis = {m.parameter: m.unscaled.kurtosis for m in snapshot.of("x")}
    rows = [
        [
            html.escape(update.parameter),
            update.role,
            "" if update.relative is None else f"{update.relative:.2g}",
            "" if update.alignment is None else f"{update.alignment:.2f}",
            f"{tails:.1f}" if (tails := kurtosis.get(update.parameter)) is not None else "",
        ]
        for update in largest
    ]
    return table(["parameter", "role", "RMS of update / weight", "alignment", "kurtosis of input"], rows, texts=2)
