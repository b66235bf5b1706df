"""The plan inside a state dict, so that weights do not part from what they mean.

The state dict of a prepared model that is a plain module as well, every factor being folded, is a plain one, with the
plan as text in the state dict's `_metadata`, which `torch.save` keeps and a plain module does not look at.

Where the stored weights alone are not the function, that is too weak. A prepared model with factors in its forward pass
adds its plan to its state dict as a tensor of JSON bytes (a tensor goes through every saver), and stores each parameter
with one more dimension, of size 1:

    plain model      weight [64, 32]
    state dict       weight [1, 64, 32], unit_scaling_plan [bytes]

A plain module refuses both: the plan as an unexpected key, and, under `strict=False` or for a part of the weights, the
shapes. Loading plain weights into a prepared model fails here. `loading` puts either kind of plan in force on a plain
module before its weights are loaded.

The state dict of a *part* of the model (the network inside a LightningModule, of which `save_pretrained` asks) carries
that part's plan in the same way, if factors stand inside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.plan.plan import ATTRIBUTE, Plan, plan_of
from lightning_unitscale.engine.plan.rename import factors_inside, factors_outside, plan_of_part
from lightning_unitscale.errors import UnitScalingError

PLAN_KEY = ATTRIBUTE
Carried = Tensor | str  # a plan inside a state dict
_in_pieces: list[nn.Module] = []  # what is being loaded so


def encode(plan: Plan) -> Tensor:
    """The plan as a tensor of bytes."""
    return torch.frombuffer(bytearray(plan.to_json().encode()), dtype=torch.uint8)


def decode(carried: Carried) -> Plan:
    """The plan that a state dict carries; the inverse of `encode` and `Plan.to_json`."""
    return Plan.from_dict(json.loads(bytes(carried.tolist()) if isinstance(carried, Tensor) else carried))


def carried_plans(state: Mapping[str, Any]) -> dict[str, Carried]:
    """The plans in a state dict, by the name of the module whose they are ("" for the root)."""
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state, "_metadata", None) or {}
    found: dict[str, Carried] = {name: local[PLAN_KEY] for name, local in metadata.items() if PLAN_KEY in local}
    for key, value in state.items():
        if key.endswith(PLAN_KEY) and key.removesuffix(PLAN_KEY)[-1:] in ("", ".") and isinstance(value, Tensor):
            found[key.removesuffix(PLAN_KEY)[:-1]] = value
    return found


def add_marker(module: nn.Module, plan: Plan) -> None:
    """Make the state dicts of the module and its parts carry the plan, and loading ask for it where weights need it."""
    module.register_state_dict_post_hook(_mark)
    if plan.is_plain:
        return
    module.register_load_state_dict_pre_hook(_check)
    for name, child in module.named_modules():
        if name and (factors_inside(plan, name) or factors_outside(plan, name)):
            part = _Part(plan, name)
            child.register_state_dict_post_hook(_MarkPart(part))
            child.register_load_state_dict_pre_hook(_CheckPart(part))


def remove_marker(module: nn.Module) -> None:
    """Undo `add_marker`, on the module or on a copy of it."""
    for child in module.modules():
        for hooks in (child._state_dict_hooks, child._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                ours = getattr(hook, "hook", hook)
                if isinstance(ours, (_MarkPart, _CheckPart)) or (child is module and ours in (_mark, _check)):
                    del hooks[key]


class _Part:
    """The plan of a part of a model, made anew when the model's plan has changed."""

    def __init__(self, whole: Plan, name: str) -> None:
        self.whole, self.name = whole, name
        self._made: tuple[str, Plan] | None = None

    def plan(self) -> Plan:
        """
        Raises:
            UnitScalingError: the part alone is no function that could be loaded.
        """
        text = self.whole.to_json()
        if self._made is None or self._made[0] != text:
            try:
                self._made = text, plan_of_part(self.whole, self.name)
            except ValueError as error:
                raise UnitScalingError(
                    f"the state dict of {self.name} alone is not its function: {error}. Take that of the whole "
                    "prepared model, or make it plain first: remove_unit_scaling, or unitscale export."
                ) from None
        return self._made[1]


class _MarkPart:
    """After the state dict of a part was taken on its own."""

    def __init__(self, part: _Part) -> None:
        self.part = part

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if not prefix and not _in_pieces:
            _mark_as(self.part.plan(), state, prefix, metadata)


class _CheckPart:
    """Before a state dict is loaded into a part on its own."""

    def __init__(self, part: _Part) -> None:
        self.part = part

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if not prefix and not _in_pieces:
            _check_against(self.part.plan(), module, state, prefix)


def _mark(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    plan = plan_of(module)
    if plan is not None:
        _mark_as(plan, state, prefix, metadata)


def _mark_as(plan: Plan, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if plan.is_plain:
        metadata[PLAN_KEY] = plan.to_json()
        return
    for key, _ in _parameters_in(state, plan, prefix):
        state[key] = state[key].unsqueeze(0)
    state[prefix + PLAN_KEY] = encode(plan)


def _check(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    plan = plan_of(module)
    if plan is not None:
        _check_against(plan, module, state, prefix)


def _check_against(plan: Plan, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    marker = state.pop(prefix + PLAN_KEY, None)
    if marker is None:
        raise UnitScalingError(
            f"these are plain weights, but {type(module).__name__} has unit-scaling factors in its forward pass. Load "
            "them before preparing the model, or call remove_unit_scaling() first."
        )
    same_text = torch.equal(marker.cpu(), encode(plan))  # as for a target network that follows at every step
    stored = plan if same_text else decode(marker)
    if _meaning(stored) != _meaning(plan):
        raise UnitScalingError(
            "these weights were stored under another unit-scaling plan than the one in force on "
            f"{type(module).__name__} (storage {stored.storage!r} and {plan.storage!r}). Load them with "
            "lightning_unitscale.load_checkpoint into a freshly built model."
        )
    for key, dimensions in _parameters_in(state, plan, prefix):
        if state[key].dim() == dimensions + 1:
            state[key] = state[key].squeeze(0)


@contextmanager
def loaded_in_pieces(module: nn.Module, state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A state dict of a module whose plan is in force, as that of a plain module, for code that loads it in pieces.

    Inside, state dicts of parts are those of plain modules too.

    Raises:
        UnitScalingError: these are plain weights, or were stored under another plan.
    """
    plain = dict(state)
    if (plan := plan_of(module)) is not None and not plan.is_plain:
        _check(module, plain, "")
    _in_pieces.append(module)
    try:
        yield plain
    finally:
        _in_pieces.pop()


def _parameters_in(state: dict[str, Any], plan: Plan, prefix: str) -> Iterator[tuple[str, int]]:
    """Key in the state dict and number of dimensions of each parameter, under each of its names."""
    for name, parameter in plan.parameters.items():
        for key in dict.fromkeys(prefix + alias for alias in (name, *parameter.aliases)):
            if key in state:
                yield key, len(parameter.shape)


def _meaning(plan: Plan) -> dict[str, Any]:
    """What of a plan decides what stored weights mean."""
    return {
        "stored": {name: parameter.stored for name, parameter in plan.parameters.items()},
        "factors": {(site.name, *site.params): site.factors for site in plan.explicit_sites},
    }
