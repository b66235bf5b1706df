"""Text for the recipes: documents from somewhere, split, cut into byte sequences that resume exactly."""

from lightning_unitscale.cookbook.data.byte_text import BOS, IGNORED, VOCABULARY, ByteText, decode, encode
from lightning_unitscale.cookbook.data.documents import hold_out, hugging_face, python_topics, text_files

__all__ = [
    "BOS",
    "IGNORED",
    "VOCABULARY",
    "ByteText",
    "decode",
    "encode",
    "hold_out",
    "hugging_face",
    "python_topics",
    "text_files",
]
