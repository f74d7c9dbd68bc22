from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Nothing in this folder depends on compilation, and on a CPU each fused kernel costs a second of C++ compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()
