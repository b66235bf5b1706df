"""The plan: what unit scaling does to a model, as plain data.

For each parameter, F = multiplier · U is the tensor the model's function sees, U having RMS 1 (or the parameter's
own initial value where its role has no scale), and S = stored · U the tensor that is kept. Whatever part of the
multiplier is not stored is explicit in the forward pass, as a factor of the site where the parameter is used.
Moving a constant between the two changes neither the function nor, with the matching optimizer constants of
`step_scales`, its training: the abc-symmetry (u-μP, arXiv 2407.17465, section 2.1).
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

from torch import nn

from lightning_unitscale.engine.plan.factors import Factor
from lightning_unitscale.engine.plan.known_parameter import KnownParameter
from lightning_unitscale.engine.plan.parameter_plan import ParameterPlan
from lightning_unitscale.engine.plan.site import READING, Site
from lightning_unitscale.engine.plan.step_scales import FAMILIES, StepScale, check_has_rates
from lightning_unitscale.engine.record.deep_copies import shared_by_copies
from lightning_unitscale.engine.record.keys import ParameterKey, UseId
from lightning_unitscale.engine.record.places import Frame
from lightning_unitscale.engine.record.spread_tensors import is_flat_piece, plain_name
from lightning_unitscale.errors import UnitScalingError

PLAN_VERSION = 2
# Of a prepared model. Also the plan's key in state dicts: torch.distributed.checkpoint looks keys up as attributes.
ATTRIBUTE = "unit_scaling_plan"
_BOUND: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that a plan was put in force on


class FramePlan(NamedTuple):
    """A frame of the model that has to be told apart from others while the model runs.

    Attributes:
        module, method: the frame.
        keys: of the parameters, or of what is made of them, that its code hands to torch functions.
    """

    module: str
    method: str
    keys: list[ParameterKey]

    @property
    def frame(self) -> Frame:
        """The frame."""
        return Frame(self.module, self.method)


@shared_by_copies
@dataclass(repr=False)
class Plan:
    """What unit scaling does to one model.

    Attributes:
        parameters: by name.
        sites: every matmul-like call and every other place with a factor.
        frames: where parameters, or what is made of them, are handed to torch functions, and parameter-free sites are.
        followed: the ways in which functions made weights out of parameters alone (views, casts, weight norm), see
            `engine.record.keys.way_of`; plans of earlier versions have all ways here, some the functions' short names.
        followed_with_others: of each parameter, or what is made of some, the ways in which it made a weight together
            with other tensors (noise, masks); with those an activation may go in, so that none holds for all.
        storage: "folded" | "unit".
        lr_units: "standard" | "umup".
        changes_training: False where the scheme leaves weights, function and learning rates alone.
        keeps_function: whether the factors of the scheme undo each other, and the function is the untouched model's.
        notes: what else the reader of the plan should know.
        measured_at: the steps at which operand scales were measured.
        gradient_cosine: for each parameter, between its gradients with and without casts, on the first batch.
        families: of optimizers that the scheme has learning rates for; others need `lr_units="standard"`.
        largest_eta: with lr_units="standard", the η beyond which the scheme has no use for a rate under Adam.
        loss_scale: what backward passes start from where gradients travel in FP16; None elsewhere.
    """

    scheme: str
    storage: str
    lr_units: str
    parameters: dict[str, ParameterPlan] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    frames: list[FramePlan] = field(default_factory=list)
    followed: list[str] = field(default_factory=list)
    followed_with_others: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measured_at: list[int] = field(default_factory=list)
    gradient_cosine: dict[str, float] = field(default_factory=dict)
    loss_scale: float | None = None
    changes_training: bool = True
    keeps_function: bool = False
    families: list[str] = field(default_factory=lambda: list(FAMILIES))
    largest_eta: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        self._module: weakref.ref[nn.Module] | None = None
        self._owners: dict[str, tuple[weakref.ref[nn.Module], KnownParameter]] = {}
        self.schedule_followed = False  # whether anything asks which steps are to be measured
        self._text: tuple[Any, str] | None = None  # what was true of the plan when the text was made, and the text

    # --- what it says -----------------------------------------------------------------------------------------

    @property
    def roles(self) -> dict[str, str]:
        """Role by parameter name."""
        return {name: parameter.role for name, parameter in self.parameters.items()}

    @property
    def lr_multipliers(self) -> dict[str, float]:
        """Learning-rate multiplier by parameter name, for Adam-like optimizers."""
        return {name: scale.lr for name, scale in self.step_scales("adam", decoupled_decay=True).items()}

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of every parameter and site that is left alone."""
        parameters = [(p.name, p.reason) for p in self.parameters.values() if p.reason]
        return parameters + [(site.name, site.reason) for site in self.sites if site.reason and site.multiplier == 1.0]

    @property
    def divided_gradients(self) -> set[str]:
        """The parameters whose gradients the optimizer sees divided by their own scale: γ = max|gradient| / √d."""
        return {parameter.name for parameter in self.parameters.values() if parameter.divided_gradient}

    @property
    def explicit_sites(self) -> list[Site]:
        """The sites that change the forward pass."""
        return [site for site in self.sites if any(factor != 1.0 for factor in site.factors.values())]

    @property
    def cast_sites(self) -> list[Site]:
        """The sites whose operands are cast to a narrow format."""
        return [site for site in self.sites if site.format is not None]

    @property
    def unfollowed_schedule(self) -> list[int]:
        """The steps at which operand scales are to be measured again, if nothing asks whether they are due."""
        schedule: list[int] = self.options.get("recalibrate", [])
        return schedule if self.cast_sites and not self.schedule_followed else []

    @property
    def is_plain(self) -> bool:
        """Whether the stored weights in the plain module already are the function; penalties on them are none of it."""
        return all(site.role == READING for site in self.explicit_sites)

    def frame_plan(self, frame: Frame) -> FramePlan:
        """The plan of a frame, a new one without keys where there was none."""
        found = next((known for known in self.frames if known.frame == frame), None)
        if found is None:
            found = FramePlan(*frame, [])
            self.frames.append(found)
        return found

    def step_scales(self, family: str, *, decoupled_decay: bool) -> dict[str, StepScale]:
        """Factors on each parameter's learning rate, weight decay and eps; see `engine.plan.step_scales`.

        Args:
            family: "adam" | "sgd" | "muon" | …, see `optim.families`.
            decoupled_decay: whether weight decay acts beside the gradient (AdamW) or inside it.

        Raises:
            UnitScalingError: the scheme has no learning rates of its own for the family.
        """
        check_has_rates(self.scheme, self.families, family, self.lr_units)
        rule = FAMILIES[family]
        return {
            name: rule.step_scale(parameter, self.lr_units, decoupled_decay=decoupled_decay)
            for name, parameter in self.parameters.items()
        }

    def summary(self, rows: int | None = None, width: int | None = None) -> str:
        """The plan as a table; layers that repeat are one row with their count.

        Args:
            rows: at most so many rows (default: all).
            width: at most so many columns of text, where names allow it (default: as many as it needs).
        """
        from lightning_unitscale.engine.plan.summary import summarize

        return summarize(self, rows, width)

    def explain(self, name: str) -> str:
        """Why a parameter or a site has the numbers it has: every factor with its cause and source.

        Args:
            name: of a parameter, as in `plan.parameters`, of a site, as in the first column of `summary()`, or of a
                module, for all in it.

        Raises:
            UnitScalingError: there is no such name; the message has near ones.
        """
        from lightning_unitscale.engine.plan.explain import explain

        return explain(self, name)

    def to_frame(self) -> Any:
        """One row a parameter and site: a `pandas.DataFrame` if pandas is installed, else a list of dicts."""
        from lightning_unitscale.engine.plan.rows import frame

        return frame(self)

    def _repr_html_(self) -> str:
        from lightning_unitscale.engine.plan.rows import html_table

        return html_table(self)

    def __repr__(self) -> str:
        from lightning_unitscale.engine.plan.summary import headline

        return f"<Plan: {headline(self)}>"

    # --- plain containers -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only: what a checkpoint holds."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def to_json(self) -> str:
        """`to_dict` as text, made anew only when training has changed something: every `state_dict()` asks for it."""
        filled = [(site.format, len(site.rms_after), len(site.operand_scales)) for site in self.sites]
        limits = [parameter.eta_limit for parameter in self.parameters.values()]
        now = (tuple(self.measured_at), len(self.gradient_cosine), self.loss_scale, filled, limits)
        if self._text is None or self._text[0] != now:
            self._text = now, json.dumps(self.to_dict())
        return self._text[1]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            UnitScalingError: the data is not a plan, or one of another version.
        """
        if not isinstance(data, Mapping) or "version" not in data or "parameters" not in data:
            raise UnitScalingError("this is not a unit-scaling plan; pass what Plan.to_dict() returned.")
        if data["version"] != PLAN_VERSION:
            raise UnitScalingError(
                f"the plan has version {data['version']}, this package reads version {PLAN_VERSION}; "
                "go on with the lightning-unitscale that wrote it (0.1 for version 1), or make the model plain there: "
                "remove_unit_scaling() or `unitscale export`."
            )
        data = deepcopy(dict(data))
        known = {f.name for f in fields(cls)} - {"parameters", "sites", "frames"}
        try:
            plan = cls(**{name: value for name, value in data.items() if name in known})
            plan.parameters = {name: ParameterPlan(**_with_causes(v)) for name, v in data["parameters"].items()}
            plan.sites = [Site(**_with_causes(value)) for value in data["sites"]]
            for site in plan.sites:
                site.params = list(map(ParameterKey, site.params))
                site.fold_into = [UseId(key, op) for key, op in site.fold_into]
            if "followed_with_others" not in data:  # a plan that did not count arrays of indices
                plan.followed += [f"{way}+1" for way in plan.followed if way.count("+") == 2]
            frames = data["frames"]
            plan.frames = [FramePlan(where, method, [*map(ParameterKey, keys)]) for where, method, keys in frames]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnitScalingError(
                f"this is not a whole unit-scaling plan ({error}); pass what Plan.to_dict() returned."
            ) from None
        return plan

    # --- the model it is for ----------------------------------------------------------------------------------

    def bind(self, module: nn.Module) -> None:
        """Remember the model the plan is in force on (weakly: a plan never keeps a model alive)."""
        self._module = weakref.ref(module)
        is_whole = "_modules" in module.__dict__  # which a model that is being copied is not yet
        owned = _owned(module) if is_whole else ()
        self._owners = {name: (weakref.ref(owner), KnownParameter(p)) for name, owner, p in owned}
        _BOUND.add(module)

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            UnitScalingError: the plan is not in force on a model that still exists.
        """
        module = self._module() if self._module is not None else None
        if module is None:
            raise UnitScalingError("the plan is not in force on any model; apply it with unit_scale() first.")
        return module

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by the names used in the plan.

        Raises:
            UnitScalingError: as for `model`.
        """
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.parameters if name in named}

    def differences(self, module: nn.Module) -> dict[str, list[str]]:
        """In what the model is not the one that the plan was made for; empty lists where it is."""
        modules = {plain_name(name) for name, _ in module.named_modules()}
        known = self._owners if self._module is not None and self._module() is module else {}
        now = [(name, known[name], (owner, p)) for name, owner, p in _owned(module) if name in known]
        shapes = {
            plain_name(name): None if is_flat_piece(parameter) else list(parameter.shape)
            for name, parameter in module.named_parameters()
        }
        return {
            "missing": sorted(set(self.parameters) - set(shapes)),
            "added": sorted(set(shapes) - set(self.parameters)),
            "other shape": sorted(
                f"{name} {parameter.shape} -> {shapes[name]}"
                for name, parameter in self.parameters.items()
                if name in shapes and shapes[name] not in (None, parameter.shape)
            ),
            # A wrapped or sharded module keeps one of both: the module, or its parameters.
            "replaced": sorted(name for name, (a, b), (owner, p) in now if a() is not owner and not b.is_(p)),
            "missing module": sorted({frame.module for frame in self.frames} - modules),
        }

    def check_matches(self, module: nn.Module) -> None:
        """
        Raises:
            UnitScalingError: the model has other parameters or shapes than the plan, naming the first few.
        """
        problems = [
            f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for what, names in self.differences(module).items()
            if names and what != "replaced"
        ]
        if problems:
            raise UnitScalingError(
                "the plan does not match the model (" + "; ".join(problems) + "). "
                "Build the model as it was when the plan was made, or prepare it anew."
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = {f.name for f in fields(self)} | {"_module", "schedule_followed", "_text"}
        return {name: value for name, value in self.__dict__.items() if name in kept} | {
            "_module": None,
            "_owners": {},
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A copy; one made with its model, in `copy.deepcopy(model)`, is in force on the model's copy."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(deepcopy(self.__getstate__(), memo))
        module = self._module() if self._module is not None else None
        if module is not None and id(module) in memo:
            copied.bind(memo[id(module)])
        return copied


def _owned(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Name, owner and object of each parameter."""
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, parameter in module.named_parameters():
        yield plain_name(name), modules[name.rpartition(".")[0]], parameter


def _with_causes(data: dict[str, Any]) -> dict[str, Any]:
    causes = {name: [Factor(**factor) for factor in factors] for name, factors in data["causes"].items()}
    return {**data, "causes": causes}


def _plain(value: Any) -> Any:
    """A part of a plan in plain containers, numbers and strings."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def plan_of(module: nn.Module) -> Plan | None:
    """The plan in force on a model, if there is one."""
    plan: Plan | None = module.__dict__.get(ATTRIBUTE)
    if plan is not None and (plan._module is None or plan._module() is not module or not plan._owners):
        plan.bind(module)  # a copied model brings a copied plan
    return plan


def prepared_models() -> dict[nn.Module, Plan]:
    """All models in this process on which a plan is in force."""
    return {module: module.__dict__[ATTRIBUTE] for module in list(_BOUND) if ATTRIBUTE in module.__dict__}
