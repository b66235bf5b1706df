"""A factor belongs to the module it was put on: what is put in that module's place is refused by name."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lightning_unitscale import UnitScalingError, recalibrating, remove_unit_scaling, scale_learning_rates, unit_scale
from lightning_unitscale.engine.plan.plan import plan_of


class Net(nn.Module):
    """Layers in lists, a head, and a table that the root itself multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])
        self.table = nn.Embedding(6, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x) + F.linear(x, self.table.weight)


class Adapted(nn.Module):
    """A layer with an adapter beside it that adds nothing yet."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(base_layer.in_features, 2), nn.Linear(2, base_layer.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Merged(nn.Module):
    """A layer that took the weights of another one over."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


BATCH = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(16) % 6


def loss_of(module: nn.Module) -> Tensor:
    return F.cross_entropy(module(BATCH), CLASSES)


def prepared(storage: str = "unit") -> Net:
    torch.manual_seed(0)
    module = Net()
    unit_scale(module, loss_of, storage=storage)
    return module


def new_head(module: Net) -> None:
    head = nn.Linear(24, 6)
    head.weight.data.copy_(module.head.weight)  # the state dict of a part would bring its factor along
    module.head = head


def new_table(module: Net) -> None:
    module.table = nn.Embedding(6, 24)


def new_list(module: Net) -> None:
    module.inner = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())


def new_in_a_list(module: Net) -> None:
    module.blocks[1] = nn.Linear(24, 24)


def one_for_several(module: Net) -> None:
    module.inner = nn.Linear(8, 24)  # type: ignore[assignment]


def taken_over(module: Net) -> None:
    module.head = Merged(module.head)  # type: ignore[assignment]


def weight_norm(module: Net) -> None:
    parametrizations.weight_norm(module.head)


def parametrized(module: Net) -> None:
    parametrize.register_parametrization(module.blocks[0], "weight", nn.Identity())


def quantized(module: Net) -> Net:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao is to be used instead
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (new_head, "head "),
        (new_table, "table "),
        (new_list, "inner.0, inner.1, inner.2 "),
        (new_in_a_list, r"blocks\.1 "),
        (one_for_several, "inner.0, inner.1, inner.2 "),
        (taken_over, "head "),
        (quantized, "inner.0, inner.2, blocks.0"),
        (weight_norm, "head.weight .*computed"),
        (parametrized, "blocks.0.weight .*computed"),
    ],
)
def test_what_took_a_module_s_place_is_refused_by_name(change: Callable[[Net], Net | None], named: str) -> None:
    module = prepared()
    changed = change(module) or module
    with pytest.raises(UnitScalingError, match=named):
        changed(BATCH)


def test_a_part_that_took_over_the_state_dict_of_another_has_its_factor_too() -> None:
    module = prepared()
    before, head = module(BATCH), nn.Linear(24, 6)
    head.load_state_dict(module.head.state_dict())
    module.head = head
    torch.testing.assert_close(module(BATCH), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_looks_after_itself(copied: Callable[[Net], Net]) -> None:
    module = prepared()
    twin = copied(module)
    new_head(twin)
    with pytest.raises(UnitScalingError, match="head "):
        twin(BATCH)
    module(BATCH)


def wrapped(module: Net) -> None:
    module.inner = checkpoint_wrapper(module.inner)


def compiled(module: Net) -> None:
    module.head = torch.compile(module.head, backend="eager")  # type: ignore[assignment]


def adapted(module: Net) -> None:
    module.head = Adapted(module.head)  # type: ignore[assignment]


def same_in_a_new_list(module: Net) -> None:
    module.blocks = nn.ModuleList(list(module.blocks))


def added(module: Net) -> None:
    module.extra = nn.Linear(3, 3)


def same_function(module: Net) -> None:
    module.head.requires_grad_(False).to(torch.float64).to(torch.float32)


@pytest.mark.parametrize("change", [wrapped, compiled, adapted, same_in_a_new_list, added, same_function])
def test_what_leaves_the_factors_where_they_are_leaves_the_function_alone(change: Callable[[Net], None]) -> None:
    module = prepared()
    before = module(BATCH)
    change(module)
    for _ in range(2):
        torch.testing.assert_close(module(BATCH), before)


def test_a_model_without_some_of_its_layers_is_the_one_made_of_the_others() -> None:
    module, plain = prepared("unit"), prepared("folded")
    for model in (module, plain):
        model.blocks = model.blocks[1:]
    torch.testing.assert_close(module(BATCH), plain(BATCH))
    plain.blocks = plain.blocks[:1]
    del module.blocks[1]
    torch.testing.assert_close(module(BATCH), plain(BATCH))


@pytest.mark.parametrize(
    "use",
    [
        lambda module, plan: module.state_dict(),
        lambda module, plan: remove_unit_scaling(module),
        lambda module, plan: scale_learning_rates(torch.optim.AdamW(module.parameters()), plan),
        lambda module, plan: recalibrating(plan, 0).__enter__(),
    ],
    ids=["state_dict", "remove_unit_scaling", "scale_learning_rates", "recalibrating"],
)
def test_every_use_of_the_plan_asks_whether_the_model_is_whole(use: Callable[..., object]) -> None:
    module = prepared()
    plan = plan_of(module)
    new_head(module)
    with pytest.raises(UnitScalingError, match="head "):
        use(module, plan)


def test_a_plain_prepared_model_that_was_changed_is_named_when_its_rates_are_scaled() -> None:
    module = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 6))
    plan = unit_scale(module, loss_of)
    module[2] = nn.Linear(24, 9)
    module[0] = Adapted(module[0])
    with pytest.warns(UserWarning) as caught:
        scale_learning_rates(torch.optim.AdamW(module.parameters()), plan)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "0.bias, 0.weight" in messages and "2.weight [6, 24] -> [9, 24]" in messages


def test_removal_takes_the_look_out_off() -> None:
    module = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 6))
    unit_scale(module, loss_of, storage="unit")
    assert module._forward_pre_hooks and module._state_dict_pre_hooks
    remove_unit_scaling(module)
    assert not module._forward_pre_hooks and not module._state_dict_pre_hooks
    module[2] = nn.Linear(24, 6)
    module(BATCH)
