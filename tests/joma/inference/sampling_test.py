import dataclasses
import json
import os
import subprocess
import sys

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import sampling
from joma.inference import sampling_config
from scansnap_jax.experiment import errors

# The quickest of calls in turn: what else runs counts little.
_TIMES = """
import functools, json, time
import jax
from joma.inference import sampling, sampling_config

logits = 3 * jax.random.normal(jax.random.key(0), (1, 49152))
ways = {"plain": {}, "top_k": {"top_k": 50}, "top_p": {"top_p": 0.9}}
ways["both"] = {"top_k": 50, "top_p": 0.9}
draw, quickest = {}, {}
for name, changes in ways.items():
  config = sampling_config.SamplingConfig(temperature=1.0, **changes)
  draw[name] = jax.jit(functools.partial(sampling.sample, config=config))
for step in range(150):
  for name, program in draw.items():
    started = time.perf_counter()
    program(logits, step=step).block_until_ready()
    seconds = time.perf_counter() - started
    quickest[name] = min(seconds, quickest.get(name, seconds))
shares = {name: t / quickest["plain"] for name, t in quickest.items()}
print(json.dumps({name: round(share, 2) for name, share in shares.items()}))
"""
_PROBS = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


class SamplingConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(temperature=-1.0), "temperature must be positive"),
      (dict(temperature=float("nan")), "temperature must be positive"),
      (dict(top_k=-1), "top_k must be at least 0, got -1"),
      (dict(top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
      (dict(top_p=1.5), r"top_p must lie in \(0, 1\], got 1.5"),
  )
  def test_impossible_settings_are_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      sampling_config.SamplingConfig(**changes)


class SampleTest(parameterized.TestCase):

  def test_greedy_takes_the_largest(self):
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, -1.0, 2.0]])
    got = sampling.sample(logits, sampling_config.GREEDY)
    np.testing.assert_array_equal(got, [1, 0])

  @parameterized.parameters(
      # Tokens 1 and 3 have .7 of the probability, with token 2 they have .85.
      (dict(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
      (dict(top_p=0.65), [0, 4 / 7, 0, 3 / 7, 0]),
      (dict(top_p=0.75), [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0]),
      # Among the three that top_k leaves, 1 and 3 have .7 / .85 = .82.
      (dict(top_k=3, top_p=0.8), [0, 4 / 7, 0, 3 / 7, 0]),
      (dict(top_p=0.01), [0, 1, 0, 0, 0]),
      (dict(), list(_PROBS)),
      (dict(temperature=0.5), list(_PROBS**2 / (_PROBS**2).sum())),
  )
  @pytest.mark.by_default(0, 1)
  def test_draws_have_the_probabilities(self, changes, want):
    config = sampling_config.SamplingConfig(**{"temperature": 1.0} | changes)
    num = 20_000
    logits = jnp.broadcast_to(jnp.log(_PROBS)[None], (num, 5))
    tokens = jax.jit(lambda x: sampling.sample(x, config))(logits)
    got = np.bincount(tokens, minlength=5) / num
    want = np.array(want)
    # Five standard errors; what is left out is never drawn.
    np.testing.assert_array_less(
        np.abs(got - want), 5 * np.sqrt(want * (1 - want) / num) + 1e-12
    )

  def test_is_the_same_without_compilation(self):
    logits = jnp.array([[0.0, 3.0, 1.0, 2.0]])
    with jax.disable_jit():
      kept = sampling._of_greatest(logits, jnp.ones_like(logits), 2)
    self.assertEqual(kept.tolist(), [[-np.inf, 3, -np.inf, 2]])

  def test_numbers_beside_each_other_are_told_apart(self):
    below = np.nextafter(np.float32(1), np.float32(0))
    logits = jnp.array([[below, 1.0, 0.0, 1.0], [1.0, below, 0.0, -1.0]])
    config = sampling_config.SamplingConfig(temperature=1.0, top_k=1)
    kept = np.isfinite(
        jax.jit(sampling.keep_top, static_argnums=1)(logits, config)
    )
    # Equal ones stay together.
    expected = [[False, True, False, True], [True, False, False, False]]
    np.testing.assert_array_equal(kept, expected)

  @pytest.mark.slow
  def test_temperatures_towards_0_are_greedy(self):
    logits = jnp.array([[1.0, 3.0, 2.0, -1.0], [40.0, -60.0, 39.0, 0.0]])
    for temperature in (1e-3, 1e-7, 1e-40, 1e-300):
      config = sampling_config.SamplingConfig(temperature=temperature)
      for top in ({}, {"top_k": 2}, {"top_p": 0.9}):
        changed = dataclasses.replace(config, **top)
        tokens = sampling.sample(logits, changed)
        self.assertEqual(tokens.tolist(), [1, 0], changed)

  @pytest.mark.slow
  def test_top_k_and_top_p_cost_at_most_three_plain_draws(self):
    """49,152 tokens, in a process of its own, which has all cores."""
    found = subprocess.run(
        [sys.executable, "-c", _TIMES],
        capture_output=True,
        text=True,
        # The tests' own flags compile quickly, and slow programs.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=True,
    )
    shares = json.loads(found.stdout)
    print(shares)
    self.assertLess(max(shares.values()), 3)

  def test_neighbours_and_steps(self):
    config = sampling_config.SamplingConfig(temperature=1.0, seed=3)
    logits = jax.random.normal(jax.random.key(0), (4, 50))
    alone = sampling.sample(logits[:2], config, 5)
    together = sampling.sample(logits, config, 5)
    np.testing.assert_array_equal(alone, together[:2])
    same = jnp.broadcast_to(logits[:1], (64, 50))
    draws = [sampling.sample(same, config, step) for step in (0, 1)]
    self.assertGreater(len(set(np.asarray(draws[0]).tolist())), 5)
    self.assertTrue((draws[0] != draws[1]).any())
