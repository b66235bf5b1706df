"""A loader that goes on where a checkpoint was written, and the options that all loaders of a run share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ContinuingLoader(DataLoader[Any]):
    """Counts the batches it hands out; Lightning keeps the count in the checkpoint and gives it back.

    Its data set has an attribute `start`, the number of samples used before.
    """

    batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Lightning needs an iterator, not torch's own class
        assert self.batch_size is not None
        dataset: Any = self.dataset
        dataset.start = self.batches * self.batch_size * getattr(self.sampler, "num_replicas", 1)
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out since training began."""
        return {"batches": self.batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues after that many batches."""
        self.batches = state["batches"]


def in_turns(dataset: Dataset[Any], trainer: pl.Trainer | None) -> DistributedSampler[Any] | None:
    """Samples in order, dealt out to the processes; None for one process.

    Lightning's own would shuffle them, over an epoch that is as long as the run: a run that goes on would draw others.
    """
    if trainer is None or trainer.world_size == 1:
        return None
    return DistributedSampler(dataset, shuffle=False, **(trainer.distributed_sampler_kwargs or {}))


def processes() -> int:
    """How many share a run's samples: so many times those of its steps keep an epoch from ending in part of a batch."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def loading(cfg: DictConfig) -> dict[str, Any]:
    """What a run's configuration says about batches: the arguments that `TokenText` and `Examples` share."""
    return {
        "batch_size": cfg.data.batch_size,
        "steps": cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches,
        "seed": cfg.seed,
        "workers": cfg.data.workers,
    }
