"""Selectors that choose everything are dense attention, whoever computes it."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import pytest

from joma.systems import names
from tests.joma.systems.selectors import selected

# Every key, in several blocks: the last of 130 or 23 keys is not full. Tiles of
# TPU kernels have 128 keys.
_ON_TILES = (
    "hip:k=1024:block=128",
    "hylra:full=1:k=1024:block=128:reuse=false",
    "indexer:k=256:block=128",
    "moba:k=64:block=128",
    "xattention:threshold=1:block=128",
)
_ON_XLA = (
    "hip:k=64:block=4",
    "hylra:full=1:k=64:block=4:reuse=false",
    "indexer:k=24:block=4",
    "moba:k=64:block=4",
    "xattention:threshold=1:block=8:stride=4",
)


def _system(entry):
  (part,) = names.parts(entry)
  return names.make(part)


class EverythingTest(parameterized.TestCase):

  @parameterized.product(entry=_ON_XLA, implementation=("reference", "xla"))
  @pytest.mark.slow
  def test_on_xla(self, entry, implementation):
    """Outputs and gradients, to 1e-6."""
    apart = selected.apart(_system(entry), implementation)
    self.assertLess(max(jax.tree.leaves(apart)), 1e-6)

  @parameterized.parameters(*_ON_TILES)
  @pytest.mark.slow
  def test_on_interpreted_pallas(self, entry):
    arrays = selected.draw(130)
    apart = selected.apart(_system(entry), "pallas_tpu", arrays)
    self.assertLess(max(jax.tree.leaves(apart)), 1e-6)


if __name__ == "__main__":
  absltest.main()
