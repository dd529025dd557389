# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is recorded is whole, or is not written; without a QEMU (those are in tests/live)."""

import io
import pathlib

import pytest

import virtbackup
from tests import hostile_monitor
from virtbackup.qemu import monitor, recorder
from virtbackup.tools import virsh_backup

LINE = '2016-01-01T00:00:00.000000Z <- {"QMP": {}}\n'


def test_what_is_kept_is_written_on() -> None:
    other = io.StringIO()
    tee = recorder._Tee(other)
    tee.write(LINE)
    assert other.getvalue() == LINE
    assert tee.recording().greeting == {"QMP": {}}


def test_a_trace_that_fails_is_not_in_the_way() -> None:
    other = io.StringIO()
    other.close()
    tee = recorder._Tee(other)
    tee.write(LINE)
    tee.write(LINE)
    assert len(tee.recording().lines) == 2


def test_what_is_too_much_is_no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MAX_TRACE", 2 * len(LINE))
    tee = recorder._Tee(None)
    tee.write(LINE)
    tee.write(LINE)
    assert tee.recording()
    tee.write(LINE)
    tee.write("")
    with pytest.raises(ValueError, match="too much"):
        tee.recording()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("test:///default", "only a QEMU at a qmp:// URI can be recorded, not 'test:///default'"),
        ("QMP:///nowhere", "failed to connect to monitor socket '/nowhere': No such file"),
        ("qmp:///nowhere", "failed to connect to monitor socket '/nowhere': No such file"),
        ("qmp:///x?engine=both", "'qmp:///x?engine=both': expected qmp:///absolute/path"),
        ("qmp://host/x", "'qmp://host/x': expected qmp:///absolute/path"),
    ],
)
def test_where_there_is_nothing_to_record(
    uri: str, reason: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a"
    assert virsh_backup.main(["-q", "-c", uri, "monitor-record", str(file)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert not file.exists()


def test_a_monitor_that_does_not_answer_to_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any turn of the first questions it hangs up, or talks nonsense."""
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(monitor, "CONNECT_TIMEOUT", 1.0)  # of which one turn takes all
    file = tmp_path / "a"
    with hostile_monitor.HostileMonitor(tmp_path) as hostile:
        for spoil in (
            hostile_monitor.Turn.hang_up,
            lambda turn: turn.send(b"nonsense\r\n"),
            lambda turn: turn.send(hostile_monitor.encode({"return": [1], "id": turn.id})),
        ):
            for turn in range(8):
                hostile.play("domblklist", turn, spoil)
                argv = ["-q", "-c", hostile.uri, "monitor-record", str(file)]
                assert virsh_backup.main(argv) == 1
                [line] = capsys.readouterr().err.splitlines()
                assert line.startswith("error: ")
                assert hostile.turns > turn
                assert not file.exists()


def test_recordings_are_in_the_package() -> None:
    directory = pathlib.Path(virtbackup.__file__).parent / "recordings"
    assert len(list(directory.glob("*.jsonl"))) >= 8
