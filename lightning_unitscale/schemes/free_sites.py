"""Parameter-free sites while a plan is made: attention, activations, residual additions and sums, by their place.

A place in the code (which call of a function in a module's method) may be called often in a step. Its calls must agree
on the factor, and on the weights that can take it, to become one site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import isclose, prod

from lightning_unitscale.engine.plan.factors import Factor, averaged
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.places import EVERY_CALL, Place
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.schemes.draft import Draft, operand_rms
from lightning_unitscale.schemes.left_alone import SKIPPED


def parameter_free_site(call: Call, role: str, factors: list[Factor], operand: Value | None = None) -> Site:
    """A site known by its frame and by which call of its function it is there; `operand` takes the factor."""
    assert call.frame is not None
    site = Site(*call.place[:3], role, ordinal=call.ordinal)
    site.set_factors("", factors)
    if operand is not None:
        site.operand = next((i for i, argument in enumerate(call.args) if argument is operand), None)
    site.rms_before = operand_rms(call) if call.name in MATMULS else {}
    return site


class FreeSites:
    """The parameter-free sites of a plan to be; each call of a place is an entry with the matmuls it folds into."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.entries: dict[Place, list[tuple[Site, list[Call]]]] = defaultdict(list)

    def __contains__(self, site: Site) -> bool:
        return site.place in self.entries

    def add(self, site: Site, targets: Iterable[Call] = ()) -> None:
        """One call of a site, and the matmuls whose weights take its factor when it is folded."""
        if self.draft.is_skipped(site.module):
            site.leave_alone(SKIPPED)
        self.entries[site.place].append((site, list(dict.fromkeys(targets))))

    def sites(self) -> list[Site]:
        """One site for each place."""
        self._join_loops()
        sites = [self._joined(entries) for entries in self.entries.values()]
        self._drop_inconsistent_folds(sites)
        return sites

    @staticmethod
    def _joined(entries: list[tuple[Site, list[Call]]]) -> Site:
        first = entries[0][0]
        first.calls = len(entries)
        if any(site.multiplier == 1.0 for site, _ in entries):
            first.leave_alone(first.reason or "not all its calls go into scaled matmuls alone")
            return first
        first.set_factors("", averaged([site.causes[""] for site, _ in entries]))
        first.fold_into = list(dict.fromkeys(use for site, _ in entries for use in site.fold_into))
        if any(not site.fold_into for site, _ in entries):
            first.fold_into = []
        return first

    def _join_loops(self) -> None:
        """Where every call of a function in a frame is the same site but for its ordinal, the ordinal is dropped.

        A loop over the experts that got a token makes another number of calls on the next batch.
        """
        for loop, calls in self.draft.counted_calls.items():
            known = [place for place in self.entries if place.at_every_call == loop]
            calls = [call for call in calls if self.draft.structure.decides(call) or call.place not in known]
            entries = [entry for place in known for entry in self.entries[place]]
            for site, _ in entries:
                site.calls_in_frame = self.draft.calls_in_frame(loop)
            alike = {(s.role, s.multiplier, s.operand, s.last_dim, s.divides_along) for s, _ in entries}
            if len(entries) == len(calls) and len(alike) == 1:
                for place in known:
                    del self.entries[place]
                for site, _ in entries:
                    site.ordinal = EVERY_CALL
                self.entries[loop] = entries

    def _drop_inconsistent_folds(self, sites: list[Site]) -> None:
        """A weight can take a neighbour's factor only if all calls of the weight have it."""
        changed = True
        while changed:
            changed = False
            folding = {site.place: site for site in sites if site.fold_into}
            products = self._folded_products(folding)
            for site in folding.values():
                for use in site.fold_into:
                    whole = prod(other.multiplier for other in folding.values() if use in other.fold_into)
                    found = [products[call.index, use] for call in self.draft.uses[use].calls]
                    if not all(isclose(a, whole, rel_tol=1e-9) for a in found):
                        site.fold_into, changed = [], True
                        site.reason = f"{use.key} is also called on other inputs"
                        break

    def _folded_products(self, folding: dict[Place, Site]) -> dict[tuple[int, UseId], float]:
        """By (call index, use), the product of all factors that fold into the use at this call."""
        products: dict[tuple[int, UseId], float] = defaultdict(lambda: 1.0)
        for place, site in folding.items():
            for _, targets in self.entries[place]:
                for call in targets:
                    for use in site.fold_into:
                        if use.op == call.name and any(v.key == use.key for v in call.inputs):
                            products[call.index, use] *= site.multiplier
        return products
