"""What tasks share whose models write text: what they read, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from lightning_unitscale.cookbook.generation import generate, generation_config, number_of_new_tokens
from lightning_unitscale.cookbook.tasks.task import Task


class TextGeneration(Task):
    """A prediction is the text that the model writes for a text."""

    counted = "tokens"
    generation: GenerationConfig

    def collate_texts(self, texts: Sequence[str], generation: Mapping[str, Any]) -> Callable[[list[str]], list[str]]:
        """Texts as they are; `generate` makes tokens of them."""
        self.generation = generation_config(self.model, self.tokenizer, generation)
        asked = self.generation.max_new_tokens
        self.generation.max_new_tokens = number_of_new_tokens(self.model, self.tokenizer, texts, asked)
        return list

    def predict_step(self, batch: list[str], batch_idx: int) -> dict[str, list[str]]:
        """One text for each."""
        return {"text": generate(self.model, self.tokenizer, batch, self.generation).texts}
