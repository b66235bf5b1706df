"""What `-m` ends with: a line for each of its runs, with what it was given beside the others and what it returned."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

SCORE = "score.yaml"  # in the folder of a run, beside what Hydra notes there: runs may be of other processes


class MultirunSummary(Callback):
    """Notes the score that each run of a multirun returns, and prints all of them at its end.

    Args:
        mode: "min" or "max", which score is the best.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.begun = math.inf  # seconds since the epoch

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The folder may hold runs of an earlier one."""
        self.begun = time.time()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Hydra calls this in the process of the run."""
        scored = job_return.status == JobStatus.COMPLETED and isinstance(job_return.return_value, float)
        if config.hydra.mode == RunMode.MULTIRUN and scored:
            note = {"overrides": job_return.overrides, "score": job_return.return_value}
            OmegaConf.save(OmegaConf.create(note), Path(config.hydra.runtime.output_dir) / ".hydra" / SCORE)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints in the order in which the runs were begun."""
        folder = Path(config.hydra.sweep.dir)
        files = [file for file in folder.glob(f"*/.hydra/{SCORE}") if file.stat().st_mtime >= self.begun]
        files.sort(key=lambda file: (len(file.parts[-3]), file.parts[-3]))  # 2 before 10
        notes = {file.parts[-3]: OmegaConf.load(file) for file in files}
        if len(notes) > 1:
            print(
                summary(folder, {name: (list(note.overrides), note.score) for name, note in notes.items()}, self.mode)
            )


def summary(folder: Path, runs: dict[str, tuple[list[str], float]], mode: str) -> str:
    """The lines.

    Args:
        folder: of all runs.
        runs: name of its folder -> overrides and score.
        mode: "min" or "max".
    """
    shared = set.intersection(*(set(overrides) for overrides, _ in runs.values()))
    own = {name: " ".join(o for o in overrides if o not in shared) for name, (overrides, _) in runs.items()}
    finite = [score for _, score in runs.values() if math.isfinite(score)]
    best = (max if mode == "max" else min)(finite, default=None)
    width, names = max(map(len, own.values())), max(map(len, runs))
    lines = [f"\n{len(runs)} runs in {folder}"]
    for name, (_, score) in runs.items():
        mark = "  best" if score == best else ""
        lines.append(f"  {name:>{names}}  {own[name]:{width}}  {score:10.4f}{mark}")
    return "\n".join(lines)
