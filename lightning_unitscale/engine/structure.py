"""Find a model's structure in a trace: norms, attention, residual streams, sums, activations.

Everything here is a question about the graph of calls; no statistic of the data is used.

A call is *linear* in some of its inputs when a constant passes from them to its output unchanged: views, casts,
dropout, rotations, concatenation, sums. `sources` follows linear calls upward to where a tensor really comes
from, `targets` follows them downward to where it is really used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from lightning_unitscale.engine.functions import (
    ACCUMULATES,
    ACTIVATIONS,
    ELEMENTWISE,
    HOMOGENEOUS,
    JOINS,
    NORMALIZERS,
    NORMS,
    PASSTHROUGH,
    SOFTMAX,
)
from lightning_unitscale.engine.trace import Call, ModuleSpan, Trace, Value
from lightning_unitscale.ops import MATMULS

_LOGITS_PASS = PASSTHROUGH | {"masked_fill", "where", "clamp", "tanh", "maximum", "minimum"}
_BIAS_PASS = PASSTHROUGH | {"add", "sub", "mul", "where", "masked_fill", "sum", "sigmoid", "neg", "log"}
_REDUCED_PASS = PASSTHROUGH | {"add", "clamp", "clamp_min", "reciprocal", "mul", "div", "rdiv", "maximum", "square"}


@dataclass(frozen=True)
class Source:
    """Where a value comes from through linear calls: the value, and the model's own constant on the way."""

    value: Value
    own: float


@dataclass(frozen=True)
class Norm:
    """A normalisation of `x`; `statistics` are the calls that compute its scale, where it is spelled out."""

    call: Call
    x: Value
    statistics: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Attention:
    """One product of queries and keys.

    Attributes:
        call: `scaled_dot_product_attention`, or the matmul whose output reaches a softmax.
        own: the model's own constant between the projections and the softmax.
        head_dim: number of terms in one query-key product.
    """

    call: Call
    own: float
    head_dim: int
    query: Value
    key: Value


@dataclass
class Branch:
    """One branch of a residual addition; `calls` is its inside, from the skip to the addition."""

    value: Value
    kind: str  # "attention" | "mlp"
    calls: frozenset[int]


@dataclass
class Residual:
    """`output = skip + branch [+ branch …]`; `add` is the call that joined the first branch to the sum."""

    calls: tuple[Call, ...]
    output: Value
    skip: Value
    branches: list[Branch]
    stream: int = -1


@dataclass
class Stream:
    """A chain of residual additions, each the skip of the next."""

    residuals: list[Residual] = field(default_factory=list)
    normed_links: int = 0
    links: int = 0

    @property
    def branch_count(self) -> int:
        """Branches of all its additions; parallel ones counted each."""
        return sum(len(residual.branches) for residual in self.residuals)


@dataclass(frozen=True)
class Sum:
    """An addition of independent tensors, none made from another."""

    call: Call
    terms: tuple[Value, ...]
    chain: tuple[int, ...]


@dataclass(frozen=True)
class Activation:
    """An elementwise function: one call, or one parameter-free module."""

    output: Value
    call: Call | None
    span: ModuleSpan | None


@dataclass
class _Logits:
    """Attention logits: their products (with the own constants after them), softmaxes, additions and biases."""

    products: dict[int, tuple[Call, float]] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    additions: set[int] = field(default_factory=set)
    biases: set[Value] = field(default_factory=set)


class Structure:
    """The structure of one trace, computed when asked for."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        # A logging hook must not change the plan.
        self.calls = [call for call in trace.calls if call.frame is not None or call.index in self.to_loss]
        for call in set(trace.calls).difference(self.calls):
            for value in call.inputs:
                value.consumers = [consumer for consumer in value.consumers if consumer is not call]

    # --- linear following -------------------------------------------------------------------------------------

    def linear_inputs(self, call: Call) -> list[Source] | None:
        """The inputs in which `call` is linear, each with its constant; None when it is not linear."""
        name, inputs = call.name, [value for value in call.inputs if value.is_float]
        if not inputs or call in self.norms:
            return None
        if name in PASSTHROUGH or name in HOMOGENEOUS:
            return [Source(inputs[0], 1.0)]
        if name in ("mul", "div"):
            return self._product_inputs(call)
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

    def _product_inputs(self, call: Call) -> list[Source] | None:
        left, right = call.argument(0, "input"), call.argument(1, "other")
        if call.name == "mul" and not isinstance(left, Value):
            left, right = right, left
        if not isinstance(left, Value):
            return None
        number = _number(right)
        if number is not None and number != 0:
            return [Source(left, abs(number if call.name == "mul" else 1 / number))]
        number = _number(left)
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

    def sources(self, value: Value) -> tuple[list[Source], frozenset[int]]:
        """Where `value` comes from through linear calls, and the indices of those calls.

        Stops at parameters, at every site (a matmul with a parameter, a norm and its gain) and at residual sums.
        """
        found: dict[Value, Source] = {}
        passed: set[int] = set()
        pending, seen = [Source(value, 1.0)], {value}
        while pending:
            source = pending.pop()
            call = source.value.producer
            above = None
            if call is not None and not source.value.parameters and not self._ends_walk(call):
                above = self.linear_inputs(call)
            if above is None:
                found.setdefault(source.value, source)
                continue
            assert call is not None
            passed.add(call.index)
            for step in above:
                if step.value not in seen:
                    seen.add(step.value)
                    pending.append(Source(step.value, source.own * step.own))
        return list(found.values()), frozenset(passed)

    def _ends_walk(self, call: Call) -> bool:
        return self.is_site(call) or call in self.gains or call.index in self._residual_calls

    def own_constant(self, value: Value) -> float:
        """The model's own constants that multiplied `value` since it last left something not linear."""
        product, seen = 1.0, 0
        while value.producer is not None and seen < 64:
            call = value.producer
            if self.is_site(call) or call.name not in PASSTHROUGH | {"mul", "div", "neg"}:
                break
            above = self.linear_inputs(call)
            if above is None or len(above) != 1:
                break
            value, product, seen = above[0].value, product * above[0].own, seen + 1
        return product

    def own_constant_after(self, value: Value) -> float:
        """The model's own constants that multiply `value` before anything not linear uses it.

        A soft cap, c · tanh(x / c), has slope 1 and is no such constant.
        """
        product = 1.0
        while len(value.consumers) == 1:
            (call,) = value.consumers
            if call.name == "tanh":
                value = call.output
                continue
            if self.is_site(call) or call.name not in PASSTHROUGH | {"mul", "div", "neg"}:
                break
            above = self.linear_inputs(call)
            if above is None or above[0].value is not value:
                break
            product, value = product * above[0].own, call.output
        return product

    def only_feeds(self, value: Value, passed: frozenset[int], end: set[int]) -> bool:
        """Whether everything made from `value` goes through `passed` into the calls `end`."""
        pending, seen = [value], {value}
        reached = False
        while pending:
            for call in pending.pop().consumers:
                if call.index in end:
                    reached = True
                elif call.index in passed:
                    new = [output for output in call.outputs if output not in seen]
                    seen.update(new)
                    pending.extend(new)
                else:
                    return False
        return reached

    def targets(self, value: Value) -> list[Call] | None:
        """The matmuls with parameters that `value` reaches through linear calls and gates, if nothing else uses it."""
        found: list[Call] = []
        pending, seen = [value], {value}
        while pending:
            current = pending.pop()
            if not current.consumers:
                if current.producer is None or not current.producer.outputs or len(current.producer.outputs) == 1:
                    return None
                continue
            for call in current.consumers:
                if self.is_site(call) and call.name in MATMULS:
                    if current in self.weights_of(call):
                        return None
                    found.append(call)
                    continue
                if not self._scales_with(call, seen):
                    return None
                new = [output for output in call.outputs if output not in seen]
                seen.update(new)
                pending.extend(new)
        return found or None

    def _scales_with(self, call: Call, scaled: set[Value]) -> bool:
        """Whether `call` multiplies its output by k when every value in `scaled` is multiplied by k."""
        if call in self.norms or call.index in self._residual_calls:
            return False
        if call.name == "mul":
            return sum(value in scaled for value in call.inputs) == 1
        if call.name in PASSTHROUGH or call.name in HOMOGENEOUS or call.name == "div":
            return bool(call.inputs) and call.inputs[0] in scaled and not any(v in scaled for v in call.inputs[1:])
        return False

    # --- sites ------------------------------------------------------------------------------------------------

    def is_site(self, call: Call) -> bool:
        """Whether `call` is a matmul-like function with a parameter as a multiplicand."""
        return call.index in self._sites

    @cached_property
    def _sites(self) -> dict[int, Call]:
        return {call.index: call for call in self.calls if self.weights_of(call)}

    @property
    def sites(self) -> list[Call]:
        """The matmul-like calls with a parameter, in order."""
        return list(self._sites.values())

    def weights_of(self, call: Call) -> dict[Value, str]:
        """The parameter operands of a matmul-like call that multiply, with their labels."""
        if call.name not in MATMULS or not call.outputs or call.outputs[0].parameters:
            return {}
        op = MATMULS[call.name]
        operands = op.operands(call.args, call.kwargs)
        return {
            value: label
            for label, value in operands.items()
            if isinstance(value, Value) and value.parameters and not op.is_bias(label, value.shape)
        }

    # --- norms ------------------------------------------------------------------------------------------------

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
                for call in pending.pop().consumers:
                    if call.name in PASSTHROUGH:
                        pending.extend(call.outputs)
                    elif (
                        call.name in ("mul", "add")
                        and any(value.parameters for value in call.inputs)
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
            for call in current.consumers:
                if call.index in inside:
                    continue
                if call.name not in PASSTHROUGH:
                    return False
                pending.extend(call.outputs)
            if not current.consumers:
                return False
        return reached

    # --- the way to the loss ----------------------------------------------------------------------------------

    @cached_property
    def to_loss(self) -> set[int]:
        """Indices of the calls that the loss depends on."""
        found: set[int] = set()
        pending = list(self.trace.losses)
        while pending:
            call = pending.pop().producer
            if call is not None and call.index not in found:
                found.add(call.index)
                pending.extend(call.inputs)
        return found

    @cached_property
    def feeds_matmul(self) -> set[int]:
        """Indices of the calls whose output reaches a matmul with a parameter on the way to the loss."""
        found: set[int] = set()
        for call in reversed(self.calls):
            for consumer in (c for output in call.outputs for c in output.consumers):
                if consumer.index in self.to_loss and (consumer.index in found or self.is_site(consumer)):
                    found.add(call.index)
                    break
        return found

    # --- attention --------------------------------------------------------------------------------------------

    @cached_property
    def _logits(self) -> _Logits:
        found = _Logits()
        for call in self.calls:
            if call.name == "scaled_dot_product_attention":
                query = MATMULS[call.name].operands(call.args, call.kwargs)["query"]
                scale = _number(call.argument(6, "scale"))
                found.products[call.index] = (call, query.shape[-1] ** -0.5 if scale is None else abs(scale))
                found.ends.add(call.index)
                mask = call.argument(3, "attn_mask")
                if isinstance(mask, Value):
                    found.biases |= self._ancestry(mask)
            elif call.name in SOFTMAX:
                above = self._product_above(call.inputs[0], found)
                if above is not None:
                    found.products.setdefault(above[0].index, above)
                    found.ends.add(call.index)
        return found

    @cached_property
    def attentions(self) -> list[Attention]:
        """The products of queries and keys, in order."""
        found = []
        for call, own in self._logits.products.values():
            operands = list(MATMULS[call.name].operands(call.args, call.kwargs).values())
            query, key = operands[:2] if call.name == "scaled_dot_product_attention" else operands[-2:]
            own *= self._shared_own(query) * self._shared_own(key)
            found.append(Attention(call, own, self._contraction(call), query, key))
        return found

    @property
    def logit_biases(self) -> set[Value]:
        """Values that are added to attention logits (masks, relative positions)."""
        return self._logits.biases

    def _shared_own(self, value: Value) -> float:
        return max((source.own for source in self.sources(value)[0]), default=1.0)

    @staticmethod
    def _contraction(call: Call) -> int:
        op = MATMULS[call.name]
        shapes = {
            label: value.shape
            for label, value in op.operands(call.args, call.kwargs).items()
            if isinstance(value, Value)
        }
        label = next(iter(shapes))
        return max(1, op.fan_in(label, shapes, call.args, call.kwargs))

    def _product_above(self, value: Value, found: _Logits) -> tuple[Call, float] | None:
        """The product of two activations above a softmax, with the constants on the way."""
        own, depth = 1.0, 0
        while value.producer is not None and depth < 32:
            call = value.producer
            depth += 1
            if call.name in MATMULS:
                return (call, own) if self._is_query_key_product(call) else None
            if call.name in ("add", "sub"):
                terms = [v for v in call.inputs if v.is_float]
                leading = [v for v in terms if self._product_above(v, _Logits()) is not None]
                if len(leading) != 1:
                    return None
                found.additions.add(call.index)
                for term in terms:
                    if term is not leading[0]:
                        found.biases |= self._ancestry(term)
                value = leading[0]
            elif call.name in ("mul", "div"):
                above = self._product_inputs(call)
                if above is None or len(above) != 1:
                    return None
                value, own = above[0].value, own * above[0].own
            elif call.name in _LOGITS_PASS:
                moving = [v for v in call.inputs if v.is_float and not v.constant and v.requires_grad]
                if not moving:
                    return None
                value = moving[0]
            else:
                return None
        return None

    def _is_query_key_product(self, call: Call) -> bool:
        if self.is_site(call) or call.name not in ("matmul", "rmatmul", "bmm", "baddbmm", "einsum"):
            return False
        operands = [v for v in MATMULS[call.name].operands(call.args, call.kwargs).values() if isinstance(v, Value)]
        return all(not value.constant for value in operands[-2:])

    @staticmethod
    def _ancestry(value: Value) -> set[Value]:
        """What a logit bias is made of, up to the table or product it comes from."""
        found: set[Value] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            if current in found:
                continue
            found.add(current)
            if current.producer is not None and current.producer.name in _BIAS_PASS:
                pending.extend(current.producer.inputs)
        return found

    # --- residual streams and sums ----------------------------------------------------------------------------

    @cached_property
    def _residual_calls(self) -> set[int]:
        return {call.index for residual in self.residuals for call in residual.calls}

    @cached_property
    def _additions(self) -> list[tuple[tuple[Call, ...], list[Value]]]:
        """Chains of same-shape additions as one: (calls, terms); the last call gives the sum."""
        found = []
        absorbed: set[int] = set()
        for call in reversed(self.calls):
            if call.name != "add" or call.index in absorbed or not call.output.requires_grad:
                continue
            calls, terms, pending = [call], [], list(call.inputs)
            while pending:
                term = pending.pop(0)
                above = term.producer
                if (
                    above is not None
                    and above.name == "add"
                    and term.shape == call.output.shape
                    and all(v.shape == term.shape and v.requires_grad for v in above.inputs)
                    and len(above.inputs) == 2
                    and len(term.consumers) == 1
                ):
                    absorbed.add(above.index)
                    calls.append(above)
                    pending[:0] = above.inputs
                else:
                    terms.append(term)
            found.append((tuple(sorted(calls, key=lambda c: c.index)), terms))
        return found[::-1]

    @cached_property
    def residuals(self) -> list[Residual]:
        """Additions in which one term is an ancestor of the others through a matmul with a parameter."""
        found = []
        for calls, terms in self._additions:
            output = calls[-1].output
            if calls[-1].index in self._logits.additions:
                continue
            same = [v for v in terms if v.shape == output.shape and v.requires_grad and not v.parameters]
            if len(same) < 2:
                continue
            best: tuple[Value, list[Branch]] | None = None
            for skip in same:
                origin = self._origin(skip)
                branches = [
                    branch for term in same if term is not skip and (branch := self._branch(term, origin)) is not None
                ]
                if branches and (best is None or len(branches) > len(best[1])):
                    best = (skip, branches)
            if best is not None:
                found.append(Residual(calls, output, *best))
        return found

    @staticmethod
    def _origin(value: Value) -> Value:
        while value.producer is not None and value.producer.name in PASSTHROUGH and value.producer.inputs:
            above = value.producer.inputs[0]
            if above.shape != value.shape or above.parameters or above.constant:
                break
            value = above
        return value

    def _branch(self, value: Value, skip: Value) -> Branch | None:
        """The branch from `skip` to `value`, if a matmul with a parameter lies on the way."""
        calls: set[int] = set()
        crossed: dict[Value, bool] = {}
        reached = False
        pending = [(value, False)]
        while pending:
            current, through = pending.pop()
            if crossed.get(current, False) or (current in crossed and not through):
                continue
            crossed[current] = through
            if current is skip:
                reached |= through
                continue
            call = current.producer
            if call is None or current.index < skip.index:
                continue
            calls.add(call.index)
            through = through or (self.is_site(call) and not call.name.startswith("embedding"))
            pending.extend((above, through) for above in call.inputs)
        if not reached:
            return None
        return Branch(value, "mlp" if calls.isdisjoint(self._logits.ends) else "attention", frozenset(calls))

    @cached_property
    def streams(self) -> list[Stream]:
        """The residual streams, each in order; a norm between two additions makes the link a normed one."""
        streams: list[Stream] = []
        by_output = {residual.output: residual for residual in self.residuals}
        for residual in self.residuals:
            parent, normed = self._previous(residual.skip, by_output)
            if parent is None:
                residual.stream = len(streams)
                streams.append(Stream())
            else:
                residual.stream = parent.stream
                streams[residual.stream].links += 1
                streams[residual.stream].normed_links += normed
            streams[residual.stream].residuals.append(residual)
        return streams

    def _previous(self, value: Value, by_output: dict[Value, Residual]) -> tuple[Residual | None, bool]:
        normed = False
        while value not in by_output:
            call = value.producer
            if call is None:
                return None, False
            if call in self.norms:
                value, normed = self.norms[call].x, True
            elif call in self.gains:
                value = next(v for v in call.inputs if not v.parameters)
            elif call.name in PASSTHROUGH or call.name in ACTIVATIONS or call.name in ("mul", "div"):
                moving = [v for v in call.inputs if v.requires_grad and not v.parameters]
                if len(moving) != 1:
                    return None, False
                value = moving[0]
            else:
                return None, False
        return by_output[value], normed

    def is_post_norm(self, stream: Stream) -> bool:
        """Whether each addition of the stream is normalised before it is anybody's skip."""
        if stream.links:
            return 2 * stream.normed_links > stream.links
        (residual,) = stream.residuals
        normalised = {norm.x for norm in self.norms.values()}
        return self.goes_only_into_norms(residual.output) and self._origin(residual.skip) not in normalised

    @cached_property
    def sums(self) -> list[Sum]:
        """Additions of independent tensors that end in sites or parameters and go on to a matmul."""
        found = []
        for calls, terms in self._additions:
            call = calls[-1]
            if call.index in self._residual_calls or call.index not in self.feeds_matmul or len(terms) < 2:
                continue
            if call in self.gains or call.output in self.logit_biases or not all(v.requires_grad for v in terms):
                continue
            origins = [frozenset(source.value for source in self.sources(term)[0]) for term in terms]
            if sum(map(len, origins)) != len(frozenset().union(*origins)):
                continue
            if all(self._is_drawn(value) for origin in origins for value in origin):
                found.append(Sum(call, tuple(terms), tuple(c.index for c in calls)))
        return found

    def _is_drawn(self, value: Value) -> bool:
        """Whether a value is the direct output of a site or norm gain, or a parameter that is not a bias."""
        if value.parameters:
            return len([n for n in value.shape if n > 1]) > 1
        call = value.producer
        return call is not None and (self.is_site(call) or call in self.gains or call in self.norms)

    # --- activations ------------------------------------------------------------------------------------------

    @cached_property
    def activations(self) -> list[Activation]:
        """Elementwise functions, those inside a parameter-free elementwise module taken as that module."""
        found: list[Activation] = []
        inside: set[int] = set()
        for span in self.trace.spans:
            if self._is_elementwise(span):
                inside.update(span.calls)
                assert span.output is not None
                found.append(Activation(span.output, None, span))
        for call in self.calls:
            if call.name in ACTIVATIONS and call.index not in inside and not call.output.parameters:
                found.append(Activation(call.output, call, None))
        return sorted(found, key=lambda activation: activation.output.index)

    def _is_elementwise(self, span: ModuleSpan) -> bool:
        calls = [self.trace.calls[index] for index in span.calls]
        if span.output is None or len(span.inputs) != 1 or span.inputs[0].shape != span.output.shape:
            return False
        if len(calls) < 2 or span.output.producer is None or span.output.producer.index not in span.calls:
            return False
        computing = [call for call in calls if call.name not in PASSTHROUGH]
        moving = [value for call in calls for value in call.inputs if not value.constant]
        inner = {output for call in calls for output in call.outputs} | {span.inputs[0]}
        return (
            len(computing) > 1
            and all(call.name in ELEMENTWISE for call in computing)
            and all(value in inner for value in moving)
            and span.output.producer.name not in ("sigmoid", "softmax")
        )


def _number(argument: object) -> float | None:
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return float(argument)
    return argument.number if isinstance(argument, Value) else None
