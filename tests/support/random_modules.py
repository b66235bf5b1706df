"""Random modules with code that goes wrong beside plain layers: hand-written Functions, shared weights, penalties.

A `Program` says what a module is made of, as plain data that hypothesis can draw and shrink; `Net` is the module.
`plain(program)` is its twin: the same function of the same weights, in which autograd sees every call, no layer is
checkpointed, and nothing but the loss runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.functions import (
    Alias,
    ChunkedCrossEntropy,
    Gelu,
    GradientScale,
    Linear,
    LinearCrossEntropy,
    LinearRelu,
    Mlp,
    Rerun,
    Reversal,
    StraightThrough,
    SwiGLU,
    View,
)

WIDTH, TOKENS, CLASSES = 8, 5, 11


@dataclass(frozen=True)
class Part:
    """A layer, or what is done to a chain of layers.

    Attributes:
        kind: a key of `LAYERS` or of `AROUND`.
        own: made by a hand-written Function, where there is one.
        inner: the chain, for a kind of `AROUND`.
    """

    kind: str
    own: bool = False
    inner: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Program:
    """A module: layers between an embedding (or a linear layer) and a loss.

    Attributes:
        entry, readout: "table" or "linear"; a key of `READOUTS`.
        tied: the readout's weight is the table.
        penalties: keys of `PENALTIES`, on all weights of the body.
        beside: keys of `BESIDE`, what the step does without gradients.
    """

    parts: tuple[Part, ...]
    entry: str = "table"
    readout: str = "linear"
    tied: bool = False
    penalties: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def has_slopes(self) -> bool:
        """Whether gradients are the slope of the loss."""
        return not any(part.kind in NO_SLOPES for part in _all(self.parts))

    @property
    def detaches_in_a_function(self) -> bool:
        """Whether gradients are cut where autograd is off, which only the backward pass that runs it again shows."""
        by_hand = [part for part in _all(self.parts) if part.kind == "checkpointed by hand"]
        return any("detach" in part.kind for part in _all(by_hand))


def plain(program: Program) -> Program:
    """The same function of the same weights, with nothing around it."""
    return replace(
        program,
        parts=_plain(program.parts),
        readout="linear" if program.readout in ("own linear", "fused", "in chunks") else program.readout,
        beside=(),
    )


def _plain(parts: Sequence[Part]) -> tuple[Part, ...]:
    found: list[Part] = []
    for part in parts:
        inner = _plain(part.inner)
        if part.kind in IDENTITIES and (found or part is not parts[-1]):
            continue  # but one of a chain of nothing else: x + x is another sum than x + alias(x)
        if part.kind in CHECKPOINTS:
            found += inner
        else:
            found.append(Part(part.kind, inner=inner))
    return tuple(found)


def _all(parts: Sequence[Part]) -> list[Part]:
    return [found for part in parts for found in (part, *_all(part.inner))]


# --- layers ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of `WIDTH` numbers; `own` makes it of hand-written Functions."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own


class Dense(Layer):
    """A linear layer."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return Linear.apply(x, self.linear.weight, self.linear.bias) if self.own else self.linear(x)


class DenseRelu(Dense):
    """A linear layer and its activation, in one Function."""

    def forward(self, x: Tensor) -> Tensor:
        if self.own:
            return LinearRelu.apply(x, self.linear.weight, self.linear.bias)
        return F.relu(self.linear(x))


class FeedForward(Layer):
    """Two linear layers around a GELU."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.own:
            return Mlp.apply(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        return self.down(F.gelu(self.up(x)))


class Gated(Layer):
    """A gated feed-forward layer."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        return self.down(SwiGLU.apply(gate, up) if self.own else F.silu(gate) * up)


class Activation(Layer):
    """GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return Gelu.apply(x) if self.own else F.gelu(x)


class Calls(Layer):
    """A function of the input and of two square weights."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(own=False)
        self.call = call
        self.a, self.b = (nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.a, self.b)


def _noise() -> Tensor:
    """The same each time, for slopes are taken of it; to torch it is drawn."""
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))


def _attended(x: Tensor, scores: Tensor) -> Tensor:
    return (scores / WIDTH**0.5).softmax(-1) @ x


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "einsum of two weights": lambda x, a, b: torch.einsum("bti,ij,jk->btk", x, a, b),
    "einsum of one weight twice": lambda x, a, b: torch.einsum("bti,ij,kj->btk", x, a, a),
    "multi_dot": lambda x, a, b: torch.linalg.multi_dot([x.flatten(0, 1), a, b]).view_as(x),
    "multi_dot of one weight twice": lambda x, a, b: torch.linalg.multi_dot([x.flatten(0, 1), a, a.T]).view_as(x),
    "product of weights": lambda x, a, b: x @ (a @ b),
    "gram": lambda x, a, b: x @ (a @ a.T),
    "there and back": lambda x, a, b: F.linear(F.relu(F.linear(x, a)), a.T),
    "one weight in two functions": lambda x, a, b: F.linear(torch.tanh(x @ a), a),
    "bilinear": lambda x, a, b: F.bilinear(x, torch.tanh(x), torch.stack([a, b, a, b, a, b, a, b])),
    "bilinear form": lambda x, a, b: x * torch.einsum("bti,ij,btj->bt", x, a, x).tanh().unsqueeze(-1),
    "bilinear attention": lambda x, a, b: _attended(x, torch.einsum("bti,ij,bsj->bts", x, a, x)) @ b,
    "one weight for query and key": lambda x, a, b: _attended(x @ b, (x @ a) @ (x @ a).transpose(1, 2)),
    "sum of weights": lambda x, a, b: x @ (a + b),
    "part of a weight": lambda x, a, b: torch.cat([x @ a[:, :3], x @ b[:, 3:]], -1),
    "learned gate": lambda x, a, b: x @ a * torch.sigmoid(x @ b),
    "noise on a weight": lambda x, a, b: x @ (a + 0.1 * _noise()),
    "mask on a weight": lambda x, a, b: F.linear(x, a * (_noise() > -1)),
    "outer sum": lambda x, a, b: x @ a + torch.relu(x) @ b,
}


class Attention(Layer):
    """Causal attention."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            (Linear.apply(x, layer.weight, layer.bias) if self.own else layer(x)).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PackedAttention(Layer):
    """`nn.MultiheadAttention`."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class RmsNorm(Layer):
    """A norm spelled out."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Recurrent(Layer):
    """A GRU."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Convolution(Layer):
    """A convolution over the tokens."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Position(Layer):
    """A learned array, added."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position


class LayerScale(Layer):
    """A small learned gain behind a linear layer."""

    def __init__(self, own: bool) -> None:
        super().__init__(own)
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


class Applied(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _weight_normed(own: bool) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {"alias": Alias.apply, "view": View.apply}
NO_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "straight through": StraightThrough.apply,
    "straight through by detaching": lambda x: x + (torch.round(x) - x).detach(),
    "reversal": Reversal.apply,
    "gradient scale": GradientScale.apply,
    "half detached": lambda x: (x + x.detach()) / 2,
}
LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": Dense,
    "linear relu": DenseRelu,
    "feed-forward": FeedForward,
    "gated": Gated,
    "gelu": Activation,
    "attention": Attention,
    "packed attention": PackedAttention,
    "rms norm": RmsNorm,
    "layer norm": lambda own: nn.LayerNorm(WIDTH),
    "gru": Recurrent,
    "convolution": Convolution,
    "position": Position,
    "layer scale": LayerScale,
    "weight norm": _weight_normed,
    "relu in place": lambda own: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "silu": lambda own: nn.SiLU(),
    "scaled": lambda own: Applied(lambda x: 3 * x),
    **{name: lambda own, call=call: Calls(call) for name, call in CALLS.items()},
    **{name: lambda own, f=f: Applied(f) for name, f in (IDENTITIES | NO_SLOPES).items()},
}


class Around(nn.Module):
    """A chain of layers, and a function of it and its input."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], chain: nn.Module) -> None:
        super().__init__()
        self.run, self.chain = run, chain

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.chain, x)


def _assigned(chain: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x[:2] = x[:2] + chain(
        x[:2].clone()
    )  # a checkpoint inside keeps its input, and would not notice that it is written to
    return x


CHECKPOINTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda chain, x: checkpoint(chain, x, use_reentrant=True),
    "checkpointed": lambda chain, x: checkpoint(chain, x, use_reentrant=False),
    "checkpointed by hand": lambda chain, x: Rerun.apply(chain, x, *chain.parameters()),
}
AROUND: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    **CHECKPOINTS,
    "residual": lambda chain, x: x + chain(x),
    "pre-norm residual": lambda chain, x: x + chain(F.layer_norm(x, (WIDTH,))),
    "post-norm residual": lambda chain, x: F.layer_norm(x + chain(x), (WIDTH,)),
    "called twice": lambda chain, x: chain(chain(x)),
    "called on two inputs": lambda chain, x: chain(x) + chain(x.flip(1)),
    "multiplied": lambda chain, x: x * torch.sigmoid(chain(x)),
    "on a part": lambda chain, x: x.index_add(0, torch.tensor([0, 2]), chain(x[[0, 2]])),
    "assigned to a part": lambda chain, x: _assigned(chain, x),
}


def chain_of(parts: Sequence[Part]) -> nn.Sequential:
    """The layers of a chain, one after the other."""
    return nn.Sequential(
        *(
            Around(AROUND[part.kind], chain_of(part.inner)) if part.kind in AROUND else LAYERS[part.kind](part.own)
            for part in parts
        )
    )


# --- the whole -------------------------------------------------------------------------------------------------------

READOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
    "own linear": lambda x, weight, target: F.cross_entropy(Linear.apply(x, weight, None), target),
    "fused": lambda x, weight, target: LinearCrossEntropy.apply(x, weight, target),
    "in chunks": lambda x, weight, target: ChunkedCrossEntropy.apply(x, weight, target),
    "regression": lambda x, weight, target: F.linear(x, weight).square().mean() + F.linear(x, weight)[0, 0],
}
PENALTIES: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "L1": lambda weights, start: torch.stack([w.abs().sum() for w in weights]).sum(),
    "L2": lambda weights, start: torch.stack([w.pow(2).sum() for w in weights]).sum(),
    "to the start": lambda weights, start: torch.stack(
        [(w - s).square().sum() for w, s in zip(weights, start, strict=True)]
    ).sum(),
    "orthogonal": lambda weights, start: torch.stack([(w @ w.T - torch.eye(len(w))).square().sum() for w in weights])
    .sum(),
    "norms": lambda weights, start: torch.stack([w.norm() for w in weights]).norm(),
}  # fmt: skip


def _accuracy(net: Net, ids: Tensor, target: Tensor) -> None:
    net.seen = (net.logits(ids).argmax(-1) == target).float().mean()


def _features(net: Net, ids: Tensor, target: Tensor) -> None:
    net.seen = net.features(ids).square().mean()


BESIDE: dict[str, Callable[[Net, Tensor, Tensor], None]] = {"accuracy": _accuracy, "features": _features}


@dataclass(eq=False)
class Batch:
    """One batch, the same for the same seed."""

    seed: int = 0
    ids: Tensor = field(init=False)
    target: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.ids, self.target = (torch.randint(0, CLASSES, (3, TOKENS), generator=generator) for _ in range(2))


class Net(nn.Module):
    """The module of a program, from seed 0."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.table = nn.Embedding(CLASSES, WIDTH) if program.entry == "table" else nn.Linear(CLASSES, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.body = chain_of(program.parts)
        if program.tied and program.entry == "table":
            self.head.weight = self.table.weight
        self.start = [weight.detach().clone() for weight in self.weights()]
        self.seen: Any = None

    def weights(self) -> list[Tensor]:
        """The matrices of the body."""
        return [p for p in self.body.parameters() if p.ndim == 2]

    def features(self, ids: Tensor) -> Tensor:
        """What the readout works on."""
        one_hot = self.program.entry != "table"
        return self.body(self.table(F.one_hot(ids, CLASSES).to(self.head.weight.dtype) if one_hot else ids))

    def logits(self, ids: Tensor) -> Tensor:
        """The readout's."""
        return self.head(self.features(ids))

    def penalty(self) -> Tensor:
        """The sum of the program's penalties."""
        weights = self.weights()
        found = [PENALTIES[name](weights, self.start) for name in self.program.penalties if weights]
        return torch.stack(found).sum() if found else torch.zeros(())

    def forward(self, batch: Batch) -> Tensor:
        for name in self.program.beside:
            with torch.no_grad():
                BESIDE[name](self, batch.ids, batch.target)
        x = self.features(batch.ids).flatten(0, 1)
        loss = READOUTS[self.program.readout](x, self.head.weight, batch.target.flatten())
        return loss + 1e-3 * self.penalty() if self.program.penalties else loss
