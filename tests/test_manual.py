# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages and completion have all that the programs have."""

import pathlib
import re
import subprocess
import sys
import typing

import pytest

from manual import __main__ as manual
from manual import pages, roff, settings
from virtbackup import hypervisor
from virtbackup.conf import virtbackup_conf
from virtbackup.tools import virsh_backup, virsh_host, virsh_options

ROOT = pathlib.Path(__file__).parents[1]


def plain(page: str) -> str:
    """What is read, without the fonts and escapes."""
    text = re.sub(r"\\f[BIR]|\\&|\\:", "", page)
    for escaped, char in (("\\-", "-"), ("\\(aq", "'"), ("\\(ti", "~"), ("\\e", "\\")):
        text = text.replace(escaped, char)
    return text


VIRSH_BACKUP = plain(pages.virsh_backup_page())
NAMES = "|".join(re.escape(command.name) for command in virsh_backup.TABLE.commands)


@pytest.mark.parametrize("command", virsh_backup.TABLE.commands, ids=lambda command: command.name)
def test_every_command_and_all_its_options(command: typing.Any) -> None:
    [own] = re.findall(
        rf"^\.TP\n{re.escape(command.name)}(?: .*)?\n(?:(?!\.TP\n(?:{NAMES})\b|\.S[SH]).*\n)*",
        VIRSH_BACKUP,
        re.MULTILINE,
    )
    said = " ".join(own.lower().split())
    assert " ".join((command.desc or command.help).lower().split()) in said
    for option in command.options:
        assert (
            f"<{option.name}>" in own if option.kind.value == "argv" else f"--{option.name}" in own
        )
        assert " ".join(option.help.lower().split()) in said


def test_every_group_and_every_option_of_the_program() -> None:
    for group in virsh_backup.TABLE.groups:
        assert f'.SS "{group.title}"' in VIRSH_BACKUP
    for option in virsh_options.OWN_OPTIONS:
        names = [f"-{option.letter}"] if option.letter else []
        names += [f"--{option.name}"] if option.name else []
        assert f".TP\n{', '.join(names)}" in VIRSH_BACKUP


def test_every_variable_of_the_environment() -> None:
    sources = (path.read_text() for path in (ROOT / "virtbackup").rglob("*.py"))
    ours = r"(?:VIRTBACKUP|XDG|NO)_\w+"
    used = {name for source in sources for name in re.findall(f'"({ours})"', source)}
    assert used
    assert used <= set(re.findall(ours, VIRSH_BACKUP))


def test_every_setting_with_its_default() -> None:
    page = plain(pages.virtbackup_conf_page())
    shown = [setting for section in settings.sections() for setting in section.settings]
    assert sorted(setting.name for setting in shown) == sorted(virtbackup_conf._KINDS)
    defaults = virtbackup_conf.Settings()
    for setting in shown:
        assert re.search(rf"^\.TP\n{setting.name}\b", page, re.MULTILINE)
        assert setting.doc, setting.name
        parsed = virtbackup_conf.Settings.parse({"example": setting.example})
        assert setting.example.count("\n") == 0 or getattr(parsed, setting.name)
        if setting.default not in ("not set", "none"):
            text = f"{setting.name} = {setting.default}"
            assert virtbackup_conf.Settings.parse({"default": text}) == defaults
        else:
            assert not getattr(defaults, setting.name)


def test_every_option_of_the_daemon() -> None:
    page = plain(pages.virtbackupd_page())
    usage = subprocess.run(
        [sys.executable, "-m", "virtbackup.tools.virtbackupd", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", usage.stdout.split("options:")[1]))
    assert {"--help", "--uri", "--check-config", "-v"} <= names
    for name in names:
        assert re.search(rf"^\.TP\n(-\w, )?{name}\b", page, re.MULTILINE), name
    for script in ("bash-completion/completions/virtbackupd", "zsh/site-functions/_virtbackupd"):
        assert all(name in manual.files()[script] for name in names)


def test_one_version() -> None:
    assert pages.version() == virsh_host.dotted(hypervisor.VERSION)
    assert f'"virtbackup {pages.version()}"' in pages.virtbackupd_page()


def test_the_date_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1479081600")
    assert pages.virtbackupd_page().split("\n")[2].startswith(".TH VIRTBACKUPD 8 2016-11-14 ")


def test_what_roff_would_take_for_its_own() -> None:
    assert roff.text(".so /etc/passwd \\n 'x") == "\\&.so /etc/passwd \\en \\(aqx\n"
    assert roff.example(".so x\n'y") == ".PP\n.RS 4\n.EX\n\\&.so x\n\\(aqy\n.EE\n.RE\n"


def test_the_manual_is_made_without_libvirt(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys\n"
        "for name in ('libvirt', 'lxml', 'nbd', 'xmlschema', 'tqdm', 'xxhash'):\n"
        "    sys.modules[name] = None\n"
        "from manual import __main__ as manual\n"
        f"sys.exit(manual.main([{str(tmp_path)!r}]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert made == set(manual.files())
    assert "man/man1/virsh-backup.1" in made


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert manual.main([]) == 2
    assert "python -m manual DIRECTORY" in capsys.readouterr().err


def test_a_directory_that_cannot_be(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert manual.main(["--help"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert manual.main(["/proc/nope"]) == 1
    assert capsys.readouterr().err.endswith("No such file or directory: '/proc/nope'\n")
