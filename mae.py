# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""mae.py: hide most of a picture, learn to fill it in.

Labels are rare, pictures are not. What can be learned from pictures alone? Cut them into patches, hide three out of
four, and let a net fill in what is missing: it has to find out what goes with what, and so learns features that also
tell what is in the picture. Two nets share the work (He 2022). The encoder, a transformer, sees the visible patches
only, so it is fast. A light decoder gets what the encoder made of them, puts the same learned "mask token" in every
hidden place, adds where each place is, and says the hidden pixels. Then the decoder is thrown away. What the encoder's
features are worth, a linear probe tells: a linear map to the classes, learned from few labels, beside one on the pixels
and one on an untrained encoder.

Forward, x (N, T, P) patches, order: the places of each picture, the visible ones v first, then the hidden ones h
    tokens = blocks(x[v] Wp + bp + Penc[v])                       the encoder; x[v] is a gather
    y = blocks(scatter(tokens Wd + bd to v, mask token to h) + Pdec)        the decoder
    loss = mean (y[h] Wx + bx - x[h])^2                           the hidden patches only, else it would learn to copy
    a block:  x += attention(norm(x)),  x += net(norm(x))         as in transformer.py
Backward: gather and scatter are each other's backward.
    y = x[v]               dx = dy scattered to v, 0 elsewhere: what was not taken has no influence
    y = scatter(x, token)  dx = dy[v],  dtoken = sum of dy[h]: it stands in all of these places
With --norm-pixels each patch is to be filled in with mean 0 and variance 1: what is left is structure, and on
photographs the features get better. To draw such a patch, its mean and deviation are guessed from those near it.

Run
    python mae.py                                      ten shapes of any place, size and colour
    python mae.py --finetune --png shapes.png          then train the whole encoder on 190 labels, 37 %, and one from
                                                       scratch, 20 %; pictures in colour
    python mae.py --task mnist --data mnist            digits (mlp.py --help says where to get the folder)
    python mae.py --task cifar --data cifar-10-binary.tar.gz --workers 2 --save mae.npz --png mae.png
        curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    and if it was interrupted, the same with --load mae.npz. With 500 labels, a linear probe is right on 51.7 % of the
    test pictures, 1.66 times as often as on raw pixels. For a first look: --steps 3516 --lr 0.0015 --warmup 400

Break it
    x + params["Pdec"] -> x + 0 * params["Pdec"] in mae_decoder_forward: a mask token no longer knows its place, so all
        hidden patches of a picture look alike; error 0.21 -> 0.29 (mean patch: 0.37), probe with 190 labels 36 -> 29 %
    --masked 0.25: the error falls to 0.16, for gaps are small; the probe with 190 labels gains nothing (36 %), with
        19,000 it does (66 -> 72 %). --masked 0.5 is best here (42 %, 74 %): of 16 patches, 4 are very few
    --norm-pixels: here it gains nothing (error 0.24, probe 37 %): in even patches the noise is all that is left
    (t.mean(axis=1), t.std(axis=1)) -> (t.mean(axis=1),) in features: with 190 labels 36 -> 29 %, untrained
        29 -> 16 %: a mean forgets how much the patches of a picture differ

Papers: Vincent et al. 2008 (denoising autoencoders); Vaswani et al. 2017 (transformers); Dosovitskiy et al. 2021
(patches as tokens); He et al. 2022 (masked autoencoders).
"""
import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np


@dataclass
class Config:
    """Hyperparameters. Edit a line, or pass its name as a flag: --lr 0.1"""
    task: Literal["shapes", "cifar", "mnist"] = "shapes"  # pictures of what
    size: int = 16          # shapes: pixels a side
    patch: int = 4          # pixels a side of a patch; patches are the tokens
    masked: float = 0.75    # share of the patches that are hidden
    norm_pixels: bool = False  # fill in each patch with mean 0, variance 1, instead of its pixels
    layers: int = 2         # blocks of the encoder
    heads: int = 4          # attentions side by side, each on its share of the width
    width: int = 64         # numbers that stand for a token
    decoder_layers: int = 1  # blocks of the decoder
    decoder_width: int = 32  # its width
    flip: bool = False      # mirror half of the pictures
    crop: int = 0           # shift the pictures by up to so many pixels
    lr: float = 0.004       # learning rate at its height
    decay: float = 0.05     # share of every matrix that is taken off, times lr
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # course of the learning rate
    warmup: int = 100       # steps in which it rises from 0
    steps: int = 3000       # updates
    batch: int = 32         # pictures an update
    workers: int = 1        # processes that share the work of a batch
    finetune: bool = False  # afterwards, train the whole encoder on labels, too
    labels: float = 0.01    # finetune: share of the labels that is used
    tune_steps: int = 500   # finetune: updates
    png: str = ""           # file to paint the reconstructions in, in colour
    data: str = ""          # cifar: cifar-10-binary.tar.gz or its folder; mnist: the folder of MNIST
    save: str = ""          # file (.npz) to keep parameters and state of the training in
    load: str = ""          # such a file to go on from
    seed: int = 0           # of every random draw

    def __post_init__(self):
        for name in ("steps", "batch", "size", "patch", "layers", "decoder_layers", "heads", "width", "decoder_width",
                     "workers", "tune_steps"):
            require(getattr(self, name) >= 1, "--" + name.replace("_", "-"), "1 or more", getattr(self, name))
        for name in ("crop", "decay", "warmup", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        require(0 < self.labels <= 1, "--labels", "a number above 0, up to 1", self.labels)
        require(0 < self.lr < math.inf, "--lr", "a number above 0", self.lr)
        for name in ("width", "decoder_width"):
            require(getattr(self, name) % self.heads == 0, "--" + name.replace("_", "-"),
                    f"a multiple of --heads {self.heads}", getattr(self, name))
        side = picture_size(self)
        require(side % self.patch == 0, "--patch", f"a divisor of {side}, the pixels a side", self.patch)
        require(0 < self.masked < 1, "--masked", "a number between 0 and 1", self.masked)
        require(0 < visible_patches(self) < patch_count(self), "--masked",
                f"at least one patch hidden and one visible of {patch_count(self)} (--size, --patch)", self.masked)
        require(self.crop < side, "--crop", f"less than {side}, the side", self.crop)
        require(not self.data or self.task != "shapes", "--data", "--task cifar or mnist with it", self.task)
        require(self.workers <= self.batch, "--workers", f"at most --batch {self.batch}", self.workers)


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "cifar": dict(norm_pixels=True, layers=4, width=128, decoder_layers=2, decoder_width=64, flip=True, crop=4,
                  lr=0.0025, warmup=500, steps=20000, batch=64),
    "mnist": dict(norm_pixels=True, layers=4, decoder_layers=2, crop=2, lr=0.0025, steps=4000, batch=64),
}


# ---- layers: N pictures, T patches of P numbers, K of them visible, D width, H heads ---------------------------------

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


PORTION = 2 ** 16        # numbers that are worked on at once: a quarter of a megabyte


def portions(x):
    """Slices of the rows of x, of about PORTION numbers each. Several passes over an array are faster over one portion
    after the other, since that stays in the cache of a core."""
    n = max(1, PORTION // x[0].size)
    return [slice(i, i + n) for i in range(0, len(x), n)]


def vit_block_forward(x, p, heads, N):
    """y = x + attention(norm(x)), every patch looks at all of its picture;  z = y + net(norm(y)), each patch by itself.
    x (N T, D) -> (N T, D).   p: Wqkv (D, 3 D), Wo (D, D), W1 (D, 4 D), W2 (4 D, D), biases; gamma and beta twice."""
    D = x.shape[1]
    y, norm1_cache = layernorm_forward(x, p["gamma1"], p["beta1"])
    y, qkv_cache = linear_forward(y, p["Wqkv"], p["bqkv"])
    q, k, v = (a.reshape(N, -1, heads, D // heads) for a in np.split(y.reshape(N, -1, 3 * D), 3, axis=2))
    y, attention_cache = attention_forward(q, k, v)
    y, out_cache = linear_forward(y.reshape(-1, D), p["Wo"], p["bo"])
    x = x + y
    y, norm2_cache = layernorm_forward(x, p["gamma2"], p["beta2"])
    y, in_cache = linear_forward(y, p["W1"], p["b1"])
    a, gelu_caches = np.empty_like(y), []
    for rows in portions(y):
        a[rows], cache = gelu_forward(y[rows])
        gelu_caches.append(cache)
    y, net_cache = linear_forward(a, p["W2"], p["b2"])
    return x + y, (norm1_cache, qkv_cache, attention_cache, out_cache, norm2_cache, in_cache, gelu_caches, net_cache)


def vit_block_backward(dout, cache):
    """vit_block_forward from bottom to top; x is used twice, so gradients add.   dout (N T, D) -> dx, grads."""
    norm1_cache, qkv_cache, attention_cache, out_cache, norm2_cache, in_cache, gelu_caches, net_cache = cache
    grads = {}
    d, grads["W2"], grads["b2"] = linear_backward(dout, net_cache)
    for rows, cache in zip(portions(d), gelu_caches):
        d[rows] = gelu_backward(d[rows], cache)
    d, grads["W1"], grads["b1"] = linear_backward(d, in_cache)
    d, grads["gamma2"], grads["beta2"] = layernorm_backward(d, norm2_cache)
    dout = dout + d
    d, grads["Wo"], grads["bo"] = linear_backward(dout, out_cache)
    dqkv = attention_backward(d.reshape(attention_cache[-1].shape), attention_cache)
    dqkv = np.stack(dqkv, axis=2).reshape(len(d), -1)
    d, grads["Wqkv"], grads["bqkv"] = linear_backward(dqkv, qkv_cache)
    d, grads["gamma1"], grads["beta1"] = layernorm_backward(d, norm1_cache)
    return dout + d, grads


def embedding_forward(ids, E):
    """The row of E that each number names.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """A row of E gets the sum of dout over the places where it stands: a product with a (V, places) table of 0, 1."""
    ids, shape = cache
    stands = np.arange(shape[0])[:, None] == ids.ravel()
    return stands.astype(dout.dtype) @ dout.reshape(-1, shape[1])


def gather_forward(x, places):
    """Some tokens of each picture.   x (N, T, D), places (N, K), all different in a row -> (N, K, D)."""
    return x[np.arange(len(x))[:, None], places], (places, x.shape)


def gather_backward(dout, cache):
    """Scatter: what was taken from a place gets its gradient there, what was left out has none."""
    places, shape = cache
    dx = np.zeros(shape, dout.dtype)
    dx[np.arange(len(dx))[:, None], places] = dout
    return dx


def scatter_forward(x, token, order):
    """Put tokens in their places, and the same token everywhere else.
    x (N, K, D), token (D,), order (N, T): the places of x, then the others -> (N, T, D)."""
    out = np.empty((*order.shape, len(token)), x.dtype)
    out[...] = token
    out[np.arange(len(x))[:, None], order[:, :x.shape[1]]] = x
    return out, (order, x.shape[1])


def scatter_backward(dout, cache):
    """Gather: each token's gradient is at its place; the token that stands everywhere else adds those up."""
    order, K = cache
    rows = np.arange(len(dout))[:, None]
    D = dout.shape[2]
    return dout[rows, order[:, :K]], dout[rows, order[:, K:]].reshape(-1, D).sum(axis=0)


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


# ---- model -----------------------------------------------------------------------------------------------------------

def patch_count(cfg):
    """Patches of a picture, T."""
    return (picture_size(cfg) // cfg.patch) ** 2


def visible_patches(cfg):
    """How many of them the encoder sees in training, K."""
    return round(patch_count(cfg) * (1 - cfg.masked))


def to_patches(x, patch):
    """Cut pictures into squares.   x (N, H, W, C) -> (N, T, P), P = patch patch C."""
    N, H, W, C = x.shape
    x = x.reshape(N, H // patch, patch, W // patch, patch, C)
    return x.swapaxes(2, 3).reshape(N, -1, patch * patch * C)


def to_pictures(x, patch, side):
    """The way back.   x (N, T, P) -> (N, side, side, C)."""
    n = side // patch
    x = x.reshape(len(x), n, n, patch, patch, -1)
    return x.swapaxes(2, 3).reshape(len(x), side, side, -1)


def init_params(cfg, rng, dtype=np.float32):
    """Wp, bp, Penc: of patches and their places; enc0., ...: blocks; norm. the last norm of the encoder. Then the
    decoder: Wd, bd, token, Pdec, dec0., ..., dec_norm., Wx, bx;  or, with finetune, Wy, by: ten classes."""
    D, E, P, T, params = cfg.width, cfg.decoder_width, cfg.patch ** 2 * task_channels(cfg), patch_count(cfg), {}

    def linear(W, b, rows, columns, gain=1.0):
        params[W] = rng.standard_normal((rows, columns)) * (gain * (2 / (rows + columns)) ** 0.5)
        params[b] = np.zeros(columns)

    def norm(gamma, beta, columns):
        params[gamma], params[beta] = np.ones(columns), np.zeros(columns)

    def blocks(side, D, layers):
        params["P" + side] = 0.02 * rng.standard_normal((T, D))
        for k in range(layers):
            at = f"{side}{k}."
            norm(at + "gamma1", at + "beta1", D)
            linear(at + "Wqkv", at + "bqkv", D, 3 * D)
            linear(at + "Wo", at + "bo", D, D, (2 * layers) ** -0.5)        # many small steps add up to one
            norm(at + "gamma2", at + "beta2", D)
            linear(at + "W1", at + "b1", D, 4 * D)
            linear(at + "W2", at + "b2", 4 * D, D, (2 * layers) ** -0.5)
        norm(side + ".gamma", side + ".beta", D)
    linear("Wp", "bp", P, D)
    blocks("enc", D, cfg.layers)
    if cfg.finetune:
        linear("Wy", "by", D, 10)
    else:
        linear("Wd", "bd", D, E)
        params["token"] = 0.02 * rng.standard_normal(E)
        blocks("dec", E, cfg.decoder_layers)
        linear("Wx", "bx", E, P)
    return {name: value.astype(dtype) for name, value in params.items()}


def part(params, name):
    """The parameters whose names begin with "name.", without it."""
    return {key[len(name) + 1:]: value for key, value in params.items() if key.startswith(name + ".")}


def blocks_forward(x, params, side, cfg):
    """All blocks of the encoder (side enc) or decoder (dec), then the last norm.   x (N, T, D) -> (N T, D)."""
    N, _, D = x.shape
    x, caches, outputs = x.reshape(-1, D), [], []
    for k in range(cfg.layers if side == "enc" else cfg.decoder_layers):
        x, cache = vit_block_forward(x, part(params, f"{side}{k}"), cfg.heads, N)
        caches.append(cache)
        outputs.append(x)
    x, norm_cache = layernorm_forward(x, params[side + ".gamma"], params[side + ".beta"])
    return x, (caches, norm_cache, side, outputs, N, cfg)


def blocks_backward(dout, cache):
    """blocks_forward from bottom to top.   dout (N T, D) -> dx (N, T, D), gradients."""
    caches, norm_cache, side, _, N, _ = cache
    grads = {}
    dx, grads[side + ".gamma"], grads[side + ".beta"] = layernorm_backward(dout, norm_cache)
    for k, block_cache in reversed(list(enumerate(caches))):
        dx, found = vit_block_backward(dx, block_cache)
        grads.update({f"{side}{k}.{name}": g for name, g in found.items()})
    return dx.reshape(N, -1, dx.shape[1]), grads


def vit_encoder_forward(params, patches, places, cfg):
    """Patches in some places of each picture, all it ever sees.   patches (N, T, P), places (N, K) -> (N K, D)."""
    N, K = places.shape
    seen, _ = gather_forward(patches, places)                   # of the picture itself nobody needs a gradient
    x, in_cache = linear_forward(seen.reshape(N * K, -1), params["Wp"], params["bp"])
    position, position_cache = embedding_forward(places, params["Penc"])
    x, cache = blocks_forward(x.reshape(N, K, -1) + position, params, "enc", cfg)
    return x, (in_cache, position_cache, cache, cfg)


def vit_encoder_backward(dout, cache):
    """vit_encoder_forward from bottom to top -> gradients under the keys of params."""
    in_cache, position_cache, cache, cfg = cache
    dx, grads = blocks_backward(dout, cache)
    grads["Penc"] = embedding_backward(dx, position_cache)
    _, grads["Wp"], grads["bp"] = linear_backward(dx.reshape(-1, cfg.width), in_cache)
    return grads


def mae_decoder_forward(params, x, order, cfg):
    """What the encoder made of the visible patches, in their places, elsewhere the mask token -> the hidden patches.
    x (N K, D), order (N, T): visible places, then hidden ones -> (N (T - K), P)."""
    N, K = len(order), len(x) // len(order)
    x, in_cache = linear_forward(x, params["Wd"], params["bd"])
    x, scatter_cache = scatter_forward(x.reshape(N, K, -1), params["token"], order)
    x, cache = blocks_forward(x + params["Pdec"], params, "dec", cfg)
    x, gather_cache = gather_forward(x.reshape(*order.shape, -1), order[:, K:])
    z, out_cache = linear_forward(x.reshape(-1, cfg.decoder_width), params["Wx"], params["bx"])
    return z, (in_cache, scatter_cache, cache, gather_cache, out_cache, cfg)


def mae_decoder_backward(dout, cache):
    """mae_decoder_forward from bottom to top -> dx (N K, D), gradients."""
    in_cache, scatter_cache, cache, gather_cache, out_cache, cfg = cache
    dx, dWx, dbx = linear_backward(dout, out_cache)
    N, hidden = gather_cache[0].shape
    dx = gather_backward(dx.reshape(N, hidden, -1), gather_cache)
    dx, grads = blocks_backward(dx.reshape(-1, cfg.decoder_width), cache)
    grads.update(Wx=dWx, bx=dbx, Pdec=dx.sum(axis=0))
    dx, grads["token"] = scatter_backward(dx, scatter_cache)
    dx, grads["Wd"], grads["bd"] = linear_backward(dx.reshape(-1, cfg.decoder_width), in_cache)
    return dx, grads


def classifier_forward(params, x, cfg):
    """The mean of the tokens, a linear layer: ten classes.   x (N T, D) -> (N, 10)."""
    T = patch_count(cfg)
    x = x.reshape(-1, T, cfg.width).mean(axis=1)
    z, cache = linear_forward(x, params["Wy"], params["by"])
    return z, (cache, T, cfg)


def classifier_backward(dout, cache):
    """classifier_forward from bottom to top; each token has 1 / T of the mean -> dx (N T, D), gradients."""
    cache, T, cfg = cache
    dx, dWy, dby = linear_backward(dout, cache)
    return np.repeat(dx * (1 / T), T, axis=0), {"Wy": dWy, "by": dby}


def wanted_patches(patches, cfg):
    """What the decoder should say: the patches, or with norm_pixels each less its mean, over its deviation."""
    if not cfg.norm_pixels:
        return patches
    centred = patches - patches.mean(axis=-1, keepdims=True)
    return centred * ((centred * centred).mean(axis=-1, keepdims=True) + 1e-6) ** -0.5


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params. The loss is the squared error on
    the hidden patches; with finetune, the cross-entropy of the classes, and the encoder sees everything."""
    x, order, *targets = batch
    patches = to_patches(x, cfg.patch)
    if cfg.finetune:
        x, cache = vit_encoder_forward(params, patches, order, cfg)
        z, top_cache = classifier_forward(params, x, cfg)
        loss, loss_cache = softmax_cross_entropy_forward(z, targets[0])
        dx, grads = classifier_backward(softmax_cross_entropy_backward(1.0, loss_cache), top_cache)
    else:
        K = visible_patches(cfg)
        x, cache = vit_encoder_forward(params, patches, order[:, :K], cfg)
        z, top_cache = mae_decoder_forward(params, x, order, cfg)
        hidden = wanted_patches(gather_forward(patches, order[:, K:])[0], cfg)
        loss, loss_cache = mse_forward(z, hidden.reshape(z.shape))
        dx, grads = mae_decoder_backward(mse_backward(1.0, loss_cache), top_cache)
    grads.update(vit_encoder_backward(dx, cache))
    return loss, grads


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


# ---- data ------------------------------------------------------------------------------------------------------------

SHAPES = "disc ring square frame triangle diamond plus cross lines bars".split()


CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()


def draw_shapes(labels, size, rng):
    """Pictures of ten shapes: any place, size, colour, and noise.   labels (N,) -> (N, size, size, 3), mean about 0."""
    N = len(labels)
    radius = rng.uniform(0.3, 0.45, N) * size
    center = radius + rng.random((2, N)) * (size - 1 - 2 * radius)
    y, x = ((np.arange(size) - c[:, None]) / radius[:, None] for c in center)
    y, x = y[:, :, None], x[:, None, :]
    r, far, sum_, X, Y = np.hypot(x, y), np.maximum(abs(x), abs(y)), abs(x) + abs(y), abs(x) + 0 * y, abs(y) + 0 * x
    inside = [r < 1, (r < 1) & (r > 0.6), far < 0.85, (far < 0.85) & (far > 0.45),
              (y < 0.75) & (X < (y + 1) * 0.55), sum_ < 1.05, (np.minimum(X, Y) < 0.25) & (far < 1),
              (abs(X - Y) < 0.3) & (far < 0.8), (abs(Y - 0.55) < 0.22) & (X < 0.9), (abs(X - 0.55) < 0.22) & (Y < 0.9)]
    inside = np.choose(labels[:, None, None], inside)[..., None]
    ground, ink = rng.random((2, N, 1, 1, 3))
    ink = np.where(abs(ink - ground).sum(axis=3, keepdims=True) < 0.75, 1 - ground.round(), ink)  # must be seen
    return (np.where(inside, ink, ground) - 0.5) * 2 + 0.2 * rng.standard_normal((N, size, size, 3))


def task_channels(cfg):
    """Colours of a picture."""
    return 1 if cfg.task == "mnist" else 3


def picture_size(cfg):
    """Pixels a side."""
    return cfg.size if cfg.task == "shapes" else 32 if cfg.data else 8


def normalised(pictures, cfg, dtype=np.float32):
    """Bytes (N, H, W, C) -> numbers of about mean 0, variance 1."""
    mean, std = ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]) if cfg.task == "cifar" else ([33.3], [78.6])
    return (pictures - np.array(mean, dtype)) * np.array([1 / s for s in std], dtype)


def crop_and_flip(pictures, reach, flip, rng):
    """Move each picture by up to reach pixels, what is missing being reflected, and mirror half of them."""
    N, H, W, _ = pictures.shape
    down, right = rng.integers(-reach, reach + 1, (2, N, 1))
    row, column = np.arange(H) + down, np.arange(W) + right
    row, column = (np.abs((n - 1) - np.abs((n - 1) - i)) for i, n in ((row, H), (column, W)))
    if flip:
        column = np.where(rng.random((N, 1)) < 0.5, column[:, ::-1], column)
    return pictures[np.arange(N)[:, None, None], row[:, :, None], column[:, None, :]]


@functools.lru_cache(2)
def epoch_order(n, seed, epoch):
    """The training pictures in random order, another in each epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def make_batch(cfg, rng, dtype=np.float32, step=None):
    """-> x (N, H, W, C), order (N, T): the first K patches are visible, the others hidden, a draw for each picture.
    With finetune: all places in their order, and targets (N,).   Shapes are always new; of other data each picture
    comes once an epoch if the step is given, else random ones; of those with labels, random ones."""
    if cfg.finetune:
        x, targets = labelled(cfg, "train")
        pick = rng.integers(0, labels_used(cfg), cfg.batch)
    elif cfg.task == "shapes":
        x, targets = draw_shapes(rng.integers(0, 10, cfg.batch), cfg.size, rng), None
        pick = np.arange(cfg.batch)
    else:
        x, targets = labelled(cfg, "train")
        pick = next_pictures(len(x), cfg, step) if step else rng.integers(0, len(x), cfg.batch)
    x = numbers(crop_and_flip(x[pick], cfg.crop, cfg.flip, rng), cfg).astype(dtype)
    if cfg.finetune:
        return x, every_place(len(x), cfg), targets[pick]
    return x, random_order(len(x), cfg, rng)


def next_pictures(n, cfg, step):
    """Which of n pictures are in the batch of this step, if they come in random order, another in each epoch."""
    places = np.arange((step - 1) * cfg.batch, step * cfg.batch)
    return np.concatenate([epoch_order(n, cfg.seed, e)[places[places // n == e] % n] for e in np.unique(places // n)])


def labelled(cfg, split):
    """Pictures with labels: train, validation or test -> x (N, H, W, C), bytes or (shapes) numbers, y (N,)."""
    return (shape_collection(cfg.size) if cfg.task == "shapes" else load_pictures(cfg.task, cfg.data))[split]


@functools.lru_cache
def shape_collection(size):
    """Shapes with labels -> {"train": 19000 of them, "validation": 1000, "test": 2000}."""
    rng, x, y = np.random.default_rng(99), [], []
    for _ in range(22):                                 # a thousand at a time
        y.append(rng.integers(0, 10, 1000))
        x.append(draw_shapes(y[-1], size, rng).astype(np.float32))
    return {split: (np.concatenate(x[a:b]), np.concatenate(y[a:b]))
            for split, a, b in (("train", 0, 19), ("validation", 19, 20), ("test", 20, 22))}


def numbers(x, cfg):
    """Pictures as the model wants them: bytes are scaled to mean 0, variance 1."""
    return normalised(x, cfg) if x.dtype == np.uint8 else x


def random_order(N, cfg, rng):
    """The places of N pictures, each in an order of its own -> (N, T)."""
    return rng.random((N, patch_count(cfg)), np.float32).argsort(axis=1)


def labels_used(cfg):
    """How many labels --finetune may use."""
    return max(1, round(cfg.labels * len(labelled(cfg, "train")[1])))


def every_place(N, cfg):
    """All places in their order, for N pictures -> (N, T)."""
    return np.tile(np.arange(patch_count(cfg)), (N, 1))


def cut_batch(batch, parts):
    """A batch in parts of equal size, or nearly -> [(share of the pictures, part), ...]."""
    N = len(batch[1])
    edges = [N * k // parts for k in range(parts + 1)]
    return [((b - a) / N, tuple(x if x is None else x[a:b] for x in batch)) for a, b in zip(edges, edges[1:])]


def read_idx(path):
    """An IDX file of bytes, gzipped or not: 0 0 8 ndim, the sizes as big-endian uint32, the bytes -> array."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        require(False, path, "a whole gzip file", str(error))
    whole = raw[:3] == b"\0\0\x08" and len(raw) >= 4 + 4 * raw[3]
    require(whole, path, "an IDX file of bytes (0 0 8) with its sizes", raw[:8])
    sizes = np.frombuffer(raw[4:4 + 4 * raw[3]], ">u4").tolist()
    body = np.frombuffer(raw[4 + 4 * raw[3]:], np.uint8)
    require(len(body) == np.prod(sizes), path, f"{' x '.join(map(str, sizes))} bytes after the header", len(body))
    return body.reshape(sizes)


def load_idx_pictures(folder):
    """The four files of MNIST, or of another set in its layout -> {"train": (bytes (N, 32, 32, 1), labels), "test"}.
    28 x 28 pixels get a frame, for 28 can be halved only twice."""
    parts = {}
    for prefix, split in (("train", "train"), ("t10k", "test")):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{prefix}-{kind}-ubyte"
            paths = [path for path in (Path(folder) / f"{name}.gz", Path(folder) / name) if path.is_file()]
            require(paths, f"--data {folder}", f"a folder with {name}.gz", "no such file")
            parts[kind[:6]] = read_idx(paths[0])
        x, y = parts["images"], parts["labels"]
        require(x.shape == (len(y), 28, 28) and y.max(initial=0) < 10, f"--data {folder}",
                f"{prefix}: as many 28 x 28 pictures as labels from 0 to 9", f"{x.shape} and {y.shape}")
        parts[split] = np.pad(x[..., None], ((0, 0), (2, 2), (2, 2), (0, 0))), y.astype(int)
    return parts


CIFAR_FILES = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]


def load_cifar(path):
    """CIFAR-10 in its binary layout, cifar-10-binary.tar.gz or its folder: a label byte, then 32 x 32 reds, greens and
    blues, 10,000 times a file -> {"train": (bytes (N, 32, 32, 3), labels), "test"}."""
    where, files = f"--data {path}", {}
    try:
        if Path(path).is_dir():
            folder = Path(path) / "cifar-10-batches-bin"
            folder = folder if folder.is_dir() else Path(path)
            files = {name: (folder / name).read_bytes() for name in CIFAR_FILES if (folder / name).is_file()}
        else:
            with tarfile.open(path) as archive:
                members = {Path(m.name).name: m for m in archive if m.isfile()}
                files = {name: archive.extractfile(m).read() for name, m in members.items() if name in CIFAR_FILES}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        found = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        require(False, where, "cifar-10-binary.tar.gz or its folder", found)
    parts = []
    for name in CIFAR_FILES:
        require(name in files, where, f"cifar-10-binary.tar.gz or its folder, with {name}", "no such file in it")
        raw = np.frombuffer(files[name], np.uint8)
        require(len(raw) > 0 and len(raw) % 3073 == 0, f"{where}, {name}", "pictures of 3073 bytes each", len(raw))
        raw = raw.reshape(-1, 3073)
        require(raw[:, 0].max() < 10, f"{where}, {name}", "labels from 0 to 9", int(raw[:, 0].max()))
        parts.append((raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), raw[:, 0].astype(int)))
    x, y = map(np.concatenate, zip(*parts[:5]))
    return {"train": (x, y), "test": parts[5]}


@functools.lru_cache
def load_pictures(task, path):
    """A data set, the last tenth (at most 5,000) of its training pictures set aside for validation. With no path, noise
    of 8 x 8: enough to check gradients on."""
    if not path:
        noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 3 if task == "cifar" else 1), np.uint8)
        return {"train": (noise, np.arange(500) % 10)}
    data = load_cifar(path) if task == "cifar" else load_idx_pictures(path)
    x, y = data["train"]
    require(len(x) >= 10, f"--data {path}", "10 training pictures or more", len(x))
    cut = len(x) - min(5000, len(x) // 10)
    return {"train": (x[:cut], y[:cut]), "validation": (x[cut:], y[cut:]), "test": data["test"]}


# ---- pictures in text ------------------------------------------------------------------------------------------------

SHADES = np.array(list(" .:-=+*#%@"))


def shade(values):
    """Numbers from 0 to 1 -> characters from blank to dark, in an array of the same shape."""
    return SHADES[(np.clip(values, 0, 1) * 9.99).astype(int)]


def loss_curve(losses, width=60):
    """The losses from first to last in one line of text, dark where high (the scale is logarithmic)."""
    means = np.log([np.mean(part) + 1e-12 for part in np.array_split(losses, min(width, len(losses)))])
    return "".join(shade((means - means.min()) / (np.ptp(means) + 1e-12)))


def side_by_side(titles, pictures, gap="   "):
    """Several pictures of equal height, each a list of lines, next to each other under their titles -> text."""
    columns = [[title, *lines] for title, lines in zip(titles, pictures)]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(gap.join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns))


def brightness(x, cfg):
    """Numbers of the model -> light from 0 to 1."""
    lo, hi = (-1, 1) if cfg.task == "shapes" else normalised(np.array([[0.0], [255.0]]), cfg)
    return np.clip((x - lo) * (1 / (hi - lo)), 0, 1)


def picture_lines(x, seen):
    """A picture as lines of text, blank where it is not seen.   x (H, W, C) from 0 to 1, seen (H, W)."""
    text = np.where(seen, shade(0.11 + 0.89 * x.mean(axis=2)), " ")
    text = text[::2] if len(x) > 20 else np.repeat(text, 2, axis=1)         # letters are twice as tall as they are wide
    return ["".join(row) for row in text]


def write_png(path, picture):
    """Colours (H, W, 3) from 0 to 1 as a PNG: a signature, then chunks of length, name, content and checksum."""
    H, W, _ = picture.shape
    rows = (255 * picture + 0.5).astype(np.uint8).reshape(H, 3 * W)
    rows = np.concatenate([np.zeros((H, 1), np.uint8), rows], axis=1)       # 0: this row is not filtered
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows.tobytes())),
              (b"IEND", b""))
    raw = b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
                   for name, body in chunks)
    try:
        Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + raw)
    except OSError as error:
        raise InputError(f"--png {path}: expected a place to write to, found: {error.strerror}") from None


# ---- training and demo -----------------------------------------------------------------------------------------------

def pretrain(cfg, rng, quiet=False):
    """-> params, progress."""
    params, first = init_params(cfg, rng), 0
    state = {"t": 0, **{f"{k} {name}": np.zeros_like(p) for k in "mv" for name, p in params.items()}}
    parts = {"params": params, "adam": state}
    about = {name: getattr(cfg, name) for name in ("task", "norm_pixels", "heads")}
    if cfg.load:
        first = load_checkpoint(cfg.load, rng, about, parts)
    if cfg.save:
        save_checkpoint(cfg.save, first, rng, about, parts, trial=True)    # before the work, not after it
    pieces = max(cfg.workers, cfg.batch // 32)          # what belongs to 32 pictures fits the cache of a core
    progress = Progress(cfg.steps, first + 1, quiet)
    with Workers(cfg, params) as workers:
        for step in progress:
            loss, grads = workers.loss_and_grads(params, cut_batch(make_batch(cfg, rng, step=step), pieces))
            adamw_update(params, grads, state, learning_rate(step, cfg), cfg.decay)
            progress.report(loss)
            if cfg.save and (step % 500 == 0 or step == cfg.steps or progress.stopped):
                save_checkpoint(cfg.save, step, rng, about, parts)
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


def guess_scales(patches, order, cfg):
    """With norm_pixels the decoder does not say how light a hidden patch is, or how contrasty: both are taken
    from the visible patches, near ones counting most.   (N, T, P), (N, T) -> means, deviations (N, T - K, 1)."""
    place = np.stack(np.divmod(np.arange(patch_count(cfg)), picture_size(cfg) // cfg.patch), axis=1)
    near = np.exp(-0.5 * ((place[:, None] - place) ** 2).sum(axis=2)).astype(patches.dtype)
    seen, hidden = np.split(order, [visible_patches(cfg)], axis=1)
    weight = near[hidden[:, :, None], seen[:, None]]
    weight *= 1 / weight.sum(axis=2, keepdims=True)
    known, _ = gather_forward(patches, seen)
    return weight @ known.mean(axis=2, keepdims=True), weight @ known.std(axis=2, keepdims=True)


def reconstruct(params, x, order, cfg):
    """Fill in the hidden patches, from the visible ones alone.   x (N, H, W, C), order (N, T) -> pictures; and the same
    with 1 where a pixel was seen, 0 where it was filled in."""
    patches, rows = to_patches(x, cfg.patch), np.arange(len(x))[:, None]
    seen, hidden = np.split(order, [visible_patches(cfg)], axis=1)
    tokens, _ = vit_encoder_forward(params, patches, seen, cfg)
    found = mae_decoder_forward(params, tokens, order, cfg)[0].reshape(*hidden.shape, -1)
    if cfg.norm_pixels:
        mean, deviation = guess_scales(patches, order, cfg)
        found = mean + deviation * found
    filled, known = patches.copy(), np.ones_like(patches)
    filled[rows, hidden], known[rows, hidden] = found, 0
    return tuple(to_pictures(a, cfg.patch, x.shape[1]) for a in (filled, known))


def reconstruction_errors(params, cfg, rng):
    """Mean squared error on the hidden pixels of 1000 held-out pictures; and if they were the mean visible patch."""
    x = numbers(labelled(cfg, "test")[0][:1000], cfg)
    order = random_order(len(x), cfg, rng)
    seen, hidden = np.split(order, [visible_patches(cfg)], axis=1)
    filled, true = (to_patches(a, cfg.patch) for a in (reconstruct(params, x, order, cfg)[0], x))
    true, found = gather_forward(true, hidden)[0], gather_forward(filled, hidden)[0]
    mean = gather_forward(to_patches(x, cfg.patch), seen)[0].mean(axis=1, keepdims=True)
    return float(((found - true) ** 2).mean()), float(((mean - true) ** 2).mean())


def loss_of_the_mean(cfg):
    """The loss of a decoder that knows no more than a mean: of each hidden patch, or of the visible ones."""
    x, order = make_batch(replace(cfg, batch=500), np.random.default_rng(cfg.seed))
    seen, hidden = (gather_forward(wanted_patches(to_patches(x, cfg.patch), cfg), places)[0]
                    for places in np.split(order, [visible_patches(cfg)], axis=1))
    return float(((hidden - (0 if cfg.norm_pixels else seen.mean(axis=1, keepdims=True))) ** 2).mean())


def show_pictures(params, cfg, count=3):
    """Held-out pictures: original, what the encoder sees, reconstruction; in text, and with --png twelve in colour."""
    x = numbers(labelled(cfg, "test")[0][:12], cfg)
    filled, seen = reconstruct(params, x, random_order(len(x), cfg, np.random.default_rng(cfg.seed)), cfg)
    x, filled, seen = brightness(x, cfg), brightness(filled, cfg), seen[..., :1] > 0
    for k in range(count):
        print(side_by_side(["original", "what the encoder sees", "reconstruction"] if k == 0 else ["", "", ""],
                           [picture_lines(a[k], b[k, :, :, 0])
                            for a, b in ((x, seen | True), (x, seen), (filled, seen | True))]))
    if cfg.png:
        framed = (np.pad(a, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)        # in white
                  for a in (x, np.where(seen, x, 0.5), filled))
        rows = np.concatenate(list(framed), axis=2)
        sheet = np.broadcast_to(rows, (*rows.shape[:3], 3)).reshape(-1, rows.shape[2], 3)
        write_png(cfg.png, sheet.repeat(4, axis=0).repeat(4, axis=1))
        print(f"{cfg.png}: {len(x)} times original, what the encoder sees (gray: hidden), reconstruction")


def ridge_path(X, Y, penalties):
    """Linear least squares with a penalty N l |W|^2, for each l: W = (X^T X + N l)^-1 X^T Y = X^T (X X^T + N l)^-1 Y.
    One eigendecomposition, of the smaller of the two, serves all.   X (N, D), Y (N, K) -> W (D, K), b (K,) for each."""
    x_mean, y_mean, N = X.mean(axis=0), Y.mean(axis=0), len(X)
    X, Y = X - x_mean, Y - y_mean
    wide = X.shape[1] > N
    size, U = np.linalg.eigh(X @ X.T if wide else X.T @ X)
    left, right = (X.T @ U, U.T @ Y) if wide else (U, U.T @ (X.T @ Y))
    for penalty in penalties:
        W = left @ (right / (np.maximum(size, 0) + X.dtype.type(N * penalty))[:, None])
        yield W, y_mean - x_mean @ W


def features(params, x, cfg):
    """What the frozen encoder makes of whole pictures: after each block, mean and deviation over the patches of each
    number; if it knows mirrored pictures, the sum of both ways.   x (N, H, W, C) -> (N, 2 layers D)."""
    found = []
    for some in np.array_split(x, -(-len(x) // 250)):   # a few hundred at a time
        ways, N = [numbers(some, cfg)], len(some)
        ways += [ways[0][:, :, ::-1]] * cfg.flip
        total = 0
        for way in ways:
            _, cache = vit_encoder_forward(params, to_patches(way, cfg.patch), every_place(N, cfg), cfg)
            tokens = [a.reshape(N, -1, cfg.width) for a in cache[2][3]]
            total = total + np.concatenate([f for t in tokens for f in (t.mean(axis=1), t.std(axis=1))], axis=1)
        found.append(total)
    return np.concatenate(found)


def pixels(x, cfg, mirror=False):
    """The features of the baseline; with mirror, the sum of both ways.   x (N, H, W, C) -> (N, H W C)."""
    x = numbers(x, cfg)
    return (x + x[:, :, ::-1] if mirror else x.copy()).reshape(len(x), -1)


PENALTIES = [10 ** (k / 4) for k in range(-12, 13)]
SHARES = (0.01, 0.1, 1.0)                               # of the labels


def probe(describe, cfg):
    """How well can a linear map tell the classes from frozen features?   describe(pictures) -> (N, F).   -> accuracy on
    the test split for each share of the labels, the penalty chosen on the validation split. Few labels: three draws."""
    (X, y), *held = [(describe(x), y) for x, y in (labelled(cfg, split) for split in ("train", "validation", "test"))]
    mean, scale = X.mean(axis=0), 1 / (X.std(axis=0) + 1e-6)
    for F in (X, *(F for F, _ in held)):                # each feature: mean 0, variance 1
        F -= mean
        F *= scale
    total, result = len(y) + len(held[0][1]), []
    for share in SHARES:
        right = []
        for draw in range(1 if share == 1 else 3):
            pick = np.random.default_rng((cfg.seed, draw)).permutation(len(y))[:round(share * total)]
            if share == 1:
                pick = slice(None)
            onehot = np.eye(10, dtype=X.dtype)[y[pick]]
            right.append([[((F @ W + b).argmax(axis=1) == t).mean() for F, t in held]
                          for W, b in ridge_path(X[pick], onehot, PENALTIES)])
        chosen, test = np.mean(right, axis=0).T         # over the draws
        result.append(float(test[chosen.argmax()]))
    return result


def compare_probes(params, cfg):
    """Linear probes on pixels, on an untrained encoder of the same shape, on this one."""
    untrained = init_params(cfg, np.random.default_rng(cfg.seed + 1))
    count, more = (len(labelled(cfg, split)[1]) for split in ("train", "validation"))
    print("A linear probe on frozen features: right on the test pictures, by number of labels\n"
          f"(its penalty is chosen on {more} others)")
    print(" " * 24 + "".join(f"{min(round((count + more) * share), count):9d}" for share in SHARES))
    rows = {"raw": ("raw pixels", lambda x: pixels(x, cfg))}
    if cfg.flip:
        rows["raw_mirrored"] = "raw pixels, both ways", lambda x: pixels(x, cfg, mirror=True)
    rows["untrained"] = "untrained encoder", lambda x: features(untrained, x, cfg)
    rows["probe"] = "this encoder", lambda x: features(params, x, cfg)
    figures = {}
    for name, (text, describe) in rows.items():
        figures[name] = probe(describe, cfg)
        print(f"{text:24s}" + "".join(f"{right:9.2%}" for right in figures[name]))
    ratios = [a / b for a, b in zip(figures["probe"], figures["raw"])]
    print(f"{'times raw pixels':24s}" + "".join(f"{ratio:9.2f}" for ratio in ratios)
          + ("   (expected with 500 labels: 1.57)" if cfg.task == "cifar" else ""))
    return {**{f"{name}{end}": found[k] for k, end in ((0, ""), (1, "_10"), (2, "_100"))
               for name, found in figures.items()}, "ratio": ratios[0]}


def finetune(params, cfg, rng):
    """Train the whole encoder and a linear layer on labels, from params and, beside it, from scratch -> accuracies."""
    base, figures = replace(cfg, steps=cfg.tune_steps, warmup=min(cfg.warmup, cfg.tune_steps // 5)), {}
    x, y = labelled(cfg, "test")
    for name, start in (("finetuned", params), ("from_scratch", {})):
        own, state = init_params(base, rng), {}
        own.update({key: start[key].copy() for key in own.keys() & start.keys()})
        print(f"{name.replace('_', ' ')}, on {labels_used(cfg)} labels:")
        progress = Progress(base.steps)
        with Workers(base, own) as workers:
            for step in progress:
                loss, grads = workers.loss_and_grads(own, cut_batch(make_batch(base, rng), cfg.workers))
                adamw_update(own, grads, state, learning_rate(step, base), cfg.decay)
                progress.report(loss)
        if progress.stopped:
            return {}
        figures[name] = float((np.concatenate([classify(own, some, base)
                                               for some in np.array_split(x, -(-len(x) // 250))]) == y).mean())
    print(f"right on the test pictures: {figures['finetuned']:.2%}; the same net trained from scratch: "
          f"{figures['from_scratch']:.2%}")
    return figures


def classify(params, x, cfg):
    """Classes of pictures, by a fine-tuned encoder.   x (N, H, W, C) -> (N,)."""
    tokens, _ = vit_encoder_forward(params, to_patches(numbers(x, cfg), cfg.patch), every_place(len(x), cfg), cfg)
    return classifier_forward(params, tokens, cfg)[0].argmax(axis=1)


def main(cfg):
    """Pre-train, look at reconstructions, probe the encoder, fine-tune it if wanted."""
    start, rng, base = time.perf_counter(), np.random.default_rng(cfg.seed), replace(cfg, finetune=False)
    print("mae.py: hide most of a picture, learn to fill it in")
    if cfg.task != "shapes":
        require(cfg.data, "--data", "the data set (--help says where to get it)", cfg.data)
        load_pictures(cfg.task, cfg.data)
    params = init_params(base, np.random.default_rng(0))
    if cfg.png:
        require(not os.path.isdir(cfg.png), f"--png {cfg.png}", "a file", "a folder")
        write_png(cfg.png + ".tmp", np.zeros((1, 1, 3)))                    # before the work, not after it
        os.remove(cfg.png + ".tmp")
    about = {"shapes": "Ten shapes, new ones in each batch", "cifar": "CIFAR-10", "mnist": "Digits"}[cfg.task]
    side, T, K = picture_size(cfg), patch_count(cfg), visible_patches(cfg)
    size = sum(p.size for p in params.values())
    print(f"{about}, {side} x {side} x {task_channels(cfg)}, {T} patches, of which the encoder sees {K}: {cfg.layers} "
          f"blocks of width {cfg.width}, decoder {cfg.decoder_layers} of {cfg.decoder_width}, {size} parameters")
    print(f"chance level: loss {loss_of_the_mean(base):.3f}, every hidden patch "
          + ("its own mean" if cfg.norm_pixels else "the mean of the visible ones"))
    params, progress = pretrain(base, rng)
    print("loss", loss_curve(progress.losses or [0]))
    show_pictures(params, base)
    error, mean_error = reconstruction_errors(params, base, rng)
    print(f"squared error on the hidden pixels of held-out pictures: {error:.4f}; of the mean visible patch instead: "
          f"{mean_error:.4f}")
    figures = {"error": error, "mean_patch_error": mean_error, **compare_probes(params, base)}
    if cfg.finetune and not progress.stopped:
        figures.update(finetune(params, cfg, rng))
    print("\nNext: python mae.py --finetune --png shapes.png      python mae.py --masked 0.5")
    print_result(task=cfg.task, **figures, params=size, steps=progress.step, seconds=time.perf_counter() - start,
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


if __name__ == "__main__":
    run(main)
