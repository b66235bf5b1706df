"""Casts of attention's own products: what they compute, where they are made, and that they go the way of all casts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.by_day import by_day
from support.prepared import build as zoo_build
from support.prepared import compiled_losses, gradients, prepared
from support.training import assert_same_state, batches, build, fit, trainer
from support.zoo_modules import WIDTH, Attention, EinsumAttention, OperatorAttention, causal_mask, split_heads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import ScaleMonitor, UnitScaling, UnitScalingError, load_checkpoint, recalibrating, unit_scale
from lightning_unitscale.engine.plan.plan import Plan, plan_of
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.formats import cast
from lightning_unitscale.monitor import Snapshot
from lightning_unitscale.monitor.charts import exponent_chart
from lightning_unitscale.ops import round_trip

ALL = {"*": {"attention_format": "fp8"}}
SDPA = "scaled_dot_product_attention"


def straight_through(tensor: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    rounded = cast(tensor.detach(), dtype, scale).to(tensor.dtype) / scale
    return tensor + (rounded - tensor.detach())


def e4m3(tensor: Tensor, scale: float) -> Tensor:
    return straight_through(tensor, torch.float8_e4m3fn, scale)


def with_gradient_in_e5m2(tensor: Tensor, scale: float) -> Tensor:
    tensor.register_hook(lambda g: cast(g, torch.float8_e5m2, scale).to(g.dtype) / scale)
    return tensor


def fused_by_hand(q: Tensor, k: Tensor, v: Tensor, sites: list[Site]) -> Tensor:
    (site,) = sites
    s = site.operand_scales
    q, k, v = (e4m3(t, s[name]) for t, name in ((q, "query"), (k, "key"), (v, "value")))
    logits = q @ k.mT / q.shape[-1] ** 0.5 + causal_mask(q.shape[-2], q)
    return with_gradient_in_e5m2(logits.softmax(-1) @ v, s["gradient"])


def products_by_hand(q: Tensor, k: Tensor, v: Tensor, sites: list[Site]) -> Tensor:
    first, second = (site.operand_scales for site in sites)
    logits = with_gradient_in_e5m2(e4m3(q, first["left"]) @ e4m3(k, first["right"]).mT, first["gradient"])
    weights = (logits / q.shape[-1] ** 0.5 + causal_mask(q.shape[-2], q)).softmax(-1)
    return with_gradient_in_e5m2(e4m3(weights, second["left"]) @ e4m3(v, second["right"]), second["gradient"])


@pytest.mark.parametrize(("kind", "by_hand"), [(Attention, fused_by_hand), (OperatorAttention, products_by_hand)])
def test_the_products_are_those_of_cast_operands(kind: type[Attention], by_hand: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind()).double(), torch.randn(3, 8, WIDTH, dtype=torch.float64)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", overrides=ALL)
    layer = model[0]
    y = model(x)
    y.square().mean().backward()
    found = [y.detach(), layer.qkv.weight.grad.clone(), layer.out.weight.grad.clone()]
    model.zero_grad()
    q, k, v = (split_heads(part) for part in F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, dim=-1))
    merged = by_hand(q, k, v, plan.cast_sites).transpose(-3, -2).flatten(-2)
    y = F.linear(merged, layer.out.weight, layer.out.bias)
    y.square().mean().backward()
    wanted = [y.detach(), layer.qkv.weight.grad, layer.out.weight.grad]
    plain = kind().double()
    plain.load_state_dict(layer.state_dict())
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0], plain(x), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Where
# ---------------------------------------------------------------------------------------------------------------------

WHERE = {
    "llama-sdpa": [(SDPA, ["query", "key", "value", "gradient"])],
    "llama-eager": [("matmul", ["left", "right", "gradient"])] * 2,
    "einsum-attention": [("einsum", ["0", "1", "gradient"])] * 2,
    "multihead-attention": [(SDPA, ["query", "key", "value", "gradient"])],
    "gpt2-eager": [("matmul", ["left", "right", "gradient"])] * 2,
    "torch-encoder-prenorm": [(SDPA, ["query", "key", "value", "gradient"])],
}


@pytest.mark.parametrize("options", [{"storage": "folded"}, {"storage": "unit"}, {"scheme": "preserve"}], ids=str)
@pytest.mark.parametrize("name", WHERE)
def test_every_attention_of_a_model(name: str, options: dict[str, str]) -> None:
    case = zoo.CASES[name]
    plain, untouched = prepared(case, **options)
    model, plan = prepared(case, overrides=ALL, **options)
    assert not untouched.cast_sites
    layers: dict[str, list[tuple[str, list[str]]]] = {}
    for site in plan.cast_sites:
        layers.setdefault(site.module, []).append((site.op, site.operands))
        assert set(site.operand_scales) == set(site.measured) == set(site.operands)
    assert len(layers) == 2
    assert all(products == WHERE[name] for products in layers.values())
    made = set()
    for use, site in casts_in_force(model).items():
        original = site.rounded_gradient
        site.rounded_gradient = lambda y, use=use, original=original: (made.add(use), original(y))[1]
    (loss, exact), (found, narrow) = (gradients(case, module, seed=1) for module in (plain, model))
    assert made == {site.use for site in plan.cast_sites}
    assert float(found) == pytest.approx(float(loss), rel=0.01)
    assert found != loss
    whole = [torch.cat([grads[key].flatten() for key in exact]) for grads in (exact, narrow)]
    assert float(F.cosine_similarity(*whole, dim=0)) > 0.99
    with torch.no_grad():  # evaluation has training's numerics
        assert float(case.loss(model.eval(), case.batch(1))) == pytest.approx(float(found), rel=1e-6)


def test_the_modules_named_and_no_others() -> None:
    case = zoo.CASES["llama-eager"]
    for overrides, layers in (
        ({"*.self_attn": {"attention_format": "fp8"}}, {0, 1}),
        ({"model.layers.1": {"attention_format": "fp8"}}, {1}),
        ({**ALL, "model.layers.1": {"attention_format": None}}, {0}),
        ({"*.0.self_attn": {"attention_format": "bf16"}}, {0}),
    ):
        _, plan = prepared(case, overrides=overrides)
        assert {site.module for site in plan.cast_sites} == {f"model.layers.{layer}.self_attn" for layer in layers}
        assert {site.format for site in plan.cast_sites} <= {"bf16", "fp8"}
    _, plan = prepared(case, format="fp8")
    assert all(site.params for site in plan.cast_sites)  # left alone unless asked
    _, plan = prepared(case, format="fp8", overrides=ALL)
    assert sum(not site.params for site in plan.cast_sites) == 4
    assert "matmul#1" in plan.summary()


def test_the_router_and_the_rotation_are_no_attention() -> None:
    """A softmax over logits that a weight makes, and the product of positions and frequencies."""
    _, plan = prepared(zoo.CASES["mixtral-eager"], overrides=ALL)
    assert {site.module.rpartition(".")[2] for site in plan.cast_sites} == {"self_attn"}


def test_a_glob_without_attention() -> None:
    case = zoo.CASES["llama-sdpa"]
    here = r"no module of that name computes it.*This model has it in model\.layers\.0\.self_attn, model\.layers\.1"
    with pytest.raises(UnitScalingError, match=r"overrides\['\*\.mlp'\]: attention_format='fp8'.*" + here):
        prepared(case, overrides={"*.mlp": {"attention_format": "fp8"}})
    with pytest.raises(UnitScalingError, match=r"self_attn:.*: skipped by the options"):
        prepared(case, overrides=ALL, skip=["model.layers"])
    with pytest.raises(UnitScalingError, match="It has none"):
        prepared(zoo.CASES["sequential"], overrides=ALL)
    with pytest.raises(UnitScalingError, match=r"attention_format='fp9' is not known.*Did you mean 'fp8'"):
        UnitScaling(overrides={"*": {"attention_format": "fp9"}})


# ---------------------------------------------------------------------------------------------------------------------
# The way of all casts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-sdpa", "llama-eager"])
@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_decoding_with_a_cache_is_the_full_pass(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    with zoo.default_dtype(torch.float64):  # in which no operand comes to lie on the other side of a rounding
        model, _ = prepared(case, storage=storage, overrides=ALL)
        model.eval()
        ids = case.batch(0)["input_ids"]
        with torch.no_grad():
            full = model(input_ids=ids, use_cache=False).logits
            cache, parts = None, []
            for first, last in ((0, 3), (3, 4), (4, ids.shape[1])):
                out = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-9)


@pytest.mark.parametrize("name", by_day(["llama-sdpa", "llama-eager", "einsum-attention"], ["einsum-attention"]))
@pytest.mark.parametrize("storage", by_day(["folded", "unit"], ["unit"]))
def test_compiled_without_breaks_or_recompilation(name: str, storage: str) -> None:
    case = zoo.CASES[name]
    model, plan = prepared(case, overrides=ALL, storage=storage, verify=False)
    near, far = compiled_losses(case, model, plan, (1.0, 2.0**9))
    assert near != pytest.approx(far, rel=1e-5)  # which saturates


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_and_copies(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(WIDTH, WIDTH), OperatorAttention()
            self.how: bool | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.attention(x) if self.how is None else checkpoint(self.attention, x, use_reentrant=self.how)

    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(3, 8, WIDTH)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", overrides=ALL)
    other = copy.deepcopy(model)
    other.how = reentrant
    for module in (model, other):
        module(x).square().mean().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    again = Checkpointed()
    again.load_state_dict(model.state_dict())
    again.how = reentrant
    measured = unit_scale(again, lambda m: m(x).square().mean(), "preserve", overrides=ALL)
    assert [s.operand_scales for s in measured.cast_sites] == [s.operand_scales for s in plan.cast_sites]


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_in_a_trainer_saved_and_resumed(tmp_path: Path, storage: str) -> None:
    options = {"storage": storage, "overrides": ALL, "recalibrate": (2, 5)}
    callback = UnitScaling(**options)
    whole = fit(tmp_path, callback, module=build(batch_norm=False), data=batches(10), max_steps=8)
    plan = callback.plan
    assert plan is not None
    assert plan.measured_at == [0, 2, 5]
    (site,) = plan.cast_sites
    assert (site.module, site.op) == ("block.attention", SDPA)
    plain = fit(tmp_path, UnitScaling(storage=storage), module=build(batch_norm=False), data=batches(10), max_steps=8)
    assert whole.losses[0] == plain.losses[0]  # the first step is measured and casts nothing
    assert whole.losses[1] != plain.losses[1]
    assert whole.losses == pytest.approx(plain.losses, rel=0.02)

    loop = trainer(tmp_path, UnitScaling(**options), max_steps=4)
    torch.manual_seed(1)
    loop.fit(build(batch_norm=False), batches(10))
    loop.save_checkpoint(tmp_path / "half.ckpt")
    loaded = build(batch_norm=False)
    again = load_checkpoint(loaded, tmp_path / "half.ckpt")
    assert again is not None
    assert again.cast_sites[0].operand_scales == plan_of(loop.lightning_module).cast_sites[0].operand_scales
    batch = next(iter(batches(1, 7)))
    assert torch.equal(loaded.loss(batch), loop.lightning_module.loss(batch))
    with pytest.raises(UnitScalingError, match="prepared with overrides="):
        trainer(tmp_path, UnitScaling(storage=storage), max_steps=6).fit(
            build(batch_norm=False), batches(10), ckpt_path=tmp_path / "half.ckpt"
        )


def test_a_dropped_attention_weight_does_not_fail_the_gate() -> None:
    case = zoo.family_case("llama", "sdpa", dropout=0.5)
    model = zoo_build(case).train()
    plan = unit_scale(model, lambda m: case.loss(m, case.batch(0)), "preserve", overrides=ALL)
    assert len(plan.cast_sites) == 2


def test_a_wrong_rounding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = round_trip.Rounded.forward
    monkeypatch.setattr(round_trip.Rounded, "forward", staticmethod(lambda ctx, t, *rest: right(ctx, t, *rest) * 1.01))
    case = zoo.CASES["llama-eager"]
    with pytest.warns(
        UserWarning, match=r"self_attn:matmul#0 stays in the compute dtype from now on: its output is off"
    ):
        model, plan = prepared(case, scheme="preserve", overrides=ALL)
    assert plan.cast_sites == []
    assert casts_in_force(model) == {}
    assert gradients(case, model)[0] == gradients(case, zoo_build(case))[0]


class Spiking(nn.Module):
    """From the second call on, its queries grow and shrink by 2^20."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.size = nn.Linear(WIDTH, WIDTH), 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return (y * self.size @ y.mT / self.size).softmax(-1) @ y


def test_one_that_no_scale_fits_falls_back() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Spiking()), torch.randn(3, 8, WIDTH)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", overrides=ALL)
    assert [site.op for site in plan.cast_sites] == ["matmul", "matmul"]
    with pytest.warns(UserWarning, match=r"0:matmul#0 stays in the compute dtype.*at step 2 casting its left"):
        for step, size in enumerate((1.0, 2.0**20, 2.0**-20, 1.0)):
            model[0].size = size
            with recalibrating(plan, step):
                model(x).square().mean().backward()
    assert [site.name for site in plan.cast_sites] == ["0:matmul#1"]
    reloaded = Plan.from_dict(plan.to_dict())
    assert [site.use for site in reloaded.cast_sites] == list(casts_in_force(model))


def test_gradient_penalties_are_refused() -> None:
    model, x = nn.Sequential(Attention()), torch.randn(3, 8, WIDTH, requires_grad=True)
    unit_scale(model, lambda m: m(x).square().mean(), "preserve", overrides=ALL)
    with pytest.raises(UnitScalingError, match=r"create_graph=True.*attention_format"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_the_monitor_and_the_chart_show_it(tmp_path: Path) -> None:
    monitored = build(batch_norm=False)
    fit(tmp_path, UnitScaling(overrides=ALL), ScaleMonitor(2, folder=tmp_path), module=monitored, max_steps=4)
    snapshot = Snapshot.read(tmp_path / "monitor.jsonl")[-1]
    rows = {m.operand: m for m in snapshot.measurements if m.op == SDPA}
    assert {operand: m.kind for operand, m in rows.items()} == {
        "query": "x", "key": "x", "value": "x", "gradient": "gradient"
    }  # fmt: skip
    assert rows["query"].site == "block.attention:scaled_dot_product_attention.query"
    for m in rows.values():
        assert m.scaled is not None
        assert m.scaled.snr_db > 20
    labels = [tick.get_text() for tick in exponent_chart([snapshot]).axes[4].get_xticklabels()]
    assert "block.attention:scaled_dot_product_attention.key" in labels
    plain = build(batch_norm=False)
    fit(tmp_path, UnitScaling(overrides=ALL), module=plain, max_steps=4)
    assert_same_state(monitored, plain)


def test_beside_casts_of_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(EinsumAttention()), torch.randn(3, 8, WIDTH)
    plan = unit_scale(model, lambda m: m(x).square().mean(), "preserve", format="fp8", overrides=ALL)
    assert sorted(len(site.operands) for site in plan.cast_sites) == [3, 3, 3, 3]
    assert sum(not site.params for site in plan.cast_sites) == 2
