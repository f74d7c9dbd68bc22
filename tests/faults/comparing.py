"""What two runs must have alike, bit for bit."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

TIMES = ("seconds", "step_ms", "per_second", "stall_us")


def held(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds, by name: the bytes of each tensor, and the state as text, but for times."""
    found: dict[str, Any] = tensors(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["settings"]  # its list of callbacks has Halt where the other has ModelCheckpoint
    for name, value in state.items():
        timeless = {k: v for k, v in value.items() if not k.endswith(TIMES)} if isinstance(value, dict) else value
        found[name] = json.dumps(timeless)  # as text, NaN is equal to NaN
    del found["seconds"]
    return found


def tensors(folder: Path) -> dict[str, Any]:
    """Type, shape and bytes of each tensor of each file in a folder, by file and name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        for name, value in loaded.items():
            bits = value.reshape(-1).view(mx.uint8)
            found[f"{file.name}/{name}"] = str(value.dtype), tuple(value.shape), bytes(memoryview(bits))
    assert found
    return found
