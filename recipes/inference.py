"""Use a trained model: generate text, predict a data set into a file, or measure it on held-out data.

    unitscale inference                                                # the newest checkpoint of `unitscale pretrain`
    unitscale inference model.path=… prompt="The with statement"       # or prompt_file=prompts.txt
    unitscale inference mode=predict model.path=… rows=reviews.jsonl output=answers.jsonl    # goes on if interrupted
    unitscale inference mode=predict model.path=…/digits/…/best.ckpt output=answers.parquet  # what its run held out
    unitscale inference mode=evaluate model.path=…                     # the scores of its validation
    unitscale inference mode=evaluate weights=[float32,bfloat16,fp8]   # size, held-out loss and speed of each

Without model.path and without a checkpoint, a small model is pre-trained first. A checkpoint is measured on what its
run held out, as the run's folder records it; data=… and task=… name something else.
"""

from __future__ import annotations

import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import hydra
import pytorch_lightning as pl
import torch
import transformers
from finetune import new_data
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.data.batches import language_model_batch
from lightning_unitscale.cookbook.inference import (
    PredictionWriter,
    check_prompts,
    finish,
    generate,
    generation_config,
    held_out_scores,
    read_rows,
    rows_done,
)
from lightning_unitscale.cookbook.pretrained import (
    CAUSAL_LM,
    TASK_HEADS,
    Pretrained,
    byte_tokenizer,
    context_length,
    load_pretrained,
)
from lightning_unitscale.cookbook.runs import text_data, train_base
from lightning_unitscale.cookbook.tasks import FineTuning, LanguageModeling
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import example_inputs, logits_of, to_plain
from lightning_unitscale.export.fp8_weights import WEIGHT_FORMATS, narrow_weights, stored_bytes

# ----------------------------------------------------------------------------------------------------------------------
# The run


@recipe("inference")
def main(cfg: DictConfig) -> Any:
    """One of the three tasks; returns its result."""
    check(cfg)
    transformers.logging.disable_progress_bar()
    path = cfg.model.path or newest_checkpoint(cfg)
    return {"generate": generate_texts, "predict": predict_rows, "evaluate": compare_formats}[cfg.mode](cfg, path)


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    if cfg.mode not in ("generate", "predict", "evaluate"):
        raise InputError(f"mode={cfg.mode} is not known; choose generate, predict or evaluate")
    if cfg.mode == "predict" and not cfg.output:
        raise InputError("mode=predict needs output=<.jsonl or .parquet>")
    if not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise InputError(f"batch_size={cfg.batch_size} must be a positive whole number")
    if cfg.part not in ("validation", "test"):
        raise InputError(f"part={cfg.part} is not known; choose validation or test")
    for name in weight_formats(cfg):
        if name not in (None, *WEIGHT_FORMATS):
            raise InputError(f"weights={name} is not known; choose from {', '.join(WEIGHT_FORMATS)}")
    if cfg.mode != "evaluate" and len(weight_formats(cfg)) > 1:
        raise InputError(f"mode={cfg.mode} takes one weight format; mode=evaluate compares several")
    if cfg.model.path is None and cfg.mode == "predict":
        raise InputError("mode=predict needs model.path=<checkpoint or folder>")


def weight_formats(cfg: DictConfig) -> list[str | None]:
    """The formats that weights are to be kept in; None: as they are stored."""
    return [cfg.weights] if cfg.weights is None or isinstance(cfg.weights, str) else list(cfg.weights)


def newest_checkpoint(cfg: DictConfig) -> str:
    """Of `unitscale pretrain`; made now if there is none."""
    found = sorted(Path("outputs/pretrain").glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    if found:
        print(f"model {found[-1]} (give another with model.path=…)\n")
        return str(found[-1])
    made = Path("outputs/pretrain/small/checkpoints/last.ckpt")
    print(
        "No model.path, and no checkpoint under outputs/pretrain: training a small model first "
        f"(unitscale pretrain {' '.join(cfg.model.base)})",
        flush=True,
    )
    loss = train_base(cfg.model.base, made)
    print(f"held-out loss {loss:.3f}; use it again with model.path={made}\n")
    return str(made)


def load(cfg: DictConfig, path: str, weights: str | None) -> Pretrained:
    """The model on the device of the configuration, its weights kept in this format."""
    found = load_pretrained(path, cfg.model.head, cfg.model.tokenizer)
    if found.fresh:
        raise InputError(
            f"model.path={path} has no weights for {', '.join(found.fresh)} of {type(found.model).__name__}; give the "
            "head that it was trained with: model.head=AutoModelFor…"
        )
    if weights not in (None, found.weights):
        if found.weights != "float32":
            raise InputError(f"model.path={path} has weights in {found.weights}; leave out weights={weights}")
        found.model = cast(
            PreTrainedModel, to_plain(found.model, partial(logits_of, inputs=example_inputs(found.model)))
        )
        narrow_weights(found.model, str(weights), found.plan)
        found.weights = str(weights)
    device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else cfg.device.replace("auto", "cpu")
    torch.nn.Module.to(found.model, device)
    return found


def load_with_tokenizer(cfg: DictConfig, path: str) -> Pretrained:
    """As `load`, with a tokenizer that can pad."""
    found = load(cfg, path, weight_formats(cfg)[0])
    tokenizer = found.tokenizer
    if tokenizer is None:
        raise InputError(f"model.path={path} has no tokenizer beside it; give one: model.tokenizer=<path, or bytes>")
    if tokenizer.pad_token is None:  # its positions are masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InputError(f"model.path={path}: the tokenizer has no pad, eos, bos or unk token to pad texts with")
    if found.model.config.pad_token_id is None:
        found.model.config.pad_token_id = tokenizer.pad_token_id
    return found


def print_numbers(**numbers: str) -> None:
    """The numbers of a run, and its peak memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    for name, value in {**numbers, "peak memory": f"{peak:,.0f} MiB"}.items():
        print(f"{name.replace('_', ' '):20} {value}")


# ----------------------------------------------------------------------------------------------------------------------
# Text from prompts


def generate_texts(cfg: DictConfig, path: str) -> list[str]:
    """One text streams to the terminal as it comes; many are generated in batches."""
    prompts = read_prompts(cfg)
    found = load_with_tokenizer(cfg, path)
    model, tokenizer = found.model, found.tokenizer
    assert tokenizer is not None
    if not model.can_generate():
        raise InputError(f"{type(model).__name__} does not write text; mode=predict and mode=evaluate are for it")
    config = generation_of(cfg, model, tokenizer)
    check_prompts(model, tokenizer, prompts, config.max_new_tokens)
    stream = len(prompts) == 1 and config.num_beams in (None, 1)
    torch.manual_seed(cfg.seed)
    done = []
    for start in range(0, len(prompts), cfg.batch_size):
        batch = prompts[start : start + cfg.batch_size]
        done.append(generate(model, tokenizer, batch, config, stream=stream))
        if not stream:
            print("\n".join(f"--- {prompt}{text}\n" for prompt, text in zip(batch, done[-1].texts, strict=True)))
    tokens, seconds = sum(d.tokens for d in done), sum(d.seconds for d in done)
    print_numbers(
        tokens=f"{tokens:,} in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s",
        time_to_first_token=f"{1000 * done[0].first_token_s:.1f} ms",
    )
    return [text for d in done for text in d.texts]


def read_prompts(cfg: DictConfig) -> list[str]:
    """The prompt, or those of a file."""
    if cfg.prompt_file is None:
        return [str(cfg.prompt)]
    file = Path(cfg.prompt_file).expanduser()
    if not file.is_file():
        raise InputError(f"prompt_file={cfg.prompt_file}: no such file (looked in {Path.cwd()})")
    return [line for line in file.read_text().splitlines() if line.strip()]


def generation_of(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> transformers.GenerationConfig:
    """The generation settings of this run."""
    settings: Any = OmegaConf.to_container(cfg.generation, resolve=True)
    return generation_config(model, tokenizer, settings)


# ----------------------------------------------------------------------------------------------------------------------
# A data set into a file


class TextPredictor(pl.LightningModule):
    """Generated text for each text."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: transformers.GenerationConfig
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config

    def predict_step(self, batch: list[str], batch_idx: int) -> dict[str, Any]:
        """One entry for each text."""
        return {"text": generate(self.model, self.tokenizer, batch, self.config).texts}


class ClassPredictor(pl.LightningModule):
    """The likeliest class for each text or image, and how likely it is."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.names: Any = model.config.id2label

    def predict_step(self, batch: list[str] | dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One entry for each text, or for each example of a task's batch, with its true class."""
        if isinstance(batch, list):
            assert self.tokenizer is not None
            context = context_length(self.model)
            inputs = self.tokenizer(
                batch, return_tensors="pt", padding=True, truncation=context is not None, max_length=context
            ).to(self.device)
            known = {}
        else:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            known = {"target": self._names_of(batch["labels"])}
        probabilities = self.model(**inputs).logits.float().softmax(-1)  # [batch, classes]
        score, number = probabilities.max(-1)
        return {"label": self._names_of(number), "score": score, **known}

    def _names_of(self, numbers: Tensor) -> list[str]:
        return [self.names[number] for number in numbers.tolist()]


def predict_rows(cfg: DictConfig, path: str) -> Path:
    """Every row of the data set, after those that an interrupted run has done."""
    output = Path(cfg.output)
    rows: Any = read_rows(cfg.rows, cfg.column) if cfg.rows else None
    done = rows_done(output)
    if rows is None:
        found = load(cfg, path, weight_formats(cfg)[0])
        rows, collate, predictor = held_out_rows(cfg, found)
    else:
        found = load_with_tokenizer(cfg, path)
        collate, predictor = list, predictor_of_texts(cfg, found, rows, done)
    if done > len(rows):
        raise InputError(f"output={output} has {done} rows and the data set only {len(rows)}; give another name")
    begin = time.perf_counter()
    trainer = pl.Trainer(
        accelerator="cpu" if found.model.device.type == "cpu" else "auto",
        devices=1,
        logger=False,
        callbacks=[PredictionWriter(output, start=done)],
        enable_model_summary=False,
        enable_progress_bar=cfg.progress_bar,
    )
    loader: DataLoader[Any] = DataLoader(
        Subset(rows, range(done, len(rows))), batch_size=cfg.batch_size, collate_fn=collate
    )
    try:
        trainer.predict(predictor, loader, return_predictions=False)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        print(f"\nStopped after {rows_done(output)} of {len(rows)} rows. The same command goes on from there.")
        sys.exit(130)
    finish(output)
    seconds = time.perf_counter() - begin
    now = len(rows) - done
    print_numbers(
        rows=f"{now:,} in {seconds:.2f} s, {now / seconds:,.1f} rows/s ({done:,} were done)", output=str(output)
    )
    return output


def predictor_of_texts(cfg: DictConfig, found: Pretrained, rows: list[str], done: int) -> pl.LightningModule:
    """What the model makes of texts.

    Raises:
        InputError: it neither writes nor has classes for whole texts, or a row does not fit its context.
    """
    model, tokenizer = found.model, found.tokenizer
    assert tokenizer is not None
    if model.can_generate():
        config = generation_of(cfg, model, tokenizer)
        check_prompts(model, tokenizer, rows[done:] or rows, config.max_new_tokens)
        return TextPredictor(model, tokenizer, config)
    if TASK_HEADS.get(found.head) != "text_classification":
        raise InputError(f"{type(model).__name__} neither writes text nor has classes for whole texts")
    return ClassPredictor(model, tokenizer)


def held_out_rows(cfg: DictConfig, found: Pretrained) -> tuple[Any, Any, pl.LightningModule]:
    """The examples that the model's run held out, what makes a batch of them, and the predictor."""
    if TASK_HEADS.get(found.head) not in ("text_classification", "image_classification"):
        raise InputError(f"mode=predict needs rows=<file with the texts> for a {type(found.model).__name__}")
    _, batches = held_out(cfg, found)
    return batches.dataset, batches.collate_fn, ClassPredictor(found.model, None)


# ----------------------------------------------------------------------------------------------------------------------
# Held-out scores, and what narrow weights do to them


def compare_formats(cfg: DictConfig, path: str) -> dict[str, dict[str, float]]:
    """Size, held-out scores and speed with weights in each format."""
    sizes, scores, speeds, unit = {}, {}, {}, ""
    for weights in weight_formats(cfg):
        found = load(cfg, path, weights)
        module, batches = held_out(cfg, found)
        begin = time.perf_counter()
        values, count = held_out_scores(module, batches)
        unit = "tokens/s" if found.model.can_generate() else "examples/s"
        sizes[found.weights] = stored_bytes(found.model) / 2**20
        speeds[found.weights] = count / (time.perf_counter() - begin)
        scores[found.weights] = values
    names = list(next(iter(scores.values())))
    print(f"{'weights':10} {'MiB':>8} {' '.join(f'{name:>12}' for name in names)} {unit:>10}")
    for weights, values in scores.items():
        shown = " ".join(f"{values[name]:12.5f}" for name in names)
        print(f"{weights:10} {sizes[weights]:8.2f} {shown} {speeds[weights]:10,.0f}")
    slower = [name for name in speeds if name != "float32" and speeds[name] < 1.05 * speeds.get("float32", 0)]
    if slower:
        print(f"\n{' and '.join(slower)}: no faster than float32 on this machine; they save memory alone")
    print()
    print_numbers()
    return scores


def held_out(cfg: DictConfig, found: Pretrained) -> tuple[FineTuning, DataLoader[Any]]:
    """The task around the model, and the batches that its run held out."""
    run = run_of(cfg, found)
    task: type[FineTuning] = LanguageModeling
    batches: DataLoader[Any]
    if "_target_" not in run.task:  # of `unitscale pretrain`
        batches = DataLoader(text_data(run).held_out, run.data.batch_size, collate_fn=language_model_batch)
    else:
        task = get_class(run.task._target_)
        examples = instantiate(run.data[run.task.data])
        if run.task.data in ("labelled", "images"):
            check_labels(found.model, examples)
        data = new_data(run, found, examples)
        batches = data.val_dataloader() if cfg.part == "validation" else data.test_dataloader()
    config = found.model.config.to_dict()
    module = task(model=config, head=found.head, optimizer={}, schedule={}, weights=found.model)
    return module.to(found.model.device), batches


def run_of(cfg: DictConfig, found: Pretrained) -> DictConfig:
    """The configuration of the run that made the model, with the task, data and sizes that this one names.

    Raises:
        InputError: there is no record of such a run, and nothing else says what to measure the model on; or the task
            is for another head.
    """
    run = recorded_run(found.path)
    if run is None:
        run = default_run(found)
        if cfg.get("data") is None and found.head != CAUSAL_LM:
            raise InputError(
                f"nothing beside model.path={found.path} records what it was trained on; name it with data=…"
            )
    OmegaConf.set_struct(run, False)
    for group in ("task", "data"):
        if cfg.get(group) is not None:
            run[group] = cfg[group]
    wanted = run.task.get("head", CAUSAL_LM)
    if wanted != found.head:
        raise InputError(f"the task is for {wanted}, but the model's head is {found.head}; give another with task=…")
    if "_target_" in run.task and run.task.data not in run.data:
        raise InputError(
            f"the task needs data with `{run.task.data}`, which this data has not; name others with data=…"
        )
    if cfg.sequence_length is not None:
        run.task.sequence_length = cfg.sequence_length
    context = context_length(found.model)
    if context is not None and run.task.get("sequence_length", 0) > context:
        raise InputError(f"sequence_length={run.task.sequence_length} is longer than the model's context, {context}")
    run.data.batch_size = cfg.batch_size
    return run


def recorded_run(path: str) -> DictConfig | None:
    """What Hydra noted in the folder of the run, two levels above its checkpoints and one above its other models."""
    where = Path(path).expanduser().resolve()
    record = (where.parents[1] if where.is_file() else where.parent) / ".hydra" / "config.yaml"
    if not record.is_file():
        return None
    run = OmegaConf.load(record)
    return run if isinstance(run, DictConfig) and {"task", "data", "trainer"} <= run.keys() else None


def default_run(found: Pretrained) -> DictConfig:
    """For a model without a record: of bytes, what `unitscale pretrain` holds out; else documentation in windows."""
    of_bytes = found.tokenizer is not None and found.tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    if found.head == CAUSAL_LM and of_bytes:
        run = hydra.compose("pretrain")
    elif found.head in TASK_HEADS:
        run = hydra.compose("finetune", [f"task={TASK_HEADS[found.head]}", "data=topics"])
    else:
        raise InputError(f"mode=evaluate knows no task for {found.head}; it knows {', '.join(TASK_HEADS)}")
    context = context_length(found.model)
    if context is not None and "sequence_length" in run.task:
        run.task.sequence_length = min(run.task.sequence_length, context)
    return run


def check_labels(model: PreTrainedModel, examples: Any) -> None:
    """
    Raises:
        InputError: an example has a class that the model does not know.
    """
    known: Any = model.config.label2id
    unknown = sorted({example.label for example in examples} - set(known))
    if unknown:
        raise InputError(
            f"the data has the class {unknown[0]!r}, but the model knows only {', '.join(map(repr, list(known)[:10]))}"
        )


if __name__ == "__main__":
    main()
