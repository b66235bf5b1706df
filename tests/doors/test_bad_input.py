"""What is wrong is named, with what to do about it, before anything was changed."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.training import Language, assert_same_state, batches, build, fit, trainer
from support.zoo_batches import Batch, next_token_batch
from torch import Tensor, nn

from lightning_unitscale import (
    ScaleMonitor,
    UnitScaling,
    UnitScalingError,
    load_checkpoint,
    scale_learning_rates,
    unit_scale,
)
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.near_names import near_glob
from lightning_unitscale.strategy import UnitScalingDDPStrategy, UnitScalingStrategy

DOORS = {
    "callback": UnitScaling,
    "strategy": UnitScalingStrategy,
    "function": lambda **options: unit_scale(build(), lambda model: model.loss(next_token_batch(0)), **options),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scheme": "umpu"},
            r"scheme='umpu' is not known; choose one of 'amax', 'completep', 'mus', .*\. Did you mean 'umup'\?",
        ),
        ({"storage": "fold"}, r"storage='fold' is not known.*Did you mean 'folded'\?"),
        ({"lr_units": "standart"}, r"lr_units='standart' is not known.*Did you mean 'standard'\?"),
        (
            {"format": "fp9"},
            r"format='fp9' is not known; choose one of 'fp8', .*'nvfp4', 'fp16', 'bf16'. Did you mean 'fp8'\?",
        ),
        ({"verify": "yes"}, "verify='yes' must be True or False"),
        ({"weights": 1}, "weights=1 must be True or False"),
        ({"skip": 3}, r"skip=3 must be globs of module or parameter names"),
        ({"skip": ["head", 3]}, r"skip=\['head', 3\] must be globs"),
        ({"overrides": ["head*"]}, r"overrides=\['head\*'\] must map globs to settings"),
        ({"overrides": {"head*": 2.0}}, r"overrides=.* must map globs to settings"),
        ({"lr_units": "umup", "weights": False}, "lr_units='umup' contradicts weights=False"),
        ({"weights": False, "activations": False}, "leave scheme='umup' nothing to do"),
        ({"weights": False, "activations": False, "gradients": False, "scheme": "amax"}, "leave scheme='amax' nothing"),
        (
            {"activations": False, "hyperparameters": {"alpha_attn": 2.0}},
            r"activations=False contradicts hyperparameters=\{'alpha_attn': 2.0\}, which decides nothing then",
        ),
        (
            {"weights": False, "scheme": "completep", "hyperparameters": {"alpha_in": 2.0}},
            r"weights=False contradicts hyperparameters=\{'alpha_in': 2.0\}",
        ),
        ({"overrides": {"head*": {"rol": "hidden"}}}, r"overrides\['head\*'\] key='rol' is not known.*mean 'role'\?"),
    ],
)
def test_options(door: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnitScalingError, match=message):
        DOORS[door](**options)


def test_one_glob_may_stand_alone() -> None:
    plan = DOORS["function"](skip="head*")
    assert any(name.startswith("head") and reason == "skipped by the options" for name, reason in plan.skipped)


def test_unknown_option_names() -> None:
    for door in (*DOORS.values(), UnitScalingDDPStrategy):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'storrage'\. Did you mean storage\?"):
            door(storrage="unit")
    with pytest.raises(TypeError, match=r"'every_steps'\. Did you mean every_n_steps\?"):
        ScaleMonitor(every_steps=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'famly'\. Did you mean family\?"):
        scale_learning_rates(None, None, famly="adam")  # type: ignore
    UnitScalingDDPStrategy(bucket_cap_mb=3)  # torch's, which Lightning does not know by name
    with pytest.raises(UnitScalingError, match=r"optimizer_family='adamw' is not known; choose one of 'adam', "):
        UnitScaling(optimizer_family="adamw")


def refuses(folder: Path, module: pl.LightningModule, message: str, *callbacks: pl.Callback, **options: Any) -> None:
    """Training ends with this error, the weights as they were and no plan in force."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UnitScalingError, match=message):
        fit(folder, *(callbacks or [UnitScaling()]), module=module, **options)
    assert plan_of(module) is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("options", [{"skip": ["heed*"]}, {"overrides": {"heed*": {"lr_multiplier": 2.0}}}])
def test_a_glob_that_matches_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    refuses(tmp_path, build(), r"heed\*", UnitScaling(**options))


def test_a_glob_is_corrected_by_a_part_of_a_name_too() -> None:
    names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj", "lm_head"]
    for glob, meant in (
        ("gatte", "*.gate_proj"),
        ("*gatte*", "*.gate_proj"),
        ("heed", "lm_head"),
        ("lm_haed", "lm_head"),
    ):
        assert near_glob(glob, names) == f"Did you mean {meant!r}?"
    assert near_glob("zzz", names).startswith("It has model.layers.0.mlp.gate_proj.weight, ")


class Unscalable(Language):
    """One gain; no matmul."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters({"optimizer": "adamw", "lr": 1e-3, "schedule": False})
        self.gain, self.losses = nn.Parameter(torch.ones(3)), []

    def loss(self, batch: Batch) -> Tensor:
        return (self.gain * 2).sum()


def test_nothing_to_scale(tmp_path: Path) -> None:
    refuses(tmp_path, Unscalable(), "nothing in Unscalable can be scaled")
    refuses(tmp_path, build(), "nothing in Language can be scaled", UnitScaling(skip=["*"]))


class NotFinite(Language):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * float("nan")


class WithoutLoss(Language):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss(batch)


def test_the_first_loss(tmp_path: Path) -> None:
    module = NotFinite()
    refuses(tmp_path, module, "the loss of the rehearsed step of NotFinite is nan.*nothing was changed")
    assert module.losses == []


@pytest.mark.parametrize("door", [UnitScaling, UnitScalingStrategy])
@pytest.mark.filterwarnings("ignore:unit scaling. the step on batch 0 gives no loss")
def test_a_run_without_any_loss(tmp_path: Path, door: Any) -> None:
    """A batch without loss is waited out; a run without one is an error, though only at its end."""
    options = {"strategy": door()} if door is UnitScalingStrategy else {}
    callbacks = [] if options else [door()]
    with pytest.raises(UnitScalingError, match="the rehearsed step of WithoutLoss gave no loss"):
        fit(tmp_path, *callbacks, module=(module := WithoutLoss()), **options)
    assert plan_of(module) is None


def scaled_checkpoint(path: Path, **options: Any) -> Path:
    loop = trainer(path.parent, UnitScaling(**options), max_steps=2)
    loop.fit(build(), batches())
    loop.save_checkpoint(path)
    return path


class OneMore(Language):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.extra = nn.Linear(3, 3)


class OneLess(Language):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.block.mlp


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_a_plan_of_another_model(tmp_path: Path, storage: str) -> None:
    path = scaled_checkpoint(tmp_path / "a.ckpt", storage=storage)
    for module, message in (
        (OneMore(), r"added: extra\.bias, extra\.weight"),
        (OneLess(), r"missing: block\.mlp\.0\.bias"),
        (Language(width=16), r"other shape: .*\[\d+(, \d+)?\] -> \[\d+"),
    ):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(UnitScalingError, match=f"the plan does not match the model .*{message}"):
            trainer(tmp_path, UnitScaling()).validate(module, batches(1), ckpt_path=path, verbose=False)
        with pytest.raises(UnitScalingError, match=f"the plan does not match the model .*{message}"):
            load_checkpoint(module, path)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    # A model that is prepared keeps its own plan when the checkpoint is refused.
    module = OneMore()
    unit_scale(module, lambda model: model.loss(next_token_batch(0)), storage=storage)
    plan = plan_of(module)
    with pytest.raises(UnitScalingError, match="does not match"):
        load_checkpoint(module, path)
    assert plan_of(module) is plan


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UnitScalingError, match=r"there is no checkpoint at .*missing\.ckpt"):
        load_checkpoint(build(), tmp_path / "missing.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(UnitScalingError, match=r"text\.ckpt: not a readable checkpoint"):
        load_checkpoint(build(), tmp_path / "text.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(UnitScalingError, match=r"list\.ckpt: not a checkpoint or state dict, but a list"):
        load_checkpoint(build(), tmp_path / "list.ckpt")
    path = scaled_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    for change, message in (
        ({"version": 99}, "the plan has version 99"),
        ({"parameters": None}, "is not a unit-scaling plan"),
    ):
        plan = {**checkpoint["unit_scaling_plan"], **change}
        if change == {"parameters": None}:
            del plan["parameters"]
        torch.save({**checkpoint, "unit_scaling_plan": plan}, tmp_path / "b.ckpt")
        with pytest.raises(UnitScalingError, match=message):
            load_checkpoint(build(), tmp_path / "b.ckpt")


def test_going_on_from_a_run_without_unit_scaling(tmp_path: Path) -> None:
    plain = trainer(tmp_path, max_steps=2)
    plain.fit(build(), batches())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    for callbacks, options in (([UnitScaling()], {}), ([], {"strategy": "unitscale"})):
        module = build()
        before = module.head.weight.clone()
        with pytest.raises(UnitScalingError, match=r"\(step 2\) was trained without unit scaling.*scheme='preserve'"):
            trainer(tmp_path, *callbacks, max_steps=4, **options).fit(
                module, batches(), ckpt_path=tmp_path / "plain.ckpt"
            )
        assert torch.equal(module.head.weight, before)
    trainer(tmp_path, UnitScaling("preserve"), max_steps=4).fit(build(), batches(), ckpt_path=tmp_path / "plain.ckpt")


class Sign(torch.optim.Optimizer):
    """Of a family that can't be known."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


class SignTrained(Language):
    def configure_optimizers(self) -> Any:
        return Sign(self.parameters(), 1e-3)


def test_an_optimizer_of_unknown_family(tmp_path: Path) -> None:
    torch.manual_seed(0)
    refuses(tmp_path, SignTrained(), r"the optimizer Sign needs.*UnitScaling\(optimizer_family=")
    runs = {}
    for name, callbacks, options in (
        ("callback", [UnitScaling(optimizer_family="adam")], {}),
        ("strategy", [], {"strategy": UnitScalingStrategy(optimizer_family="adam")}),
        ("both", [UnitScaling(optimizer_family="adam")], {"strategy": "unitscale"}),
    ):
        torch.manual_seed(0)
        runs[name] = fit(tmp_path, *callbacks, module=SignTrained(), max_steps=5, **options).losses

    torch.manual_seed(0)
    twin = SignTrained()
    twin.log = lambda *args, **kwargs: None
    plan = unit_scale(twin, lambda model: model.loss(next_token_batch(0)))
    optimizer = twin.configure_optimizers()
    scale_learning_rates(optimizer, plan, family="adam")
    for step in range(5):
        optimizer.zero_grad()
        twin.training_step(next_token_batch(step), step).backward()
        optimizer.step()
    assert set(map(tuple, runs.values())) == {tuple(twin.losses)}
    # What needs no rule takes any optimizer.
    torch.manual_seed(0)
    untouched = SignTrained()
    fit(tmp_path, module=untouched, max_steps=5)
    torch.manual_seed(0)
    preserved = SignTrained()
    fit(tmp_path, UnitScaling("preserve"), module=preserved, max_steps=5)
    assert_same_state(preserved, untouched)


def test_a_small_rate_in_umup_units(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match=r"lr_units='umup' with a learning rate of 0\.001: .* about 1 is usual"):
        fit(tmp_path, UnitScaling(lr_units="umup"), module=build(lr=1e-3), max_steps=2)
    recwarn.clear()
    fit(tmp_path, UnitScaling(lr_units="umup"), module=build(lr=0.5), max_steps=2)
    fit(tmp_path, UnitScaling(lr_units="umup"), module=build(lr=0.5, schedule=True), max_steps=2)  # begins at 0.02
    fit(tmp_path, UnitScaling(), module=build(lr=1e-3), max_steps=2)
    assert not [warning for warning in recwarn if "lr_units" in str(warning.message)]


def test_two_that_disagree(tmp_path: Path) -> None:
    refuses(tmp_path, build(), "more than one UnitScaling", UnitScaling(), UnitScaling(storage="unit"))
    different = "the UnitScaling callback and the strategy were given different options"
    strategy = UnitScalingStrategy(storage="unit")
    refuses(tmp_path, build(), different, UnitScaling("preserve"), strategy=strategy)
    strategy = UnitScalingStrategy(optimizer_family="sgd")
    refuses(tmp_path, build(), different, UnitScaling(optimizer_family="adam"), strategy=strategy)


def test_one_device_strategy_on_two(tmp_path: Path) -> None:
    with pytest.raises(UnitScalingError, match=r"the Trainer has 2; use strategy='unitscale_ddp', or devices=1"):
        trainer(tmp_path, strategy="unitscale", devices=2, max_steps=1).fit(build(), batches())
    assert isinstance(trainer(tmp_path, strategy="unitscale_ddp", devices=2).strategy, UnitScalingDDPStrategy)


def test_an_ordinary_weight_decay_in_umup_units(tmp_path: Path) -> None:
    module = build(lr=0.5)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1.0, weight_decay=0.1)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"lr · weight_decay = 0\.1"):
        fit(tmp_path, UnitScaling(lr_units="umup"), module=module, max_steps=1)
