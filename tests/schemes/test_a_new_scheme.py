"""A scheme is one class of pure rules: this one is written here alone, and all of the machinery works with it."""

from collections.abc import Iterator

import pytest
import torch
from support import zoo
from support.prepared import adamw, build, prepared, train
from torch import nn

from lightning_unitscale import UnitScaling, UnitScalingError, remove_unit_scaling, unit_scale
from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.schemes.registry import SCHEMES, register
from lightning_unitscale.schemes.scheme import Rates, ResidualBranch, Scheme, Weight


class Toy(Scheme):
    """Hidden weights × fan_in^-½, readouts too; branches × 1/2; learning rates fan_in^-½ for all matrices."""

    name = "toy"
    source = "this test"

    def weight(self, weight: Weight) -> list[Factor]:
        if weight.role in ("hidden", "readout"):
            return [Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", self.source)]
        return []

    def rates(self, weight: Weight) -> Rates:
        rate = [Factor(weight.fan_in**-0.5, f"fan_in^-½, fan_in = {weight.fan_in}", self.source)]
        return Rates(adam=rate, sgd=[])

    def branch(self, branch: ResidualBranch) -> list[Factor]:
        return [Factor(0.5, "a half of each branch", self.source)]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(Toy)
    yield
    del SCHEMES["toy"]


CASES = ("llama-sdpa", "gpt2-eager", "resnet", "lstm")


@pytest.mark.parametrize("name", CASES)
def test_its_rules_are_in_the_plan(name: str) -> None:
    _, plan = prepared(zoo.CASES[name], scheme="toy")
    hidden = [site for site in plan.sites if site.role == "hidden" and not site.reason]
    assert hidden
    for site in hidden:
        rule, *others = site.causes[site.params[0]]
        assert rule.cause.startswith("fan_in^-½")
        assert rule.source == "this test"
        assert all(factor.value == 0.5 or factor.source != "this test" for factor in others)


@pytest.mark.parametrize("name", CASES)
def test_its_storages_train_alike(name: str) -> None:
    losses = []
    for storage in ("folded", "unit"):
        model, plan = prepared(zoo.CASES[name], scheme="toy", storage=storage)
        losses.append(train(zoo.CASES[name], model, [adamw(model, plan, lr=3e-4)], 10))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_can_be_taken_off() -> None:
    case = zoo.CASES["resnet"]
    model, _ = prepared(case, scheme="toy", storage="unit")
    before = case.loss(model, case.batch(1)).item()
    remove_unit_scaling(model)
    assert case.loss(model, case.batch(1)).item() == pytest.approx(before, rel=1e-5)


def test_it_is_found_by_its_name_and_others_are_not() -> None:
    UnitScaling("toy")
    with pytest.raises(UnitScalingError, match=r"scheme='toi' is not known.*Did you mean 'toy'"):
        UnitScaling("toi")
    with pytest.raises(UnitScalingError, match=r"scheme='toi' is not known"):
        unit_scale(nn.Linear(2, 2), lambda m: m(torch.ones(2)).sum(), "toi")


def test_a_model_of_no_scheme_is_unchanged_by_asking() -> None:
    case = zoo.CASES["sequential"]
    before, model = build(case), build(case)
    with pytest.raises(UnitScalingError):
        unit_scale(model, lambda m: case.loss(m, case.batch(0)), "toi")
    for one, other in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
