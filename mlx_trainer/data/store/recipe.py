"""What, besides the rows themselves, decides which tokens they become."""

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path

from attrs import frozen
from tokenizers import Tokenizer

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import ChatTokenizer
from mlx_trainer.data.encoding.truncation import Truncation
from mlx_trainer.data.samples.formats import FORMATS
from mlx_trainer.data.sources.mapping import FieldMapping

VERSIONS = " ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers", "jinja2"))


@frozen(eq=False)
class Recipe:
    """How rows become tokens: their fields, the encoder, and what becomes of rows that are too long.

    With `pairs` they are preferences, each of which becomes two rows.
    """

    tokenizer: ChatTokenizer
    encoder: SampleEncoder
    mapping: FieldMapping
    max_seq_length: int
    truncation: Truncation
    pairs: bool = False

    def parts(self) -> Iterator[str]:
        """All that makes a difference, as texts."""
        yield self.tokenizer_digest
        yield repr((self.encoder.completion_style, self.max_seq_length, self.truncation, self.pairs))
        yield self.mapping.canonical
        yield from (VERSIONS, source_code())
        yield from (own_format(name) for name in FORMATS)

    @cached_property
    def tokenizer_digest(self) -> str:
        """A digest of all that the tokenizer does: vocabulary, special tokens and chat template."""
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, template(self.tokenizer))
        text = repr((vocabulary(self.tokenizer), special))
        return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).hexdigest()

    def settings(self) -> Mapping[str, object]:
        """What a resumed run must have as it was, by name."""
        return {
            "tokenizer": self.tokenizer_digest,
            "completion_style": self.encoder.completion_style,
            "max_seq_length": self.max_seq_length,
            "truncation": self.truncation,
        }

    @cached_property
    def digest(self) -> bytes:
        """A digest of all parts."""
        digest = hashlib.blake2b(digest_size=32)
        for part in self.parts():
            data = part.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8) + data)
        return digest.digest()

    def key(self, fingerprint: str) -> str:
        """The name of the store of rows with this `fingerprint`: 40 hexadecimal digits."""
        return hashlib.blake2b(self.digest + fingerprint.encode(), digest_size=20).hexdigest()


def vocabulary(tokenizer: ChatTokenizer) -> str:
    """Everything that the tokenizer does to a text, without what calls leave in it: rows are not padded or cut so."""
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None or backend.truncation is not None:
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
    return str(backend.to_str())


def template(tokenizer: ChatTokenizer) -> tuple[object, ...]:
    """The chat template, and those special tokens that it names."""
    text = repr(tokenizer.chat_template)
    tokens = getattr(tokenizer, "special_tokens_map", {})
    return (text, *sorted((name, str(token)) for name, token in tokens.items() if name in text))


@cache
def source_code() -> str:
    """A digest of the files of `mlx_trainer.data`: what they do to rows may change with any of them."""
    digest = hashlib.blake2b()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def own_format(name: str) -> str:
    """What tells a format from another of the same name: for a registered one, the file that its function is from.

    A function without a file, as one written at a prompt, or with values bound to it is never the same as another.
    """
    form = FORMATS[name]
    parse = form.parse
    if parse.__module__.startswith("mlx_trainer.data."):
        return name
    try:
        code = Path(inspect.getfile(parse)).read_bytes()
    except (OSError, TypeError):
        code = os.urandom(16)
    if getattr(parse, "__closure__", None):
        code += os.urandom(16)
    told = getattr(parse, "__qualname__", type(parse).__qualname__)
    return f"{name} {form.keys} {told} {hashlib.blake2b(code).hexdigest()}"
