"""A record as scalars and histograms for Lightning's loggers, under `unitscale/…`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger

from lightning_unitscale.engine.runtime.operand_statistics import Statistics
from lightning_unitscale.formats import OPERANDS
from lightning_unitscale.monitor.exponents import Exponents
from lightning_unitscale.monitor.measurement import Measurement, Record

NEAR = 4.0  # e4m3 is as accurate for normal data with an RMS of this, or one over it, as of 1


def log_to(logger: Logger, record: Record, step: int, details: bool) -> None:
    """Scalars to any logger, histograms of exponents to those that have room for them: TensorBoard, Weights & Biases.

    Args:
        logger: of the Trainer.
        record: what was measured.
        step: the logger's own.
        details: every site by name, not the summary alone.
    """
    logger.log_metrics(summary(record) | (each(record) if details else {}), step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_histogram_raw"):
        for name, exponents in _histograms(record, details).items():
            _add_histogram(experiment, name, exponents, step)
    elif isinstance(logger, WandbLogger):
        from wandb import Histogram

        found = _histograms(record, details)
        pairs = {name: (list(e.counts), list(range(e.first, e.first + len(e.counts) + 1))) for name, e in found.items()}
        logger.log_metrics({name: Histogram(np_histogram=pair) for name, pair in pairs.items()}, step=step)


def log_figure(logger: Logger, name: str, figure: Any, step: int) -> None:
    """A matplotlib figure to a logger that takes one: TensorBoard, Weights & Biases."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(name, figure, step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], step=step)


def summary(record: Record) -> dict[str, float]:
    """For each operand, over all sites: the extremes and medians. Casts have the site's operand scale."""
    scalars: dict[str, float] = {}
    for operand in OPERANDS:
        found = record.of(operand)
        if not found:
            continue
        rms = [m.unscaled.rms for m in found]
        casts = [m.cast for m in found]
        values = {
            "rms_min": min(rms),
            "rms_median": median(rms),
            "rms_max": max(rms),
            "largest": max(m.unscaled.largest for m in found),
            "flushed_max": max(cast.flushed for cast in casts),
            "saturated_max": max(cast.saturated for cast in casts),
            "non_finite": float(sum(cast.non_finite for cast in casts)),
            **_snr("snr_db", casts),
            **(_snr("unscaled_snr_db", [m.unscaled for m in found]) if any(m.scaled for m in found) else {}),
        }
        scalars |= {f"unitscale/{operand}/{name}": value for name, value in values.items()}
    return scalars


def each(record: Record) -> dict[str, float]:
    """Every site and operand by name."""
    scalars: dict[str, float] = {}
    for m in record.measurements:
        values = {
            "rms": m.unscaled.rms,
            "largest": m.unscaled.largest,
            "flushed": m.cast.flushed,
            "saturated": m.cast.saturated,
            **({"snr_db": m.cast.snr_db} if m.cast.error else {}),
            **({} if m.scale is None else {"scale": m.scale}),
        }
        scalars |= {f"unitscale/{m.operand}/{m.site}/{name}": value for name, value in values.items()}
    return scalars


def for_progress_bar(record: Record, *, asked: bool) -> dict[str, float]:
    """One or two numbers: how many activations are of a size that any format holds, or what casts lose.

    Args:
        asked: whether the user named the record's format, and wants to know what it would lose though nothing is cast.
    """
    casts = [m.cast for m in record.measurements if asked or m.scaled]
    if not casts:
        rms = [m.unscaled.rms for m in record.of("x")]
        return {"x_near_1_%": 100 * sum(1 / NEAR <= r <= NEAR for r in rms) / len(rms)} if rms else {}
    numbers = {"lost_%": 100 * max(cast.flushed + cast.saturated for cast in casts)}
    ratios = _snr("snr_db", casts)
    return {"snr_db": ratios["snr_db_min"], **numbers} if ratios else numbers


def _snr(name: str, casts: Iterable[Statistics]) -> dict[str, float]:
    """Of the casts that change anything at all; the others have no finite ratio."""
    ratios = [cast.snr_db for cast in casts if cast.error]
    return {f"{name}_min": min(ratios), f"{name}_median": median(ratios)} if ratios else {}


def _histograms(record: Record, details: bool) -> dict[str, Exponents]:
    found = {f"unitscale/{operand}/log2": _together(record.of(operand)) for operand in OPERANDS if record.of(operand)}
    if details:
        found |= {f"unitscale/{m.operand}/{m.site}/log2": m.exponents for m in record.measurements}
    return {name: exponents for name, exponents in found.items() if exponents.counts}


def _together(measurements: Iterable[Measurement]) -> Exponents:
    total: Counter[int] = Counter()
    for m in measurements:
        total.update(dict(enumerate(m.exponents.counts, start=m.exponents.first)))
    if not total:
        return Exponents(0, ())
    first, last = min(total), max(total)
    return Exponents(first, tuple(total[exponent] for exponent in range(first, last + 1)))


def _add_histogram(experiment: Any, name: str, exponents: Exponents, step: int) -> None:
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
