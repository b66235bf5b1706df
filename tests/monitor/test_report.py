"""The report: one page with everything in it, from whatever a run has left."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.nn import functional as F

from lightning_unitscale import cli
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor import Snapshot, measure
from lightning_unitscale.monitor.charts import drift_chart, exponent_chart, short_names
from lightning_unitscale.monitor.report import render_report, write_report

PNG = b"\x89PNG"


class Page(HTMLParser):
    """The headings, table rows, images and links of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
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
            if name in ("src", "href"):
                self.links.append(value or "")
        if tag == "img":
            self.images.append(base64.b64decode(self.links[-1].partition("base64,")[2]))

    def handle_data(self, data: str) -> None:
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


def snapshot(step: int, label: str = "run", factor: float = 1.0) -> Snapshot:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    measured = measure(model(factor), lambda m: F.mse_loss(m(x), x), label=label)
    return Snapshot(label, step, measured.format, measured.measurements)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as a recipe leaves it."""
    for measured in (snapshot(0), snapshot(10), snapshot(20, factor=2.0**-12), snapshot(0, "untouched")):
        measured.append_to(tmp_path / "monitor.jsonl")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,0,3.0,\n0,9,2.0,\n0,9,,2.5\n")
    metrics = {"held-out <loss>": 2.5, "steps": 20}
    write_report(tmp_path, title="a & b", metrics=metrics, plan="the <plan>", shown=["one <b>", "two"])
    return tmp_path


def test_page_is_self_contained_and_complete(run: Path) -> None:
    page = Page(run / "report" / "index.html")
    assert page.headings == [
        "Loss",
        "Exponents of matmul operands",
        "Worst sites at step 20",
        "Drift over training",
        "Samples",
        "Plan",
    ]
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for name, image in zip(("loss", "exponents", "drift"), page.images, strict=True):
        assert image.startswith(PNG)
        assert (run / "report" / f"{name}.png").read_bytes() == image
    for text in ("a & b", "held-out <loss>", "the <plan>", "one <b>", "two"):
        assert text in page.text
    assert ["steps", "20"] in page.rows
    assert json.loads((run / "report" / "metrics.json").read_text())["held-out <loss>"] == 2.5
    assert (run / "report" / "plan.txt").read_text() == "the <plan>\n"


def test_worst_sites_come_first_beside_the_untouched_model(run: Path) -> None:
    page = Page(run / "report" / "index.html")
    header = page.rows.index(next(row for row in page.rows if row[0] == "site"))
    assert page.rows[header][-1] == "untouched: SNR dB"
    rows = page.rows[header + 1 : header + 7]
    # 2^-12 of its RMS takes one weight out of e4m3, and the gradient behind it out of e5m2.
    assert sorted(row[:2] for row in rows[:2]) == [["0", "gradients"], ["2", "weights"]]
    for row in rows[:2]:
        assert float(row[5].rstrip("%")) > 99
        assert float(row[-2]) < 1
        assert float(row[-1]) > 20
    snr = [float(row[-2]) for row in rows]
    assert snr == sorted(snr)


def test_the_verdict_counts_what_is_bad(run: Path) -> None:
    last = Snapshot.read(run / "monitor.jsonl")[-1]
    bad = sum(m.cast.snr_db < 20 for m in last.measurements)
    assert bad > 0
    text = Page(run / "report" / "index.html").text
    assert f"{bad} of {len(last.measurements)} operands" in text
    assert ("Nothing is cast" in text) == all(m.scale is None for m in last.measurements)


@pytest.mark.parametrize(
    ("left", "headings"),
    [
        (("monitor.jsonl",), ["Exponents of matmul operands", "Worst sites at step 20", "Drift over training"]),
        (("csv/metrics.csv",), ["Loss"]),
        (("report/metrics.json", "report/plan.txt"), ["Plan"]),
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
    with pytest.raises(InputError, match="no such folder"):
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
