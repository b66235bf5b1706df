"""Check by slopes that activations and their changes keep their size as a model gets wider and deeper.

    unitscale coord_check                                   # = python recipes/coord_check.py; minutes on one core
    unitscale coord_check schemes=[standard,umup] seeds=[1] depths=[]
    unitscale coord_check 'model={_target_: my_package.MyModule, hidden: 64}' knobs.width=model.hidden depths=[]

`model` is a factory of any LightningModule with a `training_step`, a `train_dataloader`, and a setting for width and
one for depth, named by `knobs`. Every model is built at each size, trained for a few steps on one batch, at a normal
and at a large learning rate, untouched ("standard") and under each scheme, whose learning rates are in its own units.
Slopes are of the logarithms; a table says which modules grow or stop learning, and the page shows all.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_unitscale.cli import recipe
from lightning_unitscale.cookbook.checks import check_known
from lightning_unitscale.cookbook.coordinates.measure import UNTOUCHED, CoordinateRun, coordinates, new_model, with_size
from lightning_unitscale.cookbook.coordinates.page import verdicts, write_coordinates_page
from lightning_unitscale.cookbook.coordinates.slopes import by_module
from lightning_unitscale.cookbook.tables import print_and_keep
from lightning_unitscale.cookbook.wrong_values import check_whole_numbers
from lightning_unitscale.errors import InputError
from lightning_unitscale.schemes import SCHEMES


@recipe("coord_check")
def main(cfg: DictConfig) -> None:
    """Measures every place, fits slopes, prints the verdicts and writes the page."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    cfg.model = cfg.model or cfg.llama
    places = planned_places(cfg)
    check_places(cfg, places)
    measured = []
    for number, place in enumerate(places, start=1):
        measured += coordinates(cfg, place)
        print(f"[{number}/{len(places)}] {place.scheme}, {place.knob} {place.size}, {place.speed}, seed {place.seed}")
    (folder / "coord_check.json").write_text(json.dumps([asdict(coordinate) for coordinate in measured]))
    found = by_module(measured)
    print_and_keep(folder / "coord_check.txt", verdicts(found, cfg.tolerance), width=160)
    print(f"page: {write_coordinates_page(folder, found, cfg.tolerance)}")


def planned_places(cfg: DictConfig) -> list[CoordinateRun]:
    """Scheme × size × learning rate × seed, along each axis."""
    known = [name for name, scheme in SCHEMES.items() if scheme.changes_training]
    schemes = [UNTOUCHED, *known] if cfg.schemes is None else list(cfg.schemes)
    check_known("schemes", schemes, [UNTOUCHED, *known])
    return [
        CoordinateRun(scheme, knob, size, str(speed), seed)
        for knob, sizes in (("width", cfg.widths), ("depth", cfg.depths))
        for scheme in schemes
        for speed in cfg.learning_rates[UNTOUCHED]
        for size in sizes
        for seed in cfg.seeds
    ]


def check_places(cfg: DictConfig, places: list[CoordinateRun]) -> None:
    """Raises InputError for what would fail after work was done."""
    if not places:
        raise InputError("nothing to check: give widths or depths, schemes and seeds")
    check_whole_numbers(cfg, "steps")
    for knob, sizes in (("width", cfg.widths), ("depth", cfg.depths)):
        if len(set(sizes)) == 1:
            raise InputError(f"{knob}s={list(sizes)}: a slope needs two sizes or more; {knob}s=[] leaves the axis out")
        for size in sizes:
            new_model(with_size(cfg, knob, size))


if __name__ == "__main__":
    main()
