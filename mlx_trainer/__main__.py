"""`python -m mlx_trainer` is `mlx-trainer`."""

import sys

from mlx_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
