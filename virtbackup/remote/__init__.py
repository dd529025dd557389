# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's RPC, spoken as a client and as a server."""
