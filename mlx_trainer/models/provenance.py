"""Which base model it was: facts that cost little, and on request every byte against what the Hub published."""

import hashlib
import re
from pathlib import Path
from typing import Any

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.source import commit_of

SAMPLES, SAMPLE_BYTES = 16, 1 << 16
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def base_facts(directory: Path) -> dict[str, Any]:
    """Return commit, sizes and sampled digests of the weights in `directory`, as plain JSON values.

    A digest is of a file's size and of 16 parts of 64 KiB from its beginning, which is the header, to its end: another
    training changes it, a single flipped bit need not. Takes about 1 ms for each file that the system has in its
    cache; `verify` reads all of it.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sampled_sha256": sampled_digest(path)}
        for path in sorted(directory.glob("model*.safetensors"))
    }
    return {"revision": commit_of(directory), "files": files}


def sampled_digest(path: Path) -> str:
    """The SHA-256 of a file's size and of evenly spread parts of it; of all of it where it is short."""
    size = path.stat().st_size
    step = max((size - SAMPLE_BYTES) / (SAMPLES - 1), SAMPLE_BYTES)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(int(number * step))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def verify(directory: Path) -> None:
    """Raise ModelError where a file of a Hub snapshot is not what the Hub published, bit for bit.

    The cache names each file after the digest that the Hub gave: SHA-256 for large ones, Git's own for others. Reads
    everything, at 1 to 2 GB/s. Raises ModelError for a folder that is no snapshot too: there is nothing to compare.
    """
    compared = 0
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        expected = path.resolve().name
        if path.resolve().parent.name != "blobs" or not _DIGEST.fullmatch(expected):
            continue
        compared += 1
        if published_digest(path, large=len(expected) == 64) != expected:
            raise ModelError(
                f"{path} is not what the Hub published (its digest is not {expected}). Remove {path.resolve()} and "
                "download it anew."
            )
    if compared == 0:
        raise ModelError(f"{directory} is no snapshot of the Hub, so there is nothing to verify it against.")


def published_digest(path: Path, *, large: bool) -> str:
    """The digest by which the Hub names a file: SHA-256, or Git's SHA-1 of a header and the content."""
    with path.open("rb") as file:
        if large:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
