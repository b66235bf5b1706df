"""Models that the tests of several recipes begin from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.finetuning import SMALL, TEXT
from support.recipe_runs import run_recipe
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from lightning_unitscale.cookbook.tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a language model on bytes, as transformers writes it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=257, bos_token_id=256, max_position_embeddings=32, **SMALL)
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a masked language model on bytes, whose classifier is not there yet."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig(vocab_size=257, max_position_embeddings=32, **SMALL)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`unitscale finetune` as it is by default, only smaller: it first pretrains a base under umup."""
    base = ["experiment=tiny", "trainer.enable_progress_bar=false"]
    return run_recipe("finetune", tmp_path_factory.mktemp("continued"), *TEXT, f"model.base={base}".replace(" ", ""))
