# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every QMP command of a start fails in turn; nothing may remain of the start."""

import pathlib

import pytest

import virtbackup
from tests.live import crashing, proxy

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
