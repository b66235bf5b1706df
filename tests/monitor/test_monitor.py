"""ScaleMonitor: what it measures, when, what it writes, and that it changes and leaves nothing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from support import tables, zoo
from support.training import Language, assert_same_state, batches, build, fit, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from lightning_unitscale import ScaleMonitor, UnitScaling, UnitScalingError, unit_scale
from lightning_unitscale.engine.runtime.observer import entered_observers
from lightning_unitscale.errors import InputError
from lightning_unitscale.monitor import Measurement, Snapshot, measure
from lightning_unitscale.monitor.scalars import every_site, for_progress_bar, summary


def snapshots(folder: Path) -> list[Snapshot]:
    return Snapshot.read(folder / "monitor.jsonl")


def by_name(snapshot: Snapshot) -> dict[tuple[str, str], Measurement]:
    return {(m.parameter, m.operand): m for m in snapshot.measurements}


# --- one look ---------------------------------------------------------------------------------------------------------


def test_measure_of_a_known_layer() -> None:
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.constant_(layer[0].weight, 2.0**-12)
    layer[0].weight.grad = torch.ones(2, 2)
    snapshot = measure(layer, lambda module: 2.0**-20 * module(torch.tensor([[1.0, 480.0]])).sum(), label="known")
    found = by_name(snapshot)
    assert (snapshot.label, snapshot.step, snapshot.format) == ("known", 0, "fp8")
    x, weight, gradient = (found["0.weight", operand] for operand in ("x", "weight", "gradient"))
    assert x.unscaled.rms == pytest.approx(math.sqrt((1 + 480**2) / 2))
    assert x.unscaled.saturated == 0.5  # 480 > 448
    assert x.unscaled.error == pytest.approx(32 / math.sqrt(1 + 480**2))
    assert (weight.unscaled.rms, weight.unscaled.flushed) == (2.0**-12, 1.0)  # e4m3 ends at 2^-9
    assert (gradient.unscaled.rms, gradient.unscaled.flushed) == (2.0**-20, 1.0)  # e5m2 ends at 2^-16
    assert torch.equal(layer[0].weight.grad, torch.ones(2, 2))


def test_measure_with_scales() -> None:
    layer = nn.Linear(8, 8)
    nn.init.constant_(layer.weight, 3 * 2.0**-12)
    scales = {(("weight", "linear"), "weight"): 2.0**11}
    found = by_name(measure(layer, lambda m: m(torch.ones(1, 8)).sum(), scales=scales))
    weight, x = found["weight", "weight"], found["weight", "x"]
    assert (weight.unscaled.flushed, weight.scale) == (1.0, 2.0**11)
    assert weight.scaled is not None
    assert (weight.scaled.flushed, weight.scaled.error) == (0, 0)
    assert weight.cast is weight.scaled
    assert (x.scale, x.scaled) == (None, None)
    assert x.cast is x.unscaled


def test_measure_takes_the_scales_of_the_plan_in_force() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)

    def step(module: Any) -> Tensor:
        return F.mse_loss(module(x), torch.ones(4, 16))

    plan = unit_scale(layer, step, scheme="preserve", format="fp8")
    (site,) = plan.cast_sites
    site.operand_scales = {"x": 2.0, "weight": 4.0, "gradient": 8.0}
    assert {m.operand: m.scale for m in measure(layer, step).measurements} == site.operand_scales


def test_snapshot_survives_its_file_and_a_line_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "new" / "monitor.jsonl"
    snapshot = measure(nn.Linear(3, 2), lambda m: m(torch.ones(1, 3)).sum(), scales={(("weight", "linear"), "x"): 0.5})
    snapshot.append_to(file)
    later = Snapshot("run", 7, "fp8", snapshot.measurements[:1])
    later.append_to(file)
    snapshot.append_to(file)  # measured again after a resume: the last one counts
    assert Snapshot.read(file) == [snapshot, later]
    with file.open("a") as stream:
        stream.write(json.dumps({"label": "run"})[:9])
    assert Snapshot.read(file) == [snapshot, later]
    with file.open("a") as stream:
        stream.write("\n{}\n")
    with pytest.raises(InputError, match=r"monitor\.jsonl, line 4: not a measurement"):
        Snapshot.read(file)
    assert Snapshot.read(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["llama-sdpa", "bert-eager", "t5-sdpa", "whisper-sdpa"])
def test_powers_of_two_keep_what_plain_casts_lose(name: str) -> None:
    """The table of `python tests/tables.py casts`."""
    _, *shares = tables.cast_row(zoo.CASES[name])
    forward, backward = (dict(zip(tables.CASTS, map(float, part), strict=True)) for part in (shares[:4], shares[4:]))
    assert forward["umup × 2^k"] < 0.3
    assert backward["umup × 2^k"] < 1
    assert forward["plain"] > 2 * forward["umup"]  # u-μP alone brings the forward pass into the format
    assert backward["umup"] > 5 * backward["umup × 2^k"]  # but not gradients: a mean over the batch makes them small


# --- when -------------------------------------------------------------------------------------------------------------


class Watcher(pl.Callback):
    """What is installed after each batch, and what Lightning's hooks are given."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.seen.append("training_step" in trainer.strategy.__dict__)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert_nothing_installed(trainer, pl_module)


def assert_nothing_installed(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    assert not {"training_step", "backward"} & set(trainer.strategy.__dict__)
    assert not _get_current_function_mode_stack()
    assert not entered_observers()
    for child in module.modules():
        assert not child._forward_hooks
        assert not child._forward_pre_hooks
        assert not child._backward_hooks
    for parameter in module.parameters():
        assert not parameter._backward_hooks
        assert parameter._post_accumulate_grad_hooks is None or not parameter._post_accumulate_grad_hooks


def test_measures_every_n_and_the_last_step_and_leaves_nothing_in_between(tmp_path: Path) -> None:
    watcher = Watcher()
    monitor = ScaleMonitor(every_n_steps=4, folder=tmp_path)
    fit(tmp_path, monitor, watcher, max_steps=10)
    assert [snapshot.step for snapshot in snapshots(tmp_path)] == [0, 4, 8, 9]
    assert watcher.seen == [step in (0, 4, 8, 9) for step in range(10)]
    assert monitor.last == snapshots(tmp_path)[-1]


@pytest.mark.parametrize("callbacks", [[], [UnitScaling()], [UnitScaling(storage="unit")], [UnitScaling(format="fp8")]])
def test_training_is_the_same_bit_for_bit(tmp_path: Path, callbacks: list[pl.Callback]) -> None:
    options = {"max_steps": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    plain = fit(tmp_path, *callbacks, module=build(dropout=0.1), **options)
    watched = fit(tmp_path, *callbacks, ScaleMonitor(2, folder=tmp_path), module=build(dropout=0.1), **options)
    assert plain.losses == watched.losses
    assert_same_state(plain, watched)
    assert [snapshot.step for snapshot in snapshots(tmp_path)] == [0, 2, 4, 5]


def test_the_first_step_is_seen_as_it_is_taken_not_rehearsed(tmp_path: Path) -> None:
    fit(tmp_path, UnitScaling(storage="unit"), ScaleMonitor(folder=tmp_path), max_steps=1)
    for m in snapshots(tmp_path)[0].of("weight"):
        assert m.unscaled.rms == pytest.approx(1, rel=1e-4)
        assert m.unscaled.elements == math.prod(build().get_parameter(m.parameter).shape)  # seen once


def test_all_micro_batches_of_a_step_count(tmp_path: Path) -> None:
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        monitor = ScaleMonitor(folder=tmp_path / str(count))
        fit(tmp_path, monitor, module=build(batch_norm=False), max_steps=1, accumulate_grad_batches=count)
    one, two = (by_name(snapshots(tmp_path / str(count))[0]) for count in (1, 2))
    assert one.keys() == two.keys()
    for key, m in one.items():
        assert two[key].unscaled.elements == 2 * m.unscaled.elements
    # Lightning divides the loss of each by their number.
    largest = [m["head.weight", "gradient"].unscaled.largest for m in (one, two)]
    assert largest[1] == pytest.approx(largest[0] / 2, rel=0.3)


class Manual(Language):
    """Two optimizer steps a batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_manual_optimization(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fit(tmp_path, ScaleMonitor(4, folder=tmp_path), Watcher(), module=Manual(), max_steps=8)
    assert [snapshot.step for snapshot in snapshots(tmp_path)] == [0, 4]
    head = by_name(snapshots(tmp_path)[0])["head.weight", "gradient"]
    assert head.unscaled.rms > 0


def test_bf16_mixed_and_compiled(tmp_path: Path) -> None:
    module = build()
    module.block = torch.compile(module.block, backend="eager")
    fit(tmp_path, ScaleMonitor(2, folder=tmp_path), module=module, max_steps=3, precision="bf16-mixed")
    measured = {m.parameter for m in snapshots(tmp_path)[-1].of("gradient")}
    assert len(measured) == 7  # four of attention, two of the MLP, the head


def test_resume_goes_on_with_the_same_file(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "5.ckpt")

    fit(tmp_path, ScaleMonitor(4, folder=tmp_path), Save(), max_steps=5)
    resumed = trainer(tmp_path, ScaleMonitor(4, folder=tmp_path), max_steps=10)
    resumed.fit(build(), batches(), ckpt_path=tmp_path / "5.ckpt")
    assert [snapshot.step for snapshot in snapshots(tmp_path)] == [0, 4, 8, 9]


def test_an_exception_in_a_measured_step_leaves_nothing(tmp_path: Path) -> None:
    class Fails(Language):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("on purpose")

    module = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, ScaleMonitor(folder=tmp_path), module=module)
    assert_nothing_installed(module.trainer, module)


@pytest.mark.parametrize("order", [1, -1])
def test_an_error_of_unit_scaling_is_shown_and_leaves_nothing(tmp_path: Path, order: int) -> None:
    """Both wrap the strategy's methods, and an exception takes them off in the order of the callbacks."""
    module = Language()
    callbacks = [UnitScaling(skip=["heed*"]), ScaleMonitor(folder=tmp_path)][::order]
    with pytest.raises(UnitScalingError, match="heed"):
        fit(tmp_path, *callbacks, module=module)
    assert_nothing_installed(module.trainer, module)


def test_a_skipped_batch_leaves_nothing(tmp_path: Path) -> None:
    class Skips(Language):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    module = Skips()
    fit(tmp_path, ScaleMonitor(1, folder=tmp_path), module=module, max_steps=5)
    assert [snapshot.step for snapshot in snapshots(tmp_path)] == [0, 1, 2, 3, 4]
    assert_nothing_installed(module.trainer, module)


def test_another_wrapper_of_the_strategy_is_put_back(tmp_path: Path) -> None:
    calls = []

    class Wraps(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            inner = trainer.strategy.training_step

            def outer(*args: Any, **kwargs: Any) -> Any:
                calls.append(0)
                return inner(*args, **kwargs)

            trainer.strategy.training_step = outer

    fit(tmp_path, Wraps(), ScaleMonitor(2, folder=tmp_path), max_steps=4)
    assert len(calls) == 4


# --- what is logged ---------------------------------------------------------------------------------------------------


class Bar(pl.Callback):
    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values = dict(trainer.progress_bar_metrics)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, EventAccumulator, Bar]]:
    folder, bar = tmp_path_factory.mktemp("logged"), Bar()
    loggers = [CSVLogger(folder, "csv", ""), TensorBoardLogger(folder, "tb", "")]
    monitor = ScaleMonitor(every_n_steps=3, details=True, figures=True)
    fit(folder, UnitScaling(format="fp8"), monitor, bar, max_steps=5, logger=loggers)
    events = EventAccumulator(str(folder / "tb"), {"tensors": 0, "histograms": 0, "images": 0, "scalars": 0})
    yield folder, events.Reload(), bar


def test_scalars_of_every_step_go_to_every_logger(logged: tuple[Path, EventAccumulator, Bar]) -> None:
    folder, events, _ = logged
    found = snapshots(folder / "csv")  # beside the first logger's files
    assert [snapshot.step for snapshot in found] == [0, 3, 4]
    assert (folder / "csv" / "metrics.csv").read_text().count("unitscale/x/rms_median") == 1
    for name, value in {**summary(found[1]), **every_site(found[1])}.items():
        (event,) = [event for event in events.Scalars(name) if event.step == 3]
        assert event.value == pytest.approx(value, rel=1e-5)


def test_summary_is_of_the_casts_with_their_scales(logged: tuple[Path, EventAccumulator, Bar]) -> None:
    found = snapshots(logged[0] / "csv")
    assert "unitscale/gradient/unscaled_snr_db_min" not in summary(found[0])  # measured before there were scales
    scalars, gradients = summary(found[-1]), found[-1].of("gradient")
    assert scalars["unitscale/gradient/snr_db_min"] == min(m.scaled.snr_db for m in gradients if m.scaled)
    assert scalars["unitscale/gradient/unscaled_snr_db_min"] == min(m.unscaled.snr_db for m in gradients)
    assert scalars["unitscale/gradient/rms_max"] == max(m.unscaled.rms for m in gradients)


def test_histograms_and_figure_go_to_tensorboard(logged: tuple[Path, EventAccumulator, Bar]) -> None:
    folder, events, _ = logged
    first = snapshots(folder / "csv")[0]
    (histogram,) = [event for event in events.Histograms("unitscale/weight/log2") if event.step == 0]
    assert histogram.histogram_value.num == sum(sum(m.exponents.counts) for m in first.of("weight"))
    assert "unitscale/weight/head:linear/log2" in events.Tags()["histograms"]
    assert events.Images("unitscale/exponents")


class Weights(WandbLogger):
    """Weights & Biases without its package and its server: keeps what is logged."""

    def __init__(self) -> None:
        Logger.__init__(self)
        self._save_dir = self._experiment = None
        self.logged: list[dict[str, Any]] = []

    @property
    def experiment(self) -> Any:
        return None

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.append({**metrics, "step": step})

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.log_metrics({key: images}, step)


def test_histograms_and_figure_go_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    histogram = SimpleNamespace(Histogram=lambda np_histogram: np_histogram)
    monkeypatch.setitem(sys.modules, "wandb", histogram)
    logger = Weights()
    monitor = ScaleMonitor(every_n_steps=3, figures=True, folder=tmp_path)
    fit(tmp_path, monitor, max_steps=3, logger=logger)
    first = snapshots(tmp_path)[0]
    (found,) = [entry for entry in logger.logged if "unitscale/weight/log2" in entry and entry["step"] == 0]
    counts, edges = found["unitscale/weight/log2"]
    assert sum(counts) == sum(sum(m.exponents.counts) for m in first.of("weight"))
    assert len(edges) == len(counts) + 1
    assert edges[0] == min(m.exponents.first for m in first.of("weight"))
    (figure,) = logger.logged[-1]["unitscale/exponents"]
    assert type(figure).__name__ == "Figure"


def test_progress_bar_shows_what_the_casts_lose(logged: tuple[Path, EventAccumulator, Bar]) -> None:
    folder, _, bar = logged
    last = snapshots(folder / "csv")[-1]
    shown = {
        "snr_db": min(m.scaled.snr_db for m in last.measurements if m.scaled),
        "lost_%": 100 * max(m.scaled.flushed + m.scaled.saturated for m in last.measurements if m.scaled),
    }
    for name, value in shown.items():
        assert bar.values[name] == pytest.approx(value, rel=1e-5)


def test_progress_bar_without_a_format() -> None:
    """Nothing is cast, so nothing is lost: what a person can use is how near to 1 activations are."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for layer, factor in zip(layers, (3.9, 2.0, 1.0, 1.0), strict=True):  # what goes in: 1, 3.9, 7.8, 7.8
        nn.init.eye_(layer.weight)
        layer.weight.data *= factor
        nn.init.zeros_(layer.bias)
    snapshot = measure(layers, lambda m: m(torch.ones(2, 4)).mean())
    assert for_progress_bar(snapshot, asked=False) == {"x_near_1_%": 50.0}
    assert set(for_progress_bar(snapshot, asked=True)) == {"snr_db", "lost_%"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be a positive whole number"),
        ({"every_n_steps": "5"}, "every_n_steps='5'"),
        (
            {"format": "fp9"},
            r"format='fp9' is not known; choose one of 'fp8', .*'nvfp4', 'fp16', 'bf16'\. Did you mean 'fp8'",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScaleMonitor(**arguments)


def test_a_model_without_matmuls_writes_nothing(tmp_path: Path) -> None:
    class Scale(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.gain**2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fit(tmp_path, ScaleMonitor(folder=tmp_path), module=Scale(), data=batches(), max_steps=2)
    assert not list(tmp_path.glob("*.jsonl"))
