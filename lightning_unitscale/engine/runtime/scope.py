"""What a plan puts into one method of one module."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.runtime.block_constants import BlockConstant
from lightning_unitscale.engine.runtime.casts import AttentionCast
from lightning_unitscale.engine.runtime.made_of import MadeOf
from lightning_unitscale.engine.runtime.rules import Rules


class FreeSite(NamedTuple):
    """A parameter-free site.

    Attributes:
        cast: of its operands, if there is to be one.
        constant: its factor in compiled code, if it differs between blocks.
    """

    site: Site
    cast: AttentionCast | None
    constant: BlockConstant | None


class Scope:
    """A method of a module, and what of the rules belongs to it.

    Attributes:
        in_parametrization: whether the module makes a weight of another module.
        replaced: somebody else's function that stood in for the method already.
        touched: the parameters that the method's own code hands to torch functions: owner, attribute, what it is.
        sites: the parameter-free sites in it, by function and which call of it, each with its casts.
        most_calls: of the functions with such sites, how often one run of the recorded step called them.
        output_site: whose factor what the method returns has.
    """

    def __init__(self, module: nn.Module, method: str, rules: Rules, in_parametrization: bool) -> None:
        self.module, self.method, self.rules, self.in_parametrization = module, method, rules, in_parametrization
        self.replaced = module.__dict__.get(method)
        self.touched: list[tuple[nn.Module, str, MadeOf]] = []
        self.sites: dict[tuple[str, int], FreeSite] = {}
        self.most_calls: dict[str, int] = {}
        self.output_site: Site | None = None

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return f"{type(self.module).__name__}.{self.method}"

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the method itself; on the Python stack this call is where its frame begins."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)
