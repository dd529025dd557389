# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt's own backup job: what is begun, what is told, what is refused."""

from collections.abc import Callable

import libvirt
import pytest

from tests.test_backup_conf import DOMAIN
from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, domain_conf, native_conf, native_job, storage_conf
from virtbackup.qemu import libvirt_native

PROPOSAL = """<domainbackup>
  <address type="unix" path="/x"/>
  <disks>
    <disk name="vda"{}/>
    <disk name="vdb"><source file="/own"/></disk>
    <disk name="sdro" present="no"/>
  </disks>
</domainbackup>"""

NATIVE = """<domainbackup mode="pull">
  <server transport="tcp" name="h" port="7"/>
  <disks>
    <disk name="vda" backup="yes" type="file" exportname="e"><scratch file="/s"/></disk>
  </disks>
</domainbackup>"""


def _domain() -> domain_conf.DomainDef:
    return DOMAIN


def _image(disk: str) -> str:
    return native_job.image_path("/scratch", disk, "0a1b")


def _begin(document: str, quiesce: bool = False) -> native_conf.BackupDef:
    return native_job.begin(document, quiesce, _domain, _image)


def test_every_disk_that_takes_part_gets_an_image() -> None:
    begun = _begin(PROPOSAL.format(""))
    assert begun.server == native_conf.UnixServer("/x")
    images = {disk.name: (disk.backup, disk.image) for disk in begun.disks}
    assert images == {
        "vda": (True, native_conf.Image("/scratch/virtbackup-libvirt-0a1b.vda")),
        "vdb": (True, native_conf.Image("/own")),
        "sdro": (False, None),
        "sdempty": (False, None),
    }


def test_libvirts_own_dialect_is_begun_too() -> None:
    [vda] = [disk for disk in _begin(NATIVE).disks if disk.backup]
    assert (vda.exportname, vda.image) == ("e", native_conf.Image("/s"))


@pytest.mark.parametrize(
    ("document", "quiesce", "code", "text"),
    [
        (
            PROPOSAL.format(""),
            True,
            libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
            "argument unsupported: libvirt's own backup does not quiesce",
        ),
        (
            "<domainbackup><address type='unix' path='/x'/><branch name='b'/></domainbackup>",
            False,
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            "unsupported configuration: branch 'b': libvirt's own backup has checkpoints, no"
            " branches",
        ),
        (
            PROPOSAL.format(" type='auto'"),
            False,
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            "unsupported configuration: disk 'vda': type='auto' cannot be said in libvirt's own",
        ),
    ],
)
def test_what_libvirts_own_has_not(document: str, quiesce: bool, code: int, text: str) -> None:
    with pytest.raises(errors.Error) as caught:
        _begin(document, quiesce)
    assert caught.value.get_error_code() == code
    assert str(caught.value).startswith(text)


def test_what_runs_is_told() -> None:
    definition = native_job.running(NATIVE, _domain)
    assert definition.address == backup_conf.IpAddress("h", 7)
    assert {disk.name: disk.present for disk in definition.disks} == {
        "vda": True,
        "vdb": False,
        "sdro": False,
        "sdempty": False,
    }
    assert definition.disks[0].source == storage_conf.Source(file="/s")
    sizes = {"vda": 1 << 30}
    assert native_job.info(definition, 1.5, sizes.__getitem__) == backup_conf.BackupInfo(
        state="running",
        started=1.5,
        address=definition.address,
        engine="libvirt",
        scratch_failure="guest",
        disks=(backup_conf.DiskInfo("vda", "e", "running", None, 1 << 30, None),),
    )


def test_an_export_without_a_name_has_the_disks() -> None:
    definition = backup_conf.BackupDef(
        backup_conf.UnixAddress("/x"), (backup_conf.BackupDiskDef("vda", present=True),)
    )
    [vda] = native_job.info(definition, 0, lambda disk: 1).disks
    assert vda.export == "vda"


@pytest.mark.parametrize(
    ("made", "code", "text"),
    [
        (
            native_job.another_runs,
            libvirt.VIR_ERR_OPERATION_INVALID,
            "Requested operation is not valid: another backup job is already running",
        ),
        (
            native_job.none_runs,
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
            "Domain backup job id not found: no domain backup job present",
        ),
        (
            native_job.not_good,
            libvirt.VIR_ERR_OPERATION_FAILED,
            "operation failed: the backup is not good: the domain ended",
        ),
        (
            native_job.does_not_end,
            libvirt.VIR_ERR_OPERATION_TIMEOUT,
            "Timed out during operation: libvirt's backup job does not end",
        ),
    ],
)
def test_errors(made: Callable[[], errors.Error], code: int, text: str) -> None:
    assert (made().get_error_code(), str(made())) == (code, text)


class Job:
    """A domain of libvirt's with a job, be it a backup, and its connection."""

    def __init__(self) -> None:
        self.document: str | None = None
        self.aborted = 0
        self.refuses = False

    def lookup(self, ref: hypervisor.DomainRef) -> "Job":
        return self

    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return DOMAIN_XML

    def close(self) -> None:
        """The connection."""

    def backupBegin(self, document: str, checkpoint: None, flags: int) -> None:
        self.document = document

    def backupGetXMLDesc(self, flags: int) -> str:
        if self.document is None:
            raise native_job.none_runs()
        return self.document

    def abortJob(self) -> None:
        if self.refuses:
            raise errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "cannot acquire a lock")
        self.aborted += 1
        self.document = None

    def isActive(self) -> int:
        return 1

    def jobInfo(self) -> list[int]:
        return [libvirt.VIR_DOMAIN_JOB_NONE]


DOMAIN_XML = """<domain type="kvm"><name>vm</name><devices>
  <disk type="file" device="disk"><source file="/a"/><target dev="vda"/></disk>
</devices></domain>"""
ALONE = '<domainbackup><address type="unix" path="/x"/></domainbackup>'
REF = hypervisor.DomainRef("vm", "6a1b5b0c-0000-4000-8000-000000000001", 1)


def _owned(job: Job) -> libvirt_native.NativeDriver:
    """With a backup that is to end with it."""
    made = libvirt_native.NativeDriver(job)  # type: ignore[arg-type]
    made.domain_backup_start(REF, ALONE, hypervisor.START_AUTODESTROY)
    return made


def test_what_is_to_end_with_us_does_though_its_stop_was_refused() -> None:
    job = Job()
    made = _owned(job)
    job.refuses = True
    with pytest.raises(errors.Error, match="cannot acquire a lock"):
        made.domain_backup_stop(REF, 0)
    job.refuses = False
    made.close()
    assert job.aborted == 1


@pytest.mark.parametrize("asked", [False, True], ids=["close", "stop"])
def test_no_other_job_is_aborted_for_ours(asked: bool) -> None:
    """Ours has ended; a migration runs, or where a stop was told so another backup, too."""
    job = Job()
    made = _owned(job)
    job.document = None
    if asked:
        with pytest.raises(errors.Error, match="no domain backup job present"):
            made.domain_backup_stop(REF, 0)
        job.document = NATIVE
    made.close()
    assert job.aborted == 0
