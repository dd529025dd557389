# SPDX-License-Identifier: LGPL-2.1-or-later
"""We, or QEMU, end at any command of a branch's start and stop; whatever comes next, the following
incremental backup has every change since the last good one that somebody was told of, or it is
refused by disk and ``auto`` is full.

A stop that returned told it, and so did a second stop after one that was killed.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import libvirt
import pytest

import virtbackup
from tests import conftest, waiting
from tests.live import branched, callers, machines, proxy
from tests.live.branched import SIZE, Client

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "qemu-img"), pytest.mark.timeout(300)]

Call = Literal["start", "stop"]
Then = Literal["cleanup", "start", "stop"]
FOLLOW_UPS: tuple[Then, ...] = ("stop", "start", "cleanup")
ENGINES = machines.engines()
CHANGING = {
    "nbd-server-start", "add-fd", "blockdev-add", "remove-fd", "transaction", "block-export-add",
    "block-export-del", "job-cancel", "job-dismiss", "blockdev-del", "nbd-server-stop",
}  # fmt: skip
"""The commands after which QEMU is not what it was before."""

Spoil = tuple[int, proxy.Fault]


def rounds(
    commands: Sequence[str], faults: tuple[proxy.Fault, proxy.Fault]
) -> list[tuple[Spoil, Then]]:
    """Where to end a call that sends COMMANDS, and what comes then: before and after each, then
    everything; unless there is time for that, after each that changes something, then one thing."""
    long = conftest.long()
    return [
        ((number, fault), then)
        for number, command in enumerate(commands)
        if command in CHANGING or long
        for fault in (faults if command == "transaction" or long else faults[1:])
        for then in (
            FOLLOW_UPS if command == "transaction" or long else FOLLOW_UPS[number % 3 :][:1]
        )
    ]


class Sweep:
    """Rounds of a start and a stop, one of them ended before its time; what came of each."""

    def __init__(self, one: Client, disks: Sequence[str]) -> None:
        self.one, self.disks = one, disks
        self.round = 0
        self.incremental: list[str] = []
        """After what the next incremental backup had all changes."""
        self.refused: dict[str, str] = {}
        """After what it was refused, and why."""

    def write(self, machine: machines.Machine) -> None:
        """Let the guest write where it did not the last few times."""
        for disk in self.disks:
            self.one.write(machine, disk, self.round * 7 % 60)
        self.round += 1

    def begin(self) -> None:
        self.one.start(disks=self.disks)

    def follow_up(self, then: Then) -> None:
        """What a user does who finds that a start or stop was killed. Where the backup that was
        started runs after all, its client reads it and it is stopped."""
        domain_error = (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
        try:
            if then == "cleanup":
                with self.one.domain() as domain:
                    domain.backupCleanup()
            elif then == "start":
                self.check("next start")
            else:
                self.one.stop()
        except virtbackup.Error as failure:
            if then == "stop" and failure.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED:
                return
            assert failure.get_error_code() in domain_error, failure
            with contextlib.suppress(virtbackup.Error):
                self.one.stop(cancel=True)

    def check(self, where: str) -> None:
        """The next backup: incremental and whole; or refused by every disk that auto has full."""
        one = self.one
        try:
            one.start(type="incremental", disks=self.disks)
        except virtbackup.Error as failure:
            if failure.get_error_code() != virtbackup.errors.CHECKPOINT_INCONSISTENT:
                raise
            self.refused[where] = str(failure)
            for disk in one.start(disks=self.disks).disks:
                assert (f"disk '{disk.name}': " in str(failure)) == (disk.type == "full")
        else:
            self.incremental.append(where)
        one.read()
        one.stop()


def leftovers(machine: machines.Machine, state_dir: pathlib.Path) -> list[str]:
    """What of ours is there after all, but for bitmaps of the branch."""
    said = str(machine.state())
    left = sorted(set(re.findall(r"virtbackup-[0-9a-f]{8}[-\w]*", said)))
    return left + [str(path) for path in state_dir.glob("*.json")]


# --- we are killed --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    branched.close()


@contextlib.contextmanager
def watched(
    directory: pathlib.Path,
) -> Iterator[tuple[machines.Machine, proxy.Proxy, callers.Caller]]:
    """A machine, somebody between it and us, and who calls by way of him."""
    with (
        machines.two_disks(directory, size=SIZE) as machine,
        proxy.Proxy(directory, machine.qmp) as between,
        callers.Caller(between.uri) as caller,
        contextlib.closing(branched),
    ):
        yield machine, between, caller


def client(directory: pathlib.Path, engine: str) -> Client:
    return Client(directory, f"qmp://{directory}/proxy.sock?engine={engine}")


@pytest.mark.parametrize("call", ["start", "stop"])
@pytest.mark.parametrize("engine", ENGINES if conftest.long() else ENGINES[-1:])
def test_we_are_killed(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, call: Call, engine: str
) -> None:
    with watched(tmp_path) as (machine, between, caller):
        sweep = Sweep(client(tmp_path, engine), ("vda", "sdb"))
        sweep.check("first")
        sweep.refused.clear()
        todo = rounds(dry_run(sweep, between, call), ("kill-before", "kill-after"))
        rest = leftovers(machine, state_dir)
        ends = [kill(sweep, machine, between, caller, call, *round) for round in todo]
        assert leftovers(machine, state_dir) == rest
        assert ends.count(False) > 12, [*zip(todo, ends, strict=True)]
    # A killed start is undone, or runs, and a stop that was killed is done again: where it set the
    # point and nobody asks for the verdict, there is none any more.
    untold = {where for where in sweep.refused if call == "stop" and "then stop" not in where}
    assert set(sweep.refused) == untold
    assert len(sweep.incremental) > len(todo) // 2
    for why in sweep.refused.values():
        assert "disk 'vda': its last good backup is not known any more; disk 'sdb': its" in why


def kill(
    sweep: Sweep,
    machine: machines.Machine,
    between: proxy.Proxy,
    caller: callers.Caller,
    call: Call,
    spoil: Spoil,
    then: Then,
) -> bool:
    """One round; whether the call had come to its end, as it did not get to that command."""
    one = sweep.one
    sweep.write(machine)
    if call == "start":
        status = caller.spoilt(between, spoil, "", "backupStart", one.document(disks=sweep.disks))
    else:
        sweep.begin()
        one.read()
        sweep.write(machine)
        status = caller.spoilt(between, spoil, "", "backupStop")
        if status == 0:
            one.copies.update(one.pending)
    where = f"{spoil[1]} {spoil[0]} {between.spoilt}, then {then}"
    between.disarm()
    sweep.write(machine)
    if call == "start" and status == 0:
        one.stop(cancel=True)
    elif status != 0:
        if call == "start" and then == "stop":
            with contextlib.suppress(virtbackup.Error):
                one.read()
        sweep_follow_up(sweep, then, where)
    sweep.write(machine)
    sweep.check(where)
    assert not any("-next-" in name for name in branched.bitmaps(machine)), where
    return status == 0


def sweep_follow_up(sweep: Sweep, then: Then, where: str) -> None:
    """As ``Sweep.follow_up``; a next start counts by what came before it."""
    before = len(sweep.incremental)
    sweep.follow_up(then)
    if "next start" in sweep.refused:
        sweep.refused[where] = sweep.refused.pop("next start")
    sweep.incremental[before:] = [where] * (len(sweep.incremental) - before)


# --- QEMU ends ------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_qemu(
    directory: pathlib.Path, how: Literal["killed", "quit"]
) -> Iterator[tuple[machines.Machine, proxy.Proxy]]:
    """A QEMU with the image in DIRECTORY; clients of the proxy see its pid. It can end as HOW."""
    argv = machines.two_disks_of(directory)[:4]
    with proxy.taken_for_qemu(directory, *argv) as (machine, between):

        def end() -> None:
            machine.probe.reply("quit")
            machine.process.wait(waiting.DEADLINE)

        if how == "quit":
            between.kill_qemu = end
        yield machine, between


@pytest.mark.parametrize("call", ["start", "stop"])
@pytest.mark.parametrize("how", ["quit", "killed"])
@pytest.mark.parametrize("engine", ENGINES if conftest.long() else ENGINES[-1:])
def test_qemu_ends(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    call: Call,
    how: Literal["killed", "quit"],
    engine: str,
) -> None:
    machines.image(tmp_path / "a.qcow2", SIZE, "qcow2")
    sweep = Sweep(client(tmp_path, engine), ("vda",))
    with new_qemu(tmp_path, how) as (machine, between):
        sweep.check("first")
        commands = dry_run(sweep, between, call)
    sweep.refused.clear()
    todo = rounds(commands, ("kill-qemu-before", "kill-qemu-after"))
    if how == "killed" and not conftest.long():  # it is all one then
        todo = todo[::3]
    told: dict[str, bool] = {}
    """After what the stop was good all the same."""
    with contextlib.ExitStack() as last:
        machine, between = last.enter_context(new_qemu(tmp_path, how))
        for spoil, then in todo:
            sweep.write(machine)
            where, good = end_qemu(sweep, machine, between, call, spoil, then)
            told[where] = good
            last.close()
            machine, between = last.enter_context(new_qemu(tmp_path, how))
            sweep_follow_up(sweep, then, where)
            sweep.write(machine)
            sweep.check(where)
            assert leftovers(machine, state_dir) == [], where
    if how == "killed":
        assert set(sweep.refused) == set(told)
        return
    # Nothing is lost by a shutdown, but for a point that was set and nobody was told of.
    assert all("transaction" in where and "after" in where for where in sweep.refused)
    assert len(sweep.refused) == (len(FOLLOW_UPS) if call == "stop" else 0)
    assert call == "start" or any(told.values())


def dry_run(sweep: Sweep, between: proxy.Proxy, call: Call) -> list[str]:
    """The commands of CALL, in order, as ``end_qemu`` does it."""
    one = sweep.one
    document = one.document(disks=sweep.disks)
    with one.domain() as domain:
        between.disarm()
        domain.backupStart(document)
        started = list(between.commands)
        one.read()
        between.disarm()
        domain.backupStop()
        one.copies.update(one.pending)
        return started if call == "start" else list(between.commands)


def end_qemu(
    sweep: Sweep,
    machine: machines.Machine,
    between: proxy.Proxy,
    call: Call,
    spoil: Spoil,
    then: Then,
) -> tuple[str, bool]:
    """QEMU ends in the middle of CALL; (where, whether that was good all the same)."""
    one = sweep.one
    document = one.document(disks=sweep.disks)
    with one.domain() as domain:
        if call == "stop":
            domain.backupStart(document)
            one.read()
            sweep.write(machine)
        between.arm(*spoil)
        try:
            if call == "start":
                domain.backupStart(document)
            else:
                domain.backupStop()
        except virtbackup.Error:
            good = False
        else:
            good = True
    where = f"{spoil[1]} {spoil[0]} {between.spoilt}, then {then}"
    machine.process.wait(waiting.DEADLINE)
    if good and call == "stop":
        one.copies.update(one.pending)
    one.pending.clear()
    return where, good
