"""Models with code inside a `torch.autograd.Function`: own backward passes, own checkpointing, identities."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.functions import Alias, ChunkedCrossEntropy, Gelu, View
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_unitscale import Plan, remove_unit_scaling, scale_learning_rates, unit_scale

STORAGES = ("folded", "unit")
WIDTH, CLASSES = 16, 30
each_storage = pytest.mark.parametrize("storage", STORAGES)


pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # evaluated without gradients


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class OwnLinear(torch.autograd.Function):
    """x wᵀ + b that saves its input alone, as memory-saving and fused linear layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2), gradient.flatten(0, -2).sum(0)


class LinearCrossEntropy(torch.autograd.Function):
    """Fused readout and loss, as in today's training kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        ctx.save_for_backward(x, weight, logits.softmax(-1), target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, probabilities, target = ctx.saved_tensors
        d = gradient * (probabilities - F.one_hot(target, CLASSES)) / len(target)
        return d @ weight, d.T @ x, None


class Rerun(torch.autograd.Function):
    """Checkpointing as diffusion models bring it along: parameters are inputs, modules run again in backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.run(x), (x, *ctx.parameters), gradient)


def twice_checkpointed(block: Any) -> Callable[[Tensor], Tensor]:
    """The block, whose branch is checkpointed by hand."""

    def run(x: Tensor) -> Tensor:
        branch = lambda h: block.down(F.gelu(block.up(block.norm(h))))  # noqa: E731
        return x + Rerun.apply(branch, x, *block.parameters())

    return run


class Block(nn.Module):
    """A residual block; `own` makes its linear layers and its activation Functions."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if not self.own:
            return x + self.down(F.gelu(self.up(h)))
        h = Gelu.apply(OwnLinear.apply(h, self.up.weight, self.up.bias))
        return x + OwnLinear.apply(h, self.down.weight, self.down.bias)


class Language(nn.Module):
    """An embedding, residual blocks and a readout, tied or not, each part plain or with Functions."""

    def __init__(
        self,
        own_blocks: bool = False,
        fused: type[torch.autograd.Function] | None = None,
        tied: bool = True,
        norm: bool = False,
        run: Callable[[nn.Module, Tensor], Tensor] | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.run, self.between = fused, run, between
        self.table = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList([Block(own_blocks) for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x) if self.run is None else self.run(block, x)
            x = x if self.between is None else self.between(x)
        x = self.norm(x)
        if self.fused is not None:
            return self.fused.apply(x, self.head.weight, target)
        return F.cross_entropy(self.head(x), target)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, CLASSES, (40,), generator=generator) for _ in range(2))  # type: ignore[return-value]


def prepared(model: nn.Module, **options: Any) -> Plan:
    return unit_scale(model, lambda m: m(*batch()), **options)


def worst_gradient_error(model: nn.Module) -> float:
    """Largest error of a directional derivative, relative to the gradient, over all parameters."""
    model.zero_grad()
    model(*batch()).backward()
    worst = 0.0
    for parameter in model.parameters():
        assert parameter.grad is not None
        direction, step = torch.randn_like(parameter), 1e-5
        with torch.no_grad():
            parameter += step * direction
            above = model(*batch())
            parameter -= 2 * step * direction
            below = model(*batch())
            parameter += step * direction
        error = (parameter.grad * direction).sum() - (above - below) / (2 * step)
        worst = max(worst, float(error.abs() / parameter.grad.norm()))
    return worst


def losses(model: nn.Module, plan: Plan, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-12)
    scale_learning_rates(optimizer, plan)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def multipliers(plan: Plan) -> dict[str, float]:
    return {name: parameter.multiplier for name, parameter in plan.parameters.items()}


CASES: dict[str, Callable[[], Language]] = {
    "tied fused readout": lambda: Language(fused=LinearCrossEntropy),
    "tied fused readout after a norm": lambda: Language(fused=LinearCrossEntropy, norm=True),
    "tied readout in chunks": lambda: Language(fused=ChunkedCrossEntropy, norm=True),
    "untied fused readout": lambda: Language(fused=LinearCrossEntropy, tied=False),
    "own linear layers": lambda: Language(own_blocks=True),
    "all of it": lambda: Language(own_blocks=True, fused=LinearCrossEntropy, norm=True),
    "checkpointed": lambda: Language(run=lambda block, x: checkpoint(block, x, use_reentrant=True)),
    "checkpointed by hand": lambda: Language(run=lambda block, x: Rerun.apply(block, x, *block.parameters())),
}
each_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())


@each_storage
@each_case
def test_gradients_are_those_of_finite_differences(build: Callable[[], Language], storage: str) -> None:
    model = build()
    prepared(model, storage=storage)
    assert worst_gradient_error(model) < 1e-6


@each_case
def test_both_storages_train_alike(build: Callable[[], Language]) -> None:
    folded, unit = ((model := build(), prepared(model, storage=storage)) for storage in STORAGES)
    assert losses(*folded) == pytest.approx(losses(*unit), rel=1e-9)


@each_case
def test_preserve_changes_nothing(build: Callable[[], Language]) -> None:
    model, untouched = build(), build()
    prepared(model, scheme="preserve")
    assert model(*batch(1)).item() == untouched(*batch(1)).item()


@pytest.mark.parametrize("case", ["untied fused readout", "own linear layers", "checkpointed by hand"])
def test_removal_keeps_the_function(case: str) -> None:
    model = CASES[case]()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # a tied readout's factor has no weight
    prepared(model, storage="unit")
    before = model(*batch(1)).item()
    remove_unit_scaling(model)
    assert model(*batch(1)).item() == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize(
    "twin",
    [
        Language(run=lambda block, x: checkpoint(block, x, use_reentrant=True)),
        Language(run=lambda block, x: Rerun.apply(block, x, *block.parameters())),
        Language(run=lambda block, x: Rerun.apply(twice_checkpointed(block), x, *block.parameters())),
        Language(between=Alias.apply),
        Language(between=View.apply),
    ],
    ids=["reentrant checkpointing", "checkpointing by hand", "one inside the other", "alias", "view"],
)
def test_the_plan_is_that_of_the_model_without_the_function(twin: Language) -> None:
    assert multipliers(prepared(twin.double())) == pytest.approx(multipliers(prepared(Language())), rel=1e-6)


@pytest.mark.parametrize("function", [LinearCrossEntropy, ChunkedCrossEntropy])
def test_a_fused_tied_readout_trains_as_the_plain_one_does(function: type[torch.autograd.Function]) -> None:
    models = [Language(fused=fused, norm=True) for fused in (None, function)]
    plain, fused = (losses(model, prepared(model)) for model in models)
    assert plain == pytest.approx(fused, rel=1e-2)  # the factor goes to the norm's gain: its rate is rounded


class Between(nn.Module):
    """An activation between two layers, and a readout that is the table too, behind a layer that is called twice."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.shared, self.own = nn.Linear(WIDTH, WIDTH), own

    def forward(self, ids: Tensor, target: Tensor, calls: int = 1) -> Tensor:
        h = self.up(self.table(ids))
        x = self.down(Gelu.apply(h) if self.own else F.gelu(h))
        for _ in range(calls):
            x = self.shared(x)
        if self.own:
            return LinearCrossEntropy.apply(x, self.table.weight, target)
        return F.cross_entropy(F.linear(x, self.table.weight), target)


@each_storage
@pytest.mark.parametrize("calls", [1, 2])
def test_the_function_under_the_plan_is_that_of_plain_calls(calls: int, storage: str) -> None:
    found = []
    for own in (False, True):
        model = Between(own)
        plan = unit_scale(model, lambda m: m(*batch(), calls), storage=storage, lr_units="umup", verify=calls == 1)
        found.append((model(*batch(1), calls).item(), plan))
    (expected, _), (ours, plan) = found
    if calls == 1:
        assert ours == pytest.approx(expected, rel=1e-9)
        assert plan.parameters["down.weight"].multiplier == pytest.approx(
            64**-0.5 * 1.5335, rel=1e-3
        )  # 1 / RMS of GELU
    else:  # a factor on the layer that is called twice would act twice
        assert "autograd.Function" in plan.parameters["table.weight"].reason


def test_a_weight_with_a_factor_that_has_no_place_is_left_alone_with_the_reason() -> None:
    class TwoReadouts(Language):
        def forward(self, ids: Tensor, target: Tensor) -> Tensor:
            x = self.blocks[0](self.table(ids))
            return LinearCrossEntropy.apply(x, self.table.weight, target) + x.square().mean()

    model = TwoReadouts()
    before = model.table.weight.detach().clone()
    plan = prepared(model)
    assert "autograd.Function" in plan.parameters["table.weight"].reason
    assert torch.equal(model.table.weight, before)
    for name, parameter in model.named_parameters():
        if "blocks.1" in name or "blocks.2" in name or "head" in name:
            parameter.requires_grad_(False)
    model.zero_grad()
    model(*batch()).backward()
    assert model.table.weight.grad is not None


@pytest.mark.filterwarnings("ignore:unit scaling")
def test_a_recurrent_layer_in_front_of_a_fused_tied_readout_leaves_the_table_alone() -> None:
    class Recurrent(Language):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList()
            self.layer = nn.GRU(WIDTH, WIDTH)

        def forward(self, ids: Tensor, target: Tensor) -> Tensor:
            return ChunkedCrossEntropy.apply(self.layer(self.table(ids))[0], self.head.weight, target)

    model = Recurrent()
    del model.norm
    plan = prepared(model, storage="unit")
    assert "autograd.Function" in plan.parameters["table.weight"].reason
    assert worst_gradient_error(model) < 1e-6


def test_operands_inside_a_function_are_not_cast() -> None:
    plan = prepared(Language(own_blocks=True), format="bf16")
    reasons = {site.name: site.format_reason for site in plan.sites if site.params and "down" in site.params[0]}
    assert reasons
    assert all("autograd.Function" in reason for reason in reasons.values())
