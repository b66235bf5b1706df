"""The page of a training run: begun with the run, so that one that is killed has it too; its numbers at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from lightning_unitscale.callback import UnitScaling
from lightning_unitscale.cookbook.callbacks import Stopped, StopWhenDiverged
from lightning_unitscale.cookbook.run_record import in_words, run_before, run_facts, untouched_twin
from lightning_unitscale.engine.record.spread_tensors import number_of_elements
from lightning_unitscale.monitor.readable import readable
from lightning_unitscale.monitor.report import write_beginning, write_report
from lightning_unitscale.namespaces import callbacks_of

FINISHED = "finished"
TOO_SHORT = 10  # steps: fewer need not lower the loss
LEARNED = 0.99  # of the loss of a model that knows nothing: what is above it may be noise
OF_TOKENS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
OF_CLASSES = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")


class RunReport:
    """The page of one run.

    Args:
        trainer: before the run, and still there after it.
        score: the name in the metrics by which it is judged.
        data: what it is trained on, in words.
    """

    def __init__(self, cfg: DictConfig, trainer: pl.Trainer, *, title: str, score: str, data: str) -> None:
        self.cfg, self.trainer = cfg, trainer
        self.title, self.score, self.data = title, score, data
        self.folder, self.before = Path(cfg.folder), run_before(cfg.ckpt_path)
        if trainer.is_global_zero:
            facts = run_facts(cfg, trainer, data)
            write_beginning(self.folder, title=title, score=score, facts=facts, before=self.before)

    def end(
        self,
        unitscale: UnitScaling | None,
        stopped: Stopped | None,
        metrics: Mapping[str, float],
        shown: Sequence[str | Path] = (),
    ) -> None:
        """Prints the numbers of the run, of one that was stopped too, and writes its page.

        Args:
            stopped: what ended it before its end, if anything did.
            shown: as for `write_report`.
        """
        parameters = list(self.trainer.lightning_module.parameters())
        numbers = {
            **metrics,
            "parameters": sum(map(number_of_elements, parameters)),
            "parameters trained": sum(number_of_elements(p) for p in parameters if p.requires_grad),
            "steps": self.trainer.global_step,
        }
        plan = unitscale.plan if unitscale else None
        ending = str(stopped or not_learned(self.trainer, metrics) or FINISHED)
        page = write_report(
            self.folder,
            title=self.title,
            ending=ending,
            score=self.score,
            metrics=numbers,
            shown=shown,
            facts=run_facts(self.cfg, self.trainer, self.data),
            scaling=in_words(plan),
            plan=plan.summary() if plan else "no unit scaling",
            untouched=untouched_twin(self.folder),
            before=self.before,
        )
        width = max(map(len, numbers))
        print("\n" + "\n".join(f"{name:{width}} {readable(value):>12}" for name, value in numbers.items()))
        if ending != FINISHED:
            print(f"\n{ending}")
        print(f"\nreport {page}")


def not_learned(trainer: pl.Trainer, metrics: Mapping[str, float]) -> str:
    """What to say of a run that came to its end with next to nothing learned; empty of others, or if it can't be known.

    A training from the start is to end below its own first loss and below a blind guess; a fine-tuning below what was
    there before.
    """
    watch = next((callback for callback in callbacks_of(trainer) if isinstance(callback, StopWhenDiverged)), None)
    if watch is None or trainer.global_step < TOO_SHORT:
        return ""
    loss, first, guess = metrics.get("val/loss"), watch.first_loss, blind_guess(trainer.lightning_module)
    tested, before = metrics.get("test/loss"), metrics.get("test/loss, before")
    if loss is not None and first is not None and not loss < LEARNED * min(first, guess):
        said = f"the held-out loss is {readable(loss)}, where the first step's was {readable(first)}"
        said += f" and a blind guess has {readable(guess)}" if math.isfinite(guess) else ""
    elif tested is not None and before is not None and not tested < before:
        said = f"the test loss is {readable(tested)}, where it was {readable(before)} before"
    else:
        return ""
    return (
        f"finished, but next to nothing was learned: {said}. Try another learning rate: "
        f"optimizer.lr={watch.rate_to_try(trainer):g}"
    )


def blind_guess(module: pl.LightningModule) -> float:
    """The loss of equal odds for all tokens or classes, in nats; infinite where the model gives no such odds."""
    head, config = str(module.hparams.get("head", "")), getattr(getattr(module, "model", None), "config", None)
    if head in OF_TOKENS:
        choices = getattr(config, "vocab_size", None)
    else:
        choices = getattr(config, "num_labels", None) if head in OF_CLASSES else None
    return math.log(choices) if isinstance(choices, int) and choices > 1 else math.inf
