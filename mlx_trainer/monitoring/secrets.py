"""Keeping access tokens out of what is written down."""

import os
import re
from collections.abc import Iterable

_MASK = "[hidden]"
# Hugging Face's tokens are "hf_" and 34 letters and digits; "hf_hub_download" and the like stay readable.
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_OPTION = re.compile(r"--[\w.-]*(?:token|password|secret|api[_-]?key)", re.IGNORECASE)


def mask_secrets(text: str) -> str:
    """Replace Hugging Face tokens, and the values of the token variables that are set, by `[hidden]`."""
    for name in _VARIABLES:
        # A value of a few characters is no token, and would be found in ordinary words.
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, _MASK)
    return _TOKEN.sub(_MASK, text)


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
