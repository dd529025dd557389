# SPDX-License-Identifier: LGPL-2.1-or-later
"""The inputs of tests/fuzz_rpc.py, guided by what of the wire's code they reach.

    python -m tests.fuzz_rpc_atheris COUNT [SEED]

Exits with 0 when all was well; else the input is in the last lines.
"""

import pathlib
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["virtbackup.remote"]):
    from tests import fuzz_rpc

TIMEOUT = 10
"""Seconds that one input may take at the most."""
MEMORY = 512
"""MiB that the process may take at the most."""


def main() -> None:
    count, seed = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "1"
    with tempfile.TemporaryDirectory() as name:
        corpus = pathlib.Path(name, "corpus")
        corpus.mkdir()
        for number, data in enumerate(fuzz_rpc.corpus()):
            (corpus / str(number)).write_bytes(data)
        options = {
            "runs": count,
            "seed": seed,
            "max_len": fuzz_rpc.MAX_SIZE,
            "timeout": TIMEOUT,
            "rss_limit_mb": MEMORY,
            "artifact_prefix": f"{name}/",
            "print_final_stats": 1,
        }
        argv = [f"-{option}={value}" for option, value in options.items()]
        atheris.Setup([sys.argv[0], *argv, str(corpus)], fuzz_rpc.one_input)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
