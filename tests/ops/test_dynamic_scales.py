"""The dynamic scales that `support.paired_formats` compares static ones with are torchao's, to the bit."""

from __future__ import annotations

import pytest
import torch
from support.paired_formats import dynamic

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dim", [None, 0, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torchao_s(dtype: torch.dtype, dim: int | None) -> None:
    """Of a whole tensor, of its rows and of its columns, whose sizes differ by 2^20; zeros stay zeros."""
    scaling = pytest.importorskip("torchao.float8.float8_scaling_utils")
    config = pytest.importorskip("torchao.float8.config")
    training = pytest.importorskip("torchao.float8.float8_training_tensor")
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(24, 40, generator=generator) * torch.linspace(-10, 10, 24).exp2()[:, None]
    tensor[3] = 0
    expected = scaling.hp_tensor_to_float8_dynamic(
        tensor,
        dtype,
        training.LinearMMConfig(),
        scaling_granularity=config.ScalingGranularity.TENSORWISE if dim is None else config.ScalingGranularity.AXISWISE,
        axiswise_dim=dim,
        round_scales_to_power_of_2=True,
    ).to_original_precision()
    found = dynamic(dtype, by_rows=dim is not None).rounded(tensor, dim or 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_have_scales_of_their_own(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 8, 16) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    numbers = dynamic(dtype)
    assert torch.equal(numbers.rounded(tensor), torch.stack([numbers.rounded(model) for model in tensor]))
