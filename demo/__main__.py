# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m demo``, what ``./dev demo`` runs."""

import sys

from demo import demo

sys.exit(demo.main())
