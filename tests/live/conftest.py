# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every live test gets: directories of its own for state and scratch, never the machine's."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from demo import guest, kernel, records
from tests.live import agents, libvirtd, machines
from virtbackup.qemu import watch

if "VIRTBACKUP_QEMU_ROOT" in os.environ:
    # These run what is installed, whatever QEMU is under test: ./dev test --matrix has it once.
    collect_ignore = ["test_copy.py", "test_demo.py", "test_incremental.py", "test_libvirt.py"]
    collect_ignore += ["test_drop_in.py", "test_events.py", "test_quiesce.py", "test_session.py"]
    collect_ignore += ["test_rpc_traffic.py", "test_rpc_libvirtd.py", "test_virtnbdbackup.py"]
    collect_ignore += ["test_daemon_virsh.py", "test_libvirt_queries.py", "test_examples.py"]
    collect_ignore += ["test_completion.py", "test_deb.py", "test_manual.py"]
    collect_ignore += ["test_docs_libvirt.py", "test_remote.py", "test_daemon_wire.py"]
    collect_ignore += ["test_libvirt_schema.py", "test_writer.py", "test_image.py"]


@pytest.fixture(scope="session", autouse=True)
def shared_dirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same for fixtures that many tests share, which begin before those of one test."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("VIRTBACKUP_STATE_DIR", "VIRTBACKUP_SCRATCH_DIR"):
            patch.setenv(variable, os.fspath(tmp_path_factory.mktemp("shared")))
        yield


@pytest.fixture(scope="session")
def known_capabilities(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where is kept what QEMU was found to be able to do, by all tests together."""
    return tmp_path_factory.mktemp("known")


@pytest.fixture(autouse=True)
def state_dir(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    known_capabilities: pathlib.Path,
) -> Iterator[pathlib.Path]:
    """Where status files go for the test and the processes it starts."""
    path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", os.fspath(path))
    _copy_new(known_capabilities, path)
    yield path
    _copy_new(path, known_capabilities)


def _copy_new(directory: pathlib.Path, to: pathlib.Path) -> None:
    for file in directory.glob("qemu-*.capabilities"):
        if file.is_file() and not (to / file.name).exists():
            shutil.copy(file, to)


@pytest.fixture
def unknown_qemu(state_dir: pathlib.Path) -> None:
    """What QEMU can do has to be asked of it, as the first time."""
    for file in state_dir.iterdir():
        file.unlink()


@pytest.fixture(autouse=True)
def scratch_dir(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """Where scratch images go for which nobody names a place; other runs have others."""
    path = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", os.fspath(path))
    return path


@pytest.fixture(scope="session")
def libvirt_host() -> Iterator[libvirtd.Host]:
    """A libvirtd of the tests' own."""
    if os.geteuid() != 0:
        pytest.skip("a libvirtd of one's own wants root")
    with tempfile.TemporaryDirectory(prefix="vb-libvirtd-", dir="/var/tmp") as name:
        pathlib.Path(name).chmod(0o755)
        daemon, images = pathlib.Path(name, "daemon"), pathlib.Path(name, "images")
        daemon.mkdir()
        images.mkdir()
        with libvirtd.host(daemon, images) as host:
            yield host


@pytest.fixture
def host(libvirt_host: libvirtd.Host) -> Iterator[libvirtd.Host]:
    """That libvirtd, started again where one of an earlier test has died; the test's images are
    gone afterwards."""
    libvirt_host.revive()
    yield libvirt_host
    for path in libvirt_host.directory.iterdir():
        if not path.is_dir():
            path.unlink()


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at the guest while a backup runs: where a ``backup-begin`` is refused just then,
    libvirt 9.0 dies (docs/libvirt.md)."""
    monkeypatch.setattr(watch, "LOOK", 3600.0)


@pytest.fixture(scope="module")
def boot() -> Iterator[agents.Boot]:
    """A guest that runs the guest agent."""
    with tempfile.TemporaryDirectory(prefix="vb-agent-", dir="/var/tmp") as name:
        pathlib.Path(name).chmod(0o755)
        try:
            yield agents.Boot(pathlib.Path(name))
        except kernel.Unavailable as error:
            pytest.skip(f"no kernel for the guest: {error}")


@pytest.fixture(scope="module")
def linux() -> Iterator[guest.Guest]:
    """A guest that writes records to two disks all the time."""
    with tempfile.TemporaryDirectory(prefix="vb-guest-", dir="/var/tmp") as name:
        try:
            one = guest.start(pathlib.Path(name), machines.INTO_ROOT)
        except kernel.Unavailable as error:
            pytest.skip(f"no kernel for the guest: {error}")
        with one:
            one.wait_for_number(records.DISKS[0].slots)
            yield one
