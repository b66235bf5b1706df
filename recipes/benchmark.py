"""Measure what unit scaling costs: step times beside the untouched model's, and the time of preparation.

    unitscale benchmark                                  # = python recipes/benchmark.py
    unitscale benchmark model.width=512 batch_size=4     # another size
    unitscale benchmark modes=[eager] rounds=100         # steadier numbers
    unitscale benchmark threads=2 clock=wall             # an otherwise idle machine

A step is forward, backward and optimizer. In every round each variant takes one step, in a new order, and its time is
divided by the plain model's of the same round; the table gives medians and quartiles of these ratios. The variants:

    plain           the untouched model
    folded, unit    `unit_scale(model, …)` with storage="folded" and "unit", scheme umup
    unit-scaling    the PyPI package of that name: its transform `unit_scale(model)`

That transform can't run every model (Llama of `transformers` is one that it can't); the table then says so. The model
`written` is the same Llama without the code that stops it, so that all variants run on one model.
"""

from __future__ import annotations

import importlib
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_unitscale import scale_learning_rates, unit_scale
from lightning_unitscale.cli import recipe
from lightning_unitscale.errors import InputError

CHOICES = {
    "models": ("transformers", "written"),
    "modes": ("eager", "compiled"),
    "variants": ("plain", "folded", "unit", "unit-scaling"),
}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}

# ----------------------------------------------------------------------------------------------------------------------
# The models: logits = model(tokens)


class Transformers(nn.Module):
    """Any causal language model of transformers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, sequence]; result: [batch, sequence, vocabulary]."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


class Written(nn.Module):
    """The same Llama in plain PyTorch."""

    def __init__(self, vocabulary: int, width: int, hidden: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden, heads, length) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.readout = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, sequence]; result: [batch, sequence, vocabulary]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.readout(self.norm(x))
        return logits


class Block(nn.Module):
    """Pre-norm attention with rotary positions, then a gated MLP."""

    def __init__(self, width: int, hidden: int, heads: int, length: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.head_width = width // heads
        frequencies = 10_000 ** (-torch.arange(0, self.head_width, 2) / self.head_width)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)  # [length, head_width]
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: [batch, sequence, width]."""
        x = x + self.attend(self.attention_norm(x))
        h = self.mlp_norm(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y

    def attend(self, h: Tensor) -> Tensor:
        """Causal self-attention."""
        q, k, v = (
            layer(h).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # [batch, head, sequence, head_width]
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding."""
        a, b = x.chunk(2, dim=-1)
        length = x.shape[-2]
        return x * self.cos[:length] + torch.cat((-b, a), dim=-1) * self.sin[:length]


# ----------------------------------------------------------------------------------------------------------------------
# One variant: a model of its own, and its training step


@dataclass
class Contestant:
    """A variant that runs; `step` does one training step."""

    name: str
    step: Callable[[], None]


def enter(cfg: DictConfig, kind: str, mode: str, variant: str, batch: tuple[Tensor, Tensor]) -> Contestant:
    """Builds a variant; the same initial weights for all."""
    model = new_model(cfg, kind)
    plan = None
    run: Callable[[Tensor], Tensor]
    if variant == "unit-scaling":
        transforms = importlib.import_module("unit_scaling.transforms")
        model = transforms.unit_scale(model)  # a copy
        run = transforms.compile(model) if mode == "compiled" else model
    else:
        if variant != "plain":
            plan = unit_scale(model, lambda module: loss_of(module, batch), storage=variant)
        run = torch.compile(model) if mode == "compiled" else model
    optimizer = instantiate(cfg.optimizer, params=(run if isinstance(run, nn.Module) else model).parameters())
    if plan is not None:
        scale_learning_rates(optimizer, plan)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(run, batch).backward()
        optimizer.step()

    return Contestant(variant, step)


def new_model(cfg: DictConfig, kind: str) -> nn.Module:
    """A model with the weights that the seed gives."""
    torch.manual_seed(cfg.seed)
    config = cfg.model.config
    if kind == "transformers":
        return Transformers(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    sizes = (cfg.model.width, int(2.75 * cfg.model.width), cfg.model.depth, cfg.model.width // cfg.model.head_width)
    return Written(config.vocab_size, *sizes, cfg.task.sequence_length)


def random_batch(cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """Inputs and targets: what a step costs doesn't depend on them."""
    generator = torch.Generator().manual_seed(cfg.seed)
    shape = (cfg.batch_size, cfg.task.sequence_length + 1)
    tokens = torch.randint(cfg.model.config.vocab_size, shape, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_of(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss, computed outside the model as in the recipes."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def race(cfg: DictConfig, kind: str, mode: str) -> list[dict[str, Any]]:
    """One row for each variant: its times, and its ratios to the plain model's."""
    batch, clock = random_batch(cfg), CLOCKS[cfg.clock]
    failures: dict[str, str] = {}
    contestants: list[Contestant] = []
    # The package resets the compiler when it first runs, so it must be the first to.
    for variant in sorted(cfg.variants, key=lambda name: name != "unit-scaling"):
        try:
            contestant = enter(cfg, kind, mode, variant, batch)
            contestant.step()
        except Exception as error:
            if variant != "unit-scaling":
                raise
            failures[variant] = one_line(error)
        else:
            contestants.append(contestant)

    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(-cfg.warm_up, cfg.rounds):
        shift = number % len(contestants)
        for contestant in contestants[shift:] + contestants[:shift]:
            begin = clock()
            contestant.step()
            if number >= 0:
                times[contestant.name].append(clock() - begin)

    rows = []
    for variant in cfg.variants:
        row: dict[str, Any] = {"model": kind, "mode": mode, "variant": variant}
        if variant in failures:
            rows.append({**row, "error": failures[variant]})
            continue
        ratios = [own / plain for own, plain in zip(times[variant], times["plain"], strict=True)]
        rows.append(
            {**row, "seconds": quartiles(times[variant]), "ratio": quartiles(ratios), "samples": times[variant]}
        )
    return rows


def preparation(cfg: DictConfig, kind: str, storage: str) -> dict[str, Any]:
    """How long `unit_scale` takes, in eager steps of the plain model.

    The first preparation in a process looks up the functions of torch and is listed apart.
    """
    batch, clock = random_batch(cfg), CLOCKS[cfg.clock]
    plain = enter(cfg, kind, "eager", "plain", batch)
    for _ in range(cfg.warm_up):
        plain.step()
    steps, preparations = [], []
    for _ in range(cfg.preparations):
        begin = clock()
        plain.step()
        steps.append(clock() - begin)
        model = new_model(cfg, kind)
        begin = clock()
        unit_scale(model, lambda module: loss_of(module, batch), storage=storage)
        preparations.append(clock() - begin)
    step = statistics.median(steps)
    return {
        "model": kind,
        "storage": storage,
        "first": preparations[0] / step,
        "steps": quartiles([seconds / step for seconds in preparations]),
    }


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def one_line(error: BaseException) -> str:
    """An error as the table shows it."""
    if isinstance(error, ModuleNotFoundError):
        return "not installed (pip install unit-scaling)"
    lines = str(error).strip().splitlines()[:2]  # the compiler names its cause in the second
    return f"{type(error).__name__}: {' '.join(lines)}"[:200]


# ----------------------------------------------------------------------------------------------------------------------
# The run


@recipe("benchmark")
def main(cfg: DictConfig) -> None:
    """Measures, prints the tables and saves every number."""
    check(cfg)
    torch.set_num_threads(cfg.threads)
    logging.getLogger("unit_scaling").setLevel(logging.WARNING)
    prepared = [
        preparation(cfg, kind, storage)
        for kind in cfg.models
        for storage in cfg.variants
        if storage in ("folded", "unit")
    ]
    rows = [row for kind in cfg.models for mode in cfg.modes for row in race(cfg, kind, mode)]

    console = Console()
    console.print(step_table(cfg, rows))
    for row in rows:
        if "error" in row:
            where = f"{row['variant']} can't run the model {row['model']} ({row['mode']})"
            console.print(f"{where}: {row['error']}", markup=False)
    if prepared:
        console.print(preparation_table(prepared))
    file = Path(HydraConfig.get().runtime.output_dir) / "benchmark.json"
    results = {
        "settings": OmegaConf.to_container(cfg, resolve=True),
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
        "steps": rows,
        "preparation": prepared,
    }
    file.write_text(json.dumps(results, indent=1))
    print(f"all numbers: {file}")


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that can't be measured."""
    for key, known in CHOICES.items():
        for name in cfg[key]:
            if name not in known:
                raise InputError(f"{key}: {name!r} is not known; choose from {', '.join(known)}")
    if "plain" not in cfg.variants:
        raise InputError("variants must contain plain, which the others are divided by")
    if cfg.clock not in CLOCKS:
        raise InputError(f"clock={cfg.clock} is not known; choose one of {', '.join(CLOCKS)}")
    for key in ("rounds", "preparations", "threads", "batch_size"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise InputError(f"{key}={cfg[key]} must be a positive whole number")


def step_table(cfg: DictConfig, rows: list[dict[str, Any]]) -> Table:
    """Median ratio with its quartiles, and median milliseconds."""
    table = Table(
        title=f"Time of a training step, {cfg.rounds} rounds: width {cfg.model.width}, depth {cfg.model.depth}, "
        f"{cfg.batch_size}x{cfg.task.sequence_length} tokens, {cfg.threads} thread(s), {cfg.clock} time"
    )
    for name in ("model", "mode", "variant"):
        table.add_column(name)
    for name in ("ms", "scaled / plain", "quartiles"):
        table.add_column(name, justify="right")
    for row in rows:
        names = [str(row[key]) for key in ("model", "mode", "variant")]
        if "error" in row:
            table.add_row(*names, "", "failed", "")
            continue
        low, middle, high = row["ratio"]
        table.add_row(*names, f"{1e3 * row['seconds'][1]:.1f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    return table


def preparation_table(prepared: list[dict[str, Any]]) -> Table:
    """How many plain steps a preparation takes."""
    table = Table(title="Time of preparation, in eager steps of the plain model")
    for name in ("model", "storage"):
        table.add_column(name)
    for name in ("median", "quartiles", "first in the process"):
        table.add_column(name, justify="right")
    for row in prepared:
        low, middle, high = row["steps"]
        table.add_row(row["model"], row["storage"], f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{row['first']:.2f}")
    return table


if __name__ == "__main__":
    main()
