"""Where a GPU's time goes in a step, kernel by kernel: PyTorch's profiler sees whatever its process launches.

    python benchmarks/kernels.py --targets all --shapes 4x1024       # an NVIDIA GPU, with PyTorch for CUDA beside MLX

Steps as `recomputation.py --ahead` makes them. For each shape the kernels by kind and the longest by name, in
milliseconds a step, for how long the device had nothing to do, and the driver's calls by the host's threads.
"""

import json
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from recomputation import RandomMistral, batch_of, parse, step_of

from mlx_trainer import runtime
from mlx_trainer.cuda.compiler import FILES
from mlx_trainer.step import TrainStep

KINDS = {
    "this package's": rf"^({'|'.join(FILES)})$",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitk",
    "attention": r"cudnn|flash|sdpa|fmha",
    "norms": r"rms_norm|layer_norm",
    "copies": r"copy|memcpy|memset|concat|slice|gather|scatter",
    "sums": r"reduce",
}
Events = list[dict[str, Any]]


def traced(step: TrainStep, batch: Any, steps: int) -> tuple[Events, float]:
    """The profiler's events of so many steps, each dispatched one ahead, and their wall time in ms."""
    import torch

    last = mx.array(0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        for _ in range(steps):
            before, last = last, step([batch]).total
            mx.eval(before)
        mx.eval(last)
        mx.synchronize()
        wall = (time.perf_counter() - start) * 1e3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"], wall


def gaps(kernels: Events) -> Events:
    """The times between the first kernel and the last in which none ran, named by how long they are."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    end, found = spans[0][0], []
    for start, stop in spans:
        if start > end:
            size = next((f"below {most} µs" for most in (3, 10, 30, 100, 300, 1000) if start - end < most), "longer")
            found.append({"name": size, "dur": start - end})
        end = max(end, stop)
    return found


def kind_of(name: str) -> str:
    """The first of `KINDS` that a kernel's name tells of."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "the rest")


def table(title: str, events: Events, key: Any, steps: int, most: int = 40) -> None:
    """Milliseconds and calls a step by `key`, the longest first."""
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        spent[key(event)].append(event["dur"] / 1e3)
    print(f"\n| {title} | ms a step | calls a step | µs each |\n|---|---|---|---|")
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:most]:
        total = sum(times)
        print(f"| `{name[:150]}` | {total / steps:.2f} | {len(times) / steps:.0f} | {1e3 * total / len(times):.1f} |")


def main() -> None:
    """Profile each shape."""
    arguments = parse()
    if runtime.backend() != "cuda":
        raise SystemExit("benchmarks/kernels.py needs an NVIDIA GPU: PyTorch's profiler sees no other's kernels")
    module: Any = RandomMistral(arguments)
    module.setup("fit")
    mx.eval(module.model.parameters())
    print(f"{runtime.device_name()}: {vars(arguments)}")
    for shape in arguments.shapes:
        batch = batch_of(*map(int, shape.split("x")))
        module.recompute = arguments.policies[0]
        module.setup("fit")
        step = step_of(module)
        for _ in range(5):
            mx.eval(step([batch]).total)
        hosts = []
        for _ in range(3):
            mx.synchronize()
            start = time.perf_counter()
            last = step([batch]).total
            hosts.append(1e3 * (time.perf_counter() - start))
            mx.eval(last)
        steps = arguments.steps
        events, wall = traced(step, batch, steps)
        kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
        print(f"\n## {shape}: {wall / steps:.1f} ms a step, dispatched by the host in {min(hosts):.1f}")
        table("kind", kernels, lambda event: kind_of(event["name"]), steps)
        table("no kernel", gaps(kernels), lambda event: event["name"], steps)
        table("kernel", kernels, lambda event: event["name"], steps)
        table("call", calls, lambda event: f"{event['name']} of thread {event['tid']}", steps, 15)


if __name__ == "__main__":
    main()
