"""FP8 gathers of sharded weights: the same function, and one byte an element on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_unitscale import Plan, UnitScalingError, unit_scale
from lightning_unitscale.engine.checks.calibration import fall_back
from lightning_unitscale.engine.runtime.fp8_gather import _shards, gather_in_fp8

BATCH = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
CAST = ["up.weight", "down.weight"]


class Net(nn.Module):
    """Two matmuls that are cast, and one that a user leaves out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


def loss_of(module: nn.Module) -> Tensor:
    return module(BATCH).square().mean()


def prepared() -> tuple[nn.Module, Plan]:
    module = Net()
    return module, unit_scale(module, loss_of, format="fp8", overrides={"head*": {"format": None}})


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Starts a process group: "gloo" of one process, or "fake" of two, of which nothing arrives."""

    def start(backend: str) -> None:
        if backend == "fake":
            distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        else:
            distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    yield start
    distributed.destroy_process_group()


def trained(change: Callable[[nn.Module], Any]) -> tuple[list[float], Plan]:
    module, plan = prepared()
    change(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, plan


@pytest.mark.filterwarnings("ignore:unit scaling. this AdamW steps")
def test_the_function_is_the_same_to_the_bit(group: Callable[[str], None]) -> None:
    group("gloo")
    gathered: list[str] = []

    def sharded(module: nn.Module) -> None:
        fully_shard(module)
        gathered.extend(gather_in_fp8(module))

    assert trained(sharded)[0] == trained(fully_shard)[0]
    assert gathered == CAST


@pytest.mark.filterwarnings("ignore:unit scaling. this AdamW steps")
def test_it_may_begin_in_the_middle_of_training(group: Callable[[str], None]) -> None:
    """Of weights that were gathered as they are before; called twice it changes nothing."""
    group("gloo")

    def losses(begin: int) -> list[float]:
        module, _ = prepared()
        fully_shard(module, reshard_after_forward=False)
        optimizer, found = torch.optim.AdamW(module.parameters(), lr=1e-2), []
        for step in range(4):
            if step >= begin:
                assert gather_in_fp8(module) == CAST
            optimizer.zero_grad()
            loss = loss_of(module)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(begin=2) == losses(begin=9)


@pytest.mark.filterwarnings("ignore:unit scaling")
def test_a_site_that_falls_back_keeps_its_last_scale(group: Callable[[str], None]) -> None:
    group("gloo")
    module, plan = prepared()
    fully_shard(module)
    gather_in_fp8(module)
    before = loss_of(module).item()
    use = next(site.use for site in plan.cast_sites if site.params[0] == "up.weight")
    fall_back(module, plan, use, "for a test")
    assert loss_of(module).item() == pytest.approx(before, rel=0.05)
    assert gather_in_fp8(module) == CAST


def test_a_byte_an_element_is_sent_and_no_reduction_precedes_it(group: Callable[[str], None]) -> None:
    group("fake")
    module, _ = prepared()
    fully_shard(module)
    gather_in_fp8(module)
    with CommDebugMode() as calls:
        module(BATCH)
    assert calls.get_total_counts() == 1  # one gather of everything
    module.reshard()
    for name, shard in _shards(module).items():
        (sent,) = shard.all_gather_inputs
        assert sent.dtype == (torch.uint8 if name in CAST else torch.float32), name
        assert sent.numel() == module.get_parameter(name).numel() // 2, name


def test_what_was_not_prepared_or_sharded_is_refused() -> None:
    with pytest.raises(UnitScalingError, match="Net has no plan: prepare it"):
        gather_in_fp8(Net())
    with pytest.raises(UnitScalingError, match="Net is not sharded: call fully_shard first"):
        gather_in_fp8(prepared()[0])
