"""Stands for llama.cpp's two converters: their command line as the real ones have it, and the smallest GGUF files."""

import argparse
import json
import struct
import sys
from pathlib import Path


def text(value: str) -> bytes:
    """A text as GGUF has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(metadata: dict[str, object], tensors: int = 1) -> bytes:
    """The head of a file."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, tensors, len(metadata))]
    for key, value in metadata.items():
        if isinstance(value, list):
            parts += [text(key), struct.pack("<IIQ", 9, 8, len(value)), *map(text, value)]
        elif isinstance(value, float):
            parts += [text(key), struct.pack("<If", 6, value)]
        else:
            parts += [text(key), struct.pack("<I", 8), text(str(value))]
    return b"".join(parts)


def fail(how: str, output: Path) -> None:
    """End badly in one way."""
    if how == "error":
        output.write_bytes(b"GGUF and no more")
        sys.exit("Loading\nModel FooForCausalLM is not supported")
    if how == "module":
        sys.exit("ModuleNotFoundError: No module named 'torch'")
    if how != "no file":
        output.write_bytes(
            {"garbage": b"no file of this kind", "half": gguf({"general.architecture": "llama"})[:-3]}[how]
        )


def main() -> None:
    """Convert, or fail as a file in the folder says."""
    adapter = Path(sys.argv[0]).name == "convert_lora_to_gguf.py"
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
    if adapter:
        parser.add_argument("--base", type=Path)
        parser.add_argument("--base-model-id")
    given = parser.parse_args()
    fault = given.model / "fault.txt"
    if fault.exists():
        fail(fault.read_text(), given.outfile)
        return
    told = {"general.name": " ".join(sys.argv[2:]).replace(str(given.outfile), "FILE")}
    if adapter:
        alpha = float(json.loads((given.model / "adapter_config.json").read_text())["lora_alpha"])
        kind = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
        given.outfile.write_bytes(gguf({"general.architecture": "llama", **kind, **told}))
    else:
        tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<s>", "a"]}
        given.outfile.write_bytes(gguf({"general.architecture": "llama", "general.type": "model", **tokens, **told}))


if __name__ == "__main__":
    main()
