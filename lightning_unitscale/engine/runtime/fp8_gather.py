"""Weights that `fully_shard` gathers as the FP8 numbers that their products read: one byte an element, not 2 or 4.

    sent       ŵ = cast(shard · s)
    gathered   ŵ / s in the dtype of the parameter, exactly; the product's own cast(ŵ / s · s) is ŵ again

so the function is the same, bit for bit. A scale from the largest element needs that of all shards first, which is a
reduction before every gather; s is a constant of the plan, and nothing but ŵ is sent. Each shard keeps its own dtype,
and so do gradients on their way back.

`fully_shard` asks each local shard for two methods, `fsdp_pre_all_gather` and `fsdp_post_all_gather` (torch 2.13); here
they are attributes of the shard, which stays a plain tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.fsdp import FSDPModule

from lightning_unitscale.engine.plan.plan import plan_of
from lightning_unitscale.engine.plan.site import Site
from lightning_unitscale.engine.record.keys import UseId
from lightning_unitscale.engine.runtime.install import casts_in_force
from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.formats import FORMATS, cast


def gather_in_fp8(module: nn.Module) -> list[str]:
    """From now on, gather the sharded weights of a prepared module in FP8 where all their uses cast them to it.

    Args:
        module: after `fully_shard`, with scales measured, between two steps. A scale that is measured again holds from
            the next gather on; where a site falls back to the compute dtype, its weight goes on with the last one. May
            be called again.

    Returns:
        The names of these weights. Others are gathered as they are: tied to an embedding, cast with several scales or
        with one for each row.

    Raises:
        UnitScalingError: no plan is in force on the module, or it is not sharded.
    """
    if plan_of(module) is None:
        raise UnitScalingError(
            f"{type(module).__name__} has no plan: prepare it (format='fp8'), then shard, then this."
        )
    shards = _shards(module)
    if not shards:
        raise UnitScalingError(f"{type(module).__name__} is not sharded: call fully_shard first.")
    found = []
    for name, fsdp_parameter in shards.items():
        site = _only_cast(module, name)
        is_gathered_so = hasattr(fsdp_parameter._sharded_local_tensor, "fsdp_pre_all_gather")
        if site is not None and not is_gathered_so:
            _Gathered(site).attach(fsdp_parameter)
        if site is not None or is_gathered_so:
            found.append(name)
    return found


def gathered_shards(module: nn.Module) -> dict[UseId, Tensor]:
    """The shards of the weights that are gathered in FP8, by their uses, as the optimizer left them.

    What products see of these weights is rounded already, so whoever measures a weight looks here.
    """
    found = {}
    for name, fsdp_parameter in _shards(module).items():
        site = _only_cast(module, name)
        if site is not None and hasattr(fsdp_parameter._sharded_local_tensor, "fsdp_pre_all_gather"):
            found[site.use] = fsdp_parameter._sharded_local_tensor
    return found


class _Gathered:
    """The two methods that `fully_shard` asks a shard for.

    Args:
        site: of which the scale is.
    """

    def __init__(self, site: Site) -> None:
        self.site, self.scale = site, site.operand_scales["weight"]

    def attach(self, fsdp_parameter: Any) -> None:
        """Give them to the shard of a parameter."""
        shard = fsdp_parameter._sharded_local_tensor
        padded = fsdp_parameter.padded_sharded_param_size

        def fsdp_pre_all_gather(mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> Any:
            self.scale = self.site.operand_scales.get("weight", self.scale)
            return (self.sent(shard, padded),), self.scale

        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = fsdp_pre_all_gather, self.gathered
        fsdp_parameter._init_extensions()
        fsdp_parameter.all_gather_outputs = []  # those of gathers before had another dtype
        if hasattr(fsdp_parameter, "_unsharded_param"):
            del fsdp_parameter._unsharded_param

    def sent(self, shard: Tensor, padded: torch.Size) -> Tensor:
        """The bytes of ŵ, with zeros up to the size that all shards have."""
        narrow = cast(shard, torch.float8_e4m3fn, self.scale).view(torch.uint8)
        whole = narrow.new_zeros(padded)
        whole[: len(narrow)] = narrow
        return whole

    def gathered(
        self, outputs: tuple[Tensor, ...], scale: float, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """ŵ / s; into `out` where a tensor from the gather before is there."""
        whole = outputs[0].view(torch.float8_e4m3fn).to(dtype) / scale
        if out is None:
            return whole, (whole,)
        with _unsafe_preserve_version_counter(out):
            out.detach().view(-1).copy_(whole.view(-1)[: out.numel()])
        return None


def _shards(module: nn.Module) -> dict[str, Any]:
    """What `fully_shard` keeps of each parameter, by name; whatever is gathered now is let go."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for part in module.modules():
        group = part._get_fsdp_state()._fsdp_param_group if isinstance(part, FSDPModule) else None
        for fsdp_parameter in group.fsdp_params if group is not None else ():
            found[names[id(fsdp_parameter.sharded_param)]] = fsdp_parameter
    return found


def _only_cast(module: nn.Module, name: str) -> Site | None:
    """The site whose scale all uses of the weight have, if all of them cast it to e4m3."""
    plan = plan_of(module)
    assert plan is not None
    uses = [site for site in plan.sites if any(name in key.names for key in site.params)]
    casting = [
        site
        for site in uses
        if site.use in casts_in_force(module)
        and site.format is not None
        and FORMATS[site.format].weight == torch.float8_e4m3fn
        and "weight" in site.operand_scales
        and not site.row_exponents
    ]
    if not uses or len(casting) < len(uses) or len({site.operand_scales["weight"] for site in casting}) > 1:
        return None
    return casting[0] if casting[0].params[0].names == (name,) else None
