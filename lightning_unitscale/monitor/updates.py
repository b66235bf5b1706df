"""What one optimizer step did to each weight: why a learning rate is too high, or too low.

    relative size   RMS(ΔW) / RMS(W)
    alignment       A = log_n( RMS(ΔW x) / (RMS(ΔW) · RMS(x)) ) for inputs x of n features: ½ where update and
                    activations have nothing to do with each other, 1 where they are fully aligned (Everett et al.,
                    arXiv 2407.05872, section 3)

A layer's output changes by n^A · RMS(ΔW) · RMS(x): a large relative size, or an alignment near 1 where the rule assumes
less, makes one step too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from lightning_unitscale.engine.record.spread_tensors import whole

ROWS = 256  # of a layer's input that are kept for its alignment


@dataclass(frozen=True)
class WeightUpdate:
    """One parameter in one step.

    Attributes:
        role: by the plan in force; empty without one.
        update, weight: RMS of the change, and of the parameter before it.
        alignment: of a linear layer's update with its input; None for others, and where nothing changed.
    """

    parameter: str
    role: str
    update: float
    weight: float
    alignment: float | None = None

    @property
    def relative(self) -> float | None:
        """Size of the update relative to the weight; None for a weight that was all zero."""
        return self.update / self.weight if self.weight else None


def copies_of(module: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters as they are now."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def updates_since(
    before: Mapping[str, Tensor], module: nn.Module, inputs: Mapping[str, Tensor], roles: Mapping[str, str]
) -> tuple[WeightUpdate, ...]:
    """What has changed.

    Args:
        before: from `copies_of`.
        inputs: rows [at most ROWS, features] of the input of linear layers, by the name of their weight.
        roles: by name of the parameter.
    """
    found = []
    for name, parameter in module.named_parameters():
        old = before.get(name)
        if old is None or old.shape != parameter.shape or not old.numel():
            continue
        change, old = whole(parameter.detach() - old).float(), whole(old).float()  # one weight at a time, if sharded
        x = inputs.get(name)
        alignment = None if x is None else alignment_of(change, x.float())
        found.append(WeightUpdate(name, roles.get(name, ""), _rms(change), _rms(old), alignment))
    return tuple(found)


def alignment_of(change: Tensor, x: Tensor) -> float | None:
    """A, of a change [out, in] and inputs [rows, in]; None where either is all zero or there is one feature alone."""
    features = x.shape[-1]
    size = _rms(change) * _rms(x)
    made = _rms(x @ change.T)
    return log(made / size) / log(features) if features > 1 and size > 0 and made > 0 else None


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
