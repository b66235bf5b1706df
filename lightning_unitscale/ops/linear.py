"""Products of matrices: linear, addmm, matmul and their relatives, grouped products of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_unitscale.errors import UncastableError
from lightning_unitscale.ops.call import FunctionCall
from lightning_unitscale.ops.matmul import Casting, Matmul, add_bias
from lightning_unitscale.ops.products import BatchedProducts, GroupedProducts, MatrixProducts, Products
from lightning_unitscale.ops.scaled_product import scaled_linear


class Linear(Matmul):
    """`F.linear(x, weight, bias)`."""

    def fan_in(self, call: FunctionCall, label: str) -> int:
        return int(self.operands(call)["weight"].shape[-1])

    def products(self, call: FunctionCall, x: Any, weight: Any) -> Products:
        if len(weight.shape) != 2:
            raise UncastableError("the weight is a vector")
        return MatrixProducts()

    def cast(self, call: FunctionCall, x: Tensor, weight: Tensor, casting: Casting, bias_factor: float) -> Tensor:
        return add_bias(_of_rows(x, weight, casting), call.argument(2, "bias"), bias_factor)

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        operands, a = self.operands(call), self.product_factor(factors)
        if operands["weight"].dim() == 2:
            return scaled_linear(operands["x"], operands["weight"], operands.get("bias"), a, factors.get("bias", 1.0))
        return call.run() * a  # a 1-D weight has no bias


class TwoSided(Matmul):
    """A product of "left" and "right", either of which may be the weight."""

    output_dim = 1  # of a weight on the right

    def fan_in(self, call: FunctionCall, label: str) -> int:
        return int(self.operands(call)["left"].shape[-1])

    def query_and_key(self, call: FunctionCall) -> tuple[Any, Any]:
        operands = self.operands(call)
        return operands["left"], operands["right"]

    def products(self, call: FunctionCall, x: Any, weight: Any) -> Products:
        weight_first = self.operands(call)["left"] is weight
        if not weight_first and len(weight.shape) == 2:
            return MatrixProducts()
        if min(len(x.shape), len(weight.shape)) < 2:
            raise UncastableError("one operand is a vector")
        return BatchedProducts(weight_first)

    def cast(self, call: FunctionCall, x: Tensor, weight: Tensor, casting: Casting, bias_factor: float) -> Tensor:
        products = self.products(call, x, weight)
        if isinstance(products, MatrixProducts):
            return _of_rows(x, weight.t(), casting)
        return casting(x, weight, products)


class Product(TwoSided):
    """`matmul`, `mm`, `bmm` and the like: no bias."""

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        operands, a = self.operands(call), self.product_factor(factors)
        left, right = operands["left"], operands["right"]
        if left.dim() >= 1 and right.dim() == 2:
            return scaled_linear(left, right.t(), None, a, 1.0)
        return call.run() * a


class InnerProduct(TwoSided):
    """`torch.inner(left, right)`: over the last dimension of both."""

    output_dim = 0

    def products(self, call: FunctionCall, x: Any, weight: Any) -> Products:
        if self.operands(call)["left"] is weight or len(weight.shape) != 2:
            raise UncastableError("an inner product of other than rows with a matrix")
        return MatrixProducts()

    def cast(self, call: FunctionCall, x: Tensor, weight: Tensor, casting: Casting, bias_factor: float) -> Tensor:
        self.products(call, x, weight)  # refuses other products
        return _of_rows(x, weight, casting)


class AddMm(TwoSided):
    """`addmm(bias, left, right, beta=1, alpha=1)`, as in GPT-2's Conv1D with its weight transposed, and `baddbmm`."""

    def cast(self, call: FunctionCall, x: Tensor, weight: Tensor, casting: Casting, bias_factor: float) -> Tensor:
        y = super().cast(call, x, weight, casting, bias_factor)
        alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
        return add_bias(y if alpha == 1 else y * alpha, call.argument(0, "input"), bias_factor * beta)

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        kwargs = dict(call.kwargs)
        kwargs["alpha"] = kwargs.get("alpha", 1) * self.product_factor(factors)
        kwargs["beta"] = kwargs.get("beta", 1) * factors.get("bias", 1.0)
        return call.function(*call.args, **kwargs)

    def scaled_logits(self, call: FunctionCall, a: float, query: int | None) -> Any:
        return self.scaled(call, {"left": a})


class GroupedProduct(TwoSided):
    """`torch._grouped_mm(tokens, weights, offs=…)`: each group of tokens times its own expert's matrix."""

    def products(self, call: FunctionCall, x: Any, weight: Any) -> Products:
        ends = call.argument(2, "offs")
        if len(x.shape) != 2 or len(weight.shape) != 3 or ends is None:
            raise UncastableError("groups of other than rows")
        return GroupedProducts(ends)


class Bilinear(Matmul):
    """`F.bilinear(x1, x2, weight, bias)`."""

    uncastable = "it has three operands"

    def fan_in(self, call: FunctionCall, label: str) -> int:
        _, left, right = self.operands(call)["weight"].shape
        return int(left * right)

    def fan_ins(self, call: FunctionCall, weights: Sequence[str]) -> dict[str, int]:
        """All terms are the weight's; an input that is a weight too sums over none of its own."""
        return {label: self.fan_in(call, label) if label == weights[-1] else 1 for label in weights}

    def scaled(self, call: FunctionCall, factors: Mapping[str, float]) -> Any:
        operands = self.operands(call)
        y = call.function(operands["x"], operands["y"], operands["weight"]) * self.product_factor(factors)
        bias = operands.get("bias")
        return y if bias is None else y + bias * factors.get("bias", 1.0)


def _of_rows(x: Tensor, weight: Tensor, casting: Casting) -> Tensor:
    """`x Wᵀ` for x: (*, in), W: (out, in)."""
    return casting(x.reshape(-1, x.shape[-1]), weight, MatrixProducts()).reshape(*x.shape[:-1], weight.shape[0])
