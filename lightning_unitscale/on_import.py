"""Runs a function when a module has been imported, now or later, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Calls `act` at once if the module is there, else right after its code has run.

    Args:
        name: of the module.
        act: takes nothing; what it imports must not lead back to a module that is being imported.
    """
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Announcer(name, act))


class _Announcer(MetaPathFinder):
    """Finds one module as the other finders do, and has `act` called once its code has run."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the other finders, its loader watched; None for every other module."""
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        loader = spec.loader if spec else None
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        run = loader.exec_module

        def run_and_announce(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.act()

        loader.exec_module = run_and_announce  # type: ignore[method-assign]  # of this loader alone
        return spec
