"""The gate of the casts: before they are trusted, on a rehearsed step with real data.

Every cast site that is called does cast, and for its first call,

    operands times their scales, not cast      give the product back bit for bit, as scales are powers of two
    each of the three products with casts      equals torch's own product of the cast operands in float32, to
                                               accumulation error

(of attention's own products: the operands themselves, and the output and the gradient of each operand;)
and for the whole model, the cosine between each parameter's gradients with and without casts. A site that fails is left
in the compute dtype; low cosines are a warning (`LOW_COSINE`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.engine.checks.gradients import rehearsed_gradients
from lightning_unitscale.engine.plan.plan import Plan
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.record.rehearsal import Rehearsal
from lightning_unitscale.engine.runtime.casts import AttentionCast, CastSite, WeightCast
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.engine.runtime.observer import ObservedProduct, OperandObserver
from lightning_unitscale.formats import FORMATS
from lightning_unitscale.ops import MATMULS, FunctionCall
from lightning_unitscale.ops.round_trip import round_trip
from lightning_unitscale.ops.torch_functions import short_name
from lightning_unitscale.warn_user import warn_user

if TYPE_CHECKING:
    import pytorch_lightning as pl

# Healthy models show 0.992 to 0.997 in fp8, 0.995 and more in bf16, 0.999 and more in fp16; tiny ones with batch norms
# 0.976 in bf16, 0.996 in fp16.
LOW_COSINE = {
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_rowwise", "mxfp8"), 0.98),
    "nvfp4": 0.7,
    "bf16": 0.95,
    "fp16": 0.99,
}
_ROUNDING = 1e-5  # of the largest RMS: gradients that are 0 but for rounding, as those of an attention key's bias
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the norm; other dtypes round the product itself
# To the product of operands as they are, where each of the three rounds them in a way of its own
_BLOCK_TOLERANCE, _ROW_TOLERANCE = 0.5, 0.15


def verify_casts(
    module: nn.Module, plan: Plan, step: Callable[[Rehearsal], Any], trainer: pl.Trainer | None = None
) -> dict[UseId, str]:
    """Check all cast sites of a module whose scales are known; fills `plan.gradient_cosine`.

    Returns:
        What is wrong, by use; empty if nothing is.
    """
    checker = _Checker(module, dict(casts_in_force(module)))
    seed = plan.loss_scale or 1.0
    exact = rehearsed_gradients(module, step, trainer, casts=False, observer=checker, seed=seed)
    seen, used = OperandObserver(module, lambda use, operand: None), set[UseId]()

    def watched_step(run: Rehearsal) -> Any:
        output = step(run)
        casts = casts_in_force(module)  # copies, made for the rehearsal
        used.update(use for use, cast in casts.items() if cast.used or cast.scales is None)
        return output

    with_casts = rehearsed_gradients(module, watched_step, trainer, observer=seen, seed=seed)
    for use in (casts_in_force(module).keys() & seen.found.keys()) - used:
        checker.problems[use] = "its weight is made in a module's hook, out of reach of an interceptor"
    sizes = {name: float(gradient.square().mean().sqrt()) for name, gradient in exact.items()}
    plan.gradient_cosine = {
        name: float(F.cosine_similarity(exact[name], with_casts[name], dim=0))
        for name, size in sizes.items()
        if name in with_casts and size > _ROUNDING * max(sizes.values())
    }
    _warn_of_low_cosines(module, plan)
    return checker.problems


def _warn_of_low_cosines(module: nn.Module, plan: Plan) -> None:
    least = min((LOW_COSINE[site.format] for site in plan.cast_sites if site.format is not None), default=-1.0)
    low = sorted((cosine, name) for name, cosine in plan.gradient_cosine.items() if not cosine >= least)
    if low:
        worst = ", ".join(f"{name} {cosine:.3f}" for cosine, name in low[:3])
        warn_user(
            f"unit scaling: with casts, the gradients of {len(low)} parameters of {type(module).__name__} have a "
            f"cosine below {least} with those without: {worst}. overrides={{name: {{'format': None}}}} skips it."
        )


class _Checker(OperandObserver):
    """Checks the first call of every cast site while it is entered."""

    def __init__(self, module: nn.Module, casts: dict[UseId, CastSite]) -> None:
        super().__init__(module, lambda use, operand: None)
        self.casts = casts
        self.problems: dict[UseId, str] = {}
        self._checked: set[UseId] = set()

    def observe(self, use: UseId, product: ObservedProduct) -> None:
        """Check the product if it is the first of its use."""
        cast = self.casts.get(use)
        if cast is None or cast.scales is None or use in self._checked:
            return
        self._checked.add(use)
        call = (_CheckedWeight if isinstance(cast, WeightCast) else _CheckedAttention)(product, cast.site)
        with torch._C.DisableTorchFunction():  # an interceptor below counts the model's own calls
            problem = call.scaled_exactly()
        if problem:
            self.problems[use] = problem
        if product.result.requires_grad:
            product.result.register_hook(lambda gradient: self._check_products(use, call, gradient))

    def _check_products(self, use: UseId, call: _CheckedCall, gradient: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            problem = call.products_as_in_float32(gradient.detach())
        if problem:
            self.problems.setdefault(use, problem)


class _CheckedCall(ABC):
    """One call of a matmul-like function, to be made again with other operands."""

    def __init__(self, product: ObservedProduct, site: Site) -> None:
        self.site, self.scales = site, site.operand_scales
        self.op, self.format = MATMULS[short_name(product.call.function)], FORMATS[site.format or ""]
        self.call = self.op.without_dropout(product.call)
        self.labels = {id(tensor): label for label, tensor in product.operands.items()}
        self.operands = {label: tensor.detach() for label, tensor in product.operands.items()}
        self.wide = torch.promote_types(torch.float32, next(iter(self.operands.values())).dtype)

    @abstractmethod
    def scaled_exactly(self) -> str:
        """What is wrong with operands that are scaled and not cast; empty if nothing is."""

    @abstractmethod
    def cast_product(self, operands: dict[str, Tensor]) -> Tensor:
        """The product as the model makes it, without unit scaling's own factor."""

    def products_as_in_float32(self, gradient: Tensor) -> str:
        """What is wrong with the product of cast operands and its gradients; empty if nothing is."""
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            leaves = {label: operand.detach().requires_grad_() for label, operand in self.operands.items()}
            y = self.cast_product(leaves)
            ours = (y, *torch.autograd.grad(y, list(leaves.values()), gradient.to(y.dtype)))
            leaves = {label: self._rounded(label, operand).requires_grad_() for label, operand in leaves.items()}
            y = self._run(leaves, lambda tensor: tensor.to(self.wide))
            theirs = (y, *torch.autograd.grad(y, list(leaves.values()), self._rounded("gradient", gradient)))
        for name, our, their in zip(
            ("output", *(f"gradient of {label}" for label in leaves)), ours, theirs, strict=True
        ):
            error, size = (our.to(self.wide) - their).norm(), their.norm()
            tolerance = self._tolerance or _TOLERANCE.get(our.dtype, 2.0**-6)
            if not error <= tolerance * size:
                return f"its {name} is off by {float(error / size):.2%} from the product of its cast operands"
        return ""

    @property
    def _tolerance(self) -> float:
        """Of products that are compared with those of operands as they are; 0 where operands have one rounding."""
        return _BLOCK_TOLERANCE if self.format.has_blocks else _ROW_TOLERANCE if self.site.row_exponents else 0.0

    def _rounded(self, operand: str, tensor: Tensor) -> Tensor:
        """An operand as the cast leaves it, without its scale; as it is where it has two roundings."""
        wide, numbers = tensor.detach().to(self.wide), self.format.numbers(operand)
        if self._tolerance or not isinstance(numbers, torch.dtype):
            return wide
        return round_trip(wide, numbers, self.scales[operand])

    def _run(self, operands: dict[str, Tensor], other: Callable[[Tensor], Tensor]) -> Tensor:
        result: Tensor = self._with(operands, other).run()
        return result

    def _with(self, operands: dict[str, Tensor], other: Callable[[Tensor], Tensor]) -> FunctionCall:
        """The call with other operands in place of its own, and `other` of what is added: biases, masks."""

        def new(argument: Any) -> Any:
            if id(argument) in self.labels:
                return operands[self.labels[id(argument)]]
            is_added = isinstance(argument, Tensor) and argument.is_floating_point()
            return other(argument.detach()) if is_added else argument

        return self.call.with_each(new)


class _CheckedWeight(_CheckedCall):
    """A product of an activation and a weight."""

    def scaled_exactly(self) -> str:
        sx, sw = self.scales["x"], self.scales["weight"]
        x, weight = (self.operands[operand].to(self.wide) for operand in ("x", "weight"))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            plain = self._run({"x": x, "weight": weight}, lambda bias: bias.to(self.wide))
            scaled = {"x": x * sx, "weight": weight * sw}
            back = self._run(scaled, lambda bias: bias.to(self.wide) * (sx * sw)) / (sx * sw)
        if torch.equal(plain, back):
            return ""
        return f"scaling its operands by {sx:g} and {sw:g} alone changed the product"

    def cast_product(self, operands: dict[str, Tensor]) -> Tensor:
        casting = WeightCast(replace(self.site, factors={}))
        call = self._with(operands, lambda bias: bias)
        return self.op.cast(call, operands["x"], operands["weight"], casting, 1.0)


class _CheckedAttention(_CheckedCall):
    """One of attention's own products."""

    def scaled_exactly(self) -> str:
        for label, operand in self.operands.items():
            wide, scale = operand.to(self.wide), self.scales[label]
            if not torch.equal(wide * scale / scale, wide):
                return f"scaling its {label} by {scale:g} alone changed it"
        return ""

    def cast_product(self, operands: dict[str, Tensor]) -> Tensor:
        casting = AttentionCast(self.site)
        return casting.rounded_gradient(casting.rounded(self.op, self._with(operands, lambda mask: mask)).run())
