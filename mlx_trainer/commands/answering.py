"""The commands that answer: prompts from the command line or a file, and a conversation."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_trainer.commands.command import ADAPTER, Command, Given
from mlx_trainer.config import ConfigError, ModelConfig
from mlx_trainer.config.arguments import overrides

if TYPE_CHECKING:
    from mlx_trainer.models import CausalLMModule
    from mlx_trainer.prompts import Prompt

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--system": {"metavar": "TEXT", "help": "system text before each prompt"},
    "--max-tokens": {"type": int, "metavar": "N", "help": "most tokens of an answer (default 256)"},
    "--temperature": {"type": float, "metavar": "X", "help": "0 takes the likeliest tokens (default 0)"},
    "--top-p": {
        "type": float,
        "metavar": "X",
        "help": "draw from the likeliest tokens of this probability (default 1)",
    },
    "--min-p": {"type": float, "metavar": "X", "help": "and from those with this share of the likeliest's (default 0)"},
    "--repetition-penalty": {"type": float, "metavar": "X", "help": "above 1, say less again (default 1)"},
    "--timeout": {"type": float, "metavar": "S", "help": "most seconds of an answer (default: no limit)"},
    "--stop": {"action": "append", "metavar": "TEXT", "help": "end before this text; repeatable"},
    "--seed": {"type": int, "metavar": "N", "help": "of what is drawn (default 42)"},
}
SAMPLING = ("system", "max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "stop", "seed")


def generate(given: Given) -> int:
    """Print the answer to each prompt; piece by piece where there is one, and a terminal."""
    from mlx_trainer.prompts import read_prompts

    asked: list[tuple[Prompt, str | None]] = [(prompt, None) for prompt in given.get("prompt", [])]
    asked += [each for path in given.get("prompts", []) for each in read_prompts(Path(path))]
    if not asked:
        raise ConfigError("there is nothing to answer; give --prompt TEXT or --prompts FILE")
    module, options = module_of(given), options_of(given)
    if len(asked) == 1 and sys.stdout.isatty() and "json" not in given:
        from mlx_trainer.chat import show_stream

        show_stream(module.stream(asked[0][0], **options))
        return 0
    size = {"batch_size": given["batch_size"]} if "batch_size" in given else {}
    answers = module.answers([prompt for prompt, _ in asked], **size, **options)
    for number, ((prompt, reference), text) in enumerate(zip(asked, answers, strict=True)):
        if "json" in given:
            entry = {"prompt": prompt, "generated_text": text, "reference": reference}
            print(json.dumps(entry, ensure_ascii=False), flush=True)
        else:
            print(("\n" if number else "") + text, flush=True)
    return 0


def chat(given: Given) -> int:
    """Talk with a model, with --compare also with its base model beside it."""
    if "compare" in given and "adapter" not in given:
        raise ConfigError("--compare shows a model with and without its adapter; give --adapter DIR")
    module, options = module_of(given), options_of(given)
    from mlx_trainer.chat import Talk, converse
    from mlx_trainer.models.lora import adapted_layers

    talks = [Talk("with the adapter", module, options)]
    if "compare" in given:
        if not adapted_layers(module.model):
            raise ConfigError(f"{given['adapter']} holds all weights and no adapter, so --compare has no base to show")
        talks.insert(0, Talk("without", module, options, bare=True))
    return converse(talks)


def module_of(given: Given) -> "CausalLMModule":
    """The model that is meant, ready to answer; with an adapter and no name, the adapter's own base."""
    from mlx_trainer import trained

    values: dict[str, Any] = {key.removeprefix("model."): value for key, value in overrides(given).items()}
    adapter = given.get("adapter")
    if adapter is not None and "model_name" not in values and (base := trained.base_name(Path(adapter))) is not None:
        values["model_name"] = base
    return trained.answering(ModelConfig(**values), adapter)


def options_of(given: Given) -> dict[str, Any]:
    """The options of `module.generate` that were given."""
    timeout = {"timeout_s": given["timeout"]} if "timeout" in given else {}
    return {name: given[name] for name in SAMPLING if name in given} | timeout


COMMANDS = {
    "generate": Command(
        generate,
        "Print a model's answers to prompts.",
        "--prompt TEXT | --prompts FILE [--model NAME] [--adapter DIR] [--system TEXT] [--temperature X] [--json] ...",
        ("model",),
        {
            "--prompt": {"action": "append", "metavar": "TEXT", "help": "what to answer; repeatable"},
            "--prompts": {
                "action": "append",
                "metavar": "FILE",
                "help": "a prompt on each line; of .jsonl, rows with prompt or messages",
            },
            "--adapter": ADAPTER,
            **OPTIONS,
            "--batch-size": {"type": int, "metavar": "N", "help": "prompts that are answered at once (default 8)"},
            "--json": {"action": "store_true", "help": "print one JSON object a line: prompt, answer, reference"},
        },
    ),
    "chat": Command(
        chat,
        "Talk with a model in the terminal, with --compare beside its base model.",
        "[--adapter DIR [--compare]] [--model NAME] [--system TEXT] [--temperature X] ...",
        ("model",),
        {
            "--adapter": ADAPTER,
            "--compare": {"action": "store_true", "help": "answer without and with the adapter, side by side"},
            **OPTIONS,
        },
    ),
}
