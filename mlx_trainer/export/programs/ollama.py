"""A Modelfile for Ollama: which weights, which adapter, how a chat is written, where an answer ends.

The instructions are those of https://docs.ollama.com/modelfile. Ollama reads a GGUF file, or a folder of safetensors
of the architectures that it knows, and takes the chat template that a GGUF file brings where it knows that one.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mlx_trainer.export.programs.gguf_header import read_header
from mlx_trainer.export.publishing.contents import ADAPTER, MODEL, Contents, contents_of
from mlx_trainer.models import ModelError
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.monitoring import write_atomic

MODELFILE = "Modelfile"
# Mistral v0.3 as it was trained: the system text goes into the last user turn, an answer is closed by </s>. Ollama puts
# <s> before it all.
MISTRAL = """\
{{- range $index, $message := .Messages }}
{{- if eq .Role "user" }}[INST] {{ if and $.System (eq (len (slice $.Messages $index)) 1) }}{{ $.System }}

{{ end }}{{ .Content }}[/INST]
{{- else if eq .Role "assistant" }} {{ .Content }}</s>
{{- end }}
{{- end }}"""


def ollama(source: str | os.PathLike[str], output: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Write a Modelfile for `source` into the folder `output`, and return its path.

    `source` is a GGUF file, a merged model's folder, or an adapter's with `base`, Ollama's name or the path of the base
    model. Then `ollama create NAME -f Modelfile`. Raises ModelError where there is a Modelfile already, and for what
    Ollama does not read.
    """
    place, folder = Path(source), Path(output)
    if (folder / MODELFILE).exists():
        raise ModelError(f"{folder / MODELFILE} is there already; name another folder, or remove it.")
    text = of_file(place, folder) if place.is_file() else of_folder(contents_of(place), folder, base)
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomic(folder / MODELFILE, text)


def of_file(path: Path, output: Path) -> str:
    """Return the Modelfile of a GGUF file: template and ends of answers are in the file."""
    if read_header(path).metadata.get("general.type") == "adapter":
        raise ModelError(
            f"{path} is an adapter in GGUF; give its PEFT export and a base, from which Ollama makes both."
        )
    return modelfile(seen_from(output, path))


def of_folder(contents: Contents, output: Path, base: str | None) -> str:
    """Return the Modelfile of a merged model, or of an adapter on `base`."""
    folder = seen_from(output, contents.folder)
    if contents.kind is MODEL:
        if base is not None:
            raise ModelError(f"{contents.folder} is a merged model; a base is for adapters.")
        if contents.quantized:
            raise ModelError(
                f"{contents.folder} is quantized by MLX, which Ollama does not read: merge it into float16."
            )
        template = MISTRAL if is_mistral(contents) else None
        return modelfile(folder, template=template, stop=ends(contents))
    if base is None:
        raise ModelError(f"{contents.folder} is an adapter; give its base model as Ollama calls it, such as mistral.")
    if contents.kind is ADAPTER and "alpha" not in (contents.settings.get("lora_parameters") or {}):
        raise ModelError(
            f"{contents.folder / contents.kind.settings} has no alpha, and Ollama would take 0: export to PEFT."
        )
    return modelfile(base, adapter=folder)


def seen_from(output: Path, path: Path) -> str:
    """Return a path as the Modelfile has it: relative where both can be moved together, else absolute."""
    output, path = output.resolve(), path.resolve()
    return f"./{path.relative_to(output)}" if path.is_relative_to(output) else str(path)


def is_mistral(contents: Contents) -> bool:
    """Whether the model's chats are Mistral v0.3's, which Ollama cannot tell from a folder of safetensors."""
    templates = (contents.folder / "chat_template.jinja", contents.folder / "tokenizer_config.json")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in templates if path.is_file()]
    known = any("[INST] " in text and "[/INST]" in text for text in texts)
    return known and contents.settings.get("model_type") == "mistral"


def ends(contents: Contents) -> list[str]:
    """Return the text that ends an answer, none where the tokenizer's settings do not say it."""
    path = contents.folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    text = token.get("content") if isinstance(token, dict) else token
    return [text] if isinstance(text, str) and text else []


def modelfile(model: str, *, adapter: str | None = None, template: str | None = None, stop: Sequence[str] = ()) -> str:
    r"""Return the text of a Modelfile; raises ModelError for a text that cannot be quoted in it.

    >>> print(modelfile("mistral", adapter="./my adapter", stop=["</s>"]), end="")
    FROM mistral
    ADAPTER "./my adapter"
    PARAMETER stop "</s>"
    """
    lines = [f"FROM {quoted(model)}"]
    lines += [] if adapter is None else [f"ADAPTER {quoted(adapter)}"]
    lines += [] if template is None else [f"TEMPLATE {quoted(template)}"]
    return "\n".join([*lines, *(f"PARAMETER stop {quoted(text)}" for text in stop)]) + "\n"


def quoted(text: str) -> str:
    """Return a value as it is where nothing in it could end it, else between quotes; the format has no escapes."""
    if re.fullmatch(r"[\w./:-]+", text):
        return text
    if '"' not in text and "\n" not in text and "\r" not in text:
        return f'"{text}"'
    if '"""' in text or text.startswith('"') or text.endswith('"'):
        raise ModelError(f"{text!r} cannot be written into a Modelfile: it has quotes at an end, or three in a row.")
    return f'"""{text}"""'
