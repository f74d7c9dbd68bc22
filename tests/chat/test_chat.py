"""Conversations: what each side remembers, the base beside the adapter, commands, and a real terminal."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer import cli, trained
from mlx_trainer.chat import Talk, converse
from mlx_trainer.config import ModelConfig
from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.monitoring import visible

ROOT = Path(__file__).parents[2]
QUESTIONS = ("Where is it?", "And the fox?")


def models(adapter: Path, **options: Any) -> tuple[CausalLMModule, CausalLMModule]:
    """The base model alone, and with its adapter."""
    model = ModelConfig(model_name=str(adapter.parent / "base"), dtype="float32", max_seq_length=512, **options)
    return trained.answering(model), trained.answering(model, str(adapter))


def test_each_side_remembers_its_own_answers(adapter: Path) -> None:
    """Beside each other, the base answers as it does alone, in its own conversation, and the adapter in its own."""
    base, module = models(adapter)
    options = {"max_tokens": 8, "system": "Be brief."}
    sides = Talk("without", module, options, bare=True), Talk("with", module, options)
    for talk, alone in zip(sides, (base, module), strict=True):
        messages: list[dict[str, str]] = []
        for question in QUESTIONS:
            said = "".join(talk.answer(question))
            messages.append({"role": "user", "content": question})
            assert [said] == alone.generate([messages], **options)
            messages.append({"role": "assistant", "content": said})
        assert talk.messages == messages
    assert sides[0].messages != sides[1].messages


def test_read_in_turns_neither_side_disturbs_the_other(adapter: Path) -> None:
    """Pieces taken alternately from both sides are the answers that each gives alone."""
    _, module = models(adapter)
    sides = [Talk("", module, {"max_tokens": 12}, bare=bare) for bare in (True, False)]
    alone = ["".join(Talk("", module, {"max_tokens": 12}, bare=bare).answer("Who?")) for bare in (True, False)]
    streams, said = [side.answer("Who?") for side in sides], ["", ""]
    for _ in range(12):
        for number, stream in enumerate(streams):
            said[number] += next(stream, "")
    assert said == alone
    assert said[0] != said[1]


def test_a_cut_answer_stays_as_far_as_it_came_and_a_refused_question_leaves_nothing(adapter: Path) -> None:
    """After a cut the conversation goes on; a question that is too long changes nothing."""
    _, module = models(adapter)
    talk = Talk("", module, {"max_tokens": 50})
    pieces = talk.answer("Who?")
    said = next(pieces)
    pieces.close()
    assert talk.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": said}]
    with pytest.raises(ModelError, match="max_seq_length is 512"):
        next(talk.answer("word " * 600))
    assert len(talk.messages) == 2


def conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *talks: Talk) -> Any:
    """What is printed where `text` is piped in."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert converse(talks) == 0
    return capsys.readouterr()


def test_piped_in_and_out_it_is_plain_lines(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No prompt sign and no colour; commands do what /help says, and the end of the input ends."""
    _, module = models(adapter)
    talk = Talk("with the adapter", module, {"max_tokens": 6})
    first, second = module.generate([QUESTIONS[0]], max_tokens=6) + module.generate(
        [QUESTIONS[0]], max_tokens=6, system="S"
    )
    lines = f"{QUESTIONS[0]}\n\n/reset\n{QUESTIONS[0]}\n/system S\n{QUESTIONS[0]}\n/exit\nnever\n"
    told = conversation(monkeypatch, capsys, lines, talk)
    assert told.out == f"{first}\nA new conversation.\n{first}\nA new conversation.\n{second}\n"
    assert talk.messages[0]["content"] == QUESTIONS[0]
    told = conversation(monkeypatch, capsys, f"/nonsense x\n/help\n/system\n{'word ' * 600}\n", talk)
    assert told.out.startswith("/nonsense is not a command; /help tells them.\n/reset ")
    assert (talk.options["system"], talk.messages) == (None, [])
    assert re.fullmatch(r"A prompt has \d+ tokens; max_seq_length is 512\. /reset begins anew\.\n", told.err)


def test_compared_and_piped_each_answer_has_its_name(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both answers as lines, the base's first."""
    base, module = models(adapter)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n"))
    assert (
        cli.main(["chat", "--adapter", str(adapter), "--compare", "--model.dtype", "float32", "--max-tokens", "6"]) == 0
    )
    answers = [each.generate(["Who?"], max_tokens=6)[0] for each in (base, module)]
    assert capsys.readouterr().out == f"without: {answers[0]}\nwith the adapter: {answers[1]}\n"


def test_what_cannot_be_compared_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Without an adapter there is nothing to set beside the model."""
    assert cli.main(["chat", "--compare"]) == 2
    assert "give --adapter DIR" in capsys.readouterr().err


LONGEST = ("--model.max_seq_length", "512")
PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C in it is a signal
from mlx_trainer.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A pseudo-terminal of 100 columns in which `mlx-trainer` runs, from the side of who sits before it."""

    def __init__(self, *arguments: str) -> None:
        self.end, theirs = pty.openpty()
        self.seen = ""
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        command = [sys.executable, "-c", PROGRAM, *arguments, "--model.dtype", "float32"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": "1"}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def press(self, keys: str) -> None:
        """Press these keys."""
        os.write(self.end, keys.encode())

    def press_until(self, keys: str, text: str) -> None:
        """Press these keys, and again after each second in which `text` has not come up.

        Python loses a Ctrl-C that comes when it has shown a key and does not wait for the next one yet.
        """
        for _ in range(60):
            self.press(keys)
            with suppress(AssertionError):
                self.read_to(text, seconds=1)
                return
        raise AssertionError(self.seen)

    def read_to(self, text: str, least: int = 0, seconds: float = 60) -> str:
        """Wait until `text` has come up behind at least `least` characters, and return all up to it."""
        deadline = time.monotonic() + seconds
        while (place := self.seen.find(text, least)) < 0:
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.seen
            self.seen += os.read(self.end, 65536).decode(errors="replace")
        before, self.seen = self.seen[:place], self.seen[place + len(text) :]
        return before


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_program(adapter: Path) -> None:
    """An answer that would take minutes is cut, the conversation goes on, and the end of the input is no error."""
    with Terminal(
        "chat", "--adapter", str(adapter), "--max-tokens", "50000", "--model.max_seq_length", "99999"
    ) as terminal:
        terminal.read_to("> ")
        terminal.press("Where is it?\n")
        terminal.read_to("Where is it?")
        terminal.read_to("", least=30)
        terminal.press("\x03/reset\n")
        terminal.read_to("A new conversation.")
        terminal.read_to("> ")
        terminal.press("half a line")
        terminal.read_to("half a line")
        terminal.press_until("\x03", "> ")
        terminal.press("\x04")
        assert terminal.process.wait(30) == 0


def test_in_a_terminal_two_answers_stand_side_by_side(adapter: Path) -> None:
    """Below both names, in one line, both answers begin, in one line; on the screen at the end they are whole."""
    with Terminal("chat", "--adapter", str(adapter), "--compare", "--max-tokens", "12", *LONGEST) as terminal:
        terminal.read_to("> ")
        terminal.press("Where is it?\n")
        screen = terminal.read_to("\x1b[?25h")  # rich shows the cursor again when it is done
        terminal.press("/exit\n")
        assert terminal.process.wait(30) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    names, answers = [re.split(" {3,}", line.strip()) for line in re.split("[\r\n]+", plain) if line.strip()][-2:]
    assert names == ["without", "with the adapter"]
    assert answers == [model.generate(["Where is it?"], max_tokens=12)[0] for model in models(adapter)]


def test_in_a_terminal_a_single_prompt_streams(adapter: Path) -> None:
    """`generate` with one prompt writes as it goes, and shows control characters of the model as escapes."""
    options = {"max_tokens": 40, "temperature": 1.0, "seed": 3}
    (text,) = models(adapter)[1].generate(["a"], **options)
    assert visible(text) != text
    asked = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with Terminal("generate", "--adapter", str(adapter), "--prompt", "a", *asked, *LONGEST) as terminal:
        told = terminal.read_to("\r\n", least=len(visible(text)))
        assert terminal.process.wait(30) == 0
    assert told.replace("\r\n", "\n").endswith(visible(text))
