"""Standard `logging` under the name `mlx_trainer`: a readable console, JSON lines in the run folder.

Nothing but that logger is touched, never the root logger, so a program's own set-up stays what it was.
"""

import logging
from contextlib import ExitStack
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from mlx_trainer.monitoring.console import stderr_console, stderr_is_terminal
from mlx_trainer.monitoring.error import MonitoringError
from mlx_trainer.monitoring.files import make_folder, to_json
from mlx_trainer.monitoring.secrets import mask_secrets

MAX_BYTES = 10_000_000
BACKUPS = 5
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_active = ExitStack()


def setup_logging(run_dir: str | Path | None = None, level: str = "INFO", console: bool = True) -> ExitStack:
    """Send the package's log to stderr, and to `logs/train.jsonl` and `logs/errors.jsonl` under the run folder.

    stderr gets coloured lines where it is a terminal (without colour where NO_COLOR is set), else plain
    `HH:MM:SS LEVEL message`. A file is rotated at 10 MB, five old ones are kept; errors.jsonl has ERROR and above and
    appears with the first one. Access tokens are masked. A second call replaces the first set-up. The result's
    `close()`, or leaving its `with` block, puts everything back. Raises MonitoringError for an unknown level or a
    folder that cannot be written.
    """
    handlers = _handlers(run_dir, _level_number(level), console)
    _active.close()
    logger = logging.getLogger("mlx_trainer")
    _active.callback(setattr, logger, "propagate", logger.propagate)
    _active.callback(logger.setLevel, logger.level)
    for handler in handlers:
        logger.addHandler(handler)
        _active.callback(handler.close)
        _active.callback(logger.removeHandler, handler)
    logger.setLevel(level.upper())
    # A root handler of the surrounding program would print each line a second time.
    logger.propagate = logger.propagate and not console
    return _active


def _level_number(level: str) -> int:
    known = logging.getLevelNamesMapping()
    if level.upper() not in known:
        raise MonitoringError(f"unknown log level {level!r}; right are DEBUG, INFO, WARNING, ERROR and CRITICAL")
    return known[level.upper()]


def _handlers(run_dir: str | Path | None, level: int, console: bool) -> list[logging.Handler]:
    handlers: list[logging.Handler] = [_console_handler()] if console else []
    if run_dir is not None:
        folder = make_folder(Path(run_dir) / "logs")
        handlers += [
            _file_handler(folder / "train.jsonl", level),
            _file_handler(folder / "errors.jsonl", logging.ERROR),
        ]
    return handlers


def _console_handler() -> logging.Handler:
    if not stderr_is_terminal():
        plain = logging.StreamHandler()
        plain.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
        return plain
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    rich = RichHandler(
        console=stderr_console(),
        show_path=False,
        omit_repeated_times=False,
        log_time_format="%H:%M:%S",
        highlighter=NullHighlighter(),
    )
    rich.setFormatter(LineFormatter("%(message)s"))
    return rich


def _file_handler(path: Path, level: int) -> logging.Handler:
    try:
        # An error file that exists is there for a reason, so it is opened with the first error.
        handler = RotatingFileHandler(
            path,
            maxBytes=MAX_BYTES,
            backupCount=BACKUPS,
            encoding="utf-8",
            errors="backslashreplace",
            delay=level == logging.ERROR,
        )
    except OSError as error:
        raise MonitoringError(f"cannot write {path}: {error.strerror}") from error
    handler.setLevel(level)
    handler.setFormatter(JsonFormatter())
    return handler


class LineFormatter(logging.Formatter):
    """Lines for people, with access tokens masked."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a traceback below it where there is one."""
        return mask_secrets(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (ISO 8601, UTC), level, logger, message, what `extra=` gave, and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON, with access tokens masked."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return mask_secrets(to_json(fields))
