"""A model may be sharded or split before it is prepared, or afterwards."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_unitscale import scale_learning_rates, unit_scale

STORAGES = ("folded", "unit")


class Net(nn.Module):
    """One residual branch, as tensor parallelism splits it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


BATCH = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(32) % 8


def loss_of(module: nn.Module) -> Tensor:
    return F.cross_entropy(module(BATCH), CLASSES)


def split(module: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(module, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh)


Distribute = Callable[[nn.Module, DeviceMesh], None]


def losses(storage: str, distribute: Distribute | None, mesh: DeviceMesh) -> list[float]:
    module = Net()
    plan = unit_scale(module, loss_of, storage=storage)
    if distribute is not None:
        distribute(module, mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    scale_learning_rates(optimizer, plan)
    seen = []
    for _ in range(4):
        loss = loss_of(module)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("distribute", [split, shard])
def test_what_is_distributed_already_gets_the_plan_of_the_whole(
    mesh: DeviceMesh, distribute: Distribute, storage: str
) -> None:
    whole, module = Net(), Net()
    distribute(module, mesh)
    plans = [unit_scale(one, loss_of, storage=storage).to_dict() for one in (whole, module)]
    for name, parameter in plans[0]["parameters"].items():
        assert plans[1]["parameters"][name]["multiplier"] == pytest.approx(parameter["multiplier"], rel=1e-6)
    for parameter, other in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter, other)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("distribute", [split, shard])
def test_what_is_distributed_after_preparation_trains_as_a_whole(
    mesh: DeviceMesh, distribute: Distribute, storage: str
) -> None:
    assert losses(storage, distribute, mesh) == pytest.approx(losses(storage, None, mesh), rel=1e-5)


def _train_in_one_of_two(rank: int, store: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for storage in STORAGES:
        whole = losses(storage, None, mesh)
        for distribute in (split, shard):
            assert losses(storage, distribute, mesh) == pytest.approx(whole, rel=1e-5)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_in_one_of_two, (tmp_path / "store",), nprocs=2)
