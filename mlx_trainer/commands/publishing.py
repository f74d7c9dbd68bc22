"""The commands that hand over what was trained: to the Hub, and to other programs on this machine."""

from mlx_trainer.commands.command import Command, Given

FOLDER = {"metavar": "FOLDER", "help": "adapter (runs/chats/adapter), PEFT export or merged model"}


def push(given: Given) -> int:
    """Upload to the Hub, or print what would go up."""
    from mlx_trainer.export.hub import push

    keywords = {key: value for key, value in given.items() if key not in ("folder", "repository")}
    upload = push(given["folder"], given["repository"], **keywords)
    if upload.url is None:
        print(upload.as_text())
        return 0
    for note in upload.notes:
        print(f"note: {note}")
    print(upload.url)
    return 0


COMMANDS = {
    "push": Command(
        push,
        "Upload an adapter, a PEFT export or a merged model to the Hub, with a model card.",
        "FOLDER OWNER/NAME [--dry-run] [--private] [--revision BRANCH] [--base-model OWNER/NAME] [--license ID]",
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
            "--language": {"action": "append", "metavar": "CODE", "help": "language of the data, as en; repeatable"},
        },
    ),
}
