"""Muon for hidden matrices and AdamW for the rest, as recipes have it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipe_runs import run_recipe
from torch import Tensor, nn

from lightning_unitscale import Plan, scale_learning_rates, unit_scale
from lightning_unitscale.cookbook.muon import MuonWithAdamW, hidden_matrices
from lightning_unitscale.cookbook.optimizers import new_optimizer

WIDTH = 16  # a power of two: torch's Muon rounds to bfloat16, so only then do storages agree to the bit
TOKENS = torch.randint(11, (32, 4), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
HIDDEN = ["layers.0.weight", "layers.2.weight"]


class Model(nn.Module):
    """Embedding, positions, two layers, a norm, and two readouts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, WIDTH)
        self.positions = nn.Parameter(torch.randn(4, WIDTH))
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.value_head = nn.Linear(WIDTH, 1)
        self.last = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers(self.tokens(tokens) + self.positions)
        return self.last(hidden), self.value_head(hidden)


def loss_of(model: nn.Module) -> Tensor:
    logits, values = model(TOKENS)
    return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()) + (values - 1).square().mean()


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return Model().double()


def optimizer_of(model: nn.Module) -> MuonWithAdamW:
    return MuonWithAdamW(model.parameters(), model, adamw_for=["*head*"], **OPTIONS)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 6) -> list[Tensor]:
    for _ in range(steps):
        model.zero_grad()
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def named(model: nn.Module, parameters: list[Any]) -> list[str]:
    return [name for name, parameter in model.named_parameters() if any(parameter is p for p in parameters)]


def test_hidden_matrices_are_neither_embeddings_nor_readouts() -> None:
    model = new_model()
    assert named(model, hidden_matrices(model, ["*head*"])) == HIDDEN
    assert named(model, hidden_matrices(model)) == [*HIDDEN, "value_head.weight"]
    model.last.weight = model.tokens.weight
    assert named(model, hidden_matrices(model, ["*head*"])) == HIDDEN
    assert not hidden_matrices(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))


def test_its_steps_are_those_of_the_two_optimizers() -> None:
    model, expected = new_model(), new_model()
    hidden = [p for name, p in expected.named_parameters() if name in HIDDEN]
    others = [p for name, p in expected.named_parameters() if name not in HIDDEN]
    two = (
        torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **OPTIONS),
        torch.optim.AdamW(others, betas=(0.9, 0.95), **OPTIONS),
    )
    for value, plain in zip(train(model, optimizer_of(model)), train(expected, *two), strict=True):
        assert torch.equal(value, plain)


def test_state_is_saved_copied_and_loaded() -> None:
    model = new_model()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    other = new_model()
    other.load_state_dict(model.state_dict())
    resumed = optimizer_of(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again, its = pickle.loads(pickle.dumps((model, optimizer)))
    expected = train(model, optimizer)
    for values in (train(other, resumed), train(again, its)):
        assert all(torch.equal(value, plain) for value, plain in zip(values, expected, strict=True))


@pytest.mark.parametrize("lr_units", ["standard", "umup"])
def test_both_storages_train_alike(lr_units: str) -> None:
    results = []
    for storage in ("folded", "unit"):
        model = new_model()
        plan = unit_scale(model, loss_of, storage=storage, lr_units=lr_units, verify=False, activations=False)
        scale_learning_rates(optimizer_of(model), plan).remove()
        optimizer = optimizer_of(model)
        scale_learning_rates(optimizer, plan)
        train(model, optimizer, steps=12)
        results.append({name: p.detach() * ratio(plan, name) for name, p in model.named_parameters()})
    for name, folded in results[0].items():
        torch.testing.assert_close(folded, results[1][name], rtol=1e-9, atol=1e-12, msg=name)


def ratio(plan: Plan, name: str) -> float:
    return plan.parameters[name].multiplier / plan.parameters[name].stored


def test_preserve_changes_nothing() -> None:
    model, expected = new_model(), new_model()
    optimizer = optimizer_of(model)
    scale_learning_rates(optimizer, unit_scale(model, loss_of, scheme="preserve"))
    for value, plain in zip(train(model, optimizer), train(expected, optimizer_of(expected)), strict=True):
        assert torch.equal(value, plain)


@pytest.mark.parametrize("width", [16, 64])
def test_a_step_in_umup_units_is_a_twentieth_of_the_rate_at_any_width(width: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)), torch.randn(256, width)
    plan = unit_scale(model, lambda m: m(x).square().mean(), storage="unit", lr_units="umup", verify=False)
    optimizer = MuonWithAdamW(model.parameters(), model, lr=0.1, weight_decay=0.0)
    scale_learning_rates(optimizer, plan)
    before = model[0].weight.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    step = (model[0].weight.detach() - before).square().mean().sqrt()
    assert step.item() == pytest.approx(0.05 * 0.1, rel=0.3)  # singular values of Muon's are between 0.7 and 1.2


def test_the_standard_rate_keeps_the_relative_step() -> None:
    model = new_model()
    plan = unit_scale(model, loss_of, storage="unit", verify=False)
    scales = plan.step_scales("muon_matched", decoupled_decay=True)
    adam = plan.step_scales("adam", decoupled_decay=True)
    for name in HIDDEN:
        assert scales[name].lr * plan.parameters[name].step_limit == pytest.approx(adam[name].lr)


def test_no_rate_is_taken_for_more_than_the_largest_useful_one() -> None:
    model = new_model()
    plan = unit_scale(model, loss_of, storage="unit", verify=False)
    optimizer = MuonWithAdamW(model.parameters(), model, lr=1.0, adamw_for=["*head*"])
    scale_learning_rates(optimizer, plan)
    scales = plan.step_scales("muon_matched", decoupled_decay=True)
    etas = [2 * scales[name].lr / plan.parameters[name].depth_lr for name in HIDDEN]
    assert torch.tensor(etas).log().mean().exp().item() == pytest.approx(plan.largest_eta, rel=0.05)


def test_an_optimizer_is_given_the_module_if_it_asks_for_it() -> None:
    model = new_model()
    config = {"_target_": "lightning_unitscale.cookbook.muon.MuonWithAdamW", "lr": 0.1}
    muon = new_optimizer(config, model, model.parameters(), lr=0.2)
    assert [group["lr"] for group in muon.param_groups] == [0.2, 0.2]
    adamw = new_optimizer({"_target_": "torch.optim.AdamW"}, model, model.parameters())
    assert len(adamw.param_groups) == 1


@pytest.mark.parametrize("unitscale", ["umup", "none"])
def test_a_recipe_trains_with_it(tmp_path: Path, unitscale: str) -> None:
    folder, _ = run_recipe("pretrain", tmp_path, "experiment=tiny", "optimizer=muon", f"unitscale={unitscale}")
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    (state,) = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert [group["use_muon"] for group in state["param_groups"]] == [True, False]
