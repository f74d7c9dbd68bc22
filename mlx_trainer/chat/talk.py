"""One side of a conversation: what was said so far, and the next answer."""

from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext
from typing import Any

from attrs import Factory, define

from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.bare import without_adapters


@define(eq=False)
class Talk:
    """A conversation with `module`, or, where `bare`, with its base model, whose answers are kept apart from others."""

    name: str
    module: CausalLMModule
    options: Mapping[str, Any] = Factory(dict)
    """Those of `module.stream`."""
    bare: bool = False
    messages: list[dict[str, str]] = Factory(list)

    def answer(self, question: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece; both join the conversation, an answer that is cut short as far as it came.

        Where nothing is said, or ModelError is raised, the conversation stays as it is.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        said = ""
        with closing(self.module.stream(asked, **self.options)) as pieces:
            try:
                while (piece := self._next(pieces)) is not None:
                    said += piece
                    yield piece
            finally:
                if said:
                    self.messages = [*asked, {"role": "assistant", "content": said}]

    def _next(self, pieces: Generator[str, None, None]) -> str | None:
        with without_adapters(self.module.model) if self.bare else nullcontext():
            return next(pieces, None)
