# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every live test gets: a state directory of its own, never the machine's."""

import os
import pathlib

import pytest


@pytest.fixture(autouse=True)
def state_dir(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """Where status files go for the test and the processes it starts."""
    path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", os.fspath(path))
    return path
