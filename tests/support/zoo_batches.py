"""Inputs of tiny models, each the same from the same seed, and their losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import zoo_modules as own

Batch = dict[str, Tensor]

BATCH = 4
LENGTH = 16
VOCAB, CLASSES = own.VOCAB, own.CLASSES
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 3


def _words(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (BATCH, length), generator=generator)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def next_token_batch(seed: int) -> Batch:
    """Labels are the inputs moved by one, for models that do not shift them themselves."""
    ids = _words(_generator(seed), LENGTH + 1)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def causal_batch(seed: int) -> Batch:
    ids = _words(_generator(seed))
    return {"input_ids": ids, "labels": ids}


def masked_batch(seed: int) -> Batch:
    """Every fourth position is to be filled in; the last row is padded by a quarter."""
    ids = _words(_generator(seed))
    attention_mask = torch.ones_like(ids)
    attention_mask[-1, -LENGTH // 4 :] = 0
    asked = torch.zeros_like(ids, dtype=torch.bool)
    asked[:, ::4] = True
    return {
        "input_ids": ids.masked_fill(asked, EOS).masked_fill(attention_mask == 0, PAD),
        "attention_mask": attention_mask,
        "labels": ids.masked_fill(~asked | (attention_mask == 0), -100),
    }


def translation_batch(seed: int) -> Batch:
    generator = _generator(seed)
    source, target = _words(generator), _words(generator, LENGTH // 2)
    attention_mask = torch.ones_like(source)
    attention_mask[-1, -LENGTH // 4 :] = 0
    return {
        "input_ids": source.masked_fill(attention_mask == 0, PAD),
        "attention_mask": attention_mask,
        "labels": target,
    }


def speech_batch(seed: int) -> Batch:
    generator = _generator(seed)
    return {
        "input_features": torch.randn(BATCH, 8, 2 * LENGTH, generator=generator),
        "labels": _words(generator, LENGTH // 2),
    }


def pixels_batch(seed: int, size: int = 16) -> Batch:
    """Images and classes under the names ``transformers`` gives them."""
    generator = _generator(seed)
    return {
        "pixel_values": torch.randn(BATCH, 3, size, size, generator=generator),
        "labels": torch.randint(CLASSES, (BATCH,), generator=generator),
    }


def image_batch(seed: int) -> Batch:
    generator = _generator(seed)
    return {
        "image": torch.randn(BATCH, 3, 16, 16, generator=generator),
        "time": torch.rand(BATCH, generator=generator),
        "label": torch.randint(CLASSES, (BATCH,), generator=generator),
    }


def vector_batch(seed: int) -> Batch:
    generator = _generator(seed)
    return {
        "x": torch.randn(2 * BATCH, 48, generator=generator),
        "label": torch.randint(CLASSES, (2 * BATCH,), generator=generator),
    }


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


def vector_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"])


def image_reconstruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["image"]), batch["image"])


def velocity_loss(model: nn.Module, batch: Batch) -> Tensor:
    """A flow-matching target that needs no second random draw."""
    return F.mse_loss(model(batch["image"], batch["time"]), batch["image"].flip(0) - batch["image"])


def code_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Calls ``encode`` and ``decode``, never ``forward``."""
    return F.mse_loss(model.decode(model.encode(batch["x"])), batch["x"])


def transformers_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss
