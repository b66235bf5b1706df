"""The same global batch gives the same training, cut into processes or into accumulated pieces, in float64."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from support.processes import run
from support.training import Wrapped, trainer
from support.zoo import default_dtype
from support.zoo_batches import Batch, next_token_batch
from support.zoo_modules import LoopExperts
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unitscale import ScaleMonitor, UnitScaling
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.strategy import UnitScalingDDPStrategy

ROWS, STEPS = 8, 6


def global_batch(step: int) -> Batch:
    parts = [next_token_batch(1000 * step + part) for part in range(ROWS // 4)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Shared(Wrapped):
    """Each process takes its rows of the global batch, interleaved."""

    rows, tokens = ROWS, None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        mine = slice(self.global_rank, self.rows, self.trainer.world_size)
        rows = {name: value[mine, : self.tokens] for name, value in batch.items()}
        loss = self.loss(rows)
        self.log("train_loss", loss, sync_dist=True)
        self.losses.append(float(loss.detach()))
        return loss


class Routed(Shared):
    """Each process sees few tokens, and so few of the experts."""

    rows, tokens = 2, 1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.block.mlp = LoopExperts()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def train(
    cls: type[Shared],
    folder: Path,
    storage: str,
    pieces: int = 1,
    strategy: Any = "auto",
    world: int = 1,
    callback: bool = True,
    monitor: bool = False,
    format: str | None = None,
    scheme: str = "umup",
    checkpointing: bool = False,
    compiled: bool = False,
    **options: Any,
) -> Shared:
    """`STEPS` steps on the global batches; each cut into `pieces` that are accumulated."""
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        module = cls(batch_norm=False, optimizer="sgd", lr=0.05)
        module.checkpointing, module.compiled = checkpointing, compiled
        data = []
        for step in range(STEPS):
            batch = global_batch(step)
            cut = {name: value.chunk(pieces) for name, value in batch.items()}
            data += [{name: value[piece] for name, value in cut.items()} for piece in range(pieces)]
        loop = trainer(
            folder,
            *([UnitScaling(scheme, storage=storage, format=format)] if callback else []),
            *([ScaleMonitor(2, folder=folder)] if monitor else []),
            strategy=strategy,
            devices=world,
            use_distributed_sampler=False,
            accumulate_grad_batches=pieces,
            max_steps=STEPS,
            **options,
        )
        loop.fit(module, DataLoader(data, batch_size=None))
    return module


@dataclass(frozen=True)
class Way:
    """How two processes train.

    Attributes:
        callback: beside the strategy.
        options: of `UnitScaling`.
        habits: of the training around it.
    """

    storage: str
    cls: type[Shared] = Shared
    strategy: Callable[[], DDPStrategy] = DDPStrategy
    callback: bool = True
    options: dict[str, str] = field(default_factory=dict)
    habits: dict[str, Any] = field(default_factory=dict)

    def train(self, folder: Path, strategy: Any = "auto", world: int = 1, *, callback: bool = True) -> Shared:
        """In this process; by itself, unless there is a strategy."""
        return train(self.cls, folder, self.storage, 1, strategy, world, callback, **{**self.options, **self.habits})


IN_TWO: dict[str, Way] = {
    "callback-fp8": Way("unit", options={"format": "fp8"}),
    "callback-bf16": Way("unit", options={"format": "bf16"}),
    "callback-folded": Way("folded"),
    "callback-unit": Way("unit"),
    "preserve-folded": Way("folded", options={"scheme": "preserve"}),
    "amax-unit": Way("unit", options={"scheme": "amax"}),
    "strategy-unit": Way("unit", strategy=lambda: UnitScalingDDPStrategy(storage="unit"), callback=False),
    "routed-folded": Way("folded", Routed, lambda: UnitScalingDDPStrategy(find_unused_parameters=True), callback=False),
    "routed-unit": Way("unit", Routed, lambda: DDPStrategy(find_unused_parameters=True)),
    "clipped-unit": Way("unit", habits={"gradient_clip_val": 0.05}),
    "checkpointed-unit": Way("unit", habits={"checkpointing": True}),
    "compiled-unit": Way("unit", habits={"compiled": True}),
}
BY_NIGHT = ("callback-bf16", "preserve-folded", "clipped-unit", "checkpointed-unit", "compiled-unit")
IN_FOUR = ("callback-folded", "callback-unit", "callback-bf16")


def one_of_several(folder: str, world: str, names: str) -> None:
    """Runs in each of the processes."""
    rank = os.environ["LOCAL_RANK"]
    for name in names.split(","):
        way = IN_TWO[name]
        module = way.train(Path(folder), way.strategy(), int(world), callback=way.callback)
        plan = plan_of(module)
        assert plan is not None

        result = {"losses": module.losses, "weights": weights_of(module), "plan": plan.to_dict()}
        torch.save(result, Path(folder, f"{name}-{rank}.pt"))
    if "callback-unit" in names and world == "2":  # which it is compared with
        monitored = train(Shared, Path(folder), "unit", strategy=DDPStrategy(), world=2, monitor=True)
        torch.save(monitored.losses, Path(folder, f"monitored-{rank}.pt"))
    torch.distributed.destroy_process_group()  # Lightning leaves it, and its threads may abort the interpreter's exit


def in_processes(world: int, names: Iterable[str], folders: pytest.TempPathFactory) -> Path:
    folder = folders.mktemp("processes")
    run(world, "doors.test_ddp:one_of_several", folder, world, ",".join(names), seconds=600)
    return folder


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_processes(2, (name for name in IN_TWO if name not in BY_NIGHT), tmp_path_factory)


@pytest.fixture(scope="module")
def in_two_by_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_processes(2, BY_NIGHT, tmp_path_factory)


@pytest.fixture(scope="module")
def in_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_processes(4, IN_FOUR, tmp_path_factory)


def assert_close(
    weights: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], noise: str = ""
) -> None:
    for name, value in weights.items():
        tolerance = 1e-12 * max(float(expected[name].abs().max()), 1e-2)  # the gradient of the key's bias is 0
        if name == noise:
            continue
        assert float((value - expected[name]).abs().max()) <= tolerance, name
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())


def what_it_does(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan without what each process measured on its own rows after it was put in force."""
    return {**plan, "sites": [{**site, "rms_after": {}} for site in plan["sites"]], "gradient_cosine": {}}


def started(module: Shared) -> dict[str, Tensor]:
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        return weights_of(type(module)(batch_norm=False))


def check(tmp_path: Path, folder: Path, name: str, world: int) -> None:
    way = IN_TWO[name]
    whole = way.train(tmp_path)
    parts = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(world)]
    one, *others = (what_it_does(part["plan"]) for part in parts)
    assert all(other == one for other in others)
    assert parts[0]["losses"] != parts[1]["losses"]
    for part in parts:
        # Divided by its own scale, the key's bias's gradient, which is rounding and nothing else, is a whole step.
        noise = "block.attention.k.bias" if way.options.get("scheme") == "amax" else ""
        assert_close(part["weights"], weights_of(whole), started(whole), noise)
        assert all(torch.equal(value, parts[0]["weights"][key]) for key, value in part["weights"].items())
    means = [sum(losses) / world for losses in zip(*(part["losses"] for part in parts), strict=True)]
    assert means == pytest.approx(whole.losses, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in IN_TWO if name not in BY_NIGHT])
def test_two_processes_are_one(tmp_path: Path, in_two: Path, name: str) -> None:
    check(tmp_path, in_two, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NIGHT)
def test_two_processes_are_one_by_night(tmp_path: Path, in_two_by_night: Path, name: str) -> None:
    check(tmp_path, in_two_by_night, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FOUR)
def test_four_processes_are_one(tmp_path: Path, in_four: Path, name: str) -> None:
    check(tmp_path, in_four, name, 4)


def test_the_first_tokens_go_to_different_experts() -> None:
    """What `routed` is about: by itself, each process would have recorded another model."""
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        model = Routed(batch_norm=False)
        routes = []
        model.block.mlp.router.register_forward_hook(
            lambda module, args, output: routes.append(set(output[1].tolist()))
        )
        for rank in range(2):
            model(global_batch(0)["input_ids"][rank:2:2, :1])
    assert routes[0] != routes[1]


@pytest.mark.parametrize(("storage", "format"), [("folded", None), ("unit", None), ("folded", "fp8")])
def test_accumulated_pieces_are_one_batch(tmp_path: Path, storage: str, format: str | None) -> None:
    """Scales are measured on all pieces, or processes, and powers of two, so that the casts are the whole batch's."""
    whole = train(Shared, tmp_path, storage, format=format)
    pieces = train(Shared, tmp_path, storage, pieces=4, format=format)
    assert len(pieces.losses) == 4 * len(whole.losses)
    assert_close(weights_of(pieces), weights_of(whole), started(whole))


def test_rank_0_monitors_and_training_is_the_same(in_two: Path) -> None:
    lines = (in_two / "monitor.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4, 5]
    for rank in range(2):
        plain = torch.load(in_two / f"callback-unit-{rank}.pt")["losses"]
        assert torch.load(in_two / f"monitored-{rank}.pt") == plain
