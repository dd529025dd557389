# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion in the user's own shell: ``virsh-backup --complete LINE``, for its scripts alone.

LINE is what was typed up to the cursor, the program's name included. The first line of the answer
is ``files``, where the shell knows best how to complete, or ``values``; then comes a whole word on
each line, not quoted, perhaps with a tab and what it means. There is no answer where anything goes
wrong: nobody who presses TAB wants to hear of it, nor to wait.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence

from virtbackup.tools import virsh_connection, virsh_options, vsh, vsh_readline

TIMEOUT = 2.0
"""Seconds that the hypervisor has."""


def main(shell: virsh_connection.Shell, arguments: Sequence[str]) -> int:
    """Answer; the exit status is always the same."""
    timer = threading.Timer(TIMEOUT, os._exit, (vsh.DONE,))
    timer.daemon = True
    timer.start()
    virsh_connection.set_logging(None)
    with contextlib.suppress(Exception):
        shell.print_document("".join(f"{line}\n" for line in answer(shell, arguments[0])))
        vsh.flush()
    with contextlib.suppress(Exception):
        shell.control.close()
    timer.cancel()
    return vsh.DONE


def answer(shell: virsh_connection.Shell, line: str) -> Iterator[str]:
    """The lines. Errors: any, of which there is nothing to tell."""
    words = list(vsh.read(line).commands[-1])
    last = words.pop() if words and words[-1].end == len(line) else vsh.Word("", 0, 0)
    before = [word.value for word in words[1:]]
    if not words:
        return
    if _wants_file(shell.table, before, last.value):
        yield "files"
        return
    yield "values"
    for value, meaning in sorted(_values(shell, before, last.value)):
        if value.startswith(last.value) and not {"\n", "\t"} & set(value):
            yield f"{value}\t{meaning}" if meaning else value


def _wants_file(table: vsh.Table, words: list[str], text: str) -> bool:
    """Whether it is the path of a file that is being typed."""
    own, _, _ = _own_option(words, text)
    if own is not None:
        return own in ("log", "trace")
    option = vsh_readline.option_at(table, virsh_options.parse(words).rest, text)
    return option is not None and option.completer is vsh.complete_files


def _values(
    shell: virsh_connection.Shell, words: list[str], text: str
) -> Iterable[tuple[str, str]]:
    """The words, with what they mean."""
    option, prefix, start = _own_option(words, text)
    if option is not None:
        return [(prefix + value, "") for value in _own_values(shell, option, start)]
    options = virsh_options.parse(words)
    if not options.rest and text.startswith("-"):
        return _own_options()
    shell.control.uri = options.connect or shell.control.uri
    shell.control.readonly = options.readonly
    meanings = _meanings(shell.table, options.rest)
    values = vsh_readline.values_of(shell, options.rest, text)
    return [(value, meanings.get(value, "")) for value in values]


def _meanings(table: vsh.Table, words: list[str]) -> dict[str, str]:
    """What commands mean, or the options of the command in WORDS."""
    if not words:
        return {command.name: command.help for command in table.commands}
    command = table.find(words[0])
    return {f"--{option.name}": option.help for option in command.options} if command else {}


# --- the program's own options --------------------------------------------------------------------


def _own_options() -> list[tuple[str, str]]:
    found = []
    for option in virsh_options.OWN_OPTIONS:
        if option.letter:
            found.append((f"-{option.letter}", option.help))
        if option.name:
            found.append((f"--{option.name}" + ("=" if option.value else ""), option.help))
    return found


def _own_option(words: list[str], text: str) -> tuple[str | None, str, str]:
    """The option whose value is being typed, what stands before the value, and its start."""
    name, equals, value = text.partition("=")
    if equals and name.startswith("--") and not virsh_options.parse(words).rest:
        return name.removeprefix("--"), f"{name}=", value
    if not words or not words[-1].startswith("-") or virsh_options.parse(words[:-1]).rest:
        return None, "", ""
    name = words[-1].lstrip("-")
    name = name if words[-1].startswith("--") else virsh_options.LETTERS.get(name[-1:], "")
    return (name if name in virsh_options.WITH_VALUE else None), "", text


def _own_values(shell: virsh_connection.Shell, option: str, text: str) -> Iterable[str]:
    match option:
        case "connect":
            return virsh_connection.complete_uris(shell, vsh.Args({}), text)
        case "debug":
            return "01234"
        case "version":
            return ("short", "long")
    return ()
