"""mode=generate: text from prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from lightning_unitscale.cookbook.generation import generate, generation_config, number_of_new_tokens
from lightning_unitscale.cookbook.inference.loading import load_with_tokenizer
from lightning_unitscale.cookbook.inference.numbers import print_numbers
from lightning_unitscale.cookbook.runs import plain
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found


def generate_texts(cfg: DictConfig, path: str) -> list[str]:
    """One text streams to the terminal as it comes; many are generated in batches."""
    prompts = read_prompts(cfg)
    found = load_with_tokenizer(cfg, path)
    model, tokenizer = found.model, found.text_tokenizer()
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} does not write text; mode=predict and mode=evaluate are for it")
    config = generation_config(model, tokenizer, plain(cfg.generation))
    config.max_new_tokens = number_of_new_tokens(model, tokenizer, prompts, config.max_new_tokens)
    stream = len(prompts) == 1 and config.num_beams in (None, 1)
    torch.manual_seed(cfg.seed)
    done = []
    for start in range(0, len(prompts), cfg.batch_size):
        batch = prompts[start : start + cfg.batch_size]
        done.append(generate(model, tokenizer, batch, config, stream=stream))
        if not stream:
            print("\n".join(f"--- {prompt}{text}\n" for prompt, text in zip(batch, done[-1].texts, strict=True)))
    tokens, seconds = sum(d.tokens for d in done), sum(d.seconds for d in done)
    print_numbers(
        tokens=f"{tokens:,} in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s",
        time_to_first_token=f"{1000 * done[0].first_token_s:.1f} ms",
    )
    return [text for d in done for text in d.texts]


def read_prompts(cfg: DictConfig) -> list[str]:
    """The prompt, or those of a file."""
    if cfg.prompt_file is None:
        return [str(cfg.prompt)]
    file = Path(cfg.prompt_file).expanduser()
    if not file.is_file():
        raise InputError(f"prompt_file={cfg.prompt_file}: {not_found(file)}")
    return [line for line in file.read_text().splitlines() if line.strip()]
