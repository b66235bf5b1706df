"""Prepared models as plain ones, and written as what needs nothing of this package."""

from lightning_unitscale.export.examples import example_inputs, logits_of
from lightning_unitscale.export.plain import to_plain
from lightning_unitscale.export.targets import SUFFIXES, check_output, export, files_of

__all__ = ["SUFFIXES", "check_output", "example_inputs", "export", "files_of", "logits_of", "to_plain"]
