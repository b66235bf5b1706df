"""Example inputs of a transformers model, made from its config: what an export is checked on, and traced with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_unitscale.errors import InputError

DYNAMIC = {  # by input: its dimensions that may differ from call to call
    "input_ids": ("batch", "length"),
    "attention_mask": ("batch", "length"),
    "decoder_input_ids": ("batch", "decoder_length"),
    "pixel_values": ("batch",),
    "input_features": ("batch",),
    "input_values": ("batch", "length"),
}


def example_inputs(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs by name, on the CPU: tokens [batch, length], pixels [batch, channels, height, width], and so on.

    Args:
        length: of tokens; cut to the model's context.

    Raises:
        InputError: the model's main input is of a kind not known here.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    text = config.get_text_config()
    length = min(length, getattr(text, "max_position_embeddings", None) or length)

    def tokens(count: int) -> Tensor:
        return torch.randint(0, text.vocab_size, (batch, count), generator=generator)

    inputs: dict[str, Tensor]
    if model.main_input_name == "input_ids":
        inputs = {"input_ids": tokens(length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    elif model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs = {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=generator)}
    elif model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions  # the convolutions halve them
        inputs = {"input_features": torch.randn(batch, config.num_mel_bins, frames, generator=generator)}
    elif model.main_input_name == "input_values":
        inputs = {"input_values": torch.randn(batch, 400 * length, generator=generator)}
    else:
        raise InputError(f"{type(model).__name__} takes {model.main_input_name}, for which export knows no example")
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(max(2, length // 2))
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}


class Logits(nn.Module):
    """A transformers model as a function from its inputs to one tensor: the logits, or what it gives first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
    ) -> Tensor:
        """The logits, without a cache. Named arguments: torch.export 2.13 loses the names of `**inputs`."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "pixel_values": pixel_values,
            "input_features": input_features,
            "input_values": input_values,
        }
        return logits_of(self.model, {name: tensor for name, tensor in inputs.items() if tensor is not None})


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, or the first output of a model without any."""
    cache = {} if "pixel_values" in inputs or "input_values" in inputs else {"use_cache": False}
    output: Any = model(**inputs, **cache)
    logits: Tensor = output.logits if "logits" in output else output[0]
    return logits
