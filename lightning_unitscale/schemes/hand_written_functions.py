"""Matmuls inside hand-written autograd.Functions, whose backward pass would not see a factor put at the call.

What such a use has beyond the factor that its weight stores (a tied readout in a fused linear and cross-entropy, whose
weight stores the factor of the embedding) stands outside, on the activation that comes in.
"""

from __future__ import annotations

from math import isclose

from lightning_unitscale.engine.analysis.roles import primary_use
from lightning_unitscale.engine.plan.factors import Factor, inverse, product
from lightning_unitscale.engine.plan.fold import resolve
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.trace import Call
from lightning_unitscale.options import STORAGES
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.free_sites import parameter_free_site
from lightning_unitscale.schemes.left_alone import no_place
from lightning_unitscale.schemes.placed_factors import PlacedFactors
from lightning_unitscale.schemes.pushing import pushes


def move_out(placed: PlacedFactors) -> None:
    """Scale the activation, outside, by what a use inside a Function has beyond the factor its weight stores."""
    for use in placed.draft.uses.values():
        if not use.in_function or placed.draft.is_left_alone(use.key):
            continue
        main = primary_use(placed.uses_of(use.key))
        stored = placed.at_uses[main.calls[0].index, use.key]
        by_factor: dict[float, list[Call]] = {}
        for call in use.calls:
            by_factor.setdefault(product(placed.at_uses[call.index, use.key]), []).append(call)
        for wanted, calls in by_factor.items():
            if isclose(wanted, product(stored), rel_tol=1e-12):
                continue
            factors = placed.at_uses[calls[0].index, use.key]
            beyond = [*factors, *inverse(product(stored), "what the weight stores for its other use")]
            for together in _together_or_apart(calls):
                if _scale_operand(placed, together, beyond):
                    placed.at_uses |= {(call.index, use.key): list(stored) for call in together}
                    if together is calls:
                        break


def _together_or_apart(calls: list[Call]) -> list[list[Call]]:
    """All calls at once, which may be of pieces of one activation; each by itself, where that can't be."""
    return [calls, *([call] for call in calls)] if len(calls) > 1 else [calls]


def _scale_operand(placed: PlacedFactors, calls: list[Call], factors: list[Factor]) -> bool:
    """Multiply the activation that calls work on, where it is made, if nothing else uses it."""
    draft = placed.draft
    moving = [v for call in calls for v in call.inputs if v.is_float and v.requires_grad and not v.parameters]
    if len(moving) != len(calls):
        return False
    ends = {call.index for call in calls}
    found = pushes(draft, moving[0], ends, *moving[1:])
    if placed.are_all_calls(use for push in found for use in push.uses):
        placed.push(found, factors)
        return True
    sources, passed = draft.structure.sources(*moving)
    maker = sources[0].value.producer
    if len(sources) > 1 or maker is None or no_place(maker) or not _is_called_once(draft, maker):
        return False
    if len(maker.outputs) > 1:  # a recurrent layer gives its state too
        return False
    site = parameter_free_site(maker, "operand", factors)
    site.reason = "of a matmul inside a hand-written autograd.Function"
    if site in placed.free or not draft.structure.only_feeds(maker.output, passed, ends):
        return False
    placed.free.add(site)
    return True


def _is_called_once(draft: Draft, maker: Call) -> bool:
    counted = draft.counted_calls.get(maker.place.at_every_call, []).count(maker)
    return counted == 1 == sum(call.place == maker.place for call in draft.structure.calls)


def without_place(draft: Draft, plan: Plan) -> set[str]:
    """The parameters with an explicit factor, in either storage, inside a Function."""
    found: set[str] = set()
    for storage in STORAGES:
        resolve(plan, storage)
        for site in plan.sites:
            for key, factor in site.factors.items():
                use = draft.uses.get(UseId(key, site.op))
                if factor != 1.0 and use is not None and use.in_function:
                    found.update(use.parameters)
    resolve(plan, draft.options.storage)
    return found
