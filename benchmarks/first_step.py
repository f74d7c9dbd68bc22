"""How soon the first step is done, and how many kernels are built for it, cold and warm, beside mlx-lm's own trainer.

    python benchmarks/first_step.py                                       # a Mistral of two layers of 4096; a GPU
    python benchmarks/first_step.py --hidden 64 --tokens 512 --dtype float32         # on a CPU
    python benchmarks/first_step.py --hidden 64 --tokens 512 --dtype float32 --show  # names the kernels

MLX builds a kernel for each group of operations that `mx.compile` fuses, on Linux and CUDA when it is first met, one
after the other, and keeps it in a folder. Cold is a new folder, warm the same one again; each run is a process of its
own. A step is an update; an epoch has every shape. The base, the rows, the callbacks and mlx-lm's options are those of
`mistral_7b.py mixed`. Seconds count from the start of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mistral_7b import data_of, peer_setup, write_base, write_chats
from shape import TARGETS

KERNELS = ("ptx", "so")


def kernels() -> list[str]:
    """The names of the kernels in this process's folder; a long name is cut into folders."""
    return sorted(str(path) for kind in KERNELS for path in Path(os.environ["TMPDIR"]).rglob(f"*.{kind}"))


def ours(folder: Path, arguments: argparse.Namespace, lap: Callable[[str], None]) -> None:
    """One epoch of this library's trainer, as in `mistral_7b.py`; like `mlx-trainer` it hides PyTorch."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import mlx.core as mx

    from mlx_trainer import Callback, GradientClipping, LoRAConfig, MistralLoRAModule, NaNGuard, Trainer

    class Laps(Callback):
        def on_step_start(self, trainer: Any, module: Any, step: int) -> None:
            if step == 1:
                lap("plan and first batch")

        def on_step_end(self, trainer: Any, module: Any, step: int, *more: Any) -> None:
            if step == 1:
                mx.eval(module.model.trainable_parameters())
                lap("first step")

    lap("imports")
    lora = LoRAConfig(rank=16, alpha=32, dropout=arguments.dropout, target_modules=TARGETS[arguments.targets])
    module = MistralLoRAModule(folder / "base", lora=lora, dtype=arguments.dtype, warmup_steps=0)
    data = data_of(folder, arguments, module.tokenizer)
    lap("tokens")
    module.setup("fit")
    mx.eval(module.model.parameters())
    lap("weights")
    Trainer(max_epochs=1, callbacks=[GradientClipping(), NaNGuard(), Laps()]).fit(module, data)


def peer(folder: Path, arguments: argparse.Namespace, lap: Callable[[str], None]) -> None:
    """One epoch of mlx-lm's trainer; its first update is done when it takes the batch after it."""
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.trainer import iterate_batches, train

    from mlx_trainer.benchmarking.peer import as_records

    def batches(*options: Any, **more: Any) -> Iterator[Any]:
        for taken, batch in enumerate(iterate_batches(*options, **more)):
            if taken == update:
                lap("first step")
            yield batch

    lap("imports")
    model, rows, options = peer_setup(folder, arguments)
    mx.eval(model.parameters())
    update = options.grad_accumulation_steps
    lap("tokens and weights")
    train(model, optimizers.AdamW(2e-4), as_records(rows), args=options, iterate_batches=batches)


RUNS = {"ours": ours, "peer": peer}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One epoch in this process: the seconds of each part, and the kernels that were built."""
    from mlx_trainer.benchmarking.start import Stopwatch, process_age_s

    age, before = process_age_s(), kernels()
    watch, built = Stopwatch(time.perf_counter() - age), {}

    def lap(name: str) -> None:
        watch.lap(name)
        built[name] = len(kernels()) - len(before)

    RUNS[arguments.run](arguments.folder, arguments, lap)
    lap("rest of the epoch")
    return {
        "parts": watch.laps,
        "first step, s": sum(watch.laps.values()) - watch.laps["rest of the epoch"],
        "epoch, s": sum(watch.laps.values()),
        "kernels, first step": built["first step"],
        "kernels, epoch": built["rest of the epoch"],
        "names": [name.partition("/mlx/")[2] for name in kernels() if name not in before] if arguments.show else [],
    }


def run(name: str, folder: Path, kept: str) -> dict[str, Any]:
    """`measure` one of `RUNS` in a process of its own, with the folder `kept` for kernels."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", name, "--folder", str(folder)]
    environment = os.environ | {"TMPDIR": kept, "MLX_PTX_CACHE_DIR": f"{kept}/mlx/ptx"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return told


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch")
    parser.add_argument("--targets", choices=list(TARGETS), default="qv")
    parser.add_argument("--dropout", type=float, default=0.0, help="of mlx_trainer alone")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--show", action="store_true", help="name the kernels")
    parser.add_argument("--only", choices=list(RUNS), nargs="+", default=list(RUNS))
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(case="mixed", bits=None, peer_rows=None, accumulate=1)
    return parser.parse_args()


def main() -> None:
    """Run each trainer twice and print what it took."""
    arguments = parse()
    if arguments.run:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "base").mkdir()
        write_base(folder / "base", arguments)
        write_chats(folder / "chats.jsonl", arguments)
        for name in arguments.only:
            with tempfile.TemporaryDirectory() as kept:
                for state in ("cold", "warm"):
                    told = run(name, folder, kept)
                    parts, names = told.pop("parts"), told.pop("names")
                    print(name, state, ", ".join(f"{key} {value:.4g}" for key, value in told.items()))
                    print("   ", ", ".join(f"{key} {seconds:.2f} s" for key, seconds in parts.items()))
                    print(*names, sep="\n", flush=True)


if __name__ == "__main__":
    main()
