"""The structure that the design promises: arrows one way, small files, quick imports."""

import ast
import subprocess
import sys
from pathlib import Path

import mlx_trainer

PACKAGE = Path(mlx_trainer.__file__).parent
ROOT = PACKAGE.parent

# What each room may import of ours. A room is a folder or a file directly in the package.
LEAVES = {"runtime", "eval_mode", "monitoring", "config", "folders", "safetensors_file", "zstd"}
CORE = {
    "trainer",
    "step",
    "failure",
    "fusion",
    "joined",
    "cuda",
    "side_by_side",
    "result",
    "rollback",
    "callback",
    "state",
    "traced",
    "interval",
    "loaders",
    "limits",
    "interruption",
    "resuming",
    "snapshot",
    "module",
    "evaluation",
    "checkpoint",
}
ALLOWED = {
    "config": set(),
    "runtime": {"_blas", "_kernels", "_malloc"},
    "_blas": set(),
    "_kernels": set(),
    "_malloc": set(),
    "safetensors_file": set(),
    "monitoring": {"runtime"},
    "state": set(),
    "traced": {"state"},
    "module": set(),
    "eval_mode": set(),
    "folders": set(),
    "zstd": set(),
    "checkpoint": {"folders", "safetensors_file", "zstd"},
    "callback": {"traced"} | {"evaluation", "module", "step", "trainer"},  # the latter for their types only
    "evaluation": {"state", "traced", "module"} | LEAVES,
    "joined": {"cuda", "fusion"},
    "side_by_side": {"_blas", "failure", "runtime", "traced"},
    "step": {"failure", "fusion", "joined", "module", "side_by_side", "traced"},
    "interval": {"step", "traced"},
    "interruption": set(),
    "failure": set(),
    "fusion": set(),
    "cuda": {"runtime"},
    "result": {"evaluation"},
    "rollback": {"failure", "interval"},
    "loaders": set(),
    "limits": set(),
    "resuming": {"checkpoint", "side_by_side", "traced"} | {"loaders", "trainer"},  # the latter for their types only
    "snapshot": {"callback", "checkpoint", "evaluation", "loaders", "module", "resuming", "state", "traced"}
    | {"trainer"},  # for its type only
    "trainer": CORE,
    "data": LEAVES,
    "prompts": {"data"},
    "models": LEAVES | {"cuda", "fusion", "module", "optim", "prompts", "state", "traced"},
    "preference": LEAVES | {"data", "models", "module", "traced"},
    "optim": LEAVES | {"cuda", "fusion", "joined"},
    "callbacks": LEAVES | CORE,
    "start": LEAVES | {"export", "models", "preference"},
    "run_folder": CORE | LEAVES | {"callbacks", "data", "models"},
    "build": CORE | LEAVES | {"run_folder", "callbacks", "data", "export", "models", "optim", "preference", "start"},
    "trained": CORE | LEAVES | {"build", "data", "export", "models", "start"},
    "benchmarking": CORE | LEAVES | {"_blas", "build", "data", "models"},
    "replaying": CORE | LEAVES | {"build", "data", "models"},
    "chat": LEAVES | {"models"},
    "export": LEAVES | {"models", "module"},
    "commands": {"benchmarking", "build", "chat", "export", "prompts", "replaying", "start", "trained"}
    | CORE
    | LEAVES
    | {"data", "models"},
    "cli": {"commands", "config", "interruption", "__init__"},
    "__main__": {"cli"},
    "__init__": None,  # names everything, imports it lazily
}


def room(path: Path) -> str:
    """The folder or file of the package that `path` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, inside functions too."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mlx_trainer":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_trainer."):
            rooms.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mlx_trainer.")}
    return rooms


def test_arrows_point_one_way() -> None:
    """Each room imports only what the design lets it."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        allowed = ALLOWED[room(path)]
        if allowed is not None:
            extra = imported_rooms(path) - allowed - {room(path), "__version__"}
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(extra)]
    assert wrong == []


DATA_ROOMS = ("samples", "sources", "encoding", "store", "batches")
"""Each may import those before it; what stands beside them may import all."""


def test_the_rooms_of_data_follow_each_other() -> None:
    """From lines to samples, tokens, the store and batches: no room knows one that comes after it."""
    wrong = []
    for room_number, name in enumerate(DATA_ROOMS):
        allowed = set(DATA_ROOMS[: room_number + 1])
        for path in sorted((PACKAGE / "data" / name).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
                if module.startswith("mlx_trainer.data") and [*module.split("."), ""][2] not in allowed:
                    wrong.append(f"{name}/{path.name} imports {module}")
    assert wrong == []


def test_files_stay_small() -> None:
    """No file of the package is longer than 320 lines: where trainers rotted, it was one file that owned everything."""
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 320}
    assert long == {}


def test_importing_the_package_imports_nothing_heavy() -> None:
    """`import mlx_trainer` leaves mlx.nn, mlx_lm, transformers and matplotlib alone."""
    heavy = ("mlx.nn", "mlx_lm", "transformers", "matplotlib")
    code = f"import sys, mlx_trainer; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_can_be_imported() -> None:
    """What `__all__` promises is there, and what it does not is an AttributeError."""
    assert {name: getattr(mlx_trainer, name).__class__.__name__ for name in mlx_trainer.__all__}
    assert set(mlx_trainer.__all__) <= set(dir(mlx_trainer))
    assert not hasattr(mlx_trainer, "no_such_name")


def test_nothing_forks() -> None:
    """After MLX has run, a forked child hangs in its next operation: workers are threads or programs of their own."""
    forking = ("multiprocessing", "ProcessPoolExecutor", "os.fork", "forkpty")
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in PACKAGE.rglob("*.py")
        for word in forking
        if word in path.read_text()
    ]
    assert found == []
