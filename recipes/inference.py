"""Use a trained model: generate text, predict a data set into a file, or measure it on held-out text.

    unitscale inference                                                # the newest checkpoint of `unitscale pretrain`
    unitscale inference model.path=… prompt="The with statement"       # or prompt_file=prompts.txt
    unitscale inference mode=predict model.path=… rows=reviews.jsonl output=answers.jsonl    # goes on if interrupted
    unitscale inference mode=evaluate weights=[float32,bfloat16,fp8]   # size, held-out loss and speed of each

Without model.path and without a checkpoint, a small model is pre-trained first.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.cli import recipe
from lightning_unitscale.config import shipped
from lightning_unitscale.data import ByteText
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import example_inputs, logits_of, to_plain
from lightning_unitscale.inference import (
    WEIGHT_FORMATS,
    PredictionWriter,
    check_prompts,
    finish,
    generate,
    generation_config,
    held_out_loss,
    narrow_weights,
    read_rows,
    rows_done,
    stored_bytes,
)
from lightning_unitscale.pretrained import Pretrained, byte_tokenizer, load_pretrained

# ----------------------------------------------------------------------------------------------------------------------
# The run


@recipe("inference")
def main(cfg: DictConfig) -> Any:
    """One of the three tasks; returns its result."""
    check(cfg)
    transformers.logging.disable_progress_bar()
    path = cfg.model.path or newest_checkpoint()
    return {"generate": generate_texts, "predict": predict_rows, "evaluate": compare_formats}[cfg.mode](cfg, path)


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    if cfg.mode not in ("generate", "predict", "evaluate"):
        raise InputError(f"mode={cfg.mode} is not known; choose generate, predict or evaluate")
    if cfg.mode == "predict" and not (cfg.rows and cfg.output):
        raise InputError("mode=predict needs rows=<file with the inputs> and output=<.jsonl or .parquet>")
    if not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise InputError(f"batch_size={cfg.batch_size} must be a positive whole number")
    for name in weight_formats(cfg):
        if name not in WEIGHT_FORMATS:
            raise InputError(f"weights={name} is not known; choose from {', '.join(WEIGHT_FORMATS)}")
    if cfg.mode != "evaluate" and len(weight_formats(cfg)) > 1:
        raise InputError(f"mode={cfg.mode} takes one weight format; mode=evaluate compares several")
    if cfg.model.path is None and cfg.mode == "predict":
        raise InputError("mode=predict needs model.path=<checkpoint or folder>")


def weight_formats(cfg: DictConfig) -> list[str]:
    """The formats that weights are to be kept in."""
    return [cfg.weights] if isinstance(cfg.weights, str) else list(cfg.weights)


def newest_checkpoint() -> str:
    """Of `unitscale pretrain`, made first if there is none."""
    for first in (True, False):
        found = sorted(Path("outputs/pretrain").glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
        if found:
            print(f"model {found[-1]} (give another with model.path=…)\n")
            break
        if first:
            print(
                "no model.path, and no checkpoint under outputs/pretrain: pre-training a small model first\n",
                flush=True,
            )
            settings = ["model.width=128", "trainer.max_steps=150", "trainer.val_check_interval=150"]
            subprocess.run([sys.executable, shipped("recipes") / "pretrain.py", *settings], check=True)
    return str(found[-1])


def load(cfg: DictConfig, path: str, weights: str) -> tuple[Pretrained, PreTrainedTokenizerBase]:
    """The model on the device of the configuration, its weights kept in this format, and its tokenizer."""
    found = load_pretrained(path, cfg.model.head, cfg.model.tokenizer)
    if found.tokenizer is None:
        raise InputError(f"model.path={path} has no tokenizer beside it; give one: model.tokenizer=<path, or bytes>")
    if weights != "float32":
        found.model = cast(
            PreTrainedModel, to_plain(found.model, partial(logits_of, inputs=example_inputs(found.model)))
        )
        narrow_weights(found.model, weights, found.plan)
    device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else cfg.device.replace("auto", "cpu")
    torch.nn.Module.to(found.model, device)
    return found, found.tokenizer


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
    found, tokenizer = load(cfg, path, weight_formats(cfg)[0])
    config = generation_of(cfg, found.model, tokenizer)
    check_prompts(found.model, tokenizer, prompts, config.max_new_tokens)
    stream = len(prompts) == 1 and config.num_beams in (None, 1)
    torch.manual_seed(cfg.seed)
    done = []
    for start in range(0, len(prompts), cfg.batch_size):
        batch = prompts[start : start + cfg.batch_size]
        done.append(generate(found.model, tokenizer, batch, config, stream=stream))
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
    """Classes where the model has them, generated text where it writes."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: transformers.GenerationConfig
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config

    def predict_step(self, batch: list[str], batch_idx: int) -> dict[str, Any]:
        """One entry for each text."""
        if self.model.can_generate():
            return {"text": generate(self.model, self.tokenizer, batch, self.config).texts}
        inputs = self.tokenizer(batch, return_tensors="pt", padding=True, truncation=True).to(self.device)
        probabilities = self.model(**inputs).logits.float().softmax(-1)  # [batch, classes]
        score, number = probabilities.max(-1)
        names: Any = self.model.config.id2label
        return {"label": [names[int(n)] for n in number], "score": score}


def predict_rows(cfg: DictConfig, path: str) -> Path:
    """Every row of the data set, after those that an interrupted run has done."""
    output = Path(cfg.output)
    rows = read_rows(cfg.rows, cfg.column)
    done = rows_done(output)
    if done > len(rows):
        raise InputError(f"output={output} has {done} rows and the data set only {len(rows)}; give another name")
    found, tokenizer = load(cfg, path, weight_formats(cfg)[0])
    config = generation_of(cfg, found.model, tokenizer)
    if found.model.can_generate():
        check_prompts(found.model, tokenizer, rows[done:] or rows, config.max_new_tokens)
    begin = time.perf_counter()
    trainer = pl.Trainer(
        accelerator="cpu" if found.model.device.type == "cpu" else "auto",
        devices=1,
        logger=False,
        callbacks=[PredictionWriter(output, start=done)],
        enable_model_summary=False,
        enable_progress_bar=cfg.progress_bar,
    )
    loader: DataLoader[str] = DataLoader(rows[done:], batch_size=cfg.batch_size, collate_fn=list)  # type: ignore[arg-type]
    try:
        trainer.predict(TextPredictor(found.model, tokenizer, config), loader, return_predictions=False)
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


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss, and what narrow weights do to it


def compare_formats(cfg: DictConfig, path: str) -> dict[str, float]:
    """Size, held-out loss and speed with weights in each format."""
    results: dict[str, tuple[float, float, float]] = {}
    for weights in weight_formats(cfg):
        found, tokenizer = load(cfg, path, weights)
        loader = held_out(cfg, found.model, tokenizer)
        begin = time.perf_counter()
        loss, tokens = held_out_loss(found.model, loader)
        results[weights] = stored_bytes(found.model) / 2**20, loss, tokens / (time.perf_counter() - begin)
    print(f"{'weights':10} {'MiB':>8} {'held-out loss':>14} {'tokens/s':>10}")
    for weights, (size, loss, speed) in results.items():
        print(f"{weights:10} {size:8.2f} {loss:14.5f} {speed:10,.0f}")
    full = results.get("float32")
    slower = [name for name, (_, _, speed) in results.items() if full and name != "float32" and speed < 1.05 * full[2]]
    if slower:
        print(f"\n{' and '.join(slower)}: no faster than float32 on this machine; they save memory alone")
    print()
    print_numbers()
    return {weights: loss for weights, (_, loss, _) in results.items()}


def held_out(cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DataLoader[Any]:
    """The held-out windows that `unitscale pretrain` validates on."""
    if tokenizer.get_vocab() != byte_tokenizer().get_vocab():
        raise InputError("mode=evaluate measures models of bytes; this one has another tokenizer")
    length = cfg.sequence_length or model.config.max_position_embeddings
    if length > model.config.max_position_embeddings:
        raise InputError(
            f"sequence_length={length} is longer than the model's context, {model.config.max_position_embeddings}"
        )
    data = ByteText(
        instantiate(cfg.data.documents),
        sequence_length=length,
        batch_size=cfg.batch_size,
        steps=1,
        held_out=cfg.data.held_out,
        seed=cfg.seed,
        workers=cfg.data.workers,
    )
    return data.val_dataloader()


if __name__ == "__main__":
    main()
