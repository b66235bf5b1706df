"""One self-contained HTML page for a run, made from what lies in the run's folder.

    report/run.json        what was run, how it ended, what the model does with some examples: texts, names of files;
                           written when the run begins, and again at its end
    report/metrics.json    final numbers
    report/plan.txt        the plan's table
    csv/metrics.csv        Lightning's CSVLogger: curves of loss and learning rate
    monitor.jsonl          `ScaleMonitor` and `measure`: operands over training

All are optional, so the page of a run that was stopped can be made too. Style, charts, images and sounds are inlined;
images and sounds lie beside the page as files too.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_unitscale.monitor.charts import loss_chart
from lightning_unitscale.monitor.operand_sections import operand_sections
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
from lightning_unitscale.monitor.run_folder import ABOUT, LOSSES, METRICS, RunFolder

IN_WORDS = {"val/loss": "held-out loss", "test/loss": "test loss"}


def write_beginning(folder: Path, *, title: str, score: str, facts: Mapping[str, str], before: Path | None) -> None:
    """What is known of a run when it begins, so that the page of one that was killed says it; see `write_report`.

    The numbers of an earlier run in the same folder are taken away.
    """
    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    (report / METRICS).unlink(missing_ok=True)
    _write_about(
        report,
        title=title,
        ending="not ended: it was killed, or is still running",
        score=score,
        facts=dict(facts),
        before=str(before.resolve()) if before else None,
    )


def _write_about(report: Path, **about: Any) -> None:
    (report / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


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
    before: Path | None = None,
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
        before: The folder of the run that this one goes on from; its curves come before this one's.
    """
    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    (report / METRICS).write_text(json.dumps(dict(metrics), indent=2) + "\n", encoding="utf-8")
    (report / "plan.txt").write_text(plan + "\n", encoding="utf-8")
    _write_about(
        report,
        title=title,
        ending=ending,
        score=score,
        facts=dict(facts or {}),
        scaling=scaling,
        samples=[{"file": str(one.relative_to(report))} if isinstance(one, Path) else one for one in shown],
        untouched=str(untouched.resolve()) if untouched else None,
        before=str(before.resolve()) if before else None,
    )
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
        *operand_sections(report, run.snapshots),
    ]
    return write_page(report / "index.html", run.title, sections)


# ----------------------------------------------------------------------------------------------------------------------
# Sections, from the top of the page to its end


def _top(run: RunFolder, beside: RunFolder | None) -> Iterator[str]:
    """How it ended and what came out; then what was run, and all numbers."""
    ending = run.about.get("ending", "")
    if ending:
        early = "" if ending == "finished" else " early"
        yield f'<p><span class="ending{early}">{html.escape(ending)}</span></p>'
    last = run.curves.get(run.about.get("score", ""))
    if run.score is not None and (ending.startswith("finished") or not last):
        yield f'<p class="verdict">{_outcome(run, beside)}</p>'
    elif last:
        step, value = last[-1]
        name = IN_WORDS.get(run.about["score"], run.about["score"])
        yield f'<p class="verdict">The last {html.escape(name)}, of step {step}: <b>{readable(value)}</b>.</p>'
    if facts := run.about.get("facts"):
        yield section("What was run", definitions({name: html.escape(value) for name, value in facts.items()}))
    if run.metrics:
        yield section(
            "Numbers", table([], ([html.escape(n), html.escape(readable(v))] for n, v in run.metrics.items()))
        )


def _outcome(run: RunFolder, beside: RunFolder | None) -> str:
    """The score in words, beside what there is to compare it with."""
    name = run.about["score"]
    words = f"{html.escape(IN_WORDS.get(name, name))}: <b>{readable(run.score)}</b>"
    words = words[0].upper() + words[1:]
    if beside is not None and beside.score is not None:
        words += f"; without unit scaling, otherwise alike: {readable(beside.score)}"
    for other, value in run.metrics.items():
        if other.startswith(f"{name}, of "):
            words += f"; what {html.escape(other.removeprefix(f'{name}, of '))} give: {readable(value)}"
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
