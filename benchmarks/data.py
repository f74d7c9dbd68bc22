"""From JSONL to batches: speed, second starts, memory, padding and planning, beside mlx-lm with the same file.

    python benchmarks/data.py                                        # all of it, some minutes
    python benchmarks/data.py --rows 10000 100000 1000000            # second starts and memory of a million rows too
    python benchmarks/data.py --only encoding padding                # some parts: encoding start memory padding plan

The tokenizer has Mistral v3's own vocabulary, which comes with mistral-common, and the texts are Python's language
reference and, ten times as much, the source code of its standard library. mlx-lm does what `mlx_lm.lora` does:
`load_dataset`, `CacheDataset` and, for padding, `iterate_batches`; each row is processed once. Ours is `DataPipeline`
with an empty cache: the store is encoded, written and synced. The two take turns; medians, and the median ratio of the
rounds. Starts and memory are those of processes of their own.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_trainer import DataPipeline
from mlx_trainer.data.batches.plan import plan
from mlx_trainer.data.batches.shapes import Budget
from mlx_trainer.data.report import report_on
from mlx_trainer.models import load_tokenizer

SOURCES = sorted(path for path in Path(os.__file__).parent.glob("*.py") if path.is_file())
TEXT = " ".join(topics.values()) + "".join(path.read_text(encoding="utf-8", errors="replace") for path in SOURCES)
ROOT = Path(__file__).parent.parent
LETTERS_A_TOKEN = 3.45  # of that text with this vocabulary
LONGEST, MEDIAN, SIGMA = 1536, 198, 0.76  # a chat set's spread
SHORT, LONG = 60, 1500
PARTS = ("encoding", "start", "memory", "padding", "plan")


def write_tokenizer(folder: Path) -> None:
    """The tests' tokenizer with a chat template, as a model's folder holds it."""
    sys.path.insert(0, str(ROOT))
    from tests.data.tokenizers_for_tests import MISTRAL_TEMPLATE, mistral_tokenizer

    tokenizer = mistral_tokenizer()
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_chats(path: Path, tokens: Iterable[int], turns: int = 1) -> Path:
    """Chats of about so many tokens each, a third of them questions."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for wanted in tokens:
            letters = max(int((wanted - 1 - 3 * turns) * LETTERS_A_TOKEN / turns), 6)
            messages: list[dict[str, str]] = []
            for begin in rng.integers(0, len(TEXT) - letters, turns).tolist():
                end, cut = begin + letters, begin + letters // 3
                messages.append({"role": "user", "content": TEXT[begin:cut]})
                messages.append({"role": "assistant", "content": TEXT[cut:end].strip() or "yes"})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_set(folder: Path, tokens: Iterable[int], turns: int = 1) -> Path:
    """Such chats in a folder as mlx-lm reads it, with one to validate with."""
    folder.mkdir()
    write_chats(folder / "valid.jsonl", [SHORT])
    return write_chats(folder / "train.jsonl", tokens, turns)


def chat_mix(rows: int) -> list[int]:
    """Lengths of a chat set: log-normal, none longer than `LONGEST`."""
    lengths = np.random.default_rng(1).lognormal(np.log(MEDIAN), SIGMA, rows)
    return np.clip(lengths, 12, 0.85 * LONGEST).astype(int).tolist()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


# From JSONL to tokens.


def ours(file: Path, tokenizer: Any) -> tuple[float, int, int]:
    """Seconds, rows and tokens of a first start."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        pipeline = DataPipeline(file, tokenizer, train_split=1.0, cache_dir=cache)
        return time.perf_counter() - start, pipeline.summary.train_rows, pipeline.summary.tokens


def theirs(file: Path, tokenizer: Any, mask_prompt: bool) -> tuple[float, int, int]:
    """Seconds, rows and tokens of reading the file and processing each row once."""
    start = time.perf_counter()
    rows = mlx_lm_rows(file.parent, tokenizer, mask_prompt)
    tokens = sum(len(rows[i][0]) for i in range(len(rows)))
    return time.perf_counter() - start, len(rows), tokens


def mlx_lm_rows(folder: Path, tokenizer: Any, mask_prompt: bool = True) -> Any:
    """The training rows as `mlx_lm.lora` hands them to its trainer."""
    from mlx_lm.tuner.datasets import CacheDataset, load_dataset

    arguments = SimpleNamespace(data=str(folder), train=True, test=False, mask_prompt=mask_prompt)
    train, _, _ = load_dataset(arguments, tokenizer)
    return CacheDataset(train)


def encoding(folder: Path, arguments: argparse.Namespace) -> None:
    """Long and short rows, in rounds."""
    from mlx_lm.tokenizer_utils import load

    tokenizer, wrapped = load_tokenizer(folder / "tokenizer"), load(folder / "tokenizer")
    lines = []
    for name, count, length, turns in (
        ("long", arguments.long_rows, LONG, 4),
        ("short", arguments.short_rows, SHORT, 1),
    ):
        file = write_set(folder / name, [length] * count, turns)
        ways: dict[str, Callable[[], tuple[float, int, int]]] = {
            "mlx_trainer": lambda file=file: ours(file, tokenizer),
            "mlx_lm --mask-prompt": lambda file=file: theirs(file, wrapped, True),
            "mlx_lm": lambda file=file: theirs(file, wrapped, False),
        }
        rounds = [{way: run() for way, run in ways.items()} for _ in range(arguments.rounds)]
        for way in ways:
            seconds = statistics.median(each[way][0] for each in rounds)
            _, rows, tokens = rounds[0][way]
            ratio = statistics.median(each[way][0] / each["mlx_trainer"][0] for each in rounds)
            size = f"{rows:,} {name} rows of {tokens / rows:,.0f} tokens"
            lines.append((size, way, f"{rows / seconds:,.0f}", f"{tokens / seconds:,.0f}", f"{ratio:.2f}"))
    table(("from JSONL to tokens", "", "rows/s", "tokens/s", "time over ours"), lines)


# Processes of their own.


def in_process(what: str, file: Path, folder: Path) -> dict[str, float]:
    """What `python benchmarks/data.py --child` tells."""
    command = [sys.executable, __file__, "--child", what, str(file), str(folder)]
    told: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return told


def child(what: str, file: str, folder: str) -> None:
    """Start, and read the first batch or an epoch; print seconds and peak memory as JSON."""
    logging.basicConfig(level=logging.INFO)
    tokenizer = load_tokenizer(Path(folder, "tokenizer"))
    before, start = peak_megabytes(), time.perf_counter()
    pipeline = DataPipeline(file, tokenizer, batch_size=16, cache_dir=Path(folder, "cache"))
    ready = time.perf_counter()
    batches = iter(pipeline.train_loader())
    next(batches)
    first = time.perf_counter()
    built = peak_megabytes()
    if what == "epoch":
        for _ in batches:
            pass
    figures = {"pipeline": ready - start, "first": first - start, "epoch": time.perf_counter() - first}
    print(json.dumps(figures | {"before": before, "built": built, "peak": peak_megabytes()}))


def peak_megabytes() -> float:
    """The most memory that this process had; Linux's `ru_maxrss` would count that of its parent too."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def starts_and_memory(folder: Path, arguments: argparse.Namespace) -> None:
    """For each number of rows: build and read an epoch in one process, then start again in others."""
    starts, memory = [], []
    for rows in arguments.rows:
        file = write_chats(folder / f"{rows}.jsonl", [SHORT] * rows)
        built = in_process("epoch", file, folder)
        again = [in_process("first batch", file, folder) for _ in range(arguments.rounds)]
        seconds, first = (statistics.median(each[key] for each in again) for key in ("pipeline", "first"))
        starts.append((f"{rows:,}", f"{built['pipeline']:.1f}", f"{seconds:.2f}", f"{first:.2f}"))
        figures = (f"{built[key]:,.0f}" for key in ("before", "built", "peak"))
        memory.append((f"{rows:,}", *figures, f"{statistics.median(each['peak'] for each in again):,.0f}"))
        file.unlink()
    if "start" in arguments.only:
        table(("rows", "first start, s", "second: DataPipeline made, s", "second: first batch there, s"), starts)
    if "memory" in arguments.only:
        head = ("rows", "imports and tokenizer, MB", "store built, MB", "an epoch read, MB", "second start, MB")
        table(head, memory)


# Padding and planning.


def padding(folder: Path, arguments: argparse.Namespace) -> None:
    """Positions that are computed for each real token, for three sizes of batches."""
    from mlx_lm.tokenizer_utils import load

    file = write_set(folder / "mix", chat_mix(arguments.mix_rows))
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows = mlx_lm_rows(file.parent, load(folder / "tokenizer"))
    by_length = [rows[i] for i in range(len(rows))]
    lengths = np.array([len(ids) for ids, _ in by_length])
    lines = []
    sizes: tuple[dict[str, int], ...] = ({"batch_size": 4}, {"batch_size": 16}, {"batch_tokens": 8192})
    for size in sizes:
        cells: list[tuple[str, float, int]] = []
        for layout in ("padded", "unpadded"):
            report = report_on(pipeline_of(file, tokenizer, folder, layout=layout, **size))
            cells.append((f"mlx_trainer, {layout}", report.positions_per_token, report.shapes))
        if "batch_size" in size:
            cells.append(("mlx_lm.lora", *peer_padding(rows, size["batch_size"])))
            cells.append(("mlx_lm, were its rows sorted", *peer_padding(by_length, size["batch_size"])))
        name = "={:,}".format(*size.values()).join((*size, ""))
        lines += [(name, way, f"{ratio:.3f}", f"{1 - 1 / ratio:.1%}", f"{shapes:,}") for way, ratio, shapes in cells]
    p50, p95, longest = np.percentile(lengths, (50, 95, 100))
    head = f"{len(lengths):,} rows, p50 {p50:.0f}, p95 {p95:.0f}, longest {longest:.0f}"
    table((head, "", "positions per token", "padding", "shapes"), lines)


def pipeline_of(file: Path, tokenizer: Any, folder: Path, **options: Any) -> DataPipeline:
    """The pipeline of all rows of a file."""
    return DataPipeline(file, tokenizer, train_split=1.0, max_seq_length=LONGEST, cache_dir=folder / "cache", **options)


def peer_padding(rows: Any, size: int) -> tuple[float, int]:
    """Positions that mlx-lm's loss gives to the model for each token in its batches, and how many shapes they have."""
    from mlx_lm.tuner.trainer import iterate_batches

    positions = tokens = 0
    shapes: set[tuple[int, int]] = set()
    for batch, lengths in iterate_batches(rows, size, LONGEST, seed=0):
        count, length = batch.shape
        positions += count * (length - 1)  # the last position of each row is a target alone
        tokens += int(lengths[:, 1].sum().item())
        shapes.add((count, length))
    return positions / tokens, len(shapes)


def planning(arguments: argparse.Namespace) -> None:
    """The plan of an epoch from lengths alone."""
    rng = np.random.default_rng(2)
    lengths = np.clip(rng.lognormal(np.log(MEDIAN), SIGMA, arguments.plan_rows), 2, LONGEST).astype(np.int32)
    lines = []
    for name, budget in (("batch_size=16", Budget(rows=16)), ("batch_tokens=8,192", Budget(tokens=8192))):
        seconds = []
        for epoch in range(arguments.rounds):
            start = time.perf_counter()
            planned = plan(0, epoch, lengths, budget)
            seconds.append(time.perf_counter() - start)
        lines.append((name, f"{len(planned):,}", f"{statistics.median(seconds):.2f}"))
    table((f"plan of {arguments.plan_rows:,} rows", "batches", "s"), lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000], help="for starts and memory")
    parser.add_argument("--long-rows", type=int, default=2000)
    parser.add_argument("--short-rows", type=int, default=20_000)
    parser.add_argument("--mix-rows", type=int, default=10_000)
    parser.add_argument("--plan-rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as `mlx_lm.lora` sets it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        if "encoding" in arguments.only:
            encoding(folder, arguments)
        if {"start", "memory"} & {*arguments.only}:
            starts_and_memory(folder, arguments)
        if "padding" in arguments.only:
            padding(folder, arguments)
        if "plan" in arguments.only:
            planning(arguments)


if __name__ == "__main__":
    main()
