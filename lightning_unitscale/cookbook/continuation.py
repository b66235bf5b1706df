"""What a run needs to go on exactly where its checkpoint was written, and Lightning does not give it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_unitscale.errors import InputError


class RandomNumbers(pl.Callback):
    """Keeps the state of torch's generators in the checkpoint, so that dropout masks go on and don't begin anew."""

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The CPU's generator, and those of all CUDA devices."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be put in force when the first step begins: until then Lightning draws numbers itself."""
        self._state = state_dict

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Puts the loaded state in force, once."""
        if self._state is not None:
            torch.set_rng_state(self._state["cpu"].cpu())
            if len(self._state["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([state.cpu() for state in self._state["cuda"]])
            self._state = None


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, whose best score counts on when the run goes on in another folder.

    The best checkpoint then stays in the folder of the earlier run until there is a better one.

    Raises:
        InputError: the best checkpoint of the earlier run is not there any more.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over score and path."""
        best = state_dict["best_model_path"]
        if best and not Path(best).is_file():
            raise InputError(
                f"ckpt_path: the best checkpoint of this run so far, {best}, is not there. Put it back, or begin a new "
                "run from the weights: model.path=<the checkpoint>"
            )
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})
