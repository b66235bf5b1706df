"""Root-mean-square of weights, activations and gradients of every layer, from one forward and backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerRMS:
    """What one layer carries; None where it has no such tensor."""

    layer: str
    weight: float | None
    activation: float | None
    activation_gradient: float | None
    weight_gradient: float | None


class _MeanSquare:
    """Over all elements of all tensors given to it, in float64."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, tensor: Tensor) -> None:
        self.total += tensor.detach().double().square().sum().item()
        self.count += tensor.numel()

    @property
    def root(self) -> float | None:
        return (self.total / self.count) ** 0.5 if self.count else None


def measure_rms(module: nn.Module, loss_of: Callable[[Any], Tensor]) -> list[LayerRMS]:
    """Runs `loss_of(module)` and its backward pass; returns the layers in the order of their first call.

    A layer is a module without submodules that returns a tensor. Its weights are all parameters it owns. A layer
    called several times has the RMS over its calls. Gradients are cleared before and after.
    """
    activations: dict[str, _MeanSquare] = defaultdict(_MeanSquare)
    gradients: dict[str, _MeanSquare] = defaultdict(_MeanSquare)
    layers = {name: layer for name, layer in module.named_modules() if not list(layer.children())}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def observe(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                activations[name].add(output)
                if output.requires_grad:
                    output.register_hook(gradients[name].add)

        return observe

    module.zero_grad()
    with _hooked({layer: hook(name) for name, layer in layers.items()}):
        loss_of(module).backward()
    rows = [
        LayerRMS(
            layer=name,
            weight=_rms(list(layers[name].parameters())),
            activation=activation.root,
            activation_gradient=gradients[name].root if name in gradients else None,
            weight_gradient=_rms([p.grad for p in layers[name].parameters() if p.grad is not None]),
        )
        for name, activation in activations.items()
    ]
    module.zero_grad()
    return rows


def _rms(tensors: list[Any]) -> float | None:
    mean_square = _MeanSquare()
    for tensor in tensors:
        mean_square.add(tensor)
    return mean_square.root


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[[nn.Module, Any, Any], None]]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
