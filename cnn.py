# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""cnn.py: the same small detector everywhere in the picture.

A linear layer on pixels has to learn an edge anew for every place where it can be. A convolution learns it once: one
small filter W, k x k pixels, slides over the picture, and says at every place how well the patch there matches. Its
weights are shared by all places, so there are few of them, and what is shifted in the picture is shifted in the output.
Pooling halves the picture, so the filters of the next layer see more of it: edges, then parts, then things.

Forward, output pixel q, k x k places p under the filter (channels are summed, too):
    y[q] = sum_p x[q + p] W[p]                  as one product: y = patches W, a patch a row, k k C numbers long
Backward. Call dy, dx, dW the derivatives of the loss by y, x, W:
    dW[p] = sum_q x[q + p]^T dy[q]              one product as well: dW = patches^T dy
    dx[r] = sum_p dy[r - p] W[p]^T              pixel r is x[q + p] for every q = r - p: so dy, convolved with W turned
    max pooling      dy goes to the pixel that was the largest, the others get none
    BatchNorm        as in mlp.py; here a mean is over all pixels of all pictures (GroupNorm: over some channels of one)
    y = x + f(x)     dx = dy + f's dx: whatever f does to it, the gradient also goes past it (He 2016)

Several processes (--workers 2) each take a part of the batch, with the same parameters; the sum of their gradients is
the gradient. BatchNorm measures each part by itself. --slices 2 cuts a batch the same way in one process: equal losses.

Run
    python cnn.py                                      ten shapes of any place, size and colour
    python cnn.py --model resnet --workers 2
    python cnn.py --experiment lr-sweep                which learning rates work, with and without BatchNorm
    python cnn.py --task mnist --data mnist            digits (mlp.py --help says where to get the folder)
    python cnn.py --task cifar --data cifar-10-binary.tar.gz --save plain.npz                         85 % or more
    python cnn.py --task cifar --data cifar-10-binary.tar.gz --save resnet.npz --model resnet --channels 16 \\
        --dropout 0 --lr 0.1 --crop 3 --workers 2 --steps 8400                                        91 % or more
        curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz

Break it
    --lr 0.2: 99.4 %, as with a rate forty times smaller; --lr 0.2 --norm none: 10 %, chance. BatchNorm forgives
    np.maximum(x, 0), x -> x, x and dout * (x > 0) -> dout, both of relu: 99.1 %, since a maximum in max pooling bends
        lines, too; with --pool average as well: 17 %, the whole net is a linear model
    place == k -> place >= 0 in maxpool_backward, so all four pixels get the gradient: 94.8 % instead of 99.4 %
    W[::-1, ::-1] -> W in conv_backward: 96.8 %. It learns all the same! So check gradients
    x = x.astype(dtype) -> x = x.astype(dtype)[:, np.random.default_rng(0).permutation(16)] in make_batch: 96.7 %; the
        rows are shuffled, always alike, which is nothing to a linear layer, but neighbours mean something here

Papers: LeCun et al. 1998 (convolutional networks); Srivastava et al. 2014 (dropout); Ioffe, Szegedy 2015 (BatchNorm);
He et al. 2016 (residual networks); Szegedy et al. 2016 (label smoothing); Goyal et al. 2017 (training on many
processes); Wu, He 2018 (GroupNorm); Smith 2018 (one-cycle schedule).
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
    experiment: Literal["none", "lr-sweep"] = "none"  # instead: learning rates with and without BatchNorm
    model: Literal["plain", "resnet"] = "plain"  # three convolutions and two linear layers, or residual blocks
    channels: int = 8       # of the first layer; later ones have more
    norm: Literal["batch", "group", "none"] = "batch"  # what normalises the channels
    pool: Literal["max", "average"] = "max"  # what halves the picture
    dropout: float = 0.0    # share of the features that is dropped before the last layer
    smoothing: float = 0.0  # share of the target's probability that is spread over all classes
    size: int = 16          # shapes: pixels a side
    flip: bool = False      # mirror half of the pictures
    crop: int = 0           # shift the pictures by up to so many pixels
    optimizer: Literal["momentum", "adamw"] = "adamw"  # how a gradient becomes a step
    lr: float = 0.005       # learning rate at its height
    decay: float = 0.01     # share of every matrix that is taken off, times lr
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"  # course of the learning rate
    rise: float = 0.2       # share of the steps in which it rises from 0
    steps: int = 1000       # updates
    batch: int = 64         # pictures an update
    workers: int = 1        # processes that share the work of a batch
    slices: int = 0         # parts of a batch, each with BatchNorm statistics of its own; 0: one a worker
    data: str = ""          # cifar: cifar-10-binary.tar.gz or its folder; mnist: the folder of MNIST
    save: str = ""          # file (.npz) to keep parameters and state of the training in
    load: str = ""          # such a file to go on from
    seed: int = 0           # of every random draw

    def __post_init__(self):
        for name in ("steps", "batch", "channels", "workers"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("crop", "decay", "slices", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        for name in ("dropout", "smoothing", "rise"):
            require(0 <= getattr(self, name) < 1, "--" + name, "0 or more, below 1", getattr(self, name))
        require(0 < self.lr < math.inf, "--lr", "a number above 0", self.lr)
        require(self.size > 0 and self.size % 8 == 0, "--size", "a multiple of 8: pooling halves it thrice", self.size)
        require(self.crop < picture_size(self), "--crop", f"less than {picture_size(self)}, the side", self.crop)
        require(not self.data or self.task != "shapes", "--data", "--task cifar or mnist with it", self.task)
        require(self.experiment == "none" or self.norm == "batch", "--norm", "batch; --experiment tries none as well",
                self.norm)
        require(self.experiment == "none" or not self.save + self.load, "--experiment", "no --save or --load with it",
                self.save + self.load)
        self.slices = self.slices or self.workers
        require(self.workers <= self.batch, "--workers", f"at most --batch {self.batch}", self.workers)
        require(self.workers <= self.slices <= self.batch, "--slices",
                f"from --workers {self.workers} to --batch {self.batch}", self.slices)


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "cifar": dict(channels=32, dropout=0.2, smoothing=0.1, flip=True, crop=4, optimizer="momentum", lr=0.08,
                  decay=0.005, rise=0.25, steps=5600, batch=128),
    "mnist": dict(channels=16, dropout=0.3, crop=2, steps=3000, batch=128),
    "lr-sweep": dict(model="resnet", channels=4, optimizer="momentum", lr=0.2, decay=0.005, steps=400, batch=64),
}


# ---- layers: N pictures, H x W pixels, C channels, M filters, k the side of a kernel ---------------------------------

def conv_loop_forward(x, W, stride=1, padding=0, dilation=1, groups=1):
    """Convolution by its definition: every patch of x, times every filter, summed.   x (N, H, W, C),
    W (k, k, C / groups, M) -> (N, H', W', M), H' = (H + 2 padding - dilation (k - 1) - 1) // stride + 1.
    Of several groups, each block of M / groups filters sees its block of C / groups channels only."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    k, _, c, M = W.shape
    m, reach = M // groups, dilation * (k - 1) + 1
    out = np.zeros((len(x), (x.shape[1] - reach) // stride + 1, (x.shape[2] - reach) // stride + 1, M), x.dtype)
    for i, j in np.ndindex(out.shape[1:3]):
        patch = x[:, i * stride:i * stride + reach:dilation, j * stride:j * stride + reach:dilation]
        for g in range(groups):
            out[:, i, j, g * m:g * m + m] = np.tensordot(patch[..., g * c:g * c + c], W[..., g * m:g * m + m], 3)
    return out, (x, W, stride, padding, dilation, groups)


def conv_loop_backward(dout, cache):
    """Each output pixel gives its slope to the patch it saw, times W, and to W, times the patch.   -> dx, dW."""
    x, W, stride, padding, dilation, groups = cache
    k, _, c, M = W.shape
    m, reach = M // groups, dilation * (k - 1) + 1
    dx, dW = np.zeros_like(x), np.zeros_like(W)
    for i, j in np.ndindex(dout.shape[1:3]):
        here = np.s_[:, i * stride:i * stride + reach:dilation, j * stride:j * stride + reach:dilation]
        for g in range(groups):
            channels, filters = np.s_[..., g * c:g * c + c], np.s_[..., g * m:g * m + m]
            dx[here][channels] += np.tensordot(dout[:, i, j][filters], W[filters], (1, 3))
            dW[filters] += np.tensordot(x[here][channels], dout[:, i, j][filters], (0, 0))
    return dx[:, padding:dx.shape[1] - padding, padding:dx.shape[2] - padding], dW


def patches(x, k, stride, dilation):
    """Every patch of x under a k x k kernel, as a view.   x (N, H, W, C) -> (N, H', W', k, k, C)."""
    (N, H, width, C), (picture, row, pixel, number) = x.shape, x.strides        # strides: bytes from one to the next
    reach = dilation * (k - 1) + 1
    shape = N, (H - reach) // stride + 1, (width - reach) // stride + 1, k, k, C
    steps = picture, stride * row, stride * pixel, dilation * row, dilation * pixel, number
    return np.lib.stride_tricks.as_strided(x, shape, steps, writeable=False)


def rows_of(view, groups):
    """Patches (n, H', W', k, k, C) written out, one a row -> (groups, n H' W', k k C / groups)."""
    n, H, W, k, _, C = view.shape
    view = view.reshape(n, H, W, k, k, groups, C // groups)
    return view.transpose(5, 0, 1, 2, 3, 4, 6).reshape(groups, n * H * W, k * k * C // groups)


PORTION = 2 ** 16        # numbers that are worked on at once: a quarter of a megabyte


def portions(x):
    """Slices of the rows of x, of about PORTION numbers each. Several passes over an array are faster over one portion
    after the other, since that stays in the cache of a core."""
    n = max(1, PORTION // x[0].size)
    return [slice(i, i + n) for i in range(0, len(x), n)]


def correlate(x, W, stride, dilation, groups):
    """Slide W over x: what fits the cache in one product.   x (N, H, W, C), W as above -> (N, H', W', M)."""
    k, _, c, M = W.shape
    view, by_group = patches(x, k, stride, dilation), W.reshape(k * k * c, groups, -1).transpose(1, 0, 2)
    out = np.empty((*view.shape[:3], M), x.dtype)
    for part in portions(view):
        np.matmul(rows_of(view[part], groups), by_group, out=out[part].reshape(-1, groups, M // groups).swapaxes(0, 1))
    return out


def conv_forward(x, W, stride=1, padding=0, dilation=1, groups=1, first=False):
    """The same as conv_loop_forward, fast. first: x is the picture, whose gradient nobody needs. (The nets below need
    nothing but padding; stride, dilation and groups are for yours.)"""
    N, H, width, C = x.shape
    padded = np.zeros((N, H + 2 * padding, width + 2 * padding, C), x.dtype)
    padded[:, padding:padding + H, padding:padding + width] = x
    return correlate(padded, W, stride, dilation, groups), (padded, W, stride, padding, dilation, groups, first)


def conv_backward(dout, cache):
    """dW = patches^T dout.   dx: pixel r reaches output q through W[r - q], so dout is slid over with W turned around.
    Where the stride left out outputs there are zeros between those of dout.   -> dx (None if first), dW."""
    x, W, stride, padding, dilation, groups, first = cache
    k, _, c, M = W.shape
    view, shape = patches(x, k, stride, dilation), (-1, groups, M // groups)
    dW = sum(rows_of(view[part], groups).swapaxes(1, 2) @ dout[part].reshape(shape).swapaxes(0, 1)
             for part in portions(view))
    dx = None
    if not first:
        (N, H, width, _), edge = x.shape, dilation * (k - 1)
        spread = np.zeros((N, H + edge, width + edge, M), dout.dtype)
        spread[:, edge:edge + stride * dout.shape[1]:stride, edge:edge + stride * dout.shape[2]:stride] = dout
        spread = spread[:, padding:H - padding + edge, padding:width - padding + edge]
        turned = W[::-1, ::-1].reshape(k, k, c, groups, -1).transpose(0, 1, 4, 3, 2).reshape(k, k, -1, c * groups)
        dx = correlate(spread, turned, 1, dilation, groups)
    return dx, dW.swapaxes(0, 1).reshape(W.shape)


def bias_forward(x, b):
    """y = x + b.   x (..., C), b (C,)."""
    return x + b, None


def bias_backward(dout, cache):
    """dx = dout, db = the sum over all but the channels."""
    return dout, dout.reshape(-1, dout.shape[-1]).sum(axis=0)


def relu_forward(x):
    """y = max(x, 0), entry by entry."""
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    """dx = dout where x > 0, else 0."""
    x = cache
    return dout * (x > 0)


def corners(shape, size):
    """For each place in a size x size window: the pixels of (N, H, W, C) pictures that stand there, in all windows."""
    H, W = (n // size * size for n in shape[1:3])
    return [np.s_[:, i:H:size, j:W:size] for i in range(size) for j in range(size)]


def maxpool_forward(x, size=2):
    """The largest value in each size x size window.   x (N, H, W, C) -> (N, H / size, W / size, C)."""
    first, *others = corners(x.shape, size)
    out = x[first].copy()
    place = np.zeros(out.shape, np.uint8)               # of the largest in its window; of equal ones the first
    for k, here in enumerate(others, 1):
        larger = x[here] > out
        np.maximum(place, larger * np.uint8(k), out=place)
        np.maximum(out, x[here], out=out)
    return out, (place, x.shape, size)


def maxpool_backward(dout, cache):
    """The pixel that was the largest gets the whole gradient, the others none."""
    place, shape, size = cache
    dx = np.zeros(shape, dout.dtype)
    for k, here in enumerate(corners(shape, size)):
        np.multiply(dout, place == k, out=dx[here])
    return dx


def avgpool_forward(x, size=2):
    """The mean of each size x size window.   x (N, H, W, C) -> (N, H / size, W / size, C)."""
    return sum(x[here] for here in corners(x.shape, size)) * size ** -2, (x.shape, size)


def avgpool_backward(dout, cache):
    """Every pixel of a window gets an equal share."""
    shape, size = cache
    dx = np.zeros(shape, dout.dtype)
    for here in corners(shape, size):
        dx[here] = dout * size ** -2
    return dx


def globalpool_forward(x):
    """The mean of each channel over the whole picture.   x (N, H, W, C) -> (N, C)."""
    return x.mean(axis=(1, 2)), x.shape


def globalpool_backward(dout, cache):
    """Every pixel gets an equal share."""
    _, H, W, _ = shape = cache
    return np.broadcast_to(dout[:, None, None] * (1 / (H * W)), shape).copy()


def channelnorm_forward(x, gamma, beta, running=None, eps=1e-5):
    """BatchNorm of pictures: y = gamma (x - mean) / sqrt(var + eps) + beta, mean and var of a channel over all pixels
    of all pictures, or in evaluation the running ones.   x (N, H, W, C), the others (C,) -> (N, H, W, C).
    In few passes over x, each along whole rows of pixels, W C numbers: long loops are fast ones. Sums are products, var
    is mean(x^2) - mean^2, the rest is one factor, one term."""
    N, H, W, C = x.shape
    rows, share = x.reshape(N * H, W * C), 1 / (N * H * W)
    if running is None:
        mean = (np.ones(N * H, x.dtype) @ rows).reshape(W, C).sum(axis=0) * share
        var = np.maximum(np.einsum("nc,nc->c", rows, rows).reshape(W, C).sum(axis=0) * share - mean * mean, 0)
    else:
        mean, var = running
    inv_std = (var + eps) ** -0.5
    y = rows * np.tile(gamma * inv_std, W)
    y += np.tile(beta - mean * gamma * inv_std, W)
    return y.reshape(x.shape), (x, gamma, inv_std, running is None, mean, var)


def channelnorm_backward(dout, cache):
    """As in mlp.py: dx = gamma / std (dout - mean(dout) - xhat mean(dout xhat)), xhat = (x - mean) / std; in evaluation
    mean and std are constants.   -> dx, dgamma, dbeta."""
    x, gamma, inv_std, training, mean, _ = cache
    N, H, W, C = x.shape
    rows, drows = x.reshape(N * H, W * C), dout.reshape(N * H, W * C)
    dbeta = (np.ones(N * H, dout.dtype) @ drows).reshape(W, C).sum(axis=0)
    dgamma = (np.einsum("nc,nc->c", drows, rows).reshape(W, C).sum(axis=0) - mean * dbeta) * inv_std
    if not training:
        return dout * (gamma * inv_std), dgamma, dbeta
    share = 1 / (N * H * W)
    per_x = dgamma * inv_std * share
    dx = rows * np.tile(-per_x, W)
    dx += np.tile(mean * per_x - dbeta * share, W)
    dx += drows
    dx *= np.tile(gamma * inv_std, W)
    return dx.reshape(x.shape), dgamma, dbeta


def groupnorm_forward(x, gamma, beta, groups, eps=1e-5):
    """As BatchNorm, but mean and variance are those of a group of channels in one picture: no batch is needed.
    x (N, H, W, C), gamma, beta (C,) -> (N, H, W, C)."""
    N, H, W, C = x.shape
    xg = x.reshape(N, H * W, groups, C // groups)
    xhat = xg - xg.mean(axis=(1, 3), keepdims=True)
    inv_std = ((xhat * xhat).mean(axis=(1, 3), keepdims=True) + eps) ** -0.5
    xhat = (xhat * inv_std).reshape(x.shape)
    return gamma * xhat + beta, (xhat, gamma, inv_std, groups)


def groupnorm_backward(dout, cache):
    """dgamma = sum dout xhat, dbeta = sum dout;  dxhat = gamma dout, without its part along 1 and along xhat, / std."""
    xhat, gamma, inv_std, groups = cache
    N, H, W, C = dout.shape
    d, xg = (gamma * dout).reshape(N, H * W, groups, -1), xhat.reshape(N, H * W, groups, -1)
    dx = d - d.mean(axis=(1, 3), keepdims=True) - xg * (d * xg).mean(axis=(1, 3), keepdims=True)
    return (dx * inv_std).reshape(dout.shape), (dout * xhat).sum(axis=(0, 1, 2)), dout.sum(axis=(0, 1, 2))


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


def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, K), b (K,) -> y (N, K)."""
    y = x @ W
    y += b
    return y, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   dout (N, K) -> dx (N, D), dW (D, K), db (K,)."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)     # b was broadcast over N, so sum over N


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


# ---- model: convolutional blocks, then linear layers -----------------------------------------------------------------

def layer_plan(cfg):
    """Convolutional layers from bottom to top -> (name, channels in, channels out, is it followed by pooling?)."""
    w, c = cfg.channels, task_channels(cfg)
    if cfg.model == "plain":
        return [("conv1", c, w, True), ("conv2", w, 2 * w, True), ("conv3", 2 * w, 4 * w, True)]
    plan = [("stem", c, w, False)]
    for stage, (c, m) in enumerate(((w, 2 * w), (2 * w, 8 * w), (8 * w, 8 * w)), 1):
        plan += [(f"conv{stage}", c, m, True), (f"res{stage}", m, m, False)]
    return plan


def init_params(cfg, rng, dtype=np.float32):
    """For every convolution W, gamma and beta (or a bias b); a residual block has two, a and b; then linear layers."""
    params = {}
    for name, c, m, _ in layer_plan(cfg):
        for conv in (name + ".a", name + ".b") if name[:3] == "res" else (name,):
            params[conv + ".W"] = rng.standard_normal((3, 3, c, m)) * (2 / (9 * c)) ** 0.5   # He 2015
            if cfg.norm == "none":
                params[conv + ".bias"] = np.zeros(m)
            else:
                params[conv + ".gamma"], params[conv + ".beta"] = np.ones(m), np.zeros(m)
    D = m
    if cfg.model == "plain":
        D = 8 * cfg.channels
        F = m * (picture_size(cfg) // 8) ** 2
        params["fc.W"], params["fc.bias"] = rng.standard_normal((F, D)) * (2 / F) ** 0.5, np.zeros(D)
    params["out.W"], params["out.bias"] = rng.standard_normal((D, 10)) * D ** -0.5, np.zeros(10)
    return {name: value.astype(dtype) for name, value in params.items()}


def convnorm_forward(params, x, name, first, cfg, running):
    """Convolution, then BatchNorm, GroupNorm or a bias.   x (N, H, W, C) -> (N, H, W, M)."""
    x, conv_cache = conv_forward(x, params[name + ".W"], padding=1, first=first)
    if cfg.norm == "none":
        x, norm_cache = bias_forward(x, params[name + ".bias"])
        return x, (conv_cache, norm_cache, name, cfg)
    gamma, beta = params[name + ".gamma"], params[name + ".beta"]
    if cfg.norm == "batch":
        x, norm_cache = channelnorm_forward(x, gamma, beta, running and running[name])
    else:
        x, norm_cache = groupnorm_forward(x, gamma, beta, math.gcd(x.shape[-1], 8))   # 8 groups, if they fit
    return x, (conv_cache, norm_cache, name, cfg)


def convnorm_backward(dout, cache):
    """convnorm_forward from bottom to top -> dx, gradients."""
    conv_cache, norm_cache, name, cfg = cache
    grads = {}
    if cfg.norm == "none":
        dout, grads[name + ".bias"] = bias_backward(dout, norm_cache)
    elif cfg.norm == "batch":
        dout, grads[name + ".gamma"], grads[name + ".beta"] = channelnorm_backward(dout, norm_cache)
    else:
        dout, grads[name + ".gamma"], grads[name + ".beta"] = groupnorm_backward(dout, norm_cache)
    dx, grads[name + ".W"] = conv_backward(dout, conv_cache)
    return dx, grads


def convblock_forward(params, x, name, pool, first, cfg, running):
    """convnorm, pooling by half if wanted, relu.   (relu behind max pooling: the same, for a quarter of the work.)"""
    x, norm_cache = convnorm_forward(params, x, name, first, cfg, running)
    pool_cache = None
    if pool:
        x, pool_cache = (maxpool_forward if cfg.pool == "max" else avgpool_forward)(x)
    x, relu_cache = relu_forward(x)
    return x, (norm_cache, pool_cache, relu_cache, cfg)


def convblock_backward(dout, cache):
    """convblock_forward from bottom to top -> dx, gradients."""
    norm_cache, pool_cache, relu_cache, cfg = cache
    dout = relu_backward(dout, relu_cache)
    if pool_cache is not None:
        dout = (maxpool_backward if cfg.pool == "max" else avgpool_backward)(dout, pool_cache)
    return convnorm_backward(dout, norm_cache)


def residual_forward(params, x, name, cfg, running):
    """y = relu(x + f(x)), f = convnorm, relu, convnorm: if f is not needed yet, x goes through, and its gradient."""
    inner, block_cache = convblock_forward(params, x, name + ".a", False, False, cfg, running)
    inner, norm_cache = convnorm_forward(params, inner, name + ".b", False, cfg, running)
    y, relu_cache = relu_forward(x + inner)
    return y, (block_cache, norm_cache, relu_cache, cfg)


def residual_backward(dout, cache):
    """residual_forward from bottom to top; x is used twice, so its gradients add -> dx, gradients."""
    block_cache, norm_cache, relu_cache, _ = cache
    dout = relu_backward(dout, relu_cache)
    dinner, grads = convnorm_backward(dout, norm_cache)
    dx, more = convblock_backward(dinner, block_cache)
    return dout + dx, {**grads, **more}


def cnn_forward(params, x, keep, cfg, running=None):
    """x (N, H, W, C) -> z (N, 10). keep: for dropout, or None. With running, BatchNorm's statistics, it evaluates."""
    caches = []
    for name, _, _, pool in layer_plan(cfg):
        if name[:3] == "res":
            x, cache = residual_forward(params, x, name, cfg, running)
        else:
            x, cache = convblock_forward(params, x, name, pool, not caches, cfg, running)
        caches.append(cache)
    shape = x.shape
    if cfg.model == "plain":
        x, linear_cache = linear_forward(x.reshape(len(x), -1), params["fc.W"], params["fc.bias"])
        x, relu_cache = relu_forward(x)
        top_cache = linear_cache, relu_cache
    else:
        x, top_cache = globalpool_forward(x)
    drop_cache = None
    if keep is not None:
        x, drop_cache = dropout_forward(x, keep, cfg.dropout)
    z, out_cache = linear_forward(x, params["out.W"], params["out.bias"])
    return z, (caches, shape, top_cache, drop_cache, out_cache, cfg)


def cnn_backward(dout, cache):
    """cnn_forward from bottom to top -> gradients under the keys of params."""
    (caches, shape, top_cache, drop_cache, out_cache, cfg), grads = cache, {}
    dx, grads["out.W"], grads["out.bias"] = linear_backward(dout, out_cache)
    if drop_cache is not None:
        dx = dropout_backward(dx, drop_cache)
    if cfg.model == "plain":
        linear_cache, relu_cache = top_cache
        dx, grads["fc.W"], grads["fc.bias"] = linear_backward(relu_backward(dx, relu_cache), linear_cache)
        dx = dx.reshape(shape)
    else:
        dx = globalpool_backward(dx, top_cache)
    for (name, *_), cache in reversed(list(zip(layer_plan(cfg), caches))):
        dx, more = (residual_backward if name[:3] == "res" else convblock_backward)(dx, cache)
        grads.update(more)
    return grads


def batch_statistics(cache):
    """All that BatchNorm measured in a forward pass, picked out of the cache -> {name: (mean, var)}."""
    if len(cache) == 4 and isinstance(cache[2], str):           # of convnorm
        return {cache[2]: cache[1][-2:]} if cache[3].norm == "batch" else {}
    found = {}
    for part in cache:
        if isinstance(part, (tuple, list)):
            found.update(batch_statistics(part))
    return found


def loss_and_grads(params, batch, cfg, running=None):
    """One forward and one backward pass -> loss, gradients under the keys of params. If given, running, BatchNorm's
    {name: array (2, M) of mean and variance}, moves a tenth of the way to the statistics of this batch."""
    x, targets, keep = batch
    z, cache = cnn_forward(params, x, keep, cfg)
    loss, loss_cache = smoothed_cross_entropy_forward(z, targets, cfg.smoothing)
    if running is not None:
        for name, statistics in batch_statistics(cache[0]).items():
            running[name] += 0.1 * (np.array(statistics) - running[name])
    return loss, cnn_backward(smoothed_cross_entropy_backward(1.0, loss_cache), cache)


# ---- optimizers: how a gradient becomes a step -----------------------------------------------------------------------

def momentum_update(params, grads, state, lr, mu=0.9):
    """s <- mu s + g,  w <- w - lr s: a ball that keeps rolling."""
    for name, g in grads.items():
        s = state[name] = mu * state.get(name, 0.0) + g
        params[name] -= lr * s


def momentumw_update(params, grads, state, lr, decay):
    """Momentum, and every matrix shrinks by lr decay, as in AdamW."""
    for W in params.values():
        if W.ndim > 1:
            W *= 1 - lr * decay
    momentum_update(params, grads, state, lr)


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


def rate_at(step, cfg):
    """Learning rate: up to lr in a straight line, in the first part (rise) of the steps; then down to 0, straight
    (one-cycle) or along half a cosine."""
    done = step / cfg.steps
    if done < cfg.rise:
        return cfg.lr * done / cfg.rise
    left = (1 - done) / (1 - cfg.rise)
    return cfg.lr * (left if cfg.schedule == "one-cycle" else 0.5 - 0.5 * math.cos(math.pi * left))


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
    """-> x (N, H, W, C), targets (N,), what dropout keeps (N, D) or None. Shapes are always new; of other data each
    picture comes once an epoch if the step is given, else random ones."""
    if cfg.task == "shapes":
        targets = rng.integers(0, 10, cfg.batch)
        x = draw_shapes(targets, cfg.size, rng)
        if cfg.flip or cfg.crop:
            x = crop_and_flip(x, cfg.crop, cfg.flip, rng)
        x = x.astype(dtype)
    else:
        pictures, targets = load_pictures(cfg.task, cfg.data)["train"]
        n = len(targets)
        if step is None:
            pick = rng.integers(0, n, cfg.batch)
        else:
            places = np.arange((step - 1) * cfg.batch, step * cfg.batch)
            pick = np.concatenate([epoch_order(n, cfg.seed, e)[places[places // n == e] % n]
                                   for e in np.unique(places // n)])
        x, targets = normalised(crop_and_flip(pictures[pick], cfg.crop, cfg.flip, rng), cfg, dtype), targets[pick]
    D = 8 * cfg.channels
    return x, targets, rng.random((cfg.batch, D), np.float32) >= cfg.dropout if cfg.dropout else None


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


# ---- training and demo -----------------------------------------------------------------------------------------------

def new_running(params):
    """BatchNorm's running statistics before any training: mean 0, variance 1, by layer."""
    return {name[:-6]: np.stack([0 * gamma, gamma]) for name, gamma in params.items() if name.endswith(".gamma")}


def new_state(params, cfg):
    """The optimizer's state before any training, all 0, so that the first checkpoint is as large as the last."""
    names = [kind + name for kind in (("",) if cfg.optimizer == "momentum" else ("m ", "v ")) for name in params]
    return {**{name: np.zeros_like(params[name.split()[-1]]) for name in names}, "t": 0}


def train_cnn(cfg, rng, quiet=False):
    """-> params, BatchNorm's running statistics, progress."""
    params, first = init_params(cfg, rng), 0
    state = new_state(params, cfg)
    running = new_running(params) if cfg.norm == "batch" else {}
    parts = {"params": params, "state": state, "running": running}
    about = {name: getattr(cfg, name) for name in ("task", "model", "norm", "optimizer")}
    if cfg.load:
        first = load_checkpoint(cfg.load, rng, about, parts)
    if cfg.save:
        save_checkpoint(cfg.save, first, rng, about, parts, trial=True)    # before the work, not after it
    update = momentumw_update if cfg.optimizer == "momentum" else adamw_update
    epoch = 0 if cfg.task == "shapes" else len(load_pictures(cfg.task, cfg.data)["train"][0]) / cfg.batch   # in steps
    progress = Progress(cfg.steps, first + 1, quiet)
    with Workers(cfg, params, running) as workers:
        for step in progress:
            loss, grads = workers.loss_and_grads(params, cut_batch(make_batch(cfg, rng, step=step), cfg.slices))
            update(params, grads, state, rate_at(step, cfg), cfg.decay)
            progress.report(loss, lambda: f"  validation {accuracy(params, running, cfg):.2%}")
            if epoch and not quiet and step % int(epoch / 3 + 1) == 0:
                left = progress.seconds / len(progress.losses) * (cfg.steps - step)
                print(f"    epoch {step / epoch:5.1f}/{cfg.steps / epoch:.1f}  loss {loss:.4f}  |  {left:.0f} s left")
            if cfg.save and (step % 500 == 0 or step == cfg.steps or progress.stopped):
                save_checkpoint(cfg.save, step, rng, about, parts)
    return params, running, progress


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


def predict(params, running, x, cfg):
    """Classes of pictures, of bytes or ready. If the net knows mirrored pictures, it looks at each both ways, and the
    sum counts.   x (N, H, W, C) -> (N,)."""
    answers = []
    for part in np.array_split(x, -(-len(x) // 250)):   # a few hundred at a time
        part = normalised(part, cfg) if part.dtype == np.uint8 else part
        z, _ = cnn_forward(params, part, None, cfg, running)
        if cfg.flip:
            z = z + cnn_forward(params, part[:, :, ::-1], None, cfg, running)[0]
        answers.append(z.argmax(axis=1))
    return np.concatenate(answers)


def held_out_pictures(cfg, split):
    """2000 fresh shapes, or a split of the data set -> pictures, labels."""
    if cfg.task == "shapes":
        seed = cfg.seed + {"validation": 1000, "test": 2000}[split]
        return make_batch(replace(cfg, batch=2000, dropout=0.0, flip=False, crop=0), np.random.default_rng(seed))[:2]
    return load_pictures(cfg.task, cfg.data)[split]


def accuracy(params, running, cfg, split="validation"):
    """Share of right answers on held-out pictures."""
    x, y = held_out_pictures(cfg, split)
    return float((predict(params, running, x, cfg) == y).mean())


def linear_accuracy(cfg, rng):
    """What one softmax layer on the pixels reaches, trained on as many pictures."""
    def flat(x):
        x = normalised(x, cfg) if x.dtype == np.uint8 else x
        return x.reshape(len(x), -1)
    params, state = {}, {}
    for step in range(1, cfg.steps + 1):
        x, y, _ = make_batch(cfg, rng, step=step)
        x = flat(x)
        if not params:
            params = {"W": np.zeros((x.shape[1], 10), x.dtype), "b": np.zeros(10, x.dtype)}
        z, cache = linear_forward(x, params["W"], params["b"])
        dz = smoothed_cross_entropy_backward(1.0, smoothed_cross_entropy_forward(z, y, 0.0)[1])
        _, dW, db = linear_backward(dz, cache)
        adamw_update(params, {"W": dW, "b": db}, state, rate_at(step, replace(cfg, lr=0.001)))
    x, y = held_out_pictures(cfg, "test")
    return float(((flat(x) @ params["W"] + params["b"]).argmax(axis=1) == y).mean())


def show_gradients(cfg, rng):
    """Norm of the gradient of every W before training, with and without BatchNorm."""
    print("Norm of the gradient of W before training, first layer to last (alike, or ever larger?):")
    for norm, text in (("batch", "with"), ("none", "without")):
        part = replace(cfg, experiment="none", norm=norm)
        params = init_params(part, np.random.default_rng(cfg.seed))
        _, grads = loss_and_grads(params, make_batch(part, rng), part)
        norms = [float(np.linalg.norm(grads[name])) for name in params if name.endswith(".W")]
        print(f"{text:>8s} BatchNorm " + "".join(f"{v:8.3f}" for v in norms))


def show_filters(W):
    """The filters of the first layer: red, green and blue below each other, dark positive, blank negative."""
    pictures, W = [], W[..., :8] / np.abs(W[..., :8]).max(axis=(0, 1, 2))
    for n in range(W.shape[3]):
        planes = shade(0.5 + 0.5 * W[..., n].transpose(2, 0, 1)).reshape(-1, W.shape[1])
        pictures.append(["".join(2 * c for c in row) for row in planes])
    colours = "; red, green, blue below each other" if W.shape[2] == 3 else ""
    print(f"First-layer filters{colours} (blank: negative, dark: positive):")
    print(side_by_side([f"{n + 1}" for n in range(len(pictures))], pictures))


def show_confusion(guess, y, names):
    """Confusion matrix and accuracy by class; the most confused pair in words."""
    table = np.zeros((10, 10), int)
    np.add.at(table, (y, guess), 1)
    width = max(map(len, names))
    print(f"{'what it is':>{width}s}   what the net says, of 100" + 22 * " " + "right")
    print(" " * (width + 2) + "".join(f"{name[:4]:>5s}" for name in names))
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    for k, name in enumerate(names):
        print(f"{name:>{width}s}  " + "".join(f"{100 * v:5.0f}" if v >= 0.005 else "    ." for v in share[k])
              + f"   {share[k, k]:6.1%}")
    pairs = np.triu(table + table.T, 1)
    if not pairs.any():
        print("No picture was taken for another kind.")
        return
    a, b = np.unravel_index(pairs.argmax(), pairs.shape)
    print(f"Most often confused: {names[a]} and {names[b]}; {table[a, b]} of {table[a].sum()} times a picture of "
          f"{names[a]} was called {names[b]}, {table[b, a]} of {table[b].sum()} times the other way round.")


def learn_pictures(cfg, rng):
    """Train a net and show what it has learned."""
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    side, c = picture_size(cfg), task_channels(cfg)
    about = {"shapes": "Ten shapes, new ones in each batch", "cifar": "CIFAR-10", "mnist": "Digits"}[cfg.task]
    print(f"{about}, {side} x {side} x {c}: {cfg.model}, {cfg.channels} channels, {cfg.norm} norm, {cfg.optimizer}, lr "
          f"{cfg.lr}, batch {cfg.batch}, {cfg.workers} process(es), {sum(p.size for p in params.values())} parameters")
    if cfg.task == "shapes":
        x, y, _ = make_batch(replace(cfg, batch=5, flip=False, crop=0), np.random.default_rng(cfg.seed))
        gray = (0.5 + 0.4 * x.mean(axis=3)).repeat(2, axis=2)               # letters are tall
        print(side_by_side([SHAPES[k] for k in y], [["".join(row) for row in shade(g[:, :32])] for g in gray]))
    show_gradients(cfg, rng)
    print(f"chance level: loss {math.log(10):.3f}, 10 % right")
    params, running, progress = train_cnn(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    show_filters(params[("stem" if cfg.model == "resnet" else "conv1") + ".W"])
    x, y = held_out_pictures(cfg, "test")
    guess = predict(params, running, x, cfg)
    names = {"shapes": SHAPES, "cifar": CIFAR, "mnist": list("0123456789")}[cfg.task]
    show_confusion(guess, y, names)
    right = float((guess == y).mean())
    figures = {"accuracy": right}
    if cfg.task == "shapes":
        figures["linear"] = linear_accuracy(replace(cfg, steps=max(1, progress.step)), rng)
        print(f"{right:.2%} of 2000 fresh shapes right; a linear model of the pixels, as many pictures: "
              f"{figures['linear']:.2%}")
    else:
        expected = {"mnist": 0.992, "cifar": 0.91 if cfg.model == "resnet" else 0.85}[cfg.task]
        print(f"test accuracy {right:.4f} on {len(y)} pictures (expected of the whole training: {expected})")
    return figures, params, progress


def compare_rates(cfg):
    """Accuracy after a short training over a hundredfold range of learning rates, with and without BatchNorm."""
    rates = [cfg.lr * 10 ** (k / 2) for k in (-2, -1, 0, 1, 2)]
    print(f"{cfg.model}, {cfg.channels} channels, {cfg.steps} steps of {cfg.optimizer}, batch {cfg.batch}; accuracy on "
          "held-out pictures by learning rate:\nchance level: 10 %")
    print(f"{'':18s}" + "".join(f"{lr:9.4f}" for lr in rates) + "    best - worst")
    figures = {}
    for norm in ("batch", "none"):
        found = []
        print(f"{'with' if norm == 'batch' else 'without':>8s} BatchNorm", end="", flush=True)
        for lr in rates:
            part = replace(cfg, experiment="none", norm=norm, lr=lr)
            try:
                params, running, progress = train_cnn(part, np.random.default_rng(cfg.seed), quiet=True)
                found.append(accuracy(params, running, part))
                print(f"{found[-1]:9.2%}", end="", flush=True)
                if progress.stopped:
                    print()
                    return figures
            except FloatingPointError:
                found.append(0.1)                       # as good as guessing
                print(" diverged", end="", flush=True)
        spread = max(found) - min(found)
        print(f"    {100 * spread:.1f} points")
        figures["spread_" + norm] = spread
    return figures


def main(cfg):
    """Train a net, or compare learning rates."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    print("cnn.py: the same small detector everywhere in the picture")
    if cfg.task != "shapes":
        require(cfg.data, "--data", "the data set (--help says where to get it)", cfg.data)
        load_pictures(cfg.task, cfg.data)
    if cfg.experiment == "lr-sweep":
        print_result(task=cfg.task, experiment=cfg.experiment, **compare_rates(cfg),
                     seconds=time.perf_counter() - start)
        return
    figures, params, progress = learn_pictures(cfg, rng)
    print("\nNext: python cnn.py --model resnet      python cnn.py --experiment lr-sweep")
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


CONV = [dict(stride=1, padding=1, dilation=1, groups=1), dict(stride=2, padding=1, dilation=1, groups=2),
        dict(stride=1, padding=0, dilation=2, groups=3)]
GRADCHECK = {name: lambda rng: [        # inputs for gradcheck.py
    dict(x=rng.standard_normal((2, 7, 5, 6)), W=rng.standard_normal((3, 3, 6 // c["groups"], 6)), **c) for c in CONV]
    for name in ("conv", "conv_loop")}


if __name__ == "__main__":
    run(main)
