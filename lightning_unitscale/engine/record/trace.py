"""What was seen in one step of a model: a graph of torch calls.

`Value` is a tensor at one moment, `Call` one torch function call; a tensor changed in place becomes a new value. Each
names itself alone: written out with all it leads to, as a dataclass would, a graph has no end.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_unitscale.engine.record.keys import ParameterKey
from lightning_unitscale.engine.record.places import HOOK, Frame, Place
from lightning_unitscale.ops.call import FunctionCall


@dataclass(eq=False, repr=False)
class Value:
    """A tensor as one call left it.

    Attributes:
        parameters: names of the parameters it is computed from, if from nothing else but constants
            (a view, a cast, a weight-norm expression); empty for an activation.
        expression: something else than views and casts was done to the parameters (1 + w, weight norm).
        is_complex: its elements are complex numbers, which `is_float` counts in.
        constant: no parameter and no input of the step went into it.
        noise: random numbers went into it, and nothing else but constants.
        number: its value, when it is a 0-dim constant.
        rms: root mean square, taken only for operands and outputs of matmul-like calls.
        largest: of the magnitudes of its elements, taken only for outputs of elementwise functions.
    """

    index: int
    shape: tuple[int, ...]
    is_float: bool
    requires_grad: bool
    producer: Call | None = None
    parameters: tuple[str, ...] = ()
    expression: bool = False
    constant: bool = False
    noise: bool = False
    is_complex: bool = False
    number: float | None = None
    rms: float | None = None
    largest: float | None = None
    consumers: list[Call] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<value {self.index} {list(self.shape)}{' of ' * bool(self.parameters)}{', '.join(self.parameters)}>"

    @property
    def key(self) -> ParameterKey:
        """The name by which rules find a parameter or an expression of several parameters."""
        return ParameterKey.of(self.parameters)


@dataclass(eq=False, repr=False)
class Call(FunctionCall):
    """One torch function call; tensors in `args` and `kwargs` are replaced by their values.

    Attributes:
        frame: where it was made; None in a hook.
        ordinal: which call of its function in its frame it was, from 0.
        in_function: made by a hand-written `torch.autograd.Function`, or a checkpointed function that is no method,
            whose backward pass knows nothing of a factor put here.
        under_function: made while one ran, by it or by modules that it runs.
        where: the code that made it, as it is called in messages.
    """

    index: int
    name: str
    function: Any
    frame: Frame | None
    ordinal: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    in_function: bool = False
    under_function: bool = False
    where: str = ""

    def __repr__(self) -> str:
        return f"<call {self.index} {self.name} {self.inputs} -> {self.outputs}>"

    @property
    def place(self) -> Place:
        """Where in the code it was made; in `HOOK` if in no frame."""
        return Place(*(self.frame or HOOK), self.name, self.ordinal)

    @property
    def output(self) -> Value:
        """The first output."""
        return self.outputs[0]


@dataclass(repr=False)
class Trace:
    """The calls of one step, or of a few in a row, in order, and the values that are its losses.

    Attributes:
        ends: how many calls there were when each step ended.
        touched: for each frame, the keys of the parameters, and of what is made of them, that its own code hands to
            torch functions.
        spans: runs of modules that have neither parameters nor children.
        facts: what each parameter was like, by its first name.
        copies: tensors that no call made and that have the values of a parameter, as the step met them.
        gradients: what `torch.autograd.grad` took of parameters.
        written: trainable parameters that the step's own code writes to, and that code.
        transformed: a transform of torch.func (vmap, grad) ran part of the step on tensors of its own.
        in_transforms: the parameters that were among these, with the code that used them there.
        drew: whether the step drew random numbers.
        functions: names of the `torch.autograd.Function`s that were applied.
        reentrant: whether layers are checkpointed the reentrant way, of which a recording sees the insides.
        hooked: whether the step put hooks on tensors, which may change gradients.
    """

    calls: list[Call] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    losses: list[Value] = field(default_factory=list)
    loss_numbers: list[float] = field(default_factory=list)
    touched: dict[Frame, list[ParameterKey]] = field(default_factory=dict)
    spans: list[ModuleSpan] = field(default_factory=list)
    facts: dict[str, ParameterFacts] = field(default_factory=dict)
    copies: list[tuple[Value, Tensor]] = field(default_factory=list)
    gradients: list[GradientTaken] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)
    transformed: bool = False
    in_transforms: dict[str, str] = field(default_factory=dict)
    drew: bool = False
    functions: set[str] = field(default_factory=set)
    reentrant: bool = False
    hooked: bool = False

    def __repr__(self) -> str:
        return f"<trace of {len(self.calls)} calls, {len(self.losses)} losses>"

    def step_of(self, call: Call) -> int:
        """Which of the steps in a row made a call, from 0."""
        return bisect_right(self.ends, call.index)

    def distrust_functions(self) -> None:
        """Take what modules compute inside Functions for the Functions' own: it is not run again for the backward pass.

        A reversible network goes backward by other code than forward.
        """
        for call in self.calls:
            call.in_function |= call.under_function


@dataclass(eq=False)
class ModuleSpan:
    """One run of a module's forward: what went in, what came out, and the calls in between."""

    module: str
    inputs: list[Value]
    output: Value | None
    calls: range


@dataclass(eq=False)
class GradientTaken:
    """A call of `torch.autograd.grad`: the parameters among what it differentiates by, its results for them, where."""

    parameters: tuple[str, ...]
    results: list[Value]
    where: str


@dataclass(frozen=True)
class ParameterFacts:
    """What a parameter was like when the step was recorded."""

    shape: tuple[int, ...]
    rms: float
    trainable: bool
    is_constant: bool  # all its elements are equal, as in zeros and ones
    largest: float  # of the magnitudes of its elements
    is_set: bool = False  # a vector that is no draw about zero, but was set
    aliases: tuple[str, ...] = ()
