# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interactive side of the shell (vsh.c, vsh-history): the loop, history, completion by TAB.

``completions`` is pure but for the completers it asks; readline comes in with ``line_editing``.
"""

import contextlib
import logging
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from virtbackup import runtime
from virtbackup.tools import vsh

logger = logging.getLogger(__name__)

HISTORY_LENGTH = 500
"""Lines that are kept from one session to the next."""

DELIMITERS = " \t\n;"
"""Where readline starts a word; quotes are looked at here, it knows nothing of them."""


UNFINISHED = ("/", "=", ",")
"""A completion that ends so is not the whole word yet."""


# --- the loop -------------------------------------------------------------------------------------


def loop(shell: vsh.Shell[Any], prompt: Callable[[], str], history: pathlib.Path) -> None:
    """Read lines and run them until the user quits or the input ends."""
    shell.interactive = True
    with line_editing(shell, history) if sys.stdin.isatty() else contextlib.nullcontext():
        while True:
            try:
                line = _read_line(shell, prompt())
                if line is None:
                    return
                _run_line(shell, line)
            except KeyboardInterrupt:
                shell.print("")
            except vsh.Quit:
                return


def _run_line(shell: vsh.Shell[Any], line: str) -> None:
    try:
        shell.guard(lambda: shell.run_all(shell.parse_line(line)))
    except KeyboardInterrupt:
        shell.print("")  # behind the ^C
        shell.error(vsh.INTERRUPTION)


def _read_line(shell: vsh.Shell[Any], prompt: str) -> str | None:
    """The next line, None when there are no more."""
    vsh.flush()
    try:
        return _input(prompt)
    except EOFError:
        shell.print("")
        return None
    except UnicodeDecodeError:
        shell.error("the line is not valid text")
        return ""
    except OSError as error:
        raise vsh.OutputClosed from error


class _Stopped(BaseException):
    """A SIGTSTP came, as by Ctrl-Z, while a line was typed."""


def _input(prompt: str) -> str:
    """As ``input``. Where it is stopped (SIGTSTP) the terminal is as it was before, and once it
    goes on the line is there again: Python's readline leaves both to who uses it."""
    readline: Any = sys.modules.get("readline")
    if readline is None or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL:
        return input(prompt)
    typed = ""

    def stop(_number: int, _frame: object) -> None:
        nonlocal typed
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # a second one comes to no handler
        typed = readline.get_line_buffer()
        raise _Stopped

    try:
        while True:
            readline.set_startup_hook(lambda: readline.insert_text(typed))
            try:
                signal.signal(signal.SIGTSTP, stop)
                line = input(prompt)
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
                return line
            except _Stopped:
                os.kill(os.getpid(), signal.SIGTSTP)
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        readline.set_startup_hook(None)


# --- readline -------------------------------------------------------------------------------------


@contextlib.contextmanager
def line_editing(shell: vsh.Shell[Any], history: pathlib.Path) -> Iterator[None]:
    """Edit lines by readline, with completion and the HISTORY file; go without what fails."""
    try:
        import readline  # slow to load, and of no use to a shell that nobody types into
    except ImportError:
        yield
        return
    from virtbackup.tools import interrupt

    _load_history(readline, history)
    libedit = "libedit" in (readline.__doc__ or "")
    if not libedit and os.environ.get("TERM", "dumb") != "dumb":
        # Lines that are pasted wait for Enter, as in virsh: Python has readline not do so.
        readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_completer_delims(DELIMITERS)
    readline.set_completer(_ReadlineCompleter(shell, readline))
    try:
        with interrupt.at_once():  # or a terminal that is closed would take the history with it
            yield
    finally:
        readline.set_completer(None)
        _save_history(readline, history)


def history_path(name: str) -> pathlib.Path:
    """Where the shell called NAME keeps its history."""
    base = runtime.users_directory("XDG_CACHE_HOME") or runtime.home() / ".cache"
    return base / name / "history"


def _load_history(readline: Any, path: pathlib.Path) -> None:
    try:
        readline.read_history_file(path)
    except OSError as error:
        logger.info("history=unread path=%s reason=%s", path, error)


def _save_history(readline: Any, path: pathlib.Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        readline.set_history_length(HISTORY_LENGTH)
        readline.write_history_file(path)
    except OSError as error:
        logger.info("history=unwritten path=%s reason=%s", path, error)


class _ReadlineCompleter:
    """Answers readline, which asks for one candidate after the other."""

    def __init__(self, shell: vsh.Shell[Any], readline: Any) -> None:
        self._shell = shell
        self._readline = readline
        self._candidates: list[str] = []

    def __call__(self, text: str, state: int) -> str | None:
        if state == 0:
            self._candidates = self._find()
        return self._candidates[state] if state < len(self._candidates) else None

    def _find(self) -> list[str]:
        line = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        try:
            start, words = completions(self._shell, line)
        except Exception as error:  # noqa: BLE001  # a TAB must not end the shell, nor print
            logger.info("completion=failed reason=%s", error)
            return []
        # readline's word may start within ours: it splits at quoted spaces.
        seen = self._readline.get_begidx() - start
        return [word[seen:] for word in words]


# --- completion -----------------------------------------------------------------------------------


def completions(shell: vsh.Shell[Any], text: str) -> tuple[int, list[str]]:
    """What the last word of TEXT may become: where it starts, and whole words, quoted as needed.

    The only candidate carries a space behind it when the word is complete.
    """
    line = vsh.read(text)
    if line.comment:
        return len(text), []
    words = list(line.commands[-1])
    if words and words[-1].end == len(text):
        last = words.pop()
    else:
        last = vsh.Word("", len(text), len(text))
    values = values_of(shell, [word.value for word in words], last.value)
    raw = text[last.start :]
    quoted = {_quote(value, raw) for value in values if value.startswith(last.value)}
    found = sorted(word for word in quoted if word.startswith(raw))
    if len(found) == 1 and not found[0].endswith(UNFINISHED):
        found = [found[0] + " "]
    return last.start, found


def values_of(shell: vsh.Shell[Any], words: list[str], text: str) -> Iterable[str]:
    """The values that the word after WORDS may have, TEXT being its start."""
    if not words:
        return [command.name for command in shell.table.commands]
    parser = _parsed(shell.table, words)
    return [] if parser is None else _arguments(shell, parser, text)


def option_at(table: vsh.Table, words: list[str], text: str) -> vsh.Option | None:
    """The option whose value TEXT, behind WORDS, is the start of."""
    parser = _parsed(table, words) if words else None
    if parser is None:
        return None
    if parser.pending is not None:
        return parser.pending
    if not text.startswith("--") or parser.data_only:
        return parser.next_data()
    name, equals, _ = text.removeprefix("--").partition("=")
    named = [option for option in parser.open_options() if equals and option.name == name]
    return named[0] if named else None


def _parsed(table: vsh.Table, words: list[str]) -> vsh.ArgumentParser | None:
    """The command in WORDS with its arguments so far; None where they make no sense."""
    command = table.find(words[0])
    if command is None:
        return None
    parser = vsh.ArgumentParser(command)
    try:
        for word in words[1:]:
            parser.feed(word)
    except vsh.UsageError:
        return None
    return parser


def _arguments(shell: vsh.Shell[Any], parser: vsh.ArgumentParser, text: str) -> Iterable[str]:
    if parser.pending is not None:
        return _option_values(shell, parser, parser.pending, text)
    if text.startswith("--") and "=" in text and not parser.data_only:
        name, _, value = text.removeprefix("--").partition("=")
        for option in parser.open_options():
            if option.name == name and option.kind is not vsh.Kind.BOOL:
                values = _option_values(shell, parser, option, value)
                return [f"--{name}={value}" for value in values]
        return []
    data = parser.next_data()
    if data is not None and (parser.data_only or not text.startswith("--")):
        values = list(_option_values(shell, parser, data, text))
    else:
        values = []
    if parser.data_only or (values and not text.startswith("-")):
        return values
    return values + [f"--{option.name}" for option in parser.open_options()]


def _option_values(
    shell: vsh.Shell[Any], parser: vsh.ArgumentParser, option: vsh.Option, text: str
) -> Iterable[str]:
    if option.choices:
        return option.choices
    if option.completer is None:
        return []
    return option.completer(shell, parser.so_far(), text)


_NAME = re.compile(r"--[\w-]+=(?=['\"])")
"""Of an option, whose value begins with a quote."""


def _quote(value: str, raw: str) -> str:
    """VALUE as it would be typed by somebody who has typed RAW so far."""
    name = _NAME.match(raw)
    if name is not None and value.startswith(name[0]):
        behind = len(name[0])
        return name[0] + _quote(value[behind:], raw[behind:])
    end = "" if value.endswith(UNFINISHED) else raw[:1]
    if raw.startswith("'"):
        return "'" + value.replace("'", "'\\''") + end
    if raw.startswith('"'):
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + end
    escaped = re.sub(r"([\s;'\"\\])", r"\\\1", value)
    return "\\" + escaped if escaped.startswith("#") else escaped
