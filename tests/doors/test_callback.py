"""`UnitScaling` in a Trainer: by every door one training, and under `preserve` the untouched model's."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.seen import Seen
from support.training import STEPS, Language, assert_same_state, batches, build, fit, trainer
from support.zoo import LIGHTNING_CASES, loader
from support.zoo_batches import next_token_batch
from torch.utils.data import DataLoader

from lightning_unitscale import UnitScaling, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.optim.scale_learning_rates import scale_learning_rates
from lightning_unitscale.options import STORAGES
from lightning_unitscale.strategy import UnitScalingStrategy


def by_hand(options: dict[str, Any]) -> Language:
    """The loop that Lightning's is here, with `unit_scale`: no callback, no strategy, no Trainer."""
    module = build()
    module.log = lambda *args, **kwargs: None
    plan = unit_scale(module, lambda model: model.loss(next_token_batch(0)), **options)
    optimizer = module.configure_optimizers()
    scale_learning_rates(optimizer, plan)
    for step in range(STEPS):
        loss = module.training_step(next_token_batch(step % 5), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    del module.log
    return module


@pytest.mark.parametrize("storage", STORAGES)
def test_every_door_gives_one_training(tmp_path: Path, preparations: list[Any], storage: str) -> None:
    expected = by_hand({"storage": storage})
    callback = UnitScaling(storage=storage)
    runs = {
        "callback": fit(tmp_path, callback),
        "strategy": fit(tmp_path, strategy=UnitScalingStrategy(storage=storage)),
        "both": fit(tmp_path, UnitScaling(storage=storage), strategy="unitscale"),
        "both, same options": fit(
            tmp_path, UnitScaling(storage=storage), strategy=UnitScalingStrategy(storage=storage)
        ),
    }
    if storage == "folded":
        runs["by name"] = fit(tmp_path, strategy="unitscale")
    assert len(preparations) == len(runs)
    assert callback.plan is plan_of(runs["callback"])
    assert callback.plan.storage == storage
    assert expected.losses[-1] < expected.losses[0] - 0.2
    for name, run in runs.items():
        assert run.losses == expected.losses, name
        assert_same_state(run, expected)
    untouched = fit(tmp_path)
    assert untouched.losses != expected.losses


def train(case_name: str, folder: Path, *callbacks: pl.Callback, **options: Any) -> tuple[pl.LightningModule, Seen]:
    case, seen = LIGHTNING_CASES[case_name], Seen()
    torch.manual_seed(0)
    module = case.build()
    fit(folder, seen, *callbacks, module=module, data=loader(case, 4), max_steps=12, **options)
    return module, seen


@pytest.mark.parametrize("name", LIGHTNING_CASES)
def test_modules_in_unusual_places(tmp_path: Path, preparations: list[Any], name: str) -> None:
    untouched, seen = train(name, tmp_path)
    preserved, preserved_seen = train(name, tmp_path, UnitScaling("preserve"))
    assert_same_state(preserved, untouched)
    assert not preserved_seen.differences(seen)

    _, folded_seen = train(name, tmp_path, UnitScaling())
    _, named_seen = train(name, tmp_path, strategy="unitscale")
    assert not named_seen.differences(folded_seen)
    unit = UnitScaling(storage="unit")
    _, unit_seen = train(name, tmp_path, unit)
    assert len(preparations) == 4
    assert {"losses", "logged"} & set(folded_seen.differences(seen))
    assert unit.plan is not None and unit.plan.explicit_sites
    # Adam's eps aside, which both storages multiply to match, only rounding is left between two implementations.
    for one, other in zip(folded_seen.losses, unit_seen.losses, strict=True):
        assert one == pytest.approx(other, rel=2e-4) if one is not None else other is None
    for one, other in zip(folded_seen.logged, unit_seen.logged, strict=True):
        assert one == pytest.approx(other, rel=2e-3)


def test_gan_scales_both_optimizers(tmp_path: Path) -> None:
    callback = UnitScaling()
    train("gan", tmp_path, callback)
    assert callback.plan is not None
    roles = callback.plan.roles
    assert {
        name: roles[name] for name in ("generator.0.weight", "discriminator.0.weight", "discriminator.2.weight")
    } == {
        "generator.0.weight": "hidden",
        "discriminator.0.weight": "hidden",
        "discriminator.2.weight": "readout",
    }


# ---------------------------------------------------------------------------------------------------------------------
# `preserve` is the identity
# ---------------------------------------------------------------------------------------------------------------------

IDENTITY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({}, {}),
    "sgd momentum": ({"optimizer": "sgd", "lr": 0.05}, {}),
    "clip norm": ({}, {"gradient_clip_val": 0.1}),
    "clip value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulate": ({"dropout": 0.2}, {"accumulate_grad_batches": 3}),
    "schedule, dropout": ({"schedule": True, "dropout": 0.2}, {"val_check_interval": 2, "num_sanity_val_steps": 2}),
    "bf16 mixed": ({"dropout": 0.2}, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", IDENTITY)
def test_preserve_is_the_identity(tmp_path: Path, name: str, storage: str) -> None:
    model, options = IDENTITY[name]

    def run(*callbacks: pl.Callback) -> tuple[Language, Seen]:
        seen, module = Seen(), build(**model)
        torch.manual_seed(1)
        shuffled = DataLoader([next_token_batch(seed) for seed in range(7)], batch_size=None, shuffle=True)
        trainer(tmp_path, seen, *callbacks, max_steps=STEPS, **options).fit(module, shuffled, batches(2))
        return module, seen

    (untouched, theirs), (preserved, ours) = run(), run(UnitScaling("preserve", storage=storage))
    assert len(theirs.losses) >= STEPS and "train_loss_epoch" in theirs.logged[-1]
    assert not ours.differences(theirs)
    assert preserved.losses == untouched.losses
    assert_same_state(preserved, untouched)
