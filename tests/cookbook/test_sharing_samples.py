"""Processes draw in turns the samples that one would; a run that goes on draws those that come next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.utils.data import Dataset, Sampler

from lightning_unitscale.cookbook.data.continuing_loader import ContinuingLoader, in_turns

WORLD, BATCH = 2, 4


class Positions(Dataset[int]):
    """As long as so many steps of all processes take."""

    start = 0

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * BATCH * WORLD

    def __getitem__(self, index: int) -> int:
        return self.start + index


def drawn(rank: int, steps: int, state: dict[str, int] | None = None) -> tuple[list[list[int]], dict[str, int]]:
    trainer: Any = SimpleNamespace(world_size=WORLD, distributed_sampler_kwargs={"num_replicas": WORLD, "rank": rank})
    data = Positions(steps)
    sampler: Sampler[int] | None = in_turns(data, trainer)
    loader = ContinuingLoader(data, sampler=sampler, batch_size=BATCH)
    if state is not None:
        loader.load_state_dict(state)
    return [batch.tolist() for batch in loader], loader.state_dict()


def test_a_run_that_goes_on_draws_what_the_whole_one_did() -> None:
    for rank in range(WORLD):
        whole, _ = drawn(rank, 6)
        half, state = drawn(rank, 3)
        rest, _ = drawn(rank, 6, state)
        assert half + rest[:3] == whole


def test_each_step_takes_the_next_samples_of_all() -> None:
    steps = zip(*(drawn(rank, 3)[0] for rank in range(WORLD)), strict=True)
    for number, batches in enumerate(steps):
        first = number * BATCH * WORLD
        assert sorted(sample for batch in batches for sample in batch) == list(range(first, first + BATCH * WORLD))
