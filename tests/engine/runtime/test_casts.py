"""Casts in the engine and in Lightning: what is cast, when it is measured, and that nothing goes stale or unnoticed."""

import copy
import pickle
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from support import zoo
from support.prepared import build as zoo_build
from support.prepared import compiled_losses, gradients, prepared
from support.training import ByStep, Language, assert_same_state, batches, build, fit, trainer
from support.zoo import Batch, next_token_batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_unitscale import (
    UnitScaling,
    UnitScalingError,
    load_checkpoint,
    recalibrating,
    remove_unit_scaling,
    scale_learning_rates,
    unit_scale,
)
from lightning_unitscale.cookbook.measuring.pass_counter import PassCounter
from lightning_unitscale.engine.checks import calibration
from lightning_unitscale.engine.checks.calibration import Calibration
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.runtime import casts
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.engine.runtime.observer import entered_observers
from lightning_unitscale.formats import FORMATS, OPERANDS, cast
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.ops.products import MatrixProducts


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def is_eager() -> bool:
    """Whether compiled functions run uncompiled, as they would under a compile stance that was left behind."""
    compiled = torch.compile(lambda x: torch.compiler.is_compiling(), backend="eager")
    torch._dynamo.reset()
    return not compiled(torch.ones(1))


# ---------------------------------------------------------------------------------------------------------------------
# The zoo
# ---------------------------------------------------------------------------------------------------------------------

QUICK = (
    "gpt2-eager",
    "llama-sdpa",
    "einsum-attention",
    "multihead-attention",
    "experts-grouped",
    "weight-norm",
    "lora",
)
EXACT_ENOUGH = 0.9  # of the gradient as a whole; tiny models with batch norm on four samples amplify any rounding
ILL_CONDITIONED = ("resnet", "unet", "albert", "t5-sdpa", "t5-eager")


@pytest.mark.parametrize("options", [{"storage": "folded"}, {"storage": "unit"}, {"scheme": "preserve"}], ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in zoo.CASES]
)
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_every_model(name: str, options: dict[str, str]) -> None:
    case = zoo.CASES[name]
    plain, _ = prepared(case, **options)
    model, plan = prepared(case, format="fp8", **options)
    for site in plan.sites:
        if site.params and site.op in MATMULS:
            assert (site.format == "fp8") != bool(site.format_reason), site.name
    assert plan.cast_sites
    assert len(casts_in_force(model)) == len({(site.params[0], site.op) for site in plan.cast_sites})
    (loss, exact), (found, narrow) = (gradients(case, module, seed=1) for module in (plain, model))
    assert float(found) == pytest.approx(float(loss), rel=0.03)
    assert exact.keys() == narrow.keys()
    whole = [torch.cat([grads[name].flatten() for name in exact]) for grads in (exact, narrow)]
    if name not in ILL_CONDITIONED:
        assert float(F.cosine_similarity(*whole, dim=0)) > EXACT_ENOUGH
    assert all(gradient.isfinite().all() for gradient in narrow.values())


def test_all_of_a_plan_s_casts_are_made() -> None:
    """Counts the casts, so that a site that the plan has but the forward pass misses would show."""
    case = zoo.CASES["llama-sdpa"]
    model, plan = prepared(case, format="fp8")
    made = set()
    for use, site in casts_in_force(model).items():
        original = site._kept
        site._kept = lambda *a, use=use, original=original, **k: (made.add(use), original(*a, **k))[1]
    gradients(case, model)
    assert made == {(site.params[0], site.op) for site in plan.cast_sites}


# ---------------------------------------------------------------------------------------------------------------------
# One linear layer, by hand
# ---------------------------------------------------------------------------------------------------------------------


def two_layers(**options: Any) -> tuple[nn.Sequential, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    x = torch.randn(64, 32)
    return model, unit_scale(model, lambda m: m(x).square().mean(), "preserve", **{"format": "fp8", **options})


def by_hand(model: nn.Sequential, x: Tensor, plan: Plan) -> Tensor:
    for position in (0, 2):
        site = next(site for site in plan.cast_sites if site.params[0] == f"{position}.weight")
        layer, (sx, sw) = model[position], (site.operand_scales[operand] for operand in ("x", "weight"))
        x_hat = cast(x, torch.float8_e4m3fn, sx).float() / sx
        w_hat = cast(layer.weight, torch.float8_e4m3fn, sw).float() / sw
        x = F.linear(x_hat, w_hat, layer.bias)
        x = F.relu(x) if position == 0 else x
    return x


def test_the_function_is_that_of_the_cast_operands() -> None:
    model, plan = two_layers()
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(x), by_hand(model, x, plan), rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # training's numerics
        assert torch.equal(model.eval()(x), model.train()(x))


def test_without_operand_scales() -> None:
    _, plan = two_layers(weights=False, activations=False, gradients=False)
    assert all(set(site.operand_scales.values()) == {1.0} for site in plan.cast_sites)
    _, plan = two_layers()
    assert all(site.operand_scales["weight"] > 1 and site.operand_scales["gradient"] > 1 for site in plan.cast_sites)


def test_a_zero_operand_is_not_guessed_at(tmp_path: Path) -> None:
    """Behind a weight of 0 no gradient tells its scale: nothing is cast until one does, and the user is told."""
    case = zoo.CASES["dit"]
    with pytest.warns(UserWarning, match=r"14 sites stay in the compute dtype.*all 0"):
        model, _ = prepared(case, scheme="preserve", format="fp8")
    plain = zoo_build(case)
    assert gradients(case, model)[0] == gradients(case, plain)[0]
    callback = UnitScaling("preserve", format="fp8", recalibrate=(1000,), verify=False)
    torch.manual_seed(0)
    fit(tmp_path, callback, module=zoo.CaseModule(case), data=zoo.loader(case, 9), max_steps=9)
    assert callback.plan is not None
    assert callback.plan.measured_at == [0, 1, 3]  # by then all have been seen
    assert all(site.operand_scales["gradient"] > 1 for site in callback.plan.cast_sites)


def change_with_optimizer(layer: nn.Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=1.0).step()


class DataSGD(torch.optim.SGD):
    """Writes to `.data`, as older optimizers do: the version of the parameter stays."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(1.0)


CHANGES = {
    "optimizer": change_with_optimizer,
    "data-optimizer": lambda layer: DataSGD([layer.weight], lr=1.0).step(),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assign": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=True),
    "copy_": lambda layer: torch.no_grad()(layer.weight.copy_)(layer.weight + 1),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cast_weight_is_never_stale(change: str) -> None:
    model, plan = two_layers()
    x = torch.randn(8, 32)
    before = model(x)
    CHANGES[change](model[0])
    after = model(x)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, by_hand(model, x, plan), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loop_without_an_optimizer(frozen: bool) -> None:
    """Writes to `.data`, which counts no version up, and takes no step of any optimizer."""
    model, plan = two_layers()
    model[2].requires_grad_(not frozen)
    x = torch.randn(64, 32)
    for _ in range(3):
        y = model(x)
        assert torch.allclose(y, by_hand(model, x, plan), rtol=1e-5, atol=1e-5)
        y.square().mean().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.5 * parameter.grad
        model.zero_grad()


def test_a_computed_weight_is_never_stale() -> None:
    case = zoo.CASES["weight-norm"]
    model, _ = prepared(case, format="fp8", verify=False)
    for step in range(3):
        fresh = copy.deepcopy(model)
        for site in casts_in_force(fresh).values():
            site._weight = None
        losses = [case.loss(module, case.batch(0)) for module in (model, fresh)]
        assert losses[0].item() == losses[1].item(), step
        with torch.no_grad():
            for p in model.parameters():
                p.data = p.data * 1.5  # the computed weight may lie where the last one did
        del losses


def test_weights_are_cast_once_for_accumulated_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = two_layers()
    model[2].requires_grad_(False)
    counted: list[tuple[int, ...]] = []

    def counting(tensor: Tensor, *args: Any) -> Tensor:
        counted.append(tuple(tensor.shape))
        return cast(tensor, *args)

    monkeypatch.setattr("lightning_unitscale.ops.cast_for_products.cast", counting)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    for _ in range(2):
        counted.clear()
        for _ in range(4):
            model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
        assert counted.count((48, 32)) == 1
        assert counted.count((16, 48)) <= 1  # frozen


def test_on_tensor_cores_a_kept_weight_serves_both_passes() -> None:
    """ "meta" stands for CUDA: three casts for the first batch, of which the weight's is in both layouts; then two."""
    site = Site(
        "", "forward", "linear", "hidden", params=["w"], format="fp8", operand_scales=dict.fromkeys(OPERANDS, 1.0)
    )
    casting = casts.WeightCast(site)
    with torch.device("meta"):
        weight, x = (torch.empty(64, 64, requires_grad=True) for _ in range(2))
    counted = []
    for frozen_input in (True, False, False):  # what was cast for the forward pass alone does not serve a backward pass
        with PassCounter(64 * 64) as counter:
            casting(x.detach() if frozen_input else x, weight, MatrixProducts()).backward(x.detach())
        counted.append(sum("fp8_cast" in name for name, _ in counter.passes))
    assert counted == [3, 3, 2]


def test_a_graph_that_is_captured_casts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cast from before would be the weight of every replay."""
    model, _ = two_layers()
    x = torch.randn(8, 32)
    y = model(x)
    kept = [site._weight for site in casts_in_force(model).values()]
    monkeypatch.setattr(casts, "_is_captured", lambda weight: True)
    for site in casts_in_force(model).values():
        monkeypatch.setattr(site, "_weight", None)
    assert torch.equal(model(x), y)
    assert all(kept)
    assert not any(site._weight for site in casts_in_force(model).values())


def test_copies_run_their_own_weights() -> None:
    model, _ = two_layers()
    x = torch.randn(8, 32)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other[0].weight.zero_()
        assert not torch.equal(other(x), y)
        assert torch.equal(model(x), y)


def test_removing_gives_the_plain_function() -> None:
    model, _ = two_layers()
    x = torch.randn(8, 32)
    plain = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    plain.load_state_dict(dict(model.state_dict()))  # a dict carries no plan
    assert not torch.equal(model(x), plain(x))
    assert torch.equal(remove_unit_scaling(model)(x), plain(x))


class OneImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).mean((-1, -2))


def test_a_convolution_takes_one_sample_after_batches() -> None:
    model, images = OneImage(), torch.randn(4, 3, 8, 8)
    unit_scale(model, lambda m: m(images).square().mean(), "preserve", format="fp8")
    assert torch.allclose(model(images[0]), model(images)[0], atol=1e-6)


class Applied(nn.Module):
    """Its weight multiplies from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


def test_a_call_that_became_another_is_named() -> None:
    model, x = Applied(), torch.randn(32, 16)
    unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    with pytest.raises(UnitScalingError, match=r"Applied\.forward: the operands of matmul .*vector"):
        model(x[:, 0])


class Masked(nn.Module):
    """A parametrization with a buffer."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_a_masked_weight_is_measured() -> None:
    layer, x = nn.Linear(32, 48), torch.randn(64, 32)
    nn.utils.parametrize.register_parametrization(layer, "weight", Masked((torch.rand(48, 32) > 0.9).float()))
    model = nn.Sequential(layer, nn.ReLU())
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    (site,) = plan.cast_sites
    assert set(site.measured) == {"x", "weight", "gradient"}
    assert site.measured["weight"]["rms"] == pytest.approx(float(layer.weight.square().mean().sqrt()), rel=1e-5)
    sx, sw = site.operand_scales["x"], site.operand_scales["weight"]
    x_hat, w_hat = (cast(t, torch.float8_e4m3fn, s).float() / s for t, s in ((x, sx), (layer.weight, sw)))
    assert torch.allclose(model(x), F.relu(F.linear(x_hat, w_hat, layer.bias)), atol=1e-6)


def test_a_cast_that_is_not_made_is_no_cast_of_the_plan() -> None:
    """Pruning computes the weight in a hook, before anything of the plan is entered."""
    model, x = nn.Linear(32, 48), torch.randn(64, 32)
    nn.utils.prune.random_unstructured(model, "weight", 0.5)
    with pytest.warns(UserWarning, match="out of reach of an interceptor"):
        plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    assert plan.cast_sites == []


# ---------------------------------------------------------------------------------------------------------------------
# Compiled, checkpointed, adapted
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-sdpa", "einsum-attention", "tied-embedding", "conv-transformer", "lora"])
def test_compiled_without_breaks_or_recompilation(name: str) -> None:
    case = zoo.CASES[name]
    model, plan = prepared(case, format="fp8", verify=False)
    compiled_losses(case, model, plan, (1.0, 4.0, 0.25))


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant
        self.first = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.model(x)
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    found = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model = Checkpointed(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), how)
        x = torch.randn(64, 32)
        plan = unit_scale(model, lambda m, x=x: m(x).square().mean(), "preserve", format="fp8")
        loss = model(x).square().mean()
        loss.backward()
        scales = {site.name: site.operand_scales for site in plan.cast_sites}
        found.append((loss.item(), scales, [p.grad for p in model.parameters()]))
    assert found[0][:2] == found[1][:2]
    assert len(found[0][1]) == 3
    assert all(torch.equal(one, other) for one, other in zip(found[0][2], found[1][2], strict=True))


@pytest.mark.parametrize("own_thread", [False, True])
def test_gradients_are_seen_where_layers_run_again_in_the_backward_pass(own_thread: bool) -> None:
    """Checkpointed the reentrant way: on CUDA in a thread of autograd's, in which no mode is entered."""
    torch.manual_seed(0)
    model = Checkpointed(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), True)
    x = torch.randn(64, 32)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8")
    measurement = Calibration(model, plan, (1,))
    for site in plan.cast_sites:
        site.measured = {}
    with measurement.observe(1):
        loss = model(x).square().mean()
        if own_thread:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
    measurement.finish()
    assert all(set(site.measured) == {"x", "weight", "gradient"} for site in plan.cast_sites)


@pytest.mark.filterwarnings("ignore:unit scaling")
def test_peft(tmp_path: Path) -> None:
    case = zoo.CASES["llama-sdpa"]
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    module = zoo.CaseModule(case)
    module.model = peft.get_peft_model(module.model, config)
    callback = UnitScaling("preserve", format="fp8", recalibrate=(1000,))
    fit(tmp_path, callback, module=module, data=zoo.loader(case, 6), max_steps=6)
    assert callback.plan is not None
    adapters = {site.params[0]: site for site in callback.plan.cast_sites if "lora_" in site.params[0]}
    assert len(adapters) == 8
    for name, site in adapters.items():  # B starts at 0, and so do the gradients of A's product
        assert set(site.measured) == {"x", "weight", "gradient"}, name
        assert site.operand_scales["gradient"] > 1
        assert site.operand_scales["weight"] > 1


# ---------------------------------------------------------------------------------------------------------------------
# In a Trainer
# ---------------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"format": "fp8"}


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


def assert_same_state_but_marker(one: nn.Module, other: nn.Module) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


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


def plain_loop(steps: int, batches_a_step: int = 1, *, schedule: bool = True, **options: Any) -> tuple[Any, Plan]:
    """As `fit` does it, without Lightning."""
    model = build(batch_norm=False)
    plan = unit_scale(model, lambda m: m.loss(next_token_batch(0)), **OPTIONS, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    scale_learning_rates(optimizer, plan)
    losses = []
    for step in range(steps):
        with recalibrating(plan, step) if schedule else nullcontext():
            for _ in range(batches_a_step):
                loss = model.loss(next_token_batch(step)) / batches_a_step
                loss.backward()
        losses.append(float(loss) * batches_a_step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, plan


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


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong is seen
# ---------------------------------------------------------------------------------------------------------------------


class Spiking(Language):
    """From step 1 on, the head's input is 2^16 times what it was, and the next time 2^-16."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.block(self.embedding(ids)).flatten(0, 1))
        factor = 2.0 ** (16 * (-1) ** self.trainer.global_step) if self.trainer.global_step else 1.0
        return self.head(x * factor) / factor


def test_a_site_that_no_scale_fits_falls_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Spiking(batch_norm=False)
    callback = UnitScaling("preserve", **OPTIONS, verify=False)
    with pytest.warns(UserWarning, match="head:linear stays in the compute dtype from now on: at step 2 casting its"):
        fit(tmp_path, callback, module=module, max_steps=5)
    plan = callback.plan
    assert plan is not None
    (left,) = [site for site in plan.sites if site.params and site.params[0] == "head.weight"]
    assert left.format is None
    assert "at step 2 casting its" in left.format_reason
    assert ("head.weight", "linear") not in casts_in_force(module)
    assert len(plan.cast_sites) == len(casts_in_force(module)) > 0
    assert all(torch.tensor(loss).isfinite() for loss in module.losses)
    loaded = Plan.from_dict(plan.to_dict())
    assert [site.name for site in loaded.cast_sites] == [site.name for site in plan.cast_sites]


class Infinite(Language):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.block(self.embedding(ids)).flatten(0, 1))
        if self.trainer.global_step == 1:
            x = torch.cat([x[:1] * float("inf"), x[1:]])
        return self.head(x).nan_to_num(0.0, 0.0, 0.0)


def test_a_non_finite_operand_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Infinite(batch_norm=False)
    with pytest.warns(UserWarning, match=r"at step 1 the x of head:linear \(head\.weight\) has \d+ elements"):
        fit(tmp_path, UnitScaling("preserve", **OPTIONS, verify=False), module=module, max_steps=2)


def test_a_wrong_product_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, message in (
        ("forward", r"its output is off by"),
        ("grad_x", r"its gradient of x is off by 1\.00%"),
        ("grad_weight", r"its gradient of weight is off by 1\.00%"),
    ):
        right = getattr(MatrixProducts, method)
        with monkeypatch.context() as patch:
            patch.setattr(MatrixProducts, method, lambda *args, right=right: right(*args) * 1.01)
            with pytest.warns(UserWarning, match=message):
                model, plan = two_layers()
        assert plan.cast_sites == []
        assert casts_in_force(model) == {}
        assert all(re.search(message, site.format_reason) for site in plan.sites if site.params)
        x = torch.randn(4, 32)
        assert torch.equal(model(x), model[2]._call_impl(F.relu(model[0]._call_impl(x))))


@pytest.mark.filterwarnings("ignore:unit scaling. with casts")
def test_a_wrong_scale_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "exponent", lambda *args: 0.3)  # no power of two
    with pytest.warns(UserWarning, match="alone changed the product"):
        _, plan = two_layers()
    assert plan.cast_sites == []


class Failing(Language):
    at = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if len(self.losses) > self.at:
            raise ValueError("on purpose")
        return loss


@pytest.mark.parametrize("door", ["callback", "strategy"])
def test_an_exception_in_a_measured_step_leaves_nothing_behind(tmp_path: Path, door: str) -> None:
    from lightning_unitscale.strategy import UnitScalingStrategy

    torch.manual_seed(0)
    module = Failing()
    module.at = 1  # step 1 is measured again
    ways: Any = (
        ([UnitScaling(**OPTIONS)], {}) if door == "callback" else ([], {"strategy": UnitScalingStrategy(**OPTIONS)})
    )
    with pytest.raises(ValueError, match="on purpose"):
        fit(tmp_path, *ways[0], module=module, max_steps=5, **ways[1])
    assert entered_observers() == []
    assert torch._C._len_torch_function_stack() == 0
    assert not is_eager()


def test_overrides_that_cannot_be(tmp_path: Path) -> None:
    model, batch = build(batch_norm=False), next_token_batch(0)
    for overrides, message in (
        (
            {"norm.weight": {"format": "fp8"}},
            r"overrides\['norm.weight'\]: format='fp8', but no matmul there can be cast",
        ),
        ({"embedding": {"format": "fp8"}}, r"overrides\['embedding'\].*a lookup makes no product"),
        ({"head": {"format": "fp9"}}, r"overrides\['head'\] format='fp9' is not known"),
    ):
        with pytest.raises(UnitScalingError, match=message):
            unit_scale(model, lambda m: m.loss(batch), overrides=overrides)
    plan = unit_scale(model, lambda m: m.loss(batch), overrides={"head": {"format": "bf16"}})
    assert [site.params[0] for site in plan.cast_sites] == ["head.weight"]


def test_a_device_without_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "supports", lambda dtype, device: dtype not in FORMATS["fp8"].dtypes)
    module, before = build(), build()
    with pytest.raises(UnitScalingError, match=r"format='fp8': the device cpu has no torch\.float8_e4m3fn"):
        fit(tmp_path, UnitScaling(**OPTIONS), module=module)
    assert plan_of(module) is None
    assert_same_state(module, before)


class Penalized(Language):
    def loss(self, batch: Batch) -> Tensor:
        x = self.embedding(batch["input_ids"]).detach().requires_grad_()
        y = self.head(x).square().mean()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return y + gradient.square().sum()


def test_a_gradient_penalty_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(), pytest.raises(UnitScalingError, match="create_graph=True"):
        warnings.simplefilter("ignore")
        fit(tmp_path, UnitScaling("preserve", **OPTIONS), module=Penalized(batch_norm=False), max_steps=3)
