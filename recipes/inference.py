"""Use a trained model: generate text, talk, predict a data set into a file, or measure it on held-out data.

    unitscale inference                                                # the newest checkpoint of `unitscale pretrain`
    unitscale inference model.path=… prompt="The with statement"       # or prompt_file=prompts.txt
    unitscale inference mode=chat model.path=…                         # talk to a model of experiment=dialogue
    unitscale inference mode=predict model.path=… rows=reviews.jsonl output=answers.jsonl    # goes on if interrupted
    unitscale inference mode=predict model.path=…/digits/…/best.ckpt output=answers.parquet  # what its run held out
    unitscale inference mode=evaluate model.path=…                     # the scores of its validation
    unitscale inference mode=evaluate weights=[float32,bfloat16,fp8]   # size, held-out loss and speed of each

Without model.path and without a checkpoint, a small model is pre-trained first. A checkpoint is measured on what its
run held out, as the run's folder records it; data=… and task=… name something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from omegaconf import DictConfig

from lightning_unitscale.checkpoint import read_checkpoint
from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.inference.chat import chat
from lightning_unitscale.cookbook.inference.evaluation import compare_formats
from lightning_unitscale.cookbook.inference.loading import weight_formats
from lightning_unitscale.cookbook.inference.prediction import predict_rows
from lightning_unitscale.cookbook.inference.recorded_run import debug_of
from lightning_unitscale.cookbook.inference.text import generate_texts
from lightning_unitscale.cookbook.runs import train_base
from lightning_unitscale.cookbook.wrong_values import check_choices, check_whole_numbers
from lightning_unitscale.errors import InputError, UnitScalingError

MODES = {"generate": generate_texts, "chat": chat, "predict": predict_rows, "evaluate": compare_formats}


@recipe("inference")
def main(cfg: DictConfig) -> Any:
    """What the mode does; returns its result."""
    check(cfg)
    transformers.logging.disable_progress_bar()
    path = cfg.model.path or newest_checkpoint(cfg)
    return MODES[cfg.mode](cfg, path)


def check(cfg: DictConfig) -> None:
    """Raises InputError for settings that would fail late or obscurely."""
    check_choices("inference", cfg)
    if cfg.mode == "predict" and not cfg.output:
        raise InputError("mode=predict needs output=<.jsonl or .parquet>")
    check_whole_numbers(cfg, "batch_size")
    if cfg.mode != "evaluate" and len(weight_formats(cfg)) > 1:
        raise InputError(f"mode={cfg.mode} takes one weight format; mode=evaluate compares several")
    if cfg.model.path is None and cfg.mode == "predict":
        raise InputError("mode=predict needs model.path=<checkpoint or folder>")


def newest_checkpoint(cfg: DictConfig) -> str:
    """Of `unitscale pretrain`, the newest that can be used, of a run with debug=… where there is no other.

    It is made now if there is none.
    """
    found = Path("outputs/pretrain").rglob("checkpoints/last.ckpt")  # of a sweep too
    newest = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)
    debug = {file: option for file in newest if (option := debug_of(str(file)))}
    for file in [*(file for file in newest if file not in debug), *debug]:
        if reason := why_unusable(file):
            print(f"passed over {file}: {reason}")
            continue
        for newer in () if file in debug else newest[: newest.index(file)]:
            if newer in debug:
                print(f"passed over {newer}: of a run with debug={debug[newer]}")
        print(f"model {file} (give another with model.path=…)\n")
        return str(file)
    made = Path("outputs/pretrain/small/checkpoints/last.ckpt")
    print(
        "No model.path, and no checkpoint under outputs/pretrain: training a small model first "
        f"(unitscale pretrain {' '.join(cfg.model.base)})",
        flush=True,
    )
    loss = train_base(cfg.model.base, made)
    print(f"held-out loss {loss:.3f}; use it again with model.path={made}\n")
    return str(made)


def why_unusable(file: Path) -> str:
    """Why a checkpoint is none to write text with; nothing if it is one."""
    try:
        checkpoint = read_checkpoint(file)
    except UnitScalingError:
        return "not a readable checkpoint"
    weights = checkpoint.get("state_dict", {}).values()
    if not all(bool(tensor.isfinite().all()) for tensor in weights):
        return "its training diverged"
    if "model_type" not in (checkpoint.get("hyper_parameters", {}).get("model") or {}):
        return "not a model of this recipe"
    return ""


if __name__ == "__main__":
    main()
