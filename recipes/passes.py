"""Count the passes over large tensors, and the bytes moved, of one linear layer in FP8.

    unitscale passes                  # = python recipes/passes.py
    unitscale passes list=true        # every operation
    unitscale passes device=cpu       # FP8 emulated by casts and upcast products

One forward and backward pass in eager mode, weight (size × size), input and gradient (size × size) in bfloat16:

    bf16       nn.Linear: products alone, so it moves the least; FP8 pays where its products are faster by more
    static     operands times constant powers of two, cast to FP8 (`ops.cast_product`)
    torchao    Float8Linear with dynamic tensorwise scales: largest absolute values first, then the casts

Each operation that reads or writes a tensor at least as large as the weight is one pass; it moves the bytes of all its
inputs and outputs. Views and allocations move none. The default device "meta" stands for CUDA: the same kernels with
the same layouts are chosen, and nothing is computed. `torch.compile` fuses many of these passes; eager mode runs all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.measuring.fp8_linear import StaticLinear, with_torchao
from lightning_unitscale.cookbook.measuring.pass_counter import PassCounter
from lightning_unitscale.errors import InputError

MIB = 2**20


@recipe("passes")
def main(cfg: DictConfig) -> None:
    """Prints the table."""
    check(cfg)
    counters = {layer: count(layer, cfg.size, cfg.device) for layer in cfg.layers}
    table = Table("linear", "passes", "MiB moved", title=f"size {cfg.size}, forward and backward, device {cfg.device}")
    for layer, counter in counters.items():
        table.add_row(layer, str(len(counter.passes)), f"{counter.bytes / MIB:.2f}")
        if cfg.list:
            for name, moved in counter.passes:
                table.add_row(f"  {name}", "", f"{moved / MIB:.2f}", style="dim")
    Console().print(table)


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that mean nothing."""
    if not isinstance(cfg.size, int) or cfg.size < 16 or cfg.size % 16:
        raise InputError(f"size={cfg.size} must be a positive multiple of 16")
    if cfg.device not in ("meta", "cpu"):
        raise InputError(f"device={cfg.device} must be meta or cpu")
    check_known("layers", cfg.layers, LAYERS)


def plain_linear(size: int, **options: Any) -> nn.Module:
    """(size, size) to (size, size)."""
    return nn.Linear(size, size, bias=False, **options)


def torchao_linear(size: int, **options: Any) -> nn.Module:
    """torchao's Float8Linear, converted by its own function."""
    try:
        return with_torchao(plain_linear(size, **options), "tensorwise", emulate=options["device"] == "cpu")
    except ModuleNotFoundError as error:
        raise InputError(
            "layers: torchao is not installed: pip install 'lightning-unitscale[bench]', or choose layers=[bf16,static]"
        ) from error


LAYERS: dict[str, Callable[..., nn.Module]] = {"bf16": plain_linear, "static": StaticLinear, "torchao": torchao_linear}


def count(layer: str, size: int, device: str) -> PassCounter:
    """The passes of one forward and backward run of a layer."""
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    module = LAYERS[layer](size, **options)
    x = torch.randn(size, size, **options, requires_grad=True)
    gradient = torch.randn(size, size, **options)
    counter = PassCounter(size * size)
    with counter:
        module(x).backward(gradient)
    return counter


if __name__ == "__main__":
    main()
