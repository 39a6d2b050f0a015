"""Types of what a kernel's body gets, which Pallas has no public names for."""

from typing import Any, TypeAlias

import jax
from jax.experimental import pallas as pl

# A reference to memory (VMEM, SMEM, HBM, shared or global), or a view of one.
Ref: TypeAlias = Any
# References of a kernel by name, as attributes.
Refs: TypeAlias = Any
# A reference to semaphores or to barriers.
Barrier: TypeAlias = Any
# Memory that a kernel asks for: its kind, shape and type, or semaphores.
Buffer: TypeAlias = Any
# A copy between memories, which can be started and awaited.
Copy: TypeAlias = Any
# A position: a number, or one that is traced.
Index: TypeAlias = jax.Array | int
# Positions next to each other.
Slice: TypeAlias = pl.Slice | slice
# How many of something, as `Index`.
Count: TypeAlias = Index
