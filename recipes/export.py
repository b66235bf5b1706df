"""Write a trained model as plain weights or as a program, for use without this package.

    unitscale export model.path=outputs/pretrain/…                             # a folder for transformers
    unitscale export model.path=… format=onnx output=model.onnx                # also safetensors, pt2
    unitscale export model.path=… dtype=bfloat16                               # half the size
    unitscale export model.path=… dtype=fp8                                    # a quarter, for `unitscale inference`

What is written is read back and compared with the model before it counts.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.inference.recorded_run import recorded_task, task_of
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.wrong_values import check_choices
from lightning_unitscale.errors import InputError
from lightning_unitscale.export import SUFFIXES, check_output, export, files_of

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


@recipe("export")
def main(cfg: DictConfig) -> float:
    """Loads, writes, compares; returns the largest difference of the logits, relative to the largest."""
    begin = time.perf_counter()
    check_choices("export", cfg)
    output = Path(cfg.output or Path(cfg.folder) / f"model{SUFFIXES[cfg.format]}")
    check_output(output, cfg.format, DTYPES[cfg.dtype])
    transformers.logging.disable_progress_bar()

    recorded_task(cfg.model.path)  # its file may tell transformers of an architecture
    found = load_pretrained(cfg.model.path, cfg.model.head, cfg.model.tokenizer)
    if found.weights != "float32":
        raise InputError(f"model.path={found.path} has weights in {found.weights}; export the checkpoint it is made of")
    scaling = "none" if found.plan is None else f"{found.plan.scheme}, {found.plan.storage} storage"
    task = task_of(found)
    task.complete(found.tokenizer, found.model)
    difference = export(found.model, output, cfg.format, found.tokenizer, DTYPES[cfg.dtype], task.example_inputs)
    files = files_of(output)
    size = sum(file.stat().st_size for file in files)
    print(f"model        {type(found.model).__name__} from {found.path}, unit scaling: {scaling}")
    beside = "".join(f" and {file.name}" for file in files[1:] if not output.is_dir())
    print(f"written      {output}{beside} ({size / 2**20:.1f} MiB, {time.perf_counter() - begin:.1f} s)")
    casts = " without the casts it was trained in" if found.plan is not None and found.plan.cast_sites else ""
    print(f"read back    largest difference to the model's logits{casts} {difference:.1e} of the largest logit")
    return difference


if __name__ == "__main__":
    main()
