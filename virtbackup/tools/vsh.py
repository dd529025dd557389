# SPDX-License-Identifier: LGPL-2.1-or-later
"""A shell whose commands are data (vsh.c): their table, the parser, help, and running them.

What a shell works on is its ``control``, of any type; the commands of a table know which. Nothing
here knows of hypervisors. Errors are told apart by whose fault they are: ``UsageError`` for what
was typed, ``Failure`` for what a command could not do.
"""

import codecs
import contextlib
import dataclasses
import enum
import errno
import math
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TextIO, TypeVar

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses."""

INTERRUPTION = "interrupted"
"""What is told of a command that a signal ended."""


class _Told(Exception):
    """The user is told the message, and HINT, a line of what to do next, where that is known."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Failure(_Told):
    """A command could not do its work; the program ends with STATUS."""

    def __init__(self, message: str, hint: str | None = None, status: int = FAILED) -> None:
        super().__init__(message, hint)
        self.status = status


class UsageError(_Told):
    """What was typed makes no sense."""


class Quit(Exception):
    """The user wants to leave the shell."""


class OutputClosed(Exception):
    """Nobody reads the output any more."""


# --- commands as data -----------------------------------------------------------------------------


class Kind(enum.Enum):
    """What an option takes; the value is the word that help uses for it."""

    BOOL = "bool"
    """``--name``, no value."""
    STRING = "string"
    """``--name value``."""
    INT = "number"
    """``--name value``, a decimal number, zero or more."""
    DATA = "data"
    """A value by position, in the order of the table; ``--name value`` too."""
    ARGV = "argv"
    """All further values."""


Completer = Callable[[Any, "Args", str], Iterable[str]]
"""(shell, what is typed so far, start of the value) -> values; a value that ends in one of
``/ = ,`` is not the whole word yet."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command."""

    name: str
    kind: Kind
    help: str
    required: bool = False
    multi: bool = False
    """May be given more than once."""
    choices: tuple[str, ...] = ()
    """The values that make sense; empty: any."""
    least: int = 0
    most: int = 10**18 - 1
    """Of an INT."""
    completer: Completer | None = None

    @property
    def word(self) -> str:
        """What help calls the value."""
        return "number" if self.kind is Kind.INT else "string"

    def check(self, value: str) -> None:
        """Raise UsageError when VALUE cannot be this option's."""
        if self.kind is Kind.ARGV:
            return
        if not value:
            raise UsageError(f"Failed to get option '{self.name}': Option argument is empty")
        if self.kind is Kind.INT and not (
            re.fullmatch(r"[0-9]{1,18}", value) and self.least <= int(value) <= self.most
        ):
            raise UsageError(
                f"Numeric value '{value}' for <{self.name}> option is malformed or out of range"
            )
        if self.choices and value not in self.choices:
            raise UsageError(
                f"invalid value '{value}' for --{self.name}: expected {' or '.join(self.choices)}"
            )


JSON = Option("json", Kind.BOOL, "print a JSON document")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command. The handler gets the shell and the arguments, prints what there is to say,
    and raises Failure, UsageError or an error that the shell's ``describe`` knows; it may give an
    exit status."""

    name: str
    group: str
    """The keyword of its Group."""
    help: str
    """A few words."""
    desc: str
    """Whole sentences; empty: nothing to add."""
    options: tuple[Option, ...]
    handler: Callable[[Any, "Args"], int | None]

    def option(self, name: str) -> Option | None:
        return next((option for option in self.options if option.name == name), None)


@dataclasses.dataclass(frozen=True)
class Group:
    """Commands that help shows together."""

    keyword: str
    title: str


@dataclasses.dataclass(frozen=True)
class Table:
    """All that a shell can do."""

    groups: tuple[Group, ...]
    commands: tuple[Command, ...]
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """A command of another shell -> the one that does its work here, perhaps with an option."""

    def find(self, name: str) -> Command | None:
        return next((command for command in self.commands if command.name == name), None)

    def command(self, name: str) -> Command:
        """The command called NAME. Errors: UsageError, with the likely one as a hint."""
        command = self.find(name)
        if command is None:
            raise UsageError(f"unknown command: '{name}'", self.suggestion(name))
        return command

    def suggestion(self, name: str, groups: Sequence[str] = ()) -> str:
        """A line that names the commands that may have been meant, or GROUPS of them, or else tells
        where they all are."""
        if own := self.others.get(name):
            return f"Here it is called: {own}"
        if not groups and any(name == group.keyword for group in self.groups):
            return f"'help {name}' shows the commands of that group"
        names = [command.name for command in self.commands]
        return suggestion(name, [*names, *groups]) or "'help' shows all commands"

    def members(self, group: Group) -> list[Command]:
        return [command for command in self.commands if command.group == group.keyword]


MAX_SUGGESTED = 3


def suggestion(word: str, names: Sequence[str], prefix: str = "") -> str | None:
    """A line with those of NAMES that WORD may have meant, behind their PREFIX: it is short for
    them, or mistyped. No abbreviation is taken for what it is short for now: a later version may
    have another such word."""
    import difflib  # only those who mistype wait for it

    short_for = [name for name in names if word and name.startswith(word)]
    close = difflib.get_close_matches(word, names, n=MAX_SUGGESTED)
    near = short_for if 0 < len(short_for) <= MAX_SUGGESTED else close
    return "Did you mean: " + ", ".join(prefix + name for name in near) + "?" if near else None


@dataclasses.dataclass(frozen=True)
class Args:
    """The options that were given to a command, values as typed; a bool's value is empty."""

    values: Mapping[str, tuple[str, ...]]

    def flag(self, name: str) -> bool:
        return name in self.values

    def text(self, name: str) -> str:
        """The value of a required option."""
        return self.values[name][0]

    def optional(self, name: str) -> str | None:
        return self.values[name][0] if name in self.values else None

    def number(self, name: str) -> int | None:
        return int(self.values[name][0]) if name in self.values else None

    def texts(self, name: str) -> tuple[str, ...]:
        return self.values.get(name, ())

    def exclusive(self, *names: str) -> None:
        """Raise UsageError when more than one of NAMES is given."""
        given = [name for name in names if name in self.values]
        if len(given) > 1:
            raise UsageError(f"Options --{given[0]} and --{given[1]} are mutually exclusive")


@dataclasses.dataclass(frozen=True)
class Call:
    """A command with its arguments, ready to run."""

    command: Command
    args: Args


# --- words ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a line, without its quotes; START and END are where it stood, quotes included."""

    value: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Line:
    """A line taken apart into commands of words."""

    commands: tuple[tuple[Word, ...], ...]
    """Never empty; a command without words is nothing to run."""
    pending: str | None
    """The quote or the backslash that the line ends within."""
    comment: bool
    """The line ends within a comment."""


_PIECE = re.compile(
    r"""\\(?P<escaped>.|\Z)
      | '(?P<single>[^']*)(?P<single_end>'|\Z)
      | "(?P<double>(?:\\(?:.|\Z)|[^"\\])*)(?P<double_end>"|\Z)
      | (?P<plain>[^ \t\r\n;'"\\]+)""",
    re.VERBOSE | re.DOTALL,
)
"""A part of a word; a quote that is not closed ends with the text."""

_BETWEEN = re.compile(r"(?P<space>(?:[ \t\r]|\\\n)+)|(?P<end>[;\n])|(?P<comment>#[^\n]*)")
"""What may stand before a word."""


def read(text: str) -> Line:
    """Take TEXT apart: ``'...'``, ``"..."``, backslashes, ``;``, newlines and ``#`` comments."""
    commands: list[tuple[Word, ...]] = []
    words: list[Word] = []
    pending = None
    comment = False
    position = 0
    while position < len(text):
        between = _BETWEEN.match(text, position)
        comment = between is not None and between["comment"] is not None
        if between is None:
            word, pending = _read_word(text, position)
            words.append(word)
            position = word.end
            continue
        if between["end"] is not None:
            commands.append(tuple(words))
            words = []
        position = between.end()
    return Line((*commands, tuple(words)), pending, comment)


def _read_word(text: str, start: int) -> tuple[Word, str | None]:
    """The word at START, and the quote or backslash that it and the text end within."""
    value = ""
    pending = None
    position = start
    while piece := _PIECE.match(text, position):
        value_of_piece, pending = _unquote(piece)
        value += value_of_piece
        position = piece.end()
    return Word(value, start, position), pending


def _unquote(piece: re.Match[str]) -> tuple[str, str | None]:
    if piece["plain"] is not None:
        return piece["plain"], None
    if piece["escaped"] is not None:
        return piece["escaped"].removeprefix("\n"), None if piece["escaped"] else "\\"
    if piece["single"] is not None:
        return piece["single"], None if piece["single_end"] else "'"
    value = re.sub(r"\\(?:\n|(.)|\Z)", r"\1", piece["double"], flags=re.DOTALL)
    return value, None if piece["double_end"] else '"'


def split(text: str) -> list[list[str]]:
    """The commands of TEXT as lists of words, empty ones left out. Errors: UsageError."""
    line = read(text)
    if line.pending is not None:
        what = "dangling" if line.pending == "\\" else "missing"
        raise UsageError(f"{what} {line.pending}")
    return [[word.value for word in words] for words in line.commands if words]


def quote(word: str) -> str:
    """WORD as it must be typed, here and in sh, to be read as one word."""
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


# --- arguments ------------------------------------------------------------------------------------


def is_option(word: str) -> bool:
    """Whether WORD names an option, and is no rule of dashes."""
    return re.match("--[A-Za-z0-9]", word) is not None


class ArgumentParser:
    """The arguments of one command, taken word by word; ``finish`` when there are no more."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._values: dict[str, list[str]] = {}
        self.pending: Option | None = None
        """The option whose value the next word is."""
        self.data_only = False
        """``--`` was there: no options any more."""
        self.wants_help = False

    def feed(self, word: str) -> None:
        """Take the next word. Errors: UsageError."""
        if self.pending is not None:
            option, self.pending = self.pending, None
            self._give(option, word)
        elif self.data_only or not (word == "--" or is_option(word)):
            self._feed_data(word)
        elif word == "--":
            self.data_only = True
        elif word == "--help":
            self.wants_help = True
        else:
            self._feed_option(word)

    def finish(self) -> Args:
        """All arguments. Errors: UsageError when something is missing."""
        if self.pending is not None:
            raise UsageError(f"expected syntax: --{self.pending.name} <{self.pending.word}>")
        for option in self._command.options:
            if option.required and option.name not in self._values:
                shown = f"<{option.name}>" if option.kind is Kind.DATA else f"--{option.name}"
                raise UsageError(f"command '{self._command.name}' requires {shown} option")
        return self.so_far()

    def so_far(self) -> Args:
        return Args({name: tuple(values) for name, values in self._values.items()})

    def next_data(self) -> Option | None:
        """The option that a value by position would be for."""
        for option in self._command.options:
            if option.kind is Kind.ARGV:
                return option
            if option.kind is Kind.DATA and option.name not in self._values:
                return option
        return None

    def open_options(self) -> list[Option]:
        """The options that may still be given by name."""
        return [
            option
            for option in self._command.options
            if option.kind is not Kind.ARGV and (option.multi or option.name not in self._values)
        ]

    def _feed_data(self, word: str) -> None:
        option = self.next_data()
        if option is None:
            own = re.match(r"-\w", word)
            hint = "The shell's own options stand in front of the command" if own else None
            raise UsageError(f"unexpected data '{word}'", hint)
        self._give(option, word)

    def _feed_option(self, word: str) -> None:
        name, equals, value = word.removeprefix("--").partition("=")
        option = self._command.option(name)
        if option is None or option.kind is Kind.ARGV:
            names = [one.name for one in self._command.options if one.kind is not Kind.ARGV]
            raise UsageError(
                f"command '{self._command.name}' doesn't support option --{name}",
                suggestion(name, names, "--"),
            )
        if option.name in self._values and not option.multi:
            raise UsageError(f"option --{name} already seen")
        if option.kind is Kind.BOOL:
            if equals:
                raise UsageError(f"invalid '=' after option --{name}")
            self._values[name] = [""]
        elif equals:
            self._give(option, value)
        else:
            self.pending = option

    def _give(self, option: Option, value: str) -> None:
        option.check(value)
        self._values.setdefault(option.name, []).append(value)


def parse(table: Table, words: Sequence[str]) -> Call:
    """The command that WORDS, at least one, mean. Errors: UsageError."""
    if any("\0" in word for word in words):
        raise UsageError("a NUL character cannot be part of a command")
    command = table.command(words[0])
    parser = ArgumentParser(command)
    with _pointing_at_help(command):
        for word in words[1:]:
            parser.feed(word)
            if parser.wants_help:
                return Call(HELP, Args({"command": (command.name,)}))
        return Call(command, parser.finish())


@contextlib.contextmanager
def _pointing_at_help(command: Command) -> Iterator[None]:
    """A misuse of COMMAND that has no hint gets one."""
    try:
        yield
    except UsageError as error:
        error.hint = error.hint or f"'help {command.name}' shows what it takes"
        raise


# --- help -----------------------------------------------------------------------------------------


def group_help(table: Table, group: Group) -> str:
    """The commands of a group, a line each."""
    lines = [f" {group.title} (help keyword '{group.keyword}'):"]
    lines += [f"    {command.name:<22} {command.help}" for command in table.members(group)]
    return "\n".join(lines) + "\n"


def command_help(command: Command) -> str:
    """All that is to know of a command."""
    parts = [
        f"  NAME\n    {command.name} - {command.help}\n",
        f"  SYNOPSIS\n    {synopsis(command)}\n",
    ]
    if command.desc:
        parts.append("  DESCRIPTION\n" + "".join(f"    {x}\n" for x in command.desc.split("\n")))
    if command.options:
        lines = [f"    {_option_term(option):<22}  {option.help}\n" for option in command.options]
        parts.append("  OPTIONS\n" + "".join(lines))
    return "\n".join(parts)


def synopsis(command: Command) -> str:
    """The command and its options in one line."""
    return " ".join([command.name, *(_option_use(option) for option in command.options)])


def _option_use(option: Option) -> str:
    match option.kind:
        case Kind.ARGV:
            return f"[<{option.name}>]..."
        case Kind.DATA:
            use = f"<{option.name}>"
        case Kind.BOOL:
            use = f"--{option.name}"
        case _:
            use = f"--{option.name} <{option.word}>"
    use = use if option.required else f"[{use}]"
    return use + "..." if option.multi else use


def _option_term(option: Option) -> str:
    match option.kind:
        case Kind.ARGV:
            return f"<{option.word}>"
        case Kind.DATA:
            return f"[--{option.name}] <{option.word}>"
        case Kind.BOOL:
            return f"--{option.name}"
        case _:
            return f"--{option.name} <{option.word}>"


# --- the shell ------------------------------------------------------------------------------------

Control = TypeVar("Control")


def _unexpected(error: Exception) -> str:
    """What is told of an ERROR that nobody has foreseen. That the system has no more to give can be
    anywhere, and is no bug."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return os.strerror(error.errno)
    return f"internal error: {type(error).__name__}: {error}"


class Shell(Generic[Control]):
    """Runs commands and talks to the user."""

    def __init__(
        self,
        table: Table,
        control: Control,
        describe: Callable[[Exception], Failure | None],
    ) -> None:
        """DESCRIBE gives what an error that is nobody's bug is told as, None for any other."""
        self.table = table
        self.control = control
        self.quiet = False
        """Print no more than was asked for."""
        self.timing = False
        """Print the time that every command took."""
        self.debug = False
        """Show the traceback of every error."""
        self.interactive = False
        self._describe = describe

    def parse_line(self, text: str) -> list[Call]:
        """The commands of a line; none of them runs when one makes no sense. Errors: UsageError."""
        return [parse(self.table, words) for words in split(text)]

    def run_all(self, calls: Iterable[Call]) -> int:
        """Run every command, also after one has failed; the worst exit status."""
        worst = DONE
        for call in calls:
            try:
                worst = max(worst, self.run(call))
            except Quit:
                if self.interactive:
                    raise
                break
        return worst

    def run(self, call: Call) -> int:
        """Run one command and tell how it failed; its exit status."""
        start = time.monotonic()
        status = self.guard(lambda: self._handle(call))
        if self.timing:
            told = f"\n(Time: {(time.monotonic() - start) * 1000:.3f} ms)\n"
            if call.args.flag("json"):  # what is printed is JSON and nothing else
                flush()
                _write_error(told + "\n")
            else:
                self.print(told)
        elif self.interactive:
            self.extra("")
        return status

    def _handle(self, call: Call) -> int | None:
        with _pointing_at_help(call.command):
            return call.command.handler(self, call.args)

    def guard(self, action: Callable[[], int | None]) -> int:
        """Do ACTION; the exit status it returns or its error asks for, the reason already told."""
        try:
            return action() or DONE
        except UsageError as error:
            self._tell(error)
            return USAGE
        except Failure as error:
            self._trace()
            self._tell(error)
            return error.status
        except (Quit, OutputClosed):
            raise
        except Exception as error:  # noqa: BLE001  # the border: users see no tracebacks
            self._trace()
            self._tell(self._describe(error) or Failure(_unexpected(error)))
            return FAILED

    def _tell(self, error: _Told) -> None:
        self.error(str(error))
        if error.hint and not self.quiet:
            _write_error(one_line(error.hint) + "\n")

    def _trace(self) -> None:
        if self.debug:
            traceback.print_exc()

    def print(self, text: str) -> None:
        """Print TEXT, a newline added. Errors: OutputClosed; Failure when it cannot be written."""
        _write(sys.stdout, text + "\n")

    def print_value(self, text: str) -> None:
        """Print TEXT of any origin: for a program as it is, on a terminal without what controls
        that."""
        self.print(visible(text) if sys.stdout.isatty() else text)

    def print_document(self, text: str) -> None:
        """Print TEXT that ends in its own newline."""
        _write(sys.stdout, text if text.endswith("\n") else text + "\n")

    def print_json(self, value: object) -> None:
        """Print VALUE as a JSON document."""
        self.print(_json(value, indent=2))

    def print_event(self, event: str, **facts: object) -> None:
        """Print a line of JSON about something that happened, and have it out at once."""
        self.print(_json({"event": event, **facts}))
        flush()

    def extra(self, text: str) -> None:
        """Print what a quiet shell leaves out."""
        if not self.quiet:
            self.print(text)

    def error(self, message: str) -> None:
        """Tell an error in one line; what is already printed comes first."""
        with contextlib.suppress(Failure):
            flush()
        _write_error(f"{_marked('error:', _RED)} {one_line(message)}\n")

    def warn(self, message: str) -> None:
        """Tell what may go wrong in one line; what is already printed comes first."""
        warn(message)

    def warn_of_each(self, messages: Iterable[str]) -> None:
        for message in messages:
            self.warn(message)

    def print_table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print aligned columns; a quiet shell leaves the header out, and the room for it."""
        cells = [[visible(cell) for cell in row] for row in rows]
        for line in table_lines(None if self.quiet else header, cells):
            self.print(line)


def _json(value: object, indent: int | None = None) -> str:
    """VALUE as JSON, all of it ASCII. Numbers that are none or infinite, as another program may
    have sent, are null: JSON has no word for them."""
    import json

    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_infinite(value), indent=indent)


def _without_infinite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_infinite(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_infinite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


_RED, _YELLOW = "1;31", "1;33"


def shows_colours(stream: TextIO) -> bool:
    """Whether people look at STREAM, a terminal that has colours, and want any (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or is_dumb()
    return not plain and stream.isatty()


def is_dumb() -> bool:
    """Whether the terminal, if there is one, has neither colours nor another line than the last."""
    return os.environ.get("TERM", "dumb") == "dumb"


def _marked(word: str, colour: str) -> str:
    return f"\x1b[{colour}m{word}\x1b[0m" if shows_colours(sys.stderr) else word


def flush() -> None:
    """Write out what standard output still holds. Errors: OutputClosed, Failure."""
    _write_error("")
    _write(sys.stdout, "", flush=True)


def has_room() -> bool:
    """Whether a line on standard output would not have to wait for who reads it."""
    import select

    poll = select.poll()
    try:
        poll.register(sys.stdout, select.POLLOUT)
    except ValueError:  # it is no file
        return True
    return bool(poll.poll(0))


def _write(stream: TextIO, text: str, flush: bool = False) -> None:
    try:
        stream.write(text)
        if flush or stream is sys.stderr:
            stream.flush()
    except OSError as error:
        give_up(stream)
        if isinstance(error, BrokenPipeError):
            raise OutputClosed from error
        raise Failure(f"cannot write output: {error.strerror}") from error


def warn(message: str) -> None:
    """As ``Shell.warn``."""
    with contextlib.suppress(Failure):
        flush()
    _write_error(f"{_marked('warning:', _YELLOW)} {one_line(message)}\n")


def _write_error(text: str) -> None:
    """Write to standard error; where nobody can read it, nobody is told."""
    with contextlib.suppress(Failure), _clearing() if text else contextlib.nullcontext():
        _write(sys.stderr, text)


_clearing: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@contextlib.contextmanager
def standing(
    clearing: Callable[[], contextlib.AbstractContextManager[object]],
) -> Iterator[None]:
    """For the time that something stands on standard error, such as a progress bar, which CLEARING
    takes away for as long as a line is written."""
    global _clearing
    before, _clearing = _clearing, clearing
    try:
        yield
    finally:
        _clearing = before


MAX_ERROR = 4000
"""Characters of an error that are shown."""


def one_line(text: str) -> str:
    """TEXT of any origin in one line that leaves the terminal alone."""
    lines = (part.strip() for part in text.splitlines())
    line = visible("; ".join(part for part in lines if part))
    return line if len(line) <= MAX_ERROR else line[:MAX_ERROR] + "..."


def visible(text: str) -> str:
    """TEXT with control characters written as escapes."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def escape_unwritable(error: UnicodeError) -> tuple[str | bytes, int]:
    """An encoding's error handler: bytes that were no text come out as they came in, characters
    that the encoding lacks as escapes. Under its name, ``ENCODING_ERRORS``, nothing fails."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    for handler in ("surrogateescape", "backslashreplace"):
        with contextlib.suppress(UnicodeEncodeError):
            one = UnicodeEncodeError(
                error.encoding, error.object, error.start, error.start + 1, error.reason
            )
            return codecs.lookup_error(handler)(one)
    raise error


ENCODING_ERRORS = "virtbackup.escape"
codecs.register_error(ENCODING_ERRORS, escape_unwritable)


def give_up(stream: TextIO) -> None:
    """Send what STREAM still holds nowhere, or the interpreter would trip over it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def table_lines(header: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> list[str]:
    """HEADER, if any, a rule, and ROWS, each a line with its columns aligned (vsh-table.c)."""
    cells = [*([] if header is None else [header]), *rows]
    widths = [max(width_of(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            " " + cell + " " * (width - width_of(cell) + 2)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("".join(padded).rstrip(" "))
    if header is not None:
        lines.insert(1, "-" * sum(width + 3 for width in widths))
    return lines


def width_of(text: str) -> int:
    """Columns that TEXT takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata  # a table of its own, loaded when there is need of it

    shown = (
        char
        for char in text
        if char == "\xad"
        or (unicodedata.category(char) not in _WIDTHLESS and not "\u1160" <= char <= "\u11ff")
    )
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in shown)


_WIDTHLESS = ("Mn", "Me", "Cf")
"""Categories of characters that take no column (wcwidth(3)): accents and vowels over or below
others, joiners, marks of direction. But the soft hyphen does, and what follows in a Korean syllable
that is written in its parts (U+1160 to U+11FF) does not."""


# --- the commands of every shell ------------------------------------------------------------------


def _help(shell: Shell[Any], args: Args) -> None:
    facts, text = _found(shell.table, args.optional("command"))
    if args.flag("json"):
        shell.print_json(facts)
    else:
        shell.print_document(text)


def _found(table: Table, name: str | None) -> tuple[dict[str, object], str]:
    """What help has to say of a command or a group called NAME, or of all, and how it says that.
    Errors: UsageError."""
    if name is None:
        groups = [_group_facts(table, group) for group in table.groups]
        texts = "\n".join(group_help(table, group) for group in table.groups)
        return {"groups": groups}, "Grouped commands:\n\n" + texts
    command = table.find(name)
    if command is not None:
        return _command_facts(command), command_help(command)
    for group in table.groups:
        if name in (group.keyword, group.title):
            return _group_facts(table, group), group_help(table, group)
    raise UsageError(
        f"command or command group '{name}' doesn't exist",
        table.suggestion(name, [group.keyword for group in table.groups]),
    )


def _group_facts(table: Table, group: Group) -> dict[str, object]:
    commands = [_command_facts(command) for command in table.members(group)]
    return {"keyword": group.keyword, "title": group.title, "commands": commands}


def _command_facts(command: Command) -> dict[str, object]:
    return {
        "name": command.name,
        "group": command.group,
        "help": command.help,
        "description": command.desc,
        "options": [
            {
                "name": option.name,
                "kind": option.kind.value,
                "help": option.help,
                "required": option.required,
                "multi": option.multi,
                "choices": option.choices,
            }
            for option in command.options
        ],
    }


def _cd(shell: Shell[Any], args: Args) -> None:
    directory = args.optional("dir") or os.environ.get("HOME") or "/"
    try:
        os.chdir(directory)
    except OSError as error:
        raise Failure(f"cd: {directory}: {error.strerror}") from error


def _pwd(shell: Shell[Any], args: Args) -> None:
    try:
        shell.print(str(pathlib.Path.cwd()))
    except OSError as error:
        raise Failure(f"pwd: cannot get current directory: {error.strerror}") from error


def _echo(shell: Shell[Any], args: Args) -> None:
    values: Iterable[str] = args.texts("string")
    args.exclusive("shell", "split")
    args.exclusive("xml", "split")
    if args.flag("split"):
        values = ["\n".join(part for value in values for part in split_list(value))]
    if args.flag("xml"):
        values = [_escape_xml(value) for value in values]
    if args.flag("shell"):
        values = [quote(value) for value in values]
    if args.flag("err"):
        shell.error(" ".join(values))
    else:
        shell.print(" ".join(values))


def split_list(text: str) -> list[str]:
    """The parts of TEXT between its commas; a comma within a part is written twice."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def _escape_xml(value: str) -> str:
    marks = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;"}
    return "".join(marks.get(char, char) for char in value)


def _quit(shell: Shell[Any], args: Args) -> None:
    raise Quit


def complete_commands(shell: Shell[Any], args: Args, text: str) -> Iterable[str]:
    """The names that ``help`` takes."""
    names = [command.name for command in shell.table.commands]
    return names + [group.keyword for group in shell.table.groups]


def complete_files(shell: Shell[Any], args: Args, text: str) -> Iterable[str]:
    """The files whose paths start with TEXT; a directory ends in ``/``."""
    parent, slash, name = text.rpartition("/")
    start = parent + slash
    try:
        with os.scandir(start or ".") as entries:
            return [
                start + entry.name + ("/" if entry.is_dir() else "")
                for entry in entries
                if entry.name.startswith(name) and (name or not entry.name.startswith("."))
            ]
    except OSError:
        return []


GROUP = "virsh"
"""The keyword of the group that these commands are in."""

HELP = Command(
    "help", GROUP, "print help",
    "Prints global help, the commands of a group, or the details of a command.",
    (
        Option("command", Kind.DATA, "command or group of commands", completer=complete_commands),
        JSON,
    ),
    _help,
)  # fmt: skip

COMMANDS = (
    Command(
        "cd", GROUP, "change the current directory", "Change the current directory.",
        (
            Option(
                "dir", Kind.DATA, "directory to switch to (default: home or else root)",
                completer=complete_files,
            ),
        ),
        _cd,
    ),
    Command(
        "echo", GROUP, "echo arguments",
        "Echo back arguments, possibly with quoting.",
        (
            Option("shell", Kind.BOOL, "escape for shell use"),
            Option("xml", Kind.BOOL, "escape for XML use"),
            Option("split", Kind.BOOL, "split at each ',', a line a part; ',,' is a comma"),
            Option("err", Kind.BOOL, "output to stderr"),
            Option("string", Kind.ARGV, "arguments to echo"),
        ),
        _echo,
    ),
    Command("exit", GROUP, "quit this interactive terminal", "", (), _quit),
    HELP,
    Command("pwd", GROUP, "print the current directory", "Print the current directory.", (), _pwd),
    Command("quit", GROUP, "quit this interactive terminal", "", (), _quit),
)  # fmt: skip
