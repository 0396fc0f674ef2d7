# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""translation.py: words in, words out, with an encoder and a decoder of attention.

The encoder reads the source in both directions, the decoder writes the target token by token; in every block it also
attends to the encoder's output (cross-attention). Words are cut into pieces by byte-pair encoding, outputs are found by
beam search and measured by BLEU and ROUGE.

Forward, a block, for the rows x of the tokens (order pre; post is norm(x + f(x))):
    x = x + attention(norm(x))      x = x + feed(norm(x))       norm(x) = gamma (x - mean) / std + beta, row by row
    attention: q, k, v = x W + b, cut into heads; a head: p = softmax(q k^T / sqrt(d) + mask), out = p v; all heads Wo
    mask: 0 where a token may look, -1e9 where not: at the future (causal), at padding; ALiBi: minus the distance
    feed(x) = f(x W1 + b1) W2 + b2, f = relu, gelu, or a gate (swiglu)
Backward, from the end to the start:
    dv = p^T dout       dp = dout v^T       ds = p (dp - sum_s p dp), and sum_s p dp = dout . out: one number per row
    dq = ds k / sqrt(d)         dk = ds^T q / sqrt(d)           mask: nothing, where p is 0 so is ds
    norm: g = gamma dy, dx = (g - mean(g) - xhat mean(g xhat)) / std    x is used twice: dx = dy + what f returns
    the table of embeddings is used for source, target and output (tied): its three gradients add up
Names in a headline are too rare to be learned; they have to be copied (--copy). Each token of the source gets a score
too, c = q k^T / sqrt(D), q of the decoder, k of the token and of the one before it, so that a copied phrase goes on.
One softmax p is over symbols and source, so P(y) = p_y + sum of p_s over those s where source_s = y. Backward:
    loss = -log P(y)        dz = p - (p of the ways to output y, else 0) / P(y)

Run
    python translation.py --data train.tsv --validation val.tsv --test test_2016_flickr.tsv --save m30.npz
                                                        Multi30k, German to English: BLEU 30 or more
    python translation.py --data reuters-headlines.tsv --copy --lower --layers 2 --width 128 --context 40 \\
        --lr 0.003 --warmup 150 --dropout 0.2 --smoothing 0 --steps 3000                headlines, the last tenth:
                            ROUGE-1/2/L 34.4 / 13.7 / 33.4; the first 12 words of each article have 26.7 / 9.5 / 25.1
    Data: any lines of source TAB target. Multi30k has one file per language:
        for s in train val test_2016_flickr; do for l in de en; do curl -O \\
        https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/$s.$l.gz; gunzip -f $s.$l.gz; done
        paste $s.de $s.en > $s.tsv; done
        reuters-headlines.tsv: a line BODY TAB TITLE for each article of Reuters-21578, in their order, white space made
        single blanks; bodies from 40 words on, less than 25 % of them numbers, titles from 3 words on
        https://archive.ics.uci.edu/ml/machine-learning-databases/reuters21578-mld/reuters21578.tar.gz

Break it
    return mask[:, None, None] if mask.any() else None -> return None in hide_padding: the output of a sentence then
        depends on its padding, so on the other sentences of its batch

Papers: Vaswani et al. 2017 (the transformer); Gu et al. 2016 (copying); Ba et al. 2016 (LayerNorm); Sennrich et al.
2016 (byte-pair encoding); Szegedy et al. 2016 (label smoothing); Wu et al. 2016 (length penalty); Zhang, Sennrich 2019
(RMSNorm); Shazeer 2020 (swiglu); Xiong et al. 2020 (pre-norm); Su et al. 2021 (rotary); Press et al. 2022 (ALiBi);
Papineni 2002 (BLEU); Lin 2004 (ROUGE).
"""
import argparse
import collections
import contextlib
import ctypes
import functools
import heapq
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np


@dataclass
class Config:
    """Hyperparameters. Edit a line, or pass its name as a flag: --lr 0.1"""
    task: Literal["pairs"] = "pairs"  # what to learn
    layers: int = 3         # blocks of the encoder, and of the decoder
    heads: int = 4          # attention heads; each works on width / heads dimensions
    width: int = 192        # embedding dimension
    inner: int = 0          # width inside the feed-forward net; 0: four times the width
    norm: Literal["layer", "rms"] = "layer"  # normalisation of a token
    order: Literal["pre", "post"] = "pre"  # normalise what enters a sublayer, or what leaves it
    activation: Literal["gelu", "relu", "swiglu"] = "swiglu"  # nonlinearity of the feed-forward net
    position: Literal["learned", "sinusoidal", "rotary", "alibi"] = "rotary"  # positional encoding
    tie: bool = True        # one embedding for source, target and output
    context: int = 48       # maximum sequence length in tokens
    dropout: float = 0.1    # share of numbers set to 0 in training
    smoothing: float = 0.1  # share of the target's probability that is spread over all symbols
    clip: float = 1.0       # largest norm of the gradient; 0: any
    lr: float = 0.002       # peak learning rate
    decay: float = 0.01     # weight decay
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # course of the learning rate
    warmup: int = 300       # steps of linear warmup
    steps: int = 3500       # updates
    batch: int = 64         # sequences an update
    tokens: Literal["chars", "bpe"] = "bpe"  # characters, or pieces of words (byte-pair encoding)
    merges: int = 4000      # bpe: number of pieces that are learned
    lower: bool = False     # capital letters become small ones
    copy: bool = False      # the decoder may also point at a token of the source and output that
    beam: int = 4           # hypotheses kept in the search; 1 is greedy
    penalty: float = 0.6    # how much the search favours long outputs
    data: str = ""          # lines of source TAB target
    validation: str = ""    # more lines, to choose by (none: a tenth of the data, before the last)
    test: str = ""          # more lines, to report (none: the last tenth of the data)
    workers: int = 1        # processes that share the work of a batch
    save: str = ""          # file (.npz) to keep parameters and state of the training in
    load: str = ""          # such a file to go on from
    seed: int = 0           # random seed

    def __post_init__(self):
        for name in ("steps", "batch", "layers", "heads", "width", "beam", "workers"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("inner", "clip", "decay", "warmup", "merges", "penalty", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        require(0 < self.lr < math.inf, "--lr", "a number above 0", self.lr)
        for name in ("dropout", "smoothing"):
            require(0 <= getattr(self, name) <= 0.9, "--" + name, "a number from 0 to 0.9", getattr(self, name))
        require(self.width % self.heads == 0, "--width", f"a multiple of --heads {self.heads}", self.width)
        require(self.position != "rotary" or self.width // self.heads % 2 == 0, "--position",
                "an even width a head for rotary", f"{self.width} / {self.heads}")
        require(self.context >= 2, "--context", "2 or more", self.context)
        require(self.workers <= self.batch, "--workers", f"at most --batch {self.batch}", self.workers)
        require(self.activation != "swiglu" or self.inner % 2 == 0, "--inner", "an even number for swiglu", self.inner)


PRESETS = {}            # what a task changes above, unless a flag says otherwise: there is only one


# ---- layers: B sequences, T tokens (S of what is looked at), N = B T rows, D width, H heads, V symbols ---------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, K), b (K,) -> y (N, K)."""
    y = x @ W
    y += b
    return y, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   dout (N, K) -> dx (N, D), dW (D, K), db (K,)."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)     # b was broadcast over N, so sum over N


def layernorm_forward(x, gamma, beta, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps) of each row.   x, y (N, D), gamma, beta (D,)."""
    average = np.full(x.shape[1], 1 / x.shape[1], x.dtype)      # means of rows as products: the fastest way
    xhat = x - (x @ average)[:, None]
    inv_std = (((xhat * xhat) @ average + eps) ** -0.5)[:, None]
    xhat *= inv_std
    y = xhat * gamma
    y += beta
    return y, (xhat, gamma, inv_std)


def layernorm_backward(dout, cache):
    """dgamma = sum_n dout xhat, dbeta = sum_n dout; with g = gamma dout and means over each row,
    dx = (g - mean(g) - xhat mean(g xhat)) / std: g without its part along 1 and along xhat.   -> dx, dgamma, dbeta."""
    xhat, gamma, inv_std = cache
    by_xhat, share = dout * xhat, gamma / len(gamma)
    dx = dout * gamma
    dx -= (dout @ share)[:, None]
    dx -= xhat * (by_xhat @ share)[:, None]
    dx *= inv_std
    return dx, by_xhat.sum(axis=0), dout.sum(axis=0)


def rmsnorm_forward(x, gamma, eps=1e-5):
    """y = gamma xhat, xhat = x / sqrt(mean(x^2) + eps) of each row: no mean, no beta (Zhang 2019).   x (N, D)."""
    average = np.full(x.shape[1], 1 / x.shape[1], x.dtype)
    inv_rms = (((x * x) @ average + eps) ** -0.5)[:, None]
    xhat = x * inv_rms
    return xhat * gamma, (xhat, gamma, inv_rms)


def rmsnorm_backward(dout, cache):
    """dgamma = sum_n dout xhat; with g = gamma dout, dx = (g - xhat mean(g xhat)) / rms.   -> dx, dgamma."""
    xhat, gamma, inv_rms = cache
    by_xhat = dout * xhat
    dx = dout * gamma
    dx -= xhat * (by_xhat @ (gamma / len(gamma)))[:, None]
    dx *= inv_rms
    return dx, by_xhat.sum(axis=0)


def dropout_forward(x, keep, rate):
    """Every entry is 0 with probability rate, the others grow to make up for it; keep (N, D) comes with the batch."""
    y = x * keep
    y *= 1 / (1 - rate)
    return y, (keep, rate)


def dropout_backward(dout, cache):
    """dx = dout where x was kept, grown alike."""
    keep, rate = cache
    dx = dout * keep
    dx *= 1 / (1 - rate)
    return dx


def rotary_forward(x, turn):
    """Turn every pair (x_j, x_{j + d/2}) by an angle that grows with the position: q_t k_s then depends on t - s only
    (Su 2021).   x (B, T, H, d), turn: cos and sin of the angles, each (T, 1, d/2) -> (B, T, H, d)."""
    (cos, sin), (a, b) = turn, np.split(x, 2, axis=3)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=3), turn


def rotary_backward(dout, cache):
    """The same turn, backwards."""
    (cos, sin), (a, b) = cache, np.split(dout, 2, axis=3)
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=3)


def attention_forward(q, k, v, mask=None):
    """out = p v, p = softmax(q k^T / sqrt(d) + mask): of every position t, an average of v over the positions s.
    q (B, T, H, d), k, v (B, S, H, d), mask 0 where to look, -1e9 where not, fit for (B, H, T, S) -> (B, T, H, d)."""
    q = q * q.shape[3] ** -0.5
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))             # heads before time: a product for each head
    p = (k @ q.swapaxes(2, 3)).swapaxes(2, 3)       # (B, H, T, S); in memory S before T: max and sum over S are fast so
    if mask is not None:
        p += mask
    p -= p.max(axis=3, keepdims=True)
    np.exp(p, out=p)
    p *= 1 / p.sum(axis=3, keepdims=True)
    out = np.empty((len(q), q.shape[2], q.shape[1], q.shape[3]), q.dtype)
    np.matmul(p, v, out=out.swapaxes(1, 2))                     # heads next to each other, as Wo wants them
    return out, (q, k, v, p, out)


def attention_backward(dout, cache):
    """dv = p^T dout, dp = dout v^T. Softmax: ds = p (dp - sum_s p dp), where sum_s p dp = dout . out, since out = p v.
    Scores: dq = ds k / sqrt(d), dk = ds^T q / sqrt(d): so q is in the cache.   dout (B, T, H, d) -> dq, dk, dv."""
    q, k, v, p, out = cache
    along = (dout * out).sum(axis=3).swapaxes(1, 2)[:, :, :, None]
    dout = dout.swapaxes(1, 2)
    ds = (v @ dout.swapaxes(2, 3)).swapaxes(2, 3)
    ds -= along
    ds *= p
    dq, dk, dv = ds @ k * q.shape[3] ** -0.5, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def multihead_forward(x, p, heads, B, mask=None, memory=None, turn=None, past=None):
    """Attention of x to itself, or to memory if there is one, by several heads, each on its share of the width.
    x (B T, D), memory (B S, D), p: Wqkv (D, 3 D), bqkv (3 D,), Wo (D, D), bo (D,) -> (B T, D).
    In generation, past keeps the keys and values of the tokens so far; x is then only what is new."""
    D, W, b = x.shape[1], p["Wqkv"], p["bqkv"]
    shape = B, -1, heads, D // heads
    turned = memory_cache = None
    if memory is None:                                          # one product for q, k and v
        qkv, x_cache = linear_forward(x, W, b)
        q, k, v = (a.reshape(shape) for a in np.split(qkv.reshape(B, -1, 3 * D), 3, axis=2))
    else:
        q, x_cache = linear_forward(x, W[:, :D], b[:D])
        q = q.reshape(shape)
        if past:                                                # the memory is what it was
            k, v = past["k"], past["v"]
        else:
            kv, memory_cache = linear_forward(memory, W[:, D:], b[D:])
            k, v = (a.reshape(shape) for a in np.split(kv.reshape(B, -1, 2 * D), 2, axis=2))
    if turn is not None:
        (q, turned), (k, _) = rotary_forward(q, turn), rotary_forward(k, turn)
    if past is not None:
        if past and memory is None:
            k, v = np.concatenate([past["k"], k], axis=1), np.concatenate([past["v"], v], axis=1)
        past["k"], past["v"] = k, v
    out, attention_cache = attention_forward(q, k, v, mask)
    y, out_cache = linear_forward(out.reshape(-1, D), p["Wo"], p["bo"])
    return y, (x_cache, memory_cache, turned, attention_cache, out_cache)


def multihead_backward(dout, cache):
    """multihead_forward from bottom to top.   dout (B T, D) -> dx, gradients of p; dmemory, if there was a memory."""
    x_cache, memory_cache, turned, attention_cache, out_cache = cache
    shape, grads = attention_cache[-1].shape, {}
    dheads, grads["Wo"], grads["bo"] = linear_backward(dout, out_cache)
    dq, dk, dv = attention_backward(dheads.reshape(shape), attention_cache)
    if turned is not None:
        dq, dk = rotary_backward(dq, turned), rotary_backward(dk, turned)
    N, D = dout.shape
    if memory_cache is None:
        dx, grads["Wqkv"], grads["bqkv"] = linear_backward(np.stack([dq, dk, dv], axis=2).reshape(N, 3 * D), x_cache)
        return dx, grads
    dx, dWq, dbq = linear_backward(dq.reshape(N, D), x_cache)
    dmemory, dWkv, dbkv = linear_backward(np.stack([dk, dv], axis=2).reshape(-1, 2 * D), memory_cache)
    grads["Wqkv"], grads["bqkv"] = np.concatenate([dWq, dWkv], axis=1), np.concatenate([dbq, dbkv])
    return dx, grads, dmemory


def relu_forward(x):
    """y = max(x, 0), entry by entry."""
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    """dx = dout where x > 0, else 0."""
    x = cache
    return dout * (x > 0)


GELU_C = (2 / math.pi) ** 0.5


def gelu_forward(x):
    """y = x h, h = 1/2 + tanh(c (x + 0.044715 x^3)) / 2, c = sqrt(2 / pi): x times the normal distribution, nearly."""
    h = x * x                                           # in place: passes over memory are what takes the time
    h *= GELU_C * 0.044715
    h += GELU_C
    h *= x
    np.tanh(h, out=h)
    h *= 0.5
    h += 0.5
    return x * h, (x, h)


def gelu_backward(dout, cache):
    """dx = dout (h + x h'), and h' = 2 h (1 - h) c (1 + 3 0.044715 x^2), as for a sigmoid.   The order of the lines is
    dx = (((6 0.044715 c x^2 + 2 c) x (1 - h)) + 1) h dout."""
    x, h = cache
    dx = x * x
    dx *= 6 * 0.044715 * GELU_C
    dx += 2 * GELU_C
    dx *= x
    dx *= 1 - h
    dx += 1
    dx *= h
    dx *= dout
    return dx


def sigmoid(z):
    """1 / (1 + e^-z), written with tanh, which cannot overflow."""
    return 0.5 * np.tanh(0.5 * z) + 0.5


def swiglu_forward(x):
    """y = a g s(g), x = [a, g], s the sigmoid: half is a gate for the other (Shazeer 2020).   (N, 2 K) -> (N, K)."""
    a, g = np.split(x, 2, axis=1)
    s = sigmoid(g)
    silu = g * s
    return a * silu, (a, silu, s)


def swiglu_backward(dout, cache):
    """da = dout g s, dg = dout a (s + g s (1 - s)): the product rule, twice.   dout (N, K) -> dx (N, 2 K)."""
    a, silu, s = cache
    return np.concatenate([dout * silu, dout * a * (s + silu * (1 - s))], axis=1)


FEEDS = {"relu": (relu_forward, relu_backward), "gelu": (gelu_forward, gelu_backward),
         "swiglu": (swiglu_forward, swiglu_backward)}
NORMS = {"layer": (layernorm_forward, layernorm_backward, ("gamma", "beta")),
         "rms": (rmsnorm_forward, rmsnorm_backward, ("gamma",))}


PORTION = 2 ** 16        # numbers that are worked on at once: a quarter of a megabyte


def portions(x):
    """Slices of the rows of x, of about PORTION numbers each. Several passes over an array are faster over one portion
    after the other, since that stays in the cache of a core."""
    n = max(1, PORTION // x[0].size)
    return [slice(i, i + n) for i in range(0, len(x), n)]


def feed_forward(x, p, activation):
    """Each row by itself through a small net.   x (N, D), p: W1 (D, K), b1, W2 (K, D), b2 -> (N, D).
    activation: relu, gelu; or swiglu, whose W1 is (D, 2 K)."""
    z, in_cache = linear_forward(x, p["W1"], p["b1"])
    a, act_caches = np.empty((len(z), len(p["W2"])), z.dtype), []
    for rows in portions(z):
        a[rows], cache = FEEDS[activation][0](z[rows])
        act_caches.append(cache)
    y, out_cache = linear_forward(a, p["W2"], p["b2"])
    return y, (in_cache, act_caches, out_cache, activation)


def feed_backward(dout, cache):
    """feed_forward from bottom to top.   dout (N, D) -> dx, gradients of p."""
    in_cache, act_caches, out_cache, activation = cache
    grads = {}
    da, grads["W2"], grads["b2"] = linear_backward(dout, out_cache)
    dz = np.empty((len(da), in_cache[1].shape[1]), da.dtype)
    for rows, cache in zip(portions(dz), act_caches):
        dz[rows] = FEEDS[activation][1](da[rows], cache)
    dx, grads["W1"], grads["b1"] = linear_backward(dz, in_cache)
    return dx, grads


def part(params, name):
    """The parameters whose names begin with "name.", without it."""
    return {key[len(name) + 1:]: value for key, value in params.items() if key.startswith(name + ".")}


def block_forward(x, p, heads, B, mask=None, memory=None, memory_mask=None, turn=None, keep=None, rate=0.0,
                  norm="layer", activation="gelu", order="pre", past=None):
    """Attention, attention to a memory if there is one, feed-forward, each as x + f(norm(x)) (order pre, the way past
    is clear) or norm(x + f(x)) (post, as in 2017).   x (B T, D), memory (B S, D), keep (3, B T, D), rate: of dropout,
    p: "attn.Wqkv", "attn.gamma", ..., "cross.Wqkv", ..., "feed.W1", ... -> (B T, D)."""
    caches, (norm_forward, _, names) = [], NORMS[norm]
    for k, name in enumerate(("attn", "feed") if memory is None else ("attn", "cross", "feed")):
        q, y, norm_cache, keep_cache = part(p, name), x, None, None
        if order == "pre":
            y, norm_cache = norm_forward(x, *(q[n] for n in names))
        if name == "feed":
            y, cache = feed_forward(y, q, activation)
        elif name == "attn":
            y, cache = multihead_forward(y, q, heads, B, mask, None, turn, past and past[name])
        else:
            y, cache = multihead_forward(y, q, heads, B, memory_mask, memory, None, past and past[name])
        if keep is not None:
            y, keep_cache = dropout_forward(y, keep[k], rate)
        x = x + y
        if order == "post":
            x, norm_cache = norm_forward(x, *(q[n] for n in names))
        caches.append((name, norm_cache, cache, keep_cache))
    return x, (caches, norm, order)


def block_backward(dout, cache):
    """block_forward from bottom to top.   dout (B T, D) -> dx, gradients of p; dmemory, if there was a memory."""
    (caches, norm, order), grads, dmemory = cache, {}, []
    _, norm_backward, names = NORMS[norm]
    for name, norm_cache, cache, keep_cache in reversed(caches):
        dnorm = ()
        if order == "post":
            dout, *dnorm = norm_backward(dout, norm_cache)
        dy = dout if keep_cache is None else dropout_backward(dout, keep_cache)
        dy, dq, *to_memory = (feed_backward if name == "feed" else multihead_backward)(dy, cache)
        dmemory += to_memory
        if order == "pre":
            dy, *dnorm = norm_backward(dy, norm_cache)
        dout = dout + dy                                        # x goes on in two ways, so gradients add
        grads.update({f"{name}.{key}": g for key, g in [*dq.items(), *zip(names, dnorm)]})
    return dout, grads, *dmemory


def lookup_forward(ids, E):
    """The row of E that each number names.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def lookup_backward(dout, cache):
    """A row of E gets the sum of dout over the places where it stands. With many symbols, most of which do not occur:
    sort the places by symbol, add up each run."""
    ids, shape = cache
    places = ids.ravel().argsort(kind="stable")
    found, starts = np.unique(ids.ravel()[places], return_index=True)
    dE = np.zeros(shape, dout.dtype)
    dE[found] = np.add.reduceat(dout.reshape(-1, shape[1])[places], starts, axis=0)
    return dE


def project_forward(x, E):
    """z = x E^T, how well x fits each symbol.   x (N, D), E (V, D) -> (N, V)."""
    return x @ E.T, (x, E)


def project_backward(dout, cache):
    """dx = dout E, dE = dout^T x."""
    x, E = cache
    return dout @ E, dout.T @ x


def smoothed_cross_entropy_forward(z, targets, smoothing):
    """mean_n of -sum_k y_k log p[n, k], p = softmax of each row, y = (1 - smoothing) onehot(target) + smoothing / K
    (Szegedy 2016).   z (N, K), targets (N,) class numbers -> scalar."""
    p, rows = z - z.max(axis=1, keepdims=True), np.arange(len(targets))
    right, mean = p[rows, targets], p.mean(axis=1) if smoothing else 0
    np.exp(p, out=p)
    total = p.sum(axis=1, keepdims=True)
    p *= 1 / total
    loss = np.log(total[:, 0]) - (1 - smoothing) * right - smoothing * mean
    return loss.mean(), (p, targets, smoothing)


def smoothed_cross_entropy_backward(dout, cache):
    """dz = (p - y) / N.   dout scalar -> dz (N, K)."""
    p, targets, smoothing = cache
    N, K = p.shape
    dz = p * (dout / N)
    if smoothing:
        dz -= smoothing / K * (dout / N)
    dz[np.arange(N), targets] -= (1 - smoothing) * (dout / N)
    return dz


def pointer_forward(x, memory, p, B, mask=None, past=None):
    """c = q k^T / sqrt(D) + mask: how well each token of the source would do as the next one of the output (Gu 2016).
    q = x Wq + bq, k = [memory, memory one token before] Wk + bk: who has said token s - 1 finds the place to copy s. bk
    can raise all c of a row: to copy, or not. x (B T, D), memory (B S, D), mask fit for (B, 1, 1, S), p: Wq (D, D),
    bq (D,), Wk (2 D, D), bk (D,) -> (B T, S). past: see multihead_forward."""
    D, k_cache = x.shape[1], None
    q, q_cache = linear_forward(x, p["Wq"], p["bq"])
    q = q.reshape(B, -1, D)
    if past:
        k = past["k"]
    else:
        m = memory.reshape(B, -1, D)
        before = np.concatenate([np.zeros_like(m[:, :1]), m[:, :-1]], axis=1)
        both = np.concatenate([m, before], axis=2)
        k, k_cache = linear_forward(both.reshape(-1, 2 * D), p["Wk"], p["bk"])
        k = k.reshape(B, -1, D)
    if past is not None:
        past["k"] = k
    c = q @ k.swapaxes(1, 2) * D ** -0.5
    if mask is not None:
        c += mask[:, 0]
    return c.reshape(len(x), -1), (q, k, q_cache, k_cache)


def pointer_backward(dout, cache):
    """dq = dc k / sqrt(D), dk = dc^T q / sqrt(D), and a token of the memory is in two keys: its own and the next one's.
    dout (B T, S) -> dx, dmemory, gradients of p."""
    q, k, q_cache, k_cache = cache
    (B, T, D), grads = q.shape, {}
    dc = dout.reshape(B, T, -1) * D ** -0.5
    dx, grads["Wq"], grads["bq"] = linear_backward((dc @ k).reshape(B * T, D), q_cache)
    dboth, grads["Wk"], grads["bk"] = linear_backward((dc.swapaxes(1, 2) @ q).reshape(-1, D), k_cache)
    dm, dbefore = np.split(dboth.reshape(B, -1, 2 * D), 2, axis=2)
    dm[:, :-1] += dbefore[:, 1:]
    return dx, dm.reshape(-1, D), grads


def copy_cross_entropy_forward(z, targets, source, smoothing):
    """One softmax p over the V symbols and the S tokens of the source. A target can be said in several ways: as the
    symbol, or by copying it from any place where it stands. So P = p[target] + sum of p[V + s] over source_s = target,
    loss = mean_n of -(1 - smoothing) log P - smoothing mean_v log p[v].   z (N, V + S), targets (N,), source (N, S)."""
    V, rows = z.shape[1] - source.shape[1], np.arange(len(z))
    p = z - z.max(axis=1, keepdims=True)
    ways = np.concatenate([p[rows, targets, None], np.where(source == targets[:, None], p[:, V:], -1e9)], axis=1)
    mean = p[:, :V].mean(axis=1) if smoothing else 0
    top = ways.max(axis=1, keepdims=True)
    share = np.exp(ways - top)
    right = share.sum(axis=1, keepdims=True)
    share *= 1 / right                                          # of each way, in P
    np.exp(p, out=p)
    total = p.sum(axis=1, keepdims=True)
    p *= 1 / total
    loss = np.log(total) - (1 - smoothing) * (top + np.log(right))
    return (loss[:, 0] - smoothing * mean).mean(), (p, share, targets, V, smoothing)


def copy_cross_entropy_backward(dout, cache):
    """dz = (p - y) / N, where y = (1 - smoothing) times each way's share in P (column 0: the symbol, then the places of
    the source), and smoothing / V at every symbol."""
    p, share, targets, V, smoothing = cache
    N = len(p)
    dz = p * (dout / N)
    if smoothing:
        dz[:, :V] -= smoothing / V * (dout / N)
    share = share * ((1 - smoothing) * (dout / N))
    dz[np.arange(N), targets] -= share[:, 0]
    dz[:, V:] -= share[:, 1:]
    return dz


# ---- model: an encoder, a decoder, or both ---------------------------------------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """E (V, D) for all symbols; enc0., enc1., ... and dec0., dec1., ... as block_forward wants them; enc. and dec., the
    last norms of order pre. What the options add: P, positions; Es, Wz, if not tied; copy."""
    D, F, params = cfg.width, cfg.inner or 4 * cfg.width, {}

    def matrix(rows, columns, gain=1.0):
        return rng.standard_normal((rows, columns)) * (gain * (2 / (rows + columns)) ** 0.5)
    V = pairs_of(cfg)["vocabulary"].size
    for name in ["E"] + ["Wz", "Es"] * (not cfg.tie):
        params[name] = 0.02 * rng.standard_normal((V, D))       # small: at first, all symbols are equally likely
    for side in ("enc", "dec"):
        if cfg.position == "learned":
            params["P" + side] = 0.02 * rng.standard_normal((cfg.context, D))
        for k in range(cfg.layers):
            for name in ("attn", "cross", "feed") if side == "dec" else ("attn", "feed"):
                at = f"{side}{k}.{name}."
                last = (2 * cfg.layers) ** -0.5                 # many small steps from layer to layer add up to one
                if name == "feed":
                    params[at + "W1"], params[at + "b1"] = matrix(D, F), np.zeros(F)
                    inside = F // 2 if cfg.activation == "swiglu" else F
                    params[at + "W2"], params[at + "b2"] = matrix(inside, D, last), np.zeros(D)
                else:
                    params[at + "Wqkv"], params[at + "bqkv"] = matrix(D, 3 * D), np.zeros(3 * D)
                    params[at + "Wo"], params[at + "bo"] = matrix(D, D, last), np.zeros(D)
                params.update({at + n: np.full(D, float(n == "gamma")) for n in NORMS[cfg.norm][2]})
        if cfg.order == "pre":
            params.update({f"{side}.{n}": np.full(D, float(n == "gamma")) for n in NORMS[cfg.norm][2]})
    for name, rows in (("q", D), ("k", 2 * D)) if cfg.copy else ():
        params["copy.W" + name], params["copy.b" + name] = matrix(rows, D), np.zeros(D)
    return {name: value.astype(dtype) for name, value in params.items()}


@functools.lru_cache
def sinusoids(T, D, dtype):
    """Positions as the hands of D / 2 clocks, from fast to slow (Vaswani 2017).   -> (T, D)."""
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    return 0.02 * np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :D].astype(dtype)


@functools.lru_cache
def turns(T, d, dtype):
    """cos and sin of the angles by which rotary_forward turns the pairs of position t.   -> two of (T, 1, d / 2)."""
    angle = np.arange(T)[:, None, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


@functools.lru_cache
def where_to_look(T, S, causal, heads, dtype):
    """The last T of S positions look at all S: -1e9 at what is still to come, if causal; else 0, or, if heads is not 0,
    ALiBi: minus the distance, times 2^-8/H, 2^-16/H, ... (Press 2022).   -> (1, 1 or H, T, S), or None if all are 0."""
    distance = np.arange(S - T, S)[:, None] - np.arange(S)
    slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads) if heads else np.zeros(1)
    mask = np.where(causal & (distance < 0), -1e9, -slopes[:, None, None] * np.abs(distance))[None].astype(dtype)
    mask = np.ascontiguousarray(mask.swapaxes(2, 3)).swapaxes(2, 3)         # S before T in memory, as attention has it
    return mask if mask.any() else None


def side_forward(params, ids, side, cfg, causal, memory=None, memory_mask=None, keep=None, past=None):
    """The encoder (side enc) or the decoder (dec): symbols (B, T) to rows (B T, D).
    keep: what dropout keeps (B, places, T, D). past: see multihead_forward, a dict for each attention of each layer."""
    B, T, D, dtype = *ids.shape, cfg.width, params["E"].dtype
    start = past[0]["attn"]["k"].shape[1] if past and past[0]["attn"] else 0            # tokens that came before
    x, in_cache = lookup_forward(ids, params["Es" if side == "enc" and "Es" in params else "E"])
    x = x.reshape(B * T, D)
    if cfg.position in ("learned", "sinusoidal"):
        table = params["P" + side] if cfg.position == "learned" else sinusoids(start + T, D, dtype)
        x = (x.reshape(B, T, D) + table[start:start + T]).reshape(B * T, D)
    turn = None
    if cfg.position == "rotary":
        turn = tuple(a[start:] for a in turns(start + T, D // cfg.heads, dtype))
    mask = where_to_look(T, start + T, causal, cfg.heads * (cfg.position == "alibi"), dtype)
    if not causal:
        padding = hide_padding(ids, dtype)
        mask = padding if mask is None else mask if padding is None else mask + padding
    keep_cache, caches, n = None, [], 2 + (memory is not None)
    if keep is not None:
        keep = keep.swapaxes(0, 1).reshape(1 + n * cfg.layers, B * T, D)
        x, keep_cache = dropout_forward(x, keep[0], dropout_rate(cfg))
    for k in range(cfg.layers):
        x, cache = block_forward(x, part(params, f"{side}{k}"), cfg.heads, B, mask, memory, memory_mask, turn,
                                 None if keep is None else keep[1 + n * k:1 + n * (k + 1)], dropout_rate(cfg),
                                 cfg.norm, cfg.activation, cfg.order, past and past[k])
        caches.append(cache)
    norm_cache = None
    if cfg.order == "pre":
        x, norm_cache = NORMS[cfg.norm][0](x, *(params[f"{side}.{n}"] for n in NORMS[cfg.norm][2]))
    return x, (in_cache, keep_cache, caches, norm_cache, (B, T), side, cfg, params)


def side_backward(dout, cache):
    """side_forward from bottom to top -> gradients under the keys of params, and dmemory (or None)."""
    in_cache, keep_cache, caches, norm_cache, (B, T), side, cfg, params = cache
    grads, dmemory = {}, None
    if norm_cache is not None:
        dout, *dnorm = NORMS[cfg.norm][1](dout, norm_cache)
        grads.update({f"{side}.{n}": g for n, g in zip(NORMS[cfg.norm][2], dnorm)})
    for k, cache in reversed(list(enumerate(caches))):
        dout, dp, *more = block_backward(dout, cache)
        grads.update({f"{side}{k}.{name}": g for name, g in dp.items()})
        if more:                                                # every layer looks at the memory
            dmemory = more[0] if dmemory is None else dmemory + more[0]
    if keep_cache is not None:
        dout = dropout_backward(dout, keep_cache)
    if cfg.position == "learned":
        grads["P" + side] = np.zeros_like(params["P" + side])
        grads["P" + side][:T] = dout.reshape(B, T, -1).sum(axis=0)
    grads["Es" if side == "enc" and "Es" in params else "E"] = lookup_backward(dout, in_cache)
    return grads, dmemory


def hide_padding(ids, dtype):
    """-1e9 where a sequence has ended.   ids (B, S) -> (B, 1, 1, S), or None if nothing is padding."""
    mask = (ids == PAD) * np.array(-1e9, dtype)
    return mask[:, None, None] if mask.any() else None


def put_back(rows, places, count):
    """Rows at their places among count, of which the others are 0.   rows (N, K), places (N,) -> (count, K)."""
    out = np.zeros((count, rows.shape[1]), rows.dtype)
    out[places] = rows
    return out


def transformer_forward(params, source, target, cfg, places=None, keeps=(None, None)):
    """Source, then target, which cross-attends to the encoder's output. source (B, S), target (B, T) -> scores of the
    symbols (N, V) in all rows, or those in places; with copy, beside them those of source tokens (N, V + S)."""
    copies = copy_cache = shape = None
    memory, enc_cache = side_forward(params, source, "enc", cfg, False, keep=keeps[0])
    memory_mask = hide_padding(source, memory.dtype)
    x, dec_cache = side_forward(params, target, "dec", cfg, True, memory, memory_mask, keeps[1])
    if cfg.copy:
        copies, copy_cache = pointer_forward(x, memory, part(params, "copy"), len(source), memory_mask)
    if places is not None:
        shape = x.shape
        x = x[places]
    z, out_cache = project_forward(x, params.get("Wz", params.get("E")))
    if cfg.copy:
        z = np.concatenate([z, copies if places is None else copies[places]], axis=1)
    return z, (enc_cache, dec_cache, shape, places, out_cache, copy_cache, cfg)


def transformer_backward(dout, cache):
    """transformer_forward from bottom to top -> gradients under the keys of params."""
    enc_cache, dec_cache, shape, places, out_cache, copy_cache, cfg = cache
    grads, dpointed = {}, None
    V = len(out_cache[1])
    dx, grads["E" if cfg.tie else "Wz"] = project_backward(dout[:, :V], out_cache)
    dcopies = dout[:, V:]
    if places is not None:
        dx, dcopies = put_back(dx, places, shape[0]), put_back(dcopies, places, shape[0])
    if copy_cache is not None:
        dpointing, dpointed, found = pointer_backward(dcopies, copy_cache)
        dx = dx + dpointing
        grads.update({"copy." + name: g for name, g in found.items()})
    for cache, more in ((dec_cache, dpointed), (enc_cache, None)):
        found, dmemory = side_backward(dx, cache)
        dx = dmemory if more is None else dmemory + more        # the encoder learns from what the decoder attends to
        for name, g in found.items():
            grads[name] = grads[name] + g if name in grads else g           # E is used up to three times
    return grads


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    source, target, answers, *keeps = batch
    answers, places = answers.ravel(), None
    if cfg.copy or (answers < 0).any():                         # padding has no answer
        places = np.flatnonzero(answers >= 0)
        answers = answers[places]
    z, cache = transformer_forward(params, source, target, cfg, places, keeps)
    if cfg.copy:                                                # row n = b T + t belongs to sequence b
        loss, loss_cache = copy_cross_entropy_forward(z, answers, source[places // target.shape[1]], cfg.smoothing)
        return loss, transformer_backward(copy_cross_entropy_backward(1.0, loss_cache), cache)
    loss, loss_cache = smoothed_cross_entropy_forward(z, answers, cfg.smoothing)
    return loss, transformer_backward(smoothed_cross_entropy_backward(1.0, loss_cache), cache)


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


def dropout_rate(cfg):
    """The rate in 256ths: random bytes decide."""
    return round(256 * cfg.dropout) / 256


# ---- data: text to numbers, numbers to batches -----------------------------------------------------------------------

VERSES = ["the house that Jack built.", "the malt\nThat lay in", "the rat,\nThat ate", "the cat,\nThat killed",
          "the dog,\nThat worried", "the cow with the crumpled horn,\nThat tossed",
          "the maiden all forlorn,\nThat milked", "the man all tattered and torn,\nThat kissed",
          "the priest all shaven and shorn,\nThat married"]
RHYME = "\n" + "\n\n".join("This is " + " ".join(VERSES[n::-1]) for n in range(len(VERSES))) + "\n"
SPECIAL = ["<pad>", "<start>", "<end>", "<mask>"]       # symbols of every vocabulary, before those of the data
PAD = 0
START = 1
END = 2
MASK = 3
WORDS = re.compile(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+")   # every text falls into such pieces, and pieces into symbols


def learn_merges(text, count):
    """Byte-pair encoding (Sennrich 2016): symbols 0 to 255 are the bytes of UTF-8; then, again and again, the most
    frequent pair of neighbours within a word becomes a symbol of its own, 256, 257, ...   -> list of pairs."""
    words = collections.Counter(WORDS.findall(text))
    spelled, counts = [list(word.encode()) for word in words], list(words.values())
    total, where, merges = collections.Counter(), collections.defaultdict(set), []
    for n, word in enumerate(spelled):
        for pair in zip(word, word[1:]):
            total[pair] += counts[n]
            where[pair].add(n)
    heap = [(-times, pair) for pair, times in total.items()]
    heapq.heapify(heap)
    while heap and len(merges) < count:
        times, pair = heapq.heappop(heap)
        if -times != total[pair] or times > -2:         # its number has changed since: a newer entry is in the heap
            continue
        changed = set()
        for n in where.pop(pair):
            old = spelled[n]
            new = spelled[n] = merge_pair(old, pair, 256 + len(merges))
            for word, sign in ((old, -1), (new, 1)):
                for neighbours in zip(word, word[1:]):
                    total[neighbours] += sign * counts[n]
                    where[neighbours].add(n)
                    changed.add(neighbours)
        merges.append(pair)
        for neighbours in changed:
            heapq.heappush(heap, (-total[neighbours], neighbours))
    return merges


def merge_pair(word, pair, symbol):
    """The word with symbol in place of the pair, from left to right."""
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(symbol)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


class Vocabulary:
    """Text to numbers and back, exactly: by characters or, if there are merges, by byte-pair encoding."""

    def __init__(self, chars="", merges=()):
        self.chars, self.merges, self.seen = chars, [tuple(pair) for pair in merges], {}
        self.rank = {pair: k for k, pair in enumerate(self.merges)}
        self.symbols = [c.encode() for c in chars] or [bytes([b]) for b in range(256)]
        for a, b in self.merges:
            self.symbols.append(self.symbols[a] + self.symbols[b])
        self.number = {c: i for i, c in enumerate(chars)}
        self.size = len(SPECIAL) + len(self.symbols)

    def encode(self, text, strange=None):
        """-> array of numbers. Characters never seen (of bytes there are none) are dropped, or strange is called."""
        if self.chars:
            never = sorted(set(text) - set(self.chars))
            if never and strange:
                strange("".join(never[:10]))
            return np.array([self.number[c] for c in text if c in self.number], int) + len(SPECIAL)
        return np.array([s for word in WORDS.findall(text) for s in self.spell(word)], int) + len(SPECIAL)

    def spell(self, word):
        """The symbols of a word: merge in the order in which the merges were learned."""
        if word not in self.seen:
            symbols = list(word.encode())
            while len(symbols) > 1:
                pair = min(zip(symbols, symbols[1:]), key=lambda p: self.rank.get(p, math.inf))
                if pair not in self.rank:
                    break
                symbols = merge_pair(symbols, pair, 256 + self.rank[pair])
            self.seen[word] = symbols
        return self.seen[word]

    def raw(self, ids):
        """The bytes that numbers stand for; special symbols stand for none."""
        return b"".join(self.symbols[i - len(SPECIAL)] for i in ids if i >= len(SPECIAL))

    def decode(self, ids):
        """-> text."""
        return self.raw(ids).decode(errors="replace")

    def names(self, ids):
        """A name for each number, to write at a picture."""
        return [SPECIAL[i] if i < len(SPECIAL) else self.raw([i]).decode(errors="replace").replace(" ", "_").replace(
            "\n", "|") for i in ids]


def make_vocabulary(text, tokens, merges, checkpoint):
    """The vocabulary of a checkpoint or, without one, learned from the text."""
    if checkpoint:
        return Vocabulary(**read_checkpoint(checkpoint)[0].get("vocabulary", {}))
    return Vocabulary("".join(sorted(set(text)))) if tokens == "chars" else Vocabulary("", learn_merges(text, merges))


@functools.lru_cache
def load_pairs(path, validation, test, tokens, merges, lower, copy, checkpoint):
    """Pairs of lines -> {"vocabulary", "train": [(source, target), ...] as numbers, by length, "validation", "test":
    as text}. With no file, lines of the rhyme and their words backwards: enough to check gradients on."""
    lines = [line for line in RHYME.splitlines() if line]
    pairs = read_pairs(path) if path else [(line, " ".join(line.split()[::-1])) for line in lines]
    extra = [read_pairs(p) if p else None for p in (validation, test)]
    for k in (1, 0):                                    # cut off the last tenth for the test, then one for validation
        if extra[k] is None:
            cut = len(pairs) - max(1, len(pairs) // 10)
            pairs, extra[k] = pairs[:cut], pairs[cut:]
    if lower:
        pairs, *extra = [[(a.lower(), b.lower()) for a, b in part] for part in (pairs, *extra)]
    if copy:                                            # so that a first word consists of the same pieces as elsewhere
        pairs, *extra = [[(" " + a, " " + b) for a, b in part] for part in (pairs, *extra)]
    words = make_vocabulary("\n".join(line for pair in pairs for line in pair), tokens, merges, checkpoint)
    train = [(words.encode(a), words.encode(b)) for a, b in pairs]
    train.sort(key=lambda pair: (len(pair[1]), len(pair[0])))
    return {"vocabulary": words, "train": train, "validation": extra[0], "test": extra[1]}


def pairs_of(cfg):
    """What load_pairs finds for a Config."""
    return load_pairs(cfg.data, cfg.validation, cfg.test, cfg.tokens, cfg.merges, cfg.lower, cfg.copy, cfg.load)


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


def pad(sequences):
    """Sequences of numbers -> (B, length of the longest), filled up with PAD."""
    out = np.full((len(sequences), max(map(len, sequences))), PAD)
    for row, sequence in zip(out, sequences):
        row[:len(sequence)] = sequence
    return out


def as_batch(sources, targets, most):
    """Sequences of numbers, cut to the most that there may be -> source (B, S), target (B, T) from START on, answers
    (B, T) up to END, -1 at padding."""
    source = pad([s[:most] for s in sources])
    target = pad([[START, *t[:most - 1]] for t in targets])
    answers = pad([[*t[:most - 1], END] for t in targets])
    return source, target, np.where(answers == PAD, -1, answers)


def make_batch(cfg, rng, dtype=np.float32):
    """-> source, target, answers (-1 at padding), what dropout keeps in the encoder, in the decoder (None: all)."""
    pairs = pairs_of(cfg)["train"]                      # neighbours in the order of length: little padding
    start = rng.integers(0, max(1, len(pairs) - cfg.batch + 1))
    source, target, answers = as_batch(*zip(*pairs[start:start + cfg.batch]), cfg.context)
    threshold, keeps = round(256 * cfg.dropout), []
    for ids, n in ((source, 2), (target, 3)):
        shape = len(ids), 1 + n * cfg.layers, ids.shape[1], cfg.width
        keeps.append(rng.integers(0, 256, shape, np.uint8) >= threshold if threshold else None)
    return source, target, answers, *keeps


def split_batch(batch, parts):
    """The batch cut into parts of some sequences each -> [(share of the answers, part), ...]."""
    asked = max(1, (batch[2] >= 0).sum())
    cut = [[None] * parts if a is None else np.array_split(a, parts) for a in batch]
    return [(float((part[2] >= 0).sum() / asked), part) for part in zip(*cut)]


# ---- use: one token after the other ----------------------------------------------------------------------------------

def next_scores(params, ids, cfg, past, memory=None, memory_mask=None, source=None):
    """Scores of the token after ids.   ids (B, T), new since the last call with this past -> (B, V).
    With copy, they are log(e^z + sum of e^c over the places where a symbol stands in the source (B, S))."""
    x, _ = side_forward(params, ids, "dec", cfg, True, memory, memory_mask, past=past)
    x = x.reshape(*ids.shape, -1)[:, -1]
    z, _ = project_forward(x, params.get("Wz", params.get("E")))
    if cfg.copy:
        c, _ = pointer_forward(x, memory, part(params, "copy"), len(ids), memory_mask, past[-1]["copy"])
        top = np.maximum(z.max(axis=1), c.max(axis=1))[:, None]
        p = np.exp(z - top)
        np.add.at(p, (np.arange(len(ids))[:, None], source), np.exp(c - top))
        z = np.log(np.maximum(p, 1e-30))
    return z


def new_past(cfg):
    """Nothing is known yet: no keys, no values, in no layer."""
    return [{"attn": {}, "cross": {}, "copy": {}} for _ in range(cfg.layers)]


def search(params, source, cfg, beam):
    """Beam search: of all ways to go on, keep the best, by log p / ((5 + length) / 6)^penalty (Wu 2016).
    source (B, S) -> for each the best output, list of numbers; its log p (B,)."""
    B, dtype = len(source), params["E"].dtype
    memory, _ = side_forward(params, source, "enc", cfg, False)
    memory = np.repeat(memory.reshape(B, -1, cfg.width), beam, axis=0).reshape(-1, cfg.width)
    source = np.repeat(source, beam, axis=0)
    memory_mask = hide_padding(source, dtype)
    ids, past = np.full((B * beam, 1), START), new_past(cfg)
    logp = np.where(np.arange(beam), -1e9, np.zeros((B, 1)))                # (B, beam): alike at first, so one counts
    ended, length = np.zeros(B * beam, bool), np.zeros((B, beam))
    rows = np.arange(B)[:, None]
    for _ in range(cfg.context):
        z = next_scores(params, ids[:, -1:], cfg, past, memory, memory_mask, source).astype(float)
        z[:, [PAD, START, MASK]] = -1e9
        z -= z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
        z[ended] = -1e9
        z[ended, PAD] = 0                               # what has ended stays as it is
        total = logp[:, :, None] + z.reshape(B, beam, -1)
        now = length + ~ended.reshape(B, beam)
        value = (total / ((5 + now) / 6)[:, :, None] ** cfg.penalty).reshape(B, -1)
        best = np.argpartition(-value, beam - 1, axis=1)[:, :beam]
        origin, token = np.divmod(best, z.shape[1])
        logp, length = total.reshape(B, -1)[rows, best], now[rows, origin]
        order, token = (rows * beam + origin).ravel(), token.ravel()
        ids = np.concatenate([ids[order], token[:, None]], axis=1)
        ended = ended[order] | (token == END)
        for layer in past:
            for held in layer.values():
                held.update({name: a[order] for name, a in held.items()})
        if ended.all():
            break
    best = (logp / ((5 + length) / 6) ** cfg.penalty).argmax(axis=1)
    outputs = ids.reshape(B, beam, -1)[np.arange(B), best, 1:]
    return [[int(i) for i in row if i >= len(SPECIAL)] for row in outputs], logp[np.arange(B), best]


def translate(params, sources, cfg, beam):
    """Texts -> texts, log p; those of like length together."""
    words = pairs_of(cfg)["vocabulary"]
    ids = [words.encode(s)[:cfg.context] for s in sources]
    order, out, logp = np.argsort([len(i) for i in ids], kind="stable"), [""] * len(ids), np.zeros(len(ids))
    for part in np.array_split(order, -(-len(ids) // 50)):
        found, logp[part] = search(params, pad([ids[n] for n in part]), cfg, beam)
        for n, output in zip(part, found):
            out[n] = words.decode(output)
    return out, logp


# ---- scores ----------------------------------------------------------------------------------------------------------

def bleu_tokens(text):
    """Words and signs, as mteval-v13a and sacrebleu cut them."""
    text = f" {text} "
    for pattern, new in ((r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "), (r"([^0-9])([\.,])", r"\1 \2 "),
                         (r"([\.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")):
        text = re.sub(pattern, new, text)
    return text.split()


def ngrams(tokens, n):
    """How often each run of n tokens occurs."""
    return collections.Counter(zip(*(tokens[k:] for k in range(n))))


def bleu(outputs, references):
    """Papineni 2002, on lists of tokens: the geometric mean of the shares of right runs of 1 to 4 tokens, over all
    sentences; less if the outputs are short. A share of 0 counts as 1/2, 1/4, ... of one run, as sacrebleu does."""
    right, all_, share, smooth = [0] * 4, [0] * 4, [], 1
    for output, reference in zip(outputs, references):
        for n in range(4):
            found = ngrams(output, n + 1)
            right[n] += (found & ngrams(reference, n + 1)).total()
            all_[n] += found.total()
    for n in range(4):
        smooth *= 1 if right[n] else 2
        share.append(right[n] / all_[n] if right[n] else 1 / (smooth * max(1, all_[n])))
    said, wanted = sum(map(len, outputs)), sum(map(len, references))
    brevity = min(0.0, 1 - wanted / max(said, 1))
    return 100 * math.exp(brevity + sum(map(math.log, share)) / 4) if right[0] and all_[3] else 0.0


def rouge_tokens(text):
    """Words of small letters and digits, as rouge_score cuts them."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge(outputs, references):
    """Lin 2004, on lists of tokens: F of the common words, pairs of words, and of the longest common subsequence, each
    the mean over all sentences, in percent -> {"rouge1", "rouge2", "rougeL"}."""
    found = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for output, reference in zip(outputs, references):
        for n, name in ((1, "rouge1"), (2, "rouge2")):
            a, b = ngrams(output, n), ngrams(reference, n)
            found[name] += 200 * (a & b).total() / max(1, a.total() + b.total())
        row = [0] * (len(reference) + 1)
        for token in output:                            # longest common subsequence, row by row of its table
            last = row[:]
            for k, other in enumerate(reference, 1):
                row[k] = last[k - 1] + 1 if token == other else max(last[k], row[k - 1])
        found["rougeL"] += 200 * row[-1] / max(1, len(output) + len(reference))
    return {name: total / max(1, len(outputs)) for name, total in found.items()}


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

def train_transformer(cfg, rng, note=lambda params: "", quiet=False):
    """-> params, progress. note(params): what a line of progress says besides the loss."""
    params, state, first, clipped = init_params(cfg, rng), {}, 0, 0
    words = pairs_of(cfg)["vocabulary"]
    about = dict({name: getattr(cfg, name) for name in ("task", "heads", "norm", "order", "activation", "position")},
                 vocabulary=dict(chars=words.chars, merges=[list(pair) for pair in words.merges]))
    parts = {"params": params, "adam": state}
    if cfg.load:
        first = load_checkpoint(cfg.load, rng, about, parts)
    if cfg.save:
        save_checkpoint(cfg.save, first, rng, about, parts, trial=True)    # before the work, not after it
    progress = Progress(cfg.steps, first + 1, quiet)
    with Workers(cfg, params) as workers:
        for step in progress:
            loss, grads = workers.loss_and_grads(params, split_batch(make_batch(cfg, rng), cfg.workers))
            clipped += clip_norm(grads, cfg.clip) > cfg.clip > 0
            adamw_update(params, grads, state, learning_rate(step, cfg), cfg.decay)
            progress.report(loss, lambda: note(params))
            if cfg.save and (step % 200 == 0 or step == cfg.steps or progress.stopped):
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


def announce_model(cfg, text, chance):
    """What is being learned, and by what."""
    size = sum(p.size for p in init_params(cfg, np.random.default_rng(0)).values())
    print(f"\n{text}: {cfg.layers} layers, {cfg.heads} heads, width {cfg.width}, {cfg.order}-norm "
          f"{cfg.norm}, {cfg.activation}, {cfg.position}, lr {cfg.lr}, batch {cfg.batch}, {size} parameters")
    print(f"chance level: {chance}")


def held_out(params, cfg):
    """Loss on the validation pairs, nats per token."""
    data, total, count = pairs_of(cfg), 0.0, 0
    pairs = [tuple(map(data["vocabulary"].encode, pair)) for pair in data["validation"]]
    pairs.sort(key=lambda pair: len(pair[1]))
    batches = [as_batch(*zip(*pairs[k:k + 50]), cfg.context) for k in range(0, len(pairs), 50)]
    for source, target, answers in batches:
        places = np.flatnonzero(answers >= 0)
        z, _ = transformer_forward(params, source, target, cfg, places)
        if cfg.copy:
            loss, _ = copy_cross_entropy_forward(z, answers.ravel()[places], source[places // target.shape[1]], 0.0)
        else:
            loss, _ = smoothed_cross_entropy_forward(z, answers.ravel()[places], 0.0)
        total += float(loss) * len(places)
        count += len(places)
    return total / count


def learn_pairs(cfg, rng):
    """Translate, or shorten: whatever the pairs do."""
    data = pairs_of(cfg)
    words = data["vocabulary"]
    announce_model(cfg, f"{len(data['train'])} pairs, {words.size} kinds of tokens", f"loss {math.log(words.size):.3f}")
    sources, references = zip(*data["validation"][:200])

    def note(params):
        outputs, _ = translate(params, sources, cfg, 1)
        return f"  validation {held_out(params, cfg):.4f} bleu " + "{:.1f} rouge {:.1f} {:.1f} {:.1f}".format(
            *pair_scores(outputs, references).values())
    params, progress = train_transformer(cfg, rng, note)
    print("loss", loss_curve(progress.losses or [0]))
    found = {"validation": held_out(params, cfg)}
    sources, references = zip(*data["test"])
    lead = pair_scores([" ".join(source.split()[:12]) for source in sources], references)
    print("the first twelve words of the source: " + "  ".join(f"{name} {value:.2f}" for name, value in lead.items()))
    for beam in sorted({1, cfg.beam}):
        start = time.perf_counter()
        outputs, logp = translate(params, sources, cfg, beam)
        found.update(pair_scores(outputs, references))
        print(f"beam {beam}: " + "  ".join(f"{name} {value:.2f}" for name, value in list(found.items())[1:])
              + f"   mean log p {logp.mean():.3f}, {time.perf_counter() - start:.1f} s for {len(outputs)} test lines")
    for k in range(0, len(outputs), -(-len(outputs) // 10)):
        print("".join(f"  {name:<10s}{text.strip()[:200]}\n" for name, text in (
            ("source", sources[k]), ("reference", references[k]), ("output", outputs[k]))))
    return found, params, progress


def pair_scores(outputs, references):
    """BLEU and ROUGE of texts, in percent."""
    score = bleu([bleu_tokens(text) for text in outputs], [bleu_tokens(text) for text in references])
    return {"bleu": score, **rouge([rouge_tokens(text) for text in outputs], [rouge_tokens(t) for t in references])}


def main(cfg):
    """Learn the pairs of a file."""
    start = time.perf_counter()
    require(cfg.data, "--data", "a file of lines source TAB target (there is no built-in task yet)", cfg.data)
    print("translation.py: words in, words out")
    figures, params, progress = learn_pairs(cfg, np.random.default_rng(cfg.seed))
    print_result(task=cfg.task, **figures, params=sum(p.size for p in params.values()), steps=progress.step,
                 seconds=time.perf_counter() - start,
                 examples_per_s=int(len(progress.losses) * cfg.batch / max(progress.seconds, 1e-9)))


# ---- workers: one batch, several processes ---------------------------------------------------------------------------

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL", "VECLIB", "BLIS")}
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}      # see run()


@contextlib.contextmanager
def ignoring(name):
    """While this lasts, a signal, if the platform knows it, does nothing."""
    number = getattr(signal, name, None)
    previous = number and signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        if number:
            signal.signal(number, previous)


def memory_plan(arrays):
    """Where each array of a dict goes in a block of memory -> {name: (start, shape, dtype)}, size of the block."""
    plan, size = {}, 0
    for name, a in arrays.items():
        plan[name] = size, a.shape, a.dtype
        size += -(-a.nbytes // 64) * 64                 # each begins at a multiple of 64 bytes
    return plan, size


def shared_arrays(block, plan):
    """The arrays of a memory_plan, as views into a block of shared memory -> {name: array}."""
    return {name: np.frombuffer(block, dtype, math.prod(shape), start).reshape(shape)
            for name, (start, shape, dtype) in plan.items()}


def work_through(params, parts, cfg, grads, running):
    """Add up loss, gradients and running statistics of some parts of a batch, each times its weight: into grads and
    running -> loss. Every part begins with the same running statistics, as if all were done at once."""
    total, before = 0.0, {name: a.copy() for name, a in running.items()}
    for a in (*grads.values(), *running.values()):
        a[...] = 0
    for weight, part in parts:
        after = {name: a.copy() for name, a in before.items()}
        loss, found = loss_and_grads(params, part, cfg, *[after] * bool(after))
        total += weight * float(loss)
        for name, g in found.items():
            grads[name] += weight * g
        for name, a in after.items():
            running[name] += weight * a
    return total


def worker(pipe, cfg, blocks, plans):
    """What a worker process does: wait for parts of a batch, work through them, answer with the loss; until the pipe
    closes. Parameters, gradients and running statistics are in shared memory, so they need not be sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches every process; the first one decides
    np.seterr(over="ignore", invalid="ignore")
    params, running, grads, after = map(shared_arrays, blocks, plans)
    with contextlib.suppress(EOFError, OSError):
        while True:
            parts = pipe.recv()
            for name, a in running.items():
                after[name][...] = a
            try:
                answer = work_through(params, parts, cfg, grads, after)
            except MemoryError as error:
                answer = f"out of memory: {error}"
            pipe.send(answer)


class Workers:
    """Data-parallel training. Element-wise NumPy runs on one core, so a second core comes from a second process: each
    takes some parts of the batch, all with the same parameters, and the gradients of the parts are added up. So the
    update, and the course of the loss, is that of one process, up to the rounding of sums in another order."""

    def __init__(self, cfg, params, running=None):
        self.cfg, self.running, self.processes, self.pipes = cfg, running or {}, [], []
        self.grads = {name: np.zeros_like(p) for name, p in params.items()}
        if cfg.workers == 1:                            # then this process does it all
            return
        plans, sizes = zip(*map(memory_plan, (params, self.running)))
        start, environ = multiprocessing.get_context("spawn"), dict(os.environ)
        os.environ.update({**ONE_THREAD, **KEEP_MEMORY})            # read when NumPy is imported, so only by them
        try:
            common = [start.RawArray("b", size + 1) for size in sizes]      # parameters, running: read by all
            self.shared, self.results = list(map(shared_arrays, common, plans)), []
            for _ in range(cfg.workers):
                own = [start.RawArray("b", size + 1) for size in sizes]     # gradients, running: written by one
                self.results.append(list(map(shared_arrays, own, plans)))
                pipe, end = start.Pipe()
                self.pipes.append(pipe)
                self.processes.append(start.Process(target=worker, daemon=True,
                                                    args=(end, cfg, [*common, *own], plans * 2)))
                with ignoring("SIGINT"):                # they inherit it, and Ctrl-C finds them ready at any time
                    self.processes[-1].start()
                end.close()
        except (OSError, ImportError, RuntimeError) as error:
            self.close()
            raise InputError(f"--workers {cfg.workers}: expected a platform that starts processes with shared memory, "
                             f"found: {error} (without the flag it runs in one process)") from None
        finally:
            os.environ.clear()
            os.environ.update(environ)

    def loss_and_grads(self, params, parts):
        """parts [(weight, part of a batch), ...] -> loss, gradients; running is brought up to date as well."""
        if not self.processes:
            return work_through(params, parts, self.cfg, self.grads, self.running), self.grads
        for views, values in zip(self.shared, (params, self.running)):
            for name, a in values.items():
                views[name][...] = a
        for k, pipe in enumerate(self.pipes):
            with ignoring("SIGPIPE"), contextlib.suppress(OSError):         # a dead one is noticed below
                pipe.send(parts[k::len(self.pipes)])
        total = sum(self.answer(k) for k in range(len(self.pipes)))
        for k, (grads, running) in enumerate(self.results):
            for own, found in ((self.grads, grads), (self.running, running)):
                for name, a in found.items():
                    own[name][...] = a if k == 0 else own[name] + a
        return total, self.grads

    def answer(self, k):
        """The loss from worker k, or MemoryError if it has died: most often the system ended it for want of memory."""
        process, answer = self.processes[k], None
        with contextlib.suppress(EOFError, OSError):
            answer = self.pipes[k].recv()
        if isinstance(answer, float):
            return answer
        process.join(1)
        raise MemoryError(f"worker {k + 1} of {len(self.processes)}, process {process.pid}: expected a loss, found "
                          f"{answer or f'its end (exit code {process.exitcode})'}; fewer --workers need less memory")

    def close(self):
        """End all workers: their pipes close, and whoever does not leave within seconds is ended."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            if process.pid:
                process.join(5)
                process.terminate()
        self.processes, self.pipes = [], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


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


GRADCHECK = {"attention": lambda rng: dict(     # inputs for gradcheck.py: heads after positions
    q=rng.standard_normal((2, 5, 3, 6)), k=rng.standard_normal((2, 7, 3, 6)),
    v=rng.standard_normal((2, 7, 3, 6)), mask=np.where(rng.random((2, 1, 1, 7)) < 0.3, -1e9, 0.0))}


if __name__ == "__main__":
    run(main)
