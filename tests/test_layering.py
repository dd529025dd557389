# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports go down only, and the pure layers do no I/O: read from the source by ``ast``."""

import ast
import functools
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "virtbackup"

MAY_IMPORT = {
    "errors": set(),
    "conf": {"errors", "conf"},
    "event_loop": {"errors"},
    "nbd": {"errors", "runtime", "nbd"},
    "access": {"errors", "conf"},
    "hypervisor": {"errors", "conf"},
    "api": {"errors", "conf", "hypervisor", "access"},
    "extend": {"errors", "conf", "hypervisor", "access", "api"},
    "native": {"errors", "conf", "hypervisor"},
    "runtime": set(),
    "config": {"errors", "conf", "runtime"},
    "qemu": {"errors", "conf", "hypervisor", "native", "nbd", "runtime", "config", "qemu"},
    "test": {"errors", "hypervisor", "runtime", "qemu", "test"},
    # conf: its dataclasses are the values of the driver interface.
    "remote": {"errors", "conf", "hypervisor", "native", "access", "runtime", "remote"},
    "tools": {"api", "conf", "nbd", "errors", "event_loop", "runtime", "config", "tools"},
    "__init__": {"api", "errors", "extend"},
}

MAY_IMPORT_MORE = {
    # What is said on a monitor is below any driver interface.
    "tools/virsh_monitor.py": {"qemu", "test"},
    # So is what goes over the wire, and the daemon is handed its drivers.
    "tools/virsh_rpc.py": {"remote"},
    "tools/virtbackupd.py": {"hypervisor", "remote"},
}

PURE = {
    "conf": None,
    "qemu": {
        "backup", "block", "blockjob", "capabilities", "dialect", "monitor_json", "naming",
        "normal", "qcow2", "qmp", "recording", "traffic",
    },
    "test": {"fake", "fake_info", "fake_layer", "fake_state", "faults", "nbdwire", "schema"},
    "nbd": {"extents", "header", "qcow2", "view"},
    "remote": {
        "dump", "keepalive", "program", "protocol", "qemu_protocol", "remote_protocol",
        "remote_structs", "remote_types", "rpc", "rpc_error", "virtbackup_protocol", "wire_conf",
        "xdr",
    },
}  # fmt: skip

IO = {"asyncio", "fcntl", "os", "select", "selectors", "signal", "socket", "subprocess",
      "threading", "time"}  # fmt: skip


def layer(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@functools.cache
def imported(path: pathlib.Path) -> set[str]:
    """Full dotted names of the modules that a source file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layers_of(names: set[str]) -> set[str]:
    """The layers of ours among imported names; ``import virtbackup`` is the public face, api."""
    found = {name.split(".")[1] if "." in name else "api" for name in names
             if name.split(".")[0] == "virtbackup"}  # fmt: skip
    return {"api" if name in ("Error", "open", "Connection", "Domain") else name for name in found}


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: pathlib.Path) -> None:
    more = MAY_IMPORT_MORE.get(str(path.relative_to(PACKAGE)), set())
    wrong = layers_of(imported(path)) - MAY_IMPORT[layer(path)] - more
    assert not wrong, f"{path.name} may not import {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_pure_modules_do_no_io(path: pathlib.Path) -> None:
    pure = PURE.get(layer(path), set())
    if pure is not None and path.stem not in pure:
        return
    assert not {name.split(".")[0] for name in imported(path)} & IO


def test_every_layer_is_ruled() -> None:
    assert {layer(path) for path in SOURCES} <= set(MAY_IMPORT)
    assert {str(path.relative_to(PACKAGE)) for path in SOURCES} >= set(MAY_IMPORT_MORE)


def test_the_check_can_fail(tmp_path: pathlib.Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from virtbackup.qemu import driver\n    import socket\n")
    assert layers_of(imported(bad)) == {"qemu"}
    assert "socket" in imported(bad)
