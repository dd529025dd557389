# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU can do is asked once, by all processes together and of all of the same program."""

import pathlib

import pytest

import virtbackup
from tests.live import machines
from virtbackup.qemu import domain, driver, monitor, monitor_json

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img"),
    pytest.mark.usefixtures("unknown_qemu"),
]


def test_it_is_asked_once(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = monitor.SocketMonitor.execute_all

    def execute_all(
        self: monitor.SocketMonitor, commands: list[monitor_json.Command]
    ) -> list[object]:
        asked.extend(command.execute for command in commands)
        return real(self, commands)

    monkeypatch.setattr(monitor.SocketMonitor, "execute_all", execute_all)
    for turn in range(2):
        with machines.two_disks(tmp_path) as machine:
            path = machine.uri.removeprefix("qmp://")
            for _ in range(3):
                with virtbackup.open(machine.uri) as connection:
                    assert connection.getType() == "QEMU"
            times = asked.count("query-qmp-schema"), asked.count("query-commands")
            assert times == ((0, 0) if turn else (1, 1))
            asked.clear()
            opened = driver.open(machine.uri, readonly=True)
            kept = opened._identity
            opened.close()
            assert "query-qmp-schema" not in asked
            with monitor.SocketMonitor(path) as qemu:
                assert domain.identify(qemu) == kept
            asked.clear()
        for file in tmp_path.iterdir():
            file.unlink()
    assert len(list(state_dir.glob("*.capabilities"))) == 1
