"""Safetensors files made to harm: as base weights and as adapters they are refused, or are exactly what was saved."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.safetensors_file import check_header
from tests.faults.conftest import Tell
from tests.tiny import tiny_mistral

Header = dict[str, Any]
A, B = "model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"


def entry(begin: Any, end: Any, shape: Any = None, dtype: Any = "F32") -> Header:
    """Return a tensor's entry, by default of float32 as long as its bytes."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def raw(text: str | bytes, length: int | None = None) -> bytes:
    """Return a file with this header and 16 bytes of data, its length as it is or as given."""
    header = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


def tensors(**entries: Any) -> bytes:
    """Return a file with these entries."""
    return raw(json.dumps(entries))


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length alone": struct.pack("<Q", 8),
    "length 0": raw("", 0),
    "length beyond the file": raw("{}", 1 << 20),
    "length of 2^63": raw("{}", 1 << 63),
    "length of 2^64 - 1": raw("{}", (1 << 64) - 1),
    "length of 100 MB and one": raw("{}", 100_000_001),
    "no JSON": raw("{"),
    "no UTF-8": raw(b'{"\xff\xfe": 1}'),
    "a list": raw("[]"),
    "a number": raw("1"),
    "null": raw("null"),
    "deep": raw("[" * 100_000),
    "deep objects": raw('{"a":' * 50_000),
    "entry is a number": tensors(a=1),
    "entry is null": tensors(a=None),
    "entry is empty": tensors(a={}),
    "no dtype": tensors(a={"shape": [4], "data_offsets": [0, 16]}),
    "no shape": tensors(a={"dtype": "F32", "data_offsets": [0, 16]}),
    "no offsets": tensors(a={"dtype": "F32", "shape": [4]}),
    "unknown dtype": tensors(a=entry(0, 16, dtype="F33")),
    "dtype is a number": tensors(a=entry(0, 16, dtype=32)),
    "shape is text": tensors(a=entry(0, 16, shape="4")),
    "negative shape": tensors(a=entry(0, 16, shape=[-4])),
    "fractional shape": tensors(a=entry(0, 16, shape=[4.5])),
    "shape too large": tensors(a=entry(0, 16, shape=[1 << 40])),
    "shape that wraps to 4": tensors(a=entry(0, 16, shape=[(1 << 32) + 4])),
    "product that wraps to 4": tensors(a=entry(0, 16, shape=[1 << 62, 16, 4])),
    "product of 2^64": tensors(a=entry(0, 16, shape=[1 << 32, 1 << 32])),
    "offsets reversed": tensors(a=entry(16, 0, shape=[4])),
    "negative offsets": tensors(a=entry(-16, 0, shape=[4])),
    "fractional offsets": tensors(a=entry(0.0, 16.0, shape=[4])),
    "offsets as text": tensors(a={**entry(0, 16), "data_offsets": ["0", "16"]}),
    "one offset": tensors(a={**entry(0, 16), "data_offsets": [0]}),
    "three offsets": tensors(a={**entry(0, 16), "data_offsets": [0, 16, 32]}),
    "beyond the file": tensors(a=entry(0, 1 << 20)),
    "offset that wraps into the header": tensors(a=entry((1 << 64) - 16, 1 << 64, shape=[4])),
    "overlapping": tensors(a=entry(0, 12), b=entry(4, 16)),
    "aliased": tensors(a=entry(0, 16), b=entry(0, 16)),
    "a hole": tensors(a=entry(0, 4), b=entry(8, 16)),
    "a hole at the start": tensors(a=entry(4, 16)),
    "data nobody owns": tensors(a=entry(0, 8)),
    "metadata is a number": tensors(__metadata__=1, a=entry(0, 16)),
    "metadata of numbers": tensors(__metadata__={"a": 1}, a=entry(0, 16)),
    "metadata of objects": tensors(__metadata__={"a": {}}, a=entry(0, 16)),
    "a pickle": b"\x80\x04\x95" + bytes(64),
    "a zip archive": b"PK\x03\x04" + bytes(64),
    "GGUF": b"GGUF\x03\0\0\0" + bytes(64),
    "NumPy": b"\x93NUMPY\x01\0" + bytes(64),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
}
LIVELY: dict[str, bytes] = {
    "names that are paths": tensors(
        **{"../../a": entry(0, 4), "/etc/passwd": entry(4, 8), "C:\\a": entry(8, 12), "~/a": entry(12, 16)}
    ),
    "names with NUL and escapes": tensors(**{"a\0b": entry(0, 8), "\x1b[2Ja\r": entry(8, 16)}),
    "a name of 1 MB": tensors(**{"x" * 1_000_000: entry(0, 16)}),
    "100,000 empty tensors": tensors(**{f"t{i}": entry(0, 0, shape=[0]) for i in range(100_000)}, z=entry(0, 16)),
    "metadata of 1 MB": tensors(__metadata__={"../a": "x" * 1_000_000}, a=entry(0, 16)),
    "a name twice": raw(f'{{"a": {json.dumps(entry(0, 16))}, "a": {json.dumps(entry(0, 16))}}}'),
    "a scalar and no dimension": tensors(a=entry(0, 4, shape=[]), b=entry(4, 16)),
    "names of a dict's own": tensors(__class__=entry(0, 8), __init__=entry(8, 16)),
}
"""What the format allows; it is no model's, and nothing in it is taken for a path, code or a command."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, `base`, and an adapter of it, `adapter`."""
    folder = tmp_path_factory.mktemp("hostile")
    tiny_mistral(folder / "base", layers=1)
    module = CausalLMModule(folder / "base", dtype="float32")
    module.save(folder / "adapter")
    return folder


def as_base(folder: Path) -> Callable[[], CausalLMModule]:
    """Return what loads the base model."""

    def load() -> CausalLMModule:
        module = CausalLMModule(folder / "base", dtype="float32")
        module.setup("fit")
        return module

    return load


def as_adapter(folder: Path) -> Callable[[], CausalLMModule]:
    """Return what loads the adapter into one module, over and over."""
    module = CausalLMModule(folder / "base", dtype="float32")

    def load() -> CausalLMModule:
        module.load(folder / "adapter")
        return module

    return load


ROLES = {"base": ("base/model.safetensors", as_base), "adapter": ("adapter/adapters.safetensors", as_adapter)}


@pytest.fixture(params=ROLES)
def role(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Path, Callable[[], CausalLMModule]]]:
    """Return the file that is attacked and what loads it; afterwards the file is as it was."""
    name, loader = ROLES[request.param]
    before = (folder / name).read_bytes()
    load = loader(folder)
    load()
    yield folder / name, load
    (folder / name).write_bytes(before)


def contents(folder: Path) -> set[str]:
    """Return all names around the model."""
    return {str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*")}


@pytest.mark.parametrize("kind", [*HOSTILE, *LIVELY])
def test_a_hostile_file_is_refused(role: tuple[Path, Callable[[], CausalLMModule]], folder: Path, kind: str) -> None:
    """A ModelError of few letters, none of them a control character, names the file; no other file appears."""
    path, load = role
    path.write_bytes((HOSTILE | LIVELY)[kind])
    before = contents(folder)
    with pytest.raises(ModelError, match=path.parent.name) as caught:
        load()
    assert len(str(caught.value)) < 1500
    assert "\x1b" not in str(caught.value)
    assert contents(folder) == before


def test_what_mlx_would_take(tmp_path: Path, tell: Tell) -> None:
    """Some of the forbidden files MLX loads without a word; `check_header` refuses each, and takes all others."""
    taken = []
    for kind, content in HOSTILE.items():
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            check_header(path)
        try:
            loaded = mx.load(str(path), format="safetensors")
            mx.eval(loaded)
            taken.append(kind)
        except (RuntimeError, ValueError, OverflowError):
            pass
    for kind, content in LIVELY.items():
        path = tmp_path / f"{len(kind)}.safetensors"
        path.write_bytes(content)
        check_header(path)
    tell("hostile safetensors header", f"{len(HOSTILE)} of {len(HOSTILE)} refused; MLX alone takes {', '.join(taken)}")
    assert {"overlapping", "aliased", "a hole"} <= set(taken)


def values(module: CausalLMModule) -> dict[str, bytes]:
    """Return all parameters as bytes."""
    return {name: np.array(value).tobytes() for name, value in dict(tree_flatten(module.model.parameters())).items()}


def test_a_damaged_header_is_refused_or_harmless(
    role: tuple[Path, Callable[[], CausalLMModule]], campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """Files cut anywhere and headers with a flipped bit: a ModelError, or bit for bit what was saved."""
    path, load = role
    good, expected = path.read_bytes(), values(load())
    header = 8 + struct.unpack("<Q", good[:8])[0]
    draw = random.Random(7)
    cuts = sorted(draw.sample(range(len(good)), campaign(20, 500)))
    flips = [(draw.randrange(header), draw.randrange(8)) for _ in range(campaign(40, 1500))]
    damaged = [good[:cut] for cut in cuts]
    for byte, bit in flips:
        flipped = bytearray(good)
        flipped[byte] ^= 1 << bit
        damaged.append(bytes(flipped))
    harmless = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            module = load()
        except ModelError:
            continue
        harmless += 1
        assert values(module) == expected
    assert harmless < len(flips) / 4
    tell(
        f"damaged header of {path.parent.name}",
        f"{len(damaged)} tried, {len(damaged) - harmless} refused, {harmless} loaded exactly, 0 silent",
    )
