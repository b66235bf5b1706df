"""One running scope, in which parameter-free sites are found by counting calls.

Counts are of one run of one frame. Over the whole step they would depend on everything that came before: a layer
skipped, a loop over the experts that got a token, a logger.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch

from lightning_unitscale.engine.record.places import EVERY_CALL
from lightning_unitscale.engine.record.recorder import MODULE_CALL
from lightning_unitscale.engine.record.tensors_of_calls import has_ordinal
from lightning_unitscale.engine.runtime.compilation import only_inside_others
from lightning_unitscale.engine.runtime.scope import FreeSite, Scope
from lightning_unitscale.errors import UnitScalingError


class OpenFrame:
    """A scope that runs, and how often each counted function has been called in it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.counts: dict[str, int] = {}

    def free_site(self, name: str, args: tuple[Any, ...]) -> FreeSite | None:
        """The parameter-free site that the running torch call is; asked by `__torch_function__` itself."""
        # A hook runs inside the frame without being its code: someone who logs means would shift the counts. The
        # recorder left hooks out too; in compiled code there is no stack to tell them by.
        if not has_ordinal(args) or (not torch.compiler.is_compiling() and _called_by_hook()):
            return None
        scope, ordinal = self.scope, self.counts.get(name, 0)
        self.counts[name] = ordinal + 1
        if ordinal >= scope.most_calls.get(name, ordinal + 1):
            raise UnitScalingError(
                f"{scope.name}: {name} was called {scope.most_calls[name]} times in the recorded step and "
                "is called more often now, so its scaled calls cannot be told apart. The model takes another path "
                "here than in the recorded step; list the module in skip, or record a step that takes both paths."
            )
        free = scope.sites.get((name, EVERY_CALL)) or scope.sites.get((name, ordinal))
        site = free.site if free is not None else None
        if site is not None and site.last_dim is not None and site.operand is not None:
            found = args[site.operand].shape[-1]
            if found != site.last_dim:
                raise UnitScalingError(
                    f"{site.name}: the recorded operand had a last dimension of {site.last_dim}, this one has {found}. "
                    "The model takes another path here than in the recorded step; list the module in skip, or "
                    "record a step that takes both paths."
                )
        return free


def _called_by_hook() -> bool:
    """Whether a module hook inside the open frame's method, not the method itself, made the running torch call."""
    frame: FrameType | None = sys._getframe(3)  # that called torch: this, `free_site`, `__torch_function__` are inside
    while frame is not None:
        if frame.f_code is _SCOPE_CALL:
            return False
        if frame.f_code in MODULE_CALL:
            return True
        frame = frame.f_back
    return False


_SCOPE_CALL = Scope.call.__code__

only_inside_others(OpenFrame, Scope.call)  # the latter is known by its code, which compiled code has not
