# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backup commands (virsh-backup.c), and the program ``virsh-backup`` (virsh.c)."""

import contextlib
import dataclasses
import gc
import logging
import os
import pathlib
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import virtbackup
from virtbackup import runtime
from virtbackup.tools import (
    virsh_branch,
    virsh_compare,
    virsh_complete,
    virsh_connection,
    virsh_domain,
    virsh_host,
    virsh_map,
    virsh_monitor,
    virsh_options,
    virsh_pull,
    virsh_restore,
    virsh_rpc,
    virsh_translate,
    vsh,
    vsh_readline,
)

if TYPE_CHECKING:  # at run time where they are used, or help would wait for them
    from virtbackup.conf import backup_conf

logger = logging.getLogger(__name__)

GROUP = vsh.Group("backup", "Backup")


# --- start ----------------------------------------------------------------------------------------


def _start(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    document = virsh_connection.read_document(args.text("xmlfile"))
    _start_document(shell, args, document)


def _start_document(shell: virsh_connection.Shell, args: vsh.Args, document: str) -> None:
    from virtbackup.tools import interrupt

    flags = virtbackup.VIR_DOMAIN_BACKUP_START_QUIESCE if args.flag("quiesce") else 0
    domain = virsh_connection.domain(shell, args)
    as_json = args.flag("json")
    with interrupt.held() as undo:
        domain.backupStart(document, flags)
        undo.callback(_give_up, shell, domain)
        if undo.caught:
            return  # it is given up, and nobody is to take it for one that runs
        if not as_json:
            shell.extra("Domain backup started")
        virsh_connection.warn_of_listener(shell, args, document)
        if not undo.caught and (as_json or not shell.quiet):
            _tell_started(shell, domain, as_json)


def _give_up(shell: virsh_connection.Shell, domain: "virtbackup.Domain") -> None:
    import libvirt

    try:
        domain.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL)
    except libvirt.libvirtError as failure:
        shell.warn(f"the backup of domain '{domain.name()}' could not be ended: {failure}")


def _tell_started(
    shell: virsh_connection.Shell, domain: "virtbackup.Domain", as_json: bool
) -> None:
    """Warn of what may go wrong, and print AS_JSON what runs."""
    import libvirt

    facts: dict[str, object] = {"domain": domain.name()}
    try:
        info = domain.backupGetInfo()
    except libvirt.libvirtError as failure:  # the backup runs all the same
        logger.info("info=unknown domain=%s reason=%s", domain.name(), failure)
    else:
        facts = _info_facts(domain.name(), info)
        if not shell.quiet:
            shell.warn_of_each(info.warnings)
    if as_json:
        shell.print_json(facts)


def _start_as(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.conf import backup_conf

    definition = backup_conf.BackupDef(
        address=_address(args),
        disks=tuple(_parse_diskspec(spec) for spec in args.texts("disk")),
        branch=args.optional("branch"),
    )
    args.exclusive("print-xml", "json")
    document = definition.format()
    with virsh_connection.document_of_options("backup-start-as"):
        backup_conf.BackupDef.parse(document)
    if args.flag("print-xml"):
        shell.print_document(document)
    else:
        _start_document(shell, args, document)


def _address(args: vsh.Args) -> "backup_conf.Address":
    from virtbackup.conf import backup_conf

    path, host, port = args.optional("unix"), args.optional("host"), args.number("port")
    for one, other in (("unix", "host"), ("unix", "port"), ("unix", "autoport")):
        args.exclusive(one, other)
    args.exclusive("port", "autoport")
    tls = True if args.flag("tls") else None
    if path is not None:
        if not path.startswith("/"):
            raise vsh.UsageError(f"invalid --unix '{path}': expected an absolute path")
        return backup_conf.UnixAddress(path, tls)
    if args.flag("autoport"):
        port = 0
    if host is None or port is None:
        raise vsh.UsageError("command 'backup-start-as' requires --unix, or --host and --port")
    return backup_conf.IpAddress(host, port or None, tls, None if port else True)


_DISK_KEYS = {
    "present": ("yes", "no"),
    "source": (),
    "reserve": ("yes", "no"),
    "type": ("full", "incremental", "auto"),
    "granularity": (),
}
"""What may follow a disk's name in --disk, and the values; none: any."""

_SIZE = re.compile(r"[0-9]{1,19} *(b|bytes|[kmgt](i?b)?)?", re.IGNORECASE)


def _parse_diskspec(spec: str) -> "backup_conf.BackupDiskDef":
    """``NAME[,KEY=VALUE]...``, a comma in a name or a value written twice."""
    from virtbackup.conf import backup_conf, storage_conf

    name, *parts = vsh.split_list(spec)
    values: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in _DISK_KEYS or not equals or not value or key in values:
            raise vsh.UsageError(f"invalid --disk '{spec}': '{part}' is not understood")
        if _DISK_KEYS[key] and value not in _DISK_KEYS[key]:
            expected = " or ".join(_DISK_KEYS[key])
            raise vsh.UsageError(f"invalid --disk '{spec}': {key} is not {expected}")
        if key == "source" and not value.startswith("/"):
            raise vsh.UsageError(f"invalid --disk '{spec}': source is not an absolute path")
        values[key] = value
    source = storage_conf.Source(
        file=values.get("source"),
        reserve=values["reserve"] == "yes" if "reserve" in values else None,
    )
    granularity = values.get("granularity")
    if not name or (granularity is not None and not _SIZE.fullmatch(granularity)):
        what = "the size is malformed" if name else "the name is missing"
        raise vsh.UsageError(f"invalid --disk '{spec}': {what}")
    return backup_conf.BackupDiskDef(
        name=name,
        present=values["present"] == "yes" if "present" in values else None,
        type=values.get("type"),  # type: ignore[arg-type]  # one of _DISK_KEYS
        source=None if source == storage_conf.Source() else source,
        granularity=None if granularity is None else storage_conf.parse_size(granularity),
    )


def _complete_diskspec(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """The disks of the domain; behind a comma the keys, and the values of a key that has few."""
    from virtbackup.conf import domain_conf

    before, comma, last = text.rpartition(",")
    if not comma and not args.flag("domain"):
        return []
    if not comma:
        document = virsh_connection.domain(shell, args).XMLDesc()
        return [disk.target for disk in domain_conf.DomainDef.parse(document).disks]
    key, equals, value = last.partition("=")
    if not equals:
        return [f"{before},{key}=" for key in _DISK_KEYS]
    values = vsh.complete_files(shell, args, value) if key == "source" else _DISK_KEYS.get(key, ())
    return [f"{before},{key}={value}" for value in values]


# --- while it runs, and its end -------------------------------------------------------------------


def _stop(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import interrupt

    domain = virsh_connection.domain(shell, args)
    with interrupt.held():
        _stop_domain(shell, args, domain)


def _stop_domain(
    shell: virsh_connection.Shell, args: vsh.Args, domain: "virtbackup.Domain"
) -> None:
    import libvirt

    cancelled = args.flag("cancel")
    facts: dict[str, object] = {"domain": domain.name(), "cancelled": cancelled}
    try:
        domain.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL if cancelled else 0)
    except libvirt.libvirtError as failure:
        # Any other error is no verdict: the backup may run on.
        if args.flag("json") and failure.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED:
            reason = failure.get_error_message()
            shell.print_json({**facts, "good": False, "reason": reason})
        raise
    if args.flag("json"):
        good = None if cancelled else True
        shell.print_json({**facts, "good": good, "reason": None})
        return
    shell.extra("Domain backup stopped")


def _dumpxml(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    document = virsh_connection.domain(shell, args).backupGetXMLDesc()
    virsh_connection.print_xml(shell, args, document)


def _cleanup(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import interrupt

    domain = virsh_connection.domain(shell, args)
    with interrupt.held():
        removed = domain.backupCleanup()
    if args.flag("json"):
        shell.print_json({"domain": domain.name(), "removed": removed})
        return
    for line in removed:
        shell.print(line)
    if not removed:
        shell.extra("Nothing to clean up")


def _info(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    domain = virsh_connection.domain(shell, args)
    info = domain.backupGetInfo()
    if args.flag("json"):
        shell.print_json(_info_facts(domain.name(), info))
        return
    started = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(info.started))
    addresses = [
        ("Address", virsh_connection.nbd_uri(info.address, disk.export)) for disk in info.disks
    ]
    branch = [] if info.branch is None else [("Branch", info.branch)]
    facts = [
        ("State", info.state),
        ("Started", started),
        *branch,
        *_scratch_facts(info),
        *_save_facts(info),
        *addresses,
    ]
    virsh_connection.print_pairs(shell, facts)
    shell.extra("")
    shell.print_table(*_info_table(info))
    shell.warn_of_each(info.warnings)


def _info_table(
    info: "backup_conf.BackupInfo",
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header, and a row for each disk; of what type its backup is only where there may be
    several."""
    size = virsh_connection.human_size
    of_branch = info.branch is not None
    header = ("Disk", "Export", "State", "Capacity", "Scratch used", "Dirty", "Reason")
    return (*header[:3], "Type", *header[3:]) if of_branch else header, [
        (
            disk.name,
            disk.export,
            disk.state,
            *((disk.type,) if of_branch else ()),
            size(disk.capacity),
            size(disk.scratch_used),
            size(disk.dirty),
            " ".join((disk.reason or disk.type_reason or "-").split()),
        )
        for disk in info.disks
    ]


_SCRATCH_FAILURE = {
    "backup": "the backup breaks, the guest goes on",
    "guest": "the guest's write fails, or the guest is paused until the backup is stopped",
}


def _scratch_facts(info: "backup_conf.BackupInfo") -> list[tuple[str, str]]:
    """What becomes of the guest when a scratch image is in trouble, where the driver can tell."""
    if info.engine is None or info.scratch_failure is None:
        return []
    hang = "the guest's writes hang with it: this QEMU has no time limit for it"
    if info.scratch_timeout is not None:
        hang = f"it has failed after {info.scratch_timeout:g} seconds"
    return [
        ("Engine", info.engine),
        ("Scratch fails", _SCRATCH_FAILURE[info.scratch_failure]),
        ("Scratch hangs", hang),
    ]


def _save_facts(info: "backup_conf.BackupInfo") -> list[tuple[str, str]]:
    """What becomes of a save of the guest meanwhile, where the driver can tell."""
    if info.save_failure is None:
        return []
    if info.save_failure == "backup":
        return [("Guest saved", "the backup has failed then")]
    return [("Guest saved", f"the save fails, as a migration does: {info.save_reason}")]


def _info_facts(name: str, info: "backup_conf.BackupInfo") -> dict[str, object]:
    disks = [
        {
            "name": disk.name,
            "export": disk.export,
            "uri": virsh_connection.nbd_uri(info.address, disk.export),
            "state": disk.state,
            "reason": disk.reason,
            "capacity": disk.capacity,
            "scratch_used": disk.scratch_used,
            "type": disk.type,
            "type_reason": disk.type_reason,
            "since": virsh_branch.point_facts(disk.since),
            "dirty": disk.dirty,
            "scratch_worst_case": disk.scratch_worst_case,
            "scratch_free": disk.scratch_free,
            "scratch_hangs": disk.scratch_hangs,
            "warning": disk.warning,
        }
        for disk in info.disks
    ]
    return {
        "domain": name,
        "id": info.id,
        "branch": info.branch,
        "state": info.state,
        "started": info.started,
        "address": _address_facts(info.address),
        "engine": info.engine,
        "scratch_failure": info.scratch_failure,
        "scratch_timeout": info.scratch_timeout,
        "save_failure": info.save_failure,
        "save_reason": info.save_reason,
        "disks": disks,
    }


def _address_facts(address: "backup_conf.Address") -> dict[str, object]:
    from virtbackup.conf import backup_conf

    tls = bool(address.tls)
    if isinstance(address, backup_conf.UnixAddress):
        return virsh_connection.unix_facts(address.path, tls)
    return virsh_connection.ip_facts(address.host, address.port, tls)


# --- the table ------------------------------------------------------------------------------------

_JSON_OF_START = dataclasses.replace(
    virsh_connection.JSON, help="print a JSON document, as backup-info"
)

COMMANDS = (
    vsh.Command(
        "backup-cleanup", GROUP.keyword, "Remove what a crash left of a backup",
        "Remove what a backup left behind whose manager was killed; a running backup stays. Where\n"
        "no stop came to tell that it was not good, this does.",
        (virsh_connection.DOMAIN, virsh_connection.JSON),
        _cleanup,
    ),
    vsh.Command(
        "backup-dumpxml", GROUP.keyword, "Dump XML of the running backup",
        "Print the running backup with every default filled in.",
        (virsh_connection.DOMAIN, *virsh_connection.XPATH),
        _dumpxml,
    ),
    vsh.Command(
        "backup-info", GROUP.keyword, "Show how the running backup does",
        "Show state, exports, scratch space and dirty bytes of the running backup, disk by disk.",
        (virsh_connection.DOMAIN, virsh_connection.JSON),
        _info,
    ),
    vsh.Command(
        "backup-start", GROUP.keyword, "Start a pull backup of a live domain",
        "Freeze the chosen disks at one instant and export them over NBD, as an XML file says.",
        (
            virsh_connection.DOMAIN,
            vsh.Option(
                "xmlfile", vsh.Kind.DATA,
                "domainbackup XML, the proposal's or libvirt's own; - is standard input",
                required=True, completer=vsh.complete_files,
            ),
            virsh_connection.QUIESCE,
            virsh_connection.INSECURE,
            _JSON_OF_START,
        ),
        _start,
    ),
    vsh.Command(
        "backup-start-as", GROUP.keyword, "Start a pull backup from a set of args",
        "Freeze the chosen disks at one instant and export them over NBD.\n"
        "Without --disk, all writable disks that have a medium.",
        (
            virsh_connection.DOMAIN,
            vsh.Option(
                "unix", vsh.Kind.STRING, "path of the unix socket to listen on",
                completer=vsh.complete_files,
            ),
            vsh.Option("host", vsh.Kind.STRING, "host name or address to listen on"),
            vsh.Option(
                "port", vsh.Kind.INT, "TCP port to listen on; 0 is any that is free", most=65535
            ),
            vsh.Option("autoport", vsh.Kind.BOOL, "listen on any TCP port that is free"),
            vsh.Option("tls", vsh.Kind.BOOL, "export over TLS, as virtbackup.conf says"),
            vsh.Option(
                "disk", vsh.Kind.STRING,
                "NAME[,present=yes|no][,source=FILE][,reserve=yes|no]"
                "[,type=full|incremental|auto][,granularity=SIZE]; a comma within is written twice",
                multi=True, completer=_complete_diskspec,
            ),
            virsh_branch.BRANCH,
            virsh_connection.QUIESCE,
            virsh_connection.INSECURE,
            vsh.Option("print-xml", vsh.Kind.BOOL, "print the XML document, start nothing"),
            _JSON_OF_START,
        ),
        _start_as,
    ),
    vsh.Command(
        "backup-stop", GROUP.keyword, "Stop the running backup",
        "End the exports and tell whether the backup was good.",
        (
            virsh_connection.DOMAIN,
            vsh.Option("cancel", vsh.Kind.BOOL, "give the backup up: the branch stays"),
            virsh_connection.JSON,
        ),
        _stop,
    ),
)  # fmt: skip

VIRSHS = {
    "backup-begin": "backup-start",
    "checkpoint-create": "branch-create",
    "checkpoint-create-as": "branch-create",
    "checkpoint-delete": "branch-delete",
    "checkpoint-list": "branch-list",
    "domjobabort": "backup-stop --cancel",
    "domjobinfo": "backup-info",
}
"""What users of virsh may type -> what does that here."""

TABLE = vsh.Table(
    groups=(
        virsh_domain.MANAGEMENT,
        virsh_domain.MONITORING,
        virsh_host.GROUP,
        GROUP,
        virsh_branch.GROUP,
        virsh_monitor.GROUP,
        virsh_rpc.GROUP,
        vsh.Group(vsh.GROUP, "Virsh-backup itself"),
    ),
    commands=tuple(
        sorted(
            (
                *virsh_domain.COMMANDS,
                *virsh_host.COMMANDS,
                *COMMANDS,
                *virsh_branch.COMMANDS,
                *virsh_monitor.COMMANDS,
                virsh_rpc.DUMP,
                virsh_compare.COMPARE,
                virsh_map.MAP,
                virsh_pull.PULL,
                *virsh_restore.COMMANDS,
                virsh_translate.TRANSLATE,
                virsh_host.CONNECT,
                *vsh.COMMANDS,
            ),
            key=lambda command: command.name,
        )
    ),
    others=VIRSHS,
)


# --- the program ----------------------------------------------------------------------------------

_SELDOM = 100_000
"""Objects that are new until garbage is looked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit status. ARGV None: the process's own, and it ends after this."""
    if argv is None:
        # Or it is looked through for garbage, of which there is none, while modules are loaded.
        gc.set_threshold(_SELDOM)
        _allow_files()
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    finally:
        if argv is None:
            # All is done and told: nothing is left that a Ctrl-C could end.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _let_threads_begin()
            # Or the interpreter looks through all of it for garbage, 20 ms long, before it ends.
            gc.freeze()


def _main(argv: Sequence[str]) -> int:
    _mend_streams()
    arguments = list(argv)
    control = virsh_connection.Control(virsh_connection.default_uri())
    shell = vsh.Shell(TABLE, control, virsh_connection.describe)
    if arguments[:1] == ["--complete"]:
        return virsh_complete.main(shell, arguments[1:])
    try:
        try:
            status = shell.guard(_settle_paths) or shell.guard(lambda: _run(shell, arguments))
        finally:
            shell.guard(shell.control.close)
        return max(status, shell.guard(shell.control.close_trace), shell.guard(vsh.flush))
    except KeyboardInterrupt:
        shell.error(vsh.INTERRUPTION)
        return vsh.INTERRUPTED
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:
            shell.error(f"{vsh.INTERRUPTION} by {signal.Signals(end.code - 128).name}")
        raise
    except vsh.OutputClosed:
        return vsh.FAILED


def _let_threads_begin() -> None:
    """A signal can interrupt the start of a thread, and Python crashes where such a one has not
    come to run before the interpreter ends."""
    until = time.monotonic() + 1
    while any(one.ident is None for one in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.001)


def _allow_files() -> None:
    """Open as many files as may be: a pull has some ten of each disk."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # as it is, then
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _mend_streams() -> None:
    """Make do with streams that are closed; let file names of any bytes through."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, pathlib.Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="surrogateescape" if stream is sys.stdin else vsh.ENCODING_ERRORS)


def _settle_paths() -> None:
    try:
        runtime.settle_paths()
    except OSError as error:
        raise vsh.Failure(f"cannot tell where {error.filename} is: {error.strerror}") from error


def _run(shell: virsh_connection.Shell, argv: Sequence[str]) -> int:
    options = virsh_options.parse(argv)
    if options.help:
        shell.print_document(_usage())
        return vsh.DONE
    if options.version is not None:
        shell.print(_version(options.version))
        return vsh.DONE
    shell.quiet, shell.timing = options.quiet, options.timing
    shell.debug = options.debug == 0
    virsh_connection.set_logging(options.debug, options.log)
    control = shell.control
    control.uri, control.readonly = options.connect or control.uri, options.readonly
    if options.trace is not None:
        control.open_trace(options.trace)
    if not options.rest:
        return _interact(shell)
    if options.rest == [""]:  # from a variable that is not set, say: nothing was done
        raise vsh.UsageError("the command is empty", "'help' shows all commands")
    if len(options.rest) == 1:
        return shell.run_all(shell.parse_line(options.rest[0]))
    return shell.run_all([vsh.parse(TABLE, options.rest)])


def _interact(shell: virsh_connection.Shell) -> int:
    shell.extra(
        "Welcome to virsh-backup, the interactive terminal for pull backups.\n\n"
        "Type:  'help' for help with commands\n"
        "       'quit' to quit\n"
    )

    def prompt() -> str:
        return "virtbackup > " if shell.control.readonly else "virtbackup # "

    vsh_readline.loop(shell, prompt, vsh_readline.history_path("virtbackup"))
    return vsh.DONE


def _usage() -> str:
    options = [
        f"    {option.term if option.letter else '     ' + option.term:<29} {option.help}\n"
        for option in virsh_options.OWN_OPTIONS
    ]
    groups = "\n".join(vsh.group_help(TABLE, group) for group in TABLE.groups)
    return (
        "\nvirsh-backup [options]... [<command_string>]\n"
        "virsh-backup [options]... <command> [args...]\n\n"
        f"  options:\n{''.join(options)}  commands (non interactive mode):\n\n{groups}\n\n"
        "  (specify help <group> for details about the commands in the group)\n\n"
        "  (specify help <command> for details about the command)\n"
    )


def _version(kind: str) -> str:
    import libvirt

    from virtbackup import api

    own = virsh_host.dotted(api.VERSION)
    if kind == "short":
        return own
    python = ".".join(str(number) for number in sys.version_info[:3])
    return (
        f"Virsh-backup command line tool of virtbackup {own}\n"
        f"Using libvirt {virsh_host.dotted(libvirt.getVersion())} and Python {python}"
    )


if __name__ == "__main__":
    sys.exit(main())
