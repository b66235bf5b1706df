"""The error that means: what was asked for can't be done, and here is what to change."""


class InputError(Exception):
    """A file, data set or option given by the user is unusable; shown as its message alone, without a traceback."""
