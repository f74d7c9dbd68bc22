"""The commands that measure a model, with what was trained or without."""

from mlx_trainer.commands.command import ADAPTER, FILES, Command, Given, config_of, split_inputs


def evaluate(given: Given) -> int:
    """Print the loss and perplexity of a model on data files, or on the rows that a recipe holds back.

    Where the recipe is for preferences: the loss, how often the chosen answer has the higher reward, and by how much.
    """
    config = config_of(given)
    from mlx_trainer import trained

    # Data files are meant whole; a recipe means the rows that its training holds back.
    metrics = trained.evaluate(config, given.get("adapter"), whole=bool(split_inputs(given["inputs"])[1]))
    print(f"loss        {metrics.loss:.4f}")
    if config.training.on_preferences:
        print(f"accuracy    {metrics.metrics['rewards/accuracies']:.4f}")
        print(f"margin      {metrics.metrics['rewards/margins']:.4f}")
    else:
        print(f"perplexity  {metrics.perplexity:.2f}")
    print(f"rows        {metrics.samples}")
    return 0


COMMANDS = {
    "evaluate": Command(
        evaluate,
        "Print loss and perplexity (of preferences accuracy and margin) on data files, or on rows a recipe holds back.",
        "FILE ... [--model NAME] [--adapter DIR] [--section.key VALUE ...]",
        ("model", "data"),
        {"inputs": FILES, "--adapter": ADAPTER},
    ),
}
