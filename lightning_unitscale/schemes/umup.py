"""u-μP: the Unit-Scaled Maximal Update Parametrization (Blake et al., arXiv 2407.17465).

Weights have RMS 1 and explicit multipliers (Table 2 of the paper):

    hidden weight    W · fan_in^-½            learning rate η · fan_in^-½ · L^-½ inside residual branches
    readout weight   W · fan_in^-1            η · 4; tied to an embedding: W · 4 fan_in^-1, the embedding's rate
    embedding        W                        η · d_model^-½
    bias, norm gain  1                        η / width
    attention        softmax(q·k / d_head)    in place of the model's own factor
    activation f     f(x) / √E[f(z)²], z ~ N(0, 1)

Residual streams with L pairs of branches (L = half their number). Pre-norm: each branch × α/√L, the addition left
alone, which is the paper's τ rule with its common denominators multiplied out (appendix G.2.2). Post-norm: branch i ×
τ_i = α/√(L + n_attn·α_attn² + n_mlp·α_mlp²), n counting the branches before it; the norm does the dividing.

    α_mlp = r·√(2/(1+ρ²)),  α_attn = ρ·α_mlp,   r = ρ = 1

Two learning rates differ from the paper, whose models have neither gains nor biases. There all of them have η; at
η = 1 an Adam step would change a gain of 1 by 1. Here a bias or gain has the rate that a hidden weight of its width has
in folded storage, and the readout 4 times the paper's. Measured on the default pre-training job (300 steps, one seed,
held-out nats per byte, best η):  width 64: 2.01 → 1.72 (gains) → 1.64 (readout);  width 256: 1.76 → 1.56 (readout).

A readout that is the embedding too has the embedding's step, η · d_model^-½, so its 4 stands in the forward pass.
Measured (GPT-2, 300 steps, held-out nats per byte, multiplier times fan_in = 1 and 4):  width 128, η = 1: 2.376, 2.297;
3e-4 in standard units: 3.151, 2.421, untouched 2.523. (16 learns faster still, 2.358, but starts from logits so large
that a model of few tokens begins at twice the loss of guessing.)

With lr_units="standard" a learning rate `lr` gives each hidden weight the relative step that it had in the untouched
model: η = (lr / its initial RMS) · √(fan_in · L). The readout has the step of the table at the geometric mean of these
η. Keeping the readout's own step instead falls behind the untouched model as the width grows: there most of the first
change of the logits comes from the hidden weights, through a readout whose initial RMS is that of any weight, and the
readout of u-μP starts √fan_in smaller. Measured (width 256, 3e-4, one seed): untouched 1.785; readout's own step 1.996,
5 times that 1.897, the table's (27 times) 1.618.

The model's own constants (1/√d on logits, √d on embeddings, fixed residual multipliers) are absorbed: the rules above
give the total. Under SGD, learning rates are fan_in (hidden) and width (others), the gradient's own scale taken out
(μP, Yang & Hu, arXiv 2203.03466, Table 8).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from math import isclose, log2, sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.analysis.activations import Activation
from lightning_unitscale.engine.analysis.graph import Source
from lightning_unitscale.engine.analysis.residuals import Residual, Stream
from lightning_unitscale.engine.analysis.roles import WEIGHT_ROLES, Use, primary_use
from lightning_unitscale.engine.analysis.structure import Sum
from lightning_unitscale.engine.plan.copies import include_copies
from lightning_unitscale.engine.plan.fold import resolve
from lightning_unitscale.engine.plan.plan import EVERY_CALL, ParameterPlan, Plan, Site
from lightning_unitscale.engine.plan.siblings import include_siblings
from lightning_unitscale.engine.record.trace import Call, Trace, Value
from lightning_unitscale.ops import is_lookup
from lightning_unitscale.options import STORAGES, Options
from lightning_unitscale.schemes.draft import IN_FUNCTION, Draft, geometric_mean, parameter_free_site

RESIDUAL_MULTIPLIER = 1.0  # r
ATTENTION_RATIO = 1.0  # ρ
ATTENTION_MULTIPLIER = 1.0
NEAR_ZERO = 1e-3
READOUT_RATE = 4.0  # a tied readout: its multiplier
_GRID = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
_DENSITY = torch.exp(-0.5 * _GRID**2) / sqrt(2 * torch.pi)


def umup(module: nn.Module, trace: Trace, options: Options) -> Plan:
    """The plan of u-μP for a recorded step."""
    left_alone: dict[str, str] = {}
    while True:
        planner = _Planner(module, trace, options, left_alone)
        plan = planner.plan()
        homeless = planner.homeless(plan)
        if not homeless:
            return plan
        left_alone |= dict.fromkeys(homeless, f"it has two factors, one of them {IN_FUNCTION}")


class _Planner:
    """Collects multipliers by (call index, parameter key) and parameter-free sites, then writes the plan."""

    def __init__(self, module: nn.Module, trace: Trace, options: Options, left_alone: Mapping[str, str]) -> None:
        self.module, self.trace, self.options = module, trace, options
        self.draft = Draft(module, trace, options, left_alone)
        self.structure = self.draft.structure
        self.multipliers: dict[tuple[int, str], float] = {}
        self.depth: dict[int, float] = {}
        self.free: dict[tuple[Any, ...], list[tuple[Site, list[Call]]]] = defaultdict(list)
        self.notes: list[str] = []

    def plan(self) -> Plan:
        for use in self.draft.uses.values():
            for call, value in zip(use.calls, use.values, strict=True):
                self.multipliers[call.index, use.key] = self._multiplier(use, call, value)
        for stream in self.structure.streams:
            self._depth(stream)
        if self.options.activations:
            for stream in self.structure.streams:
                self._residual_factors(stream)
            for addition in self.structure.sums:
                self._sum_factors(addition)
            self._attention_factors()
            self._activation_factors()
        self._move_out_of_functions()
        plan = self.draft.plan(self.multipliers, self._free_sites())
        for parameter in plan.parameters.values():
            self._initial_value_and_step(parameter)
        self._multiplier_overrides(plan)
        plan.notes += self.notes
        include_siblings(plan)
        include_copies(plan, self.module)
        resolve(plan, self.options.storage)
        self._readout_steps(plan)
        return plan

    # --- weights ----------------------------------------------------------------------------------------------

    def _multiplier(self, use: Use, call: Call, value: Value) -> float:
        if not self.options.weights or self.draft.is_alone(use.key):
            return 1.0
        drawn = (value.rms or 1.0) if use.is_expression else 1.0  # an expression keeps the scale it has
        if use.role == "hidden":
            return 1 / (sqrt(use.fan_in) * self._own_constant_of_input(call) * drawn)
        if use.role == "readout":
            own = self._own_constant_of_input(call) * self.structure.own_constant_after(call.output)
            is_tied = any(self.draft.roles[name] != use.role for name in use.parameters)
            return (READOUT_RATE if is_tied else 1.0) / use.fan_in / own / drawn
        if use.role in ("embedding", "position") and is_lookup(call.name):
            return 1 / self.structure.own_constant_after(call.output)
        return 1.0

    def _own_constant_of_input(self, call: Call) -> float:
        moving = [v for v in call.inputs if v.is_float and not v.parameters]
        return self.structure.own_constant(moving[0]) if len(moving) == 1 else 1.0

    def _initial_value_and_step(self, parameter: ParameterPlan) -> None:
        facts = self.trace.facts[parameter.name]
        uses = [use for use in self.draft.uses.values() if parameter.name in use.parameters]
        use = next((use for use in uses if use.role == parameter.role), None)
        if use is None or parameter.reason or not self.options.weights:
            if parameter.role in ("scale", "other") and facts.rms:
                parameter.unit_lr = facts.rms
            return
        width = float(facts.shape[-1]) if facts.shape else 1.0
        parameter.sgd_lr = use.fan_in if use.role == "hidden" else width
        parameter.unit_lr = READOUT_RATE if use.role == "readout" else 1 / max(use.fan_in, width)
        depth = geometric_mean(self.depth.get(call.index, 1.0) for call in use.calls)
        if use.role == "hidden":
            parameter.depth_lr = depth**-0.5
            parameter.unit_lr = (use.fan_in * depth) ** -0.5
        elif use.role in ("embedding", "position", "token"):
            parameter.unit_lr = width**-0.5
        parameter.fixed = use.is_expression
        parameter.stored_whole = any(use.in_function for use in uses)
        if use.role in WEIGHT_ROLES:
            starts_at_zero = parameter.name in self.zeros
            parameter.relative_lr = use.fan_in**0.5 if starts_at_zero else self._relative_step(facts.rms, use)
            if parameter.fixed:
                parameter.multiplier = parameter.stored = facts.rms or 1.0
            elif not starts_at_zero:
                parameter.initial_factor = 1 / facts.rms
        elif use.role == "bias" and not facts.is_constant:
            parameter.initial_factor = 0.0

    def _relative_step(self, rms: float, use: Use) -> float:
        """What a learning rate of 1 changes a weight by, relative to it.

        Where a whole model is drawn so small that its first step would be many times the weights themselves, that is
        no step to reproduce; it is limited to that of weights at `NEAR_ZERO` of their usual size.
        """
        smallest = NEAR_ZERO / sqrt(use.fan_in)
        if rms < smallest:
            self.notes.append(f"{use.key} is drawn with RMS {rms:.1g}: its learning rate is that of {smallest:.1g}")
        return _rounded(1 / max(rms, smallest))

    @cached_property
    def zeros(self) -> set[str]:
        """Weights that start at zero by design, or so close to it that it is the same.

        Near zero is below a thousandth of the usual size, N(0, 1/fan_in), and of the model's other weights (a class
        token drawn with std 1e-6, the weight of a gate beside a bias of 1). They stay so: RMS 1 would make another
        model, and a learning rate relative to them would have no bounds.
        """
        sizes = {
            name: self.trace.facts[name].rms * sqrt(use.fan_in)
            for use in self.draft.uses.values()
            if use.role in WEIGHT_ROLES
            for name in use.parameters
        }
        drawn = [size for size in sizes.values() if size]
        limit = NEAR_ZERO * min(1.0, median(drawn)) if drawn else 0.0
        return {name for name, size in sizes.items() if size <= limit}

    def _multiplier_overrides(self, plan: Plan) -> None:
        for name, override in self.draft.overrides.items():
            if "multiplier" in override:
                for site in plan.sites:
                    if name in site.multipliers and site.role == plan.parameters[name].role:
                        site.multipliers[name] = float(override["multiplier"])
                        site.multiplier = site.multipliers[site.params[0]]

    def _readout_steps(self, plan: Plan) -> None:
        """With lr_units="standard": the table's step at the η of the hidden weights, or, without any, its own."""
        scaled = [p for p in plan.parameters.values() if p.name not in self.zeros and p.initial_rms and not p.reason]
        rates = [p.relative_lr / p.unit_lr for p in scaled if p.role == "hidden"]
        for parameter in (p for p in scaled if p.role == "readout"):
            own = 1 / abs(parameter.multiplier)
            parameter.relative_lr = geometric_mean(rates) * parameter.unit_lr if rates else own

    # --- pushing a factor back to where a tensor is made --------------------------------------------------------

    def _can_push(self, value: Value, end: set[int]) -> list[tuple[Source, list[tuple[int, str]]]] | None:
        """The uses (call index, key) that can take a factor of `value`, which is used by the calls `end` alone."""
        sources, passed = self.structure.sources(value)
        found = []
        for source in sources:
            uses = self._uses_at(source.value, passed | end)
            if not uses or any(self.draft.is_alone(key) for _, key in uses):
                return None
            if not source.value.parameters and not self.structure.only_feeds(source.value, passed, end):
                return None
            found.append((source, uses))
        return found

    def _uses_at(self, value: Value, consumers: set[int] | frozenset[int]) -> list[tuple[int, str]]:
        if value.parameters:
            return [(call.index, value.key) for call in value.consumers if call.index in consumers]
        call = value.producer
        if call is None:
            return []
        uses = [(call.index, v.key) for v in dict.fromkeys(call.inputs) if v.parameters]
        if call in self.structure.gains and call.name == "add":  # a norm's bias comes after its gain
            above = next((v for v in call.inputs if not v.parameters), None)
            uses += self._uses_at(above, consumers) if above is not None else []
        return uses

    def _push(self, pushes: list[tuple[Source, list[tuple[int, str]]]], factor: float, absorb: bool) -> None:
        for source, uses in pushes:
            producer = source.value.producer
            absorbed = producer is not None and is_lookup(producer.name)
            own = source.own if absorb and not absorbed else 1.0
            for use in uses:
                self.multipliers[use] = self.multipliers.get(use, 1.0) * factor / own

    # --- residual streams and sums ------------------------------------------------------------------------------

    def _depth(self, stream: Stream) -> None:
        depth = stream.branch_count / 2
        for branch in sorted((b for r in stream.residuals for b in r.branches), key=lambda b: -len(b.calls)):
            for index in branch.calls:
                self.depth[index] = depth

    def _residual_factors(self, stream: Stream) -> None:
        depth, post_norm = stream.branch_count / 2, self.structure.is_post_norm(stream)
        alpha_mlp = RESIDUAL_MULTIPLIER * sqrt(2 / (1 + ATTENTION_RATIO**2))
        alpha = {"mlp": alpha_mlp, "attention": ATTENTION_RATIO * alpha_mlp}
        before = 0.0
        for residual in stream.residuals:
            for branch in residual.branches:
                factor = alpha[branch.kind] / sqrt(depth + before if post_norm else depth)
                self._scale_branch(residual, branch.value, factor)
            before += sum(alpha[branch.kind] ** 2 for branch in residual.branches)

    def _scale_branch(self, residual: Residual, value: Value, factor: float) -> None:
        pushes = self._can_push(value, {call.index for call in residual.calls})
        if pushes:
            self._push(pushes, factor, absorb=True)
            return
        call = next(call for call in residual.calls if value in call.inputs)
        if reason := self.draft.no_place(call):
            self.notes.append(f"the residual addition {_at(call)} was left alone: {reason}")
            return
        own = max((source.own for source in self.structure.sources(value)[0]), default=1.0)
        site = parameter_free_site(call, "residual", factor / own, value)
        site.reason = "the branch does not end in a matmul or norm of its own"
        self._add_free(site, [])

    def _sum_factors(self, addition: Sum) -> None:
        if self.structure.goes_only_into_norms(addition.call.output):
            return
        drawn = [term for term in addition.terms if not self._is_zero(term)]
        if len(drawn) < 2:
            return
        factor = len(drawn) ** -0.5
        pushes = [self._can_push(term, set(addition.chain)) for term in addition.terms]
        if all(pushes):
            for push in pushes:
                self._push(push or [], factor, absorb=False)
        elif not self.draft.no_place(addition.call):
            site = parameter_free_site(addition.call, "sum", factor)
            site.reason = "a term is used elsewhere too, or is left alone"
            self._add_free(site, [])

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
            call = attention.call
            factor = ATTENTION_MULTIPLIER / attention.head_dim / attention.own
            sides = (self._can_push(side, {call.index}) for side in (attention.query, attention.key))
            pushes = next(filter(None, sides), [])
            if reason := self.draft.no_place(call):
                if pushes and call.in_function:
                    self._push(pushes, factor, absorb=False)
                else:
                    self.notes.append(f"the attention {_at(call)} was left alone: {reason}")
                continue
            site = parameter_free_site(call, "attention", factor, attention.query)
            site.last_dim = attention.head_dim if attention.query.shape[-1] == attention.head_dim else None
            into = [use for _, uses in pushes for use in uses]
            site.fold_into = [[key, self.trace.calls[index].name] for index, key in into]
            if not into:
                site.reason = "query and key come out of one weight, or are shared"
            self._add_free(site, [self.trace.calls[index] for index, _ in into])

    def _activation_factors(self) -> None:
        for activation in self.structure.activations:
            site = self._activation_site(activation)
            if site is None:
                continue
            targets = self.structure.targets(activation.output)
            weights = [(call, value.key) for call in targets or [] for value in self.structure.weights_of(call)]
            if not weights or any(self.draft.is_alone(key) for _, key in weights):
                site.multiplier, site.reason = 1.0, "its output does not go into scaled matmuls alone"
            else:
                site.fold_into = [list(use) for use in dict.fromkeys((key, call.name) for call, key in weights)]
            self._add_free(site, targets or [])

    def _activation_site(self, activation: Activation) -> Site | None:
        if activation.span is not None:
            function: Any = self.module.get_submodule(activation.span.module)
            site = Site(activation.span.module, "forward", "output", "activation", ordinal=0)
            site.multiplier = 1 / gaussian_rms(function.forward)
            return site
        call = activation.call
        assert call is not None
        if self.draft.no_place(call):
            return None
        site = parameter_free_site(call, "activation", 1.0)
        site.multiplier = 1 / _call_rms(call)
        return site

    # --- hand-written autograd.Functions --------------------------------------------------------------------------

    def _move_out_of_functions(self) -> None:
        """Scale the activation, outside, by what a use inside a Function has beyond the factor its weight stores.

        A tied readout in a fused linear and cross-entropy, say, whose weight stores the factor of the embedding.
        """
        for use in self.draft.uses.values():
            if not use.in_function or self.draft.is_alone(use.key):
                continue
            main = primary_use([other for other in self.draft.uses.values() if other.key == use.key])
            stored = geometric_mean(self.multipliers[call.index, use.key] for call in main.calls)
            for call in use.calls:
                factor = self.multipliers[call.index, use.key] / stored
                if factor != 1.0 and self._scale_operand(call, factor):
                    self.multipliers[call.index, use.key] = stored

    def _scale_operand(self, call: Call, factor: float) -> bool:
        """Multiply the activation that a call works on, where it is made, if nothing else uses it."""
        moving = [v for v in call.inputs if v.is_float and v.requires_grad and not v.parameters]
        if len(moving) != 1:
            return False
        pushes = self._can_push(moving[0], {call.index})
        if pushes:
            self._push(pushes, factor, absorb=False)
            return True
        sources, passed = self.structure.sources(moving[0])
        maker = sources[0].value.producer
        if len(sources) > 1 or maker is None or self.draft.no_place(maker):
            return False
        site = parameter_free_site(maker, "operand", factor)
        site.reason = "of a matmul inside a hand-written autograd.Function"
        if self._place(site) in self.free or not self.structure.only_feeds(maker.output, passed, {call.index}):
            return False
        self._add_free(site, [])
        return True

    def homeless(self, plan: Plan) -> set[str]:
        """Parameters with an explicit factor, in either storage, inside a Function."""
        found: set[str] = set()
        for storage in STORAGES:
            resolve(plan, storage)
            for site in plan.sites:
                for key, factor in site.factors.items():
                    use = self.draft.uses.get((key, site.op))
                    if factor != 1.0 and use is not None and use.in_function:
                        found.update(use.parameters)
        resolve(plan, self.options.storage)
        return found

    # --- parameter-free sites -------------------------------------------------------------------------------------

    def _add_free(self, site: Site, targets: list[Call]) -> None:
        if self.draft.is_skipped(site.module):
            site.multiplier, site.fold_into, site.reason = 1.0, [], "skipped by the options"
        self.free[self._place(site)].append((site, targets))

    @staticmethod
    def _place(site: Site) -> tuple[Any, ...]:
        return site.module, site.method, site.op, site.ordinal

    def _free_sites(self) -> list[Site]:
        """One site for each place in the code; its calls must agree on where the factor can be folded."""
        self._join_loops()
        sites = []
        for entries in self.free.values():
            first = entries[0][0]
            first.calls = len(entries)
            if any(site.multiplier == 1.0 for site, _ in entries):
                first.multiplier, first.fold_into = 1.0, []
                first.reason = first.reason or "not all its calls go into scaled matmuls alone"
            else:
                first.multiplier = geometric_mean(site.multiplier for site, _ in entries)
                first.fold_into = [list(u) for u in dict.fromkeys(tuple(u) for s, _ in entries for u in s.fold_into)]
                if any(not site.fold_into for site, _ in entries):
                    first.fold_into = []
            sites.append(first)
        self._drop_inconsistent_folds(sites)
        return sites

    def _join_loops(self) -> None:
        """Where every call of a function in a frame is the same site but for its ordinal, the ordinal is dropped.

        A loop over the experts that got a token makes another number of calls on the next batch.
        """
        for (module, method, op), calls in self.draft.counted_calls.items():
            known = [key for key in self.free if key[:3] == (module, method, op)]
            entries = [entry for key in known for entry in self.free[key]]
            for site, _ in entries:
                site.calls_in_frame = self.draft.calls_in_frame(module, method, op)
            alike = {(site.role, site.multiplier, site.operand, site.last_dim) for site, _ in entries}
            if len(entries) == len(calls) and len(alike) == 1:
                for key in known:
                    del self.free[key]
                for site, _ in entries:
                    site.ordinal = EVERY_CALL
                self.free[module, method, op, EVERY_CALL] = entries

    def _drop_inconsistent_folds(self, sites: list[Site]) -> None:
        """A weight can take a neighbour's factor only if all calls of the weight have it."""
        changed = True
        while changed:
            changed = False
            products: dict[tuple[int, tuple[str, str]], float] = defaultdict(lambda: 1.0)
            folding = {(s.module, s.method, s.op, s.ordinal): s for s in sites if s.fold_into}
            for identity, site in folding.items():
                for _, targets in self.free[identity]:
                    for call in targets:
                        for key, op in map(tuple, site.fold_into):
                            if op == call.name and any(v.key == key for v in call.inputs):
                                products[call.index, (key, op)] *= site.multiplier
            for site in folding.values():
                for key, op in map(tuple, site.fold_into):
                    calls = self.draft.uses[key, op].calls
                    found = [products[call.index, (key, op)] for call in calls]
                    if not all(isclose(a, found[0], rel_tol=1e-9) for a in found):
                        site.fold_into, changed = [], True
                        site.reason = f"{key} is also called on other inputs"
                        break


def _at(call: Call) -> str:
    return f"at {call.frame}" if call.frame else f"({call.name})"


def _rounded(rate: float) -> float:
    """To a sixteenth of an octave: weights drawn alike then share a learning rate, and groups stay few."""
    return float(2 ** (round(16 * log2(rate)) / 16))


def gaussian_rms(function: Any) -> float:
    """√E[f(z)²] for z ~ N(0, 1), by the trapezoidal rule."""
    with torch.no_grad():
        y: Tensor = function(_GRID.clone())
    return sqrt(float(torch.trapezoid(_DENSITY * y.double() ** 2, _GRID)))


def _call_rms(call: Call) -> float:
    if call.name == "glu":  # a · σ(b) with independent a and b
        return gaussian_rms(torch.sigmoid)

    def run(z: Tensor) -> Tensor:
        result: Tensor = call.with_each(lambda argument: z if isinstance(argument, Value) else argument).run()
        return result

    return gaussian_rms(run)
