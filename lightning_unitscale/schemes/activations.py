"""Activations: a factor on the output of each elementwise function, in the matmuls behind it, and one on its input."""

from __future__ import annotations

from typing import Any

from lightning_unitscale.engine.analysis.activations import Activation
from lightning_unitscale.engine.plan.factors import product
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.schemes.activation_constants import call_rms, gaussian_rms
from lightning_unitscale.schemes.by_hand import is_by_hand
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.free_sites import parameter_free_site
from lightning_unitscale.schemes.left_alone import no_place
from lightning_unitscale.schemes.local import LocalSchemes
from lightning_unitscale.schemes.placed_factors import PlacedFactors
from lightning_unitscale.schemes.pushing import CallUse, pushes, takers
from lightning_unitscale.schemes.seen_activations import SeenActivations


class ActivationFactors:
    """What a scheme multiplies activations by.

    Attributes:
        scaled_inputs: the factors on the inputs of those that have one.
    """

    def __init__(self, draft: Draft, rules: LocalSchemes) -> None:
        self.draft, self.rules = draft, rules
        self.seen = SeenActivations(draft.trace, draft.structure)
        self.scaled_inputs: dict[Activation, float] = {}

    def place(self, placed: PlacedFactors) -> None:
        """Put it on each activation."""
        calls = self.draft.trace.calls
        for activation in self.draft.structure.activations:
            self._scale_input(placed, activation)
            targets = self.draft.structure.targets(activation.output) or []
            taken = [takers(self.draft, call, operand) for call, operand in targets]
            uses = [use for found in taken for use in found] if all(taken) else []
            site = self.site(activation)
            if site is None:
                self._put_without_place(placed, activation, uses)
                continue
            if is_by_hand(activation.output):
                site.leave_alone("its output is scaled by hand")
            elif not uses:
                site.leave_alone("its output does not go into scaled matmuls alone")
            elif site.divides_along is not None:
                site.reason = "found anew in every call"
            else:
                site.fold_into = list(dict.fromkeys(UseId(key, calls[index].name) for index, key in uses))
            placed.free.add(site, (call for call, _ in targets))

    def _scale_input(self, placed: PlacedFactors, activation: Activation) -> None:
        """Put the scheme's factor on the weights that make the input of an activation."""
        factors = self.rules.ask(activation.modules, lambda scheme: scheme.activation_input())
        if not factors:
            return
        found = pushes(self.draft, activation.input, activation.calls)
        if found and (activation.call is None or activation.call.name != "glu"):  # whose input is the gated half too
            placed.push(found, factors)
            self.scaled_inputs[activation] = product(factors)
        else:
            causes, where = ", ".join(factor.cause for factor in factors), "".join(activation.modules) or "a hook"
            placed.notes.append(f"{causes} left an activation of {where} alone: no weight makes its input for it alone")

    def _put_without_place(self, placed: PlacedFactors, activation: Activation, uses: list[CallUse]) -> None:
        """Inside a Function: what the matmuls behind it can't take is left out."""
        call = activation.call
        if call is None:
            return
        rms = call_rms(call, self.scaled_inputs.get(activation, 1.0))
        factors = self.rules.ask(activation.modules, lambda scheme: scheme.activation(rms))
        if factors and call.in_function and placed.are_all_calls(uses):
            placed.put(uses, factors)
        elif factors:
            placed.leave_alone("activation", call, no_place(call))

    def site(self, activation: Activation) -> Site | None:
        """Where the factor stands; None where it has no place, or the scheme no rule for it."""
        scale = self.scaled_inputs.get(activation, 1.0)
        if activation.span is not None:
            function: Any = self.draft.module.get_submodule(activation.span.module)
            rms = gaussian_rms(function.forward, scale)
            site = Site(activation.span.module, "forward", "output", "activation", ordinal=0)
        else:
            call = activation.call
            assert call is not None
            if no_place(call):
                return None
            rms, site = call_rms(call, scale), parameter_free_site(call, "activation", [])
        site.set_factors("", self.rules.ask(activation.modules, lambda scheme: scheme.activation(rms)))
        self.seen.scale(activation, site, self.rules.scheme)
        return site if site.causes[""] else None
