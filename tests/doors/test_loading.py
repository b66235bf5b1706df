"""Weights come with their plan however they are read back, and trained weights are not taken for initial ones."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.fresh_python import run_python
from support.training import Language, assert_same_state, batches, build, fit, trainer
from support.zoo_batches import Batch, next_token_batch
from support.zoo_modules import VOCAB
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from lightning_unitscale import UnitScaling, UnitScalingError, load_checkpoint, remove_unit_scaling, unit_scale
from lightning_unitscale.attachments import wrap_load_state_dict
from lightning_unitscale.engine.plan.plan import Plan, plan_of

STORAGES = ("folded", "unit")
STEPS = 6


class NoNorms(Language):
    """Nothing in it shows whether it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(self.head.in_features, 48), nn.ReLU(), nn.Linear(48, self.head.in_features)
        )
        self.norm = nn.Identity()


def new(kind: type[Language], seed: int = 0) -> Language:
    torch.manual_seed(seed)
    return kind()


def loss_of(module: nn.Module) -> float:
    """Of a batch that no training has seen; in evaluation, so that nothing changes."""
    was_training = module.training
    with torch.no_grad():
        loss = float(module.eval().loss(next_token_batch(70)))
    module.train(was_training)
    return loss


def by_load_from_checkpoint(kind: type[Language], folder: Path) -> Language:
    return kind.load_from_checkpoint(folder / "a.ckpt", weights_only=True)


def by_load_state_dict(kind: type[Language], folder: Path) -> Language:
    module = new(kind, seed=5)
    module.load_state_dict(torch.load(folder / "a.pt", weights_only=True))
    return module


def by_load_checkpoint(kind: type[Language], folder: Path) -> Language:
    module = new(kind, seed=5)
    assert load_checkpoint(module, folder / "a.pt").to_dict() == plan_of(module).to_dict()
    return module


def prepared(module: nn.Module | None = None, **options: Any) -> nn.Module:
    module = module or build(batch_norm=False)
    unit_scale(module, lambda model: model.loss(next_token_batch(0)), **options)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# The plan comes with the weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", [Language, NoNorms])
def test_weights_read_back_go_on_as_the_module_that_was_never_saved(
    tmp_path: Path, kind: type[Language], storage: str
) -> None:
    module = new(kind)
    loop = trainer(tmp_path, UnitScaling(storage=storage), max_steps=STEPS)
    loop.fit(module, batches())
    loop.save_checkpoint(tmp_path / "a.ckpt")
    torch.save(module.state_dict(), tmp_path / "a.pt")
    doors: list[Callable[..., Language]] = [by_load_from_checkpoint, by_load_state_dict, by_load_checkpoint]
    read = [door(kind, tmp_path) for door in doors]
    assert [loss_of(other) for other in read] == [loss_of(module)] * len(read)

    def go_on(model: Language) -> list[float]:
        model.losses.clear()
        fit(tmp_path, UnitScaling(storage=storage), module=model, max_steps=STEPS)
        return model.losses

    expected = go_on(module)
    for other in read:
        assert go_on(other) == expected
        assert_same_state(other, module)


@pytest.mark.parametrize("storage", STORAGES)
def test_an_unprepared_twin_becomes_prepared(storage: str) -> None:
    online = prepared(storage=storage)
    target = build(batch_norm=False)
    for _ in range(2):  # prepared by the first, as ever by the second
        with torch.no_grad():
            online.head.weight.mul_(1.5)
        target.load_state_dict(online.state_dict())
        assert loss_of(target) == loss_of(online)
        assert plan_of(target).to_dict() == plan_of(online).to_dict()
    assert torch.equal(remove_unit_scaling(target).head.weight, remove_unit_scaling(online).head.weight)
    fresh = build(batch_norm=False)
    fresh.load_state_dict(target.state_dict())  # plain again
    assert plan_of(fresh) is None


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("wrapped", [AveragedModel, torch.compile, lambda model: nn.ModuleDict({"model": model})])
def test_the_plan_is_found_below_a_wrapper(wrapped: Callable[[nn.Module], nn.Module], storage: str) -> None:
    model, twin = prepared(storage=storage), build(batch_norm=False)
    outer = wrapped(twin)
    outer.load_state_dict(wrapped(model).state_dict())
    inner = next(child for child in outer.modules() if isinstance(child, Language))
    assert loss_of(inner) == loss_of(model)
    assert plan_of(inner) is not None
    assert sum(plan_of(child) is not None for child in outer.modules()) == 1


class Around(pl.LightningModule):
    """A network that got its weights on its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch["input_ids"]).flatten(0, -2), batch["labels"].flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, VOCAB))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_network_loaded_on_its_own_goes_on_inside_a_lightning_module(tmp_path: Path, storage: str) -> None:
    whole = fit(tmp_path, UnitScaling(storage=storage), module=Around(network()), max_steps=10)
    net = network()
    batch = next_token_batch(0)
    unit_scale(
        net, lambda m: F.cross_entropy(m(batch["input_ids"]).flatten(0, -2), batch["labels"].flatten()), storage=storage
    )
    read = network()
    read.load_state_dict(net.state_dict())
    module = fit(tmp_path, UnitScaling(storage=storage), module=Around(read), max_steps=10)
    assert module.losses == pytest.approx(whole.losses, rel=1e-5)
    assert plan_of(read) is None
    assert plan_of(module) is not None


def test_a_state_dict_asked_for_again_writes_the_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for storage in STORAGES:
        module = prepared(storage=storage)
        plan, written = plan_of(module), []
        to_dict = Plan.to_dict
        monkeypatch.setattr(Plan, "to_dict", lambda self: written.append(1) or to_dict(self))  # noqa: B023
        for _ in range(3):
            module.state_dict()
        assert len(written) == 1
        plan.loss_scale = 2.0
        state = module.state_dict()
        assert len(written) == 2
        twin = build(batch_norm=False)
        twin.load_state_dict(state)
        assert plan_of(twin).loss_scale == 2.0
        monkeypatch.undo()


def test_wrapping_again_changes_nothing() -> None:
    method = nn.Module.load_state_dict
    wrap_load_state_dict()
    assert nn.Module.load_state_dict is method


# ---------------------------------------------------------------------------------------------------------------------
# Weights that the plan does not fit
# ---------------------------------------------------------------------------------------------------------------------


def with_other_head() -> Language:
    module = build(batch_norm=False)
    module.head = nn.Linear(module.head.in_features, VOCAB + 3)
    return module


def test_folded_weights_under_another_head_are_known_to_be_trained(tmp_path: Path) -> None:
    state = prepared().state_dict()
    for key in ("head.weight", "head.bias"):
        del state[key]
    other = with_other_head()
    assert other.load_state_dict(state, strict=False).missing_keys == ["head.weight", "head.bias"]
    assert torch.equal(other.embedding.weight, state["embedding.weight"])
    before, loss = copy.deepcopy(other.state_dict()), loss_of(other)
    with pytest.raises(UnitScalingError, match=r"of the module came from a model prepared.*scheme='preserve'"):
        fit(tmp_path, UnitScaling(), module=other, max_steps=2)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert loss_of(prepared(other, scheme="preserve")) == loss


def test_a_part_of_the_weights_is_not_the_plan_s_model() -> None:
    for storage in STORAGES:
        state = prepared(storage=storage).state_dict()
        del state["embedding.weight"]
        module = build(batch_norm=False)
        if storage == "unit":
            with pytest.raises(UnitScalingError, match=r"embedding\.weight are not among them"):
                module.load_state_dict(state, strict=False)
        else:
            module.load_state_dict(state, strict=False)
            with pytest.raises(UnitScalingError, match="came from a model prepared"):
                prepared(module)
        assert plan_of(module) is None


@pytest.mark.parametrize("storage", STORAGES)
def test_what_the_plan_leaves_alone_may_be_missing(storage: str) -> None:
    """A checkpoint without its frozen part, say."""
    model = build(batch_norm=False)
    model.embedding.requires_grad_(False)
    state = prepared(model, storage=storage).state_dict()
    del state["embedding.weight"]
    twin = build(batch_norm=False)
    twin.embedding.requires_grad_(False)
    twin.load_state_dict(state, strict=False)
    assert loss_of(twin) == loss_of(model)


def test_explicit_factors_are_refused_by_another_model() -> None:
    state = prepared(storage="unit").state_dict()
    for strict in (True, False):
        with pytest.raises(UnitScalingError, match="does not match the model"):
            with_other_head().load_state_dict(state, strict=strict)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_load_that_fails_leaves_the_module_unprepared(storage: str) -> None:
    state = prepared(storage=storage).state_dict()
    state["surplus"] = torch.zeros(2)
    module = build(batch_norm=False)
    with pytest.raises(RuntimeError, match="surplus"):
        module.load_state_dict(state)
    assert plan_of(module) is None
    assert not module._state_dict_hooks
    assert not module._load_state_dict_pre_hooks


# ---------------------------------------------------------------------------------------------------------------------
# Weights that come without a plan, but look trained
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_trained_without_unit_scaling_are_not_rescaled(tmp_path: Path, batch_norm: bool) -> None:
    module = fit(tmp_path, module=build(batch_norm=batch_norm), max_steps=STEPS)
    before, loss = copy.deepcopy(module.state_dict()), loss_of(module)
    with pytest.raises(UnitScalingError, match=r"Language holds trained weights: .*norm.*scheme='preserve'"):
        fit(tmp_path, UnitScaling(), module=module, max_steps=2)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    norms = [name for name, child in module.named_modules() if isinstance(child, (nn.LayerNorm, nn.BatchNorm1d))]
    assert plan_of(prepared(copy.deepcopy(module), skip=norms)) is not None
    fit(tmp_path, UnitScaling("preserve"), module=module, max_steps=2)
    assert loss_of(module) == pytest.approx(loss, rel=0.2)


def norms(kind: Callable[[int], nn.Module], count: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(count) for layer in (nn.Linear(8, 8), kind(8), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def gains(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model if isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.GroupNorm))]


def is_taken(model: nn.Module) -> bool:
    x = torch.randn(6, 8)
    try:
        unit_scale(model, lambda m: m(x).square().mean())
    except UnitScalingError as error:
        assert "holds trained weights" in str(error)
        return False
    return True


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
    "group": lambda width: nn.GroupNorm(2, width),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("trained", "drawn", "taken"), [(0, 3, True), (1, 0, True), (2, 0, False), (3, 0, False)])
def test_norms_tell_trained_weights_from_drawn_ones(name: str, trained: int, drawn: int, taken: bool) -> None:
    """DCGAN draws gains from N(1, 0.02); training moves biases too."""
    model = norms(NORMS[name])
    for norm in gains(model)[: trained + drawn]:
        nn.init.normal_(norm.weight, 1.0, 0.02)
        if trained:
            nn.init.normal_(norm.bias, 0.0, 0.02)
    assert is_taken(model) == taken


@pytest.mark.parametrize(("count", "taken"), [(0, True), (2, True), (3, False)])
def test_norms_without_biases_must_all_differ(count: int, taken: bool) -> None:
    model = norms(nn.RMSNorm)
    for norm in gains(model)[:count]:
        nn.init.normal_(norm.weight, 1.0, 0.02)
    assert is_taken(model) == taken


def test_frozen_norms_do_not_speak_for_the_rest() -> None:
    model = norms(nn.LayerNorm)
    for norm in gains(model):
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, 0.0, 0.1)
    assert is_taken(model.requires_grad_(True)) is False
    for norm in gains(model):
        norm.requires_grad_(False)
    assert is_taken(model)


# ---------------------------------------------------------------------------------------------------------------------
# `preserve` keeps the function of weights that have a plan
# ---------------------------------------------------------------------------------------------------------------------


def test_preserve_takes_the_place_of_a_plan_whose_weights_are_the_function(tmp_path: Path) -> None:
    module = fit(tmp_path, UnitScaling(), max_steps=STEPS)
    plain = build()
    plain.load_state_dict(dict(module.state_dict()))  # a dict has no metadata
    assert plan_of(plain) is None
    for model in (module, plain):
        model.losses.clear()
    for callback, model in ((UnitScaling("preserve"), module), (None, plain)):
        fit(tmp_path, *([callback] if callback else []), module=model, max_steps=STEPS)
    assert module.losses == plain.losses
    assert plan_of(module).scheme == "preserve"
    assert prepared(prepared(), scheme="preserve") is not None


def test_preserve_does_not_take_the_place_of_explicit_factors(tmp_path: Path) -> None:
    module = fit(tmp_path, UnitScaling(storage="unit"), max_steps=2)
    with pytest.raises(UnitScalingError, match="was prepared with scheme='umup'"):
        fit(tmp_path, UnitScaling("preserve", storage="unit"), module=module, max_steps=2)
    with pytest.raises(UnitScalingError, match="already unit-scaled"):
        prepared(module, scheme="preserve")


# ---------------------------------------------------------------------------------------------------------------------
# Processes that the Trainer starts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "strategy"),
    [
        ("folded", "ddp_spawn"),
        ("unit", "ddp_spawn"),
        ("folded", "unitscale_ddp_spawn"),
        ("folded", "unitscale_ddp_spawn_find_unused_parameters_true"),
        ("unit", "ddp_fork"),
        ("folded", "unitscale_ddp_fork"),
    ],
)
def test_weights_and_plan_come_back_from_processes_that_were_started(
    tmp_path: Path, storage: str, strategy: str
) -> None:
    # In a fresh interpreter: the fork of one in which other tests have left threads may wait for them for ever.
    code = "import sys; from doors import test_loading; test_loading.come_back(*sys.argv[1:])"
    run_python("-c", code, tmp_path, storage, strategy)


def come_back(folder: str, storage: str, strategy: str) -> None:
    """Both processes see the same batches, so the run is that of one process."""
    torch.set_num_threads(1)
    callbacks = [] if strategy.startswith("unitscale") else [UnitScaling(storage=storage)]
    options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    module = build(batch_norm=False)
    trainer(folder, *callbacks, max_steps=4, **options).fit(module, batches())
    alone = fit(folder, UnitScaling(storage=storage), module=build(batch_norm=False), max_steps=4)
    assert loss_of(module) == pytest.approx(loss_of(alone), rel=1e-5)
    assert loss_of(module) != loss_of(build(batch_norm=False))
    assert all(callback.plan is plan_of(module) for callback in callbacks)
    assert plan_of(module).storage == storage


def test_an_error_before_processes_are_started_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = trainer(tmp_path, strategy="unitscale_ddp_spawn", devices=2, max_steps=2)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no process can be started")

    monkeypatch.setattr(loop.strategy.launcher, "launch", fail)
    with pytest.raises(OSError, match="no process can be started"):
        loop.fit(build(), batches())
