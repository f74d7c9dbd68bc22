"""Generated samples as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_trainer.evaluation import GeneratedSample


def as_lines(step: int, samples: Sequence[GeneratedSample], scores: Mapping[str, float]) -> str:
    """A header, then two lines per sample.

    >>> print(as_lines(10, [GeneratedSample("Who?", "Me.\\n")], {"exact_match": 0.5}))
    step 10  answers  exact_match 0.5
      > Who?
        Me.
    """
    lines = [f"step {step}  answers" + "".join(f"  {name} {score:.4g}" for name, score in scores.items())]
    for sample in samples:
        lines += [f"  > {one_line(prompt_text(sample.prompt))}", f"    {one_line(sample.generated_text)}"]
    return "\n".join(lines)


def as_markdown(sample: GeneratedSample) -> str:
    """Prompt, answer and reference as Markdown, all of it quoted literally."""
    parts = {"prompt": prompt_text(sample.prompt), "answer": sample.generated_text, "reference": sample.reference}
    shown = ((name, text.replace("\n", "\n    ")) for name, text in parts.items() if text is not None)
    return "\n\n".join(f"**{name}**\n\n    {text}" for name, text in shown)


def prompt_text(prompt: Any) -> str:
    """A prompt as people read it: of a list of messages, the last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def one_line(text: str) -> str:
    """The text with its line breaks as a visible sign."""
    return text.strip().replace("\n", "⏎")
