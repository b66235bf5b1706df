"""What each parameter starts at: weights at RMS 1, biases at 0, and what is left as the model draws it."""

from __future__ import annotations

from math import inf

from lightning_unitscale.engine.analysis.roles import WEIGHT_ROLES, Use
from lightning_unitscale.engine.plan.factors import Factor, to_unit_scale
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.schemes.weights import Weights

FAR_LARGER = 8  # initialisers draw biases like weights, or smaller


def set_initial_values(plan: Plan, weights: Weights) -> None:
    """Give each parameter its factor on the initial value, and say what of its scale is kept stored."""
    for parameter in plan.parameters.values():
        use = weights.main_use(parameter)
        if use is None:
            continue
        parameter.fixed = use.is_expression
        parameter.stored_whole = any(other.in_function for other in weights.uses_of(parameter.name))
        if weights.rules.scheme.on_top:
            _start_on_top(parameter, use, weights)
        elif use.role in WEIGHT_ROLES:
            _bring_to_unit_scale(parameter, starts_at_zero=parameter.name in weights.zeros)
        elif use.role == "bias":
            _start_at_zero(parameter, use, weights)
    _note_zeros(plan, weights)


def _start_on_top(parameter: ParameterPlan, use: Use, weights: Weights) -> None:
    if not weights.stay_as_they_are([parameter.name]):
        weight = weights.asked(use)
        initial = weights.rules.ask(use.parameters, lambda scheme: scheme.initial(weight))
        parameter.set_constant("initial_factor", initial)


def _bring_to_unit_scale(parameter: ParameterPlan, *, starts_at_zero: bool) -> None:
    if parameter.fixed:
        parameter.multiplier = parameter.stored = parameter.initial_rms or 1.0
    elif not starts_at_zero:
        parameter.set_constant("initial_factor", [to_unit_scale(parameter.initial_rms)])


def _start_at_zero(bias: ParameterPlan, use: Use, weights: Weights) -> None:
    """A bias that was set means something, and so does one whose value the step reads.

    It is constant (an LSTM's forget gate), no draw about zero, or far larger than the weights beside it (the logarithms
    of how frequent classes are, at a readout).
    """
    facts = weights.facts[bias.name]
    beside = {name for call in use.calls for value in call.inputs for name in value.parameters}
    matrices = [weights.facts[name].largest for name in beside if len(weights.facts[name].shape) > 1]
    is_far_larger = facts.largest > FAR_LARGER * max(matrices, default=inf)
    if not (facts.is_constant or facts.is_set or is_far_larger or weights.draft.is_read(bias.name)):
        bias.set_constant("initial_factor", [Factor(0.0, "biases start at 0")])


def _note_zeros(plan: Plan, weights: Weights) -> None:
    zero = [p.name for p in plan.parameters.values() if not p.reason and not weights.facts[p.name].largest]
    if weights.rules.scheme.on_top and weights.draft.options.weights and zero:
        names = ", ".join(zero[:3]) + (" …" if len(zero) > 3 else "")
        plan.notes.append(f"left as they are, for they are all zero and have no scale to divide by: {names}")
