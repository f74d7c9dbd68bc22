"""The commands that use a model, with what was trained or without: its loss, its answers."""

from typing import Any

from mlx_trainer.commands.command import ADAPTER, FILES, Command, Given, config_of, split_inputs
from mlx_trainer.config import ModelConfig
from mlx_trainer.config.arguments import overrides


def evaluate(given: Given) -> int:
    """Print the loss and perplexity of a model on data files, or on the rows that a recipe holds back.

    Where the recipe is for preferences: the loss, how often the chosen answer has the higher reward, and by how much.
    """
    config = config_of(given)
    from mlx_trainer import build

    # Data files are meant whole; a recipe means the rows that its training holds back.
    metrics = build.evaluate(config, given.get("adapter"), whole=bool(split_inputs(given["inputs"])[1]))
    print(f"loss        {metrics.loss:.4f}")
    if config.training.on_preferences:
        print(f"accuracy    {metrics.metrics['rewards/accuracies']:.4f}")
        print(f"margin      {metrics.metrics['rewards/margins']:.4f}")
    else:
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
