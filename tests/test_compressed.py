"""Compressed optimizer states: bit for bit what was saved, and nothing else is taken."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer import ModelCheckpoint, Trainer
from mlx_trainer.checkpoint import CheckpointError, CheckpointStore
from mlx_trainer.checkpoint.compressed import compress, load_tensors
from tests.toy import ToyLoader, ToyModule, toy_batches

LIMIT = 1 << 20


def fit(folder: Path, steps: int, **options: Any) -> dict[str, bytes]:
    """Train up to `steps`; the optimizer state that was saved then, by name."""
    saving = ModelCheckpoint(folder, every=3, keep_last=1, **options)
    Trainer(max_epochs=9, max_steps=steps, resume="auto", callbacks=[saving]).fit(ToyModule(), ToyLoader(toy_batches()))
    path = saving.latest_checkpoint()
    assert path is not None
    return {name: bytes(memoryview(a)) for name, a in load_tensors(path / "optimizer.safetensors", LIMIT).items()}


def names(folder: Path) -> set[str]:
    """The files of the one checkpoint."""
    (path,) = CheckpointStore(folder / "checkpoints").list()
    return {file.name for file in path.iterdir()}


@pytest.mark.parametrize("background", [True, False])
def test_a_compressed_run_continues_bit_for_bit(tmp_path: Path, background: bool) -> None:
    """Cut in three, compressed, then not, then again: the state of the whole run, which is stored in less."""
    whole = fit(tmp_path / "whole", 12)
    files = {}
    for steps, level in ((4, 1), (8, None), (12, 19)):
        state = fit(tmp_path / "cut", steps, compress=level, background=background)
        files[steps] = {name for name in names(tmp_path / "cut") if name.startswith("optimizer")}
    assert state == whole
    assert files == {4: {"optimizer.safetensors.zst"}, 8: {"optimizer.safetensors"}, 12: {"optimizer.safetensors.zst"}}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A file that was compressed, under its former name."""
    path = tmp_path / "optimizer.safetensors"
    with path.open("wb") as file:
        mx.save_safetensors(file, {"step": mx.array(7, mx.uint64), "m": mx.zeros((1000,)), "v": mx.arange(1000.0)})
    compress(path, 3)
    return path


def packed(state: Path) -> Path:
    return state.with_name("optimizer.safetensors.zst")


def test_any_zstd_reads_it(state: Path) -> None:
    """And so is it read: the same arrays, of the same types."""
    loaded = load_tensors(state, LIMIT)
    assert {name: (array.dtype, array.shape) for name, array in loaded.items()} == {
        "step": (mx.uint64, ()),
        "m": (mx.float32, (1000,)),
        "v": (mx.float32, (1000,)),
    }
    zstandard = pytest.importorskip("zstandard", reason="needs the zstandard package to compare with")
    content = zstandard.ZstdDecompressor().decompressobj().decompress(packed(state).read_bytes())
    state.write_bytes(content)
    packed(state).unlink()
    plain = load_tensors(state, LIMIT)
    assert all(bytes(memoryview(plain[name])) == bytes(memoryview(loaded[name])) for name in loaded)


def test_a_cut_or_broken_one_is_refused(state: Path) -> None:
    """At every length."""
    content = packed(state).read_bytes()
    for length in range(0, len(content), 7):
        packed(state).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is cut; this run cannot have written it"):
            load_tensors(state, LIMIT)
    packed(state).write_bytes(b"no zstd at all")
    with pytest.raises(CheckpointError, match="is no valid compressed safetensors file"):
        load_tensors(state, LIMIT)
    state.write_bytes(b"\xff" * 100)
    compress(state, 1)
    with pytest.raises(CheckpointError, match="is no valid compressed safetensors file"):
        load_tensors(state, LIMIT)


def test_one_that_grows_without_end_is_refused(state: Path) -> None:
    """A gigabyte in a few kilobytes is not unpacked."""
    state.write_bytes(bytes(64 << 20))
    compress(state, 19)
    assert packed(state).stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="holds more than 1,048,576 bytes; this run cannot have written it"):
        load_tensors(state, LIMIT)


def test_without_zstd_it_is_told_what_to_install(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the callback is made, and when a compressed one is read."""
    for module in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="Install the zstandard package"):
        ModelCheckpoint("run", compress=3)
    with pytest.raises(CheckpointError, match=r"is compressed with zstd, which this Python cannot read\. Install the"):
        load_tensors(state, LIMIT)


@pytest.mark.parametrize("level", [0, 20, -5])
def test_levels_that_do_not_exist_are_refused(level: int) -> None:
    """By number."""
    with pytest.raises(ValueError, match=f"compress is {level}; it must be a level from 1 to 19"):
        ModelCheckpoint("run", compress=level)
