"""The gate of the casts: before they are trusted, on a rehearsed step with real data.

Every cast site that is called does cast, and for its first call,

    operands times their scales, not cast      give the product back bit for bit, as scales are powers of two
    each of the three products with casts      equals torch's own product of the cast operands in float32, to
                                               accumulation error

and for the whole model, the cosine between each parameter's gradients with and without casts. A site that fails is left
in the compute dtype. Healthy FP8 training shows cosines of 0.992 to 0.997.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_unitscale.engine.apply import casts_in_force
from lightning_unitscale.engine.casting import CastSite, Use
from lightning_unitscale.engine.functions import short_name
from lightning_unitscale.engine.gradients import rehearsed_gradients
from lightning_unitscale.engine.observe import OperandObserver
from lightning_unitscale.engine.plan import Plan
from lightning_unitscale.engine.rehearse import Rehearsal
from lightning_unitscale.formats import FORMATS, OPERANDS, cast
from lightning_unitscale.ops import MATMULS

LOW_COSINE = 0.98
_ROUNDING = 1e-5  # of the largest RMS: gradients that are 0 but for rounding, as those of an attention key's bias
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the norm; other dtypes round the product itself


def verify_casts(
    module: nn.Module, plan: Plan, step: Callable[[Rehearsal], Any], trainer: pl.Trainer | None = None
) -> dict[Use, str]:
    """Check all cast sites of a module whose scales are known; fills `plan.gradient_cosine`.

    Returns:
        What is wrong, by use; empty if nothing is.
    """
    checker = _Checker(module, dict(casts_in_force(module)))
    seed = plan.loss_scale or 1.0
    exact = rehearsed_gradients(module, step, trainer, casts=False, observer=checker, seed=seed)
    seen, used = OperandObserver(module, lambda use, operand: None), set[Use]()

    def watched_step(run: Rehearsal) -> Any:
        output = step(run)
        casts = casts_in_force(module)  # copies, made for the rehearsal
        used.update(use for use, site in casts.items() if site.used or site.scales is None)
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
    low = sorted((cosine, name) for name, cosine in plan.gradient_cosine.items() if not cosine >= LOW_COSINE)
    if low and any(site.format == "fp8" for site in plan.cast_sites):
        worst = ", ".join(f"{name} {cosine:.3f}" for cosine, name in low[:3])
        warnings.warn(
            f"unit scaling: with casts, the gradients of {len(low)} parameters of {type(module).__name__} have a "
            f"cosine below {LOW_COSINE} with those without: {worst}. overrides={{name: {{'format': None}}}} skips it.",
            stacklevel=2,
        )
    return checker.problems


class _Checker(OperandObserver):
    """Checks the first call of every cast site while it is entered."""

    def __init__(self, module: nn.Module, casts: dict[Use, CastSite]) -> None:
        super().__init__(module, lambda use, operand: None)
        self.casts = casts
        self.problems: dict[Use, str] = {}
        self._checked: set[Use] = set()

    def _observe(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        name = short_name(function)
        operands = MATMULS[name].cast_operands(args, kwargs, lambda tensor: tensor in self._keys)
        if operands is None:
            return
        x, weight = operands
        use = self._keys[weight], name
        site = self.casts.get(use)
        if site is None or site.scales is None or use in self._checked:
            return
        self._checked.add(use)
        call = _CheckedCall(function, args, kwargs, x, weight, site)
        with torch._C.DisableTorchFunction():  # an interceptor below counts the model's own calls
            problem = call.scaled_exactly()
        if problem:
            self.problems[use] = problem
        if result.requires_grad:
            result.register_hook(lambda gradient: self._check_products(use, call, gradient))

    def _check_products(self, use: Use, call: _CheckedCall, gradient: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            problem = call.products_as_in_float32(gradient.detach())
        if problem:
            self.problems.setdefault(use, problem)


class _CheckedCall:
    """One call of a matmul-like function, to be made again with other operands."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        weight: Tensor,
        site: CastSite,
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.x, self.weight = x.detach(), weight.detach()
        self._own = {id(x): "x", id(weight): "weight"}
        self.op = MATMULS[short_name(function)]
        self.format = FORMATS[site.format]
        assert site.scales is not None
        self.scales = {operand: float(getattr(site.scales, operand)) for operand in OPERANDS}
        self.casting = CastSite(site.format)  # without unit scaling's own factor
        self.casting.set_scales(self.scales)

    def scaled_exactly(self) -> str:
        """What is wrong with the product of scaled operands that are not cast; empty if nothing is."""
        sx, sw = self.scales["x"], self.scales["weight"]
        wide = torch.promote_types(torch.float32, self.x.dtype)
        x, weight = self.x.to(wide), self.weight.to(wide)
        with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            plain = self._run(x, weight, lambda bias: bias.to(wide))
            scaled = self._run(x * sx, weight * sw, lambda bias: bias.to(wide) * (sx * sw)) / (sx * sw)
        if torch.equal(plain, scaled):
            return ""
        return f"scaling its operands by {sx:g} and {sw:g} alone changed the product"

    def products_as_in_float32(self, gradient: Tensor) -> str:
        """What is wrong with the three products of cast operands; empty if nothing is."""
        wide = torch.promote_types(torch.float32, self.x.dtype)
        device = self.x.device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            x, weight = self.x.requires_grad_(), self.weight.requires_grad_()
            y = self.op.cast(*self._with(x, weight, lambda bias: bias), x, weight, self.casting, 1.0)
            ours = (y, *torch.autograd.grad(y, (x, weight), gradient.to(y.dtype)))
            x, weight = (self._rounded(operand, wide).requires_grad_() for operand in ("x", "weight"))
            y = self._run(x, weight, lambda bias: bias.to(wide))
            theirs = (y, *torch.autograd.grad(y, (x, weight), self._rounded("gradient", wide, gradient)))
        for name, our, their in zip(("output", "gradient of x", "gradient of the weight"), ours, theirs, strict=True):
            error, size = (our.to(wide) - their).norm(), their.norm()
            if not error <= _TOLERANCE.get(our.dtype, 2.0**-6) * size:
                return f"its {name} is off by {float(error / size):.2%} from the product of its cast operands"
        return ""

    def _rounded(self, operand: str, wide: torch.dtype, tensor: Tensor | None = None) -> Tensor:
        """An operand as the cast leaves it, without its scale."""
        tensor = getattr(self, operand) if tensor is None else tensor
        narrow = cast(tensor.detach(), self.format.dtype(operand), self.scales[operand])
        return narrow.to(wide) / self.scales[operand]

    def _run(self, x: Tensor, weight: Tensor, bias: Callable[[Tensor], Tensor]) -> Tensor:
        args, kwargs = self._with(x, weight, bias)
        result: Tensor = self.function(*args, **kwargs)
        return result

    def _with(
        self, x: Tensor, weight: Tensor, bias: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other operands in place of the call's own."""
        known = {place: x if operand == "x" else weight for place, operand in self._own.items()}
        for label, operand in self.op.operands(self.args, self.kwargs).items():
            if label in self.op.bias_labels:
                known[id(operand)] = bias(operand.detach())

        def replaced(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)) and not isinstance(argument, torch.Size):
                return type(argument)([replaced(item) for item in argument])
            return known.get(id(argument), argument) if isinstance(argument, Tensor) else argument

        return tuple(map(replaced, self.args)), {name: replaced(value) for name, value in self.kwargs.items()}
