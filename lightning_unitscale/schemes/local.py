"""The scheme as it is asked about one place of a model: with the hyperparameters that `overrides` give that place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from lightning_unitscale.engine.record.trace import Call
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.near_names import matches
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.registry import hyperparameters_in
from lightning_unitscale.schemes.scheme import Scheme

Answer = TypeVar("Answer")


class LocalSchemes:
    """Asks a scheme's rules, and sees which overrides make a difference.

    Attributes:
        unheard: by glob and name, the hyperparameters that have changed no answer yet.
    """

    def __init__(self, scheme: Scheme, options: Options) -> None:
        self.scheme = scheme
        self.by_glob = {glob: hyperparameters_in(override) for glob, override in options.overrides.items()}
        self.unheard = {
            (glob, name): value
            for glob, values in self.by_glob.items()
            for name, value in values.items()
            if value != getattr(scheme, name)
        }

    def at(self, names: Iterable[str]) -> Scheme:
        """The scheme at a place that goes by these names of modules or parameters; later overrides win."""
        names = list(names)
        found = {
            name: value
            for glob, values in self.by_glob.items()
            if any(matches(known, (glob,)) for known in names)
            for name, value in values.items()
        }
        return replace(self.scheme, **found) if found else self.scheme

    def ask(self, names: Iterable[str], question: Callable[[Scheme], Answer]) -> Answer:
        """What the scheme answers at a place."""
        names = list(names)
        for (glob, name), value in list(self.unheard.items()):
            is_meant = any(matches(known, (glob,)) for known in names)
            if is_meant and question(replace(self.scheme, **{name: value})) != question(self.scheme):
                del self.unheard[glob, name]
        return question(self.at(names))

    def ask_at(self, call: Call, question: Callable[[Scheme], Answer]) -> Answer:
        """What it answers at a call, which goes by the name of the module whose code makes it."""
        return self.ask([call.frame.module] if call.frame is not None else [], question)

    def check_all_heard(self) -> None:
        """
        Raises:
            UnitScalingError: an override names a hyperparameter that decides nothing at the places it is for.
        """
        for glob, name in self.unheard:
            raise UnitScalingError(
                f"overrides[{glob!r}]: {name} changes nothing there. Name the parts that it is for: weights by "
                "parameter, branches by any parameter of theirs, attention and activations by the module whose code "
                "calls them."
            )
