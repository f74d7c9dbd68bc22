"""Small arrays as few flat ones."""

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from mlx.utils import tree_flatten

from mlx_trainer import joined
from mlx_trainer.joined import Joined

SHAPES = st.lists(arrays_of.array_shapes(max_dims=3, max_side=9), min_size=1, max_size=12)


def numbered(shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype]) -> Any:
    """A tree of arrays, each of numbers of its own."""
    made = [(mx.random.uniform(shape=shape) + i).astype(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    return {"first": made[:1], "others": {str(i): array for i, array in enumerate(made[1:])}}


@given(SHAPES)
def test_the_tree_comes_back_bit_for_bit(shapes: list[tuple[int, ...]]) -> None:
    """Of any shapes and of several types, and each type stays."""
    tree = numbered(shapes, [mx.float32, mx.bfloat16])
    back, expected = dict(tree_flatten(Joined.of(tree).tree())), dict(tree_flatten(tree))
    assert back.keys() == expected.keys()
    for name, array in expected.items():
        assert (back[name].shape, back[name].dtype) == (array.shape, array.dtype)
        assert mx.array_equal(back[name], array).item()


def test_small_arrays_of_one_type_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there are enough numbers; large ones, and those that would leave others at odd addresses, stand alone."""
    monkeypatch.setattr(joined, "SMALL", 64)
    monkeypatch.setattr(joined, "ENOUGH", 100)
    shapes = [(8, 8), (2, 4), (5, 16), (3,), (8,), (8, 8), (8, 8)]
    together = Joined.of(numbered(shapes, [mx.float32]))
    assert [array.size for array in together.arrays] == [64 + 8 + 8 + 64, 80, 3, 64]
    half = Joined.of(numbered([(8,), (8,), (8,)], [mx.float32, mx.float16]))
    assert [(array.size, array.dtype) for array in half.arrays] == [(16, mx.float32), (8, mx.float16)]


def test_what_is_done_to_the_arrays_is_done_to_the_tree() -> None:
    """The views are of other arrays of the same lengths, too."""
    tree = numbered([(4, 4), (8,), (2, 8)], [mx.float32])
    together = Joined.of(tree)
    doubled = together.map(lambda array: 2 * array).tree()
    for (name, array), (_, before) in zip(tree_flatten(doubled), tree_flatten(tree), strict=True):
        assert mx.array_equal(array, 2 * before).item(), name


def test_the_tree_comes_back_scaled() -> None:
    """What is joined, what stands alone, and 16-bit numbers, whose product is made in float32."""
    tree = numbered([(4, 4), (8,), (3,), (2, 8), (5,), (8, 8)], [mx.float32, mx.float16])
    together = Joined.of(tree)
    assert len(together.arrays) > len(together.alone) > 0
    scale = mx.array(2.0**-25)  # nothing in float16, but for numbers of some size
    large = together.map(lambda array: 1024 * array)
    for (name, scaled), (_, array) in zip(*map(tree_flatten, (large.tree(scale), tree)), strict=True):
        expected = ((1024 * array).astype(mx.float32) * scale).astype(array.dtype)
        assert scaled.dtype == array.dtype, name
        assert mx.array_equal(scaled, expected).item(), name
        assert expected.any().item(), name


def test_nothing_is_nothing() -> None:
    """A tree without arrays."""
    assert Joined.of({}).arrays == []
    assert Joined.of({}).tree() == {}
