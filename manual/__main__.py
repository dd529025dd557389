# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m manual DIRECTORY      write manual pages and completion, as /usr/share has them"""

import pathlib
import sys
from collections.abc import Sequence

from manual import completion, pages


def files() -> dict[str, str]:
    """Path below /usr/share -> text."""
    manual = {f"man/man{name[-1]}/{name}": text for name, text in pages.pages().items()}
    return {**manual, **completion.scripts()}


def write(directory: pathlib.Path) -> None:
    for name, text in files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        write(pathlib.Path(argv[0]))
    except OSError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
