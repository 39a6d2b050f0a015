import contextlib
import dataclasses
import functools
import inspect

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import decode_steps
from joma.inference import generate
from joma.inference import sampling_config
from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names as policy_names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer.text import sizes
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
)
_MODEL = models.Transformer(_CONFIG, implementation="reference")
_PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9]]
# So hot that all tokens are alike: what is drawn is the key's alone.
_HOT = sampling_config.SamplingConfig(temperature=1e6, seed=1)


@functools.cache
def _params(config=_CONFIG):
  model = _MODEL.clone(config=config)
  params = applied.params(model, 1)
  # Wider than at the start of training, so that the largest logit stands out.
  return jax.tree.map(lambda x: 3 * x, params)


@functools.cache
def _greedy(prompt, num_new):
  """By a forward pass of the whole text for every token."""
  apply = jax.jit(_MODEL.apply)
  ids = list(prompt)
  for _ in range(num_new):
    # Padded to one length: causality leaves the logits as they are.
    padded = jnp.array([ids + [0] * (24 - len(ids))])
    logits = apply({"params": _params()}, padded)
    ids.append(int(logits[0, len(ids) - 1].argmax()))
  return ids[len(prompt) :]


@contextlib.contextmanager
def _listening(listener):
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


class GenerateTest(parameterized.TestCase):

  def test_a_cache_that_cannot_follow_a_system_is_refused_first(self):
    """Nothing of the prompt is shown, and no parameter looked at."""
    config = dataclasses.replace(_CONFIG, attention=("pointwise", "softmax"))
    model = _MODEL.clone(config=config)
    make = functools.partial(
        kv_cache.init, policy_names.parse("h2o"), config, 1, 8
    )
    generate.check_follows(_MODEL, 1, make)
    follow = "SlotCache cannot follow pointwise, which layer 0 has"
    with self.assertRaisesRegex(errors.UserError, follow):
      generate.check_follows(model, 1, make)
    with self.assertRaisesRegex(errors.UserError, follow):
      generate.stream(model, None, [[1]], max_new_tokens=2, kv_cache=make())

  def test_ragged_prompts_continue_as_each_alone_by_full_passes(self):
    got = generate.generate(_MODEL, _params(), _PROMPTS, max_new_tokens=12)
    for row, prompt in zip(got, _PROMPTS, strict=True):
      self.assertEqual(row.tolist(), _greedy(tuple(prompt), 12))

  @parameterized.parameters(
      ((5, 64, 65, 300, 480),), ((5, 600, 2290, 2310, 5000, 8180),)
  )
  @pytest.mark.slow
  def test_few_programs_for_texts_of_any_length(self, lengths):
    """All compilations are counted, those of single operations too."""
    rng, programs = np.random.default_rng(0), []
    count = lambda event, _, **__: programs.append(event)
    prompts = [rng.integers(0, 50, length) for length in lengths]
    wanted = [
        generate.generate(
            _MODEL,
            _params(),
            [prompt],
            max_new_tokens=1 + len(prompt) % 7,
            # Of just the size, and read at once.
            kv_cache=full_cache.init(_CONFIG, 1, len(prompt) + 7),
            prefill_chunk=len(prompt),
        )
        for prompt in prompts[:2]
    ]
    jax.clear_caches()
    with _listening(count):
      found = [
          generate.generate(
              _MODEL, _params(), [prompt], max_new_tokens=1 + len(prompt) % 7
          )
          for prompt in prompts
      ]
    np.testing.assert_equal(found[:2], wanted)
    self.assertLessEqual(
        programs.count("/jax/core/compile/backend_compile_duration"),
        2 if max(lengths) < 512 else 8,
    )

  @parameterized.parameters(
      *("h2o", "window", "quest:num_keys=16", "snapkv", "knorm", "keydiff"),
      *("tova", "streaming_llm", "random", "scissorhands", "lagkv:lag_size=9"),
      *("pyramidkv", "keyformer", "rkv", "adakv", "full"),
  )
  @pytest.mark.slow
  def test_policies_compile_for_few_lengths(self, policy):
    """One program makes a cache, one goes on, one reads each padded length."""
    programs, lengths = [], (5, 60, 100, 130, 300)
    count = lambda event, _, **__: programs.append(event)
    policy = policy_names.parse(policy)
    capacity = 64 if policy.evicts and not policy.reads_part else 320
    jax.clear_caches()
    with _listening(count):
      for length in lengths:
        generate.generate(
            _MODEL,
            _params(),
            [np.arange(length) % 50],
            max_new_tokens=1 + length % 4,
            kv_cache=kv_cache.init(policy, _CONFIG, 1, capacity),
        )
    padded = {sizes.length(length, _CONFIG) for length in lengths}
    # PyramidKV has a capacity a layer.
    made = len(set(calls.capacities(policy, _CONFIG.num_layers, capacity)))
    self.assertLessEqual(
        programs.count("/jax/core/compile/backend_compile_duration"),
        made + len(padded) + 1,
    )
    every = {sizes.length(length, _CONFIG) for length in range(1, 8193)}
    self.assertLessEqual(len(every) + 2, 8)

  @parameterized.parameters(None, "h2o", "snapkv", "quest:num_keys=16")
  @pytest.mark.by_default(0)
  def test_prompts_in_pieces_are_as_at_once(self, policy):
    prompts = [np.arange(45) % 50, np.arange(7) * 3]
    params = jax.tree.map(lambda x: x / 3, _params())  # As at the start.

    def run(chunk):
      cache = None
      if policy is not None:
        cache = kv_cache.init(policy_names.parse(policy), _CONFIG, 2, 64)
      steps = generate.stream(
          _MODEL,
          params,
          prompts,
          max_new_tokens=3,
          kv_cache=cache,
          prefill_chunk=chunk,
      )
      return [tokens for tokens, _ in steps], steps.last.kv_cache

    (tokens, cache), (wanted, whole) = run(8), run(50)
    np.testing.assert_array_equal(tokens, wanted)
    chex.assert_trees_all_close(cache, whole, atol=1e-5)

  @pytest.mark.slow
  def test_a_long_prompt_in_pieces_is_as_at_once(self):
    """3,000 tokens: the tokens that follow, and all that is kept."""
    prompt = np.random.default_rng(0).integers(0, 50, 3000)
    params = jax.tree.map(lambda x: x / 3, _params())  # As at the start.

    def run(chunk):
      steps = generate.stream(
          _MODEL.clone(implementation="xla"),
          params,
          [prompt],
          max_new_tokens=6,
          prefill_chunk=chunk,
      )
      tokens = [int(now[0]) for now, _ in steps]
      return tokens, [cache.key[:, :, :3005] for cache in steps.last.kv_cache]

    at_once, kept = run(3000)
    for chunk in (512, 700):
      tokens, pieces = run(chunk)
      self.assertEqual(tokens, at_once)
      chex.assert_trees_all_close(pieces, kept, atol=1e-5)

  @pytest.mark.slow
  def test_pieces_bound_the_memory_of_prompts(self):
    """Temporaries of the compiled program, of a model like SmolLM2-135M.

    Four of its 30 layers: layers follow each other in the same memory.
    """
    config = configs.TransformerConfig(
        vocab_size=49152,
        num_layers=4,
        embed_dim=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        hidden_dim=1536,
    )
    model = models.Transformer(config)
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids(1, 4))["params"]
    caches = jax.eval_shape(lambda: full_cache.init(config, 1, 9216))
    found = {}
    for size in (512, 8192):
      lowered = decode_steps.read_piece.lower(
          model,
          params,
          ids(1, size),
          ids(),
          ids(1),
          ids(1),
          (ids(1), jax.ShapeDtypeStruct((1,), bool)),
          caches,
      )
      memory = lowered.compile().memory_analysis()
      found[size] = memory.temp_size_in_bytes / 2**20
      print(f"pieces of {size}: {found[size]:.0f} MiB of temporaries")
    self.assertLess(found[512], found[8192] / 8)

  def test_a_sequence_ends_at_its_end_of_text(self):
    texts = [_greedy(tuple(prompt), 12) for prompt in _PROMPTS]
    stop = texts[0][3]
    got = generate.generate(
        _MODEL, _params(), _PROMPTS, max_new_tokens=12, eos_ids=(stop,)
    )
    for row, text in zip(got, texts, strict=True):
      end = text.index(stop) + 1 if stop in text else 12
      self.assertEqual(row.tolist(), text[:end])

  @pytest.mark.slow
  def test_all_ended_stops_early(self):
    steps = generate.stream(
        _MODEL,
        _params(),
        _PROMPTS,
        max_new_tokens=12,
        eos_ids=tuple(range(50)),
    )
    self.assertLen(list(steps), 1)

  @pytest.mark.slow
  def test_draws_do_not_depend_on_neighbours(self):
    options = dict(max_new_tokens=8, sampler=_HOT)
    run = functools.partial(generate.generate, _MODEL, _params(), **options)
    together, alone = run(_PROMPTS), run(_PROMPTS[:1])
    self.assertEqual(together[0].tolist(), alone[0].tolist())
    greedy = _greedy(tuple(_PROMPTS[0]), 8)
    self.assertNotEqual(together[0].tolist(), greedy)

  @pytest.mark.slow
  def test_each_token_is_drawn_with_a_key_of_its_own(self):
    got = generate.generate(
        _MODEL, _params(), _PROMPTS, max_new_tokens=8, sampler=_HOT
    )
    for row in got:
      self.assertGreater(len(set(row.tolist())), 4)

  @pytest.mark.slow
  def test_padding_of_a_prompt_is_not_kept(self):
    lengths = jnp.array([2, 5])
    policy = policy_names.parse("streaming_llm")
    state = generate.prefill(
        _MODEL,
        _params(),
        jnp.ones((2, 8), jnp.int32),
        lengths,
        kv_cache.init(policy, _CONFIG, 2, 8),
    )
    for cache in state.kv_cache:
      last = cache.kept_positions().max(axis=(1, 2))
      np.testing.assert_array_equal(last, lengths - 1)

  @parameterized.parameters(
      ([], "There is no prompt"),
      ([[1], []], "Prompt 1 has no tokens"),
      ([[1, 50]], "ids from 1 to 50; the model knows 0 to 49"),
      ([[-1]], "ids from -1 to -1"),
  )
  def test_wrong_prompts_are_refused(self, prompts, message):
    with self.assertRaisesRegex(errors.UserError, message):
      generate.generate(_MODEL, _params(), prompts, max_new_tokens=2)

  @parameterized.parameters(
      ("hello", "Prompt 1 is the text 'hello': give token ids"),
      (np.array([1.5, 2.0]), "Prompt 1 must be .* integers.* got float64"),
      (np.array([[1, 2]]), r"got int64 of shape \(1, 2\)"),
      (np.array([True, False]), "got bool"),
  )
  def test_what_are_no_ids_is_refused(self, prompt, message):
    pad = inspect.unwrap(generate.pad_prompts)  # Without the check of types.
    with self.assertRaisesRegex(errors.UserError, message):
      pad([[1, 2], prompt], _CONFIG)

  @parameterized.parameters(None, "full", "quest:page_size=8")
  def test_a_cache_that_is_too_small_is_refused_before_the_first_step(
      self, policy
  ):
    def cache(size):
      if policy is None:
        return full_cache.init(_CONFIG, 1, size)
      return kv_cache.init(policy_names.parse(policy), _CONFIG, 1, size)

    ask = lambda size: generate.stream(
        _MODEL, {}, [[1, 5, 9]], max_new_tokens=14, kv_cache=cache(size)
    )
    ask(16)  # Three of the prompt, and all new ones but the last.
    with self.assertRaisesRegex(
        errors.UserError, "layer 0 holds 8 positions .* take 16"
    ):
      ask(8)

  @parameterized.parameters(0.0, 0.7)
  @pytest.mark.by_default(0)
  def test_logits_that_are_no_numbers_are_an_error_not_a_token(
      self, temperature
  ):
    params = jax.tree.map(lambda x: x, _params())
    # Token 7 has an embedding that is no number; texts without it are well.
    embedding = params["token_embed"]["embedding"]
    params["token_embed"] = {"embedding": embedding.at[7].set(jnp.nan)}
    sampler = sampling_config.SamplingConfig(
        temperature=temperature, top_k=3, top_p=0.9
    )
    with self.assertRaisesRegex(
        errors.UserError, "Sequence 0: the logits of new token 0 are not finite"
    ):
      generate.generate(
          _MODEL, params, [[1, 7, 2]], max_new_tokens=3, sampler=sampler
      )

  @pytest.mark.slow
  def test_an_overflow_is_an_error_at_its_step(self):
    # The decode step itself: the cache of the second token is poisoned.
    padded, lengths = generate.pad_prompts([[1, 2], [3, 4]], _CONFIG)
    cache = full_cache.init(_CONFIG, 2, 80)
    state = generate.prefill(_MODEL, _params(), padded, lengths, cache)
    poison = lambda x: x.at[1].set(jnp.nan)
    broken = dataclasses.replace(
        state, kv_cache=jax.tree.map(poison, state.kv_cache)
    )
    state = generate.decode_step(_MODEL, _params(), broken)
    self.assertEqual(state.is_finite.tolist(), [True, False])

  @pytest.mark.slow
  def test_learned_positions_bound_the_text(self):
    config = configs.TransformerConfig(
        vocab_size=50,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        hidden_dim=8,
        positions="learned",
        max_len=10,
    )
    run = functools.partial(
        generate.generate, _MODEL.clone(config=config), _params(config)
    )
    # 7 tokens, and 3 more that are read, at positions 0 to 9.
    (row,) = run([[1] * 7], max_new_tokens=4)
    self.assertLen(row, 4)
    with self.assertRaisesRegex(errors.UserError, "asked for 11"):
      run([[1] * 7], max_new_tokens=5)
