# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages: ``virsh-backup(1)``, ``virtbackupd(8)`` and ``virtbackup.conf(5)``."""

import argparse
import configparser
import datetime
import os
import pathlib
from collections.abc import Iterator

from manual import roff, settings
from virtbackup.tools import virsh_backup, virsh_options, virtbackupd_options, vsh

ROOT = pathlib.Path(__file__).resolve().parent.parent


def version() -> str:
    """Of this source tree."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    return metadata["metadata"]["version"]


def date() -> str:
    """Of the pages: $SOURCE_DATE_EPOCH, by which packages are made reproducible, else today."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.now(datetime.timezone.utc)
    when = datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc) if epoch else now
    return when.date().isoformat()


def pages() -> dict[str, str]:
    """File name -> page."""
    return {
        "virsh-backup.1": virsh_backup_page(),
        "virtbackup.conf.5": virtbackup_conf_page(),
        "virtbackupd.8": virtbackupd_page(),
    }


# --- virsh-backup(1) ------------------------------------------------------------------------------

_URIS = (
    ("`qmp:///`<path>", "A QEMU, or a qemu-storage-daemon, by its QMP socket. `?engine=classic` or"
     " `?engine=hybrid` asks for one engine, `?agent=`<path> names the guest agent's socket."),
    ("`qemu:///system` and other URIs of libvirt's", "A host of libvirt's, by libvirt itself."
     " `?native=yes` has libvirt's own engine make the backups."),
    ("`test:///default`", "No hypervisor: a fake that is made from a recording of a QEMU."
     " `test:///`<directory> is made from one's own recording."),
    ("`virtbackup+unix:///`<path>, `virtbackup+tls://`<host>`/`, `virtbackup+tcp://`<host>`/`",
     "A virtbackupd(8)."),
)  # fmt: skip

_ENVIRONMENT = (
    ("`VIRTBACKUP_DEFAULT_URI`, `VIRSH_DEFAULT_CONNECT_URI`, `LIBVIRT_DEFAULT_URI`",
     "Where to connect to without `--connect`; the first that is set. Else `qemu:///system`."),
    ("`VIRTBACKUP_CONF`", "A file that is read in place of every virtbackup.conf(5)."),
    ("`VIRTBACKUP_SCRATCH_DIR`",
     "Where scratch images go for which a backup names no place. Else `/var/tmp`."),
    ("`VIRTBACKUP_STATE_DIR`",
     "Where running backups are noted. Else `/run/virtbackup` for root, and a directory in"
     " `$XDG_RUNTIME_DIR` for others."),
    ("`XDG_CONFIG_HOME`, `XDG_CACHE_HOME`", "Directories in place of `~/.config` and `~/.cache`."),
    ("`NO_COLOR`",
     "Where it is set to anything, errors and maps have no colour. On a terminal alone they have"
     " any."),
)  # fmt: skip

_STATUS = (
    ("`0`", "Done. It is also that of a shell that reads its commands from standard input, whatever"
     " became of them, as virsh's is: a script gives them as arguments. Of several commands in one"
     " string the worst status counts."),
    ("`1`", "A command failed, with a line on standard error that begins with `error:` and, unless"
     " the shell is quiet, perhaps one behind it of what to do next."
     " A `backup-stop` does so, too, where the backup was not good; it has ended all the same."),
    ("`2`", "What was typed makes no sense."),
    ("`130`, `143`, `129`",
     "Interrupted by SIGINT, SIGTERM or SIGHUP. A backup that was being pulled or started is given"
     " up; one that was being stopped is stopped. A second signal ends a start or a stop at once,"
     " and a pull's wait for QEMU to end its backup where that takes 2 seconds or more."),
)  # fmt: skip

EXAMPLES = (
    ("A whole backup into a directory:", "virsh-backup -c qmp:///tmp/vm/qmp.sock backup-pull vm "
     "/tmp/vm/monday"),
    ("Every night what has changed since the night before:",
     "virsh-backup -c qmp:///tmp/vm/qmp.sock backup-pull vm /tmp/vm/nightly --branch nightly "
     "--auto"),
    ("For a client of one's own:",
     "virsh-backup -c qmp:///tmp/vm/qmp.sock backup-start-as vm --unix /tmp/vm/nbd.sock\n"
     "nbdcopy 'nbd+unix:///vda?socket=/tmp/vm/nbd.sock' /tmp/vm/vda.raw\n"
     "virsh-backup -c qmp:///tmp/vm/qmp.sock backup-stop vm"),
)  # fmt: skip
"""What is done, and how; run by tests/live/test_manual.py, as README's."""


def virsh_backup_page() -> str:
    table = virsh_backup.TABLE
    return "".join((
        roff.title("virsh-backup", 1, date(), version()),
        roff.section("NAME", "virsh\\-backup \\- pull backups of running QEMU guests\n"),
        roff.section("SYNOPSIS", roff.synopsis(
            "`virsh-backup` [<option>]... [<command_string>]",
            "`virsh-backup` [<option>]... <command> [<argument>]...",
        )),
        roff.section("DESCRIPTION", roff.text(
            "Freezes the disks of a running QEMU guest at one instant and exports the frozen disks"
            " over NBD, for any client to read at its own pace. The end of the backup tells whether"
            " it was good.",
            "Without a command it is an interactive shell with history and completion. A"
            " <command_string> is one word with commands that are separated by semicolons. An"
            " option of a command is given as `--option` <value> or `--option=`<value>.",
        )),
        roff.section("OPTIONS", roff.tagged(
            (_own_term(option), _sentence(option.help)) for option in virsh_options.OWN_OPTIONS
        )),
        roff.section("URIS", roff.tagged(_URIS)),
        roff.section("COMMANDS", *(
            roff.subsection(group.title, *map(_command, table.members(group)))
            for group in table.groups
        )),
        roff.section("ENVIRONMENT", roff.tagged(_ENVIRONMENT)),
        roff.section("FILES", roff.tagged((
            ("`/etc/virtbackup/virtbackup.conf`, `~/.config/virtbackup/virtbackup.conf`",
             "Settings: see virtbackup.conf(5)."),
            ("`~/.cache/virtbackup/history`", "What was typed into the shell."),
        ))),
        roff.section("EXIT STATUS", roff.tagged(_STATUS)),
        roff.section("EXAMPLES", *(
            roff.text(what) + roff.example(how) for what, how in EXAMPLES[:1]
        ), *(
            ".PP\n" + roff.text(what) + roff.example(how) for what, how in EXAMPLES[1:]
        )),
        _see_also("virtbackup.conf(5)", "virtbackupd(8)", "virsh(1)", "nbdcopy(1)"),
    ))  # fmt: skip


def _own_term(option: virsh_options.OwnOption) -> str:
    terms = [f"`-{option.letter}`"] if option.letter else []
    if option.name:
        value = f"=<{option.value}>" if option.value else ""
        value = f"[=<{option.optional}>]" if option.optional else value
        terms.append(f"`--{option.name}`{value}")
    return ", ".join(terms)


def _command(command: vsh.Command) -> str:
    """The synopsis, what it does, and its options."""
    said = _sentence(command.desc or command.help)
    options = "".join(
        roff.tagged([(_option_term(option), _sentence(option.help))]) for option in command.options
    )
    return f".TP\n{_synopsis(command)}\n{roff.text(said)}" + (
        f".RS\n{options}.RE\n" if options else ""
    )


def _synopsis(command: vsh.Command) -> str:
    name, *uses = vsh.synopsis(command).split(" ")
    return " ".join([roff.bold(name), *map(roff.escape, uses)])


def _option_term(option: vsh.Option) -> str:
    match option.kind:
        case vsh.Kind.BOOL:
            return f"`--{option.name}`"
        case vsh.Kind.DATA:
            return f"[`--{option.name}`] <{option.word}>"
        case vsh.Kind.ARGV:
            return f"<{option.word}>..."
        case _:
            return f"`--{option.name}` <{option.word}>"


def _sentence(text: str) -> str:
    """TEXT as one, if it is none yet."""
    if text.split(" ")[0].rstrip(",").isalpha():
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _see_also(*references: str) -> str:
    names = [reference.removesuffix(")").split("(") for reference in references]
    shown = [f".BR {roff.escape(name)} ({number})" for name, number in names]
    return roff.section("SEE ALSO", " ,\n".join(shown) + "\n")


# --- virtbackupd(8) -------------------------------------------------------------------------------


def daemon_options() -> Iterator[tuple[tuple[str, ...], str | None, str]]:
    """The names of each, what its value is called, and what it is for."""
    parser = virtbackupd_options.parser(version())
    for action in parser._actions:
        takes = action.nargs != 0 and not isinstance(action, argparse._CountAction)
        value = str(action.metavar or action.dest.upper()) if takes else None
        help = "show this help, and end" if "--help" in action.option_strings else action.help or ""
        help = "show the version, and end" if "--version" in action.option_strings else help
        yield tuple(action.option_strings), value, help


def virtbackupd_page() -> str:
    return "".join((
        roff.title("virtbackupd", 8, date(), version()),
        roff.section("NAME", "virtbackupd \\- serve pull backups of QEMU guests to clients\n"),
        roff.section("SYNOPSIS", roff.synopsis("`virtbackupd` [<option>]...")),
        roff.section("DESCRIPTION", roff.text(
            "Serves the pull backup API of QEMU guests over libvirt's own wire protocol."
            " virsh(1), libvirt-python and virtnbdbackup speak to it as they are, and"
            " virsh-backup(1) by the URIs `virtbackup+unix:`, `virtbackup+tls:` and"
            " `virtbackup+tcp:`.",
            "What it serves and where it listens is said by its options, else by"
            " virtbackup.conf(5). It listens on the sockets that systemd hands over besides."
            " Backups are QEMU's: they run on when the daemon ends, and the next one finds them.",
        )),
        roff.section("OPTIONS", roff.tagged(
            (
                ", ".join(f"`{name}`" for name in names) + (f" <{value}>" if value else ""),
                _sentence(said),
            )
            for names, value, said in daemon_options()
        )),
        roff.section("FILES", roff.tagged((
            ("`/etc/virtbackup/virtbackup.conf`", "Its settings."),
            (f"`{virtbackupd_options.DEFAULT_LISTEN.removeprefix('unix:')}`", "Its socket."),
        ))),
        roff.section("SIGNALS", roff.tagged((
            (
                "`SIGTERM`, `SIGINT`, `SIGHUP`",
                "It ends, once the calls that it works on have their replies.",
            ),
        ))),
        roff.section("EXIT STATUS", roff.tagged((
            ("`0`", "It was told to end, or the configuration is good."),
            ("`1`", "It could not run, or the configuration is not good."),
            ("`2`", "What was typed makes no sense."),
        ))),
        roff.section("EXAMPLES", roff.example(
            "virtbackupd --uri qemu:///system --listen unix:/run/virtbackup/virtbackup-sock\n"
            "virsh -c 'qemu:///system?socket=/run/virtbackup/virtbackup-sock' list --all"
        ).removeprefix(".PP\n")),
        _see_also("virsh-backup(1)", "virtbackup.conf(5)", "systemd.socket(5)"),
    ))  # fmt: skip


# --- virtbackup.conf(5) ---------------------------------------------------------------------------


def virtbackup_conf_page() -> str:
    return "".join((
        roff.title("virtbackup.conf", 5, date(), version()),
        roff.section("NAME", "virtbackup.conf \\- settings of virsh\\-backup and virtbackupd\n"),
        roff.section("SYNOPSIS", roff.synopsis(
            "`/etc/virtbackup/virtbackup.conf`", "`~/.config/virtbackup/virtbackup.conf`"
        )),
        roff.section("DESCRIPTION", roff.text(
            "Settings that are not of one backup. The machine's file is read first, and then the"
            " user's, whose settings take the place of the machine's; that is in `$XDG_CONFIG_HOME`"
            " where it is set. The environment variable `VIRTBACKUP_CONF` names a file that is read"
            " in place of both.",
            "A line is `name = value`: a text in double or single quotes, a number, `yes` or `no`,"
            " or a list of texts in brackets, which may go on over several lines. `#` begins a"
            " comment. A setting that nobody knows is an error.",
        )),
        *(
            roff.section(section.title.upper(), *map(_setting, section.settings))
            for section in settings.sections()
        ),
        _see_also("virsh-backup(1)", "virtbackupd(8)"),
    ))  # fmt: skip


def _setting(setting: settings.Setting) -> str:
    said = [setting.comment or setting.doc, f"Default: {setting.default}."]
    example = roff.example(setting.example) if "\n" in setting.example else ""
    term = setting.name if example else setting.example
    inside = f".RS\n{example}.RE\n" if example else ""
    return roff.tagged([(f"`{term}`", " ".join(said))]) + inside
