"""Lightning's two namespaces: `pytorch_lightning` and `lightning.pytorch`, the same code as two trees of classes.

A user's Trainer, modules and callbacks may be of either, and both may live in one process; to `isinstance` they are
strangers. Whatever asks what kind of thing an object is asks for the classes of all namespaces, and a class of ours
that Lightning is to know derives from those of all.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

NAMES = ("pytorch_lightning", "lightning.pytorch")


def _installed() -> tuple[ModuleType, ...]:
    found = []
    for name in NAMES:
        try:
            found.append(import_module(name))
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):  # something that it needs
                raise
    if not found:
        raise ModuleNotFoundError("lightning_unitscale needs Lightning: pip install pytorch-lightning, or lightning.")
    return tuple(found)


NAMESPACES = _installed()


@cache
def classes(path: str) -> tuple[type[Any], ...]:
    """The class of each namespace, as in `isinstance(callback, classes("callbacks.ModelPruning"))`."""
    return tuple(attrgetter(path)(namespace) for namespace in NAMESPACES)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a Trainer of any namespace; its class does not declare them."""
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    return callbacks


if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import Trainer
else:
    Callback = type("Callback", classes("Callback"), {"__doc__": "A callback for the Trainer of any namespace."})
