"""The report: one page with everything in it, from whatever a run has left."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.nn import functional as F

from lightning_unitscale import cli
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor import Snapshot, measure
from lightning_unitscale.monitor.charts import drift_chart, exponent_chart, short_names
from lightning_unitscale.monitor.comparison import compare_runs
from lightning_unitscale.monitor.report import render_report, write_report

PNG = b"\x89PNG"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The headings, table rows, images and links of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.charts: list[list[dict[str, Any]]] = []
        self.text = ""
        self._tag = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attributes:
            if name == "data-chart":
                self.charts.append(json.loads(value or ""))
            if name in ("src", "href"):
                self.links.append(value or "")
        if tag == "img":
            self.images.append(base64.b64decode(self.links[-1].partition("base64,")[2]))

    def handle_data(self, data: str) -> None:
        if self._tag in ("style", "script"):
            return
        self.text += data
        if self._tag == "h2" and data.strip():
            self.headings.append(data)
        if self._tag in ("td", "th", "sup") and self.rows:
            self.rows[-1][-1] += data.strip()


def model(factor: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    with torch.no_grad():
        layers[2].weight.mul_(factor)
    return layers


CASTS = {(("2.weight", "linear"), "weight"): 2.0**12, (("0.weight", "linear"), "gradient"): 2.0**-22}


def snapshot(step: int, label: str = "run", factor: float = 1.0, cast: bool = False) -> Snapshot:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    measured = measure(model(factor), lambda m: F.mse_loss(m(x), x), label=label, scales=CASTS if cast else None)
    return Snapshot(label, step, measured.format, measured.measurements)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as a recipe leaves it."""
    return written(tmp_path / "mine", cast=True)


def written(folder: Path, cast: bool, untouched: Path | None = None, score: float = 2.5) -> Path:
    for measured in (snapshot(0), snapshot(10), snapshot(20, factor=2.0**-12, cast=cast), snapshot(0, "untouched")):
        measured.append_to(folder / "monitor.jsonl")
    (folder / "csv").mkdir()
    log = "epoch,step,lr-AdamW,train/loss,val/loss\n0,0,,3.0,\n0,0,0.001,,\n0,9,,2.0,\n0,9,,,2.5\n"
    (folder / "csv" / "metrics.csv").write_text(log)
    write_report(
        folder,
        title="a & b",
        metrics={"held-out <loss>": score, "held-out <loss>, of counted pairs": 3.25, "steps": 20, "bytes": 1234567},
        score="held-out <loss>",
        ending="finished",
        facts={"command": "unitscale pretrain a=<b>", "seed": "1" if cast else "2"},
        scaling="Unit scaling did <this>.",
        plan="the <plan>",
        shown=["one <b>", "two"],
        untouched=untouched,
    )
    return folder


def test_page_is_self_contained_and_complete(run: Path) -> None:
    page = Page(run / "report" / "index.html")
    assert page.headings == [
        "What was run",
        "Numbers",
        "Loss",
        "Learning rate",
        "Samples",
        "What unit scaling did",
        "Exponents of matmul operands",
        "Worst casts at step 20",
        "Drift over training",
    ]
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for name, image in zip(("loss", "exponents", "drift"), page.images, strict=True):
        assert image.startswith(PNG)
        assert (run / "report" / f"{name}.png").read_bytes() == image
    for text in (
        "a & b",
        "held-out <loss>",
        "the <plan>",
        "one <b>",
        "two",
        "pretrain a=<b>",
        "did <this>",
        "finished",
    ):
        assert text in page.text
    assert ["steps", "20"] in page.rows and ["bytes", "1,234,567"] in page.rows
    assert json.loads((run / "report" / "metrics.json").read_text())["held-out <loss>"] == 2.5
    assert (run / "report" / "plan.txt").read_text() == "the <plan>\n"


def test_the_page_begins_with_the_outcome_beside_what_to_compare_it_with(tmp_path: Path) -> None:
    untouched = written(tmp_path / "untouched", cast=False, score=2.75)
    page = Page(written(tmp_path / "mine", cast=True, untouched=untouched) / "report" / "index.html")
    outcome = "Held-out <loss>: 2.5; without unit scaling, otherwise alike: 2.75; what counted pairs give: 3.25."
    assert outcome in page.text and page.text.index(outcome) < page.text.index("What was run")
    assert [line["name"] for line in page.charts[0]] == ["training", "held out", "held out, without unit scaling"]
    assert page.charts[0][1]["points"] == [[9, 2.5]]
    assert page.charts[1] == [{"name": "learning rate", "points": [[0, 0.001]], "dashed": False, "thin": False}]


def test_the_held_out_loss_of_a_run_that_was_stopped_is_said_to_be_of_its_step(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("epoch,step,val/loss\n0,9,2.5\n0,19,2.25\n0,20,2.25\n")
    about = {"title": "a", "metrics": {"val/loss": 2.25}, "plan": "", "score": "val/loss"}
    page = Page(write_report(tmp_path, ending="training diverged: the loss of step 33 is nan", **about))
    assert "The last held-out loss, of step 20: 2.25." in page.text
    assert page.charts[0][0]["points"] == [[9, 2.5], [20, 2.25]]  # step 20 was validated in the training and after it
    assert "Held-out loss: 2.25." in Page(write_report(tmp_path, **about)).text


def test_a_run_that_went_on_begins_with_the_curves_of_the_one_before(tmp_path: Path) -> None:
    first = written(tmp_path / "first", cast=False)
    second = tmp_path / "second"
    (second / "csv").mkdir(parents=True)
    (second / "csv" / "metrics.csv").write_text("epoch,step,train/loss\n0,5,1.5\n0,12,1.0\n")
    page = Page(write_report(second, title="on", metrics={"val/loss": 2.0}, plan="", score="val/loss", before=first))
    curves = {line["name"]: line["points"] for line in page.charts[0]}
    assert curves["training"] == [[0, 3.0], [5, 1.5], [12, 1.0]]  # what was done again replaces what was before
    assert "Held-out loss: 2." in page.text
    again = write_report(second, title="in its own folder", metrics={}, plan="", before=second)
    assert Page(again).charts[0][0]["points"] == [[5, 1.5], [12, 1.0]]


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [written(tmp_path / "first", cast=True), written(tmp_path / "second", cast=False, score=2.25)]
    page = Page(compare_runs(runs, tmp_path / "new" / "both.html"))
    assert ["", "first", "second"] in page.rows
    assert ["held-out <loss>", "2.5", "2.25"] in page.rows
    assert ["seed", "1", "2"] in page.rows and not any(row[0] == "command" for row in page.rows)  # which is the same
    assert [[line["name"] for line in chart] for chart in page.charts] == [["first", "second"]] * 3
    assert not page.links


def test_worst_casts_stand_beside_the_same_operands_without_their_constants(run: Path) -> None:
    """One was brought back into range by its constant, the other pushed out of it."""
    page = Page(run / "report" / "index.html")
    header = page.rows.index(next(row for row in page.rows if row[0] == "site"))
    with_constant, without = page.rows[header].index("SNR dB"), page.rows[header].index("without the constant")
    rows = page.rows[header + 1 : header + 3]
    assert [row[:2] for row in rows] == [["0", "gradients"], ["2", "weights"]]
    assert float(rows[0][with_constant]) < 1 < 20 < float(rows[1][with_constant])
    assert float(rows[1][without]) < 1


def test_the_verdict_counts_casts_alone(run: Path) -> None:
    last = next(snapshot for snapshot in Snapshot.read(run / "monitor.jsonl") if snapshot.step == 20)
    casts = [m for m in last.measurements if m.scale is not None]
    bad = sum(m.cast.snr_db < 20 for m in casts)
    assert (bad, len(casts)) == (1, 2)
    assert "1 of 2 operands" in Page(run / "report" / "index.html").text


def test_without_a_format_nothing_is_said_of_casts(tmp_path: Path) -> None:
    page = Page(written(tmp_path / "mine", cast=False) / "report" / "index.html")
    assert "Nothing was cast." in page.text
    assert not any("Worst" in heading for heading in page.headings)
    assert "at step 0: 100% of this run, 100% of the model without unit scaling (untouched)" in page.text


@pytest.mark.parametrize(
    ("left", "headings"),
    [
        (("monitor.jsonl",), ["Exponents of matmul operands", "Worst casts at step 20", "Drift over training"]),
        (("csv/metrics.csv",), ["Loss", "Learning rate"]),
        (("report/metrics.json", "report/plan.txt"), ["Numbers", "What unit scaling did"]),
    ],
)
def test_a_run_that_was_stopped_has_a_report_too(run: Path, left: tuple[str, ...], headings: list[str]) -> None:
    for file in run.rglob("*.*"):
        if file.is_file() and str(file.relative_to(run)) not in left:
            file.unlink()
    assert Page(render_report(run)).headings == headings


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not the folder of a run; it has no monitor\.jsonl"):
        render_report(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no such file or folder"):
        render_report(tmp_path / "missing")


def test_exponent_chart_shows_what_was_measured() -> None:
    measured = snapshot(0)
    scaled = Snapshot(
        "scaled", 1, "fp8", measure(model(), lambda m: m(torch.ones(1, 16)).sum(), scales={
            (("0.weight", "linear"), "weight"): 8.0
        }).measurements,
    )  # fmt: skip
    figure = exponent_chart([measured, scaled])
    weights = figure.axes[2]
    dots, plain = (
        next(line for line in weights.lines if line.get_label() == label) for label in ("scaled, step 1", "run, step 0")
    )
    rms = model()[0].weight.detach().square().mean().sqrt().log2().item()
    assert plain.get_ydata()[0] == pytest.approx(rms, abs=1e-5)
    assert dots.get_ydata()[0] == pytest.approx(rms + 3, abs=1e-5)
    top = model()[0].weight.detach().abs().max().log2().item()
    segments = [collection.get_segments()[0] for collection in weights.collections[:2]]
    assert segments[0][1][1] == pytest.approx(top, abs=1e-5)
    assert segments[1][1][1] == pytest.approx(top + 3, abs=1e-5)
    assert [tick.get_text() for tick in figure.axes[4].get_xticklabels()] == ["0", "2"]


def test_drift_chart_has_a_line_for_each_site_and_their_median() -> None:
    figure = drift_chart([snapshot(0), snapshot(5), snapshot(9, factor=4.0)])
    weights = figure.axes[1]
    assert len(weights.lines) == 3
    first, second, middle = (line.get_ydata() for line in weights.lines)
    assert second[2] == pytest.approx(4 * second[0], rel=1e-4)
    assert list(middle) == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])


def test_short_names() -> None:
    assert short_names(["model.model.a.q:linear", "model.model.head:addmm"]) == ["a.q", "head:addmm"]
    assert short_names(["model.a:linear", "head:linear"]) == ["model.a", "head"]
    assert short_names([]) == []


def test_command_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for file in (run / "report").glob("*.png"):
        file.unlink()
    before = set(run.iterdir())
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["unitscale", "report", "run=."])
    GlobalHydra.instance().clear()
    cli.main()
    assert re.search(r"report .*index\.html", capsys.readouterr().out)
    assert (run / "report" / "exponents.png").exists()
    assert set(run.iterdir()) == before  # nothing else is written


# --- in a real browser ------------------------------------------------------------------------------------------------

PHONE = 390  # pixels; no window of Chromium is as narrow, a frame is
FRAME = """<body style="margin:0"><iframe src="{page}" width={width} height=2400 style="border:0"
onload="const it = this.contentDocument.documentElement; document.title = it.scrollWidth + ' ' +
it.querySelectorAll('svg text').length + ' ' + getComputedStyle(it.querySelector('body')).backgroundColor"></iframe>"""


def in_chromium(page: Path, *options: str) -> str:
    """What Chromium, without a screen, prints of a page."""
    assert CHROMIUM
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [CHROMIUM, *quiet, "--virtual-time-budget=4000", f"--user-data-dir={page.parent}", *options]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("colours", ["dark", "light"])
@pytest.mark.parametrize("width", [PHONE, 1200])
def test_the_page_fits_phone_and_desk_in_both_colours(run: Path, tmp_path: Path, width: int, colours: str) -> None:
    """Screenshots go to the folder SCREENSHOTS, if that is set in the environment."""
    scheme = f"--blink-settings=preferredColorScheme={('dark', 'light').index(colours)}"
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=(run / "report" / "index.html").as_uri(), width=width))
    picture = Path(os.environ.get("SCREENSHOTS", tmp_path)).resolve() / f"report-{width}-{colours}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    title = re.search(r"<title>(\d+) (\d+) (.*)</title>", in_chromium(frame, scheme, "--dump-dom"))
    assert title
    assert int(title[1]) <= width  # nothing to scroll to the side
    assert int(title[2]) > 5  # the axes of the charts
    brightness = sum(map(int, re.findall(r"\d+", title[3])[:3]))
    assert brightness < 150 if colours == "dark" else brightness > 600 or "0, 0, 0, 0" in title[3]
    in_chromium(frame, scheme, f"--window-size={width},2400", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(PNG)
