"""One answer: its tokens as they come, the text that they make for certain, and where it ends."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from mlx_trainer.models.generation.options import Processor, Sampler
from mlx_trainer.models.hf_config import read_json

INCOMPLETE = "\ufffd"
"""What bytes decode to that are no whole character yet."""


@define(eq=False)
class Answer:
    """An answer under way to the prompt with the ids `prompt`; at most `limit` tokens, ending before one of `stop_ids`.

    Its text ends before the first of the texts `stop`, is without blanks at both ends, and without half a character.
    """

    prompt: Sequence[int]
    decode: Callable[[list[int]], str]
    limit: int
    stop_ids: Collection[int]
    sampler: Sampler
    processors: Sequence[Processor] = ()
    stop: Sequence[str] = ()
    timeout_s: float | None = None
    """Seconds from `begin`; the clock is read after each token."""
    ids: list[int] = field(factory=list, init=False)
    ended: bool = field(default=False, init=False)
    _told: int = field(default=0, init=False)
    _deadline: float = field(default=math.inf, init=False)

    def begin(self) -> None:
        """Start the clock."""
        if self.timeout_s is not None:
            self._deadline = time.monotonic() + self.timeout_s

    def take(self, id: int) -> None:
        """Add the next token, or end before it."""
        if id in self.stop_ids:
            self.ended = True
            return
        self.ids.append(id)
        late = self._deadline < math.inf and time.monotonic() >= self._deadline
        self.ended = late or len(self.ids) >= self.limit or self._stopped() is not None

    def text(self) -> str:
        """The text so far, but for what a coming token may still change: half a character, or half a stop text.

        All of the answer is decoded again: 0.3 ms for a thousand tokens of Mistral.
        """
        whole, end = self.decode(self.ids), self._stopped()
        if end is not None:
            return whole[:end].strip()
        whole = whole.rstrip(INCOMPLETE)
        return (whole if self.ended else whole[: len(whole) - overlap(whole, self.stop)]).strip()

    def piece(self) -> str:
        """The part of the text that was not given yet."""
        text = self.text()
        new, self._told = text[self._told :], len(text)
        return new

    def _stopped(self) -> int | None:
        if not self.stop:
            return None
        whole = self.decode(self.ids)
        return min((place for text in self.stop if (place := whole.find(text)) >= 0), default=None)


def overlap(text: str, stops: Sequence[str]) -> int:
    """How many letters at the end of `text` may be the beginning of one of `stops`.

    >>> overlap("The end. Us", ["User:", "\\n\\n"])
    2
    """
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def stop_ids(tokenizer: Any, settings: Mapping[str, Any], directory: Path) -> set[int]:
    """Return the ids that end an answer: the tokenizer's, and those of config.json and generation_config.json.

    Chat models often name the token that ends a turn in the latter alone. Raises ModelError where it is no JSON.
    """
    path = directory / "generation_config.json"
    written = read_json(path) if path.exists() else {}
    named = [tokenizer.eos_token_id, settings.get("eos_token_id")]
    named += [written.get("eos_token_id")] if isinstance(written, Mapping) else []
    flat = [id for ids in named for id in (ids if isinstance(ids, list) else [ids])]
    return {id for id in flat if isinstance(id, int)}
