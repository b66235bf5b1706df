"""What of the log is shown; all of it goes into the run's log file (conf/common.yaml)."""

from __future__ import annotations

import logging

LIGHTNING = ("pytorch_lightning", "lightning.pytorch")  # its loggers
OF_NO_USE = ("\N{ELECTRIC LIGHT BULB} Tip", "TPU available", "HPU available")  # advertising, and hardware that is rare


# transformers imports torchao where that is installed, whether a model is quantized or not, and torchao then warns of
# its own compiled parts and of its own way to register enums.
OF_TORCHAO = {"torchao": "Failed to load ", "torch.utils._pytree": "is an Enum subclass and is now natively supported"}


class Without(logging.Filter):
    """Leaves out messages with this text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is another one."""
        return self.text not in record.getMessage()


def without_torchao() -> None:
    """Leaves out these two warnings, and no other, from now on; for commands that make no use of torchao."""
    for logger, text in OF_TORCHAO.items():
        logging.getLogger(logger).addFilter(Without(text))


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
