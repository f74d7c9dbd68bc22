"""What every test shares."""

import os

# The workers of pytest-xdist share two cores, and OpenBLAS's waiting threads spin; read when mlx_trainer is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # cores are shared: a single slow example means nothing
settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MLX_TRAINER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _fresh_randomness() -> None:
    mx.random.seed(0)
