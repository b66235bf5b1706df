"""Checkpoints that are there as a whole or not at all.

Lightning (2.6) writes a checkpoint to the system's folder for temporary files and moves it; where that is another file
system the move is a copy, and a disk that is full in the middle of it leaves a part under the final name. Here the file
is written beside its place, brought to the disk, and renamed, in runs without unit scaling too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_unitscale.whole_checkpoints import beside


class WholeFiles(TorchCheckpointIO):
    """Lightning's own way to keep checkpoints, but for how a local file is written."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """
        Raises:
            OSError: the file can't be written; the one that was there before is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(dict(checkpoint), path, storage_options)
            return
        content = io.BytesIO()  # torch.save's own file writer hides why it failed
        torch.save(dict(checkpoint), content)
        with beside(Path(path)) as part, part.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
