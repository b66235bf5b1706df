"""`torch.autograd.Function`s, which a function mode does not see: autograd is off inside, backward written by hand.

All of them go through `_SingleLevelFunction.apply`, also those whose `apply` somebody kept under another name
(`swiglu = SwiGLU.apply`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.utils.checkpoint import CheckpointFunction, checkpoint

# Runs a Function: its class, what applies it, and its arguments
Runner = Callable[[type, Callable[..., Any], tuple[Any, ...]], Any]
_runners: list[Runner] = []


def _apply(cls: type, *args: Any) -> Any:
    return _runners[-1](cls, super(_SingleLevelFunction, cls).apply, args)  # type: ignore[misc]  # Function's C++ base has it


# What stands on the Python stack between code that the backward pass runs again, or never, and what called it: a
# watched Function, a checkpoint. Methods in between open their frames again; a closure of the method around does not.
RUN_ASIDE = frozenset({_apply.__code__, inspect.unwrap(checkpoint).__code__})


@contextmanager
def watching_functions(run: Runner) -> Iterator[None]:
    """Let `run` run every Function that is applied inside."""
    _runners.append(run)
    _SingleLevelFunction.apply = classmethod(_apply)  # type: ignore[attr-defined]  # defined by its base class in C++
    try:
        yield
    finally:
        _runners.pop()
        if not _runners:
            del _SingleLevelFunction.apply  # type: ignore[attr-defined]  # likewise


@contextmanager
def reentrant_checkpoints_opened(met: Callable[[], None]) -> Iterator[None]:
    """Run layers that are checkpointed the reentrant way, by a Function, in the other way.

    Then autograd sees them, as it sees the model without checkpointing.

    Args:
        met: called at each of them.
    """

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        met()
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    around = vars(CheckpointFunction).get("apply")  # of one that is entered already; the base class has torch's
    CheckpointFunction.apply = apply  # type: ignore[method-assign]  # a function for a method
    try:
        yield
    finally:
        if around is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = around  # type: ignore[method-assign]  # a function for a method


@contextmanager
def reentrant_checkpoints_allowed() -> Iterator[None]:
    """Let `autograd.grad` go through them as they run in training, inside a rehearsal.

    They call `backward` in their backward pass, which a rehearsal keeps from the hooks on parameters. Torch refuses
    them there, as the gradients of weights that they alone use are in `.grad` only.
    """
    torch.autograd._is_checkpoint_valid, before = lambda: True, torch.autograd._is_checkpoint_valid
    try:
        yield
    finally:
        torch.autograd._is_checkpoint_valid = before
