# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every QMP command of a start fails in turn; nothing may remain of the start."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests.live import machines, proxy

FAULTS: tuple[proxy.Fault, ...] = ("refuse", "lose-reply", "hang-up-before", "hang-up-after")
TRANSACTION = "transaction"
KEPT = (".lock", ".capabilities")
"""What stays in the state directory: the lock of a monitor, and what is known of a running QEMU."""


@contextlib.contextmanager
def spoiled(directory: pathlib.Path, *extra: str) -> Iterator[tuple[machines.Machine, proxy.Proxy]]:
    """A machine, and somebody between it and us."""
    with (
        machines.two_disks(directory, *extra) as machine,
        proxy.Proxy(directory, machine.qmp) as between,
    ):
        yield machine, between


def files(directory: pathlib.Path, state: pathlib.Path) -> set[str]:
    """Every file that a start could have left; lock files are no more than locks."""
    names = {str(p) for p in (*directory.iterdir(), *state.iterdir()) if p.suffix not in KEPT}
    return names | {str(p) for p in pathlib.Path(os.environ["VIRTBACKUP_SCRATCH_DIR"]).iterdir()}


def document(directory: pathlib.Path, named: bool) -> str:
    source = f'<source file="{directory}/scratch.qcow2"/>' if named else ""
    return (
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/>'
        f'<disks><disk name="vda">{source}</disk></disks></domainbackup>'
    )


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("extra", [(), ("-S",)], ids=["running", "paused"])
def test_each_command_of_a_start_fails_in_turn(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, fault: proxy.Fault, extra: tuple[str, ...]
) -> None:
    with spoiled(tmp_path, *extra) as (machine, between), virtbackup.open(between.uri) as conn:
        dom = conn.lookupByID(1)
        before, files_before = machine.state(), files(tmp_path, state_dir)
        spoilt = []
        for number in range(100):
            between.arm(number, fault)
            xml = document(tmp_path, named=number % 2 == 0)
            try:
                dom.backupStart(xml)
            except virtbackup.Error:
                spoilt.append(between.spoilt)
                between.disarm()
                assert machine.state() == before, f"{fault} of {between.spoilt}"
                assert files(tmp_path, state_dir) == files_before, f"{fault} of {spoilt[-1]}"
            else:
                break
        assert between.spoilt is None or between.spoilt in ("qom-list", "qom-get")
        assert {"nbd-server-start", "blockdev-add", TRANSACTION, "block-export-add"} <= {*spoilt}
        between.disarm()
        dom.backupStop()
        assert machine.state() == before
        assert files(tmp_path, state_dir) == files_before


def test_each_command_of_a_stop_fails_in_turn_and_cleanup_finishes_it(
    tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    with spoiled(tmp_path) as (machine, between), virtbackup.open(between.uri) as conn:
        dom = conn.lookupByID(1)
        before, files_before = machine.state(), files(tmp_path, state_dir)
        outcomes = []
        for number in range(100):
            between.disarm()
            dom.backupStart(document(tmp_path, named=True))
            between.arm(number, "hang-up-after")
            try:
                dom.backupStop()
                outcomes.append("good")
            except virtbackup.Error:
                outcomes.append("error")
            reached = between.spoilt
            between.disarm()
            finish(dom)
            assert machine.state() == before, reached
            assert files(tmp_path, state_dir) == files_before, reached
            if reached is None:
                break
        assert outcomes[-1] == "good"
        assert outcomes.count("error") > 5


def finish(dom: virtbackup.Domain) -> None:
    """What a user does whose stop failed: again, and where there is no backup to stop, clean up."""
    try:
        dom.backupStop()
    except virtbackup.Error as failure:
        assert failure.get_error_code() in (
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
            libvirt.VIR_ERR_OPERATION_FAILED,
        )
    assert dom.backupCleanup() == []
