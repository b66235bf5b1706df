"""Count the passes over large tensors, and the bytes moved, of one linear layer in FP8.

    unitscale passes                  # = python recipes/passes.py
    unitscale passes list=true        # every operation
    unitscale passes device=cpu       # FP8 emulated by casts and upcast products

One forward and backward pass in eager mode, weight (size × size), input and gradient (size × size) in bfloat16:

    bf16       nn.Linear
    static     operands times constant powers of two, cast to FP8 (`ops.cast_product`)
    torchao    Float8Linear with dynamic tensorwise scales: largest absolute values first, then the casts

Each operation that reads or writes a tensor at least as large as the weight is one pass; it moves the bytes of all its
inputs and outputs. Views and allocations move none. The default device "meta" stands for CUDA: the same kernels with
the same layouts are chosen, and nothing is computed. `torch.compile` fuses many of these passes; eager mode runs all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_unitscale.cli import recipe
from lightning_unitscale.errors import InputError
from lightning_unitscale.formats import FORMATS
from lightning_unitscale.ops.cast_product import CastProduct, Scales
from lightning_unitscale.ops.products import MatrixProducts

MIB = 2**20
ALLOCATIONS = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"})


class PassCounter(TorchDispatchMode):
    """Writes down every operation on a large tensor: (its name, the bytes that it moves).

    Args:
        large: number of elements.
    """

    def __init__(self, large: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.large = large
        self.passes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # the tensor subclass takes it apart; we count the pieces
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        moves = not function.is_view and function._schema.name not in ALLOCATIONS
        if moves and any(tensor.numel() >= self.large for tensor in tensors):
            self.passes.append((str(function), sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return result

    @property
    def bytes(self) -> int:
        """Moved by all passes."""
        return sum(moved for _, moved in self.passes)


class StaticLinear(nn.Linear):
    """What a linear layer does under `UnitScaling(format="fp8")`."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, size, bias=False, **options)
        numbers = torch.ones(len(Scales._fields), dtype=torch.float32, device=self.weight.device)
        self.scales = Scales(*numbers.unbind())

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, in); result: (tokens, out)."""
        y: Tensor = CastProduct.apply(  # type: ignore[no-untyped-call]
            x, self.weight, None, MatrixProducts(), FORMATS["fp8"], x.dtype, *self.scales
        )
        return y


def torchao_linear(size: int, **options: Any) -> nn.Module:
    """torchao's Float8Linear, converted by its own function."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise InputError(
            "layers: torchao is not installed: pip install 'lightning-unitscale[bench]', or choose layers=[bf16,static]"
        ) from error
    module = nn.Sequential(nn.Linear(size, size, bias=False, **options))
    emulate = torch.device(options["device"]).type == "cpu"
    return convert_to_float8_training(module, config=Float8LinearConfig(emulate=emulate))  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "bf16": lambda size, **options: nn.Linear(size, size, bias=False, **options),
    "static": StaticLinear,
    "torchao": torchao_linear,
}


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


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that mean nothing."""
    if not isinstance(cfg.size, int) or cfg.size < 16 or cfg.size % 16:
        raise InputError(f"size={cfg.size} must be a positive multiple of 16")
    if cfg.device not in ("meta", "cpu"):
        raise InputError(f"device={cfg.device} must be meta or cpu")
    for layer in cfg.layers:
        if layer not in LAYERS:
            raise InputError(f"layers: {layer!r} is not known; choose from {', '.join(LAYERS)}")


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


if __name__ == "__main__":
    main()
