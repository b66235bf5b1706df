"""One self-contained HTML page for a run, made from what lies in the run's folder.

    report/run.json        title and samples of generated text
    report/metrics.json    final numbers
    report/plan.txt        the plan's table
    csv/metrics.csv        Lightning's CSVLogger: loss curves
    monitor.jsonl          `ScaleMonitor` and `measure`: operands over training

All are optional, so the page of a run that was stopped can be made too. Images are inlined, and lie beside the page as
PNG files.
"""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from math import log2
from pathlib import Path
from typing import Any

from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor.charts import HEADINGS, Curve, drift_chart, exponent_chart, loss_chart, short_names
from lightning_unitscale.monitor.page import image, section, table, write_page
from lightning_unitscale.monitor.snapshot import FILE, Measurement, Snapshot

WORST = 15  # rows
BAD_SNR = 20.0  # dB; healthy casts to e4m3 have 31, to e5m2 25

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


def write_report(
    folder: Path, *, title: str, metrics: Mapping[str, Any], plan: str, samples: Sequence[str] = ()
) -> Path:
    """Adds what a recipe knows at its end to a run's folder, and returns the page made of it.

    Args:
        folder: The run's, with `monitor.jsonl` and `csv/metrics.csv` in it.
        title: Heading of the page.
        metrics: Final numbers by name.
        plan: The plan's table.
        samples: Generated texts.
    """
    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    (report / "metrics.json").write_text(json.dumps(dict(metrics), indent=2) + "\n", encoding="utf-8")
    (report / "plan.txt").write_text(plan + "\n", encoding="utf-8")
    run = {"title": title, "samples": list(samples)}
    (report / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    return render_report(folder)


def render_report(folder: Path) -> Path:
    """Makes `report/index.html` and its PNGs from what lies in a run's folder, and returns the page.

    Raises:
        InputError: the folder is not there, or has nothing to report on.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (looked in {Path.cwd()})")
    report, curves = folder / "report", _read_log(folder / "csv" / "metrics.csv")
    snapshots = Snapshot.read(folder / FILE)
    if not curves and not snapshots and not (report / "metrics.json").exists():
        raise InputError(f"{folder}: not the folder of a run; it has no {FILE}, csv/metrics.csv or report/metrics.json")
    report.mkdir(exist_ok=True)
    run = _read_json(report / "run.json")
    sections = [
        *_metrics(_read_json(report / "metrics.json")),
        *_loss(report, curves),
        *_operands(report, snapshots),
        *_samples(run.get("samples", [])),
        *_plan(report / "plan.txt"),
    ]
    return write_page(report / "index.html", run.get("title", folder.name), sections)


# ----------------------------------------------------------------------------------------------------------------------
# Sections


def _metrics(metrics: Mapping[str, Any]) -> Iterator[str]:
    if metrics:
        yield table([], ([html.escape(name), _readable(value)] for name, value in metrics.items()))


def _operands(report: Path, snapshots: Sequence[Snapshot]) -> Iterator[str]:
    """Exponents plain beside scaled, worst sites, drift."""
    run = [snapshot for snapshot in snapshots if snapshot.label == "run"]
    if not run:
        return
    plain = [snapshot for snapshot in snapshots if snapshot.label != "run"]
    shown = list(dict.fromkeys((*plain, run[0], run[-1])))
    yield section(
        "Exponents of matmul operands",
        f"<p>{_verdict(run[-1])}</p>",
        image(report / "exponents.png", exponent_chart(shown), "Range of every operand beside the formats' ranges"),
        f"<p>{HOW_TO_READ.format(format=run[-1].format)} {CAST if _is_cast(run[-1]) else NOT_CAST}</p>",
    )
    yield section(f"Worst sites at step {run[-1].step}", _worst(run[-1], plain[0] if plain else None))
    if run[-1].updates:
        yield section(f"Largest updates at step {run[-1].step}", f"<p>{UPDATES}</p>", _updates(run[-1]))
    if len(run) > 1:
        yield section("Drift over training", image(report / "drift.png", drift_chart(run), "RMS of operands by step"))


def _verdict(snapshot: Snapshot) -> str:
    casts = [m.cast for m in snapshot.measurements]
    bad = sum(cast.snr_db < BAD_SNR for cast in casts)
    lost = max(cast.flushed + cast.saturated for cast in casts)
    condition = "Cast" if _is_cast(snapshot) else "Nothing is cast. If it were, with no constants,"
    return (
        f"{condition} to {snapshot.format} at step {snapshot.step}, {bad} of {len(casts)} operands have a "
        f"signal-to-noise ratio below {BAD_SNR:.0f} dB; the largest share of one operand that is flushed or saturated "
        f"is {lost:.2%}."
    )


def _is_cast(snapshot: Snapshot) -> bool:
    return any(m.scale is not None for m in snapshot.measurements)


def _worst(snapshot: Snapshot, plain: Snapshot | None) -> str:
    """The operands that the cast changes most."""
    before = {(m.parameter, m.op, m.operand): m for m in (plain.measurements if plain else ())}
    worst = sorted(snapshot.measurements, key=lambda m: m.cast.snr_db)[:WORST]
    sites = [m.site for m in snapshot.measurements]
    names = dict(zip(sites, short_names(sites), strict=True))
    header = ["site", "operand", "RMS", "largest", "scale before the cast", "flushed", "saturated", "SNR dB"]
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
            *([_snr(before.get((m.parameter, m.op, m.operand)))] if plain else []),
        ]
        for m in worst
    ]
    return table([*header, *([f"{html.escape(plain.label)}: SNR dB"] if plain else [])], rows)


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
    return table(["parameter", "role", "RMS of update / weight", "alignment", "kurtosis of input"], rows)


def _snr(measurement: Measurement | None) -> str:
    return "" if measurement is None else f"{measurement.unscaled.snr_db:.1f}"


def _loss(report: Path, curves: Mapping[str, Curve]) -> Iterator[str]:
    if curves:
        yield section("Loss", image(report / "loss.png", loss_chart(curves), "Training and held-out loss by step"))


def _samples(samples: Sequence[str]) -> Iterator[str]:
    if samples:
        yield section("Samples", *(f"<pre>{html.escape(sample)}</pre>" for sample in samples))


def _plan(file: Path) -> Iterator[str]:
    if file.exists():
        yield section("Plan", f"<pre>{html.escape(file.read_text(encoding='utf-8'))}</pre>")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers, and files


def _readable(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else html.escape(str(value))


def _read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _read_log(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Column -> (step, value) of every row that has one; nothing where CSV logging was off."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if log.exists():
        with log.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for column, value in row.items():
                    if value and column not in ("step", "epoch"):
                        curves.setdefault(column, []).append((int(row["step"]), float(value)))
    return curves
