"""A report as people read it."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_trainer.benchmarking.measuring import Report
from mlx_trainer.benchmarking.units import duration, figure, memory, scaled

WIDTH = 22
PARTS = {
    "python": "Python",
    "imports": "imports",
    "data": "data",
    "model": "weights",
    "setup": "first batches",
    "tracing": "tracing and compiling",
    "computing": "computing",
}


def report_text(report: Report) -> str:
    """Return all figures as lines."""
    parts = (_head, _speed, _step, _ceiling, _memory, _start, _whole)
    return "\n".join(line for part in parts for line in part(report))


def line(name: str, text: str) -> str:
    """Return a line of a section: its name, then what it says."""
    return f"  {name:<{WIDTH}}{text}"


def machine(environment: Mapping[str, Any], load: float) -> Iterator[str]:
    """Yield the machine, the versions and the command, a line each."""
    packages = environment["packages"]
    versions = [f"{name} {packages[name]}" for name in ("mlx-trainer", "mlx", "mlx-lm") if packages[name]]
    where = f"{environment['device']} ({environment['backend']}), {environment['cpus']} CPUs"
    blas = f"; {environment['blas']}" if environment["backend"] == "cpu" else ""
    yield line("machine", f"{where}{blas}")
    if blas and load > environment["cpus"] / 2:
        yield line(
            "", f"load average {load:.1f} before it began: with others at work, figures can be several times off"
        )
    yield line("versions", ", ".join([*versions, f"Python {environment['python']}"]))
    yield line("command", " ".join(environment["command"]))


def _head(report: Report) -> Iterator[str]:
    setting, speed = report.setting, report.speed
    what = "full fine-tuning" if setting.method == "full" else "LoRA"
    size = f"{setting.batch_size} rows" if setting.batch_tokens is None else f"{setting.batch_tokens:,} tokens"
    times = f" × {setting.accumulate}" if setting.accumulate > 1 else ""
    trains = f"{what} trains {scaled(setting.trainable)} of {scaled(setting.parameters)} parameters"
    yield line("model", f"{setting.model}, {setting.dtype}; {trains}")
    yield line("data", f"{setting.train_rows:,} rows to train on; a step is {size}{times}, {setting.layout}")
    yield from machine(report.environment, report.load_before)
    measured = f"{speed.steps:,} steps in {duration(speed.seconds)}"
    yield line("measured", f"{measured}, after {setting.warmup_steps:,} of warm-up")


def _speed(report: Report) -> Iterator[str]:
    speed = report.speed
    yield "\nspeed"
    yield line("real tokens/s", figure(speed.tokens_per_s))
    yield line("trained tokens/s", figure(speed.trained_tokens_per_s))
    yield line("computed positions/s", f"{figure(speed.positions_per_s)}; {speed.padding_share:.1%} padding")
    yield line("rows/s", figure(speed.rows_per_s))


def _step(report: Report) -> Iterator[str]:
    step, host = report.step_ms, report.host_ms
    parts = {"makes batches": host.data, "dispatches": host.dispatch, "waits for the device": host.waiting}
    yield "\na step"
    yield line("mean", f"{figure(step.mean)} ms")
    yield line("p5, p50, p95", f"{figure(step.p5)}, {figure(step.p50)}, {figure(step.p95)} ms")
    shares = (f"{name} {figure(ms)} ms ({ms / sum(parts.values()):.1%})" for name, ms in parts.items())
    yield line("the host", ", ".join(shares))


def _ceiling(report: Report) -> Iterator[str]:
    found = report.ceiling
    yield "\nbeside the machine's matrix products"
    if found is None:
        yield line("limit", "not told: the tokens of this model take different ways through its weights")
        return
    rate, passes = found.rate, found.flop_per_weight
    yield line("rate", f"{scaled(rate.flop_per_s, 'FLOP/s')}: {rate.size}³ in {rate.dtype}")
    needed = f"{passes} FLOP for each of {scaled(found.weights)} weights"
    yield line("a token needs", f"{needed}, and of {scaled(found.head_weights)} in the head where it is trained")
    yield line("limit", f"{figure(found.limit_tokens_per_s)} real tokens/s")
    yield line("reached", f"{found.share:.1%}; {found.computed_share:.1%} where padding counts")


def _memory(report: Report) -> Iterator[str]:
    found = report.memory
    extra = "optimizer" if report.setting.method == "full" else "adapters and optimizer"
    yield "\nmemory"
    yield line("peak", memory(found.peak_gb))
    parts = {"weights": found.weights_gb, extra: found.training_gb, "the steps' own": found.step_gb}
    yield line("of it", ", ".join(f"{name} {memory(gb)}" for name, gb in parts.items()))
    yield line("at the end", f"arrays {memory(found.active_gb)}, MLX's cache {memory(found.cache_gb)}")


def _start(report: Report) -> Iterator[str]:
    found, shapes = report.start, report.shapes
    yield "\nthe start"
    process, command = duration(found.from_process_s), duration(found.from_command_s)
    yield line("first step done", f"{process} after the process began, {command} after the command")
    yield line("of it", ", ".join(f"{PARTS[name]} {value:.2f}" for name, value in found.parts.items()) + " s")
    late = f", {shapes.while_measuring} of them while measuring" if shapes.while_measuring else ""
    first, later = duration(shapes.first_dispatch_s), duration(shapes.later_dispatch_s)
    cost = f"dispatching them took {first}, later {later}"
    yield line("compiled", f"{shapes.compiled} shapes of batches{late} ({shapes.planned} in the first epoch); {cost}")


def _whole(report: Report) -> Iterator[str]:
    found, setting = report.epoch, report.setting
    more = (setting.total_steps - found.steps) * found.usual_s / found.steps
    first = f"{'about ' if found.estimated else ''}{duration(found.first_s)}"
    yield "\na whole training"
    yield line("an epoch", f"{found.steps:,} steps; the first in {first}, others in {duration(found.usual_s)}")
    if more >= 0:
        whole = f"{setting.total_steps:,} steps in about {duration(found.first_s + more)}"
        yield line("all of it", f"{whole}, evaluations not counted")
