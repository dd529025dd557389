# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a trace shows of messages, and what it does not."""

import concurrent.futures
import datetime
import json
import math
import os
import pathlib
import resource
import socket
import threading
import tracemalloc
from typing import Any

import libvirt
import pytest

from tests import daemon_scene, rpc_server, strict_json, waiting
from virtbackup import errors
from virtbackup.remote import (
    dump,
    keepalive,
    program,
    remote_types,
    rpc,
    rpc_error,
    transport,
    xdr,
)
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.program import MessageType
from virtbackup.remote.protocol import QEMU, REMOTE, VIRTBACKUP
from virtbackup.tools import virsh_backup, virsh_rpc

VM = rpc_server.VM
LOOKUP = rpc.call(REMOTE, "DOMAIN_LOOKUP_BY_NAME", 5, structs.DomainLookupByNameArgs("v\nm"))
NOBODY = program.Program("NOBODY", 0x20008088, 3, ())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (LOOKUP, r"REMOTE.DOMAIN_LOOKUP_BY_NAME serial=5 CALL DomainLookupByNameArgs(name='v\nm')"),
        (rpc.reply(LOOKUP, structs.DomainRet(rpc_server.domain("vm"))),
         "REMOTE.DOMAIN_LOOKUP_BY_NAME serial=5 REPLY DomainArgs(dom=NonnullDomain(name='vm',"
         f" uuid={bytes(16)!r}, id=-1))"),
        (rpc.call(REMOTE, "CONNECT_CLOSE", 6), "REMOTE.CONNECT_CLOSE serial=6 CALL"),
        (keepalive.PING, "KEEPALIVE.PING serial=0 MESSAGE"),
        (rpc_server.raw(REMOTE, 23, 0, 1, b"\0\0\0\xff"),
         "REMOTE.DOMAIN_LOOKUP_BY_NAME serial=1 CALL (4 bytes) that are not of its type:"
         " DomainLookupByNameArgs.name: the data ends within string"),
        (rpc_server.raw(REMOTE, 9999, 0, 1, b"abcd"), "REMOTE.9999 serial=1 CALL (4 bytes)"),
        (rpc_server.raw(NOBODY, 4, 1, 2), "0x20008088/3.4 serial=2 REPLY"),
        (rpc_server.raw(REMOTE, 208, MessageType.STREAM, 3, b"data", status=2),
         "REMOTE.208 serial=3 STREAM CONTINUE (4 bytes)"),
        (rpc_server.raw(REMOTE, 2, 77, 3, b"", status=9), "REMOTE.CONNECT_CLOSE serial=3 77 9"),
    ],
    ids=["call", "reply", "void", "ping", "short", "procedure", "program", "stream", "numbers"],
)  # fmt: skip
def test_a_message(message: rpc.Message, text: str) -> None:
    assert dump.describe(message) == text


def test_an_error() -> None:
    failure = errors.error(libvirt.VIR_ERR_NO_DOMAIN, "no domain with matching name 'vm'")
    shown = dump.describe(rpc_error.reply(LOOKUP, failure))
    assert shown.startswith("REMOTE.DOMAIN_LOOKUP_BY_NAME serial=5 REPLY ERROR RemoteError(code=42")
    assert "no domain with matching name" in shown
    unknown = rpc_error.reply(rpc_server.raw(NOBODY, 4, 0, 2), failure)
    assert "no domain with matching name" in dump.describe(unknown)


def test_a_line() -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.timezone.utc)
    assert dump.line(when, "<-", keepalive.PONG) == (
        "2026-01-02T03:04:05.000006Z <- KEEPALIVE.PONG serial=0 MESSAGE"
    )


def test_descriptors_are_counted() -> None:
    args = structs.DomainFdAssociateArgs(VM, "vda", 0)
    message = rpc.call(REMOTE, "DOMAIN_FD_ASSOCIATE", 1, args, [0, 1])
    assert " CALL_WITH_FDS fds=2 DomainFdAssociateArgs(" in dump.describe(message)


def test_what_is_long_is_cut() -> None:
    args = structs.DomainLookupByNameArgs("x" * 10_000)
    shown = dump.describe(rpc.call(REMOTE, "DOMAIN_LOOKUP_BY_NAME", 5, args))
    assert len(shown) < dump.MAX_TEXT + 200
    assert shown.endswith("... (10031 characters)")


def monitor(command: str) -> rpc.Message:
    kind = QEMU["DOMAIN_MONITOR_COMMAND"].args
    assert kind is not None
    return rpc.call(QEMU, "DOMAIN_MONITOR_COMMAND", 1, kind(VM, command, 0))


SECRETS = {
    "sasl start": rpc.call(
        REMOTE, "AUTH_SASL_START", 1, structs.AuthSaslStartArgs("PLAIN", 0, b"\0fred\0hunter2")
    ),
    "sasl step": rpc.call(REMOTE, "AUTH_SASL_STEP", 1, structs.AuthSaslStepArgs(0, b"hunter2")),
    "sasl answer": rpc.reply(
        rpc.call(REMOTE, "AUTH_SASL_STEP", 1, structs.AuthSaslStepArgs(0, b"")),
        structs.AuthSaslRet(0, 0, b"hunter2"),
    ),
    "graphics": rpc.reply(
        rpc.call(REMOTE, "DOMAIN_GET_XML_DESC", 1, structs.DomainFlagsArgs(VM, 1)),
        structs.XmlRet("<graphics type='vnc' passwd='hunter2' autoport=\"yes\"/>"),
    ),
    "graphics in double quotes": rpc.reply(
        rpc.call(REMOTE, "DOMAIN_GET_XML_DESC", 1, structs.DomainFlagsArgs(VM, 1)),
        structs.XmlRet('<graphics passwd="hunter2"/>'),
    ),
    "qmp password": monitor('{"execute":"set_password","arguments":{"password":"hunter2"}}'),
    "qmp with quotes": monitor('{"a":"it\'s","password" : "\\"hunter2"}'),
    "qmp secret": monitor('{"arguments":{"qom-type":"secret","id":"s","data":"hunter2"}}'),
    "hmp password": monitor("set_password vnc hunter2"),
    "hmp change": monitor("change vnc password hunter2"),
    "hmp change, in short": monitor("change vnc passwd hunter2"),
    "hmp secret": monitor("object_add secret,id=s,data=hunter2"),
    "hmp secret, by its type": monitor("object_add qom-type=secret,data=,,hunter2,id=s"),
    "hmp, quoted": monitor('set_password vnc "hunter 2hunter2"'),
    "hmp, quoted in qmp": monitor(r'{"command-line":"set_password vnc \"hunter 2hunter2\""}'),
    "option": monitor("drive_add 0 file.driver=https,file.url=x,file.password=hunter2"),
    "a quote within qmp within qmp": monitor(json.dumps({"a": json.dumps({"data": 'x"hunter2'})})),
    "a cookie": monitor('{"driver":"https","cookie":"a=b; c=hunter2"}'),
    "qmp within qmp within qmp": monitor(
        json.dumps({"a": json.dumps({"b": json.dumps({"password": 'x"hunter2'})})})
    ),
    "qmp in single quotes": monitor("{'execute':'x','arguments':{'password':'hunter2'}}"),
    "qmp within qmp": monitor(json.dumps({"command-line": 'object_add {"data": "hunter2"}'})),
    "cookie": rpc.reply(
        rpc.call(REMOTE, "DOMAIN_GET_XML_DESC", 1, structs.DomainFlagsArgs(VM, 1)),
        structs.XmlRet("<cookies><cookie name='c'>hunter2</cookie></cookies>"),
    ),
    "value of a secret": rpc.reply(
        rpc.call(REMOTE, "DOMAIN_GET_XML_DESC", 1, structs.DomainFlagsArgs(VM, 1)),
        structs.XmlRet("<secret uuid='u'> <value>hunter2</value><usage type='x'/></secret>"),
    ),
    "value of a secret, last": rpc.reply(
        rpc.call(REMOTE, "DOMAIN_GET_XML_DESC", 1, structs.DomainFlagsArgs(VM, 1)),
        structs.XmlRet("<secret><usage type='x'/><value>hunter2</value>\n</secret>"),
    ),
    "a launch secret": monitor('{"arguments":{"packet-header":"x","secret":"hunter2"}}'),
    "secret for the command line": rpc.reply(
        rpc.call(REMOTE, "DOMAIN_GET_XML_DESC", 1, structs.DomainFlagsArgs(VM, 1)),
        structs.XmlRet("<qemu:arg value='{&quot;data&quot;:&quot;hunter2&quot;}'/>"),
    ),
}


@pytest.mark.parametrize("before", ['{"data":"', "passwd='", "data=", 'set_password vnc "'])
def test_a_long_secret_takes_little_memory(before: str) -> None:
    tracemalloc.start()
    try:
        shown = dump.describe(monitor(before + "x" * 200_000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "xx" not in shown
    assert peak < 10_000_000


@pytest.mark.parametrize("message", SECRETS.values(), ids=SECRETS)
def test_secrets_are_not_shown(message: rpc.Message) -> None:
    shown = dump.describe(message)
    assert "hunter2" not in shown
    assert "(hidden)" in shown
    told = facts(message)
    assert "hunter2" not in json.dumps(told)
    assert b"hunter2".hex() not in json.dumps(told)
    assert told["hidden"] is (message.proc is not None and "SASL" in message.proc.name)
    assert told["hidden"] or "(hidden)" in json.dumps(told)


def test_what_stands_beside_a_secret_is_shown() -> None:
    shown = dump.describe(SECRETS["graphics"])
    assert "type='vnc'" in shown.replace("\\", "")
    assert 'autoport="yes"' in shown.replace("\\", "")
    assert '"qom-type":"secret"' in dump.describe(SECRETS["qmp secret"])
    reply = rpc.call(REMOTE, "DOMAIN_GET_XML_DESC", 1, structs.DomainFlagsArgs(VM, 1))
    others = "<secret type='passphrase' uuid='u'/></encryption><enum><value>ovmf</value></enum>"
    assert facts(rpc.reply(reply, structs.XmlRet(others)))["fields"]["xml"] == others


def test_any_payload_can_be_shown() -> None:
    for proc in (*REMOTE.procedures, *VIRTBACKUP.procedures):
        for type in range(8):
            for payload in (b"", os.urandom(4), os.urandom(400)):
                message = rpc_server.raw(REMOTE, proc.number, type, 0, payload, status=type % 3)
                assert "\n" not in dump.describe(message)
                assert facts(message)["size"] == len(payload)


# --- for JSON -------------------------------------------------------------------------------------

WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.timezone.utc)


def facts(message: rpc.Message) -> dict[str, Any]:
    """As they are read again, but for numbers that JSON has no word for."""
    told = dump.facts(WHEN, "->", message)
    text = json.dumps(told, default=_not_for_json)
    assert isinstance(json.loads(text), dict)
    return told


def _not_for_json(value: object) -> None:
    raise AssertionError(f"{value!r} is nothing for JSON")


def test_facts() -> None:
    message = rpc.reply(LOOKUP, structs.DomainRet(rpc_server.domain("v\udcffm")))
    assert strict_json.loads(json.dumps(dump.facts(WHEN, "<-", message))) == {
        "time": "2026-01-02T03:04:05.000006Z",
        "direction": "<-",
        "program": "REMOTE",
        "procedure": "DOMAIN_LOOKUP_BY_NAME",
        "serial": 5,
        "type": "REPLY",
        "status": "OK",
        "fds": 0,
        "size": len(message.payload),
        "struct": "DomainArgs",
        "fields": {
            "dom": {
                "name": "v\udcffm",
                "uuid": "00000000-0000-0000-0000-000000000000",
                "id": -1,
            }
        },
        "hidden": False,
        "problem": None,
    }


@pytest.mark.parametrize(
    ("message", "some"),
    [
        (keepalive.PING, {"program": "KEEPALIVE", "type": "MESSAGE", "fields": None, "size": 0}),
        (rpc_server.raw(REMOTE, 23, 0, 1, b"\0\0\0\xff"),
         {"fields": None, "size": 4,
          "problem": "DomainLookupByNameArgs.name: the data ends within string"}),
        (rpc_server.raw(REMOTE, 9999, 0, 1, b"abcd"),
         {"program": "REMOTE", "procedure": "9999", "size": 4, "problem": None}),
        (rpc_server.raw(NOBODY, 4, 1, 2), {"program": "0x20008088/3", "procedure": "4"}),
        (rpc_server.raw(REMOTE, 208, MessageType.STREAM, 3, b"data", status=2),
         {"type": "STREAM", "status": "CONTINUE", "size": 4}),
        (rpc_server.raw(REMOTE, 2, 77, 3, b"", status=9), {"type": "77", "status": "9"}),
        (rpc.call(REMOTE, "DOMAIN_FD_ASSOCIATE", 1, structs.DomainFdAssociateArgs(VM, "vda", 0),
                  [0, 1]), {"fds": 2, "type": "CALL_WITH_FDS"}),
    ],
)  # fmt: skip
def test_facts_of_less(message: rpc.Message, some: dict[str, Any]) -> None:
    told = facts(message)
    assert {name: told[name] for name in some} == some


def test_facts_of_an_error_and_of_what_is_long() -> None:
    failure = errors.error(libvirt.VIR_ERR_NO_DOMAIN, "x" * 10_000)
    told = facts(rpc_error.reply(LOOKUP, failure))
    assert (told["status"], told["struct"], told["fields"]["code"]) == ("ERROR", "RemoteError", 42)
    assert told["fields"]["message"].endswith("x" * 5000)


def test_facts_of_a_union() -> None:
    told = facts(
        rpc.reply(
            rpc.call(REMOTE, "DOMAIN_GET_JOB_STATS", 1, structs.DomainFlagsArgs(VM, 0)),
            structs.DomainGetJobStatsRet(
                1,
                (
                    remote_types.TypedParam("a", xdr.Arm(5, math.nan)),
                    remote_types.TypedParam("b", xdr.Arm(7, 'passwd="hunter2"')),
                ),
            ),
        )
    )
    one, other = told["fields"]["params"]
    assert (one["field"], one["value"]["type"]) == ("a", 5)
    assert math.isnan(one["value"]["value"])  # null, once it is printed
    assert other["value"] == {"type": 7, "value": 'passwd="(hidden)"'}


class _Told(virsh_rpc._Text):
    """What a proxy has told, without the messages themselves."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def message(self, client: int, direction: dump.Direction, message: rpc.Message) -> None:
        self.words.append(f"{client} {direction} {len(message.payload)}")

    def _print(self, text: str) -> None:
        self.words.append(text)


def _received(connected: socket.socket, count: int) -> int:
    """How many of COUNT bytes have come."""
    left = count
    while left and (data := connected.recv(1 << 16)):
        left -= len(data)
    return count - left


def test_who_reads_once_he_has_spoken_is_heard(tmp_path: pathlib.Path) -> None:
    """A server that reads no more until what it says is read, as libvirtd where a client has five
    calls under way; and a client that says on."""
    data = rpc_server.raw(NOBODY, 1, MessageType.MESSAGE, 1, bytes(1 << 20)).encode() * 4
    addresses = [transport.Address("unix", path=str(tmp_path / name)) for name in ("there", "here")]
    told = _Told()
    received = []

    def serve() -> None:
        connected, _ = server.accept()
        with connected:
            connected.sendall(data)
            received.append(_received(connected, len(data)))

    def dumping() -> None:
        virsh_rpc.Proxy(told, addresses[0]).serve(listening, 1)

    with (
        transport.listen(addresses[0]) as server,
        transport.listen(addresses[1]) as listening,
        transport.connected(addresses[1], daemon_scene.DEADLINE) as client,
    ):
        threads = [threading.Thread(target=what, daemon=True) for what in (serve, dumping)]
        threads.append(threading.Thread(target=client.sendall, args=(data,), daemon=True))
        for thread in threads:
            thread.start()
        received.append(_received(client, len(data)))
        for thread in threads:
            thread.join(daemon_scene.DEADLINE)
    assert received == [len(data)] * 2
    assert sorted(told.words) == sorted(
        ["1 connected", *[f"1 -> {1 << 20}", f"1 <- {1 << 20}"] * 4, "1 closed"]
    )


def test_descriptors_that_are_lost_end_the_connection(tmp_path: pathlib.Path) -> None:
    addresses = [transport.Address("unix", path=str(tmp_path / name)) for name in ("there", "here")]
    told = _Told()
    with (
        transport.listen(addresses[0]),
        transport.listen(addresses[1]) as listening,
        transport.connected(addresses[1], daemon_scene.DEADLINE) as client,
    ):
        proxy = virsh_rpc.Proxy(told, addresses[0])
        dumping = threading.Thread(target=proxy.serve, args=(listening, 1), daemon=True)
        dumping.start()
        daemon_scene.wait_for(lambda: told.words == ["1 connected"])
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with pathlib.Path(os.devnull).open() as last:
            resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, before[1]))
            try:
                socket.send_fds(client, [b"x"], [last.fileno()] * 200)
                assert client.recv(1) == b""
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
        dumping.join(daemon_scene.DEADLINE)
    assert told.words[1:] == ["1 -> no message: descriptors were lost on the way", "1 closed"]


def test_half_a_message_is_told(tmp_path: pathlib.Path) -> None:
    addresses = [transport.Address("unix", path=str(tmp_path / name)) for name in ("there", "here")]
    told = _Told()
    with transport.listen(addresses[0]), transport.listen(addresses[1]) as listening:
        with transport.connected(addresses[1]) as client:
            client.sendall(LOOKUP.encode() + LOOKUP.encode()[:11])
        virsh_rpc.Proxy(told, addresses[0]).serve(listening, 1)
    assert told.words == [
        "1 connected", f"1 -> {len(LOOKUP.payload)}",
        "1 -> no message: 11 bytes of one that did not come whole", "1 closed",
    ]  # fmt: skip


def test_what_has_taken_its_sockets_place_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    server = transport.listen(transport.Address("unix", path=str(tmp_path / "server")))

    def come() -> None:
        with server, socket.socket(socket.AF_UNIX) as client:
            waiting.until(lambda: client.connect_ex(str(path)) == 0)
            with server.accept()[0]:  # it has looked at its socket by then, and ends with this one
                path.unlink()
                path.write_text("theirs")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        comes = pool.submit(come)
        argv = ["rpc-dump", f"unix:{tmp_path}/server", f"--listen=unix:{path}", "--clients=1"]
        assert virsh_backup.main(argv) == 0
        comes.result()
    assert path.read_text() == "theirs"


def test_a_socket_that_is_gone_at_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    listen = transport.listen

    def listen_and_lose(address: transport.Address) -> socket.socket:
        made = listen(address)
        path.unlink()
        return made

    monkeypatch.setattr(transport, "listen", listen_and_lose)
    assert virsh_backup.main(["rpc-dump", "unix:/nope", f"--listen=unix:{path}"]) == 1
    said = f"error: cannot listen on 'unix:{path}': No such file or directory\n"
    assert capsys.readouterr().err == said
