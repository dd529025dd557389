# SPDX-License-Identifier: LGPL-2.1-or-later
"""We are killed before and after every QMP command; whoever comes next finds all that is ours."""

import os
import pathlib
import re
import signal
from typing import Literal

import libvirt
import pytest

import virtbackup
from tests import conftest
from tests.live import callers, crashing, places, proxy

STEP = 1 if conftest.long() else 3
"""Between two commands is after the one and before the other: so both faults together come to two
of three places, where there is no time for all."""
WAYS = [("unix", "cleanup"), ("ip", "start"), ("unix", "start"), ("ip", "cleanup")]
"""Where the server is, and what comes after the kill."""


@pytest.mark.parametrize("fault", ["kill-before", "kill-after"])
@pytest.mark.parametrize(("address", "then"), WAYS if conftest.long() else WAYS[:2])
def test_killed_in_the_middle_of_a_start(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    fault: Literal["kill-before", "kill-after"],
    then: str,
    address: str,
) -> None:
    with (
        proxy.spoiled(tmp_path) as (machine, between),
        callers.Caller(between.uri) as caller,
    ):
        before, files_before = machine.state(), crashing.files(tmp_path, state_dir)
        xml = crashing.document(tmp_path, named=True)
        if address == "ip":
            unix = f'type="unix" path="{tmp_path}/nbd.sock"'
            assert unix in xml
            xml = xml.replace(unix, f'type="ip" host="127.0.0.1" port="{places.free_port()}"')
        number = 0
        while caller.spoilt(between, (number, fault), "", "backupStart", xml) != 0:
            where = f"{fault} {between.spoilt}"
            between.disarm()
            with virtbackup.open(between.uri) as conn:
                dom = conn.lookupByID(1)
                if then == "start":
                    crashing.start_after_crash(dom, xml)
                elif machine.state() != before:
                    clean_after_crash(dom)
                    assert dom.backupCleanup() == [], where
            assert machine.state() == before, where
            if then == "start":
                assert crashing.files(tmp_path, state_dir) == files_before, where
            number += STEP
        assert number > 8
        between.disarm()
        with virtbackup.open(between.uri) as conn:
            conn.lookupByID(1).backupStop()
        assert machine.state() == before
        assert crashing.files(tmp_path, state_dir) == files_before


def clean_after_crash(dom: virtbackup.Domain) -> None:
    """backup-cleanup, or the stop of a backup that had come to run."""
    try:
        assert dom.backupCleanup()
    except virtbackup.Error as failure:
        assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        dom.backupStop()


@pytest.mark.parametrize("fault", ["kill-before", "kill-after"])
def test_killed_in_the_middle_of_a_stop(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    fault: Literal["kill-before", "kill-after"],
) -> None:
    with (
        proxy.spoiled(tmp_path) as (machine, between),
        callers.Caller(between.uri) as caller,
    ):
        before, files_before = machine.state(), crashing.files(tmp_path, state_dir)
        xml = crashing.document(tmp_path, named=True)
        number = 0
        while True:
            between.disarm()
            with virtbackup.open(between.uri) as conn:
                dom = conn.lookupByID(1)
                dom.backupStart(xml)
                status = caller.spoilt(between, (number, fault), "", "backupStop")
                where = f"{fault} {between.spoilt}"
                between.disarm()
                crashing.finish(dom)
            assert machine.state() == before, where
            assert crashing.files(tmp_path, state_dir) == files_before, where
            if status == 0:
                break
            number += STEP
        assert number > 5


def test_the_verdict_of_a_stop_that_was_killed_is_told(tmp_path: pathlib.Path) -> None:
    """By whoever comes next: the next stop, or a cleanup once the killed one has come that far."""
    with (
        proxy.spoiled(tmp_path) as (machine, between),
        callers.Caller(between.uri) as caller,
    ):
        before = machine.state()
        number, told = 0, list[str]()
        while not number or told[-1]:
            between.disarm()
            with virtbackup.open(between.uri) as conn:
                dom = conn.lookupByID(1)
                dom.backupStart(crashing.document(tmp_path, named=False))
                jobs = sorted(job["id"] for job in machine.probe("query-jobs"))
                machine.probe("block-job-cancel", device=jobs[1])
                machine.probe.wait_event("BLOCK_JOB_CANCELLED")
                pid = caller.begin("", "backupStop")
                told.append(_told_after_a_kill(between, caller, pid, number, dom))
            assert machine.state() == before
            number += 3
        assert {"stop", "cleanup"} <= set(told)


def _told_after_a_kill(
    between: proxy.Proxy, caller: callers.Caller, pid: int, number: int, dom: virtbackup.Domain
) -> str:
    """Who told the verdict after the stop, process PID, was killed before its command NUMBER;
    empty: it did."""
    verdict = "the backup is not good: .*disk 'sdb': (its backup job ended: Operation canceled|{})"
    verdict = verdict.format("the process that was stopping it did not come to an end")
    between.kill_client = lambda: os.kill(pid, signal.SIGKILL)
    between.arm(number, "kill-before")
    os.kill(pid, signal.SIGCONT)
    status = caller.end()
    between.disarm()
    if status == callers.REFUSED:
        assert dom.backupCleanup() == []
        return ""
    assert status == -signal.SIGKILL
    try:
        removed = dom.backupCleanup()
    except virtbackup.Error as refused:
        assert "backup-stop ends it" in str(refused)
        with pytest.raises(virtbackup.Error, match=verdict):
            dom.backupStop()
        return "stop"
    assert re.fullmatch(f"verdict on backup [0-9a-f]{{8}}: {verdict}", removed[0])
    return "cleanup"
