"""Trained models at work: generated text, predictions in a file, held-out loss, and weights in narrow formats."""

from lightning_unitscale.inference.evaluation import held_out_loss
from lightning_unitscale.inference.generation import Generated, check_prompts, generate, generation_config
from lightning_unitscale.inference.narrow import WEIGHT_FORMATS, narrow_weights, stored_bytes
from lightning_unitscale.inference.prediction import PredictionWriter, finish, read_rows, rows_done

__all__ = [
    "WEIGHT_FORMATS",
    "Generated",
    "PredictionWriter",
    "check_prompts",
    "finish",
    "generate",
    "generation_config",
    "held_out_loss",
    "narrow_weights",
    "read_rows",
    "rows_done",
    "stored_bytes",
]
