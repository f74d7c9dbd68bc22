"""The one error of this room."""


class MonitoringError(ValueError):
    """A file that cannot be written or read, or a metric that is not there; the text says what would be right."""
