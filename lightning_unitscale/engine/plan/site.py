"""What a plan says of one place where parameters are used, or where a factor stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_unitscale.engine.plan.factors import Factor, product
from lightning_unitscale.engine.record.deep_copies import shared_by_copies
from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.record.places import EVERY_CALL, Place
from lightning_unitscale.formats import OPERANDS

READING = "reading"  # the role of a site where code reads a weight's value beside its uses


@shared_by_copies
@dataclass
class Site:
    """One place in the model where a factor stands, or a matmul that needs none.

    Attributes:
        module, method: whose code makes the call ("" is the root module).
        op: short name of the torch function; "output" for a whole parameter-free module.
        role: of its weight, or "attention" | "activation" | "residual" | "sum" for a parameter-free site, READING for
            code that reads a weight beside its uses.
        params: keys of the parameters it uses.
        multiplier: of its weight, or of its output.
        multipliers: by key.
        causes: where the multipliers come from: the factors of each, by key ("" for a parameter-free site).
        factors: what of them stays explicit in the forward pass, by key ("" for a parameter-free site).
        ordinal: which call (0, 1, …) of `op` in its frame, for a parameter-free site; EVERY_CALL for all of them.
        calls_in_frame: how many calls of `op` one run of its frame makes at most, for a parameter-free site.
        operand: position of the argument that takes the factor: the branch of an addition, the query of a product.
        last_dim: size of the last dimension that argument must have, where it does not depend on the data.
        divides_along: the dimension over which each call's own output is divided by its max|f| / √n, in place of a
            constant factor; the multiplier is then the factor of the recorded step.
        fold_into: the uses whose multipliers can take the factor; empty where none can.
        folded: nothing stays explicit.
        beside: a parameter-free site that did not decide, folded into weights that have the factor of one on the loss's
            path: it is beside the loss, or of a module that did not run.
        calls: how often it was called in the recorded step.
        rms_before, rms_after: RMS of its operands and output, untouched and under the plan.
        reason: why it has no factor, or why its factor could not be folded.
        format: what its operands are cast to, see `formats.FORMATS`; None for the compute dtype.
        format_reason: why it is left in the compute dtype though a format was asked for.
        upcast: why, with operands in FP8, its products are made of upcast ones on every device; empty where tensor
            cores make them.
        operands: what is cast: "x", "weight" and "gradient"; of attention's own products, the function's operands
            ("query", "key", "value"; "left", "right"; positions in an einsum) and "gradient".
        operand_scales: the powers of two before the casts of the operands; empty until measured.
        row_sizes: numbers of outputs and of inputs, where rows of the operands have scales of their own; else empty.
        row_exponents: the powers k of these scales 2^k: "x columns", "weight rows", "weight columns" and "gradient
            columns", of the matrices x: (tokens, inputs), weight: (outputs, inputs), gradient: (tokens, outputs).
        measured: for each operand, what it was like when last measured (see `statistics.Statistics`): rms, largest,
            flushed, saturated, error.
    """

    module: str
    method: str
    op: str
    role: str
    params: list[ParameterKey] = field(default_factory=list)
    multiplier: float = 1.0
    multipliers: dict[str, float] = field(default_factory=dict)
    causes: dict[str, list[Factor]] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    ordinal: int | None = None
    calls_in_frame: int = 1
    operand: int | None = None
    last_dim: int | None = None
    divides_along: int | None = None
    fold_into: list[UseId] = field(default_factory=list)
    folded: bool = True
    beside: bool = False
    calls: int = 1
    rms_before: dict[str, float] = field(default_factory=dict)
    rms_after: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    format: str | None = None
    format_reason: str = ""
    upcast: str = ""
    operands: list[str] = field(default_factory=lambda: list(OPERANDS))
    operand_scales: dict[str, float] = field(default_factory=dict)
    row_sizes: list[int] = field(default_factory=list)
    row_exponents: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    def set_factors(self, key: str, factors: Sequence[Factor]) -> None:
        """Give the parameter `key`, or the site itself ("") if it has none, its multiplier, and remember why."""
        self.causes[key] = list(factors)
        value = product(factors)
        if key:
            self.multipliers[key] = value
        if not key or key == self.params[0]:
            self.multiplier = value

    def leave_alone(self, reason: str) -> None:
        """Take the factor of a parameter-free site away."""
        self.set_factors("", [])
        self.fold_into, self.reason = [], reason

    @property
    def name(self) -> str:
        """As it is called in messages: module, function, and which call of it."""
        call = self.op if self.ordinal in (None, EVERY_CALL) else f"{self.op}#{self.ordinal}"
        method = "" if self.method == "forward" else f".{self.method}"
        return f"{self.module or '<root>'}{method}:{call}"

    @property
    def place(self) -> Place:
        """Where it is found again, if it is parameter-free; elsewhere, where it was called first."""
        return Place(self.module, self.method, self.op, self.ordinal)

    @property
    def use(self) -> UseId:
        """What its casts go by: its weight, or its place in the code."""
        place = self.name.replace(f":{self.op}", "")
        return UseId(str(self.params[0]) if self.params else place, self.op)
