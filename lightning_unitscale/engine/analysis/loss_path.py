"""Which calls of a step decide what the plan says: those that the loss is learned through.

A training step does more than its loss: it acts before it learns, generates text for a log line, runs a second
forward pass for an accuracy. Such calls lie *beside* the loss: no gradient of it passes through them. Where they use a
parameter as calls on the loss's path do, they follow: they get its factors when the model runs, but neither its role
nor the structure around it comes from them. What only they use (a target network, the head of another step's loss) is
looked at as it stands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.trace import Call, Trace, Value
from lightning_unitscale.ops import MATMULS, is_lookup
from lightning_unitscale.ops.torch_functions import is_in_place


def learned_calls(trace: Trace) -> set[int]:
    """Indices of the calls that gradients of the loss pass through."""
    found: set[int] = set()
    pending = [loss for loss in trace.losses if loss.requires_grad]
    while pending:
        call = pending.pop().producer
        if call is not None and call.index not in found:
            found.add(call.index)
            pending.extend(value for value in call.inputs if value.requires_grad)
    return found


def deciding_calls(trace: Trace, learned: set[int]) -> set[int]:
    """Indices of the calls that the plan is made from: all but those beside the loss that follow, or lead nowhere.

    They are the learned calls, the uses of parameters that no learned call has, what is written into buffers, and
    whatever goes into these by another way than through a call that follows.
    """
    decided = {kind for call in trace.calls if call.index in learned for kind in kinds_of_use(call)}
    following = {
        call.index
        for call in trace.calls
        if call.index not in learned and any(kind in decided for kind in kinds_of_use(call))
    }
    pending = [call for call in trace.calls if call.index in learned]
    pending += [loss.producer for loss in trace.losses if loss.producer is not None]
    pending += [call for call in trace.calls if call.frame is not None and (uses(call) or _writes_to_buffer(call))]
    found: set[int] = set()
    while pending:
        call = pending.pop()
        if call.index not in found and call.index not in following:
            found.add(call.index)
            pending.extend(value.producer for value in call.inputs if value.producer is not None)
    return found


def uses(call: Call) -> list[Value]:
    """The parameters that a call puts to use on something else; none where it makes another weight of them."""
    if not call.outputs or call.outputs[0].parameters or call.outputs[0].constant:
        return []
    return [value for value in dict.fromkeys(call.inputs) if value.parameters]


def used_parameters(trace: Trace, among: Collection[int] | None = None) -> set[str]:
    """Names of the parameters that a step put to use, in all of its calls or those of these indices."""
    calls = (call for call in trace.calls if among is None or call.index in among)
    return {name for call in calls for value in uses(call) for name in value.parameters}


def kinds_of_use(call: Call) -> Iterator[UseId]:
    """The uses of parameters in a call; of those in matrix products, whatever function computes them, as one kind."""
    is_product = call.name in MATMULS and not is_lookup(call.name)
    for value in uses(call):
        yield UseId(value.key, "product" if is_product else call.name)


def _writes_to_buffer(call: Call) -> bool:
    written = call.inputs[0] if call.inputs else None
    return is_in_place(call.function) and written is not None and written.constant and written.producer is None
