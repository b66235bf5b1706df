"""The fused cast in torch's own operations, and as an operation: layouts, sums, fake tensors, one node of a graph."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_unitscale.formats import cast
from lightning_unitscale.ops import fp8_cast as fp8
from lightning_unitscale.ops.cast_sums import SUMS, cast_sums
from lightning_unitscale.ops.fp8_cast import fp8_cast

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
ONE = torch.tensor(1.0)
each_dtype = pytest.mark.parametrize("dtype", FP8, ids=str)


@each_dtype
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    alignment=st.sampled_from([1, 16]),
    k=st.integers(-8, 8),
    transposed=st.booleans(),
)
def test_both_layouts(dtype: torch.dtype, shape: tuple[int, int], alignment: int, k: int, transposed: bool) -> None:
    t = torch.randn(shape[::-1]).t() if transposed else torch.randn(shape)
    rows, columns, sums = fp8_cast(t, torch.tensor(2.0**k), dtype, columns=True, alignment=alignment)
    height, width = (-(-size // alignment) * alignment for size in shape)
    assert rows.shape == (height, width)
    assert rows.is_contiguous()
    assert columns.is_contiguous()
    assert torch.equal(columns.float(), rows.float().t())
    assert torch.equal(rows[: shape[0], : shape[1]].float(), cast(t * 2.0**k, dtype).float())
    assert rows.float().count_nonzero() == rows[: shape[0], : shape[1]].float().count_nonzero()  # padded with zeros
    assert sums.numel() == 0


def test_only_what_is_asked_for_is_written() -> None:
    t = torch.randn(8, 24)
    for wanted in ({"rows": False, "columns": True}, {"rows": True}, {"rows": False, "measured": True}):
        sizes = [x.numel() > 0 for x in fp8_cast(t, ONE, FP8[0], **wanted)]
        assert sizes == [wanted.get(name, False) for name in ("rows", "columns", "measured")]


def test_sums_of_a_tensor_by_hand() -> None:
    t = torch.tensor([[1.0, -2.0, 0.0, 2.0**-12], [1000.0, float("nan"), float("inf"), 17.0]])
    found = dict(zip(SUMS, fp8_cast(t, torch.tensor(0.5), FP8[0], measured=True)[2].tolist(), strict=True))
    finite = [1.0, -2.0, 0.0, 2.0**-12, 1000.0, 17.0]
    assert found["squares"] == pytest.approx(sum(x**2 for x in finite))
    assert found["fourth_powers"] == pytest.approx(sum(x**4 for x in finite), rel=1e-5)
    assert (found["non_zero"], found["flushed"], found["saturated"], found["non_finite"]) == (5, 1, 1, 2)
    assert found["largest"] == 1000
    # 1000 / 2 saturates to 448; 8.5 is halfway between 8 and 9, and 8 is even
    assert found["errors"] == pytest.approx(104.0**2 + 1.0**2 + 2.0**-24)


def test_nothing_has_no_sums() -> None:
    assert cast_sums(torch.empty(0, 4), torch.float16, 1.0).tolist() == [0.0] * len(SUMS)


@each_dtype
def test_it_is_an_operation_to_torch(dtype: torch.dtype) -> None:
    """Its schema and its fake version against what it does."""
    operation = torch.ops.lightning_unitscale.fp8_cast.default
    tests = ("test_schema", "test_faketensor")
    for options in ((True, True, 16, True), (False, True, 1, False)):
        torch.library.opcheck(operation, (torch.randn(5, 24), ONE, dtype, *options), test_utils=tests)


def test_it_is_one_operation_to_the_compiler() -> None:
    nodes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def run(t: Tensor) -> Tensor:
        return fp8_cast(t, ONE, FP8[0], columns=True, alignment=16)[1].float()

    t = torch.randn(5, 24)
    assert torch.equal(torch.compile(run, backend=backend, fullgraph=True)(t), run(t))
    assert nodes.count(torch.ops.lightning_unitscale.fp8_cast) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("installed", "said"), [(None, "Triton is not installed"), ("3.1.0", "Triton 3.1.0 is older than 3.4")]
)
def test_without_a_usable_triton_cuda_is_told_once(
    installed: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if installed is None:
            raise fp8.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(fp8, "version", version)
    fp8.triton_problem.cache_clear()
    fp8._has_kernel.cache_clear()
    try:
        with pytest.warns(UserWarning, match=rf"{said}, so casts .* run as several operations of torch.*\[cuda\]"):
            assert not fp8._has_kernel(torch.device("cuda"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not fp8._has_kernel(torch.device("cuda"))
            assert not fp8._has_kernel(torch.device("cpu"))
    finally:
        fp8.triton_problem.cache_clear()
        fp8._has_kernel.cache_clear()
