"""Residual streams: additions in which one term is made into the others, linked from skip to skip.

A block that runs on part of the batch or of the tokens (DINOv2's stochastic depth, mixture of depths) is added to that
part alone, by `index_add` or the like: an addition as any other, though its branch has another shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_unitscale.engine.analysis.attention import AttentionLogits
from lightning_unitscale.engine.analysis.graph import Graph
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import is_lookup
from lightning_unitscale.ops.torch_functions import ACCUMULATES, ACTIVATIONS, CASTS, PASSTHROUGH

_THE_SAME = CASTS | {"contiguous", "reshape", "view", "view_as"}  # if the shape is
Addition = tuple[tuple[Call, ...], list[Value]]  # its calls, the last of which gives the sum, and its terms


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


def adds_to_a_part(call: Call) -> bool:
    """Whether a call adds its last input to some places of its first."""
    return call.name in ("index_add", "scatter_add") or (
        call.name == "index_put" and bool(call.argument(3, "accumulate"))
    )


def find_additions(graph: Graph) -> list[Addition]:
    """Chains of same-shape additions as one: (calls, terms); the last call gives the sum."""
    found: list[Addition] = []
    absorbed: set[int] = set()
    for call in reversed(graph.calls):
        if adds_to_a_part(call) and call.output.requires_grad:
            found.append(((call,), [call.inputs[0], call.inputs[-1]]))
        if call.name != "add" or call.index in absorbed or not call.output.requires_grad:
            continue
        calls, terms, pending = [call], [], list(call.inputs)
        while pending:
            term = pending.pop(0)
            above = _summed(graph, term).producer
            if (
                above is not None
                and above.name == "add"
                and term.shape == call.output.shape
                and all(v.shape == term.shape and v.requires_grad for v in above.inputs)
                and len(above.inputs) == 2
                and len(graph.consumers(above.output)) == 1
            ):
                absorbed.add(above.index)
                calls.append(above)
                pending[:0] = above.inputs
            else:
                terms.append(term)
        found.append((tuple(sorted(calls, key=lambda c: c.index)), terms))
    return found[::-1]


def _summed(graph: Graph, term: Value) -> Value:
    """The value that a term is, with other strides or in another dtype, where nothing else uses either."""
    call = term.producer
    while (
        call is not None
        and call.name in _THE_SAME
        and call.inputs
        and call.inputs[0].shape == term.shape
        and call.inputs[0].requires_grad
        and len(graph.consumers(term)) == 1
    ):
        term = call.inputs[0]
        call = term.producer
    return term


def find_residuals(graph: Graph, logits: AttentionLogits, additions: list[Addition]) -> list[Residual]:
    """Additions in which one term is an ancestor of the others through a matmul with a parameter."""
    found = []
    for calls, terms in additions:
        output = calls[-1].output
        if calls[-1].index in logits.additions:
            continue
        in_part = adds_to_a_part(calls[-1])
        same = [v for v in terms if (in_part or v.shape == output.shape) and v.requires_grad and not v.parameters]
        if len(same) < 2:
            continue
        best: tuple[Value, list[Branch]] | None = None
        for skip in same[:1] if in_part else same:
            origin = _whole(graph, _unscaled(graph, origin_of(skip)))
            branches = [
                branch
                for term in same
                if term is not skip
                and (branch := _branch(graph, logits, term, origin)) is not None
                and (origin is origin_of(skip) or not _carries(graph, term, origin))
            ]
            if branches and (best is None or len(branches) > len(best[1])):
                best = (skip, branches)
        if best is not None:
            found.append(Residual(calls, output, *best))
    return found


def origin_of(value: Value) -> Value:
    """The value that casts and copies of the same shape made this one from."""
    while value.producer is not None and value.producer.name in PASSTHROUGH and value.producer.inputs:
        above = value.producer.inputs[0]
        if above.shape != value.shape or above.parameters or above.constant:
            break
        value = above
    return value


def _unscaled(graph: Graph, skip: Value) -> Value:
    """What a number or a learned scale made the skip of (DeepNorm's α·x, a gate per channel)."""
    call = skip.producer
    if call is None or call.name not in ("mul", "div") or call in graph.norms or call in graph.gains:
        return skip
    above = graph.product_inputs(call)
    if above is None or len(above) != 1 or above[0].value.shape != skip.shape or above[0].value.parameters:
        return skip
    return origin_of(above[0].value)


def _whole(graph: Graph, skip: Value) -> Value:
    """What the skip is a part of, if the same part is taken of it again: x[places] + f(x[places])."""
    call = skip.producer
    if call is None or call.name not in ("getitem", "gather", "index_select"):
        return skip
    again = (c for c in graph.consumers(call.inputs[0]) if c is not call and c.name == call.name)
    return call.inputs[0] if any(_are_alike((c.args, c.kwargs), (call.args, call.kwargs)) for c in again) else skip


def _are_alike(one: object, other: object) -> bool:
    """Whether two arguments of calls are the same; arrays of other libraries are so only if they are one."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_are_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_alike(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, (int, slice)) and isinstance(other, (int, slice)) and one == other)


def _carries(graph: Graph, value: Value, origin: Value) -> bool:
    """Whether `value` is a later state of the stream that `origin` is a state of: a sum that it went into as it was.

    Mixing the first state of a stream into a later one is no residual addition, whose branch would be the stream.
    """
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if current is origin:
            return True
        call = current.producer
        if call is None or graph.is_site(call) or current.index < origin.index:
            continue
        for source in graph.linear_inputs(call) or ():
            if source.value not in seen:
                seen.add(source.value)
                pending.append(source.value)
    return False


def _branch(graph: Graph, logits: AttentionLogits, value: Value, skip: Value) -> Branch | None:
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
        through = through or (graph.is_site(call) and not is_lookup(call.name))
        pending.extend((above, through) for above in call.inputs)
    if not reached:
        return None
    return Branch(value, "mlp" if calls.isdisjoint(logits.ends) else "attention", frozenset(calls))


def find_streams(graph: Graph, residuals: list[Residual]) -> list[Stream]:
    """The residual streams, each in order; a norm between two additions makes the link a normed one."""
    streams: list[Stream] = []
    by_output = {residual.output: residual for residual in residuals}
    for residual in residuals:
        parent, normed = _previous(graph, residual.skip, by_output)
        if parent is None:
            residual.stream = len(streams)
            streams.append(Stream())
        else:
            residual.stream = parent.stream
            streams[residual.stream].links += 1
            streams[residual.stream].normed_links += normed
        streams[residual.stream].residuals.append(residual)
    return streams


def _previous(graph: Graph, value: Value, by_output: dict[Value, Residual]) -> tuple[Residual | None, bool]:
    normed = False
    while value not in by_output:
        call = value.producer
        if call is None:
            return None, False
        if call in graph.norms:
            value, normed = graph.norms[call].x, True
        elif call in graph.gains:
            value = next(v for v in call.inputs if not v.parameters)
        elif call.name in PASSTHROUGH or call.name in ACTIVATIONS or call.name in ("mul", "div"):
            moving = [v for v in call.inputs if v.requires_grad and not v.parameters]
            if len(moving) != 1:
                return None, False
            value = moving[0]
        elif call.name in ACCUMULATES:  # x[places] = x[places] + f(x[places])
            into, *others = [v for v in call.inputs if v.requires_grad and not v.parameters] or [value]
            parents = [_previous(graph, v, by_output) for v in (*others[-1:], into) if v is not value]
            return next((found for found in parents if found[0] is not None), (None, False))
        else:
            return None, False
    return by_output[value], normed


def is_post_norm(graph: Graph, stream: Stream) -> bool:
    """Whether each addition of the stream is normalised before it is anybody's skip."""
    if stream.links:
        return 2 * stream.normed_links > stream.links
    (residual,) = stream.residuals
    normalised = {norm.x for norm in graph.norms.values()}
    return graph.goes_only_into_norms(residual.output) and origin_of(residual.skip) not in normalised
