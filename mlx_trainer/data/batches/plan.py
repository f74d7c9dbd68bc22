"""Which rows make which batch: pure functions of the seed, so that resuming replays nothing.

Rows are put into few classes of nearly equal length; a batch holds rows of one class, so there are as many shapes as
classes. What is left of a class joins the next longer one, and what is left of the last makes the one short batch of
the epoch. A class is dealt like cards: sorted by length, cut into as many piles as a batch has rows, each pile
shuffled, and each batch takes one row of every pile. So all batches of a class hold nearly the same number of tokens,
and what they hold at most is known for every epoch. Rows that share a prefix are strata of their own (`strata.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
from attrs import Factory, define, evolve, frozen

from mlx_trainer.data.batches.classes import LengthClass, blocks_of, classes_of, whole_steps
from mlx_trainer.data.batches.shapes import Budget, Integers, Lengths, Shape
from mlx_trainer.data.batches.strata import Indices, Stratum, plain, share_shapes


class PlannedBatch(NamedTuple):
    """The rows of a batch, and the shape that it is padded to."""

    rows: Indices
    shape: Shape


@frozen(eq=False)
class EpochPlan(Sequence[PlannedBatch]):
    """The batches of an epoch. With several ranks, batch i belongs to rank i mod ranks, and there are equally many.

    `order` are the numbers of all rows, batch by batch; batch i begins at `starts[i]` and has `shapes[classes[i]]`.
    """

    order: Indices
    starts: Lengths
    classes: Indices
    shapes: tuple[Shape, ...]

    def __len__(self) -> int:
        return len(self.classes)

    @overload
    def __getitem__(self, i: int) -> PlannedBatch: ...
    @overload
    def __getitem__(self, i: slice) -> list[PlannedBatch]: ...
    def __getitem__(self, i: int | slice) -> PlannedBatch | list[PlannedBatch]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]
        return PlannedBatch(self.order[self.starts[i] : self.starts[i + 1]], self.shapes[self.classes[i]])

    @property
    def shared_tokens(self) -> list[int]:
        """Tokens of each batch that are not computed again, since another of its rows begins with them too."""
        kinds, rows = self.classes.tolist(), np.diff(self.starts).tolist()
        return [self.shapes[kind].shared_tokens(count) for kind, count in zip(kinds, rows, strict=True)]


def plan(
    seed: int,
    epoch: int,
    lengths: Integers,
    budget: Budget,
    ranks: int = 1,
    *,
    shuffle: bool = True,
    strata: Sequence[Stratum] = (),
) -> EpochPlan:
    """The batches of `epoch`: each row in exactly one, for any arguments, and nothing else decides.

    `lengths` are those of the rows, in tokens; without `shuffle` rows keep their order, that of the only stratum. The
    number of batches is a multiple of `ranks`, and where there are fewer rows than ranks, some are empty. How many
    batches there are of which shape depends on neither seed nor epoch. Rows of different `strata` do not meet where
    these are given.
    """
    strata = strata or [plain(lengths)]
    if not shuffle:
        return in_order(strata[0], [one.shape for one in classes_of(strata[0], budget, ranks)], ranks)
    random, dealt = generator(seed, epoch), Dealt()
    for stratum, own in zip(strata, share_shapes(strata, budget), strict=True):
        classes = classes_of(stratum, own, ranks)
        shuffled = random.permutation(len(stratum.sizes)).astype(np.int32 if len(lengths) < 2**31 else np.int64)
        by_size = np.take(shuffled, np.argsort(stratum.sizes[shuffled], kind="stable"))
        dealt.add(stratum, classes, *deal(random, by_size, classes))
    return in_random_order(random, dealt, ranks)


@define
class Dealt:
    """Batches of all strata, not yet in order."""

    shapes: list[Shape] = Factory(list)
    full: list[Indices] = Factory(list)
    """For each shape its full batches, (batches, rows)."""
    left: list[tuple[int, Stratum, Indices]] = Factory(list)
    """A shape's number and the units that are left in the end, for each stratum that has some."""

    def add(self, stratum: Stratum, classes: Sequence[LengthClass], batches: Sequence[Indices], left: Indices) -> None:
        """Add what `deal` made of a stratum."""
        self.shapes += [one.shape for one in classes]
        self.full += map(stratum.rows, batches)
        if len(left):
            self.left.append((len(self.shapes) - 1, stratum, left))


def generator(*words: int) -> np.random.Generator:
    """A random generator that depends on `words` alone, on every machine and numpy version."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def deal(
    random: np.random.Generator, by_size: Indices, classes: Sequence[LengthClass]
) -> tuple[list[Indices], Indices]:
    """The full batches of each class, (batches, units), and the units that are left over in the end."""
    dealt: list[Indices] = []
    left = by_size[:0]
    for one in classes:
        units = np.concatenate([left, by_size[one.begin : one.end]])
        blocks = blocks_of(len(units), one.left)
        taken = random.integers(blocks[:-1], blocks[1:]) if one.left else blocks[:0]
        left = units[taken]
        piles = np.delete(units, taken).reshape(one.units, one.batches)
        dealt.append(random.permuted(piles, axis=1).T)
    return dealt, left


def in_random_order(random: np.random.Generator, dealt: Dealt, ranks: int) -> EpochPlan:
    """The full batches shuffled, `ranks` of one shape at a time; at the end what is left of each stratum."""
    kinds = np.repeat(np.arange(len(dealt.full), dtype=np.uint16), [len(batches) for batches in dealt.full])
    order = np.add.outer(random.permutation(len(kinds) // ranks) * ranks, np.arange(ranks)).reshape(-1)
    last = [stratum.rows(left[rank::ranks]) for _, stratum, left in dealt.left for rank in range(ranks)]
    last_kinds = np.repeat([kind for kind, _, _ in dealt.left], ranks)
    full = np.array([shape.rows for shape in dealt.shapes], np.int64)[kinds[order]]
    starts = starts_of(np.concatenate([full, [*map(len, last)]]))
    rows = np.empty(starts[-1], np.result_type(np.int32, *dealt.full, *last))
    places = np.empty_like(order)
    places[order] = starts[: len(order)]
    before = 0
    for batches in dealt.full:
        here = places[before : before + len(batches)]
        rows[here[:, None] + np.arange(batches.shape[1])] = batches
        before += len(batches)
    rows[starts[len(order)] :] = np.concatenate([rows[:0], *last])
    return EpochPlan(rows, starts, np.concatenate([kinds[order], last_kinds.astype(np.uint16)]), tuple(dealt.shapes))


def in_order(stratum: Stratum, shapes: Sequence[Shape], ranks: int) -> EpochPlan:
    """Batches of units that follow each other; each has the shape that its longest row needs."""
    kinds = np.searchsorted([shape.length for shape in shapes], stratum.longest)
    rounds = rounds_in_order(kinds, [shape.rows // stratum.each * ranks for shape in shapes])
    share = -(-np.diff(rounds) // ranks)
    starts = np.minimum(rounds[:-1, None] + share[:, None] * np.arange(ranks), rounds[1:, None]).reshape(-1)
    classes = most_of(kinds, starts)
    starts = np.concatenate([starts, [len(kinds)]])
    tokens = np.diff(starts_of(stratum.sizes)[starts])
    most = [int(tokens[classes == k].max(initial=0)) for k in range(len(shapes))]
    told = tuple(evolve(shape, tokens=whole_steps(t, shape)) for shape, t in zip(shapes, most, strict=True))
    return EpochPlan(stratum.rows(np.arange(len(kinds))), starts * stratum.each, classes, told)


def rounds_in_order(kinds: Indices, most: Sequence[int]) -> Lengths:
    """Where rounds of rows begin, and the end; a round with rows up to class k has at most `most[k]` rows."""
    if len(set(most)) == 1:
        return np.append(np.arange(0, len(kinds), most[0]), len(kinds))
    limits = np.array(most)
    edges = [0]
    while edges[-1] < len(kinds):
        ahead = np.maximum.accumulate(kinds[edges[-1] : edges[-1] + limits[0]])
        edges.append(edges[-1] + int((np.arange(len(ahead)) < limits[ahead]).sum()))
    return np.array(edges)


def most_of(kinds: Indices, starts: Lengths) -> Indices:
    """The largest of `kinds` from each of `starts` up to the next, 0 where there is none."""
    padded = np.append(kinds, 0)  # reduceat takes no start at the end
    ends = np.append(starts[1:], len(kinds))
    return np.where(ends > starts, np.maximum.reduceat(padded, starts), 0).astype(np.uint16)


def starts_of(sizes: Integers) -> Lengths:
    """Where parts of these sizes begin, and the end of the last."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def split(seed: int, rows: int, kept: Integers, train_split: float) -> tuple[Indices, Indices]:
    """Positions in `kept` of the training and of the validation rows, ascending.

    `kept` are the numbers, out of `rows` in the file, of the rows that can be used. One permutation of all `rows`
    decides, so that a row keeps its side when another one is repaired or cut. At least one row is held out where
    `train_split` < 1 and two are kept.
    """
    held_out = round(len(kept) * (1 - train_split))
    if train_split < 1:
        held_out = min(max(held_out, 1), len(kept) - 1)
    rank = np.empty(rows, np.int64)
    rank[generator(seed).permutation(rows)] = np.arange(rows)
    order = np.argsort(rank[kept])
    return np.sort(order[held_out:]), np.sort(order[:held_out])
