"""What of the log is shown; all of it goes into the run's log file (conf/common.yaml)."""

from __future__ import annotations

import logging

LIGHTNING = ("pytorch_lightning", "lightning.pytorch")  # its loggers
OF_NO_USE = ("\N{ELECTRIC LIGHT BULB} Tip", "TPU available", "HPU available")  # advertising, and hardware that is rare


class WithoutAdvertising(logging.Filter):
    """Leaves out Lightning's tips for other products."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is of use."""
        return not record.getMessage().startswith(OF_NO_USE)


class NotOfLightning(logging.Filter):
    """Leaves out what Lightning's own handler shows already."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is of another package."""
        return not record.name.startswith(LIGHTNING)
