"""A model that reads letters aloud: FastSpeech (Ren et al., 2019, arXiv 1905.09263) that finds durations by itself.

    letters → encoder → a duration each, and the mel frame that it sounds like
                      → every letter's state as often as it has frames → decoder → mel frames

In training the durations are those by which the letters' own frames fit the sound best (`monotonic_alignment`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTextToSpectrogram, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from lightning_unitscale.cookbook.data.examples import IGNORED
from lightning_unitscale.cookbook.tasks.alignment import monotonic_alignment

LONGEST = 60  # frames of one letter, in what the model says by itself


class TextToMelConfig(PreTrainedConfig):
    """Sizes; the labels are the voices."""

    model_type = "text_to_mel"

    def __init__(
        self,
        vocab_size: int = 29,
        num_mel_bins: int = 80,
        hidden_size: int = 128,
        encoder_layers: int = 2,
        decoder_layers: int = 3,
        num_attention_heads: int = 4,
        conv_kernel: int = 5,
        pad_token_id: int = 0,
        **others: Any,
    ) -> None:
        self.vocab_size, self.num_mel_bins, self.hidden_size = vocab_size, num_mel_bins, hidden_size
        self.encoder_layers, self.decoder_layers = encoder_layers, decoder_layers
        self.num_attention_heads, self.conv_kernel = num_attention_heads, conv_kernel
        self.pad_token_id = pad_token_id
        super().__init__(**others)


class SpeechAttention(nn.Module):
    """Every moment looks at every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """[batch, length, width] of the same; the mask [batch, length] is true where there is something."""
        query, key, value = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.output(seen.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]  # modules are called untyped


class SpeechBlock(nn.Module):
    """Attention, then two convolutions over time; each is added to what it read."""

    def __init__(self, config: TextToMelConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.conv_kernel
        self.attention_norm, self.conv_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SpeechAttention(width, config.num_attention_heads)
        self.widen = nn.Conv1d(width, 2 * width, kernel, padding=kernel // 2)
        self.narrow = nn.Conv1d(2 * width, width, kernel, padding=kernel // 2)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """[batch, length, width] of the same; the mask [batch, length] is true where there is something."""
        states = states + self.attention(self.attention_norm(states), mask)
        there = mask[:, None]  # convolutions see nothing beyond the end
        inner = self.widen(self.conv_norm(states).transpose(1, 2) * there).relu()
        return states + self.narrow(inner * there).transpose(1, 2)  # type: ignore[no-any-return]  # modules are called untyped


class TextToMel(PreTrainedModel):
    """See above."""

    config_class = TextToMelConfig
    main_input_name = "input_ids"

    def __init__(self, config: TextToMelConfig) -> None:
        super().__init__(config)
        width, bins = config.hidden_size, config.num_mel_bins
        self.letters = nn.Embedding(config.vocab_size, width)
        self.voices = nn.Embedding(config.num_labels or 1, width)
        self.encoder = nn.ModuleList(SpeechBlock(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.duration_inner = nn.Conv1d(width, width, 3, padding=1)
        self.duration = nn.Linear(width, 1)
        self.sound = nn.Linear(width, bins)  # of a letter by itself
        self.decoder = nn.ModuleList(SpeechBlock(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.mel = nn.Linear(width, bins)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no types here

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own initial values."""

    def get_input_embeddings(self) -> nn.Module:
        """Those of letters."""
        return self.letters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        speaker_ids: Tensor | None = None,
        labels: Tensor | None = None,
        durations: Tensor | None = None,
        **others: Any,
    ) -> ModelOutput:
        """Mel frames, and the loss where the true ones are given.

        Args:
            input_ids: [batch, letters].
            attention_mask: [batch, letters], 1 where there is one.
            speaker_ids: [batch]; default: the first voice.
            labels: [batch, frames, mel bins], IGNORED beyond the end.
            durations: [batch, letters], frames of each; default: those that fit the labels or, without labels, the
                model's own.

        Returns:
            spectrogram [batch, frames, mel bins], lengths [batch] in frames, durations; and the loss: mean absolute
            differences of the frames, of those that letters have by themselves, and of the logarithms of durations.
        """
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        there = there.bool()
        voice = torch.zeros_like(input_ids[:, 0]) if speaker_ids is None else speaker_ids
        states = self.letters(input_ids) + self.voices(voice)[:, None]
        states = states + positions(*states.shape[1:]).to(states)
        for block in self.encoder:
            states = block(states, there)
        states = self.encoder_norm(states)
        alone = self.sound(states)  # [batch, letters, bins]
        logarithms = self._log_durations(states.detach(), there)
        if durations is None and labels is not None:
            durations = fitting(alone.detach(), there, labels)
        elif durations is None:
            durations = logarithms.exp().round().clamp(1, LONGEST).long()
        durations = durations * there
        lengths = durations.sum(1)
        which = letter_of_frame(durations)  # [batch, frames]
        spoken = torch.arange(which.shape[1], device=which.device)[None] < lengths[:, None]
        frames = self._decode(states.gather(1, which[..., None].expand(-1, -1, states.shape[-1])), spoken)
        output = {"spectrogram": frames, "lengths": lengths, "durations": durations}
        if labels is None:
            return ModelOutput(**output)
        own = alone.gather(1, which[..., None].expand(-1, -1, alone.shape[-1]))
        labels = labels[:, : frames.shape[1]]
        timing = F.l1_loss(logarithms[there], durations[there].clamp(min=1).to(logarithms).log())
        loss = F.l1_loss(frames[spoken], labels[spoken]) + F.l1_loss(own[spoken], labels[spoken]) + timing
        return ModelOutput(loss=loss, **output)

    def _log_durations(self, states: Tensor, there: Tensor) -> Tensor:
        """[batch, letters]; what they learn is no matter of the encoder's."""
        inner = self.duration_inner(states.transpose(1, 2) * there[:, None]).relu()
        return self.duration(inner.transpose(1, 2)).squeeze(-1)  # type: ignore[no-any-return]  # modules are called untyped

    def _decode(self, states: Tensor, spoken: Tensor) -> Tensor:
        states = states + positions(*states.shape[1:]).to(states)
        for block in self.decoder:
            states = block(states, spoken)
        return self.mel(self.decoder_norm(states))  # type: ignore[no-any-return]  # modules are called untyped


AutoConfig.register(TextToMelConfig.model_type, TextToMelConfig)
AutoModelForTextToSpectrogram.register(TextToMelConfig, TextToMel)


def positions(length: int, width: int) -> Tensor:
    """Sines and cosines [length, width] (Vaswani et al., 2017, arXiv 1706.03762)."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def fitting(alone: Tensor, there: Tensor, labels: Tensor) -> Tensor:
    """Durations [batch, letters] by which the frames that letters have alone fit the sound best."""
    frames = (labels[..., 0] != IGNORED).sum(1)
    scores = -torch.cdist(alone.float(), labels.float(), p=1)
    return monotonic_alignment(scores, there.sum(1), frames)


def letter_of_frame(durations: Tensor) -> Tensor:
    """[batch, most frames]: the place of the letter that each frame belongs to; 0 beyond the end."""
    ends = durations.cumsum(1)
    frame = torch.arange(int(ends[:, -1].max()), device=durations.device)
    which = (frame[None, :, None] >= ends[:, None]).sum(-1)  # [batch, frames]: letters that are over
    return which * (which < durations.shape[1])
