"""The untouched models of the zoo all work, and the labels of ``roles.py`` fit them."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support import roles, zoo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EVERY_CASE = zoo.CASES | zoo.UNSEEN


def build(case: zoo.Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


class Float32Activations(TorchFunctionMode):
    """Notices float32 tensors on the way from parameters to loss."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= any(x.dtype == torch.float32 and x.requires_grad for x in tensors(out))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", EVERY_CASE)
def test_trains_in_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    case = EVERY_CASE[name]
    if dtype == torch.float64 and not case.has_float64:
        pytest.skip("no float64 kernel")
    with zoo.default_dtype(dtype):
        model, batch = build(case), case.batch(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(4):
            loss = case.loss(model, batch)
            assert loss.shape == ()
            assert loss.isfinite()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", EVERY_CASE)
def test_same_seed_same_model_and_batch(name: str) -> None:
    case = EVERY_CASE[name]
    first, second = build(case), build(case)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    losses = [case.loss(model, case.batch(3)).item() for model in (first, second, copy.deepcopy(first))]
    assert len(set(losses)) == 1


@pytest.mark.parametrize("name", [name for name, case in EVERY_CASE.items() if case.has_float64])
def test_float32_casts_are_declared(name: str) -> None:
    case = EVERY_CASE[name]
    with zoo.default_dtype(torch.float64), Float32Activations() as mode:
        case.loss(build(case), case.batch(0))
    assert mode.found == case.casts_to_float32


def fit(case: zoo.Case | zoo.LightningCase, tmp_path: Any) -> pl.Trainer:
    torch.manual_seed(0)
    module = zoo.lightning_module(case)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    validation = zoo.loader(case, batches=1) if isinstance(case, zoo.Case) else None
    trainer.fit(module, zoo.loader(case, batches=3), validation)
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    return trainer


@pytest.mark.parametrize("name", zoo.LIGHTNING_CASES)
def test_trains_in_lightning(name: str, tmp_path: Any) -> None:
    trainer = fit(zoo.LIGHTNING_CASES[name], tmp_path)
    assert trainer.global_step == (6 if name == "gan" else 3)  # Lightning counts both optimizers' steps


def test_any_case_trains_in_lightning(tmp_path: Any) -> None:
    assert fit(zoo.CASES["sequential"], tmp_path).global_step == 3


def test_dropout_can_be_turned_on() -> None:
    for name in zoo.TWELVE:
        case = zoo.family_case(*name.split("-"), dropout=0.5)
        model, batch = build(case), case.batch(0)
        assert case.loss(model, batch) != case.loss(model, batch), name


@pytest.mark.parametrize("name", ["experts-loop", "experts-indexed", "experts-grouped"])
def test_one_expert_gets_no_token(name: str) -> None:
    case = zoo.CASES[name]
    model = build(case)
    case.loss(model, case.batch(0)).backward()
    mlp = model.blocks[0].mlp
    gradients = mlp.up.grad if hasattr(mlp, "up") else [expert[0].weight.grad for expert in mlp.experts]
    assert [g is not None and bool(g.any()) for g in gradients] == [True, True, True, False]


def test_ten_unseen_architectures() -> None:
    assert len(zoo.UNSEEN) == 10
    assert not zoo.KNOWN_TYPES & zoo.UNSEEN.keys()


def test_the_draw_can_be_repeated() -> None:
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("5.23"):
        pytest.skip("the candidates are those of transformers 5.23")
    assert zoo.draw_unseen() == zoo.UNSEEN_TYPES


# ---------------------------------------------------------------------------------------------------------------------
# roles.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_parameter_has_exactly_one_label(family: str) -> None:
    names = [name for name, _ in build(zoo.family_case(family, "sdpa")).named_parameters()]
    wrong = {name: labels for name in names if len(labels := roles.labels_of(family, name)) != 1}
    assert not wrong
    used = {label for name in names for label in roles.labels_of(family, name)}
    assert used == set(roles.ROLES[family].values())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_tied_readouts(family: str) -> None:
    model = build(zoo.family_case(family, "sdpa"))
    embeddings = {p for name, p in model.named_parameters() if roles.labels_of(family, name) == ["embedding"]}
    tied = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight in embeddings
    }
    assert tied == {roles.TIED_READOUT[family]} if family in roles.TIED_READOUT else not tied
    has_readout = "readout" in roles.ROLES[family].values()
    assert has_readout != bool(tied)


@pytest.mark.parametrize("name", zoo.TWELVE)
def test_one_call_of_a_branch_end_per_residual_branch(name: str) -> None:
    family = name.split("-")[0]
    case = zoo.CASES[name]
    model = build(case)
    ends = [p for p, _ in model.named_parameters() if roles.ends_branch(family, p)]
    assert all(roles.labels_of(family, parameter) == ["hidden"] for parameter in ends)
    calls = []
    for parameter in ends:
        model.get_submodule(parameter.removesuffix(".weight")).register_forward_hook(lambda *_: calls.append(1))
    case.loss(model, case.batch(0))
    assert len(calls) == len(ends) == roles.RESIDUAL_BRANCHES[family]
