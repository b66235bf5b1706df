"""Matrix products: linear, addmm, matmul and their relatives, einsum, grouped products of experts.

The workhorse is `ScaledProduct`,

    y  = a · x Wᵀ + b · bias            x: (n, in)   W: (out, in)   y: (n, out)
    gx = a · g W
    gW = a · gᵀ x
    gb = b · Σ g

with the constants inside the three products (`addmm(alpha=a)`), so that scaling costs no pass over memory, and
neither a scaled copy of the weight nor of the activations is kept (Unit Scaling, arXiv 2303.11257, section 4).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_unitscale.errors import UncastableError
from lightning_unitscale.ops.autocast import autocast_dtype
from lightning_unitscale.ops.matmul import Casting, Matmul, Shape, add_bias, argument, present
from lightning_unitscale.ops.products import BatchedProducts, EinsumProducts, GroupedProducts, MatrixProducts, Products


class ScaledProduct(torch.autograd.Function):
    """`a · x Wᵀ + b · bias` for 2-D x; backward is made of differentiable operations (gradient penalties work)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: float, b: float) -> Tensor:
        return _product(x, weight.t(), a) if bias is None else torch.addmm(bias, x, weight.t(), alpha=a, beta=b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.a, ctx.b = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (g,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            _product(g, weight, ctx.a) if needs_x else None,
            _product(g.t(), x, ctx.a) if needs_weight else None,
            g.sum(0) * ctx.b if needs_bias else None,
            None,
            None,
        )


# `Function.apply` asks for this signature at every call, and working it out costs as much as a small product.
ScaledProduct.forward.__signature__ = inspect.signature(ScaledProduct.forward)  # type: ignore[attr-defined]


def _product(left: Tensor, right: Tensor, a: float) -> Tensor:
    return torch.addmm(left.new_empty(()), left, right, alpha=a, beta=0)


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: float, b: float) -> Tensor:
    """`a · x Wᵀ + b · bias`; x: (*, in), weight: (out, in), bias: (out,), result: (*, out)."""
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        # Cast first: inside the Function autocast would give the backward pass operands of two dtypes.
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return scaled_linear(x, weight, bias, a, b)
    y: Tensor = ScaledProduct.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b)  # type: ignore[no-untyped-call]
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _matrix_products(weight: Any) -> Products:
    if len(weight.shape) != 2:
        raise UncastableError("the weight is a vector")
    return MatrixProducts()


def _of_rows(x: Tensor, weight: Tensor, casting: Casting) -> Tensor:
    """`x Wᵀ` for x: (*, in), W: (out, in)."""
    return casting(x.reshape(-1, x.shape[-1]), weight, MatrixProducts()).reshape(*x.shape[:-1], weight.shape[0])


def _any_product(x: Any, weight: Any, weight_first: bool) -> Products:
    """Of `x @ weight`, or of `weight @ x`."""
    if not weight_first and len(weight.shape) == 2:
        return MatrixProducts()
    if min(len(x.shape), len(weight.shape)) < 2:
        raise UncastableError("one operand is a vector")
    return BatchedProducts(weight_first)


class Linear(Matmul):
    """`F.linear(x, weight, bias)`."""

    name = "linear"
    bias_labels = frozenset({"bias"})

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return present(
            x=argument(args, kwargs, 0, "input"),
            weight=argument(args, kwargs, 1, "weight"),
            bias=argument(args, kwargs, 2, "bias"),
        )

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return shapes["weight"][-1]

    def products(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any, weight: Any) -> Products:
        return _matrix_products(weight)

    def cast(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        weight: Tensor,
        casting: Casting,
        bias_factor: float,
    ) -> Tensor:
        y = _of_rows(x, weight, casting)
        return add_bias(y, argument(args, kwargs, 2, "bias"), bias_factor)

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Tensor:
        operands = self.operands(args, kwargs)
        a, bias = self.product_factor(factors), operands.get("bias")
        if operands["weight"].dim() == 2:
            return scaled_linear(operands["x"], operands["weight"], bias, a, factors.get("bias", 1.0))
        return function(*args, **kwargs) * a  # a 1-D weight has no bias


class AddMm(Matmul):
    """`addmm(bias, left, right, beta=1, alpha=1)`, as in GPT-2's Conv1D with its weight transposed."""

    bias_labels = frozenset({"bias"})

    def __init__(self, name: str) -> None:
        self.name = name

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        second, third = ("mat1", "mat2") if self.name == "addmm" else ("batch1", "batch2")
        return present(
            bias=argument(args, kwargs, 0, "input"),
            left=argument(args, kwargs, 1, second),
            right=argument(args, kwargs, 2, third),
        )

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return shapes["left"][-1]

    def products(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any, weight: Any) -> Products:
        return _any_product(x, weight, self.operands(args, kwargs)["left"] is weight)

    def cast(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        weight: Tensor,
        casting: Casting,
        bias_factor: float,
    ) -> Tensor:
        products = self.products(args, kwargs, x, weight)
        y = casting(x, weight.t() if isinstance(products, MatrixProducts) else weight, products)
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        return add_bias(y if alpha == 1 else y * alpha, argument(args, kwargs, 0, "input"), bias_factor * beta)

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Tensor:
        kwargs = dict(kwargs)
        kwargs["alpha"] = kwargs.get("alpha", 1) * self.product_factor(factors)
        kwargs["beta"] = kwargs.get("beta", 1) * factors.get("bias", 1.0)
        return function(*args, **kwargs)


class Product(Matmul):
    """`matmul`, `mm`, `bmm`, `@` and the like: two multiplicands, no bias."""

    def __init__(self, name: str) -> None:
        self.name = name

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        left, right = (argument(args, kwargs, i, name) for i, name in enumerate(self._argument_names()))
        return present(left=right, right=left) if self.name == "rmatmul" else present(left=left, right=right)

    def _argument_names(self) -> tuple[str, str]:
        return {"mm": ("input", "mat2"), "bmm": ("input", "mat2"), "mv": ("input", "vec")}.get(
            self.name, ("input", "other")
        )

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return shapes["left"][-1]

    def products(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any, weight: Any) -> Products:
        weight_first = self.operands(args, kwargs)["left"] is weight
        if self.name == "inner" and (weight_first or len(weight.shape) != 2):
            raise UncastableError("an inner product of other than rows with a matrix")
        return _any_product(x, weight, weight_first)

    def cast(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        weight: Tensor,
        casting: Casting,
        bias_factor: float,
    ) -> Tensor:
        products = self.products(args, kwargs, x, weight)
        if isinstance(products, MatrixProducts):
            return _of_rows(x, weight if self.name == "inner" else weight.t(), casting)
        return casting(x, weight, products)

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Tensor:
        operands, a = self.operands(args, kwargs), self.product_factor(factors)
        left, right = operands["left"], operands["right"]
        if self.name != "inner" and left.dim() >= 1 and right.dim() == 2:
            return scaled_linear(left, right.t(), None, a, 1.0)
        return function(*args, **kwargs) * a


class GroupedProduct(Matmul):
    """`torch._grouped_mm(tokens, weights, offs=…)`: each group of tokens times its own expert's matrix."""

    name = "_grouped_mm"

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return present(
            left=args[0] if args else kwargs.get("input", kwargs.get("self")),
            right=argument(args, kwargs, 1, "mat2"),
        )

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return shapes["right"][-2]

    def products(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any, weight: Any) -> Products:
        ends = argument(args, kwargs, 2, "offs")
        if len(x.shape) != 2 or len(weight.shape) != 3 or ends is None:
            raise UncastableError("groups of other than rows")
        return GroupedProducts(ends)


class Einsum(Matmul):
    """`torch.einsum(equation, *operands)` in the string form."""

    name = "einsum"

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        tensors = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return {str(position): tensor for position, tensor in enumerate(tensors)}

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return prod(self.contracted(label, shapes, args).values())

    def products(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any, weight: Any) -> Products:
        equation = str(args[0]).replace(" ", "")
        inputs, _, output = equation.partition("->")
        terms = inputs.split(",")
        if "->" not in equation or "." in equation:
            raise UncastableError(f"the equation {equation!r} does not name all indices")
        position = next(int(label) for label, operand in self.operands(args, kwargs).items() if operand is x)
        x_term, weight_term = terms[position], terms[1 - position]
        for term, others in ((x_term, weight_term + output), (weight_term, x_term + output)):
            if len(set(term)) < len(term) or not set(term) <= set(others):
                raise UncastableError(f"the equation {equation!r} repeats an index, or sums over one of a single term")
        return EinsumProducts(x_term, weight_term, output)

    @staticmethod
    def contracted(label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...]) -> dict[str, int]:
        """Sizes of the indices of operand `label` that are summed over."""
        inputs, _, output = str(args[0]).replace(" ", "").partition("->")
        terms = inputs.split(",")
        if not output and "->" not in str(args[0]):
            letters = inputs.replace(",", "").replace(".", "")
            output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
        term, shape = terms[int(label)], shapes[label]
        before, dots, after = term.partition("...")
        sizes = dict(zip(before, shape, strict=False))
        if dots:
            sizes |= dict(zip(reversed(after), reversed(shape), strict=False))
        return {letter: size for letter, size in sizes.items() if letter not in output}


class Bilinear(Matmul):
    """`F.bilinear(x1, x2, weight, bias)`."""

    uncastable = "it has three operands"
    name = "bilinear"
    bias_labels = frozenset({"bias"})

    def operands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = ("input1", "input2", "weight", "bias")
        labels = ("x", "y", "weight", "bias")
        return present(**{label: argument(args, kwargs, i, names[i]) for i, label in enumerate(labels)})

    def fan_in(self, label: str, shapes: Mapping[str, Shape], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return shapes["weight"][-1] * shapes["weight"][-2]

    def scaled(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        factors: Mapping[str, float],
    ) -> Tensor:
        operands = self.operands(args, kwargs)
        y = function(operands["x"], operands["y"], operands["weight"]) * self.product_factor(factors)
        bias = operands.get("bias")
        return y if bias is None else y + bias * factors.get("bias", 1.0)
