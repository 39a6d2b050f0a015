"""Continues prompts with a model from a Hugging Face folder.

  python -m launch.generate --model=DIR --prompt="The capital of France is"

One prompt is continued on stdout as its tokens come; several, of any lengths,
are continued as one batch and printed one after the other. Greedy by default;
--temperature, --top_k and --top_p draw. --policy=h2o --capacity=1024 bounds the
KV cache: see `joma.systems.cache_policies` for what may leave it. --mesh=2,1,4
computes on several devices. How fast it went goes to stderr, the compilation
apart.

  python -m launch.generate --model=DIR --chat

answers the lines of stdin one after the other, by the model's chat template,
until stdin ends. Each line is read once: the cache holds what came before. In a
terminal a line that is refused costs no more than itself.

  python -m launch.generate --model=DIR --prompt=... --draft=ngram

lets what the text has said before, or a smaller model (--draft_model=DIR),
guess tokens ahead, which one pass verifies: the same tokens, in fewer passes.
--prompt_file=FILE --rows=8 continues eight prompts at a time, however many.
"""

from collections.abc import Callable, Iterable, Iterator
import functools
import io
import math
import sys
import time
from typing import Any

from absl import flags

from joma.inference import sampling_config
from launch.command import app
from launch.command import flag_config
from launch.command import host_pages
from launch.command import run
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Folder with config.json and safetensors, or the name of one on Hugging"
    " Face, as org/name or org/name@revision.",
    required=True,
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "Text to continue; may be given several times."
)
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "Text file whose every line is a prompt."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 64, "Tokens of each continuation, at most.", 1
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Number type of parameters, products and the cache.",
)
_IGNORE_EOS = flags.DEFINE_boolean(
    "ignore_eos", False, "Goes on behind the model's end-of-text token."
)
_POLICY = flags.DEFINE_string(
    "policy",
    "full",
    "What leaves the KV cache: full (nothing), window, streaming_llm, h2o, ..."
    " with settings of its own if need be, as h2o:score=ema:decay=0.98.",
)
_CAPACITY = flags.DEFINE_integer(
    "capacity", None, "Slots of the KV cache a key head, where tokens leave.", 1
)
_HOST_PAGE = host_pages.define()
_ATTENTION = flags.DEFINE_list(
    "attention",
    [],
    "Systems without parameters laid over the model, as hip:k=512: one entry,"
    " one a layer, or a pattern that repeats.",
)
_PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk",
    None,
    "Tokens of a prompt that are worked on at a time, which bounds the memory"
    " of long ones; by default a size that fits the cache.",
    1,
)
_DRAFT = flags.DEFINE_string(
    "draft",
    None,
    "Who guesses tokens ahead, so that one pass verifies several: the text so"
    " far, ngram or ngram:n=3:least=2:k=4, or --draft_model, model:k=4.",
)
_DRAFT_MODEL = flags.DEFINE_string(
    "draft_model",
    None,
    "Folder of a smaller model, or its name on Hugging Face, with the same"
    " tokens, that guesses ahead.",
)
_ROWS = flags.DEFINE_integer(
    "rows",
    None,
    "Prompts that are continued at a time: as one ends, the next takes its"
    " place. By default all begin together.",
    1,
)
_CHAT = flags.DEFINE_boolean(
    "chat", False, "Answers lines of stdin by the model's chat template."
)
_MESH = run.define_mesh()
_MUCH_WORK = 1e12  # Flop; some ten seconds of two cores.
_SAMPLER = flag_config.define(sampling_config.SamplingConfig())


def main(_: list[str]) -> None:
  """Loads the model, continues the prompts or chats, prints."""
  sampler, prompts = _SAMPLER(), _read_prompts()
  sizes = run.mesh_sizes(_MESH.value)
  _check_goes_alone(sizes)
  draft_config = _read_draft()
  # Imported here, so that --help and wrong flags answer at once.
  from joma.inference import generate
  from joma.inference import on_mesh
  from joma.inference import stop_tokens
  from joma.transformer import layer_hooks
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.text import tokenizer as tokenizers
  from scansnap_jax.experiment.processes import devices

  make_cache = _read_policy()
  is_drafted = _DRAFT.value is not None or _DRAFT_MODEL.value is not None
  host_pages.check(
      _HOST_PAGE.value,
      policy=make_cache is not None,
      mesh=sizes is not None,
      rows=_ROWS.value is not None,
      draft=is_drafted,
  )
  template = _read_template()
  # One, whose computations take all cores, or those of the mesh.
  devices.set_up(num_cpu_devices=math.prod(sizes or (1,)))
  host_pages.check_backend(_HOST_PAGE.value)
  tokenizer = tokenizers.from_folder(_MODEL.value)
  eos_ids = () if _IGNORE_EOS.value else stop_tokens.read(_MODEL.value)
  attention = tuple(_ATTENTION.value)
  config = layer_hooks.over(pretrained.read_config(_MODEL.value), attention)
  if make_cache is not None:
    # Before the weights are read, which may take long.
    make = functools.partial(make_cache, config, batch_size=1)
    generate.check_follows(models.Transformer(config), 1, make)
  ids = [tokenizer.encode(prompt) for prompt in prompts]
  if ids:
    _check_sizes(config, [len(tokens) for tokens in ids], make_cache is None)
  on_mesh.check(sizes, config, max(len(ids), 1))
  make_stream = _streaming(draft_config, config, tokenizer)
  config, params = pretrained.load(_MODEL.value, _DTYPE.value)
  config = layer_hooks.over(config, attention)
  model = models.Transformer(config, _DTYPE.value)
  options: dict[str, Any] = dict(
      sampler=sampler, eos_ids=eos_ids, prefill_chunk=_PREFILL_CHUNK.value
  )
  with on_mesh.of_sizes(sizes):
    params = on_mesh.place(params, sizes)
    if template is not None:
      begin = _beginning(model, params, make_cache, options)
      _chat(begin, template, tokenizer, eos_ids)
      return
    options["max_new_tokens"] = _MAX_NEW_TOKENS.value
    if _ROWS.value is None:
      longest = max(map(len, ids)) + _MAX_NEW_TOKENS.value
      caches = host_pages.caches(
          _HOST_PAGE.value, make_cache, config, len(ids), longest, _DTYPE.value
      )
      options |= {} if caches is None else {"kv_cache": caches}
    elif make_cache is not None:
      make = functools.partial(make_cache, config, dtype=_DTYPE.value)
      options["make_caches"] = make
    show = _show_one if len(prompts) == 1 else _show_many
    speed: list[str] = []
    # What cannot be continued is refused before anything is shown.
    steps = make_stream(model, params, ids, **options)
    show(prompts, tokenizer, _timed_steps(steps, speed))
    print(*speed, sep="; ", file=sys.stderr)


def _check_goes_alone(sizes: Any) -> None:
  """Refuses two ways to go on at once."""
  is_drafted = _DRAFT.value is not None or _DRAFT_MODEL.value is not None
  ways = {"draft": is_drafted, "rows": _ROWS.value is not None}
  ways |= {"chat": _CHAT.value, "mesh": sizes is not None}
  given = [f"--{name}" for name, is_given in ways.items() if is_given]
  if len(given) > 1 and given != ["--chat", "--mesh"]:
    raise errors.UserError(
        f"{' and '.join(given)} do not go together: leave one of them out."
    )


def _read_draft() -> Any:
  """Returns what the flags say of a draft; None is none."""
  if _DRAFT.value is None and _DRAFT_MODEL.value is None:
    return None
  from joma.inference.speculative import draft_config

  config = draft_config.parse(_DRAFT.value or "model")
  is_of_model = isinstance(config, draft_config.Model)
  if is_of_model and _DRAFT_MODEL.value is None:
    raise errors.UserError(f"--draft={_DRAFT.value} needs --draft_model=DIR.")
  if not is_of_model and _DRAFT_MODEL.value is not None:
    raise errors.UserError(
        f"--draft_model has no effect with --draft={_DRAFT.value}."
    )
  return config


def _streaming(draft_config: Any, config: Any, tokenizer: Any) -> Any:
  """Returns what makes steps: of all prompts, of few, or with a draft."""
  from joma.inference import generate
  from joma.inference.serving import streaming as serving

  if _ROWS.value is not None:
    return functools.partial(serving.stream, num_rows=_ROWS.value)
  if draft_config is None:
    return generate.stream
  from joma.inference.speculative import drafts
  from joma.inference.speculative import folder
  from joma.inference.speculative import streaming

  if _DRAFT_MODEL.value is None:
    return functools.partial(streaming.stream, draft=drafts.of(draft_config))
  draft, draft_params = folder.read(
      _DRAFT_MODEL.value, draft_config, _DTYPE.value, config, tokenizer
  )
  return functools.partial(
      streaming.stream, draft=draft, draft_params=draft_params
  )


def _read_template() -> Any:
  if not _CHAT.value:
    return None
  from joma.transformer.text import chat_template

  return chat_template.read(_MODEL.value)


def _beginning(
    model: Any, params: Any, make_cache: Any, options: dict[str, Any]
) -> Callable[[int], Any]:
  """Returns what begins a conversation with room for so many tokens."""
  from joma.inference import conversation
  from joma.inference import generate

  def begin(num_tokens: int) -> conversation.Conversation:
    caches = host_pages.caches(
        _HOST_PAGE.value, make_cache, model.config, 1, num_tokens, _DTYPE.value
    )
    if caches is None:
      caches = generate.empty_caches(model, 1, num_tokens)
    return conversation.Conversation(model, params, caches, **options)

  return begin


def _chat(
    begin: Callable[[int], Any],
    template: Any,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
) -> None:
  """Answers line by line; what is no UTF-8 is refused by the tokenizer."""
  from joma.inference import chat

  talk = chat.Chat(begin, template, tokenizer, eos_ids)
  is_terminal = sys.stdin.isatty()
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")
  while True:
    if is_terminal:
      print("> ", end="", flush=True)
    line = sys.stdin.readline()
    if not line:
      break
    if not line.strip():
      continue
    try:
      for piece in talk.ask(line.removesuffix("\n"), _MAX_NEW_TOKENS.value):
        print(piece, end="", flush=True)
      print(flush=True)
    except errors.UserError as error:
      # Whoever sits there says it in another way; a pipe has ended.
      if not is_terminal:
        raise
      print(f"error: {error}", file=sys.stderr)
  if is_terminal:
    print()


def _read_policy() -> Callable[..., Any] | None:
  """Returns what makes the KV cache of a model; None keeps everything."""
  from joma.inference.cache import kv_cache
  from joma.systems.cache_policies import names as policy_names

  policy, capacity = policy_names.parse(_POLICY.value), _CAPACITY.value
  if policy.evicts and capacity is None:
    raise errors.UserError(f"--policy={_POLICY.value} needs --capacity.")
  if not policy.evicts and capacity is not None:
    raise errors.UserError(
        f"--capacity={capacity} has no effect with --policy={_POLICY.value}."
    )
  if capacity is None:
    return None
  return functools.partial(kv_cache.init, policy, capacity=capacity)


def _read_prompts() -> list[str]:
  prompts = list(_PROMPT.value or ())
  if _CHAT.value:
    if prompts or _PROMPT_FILE.value is not None:
      raise errors.UserError(
          "--chat reads stdin: leave --prompt and --prompt_file out."
      )
    return []
  if _PROMPT_FILE.value is not None:
    path = json_file.local_path(_PROMPT_FILE.value)
    prompts += json_file.read_lines(path, "prompt_file")
  if not prompts:
    raise errors.UserError("give --prompt=TEXT or --prompt_file=FILE")
  return prompts


def _check_sizes(config: Any, lengths: list[int], keeps_all: bool) -> None:
  """Refuses what no memory holds, and says what takes long, before the work."""
  from joma.inference import prompt_work
  from joma.transformer.rope import absolute

  num_positions = max(lengths) + _MAX_NEW_TOKENS.value
  # The last token is never taken in.
  absolute.check_learned_positions(config, num_positions - 1)
  if keeps_all:
    prompt_work.capacity(config, len(lengths), num_positions, _DTYPE.value)
  else:
    prompt_work.check_whole(config, lengths, _DTYPE.value)
  if num_positions > config.max_len:
    print(
        f"warning: up to {num_positions} positions, and the model was made for"
        f" {config.max_len}",
        file=sys.stderr,
    )
  flop = prompt_work.flop(config, lengths)
  if flop > _MUCH_WORK:
    print(
        f"reading {sum(lengths):,} tokens takes about {flop / 1e12:,.1f} Tflop",
        file=sys.stderr,
    )


def _timed_steps(
    steps: Iterable[tuple[Any, Any]], speed: list[str]
) -> Iterator[tuple[Any, Any]]:
  """Yields the steps of `generate.stream`, then appends how fast they came.

  Of a draft also what it gave.
  """
  started, num_new, first = time.monotonic(), 0, None
  # Prompts and a pass compile; with a draft there may be two kinds of passes,
  # with rows each prompt comes by itself.
  num_passes = lambda step: getattr(steps, "num_rounds", step)
  num_warm = 3 if hasattr(steps, "num_rounds") else 2 + (_ROWS.value or 0)
  for step, (tokens, is_new) in enumerate(steps):
    if first is None and num_passes(step) >= num_warm:
      first, num_new = time.monotonic(), 0
    num_new += int(is_new.sum())
    yield tokens, is_new
  ended = time.monotonic()
  if first is not None and ended > first:
    speed.append(
        f"{num_new / (ended - first):.1f} tokens/s after"
        f" {first - started:.1f} s for prefill and compilation"
    )
  if hasattr(steps, "summary"):
    speed.append(steps.summary())


def _show_one(prompts: list[str], tokenizer: Any, steps: Any) -> None:
  from joma.transformer.text import streaming
  from scansnap_jax.experiment import progress

  print(prompts[0], end="", flush=True)
  ids = (int(tokens[0]) for tokens, _ in steps)
  prompt_ids = tokenizer.encode(prompts[0])
  for piece in streaming.stream_decode(tokenizer, ids, prompt_ids):
    print(piece, end="", flush=True)
    progress.heard()
  print()


def _show_many(prompts: list[str], tokenizer: Any, steps: Any) -> None:
  from joma.transformer.text import streaming

  new_ids = [[] for _ in prompts]
  for tokens, is_new in steps:
    for row, row_ids in enumerate(new_ids):
      if is_new[row]:
        row_ids.append(int(tokens[row]))
  for prompt, row_ids in zip(prompts, new_ids, strict=True):
    prompt_ids = tokenizer.encode(prompt)
    pieces = streaming.stream_decode(tokenizer, row_ids, prompt_ids)
    print(prompt + "".join(pieces))


if __name__ == "__main__":
  app.run(main)
