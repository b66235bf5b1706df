"""How the factor of a parameter-free site comes into its call: where it costs least.

    attention     into the function's own scale, or the query
    residual      into the addition, `add(skip, branch, alpha=a)`
    others        onto the output, in place if nothing else reads it

A call in place stays one: its caller goes on with the first operand. But the factor then comes onto a copy, as autograd
may have saved the output of the call, which must not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.runtime.block_constants import BlockConstant
from lightning_unitscale.engine.runtime.compilation import only_inside_others
from lightning_unitscale.ops import MATMULS, FunctionCall
from lightning_unitscale.ops.max_scale import max_scale
from lightning_unitscale.ops.torch_functions import OUTPUT_IS_FREE

Run = Callable[[FunctionCall], Any]  # runs a call with what belongs to its parameters


def run_with_factor(site: Site, name: str, call: FunctionCall, in_place: bool, run: Run) -> Any:
    """The call with the site's factor.

    Args:
        name: short name of its function.
        in_place: whether the function writes to its first argument.
        run: for the call itself. An attention product's parameters are left to the caller.
    """
    a = site.factors[""]
    if a == 1.0:
        return run(call)
    if site.divides_along is not None:
        return _run_divided(call, site.divides_along, in_place or _asked_in_place(call), run)
    if site.role == "attention":
        return MATMULS[name].scaled_logits(call, a, site.operand)
    if site.role == "residual":
        left, right = call.args[:2]
        if site.operand == 1:
            return left.add_(right, alpha=a) if in_place else torch.add(left, right, alpha=a)
        return left.mul_(a).add_(right) if in_place else torch.add(right, left, alpha=a)
    if in_place or (site.role == "activation" and _asked_in_place(call)):
        return call.args[0].copy_(run(_on_copy(call)) * a)
    result = run(call)
    return result.mul_(a) if name in OUTPUT_IS_FREE else result * a


def add_with_constant(site: Site, call: FunctionCall, in_place: bool, constant: BlockConstant) -> Any:
    """The same of a residual addition whose factor is another one in each block, in compiled code."""
    left, right = call.args[:2]
    if site.operand == 1:
        right = constant.times(right)
    elif in_place:
        return left.copy_(constant.times(left) + right)
    else:
        left = constant.times(left)
    return left.add_(right) if in_place else torch.add(left, right)


def scaled_output(output: Tensor, site: Site) -> Tensor:
    """What a method returned, with the factor of the site that the whole method is."""
    return output * site.factors[""] if site.divides_along is None else output / max_scale(output, site.divides_along)


def _run_divided(call: FunctionCall, dim: int, in_place: bool, run: Run) -> Any:
    """The call, its output divided by the scale that it has itself."""
    result = run(_on_copy(call) if in_place else call)
    divided = result / max_scale(result, dim)
    return call.args[0].copy_(divided) if in_place else divided


def _on_copy(call: FunctionCall) -> FunctionCall:
    """The same call in place, but into a copy of its first argument."""
    target, *others = call.args
    return FunctionCall(call.function, (target.clone(), *others), call.kwargs)


def _asked_in_place(call: FunctionCall) -> bool:
    """Whether an activation is called with `inplace=True`, the one flag that activations have."""
    return any(argument is True for argument in (*call.args[1:], *call.kwargs.values()))


only_inside_others(run_with_factor, add_with_constant, scaled_output, _run_divided, _on_copy, _asked_in_place)
