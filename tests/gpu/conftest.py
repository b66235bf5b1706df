"""What needs a CUDA device: skipped without one. `GPU_TESTS_DEVICE=cpu` runs what a CPU can run, to check the tests."""

import os
from collections.abc import Iterator

import pytest
import torch

WHERE = os.environ.get("GPU_TESTS_DEVICE", "cuda")


@pytest.fixture
def device() -> torch.device:
    """Where the models run."""
    if WHERE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(WHERE)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """A CUDA device, for what no CPU has."""
    if device.type != "cuda":
        pytest.skip("only on CUDA")
    return device


@pytest.fixture
def fp8_cores(cuda: torch.device) -> torch.device:
    """A CUDA device that multiplies FP8."""
    if torch.cuda.get_device_capability(cuda) < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")
    return cuda


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """The references are float32 products, not TF32 ones."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()
