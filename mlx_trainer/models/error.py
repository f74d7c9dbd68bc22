"""The models room's error."""


class ModelError(ValueError):
    """A model, tokenizer or adapter that cannot be used; the text says what is wrong, where, and what would help."""
