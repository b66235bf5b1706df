"""FSDP1 and DeepSpeed, which flatten parameters, train what one process does on the same global batches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from support.flattening import AsItIs, DeepSpeedOnCPU, FSDP1OnCPU
from support.processes import run
from support.training import Wrapped, trainer
from support.zoo import default_dtype
from support.zoo_batches import Batch, next_token_batch
from torch import Tensor
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader

from lightning_unitscale import ScaleMonitor, UnitScaling
from lightning_unitscale.engine.plan.plan import plan_of

STEPS, HALF = 6, 3
HAS_DEEPSPEED = find_spec("deepspeed") is not None
ENGINES = [
    "fsdp1",
    *(
        pytest.param(f"zero{stage}", marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed"))
        for stage in (1, 2, 3)
    ),
]


class Halved(Wrapped):
    """Each process takes its rows of the global batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        loss = self.loss({name: value[rank::world] for name, value in batch.items()})
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        decayed = [p for name, p in self.named_parameters() if name.endswith("weight")]
        others = [p for name, p in self.named_parameters() if not name.endswith("weight")]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def strategy_of(engine: str, **options: Any) -> Any:
    if engine == "fsdp1":
        return FSDP1OnCPU(auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear, torch.nn.Embedding}), **options)
    return DeepSpeedOnCPU(stage=int(engine[-1]), logging_batch_size_per_gpu=1, **options)


def train(
    folder: Path,
    strategy: Any,
    world: int,
    *callbacks: Any,
    steps: int = STEPS,
    resume: Path | None = None,
    save: Path | None = None,
    dtype: torch.dtype = torch.float64,
    checkpointing: bool = False,
    compiled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`steps` steps; the losses of this process, and the whole weights."""
    with default_dtype(dtype):
        torch.manual_seed(0)
        module = Halved(batch_norm=False)
        module.checkpointing, module.compiled = checkpointing, compiled
        begun = HALF if resume else 0
        data = [next_token_batch(step) for step in [*range(begun, STEPS), *range(begun)]]
        loop = trainer(
            folder,
            *callbacks,
            strategy=strategy,
            devices=world,
            use_distributed_sampler=False,
            max_steps=steps,
            plugins=[AsItIs()] if isinstance(strategy, FSDP1OnCPU) else None,
            **options,
        )
        loop.fit(module, DataLoader(data, batch_size=None), ckpt_path=resume)
        if save is not None:
            loop.save_checkpoint(save)
        plan = plan_of(module)
        assert plan is not None
        return {"losses": module.losses, "weights": whole(loop), "plan": plan.to_dict()}


def whole(loop: Any) -> dict[str, Tensor]:
    module, model = loop.lightning_module, loop.strategy.model
    if isinstance(loop.strategy, FSDPStrategy):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
    named = dict(module.named_parameters())
    if any(hasattr(p, "ds_id") for p in named.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: p.detach().clone() for name, p in named.items()}
    return {name: p.detach().clone() for name, p in named.items()}


CASES: dict[str, dict[str, Any]] = {  # of `UnitScaling`
    "folded": {},
    "unit": {"storage": "unit"},
    "preserve": {"scheme": "preserve"},
}
HABITS: dict[str, dict[str, Any]] = {  # of the training around it
    "plain": {},
    "clipped": {"gradient_clip_val": 0.05},
    "checkpointed": {"checkpointing": True},
    "compiled": {"compiled": True},
}
RUNS = [*(f"{case}/plain" for case in CASES), *(f"folded/{habit}" for habit in HABITS if habit != "plain")]
NOT_TO_BE_HAD = {  # and refused
    "fsdp1": {"unit/plain", "folded/clipped"},
    "zero3": {"unit/plain"},
}


def options_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    case, habit = name.split("/")
    return CASES[case], HABITS[habit]


def dtype_of(engine: str) -> torch.dtype:
    return torch.float64 if engine == "fsdp1" else torch.float32  # which DeepSpeed's flat copies are


def in_each_process(folder: str, engine: str, world: str, runs: str) -> None:
    """One run after the other, as "case/habit"."""
    rank = os.environ["LOCAL_RANK"]
    for name in runs.split(","):
        case, habit = options_of(name)
        result = train(Path(folder), strategy_of(engine, **case), int(world), dtype=dtype_of(engine), **habit)
        torch.save(result, Path(folder, f"{name.replace('/', '-')}-{rank}.pt"))
    torch.distributed.destroy_process_group()


def monitored(folder: str, engine: str) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        train(Path(folder), strategy_of(engine), 2, ScaleMonitor(2, folder=Path(folder)), dtype=torch.float32)
    blind = any("ScaleMonitor has seen no product" in str(warning.message) for warning in given)
    assert torch.distributed.get_rank() != 0 or blind != Path(folder, "monitor.jsonl").exists()
    Path(folder, "blind" if blind else f"seen{torch.distributed.get_rank()}").touch()
    torch.distributed.destroy_process_group()


def clipped_by_fsdp1(folder: str) -> None:
    with pytest.raises(MisconfigurationException) as refusal:
        train(Path(folder), strategy_of("fsdp1"), 2, gradient_clip_val=0.05)
    Path(folder, f"refusal-{os.environ['LOCAL_RANK']}").write_text(str(refusal.value))
    torch.distributed.destroy_process_group()


def save_and_resume(folder: str, engine: str, stage: str) -> None:
    path = Path(folder, "half.ckpt")
    dtype = dtype_of(engine)
    # Whole ones are put on the CPU, and where they are there already torch (2.13) frees them before they are written.
    kind = {"state_dict_type": "sharded"} if engine == "fsdp1" else {}
    if stage == "save":
        train(Path(folder), strategy_of(engine, **kind), 2, steps=HALF, save=path, dtype=dtype)
    else:
        result = train(Path(folder), strategy_of(engine, **kind), 2, resume=path, dtype=dtype)
        torch.save(result, Path(folder, f"{os.environ['LOCAL_RANK']}.pt"))
    torch.distributed.destroy_process_group()


def check(results: list[dict[str, Any]], expected: dict[str, Any], engine: str) -> None:
    # DeepSpeed's copies are float32, and Adam makes up to a step of 0.01 of a gradient that is nothing but rounding
    tolerance = 1e-9 if engine == "fsdp1" else 2e-4
    for result in results:
        assert result["plan"]["parameters"] == results[0]["plan"]["parameters"]
        assert set(map(plain, result["weights"])) == set(expected["weights"])
        for name, value in result["weights"].items():
            if plain(name) == "block.attention.k.bias":  # its gradient is 0: Adam takes whole steps along rounding
                continue
            torch.testing.assert_close(
                value, expected["weights"][plain(name)], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
            )


def plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def saved(folder: Path, name: str, world: int) -> list[dict[str, Any]]:
    name = name.replace("/", "-")
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with an engine's results in two processes, of all `RUNS` that it has."""

    @cache
    def of(engine: str) -> Path:
        folder = tmp_path_factory.mktemp(engine)
        runs = ",".join(name for name in RUNS if name not in NOT_TO_BE_HAD.get(engine, ()))
        run(2, "doors.test_flattening:in_each_process", folder, engine, 2, runs, seconds=600)
        return folder

    return of


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(tmp_path: Path, in_two: Callable[[str], Path], engine: str, name: str) -> None:
    if name in NOT_TO_BE_HAD.get(engine, ()):
        pytest.skip("refused: factors in the forward pass; Lightning's FSDPStrategy has no clipping by norm")
    case, habit = options_of(name)
    expected = train(tmp_path, "auto", 1, UnitScaling(**case), dtype=dtype_of(engine), **habit)
    check(saved(in_two(engine), name, 2), expected, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_are_one(tmp_path: Path, engine: str) -> None:
    run(4, "doors.test_flattening:in_each_process", tmp_path, engine, 4, "folded/plain", seconds=600)
    expected = train(tmp_path, "auto", 1, UnitScaling(), dtype=dtype_of(engine))
    check(saved(tmp_path, "folded/plain", 4), expected, engine)


@pytest.mark.slow
def test_clipping_by_norm_is_refused_by_lightning_s_fsdp1(tmp_path: Path) -> None:
    run(2, "doors.test_flattening:clipped_by_fsdp1", tmp_path)
    assert "`gradient_clip_algorithm='norm'` is currently not supported" in (tmp_path / "refusal-0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_monitor_sees_the_model_or_says_that_it_does_not(tmp_path: Path, engine: str) -> None:
    run(2, "doors.test_flattening:monitored", tmp_path, engine, seconds=300)
    if engine != "zero3":  # whose products are functions of its own in some versions of DeepSpeed
        assert (tmp_path / "blind").exists() == (engine == "fsdp1")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on(tmp_path: Path, engine: str) -> None:
    for stage in ("save", "resume"):
        run(2, "doors.test_flattening:save_and_resume", tmp_path, engine, stage, seconds=300)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    check(results, train(tmp_path, "auto", 1, UnitScaling(), dtype=dtype_of(engine)), engine)
