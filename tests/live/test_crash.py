# SPDX-License-Identifier: LGPL-2.1-or-later
"""We are killed before and after every QMP command; whoever comes next finds all that is ours."""

import pathlib
import signal
import socket
from typing import Literal

import libvirt
import pytest

import virtbackup
from tests import conftest
from tests.live import callers, proxy, test_undo


def call(
    caller: callers.Caller, between: proxy.Proxy, spoil: tuple[int, proxy.Fault], *words: str
) -> int:
    """A process of its own calls a method of the domain; its exit status."""
    status = caller.spoilt(between, spoil, "", *words)
    assert status in (0, -signal.SIGKILL)
    return status


STEP = 1 if conftest.long() else 2
"""Between two commands is after the one and before the other: unless there is time, once."""


@pytest.mark.parametrize("fault", ["kill-before", "kill-after"])
@pytest.mark.parametrize("then", ["cleanup", "start"])
@pytest.mark.parametrize("address", ["unix", "ip"])
def test_killed_in_the_middle_of_a_start(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    fault: Literal["kill-before", "kill-after"],
    then: str,
    address: str,
) -> None:
    with (
        test_undo.spoiled(tmp_path) as (machine, between),
        callers.Caller(between.uri) as caller,
    ):
        before, files_before = machine.state(), test_undo.files(tmp_path, state_dir)
        xml = test_undo.document(tmp_path, named=True)
        if address == "ip":
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            unix = f'type="unix" path="{tmp_path}/nbd.sock"'
            assert unix in xml
            xml = xml.replace(unix, f'type="ip" host="127.0.0.1" port="{port}"')
        number = 0
        while call(caller, between, (number, fault), "backupStart", xml) != 0:
            where = f"{fault} {between.spoilt}"
            between.disarm()
            with virtbackup.open(between.uri) as conn:
                dom = conn.lookupByID(1)
                if then == "start":
                    start_after_crash(dom, xml)
                elif machine.state() != before:
                    clean_after_crash(dom)
                    assert dom.backupCleanup() == [], where
            assert machine.state() == before, where
            if then == "start":
                assert test_undo.files(tmp_path, state_dir) == files_before, where
            number += STEP
        assert number > 8
        between.disarm()
        with virtbackup.open(between.uri) as conn:
            conn.lookupByID(1).backupStop()
        assert machine.state() == before
        assert test_undo.files(tmp_path, state_dir) == files_before


def clean_after_crash(dom: virtbackup.Domain) -> None:
    """backup-cleanup, or the stop of a backup that had come to run."""
    try:
        assert dom.backupCleanup()
    except virtbackup.Error as failure:
        assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        dom.backupStop()


def start_after_crash(dom: virtbackup.Domain, xml: str) -> None:
    """The next start does its own cleaning; where the killed one had come to run, it says so."""
    try:
        dom.backupStart(xml)
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
        test_undo.spoiled(tmp_path) as (machine, between),
        callers.Caller(between.uri) as caller,
    ):
        before, files_before = machine.state(), test_undo.files(tmp_path, state_dir)
        xml = test_undo.document(tmp_path, named=True)
        number = 0
        while True:
            between.disarm()
            with virtbackup.open(between.uri) as conn:
                dom = conn.lookupByID(1)
                dom.backupStart(xml)
                status = call(caller, between, (number, fault), "backupStop")
                where = f"{fault} {between.spoilt}"
                between.disarm()
                test_undo.finish(dom)
            assert machine.state() == before, where
            assert test_undo.files(tmp_path, state_dir) == files_before, where
            if status == 0:
                break
            number += STEP
        assert number > 5
