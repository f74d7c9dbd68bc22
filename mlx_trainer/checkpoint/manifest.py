"""The manifest of a checkpoint: the size and SHA-256 of every file, without which nothing is read.

It is written last, and read back only if it is to the byte what was written then. Names in it are compared with the
names that are there and never opened, so no name leads out of the directory.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from mlx_trainer.folders import open_plain
from mlx_trainer.safetensors_file import check_header

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
LARGEST = 1 << 20
"""Bytes of a manifest; one of a few files has some hundreds."""
NOT_OURS = {".DS_Store"}
"""What Finder leaves in each folder that is looked at; nothing reads it."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be read."""


def seal(directory: Path, run: str | None = None) -> None:
    """Write the manifest of all files in `directory`, a part of the run with the id `run`."""
    files = {}
    for name, file in plain_files(directory):
        files[name] = facts(file)
    contents: dict[str, Any] = {"format_version": FORMAT_VERSION, "run": run, "files": files}
    (directory / MANIFEST).write_text(as_text(contents | {"sha256": digest(contents)}))


def verify(directory: Path) -> None:
    """Raise CheckpointError unless `directory` holds the files that its manifest names, each as it was, and no other.

    A safetensors file must also have a header that the safetensors library takes; it refuses some that MLX reads, with
    overlapping tensors for instance. A hard link is a file as any other: what counts is what it holds. Costs reading
    all once, about 1 s per 1.5 GB, and some 50 µs for each header.

    What is verified is what is read afterwards, unless someone writes to the directory in between: MLX opens the file
    again by its name, and reads it as soon as it has opened it.
    """
    with explained(directory):
        expected = manifest(directory)["files"]
        missing = set(expected)
        for name, file in plain_files(directory):
            if name not in expected:
                raise CheckpointError(f"{directory / name} is not in the manifest of {directory}; move it away")
            missing.remove(name)
            check(directory / name, file, expected[name])
        if missing:
            raise CheckpointError(f"{directory}: {min(missing)[:200]!r} is missing")


def check(path: Path, file: BufferedReader, expected: Any) -> None:
    """Raise CheckpointError unless `file`, open at `path`, is what its entry in the manifest says."""
    size = os.fstat(file.fileno()).st_size
    if not isinstance(expected, dict) or size != expected.get("size"):
        said = expected.get("size") if isinstance(expected, dict) else expected
        raise CheckpointError(f"{path} has {size} bytes, its manifest says {str(said)[:40]}")
    if facts(file) != expected:
        raise CheckpointError(f"{path} differs from what was saved (SHA-256)")
    if path.suffix == ".safetensors":
        try:
            check_header(path)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def run_of(directory: Path) -> str | None:
    """The id of the run that wrote a checkpoint, None where it was written before runs had one.

    Raises CheckpointError where the manifest does not say.
    """
    with explained(directory):
        return manifest(directory).get("run")


def manifest(directory: Path) -> dict[str, Any]:
    """The contents of the manifest, which are as they were written; raises CheckpointError, or OSError."""
    with open_plain(directory / MANIFEST) as file:
        read = file.read(LARGEST + 1)
    try:
        if len(read) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        contents = json.loads(read)
        version = contents["format_version"]
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"{directory / MANIFEST} has format version {str(version)[:40]}; "
                f"this version of mlx_trainer reads {FORMAT_VERSION}"
            )
        if as_text(contents).encode() != read:  # also where a key is there twice, or a number is NaN
            raise ValueError("it is not as it was written")
        sealed = contents.pop("sha256", None)
        known = ["files", "format_version"] if sealed is None else ["files", "format_version", "run"]
        if sorted(contents) != known or sealed not in (None, digest(contents)):
            raise ValueError("it is not as it was written")
        if not isinstance(contents["files"], dict):
            raise ValueError("its files are no table")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{directory} is no complete checkpoint: {MANIFEST} cannot be used ({str(error)[:200]})"
        ) from error
    return dict(contents)


def as_text(contents: Any) -> str:
    """The one text for these contents."""
    return json.dumps(contents, indent=2, allow_nan=False) + "\n"


def digest(contents: Any) -> str:
    """The SHA-256 of contents in hexadecimal."""
    return hashlib.sha256(as_text(contents).encode()).hexdigest()


def facts(file: BufferedReader) -> dict[str, Any]:
    """The size in bytes and the SHA-256 in hexadecimal of an open file."""
    checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": os.fstat(file.fileno()).st_size, "sha256": checksum}


def plain_files(directory: Path) -> Iterator[tuple[str, BufferedReader]]:
    """The name and an open file for each in `directory` and its folders, but the manifest.

    Raises CheckpointError for what is neither, such as a link or a pipe, and OSError where something cannot be read.
    """
    top = os.path.realpath(directory)
    for folder, folders, names, descriptor in os.fwalk(top, onerror=_raise):
        folders.sort()
        within = os.path.relpath(folder, top)
        for name in folders:
            if not stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                raise CheckpointError(f"{os.path.join(folder, name)} is a link; a checkpoint has plain files only")
        for name in sorted(names):
            relative = os.path.normpath(os.path.join(within, name))
            if relative == MANIFEST or name in NOT_OURS:
                continue
            try:
                file = open_plain(name, descriptor)
            except OSError as error:
                raise CheckpointError(
                    f"{directory / relative} cannot be read as a plain file: {error.strerror}"
                ) from error
            with file:
                yield relative, file


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turn an error of the system into a CheckpointError that names the checkpoint."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no complete checkpoint: {error.filename} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
