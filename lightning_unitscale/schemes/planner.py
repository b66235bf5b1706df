"""From a recorded step and a scheme's rules to a plan: the machinery that every scheme uses.

    draft      every parameter and every matmul-like call, with its role, or the reason why it is left alone
    factors    what the scheme says of each weight, branch, sum, attention and activation, pushed back to the weights
               that can take it; what no weight can take stands on a parameter-free site
    constants  initial values and learning rates
    neighbours experts that got no token and blocks that were left out take the rule of their siblings, copies inside
               the model that of the original
    resolve    where each constant is kept, by storage

The model's own constants (1/√d on logits, √d on embeddings, fixed residual multipliers) are absorbed: the rules give
the total, so each factor is divided by what the model has there itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import isclose, log2, prod, sqrt
from statistics import median
from typing import Any

from torch import nn

from lightning_unitscale.engine.analysis.activations import Activation
from lightning_unitscale.engine.analysis.attention import Attention
from lightning_unitscale.engine.analysis.left_out import Step, steps_of
from lightning_unitscale.engine.analysis.loss_path import used_parameters
from lightning_unitscale.engine.analysis.residuals import Residual, Stream
from lightning_unitscale.engine.analysis.roles import WEIGHT_ROLES, Use, primary_use
from lightning_unitscale.engine.analysis.structure import Sum
from lightning_unitscale.engine.plan.copies import include_copies
from lightning_unitscale.engine.plan.factors import Factor, averaged, geometric_mean, product, to_unit_scale
from lightning_unitscale.engine.plan.fold import resolve
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.siblings import include_siblings
from lightning_unitscale.engine.plan.site import READING, Site
from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.record.trace import Call, Trace, Value
from lightning_unitscale.ops import is_lookup
from lightning_unitscale.options import STORAGES, Options
from lightning_unitscale.schemes.activation_constants import call_rms, gaussian_rms
from lightning_unitscale.schemes.beside import BesideSites
from lightning_unitscale.schemes.by_hand import is_by_hand
from lightning_unitscale.schemes.draft import IN_FUNCTION, Draft
from lightning_unitscale.schemes.free_sites import FreeSites, parameter_free_site
from lightning_unitscale.schemes.local import LocalSchemes
from lightning_unitscale.schemes.pushing import CallUse, Push, pushes, takers
from lightning_unitscale.schemes.scheme import EarlierBranch, Rates, ResidualBranch, Scheme, Weight
from lightning_unitscale.schemes.seen_activations import SeenActivations, taken_back

NEAR_ZERO = 1e-3  # of the usual size of a weight
SMALL_GAIN = 1 / 64  # of the same, a matrix drawn with a gain of 0.01 or less: meant to begin at almost nothing
MODEL = "the model's own code, absorbed"
STANDARD = 'lr_units="standard"'


def make_plan(scheme: Scheme, module: nn.Module, trace: Trace, options: Options) -> Plan:
    """The plan of a scheme for a recorded step."""
    if not scheme.changes_training:
        plan = Draft(module, trace, options).plan({}, [])
        plan.changes_training = False
        resolve(plan, options.storage)
        return plan
    homeless: dict[str, str] = {}
    while True:
        planner = Planner(scheme, module, trace, options, homeless)
        plan = planner.plan()
        found = planner.homeless(plan)
        if not found:
            return plan
        homeless |= dict.fromkeys(found, f"it has two factors, one of them {IN_FUNCTION}")


class Planner:
    """Collects factors by (call index, parameter key) and parameter-free sites, then writes the plan."""

    def __init__(
        self, scheme: Scheme, module: nn.Module, trace: Trace, options: Options, homeless: Mapping[str, str]
    ) -> None:
        self.rules = scheme
        self.scheme, self.module, self.trace, self.options = LocalSchemes(scheme, options), module, trace, options
        self.draft = Draft(module, trace, options, homeless, scheme.cast)
        self.structure = self.draft.structure
        self.seen = SeenActivations(trace, self.structure)
        self.factors: dict[tuple[int, str], list[Factor]] = {}
        self.free = FreeSites(self.draft)
        self.depth: dict[int, float] = {}
        self.branches: list[tuple[Step, list[Factor]]] = []
        self.scaled_inputs: dict[Activation, float] = {}
        self.notes: list[str] = []

    def plan(self) -> Plan:
        """The whole plan, from top to bottom."""
        streams = [(stream, self._steps(stream)) for stream in self.structure.streams]
        for stream, steps in streams:
            self._note_depth(stream, len(steps) / 2)
        for use in self.draft.uses.values():
            for call, value in zip(use.calls, use.values, strict=True):
                self.factors[call.index, use.key] = self._weight_factors(use, call, value)
        if self.options.activations:
            for stream, steps in streams:
                self._branch_factors(stream, steps)
            for addition in self.structure.sums:
                self._sum_factors(addition)
            self._attention_factors()
            self._activation_factors()
        self._move_out_of_functions()
        sites = self.free.sites()
        if self.rules.keeps_function:
            for taker, back in taken_back(sites).items():
                for call in self.draft.uses[taker].calls:
                    self.factors[call.index, taker.key] = [*self.factors[call.index, taker.key], *back]
        self._follow(sites)
        if self.options.activations:
            beside = self._activation_site, self._attention_site, self.rules.on_top
            sites += BesideSites(self.draft, self.free, sites, *beside).find()
        plan = self.draft.plan(self.factors, sites)
        plan.families, plan.keeps_function = list(self.rules.families), self.rules.keeps_function
        for parameter in plan.parameters.values():
            self._initial_value_and_rates(parameter)
        self._multiplier_overrides(plan)
        self._say_what_is_divided(plan)
        plan.notes += self.notes
        models = include_siblings(plan, {name for name, _ in self.module.named_modules(remove_duplicate=False)})
        self._own_relative_steps(plan, models)
        self._branches_left_out(plan, models)
        include_copies(plan, self.module, used_parameters(self.trace, self.structure.learned))
        _hand_over_to_readings(plan)
        resolve(plan, self.options.storage)
        if not self.rules.on_top:
            self._readout_rates(plan)
        self.scheme.check_all_heard()
        return plan

    # --- weights ----------------------------------------------------------------------------------------------

    def _weight_factors(self, use: Use, call: Call, value: Value) -> list[Factor]:
        if not self.options.weights or self.draft.is_left_alone(use.key):
            return []
        weight = self._weight(use)
        if self.rules.on_top and self._stays_as_it_is(use.parameters):
            return []
        factors = list(self.scheme.ask(use.parameters, lambda scheme: scheme.weight(weight)))
        if self.rules.on_top:
            return factors
        if use.role in ("hidden", "readout"):
            factors += _inverse(self._model_constant_of_input(call, use), "a constant on its input", MODEL)
            if use.is_expression:  # which keeps the scale it has
                factors += _inverse(value.rms or 1.0, "RMS of the expression that the weight is", "the recorded step")
        if use.role == "readout" or (use.role in ("embedding", "position") and is_lookup(call.name)):
            after = self.structure.model_constant_after(call.output)
            factors += _inverse(after, "a constant on its output", MODEL)
        return factors

    def _weight(self, use: Use) -> Weight:
        facts = self.trace.facts[use.parameters[0]]
        depth = geometric_mean(self.depth.get(call.index, 1.0) for call in use.calls)
        is_tied = any(self.draft.roles[name] != use.role for name in use.parameters)
        in_branch = any(call.index in self.depth for call in use.calls)
        width, elements = facts.shape[-1] if facts.shape else 1, prod(facts.shape)
        return Weight(use.role, use.fan_in, width, depth, is_tied, in_branch, facts.largest, elements)

    def _model_constant_of_input(self, call: Call, use: Use) -> float:
        """Of the several weights of a call one absorbs it."""
        moving = [v for v in call.inputs if v.is_float and not v.parameters]
        if len(moving) != 1 or (call.index, use.key) not in takers(self.draft, call, moving[0]):
            return 1.0
        return self.structure.model_constant(moving[0])

    def _multiplier_overrides(self, plan: Plan) -> None:
        for name, override in self.draft.overrides.items():
            if "multiplier" in override:
                for site in plan.sites:
                    if name in site.multipliers and site.role == plan.parameters[name].role:
                        site.set_factors(name, [Factor(float(override["multiplier"]), "set by overrides")])

    # --- initial values and learning rates ------------------------------------------------------------------------

    def _initial_value_and_rates(self, parameter: ParameterPlan) -> None:
        facts = self.trace.facts[parameter.name]
        uses = [use for use in self.draft.uses.values() if parameter.name in use.parameters]
        use = next((use for use in uses if use.role == parameter.role), None)
        divides = self.rules.divides_gradients and self.options.gradients
        is_free = use is not None and not parameter.reason and parameter.name not in self.draft.by_hand.gradients
        parameter.divided_gradient = divides and is_free
        if use is None or parameter.reason or not self.options.weights:
            if parameter.role in ("scale", "other") and facts.rms:
                parameter.set_constant("unit_lr", [Factor(facts.rms, "its initial RMS, at which it is left")])
            return
        weight = self._weight(use)
        rates = self.scheme.ask([parameter.name], lambda scheme: scheme.rates(weight))
        parameter.set_constant("unit_lr", rates.adam)
        parameter.set_constant("sgd_lr", rates.sgd)
        parameter.set_constant("depth_lr", rates.depth)
        parameter.set_constant("decay", rates.decay)
        if rates.eps is not None:
            parameter.set_constant("unit_eps", rates.eps)
        parameter.fixed = use.is_expression
        parameter.stored_whole = any(use.in_function for use in uses)
        if self.rules.on_top:
            self._start_on_top(parameter, use)
        elif use.role in WEIGHT_ROLES:
            self._bring_to_unit_scale(parameter, use, rates)
        elif use.role == "bias" and not facts.is_constant and not self.draft.is_read(parameter.name):
            parameter.set_constant("initial_factor", [Factor(0.0, "biases start at 0")])

    def _start_on_top(self, parameter: ParameterPlan, use: Use) -> None:
        """Its relative step is what it was: exactly, where the function is kept, so that folded steps are plain."""
        if self._stays_as_it_is([parameter.name]):
            return
        weight = self._weight(use)
        parameter.set_constant("initial_factor", self.scheme.ask(use.parameters, lambda scheme: scheme.initial(weight)))
        rate = parameter.initial_factor if self.rules.keeps_function else _rounded(parameter.initial_factor)
        cause = "as its initial value was multiplied: the relative step that it had"
        parameter.set_constant("relative_lr", [Factor(rate, cause, STANDARD)])

    def _stays_as_it_is(self, names: Iterable[str]) -> bool:
        """Whether a scheme that is on top of the model leaves these parameters at the scale that they have."""
        used = {name for use in self.draft.uses.values() if use.is_expression for name in use.parameters}
        return any(name in used or name in self.zeros or not self.trace.facts[name].largest for name in names)

    def _bring_to_unit_scale(self, parameter: ParameterPlan, use: Use, rates: Rates) -> None:
        rms = self.trace.facts[parameter.name].rms
        starts_at_zero = parameter.name in self.zeros
        if starts_at_zero:
            rate = Factor(
                use.fan_in**0.5, f"fan_in^½, fan_in = {use.fan_in}, of a weight that starts at zero", STANDARD
            )
        else:
            rate = self._relative_step(rms, use)
        parameter.set_constant("relative_lr", [rate, *rates.standard])
        if parameter.fixed:
            parameter.multiplier = parameter.stored = rms or 1.0
        elif not starts_at_zero:
            parameter.set_constant("initial_factor", [to_unit_scale(rms)])

    def _relative_step(self, rms: float, use: Use) -> Factor:
        """What a learning rate of 1 changes a weight by, relative to it.

        Where a whole model is drawn so small that its first step would be many times the weights themselves, that is
        no step to reproduce; it is limited to that of weights at `NEAR_ZERO` of their usual size.
        """
        smallest = NEAR_ZERO / sqrt(use.fan_in)
        if rms < smallest:
            self.notes.append(f"{use.key} is drawn with RMS {rms:.1g}: its learning rate is that of {smallest:.1g}")
        rate = _rounded(1 / max(rms, smallest))
        return Factor(rate, f"1 / initial RMS {max(rms, smallest):.4g}: the relative step that it had", STANDARD)

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
        sizes = {
            (name, use.role): self.trace.facts[name].rms * sqrt(use.fan_in) for use in uses for name in use.parameters
        }
        drawn = [size for size in sizes.values() if size]
        usual = min(1.0, median(drawn)) if drawn else 0.0
        limits = {role: usual * (SMALL_GAIN if role in ("hidden", "readout") else NEAR_ZERO) for role in WEIGHT_ROLES}
        return {name for (name, role), size in sizes.items() if size <= limits[role]}

    def _readout_rates(self, plan: Plan) -> None:
        """With lr_units="standard": the scheme's step at the hidden weights' η; without any, or from zero, its own."""
        scaled = [p for p in plan.parameters.values() if p.initial_rms and not p.reason]
        etas = [p.relative_lr / p.unit_lr for p in scaled if p.role == "hidden" and p.name not in self.zeros]
        for parameter in plan.parameters.values():
            if parameter.role != "readout" or parameter.reason:
                continue
            if etas and parameter.name not in self.zeros:
                eta = Factor(geometric_mean(etas), f"mean η of {len(etas)} hidden weights for a rate of 1", STANDARD)
                parameter.set_constant("relative_lr", [eta, *parameter.causes.get("unit_lr", [])])
            else:
                own = Factor(1 / abs(parameter.multiplier), "1 / multiplier: the step that it had", STANDARD)
                parameter.set_constant("relative_lr", [own])

    def _say_what_is_divided(self, plan: Plan) -> None:
        """Name the exceptions: gradients that the optimizer sees otherwise, factors that follow each call, zeros."""
        if plan.divided_gradients:
            count = len(plan.divided_gradients)
            self.notes.append(
                f"the optimizer sees the gradients of {count} parameters divided by max|gradient| / √d, and not as "
                "they are; .grad holds the true ones but inside the update"
            )
        following = [site.name for site in plan.sites if site.divides_along is not None]
        if following:
            self.notes.append(
                f"{len(following)} activations are divided by max|f| / √n of each call's own output ({following[0]}"
                f"{' …' if len(following) > 1 else ''})"
            )
        zero = [p.name for p in plan.parameters.values() if not p.reason and not self.trace.facts[p.name].largest]
        if self.rules.on_top and self.options.weights and zero:
            names = ", ".join(zero[:3]) + (" …" if len(zero) > 3 else "")
            self.notes.append(f"left as they are, for they are all zero and have no scale to divide by: {names}")

    # --- residual streams and sums ------------------------------------------------------------------------------

    def _push(self, found: Iterable[Push], factors: list[Factor]) -> None:
        """Put factors on the uses at the sources of a tensor."""
        for push in found:
            for use in push.uses:
                self.factors[use] = [*self.factors.get(use, []), *factors]

    def _steps(self, stream: Stream) -> list[Step]:
        used: dict[int, frozenset[str]] = {}
        for use in self.draft.uses.values():
            for call in use.calls:
                used[call.index] = used.get(call.index, frozenset()).union(use.parameters)
        shapes = {name: facts.shape for name, facts in self.trace.facts.items()}
        unused = frozenset(name for name, role in self.draft.roles.items() if role == "unused")
        return steps_of(stream, used, shapes, unused)

    def _note_depth(self, stream: Stream, depth: float) -> None:
        for branch in sorted((b for r in stream.residuals for b in r.branches), key=lambda b: -len(b.calls)):
            for index in branch.calls:
                self.depth[index] = depth

    def _branch_factors(self, stream: Stream, steps: list[Step]) -> None:
        depth, post_norm = len(steps) / 2, self.structure.is_post_norm(stream)
        for step in steps:
            earlier = [other for other in steps if other.order < step.order]
            factors = self._branch_rule(step, earlier, depth, post_norm)
            self.branches.append((step, factors))
            if factors and step.seen is not None:
                residual, branch = step.seen
                self._scale_branch(residual, branch.value, factors)

    def _branch_rule(self, step: Step, earlier: Iterable[Step], depth: float, post_norm: bool) -> list[Factor]:
        before = tuple(EarlierBranch(other.kind, self.scheme.at(other.parameters)) for other in earlier)
        branch = ResidualBranch(step.kind, depth, before, post_norm)
        return self.scheme.ask(step.parameters, lambda scheme: scheme.branch(branch))

    def _own_relative_steps(self, plan: Plan, models: Mapping[str, str]) -> None:
        """What takes the rule of a sibling keeps the relative step that it had itself."""
        for name, model in models.items() if not self.rules.on_top else ():
            rms, role = self.trace.facts[name].rms, plan.parameters[model].role
            uses = [use for use in self.draft.uses.values() if model in use.parameters and use.role == role]
            if uses and rms and role in WEIGHT_ROLES and model not in self.zeros and not plan.parameters[model].reason:
                beyond = plan.parameters[model].causes["relative_lr"][1:]
                plan.parameters[name].set_constant("relative_lr", [self._relative_step(rms, uses[0]), *beyond])

    def _branches_left_out(self, plan: Plan, models: Mapping[str, str]) -> None:
        """Where a branch's factor depends on its place, those that were left out have another than their siblings."""
        of = {name: factors for step, factors in self.branches if step.seen is not None for name in step.parameters}
        for step, factors in self.branches:
            for name in step.parameters if step.seen is None else ():
                theirs = of.get(models.get(name, ""), [])
                for site in plan.sites if theirs != factors else ():
                    causes = site.causes.get(name, [])
                    if theirs and all(factor in causes for factor in theirs):
                        site.set_factors(name, [*(f for f in causes if f not in theirs), *factors])

    def _scale_branch(self, residual: Residual, value: Value, factors: list[Factor]) -> None:
        found = pushes(self.draft, value, {call.index for call in residual.calls})
        if found:
            for push in found:
                self._push([push], [*factors, *self._branch_constant(push.model_constant)])
            return
        call = next(call for call in residual.calls if value in call.inputs)
        if reason := self.draft.no_place(call):
            self.notes.append(f"the residual addition {_at(call)} was left alone: {reason}")
            return
        own = max((source.model_constant for source in self.structure.sources(value)[0]), default=1.0)
        site = parameter_free_site(call, "residual", [*factors, *self._branch_constant(own)], value)
        site.reason = "the branch does not end in a matmul or norm of its own"
        self.free.add(site)

    def _branch_constant(self, own: float) -> list[Factor]:
        """The factor that takes the model's own constant out of a branch.

        Above 1, in a step that draws random numbers, it is 1/(1 - p) of a branch kept with probability 1 - p, and
        belongs to the drawing: without it, in evaluation, the branch would be too small.
        """
        return [] if own > 1 and self.trace.drew else _inverse(own, "a constant on the branch", MODEL)

    def _sum_factors(self, addition: Sum) -> None:
        if self.structure.goes_only_into_norms(addition.call.output):
            return
        drawn = [term for term in addition.terms if not self._is_zero(term)]
        if len(drawn) < 2:
            return
        factors = self.scheme.ask(_modules(addition.call), lambda scheme: scheme.sum(len(drawn)))
        if not factors:
            return
        found = [pushes(self.draft, term, set(addition.chain)) for term in addition.terms]
        if all(found):
            for terms in found:
                self._push(terms, factors)
        elif not self.draft.no_place(addition.call):
            site = parameter_free_site(addition.call, "sum", factors)
            site.reason = "a term is used elsewhere too, or is left alone"
            self.free.add(site)

    def _is_zero(self, term: Value) -> bool:
        """Whether a term is zero at the start: all its weights are."""
        names = [
            name
            for source in self.structure.sources(term)[0]
            for value in (source.value, *(source.value.producer.inputs if source.value.producer else ()))
            for name in value.parameters
        ]
        return bool(names) and all(self.trace.facts[name].rms == 0 or name in self.zeros for name in names)

    # --- attention and activations ------------------------------------------------------------------------------

    def _attention_factors(self) -> None:
        for attention in self.structure.attentions:
            call, factors = attention.call, self._logit_factors(attention)
            if factors is None:
                continue
            sides = (pushes(self.draft, side, {call.index}) for side in (attention.query, attention.key))
            found = next(filter(None, sides), [])
            if reason := self.draft.no_place(call):
                if call.in_function and self._are_all_calls(use for push in found for use in push.uses):
                    self._push(found, factors)
                else:
                    self.notes.append(f"the attention {_at(call)} was left alone: {reason}")
                continue
            site = self._attention_site(attention)
            assert site is not None
            into = [use for push in found for use in push.uses]
            site.fold_into = [UseId(key, self.trace.calls[index].name) for index, key in into]
            if not into:
                site.reason = "query and key come out of one weight, or are shared"
            self.free.add(site, (self.trace.calls[index] for index, _ in into))

    def _logit_factors(self, attention: Attention) -> list[Factor] | None:
        rule = self.scheme.ask(_modules(attention.call), lambda scheme: scheme.attention(attention.head_dim))
        if rule is None:
            return None
        return [*rule, *_inverse(attention.model_constant, "its constant on the logits", MODEL)]

    def _attention_site(self, attention: Attention) -> Site | None:
        factors = self._logit_factors(attention)
        if factors is None or self.draft.no_place(attention.call):
            return None
        site = parameter_free_site(attention.call, "attention", factors, attention.query)
        site.last_dim = attention.head_dim if attention.query.shape[-1] == attention.head_dim else None
        return site

    def _activation_factors(self) -> None:
        for activation in self.structure.activations:
            self._scale_activation_input(activation)
            targets = self.structure.targets(activation.output) or []
            taken = [takers(self.draft, call, operand) for call, operand in targets]
            uses = [use for found in taken for use in found] if all(taken) else []
            site = self._activation_site(activation)
            if site is None:
                self._activation_without_place(activation, uses)
                continue
            if is_by_hand(activation.output):
                site.leave_alone("its output is scaled by hand")
            elif not uses:
                site.leave_alone("its output does not go into scaled matmuls alone")
            elif site.divides_along is not None:
                site.reason = "found anew in every call"
            else:
                site.fold_into = list(dict.fromkeys(UseId(key, self.trace.calls[i].name) for i, key in uses))
            self.free.add(site, (call for call, _ in targets))

    def _scale_activation_input(self, activation: Activation) -> None:
        """Put the scheme's factor on the weights that make the input of an activation."""
        factors = self.scheme.ask(activation.modules, lambda scheme: scheme.activation_input())
        if not factors:
            return
        found = pushes(self.draft, activation.input, activation.calls)
        if found and (activation.call is None or activation.call.name != "glu"):  # whose input is the gated half too
            self._push(found, factors)
            self.scaled_inputs[activation] = product(factors)
        else:
            causes, where = ", ".join(factor.cause for factor in factors), "".join(activation.modules) or "a hook"
            self.notes.append(f"{causes} left an activation of {where} alone: no weight makes its input for it alone")

    def _activation_without_place(self, activation: Activation, uses: list[CallUse]) -> None:
        """Inside a Function: what the matmuls behind it can't take is left out."""
        call = activation.call
        if call is None:
            return
        rms = call_rms(call, self.scaled_inputs.get(activation, 1.0))
        factors = self.scheme.ask(activation.modules, lambda scheme: scheme.activation(rms))
        if factors and call.in_function and self._are_all_calls(uses):
            for use in uses:
                self.factors[use] = [*self.factors.get(use, []), *factors]
        elif factors:
            self.notes.append(f"the activation {_at(call)} was left alone: {self.draft.no_place(call)}")

    def _activation_site(self, activation: Activation) -> Site | None:
        """The site of an activation; None where it has no place, or the scheme no rule for it."""
        scale = self.scaled_inputs.get(activation, 1.0)
        if activation.span is not None:
            function: Any = self.module.get_submodule(activation.span.module)
            rms = gaussian_rms(function.forward, scale)
            site = Site(activation.span.module, "forward", "output", "activation", ordinal=0)
        else:
            call = activation.call
            assert call is not None
            if self.draft.no_place(call):
                return None
            rms, site = call_rms(call, scale), parameter_free_site(call, "activation", [])
        site.set_factors("", self.scheme.ask(activation.modules, lambda scheme: scheme.activation(rms)))
        self.seen.scale(activation, site, self.rules)
        return site if site.causes[""] else None

    # --- calls beside the loss ------------------------------------------------------------------------------------

    def _follow(self, sites: list[Site]) -> None:
        """Give uses that a call beside the loss alone makes of a weight the factors that it has on the loss's path."""
        for use in self.draft.uses.values():
            main = use.follows
            if main is None:
                continue
            factors = averaged([self.factors[call.index, main.key] for call in main.calls])
            for call in use.calls:
                self.factors[call.index, use.key] = factors
            for site in sites:
                if main.id in site.fold_into:
                    site.fold_into.append(use.id)

    # --- hand-written autograd.Functions --------------------------------------------------------------------------

    def _move_out_of_functions(self) -> None:
        """Scale the activation, outside, by what a use inside a Function has beyond the factor its weight stores.

        A tied readout in a fused linear and cross-entropy, say, whose weight stores the factor of the embedding.
        """
        for use in self.draft.uses.values():
            if not use.in_function or self.draft.is_left_alone(use.key):
                continue
            main = primary_use(self._uses_of(use.key))
            stored = self.factors[main.calls[0].index, use.key]
            for call in use.calls:
                wanted = self.factors[call.index, use.key]
                if isclose(product(wanted), product(stored), rel_tol=1e-12):
                    continue
                beyond = [*wanted, *_inverse(product(stored), "what the weight stores for its other use")]
                if self._scale_operand(call, beyond):
                    self.factors[call.index, use.key] = list(stored)

    def _scale_operand(self, call: Call, factors: list[Factor]) -> bool:
        """Multiply the activation that a call works on, where it is made, if nothing else uses it."""
        moving = [v for v in call.inputs if v.is_float and v.requires_grad and not v.parameters]
        if len(moving) != 1:
            return False
        found = pushes(self.draft, moving[0], {call.index})
        if self._are_all_calls(use for push in found for use in push.uses):
            self._push(found, factors)
            return True
        sources, passed = self.structure.sources(moving[0])
        maker = sources[0].value.producer
        if len(sources) > 1 or maker is None or self.draft.no_place(maker) or not self._is_called_once(maker):
            return False
        site = parameter_free_site(maker, "operand", factors)
        site.reason = "of a matmul inside a hand-written autograd.Function"
        if site in self.free or not self.structure.only_feeds(maker.output, passed, {call.index}):
            return False
        self.free.add(site)
        return True

    def _are_all_calls(self, uses: Iterable[CallUse]) -> bool:
        """Whether there are uses, and their weights are called nowhere else: a factor on them acts here alone."""
        found = set(uses)
        calls = {(call.index, key) for _, key in found for use in self._uses_of(key) for call in use.calls}
        return bool(found) and calls == found

    def _uses_of(self, key: ParameterKey) -> list[Use]:
        return [use for use in self.draft.uses.values() if use.key == key]

    def _is_called_once(self, maker: Call) -> bool:
        return (
            self.draft.counted_calls.get(maker.place.at_every_call, []).count(maker)
            == 1
            == sum(call.place == maker.place for call in self.structure.calls)
        )

    def homeless(self, plan: Plan) -> set[str]:
        """Parameters with an explicit factor, in either storage, inside a Function."""
        found: set[str] = set()
        for storage in STORAGES:
            resolve(plan, storage)
            for site in plan.sites:
                for key, factor in site.factors.items():
                    use = self.draft.uses.get(UseId(key, site.op))
                    if factor != 1.0 and use is not None and use.in_function:
                        found.update(use.parameters)
        resolve(plan, self.options.storage)
        return found


def _hand_over_to_readings(plan: Plan) -> None:
    """Give each reading the weight as the untouched model would have it."""
    for site in plan.sites:
        if site.role == READING:
            parameter = plan.parameters[site.params[0]]
            initial = 1.0 if parameter.fixed else parameter.initial_factor
            site.set_factors(parameter.name, _inverse(initial, "in the units of the untouched model"))


def _rounded(rate: float) -> float:
    """To a sixteenth of an octave: weights drawn alike then share a learning rate, and groups stay few."""
    return float(2 ** (round(16 * log2(rate)) / 16))


def _inverse(constant: float, cause: str, source: str = "") -> list[Factor]:
    """The factor that takes a constant out; none for 1."""
    return [] if constant == 1.0 else [Factor(1 / constant, f"1 / {constant:.4g}: {cause}", source)]


def _modules(call: Call) -> list[str]:
    """The name of the module whose code makes a call."""
    return [call.frame.module] if call.frame is not None else []


def _at(call: Call) -> str:
    return f"at {call.frame}" if call.frame else f"({call.name})"
