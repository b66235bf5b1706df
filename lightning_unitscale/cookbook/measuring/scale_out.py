"""What it takes to plan a model of many billion parameters: recorded on `meta`, where no tensor has memory.

The step's calls, their shapes and what goes into what are all that `umup` needs of them; of parameters it needs the RMS
of what is drawn, which on `meta` is not there: matrices are taken to be drawn with the config's `initializer_range`,
vectors to be ones. In a run it is measured, shard by shard (`engine.record.spread_tensors`): one number a parameter.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_unitscale.engine.record.trace import Trace
from lightning_unitscale.engine.runtime.install import install
from lightning_unitscale.options import Options
from lightning_unitscale.record_step import record
from lightning_unitscale.schemes import scheme_of
from lightning_unitscale.schemes.planner import make_plan


@dataclass(frozen=True)
class PlanningCost:
    """Of one model.

    Attributes:
        parameters: how many numbers.
        record, plan, apply: seconds.
        peak: GiB, of the process up to here, imports and the model on `meta` included.
        plan_size: MiB, of the plan as text.
        left_alone: parameters that the plan leaves alone.
    """

    parameters: int
    record: float
    plan: float
    apply: float
    peak: float
    plan_size: float
    left_alone: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.record + self.plan + self.apply


def planning_cost(config: dict[str, Any], tokens: int, scheme: str, storage: str) -> PlanningCost:
    """Measured in this process.

    Args:
        config: model_type, and arguments of the config class of transformers.
        tokens: of the recorded sequence.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    begin = time.perf_counter()
    trace = record(model, lambda _: model(input_ids=ids, labels=ids).loss, may_overflow=True)
    recorded = time.perf_counter()
    options = Options(scheme=scheme, storage=storage)
    plan = make_plan(scheme_of(options), model, as_drawn(trace, model.config.initializer_range), options)
    planned = time.perf_counter()
    install(model, plan)
    return PlanningCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        record=recorded - begin,
        plan=planned - recorded,
        apply=time.perf_counter() - planned,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        plan_size=len(plan.to_json()) / 2**20,
        left_alone=len(plan.skipped),
    )


def as_drawn(trace: Trace, std: float) -> Trace:
    """The trace with what parameters on `meta` would be like if they were drawn."""
    for name, facts in trace.facts.items():
        matrix = len(facts.shape) > 1
        trace.facts[name] = replace(
            facts, rms=std if matrix else 1.0, is_constant=not matrix, largest=5 * std if matrix else 1.0
        )
    return trace
