"""What a step of a model spread over many processes sends, without unit scaling and with it.

Counted on one process: torch's fake process group has as many ranks as asked for, and sends nothing. What is sent does
not depend on widths, so the model is as deep as it is, and narrow. The numbers that it computes mean nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from lightning_unitscale.cookbook.spreading import spread
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
from lightning_unitscale.plain_torch import unit_scale

NARROW = {"head_width": 8, "intermediate": 256, "vocabulary": 256, "tokens": 16}
STEPS = 5  # of which the fastest counts


@dataclass(frozen=True)
class SpreadStep:
    """Of one step: forward, backward, optimizer.

    Attributes:
        collectives: how many, by kind.
        seconds: on this machine, nothing being sent.
        resident: numbers in weights that one process keeps.
    """

    collectives: Mapping[str, int]
    seconds: float
    resident: int

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.collectives.items())) or "none"


def spread_steps(
    config: Mapping[str, Any], data: int, tensor: int, scheme: str, storage: str
) -> tuple[SpreadStep, SpreadStep]:
    """Of the untouched model, and of the prepared one.

    Args:
        config: model_type, and arguments of the config class of transformers; its widths are made small.
        data, tensor: sizes of the mesh, for FSDP2 and for tensor parallelism.

    Raises:
        InputError: the model can't be split so.
    """
    with fake_mesh(data, tensor) as mesh:
        return _spread_step(config, mesh, None, storage), _spread_step(config, mesh, scheme, storage)


@contextmanager
def fake_mesh(data: int, tensor: int) -> Iterator[DeviceMesh]:
    """A mesh of so many processes of which this one is the first and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=data * tensor)
    try:
        yield init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        distributed.destroy_process_group()


def narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with all its layers, heads and experts, and small widths."""
    width = config["num_attention_heads"] * NARROW["head_width"]
    small = {"hidden_size": width, "intermediate_size": NARROW["intermediate"], "vocab_size": NARROW["vocabulary"]}
    return {**config, **small}


def _spread_step(config: Mapping[str, Any], mesh: DeviceMesh, scheme: str | None, storage: str) -> SpreadStep:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**narrow(config)))
    ids = torch.arange(NARROW["tokens"]).unsqueeze(0)

    def loss_of(module: nn.Module) -> torch.Tensor:
        loss: torch.Tensor = module(input_ids=ids, labels=ids).loss
        return loss

    # Before it is spread: what the fake group gathers are no numbers that a plan could be checked with.
    plan = unit_scale(model, loss_of, scheme=scheme, storage=storage, verify=False) if scheme else None
    spread(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    if plan is not None:
        scale_learning_rates(optimizer, plan, module=model)

    def step() -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # what is made once: optimizer states, FSDP2's buffers
    with CommDebugMode() as counted:
        step()
    kinds = Counter({str(kind).rpartition(".")[2]: count for kind, count in counted.get_comm_counts().items()})
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return SpreadStep(kinds, min(seconds), sum(part.numel() for part in parts))
