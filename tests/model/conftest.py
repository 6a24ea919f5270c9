"""The model again, in plain NumPy: float64, loops, written from the papers and not from `encoder.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from fintx.config.schema import ModelConfig, Shape


@pytest.fixture(scope="session")
def numpy_logits() -> Callable[[ModelConfig, Shape, Any, np.ndarray], np.ndarray]:
    """`reference` below, for a whole batch."""

    def logits(model: ModelConfig, shape: Shape, params: Any, x: np.ndarray) -> np.ndarray:
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return np.array([reference(model, shape, params, window) for window in np.asarray(x, np.float64)])

    return logits


def reference(model: ModelConfig, shape: Shape, params: Any, window: np.ndarray) -> float:
    """The logit of one window (T, F)."""
    if model.revin:
        centred = window - window.mean(axis=0)
        normal = centred / np.sqrt((centred**2).mean(axis=0) + 1e-5)
        window = normal * params["revin"]["scale"] + params["revin"]["bias"]
    ends = list(range(model.context_length, model.patch_length - 1, -model.stride))[::-1]
    patches = [window[end - model.patch_length : end].ravel() for end in ends]
    hidden = np.array([_linear(params["embedding"], patch) for patch in patches]) + params["positions"]
    for layer in range(shape.n_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        normal = np.array([_norm(block["attention_norm"], token) for token in hidden])
        mixed = _attention(shape.n_heads, np.array([_linear(block["qkv"], token) for token in normal]))
        hidden = hidden + np.array([_linear(block["attention_out"], token) for token in mixed])
        for token in hidden:  # in place
            inner = _linear(block["feed_forward_in"], _norm(block["feed_forward_norm"], token))
            active = np.array([u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in inner])
            token += _linear(block["feed_forward_out"], active)
    final = np.concatenate([_norm(params["norm"], token) for token in hidden])
    return float(_linear(params["head"], final)[0])


def _linear(params: Any, x: np.ndarray) -> np.ndarray:
    return x @ params["kernel"] + params["bias"]


def _norm(params: Any, x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * params["scale"] + params["bias"]


def _attention(n_heads: int, qkv: np.ndarray) -> np.ndarray:
    """Each token's mix of values; `qkv` (N, 3·D) holds a head's query, key and value, then those of the next head."""
    n, d = len(qkv), qkv.shape[1] // 3
    size = d // n_heads
    mixed = np.zeros((n, d))
    for head in range(n_heads):
        columns = slice(head * size, (head + 1) * size)
        first = 3 * head * size
        q, k, v = (qkv[:, first + i * size : first + (i + 1) * size] for i in range(3))
        for token in range(n):
            scores = np.array([q[token] @ k[other] / math.sqrt(size) for other in range(n)])
            weights = np.exp(scores) / np.exp(scores).sum()
            mixed[token, columns] = sum(weights[other] * v[other] for other in range(n))
    return mixed
