"""Answers of models of `retrieval` that keep a few tokens of a text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.evaluation import evaluate
from joma.inference.evaluation import tasks
from joma.studies import texts
from joma.studies.systems.subjects import facts
from joma.systems.cache_policies import names as policy_names
from joma.systems.reuse import infini_retri
from joma.systems.reuse import question_weights


def by_policy(
    one: texts.Learner,
    params: Any,
    test: texts.Texts,
    name: str,
    budget: int,
) -> float:
  """Share of right answers through a cache of a policy.

  Args:
    one: The model.
    params: Its parameters.
    test: Texts of one question.
    name: Of the policy.
    budget: Tokens kept beside the question's.
  """
  tokens, targets = np.asarray(test.tokens), np.asarray(test.targets)
  last = tokens.shape[1] - 1
  batch = tasks.Batch(
      tokens=tokens.astype(np.int32),
      lengths=np.full(len(tokens), last + 1, np.int32),
      # All but the last token, which asks once more.
      num_context=np.full(len(tokens), last, np.int32),
      targets=np.where(np.arange(last + 1) == last, targets, -1),
      gold=np.full((*tokens.shape, 1), -1, np.int32),
      num_new=1,
  )
  # The question's two tokens beside as many as InfiniRetri carries at most.
  slots = budget + 2 * facts.SIZE - 2
  policy = policy_names.parse(name)
  policy = calls.fitted(policy, slots, policy_names.settings(name))
  size = slots if policy.evicts else last + 1
  caches = kv_cache.init(
      policy, one.model, len(tokens), size, jnp.dtype("float32")
  )
  answers = evaluate.answer(
      one.transformer, params, batch, caches, reading="context"
  )
  return float(np.mean(answers.predicted[:, last] == targets[:, last]))


def by_carrying(
    one: texts.Learner,
    params: Any,
    test: texts.Texts,
    layer: int,
    chunk: int,
    budget: int,
) -> tuple[float, list[int]]:
  """Share of right answers of what is carried, and its tokens.

  Args:
    one: The model.
    params: Its parameters.
    test: Texts of one question.
    layer: Whose attention chooses.
    chunk: Facts that are read at once.
    budget: Tokens from which on nothing is carried too.
  """
  params = jax.device_put(params)
  settings = infini_retri.Settings(
      chunk=facts.SIZE * chunk, budget=budget, width=1
  )
  room = settings.chunk + budget + 2 * facts.SIZE
  read = question_weights.reader(one.transformer, params, room, layer)
  answer = jax.jit(
      lambda tokens: one.transformer.apply({"params": params}, tokens)
  )
  num_right, lengths = 0, []
  for tokens, targets in zip(
      np.asarray(test.tokens), np.asarray(test.targets), strict=True
  ):
    text, question = tokens[: -facts.SIZE], tokens[-facts.SIZE :]
    kept = infini_retri.carried(read, text, question, (facts.END,), settings)
    asked = np.concatenate([kept, question])
    padded = np.zeros((1, room), np.int32)
    padded[0, : len(asked)] = asked
    logits = answer(padded)[0, len(asked) - 1]
    num_right += int(logits.argmax()) == targets[-1]
    lengths.append(len(kept))
  return num_right / len(test.tokens), lengths
