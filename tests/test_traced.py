"""Batches on their way into a trace and back."""

from typing import Any

import attrs
import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.traced import ALIGNED, from_tree, shape_key, to_tree


@attrs.frozen(eq=False)
class Batch:
    """As the library's own are: arrays, numbers, and what stays on the host."""

    ids: Any
    weights: Any
    groups: int
    metadata: Any = None


def batch(rows: int = 3) -> Batch:
    """Of two arrays."""
    ids = np.arange(rows * 5, dtype=np.int32).reshape(rows, 5)
    return Batch(ids, np.linspace(0, 1, rows, dtype=np.float32), 7, {"rows": rows})


def test_a_batch_comes_back_as_arrays() -> None:
    """In the same types and shapes; the host's part is left behind."""
    given = batch()
    back = from_tree(to_tree(given))
    assert type(back) is Batch
    assert (back.ids.dtype, back.weights.dtype, back.groups, back.metadata) == (mx.int32, mx.float32, 7, None)
    assert np.array_equal(np.array(back.ids), given.ids)
    assert np.array_equal(np.array(back.weights), given.weights)


def test_numpy_arrays_go_to_the_device_in_one_of_2_to_the_n_numbers() -> None:
    """Each behind a multiple of `ALIGNED`, so that batches of about the same size take the same memory."""
    packed, _ = to_tree(batch())
    assert (packed.dtype, packed.size) == (mx.int32, 128)
    assert packed[ALIGNED : ALIGNED + 3].view(mx.float32).tolist() == [0.0, 0.5, 1.0]
    assert {to_tree(batch(rows))[0].size for rows in (2, 3, 4)} == {128}


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.bool_, np.float16, np.float64])
def test_other_types_are_what_mlx_makes_of_them(kind: Any) -> None:
    """And empty arrays, numbers without a shape, MLX's own arrays and whatever is no array."""
    array, own = np.array([[0, 1, 1]]).astype(kind), mx.array([1.5])
    given = {"a": array, "empty": np.zeros((0, 3), np.int32), "one": np.array(2, np.int32), "own": own, "text": "\0x"}
    back = from_tree(to_tree(given))
    assert back["a"].dtype == mx.array(array).dtype
    assert np.array_equal(np.array(back["a"]), array)
    assert (back["empty"].shape, back["one"].item(), back["own"].item(), back["text"]) == ((0, 3), 2, 1.5, "\0x")


def test_a_batch_can_be_anything() -> None:
    """Of nested containers, strided views among them, or of a single array."""
    strided = np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]
    back = from_tree(to_tree([strided, {"x": (strided.T, 3)}]))
    assert back[0].tolist() == strided.tolist()
    assert (back[1]["x"][0].tolist(), back[1]["x"][1]) == (strided.T.tolist(), 3)
    assert from_tree(to_tree(strided)).tolist() == strided.tolist()
    assert from_tree(to_tree({"own": mx.array([1, 2])}))["own"].tolist() == [1, 2]


def test_a_compiled_function_sees_the_batch_and_is_traced_once_a_shape() -> None:
    """The place of an array among the packed ones is a constant of the trace."""
    traces = []

    def total(tree: Any) -> mx.array:
        given = from_tree(tree)
        traces.append(given.ids.shape)
        return (given.ids * given.weights[:, None]).sum() + given.groups

    compiled, shapes = mx.compile(total), set()
    for rows in (3, 2, 3, 4, 2):
        given = batch(rows)
        tree = to_tree(given)
        shapes.add(shape_key(tree))
        expected = (given.ids * given.weights[:, None]).sum() + 7
        assert compiled(tree).item() == pytest.approx(expected, rel=1e-6)
    assert len(traces) == len(shapes) == 3
