# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/failures.md says what the tests saw, and of every fault something is seen."""

from tests import failures
from tests.live import faults, scene


def test_the_document_is_made_from_the_data() -> None:
    assert failures.DOCUMENT.read_text() == failures.document(), "run python -m tests.failures"


def test_every_fault_was_seen_on_every_qemu() -> None:
    names = {fault.name for fault in faults.FAULTS}
    assert len(names) == len(faults.FAULTS) >= 30
    versions = failures.versions()
    assert {version[0] for version in versions} == {5, 7, 10, 11}
    for version in versions:
        rows = failures.load(version)
        engines = {"classic"} if version < (8, 0) else {"classic", "hybrid"}
        assert {engine: set(of) for engine, of in rows.items()} == dict.fromkeys(engines, names)


def test_no_wrong_byte_was_called_good() -> None:
    for version in failures.versions():
        for engine, rows in failures.load(version).items():
            for row in rows.values():
                wrong = scene.WRONG in row.reader
                assert not (wrong and row.stop == "good")
                assert not (wrong and engine == "hybrid")
