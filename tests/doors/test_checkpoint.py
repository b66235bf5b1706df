"""Checkpoints: a resumed run is the whole run, and no checkpoint can be misread."""

import enum
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from support.fresh_python import run_python
from support.training import ByStep, Language, assert_same_state, batches, build, fit, trainer
from support.zoo_batches import next_token_batch
from support.zoo_modules import TiedLanguageModel

from lightning_unitscale import UnitScaling, UnitScalingError, load_checkpoint, remove_unit_scaling, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.strategy import UnitScalingStrategy

STORAGES = ("folded", "unit")
PER_EPOCH = 4


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------

RESUMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{storage}-{lr_units}": (
        {"storage": storage, "lr_units": lr_units},
        {"dropout": 0.2, "schedule": True, "lr": 3e-3 if lr_units == "standard" else 0.5},
    )
    for storage in STORAGES
    for lr_units in ("standard", "umup")
}
RESUMES["preserve-sgd"] = ({"scheme": "preserve"}, {"dropout": 0.2, "optimizer": "sgd", "schedule": True})
AT = {"mid": 6, "end": 8}  # steps; an epoch has 4


class SaveAt(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == AT["mid"]:
            trainer.save_checkpoint(self.folder / "mid.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == AT["end"]:
            trainer.save_checkpoint(self.folder / "end.ckpt")


def by_step(name: str, folder: Path, *callbacks: pl.Callback, ckpt: Path | None = None) -> ByStep:
    scaling, model = RESUMES[name]
    torch.manual_seed(0)
    module = ByStep(**model)
    loop = trainer(folder, UnitScaling(**scaling), *callbacks, max_steps=16)
    loop.fit(module, batches(PER_EPOCH), ckpt_path=ckpt)
    return module


def resume_all(folder: str) -> None:
    """Runs in the second process."""
    for name in RESUMES:
        for where in AT:
            part = Path(folder, name)
            module = by_step(name, part, ckpt=part / f"{where}.ckpt")
            torch.save({"losses": module.losses, "state": module.state_dict()}, part / f"{where}-resumed.pt")


def test_a_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    whole = {}
    for name in RESUMES:
        (tmp_path / name).mkdir()
        whole[name] = by_step(name, tmp_path / name, SaveAt(tmp_path / name))
    run_python("-c", "import sys; from doors.test_checkpoint import resume_all; resume_all(sys.argv[1])", tmp_path)
    for name, module in whole.items():
        assert len(module.losses) == 16
        for where, step in AT.items():
            resumed = torch.load(tmp_path / name / f"{where}-resumed.pt", weights_only=True)
            assert resumed["losses"] == module.losses[step:], (name, where)
            state = module.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in resumed["state"].items()), (name, where)


def test_resume_under_another_scaling_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(path, UnitScaling(skip=["head"]))

    def resume(callback: UnitScaling) -> None:
        trainer(tmp_path, callback, max_steps=9).fit(build(), batches(), ckpt_path=path)

    for options, named in (
        ({"skip": ["head"], "storage": "unit"}, "storage='folded'"),
        ({"skip": ["head"], "scheme": "preserve"}, "scheme='umup'"),
        ({"skip": ["head"], "lr_units": "umup"}, "lr_units='standard'"),
        ({}, r"skip=\['head'\]"),
        ({"skip": ["head"], "overrides": {"block*": {"lr_multiplier": 2.0}}}, "overrides={}"),
        ({"skip": ["head"], "hyperparameters": {"alpha_attn": 2.0}}, "hyperparameters={.*'alpha_attn': 1.0"),
    ):
        with pytest.raises(UnitScalingError, match=f"was prepared with {named}"):
            resume(UnitScaling(**options))
    resume(UnitScaling(skip=("head",), verify=False))
    resume(UnitScaling(skip=("head",), hyperparameters={"alpha_attn": 1}))  # as it is by default


# ---------------------------------------------------------------------------------------------------------------------
# Loading elsewhere
# ---------------------------------------------------------------------------------------------------------------------


def save(path: Path, *callbacks: pl.Callback, weights_only: bool = False, **options: Any) -> tuple[Language, float]:
    """Train a little and save; also the validation loss of the moment."""
    module = build()
    loop = trainer(path.parent, *callbacks, max_steps=6, **options)
    loop.fit(module, batches(), batches(2, first=70))
    (logged,) = loop.validate(module, batches(2, first=70), verbose=False)
    loop.save_checkpoint(path, weights_only=weights_only)
    return module, logged["val_loss"]


WITHOUT_PACKAGE = """
import json, os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as the package is installed here, torch itself would import it
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning_unitscale":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocker())
from support.training import Language, batches, trainer
for path, loss in json.loads(sys.argv[1]).items():
    module = Language.load_from_checkpoint(path, weights_only=True)
    (logged,) = trainer("/tmp").validate(module, batches(2, first=70), verbose=False)
    assert logged["val_loss"] == loss, (path, logged, loss)
    fresh = Language()
    (logged,) = trainer("/tmp").validate(fresh, batches(2, first=70), ckpt_path=path, verbose=False)
    assert logged["val_loss"] == loss, (path, logged, loss)
for path in json.loads(sys.argv[2]):
    for strict in (True, False):
        try:
            Language.load_from_checkpoint(path, weights_only=True, strict=strict)
        except RuntimeError as error:
            assert strict is False or "unit_scaling_plan" in str(error), error
        else:
            raise AssertionError(f"{path} was loaded with strict={strict}")
assert "lightning_unitscale" not in sys.modules
"""


def test_checkpoints_where_the_package_is_missing(tmp_path: Path) -> None:
    import json

    plain: dict[str, float] = {}
    scaled: list[str] = []
    for weights_only in (False, True):
        for name, callback, named in (
            ("folded", UnitScaling(), {}),
            ("preserve", UnitScaling("preserve"), {}),
            ("preserve-unit", UnitScaling("preserve", storage="unit"), {}),
            ("strategy", None, {"strategy": "unitscale"}),
            ("unit", UnitScaling(storage="unit"), {}),
        ):
            path = tmp_path / f"{name}-{weights_only}.ckpt"
            callbacks = [callback] if callback else []
            _, loss = save(path, *callbacks, weights_only=weights_only, **named)
            if name == "unit":
                scaled.append(str(path))
            else:
                plain[str(path)] = loss
    run_python("-c", WITHOUT_PACKAGE, json.dumps(plain), json.dumps(scaled))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scheme", ["umup", "preserve"])
def test_evaluation_from_a_checkpoint_needs_no_training_step(tmp_path: Path, scheme: str, storage: str) -> None:
    path = tmp_path / "a.ckpt"
    trained, loss = save(path, UnitScaling(scheme, storage=storage))
    data = batches(2, first=70)
    expected = [trained.eval()(batch["input_ids"]) for batch in data]
    doors: list[tuple[list[pl.Callback], dict[str, Any]]] = [
        ([UnitScaling(scheme, storage=storage)], {}),
        ([UnitScaling()], {}),  # the checkpoint's own plan counts
        ([], {"strategy": "unitscale"}),
        ([UnitScaling()], {"strategy": "unitscale"}),
    ]
    for callbacks, options in doors:
        loop = trainer(tmp_path, *callbacks, **options)
        torch.manual_seed(5)
        module = Language()
        (logged,) = loop.validate(module, data, ckpt_path=path, verbose=False)
        assert logged["val_loss"] == loss
        (logged,) = loop.test(Language(), data, ckpt_path=path, verbose=False)
        assert logged["test_loss"] == loss
        predicted = loop.predict(Language(), data, ckpt_path=path)
        assert all(torch.equal(one, other) for one, other in zip(predicted, expected, strict=True))
        assert plan_of(module) is not None
    # The helper, into a plain model and into one that was prepared otherwise.
    other = build()
    unit_scale(other, lambda model: model.loss(next_token_batch(0)), storage="folded" if storage == "unit" else "unit")
    for model in (Language(), other):
        plan = load_checkpoint(model, path)
        assert plan is not None and (plan.scheme, plan.storage) == (scheme, storage)
        assert torch.equal(model.eval()(next_token_batch(70)["input_ids"]), expected[0])


def test_one_trainer_changes_between_scaled_and_plain_checkpoints(tmp_path: Path) -> None:
    _, unit_loss = save(tmp_path / "unit.ckpt", UnitScaling(storage="unit"))
    _, plain_loss = save(tmp_path / "plain.ckpt")
    loop, module, data = trainer(tmp_path, UnitScaling()), build(), batches(2, first=70)
    for name, loss in (("unit", unit_loss), ("plain", plain_loss), ("unit", unit_loss)):
        (logged,) = loop.validate(module, data, ckpt_path=tmp_path / f"{name}.ckpt", verbose=False)
        assert logged["val_loss"] == loss
        assert (plan_of(module) is None) == (name == "plain")


def load_without_package(module: torch.nn.Module, state: dict[str, Any], *, strict: bool = True) -> None:
    """As `load_state_dict` is where nothing has imported the package."""
    torch.nn.Module.load_state_dict.__wrapped__(module, state, strict=strict)


def test_state_dicts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def prepared(**options: Any) -> Language:
        module = build(batch_norm=False)
        unit_scale(module, lambda model: model.loss(next_token_batch(0)), **options)
        return module

    unit, folded, plain = prepared(storage="unit"), prepared(), build(batch_norm=False)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
            load_without_package(plain, unit.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match="size mismatch"):  # a part of the weights
            plain.head.load_state_dict({"weight": unit.state_dict()["head.weight"]}, strict=strict)
        for state in (plain.state_dict(), folded.state_dict()):
            with pytest.raises(UnitScalingError, match="these are plain weights"):
                unit.load_state_dict(state, strict=strict)
        with pytest.raises(UnitScalingError, match="another unit-scaling plan"):
            unit.load_state_dict(prepared(storage="unit", skip=["head"]).state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="unit_scaling_plan"):
        load_without_package(plain, unit.state_dict())

    before = unit.loss(next_token_batch(3))
    twin = prepared(storage="unit")
    with torch.no_grad():
        twin.head.weight.zero_()
    for assign in (False, True):
        assert not twin.load_state_dict(unit.state_dict(), assign=assign).missing_keys
        assert torch.equal(twin.loss(next_token_batch(3)), before)
    holder = torch.nn.ModuleDict({"model": prepared(storage="unit")})
    holder.load_state_dict({f"model.{key}": value for key, value in unit.state_dict().items()})
    assert torch.equal(holder["model"].loss(next_token_batch(3)), before)
    remove_unit_scaling(unit)
    assert unit.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(unit.state_dict())
    assert torch.allclose(plain.loss(next_token_batch(3)), before, rtol=1e-5)


def test_tied_weights_under_both_names() -> None:
    """What can't be folded keeps its marker in folded storage too."""

    def prepared() -> TiedLanguageModel:
        torch.manual_seed(0)
        model = TiedLanguageModel()
        unit_scale(model, lambda m: m(next_token_batch(0)["input_ids"]).square().mean(), verify=False)
        return model

    model, ids = prepared(), next_token_batch(1)["input_ids"]
    assert not plan_of(model).is_plain
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_without_package(TiedLanguageModel(), model.state_dict(), strict=False)
    twin = prepared()
    with torch.no_grad():
        next(twin.parameters()).zero_()
    for other in (twin, TiedLanguageModel()):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids), model(ids))


# ---------------------------------------------------------------------------------------------------------------------
# Contents
# ---------------------------------------------------------------------------------------------------------------------


class Storage(str, enum.Enum):
    UNIT = "unit"


@pytest.mark.parametrize("door", ["callback", "strategy"])
def test_only_plain_containers_are_saved(tmp_path: Path, door: str) -> None:
    """Options from Hydra and Enums must not make a checkpoint unreadable."""
    config = OmegaConf.create({"skip": ["head"], "overrides": {"block.mlp*": {"lr_multiplier": 0.5}}})
    options: dict[str, Any] = {"storage": Storage.UNIT, "skip": config.skip, "overrides": config.overrides}
    path = tmp_path / "a.ckpt"
    if door == "callback":
        save(path, UnitScaling(**options))
    else:
        save(path, strategy=UnitScalingStrategy(**options))

    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict):
            return {type(value)}.union(*map(kinds, value.keys()), *map(kinds, value.values()))
        if isinstance(value, (list, tuple)):
            return {type(value)}.union(*map(kinds, value))
        return {type(value)}

    checkpoint = torch.load(path, weights_only=True)
    assert kinds(checkpoint["unit_scaling_plan"]) <= {dict, list, str, int, float, bool, type(None)}
    assert not any("UnitScaling" in key for key in checkpoint["callbacks"])
    assert load_checkpoint(build(), path).to_dict() == checkpoint["unit_scaling_plan"]


def test_saving_does_not_touch_the_model(tmp_path: Path) -> None:
    whole = fit(tmp_path, UnitScaling(storage="unit"))

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    saved = fit(tmp_path, UnitScaling(storage="unit"), Saves())
    assert saved.losses == whole.losses
    assert_same_state(saved, whole)
