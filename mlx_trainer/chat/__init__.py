"""A conversation in a terminal, with one model or with two side by side."""

from mlx_trainer.chat.loop import converse
from mlx_trainer.chat.screen import show_stream
from mlx_trainer.chat.talk import Talk

__all__ = ["Talk", "converse", "show_stream"]
