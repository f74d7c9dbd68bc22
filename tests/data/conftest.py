"""Fixtures of the data room's tests."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_for_tests import byte_level_mistral

WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Mistral's control tokens."""
    return byte_level_mistral()


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """A function that writes rows (objects, or lines as they stand) to `chats.jsonl`."""

    def write(rows: Sequence[object], name: str = "chats.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
