# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt's own backup job: what is begun, what is told, what is refused."""

import concurrent.futures
import json
import threading
import types
from collections.abc import Callable
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from tests import waiting
from tests.test_backup_conf import DOMAIN
from virtbackup import errors, hypervisor, native
from virtbackup.conf import backup_conf, domain_conf, native_conf, native_job, storage_conf
from virtbackup.qemu import libvirt_native as qemu_native
from virtbackup.remote import libvirt_native, protocol
from virtbackup.tools import virsh_connection

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


# --- somebody else's job --------------------------------------------------------------------------

REF = hypervisor.DomainRef("vm", "c0ffee00-0000-4000-8000-000000000001", 1)
THEIRS = """<domainbackup mode='pull'>
  <server transport='unix' socket='/theirs'/>
  <disks>
    <disk name='vda' backup='yes' type='file' backupmode='full' exportname='vda' index='4'>
      <driver type='qcow2'/>
      <scratch file='/a.qcow2.1700000000'/>
    </disk>
  </disks>
</domainbackup>"""
PUSH = """<domainbackup mode='push'>
  <disks>
    <disk name='vda' backup='yes' type='file' backupmode='full' index='4'>
      <driver type='qcow2'/>
      <target file='/push'/>
    </disk>
  </disks>
</domainbackup>"""


class Theirs:
    """A libvirt of one domain, which runs, and may have the backup that DOCUMENT tells: as the
    driver's host, as libvirt-python's domain, and as what a server answers."""

    def __init__(self) -> None:
        self.document: str | None = None
        self.failure: errors.Error | None = None
        """Of every question."""
        self.refusal: errors.Error | None = None
        """To abort a job."""
        self.status: dict[str, str] = {}
        """Of a disk's job in QEMU, where it has one: ``running`` unless said."""
        self.unheard: errors.Error | None = None
        """What is said to a command of the monitor."""
        self.behind: str | None = None
        """The backup that somebody waits to begin."""
        self.ends = False
        """The domain, as its job is aborted; it is transient."""
        self.gone = False
        self.aborted: list[str | None] = []

    def lookup(self, ref: hypervisor.DomainRef) -> "Theirs":
        self.check()
        return self

    def check(self) -> None:
        if self.gone:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, REF.name)

    def close(self) -> None:
        pass

    def backupBegin(self, document: str, checkpoint: str | None, flags: int) -> None:
        self.document = document

    def backupGetXMLDesc(self, flags: int) -> str:
        self.check()
        if self.failure is not None:
            raise self.failure
        if self.document is None:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
        return self.document

    def abortJob(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.aborted.append(self.document)
        self.document = self.behind
        self.gone = self.ends

    def qemuMonitorCommand(self, line: str, flags: int) -> str:
        self.check()
        if self.unheard is not None:
            raise self.unheard
        assert json.loads(line) == {"execute": "query-jobs"}
        assert self.document is not None
        disks = [disk.name for disk in native_conf.BackupDef.parse(self.document).disks]
        jobs = [
            {"id": f"backup-{disk}-libvirt-2-format", "type": "backup", "status": status}
            for disk, status in (dict.fromkeys(disks, "running") | self.status).items()
            if status
        ]
        return json.dumps({"return": jobs, "id": "libvirt-25"})

    def isActive(self) -> int:
        self.check()
        return 1

    def of(self, ref: hypervisor.DomainRef, name: str, *args: Any, of: Any = None) -> Any:
        match name:
            case "DOMAIN_BACKUP_BEGIN":
                self.backupBegin(*args)
            case "DOMAIN_BACKUP_GET_XML_DESC":
                return types.SimpleNamespace(xml=self.backupGetXMLDesc(*args))
            case "DOMAIN_ABORT_JOB":
                self.abortJob()
            case "DOMAIN_MONITOR_COMMAND":
                assert of is protocol.QEMU
                return types.SimpleNamespace(result=self.qemuMonitorCommand(*args))
            case "DOMAIN_IS_ACTIVE":
                return types.SimpleNamespace(active=self.isActive())
        return None


@pytest.fixture(params=["libvirt", "a server"])
def doors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Theirs, Any, Any, Callable[[], None]]:
    """A libvirt, and what starts, stops and closes on it."""
    theirs = Theirs()
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda d, *a: d.qemuMonitorCommand(*a))
    if request.param == "libvirt":
        driver = qemu_native.NativeDriver(theirs)  # type: ignore[arg-type]
        return theirs, driver.domain_backup_start, driver.domain_backup_stop, driver.close
    jobs = native.NativeJobs(libvirt_native.Calls(theirs.of))
    return theirs, jobs.start, jobs.stop, jobs.close


OURS = "<domainbackup><address type='unix' path='/x'/></domainbackup>"


def test_a_push_is_not_stopped(doors: tuple[Theirs, Any, Any, Callable[[], None]]) -> None:
    theirs, _, stop, _ = doors
    theirs.document = PUSH
    with pytest.raises(errors.Error, match="that pulls: libvirt's own pushes") as caught:
        stop(REF, 0)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
    assert theirs.aborted == []
    theirs.document = THEIRS
    stop(REF, 0)
    assert theirs.aborted == [THEIRS]


@pytest.mark.parametrize("then", [None, PUSH, THEIRS])
def test_only_the_backup_that_was_started_ends_with_its_connection(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], then: str | None
) -> None:
    """Somebody has ended it, and another one runs, or none."""
    theirs, start, _, close = doors
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    theirs.document = then
    close()
    assert theirs.aborted == []
    theirs.document = None
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    begun = theirs.document
    close()
    assert theirs.aborted == [begun]


def test_who_had_a_backup_that_ends_with_the_connection_stops_no_other(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
) -> None:
    theirs, start, stop, _ = doors
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    theirs.document = THEIRS
    with pytest.raises(errors.Error, match="ended by somebody else, and another one runs"):
        stop(REF, hypervisor.STOP_CANCEL)
    assert theirs.aborted == []


def test_a_backup_that_has_ended_is_none_that_is_to_end_with_the_connection(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
) -> None:
    theirs, start, stop, close = doors
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    theirs.document = None
    with pytest.raises(errors.Error, match="no domain backup job present"):
        stop(REF, 0)
    start(REF, OURS.replace("/x", "/y"), 0)
    close()
    assert theirs.aborted == []
    stop(REF, 0)
    assert len(theirs.aborted) == 1


def test_a_backup_that_begins_right_behind_is_not_waited_for(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libvirt lets one begin that has waited for this one's end."""
    monkeypatch.setattr(native, "END_TIMEOUT", 0.1)
    theirs, start, stop, _ = doors
    start(REF, OURS, 0)
    theirs.behind = THEIRS
    stop(REF, 0)
    assert len(theirs.aborted) == 1


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_domain_that_is_gone_as_its_job_ends(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    is_lost: bool,
) -> None:
    """As a save that waits for the backup's end begins at once: the backup was good. It was not
    where the domain ended before its jobs were asked for."""
    theirs, _, stop, _ = doors
    theirs.document = THEIRS
    if is_lost:

        def end(*_: object) -> None:
            theirs.gone = True
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")

        monkeypatch.setattr(theirs, "qemuMonitorCommand", end)
        with pytest.raises(errors.Error, match="the backup is not good: the domain ended"):
            stop(REF, 0)
        return
    theirs.ends = True
    stop(REF, 0)
    theirs.gone, theirs.document = False, THEIRS
    stop(REF, hypervisor.STOP_CANCEL)


def test_two_threads_begin_one_backup(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is late is refused, where libvirt would have it wait for half a minute."""
    theirs, start, _, _ = doors
    entered, leave, begun = threading.Event(), threading.Event(), []

    def begin(document: str, *_: object) -> None:
        begun.append(document)
        entered.set()
        assert leave.wait(waiting.DEADLINE)
        theirs.document = document

    monkeypatch.setattr(theirs, "backupBegin", begin)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(start, REF, OURS, 0)
        assert entered.wait(waiting.DEADLINE)
        second = pool.submit(start, REF, OURS, 0)
        concurrent.futures.wait([second], 0.05)
        leave.set()
        assert first.result() is None
        with pytest.raises(errors.Error, match="another backup job is already running"):
            second.result()
    assert len(begun) == 1


@pytest.mark.parametrize("begins", [False, True])
def test_no_capacity_is_asked_for_while_scratch_images_are_made(
    monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """libvirt tells of the backup by then; QEMU 7.2 would die of what it is asked."""
    theirs = Theirs()
    theirs.document = THEIRS
    calls, asked = libvirt_native.Calls(theirs.of), []

    def capacity(ref: hypervisor.DomainRef, disk: str) -> int:
        asked.append(disk)
        return 7

    monkeypatch.setattr(calls, "definition", lambda ref: DOMAIN)
    monkeypatch.setattr(calls, "stats", lambda ref: {})
    monkeypatch.setattr(calls, "has_job", lambda ref, disk: not begins)
    monkeypatch.setattr(calls, "capacity", capacity)
    jobs = native.NativeJobs(calls)
    if not begins:
        assert [disk.capacity for disk in jobs.get_info(REF).disks] == [7]
        return
    with pytest.raises(errors.Error, match="begins or ends just now") as caught:
        jobs.get_info(REF)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
    assert asked == []


# --- a libvirt that is restarted meanwhile ---


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> errors.Error:
    """What is said while it is away; who waits for it looks at once."""
    monkeypatch.setattr(native, "_TRY_AGAIN", 0.0)
    text = "End of file while reading data: Input/output error"
    return errors.Error(libvirt.VIR_ERR_SYSTEM_ERROR, text, domain=libvirt.VIR_FROM_RPC)


class Away:
    """A call that fails the first times, by FAILURE."""

    def __init__(self, call: Callable[..., Any], failure: BaseException, times: int) -> None:
        self._call, self._failure, self._times = call, failure, times

    def __call__(self, *args: Any) -> Any:
        self._times -= 1
        if self._times >= 0:
            raise self._failure
        return self._call(*args)


@pytest.mark.parametrize("flags", [0, hypervisor.START_AUTODESTROY])
@pytest.mark.parametrize("interrupted", [False, True])
def test_what_a_start_began_that_was_not_answered_is_ended(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    lost: errors.Error,
    flags: int,
    interrupted: bool,
) -> None:
    """libvirtd answers nobody any more once it is told to end, but does what it was asked for."""
    theirs, start, _, close = doors
    failure: BaseException = KeyboardInterrupt() if interrupted else lost

    def begin(document: str, *_: object) -> None:
        theirs.document = document
        monkeypatch.setattr(theirs, "backupGetXMLDesc", Away(theirs.backupGetXMLDesc, lost, 2))
        raise failure

    monkeypatch.setattr(theirs, "backupBegin", begin)
    with pytest.raises(type(failure)):
        start(REF, OURS, flags)
    assert len(theirs.aborted) == 1
    close()
    assert len(theirs.aborted) == 1


@pytest.mark.parametrize("others", [None, PUSH, THEIRS])
def test_a_start_that_began_nothing_ends_nothing(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    lost: errors.Error,
    others: str | None,
) -> None:
    theirs, start, _, close = doors

    def begin(*_: object) -> None:
        theirs.document = others
        raise lost

    monkeypatch.setattr(theirs, "backupBegin", begin)
    with pytest.raises(errors.Error, match="End of file"):
        start(REF, OURS, hypervisor.START_AUTODESTROY)
    close()
    assert theirs.aborted == []


def test_what_a_start_has_left_is_told(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lost: errors.Error,
) -> None:
    theirs, start, _, _ = doors

    def begin(*_: object) -> None:
        theirs.failure = errors.Error(libvirt.VIR_ERR_ACCESS_DENIED, "x")
        raise lost

    monkeypatch.setattr(theirs, "backupBegin", begin)
    with pytest.raises(errors.Error, match="End of file"):
        start(REF, OURS, 0)
    [left] = [record for record in caplog.records if record.name.endswith(".left")]
    assert left.getMessage() == (
        "a backup of domain 'vm' that may have begun runs on until virsh domjobabort ends it: x"
    )


@pytest.mark.parametrize("call", ["backupGetXMLDesc", "qemuMonitorCommand", "abortJob"])
def test_who_began_a_backup_waits_for_libvirt_to_stop_it(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    lost: errors.Error,
    call: str,
) -> None:
    theirs, start, stop, _ = doors
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    theirs.document = native_conf.BackupDef.parse(THEIRS.replace("/theirs", "/x")).format()
    monkeypatch.setattr(theirs, call, Away(getattr(theirs, call), lost, 3))
    stop(REF, 0)
    assert len(theirs.aborted) == 1


def test_others_do_not_wait_for_libvirt(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    lost: errors.Error,
) -> None:
    theirs, start, stop, close = doors
    start(REF, OURS, 0)
    assert theirs.document is not None
    monkeypatch.setattr(theirs, "backupGetXMLDesc", Away(theirs.backupGetXMLDesc, lost, 1))
    with pytest.raises(errors.Error, match="End of file"):
        stop(REF, 0)
    close()
    assert theirs.aborted == []


def test_what_is_to_end_with_us_waits_for_libvirt_to_end(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    lost: errors.Error,
) -> None:
    theirs, start, _, close = doors
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    monkeypatch.setattr(theirs, "abortJob", Away(theirs.abortJob, lost, 2))
    close()
    assert len(theirs.aborted) == 1


@pytest.mark.parametrize("status", ["concluded", "aborting", ""])
def test_a_job_that_ended_before_the_stop_had_no_good_backup(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], status: str
) -> None:
    """Its export has told since then what the guest wrote; libvirt may not know of it yet."""
    theirs, _, stop, _ = doors
    theirs.document, theirs.status = THEIRS, {"vda": status, "vda2": "running"}
    with pytest.raises(
        errors.Error, match=r"not good: disk 'vda': its backup job ended$"
    ) as caught:
        stop(REF, 0)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    assert theirs.aborted == [THEIRS]
    theirs.document = THEIRS
    stop(REF, hypervisor.STOP_CANCEL)
    assert theirs.aborted == [THEIRS, THEIRS]


@pytest.mark.parametrize(
    ("code", "domain"),
    [
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC),
        (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_FROM_QEMU),
    ],
)
def test_a_job_of_which_nothing_is_heard_may_run_on(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], code: int, domain: int
) -> None:
    theirs, _, stop, _ = doors
    theirs.document = THEIRS
    theirs.unheard = errors.Error(code, "client socket is closed", domain=domain)
    with pytest.raises(errors.Error, match="client socket is closed"):
        stop(REF, 0)
    assert theirs.aborted == []
    theirs.unheard = None
    stop(REF, 0)


@pytest.mark.parametrize("reply", ["", "[]", '{"return": [{}]}', '{"error": {"desc": "x"}}'])
def test_jobs_that_cannot_be_read(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], monkeypatch: pytest.MonkeyPatch, reply: str
) -> None:
    theirs, _, stop, _ = doors
    theirs.document = THEIRS
    monkeypatch.setattr(theirs, "qemuMonitorCommand", lambda *_: reply)
    with pytest.raises(errors.Error, match="unexpected reply of QEMU to 'query-jobs'"):
        stop(REF, 0)
    assert theirs.aborted == []


@pytest.mark.parametrize("then", [None, PUSH])
def test_a_backup_that_somebody_ends_as_it_is_stopped(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    then: str | None,
) -> None:
    """Whether before its jobs were asked for, cannot be told; what runs then is not ended."""
    theirs, _, stop, _ = doors

    theirs.document = THEIRS
    told = theirs.qemuMonitorCommand('{"execute": "query-jobs"}', 0)

    def ended(*_: object) -> str:
        theirs.document = then
        return told

    monkeypatch.setattr(theirs, "qemuMonitorCommand", ended)
    with pytest.raises(errors.Error, match="the backup is not good: somebody else ended it"):
        stop(REF, 0)
    assert theirs.aborted == []


def test_a_backup_whose_jobs_ran_at_its_stop_is_good_whoever_ends_it(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, _, stop, _ = doors

    def ended(*_: object) -> None:
        theirs.document = None
        text = "no job is active on the domain"
        raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)

    monkeypatch.setattr(theirs, "abortJob", ended)
    theirs.document = THEIRS
    stop(REF, 0)


@pytest.mark.parametrize("of", ["failure", "refusal"])
def test_what_is_to_end_with_us_does_though_its_stop_was_refused(
    doors: tuple[Theirs, Any, Any, Callable[[], None]], of: str
) -> None:
    theirs, start, stop, close = doors
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    begun = theirs.document
    setattr(theirs, of, errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "cannot acquire a lock"))
    with pytest.raises(errors.Error, match="cannot acquire a lock"):
        stop(REF, 0)
    setattr(theirs, of, None)
    close()
    assert theirs.aborted == [begun]


LEFT = "the backup of domain 'vm' runs on until virsh domjobabort ends it: x"


@pytest.mark.parametrize(
    ("code", "told"), [(libvirt.VIR_ERR_RPC, [LEFT]), (libvirt.VIR_ERR_NO_DOMAIN, [])]
)
def test_what_cannot_be_ended_with_its_connection_is_told(
    doors: tuple[Theirs, Any, Any, Callable[[], None]],
    caplog: pytest.LogCaptureFixture,
    code: int,
    told: list[str],
) -> None:
    theirs, start, _, close = doors
    start(REF, OURS, hypervisor.START_AUTODESTROY)
    theirs.failure = errors.Error(code, "x")
    close()
    left = [record for record in caplog.records if record.name.endswith(".left")]
    assert [record.getMessage() for record in left] == told
    assert {record.name for record in left} <= set(virsh_connection._OF_WHAT_IS_LEFT)


def test_a_backup_is_known_by_its_server_and_the_scratch_images_that_it_names() -> None:
    """A libvirt that was started again has forgotten what the exports are called."""
    begun = native_conf.BackupDef.parse(THEIRS)
    bare = native_conf.BackupDef(mode="pull", server=native_conf.UnixServer("/theirs", tls=False))
    assert native_job.is_of(THEIRS.replace(" exportname='vda'", ""), begun)
    assert native_job.is_of(THEIRS, bare)
    assert not native_job.is_of(THEIRS.replace("/theirs", "/ours"), bare)
    assert not native_job.is_of(THEIRS.replace(".1700000000", ".1700000001"), begun)
    assert not native_job.is_of(PUSH, bare)
