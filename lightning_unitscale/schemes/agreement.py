"""Options that contradict each other: what a scheme would do nothing with, or the wrong thing."""

from __future__ import annotations

from dataclasses import fields

from lightning_unitscale.errors import UnitScalingError
from lightning_unitscale.options import Options
from lightning_unitscale.schemes.scheme import Scheme


def check_agreement(scheme: Scheme, options: Options) -> None:
    """
    Raises:
        UnitScalingError: rates are in the scheme's own units, of weights that it is to leave alone; everything is
            switched off; or a hyperparameter is given of what is switched off.
    """
    if scheme.changes_training and options.lr_units == "umup" and not options.weights:
        raise UnitScalingError(
            "lr_units='umup' contradicts weights=False: the scheme's learning rates are those of weights that it has "
            "scaled. Use lr_units='standard', or weights=True."
        )
    acts = options.weights or options.activations or (scheme.divides_gradients and options.gradients)
    if scheme.changes_training and not acts and options.format is None:
        raise UnitScalingError(
            f"weights=False and activations=False leave scheme={scheme.name!r} nothing to do, and no format is asked "
            "for. Switch one of them on, or train without unit scaling."
        )
    for switch, names in (("weights", scheme.of_weights), ("activations", scheme.of_activations)):
        given = {known.name: getattr(scheme, known.name) for known in fields(scheme) if known.name in names}
        idle = [known.name for known in fields(scheme) if given.get(known.name, known.default) != known.default]
        if idle and not getattr(options, switch):
            raise UnitScalingError(
                f"{switch}=False contradicts hyperparameters={{{idle[0]!r}: {given[idle[0]]!r}}}, which decides "
                f"nothing then. Leave it out, or take {switch}=True."
            )
