"""Measure forward and backward in FP8 on a GPU: static scales beside bf16 and torchao's dynamic ones.

    unitscale fp8_benchmark                     # = python recipes/fp8_benchmark.py; a GPU of compute capability 8.9
    unitscale fp8_benchmark device=cpu linears=[[64,64,64]] blocks=[[64,32]] rounds=2 warm_up=1     # does it run?

Variants of one module, all in bf16 with the same weights:

    bf16                  the module as it is
    static                unit_scale(module, step, scheme="preserve", format="fp8")
    torchao-tensorwise    torchao.float8.convert_to_float8_training, one dynamic scale per tensor
    torchao-rowwise       the same, one dynamic scale per row

Times are medians of one step's forward and backward, variants alternated in every round. Before each step the weights
are written, as an optimizer does, so no cast of them is kept from the step before. Peak memory is what a step needs
beside weights, input and the gradient that it starts from; saved memory is what autograd keeps for the backward pass,
weights among it (of static, the cast ones).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from lightning_unitscale import unit_scale
from lightning_unitscale.cli import recipe
from lightning_unitscale.errors import InputError

HEAD_WIDTH = 128
VARIANTS = ("bf16", "static", "torchao-tensorwise", "torchao-rowwise")
MODES = ("eager", "compiled")


class Block(nn.Module):
    """One decoder layer of Llama, from embeddings to hidden states: (1, tokens, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=int(width * 3.5),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            num_hidden_layers=1,
            vocab_size=16,
        )
        self.model = LlamaModel(config)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (1, tokens, width)."""
        hidden: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return hidden


@dataclass
class Row:
    """What was measured of one variant: milliseconds and MiB."""

    case: str
    mode: str
    variant: str
    milliseconds: float | None = None
    ratio: float | None = None  # bf16's time over this one's
    peak: float | None = None
    saved: float | None = None
    error: str = ""


class Case:
    """A module and its input, to be built anew for each variant."""

    def __init__(self, name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], cfg: DictConfig) -> None:
        self.name, self.build, self.shape = name, build, shape
        self.device, self.dtype = torch.device(cfg.device), getattr(torch, cfg.dtype)

    def variant(self, name: str, mode: str) -> Step:
        """The module as this variant, compiled or not, and its input."""
        torch.manual_seed(0)
        with torch.device(self.device):
            module = self.build().to(self.dtype)
            x = torch.randn(self.shape, dtype=self.dtype).requires_grad_()
        if name == "static":
            unit_scale(module, lambda m: with_unit_gradient(m(x)), scheme="preserve", format="fp8")
        elif name.startswith("torchao-"):
            module = with_torchao(module, name.removeprefix("torchao-"), self.device)
        return Step(torch.compile(module, fullgraph=name != "torchao-rowwise") if mode == "compiled" else module, x)


def with_unit_gradient(y: Tensor) -> Tensor:
    """A loss whose gradient has a norm of about 1, as that of `Step.run`."""
    loss: Tensor = (y.float() * torch.randn_like(y) / y.numel() ** 0.5).sum()
    return loss


class Step:
    """Forward and backward of one module."""

    def __init__(self, module: Any, x: Tensor) -> None:
        self.module, self.x = module, x
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.gradient: Tensor | None = None
        self.on_gpu = x.is_cuda

    def milliseconds(self) -> float:
        """Of one step; the weights are written before it, outside the clock."""
        self.write_weights()
        if not self.on_gpu:
            begin = time.perf_counter()
            self.run()
            return 1e3 * (time.perf_counter() - begin)
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.x.device)
        begin_event.record()
        self.run()
        end_event.record()
        torch.cuda.synchronize(self.x.device)
        elapsed: float = begin_event.elapsed_time(end_event)
        return elapsed

    def write_weights(self) -> None:
        """As an optimizer does, but with the values that they have."""
        with torch.no_grad():
            torch._foreach_mul_(self.parameters, 1.0)

    def run(self) -> None:
        """Forward and backward; gradients are thrown away."""
        y = self.module(self.x)
        if self.gradient is None:
            self.gradient = torch.randn_like(y) / y.numel() ** 0.5
        y.backward(self.gradient)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def peak(self, before: int) -> float | None:
        """MiB that one step needs; None on a CPU.

        Args:
            before: bytes that were allocated before this variant was built.
        """
        if not self.on_gpu:
            return None
        self.write_weights()
        torch.cuda.synchronize(self.x.device)
        torch.cuda.reset_peak_memory_stats(self.x.device)
        self.run()
        torch.cuda.synchronize(self.x.device)
        assert self.gradient is not None
        standing = [*self.module.parameters(), *self.module.buffers(), self.x, self.gradient]
        own: int = sum(tensor.untyped_storage().nbytes() for tensor in standing)
        peak: int = torch.cuda.max_memory_allocated(self.x.device) - before - own
        return peak / 2**20

    def saved(self) -> float:
        """MiB that the forward pass keeps for the backward pass, each storage once."""
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.module(self.x)
        return sum(kept.values()) / 2**20


def with_torchao(module: nn.Module, recipe_name: str, device: torch.device) -> nn.Module:
    """torchao's float8 training of every linear layer; off a GPU its products are emulated."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe_name)
    if device.type != "cuda":
        config = Float8LinearConfig(emulate=True)
    wrapped = nn.Sequential(module)  # a linear layer as the root itself is not converted
    convert_to_float8_training(wrapped, config=config)
    return wrapped


def measure(case: Case, mode: str, cfg: DictConfig) -> list[Row]:
    """One row for each variant; a variant that can't run says why."""
    rows = {name: Row(case.name, mode, name) for name in cfg.variants}
    steps: dict[str, Step] = {}
    for name, row in rows.items():
        before = torch.cuda.memory_allocated(case.device) if case.device.type == "cuda" else 0
        try:
            steps[name] = case.variant(name, mode)
            for _ in range(2):
                steps[name].run()
            row.peak, row.saved = steps[name].peak(before), steps[name].saved()
        except Exception as error:
            steps.pop(name, None)
            row.error = f"{type(error).__name__}: {error}".partition("\n")[0][:100]
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for round_number in range(cfg.warm_up + cfg.rounds):
        for name in order.sample(list(steps), len(steps)):
            elapsed = steps[name].milliseconds()
            if round_number >= cfg.warm_up:
                times[name].append(elapsed)
    for name in steps:
        row = rows[name]
        row.milliseconds = median(times[name])
        if "bf16" in times:
            row.ratio = median(a / b for a, b in zip(times["bf16"], times[name], strict=True))
    torch._dynamo.reset()
    return list(rows.values())


def cases(cfg: DictConfig) -> list[Case]:
    """The configured modules, smallest first."""
    linears = [
        Case(f"linear {n}x{i}x{o}", partial(nn.Linear, i, o, bias=False), (n, i), cfg) for n, i, o in cfg.linears
    ]
    return linears + [
        Case(f"Llama block {width}, {tokens} tokens", partial(Block, width), (1, tokens, width), cfg)
        for width, tokens in cfg.blocks
    ]


def machine(device: torch.device) -> str:
    """Hardware, versions and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        import torchao

        versions = f"torch {torch.__version__}, torchao {torchao.__version__}"
    except ImportError:
        versions = f"torch {torch.__version__}, no torchao"
    return f"{name}, {versions}, {date.today()}"


def table(title: str, rows: list[Row]) -> Table:
    """All rows."""
    made = Table(title=title)
    made.add_column("case")
    made.add_column("mode")
    made.add_column("variant")
    for column in ("ms", "bf16 / this", "peak MiB", "saved MiB"):
        made.add_column(column, justify="right")
    for row in rows:
        numbers = ((row.milliseconds, ".3f"), (row.ratio, ".2f"), (row.peak, ".0f"), (row.saved, ".1f"))
        cells = ["" if number is None else format(number, spec) for number, spec in numbers]
        made.add_row(row.case, row.mode, row.variant, *([row.error, "", "", ""] if row.error else cells))
    return made


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that mean nothing or can't be run here."""
    for key, known in (("variants", VARIANTS), ("modes", MODES)):
        if unknown := [name for name in cfg[key] if name not in known]:
            raise InputError(f"{key}: {unknown[0]!r} is not known; choose from {', '.join(known)}")
    for key, sizes in (("linears", 3), ("blocks", 2)):
        for shape in cfg[key]:
            if len(shape) != sizes or not all(isinstance(size, int) and size > 0 for size in shape):
                raise InputError(f"{key}: {list(shape)} must be {sizes} positive whole numbers")
    if not isinstance(cfg.rounds, int) or cfg.rounds < 1:
        raise InputError(f"rounds={cfg.rounds} must be a positive whole number")
    device = torch.device(cfg.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={cfg.device}: this machine has no CUDA device; device=cpu shows that everything runs")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(f"device={cfg.device}: FP8 products need compute capability 8.9 (Ada, Hopper or later)")


@recipe("fp8_benchmark")
def main(cfg: DictConfig) -> None:
    """Prints the table and writes it, with all numbers, into the run's folder."""
    check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    rows: list[Row] = []
    for case in cases(cfg):
        for mode in cfg.modes:
            rows += measure(case, mode, cfg)
            for row in rows[-len(cfg.variants) :]:
                print(row.case, row.mode, row.variant, row.error or f"{row.milliseconds:.3f} ms", flush=True)
    title = machine(torch.device(cfg.device))
    (folder / "fp8_benchmark.json").write_text(json.dumps({"machine": title, "rows": [asdict(row) for row in rows]}))
    with (folder / "fp8_benchmark.txt").open("w") as stream:
        for console in (Console(), Console(file=stream, width=140)):
            console.print(table(title, rows))


if __name__ == "__main__":
    main()
