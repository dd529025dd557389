# SPDX-License-Identifier: LGPL-2.1-or-later
"""The options of ``virsh-backup`` itself, in front of the command (virshParseArgv)."""

import dataclasses
import re
from collections.abc import Sequence

from virtbackup.tools import vsh


@dataclasses.dataclass(frozen=True)
class OwnOption:
    """An option in front of the command."""

    name: str
    """Long; empty: it has letters alone."""
    letter: str
    help: str
    value: str = ""
    """What help calls its value; empty: it has none, or may do without."""
    optional: str = ""
    """The same, of a value that may be left out."""

    @property
    def term(self) -> str:
        """How help shows it."""
        letter = f"-{self.letter}" if self.letter else ""
        long = f"--{self.name}" if self.name else ""
        long += f"={self.value}" if self.value else ""
        long += f"[={self.optional}]" if self.optional else ""
        return " | ".join(filter(None, (letter, long)))


OWN_OPTIONS = (
    OwnOption("connect", "c", "hypervisor connection URI", "URI"),
    OwnOption("debug", "d", "debug level [0-4], 0 tells most", "NUM"),
    OwnOption("escape", "e", "taken as virsh's, and of no effect: there is no console", "CHAR"),
    OwnOption("help", "h", "this help"),
    OwnOption("keepalive-interval", "k", "taken as virsh's, and of no effect", "NUM"),
    OwnOption("keepalive-count", "K", "taken as virsh's, and of no effect", "NUM"),
    OwnOption("log", "l", "log to the end of FILE", "FILE"),
    OwnOption("no-pkttyagent", "", "taken as virsh's, and of no effect"),
    OwnOption("quiet", "q", "quiet mode"),
    OwnOption("readonly", "r", "connect readonly"),
    OwnOption("timing", "t", "print timing information"),
    OwnOption("trace", "", "write all monitor traffic to FILE; - is standard error", "FILE"),
    OwnOption("", "v", "short version"),
    OwnOption("", "V", "long version"),
    OwnOption(
        "version", "", "version, TYPE is short or long (default short)", optional="TYPE"
    ),
)  # fmt: skip

LETTERS = {option.letter: option.name or "version" for option in OWN_OPTIONS if option.letter}
_NAMES = tuple(option.name for option in OWN_OPTIONS if option.name)
WITH_VALUE = tuple(option.name for option in OWN_OPTIONS if option.value)


@dataclasses.dataclass
class Options:
    """The program's own options, and the command behind them."""

    connect: str | None = None
    debug: int | None = None
    help: bool = False
    log: str | None = None
    quiet: bool = False
    readonly: bool = False
    timing: bool = False
    trace: str | None = None
    version: str | None = None
    """short or long."""
    rest: list[str] = dataclasses.field(default_factory=list)


def parse(argv: Sequence[str]) -> Options:
    """The options in front of the command, short ones together or long ones shortened."""
    options = Options()
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            _take_long(options, word, rest)
        else:
            _take_short(options, word, rest)
    options.rest = rest
    return options


def _take_long(options: Options, word: str, rest: list[str]) -> None:
    given, equals, value = word.removeprefix("--").partition("=")
    names = [given] if given in _NAMES else [name for name in _NAMES if name.startswith(given)]
    if len(names) != 1 or (equals and names[0] not in (*WITH_VALUE, "version")):
        raise vsh.UsageError(f"unsupported option '{word}'. See --help.")
    if names[0] in WITH_VALUE and not equals:
        value = _next_value(names[0], rest)
    _set_option(options, names[0], value)


def _take_short(options: Options, word: str, rest: list[str]) -> None:
    letters = word.removeprefix("-")
    while letters:
        letter, letters = letters[0], letters[1:]
        name = LETTERS.get(letter)
        if name is None:
            raise vsh.UsageError(f"unsupported option '-{letter}'. See --help.")
        value = "long" if letter == "V" else ""
        if name in WITH_VALUE:
            value, letters = letters or _next_value(name, rest), ""
        _set_option(options, name, value)


def _next_value(name: str, rest: list[str]) -> str:
    """The next word, which is a value unless it looks like an option: no file should come to be
    called so by an oversight."""
    is_option = bool(rest) and re.match("-.", rest[0]) is not None
    if rest and not is_option:
        return rest.pop(0)
    letter = next((f"'-{key}'/" for key, value in LETTERS.items() if value == name), "")
    hint = f"If that is meant as the value: {vsh.quote(f'--{name}={rest[0]}')}" if rest else None
    raise vsh.UsageError(f"option {letter}'--{name}' requires an argument", hint)


def _set_option(options: Options, name: str, value: str) -> None:
    match name:
        case "debug":
            if not re.fullmatch(r"[0-4]", value):
                raise vsh.UsageError("option -d takes a number from 0 to 4")
            options.debug = int(value)
        case "version":
            if value not in ("", "short", "long"):
                raise vsh.UsageError("option --version takes short or long")
            options.version = value or "short"
        case "keepalive-interval" | "keepalive-count":
            if not re.fullmatch(r"[0-9]{1,9}", value):
                raise vsh.UsageError(f"option --{name} takes a number")
        case "escape" | "no-pkttyagent":
            pass
        case "connect" | "log" | "trace":
            setattr(options, name, value)
        case _:
            setattr(options, name, True)
