"""The laws of `policy_laws` over every name of the tables."""

from absl.testing import parameterized
import pytest

from joma.systems.cache_policies import names as policy_names
from joma.systems.cache_policies.by_attention import kvzap
from tests.joma.systems.cache_policies.by_attention import kvzap_test
from tests.laws import policy_laws

# Sizes at which few tokens show what a policy does.
_SIZED = {
    "streaming_llm": "streaming_llm:num_sinks=2",
    "pyramidkv": "pyramidkv:beta=1",
    "simlayerkv": "simlayerkv:num_sinks=1:threshold=0.6",
    "keyformer": "keyformer:num_steps=40",
    "scissorhands": "scissorhands:history=5",
    "chunkkv": "chunkkv:chunk_size=3",
    "compactor": "compactor:num_sinks=1:num_recent=2:chunk_size=4",
    "finch": "finch:window=3",
    "two_stage": "two_stage:knorm+h2o",
    "cur": "cur:num_sinks=1:chunk_size=4",
    "lagkv": "lagkv:num_sinks=1:lag_size=4",
    "expected_attention": "expected_attention:num_sinks=2:num_future=3",
    "quest": "quest:page_size=4",
}
# One of each kind: by place, by attention, by keys, of the last queries, with
# budgets of heads, with pages. The others are slow tests.
_FIRST = ("window", "h2o", "keydiff", "snapkv", "adakv", "quest")
_NAMES = (*policy_names.POLICIES, *policy_names.WRAPPERS)

# Whose caches keep rotated keys alone.
_OWN = ("quest", "kivi", "think", "adakv", "four_bits")


def _ordered():
  return [*_FIRST, *(name for name in _NAMES if name not in _FIRST)]


# What is fitted beforehand, alone and wrapped: by networks that are drawn.
_FITTED = ("kvzap", "adakv:kvzap", "four_bits:kvzap", "criticalkv:kvzap")


class PolicyLawsTest(parameterized.TestCase):

  @parameterized.parameters(*_ordered())
  @pytest.mark.by_default(1)
  def test_holds(self, name):
    policy = policy_names.parse(_SIZED.get(name, name))
    for law in policy_laws.LAWS:
      with self.subTest(law.__name__):
        law(policy)

  @parameterized.parameters(*_FITTED)
  @pytest.mark.by_default(1)
  def test_holds_of_what_is_fitted(self, name):
    path = self.create_tempfile().full_path
    kvzap.save(path, kvzap_test.drawn(width=16, num_kv_heads=2))
    policy = policy_names.parse(f"{name}:weights={path}")
    for law in policy_laws.LAWS:
      with self.subTest(law.__name__):
        law(policy)

  @parameterized.parameters(*(n for n in _ordered() if n not in _OWN))
  @pytest.mark.by_default(1)
  def test_with_raw_keys_more_prompts_are_their_tokens_one_by_one(self, name):
    policy = policy_names.parse(_SIZED.get(name, name))
    law = policy_laws.more_prompts_are_their_tokens_one_by_one
    law(policy, keys="raw")
