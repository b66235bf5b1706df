"""Give each parameter its role, from how it is used in a trace.

role                meaning
------------------  ---------------------------------------------------------------------------------------
embedding           a table looked up by data
position            a position, query or other learned tensor added to activations; a table looked up by constants
token               a learned tensor joined to activations (class, register, mask tokens)
hidden              weight of a matmul from which the loss is reached through another one
readout             weight of a matmul from which the loss is reached without another one, or no loss in this step
bias, norm          as named (`norm` is the gain)
relative_position   added to attention logits
scale               multiplies activations elementwise (LayerScale, logit scale)
other               used in a way the engine has no rule for
unused              no call of the recorded step used it
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_unitscale.engine.analysis.loss_path import kinds_of_use, uses
from lightning_unitscale.engine.analysis.readings import Readings
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.record.trace import Call, Value
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.ops.torch_functions import JOINS, PASSTHROUGH

WEIGHT_ROLES = frozenset({"hidden", "readout", "embedding", "position", "token"})
_TOKEN_CALLS = JOINS | {"where", "setitem", "index_put", "masked_scatter", "copy"}


@dataclass
class Use:
    """One way in which a parameter (or an expression of several) enters the model: its key, and the function.

    A use is what a factor can be attached to at run time; it may stand for many calls. Calls beside the loss are not
    among them, unless there are no others.

    Attributes:
        follows: the use on the loss's path whose factors this one, beside it, must have too.
    """

    key: ParameterKey
    op: str
    role: str
    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    fan_in: int = 1
    follows: Use | None = None

    @property
    def id(self) -> UseId:
        """What rules are keyed by."""
        return UseId(self.key, self.op)

    @property
    def in_function(self) -> bool:
        """Whether a hand-written autograd.Function uses it, whose backward pass would not see a factor at the call."""
        return any(call.in_function for call in self.calls)

    @property
    def is_expression(self) -> bool:
        """Whether what is used is computed from the parameters, so that their own scale is not its scale."""
        return any(value.expression for value in self.values)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names in the key."""
        return self.key.names


def find_uses(structure: Structure, readings: Readings) -> dict[UseId, Use]:
    """Every use of every parameter in the trace but the readings."""
    found: dict[UseId, Use] = {}
    decided: dict[UseId, Use] = {}  # by kind
    for call in structure.trace.calls:
        if structure.decides(call):
            for value, kind in zip(uses(call), kinds_of_use(call), strict=True):
                if (call.index, value) not in readings.ends:
                    decided.setdefault(kind, _note(found, structure, call, value))
    deciding = set(found)
    for call in structure.trace.calls:
        if not structure.decides(call):
            for value, kind in zip(uses(call), kinds_of_use(call), strict=True):
                if UseId(value.key, call.name) not in deciding:
                    use = _note(found, structure, call, value)
                    use.follows = decided.get(kind)
                    use.role = use.role if use.follows is None else use.follows.role
    return found


def _note(found: dict[UseId, Use], structure: Structure, call: Call, value: Value) -> Use:
    role, fan_in = _role(structure, call, value)
    use = found.setdefault(UseId(value.key, call.name), Use(value.key, call.name, role, fan_in=fan_in))
    use.calls.append(call)
    use.values.append(value)
    if use.role != role and use.role == "readout":
        use.role = role  # a layer that is called before other matmuls too is a hidden one
    return use


def primary_use(uses: list[Use]) -> Use:
    """The use that decides how a parameter is stored and trained: as a table if it is one, else where it acts most."""
    order = ("embedding", "position", "token", "hidden", "readout", "norm", "bias", "relative_position", "scale")
    return min(uses, key=lambda use: order.index(use.role) if use.role in order else len(order))


def _role(structure: Structure, call: Call, value: Value) -> tuple[str, int]:
    weights = structure.weights_of(call)
    if value in weights:
        return _matmul_role(structure, call, weights[value])
    if call.name in MATMULS:
        is_input = MATMULS[call.name].operands(call).get("x") is value
        return ("token" if is_input else "bias"), 1
    if call in structure.norms and structure.norms[call].x is value:
        return "token", 1
    if call in structure.norms:
        position = [v for v in call.inputs if v.parameters].index(value)
        return ("norm" if position == 0 else "bias"), 1
    if call in structure.gains:
        return ("norm" if call.name == "mul" else "bias"), 1
    if call.name in ("add", "sub", "rsub"):
        if _is_logit_bias(structure, call, value):
            return "relative_position", 1
        return ("position" if len([n for n in value.shape if n > 1]) > 1 else "bias"), 1
    if call.name in _TOKEN_CALLS or call.name in PASSTHROUGH:
        return "token", 1
    if call.name in ("mul", "div"):
        return "scale", 1
    return "other", 1


def _matmul_role(structure: Structure, call: Call, label: str) -> tuple[str, int]:
    op = MATMULS[call.name]
    if op.is_attention:
        return "token", 1
    if op.is_lookup:
        if call.output in structure.logit_biases:
            return "relative_position", 1
        index = call.argument(0, "input")
        return ("position" if isinstance(index, Value) and index.constant else "embedding"), 1
    labels = list(structure.weights_of(call).values())
    # Of weights that multiply each other the last one is the readout, as in one matmul after the other.
    last = label == labels[-1] or not op.takers(call)
    direct = call.index not in structure.feeds_matmul
    return ("readout" if direct and last else "hidden"), op.fan_ins(call, labels)[label]


def _is_logit_bias(structure: Structure, call: Call, value: Value) -> bool:
    return value in structure.logit_biases or call.output in structure.logit_biases
