"""The named strategies: `Trainer(strategy="unitscale")`. See `lifecycle` for what they do and when, and `attachments`
for how Lightning learns their names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.lifecycle import Lifecycle
from lightning_unitscale.namespaces import NAMESPACES, Callback, callbacks_of
from lightning_unitscale.near_names import did_you_mean
from lightning_unitscale.options import Options

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import SingleDeviceStrategy, Strategy
else:
    SingleDeviceStrategy = Strategy = object  # a named strategy has those of its namespace behind the mixin


GATHERED_FORMATS = ("fp8", "fp8_e4m3")


class _BatchEnd(Callback):
    """What a strategy is not told: that a batch is done. Stands in for `UnitScaling` where that is not there."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.lifecycle.after_train_batch(pl_module, batch, batch_idx)


class UnitScalingMixin(Strategy):
    """Makes a strategy class apply unit scaling: `class MyStrategy(UnitScalingMixin, DDPStrategy)`.

    Args:
        the options of `UnitScaling`, by keyword; everything else goes to the strategy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {f.name: kwargs.pop(f.name) for f in fields(Options) if f.name in kwargs}
        family = kwargs.pop("optimizer_family", None)
        self._check_names(kwargs)
        self.unit_scaling = Lifecycle(Options(**options), family)
        self._callbacks: list[pl.Callback] = []  # the Trainer's, during a run in this process
        super().__init__(*args, **kwargs)

    def _check_names(self, arguments: Collection[str]) -> None:
        """Of those that go to the strategy; it may pass on to torch what it does not know itself.

        Raises:
            TypeError: a name is none of its own, and near one of an option.
        """
        makers = [vars(base)["__init__"] for base in type(self).__mro__ if "__init__" in vars(base)]
        known = {name for make in makers for name in signature(make).parameters}
        for name in arguments:
            hint = did_you_mean(name, [*(option.name for option in fields(Options)), "optimizer_family"])
            if hint and name not in known:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}.{hint}")

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        self.unit_scaling.before_run(self.lightning_module)
        self.unit_scaling.before_wrapping(self, trainer)
        self._callbacks = callbacks_of(trainer)
        self._callbacks.insert(0, _BatchEnd(self.unit_scaling))  # before callbacks that save
        super().setup(trainer)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.unit_scaling.before_train_batch(self, batch, batch_idx)
        super().on_train_batch_start(batch, batch_idx)

    @override
    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.unit_scaling.around_backward(self, super().backward, closure_loss, *args, **kwargs)
        return result

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        return self.unit_scaling.around_optimizer_step(
            self, super().optimizer_step, optimizer, closure, *args, **kwargs
        )

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = self.unit_scaling.around_loading(
            self, super().load_checkpoint, checkpoint_path, *args, **kwargs
        )
        return loaded

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.unit_scaling.before_loading(self, checkpoint)
        super().load_model_state_dict(checkpoint, strict=strict)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.unit_scaling.around_saving(
            self, super().save_checkpoint, checkpoint, filepath, storage_options=storage_options
        )

    @override
    def teardown(self) -> None:
        self.unit_scaling.release()
        self._callbacks[:] = [callback for callback in self._callbacks if not isinstance(callback, _BatchEnd)]
        self._callbacks = []
        super().teardown()
        self.unit_scaling.after_run()


class ShardedMixin(UnitScalingMixin):
    """For a `ModelParallelStrategy`.

    Args:
        fp8_gather: gather the weights that `fully_shard` has sharded in FP8 from the second step on, one byte an
            element, where their products cast them to e4m3 anyway: the function stays the same to the bit
            (`engine.runtime.fp8_gather`).

    Raises:
        UnitScalingError: `fp8_gather` without a format that has weights in e4m3.
    """

    def __init__(self, *args: Any, fp8_gather: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        format = self.unit_scaling.options.format
        if fp8_gather and format not in GATHERED_FORMATS:
            raise UnitScalingError(
                f"fp8_gather=True gathers weights as their casts leave them, and format={format!r} casts none to e4m3 "
                f"by one scale; choose format={' or '.join(map(repr, GATHERED_FORMATS))}, or leave fp8_gather out."
            )
        self.unit_scaling.fp8_gather = fp8_gather


class OneDeviceMixin(UnitScalingMixin, SingleDeviceStrategy):
    """For a `SingleDeviceStrategy`, which the Trainer does not tell its device when it is named by a string."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parallel_devices: list[torch.device] = []  # set by the Trainer

    @property
    @override
    def root_device(self) -> torch.device:
        if len(self.parallel_devices) > 1:
            raise UnitScalingError(
                f"strategy='unitscale' runs on one device, the Trainer has {len(self.parallel_devices)}; use "
                "strategy='unitscale_ddp', or devices=1."
            )
        return self.parallel_devices[0] if self.parallel_devices else self._root_device


def _over(namespace: ModuleType, title: str, name: str, mixin: type[Any], base: str) -> type[Any]:
    """Our class over one of Lightning's; an attribute of this module, so that `ddp_spawn` can pickle instances."""
    title = title if namespace is NAMESPACES[0] else f"Lightning{title}"
    doc = f'`Trainer(strategy="{name}")` of `{namespace.__name__}`: {base} with unit scaling.'
    bases = (mixin, getattr(namespace.strategies, base))
    globals()[title] = type(title, bases, {"__doc__": doc, "__module__": __name__, "strategy_name": name})
    return cast(type[Any], globals()[title])


def _over_each(title: str, name: str, base: str, mixin: type[Any] = UnitScalingMixin) -> type[Any]:
    first, *_ = [_over(namespace, title, name, mixin, base) for namespace in NAMESPACES]
    return first


UnitScalingStrategy = _over_each("UnitScalingStrategy", "unitscale", "SingleDeviceStrategy", OneDeviceMixin)
UnitScalingDDPStrategy = _over_each("UnitScalingDDPStrategy", "unitscale_ddp", "DDPStrategy")
UnitScalingFSDPStrategy = _over_each("UnitScalingFSDPStrategy", "unitscale_fsdp", "FSDPStrategy")
UnitScalingModelParallelStrategy = _over_each(
    "UnitScalingModelParallelStrategy", "unitscale_model_parallel", "ModelParallelStrategy", ShardedMixin
)
UnitScalingDeepSpeedStrategy = _over_each("UnitScalingDeepSpeedStrategy", "unitscale_deepspeed", "DeepSpeedStrategy")
