# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about the hypervisor and the connection to it (virsh-host.c)."""

from virtbackup.tools import virsh_connection, vsh

GROUP = vsh.Group("host", "Host and Hypervisor")


def _connect(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    uri = args.optional("name") or shell.control.uri
    shell.control.connect(uri, args.flag("readonly"))


def _uri(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    _print_one(shell, args, "uri", shell.control.connection().getURI())


def _hostname(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    _print_one(shell, args, "hostname", shell.control.connection().getHostname())


def _print_one(shell: virsh_connection.Shell, args: vsh.Args, key: str, value: str) -> None:
    if args.flag("json"):
        shell.print_json({key: value})
    else:
        shell.print_value(value)


def _version(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    import libvirt

    connection = shell.control.connection()
    kind, own = connection.getType(), dotted(connection.getLibVersion())
    hypervisor = dotted(connection.getVersion())
    daemon = dotted(connection.getDaemonVersion()) if args.flag("daemon") else None
    if args.flag("json"):
        facts: dict[str, object] = {"virtbackup": own, "libvirt": dotted(libvirt.getVersion())}
        facts["hypervisor"] = {"type": kind, "version": hypervisor}
        shell.print_json({**facts, "daemon": daemon} if daemon else facts)
        return
    shell.print(f"Using library: virtbackup {own}")
    shell.print(f"Using library: libvirt {dotted(libvirt.getVersion())}")
    shell.print(f"Using API: {kind} {own}")
    shell.print(f"Running hypervisor: {kind} {hypervisor}")
    if daemon is not None:
        shell.print(f"Running against daemon: {daemon}")


def dotted(version: int) -> str:
    """A version as libvirt counts them, as people write them."""
    return f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"


CONNECT = vsh.Command(
    "connect", vsh.GROUP, "(re)connect to hypervisor",
    "Connect to a hypervisor; without a URI, anew to the same one.",
    (
        vsh.Option(
            "name", vsh.Kind.DATA, "hypervisor connection URI",
            completer=virsh_connection.complete_uris,
        ),
        vsh.Option("readonly", vsh.Kind.BOOL, "read-only connection"),
    ),
    _connect,
)  # fmt: skip

COMMANDS = (
    vsh.Command(
        "hostname", GROUP.keyword, "print the hypervisor hostname", "",
        (virsh_connection.JSON,), _hostname,
    ),
    vsh.Command(
        "uri", GROUP.keyword, "print the hypervisor canonical URI", "",
        (virsh_connection.JSON,), _uri,
    ),
    vsh.Command(
        "version", GROUP.keyword, "show version",
        "Display the versions of the library and of the hypervisor.",
        (
            vsh.Option("daemon", vsh.Kind.BOOL, "report daemon version too"),
            virsh_connection.JSON,
        ),
        _version,
    ),
)  # fmt: skip
