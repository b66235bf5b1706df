"""Trained weights are not initial weights: a scheme that rescales initial weights must not meet them.

Scaled a second time, a trained model is another function, and nothing else would say so. A module that was given
weights of a prepared model which its plan does not fit remembers it (`remember_trained`). Weights from elsewhere are
known by their norms: every initialiser leaves a norm's gains equal, or draws them around 1 and leaves its biases 0
(DCGAN), and the first optimizer step moves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.errors import UnitScalingError

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
    evidence = _known(module, plan) or _seen(trace, plan)
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


def _seen(trace: Trace, plan: Plan) -> str:
    """What at least half of the norms show that are trained and not skipped."""
    gains = [p.name for p in plan.parameters.values() if p.role == "norm" and not p.reason and prod(p.shape) > 1]
    gains = [name for name in gains if trace.facts[name].rms]
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
