"""The commands around a training: what it would be, itself, how fast it is, and a step of it again."""

import json
import time

from mlx_trainer.commands.command import ALL, FILES, Command, Given, config_of
from mlx_trainer.config import ConfigError, to_yaml, unwise


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


COMMANDS = {
    "train": Command(
        train,
        "Fine-tune a model on data files, or as a recipe says.",
        "[FILE ...] [--model NAME] [--adapter DIR] [--output DIR] [--section.key VALUE ...]",
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
}
