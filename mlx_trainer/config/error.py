"""The one error of this room."""


class ConfigError(ValueError):
    """A configuration that cannot be used; its text names the file, the key, the value and what would be right."""
