"""The torch functions the engine knows, by what they do to the scale of a tensor.

A function is called by its short name: `torch.add`, `Tensor.add`, `+` and `+=` are all `add`;
an attribute such as `.T` is called by its own name, an operator of a library with its namespace: `lib.linear.default`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.overrides
from torch._ops import OpOverload

_ALIASES = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add", "add_": "add",
    "__sub__": "sub", "__isub__": "sub", "sub_": "sub", "subtract": "sub", "__rsub__": "rsub",
    "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul", "mul_": "mul", "multiply": "mul",
    "__truediv__": "div", "__itruediv__": "div", "__div__": "div", "true_divide": "div", "div_": "div",
    "divide": "div", "__idiv__": "div", "__rdiv__": "rdiv", "__rtruediv__": "rdiv",
    "__pow__": "pow", "__ipow__": "pow", "pow_": "pow",
    "__matmul__": "matmul", "__rmatmul__": "rmatmul",
    "__neg__": "neg", "negative": "neg", "__getitem__": "getitem", "__setitem__": "setitem",
    "concat": "cat", "concatenate": "cat", "_safe_softmax": "softmax", "_softmax": "softmax",
    "relu_": "relu", "silu_": "silu", "mish_": "mish", "leaky_relu_": "leaky_relu", "elu_": "elu",
    "masked_fill_": "masked_fill", "index_add_": "index_add", "index_copy_": "index_copy",
    "index_put_": "index_put", "scatter_add_": "scatter_add", "scatter_": "scatter", "copy_": "copy",
    "softmax_": "softmax", "dropout_": "dropout",
    "dsmm": "mm", "spmm": "mm",  # equal to torch.mm, so that a cache can't tell them apart
}  # fmt: skip


@cache
def short_name(function: Callable[..., Any]) -> str:
    """The short name of a torch function as `__torch_function__` receives it."""
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, OpOverload) and function.namespace != "aten":  # of a library, or the user's own
        return f"{function.namespace}.{name}"
    if name in ("__get__", "__set__"):
        owner = getattr(function.__self__, "__name__", "property")  # type: ignore[attr-defined]  # a slot
        return owner if name == "__get__" else f"set_{owner}"
    return _ALIASES.get(name, name)


@cache
def functions_by_name() -> dict[str, tuple[Callable[..., Any], ...]]:
    """Every torch function that a function mode can see, grouped by short name."""
    groups: dict[str, dict[Callable[..., Any], None]] = {}
    for functions in torch.overrides.get_overridable_functions().values():
        for function in functions:
            groups.setdefault(short_name(function), {})[function] = None
    for namespace in (torch, torch._VF, torch._C._nn, torch.nn.functional, torch.Tensor):  # torch._weight_norm, lstm
        for name in dir(namespace):
            function = getattr(namespace, name)
            if callable(function) and not isinstance(function, type) and not name.startswith("__"):
                groups.setdefault(short_name(function), {})[function] = None
    return {name: tuple(functions) for name, functions in groups.items()}


def is_in_place(function: Callable[..., Any]) -> bool:
    """Whether a torch function changes its first argument, by its name: `add_`, `__iadd__`."""
    name = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


# One tensor in, the same numbers out (perhaps fewer, more, or elsewhere): scale and linearity pass unchanged.
VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze",
    "expand", "expand_as", "repeat", "repeat_interleave", "tile", "chunk", "split", "split_with_sizes",
    "tensor_split", "unbind", "getitem", "narrow", "select", "t", "T", "mT", "H", "mH", "movedim", "moveaxis",
    "swapaxes", "swapdims", "index_select", "gather", "take_along_dim", "roll", "flip", "view_as", "reshape_as",
    "unfold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "adjoint", "broadcast_to", "ravel",
    "swapaxes_", "transpose_", "squeeze_", "unsqueeze_", "t_", "diagonal", "tril", "triu", "masked_select", "rot90",
    "view_as_real", "view_as_complex", "real", "imag", "as_strided", "fold", "unsafe_chunk", "unsafe_split",
})  # fmt: skip
CASTS = frozenset({
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "detach", "detach_", "alias", "cpu",
    "cuda", "data", "requires_grad_", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
    "alpha_dropout", "native_dropout", "pad", "constant_pad_nd", "nan_to_num", "resolve_conj", "resolve_neg",
})  # fmt: skip
PASSTHROUGH = VIEWS | CASTS

# Which numbers of their first input they take, another one says.
PICKS = frozenset({"getitem", "index_select", "gather", "take_along_dim", "masked_select"})

# Degree one in their tensor input, though not the same numbers: a constant passes through them.
HOMOGENEOUS = frozenset({
    "neg", "sum", "mean", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "cumsum", "interpolate", "upsample",
    "_max_pool1d", "_max_pool2d", "_max_pool3d", "boolean_dispatch", "fn", "max_pool2d_with_indices",
})  # fmt: skip
JOINS = frozenset({"cat", "stack", "hstack", "vstack", "dstack"})
ACCUMULATES = frozenset({
    "index_add", "scatter_add", "index_copy", "index_put", "setitem", "scatter", "slice_scatter",
    "copy",
})  # fmt: skip

# They change their first argument and return nothing.
RETURN_NOTHING = frozenset({"setitem", "set_data"})

# Their backward pass reads their input alone, so multiplying their output in place spares a tensor of its size. Others
# (relu, tanh) have saved the output, and autograd would refuse.
OUTPUT_IS_FREE = frozenset({"silu", "gelu", "mish"})

# What they return is data, though no tensor went in.
RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "poisson", "multinomial", "rand_like", "randn_like",
    "randint_like", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_",
})  # fmt: skip

# Of their inputs they use shape, dtype and device alone.
SHAPE_ONLY = frozenset({
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "empty_like", "zeros_like", "ones_like",
    "full_like", "rand_like", "randn_like", "randint_like",
})  # fmt: skip

# Of their second input they use shape or dtype alone.
LIKE_SECOND = frozenset({"view_as", "expand_as", "reshape_as", "type_as"})

LAYER_NORMS = frozenset({"layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"})  # weights never pass these
NORMS = LAYER_NORMS | {
    "group_norm", "batch_norm", "instance_norm", "local_response_norm", "normalize", "native_batch_norm",
    "native_group_norm",
}  # fmt: skip
NORMALIZERS = frozenset({"rsqrt", "sqrt", "norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "std", "var"})
SOFTMAX = frozenset({"softmax"})
# What takes logits: a constant that is added to all of a position's changes nothing.
TAKES_LOGITS = SOFTMAX | {"log_softmax", "cross_entropy", "logsumexp"}
# What takes each output by itself, as the log of odds.
TAKES_ODDS = frozenset({"sigmoid", "logsigmoid", "binary_cross_entropy_with_logits"})

# Elementwise functions with a known second moment for unit-normal input. Softmax and sigmoid are not among
# them: their outputs are probabilities or gates, and a loss such as BCE raises on values above 1.
ACTIVATIONS = frozenset({
    "gelu", "silu", "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "mish", "hardswish", "tanh",
    "hardtanh", "softplus", "softsign", "glu", "hardshrink", "softshrink", "tanhshrink",
})  # fmt: skip
ELEMENTWISE = frozenset({
    "add", "sub", "rsub", "mul", "div", "rdiv", "pow", "neg", "tanh", "sigmoid", "exp", "erf", "sqrt", "square",
    "abs", "relu", "clamp", "minimum", "maximum", "log1p", "softplus", "sin", "cos", "clamp_min", "clamp_max",
}) | ACTIVATIONS - {"glu"}  # fmt: skip
