from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention.xla import entry

_OPS = ("dense", "block_sparse")


def _arrays(**changed):
  query, key = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 8, 2, 16))
  return {"query": query, "key": key, "value": key, **changed}


def _both(key):
  return {"key": key, "value": key}


def _ints(*shape):
  return np.zeros(shape, np.int32)


# Arguments, and what the error says of them.
_WRONG = {
    "heads": (
        _both(jnp.zeros((2, 8, 3, 16))),
        "4 query heads must be a multiple of the 3",
    ),
    "no_kv_heads": (_both(jnp.zeros((2, 8, 0, 16))), "multiple of the 0"),
    "no_heads": (dict(query=jnp.zeros((2, 8, 0, 16))), "the 0 query heads"),
    "more_kv_heads": (_both(jnp.zeros((2, 8, 8, 16))), "multiple of the 8"),
    "value": (dict(value=jnp.zeros((2, 9, 2, 16))), "must be alike"),
    "batch": (_both(jnp.zeros((1, 8, 2, 16))), "equal first"),
    "head_dim": (_both(jnp.zeros((2, 8, 2, 8))), "and last .* axes"),
    "no_head_dim": (
        dict(query=jnp.zeros((2, 8, 4, 0)), **_both(jnp.zeros((2, 8, 2, 0)))),
        "head_dim of 1 or more",
    ),
    "rank": (
        dict(query=jnp.zeros((8, 4, 16))),
        r"query .*\(8, 4, 16\).* 4 axes",
    ),
    "list": (dict(query=[0.0]), "query is a list; it must be an array"),
    "ints": (dict(query=jnp.zeros((2, 8, 4, 16), int)), "query is int32"),
    "complex": (
        dict(value=jnp.zeros((2, 8, 2, 16), complex)),
        "value is complex64; .*float32",
    ),
    "float8": (
        dict(key=jnp.zeros((2, 8, 2, 16), "float8_e4m3fn")),
        "key is float8_e4m3fn; .* bfloat16, float16, float32",
    ),
    "types": (
        dict(query=jnp.zeros((2, 8, 4, 16), "bfloat16")),
        "are bfloat16, float32, float32; they must have one type",
    ),
    "scale": (dict(scale=float("nan")), "scale=nan must be finite"),
    "scale_text": (dict(scale="auto"), "scale='auto' must be a number"),
    "scale_array": (dict(scale=jnp.ones(2)), "scale=.* must be a number"),
    "cap": (
        dict(logits_soft_cap=-1.0),
        "logits_soft_cap=-1.0 must be positive",
    ),
    "cap_0": (dict(logits_soft_cap=0), "logits_soft_cap=0 must be positive"),
    "cap_inf": (
        dict(logits_soft_cap=float("inf")),
        "logits_soft_cap=inf must be finite",
    ),
    "sinks": (
        dict(sink_logits=jnp.zeros(2)),
        r"sink_logits has shape \(2,\).* each of the 4 query heads",
    ),
    "sink_ints": (dict(sink_logits=_ints(4)), "sink_logits is int32"),
    "rows": (
        dict(row_weights=jnp.zeros((2, 4, 7)), return_col_mass=True),
        r"\(2, 4, 7\); it must broadcast to .* \(2, 4, 8\)",
    ),
    "rows_rank": (
        dict(row_weights=jnp.zeros(8), return_col_mass=True),
        r"shape \(8,\); it must broadcast to",
    ),
    "rows_unused": (
        dict(row_weights=jnp.zeros((2, 4, 8))),
        "needs return_col_mass=True",
    ),
    "mass": (dict(col_mass_heads="all"), "'all' must be 'query' or 'kv'"),
    "unknown": (
        dict(implementation="cuda"),
        "'cuda' is unknown; it must be one of reference, xla, pallas_tpu",
    ),
    "tpu": (
        dict(implementation="pallas_tpu"),
        "'pallas_tpu' needs a TPU, but this program is made for cpu",
    ),
    "gpu": (dict(implementation="pallas_gpu"), "'pallas_gpu' needs a GPU"),
    "config": (
        dict(config=128, implementation="reference"),
        "config=128 is not for implementation='reference'; it must be None",
    ),
}

_WRONG_MASKS = {
    "length": (
        masks.causal(9),
        r"mask.starts has shape \(1, 9\).* must end in 8",
    ),
    "keys": (masks.full(8, 12), "made for 12 keys, but there are 8"),
    "batch": (
        masks.Mask(_ints(3, 1, 8), _ints(3, 1, 8)),
        r"shape \(3, 1, 8\).* after a batch of 2",
    ),
    "dense": (jnp.zeros((8, 8), bool), "must be a .*masks.Mask, such as"),
    "spans": (
        masks.Mask(_ints(3, 8), _ints(3, 8)),
        r"mask.starts has shape \(3, 8\).* 1 or 2 spans",
    ),
    "stops": (masks.Mask(_ints(1, 8), _ints(2, 8)), r"mask.stops \(2, 8\)"),
    "floats": (
        masks.Mask(_ints(1, 8), np.zeros((1, 8))),
        "mask.stops is float64; it must be int32",
    ),
    "one_id": (
        masks.Mask(_ints(1, 8), _ints(1, 8), _ints(8)),
        "needs both query_ids and key_ids",
    ),
    "ids": (
        masks.Mask(_ints(1, 8), _ints(1, 8), _ints(8), _ints(7)),
        r"mask.key_ids has shape \(7,\).* must end in 8",
    ),
}


def _selection(mask=None, **changed):
  fields = dict(
      block_table=_ints(1, 4, 2, 2),
      num_valid=np.ones((1, 4, 2), np.int32),
      block_q=4,
      block_kv=4,
  )
  return selection_lib.Selection(mask=mask, **{**fields, **changed})


_WRONG_SELECTIONS = {
    "text": ("causal", "where is a str; it must be a .*Mask.*Selection"),
    "blocks": (_ints(1, 4, 2, 2), "where is a ndarray; .*from_mask"),
    "no_keys": (_selection(block_kv=0), "block_kv=0 must be at least 1"),
    "no_queries": (_selection(block_q=-4), "block_q=-4 must be at least 1"),
    "floats": (
        _selection(block_table=np.zeros((1, 4, 2, 2))),
        "selection.block_table is float64; it must be int32",
    ),
    "rank": (
        _selection(block_table=_ints(4, 2, 2)),
        r"block_table of shape \(4, 2, 2\).* 8 queries in blocks of 4",
    ),
    "rows": (
        _selection(block_table=_ints(1, 4, 3, 2)),
        r"shape \(1, 4, 3, 2\) .* \[2 or 1, 4 or 2 or 1, 2, width\]",
    ),
    "no_heads_of_ours": (
        _selection(block_table=_ints(1, 3, 2, 2), num_valid=_ints(1, 3, 2)),
        r"shape \(1, 3, 2, 2\)",
    ),
}

# What `debug` finds: fields of a selection, and the error.
_WRONG_TABLES = {
    "past_the_end": (
        dict(block_table=_ints(1, 4, 2, 2) + 2),
        "entries from 2 to 2, but the 8 keys have blocks 0 to 1",
    ),
    "negative": (
        dict(block_table=_ints(1, 4, 2, 2) - 1),
        "entries from -1 to -1, but the 8 keys have blocks 0 to 1",
    ),
    "too_many": (
        dict(num_valid=np.array([[[3, 4]] * 4], np.int32)),
        "num_valid is from 3 to 4, but block_table is 2 wide",
    ),
    "less_than_none": (
        dict(num_valid=_ints(1, 4, 2) - 1),
        "num_valid is from -1 to -1",
    ),
    "twice": (
        dict(block_table=_ints(1, 4, 2, 2) + 1, num_valid=_ints(1, 4, 2) + 2),
        "lists block 1 twice for one query block",
    ),
}


class WrongCallTest(parameterized.TestCase):

  def setUp(self):
    # What users see: shapes are not checked by annotations outside tests.
    super().setUp()
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

  def _assert_one_sentence(self, message, op, arguments):
    with self.assertRaisesRegex(ValueError, message) as caught:
      if op == "block_sparse":
        arguments.setdefault("where", _selection())
      api.attention(**arguments)
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.product(op=_OPS, name=tuple(_WRONG))
  def test_arguments(self, op, name):
    changed, message = _WRONG[name]
    self._assert_one_sentence(message, op, _arrays(**changed))

  @parameterized.product(op=_OPS, name=tuple(_WRONG_MASKS))
  def test_masks(self, op, name):
    mask, message = _WRONG_MASKS[name]
    where = mask if op == "dense" else _selection(mask)
    self._assert_one_sentence(message, op, _arrays(where=where))

  @parameterized.parameters(*_WRONG_SELECTIONS)
  def test_selections(self, name):
    chosen, message = _WRONG_SELECTIONS[name]
    arguments = _arrays(where=chosen)
    self._assert_one_sentence(message, "block_sparse", arguments)

  @parameterized.parameters(*_WRONG_TABLES)
  def test_tables_in_debug_mode(self, name):
    changed, message = _WRONG_TABLES[name]
    fields = {name: jnp.asarray(array) for name, array in changed.items()}
    arguments = _arrays(where=_selection(**fields), debug=True)
    self._assert_one_sentence(message, "block_sparse", arguments)

  @pytest.mark.slow
  def test_a_right_table_in_debug_mode(self):
    # Entries that do not count may be anything.
    table = np.array([0, 77], np.int32).reshape(1, 1, 1, 2)
    chosen = _selection(block_table=np.tile(table, (1, 4, 2, 1)))
    api.attention(
        **_arrays(), where=chosen, debug=True, implementation="reference"
    )

  @parameterized.parameters("scale", "logits_soft_cap")
  def test_numbers_that_are_not_known(self, name):
    @jax.jit
    def call(number):
      return api.attention(**_arrays(), **{name: number}).out

    with self.assertRaisesRegex(ValueError, f"{name} is a traced value"):
      call(0.5)

  def test_config(self):
    with self.assertRaisesRegex(ValueError, "block_q=0 must be at least 1"):
      entry.Config(block_q=0)
    config = entry.Config(block_q=8)
    self._assert_one_sentence(
        "config=.* is not for a selection by implementation='xla'; it must be"
        " None",
        "block_sparse",
        _arrays(config=config, implementation="xla"),
    )
    self._assert_one_sentence(
        "config=8 is not for .* must be a"
        " .*attention.xla.plan.AttentionXlaConfig or None",
        "dense",
        _arrays(config=8, implementation="xla"),
    )


class RightCallTest(parameterized.TestCase):

  @parameterized.product(
      op=_OPS, implementation=("reference", "xla"), axis=(0, 1)
  )
  @pytest.mark.by_default(0, 1)
  def test_empty_arrays(self, op, implementation, axis):
    arrays = {n: jnp.take(x, _ints(0), axis) for n, x in _arrays().items()}
    where = {}
    if op == "block_sparse":
      rows = 2 if axis == 0 else 0
      where["where"] = _selection(
          block_table=_ints(1, 4, rows, 1), num_valid=_ints(1, 4, rows)
      )
    result = api.attention(
        **arrays, **where, return_lse=True, implementation=implementation
    )
    self.assertEqual(result.out.shape, arrays["query"].shape)
    self.assertEqual(result.lse.size, 0)


if __name__ == "__main__":
  absltest.main()
