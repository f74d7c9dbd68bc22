"""The commands that hand over what was trained: to the Hub, and to other programs on this machine."""

from mlx_trainer.commands.command import Command, Given

FOLDER = {"metavar": "FOLDER", "help": "adapter (runs/chats/adapter), PEFT export or merged model"}


def push(given: Given) -> int:
    """Upload to the Hub, or print what would go up."""
    from mlx_trainer.export.publishing.hub import push

    keywords = {key: value for key, value in given.items() if key not in ("folder", "repository")}
    upload = push(given["folder"], given["repository"], **keywords)
    if upload.url is None:
        print(upload.as_text())
        return 0
    for note in upload.notes:
        print(f"note: {note}")
    print(upload.url)
    return 0


def download(given: Given) -> int:
    """Fetch from the Hub, compare with its digests, and print where it lies."""
    from mlx_trainer.models.provenance import verify
    from mlx_trainer.models.source import ADAPTER_FILES, MODEL_FILES, resolve

    folder = resolve(
        given["repository"],
        revision=given.get("revision"),
        cache_dir=given.get("cache_dir"),
        files=(*MODEL_FILES, *ADAPTER_FILES),
    )
    verify(folder)
    print(folder)
    return 0


def gguf(given: Given) -> int:
    """Convert with llama.cpp's converter."""
    from mlx_trainer.export.programs.gguf import gguf

    options = {key: given[key] for key in ("outtype", "base", "llama_cpp") if key in given}
    header = gguf(given["folder"], given["output"], **options)
    print(f"{given['output']}: {header.metadata['general.architecture']}, {header.tensors} tensors")
    return 0


def ollama(given: Given) -> int:
    """Write a Modelfile."""
    from mlx_trainer.export.programs.ollama import ollama

    path = ollama(given["source"], given.get("output", "."), base=given.get("base"))
    print(f"{path}: ollama create NAME -f {path}")
    return 0


def lm_studio(given: Given) -> int:
    """Put a model where LM Studio looks."""
    from mlx_trainer.export.programs.lm_studio import ROOT, lm_studio

    print(lm_studio(given["folder"], given["name"], root=given.get("root", ROOT), link="link" in given))
    return 0


COMMANDS = {
    "push": Command(
        push,
        "Upload an adapter, a PEFT export or a merged model to the Hub, with a model card.",
        "FOLDER OWNER/NAME [--dry-run] [--private] [--base-model OWNER/NAME] [--license ID] [--run DIR]",
        (),
        {
            "folder": FOLDER,
            "repository": {"metavar": "OWNER/NAME", "help": "the repository; made where it is missing"},
            "--dry-run": {"action": "store_true", "help": "print files, sizes and the card; ask nobody"},
            "--private": {"action": "store_true", "help": "make the repository a private one"},
            "--revision": {"metavar": "BRANCH", "help": "branch to upload to (default main)"},
            "--message": {"metavar": "TEXT", "help": "summary of the commit"},
            "--base-model": {"metavar": "OWNER/NAME", "help": "base model, where only a folder is known"},
            "--license": {"metavar": "ID", "help": "license (default: that of the base's card)"},
            "--run": {"metavar": "DIR", "help": "run folder that the card tells of (default: the one around FOLDER)"},
            "--language": {"action": "append", "metavar": "CODE", "help": "language of the data, as en; repeatable"},
        },
    ),
    "download": Command(
        download,
        "Fetch a model or an adapter from the Hub, compare each file with its published digest, print the folder.",
        "OWNER/NAME [--revision REV] [--cache-dir DIR]",
        (),
        {
            "repository": {"metavar": "OWNER/NAME", "help": "the repository"},
            "--revision": {"metavar": "REV", "help": "branch, tag or commit (default main)"},
            "--cache-dir": {"metavar": "DIR", "help": "Hugging Face's home folder (default ~/.cache/huggingface)"},
        },
    ),
    "gguf": Command(
        gguf,
        "Convert a merged model or a PEFT export to GGUF, with llama.cpp's own converter.",
        "FOLDER OUTPUT.gguf [--outtype TYPE] [--base MODEL] [--llama-cpp DIR]",
        (),
        {
            "folder": {"metavar": "FOLDER", "help": "merged model or PEFT export"},
            "output": {"metavar": "OUTPUT.gguf", "help": "the file to write"},
            "--outtype": {"metavar": "TYPE", "help": "f32, f16, bf16 or q8_0 (default f16)"},
            "--base": {"metavar": "MODEL", "help": "an adapter's base model: its folder, or its name on the Hub"},
            "--llama-cpp": {"metavar": "DIR", "help": "folder of llama.cpp (default: LLAMA_CPP, then PATH)"},
        },
    ),
    "ollama": Command(
        ollama,
        "Write a Modelfile for Ollama.",
        "SOURCE [--output DIR] [--base MODEL]",
        (),
        {
            "source": {"metavar": "SOURCE", "help": "GGUF file, merged model or adapter"},
            "--output": {"metavar": "DIR", "help": "folder to write the Modelfile into (default: this one)"},
            "--base": {"metavar": "MODEL", "help": "an adapter's base model as Ollama calls it, such as mistral"},
        },
    ),
    "lm-studio": Command(
        lm_studio,
        "Put a merged model where LM Studio looks for it.",
        "FOLDER PUBLISHER/MODEL [--root DIR] [--link]",
        (),
        {
            "folder": {"metavar": "FOLDER", "help": "merged model, float or quantized"},
            "name": {"metavar": "PUBLISHER/MODEL", "help": "how LM Studio shows it"},
            "--root": {"metavar": "DIR", "help": "LM Studio's folder of models (default ~/.lmstudio/models)"},
            "--link": {"action": "store_true", "help": "link to the files instead of copying them"},
        },
    ),
}
