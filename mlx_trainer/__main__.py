"""`python -m mlx_trainer` is `mlx-trainer`."""

import sys

from mlx_trainer.cli import main


def program() -> int:
    """Run a command in a process of its own.

    PyTorch is hidden from it: transformers would import it where it is installed, for a second and more, and use
    nothing of it here. In a user's own process it must not be hidden.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # what is None there cannot be imported
    return main()


if __name__ == "__main__":
    sys.exit(program())
