"""One look at a model's matmul operands: what they are like, and what a cast to a narrow format makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.runtime.observer import OperandObserver
from lightning_unitscale.engine.runtime.operand_statistics import Accumulator, Statistics
from lightning_unitscale.errors import InputError
from lightning_unitscale.formats import FORMATS, OPERANDS, kind
from lightning_unitscale.monitor.exponents import Exponents, count_exponents

Scales = Mapping[tuple[UseId, str], float]  # by use and operand


@dataclass(frozen=True)
class Measurement:
    """One operand of one site.

    Attributes:
        parameter: name of the site's weight; of attention's own product, its module.
        op: short name of the function that uses it.
        operand: "x", "weight" or "gradient"; of attention's own product, "query", "left", … or "gradient".
        exponents: where its magnitudes lie, before any operand scale.
        unscaled: what casting it as it is does to it.
        scale: the power of two before the cast; None where the site has none.
        scaled: what casting it times `scale` does to it.
    """

    parameter: str
    op: str
    operand: str
    exponents: Exponents
    unscaled: Statistics
    scale: float | None = None
    scaled: Statistics | None = None

    @property
    def site(self) -> str:
        """As it is called in messages and charts."""
        part = "" if self.operand in OPERANDS else f".{self.operand}"
        return f"{self.parameter.removesuffix('.weight')}:{self.op}{part}"

    @property
    def kind(self) -> str:
        """Of "x", "weight" and "gradient", what the operand is."""
        return kind(self.operand)

    @property
    def cast(self) -> Statistics:
        """With the operand scale, if there is one."""
        return self.scaled or self.unscaled


@dataclass(frozen=True)
class Record:
    """Every operand of every site at one step.

    Attributes:
        label: whose numbers these are: "run" for the model that trains.
        step: optimizer steps taken before.
        format: a name in `FORMATS`.
    """

    label: str
    step: int
    format: str
    measurements: tuple[Measurement, ...]

    def of(self, kind: str) -> list[Measurement]:
        """The measurements of activations ("x"), weights or gradients, in the order of the sites' first calls."""
        return [measurement for measurement in self.measurements if measurement.kind == kind]

    def scales(self) -> dict[tuple[UseId, str], float]:
        """The powers of two that were in front of the casts."""
        return {(UseId(m.parameter, m.op), m.operand): m.scale for m in self.measurements if m.scale is not None}

    def append_to(self, file: Path) -> None:
        """One more line of JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, file: Path) -> list[Record]:
        """All records of a file, in the order of their steps; of one step, the last one written (a resumed run).

        Raises:
            InputError: a line that is not the last is not a record; the last may have been cut off by a crash.
        """
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found: dict[tuple[str, int], Record] = {}
        for number, line in enumerate(lines, start=1):
            try:
                record = cls._from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise InputError(
                    f"{file}, line {number}: not a measurement of ScaleMonitor ({error}); delete the line"
                ) from error
            found[record.label, record.step] = record
        return sorted(found.values(), key=lambda record: record.step)

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> Record:
        measurements = [
            Measurement(
                **{
                    **entry,
                    "exponents": Exponents(entry["exponents"]["first"], tuple(entry["exponents"]["counts"])),
                    "unscaled": Statistics(**entry["unscaled"]),
                    "scaled": None if entry["scaled"] is None else Statistics(**entry["scaled"]),
                }
            )
            for entry in data["measurements"]
        ]
        return cls(data["label"], data["step"], data["format"], tuple(measurements))


class Probe(Accumulator):
    """Sums up one operand: as it is, times its scale, and by exponent."""

    def __init__(self, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__(dtype)
        self.scaled = None if scale is None else Accumulator(dtype, scale)
        self.operand_scale = scale
        self.exponents: Tensor | None = None

    def add(self, tensor: Tensor) -> None:
        """Count one tensor in."""
        super().add(tensor)
        if self.scaled is not None:
            self.scaled.add(tensor)
        counts = count_exponents(tensor)
        self.exponents = counts if self.exponents is None else self.exponents + counts


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
        return Probe(FORMATS[self.format].dtype(operand), self._scales.get((use, operand)))

    def record(self, label: str, step: int) -> Record:
        """What was seen so far."""
        return Record(label, step, self.format, tuple(self._measurements()))

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
                    exponents=Exponents.of(probe.exponents),
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
) -> Record:
    """Run `step(module)` and its backward pass, and return what the operands were like; gradients are put back.

    Args:
        module: any module, scaled or not.
        step: runs a forward pass and returns the scalar loss.
        format: "fp8", "fp16" or "bf16".
        scales: powers of two to cast with, by ((parameter, function), operand); by default those of the module's plan.
        label: of the record.

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
    return probes.record(label, step=0)


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
