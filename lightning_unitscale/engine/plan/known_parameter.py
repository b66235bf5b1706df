"""Which object a parameter was when a plan was put in force, without keeping it alive."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class KnownParameter:
    """Tells one parameter from all others.

    By a weak reference; but `module.to` exchanges the inside of a DTensor with another's (so it does with all
    parameters, if torch is told so), and torch refuses to exchange what anybody has a weak reference to. Those are
    known by their id, which a later object may have again.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        exchanged = isinstance(parameter, DTensor) or torch.__future__.get_swap_module_params_on_conversion()
        self._id = id(parameter)
        self._reference = None if exchanged else weakref.ref(parameter)

    def is_(self, parameter: nn.Parameter) -> bool:
        """Whether it is this one."""
        return id(parameter) == self._id if self._reference is None else self._reference() is parameter
