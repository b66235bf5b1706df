"""What the tests of fine-tuning share: small settings, a small model in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unitscale.cookbook.data import IGNORED

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
QUICK = [
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2",
    "+trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "schedule.warmup_steps=1",
    "data.batch_size=2",
    "logger=csv",
    "optimizer.lr=1e-2",
]
TEXT = [*QUICK, "task.sequence_length=16", "data.documents._target_=lightning_unitscale.cookbook.data.python_topics"]


LORA = ["lora=all_linear", "lora.r=2"]


def words(folder: Path) -> list[str]:
    """Settings of a text classification that is easy to learn, on a file in the folder."""
    rows = ["text,label"] + [f"{word} {number},{word}" for number in range(20) for word in ("sun", "rain")]
    (folder / "a.csv").write_text("\n".join(rows))
    return [
        "experiment=text_classification",
        "data=labelled_file",
        "data.path=a.csv",
        "data.held_out=0.2",
        *QUICK,
        "task.sequence_length=16",
        "trainer.max_steps=12",
        "trainer.val_check_interval=6",
    ]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


OF_TOKENS = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
OTHER_HEADS = {
    "AutoModelForMaskedLM": {**OF_TOKENS, "labels": TOKENS.where(TOKENS % 5 == 0, IGNORED)},
    "AutoModelForTokenClassification": {**OF_TOKENS, "labels": TOKENS % 3},
    "AutoModelForQuestionAnswering": {
        **OF_TOKENS,
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    },
    "AutoModelForMultipleChoice": {"input_ids": torch.stack([TOKENS, TOKENS.flip(0)]), "labels": torch.tensor([0, 1])},
}


class Batches(pl.LightningDataModule):
    """What a user might have: the same batches for training, validation and test."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head

    def train_dataloader(self) -> Any:
        return DataLoader([OTHER_HEADS[self.head]] * 100, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader([OTHER_HEADS[self.head]] * 2, batch_size=None)

    test_dataloader = val_dataloader


def any_head(head: str) -> list[str]:
    """Settings of a run on these batches."""
    return ["task=any_head", "data=module", f"data.module._target_={__name__}.Batches", f"+data.module.head={head}"]
