"""What, besides the rows themselves, decides which tokens they become."""

import hashlib
import inspect
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tokenizers
from attrs import frozen

from mlx_trainer.data.encoding import SampleEncoder
from mlx_trainer.data.formats import FORMATS
from mlx_trainer.data.mapping import FieldMapping
from mlx_trainer.data.tokenizer import ChatTokenizer
from mlx_trainer.data.truncation import Truncation


@frozen(eq=False)
class Recipe:
    """How rows become tokens: their fields, the encoder, and what becomes of rows that are too long."""

    tokenizer: ChatTokenizer
    encoder: SampleEncoder
    mapping: FieldMapping
    max_seq_length: int
    truncation: Truncation

    def parts(self) -> Iterator[str]:
        """All that makes a difference, as texts."""
        yield self.tokenizer.backend_tokenizer.to_str()
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.chat_template)
        yield repr((special, self.encoder.completion_style, self.max_seq_length, self.truncation))
        yield self.mapping.canonical
        yield from (tokenizers.__version__, source_code())
        yield from (own_format(name) for name in FORMATS)

    def key(self, fingerprint: str) -> str:
        """The name of the store of rows with this `fingerprint`: 40 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=20)
        for part in (*self.parts(), fingerprint):
            data = part.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8) + data)
        return digest.hexdigest()


@cache
def source_code() -> str:
    """A digest of this package's files: what they do to rows may change with any of them."""
    digest = hashlib.blake2b()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def own_format(name: str) -> str:
    """What tells a format from another of the same name: for a registered one, the file that its function is from.

    A function without a file, written at a prompt, is never the same as another.
    """
    form = FORMATS[name]
    if form.parse.__module__.startswith(__package__ or " "):
        return name
    try:
        code = Path(inspect.getfile(form.parse)).read_bytes()
    except (OSError, TypeError):
        code = os.urandom(16)
    return f"{name} {form.keys} {form.parse.__qualname__} {hashlib.blake2b(code).hexdigest()}"
