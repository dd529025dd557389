# SPDX-License-Identifier: LGPL-2.1-or-later
"""The generic shell: words, arguments, help and completion, case by case from vshdata.

A case is a file ``NAME.in`` and what is to come of it, ``NAME.out``: of a text its commands as
JSON lists, one a line (words); of a command line its arguments (parse); of a command its help;
of a line up to the cursor what TAB offers, a ``|`` where the word starts (complete). With
VIRTBACKUP_REGENERATE=1 a missing or wrong ``.out`` is written, and the test fails all the same.
"""

import errno
import itertools
import json
import os
import pathlib
import unicodedata
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from virtbackup.tools import vsh, vsh_readline

DATA = pathlib.Path(__file__).parent / "vshdata"


def _complete_names(shell: vsh.Shell[None], args: vsh.Args, text: str) -> list[str]:
    return ["alpha", "alp one", "beta", "it's", 'quo"te', "#hash", *args.texts("name")]


def _complete_paths(shell: vsh.Shell[None], args: vsh.Args, text: str) -> list[str]:
    return ["dir/", "dir/my file"] if text.startswith("dir/") else ["dir/"]


def _nothing(shell: vsh.Shell[None], args: vsh.Args) -> None:
    pass


TABLE = vsh.Table(
    groups=(vsh.Group("test", "Testing"), vsh.Group(vsh.GROUP, "Shell itself")),
    commands=(
        vsh.Command(
            "all-kinds", "test", "take everything", "Take everything.\nIn two lines.",
            (
                vsh.Option("name", vsh.Kind.DATA, "a name", True, completer=_complete_names),
                vsh.Option("path", vsh.Kind.DATA, "a path", completer=_complete_paths),
                vsh.Option("text", vsh.Kind.STRING, "a text", completer=_complete_names),
                vsh.Option("count", vsh.Kind.INT, "a count"),
                vsh.Option("disk", vsh.Kind.STRING, "disks", multi=True),
                vsh.Option("format", vsh.Kind.STRING, "a format", choices=("raw", "qcow2")),
                vsh.Option("force", vsh.Kind.BOOL, "by force"),
            ),
            _nothing,
        ),
        vsh.Command(
            "must", "test", "need an option", "",
            (vsh.Option("count", vsh.Kind.INT, "a count", required=True),),
            _nothing,
        ),
        vsh.Command("nothing", "test", "take nothing", "", (), _nothing),
        *vsh.COMMANDS,
    ),
    others={"anything": "all-kinds --force"},
)  # fmt: skip


def _shell() -> vsh.Shell[None]:
    return vsh.Shell(TABLE, None, lambda error: None)


def _error(error: vsh.UsageError) -> str:
    return f"error: {error}\n" + (f"{error.hint}\n" if error.hint else "")


def _words(text: str) -> str:
    try:
        return "".join(json.dumps(words) + "\n" for words in vsh.split(text))
    except vsh.UsageError as error:
        return _error(error)


def _parse(text: str) -> str:
    try:
        calls = _shell().parse_line(text)
    except vsh.UsageError as error:
        return _error(error)
    shown = []
    for call in calls:
        shown.append(call.command.name)
        shown += [f"  {name}: {json.dumps(v)}" for name, v in call.args.values.items()]
    return "\n".join(shown) + "\n"


def _help(text: str) -> str:
    for group in TABLE.groups:
        if group.keyword == text:
            return vsh.group_help(TABLE, group)
    return vsh.command_help(TABLE.command(text))


def _complete(text: str) -> str:
    start, words = vsh_readline.completions(_shell(), text)
    return f"{text[:start]}|{text[start:]}\n" + "".join(f"<{word}>\n" for word in words)


KINDS = {"words": _words, "parse": _parse, "help": _help, "complete": _complete}

CASES = sorted(DATA.glob("*/*.in"))


def test_there_are_cases_of_every_kind() -> None:
    assert {case.parent.name for case in CASES} == set(KINDS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.stem}")
def test_case(case: pathlib.Path) -> None:
    text = case.read_bytes().decode().removesuffix("\n")
    actual = KINDS[case.parent.name](text)
    expected = case.with_suffix(".out")
    wanted = expected.read_text("utf-8") if expected.exists() else None
    if actual != wanted and os.environ.get("VIRTBACKUP_REGENERATE") == "1":
        expected.write_text(actual, "utf-8")
    assert actual == wanted


def test_no_expectation_is_without_its_case() -> None:
    assert [out for out in DATA.glob("*/*.out") if not out.with_suffix(".in").exists()] == []


@hypothesis.given(strategies.lists(strategies.text(), min_size=1))
def test_words_quoted_by_echo_are_read_back(words: list[str]) -> None:
    hypothesis.assume(not any("\0" in word for word in words))
    assert vsh.split(" ".join(vsh.quote(word) for word in words)) == [words]


@hypothesis.given(strategies.text(alphabet="ab \t\n;#'\"\\-=,\r\v\u3000"))
def test_any_text_is_taken_apart(text: str) -> None:
    line = vsh.read(text)
    words = [word for command in line.commands for word in command]
    assert all(before.end <= after.start for before, after in itertools.pairwise(words))
    assert all(word.start < word.end for word in words)


@hypothesis.given(strategies.text(alphabet="ab \t'\"\\-=,/#"))
def test_completion_of_any_text_goes_on_from_it(text: str) -> None:
    line = f"all-kinds {text}"
    start, words = vsh_readline.completions(_shell(), line)
    assert start <= len(line)
    assert all(word.startswith(line[start:]) for word in words)


@hypothesis.given(
    strategies.sampled_from(["", "'", '"', "a", "it", "b", "q", "alp\\ ", "'alp o", '"alp o'])
)
def test_what_is_completed_means_the_value(raw: str) -> None:
    words = vsh_readline.completions(_shell(), f"all-kinds {raw}")[1]
    values = _complete_names(_shell(), vsh.Args({}), "")
    assert words
    for word in words:
        command = vsh.split(f"all-kinds {word}")[0]
        assert command[1] in [*values, *(f"--{o.name}" for o in TABLE.commands[0].options)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], [" Id   Name", "------------"]),
        ([("1", "a"), ("-", "longer")], [
            " Id   Name", "--------------", " 1    a", " -    longer",
        ]),
        ([("1", "日本"), ("22", "e\u0301x")], [
            " Id   Name", "------------", " 1    日本", " 22   e\u0301x",
        ]),
        ([("1", "ที่นี่"), ("22", "a\u200bb\u202ecd\xade")], [
            " Id   Name", "--------------", " 1    ที่นี่", " 22   a\u200bb\u202ecd\xade",
        ]),
    ],
)  # fmt: skip
def test_table(rows: list[tuple[str, str]], expected: list[str]) -> None:
    assert vsh.table_lines(("Id", "Name"), rows) == expected


def test_cells_behind_wide_characters_are_aligned() -> None:
    lines = vsh.table_lines(("Name", "X"), [("日本語", "1"), ("abcdef", "2")])
    assert lines == [" Name     X", "-------------", " 日本語   1", " abcdef   2"]
    in_parts = unicodedata.normalize("NFD", "한국")
    lines = vsh.table_lines(None, [(in_parts, "1"), ("abcd", "2")])
    assert lines == [f" {in_parts}   1", " abcd   2"]


class _Boom(Exception):
    pass


def _raising(error: BaseException) -> vsh.Table:
    def handler(shell: Any, args: vsh.Args) -> None:
        raise error

    commands = (vsh.Command("boom", "test", "", "", (), handler), *vsh.COMMANDS)
    return vsh.Table(TABLE.groups, commands)


def _describe(error: Exception) -> vsh.Failure | None:
    return vsh.Failure("known", "as is\nthis") if isinstance(error, _Boom) else None


def _run(table: vsh.Table, text: str, debug: bool = False, quiet: bool = False) -> int:
    shell = vsh.Shell(table, None, _describe)
    shell.debug, shell.quiet = debug, quiet
    return shell.run_all(shell.parse_line(text))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (vsh.Failure("no\n two\x1b\n"), 1, "error: no; two\\x1b\n"),
        (vsh.UsageError("what", "that"), 2, "error: what\nthat\n"),
        (_Boom(), 1, "error: known\nas is; this\n"),
        (ValueError("x"), 1, "error: internal error: ValueError: x\n"),
        (OSError(errno.ENOENT, "x"), 1, "error: internal error: FileNotFoundError: [Errno 2] x\n"),
        (OSError(errno.EMFILE, "x"), 1, "error: Too many open files\n"),
        (MemoryError(), 1, "error: out of memory\n"),
    ],
)
def test_every_error_has_a_status_and_a_text(
    error: Exception, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(_raising(error), "boom") == status
    assert capsys.readouterr() == ("", message)
    assert _run(_raising(error), "boom", quiet=True) == status
    assert capsys.readouterr() == ("", message.split("\n")[0] + "\n")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(_raising(ValueError("x")), "boom", debug=True) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_commands_behind_a_failed_one_run_and_the_worst_status_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(_raising(vsh.Failure("no")), "echo a; boom; echo b") == 1
    assert capsys.readouterr() == ("a\nb\n", "error: no\n")


def test_quit_ends_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(TABLE, "echo a; quit; echo b") == 0
    assert capsys.readouterr().out == "a\n"


def test_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(_raising(KeyboardInterrupt()), "boom")


@pytest.mark.parametrize(
    ("line", "out"),
    [
        ("echo --shell 'a b' it\\'s plain ''", "'a b' 'it'\\''s' plain ''\n"),
        ("echo --xml <&>", "&lt;&amp;&gt;\n"),
        ('echo --xml --shell "\'"', "'&apos;'\n"),
        ("echo", "\n"),
        ("echo -- --shell", "--shell\n"),
    ],
)
def test_echo(line: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(TABLE, line) == 0
    assert capsys.readouterr().out == out


def test_echo_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(TABLE, "echo --err a b") == 0
    assert capsys.readouterr() == ("", "error: a b\n")


def test_help_of_everything_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(TABLE, "help") == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command.name} " in out for command in TABLE.commands)


def test_files_are_completed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / ".hidden").touch()

    def names(text: str) -> list[str]:
        found = vsh.complete_files(None, vsh.Args({}), f"{tmp_path}/{text}")  # type: ignore[arg-type]
        return sorted(name.removeprefix(f"{tmp_path}/") for name in found)

    assert names("") == ["file", "folder/"]
    assert names("fo") == ["folder/"]
    assert names(".") == [".hidden"]
    assert names("nowhere/") == []
