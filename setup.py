# SPDX-License-Identifier: LGPL-2.1-or-later
"""What setup.cfg cannot say: manual pages and completion are made when the package is built."""

import pathlib
import sys

import setuptools
from setuptools.command import build_py

ROOT = pathlib.Path(__file__).resolve().parent
SHARE = ROOT / "build" / "share"


class Build(build_py.build_py):
    """Makes below build/share what an installation has below share."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        sys.path.insert(0, str(ROOT))  # a build in isolation has it not
        from manual import __main__ as manual

        manual.write(SHARE)
        self.distribution.data_files = [
            (f"share/{pathlib.PurePath(name).parent}", [str((SHARE / name).relative_to(ROOT))])
            for name in sorted(manual.files())
        ]


setuptools.setup(cmdclass={"build_py": Build})
