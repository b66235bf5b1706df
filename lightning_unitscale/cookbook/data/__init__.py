"""Data for the recipes: where it comes from, how it is split, and loaders that resume exactly."""

from lightning_unitscale.cookbook.data.documents import hold_out, hugging_face, python_topics, text_files
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch, Examples, split_by
from lightning_unitscale.cookbook.data.token_text import TokenText

__all__ = [
    "IGNORED",
    "Batch",
    "Examples",
    "TokenText",
    "hold_out",
    "hugging_face",
    "python_topics",
    "split_by",
    "text_files",
]
