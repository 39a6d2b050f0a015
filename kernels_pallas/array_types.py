"""Types of arrays, known while a program is traced or not."""

from typing import Any, TypeAlias

from jaxtyping import Array, Int
import numpy as np

# NumPy arrays are known while a program is traced; those of jax may be traced.
AnyArray: TypeAlias = Array | np.ndarray
# A leaf of a tree: an array, or what jax puts in its place while it maps the
# tree (a shape, a sharding, an axis), or None.
Leaf: TypeAlias = Any
# An integer, or one for each sequence of a batch; arrays may be traced.
Number: TypeAlias = int | np.integer | Int[AnyArray, "*#B"]
