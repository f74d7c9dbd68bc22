"""Mistral's instruct format, built id by id: `<s>([INST] user[/INST] assistant</s>)+`, with tools as v3 writes them.

Ground truth is Mistral's own package mistral-common (`InstructTokenizerV3`); the tests compare with it. Templates of
strings cannot do this: a control token written in a row would become one, and the template on the Hub drops the
system message of every training row.
"""

from collections.abc import Sequence
from typing import Self

from attrs import frozen

from mlx_trainer.data.encoding.mistral_json import written_calls, written_result, written_tools
from mlx_trainer.data.encoding.sheet import Sheet
from mlx_trainer.data.encoding.tokenizer import ChatTokenizer, TextEncoder, Tokens
from mlx_trainer.data.samples.conversation import Conversation, Message, RowError

SYSTEM_SEPARATOR = "\n\n"
TOOL_TOKENS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


@frozen
class ToolIds:
    """Ids of the control tokens around definitions, before calls, and around results."""

    begin_tools: int
    end_tools: int
    calls: int
    begin_result: int
    end_result: int


@frozen
class MistralFormat:
    """Ids of the control tokens, and the blank that stands before each text; `tools` is None without those of tools."""

    bos: int
    eos: int
    begin: int
    end: int
    blank: str
    tools: ToolIds | None = None

    @classmethod
    def of(cls, tokenizer: ChatTokenizer, encoder: TextEncoder) -> Self | None:
        """The format as `tokenizer` writes it, None where its vocabulary or its chat template say another one.

        The template decides between `[INST] user` (v0.3) and `[INST]user` (v3 on tekken); without one it is v0.3's.
        """
        bos, eos, begin, end = (encoder.control_id(name) for name in ("<s>", "</s>", "[INST]", "[/INST]"))
        if bos is None or eos is None or begin is None or end is None:
            return None
        tool_ids = [id for name in TOOL_TOKENS if (id := encoder.control_id(name)) is not None]
        tools = ToolIds(*tool_ids) if len(tool_ids) == len(TOOL_TOKENS) else None
        for blank in (" ", ""):
            if tokenizer.chat_template is None or rendered_probe(tokenizer) == f"<s>[INST]{blank}u[/INST]{blank}a</s>":
                return cls(bos, eos, begin, end, encoder.leading_blank() if blank else "", tools)
        return None

    def encode(self, conversations: Sequence[Conversation], encoder: TextEncoder) -> list[Tokens | RowError]:
        """Tokens of each conversation, or why Mistral's format cannot hold it.

        Trained are the ids of every assistant message, calls of tools included, and the `</s>` that closes it.
        """
        sheet = Sheet()
        refusals = [self.refusal(conversation) for conversation in conversations]
        for conversation, refusal in zip(conversations, refusals, strict=True):
            if refusal is None:
                self.write(conversation, sheet)
        written = iter(sheet.tokens(encoder))
        return [refusal or next(written) for refusal in refusals]

    def refusal(self, conversation: Conversation) -> RowError | None:
        """Why the conversation cannot be written: a message has words and calls, or there are no tokens for tools."""
        has_tools = bool(conversation.tools)
        for number, message in enumerate(conversation.messages):
            if message.tool_calls:
                has_tools = True
                if message.content:
                    return RowError(
                        f"messages[{number}].content: text beside tool_calls, but a message of Mistral's format holds "
                        "only one of them; leave the text out"
                    )
        if has_tools and self.tools is None:
            return RowError(f"tools: the tokenizer lacks some of Mistral's tokens for tools, {', '.join(TOOL_TOKENS)}")
        return None

    def write(self, conversation: Conversation, sheet: Sheet) -> None:
        """Write one row; definitions of tools and the system text go before the last user text."""
        messages = conversation.messages
        last_user = len(messages) - 1
        while messages[last_user].role != "user":
            last_user -= 1
        sheet.control(self.bos)
        for number, message in enumerate(messages):
            if message.role == "assistant":
                self.write_answer(message, sheet)
            elif message.role == "user":
                before = self.write_tools(conversation, sheet) if number == last_user else ""
                sheet.control(self.begin)
                if question := before + message.content:
                    sheet.text(self.blank + question)
                sheet.control(self.end)
            elif message.role == "tool" and self.tools:
                sheet.control(self.tools.begin_result)
                sheet.text(self.blank + written_result(message))
                sheet.control(self.tools.end_result)
        sheet.end_row()

    def write_tools(self, conversation: Conversation, sheet: Sheet) -> str:
        """Write the definitions of tools, if there are any; returns what goes before the last user text."""
        if conversation.tools and self.tools:
            sheet.control(self.tools.begin_tools)
            sheet.text(self.blank + written_tools(conversation.tools))
            sheet.control(self.tools.end_tools)
        return conversation.system + SYSTEM_SEPARATOR if conversation.system else ""

    def write_answer(self, message: Message, sheet: Sheet) -> None:
        """Write an answer or its calls; trailing blanks of an answer are dropped as mistral-common does."""
        trained = bool(message.weight)
        if message.tool_calls and self.tools:
            sheet.control(self.tools.calls, trained)
            sheet.text(self.blank + written_calls(message.tool_calls), trained)
        else:
            sheet.text(self.blank + message.content.rstrip(" "), trained)
        sheet.control(self.eos, trained)


def rendered_probe(tokenizer: ChatTokenizer) -> object:
    """What the chat template makes of one short turn; None where it fails, which each row will tell."""
    probe = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    try:
        return tokenizer.apply_chat_template(probe, tokenize=False)
    except Exception:  # a template is a program of someone else's, in a sandbox
        return None
