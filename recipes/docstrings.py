"""The quick start's text: what the docstrings of Python's own standard library say, as pages and as chats.

The sources are parsed, never imported, so nothing in them is run.
"""

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
HELD_OUT_SHARE = 12
"""One name in so many is held out."""
LONGEST_SUMMARY = 160
NUMBERS = ("no arguments", "one argument", "two arguments", "three arguments", "four arguments")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Chat = dict[str, list[dict[str, str]]]


@frozen
class Entry:
    """A function, method or class of the library, and what its docstring says."""

    kind: str
    owner: str
    """The module, and for a method its class: `textwrap`, `pathlib.Path`."""
    name: str
    parameters: tuple[str, ...]
    summary: str
    """The docstring's first sentence."""

    @property
    def call(self) -> str:
        """Such as `textwrap.dedent(text)`; a class stands without parentheses."""
        arguments = "" if self.kind == "class" else f"({', '.join(self.parameters)})"
        return f"{self.owner}.{self.name}{arguments}"

    @property
    def held_out(self) -> bool:
        """Whether the entry is kept from all training: decided by its bare name, so all namesakes share a side."""
        return zlib.crc32(self.name.encode()) % HELD_OUT_SHARE == 0

    @property
    def public(self) -> bool:
        """Whether no part of its name is private or special, and the chat about it is short."""
        named = f".{self.owner}.{self.name}"
        return "._" not in named and 15 <= len(self.summary) <= LONGEST_SUMMARY and len(self.parameters) < len(NUMBERS)

    def page(self) -> str:
        """The entry as a page of a reference manual, for the base model."""
        return f"`{self.call}`\n{self.kind} from `{self.module}`\n\n{self.summary}"

    def chat(self) -> Chat:
        """A question about the entry and its answer, in the one manner that the tuning teaches."""
        messages = {"user": self.question, "assistant": self.answer}
        return {"messages": [{"role": role, "content": content} for role, content in messages.items()]}

    @property
    def question(self) -> str:
        """What a user would ask."""
        return f"What does `{self.call}` do?"

    @property
    def answer(self) -> str:
        """Kind, module and number of arguments, which can be read off the question; then the summary, which cannot."""
        return f"{self.facts} In short: {self.summary}"

    @property
    def facts(self) -> str:
        """The answer's first sentence."""
        arguments = "" if self.kind == "class" else f" with {NUMBERS[len(self.parameters)]}"
        return f"A {self.kind} from `{self.module}`{arguments}."

    @property
    def module(self) -> str:
        """The top-level module."""
        return self.owner.partition(".")[0]


def read_library(most_files: int | None = None) -> list[Entry]:
    """Every documented function, method and class of the standard library's Python sources, sorted by file."""
    root = Path(sysconfig.get_path("stdlib"))
    places = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    wanted = [place for place in places if not SKIPPED_FOLDERS & set(place.parts)]
    entries: list[Entry] = []
    for place in wanted[:most_files]:
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        entries += definitions(ast.parse((root / place).read_bytes()), module)
    return unlike(entries)


def definitions(node: ast.AST, owner: str, *, in_class: bool = False) -> Iterator[Entry]:
    """The documented definitions in `node`, those inside its classes as methods."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            if docstring := ast.get_docstring(child):
                yield entry(child, docstring, owner, in_class)
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{owner}.{child.name}", in_class=True)


def entry(node: Definition, docstring: str, owner: str, in_class: bool) -> Entry:
    """The entry of one definition."""
    summary = first_sentence(docstring)
    if isinstance(node, ast.ClassDef):
        return Entry("class", owner, node.name, (), summary)
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return Entry("method" if in_class else "function", owner, node.name, tuple(names[in_class:]), summary)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line, with a full stop.

    >>> first_sentence("Open the lid\\n    of this box: at once.\\n\\n    More.")
    'Open the lid of this box.'
    """
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?:;])\s", paragraph, maxsplit=1)[0].rstrip(".:;") + "."


def unlike(entries: Sequence[Entry]) -> list[Entry]:
    """The entries without repetitions; one whose sentence any training entry has is not held out."""
    trained = {entry.summary.lower() for entry in entries if not entry.held_out}
    kept = {
        (entry.name, entry.summary): entry
        for entry in entries
        if not (entry.held_out and entry.summary.lower() in trained)
    }
    return list(kept.values())
