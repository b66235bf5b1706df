"""Every exception of the package; a message names what was wrong, where, and what to do."""

from __future__ import annotations


class UnitScalingError(Exception):
    """Something about the model, the options or a checkpoint makes unit scaling impossible."""


class NoLossError(UnitScalingError):
    """The rehearsed step returned no loss and called no backward."""


class WrongGradientsError(UnitScalingError):
    """Under a plan gradients are not the slope of the loss, though the untouched model's are."""


class UncastableError(Exception):
    """Why the operands of a call can't be cast to a narrow format."""


class InputError(Exception):
    """A file, data set or option given by the user is unusable; shown as its message alone, without a traceback."""


def first_line(error: BaseException) -> str:
    """What another library's error says, without the pages that may follow."""
    return str(error).strip().partition("\n")[0][:300]
