"""Activations: elementwise functions, one call or one parameter-free module (NewGELU spells its formula out)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lightning_unitscale.engine.analysis.graph import Graph
from lightning_unitscale.engine.record.trace import Call, ModuleSpan, Value
from lightning_unitscale.ops.torch_functions import ACTIVATIONS, ELEMENTWISE, PASSTHROUGH


@dataclass(frozen=True)
class Activation:
    """An elementwise function: one call, or one parameter-free module."""

    input: Value
    output: Value
    call: Call | None
    span: ModuleSpan | None

    @property
    def modules(self) -> list[str]:
        """The name of the module that it is, or whose code calls it; none where that is not known."""
        if self.span is not None:
            return [self.span.module]
        frame = self.call.frame if self.call is not None else None
        return [frame.module] if frame is not None else []

    @property
    def calls(self) -> Collection[int]:
        """Indices of its calls."""
        return self.span.calls if self.span is not None else () if self.call is None else (self.call.index,)


def find_activations(graph: Graph) -> list[Activation]:
    """Elementwise functions, those inside a parameter-free elementwise module taken as that module."""
    found: list[Activation] = []
    inside: set[int] = set()
    for span in graph.trace.spans:
        if span.output is None or span.output.producer is None or not graph.decides(span.output.producer):
            continue
        if _is_elementwise(graph, span):
            inside.update(span.calls)
            found.append(Activation(span.inputs[0], span.output, None, span))
    for call in graph.calls:
        if call.name in ACTIVATIONS and call.index not in inside and not call.output.parameters:
            found.append(Activation(call.inputs[0], call.output, call, None))
    return sorted(found, key=lambda activation: activation.output.index)


def _is_elementwise(graph: Graph, span: ModuleSpan) -> bool:
    calls = [graph.trace.calls[index] for index in span.calls]
    assert span.output is not None
    if len(span.inputs) != 1 or span.inputs[0].shape != span.output.shape:
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
