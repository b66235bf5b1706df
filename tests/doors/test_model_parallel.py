"""`fully_shard`, tensor parallelism and both train what one process does on the same global batches, in float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from support.by_day import by_night
from support.processes import run
from support.training import Wrapped, trainer
from support.zoo import default_dtype
from support.zoo_batches import Batch, next_token_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_unitscale import ScaleMonitor, UnitScaling, UnitScalingError
from lightning_unitscale.checkpoint import plan_in, read_checkpoint
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.monitor.snapshot import Snapshot
from lightning_unitscale.strategy import UnitScalingModelParallelStrategy

ROWS, STEPS, HALF = 8, 6, 3


def global_batch(step: int) -> Batch:
    parts = [next_token_batch(1000 * step + part) for part in range(ROWS // 4)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Replicated(ParallelStyle):
    """A layer that is not split, its weights DTensors all the same: what a norm over all gradients asks for."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def spread(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return tuple(DTensor.from_local(value, mesh, [Replicate()], run_check=False) for value in inputs)

        def local(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local(grad_placements=[Replicate()])

        return distribute_module(module, device_mesh, None, spread, local)


SPLIT = {
    "block.mlp.0": ColwiseParallel(),
    "block.mlp.2": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
NOT_SPLIT = (
    "embedding",
    "norm",
    *(f"block.{n}" for n in ("norm1", "norm2", *(f"attention.{p}" for p in ("q", "k", "v", "out")))),
)


class Spread(Wrapped):
    """Sharded and split over whatever processes the strategy has; each data-parallel rank takes its rows."""

    all_dtensors = False  # also the weights that are not split

    def configure_model(self) -> None:
        super().configure_model()
        mesh = getattr(self, "device_mesh", None)
        if mesh is None:
            return  # one process
        if mesh["tensor_parallel"].size() > 1:
            others = {name: Replicated() for name in NOT_SPLIT} if self.all_dtensors else {}
            parallelize_module(self, mesh["tensor_parallel"], {**SPLIT, **others})
        if mesh["data_parallel"].size() > 1:
            for part in (self.embedding, self.block, self.norm, self.head):
                fully_shard(part, mesh=mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        mesh = getattr(self, "device_mesh", None)
        data = None if mesh is None else mesh["data_parallel"]
        rows = slice(0, None) if data is None else slice(data.get_local_rank(), None, data.size())
        loss = self.loss({name: value[rows] for name, value in batch.items()})
        self.log("train_loss", loss, sync_dist=True)
        self.losses.append(float(loss.detach()))
        return loss


def whole(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()


def train(
    folder: Path,
    strategy: Any = "auto",
    world: int = 1,
    *callbacks: Any,
    steps: int = STEPS,
    resume: Path | None = None,
    save: Path | None = None,
    dtype: torch.dtype = torch.float64,
    pieces: int = 1,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    compiled: bool = False,
    all_dtensors: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`steps` steps on the global batches; what one process saw of it, with whole weights."""
    with default_dtype(dtype):
        torch.manual_seed(0)
        module = Spread(batch_norm=False, optimizer=optimizer, lr=1e-2)
        module.checkpointing, module.compiled, module.all_dtensors = checkpointing, compiled, all_dtensors
        begun = HALF if resume else 0  # a resumed epoch begins its loader anew
        data = [
            {name: value.chunk(pieces)[piece] for name, value in global_batch(step).items()}
            for step in [*range(begun, STEPS), *range(begun)]
            for piece in range(pieces)
        ]
        loop = trainer(
            folder,
            *callbacks,
            strategy=strategy,
            devices=world,
            use_distributed_sampler=False,
            max_steps=steps,
            accumulate_grad_batches=pieces,
            **options,
        )
        loop.fit(module, DataLoader(data, batch_size=None), ckpt_path=resume)
        if save is not None:
            loop.save_checkpoint(save)
        plan = plan_of(module)
        assert plan is not None
        weights = {name: whole(parameter) for name, parameter in module.named_parameters()}
        return {"losses": module.losses, "weights": weights, "plan": plan.to_dict()}


def mesh_of(name: str, world: int) -> dict[str, int]:
    data = {"fsdp": world, "tp": 1, "both": world // 2}[name]
    return {"data_parallel_size": data, "tensor_parallel_size": world // data}


CASES: dict[str, dict[str, Any]] = {
    "folded": {},
    "unit": {"storage": "unit"},
    "preserve": {"scheme": "preserve"},
    "amax": {"scheme": "amax", "storage": "unit"},  # divides gradients, also those that are nothing but rounding
    "bf16": {"format": "bf16"},
    "fp8-unit": {"format": "fp8", "storage": "unit"},
}
HABITS: dict[str, dict[str, Any]] = {  # of the training around it
    "plain": {},
    "sgd": {"optimizer": "sgd"},
    "clipped": {"pieces": 2, "gradient_clip_val": 0.05, "all_dtensors": True},
    "checkpointed": {"checkpointing": True},
    "compiled": {"compiled": True},
}


def in_each_process(folder: str, how: str, world: str, runs: str) -> None:
    """One run after the other, as "case/habit"."""
    count, rank = int(world), os.environ["LOCAL_RANK"]
    for name in runs.split(","):
        case, habit = name.split("/")
        strategy = ModelParallelStrategy(**mesh_of(how, count))
        result = train(Path(folder), strategy, count, UnitScaling(**CASES[case]), **HABITS[habit])
        torch.save(result, Path(folder, f"{case}-{habit}-{rank}.pt"))
    torch.distributed.destroy_process_group()


def save_and_resume(folder: str, how: str, world: str, stage: str) -> None:
    """Half of the steps, saved in both ways; then, perhaps in other numbers, the rest from either."""
    place, count, rank = Path(folder), int(world), os.environ["LOCAL_RANK"]
    for storage in ("folded", "unit"):
        for distributed in (True, False):
            kind = f"{storage}-{'parts' if distributed else 'whole'}"
            path = place / f"{kind}.ckpt"
            strategy = UnitScalingModelParallelStrategy(
                storage=storage, save_distributed_checkpoint=distributed, **mesh_of(how, count)
            )
            if stage == "save":
                train(place, strategy, count, steps=HALF, save=path)
            else:
                torch.save(train(place, strategy, count, resume=path), place / f"resumed-{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def monitored(folder: str, how: str, world: str) -> None:
    monitor = ScaleMonitor(2, folder=Path(folder) / "several")
    train(Path(folder), ModelParallelStrategy(**mesh_of(how, int(world))), int(world), UnitScaling(), monitor)
    torch.distributed.destroy_process_group()


def clipped_by_torch(folder: str, prepared: str) -> None:
    """Weights that are split beside ones that are not."""
    callbacks = [UnitScaling()] if prepared else []
    with pytest.raises(RuntimeError) as refusal:
        train(Path(folder), ModelParallelStrategy(**mesh_of("tp", 2)), 2, *callbacks, gradient_clip_val=0.05)
    Path(folder, f"refusal-{os.environ['LOCAL_RANK']}").write_text(str(refusal.value))
    torch.distributed.destroy_process_group()


def assert_same(weights: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in weights.items():
        if name == "block.attention.k.bias":  # its gradient is 0, so that Adam takes whole steps along rounding
            continue
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


def step_limits(plan: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (p["step_limit"], p["sgd_step_limit"]) for name, p in plan["parameters"].items()}


def check(folder: Path, how: str, world: int, runs: str) -> None:
    run(world, "doors.test_model_parallel:in_each_process", folder, how, world, runs, seconds=600)
    for name in runs.split(","):
        case, habit = name.split("/")
        results = [torch.load(folder / f"{case}-{habit}-{rank}.pt", weights_only=True) for rank in range(world)]
        expected = train(folder, "auto", 1, UnitScaling(**CASES[case]), **HABITS[habit])
        for result in results:
            assert_same(result["weights"], expected["weights"])
            assert result["plan"]["parameters"] == results[0]["plan"]["parameters"], name
            assert step_limits(result["plan"]) == step_limits(expected["plan"]), name
        means = [sum(losses) / world for losses in zip(*(result["losses"] for result in results), strict=True)]
        assert means == pytest.approx(expected["losses"], rel=1e-9), name


@pytest.mark.parametrize(("how", "runs"), [("fsdp", "folded/clipped"), ("tp", "unit/plain")])
def test_two_processes_are_one(tmp_path: Path, how: str, runs: str) -> None:
    check(tmp_path, how, 2, runs)


def gathered(folder: str) -> None:
    rank = os.environ["LOCAL_RANK"]
    for fp8_gather in (False, True):
        strategy = UnitScalingModelParallelStrategy(format="fp8", fp8_gather=fp8_gather, **mesh_of("fsdp", 2))
        result = train(Path(folder), strategy, 2, dtype=torch.float32)
        shards = [_local(parameter) for parameter in strategy.lightning_module.parameters()]
        result["in_fp8"] = sum(hasattr(shard, "fsdp_pre_all_gather") for shard in shards)
        torch.save(result, Path(folder, f"{fp8_gather}-{rank}.pt"))
    torch.distributed.destroy_process_group()


def _local(parameter: Tensor) -> Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


@pytest.mark.slow
def test_weights_gathered_in_fp8_train_alike_to_the_bit(tmp_path: Path) -> None:
    run(2, "doors.test_model_parallel:gathered", tmp_path, seconds=600)
    for rank in range(2):
        plain, narrow = (torch.load(tmp_path / f"{on}-{rank}.pt", weights_only=True) for on in (False, True))
        assert narrow["losses"] == plain["losses"]
        assert all(torch.equal(value, plain["weights"][name]) for name, value in narrow["weights"].items())
        assert (plain["in_fp8"], narrow["in_fp8"] > 2) == (0, True)


def test_an_fp8_gather_without_fp8_is_refused() -> None:
    with pytest.raises(UnitScalingError, match=r"format='bf16' casts none to e4m3.*choose format='fp8' or 'fp8_e4m3'"):
        UnitScalingModelParallelStrategy(format="bf16", fp8_gather=True)


EVERYTHING = ",".join([
    *(f"{case}/{'sgd' if case == 'amax' else 'plain'}" for case in CASES),
    *(f"unit/{habit}" for habit in HABITS if habit != "plain"),
])  # fmt: skip


WORLDS = [("fsdp", 2), ("tp", 2), ("both", 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "world"), by_night(WORLDS, [("both", 4)]))
def test_processes_are_one_in_every_way(tmp_path: Path, how: str, world: int) -> None:
    check(tmp_path, how, world, EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("how", by_night(["fsdp", "tp"], ["fsdp"]))
def test_four_processes_are_one(tmp_path: Path, how: str) -> None:
    check(tmp_path, how, 4, "folded/plain,unit/plain,bf16/plain")


@pytest.mark.slow
@pytest.mark.parametrize("prepared", by_night(["", "prepared"], ["prepared"]))
def test_torch_takes_no_norm_over_split_and_whole_weights(tmp_path: Path, prepared: str) -> None:
    run(2, "doors.test_model_parallel:clipped_by_torch", tmp_path, prepared)
    assert "mixed torch.Tensor and DTensor" in (tmp_path / "refusal-0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "first", "then"), by_night([("fsdp", 2, 4), ("both", 4, 2), ("tp", 2, 2)], [("both", 4, 2)])
)
def test_a_run_goes_on_in_other_numbers(tmp_path: Path, how: str, first: int, then: int) -> None:
    for stage, world, way in (("save", first, how), ("resume", then, "fsdp" if then == 2 and how == "both" else how)):
        run(world, "doors.test_model_parallel:save_and_resume", tmp_path, way, world, stage, seconds=600)
    for storage in ("folded", "unit"):
        expected = train(tmp_path, "auto", 1, UnitScaling(storage=storage))
        for kind in ("parts", "whole"):
            resumed = torch.load(tmp_path / f"resumed-{storage}-{kind}-0.pt", weights_only=True)
            assert_same(resumed["weights"], expected["weights"])
        whole, parts = (read_checkpoint(tmp_path / f"{storage}-{kind}.ckpt") for kind in ("whole", "parts"))
        assert plan_in(parts) is not None
        assert parts["state_dict"].keys() == whole["state_dict"].keys()
        assert all(torch.equal(parts["state_dict"][name], value) for name, value in whole["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "world"), by_night(WORLDS, [("both", 4)]))
def test_the_monitor_sees_all_ranks(tmp_path: Path, how: str, world: int) -> None:
    run(world, "doors.test_model_parallel:monitored", tmp_path, how, world)
    train(tmp_path, "auto", 1, UnitScaling(), ScaleMonitor(2, folder=tmp_path / "one"))
    one, several = (Snapshot.read(tmp_path / place / "monitor.jsonl") for place in ("one", "several"))
    assert [snapshot.step for snapshot in several] == [snapshot.step for snapshot in one]
    shares = mesh_of(how, world)["data_parallel_size"]  # each rank's loss is a mean over such a part of the rows
    for alone, together in zip(one, several, strict=True):
        seen = {(m.parameter, m.operand): m.unscaled.rms for m in together.measurements}
        for measurement in alone.measurements:
            expected = measurement.unscaled.rms * (shares if measurement.operand == "gradient" else 1)
            assert seen[measurement.parameter, measurement.operand] == pytest.approx(expected, rel=1e-4)
