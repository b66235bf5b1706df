"""Modules in bf16, in FP8 with static scales and in that of others: forward and backward side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from lightning_unitscale import unit_scale
from lightning_unitscale.cookbook.measuring.forward_backward import ForwardBackward
from lightning_unitscale.cookbook.measuring.fp8_linear import InTransformerEngine, with_torchao
from lightning_unitscale.cookbook.measuring.side_by_side import ratios, time_side_by_side

HEAD_WIDTH = 128
EXPERTS = 8
VARIANTS = ("bf16", "static", "torchao-tensorwise", "torchao-rowwise", "transformer-engine")


@dataclass
class Row:
    """What was measured of one variant: milliseconds and MiB.

    Attributes:
        ratio: bf16's time over this one's.
        error: why the variant could not run.
    """

    case: str
    mode: str
    variant: str
    milliseconds: float | None = None
    ratio: float | None = None
    peak: float | None = None
    saved: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Case:
    """A module and its input, to be built anew for each variant.

    Attributes:
        name: as the table shows it.
        build: makes the module.
        shape: of the input.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def variant(self, name: str, mode: str) -> ForwardBackward:
        """The module as this variant, compiled or not, and its input."""
        torch.manual_seed(0)
        with torch.device(self.device):
            module = self.build().to(self.dtype)
            x = torch.randn(self.shape, dtype=self.dtype).requires_grad_()
        if name == "static":
            unit_scale(module, lambda m: _with_unit_gradient(m(x)), scheme="preserve", format="fp8")
        elif name.startswith("torchao-"):
            module = with_torchao(module, name.removeprefix("torchao-"), emulate=self.device.type != "cuda")
        elif name == "transformer-engine":
            module = InTransformerEngine(module)
        if mode == "compiled":
            return ForwardBackward(torch.compile(module, fullgraph=name in ("bf16", "static", "torchao-tensorwise")), x)
        return ForwardBackward(module, x)

    def allocated(self) -> int:
        """Bytes on the GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


class LlamaBlock(nn.Module):
    """One decoder layer of Llama, from embeddings to hidden states."""

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


class MoeBlock(nn.Module):
    """One decoder layer of Mixtral, two of eight experts a token, all experts' products in one grouped call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=width,
            intermediate_size=int(width * 3.5),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            num_key_value_heads=max(1, width // HEAD_WIDTH),
            num_hidden_layers=1,
            vocab_size=16,
            num_local_experts=EXPERTS,
        )
        config._experts_implementation = "grouped_mm"
        self.model = MixtralModel(config)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (1, tokens, width)."""
        hidden: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return hidden


def configured_cases(cfg: DictConfig) -> list[Case]:
    """The modules of the recipe `fp8_benchmark`: linear layers, then blocks of Llama and of experts."""
    place = torch.device(cfg.device), getattr(torch, cfg.dtype)
    linears = [
        Case(f"linear {n}x{i}x{o}", partial(nn.Linear, i, o, bias=False), (n, i), *place) for n, i, o in cfg.linears
    ]
    blocks = [("Llama", LlamaBlock, sizes) for sizes in cfg.blocks] + [("MoE", MoeBlock, sizes) for sizes in cfg.moe]
    return linears + [
        Case(f"{name} block {width}, {tokens} tokens", partial(block, width), (1, tokens, width), *place)
        for name, block, (width, tokens) in blocks
    ]


def compare_variants(case: Case, mode: str, cfg: DictConfig) -> list[Row]:
    """One row for each variant; a variant that can't run says why."""
    rows = {name: Row(case.name, mode, name) for name in cfg.variants}
    steps: dict[str, ForwardBackward] = {}
    for name, row in rows.items():
        before = case.allocated()
        try:
            steps[name] = case.variant(name, mode)
            for _ in range(2):
                steps[name].run()
            row.peak, row.saved = steps[name].peak(before), steps[name].saved()
        except Exception as error:
            steps.pop(name, None)
            row.error = f"{type(error).__name__}: {error}".partition("\n")[0][:100]
    clocks = {name: step.milliseconds for name, step in steps.items()}
    times = time_side_by_side(clocks, cfg.rounds, cfg.warm_up)
    for name, of_variant in times.items():
        rows[name].milliseconds = median(of_variant)
        if "bf16" in times:
            rows[name].ratio = median(ratios(times["bf16"], of_variant))
    torch._dynamo.reset()
    return list(rows.values())


def _with_unit_gradient(y: Tensor) -> Tensor:
    """A loss whose gradient has a norm of about 1, as that of `ForwardBackward.run`."""
    loss: Tensor = (y.float() * torch.randn_like(y) / y.numel() ** 0.5).sum()
    return loss
