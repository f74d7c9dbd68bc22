"""Question and answer in turn, until the input ends."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType

from mlx_trainer.chat.screen import Lines, Screen
from mlx_trainer.chat.talk import Talk
from mlx_trainer.models import ModelError

HELP = """/reset         forget what was said
/system TEXT   begin anew with this system text, without one where TEXT is empty
/help          this
/exit          end, as Ctrl-D does
Ctrl-C stops an answer. A line with a blank before its / is a question."""


def converse(talks: Sequence[Talk]) -> int:
    """Answer each line of the input with each of `talks`, until /exit or its end; returns the exit code."""
    if interactive := sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401 - input() can then be edited, and earlier lines be called back

        print("/help tells the commands.")
    screen = screen_for(talks, interactive)
    while (line := ask(interactive)) is not None:
        if line.startswith("/"):
            if line.split()[0] == "/exit":
                break
            obey(line, talks)
        elif line.strip():
            turn(line.strip(), talks, screen)
    return 0


def ask(interactive: bool) -> str | None:
    """Return the next line, None at the end; Ctrl-C in a terminal gives up the line."""
    try:
        return input("> " if interactive else "")
    except EOFError:
        print("\n" if interactive else "", end="")
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        print()
        return ""


def obey(line: str, talks: Sequence[Talk]) -> None:
    """Do what a line that begins with / asks for."""
    command, _, text = line.partition(" ")
    if command == "/help":
        print(HELP)
    elif command in ("/reset", "/system"):
        for talk in talks:
            talk.messages = []
            if command == "/system":
                talk.options = {**talk.options, "system": text.strip() or None}
        print("A new conversation.")
    else:
        print(f"{command} is not a command; /help tells them.")


def turn(question: str, talks: Sequence[Talk], screen: Screen) -> None:
    """Show what each of `talks` answers; a question that one cannot answer is told, and nothing is lost."""
    with interruptible() as stopped, screen.turn() as show:
        for number, talk in enumerate(talks):
            try:
                with closing(talk.answer(question)) as pieces:
                    for piece in pieces:
                        show(number, piece)
                        if stopped():
                            return
            except ModelError as error:
                print(f"{error} /reset begins anew.", file=sys.stderr)
                return


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Tell whether Ctrl-C was pressed inside, which raises nothing the first time: MLX may be in the middle of a token.

    Outside the main thread, where Python has no signals, nobody can press it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed: list[int] = []
    former = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, former)

    signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, former)


def screen_for(talks: Sequence[Talk], interactive: bool) -> Screen:
    """Return two columns where somebody compares in a terminal, else lines."""
    if interactive and len(talks) > 1:
        from mlx_trainer.chat.columns import Columns

        return Columns([talk.name for talk in talks])
    return Lines([talk.name for talk in talks] if len(talks) > 1 else [""], interactive)
