"""Checkpoints of models that are spread over processes, whose strategies load weights as they read the file.

    one file        the whole state, gathered on rank 0
    a folder        torch.distributed.checkpoint: a part of weights and optimizer states by each process, all else,
                    the plan too, in `meta.pt`; loads on any number of processes

Lightning reads either straight into the sharded model in `Strategy.load_checkpoint`, before anybody is told what is in
it; the plan must be in force by then.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.state_dict import PLAN_KEY, encode, loaded_in_pieces
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.namespaces import classes

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

META = "meta.pt"  # Lightning's name for what is beside the shards
_WEIGHTS = ("state_dict.", "model.")  # the names of its part with the weights: ModelParallelStrategy's, FSDPStrategy's
DEEPSPEED_STATES = "checkpoint/*mp_rank_00_model_states.pt"  # one a process under ZeRO 3, each with all that is beside
_LOADERS = ("strategies.FSDPStrategy", "strategies.ModelParallelStrategy", "strategies.DeepSpeedStrategy")
_FABRIC = ("lightning_fabric.strategies.model_parallel", "lightning.fabric.strategies.model_parallel")


def loads_weights_with_file(strategy: Strategy) -> bool:
    """Whether the strategy's `load_checkpoint` writes to the model, and `load_model_state_dict` does nothing."""
    return any(isinstance(strategy, classes(path)) for path in _LOADERS)


def is_in_shards(path: Path) -> bool:
    """Whether there is a folder of torch.distributed.checkpoint."""
    return (path / META).is_file()


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint in shards, on the CPU; optimizer states stay where they are."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    part = next(name for name in _WEIGHTS if any(key.startswith(name) for key in entries))
    weights = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith(part) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is not asked for
        load(weights, storage_reader=reader, no_dist=True)
    return {key.removeprefix(part): weight for key, weight in weights.items()}


def file_beside_weights(folder: Path) -> Path:
    """Where a checkpoint that is a folder has what is no weight; no file there: it is no checkpoint."""
    return next(iter(sorted(folder.glob(DEEPSPEED_STATES))), folder / META)


def all_but_weights(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds; of a folder what is beside the shards, of DeepSpeed's what is beside weights.

    Raises:
        UnitScalingError: there is no checkpoint there, or it can't be read.
    """
    file = file_beside_weights(path) if path.is_dir() else path
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # whatever the unpickler makes of a file that is none
        raise UnitScalingError(f"{file}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if path.is_dir() and "lr_schedulers" in checkpoint:  # of a run, not weights alone
        checkpoint["optimizer_states"] = ["in the shards"]
    return checkpoint


def agree_on_plan(strategy: Strategy, checkpoint: dict[str, Any]) -> None:
    """Have all processes save the plan of the first: what each measured on its own rows is in it too."""
    plan = strategy.broadcast(checkpoint.get(PLAN_KEY))
    if plan is not None:
        checkpoint[PLAN_KEY] = plan
        if PLAN_KEY in checkpoint["state_dict"]:
            checkpoint["state_dict"][PLAN_KEY] = encode(Plan.from_dict(plan))


@contextmanager
def full_states_unmarked(module: nn.Module) -> Iterator[None]:
    """Inside, Lightning loads a whole state into a spread module as that of a plain one.

    It does so one parameter at a time, past the hook that takes the mark off (see `engine.plan.state_dict`).
    """
    fabrics = [sys.modules[name] for name in _FABRIC if name in sys.modules]
    originals = [fabric._load_raw_module_state for fabric in fabrics]
    try:
        for fabric, original in zip(fabrics, originals, strict=True):
            fabric._load_raw_module_state = partial(_load_unmarked, original, module)  # type: ignore[attr-defined]  # a module
        yield
    finally:
        for fabric, original in zip(fabrics, originals, strict=True):
            fabric._load_raw_module_state = original  # type: ignore[attr-defined]  # a module


def _load_unmarked(
    load: Callable[..., None], module: nn.Module, state: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    with loaded_in_pieces(module, state) as plain:
        load(plain, *args, **kwargs)
