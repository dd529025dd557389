# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every QMP command of a start fails in turn; nothing may remain of the start."""

import contextlib
import os
import pathlib
import resource
from collections.abc import Iterator

import pytest

import virtbackup
from tests.live import crashing, machines, proxy

FAULTS: tuple[proxy.Fault, ...] = ("refuse", "lose-reply", "hang-up-before", "hang-up-after")


@pytest.mark.usefixtures("unknown_qemu")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("extra", [(), ("-S",)], ids=["running", "paused"])
def test_each_command_of_a_start_fails_in_turn(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, fault: proxy.Fault, extra: tuple[str, ...]
) -> None:
    with (
        proxy.spoiled(tmp_path, *extra) as (machine, between),
        virtbackup.open(between.uri) as conn,
    ):
        dom = conn.lookupByID(1)
        before, files_before = machine.state(), crashing.files(tmp_path, state_dir)
        spoilt = []
        for number in range(100):
            between.arm(number, fault)
            xml = crashing.document(tmp_path, named=number % 2 == 0)
            try:
                dom.backupStart(xml)
            except virtbackup.Error:
                spoilt.append(between.spoilt)
                between.disarm()
                assert machine.state() == before, f"{fault} of {between.spoilt}"
                assert crashing.files(tmp_path, state_dir) == files_before, (
                    f"{fault} of {spoilt[-1]}"
                )
            else:
                break
        assert between.spoilt is None or between.spoilt in ("qom-list", "qom-get")
        assert {"nbd-server-start", "blockdev-add", "transaction", "block-export-add"} <= {*spoilt}
        between.disarm()
        dom.backupStop()
        assert machine.state() == before
        assert crashing.files(tmp_path, state_dir) == files_before


def test_each_command_of_a_stop_fails_in_turn_and_cleanup_finishes_it(
    tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    with proxy.spoiled(tmp_path) as (machine, between), virtbackup.open(between.uri) as conn:
        dom = conn.lookupByID(1)
        before, files_before = machine.state(), crashing.files(tmp_path, state_dir)
        outcomes = []
        for number in range(100):
            between.disarm()
            dom.backupStart(crashing.document(tmp_path, named=True))
            between.arm(number, "hang-up-after")
            try:
                dom.backupStop()
                outcomes.append("good")
            except virtbackup.Error:
                outcomes.append("error")
            reached = between.spoilt
            between.disarm()
            crashing.finish(dom)
            assert machine.state() == before, reached
            assert crashing.files(tmp_path, state_dir) == files_before, reached
            if reached is None:
                break
        assert outcomes[-1] == "good"
        assert outcomes.count("error") > 5


@contextlib.contextmanager
def descriptors(left: int) -> Iterator[None]:
    """With room for no more than so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
def test_a_start_that_has_too_few_descriptors_is_undone(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, named: bool
) -> None:
    """Wherever it runs out of them, that is an error of the call, as of any other."""
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(crashing.document(tmp_path, named=named))
        dom.backupStop()
        before, files_before = machine.state(), crashing.files(tmp_path, state_dir)
        said = []
        for left in range(40):
            try:
                with descriptors(left):
                    dom.backupStart(crashing.document(tmp_path, named=named))
            except virtbackup.Error as failure:
                said.append(str(failure))
                assert machine.state() == before, failure
                assert crashing.files(tmp_path, state_dir) == files_before, failure
            else:
                dom.backupStop()
                break
        assert len(said) > 2
        assert all("Too many open files" in text for text in said), said
        assert machine.state() == before


def test_no_descriptor_for_the_monitor(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        with descriptors(0), pytest.raises(virtbackup.Error, match=f"'{machine.qmp}': Too many"):
            conn.listAllDomains()
        assert len(conn.listAllDomains()) == 1
