"""What a model scales by hand, with the blocks of `lightning_unitscale.blocks`: no scheme scales it a second time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lightning_unitscale.blocks.activation import scale_activation
from lightning_unitscale.blocks.gradient import scale_gradient
from lightning_unitscale.blocks.weight import WeightScaling, scale_weight
from lightning_unitscale.engine.record.trace import Call, Trace, Value

ACTIVATION, GRADIENT, WEIGHT = (f.__name__ for f in (scale_activation, scale_gradient, scale_weight))


@dataclass
class ByHand:
    """What was found.

    Attributes:
        weights: by parameter name, the block that divides it, as the reason to leave it alone.
        gradients: parameters whose gradient, or a part of it, comes through a block.
        notes: for the plan.
    """

    weights: dict[str, str] = field(default_factory=dict)
    gradients: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def find_by_hand(module: nn.Module, trace: Trace) -> ByHand:
    """The blocks at work in a recorded step."""
    found = ByHand()
    first_names = {id(parameter): name for name, parameter in module.named_parameters()}
    for where, child in module.named_modules():
        if isinstance(child, WeightScaling):
            name = first_names[id(child.module.get_parameter(child.name))]
            found.weights[name] = f"scaled by hand: WeightScaling at {where or '<root>'}"
    for call in _calls_of(trace, WEIGHT):
        for name in (name for value in call.inputs for name in value.parameters):
            found.weights.setdefault(name, f"scaled by hand: {WEIGHT} {_at(call)}")
    activations, gradients = _calls_of(trace, ACTIVATION), _calls_of(trace, GRADIENT)
    if activations:
        places = ", ".join(list(dict.fromkeys(map(_at, activations)))[:3])
        found.notes.append(f"activations are scaled by hand, and no factor is added there: {ACTIVATION} {places}")
    if gradients:
        found.gradients = _parameters_before(value for call in gradients for value in call.inputs)
        places = ", ".join(list(dict.fromkeys(map(_at, gradients)))[:3])
        found.notes.append(
            f"the gradients of {len(found.gradients)} parameters are scaled by hand and no slope of the loss: "
            f"{GRADIENT} {places}"
        )
    return found


def is_by_hand(value: Value) -> bool:
    """Whether a block takes an activation over."""
    return any(call.name == ACTIVATION for call in value.consumers)


def _calls_of(trace: Trace, name: str) -> list[Call]:
    return [call for call in trace.calls if call.name == name]


def _at(call: Call) -> str:
    return f"at {call.frame}" if call.frame is not None else "in a hook"


def _parameters_before(values: Iterable[Value]) -> set[str]:
    names: set[str] = set()
    pending = list(values)
    seen = set(pending)
    while pending:
        value = pending.pop()
        names.update(value.parameters)
        above = value.producer.inputs if value.producer is not None else []
        new = [value for value in above if value not in seen]
        seen.update(new)
        pending += new
    return names
