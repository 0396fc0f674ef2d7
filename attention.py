# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""attention.py: look where you need to.

An encoder that hands over one state must press a sentence of any length into it (seq2seq.py shows where that ends).
Bahdanau's way out: keep what the encoder knew at every place, and let the decoder, before it says a symbol, ask which
places matter now. A place answers with a score, a softmax makes weights of the scores, and what the decoder gets, the
context, is the average of the places with these weights. All of it is smooth, so where to look is learned along with
the rest. The weights can be drawn: they show what was looked at for which symbol.

They show it only if the decoder needs to look, and sharply. What it has gathered in its own state it need not look up
again; so ours starts from zeros, and no look leaves a trace in its state. (Bahdanau's feeds on every context: --feed.)
And an average of neighbours can be unmixed by what comes after; so scores begin large here: it must choose at
once. (--sharp; for the pairs of a file, whole sentences perhaps, that is too soon.)

Forward, for a question q_t (the decoder's state), keys k_s and values v_s (the encoder's states, read from both ends):
    e_ts = q_t . k_s                 dot; with k_s = v_s Wk general (Luong)
         = u . tanh(q_t Wq + k_s)    additive (Bahdanau)
    w_t = softmax_s e_ts, 0 where the source is padding         context_t = sum_s w_ts v_s
    what is said at t: from tanh([q_t, context_t] Wa + ba)      --feed: context_t also goes into the decoder's next step
Backward, given dcontext:
    dv_s = sum_t w_ts dcontext_t     dw_ts = dcontext_t . v_s   de_ts = w_ts (dw_ts - sum_r w_tr dw_tr)
    dot: dq_t = sum_s de_ts k_s, dk_s = sum_t de_ts q_t         additive: the same through u and 1 - tanh^2
Without --feed no question depends on what was seen before, so all steps look at once, in three products. With it there
is a loop over t; the keys and the decoder's inputs are computed before, the gradients of the weights after it.

Run
    python attention.py                                 reverse, copy, dates: the maps, and lengths beside no attention
    python attention.py --task reverse --attention general
    python attention.py --task dates --feed
    python attention.py --task pairs --data train.tsv --save pairs.npz      a line a pair: source TAB target
    python attention.py --task pairs --data train.tsv --unit letters --length 80
        Any such file will do. Multi30k, German to English, comes as one file a language:
        for l in de en; do
        curl -O https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/train.$l.gz
        gunzip -f train.$l.gz; done; paste train.de train.en > train.tsv

Break it
    --task reverse --no-sharp: as right as ever, with only 82 % of the attention on the letter that is said, not 99 %
    there = ... -> there = 0 * ... in encoder_forward, --task reverse: 84 % right, 15 % of the attention; who comes from
        the front cannot know how far the end is
    drop "* mask" in masked_softmax_forward, --task reverse: all as before, but a source of nothing but padding is
        looked at, 1/12 everywhere
    --task reverse --attention dot: 99.6 %, with 83 % of the attention; there are no weights to make its scores large
    --task reverse --attention none: 58 %; the table shows at which lengths
    --task reverse --feed: 100 %, with 98 % of the attention; of 11 letters 97 %, instead of 85 %: it knows where it was

Papers: Bahdanau, Cho, Bengio 2015 (attention, additive); Luong, Pham, Manning 2015 (dot, general); Schuster, Paliwal
1997 (an encoder in both directions).
"""
import argparse
import contextlib
import ctypes
import datetime
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
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np


@dataclass
class Config:
    """Hyperparameters. Edit a line, or pass its name as a flag: --lr 0.1"""
    task: Literal["demo", "reverse", "copy", "dates", "pairs"] = "demo"  # what to learn; demo: the first three
    attention: Literal["additive", "dot", "general", "none"] = "additive"  # how a place is scored; none: the bottleneck
    feed: bool = False      # additive: what was seen is fed to the decoder as well, as Bahdanau has it
    sharp: bool = True      # scores begin large, so that it has to choose from the start
    hidden: int = 128       # size of the decoder's state; each of the encoder's two directions has half of it
    embed: int = 32         # numbers that stand for a symbol
    length: int = 10        # longest source in training
    unit: Literal["words", "letters"] = "words"  # pairs: what a symbol is
    words: int = 5000       # pairs: words that are known, of either side; the others are all the same to it
    beam: int = 4           # beginnings of an answer that the search keeps
    penalty: float = 0.7    # the search divides a log-probability by (number of symbols) ** penalty
    clip: float = 1.0       # largest norm of the gradient; 0: any
    lr: float = 0.01        # learning rate at its height
    decay: float = 0.0      # share of every matrix that is taken off, times lr
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # course of the learning rate
    warmup: int = 50        # steps in which it rises from 0
    steps: int = 450        # updates
    batch: int = 32         # pairs an update
    data: str = ""          # pairs: a file in UTF-8, a line a pair: source TAB target
    save: str = ""          # file (.npz) to keep parameters and state of the training in
    load: str = ""          # such a file to go on from
    seed: int = 0           # of every random draw

    def __post_init__(self):
        for name in ("steps", "batch", "hidden", "embed", "length", "words", "beam"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("penalty", "clip", "decay", "warmup", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        require(0 < self.lr < math.inf, "--lr", "a number above 0", self.lr)
        require(self.hidden % 2 == 0, "--hidden", "an even number, half for each direction", self.hidden)
        require(not self.feed or self.attention == "additive", "--feed", "--attention additive with it", self.attention)
        require(not self.data or self.task == "pairs", "--data", "--task pairs with it", self.task)
        kept = self.save or self.load
        require(not kept or self.task != "demo", "--save, --load", "--task reverse, copy, dates or pairs", "demo")


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "dates": dict(steps=600),
    "pairs": dict(length=20),
    "pairs --data": dict(sharp=False, embed=64, words=3000, lr=0.004, steps=900),
}


# ---- layers: S steps of the source, T of the target, N pairs, D embedding, H hidden, V symbols -----------------------

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


def project_symbols_forward(ids, E, Wx, b):
    """z = E[ids] Wx + b. Only the rows of E that occur are projected, once each; then every place looks its own up.
    ids (T, N), E (V, D), Wx (D, K), b (K,) -> z (T, N, K)."""
    kinds, places = np.unique(ids, return_inverse=True)
    table, project_cache = linear_forward(E[kinds], Wx, b)
    z, look_cache = embedding_forward(places.reshape(ids.shape), table)
    return z, (kinds, E.shape, project_cache, look_cache)


def project_symbols_backward(dout, cache):
    """The look-up, then the product, backwards.   dout (T, N, K) -> dE, dWx, db."""
    kinds, shape, project_cache, look_cache = cache
    drows, dWx, db = linear_backward(embedding_backward(dout, look_cache), project_cache)
    dE = np.zeros(shape, dout.dtype)
    dE[kinds] = drows                                   # symbols that do not occur get nothing
    return dE, dWx, db


def symbol_lstm_forward(ids, E, Wx, b, h0, c0, Wh, mask=None):
    """An LSTM over symbols.   ids (T, N), E (V, D), Wx (D, 4 H), b (4 H,), h0, c0 (N, H), Wh (H, 4 H), mask (T, N, 1)
    -> h (T, N, H), last c (N, H)."""
    z, project_cache = project_symbols_forward(ids, E, Wx, b)
    out, cell_cache = lstm_forward(z, h0, c0, Wh, mask)
    return out, (project_cache, cell_cache)


def symbol_lstm_backward(dh, dc, cache):
    """The same from bottom to top.   dh (T, N, H), dc (N, H) of the last c -> dE, dWx, db, dh0, dc0, dWh."""
    project_cache, cell_cache = cache
    dz, dh0, dc0, dWh = lstm_backward(dh, dc, cell_cache)
    return *project_symbols_backward(dz, project_cache), dh0, dc0, dWh


def masked_softmax_forward(scores, mask):
    """w = e^score / sum of e^score over the places where mask is true, exactly 0 elsewhere, even if it is true nowhere.
    scores (..., S), mask (..., S) -> (..., S)."""
    scores = np.where(mask, scores, -1e9)
    w = np.exp(scores - scores.max(axis=-1, keepdims=True)) * mask
    w /= np.maximum(w.sum(axis=-1, keepdims=True), 1e-30)                   # at least 1, unless no place counts
    return w, w


def masked_softmax_backward(dout, cache):
    """dscores = w (dout - sum w dout): raising one score takes weight from all the others."""
    w = cache
    return w * (dout - (w * dout).sum(axis=-1, keepdims=True))


def dot_attention_forward(q, keys, values, mask):
    """w = softmax over the places s of q_t . keys_s, context_t = sum_s w_ts values_s: all steps at once.
    q (T, N, A), keys (N, S, A), values (N, S, C), mask (N, S) -> context (T, N, C); first in the cache: w (N, T, S)."""
    q = q.swapaxes(0, 1)
    w, _ = masked_softmax_forward(q @ keys.swapaxes(1, 2), mask[:, None])
    return (w @ values).swapaxes(0, 1), (w, q, keys, values)


def dot_attention_backward(dout, cache):
    """dvalues = w^T dcontext, dw = dcontext values^T; through the softmax; dq = dscores keys, dkeys = dscores^T q."""
    w, q, keys, values = cache
    dout = dout.swapaxes(0, 1)
    dscores = masked_softmax_backward(dout @ values.swapaxes(1, 2), w)
    return (dscores @ keys).swapaxes(0, 1), dscores.swapaxes(1, 2) @ q, w.swapaxes(1, 2) @ dout


def additive_attention_forward(q, keys, u, values, mask):
    """The same with scores u . tanh(q_t + keys_s): T S comparisons, each of them a small neural net.
    q (T, N, A), keys (N, S, A), u (A,), values (N, S, C), mask (N, S) -> context (T, N, C); first in the cache: w."""
    match = np.tanh(q.swapaxes(0, 1)[:, :, None] + keys[:, None])           # (N, T, S, A)
    w, _ = masked_softmax_forward(match @ u, mask[:, None])
    return (w @ values).swapaxes(0, 1), (w, match, u, values)


def additive_attention_backward(dout, cache):
    """du = sum dscores match; through tanh; q_t was compared with all s, keys_s with all t: sums over the others."""
    w, match, u, values = cache
    dout = dout.swapaxes(0, 1)
    dscores = masked_softmax_backward(dout @ values.swapaxes(1, 2), w)
    dmatch = (1 - match * match) * dscores[:, :, :, None]
    du = dscores.reshape(-1) @ match.reshape(-1, len(u))
    return dmatch.sum(axis=2).swapaxes(0, 1) * u, dmatch.sum(axis=1) * u, du, w.swapaxes(1, 2) @ dout


def bahdanau_forward(z, h0, c0, Wh, Wc, Wq, u, keys, values, mask):
    """An LSTM that looks before every step, with its state as the question, and reads what it saw with its input:
        w = softmax over the places s of u . tanh(keys_s + h Wq)    context = sum_s w_s values_s
        h, c = LSTM step with z_t + context Wc
    z = y E Wx + b (T, N, 4 H), h0, c0 (N, H), Wh (H, 4 H), Wc (C, 4 H), Wq (H, A), u (A,), keys (N, S, A),
    values (N, S, C), mask (N, S) -> h (T, N, H), context (T, N, C), last c (N, H); first in the cache: w (T, N, S)."""
    T, N, H = len(z), *h0.shape
    scale = np.repeat(np.array([0.5, 0.5, 1, 0.5], z.dtype), H)             # one tanh for all gates, as in lstm_forward
    shift, Wc_scaled, y = 1 - scale, Wc * scale, z * scale
    Wh_Wq = np.concatenate([Wh * scale, Wq], axis=1)                        # gates and question: one product
    i, f, g, o = y.reshape(T, N, 4, H).transpose(2, 0, 1, 3)
    h, c, tanh_c = (np.empty((T + 1, N, H), z.dtype) for _ in range(3))
    match, w = np.empty((T, *keys.shape), z.dtype), np.empty((T, *mask.shape), z.dtype)
    context = np.empty((T, N, values.shape[2]), z.dtype)
    h[0], c[0] = h0, c0
    for t in range(T):
        from_h = h[t] @ Wh_Wq
        np.add(keys, from_h[:, None, 4 * H:], out=match[t])
        np.tanh(match[t], out=match[t])
        w[t], _ = masked_softmax_forward(match[t] @ u, mask)
        context[t] = (w[t][:, None] @ values)[:, 0]
        a = y[t]
        a += from_h[:, :4 * H]
        a += context[t] @ Wc_scaled
        np.tanh(a, out=a)
        a *= scale
        a += shift
        np.multiply(f[t], c[t], out=c[t + 1])
        c[t + 1] += i[t] * g[t]
        np.tanh(c[t + 1], out=tanh_c[t])
        np.multiply(o[t], tanh_c[t], out=h[t + 1])
    return (h[1:], context, c[T]), (w, match, context, h, c, y, tanh_c[:T], Wh, Wc, Wq, u, values)


def bahdanau_backward(dh_out, dcontext_out, dc, cache):
    """The LSTM's backward, and at every step its dz goes on into the context, the weights, the scores and the question,
    which is the state before.   -> dz, dh0, dc0, dWh, dWc, dWq, du, dkeys, dvalues."""
    w, match, context, h, c, y, tanh_c, Wh, Wc, Wq, u, values = cache
    T, N, H = tanh_c.shape
    i, f, g, o = y.reshape(T, N, 4, H).transpose(2, 0, 1, 3)
    dz = y - y * y
    by_gate = dz.reshape(T, N, 4, H)
    dz_i, dz_f, dz_g, dz_o = by_gate.transpose(2, 0, 1, 3)
    dz_i *= g
    dz_f *= c[:-1]
    np.multiply(1 - g * g, i, out=dz_g)
    dz_o *= tanh_c
    to_c = o * (1 - tanh_c * tanh_c)
    dq, dscores, dcontext = np.zeros((T, N, len(u)), dz.dtype), np.zeros_like(w), dcontext_out.copy()
    dkeys, dh, back = np.zeros_like(match[0]), 0, np.concatenate([Wh.T, Wc.T], axis=1)
    times = np.empty((N, 4, H), dz.dtype)
    for t in reversed(range(T)):
        dh = dh_out[t] + dh
        dc_here = dc + dh * to_c[t]
        times[:, :3], times[:, 3] = dc_here[:, None], dh
        by_gate[t] *= times
        dc = dc_here * f[t]
        into = dz[t] @ back                             # into the state before and into the context: one product
        dcontext[t] += into[:, H:]
        dscores[t] = masked_softmax_backward((values @ dcontext[t][:, :, None])[:, :, 0], w[t])
        slope = match[t] * match[t]
        np.subtract(1, slope, out=slope)
        slope *= dscores[t][:, :, None]
        dkeys += slope                                  # but for u, which comes after the loop
        dq[t] = slope.sum(axis=1) * u
        dh = into[:, :H] + dq[t] @ Wq.T
    before, flat = h[:-1].reshape(-1, H).T, dz.reshape(-1, 4 * H)
    dWc, dWq = context.reshape(T * N, -1).T @ flat, before @ dq.reshape(T * N, -1)
    du = dscores.reshape(-1) @ match.reshape(-1, len(u))
    dvalues = w.transpose(1, 2, 0) @ dcontext.swapaxes(0, 1)
    return dz, dh, dc, before @ flat, dWc, dWq, du, dkeys * u, dvalues


def tanh_forward(x):
    """y = tanh x."""
    y = np.tanh(x)
    return y, y


def tanh_backward(dout, cache):
    """dx = dout (1 - y^2)."""
    y = cache
    return dout * (1 - y * y)


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


# ---- model: encoder in both directions, memory, decoder that looks into it -------------------------------------------

STOP = 0                                                # the symbol after the last one; it also starts the decoder


def init_params(cfg, rng, dtype=np.float32):
    """Encoder: E_enc, and Wx, Wh, b of its directions (_fore, _back); decoder: E, Wx, Wh, b (_dec), Wo, bo; attention:
    Wk to keys (not for dot), Wq to questions and u (additive), Wc into the decoder (--feed), Wa, ba to join."""
    H, D, (V_source, V), params = cfg.hidden, cfg.embed, map(len, symbols_of(cfg)[:2]), {}
    shapes = {"E_enc": (V_source, D), "E_dec": (V, D)}
    for part, h in (("fore", H // 2), ("back", H // 2), ("dec", H)):
        shapes.update({"Wx_" + part: (D, 4 * h), "Wh_" + part: (h, 4 * h)})
        params["b_" + part] = np.repeat([0.0, 1, 0, 0], h)                  # the forget gate begins open
    if cfg.attention in ("additive", "general"):
        shapes["Wk"] = H, H
    if cfg.attention == "additive":
        shapes.update(Wq=(H, H), u=(H,))
    if cfg.feed:
        shapes["Wc"] = H, 4 * H
    if cfg.attention != "none":
        shapes["Wa"], params["ba"] = (2 * H, H), np.zeros(H)
    shapes["Wo"], params["bo"] = (H, V), np.zeros(V)
    scale = {"E_enc": 0.5, "E_dec": 0.5}
    if cfg.sharp:
        scale.update(u=1.0, Wk=3 * H ** -0.5, Wq=3 * H ** -0.5)
    for name, shape in shapes.items():
        params[name] = rng.standard_normal(shape) * scale.get(name, shape[0] ** -0.5)
    return {name: value.astype(dtype) for name, value in params.items()}


def encoder_forward(params, source, mask, cfg):
    """Read the source from both ends -> (state (h, c) the decoder starts in, keys (N, S, A), values (N, S, H)), cache.
    values: at every place what the two directions know there; keys: the same, made comparable with a question."""
    S, N = source.shape
    n, s = mask.sum(axis=(0, 2)), np.arange(S)[:, None]
    turn = np.where(s < n, n - 1 - s, s)                # turns every source round, in place, and back again
    zero, states, caches = np.zeros((N, cfg.hidden // 2), params["bo"].dtype), [], []
    for part, ids in (("fore", source), ("back", np.take_along_axis(source, turn, axis=0))):
        (h, c), cache = symbol_lstm_forward(ids, params["E_enc"], params["Wx_" + part], params["b_" + part], zero, zero,
                                            params["Wh_" + part], mask)
        states.append((h, c))
        caches.append(cache)
    (h, c), (h_back, c_back) = states
    there = np.take_along_axis(h_back, turn[:, :, None], axis=0)
    values = np.ascontiguousarray(np.concatenate([h, there], axis=2).swapaxes(0, 1))
    if cfg.attention == "none":                         # all that the decoder gets: the two last states
        start = np.concatenate([h[-1], h_back[-1]], axis=1), np.concatenate([c, c_back], axis=1)
    else:                                               # it gets nothing: whatever it wants to know, it must look up
        start = np.zeros((N, cfg.hidden), h.dtype), np.zeros((N, cfg.hidden), h.dtype)
    keys = values @ params["Wk"] if "Wk" in params else values
    return (*start, keys, values), (caches, turn, values, params.get("Wk"), cfg)


def encoder_backward(dh0, dc0, dkeys, dvalues, cache):
    """encoder_forward from bottom to top -> gradients under the keys of params."""
    (caches, turn, values, Wk, cfg), grads = cache, {}
    N, S, H = values.shape
    if Wk is not None:
        grads["Wk"] = values.reshape(-1, H).T @ dkeys.reshape(-1, H)
        dkeys = dkeys @ Wk.T
    dvalues = (dvalues + dkeys).swapaxes(0, 1)          # the keys are made of the values
    dh = [dvalues[:, :, :H // 2].copy(), np.take_along_axis(dvalues[:, :, H // 2:], turn[:, :, None], axis=0)]
    dc = [np.zeros((N, H // 2), dvalues.dtype)] * 2
    if cfg.attention == "none":
        dc = np.split(dc0, 2, axis=1)
        for d, last in zip(dh, np.split(dh0, 2, axis=1)):
            d[-1] = last                                # of all states only the last ones were of use
    for k, part in enumerate(("fore", "back")):
        dE, dWx, db, _, _, dWh = symbol_lstm_backward(dh[k], dc[k], caches[k])
        grads.update({"Wx_" + part: dWx, "b_" + part: db, "Wh_" + part: dWh})
        grads["E_enc"] = grads.get("E_enc", 0) + dE     # used by both directions, so its gradients add
    return grads


def decoder_forward(params, inputs, h0, c0, keys, values, mask, cfg):
    """From a state on, fed with inputs (T, N) -> (T, N, H) to say the next symbols from, last h, last c. First in the
    cache: the weights of the attention (T, N, S)."""
    E, Wx, b, Wh = (params[name + "_dec"] for name in ("E", "Wx", "b", "Wh"))
    if cfg.feed:                                        # look, then take the step, step by step
        z, symbol_cache = project_symbols_forward(inputs, E, Wx, b)
        (h, context, c), look_cache = bahdanau_forward(z, h0, c0, Wh, *(params[k] for k in ("Wc", "Wq", "u")), keys,
                                                       values, mask)
    else:                                               # take all steps, then look: no step depends on what was seen
        (h, c), symbol_cache = symbol_lstm_forward(inputs, E, Wx, b, h0, c0, Wh)
    if cfg.attention == "none":
        return (h, h[-1], c), (None, None, symbol_cache, None, None, (values,), cfg)
    if cfg.attention == "additive" and not cfg.feed:
        context, look_cache = additive_attention_forward(h @ params["Wq"], keys, params["u"], values, mask)
    elif not cfg.feed:
        context, look_cache = dot_attention_forward(h, keys, values, mask)
    w, used = look_cache[0] if cfg.feed else look_cache[0].swapaxes(0, 1), (h, params.get("Wq"))
    joined = np.concatenate([h, context], axis=2)
    a, join_cache = linear_forward(joined.reshape(-1, joined.shape[2]), params["Wa"], params["ba"])
    out, tanh_cache = tanh_forward(a)
    return (out.reshape(h.shape), h[-1], c), (w, look_cache, symbol_cache, join_cache, tanh_cache, used, cfg)


def decoder_backward(dout, cache):
    """decoder_forward from bottom to top; the last state leads nowhere.   -> dh0, dc0, dkeys, dvalues, grads."""
    (_, look_cache, symbol_cache, join_cache, tanh_cache, used, cfg), grads = cache, {}
    T, N, H = dout.shape
    dc, dkeys = np.zeros((N, H), dout.dtype), np.zeros_like(used[0])
    dvalues = dkeys                                     # none: the values are not looked at
    if cfg.attention != "none":
        da = tanh_backward(dout.reshape(-1, H), tanh_cache)
        djoined, grads["Wa"], grads["ba"] = linear_backward(da, join_cache)
        dh, dcontext = np.split(djoined.reshape(T, N, 2 * H), 2, axis=2)
    if cfg.attention == "additive" and not cfg.feed:
        h, Wq = used
        dq, dkeys, grads["u"], dvalues = additive_attention_backward(dcontext, look_cache)
        grads["Wq"] = h.reshape(-1, H).T @ dq.reshape(-1, H)
        dout = dh + dq @ Wq.T                           # h was joined to the context, and it was the question
    elif cfg.attention in ("dot", "general"):
        dq, dkeys, dvalues = dot_attention_backward(dcontext, look_cache)
        dout = dh + dq
    if cfg.feed:
        dz, dh0, dc0, dWh, grads["Wc"], grads["Wq"], grads["u"], dkeys, dvalues = bahdanau_backward(
            dh, dcontext, dc, look_cache)
        dE, dWx, db = project_symbols_backward(dz, symbol_cache)
    else:
        dE, dWx, db, dh0, dc0, dWh = symbol_lstm_backward(dout, dc, symbol_cache)
    return dh0, dc0, dkeys, dvalues, {**grads, "E_dec": dE, "Wx_dec": dWx, "b_dec": db, "Wh_dec": dWh}


def translator_forward(params, batch, cfg):
    """A batch -> z (places that count, V); the cache begins with the weights of the attention, (T, N, S)."""
    source, mask, inputs, places, _ = batch
    memory, enc_cache = encoder_forward(params, source, mask, cfg)
    (out, _, _), dec_cache = decoder_forward(params, inputs, *memory, mask[:, :, 0].T, cfg)
    z, out_cache = linear_forward(out.reshape(-1, out.shape[2])[places], params["Wo"], params["bo"])
    return z, (dec_cache[0], dec_cache, enc_cache, out_cache, out.shape, places)


def translator_backward(dout, cache):
    """translator_forward from bottom to top -> gradients under the keys of params."""
    _, dec_cache, enc_cache, out_cache, shape, places = cache
    drows, dWo, dbo = linear_backward(dout, out_cache)
    dh = np.zeros(shape, dout.dtype)
    dh.reshape(-1, shape[2])[places] = drows            # elsewhere the output does not matter
    *dmemory, grads = decoder_backward(dh, dec_cache)
    return {**grads, **encoder_backward(*dmemory, enc_cache), "Wo": dWo, "bo": dbo}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> cross-entropy a symbol that counts, gradients under the keys of params."""
    z, cache = translator_forward(params, batch, cfg)
    loss, loss_cache = softmax_cross_entropy_forward(z, batch[-1])
    return loss, translator_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


def log_softmax(z):
    """log of the softmax of every row.   z (N, V) -> (N, V)."""
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def beam_search(step, state, limit, beam, penalty):
    """The likeliest answers, nearly: of all beginnings keep the best few, at every step; a beam of 1 is greedy search.
    A longer answer is less likely by its length alone, so they compete by log-probability / length ** penalty.
    step(symbols (R,), state) -> log_p (R, V), state;  state: arrays with a row a sequence, N in all
    -> symbols (N, up to limit), STOP to the right of the end; their log-probability (N,)."""
    N = len(state[0])
    state = tuple(np.repeat(s, beam, axis=0) for s in state)
    said, length, ended = np.full((N, beam, 1), STOP), np.zeros((N, beam), int), np.zeros((N, beam), bool)
    score = np.where(np.arange(beam) == 0, 0.0, -np.inf) * np.ones((N, 1))     # at first there is one beginning
    row = np.arange(N)[:, None]
    for _ in range(limit):
        log_p, state = step(said[:, :, -1].ravel(), state)
        V = log_p.shape[1]
        log_p = np.where(ended[:, :, None], np.where(np.arange(V) == STOP, 0, -np.inf), log_p.reshape(N, beam, V))
        length = length + ~ended
        total = score[:, :, None] + log_p
        best = np.argsort(-(total / length[:, :, None] ** penalty).reshape(N, -1), axis=1, kind="stable")[:, :beam]
        origin, symbol, score = best // V, best % V, total.reshape(N, -1)[row, best]
        state = tuple(s[(row * beam + origin).ravel()] for s in state)
        said = np.concatenate([said[row, origin], symbol[:, :, None]], axis=2)
        length, ended = length[row, origin], ended[row, origin] | (symbol == STOP)
        if ended.all():
            break
    return said[:, 0, 1:], score[:, 0]


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

EDGE = "|"                                              # before and after every source
UNKNOWN = "?"                                           # a word that is not among the known ones
STOP_SIGN = "."                                         # what STOP looks like in a picture
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
SPELLINGS = (                                           # a slash is American, month first; a dot is not
    "{d} {month} {year}", "{month} {d}, {year}", "{dd} {mon} {year}", "{nth} of {month} {year}", "{mon} {nth}, {year}",
    "{day}, {d} {month} {year}", "{day} {mon} {d} {year}", "{year}, {month} {d}", "{dd}{MON}{year}", "{MON} {dd} '{yy}",
    "{d}-{mon}-{yy}", "{year}/{mm}/{dd}", "{mm}/{dd}/{year}", "{m}/{d}/{yy}", "{dd}.{mm}.{year}", "{d}.{m}.{yy}",
    "{year}{mm}{dd}")


def spell_date(day, spelling):
    """A date in one of the SPELLINGS -> text, {"year": (from, to), "month": ..., "day": ...}: where these stand."""
    y, m, d = day.year, day.month, day.day
    nth = "th" if 10 < d < 14 else {1: "st", 2: "nd", 3: "rd"}.get(d % 10, "th")
    words = {"year": {"year": f"{y}", "yy": f"{y % 100:02d}"},
             "month": {"month": MONTHS[m - 1], "mon": MONTHS[m - 1][:3], "MON": MONTHS[m - 1][:3].upper(), "m": f"{m}",
                       "mm": f"{m:02d}"},
             "day": {"d": f"{d}", "dd": f"{d:02d}", "nth": f"{d}{nth}"}, "weekday": {"day": DAYS[day.weekday()]}}
    text, where = "", {}
    for piece in re.findall(r"{(\w+)}|([^{]+)", spelling):
        for part, forms in words.items():
            if piece[0] in forms:
                where[part] = len(text), len(text) + len(forms[piece[0]])
                text += forms[piece[0]]
        text += piece[1]
    return text, where


FIRST_DAY = datetime.date(1950, 1, 1).toordinal()
DAY_COUNT = 36525                                       # to the end of 2049: '49 is 2049, '50 is 1950


def draw_date(rng, test, spelling=None):
    """A date, spelled at random or as said -> text, as 2004-02-29, where each letter of that stands in the text: (part,
    from, to) or None. Every eleventh day is kept for the test, in all its spellings."""
    k = int(rng.integers(0, DAY_COUNT // 11)) * 11 + (0 if test else int(rng.integers(1, 11)))
    day = datetime.date.fromordinal(FIRST_DAY + k)
    text, where = spell_date(day, spelling or SPELLINGS[int(rng.integers(len(SPELLINGS)))])
    parts = ["year"] * 4 + [None] + ["month"] * 2 + [None] + ["day"] * 2
    return text, day.isoformat(), [part and (part, *where[part]) for part in parts]


def draw_letters(task, n, rng, test):
    """n random letters -> source, target, where each letter of the target stands. Of three letters and more, those
    whose checksum is 0, one in eleven, are kept for the test."""
    while True:
        ids = rng.integers(0, 26, n)
        if n < 3 or (ids @ np.arange(1, n + 1) % 11 == 0) == test:
            break
    text, at = "".join(LETTERS[k] for k in ids), range(n) if task == "copy" else range(n - 1, -1, -1)
    return text, "".join(text[k] for k in at), [("symbol", k, k + 1) for k in at]


def draw_pairs(cfg, rng, N, test=False, length=None, spelling=None):
    """N examples -> list of (source, target, where); the first two are strings, or lists of words."""
    if cfg.task == "dates":
        return [draw_date(rng, test, spelling) for _ in range(N)]
    if cfg.task == "pairs":
        pairs = load_token_pairs(cfg.data, cfg.unit, cfg.words, cfg.length, cfg.load)["test" if test else "train"]
        return [(*pairs[k], None) for k in rng.integers(0, len(pairs), N)]
    lengths = [length] * N if length else rng.integers(1, cfg.length + 1, (2, N)).max(axis=0)     # more long ones
    return [draw_letters("reverse" if cfg.task == "demo" else cfg.task, int(n), rng, test) for n in lengths]


@functools.lru_cache
def load_token_pairs(path, unit, words, length, checkpoint):
    """Pairs of a file -> {"symbols": those of sources, of targets; "train": [(source, target), ...], lists of symbols;
    "test": from the last tenth; "long": how many were too long}. With no file, numbers and the same in octal. Symbols
    are letters, or the most frequent words of the training pairs; with a checkpoint, those that it was trained on."""
    pairs = read_pairs(path) if path else [(" ".join(str(n)), " ".join(f"{n:o}")) for n in range(100, 500)]
    split = re.compile(r"\w+|[^\w\s]" if unit == "words" else ".").findall
    pairs = [(split(a), split(b)) for a, b in pairs]
    cut, symbols = len(pairs) - max(1, len(pairs) // 10), []
    for k, first in enumerate((EDGE, STOP_SIGN)):
        counts = Counter(s for pair in (pairs[:cut] if unit == "words" else pairs) for s in pair[k])
        symbols.append([first, UNKNOWN, *sorted(s for s, _ in counts.most_common(words if unit == "words" else None))])
    if checkpoint:
        known = read_checkpoint(checkpoint)[0].get("symbols", [[], []])
        strange = "".join(sorted({s for k in (0, 1) for s in symbols[k] if s not in known[k]}))
        require(unit == "words" or not strange, f"--load {checkpoint}", "pairs of the letters it was trained on",
                strange[:10])
        symbols = known
    short = [(a, b) for a, b in pairs if max(len(a), len(b)) <= length]
    tests = [(a, b) for a, b in pairs[cut:] if max(len(a), len(b)) <= length]
    train = short[:len(short) - len(tests)]
    require(train and tests, "--length", f"one that a tenth of the pairs of {path} do not exceed", length)
    return {"symbols": symbols, "train": train, "test": tests, "long": len(pairs) - len(short)}


def read_pairs(path):
    """A UTF-8 file of lines source TAB target -> list of (source, target)."""
    lines = read_text(path).rstrip("\n").split("\n")
    for n, line in enumerate(lines, 1):
        require(line.count("\t") == 1 and all(map(str.strip, line.split("\t"))), path,
                f"source TAB target in line {n}", line[:60])
    require(len(lines) >= 20, path, "20 lines or more", len(lines))
    return [tuple(map(str.strip, line.split("\t"))) for line in lines]


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


@functools.lru_cache
def symbol_tables(task, *source):
    """The symbols of sources and of targets, by number -> two lists, two dicts back to the number."""
    if task == "pairs":
        lists = load_token_pairs(*source)["symbols"]
    elif task == "dates":
        written = {*"".join([*MONTHS, *DAYS, *map(str.upper, MONTHS)]), *"stndrdthof0123456789 ,./-'"}
        lists = [[EDGE, *sorted(written)], [STOP_SIGN, *"-0123456789"]]
    else:
        lists = [[EDGE, *LETTERS], [STOP_SIGN, *LETTERS]]
    return *lists, *({s: k for k, s in enumerate(symbols)} for symbols in lists)


def symbols_of(cfg):
    """symbol_tables of a Config."""
    return symbol_tables(cfg.task, *[cfg.data, cfg.unit, cfg.words, cfg.length, cfg.load][:5 * (cfg.task == "pairs")])


def pad_pairs(pairs, cfg):
    """Examples (source, target, ...) -> a batch: sources (S, N), their mask (S, N, 1), inputs of the decoder (T, N),
    places that count (numbers t N + n), their targets."""
    _, _, source_ids, target_ids = symbols_of(cfg)
    N, n, m = len(pairs), [len(a) + 2 for a, *_ in pairs], np.array([len(b) for _, b, *_ in pairs])
    source, target = np.zeros((max(n), N), int), np.full((max(m) + 1, N), STOP)
    for k, (a, b, *_) in enumerate(pairs):
        source[1:n[k] - 1, k] = [source_ids.get(w, 1) for w in a]
        target[:m[k], k] = [target_ids.get(w, 1) for w in b]
    inputs = np.concatenate([np.full((1, N), STOP), target[:-1]])
    says = np.arange(len(target))[:, None] <= m
    return source, (np.arange(max(n))[:, None] < n)[:, :, None], inputs, np.flatnonzero(says), target[says]


def make_batch(cfg, rng, dtype=np.float32):
    """Examples of the training -> a batch, as from pad_pairs. reverse: letters, backwards.   copy: as they are.
    dates: in one of many spellings, to 2004-02-29.   pairs: of a file."""
    return pad_pairs(draw_pairs(cfg, rng, cfg.batch), cfg)


# ---- pictures in text ------------------------------------------------------------------------------------------------

SHADES = np.array(list(" .:-=+*#%@"))


def shade(values):
    """Numbers from 0 to 1 -> characters from blank to dark, in an array of the same shape."""
    return SHADES[(np.clip(values, 0, 1) * 9.99).astype(int)]


def loss_curve(losses, width=60):
    """The losses from first to last in one line of text, dark where high (the scale is logarithmic)."""
    means = np.log([np.mean(part) + 1e-12 for part in np.array_split(losses, min(width, len(losses)))])
    return "".join(shade((means - means.min()) / (np.ptp(means) + 1e-12)))


def show_map(w, source, said):
    """Where it looked: weights (T, S), across what was read between two edges, down what was said; dark is 1."""
    print(f"Across what it read, from edge {EDGE} to edge {EDGE}; down what it says, {STOP_SIGN} is the end:")
    columns, height = [EDGE, *source, EDGE], max(map(len, source))
    for line in range(height):                          # the columns' names, from top to bottom
        print(" " * 14 + " ".join(name.rjust(height)[line] for name in columns).rstrip())
    for name, row in zip([*said, STOP_SIGN], w):
        print(f"{name[:12]:>12s} |{' '.join(shade(row[:len(columns)]))}|")


# ---- training and demo -----------------------------------------------------------------------------------------------

def train_translator(cfg, rng, quiet=False):
    """Train new parameters, or go on with those of --load -> params, progress."""
    params, state, first, about = init_params(cfg, rng), {}, 0, dict(task=cfg.task, attention=cfg.attention)
    if cfg.task == "pairs":
        about.update(unit=cfg.unit, symbols=list(symbols_of(cfg)[:2]))
    parts = {"params": params, "adam": state}
    if cfg.load:
        first = load_checkpoint(cfg.load, rng, about, parts)
    if cfg.save:
        save_checkpoint(cfg.save, first, rng, about, parts, trial=True)    # before the work, not after it
    progress, clipped = Progress(cfg.steps, first + 1, quiet), 0
    for step in progress:
        loss, grads = loss_and_grads(params, make_batch(cfg, rng), cfg)
        clipped += clip_norm(grads, cfg.clip) > cfg.clip > 0
        adamw_update(params, grads, state, learning_rate(step, cfg), cfg.decay)
        progress.report(loss)
        if cfg.save and (step % 1000 == 0 or step == cfg.steps or progress.stopped):
            save_checkpoint(cfg.save, step, rng, about, parts)
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


def solve(params, pairs, cfg, beam=1):
    """Search answers to the sources of examples -> answers (lists of symbols), log-probabilities."""
    source, mask, inputs, *_ = pad_pairs(pairs, cfg)
    memory, _ = encoder_forward(params, source, mask, cfg)

    def step(symbols, state):
        (out, h, c), _ = decoder_forward(params, symbols[None], *state, cfg)
        return log_softmax(linear_forward(out[0], params["Wo"], params["bo"])[0]), (h, c, *state[2:])
    said, log_p = beam_search(step, (*memory, mask[:, :, 0].T), len(inputs) + 2, beam, cfg.penalty)
    names = symbols_of(cfg)[1]
    return [[names[k] for k in row[:np.argmax(np.append(row, STOP) == STOP)]] for row in said], log_p


def exact(params, pairs, cfg, beam=1):
    """Which of the examples are answered without a mistake -> array of bool."""
    return np.array([ours == list(right) for ours, (_, right, *_) in zip(solve(params, pairs, cfg, beam)[0], pairs)])


def weights_of(params, pairs, cfg):
    """Where the decoder looks while it says the right answers -> (T, N, S)."""
    return translator_forward(params, pad_pairs(pairs, cfg), cfg)[1][0]


def alignment(params, pairs, cfg):
    """The share of the attention that lies where what is said stands in the source -> {part: share}."""
    w, shares = weights_of(params, pairs, cfg), {}
    for n, (_, _, where) in enumerate(pairs):
        for t, place in enumerate(where):
            if place:                                   # one further on: an edge stands before the source
                shares.setdefault(place[0], []).append(w[t, n, 1 + place[1]:1 + place[2]].sum())
    return {part: float(np.mean(values)) for part, values in shares.items()}


def announce_translator(cfg, text):
    """What is being learned, and by what."""
    size = sum(p.size for p in init_params(cfg, np.random.default_rng(0)).values())
    print(f"\n{text}: attention {cfg.attention}{', fed' * cfg.feed}, hidden {cfg.hidden}, lr {cfg.lr}, "
          f"batch {cfg.batch}, {size} parameters")
    print(f"chance level: loss {math.log(len(symbols_of(cfg)[1])):.3f}")


def show_answers(params, pairs, cfg):
    """Some answers and their log-probabilities, by greedy search and with a beam."""
    gap = " " * (cfg.task == "pairs" and cfg.unit == "words")
    for pair, *found in zip(pairs, *(zip(*solve(params, pairs, cfg, beam)) for beam in (1, cfg.beam))):
        print(f"  {gap.join(pair[0])}")
        for name, (said, log_p) in zip(("greedy", f"beam {cfg.beam}"), found):
            wrong = "" if said == list(pair[1]) else f"   (expected {gap.join(pair[1])})"
            print(f"      {name:8s}{log_p:9.4f}  {gap.join(said)}{wrong}")


def show_padding_weight(params, cfg, rng):
    """Other symbols in the padding, and a source that is padding altogether: what changes?"""
    source, mask, inputs, places, targets = make_batch(cfg, rng)
    mask[:, 0] = False
    batch, other = ((np.where(mask[:, :, 0], source, k), mask, inputs, places, targets) for k in (1, 2))
    (loss, grads), (loss2, grads2) = loss_and_grads(params, batch, cfg), loss_and_grads(params, other, cfg)
    w = translator_forward(params, batch, cfg)[1][0]
    worst = max(float(np.abs(grads[k] - grads2[k]).max()) for k in grads)
    largest = 0.0 if w is None else float(np.where(mask[:, :, 0].T, 0, w).max())
    print(f"\nA batch in which one source is padding altogether: largest weight on padding {largest}; with other\n"
          f"symbols there the loss ({loss:.3f}) changes by {abs(loss - loss2):.0e}, gradients by {worst:.0e} at most")


def learn_order_of(cfg, rng):
    """reverse or copy, by the chosen attention and, beside it, by none."""
    rows, kept, figures = [], None, {}
    lengths = sorted({-(-cfg.length * k // 5) for k in range(1, 6)}) + [cfg.length + k for k in (1, 2, 4, 8)]
    for attention in dict.fromkeys((cfg.attention, "none")):
        part = replace(cfg, attention=attention, feed=cfg.feed and attention == "additive",
                       **(dict(save="", load="", steps=kept[1].step) if kept else {}))
        announce_translator(part, f"{cfg.task}, up to {cfg.length} letters")
        params, progress = train_translator(part, rng, quiet=attention != cfg.attention)
        print("loss", loss_curve(progress.losses or [0]))
        fresh = draw_pairs(part, np.random.default_rng(1000), 1000, test=True)
        right = float(exact(params, fresh, part).mean())
        print(f"{right:.1%} of 1000 held-out sequences answered without a mistake")
        tests = (draw_pairs(part, np.random.default_rng(1000 + n), 300, True, n) for n in lengths)
        rows.append((attention, [exact(params, pairs, part).mean() for pairs in tests]))
        if attention == cfg.attention:
            kept, figures = (params, progress), {"exact": right}
            if attention != "none":
                figures["alignment"] = alignment(params, fresh, part)["symbol"]
                print(f"{figures['alignment']:.1%} of the attention lies on the letter that is said. For example:")
                example = draw_pairs(part, np.random.default_rng(1), 1, True, part.length)
                show_map(weights_of(params, example, part)[:, 0], *example[0][:2])
            show_answers(params, draw_pairs(part, np.random.default_rng(2), 2, True, part.length + 1), part)
        elif cfg.attention != "none":
            figures["none_exact"] = right
        if progress.stopped:
            break
    print(f"\nExact match (%) of {cfg.task} by length; right of the bar: longer than any in training")
    print(" " * 10 + "".join(f"{n:7d}" for n in lengths))
    for attention, shares in rows:
        print(f"{attention:10s}" + "".join(f"{'|' if n == cfg.length + 1 else '':1s}{100 * share:6.1f}"
                                           for n, share in zip(lengths, shares)))
    return figures, *kept


def learn_dates(cfg, rng):
    """Dates in many spellings to one."""
    announce_translator(cfg, f"Dates in {len(SPELLINGS)} spellings")
    params, progress = train_translator(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    print("\nOn days kept from training, 60 a spelling: how many are right (%), and how much of the attention lies on\n"
          "the year, the month and the day while these are said")
    fresh, wrong, shares = np.random.default_rng(1000), [], []
    for spelling in SPELLINGS:
        pairs = draw_pairs(cfg, fresh, 60, True, spelling=spelling)
        answers, _ = solve(params, pairs, cfg)
        missed = [(a, b, "".join(said)) for (a, b, _), said in zip(pairs, answers) if "".join(said) != b]
        wrong += missed
        parts = alignment(params, pairs, cfg) if cfg.attention != "none" else {}
        shares.append([parts[k] for k in ("year", "month", "day") if k in parts])
        print(f"  {pairs[0][0]:24s} {100 - 100 * len(missed) / len(pairs):6.1f}   "
              + "  ".join(f"{share:.3f}" for share in shares[-1]))
    for a, b, said in wrong[:10]:
        print(f"  wrong: {a} is {b}, it says {said}")
    right = 1 - len(wrong) / (60 * len(SPELLINGS))
    print(f"{right:.2%} right; wrong ones: {len(wrong)}")
    figures = dict(exact=right, **dict(zip(("year", "month", "day"), np.mean(shares, axis=0).tolist())))
    example = draw_pairs(cfg, np.random.default_rng(3), 2, True)
    if cfg.attention != "none":
        figures["alignment"] = float(np.average([figures[k] for k in ("year", "month", "day")], weights=[4, 2, 2]))
        for k, (source, target, _) in enumerate(example):
            show_map(weights_of(params, example, cfg)[:, k], source, target)
    show_answers(params, example, cfg)
    return figures, params, progress


def learn_file(cfg, rng):
    """The pairs of a file."""
    data = load_token_pairs(cfg.data, cfg.unit, cfg.words, cfg.length, cfg.load)
    require(len(data["train"]) >= cfg.batch, "--batch", f"at most {len(data['train'])} for this file", cfg.batch)
    sizes = " and ".join(str(len(symbols)) for symbols in data["symbols"])
    text = f"{len(data['train'])} pairs (longer than {cfg.length}, left out: {data['long']}), {sizes} {cfg.unit}"
    announce_translator(cfg, text)
    params, progress = train_translator(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    held_out = data["test"][:1000]
    total, count, right = 0.0, 0, 0
    for k in range(0, len(held_out), 50):
        batch = pad_pairs(held_out[k:k + 50], cfg)
        z, _ = translator_forward(params, batch, cfg)
        total += float(softmax_cross_entropy_forward(z, batch[-1])[0]) * len(z)
        count, right = count + len(z), right + int((z.argmax(axis=1) == batch[-1]).sum())
    answers = float(exact(params, held_out[:200], cfg).mean())
    figures = dict(validation=total / count, right=right / count, exact=answers)
    print(f"held out: loss {total / count:.3f} a symbol; right: {right / count:.1%} of the symbols, if those before "
          f"are given, {answers:.1%} of the answers" + "\n(expected on Multi30k: loss 3.1 or less; 3.4 without "
          "attention)" * bool(cfg.data))
    show_answers(params, held_out[:4], cfg)
    if cfg.attention != "none":
        for k in range(2):
            show_map(weights_of(params, held_out[:2], cfg)[:, k], *held_out[k])
    return figures, params, progress


def main(cfg):
    """Run one task, or the three of the demo."""
    start, rng, figures = time.perf_counter(), np.random.default_rng(cfg.seed), {}
    learn = {"reverse": learn_order_of, "copy": learn_order_of, "dates": learn_dates, "pairs": learn_file}
    examples, seconds, size, steps = 0, 0.0, 0, 0
    print("attention.py: look where you need to")
    for task in ("reverse", "copy", "dates") if cfg.task == "demo" else (cfg.task,):
        part = replace(cfg, task=task)
        if cfg.task == "demo":                          # its presets, but for flags
            own = {k: v for k, v in PRESETS.get(task, {}).items() if getattr(cfg, k) == getattr(Config(), k)}
            part = replace(part, **own)
        found, params, progress = learn[task](part, rng)
        figures.update({f"{task}_{name}" if cfg.task == "demo" else name: value for name, value in found.items()})
        examples, seconds = examples + len(progress.losses) * part.batch, seconds + progress.seconds
        steps, size = steps + progress.step, size + sum(p.size for p in params.values())
        if progress.stopped:
            break
    show_padding_weight(params, part, rng)
    print("\nNext: python attention.py --task reverse --attention general      python attention.py --task dates --feed")
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
