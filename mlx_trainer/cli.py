"""`mlx-trainer`: reads the command line, calls the library, and turns errors into one paragraph and an exit code.

Exit codes: 0 done, 1 the training failed or `inspect --strict` has warnings, 2 something that the user gave is wrong,
129, 130 and 143 interrupted.

The options `--section.key` and their help come from the schema. The parser is the standard library's: tyro took 0.7 s
for the help of these options (this: 0.3 s), and could neither lay them over a file's values nor keep types strict.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from attrs import frozen

from mlx_trainer import __version__
from mlx_trainer.config import Config, ConfigError, ModelConfig, load_config, to_yaml, unwise
from mlx_trainer.config.arguments import Parser, add_options, dataset_of, overrides
from mlx_trainer.interruption import closed_output_ignored

PROGRAM = "mlx-trainer"
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
SHORT = {"model.model_name": "--model", "run.directory": "--output", "run.resume": "--resume"}

EXIT_CODES = {
    ("mlx_trainer.config", "ConfigError"): 2,
    ("mlx_trainer.data", "DataError"): 2,
    ("mlx_trainer.models", "ModelError"): 2,
    ("mlx_trainer.checkpoint", "CheckpointError"): 2,
    ("mlx_trainer.monitoring", "MonitoringError"): 2,
    ("mlx_trainer.trainer", "TrainingError"): 1,
    ("builtins", "OSError"): 2,
    ("builtins", "KeyboardInterrupt"): 130,
}

ALL = ("model", "lora", "training", "data", "evaluation", "run")
FILES = {
    "nargs": "*",
    "default": [],
    "metavar": "FILE",
    "help": "configurations (.yaml, .json; later ones win) and data files, with a weight as in chats.jsonl=0.5",
}
ADAPTER = {"metavar": "DIR", "help": "folder of a trained adapter, such as runs/chats/adapter"}
Given = Mapping[str, Any]


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


@frozen
class Command:
    """A command: what it does, its words for `--help`, the schema's sections it takes, and its own options."""

    run: Callable[[Given], int]
    help: str
    usage: str
    sections: Sequence[str]
    options: Mapping[str, Mapping[str, Any]]

    def parser(self, name: str) -> Parser:
        """Return the parser of this command."""
        parser = Parser(f"{PROGRAM} {name}", self.help, f"{PROGRAM} {name} {self.usage}")
        for option, words in self.options.items():
            parser.add_argument(option, **words)
        parser.add_argument("--traceback", action="store_true", help="show where an error came from")
        add_options(parser, self.sections, SHORT)
        return parser


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


def config_of(given: Given) -> Config:
    """Return defaults < files < command line; data files on the command line are `data.dataset_path`."""
    files, data = split_inputs(given["inputs"])
    values = overrides(given)
    if data:
        values["data.dataset_path"] = dataset_of(data)
    return load_config(*files, overrides=values)


def split_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the configurations and the data files among `inputs`, told apart by their endings."""
    files = [path for path in inputs if path.endswith(CONFIG_SUFFIXES)]
    return files, [path for path in inputs if path not in files]


def train(given: Given) -> int:
    """Train, or show what would be trained."""
    config = config_of(given)
    if "print_config" in given:
        print(to_yaml(config), end="")
        return 0
    from mlx_trainer import build

    build.train(config)
    return 0


def inspect(given: Given) -> int:
    """Print what the rows become in training; the code is 1 where --strict is given and there are warnings."""
    config, rows = config_of(given), given.get("rows", 2)
    if rows < 0:
        raise ConfigError(f"--rows is {rows}; it must be a whole number, at least 0")
    from mlx_trainer import build
    from mlx_trainer.data import show, warnings_of

    report = build.inspect(config, rows)
    if "json" in given:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(report)
    return int("strict" in given and bool(warnings_of(report)))


def benchmark(given: Given) -> int:
    """Print how fast a training is on this machine, beside mlx-lm's own trainer where --peer is given."""
    started = time.perf_counter()
    config = config_of(given)
    from mlx_trainer import benchmarking

    extent = benchmarking.Extent(given.get("steps"), given.get("warmup"))
    report: benchmarking.Report | benchmarking.Comparison
    if "rounds" in given and "peer" not in given:
        raise ConfigError("--rounds is for --peer, whose turns it counts")
    if "peer" in given:
        report = benchmarking.compare(config, extent, given.get("rounds", 1))
    else:
        report = benchmarking.measure(config, extent, started)
    if "json" in given:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(benchmarking.as_text(report))
    return 0


def validate_config(given: Given) -> int:
    """Tell whether a configuration can be used, and what in it is unwise."""
    config = config_of(given)
    for sentence in unwise(config):
        print(f"warning: {sentence}")
    print("The configuration is valid.")
    return 0


def evaluate(given: Given) -> int:
    """Print the loss and perplexity of a model on data files, or on the rows that a recipe holds back."""
    config = config_of(given)
    from mlx_trainer import build

    # Data files are meant whole; a recipe means the rows that its training holds back.
    metrics = build.evaluate(config, given.get("adapter"), whole=bool(split_inputs(given["inputs"])[1]))
    print(f"loss        {metrics.loss:.4f}")
    print(f"perplexity  {metrics.perplexity:.2f}")
    print(f"rows        {metrics.samples}")
    return 0


def generate(given: Given) -> int:
    """Print the answer to each prompt."""
    values: dict[str, Any] = {key.removeprefix("model."): value for key, value in overrides(given).items()}
    from mlx_trainer import build

    sampling = {"max_tokens": given.get("max_tokens", 100), "temperature": given.get("temperature", 0.0)}
    answers = build.generate(ModelConfig(**values), given["prompt"], given.get("adapter"), **sampling)
    print("\n\n".join(answers))
    return 0


COMMANDS = {
    "train": Command(
        train,
        "Fine-tune a model on data files, or as a recipe says.",
        "[FILE ...] [--model NAME] [--output DIR] [--section.key VALUE ...]",
        ALL,
        {
            "inputs": FILES,
            "--print-config": {"action": "store_true", "help": "print the resolved configuration and stop"},
        },
    ),
    "inspect": Command(
        inspect,
        "Print what the rows of data files become, before any training.",
        "FILE ... [--model NAME] [--json] [--strict] [--rows N] [--section.key VALUE ...]",
        ALL,  # so that the arguments of a training can be inspected as they stand
        {
            "inputs": FILES,
            "--json": {"action": "store_true", "help": "print one JSON object"},
            "--strict": {"action": "store_true", "help": "end with code 1 where there are warnings"},
            "--rows": {"type": int, "metavar": "N", "help": "rows to show with their trained tokens (default 2)"},
        },
    ),
    "benchmark": Command(
        benchmark,
        "Train into nowhere for a while, and print speed, memory and where the time goes.",
        "[FILE ...] [--model NAME] [--steps N] [--warmup N] [--json] [--peer [--rounds N]] [--section.key VALUE ...]",
        ALL,
        {
            "inputs": FILES,
            "--steps": {"type": int, "metavar": "N", "help": "steps to measure (default: for about 30 s)"},
            "--warmup": {
                "type": int,
                "metavar": "N",
                "help": "steps before these (default: until every shape of batches is compiled, at most an epoch)",
            },
            "--json": {"action": "store_true", "help": "print one JSON object"},
            "--peer": {"action": "store_true", "help": "compare with mlx-lm's own trainer, in turns"},
            "--rounds": {
                "type": int,
                "metavar": "N",
                "help": "turns of each that count, the median told (default 1)",
            },
        },
    ),
    "validate-config": Command(
        validate_config,
        "Check a configuration: errors end with code 2, unwise settings are told.",
        "FILE ... [--section.key VALUE ...]",
        ALL,
        {"inputs": FILES},
    ),
    "evaluate": Command(
        evaluate,
        "Print loss and perplexity on data files, or on the rows that a recipe holds back.",
        "FILE ... [--model NAME] [--adapter DIR] [--section.key VALUE ...]",
        ("model", "data"),
        {"inputs": FILES, "--adapter": ADAPTER},
    ),
    "generate": Command(
        generate,
        "Print a model's answer to a prompt.",
        "--prompt TEXT [--model NAME] [--adapter DIR]",
        ("model",),
        {
            "--prompt": {"action": "append", "required": True, "metavar": "TEXT", "help": "what to answer; repeatable"},
            "--adapter": ADAPTER,
            "--max-tokens": {"type": int, "metavar": "N", "help": "most tokens of an answer (default 100)"},
            "--temperature": {"type": float, "metavar": "X", "help": "0 takes the likeliest tokens (default 0)"},
        },
    ),
}
