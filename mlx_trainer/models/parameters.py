"""How many parameters a model has, which of them train, and what they weigh."""

import re
from collections import defaultdict
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from mlx_trainer.models.lora import is_adapter, rank_of, trainable

PACKING = ("scales", "biases")  # what a quantized layer keeps beside its packed weight: bytes, but no parameters


@frozen
class ParameterGroup:
    """Layers alike but for their number: `name` like `layers.0-31.self_attn.q_proj`, `kind` like `LoRALinear r16`."""

    name: str
    kind: str
    total: int
    trainable: int
    bytes: int


@frozen
class ParameterStats:
    """Numbers of parameters, packed ones counted as what they stand for, and their size in memory in bytes."""

    total: int
    trainable: int
    bytes: int
    groups: tuple[ParameterGroup, ...]

    @property
    def percent(self) -> float:
        """The trainable share, 0 to 100."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        """A table with one row for each group, and a line of totals."""
        rows = [
            (group.name, group.kind, readable(group.total), "trains" * (group.trainable > 0)) for group in self.groups
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        totals = f"{readable(self.trainable)} of {readable(self.total)} parameters train ({self.percent:.3g} %)"
        return "\n".join([*lines, f"{totals}; {self.bytes / 1e6:,.1f} MB"])


def parameter_stats(model: nn.Module) -> ParameterStats:
    """Return the statistics of `model`; nothing is read from the device."""
    members: dict[tuple[str, str], list[tuple[str, ParameterGroup]]] = defaultdict(list)
    for path, module in model.named_modules():
        if row := own_parameters(path, module):
            members[re.sub(r"\.\d+(?=\.|$)", ".*", f".{path}", count=1), row.kind].append((path, row))
    groups = tuple(merged(rows) for _, rows in sorted(members.items()))
    return ParameterStats(
        total=sum(group.total for group in groups),
        trainable=sum(group.trainable for group in groups),
        bytes=sum(group.bytes for group in groups),
        groups=groups,
    )


def own_parameters(path: str, module: nn.Module) -> ParameterGroup | None:
    """Return what `module` itself holds, its submodules not counted; None where that is nothing."""
    own = {name: value for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")}
    training = trainable(module)
    if not own:
        return None
    return ParameterGroup(
        name=path,
        kind=kind(module),
        total=sum(count(module, name, value) for name, value in own.items()),
        trainable=sum(count(module, name, value) for name, value in own.items() if name in training),
        bytes=sum(value.nbytes for value in own.values()),
    )


def count(module: nn.Module, name: str, value: mx.array) -> int:
    """Return how many parameters the array `name` of `module` stands for."""
    bits = getattr(module, "bits", None)
    if bits is None:
        return value.size
    return 0 if name in PACKING else value.size * 32 // bits if name == "weight" else value.size


def kind(module: nn.Module) -> str:
    """Return a layer's class with what matters about it: an adapter's rank, a packed weight's bits."""
    name = type(module).__name__
    if is_adapter(module):
        return f"{name} r{rank_of(module)}"
    return f"{name} {module.bits}-bit" if hasattr(module, "bits") else name


def merged(rows: Sequence[tuple[str, ParameterGroup]]) -> ParameterGroup:
    """Return one group for layers whose paths differ in their first number only."""
    numbers = sorted(int(match[1]) for path, _ in rows if (match := re.search(r"\.(\d+)(?=\.|$)", f".{path}")))
    name = re.sub(r"\.\d+(?=\.|$)", f".{ranges(numbers)}", f".{rows[0][0]}", count=1).removeprefix(".")
    return ParameterGroup(
        name=name.removeprefix("model."),
        kind=rows[0][1].kind,
        total=sum(row.total for _, row in rows),
        trainable=sum(row.trainable for _, row in rows),
        bytes=sum(row.bytes for _, row in rows),
    )


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers with runs joined.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def readable(number: int) -> str:
    """Return a number of parameters for people: three digits and K, M or B.

    >>> readable(4_194_304)
    '4.19 M'
    """
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
