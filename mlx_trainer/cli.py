"""`mlx-trainer`: finds the command, and turns errors into one paragraph and an exit code.

Exit codes: 0 done, 1 the training failed or `inspect --strict` has warnings, 2 something that the user gave is wrong,
129, 130 and 143 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from mlx_trainer import __version__
from mlx_trainer.commands import COMMANDS, PROGRAM
from mlx_trainer.config import ConfigError
from mlx_trainer.interruption import closed_output_ignored

EXIT_CODES = {
    ("mlx_trainer.config", "ConfigError"): 2,
    ("mlx_trainer.data", "DataError"): 2,
    ("mlx_trainer.models", "ModelError"): 2,
    ("mlx_trainer.prompts", "PromptError"): 2,
    ("mlx_trainer.checkpoint", "CheckpointError"): 2,
    ("mlx_trainer.monitoring", "MonitoringError"): 2,
    ("mlx_trainer.trainer", "TrainingError"): 1,
    ("builtins", "OSError"): 2,
    ("builtins", "KeyboardInterrupt"): 130,
}


@closed_output_ignored()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error that nobody foresaw keeps its traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    developing = os.environ.get("MLX_TRAINER_TRACEBACK") == "1" or "--traceback" in given
    try:
        return dispatch([argument for argument in given if argument != "--traceback"])
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        if developing or code is None:
            raise
        print(f"{PROGRAM}: {describe(error)}", file=sys.stderr)
        return code


def exit_code(error: BaseException) -> int | None:
    """Return the exit code that stands for an error, None for one that nobody foresaw."""
    for (module, name), code in EXIT_CODES.items():
        # An error can only have come from a room that was imported; importing the others here would cost seconds.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return code
    return None


def describe(error: BaseException) -> str:
    """Return an error as one paragraph; one from the operating system begins with its path."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"{name} is not a command; {hint}")
    command = COMMANDS[name]
    return command.run(command.parser(name).given(arguments[1:]))


def overview() -> str:
    """Return the help of the program itself."""
    commands = "\n".join(f"  {name:<17}{command.help}" for name, command in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND ...

Fine-tune a language model on your own JSONL.

{commands}

  {PROGRAM} train chats.jsonl --model mistralai/Mistral-7B-Instruct-v0.3
  {PROGRAM} train recipe.yaml --training.learning_rate 1e-4 --lora.rank 8

`{PROGRAM} COMMAND --help` lists the options of a command; --version tells the version."""
