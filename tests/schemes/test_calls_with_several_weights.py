"""A factor goes into exactly one weight of a call, however many it has: storages and removal agree on the function."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale import UnitScalingError, remove_unit_scaling, unit_scale

Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A linear layer, a body with weights of its own, a linear head."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.before, self.head = body, nn.Linear(5, 8), nn.Linear(8, 2)
        self.a, self.b = (nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))
        self.c, self.cube = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 8, 8) / 8)
        self.qkv, self.lstm, self.cell = nn.Linear(8, 24), nn.LSTM(8, 8, 2), nn.GRUCell(8, 8)
        self.both_ways = nn.GRU(8, 4, bidirectional=True, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.before(x)))


def attended(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)


BODIES: dict[str, Body] = {
    "einsum": lambda m, h: torch.einsum("nbd,dr,re->nbe", F.relu(h), m.a, m.b),
    "einsum of one weight twice": lambda m, h: torch.einsum("nbd,dr,re->nbe", F.relu(h), m.a, m.a),
    "einsum of an activation twice": lambda m, h: (lambda r: torch.einsum("nbd,nbd,de->nbe", r, r, m.a))(F.relu(h)),
    "einsum of an activation and its view": lambda m, h: (
        lambda r: torch.einsum("nbd,nbd,de->nbe", r, r.flatten().view_as(r), m.a)
    )(F.relu(h)),
    "einsum on a branch": lambda m, h: h + torch.einsum("nbd,dr,re->nbe", h, m.a, m.b),
    "einsum behind a constant": lambda m, h: torch.einsum("nbd,dr,re->nbe", 0.1 * h, m.a, m.b).tanh(),
    "multi_dot": lambda m, h: torch.linalg.multi_dot([F.relu(h).flatten(0, 1), m.a, m.b]).view_as(h),
    "multi_dot on a branch": lambda m, h: h + torch.linalg.multi_dot([h.flatten(0, 1), m.a, m.b]).view_as(h),
    "bilinear": lambda m, h: F.bilinear(F.relu(h), m.c.expand_as(h), m.cube, m.c),
    "bilinear with its bias": lambda m, h: F.bilinear(F.relu(h), h.tanh(), m.cube, m.c),
    "bilinear on a branch": lambda m, h: h + F.bilinear(h, m.c.expand_as(h), m.cube, m.c),
    "addmm onto an activation": lambda m, h: torch.addmm(F.relu(h).flatten(0, 1), h.flatten(0, 1), m.a).view_as(h),
    "addmm onto the stream": lambda m, h: h + torch.addmm(h.flatten(0, 1).tanh(), h.flatten(0, 1), m.a).view_as(h),
    "recurrent": lambda m, h: m.lstm(F.relu(h))[0],
    "recurrent both ways": lambda m, h: m.both_ways(F.relu(h))[0],
    "recurrent on a branch": lambda m, h: h + m.lstm(h)[0],
    "recurrent cell": lambda m, h: m.cell(F.relu(h).flatten(0, 1)).view_as(h),
    "recurrent cell's state": lambda m, h: m.cell(h.flatten(0, 1), F.relu(h).flatten(0, 1)).view_as(h),
    "attention on learned keys": lambda m, h: attended(m, F.relu(h), m.a.expand(3, 8, 8), m.b.expand(3, 8, 8)),
    "attention on learned values": lambda m, h: h + attended(m, h.tanh(), h, m.a.expand(3, 8, 8)[:, :4]),
    "attention by learned queries": lambda m, h: h + attended(m, m.a.expand(3, 8, 8)[:, :4], h, F.relu(h)),
    "attention of one product": lambda m, h: h + attended(m, *m.qkv(h).chunk(3, -1)),
    "attention to itself": lambda m, h: attended(m, *(m.before(h[..., :5]),) * 3),
    "norm of learned latents": lambda m, h: h + F.layer_norm(m.a.expand(3, 8, 8)[:, :4], (8,), m.c) @ m.b,
}


@pytest.mark.parametrize("name", BODIES)
def test_storages_and_removal_agree(name: str) -> None:
    torch.manual_seed(1)
    x, found = torch.randn(3, 4, 5, dtype=torch.float64), []
    for storage in ("folded", "unit"):
        net = Net(BODIES[name])
        unit_scale(net, lambda m: m(x).square().mean(), storage=storage)
        found.append(net(x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    with suppress(UnitScalingError):  # where a factor stands between activations, it says so
        remove_unit_scaling(net)
    torch.testing.assert_close(net(x), found[0], rtol=1e-10, atol=1e-12)


def test_weights_multiplied_in_one_call_have_the_scale_of_one_matmul_after_the_other() -> None:
    """Each sums over what the next one does not, and the last one is the readout."""
    multipliers = []
    for body in ("einsum", "multi_dot", "one after the other"):
        net = Net(BODIES.get(body, lambda m, h: F.relu(h) @ m.a @ m.b))
        plan = unit_scale(net, lambda m: m(torch.ones(3, 4, 5, dtype=torch.float64)).square().mean())
        multipliers.append([plan.parameters[name].multiplier for name in "ab"])
    assert multipliers[0] == pytest.approx(multipliers[2])
    assert multipliers[1] == pytest.approx(multipliers[2])


@pytest.mark.parametrize("storage", ["folded", "unit"])
def test_a_factor_acts_once_where_one_function_makes_a_weight_and_uses_it(storage: str) -> None:
    """x (a aᵀ): the function is linear in the expression, and its factor is not one on `a` as well."""
    net = Net(lambda m, h: h @ (m.a @ m.a.T))
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    plan = unit_scale(net, lambda m: m(x).square().mean(), storage=storage)
    expected = net.head(net.before(x) @ (net.a @ net.a.T) * plan.sites[1].factors["a"])
    assert plan.sites[1].params == ["a"]
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
