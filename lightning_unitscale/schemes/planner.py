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

from torch import nn

from lightning_unitscale.engine.analysis.loss_path import used_parameters
from lightning_unitscale.engine.plan.copies import include_copies
from lightning_unitscale.engine.plan.factors import inverse
from lightning_unitscale.engine.plan.fold import resolve
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.siblings import include_siblings
from lightning_unitscale.engine.plan.site import READING, Site
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.activations import ActivationFactors
from lightning_unitscale.schemes.attention_logits import LogitFactors
from lightning_unitscale.schemes.beside import BesideSites, follow
from lightning_unitscale.schemes.branches import Branches
from lightning_unitscale.schemes.draft import Draft
from lightning_unitscale.schemes.hand_written_functions import move_out, without_place
from lightning_unitscale.schemes.initial_values import set_initial_values
from lightning_unitscale.schemes.left_alone import IN_FUNCTION
from lightning_unitscale.schemes.local import LocalSchemes
from lightning_unitscale.schemes.placed_factors import PlacedFactors
from lightning_unitscale.schemes.rates import LearningRates
from lightning_unitscale.schemes.scheme import Scheme
from lightning_unitscale.schemes.seen_activations import note_divided, take_back
from lightning_unitscale.schemes.sums import place_sums
from lightning_unitscale.schemes.weights import Weights, override_multipliers


def make_plan(scheme: Scheme, module: nn.Module, trace: Trace, options: Options) -> Plan:
    """The plan of a scheme for a recorded step."""
    if not scheme.changes_training:
        plan = Draft(module, trace, options).plan({}, [])
        plan.changes_training = False
        resolve(plan, options.storage)
        return plan
    homeless: dict[str, str] = {}
    while True:
        draft = Draft(module, trace, options, homeless, scheme.cast)
        plan = _plan_from(draft, LocalSchemes(scheme, options))
        found = without_place(draft, plan)
        if not found:
            return plan
        homeless |= dict.fromkeys(found, f"it has two factors, one of them {IN_FUNCTION}")


def _plan_from(draft: Draft, rules: LocalSchemes) -> Plan:
    """The whole plan, from top to bottom."""
    scheme, module, placed = rules.scheme, draft.module, PlacedFactors(draft)
    branches = Branches(draft, rules)
    weights = Weights(draft, rules, branches.depths)
    sites = _place_factors(placed, rules, branches, weights)

    plan = draft.plan(placed.at_uses, sites)
    plan.notes += placed.notes
    plan.families, plan.keeps_function = list(scheme.families), scheme.keeps_function
    plan.largest_eta = scheme.most_useful_rate() if plan.lr_units == "standard" else None
    override_multipliers(plan, draft)
    set_initial_values(plan, weights)
    rates = LearningRates(plan, weights)
    rates.set_all()
    if scheme.divides_gradients and draft.options.gradients:
        _divide_gradients(plan, draft)
    note_divided(plan)

    models = include_siblings(plan, {name for name, _ in module.named_modules(remove_duplicate=False)})
    rates.keep_own_steps(models)
    branches.correct_left_out(plan, models)
    include_copies(plan, module, used_parameters(draft.trace, draft.structure.learned))
    _hand_over_to_readings(plan)

    resolve(plan, draft.options.storage)
    rates.set_ends()
    rules.check_all_heard()
    return plan


def _place_factors(placed: PlacedFactors, rules: LocalSchemes, branches: Branches, weights: Weights) -> list[Site]:
    """Put the scheme's factors on the uses of weights, and return the parameter-free sites of those without one."""
    draft, scheme = placed.draft, rules.scheme
    attention, activations = LogitFactors(draft, rules), ActivationFactors(draft, rules)
    weights.place(placed)
    if draft.options.activations:
        branches.place(placed)
        place_sums(placed, rules, weights.zeros)
        attention.place(placed)
        activations.place(placed)
    move_out(placed)
    sites = placed.free.sites()
    if scheme.keeps_function:
        take_back(placed, sites)
    follow(placed, sites)
    if draft.options.activations:
        sites += BesideSites(placed, sites, activations.site, attention.site, scheme.on_top).find()
    return sites


def _divide_gradients(plan: Plan, draft: Draft) -> None:
    """Have the optimizer see the gradients of all that is not left alone divided by their own scale, and say so."""
    for parameter in plan.parameters.values():
        parameter.divided_gradient = not parameter.reason and parameter.name not in draft.by_hand.gradients
    if plan.divided_gradients:
        plan.notes.append(
            f"the optimizer sees the gradients of {len(plan.divided_gradients)} parameters divided by "
            "max|gradient| / √d, and not as they are; .grad holds the true ones but inside the update"
        )


def _hand_over_to_readings(plan: Plan) -> None:
    """Give each reading the weight as the untouched model would have it."""
    for site in plan.sites:
        if site.role == READING:
            parameter = plan.parameters[site.params[0]]
            initial = 1.0 if parameter.fixed else parameter.initial_factor
            site.set_factors(parameter.name, inverse(initial, "in the units of the untouched model"))
