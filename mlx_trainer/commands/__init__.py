"""The commands of `mlx-trainer`, each a call of the library, by name and in the order in which its help lists them."""

from mlx_trainer.commands import answering, merging, publishing, sharing, training, using
from mlx_trainer.commands.command import PROGRAM, Command

ROOMS = (training, using, answering, sharing, merging, publishing)
COMMANDS: dict[str, Command] = {name: command for room in ROOMS for name, command in room.COMMANDS.items()}

__all__ = ["COMMANDS", "PROGRAM", "Command"]
