"""Code that reads the values of weights beside the calls that use them: penalties, log-determinants, inner steps.

A penalty on a weight, a distance to its start, an orthogonality term read the stored numbers, which a scheme changes. A
use is a *reading* if it is on the way to the loss and neither a product, lookup or norm, nor an addition to an
activation. What is right depends on where it ends:

    in the loss alone, as one number      the weight is handed over in the units of the untouched model, by a factor at
                                          the call that reads it first (`handed`): λ means what it meant
    in the function (log |det W| of a     the weight is left alone, value and all factors (`left_alone`): the function
      flow, a gate made of its norm)      and what is said of it must be of one weight
    where no factor can stand             the same

What is made of weights alone is one weight to the model (a flow's P L U, whose log-determinant is read off its
factors): where one of them is left alone for what the function says of it, all are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from lightning_unitscale.engine.analysis.graph import Graph
from lightning_unitscale.engine.analysis.loss_path import used_parameters, uses
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.ops.torch_functions import ACCUMULATES, JOINS, PASSTHROUGH

_DETERMINANTS = frozenset({
    "det", "logdet", "slogdet", "linalg_det", "linalg_slogdet", "linalg_lu", "linalg_lu_factor", "lu", "inverse",
    "linalg_inv", "linalg_solve", "linalg_solve_triangular", "cholesky", "linalg_cholesky",
})  # fmt: skip
_KEEP_SIGN = PASSTHROUGH | {"add", "sub", "rsub", "neg", "mul", "div", "sum", "mean", "diag", "abs", "log"}
_PUTS_TOGETHER = PASSTHROUGH | JOINS | ACCUMULATES | {"add", "sub", "rsub", "where", "masked_scatter"}


@dataclass
class Readings:
    """What a trace reads of weights beside their sites.

    Attributes:
        ends: (index of a call, value) where a reading leaves what is made of parameters alone; no uses of a model.
        handed: the calls at which the parameters' values are to be in the units of the untouched model.
        left_alone: parameters that such code needs as they are, with the reason.
        compared: tensors of the step, no parameters, that a weight in the units of the untouched model meets.
    """

    ends: set[tuple[int, Value]] = field(default_factory=set)
    handed: dict[UseId, list[Call]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    compared: set[Value] = field(default_factory=set)


@dataclass(frozen=True)
class _End:
    """Where a value made of parameters alone meets something else; no call where it is a loss itself."""

    call: Call | None
    value: Value

    def entries(self) -> Iterator[tuple[Call, Value]]:
        """The calls that first do something to the bare parameters it is made of, and those."""
        pending, seen = [(self.call, self.value)], set()
        while pending:
            call, value = pending.pop()
            if call is not None and not value.expression:
                yield call, value
            elif value.producer is not None and value not in seen:
                seen.add(value)
                pending += [(value.producer, above) for above in value.producer.inputs if above.parameters]


def find_readings(graph: Graph) -> Readings:
    """The readings of every parameter that is also used otherwise, or that is an array which nothing else uses."""
    readings = Readings()
    said_of: set[str] = set()
    by_name: dict[str, list[_End]] = defaultdict(list)
    for end in _ends(graph):
        for name in end.value.parameters:
            by_name[name].append(end)
    for name, ends in by_name.items():
        beside = [end for end in ends if not _is_proper(graph, end)]
        penalties = [end for end in beside if _is_penalty(graph, end)]
        is_weight = any(end.call is not None and end.value in graph.weights_of(end.call) for end in ends)
        found = beside if is_weight else penalties
        proper = [end for end in ends if end not in found]
        alone = prod(graph.trace.facts[name].shape) > 1  # a number may be learned by the loss
        if not found or not (proper or alone):
            continue
        readings.ends |= {(end.call.index, end.value) for end in found if end.call is not None}
        if reason := _why_not_handed(graph, name, found, proper):
            readings.left_alone[name] = reason
            if len(penalties) < len(found) or _takes_determinant(found) or _is_told(found):
                said_of.add(name)
        else:
            _hand_over(graph, readings, name, found)
    _leave_companions(graph, readings, said_of)
    _note_gradients(graph, readings)
    for name, where in graph.trace.in_transforms.items():
        readings.left_alone[name] = f"{where} has torch.func (grad, vmap, jvp) run on tensors made of it"
    readings.ends |= set(_looks(graph))
    return readings


def _looks(graph: Graph) -> Iterator[tuple[int, Value]]:
    """Where values of weights are looked at beside the loss, in no product: a distance to the start for a log line."""
    learned = used_parameters(graph.trace, graph.learned)
    for call in graph.calls:
        if call.index not in graph.to_loss and call.name not in MATMULS:
            read = [value for value in uses(call) if learned.issuperset(value.parameters)]
            moved = all(graph.trace.written.keys() >= set(value.parameters) for value in read)  # by the step itself
            if read and (moved or not _is_near_product(graph, call)):
                yield from ((call.index, value) for value in read)


def _is_near_product(graph: Graph, call: Call) -> bool:
    """Whether products or norms of activations go into a call, or what it makes goes into one."""
    above: list[Call] = [call]
    below: list[Call] = [call]
    for pending, is_above in ((above, True), (below, False)):
        seen: set[int] = set()
        while pending:
            current = pending.pop()
            if (current.name in MATMULS or current in graph.norms) and not current.output.parameters:
                return True
            beyond = (
                [v.producer for v in current.inputs] if is_above else [c for o in current.outputs for c in o.consumers]
            )
            for other in beyond:
                if other is not None and other.index not in seen:
                    seen.add(other.index)
                    pending.append(other)
    return False


def _ends(graph: Graph) -> Iterator[_End]:
    for call in graph.calls:
        if call.index in graph.to_loss and not call.outputs[0].parameters and not call.outputs[0].constant:
            yield from (_End(call, value) for value in dict.fromkeys(call.inputs) if value.parameters)
    yield from (_End(None, loss) for loss in graph.trace.losses if loss.parameters)


def _is_proper(graph: Graph, end: _End) -> bool:
    """Whether the model works with the parameter there: multiplies by it, looks it up, adds it to an activation."""
    call, value = end.call, end.value
    if call is None:
        return False
    if call.name in MATMULS:
        return not _is_probe(graph, call, value)
    if call in graph.norms or call in graph.gains:
        return True
    if value.expression or call.name not in _PUTS_TOGETHER:
        return False
    return call.index in graph.feeds_matmul or any(_is_activation(graph, v) for v in call.inputs)


def _is_probe(graph: Graph, call: Call, value: Value) -> bool:
    """Whether a weight is multiplied by a vector that no input or parameter made, as power iteration does.

    Or by what no data went into, in another form than the one in which the model multiplies data by it (a path norm is
    the network of |W| on ones).
    """
    others = [v for v in MATMULS[call.name].multiplicands(call).values() if isinstance(v, Value) and v is not value]
    if value.expression and graph.bare_weights.issuperset(value.parameters):
        return all(other.parameters or other.constant or other in graph.data_free for other in others)
    return (
        len(others) == 1
        and len(others[0].shape) == 1
        and not others[0].requires_grad
        and call.index not in graph.feeds_matmul
    )


def _is_activation(graph: Graph, value: Value) -> bool:
    made_by = value.producer
    return value.requires_grad and not value.parameters and made_by is not None and made_by.index in graph.after_site


def _is_penalty(graph: Graph, end: _End) -> bool:
    """Whether what is read goes into the loss as one number, and meets no activation before."""
    if end.call is None:
        return True
    made, pending = {end.value}, [end.call]
    while pending:
        call = pending.pop()
        met = (value for value in call.inputs if value not in made and value not in graph.data_free)
        if any(_is_activation(graph, value) for value in met):
            if prod(call.output.shape) != 1 or call.index in graph.feeds_matmul:
                return False
            continue
        for output in call.outputs:
            if output not in made:
                made.add(output)
                pending += [consumer for consumer in output.consumers if consumer.index in graph.to_loss]
    return True


def _why_not_handed(graph: Graph, name: str, found: list[_End], proper: list[_End]) -> str:
    """Why the readings of a parameter must meet it as it is; empty if they need not."""
    entries = [call for end in found for call, value in end.entries() if name in value.parameters]
    where = entries[0].where if entries else "the step"
    if _takes_determinant(found):
        return f"{where} takes its determinant or inverse, which must be of the weight that the model uses"
    if _is_told(found):
        return f"{where} reads it as it is, as a log-determinant is read off the factors of a weight"
    if not all(_is_penalty(graph, end) for end in found):
        return f"{where} uses its value beside its products"
    if any(call.frame is None for call in entries):
        return f"{where} reads its value outside the methods of the model, where (unlike in one) it can't be unscaled"
    if any(call.in_function for call in entries):
        return f"{where} reads its value in a hand-written autograd.Function"
    ops = {call.name for call in entries}
    same = [call for end in proper for call, value in end.entries() if name in value.parameters and call.name in ops]
    if same:
        return f"{where} reads its value by a function, {same[0].name}, that the model uses it in too"
    return ""


def _takes_determinant(found: list[_End]) -> bool:
    return any(call.name in _DETERMINANTS for end in found for call in _calls_behind(end))


def _is_told(found: list[_End]) -> bool:
    """Whether a sum goes into the loss with its sign, or of logarithms, and so without bounds: no penalty does."""
    return any(_has_sign(end) for end in found if end.value.expression and prod(end.value.shape) == 1)


def _has_sign(end: _End) -> bool:
    calls = [call for call in _calls_behind(end) if call is not end.call]
    ops = {call.name for call in calls}
    squares = any(sum(bool(v.parameters) for v in call.inputs) > 1 for call in calls if call.name == "mul")
    return not squares and ops <= _KEEP_SIGN and ("abs" not in ops or "log" in ops)


def _leave_companions(graph: Graph, readings: Readings, said_of: set[str]) -> None:
    for call in graph.calls if said_of else ():
        if all(value.parameters or value.constant or value in graph.data_free for value in call.inputs):
            continue
        for value in call.inputs:
            parts = graph.parts(value) if value.parameters or value in graph.data_free else set()
            for known in sorted(parts & said_of)[:1]:
                for name in parts - said_of:
                    readings.left_alone.setdefault(name, f"it is one weight with {known}: {readings.left_alone[known]}")


def _calls_behind(end: _End) -> Iterator[Call]:
    pending, seen = [end.value.producer], set()
    if end.call is not None:
        yield end.call
    while pending:
        call = pending.pop()
        if call is not None and call.index not in seen:
            seen.add(call.index)
            yield call
            pending += [value.producer for value in call.inputs if value.parameters]


def _hand_over(graph: Graph, readings: Readings, name: str, found: list[_End]) -> None:
    for end in found:
        for call, value in end.entries():
            if value.parameters == (name,):
                readings.handed.setdefault(UseId(name, call.name), []).append(call)
        readings.compared.update(v for call in _calls_around(graph, end) for v in call.inputs if v.producer is None)


def _calls_around(graph: Graph, end: _End) -> Iterator[Call]:
    """The calls of a reading, and those that make what it is compared with."""
    pending, seen = [end.call, end.value.producer], set()
    while pending:
        call = pending.pop()
        if call is not None and call.index not in seen:
            seen.add(call.index)
            yield call
            pending += [value.producer for value in call.inputs if not _is_activation(graph, value)]


def _note_gradients(graph: Graph, readings: Readings) -> None:
    """Leave alone what `torch.autograd.grad` differentiates by, if the loss is made of the result.

    An inner step, p - lr · ∂L/∂p, and a term that balances gradients mean the gradient of the untouched weight.
    """
    for taken in graph.trace.gradients:
        if any(call.index in graph.to_loss for value in taken.results for call in value.consumers):
            for name in taken.parameters:
                readings.left_alone[name] = f"{taken.where} goes on with its gradient (an inner step)"
