# SPDX-License-Identifier: LGPL-2.1-or-later
"""monitor-diff, pair by pair from trafficdata.

A case is the files ``NAME.a`` and ``NAME.b``, perhaps ``NAME.options``, and what comes of them,
``NAME.out``: the exit status, what is printed, and the error. With VIRTBACKUP_REGENERATE=1 a
missing or wrong ``.out`` is written, and the test fails all the same.
"""

import os
import pathlib

import pytest

from virtbackup.qemu import traffic
from virtbackup.tools import virsh_backup

DATA = pathlib.Path(__file__).parent / "trafficdata"
CASES = sorted(path.with_suffix("") for path in DATA.glob("*.a"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_monitor_diff(
    case: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DATA)
    options = case.with_suffix(".options")
    words = options.read_text().split() if options.exists() else []
    status = virsh_backup.main(["monitor-diff", *words, f"{case.name}.a", f"{case.name}.b"])
    out, err = capsys.readouterr()
    found = f"{status}\n{out}{err}"
    expected = case.with_suffix(".out")
    wanted = expected.read_text() if expected.exists() else ""
    if found != wanted and os.environ.get("VIRTBACKUP_REGENERATE") == "1":
        expected.write_text(found)
    assert found == wanted


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Trouble, and no misuse: there is no help to it."""
    assert virsh_backup.main(["monitor-diff", "/no/where", "/no/where"]) == 2
    message = "error: Failed to open file '/no/where': No such file or directory\n"
    assert capsys.readouterr() == ("", message)


def test_a_log_of_a_real_libvirtd() -> None:
    text = (DATA / "libvirt-9.0-backup.log").read_text()
    lines = traffic.parse(text)
    sent = [line.message["execute"] for line in lines if line.direction == "->"]
    assert sent == [
        "query-named-block-nodes", "blockdev-add", "blockdev-create", "query-jobs", "job-dismiss",
        "blockdev-add", "nbd-server-start", "transaction", "block-export-add", "block-job-cancel",
        "query-jobs", "job-dismiss", "nbd-server-stop", "blockdev-del", "blockdev-del",
    ]  # fmt: skip
    replies = [line for line in lines if line.direction == "<-" and "return" in line.message]
    assert len(replies) == len(sent)


def _probe(monitor: str, execute: str) -> str:
    message = f'{{"execute":"{execute}","id":"libvirt-1"}}\r\n fd=-1\n'
    return f"1: info : qemuMonitorSend:861 : QEMU_MONITOR_SEND_MSG: mon={monitor} msg={message}"


SEVERAL = "".join(
    _probe(monitor, execute)
    for monitor, execute in (
        ("0xa", "qmp_capabilities"), ("0xb", "qmp_capabilities"), ("0xa", "query-kvm"),
        ("0xa", "qmp_capabilities"), ("0xb", "stop"), ("0xa", "nbd-server-start"),
    )
)  # fmt: skip
"""A log of two addresses, one of which came to be another monitor's."""


@pytest.mark.parametrize(
    ("monitor", "sent"),
    [
        (None, ["qmp_capabilities", "nbd-server-start"]),
        ("0xa", ["qmp_capabilities", "query-kvm"]),
        ("0xa#2", ["qmp_capabilities", "nbd-server-start"]),
        ("0xb", ["qmp_capabilities", "stop"]),
    ],
)
def test_one_of_several_monitors(monitor: str | None, sent: list[str]) -> None:
    assert [line.message["execute"] for line in traffic.parse(SEVERAL, monitor)] == sent


def test_several_monitors_of_which_none_is_meant() -> None:
    with pytest.raises(ValueError, match="several monitors, choose one: 0xa, 0xb, 0xa#2"):
        traffic.parse(SEVERAL.replace("nbd-server-start", "cont"))
    with pytest.raises(ValueError, match="no monitor 0xc, only 0xa, 0xb"):
        traffic.parse(SEVERAL, "0xc")


def test_a_trace_behind_a_log_is_not_passed_over() -> None:
    """Whatever wrote both to one file: what the trace tells would be missing in a comparison."""
    text = f'{SEVERAL}2026-01-01T00:00:00.000Z -> {{"execute":"stop"}}\n'
    with pytest.raises(
        ValueError, match=rf"line {text.count(chr(10))}: a line of a trace in a log"
    ):
        traffic.parse(text)
