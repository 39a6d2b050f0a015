"""Tensors of Hugging Face models and leaves of our parameter tree: one table.

A row of a table is a tensor's name in the file, our leaf or leaves, and how one
becomes the other:

  "(N H) D -> D N H"    the file's [N H, D], axes split, permuted: our [D, N, H]
  "D (3 N H) -> 3 D N H"    and along the 3, one array for each of three leaves

Reading applies a row from left to right, writing from right to left, so what is
saved is what was loaded, by construction. Imports no jax.

Letters: V vocabulary, P rows of the position table, E width of embeddings, D
width, F hidden width, N query heads, K key and value heads, H head size.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re

import numpy as np

from joma.transformer.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of the file.

  Attributes:
    name: In the file; {} is the layer's number.
    leaves: Paths in our tree, separated by blanks; several are stacked along
      the pattern's first axis.
    pattern: Axes in the file -> axes of ours.
    when: Field of TransformerConfig that says whether there is such a tensor,
      "not FIELD" for the opposite; empty is always.
  """

  name: str
  leaves: str
  pattern: str
  when: str = ""

  def is_in(self, config: TransformerConfig) -> bool:
    """Whether a model has this tensor."""
    field = self.when.removeprefix("not ")
    if not field:
      return True
    return bool(getattr(config, field)) != self.when.startswith("not ")

  def for_layer(self, layer: int) -> "Row":
    """The row of one layer."""
    return dataclasses.replace(
        self,
        name=self.name.format(layer),
        leaves=" ".join(
            f"layers_{layer}/{leaf}" for leaf in self.leaves.split()
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Every tensor of a family's models.

  Attributes:
    rows: Once a model.
    layer_rows: Once a layer.
    prefix: Start of the names that folders of the body alone leave out.
    tied: Name of the output layer's tensor; a tied model may repeat there its
      embedding.
    ignored: What old files hold besides weights: masks and frequencies.
    renamed: Old name -> the name in `rows`.
  """

  rows: tuple[Row, ...]
  layer_rows: tuple[Row, ...]
  prefix: str
  tied: str = "lm_head.weight"
  ignored: str = r"\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)$"
  renamed: tuple[tuple[str, str], ...] = ()

  def rows_of(self, config: TransformerConfig) -> Iterator[Row]:
    """Yields the rows of one model."""
    yield from (row for row in self.rows if row.is_in(config))
    for layer in range(config.num_layers):
      for row in self.layer_rows:
        if row.is_in(config):
          yield row.for_layer(layer)


def sizes_of(config: TransformerConfig) -> dict[str, int]:
  """The numbers that the letters of the patterns stand for."""
  return {
      "V": config.vocab_size,
      "P": config.max_len + config.position_offset,
      "E": config.embed_proj_dim or config.embed_dim,
      "D": config.embed_dim,
      "F": config.hidden_dim,
      "N": config.num_heads,
      "K": config.num_kv_heads,
      "H": config.head_dim,
      "3": 3,
  }


def file_shape(pattern: str, sizes: dict[str, int]) -> tuple[int, ...]:
  """Shape of the tensor in the file."""
  groups, _, _ = _parse(pattern)
  return tuple(math.prod(sizes[axis] for axis in group) for group in groups)


def leaf_shape(pattern: str, sizes: dict[str, int]) -> tuple[int, ...]:
  """Shape of each of our leaves."""
  _, axes, is_stack = _parse(pattern)
  return tuple(sizes[axis] for axis in axes[is_stack:])


def from_file(
    tensor: np.ndarray, pattern: str, sizes: dict[str, int]
) -> list[np.ndarray]:
  """Returns our leaves of a tensor: views where that is possible."""
  groups, axes, is_stack = _parse(pattern)
  split = [axis for group in groups for axis in group]
  array = tensor.reshape([sizes[axis] for axis in split])
  array = array.transpose([split.index(axis) for axis in axes])
  return list(array) if is_stack else [array]


def to_file(
    leaves: Sequence[np.ndarray], pattern: str, sizes: dict[str, int]
) -> np.ndarray:
  """Returns the tensor of our leaves, contiguous: undoes `from_file`."""
  groups, axes, is_stack = _parse(pattern)
  split = [axis for group in groups for axis in group]
  array = np.stack(leaves) if is_stack else leaves[0]
  array = array.transpose([axes.index(axis) for axis in split])
  return np.ascontiguousarray(array.reshape(file_shape(pattern, sizes)))


def _parse(pattern: str) -> tuple[list[list[str]], list[str], bool]:
  """Returns the file's axes, each a list of letters, ours, and if stacked."""
  left, right = pattern.split(" -> ")
  groups = re.findall(r"\([^)]*\)|\w", left)
  axes = right.split()
  return [group.strip("()").split() for group in groups], axes, axes[0] == "3"


def _norm(name: str, leaf: str, has_bias: bool = True) -> tuple[Row, ...]:
  scale = Row(f"{name}.weight", f"{leaf}/scale", "D -> D")
  return (scale, Row(f"{name}.bias", f"{leaf}/bias", "D -> D"))[: 1 + has_bias]


def _linear(
    name: str, leaf: str, kernel: str, bias: str = "", when: str = ""
) -> tuple[Row, ...]:
  """A projection: its kernel, and a bias if `bias` has a pattern."""
  weight = Row(f"{name}.weight", _each(leaf, "kernel"), kernel)
  if not bias:
    return (weight,)
  return weight, Row(f"{name}.bias", _each(leaf, "bias"), bias, when)


def _each(leaf: str, end: str) -> str:
  return " ".join(f"{start}/{end}" for start in leaf.split())


def _projections(
    attention: str, out: str, mlp: Sequence[tuple[str, str]]
) -> tuple[Row, ...]:
  """Attention and MLP of models that keep each projection as [out, in]."""
  rows = []
  for name, letter in (("q", "N"), ("k", "K"), ("v", "K")):
    leaf = {"q": "query", "k": "key", "v": "value"}[name]
    rows += _linear(
        f"{attention}.{name}_proj",
        f"attn/{leaf}",
        f"({letter} H) D -> D {letter} H",
        f"({letter} H) -> {letter} H",
        "use_qkv_bias",
    )
  rows += _linear(
      f"{attention}.{out}",
      "attn/out",
      "D (N H) -> N H D",
      "D -> D",
      "use_attn_out_bias",
  )
  for name, leaf in mlp:
    kernel, bias = (
        ("D F -> F D", "D -> D")
        if leaf == "down"
        else (
            "F D -> D F",
            "F -> F",
        )
    )
    rows += _linear(name, f"mlp/{leaf}", kernel, bias, "use_mlp_bias")
  return tuple(rows)


_QKV = "attn/query attn/key attn/value"
_OUTPUT = Row(
    "lm_head.weight", "output/kernel", "V D -> D V", "not tie_embeddings"
)

_LLAMA_ROWS = (
    Row("model.embed_tokens.weight", "token_embed/embedding", "V D -> V D"),
    *_norm("model.norm", "final_norm", has_bias=False),
    _OUTPUT,
)
_LLAMA_LAYER = (
    *_norm("model.layers.{}.input_layernorm", "attn_norm", has_bias=False),
    *_projections(
        "model.layers.{}.self_attn",
        "o_proj",
        tuple(
            (f"model.layers.{{}}.mlp.{leaf}_proj", leaf)
            for leaf in ("gate", "up", "down")
        ),
    ),
    Row(
        "model.layers.{}.self_attn.q_norm.weight",
        "attn/query_norm/scale",
        "H -> H",
        "use_qk_norm",
    ),
    Row(
        "model.layers.{}.self_attn.k_norm.weight",
        "attn/key_norm/scale",
        "H -> H",
        "use_qk_norm",
    ),
)
_LLAMA = Table(
    rows=_LLAMA_ROWS,
    layer_rows=(
        *_LLAMA_LAYER,
        *_norm(
            "model.layers.{}.post_attention_layernorm",
            "mlp_norm",
            has_bias=False,
        ),
    ),
    prefix="model.",
)
# Norms before and after each sublayer; Llama's second name means another here.
_GEMMA2 = Table(
    rows=_LLAMA_ROWS,
    layer_rows=(
        *_LLAMA_LAYER,
        *(
            row
            for name, leaf in (
                ("post_attention", "attn_post_norm"),
                ("pre_feedforward", "mlp_norm"),
                ("post_feedforward", "mlp_post_norm"),
            )
            for row in _norm(
                f"model.layers.{{}}.{name}_layernorm", leaf, has_bias=False
            )
        ),
    ),
    prefix="model.",
)
# Conv1D: kernels are [in, out], and query, key, value are one after another.
_GPT2 = Table(
    rows=(
        Row("transformer.wte.weight", "token_embed/embedding", "V D -> V D"),
        Row("transformer.wpe.weight", "position_embed/embedding", "P D -> P D"),
        *_norm("transformer.ln_f", "final_norm"),
        _OUTPUT,
    ),
    layer_rows=(
        *_norm("transformer.h.{}.ln_1", "attn_norm"),
        *_linear(
            "transformer.h.{}.attn.c_attn",
            _QKV,
            "D (3 N H) -> 3 D N H",
            "(3 N H) -> 3 N H",
        ),
        *_linear(
            "transformer.h.{}.attn.c_proj",
            "attn/out",
            "(N H) D -> N H D",
            "D -> D",
        ),
        *_norm("transformer.h.{}.ln_2", "mlp_norm"),
        *_linear("transformer.h.{}.mlp.c_fc", "mlp/up", "D F -> D F", "F -> F"),
        *_linear(
            "transformer.h.{}.mlp.c_proj", "mlp/down", "F D -> F D", "D -> D"
        ),
    ),
    prefix="transformer.",
)
_OPT = Table(
    rows=(
        Row(
            "model.decoder.embed_tokens.weight",
            "token_embed/embedding",
            "V E -> V E",
        ),
        Row(
            "model.decoder.embed_positions.weight",
            "position_embed/embedding",
            "P D -> P D",
        ),
        Row(
            "model.decoder.project_in.weight",
            "embed_proj/kernel",
            "D E -> E D",
            "embed_proj_dim",
        ),
        Row(
            "model.decoder.project_out.weight",
            "output_proj/kernel",
            "E D -> D E",
            "embed_proj_dim",
        ),
        *(
            dataclasses.replace(row, when="use_final_norm")
            for row in _norm("model.decoder.final_layer_norm", "final_norm")
        ),
        dataclasses.replace(_OUTPUT, pattern="V E -> E V"),
    ),
    layer_rows=(
        *_norm("model.decoder.layers.{}.self_attn_layer_norm", "attn_norm"),
        *_projections(
            "model.decoder.layers.{}.self_attn",
            "out_proj",
            (
                ("model.decoder.layers.{}.fc1", "up"),
                ("model.decoder.layers.{}.fc2", "down"),
            ),
        ),
        *_norm("model.decoder.layers.{}.final_layer_norm", "mlp_norm"),
    ),
    prefix="model.",
)
# Query, key and value of one head lie together.
_GPT_NEOX = Table(
    rows=(
        Row("gpt_neox.embed_in.weight", "token_embed/embedding", "V D -> V D"),
        *_norm("gpt_neox.final_layer_norm", "final_norm"),
        dataclasses.replace(_OUTPUT, name="embed_out.weight"),
    ),
    layer_rows=(
        *_norm("gpt_neox.layers.{}.input_layernorm", "attn_norm"),
        *_linear(
            "gpt_neox.layers.{}.attention.query_key_value",
            _QKV,
            "(N 3 H) D -> 3 D N H",
            "(N 3 H) -> 3 N H",
            "use_qkv_bias",
        ),
        *_linear(
            "gpt_neox.layers.{}.attention.dense",
            "attn/out",
            "D (N H) -> N H D",
            "D -> D",
            "use_attn_out_bias",
        ),
        *_norm("gpt_neox.layers.{}.post_attention_layernorm", "mlp_norm"),
        *_linear(
            "gpt_neox.layers.{}.mlp.dense_h_to_4h",
            "mlp/up",
            "F D -> D F",
            "F -> F",
        ),
        *_linear(
            "gpt_neox.layers.{}.mlp.dense_4h_to_h",
            "mlp/down",
            "D F -> F D",
            "D -> D",
        ),
    ),
    prefix="gpt_neox.",
    tied="embed_out.weight",
    ignored=r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$",
    renamed=(("lm_head.weight", "embed_out.weight"),),
)

TABLES: dict[str, Table] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _GPT_NEOX,
}
