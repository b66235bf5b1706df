"""A snapshot in a few numbers: for loggers, under `unitscale/…`, and for the progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from lightning_unitscale.engine.runtime.operand_statistics import Statistics
from lightning_unitscale.formats import OPERANDS
from lightning_unitscale.monitor.snapshot import Snapshot

NEAR = 4.0  # e4m3 is as accurate for normal data with an RMS of this, or one over it, as of 1


def summary(snapshot: Snapshot) -> dict[str, float]:
    """For each operand, over all sites: the extremes and medians. Casts have the site's operand scale."""
    scalars: dict[str, float] = {}
    for operand in OPERANDS:
        found = snapshot.of(operand)
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
            "kurtosis_max": max((m.unscaled.kurtosis or 0.0 for m in found), default=0.0),
            **_snr("snr_db", casts),
            **(_snr("unscaled_snr_db", [m.unscaled for m in found]) if any(m.scaled for m in found) else {}),
        }
        scalars |= {f"unitscale/{operand}/{name}": value for name, value in values.items()}
    return scalars | _updates_by_role(snapshot)


def _updates_by_role(snapshot: Snapshot) -> dict[str, float]:
    """Extremes and medians of the updates of each role: their sizes, and their alignments with the input."""
    scalars: dict[str, float] = {}
    for role in dict.fromkeys(update.role for update in snapshot.updates):
        own = [update for update in snapshot.updates if update.role == role]
        sizes = [update.relative for update in own if update.relative is not None]
        alignments = [update.alignment for update in own if update.alignment is not None]
        for name, values in (("relative", sizes), ("alignment", alignments)):
            if values:
                extremes = {"min": min(values), "median": median(values), "max": max(values)}
                scalars |= {f"unitscale/update/{role or 'all'}/{name}_{end}": v for end, v in extremes.items()}
    return scalars


def every_site(snapshot: Snapshot) -> dict[str, float]:
    """Every site and operand by name."""
    scalars: dict[str, float] = {}
    for m in snapshot.measurements:
        values = {
            "rms": m.unscaled.rms,
            "largest": m.unscaled.largest,
            "flushed": m.cast.flushed,
            "saturated": m.cast.saturated,
            **({} if m.unscaled.kurtosis is None else {"kurtosis": m.unscaled.kurtosis}),
            **({"snr_db": m.cast.snr_db} if m.cast.error else {}),
            **({} if m.scale is None else {"scale": m.scale}),
        }
        scalars |= {f"unitscale/{m.operand}/{m.site}/{name}": value for name, value in values.items()}
    for update in snapshot.updates:
        of_step = {"relative": update.relative, "alignment": update.alignment}
        scalars |= {f"unitscale/update/{update.parameter}/{n}": v for n, v in of_step.items() if v is not None}
    return scalars


def for_progress_bar(snapshot: Snapshot, *, asked: bool) -> dict[str, float]:
    """One or two numbers: how many activations are of a size that any format holds, or what casts lose.

    Args:
        asked: whether the user named the format, and wants to know what it would lose though nothing is cast.
    """
    casts = [m.cast for m in snapshot.measurements if asked or m.scaled]
    if not casts:
        rms = [m.unscaled.rms for m in snapshot.of("x")]
        return {"x_near_1_%": 100 * sum(1 / NEAR <= r <= NEAR for r in rms) / len(rms)} if rms else {}
    numbers = {"lost_%": 100 * max(cast.flushed + cast.saturated for cast in casts)}
    ratios = _snr("snr_db", casts)
    return {"snr_db": ratios["snr_db_min"], **numbers} if ratios else numbers


def _snr(name: str, casts: Iterable[Statistics]) -> dict[str, float]:
    """Of the casts that change anything at all; the others have no finite ratio."""
    ratios = [cast.snr_db for cast in casts if cast.error]
    return {f"{name}_min": min(ratios), f"{name}_median": median(ratios)} if ratios else {}
