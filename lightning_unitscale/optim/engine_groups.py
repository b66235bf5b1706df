"""Multipliers in an optimizer that an engine takes apart: DeepSpeed's ZeRO makes one flat tensor of a parameter group.

The engine gets an optimizer of the same class, whose groups are the user's, split by multiplier: all elements of a flat
tensor then have one. Before each step, and before a state is saved, they take the values of the user's groups, which
schedulers go on writing to; when the engine loads a state, the user's groups take theirs.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.step_scales import FAMILIES, StepScale
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.optim.families import Relative, decay_is_decoupled, family_of_group
from lightning_unitscale.optim.largest_eta import limit_eta
from lightning_unitscale.optim.split_groups import GroupLayout, SplitGroup, StepWay, divided, multiplied

_PIECE = "piece"  # a group's number: engines put groups by, and load others in their place


def optimizer_for_engine(optimizer: Optimizer, plan: Plan, module: nn.Module, family: str) -> Optimizer:
    """An optimizer like this one, before its first step, to be given to the engine in its place.

    Args:
        optimizer: the user's; it keeps its groups, and is stepped no more.
        plan: in force on `module`.
        module: whole, its parameters those of the optimizer.
        family: whose multipliers are used.

    Raises:
        UnitScalingError: it has taken steps, or it is one whose steps need more than its hyperparameters.
    """
    if optimizer.state:
        raise UnitScalingError(f"this {type(optimizer).__name__} has taken steps; give the engine a new one.")
    limit_eta(optimizer, plan, module, family)
    named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False)]
    split: list[tuple[dict[str, Any], dict[str, Any], StepScale]] = []
    for group in optimizer.param_groups:
        its = family_of_group(group) or family
        way = StepWay(its, decay_is_decoupled(optimizer, group, its))
        by_name = plan.step_scales(way.family, decoupled_decay=way.decoupled)
        scales: dict[Tensor, StepScale] = {p: by_name[name] for name, p in reversed(named) if name in by_name}
        layout = GroupLayout.of(group["params"], way, scales)
        _check_fits(optimizer, layout)
        pieces = SplitGroup(group, layout).pieces
        split += [(piece, group, scale) for piece, (scale, _) in zip(pieces, layout.pieces, strict=True)]

    twin = _plain_twin(optimizer, [{**piece, _PIECE: number} for number, (piece, _, _) in enumerate(split)])

    def follow(*_: Any) -> None:
        for piece in twin.param_groups:
            _, group, scale = split[piece[_PIECE]]
            for key, factor in _factors(optimizer, group, scale):
                piece[key] = multiplied(key, group[key], factor)

    def lead(*_: Any) -> None:
        for piece in twin.param_groups:
            _, group, scale = split[piece[_PIECE]]
            for key, factor in _factors(optimizer, group, scale):
                if factor:
                    group[key] = divided(piece[key], factor)

    def stepped(*_: Any) -> None:
        vars(optimizer)["_opt_called"] = True  # what schedulers ask for

    twin.register_step_pre_hook(follow)
    twin.register_step_post_hook(stepped)
    twin.register_state_dict_pre_hook(follow)  # a schedule has written since the last step
    twin.register_load_state_dict_post_hook(lead)
    return twin


def _check_fits(optimizer: Optimizer, layout: GroupLayout) -> None:
    if isinstance(FAMILIES[layout.way.family], Relative):
        raise UnitScalingError(
            f"the steps of {type(optimizer).__name__} are relative to each parameter, and the engine makes one flat "
            "tensor of a group. Use another optimizer, or another strategy."
        )
    if any(scale.gradient != 1.0 for scale, _ in layout.pieces):
        raise UnitScalingError(
            f"{type(optimizer).__name__} is to see gradients of what the function sees, and the engine flattens those "
            "of what is stored. Use storage='folded' and untied weights, or another optimizer."
        )
    if "weight_lr_power" in optimizer.defaults:
        raise UnitScalingError(
            f"{type(optimizer).__name__} counts steps and sums weights in its parameter groups, of which the engine "
            "has a copy that is the user's again before each step. Use another optimizer, or another strategy."
        )


def _plain_twin(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """One of the same class and constants, without what was put on the other: hooks, state, a scheduler's `step`."""
    twin: Optimizer = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    vars(twin).pop("step", None)
    vars(twin).update({name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")})
    twin.param_groups, twin.state = groups, defaultdict(dict)
    return twin


def _factors(
    optimizer: Optimizer, group: dict[str, Any], scale: StepScale
) -> Iterator[tuple[str, float | tuple[float, float]]]:
    """The user's hyperparameters in a group, each with its factor in a piece."""
    factors = scale.factors(group)
    for key in optimizer.defaults:
        if key in group:
            yield key, factors.get(key, 1.0)
