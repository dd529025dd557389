# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what: policies, identities by the kernel's and by TLS's word, and every refusal."""

import dataclasses
import os
import pathlib
import pwd
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import libvirt
import pytest

from tests import daemon_scene
from tests.live import certificates
from virtbackup import access, hypervisor
from virtbackup.conf import backup_conf
from virtbackup.remote import dispatch, peer, protocol, remote_types, wire_conf

REMOTE, VIRTBACKUP, QEMU = protocol.REMOTE, protocol.VIRTBACKUP, protocol.QEMU
WEB, DB = daemon_scene.ref("web-1", 1), daemon_scene.ref("db-1", 2)
XML = '<domainbackup><address type="unix" path="/x.sock"/></domainbackup>'
NATIVE = "<domainbackup mode='pull'><server transport='unix' socket='/x.sock'/></domainbackup>"
CHECKPOINT = "<domaincheckpoint><name>c</name></domaincheckpoint>"
READ, BACKUP = access.Perm.READ, access.Perm.BACKUP

ALICE = access.Identity("unix", "alice", frozenset({"users", "backup"}))
BOB = access.Identity("unix", "bob", frozenset({"users"}))
MONITOR = access.Identity("tls", "monitor.example")
TCP = access.Identity("tcp")


# --- policies ---


@pytest.mark.parametrize(
    ("rule", "who", "domain", "granted"),
    [
        ("unix:alice * backup", ALICE, "x", {READ, BACKUP}),
        ("unix:alice * read", ALICE, "x", {READ}),
        ("unix:alice * read", BOB, "x", set()),
        ("unix:@backup web-* read,backup", ALICE, "web-1", {READ, BACKUP}),
        ("unix:@backup web-* read,backup", ALICE, "db-1", set()),
        ("unix:@backup web-* read,backup", BOB, "web-1", set()),
        ("unix:@* * read", BOB, "x", {READ}),
        ("unix:backup * read", ALICE, "x", set()),
        ("unix:@alice * read", ALICE, "x", set()),
        ("tls:*.example * read", MONITOR, "x", {READ}),
        ("tls:alice * read", ALICE, "x", set()),
        ("unix:monitor.example * read", MONITOR, "x", set()),
        ("unix:* * read", TCP, "x", set()),
        ("tls:* * read", TCP, "x", set()),
        ("tcp * read", TCP, "x", {READ}),
        ("tcp * read", ALICE, "x", set()),
        ("* * read", TCP, "x", {READ}),
        ("unix:A* * read", ALICE, "x", set()),
        ("* WEB-* read", ALICE, "web-1", set()),
        ("* web-[12] read", ALICE, "web-1", {READ}),
        ("* web-? read", ALICE, "web-10", set()),
        ("tls:* * read", access.Identity("tls", ""), "x", set()),
    ],
)
def test_what_a_rule_grants(
    rule: str, who: access.Identity, domain: str, granted: set[access.Perm]
) -> None:
    assert access.Policy.parse([rule]).granted(who, domain) == granted


def test_rules_add_up_and_none_grants_nothing() -> None:
    policy = access.Policy.parse(["* web-* read", "unix:alice * backup", "tcp db-* read"])
    assert policy.granted(ALICE, "web-1") == {READ, BACKUP}
    assert policy.granted(BOB, "web-1") == {READ}
    assert policy.granted(BOB, "db-1") == set()
    assert access.Policy.parse([]).granted(ALICE, "x") == set()
    assert not access.Policy.parse([]).admits(ALICE)
    assert access.Policy().granted(TCP, "x") == {READ, BACKUP}


@pytest.mark.parametrize(
    "text",
    [
        "", "*", "* *", "* * ", "* * read backup", "* * READ", "* * write", "* * read,",
        "alice * read", "unix: * read", "tcp:x * read", "tls * read", "* * read,,backup",
    ],
)  # fmt: skip
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        access.Policy.parse([text])


def test_a_tls_rule_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="certificates have no groups"):
        access.Policy.parse(["tls:@backup * read"])


# --- all calls ---

DOM = wire_conf.domain_to_wire(WEB)

LOOKS: list[tuple[Any, str, Sequence[Any]]] = [
    (REMOTE, "DOMAIN_LOOKUP_BY_NAME", ("web-1",)),
    (REMOTE, "DOMAIN_LOOKUP_BY_ID", (1,)),
    (REMOTE, "DOMAIN_LOOKUP_BY_UUID", (DOM.uuid,)),
    (REMOTE, "DOMAIN_GET_XML_DESC", (DOM, 0)),
    (REMOTE, "DOMAIN_GET_STATE", (DOM, 0)),
    (REMOTE, "DOMAIN_IS_ACTIVE", (DOM,)),
    (REMOTE, "DOMAIN_GET_JOB_STATS", (DOM, 0)),
    (REMOTE, "DOMAIN_GET_JOB_INFO", (DOM,)),
    (REMOTE, "DOMAIN_LIST_ALL_CHECKPOINTS", (DOM, 1, 0)),
    (REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", (0, DOM)),
    (VIRTBACKUP, "DOMAIN_BRANCH_LIST", (DOM, 0)),
    (VIRTBACKUP, "BACKUP_EVENT_REGISTER", (DOM,)),
]
CHANGES: list[tuple[Any, str, Sequence[Any]]] = [
    (VIRTBACKUP, "DOMAIN_BACKUP_START", (DOM, XML, 0)),
    (VIRTBACKUP, "DOMAIN_BACKUP_STOP", (DOM, 0)),
    (VIRTBACKUP, "DOMAIN_BACKUP_CLEANUP", (DOM, 0)),
    (VIRTBACKUP, "DOMAIN_BRANCH_CREATE", (DOM, "b", 0)),
    (VIRTBACKUP, "DOMAIN_BRANCH_DELETE", (DOM, "b", 0)),
    (REMOTE, "DOMAIN_BACKUP_BEGIN", (DOM, NATIVE, None, 0)),
    (REMOTE, "DOMAIN_ABORT_JOB", (DOM,)),
    (REMOTE, "DOMAIN_ABORT_JOB_FLAGS", (DOM, 0)),
    (REMOTE, "DOMAIN_CHECKPOINT_CREATE_XML", (DOM, CHECKPOINT, 0)),
    (REMOTE, "DOMAIN_FSFREEZE", (DOM, (), 0)),
    (REMOTE, "DOMAIN_SUSPEND", (DOM,)),
    (REMOTE, "DOMAIN_RESUME", (DOM,)),
    (QEMU, "DOMAIN_MONITOR_COMMAND", (DOM, "{}", 0)),
]
SECRETS: list[tuple[Any, str, Sequence[Any]]] = [
    (REMOTE, "DOMAIN_GET_XML_DESC", (DOM, libvirt.VIR_DOMAIN_XML_SECURE)),
    (REMOTE, "DOMAIN_GET_XML_DESC", (DOM, libvirt.VIR_DOMAIN_XML_MIGRATABLE)),
]


class Driver(daemon_scene.Driver):
    """With every hook that changes something."""

    def domain_resume(self, domain: Any) -> None:
        self._enter("domain_resume", domain)

    def domain_backup_cleanup(self, domain: Any, flags: int) -> Sequence[str]:
        self._enter("domain_backup_cleanup", domain)
        return []

    def domain_branch_create(self, domain: Any, name: str, flags: int) -> None:
        self._enter("domain_branch_create", domain)

    def domain_branch_delete(self, domain: Any, name: str, flags: int) -> None:
        self._enter("domain_branch_delete", domain)

    def domain_branch_list(self, domain: Any, flags: int) -> Sequence[backup_conf.Branch]:
        point = backup_conf.Point("p", 1.0)
        disk = backup_conf.BranchDisk("vda", 65536, 0, True, None, point)
        return [backup_conf.Branch("c", False, (disk,))]


def by(
    client: daemon_scene.Raw, calls: Sequence[tuple[Any, str, Sequence[Any]]]
) -> Iterator[tuple[str, int, str]]:
    """(name, code, text) of what is refused for want of a permission."""
    for of, name, args in calls:
        try:
            client.call(of, name, *args)
        except libvirt.libvirtError as failure:
            code = failure.get_error_code()
            if code in (libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_OPERATION_DENIED):
                yield name, code, str(failure)


CHANGING_HOOKS = (
    "domain_backup_start", "domain_backup_stop", "domain_backup_cleanup", "domain_branch_create",
    "domain_branch_delete", "domain_suspend", "domain_resume", "domain_fsfreeze",
    "domain_monitor_command",
)  # fmt: skip


def me() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def test_who_may_only_look(tmp_path: pathlib.Path) -> None:
    driver = Driver(WEB, DB)
    settings = {"access": (f"unix:{me()} web-* read",)}
    with (
        daemon_scene.serving(tmp_path, driver, settings=settings) as served,
        served.connect() as client,
    ):
        assert not list(by(client, LOOKS))
        refused = list(by(client, CHANGES + SECRETS))
        assert [name for name, _, _ in refused] == [name for _, name, _ in CHANGES + SECRETS]
        for _, code, text in refused:
            assert code == libvirt.VIR_ERR_ACCESS_DENIED
            assert text == (
                f"access denied: unix client '{me()}' has not the permission 'backup' on domain"
                " 'web-1'"
            )
    assert not [call for call in driver.calls if call[0] in CHANGING_HOOKS]


def test_a_read_only_connection(tmp_path: pathlib.Path) -> None:
    driver = Driver(WEB, DB)
    with daemon_scene.serving(tmp_path, driver) as served, served.raw().open(flags=1) as client:
        assert client.names() == ["web-1", "db-1"]
        assert not list(by(client, LOOKS))
        refused = list(by(client, CHANGES + SECRETS))
        assert [name for name, _, _ in refused] == [name for _, name, _ in CHANGES + SECRETS]
        for _, code, text in refused:
            assert code == libvirt.VIR_ERR_OPERATION_DENIED
            assert text.startswith("operation forbidden: ")
            assert "read only access prevents virDomain" in text or "secure flag" in text
    assert not [call for call in driver.calls if call[0] in CHANGING_HOOKS]


def test_who_may_back_up(tmp_path: pathlib.Path) -> None:
    driver = Driver(WEB, DB)
    settings = {"access": (f"unix:{me()} web-* backup",)}
    with (
        daemon_scene.serving(tmp_path, driver, settings=settings) as served,
        served.connect() as client,
    ):
        assert not list(by(client, LOOKS + CHANGES + SECRETS))
    assert {call[0] for call in driver.calls} >= set(CHANGING_HOOKS)


def test_a_domain_that_is_hidden(tmp_path: pathlib.Path) -> None:
    driver = Driver(DB, WEB)
    settings = {"access": (f"unix:{me()} db-* read,backup",)}
    with (
        daemon_scene.serving(tmp_path, driver, settings=settings) as served,
        served.connect() as client,
    ):
        assert client.names() == ["db-1"]
        assert client.call(REMOTE, "CONNECT_NUM_OF_DOMAINS").num == 1
        assert client.call(REMOTE, "CONNECT_LIST_DOMAINS", 10).ids == (2,)
        listed = client.call(VIRTBACKUP, "LIST_DOMAINS").domains
        assert [one.dom.name for one in listed] == ["db-1"]
        refused = list(by(client, LOOKS + CHANGES + SECRETS))
        assert len(refused) == len(LOOKS + CHANGES + SECRETS)
        perms = ["read"] * len(LOOKS) + ["backup"] * len(CHANGES + SECRETS)
        for (name, code, text), perm in zip(refused, perms, strict=True):
            assert code == libvirt.VIR_ERR_ACCESS_DENIED
            said = {
                "DOMAIN_LOOKUP_BY_ID": "with id 1",
                "DOMAIN_LOOKUP_BY_UUID": f"with uuid '{WEB.uuid}'",
            }.get(name, "'web-1'")
            assert text.endswith(f"has not the permission '{perm}' on domain {said}")
        # Nor are its events told to whoever wants all.
        client.call(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
        for ref in (WEB, DB):
            driver.tell(hypervisor.LifecycleEvent(ref, 2, 0))
        assert b"db-1" in client.event().payload
    assert not [call for call in driver.calls if call[0] in CHANGING_HOOKS]


def about_a_domain() -> list[tuple[Any, str, Sequence[Any]]]:
    """Every call that a daemon serves about a domain, with arguments of the right kind."""
    calls: list[tuple[Any, str, Sequence[Any]]] = []
    for of_number, proc_number in sorted(dispatch.HANDLERS):
        of = protocol.PROGRAMS[of_number]
        proc = of.by_number[proc_number]
        names = [field.name for field in dataclasses.fields(proc.args)] if proc.args else []
        if not {"dom", "checkpoint"} & set(names):
            continue
        hints = typing.get_type_hints(proc.args)
        args = [_some(name, hints[name]) for name in names]
        calls.append((of, proc.name, args))
    return calls


def _some(name: str, hint: Any) -> Any:
    if name == "checkpoint":
        return remote_types.NonnullDomainCheckpoint("c", DOM)
    if name == "dom":
        return DOM
    if typing.get_origin(hint) is tuple:
        return ()
    options = [hint, *typing.get_args(hint)]
    return "x" if str in options else 0 if int in options else ()


def test_no_call_about_a_domain_is_for_everybody(tmp_path: pathlib.Path) -> None:
    driver = Driver(DB, WEB)
    settings = {"access": (f"unix:{me()} db-* read,backup",)}
    with (
        daemon_scene.serving(tmp_path, driver, settings=settings) as served,
        served.connect() as client,
    ):
        calls = about_a_domain()
        assert len(calls) > 30
        refused = {name for name, _, _ in by(client, calls)}
        assert refused == {name for _, name, _ in calls}
    assert not [call for call in driver.calls if call[0].startswith("domain_")]


def test_what_changes_something_is_not_for_read_only(tmp_path: pathlib.Path) -> None:
    """What a read-only connection may call is listed here; all else is refused."""
    driver = Driver(DB, WEB)
    with daemon_scene.serving(tmp_path, driver) as served, served.raw().open(flags=1) as client:
        calls = about_a_domain()
        allowed = {name for _, name, _ in calls} - {name for name, _, _ in by(client, calls)}
    assert not {
        name for name in allowed if not re.search("GET|LIST|IS_|HAS_|NUM|LOOKUP|STATS|REG", name)
    }


def test_a_name_that_a_client_makes_up(tmp_path: pathlib.Path) -> None:
    """The uuid decides which domain is meant, so its own name decides who may; and who may not look
    at it does not hear that name."""
    driver = Driver(DB, WEB)
    settings = {"access": (f"unix:{me()} db-* read,backup",)}
    lie = wire_conf.domain_to_wire(hypervisor.DomainRef("db-1", WEB.uuid, 2))
    with (
        daemon_scene.serving(tmp_path, driver, settings=settings) as served,
        served.connect() as client,
    ):
        code, text = daemon_scene.code_of(client.call, REMOTE, "DOMAIN_SUSPEND", lie)
        assert code == libvirt.VIR_ERR_ACCESS_DENIED
        assert text.endswith("has not the permission 'backup' on domain 'db-1'")


def test_names_that_several_have_are_nobody_s_to_find_out(tmp_path: pathlib.Path) -> None:
    """Nor is it told whether there is a domain of a name that is hidden."""
    other = daemon_scene.ref("web-1", 1, number=77)
    settings = {"access": (f"unix:{me()} db-* read,backup",)}
    serving = daemon_scene.serving(tmp_path, Driver(WEB), Driver(other), settings=settings)
    with serving as served, served.connect() as client:
        for name in ("web-1", "web-2"):
            code, text = daemon_scene.code_of(client.lookup, name)
            assert code == libvirt.VIR_ERR_ACCESS_DENIED
            assert text.endswith(f"has not the permission 'read' on domain '{name}'")
        assert daemon_scene.code_of(client.lookup, "db-2")[0] == libvirt.VIR_ERR_NO_DOMAIN


def test_nothing_for_whom_no_rule_is(tmp_path: pathlib.Path) -> None:
    settings = {"access": ("unix:nobody-at-all * read",)}
    serving = daemon_scene.serving(tmp_path, Driver(WEB), settings=settings)
    with serving as served, served.raw() as client:
        code, text = daemon_scene.code_of(client.open)
        assert code == libvirt.VIR_ERR_ACCESS_DENIED
        assert text == (
            f"access denied: unix client '{me()}' has not the permission 'read' on any domain"
        )
        code, _ = daemon_scene.code_of(client.names)
        assert code == libvirt.VIR_ERR_INTERNAL_ERROR
        # Before it is open, there is nothing to be had at all.
        for of in (REMOTE, VIRTBACKUP, QEMU):
            for proc in of.procedures:
                if proc.kind == "call" and proc.args is None and proc.name != "CONNECT_OPEN":
                    reply = client.reply(client.post(of, proc.name))
                    assert reply.status == int(proc.name not in ("AUTH_LIST", "SUPPORTED"))


def test_read_only_is_for_good(tmp_path: pathlib.Path) -> None:
    """A second open is refused, and changes nothing."""
    driver = Driver(WEB)
    with daemon_scene.serving(tmp_path, driver) as served, served.raw().open(flags=1) as client:
        daemon_scene.code_of(client.open, "", 0)
        code, _ = daemon_scene.code_of(client.call, REMOTE, "DOMAIN_SUSPEND", DOM)
        assert code == libvirt.VIR_ERR_OPERATION_DENIED


# --- who is who ---

AS_USER = """
import os, sys
sys.path.insert(0, sys.argv[4])
os.setgroups([int(g) for g in sys.argv[2].split(",") if g])
from tests import daemon_scene
import libvirt
os.setgid(int(sys.argv[3])); os.setuid(65534)
with daemon_scene.Raw.unix(sys.argv[1]) as client:
    try:
        client.open()
        print(",".join(client.names()))
    except libvirt.libvirtError as failure:
        print(failure)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="to be somebody else takes root")
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("unix:nobody web-* read", "web-1"),
        ("unix:@nogroup * read", "web-1,db-1"),
        ("unix:root * read", "access denied: unix client 'nobody' has not the permission 'read'"
         " on any domain"),
    ],
)  # fmt: skip
def test_another_user(rule: str, said: str) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o755)
        settings = {"access": (rule, "unix:root * backup"), "unix_sock_mode": "0666"}
        with daemon_scene.serving(directory, Driver(WEB, DB), settings=settings) as served:
            root = str(pathlib.Path(__file__).parents[1])
            argv = [sys.executable, "-c", AS_USER, str(served.path), "", "65534", root]
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
            assert done.stdout.strip() == said, done.stderr


MANY = """
import os, sys
sys.path.insert(0, sys.argv[2])
from tests import daemon_scene
os.setgid(65534); os.setuid(65534)
opened = []
try:
    for _ in range(10):
        opened.append(daemon_scene.Raw.unix(sys.argv[1]).open())
except (AssertionError, OSError):
    pass
print(len(opened), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="to be somebody else takes root")
def test_one_user_does_not_have_all_places() -> None:
    """Not even with a right to each of them."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o755)
        settings = {
            "access": ("unix:nobody * read", "unix:root * backup"),
            "unix_sock_mode": "0666",
            "max_clients": 10,
        }
        root = str(pathlib.Path(__file__).parents[1])
        with (
            daemon_scene.serving(directory, Driver(WEB), settings=settings) as served,
            subprocess.Popen(
                [sys.executable, "-c", MANY, str(served.path), root],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ) as many,
        ):  # fmt: skip
            assert many.stdout is not None
            assert many.stdout.readline() == "9\n"
            with served.connect() as client:
                assert client.names() == ["web-1"]
            many.communicate()


def test_tcp_does_not_have_all_places(tmp_path: pathlib.Path) -> None:
    """Whoever is behind it."""
    serving = daemon_scene.serving(
        tmp_path, Driver(WEB), listen=["tcp:127.0.0.1:0"], settings={"max_clients": 10}
    )
    with serving as served:
        many = [daemon_scene.Raw.tcp(served.port("tcp")).open() for _ in range(9)]
        with pytest.raises((AssertionError, OSError)):
            daemon_scene.Raw.tcp(served.port("tcp")).open()
        with served.connect() as client:
            assert client.names() == ["web-1"]
        many.pop().close()
        daemon_scene.wait_for(lambda: len(served.daemon.server.clients) == 8)
        with daemon_scene.Raw.tcp(served.port("tcp")) as next_one:
            assert next_one.open().is_served()
        for one in many:
            one.close()


def test_groups_that_a_process_took_are_not_the_user_s() -> None:
    """A user's groups are the system's; the kernel tells no more than the process's first."""
    found = peer.user(0, 65534)
    assert found.name == "root"
    assert {"root", "nogroup"} <= found.groups
    assert peer.user(54321, 54322) == access.Identity("unix", "54321", frozenset({"54322"}))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("pki") / "ca"
    certificates.authority(made)
    certificates.server(made)
    for name in ("alice.example", "mallory.example"):
        certificates._leaf(made, name, "clientAuth")
    other = made / "other"
    certificates.authority(other)
    certificates._leaf(other, "alice.example", "clientAuth")
    shutil.copy(made / "ca-cert.pem", other / "trusted.pem")
    return made


def context(directory: pathlib.Path, name: str, trusted: str = "ca-cert.pem") -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(directory / trusted))
    made.load_cert_chain(directory / f"{name}-cert.pem", directory / f"{name}-key.pem")
    return made


@pytest.mark.needs("openssl")
def test_certificates(tmp_path: pathlib.Path, pki: pathlib.Path) -> None:
    settings = {
        "access": ("tls:alice.* web-* read,backup", "tcp db-* read"),
        "tls_x509_cert_dir": str(pki),
    }
    listen = ["tls:127.0.0.1:0", "tcp:127.0.0.1:0"]
    driver = Driver(WEB, DB)
    with daemon_scene.serving(tmp_path, driver, listen=listen, settings=settings) as served:
        port = served.port("tls")
        with daemon_scene.Raw.tcp(port, context(pki, "alice.example")) as alice:
            assert alice.open().names() == ["web-1"]
            assert not list(by(alice, LOOKS + CHANGES))
        with daemon_scene.Raw.tcp(port, context(pki, "mallory.example")) as mallory:
            _, text = daemon_scene.code_of(mallory.open)
            assert text == (
                "access denied: tls client 'mallory.example' has not the permission 'read' on any"
                " domain"
            )
        # By another authority, whatever the name.
        with pytest.raises((AssertionError, OSError)):
            daemon_scene.Raw.tcp(port, context(pki / "other", "alice.example", "trusted.pem"))
        with daemon_scene.Raw.tcp(served.port("tcp")) as anybody:
            assert anybody.open().names() == ["db-1"]
            _, text = daemon_scene.code_of(
                anybody.call, REMOTE, "DOMAIN_SUSPEND", wire_conf.domain_to_wire(DB)
            )
            assert text == (
                "access denied: tcp client has not the permission 'backup' on domain 'db-1'"
            )
        with served.raw() as root:
            assert daemon_scene.code_of(root.open)[0] == libvirt.VIR_ERR_ACCESS_DENIED
