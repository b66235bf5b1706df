"""Where in a model's code a torch call is made."""

from __future__ import annotations

from typing import NamedTuple

EVERY_CALL = -1  # ordinal of a place that stands for all calls of its function in its frame


class Frame(NamedTuple):
    """The module (by name, "" for the root) and the method of it that is running."""

    module: str
    method: str

    def __str__(self) -> str:
        return f"{self.module or '<root>'}.{self.method}"


HOOK = Frame("", "<hook>")  # of calls that no module's own code makes


class Place(NamedTuple):
    """Where a call is found again that has no parameter to be known by.

    Attributes:
        module, method: of its frame.
        op: short name of the torch function.
        ordinal: which call (0, 1, …) of `op` in one run of the frame, or EVERY_CALL; None of a site that is known by
            its parameters instead.
    """

    module: str
    method: str
    op: str
    ordinal: int | None

    @property
    def frame(self) -> Frame:
        """The frame of the call."""
        return Frame(self.module, self.method)

    @property
    def at_every_call(self) -> Place:
        """All calls of the function in the frame."""
        return self._replace(ordinal=EVERY_CALL)
