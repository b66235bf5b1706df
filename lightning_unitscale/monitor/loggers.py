"""Gives a snapshot to Lightning's loggers: scalars to all, histograms and figures to those that take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_unitscale.formats import OPERANDS
from lightning_unitscale.monitor.exponent_histogram import ExponentHistogram
from lightning_unitscale.monitor.scalars import every_site, summary
from lightning_unitscale.monitor.snapshot import Snapshot
from lightning_unitscale.namespaces import classes

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger


def log_to(logger: Logger, snapshot: Snapshot, step: int, details: bool) -> None:
    """Scalars to any logger, histograms of exponents to those that have room for them: TensorBoard, Weights & Biases.

    Args:
        logger: of the Trainer.
        snapshot: what was measured.
        step: the logger's own.
        details: every site by name, not the summary alone.
    """
    logger.log_metrics(summary(snapshot) | (every_site(snapshot) if details else {}), step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_histogram_raw"):
        for name, exponents in _histograms(snapshot, details).items():
            _add_histogram(experiment, name, exponents, step)
    elif isinstance(logger, classes("loggers.WandbLogger")):
        from wandb import Histogram

        found = _histograms(snapshot, details)
        pairs = {name: (list(e.counts), list(range(e.first, e.first + len(e.counts) + 1))) for name, e in found.items()}
        logger.log_metrics({name: Histogram(np_histogram=pair) for name, pair in pairs.items()}, step=step)


def log_figure(logger: Logger, name: str, figure: Any, step: int) -> None:
    """A matplotlib figure to a logger that takes one: TensorBoard, Weights & Biases."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(name, figure, step)
    elif isinstance(logger, classes("loggers.WandbLogger")):
        logger.log_image(name, [figure], step=step)


def _histograms(snapshot: Snapshot, details: bool) -> dict[str, ExponentHistogram]:
    found = {
        f"unitscale/{operand}/log2": ExponentHistogram.merged(m.exponents for m in snapshot.of(operand))
        for operand in OPERANDS
    }
    if details:
        found |= {f"unitscale/{m.operand}/{m.site}/log2": m.exponents for m in snapshot.measurements}
    return {name: exponents for name, exponents in found.items() if exponents.counts}


def _add_histogram(experiment: Any, name: str, exponents: ExponentHistogram, step: int) -> None:
    """Of log2 |t|, in steps of one: the buckets are what was counted."""
    first, counts = exponents.first, exponents.counts
    middles = [first + position + 0.5 for position in range(len(counts))]
    experiment.add_histogram_raw(
        name,
        min=first,
        max=first + len(counts),
        num=sum(counts),
        sum=sum(m * n for m, n in zip(middles, counts, strict=True)),
        sum_squares=sum(m * m * n for m, n in zip(middles, counts, strict=True)),
        bucket_limits=[first + position + 1 for position in range(len(counts))],
        bucket_counts=list(counts),
        global_step=step,
    )
