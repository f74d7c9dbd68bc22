"""The commands that hand over what was trained to other programs."""

from functools import partial
from pathlib import Path

from mlx_trainer.commands.command import ADAPTER, Command, Given
from mlx_trainer.config import ConfigError

LOADING = ("dtype", "revision", "cache_dir")
"""Options that say how the base model is loaded for the check."""


def export(given: Given) -> int:
    """Write an adapter in another layout, and tell that it computes the same."""
    from mlx_trainer.export import peft

    if "plain" in given and given["to"] != "peft":
        raise ConfigError("--plain is for --to peft: mlx-lm's layout always has one rank and one scale")
    convert = partial(peft.to_peft, plain="plain" in given) if given["to"] == "peft" else peft.from_peft
    loading = {name: given[name] for name in LOADING if name in given}
    adapter, output = Path(given["adapter"]), Path(given["output"])
    print(convert(adapter, output, given.get("model"), check="no_check" not in given, **loading))
    return 0


COMMANDS = {
    "export": Command(
        export,
        "Write an adapter as PEFT reads it, or one of PEFT's as mlx-lm does, and compare the logits.",
        "ADAPTER OUTPUT --to peft|mlx [--model NAME] [--plain] [--no-check]",
        (),
        {
            "adapter": ADAPTER,
            "output": {"metavar": "OUTPUT", "help": "new or empty folder that it is written to"},
            "--to": {"required": True, "choices": ("peft", "mlx"), "help": "the layout: PEFT's, or mlx-lm's"},
            "--plain": {
                "action": "store_true",
                "help": "one rank and alpha, no rsLoRA: for programs that read no more of PEFT, such as llama.cpp",
            },
            "--model": {"metavar": "NAME", "help": "its base model (default: the one that the adapter names)"},
            "--dtype": {
                "choices": ("float32", "float16", "bfloat16"),
                "help": "type the base is held in for the check (default float32; 16 bits take half the memory)",
            },
            "--revision": {"metavar": "NAME", "help": "branch, tag or commit of the base on the Hub"},
            "--cache-dir": {"metavar": "DIR", "help": "Hugging Face cache that the base is in"},
            "--no-check": {"action": "store_true", "help": "do not load the base model to compare the logits"},
        },
    ),
}
