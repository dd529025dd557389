# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the commands work on: the connection, opened when the first command needs it (virsh.c)."""

import contextlib
import copy
import io
import logging
import os
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, TextIO

import virtbackup
from virtbackup.tools import program, vsh

if TYPE_CHECKING:  # at run time where they are used, or help would wait for them
    from virtbackup.conf import backup_conf

logger = logging.getLogger(__name__)


DEFAULT_URI = "qemu:///system"
URI_VARIABLES = ("VIRTBACKUP_DEFAULT_URI", "VIRSH_DEFAULT_CONNECT_URI", "LIBVIRT_DEFAULT_URI")
"""Of the environment, the first first; virsh has the second."""


def default_uri() -> str:
    """The URI to use where the user gives none."""
    for variable in URI_VARIABLES:
        if uri := os.environ.get(variable):
            return uri
    return DEFAULT_URI


_WITH_EVENTS = ("qemu:", "qemu+unix:")
"""How the URIs begin that lead to libvirt."""


class Control:
    """The shell's connection."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.readonly = False
        self._trace: TextIO | None = None
        self._trace_path = ""
        self._connection: virtbackup.Connection | None = None

    def connection(self) -> "virtbackup.Connection":
        """The open connection, opened now if need be. Errors: Failure when it is lost."""
        if self._connection is None:
            self._connection = self._open(self.uri, self.readonly)
        elif not self._connection.isAlive():
            raise vsh.Failure(f"connection to {self.uri} is lost", "'connect' opens it again")
        return self._connection

    def connect(self, uri: str, readonly: bool) -> None:
        """Connect elsewhere or anew; where that fails, the connection to another URI stays."""
        if uri == self.uri:
            # A monitor serves one client at a time, and that may be us.
            self.close()
        connection = self._open(uri, readonly)
        self.close()
        self._connection, self.uri, self.readonly = connection, uri, readonly

    def open_trace(self, path: str) -> None:
        """Write what goes over every connection from now on to PATH; ``-`` is standard error."""
        if path == "-":
            self._trace = sys.stderr
            return
        local = local_path(path)
        try:
            # Open for as long as the process lives: connections come and go.
            self._trace = _Trace(local.open("wb"))
        except OSError as error:
            raise vsh.Failure(f"Failed to open file '{path}': {error.strerror}") from error
        self._trace_path = path

    @property
    def trace(self) -> TextIO | None:
        """Where what goes over a connection is to be written."""
        return self._trace

    def close_trace(self) -> None:
        """End the trace. Errors: Failure when not all of it was written."""
        trace, self._trace = self._trace, None
        if isinstance(trace, _Trace) and trace.failure is not None:
            reason = trace.failure.strerror
            raise vsh.Failure(f"Failed to write file '{self._trace_path}': {reason}")

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open(self, uri: str, readonly: bool) -> "virtbackup.Connection":
        from virtbackup.tools import interrupt

        with interrupt.held():  # lxml, as it is loaded, can lose a KeyboardInterrupt
            import libvirt  # here, or help would wait for it

            opener = virtbackup.open
        libvirt.registerErrorHandler(_ignore, None)  # it would print what is about to be raised
        if uri.startswith(_WITH_EVENTS):
            from virtbackup import event_loop

            event_loop.start()
        try:
            connection = opener(uri, readonly=readonly)
        except libvirt.libvirtError as error:
            from virtbackup.tools import advice

            text = f"failed to connect to the hypervisor: {error}"
            raise vsh.Failure(text, advice.advice(error)) from error
        if self._trace is not None:
            connection.setTrace(self._trace)
        return connection


class _Trace(io.TextIOWrapper):
    """A trace file. That it cannot be written is kept for the end: what is traced must go on."""

    def __init__(self, file: io.BufferedWriter) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                return super().write(text)
            except OSError as failure:
                self.failure = failure
                vsh.give_up(self)
        return len(text)


Shell = vsh.Shell[Control]
"""The shell that the commands get."""


def describe(error: Exception) -> vsh.Failure | None:
    """What an error that libvirt or we have worded is told as, or a module that is not installed;
    None for any other."""
    if (told := program.missing(error)) is not None:
        return vsh.Failure(*told)
    import libvirt

    from virtbackup.tools import advice

    if not isinstance(error, libvirt.libvirtError):
        return None
    return vsh.Failure(str(error), advice.advice(error))


def _ignore(context: object, error: object) -> None:
    pass


class _Warnings(logging.Handler):
    """Tells what is logged as the shell's own warnings, and lets the logger go on where nobody
    reads them."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(vsh.OutputClosed):
            vsh.warn(record.getMessage())


_WARNINGS = _Warnings()
_OF_WHAT_IS_LEFT = (
    "virtbackup.qemu.sweep.left",
    "virtbackup.native.left",
    "virtbackup.tools.pull.left",
)
"""The loggers of what is left of a backup."""


class _Noted(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


@contextlib.contextmanager
def noting_what_is_left() -> Iterator[list[str]]:
    """What the block has warned of so far that is left of a backup."""
    handler = _Noted()
    loggers = [logging.getLogger(name) for name in _OF_WHAT_IS_LEFT]
    for left in loggers:
        left.addHandler(handler)
    try:
        yield handler.told
    finally:
        for left in loggers:
            left.removeHandler(handler)


def set_logging(level: int | None, path: str | None = None) -> None:
    """Log from LEVEL on, 0 (debug) to 4 (error), to standard error or to the end of the file at
    PATH.

    Neither: nothing at all, for standard error is where users look for one line of error. A path
    alone: all from 0 on. Where standard error has no log, it is warned there of what is left of a
    backup that was ended, which no error tells. Errors: Failure when the file cannot be written.
    """
    for name in _OF_WHAT_IS_LEFT:
        left = logging.getLogger(name)
        left.setLevel(logging.WARNING)  # however little else is logged
        if level is None or path is not None:
            left.addHandler(_WARNINGS)
    if level is None and path is None:
        logging.getLogger("virtbackup").addHandler(logging.NullHandler())
        return
    levels = (logging.DEBUG, logging.INFO, logging.INFO, logging.WARNING, logging.ERROR)
    handler: logging.Handler = logging.StreamHandler()
    line = "%(levelname)s %(name)s: %(message)s"
    if path is not None:
        line = f"%(asctime)s %(process)d {line}"
        local = local_path(path)
        try:
            handler = logging.FileHandler(local, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise vsh.Failure(f"Failed to open file '{path}': {error.strerror}") from error
    logging.basicConfig(level=levels[level or 0], format=line, handlers=[handler])


# --- domains --------------------------------------------------------------------------------------


def domain(shell: Shell, args: vsh.Args, name_first: bool = False) -> "virtbackup.Domain":
    """The domain that ``--domain`` means: an id, a uuid or a name, tried in that order; NAME_FIRST,
    where it is the id that is wanted."""
    import libvirt

    from virtbackup.tools import advice

    connection = shell.control.connection()
    given = args.text("domain")
    lookups: list[Callable[[str], virtbackup.Domain]] = [connection.lookupByName]
    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", given):
        lookups.insert(0, connection.lookupByUUIDString)
    if re.fullmatch(r"[0-9]{1,9}", given):
        place = len(lookups) if name_first else 0
        lookups.insert(place, lambda text: connection.lookupByID(int(text)))
    for lookup in lookups:
        try:
            return lookup(given)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
    raise vsh.Failure(f"failed to get domain '{given}'", advice.NO_DOMAIN)


def complete_domains(shell: Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """The names of the domains."""
    return [found.name() for found in shell.control.connection().listAllDomains()]


URIS = ("qemu:///system", "qemu:///session", "qmp:///", "test:///default")


def complete_uris(shell: Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """Connection URIs, and the sockets behind ``qmp://``."""
    if not text.startswith("qmp:///"):
        return URIS
    return [
        f"qmp://{path}" for path in vsh.complete_files(shell, args, text.removeprefix("qmp://"))
    ]


DOMAIN = vsh.Option(
    "domain", vsh.Kind.DATA, "domain name, id or uuid", required=True, completer=complete_domains
)

JSON = vsh.JSON
JSON_LINES = vsh.Option("json", vsh.Kind.BOOL, "print what happens as lines of JSON")

QUIESCE = vsh.Option("quiesce", vsh.Kind.BOOL, "quiesce guest's file systems")


XPATH = (
    vsh.Option("xpath", vsh.Kind.STRING, "xpath expression to filter the XML document"),
    vsh.Option("wrap", vsh.Kind.BOOL, "wrap xpath results in an common root element"),
)
"""Of what prints a document: see ``print_xml``."""

INSECURE = vsh.Option(
    "insecure", vsh.Kind.BOOL, "no warning of exports that a network can read without TLS"
)


def warn_of_listener(shell: Shell, args: vsh.Args, document: str) -> None:
    """Tell where the backup of DOCUMENT can be read from other hosts, by everybody there; so too
    where no setting can be read that might say not to."""
    import libvirt

    from virtbackup import config
    from virtbackup.conf import backup_conf, dialects

    if args.flag("insecure"):
        return
    try:
        address = dialects.address(document)
    except libvirt.libvirtError:
        return  # the start says it
    if address.tls or isinstance(address, backup_conf.UnixAddress) or is_loopback(address.host):
        return
    messages = []
    try:
        if config.load().insecure:
            return
    except libvirt.libvirtError as failure:
        messages.append(str(failure))
    messages.append(
        f"whoever reaches {address.host} can read the exports, which have no TLS: see tls= of"
        " <address>, and --insecure"
    )
    for message in messages:
        logger.warning("%s", message)
        shell.warn(message)


def is_loopback(host: str) -> bool:
    """Whether HOST, a name or an address, is this machine seen by itself alone."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost")


# --- files ----------------------------------------------------------------------------------------

_URI = re.compile(r"[a-z][a-z0-9+.-]*://.*", re.DOTALL | re.IGNORECASE)


def local_path(given: str, status: int = vsh.FAILED) -> pathlib.Path:
    """The path that GIVEN is. Errors: Failure with STATUS where it is a URI, of whatever scheme: as
    a path, it would be taken for one of that odd name."""
    if _URI.fullmatch(given):
        hint = f"That name as a path: ./{given}"
        raise vsh.Failure(f"'{given}' is a URI: expected a path", hint, status)
    return pathlib.Path(given)


def read_document(path: str) -> str:
    """The text of the file at PATH; ``-`` is standard input."""
    try:
        if path == "-":
            return _read_bounded(path, sys.stdin.buffer)
        with local_path(path).open("rb") as file:
            return _read_bounded(path, file)
    except OSError as error:
        raise vsh.Failure(f"Failed to open file '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise vsh.Failure(f"file '{path}' is not UTF-8 text") from error


def _read_bounded(path: str, file: BinaryIO) -> str:
    """The text of FILE, which may be a device that never ends."""
    from virtbackup.conf import xml

    data = file.read(xml.MAX_DOCUMENT + 1)
    if len(data) > xml.MAX_DOCUMENT:
        raise vsh.Failure(f"file '{path}' is larger than {xml.MAX_DOCUMENT} bytes")
    return data.decode()


@contextlib.contextmanager
def document_of_options(command: str) -> Iterator[None]:
    """Nobody has written the document here: what is wrong with it is so with options of COMMAND."""
    import libvirt

    try:
        yield
    except libvirt.libvirtError as failure:
        if failure.get_error_code() not in (
            libvirt.VIR_ERR_XML_ERROR,
            libvirt.VIR_ERR_XML_INVALID_SCHEMA,
        ):
            raise
        raise vsh.Failure(str(failure), f"'help {command}' shows what it takes") from failure


# --- what is printed ------------------------------------------------------------------------------


def print_xml(shell: Shell, args: vsh.Args, document: str) -> None:
    """Print DOCUMENT, or the nodes of it that are asked for by XPATH. Errors: Failure."""
    expression = args.optional("xpath")
    if expression is None:
        shell.print_document(document)
        return
    from lxml import etree

    root = etree.fromstring(document)
    try:
        found = root.xpath(expression)
    except etree.XPathError as error:
        raise vsh.Failure(f"Incorrect xpath '{expression}': {error}") from error
    if not isinstance(found, list):
        raise vsh.Failure(f"Incorrect xpath '{expression}': it gives no nodes")
    if root.xpath(f"count({expression}) > {len(found)}"):
        found.insert(0, root)  # the document itself, which lxml leaves out
    for one in [_wrapped(found)] if args.flag("wrap") else found:
        shell.print(_node(one))


def _wrapped(found: Iterable[object]) -> object:
    """All that was FOUND in one element, which has each attribute once."""
    from lxml import etree

    root = etree.Element("nodes")
    for one in found:
        if isinstance(one, etree._Element):
            root.append(copy.deepcopy(one))
            root[-1].tail = None
        elif (name := getattr(one, "attrname", None)) is not None:
            root.set(name, str(one))
        elif len(root):
            root[-1].tail = (root[-1].tail or "") + str(one)
        else:
            root.text = (root.text or "") + str(one)
    return root


def _node(found: object) -> str:
    """An element, an attribute or a text of a document, as a document has it."""
    import html

    from lxml import etree

    if isinstance(found, etree._Element):
        etree.indent(found)
        return etree.tostring(found, encoding="unicode", with_tail=False)
    text = html.escape(str(found), quote=False)
    if (name := getattr(found, "attrname", None)) is None:
        return text
    quoted = text.replace('"', "&quot;")
    return f' {name}="{quoted}"'


def print_pairs(shell: Shell, pairs: Iterable[tuple[str, str]]) -> None:
    """Print labels and values; a label that repeats the one before is not shown again."""
    before = None
    for label, value in pairs:
        shown = "" if label == before else f"{label}:"
        shell.print(f"{shown:<15} {vsh.visible(value)}".rstrip())
        before = label


def human_size(size: int | None) -> str:
    """SIZE bytes for a reader: ``64.00 MiB``, ``-`` for None."""
    if size is None:
        return "-"
    if size < 1024:
        return f"{size} B"
    value, units = size / 1024, "KMGTPE"
    while value >= 1023.995 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.2f} {units[0]}iB"


def unix_facts(path: str, tls: bool = False) -> dict[str, object]:
    """Where a unix socket is, for JSON."""
    return {"type": "unix", "path": path, "tls": tls}


def ip_facts(host: str, port: int | None, tls: bool = False) -> dict[str, object]:
    """Where a port is, for JSON."""
    return {"type": "ip", "host": host, "port": port, "tls": tls}


def nbd_uri(address: "backup_conf.Address", export: str) -> str:
    """The URI by which NBD clients find EXPORT (the NBD URI specification)."""
    from virtbackup.conf import backup_conf

    name = urllib.parse.quote(os.fsencode(export), safe="")
    nbd = "nbds" if address.tls else "nbd"
    if isinstance(address, backup_conf.UnixAddress):
        return f"{nbd}+unix:///{name}?socket={urllib.parse.quote(os.fsencode(address.path))}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{nbd}://{host}:{address.port}/{name}"
