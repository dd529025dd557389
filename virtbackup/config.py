# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the settings of ``virtbackup.conf`` come from: $VIRTBACKUP_CONF, which stands for all other
places, else the machine's and then the user's own, which may say otherwise. And where a private
directory is made."""

import contextlib
import os
import pathlib
from typing import TYPE_CHECKING

from virtbackup import errors, runtime

if TYPE_CHECKING:
    from virtbackup.conf import virtbackup_conf

MACHINES = pathlib.Path("/etc/virtbackup/virtbackup.conf")


def places() -> list[pathlib.Path]:
    """The files, the last to decide."""
    if own := os.environ.get("VIRTBACKUP_CONF"):
        return [pathlib.Path(own)]
    base = runtime.users_directory("XDG_CONFIG_HOME") or runtime.home() / ".config"
    return [MACHINES, base / "virtbackup" / "virtbackup.conf"]


def load() -> "virtbackup_conf.Settings":
    """The settings of now. Errors: VIR_ERR_SYSTEM_ERROR for a file that is there, or was named, and
    cannot be read; VIR_ERR_CONF_SYNTAX."""
    from virtbackup.conf import virtbackup_conf  # few calls have need of it

    texts = {}
    found = places()
    for path in found:
        try:
            texts[str(path)] = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as failure:
            if os.environ.get("VIRTBACKUP_CONF"):
                raise errors.system_error(failure, f"cannot read '{path}'") from failure
        except OSError as failure:
            raise errors.system_error(failure, f"cannot read '{path}'") from failure
        except UnicodeDecodeError as failure:
            reason = OSError(0, "it is not UTF-8 text")
            raise errors.system_error(reason, f"cannot read '{path}'") from failure
    return virtbackup_conf.Settings.parse(texts, map(str, found))


def private_directory(undo: contextlib.ExitStack) -> pathlib.Path:
    """As ``runtime.private_directory``, for a socket, say; UNDO removes it. Errors:
    VIR_ERR_SYSTEM_ERROR."""
    try:
        return undo.enter_context(runtime.private_directory())
    except OSError as failure:
        place = runtime.directory()
        raise errors.system_error(failure, f"cannot make a directory in {place}") from failure
