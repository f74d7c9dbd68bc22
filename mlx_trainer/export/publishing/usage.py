"""How what was trained is used: the lines of a model card that a reader copies."""

from mlx_trainer.export.publishing.contents import PEFT, Contents

PROMPT = "Why is the sky blue?"


def usage(contents: Contents, repo_id: str, base: str | None) -> str:
    """Return Markdown with the commands or the code that load it; `base` may be unknown."""
    base = base or "BASE_MODEL"
    if contents.kind is PEFT:
        return peft(repo_id, base)
    if contents.full:
        return full(contents, repo_id, base)
    folder = repo_id.split("/")[-1]
    return shell(
        f"hf download {repo_id} --local-dir {folder}",
        f'mlx_lm.generate --model {base} --adapter-path {folder} --prompt "{PROMPT}"',
        f'mlx-trainer generate --model {base} --adapter {folder} --prompt "{PROMPT}"',
    )


def full(contents: Contents, repo_id: str, base: str) -> str:
    """All weights: a merged model by itself, or mlx-lm's layout beside the base's configuration."""
    if "adapters.safetensors" in contents.files:
        folder = repo_id.split("/")[-1]
        return shell(
            f"hf download {repo_id} --local-dir {folder}",
            f'mlx_lm.generate --model {base} --adapter-path {folder} --prompt "{PROMPT}"',
        )
    lines = shell(f'mlx_lm.generate --model {repo_id} --prompt "{PROMPT}"')
    return lines if contents.quantized else f"{lines}\n\n{transformers(repo_id)}"


def peft(repo_id: str, base: str) -> str:
    """An adapter of PEFT, on its base."""
    return python(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo_id}")',
    )


def transformers(repo_id: str) -> str:
    """A whole model."""
    return python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")',
    )


def shell(*lines: str) -> str:
    """Return lines for a terminal."""
    return "```bash\n" + "\n".join(lines) + "\n```"


def python(*lines: str) -> str:
    """Return lines of a program."""
    return "```python\n" + "\n".join(lines) + "\n```"
