"""The tables "Past one device" of the package's README, from results of tests:

    python -m pytest -m "slow or not slow" --junitxml=/tmp/results.xml tests/doors/test_ddp.py \
        tests/doors/test_faults.py tests/doors/test_loading.py tests/doors/test_model_parallel.py \
        tests/doors/test_every_strategy.py tests/doors/test_flattening.py tests/cookbook/test_trainer_presets.py
    PYTHONPATH=tests python -m support.past_one_device /tmp/results.xml

A cell names tests. It works if some of them passed, and is refused if they are tests of a refusal; it is not run, and a
note says why, if none is named, or none of them ran. There is no fourth outcome: a test that failed ends the program.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import NamedTuple

STRATEGIES = ("DDP", "FSDP2", "tensor parallel", "FSDP2 × TP", "FSDP1", "ZeRO 1", "ZeRO 2", "ZeRO 3")


class Cell(NamedTuple):
    """Attributes:
    tests: a pattern of names; "" for none.
    means: what it means that they pass.
    note: the message of a refusal, or under which condition it works.
    otherwise: why they are not run, or are none.
    """

    tests: str
    means: str = "works"
    note: str = ""
    otherwise: str = "its tests were not run"


def ddp(name: str) -> Cell:
    return Cell(rf"test_ddp.*{name}")


def spread(kind: str, name: str, note: str = "") -> Cell:
    return Cell(rf"test_model_parallel.*{name}.*\[{kind}\b", note=note)


def flat(engine: str, name: str) -> Cell:
    return Cell(rf"test_flattening.*test_two_processes_are_one\[{name}-{engine}\]")


def refused(tests: str, note: str) -> Cell:
    return Cell(tests, "refused", note)


def not_run(why: str) -> Cell:
    return Cell("", otherwise=why)


SPREAD, ENGINES, ZEROS = ("fsdp", "tp", "both"), ("fsdp1", "zero1", "zero2", "zero3"), ("zero1", "zero2", "zero3")
NO_CASTS = refused("test_every_strategy.*flat_pieces.*casts", "“format='fp8' casts the operands of each weight, and …”")
NO_FACTORS = refused(
    "test_every_strategy.*factors_in_the_forward_pass", "“… factors stay in the forward pass …; use storage='folded'”"
)
NO_DIVISION = refused("test_every_strategy.*divided", "“gradients divided by their own largest element …”")
NO_CLIPPING = refused(
    "test_flattening.*clipping_by_norm_is_refused",
    "by Lightning's FSDPStrategy: “`gradient_clip_algorithm='norm'` is currently not supported …”",
)
ON_CUDA = Cell(r"gpu\.test_past_one_device", otherwise="no GPU was available")
ALL_DTENSORS = "where all weights are DTensors; of split and whole ones together torch takes no norm"


def everywhere(kind: str, note: str = "") -> Cell:
    return spread(kind, "in_every_way", note)


def seen(engine: str, means: str = "works", note: str = "") -> Cell:
    return Cell(rf"test_flattening.*test_the_monitor_sees.*\[{engine}\]", means, note)


FEATURES: dict[str, tuple[Cell, ...]] = {
    "`umup`, folded": (
        ddp(r"are_one\[callback-folded\]"),
        *map(everywhere, SPREAD),
        *(flat(engine, "folded/plain") for engine in ENGINES),
    ),
    "`umup`, unit": (
        ddp(r"are_one\[callback-unit\]"),
        *map(everywhere, SPREAD),
        *(NO_FACTORS, flat("zero1", "unit/plain"), flat("zero2", "unit/plain"), NO_FACTORS),
    ),
    "`preserve`": (
        ddp(r"are_one_by_night\[preserve"),
        *map(everywhere, SPREAD),
        *(flat(engine, "preserve/plain") for engine in ENGINES),
    ),
    "`amax`": (ddp(r"are_one\[amax"), *map(everywhere, SPREAD), *[NO_DIVISION] * 4),
    "operands in bf16": (ddp(r"are_one_by_night\[callback-bf16"), *map(everywhere, SPREAD), *[NO_CASTS] * 4),
    "clipping by norm": (
        ddp(r"are_one_by_night\[clipped"),
        everywhere("fsdp"),
        *(everywhere(kind, ALL_DTENSORS) for kind in ("tp", "both")),
        NO_CLIPPING,
        *(flat(engine, "folded/clipped") for engine in ZEROS),
    ),
    "activation checkpointing": (
        ddp(r"are_one_by_night\[checkpointed"),
        *map(everywhere, SPREAD),
        *(flat(engine, "folded/checkpointed") for engine in ENGINES),
    ),
    "compiled blocks": (
        ddp(r"are_one_by_night\[compiled"),
        *map(everywhere, SPREAD),
        *(flat(engine, "folded/compiled") for engine in ENGINES),
    ),
    "4 processes": (
        ddp("four_processes_are_one"),
        *(spread(kind, "four_processes_are_one") for kind in ("fsdp", "tp")),
        everywhere("both"),
        *(Cell(rf"test_flattening.*test_four_processes_are_one\[{engine}\]") for engine in ENGINES),
    ),
    "a run goes on": (
        Cell(r"test_trainer_presets.*goes_on.*\[ddp_cpu-a file\]"),
        Cell(r"test_model_parallel.*other_numbers\[fsdp-2-4\]"),
        Cell(r"test_model_parallel.*other_numbers\[tp-2-2\]"),
        Cell(r"test_model_parallel.*other_numbers\[both-4-2\]"),
        *(Cell(rf"test_flattening.*test_a_run_goes_on\[{engine}\]") for engine in ENGINES),
    ),
    "`ScaleMonitor`": (
        ddp("monitors"),
        *(spread(kind, "monitor_sees_all_ranks") for kind in SPREAD),
        seen("fsdp1", "refused", "a warning: “ScaleMonitor has seen no product …”"),
        *(seen(engine) for engine in ("zero1", "zero2")),
        seen("zero3", note="DeepSpeed 0.19.8; where its products are functions of its own, the same warning"),
    ),
    "presets of the recipes (`trainer=`)": (
        *(
            Cell(rf"test_trainer_presets.*goes_on.*\[{preset}-a file\]")
            for preset in ("ddp_cpu", "fsdp2", "tensor_parallel", "fsdp2_tp")
        ),
        not_run("no preset"),
        *(Cell(rf"test_trainer_presets.*deepspeed.*\[{stage}\]") for stage in (1, 2, 3)),
    ),
    "CUDA, NCCL": (*[ON_CUDA] * 8,),
}
FAULTS: dict[str, Cell] = {
    "`ddp_spawn`": Cell(r"test_loading.*come_back_from_processes.*spawn\]", note="the plan comes back"),
    "`ddp_spawn_find_unused_parameters_true`": Cell(
        r"test_loading.*come_back.*unused_parameters_true\]", note="the same"
    ),
    "`ddp_fork`": Cell(r"test_loading.*come_back_from_processes.*fork\]", note="the same"),
    "experts that one rank does not see": Cell(r"test_ddp.*are_one\[routed", note="DDP"),
    "kill -9, restart": Cell("test_faults.*killed", note="the same weights, bit for bit"),
    "a disk that is full": refused("test_faults.*full_disk", "“… could not be written …”; the one before stays"),
    "a checkpoint that is none": refused("test_faults.*none_is_named", "“… not a readable checkpoint …”"),
    "a NaN batch": Cell("test_faults.*no_number", note="`NonFiniteSteps`: stop and name it, or skip and count"),
    "a rank that dies": Cell("test_faults.*rank_dies", note="the others end with an error"),
}


def outcomes(file: str) -> Iterator[tuple[str, str]]:
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            sys.exit(f"{name} failed: there is no table of that")
        yield name, "skipped" if "skipped" in kinds else "passed"


class Notes:
    """Numbered in the order in which they are asked for."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f" ({self.texts.index(text) + 1})"


def said(cell: Cell, passed: list[str], notes: Notes) -> str:
    if cell.tests and any(re.search(cell.tests, name) for name in passed):
        return cell.means + (notes.number(cell.note) if cell.note else "")
    return "not run" + notes.number(cell.otherwise)


def main() -> None:
    passed = [name for file in sys.argv[1:] for name, outcome in outcomes(file) if outcome == "passed"]
    notes = Notes()
    print(f"| | {' | '.join(STRATEGIES)} |\n|---|{'---|' * len(STRATEGIES)}")
    for feature, cells in FEATURES.items():
        assert len(cells) == len(STRATEGIES), feature
        print(f"| {feature} | {' | '.join(said(cell, passed, notes) for cell in cells)} |")
    print("\n" + "; ".join(f"({number}) {text}" for number, text in enumerate(notes.texts, start=1)) + ".\n")
    print("| what | outcome | tests | |\n|---|---|---|---|")
    for what, cell in FAULTS.items():
        count = sum(bool(re.search(cell.tests, name)) for name in passed)
        print(f"| {what} | {cell.means if count else 'not run'} | {count} | {cell.note} |")


if __name__ == "__main__":
    main()
