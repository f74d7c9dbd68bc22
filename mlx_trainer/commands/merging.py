"""The commands that make one thing of several: an adapter and its base, or some adapters."""

from contextlib import ExitStack
from pathlib import Path

from mlx_trainer.commands.command import Command, Given
from mlx_trainer.config import ConfigError
from mlx_trainer.config.arguments import weighed

ROWS = 64
"""Rows of --data at most; the effect is measured on 1,024 tokens of them."""
METHODS = ("cat", "linear", "svd", "ties", "dare")
MERGING = {"dtype", "requantize", "bits", "max_loss", "trust_remote_code"}


def merge(given: Given) -> int:
    """Merge an adapter into its base, or check a merged model; the code is 1 where it is not what it should be."""
    from mlx_trainer import export
    from mlx_trainer.export.peft import in_mlx_layout

    checking = "unmerge" in given
    if useless := [name for name in sorted({*MERGING, "data"}) if checking and name in given]:
        raise ConfigError(f"--{useless[0].replace('_', '-')} is for merging; --unmerge checks what was merged")
    first, second = Path(given["first"]), Path(given["second"])
    loading = {name: given[name] for name in ("revision", "cache_dir") if name in given}
    with in_mlx_layout(second if checking else first) as adapter:
        base = export.base_directory(export.read_adapter(adapter), given.get("model"), **loading)
        if checking:
            result = export.check_unmerge(first, adapter, base=str(base))
            print(result)
            return int(bool(result.wrong))
        rows = rows_of(given["data"], base) if "data" in given else None
        options = {name: given[name] for name in MERGING & given.keys()}
        print(export.merge(adapter, second, base=str(base), rows=rows, **options))
    return 0


def rows_of(data: str, base: Path) -> list[list[int]]:
    """Return the first rows of a data file as ids, as they would be trained on."""
    from mlx_trainer.data import DataPipeline
    from mlx_trainer.models import load_tokenizer
    from mlx_trainer.models.hf_config import read_config, vocabulary_size

    size = vocabulary_size(read_config(base))
    pipeline = DataPipeline(data, load_tokenizer(base), train_split=1.0, shuffle=False, vocabulary_size=size)
    return [row.ids.tolist() for row in pipeline.train_rows[:ROWS]]


def combine(given: Given) -> int:
    """Add adapters up."""
    *words, output = given["folders"]
    if not words:
        raise ConfigError("combine takes adapters and then the new folder, such as `combine one=0.7 two=0.3 both`")
    from mlx_trainer import export
    from mlx_trainer.export.peft import in_mlx_layout

    pairs = [weighed(word) for word in words]
    weights = [1.0 if weight is None else weight for _, weight in pairs]
    options = {name: given[name] for name in ("method", "rank", "density", "seed") if name in given}
    with ExitStack() as stack:
        adapters = [stack.enter_context(in_mlx_layout(Path(path))) for path, _ in pairs]
        print(export.combine(adapters, Path(output), weights, **options))
    return 0


COMMANDS = {
    "merge": Command(
        merge,
        "Merge an adapter into its base model, for programs that open models only.",
        "ADAPTER OUTPUT [--model NAME] [--dtype NAME] [--requantize [--bits N]] | --unmerge MERGED ADAPTER",
        (),
        {
            "first": {"metavar": "ADAPTER", "help": "folder of the adapter; with --unmerge of the merged model"},
            "second": {"metavar": "OUTPUT", "help": "new folder for the merged model; with --unmerge the adapter's"},
            "--model": {"metavar": "NAME", "help": "base model (default: the one that the adapter names)"},
            "--revision": {"metavar": "NAME", "help": "branch, tag or commit of the base on the Hub"},
            "--cache-dir": {"metavar": "DIR", "help": "Hugging Face cache that the base is in"},
            "--dtype": {
                "choices": ("float32", "float16", "bfloat16"),
                "help": "type of the merged weights (default: as in the base's files)",
            },
            "--requantize": {"action": "store_true", "help": "pack a quantized base again; loses of the effect"},
            "--bits": {"type": int, "metavar": "N", "help": "bits for --requantize (default: the base's own)"},
            "--max-loss": {
                "type": float,
                "metavar": "X",
                "help": "refuse to lose more of the adapter's effect (default 0.05; with --requantize any)",
            },
            "--data": {"metavar": "FILE", "help": "rows to measure the effect on (default: eight sentences)"},
            "--trust-remote-code": {"action": "store_true", "help": "run, and copy, Python code that the base brings"},
            "--unmerge": {"action": "store_true", "help": "check that a merged model minus its adapter is the base"},
        },
    ),
    "combine": Command(
        combine,
        "Make one adapter of several of the same base, each with a weight.",
        "ADAPTER[=WEIGHT] ... OUTPUT [--method cat|linear|svd|ties|dare] [--rank N] [--density X]",
        (),
        {
            "folders": {
                "nargs": "+",
                "metavar": "ADAPTER[=WEIGHT]",
                "help": "adapters, as in one=0.7 two=-0.3 (1 where no weight stands), and last the new folder",
            },
            "--method": {"choices": METHODS, "help": "how they are added (default linear, which is exact)"},
            "--rank": {"type": int, "metavar": "N", "help": "of svd, ties and dare (default: the adapters' highest)"},
            "--density": {"type": float, "metavar": "X", "help": "share that ties and dare keep (default 0.5)"},
            "--seed": {"type": int, "metavar": "N", "help": "which values dare keeps (default 0)"},
        },
    ),
}
