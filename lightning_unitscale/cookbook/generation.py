"""Text from prompts, by `generate` of transformers with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from lightning_unitscale.cookbook.pretrained import context_length
from lightning_unitscale.errors import InputError

NEW_TOKENS = 100  # at most, where nobody says how many
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # without a meaning where nothing is drawn


@dataclass
class Generated:
    """What one batch of prompts gave.

    Attributes:
        texts: one for each prompt, without it.
        tokens: how many tokens were generated in all, the end token included, padding not.
        first_token_s: seconds from the call to the first token of every prompt.
        seconds: of the whole call.
    """

    texts: list[str]
    tokens: int
    first_token_s: float
    seconds: float


class _FirstToken(StoppingCriteria):
    """Never stops; notes when the first token was there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> GenerationConfig:
    """The model's own generation config with these settings changed.

    A model that knows no end token was trained on documents end to end, its BOS never a target; so it never says BOS.

    Raises:
        InputError: a setting is not one of transformers' GenerationConfig, or has a value it refuses.
    """
    own: dict[str, Any] = model.generation_config.to_dict()
    known = GenerationConfig().to_dict()
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"generation.{unknown[0]} is not a setting of transformers' GenerationConfig")
    changes: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id or own.get("eos_token_id") or 0}
    if own.get("eos_token_id") is None and own.get("bos_token_id") is not None:
        changes["suppress_tokens"] = [own["bos_token_id"]]
    wanted = {**own, **changes, **settings}
    if not wanted.get("do_sample"):
        wanted |= dict.fromkeys(SAMPLING)
    try:
        config = GenerationConfig.from_dict(wanted)
        if config.do_sample and config.temperature is not None and config.temperature <= 0:
            raise ValueError(f"temperature={config.temperature} must be positive; do_sample=false is its limit")
        config.validate(strict=True)
    except ValueError as error:
        reasons = [line.strip("- ") for line in str(error).splitlines() if line.startswith("- ")]
        raise InputError(f"generation: {' '.join(reasons) or error}") from error
    return config


def number_of_new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    asked: int | None,
    special_tokens: bool = True,
) -> int:
    """How many tokens at most are to follow each prompt: as many as are asked for, which must fit.

    Args:
        prompts, special_tokens: as for `generate`.
        asked: None for `NEW_TOKENS`, or fewer where the model's context ends before.

    Raises:
        InputError: there is no prompt, one is empty, or one does not fit the model's context.
    """
    if not prompts:
        raise InputError("there is no prompt; give prompt=<text>, or prompt_file=<file with one prompt a line>")
    context, apart = context_length(model), model.config.is_encoder_decoder
    following, most = 0 if apart else asked or 1, NEW_TOKENS
    for number, prompt in enumerate(prompts, start=1):
        tokens = len(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
        if tokens == 0:
            raise InputError(f"prompt {number} is empty, and the tokenizer puts nothing in front of it")
        if context is None:
            continue
        if tokens + following > context:
            advice = f", or give generation.max_new_tokens={context - tokens}" if tokens < context else ""
            shown = repr(prompt[:40]) + ("…" if len(prompt) > 40 else "")
            raise InputError(
                f"prompt {number} ({shown}) has {tokens} tokens, and with {following} new ones that is more than the "
                f"{context} of the model's context; shorten it{advice}"
            )
        most = min(most, context if apart else context - tokens)
    return asked or most


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: GenerationConfig,
    stream: bool = False,
    special_tokens: bool = True,
) -> Generated:
    """Generate one text for each prompt, all in one batch, padded on the left.

    Args:
        stream: print tokens as they come, after the prompt if that is plain text; for one prompt without beams.
        special_tokens: the tokenizer puts its own around a prompt; False where a chat template has done so.
    """
    encoded = tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
        add_special_tokens=special_tokens,
    )
    encoded = encoded.to(model.device)
    first = _FirstToken()
    begin = time.perf_counter()
    run: Any = model.generate
    sequences: Tensor = run(
        **encoded,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([first]),
        streamer=TextStreamer(tokenizer, skip_prompt=not special_tokens, skip_special_tokens=True) if stream else None,
    )
    seconds = time.perf_counter() - begin
    skip = 1 if model.config.is_encoder_decoder else encoded["input_ids"].shape[1]
    new = sequences[:, skip:]  # [prompts, new tokens]
    ends = model.generation_config.eos_token_id
    return Generated(
        texts=tokenizer.batch_decode(new, skip_special_tokens=True),
        tokens=sum(_length(row, ends) for row in new),
        first_token_s=(first.at or time.perf_counter()) - begin,
        seconds=seconds,
    )


def _length(row: Tensor, ends: int | list[int] | None) -> int:
    """Number of tokens up to the first end token."""
    known = [] if ends is None else [ends] if isinstance(ends, int) else ends
    found = torch.isin(row, torch.tensor(known, device=row.device)).nonzero()
    return int(found[0]) + 1 if len(found) else len(row)
