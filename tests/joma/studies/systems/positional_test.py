from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.systems.subjects import positional_network as networks
from tests.joma.studies.systems import small


def _network(kind, task="sort"):
  return networks.Network(
      kind=kind, task=task, num_inputs=4, width=8, batch_size=4
  )


class PositionalTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("positional")
    # Not trained: the networks' own laws hold, the paper's claim cannot.
    verdicts = [row["it"] for row in summary["claims"]]
    self.assertEqual(verdicts, ["FAILED", "holds", "holds"])
    self.assertStartsWith(summary["finding"], "2 of 3 claims hold. FAILED:")
    figure, texts = small.drawn("positional")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset(["sort", "standard attention"], texts)

  @pytest.mark.slow
  def test_outputs_are_linear_in_the_size_of_numbers(self):
    """With c a power of two to the bit; standard attention is the twin."""
    numbers = networks.draw_lists(jax.random.key(0), (3, 4), 1.0)
    for kind, is_linear in (("positional", True), ("standard", False)):
      network = _network(kind)
      params = network.init(jax.random.key(1))
      apply = jax.jit(network.apply)
      far, near = apply(params, 8 * numbers), 8 * apply(params, numbers)
      self.assertEqual(bool((far == near).all()), is_linear)

  def test_tasks_are_what_their_names_say(self):
    numbers = jnp.array([[3.0, -1.0, 2.0, -2.0]])
    for task, want in (
        ("sort", [-2, -1, 2, 3]),
        ("sum", [3, 2, 4, 2]),
        ("min", [3, -1, -1, -2]),
    ):
      np.testing.assert_array_equal(networks.answer(task, numbers), [want])


if __name__ == "__main__":
  absltest.main()
