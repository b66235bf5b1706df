"""Which tensors of a running step are parameters with factors, or are made of such.

A factor belongs to the use of a parameter, and code seldom uses the parameter object itself: it is transposed, cast,
sliced, or goes into an expression. So what torch calls make of parameters is remembered while the outermost scope runs,
by the rule that the recorder went by (`engine.record.keys`).

In eager code a tensor is found by its id. Compiled code has no ids, but `is` is traced: there the same lists are
searched, which costs nothing once the code is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.engine.record.keys import TensorInput, arguments_used, is_made_of_parameters, way_of
from lightning_unitscale.engine.record.tensors_of_calls import tensors_in
from lightning_unitscale.engine.runtime.compilation import only_inside_others
from lightning_unitscale.engine.runtime.made_of import MadeOf
from lightning_unitscale.engine.runtime.rules import Rules
from lightning_unitscale.ops import FunctionCall


class KnownTensors:
    """What tensors are made of, in one run of the outermost scope.

    Args:
        outside: those of the code around, if this is compiled code inside eager code or the other way round.

    Attributes:
        parameters: those that the open frames use themselves. A tensor in these lists is kept alive, so that no other
            gets its id.
        derived: what was made of them, until the outermost scope ends.
    """

    def __init__(self, outside: KnownTensors | None) -> None:
        self.outside = outside
        self.parameters: list[tuple[Tensor, MadeOf]] = []
        self.derived: list[tuple[Tensor, MadeOf]] = []
        self._by_id: dict[int, MadeOf] = {}  # an index of both, for eager code
        self._indexed = 0

    def made_of(self, tensor: Tensor) -> MadeOf | None:
        """What the tensor is known to be made of."""
        found = self._found(tensor)
        return found if found is not None or self.outside is None else self.outside.made_of(tensor)

    def is_known(self, tensor: Tensor) -> bool:
        """Whether it is made of parameters that have factors."""
        return self.made_of(tensor) is not None

    def _found(self, tensor: Tensor) -> MadeOf | None:
        return self._searched(tensor) if torch.compiler.is_compiling() else self._looked_up(tensor)

    def _looked_up(self, tensor: Tensor) -> MadeOf | None:
        if self._indexed != len(self.parameters) + len(self.derived):  # compiled code has added some
            self._by_id = {id(known): made_of for known, made_of in (*self.parameters, *self.derived)}
            self._indexed = len(self.parameters) + len(self.derived)
        return self._by_id.get(id(tensor))

    def _searched(self, tensor: Tensor) -> MadeOf | None:
        for known, made_of in self.parameters:
            if known is tensor:
                return made_of
        for known, made_of in self.derived:
            if known is tensor:
                return made_of
        return None

    def add_parameter(self, parameter: Tensor, made_of: MadeOf) -> None:
        """A frame that uses this parameter has been opened."""
        # Also if it is known outside: compiled code would differ by the place that it has in the list there.
        if self._found(parameter) is not made_of:
            self._add(self.parameters, parameter, made_of)

    def forget_parameters(self, first: int) -> None:
        """A frame has ended: drop its parameters, those from `first` on."""
        if not torch.compiler.is_compiling():
            for tensor, _ in self.parameters[first:]:
                self._by_id.pop(id(tensor), None)
                self._indexed -= 1
        del self.parameters[first:]

    def hand_over(self, output: Any) -> None:
        """What is returned to the code around is known there too."""
        assert self.outside is not None
        for tensor in tensors_in(output):
            made_of = self.made_of(tensor)
            if made_of is not None:
                self.outside.derived.append((tensor, made_of))

    def what_is_made(
        self, name: str, call: FunctionCall, in_parametrization: Callable[[], bool], rules: Rules
    ) -> MadeOf | None:
        """What the output of a call is made of, if of parameters, in a way in which the recorded step made weights."""
        if name not in rules.followed:
            return None
        call = arguments_used(name, call)
        inputs = [(tensor, self.made_of(tensor)) for tensor in tensors_in((*call.args, *call.kwargs.values()))]
        parameters = [made_of for _, made_of in inputs if made_of is not None]
        if not parameters:
            return None  # at once: most calls of these functions are on activations
        if any([name in made_of.readings for made_of in parameters]):  # noqa: C419
            return None
        known = [TensorInput.of(t, () if part is None else (part,), part is None) for t, part in inputs]
        made_of, way = MadeOf.all_of(parameters), way_of(name, known)
        if name not in rules.ways and way not in rules.ways and way not in made_of.ways:
            return None
        return made_of if is_made_of_parameters(name, call, known, in_parametrization) else None

    def add_made(self, result: Any, made_of: MadeOf) -> None:
        """Remember what the output of a call is made of."""
        for output in tensors_in(result):
            if self.made_of(output) is None:
                self._add(self.derived, output, made_of)

    def _add(self, known: list[tuple[Tensor, MadeOf]], tensor: Tensor, made_of: MadeOf) -> None:
        known.append((tensor, made_of))
        if not torch.compiler.is_compiling():
            self._by_id[id(tensor)] = made_of
            self._indexed += 1


only_inside_others(KnownTensors)
