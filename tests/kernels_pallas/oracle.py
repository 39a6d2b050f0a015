"""Attention and its gradients in float64 NumPy, from the equations.

Written apart from the library's reference: no code is shared with it.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Attention:
  """Values of one call, all float64; see `kernels_pallas.output`."""

  out: np.ndarray
  lse: np.ndarray
  col_mass: np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
  """Arguments of one call as float64 arrays; `allowed` is [B, N, T, S]."""

  query: np.ndarray
  key: np.ndarray
  value: np.ndarray
  allowed: np.ndarray
  scale: float
  soft_cap: float | None = None
  sink_logits: np.ndarray | None = None
  row_weights: np.ndarray | None = None


def attention(case: Case) -> Attention:
  """out, lse, col_mass."""
  _, weights, lse = _weights(case)
  value = np.repeat(case.value, _num_groups(case), axis=2)
  out = np.einsum("bnts,bsnh->btnh", weights, value)
  rows = 1.0 if case.row_weights is None else case.row_weights[..., None]
  return Attention(out, lse, (weights * rows).sum(axis=2))


def gradients(case: Case, d_out: Any, d_lse: Any) -> dict[str, np.ndarray]:
  """Cotangents of query, key, value and sink_logits."""
  num_groups = _num_groups(case)
  key = np.repeat(case.key, num_groups, axis=2)
  value = np.repeat(case.value, num_groups, axis=2)
  logits, weights, lse = _weights(case)
  d_weights = np.einsum("btnh,bsnh->bnts", d_out, value)
  mean = (weights * d_weights).sum(axis=-1, keepdims=True)
  d_logits = weights * (d_weights - mean + d_lse[..., None])
  if case.soft_cap is not None:
    d_logits = d_logits * (1 - (logits / case.soft_cap) ** 2)
  d_key = case.scale * np.einsum("bnts,btnh->bsnh", d_logits, case.query)
  d_value = np.einsum("bnts,btnh->bsnh", weights, d_out)
  grouped = (*case.key.shape[:3], num_groups, case.key.shape[3])
  found = {
      "query": case.scale * np.einsum("bnts,bsnh->btnh", d_logits, key),
      "key": d_key.reshape(grouped).sum(axis=3),
      "value": d_value.reshape(grouped).sum(axis=3),
  }
  if case.sink_logits is not None:
    sink_weight = np.exp(case.sink_logits[:, None] - lse)
    d_sink = sink_weight * (d_lse - mean[..., 0])
    found["sink_logits"] = d_sink.sum(axis=(0, 2))
  return found


def _num_groups(case: Case) -> int:
  return case.query.shape[2] // case.key.shape[2]


def _weights(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Capped logits, weights and log-denominators; safe without any key."""
  key = np.repeat(case.key, _num_groups(case), axis=2)
  logits = case.scale * np.einsum("btnh,bsnh->bnts", case.query, key)
  if case.soft_cap is not None:
    logits = case.soft_cap * np.tanh(logits / case.soft_cap)
  masked = np.where(case.allowed, logits, -np.inf)
  if case.sink_logits is not None:
    shape = (*masked.shape[:3], 1)
    sink = np.broadcast_to(case.sink_logits[None, :, None, None], shape)
    masked = np.concatenate([masked, sink], axis=-1)
  highest = masked.max(axis=-1, keepdims=True, initial=-np.inf)
  highest = np.where(np.isneginf(highest), 0.0, highest)
  exps = np.exp(masked - highest)
  total = exps.sum(axis=-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = (np.log(total) + highest)[..., 0]
  weights = exps / np.where(total == 0, 1.0, total)
  return logits, weights[..., : logits.shape[-1]], lse
