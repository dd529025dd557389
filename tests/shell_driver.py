# SPDX-License-Identifier: LGPL-2.1-or-later
"""A third-party driver without a hypervisor; as a program, the shell with that driver at hand.

``fake:///NAME`` has the domains vm1 (disks vda, sdb and an empty sr0), ``7``, ``my vm`` and the
inactive ``off``. A backup lives as long as the connection. NAME asks for trouble: ``bad`` fails
every backup, ``hang`` and ``bug`` do so in every start, ``dies`` is dead after the first call,
``mute`` tells nothing of a backup that runs, ``theirs`` fails a start by libvirt-python's own
error, ``interrupt`` has a Ctrl-C in the middle of every change, ``interrupt-lost`` cannot end a
backup either, and ``interrupt-hang`` does not come to its end, and has another Ctrl-C in that.
``odd`` has one domain, ``ODD``, and nothing else is called otherwise there; its backups began at no
time. ``none`` has no domain.
"""

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Literal, TextIO

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, domain_conf
from virtbackup.tools import virsh_backup

if TYPE_CHECKING:
    import pytest

UUID = "6695eb01-f6a4-8304-79aa-97f2502e19{:02x}"

DOMAINS = (
    hypervisor.DomainRef("off", UUID.format(1), None),
    hypervisor.DomainRef("7", UUID.format(2), 2),
    hypervisor.DomainRef("my vm", UUID.format(3), 3),
    hypervisor.DomainRef("vm1", UUID.format(4), 1),
)

DISKS = (
    domain_conf.DiskDef("vda", source="/images/a.qcow2", format="qcow2", capacity=64 << 20),
    domain_conf.DiskDef("sdb", type="block", source="/dev/b", format="raw", readonly=True),
    domain_conf.DiskDef("sr0", device="cdrom"),
)

ODD = 'a"b\'c\\n\n\te\x01\x7f \u00e9\U0001f600 \udcff {"json": NaN}'
"""What a domain may be called; one byte of it is no UTF-8."""

FAILED = (
    "the backup is not good: disk 'vda': No space left on device\ndisk 'sdb': Input/output error"
)


class Driver:
    """A ``hypervisor.BackupDriver``."""

    def __init__(self, uri: str, readonly: bool) -> None:
        self.trouble = uri.removeprefix("fake:///")
        self.backup: backup_conf.BackupDef | None = None
        self.trace: TextIO | None = None
        self.calls = 0

    def close(self) -> None:
        if self.trace is not None:
            self.trace.write("closed\n")

    def get_type(self) -> str:
        return "FAKE"

    def get_version(self) -> int:
        return 1002003

    def is_alive(self) -> bool:
        return not (self.trouble == "dies" and self.calls)

    def set_trace(self, trace: TextIO | None) -> None:
        self.trace = trace

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        self.calls += 1
        if self.trace is not None:
            self.trace.write("list_domains\n")
        odd = (hypervisor.DomainRef(ODD, UUID.format(5), 1),)
        return {"odd": odd, "none": ()}.get(self.trouble, DOMAINS)

    def domain_get_state(self, domain: hypervisor.DomainRef) -> tuple[int, int]:
        state = libvirt.VIR_DOMAIN_SHUTOFF if domain.id is None else libvirt.VIR_DOMAIN_RUNNING
        return state, 0

    def domain_get_xml_desc(self, domain: hypervisor.DomainRef, flags: int) -> str:
        title = "Off duty" if domain.id is None else None
        return domain_conf.DomainDef(domain.name, domain.uuid, domain.id, DISKS, title).format()

    def domain_backup_start(self, domain: hypervisor.DomainRef, xml: str, flags: int) -> None:
        if self.trouble == "bug":
            raise RuntimeError("two\nlines")
        if self.trouble == "theirs":
            libvirt.virResetLastError()  # else it would say what some earlier call failed with
            raise libvirt.libvirtError("said by libvirt itself")
        if self.trouble == "hang":
            print("hanging", flush=True)
            threading.Event().wait()
        self._interrupt()
        if self.backup is not None:
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "already running")
        self.backup = backup_conf.BackupDef.parse(xml)
        print(f"flags={flags}", file=sys.stderr)

    def domain_backup_stop(self, domain: hypervisor.DomainRef, flags: int) -> None:
        self._running()
        if self.trouble == "interrupt-hang":
            self._interrupt()
            threading.Event().wait(60)
        self.backup = None
        if self.trouble == "interrupt-lost":
            raise errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "not now")
        if self.trouble == "interrupt":
            print(f"stopped, flags={flags}", file=sys.stderr)
        if self.trouble == "bad" and not flags:
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, FAILED)

    def domain_backup_get_xml_desc(self, domain: hypervisor.DomainRef, flags: int) -> str:
        return self._running().format()

    def domain_backup_get_info(
        self, domain: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        if self.trouble == "mute":
            raise errors.error(libvirt.VIR_ERR_RPC, "not now")
        state: Literal["running", "failed"] = "running"
        disks = (
            backup_conf.DiskInfo("vda", "vda", "running", None, 64 << 20, 196608, 1000),
            backup_conf.DiskInfo("sdb", "s/b", "running", None, 1 << 40, None, None),
        )
        if self.trouble == "bad":
            state, reason = "failed", "No space\nleft"
            bad = dataclasses.replace(
                disks[0], state="failed", reason=reason, warning="does not\nfit",
                scratch_worst_case=65 << 20, scratch_free=1 << 20,
            )  # fmt: skip
            info = backup_conf.BackupInfo(
                state, 1700000000.5, self._running().address, (bad, disks[1])
            )
            return dataclasses.replace(
                info, engine="hybrid", scratch_failure="guest", save_failure="save",
                save_reason="as QEMU has it",
            )  # fmt: skip
        if self.trouble == "odd":
            odd = (backup_conf.DiskInfo(ODD, ODD, "failed", ODD, 1 << 63, None, None),)
            address = self._running().address
            return backup_conf.BackupInfo("failed", float("nan"), address, odd, scratch_timeout=inf)
        return backup_conf.BackupInfo(state, 1700000000.5, self._running().address, disks)

    def domain_backup_cleanup(self, domain: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        self._interrupt()
        if self.trouble == "odd":
            return [ODD]
        return ["node scratch-vda", "file /images/x"] if self.trouble == "bad" else []

    def domain_branch_list(
        self, domain: hypervisor.DomainRef, flags: int
    ) -> Sequence[backup_conf.Branch]:
        if self.trouble == "bad":
            return []
        if self.trouble == "odd":
            disk = backup_conf.BranchDisk(ODD, 65536, None, True, ODD, None, ODD)
            return [backup_conf.Branch(ODD, False, (disk,))]
        point = backup_conf.Point("0123abcd", 1700000000)
        return [
            backup_conf.Branch(
                "nightly",
                False,
                (
                    backup_conf.BranchDisk("vda", 65536, 1 << 20, True, None, point),
                    backup_conf.BranchDisk(
                        "sdb", 512, None, False, "it was resized", point, "lost when it ends"
                    ),
                ),
            ),
            backup_conf.Branch(
                "cp1", True, (backup_conf.BranchDisk("vda", 4096, 0, True, "theirs", None),)
            ),
        ]

    def domain_branch_create(self, domain: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._interrupt()
        if name == "nightly":
            raise errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, f"there is a branch '{name}'")

    def domain_branch_delete(self, domain: hypervisor.DomainRef, name: str, flags: int) -> None:
        if name != "nightly":
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, f"no branch named '{name}'")

    def _interrupt(self) -> None:
        if self.trouble.startswith("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)

    def _running(self) -> backup_conf.BackupDef:
        if self.backup is None:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no domain backup job present")
        return self.backup


def main(*argv: str) -> int:
    """The shell, with the driver at hand."""
    hypervisor.register("fake", Driver)
    return virsh_backup.main(argv)


Output = tuple[int, str, str]
"""Exit status, standard output, standard error."""

Run = Callable[..., Output]


def runner(capsys: "pytest.CaptureFixture[str]") -> Run:
    """Runs the program in this process, on ``fake:///two`` where no ``uri`` is given."""

    def run(*argv: str, uri: str = "fake:///two") -> Output:
        status = main("-c", uri, *argv)
        return status, *capsys.readouterr()

    return run


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
