"""The model `joma` of lm-evaluation-harness (the extra eval).

  import lm_eval
  from joma.inference.harness import lm_eval_model  # Registers it.

  lm_eval.simple_evaluate(
      model="joma",
      model_args="folder=SmolLM2-135M,policy=h2o,capacity=256",
      tasks=["arc_easy"],
  )

Arguments: `folder`, a Hugging Face folder or name; `policy`, as
`launch.evaluate_cache --policies` names one, with `capacity`, its slots;
`max_length`, tokens of a text at most. Texts are encoded and cut as the
harness's model `hf` does.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api import model as lm_eval_model
from lm_eval.api import registry

from joma.inference import stop_tokens
from joma.inference.harness import requests as requests_lib
from joma.systems.cache_policies import names as policy_names
from joma.transformer import model as models
from joma.transformer.hf import hub
from joma.transformer.hf import pretrained
from joma.transformer.text import chat_template
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import require

_NEW_TOKENS = 256
Scored = tuple[float, bool]


@registry.register_model("joma")
class Joma(lm_eval_model.TemplateLM):
  """A folder's model, through a cache policy if one is named."""

  def __init__(
      self,
      folder: str,
      policy: str | None = None,
      capacity: int = 0,
      max_length: int | None = None,
      batch_size: int | str = 1,
      **_: Any,
  ):
    """Reads the folder.

    Args:
      folder: Config, weights and tokenizer.
      policy: Of the KV cache; None keeps everything.
      capacity: Slots of a KV head, for a policy.
      max_length: Tokens of a text at most; None is what the model was made
        for.
      batch_size: Texts that are read side by side.
      **_: What the harness gives to any model, such as a device.

    Raises:
      UserError: The folder cannot be read, the policy is unknown, or it has no
        capacity.
    """
    super().__init__()
    if policy is not None:
      require.at_least("capacity", int(capacity), 1)
    config, params = pretrained.load(folder)
    self._folder = folder
    self._batch_size = int(batch_size)
    self._max_length = int(max_length or config.max_len)
    self._answerer = requests_lib.Answerer(
        model=models.Transformer(config),
        params=params,
        tokenizer=tokenizer_lib.from_folder(folder),
        policy=None if policy is None else policy_names.parse(policy),
        capacity=int(capacity),
        eos_ids=stop_tokens.read(folder),
    )

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text.

    Raises:
      UserError: The folder names none.
    """
    if not self._answerer.eos_ids:
      raise errors.UserError(f"{self._folder} names no eos_token_id.")
    return self._answerer.eos_ids[0]

  @property
  def prefix_token_id(self) -> int:
    """What comes before a text without a context: as `hf` takes it."""
    path = hub.folder(self._folder) / "config.json"
    first = json_file.read_object(path).get("bos_token_id")
    return first if isinstance(first, int) else self.eot_token_id

  @property
  def tokenizer_name(self) -> str:
    """The folder."""
    return self._folder

  def tok_encode(
      self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    """Returns the ids of a text, without special tokens by default."""
    ids = self._answerer.tokenizer.encode(
        string, special=bool(add_special_tokens)
    )
    return ids.tolist()

  def apply_chat_template(
      self,
      chat_history: list[dict[str, str]],
      add_generation_prompt: bool = True,
  ) -> str:
    """Returns messages as the folder's template writes them."""
    if not add_generation_prompt:
      raise errors.UserError("An answer that has begun cannot be written.")
    return chat_template.read(self._folder).render(chat_history)

  def _loglikelihood_tokens(
      self,
      requests: Sequence[tuple[Any, list[int], list[int]]],
      **_: Any,
  ) -> list[Scored]:
    """Scores continuations; contexts are cut at their beginnings."""
    texts, counts = [], []
    for _text, context, continuation in requests:
      # The last token is never taken in.
      texts.append([*context, *continuation][-(self._max_length + 1) :])
      counts.append(min(len(continuation), len(texts[-1]) - 1))
    return self._scored(texts, counts)

  def loglikelihood_rolling(
      self, requests: Iterable[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Scores whole texts, in windows that the harness cuts."""
    del disable_tqdm
    found = []
    for request in requests:
      (text,) = request.args
      windows = utils.get_rolling_token_windows(
          self.tok_encode(text), self.prefix_token_id, self._max_length, 1
      )
      pairs = [utils.make_disjoint_window(window) for window in windows]
      scored = self._scored(
          [[*context, *rest] for context, rest in pairs],
          [len(rest) for _, rest in pairs],
      )
      found.append(sum(value for value, _ in scored))
    return found

  def generate_until(
      self, requests: Iterable[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Goes on greedily until a string that a request names.

    Raises:
      UserError: A request wants tokens to be drawn.
    """
    del disable_tqdm
    found = []
    for request in requests:
      text, options = request.args
      if options.get("do_sample"):
        raise errors.UserError("joma goes on greedily: leave do_sample out.")
      until = options.get("until") or []
      number = int(options.get("max_gen_toks", _NEW_TOKENS))
      prompt = self.tok_encode(text)[-(self._max_length - number) :]
      found += self._answerer.say(
          [prompt],
          max_new_tokens=number,
          until=[until] if isinstance(until, str) else until,
      )
    return found

  def _scored(
      self, texts: Sequence[list[int]], counts: Sequence[int]
  ) -> list[Scored]:
    """Reads texts of like lengths side by side."""
    found: dict[int, Scored] = {}
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), self._batch_size):
      rows = order[start : start + self._batch_size]
      scored = self._answerer.score(
          [texts[i] for i in rows], [counts[i] for i in rows]
      )
      found |= dict(zip(rows, scored, strict=True))
    return [found[i] for i in range(len(texts))]
