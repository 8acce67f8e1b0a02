"""Asks XLA's CPU backend to leave convolutions to itself, which imports of madjax do once.

The CPU backend of JAX 0.10 hands single convolutions to a library (YNNPACK) that takes many times as long as XLA's own
code for a gradient by the kernel (`docs/performance.md` says what that does to training). The flag is read when JAX
first computes something, so what was computed before the import keeps the old code.
"""

from __future__ import annotations

import os

import jax

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def leave_convolutions_to_xla() -> None:
    """Adds the flag to the environment's XLA_FLAGS, unless it stands there or JAX is of another version than 0.10."""
    flags = os.environ.get("XLA_FLAGS", "")
    # XLA ends the process at a flag that it does not know, and this one is called experimental
    if jax.__version__.startswith("0.10.") and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=-individual_convolution".lstrip()
