"""Rows of preferences."""

from typing import Any

import pytest

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.conversation import Conversation, Message, Preference, RowError
from mlx_trainer.data.samples.formats import FORMATS, detect_format
from tests.data.tokenizers_for_tests import mistral_tokenizer

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
WHY = {"role": "user", "content": "Why?"}
CALLS = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
RESULT = {"role": "tool", "content": "4"}
ONE_TURN = Preference((Message("user", "2+2?", 0),), (Message("assistant", "4"),), (Message("assistant", "5"),))
SECOND = Preference(
    (Message("user", "2+2?", 0), Message("assistant", "4", 0), Message("user", "Why?", 0)),
    (Message("assistant", "4"),),
    (Message("assistant", "5"),),
)


def parse(row: dict[str, Any]) -> Preference:
    """The preference of `row`."""
    assert detect_format(row) == "preference"
    preference = FORMATS["preference"].parse(row)
    assert isinstance(preference, Preference)
    return preference


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, ONE_TURN),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, ONE_TURN),
        ({"prompt": [USER], "chosen": "4", "rejected": FIVE}, ONE_TURN),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, ONE_TURN),
        ({"prompt": None, "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, ONE_TURN),
        ({"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, ONE_TURN),
        ({"prompt": [USER, FOUR, WHY], "chosen": [FOUR], "rejected": [FIVE]}, SECOND),
        ({"chosen": [USER, FOUR, WHY, FOUR], "rejected": [USER, FOUR, WHY, FIVE]}, SECOND),
        (
            {
                "conversations": [{"from": "human", "value": "2+2?"}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            ONE_TURN,
        ),
    ],
)
def test_forms(row: dict[str, Any], expected: Preference) -> None:
    """Texts or messages, with the prompt beside the sides or in them, give the same preference."""
    assert parse(row) == expected


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "chosen, rejected: the same, so neither can be preferred"),
        ({"chosen": [USER, FOUR], "rejected": [USER, FOUR]}, "chosen, rejected: the same"),
        ({"chosen": [USER, FOUR], "rejected": [WHY, FIVE]}, r"chosen\[0\], rejected\[0\]: 'user' and 'user' where the"),
        ({"chosen": [USER, FOUR], "rejected": [USER]}, r"chosen\[1\], rejected\[1\]: 'assistant' and 'nothing' where"),
        ({"chosen": [USER, FOUR], "rejected": [FIVE]}, r"chosen\[0\], rejected\[0\]: 'user' and 'assistant' where"),
        ({"chosen": [USER, FOUR, WHY], "rejected": [USER, FIVE]}, r"chosen\[2\].role: ends with 'user'"),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE, WHY]}, r"rejected\[1\].role: ends with 'user'"),
        (
            {"prompt": [USER], "chosen": [FOUR], "rejected": []},
            "rejected: no user and assistant message|prompt\\[0\\].role",
        ),
        ({"prompt": [USER, FOUR], "chosen": [FOUR], "rejected": [FIVE]}, r"chosen\[0\].role: 'assistant' where 'user'"),
        (
            {"prompt": [WHY], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
            "prompt: not what both chosen and rejected",
        ),
        ({"chosen": "4", "rejected": "5"}, "prompt: missing or empty; it is needed where chosen and rejected hold"),
        ({"prompt": "2+2?", "chosen": " ", "rejected": "5"}, "chosen: empty, so nothing would be trained"),
        ({"prompt": "2+2?", "chosen": 4, "rejected": "5"}, "chosen: expected text, got a number"),
        (
            {"prompt": [FOUR], "chosen": [FOUR], "rejected": [FIVE]},
            r"prompt\[0\].role: 'assistant' where 'user' is due",
        ),
        ({"prompt": [{**FOUR, "weight": 1}], "chosen": "4", "rejected": "5"}, r"prompt\[0\].weight: 1 in a prompt"),
        ({"prompt": [USER], "chosen": [{**FOUR, "weight": 0}], "rejected": "5"}, "chosen: every assistant message has"),
    ],
)
def test_refused(row: dict[str, Any], error: str) -> None:
    """Sides that are alike, that share no prompt or do not end with an answer are refused with the place."""
    with pytest.raises(RowError, match=f"^(?:{error})"):
        parse(row)


def test_conversations() -> None:
    """A preference makes the two conversations, in which only what follows the prompt is trained."""
    row = {"prompt": [USER, FOUR, WHY], "chosen": [CALLS, RESULT, FOUR], "rejected": [FIVE], "tools": [{"name": "add"}]}
    preference = parse(row)
    chosen, rejected = preference.conversations()
    assert chosen.tools == rejected.tools == preference.tools != ()
    assert chosen.messages[3].tool_calls[0].id == chosen.messages[4].tool_call_id
    tokenizer = mistral_tokenizer()
    for conversation, trained in (
        (chosen, " 4</s>"),
        (rejected, " 5</s>"),
    ):
        assert isinstance(conversation, Conversation)
        (tokens,) = SampleEncoder.of(tokenizer).encode([conversation])
        assert isinstance(tokens, Tokens)
        text = tokenizer.decode(tokens.ids[tokens.trained])
        assert text.endswith(trained)
        assert text.count("</s>") == (2 if conversation is chosen else 1)


def test_preferences_are_no_rows_to_fine_tune_on() -> None:
    """The encoder answers with an error that says what these rows are for: the rejected answer must not be learnt."""
    (refused,) = SampleEncoder.of(mistral_tokenizer()).encode([ONE_TURN])
    assert isinstance(refused, RowError)
    assert str(refused).startswith(
        "chosen, rejected: these rows are for training.method dpo or orpo (DataPipeline: pairs=True)"
    )
