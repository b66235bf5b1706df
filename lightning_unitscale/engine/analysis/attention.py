"""Attention: products of queries and keys, found from the softmax upward, and of probabilities and values below it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_unitscale.engine.analysis.graph import Graph, number_of
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import MATMULS, is_attention
from lightning_unitscale.ops.torch_functions import PASSTHROUGH, SOFTMAX

_LOGITS_PASS = PASSTHROUGH | {"masked_fill", "where", "clamp", "tanh", "maximum", "minimum"}
_PROBABILITIES_PASS = PASSTHROUGH | {"mul", "div", "masked_fill", "where"}
_BIAS_PASS = PASSTHROUGH | {"add", "sub", "mul", "where", "masked_fill", "sum", "sigmoid", "neg", "log"}


@dataclass(frozen=True)
class Attention:
    """One product of queries and keys.

    Attributes:
        call: `scaled_dot_product_attention`, or the matmul whose output reaches a softmax.
        model_constant: the model's own between the projections and the softmax.
        head_dim: number of terms in one query-key product.
    """

    call: Call
    model_constant: float
    head_dim: int
    query: Value
    key: Value


@dataclass
class AttentionLogits:
    """Attention logits: their products (with the model's constants after them), softmaxes, additions and biases."""

    products: dict[int, tuple[Call, float]] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    additions: set[int] = field(default_factory=set)
    biases: set[Value] = field(default_factory=set)


def find_logits(graph: Graph) -> AttentionLogits:
    """The attention logits of a step."""
    found = AttentionLogits()
    for call in graph.calls:
        if is_attention(call.name):
            op = MATMULS[call.name]
            scale, bias = number_of(op.logit_scale(call)), op.logit_bias(call)
            found.products[call.index] = (call, contraction(call) ** -0.5 if scale is None else abs(scale))
            found.ends.add(call.index)
            if isinstance(bias, Value):
                found.biases |= _ancestry(bias)
        elif call.name in SOFTMAX:
            above = _product_above(graph, call.inputs[0], found)
            if above is not None:
                found.products.setdefault(above[0].index, above)
                found.ends.add(call.index)
    return found


def _product_above(graph: Graph, value: Value, found: AttentionLogits) -> tuple[Call, float] | None:
    """The product of two activations above a softmax, with the constants on the way."""
    constant, depth = 1.0, 0
    while value.producer is not None and depth < 32:
        call = value.producer
        depth += 1
        if call.name in MATMULS:
            return (call, constant) if _is_query_key_product(graph, call) else None
        if call.name in ("add", "sub"):
            terms = [v for v in call.inputs if v.is_float]
            leading = [v for v in terms if _product_above(graph, v, AttentionLogits()) is not None]
            if len(leading) != 1:
                return None
            found.additions.add(call.index)
            for term in terms:
                if term is not leading[0]:
                    found.biases |= _ancestry(term)
            value = leading[0]
        elif call.name in ("mul", "div"):
            above = graph.product_inputs(call)
            if above is None or len(above) != 1:
                return None
            value, constant = above[0].value, constant * above[0].model_constant
        elif call.name in _LOGITS_PASS:
            moving = [v for v in call.inputs if v.is_float and not v.constant and v.requires_grad]
            if not moving:
                return None
            value = moving[0]
        else:
            return None
    return None


def _is_query_key_product(graph: Graph, call: Call) -> bool:
    op = MATMULS[call.name]
    if graph.is_site(call) or not op.is_batched or len(op.multiplicands(call)) != 2:
        return False
    return all(isinstance(v, Value) and v.is_float and not v.constant for v in op.query_and_key(call))


def attention_products(graph: Graph) -> list[Call]:
    """The products of two activations that attention consists of, whatever is added to its logits in between."""
    found: dict[int, Call] = {}
    for call in graph.calls:
        if is_attention(call.name) and not graph.is_site(call):
            found[call.index] = call
        elif call.name in SOFTMAX and (logits := _products_above(graph, call.inputs[0])):
            found |= {product.index: product for product in (*logits, *_products_below(graph, call.output))}
    return list(found.values())


def _products_above(graph: Graph, logits: Value) -> list[Call]:
    found, pending, seen = [], [logits], {logits}
    while pending:
        call = pending.pop().producer
        if call is None or call.name in MATMULS:
            if call is not None and _is_query_key_product(graph, call):
                found.append(call)
        elif call.name in _LOGITS_PASS or call.name in ("add", "sub", "mul", "div"):
            new = [value for value in dict.fromkeys(call.inputs) if value.is_float and value not in seen]
            seen.update(new)
            pending += new
    return found


def _products_below(graph: Graph, probabilities: Value) -> list[Call]:
    found, pending, seen = [], [probabilities], {probabilities}
    while pending:
        for call in graph.consumers(pending.pop()):
            if call.name in MATMULS:
                if not graph.is_site(call):
                    found.append(call)
            elif call.name in _PROBABILITIES_PASS:
                new = [value for value in call.outputs if value not in seen]
                seen.update(new)
                pending += new
    return found


def contraction(call: Call) -> int:
    """Number of terms in one element of a product."""
    op = MATMULS[call.name]
    return max(1, op.fan_in(call, next(iter(op.operands(call)))))


def _ancestry(value: Value) -> set[Value]:
    """What a logit bias is made of, up to the table or product it comes from."""
    found: set[Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        if current.producer is not None and current.producer.name in _BIAS_PASS:
            pending.extend(current.producer.inputs)
    return found
