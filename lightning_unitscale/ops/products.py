"""Bilinear products and their adjoints, on operands in narrow formats.

    forward      x ∘ w
    grad_x       the adjoint in x:  ⟨g, x ∘ w⟩ = ⟨grad_x(g, w), x⟩
    grad_weight  the adjoint in w:  ⟨g, x ∘ w⟩ = ⟨grad_weight(g, x), w⟩

Products of matrices run on tensor cores where there are any for the format (`multiply`), and so do those of groups of
rows (`multiply_groups`), partly. For the others torch has no kernels; they get the same values, upcast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unitscale.ops.multiply import Cast, multiply, upcast
from lightning_unitscale.ops.multiply_groups import multiplies_groups, multiply_groups


class Products(ABC):
    """A bilinear product and its two adjoints; results have the given dtype."""

    @property
    def upcast(self) -> str:
        """Why operands in FP8 are upcast for it, whatever the device; empty where tensor cores make all of it."""
        return ""

    @property
    def no_blocks(self) -> str:
        """Why its operands are in no format whose blocks have scales of their own; empty if they can be."""
        return ""

    @abstractmethod
    def summed_over(self, operand: str) -> tuple[int, int]:
        """The dimension of "x", "weight" or "gradient" along which the first and the second of its products sum.

        Of x those are `forward` and `grad_weight`, of the weight `forward` and `grad_x`, of the gradient `grad_x` and
        `grad_weight`. Where several are summed over, the one along which blocks lie.
        """

    @abstractmethod
    def forward(self, x: Cast, weight: Cast, dtype: torch.dtype) -> Tensor:
        """`x ∘ weight`."""

    @abstractmethod
    def grad_x(self, gradient: Cast, weight: Cast, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The gradient of x, which has this shape."""

    @abstractmethod
    def grad_weight(self, gradient: Cast, x: Cast, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The gradient of the weight, which has this shape."""


@dataclass(frozen=True)
class MatrixProducts(Products):
    """`x wᵀ`; x: (n, in), w: (out, in)."""

    def summed_over(self, operand: str) -> tuple[int, int]:
        return 1, 0

    def forward(self, x: Cast, weight: Cast, dtype: torch.dtype) -> Tensor:
        return multiply(x, weight.t(), dtype, fast=True)

    def grad_x(self, gradient: Cast, weight: Cast, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return multiply(gradient, weight, dtype)

    def grad_weight(self, gradient: Cast, x: Cast, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return multiply(gradient.t(), x, dtype)


class UpcastProducts(Products):
    """A product known by its three forms on ordinary tensors."""

    @property
    def upcast(self) -> str:
        return "torch has no such product of FP8 operands"

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x ∘ weight`."""

    @abstractmethod
    def adjoint_x(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Of the product in x."""

    @abstractmethod
    def adjoint_weight(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """Of the product in the weight."""

    def forward(self, x: Cast, weight: Cast, dtype: torch.dtype) -> Tensor:
        y = self.product(upcast(x.values, dtype), upcast(weight.values, dtype))
        return (y * (x.inverse * weight.inverse)).to(dtype)

    def grad_x(self, gradient: Cast, weight: Cast, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        gx = self.adjoint_x(upcast(gradient.values, dtype), upcast(weight.values, dtype), shape)
        return (gx * (gradient.inverse * weight.inverse)).to(dtype)

    def grad_weight(self, gradient: Cast, x: Cast, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        gw = self.adjoint_weight(upcast(gradient.values, dtype), upcast(x.values, dtype), shape)
        return (gw * (gradient.inverse * x.inverse)).to(dtype)


@dataclass(frozen=True)
class BatchedProducts(UpcastProducts):
    """`x @ w`, or `w @ x`, of at least two dimensions each, with the batch dimensions broadcast."""

    weight_first: bool

    def summed_over(self, operand: str) -> tuple[int, int]:
        left_first = operand == "weight" if self.weight_first else operand != "weight"
        return (-1, -2) if left_first else (-2, -1)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight @ x if self.weight_first else x @ weight

    def adjoint_x(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        whole = weight.mT @ gradient if self.weight_first else gradient @ weight.mT
        return whole.sum_to_size(shape)

    def adjoint_weight(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        whole = gradient @ x.mT if self.weight_first else x.mT @ gradient
        return whole.sum_to_size(shape)


@dataclass(frozen=True)
class GroupedProducts(UpcastProducts):
    """Each group of rows of x: (n, in) times its own matrix of w: (groups, in, out); `ends` of the groups in n."""

    ends: Tensor

    @property
    def upcast(self) -> str:
        return "its gradients: torch multiplies groups in e4m3 alone, and sums over none of any size"

    def summed_over(self, operand: str) -> tuple[int, int]:
        return (1, 2) if operand == "weight" else (1, 0)

    def forward(self, x: Cast, weight: Cast, dtype: torch.dtype) -> Tensor:
        if multiplies_groups(x, weight, dtype):
            return multiply_groups(x, weight, self.ends, fast=True)
        return super().forward(x, weight, dtype)

    def grad_x(self, gradient: Cast, weight: Cast, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        transposed = Cast(weight.values.mT, weight.inverse, torch.Size((weight.shape[0], *weight.shape[:0:-1])))
        if multiplies_groups(gradient, transposed, dtype):
            return multiply_groups(gradient, transposed, self.ends)
        return super().grad_x(gradient, weight, shape, dtype)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(x, weight, offs=self.ends)

    def adjoint_x(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return torch._grouped_mm(gradient, weight.mT, offs=self.ends)

    def adjoint_weight(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        return torch._grouped_mm(x.t(), gradient, offs=self.ends)


@dataclass(frozen=True)
class EinsumProducts(UpcastProducts):
    """An einsum of two operands, in which no index is repeated within a term or is in one term only."""

    x: str
    weight: str
    output: str

    @property
    def no_blocks(self) -> str:
        outer = not all(self._summed())
        return "one of its three products sums over nothing, so blocks have nothing to lie along" if outer else ""

    def summed_over(self, operand: str) -> tuple[int, int]:
        forward, grad_x, grad_weight = self._summed()
        terms, summed = {
            "x": (self.x, (forward, grad_weight)),
            "weight": (self.weight, (forward, grad_x)),
            "gradient": (self.output, (grad_x, grad_weight)),
        }[operand]
        first, second = (max(terms.index(index) for index in each) for each in summed)
        return first, second

    def _summed(self) -> tuple[set[str], set[str], set[str]]:
        """The indices that the three products sum over."""
        x, weight, output = set(self.x), set(self.weight), set(self.output)
        return x & weight - output, output & weight - x, output & x - weight

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum(f"{self.x},{self.weight}->{self.output}", x, weight)

    def adjoint_x(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return torch.einsum(f"{self.output},{self.weight}->{self.x}", gradient, weight)

    def adjoint_weight(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        return torch.einsum(f"{self.output},{self.x}->{self.weight}", gradient, x)


@dataclass(frozen=True)
class ConvolutionProducts(UpcastProducts):
    """A convolution, or a transposed one, without its bias; one number per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    @property
    def is_of_pixels(self) -> bool:
        """Whether each pixel of the output is made of one of the input alone."""
        ones = {*self.kernel, *self.stride, self.groups} == {1}
        return ones and not self.transposed and not any(self.padding)

    @property
    def upcast(self) -> str:
        if self.is_of_pixels:
            return "where its input is not channels_last: bringing pixels into rows costs what FP8 saves"
        return "torch has no convolution of FP8 operands, and a matrix of all windows costs more than FP8 saves"

    @property
    def no_blocks(self) -> str:
        return "each group of its channels would need blocks of its own" if self.groups > 1 else ""

    def summed_over(self, operand: str) -> tuple[int, int]:
        if operand == "weight":  # channels that come in, then those that go out
            return (0, 1) if self.transposed else (1, 0)
        return 1, -1  # channels, then pixels of a row

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.convolution(
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def adjoint_x(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return self._adjoint(gradient, gradient.new_empty(1).expand(shape), weight, 0)

    def adjoint_weight(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        return self._adjoint(gradient, x, gradient.new_empty(1).expand(shape), 1)

    def _adjoint(self, gradient: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        both: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            mask,
        )
        return both[which]
