"""However trained weights come into a fresh model, they are refused before they are rescaled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import init

from lightning_unitscale import UnitScalingError, scale_learning_rates, unit_scale
from lightning_unitscale.engine.checks.drawn_at_random import structure
from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.engine.plan.state_dict import PLAN_KEY

torch.manual_seed(0)
X = torch.randn(256, 8)
Y = X[:, :4].argmax(-1)


class Net(nn.Module):
    """A classifier, its body a module of its own."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        layers = [nn.Linear(8, 64), nn.LayerNorm(64) if norms else nn.Identity(), nn.ReLU(), nn.Linear(64, 64)]
        self.body, self.head = nn.Sequential(*layers, nn.ReLU()), nn.Linear(64, 4)

    def forward(self) -> Tensor:
        return F.cross_entropy(self.head(self.body(X)), Y)


@cache
def trained(norms: bool, steps: int, **options: str) -> Net:
    torch.manual_seed(1)
    model = Net(norms)
    plan = unit_scale(model, lambda m: m(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, plan)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return model


def _by_file(source: Net, target: Net, path: Path) -> None:
    torch.save(source.state_dict(), path / "weights.pt")
    target.load_state_dict(torch.load(path / "weights.pt", weights_only=True))


def _by_safetensors(source: Net, target: Net, path: Path) -> None:
    save_file(source.state_dict(), path / "weights.safetensors")
    target.load_state_dict(load_file(path / "weights.safetensors"))


def _by_distributed_checkpoint(source: Net, target: Net, path: Path) -> None:
    dcp.save(dict(source.state_dict()), checkpoint_id=path / "sharded", no_dist=True)
    state = dict(target.state_dict())
    dcp.load(state, checkpoint_id=path / "sharded", no_dist=True)
    target.load_state_dict(state)


def _in_parts(source: Net, target: Net, path: Path) -> None:
    for name, child in source.named_children():
        target.get_submodule(name).load_state_dict(child.state_dict())


def _by_hand(source: Net, target: Net, path: Path) -> None:
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            ours.copy_(theirs)


def _by_data(source: Net, target: Net, path: Path) -> None:
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        ours.data = theirs.data.clone()


MOVES: dict[str, Callable[[Net, Net, Path], object]] = {
    "a file": _by_file,
    "a plain dict": lambda a, b, _: b.load_state_dict({key: value.clone() for key, value in a.state_dict().items()}),
    "not strict": lambda a, b, _: b.load_state_dict({**a.state_dict(), "other": X}, strict=False),
    "assigned": lambda a, b, _: b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()}, assign=True),
    "safetensors": _by_safetensors,
    "a sharded checkpoint": _by_distributed_checkpoint,
    "parts": _in_parts,
    "copy_": _by_hand,
    ".data": _by_data,
    "one vector": lambda a, b, _: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(a.parameters()).detach().clone(), b.parameters()
    ),
}


@pytest.mark.parametrize("steps", [3, 100])
@pytest.mark.parametrize("norms", [False, True], ids=["no norms", "norms"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_folded_weights_are_not_scaled_a_second_time(move: str, norms: bool, steps: int, tmp_path: Path) -> None:
    source, model = trained(norms, steps), Net(norms)
    MOVES[move](source, model, tmp_path)
    loss, before = source().item(), copy.deepcopy(model.state_dict())
    assert model().item() == loss
    with pytest.raises(UnitScalingError, match=r"holds trained weights.*scheme='preserve'|already unit-scaled"):
        unit_scale(model, lambda m: m())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("part", ["body", "head"])
def test_the_state_dict_of_a_part_carries_the_factors_inside_it(part: str) -> None:
    source, model = trained(False, 3, storage="unit"), Net(False)
    state = source.get_submodule(part).state_dict()
    plain = nn.Module()
    for name, child in Net(False).get_submodule(part).named_children():
        plain.add_module(name, child)
    model.get_submodule(part).load_state_dict(state)
    x = torch.randn(5, 8 if part == "body" else 64)
    if part == "body":
        torch.testing.assert_close(model.body(x), source.body(x))
        with pytest.raises(RuntimeError):
            plain.load_state_dict({key: value.clone() for key, value in state.items() if key != PLAN_KEY})
    source.get_submodule(part).load_state_dict(state)
    with pytest.raises(UnitScalingError, match="these are plain weights"):
        source.get_submodule(part).load_state_dict(Net(False).get_submodule(part).state_dict())


def test_a_part_whose_factor_stands_elsewhere_has_no_state_dict_of_its_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(7, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.hidden(self.embedding(ids)).relu(), self.embedding.weight)

    model, ids = Tied(), torch.arange(7)
    unit_scale(model, lambda m: F.cross_entropy(m(ids), ids))
    with pytest.raises(UnitScalingError, match=r"state dict of embedding alone.*unitscale export"):
        model.embedding.state_dict()
    twin = Tied()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(ids), model(ids))


def test_a_layer_replaced_by_one_of_its_shape_is_named_where_rates_are_taken() -> None:
    model = copy.deepcopy(trained(False, 3))
    plan = plan_of(model)
    model.head = nn.Linear(64, 4)
    assert plan.differences(model)["replaced"] == ["head.bias", "head.weight"]
    with pytest.warns(UserWarning, match=r"replaced: head\.bias, head\.weight.*a scale of their own"):
        scale_learning_rates(torch.optim.AdamW(model.parameters()), plan)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_which_reads_source_refuses_factors_and_takes_folded_models() -> None:
    torch.testing.assert_close(torch.jit.script(trained(False, 3).body)(X), trained(False, 3).body(X))
    with pytest.raises(UnitScalingError, match=r"torch\.jit\.script.*remove_unit_scaling"):
        torch.jit.script(trained(False, 3, storage="unit").body)


def drawn(weights: Callable[[Tensor], object], biases: Callable[[Tensor], object] | None) -> nn.Sequential:
    torch.manual_seed(2)
    layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), *layers, nn.Linear(64, 4))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            weights(parameter)
        elif biases is not None:
            biases(parameter)
    return model


WEIGHTS: dict[str, Callable[[Tensor], object]] = {
    "torch": lambda w: None,
    "0.02": lambda w: init.normal_(w, std=0.02),
    "kaiming": init.kaiming_normal_,
    "kaiming, uniform": lambda w: init.kaiming_uniform_(w, nonlinearity="relu"),
    "xavier": init.xavier_normal_,
    "fan-in": lambda w: init.normal_(w, std=w.shape[1] ** -0.5),
    "orthogonal": init.orthogonal_,
    "truncated": lambda w: init.trunc_normal_(w, std=0.02),
    "sparse": lambda w: init.sparse_(w, 0.9),
    "identity": init.eye_,
    "heavy tails": lambda w: w.data.copy_(torch.randn_like(w) ** 3 / 8),
    "ternary": lambda w: w.data.copy_(torch.randint(-1, 2, w.shape) / 8),
    "positive": lambda w: init.uniform_(w, 0, 0.1),
}
BIASES: dict[str, Callable[[Tensor], object] | None] = {
    "torch's": None,
    "zero": init.zeros_,
    "constant": lambda b: init.constant_(b, 0.1),
    "normal": lambda b: init.normal_(b, std=0.01),
}


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.filterwarnings("ignore:unit scaling")
def test_initial_weights_are_taken_whatever_they_were_drawn_from(weights: str, biases: str) -> None:
    model = drawn(WEIGHTS[weights], BIASES[biases])
    assert unit_scale(model, lambda m: F.cross_entropy(m(X), Y), verify=False) is not None


@pytest.mark.parametrize("shape", [(16, 16), (64, 300), (32, 32, 3, 3), (4, 64, 32)])
def test_structure_is_what_shuffling_takes_away(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    noise = torch.randn(shape)
    left, right = torch.randn(*shape[:1], *(1 for _ in shape[1:])), torch.randn(1, *shape[1:])
    if len(shape) == 3:
        left, right = torch.randn(*shape[:2], 1), torch.randn(shape[0], 1, shape[2])
    assert abs(structure(noise)) < 5
    assert structure(noise + left * right) > 6
    assert structure(torch.ones(shape)) is None
    assert structure(torch.randn(64, 8)) is None
