# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever happens to a backup: the verdict is right, nothing is left, and no write is lost.

What the guest, a client and the stop see is compared with tests/failuresdata, from which
docs/failures.md is made (python -m tests.failures).
"""

import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import virtbackup
from tests import conftest, failures
from tests.live import faults, machines, places, scene

SPACE = 24 << 20


@pytest.fixture
def scratch(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pathlib.Path]:
    """A small file system of its own for scratch images."""
    with places.small_file_system(tmp_path_factory.mktemp("small"), SPACE) as path:
        monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(path))
        yield path


@pytest.mark.needs("qemu-system-x86_64", "qemu-img", "mount")
@pytest.mark.parametrize("engine", machines.engines())
@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_whatever_happens(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    scratch: pathlib.Path,
    fault: faults.Fault,
    engine: str,
) -> None:
    with scene.scene(tmp_path, scratch, engine, fault.extra, fault.source, fault.iothread) as one:
        row = scene.play(one, fault.happens, fault.before)
        assert row.stop != "good" or scene.WRONG not in row.reader
        if engine == "hybrid":
            assert scene.WRONG not in row.reader
        assert scene.leftovers(one, state_dir) == []
        one.undo.close()
        if not fault.ends_qemu:
            one.probe("quit")
            one.machine.process.wait()
        assert scene.lost_writes(one) == []
    failures.check(machines.version()[:2], engine, fault.name, row)


PULL = (
    "import sys; from virtbackup.nbd import copy; from virtbackup.tools import virsh_backup;"
    "plain = copy.copy;\n"
    "def late(*a, **k):\n"
    "    print('started', flush=True); sys.stdin.readline(); return plain(*a, **k)\n"
    "copy.copy = late; sys.exit(virsh_backup.main(sys.argv[1:]))"
)
NO_PULL = {"scratch-full-watched", "starter-killed", "owner-killed", "fifty-clients", "client-cut"}
"""Faults that take a client of the test's own, or who starts and ends backups himself."""
BEFORE_A_PULL = {
    "nothing", "job-cancelled", "export-deleted", "source-read-error", "qemu-killed",
    "server-before", "external-snapshot", "unplugged", "scratch-was-full",
}  # fmt: skip
"""Unless there is time, those of which something else is to be told."""


@pytest.mark.needs("qemu-system-x86_64", "qemu-img", "mount")
@pytest.mark.parametrize("engine", machines.engines())
@pytest.mark.parametrize(
    "fault",
    [
        fault
        for fault in faults.FAULTS
        if fault.name in BEFORE_A_PULL or (conftest.long() and fault.name not in NO_PULL)
    ],
    ids=lambda fault: fault.name,
)
def test_a_pull_to_which_it_happens(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    scratch: pathlib.Path,
    fault: faults.Fault,
    engine: str,
) -> None:
    """It ends well with what the disks held, or says why not and keeps nothing."""
    out, xml = tmp_path / "out", tmp_path / "backup.xml"
    with scene.scene(tmp_path, scratch, engine, fault.extra, fault.source, fault.iothread) as one:
        fault.before(one)
        xml.write_text(one.document())
        argv = [sys.executable, "-c", PULL, "-c", one.uri]
        argv += ["backup-pull", "1", str(out), "--xml", str(xml)]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as pull:
            assert pull.stdout is not None
            if pull.stdout.readline() == "started\n":
                for disk in scene.DISKS:
                    one.write(disk, 3, 2)
                fault.happens(one)
            _, said = pull.communicate("go\n", timeout=60)
        assert scene.leftovers(one, state_dir) == []
    recorded = failures.load(machines.version()[:2]).get(engine, {}).get(fault.name)
    if pull.returncode == 0:
        for disk in scene.DISKS:
            assert machines.contents(out / f"{disk}.qcow2", "qcow2") == scene.pattern(disk)
        assert recorded is None or recorded.stop == "good"
    else:
        assert pull.returncode == 1
        assert said.startswith("error: ")
        assert not out.exists()
        # One that is told good, and yet not pulled, could not be read, or was given up before.
        assert (
            recorded is None
            or (recorded.stop, recorded.reader) != ("good", scene.RIGHT)
            or ("given up before" in said)
        )


@pytest.mark.needs("qemu-system-x86_64", "qemu-img", "mount")
def test_hybrid_is_refused_where_it_is_not_right(
    tmp_path: pathlib.Path, scratch: pathlib.Path
) -> None:
    with scene.scene(tmp_path, scratch, "hybrid") as one, one.domain() as domain:
        if "hybrid" in machines.engines():
            domain.backupStart(one.document())
            assert domain.backupGetInfo().engine == "hybrid"
            domain.backupStop()
            return
        before = one.machine.state()
        with pytest.raises(virtbackup.Error, match="the hybrid engine is not for QEMU"):
            domain.backupStart(one.document())
        assert one.machine.state() == before
