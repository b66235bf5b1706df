"""Learning rates: the scheme's own, and the step relative to itself that each weight had in the untouched model.

With `lr_units="standard"` a weight keeps its relative step, whatever the scheme's rate: a step of η changes a weight of
RMS r by η / r of itself. Readouts have the scheme's step at the η that this is for the hidden weights, and embeddings
at least that: an embedding drawn at RMS 1 beside matrices at fan_in^-½ (T5, torch's own) hardly moves by the user's
rate, and where the scheme makes branches and outputs smaller it must.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log2, sqrt

from lightning_unitscale.engine.analysis.roles import WEIGHT_ROLES, Use
from lightning_unitscale.engine.plan.factors import Factor, geometric_mean
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.schemes.scheme import Rates, Weight
from lightning_unitscale.schemes.weights import NEAR_ZERO, Weights

STANDARD = 'lr_units="standard"'


class LearningRates:
    """Of the parameters of a plan in the making."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self.plan, self.weights, self.rules = plan, weights, weights.rules

    def set_all(self) -> None:
        """Give each parameter the scheme's rates, and its relative step; initial values are set before."""
        for parameter in self.plan.parameters.values():
            use = self.weights.main_use(parameter)
            if use is not None:
                self._set(parameter, use)
            elif parameter.role in ("scale", "other"):
                self._set_as_a_gain(parameter)

    def _set_as_a_gain(self, parameter: ParameterPlan) -> None:
        """What is left at its initial values (LayerScale, temperatures, decay rates) steps as gains of the model do.

        Relative to itself it may begin at almost nothing, or at a size that says nothing of the step it can bear.
        """
        if self.rules.scheme.on_top:
            return
        fan_ins = [use.fan_in for use in self.weights.draft.uses.values() if use.role == "hidden"]
        gain = Weight("norm", width=max(1, round(geometric_mean(fan_ins))) if fan_ins else 1)
        parameter.set_constant("unit_lr", self.rules.ask([parameter.name], lambda scheme: scheme.rates(gain)).adam)

    def _set(self, parameter: ParameterPlan, use: Use) -> None:
        weight = self.weights.asked(use)
        rates = self.rules.ask([parameter.name], lambda scheme: scheme.rates(weight))
        parameter.set_constant("unit_lr", rates.adam)
        parameter.set_constant("sgd_lr", rates.sgd)
        parameter.set_constant("depth_lr", rates.depth)
        parameter.set_constant("decay", rates.decay)
        if rates.eps is not None:
            parameter.set_constant("unit_eps", rates.eps)
        if self.rules.scheme.on_top:
            self._set_step_on_top(parameter)
        elif use.role in WEIGHT_ROLES:
            self._set_relative_step(parameter, use, rates)

    def _set_step_on_top(self, parameter: ParameterPlan) -> None:
        """The relative step that it had: exactly, where the function is kept, so that folded steps are plain."""
        if "initial_factor" not in parameter.causes:
            return
        exact = parameter.initial_factor
        rate = exact if self.rules.scheme.keeps_function else _rounded(exact)
        cause = "as its initial value was multiplied: the relative step that it had"
        parameter.set_constant("relative_lr", [Factor(rate, cause, STANDARD)])

    def _set_relative_step(self, parameter: ParameterPlan, use: Use, rates: Rates) -> None:
        if parameter.name in self.weights.zeros:
            cause = f"fan_in^½, fan_in = {use.fan_in}, of a weight that starts at zero"
            rate = Factor(use.fan_in**0.5, cause, STANDARD)
        else:
            rate = self._relative_step(parameter.initial_rms, use)
        parameter.set_constant("relative_lr", [rate, *rates.standard])

    def _relative_step(self, rms: float, use: Use) -> Factor:
        """What a learning rate of 1 changes a weight by, relative to it.

        Where a whole model is drawn so small that its first step would be many times the weights themselves, that is
        no step to reproduce; it is limited to that of weights at `NEAR_ZERO` of their usual size.
        """
        smallest = NEAR_ZERO / sqrt(use.fan_in)
        if rms < smallest:
            note = f"{use.key} is drawn with RMS {rms:.1g}: its learning rate is that of {smallest:.1g}"
            self.plan.notes.append(note)
        rate = _rounded(1 / max(rms, smallest))
        cause = f"1 / initial RMS {max(rms, smallest):.4g}, to 1/16 of an octave: the relative step that it had"
        return Factor(rate, cause, STANDARD)

    def keep_own_steps(self, models: Mapping[str, str]) -> None:
        """What takes the rule of a sibling keeps the relative step that it had itself.

        Args:
            models: the sibling of each.
        """
        if self.rules.scheme.on_top:
            return
        for name, model in models.items():
            parameter, sibling = self.plan.parameters[name], self.plan.parameters[model]
            use = self.weights.main_use(sibling)
            if use is None or use.role not in WEIGHT_ROLES or model in self.weights.zeros or not parameter.initial_rms:
                continue
            beyond = sibling.causes["relative_lr"][1:]
            parameter.set_constant("relative_lr", [self._relative_step(parameter.initial_rms, use), *beyond])

    def set_ends(self) -> None:
        """With lr_units="standard": readouts have the scheme's step at the hidden weights' η, embeddings at least that.

        A readout of a model without hidden weights, or that starts from zero, keeps its own.
        """
        if self.rules.scheme.on_top:
            return
        zeros = self.weights.zeros
        scaled = [p for p in self.plan.parameters.values() if p.initial_rms and not p.reason]
        etas = [p.relative_lr / p.unit_lr for p in scaled if p.role == "hidden" and p.name not in zeros]
        cause = f"mean η of {len(etas)} hidden weights for a rate of 1"
        mean = [Factor(geometric_mean(etas), cause, STANDARD)] if etas else []
        for parameter in self.plan.parameters.values():
            if parameter.reason or parameter.role not in ("readout", "embedding"):
                continue
            at_mean = [*mean, *parameter.causes.get("unit_lr", [])]
            if mean and parameter.name not in zeros:
                less = parameter.relative_lr < mean[0].value * parameter.unit_lr
                if parameter.role == "readout" or (less and parameter.initial_rms):
                    parameter.set_constant("relative_lr", at_mean)
            elif parameter.role == "readout":
                own = Factor(1 / abs(parameter.multiplier), "1 / multiplier: the step that it had", STANDARD)
                parameter.set_constant("relative_lr", [own])


def _rounded(rate: float) -> float:
    """To a sixteenth of an octave: weights drawn alike then share a learning rate, and groups stay few."""
    return float(2 ** (round(16 * log2(rate)) / 16))
