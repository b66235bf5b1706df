"""Casts in a Trainer and in plain loops: when operands are measured, resuming, averaging."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from support import zoo
from support.casts import OPTIONS, assert_same_state_but_marker, is_eager, plain_loop, two_layers
from support.training import ByStep, Language, assert_same_state, batches, build, fit, trainer
from support.zoo_batches import next_token_batch
from torch.utils.data import DataLoader

from lightning_unitscale import (
    UnitScaling,
    UnitScalingError,
    load_checkpoint,
    recalibrating,
)
from lightning_unitscale.engine.checks.calibration import Calibration
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.engine.runtime.observer import entered_observers


@pytest.mark.parametrize("scheme", ["umup", "preserve"])
def test_the_first_step_casts_nothing_and_the_second_does(tmp_path: Path, scheme: str) -> None:
    one, other = build(), build()
    fit(tmp_path, UnitScaling(scheme), module=one, max_steps=3)
    callback = UnitScaling(scheme, **OPTIONS)
    fit(tmp_path, callback, module=other, max_steps=3)
    assert one.losses[0] == other.losses[0]
    assert one.losses[1] != other.losses[1]
    assert other.losses[1] == pytest.approx(one.losses[1], rel=0.01)
    assert callback.plan is not None
    assert callback.plan.measured_at == [0, 1]
    assert min(callback.plan.gradient_cosine.values()) > 0.85
    after = [build(), build()]
    for module, options in zip(after, ({}, OPTIONS), strict=True):
        fit(tmp_path, UnitScaling(scheme, **options), module=module, max_steps=1)
    assert_same_state_but_marker(*after)


def test_preserve_without_format_is_plain(tmp_path: Path) -> None:
    plain, preserved = build(), build()
    fit(tmp_path, module=plain, max_steps=5)
    fit(tmp_path, UnitScaling("preserve"), module=preserved, max_steps=5)
    assert_same_state(plain, preserved)
    assert plain.losses == preserved.losses


@pytest.mark.parametrize("door", ["callback", "strategy"])
@pytest.mark.parametrize(("scheme", "storage"), [("umup", "folded"), ("umup", "unit"), ("preserve", "folded")])
def test_resuming_is_going_on(tmp_path: Path, scheme: str, storage: str, door: str) -> None:
    from lightning_unitscale.strategy import UnitScalingStrategy

    options = {**OPTIONS, "scheme": scheme, "storage": storage, "recalibrate": (4, 7)}

    def run(module: Language, steps: int, **fitting: Any) -> pl.Trainer:
        callbacks, strategy = ([UnitScaling(**options)], {}) if door == "callback" else (
            [], {"strategy": UnitScalingStrategy(**options)})  # fmt: skip
        loop = trainer(tmp_path, *callbacks, max_steps=steps, **strategy)
        loop.fit(module, batches(10), **fitting)
        return loop

    whole, half, rest = (ByStep(dropout=0.1) for _ in range(3))
    for module in (half, rest):
        module.load_state_dict(whole.state_dict())
    run(whole, 10)
    run(half, 5).save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    run(rest, 10, ckpt_path=tmp_path / "half.ckpt")
    plans = plan_of(whole), plan_of(rest)
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].measured_at == plans[1].measured_at == [0, 4, 7]
    assert half.losses + rest.losses == whole.losses
    assert_same_state_but_marker(whole, rest)
    assert [site.operand_scales for site in plans[0].cast_sites] == [
        site.operand_scales for site in plans[1].cast_sites
    ]


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_loaded_elsewhere_it_has_training_s_numerics(tmp_path: Path, storage: str) -> None:
    module = build(batch_norm=False)
    loop = trainer(tmp_path, UnitScaling(storage=storage, **OPTIONS), max_steps=3)
    loop.fit(module, batches())
    loop.save_checkpoint(tmp_path / "a.ckpt")
    batch = next_token_batch(7)
    expected = module.loss(batch)
    loaded = build(batch_norm=False)
    plan = load_checkpoint(loaded, tmp_path / "a.ckpt")
    assert plan is not None
    assert torch.equal(loaded.loss(batch), expected)
    (metrics,) = trainer(tmp_path, UnitScaling(storage=storage, **OPTIONS)).validate(
        build(batch_norm=False), batches(1, 7), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    assert metrics["val_loss"] == pytest.approx(float(expected), rel=1e-6)
    for site in casts_in_force(loaded).values():
        site.scales = None
    assert not torch.equal(loaded.loss(batch), expected)  # the casts are what was compared


@pytest.mark.parametrize("other", [None, "bf16"])
def test_resuming_with_another_format(tmp_path: Path, other: str | None) -> None:
    loop = trainer(tmp_path, UnitScaling(**OPTIONS), max_steps=2)
    loop.fit(build(), batches())
    loop.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UnitScalingError, match=r"prepared with format='fp8', but UnitScaling has format="):
        trainer(tmp_path, UnitScaling(format=other), max_steps=4).fit(build(), batches(), ckpt_path=tmp_path / "a.ckpt")


def test_accumulated_pieces_are_one_batch(tmp_path: Path) -> None:
    """Scales are those of the whole batch, so its pieces are cast as it is."""
    plans, losses = [], []
    for pieces in (1, 4):
        cut = [{n: v.chunk(pieces) for n, v in next_token_batch(step).items()} for step in range(3)]
        rows = [{n: v[piece] for n, v in batch.items()} for batch in cut for piece in range(pieces)]
        data = DataLoader(rows, batch_size=None)
        module = build(batch_norm=False, optimizer="sgd", lr=0.01)
        callback = UnitScaling(**OPTIONS)
        fit(tmp_path, callback, module=module, data=data, accumulate_grad_batches=pieces, max_steps=3)
        assert callback.plan is not None
        plans.append(
            {site.name: (site.operand_scales["x"], site.operand_scales["weight"]) for site in callback.plan.cast_sites}
        )
        assert callback.plan.measured_at == [0, 1]
        losses.append([sum(module.losses[i : i + pieces]) / pieces for i in range(0, len(module.losses), pieces)])
    assert plans[0] == plans[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_averaging_leaves_training_as_it_was(tmp_path: Path) -> None:
    """The average is put into the model for validation, and the weights are put back, by way of `.data`."""
    losses = []
    for average in ([], [EMAWeightAveraging(decay=0.5)]):
        module = build(batch_norm=False)
        loop = trainer(tmp_path, *average, UnitScaling(**OPTIONS), max_steps=10, val_check_interval=1)
        loop.fit(module, batches(), batches(1))
        losses.append((module.losses, float(loop.callback_metrics["val_loss"])))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_measured_on_schedule_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    begin = Calibration.begin
    monkeypatch.setattr(Calibration, "begin", lambda self, step: (begun.append(step), begin(self, step)))
    callback = UnitScaling(**OPTIONS, recalibrate=(3, 8))
    fit(tmp_path, callback, max_steps=12)
    assert callback.plan is not None
    assert begun == callback.plan.measured_at == [0, 3, 8]


def test_a_plain_loop_measures_again_as_a_trainer_does(tmp_path: Path) -> None:
    losses, plan = plain_loop(8, recalibrate=(2, 5))
    callback = UnitScaling(**OPTIONS, recalibrate=(2, 5))
    module = fit(tmp_path, callback, module=build(batch_norm=False), data=batches(8), max_steps=8)
    assert callback.plan is not None
    assert plan.measured_at == callback.plan.measured_at == [0, 2, 5]
    ours, theirs = ({s.name: s.operand_scales for s in p.cast_sites} for p in (plan, callback.plan))
    same = sum(ours[site][operand] == scale for site, scales in theirs.items() for operand, scale in scales.items())
    assert same >= 0.9 * 3 * len(theirs)  # the Trainer's first step casts nothing, so the runs are not the same
    assert losses == pytest.approx(module.losses, rel=0.01)
    assert {operand for site in plan.cast_sites for operand in site.measured} == {"x", "weight", "gradient"}


def test_a_plain_loop_counts_all_micro_batches() -> None:
    _, one = plain_loop(4, 1, recalibrate=(3,))
    _, two = plain_loop(4, 2, recalibrate=(3,))
    for site, twice in zip(one.cast_sites, two.cast_sites, strict=True):
        assert twice.measured["x"]["elements"] == 2 * site.measured["x"]["elements"]


@pytest.mark.parametrize("compiled", [False, True])
def test_recalibrating_leaves_nothing_behind(compiled: bool) -> None:
    model, plan = two_layers(recalibrate=(1,))
    run = torch.compile(model, backend="eager") if compiled else model
    x = torch.randn(64, 32)
    with pytest.raises(ValueError, match="on purpose"), recalibrating(plan, 1):
        raise ValueError("on purpose")
    assert entered_observers() == []
    assert torch._C._len_torch_function_stack() == 0
    assert not is_eager()
    assert plan.measured_at == [0]
    with recalibrating(plan, 1):
        (run(x) * 2.0**-10).sum().backward()
    assert plan.measured_at == [0, 1]
    assert not is_eager()
    (last,) = [site for site in plan.cast_sites if site.params[0] == "2.weight"]
    assert last.operand_scales["gradient"] == 2.0**10
    assert float(casts_in_force(model)[last.use].scales["gradient"]) == 2.0**10


def test_a_schedule_that_nothing_follows_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"measured again at 1, 3, 10 …, and nothing does it.*recalibrating\(plan, step"
    ):
        plain_loop(3, schedule=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing does it")
        plain_loop(3)
        plain_loop(3, schedule=False, recalibrate=())


@pytest.mark.parametrize("wrong", [(0,), (3, 2), (2, 2), (1.5,), 10, "often", (True,), None])
def test_wrong_schedules(wrong: Any) -> None:
    with pytest.raises(UnitScalingError, match=r"recalibrate=.* must be steps above 0 in rising order"):
        UnitScaling(recalibrate=wrong)


@pytest.mark.filterwarnings("ignore:unit scaling. with casts")
def test_gan(tmp_path: Path) -> None:
    case = zoo.LIGHTNING_CASES["gan"]
    torch.manual_seed(0)
    module = case.build()
    callback = UnitScaling("preserve", format="fp8", overrides={"discriminator*": {"format": "bf16"}})
    fit(tmp_path, callback, module=module, data=zoo.loader(case, 4), max_steps=8)
    assert callback.plan is not None
    formats = {site.params[0].split(".")[0]: site.format for site in callback.plan.cast_sites}
    assert formats == {"generator": "fp8", "discriminator": "bf16"}
    assert all(p.isfinite().all() for p in module.parameters())
