# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""seq2seq.py: one sequence in, another out, of another length.

A recurrent net that answers while it reads gives an answer as long as its input, each part before the rest was read.
Most questions are not like that: 407 is three digits and three words, 400 only two. Sutskever's way out: one LSTM, the
encoder, reads the source to its end and says nothing. A second, the decoder, starts from the state that the first one
ended in and says the target, symbol by symbol, fed with what was said last, until it says STOP.
So all of the source must fit through one state: the bottleneck. The table at the end of a run shows where it gives in,
and that its place depends on how far what is read stands from where it is said: turn the source round, and it moves.

Forward, for x_1 .. x_S and y_1 .. y_T with y_T = STOP (and STOP again as y_0):
    (h, c) = LSTM over x_1 .. x_S from zeros              where x is padding, h and c stay as they are
    s_t = LSTM(y_{t-1}) from s_{t-1},  s_0 = (h, c)       z_t = s_t Wo + bo    loss = mean of -log softmax(z_t)[y_t]
Backward: dz_t = (softmax(z_t) - onehot y_t) / count, 0 where y is padding; back through the decoder to ds_0, which is
    the gradient of the encoder's last state, the only one that leads on; back through the encoder.
Teacher forcing: the decoder is fed the right y_{t-1}, whatever it would have said. Quick to learn from; but then it has
    never seen its own mistakes. With --forcing 0.5 a coin says, symbol by symbol, which of the two it is fed. What it
    would have said is an argmax, a choice: it moves in jumps, so no gradient goes through it.
Search: the likeliest first symbol need not begin the likeliest answer. Greedy search never looks back; a beam keeps the
    best few beginnings at every step, compared by log-probability / length ** penalty.

Run
    python seq2seq.py                                  three tasks, each read forwards and backwards; the table
    python seq2seq.py --task words                     407 to four hundred seven
    python seq2seq.py --task words --forcing 0.5
    python seq2seq.py --task translate --beam 10       0 to a, ... 25 to z
    python seq2seq.py --task reverse --length 12 --steps 4000 --save reverse.npz

Break it
    zero, zero, Wh, mask) -> zero, zero, Wh) in read_source, --task reverse: the state runs on through the padding,
        where the symbols are random; 4 % of 6 symbols right, not 99.7 %
    return (h[-1], c), cache -> return (0 * h[-1], 0 * c), cache in read_source, --task reverse: the decoder never
        learns what it is asked, and says the same to everything
    dh[-1] = dh0 -> dh[-1] = 0 in seq2seq_backward, --task reverse: as good as ever, the way through c is enough; ask
        gradcheck.py all the same
    --task reverse --hidden 32: 88 % of 6 symbols; --hidden 16: 56 %; a narrower bottleneck
    --task reverse --length 12: 98 % of 7 symbols, 59 % of 12; what is asked for grows, the state does not
    --task reverse --forcing 0: 99 %, hardly worse; in answers this short a mistake cannot lead far astray

Papers: Sutskever, Vinyals, Le 2014 (two LSTMs; the source read backwards); Cho et al. 2014 (encoder and decoder);
Bengio et al. 2015 (coins instead of teacher forcing); Wu et al. 2016 (length normalisation in the search).
"""
import argparse
import contextlib
import ctypes
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
    task: Literal["demo", "reverse", "translate", "words"] = "demo"  # what to learn; demo is all three
    source: Literal["forwards", "backwards"] = "forwards"  # how the encoder reads
    hidden: int = 128       # size of the encoder's and of the decoder's state
    embed: int = 32         # numbers that stand for a symbol
    length: int = 6         # longest source in training
    forcing: float = 1.0    # share of the decoder's inputs that are the right symbol, not its own last one
    beam: int = 4           # beginnings of an answer that the search keeps
    penalty: float = 0.7    # the search divides a log-probability by (number of symbols) ** penalty
    clip: float = 1.0       # largest norm of the gradient; 0: any
    lr: float = 0.01        # learning rate at its height
    decay: float = 0.0      # share of every matrix that is taken off, times lr
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # course of the learning rate
    warmup: int = 50        # steps in which it rises from 0
    steps: int = 1200       # updates
    batch: int = 32         # pairs an update
    save: str = ""          # file (.npz) to keep parameters and state of the training in
    load: str = ""          # such a file to go on from
    seed: int = 0           # of every random draw

    def __post_init__(self):
        for name in ("steps", "batch", "hidden", "embed", "length", "beam"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("penalty", "clip", "decay", "warmup", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        require(0 < self.lr < math.inf, "--lr", "a number above 0", self.lr)
        require(0 <= self.forcing <= 1, "--forcing", "a number from 0 to 1", self.forcing)
        words = self.task in ("demo", "words")
        require(self.length <= 8 or not words, "--length", "at most 8 digits, to test on 12", self.length)
        require(self.beam <= 100, "--beam", "at most 100", self.beam)
        kept = self.save or self.load
        require(not kept or self.task != "demo", "--save, --load", "--task reverse, translate or words with it", "demo")


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "reverse": dict(steps=600),
    "translate": dict(source="backwards", steps=1300),
    "words": dict(source="backwards", steps=800),
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


# ---- model: encoder, its last state, decoder, a linear layer on top --------------------------------------------------

STOP = 0                                                # the symbol after the last one; it also starts the decoder


def init_params(cfg, rng, dtype=np.float32):
    """E, Wx, Wh, b of the encoder (_enc) and of the decoder (_dec); Wo, bo."""
    H, D, sizes, params = cfg.hidden, cfg.embed, vocabulary_sizes(cfg), {}
    for part, V in zip(("enc", "dec"), sizes):
        params["E_" + part] = 0.5 * rng.standard_normal((V, D))
        params["Wx_" + part] = rng.standard_normal((D, 4 * H)) * D ** -0.5
        params["Wh_" + part] = rng.standard_normal((H, 4 * H)) * H ** -0.5
        params["b_" + part] = np.repeat([0.0, 1, 0, 0], H)      # the forget gate begins open
    params["Wo"], params["bo"] = rng.standard_normal((H, sizes[1])) * H ** -0.5, np.zeros(sizes[1])
    return {name: value.astype(dtype) for name, value in params.items()}


def lstm_weights(params, part):
    """E, Wx, b and Wh of the encoder or the decoder."""
    return [params[f"{name}_{part}"] for name in ("E", "Wx", "b", "Wh")]


def read_source(params, source, mask):
    """Read the source -> the state after its last symbol, (h, c), and a cache."""
    E, Wx, b, Wh = lstm_weights(params, "enc")
    zero = np.zeros((source.shape[1], len(Wh)), Wh.dtype)
    (h, c), cache = symbol_lstm_forward(source, E, Wx, b, zero, zero, Wh, mask)
    return (h[-1], c), cache


def decoder_step(params, symbols, state):
    """One symbol a sequence, (N,) -> log-probabilities of the next one (N, V), the state after it."""
    E, Wx, b, Wh = lstm_weights(params, "dec")
    (h, c), _ = symbol_lstm_forward(symbols[None], E, Wx, b, *state, Wh)
    return log_softmax(linear_forward(h[0], params["Wo"], params["bo"])[0]), (h[0], c)


def log_softmax(z):
    """log of the softmax of every row.   z (N, V) -> (N, V)."""
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def own_inputs(params, state, inputs, forced):
    """The decoder's inputs where it is not always forced: what it would say itself. They are chosen one after the
    other, before the forward pass proper: a choice has no slope, so to forward and backward they are plain data."""
    inputs = inputs.copy()
    for t in range(len(inputs) - 1):
        log_p, state = decoder_step(params, inputs[t], state)
        inputs[t + 1] = np.where(forced[t + 1], inputs[t + 1], log_p.argmax(axis=1))
    return inputs


def seq2seq_forward(params, batch, cfg):
    """A batch -> z (places that count, V), cache. All that the decoder learns of the source is one state."""
    source, mask, inputs, forced, places, _ = batch
    state, enc_cache = read_source(params, source, mask)
    if not forced.all():
        inputs = own_inputs(params, state, inputs, forced)
    E, Wx, b, Wh = lstm_weights(params, "dec")
    (h, _), dec_cache = symbol_lstm_forward(inputs, E, Wx, b, *state, Wh)     # no mask: after the end nothing counts
    z, out_cache = linear_forward(h.reshape(-1, cfg.hidden)[places], params["Wo"], params["bo"])
    return z, (enc_cache, dec_cache, out_cache, len(source), h.shape, places)


def seq2seq_backward(dout, cache):
    """seq2seq_forward from bottom to top -> gradients under the keys of params."""
    (enc_cache, dec_cache, out_cache, S, shape, places), grads = cache, {}
    drows, grads["Wo"], grads["bo"] = linear_backward(dout, out_cache)
    dh = np.zeros(shape, dout.dtype)
    dh.reshape(-1, shape[2])[places] = drows
    dE, dWx, db, dh0, dc0, dWh = symbol_lstm_backward(dh, np.zeros_like(dh[0]), dec_cache)
    grads.update(E_dec=dE, Wx_dec=dWx, b_dec=db, Wh_dec=dWh)
    dh = np.zeros((S, *dh0.shape), dout.dtype)
    dh[-1] = dh0                                        # of the encoder's states only the last one leads on
    dE, dWx, db, _, _, dWh = symbol_lstm_backward(dh, dc0, enc_cache)
    grads.update(E_enc=dE, Wx_enc=dWx, b_enc=db, Wh_enc=dWh)
    return grads


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> cross-entropy a symbol that counts, gradients under the keys of params."""
    z, cache = seq2seq_forward(params, batch, cfg)
    loss, loss_cache = softmax_cross_entropy_forward(z, batch[-1])
    return loss, seq2seq_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


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

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPELLED = ("STOP zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million "
           "billion").split()


def vocabulary_sizes(cfg):
    """Number of symbols in a source and in a target, STOP among the latter."""
    return {"words": (10, len(SPELLED)), "translate": (26, 27)}.get(cfg.task, (10, 11))


def number_to_words(n):
    """407 -> the places of four, hundred, seven in SPELLED."""
    if n < 20:
        return [1 + n]
    for unit, word in ((10 ** 9, "billion"), (10 ** 6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= unit:
            return number_to_words(n // unit) + [SPELLED.index(word)] + (number_to_words(n % unit) if n % unit else [])
    return [19 + n // 10] + ([1 + n % 10] if n % 10 else [])


def draw_sources(cfg, n, rng, test):
    """Random symbols (longest n, number of them); sources of three or more whose checksum is 0, one in eleven, are
    kept for the test: in training their second symbol is changed, in the test all others are left out -> symbols, n."""
    V, t = vocabulary_sizes(cfg)[0], np.arange(max(n))[:, None]
    symbols = rng.integers(0, V, (len(t), len(n)))
    if cfg.task == "words":
        symbols[0] = np.where(n > 1, rng.integers(1, 10, len(n)), symbols[0])      # no number begins with 0
    kept = (((t + 1) * symbols * (t < n)).sum(axis=0) % 11 == 0) & (n >= 3)
    if test:
        chosen = np.flatnonzero(kept | (n < 3))
        return symbols[:, chosen], n[chosen]
    symbols[1:2] = np.where(kept, (symbols[1:2] + 1) % V, symbols[1:2])
    return symbols, n


def make_batch(cfg, rng, dtype=np.float32, lengths=None):
    """-> source (S, N), its mask (S, N, 1), inputs of the decoder (T, N) if it is forced, where it is (T, N), places
    that count (numbers t N + n), their targets. lengths: a test of sources of these lengths, not all of which are used.
    reverse: say it backwards.   translate: 0 is a, 25 is z.   words: a number's digits, then its English words."""
    n = rng.integers(1, cfg.length + 1, (2, cfg.batch)).max(axis=0) if lengths is None else lengths   # more long ones
    symbols, n = draw_sources(cfg, n, rng, lengths is not None)
    (S, N), t = symbols.shape, np.arange(len(symbols))[:, None]
    if cfg.task == "words":
        numbers = (np.where(t < n, symbols, 0) * 10 ** np.maximum(n - 1 - t, 0)).sum(axis=0)
        answers = [number_to_words(int(k)) for k in numbers]
        m = np.array([len(a) for a in answers])
        answer = np.zeros((max(m), N), int)
        answer.T[np.arange(max(m)) < m[:, None]] = np.concatenate(answers)
    else:
        m, answer = n, 1 + (symbols if cfg.task == "translate" else symbols[np.maximum(n - 1 - t, 0), np.arange(N)])
    t = np.arange(len(answer) + 1)[:, None]
    target = np.where(t < m, np.concatenate([answer, answer[:1]]), STOP)
    inputs = np.concatenate([np.full((1, N), STOP), target[:-1]])
    t = np.arange(S)[:, None]
    if cfg.source == "backwards":
        symbols = symbols[np.where(t < n, n - 1 - t, t), np.arange(N)]
    forced = rng.random(inputs.shape) < cfg.forcing
    says = np.arange(len(target))[:, None] <= m
    return symbols, (t < n)[:, :, None], inputs, forced, np.flatnonzero(says), target[says]


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

def train_seq2seq(cfg, rng, quiet=False):
    """Train new parameters, or go on with those of --load -> params, progress."""
    params, state, first, about = init_params(cfg, rng), {}, 0, dict(task=cfg.task, source=cfg.source)
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


def answer(params, batch, cfg, beam):
    """Search answers to the sources of a batch -> symbols (N, T'), log-probabilities (N,), which are right (N,)."""
    source, mask, inputs = batch[:3]
    limit = len(inputs) + 2
    said, log_p = beam_search(lambda symbols, state: decoder_step(params, symbols, state),
                              read_source(params, source, mask)[0], limit, beam, cfg.penalty)
    ours, right = np.full((2, len(said), limit), STOP)
    ours[:, :said.shape[1]], right[:, :limit - 3] = said, inputs[1:].T
    return said, log_p, (ours == right).all(axis=1)


def exact_by_length(params, cfg, beyond=4, tests=300):
    """Share of held-out sources answered without a mistake, greedily, a length: those trained on and some beyond."""
    return [float(answer(params, unseen(cfg, n, tests), cfg, 1)[2].mean()) for n in range(1, cfg.length + beyond + 1)]


def unseen(cfg, n, tests):
    """A batch of sources of length n that no training has seen (but for n = 1 and 2, of which there are too few)."""
    return make_batch(cfg, np.random.default_rng(1000 + n), lengths=np.full(tests * (11 if n > 2 else 1), n))


def spell(cfg, source, said):
    """Symbols as text: a source and an answer."""
    source = " ".join(map(str, source)) if cfg.task == "translate" else "".join(
        map(str, source) if cfg.task == "words" else (LETTERS[s] for s in source))
    said = list(said[:np.flatnonzero(said == STOP)[0] if STOP in said else None])
    return source, " ".join(SPELLED[s] for s in said) if cfg.task == "words" else "".join(LETTERS[s - 1] for s in said)


def show_search(params, cfg):
    """Answers and their log-probabilities, greedy and by beam search: of a trained length, then of a longer one."""
    print(f"Log-probabilities of the answers found by greedy search and with a beam of {cfg.beam}:")
    for n in (cfg.length, cfg.length + 1):
        batch = unseen(cfg, n, 300)
        greedy, beam = answer(params, batch, cfg, 1), answer(params, batch, cfg, cfg.beam)
        likelier = np.flatnonzero(beam[1] > greedy[1] + 1e-5)
        for k in [*likelier[:2], 0, 1][:2]:
            source = batch[0][:, k][::-1 if cfg.source == "backwards" else 1]
            for name, (said, log_p, right) in (("greedy", greedy), ("beam", beam)):
                text, words = spell(cfg, source, said[k])
                print(f"  {text if name == 'greedy' else '':{len(text)}s}  {name:6s} {log_p[k]:8.4f}  {words}"
                      f"{'' if right[k] else '   (wrong)'}")
        print(f"  length {n}: the beam finds a likelier answer in {len(likelier) / len(greedy[1]):.1%}; "
              f"right: greedy {greedy[2].mean():.1%}, beam {beam[2].mean():.1%}")


def other_padding(batch):
    """The same batch with other symbols where there is padding, in the source and in the decoder's inputs."""
    source, mask, inputs, forced, places, targets = batch
    says = np.zeros(inputs.size, bool)
    says[places] = True
    return np.where(mask[:, :, 0], source, 1), mask, np.where(says.reshape(inputs.shape), inputs, 2), *batch[3:]


def show_padding(params, cfg, rng):
    """Put other symbols where there is padding and measure what changes."""
    batch = make_batch(cfg, rng)
    (loss, grads), (loss2, grads2) = (loss_and_grads(params, b, cfg) for b in (batch, other_padding(batch)))
    worst = max(float(np.abs(grads[k] - grads2[k]).max()) for k in grads)
    print(f"\n{1 - batch[1].mean():.0%} of the source and {1 - len(batch[4]) / batch[2].size:.0%} of the target are "
          "padding. Other symbols there change\n"
          f"the loss by {abs(loss - loss2):.0e}, no gradient by more than {worst:.0e}")


def show_table(table):
    """Exact match by length of the source: rows (task, reading, longest trained length, shares by length)."""
    print("\nExact match (%) by length of the source; right of the bar: longer than any in training.\n"
          "Of 3 symbols and more, sources that no training has seen; of 1 and 2 there are too few for that")
    width = max(len(shares) for *_, shares in table)
    print(" " * 22 + "".join(f"{n:6d}" for n in range(1, width + 1)))
    for task, source, trained, shares in table:
        cells = "".join(f"{'|' if n == trained else '':1s}{100 * share:5.1f}" for n, share in enumerate(shares))
        print(f"{task:10s} {source:11s}{cells}")


def main(cfg):
    """Run one task; or all three, with every source read forwards and backwards."""
    start, rng, figures, table = time.perf_counter(), np.random.default_rng(cfg.seed), {}, []
    examples, seconds, size, steps, stopped = 0, 0.0, 0, 0, False
    print("seq2seq.py: one sequence in, another out, of another length")
    for task in ("reverse", "translate", "words") if cfg.task == "demo" else (cfg.task,):
        part = replace(cfg, task=task)
        if cfg.task == "demo":                          # its presets, but for flags
            own = {k: v for k, v in PRESETS.get(task, {}).items() if getattr(cfg, k) == getattr(Config(), k)}
            part = replace(part, **own)
        other = "forwards" if part.source == "backwards" else "backwards"
        for source in (part.source, other) if cfg.task == "demo" else (part.source,):
            if stopped:
                break
            one, shown = replace(part, source=source), source == part.source
            size = sum(p.size for p in init_params(one, np.random.default_rng(0)).values())
            print(f"\n{task}, up to {one.length} symbols, read {source}: hidden {one.hidden}, lr {one.lr}, "
                  f"batch {one.batch}, forcing {one.forcing}, {size} parameters")
            print(f"chance level: loss {math.log(vocabulary_sizes(one)[1]):.3f}")
            params, progress = train_seq2seq(one, rng, quiet=not shown)
            table.append((task, source, one.length, exact_by_length(params, one)))
            exact = float(np.mean(table[-1][3][:one.length]))
            print(f"loss {loss_curve(progress.losses or [0])}\n{exact:.2%} of held-out sources of the trained lengths "
                  f"answered without a mistake, {np.mean(table[-1][3][one.length:]):.2%} of longer ones")
            if shown:
                show_search(params, one)
            figures["exact" if len(table) == 1 and cfg.task != "demo" else f"{task}_{source}"] = exact
            examples, seconds = examples + len(progress.losses) * one.batch, seconds + progress.seconds
            steps, stopped = steps + progress.step, progress.stopped
    show_padding(params, one, rng)
    show_table(table)
    print("\nNext: python seq2seq.py --task words --forcing 0.5      python seq2seq.py --task translate --beam 10")
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
