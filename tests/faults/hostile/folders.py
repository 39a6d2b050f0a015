"""Model folders as nobody should write them, made of good ones by a seed."""

from collections.abc import Callable
import json
import os
import pathlib
import shutil
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from joma.transformer import model as models
from joma.transformer.hf import config_json
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer as tokenizers
from tests.faults.hostile import tokenizers as hostile_tokenizers
from tests.joma.transformer import tiny_models

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "gemma3_text", "qwen2")
_VOCAB = 280
_WEIGHTS = "model.safetensors"
_HUGE = "9" * 400
# JSON texts that stand for a value.
_VALUES = (
    *("null", "-1", "0", "1", "true", '"x"', '""', "[]", "{}", "[1, 2]"),
    *("2147483648", "9223372036854775808", _HUGE, "1e308", "-1e308", "0.5"),
    *("NaN", "Infinity", "-0.5", "1e-320", '"1e9"', "[null]", "3", "1000000"),
    '{"rope_type": "yarn"}',
)
_FILES = (
    *("", "null", "[]", "7", '"text"', "{", "{}", "{'a': 1}", "\ufeff{}"),
    *("[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "\0" * 99),
    *('{"model_type": "llama"}', '{"model_type": ["llama"]}', '{"a": NaN}'),
    '{"model_type": "abacus", "architectures": ["Abacus"]}',
)
_ROPES = (
    {"rope_type": "abacus"},
    {"rope_type": None, "factor": 2},
    {"type": "linear", "factor": 0},
    {"type": "linear", "factor": -2.0},
    {"type": "linear", "factor": "2"},
    {"type": "dynamic", "factor": 1e308},
    {"rope_type": "yarn", "factor": 4, "beta_fast": 0, "beta_slow": 0},
    {"rope_type": "yarn", "factor": 1e-300},
    {"rope_type": "llama3", "factor": 8},
    {
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 1,
        "original_max_position_embeddings": 0,
    },
    {"rope_type": "longrope", "short_factor": [], "long_factor": [1]},
    {"rope_type": "longrope", "short_factor": "x", "long_factor": {}},
    {
        "rope_type": "longrope",
        "factor": 2,
        "short_factor": [0.0] * 3,
        "long_factor": [float("nan")] * 3,
    },
    {"full_attention": None, "sliding_attention": 3},
    [1, 2],
)  # pyformat: disable
_DTYPES = ("I8", "BOOL", "U64", "F8_E4M3", "X", "", 3, None, "F64", "BF16")


def make(family: str, folder: pathlib.Path) -> None:
  """Writes a good folder of random numbers with a tokenizer of byte pairs."""
  folder.mkdir(parents=True)
  fields = {**tiny_models.fields_of(family), "vocab_size": _VOCAB}
  config = config_json.from_hf(fields)
  model = models.Transformer(config, implementation="reference")
  params = model.init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
  pretrained.save(folder, config, params, family=family)
  text = "to be or not to be that is the question\n" * 9
  tokenizers.save(tokenizers.learn_bpe([text], _VOCAB), folder)
  (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
  (folder / "tokenizer_config.json").write_text(
      json.dumps({"chat_template": "{{ messages[0].content }}"})
  )


class Spoiler:
  """Spoils one folder."""

  def __init__(self, folder: pathlib.Path, random: np.random.Generator):
    """Takes a folder, which may be spoiled, and what draws."""
    self.folder = folder
    self._random = random

  def spoil(self, kind: str) -> str:
    """Does something of a kind; says what."""
    return KINDS[kind](self)

  def _any(self, among):
    return among[int(self._random.integers(len(among)))]

  def field(self) -> str:
    """Another value of a field of config.json, or none."""
    path = self.folder / "config.json"
    fields = json.loads(path.read_text())
    for name in self._random.choice(sorted(fields), self._any((1, 1, 2))):
      fields[str(name)] = "HOSTILE"
      value = self._any(_VALUES)
      text = json.dumps(fields).replace('"HOSTILE"', value)
      path.write_text(text)
      fields[str(name)] = None
    return f"{name}={value[:30]}"

  def rope(self) -> str:
    """Positions that cannot be scaled so."""
    path = self.folder / "config.json"
    fields = json.loads(path.read_text())
    value = self._any(_ROPES)
    fields[self._any(("rope_scaling", "rope_parameters"))] = value
    path.write_text(json.dumps(fields))
    return str(value)[:60]

  def json_file(self) -> str:
    """Another text in a JSON file, or something that is no file."""
    names = ("config.json", "generation_config.json", "tokenizer.json")
    path = self.folder / self._any((*names, "tokenizer_config.json"))
    text = self._any((*_FILES, "FOLDER", "PIPE", "LOOP", "NOWHERE", "BYTES"))
    path.unlink()
    special: dict[str, Callable[[], Any]] = {
        "FOLDER": path.mkdir,
        "PIPE": lambda: os.mkfifo(path),
        "LOOP": lambda: path.symlink_to(path.name),
        "NOWHERE": lambda: path.symlink_to("nowhere"),
        "BYTES": lambda: path.write_bytes(self._random.bytes(300)),
    }
    special.get(text, lambda: path.write_text(text))()
    return f"{path.name}: {text[:30]!r}"

  def weights_file(self) -> str:
    """A file of weights that is damaged, or is none."""
    path = self.folder / _WEIGHTS
    data = path.read_bytes()
    at = int(self._random.integers(len(data)))
    size = struct.unpack("<Q", data[:8])[0]
    changes: dict[str, Callable[[], Any]] = {
        "cut": lambda: path.write_bytes(data[:at]),
        "cut in its header": lambda: path.write_bytes(data[: at % size]),
        "more": lambda: path.write_bytes(data + b"more"),
        "a flip in its header": lambda: path.write_bytes(
            data[: at % size]
            + bytes([data[at % size] ^ 1 << at % 8])
            + data[at % size + 1 :]
        ),
        "a huge header": lambda: path.write_bytes(
            struct.pack("<Q", 2**62) + data[8:]
        ),
        "zeros": lambda: path.write_bytes(bytes(len(data))),
        "gone": path.unlink,
        "folder": lambda: (path.unlink(), path.mkdir()),
        "pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "loop": lambda: (path.unlink(), path.symlink_to(path.name)),
        "pickle": lambda: path.rename(path.with_name("pytorch_model.bin")),
    }
    name = self._any(sorted(changes))
    changes[name]()
    return f"{name} at {at}"

  def header(self) -> str:
    """A header that says of tensors what is not so."""
    path = self.folder / _WEIGHTS
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = self._any(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    changes: dict[str, Callable[[], Any]] = {
        "dtype": lambda: entry.update(dtype=self._any(_DTYPES)),
        "shape": lambda: entry.update(shape=entry["shape"][::-1] + [1]),
        "less": lambda: entry.update(shape=[-s for s in entry["shape"]]),
        "huge": lambda: entry.update(shape=[2**40, 2**40]),
        "offsets": lambda: entry.update(data_offsets=[0, 2**60]),
        "turned": lambda: entry["data_offsets"].reverse(),
        "type": lambda: header.update({name: self._any((None, [], 7, "x"))}),
        "meta": lambda: header.update({"__metadata__": {"format": 7}}),
        "gone": lambda: header.pop(name),
        "renamed": lambda: header.update({"x" * 9999: header.pop(name)}),
    }
    change = self._any(sorted(changes))
    changes[change]()
    text = json.dumps(header)
    if change == "gone":  # And, instead, the first one twice.
      text = text[:-1] + ", " + text[1:]
    path.write_bytes(
        struct.pack("<Q", len(text)) + text.encode() + data[8 + size :]
    )
    return f"{change} of {name}"

  def tensors(self) -> str:
    """Tensors missing, added, of another shape or type, or not finite."""
    path = self.folder / _WEIGHTS
    held = safetensors_numpy.load_file(path)
    name = self._any(sorted(held))
    value = held.pop(name)
    bad = value.copy()
    bad.flat[int(self._random.integers(bad.size))] = self._any(
        (np.nan, np.inf, -np.inf, 3e38)
    )
    news = {
        "gone": None,
        "turned": np.ascontiguousarray(value.T[None]),
        "int8": value.astype(np.int8),
        "float16": value.astype(np.float16),
        "float64": value.astype(np.float64) * 1e200,
        "empty": value[:0],
        "scalar": np.ones((), np.float32),
        "not finite": bad,
        "zeros": np.zeros_like(value),
    }
    new = self._any(sorted(news))
    if news[new] is not None:
      held[name] = news[new]
    if self._any((0, 0, 1)):
      held["model.layers.99.abacus.weight"] = np.ones(3, np.float32)
    safetensors_numpy.save_file(held, path, metadata={"format": "pt"})
    return f"{name} {new}"

  def index(self) -> str:
    """Shards whose index is wrong."""
    path = self.folder / _WEIGHTS
    names = sorted(safetensors_numpy.load_file(path))
    shard = "model-00001-of-00001.safetensors"
    path.rename(self.folder / shard)
    good = dict.fromkeys(names, shard)
    texts = {
        "other file": {**good, names[0]: "model-00002-of-00001.safetensors"},
        "above": {**good, names[0]: f"../{self.folder.name}/{shard}"},
        "absolute": {**good, names[0]: "/etc/passwd"},
        "type": {**good, names[0]: self._any((None, 7, [], {}))},
        "folder": {**good, names[0]: "."},
        "list": names,
        "empty": {},
        "more": {**good, "abacus": shard},
        "less": dict(list(good.items())[1:]),
        "long": {**good, names[0]: "x" * 10_000},
    }
    which = self._any(sorted(texts))
    index = {"metadata": {}, "weight_map": texts[which]}
    (self.folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index))
    return which

  def tokenizer(self) -> str:
    """A tokenizer.json that explodes, grows or contradicts itself."""
    path = self.folder / "tokenizer.json"
    return hostile_tokenizers.spoil(path, self._random)

  def ends(self) -> str:
    """End tokens that cannot be."""
    path = self.folder / "generation_config.json"
    value = self._any(_VALUES)
    path.write_text('{"eos_token_id": ' + value + ', "bos_token_id": 1}')
    return value[:30]

  def chat(self) -> str:
    """A chat template that is hostile, where nobody chats."""
    template = self._any((
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{% if",
        "{{ raise_exception('no') }}",
        "{{ 'x' * 10**10 }}",
    ))
    if self._any((0, 1)):
      (self.folder / "chat_template.jinja").write_text(template)
    else:
      value: Any = self._any((template, 7, [], {"name": 3}, None))
      text = json.dumps({"chat_template": value})
      (self.folder / "tokenizer_config.json").write_text(text)
    return template

  def whole(self) -> str:
    """Something that is no folder, or links to itself."""
    kind = self._any(("file", "loop", "nowhere", "empty", "pipe", "into"))
    shutil.rmtree(self.folder)
    makes: dict[str, Callable[[], Any]] = {
        "file": lambda: self.folder.write_text("no folder"),
        "loop": lambda: self.folder.symlink_to(self.folder.name),
        "nowhere": lambda: self.folder.symlink_to("nowhere"),
        "empty": self.folder.mkdir,
        "pipe": lambda: os.mkfifo(self.folder),
        "into": lambda: (
            self.folder.mkdir(),
            (self.folder / _WEIGHTS).symlink_to("."),
            (self.folder / "config.json").symlink_to("."),
        ),
    }
    makes[kind]()
    return kind


KINDS: dict[str, Callable[[Spoiler], str]] = {
    "fields of config.json": Spoiler.field,
    "rotary positions": Spoiler.rope,
    "JSON files": Spoiler.json_file,
    "weights file": Spoiler.weights_file,
    "header of weights": Spoiler.header,
    "tensors": Spoiler.tensors,
    "index of shards": Spoiler.index,
    "tokenizer": Spoiler.tokenizer,
    "end tokens": Spoiler.ends,
    "chat template": Spoiler.chat,
    "the folder itself": Spoiler.whole,
}
