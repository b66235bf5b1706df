"""What a plain model is written as: a folder, weights or a program.

Each is read back from disk and run, before it counts as written.

hf           a folder that `from_pretrained` of transformers loads; in fp8, one for `load_pretrained` of this package
safetensors  one file of weights
pt2          a program of torch.export; batch and length may differ from call to call
onnx         the same for onnxruntime and others
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.errors import InputError
from lightning_unitscale.export.examples import DYNAMIC, Logits, example_inputs, logits_of
from lightning_unitscale.export.fp8_weights import load_fp8, quantize_weights, save_fp8
from lightning_unitscale.export.plain import check_same, exact_outputs, relative_difference, to_plain

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]
FP8 = torch.float8_e4m3fn
SUFFIXES = {"hf": "", "safetensors": ".safetensors", "pt2": ".pt2", "onnx": ".onnx"}  # of the targets' names


def export(
    model: PreTrainedModel,
    output: Path,
    format: str = "hf",
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    inputs_of: Callable[..., Inputs] = example_inputs,
) -> float:
    """Write the model, its scaling moved into plain weights.

    Args:
        model: plain or prepared, in float32; left on the CPU and in eval mode, otherwise as it was.
        output: the folder (hf) or file (other formats) to make.
        format: see above.
        tokenizer: goes into the folder of "hf".
        dtype: of what is written; weights are rounded to it after the scaling was moved. float8_e4m3fn (with format
            "hf" alone): weights of at least two dimensions, see `lightning_unitscale.export.fp8_weights`.

    Returns:
        The largest difference between the logits of what was read back and those of `model`, relative to the largest
        logit, on other inputs than it was made with; casts of a `format` it was trained in are left out, as they are
        in what is written. Above 1e-5 it can only be the rounding to `dtype`.

    Raises:
        InputError: the output cannot be written, or the format cannot hold the model.
        UnitScalingError: a factor cannot be moved into weights, or the logits are not the same; nothing is left behind.
    """
    check_output(output, format, dtype)
    model = model.cpu().eval()
    plain: Any = to_plain(model, partial(logits_of, inputs=inputs_of(model)))
    write = _WRITERS[format]
    if dtype == FP8:
        quantize_weights(plain, "fp8", plan_of(model))
        write = _write_fp8
    else:
        plain = plain.to(dtype)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch, torch.no_grad():
        written = Path(scratch) / output.name
        run = write(plain, written, inputs_of(plain))
        if tokenizer is not None and format == "hf":
            tokenizer.save_pretrained(written)
        inputs = inputs_of(plain, batch=3, length=9, seed=1)
        found = run(inputs)
        check_same(found, logits_of(plain, inputs), type(model).__name__)
        expected = exact_outputs(model, partial(logits_of, inputs=inputs_of(model, batch=3, length=9, seed=1)))
        for made in [written] if written.is_dir() else list(Path(scratch).iterdir()):  # large ONNX models are two files
            shutil.move(made, output.parent / made.name)
    return relative_difference(found.float(), expected)


def files_of(output: Path) -> list[Path]:
    """What was written as `output`: the files of a folder, or the file and what it keeps beside it (ONNX's weights)."""
    if output.is_dir():
        return [file for file in output.rglob("*") if file.is_file()]
    return [output, *(file for file in (output.with_name(f"{output.name}.data"),) if file.is_file())]


def check_output(output: Path, format: str, dtype: torch.dtype = torch.float32) -> None:
    """
    Raises:
        InputError: there is no such format, not in this dtype, or the output exists or cannot be written.
    """
    if format not in SUFFIXES:
        raise InputError(f"format={format} is not known; choose one of {', '.join(SUFFIXES)}")
    if dtype == FP8 and format != "hf":
        raise InputError(f"dtype=fp8 is for format=hf, not for format={format}")
    if output.exists():
        raise InputError(f"output={output} exists; give another name, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"output={output} cannot be written: {error.strerror}") from error


def _write_hugging_face(model: PreTrainedModel, folder: Path, inputs: Inputs) -> Run:
    model.save_pretrained(folder)
    found = type(model).from_pretrained(folder).eval()
    return partial(logits_of, found)


def _write_fp8(model: PreTrainedModel, folder: Path, inputs: Inputs) -> Run:
    save_fp8(model, folder)
    found = type(model)(model.config).eval()
    load_fp8(found, folder)
    return partial(logits_of, found)


def _write_safetensors(model: PreTrainedModel, file: Path, inputs: Inputs) -> Run:
    safetensors.torch.save_model(model, str(file), metadata={"format": "pt"})
    found = nn.Module.to(type(model)(model.config), model.dtype).eval()
    safetensors.torch.load_model(found, file)
    return partial(logits_of, found)


def _write_program(model: PreTrainedModel, file: Path, inputs: Inputs) -> Run:
    with _readable_errors(model, "pt2"):
        program = torch.export.export(Logits(model), (), inputs, dynamic_shapes=_dynamic(inputs))
    torch.export.save(program, file)
    found = torch.export.load(file).module()
    return lambda inputs: found(**inputs)


def _write_onnx(model: PreTrainedModel, file: Path, inputs: Inputs) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it, and says so in 40 lines)
    except ImportError as error:
        raise InputError(f"format=onnx needs {error.name}: pip install 'lightning-unitscale[export]'") from error
    with _readable_errors(model, "onnx"):
        torch.onnx.export(
            Logits(model),
            (),
            str(file),
            kwargs=inputs,
            dynamic_shapes=_dynamic(inputs),
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [known.name for known in session.get_inputs()]
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])


_WRITERS = {"hf": _write_hugging_face, "safetensors": _write_safetensors, "pt2": _write_program, "onnx": _write_onnx}


def _dynamic(inputs: Inputs) -> dict[str, dict[int, Any]]:
    return {name: dict.fromkeys(range(len(DYNAMIC[name])), torch.export.Dim.DYNAMIC) for name in inputs}


@contextmanager
def _readable_errors(model: PreTrainedModel, format: str) -> Iterator[None]:
    """The compilers' own messages are pages long; their cause is one line."""
    for exporter in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(exporter).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # whatever the tracer or converter runs into
            first = error
            while isinstance(first.__cause__, Exception):
                first = first.__cause__
            cause = (str(first).strip().splitlines() or [""])[0]
            raise InputError(
                f"format={format} cannot hold {type(model).__name__}: {type(first).__name__}: {cause.rstrip('.')}. "
                "The formats hf and safetensors hold every model."
            ) from error
