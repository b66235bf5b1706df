"""The draft of a plan: every parameter and every matmul-like call, before any scheme has given it a constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from torch import nn

from lightning_unitscale.engine.analysis.readings import find_readings
from lightning_unitscale.engine.analysis.roles import Use, find_uses, primary_use
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.analysis.ways import find_ways
from lightning_unitscale.engine.plan.factors import Factor, averaged
from lightning_unitscale.engine.plan.parameter_plan import FROZEN, UNUSED, ParameterPlan
from lightning_unitscale.engine.plan.plan import FramePlan, Plan
from lightning_unitscale.engine.plan.site import READING, Site
from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.record.places import Place
from lightning_unitscale.engine.record.trace import Call, Trace, Value
from lightning_unitscale.near_names import matches
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.by_hand import find_by_hand
from lightning_unitscale.schemes.casting import Casting
from lightning_unitscale.schemes.left_alone import IN_TRANSFORM, LEFT_ALONE_ROLES, SKIPPED
from lightning_unitscale.schemes.overrides import override_roles, overrides_by_parameter


class Draft:
    """What all schemes start from.

    Attributes:
        structure: of the recorded step.
        readings: what the step reads of parameters beside their uses.
        ways: in which functions make weights of parameters.
        uses: every use of every parameter.
        by_hand: what the model scales itself, with our blocks.
        left_alone: parameters that nothing may be done to, with the reason.

    Args:
        homeless: parameters that a scheme has found no place for a factor of, with the reason; None if it has no
            factors.
        cast: why matmuls with a weight of a role are not cast, by the scheme; "" if they are.
    """

    def __init__(
        self,
        module: nn.Module,
        trace: Trace,
        options: Options,
        homeless: Mapping[str, str] | None = None,
        cast: Callable[[str], str] = lambda role: "",
    ) -> None:
        self.module, self.trace, self.options = module, trace, options
        self.structure = Structure(trace)
        self.by_hand = find_by_hand(module, trace)
        self.overrides = overrides_by_parameter(module, trace, options)
        self.readings = find_readings(self.structure)
        self.uses = find_uses(self.structure, self.readings)
        self.ways = find_ways(trace, self.readings)
        override_roles(self.uses.values(), self.structure, options)
        self.roles = self._roles()
        as_they_are = {} if homeless is None else {**self.readings.left_alone, **homeless}
        alone = self._left_alone()
        self.left_alone = {**alone, **{n: why for n, why in as_they_are.items() if alone.get(n, UNUSED) == UNUSED}}
        self.casting = Casting(options, self.overrides, self.left_alone, cast)

    def is_left_alone(self, key: str) -> bool:
        """Whether any parameter of the use's key is left alone."""
        return any(name in self.left_alone for name in ParameterKey(key).names)

    def is_read(self, name: str) -> bool:
        """Whether the step reads the parameter's value beside its uses."""
        return any(use.key == name for use in self.readings.handed)

    def is_skipped(self, module: str) -> bool:
        """Whether the options leave a module, or one that it belongs to, alone."""
        return matches(module, self.options.skip)

    def plan(self, factors: Mapping[tuple[int, str], Sequence[Factor]], free_sites: list[Site]) -> Plan:
        """The plan with these factors by (call index, key) and these parameter-free sites."""
        options = self.options
        plan = Plan(options.scheme, options.storage, options.lr_units, options=options.to_dict())
        plan.notes += self.by_hand.notes
        plan.parameters = {name: self._parameter(name) for name in self.trace.facts}
        plan.sites = [*self._parameter_sites(factors), *self._reading_sites(), *free_sites]
        places = {site.place for site in free_sites}
        plan.sites += [s for s in self._bare_products() if not places & {s.place, s.place.at_every_call}]
        cast = self.casting.decide_attention(self.structure, plan.sites)
        plan.frames = [FramePlan(*frame, keys) for frame, keys in self.trace.touched.items() if keys]
        self._count_in_frames(plan, [*free_sites, *cast])
        plan.followed, plan.followed_with_others = self.ways.alone, self.ways.with_others
        return plan

    def _roles(self) -> dict[str, str]:
        by_name: dict[str, list[Use]] = {}
        for use in self.uses.values():
            for name in use.parameters:
                by_name.setdefault(name, []).append(use)
        return {name: primary_use(by_name[name]).role if name in by_name else "unused" for name in self.trace.facts}

    def _left_alone(self) -> dict[str, str]:
        reasons = {}
        for name, facts in self.trace.facts.items():
            if self._is_skipped(name):
                reasons[name] = SKIPPED
            elif not facts.trainable:
                reasons[name] = FROZEN
            elif name in self.by_hand.weights:
                reasons[name] = self.by_hand.weights[name]
            elif name in self.trace.in_transforms:
                reasons[name] = self.readings.left_alone[name]
            elif name in self.ways.ambiguous:
                reasons[name] = self.ways.ambiguous[name]
            elif self.roles[name] in LEFT_ALONE_ROLES:
                hidden = self.roles[name] == "unused" and self.trace.transformed
                reasons[name] = IN_TRANSFORM if hidden else LEFT_ALONE_ROLES[self.roles[name]]
        return reasons

    def _is_skipped(self, name: str) -> bool:
        return bool(self.overrides.get(name, {}).get("skip")) or matches(name, self.options.skip)

    def _parameter(self, name: str) -> ParameterPlan:
        facts = self.trace.facts[name]
        return ParameterPlan(
            name=name,
            role=self.roles[name],
            shape=list(facts.shape),
            initial_rms=facts.rms,
            aliases=list(facts.aliases),
            reason=self.left_alone.get(name, ""),
            lr_override=self.overrides.get(name, {}).get("lr_multiplier"),
        )

    def _parameter_sites(self, factors: Mapping[tuple[int, str], Sequence[Factor]]) -> list[Site]:
        """One site for each set of parameters that some function takes together."""
        sites: dict[tuple[str, ...], Site] = {}
        by_use = {
            use.id: averaged([factors.get((call.index, use.key), ()) for call in use.calls])
            for use in self.uses.values()
        }
        for call in self.trace.calls:
            keys = [v.key for v in dict.fromkeys(call.inputs) if v.parameters and UseId(v.key, call.name) in self.uses]
            if not keys or call.outputs[0].parameters or call.outputs[0].constant:
                continue
            identity = (call.name, *keys)
            if identity in sites:
                sites[identity].calls += 1
                self.casting.decide(sites[identity], call)
                continue
            main = self.uses[UseId(self._main_key(call, keys), call.name)]
            keys = [main.key, *(key for key in keys if key != main.key)]
            site = Site(*call.place[:3], main.role, params=keys)
            for key in keys:
                site.set_factors(key, by_use[UseId(key, call.name)])
            site.rms_before = operand_rms(call)
            if all(self.is_left_alone(key) for key in keys):
                site.reason = self.left_alone[next(name for name in main.key.names if name in self.left_alone)]
            self.casting.decide(site, call)
            sites[identity] = site
        found = list(sites.values())
        self.casting.check_overrides(found)
        return found

    def _reading_sites(self) -> list[Site]:
        """One site for each parameter and function that reads it beside its uses."""
        sites = []
        for (name, _), calls in self.readings.handed.items():
            site = Site(*calls[0].place[:3], READING, params=[ParameterKey(name)], calls=len(calls))
            site.set_factors(name, [])
            site.reason = f"{calls[0].where} reads the weight in the units of the untouched model"
            sites.append(site)
        return sites

    def _main_key(self, call: Call, keys: list[ParameterKey]) -> ParameterKey:
        weights = [value.key for value in self.structure.weights_of(call)]
        return weights[0] if weights else keys[0]

    def _bare_products(self) -> list[Site]:
        """Matmul-like calls of two activations, which no scheme gives a factor unless they make attention logits."""
        sites: dict[Place, Site] = {}
        for call in self.trace.calls:
            if (
                call.name not in MATMULS
                or self.structure.is_site(call)
                or call.output.parameters
                or call.output.constant
            ):
                continue
            if call.place in sites:
                sites[call.place].calls += 1
            else:
                site = Site(*call.place[:3], "product", ordinal=call.ordinal, reason="product of two activations")
                site.calls_in_frame = self.calls_in_frame(site.place)
                site.rms_before = operand_rms(call)
                sites[call.place] = site
        return list(sites.values())

    def calls_in_frame(self, place: Place) -> int:
        """How many calls of a place's function one run of its frame makes at most, of those that have ordinals."""
        return 1 + max((call.ordinal for call in self.counted_calls.get(place.at_every_call, ())), default=0)

    @cached_property
    def counted_calls(self) -> dict[Place, list[Call]]:
        """The calls that have ordinals, by the place that stands for all calls of their function in their frame."""
        found: dict[Place, list[Call]] = {}
        for call in self.trace.calls:
            if call.frame is not None and call.inputs and call.inputs[0].is_float:
                found.setdefault(call.place.at_every_call, []).append(call)
        return found

    def _count_in_frames(self, plan: Plan, free_sites: list[Site]) -> None:
        """Add the frames that must be told apart from those of parameter-free sites: they call the same functions."""
        ops = {site.op for site in free_sites}
        frames = {call.frame for call in self.trace.calls if call.name in ops and call.frame is not None}
        frames |= {site.place.frame for site in free_sites}
        for frame in sorted(frames, key=str):
            plan.frame_plan(frame)


def operand_rms(call: Call) -> dict[str, float]:
    """RMS of the operands and of the output of a matmul-like call, as recorded."""
    if call.name not in MATMULS:
        return {}
    operands = MATMULS[call.name].operands(call)
    found = {label: v.rms for label, v in operands.items() if isinstance(v, Value) and v.rms is not None and v.is_float}
    return {**found, "output": call.output.rms} if call.output.rms is not None else found
