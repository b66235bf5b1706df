"""The draft of a plan: every parameter and every matmul-like call, before any scheme has given it a constant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property

from torch import nn

from lightning_unitscale.engine.analysis.attention import attention_products
from lightning_unitscale.engine.analysis.castable import reason_not_to_cast, reason_to_upcast
from lightning_unitscale.engine.analysis.readings import find_readings
from lightning_unitscale.engine.analysis.roles import Use, find_uses, primary_use
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.plan.factors import Factor, averaged
from lightning_unitscale.engine.plan.parameter_plan import FROZEN, UNUSED, ParameterPlan
from lightning_unitscale.engine.plan.plan import FramePlan, Plan
from lightning_unitscale.engine.plan.site import READING, Site
from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.record.places import Place
from lightning_unitscale.engine.record.trace import Call, Trace, Value
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.by_hand import find_by_hand
from lightning_unitscale.schemes.overrides import matches, overrides_by_parameter

SKIPPED = "skipped by the options"
LEFT_ALONE_ROLES = {
    "scale": "multiplies activations elementwise; kept as the model initialises it",
    "relative_position": "added to attention logits; kept as the model initialises it",
    "other": "used in a way no rule is known for",
    "unused": UNUSED,
}
IN_TRANSFORM = (
    "used by no torch call that could be followed: torch.func (vmap, grad, functional_call) runs the model on tensors "
    "of its own"
)
IN_FUNCTION = "inside a hand-written autograd.Function, whose backward pass would not see it"


class Draft:
    """What all schemes start from.

    Attributes:
        structure: of the recorded step.
        readings: what the step reads of parameters beside their uses.
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
        self.module, self.trace, self.options, self.cast = module, trace, options, cast
        self.structure = Structure(trace)
        self.by_hand = find_by_hand(module, trace)
        self.overrides = overrides_by_parameter(module, trace, options)
        self.readings = find_readings(self.structure)
        self.uses = find_uses(self.structure, self.readings)
        for use in self.uses.values():
            for name in use.parameters:
                use.role = self.overrides.get(name, {}).get("role", use.role)
        self.roles = self._roles()
        as_they_are = {} if homeless is None else {**self.readings.left_alone, **homeless}
        self.left_alone = {**as_they_are, **self._left_alone()}

    def is_left_alone(self, key: str) -> bool:
        """Whether any parameter of the use's key is left alone."""
        return any(name in self.left_alone for name in ParameterKey(key).names)

    def is_read(self, name: str) -> bool:
        """Whether the step reads the parameter's value beside its uses."""
        return any(use.key == name for use in self.readings.handed)

    def is_skipped(self, module: str) -> bool:
        """Whether the options leave a module, or one that it belongs to, alone."""
        return matches(module, self.options.skip)

    def no_place(self, call: Call) -> str:
        """Why a parameter-free factor or cast can't stand at a call; empty if it can."""
        if call.in_function:
            return IN_FUNCTION
        if call.frame is None:
            return "in a hook, or in a module made while running, its frame cannot be found again"
        if call.frame.module == "" and call.frame.method.endswith("_step"):
            return "its frame is loss code"
        return ""

    def plan(self, factors: Mapping[tuple[int, str], Sequence[Factor]], free_sites: list[Site]) -> Plan:
        """The plan with these factors by (call index, key) and these parameter-free sites."""
        options = self.options
        plan = Plan(options.scheme, options.storage, options.lr_units, options=options.to_dict())
        plan.notes += self.by_hand.notes
        plan.parameters = {name: self._parameter(name) for name in self.trace.facts}
        plan.sites = [*self._parameter_sites(factors), *self._reading_sites(), *free_sites]
        places = {site.place for site in free_sites}
        plan.sites += [s for s in self._bare_products() if not places & {s.place, s.place.at_every_call}]
        cast = self._cast_attention(plan.sites)
        plan.frames = [FramePlan(*frame, keys) for frame, keys in self.trace.touched.items() if keys]
        self._count_in_frames(plan, [*free_sites, *cast])
        plan.followed = sorted({call.name for call in self.trace.calls if call.outputs and call.outputs[0].parameters})
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
                self._cast(sites[identity], call)
                continue
            main = self.uses[UseId(self._main_key(call, keys), call.name)]
            keys = [main.key, *(key for key in keys if key != main.key)]
            site = Site(*call.place[:3], main.role, params=keys)
            for key in keys:
                site.set_factors(key, by_use[UseId(key, call.name)])
            site.rms_before = operand_rms(call)
            if all(self.is_left_alone(key) for key in keys):
                site.reason = self.left_alone[next(name for name in main.key.names if name in self.left_alone)]
            self._cast(site, call)
            sites[identity] = site
        self._check_format_overrides(sites.values())
        return list(sites.values())

    def _reading_sites(self) -> list[Site]:
        """One site for each parameter and function that reads it beside its uses."""
        sites = []
        for (name, _), calls in self.readings.handed.items():
            site = Site(*calls[0].place[:3], READING, params=[ParameterKey(name)], calls=len(calls))
            site.set_factors(name, [])
            site.reason = f"{calls[0].where} reads the weight in the units of the untouched model"
            sites.append(site)
        return sites

    def _cast(self, site: Site, call: Call) -> None:
        """Decide whether the operands of a site are cast; one call that can't be leaves all of them as they are."""
        name = next((name for name in site.params[0].names if "format" in self.overrides.get(name, {})), None)
        wanted = self.options.format if name is None else self.overrides[name]["format"]
        if wanted is None or call.name not in MATMULS or site.format_reason:
            return
        skipped = any(self._is_skipped(name) for name in site.params[0].names)
        site.format_reason = (
            SKIPPED if skipped else IN_FUNCTION if call.in_function else reason_not_to_cast(call, wanted)
        ) or (self.cast(site.role) if name is None else "")
        site.format = None if site.format_reason else wanted
        site.upcast = reason_to_upcast(call, wanted) if site.format else ""

    def _check_format_overrides(self, sites: Collection[Site]) -> None:
        for glob, override in self.options.overrides.items():
            if override.get("format") is None:
                continue
            meant = [s for s in sites if any(matches(name, (glob,)) for key in s.params for name in key.names)]
            if not any(site.format for site in meant):
                why = _reasons(meant) or "its parameters are used by no matmul"
                raise UnitScalingError(
                    f"overrides[{glob!r}]: format={override['format']!r}, but no matmul there can be cast "
                    f"({why}). Take the override out, or name other weights."
                )

    def _cast_attention(self, sites: list[Site]) -> list[Site]:
        """Decide which of attention's own products are cast, those in modules for which it is asked; returns them."""
        wanted = {
            glob: override["attention_format"]
            for glob, override in self.options.overrides.items()
            if "attention_format" in override
        }
        if not wanted:
            return []
        by_place = {site.place: site for site in sites if site.ordinal is not None}
        attention: list[Site] = []
        for call in attention_products(self.structure):
            site = by_place.get(call.place) or by_place[call.place.at_every_call]
            attention.append(site)
            format = next((wanted[glob] for glob in reversed(wanted) if matches(site.module, (glob,))), None)
            if format is not None:
                self._cast_product(site, call, format)
        self._check_attention_overrides(wanted, attention)
        return [site for site in attention if site.format]

    def _check_attention_overrides(self, wanted: Mapping[str, str | None], attention: list[Site]) -> None:
        where = ", ".join(list(dict.fromkeys(site.module or "<root>" for site in attention))[:3])
        for glob, format in wanted.items():
            meant = [site for site in attention if matches(site.module, (glob,))]
            if format is not None and not any(site.format for site in meant):
                raise UnitScalingError(
                    f"overrides[{glob!r}]: attention_format={format!r}, but no attention there can be cast "
                    f"({_reasons(meant) or 'no module of that name computes it'}). Name modules whose own code calls "
                    f"it, or take the override out. {f'This model has it in {where}' if where else 'It has none'}."
                )

    def _cast_product(self, site: Site, call: Call, format: str) -> None:
        if self.is_skipped(site.module):
            site.format_reason = SKIPPED
        elif reason := self.no_place(call):
            site.format_reason = reason
        elif any(value.is_complex for value in call.inputs):
            site.format_reason = "complex numbers, which no narrow format has"
        else:
            site.format = format
            site.operands = [*MATMULS[call.name].multiplicands(call), "gradient"]

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


def _reasons(sites: Iterable[Site]) -> str:
    return "; ".join(dict.fromkeys(f"{site.name}: {site.format_reason}" for site in sites if site.format_reason))
