"""Notice that something else than the optimizer writes to weights between steps: a clamp, a projection, a reset.

What such code knows of a weight's scale is no longer true, and nothing else would say so. Every write in place counts a
tensor's version up, so one integer a parameter shows it; writes through `.data` don't, so over the first steps, and
where a version has changed twice (an average swapped in for validation, and out again), norms are compared as well, and
at every step a few values (`sampled_values`).
Only what has a gradient is watched: a target network or an average in the model is there to be written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.checks.beside import some, written_outside
from lightning_unitscale.optim.sampled_values import SampledValues
from lightning_unitscale.warn_user import warn_user

_STEPS_WITH_NORMS = 2


class Watched(NamedTuple):
    """A parameter, and where its module has it."""

    name: str
    parameter: Tensor
    owner: nn.Module


class WriteWatch:
    """The parameters of a plan as optimizers left them; all optimizers of the plan share it. Warns once."""

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}
        self._norms: dict[int, Tensor] = {}
        self._samples = SampledValues()
        self._steps_with_norms = _STEPS_WITH_NORMS
        self._done = False

    def before_step(self, watched: Sequence[Watched]) -> None:
        """Compare with what the last step left."""
        if self._done or _is_capturing():
            return
        known = [w for w in watched if id(w.parameter) in self._versions]
        found = {w: w.owner._parameters.get(w.name.rpartition(".")[2]) for w in known}
        if shared := [w.name for w, now in found.items() if now is not None and now is not w.parameter]:
            self._warn(
                f"unit scaling: {some(shared)} replaced by another parameter after the model was prepared. Each is "
                "stored at a scale of its own, so weights shared from here on are another function. Share them before "
                "the model is prepared, or use scheme='preserve'."
            )
            return
        gone = [w.name for w, now in found.items() if now is None]
        if gone:
            self._warn(
                f"unit scaling: {some(gone)} pruned or reparametrised after the model was prepared. What compares the "
                "magnitudes of different layers, as global pruning does, compares stored values, which are scaled. "
                "Prune with scheme='preserve', or before the model is prepared."
            )
            return
        written = self._by_norms(known) if self._norms else self._by_versions(known)
        written = written or self._samples.changed([w.parameter for w in known])
        if written:
            self._warn(written_outside(written, "between its steps"))

    def after_step(self, watched: Sequence[Watched]) -> None:
        """Remember what the optimizer left."""
        if self._done or _is_capturing():
            return
        for _, parameter, _ in watched:
            self._versions.pop(id(parameter), None)
        self._samples.forget(w.parameter for w in watched)
        watched = [w for w in watched if w.parameter.grad is not None]
        for _, parameter, _ in watched:
            self._versions[id(parameter)] = parameter._version
        self._samples.take([(w.name, w.parameter) for w in watched])
        self._norms.clear()
        if self._steps_with_norms:
            self._steps_with_norms -= 1
            self._norms.update((id(w.parameter), norm) for w, norm in zip(watched, _norms(watched), strict=True))

    def _by_versions(self, watched: Sequence[Watched]) -> list[str]:
        counts = {w.name: w.parameter._version - self._versions[id(w.parameter)] for w in watched}
        if any(counts.values()) and all(count in (0, 2) for count in counts.values()):
            self._steps_with_norms = _STEPS_WITH_NORMS  # there and back, perhaps: look closer from now on
            return []
        return [name for name, count in counts.items() if count]

    def _by_norms(self, watched: Sequence[Watched]) -> list[str]:
        found = [w for w in watched if id(w.parameter) in self._norms]
        if not found:
            return []
        before = torch.stack([self._norms[id(w.parameter)].double().cpu() for w in found])
        after = torch.stack([norm.double().cpu() for norm in _norms(found)])
        changed = ((before - after).abs() > 1e-6 * before).tolist()
        return [w.name for w, differs in zip(found, changed, strict=True) if differs]

    def _warn(self, message: str) -> None:
        self._done = True
        warn_user(message)


def _norms(watched: Sequence[Watched]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.linalg.vector_norm(_local(w.parameter)) for w in watched]


def _local(parameter: Tensor) -> Tensor:
    """The part of a sharded parameter that is here."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()
    return local


def _is_capturing() -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
