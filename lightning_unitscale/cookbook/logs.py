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


class NotShownAlready(logging.Filter):
    """Leaves out what a handler of the logger's own, or of one between it and the root, shows already."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record reaches the screen by the root alone."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.parent is not None:
            if any(
                isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler) for h in logger.handlers
            ):
                return False
            logger = logger.parent
        return True
