"""The gate of the first loss: a plan under which a model begins far above where it did is not kept."""

import pytest
import torch
from torch import Tensor, nn

from lightning_unitscale import UnitScalingError, unit_scale
from lightning_unitscale.engine.checks.first_loss import is_far_above


class Explodes(nn.Module):
    """Drawn small, as its code squares what it computes again and again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.quiet, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        for layer in (self.first, self.quiet, self.last):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.exp(3 * self.quiet(self.first(x)).square()))


X = 2 * torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def squares(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def test_a_model_that_explodes_trains_as_if_untouched() -> None:
    untouched, model = Explodes(), Explodes()
    with pytest.warns(UserWarning, match=r"the first loss of Explodes is .*Left alone"):
        plan = unit_scale(model, squares)
    assert float(squares(model)) == pytest.approx(float(squares(untouched)), rel=0.5)
    left_alone = {name for name, parameter in plan.parameters.items() if plan.lr_multipliers[name] == 1.0}
    for name, parameter in untouched.named_parameters():
        if name in left_alone and "weight" in name:
            torch.testing.assert_close(model.get_parameter(name), parameter)
    assert left_alone


def test_in_units_of_umup_it_is_an_error_and_the_model_stays_as_it_was() -> None:
    untouched, model = Explodes(), Explodes()
    with pytest.raises(UnitScalingError, match=r"List those in skip, or use scheme='preserve'"):
        unit_scale(model, squares, lr_units="umup")
    torch.testing.assert_close(dict(model.named_parameters()), dict(untouched.named_parameters()))


def test_a_loss_that_is_far_above_or_not_finite_is_found() -> None:
    assert is_far_above([4.0], [6.2])
    assert is_far_above([4.0, 1.0], [4.0, float("inf")])
    assert not is_far_above([4.0, -0.01], [5.9, 0.09])


def test_a_fallback_takes_no_hyperparameters_along() -> None:
    model = nn.Linear(8, 4)
    with pytest.warns(UserWarning, match="Left alone: the whole model"):
        plan = unit_scale(model, squares, hyperparameters={"alpha_out": 1e4})
    assert plan.scheme == "preserve"
    assert set(plan.lr_multipliers.values()) == {1.0}
