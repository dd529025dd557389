# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any bytes at the wire. VIRTBACKUP_LONG=1 makes it more than two million inputs."""

import importlib.util
import random
import re
import struct
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import conftest, fuzz_rpc, rpc_values
from virtbackup.remote import (
    program,
    remote_structs,
    remote_types,
    rpc,
    virtbackup_protocol,
    xdr,
)

COUNT = 1_000_000 if conftest.long() else 10_000
SLOW = 2.0
"""Seconds of the processor for one input, of a slow one."""


@given(st.binary(max_size=fuzz_rpc.MAX_SIZE))
def test_any_bytes(data: bytes) -> None:
    fuzz_rpc.one_input(data)


@given(st.integers(0, 255), st.integers(0, 200), st.binary(max_size=200))
def test_any_payload_behind_a_header(cut: int, row: int, payload: bytes) -> None:
    kind = rpc_values.STRUCTS[row % len(rpc_values.STRUCTS)]
    fuzz_rpc.payload(kind, payload)
    header = struct.pack(">IIIiiIi", 28 + len(payload), 0x20008086, 1, row, cut % 6, 1, cut % 3)
    fuzz_rpc.stream(header + payload, 1 + cut)


def test_what_was_recorded_and_changed() -> None:
    seed = random.randrange(1 << 32) if conftest.long() else 0
    assert fuzz_rpc.by_mutation(COUNT, seed) < SLOW


@pytest.mark.skipif(not conftest.long(), reason="takes minutes: VIRTBACKUP_LONG=1")
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="not installed: atheris")
def test_what_reaches_more_of_the_code() -> None:
    # Linux takes the most memory that whoever starts it ever had for its own: so a shell does.
    argv = ["sh", "-c", '"$@"; exit $?', "sh"]
    argv += [sys.executable, "-m", "tests.fuzz_rpc_atheris", str(COUNT)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    ran = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert ran is not None, done.stderr[-5000:]
    assert int(ran[1]) >= COUNT


# --- memory ---

UUID = bytes(16)
DOMAIN = remote_types.NonnullDomain("", UUID, 500)
PARAM = remote_types.TypedParam("", xdr.Arm(1, 500))
DISK = virtbackup_protocol.BranchDisk("", None, None, False, None, None, None)

DENSE = [
    # As many values as fit into a few bytes each.
    remote_structs.ConnectListDomainsRet(tuple(range(500, 16884))),
    remote_structs.ConnectListDefinedDomainsRet(("\u0101\u0102",) * 16384),
    remote_structs.ConnectListAllDomainsRet((DOMAIN,) * 4096, 0),
    remote_structs.ConnectGetAllDomainStatsRet(
        (remote_structs.DomainStatsRecord(DOMAIN, (PARAM,) * 10_000),) * 2
    ),
    remote_structs.ConnectGetAllDomainStatsArgs((DOMAIN,) * 4096, 0, 0),
    remote_structs.AuthSaslRet(0, 0, bytes(65536)),
    virtbackup_protocol.DomainBranchListRet(
        (virtbackup_protocol.Branch("", False, (DISK,) * 1000),) * 10
    ),
    virtbackup_protocol.DomainBackupCleanupRet(("\u0101",) * 65536),
]
MOST = 24
"""Bytes of memory for a byte that came, at the most."""


@pytest.mark.parametrize("value", DENSE, ids=lambda value: type(value).__name__)
def test_a_value_takes_no_more_memory_than_a_multiple_of_its_bytes(value: object) -> None:
    data, kind = xdr.encode(value), type(value)
    tracemalloc.start()
    try:
        assert xdr.decode(kind, data) == value
        assert tracemalloc.get_traced_memory()[1] < MOST * len(data)
    finally:
        tracemalloc.stop()


def test_a_message_that_comes_slowly_takes_its_size() -> None:
    """Twice: while it is made of what has come."""
    size = 8 << 20
    message = rpc.Message(1, 1, 1, program.MessageType.CALL, 1, 0, bytes(size)).encode()
    parser = rpc.Parser()
    tracemalloc.start()
    try:
        for start in range(0, len(message), 4096):
            assert parser.next_message() is None
            parser.receive_data(message[start : start + 4096])
        assert parser.next_message() is not None
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size
    finally:
        tracemalloc.stop()
