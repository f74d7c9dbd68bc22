"""Rows of a size that nobody expects."""

import json
from collections.abc import Callable
from pathlib import Path

from mlx_trainer.data import DataPipeline
from mlx_trainer.models import CausalLMModule
from tests.faults.conftest import Tell
from tests.tiny import tiny_mistral


def test_a_very_long_line(tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell) -> None:
    """It is a row like any other, cut at the longest length and told; the rows beside it stay whole."""
    megabytes = campaign(1, 50)
    ask = {"role": "user", "content": "dog"}
    answers = ["the sum", "the sum " * (megabytes * 1_000_000 // 8), "two numbers"]
    rows = [{"messages": [ask, {"role": "assistant", "content": answer}]} for answer in answers]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = CausalLMModule(tiny_mistral(tmp_path / "base")).tokenizer
    data = DataPipeline(path, tokenizer, train_split=1.0, max_seq_length=64, cache_dir=tmp_path / "cache")
    assert (data.summary.rows, data.summary.truncated_rows, len(data.train_rows)) == (3, 1, 3)
    tell("a line of many megabytes", f"{megabytes} MB, cut and told")
