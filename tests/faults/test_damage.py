"""Damaged and forged checkpoints: none is taken for good, nothing crashes, nothing hangs.

A crash of MLX would end these tests, a hang is ended by an alarm. What is accepted must be to the byte what was saved.
"""

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer import ModelCheckpoint, Trainer
from mlx_trainer.checkpoint import MANIFEST, CheckpointError, CheckpointStore, verify
from mlx_trainer.checkpoint.manifest import as_text, digest, facts
from tests.faults.conftest import Tell
from tests.toy import ToyLoader, ToyModule, toy_batches

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    """Nothing takes longer than this."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of a real run."""
    folder = tmp_path_factory.mktemp("saved")
    callbacks = [ModelCheckpoint(folder, every=1, keep_last=2)]
    Trainer(max_steps=2, callbacks=callbacks).fit(ToyModule(), ToyLoader(toy_batches()))
    first, second = CheckpointStore(folder / "checkpoints").list()
    return first, second


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder: Path, files: Files) -> None:
    """Put `files`, and nothing else, into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def truncations(good: Files) -> Iterator[Files]:
    """Each file, cut at each length."""
    for name, content in good.items():
        for length in range(len(content)):
            yield good | {name: content[:length]}


def flips(good: Files, rng: random.Random) -> Iterator[Files]:
    """A bit of a file, chosen at random; each file as often as any other."""
    while True:
        for name, content in good.items():
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            yield good | {name: bytes(damaged)}


def swaps(good: Files, other: Files) -> Iterator[Files]:
    """Any choice of files from the one of another step, but all."""
    names = sorted(good)
    for chosen in range(1, 2 ** len(names) - 1):
        yield good | {name: other[name] for i, name in enumerate(names) if chosen >> i & 1}


def missing_and_more(good: Files) -> Iterator[Files]:
    """A file is missing, empty, doubled, has something after its end, or another name; one more is there."""
    for name, content in good.items():
        without = {other: there for other, there in good.items() if other != name}
        yield from (without, good | {name: b""}, good | {name: content * 2}, good | {name: content + b"\0"})
        yield from (without | {f"{name}.bak": content}, without | {name.upper(): content})
        yield good | {f"copy of {name}": content}
    yield from (good | {extra: b"{}"} for extra in ("config.json", ".hidden", "weights.npz", "a" * 255))


def damages(good: Files, other: Files, count: int) -> Iterator[tuple[str, Files]]:
    """`count` of them: all of the kinds that are few, then bits and lengths in equal parts."""
    rng = random.Random(11)
    few = [("swap", files) for files in swaps(good, other)] + [("files", files) for files in missing_and_more(good)]
    rest, lengths = max(0, count - len(few)), list(truncations(good))
    yield from few[:count]
    for files in rng.sample(lengths, min(len(lengths), rest // 2)):
        yield "length", files
    bits = flips(good, rng)
    for _ in range(rest - min(len(lengths), rest // 2)):
        yield "bit", next(bits)


def test_no_damage_is_taken_for_good(
    saved: tuple[Path, Path], tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """Of 4,000 checkpoints that are not what they were, none; the one before is taken instead."""
    first, second = saved
    good, store, tried = read(second), CheckpointStore(tmp_path), Counter[str]()
    shutil.copytree(first, tmp_path / first.name)
    for kind, files in damages(good, read(first), campaign(400, 4000)):
        if files == good:
            continue
        write(tmp_path / second.name, files)
        with pytest.raises(CheckpointError):
            verify(tmp_path / second.name)
        tried[kind] += 1
        if tried.total() % 20 == 0:
            assert store.latest() == tmp_path / first.name
    write(tmp_path / second.name, good)
    assert store.latest() == tmp_path / second.name
    assert tried.total() >= campaign(350, 3900)
    tell(
        f"{tried.total()} damaged checkpoints: " + ", ".join(f"{number} {kind}" for kind, number in tried.items()),
        "0 taken for good, 0 crashes, 0 hangs",
    )


def safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: Any, end: Any, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


HOSTILE = {
    "overlapping": safetensors({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
    "the same twice": safetensors({"a": tensor(0, 16), "b": tensor(0, 16)}, bytes(16)),
    "a hole": safetensors({"a": tensor(0, 16), "b": tensor(32, 48)}, bytes(48)),
    "wraps into the header": safetensors({"a": tensor(2**64 - 16, 2**64)}),
    "offsets that are no integers": safetensors({"a": tensor(0.0, 16.0)}, bytes(16)),
    "a shape beyond 32 bits": safetensors({"a": tensor(0, 16, (2**32 + 4,))}, bytes(16)),
    "a product that wraps": safetensors({"a": tensor(0, 16, (2**33, 2**33))}, bytes(16)),
    "a negative shape": safetensors({"a": tensor(0, 16, (-4,))}, bytes(16)),
    "a shape that does not fit": safetensors({"a": tensor(0, 16, (5,))}, bytes(16)),
    "an end before the beginning": safetensors({"a": tensor(16, 0)}, bytes(16)),
    "an end behind the file": safetensors({"a": tensor(0, 1 << 40, (1 << 38,))}),
    "bytes after the end": safetensors({"a": tensor(0, 16)}, bytes(17)),
    "an unknown type": safetensors({"a": tensor(0, 16, dtype="F33")}, bytes(16)),
    "no type": safetensors({"a": {"shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
    "a type that is a number": safetensors({"a": tensor(0, 16, dtype=32)}, bytes(16)),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
    "three offsets": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, bytes(16)),
    "a tensor that is a list": safetensors({"a": [1, 2]}),
    "a tensor that is null": safetensors({"a": None}),
    "a header that is a list": safetensors([1]),
    "a header that is a number": safetensors(1),
    "a header that ends early": safetensors(b'{"a": {"dtype": "F32"'),
    "a header that is deep": safetensors(b"[" * 100_000),
    "a header that is no UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "a header of NUL": safetensors(bytes(64)),
    "two tensors of one name": safetensors(
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}',
        bytes(16),
    ),
    "metadata that is no text": safetensors({"__metadata__": {"format": 1}, "a": tensor(0, 16)}, bytes(16)),
    "a length of 0": safetensors(b"", b"", 0),
    "a length behind the file": safetensors({"a": tensor(0, 16)}, bytes(16), 1 << 20),
    "a length of 2^63": safetensors({"a": tensor(0, 16)}, bytes(16), 1 << 63),
    "a length of 2^64-1": safetensors({"a": tensor(0, 16)}, bytes(16), 2**64 - 1),
    "a length that is one too short": safetensors({"a": tensor(0, 16)}, bytes(16), 61),
    "seven bytes": b"\x01" * 7,
    "nothing": b"",
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os.",
    "a zip": b"PK\x03\x04" + bytes(60),
    "GGUF": b"GGUF" + bytes(60),
    "text": b"weights" * 20,
}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_no_hostile_header_is_taken_for_good(saved: tuple[Path, Path], tmp_path: Path, name: str, tell: Tell) -> None:
    """Though its checksum is right: whoever can write the file can write the manifest. MLX takes seven of them."""
    good = read(saved[1])
    for content in HOSTILE.values():
        forged(tmp_path / "forged", good, name, content)
        with pytest.raises(CheckpointError, match=f"{name} is not a complete safetensors file"):
            verify(tmp_path / "forged")
    tell(f"{len(HOSTILE)} hostile headers of {name}, with a manifest that fits", "0 taken for good, 0 crashes, 0 hangs")


def forged(folder: Path, good: Files, name: str, content: bytes) -> None:
    """A checkpoint with `content` for one file, and the manifest that goes with it."""
    write(folder, good | {name: content})
    contents = json.loads(good[MANIFEST])
    del contents["sha256"]
    with (folder / name).open("rb") as file:
        contents["files"][name] = facts(file)
    (folder / MANIFEST).write_text(as_text(contents | {"sha256": digest(contents)}))


@pytest.mark.parametrize("kind", ["pipe", "link", "link to itself", "folder", "socket", "device", "no permission"])
@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", MANIFEST])
def test_what_is_no_file_is_refused(saved: tuple[Path, Path], tmp_path: Path, name: str, kind: str) -> None:
    """Without waiting for it, or reading what it leads to."""
    folder = shutil.copytree(saved[1], tmp_path / "c")
    path, copy = folder / name, tmp_path / "copy"
    path.rename(copy)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(copy)  # its content is right
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o600 | 0o140000)
    elif os.getuid() != 0 and kind == "device":
        pytest.skip("only root can make a device")
    elif kind == "device":
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    elif os.getuid() == 0:
        pytest.skip("root has every permission")
    else:
        shutil.copy(copy, path)
        path.chmod(0)
    with pytest.raises(CheckpointError):
        verify(folder)
