"""The table "Past one device" of the package's README, from results of tests:

    python -m pytest -m "slow or not slow" --junitxml=/tmp/results.xml tests/doors/test_ddp.py \
        tests/doors/test_model_parallel.py tests/doors/test_every_strategy.py tests/doors/test_faults.py
    PYTHONPATH=tests python -m support.past_one_device /tmp/results.xml

A row works if all its tests passed, and is refused if they are tests of a refusal; it is not run if there is no test of
it in the results, or none that was not skipped. There is no fourth outcome: a test that failed ends the program.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

WORKS, REFUSED = "works", "refused"
ROWS: list[tuple[str, str, str, str]] = [  # what, tests that match, what passing means, what a reader should know
    ("DDP, two processes started beforehand", r"test_ddp.*test_two_processes_are_one", WORKS, "1e-12 of one process"),
    ("… experts that one rank does not see", r"test_ddp.*routed", WORKS, ""),
    ("… started by `ddp_spawn`, `ddp_fork`", r"test_loading.*come_back_from_processes", WORKS, ""),
    ("FSDP2 (`fully_shard`), 2 ranks", r"test_model_parallel.*one_in_every_way\[fsdp\]", WORKS, "1e-9; see below"),
    ("… 4 ranks", r"test_model_parallel.*test_four_processes_are_one\[fsdp\]", WORKS, "1e-9"),
    ("tensor parallel, 2 ranks", r"test_model_parallel.*one_in_every_way\[tp\]", WORKS, "1e-9; see below"),
    ("… 4 ranks", r"test_model_parallel.*test_four_processes_are_one\[tp\]", WORKS, "1e-9"),
    ("FSDP2 × tensor parallel, 2 × 2", r"test_model_parallel.*test_four_processes_are_one\[both\]", WORKS, "1e-9"),
    (
        "a run of 2 ranks goes on with 4",
        r"test_model_parallel.*other_numbers\[fsdp-2-4\]",
        WORKS,
        "one file, or shards",
    ),
    ("a run of 2 × 2 goes on with 2", r"test_model_parallel.*other_numbers\[both-4-2\]", WORKS, "one file, or shards"),
    ("a split run goes on", r"test_model_parallel.*other_numbers\[tp-2-2\]", WORKS, "one file, or shards"),
    ("`ScaleMonitor` over all ranks", r"test_model_parallel.*monitor_sees_all_ranks", WORKS, ""),
    ("FSDP1", r"test_every_strategy.*FSDP1", REFUSED, "“FSDP1 flattens parameters before the first batch …”"),
    ("DeepSpeed", r"test_every_strategy.*DeepSpeed", REFUSED, "“DeepSpeed flattens parameters before …”"),
    ("kill -9, restart", r"test_faults.*killed", WORKS, "the same weights, bit for bit"),
    (
        "a disk that is full",
        r"test_faults.*full_disk",
        REFUSED,
        "“… could not be written …”; the checkpoint before stays",
    ),
    ("a checkpoint that is none", r"test_faults.*none_is_named", REFUSED, "“… not a readable checkpoint …”"),
    ("a NaN batch", r"test_faults.*no_number", WORKS, "`NonFiniteSteps`: stop and name it, or skip and count"),
    ("a rank that dies", r"test_faults.*rank_dies", WORKS, "the others end with an error"),
    ("any of it on CUDA and NCCL", r"tests\.gpu", WORKS, "no GPU was available"),
]


def outcomes(file: str) -> Iterator[tuple[str, str]]:
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            sys.exit(f"{name} failed: there is no table of that")
        yield name, "skipped" if "skipped" in kinds else "passed"


def main() -> None:
    known = [outcome for file in sys.argv[1:] for outcome in outcomes(file)]
    print("| what | outcome | tests | |\n|---|---|---|---|")
    for what, pattern, means, note in ROWS:
        passed = [name for name, outcome in known if outcome == "passed" and re.search(pattern, name)]
        print(f"| {what} | {means if passed else 'not run'} | {len(passed)} | {note} |")


if __name__ == "__main__":
    main()
