"""Rows to batches: JSONL in, padded ids and labels out, with every answer's tokens trained and nothing else."""

from mlx_trainer.data.batch import IGNORED, Batch, BatchMetadata, collate
from mlx_trainer.data.conversation import Conversation, DataError, Message, PromptCompletion, RowError, Text
from mlx_trainer.data.encoding import SampleEncoder
from mlx_trainer.data.example import Example, render, show_examples
from mlx_trainer.data.formats import register_format
from mlx_trainer.data.loader import BatchLoader
from mlx_trainer.data.pipeline import DataPipeline
from mlx_trainer.data.plan import plan, split
from mlx_trainer.data.report import DataReport, report_on, show, warnings_of
from mlx_trainer.data.summary import DataSummary

__all__ = [
    "IGNORED",
    "Batch",
    "BatchLoader",
    "BatchMetadata",
    "Conversation",
    "DataError",
    "DataPipeline",
    "DataReport",
    "DataSummary",
    "Example",
    "Message",
    "PromptCompletion",
    "RowError",
    "SampleEncoder",
    "Text",
    "collate",
    "plan",
    "register_format",
    "render",
    "report_on",
    "show",
    "show_examples",
    "split",
    "warnings_of",
]
