"""One turn of mlx-lm's own trainer on the rows of a configuration: `python -m mlx_trainer.benchmarking.peer CONFIG`.

Everything is as `mlx_lm.lora` has it: its loop (`mlx_lm.tuner.trainer.train`), its dataset, batches and padding, its
adapters, its optimizer with a constant learning rate. Model, dtype, layers with adapters, rank, scale, dropout, rows,
rows per update and the learning rate are the configuration's. Prints one JSON object.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from attrs import frozen

from mlx_trainer import build, runtime
from mlx_trainer.benchmarking.comparing import OPTIMIZERS
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.peer_clock import PeerClock, PeerReport
from mlx_trainer.benchmarking.start import process_age_s
from mlx_trainer.config import Config, ConfigError, load_config
from mlx_trainer.data import DataPipeline
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.libraries import quiet_imports
from mlx_trainer.models.lora import chosen_layers

FOREVER = 10**9
Row = tuple[list[int], int]
"""Ids, and how many of them `--mask-prompt` leaves out of the loss."""


@frozen
class EncodedChats:
    """What mlx-lm's `ChatDataset` is to its trainer, but for the encoding, which is done."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Row]:
        return {"messages": self.rows[number]}

    def process(self, record: dict[str, Row]) -> Row:
        """The ids of a record, and how many are masked."""
        return record["messages"]


def as_records(rows: Sequence[Row]) -> Any:
    """The dataset that `mlx_lm.lora` makes of a file of chats.

    mlx-lm means to sort rows by length, but takes the number of a record's keys, one, for it (0.32.2): its batches are
    rows in the order of the file.
    """
    from mlx_lm.tuner.datasets import CacheDataset

    return CacheDataset(EncodedChats(rows))


def without_our_settings() -> None:
    """Let MLX, which reads them when it first computes, find the environment as mlx-lm's users have it."""
    for name in set(os.environ) - set(runtime.foreign_environment()):
        del os.environ[name]


def run(config: Config, extent: Extent) -> PeerReport:
    """Train, throw the result away, and tell what was measured; raises ConfigError for what mlx-lm cannot do."""
    begun = time.perf_counter() - process_age_s()
    with quiet_imports():
        from mlx_lm.tuner.trainer import TrainingArgs, train
    module = build.build_module(config)
    rows, batch_size = rows_of(build.build_data(config, module), config)
    model = adapted(module, config)
    clock = PeerClock(extent, rows, batch_size, config.training.gradient_accumulation_steps, begun)
    mx.random.seed(config.data.seed)
    runtime.reset_peak_memory()
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        options = TrainingArgs(
            batch_size=batch_size,
            iters=FOREVER,
            steps_per_save=FOREVER,
            max_seq_length=config.model.max_seq_length,
            grad_accumulation_steps=config.training.gradient_accumulation_steps,
            adapter_file=str(Path(folder, "adapters.safetensors")),
        )
        optimizer = getattr(optimizers, OPTIMIZERS[config.training.optimizer])(
            learning_rate=config.training.learning_rate
        )
        train(model, optimizer, as_records(rows), args=options, iterate_batches=clock.batches)
    return clock.report(runtime.memory_bytes().peak / 1e9)


def rows_of(data: DataPipeline, config: Config) -> tuple[list[Row], int]:
    """The rows of the first epoch, and how many of them are a batch; raises ConfigError for fewer than that."""
    loader = data.train_loader()
    planned = loader.plan(0)
    rows = [loader.rows[number] for number in loader.row_numbers(0, planned.order).tolist()]
    size = config.training.batch_size
    if config.training.batch_tokens is not None:
        size = max(round(len(rows) / len(planned)), 1)
    if len(rows) < size:
        raise ConfigError(
            f"--peer: mlx_lm needs {size} rows for a batch, and there are {len(rows)}; lower training.batch_size"
        )
    return [(row.ids.tolist(), masked_prompt(row.trained)) for row in rows], size


def masked_prompt(trained: Any) -> int:
    """How many tokens of a row `--mask-prompt` masks: all before its last answer.

    >>> masked_prompt(np.array([False, True, False, False, True, True]))
    4
    """
    places = np.flatnonzero(trained)
    gaps = np.flatnonzero(np.diff(places) > 1)
    return int(places[gaps[-1] + 1 if len(gaps) else 0])


def adapted(module: CausalLMModule, config: Config) -> Any:
    """The base model with mlx-lm's adapters on the same layers as ours, or with all weights trainable."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model: Any = module.load_model()
    model.freeze()
    if config.training.method == "full":
        model.unfreeze()
        return model
    lora = config.lora
    keys = list(chosen_layers(model, lora))
    settings = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), settings, use_dora=lora.use_dora)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one turn; the exit code is 2 where mlx-lm cannot do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int)
    given = parser.parse_args(arguments)
    without_our_settings()
    try:
        report = run(load_config(given.config), Extent(given.steps, given.warmup))
    except ConfigError as error:
        print(f"mlx-trainer: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_dict()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
