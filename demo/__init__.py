# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small Linux guest that never stops writing, and the demonstration of a backup of it."""
