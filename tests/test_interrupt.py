# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which commands of the shell change something, and that a signal comes into none of it: the table
of commands has to agree with the tables here."""

import pathlib
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import pytest

from tests import shell_driver, test_virsh_backup
from virtbackup import hypervisor
from virtbackup.conf import backup_conf
from virtbackup.tools import interrupt, serve, virsh_backup

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CHANGES = {
    "backup-cleanup": ["vm1"],
    "backup-pull": ["vm1", "{directory}/out"],
    "backup-start": ["vm1", "{directory}/backup.xml"],
    "backup-start-as": ["vm1", "--unix=/run/x.sock"],
    "backup-stop": ["vm1"],
    "branch-create": ["vm1", "--branch=weekly"],
    "branch-delete": ["vm1", "--branch=nightly"],
}
"""Those that change a guest, with arguments that a driver is called with."""

TRIED_ELSEWHERE = {
    "backup-prune": ("test_prune.py", "test_signals"),
    "backup-restore": ("test_restore.py", "test_signals"),
    "backup-serve": ("test_serve.py", "test_a_point"),
    "compare": ("test_libvirt.py", "test_a_comparison_that_is_interrupted_leaves_nothing"),
    "monitor-record": (
        "test_recordings.py", "test_a_signal_at_any_moment_leaves_the_guest_as_it_was",
    ),
    "monitor-replay": ("../test_test_driver.py", "test_monitor_replay_ends_when_interrupted"),
}  # fmt: skip
"""Those that change or hold something else than this file's driver has: where they are sent a
signal."""

LOOKS = """
    backup-dumpxml backup-info backup-list backup-map backup-verify branch-list cd connect
    domblklist domid dominfo domname domstate domuuid dumpxml echo exit help hostname list
    monitor-diff pwd quit rpc-dump translate uri version
"""


def test_every_command_is_known_to_change_something_or_not() -> None:
    known = [*CHANGES, *TRIED_ELSEWHERE, *LOOKS.split()]
    assert sorted(known) == sorted(command.name for command in virsh_backup.TABLE.commands)


@pytest.mark.parametrize("name", TRIED_ELSEWHERE)
def test_the_test_elsewhere_is_there(name: str) -> None:
    file, test = TRIED_ELSEWHERE[name]
    text = (pathlib.Path(__file__).parent / "live" / file).read_text()
    assert re.search(rf"^def {test}\(", text, re.MULTILINE)
    assert "signal" in text


class Driver(shell_driver.Driver):
    """Notes what a signal would do in the middle of a change."""

    handlers: list[object]

    def __init__(self, uri: str, readonly: bool) -> None:
        super().__init__(uri, readonly)
        self.backup = backup_conf.BackupDef.parse(test_virsh_backup.BACKUP)

    def note(self) -> None:
        Driver.handlers += [signal.getsignal(number) for number in SIGNALS]

    def domain_backup_start(self, domain: hypervisor.DomainRef, xml: str, flags: int) -> None:
        self.note()

    def domain_backup_stop(self, domain: hypervisor.DomainRef, flags: int) -> None:
        self.note()

    def domain_backup_cleanup(self, domain: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        self.note()
        return []

    def domain_branch_create(self, domain: hypervisor.DomainRef, name: str, flags: int) -> None:
        self.note()

    def domain_branch_delete(self, domain: hypervisor.DomainRef, name: str, flags: int) -> None:
        self.note()


@pytest.fixture(autouse=True)
def as_in_a_program() -> Iterator[None]:
    """The handlers that a program begins with."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        at_first = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, at_first)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("until", [interrupt.at_once, interrupt.held, interrupt.is_the_end])
def test_what_is_ignored_stays_so(until: Callable[[], AbstractContextManager[object]]) -> None:
    """As by nohup, or of a job in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with until():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("name", CHANGES)
def test_no_signal_comes_into_a_change(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "backup.xml").write_text(test_virsh_backup.BACKUP)
    Driver.handlers = []
    hypervisor.register("noting", Driver)
    at_first = [signal.getsignal(number) for number in SIGNALS]
    argv = [word.format(directory=tmp_path) for word in CHANGES[name]]
    virsh_backup.main(["-c", "noting:///", name, *argv])
    assert Driver.handlers, "no change was asked for"
    assert not set(map(id, at_first)) & set(map(id, Driver.handlers))
    assert [signal.getsignal(number) for number in SIGNALS] == at_first


def test_a_signal_that_does_not_break_the_wait_ends_it() -> None:
    """One that another thread gets; one that comes just before the wait is as one that does."""

    def tell() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    with subprocess.Popen(["sleep", "60"]) as process, tempfile.TemporaryFile() as log:
        server = serve.Server(process, log, backup_conf.UnixAddress("/x"))
        telling = threading.Timer(0.1, tell)

        def wait() -> None:
            with interrupt.deferred() as cancel:
                telling.start()
                server.wait(cancel)

        with pytest.raises(SystemExit):
            wait()
        assert process.poll() is None
        process.kill()
        telling.join()


def test_a_signal_as_a_hurried_block_has_ended_is_noted_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever comes behind the block, as what removes files, is not to be interrupted."""
    set_mask = signal.pthread_sigmask

    def strike(how: int, mask: Sequence[int]) -> set[int]:
        monkeypatch.setattr(signal, "pthread_sigmask", set_mask)
        signal.raise_signal(signal.SIGINT)
        return set_mask(how, mask)

    def pull() -> None:
        with interrupt.deferred() as cancel:
            before = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            with interrupt.hurried(cancel):
                monkeypatch.setattr(signal, "pthread_sigmask", strike)
            ended.append(signal.getsignal(signal.SIGINT) is before)

    monkeypatch.setattr(interrupt, "GOES_WELL", 0.0)
    ended: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        pull()
    assert ended == [True]
