"""Rows to batches: JSONL in, padded ids and labels out, with every answer's tokens trained and nothing else."""

from mlx_trainer.data.batches.loader import BatchLoader
from mlx_trainer.data.batches.padded import IGNORED, Batch, BatchMetadata, collate
from mlx_trainer.data.batches.plan import plan, split
from mlx_trainer.data.batches.shapes import Budget
from mlx_trainer.data.batches.unpadded import UnpaddedBatch
from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.example import Example, render, show_examples
from mlx_trainer.data.pipeline import DataPipeline
from mlx_trainer.data.report import DataReport, report_on, show, warnings_of
from mlx_trainer.data.samples.conversation import (
    Conversation,
    DataError,
    Message,
    Preference,
    PromptCompletion,
    RowError,
    Text,
    Tool,
    ToolCall,
)
from mlx_trainer.data.samples.fields import text_at
from mlx_trainer.data.samples.formats import register_format
from mlx_trainer.data.summary import DataSummary

__all__ = [
    "IGNORED",
    "Batch",
    "BatchLoader",
    "BatchMetadata",
    "Budget",
    "Conversation",
    "DataError",
    "DataPipeline",
    "DataReport",
    "DataSummary",
    "Example",
    "Message",
    "Preference",
    "PromptCompletion",
    "RowError",
    "SampleEncoder",
    "Text",
    "Tool",
    "ToolCall",
    "UnpaddedBatch",
    "collate",
    "plan",
    "register_format",
    "render",
    "report_on",
    "show",
    "show_examples",
    "split",
    "text_at",
    "warnings_of",
]
