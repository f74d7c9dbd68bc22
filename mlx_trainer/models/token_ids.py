"""Token ids against a model's vocabulary: for an id that it does not have MLX reads and writes beyond its memory."""

import logging
from typing import Any

import numpy as np

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loss import IGNORED

log = logging.getLogger("mlx_trainer.models")

REPAIR = "Tokenizer and model do not belong together: load the model's own tokenizer, or enlarge its embedding."


def check_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Raise ModelError where texts, or the tokens around them, can get ids beyond a model's `vocabulary`.

    Further added tokens beyond it are told in a warning: models are published with such (a text model with its
    family's image tokens), and a row that spells one is refused by name.
    """
    added = tokenizer.added_tokens_decoder
    plain = max((id for id in tokenizer.get_vocab().values() if id not in added), default=0)
    if plain >= vocabulary:
        raise ModelError(
            f"The tokenizer has ids up to {plain}, the model's vocabulary ends at {vocabulary - 1}. {REPAIR}"
        )
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        id = getattr(tokenizer, f"{name}_id")
        if id is not None and id >= vocabulary:
            raise ModelError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} has id {id}, the model's vocabulary ends at "
                f"{vocabulary - 1}. {REPAIR}"
            )
    if beyond := [f"{token.content} ({id})" for id, token in sorted(added.items()) if id >= vocabulary]:
        log.warning(
            "The model's vocabulary ends at %d, but the tokenizer has added tokens beyond it, %d in all: %s. Rows "
            "with one of them will be refused.",
            *(vocabulary - 1, len(beyond), ", ".join(beyond[:5])),
        )


def check_ids(batch: Any, vocabulary: int) -> None:
    """Raise ModelError, naming the row, for an input or label of a padded or unpadded batch beyond the `vocabulary`.

    Takes about 4 µs for 4,096 NumPy ids. MLX's arrays are waited for, so give batches as NumPy arrays.
    """
    for name in ("input_ids", "labels", "targets"):
        if (values := getattr(batch, name, None)) is None:
            continue
        ids = np.asarray(values)
        if ids.size == 0 or (ids.min() >= 0 and ids.max() < vocabulary):
            continue
        wrong = (ids < 0) | (ids >= vocabulary)
        if name == "labels":
            wrong &= ids != IGNORED
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            raise ModelError(
                f"{row_at(batch, name, place)}: {name} has the token id {ids.flat[place]}, the model's vocabulary goes "
                f"from 0 to {vocabulary - 1}. {REPAIR}"
            )


def row_at(batch: Any, name: str, place: int) -> str:
    """The name of the row that a place of the flattened array `name` belongs to, or its number in the batch."""
    if hasattr(batch, "cells"):
        position = int(np.asarray(batch.predicting)[place]) if name == "targets" else place
        rows, length = batch.grid.shape
        group, own = (position // batch.prefix if batch.prefix else 0), position - batch.groups * batch.prefix
        number = group * (rows // batch.groups) if own < 0 else int(np.asarray(batch.cells)[own]) // length
    else:
        number = place // getattr(batch, name).shape[-1]
    names = getattr(batch.metadata, "rows", ()) if batch.metadata is not None else ()
    return str(names[number]) if number < len(names) else f"row {number + 1} of the batch"
