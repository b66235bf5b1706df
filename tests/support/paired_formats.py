"""What a format costs in loss, from many small runs in pairs: `PYTHONPATH=tests python -m support.paired_formats`.

Two runs of one seed that differ by a rounding drift apart as training goes on, so a small cost shows in the mean of
many pairs alone. Here `models` Llama-like models are trained side by side, in one batched product for each layer; no
model sees another's numbers but for the static scales of casts, which they share. A pair begins with the same weights
and sees the same examples, with a format and without.

    python -m support.paired_formats job models steps formats seed [width]    # language 16 300 fp8,fp8-head,x+o+down 2

A format may be one of `OPERANDS_ALONE` or `DYNAMIC`. `-down` leaves out the layers of that name, `+down` all others.
`after:fp8` casts what was trained without. bf16, which costs next to nothing, shows how far two runs drift apart by
themselves. For each two losses are printed, less that without a format: with the casts, and of the same weights without
them, which is what came about in training.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import formats, options, recalibrating, scale_learning_rates, unit_scale
from lightning_unitscale.block_formats import BlockNumbers
from lightning_unitscale.cookbook.jobs.pictures import digit_images
from lightning_unitscale.cookbook.jobs.text import text_crops
from lightning_unitscale.engine.checks.verify_casts import LOW_COSINE
from lightning_unitscale.engine.runtime.install import casts_in_force

WIDTH, DEPTH, HEADS, ROWS, BYTES, HELD_OUT = 32, 2, 2, 8, 256, 256
RATE = 4e-3 * WIDTH  # over the width
LAYERS = ("q", "k", "v", "o", "gate", "up", "down", "head")
_E4M3, _E5M2, _NONE = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32
OPERANDS_ALONE = {
    "forward": (_E4M3, _E4M3, _NONE),
    "x": (_E4M3, _NONE, _NONE),
    "weight": (_NONE, _E4M3, _NONE),
    "gradient": (_NONE, _NONE, _E5M2),
}


@dataclass(frozen=True)
class Dynamic(BlockNumbers):
    """Numbers whose scale is found anew in every cast: the power of two that lets the largest one fit, as torchao's.

    Attributes:
        by_rows: whether each row, along what a product sums over, has its own; else each model's whole tensor.
        summing: over which dimension products are made of rounded numbers; None for all, -1 is the forward pass.
    """

    by_rows: bool = False
    summing: int | None = None

    def rounded(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """As the base class says."""
        if self.summing not in (None, dim):
            return tensor
        largest, dims = torch.finfo(self.dtype).max, dim if self.by_rows else (-2, -1)
        amax = tensor.abs().amax(dims, keepdim=True).clamp(min=1e-12)
        scale = torch.exp2((largest / amax).log2().floor())
        return (tensor * scale).clamp(-largest, largest).to(self.dtype).to(tensor.dtype) / scale

    def _round(self, blocks: Tensor) -> Tensor:
        raise NotImplementedError("scales are of rows or whole tensors here, not of blocks")


def dynamic(dtype: torch.dtype, by_rows: bool = False, summing: int | None = None) -> Dynamic:
    """One with the range of float32."""
    info = torch.finfo(torch.float32)
    return Dynamic(0, info.max, info.smallest_normal, info.smallest_normal, dtype, by_rows, summing)


_ROWS = dynamic(_E4M3, by_rows=True)
DYNAMIC = {  # the first two as torchao's recipes "tensorwise" and "rowwise"
    "dynamic": (dynamic(_E4M3), dynamic(_E4M3), dynamic(_E5M2)),
    "rowwise": (_ROWS, _ROWS, _ROWS),
    "x_dynamic": (dynamic(_E4M3), _NONE, _NONE),
    "x_rowwise": (_ROWS, _NONE, _NONE),
    "x_in_forward": (dynamic(_E4M3, summing=-1), _NONE, _NONE),
    "x_in_backward": (dynamic(_E4M3, summing=-2), _NONE, _NONE),
}


class Layer(nn.Module):
    """A linear layer of each model."""

    def __init__(self, models: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(models, inputs, outputs) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Block(nn.Module):
    def __init__(self, models: int, width: int, length: int, is_causal: bool) -> None:
        super().__init__()
        self.width, self.length, self.is_causal = width, length, is_causal
        self.q, self.k, self.v, self.o = (Layer(models, width, width) for _ in range(4))
        self.gate, self.up = (Layer(models, width, 3 * width) for _ in range(2))
        self.down = Layer(models, 3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (self.width,))
        q, k, v = (
            layer(h).view(-1, self.length, HEADS, self.width // HEADS).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        h = F.rms_norm(x, (self.width,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Models(nn.Module):
    """What the jobs' models share, from vectors (models, rows · length, width) to outputs of the head."""

    def __init__(self, models: int, width: int, length: int, outputs: int, is_causal: bool) -> None:
        super().__init__()
        self.width = width
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(models, width, length, is_causal) for _ in range(DEPTH))
        self.head = Layer(models, width, outputs)

    def outputs(self, x: Tensor) -> Tensor:
        x = (x.view(len(x), -1, *self.position.shape) + self.position).view(len(x), -1, self.width)
        for block in self.blocks:
            x = block(x)
        return self.head(F.rms_norm(x, (self.width,)))


class Language(Models):
    length = 32

    def __init__(self, models: int, width: int) -> None:
        embedding = nn.Embedding(models * BYTES, width)
        nn.init.normal_(embedding.weight, std=0.02)
        super().__init__(models, width, self.length, BYTES, is_causal=True)
        self.embedding = embedding

    def forward(self, text: Tensor) -> Tensor:
        """text: (models, rows, length); result: logits (models, rows · length, bytes)."""
        models = len(text)
        rows = self.embedding(text + BYTES * torch.arange(models)[:, None, None])
        return self.outputs(rows.view(models, -1, self.width))


class Denoiser(Models):
    """Patches of noisy digits."""

    def __init__(self, models: int, width: int) -> None:
        super().__init__(models, width, 16, 4, is_causal=False)
        self.patches = Layer(models, 4, width)

    def forward(self, noisy: Tensor) -> Tensor:
        """noisy and result: (models, rows, 16, 4)."""
        return self.outputs(self.patches(noisy.flatten(1, 2))).view(noisy.shape)


class Job(ABC):
    """Examples, and what is learnt from them.

    Attributes:
        width: of the models.
        train: tensors whose rows are drawn at random, for each model and of each tensor its own.
        kept: tensors of `HELD_OUT` rows.
    """

    train: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width

    @abstractmethod
    def build(self, models: int) -> nn.Module:
        """The models."""

    @abstractmethod
    def losses(self, module: nn.Module, *batch: Tensor) -> Tensor:
        """Of each model."""

    def reach(self, share: float) -> None:  # noqa: B027  # most jobs stay as they are
        """Become what the job is after this share of all steps."""


class LanguageJob(Job):
    """Bytes of CPython's documentation; nats per byte."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        crops = text_crops(Language.length + 1)
        self.train, self.kept = (crops[:-HELD_OUT],), (crops[-HELD_OUT:],)

    def build(self, models: int) -> nn.Module:
        return Language(models, self.width)

    def losses(self, module: nn.Module, *batch: Tensor) -> Tensor:
        (crops,) = batch
        logits = module(crops[..., :-1])
        each = F.cross_entropy(logits.flatten(0, 1), crops[..., 1:].reshape(-1), reduction="none")
        return each.view(len(crops), -1).mean(1)


class DenoisingJob(Job):
    """Digits of RMS 1 and noise of RMS 1; the mean square error of the digits."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        patches = F.unfold(digit_images()[0], 2, stride=2).mT  # (images, 16, 4)
        clean = (patches - patches.mean()) / patches.std()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        self.train, self.kept = (clean[:-HELD_OUT], noise[:-HELD_OUT]), (clean[-HELD_OUT:], noise[-HELD_OUT:])

    def build(self, models: int) -> nn.Module:
        return Denoiser(models, self.width)

    def losses(self, module: nn.Module, *batch: Tensor) -> Tensor:
        clean, noise = batch
        return (module(clean + noise) - clean).square().flatten(1).mean(1)


class GrowingJob(LanguageJob):
    """The language job, in whose blocks the first channel of what norms put out grows by 2^6 as training goes on."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.gain = torch.ones(width)

    def build(self, models: int) -> nn.Module:
        module = super().build(models)
        self.reach(0.0)
        for name, layer in module.named_modules():
            if name.endswith((".q", ".k", ".v", ".gate", ".up")):
                layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * self.gain,))
        return module

    def reach(self, share: float) -> None:
        self.gain[0] = 2.0 ** (6 * share)


JOBS: dict[str, type[Job]] = {"language": LanguageJob, "denoising": DenoisingJob, "growing": GrowingJob}


Worst = dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Found:
    """Held-out losses of each model, as trained and without its casts.

    Attributes:
        parameters: that they were trained to.
        worst: of each layer and operand cast, in measured steps: its largest error relative to its RMS, and the largest
            shares of it flushed and saturated.
        left: how many sites fell back to the compute dtype.
    """

    losses: Tensor
    without_casts: Tensor
    parameters: list[Tensor]
    worst: Worst
    left: int


class Run:
    """Models under a plan, and the examples that they see.

    Args:
        name: of a format and its layers; None for no format.
    """

    def __init__(self, job: Job, models: int, name: str | None, seed: int) -> None:
        torch.manual_seed(seed)
        self.job, self.models, self.generator = job, models, torch.Generator().manual_seed(seed)
        self.module, first, (format, overrides) = job.build(models), self.batch(), changes(name)
        self.plan = unit_scale(self.module, lambda m: job.losses(m, *first).mean(), format=format, overrides=overrides)
        self.asked = len(self.plan.cast_sites)

    def batch(self) -> list[Tensor]:
        """The next examples."""
        size = self.models, ROWS
        return [rows[torch.randint(len(rows), size, generator=self.generator)] for rows in self.job.train]

    def backward(self, step: int) -> None:
        """Casts are measured in some of the steps."""
        with recalibrating(self.plan, step):
            self.module.zero_grad()
            self.job.losses(self.module, *self.batch()).mean().backward()

    def look_at_casts(self, worst: Worst) -> None:
        """Keep the worst of each layer and operand, as `Found.worst`."""
        for site in self.plan.cast_sites:
            layer = site.params[0].names[0].split(".")[-2]
            for operand, seen in site.measured.items():
                key, now = f"{layer}.{operand}", (seen["error"], seen["flushed"], seen["saturated"])
                was = worst.get(key, now)
                worst[key] = (max(was[0], now[0]), max(was[1], now[1]), max(was[2], now[2]))

    def found(self, worst: Worst) -> Found:
        """Takes the casts out."""
        parameters = [parameter.detach().clone() for parameter in self.module.parameters()]
        losses, left = held_out(self.job, self.module, self.models), self.asked - len(self.plan.cast_sites)
        for site in casts_in_force(self.module).values():
            site.scales = None
        return Found(losses, held_out(self.job, self.module, self.models), parameters, worst, left)


def trained(job: Job, models: int, steps: int, name: str | None, seed: int) -> Found:
    """The losses of each model after training; Adam, a rate that rises over a tenth and falls to 0."""
    run, worst = Run(job, models, name, seed), Worst()
    optimizer = torch.optim.AdamW(run.module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    scale_learning_rates(optimizer, run.plan)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE / job.width * min(10 * step / steps, 1) * (1 - (step - 1) / steps)
        job.reach(step / steps)
        run.backward(step)
        optimizer.step()
        run.look_at_casts(worst)
    return run.found(worst)


def cast_afterwards(job: Job, models: int, name: str, seed: int, parameters: list[Tensor]) -> Found:
    """The losses with the casts, measured on one batch, of models that were trained without."""
    run, worst = Run(job, models, name, seed), Worst()
    with torch.no_grad():
        for parameter, value in zip(run.module.parameters(), parameters, strict=True):
            parameter.copy_(value)
    run.backward(1)
    run.look_at_casts(worst)
    return run.found(worst)


@torch.no_grad()
def held_out(job: Job, module: nn.Module, models: int) -> Tensor:
    """The losses of each model on the examples that are kept."""
    pieces = zip(*(rows.split(ROWS) for rows in job.kept), strict=True)
    return torch.stack([
        job.losses(module, *(rows.expand(models, *rows.shape) for rows in piece)) for piece in pieces
    ]).mean(0)  # fmt: skip


def changes(name: str | None) -> tuple[str | None, dict[str, dict[str, None]]]:
    """ "fp8-head-down" or "x+down" as a format and overrides."""
    format, *left_out = (name or "").split("-")
    format, *alone = format.split("+")
    if alone:
        left_out = [layer for layer in LAYERS if layer not in alone]
    return format or None, {f"*{layer}.weight": {"format": None} for layer in left_out}


def main(job_name: str, models: int, steps: int, names: list[str], seed: int, width: int = WIDTH) -> None:
    added = OPERANDS_ALONE | DYNAMIC
    for name, numbers in added.items():
        formats.FORMATS[name], LOW_COSINE[name] = formats.Format(name, *numbers), 0.9
    options.FORMAT_NAMES = (*options.FORMAT_NAMES, *added)
    job = JOBS[job_name](width)
    plain = trained(job, models, steps, None, seed)
    mean = plain.losses.mean()
    print(f"{job_name}, no format: {mean:.4f}, {models} models of {width}, {steps} steps, seed {seed}", flush=True)

    def shown(more: Tensor) -> str:
        return f"{more.mean() / mean:+.3%} ± {more.std() / sqrt(models) / mean:.3%}"

    for name in names:
        after, format = "after:" in name, name.removeprefix("after:")
        found = (
            cast_afterwards(job, models, format, seed, plain.parameters)
            if after
            else trained(job, models, steps, format, seed)
        )
        print(
            f"{name}: {shown(found.losses - plain.losses)}; casts off {shown(found.without_casts - plain.losses)}, "
            f"the casts {shown(found.losses - found.without_casts)}; {found.left} sites left out on the way; "
            + "at worst (off, flushed, saturated) "
            + ", ".join(f"{key} {off:.2%} {low:.2%} {high:.4%}" for key, (off, low, high) in found.worst.items()),
            flush=True,
        )


if __name__ == "__main__":
    job, models, steps, names, *seed_and_width = sys.argv[1:]
    main(job, int(models), int(steps), names.split(","), *map(int, seed_and_width))
