"""The commands of `mlx-trainer`, each a call of the library, by name and in the order in which its help lists them."""

from mlx_trainer.commands import answering, merging, publishing, training, using
from mlx_trainer.commands.command import PROGRAM, Command

COMMANDS = training.COMMANDS | using.COMMANDS | answering.COMMANDS | merging.COMMANDS | publishing.COMMANDS

__all__ = ["COMMANDS", "PROGRAM", "Command"]
