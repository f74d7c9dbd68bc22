"""What a progress bar says, as text."""

from collections.abc import Callable, Mapping

from mlx_trainer.evaluation import EvalMetrics


def progress_line(
    step: int, total_steps: int | None, elapsed_s: float, left_s: float | None, metrics: Mapping[str, float]
) -> str:
    """One line about a step; what is not known is left out.

    >>> progress_line(120, 600, 42, 168, {"train/loss": 1.83, "train/lr": 9.6e-5, "memory/peak_gb": 4.12})
    'step 120/600  20%  elapsed 0:42  left 2:48  loss 1.83  lr 9.6e-05  4.1 GB peak'
    """
    parts = [f"step {step}" if total_steps is None else f"step {step}/{total_steps}"]
    if total_steps:
        parts.append(f"{100 * step // total_steps}%")
    parts.append(f"elapsed {duration(elapsed_s)}")
    if left_s is not None:
        parts.append(f"left {duration(left_s)}")
    parts += [form(metrics[tag]) for tag, form in _FORMS.items() if tag in metrics]
    return "  ".join(parts)


_FORMS: dict[str, Callable[[float], str]] = {
    "train/loss": "loss {:.4g}".format,
    "train/lr": "lr {:.2g}".format,
    "train/tokens_per_second": "{:.0f} tok/s".format,
    "memory/peak_gb": lambda gb: f"{gb:.1f} GB peak" if gb >= 1 else f"{1000 * gb:.0f} MB peak",
}


def evaluation_line(step: int, metrics: EvalMetrics, best: bool) -> str:
    """One line about an evaluation.

    >>> evaluation_line(100, EvalMetrics(1.5, 2, 0.5, metrics={"token_accuracy": 0.7}), best=True)
    'step 100  val/loss 1.5  val/perplexity 4.482  val/token_accuracy 0.7  best'
    """
    values = [f"{tag} {value:.4g}" for tag, value in metrics.as_dict().items()]
    return "  ".join([f"step {step}", *values, *(["best"] if best else [])])


def header_line(name: str, step: int, total_steps: int | None, steps_per_epoch: int, accumulate: int) -> str:
    """The first line.

    >>> header_line("Regression", 40, 600, 200, 4)
    'training Regression from step 41 to 600: 200 steps per epoch, each of 4 micro-batches'
    """
    end = "" if total_steps is None else f" to {total_steps}"
    parts = "" if accumulate == 1 else f", each of {accumulate} micro-batches"
    return f"training {name} from step {step + 1}{end}: {steps_per_epoch} steps per epoch{parts}"


def last_line(steps: int, seconds: float, tokens: int, reason: str, folder: object) -> str:
    """The last line.

    >>> last_line(600, 210, 170_000, "max_epochs=3 reached", "runs/demo")
    'done: 600 steps in 3:30, 810 tok/s, max_epochs=3 reached, result in runs/demo'
    """
    parts = [f"done: {steps} steps in {duration(seconds)}"]
    if tokens and seconds:
        parts.append(f"{tokens / seconds:.0f} tok/s")
    parts.append(reason)
    if folder is not None:
        parts.append(f"result in {folder}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(42.4), duration(168), duration(90_061)
    ('0:42', '2:48', '25:01:01')
    """
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
