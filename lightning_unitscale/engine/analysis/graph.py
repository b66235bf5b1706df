"""What the calls of a trace do to scale: which are sites, which are norms, and in what each call is linear.

A call is *linear* in some of its inputs when a constant passes from them to its output unchanged: views, casts,
dropout, rotations, concatenation, sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from lightning_unitscale.engine.analysis.loss_path import deciding_calls, learned_calls, uses
from lightning_unitscale.engine.record.trace import Call, Trace, Value
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.ops.convolution import Convolution
from lightning_unitscale.ops.torch_functions import (
    ACCUMULATES,
    HOMOGENEOUS,
    JOINS,
    NORMALIZERS,
    NORMS,
    PASSTHROUGH,
    PICKS,
    VIEWS,
)

_REDUCED_PASS = PASSTHROUGH | {"add", "clamp", "clamp_min", "reciprocal", "mul", "div", "rdiv", "maximum", "square"}


@dataclass(frozen=True)
class Source:
    """Where a value comes from through linear calls: the value, and the model's own constant on the way."""

    value: Value
    model_constant: float


@dataclass(frozen=True)
class Norm:
    """A normalisation of `x`; `statistics` are the calls that compute its scale, where it is spelled out."""

    call: Call
    x: Value
    statistics: frozenset[int] = frozenset()


class Graph:
    """The calls of one trace; everything is computed when asked for.

    Args:
        whole: take calls beside the loss in, all but those of hooks; without, the plan is made from this graph.
    """

    def __init__(self, trace: Trace, whole: bool = False) -> None:
        self.trace = trace
        self.learned = learned_calls(trace)
        self._deciding = deciding_calls(trace, self.learned)
        if whole:
            self._deciding |= {call.index for call in trace.calls if call.frame is not None}
        self.calls = [call for call in trace.calls if self.decides(call)]

    def decides(self, call: Call) -> bool:
        """Whether `call` is one of this graph: logging, say, must not change a plan."""
        return call.index in self._deciding

    def consumers(self, value: Value) -> list[Call]:
        """The calls of this graph that `value` goes into."""
        return [call for call in value.consumers if self.decides(call)]

    # --- linear calls ------------------------------------------------------------------------------------------

    def linear_inputs(self, call: Call) -> list[Source] | None:
        """The inputs in which `call` is linear, each with its constant; None when it is not linear."""
        name, inputs = call.name, [value for value in call.inputs if value.is_float]
        if not inputs or call in self.norms:
            return None
        if name in PASSTHROUGH or name in HOMOGENEOUS:
            return [Source(inputs[0], 1.0)]
        if name in ("mul", "div"):
            return self.product_inputs(call)
        if name in ("add", "sub"):
            if any(value.constant or not value.requires_grad for value in inputs) or len(inputs) < 2:
                return None
            return [Source(value, 1.0) for value in inputs]
        if name in JOINS or name in ACCUMULATES:
            moving = [value for value in inputs if not value.constant]
            return [Source(value, 1.0) for value in moving] or None
        if name == "masked_fill" and call.argument(2, "value") == 0:
            return [Source(inputs[0], 1.0)]
        if name == "where":
            return [Source(value, 1.0) for value in inputs if not value.constant] or None
        if name in MATMULS and sum(value.requires_grad for value in inputs) == 1 and not self.is_site(call):
            return [Source(value, 1.0) for value in inputs if value.requires_grad]
        return None

    def product_inputs(self, call: Call) -> list[Source] | None:
        """`linear_inputs` of a multiplication or division."""
        left, right = call.argument(0, "input"), call.argument(1, "other")
        if call.name == "mul" and not isinstance(left, Value):
            left, right = right, left
        if not isinstance(left, Value):
            return None
        number = number_of(right)
        if number is not None and number != 0:
            return [Source(left, abs(number if call.name == "mul" else 1 / number))]
        number = number_of(left)
        if number is not None and number != 0 and call.name == "mul" and isinstance(right, Value):
            return [Source(right, abs(number))]
        if not isinstance(right, Value):
            return None
        moving = [value for value in (left, right) if value.requires_grad and not value.parameters]
        if len(moving) == 1 and (call.name == "mul" or moving[0] is left):
            return [Source(moving[0], 1.0)]
        if call.name == "mul" and len(moving) == 2:
            full = [value for value in moving if value.shape == call.output.shape]
            return [Source(full[0], 1.0)] if len(full) == 1 else None
        return None

    # --- sites -------------------------------------------------------------------------------------------------

    def is_site(self, call: Call) -> bool:
        """Whether `call` is a matmul-like function with a parameter as a multiplicand."""
        return call.index in self._sites

    @cached_property
    def _sites(self) -> dict[int, Call]:
        return {call.index: call for call in self.calls if self.weights_of(call)}

    @cached_property
    def bare_weights(self) -> set[str]:
        """Names of the parameters that some matmul multiplies by as they are."""
        weights = (value for call in self.sites for value in self.weights_of(call))
        return {name for value in weights if not value.expression for name in value.parameters}

    @property
    def sites(self) -> list[Call]:
        """The matmul-like calls with a parameter, in order."""
        return list(self._sites.values())

    def weights_of(self, call: Call) -> dict[Value, str]:
        """The parameter operands of a matmul-like call that multiply, with their labels; a layer's input is none."""
        if call.name not in MATMULS or not call.outputs or call.outputs[0].parameters:
            return {}
        op = MATMULS[call.name]
        has_input = "weight" in op.operands(call)
        return {
            value: label
            for label, value in op.multiplicands(call).items()
            if isinstance(value, Value) and value.parameters and not (label == "x" and has_input)
        }

    def feature_dimension(self, value: Value) -> int:
        """Counted from behind: channels of what comes from a convolution elementwise, else the last dimension."""
        call = value.producer
        while call is not None and call.name not in VIEWS:
            if isinstance(op := MATMULS.get(call.name), Convolution):
                return -len(op.operands(call)["weight"].shape) + 1
            if op is not None:
                break
            call = next((above.producer for above in call.inputs if above.is_float), None)
        return -1

    # --- norms -------------------------------------------------------------------------------------------------

    @cached_property
    def norms(self) -> dict[Call, Norm]:
        """Normalisations: the functions of that name, and `x · rsqrt(mean(x²))` spelled out."""
        found = {}
        for call in self.calls:
            if call.name in NORMS and call.inputs and not call.output.parameters:
                found[call] = Norm(call, call.inputs[0])
            elif call.name in ("mul", "div") and len(call.inputs) == 2 and not call.output.parameters:
                orders = [call.inputs, call.inputs[::-1]] if call.name == "mul" else [call.inputs]
                for x, scale in orders:
                    if self._is_normalizer(scale, x):
                        found[call] = Norm(call, x, self._calls_between(x, scale))
                        break
        return found

    @staticmethod
    def _is_normalizer(scale: Value, x: Value) -> bool:
        if scale.shape == x.shape or scale.parameters or scale.constant or scale.is_float is False:
            return False
        value, depth = scale, 0
        while value.producer is not None and depth < 8:
            call = value.producer
            if call.name in NORMALIZERS or (call.name == "pow" and call.argument(1, "exponent") == -0.5):
                return True
            if call.name not in _REDUCED_PASS:
                return False
            moving = [v for v in call.inputs if not v.constant]
            if len(moving) != 1:
                return False
            value, depth = moving[0], depth + 1
        return False

    @staticmethod
    def _calls_between(start: Value, end: Value) -> frozenset[int]:
        found: set[int] = set()
        pending = [end]
        while pending:
            call = pending.pop().producer
            if call is not None and call.index not in found and call.output.index > start.index:
                found.add(call.index)
                pending.extend(value for value in call.inputs if value is not start)
        return frozenset(found)

    @cached_property
    def gains(self) -> dict[Call, Norm]:
        """Multiplications of a norm's output by a parameter, and additions of a parameter to that."""
        found: dict[Call, Norm] = {}
        for norm in self.norms.values():
            pending = [norm.call.output]
            while pending:
                for call in self.consumers(pending.pop()):
                    if call.name in PASSTHROUGH:
                        pending.extend(call.outputs)
                    elif (
                        call.name in ("mul", "add")
                        and any(value.parameters and prod(value.shape) > 1 for value in call.inputs)
                        and call not in found
                        and call not in self.norms
                    ):
                        found[call] = norm
                        pending.extend(call.outputs)
        return found

    def goes_only_into_norms(self, value: Value) -> bool:
        """Whether every use of `value` (through views and casts) is as the input of a norm."""
        pending, reached = [value], False
        while pending:
            current = pending.pop()
            norms = [norm for norm in self.norms.values() if norm.x is current]
            inside = {norm.call.index for norm in norms}.union(*(norm.statistics for norm in norms))
            reached = reached or bool(norms)
            consumers = self.consumers(current)
            for call in consumers:
                if call.index in inside:
                    continue
                if call.name not in PASSTHROUGH:
                    return False
                pending.extend(call.outputs)
            if not consumers:
                return False
        return reached

    # --- what no data go into ----------------------------------------------------------------------------------

    @cached_property
    def data_free(self) -> set[Value]:
        """What is made of parameters, constants and random numbers alone, also where it counts as an activation."""
        found: set[Value] = set()
        for call in self.trace.calls:
            if all(value.parameters or value.constant or value in found for value in call.inputs):
                found.update(call.outputs)
        return found

    def parts(self, value: Value) -> set[str]:
        """Names of the parameters that a value without data is made of."""
        found, pending, seen = set(value.parameters), [value], {value}
        while pending:
            current = pending.pop()
            for above in current.producer.inputs if current.producer and current in self.data_free else ():
                found.update(above.parameters)
                if above not in seen:
                    seen.add(above)
                    pending.append(above)
        return found

    # --- the way to the loss -----------------------------------------------------------------------------------

    @cached_property
    def to_loss(self) -> set[int]:
        """Indices of the calls that the loss depends on."""
        found: set[int] = set()
        pending = list(self.trace.losses)
        while pending:
            call = pending.pop().producer
            if call is not None and call.index not in found and self.decides(call):
                found.add(call.index)
                pending.extend(call.inputs)
        return found

    @cached_property
    def feeds_matmul(self) -> set[int]:
        """Indices of the calls whose output reaches a matmul with a parameter on the way to the loss.

        For a learned call that is the way that gradients take: choosing the next token by the logits is no use of them.
        For one that this step's loss does not depend on, any way: it may be the head of another step's.
        """
        found: set[int] = set()
        for call in reversed(self.calls):
            way = next((way for way in (self.learned, self.to_loss) if call.index in way), self._deciding)
            for consumer in (c for output in call.outputs for c in self.consumers(output)):
                if consumer.index in way and (consumer.index in found or self.is_site(consumer)):
                    found.add(call.index)
                    break
        return found

    @cached_property
    def after_site(self) -> set[int]:
        """Indices of the calls whose output a matmul with a parameter, a lookup or a norm went into."""
        found: set[int] = set()
        for call in self.calls:
            above = (value.producer for value in call.inputs)
            begins = self.is_site(call) or call in self.norms or (call.name in PICKS and bool(uses(call)))
            if begins or any(c is not None and c.index in found for c in above):
                found.add(call.index)
        return found


def number_of(argument: object) -> float | None:
    """The value of an argument that is a number or a 0-dim constant."""
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return float(argument)
    return argument.number if isinstance(argument, Value) else None
