"""What merging costs: the share of an adapter's effect that is lost by type and bits, and the memory it takes.

    python benchmarks/merging.py loss
    python benchmarks/merging.py memory --hidden 1024 --layers 12

A model in Mistral's shape with random weights, and a random adapter of rank 16 on all linear layers, scaled until its
effect on the logits has the size that the table names. Both are written to a temporary folder first.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from shape import mistral_config

from mlx_trainer.export.merging.adapter import read_adapter
from mlx_trainer.export.merging.base import open_base
from mlx_trainer.export.merging.effect import measure_effect
from mlx_trainer.export.merging.merge import merge, merge_into, rounding
from mlx_trainer.export.merging.saving import save_weights

VOCABULARY, RANK = 4096, 16
EFFECTS = (0.05, 0.5)
BASES: tuple[Mapping[str, Any] | None, ...] = (
    None,
    *({"group_size": 64, "bits": bits} for bits in (2, 3, 4, 6, 8)),
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
)
ROWS = np.random.default_rng(0).integers(VOCABULARY, size=(4, 16)).tolist()


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("loss", "memory"))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    mx.disable_compile()  # on a CPU each fused kernel costs a second of C++ compiler
    with tempfile.TemporaryDirectory() as folder:
        table = {"loss": loss, "memory": memory}[arguments.table]
        table(Path(folder), arguments.hidden, arguments.layers)


def loss(folder: Path, hidden: int, layers: int) -> None:
    """Share of the effect that is lost: dequantized and rounded, and packed again."""
    print(f"{'base':<8}{'effect':>8}{'float16':>10}{'bfloat16':>10}{'packed again':>14}")
    for number, packing in enumerate(BASES):
        base = write_model(folder / f"base-{number}", hidden, layers, packing)
        for effect in EFFECTS:
            adapter = write_adapter(base, folder / f"adapter-{number}-{effect}", effect)
            lost = {}
            for kind in ("float16", "bfloat16", *(["again"] if packing else [])):
                options: dict[str, Any] = {"requantize": True} if kind == "again" else {"dtype": kind}
                output = folder / f"merged-{number}-{effect}-{kind}"
                lost[kind] = merge(adapter, output, rows=ROWS, max_loss=1e9, **options).lost
            again = f"{lost['again']:14.2%}" if packing else f"{'':>14}"
            print(
                f"{name_of(packing):<8}{effect:8.0%}{lost['float16']:10.2%}{lost['bfloat16']:10.2%}{again}", flush=True
            )


def memory(folder: Path, hidden: int, layers: int) -> None:
    """Peak of MLX's memory in MB: of a whole merge, and of computing and writing the weights alone."""
    base = write_model(folder / "base", hidden, layers, None)
    adapter = write_adapter(base, folder / "adapter", None)
    weights = mx.load(str(base / "model.safetensors"))
    sizes = [value.nbytes for value in weights.values()]
    print(f"model {sum(sizes) / 1e6:.0f} MB in float16, its largest weight {max(sizes) / 1e6:.0f} MB")
    mx.clear_cache()
    mx.reset_peak_memory()
    merge(adapter, folder / "merged", rows=ROWS[:1], max_loss=1e9)
    print(f"a whole merge: {mx.get_peak_memory() / 1e6:.0f} MB")
    for limit in (5 << 30, sum(sizes) // 8):
        read = read_adapter(adapter)
        opened = open_base(base, read.targets)
        mx.clear_cache()
        mx.reset_peak_memory()
        merge_into(opened.weights, read)
        output = folder / str(limit)
        output.mkdir()
        save_weights(output, opened.weights, rounding(opened, None, {}), shard_bytes=limit)
        print(f"weights alone, files of {min(limit, sum(sizes)) / 1e6:.0f} MB: {mx.get_peak_memory() / 1e6:.0f} MB")


def write_model(folder: Path, hidden: int, layers: int, packing: Mapping[str, Any] | None) -> Path:
    """Write a model with random weights in float16, or packed."""
    import mlx.nn as nn
    from mlx_lm.models.llama import Model as Llama
    from mlx_lm.models.llama import ModelArgs

    config = mistral_config(hidden, layers, VOCABULARY)
    mx.random.seed(0)
    model = Llama(ModelArgs.from_dict(config))
    if packing is not None:
        nn.quantize(model, **packing)
        config["quantization"] = dict(packing)
    weights = {
        name: value.astype(mx.float16) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in tree_flatten(model.parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(base: Path, folder: Path, effect: float | None) -> Path:
    """Write a random adapter on all linear layers, whose effect on the logits is that share of their size."""
    generator = np.random.default_rng(0)
    weights = open_base(base, []).weights
    linear = {name.removesuffix(".weight"): value.shape for name, value in weights.items() if "_proj." in name}
    factors = {}
    for path, (outputs, inputs) in linear.items():
        for name, shape in (("lora_a", (inputs, RANK)), ("lora_b", (RANK, outputs))):
            factors[f"{path}.{name}"] = mx.array(generator.normal(0, shape[0] ** -0.5, shape).astype(np.float32))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), factors)
    scale = 0.05
    for _ in range(4 if effect else 1):  # the effect is nearly proportional to the scale
        parameters = {"rank": RANK, "scale": scale, "dropout": 0.0, "keys": sorted(linear)}
        config = {"model": str(base), "fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        scale *= effect / measure_effect(base, folder, ROWS).size if effect else 1
    return folder


def name_of(packing: Mapping[str, Any] | None) -> str:
    """What a base is, for the table."""
    if packing is None:
        return "float16"
    return packing.get("mode", f"{packing['bits']} bits")


if __name__ == "__main__":
    main()
