# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""lstm.py: a memory that gates protect.

The plain recurrent cell h' = tanh(x Wx + h Wh + b) rewrites its whole state at every step. So it forgets, and so does
its gradient: on the way back through T steps it is multiplied T times by Wh and by slopes below 1. The LSTM keeps a
second state, the cell c, which is changed by addition only, and three gates between 0 and 1 that say how much to keep,
to write and to show. While the forget gate is near 1, both the memory and its gradient go through unchanged.

Forward, one step (a row of z is x Wx + b; s is the sigmoid):      i = s(z_i + h W_i)     input gate: how much to write
    c' = f c + i g         what is kept and what is new            f = s(z_f + h W_f)     forget gate: how much to keep
    h' = o tanh c'         what is shown                           g = tanh(z_g + h W_g)  what to write
                                                                   o = s(z_o + h W_o)     output gate: how much to show
Backward, from the last step to the first, given dh and dc (from above, and from the step after):
    dc += dh o (1 - tanh^2 c')                                   dz_i = dc g i (1 - i)     dz_g = dc i (1 - g^2)
    dc of the step before = dc f                                 dz_f = dc c f (1 - f)     dz_o = dh tanh c' o (1 - o)
    dh of the step before = dz Wh^T                              dWh = sum_t h_t^T dz_t,   one product at the end
The GRU (Cho 2014) has no cell; a gate u mixes the old state with a new one, a gate r says how much of h goes into it:
    n = tanh(z_n + r (h W_n + b_n))      h' = (1 - u) n + u h

What does not depend on h is left out of the loop: x Wx for all steps is one product. If x is a letter, there are only V
different rows x Wx, so they are computed once a letter and then looked up.

Run
    python lstm.py                                     remember, reverse, and add, which the plain cell cannot do
    python lstm.py --task remember                     hold a value for 14 steps, then learn to for a hundred
    python lstm.py --task add --cell gru
    python lstm.py --task text                         a nursery rhyme by heart, letter by letter
    python lstm.py --task text --data tinyshakespeare.txt --save lstm.npz      1.60 nats a letter or less
        curl -o tinyshakespeare.txt \\
            https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt

Break it
    --task add --cell rnn: the squared error ends above 0.05 where the LSTM's is below 0.001
    the forget gate's bias 1 -> -3 in init_params, --task add: 0.03; a cell that begins by forgetting learns late
    dc = dc_here * f[t] -> 0 * dc_here in lstm_backward, --task add: 0.006, not 0.0008: c no longer carries it back
    drop "dz_f *= c[:-1]" in lstm_backward, --task add: 0.02; wrong, and yet far below chance (0.167)

Papers: Hochreiter, Schmidhuber 1997 (LSTM, the adding problem); Gers et al. 2000 (the forget gate); Cho et al. 2014
(GRU); Jozefowicz et al. 2015 (a forget bias of 1).
"""
import argparse
import contextlib
import ctypes
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np


@dataclass
class Config:
    """Hyperparameters. Edit a line, or pass its name as a flag: --lr 0.1"""
    task: Literal["demo", "remember", "reverse", "add", "text"] = "demo"  # what to learn; demo is the first three
    cell: Literal["lstm", "gru", "rnn"] = "lstm"  # kind of cell; rnn is the plain one
    hidden: int = 64        # size of a layer's state
    layers: int = 1         # layers on top of each other
    embed: int = 32         # numbers that stand for a symbol
    length: int = 14        # remember: steps of noise; reverse: most symbols; add: numbers; text: letters a window
    clip: float = 1.0       # largest norm of the gradient; 0: any
    lr: float = 0.01        # learning rate at its height
    decay: float = 0.0      # share of every matrix that is taken off, times lr
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # course of the learning rate
    warmup: int = 50        # steps in which it rises from 0
    steps: int = 1500       # updates
    batch: int = 64         # sequences an update
    temperature: float = 0.7  # text: of the samples; small is careful, large is wild
    data: str = ""          # text: a file in UTF-8 (none: a nursery rhyme)
    save: str = ""          # file (.npz) to keep parameters and state of the training in
    load: str = ""          # such a file to go on from
    seed: int = 0           # of every random draw

    def __post_init__(self):
        for name in ("steps", "batch", "hidden", "layers", "embed"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("clip", "decay", "warmup", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        for name in ("lr", "temperature"):
            require(0 < getattr(self, name) < math.inf, "--" + name, "a number above 0", getattr(self, name))
        require(self.length >= 2, "--length", "2 or more", self.length)
        require(not self.data or self.task == "text", "--data", "--task text with it", self.task)
        for name in ("save", "load"):
            require(not getattr(self, name) or self.task != "demo", "--" + name, "a --task with it", self.task)


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "remember": dict(hidden=32, lr=0.02, steps=2300),
    "reverse": dict(length=5, hidden=128, lr=0.005),
    "add": dict(length=50, steps=800),
    "text": dict(length=64, hidden=128, lr=0.01, steps=400, batch=16, clip=5.0),
    "text --data": dict(hidden=512, embed=64, lr=0.003, decay=0.01, steps=2000, batch=64, clip=5.0),
}


# ---- layers: T steps, N sequences, H hidden, V symbols ---------------------------------------------------------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, K), b (K,) -> y (N, K)."""
    y = x @ W
    y += b
    return y, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   dout (N, K) -> dx (N, D), dW (D, K), db (K,)."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)     # b was broadcast over N, so sum over N


def embedding_forward(ids, E):
    """The row of E that each number names.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """A row of E gets the sum of dout over the places where it stands: a product with a (V, places) table of 0, 1."""
    ids, shape = cache
    stands = np.arange(shape[0])[:, None] == ids.ravel()
    return stands.astype(dout.dtype) @ dout.reshape(-1, shape[1])


def rnn_forward(z, h0, Wh, mask=None):
    """h_t = tanh(z_t + h_{t-1} Wh); where mask is false (padding) the state stays.
    z = x Wx + b (T, N, H), h0 (N, H), Wh (H, H), mask (T, N, 1) -> h (T, N, H)."""
    h = np.empty((len(z) + 1, *h0.shape), z.dtype)
    h[0] = h0
    for t in range(len(z)):
        np.tanh(z[t] + h[t] @ Wh, out=h[t + 1])
        if mask is not None:
            h[t + 1] = np.where(mask[t], h[t + 1], h[t])
    return h[1:], (h, Wh, mask)


def rnn_backward(dout, cache):
    """dz_t = dh_t (1 - h_t^2), dh_{t-1} = dout_{t-1} + dz_t Wh^T, dWh = sum_t h_{t-1}^T dz_t.   -> dz, dh0, dWh."""
    h, Wh, mask = cache
    dz = 1 - h[1:] * h[1:]
    dh, WhT = 0, Wh.T.copy()                            # the products in the loop read it row by row
    for t in reversed(range(len(dz))):
        dh = dout[t] + dh
        dz[t] *= dh
        if mask is None:
            dh = dz[t] @ WhT
        else:                                           # padding: the gradient goes past the step, as the state did
            dz[t] *= mask[t]
            dh = dz[t] @ WhT + np.where(mask[t], 0, dh)
    H = len(Wh)
    return dz, dh, h[:-1].reshape(-1, H).T @ dz.reshape(-1, H)


def lstm_forward(z, h0, c0, Wh, mask=None):
    """An LSTM layer; the gates i, f, g, o are four blocks of H columns; where mask is false the state stays.
    z = x Wx + b (T, N, 4 H), h0, c0 (N, H), Wh (H, 4 H), mask (T, N, 1) -> h (T, N, H), last c (N, H)."""
    T, N, H = len(z), *h0.shape
    scale = np.repeat(np.array([0.5, 0.5, 1, 0.5], z.dtype), H)     # s(a) = tanh(a / 2) / 2 + 1/2: one tanh for all
    shift, Wh_scaled, y = 1 - scale, Wh * scale, z * scale
    i, f, g, o = y.reshape(T, N, 4, H).transpose(2, 0, 1, 3)        # views: what becomes of y is seen in them
    h, c, tanh_c = (np.empty((T + 1, N, H), z.dtype) for _ in range(3))
    h[0], c[0] = h0, c0
    for t in range(T):
        a = y[t]
        a += h[t] @ Wh_scaled
        np.tanh(a, out=a)
        a *= scale
        a += shift                                      # now i[t], f[t], g[t], o[t] are what the formulas call so
        np.multiply(f[t], c[t], out=c[t + 1])
        c[t + 1] += i[t] * g[t]                         # c' = f c + i g
        np.tanh(c[t + 1], out=tanh_c[t])
        np.multiply(o[t], tanh_c[t], out=h[t + 1])      # h' = o tanh c'
        if mask is not None:
            h[t + 1], c[t + 1] = np.where(mask[t], h[t + 1], h[t]), np.where(mask[t], c[t + 1], c[t])
    return (h[1:], c[T]), (h, c, y, tanh_c[:T], Wh, mask)


def lstm_backward(dh_out, dc, cache):
    """As derived above.   dh_out (T, N, H), dc of the last c (N, H) -> dz (T, N, 4 H), dh0, dc0, dWh."""
    h, c, y, tanh_c, Wh, mask = cache
    T, N, H = tanh_c.shape
    i, f, g, o = y.reshape(T, N, 4, H).transpose(2, 0, 1, 3)
    dz = y - y * y                                      # slope of a sigmoid, times what does not depend on dh and dc:
    by_gate = dz.reshape(T, N, 4, H)
    dz_i, dz_f, dz_g, dz_o = by_gate.transpose(2, 0, 1, 3)
    dz_i *= g
    dz_f *= c[:-1]
    np.multiply(1 - g * g, i, out=dz_g)
    dz_o *= tanh_c
    to_c = o * (1 - tanh_c * tanh_c)
    dh, WhT, times = 0, Wh.T.copy(), np.empty((N, 4, H), dz.dtype)
    for t in reversed(range(T)):
        dh = dout_t = dh_out[t] + dh
        dc_here = dc + dh * to_c[t]                     # c reaches the loss through h, and through the next c
        times[:, :3], times[:, 3] = dc_here[:, None], dh        # i, f, g act on c, o on h
        by_gate[t] *= times
        if mask is None:
            dc = dc_here * f[t]
            dh = dz[t] @ WhT
        else:                                           # padding: the gradients go past the step, as the states did
            dz[t] *= mask[t]
            dc = np.where(mask[t], dc_here * f[t], dc)
            dh = dz[t] @ WhT + np.where(mask[t], 0, dout_t)
    return dz, dh, dc, h[:-1].reshape(-1, H).T @ dz.reshape(-1, 4 * H)


def gru_forward(z, h0, Wh, bn, mask=None):
    """A GRU layer; r, u, n are three blocks of H columns; n = tanh(z_n + r (h W_n + bn)), h' = n + u (h - n).
    z = x Wx + b (T, N, 3 H), h0 (N, H), Wh (H, 3 H), bn (H,), mask (T, N, 1) -> h (T, N, H)."""
    T, N, H = len(z), *h0.shape
    h = np.empty((T + 1, N, H), z.dtype)
    ru, n, q = np.empty((T, N, 2 * H), z.dtype), np.empty((T, N, H), z.dtype), np.empty((T, N, H), z.dtype)
    h[0] = h0
    for t in range(T):
        a = h[t] @ Wh
        ru[t] = sigmoid(z[t, :, :2 * H] + a[:, :2 * H])
        np.add(a[:, 2 * H:], bn, out=q[t])
        np.tanh(z[t, :, 2 * H:] + ru[t, :, :H] * q[t], out=n[t])
        h[t + 1] = n[t] + ru[t, :, H:] * (h[t] - n[t])
        if mask is not None:
            h[t + 1] = np.where(mask[t], h[t + 1], h[t])
    return h[1:], (h, ru, n, q, Wh, mask)


def gru_backward(dout, cache):
    """dn = dh (1 - u), du = dh (h - n), then slopes; q = h W_n + bn gets dz_n r.   -> dz (T, N, 3 H), dh0, dWh, dbn."""
    h, ru, n, q, Wh, mask = cache
    T, N, H = n.shape
    r, u = ru[:, :, :H], ru[:, :, H:]
    dz = np.empty((T, N, 3 * H), dout.dtype)            # what does not depend on dh first, as in the LSTM
    slope = ru - ru * ru
    np.multiply(1 - u, 1 - n * n, out=dz[:, :, 2 * H:])
    np.multiply(h[:-1] - n, slope[:, :, H:], out=dz[:, :, H:2 * H])
    np.multiply(dz[:, :, 2 * H:], q * slope[:, :, :H], out=dz[:, :, :H])
    da = dz.copy()                                      # the gradient of a = h Wh: as dz, but r stands before h W_n
    da[:, :, 2 * H:] *= r
    dh, WhT = 0, Wh.T.copy()
    for t in reversed(range(T)):
        dh = dout[t] + dh
        here = dh if mask is None else dh * mask[t]
        da[t].reshape(N, 3, H)[...] *= here[:, None]
        dz[t].reshape(N, 3, H)[...] *= here[:, None]
        dh = da[t] @ WhT + here * u[t] + (dh - here)
    da = da.reshape(-1, 3 * H)
    return dz, dh, h[:-1].reshape(-1, H).T @ da, da[:, 2 * H:].sum(axis=0)


def sigmoid(z):
    """1 / (1 + e^-z), written with tanh, which cannot overflow."""
    return 0.5 * np.tanh(0.5 * z) + 0.5


def mse_forward(z, targets):
    """mean[(z - y)^2].   z (N, K), targets (N, K) -> scalar."""
    return ((z - targets) ** 2).mean(), (z, targets)


def mse_backward(dout, cache):
    """dz = 2 (z - y) / size.   dout scalar -> dz (N, K)."""
    z, targets = cache
    return (z - targets) * (2 * dout / z.size)


def softmax_cross_entropy_forward(z, targets):
    """-mean_n log p[n, y_n], p = softmax of each row.   z (N, K), targets (N,) class numbers -> scalar."""
    z = z - z.max(axis=1, keepdims=True)                # the same p, and e^z cannot overflow
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(targets)), targets].mean(), (log_p, targets)


def softmax_cross_entropy_backward(dout, cache):
    """dz = (p - onehot(y)) / N.   dout scalar -> dz (N, K)."""
    log_p, targets = cache
    dz = np.exp(log_p)
    dz[np.arange(len(targets)), targets] -= 1
    return dz * (dout / len(targets))


# ---- model: embedding or numbers, recurrent layers, a linear layer on top --------------------------------------------

BLOCKS = {"rnn": 1, "lstm": 4, "gru": 3}                # blocks of H columns in Wx, Wh, b


def init_params(cfg, rng, dtype=np.float32):
    """E for symbols; Wx0, Wh0, b0, ... a layer (GRU: bn0 too); Wo, bo."""
    H, K, params = cfg.hidden, BLOCKS[cfg.cell], {}
    D, M = {"remember": (1, 1), "demo": (1, 1), "add": (2, 1)}.get(cfg.task, (cfg.embed, 0))
    if not M:
        M = vocabulary_size(cfg)
        params["E"] = 0.5 * rng.standard_normal((M, D))
    for k in range(cfg.layers):
        params[f"Wx{k}"] = rng.standard_normal((D, K * H)) * D ** -0.5
        params[f"Wh{k}"] = rng.standard_normal((H, K * H)) * H ** -0.5
        params[f"b{k}"] = np.zeros(K * H)
        if cfg.cell == "lstm":
            params[f"b{k}"][H:2 * H] = 1                # the forget gate begins open: remember, until told not to
        if cfg.cell == "gru":
            params[f"bn{k}"] = np.zeros(H)
        D = H
    params["Wo"], params["bo"] = rng.standard_normal((H, M)) * H ** -0.5, np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def zero_states(cfg, N, dtype=np.float32):
    """The states before the first step: of every layer h, and of an LSTM c as well."""
    return [tuple(np.zeros((N, cfg.hidden), dtype) for _ in range(1 + (cfg.cell == "lstm"))) for _ in range(cfg.layers)]


def stack_forward(params, x, mask, states, cfg):
    """x (T, N) symbols or (T, N, D) numbers -> z (T, N, M), last states, cache."""
    caches, last = [], []
    for k, state in enumerate(states):
        Wx, Wh, b = params[f"Wx{k}"], params[f"Wh{k}"], params[f"b{k}"]
        if k == 0 and "E" in params:                    # V rows x Wx + b, then a look-up, instead of T N rows
            table, project_cache = linear_forward(params["E"], Wx, b)
            z, look_cache = embedding_forward(x, table)
        else:
            z, project_cache = linear_forward(x.reshape(-1, x.shape[2]), Wx, b)
            z, look_cache = z.reshape(*x.shape[:2], -1), None
        if cfg.cell == "lstm":
            (h, c), cell_cache = lstm_forward(z, *state, Wh, mask)
        elif cfg.cell == "gru":
            h, cell_cache = gru_forward(z, *state, Wh, params[f"bn{k}"], mask)
        else:
            h, cell_cache = rnn_forward(z, *state, Wh, mask)
        last.append((h[-1], c) if cfg.cell == "lstm" else (h[-1],))
        caches.append((project_cache, look_cache, cell_cache))
        x = h
    z, out_cache = linear_forward(x.reshape(-1, cfg.hidden), params["Wo"], params["bo"])
    return z.reshape(*x.shape[:2], -1), (caches, out_cache, last, cfg)


def stack_backward(dout, cache):
    """stack_forward from bottom to top -> gradients under the keys of params."""
    (caches, out_cache, _, cfg), grads = cache, {}
    T, N, M = dout.shape
    dh, grads["Wo"], grads["bo"] = linear_backward(dout.reshape(-1, M), out_cache)
    for k, (project_cache, look_cache, cell_cache) in reversed(list(enumerate(caches))):
        dh = dh.reshape(T, N, cfg.hidden)
        if cfg.cell == "lstm":                          # nothing but h leads on from the last step, so its dc is 0
            dz, _, _, grads[f"Wh{k}"] = lstm_backward(dh, np.zeros_like(dh[0]), cell_cache)
        elif cfg.cell == "gru":
            dz, _, grads[f"Wh{k}"], grads[f"bn{k}"] = gru_backward(dh, cell_cache)
        else:
            dz, _, grads[f"Wh{k}"] = rnn_backward(dh, cell_cache)
        if look_cache is not None:
            dtable = embedding_backward(dz, look_cache)
            grads["E"], grads[f"Wx{k}"], grads[f"b{k}"] = linear_backward(dtable, project_cache)
        else:
            dh, grads[f"Wx{k}"], grads[f"b{k}"] = linear_backward(dz.reshape(T * N, -1), project_cache)
    return grads


def loss_and_grads(params, batch, cfg, states=None):
    """One forward and one backward pass -> loss, gradients under the keys of params. The loss counts where batch says,
    mse of numbers, cross-entropy of symbols. states, a list: where the batch begins; it gets where the batch ends."""
    x, mask, places, targets = batch
    z, cache = stack_forward(params, x, mask, states or zero_states(cfg, x.shape[1], params["bo"].dtype), cfg)
    rows = z.reshape(-1, z.shape[2])[places]
    if "E" in params:
        loss, loss_cache = softmax_cross_entropy_forward(rows, targets)
        drows = softmax_cross_entropy_backward(1.0, loss_cache)
    else:
        loss, loss_cache = mse_forward(rows, targets)
        drows = mse_backward(1.0, loss_cache)
    dz = np.zeros_like(z)
    dz.reshape(-1, z.shape[2])[places] = drows          # elsewhere the output does not matter
    if states is not None:
        states[:] = cache[2]
    return loss, stack_backward(dz, cache)


def adam_update(params, grads, state, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """m, v: running means of g and g^2, over 1 - beta^t since they start at 0;  w <- w - lr m / (sqrt v + eps)."""
    t = state["t"] = state.get("t", 0) + 1
    step, scale = lr / (1 - beta1 ** t), (1 - beta2 ** t) ** -0.5
    for name, g in grads.items():
        if "m " + name not in state:
            state["m " + name], state["v " + name] = np.zeros_like(g), np.zeros_like(g)
        m, v = state["m " + name], state["v " + name]
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        params[name] -= step * m / (np.sqrt(v) * scale + eps)


def adamw_update(params, grads, state, lr, decay=0.01):
    """Adam, and every matrix shrinks by lr decay, whatever its gradient was."""
    for W in params.values():
        if W.ndim > 1:
            W *= 1 - lr * decay
    adam_update(params, grads, state, lr)


def learning_rate(step, cfg):
    """lr at a step: up from 0 in warmup steps; then constant, or a tenth from 60 % and a hundredth from 85 % on (step),
    or down a half cosine to 0."""
    rise, done = min(1, step / max(cfg.warmup, 1)), step / cfg.steps
    course = {"constant": 1, "step": 1 if done < 0.6 else 0.1 if done < 0.85 else 0.01,
              "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return cfg.lr * rise * course[cfg.schedule]


def clip_norm(grads, limit):
    """Scale all gradients so that their common norm is at most limit (Pascanu 2013) -> the norm before."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    if norm > limit > 0:
        for g in grads.values():
            g *= limit / norm
    return norm


# ---- data ------------------------------------------------------------------------------------------------------------

VERSES = ["the house that Jack built.", "the malt\nThat lay in", "the rat,\nThat ate", "the cat,\nThat killed",
          "the dog,\nThat worried", "the cow with the crumpled horn,\nThat tossed",
          "the maiden all forlorn,\nThat milked", "the man all tattered and torn,\nThat kissed",
          "the priest all shaven and shorn,\nThat married"]
RHYME = "\n" + "\n\n".join("This is " + " ".join(VERSES[n::-1]) for n in range(len(VERSES))) + "\n"
BLANK = 8                                               # reverse: eight symbols, 0 to 7, then these two
GO = 9


def make_batch(cfg, rng, dtype=np.float32, step=None):
    """-> x (T, N) or (T, N, D), mask (T, N, 1) or None, places that count (numbers t N + n, or all), targets.
    remember: at the end, say the first number.    add: at the end, say the sum of the two marked numbers.
    reverse: n symbols, n drawn a sequence, GO, then say them backwards.    text: the next letter, everywhere."""
    T, N = cfg.length, cfg.batch
    if cfg.task in ("demo", "remember"):
        x = rng.uniform(-1, 1, (T + 1, N, 1))
        return x.astype(dtype), None, np.arange(T * N, T * N + N), x[0].astype(dtype)
    if cfg.task == "add":
        x = np.stack([rng.random((T, N)), np.zeros((T, N))], axis=2)
        marked = rng.integers(0, T // 2, N), rng.integers(T // 2, T, N)     # one in either half
        for t in marked:
            x[t, np.arange(N), 1] = 1
        total = sum(x[t, np.arange(N), 0] for t in marked)[:, None]
        return x.astype(dtype), None, np.arange((T - 1) * N, T * N), total.astype(dtype)
    if cfg.task == "reverse":
        n, t = rng.integers(1, T + 1, N), np.arange(2 * T)[:, None]
        symbols = rng.integers(0, 8, (T, N))
        x = np.where(t < n, symbols[np.minimum(t, T - 1), np.arange(N)], np.where(t == n, GO, BLANK))
        says = (t >= n) & (t < 2 * n)
        answer = symbols[np.clip(2 * n - 1 - t, 0, T - 1), np.arange(N)]
        return x, (t < 2 * n)[:, :, None], np.flatnonzero(says), answer[says]
    ids = load_text(cfg.data, cfg.load)["train"]
    stream, width = len(ids) // N, min(T, len(ids) // N - 1)
    start = rng.integers(0, stream - width, N) if step is None else (step - 1) * width % (stream - width)
    at = np.arange(width + 1)[:, None] + np.arange(N) * stream + start      # N readers, each in its part of the text
    return ids[at[:-1]], None, slice(None), ids[at[1:]].ravel()


@functools.lru_cache
def load_text(path, checkpoint=""):
    """A text as numbers -> {"chars": ..., "train": its first nine tenths, "validation": the last tenth}. The numbers
    stand for the text's own characters or, with a checkpoint, for those that it was trained on."""
    text = read_text(path) if path else RHYME
    require(len(text) >= 1000, f"--data {path}", "1000 characters or more", len(text))
    about = read_checkpoint(checkpoint)[0] if checkpoint else {"chars": "".join(sorted(set(text)))}
    require("chars" in about, f"--load {checkpoint}", "a training on text", f"task {about.get('task')}")
    chars = about["chars"]
    strange = "".join(sorted(set(text) - set(chars)))
    require(not strange, f"--load {checkpoint}", "a text of the characters it was trained on", strange[:10])
    index = {c: i for i, c in enumerate(chars)}
    ids, cut = np.array([index[c] for c in text]), len(text) * 9 // 10
    return {"chars": chars, "train": ids[:cut], "validation": ids[cut:]}


def vocabulary_size(cfg):
    """Number of symbols."""
    return len(load_text(cfg.data, cfg.load)["chars"]) if cfg.task == "text" else 10


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        require(False, path, "text in UTF-8", f"byte {error.object[error.start]:#x} at {error.start}")
    except OSError as error:
        require(False, path, "a text file", error.strerror)
    require(text.strip(), path, "some text", "an empty file")
    return text


# ---- pictures in text ------------------------------------------------------------------------------------------------

SHADES = np.array(list(" .:-=+*#%@"))


def shade(values):
    """Numbers from 0 to 1 -> characters from blank to dark, in an array of the same shape."""
    return SHADES[(np.clip(values, 0, 1) * 9.99).astype(int)]


def loss_curve(losses, width=60):
    """The losses from first to last in one line of text, dark where high (the scale is logarithmic)."""
    means = np.log([np.mean(part) + 1e-12 for part in np.array_split(losses, min(width, len(losses)))])
    return "".join(shade((means - means.min()) / (np.ptp(means) + 1e-12)))


# ---- training and demo -----------------------------------------------------------------------------------------------

def train_cells(cfg, rng, quiet=False, params=None):
    """Train new parameters, or those given -> params, progress. Text is read on and on: states are carried from window
    to window, gradients are not."""
    params, state, first, carried = params or init_params(cfg, rng), {}, 0, None
    about = dict(task=cfg.task, cell=cfg.cell)
    if cfg.task == "text":
        carried = zero_states(cfg, cfg.batch)
        window = make_batch(cfg, rng, step=1)[0].shape[0]
        text = load_text(cfg.data, cfg.load)
        require(window >= 2, "--batch", f"at most {len(text['train']) // 3} for this text", cfg.batch)
        about["chars"] = text["chars"]

    def parts():
        held = {f"{k} {j}": s for k, layer in enumerate(carried or ()) for j, s in enumerate(layer)}
        return {"params": params, "adam": state, "carried": held}
    if cfg.load:
        read = parts()
        first = load_checkpoint(cfg.load, rng, about, read)
        kept = [tuple(read["carried"][f"{k} {j}"] for j in range(len(layer))) for k, layer in enumerate(carried or ())]
        if kept and kept[0][0].shape == carried[0][0].shape:                # else --batch is another: begin with zeros
            carried = kept
    if cfg.save:
        save_checkpoint(cfg.save, first, rng, about, parts(), trial=True)    # before the work, not after it
    progress, clipped = Progress(cfg.steps, first + 1, quiet), 0
    for step in progress:
        loss, grads = loss_and_grads(params, make_batch(cfg, rng, step=step), cfg, carried)
        clipped += clip_norm(grads, cfg.clip) > cfg.clip > 0
        adamw_update(params, grads, state, learning_rate(step, cfg), cfg.decay)
        progress.report(loss, lambda: f"  validation {validation_loss(params, cfg):.4f}" if cfg.task == "text" else "")
        if cfg.save and (step % 1000 == 0 or step == cfg.steps or progress.stopped):
            save_checkpoint(cfg.save, step, rng, about, parts())
    if clipped and not quiet:
        print(f"the gradient was clipped to norm {cfg.clip} in {clipped} of {len(progress.losses)} steps")
    return params, progress


def save_checkpoint(path, step, rng, about, parts, trial=False):
    """Everything that a training needs to go on, in an .npz file that is either whole or not there. about: what has to
    be the same when it goes on; parts: {"params": dict of arrays, ...}, dicts of arrays and numbers. trial: only find
    out whether it can be written, and leave what stands there."""
    require(not os.path.isdir(path), f"--save {path}", "a file", "a folder")
    arrays = {f"{part} {name}": a for part, named in parts.items() for name, a in named.items()}
    arrays["about"] = np.array(json.dumps({**about, "step": step, "rng": rng.bit_generator.state}))
    try:
        with open(path + ".tmp", "wb") as file:
            np.savez(file, **arrays)
        os.remove(path + ".tmp") if trial else os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise InputError(f"--save {path}: expected a place to write to, found: {error.strerror}") from None


def read_checkpoint(path):
    """A file of save_checkpoint -> about, arrays by name."""
    try:
        zipfile.ZipFile(path).close()                   # an .npz is a zip file of arrays; np.load takes others, too
        with np.load(path, allow_pickle=False) as saved:
            arrays = dict(saved)
        about = json.loads(str(arrays.pop("about")))
        return {**about, "step": int(about["step"]), "rng": dict(about["rng"])}, arrays
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(f"--load {path}: expected a file that --save wrote, found: {found}") from None


def load_checkpoint(path, rng, about, parts):
    """Fill rng and parts from a file of save_checkpoint; what it is about must be the same -> number of steps done."""
    found, arrays = read_checkpoint(path)
    for name, value in about.items():
        require(found.get(name) == value, f"--load {path}", f"{name} {value}", found.get(name))
    for part, named in parts.items():
        held = {name[len(part) + 1:]: a if a.ndim else a.item() for name, a in arrays.items()
                if name.startswith(part + " ")}
        for name in sorted(named.keys() | held.keys()) if part == "params" else ():
            shape, other = (np.shape(d[name]) if name in d else "no such array" for d in (named, held))
            require(shape == other, f"--load {path}", f"{name} {shape}", other)
        named.update(held)
    rng.bit_generator.state = found["rng"]
    print(f"going on from {path}, after {found['step']} steps")
    return found["step"]


def validation_loss(params, cfg):
    """Cross-entropy on the last tenth of the text, nats a letter, read by several readers with their states carried."""
    ids = load_text(cfg.data, cfg.load)["validation"]
    N = max(1, min(20, len(ids) // 200))
    stream = len(ids) // N
    parts, states, total, count = ids[:N * stream].reshape(N, stream).T, zero_states(cfg, N), 0.0, 0
    for start in range(0, stream - 1, 100):
        part = parts[start:start + 101]
        z, cache = stack_forward(params, part[:-1], None, states, cfg)
        states, rows = cache[2], z.reshape(-1, z.shape[2])
        total += float(softmax_cross_entropy_forward(rows, part[1:].ravel())[0]) * len(rows)
        count += len(rows)
    return total / count


def measure(params, cfg, seed=1000):
    """On 1000 fresh sequences -> numbers: mean |error|, mean squared error; symbols: share of sequences all right."""
    cfg = replace(cfg, batch=1000)
    x, mask, places, targets = make_batch(cfg, np.random.default_rng(seed))
    z, _ = stack_forward(params, x, mask, zero_states(cfg, 1000), cfg)
    rows = z.reshape(-1, z.shape[2])[places]
    if cfg.task != "reverse":
        return {"error": float(np.abs(rows - targets).mean()), "mse": float(((rows - targets) ** 2).mean())}
    wrong = np.zeros(1000)
    np.add.at(wrong, places % 1000, rows.argmax(axis=1) != targets)
    return {"exact": float((wrong == 0).mean())}


def announce_cells(cfg, text, chance):
    """What is being learned, and by what."""
    size = sum(p.size for p in init_params(cfg, np.random.default_rng(0)).values())
    print(f"\n{text}: {cfg.cell}, hidden {cfg.hidden}, {cfg.layers} layer(s), lr {cfg.lr}, batch {cfg.batch}, "
          f"{size} parameters")
    print(f"chance level: {chance}")


def show_gates(params, cfg, rng):
    """The first four cells over time on one sequence: gates and contents, dark is 1 (for c: 1 or more, either sign)."""
    x, mask, _, targets = make_batch(replace(cfg, batch=1), rng)
    _, (caches, *_) = stack_forward(params, x, mask, zero_states(cfg, 1), cfg)
    h, c, y = caches[0][2][:3]
    T, H = len(y), cfg.hidden
    i, f, g, o = y.reshape(T, 4, H).transpose(1, 0, 2)
    busy = np.argsort(-np.abs(params["Wo"][:, 0]) * np.abs(c[-1, 0]))[:4]   # those that the answer is read from
    print(f"One sequence, value {float(targets[0, 0]):.2f} at step 0, then noise. The busiest cells, over time:")
    for name, rows in (("input gate i", i), ("forget gate f", f), ("output gate o", o), ("cell |c|", np.abs(c[1:, 0]))):
        for n, k in enumerate(busy):
            print(f"{name if n == 0 else '':>14s} cell {k:3d} |{''.join(shade(rows[:, k]))}|")


def show_gradient(cfg, rng, T=50):
    """How much of a gradient at the last step arrives at the first: plain cell and LSTM before training."""
    print(f"\nA gradient of norm 1 at step {T}, on its way back to step 1 (untrained, {cfg.hidden} hidden):")
    for cell in ("rnn", "gru", "lstm"):
        part = replace(cfg, cell=cell, task="remember", length=T)
        params = init_params(part, rng, np.float64)
        x = make_batch(part, rng, np.float64)[0][:T]
        z, (caches, *_) = stack_forward(params, x, None, zero_states(part, cfg.batch, np.float64), part)
        dh = np.zeros((T, cfg.batch, cfg.hidden))
        dh[-1] = rng.standard_normal(dh[-1].shape)
        dc = (0 * dh[0],) if cell == "lstm" else ()
        backward = {"rnn": rnn_backward, "gru": gru_backward, "lstm": lstm_backward}[cell]
        norm = np.linalg.norm(backward(dh, *dc, caches[0][2])[0], axis=(1, 2))
        norm /= norm[-1]
        picture = "".join(shade(1 + np.log10(norm + 1e-30) / 8))
        print(f"{cell:>5s}  step 1 |{picture}| step {T}   left at step 1: {norm[0]:.0e}")
    print("       (dark: 1, every shade lighter: six times less. The GRU's u begins at 1/2: 30 % is lost a step;")
    print("       LSTM's forget gate at 0.73: 10 %. Training can open both. The plain cell has nothing to open.)")


def learn_numbers(cfg, rng):
    """remember or add, by the chosen cell and, beside it, by the plain one."""
    remember, figures = cfg.task == "remember", {}
    text = (f"Remember the first of {cfg.length + 1} numbers, the others are noise" if remember else
            f"Add the two marked ones of {cfg.length} numbers")
    for cell in dict.fromkeys((cfg.cell, "rnn")):
        part = cfg if cell == cfg.cell else replace(cfg, cell=cell, save="", load="")
        announce_cells(part, text, "loss 0.333, mean error 0.5" if remember else "loss 0.167")
        params, progress = train_cells(part, rng, quiet=cell != cfg.cell)
        found = measure(params, part)
        print("loss", loss_curve(progress.losses or [0]))
        print(f"{cell}: mean error {found['error']:.4f}, squared {found['mse']:.5f}, on 1000 fresh sequences")
        if cell == cfg.cell:
            kept, figures = (params, progress), {**found}
            if progress.stopped:
                break
            if remember:
                long = replace(cfg, length=100, steps=max(1, cfg.steps // 10), lr=cfg.lr / 3, save="", load="")
                before = measure(params, long)["error"]
                for length in (40, 100):                # by way of 40: straight to 100 is steep, now and then too steep
                    train_cells(replace(long, length=length), rng, quiet=True, params=params)
                figures["error_at_100"] = measure(params, long)["error"]
                print(f"{cell}: after 100 steps of noise instead of {cfg.length}: {before:.4f}, and after "
                      f"{2 * long.steps} more updates, with 40 and with 100 steps: {figures['error_at_100']:.4f}")
                if cell == "lstm":
                    show_gates(params, replace(cfg, length=60), rng)
        else:
            figures["plain_error" if remember else "plain_mse"] = found["error" if remember else "mse"]
    return figures, *kept


def learn_reverse(cfg, rng):
    """Read up to length symbols, then say them backwards."""
    announce_cells(cfg, f"Reverse up to {cfg.length} symbols", "loss 2.303")
    params, progress = train_cells(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    x, mask, places, targets = make_batch(replace(cfg, batch=4), rng)
    z, _ = stack_forward(params, x, mask, zero_states(cfg, 4), cfg)
    said = z.argmax(axis=2)
    for k in range(4):
        t = places[places % 4 == k] // 4
        read, answer = (" ".join("ABCDEFGH.."[s] for s in symbols) for symbols in (x[:len(t), k], said[t, k]))
        print(f"  reads {read:{2 * cfg.length}s} says {answer}")
    found = measure(params, cfg)
    print(f"{found['exact']:.1%} of 1000 fresh sequences entirely right")
    return found, params, progress


def learn_text(cfg, rng):
    """The next letter of a text."""
    data = load_text(cfg.data, cfg.load)
    V = len(data["chars"])
    text = f"Text, {len(data['train'])} letters of {V} kinds, windows of {cfg.length}"
    announce_cells(cfg, text, f"loss {math.log(V):.3f}")
    params, progress = train_cells(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    print("A sample, letter by letter:")
    states, letter = zero_states(cfg, 1), data["validation"][0]
    for _ in range(500):
        print(data["chars"][letter], end="", flush=True)
        z, cache = stack_forward(params, np.array([[letter]]), None, states, cfg)
        states, z = cache[2], z[0, 0].astype(float)
        p = np.exp((z - z.max()) / cfg.temperature)
        letter = rng.choice(len(p), p=p / p.sum())
    loss = validation_loss(params, cfg)
    expected = "   (expected on tinyshakespeare: 1.60)" if cfg.data else ""
    print(f"\n\nvalidation loss {loss:.4f} nats a letter on the last tenth{expected}")
    return {"validation": loss}, params, progress


def main(cfg):
    """Run one task, or the three of the demo."""
    start, rng, figures = time.perf_counter(), np.random.default_rng(cfg.seed), {}
    learn = {"remember": learn_numbers, "add": learn_numbers, "reverse": learn_reverse, "text": learn_text}
    examples, seconds, size, steps = 0, 0.0, 0, 0
    print("lstm.py: a memory that gates protect")
    if cfg.task == "demo":
        show_gradient(cfg, rng)
    for task in ("remember", "reverse", "add") if cfg.task == "demo" else (cfg.task,):
        part = replace(cfg, task=task)
        if cfg.task == "demo":                          # its presets, but for flags
            own = {k: v for k, v in PRESETS.get(task, {}).items() if getattr(cfg, k) == getattr(Config(), k)}
            part = replace(part, **own)
        found, params, progress = learn[task](part, rng)
        figures.update({f"{task}_{name}" if cfg.task == "demo" else name: value for name, value in found.items()})
        examples, seconds = examples + len(progress.losses) * cfg.batch, seconds + progress.seconds
        steps, size = steps + progress.step, size + sum(p.size for p in params.values())
        if progress.stopped:
            break
    print("\nNext: python lstm.py --task remember --cell gru      python lstm.py --task text")
    print_result(task=cfg.task, **figures, params=size, steps=steps, seconds=time.perf_counter() - start,
                 examples_per_s=int(examples / max(seconds, 1e-9)))


# ---- plumbing: the same in every lesson; whoever types along may stop here -------------------------------------------

class InputError(ValueError):
    """A flag, value or file that cannot be used; the program ends with its text in one line and exit status 2."""


def require(ok, what, expected, found):
    """Raise InputError unless ok."""
    if not ok:
        raise InputError(f"{what}: expected {expected}, found {found!r}")


def read_flags(argv=None):
    """Every field of Config is a flag, its comment the help text -> Config."""
    def fail(message):
        raise InputError(f"{message} (--help lists the flags)")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        kind = dict(type=field.type, metavar=field.name.upper())
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif get_args(field.type):
            kind = dict(choices=get_args(field.type))
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=text, **kind)
    known = parser.parse_known_args(argv)[0]
    data, experiment = (getattr(known, name, "") for name in ("data", "experiment"))
    for key in (known.task, f"{known.task} --data" if data else "", experiment):
        parser.set_defaults(**PRESETS.get(key, {}))
    return Config(**vars(parser.parse_args(argv)))


def run(main):
    """Call main with the Config of the flags; what is not a bug ends in one line, not in a traceback."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")      # each line at once, on any console
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)                           # `| head` ends the program quietly
    np.seterr(over="ignore", invalid="ignore")          # a run that diverges shows in its loss, which Progress checks
    with contextlib.suppress(AttributeError, OSError, TypeError):               # Linux: keep freed memory for reuse
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, -1)
    try:
        main(read_flags())
    except (InputError, FloatingPointError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


class Progress:
    """for step in progress: ... progress.report(loss).   Prints about ten lines with the time left. Ctrl-C ends the
    loop after the step at hand, a second one quits. A loss that is not finite raises FloatingPointError."""

    def __init__(self, steps, first=1, quiet=False, lines=10):
        self.steps, self.first, self.quiet, self.lines = steps, first, quiet, lines
        self.step, self.losses, self.printed, self.stopped = first - 1, [], 0, False
        self.start, self.seconds = time.perf_counter(), 0.0

    def __iter__(self):
        previous = signal.signal(signal.SIGINT, self.interrupt)
        try:
            while self.step < self.steps and not self.stopped:
                self.step += 1
                yield self.step
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.stopped:
            print(f"stopped after step {self.step}; this is what has been learned so far")

    def interrupt(self, signum, frame):
        """Called on Ctrl-C."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def report(self, loss, note=lambda: ""):
        """Keep the loss of this step; if a line is due, print it, with what note() says."""
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: training diverged; try a smaller --lr")
        self.losses.append(float(loss))
        self.seconds = time.perf_counter() - self.start
        if not self.quiet and (self.step % -(-self.steps // self.lines) == 0 or self.step == self.steps):
            recent = self.losses[self.printed:]
            self.printed = len(self.losses)
            left = self.seconds / len(self.losses) * (self.steps - self.step)
            print(f"step {self.step:6d}/{self.steps}  loss {sum(recent) / len(recent):.4f}{note()}  |  "
                  f"{self.seconds:.1f} s  ({left:.0f} s left)")


def print_result(**figures):
    """The last line of a run, for comparing runs."""
    print("result: " + " ".join(f"{k}={v:#.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()))


if __name__ == "__main__":
    run(main)
