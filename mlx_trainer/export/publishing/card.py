"""The model card: what was trained on what, how well, and how it is used; Hugging Face's metadata at its head.

The fields are those of https://huggingface.co/docs/hub/model-cards. What is not known is left out, and told.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define

from mlx_trainer.config import Config
from mlx_trainer.export.publishing.contents import ADAPTER, MODEL, PEFT, Contents
from mlx_trainer.export.publishing.markdown import is_number, table
from mlx_trainer.export.publishing.run import Run
from mlx_trainer.export.publishing.usage import usage
from mlx_trainer.monitoring import mask_secrets

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATA_FIGURES = {
    "rows": "rows",
    "train_rows": "rows trained on",
    "validation_rows": "rows held out",
    "tokens": "tokens",
    "trained_tokens": "tokens trained on",
    "length_p50": "median length, tokens",
    "length_max": "longest row, tokens",
}
OPTIONS = {
    "training": (
        "method", "optimizer", "learning_rate", "schedule", "warmup_steps", "weight_decay", "num_epochs", "max_steps",
        "batch_size", "gradient_accumulation_steps",
    ),
    "lora": ("rank", "alpha", "dropout", "target_modules"),
    "model": ("dtype", "max_seq_length"),
}  # fmt: skip
KINDS = {
    ADAPTER.name: "An adapter in mlx-lm's layout",
    PEFT.name: "An adapter in PEFT's layout",
    MODEL.name: "A model",
}
METRICS = {"val/loss": "loss", "val/perplexity": "perplexity"}


@define
class Card:
    """A model card as text, and what it had to leave out."""

    text: str
    notes: list[str]


def hub_base(contents: Contents, run: Run, given: str | None = None) -> str | None:
    """Return the base model's name on the Hub, None where only a path on this machine is known."""
    named = (given, contents.settings.get(contents.kind.base_key), run.base.get("name"))
    return next((name for name in named if isinstance(name, str) and is_hub_name(name)), None)


def is_repository(name: str) -> bool:
    """Whether a repository of the Hub can be called so: OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not listed there

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return HUB_NAME.fullmatch(name) is not None


def is_hub_name(name: str) -> bool:
    """Whether `name` means a repository: where there is a folder of that name, it would be loaded instead."""
    return is_repository(name) and not Path(name).exists()


def model_card(
    contents: Contents,
    repo_id: str,
    run: Run,
    *,
    base: str | None,
    license: str | None = None,
    language: Sequence[str] | None = None,
) -> Card:
    """Return the card of what `contents` holds, to be uploaded to `repo_id`.

    Text from outside is escaped, access tokens are masked, no path of this machine is in it.
    """
    from huggingface_hub import ModelCardData

    adapter, datasets = not contents.full, hub_datasets(run)
    results = eval_results(run, datasets)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        library_name=library_of(contents),
        pipeline_tag="text-generation",
        tags=["mlx", *(["lora"] if adapter else []), "mlx-trainer"],
        license=license,
        language=list(language) if language else None,
        datasets=datasets or None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    body = "\n\n".join(section for section in sections(contents, repo_id, run, base) if section)
    notes = [] if base else ["the card names no base model, for only a folder is known: give --base-model OWNER/NAME"]
    notes += [] if license else ["the card names no license: give --license"]
    return Card(mask_secrets(f"---\n{data.to_yaml()}\n---\n\n{body}\n"), notes)


def library_of(contents: Contents) -> str:
    """Return the library that loads it, as the Hub calls it."""
    if contents.kind is PEFT:
        return "peft"
    return "mlx" if contents.kind is ADAPTER or contents.quantized else "transformers"


def hub_datasets(run: Run) -> list[str]:
    """Return the data sets that are on the Hub; files of this machine are nobody's business."""
    paths = run.config.data.train_paths if run.config else ()
    names = (path.removeprefix("hf:").split(":")[0] for path in paths if path.startswith("hf:"))
    return [name for name in names if is_repository(name)]


def eval_results(run: Run, datasets: Sequence[str]) -> list[Any]:
    """Return the last held-out loss and perplexity as the Hub's EvalResult, none where they were not measured."""
    from huggingface_hub import EvalResult

    dataset = datasets[0] if len(datasets) == 1 else None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or "private",
            dataset_name=dataset or "held-out rows",
            metric_type=metric,
            metric_value=value,
        )
        for name, metric in METRICS.items()
        for value in run.values(name)[-1:]
    ]


def sections(contents: Contents, repo_id: str, run: Run, base: str | None) -> Iterator[str]:
    """Yield the card's parts as Markdown."""
    of = f", from [{base}](https://huggingface.co/{base})" if base else ""
    revision = run.base.get("revision")
    at = f" at commit `{revision}`" if base and re.fullmatch("[0-9a-f]{40}", str(revision)) else ""
    yield f"# {repo_id.split('/')[-1]}"
    yield f"{KINDS[contents.kind.name]}{of}{at}, fine-tuned with mlx-trainer on Apple's MLX."
    yield f"## How to use\n\n{usage(contents, repo_id, base)}"
    yield table("Results on held-out rows", result_rows(run), ("", "last", "lowest"))
    figures = [(words, run.data[key]) for key, words in DATA_FIGURES.items() if is_number(run.data.get(key))]
    yield table("Training data", figures)
    yield table("Training", option_rows(run.config))
    packages = run.facts.get("packages")
    yield table("Versions", list(packages.items()) if isinstance(packages, Mapping) else [])


def result_rows(run: Run) -> list[tuple[Any, ...]]:
    """Return a row for each measured metric: its last value and its lowest."""
    measured = {metric: run.values(name) for name, metric in METRICS.items()}
    return [(metric, found[-1], min(found)) for metric, found in measured.items() if found]


def option_rows(config: Config | None) -> list[tuple[str, Any]]:
    """Return the options that make a training what it is; those of LoRA only where it was used."""
    if config is None:
        return []
    names = {
        section: keys for section, keys in OPTIONS.items() if section != "lora" or config.training.method != "full"
    }
    rows = [(key, getattr(getattr(config, section), key)) for section, keys in names.items() for key in keys]
    return [(key, value) for key, value in rows if value is not None]
