"""What models are trained for: one file a task, with its data, its scores and its predictions."""

from lightning_unitscale.cookbook.tasks.image_classification import ImageClassification
from lightning_unitscale.cookbook.tasks.language_modeling import LanguageModeling
from lightning_unitscale.cookbook.tasks.sequence_to_sequence import SequenceToSequence
from lightning_unitscale.cookbook.tasks.task import Task
from lightning_unitscale.cookbook.tasks.text_classification import TextClassification
from lightning_unitscale.cookbook.tasks.text_generation import TextGeneration

__all__ = [
    "ImageClassification",
    "LanguageModeling",
    "SequenceToSequence",
    "Task",
    "TextClassification",
    "TextGeneration",
]
