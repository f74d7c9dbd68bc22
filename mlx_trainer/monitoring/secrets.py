"""Keeping access tokens out of what is written down."""

import os
import re
from collections.abc import Iterable

_MASK = "[hidden]"
# Hugging Face's tokens are "hf_" and 34 letters and digits; "hf_hub_download" and the like stay readable. Then those of
# GitHub, OpenAI and AWS, and what stands before the @ of an address.
_TOKEN = re.compile(
    r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
)
_SECRET = r"(?:token|password|passwd|secret|credentials?|(?:api|access|secret|private)[_-]?key)"
_VARIABLE = re.compile(rf"(?:.*_)?{_SECRET}(?:_id)?", re.IGNORECASE)
_OPTION = re.compile(rf"--[\w.-]*{_SECRET}", re.IGNORECASE)


def mask_secrets(text: str) -> str:
    """Replace access tokens, and the values of environment variables such as HF_TOKEN or X_API_KEY, by `[hidden]`."""
    for value in secret_values():
        text = text.replace(value, _MASK)
    return _TOKEN.sub(_MASK, text)


def secret_values() -> list[str]:
    """The values of the variables whose names say that they are secret, longest first, for one may hold another.

    A value of a few characters is no token, and would be found in ordinary words; nor is a path.
    """
    values = {value for name, value in os.environ.items() if _VARIABLE.fullmatch(name)}
    return sorted((value for value in values if len(value) >= 8 and not value.startswith("/")), key=len, reverse=True)


def mask_arguments(arguments: Iterable[str]) -> list[str]:
    """Mask a command line: tokens wherever they stand, and whatever follows an option such as `--hub-token`."""
    masked, hide_next = [], False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        names_secret = _OPTION.fullmatch(option) is not None
        if hide_next:
            masked.append(_MASK)
        else:
            masked.append(f"{option}={_MASK}" if names_secret and equals else mask_secrets(argument))
        hide_next = names_secret and not equals and not hide_next
    return masked
