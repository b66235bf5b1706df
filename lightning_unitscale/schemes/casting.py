"""Which matmuls are cast to a narrow format: those of weights, and attention's own products where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning_unitscale.engine.analysis.attention import attention_products
from lightning_unitscale.engine.analysis.castable import reason_not_to_cast, reason_to_upcast, row_sizes
from lightning_unitscale.engine.analysis.structure import Structure
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.trace import Call
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.formats import FORMATS
from lightning_unitscale.near_names import matches
from lightning_unitscale.ops import MATMULS
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.left_alone import IN_FUNCTION, SKIPPED, no_place


class Casting:
    """Decides for the sites of a plan in the making.

    Args:
        overrides: by parameter.
        left_alone: parameters that nothing may be done to, with the reason.
        of_scheme: why matmuls with a weight of a role are not cast, by the scheme; "" if they are.
    """

    def __init__(
        self,
        options: Options,
        overrides: Mapping[str, Mapping[str, Any]],
        left_alone: Mapping[str, str],
        of_scheme: Callable[[str], str],
    ) -> None:
        self.options, self.overrides, self.left_alone, self.of_scheme = options, overrides, left_alone, of_scheme

    def decide(self, site: Site, call: Call) -> None:
        """Cast the operands of a weight's site, or say why not; one call that can't be leaves them all as they are."""
        names = site.params[0].names
        name = next((name for name in names if "format" in self.overrides.get(name, {})), None)
        wanted = self.options.format if name is None else self.overrides[name]["format"]
        if wanted is None or call.name not in MATMULS or site.format_reason:
            return
        skipped = any(self.left_alone.get(name) == SKIPPED for name in names)
        site.format_reason = (
            SKIPPED if skipped else IN_FUNCTION if call.in_function else reason_not_to_cast(call, wanted)
        ) or (self._reason_of_role(site.role, wanted) if name is None else "")
        site.format = None if site.format_reason else wanted
        site.upcast = reason_to_upcast(call, wanted) if site.format else ""
        site.row_sizes = row_sizes(call, wanted) if site.format else []

    def _reason_of_role(self, role: str, format: str) -> str:
        """Why weights of a role are left out unless named by an override; empty if they are not."""
        if role in FORMATS[format].kept_roles:
            return f"{format}'s paper keeps weights of the role {role} in the compute dtype"
        return self.of_scheme(role)

    def check_overrides(self, sites: Sequence[Site]) -> None:
        """
        Raises:
            UnitScalingError: an override asks for a format where no site of a weight can be cast.
        """
        for glob, override in self.options.overrides.items():
            if override.get("format") is None:
                continue
            meant = [s for s in sites if any(matches(name, (glob,)) for key in s.params for name in key.names)]
            if not any(site.format for site in meant):
                why = _reasons(meant) or "its parameters are used by no matmul"
                raise UnitScalingError(
                    f"overrides[{glob!r}]: format={override['format']!r}, but no matmul there can be cast "
                    f"({why}). Take the override out, or name other weights."
                )

    def decide_attention(self, structure: Structure, sites: Sequence[Site]) -> list[Site]:
        """Cast attention's own products in modules for which it is asked; returns those that are cast.

        Raises:
            UnitScalingError: an override asks for it where none can be cast.
        """
        wanted = {
            glob: override["attention_format"]
            for glob, override in self.options.overrides.items()
            if "attention_format" in override
        }
        if not wanted:
            return []
        by_place = {site.place: site for site in sites if site.ordinal is not None}
        attention: list[Site] = []
        for call in attention_products(structure):
            site = by_place.get(call.place) or by_place[call.place.at_every_call]
            attention.append(site)
            format = next((wanted[glob] for glob in reversed(wanted) if matches(site.module, (glob,))), None)
            if format is not None:
                self._decide_product(site, call, format)
        _check_attention_overrides(wanted, attention)
        return [site for site in attention if site.format]

    def _decide_product(self, site: Site, call: Call, format: str) -> None:
        if matches(site.module, self.options.skip):
            site.format_reason = SKIPPED
        elif reason := no_place(call):
            site.format_reason = reason
        elif any(value.is_complex for value in call.inputs):
            site.format_reason = "complex numbers, which no narrow format has"
        elif len(call.outputs) > 1:
            site.format_reason = "more than one output, whose gradients one cast can't round"
        else:
            site.format = format
            site.operands = [*MATMULS[call.name].multiplicands(call), "gradient"]


def _check_attention_overrides(wanted: Mapping[str, str | None], attention: Sequence[Site]) -> None:
    where = ", ".join(list(dict.fromkeys(site.module or "<root>" for site in attention))[:3])
    for glob, format in wanted.items():
        meant = [site for site in attention if matches(site.module, (glob,))]
        if format is not None and not any(site.format for site in meant):
            raise UnitScalingError(
                f"overrides[{glob!r}]: attention_format={format!r}, but no attention there can be cast "
                f"({_reasons(meant) or 'no module of that name computes it'}). Name modules whose own code calls "
                f"it, or take the override out. {f'This model has it in {where}' if where else 'It has none'}."
            )


def _reasons(sites: Iterable[Site]) -> str:
    return "; ".join(dict.fromkeys(f"{site.name}: {site.format_reason}" for site in sites if site.format_reason))
