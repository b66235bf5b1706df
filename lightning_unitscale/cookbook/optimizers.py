"""The optimizer of a recipe, from its config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from hydra.utils import get_method, instantiate
from torch import Tensor, nn
from torch.optim import Optimizer


def new_optimizer(config: Mapping[str, Any], module: nn.Module, params: Iterable[Tensor], **more: Any) -> Optimizer:
    """What the config's `_target_` makes of the parameters; of the module too, if it asks for that.

    Args:
        config: a class or function, and its arguments.
        module: that has the parameters.
        params: what it is to step.
        more: arguments that take the place of the config's.
    """
    if "module" in signature(get_method(config["_target_"])).parameters:
        more = {"module": module, **more}
    optimizer: Optimizer = instantiate(config, params=list(params), **more)
    return optimizer
