"""LoRA on a Mistral-7B shape with random weights, beside mlx-lm's own trainer on the same rows, in one run.

    python benchmarks/mistral_7b.py mixed                 # chats of log-normal length; an NVIDIA GPU or a large Mac
    python benchmarks/mistral_7b.py full --targets all    # rows of 1,024 tokens, adapters on every linear layer
    python benchmarks/mistral_7b.py full --bits 4         # a packed base
    python benchmarks/mistral_7b.py prefix                # 16 rows an update: 512 tokens in common and 128 of their own
    python benchmarks/mistral_7b.py system                # the mixed chats behind a system prompt of 400 tokens
    python benchmarks/mistral_7b.py mixed --layers 2 --hidden 64 --rows 64 --tokens 512 --dtype float32   # on a CPU

The base is written to a folder in Hugging Face layout and loaded as any model; the rows are text chats. Each trainer
runs in a process of its own, as its users run it: two epochs, of which the first is reported as cold and the second as
warm, each the wall time of the whole call, tracing included. CUDA kernels are built anew for each, unless `--kernels`
names a folder for them; `--base` keeps the base for another call. mlx-lm's batches have four rows and it accumulates
over as many of them as make the same rows per update.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from shape import ALL_LINEAR, TARGETS, mistral_config

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
MEAN_LENGTH, SIGMA = 264, 0.75  # a chat set's spread: median about 200
LONGEST = 1536
SYSTEM = {"prefix": 512, "system": 400}  # tokens in common
PEER_BATCH = 4
LASTING = 10.0
"""Seconds."""


def write_base(directory: Path, arguments: argparse.Namespace) -> None:
    """Random weights of the shape of Mistral-7B (32 layers of 4096), as a Hugging Face folder with a tokenizer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    config = mistral_config(arguments.hidden, arguments.layers)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, arguments.dtype))
    if arguments.bits:
        nn.quantize(model, group_size=64, bits=arguments.bits)
        config["quantization"] = {"group_size": 64, "bits": arguments.bits}
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(directory)


def write_chats(path: Path, arguments: argparse.Namespace) -> None:
    """Chats of log-normal or equal token lengths, with a system prompt or none; a third is the question."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, arguments.rows), 16, LONGEST).astype(int)
    if arguments.case in ("full", "prefix"):
        lengths[:] = 1024 if arguments.case == "full" else 128
    shared = SYSTEM.get(arguments.case, 0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    with path.open("w") as file:
        for length in lengths:
            text = "x" + "".join(rng.choice(letters, length - 7)) + "x"  # two blanks and four control tokens are added
            cut = max(length // 3, 1)
            messages = [{"role": "user", "content": text[:cut]}, {"role": "assistant", "content": text[cut:]}]
            if shared:  # three tokens stand before it, and two line ends behind
                messages.insert(0, {"role": "system", "content": "y" * (shared - 5)})
            file.write(json.dumps({"messages": messages}) + "\n")


def data_of(folder: Path, arguments: argparse.Namespace, tokenizer: Any) -> Any:
    """The pipeline of a recipe with `batch_tokens`, or, of equal rows, a number of them in a batch."""
    from mlx_trainer import DataPipeline

    rows = {"full": 4, "prefix": 16}.get(arguments.case)
    size: dict[str, Any] = {"batch_tokens": arguments.tokens} if rows is None else {"batch_size": rows}
    cache = folder / "cache"
    return DataPipeline(folder / "chats.jsonl", tokenizer, train_split=1.0, max_shapes=16, cache_dir=cache, **size)


def ours(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """This library's trainer, as in `recipes/mistral_lora.py`."""
    import mlx.core as mx

    from mlx_trainer import LoRAConfig, MistralLoRAModule, Trainer
    from mlx_trainer.callbacks import GradientClipping, NaNGuard

    lora = LoRAConfig(rank=16, alpha=32, dropout=0.0, target_modules=TARGETS[arguments.targets])
    module = MistralLoRAModule(
        folder / "base", lora=lora, dtype=arguments.dtype, warmup_steps=0, recompute=arguments.recompute
    )
    data = data_of(folder, arguments, module.tokenizer)
    module.setup("fit")
    mx.eval(module.model.parameters())
    rounds = []
    for _ in range(2):
        mx.reset_peak_memory()
        start = time.perf_counter()
        callbacks = [GradientClipping(), NaNGuard()]
        result = Trainer(max_epochs=1, accumulate=arguments.accumulate, callbacks=callbacks).fit(module, data)
        mx.eval(module.model.parameters())
        rounds.append(time.perf_counter() - start)
    computed = result.counts["positions"] / result.counts["tokens"]
    told = figures(rounds, result.counts["tokens"], result.counts["rows"] / result.steps)
    return told | {"computed per token": computed, "last loss": result.metrics["train/loss"]}


def peer_setup(folder: Path, arguments: argparse.Namespace) -> tuple[Any, list[Any], Any]:
    """`mlx_lm`'s model with its adapters, the ids of the rows, and its options for one epoch of them."""
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from mlx_trainer.benchmarking.peer import without_our_settings
    from mlx_trainer.models.loading import load_tokenizer

    without_our_settings()
    tokenizer = load_tokenizer(folder / "base", trust_remote_code=False)
    loader = data_of(folder, arguments, tokenizer).train_loader()
    rows = [(row.ids.tolist(), 0) for row in loader.rows]
    accumulate = max(round(arguments.accumulate * len(rows) / len(loader) / PEER_BATCH), 1)
    rows = rows[: arguments.peer_rows]
    model, _ = load_model(folder / "base")
    model.freeze()
    keys = [f"{'mlp' if name in ALL_LINEAR[4:] else 'self_attn'}.{name}" for name in TARGETS[arguments.targets]]
    linear_to_lora_layers(model, arguments.layers, {"rank": 16, "scale": 2.0, "dropout": 0.0, "keys": keys})
    options = TrainingArgs(
        batch_size=PEER_BATCH,
        iters=len(rows) // PEER_BATCH,
        max_seq_length=2048,
        grad_accumulation_steps=accumulate,
        adapter_file=str(folder / "peer.safetensors"),
    )
    return model, rows, options


def peer(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`mlx_lm`'s train() on the same ids, one epoch, with as many rows per update."""
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.trainer import train

    from mlx_trainer.benchmarking.peer import as_records

    model, rows, options = peer_setup(folder, arguments)
    dataset = rows if arguments.peer_sorted else as_records(rows)
    mx.eval(model.parameters())
    rounds = []
    for _ in range(2):
        mx.reset_peak_memory()
        start = time.perf_counter()
        train(model, optimizers.AdamW(2e-4), dataset, args=options)
        rounds.append(time.perf_counter() - start)
    tokens, rows_per_update = sum(len(ids) for ids, _ in rows), PEER_BATCH * options.grad_accumulation_steps
    return figures(rounds, tokens, rows_per_update)


def figures(rounds: list[float], tokens: int, rows_per_update: float) -> dict[str, Any]:
    """What is compared."""
    import mlx.core as mx

    return {
        "real tokens/s, warm": tokens / rounds[1],
        "seconds, cold epoch": rounds[0],
        "peak GB": mx.get_peak_memory() / 1e9,
        "cache GB": mx.get_cache_memory() / 1e9,
        "rows per update": rows_per_update,
    }


def limit(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s if a step were nothing but its matmuls, 4N operations a token, at the rate of one large product.

    That of a few calls, and that which the device keeps for `LASTING` seconds: a GPU clocks down to its power limit.
    """
    import mlx.core as mx
    from block import large_product, lasting, seconds

    product, operations = large_product(arguments)
    mx.eval(product())
    rates = {"": operations / seconds(product, 9), ", lasting": operations / lasting(product, LASTING)}
    config = json.loads((folder / "base" / "config.json").read_text())
    heads = config["num_key_value_heads"] / config["num_attention_heads"]
    block = config["hidden_size"] ** 2 * (2 + 2 * heads) + 3 * config["hidden_size"] * config["intermediate_size"]
    parameters = config["num_hidden_layers"] * block + config["vocab_size"] * config["hidden_size"]
    told = {f"matmul TFLOP/s{which}": rate / 1e12 for which, rate in rates.items()}
    return told | {f"limit{which}, tokens/s": rate / (4 * parameters) for which, rate in rates.items()}


RUNS = {"limit": limit, "ours": ours, "peer": peer}


def run(name: str, folder: Path, arguments: list[str], kernels: Path | None) -> dict[str, Any]:
    """Run one of `RUNS` in a process of its own, with kernels of its own unless there is a folder for them."""
    with tempfile.TemporaryDirectory() as new:
        command = [sys.executable, __file__, *arguments, "--run", name, "--folder", str(folder)]
        environment = os.environ | {"MLX_PTX_CACHE_DIR": str(kernels or new)}
        finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    print(name, json.dumps(told), flush=True)
    return told


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", choices=["mixed", "full", "prefix", "system"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch of mixed rows")
    parser.add_argument(
        "--accumulate", type=int, default=1, help="batches an update; mlx_lm has as many rows an update"
    )
    parser.add_argument("--targets", choices=list(TARGETS), default="qv")
    parser.add_argument("--recompute", default="auto", help="of mlx_trainer alone")
    parser.add_argument("--bits", type=int, help="pack the base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-rows", type=int, help="so many rows are enough for mlx_lm, whose rate does not change")
    parser.add_argument("--peer-sorted", action="store_true", help="hand mlx_lm a list, which it sorts by length")
    parser.add_argument("--only", choices=list(RUNS), nargs="+", default=list(RUNS))
    parser.add_argument("--kernels", type=Path, help="keep CUDA kernels in this folder")
    parser.add_argument("--base", type=Path, help="keep the base in this folder")
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure both and print a table and JSON."""
    arguments = parse()
    if arguments.run:
        print(json.dumps(RUNS[arguments.run](arguments.folder, arguments)))
        return
    import mlx.core as mx

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = arguments.base or folder / "new"
        (folder / "base").symlink_to(base.absolute())
        if not (base / "config.json").exists():
            base.mkdir(parents=True)
            write_base(base, arguments)
        write_chats(folder / "chats.jsonl", arguments)
        mx.clear_cache()
        told = {name: run(name, folder, sys.argv[1:], arguments.kernels) for name in arguments.only}
    if {*told} != {*RUNS}:
        return
    mine, other = told["ours"], told["peer"]
    print(f"\n{' '.join(sys.argv[1:])}, {mx.device_info().get('device_name', 'CPU')}\n")
    print("| | mlx_trainer | mlx_lm | ratio |\n|---|---|---|---|")
    for name, value in other.items():
        print(f"| {name} | {mine[name]:,.2f} | {value:,.2f} | {mine[name] / value:.2f} |")
    print(f"\nmlx_trainer computes {mine['computed per token']:.3f} positions per token and runs at")
    for which in ("", ", lasting"):
        allowed, rate = told["limit"][f"limit{which}, tokens/s"], told["limit"][f"matmul TFLOP/s{which}"]
        share = mine["real tokens/s, warm"] / allowed
        print(f"{share:.2f} of the {allowed:,.0f} tokens/s that {rate:.1f} TFLOP/s of matmuls{which} allow")


if __name__ == "__main__":
    main()
