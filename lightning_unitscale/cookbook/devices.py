"""What devices a machine has, and which number formats run on them: each is tried."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import torch

from lightning_unitscale.block_formats import BlockNumbers
from lightning_unitscale.formats import FORMATS, supports
from lightning_unitscale.ops.cast_product import Scales, cast_product
from lightning_unitscale.ops.multiply import has_tensor_cores
from lightning_unitscale.ops.products import MatrixProducts


def devices() -> Iterator[tuple[str, str]]:
    """Each kind: what there is, or why there is none."""
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {platform.machine()}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "cuda", f"none: {'no GPU or no driver was found' if built else 'this torch is built without CUDA'}"
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = f"compute capability {about.major}.{about.minor}"
        yield f"cuda:{number}", f"{about.name}, {capability}, {about.total_memory / 2**30:.0f} GiB"
    yield "mps", "there" if torch.backends.mps.is_available() else "none: not a Mac with Apple's GPU"


def formats() -> Iterator[tuple[str, str]]:
    """Each format on each kind of device."""
    for kind in ("cpu", "cuda", "mps"):
        if kind == "cpu" or getattr(torch, kind).is_available():
            yield from ((f"{name} on {kind}", verdict(name, torch.device(kind))) for name in FORMATS)


def verdict(name: str, device: torch.device) -> str:
    """Whether it runs, by trying; how; and why not."""
    format = FORMATS[name]
    for dtype in format.dtypes:
        if not supports(dtype, device):
            return f"no: this device has no {dtype}"
    one = torch.ones((), device=device)
    halves = torch.full((32, 32), 0.5, device=device)
    try:
        product = cast_product(halves, halves, MatrixProducts(), format, Scales(*[one] * 7))
        right = bool(((product / (32 * 0.25) - 1).abs() < 0.1).all())  # 0.5 is a number of most formats, not of all
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"no: its product fails: {str(error).splitlines()[0]}"
    if not right:
        return "no: its product is wrong"
    if isinstance(format.x, BlockNumbers):
        return "yes, but no faster: emulated, products of upcast operands"
    if format.x.itemsize > 1:
        return "yes" if device.type != "cpu" else "yes: real casts, products of upcast operands; no faster than float32"
    if has_tensor_cores(device):
        return "yes: products on tensor cores"
    why = "a CPU has no FP8 products" if device.type == "cpu" else "FP8 products need compute capability 8.9"
    return f"yes, but no faster: real casts, products of upcast operands; {why}"
