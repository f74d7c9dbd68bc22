"""From prompts to answers with one model."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import mlx.nn as nn
from attrs import frozen

from mlx_trainer.eval_mode import eval_mode
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.generation.answer import Answer
from mlx_trainer.models.generation.options import Options
from mlx_trainer.models.generation.running import complete, pieces
from mlx_trainer.prompts import Prompt, PromptEncoder, PromptError

Pieces = Generator[str, None, None]


@frozen(eq=False)
class Writer:
    """A model that answers, its transformers tokenizer, and which ids and lengths it has."""

    model: nn.Module
    tokenizer: Any
    stop_ids: set[int]
    vocabulary: int | None
    longest: int
    """Tokens that a prompt and its answer may have together."""

    def answers(
        self, prompts: Sequence[Prompt], options: Options, seed: int | Sequence[int], batch_size: int
    ) -> Iterator[str]:
        """Yield the answer to each prompt, `batch_size` at a time; all prompts are checked before, at once."""
        seeds = seed if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts) or batch_size < 1:
            raise ModelError(
                f"There are {len(seeds)} seeds for {len(prompts)} prompts, and batch_size is {batch_size}."
            )
        asked = [self.answer(prompt, options, each) for prompt, each in zip(prompts, seeds, strict=True)]
        return self._groups([asked[first : first + batch_size] for first in range(0, len(asked), batch_size)])

    def _groups(self, groups: Sequence[Sequence[Answer]]) -> Iterator[str]:
        for group in groups:
            with eval_mode(self.model):
                complete(self.model, group)
            yield from [answer.text() for answer in group]

    def stream(self, prompt: Prompt, options: Options, seed: int) -> Pieces:
        """Yield the answer piece by piece, each of whole characters; raises ModelError at once, not at the first."""
        return self._pieces(self.answer(prompt, options, seed))

    def _pieces(self, answer: Answer) -> Pieces:
        with closing(pieces(self.model, answer)) as steps:
            while True:
                # While the caller has a piece, the model is in its own mode. Where that is eval mode, to set it
                # anew would cost each token of a 7B model 3 ms.
                with eval_mode(self.model) if self.model.training else nullcontext():
                    ongoing = next(steps, None)
                if ongoing is None:
                    return
                if piece := answer.piece():
                    yield piece

    def answer(self, prompt: Prompt, options: Options, seed: int) -> Answer:
        """Return an answer that has not begun; raises ModelError for a prompt that cannot be answered."""
        ids = self.prompt_ids(prompt, options.system)
        return Answer(
            prompt=ids,
            decode=partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            limit=min(options.max_tokens, self.longest - len(ids)),
            stop_ids=self.stop_ids,
            sampler=options.sampler(seed),
            processors=options.processors(),
            stop=options.stop,
            timeout_s=options.timeout_s,
        )

    def prompt_ids(self, prompt: Prompt, system: str | None) -> list[int]:
        """Return the ids of a prompt, which leave room for an answer; raises ModelError."""
        try:
            ids = PromptEncoder.of(self.tokenizer).encode(prompt, system)
        except PromptError as error:
            raise ModelError(f"A prompt cannot be written: {str(error).rstrip('.')}.") from error
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            raise ModelError(
                f"A prompt has the token id {max(ids)}; the model's vocabulary ends at {self.vocabulary - 1}."
            )
        if not 0 < len(ids) < self.longest:
            raise ModelError(f"A prompt has {len(ids)} tokens; max_seq_length is {self.longest}.")
        return ids
