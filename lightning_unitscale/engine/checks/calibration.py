"""Measure operand scales: on the first step, and again on a few steps of a schedule.

While a step is measured, an `OperandObserver` sums up what the operands of every cast site are like. On the first step
nothing is cast; from then on, the casts of a measured step are those in use, so what it counts is what they lose. A
site whose cast changes an operand by more than `MOST_ERROR` of its RMS gets a new constant, is measured again on the
next step, and if that did not help is left in the compute dtype from then on; the plan says so. Healthy casts change
normal data by 2.7 % (e4m3) and 5.3 % (e5m2).

Operands that are all 0, as behind a zero-initialised weight, tell nothing of what will come, and an expert may get no
token: such a site keeps the scales it has; where it has none yet, it casts nothing, and is measured again soon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from math import log2

import torch
from torch import nn

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.runtime.fp8_gather import gathered_shards
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.engine.runtime.observer import OperandObserver
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator, Statistics, add_over_processes
from lightning_unitscale.engine.runtime.placement import check_placement
from lightning_unitscale.engine.runtime.row_statistics import RowAccumulator
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.formats import FORMATS, exponent, kind, supports
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.warn_user import warn_user

MOST_ERROR = 0.15
_SWITCHES = {"x": "activations", "weight": "weights", "gradient": "gradients"}


class Calibration:
    """The measurements of one prepared module.

    Args:
        module: with the plan in force.
        recalibrate: the steps at which scales are measured again.

    Raises:
        UnitScalingError: a module with a factor was replaced.
    """

    def __init__(self, module: nn.Module, plan: Plan, recalibrate: Sequence[int]) -> None:
        check_placement(module)
        self.module, self.plan, self.recalibrate = module, plan, tuple(recalibrate)
        self.step: int | None = None  # of the measurement under way
        self._open = ExitStack()
        self._observer: OperandObserver | None = None
        self._gathered: dict[UseId, Accumulator] = {}  # weights that products see rounded

    def due(self, step: int) -> bool:
        """Whether this step is to be measured.

        The first is, and those that the schedule names, those after a bad cast, and, as long as some operand has not
        been seen, those in which the number of steps has doubled.
        """
        self.plan.schedule_followed = True
        if not self.plan.cast_sites:
            return False
        done = self.plan.measured_at
        if not done or any(self._is_bad(site) for site in self.plan.cast_sites):
            return True
        if step > 2 * done[-1] and any(set(site.measured) != set(site.operands) for site in self.plan.cast_sites):
            return True
        return any(done[-1] < wanted <= step for wanted in self.recalibrate)

    def begin(self, step: int) -> None:
        """Watch operands from here on; compiled code runs uncompiled meanwhile."""
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        self._open.enter_context(self.observe(step))

    def observe(self, step: int) -> OperandObserver:
        """The observer of a measurement, to be entered; `finish` takes what it saw."""
        self._gathered = {}
        for use, shard in gathered_shards(self.module).items():
            accumulator = self._accumulator(use, "weight")
            if accumulator is not None:
                accumulator.add(shard)
                self._gathered[use] = accumulator
        self.step, self._observer = step, OperandObserver(self.module, self._accumulator)
        return self._observer

    def abort(self) -> None:
        """Stop watching and forget what was seen."""
        self._open.close()
        self.step = self._observer = None

    def finish(self) -> None:
        """Stop watching, and let the sites cast with scales that fit what was seen."""
        assert self._observer is not None
        assert self.step is not None
        found, step = self._observer.found, self.step
        for use, accumulator in self._gathered.items():
            found.setdefault(use, {})["weight"] = accumulator
        self.abort()
        uses = {use: sites for use, sites in self._uses() if sites}
        known = {
            use: {
                name: found.get(use, {}).get(name) or self._accumulator_of(sites[0], name) for name in sites[0].operands
            }
            for use, sites in uses.items()
        }
        every = [accumulator for of_use in known.values() for accumulator in of_use.values()]
        add_over_processes(every, next(self.module.parameters()).device)
        for use, sites in uses.items():
            self._take(use, sites, known[use], step)
        self.plan.measured_at.append(step)

    def _uses(self) -> Iterator[tuple[UseId, list[Site]]]:
        for use in casts_in_force(self.module):
            yield use, [site for site in self.plan.cast_sites if site.use == use]

    def _accumulator(self, use: UseId, operand: str) -> Accumulator | None:
        site = next((site for site in self.plan.cast_sites if site.use == use), None)
        return None if site is None or site.format is None else self._accumulator_of(site, operand)

    def _accumulator_of(self, site: Site, operand: str) -> Accumulator:
        numbers, scale = FORMATS[site.format or ""].numbers(operand), site.operand_scales.get(operand)
        if not site.row_sizes:
            return Accumulator(numbers, scale)
        sizes = {dim: site.row_sizes[which] for dim, which in _rows(site, operand).values()}
        return RowAccumulator(numbers, scale, sizes, next(self.module.parameters()).device)

    def _take(self, use: UseId, sites: list[Site], known: dict[str, Accumulator], step: int) -> None:
        seen = {operand: accumulator.result() for operand, accumulator in known.items()}
        was_bad = self._is_bad(sites[0])
        measured = dict(sites[0].measured)
        for operand, statistics in seen.items():
            if statistics is not None:
                _report_non_finite(sites[0], operand, statistics, step)
                if statistics.rms:
                    measured[operand] = asdict(statistics)
        zero = [operand for operand, statistics in seen.items() if statistics is not None and operand not in measured]
        for site in sites:
            site.measured = {operand: dict(value) for operand, value in measured.items()}
        if zero or not set(sites[0].operands) <= {*measured, "gradient"}:
            return  # no scale is known that would fit what comes after 0, so nothing is cast until it has come
        for site in sites:
            site.operand_scales = {operand: self._scale(site, operand) for operand in site.operands}
            site.row_exponents = self._row_exponents(site, known)
        if was_bad and self._is_bad(sites[0]):
            worst = max(measured, key=lambda operand: measured[operand]["error"])
            fall_back(
                self.module,
                self.plan,
                use,
                f"at step {step} casting its {worst} changed it by {measured[worst]['error']:.0%} of its RMS "
                f"({measured[worst]['saturated']:.1%} saturated, {measured[worst]['flushed']:.1%} flushed to 0)",
            )
        else:
            casts_in_force(self.module)[use].update()

    def _scale(self, site: Site, operand: str) -> float:
        if operand not in site.measured or not self._is_scaled(operand):  # a layer without gradient needs none
            return 1.0
        seen = site.measured[operand]
        return 2.0 ** exponent(seen["rms"], seen["largest"], FORMATS[site.format or ""].numbers(operand))

    def _row_exponents(self, site: Site, known: dict[str, Accumulator]) -> dict[str, list[int]]:
        """Those of rows that were all zero, or not seen yet, are the whole operand's."""
        found = {}
        for operand, accumulator in known.items():
            whole = round(log2(site.operand_scales[operand]))
            for name, (dim, which) in _rows(site, operand).items():
                if isinstance(accumulator, RowAccumulator) and accumulator.result() and self._is_scaled(operand):
                    found[name] = accumulator.exponents(dim, whole)
                else:
                    found[name] = site.row_exponents.get(name, [whole] * site.row_sizes[which])
        return found

    def _is_scaled(self, operand: str) -> bool:
        """Whether the options leave the operand's scale to us."""
        return bool(self.plan.options.get(_SWITCHES[kind(operand)], True))

    def _is_bad(self, site: Site) -> bool:
        return any(seen["error"] > MOST_ERROR for operand, seen in site.measured.items() if self._is_scaled(operand))


def _rows(site: Site, operand: str) -> dict[str, tuple[int, int]]:
    """What has scales of its own in an operand, by name: its dimension, and which of the site's `row_sizes` it has."""
    if not site.row_sizes:
        return {}
    out = MATMULS[site.op].output_dim
    return {
        "x": {"x columns": (-1, 1)},
        "weight": {"weight rows": (out, 0), "weight columns": (1 - out, 1)},
        "gradient": {"gradient columns": (-1, 0)},
    }[operand]


def fall_back(module: nn.Module, plan: Plan, use: UseId, reason: str) -> None:
    """Leave a use in the compute dtype from now on, and say so."""
    casts = casts_in_force(module)
    site = next(site for site in plan.cast_sites if site.use == use)
    warn_user(f"unit scaling: {site.name} stays in the compute dtype from now on: {reason}.")
    for site in plan.cast_sites:
        if site.use == use:
            site.format, site.format_reason = None, reason
            site.operand_scales, site.row_exponents = {}, {}
    casts.pop(use).scales = None


def check_device(module: nn.Module, plan: Plan) -> None:
    """
    Raises:
        UnitScalingError: the device has no numbers of a format that the plan asks for.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    for name in sorted({site.format for site in plan.cast_sites if site.format is not None}):
        missing = [dtype for dtype in FORMATS[name].dtypes if not supports(dtype, device)]
        if missing:
            raise UnitScalingError(
                f"format={name!r}: the device {device} has no {missing[0]}. Use another format or format=None "
                "there, or a CPU or CUDA device."
            )


def warn_of_no_casts(module: nn.Module, plan: Plan) -> None:
    """Say so where a format was asked for, and no matmul is cast."""
    if plan.options["format"] is None or plan.cast_sites:
        return
    reasons = dict.fromkeys(f"{site.name}: {site.format_reason}" for site in plan.sites if site.format_reason)
    why = "; ".join(list(reasons)[:3]) or "no matmul has a weight"
    warn_user(
        f"unit scaling: format={plan.options['format']!r} casts nothing in {type(module).__name__}, which runs in the "
        f"compute dtype ({why})."
    )


def _report_non_finite(site: Site, operand: str, statistics: Statistics, step: int) -> None:
    if statistics.non_finite:
        warn_user(
            f"unit scaling: at step {step} the {operand} of {site.name} ({site.use.key}) has "
            f"{statistics.non_finite} elements that are NaN or infinite, which a cast to {site.format} would hide."
        )
