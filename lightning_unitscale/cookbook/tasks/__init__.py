"""What pretrained models are fine-tuned for: one LightningModule a task, all around models of transformers."""

from lightning_unitscale.cookbook.tasks.classification import Classification
from lightning_unitscale.cookbook.tasks.fine_tuning import FineTuning
from lightning_unitscale.cookbook.tasks.language_modeling import LanguageModeling
from lightning_unitscale.cookbook.tasks.sequence_to_sequence import SequenceToSequence

__all__ = ["Classification", "FineTuning", "LanguageModeling", "SequenceToSequence"]
