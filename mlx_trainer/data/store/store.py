"""The token store: the ids and masks of one source's rows in flat files that are mapped into memory.

A store is a folder, complete or absent:

    ids.bin        the ids of all rows one behind the other, 2 bytes each where the vocabulary allows it, else 4
    trained.bin    a byte for each of them: whether it is trained
    rows.bin       a record for each row, `ROW`
    prefixes.bin   a record for each row, `PREFIX`: with which other rows it begins alike
    notes.jsonl    the rows that were skipped, cut or dropped, each with its line and the reason
    store.json     what the store holds in all, written last

Its name is its key: a digest of all that decides what it holds (`building.py`). Memory does not grow with it: what was
read of the mapped files is handed back to the system every `READ_AT_ONCE` bytes, and stays in its cache.
"""

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray

from mlx_trainer.data.encoding.tokenizer import BoolArray, IntArray
from mlx_trainer.data.samples.conversation import DataError

FORMAT = 3
FACTS = "store.json"
NOTES = "notes.jsonl"
READ_AT_ONCE = 32 << 20
SIDES = "chosen", "rejected"

ROW = np.dtype(
    [
        ("start", "<i8"),  # of its tokens in the flat files
        ("digest", "<u8"),  # equal for rows of the same ids and mask
        ("number", "<i8"),  # among all rows of the source, from 0
        ("line", "<i8"),  # in the file, from 1
        ("length", "<i4"),  # in tokens
        ("trained", "<i4"),  # tokens of it that are trained
        ("part", "<i4"),  # from 1 where a row was split, else 0; of a pair, 1 is the chosen and 2 the rejected answer
        ("first", "<i4"),  # the position of the first trained token
    ]
)
PREFIX = np.dtype(
    [
        ("family", "<u8"),  # equal for rows that begin alike
        ("prefix", "<i4"),  # so many tokens that all rows of the family have in common, none of them trained; or 0
    ]
)


@frozen
class StoreFacts:
    """What a store holds in all, and what became of the rows that it does not hold.

    `total` counts the rows of the source, `rows` those of the store, `lengths` the rows by their tokens before any
    cut, `formats` by their format. `counts` has the rows of each kind of note: `bad`, `truncated` (cut, and still
    trained), `split`, `dropped` (nothing left to train) and `control` (texts that spell a control token); `told` the
    first of each as (line, reason).
    """

    rows: int
    total: int
    tokens: int
    trained_tokens: int
    largest_id: int
    id_bytes: int
    lengths: Mapping[int, int]
    formats: Mapping[str, int]
    counts: Mapping[str, int]
    told: Mapping[str, Sequence[tuple[int, str]]]
    pairs: bool

    def to_json(self) -> str:
        """The facts as text."""
        return json.dumps({"format": FORMAT} | asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote; raises ValueError, KeyError or TypeError for anything else."""
        values: dict[str, Any] = json.loads(text)
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        values["lengths"] = {int(length): count for length, count in values["lengths"].items()}
        return cls(**values)


@frozen(eq=False)
class TokenRow:
    """One row: `source` as in `chats.jsonl:12`, its ids and which of them are trained, both (length,).

    `side` is "chosen" or "rejected" in a pair, else empty.
    """

    source: str
    ids: IntArray
    trained: BoolArray
    side: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """How many of the row's labels count."""
        return int(np.count_nonzero(self.trained))


@frozen(eq=False)
class TokenStore:
    """A complete store, mapped into memory; `source` is the name by which its rows are told."""

    folder: Path
    source: str
    facts: StoreFacts
    _rows: "MappedArray"
    _ids: "MappedArray"
    _trained: "MappedArray"
    _prefixes: "MappedArray"

    @classmethod
    def open(cls, folder: Path, source: str) -> Self | None:
        """The store in `folder`; None where there is none, or where its files have other sizes than they must."""
        try:
            facts = StoreFacts.from_json((folder / FACTS).read_text(encoding="utf-8"))
            ids = np.dtype(f"<u{facts.id_bytes}")
            return cls(
                folder,
                source,
                facts,
                MappedArray.open(folder / "rows.bin", ROW, facts.rows),
                MappedArray.open(folder / "ids.bin", ids, facts.tokens),
                MappedArray.open(folder / "trained.bin", np.dtype(np.bool_), facts.tokens),
                MappedArray.open(folder / "prefixes.bin", PREFIX, facts.rows),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def column(self, name: str) -> NDArray[Any]:
        """A field of `ROW` or `PREFIX` of all rows, copied, (rows,)."""
        return (self._prefixes if name in (PREFIX.names or ()) else self._rows).field(name)

    def row(self, index: int) -> TokenRow:
        """A row; raises DataError where it is not what was written, as an id too large would crash MLX."""
        start, _, _, line, length, trained, part, _ = self._rows.copy(slice(index, index + 1))[0].tolist()
        place = slice(start, start + length)
        side = SIDES[(part - 1) % 2] if self.facts.pairs else ""
        source = f"{self.source}:{line} {side or f'part {part}'}" if part else f"{self.source}:{line}"
        row = TokenRow(source, self._ids.copy(place).astype(np.int32), self._trained.copy(place), side)
        if (len(row), row.trained_tokens) != (length, trained) or row.ids.max(initial=0) > self.facts.largest_id:
            raise DataError(f"{self.folder} is damaged at {source}. Remove it; it will be made again.")
        return row


class MappedArray:
    """A file as an array that is read in slices, each copied."""

    def __init__(self, mapped: mmap.mmap | None, values: NDArray[Any]) -> None:
        self._mapped, self._values, self._read = mapped, values, 0

    @classmethod
    def open(cls, path: Path, kind: np.dtype[Any], count: int) -> Self:
        """The array of `count` elements in `path`; raises ValueError where the file has another size."""
        with path.open("rb") as file:
            if path.stat().st_size != count * kind.itemsize:
                raise ValueError(f"{path} has another size")
            if count == 0:  # an empty file cannot be mapped
                return cls(None, np.empty(0, kind))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(mapped, np.frombuffer(mapped, kind))

    def copy(self, place: slice | NDArray[np.int64]) -> NDArray[Any]:
        """A copy of a slice, or of what stands at some places."""
        values = np.array(self._values[place])
        self._hand_back(values.nbytes)
        return values

    def field(self, name: str) -> NDArray[Any]:
        """A copy of a field of all records."""
        values = np.empty(len(self._values), self._values.dtype[name])
        step = max(READ_AT_ONCE // self._values.itemsize, 1)
        for begin in range(0, len(values), step):
            records = self._values[begin : begin + step]
            values[begin : begin + step] = records[name]
            self._hand_back(records.nbytes)
        return values

    def _hand_back(self, read: int) -> None:
        """Pages count as this process's memory from when they are read until they are handed back."""
        self._read += read
        if self._mapped is not None and self._read > READ_AT_ONCE:
            self._read = 0
            self._mapped.madvise(mmap.MADV_DONTNEED)
