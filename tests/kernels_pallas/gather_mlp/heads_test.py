from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas.gather_mlp import heads
from tests.kernels_pallas import modes

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
# As in the oracle of the MLP.
_ATOL = {"float32": 2e-5, "bfloat16": 2.0**-7}
_BATCH, _WIDTH, _HEADS, _SIZE, _CHOSEN = 3, 24, 6, 16, 3


def _draw(dtype, per_sequence, is_ragged):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  lists = _BATCH if per_sequence else 1
  ids = np.stack([rng.permutation(_HEADS)[:_CHOSEN] for _ in range(lists)])
  num = np.array([2, 0, 3], np.int32)[:lists] if is_ragged else None
  if not per_sequence:
    ids, num = ids[0], None if num is None else num[0]
  x, kernel = normal(_BATCH, _WIDTH), normal(_HEADS, _SIZE, _WIDTH)
  return x, normal(_BATCH, _CHOSEN, _SIZE), kernel, ids.astype(np.int32), num


def _pairs(ids, num):
  """Sequence, entry and head of all that counts."""
  ids = np.broadcast_to(ids, (_BATCH, _CHOSEN))
  num = np.broadcast_to(_CHOSEN if num is None else num, (_BATCH,))
  return [(b, s, ids[b, s]) for b in range(_BATCH) for s in range(num[b])]


def _expected(x, parts, kernel, ids, num):
  """x into heads, parts out of heads, and both gradients for cotangents."""
  x, parts, kernel = (np.asarray(a, np.float64) for a in (x, parts, kernel))
  found = {
      "into": np.zeros_like(parts),
      "into_d_x": np.zeros_like(x),
      "into_d_kernel": np.zeros_like(kernel),
      "out": np.zeros_like(x),
      "out_d_heads": np.zeros_like(parts),
      "out_d_kernel": np.zeros_like(kernel),
  }
  for b, s, n in _pairs(ids, num):
    found["into"][b, s] = kernel[n] @ x[b]
    found["into_d_x"][b] += parts[b, s] @ kernel[n]
    found["into_d_kernel"][n] += np.outer(parts[b, s], x[b])
    found["out"][b] += parts[b, s] @ kernel[n]
    found["out_d_heads"][b, s] = kernel[n] @ x[b]
    found["out_d_kernel"][n] += np.outer(parts[b, s], x[b])
  return found


def _run(implementation, x, parts, kernel, ids, num):
  """Each projection, with the argument of the other as the cotangent."""

  @jax.jit
  def both(x, parts, kernel, ids, num):
    into = lambda x, kernel: heads.project_in(
        x, kernel, ids, num_valid=num, implementation=implementation
    )
    out_of = lambda parts, kernel: heads.project_out(
        parts, kernel, ids, num_valid=num, implementation=implementation
    )
    into, into_pullback = jax.vjp(into, x, kernel)
    out, out_pullback = jax.vjp(out_of, parts, kernel)
    names = ("into", "into_d_x", "into_d_kernel")
    found = dict(zip(names, (into, *into_pullback(parts)), strict=True))
    names = ("out", "out_d_heads", "out_d_kernel")
    return found | dict(zip(names, (out, *out_pullback(x)), strict=True))

  with modes.mode_of(implementation):
    found = both(x, parts, kernel, ids, num)
  jax.tree.map(
      np.testing.assert_array_equal, found, both(x, parts, kernel, ids, num)
  )
  return found


class HeadsTest(parameterized.TestCase):

  @parameterized.product(
      implementation=_IMPLEMENTATIONS,
      case=(
          ("float32", False, True),
          ("float32", True, True),
          ("bfloat16", True, False),
      ),
  )
  @pytest.mark.by_default(0, 3, 4, 7, 8)
  def test_equals_float64(self, implementation, case):
    arguments = _draw(*case)
    found = _run(implementation, *arguments)
    for name, want in _expected(*arguments).items():
      self.assertEqual(found[name].dtype, case[0], name)
      atol = (1 + ("_d_" in name)) * _ATOL[case[0]] * np.abs(want).max()
      np.testing.assert_allclose(
          np.asarray(found[name], np.float64), want, atol=atol, err_msg=name
      )

  def test_all_heads_are_the_dense_projection_bit_by_bit(self):
    x, _, kernel, _, _ = _draw("float32", False, False)
    dense = lambda x, kernel: jnp.einsum(
        "BD,NHD->BNH", x, kernel, precision="highest"
    )
    chosen = lambda x, kernel: heads.project_in(
        x, kernel, np.arange(_HEADS), implementation="xla"
    )
    np.testing.assert_array_equal(
        jax.jit(chosen)(x, kernel), jax.jit(dense)(x, kernel)
    )
    dense_out = lambda parts, kernel: jnp.einsum(
        "BNH,NHD->BD", parts, kernel, precision="highest"
    )
    chosen_out = lambda parts, kernel: heads.project_out(
        parts, kernel, np.arange(_HEADS), implementation="xla"
    )
    parts = jax.jit(dense)(x, kernel)
    np.testing.assert_array_equal(
        jax.jit(chosen_out)(parts, kernel), jax.jit(dense_out)(parts, kernel)
    )


class WrongCallTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

  @parameterized.named_parameters(
      ("width", {"kernel": jnp.ones((4, 2, 5))}, "must have equal D"),
      ("axes", {"x": jnp.ones(8)}, r"they must be \[B, D\] and \[N, H, D\]"),
      ("type", {"x": jnp.ones((2, 8), jnp.bfloat16)}, "must have one type"),
      ("ids", {"head_ids": np.ones((3, 1), int)}, "with B = 2"),
      (
          "range",
          {"head_ids": np.array([0, 7]), "debug": True},
          "head_ids has entries from 0 to 7, but there are heads 0 to 3",
      ),
      ("unknown", {"implementation": "x"}, "'x' is unknown"),
  )
  def test_into(self, changed, message):
    arguments = {
        "x": jnp.ones((2, 8)),
        "kernel": jnp.ones((4, 2, 8)),
        "head_ids": np.array([0, 1]),
    }
    with self.assertRaisesRegex(ValueError, message):
      heads.project_in(**arguments | changed)

  def test_out_of(self):
    with self.assertRaisesRegex(ValueError, "has 3 heads and head_ids"):
      heads.project_out(
          jnp.ones((2, 3, 2)), jnp.ones((4, 2, 8)), np.array([0, 1])
      )


if __name__ == "__main__":
  absltest.main()
