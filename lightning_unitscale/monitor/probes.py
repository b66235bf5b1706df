"""Measures the matmul operands of a running model: what they are like, and what a cast to a narrow format loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.spread_tensors import part_of, whole
from lightning_unitscale.engine.runtime.observer import OperandObserver
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator
from lightning_unitscale.errors import InputError
from lightning_unitscale.formats import FORMATS, Numbers
from lightning_unitscale.monitor.exponent_histogram import ExponentHistogram, count_exponents
from lightning_unitscale.monitor.snapshot import Measurement, Snapshot
from lightning_unitscale.monitor.updates import ROWS, WeightUpdate

Scales = Mapping[tuple[UseId, str], float]  # by use and operand


class Probe(Accumulator):
    """Sums up one operand: as it is, times its scale, and by exponent."""

    def __init__(self, numbers: Numbers, scale: float | None) -> None:
        super().__init__(numbers)
        self.scaled = None if scale is None else Accumulator(numbers, scale)
        self.operand_scale = scale
        self.exponents: Tensor | None = None
        self.last: Tensor | None = None  # rows of the latest tensor, for alignments

    def add(self, tensor: Tensor) -> None:
        """Count one tensor in."""
        super().add(tensor)
        if self.scaled is not None:
            self.scaled.add(tensor)
        if tensor.dim() > 1:
            self.last = whole(tensor.detach().flatten(0, -2)[:ROWS]).clone()
        counts = count_exponents(part_of(tensor))
        self.exponents = counts if self.exponents is None else self.exponents + counts

    def include(self, other: Accumulator) -> None:
        """Count in what another one saw; the latest tensor stays this one's."""
        super().include(other)
        assert isinstance(other, Probe)
        if self.scaled is not None and other.scaled is not None:
            self.scaled.include(other.scaled)
        if other.exponents is not None:
            counts = other.exponents
            self.exponents = counts if self.exponents is None else self.exponents + counts.to(self.exponents)


class Probes:
    """Watches the operands of every matmul that has a parameter; see `OperandObserver` for how.

    Args:
        module: any module, scaled or not.
        format: a name in `FORMATS`.
        scales: powers of two to cast with; sites without one are cast as they are.
    """

    def __init__(self, module: nn.Module, format: str, scales: Scales | None = None) -> None:
        self.format, self._scales = check_format(format), scales or {}
        self.observer = OperandObserver(module, self._probe)

    def _probe(self, use: UseId, operand: str) -> Probe:
        return Probe(FORMATS[self.format].numbers(operand), self._scales.get((use, operand)))

    def include_other_processes(self) -> None:
        """Count in, on rank 0, what the probes of all processes saw; every process must call it at the same step."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        first = dist.get_rank() == 0
        everywhere: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object({} if first else self.observer.found, everywhere)
        for found in everywhere or ():
            for use, probes in (found or {}).items():
                known = self.observer.found.setdefault(use, {})
                for operand, probe in probes.items():
                    if operand in known:
                        known[operand].include(probe)
                    else:
                        known[operand] = probe

    def snapshot(self, label: str, step: int, updates: tuple[WeightUpdate, ...] = ()) -> Snapshot:
        """What was seen so far."""
        return Snapshot(label, step, self.format, tuple(self._measurements()), updates)

    def linear_inputs(self) -> dict[str, Tensor]:
        """Rows of the latest input of every linear layer, by the name of its weight."""
        found = {}
        for use, probes in self.observer.found.items():
            probe = probes.get("x")
            if use.op == "linear" and isinstance(probe, Probe) and probe.last is not None:
                found[str(use.key)] = probe.last
        return found

    def _measurements(self) -> Iterator[Measurement]:
        for use, probes in self.observer.found.items():
            for operand, probe in probes.items():
                unscaled = probe.result()
                if not isinstance(probe, Probe) or unscaled is None or probe.exponents is None:
                    continue  # a frozen layer at the bottom has no gradient
                yield Measurement(
                    parameter=use.key,
                    op=use.op,
                    operand=operand,
                    exponents=ExponentHistogram.of(probe.exponents),
                    unscaled=unscaled,
                    scale=probe.operand_scale,
                    scaled=probe.scaled.result() if probe.scaled is not None else None,
                )


def measure(
    module: nn.Module,
    step: Callable[[Any], Tensor],
    format: str = "fp8",
    scales: Scales | None = None,
    label: str = "run",
) -> Snapshot:
    """Run `step(module)` and its backward pass, and return what the operands were like; gradients are put back.

    Args:
        module: any module, scaled or not.
        step: runs a forward pass and returns the scalar loss.
        format: a name in `FORMATS`.
        scales: powers of two to cast with, by ((parameter, function), operand); by default those of the module's plan.
        label: of the snapshot.

    Raises:
        InputError: the format is not known.
    """
    probes = Probes(module, format, plan_scales(plan_of(module)) if scales is None else scales)
    before = {parameter: parameter.grad for parameter in module.parameters()}
    for parameter in before:
        parameter.grad = None
    try:
        with torch.compiler.set_stance("force_eager"), probes.observer:
            step(module).backward()
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient
    return probes.snapshot(label, step=0)


def plan_scales(plan: Plan | None) -> dict[tuple[UseId, str], float]:
    """The operand scales of a plan."""
    return {
        (site.use, operand): scale
        for site in (plan.cast_sites if plan is not None else [])
        for operand, scale in site.operand_scales.items()
    }


def check_format(format: str) -> str:
    """
    Raises:
        InputError: it is not the name of a format.
    """
    if format in FORMATS:
        return format
    near = get_close_matches(str(format), FORMATS, n=1)
    raise InputError(
        f"format={format!r} is not known; choose one of {', '.join(map(repr, FORMATS))}."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )
