"""Habits of models found in the wild, each of which once went wrong."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
)

from lightning_unitscale import UnitScalingError, remove_unit_scaling, scale_learning_rates, unit_scale

STORAGES = ("folded", "unit")
each_storage = pytest.mark.parametrize("storage", STORAGES)
Loss = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(seed: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def losses(build: Callable[[], nn.Module], loss: Loss, storage: str, steps: int = 5) -> list[float]:
    """Losses of some AdamW steps of the prepared model."""
    torch.manual_seed(0)
    model = build()
    plan = unit_scale(model, lambda m: loss(m, batch(0)), storage=storage)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-12)
    scale_learning_rates(optimizer, plan)
    found = []
    for step in range(steps):
        value = loss(model, batch(step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Weights made in a hook
# ---------------------------------------------------------------------------------------------------------------------


def hooked_norms() -> nn.Module:
    """The older spectral and weight norms make the weight in a forward pre-hook."""
    first, second = nn.utils.spectral_norm(nn.Linear(8, 16)), nn.utils.weight_norm(nn.Linear(16, 16))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 4))


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:unit scaling")
def test_factors_of_weights_made_in_a_hook_are_applied() -> None:
    folded, unit = (losses(hooked_norms, square, storage) for storage in STORAGES)
    assert folded == pytest.approx(unit, rel=1e-9)


class RemadeWeight(nn.Module):
    """Makes its weight where no function mode sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.outer(torch.tanh(self.inner(x) if self.calls == 1 else x))


def test_a_factor_that_is_not_applied_is_an_error() -> None:
    """Runs of the step after the first, on the same model, do not reach the site."""
    taken = []

    def step(model: nn.Module) -> Tensor:
        taken.append(1)
        model.calls = len(taken) - 1
        return square(model, batch(0))

    with pytest.raises(UnitScalingError, match=r"not applied.*inner:linear \(inner.weight\)"):
        unit_scale(RemadeWeight(), step, storage="unit")


# ---------------------------------------------------------------------------------------------------------------------
# Copies inside the model
# ---------------------------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))


class Teacher(nn.Module):
    """Learns to agree with a slow average of itself; `update` is how the average is taken."""

    def __init__(self, update: Callable[[nn.Module, nn.Module], None]) -> None:
        super().__init__()
        self.student = mlp()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.update = update


def by_lerp(teacher: nn.Module, student: nn.Module) -> None:
    for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
        p.lerp_(q, 0.1)


def by_data(teacher: nn.Module, student: nn.Module) -> None:
    for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
        p.data = p.data * 0.9 + q.data * 0.1


def by_loading(teacher: nn.Module, student: nn.Module) -> None:
    teacher.load_state_dict(student.state_dict())


def agree(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.update(model.teacher, model.student)
        target = model.teacher(x)
    return F.mse_loss(model.student(x + 0.1), target + x[:, :4])


@pytest.mark.parametrize("update", [by_lerp, by_data, by_loading])
def test_an_average_inside_the_model_is_scaled_like_the_model(update: Callable[[nn.Module, nn.Module], None]) -> None:
    folded, unit = (losses(lambda: Teacher(update), agree, storage) for storage in STORAGES)
    assert folded == pytest.approx(unit, rel=1e-9)


@each_storage
@pytest.mark.parametrize("called", [True, False])
def test_a_copy_starts_as_the_function_of_its_original(storage: str, called: bool) -> None:
    torch.manual_seed(0)
    model = Teacher(by_lerp)
    plan = unit_scale(
        model, (lambda m: agree(m, batch(0))) if called else (lambda m: square(m.student, batch(0))), storage=storage
    )
    assert torch.equal(model.teacher(batch(1)), model.student(batch(1)))
    assert plan.roles["teacher.0.weight"] == "hidden"
    assert any("teacher is a copy of student" in note for note in plan.notes)
    expected = model.teacher(batch(1))
    remove_unit_scaling(model)
    torch.testing.assert_close(model.teacher(batch(1)), expected)


def test_a_frozen_part_of_another_origin_is_left_alone() -> None:
    model = Teacher(by_lerp)
    model.teacher = mlp().requires_grad_(False)
    before = copy.deepcopy(model.teacher)
    unit_scale(model, lambda m: agree(m, batch(0)))
    assert all(torch.equal(p, q) for p, q in zip(model.teacher.parameters(), before.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Learned queries
# ---------------------------------------------------------------------------------------------------------------------


class Queries(nn.Module):
    """Learned queries look at the input; `normed` ones pass a norm first, `given` ones are the queries themselves."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.queries = nn.Linear(1, 8), nn.Parameter(torch.randn(3, 8) * 0.02)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unsqueeze(-1))
        queries = self.queries.expand(len(x), -1, -1)
        if self.kind == "given":
            heads = F.scaled_dot_product_attention(queries * 2, x, x)
        else:
            queries = self.norm(queries) if self.kind == "normed" else queries
            heads = queries + self.attention(queries, x, x, need_weights=False)[0]
        return self.out(heads.mean(1))


@pytest.mark.filterwarnings("ignore:unit scaling")
@pytest.mark.parametrize("kind", ["plain", "normed", "given"])
def test_learned_queries(kind: str) -> None:
    folded, unit = (losses(lambda: Queries(kind), square, storage) for storage in STORAGES)
    assert folded == pytest.approx(unit, rel=1e-9)
    torch.manual_seed(0)
    plan = unit_scale(model := Queries(kind), lambda m: square(m, batch(0)))
    assert plan.roles["queries"] in ("token", "position")
    assert kind == "given" or plan.roles["attention.in_proj_weight"] == "hidden"
    assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Residual branches
# ---------------------------------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Stochastic depth as timm writes it: the mask takes its dtype and device from the branch."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_empty((x.shape[0], 1)).bernoulli_(0.9)
        return x * mask.div_(0.9)


class Residual(nn.Module):
    """Two blocks whose skip is multiplied by a number, a learned scale per channel, or nothing."""

    def __init__(self, skip: str) -> None:
        super().__init__()
        self.skip = skip
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), DropPath())
            for _ in range(2)
        )
        self.scales = nn.ParameterList(torch.ones(16) for _ in range(2)) if skip == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            skip = 1.5 * x if self.skip == "number" else x * self.scales[i] if self.scales is not None else x
            x = skip + block(x)
        return self.out(x)


@each_storage
@pytest.mark.parametrize("skip", ["plain", "number", "learned"])
def test_a_branch_behind_stochastic_depth_or_beside_a_scaled_skip(skip: str, storage: str) -> None:
    torch.manual_seed(0)
    plan = unit_scale(Residual(skip), lambda m: square(m, batch(0)), storage=storage)
    # Two branches: L = 1, so each branch's last matmul has α = 1 and fan_in^-½, times its activation's constant.
    for i in range(2):
        (site,) = [site for site in plan.sites if f"blocks.{i}.3.weight" in site.params]
        assert site.multiplier == pytest.approx(16**-0.5)
    assert not [site for site in plan.sites if site.role in ("residual", "sum")]


class FirstStateMixedIn(nn.Module):
    """Each block begins with a learned mixture of the stream and its first state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2)
        )
        self.mixture = nn.Parameter(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.embed(x)
        for weights, block in zip(self.mixture, self.blocks, strict=True):
            x = weights[0] * x + weights[1] * first
            x = x + block(x)
        return self.out(x)


def test_the_first_state_mixed_into_the_stream_is_no_residual_addition() -> None:
    plan = unit_scale(FirstStateMixedIn(), lambda m: square(m, batch(0)))
    assert not [site for site in plan.sites if site.role == "residual"]


class LogitScale(nn.Module):
    """CLIP: normalised features times one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Linear(8, 8), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * F.normalize(self.net(x), dim=-1)


def test_a_number_behind_a_norm_is_a_scale_not_a_gain() -> None:
    plan = unit_scale(LogitScale(), lambda m: square(m, batch(0)))
    assert plan.roles["scale"] == "scale"
    assert ("scale", plan.parameters["scale"].reason) in plan.skipped


# ---------------------------------------------------------------------------------------------------------------------
# Storages that were seen to differ, in float32 by up to 75 % after five steps: rounding, which the models amplify
# ---------------------------------------------------------------------------------------------------------------------


def detector() -> nn.Module:
    """With deformable attention, over three levels of a small ResNet and one more."""
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic", "embedding_size": 8}
    backbone = ResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"])
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6, "num_labels": 5}
    config = DeformableDetrConfig(backbone_config=backbone, dropout=0.0, **widths, **layers, **heads)
    return DeformableDetrForObjectDetection(config)


def mobile_net() -> nn.Module:
    """BatchNorm over the four numbers that two pictures leave of a channel at the end."""
    config = MobileNetV2Config(depth_multiplier=0.35, image_size=64, num_labels=10, classifier_dropout_prob=0.0)
    return MobileNetV2ForImageClassification(config)


def found_boxes(model: nn.Module, _: Tensor) -> Tensor:
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.2]])
    labels = [{"class_labels": torch.tensor([1, label]), "boxes": boxes} for label in (2, 3)]
    loss: Tensor = model(pixel_values=pictures(), labels=labels).loss
    return loss


def classified(model: nn.Module, _: Tensor) -> Tensor:
    loss: Tensor = model(pixel_values=pictures(), labels=torch.tensor([3, 7])).loss
    return loss


def pictures() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "loss"), [(detector, found_boxes), (mobile_net, classified)])
def test_storages_agree_in_double_precision(build: Callable[[], nn.Module], loss: Loss) -> None:
    folded, unit = (losses(build, loss, storage) for storage in STORAGES)
    assert folded == pytest.approx(unit, rel=1e-6)
    assert folded[-1] < folded[0]
