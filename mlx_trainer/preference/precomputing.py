"""The reference's log-probabilities of all answers, computed once before training and kept beside the token stores."""

import hashlib
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_trainer.data import BatchLoader, DataPipeline
from mlx_trainer.data.encoding.tokenizer import FloatArray
from mlx_trainer.data.store.rows import Rows
from mlx_trainer.models import ModelError
from mlx_trainer.preference.module import DPOModule, digest
from mlx_trainer.traced import from_tree, to_tree

log = logging.getLogger("mlx_trainer.preference")


def precompute_reference(module: DPOModule, data: DataPipeline) -> None:
    """Give the batches of `data` the log-probabilities of their answers under `module` as it is before training.

    Costs one forward pass over all rows, for which each step saves one: with several epochs that is quicker, and
    without adapters there is no other way. They are kept in the data's cache for this base, type and rows, so that a
    second start reads them. Raises ModelError for rows that are no pairs.
    """
    if not data.pairs:
        raise ModelError("A reference is computed of pairs of answers: make the data with pairs=True.")
    module.setup("validate")
    data.references = reference_of(module, data, data.train_rows), reference_of(module, data, data.validation_rows)


def reference_of(module: DPOModule, data: DataPipeline, rows: Rows) -> FloatArray:
    """The log-probability of each answer, (rows,), from the cache or computed."""
    place = data.cache / "references" / f"{key_of(module, rows)}.npy"
    if (known := read(place, len(rows))) is not None:
        return known
    log.info("Computing the reference of %d pairs; later starts find it in %s.", len(rows) // 2, place.parent)
    found = computed(module, data.loader_of(rows, module.batch_layout)) if len(rows) else np.zeros(0, np.float32)
    write(place, found)
    return found


def key_of(module: DPOModule, rows: Rows) -> str:
    """The name under which they are kept: 40 hexadecimal digits of base, kept adapters, type and rows."""
    kept = [digest(module.kept)] if module.kept else []
    facts = json.dumps([module.base_facts()["files"], module.dtype, version("mlx"), *kept])
    return hashlib.blake2b(facts.encode() + rows.column("digest").tobytes(), digest_size=20).hexdigest()


def computed(module: DPOModule, loader: BatchLoader) -> FloatArray:
    """The log-probability of each answer, (rows,), in the order of the loader's rows."""

    def log_probabilities(tree: Any) -> mx.array:
        batch = from_tree(tree)
        # Without adapters nothing was trained yet: the model is its own reference.
        return module.reference(batch) if module.lora is not None else module.score(batch).log_probabilities

    traced = mx.compile(log_probabilities, inputs=[module.model.state])
    values = np.zeros(len(loader.rows), np.float32)
    for planned, batch in zip(loader.plan(0), loader, strict=True):
        module.check_batch(batch)
        numbers = loader.row_numbers(0, planned.rows)
        values[numbers] = np.array(traced(to_tree(batch)))[: len(numbers)]
    return values


def read(place: Path, count: int) -> FloatArray | None:
    """What was kept at `place`, None where that is not so many finite numbers."""
    try:
        values: Any = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = values.shape == (count,) and values.dtype == np.float32 and bool(np.isfinite(values).all())
    return values if sound else None


def write(place: Path, values: FloatArray) -> None:
    """Keep `values` at `place`, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.urandom(4).hex()}.partial")
    try:
        with beside.open("xb") as file:
            np.save(file, values)
            os.fsync(file.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)
