"""What importing this package adds to torch and to Lightning, once they are imported themselves.

    torch        `load_state_dict` puts the plan in force that a state dict carries (see `loading`);
                 `AveragedModel` refuses a prepared model that it was not made of (see `averages`)
    Lightning    the names of the strategies: `Trainer(strategy="unitscale")`;
                 after `ddp_spawn`, callback and strategy are told of the plan that came back (see `spawned`);
                 a Trainer knows from which checkpoint it is to go on before it reads it (see `before_wrapping`)

Nothing else of the package is imported for it until it is needed: `import lightning_unitscale` costs next to nothing,
and may stand before or after the imports of torch and Lightning.

Where the package is installed, torch itself calls `attach` when it is imported (entry point `torch.backends`, by
`autoload`). It is the one hook that is run before Lightning looks up the name of a strategy; Lightning's own, for
callbacks, is run after it. So a file of LightningCLI may say `strategy: unitscale` without an import line.
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off. What fails here (a Lightning that has changed) is a warning: the other
programs of the environment import torch and Lightning too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_unitscale.on_import import when_imported
from lightning_unitscale.warn_user import warn_user

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import nn

PLAN_KEY = "unit_scaling_plan"  # as in `engine.plan.state_dict`
CHECKPOINT = "_unit_scaling_checkpoint"  # where a Trainer's checkpoint connector keeps the path it was given
_OURS = "_of_lightning_unitscale"  # marks a function that is in the place of torch's or Lightning's
NAMESPACES = {"pytorch_lightning": "", "lightning.pytorch": "Lightning"}  # how our classes over each are called
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {  # as Lightning calls its own, with "unitscale_" before it
    "unitscale": ("UnitScalingStrategy", {}),
    **{
        f"unitscale_ddp{method}{unused}": ("UnitScalingDDPStrategy", {**start, **find})
        for method, start in (("", {}), ("_spawn", {"start_method": "spawn"}), ("_fork", {"start_method": "fork"}))
        for unused, find in (("", {}), ("_find_unused_parameters_true", {"find_unused_parameters": True}))
    },
    "unitscale_fsdp": ("UnitScalingFSDPStrategy", {}),
    "unitscale_fsdp_cpu_offload": ("UnitScalingFSDPStrategy", {"cpu_offload": True}),
    "unitscale_model_parallel": ("UnitScalingModelParallelStrategy", {}),
    "unitscale_deepspeed": ("UnitScalingDeepSpeedStrategy", {}),
    **{f"unitscale_deepspeed_stage_{n}": ("UnitScalingDeepSpeedStrategy", {"stage": n}) for n in (1, 2, 3)},
}


def attach() -> None:
    """Does all of it, each part once."""
    _attach_to("torch", wrap_load_state_dict)
    _attach_to("torch.optim.swa_utils", wrap_averages)
    for namespace in NAMESPACES:
        strategies = f"{namespace}.strategies"  # not the namespace: it may be half way, importing torch
        _attach_to(strategies, partial(register_strategies, namespace))
        _attach_to(f"{strategies}.launchers.multiprocessing", partial(wrap_recovery, namespace))
        connector = f"{namespace}.trainer.connectors.checkpoint_connector"
        _attach_to(connector, partial(remember_checkpoint, connector))


def _attach_to(module: str, attachment: Callable[[], None]) -> None:
    def attempt() -> None:
        try:
            attachment()
        except Exception as error:
            warn_user(f"lightning_unitscale does not fit this {module}: {error!r}")

    when_imported(module, attempt)


def wrap_load_state_dict() -> None:
    """Make `torch.nn.Module.load_state_dict` put the plan in force that a state dict carries."""
    from torch import nn

    original = nn.Module.load_state_dict
    if hasattr(original, _OURS):
        return

    @wraps(original)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not _carries_a_plan(state_dict):
            return original(self, state_dict, *args, **kwargs)
        from lightning_unitscale.loading import plans_in_force

        with plans_in_force(self, state_dict):
            return original(self, state_dict, *args, **kwargs)

    setattr(load_state_dict, _OURS, True)
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]  # a function for a method


def wrap_averages() -> None:
    """Make `torch.optim.swa_utils.AveragedModel` look whether it may average a prepared model."""
    from torch.optim.swa_utils import AveragedModel

    original = AveragedModel.update_parameters
    if hasattr(original, _OURS):
        return

    @wraps(original)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        if PLAN_KEY in vars(model):
            from lightning_unitscale.averages import check_average

            check_average(self, model)
        original(self, model)

    setattr(update_parameters, _OURS, True)
    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]  # a function for a method


def _carries_a_plan(state: Mapping[str, Any]) -> bool:
    """A first look that imports nothing; `engine.plan.state_dict` looks closely."""
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state, "_metadata", None) or {}
    return any(key.endswith(PLAN_KEY) for key in state) or any(PLAN_KEY in local for local in metadata.values())


def register_strategies(namespace: str) -> None:
    """Make the named strategies known to Lightning; their classes are imported when a Trainer asks for one."""
    registry = import_module(f"{namespace}.strategies").StrategyRegistry
    for name, (strategy, options) in STRATEGIES.items():
        if name not in registry:
            title = NAMESPACES[namespace] + strategy
            registry.register(name, _built_when_asked_for(title), f"unit scaling: {title}", **options)


def _built_when_asked_for(strategy: str) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("lightning_unitscale.strategy"), strategy)(*args, **kwargs)

    return build


def wrap_recovery(namespace: str) -> None:
    """Make Lightning's launcher of processes tell callback and strategy of the plan that came back."""
    launcher: Any = import_module(f"{namespace}.strategies.launchers.multiprocessing")._MultiProcessingLauncher
    original = launcher.update_main_process_results
    if hasattr(original, _OURS):
        return

    @wraps(original)
    def update_main_process_results(self: Any, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        from lightning_unitscale.spawned import tell_of_plan

        original(self, trainer, extra)
        tell_of_plan(trainer)

    setattr(update_main_process_results, _OURS, True)
    launcher.update_main_process_results = update_main_process_results


def remember_checkpoint(module: str) -> None:
    """Make a Trainer keep the path of the checkpoint that it will read, which it else knows when it reads it."""
    connector: Any = import_module(module)._CheckpointConnector
    original = connector._select_ckpt_path
    if hasattr(original, _OURS):
        return

    @wraps(original)
    def select_ckpt_path(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = original(self, *args, **kwargs)
        setattr(self, CHECKPOINT, path)
        return path

    setattr(select_ckpt_path, _OURS, True)
    connector._select_ckpt_path = select_ckpt_path
