"""`unitscale scaleout`: a plan adds no communication to a step, and takes next to no memory to make."""

from __future__ import annotations

import pytest
import torch

from lightning_unitscale.cookbook.measuring.communication import fake_mesh, narrow, spread_steps
from lightning_unitscale.cookbook.measuring.scale_out import planning_cost
from lightning_unitscale.errors import InputError

LAYERS = 2
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8}


@pytest.mark.parametrize(("data", "tensor", "storage"), [(4, 1, "folded"), (2, 4, "unit")])
def test_a_prepared_step_sends_what_an_untouched_one_does(data: int, tensor: int, storage: str) -> None:
    plain, scaled = spread_steps(CONFIG, data, tensor, "umup", storage)
    assert scaled.collectives == plain.collectives
    assert scaled.resident == plain.resident
    if tensor == 1:  # layers and the rest: gathered for each pass, but what stays gathered in between; reduced once
        assert plain.collectives["_reduce_scatter_base_"] == LAYERS + 1


def test_another_communication_would_be_counted() -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    with fake_mesh(4, 1), CommDebugMode() as counted:
        torch.distributed.all_reduce(torch.ones(1))
    assert counted.get_total_counts() == 1


def test_what_can_not_be_split_says_so() -> None:
    with pytest.raises(InputError, match="no plan for tensor parallelism"):
        spread_steps({**CONFIG, "model_type": "gpt_bigcode", "n_head": 8}, 1, 2, "umup", "folded")


def test_planning_on_meta_leaves_alone_what_needs_nothing() -> None:
    config = {**narrow(CONFIG), "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
    cost = planning_cost(config, 16, "umup", "folded")
    assert cost.parameters > 6e8
    assert cost.left_alone == CONFIG["num_hidden_layers"]  # attention logits: the model's own constant is the scheme's
