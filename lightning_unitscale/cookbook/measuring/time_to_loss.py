"""Variants of one language model, trained to the same held-out loss: how long each of them takes.

Formats that lose something need more steps for the same loss, so the time of a step alone says half of it. All
variants start from the same weights and see the same batches; the loss that all have to reach is the last one of the
variant that ends worst. Clocks stand still while a loss is measured, and start after the first step, which compiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_unitscale import recalibrating, scale_learning_rates, unit_scale
from lightning_unitscale.cookbook.data.standard_library import python_sources
from lightning_unitscale.cookbook.measuring.fp8_linear import InTransformerEngine, with_torchao

VOCABULARY = 256  # bytes


@dataclass
class Race:
    """One variant's training.

    Attributes:
        losses: (seconds of training until then, held-out loss in nats per byte).
        error: why it could not run.
    """

    variant: str
    losses: list[tuple[float, float]]
    error: str = ""

    def seconds_to(self, loss: float) -> float | None:
        """When it was first as low as this; None if never."""
        return next((seconds for seconds, found in self.losses if found <= loss), None)


def race(variant: str, mode: str, cfg: DictConfig, deadline: float = float("inf")) -> Race:
    """Train one variant; see the module.

    Args:
        variant: one of `fp8_comparison.VARIANTS`.
        mode: one of `side_by_side.MODES`.
        cfg: of the recipe `fp8_benchmark`.
        deadline: in `time.monotonic()`'s seconds; a race that is not over by then has an error.
    """
    device, sizes = torch.device(cfg.device), cfg.race
    train, held_out = _text(sizes.tokens + 1, device)
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = Bytes(sizes.width, sizes.depth, sizes.tokens)
    first = _batch(train, sizes.batch, 0)
    plan = None
    if variant == "static":
        plan = unit_scale(model, lambda m: _loss(m, first), scheme="preserve", format="fp8")
    elif variant.startswith("torchao-"):
        model = with_torchao(model, variant.removeprefix("torchao-"), emulate=device.type != "cuda")
    elif variant == "transformer-engine":
        model = InTransformerEngine(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.lr, fused=device.type == "cuda")
    if plan is not None:
        scale_learning_rates(optimizer, plan)
    run = torch.compile(model) if mode == "compiled" else model
    result, seconds = Race(variant, []), 0.0
    for step in count():
        if step % sizes.every == 0:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                result.losses.append((seconds, float(_loss(model, held_out))))
        if step == sizes.steps:
            return result
        if time.monotonic() > deadline:
            result.error = f"out of time after {step} of {sizes.steps} steps"
            return result
        begin = _now(device)
        measuring = nullcontext() if plan is None else recalibrating(plan, step)
        with measuring:
            with torch.autocast(device.type, torch.bfloat16):
                loss = _loss(run, _batch(train, sizes.batch, step))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += (_now(device) - begin) if step else 0.0
    raise AssertionError


class Bytes(nn.Module):
    """A Llama on bytes."""

    def __init__(self, width: int, depth: int, tokens: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=max(1, width // 128),
            max_position_embeddings=tokens,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, tokens); result: (batch, tokens, 256)."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def _loss(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def _text(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The standard library's sources in rows of `length` bytes, and 16 rows that are held out, from its end."""
    text = b"".join(python_sources(max_bytes=4_000_000).values())
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = ids[: len(ids) // length * length].view(-1, length).long().to(device)
    order = torch.randperm(len(rows) - 16, generator=torch.Generator().manual_seed(0)).to(device)
    return rows[:-16][order], rows[-16:]


def _batch(rows: Tensor, size: int, step: int) -> Tensor:
    return rows[torch.arange(step * size, (step + 1) * size, device=rows.device) % len(rows)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
