"""Prepared models as plain ones, and written in formats that need nothing of this package."""

from lightning_unitscale.export.examples import example_inputs, logits_of
from lightning_unitscale.export.formats import FORMATS, SUFFIX, check_output, export
from lightning_unitscale.export.plain import to_plain

__all__ = ["FORMATS", "SUFFIX", "check_output", "example_inputs", "export", "logits_of", "to_plain"]
