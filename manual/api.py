# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/api.md from the API's own docstrings.

python -m manual.api      writes docs/api.md anew
"""

import ast
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "virtbackup" / "api.py"
DOCUMENT = ROOT / "docs" / "api.md"

_HEAD = """# Python

Made from the docstrings of `virtbackup/api.py` by `python -m manual.api`.

```python
import virtbackup

with virtbackup.open("qmp:///tmp/vm/qmp.sock") as conn:
    dom = conn.lookupByName("vm")
    dom.backupStart('<domainbackup><address type="unix" path="/tmp/vm/nbd.sock"/></domainbackup>')
    print(dom.backupGetXMLDesc())  # every default filled in
    dom.backupStop()  # raises libvirt.libvirtError when the backup was not good
```

The names are libvirt-python's. Errors are `libvirt.libvirtError` (`virtbackup.Error` is one), with
libvirt's own codes and texts. `virtbackup.extend.install(libvirt)` adds what is proposed to
libvirt-python's own `virDomain`: see [libvirt](libvirt.md). What a backup and a branch tell of
themselves is in `virtbackup/conf/backup_conf.py` (`BackupInfo`, `Branch`), typed.
"""


def page() -> str:
    """The whole page."""
    module = ast.parse(SOURCE.read_text(encoding="utf-8"))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    parts = [_HEAD, "\n## Connecting\n", *_functions(module.body, "virtbackup.")]
    for node in classes:
        parts += [f"\n## {node.name}\n", f"\n{_prose(ast.get_docstring(node) or '')}\n"]
        parts += _functions(node.body, "")
    parts += ["\n## Constants\n\n| | |\n|---|---|\n", *_constants(module.body)]
    return "".join(parts)


def _functions(body: Sequence[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            said = _prose(ast.get_docstring(node) or "")
            yield f"\n### `{prefix}{node.name}({_arguments(node)}) -> {_returns(node)}`\n\n{said}\n"


def _arguments(node: ast.FunctionDef) -> str:
    return ast.unparse(node.args).removeprefix("self").removeprefix(", ").replace("'", '"')


def _returns(node: ast.FunctionDef) -> str:
    return "None" if node.returns is None else ast.unparse(node.returns).replace("'", "")


def _constants(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node, after in itertools.pairwise(body):
        if not isinstance(node, ast.Assign) or not isinstance(after, ast.Expr):
            continue
        name = ast.unparse(node.targets[0])
        if name.startswith("VIR_") and isinstance(after.value, ast.Constant):
            yield f"| `virtbackup.{name}` | {_prose(str(after.value.value))} |\n"


def _prose(doc: str) -> str:
    """A docstring as Markdown: ``code`` as `code`, lines as long as they come."""
    paragraphs = re.sub(r"``([^`]+)``", r"`\1`", doc).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
