"""Rehearsals of compiled modules, and of modules spread over processes."""

from typing import Any

import pytest
import torch
import torchmetrics
from pytorch_lightning.strategies import ModelParallelStrategy
from support.fresh_python import run_python
from support.rehearsed import BATCHES, WIDTH, Base, RandomNumbers, fit, same
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_unitscale.engine.record.rehearsal import rehearsal


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_module_is_neither_run_compiled_nor_compiled_again(whole):
    graphs: list[Any] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(Base):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), self.norm)
            self.kept = {"scale": 2.0}
            if not whole:
                self.net = torch.compile(self.net, backend=backend)

        def forward(self, x):
            return self.net(x) * self.kept["scale"]

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    def make():
        torch._dynamo.reset()
        graphs.clear()
        return torch.compile(Compiled(), backend=backend) if whole else Compiled()

    plain = fit(make, rehearse=False)
    compiled = len(graphs)
    assert compiled
    rehearsed = fit(make, rehearse=True)
    assert len(graphs) == compiled
    assert len(rehearsed.rehearse.rehearsed) == BATCHES
    same(plain.facts, rehearsed.facts)


class AcrossProcesses(RandomNumbers):
    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def loss(self, batch):
        loss = super().loss(batch)
        self.mean(loss)
        self.log("mean", self.mean, on_epoch=True)
        self.log("loss", loss, sync_dist=True)
        return loss + self.all_gather(loss.detach()).mean() * loss

    def on_train_end(self):
        if self.trainer.world_size > 1:
            assert torch.stack(list(self.all_gather(self.net.weight.detach()))).diff(dim=0).abs().sum() == 0


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes():
    # In a fresh interpreter: the fork of one in which other tests have left threads may wait for them for ever.
    run_python("-c", "from engine.record import test_rehearsal_compiled_and_spread as here; here.two_processes()")


def two_processes() -> None:
    torch.set_num_threads(1)
    options = {"strategy": "ddp_fork", "devices": 2}
    plain, rehearsed = (fit(AcrossProcesses, rehearse, **options) for rehearse in (False, True))
    same(plain.module.state_dict(), rehearsed.module.state_dict())
    same(plain.trainer.callback_metrics, rehearsed.trainer.callback_metrics)
    alone = fit(AcrossProcesses, rehearse=False)
    assert not torch.equal(alone.module.net.weight, plain.module.net.weight)


class Sharded(Base):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        with torch.no_grad():
            self.net.weight.mul_(0.9)
        return super().loss(batch)


def test_sharded_parameters():
    def run(rehearse):
        try:
            strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
            facts = fit(Sharded, rehearse, strategy=strategy).facts
            return [value.full_tensor() for value in facts["parameters"].values()]
        finally:
            torch.distributed.destroy_process_group()

    same(run(rehearse=False), run(rehearse=True))


def test_fsdp1_is_refused():
    module = nn.Sequential(nn.Linear(1, 1))
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    module.append(wrapped)
    with pytest.raises(NotImplementedError, match="FSDP2"), rehearsal(module):
        pass
