"""The commands of `mlx-trainer`: what each takes, and the call of the library that it stands for.

The options `--section.key` and their help come from the schema. The parser is the standard library's: tyro took 0.7 s
for the help of these options (this: 0.3 s), and could neither lay them over a file's values nor keep types strict.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from mlx_trainer.config import Config, ConfigError, ModelConfig, load_config, to_yaml, unwise
from mlx_trainer.config.arguments import Parser, add_options, dataset_of, overrides

PROGRAM = "mlx-trainer"
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
SHORT = {"model.model_name": "--model", "run.directory": "--output", "run.resume": "--resume"}

ALL = ("model", "lora", "training", "data", "evaluation", "run")
FILES = {
    "nargs": "*",
    "default": [],
    "metavar": "FILE",
    "help": "configurations (.yaml, .json; later ones win) and data files, with a weight as in chats.jsonl=0.5",
}
ADAPTER = {"metavar": "DIR", "help": "folder of a trained adapter, such as runs/chats/adapter"}
Given = Mapping[str, Any]


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


def config_of(given: Given) -> Config:
    """Return defaults < files < command line; data files on the command line are `data.dataset_path`."""
    files, data = split_inputs(given["inputs"])
    values = overrides(given)
    if "ledger" in given:
        values["run.ledger"] = True
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


def replay(given: Given) -> int:
    """Print a step of a run as it was: its rows, their losses, the gradient in each layer."""
    from mlx_trainer import replaying

    step = replaying.replay(given["run"], given["step"])
    if "json" in given:
        print(json.dumps(step.as_dict(), indent=2, ensure_ascii=False))
    else:
        replaying.show(step, given.get("rows", 2))
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
            "--ledger": {"action": "store_true", "help": "short for --run.ledger true"},
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
    "replay": Command(
        replay,
        "Take a step of a run again, and show the loss of each of its rows and each layer's gradient.",
        "RUN_FOLDER --step N [--rows N] [--json]",
        (),
        {
            "run": {"metavar": "RUN_FOLDER", "help": "folder of the run, such as runs/chats"},
            "--step": {"type": int, "required": True, "metavar": "N", "help": "which step, from 1"},
            "--rows": {"type": int, "metavar": "N", "help": "texts to show, highest loss first (default 2)"},
            "--json": {"action": "store_true", "help": "print one JSON object, every text in it"},
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
