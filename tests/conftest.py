"""What every test shares: its own place for MLX's compiled kernels would slow it down, so only randomness is reset."""

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def _fresh_randomness() -> None:
    mx.random.seed(0)
