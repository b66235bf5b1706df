"""A checkpoint that stands under its name is a whole one.

It is written beside its place, as `.name.part`, and takes its name when all of it is there: a process that is killed,
or a disk that is full, leaves the checkpoint that was there before. Lightning writes to the place itself where the
temporary folder is on another disk, and shards always.

Of what can't be read back the file is named, before anything in the model is changed.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from lightning_unitscale.errors import UnitScalingError, first_line
from lightning_unitscale.namespaces import classes

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

UNREADABLE = (RuntimeError, EOFError, KeyError, ValueError, AttributeError, pickle.UnpicklingError)  # of torch.load


def write_whole(
    strategy: Strategy, write: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any
) -> Any:
    """Have the strategy write a checkpoint, and give it its name when it is whole.

    Raises:
        UnitScalingError: it could not be written; what was there before still is.
    """
    if not _is_ours_to_rename(strategy, filepath):
        return write(checkpoint, filepath, *args, **kwargs)
    path = Path(filepath)
    try:
        with beside(path, renames=strategy.is_global_zero) as part:
            return write(checkpoint, part, *args, **kwargs)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise UnitScalingError(
            f"the checkpoint {path} could not be written ({type(error).__name__}: {first_line(error)}); "
            f"{'the one that was there before is whole' if path.exists() else 'nothing was left there'}."
        ) from error


@contextmanager
def beside(path: Path, *, renames: bool = True) -> Iterator[Path]:
    """A place to write to, which takes the name `path` when what is inside is done, or is emptied if that fails.

    Args:
        renames: whether this process does so, of several that write there together.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if renames:
        _remove(part)
    try:
        yield part
        if renames and part.exists():
            _take_name(part, path)
    except BaseException:
        if renames:
            _remove(part)
        raise


def _is_ours_to_rename(strategy: Strategy, filepath: Any) -> bool:
    """Not what another thread or DeepSpeed's engine writes, nor what is on another machine."""
    if "://" in str(filepath) or isinstance(strategy, classes("strategies.DeepSpeedStrategy")):
        return False
    return not isinstance(strategy.checkpoint_io, classes("plugins.io.AsyncCheckpointIO"))


def _take_name(part: Path, path: Path) -> None:
    if not (path.is_dir() or part.is_dir()):
        part.replace(path)
        return
    former = path.with_name(f".{path.name}.former")  # a folder can't take another's place in one step
    if path.exists():
        _remove(former)
        path.rename(former)
    part.rename(path)
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_whole(read: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a checkpoint of a Trainer.

    Raises:
        UnitScalingError: the file is none, not all of one, or a folder of shards.
    """
    if Path(path).is_dir():
        raise UnitScalingError(
            f"{path}: a folder, written by several processes, each its part; this strategy reads one file. Go on with "
            "the strategy that wrote it, or have that one write a file (save_distributed_checkpoint=False of "
            'ModelParallelStrategy, state_dict_type="full" of FSDPStrategy). Nothing was changed.'
        )
    try:
        checkpoint = read(path, *args, **kwargs)
    except UNREADABLE as error:
        raise UnitScalingError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {first_line(error)}). Nothing was changed."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        what = (
            f"it holds no 'state_dict', but {', '.join(map(str, list(checkpoint)[:3]))}"
            if (isinstance(checkpoint, dict))
            else f"it is a {type(checkpoint).__name__}"
        )
        raise UnitScalingError(
            f"{path}: not a checkpoint of a Trainer ({what}). Weights alone are loaded by "
            "lightning_unitscale.load_checkpoint(model, path). Nothing was changed."
        )
    return checkpoint
