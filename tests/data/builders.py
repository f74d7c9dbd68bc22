"""Building a token store in a process of its own, so that it can be killed, raced, or kept from writing.

    python -m tests.data.builders ROWS.jsonl CACHE '{"pause_s": 0.001}'

Prints the folder of the store and the process's peak memory as JSON, or `DataError` and its text.
"""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_trainer.data import DataError
from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.sources import files
from mlx_trainer.data.sources.files import FileSource, Progress
from mlx_trainer.data.sources.jsonl import Line
from mlx_trainer.data.sources.mapping import FieldMapping
from mlx_trainer.data.store import building, parsing
from mlx_trainer.data.store.recipe import Recipe
from tests.data.tokenizers_for_tests import byte_level_mistral

ROOT = Path(__file__).parents[2]


class SlowSource(FileSource):
    """A file whose lines take their time, so that there is some to interrupt."""

    pause_s = 0.0

    def lines(self, progress: Progress | None = None) -> Iterator[Line]:
        """The lines, with a pause after each hundredth."""
        for line in super().lines(progress):
            if line.number % 100 == 0:
                time.sleep(self.pause_s)
            yield line


def recipe_of(max_seq_length: int = 64) -> Recipe:
    """A recipe with byte-level BPE."""
    tokenizer = byte_level_mistral()
    return Recipe(tokenizer, SampleEncoder.of(tokenizer), FieldMapping(), max_seq_length, "truncate")


def write_texts(path: Path, rows: int, letters: int = 20) -> Path:
    """A file of distinct rows."""
    with path.open("w") as file:
        file.writelines(json.dumps({"text": f"row {i} {'x' * (i % letters)}"}) + "\n" for i in range(rows))
    return path


def command(rows: Path, cache: Path, **options: Any) -> list[str]:
    """What starts a process that builds the store of `rows`."""
    return [sys.executable, "-m", "tests.data.builders", str(rows), str(cache), json.dumps(options)]


def start(rows: Path, cache: Path, **options: Any) -> subprocess.Popen[str]:
    """Such a process, started."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command(rows, cache, **options), cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the process printed in the end; raises AssertionError where that is no answer."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    told: dict[str, Any] = json.loads(out)
    return told | {"log": errors}


def content(store: Path) -> dict[str, bytes]:
    """All files of a store."""
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def die_at(step: str) -> None:
    """Let this process be killed right before or after a store is put in its place."""
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        moved = rename(path, target) if step == "after rename" else path
        os.kill(os.getpid(), signal.SIGKILL)
        return moved

    Path.rename = killed  # type: ignore[method-assign, assignment]


def apply(options: dict[str, Any]) -> None:
    """Set what this process was told to be like."""
    SlowSource.pause_s = options.get("pause_s", 0.0)
    files.CHUNK = options.get("chunk", files.CHUNK)
    if "together" in options:
        parsing.ENCODED_TOGETHER = options["together"]
        parsing.BYTES_TOGETHER = 1 << 30
    if "die" in options:
        die_at(options["die"])
    if "file_size" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_size"],) * 2)


def peak() -> int:
    """The most bytes of memory that this process had; Linux's `ru_maxrss` would count those of its parent too."""
    if sys.platform == "linux":
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(rows: str, cache: str, text: str) -> None:
    """Build and tell."""
    logging.basicConfig(level=logging.INFO)
    options: dict[str, Any] = json.loads(text)
    apply(options)
    recipe = recipe_of(options.get("max_seq_length", 64))
    if "ready" in options:
        Path(options["ready"]).touch()
    try:
        store = building.open_store(SlowSource.of(Path(rows)), recipe, Path(cache))
    except DataError as error:
        print(json.dumps({"DataError": str(error)}))
    else:
        print(json.dumps({"store": str(store.folder), "peak": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
