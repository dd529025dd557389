#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the first disk of a domain as it is now: client.py URI DOMAIN SOCKET OUT

URI: qmp:///path, qemu:///system, virtbackup+unix:///path ... SOCKET: where the export is to be.
"""

import sys

import nbd

import virtbackup

uri, name, socket, out = sys.argv[1:]
with virtbackup.open(uri) as connection:
    domain = connection.lookupByName(name)
    domain.backupStart(f"<domainbackup><address type='unix' path='{socket}'/></domainbackup>")
    export = nbd.NBD()
    export.set_export_name(domain.backupGetInfo().disks[0].export)
    export.connect_unix(socket)
    with open(out, "wb") as file:
        for offset in range(0, export.get_size(), 1 << 20):
            file.write(export.pread(min(1 << 20, export.get_size() - offset), offset))
    export.shutdown()
    domain.backupStop()  # raises where what was read is not good
