import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import conversation
from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names as policy_names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer.rope import config as rope_config
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=50,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
    max_len=16,
    rope=rope_config.RopeConfig(rope_type="dynamic", factor=4.0),
)
_MODEL = models.Transformer(_CONFIG, implementation="reference")
_DIFFERENT = (list(range(8)), list(range(10, 17)), list(range(20, 25)))
_TURNS = ([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [3, 2, 3, 8])


@functools.cache
def _params():
  return applied.params(_MODEL, 1)


@functools.partial(jax.jit, donate_argnums=2)
def _take(token, position, caches):
  return _MODEL.apply(
      {"params": _params()},
      token.reshape(1, 1),
      positions=position.reshape(1, 1),
      kv_cache=caches,
  )


def _caches(policy):
  if policy is None:
    return full_cache.init(_CONFIG, 1, 64)
  return kv_cache.init(policy_names.parse(policy), _CONFIG, 1, 12)


class ConversationTest(parameterized.TestCase):

  # Frequencies change with the text beyond 16 tokens: keys are kept raw.
  # KeyDiff: where a token comes twice, its keys are equal, and the last bits of
  # their cosines decide which of them leaves (in float64 all is the same, with
  # `_TURNS` too). So all tokens differ here.
  @parameterized.parameters(
      (None, _TURNS, 4),
      ("h2o", _TURNS, 4),
      ("keydiff", _DIFFERENT, 1),
      ("streaming_llm", _TURNS, 4),
  )
  @pytest.mark.slow
  def test_three_turns_are_their_tokens_one_by_one(self, policy, turns, new):
    talk = conversation.Conversation(_MODEL, _params(), _caches(policy))
    first = list(talk.say(turns[0], new))
    # The first prompt is read at once; all that follows one by one here.
    alone = conversation.Conversation(_MODEL, _params(), _caches(policy))
    self.assertEqual(list(alone.say(turns[0], new)), first)
    cache, position = alone.kv_cache, alone.num_taken_in
    ids = [*alone.waiting]
    for turn in turns[1:]:
      answer = list(talk.say(turn, new))
      ids += turn
      for _ in range(new):
        for token in ids:
          logits, cache = _take(jnp.array(token), jnp.array(position), cache)
          position += 1
        ids = [int(logits[0, 0].argmax())]
        self.assertEqual(answer.pop(0), ids[0])
    self.assertEqual(talk.num_taken_in, position)
    self.assertEqual(talk.waiting, tuple(ids))
    chex.assert_trees_all_close(talk.kv_cache, cache, atol=1e-5)
    if policy is not None:
      for mine, other in zip(talk.kv_cache, cache, strict=True):
        np.testing.assert_array_equal(mine.pos, other.pos)

  def test_who_leaves_in_the_middle_goes_on_from_what_was_shown(self):
    talk, other = (
        conversation.Conversation(_MODEL, _params(), _caches("h2o"))
        for _ in range(2)
    )
    steps = talk.say(_TURNS[0], 4)
    shown = [next(steps), next(steps)]
    steps.close()
    self.assertEqual(talk.num_taken_in, len(_TURNS[0]) + 2)
    self.assertEqual(list(other.say(_TURNS[0], 2)), shown)
    self.assertEqual(list(talk.say([7], 3)), list(other.say([7], 3)))

  def test_nothing_to_answer_is_refused(self):
    talk = conversation.Conversation(_MODEL, _params(), _caches("h2o"))
    with self.assertRaisesRegex(errors.UserError, "say something"):
      talk.say([], 3)
