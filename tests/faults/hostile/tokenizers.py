"""Contents of tokenizer.json as nobody should write them."""

from collections.abc import Callable
import json
import pathlib
from typing import Any

import numpy as np

_VOCAB = {"a": 0, "b": 1, "<unk>": 2}
_BPE = {"type": "BPE", "vocab": _VOCAB, "merges": []}


def spoil(path: pathlib.Path, random: np.random.Generator) -> str:
  """Changes the file in place, or writes another; says how."""
  names = [*_OURS, *_WHOLE, *_PARTS]
  name = names[int(random.integers(len(names)))]
  content: Any
  if name in _OURS:
    content = _OURS[name]
  elif name in _WHOLE:
    content = {"version": "1.0", **_WHOLE[name]}
  else:
    content = json.loads(path.read_text())
    _PARTS[name](content)
  path.write_text(json.dumps(content))
  return name


# This project's own kinds.
_OURS: dict[str, Any] = {
    "no kind": {"kind": None},
    "unknown kind": {"kind": "abacus"},
    "no words": {"kind": "words"},
    "words of a dict": {"kind": "words", "words": {"<unk>": 0}},
    "words of numbers": {"kind": "words", "words": ["<unk>", 3, None]},
    "words of lists": {"kind": "words", "words": ["<unk>", ["a"]]},
    "one word twice": {"kind": "words", "words": ["<unk>", "a", "a"]},
    "words is a number": {"kind": "words", "words": 7},
    "more words than rows": {
        "kind": "words",
        "words": ["<unk>", *map(str, range(999))],
    },
}
_EXPLODES = {"type": "Split", "pattern": {"Regex": "(a*)*b" * 20}}
_WHOLE: dict[str, dict[str, Any]] = {
    "no model": {},
    "model is null": {"model": None},
    "unknown model": {"model": {"type": "Abacus"}},
    "no vocabulary": {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    "merges of none": {"model": {**_BPE, "merges": ["x y", "a z"]}},
    "merges of three": {"model": {**_BPE, "merges": [["a", "b", "c"]]}},
    "ids that are huge": {"model": {**_BPE, "vocab": {"a": 4_000_000_000}}},
    "ids beyond it": {"model": {**_BPE, "vocab": {"a": 2**64}}},
    "ids below 0": {"model": {**_BPE, "vocab": {"a": -1}}},
    "ids twice": {"model": {**_BPE, "vocab": {"a": 1, "b": 1}}},
    "pieces without unknown": {
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"a": 0},
        }
    },
    "words without unknown": {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    },
    "unigram of nothing": {
        "model": {"type": "Unigram", "unk_id": 7, "vocab": []}
    },
    "unigram of NaN": {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1e999]]}
    },
    "an expression that explodes": {
        "model": _BPE,
        "pre_tokenizer": {
            **_EXPLODES,
            "behavior": "Isolated",
            "invert": False,
        },
    },
    "no expression": {
        "model": _BPE,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(("},
            "behavior": "Isolated",
            "invert": False,
        },
    },
    "a template of absent tokens": {
        "model": _BPE,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    },
    "text that grows": {
        "model": _BPE,
        "normalizer": {
            "type": "Sequence",
            "normalizers": (
                [{
                    "type": "Replace",
                    "pattern": {"String": "a"},
                    "content": "a" * 60,
                }]
                * 6
            ),
        },
    },
    "text from nothing": {
        "model": _BPE,
        "normalizer": {
            "type": "Replace",
            "pattern": {"Regex": ""},
            "content": "a" * 1000,
        },
    },
    "a prefix for ever": {
        "model": _BPE,
        "normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000},
    },
    "a decoder of nothing": {
        "model": _BPE,
        "decoder": {"type": "Strip", "content": "a", "start": 2**62, "stop": 1},
    },
    "an unknown normalizer": {"model": _BPE, "normalizer": {"type": "Abacus"}},
}
_ADDED = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def _add(token: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
  return lambda content: content.update(added_tokens=[{**_ADDED, **token}])


# What is changed in a good file.
_PARTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an added token without an id": _add({"content": "x"}),
    "an added token of a huge id": _add({"id": 4_000_000_000, "content": "x"}),
    "an added token of nothing": _add({"id": 999, "content": ""}),
    "an added token of everything": _add({"id": 999, "content": "t"}),
    "tokens cut to 0": lambda c: c.update(
        truncation={
            "direction": "Right",
            "max_length": 0,
            "strategy": "LongestFirst",
            "stride": 9,
        }
    ),
    "padding for ever": lambda c: c.update(
        padding={
            "strategy": {"Fixed": 2**40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ),
    "another version": lambda c: c.update(version="9.9"),
    "a vocabulary of lists": lambda c: c["model"].update(vocab=[["a", 0]]),
    "no merges": lambda c: c["model"].pop("merges"),
    "a dropout": lambda c: c["model"].update(dropout=2.0),
    "an unknown decoder": lambda c: c.update(decoder={"type": "Abacus"}),
    "no decoder": lambda c: c.update(decoder=None),
    "no pre-tokenizer": lambda c: c.update(pre_tokenizer=None),
}
