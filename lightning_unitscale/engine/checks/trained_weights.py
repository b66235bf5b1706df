"""Trained weights are not initial weights: a scheme that rescales initial weights must not meet them.

Scaled a second time, a trained model is another function, and nothing else would say so. A module that was given
weights of a prepared model which its plan does not fit remembers it (`remember_trained`). Weights that came another way
(copied tensor by tensor, by safetensors or a sharded checkpoint) are known by what training leaves in them:

    norms      every initialiser leaves a norm's gains equal, or draws them around 1 and leaves its biases 0 (DCGAN);
               the first optimizer step moves both

Of a model without norms

    scale      weights that a plan folded keep, but for the readouts, the scale that it gave them, and biases that
               began at 0 are no more: fresh biases are equal, torch's own U(-fan_in^-½, fan_in^-½), or all of one
               distribution
    structure  most matrices are not as if drawn at random any more (see `drawn_at_random`)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod
from statistics import median

from torch import Tensor, nn

from lightning_unitscale.engine.checks.drawn_at_random import structure
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.record.spread_tensors import whole
from lightning_unitscale.engine.record.trace import ParameterFacts, Trace
from lightning_unitscale.errors import UnitScalingError

NEAR = log(1.5)  # of a scale; a fresh fan-in initialisation is 1.7 times off or more
STRUCTURED = 6.0  # z; the largest median of the matrices of any fresh model that was met is 1.1
MOST_MATRICES = 16
LEAST_ELEMENTS = 16  # of a bias, to tell how it was drawn
ATTRIBUTE = "_unit_scaling_trained"  # of a module given trained weights whose plan is not in force


def remember_trained(module: nn.Module) -> None:
    """Note that the module holds weights that were trained under a plan which does not fit it."""
    module.__dict__[ATTRIBUTE] = True


def rescaled(plan: Plan) -> list[str]:
    """The names of the parameters whose stored values are not the initial ones."""
    return [p.name for p in plan.parameters.values() if p.from_initial != 1.0]


def refuse_trained(module: nn.Module, trace: Trace, plan: Plan) -> None:
    """
    Raises:
        UnitScalingError: the plan would rescale weights that are known to be trained, or look so.
    """
    evidence = _known(module, plan)
    if not evidence:
        gains = _gains(trace, plan)
        evidence = _norms(gains, trace, plan) if gains else _scale(trace, plan) or _structure(module, plan)
    if evidence:
        raise UnitScalingError(
            f"{type(module).__name__} holds trained weights: {evidence}. scheme={plan.scheme!r} rescales initial "
            "weights, and would change what these do; nothing was changed. Keep their function with scheme='preserve', "
            "or, if they were trained with unit scaling, load their checkpoint through ckpt_path or "
            "lightning_unitscale.load_checkpoint, so that its plan comes with it. If they are initial weights and "
            "meant to be like this, name these parameters in skip."
        )


def _known(module: nn.Module, plan: Plan) -> str:
    """Where the plan would rescale what another plan has scaled."""
    named = dict(module.named_parameters())
    changed = {id(named[name]): name for name in rescaled(plan)}
    for where, child in module.named_modules():
        if ATTRIBUTE in child.__dict__ or plan_of(child) is not None:
            names = [changed[id(parameter)] for parameter in child.parameters() if id(parameter) in changed]
            if names:
                return f"{_some(names)} of {where or 'the module'} came from a model prepared with unit scaling"
    return ""


def _gains(trace: Trace, plan: Plan) -> list[str]:
    """The gains of norms that are trained and not skipped."""
    gains = [p.name for p in plan.parameters.values() if p.role == "norm" and not p.reason and prod(p.shape) > 1]
    return [name for name in gains if trace.facts[name].rms]


def _norms(gains: list[str], trace: Trace, plan: Plan) -> str:
    """What at least half of the norms show."""
    varied = [name for name in gains if not trace.facts[name].is_constant]
    found = []
    for name in varied:
        biases = _biases_beside(name, plan)
        moved = [bias for bias in biases if not trace.facts[bias].is_constant]
        if moved or (not biases and len(varied) == len(gains)):
            found.append([name, *moved])
    if not found or 2 * len(found) < len(gains):
        return ""
    return f"the elements of {_some([name for names in found for name in names])} differ from each other"


def _scale(trace: Trace, plan: Plan) -> str:
    """Hidden weights at the scale that the plan would give them, beside biases that no initialiser drew."""
    hidden = [p for p in plan.parameters.values() if p.role == "hidden" and not p.reason and not p.fixed]
    near = [p.name for p in hidden if p.from_initial > 0 and abs(log(p.from_initial)) < NEAR]
    biases = [p.name for p in plan.parameters.values() if p.from_initial == 0.0 and prod(p.shape) >= LEAST_ELEMENTS]
    moved = [name for name in biases if not _is_drawn_by_torch(name, trace)]
    if len(hidden) < 2 or 4 * len(near) < 3 * len(hidden) or not moved or 2 * len(moved) < len(biases):
        return ""
    if _are_drawn_alike([trace.facts[name] for name in moved]):
        return ""
    return f"{_some(near)} are at the scale that it would give them, and {_some(moved)} are neither 0 nor as if drawn"


def _is_drawn_by_torch(bias: str, trace: Trace) -> bool:
    """Whether its elements may come from U(-b, b), b = fan_in^-½ of a weight beside it."""
    owner, facts = bias.rpartition(".")[0], trace.facts[bias]
    beside = [other for name, other in trace.facts.items() if name.startswith(owner) and len(other.shape) > 1]
    bounds = [prod(other.shape[1:]) ** -0.5 for other in beside]
    return any(facts.largest <= 1.001 * b and abs(facts.rms / b * 3**0.5 - 1) < 0.35 for b in bounds)


def _are_drawn_alike(biases: Sequence[ParameterFacts]) -> bool:
    """Whether several may come from one normal distribution: of one RMS, which a few elements exceed by far.

    The first steps of Adam move all elements alike, later ones each bias by another amount.
    """
    sizes = [facts.rms for facts in biases]
    return max(sizes) < 1.6 * min(sizes) and all(f.rms < 0.62 * f.largest for f in biases)


def _structure(module: nn.Module, plan: Plan) -> str:
    """Matrices that have a structure, most of those that the plan would rescale."""
    named: dict[str, Tensor] = dict(module.named_parameters())
    matrices = [p.name for p in plan.parameters.values() if p.role in ("hidden", "readout") and p.from_initial != 1.0]
    chosen = matrices[:: max(1, len(matrices) // MOST_MATRICES)]
    found = {name: z for name in chosen if (z := structure(whole(named[name]))) is not None}
    if not found or median(found.values()) < STRUCTURED:
        return ""
    return f"{_some(sorted(found, key=lambda name: -found[name]))} are not as if drawn at random"


def _biases_beside(gain: str, plan: Plan) -> list[str]:
    """The biases of a norm: beside its gain, of its shape."""
    owner = gain.rpartition(".")[0]
    return [
        p.name
        for p in plan.parameters.values()
        if p.role == "bias" and p.name.rpartition(".")[0] == owner and p.shape == plan.parameters[gain].shape
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
