# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever happens to a backup: the verdict is right, nothing is left, and no write is lost.

What the guest, a client and the stop see is compared with tests/failuresdata, from which
docs/failures.md is made (python -m tests.failures).
"""

import pathlib
from collections.abc import Iterator

import pytest

import virtbackup
from tests import failures
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
