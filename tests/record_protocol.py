# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write down the numbers and fields of libvirt's RPC, from libvirt's own sources.

    python -m tests.record_protocol DIR        DIR: the sources of libvirt, unpacked

What is written (tests/rpcdata/libvirt-protocol.json) are facts, names and numbers, one procedure
or struct a line. A type is written as XDR writes it, its typedefs and constants resolved: ``int``,
``string<4194304>``, ``*string<4194304>``, ``opaque[16]``, ``char<257>``, or a struct's name.
"""

import ast
import json
import pathlib
import re
import sys
from typing import Any

DIGEST = pathlib.Path(__file__).parent / "rpcdata" / "libvirt-protocol.json"

SOURCES = {
    "rpc/virnetprotocol.x": None,
    "rpc/virkeepaliveprotocol.x": "KEEPALIVE",
    "remote/remote_protocol.x": "REMOTE",
    "remote/qemu_protocol.x": "QEMU",
}
"""File -> the program in it, whose constants and structs are named by it."""

FROM_HEADERS = {
    "VIR_UUID_BUFLEN": 16,
    "VIR_SECURITY_MODEL_BUFLEN": 257,
    "VIR_SECURITY_DOI_BUFLEN": 257,
    "VIR_SECURITY_LABEL_BUFLEN": 4097,
    "VIR_TYPED_PARAM_INT": 1,
    "VIR_TYPED_PARAM_UINT": 2,
    "VIR_TYPED_PARAM_LLONG": 3,
    "VIR_TYPED_PARAM_ULLONG": 4,
    "VIR_TYPED_PARAM_DOUBLE": 5,
    "VIR_TYPED_PARAM_BOOLEAN": 6,
    "VIR_TYPED_PARAM_STRING": 7,
}
"""Constants of libvirt's public headers."""

FIELD = re.compile(r"(?P<type>(?:unsigned )?\w+) (?P<star>\*?) ?(?P<name>\w+) ?(?P<size>[\[<].*)?")
ARM = re.compile(r"case (\w+) ?: ?([^;]+);")


class Reader:
    """What the files read so far define; they are read in the order of their includes."""

    def __init__(self) -> None:
        self.constants: dict[str, int] = dict(FROM_HEADERS)
        self.enums: dict[str, dict[str, int]] = {}
        self.typedefs: dict[str, str] = {}
        self.structs: dict[str, Any] = {}

    def read(self, source: str) -> None:
        """Take in one file. Errors: ValueError for what is none of XDR's language."""
        text = re.sub(r"/\*.*?\*/|^%.*?$", " ", source, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"\s+", " ", text).strip()
        while text:
            match = re.match(r"(\w+) ([^{;]*)(\{.*?\})? ?; ?", text)
            if match is None:
                raise ValueError(f"what is this: {text[:80]}")
            self._define(match[1], match[2].strip(), (match[3] or "").strip("{} "))
            text = text[match.end() :]

    def _define(self, kind: str, head: str, body: str) -> None:
        match kind:
            case "const":
                name, value = head.replace("=", " = ").split(" = ")
                self.constants[name.strip()] = self._number(value)
            case "typedef":
                name, type = self._field(head)
                self.typedefs[name] = type
            case "enum":
                pairs = [each.split("=") for each in body.split(",") if each.strip()]
                self.enums[head] = {name.strip(): self._number(value) for name, value in pairs}
            case "struct":
                fields = [each.strip() for each in body.split(";") if each.strip()]
                self.structs[head] = [list(self._field(each)) for each in fields]
            case "union":
                arms = {self._number(value): field for value, field in ARM.findall(body)}
                self.structs[head.split()[0]] = {
                    str(value): self._field(field)[1] for value, field in arms.items()
                }
            case _:
                raise ValueError(f"what is this: {kind} {head}")

    def _number(self, text: str) -> int:
        text = text.strip()
        return self.constants[text] if text in self.constants else int(ast.literal_eval(text))

    def _field(self, declaration: str) -> tuple[str, str]:
        """Name and resolved type of ``type *name<MAX>``."""
        match = FIELD.fullmatch(declaration)
        if match is None:
            raise ValueError(f"what is this: {declaration}")
        type = match["type"]
        type = {"unsigned": "unsigned int"}.get(type, self.typedefs.get(type, type))
        if type in self.enums:
            type = "int"
        if size := match["size"]:
            type += size[0] + str(self._number(size[1:-1])) + size[-1]
        return match["name"], match["star"] + type


def program(reader: Reader, name: str) -> dict[str, Any]:
    """One program's numbers, and its procedures: name -> number and the structs it has."""
    prefix = name.lower()
    procedures = {}
    for constant, number in reader.enums[f"{prefix}_procedure"].items():
        procedure = constant.removeprefix(f"{name}_PROC_")
        structs = {
            part: struct
            for part in ("args", "ret", "msg")
            if (struct := f"{prefix}_{procedure.lower()}_{part}") in reader.structs
        }
        procedures[procedure] = {"number": number} | structs
    return {
        "number": reader.constants[f"{name}_PROGRAM"],
        "version": reader.constants[f"{name}_PROTOCOL_VERSION"],
        "procedures": procedures,
    }


def digest(directory: pathlib.Path) -> dict[str, Any]:
    """All that the sources in DIRECTORY say of the programs we speak."""
    reader = Reader()
    for file in SOURCES:
        reader.read((directory / "src" / file).read_text())
    version = re.search(r"^  version: '([\d.]+)'", (directory / "meson.build").read_text(), re.M)
    assert version is not None
    return {
        "libvirt": version[1],
        "programs": {name: program(reader, name) for name in SOURCES.values() if name},
        "constants": {n: v for n, v in reader.constants.items() if n not in FROM_HEADERS},
        "enums": {n: v for n, v in reader.enums.items() if not n.endswith("_procedure")},
        "structs": reader.structs,
    }


def format(value: Any, depth: int = 0) -> str:
    """JSON with one line for what is three levels down."""
    if not isinstance(value, dict) or depth == 4 or not value:
        return json.dumps(value)
    inner = depth + 1 if any(isinstance(each, dict) for each in value.values()) else 4
    lines = (f"{json.dumps(name)}: {format(each, inner)}" for name, each in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def main() -> None:
    DIGEST.parent.mkdir(exist_ok=True)
    DIGEST.write_text(format(digest(pathlib.Path(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
