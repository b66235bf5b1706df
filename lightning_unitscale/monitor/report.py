"""One self-contained HTML page for a run, made from what lies in the run's folder.

    report/run.json        what was run, how it ended, what the model does with some examples: texts, names of files
    report/metrics.json    final numbers
    report/plan.txt        the plan's table
    csv/metrics.csv        Lightning's CSVLogger: curves of loss and learning rate
    monitor.jsonl          `ScaleMonitor` and `measure`: operands over training

All are optional, so the page of a run that was stopped can be made too. Style, charts, images and sounds are inlined;
images and sounds lie beside the page as files too.
"""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, log2
from pathlib import Path
from typing import Any

from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor.charts import HEADINGS, Curve, drift_chart, exponent_chart, loss_chart, short_names
from lightning_unitscale.monitor.page import (
    chart,
    definitions,
    image,
    in_base64,
    inline_image,
    line,
    section,
    table,
    write_page,
)
from lightning_unitscale.monitor.readable import readable
from lightning_unitscale.monitor.snapshot import FILE, Snapshot

WORST = 15  # rows
BAD_SNR = 20.0  # dB; healthy casts to e4m3 have 31, to e5m2 25
NEAR = 4.0  # times or a part of 1: an RMS that is near it
LOSSES = {"train/loss": "training", "val/loss": "held out"}  # columns of the log

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
    folder: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    plan: str,
    shown: Sequence[str | Path] = (),
    ending: str = "finished",
    score: str = "",
    facts: Mapping[str, str] | None = None,
    scaling: str = "",
    untouched: Path | None = None,
) -> Path:
    """Adds what a recipe knows at its end to a run's folder, and returns the page made of it.

    Args:
        folder: The run's, with `monitor.jsonl` and `csv/metrics.csv` in it.
        title: Heading of the page.
        metrics: Final numbers by name.
        plan: The plan's table.
        shown: Generated texts, and pictures, sounds or other files below `folder`/report.
        ending: "finished", or why it ended earlier.
        score: The name in `metrics` by which the run is judged.
        facts: How the run was started: name -> value.
        scaling: What unit scaling did, in words.
        untouched: The folder of the same run without unit scaling, to be shown beside it.
    """
    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    (report / "metrics.json").write_text(json.dumps(dict(metrics), indent=2) + "\n", encoding="utf-8")
    (report / "plan.txt").write_text(plan + "\n", encoding="utf-8")
    run = {
        "title": title,
        "ending": ending,
        "score": score,
        "facts": dict(facts or {}),
        "scaling": scaling,
        "samples": [{"file": str(one.relative_to(report))} if isinstance(one, Path) else one for one in shown],
        "untouched": str(untouched.resolve()) if untouched else None,
    }
    (report / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    return render_report(folder)


def render_report(folder: Path) -> Path:
    """Makes `report/index.html` and its PNGs from what lies in a run's folder, and returns the page.

    Raises:
        InputError: the folder is not there, or has nothing to report on.
    """
    run = RunFolder(folder)
    report = folder / "report"
    report.mkdir(exist_ok=True)
    beside = RunFolder.if_there(run.about.get("untouched"))
    sections = [
        *_top(run, beside),
        *_curves(report, run, beside),
        *_samples(report, run.about.get("samples", [])),
        *_scaling(run, report / "plan.txt"),
        *_operands(report, run.snapshots),
    ]
    return write_page(report / "index.html", run.title, sections)


def compare_runs(folders: Sequence[Path], page: Path) -> Path:
    """One page for several runs: their numbers and settings in columns, their curves in one chart each.

    Raises:
        InputError: a folder is not there, or has nothing to report on.
    """
    runs = [RunFolder(folder) for folder in folders]
    names = _distinct([run.folder for run in runs])
    rows = list(dict.fromkeys(name for run in runs for name in run.metrics))
    numbers = [[html.escape(name), *(_number(run.metrics.get(name, "")) for run in runs)] for name in rows]
    facts = list(dict.fromkeys(name for run in runs for name in run.about.get("facts", {})))
    settings = [[name, *(str(run.about.get("facts", {}).get(name, "")) for run in runs)] for name in facts]
    differing = [[html.escape(cell) for cell in row] for row in settings if len(set(row[1:])) > 1]
    head = ["", *map(html.escape, names)]
    endings = ["how it ended", *(html.escape(run.about.get("ending", "")) for run in runs)]
    charts = [
        section(f"Loss: {label}", chart([line(n, run.curves[column]) for n, run in _having(names, runs, column)]))
        for column, label in LOSSES.items()
        if any(column in run.curves for run in runs)
    ]
    rates = [(name, run.rate) for name, run in zip(names, runs, strict=True) if run.rate]
    if rates:
        charts.append(section("Learning rate", chart([line(name, rate) for name, rate in rates])))
    sections = [
        table(head, [endings, *numbers]),
        *charts,
        *([section("What differs", table(head, differing))] if differing else []),
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    return write_page(page, f"{len(runs)} runs", sections)


class RunFolder:
    """What lies in the folder of a run.

    Attributes:
        about: of `write_report`; empty for a run that was stopped before.
        metrics: final numbers by name.
        curves: by column of the log.
        rate: the learning rate by step.
        snapshots: the monitor's.

    Raises:
        InputError: the folder is not there, or has nothing to report on.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder (looked in {Path.cwd()})")
        report = folder / "report"
        self.folder = folder
        self.about = _read_json(report / "run.json")
        self.metrics = _read_json(report / "metrics.json")
        self.curves = _read_log(folder / "csv" / "metrics.csv")
        self.snapshots = Snapshot.read(folder / FILE)
        if not self.curves and not self.snapshots and not self.metrics:
            raise InputError(
                f"{folder}: not the folder of a run; it has no {FILE}, csv/metrics.csv or report/metrics.json"
            )

    @classmethod
    def if_there(cls, folder: str | None) -> RunFolder | None:
        """None too where the folder has been removed since."""
        try:
            return cls(Path(folder)) if folder else None
        except InputError:
            return None

    @property
    def title(self) -> str:
        """Of the page."""
        return str(self.about.get("title", self.folder.name))

    @property
    def rate(self) -> Curve:
        """The first group's, as `LearningRateMonitor` logs it."""
        return next((curve for column, curve in self.curves.items() if column.startswith("lr-")), ())

    @property
    def score(self) -> float | None:
        """The number by which it is judged, if it is one."""
        value = self.metrics.get(self.about.get("score", ""))
        return value if isinstance(value, (int, float)) and isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------------------
# Sections, from the top of the page to its end


def _top(run: RunFolder, beside: RunFolder | None) -> Iterator[str]:
    """How it ended and what came out; then what was run, and all numbers."""
    if ending := run.about.get("ending"):
        early = "" if ending == "finished" else " early"
        yield f'<p><span class="ending{early}">{html.escape(ending)}</span></p>'
    if run.score is not None:
        yield f'<p class="verdict">{_outcome(run, beside)}</p>'
    if facts := run.about.get("facts"):
        yield section("What was run", definitions({name: html.escape(value) for name, value in facts.items()}))
    if run.metrics:
        yield section("Numbers", table([], ([html.escape(n), _number(v)] for n, v in run.metrics.items())))


def _outcome(run: RunFolder, beside: RunFolder | None) -> str:
    """The score in words, beside what there is to compare it with."""
    name = run.about["score"]
    words = f"{html.escape(name)}: <b>{readable(run.score)}</b>"
    words = words[0].upper() + words[1:]
    if beside is not None and beside.score is not None:
        words += f"; without unit scaling, otherwise alike: {readable(beside.score)}"
    for other, value in run.metrics.items():
        if other.startswith(f"{name}, of "):
            words += f"; of {html.escape(other.removeprefix(f'{name}, of '))}: {readable(value)}"
    return words + "."


def _curves(report: Path, run: RunFolder, beside: RunFolder | None) -> Iterator[str]:
    losses = {column: run.curves[column] for column in LOSSES if column in run.curves}
    if losses:
        lines = [line(LOSSES[column], curve, thin=column == "train/loss") for column, curve in losses.items()]
        if beside is not None and "val/loss" in beside.curves:
            lines.append(line("held out, without unit scaling", beside.curves["val/loss"], dashed=True))
        picture = image(report / "loss.png", loss_chart(losses), "Training and held-out loss by step")
        yield section("Loss", chart(lines), f"<noscript>{picture}</noscript>")
    if run.rate:
        yield section("Learning rate", chart([line("learning rate", run.rate)]))


def _samples(report: Path, samples: Sequence[str | dict[str, str]]) -> Iterator[str]:
    if samples:
        yield section("Samples", *(_sample(report, sample) for sample in samples))


def _sample(report: Path, sample: str | dict[str, str]) -> str:
    """A text, a picture, a sound player, or a link to a file that a browser does not show."""
    if isinstance(sample, str):
        return f'<pre class="sample">{html.escape(sample)}</pre>'
    file, name = report / sample["file"], html.escape(sample["file"])
    if file.suffix == ".png":
        return f"<p>{inline_image(file, name)}"
    if file.suffix == ".wav":
        return f'<p>{name}<br><audio controls src="data:audio/wav;base64,{in_base64(file)}"></audio>'
    return f'<p><a href="{name}">{name}</a>'


def _scaling(run: RunFolder, plan: Path) -> Iterator[str]:
    words = run.about.get("scaling", "")
    sites = html.escape(plan.read_text(encoding="utf-8")) if plan.exists() else ""
    if words or sites:
        folded = f"<details><summary>The plan, site by site</summary><pre>{sites}</pre></details>" if sites else ""
        yield section("What unit scaling did", f"<p>{html.escape(words)}</p>", folded)


def _operands(report: Path, snapshots: Sequence[Snapshot]) -> Iterator[str]:
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
    return table(header, rows)


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


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of HTML, and files


def _having(names: Sequence[str], runs: Sequence[RunFolder], column: str) -> list[tuple[str, RunFolder]]:
    return [(name, run) for name, run in zip(names, runs, strict=True) if column in run.curves]


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _number(value: Any) -> str:
    return html.escape(readable(value))


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
