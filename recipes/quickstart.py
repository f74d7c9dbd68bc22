"""The quick start: a language model from nothing, then a LoRA fine-tune of it, with no network, on two CPU cores.

1. Read the docstrings of Python's standard library; every twelfth name is held out of everything below.
2. Train a tokenizer and a small Mistral on them, all weights, and keep both in a cache.
3. Write chats: "What does `textwrap.dedent(text)` do?", and an answer in a manner the base has never seen.
4. Fine-tune the base on the chats with LoRA, all callbacks on.
5. Compare: the answers about held-out names, before and after.
"""

import argparse
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import define, field, frozen
from docstrings import Entry, read_library
from small_base import Size, train_base, write_jsonl

from mlx_trainer import (
    EarlyStopping,
    EvalMetrics,
    Evaluation,
    GradientClipping,
    LambdaCallback,
    LoRAConfig,
    MemoryMonitor,
    MetricsLogger,
    ModelCheckpoint,
    NaNGuard,
    ProgressBar,
    SampleGenerator,
    TensorBoardLogger,
    Trainer,
    runtime,
)
from mlx_trainer.build import build_data, build_module
from mlx_trainer.checkpoint import write_directory
from mlx_trainer.config import Config, DataConfig, ModelConfig, RunConfig, TrainingConfig, to_yaml
from mlx_trainer.monitoring import read_json_lines, setup_logging, write_atomic, write_environment, write_report

RECIPE_VERSION = 2
"""Part of the cache's key: raise it where the base would come out differently."""


@frozen
class Settings:
    """The base's size, and the length of the tuning."""

    base: Size
    chats: int
    held_out: int
    steps: int
    every: int
    """Steps between evaluations."""
    files: int | None = None
    """Of the library; None reads all."""


FULL = Settings(
    base=Size(
        layers=2, hidden=256, heads=4, vocabulary=1024, row_tokens=96, batch_size=8, steps=800, learning_rate=4e-3
    ),
    chats=5000,
    held_out=48,
    steps=500,
    every=100,
)
SMALL = Settings(
    base=Size(layers=2, hidden=32, heads=2, vocabulary=384, row_tokens=64, batch_size=4, steps=10, learning_rate=3e-3),
    chats=64,
    held_out=8,
    steps=10,
    every=5,
    files=150,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the five steps."""
    options = parse(arguments)
    settings, run = (SMALL if options.small else FULL), unused(options.output)

    with phase("1  the standard library's docstrings"):
        entries = read_library(settings.files)
        known = [entry for entry in entries if not entry.held_out]
        unknown = [entry for entry in entries if entry.held_out and entry.public]
        print(f"   {len(entries):,} functions, methods and classes; {len(entries) - len(known):,} of them held out")

    with phase("2  a tokenizer and a base model, trained on these docstrings"):
        base = cached_base(options.cache, [entry.page() for entry in known], settings.base)

    with phase("3  chats about them"):
        chats = [entry.chat() for entry in known if entry.public][: settings.chats]
        held_out = spread(unknown, settings.held_out)
        config = configure(run, base, settings)
        write_jsonl(Path(config.data.train_paths[0]), chats)
        write_jsonl(Path(str(config.data.validation_path)), [entry.chat() for entry in held_out])
        print(f"   {len(chats):,} to learn from, {len(held_out)} about held-out names to measure with")

    with phase("4  the fine-tune, with LoRA"), setup_logging(run):
        readings = fine_tune(config, run, held_out)

    with phase("5  before and after, on names that neither training has seen"):
        compare(readings, len(held_out), read_json_lines(run / "samples.jsonl"))
        write_report(run)
    print(f"\nAll of it is in {run}/: begin with report.html; the adapter is in adapter/, its base in {base}")


@define
class Readings:
    """What is measured while tuning; the first of each is that of the untouched base, the last that of the result."""

    evaluations: list[EvalMetrics] = field(factory=list)
    right_facts: list[int] = field(factory=list)
    """Answers that begin with the right kind, module and number of arguments."""


def fine_tune(config: Config, run: Path, held_out: Sequence[Entry]) -> Readings:
    """Train adapters as `config` says, with every callback that ships with the trainer."""
    module = build_module(config)
    data = build_data(config, module)
    write_atomic(run / "config.yaml", to_yaml(config))
    write_environment(run, seed=config.data.seed)

    readings = Readings()

    def count_facts(*_: object) -> None:
        answers = module.generate([entry.question for entry in held_out], max_tokens=24)
        right = [answer.startswith(entry.facts) for answer, entry in zip(answers, held_out, strict=True)]
        readings.right_facts.append(sum(right))

    shown = spread(held_out, 3)
    training = config.training
    trainer = Trainer(
        max_epochs=training.num_epochs,
        max_steps=training.max_steps,
        log_every=training.logging_steps,
        run_dir=run,
        callbacks=[
            GradientClipping(max_norm=1.0),
            NaNGuard(),
            MemoryMonitor(),
            Evaluation(every=training.eval_steps, at_start=True),
            EarlyStopping(patience=3),
            SampleGenerator([e.question for e in shown], references=[e.answer for e in shown], max_tokens=80),
            LambdaCallback(
                on_fit_start=count_facts,
                on_evaluation_end=lambda trainer, module, step, metrics: readings.evaluations.append(metrics),
                on_fit_end=count_facts,
            ),
            ProgressBar(),
            MetricsLogger(),
            TensorBoardLogger(),
            ModelCheckpoint(every=training.save_steps, keep_last=2, monitor="val/loss"),
        ],
    )
    trainer.fit(module, data)
    return readings


def configure(run: Path, base: Path, settings: Settings) -> Config:
    """The fine-tune as a configuration: `mlx-trainer train <run>/config.yaml --output <other>` repeats it."""
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Config(
        model=ModelConfig(model_name=str(base), dtype="float32", max_seq_length=128),
        lora=LoRAConfig(rank=16, alpha=32, dropout=0.0, target_modules=linears),
        training=TrainingConfig(
            batch_size=8,
            gradient_accumulation_steps=1,
            num_epochs=1,
            max_steps=settings.steps,
            learning_rate=3e-3,
            warmup_steps=settings.steps // 20,
            save_steps=2 * settings.every,
            keep_last=2,
            eval_steps=settings.every,
            logging_steps=max(1, settings.every // 2),
        ),
        data=DataConfig(
            dataset_path=str(run / "data" / "chats.jsonl"), validation_path=str(run / "data" / "held_out.jsonl")
        ),
        run=RunConfig(directory=str(run)),
    )


def cached_base(cache: Path, pages: list[str], size: Size) -> Path:
    """The folder of the base model, trained now unless an earlier run did."""
    shape = f"{size.layers}x{size.hidden}-{size.vocabulary}-{size.steps}"
    folder = cache / f"quickstart-{RECIPE_VERSION}-python{platform.python_version()}-{shape}"
    if (folder / "model.safetensors").exists():
        print(f"   taken from an earlier run: {folder} (delete it to train it again)")
        return folder
    with TemporaryDirectory() as work:
        write_directory(folder, lambda partial: train_base(partial, pages, size, Path(work)))
    print(f"   kept for the next run in {folder}")
    return folder


def compare(readings: Readings, questions: int, samples: Sequence[dict[str, str]]) -> None:
    """Print the figures and the answers of the untouched base and of the fine-tuned model."""
    before, after = readings.evaluations[0], readings.evaluations[-1]
    facts = readings.right_facts
    print(f"   {'':34}{'before':>8}{'after':>8}")
    print(f"   {'loss, nats a token of the answers':34}{before.loss:8.2f}{after.loss:8.2f}")
    print(f"   {'perplexity':34}{before.perplexity:8.1f}{after.perplexity:8.1f}")
    print(f"   {f'right facts, of {questions} answers':34}{facts[0]:8}{facts[-1]:8}")
    prompts = len({sample["prompt"] for sample in samples})
    for first, last in zip(samples[:prompts], samples[-prompts:], strict=True):
        print(f"\n   {first['prompt']}")
        for title, text in (
            ("before", first["generated_text"]),
            ("after", last["generated_text"]),
            ("docs", last["reference"]),
        ):
            print(f"     {title:7} {' '.join(text.split())[:240]}")


def unused(folder: Path) -> Path:
    """The folder itself, or where an earlier run has it, the first of folder-2, folder-3, … that is not taken."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], numbered) if not path.exists())


def spread(entries: Sequence[Entry], most: int) -> list[Entry]:
    """So many of `entries`, evenly spread from first to last."""
    number = min(most, len(entries))
    return [entries[(2 * i + 1) * len(entries) // (2 * number)] for i in range(number)]


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Print the title, and after the block how long it took."""
    started = time.perf_counter()
    print(f"\n{title}", flush=True)
    yield
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="run folder (%(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=runtime.cache_directory(), help="where the base model is kept (%(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; learns next to nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
