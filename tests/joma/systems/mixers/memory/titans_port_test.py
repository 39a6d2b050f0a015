"""Titans' memory beside the public port, titans-pytorch, where it is there.

The port's memory batch is our chunk: gradients are of the weights at its
start. Its own chunk is one token here, since it gives all tokens of one the
same rates and shows them weights after whole chunks alone. Its loss is the mean
of squares, its gelu that of the error function.
"""

import warnings

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.mixers.memory import titans_memory
from tests.joma.systems import one_layer

# Texts, tokens, heads, channels of a head; 10 is no multiple of a chunk of 4.
_TEXTS, _LENGTH, _HEADS, _SIZE = 2, 10, 2, 4
_RATE = 0.3


def _port(depth, size, torch, port_lib, models_lib):
  """A memory of as many matrices, in batches of `size` tokens."""
  torch.manual_seed(0)
  width = _HEADS * _SIZE
  port = port_lib.NeuralMemory(
      dim=width,
      dim_head=_SIZE,
      heads=_HEADS,
      chunk_size=1,
      batch_size=size,
      model=models_lib.MemoryMLP(_SIZE, depth=depth, expansion_factor=1.0),
      default_step_transform_max_lr=_RATE,
      mem_model_norm_add_residual=False,
      pre_rmsnorm=False,
  ).eval()
  for weight in port.parameters():
    weight.data = 0.5 * torch.randn(weight.shape)
  # Heads come out side by side, each halved by a gate of 0.
  torch.nn.init.zeros_(port.retrieve_gate[0].weight)
  port.combine_heads.weight.data = torch.eye(width)
  return port


def _heads(x):
  return x.reshape(_TEXTS, _LENGTH, _HEADS, _SIZE)


def _tokens(port, x):
  """What the port makes of its input."""
  made = lambda module: x @ one_layer.array(module.weight).T
  opened = lambda module: jax.nn.sigmoid(
      made(module) + one_layer.array(module.bias)[None, None]
  )
  return titans_memory.Tokens(
      *(_heads(made(m)) for m in (port.to_queries, port.to_keys)),
      _heads(made(port.to_values)),
      keep=opened(port.to_momentum[0]),
      rate=_RATE * opened(port.to_adaptive_step[0]),
      forget=opened(port.to_decay_factor[0]),
  )


class PortTest(parameterized.TestCase):

  @parameterized.parameters((1, 1), (1, 4), (2, 1), (2, 4), (3, 5))
  def test_equals(self, depth, size):
    """Outputs of all tokens, and the newest weights."""
    torch, *libs = self._imported()
    port = _port(depth, size, torch, *libs)
    x = torch.randn(_TEXTS, _LENGTH, _HEADS * _SIZE)
    out, state = port(x)
    weights = tuple(map(one_layer.array, port.memory_model_parameters))
    found, left = jax.jit(
        lambda tokens: titans_memory.sweep(
            titans_memory.begin(weights, _TEXTS),
            tokens,
            jnp.full(_TEXTS, _LENGTH),
            size,
            titans_memory.Rule(is_mean=True, is_exact=True),
        )
    )(_tokens(port, one_layer.array(x)))
    split = lambda w: w.reshape(_TEXTS, _HEADS, _SIZE, _SIZE)
    want = [2 * _heads(one_layer.array(out))]
    want += [split(one_layer.array(w)) for w in state.states[0].values()]
    got = [found, *left.memory]
    self.assertLen(want, 1 + depth)
    apart = [
        float(np.abs(one - two).max())
        for one, two in zip(want, got, strict=True)
    ]
    print(f"largest difference from titans-pytorch: {max(apart):.1e}")
    self.assertLess(max(apart), 1e-4)
    self.assertGreater(min(np.abs(one).max() for one in want), 0.01)

  def _imported(self):
    """Modules of torch and of the port."""
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its packages use old parts of torch.
        from titans_pytorch import memory_models as models_lib
        from titans_pytorch import neural_memory as port_lib
        import torch
    except ImportError:
      self.skipTest("titans-pytorch is not installed: the extra bench")
    return torch, port_lib, models_lib


if __name__ == "__main__":
  absltest.main()
