"""What a format costs in loss, from many small runs in pairs: `PYTHONPATH=tests python -m support.paired_formats`.

Two runs of one seed that differ by a rounding drift apart as training goes on, so a small cost shows in the mean of
many pairs alone. Here `models` Llama-like models of width 32 are trained side by side, in one batched product for each
layer; no model sees another's numbers but for the scales of casts, which they share. A pair begins with the same
weights and sees the same examples, with a format and without.

    python -m support.paired_formats job models steps formats seed        # language 16 300 fp8,fp8-head,x-o-down 2

A format may be one of `OPERANDS_ALONE`. `-down` leaves out the layers of that name. For each
two losses are printed, less that without a format: with the casts, and of the same weights without them, which is what
came about in training.
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
from lightning_unitscale.cookbook.jobs.pictures import digit_images
from lightning_unitscale.cookbook.jobs.text import text_crops
from lightning_unitscale.engine.checks.verify_casts import LOW_COSINE
from lightning_unitscale.engine.runtime.install import casts_in_force

WIDTH, DEPTH, HEADS, ROWS, BYTES, HELD_OUT, RATE = 32, 2, 2, 8, 256, 256, 4e-3
_E4M3, _E5M2, _NONE = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32
OPERANDS_ALONE = {
    "forward": (_E4M3, _E4M3, _NONE),
    "x": (_E4M3, _NONE, _NONE),
    "weight": (_NONE, _E4M3, _NONE),
    "gradient": (_NONE, _NONE, _E5M2),
}


class Layer(nn.Module):
    """A linear layer of each model."""

    def __init__(self, models: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(models, inputs, outputs) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Block(nn.Module):
    def __init__(self, models: int, length: int, is_causal: bool) -> None:
        super().__init__()
        self.length, self.is_causal = length, is_causal
        self.q, self.k, self.v, self.o = (Layer(models, WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = (Layer(models, WIDTH, 3 * WIDTH) for _ in range(2))
        self.down = Layer(models, 3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (WIDTH,))
        q, k, v = (
            layer(h).view(-1, self.length, HEADS, WIDTH // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        h = F.rms_norm(x, (WIDTH,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Models(nn.Module):
    """What the jobs' models share, from vectors (models, rows · length, width) to outputs of the head."""

    def __init__(self, models: int, length: int, outputs: int, is_causal: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(length, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(models, length, is_causal) for _ in range(DEPTH))
        self.head = Layer(models, WIDTH, outputs)

    def outputs(self, x: Tensor) -> Tensor:
        x = (x.view(len(x), -1, *self.position.shape) + self.position).view(len(x), -1, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.head(F.rms_norm(x, (WIDTH,)))


class Language(Models):
    length = 32

    def __init__(self, models: int) -> None:
        embedding = nn.Embedding(models * BYTES, WIDTH)
        nn.init.normal_(embedding.weight, std=0.02)
        super().__init__(models, self.length, BYTES, is_causal=True)
        self.embedding = embedding

    def forward(self, text: Tensor) -> Tensor:
        """text: (models, rows, length); result: logits (models, rows · length, bytes)."""
        models = len(text)
        return self.outputs(self.embedding(text + BYTES * torch.arange(models)[:, None, None]).view(models, -1, WIDTH))


class Denoiser(Models):
    """Patches of noisy digits."""

    def __init__(self, models: int) -> None:
        super().__init__(models, 16, 4, is_causal=False)
        self.patches = Layer(models, 4, WIDTH)

    def forward(self, noisy: Tensor) -> Tensor:
        """noisy and result: (models, rows, 16, 4)."""
        return self.outputs(self.patches(noisy.flatten(1, 2))).view(noisy.shape)


class Job(ABC):
    """Examples, and what is learnt from them.

    Attributes:
        train: tensors whose rows are drawn at random, for each model and of each tensor its own.
        kept: tensors of `HELD_OUT` rows.
    """

    train: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

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

    def __init__(self) -> None:
        crops = text_crops(Language.length + 1)
        self.train, self.kept = (crops[:-HELD_OUT],), (crops[-HELD_OUT:],)

    def build(self, models: int) -> nn.Module:
        return Language(models)

    def losses(self, module: nn.Module, *batch: Tensor) -> Tensor:
        (crops,) = batch
        logits = module(crops[..., :-1])
        each = F.cross_entropy(logits.flatten(0, 1), crops[..., 1:].reshape(-1), reduction="none")
        return each.view(len(crops), -1).mean(1)


class DenoisingJob(Job):
    """Digits of RMS 1 and noise of RMS 1; the mean square error of the digits."""

    def __init__(self) -> None:
        patches = F.unfold(digit_images()[0], 2, stride=2).mT  # (images, 16, 4)
        clean = (patches - patches.mean()) / patches.std()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        self.train, self.kept = (clean[:-HELD_OUT], noise[:-HELD_OUT]), (clean[-HELD_OUT:], noise[-HELD_OUT:])

    def build(self, models: int) -> nn.Module:
        return Denoiser(models)

    def losses(self, module: nn.Module, *batch: Tensor) -> Tensor:
        clean, noise = batch
        return (module(clean + noise) - clean).square().flatten(1).mean(1)


class GrowingJob(LanguageJob):
    """The language job, in whose blocks the first channel of what norms put out grows by 2^6 as training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.ones(WIDTH)

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
        worst: the largest error of a cast operand in a measured step, relative to its RMS.
        left: how many sites fell back to the compute dtype.
    """

    losses: Tensor
    without_casts: Tensor
    worst: float
    left: int


def trained(job: Job, models: int, steps: int, name: str | None, seed: int) -> Found:
    """The losses of each model after training; Adam, a rate that rises over a tenth and falls to 0."""
    torch.manual_seed(seed)
    module, generator = job.build(models), torch.Generator().manual_seed(seed)

    def batch() -> list[Tensor]:
        return [rows[torch.randint(len(rows), (models, ROWS), generator=generator)] for rows in job.train]

    first = batch()
    format, overrides = changes(name)
    plan = unit_scale(module, lambda m: job.losses(m, *first).mean(), format=format, overrides=overrides)
    asked, worst = len(plan.cast_sites), 0.0
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    scale_learning_rates(optimizer, plan)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(10 * step / steps, 1) * (1 - (step - 1) / steps)
        job.reach(step / steps)
        with recalibrating(plan, step):
            optimizer.zero_grad()
            job.losses(module, *batch()).mean().backward()
        optimizer.step()
        worst = max([worst, *(seen["error"] for site in plan.cast_sites for seen in site.measured.values())])
    losses = held_out(job, module, models)
    for site in casts_in_force(module).values():
        site.scales = None
    return Found(losses, held_out(job, module, models), worst, asked - len(plan.cast_sites))


@torch.no_grad()
def held_out(job: Job, module: nn.Module, models: int) -> Tensor:
    """The losses of each model on the examples that are kept."""
    pieces = zip(*(rows.split(ROWS) for rows in job.kept), strict=True)
    return torch.stack([
        job.losses(module, *(rows.expand(models, *rows.shape) for rows in piece)) for piece in pieces
    ]).mean(0)  # fmt: skip


def changes(name: str | None) -> tuple[str | None, dict[str, dict[str, None]]]:
    """ "fp8-head-down" as a format and overrides."""
    format, *left_out = (name or "").split("-")
    return format or None, {f"*{layer}.weight": {"format": None} for layer in left_out}


def main(job_name: str, models: int, steps: int, names: list[str], seed: int) -> None:
    for name, numbers in OPERANDS_ALONE.items():
        formats.FORMATS[name], LOW_COSINE[name] = formats.Format(name, *numbers), 0.9
    options.FORMAT_NAMES = (*options.FORMAT_NAMES, *OPERANDS_ALONE)
    job = JOBS[job_name]()
    plain = trained(job, models, steps, None, seed).losses
    print(f"{job_name}, no format: {plain.mean():.4f}, {models} models, {steps} steps, seed {seed}", flush=True)

    def shown(more: Tensor) -> str:
        return f"{more.mean() / plain.mean():+.3%} ± {more.std() / sqrt(models) / plain.mean():.3%}"

    for name in names:
        found = trained(job, models, steps, name, seed)
        print(
            f"{name}: {shown(found.losses - plain)}; casts off {shown(found.without_casts - plain)}, "
            f"the casts {shown(found.losses - found.without_casts)}; "
            f"operands off by {found.worst:.1%} at most, {found.left} sites left out on the way",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(","), int(sys.argv[5]))
