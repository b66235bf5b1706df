"""Multiply one value inside a model by a constant, exactly, by changing the parameters it is linear in.

Which elements of which parameters those are is found by running the calls that make the value again, on random
numbers in place of activations, and asking autograd: the query third of a packed weight is where ∂query/∂weight ≠ 0.
For an element p that enters through an expression e(p), such as the gain 1 + p,

    p' = p + (c - 1) · e / (∂e/∂p)        gives e(p') = c · e(p) where e is affine; for a plain weight p' = c · p
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops.torch_functions import is_in_place


class NotScalableError(Exception):
    """The value is not linear in parameters of its own; the message says why."""


def scaled_parameters(
    structure: Structure, value: Value, end: Call, factor: float, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New values of parameters, such that `value`, used by the call `end` alone, is multiplied by `factor`.

    Args:
        structure: of the recorded model.
        parameters: the model's, by name.

    Raises:
        NotScalableError: there are no such values.
    """
    sources, passed = structure.sources(value)
    makers = {index for source in sources for index in _makers(structure, source.value)}
    replay = _Replay(passed | makers, parameters)
    before = replay.run(value)
    weights = [v for v in replay.weights() if v.is_float]
    if not weights:
        raise NotScalableError("it is made of activations alone")
    slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
        (before * torch.randn_like(before)).sum(), [replay.leaves[v.key] for v in weights], allow_unused=True
    )
    changed: dict[str, Tensor] = {}
    for weight, slope in zip(weights, slopes, strict=True):
        if slope is None:
            continue
        used = slope != 0
        if bool(used.all()) and not all(structure.only_feeds(s.value, passed, {end.index}) for s in sources):
            raise NotScalableError("what it is made of is used elsewhere too")
        known = parameters[weight.key].detach()
        moved = known.double() + (factor - 1) * _value_over_slope(replay, weight).detach().double()  # these cancel
        changed[weight.key] = torch.where(used, moved.to(known.dtype), known)
    after = _Replay(replay.calls, {**parameters, **changed}, replay.activations).run(value)
    if not changed or not torch.allclose(
        after, before * factor, rtol=1e-4, atol=1e-5 * float(before.detach().abs().max())
    ):
        raise NotScalableError("it is not linear in the parameters it is made of")
    return changed


def _makers(structure: Structure, source: Value) -> Iterator[int]:
    """The calls with parameters that make a source: a matmul, or a norm's gain and the bias after it."""
    call = source.producer
    if source.parameters or call is None:
        return
    if not any(v.parameters for v in call.inputs):
        raise NotScalableError("it is made of activations alone")
    yield call.index
    if call in structure.gains and call.name == "add":
        for above in call.inputs:
            if not above.parameters:
                yield from _makers(structure, above)


def _value_over_slope(replay: _Replay, weight: Value) -> Tensor:
    leaf = replay.leaves[weight.key]
    if not weight.expression:
        return leaf
    expression = replay.run(weight)
    (slope,) = torch.autograd.grad(expression.sum(), leaf, retain_graph=True)
    if expression.shape != leaf.shape or not bool((slope != 0).all()):
        raise NotScalableError(f"{weight.key} enters through an expression that is not elementwise")
    return expression / slope


class _Replay:
    """Runs some calls of a trace again.

    Attributes:
        calls: indices of the calls to run; whatever comes from others is a random activation.
        leaves: the parameters met on the way, by name.
        activations: the random ones, to be used again by another replay.
    """

    def __init__(
        self,
        calls: set[int] | frozenset[int],
        parameters: Mapping[str, Tensor],
        activations: dict[Value, Tensor] | None = None,
    ) -> None:
        self.calls, self.parameters = calls, parameters
        self.leaves: dict[str, Tensor] = {}
        self.activations = {} if activations is None else activations
        self._values: dict[Value, Tensor] = {}

    def run(self, value: Value) -> Tensor:
        """The tensor that `value` is in this run."""
        if value not in self._values:
            call = value.producer
            if call is not None and (value.parameters or call.index in self.calls):
                self._call(call)
            elif value.parameters:
                self._values[value] = self._leaf(value.key)
            else:
                self._values[value] = self._activation(value)
        return self._values[value]

    def weights(self) -> list[Value]:
        """The parameters, or expressions of one, that the calls took."""
        taken = {v.key: v for v in self._values if v.parameters}  # the last of each: after all views and expressions
        for weight in taken.values():
            if len(weight.parameters) > 1:
                raise NotScalableError(f"{' and '.join(weight.parameters)} enter through one expression")
        return list(taken.values())

    def _call(self, call: Call) -> None:
        again = call.with_each(lambda argument: self.run(argument) if isinstance(argument, Value) else argument)
        if is_in_place(call.function):  # a leaf, or a value that is read again, must stay
            again.args = (again.args[0].clone(), *again.args[1:])
        result = again.run()
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        self._values.update(zip(call.outputs, results, strict=True))

    def _leaf(self, name: str) -> Tensor:
        return self.leaves.setdefault(name, self.parameters[name].detach().clone().requires_grad_())

    def _activation(self, value: Value) -> Tensor:
        if value not in self.activations:
            like = next(p for p in self.parameters.values() if p.is_floating_point())
            ones = torch.ones(value.shape, dtype=like.dtype if value.is_float else torch.long, device=like.device)
            self.activations[value] = torch.rand_like(ones) + 0.5 if value.is_float else ones - 1
        return self.activations[value]
