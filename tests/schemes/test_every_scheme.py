"""What must hold under every scheme, on every model of the zoo: a new scheme is here as soon as it is registered.

Two models in the quick tests. In the nightly ones all of them learn, alike in both storages, and seven show the rest;
all of them do with `EVERY_MODEL=1 python -m pytest tests/schemes/test_every_scheme.py -m "slow or not slow"`.
"""

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support import zoo
from support.by_day import BY_HAND
from support.float64 import float64_throughout
from support.prepared import build, gradients, prepared, train
from support.training import ByStep, assert_same_state, batches, fit, trainer
from torch import nn

from lightning_unitscale import (
    Plan,
    UnitScaling,
    UnitScalingError,
    load_checkpoint,
    remove_unit_scaling,
    scale_learning_rates,
)
from lightning_unitscale import prepare as preparing
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.schemes import SCHEMES

NAMES = tuple(SCHEMES)
EVERY_CASE = zoo.CASES | zoo.UNSEEN
# Attention that folds and that does not, tied and computed weights, norms before and after, branches that are drawn
QUICK = ("llama-sdpa", "tied-embedding")
LONG = ("mobilevit", "swiftformer")  # a minute each over all schemes
NIGHTLY = ("resnet", "gpt2-eager", "t5-sdpa", "weight-norm", "lstm")
ASKED_FOR = tuple(EVERY_CASE) if os.environ.get("EVERY_MODEL") else ()
MODELS = tuple(dict.fromkeys((*QUICK, *NIGHTLY, *ASKED_FOR)))


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """The quick models, and the rest of these in the nightly run."""
    marks = {name: () if name in QUICK else BY_HAND if name in LONG else (pytest.mark.slow,) for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


each_model = each(MODELS)


def of_storages(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for every scheme in every storage that it has."""
    pairs = [(scheme, storage) for scheme in NAMES for storage in SCHEMES[scheme].storages]
    return pytest.mark.parametrize(("scheme", "storage"), pairs)(test)


# Their first loss is far above the untouched model's, which begins with small outputs: warned of, and left alone.
# CompleteP's readouts are α_out σ base_width / fan_in, of 256 / 32 here; Unit Scaling has fan_in^-½ for all outputs,
# where squares want them small.
LEFT_ALONE = (
    ("torch-encoder-prenorm", "completep"),
    ("unet", "completep"),
    ("unet", "unit"),
    ("encode-method", "completep"),
)


@pytest.fixture(autouse=True)
def _keep_every_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is tested is the scheme, and not the untouched model that it was left at."""
    if "left_alone" not in request.node.name:
        monkeypatch.setattr(preparing, "is_far_above", lambda before, after: False)


class SeededSteps(pl.Callback):
    """What a step draws does not depend on those before it."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        torch.manual_seed(2 * trainer.current_epoch + index)


@pytest.mark.parametrize("scheme", NAMES)
@each(EVERY_CASE)
def test_it_learns_and_alike_in_its_storages(name: str, scheme: str) -> None:
    """Twelve steps by the plan's own rates, over the same four batches again and again."""
    case, found = EVERY_CASE[name], []
    for storage in SCHEMES[scheme].storages:
        with float64_throughout():
            model, plan = prepared(case, scheme=scheme, storage=storage)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-10)
            scale_learning_rates(optimizer, plan)
            losses = train(case, model, [optimizer], 12)
        assert sum(losses[-4:]) < sum(losses[:4])
        found.append(losses[:8])  # later ones differ by what training makes of 1e-14 (MobileViT: 1e-5 in 12 steps)
    assert all(losses == pytest.approx(found[0], rel=1e-7) for losses in found)


@of_storages
@each_model
def test_its_gradients_are_the_slope_of_the_loss(name: str, scheme: str, storage: str) -> None:
    """Along one direction through all parameters, by a difference of fourth order."""
    case = EVERY_CASE[name]
    with float64_throughout():
        model, _ = prepared(case, scheme=scheme, storage=storage)
        _, found = gradients(case, model, seed=1)
        named = {key: p for key, p in model.named_parameters() if key in found}
        generator = torch.Generator().manual_seed(2)
        directions = {
            key: torch.randn(p.shape, generator=generator) * p.detach().abs().mean() for key, p in named.items()
        }
        expected = sum(float((found[key] * direction).sum()) for key, direction in directions.items())
        start, batch = {key: p.detach().clone() for key, p in named.items()}, case.batch(1)

        @torch.no_grad()
        def slope(h: float) -> float:
            change = 0.0
            for position, weight in ((1, 2 / 3), (-1, -2 / 3), (2, -1 / 12), (-2, 1 / 12)):
                for key, parameter in named.items():
                    parameter.copy_(start[key] + position * h * directions[key])
                change += weight * case.loss(model, batch).item()
            return change / h

        slopes = [slope(h) for h in (1e-3, 1e-5, 1e-6, 1e-7)]  # one of them crosses no kink of a ReLU, no other expert
    assert any(found == pytest.approx(expected, rel=1e-5, abs=1e-9) for found in slopes), (slopes, expected)


@of_storages
@each_model
def test_it_can_be_taken_off_or_says_what_stays(name: str, scheme: str, storage: str) -> None:
    case = EVERY_CASE[name]
    model, plan = prepared(case, scheme=scheme, storage=storage)
    before = case.loss(model, case.batch(1)).item()
    try:
        remove_unit_scaling(model)
    except UnitScalingError as error:
        assert any(site.name in str(error) for site in plan.explicit_sites)
        assert plan_of(model) is plan
    else:
        assert plan_of(model) is None
    assert case.loss(model, case.batch(1)).item() == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("scheme", NAMES)
@each(dict.fromkeys((*MODELS, *(name for name, _ in LEFT_ALONE))))
def test_where_a_model_is_left_alone_it_is_named(name: str, scheme: str, recwarn: pytest.WarningsRecorder) -> None:
    """The list above, and no other."""
    _, plan = prepared(EVERY_CASE[name], scheme=scheme)
    refusals = [str(warning.message) for warning in recwarn if "Left alone:" in str(warning.message)]
    if (name, scheme) in LEFT_ALONE:
        (refusal,) = refusals
        assert f"under scheme={scheme!r} the first loss of" in refusal
        assert "the whole model, which trains as if untouched" in refusal
        assert plan.scheme == "preserve"
    else:
        assert not refusals
        assert plan.scheme == scheme


@of_storages
def test_a_plan_of_it_outlives_plain_containers(scheme: str, storage: str) -> None:
    for name in QUICK:
        _, plan = prepared(zoo.CASES[name], scheme=scheme, storage=storage)
        assert Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()
        for key in (*plan.parameters, *(site.name for site in plan.sites)):
            assert key in plan.explain(key)
        assert scheme in plan.summary()


@of_storages
def test_its_checkpoint_brings_the_function_along(scheme: str, storage: str, tmp_path: Path) -> None:
    for name in QUICK:
        case = EVERY_CASE[name]
        model, _ = prepared(case, scheme=scheme, storage=storage)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        loaded = build(case)
        nn.init.normal_(next(loaded.parameters()))
        load_checkpoint(loaded, tmp_path / "model.pt")
        assert case.loss(loaded, case.batch(1)).item() == case.loss(model, case.batch(1)).item()
        copied = copy.deepcopy(model)
        assert case.loss(copied, case.batch(1)).item() == case.loss(model, case.batch(1)).item()


@of_storages
@each_model
def test_a_loop_that_goes_on_from_a_checkpoint_is_the_whole_one(
    name: str, scheme: str, storage: str, tmp_path: Path
) -> None:
    case = EVERY_CASE[name]
    model, plan = prepared(case, scheme=scheme, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, plan)
    train(case, model, [optimizer], 2)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = copy.deepcopy(optimizer.state_dict())
    whole = train(case, model, [optimizer], 2)

    again = build(case)
    restored = load_checkpoint(again, tmp_path / "model.pt")
    assert restored is not None
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, restored)
    optimizer.load_state_dict(state)
    assert train(case, again, [optimizer], 2) == whole
    assert_same_state(again, model)


@of_storages
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in zoo.LIGHTNING_CASES])
def test_modules_with_code_in_unusual_places_go_on(name: str, scheme: str, storage: str, tmp_path: Path) -> None:
    """Two epochs of two batches each, or one and then the other."""
    case = zoo.LIGHTNING_CASES[name]

    def run(epochs: int, **options: Any) -> pl.LightningModule:
        torch.manual_seed(0)
        module = case.build()
        callbacks = UnitScaling(scheme, storage=storage), SeededSteps()
        one = trainer(tmp_path, *callbacks, max_epochs=epochs)
        one.fit(module, zoo.loader(case, 2), **options)
        one.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    run(1)
    assert_same_state(run(2, ckpt_path=tmp_path / "1.ckpt"), run(2))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@of_storages
def test_a_resumed_run_is_the_whole_one(scheme: str, storage: str, optimizer: str, tmp_path: Path) -> None:
    def module() -> ByStep:
        torch.manual_seed(0)
        return ByStep(dropout=0.1, optimizer=optimizer, lr=1e-3)

    def scaling() -> UnitScaling:
        return UnitScaling(scheme, storage=storage)

    whole = fit(tmp_path / "whole", scaling(), module=module(), max_steps=8)
    first = fit(tmp_path / "first", scaling(), module=module(), max_steps=4)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = module()
    trainer(tmp_path / "second", scaling(), max_steps=8).fit(second, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert second.losses == whole.losses[4:]
    assert_same_state(second, whole)
