"""What a command of `mlx-trainer` is, and what several of them take.

The options `--section.key` and their help come from the schema. The parser is the standard library's: tyro took 0.7 s
for the help of these options (this: 0.3 s), and could neither lay them over a file's values nor keep types strict.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from mlx_trainer.config import Config, load_config
from mlx_trainer.config.arguments import Parser, add_options, dataset_of, overrides

PROGRAM = "mlx-trainer"
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
SHORT = {
    "model.model_name": "--model",
    "training.adapter": "--adapter",
    "run.directory": "--output",
    "run.resume": "--resume",
}

ALL = ("model", "lora", "adalora", "training", "preference", "data", "evaluation", "run")
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
    """Return defaults < files < command line; data files on the command line are `data.dataset_path`.

    Without a file, an adapter to begin at says which model and which `lora` it is for.
    """
    files, data = split_inputs(given["inputs"])
    values = overrides(given)
    if not files and "training.adapter" in values:
        from mlx_trainer import start

        values = start.settings_of(Path(str(values["training.adapter"]))) | values
    if "ledger" in given:
        values["run.ledger"] = True
    if data:
        values["data.dataset_path"] = dataset_of(data)
    return load_config(*files, overrides=values)


def split_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the configurations and the data files among `inputs`, told apart by their endings."""
    files = [path for path in inputs if path.endswith(CONFIG_SUFFIXES)]
    return files, [path for path in inputs if path not in files]
