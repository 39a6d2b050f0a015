"""What the PyTorch peers share: threads, values, layer norm.

PyTorch is imported when it is asked for: it is in the extra `bench` alone.
"""

import importlib
import types
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np

from scansnap_jax.experiment.processes import devices

# Of PyTorch, which need not be installed where types are checked.
Tensor = Any


def load(num_threads: int | None = None) -> types.ModuleType:
  """Imports PyTorch and gives it threads, one a core by default."""
  torch = importlib.import_module("torch")
  torch.set_num_threads(num_threads or devices.num_cores())
  return torch


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor, epsilon: float = 1e-5
) -> Tensor:
  """LayerNorm over the last axis."""
  functional = importlib.import_module("torch").nn.functional
  return functional.layer_norm(x, x.shape[-1:], scale, bias, epsilon)


def trainable(params: PyTree) -> PyTree:
  """Copies a tree of parameters into trainable tensors."""
  torch = importlib.import_module("torch")
  return jax.tree.map(
      lambda leaf: torch.tensor(np.array(leaf)).requires_grad_(), params
  )
