"""The commands of `mlx-trainer`, each a call of the library, by name and in the order in which its help lists them."""

from mlx_trainer.commands import sharing, training, using
from mlx_trainer.commands.command import PROGRAM, Command

COMMANDS = training.COMMANDS | using.COMMANDS | sharing.COMMANDS

__all__ = ["COMMANDS", "PROGRAM", "Command"]
