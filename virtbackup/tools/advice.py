# SPDX-License-Identifier: LGPL-2.1-or-later
"""What to do next about an error, where that is known: the shell's line behind the error's own.

An error's own text is for whoever calls, in Python, in C or over the wire; what a user types next
is the shell's to know.
"""

import dataclasses

import libvirt

from virtbackup import errors


@dataclasses.dataclass(frozen=True)
class Known:
    """An error, and what to do about it."""

    code: int | None
    """libvirt's; None: any."""
    words: tuple[str, ...]
    """All of them are in its text."""
    advice: str

    def is_about(self, error: libvirt.libvirtError) -> bool:
        text = str(error)
        return self.code in (None, error.get_error_code()) and all(w in text for w in self.words)


_ABSENT, _REFUSED = "No such file or directory", "Connection refused"
_DENIED, _TAKEN, _FULL = "Permission denied", "Address already in use", "No space left on device"

NO_DOMAIN = "'list --all' shows all that there are"

_START_QEMU = (
    "Start QEMU with -qmp unix:PATH,server=on,wait=off, or connect to the socket of one that runs"
)
_OWN_HOST = "Take an address or a name of the host that QEMU runs on"
_START_DAEMON = (
    "Start the daemon that listens there (libvirtd, virtqemud, virtbackupd), or name another one:"
    " -c URI"
)
_ANOTHER_DIRECTORY = "Pull into another directory"
_ANOTHER_POINT = "'backup-verify' tells which points are good: --point names one"
_DOCUMENT = "'backup-start-as' with --print-xml prints a document to begin with"
_STATE = "Be root, or have $VIRTBACKUP_STATE_DIR name a directory of your own"
_TLS = "'man virtbackup.conf' tells which files there have to be, and where"

KNOWN = (
    # --- connecting ---
    Known(None, ("connect to monitor socket", _ABSENT), _START_QEMU),
    Known(None, ("connect to monitor socket", _REFUSED), _START_QEMU),
    Known(
        None, ("connect to monitor socket", _DENIED),
        "Be the user that QEMU runs as, or root",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_TIMEOUT, ("is stopped, by a signal",),
        "'kill -CONT' lets it go on; try again then",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_TIMEOUT, ("another client may be using it",),
        "A QMP socket serves one client at a time: end the other one, or give QEMU one more -qmp;"
        " a guest agent or a serial port says nothing, either",
    ),
    Known(
        None, ("does not speak QMP",),
        "Take the socket of a -qmp of QEMU: that of -monitor, or of an NBD server, is none",
    ),
    Known(
        None, ("No file descriptor supplied",),
        "What passes the monitor on, as socat does, passes no descriptors: take QEMU's own socket",
    ),
    Known(
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, ("fd passing is not supported by this connection",),
        "A virtbackupd passes no descriptors on to QEMU: it is reached by virtbackup+unix:///PATH",
    ),
    Known(None, ("Failed to connect socket to", _ABSENT), _START_DAEMON),
    Known(None, ("Failed to connect socket to", _REFUSED), _START_DAEMON),
    Known(
        None, ("Failed to connect socket to", _DENIED),
        "Be root, or in the group that may use the socket",
    ),
    Known(
        None, ("unable to connect to server at", _REFUSED),
        "Start virtbackupd there, told to --listen at that port",
    ),
    Known(
        libvirt.VIR_ERR_RPC, ("message of ", " bytes, not from "),
        "What listens there is another server: a QEMU is reached by qmp:///PATH of its QMP socket",
    ),
    Known(
        None, ("Cannot read", "CA certificate"),
        "TLS takes cacert.pem: in /etc/pki/CA, or in the directory that ?pkipath= of the URI names",
    ),
    Known(
        libvirt.VIR_ERR_AUTH_FAILED, ("Failed to verify peer's certificate",),
        "The server's certificate has to be signed by the authority in cacert.pem, to be in force"
        " and to name the host as the URI does",
    ),
    Known(
        libvirt.VIR_ERR_NO_CONNECT, (),
        "A URI begins with qmp:///, qemu:///, test:///, virtbackup+unix:///, virtbackup+tls:// or"
        " virtbackup+tcp://",
    ),
    Known(
        libvirt.VIR_ERR_AUTH_UNAVAILABLE, (),
        "Be root, or in the group that libvirt's own rules let in",
    ),
    # --- who may ---
    Known(
        libvirt.VIR_ERR_OPERATION_DENIED, ("read only access prevents",),
        "Leave out -r, or 'connect' anew without --readonly",
    ),
    Known(
        libvirt.VIR_ERR_ACCESS_DENIED, ("has not the permission",),
        "'access' in the daemon's virtbackup.conf gives it",
    ),
    # --- is there one already, is there one at all ---
    Known(libvirt.VIR_ERR_NO_DOMAIN, (), NO_DOMAIN),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("domain is not running", "guest agent"),
        "'virsh resume', or 'virsh dompmwakeup', lets it go on; or leave out --quiesce",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("domain is not running",),
        "Start the domain, which may stay paused: what does not run can be copied as it is",
    ),
    Known(
        libvirt.VIR_ERR_NO_DOMAIN_BACKUP, ("no domain backup job present",),
        "'backup-start' begins one; another user's is that user's to see and to stop, and libvirt's"
        " own is virsh's: domjobinfo",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("if nobody owns it, backup-cleanup",),
        "It may be another user's, who then has to stop it",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("another backup job is", "libvirt's own"),
        "'virsh domjobinfo' shows how far it is",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("another backup job is",),
        "'backup-info' shows it, 'backup-stop' ends it",
    ),
    Known(None, ("cannot open state lock", _DENIED), _STATE),
    Known(None, ("cannot make a directory in", _DENIED), _STATE),
    Known(None, ("cannot read status", _DENIED), _STATE),
    Known(None, ("cannot listen for the monitor in", _DENIED), _STATE),
    Known(
        libvirt.VIR_ERR_OPERATION_TIMEOUT, ("cannot acquire state lock",),
        "Try again once it is done",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("NBD server is already in use",),
        "End libvirt's own job on the domain first, or whoever exports its disks",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_UNSUPPORTED, ("already in active block job",),
        "Wait for the job to end, or leave the disk out: present=no",
    ),
    # --- what is wanted ---
    Known(libvirt.VIR_ERR_XML_INVALID_SCHEMA, (), _DOCUMENT),
    Known(
        libvirt.VIR_ERR_XML_ERROR, ("characters that XML cannot carry",),
        "Take names and paths in UTF-8 without control characters",
    ),
    Known(libvirt.VIR_ERR_XML_ERROR, (), _DOCUMENT),
    Known(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, ("export address must be specifed",), _DOCUMENT),
    Known(
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED, ("no disk named",),
        "'domblklist' shows the disks",
    ),
    Known(
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED, ("needs a branch",),
        "Name one: --branch, or <branch name=...> in the document",
    ),
    Known(
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED, ("the disks of the domain must be known",),
        "Name the domain: --domain",
    ),
    Known(
        errors.CHECKPOINT_INCONSISTENT, ("has no sound point to be incremental from",),
        "Take a full backup of the branch, type=full or --full; 'branch-list' shows what is sound",
    ),
    Known(libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, (), "'branch-list' shows the branches"),
    Known(
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, ("guest agent is not configured",),
        "Name its socket in the URI, qmp:///...?agent=PATH, or give the domain a channel for it;"
        " or leave out --quiesce",
    ),
    Known(
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE, (),
        "See whether the agent runs in the guest, or leave out --quiesce",
    ),
    Known(libvirt.VIR_ERR_OPERATION_INVALID, ("TLS directory not configured",), _TLS),
    Known(None, ("QEMU cannot use the TLS credentials",), _TLS),
    # --- where to ---
    Known(
        None, ("not where QEMU runs",),
        "A container, or PrivateTmp of a unit, has files of its own: take a directory of both",
    ),
    Known(
        None, ("cannot listen on", _ABSENT), "Make the directory: QEMU makes the socket in it"
    ),
    Known(
        None, ("cannot listen on '", _DENIED),
        "QEMU makes the socket: take a directory that its user may write to",
    ),
    Known(
        None, ("cannot listen on", _DENIED),
        "Only root's QEMU has the ports below 1024: take a higher one, or --autoport",
    ),
    Known(None, ("cannot listen on", _TAKEN), "Take another, or --autoport"),
    Known(None, ("cannot listen on", "Cannot assign requested address"), _OWN_HOST),
    Known(None, ("cannot listen on", "address resolution failed"), _OWN_HOST),
    Known(
        libvirt.VIR_ERR_INVALID_ARG, ("for backup of", "exists"),
        "Name a file that there is not, or leave out the source",
    ),
    Known(
        None, ("scratch space for", _FULL),
        "$VIRTBACKUP_SCRATCH_DIR, or the source of a disk, says where there is more room",
    ),
    Known(
        None, ("the backup is not good",),
        "It has ended: throw away what was read of it, see to the reason, and take another one",
    ),
    Known(None, (_FULL,), "Make room there, or take another place"),
    Known(None, ("cannot write", "Disk quota exceeded"), "Make room there, or take another place"),
    Known(
        None, ("cannot write", "File too large"),
        "Its file system, or a limit, has no file as large: take another place, or qcow2 for a raw"
        " one",
    ),
    # --- directories of backups ---
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("as what a killed pull leaves",),
        "Remove the files called *.partial, which no restore writes now, or pull elsewhere",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("manifest.json", "exists already"),
        "Pull into another directory, or with --branch, by which backups follow one another in one",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("is pulled into",),
        "Wait until that is done, or take another directory",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("has backups of guest",), _ANOTHER_DIRECTORY
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("backups of branch", "not of"),
        f"{_ANOTHER_DIRECTORY}, or name the branch that there is",
    ),
    Known(None, ("a backup without a branch", "not of"), _ANOTHER_DIRECTORY),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("no increment of branch",),
        "--auto pulls disks whole where it must, --full all of them",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, (" has no backup",),
        "'backup-pull' makes backups, and a manifest.json with each",
    ),
    Known(
        libvirt.VIR_ERR_OPERATION_INVALID, ("is to be kept and is not whole",),
        "Nothing was removed: 'backup-verify' tells which points are good",
    ),
    Known(libvirt.VIR_ERR_OPERATION_FAILED, (" is not good: ",), _ANOTHER_POINT),
    Known(libvirt.VIR_ERR_OPERATION_FAILED, (" has no manifest of ",), _ANOTHER_POINT),
    Known(libvirt.VIR_ERR_OPERATION_FAILED, (": the newest point, ",), _ANOTHER_POINT),
    Known(
        None, ("cannot run ", _ABSENT),
        "Install QEMU's tools: in Debian qemu-utils and qemu-system-common have them",
    ),
)  # fmt: skip
"""What users meet most; the first that is about an error tells."""


def advice(error: libvirt.libvirtError) -> str | None:
    """What to do about ERROR; None where that is not known."""
    return next((known.advice for known in KNOWN if known.is_about(error)), None)
