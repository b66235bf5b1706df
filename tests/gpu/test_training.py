"""Whole models on a GPU: numbers as on a CPU, compiled, graphed, with every kind of optimizer, in less memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.prepared import gradients, prepared
from support.training import build, fit
from torch import Tensor, nn

from lightning_unitscale import UnitScaling, scale_learning_rates, unit_scale
from lightning_unitscale.cookbook.measuring.forward_backward import ForwardBackward
from lightning_unitscale.cookbook.measuring.fp8_comparison import LlamaBlock

MODELS = ("llama-sdpa", "gpt2-eager", "experts-grouped", "resnet", "multihead-attention", "lora")


def on(device: torch.device, thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.to(device)
    return {name: on(device, value) for name, value in thing.items()} if isinstance(thing, dict) else thing


def moved(case: zoo.Case, device: torch.device) -> zoo.Case:
    """The same case with its model and batches there; the same numbers, as they are drawn on the CPU."""
    return zoo.Case(
        case.name,
        lambda: case.build().to(device),
        lambda seed: on(device, case.batch(seed)),
        case.loss,
        case.has_float64,
        case.casts_to_float32,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", [None, "fp8"])
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_gradients_are_those_of_the_cpu(name: str, format: str | None, device: torch.device) -> None:
    here, there = (moved(zoo.CASES[name], place) for place in (torch.device("cpu"), device))
    (model, plan), (other, other_plan) = (prepared(case, format=format) for case in (here, there))
    assert [site.operand_scales for site in plan.sites] == [site.operand_scales for site in other_plan.sites]
    (loss, wanted), (found, ours) = gradients(here, model, seed=1), gradients(there, other, seed=1)
    assert float(found) == pytest.approx(float(loss), rel=1e-2 if format else 1e-4)
    whole = [torch.cat([grads[name].flatten().cpu() for name in wanted]) for grads in (wanted, ours)]
    assert float(torch.nn.functional.cosine_similarity(*whole, dim=0)) > (0.98 if format else 0.9999)


@pytest.mark.parametrize("format", [None, "fp8"])
def test_compiled_without_a_break(format: str | None, device: torch.device) -> None:
    case = moved(zoo.CASES["llama-sdpa"], device)
    model, _ = prepared(case, format=format)
    eager, _ = gradients(case, model, seed=1)
    run = torch.compile(lambda batch: case.loss(model, batch), fullgraph=True)
    loss = run(case.batch(1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(eager), rel=1e-2)


def test_a_whole_step_in_a_cuda_graph(fp8_cores: torch.device) -> None:
    """Forward, backward and a capturable optimizer, replayed, against the same steps made one by one."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(fp8_cores)
        plan = unit_scale(model, lambda m: (m(x) - x).square().mean(), format="fp8")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
        scale_learning_rates(optimizer, plan)
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch.manual_seed(0)
    x = torch.randn(256, 64, device=fp8_cores)
    one_by_one = start()
    wanted = [float(step(*one_by_one)) for _ in range(11)]
    graphed = start()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*graphed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*graphed)
    found = []
    for _ in range(8):
        graph.replay()
        found.append(float(loss))
    assert found == pytest.approx(wanted[3:], rel=1e-3)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}, {}], ids=str)
def test_every_implementation_of_adam_takes_the_same_steps(options: dict[str, bool], device: torch.device) -> None:
    if "capturable" in options and device.type != "cuda":
        pytest.skip("only on CUDA")
    case = moved(zoo.CASES["llama-sdpa"], device)

    def losses(**options: bool) -> list[float]:
        model, plan = prepared(case)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
        scale_learning_rates(optimizer, plan)
        found = []
        for seed in range(5):
            optimizer.zero_grad()
            loss = case.loss(model, case.batch(seed))
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    assert losses(**options) == pytest.approx(losses(foreach=False), rel=1e-4)


def test_rehearsal_leaves_the_random_numbers_of_the_gpu(device: torch.device) -> None:
    def draws(prepare: bool) -> Tensor:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 8)).to(device)
        x = torch.randn(16, 32, device=device)
        if prepare:
            unit_scale(model, lambda m: m(x).square().mean(), format="fp8")
        return torch.rand(8, device=device)

    assert torch.equal(draws(True), draws(False))


@pytest.mark.parametrize(
    ("precision", "format"), [("16-true", "fp16"), ("bf16-true", "fp8"), ("bf16-mixed", "fp8"), ("32-true", "fp8")]
)
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_precisions_of_a_trainer(precision: str, format: str, device: torch.device, tmp_path: Path) -> None:
    callback = UnitScaling(format=format)
    kind = "cpu" if device.type == "cpu" else "gpu"
    module = build(batch_norm=False, optimizer="sgd")  # Adam's eps is 0 in float16
    fit(tmp_path, callback, module=module, accelerator=kind, precision=precision, max_steps=6)
    assert callback.plan is not None
    assert callback.plan.cast_sites
    assert all(torch.tensor(module.losses).isfinite())
    assert module.losses[-1] < module.losses[0] + 0.5


def test_a_llama_block_needs_less_memory_than_in_bf16(fp8_cores: torch.device) -> None:
    torch.manual_seed(0)
    plain = LlamaBlock(1024).to(fp8_cores, torch.bfloat16)
    x = torch.randn(1, 4096, 1024, dtype=torch.bfloat16, device=fp8_cores).requires_grad_()
    cast = copy.deepcopy(plain)
    unit_scale(cast, lambda m: m(x).float().square().mean(), "preserve", format="fp8")
    bf16, fp8 = (ForwardBackward(module, x) for module in (plain, cast))
    for step in (bf16, fp8):
        step.run()
    assert fp8.saved() < bf16.saved()
    before = torch.cuda.memory_allocated(fp8_cores)
    assert fp8.peak(before) < bf16.peak(before)  # type: ignore[operator]
