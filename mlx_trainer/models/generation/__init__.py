"""Answers to prompts: how a token is chosen, where an answer ends, and several answers at once."""

from mlx_trainer.models.generation.answer import Answer, stop_ids
from mlx_trainer.models.generation.options import Options
from mlx_trainer.models.generation.writer import Pieces, Writer
from mlx_trainer.prompts import Prompt

__all__ = ["Answer", "Options", "Pieces", "Prompt", "Writer", "stop_ids"]
