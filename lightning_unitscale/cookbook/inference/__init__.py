"""Trained models at work: generated text, predictions in a file, and held-out scores."""

from lightning_unitscale.cookbook.inference.evaluation import held_out_scores
from lightning_unitscale.cookbook.inference.generation import Generated, check_prompts, generate, generation_config
from lightning_unitscale.cookbook.inference.prediction import PredictionWriter, finish, read_rows, rows_done

__all__ = [
    "Generated",
    "PredictionWriter",
    "check_prompts",
    "finish",
    "generate",
    "generation_config",
    "held_out_scores",
    "read_rows",
    "rows_done",
]
