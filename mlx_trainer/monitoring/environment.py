"""What a run ran on: versions, device, source, command line. No environment variables, no tokens."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_trainer import runtime
from mlx_trainer.monitoring.files import to_json, write_atomic
from mlx_trainer.monitoring.secrets import mask_arguments, mask_secrets

_PACKAGES = ("mlx-trainer", "mlx", "mlx-lm", "transformers", "tokenizers", "huggingface-hub", "numpy")


def environment_facts() -> dict[str, Any]:
    """Return what is needed to run the same thing again elsewhere, as plain JSON values; takes about 10 ms."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": mask_arguments([*_program(Path(sys.argv[0])), *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backend": runtime.backend(),
        "device": runtime.device_name(),
        "memory_gb": round(runtime.memory_limit_bytes() / 1e9, 2),
        "cpus": runtime.available_cpus(),
        "blas": runtime.blas_report(),
        "git": _git_facts(),
    }


def write_environment(run_dir: str | Path, **more: Any) -> Path:
    """Write `environment.json`, with further facts such as the seed or the data's fingerprint, and return its path."""
    text = mask_secrets(to_json(environment_facts() | more, indent=2))
    return write_atomic(Path(run_dir) / "environment.json", text + "\n")


def _program(path: Path) -> list[str]:
    """Return how a program is called: by its name, or as the module that it is."""
    return ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_facts() -> dict[str, Any] | None:
    """Return the commit of the current directory and whether files differ from it; None where there is none."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        # Without optional locks, so that looking never disturbs a git command that runs beside it.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
