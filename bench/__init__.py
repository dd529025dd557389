# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measurements against peers, as ratios in one run."""
