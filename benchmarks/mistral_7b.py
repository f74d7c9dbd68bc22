"""A LoRA epoch on a Mistral-7B shape with random weights, beside mlx-lm's own trainer on the same rows, in one run.

    python benchmarks/mistral_7b.py                                    # an NVIDIA GPU or a Mac with 64 GB and more
    python benchmarks/mistral_7b.py --layers 2 --hidden 64 --rows 32   # the script itself, on a CPU

The base is written to a folder in Hugging Face layout and loaded as any model; the rows are text chats of log-normal
length. Both trainers see the same rows, batch size, LoRA and AdamW, each as its users run it: two rounds, of which the
second, with kernels built, is timed as wall time of the whole call, tracing included.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten

from mlx_trainer import DataPipeline, LoRAConfig, MistralLoRAModule, Trainer
from mlx_trainer.callbacks import GradientClipping, NaNGuard

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
MEAN_LENGTH, SIGMA = 264, 0.75  # a chat set's spread: median about 200, longest about six times that


def write_base(directory: Path, layers: int, hidden: int) -> None:
    """Random weights of the shape of Mistral-7B (32 layers of 4096), as a Hugging Face folder with a tokenizer."""
    from mlx_lm.models.llama import Model, ModelArgs
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    heads = max(hidden // 128, 4)
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": int(hidden * 3.5),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32768,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # one token a byte
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def write_chats(path: Path, rows: int, longest: int) -> None:
    """Chats whose token lengths are log-normal; one byte is one token."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, rows), 16, longest - 8).astype(int)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    with path.open("w") as file:
        for length in lengths:
            text = "".join(rng.choice(letters, length))
            cut = max(length // 3, 1)
            messages = [{"role": "user", "content": text[:cut]}, {"role": "assistant", "content": text[cut:]}]
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(base: Path, chats: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """This library's trainer, as in `recipes/mistral_lora.py`."""
    lora = LoRAConfig(rank=16, alpha=32, dropout=0.0)
    module = MistralLoRAModule(base, lora=lora, dtype="bfloat16", warmup_steps=0, max_seq_length=arguments.length)
    data = DataPipeline(
        chats, module.tokenizer, batch_size=arguments.batch, max_seq_length=arguments.length, train_split=1.0
    )
    for _ in range(2):
        mx.reset_peak_memory()
        start = time.perf_counter()
        trainer = Trainer(max_epochs=1, callbacks=[GradientClipping(), NaNGuard()])
        result = trainer.fit(module, data)
        mx.eval(module.model.parameters())
        seconds = time.perf_counter() - start
    return figures(seconds, result.counts["tokens"], result.steps, result.metrics["train/loss"])


def peer(base: Path, rows: list[list[int]], arguments: argparse.Namespace) -> dict[str, float]:
    """`mlx_lm`'s train() on the same ids, one epoch."""
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    model.freeze()
    config = {"rank": 16, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
    linear_to_lora_layers(model, arguments.layers, config)
    optimizer = optimizers.AdamW(2e-4)
    dataset = [(row, 0) for row in rows]
    losses: list[float] = []

    class Report:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            """Keep the loss."""
            losses.append(info["train_loss"])

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            """There is no validation here."""

    steps = len(rows) // arguments.batch
    for _ in range(2):
        mx.reset_peak_memory()
        start = time.perf_counter()
        options = TrainingArgs(
            batch_size=arguments.batch,
            iters=steps,
            max_seq_length=arguments.length,
            adapter_file=str(base / "peer.safetensors"),
        )
        train(model, optimizer, dataset, args=options, training_callback=Report())
        seconds = time.perf_counter() - start
    return figures(seconds, sum(map(len, rows)), steps, losses[-1])


def figures(seconds: float, tokens: int, steps: int, loss: float) -> dict[str, float]:
    """What is compared."""
    return {
        "seconds": seconds,
        "real tokens/s": tokens / seconds,
        "ms/step": 1000 * seconds / steps,
        "peak GB": mx.get_peak_memory() / 1e9,
        "last loss": loss,
    }


def main() -> None:
    """Measure both and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="longest row in tokens")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        base, chats = Path(folder, "base"), Path(folder, "chats.jsonl")
        base.mkdir()
        write_base(base, arguments.layers, arguments.hidden)
        write_chats(chats, arguments.rows, arguments.length)
        mx.clear_cache()
        module = MistralLoRAModule(base)
        data = DataPipeline(chats, module.tokenizer, max_seq_length=arguments.length, train_split=1.0)
        rows = [row.ids.tolist() for row in data.train_rows]
        results = {"mlx_trainer": ours(base, chats, arguments)}
        mx.clear_cache()
        results["mlx_lm"] = peer(base, rows, arguments)

    print(f"{'':16}{'mlx_trainer':>14}{'mlx_lm':>14}{'ratio':>8}")
    for name, value in results["mlx_trainer"].items():
        other = results["mlx_lm"][name]
        print(f"{name:16}{value:14.2f}{other:14.2f}{value / other:8.2f}")
    print(json.dumps({"arguments": vars(arguments), "device": mx.device_info(), **results}, default=str))


if __name__ == "__main__":
    main()
