"""A U-Net over samples, as Demucs has it (Défossez et al., 2020, arXiv 2006.12847): sound into sound.

samples → convolutions, each with a quarter of the moments → LSTM in both directions → the same way back
                      └──────── joined at the same resolution, as U-Nets do ────────────┘
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


class SoundUNetConfig(PreTrainedConfig):
    """Sizes: channels of each resolution, from the finest on."""

    model_type = "sound_unet"

    def __init__(
        self, channels: tuple[int, ...] = (24, 48, 72, 96), kernel: int = 8, stride: int = 4, **others: Any
    ) -> None:
        self.channels, self.kernel, self.stride = list(channels), kernel, stride
        super().__init__(**others)


class Down(nn.Module):
    """A convolution that makes fewer moments of many, and a gated one over channels."""

    def __init__(self, before: int, after: int, config: SoundUNetConfig) -> None:
        super().__init__()
        margin = (config.kernel - config.stride) // 2
        self.fewer = nn.Conv1d(before, after, config.kernel, config.stride, padding=margin)
        self.gated = nn.Conv1d(after, 2 * after, 1)

    def forward(self, sound: Tensor) -> Tensor:
        """[batch, after, moments / stride] of [batch, before, moments]."""
        return F.glu(self.gated(self.fewer(sound).relu()), 1)


class Up(nn.Module):
    """The way back of a `Down`."""

    def __init__(self, before: int, after: int, config: SoundUNetConfig) -> None:
        super().__init__()
        margin = (config.kernel - config.stride) // 2
        self.gated = nn.Conv1d(2 * before, 2 * before, 1)
        self.more = nn.ConvTranspose1d(before, after, config.kernel, config.stride, padding=margin)

    def forward(self, sound: Tensor) -> Tensor:
        """[batch, after, moments · stride] of [batch, 2 · before, moments]."""
        return self.more(F.glu(self.gated(sound), 1))  # type: ignore[no-any-return]  # modules are called untyped


class SoundUNet(PreTrainedModel):
    """See above."""

    config_class = SoundUNetConfig
    main_input_name = "input_values"

    def __init__(self, config: SoundUNetConfig) -> None:
        super().__init__(config)
        pairs = list(zip([1, *config.channels], config.channels, strict=False))
        self.down = nn.ModuleList(Down(before, after, config) for before, after in pairs)
        deepest = config.channels[-1]
        self.memory = nn.LSTM(deepest, deepest, batch_first=True, bidirectional=True)
        self.remembered = nn.Linear(2 * deepest, deepest)
        self.up = nn.ModuleList(Up(after, before, config) for before, after in reversed(pairs))
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no types here

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own initial values."""

    def forward(self, input_values: Tensor, **others: Any) -> ModelOutput:
        """Samples [batch, samples] of as many samples; any length."""
        length, whole = input_values.shape[1], self.config.stride ** len(self.config.channels)
        sound = F.pad(input_values, (0, -length % whole))[:, None]
        passed = []
        for down in self.down:
            sound = down(sound)
            passed.append(sound)
        states, _ = self.memory(sound.transpose(1, 2))
        sound = self.remembered(states).transpose(1, 2)
        for place, up in enumerate(self.up):
            sound = up(torch.cat([sound, passed[-1 - place]], 1))
            if place < len(self.up) - 1:
                sound = sound.relu()
        return ModelOutput(sound=sound[:, 0, :length])


AutoConfig.register(SoundUNetConfig.model_type, SoundUNetConfig)
AutoModel.register(SoundUNetConfig, SoundUNet)
