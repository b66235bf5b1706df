"""Multipliers in an optimizer that an engine takes apart: DeepSpeed's ZeRO makes one flat tensor of a parameter group.

The engine gets an optimizer of the same class, whose groups are the user's, split by multiplier: all elements of a flat
tensor then have one. Before each step they take the values of the user's groups, which schedulers go on writing to.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.step_scales import StepScale
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.families import decay_is_decoupled, family_of_group
from lightning_unitscale.optim.split_groups import GroupLayout, SplitGroup, StepWay

_OWN = ("step", "_step", "param_groups", "state", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def optimizer_for_engine(optimizer: Optimizer, plan: Plan, module: nn.Module, family: str) -> Optimizer:
    """An optimizer like this one, before its first step, to be given to the engine in its place.

    Args:
        optimizer: the user's; it keeps its groups, and is stepped no more.
        plan: in force on `module`.
        module: whole, its parameters those of the optimizer.
        family: whose multipliers are used.

    Raises:
        UnitScalingError: it has taken steps.
    """
    if optimizer.state:
        raise UnitScalingError(f"this {type(optimizer).__name__} has taken steps; give the engine a new one.")
    named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False)]
    split: list[tuple[dict[str, Any], dict[str, Any], StepScale]] = []
    for group in optimizer.param_groups:
        its = family_of_group(group) or family
        way = StepWay(its, decay_is_decoupled(optimizer, group, its))
        by_name = plan.step_scales(way.family, decoupled_decay=way.decoupled)
        scales: dict[Tensor, StepScale] = {p: by_name[name] for name, p in reversed(named) if name in by_name}
        layout = GroupLayout.of(group["params"], way, scales)
        pieces = SplitGroup(group, layout).pieces
        split += [(piece, group, scale) for piece, (scale, _) in zip(pieces, layout.pieces, strict=True)]

    twin: Optimizer = object.__new__(type(optimizer))
    vars(twin).update({name: value for name, value in vars(optimizer).items() if name not in _OWN})
    twin.param_groups = [piece for piece, _, _ in split]
    twin.state = defaultdict(dict)
    vars(twin).update({name: OrderedDict() for name in _OWN if name.endswith("hooks")})

    def follow(*_: Any) -> None:
        vars(optimizer)["_opt_called"] = True  # what schedulers ask for
        for piece, group, scale in split:
            for key in optimizer.defaults:
                if key in group:
                    factor = getattr(scale, key, 1.0)
                    piece[key] = group[key] if factor == 1.0 else group[key] * factor

    twin.register_step_pre_hook(follow)
    return twin
