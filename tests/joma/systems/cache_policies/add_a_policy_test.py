"""A new cache policy is one short file and one line in the table of names.

The file is written into a package of its own; everything that a user does with
a policy then works: generate, evaluate beside others, price. It holds to the
laws of every policy.
"""

import pathlib
import sys
import textwrap
from unittest import mock

from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.inference import generate
from joma.inference.cache import kv_cache
from joma.inference.cost import cost_table
from joma.inference.cost import cost_table_config
from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_grid
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.transformer import applied
from tests.laws import policy_laws

_POLICY = '''
  """Tokens whose values are long stay."""

  import dataclasses
  from typing import ClassVar

  import jax.numpy as jnp

  from joma.inference.cache import policy as policy_lib


  @dataclasses.dataclass(frozen=True, kw_only=True)
  class LongValues(policy_lib.Policy):
    """The score is |value| ** power, of a token for good."""

    label: ClassVar[str] = "Long values"
    power: float = 1.0

    def read_prompt(self, prompt):
      """Scores the tokens of a prompt."""
      return self._score(prompt.value).swapaxes(1, 2), None, None

    def enter(self, token, state):
      """Scores a new token."""
      return self._score(token.value), None, state

    def _score(self, value):
      return jnp.linalg.norm(value, axis=-1) ** self.power
'''
_NAME = "long_values"


class AddAPolicyTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    # This compiles much and runs little.
    jax.config.update("jax_disable_most_optimizations", True)
    self.addCleanup(jax.config.update, "jax_disable_most_optimizations", False)
    root = pathlib.Path(self.create_tempdir().full_path)
    source = textwrap.dedent(_POLICY).lstrip()
    self.assertLessEqual(len(source.splitlines()), 40)
    package = root / "added_policies"
    package.mkdir()
    (package / "__init__.py").write_text('"""Policies of a user."""\n')
    (package / "long_values.py").write_text(source)
    self.enterContext(mock.patch.object(sys, "path", [str(root), *sys.path]))
    line = {_NAME: "added_policies.long_values:LongValues"}
    self.enterContext(mock.patch.dict(names.POLICIES, line))

  @pytest.mark.slow
  def test_all_that_users_do_with_it(self):
    policy = names.parse(f"{_NAME}:num_recent=2:power=2.0")
    self.assertEqual(type(policy).__module__, "added_policies.long_values")
    for law in policy_laws.LAWS:
      with self.subTest(law.__name__):
        law(policy)
    # Its own score is at work: the squares of lengths.
    cache = policy_laws.read(policy, policy_laws.FEW).cache
    squares = np.square(cache.value.data).sum(axis=-1)
    np.testing.assert_allclose(cache.score, squares, rtol=1e-5)

    config = configs.TransformerConfig(
        vocab_size=12,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=8,
        max_len=96,
    )
    model = models.Transformer(config, implementation="reference")
    params = applied.params(model)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11]]
    text = generate.generate(
        model,
        params,
        prompts,
        max_new_tokens=4,
        kv_cache=kv_cache.init(policy, config, 2, 6),
    )
    self.assertEqual([len(row) for row in text], [4, 4])

    settings = evaluate_config.EvaluateConfig(
        policies=(_NAME,),
        budgets=(0.5,),
        num_seeds=1,
        batch_size=2,
        length=16,
        num_pairs=2,
        vocab_size=12,
    )
    subject = evaluate_grid.Subject(model=model, params=params)
    rows = evaluate_grid.measure(settings, subject)["mqar"]
    row = next(row for row in rows if row["policy"] == _NAME)
    self.assertBetween(row["recall"]["mean"], 0, 1)
    self.assertLess(row["step_bytes"], rows[0]["step_bytes"])
    self.assertEqual(names.label(_NAME), "Long values")

    table = cost_table.make(
        cost_table_config.CostTableConfig(
            policies=(_NAME,), lengths=(4096,), batch_sizes=(1,), kept=(0.25,)
        )
    )
    self.assertEqual(table["rows"][1]["policy"], _NAME)


if __name__ == "__main__":
  absltest.main()
