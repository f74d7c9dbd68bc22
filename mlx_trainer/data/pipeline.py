"""From JSONL files to the two loaders of a run."""

import logging
from itertools import chain

from mlx_trainer.data.conversation import DataError
from mlx_trainer.data.duplicates import find_leaks, tell_leaks
from mlx_trainer.data.encoding import CompletionStyle, SampleEncoder
from mlx_trainer.data.loader import BatchLoader
from mlx_trainer.data.plan import split
from mlx_trainer.data.rows import LoadedFile, TokenRow, check_vocabulary, load_files
from mlx_trainer.data.sources import Paths, find_sources
from mlx_trainer.data.summary import DataSummary, summarize
from mlx_trainer.data.tokenizer import ChatTokenizer

logger = logging.getLogger("mlx_trainer.data")


class DataPipeline:
    """Reads, checks, encodes and splits the rows of JSONL files; every error of the data shows here, before training.

    Args:
        path: JSONL of any format, mixed as you like, plain, `.gz` or `.zst`: a file, a list of files that are read
            one behind the other, or a directory with `train.jsonl` and, to be held out, `valid.jsonl`.
        tokenizer: the model's transformers tokenizer.
        max_seq_length: in tokens; longer rows lose their tail.
        train_split: share of the rows that is trained, the others are held out; 1.0 holds out none.
        shuffle: a new order of the training rows every epoch, from `seed` and the epoch alone.
        num_workers: threads that prepare batches ahead.
        validation_path: a file or files to hold out instead; then `train_split` has no effect.
        completion_style: "chat" makes a user message and its answer of prompt and completion; "raw" joins them.
        vocabulary_size: of the model; ids beyond it are refused.

    Raises DataError for a file or a setting that cannot be used.
    """

    def __init__(
        self,
        path: Paths,
        tokenizer: ChatTokenizer,
        *,
        batch_size: int = 2,
        max_seq_length: int = 2048,
        train_split: float = 0.9,
        shuffle: bool = True,
        seed: int = 42,
        num_workers: int = 0,
        validation_path: Paths | None = None,
        completion_style: CompletionStyle = "chat",
        vocabulary_size: int | None = None,
    ) -> None:
        check_settings(batch_size, max_seq_length, train_split, seed, num_workers, completion_style)
        self.batch_size = batch_size
        self.max_seq_length = max_seq_length
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self._pad_id = tokenizer.pad_token_id or 0
        encoder = SampleEncoder.of(tokenizer, completion_style)
        sources = find_sources(path, validation_path)
        sides = [side for side in (sources.train, sources.validation) if side]
        files = [load_files(side, encoder, max_seq_length) for side in sides]
        if vocabulary_size is not None:
            check_vocabulary(chain.from_iterable(file.rows for file in files), vocabulary_size, encoder)
        self.train_rows, self.validation_rows = divide(files, seed, train_split)
        leaks = find_leaks(self.train_rows, self.validation_rows)
        self.summary: DataSummary = summarize(files, self.train_rows, self.validation_rows, len(leaks))
        for line in str(self.summary).splitlines():
            logger.info("%s", line)
        tell_leaks(leaks, len(self.validation_rows))

    def train_loader(self) -> BatchLoader:
        """A new loader of the training rows, at the start of epoch 0."""
        return BatchLoader(
            self.train_rows,
            batch_size=self.batch_size,
            max_seq_length=self.max_seq_length,
            shuffle=self.shuffle,
            seed=self.seed,
            pad_id=self._pad_id,
            workers=self.num_workers,
        )

    def validation_loader(self) -> BatchLoader | None:
        """A loader of the held-out rows, alike every time and sorted by length; None where no row is held out."""
        if not self.validation_rows:
            return None
        return BatchLoader(
            sorted(self.validation_rows, key=len),
            batch_size=self.batch_size,
            max_seq_length=self.max_seq_length,
            shuffle=False,
            seed=self.seed,
            pad_id=self._pad_id,
            workers=self.num_workers,
            resumable=False,
        )


def divide(files: list[LoadedFile], seed: int, train_split: float) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    """Training and validation rows: those of two loads, or a seeded split of one."""
    first, *others = files
    if others:
        return first.rows, others[0].rows
    train, validation = split(seed, first.total, [row.number for row in first.rows], train_split)
    return tuple(first.rows[i] for i in train), tuple(first.rows[i] for i in validation)


def check_settings(
    batch_size: int,
    max_seq_length: int,
    train_split: float,
    seed: int,
    num_workers: int,
    completion_style: str,
) -> None:
    """Raise DataError naming the first setting outside its range."""
    ranges = (
        ("batch_size", batch_size, batch_size >= 1, "1 or more"),
        ("max_seq_length", max_seq_length, max_seq_length >= 2, "2 or more"),
        ("train_split", train_split, 0 < train_split <= 1, "above 0 and at most 1.0, where 1.0 holds out nothing"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("num_workers", num_workers, num_workers >= 0, "0 or more threads"),
        ("completion_style", completion_style, completion_style in ("chat", "raw"), '"chat" or "raw"'),
    )
    for name, value, valid, right in ranges:
        if not valid:
            raise DataError(f"{name} is {value!r}. It must be {right}.")
