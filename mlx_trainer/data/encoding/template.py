"""Any other model's chat template: which ids are the assistant's, proved row by row.

Where the template marks its assistant parts with `{% generation %}`, that mask is taken. Else the ids of the whole
conversation must begin with the ids of the prompt before an answer, and with those up to its end; what lies between
is the answer. A row for which this does not hold is a bad row: its tokens cannot be told apart.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
from attrs import frozen

from mlx_trainer.data.encoding.rendering import Renderer, answer_numbers, as_objects, tool_objects
from mlx_trainer.data.encoding.tokenizer import ChatTokenizer, TextEncoder, Tokens
from mlx_trainer.data.samples.conversation import Conversation, RowError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@frozen
class TemplateFormat:
    """A tokenizer with a chat template; `encoder` must read control tokens, which templates write as text."""

    tokenizer: ChatTokenizer
    encoder: TextEncoder

    def encode(self, conversations: Sequence[Conversation]) -> list[Tokens | RowError]:
        """Tokens of each conversation, or why its assistant ids cannot be told."""
        refusals = [self.refusal(conversation) for conversation in conversations]
        usable = [c for c, refusal in zip(conversations, refusals, strict=True) if refusal is None]
        marked = GENERATION.search(str(self.tokenizer.chat_template)) is not None
        by_marks = iter(self.by_marks([c for c in usable if marked and all_weigh(c)]))
        by_prefixes = iter(self.by_prefixes([c for c in usable if not (marked and all_weigh(c))]))
        return [
            refusal or next(by_marks if marked and all_weigh(conversation) else by_prefixes)
            for conversation, refusal in zip(conversations, refusals, strict=True)
        ]

    def refusal(self, conversation: Conversation) -> RowError | None:
        """Why the conversation cannot be rendered: a text holds a control token, or the template fails."""
        for place, text in written_texts(conversation):
            if token := self.encoder.spelled_control(text):
                return RowError(f"{place}: holds {token!r}, which would become a control token")
        return Renderer(self.tokenizer).refusal(conversation)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation whose answer is due, as the template asks for it; raises RowError as for a row."""
        if (refusal := self.refusal(conversation)) is not None:
            raise refusal
        try:
            text = Renderer(self.tokenizer).render(conversation, len(conversation.messages), prompt=True)
        except Exception as error:  # a template is a program of someone else's, in a sandbox
            raise RowError(f"messages: the chat template refuses to ask for an answer: {error}") from error
        return self.encoder.encode([text])[0]

    def by_marks(self, conversations: Sequence[Conversation]) -> list[Tokens | RowError]:
        """Tokens with the template's own mask; an EOS that follows a marked part is trained too, or none would stop.

        A template takes one list of tools for a batch, so rows are encoded together with those of the same tools.
        """
        rows: dict[int, Tokens | RowError] = {}
        for tools in {conversation.tools for conversation in conversations}:
            numbers = [i for i, conversation in enumerate(conversations) if conversation.tools == tools]
            encoded = self.tokenizer.apply_chat_template(
                [as_objects(conversations[i].messages) for i in numbers],
                tools=tool_objects(tools),
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            for i, ids, mask, each in zip(
                numbers, encoded["input_ids"], encoded["assistant_masks"], encoded.encodings, strict=True
            ):
                whole = whole_letters(mask, each.offsets)
                rows[i] = marked_tokens(conversations[i], ids, whole, self.tokenizer.eos_token_id)
        return [rows[i] for i in range(len(conversations))]

    def by_prefixes(self, conversations: Sequence[Conversation]) -> list[Tokens | RowError]:
        """Tokens of each conversation, told by prefix differences; all prefixes are encoded in one batch."""
        rendered = [Renderer(self.tokenizer).around_answers(conversation) for conversation in conversations]
        texts = [text for row in rendered if not isinstance(row, RowError) for text in row]
        encoded = iter(self.encoder.encode(texts))
        eos = self.tokenizer.eos_token_id
        return [
            row if isinstance(row, RowError) else told_by_prefixes(conversation, list(islice(encoded, len(row))), eos)
            for conversation, row in zip(conversations, rendered, strict=True)
        ]


def all_weigh(conversation: Conversation) -> bool:
    """Whether every assistant message is trained; a template's own marks know no weights."""
    return all(answer.weight for answer in conversation.answers)


def written_texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Every text of a row that a template may write, with its place."""
    for number, tool in enumerate(conversation.tools):
        yield f"tools[{number}]", tool.definition
    for number, message in enumerate(conversation.messages):
        yield f"messages[{number}].content", message.content
        for k, call in enumerate(message.tool_calls):
            yield f"messages[{number}].tool_calls[{k}]", f"{call.arguments} {call.id}"


def whole_letters(mask: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The mask with all tokens of a letter where transformers marks its first alone, as of an answer's last `語`."""
    whole = list(mask)
    for place, (before, own) in enumerate(pairwise(offsets), 1):
        if own == before and own[0] < own[1]:
            whole[place] |= whole[place - 1]
    return whole


def marked_tokens(
    conversation: Conversation, ids: Sequence[int], mask: Sequence[int], eos: int | None
) -> Tokens | RowError:
    """Tokens of one row of `return_assistant_tokens_mask`, with the EOS after each marked part."""
    trained = np.array(mask, dtype=np.bool_)
    if not trained.any():
        return RowError("messages: the template's {% generation %} marks cover no token of this row")
    marks, answers = np.count_nonzero(np.diff(trained, prepend=False) & trained), len(conversation.answers)
    if marks < answers:
        return RowError(
            f"messages: the template's {{% generation %}} marks cover {marks} of {answers} assistant messages, so the "
            "others, such as calls of tools, would not be trained"
        )
    if eos is not None:
        trained[1:] |= (np.array(ids[1:]) == eos) & trained[:-1]
    return Tokens.of(ids, trained)


def told_by_prefixes(
    conversation: Conversation, encoded: Sequence[Sequence[int]], eos: int | None
) -> Tokens | RowError:
    """Tokens of one row of (prompt, up to its answer's end) ids for each answer; the last are the whole row's."""
    answers = answer_numbers(conversation)
    whole = encoded[-1]
    trained = np.zeros(len(whole), dtype=np.bool_)
    for message, prompt, until in zip(answers, encoded[::2], encoded[1::2], strict=True):
        if whole[: len(prompt)] != prompt or whole[: len(until)] != until:
            return RowError(
                f"messages[{message}]: the chat template does not write the part before this answer in training as it "
                "does when asking for it, so the answer's tokens cannot be told; a template with {% generation %} would"
            )
        stop = end_of_answer(whole, len(prompt), len(until), eos)
        trained[len(prompt) : stop] = bool(conversation.messages[message].weight)
    return Tokens.of(whole, trained)


def end_of_answer(ids: Sequence[int], start: int, stop: int, eos: int | None) -> int:
    """Where the answer in `ids[start:stop]` ends: after its last EOS, else at `stop`."""
    return next((i + 1 for i in range(stop - 1, start - 1, -1) if ids[i] == eos), stop)
