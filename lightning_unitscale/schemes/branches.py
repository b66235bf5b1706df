"""Residual branches: where each stands in its stream, and what the scheme multiplies it by.

The factor goes into the weights that the branch ends in. A branch that the recorded step left out has none to go into,
but counts: it makes the stream deeper, and its weights, which take the rule of a sibling, have the factor of their own
place.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_unitscale.engine.analysis.left_out import Step, steps_of
from lightning_unitscale.engine.analysis.residuals import Residual, Stream
from lightning_unitscale.engine.plan.factors import Factor, inverse
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.trace import Value
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.free_sites import parameter_free_site
from lightning_unitscale.schemes.left_alone import no_place
from lightning_unitscale.schemes.local import LocalSchemes
from lightning_unitscale.schemes.placed_factors import MODEL, PlacedFactors
from lightning_unitscale.schemes.pushing import pushes
from lightning_unitscale.schemes.scheme import EarlierBranch, ResidualBranch


class Branches:
    """The branches of all streams.

    Attributes:
        depths: L by call, half the number of branches of its stream; of nested branches that of the innermost.
    """

    def __init__(self, draft: Draft, rules: LocalSchemes) -> None:
        self.draft, self.rules = draft, rules
        self.streams = [(stream, _steps(draft, stream)) for stream in draft.structure.streams]
        self.depths: dict[int, float] = {}
        for stream, steps in self.streams:
            inner_last = sorted((b for r in stream.residuals for b in r.branches), key=lambda b: -len(b.calls))
            self.depths |= {index: len(steps) / 2 for branch in inner_last for index in branch.calls}
        self.decided: list[tuple[Step, list[Factor]]] = []

    def place(self, placed: PlacedFactors) -> None:
        """Put the scheme's factor on each branch."""
        for stream, steps in self.streams:
            post_norm = self.draft.structure.is_post_norm(stream)
            for step in steps:
                factors = self._rule(step, steps, post_norm)
                self.decided.append((step, factors))
                if factors and step.seen is not None:
                    residual, branch = step.seen
                    self._scale(placed, residual, branch.value, factors)

    def _rule(self, step: Step, steps: list[Step], post_norm: bool) -> list[Factor]:
        earlier = (other for other in steps if other.order < step.order)
        before = tuple(EarlierBranch(other.kind, self.rules.at(other.parameters)) for other in earlier)
        branch = ResidualBranch(step.kind, len(steps) / 2, before, post_norm)
        return self.rules.ask(step.parameters, lambda scheme: scheme.branch(branch))

    def _scale(self, placed: PlacedFactors, residual: Residual, value: Value, factors: list[Factor]) -> None:
        found = pushes(self.draft, value, {call.index for call in residual.calls})
        for push in found:
            placed.push([push], [*factors, *self._without_own(push.model_constant)])
        if found:
            return
        call = next(call for call in residual.calls if value in call.inputs)
        if reason := no_place(call) or ("" if call.name == "add" else "it adds to a part, by indices"):
            placed.leave_alone("residual addition", call, reason)
            return
        own = max((source.model_constant for source in self.draft.structure.sources(value)[0]), default=1.0)
        site = parameter_free_site(call, "residual", [*factors, *self._without_own(own)], value)
        site.reason = "the branch does not end in a matmul or norm of its own"
        placed.free.add(site)

    def _without_own(self, constant: float) -> list[Factor]:
        """The factor that takes the model's own constant out of a branch.

        Above 1, in a step that draws random numbers, it is 1/(1 - p) of a branch kept with probability 1 - p, and
        belongs to the drawing: without it, in evaluation, the branch would be too small.
        """
        is_drawn = constant > 1 and self.draft.trace.drew
        return [] if is_drawn else inverse(constant, "a constant on the branch", MODEL)

    def correct_left_out(self, plan: Plan, models: Mapping[str, str]) -> None:
        """Where a branch's factor depends on its place, those that were left out have another than their siblings.

        Args:
            models: the sibling whose rule each parameter that was left out has taken.
        """
        of = {name: factors for step, factors in self.decided if step.seen is not None for name in step.parameters}
        for step, factors in self.decided:
            for name in step.parameters if step.seen is None else ():
                theirs = of.get(models.get(name, ""), [])
                for site in plan.sites if theirs != factors else ():
                    causes = site.causes.get(name, [])
                    if theirs and all(factor in causes for factor in theirs):
                        site.set_factors(name, [*(f for f in causes if f not in theirs), *factors])


def _steps(draft: Draft, stream: Stream) -> list[Step]:
    trace = draft.trace
    used: dict[int, frozenset[str]] = {}
    here = trace.step_of(stream.residuals[0].calls[0])
    for use in draft.uses.values():
        for call in use.calls:
            if trace.step_of(call) == here:
                used[call.index] = used.get(call.index, frozenset()).union(use.parameters)
    shapes = {name: facts.shape for name, facts in trace.facts.items()}
    return steps_of(stream, used, shapes, frozenset(shapes).difference(*used.values()))
