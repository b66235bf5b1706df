"""Explain why a checkpoint's parameter or site has the numbers it has: every factor, with its cause and source.

unitscale explain model.lm_head.weight ckpt_path=outputs/pretrain/…    # a run's folder, or a checkpoint
unitscale explain 'model.model.layers.0.*' ckpt_path=…    # all names that match
unitscale explain ckpt_path=…                             # the table of the whole plan
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from omegaconf import OmegaConf

from lightning_unitscale import Plan, UnitScalingError
from lightning_unitscale.checkpoint import plan_in, read_checkpoint
from lightning_unitscale.cookbook.arguments import EXPORTED, with_last_checkpoint
from lightning_unitscale.cookbook.tables import terminal_width
from lightning_unitscale.errors import InputError
from lightning_unitscale.near_names import not_found


def main(arguments: Sequence[str]) -> None:
    """Prints the explanations asked for."""
    settings = dict(with_last_checkpoint(argument).split("=", 1) for argument in arguments if "=" in argument)
    names = [argument for argument in arguments if "=" not in argument]
    plan = read_plan(settings.pop("ckpt_path", ""))
    if settings:
        raise InputError(f"there is no setting {next(iter(settings))} here; there is ckpt_path")
    if not names:
        print(plan.summary(width=terminal_width()))
    for name in names:
        print("\n\n".join(plan.explain(found) for found in matching(plan, name)))


def read_plan(path: str) -> Plan:
    """The plan in a checkpoint."""
    if not path:
        raise InputError("say which checkpoint: ckpt_path=<a checkpoint that unit scaling wrote>")
    if exported := exported_from(Path(path)):
        raise InputError(
            f"ckpt_path={path}: exported weights, which are plain and have no plan; explain what they were made from: "
            f"ckpt_path={exported}"
        )
    if not Path(path).is_file():
        raise InputError(f"ckpt_path={path}: {not_found(path)}")
    plan = plan_in(read_checkpoint(path))
    if plan is None:
        raise InputError(f"ckpt_path={path}: this checkpoint was written without unit scaling; it has no plan")
    return plan


def exported_from(folder: Path) -> str:
    """What the model of transformers in this folder was made from, as its run recorded; empty where none is there."""
    model = folder / EXPORTED if (folder / EXPORTED).is_dir() else folder
    if not (model / "config.json").is_file():
        return ""
    run = model.parent
    if (run / "checkpoints").is_dir():  # of a fine-tuning
        return str(run)
    record = run / ".hydra" / "config.yaml"
    recorded = OmegaConf.select(OmegaConf.load(record), "model.path") if record.is_file() else None
    return recorded or "<the run or checkpoint>"


def matching(plan: Plan, name: str) -> list[str]:
    """The names that a glob stands for; any other name as it is."""
    if not set("*?[") & set(name):
        return [name]
    known = dict.fromkeys([*plan.parameters, *(site.name for site in plan.sites)])
    found = [one for one in known if fnmatchcase(one, name)]
    if not found:
        raise InputError(f"nothing is called like {name}; the plan has {', '.join([*known][:5])} …")
    return found


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except (InputError, UnitScalingError) as error:
        sys.exit(f"error: {error}")
