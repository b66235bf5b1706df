"""State dicts taken before the model was prepared, where those taken afterwards have another form.

Where factors stay in the forward pass a state dict carries the plan, and each weight with one dimension more (see
`engine.plan.state_dict`). An average that goes on from the state dict of an untouched model, or a rewind to it, would
end in an error about shapes, after a step or after many. So what is known to be one is refused, and what may be one
(names and tensors alone, as `named_parameters` has them too, beside code that takes state dicts) is warned of.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.record.held_tensors import held_mappings, is_copy
from lightning_unitscale.engine.runtime.kept_copies import roots_beside
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.warn_user import warn_user

if TYPE_CHECKING:
    import pytorch_lightning as pl


def refuse_kept_state_dicts(module: nn.Module, plan: Plan, trainer: pl.Trainer | None) -> None:
    """
    Raises:
        UnitScalingError: the module, a callback or an optimizer keeps a state dict of the untouched model.
    """
    if plan.is_plain:
        return
    inside = {id(parameter) for parameter in module.parameters()}
    roots = list(roots_beside(module, trainer, inside))
    for root in roots:
        for place, kept in held_mappings(root, type(root).__name__, inside):
            part = _part_it_is_of(module, plan, kept)
            if part is None:
                continue
            message = (
                f"{place} holds the weights of {part or type(module).__name__} by the names of its state dict. "
                f"Factors of this plan stay in the forward pass (storage={plan.storage!r}), so what state_dict() gives "
                "from now on has another form: each weight with one more dimension, and the plan. Begin an average "
                "or a snapshot after the first training step, or keep it by named_parameters()"
            )
            if hasattr(kept, "_metadata") or any(
                name in kept for name, _ in module.get_submodule(part).named_buffers()
            ):
                raise UnitScalingError(f"{message}. Nothing was changed.")
            if _takes_state_dicts(roots):
                warn_user(f"unit scaling: {message}, as it may be already.")


def _part_it_is_of(module: nn.Module, plan: Plan, kept: Mapping[Any, Any]) -> str | None:
    """The name of the module whose weights are in a mapping, all by their names there; None of other mappings."""
    tensors = {key: value for key, value in kept.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(kept):
        return None
    for name, child in module.named_modules():
        prefix, own = f"{name}." if name else "", dict(child.named_parameters())
        changed = [
            key for key in own if prefix + key in plan.parameters and plan.parameters[prefix + key].from_initial != 1.0
        ]
        if own.keys() <= tensors.keys() and any(is_copy(tensors[key], own[key]) for key in changed):
            return str(name)
    return None


def _takes_state_dicts(roots: Iterable[object]) -> bool:
    """Whether code of these objects, or of what they hold, asks for state dicts."""
    held = [value for root in roots for value in (root, *vars(root).values())]
    kinds = {base for value in held for base in type(value).__mro__}
    return any(
        _mentions(code, "state_dict")
        for kind in kinds
        if kind.__module__.partition(".")[0] not in ("torch", "pytorch_lightning", "lightning", "lightning_unitscale")
        for method in vars(kind).values()
        if callable(method) and isinstance(code := getattr(inspect.unwrap(method), "__code__", None), CodeType)
    )


def _mentions(code: CodeType, name: str) -> bool:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return name in code.co_names or any(_mentions(other, name) for other in inner)
