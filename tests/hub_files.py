"""What the stand-in of the Hub keeps: repositories, files and how they are listed, faults to come."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, define

OWNER, STRANGER = "hf_CanaryOfTheOwner0123456789abcdefgh", "hf_CanaryOfAStranger0123456789abcdef"
LARGE_BYTES = 100_000
Files = dict[str, bytes]


class Refusal(Exception):
    """An answer other than 200; `code` is the Hub's word for it."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@define
class Repository:
    """Commits, newest last, and what the branches point to."""

    commits: dict[str, Files]
    branches: dict[str, str]
    private: bool = False
    gated: bool = False
    summaries: list[str] = Factory(list)  # of the commits that came over the network

    def commit(self, branch: str, files: Files) -> str:
        """Put a commit with these files on a branch, and return its id."""
        oid = f"{len(self.commits) + 1:040x}"
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, Files]:
        """The commit that a branch or a commit's id means."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]


@define
class Fault:
    """What goes wrong with the next `times` requests whose method and path match `pattern`."""

    pattern: str
    refusal: Refusal
    times: int = 1


@define
class Request:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]


@define(eq=False)
class Content:
    """Bytes to be sent as they are, not JSON."""

    body: bytes
    headers: dict[str, str] = Factory(dict)
    status: int = 200
    sent: int | None = None  # the connection breaks after so many


def read(folder: Path) -> Files:
    """The files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file as an LFS object."""
    return size > LARGE_BYTES or path.endswith((".safetensors", ".gguf"))


def sha256(content: bytes) -> str:
    """How an LFS object is called."""
    return hashlib.sha256(content).hexdigest()


def git_sha(content: bytes) -> str:
    """How Git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def digest(path: str, content: bytes) -> str:
    """The ETag of a file."""
    return sha256(content) if is_large(path, len(content)) else git_sha(content)


def flipped(content: bytes) -> bytes:
    """The content with its last bit wrong."""
    return content[:-1] + bytes([content[-1] ^ 1])


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    listed = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
    large = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}}
    return listed | (large if is_large(path, len(content)) else {})
