"""What a model's matmul operands were like at one step: the numbers, and their line in `monitor.jsonl`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.runtime.operand_statistics import Statistics
from lightning_unitscale.errors import InputError
from lightning_unitscale.formats import OPERANDS, kind
from lightning_unitscale.monitor.exponent_histogram import ExponentHistogram
from lightning_unitscale.monitor.updates import WeightUpdate

FILE = "monitor.jsonl"


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
    exponents: ExponentHistogram
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
class Snapshot:
    """Every operand of every site at one step.

    Attributes:
        label: whose numbers these are: "run" for the model that trains.
        step: optimizer steps taken before.
        format: a name in `FORMATS`.
        updates: what the step did to each parameter; none where no step was taken.
    """

    label: str
    step: int
    format: str
    measurements: tuple[Measurement, ...]
    updates: tuple[WeightUpdate, ...] = ()

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
    def read(cls, file: Path) -> list[Snapshot]:
        """All snapshots of a file, in the order of their steps; of one step, the last one written (a resumed run).

        Raises:
            InputError: a line that is not the last is not a snapshot; the last may have been cut off by a crash.
        """
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found: dict[tuple[str, int], Snapshot] = {}
        for number, line in enumerate(lines, start=1):
            try:
                snapshot = cls._from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise InputError(
                    f"{file}, line {number}: not a measurement of ScaleMonitor ({error}); delete the line"
                ) from error
            found[snapshot.label, snapshot.step] = snapshot
        return sorted(found.values(), key=lambda snapshot: snapshot.step)

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> Snapshot:
        measurements = [
            Measurement(
                **{
                    **entry,
                    "exponents": ExponentHistogram(entry["exponents"]["first"], tuple(entry["exponents"]["counts"])),
                    "unscaled": Statistics(**entry["unscaled"]),
                    "scaled": None if entry["scaled"] is None else Statistics(**entry["scaled"]),
                }
            )
            for entry in data["measurements"]
        ]
        updates = tuple(WeightUpdate(**entry) for entry in data.get("updates", ()))
        return cls(data["label"], data["step"], data["format"], tuple(measurements), updates)
