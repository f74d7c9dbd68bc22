"""Lines for people."""

from mlx_trainer.monitoring.console import stderr_console


def say(line: str) -> None:
    """Print one line on stderr, above a bar that is drawn there."""
    stderr_console().print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
