"""To GGUF, through llama.cpp's own converters: a merged model, or a PEFT export as an adapter.

mlx-lm writes GGUF too, but its token scores are all alike, without merges and chat template, so blanks come out wrong
(https://github.com/ml-explore/mlx-examples/issues/992). The converters know each model's tokenizer.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_trainer.export.programs.gguf_header import Header, read_header
from mlx_trainer.export.publishing.contents import ADAPTER, MODEL, PEFT, Contents, contents_of
from mlx_trainer.models import ModelError
from mlx_trainer.monitoring import mask_secrets, visible

OUTTYPES = ("f32", "f16", "bf16", "q8_0")
SCRIPTS = {MODEL.name: "convert_hf_to_gguf.py", PEFT.name: "convert_lora_to_gguf.py"}
# llama.cpp scales every adapter by alpha / rank, and knows no magnitudes.
NOT_IN_GGUF = ("use_rslora", "use_dora", "alpha_pattern", "modules_to_save")
VARIABLE = "LLAMA_CPP"
INSTALL = "python -m pip install torch gguf sentencepiece"
FETCH = f"git clone --depth 1 https://github.com/ggml-org/llama.cpp; {INSTALL}"


def gguf(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    outtype: str = "f16",
    base: str | os.PathLike[str] | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
) -> Header:
    """Convert a merged model or a PEFT export into the GGUF file `output`, and return what its head says.

    `outtype` is the type of the large tensors, as llama.cpp calls it. `base` is the folder of an adapter's base model,
    or its name on the Hub; without it the adapter's own word is taken. The converter is looked for in `llama_cpp`, in
    the folder that the variable LLAMA_CPP names, then on PATH. `output` appears only when it is whole. Raises
    ModelError where the folder cannot be converted, where `output` is there already, and where the converter is
    missing, fails, or leaves something else.
    """
    if outtype not in OUTTYPES:
        raise ModelError(f"outtype is {outtype!r}; it must be one of {', '.join(OUTTYPES)}.")
    target, contents = Path(output), convertible(Path(folder))
    if target.exists():
        raise ModelError(f"{target} is there already; name another file, or remove it.")
    if not target.parent.is_dir():
        raise ModelError(f"There is no folder {target.parent} to write {target.name} into.")
    script = converter(SCRIPTS[contents.kind.name], None if llama_cpp is None else Path(llama_cpp))
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as beside:
        made = Path(beside) / "model.gguf"
        options = ["--outfile", str(made), "--outtype", outtype, *base_options(contents, base)]
        convert([*script, str(contents.folder.resolve()), *options], contents.folder)
        header = read_header(made)
        check(header, contents)
        made.rename(target)
    return header


def convertible(folder: Path) -> Contents:
    """Return what `folder` holds; raises ModelError where llama.cpp cannot read it."""
    contents = contents_of(folder)
    if contents.kind is ADAPTER:
        raise ModelError(
            f"{folder} is an mlx-lm adapter, which llama.cpp does not read: merge it, or export it to PEFT."
        )
    if unknown := [key for key in NOT_IN_GGUF if contents.kind is PEFT and contents.settings.get(key)]:
        raise ModelError(f"{folder} has {', '.join(unknown)}, which a GGUF adapter cannot say: merge it instead.")
    if contents.quantized:
        raise ModelError(f"{folder} is quantized by MLX, which llama.cpp does not read: merge it into a float type.")
    return contents


def converter(script: str, folder: Path | None) -> list[str]:
    """Return the command that runs llama.cpp's `script`; raises ModelError, which says how to get it."""
    named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        if not (named / script).is_file():
            raise ModelError(f"{named} has no {script}; give the folder of llama.cpp ({FETCH}).")
        return [sys.executable, str(named / script)]
    if (found := shutil.which(script)) is not None:
        return [found]  # its own first line says with which Python
    raise ModelError(
        f"{script} of llama.cpp is not here. Get it ({FETCH}), then give its folder by --llama-cpp or in {VARIABLE}."
    )


def base_options(contents: Contents, base: str | os.PathLike[str] | None) -> list[str]:
    """Return how an adapter's converter is told of the base; raises ModelError for a base of a merged model."""
    if base is None:
        return []
    if contents.kind is MODEL:
        raise ModelError(f"{contents.folder} is a merged model; a base is for adapters.")
    return ["--base", str(Path(base).resolve())] if Path(base).is_dir() else ["--base-model-id", str(base)]


def convert(command: list[str], folder: Path) -> None:
    """Run the converter; raises ModelError with the end of what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ModelError(f"{command[0]} cannot be run: {error.strerror}.") from error
    if done.returncode:
        last = visible(mask_secrets(" | ".join(done.stderr.strip().splitlines()[-3:])))[-500:]
        missing = f" Install what it needs: {INSTALL}." if "ModuleNotFoundError" in last else ""
        raise ModelError(f"{folder} could not be converted (code {done.returncode}): {last}.{missing}")


def check(header: Header, contents: Contents) -> None:
    """Raise ModelError where the file is not what it should be: a whole model with its tokens, or this adapter."""
    wanted: dict[str, object] = {
        "general.architecture": None,
        "tokenizer.ggml.model": None,
        "tokenizer.ggml.tokens": None,
    }
    if contents.kind is PEFT:
        alpha = float(contents.settings.get("lora_alpha", 8))  # PEFT's own default
        wanted = {"general.architecture": None, "adapter.type": "lora", "adapter.lora.alpha": alpha}
    found = header.metadata
    wrong = [key for key, value in wanted.items() if not found.get(key) or value not in (None, found[key])]
    if wrong or not header.tensors:
        lacks = ", ".join(wrong) or "tensors"
        raise ModelError(f"What llama.cpp made of {contents.folder} has no right {lacks}; it was not kept.")
