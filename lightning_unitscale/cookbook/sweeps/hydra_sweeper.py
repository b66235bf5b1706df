"""Independent search as a sweeper of Hydra: for any application that returns a loss, under any launcher.

    unitscale pretrain -m hydra/sweeper=unitscale_independent unitscale.lr_units=umup optimizer.lr=0.5,1,2,4 \\
        unitscale.hyperparameters.alpha_attn=0.5,1,2 unitscale.hyperparameters.alpha_res=0.5,1,2

The wheel installs this file as `hydra_plugins/unitscale_independent.py`, where Hydra finds and runs it at the start of
every application; so it imports nothing heavy until a sweep begins.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning_unitscale.cookbook.sweeps.search import Losses
    from lightning_unitscale.cookbook.sweeps.space import Point

log = logging.getLogger(__name__)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="unitscale_independent",
    node={"_target_": "hydra_plugins.unitscale_independent.IndependentSweeper", "rate": None, "params": None},
    provider="lightning-unitscale",
)


class IndependentSweeper(Sweeper):
    """Learning rate first, then each other setting alone, the best of each combined; smaller returns are better.

    Each phase is one batch of the launcher. What was best goes into `optimization_results.yaml` in the folder of the
    sweep, as Optuna's sweeper writes it.

    Args:
        rate: the setting that is searched first; None: the first that has several values.
        params: settings and their values, in Hydra's syntax; those of the command line win.
    """

    config: DictConfig
    hydra_context: HydraContext

    def __init__(self, rate: str | None, params: dict[str, str] | None) -> None:
        self.rate, self.params = rate, dict(params or {})
        self.begun = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra calls this before `sweep`."""
        self.config, self.hydra_context = config, hydra_context  # where the base class has them, None before
        self.settings, self.loader = config, hydra_context.config_loader
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> float:
        """Runs the search, and returns the smallest loss.

        Raises:
            HydraException: nothing has several values, one of those settings has no value of its own or can't have one
                of these, or with no learning rate is the loss finite.
        """
        from lightning_unitscale.cookbook.sweeps.search import best_of, independent_search

        values = self._read(arguments)
        rate = self.rate or next(iter(values), "")
        if rate not in values:
            raise HydraException(f"independent search begins with {rate or 'a learning rate'}: give it several values")
        losses = independent_search(
            {name: list(texts) for name, texts in values.items()}, rate, self._defaults(values), self._evaluate
        )
        best = best_of(losses)
        folder = Path(self.settings.hydra.sweep.dir)
        result = {"name": "unitscale_independent", "best_params": dict(best), "best_value": losses[best]}
        OmegaConf.save(OmegaConf.create(result), folder / "optimization_results.yaml")
        log.info("best of %d: %s: %g", len(losses), " ".join(f"{name}={value}" for name, value in best), losses[best])
        return losses[best]

    def _read(self, arguments: Iterable[str]) -> dict[str, dict[Any, str]]:
        """For each setting with several values, value → text; what has one goes to every run as it is."""
        parser = OverridesParser.create(config_loader=self.loader)
        overrides = parser.parse_overrides([*(f"{name}={given}" for name, given in self.params.items()), *arguments])
        swept: dict[str, dict[Any, str]] = {}
        self.fixed = {o.get_key_element(): o.input_line or "" for o in overrides if not o.is_sweep_override()}
        for override in overrides:
            if not override.is_sweep_override():
                continue
            if not override.is_discrete_sweep():
                raise HydraException(f"independent search needs single values, not an interval: {override.input_line}")
            texts = list(override.sweep_string_iterator())
            swept[override.get_key_element()] = dict(zip(map(_value, texts), texts, strict=True))
        self.texts = swept
        return swept

    def _defaults(self, values: Iterable[str]) -> dict[str, Any]:
        """What a run without overrides has."""
        missing = object()
        found = {name: OmegaConf.select(self.settings, name.lstrip("+"), default=missing) for name in values}
        if unknown := [name for name, value in found.items() if value is missing]:
            raise HydraException(f"{', '.join(unknown)} has no value of its own to begin with; give one in the config")
        return found

    def _evaluate(self, phase: str, points: Iterable[Point]) -> Losses:
        points = list(points)
        jobs = [[*self.fixed.values(), *map(self._override, point)] for point in points]
        self.validate_batch_is_legal(jobs)
        log.info("%s: %d runs", phase, len(jobs))
        returned = self.launcher.launch(jobs, initial_job_idx=self.begun) if jobs else []
        self.begun += len(jobs)
        losses = (float(job.return_value) for job in returned)  # raises what a run has raised
        return {point: loss if math.isfinite(loss) else math.inf for point, loss in zip(points, losses, strict=True)}

    def _override(self, setting: tuple[str, Any]) -> str:
        name, value = setting
        return f"{name}={self.texts[name].get(value, value)}"


def _value(text: str) -> Any:
    """As OmegaConf reads it, so that 1 in a sweep is the 1.0 of the configuration."""
    return OmegaConf.create(f"value: {text}").value
