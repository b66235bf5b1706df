"""The end of a training run: its numbers printed, and its page written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.cookbook.callbacks import Stopped
from lightning_unitscale.cookbook.run_record import in_words, run_before, run_facts, untouched_twin
from lightning_unitscale.engine.record.spread_tensors import number_of_elements
from lightning_unitscale.monitor.readable import readable
from lightning_unitscale.monitor.report import write_report


def report_run(
    cfg: DictConfig,
    trainer: pl.Trainer,
    unitscale: UnitScaling | None,
    stopped: Stopped | None,
    *,
    title: str,
    score: str,
    metrics: Mapping[str, float],
    data: str,
    shown: Sequence[str | Path] = (),
) -> None:
    """Prints the numbers of a run, of one that was stopped too, and writes its page.

    Args:
        stopped: what ended it before its end, if anything did.
        score: the name in `metrics` by which it is judged.
        data: what it was trained on, in words.
        shown: as for `write_report`.
    """
    parameters = list(trainer.lightning_module.parameters())
    numbers = {
        **metrics,
        "parameters": sum(map(number_of_elements, parameters)),
        "parameters trained": sum(number_of_elements(p) for p in parameters if p.requires_grad),
        "steps": trainer.global_step,
    }
    plan = unitscale.plan if unitscale else None
    page = write_report(
        Path(cfg.folder),
        title=title,
        ending=str(stopped or "finished"),
        score=score,
        metrics=numbers,
        shown=shown,
        facts=run_facts(cfg, trainer, data),
        scaling=in_words(plan),
        plan=plan.summary() if plan else "no unit scaling",
        untouched=untouched_twin(Path(cfg.folder)),
        before=run_before(cfg.ckpt_path),
    )
    print("\n" + "\n".join(f"{name:40} {readable(value):>12}" for name, value in numbers.items()))
    if stopped:
        print(f"\n{stopped}")
    print(f"\nreport {page}")
