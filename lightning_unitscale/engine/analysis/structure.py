"""A model's structure in a trace: norms, attention, residual streams, sums, activations.

Everything here is a question about the graph of calls; no statistic of the data is used. `sources` follows linear calls
upward to where a tensor really comes from, `targets` follows them downward to where it is really used.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property

from lightning_unitscale.engine.analysis.activations import Activation, find_activations
from lightning_unitscale.engine.analysis.attention import Attention, AttentionLogits, contraction, find_logits
from lightning_unitscale.engine.analysis.graph import Graph, Source
from lightning_unitscale.engine.analysis.residuals import (
    Addition,
    Residual,
    Stream,
    find_additions,
    find_residuals,
    find_streams,
    is_post_norm,
)
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.ops.torch_functions import HOMOGENEOUS, PASSTHROUGH

_SCALAR_CALLS = PASSTHROUGH | {"mul", "div", "neg"}


@dataclass(frozen=True)
class Sum:
    """An addition of independent tensors, none made from another."""

    call: Call
    terms: tuple[Value, ...]
    chain: tuple[int, ...]


class Structure(Graph):
    """The structure of one trace, computed when asked for."""

    # --- what was found ----------------------------------------------------------------------------------------

    @cached_property
    def _logits(self) -> AttentionLogits:
        return find_logits(self)

    @cached_property
    def attentions(self) -> list[Attention]:
        """The products of queries and keys, in order."""
        found = []
        for call, constant in self._logits.products.values():
            query, key = MATMULS[call.name].query_and_key(call)
            constant *= self._shared_constant(query) * self._shared_constant(key)
            found.append(Attention(call, constant, contraction(call), query, key))
        return found

    @property
    def logit_biases(self) -> set[Value]:
        """Values that are added to attention logits (masks, relative positions)."""
        return self._logits.biases

    def _shared_constant(self, value: Value) -> float:
        """The model's own constant on `value`, if everything it is summed from has the same (LoRA's does not)."""
        constants = {source.model_constant for source in self.sources(value)[0]}
        return constants.pop() if len(constants) == 1 else 1.0

    @cached_property
    def _additions(self) -> list[Addition]:
        return find_additions(self)

    @cached_property
    def residuals(self) -> list[Residual]:
        """The residual additions, in order."""
        return find_residuals(self, self._logits, self._additions)

    @cached_property
    def _residual_calls(self) -> set[int]:
        return {call.index for residual in self.residuals for call in residual.calls}

    @cached_property
    def streams(self) -> list[Stream]:
        """The residual streams, each in order."""
        return find_streams(self, self.residuals)

    def is_post_norm(self, stream: Stream) -> bool:
        """Whether each addition of the stream is normalised before it is anybody's skip."""
        return is_post_norm(self, stream)

    @cached_property
    def sums(self) -> list[Sum]:
        """Additions of independent tensors that end in sites or parameters and go on to a matmul."""
        found = []
        for calls, terms in self._additions:
            call = calls[-1]
            if call.index in self._residual_calls or call.index not in self.feeds_matmul or len(terms) < 2:
                continue
            if call.name != "add":
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

    @cached_property
    def activations(self) -> list[Activation]:
        """The activations, in order."""
        return find_activations(self)

    # --- following linear calls --------------------------------------------------------------------------------

    def sources(self, *values: Value) -> tuple[list[Source], frozenset[int]]:
        """Where the values come from through linear calls, and the indices of those calls.

        Stops at parameters, at every site (a matmul with a parameter, a norm and its gain) and at residual sums.
        """
        found: dict[Value, Source] = {}
        passed: set[int] = set()
        pending, seen = [Source(value, 1.0) for value in values], set(values)
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
                    pending.append(Source(step.value, source.model_constant * step.model_constant))
        return list(found.values()), frozenset(passed)

    def _ends_walk(self, call: Call) -> bool:
        return self.is_site(call) or call in self.gains or call.index in self._residual_calls

    def model_constant(self, value: Value) -> float:
        """The model's own constants that multiplied `value` since it last left something not linear."""
        product, seen = 1.0, 0
        while value.producer is not None and seen < 64:
            call = value.producer
            if self.is_site(call) or call.name not in _SCALAR_CALLS:
                break
            above = self.linear_inputs(call)
            if above is None or len(above) != 1:
                break
            value, product, seen = above[0].value, product * above[0].model_constant, seen + 1
        return product

    def model_constant_after(self, value: Value) -> float:
        """The model's own constants that multiply `value` before anything not linear uses it.

        A soft cap, c · tanh(x / c), has slope 1 and is no such constant.
        """
        product = 1.0
        while len(consumers := self.consumers(value)) == 1:
            (call,) = consumers
            if call.name == "tanh":
                value = call.output
                continue
            if self.is_site(call) or call.name not in _SCALAR_CALLS:
                break
            above = self.linear_inputs(call)
            if above is None or above[0].value is not value:
                break
            product, value = product * above[0].model_constant, call.output
        return product

    def reaches(self, value: Value, takers: Set[str]) -> bool:
        """Whether one of these functions takes `value`: by linear calls, additions and soft caps."""
        pending, seen = [value], {value}
        while pending:
            current = pending.pop()
            for call in self.consumers(current):
                if call.name in takers:
                    return True
                if call.name in ("add", "sub", "tanh") or any(
                    source.value is current for source in self.linear_inputs(call) or ()
                ):
                    pending.extend(output for output in call.outputs if output not in seen)
                    seen.update(call.outputs)
        return False

    def only_feeds(self, value: Value, passed: frozenset[int], end: set[int]) -> bool:
        """Whether everything made from `value` goes through `passed` into the calls `end`."""
        pending, seen = [value], {value}
        products: list[Call] = []
        reached = False
        while pending:
            for call in self.consumers(pending.pop()):
                if call.index in end:
                    reached = True
                    if call.name in MATMULS:
                        products.append(call)
                elif call.index in passed:
                    new = [output for output in call.outputs if output not in seen]
                    seen.update(new)
                    pending.extend(new)
                else:
                    return False
        return reached and _enter_once(seen, products)

    def targets(self, value: Value) -> list[tuple[Call, Value]] | None:
        """The matmuls with parameters that `value` reaches through linear calls and gates, if nothing else uses it.

        Each with the operand that it is there.
        """
        found: list[tuple[Call, Value]] = []
        passed: list[Call] = []
        pending, seen = [value], {value}
        while pending:
            current = pending.pop()
            consumers = self.consumers(current)
            if not consumers:
                if current.producer is None or not current.producer.outputs or len(current.producer.outputs) == 1:
                    return None
                continue
            for call in consumers:
                if self.is_site(call):
                    found.append((call, current))
                    continue
                if not self._scales_with(call, seen):
                    return None
                passed.append(call)
                new = [output for output in call.outputs if output not in seen]
                seen.update(new)
                pending.extend(new)
        # Again, as more of the operands of a call may have been reached since.
        if not all(self._scales_with(call, seen) for call in passed) or not _enter_once(
            seen, [call for call, _ in found]
        ):
            return None
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


def _enter_once(scaled: set[Value], products: Iterable[Call]) -> bool:
    """Whether one operand of each product is scaled, and no other: a constant on two of them would be squared."""
    return all(sum(operand in scaled for operand in call.inputs) == 1 for call in products)
