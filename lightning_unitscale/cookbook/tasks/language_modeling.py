"""Predicting the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch
from lightning_unitscale.cookbook.data.token_text import TokenText
from lightning_unitscale.cookbook.generation import generate, generation_config
from lightning_unitscale.cookbook.pretrained import Pretrained
from lightning_unitscale.cookbook.tasks.text_generation import TextGeneration
from lightning_unitscale.cookbook.tokenizers import is_of_bytes
from lightning_unitscale.errors import InputError


class LanguageModeling(TextGeneration):
    """Batches: input_ids and labels, both [batch, sequence], labels one token ahead. Losses are nats per token."""

    heads = ("AutoModelForCausalLM",)
    shows_scores = False  # they follow from the loss

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.perplexity = Perplexity(ignore_index=IGNORED)

    @classmethod
    def data_module(cls, examples: Any, found: Pretrained, cfg: DictConfig) -> TokenText:
        """Crops and windows of documents (name -> text)."""
        return TokenText(
            examples,
            found.text_tokenizer(),
            sequence_length=cfg.task.sequence_length,
            held_out=cfg.data.held_out,
            test_part=cfg.task.get("test_part", True),
            **loading(cfg),
        )

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """The prompt of the samples leaves room for what follows it."""
        sample = cfg.task.get("sample")
        prompt = len(str(sample.prompt).encode()) if sample else 0
        if prompt > cfg.task.sequence_length - 2:
            raise InputError(f"task.sample.prompt has {prompt} bytes; there is room for {cfg.task.sequence_length - 2}")

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """Labels are one token ahead already, so that the model's own loss is none of this task's."""
        return model(input_ids=batch["input_ids"], use_cache=False)

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """The mean over the labels that count."""
        output = self.output(self.model, batch)
        logits, labels = output.logits.flatten(0, 1), batch["labels"].flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED), output

    def score(self, batch: Batch, output: Any) -> None:
        """Perplexity."""
        self.perplexity.update(output.logits, batch["labels"])

    def scores(self) -> dict[str, Tensor]:
        """Perplexity per token and, where tokens are bytes, bits."""
        of_bytes = self.tokenizer is not None and is_of_bytes(self.tokenizer)
        bits = {"bits_per_byte": self.held_out_loss.compute() / math.log(2)} if of_bytes else {}
        return {**bits, "perplexity": self.perplexity.compute()}

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """The texts that `task.sample` asks for."""
        return list(self.sample(**settings["sample"])) if "sample" in settings else []

    def sample(self, prompt: str, count: int, temperature: float, seed: int = 1) -> list[str]:
        """Texts that begin with the prompt and fill the context; what can't be shown is a replacement character.

        A model whose logits are no numbers, after a training that diverged, says so in place of a text.
        """
        self.eval()
        tokens = self.tokenizer(prompt, return_tensors="pt").input_ids.to(self.device)
        with torch.inference_mode():
            if not self.model(input_ids=tokens).logits.isfinite().all():
                return [f"{prompt}… (no text: the model's logits are no numbers)"]
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0}
        room = self.model.config.max_position_embeddings - len(self.tokenizer(prompt).input_ids)
        config = generation_config(self.model, self.tokenizer, {**settings, "max_new_tokens": room})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            texts = generate(self.model, self.tokenizer, [prompt] * count, config).texts
        return [
            "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in prompt + text)
            for text in texts
        ]
