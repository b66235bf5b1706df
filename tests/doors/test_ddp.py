"""The same global batch gives the same training, cut into processes or into accumulated pieces, in float64."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from support.processes import run
from support.training import Language, trainer
from support.zoo import Batch, default_dtype, next_token_batch
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


class Shared(Language):
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
    callback: bool = True,
    monitor: bool = False,
    format: str | None = None,
    scheme: str = "umup",
) -> Shared:
    """`STEPS` steps on the global batches; each cut into `pieces` that are accumulated."""
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        module = cls(batch_norm=False, optimizer="sgd", lr=0.05)
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
            devices=2 if isinstance(strategy, DDPStrategy) else 1,
            use_distributed_sampler=False,
            accumulate_grad_batches=pieces,
            max_steps=STEPS,
        )
        loop.fit(module, DataLoader(data, batch_size=None))
    return module


IN_TWO: dict[str, tuple[type[Shared], str, Callable[[], DDPStrategy], bool]] = {
    "callback-fp8": (Shared, "unit", DDPStrategy, True),
    "callback-folded": (Shared, "folded", DDPStrategy, True),
    "callback-unit": (Shared, "unit", DDPStrategy, True),
    "amax-unit": (Shared, "unit", DDPStrategy, True),
    "strategy-unit": (Shared, "unit", lambda: UnitScalingDDPStrategy(storage="unit"), False),
    "routed-folded": (Routed, "folded", lambda: UnitScalingDDPStrategy(find_unused_parameters=True), False),
    "routed-unit": (Routed, "unit", lambda: DDPStrategy(find_unused_parameters=True), True),
}


def format_of(name: str) -> str | None:
    return "fp8" if name.endswith("fp8") else None


def scheme_of(name: str) -> str:
    return "amax" if name.startswith("amax") else "umup"


def one_of_two(folder: str) -> None:
    """Runs in each of the two processes."""
    rank = os.environ["LOCAL_RANK"]
    for name, (cls, storage, strategy, callback) in IN_TWO.items():
        options: dict[str, Any] = {"format": format_of(name), "scheme": scheme_of(name)}
        module = train(cls, Path(folder), storage, strategy=strategy(), callback=callback, **options)
        plan = plan_of(module)
        assert plan is not None

        result = {"losses": module.losses, "weights": weights_of(module), "plan": plan.to_dict()}
        torch.save(result, Path(folder, f"{name}-{rank}.pt"))
    monitored = train(Shared, Path(folder), "unit", strategy=DDPStrategy(), monitor=True)
    torch.save(monitored.losses, Path(folder, f"monitored-{rank}.pt"))
    torch.distributed.destroy_process_group()  # Lightning leaves it, and its threads may abort the interpreter's exit


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run(2, "doors.test_ddp:one_of_two", folder)
    return folder


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


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes_are_one(tmp_path: Path, in_two: Path, name: str) -> None:
    cls, storage, _, _ = IN_TWO[name]
    scheme = scheme_of(name)
    whole = train(cls, tmp_path, storage, format=format_of(name), scheme=scheme)
    halves = [torch.load(in_two / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    one, other = (what_it_does(half["plan"]) for half in halves)
    assert one == other
    assert halves[0]["losses"] != halves[1]["losses"]
    for half in halves:
        # Divided by its own scale, the key's bias's gradient, which is rounding and nothing else, is a whole step.
        noise = "block.attention.k.bias" if scheme == "amax" else ""
        assert_close(half["weights"], weights_of(whole), started(whole), noise)
        assert all(torch.equal(value, halves[0]["weights"][key]) for key, value in half["weights"].items())
    means = [(one + other) / 2 for one, other in zip(halves[0]["losses"], halves[1]["losses"], strict=True)]
    assert means == pytest.approx(whole.losses, rel=1e-12)


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
