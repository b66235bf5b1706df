"""Text as bytes: Python's own standard library, or files of yours."""

import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MOST = 4_000_000  # bytes


class Crops(Dataset[Tensor]):
    """Pieces of a text, one after the other."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return len(self.text) // self.length

    def __getitem__(self, number: int) -> Tensor:
        return self.text[number * self.length :][: self.length].long()


class TextFiles(pl.LightningDataModule):
    """All files below a folder that match a pattern; the last tenth of each is held out."""

    def __init__(self, folder: str | None, pattern: str, length: int, batch_size: int) -> None:
        super().__init__()
        self.folder = Path(folder or sysconfig.get_path("stdlib")).expanduser()
        self.pattern, self.length, self.batch_size = pattern, length, batch_size

    def setup(self, stage: str) -> None:
        training, held_out = bytearray(), bytearray()
        for file in sorted(self.folder.glob(self.pattern)):
            text = file.read_bytes()[:MOST] if file.is_file() else b""
            training += text[: 9 * len(text) // 10]
            held_out += text[9 * len(text) // 10 :]
            if len(training) >= MOST:
                break
        if len(held_out) < 10 * self.length:
            raise ValueError(f"too little text in {self.folder}/{self.pattern}: {len(training) + len(held_out)} bytes")
        self.training, self.held_out = (
            Crops(torch.frombuffer(part, dtype=torch.uint8), self.length) for part in (training, held_out)
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.training, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.held_out, self.batch_size)
