"""Factors of activations by what their outputs were in the recorded step, for schemes that ask for it.

All calls of a function in one frame have one factor, that of their largest output: a loop over experts makes another
number of calls on the next batch.
"""

from __future__ import annotations

from collections import defaultdict

from lightning_unitscale.engine.analysis.activations import Activation
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.places import EVERY_CALL, Place
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.schemes.placed_factors import PlacedFactors
from lightning_unitscale.schemes.scheme import Scheme


class SeenActivations:
    """The largest output at each place of a trace."""

    def __init__(self, trace: Trace, structure: Structure) -> None:
        self.structure = structure
        self._largest: dict[Place, float] = defaultdict(float)
        for call in trace.calls:
            if call.frame is not None and call.output.largest is not None:
                self._note(call.place.at_every_call, call.output.largest)
        for span in trace.spans:
            if span.output is not None and span.output.largest is not None:
                self._note(Place(span.module, "forward", "output", EVERY_CALL), span.output.largest)

    def _note(self, place: Place, largest: float) -> None:
        self._largest[place] = max(self._largest[place], largest)

    def scale(self, activation: Activation, site: Site, scheme: Scheme) -> None:
        """Add the scheme's factor to the site of an activation; it follows each call, if the function is not kept."""
        if not activation.output.shape:
            return
        dimension = self.structure.feature_dimension(activation.output)
        features = activation.output.shape[dimension]
        seen = scheme.seen_activation(self._largest[site.place.at_every_call], features)
        site.set_factors("", [*site.causes[""], *seen])
        if seen and not scheme.keeps_function:
            site.divides_along = dimension


def take_back(placed: PlacedFactors, sites: list[Site]) -> None:
    """Undo the factors of activations in the weights that take them; where none does, the activation is left alone."""
    for site in sites:
        if site.role != "activation" or site.multiplier == 1.0:
            continue
        if not site.fold_into:
            site.leave_alone(site.reason or "no weight would undo it, and the function is to be kept")
        back = [
            Factor(1 / factor.value, f"undoes {factor.value:.4g} of the activation {site.name}", factor.source)
            for factor in site.causes[""]
        ]
        for use in site.fold_into:
            placed.put(((call.index, use.key) for call in placed.draft.uses[use].calls), back)


def note_divided(plan: Plan) -> None:
    """Say which activations are divided by what each call's own output is."""
    sites = [site.name for site in plan.sites if site.divides_along is not None]
    if sites:
        plan.notes.append(
            f"{len(sites)} activations are divided by max|f| / √n of each call's own output ({sites[0]}"
            f"{' …' if len(sites) > 1 else ''})"
        )
