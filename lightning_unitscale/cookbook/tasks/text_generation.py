"""What tasks share whose models write text: what they read, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lightning_unitscale.cookbook.generation import check_prompts, generate, generation_config
from lightning_unitscale.cookbook.pretrained import Pretrained, context_length
from lightning_unitscale.cookbook.tasks.task import Task
from lightning_unitscale.errors import InputError


class TextGeneration(Task):
    """A prediction is the text that the model writes for a text."""

    counted = "tokens"
    generation: GenerationConfig

    def collate_texts(self, texts: Sequence[str], generation: Mapping[str, Any]) -> Callable[[list[str]], list[str]]:
        """Texts as they are; `generate` makes tokens of them."""
        self.generation = generation_config(self.model, self.tokenizer, generation)
        check_prompts(self.model, self.tokenizer, texts, self.generation.max_new_tokens)
        return list

    def predict_step(self, batch: list[str], batch_idx: int) -> dict[str, list[str]]:
        """One text for each."""
        return {"text": generate(self.model, self.tokenizer, batch, self.generation).texts}


def tokenizer_of(found: Pretrained, cfg: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer for texts of `task.sequence_length`.

    Raises:
        InputError: there is none, or the model's context is shorter.
    """
    tokenizer, context = found.text_tokenizer(), context_length(found.model)
    if context is not None and cfg.task.sequence_length > context:
        raise InputError(
            f"task.sequence_length={cfg.task.sequence_length} is longer than the model's context of {context} tokens; "
            f"give task.sequence_length={context}"
        )
    return tokenizer
