"""The transformer again, in plain NumPy float64 and loops: written from the paper's equations, shares no code."""

from __future__ import annotations

import math

import numpy as np


def forward(params: dict, x: np.ndarray, *, patch_length: int, stride: int, n_heads: int, revin: bool) -> np.ndarray:
    """Logits of windows x (B, T, F) under a parameter tree of fintx."""
    return np.array([_one(params, window, patch_length, stride, n_heads, revin) for window in x])


def _one(params, window, patch_length, stride, n_heads, revin):
    window = window.astype(np.float64)
    if revin:
        columns = []
        for f in range(window.shape[1]):
            column = window[:, f]
            normal = (column - column.mean()) / math.sqrt(column.var() + 1e-5)
            columns.append(normal * params["revin"]["scale"][f] + params["revin"]["bias"][f])
        window = np.stack(columns, axis=1)
    tokens = []
    end = len(window)
    while end - patch_length >= 0:  # patches are cut from the newest side
        tokens.insert(0, window[end - patch_length : end].reshape(-1))
        end -= stride
    hidden = np.stack([_linear(params["embedding"], token) for token in tokens]) + params["positions"]
    n_layers = len(params["blocks"]["qkv"]["bias"])
    for layer in range(n_layers):
        block = {name: {k: v[layer] for k, v in leaf.items()} for name, leaf in params["blocks"].items()}
        hidden = hidden + _attention(block, _norm(block["attention_norm"], hidden), n_heads)
        inner = _linear(block["feed_forward_in"], _norm(block["feed_forward_norm"], hidden))
        hidden = hidden + _linear(block["feed_forward_out"], _gelu(inner))
    flat = _norm(params["norm"], hidden).reshape(-1)
    return float((flat @ params["head"]["kernel"] + params["head"]["bias"])[0])


def _linear(leaf, x):
    return x @ leaf["kernel"].astype(np.float64) + leaf["bias"]


def _norm(leaf, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * leaf["scale"] + leaf["bias"]


def _gelu(x):
    return np.array([[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x])


def _attention(block, x, n_heads):
    width = x.shape[1]
    size = width // n_heads
    projected = _linear(block["qkv"], x)
    queries, keys, values = projected[:, :width], projected[:, width : 2 * width], projected[:, 2 * width :]
    mixed = np.zeros_like(x)
    for head in range(n_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            scores = np.array([queries[i, part] @ keys[j, part] / math.sqrt(size) for j in range(len(x))])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed[i, part] = sum(weights[j] * values[j, part] for j in range(len(x)))
    return _linear(block["attention_out"], mixed)
