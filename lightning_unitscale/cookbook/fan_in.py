"""The initialisation that a careful author gives a model of any kind: what an author's own is compared with.

    matrix, convolution     N(0, 1 / fan_in)
    output of a branch      N(0, 1 / (2 · depth · fan_in)), as GPT-2 (Radford et al., 2019, section 2.3) makes them
    embedding               N(0, 1)
    bias of those           0

Weights that are all zero stay zero, as do those that are named as kept; all other parameters stay as they were built.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_Convolution = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd


@torch.no_grad()
def initialise_by_fan_in(
    model: nn.Module, *, depth: int, branch_outputs: Collection[str], kept: Collection[str] = ()
) -> None:
    """Draws the weights of a model anew.

    Args:
        model: with the weights that its author gives it.
        depth: number of blocks of each residual stream, with two branches in each.
        branch_outputs: globs of the modules whose output a residual stream adds.
        kept: globs of the parameters whose initial values belong to the model's design.
    """
    for name, module in model.named_modules():
        branch = any(fnmatchcase(name, glob) for glob in branch_outputs)
        for weight, fan_in in _weights(module).items():
            if not any(fnmatchcase(f"{name}.{weight}", glob) for glob in kept):
                std = fan_in**-0.5 / (math.sqrt(2 * depth) if branch else 1.0)
                _draw(module, weight, std)


def _weights(module: nn.Module) -> dict[str, float]:
    """The names of a module's own weights, and their fan-in; 1 for tables."""
    if isinstance(module, nn.Linear):
        return {"weight": module.in_features}
    if isinstance(module, Conv1D):
        return {"weight": module.weight.shape[0]}
    if isinstance(module, _Transposed):
        kernel, stride = math.prod(module.kernel_size), math.prod(module.stride)
        return {"weight": module.in_channels / module.groups * kernel / stride}
    if isinstance(module, _Convolution):
        return {"weight": module.in_channels / module.groups * math.prod(module.kernel_size)}
    if isinstance(module, nn.Embedding):
        return {"weight": 1}
    if isinstance(module, nn.RNNBase):
        return {name: weight.shape[1] for name, weight in module.named_parameters() if weight.dim() == 2}
    if isinstance(module, nn.MultiheadAttention):
        return {"in_proj_weight": module.embed_dim}
    return {}


def _draw(module: nn.Module, name: str, std: float) -> None:
    weight: Tensor = getattr(module, name)
    if not weight.any():
        return
    drawn = torch.randn_like(weight) * std
    if nn.utils.parametrize.is_parametrized(module, name):
        setattr(module, name, drawn)  # weight norm takes it apart into norm and direction
    else:
        weight.copy_(drawn)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.zero_()
