"""What a scheme says of each weight, at each of its calls.

The rules give the total, so what the model itself multiplies the weight's input or output by is taken out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod, sqrt
from statistics import median

from lightning_unitscale.engine.analysis.roles import WEIGHT_ROLES, Use
from lightning_unitscale.engine.plan.factors import Factor, geometric_mean, inverse
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import is_lookup
from lightning_unitscale.ops.torch_functions import TAKES_LOGITS, TAKES_ODDS
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.local import LocalSchemes
from lightning_unitscale.schemes.placed_factors import MODEL, PlacedFactors
from lightning_unitscale.schemes.pushing import takers
from lightning_unitscale.schemes.scheme import Outputs, Weight

NEAR_ZERO = 1e-3  # of the usual size of a weight
SMALL_GAIN = 1 / 64  # of the same, a matrix drawn with a gain of 0.01 or less: meant to begin at almost nothing


class Weights:
    """The weights of a model, as its scheme is asked about them.

    Args:
        depths: L by call, of those in residual branches.
    """

    def __init__(self, draft: Draft, rules: LocalSchemes, depths: Mapping[int, float]) -> None:
        self.draft, self.rules, self.depths = draft, rules, depths
        self.facts = draft.trace.facts

    def place(self, placed: PlacedFactors) -> None:
        """Put the scheme's factor on each call of each weight."""
        for use in self.draft.uses.values():
            for call, value in zip(use.calls, use.values, strict=True):
                placed.at_uses[call.index, use.key] = self._factors(use, call, value)

    def _factors(self, use: Use, call: Call, value: Value) -> list[Factor]:
        if not self.draft.options.weights or self.draft.is_left_alone(use.key):
            return []
        on_top, weight = self.rules.scheme.on_top, self.asked(use)
        if on_top and self.stay_as_they_are(use.parameters):
            return []
        factors = list(self.rules.ask(use.parameters, lambda scheme: scheme.weight(weight)))
        if on_top:
            return factors
        if use.role in ("hidden", "readout"):
            factors += inverse(self._model_constant_of_input(call, use), "a constant on its input", MODEL)
            if use.is_expression:  # which keeps the scale it has
                factors += inverse(value.rms or 1.0, "RMS of the expression that the weight is", "the recorded step")
        if use.role == "readout" or (use.role in ("embedding", "position") and is_lookup(call.name)):
            after = self.draft.structure.model_constant_after(call.output)
            factors += inverse(after, "a constant on its output", MODEL)
        return factors

    def _model_constant_of_input(self, call: Call, use: Use) -> float:
        """Of the several weights of a call one absorbs it."""
        moving = [v for v in call.inputs if v.is_float and not v.parameters]
        if len(moving) != 1 or (call.index, use.key) not in takers(self.draft, call, moving[0]):
            return 1.0
        return self.draft.structure.model_constant(moving[0])

    def asked(self, use: Use) -> Weight:
        """What a rule is told of a use of a weight."""
        facts = self.facts[use.parameters[0]]
        depth = geometric_mean(self.depths.get(call.index, 1.0) for call in use.calls)
        is_tied = self._is_tied(use)
        in_branch = any(call.index in self.depths for call in use.calls)
        width, elements = facts.shape[-1] if facts.shape else 1, prod(facts.shape)
        outputs = self._outputs(use) if use.role == "readout" else self._outputs_of_all
        return Weight(use.role, use.fan_in, width, depth, is_tied, in_branch, facts.largest, elements, outputs)

    def _is_tied(self, use: Use) -> bool:
        return any(self.draft.roles[name] != use.role for name in use.parameters)

    def _outputs(self, use: Use) -> Outputs:
        """By what takes a readout's outputs; one that nothing takes in this step is as the others."""
        taken = self._taken(use) or [output for other in self._readouts for output in self._taken(other)]
        reaches = self.draft.structure.reaches
        if not taken or not all(reaches(output, TAKES_LOGITS | TAKES_ODDS) for output in taken):
            return "targets"
        classes = prod(self.facts[use.parameters[0]].shape) // use.fan_in
        return "logits" if classes > 2 and all(reaches(output, TAKES_LOGITS) for output in taken) else "odds"

    def _taken(self, use: Use) -> list[Value]:
        return [call.output for call in use.calls if self.draft.structure.consumers(call.output)]

    @cached_property
    def _readouts(self) -> list[Use]:
        return [use for use in self.draft.uses.values() if use.role == "readout"]

    @cached_property
    def _outputs_of_all(self) -> Outputs:
        """Logits where all readouts make them as they were drawn, that is, where none is tied."""
        all_are = all(self._outputs(use) == "logits" and not self._is_tied(use) for use in self._readouts)
        return "logits" if all_are else "targets"

    def uses_of(self, name: str) -> list[Use]:
        """Every use of a parameter."""
        return [use for use in self.draft.uses.values() if name in use.parameters]

    def main_use(self, parameter: ParameterPlan) -> Use | None:
        """The use that decides how a parameter starts and trains; None if it is left alone."""
        if parameter.reason or not self.draft.options.weights:
            return None
        return next((use for use in self.uses_of(parameter.name) if use.role == parameter.role), None)

    def stay_as_they_are(self, names: Iterable[str]) -> bool:
        """Whether a scheme that is on top of the model leaves these parameters at the scale that they have."""
        used = {name for use in self.draft.uses.values() if use.is_expression for name in use.parameters}
        return any(name in used or name in self.zeros or not self.facts[name].largest for name in names)

    @cached_property
    def zeros(self) -> set[str]:
        """Weights that start at zero by design, or so close to it that it is the same.

        Near zero is below a thousandth of the usual size, N(0, 1/fan_in), and of the model's other weights (a class
        token drawn with std 1e-6, the weight of a gate beside a bias of 1); for matrices below a sixty-fourth, as a
        gain of 0.01 or 0.001 is chosen so that a branch or head begins at almost nothing (the coordinate updates of
        an equivariant graph net, the policy head of an agent). They stay so: RMS 1 would make another model, and a
        learning rate relative to them would have no bounds.
        """
        uses = [use for use in self.draft.uses.values() if use.role in WEIGHT_ROLES]
        sizes = {(name, use.role): self.facts[name].rms * sqrt(use.fan_in) for use in uses for name in use.parameters}
        drawn = [size for size in sizes.values() if size]
        usual = min(1.0, median(drawn)) if drawn else 0.0
        limits = {role: usual * (SMALL_GAIN if role in ("hidden", "readout") else NEAR_ZERO) for role in WEIGHT_ROLES}
        return {name for (name, role), size in sizes.items() if size <= limits[role]}


def override_multipliers(plan: Plan, draft: Draft) -> None:
    """Put the multipliers that the user set in place of the scheme's."""
    for name, override in draft.overrides.items():
        if "multiplier" in override:
            for site in plan.sites:
                if name in site.multipliers and site.role == plan.parameters[name].role:
                    site.set_factors(name, [Factor(float(override["multiplier"]), "set by overrides")])
