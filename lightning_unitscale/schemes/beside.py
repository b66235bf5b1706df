"""Parameter-free factors at calls beside the loss, where their code is another than that of the loss.

A method that only acts may spell out the layers that `forward` has: its activations and attentions are other places in
the code, in front of (or behind) the same weights. Each gets the factor that these weights meet on the loss's path, so
that both compute the same function wherever the constants are kept. A weight that is used in another way there has the
factor that it has on the loss's path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from math import isclose

from lightning_unitscale.engine.analysis.activations import Activation
from lightning_unitscale.engine.analysis.attention import Attention
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.plan.factors import Factor, averaged
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.places import Place
from lightning_unitscale.engine.record.trace import Call
from lightning_unitscale.schemes.free_sites import FreeSites
from lightning_unitscale.schemes.placed_factors import PlacedFactors
from lightning_unitscale.schemes.pushing import takers


def follow(placed: PlacedFactors, sites: list[Site]) -> None:
    """Give uses that a call beside the loss alone makes of a weight the factors that it has on the loss's path."""
    for use in placed.draft.uses.values():
        main = use.follows
        if main is None:
            continue
        factors = averaged([placed.at_uses[call.index, main.key] for call in main.calls])
        for call in use.calls:
            placed.at_uses[call.index, use.key] = factors
        for site in sites:
            if main.id in site.fold_into:
                site.fold_into.append(use.id)


class BesideSites:
    """Finds the places beside the loss that need a factor.

    Args:
        placed: the factors on the loss's path.
        sites: what became of the parameter-free ones.
        activation_site, attention_site: the scheme's factor at such a place; None if there can be none.
        as_met: the scheme's factors come from what was seen, and so from the loss's path.
    """

    def __init__(
        self,
        placed: PlacedFactors,
        sites: list[Site],
        activation_site: Callable[[Activation], Site | None],
        attention_site: Callable[[Attention], Site | None],
        as_met: bool,
    ) -> None:
        self.draft, self.sites, self.as_met = placed.draft, sites, as_met
        self.activation_site, self.attention_site = activation_site, attention_site
        self.whole = Structure(placed.draft.trace, whole=True)
        self.met = _factors_met(placed.free)

    def find(self) -> list[Site]:
        """One site for each such place whose calls agree."""
        known = {place for site in self.sites for place in (site.place, site.place.at_every_call)}
        found: dict[Place, list[Site | None]] = defaultdict(list)
        for site in (*self._activations(), *self._attentions()):
            if site.place not in known and site.place.at_every_call not in known:
                found[site.place].append(self._placed(site) if site.multiplier != 1.0 else None)
        return [alike[0] for alike in found.values() if alike[0] is not None and all(s == alike[0] for s in alike)]

    def _activations(self) -> Iterator[Site]:
        for activation in self.whole.activations:
            producer = activation.output.producer
            if producer is None or self.draft.structure.decides(producer):
                continue
            site = self.activation_site(activation)
            if site is not None:
                targets = self.whole.targets(activation.output) or []
                uses = [UseId(k, call.name) for call, operand in targets for _, k in takers(self.draft, call, operand)]
                yield self._expected(site, uses)

    def _attentions(self) -> Iterator[Site]:
        for attention in self.whole.attentions:
            if self.draft.structure.decides(attention.call):
                continue
            site = self.attention_site(attention)
            if site is not None:
                makers = [source.value.producer for source in self.whole.sources(attention.query)[0]]
                yield self._expected(site, [use for call in makers if call for use in self._weights(call)])

    def _weights(self, call: Call) -> list[UseId]:
        return [UseId(value.key, call.name) for value in self.whole.weights_of(call)]

    def _expected(self, site: Site, weights: list[UseId]) -> Site:
        """The site, with its factor if all the weights meet it on the loss's path too."""
        met = [self.met.get((site.role, self._main(use))) for use in weights]
        if self.as_met and met and met[0] is not None:
            site.set_factors("", [Factor(met[0], "as on the loss's path")])
        if met and all(factor is not None and isclose(factor, site.multiplier, rel_tol=1e-9) for factor in met):
            site.fold_into = list(dict.fromkeys(weights))
        else:
            site.leave_alone("beside the loss, and its weights meet no such factor on the loss's path")
        return site

    def _main(self, use: UseId) -> UseId:
        known = self.draft.uses.get(use)
        return use if known is None or known.follows is None else known.follows.id

    def _placed(self, site: Site) -> Site:
        """The site, folded where those on the loss's path are."""
        taken = {use for other in self.sites if other.role == site.role for use in other.fold_into}
        if not all(self._main(use) in taken for use in site.fold_into):
            site.fold_into, site.reason = [], "as on the loss's path"
        site.beside = True
        site.calls_in_frame = self.draft.calls_in_frame(site.place)
        return site


def _factors_met(free: FreeSites) -> dict[tuple[str, UseId], float]:
    """By role and use, the factor that each call of the use meets; none where they differ."""
    met: dict[tuple[str, UseId], dict[int, float]] = defaultdict(lambda: defaultdict(lambda: 1.0))
    for entries in free.entries.values():
        for site, targets in entries:
            for call in targets:
                for value in free.draft.structure.weights_of(call):
                    met[site.role, UseId(value.key, call.name)][call.index] *= site.multiplier
    found = {}
    for (role, use), by_call in met.items():
        factors = [by_call[call.index] for call in free.draft.uses[use].calls]
        if all(isclose(factor, factors[0], rel_tol=1e-9) for factor in factors):
            found[role, use] = factors[0]
    return found
