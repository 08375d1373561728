# SPDX-License-Identifier: Apache-2.0
"""Every tolerance of the suite, each with its reason. A failing test is never mended here."""

from __future__ import annotations

# Float32 weights against transformers, absolute, on logits of about 4: the same sums in another
# order, through up to eight layers. The NumPy reference stays below 5e-6.
EXACT_LOGITS = 2e-4

# One backend against itself along another path (chunks, steps, batches), absolute, on logits of
# about 4: only the order of a chunk's sums differs.
SAME_MATHS = 5e-5
