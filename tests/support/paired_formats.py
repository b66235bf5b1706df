"""What a format costs in loss, from many small runs in pairs: `PYTHONPATH=tests python -m support.paired_formats`.

Two runs of one seed that differ by a rounding drift apart as training goes on, so a small cost shows in the mean of
many pairs alone. Here `models` Llama-like models are trained side by side, in one batched product for each layer; no
model sees another's numbers but for the static scales of casts, which they share. A pair begins with the same weights
and sees the same examples, with a format and without.

    python -m support.paired_formats job models steps formats seed [width]    # language 16 300 fp8,fp8-head,x+o+down 2

A format may be one of `OPERANDS_ALONE` or `DYNAMIC`. `-down` leaves out the layers of that name, `+down` all others.
bf16, which costs next to nothing, shows how far two runs drift apart by themselves. For each format is printed, less
the loss without: with the casts; of the same weights without them, which is what came about in training; and of the
weights trained without a format, with the casts.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import Plan, formats, options, recalibrating, scale_learning_rates, unit_scale
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
    """

    by_rows: bool = False

    def rounded(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """As the base class says."""
        largest, dims = torch.finfo(self.dtype).max, dim if self.by_rows else (-2, -1)
        amax = tensor.abs().amax(dims, keepdim=True).clamp(min=1e-12)
        scale = torch.exp2((largest / amax).log2().floor())
        return (tensor * scale).clamp(-largest, largest).to(self.dtype).to(tensor.dtype) / scale

    def _round(self, blocks: Tensor) -> Tensor:
        raise NotImplementedError("there are none")


def dynamic(dtype: torch.dtype, by_rows: bool = False) -> Dynamic:
    """One with the range of float32."""
    info = torch.finfo(torch.float32)
    return Dynamic(0, info.max, info.smallest_normal, info.smallest_normal, dtype, by_rows)


_ROWS = dynamic(_E4M3, by_rows=True)
DYNAMIC = {  # the first two as torchao's recipes "tensorwise" and "rowwise"
    "dynamic": (dynamic(_E4M3), dynamic(_E4M3), dynamic(_E5M2)),
    "rowwise": (_ROWS, _ROWS, _ROWS),
    "x_dynamic": (dynamic(_E4M3), _NONE, _NONE),
    "x_rowwise": (_ROWS, _NONE, _NONE),
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


@dataclass(frozen=True)
class Found:
    """Held-out losses of each model, as trained and without its casts.

    Attributes:
        parameters: that they were trained to.
        of_others: losses with the casts, of other parameters; as `losses` without any.
        worst: of each layer and operand cast, in measured steps: its largest error relative to its RMS, and the largest
            shares of it flushed and saturated.
        left: how many sites fell back to the compute dtype.
    """

    losses: Tensor
    without_casts: Tensor
    parameters: list[Tensor]
    of_others: Tensor
    worst: dict[str, tuple[float, float, float]]
    left: int


def trained(
    job: Job, models: int, steps: int, name: str | None, seed: int, others: list[Tensor] | None = None
) -> Found:
    """The losses of each model after training; Adam, a rate that rises over a tenth and falls to 0.

    Args:
        others: parameters to look at with the same casts.
    """
    torch.manual_seed(seed)
    module, generator = job.build(models), torch.Generator().manual_seed(seed)

    def batch() -> list[Tensor]:
        return [rows[torch.randint(len(rows), (models, ROWS), generator=generator)] for rows in job.train]

    first = batch()
    format, overrides = changes(name)
    plan = unit_scale(module, lambda m: job.losses(m, *first).mean(), format=format, overrides=overrides)
    asked, worst = len(plan.cast_sites), dict[str, tuple[float, float, float]]()
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    scale_learning_rates(optimizer, plan)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE / job.width * min(10 * step / steps, 1) * (1 - (step - 1) / steps)
        job.reach(step / steps)
        with recalibrating(plan, step):
            optimizer.zero_grad()
            job.losses(module, *batch()).mean().backward()
        optimizer.step()
        look_at_casts(plan, worst)
    return found(job, module, models, others, worst, asked - len(plan.cast_sites))


def look_at_casts(plan: Plan, worst: dict[str, tuple[float, float, float]]) -> None:
    """Keep the worst of each layer and operand, as `Found.worst`."""
    for site in plan.cast_sites:
        layer = site.params[0].names[0].split(".")[-2]
        for operand, seen in site.measured.items():
            key, now = f"{layer}.{operand}", (seen["error"], seen["flushed"], seen["saturated"])
            worst[key] = tuple(map(max, worst.get(key, now), now))  # type: ignore[assignment]  # of three


def found(
    job: Job,
    module: nn.Module,
    models: int,
    others: list[Tensor] | None,
    worst: dict[str, tuple[float, float, float]],
    left: int,
) -> Found:
    """Of trained models, whose casts it takes out."""
    parameters = [parameter.detach().clone() for parameter in module.parameters()]
    losses = held_out(job, module, models)
    exchange(module, others or parameters)
    of_others = held_out(job, module, models)
    exchange(module, parameters)
    for site in casts_in_force(module).values():
        site.scales = None
    return Found(losses, held_out(job, module, models), parameters, of_others, worst, left)


@torch.no_grad()
def exchange(module: nn.Module, values: list[Tensor]) -> None:
    """Give a module other parameters."""
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(value)


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
        found = trained(job, models, steps, name, seed, plain.parameters)
        print(
            f"{name}: {shown(found.losses - plain.losses)}; casts off {shown(found.without_casts - plain.losses)}, "
            f"the casts {shown(found.losses - found.without_casts)}, "
            f"of the weights trained without {shown(found.of_others - plain.losses)}; "
            f"{found.left} sites left out on the way; at worst (off, flushed, saturated) "
            + ", ".join(f"{key} {off:.2%} {low:.2%} {high:.4%}" for key, (off, low, high) in found.worst.items()),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:4]), sys.argv[4].split(","), *map(int, sys.argv[5:7]))
