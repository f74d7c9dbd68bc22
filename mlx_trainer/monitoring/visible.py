"""Text from outside, made safe to look at."""

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return the text with its control characters as escapes, such as `\r`; line ends and tabs stay.

    With them a text could command the terminal, hide from it, turn what stands beside it around, or not be written as
    UTF-8. The last are single surrogates.
    """
    return _CONTROLS.sub(lambda found: repr(found.group())[1:-1], text)
