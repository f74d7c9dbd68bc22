"""From rows to the two loaders of a run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_trainer import runtime
from mlx_trainer.data.batches.loader import BatchLayout, BatchLoader
from mlx_trainer.data.batches.plan import split
from mlx_trainer.data.batches.shapes import Budget
from mlx_trainer.data.duplicates import find_leaks, tell_leaks
from mlx_trainer.data.encoding.encoder import CompletionStyle, SampleEncoder
from mlx_trainer.data.encoding.tokenizer import ChatTokenizer, FloatArray
from mlx_trainer.data.encoding.truncation import TRUNCATIONS, Truncation
from mlx_trainer.data.refusals import MAX_BAD_SHARE, check_vocabulary, refuse_unusable, tell_notes
from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.sources.find import Paths, find_sources
from mlx_trainer.data.sources.mapping import FieldMapping
from mlx_trainer.data.store.building import open_store
from mlx_trainer.data.store.recipe import Recipe
from mlx_trainer.data.store.rows import Rows
from mlx_trainer.data.summary import DataSummary, summarize

logger = logging.getLogger("mlx_trainer.data")


class DataPipeline:
    """Reads, checks, encodes and splits rows; every error of the data shows here, before training.

    The tokens of each source are kept in a store on disk, so that a second start need not encode them again, and
    memory does not grow with them.

    Args:
        path: JSONL of any format, mixed as you like, plain, `.gz` or `.zst`: a file, a list or a pattern of files, a
            mapping of files to weights (how many times each of its rows is used in an epoch), a directory with
            `train.jsonl` and, to be held out, `valid.jsonl`; or a Hugging Face dataset, or its name, `hf:owner/name`.
        tokenizer: the model's transformers tokenizer.
        batch_size: rows of a batch, or pairs.
        batch_tokens: instead, as many rows as fit into so many tokens, padding included.
        max_shapes: batches have at most so many distinct shapes, as each costs a compilation.
        max_seq_length: in tokens.
        truncation: what becomes of longer rows. "truncate" keeps whole turns where it can, else cuts the tail;
            "split" makes several rows of a text; "drop" leaves them out; "error" raises.
        train_split: share of the rows that is trained, the others are held out; 1.0 holds out none.
        shuffle: a new order of the training rows every epoch, from `seed` and the epoch alone.
        num_workers: threads that prepare batches ahead.
        validation_path: rows to hold out instead; then `train_split` has no effect.
        completion_style: "chat" makes a user message and its answer of prompt and completion; "raw" joins them.
        fields: what the rows call the fields of their format, such as `{"prompt": "question"}`.
        roles: what their roles mean, such as `{"bot": "assistant"}`.
        max_bad_share: more bad rows than this share of a source raise.
        vocabulary_size: of the model; ids beyond it are refused.
        layout: "padded" batches, "unpadded" ones for models that can use them, or "auto", what the model asks for.
        cache_dir: where token stores are kept, by default the user's cache folder.
        pairs: the rows are preferences, for `DPOModule` or `ORPOModule`: each becomes two rows of a batch, with the
            chosen answer and with the rejected one. Where one is too long the prompt loses its beginning, on both
            sides alike and never the answer, with any truncation but "drop" and "error".

    Raises DataError for a source or a setting that cannot be used.
    """

    def __init__(
        self,
        path: Paths,
        tokenizer: ChatTokenizer,
        *,
        batch_size: int = 2,
        batch_tokens: int | None = None,
        max_shapes: int = 16,
        max_seq_length: int = 2048,
        truncation: Truncation = "truncate",
        train_split: float = 0.9,
        shuffle: bool = True,
        seed: int = 42,
        num_workers: int = 0,
        validation_path: Paths | None = None,
        completion_style: CompletionStyle = "chat",
        fields: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        max_bad_share: float = MAX_BAD_SHARE,
        vocabulary_size: int | None = None,
        layout: Literal["auto"] | BatchLayout = "auto",
        cache_dir: str | Path | None = None,
        pairs: bool = False,
    ) -> None:
        check_settings(
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            max_shapes=max_shapes,
            max_seq_length=max_seq_length,
            truncation=truncation,
            train_split=train_split,
            seed=seed,
            num_workers=num_workers,
            completion_style=completion_style,
            max_bad_share=max_bad_share,
            layout=layout,
        )
        rows = batch_size if batch_tokens is None else None
        self.budget = Budget(rows=rows, tokens=batch_tokens, max_shapes=max_shapes)
        self.max_seq_length = max_seq_length
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.layout = layout
        self._layouts: tuple[BatchLayout, BatchLayout] = ("padded", "padded") if layout == "auto" else (layout, layout)
        self._pad_id = tokenizer.pad_token_id or 0
        encoder = SampleEncoder.of(tokenizer, completion_style)
        mapping = FieldMapping(fields or {}, roles or {})
        recipe = Recipe(tokenizer, encoder, mapping, max_seq_length, truncation, pairs)
        sources = find_sources(path, validation_path)
        cache = Path(cache_dir).expanduser() if cache_dir is not None else runtime.cache_directory()
        stores = [open_store(source, recipe, cache) for source in (*sources.train, *sources.validation)]
        for store in stores:
            refuse_unusable(store, recipe, max_bad_share)
            tell_notes(store, recipe)
            if vocabulary_size is not None:
                check_vocabulary(store, vocabulary_size, encoder)
        self._recipe = recipe.settings()
        self.weights = [source.weight for source in sources.train]
        train, held_out = stores[: len(sources.train)], stores[len(sources.train) :]
        self.train_rows, self.validation_rows = divide(Rows.of(train), Rows.of(held_out), seed, train_split)
        leaks = find_leaks(self.train_rows, self.validation_rows)
        self.pairs = pairs
        self.cache = cache
        self.references: tuple[FloatArray | None, FloatArray | None] = None, None
        """Log-probabilities under a reference of the training and the held-out answers, which their batches have."""
        self.summary: DataSummary = summarize(stores, self.train_rows, self.validation_rows, leaks.count)
        for line in str(self.summary).splitlines():
            logger.info("%s", line)
        tell_leaks(leaks, self.summary.validation_rows)

    def use_layout(self, training: BatchLayout, validation: BatchLayout) -> None:
        """Make batches of these layouts, unless the constructor was given one."""
        if self.layout == "auto":
            self._layouts = training, validation

    def train_loader(self, *, rank: int = 0, ranks: int = 1) -> BatchLoader:
        """A new loader of the training rows, at the start of epoch 0; of `ranks` processes this is number `rank`."""
        return BatchLoader(
            self.train_rows,
            self.budget,
            shuffle=self.shuffle,
            seed=self.seed,
            weights=self.weights,
            layout=self._layouts[0],
            pad_id=self._pad_id,
            workers=self.num_workers,
            rank=rank,
            ranks=ranks,
            recipe=self._recipe,
            reference=self.references[0],
        )

    def validation_loader(self) -> BatchLoader | None:
        """A loader of the held-out rows, alike every time; None where no row is held out.

        Rows are sorted by length; pairs are dealt as in training, since those in order share no prompt.
        """
        rows = self.validation_rows
        if not rows:
            return None
        if not self.pairs:
            rows = rows.take(np.argsort(rows.lengths, kind="stable"))
        return self.loader_of(rows, self._layouts[1], self.references[1])

    def loader_of(self, rows: Rows, layout: BatchLayout, reference: FloatArray | None = None) -> BatchLoader:
        """A loader of each of `rows` once, in batches that are alike every time; pairs do not keep their order."""
        return BatchLoader(
            rows,
            self.budget,
            shuffle=self.pairs,
            seed=self.seed,
            layout=layout,
            pad_id=self._pad_id,
            workers=self.num_workers,
            resumable=False,
            reference=reference,
        )


def divide(train: Rows, held_out: Rows, seed: int, train_split: float) -> tuple[Rows, Rows]:
    """Training and validation rows: both as they are, or a seeded split of the former where the latter are none.

    Parts of one row stay together.
    """
    if held_out.stores:
        return train, held_out
    numbers = train.numbers
    total = sum(store.facts.total for store in train.stores)
    usable, held = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
    usable[numbers] = True
    kept = np.flatnonzero(usable)
    held[kept[split(seed, total, kept, train_split)[1]]] = True
    return train.take(~held[numbers]), train.take(held[numbers])


def check_settings(**settings: object) -> None:
    """Raise DataError naming the first setting outside its range."""
    for name, value in settings.items():
        test, right = RANGES[name]
        if not test(value):
            raise DataError(f"{name} is {value!r}. It must be {right}.")


def whole_from(least: int) -> tuple[Callable[[Any], bool], str]:
    """A whole number that is not less."""
    return (lambda value: isinstance(value, int) and value >= least), f"{least} or more"


def one_of(values: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    """One of some words."""
    return (lambda value: value in values), f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}"


RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "batch_size": whole_from(1),
    "batch_tokens": ((lambda value: value is None or value >= 1), "None, or 1 or more"),
    "max_shapes": whole_from(1),
    "max_seq_length": whole_from(2),
    "truncation": one_of(TRUNCATIONS),
    "train_split": ((lambda value: 0 < value <= 1), "above 0 and at most 1.0, where 1.0 holds out nothing"),
    "seed": whole_from(0),
    "num_workers": whole_from(0),
    "completion_style": one_of(("chat", "raw")),
    "max_bad_share": ((lambda value: 0 <= value <= 1), "between 0 and 1"),
    "layout": one_of(("auto", "padded", "unpadded")),
}
