"""diffusion.py: destroy data in small steps of noise, and learn one step back.

To turn noise into data at once is hard. A small part of the noise is easy to remove, so add noise
in T small steps, and learn to undo one of them. The target is known, since we added the noise
ourselves: it is a regression, with no opponent and no likelihood. Starting from nothing but noise,
T steps back lead to a new sample.

Forward, with noise e ~ N(0, I) and abar_t, which falls from abar_0 = 1 to abar_T, nearly 0
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e       all t steps of noise in one
    loss = mean (net(x_t, t) - e)^2                   t and e are drawn anew for every example
Backward: dnet = 2 (net - e) / size, then the layers; with s = sigmoid(a)
    y = a s       da = dy (s + a s (1 - s))           SiLU
    y = [x, c]    dx = the first columns of dy        c, features of t, are data
Sampling, from x_T ~ N(0, I); one step from t to t' = t - 1
    x_0 = (x_t - sqrt(1 - abar_t) net) / sqrt(abar_t), clipped to the range of the data
    x_t' = sqrt(abar_t') x_0 + sqrt(1 - abar_t' - s2) e + sqrt(s2) (new noise),  e from x_0 and x_t
    s2 = (1 - abar_t') / (1 - abar_t) (1 - abar_t / abar_t'), the variance of x_t' given x_0, x_t

Run    python diffusion.py      (a ring of eight Gaussians; python diffusion.py --help lists more)

Papers: Sohl-Dickstein et al. 2015, Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (cosine).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///

import math
import os
import signal
import threading
import time
from dataclasses import dataclass, fields

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np


@dataclass
class Config:
    """Draw new points of a ring of eight Gaussians."""
    timesteps: int = 100    # noise levels T
    hidden: int = 96        # units per hidden layer
    layers: int = 3         # hidden layers
    frequencies: int = 8    # features of t are this many sines, and as many cosines
    batch_size: int = 256   # points per step
    steps: int = 4000       # optimizer steps
    lr: float = 0.006       # peak learning rate
    warmup: int = 100       # steps of linear warmup
    seed: int = 0           # random seed


# ---- layers: N rows, D inputs, M outputs ---------------------------------------------------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


def sigmoid(z):
    """1 / (1 + e^-z), computed as (1 + tanh(z / 2)) / 2, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def silu_forward(x):
    """y = x s(x), s the sigmoid (Elfwing et al. 2017)."""
    s = sigmoid(x)
    return x * s, (x, s)


def silu_backward(dout, cache):
    """dx = dout (s + x s (1 - s)): the product rule."""
    x, s = cache
    return dout * (s + x * s * (1 - s))


def mse_forward(y, targets):
    """mean((y - targets)^2).   y, targets (N, M) -> scalar."""
    return ((y - targets) ** 2).mean(), (y, targets)


def mse_backward(dout, cache):
    """dy = 2 (y - targets) / size."""
    y, targets = cache
    return (y - targets) * (2 * dout / y.size)


# ---- data: eight Gaussians, and noise ------------------------------------------------------------

ANGLES = np.arange(8) * np.pi / 4


MODES = 2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)      # (8, 2): a ring of radius 2


def draw_ring(rng, n):
    """Points of eight Gaussians with standard deviation 0.1 around MODES.   -> (n, 2)."""
    return MODES[rng.integers(0, 8, n)] + 0.1 * rng.standard_normal((n, 2))


def mode_shares(points):
    """The share of all points that lie within 0.3, three standard deviations, of each mode.
    points (N, 2) -> (8,)."""
    dx, dy = np.moveaxis(points[:, None] - MODES, 2, 0)             # (N, 8) each
    return (np.hypot(dx, dy) < 0.3).mean(axis=0)


def sliced_wasserstein(a, b):
    """How far apart two samples are: project both on lines in 64 directions, sort the projections;
    the mean distance of two with the same rank.   a, b (N, 2) -> number."""
    angle = np.pi * np.arange(64) / 64
    lines = np.stack([np.cos(angle), np.sin(angle)])                # (2, 64)
    return float(np.abs(np.sort(a @ lines, axis=0) - np.sort(b @ lines, axis=0)).mean())


SCALE = 0.5             # of the ring, which then fits into -1.25 to 1.25


def cosine_schedule(T):
    """abar_t = (1 - beta_1) ... (1 - beta_t), the share of the data in the variance of x_t, falls
    like cos^2; beta is at most 0.999.   -> (T + 1,), abar_0 = 1."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return np.concatenate([[1.0], np.cumprod(1 - beta)])


def add_noise(x0, noise, abar):
    """sqrt(abar) x_0 + sqrt(1 - abar) noise.   x0, noise (N, D), abar (N, 1)."""
    return np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise


def time_features(t, cfg):
    """sin and cos of 1000 t / T, at frequencies 1000^(-k / K), k < K.   t (N,) -> (N, 2 K)."""
    K = cfg.frequencies
    angles = 1000 * t[:, None] / cfg.timesteps * 1000.0 ** (-np.arange(K) / K)      # (N, K)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def make_batch(cfg, step, dtype=np.float32):
    """New points at every step, each at a time of its own.   -> x_t (N, 2), features of t (N, 2 K),
    the noise in x_t (N, 2)."""
    rng = np.random.default_rng((cfg.seed, step))
    x0 = SCALE * draw_ring(rng, cfg.batch_size)
    t = rng.integers(1, cfg.timesteps + 1, cfg.batch_size)
    noise = rng.standard_normal(x0.shape)
    x = add_noise(x0, noise, cosine_schedule(cfg.timesteps)[t, None])
    return x.astype(dtype), time_features(t, cfg).astype(dtype), noise.astype(dtype)


# ---- model: hidden layers that all see the time --------------------------------------------------

def init_dense(sizes, features, rng, dtype):
    """W0, b0, W1, b1, ...; W (D + C, M), where C features come in beside D numbers; the last W (D,
    M). Standard deviation sqrt(2 / inputs) (He et al. 2015)."""
    params, last = {}, len(sizes) - 2
    for i, (D, M) in enumerate(zip(sizes, sizes[1:])):
        inputs = D + features * (i < last)
        params[f"W{i}"] = rng.standard_normal((inputs, M)) * (2 / inputs) ** 0.5
        params[f"b{i}"] = np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def init_params(cfg, rng, dtype=np.float32):
    """The denoiser of points in the plane."""
    return init_dense([2] + [cfg.hidden] * cfg.layers + [2], 2 * cfg.frequencies, rng, dtype)


def dense_forward(params, x, c):
    """x = silu([x, c] W + b), layer by layer; a linear layer at the end.   x (N, D), c (N, C): more
    inputs of every hidden layer, here the time -> (N, D)."""
    caches = []
    last = len(params) // 2 - 1
    for i in range(last):
        both = np.concatenate([x, c], axis=1)           # (N, D + C)
        x, linear = linear_forward(both, params[f"W{i}"], params[f"b{i}"])
        x, silu = silu_forward(x)
        caches.append((linear, silu))
    y, out = linear_forward(x, params[f"W{last}"], params[f"b{last}"])
    return y, (caches, out, c.shape[1])


def dense_backward(dout, cache):
    """dense_forward in reverse order -> dx, gradients under the keys of params."""
    (caches, out, C), grads = cache, {}
    last = len(caches)
    dx, grads[f"W{last}"], grads[f"b{last}"] = linear_backward(dout, out)
    for i in reversed(range(last)):
        linear, silu = caches[i]
        dx = silu_backward(dx, silu)
        dx, grads[f"W{i}"], grads[f"b{i}"] = linear_backward(dx, linear)
        dx = dx[:, :dx.shape[1] - C]                    # c is data
    return dx, grads


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, c, noise = batch
    y, cache = dense_forward(params, x, c)
    loss, loss_cache = mse_forward(y, noise)
    _, grads = dense_backward(mse_backward(1.0, loss_cache), cache)
    return loss, grads


# ---- optimizer and training ----------------------------------------------------------------------

def adam_update(params, grads, state, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """m, v: moving averages of g and g^2, divided by 1 - beta^t to correct for their start at 0;
    w <- w - lr m / (sqrt(v) + eps)."""
    t = state["t"] = state.get("t", 0) + 1
    for name, g in grads.items():
        m = state["m " + name] = beta1 * state.get("m " + name, 0) + (1 - beta1) * g
        v = state["v " + name] = beta2 * state.get("v " + name, 0) + (1 - beta2) * g * g
        m = m / (1 - beta1 ** t)
        v = v / (1 - beta2 ** t)
        params[name] -= lr * m / (np.sqrt(v) + eps)


def learning_rate(step, cfg):
    """Linear warmup times half a cosine, from step 1 on; the last step is small, not 0."""
    warmup = min(1, step / max(1, cfg.warmup))
    return cfg.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.steps))


def check_finite(loss, params=None):
    """Raise FloatingPointError unless the loss and all parameters are finite, and below 1e10."""
    if not all(np.abs(value).max() < 1e10 for value in (loss, *(params or {}).values())):
        raise FloatingPointError(f"training diverged (loss {loss:.4g}); lower the learning rate")


def progress(steps, losses, note=lambda: ""):
    """for step in progress(steps, losses): ... losses.append(loss).   Print ten lines, or one per
    minute. Ctrl-C ends the loop after the step at hand; a loss that is not finite is an error."""
    def stop(*signal_and_frame):
        stopped.append(True)
        signal.signal(signal.SIGINT, previous)          # the next Ctrl-C ends the program
    stopped = []
    main_thread = threading.current_thread() is threading.main_thread()
    previous = main_thread and signal.signal(signal.SIGINT, stop)
    start = printed = time.perf_counter()
    first = before = len(losses)
    try:
        for step in range(first + 1, steps + 1):
            yield step
            check_finite(losses[-1])
            now = time.perf_counter()
            due = step % math.ceil(steps / 10) == 0 or step == steps or now > printed + 60
            if due or stopped:
                mean = sum(losses[before:]) / (step - before)
                left = (now - start) / (step - first) * (steps - step)
                print(f"step {step:6d}/{steps}  mean loss {mean:#.4g}{note()}  |  "
                      f"{now - start:.1f} s  ({left:.0f} s left)", flush=True)
                printed, before = now, step
            if stopped:
                print(f"stopped after step {step}; this is what has been learned so far")
                break
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, previous)


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        adam_update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


# ---- sampling ------------------------------------------------------------------------------------

def predict_x0(params, x, t, abar, cfg):
    """What the net makes of x at time t, as clean data in the range of the data.   x (N, 2)."""
    c = time_features(np.full(len(x), t), cfg).astype(x.dtype)
    noise, _ = dense_forward(params, x, c)
    x0 = (x - (1 - abar[t]) ** 0.5 * noise) / abar[t] ** 0.5
    return np.clip(x0, -1.25, 1.25)


def denoise(predict, x, times, abar, rng, eta=1.0):
    """From noise x at times[0] to data at times[-1] = 0; predict(x, t) estimates x_0. With eta = 1
    (DDPM) new noise replaces a part of the old in every step.   x (N, D), abar a list -> list of x,
    one for each time."""
    path = [x]
    for t, later in zip(times, times[1:]):
        x0 = predict(x, t)
        noise = (x - abar[t] ** 0.5 * x0) / (1 - abar[t]) ** 0.5        # what x_0 leaves of x
        s2 = eta ** 2 * (1 - abar[later]) / (1 - abar[t]) * (1 - abar[t] / abar[later])
        new = rng.standard_normal(x.shape).astype(x.dtype)
        x = abar[later] ** 0.5 * x0 + (1 - abar[later] - s2) ** 0.5 * noise + s2 ** 0.5 * new
        path.append(x)
    return path


# ---- demo ----------------------------------------------------------------------------------------

def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def side_by_side(titles, pictures, gap="   "):
    """Print several pictures, each a list of lines, next to each other under their titles."""
    columns = [[title, *lines] for title, lines in zip(titles, pictures)]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns):
        print(gap.join(map(str.ljust, row, widths)).rstrip())


def draw_density(points, edge=2.6, cols=40, rows=20):
    """Points in the plane, from -edge to edge: blank where there are none, @ where most are.
    points (N, 2) -> list of lines."""
    square = [(-edge, edge), (-edge, edge)]
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], (rows, cols), square)
    picture = shade((counts[::-1] / max(1, counts.max())) ** 0.5)   # the first line is the top
    return ["".join(line) for line in picture]


def print_result(task, cfg, **metrics):
    """The last line of a run, for comparing runs: task, changed fields and seed, metrics."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name == "seed" or getattr(cfg, f.name) != f.default}
    line = f"result: task={task}"
    for name, value in {**changed, **metrics}.items():
        text = f"{value:#.4g}" if isinstance(value, float) else str(value)
        line += f" {name}={text.replace(' ', '_')}"
    print(line)


def main(cfg):
    """Learn to remove noise; start from noise and draw how eight modes come out of it."""
    start = time.perf_counter()
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"Eight Gaussians on a ring, {cfg.timesteps} noise levels: net of {cfg.layers} x "
          f"{cfg.hidden} units, {size} parameters")
    print("chance level: loss 1.000, noise predicted as 0")
    losses = train(params, cfg)
    rng = np.random.default_rng((cfg.seed, 10 ** 6))
    x = rng.standard_normal((4000, 2)).astype(np.float32)
    abar = cosine_schedule(cfg.timesteps).tolist()
    times = range(cfg.timesteps, -1, -1)
    path = denoise(lambda x, t: predict_x0(params, x, t, abar, cfg), x, times, abar, rng)
    points, real = path[-1] / SCALE, draw_ring(rng, 4000)
    distance, shares = sliced_wasserstein(points, real), mode_shares(points)
    check_finite(distance, params)
    print("4000 points on their way from noise to data; blank is no point, @ is most points:")
    for row in (1.0, 0.5, 0.3), (0.2, 0.1, 0.0):
        shown = [round(share * cfg.timesteps) for share in row]
        titles = [f"t = {t}" for t in shown]
        pictures = [draw_density(path[-1 - t] / SCALE, cols=30, rows=15) for t in shown]
        side_by_side(titles, pictures)
    modes, floor = int((shares >= 1 / 80).sum()), sliced_wasserstein(draw_ring(rng, 4000), real)
    print(f"{modes} of 8 modes covered; {shares.sum():.1%} of the points are within three standard "
          f"deviations of a mode\n(real points: {mode_shares(real).sum():.1%}); sliced Wasserstein "
          f"distance to real points {distance:.3f} (of two real samples: {floor:.3f})")
    print("\nNext: python diffusion.py targets      python diffusion.py shapes")
    print_result("ring", cfg, modes=modes, near=float(shares.sum()), sw=distance, params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: targets, fewer steps; a U-Net, guidance; latents; digits; flags. =====

MORE = """
Which target is best depends on the data (means of seeds 0 to 4)
    DDPM, then DDIM in 20, 10, 5 steps        and 20 steps with guidance 1, 3
    ring, near:        noise    0.960 0.886 0.776 0.353
                       v        0.968 0.893 0.773 0.308
                       x_0      0.504 0.478 0.454 0.385
    shapes, ok:        noise    0.934 0.795 0.743 0.604   0.926 0.944
                       x_0      0.999 0.998 0.998 0.988   0.993 0.934
    shapes, accuracy:  noise    0.945 0.867 0.862 0.858   0.984 0.995
                       x_0      1.000 1.000 0.999 0.999   1.000 1.000
    shapes, entropy:   noise    1.304 1.298 1.293 1.295   1.302 1.278
                       x_0      1.293 1.298 1.301 1.293   1.258 1.187
    latent, ok:        v        0.986 0.966 0.958 0.918   0.991 0.994
                       codes from a Gaussian fitted to all codes: 0.344
New noise (DDPM) lets late steps repair errors of early ones. Guidance buys accuracy where there is
some to buy (noise); where there is none (x_0) it costs diversity and exact pixels. The 40 shapes
can be learned by heart: they test the machinery, and only the digits test generalization.

Break it (seed 0)
    python diffusion.py; as it is: near 0.945 in all 100 steps. In 20 steps of DDIM 0.838: python
        diffusion.py targets, target noise; there draw_samples is changed in place of predict_x0
    dense_forward: 0 * c in place of c      0.138: without the time the net cannot tell how much of
                                            x_t is noise
    cosine_schedule: beta = np.linspace(1e-4, 0.02, T) * 1000 / T       0.863
    predict_x0: return x0, not clipped      0.949, but 0.181 and 6 of 8 modes in 20 steps: the first
                                            step divides by sqrt(abar_T), which is nearly 0
    predict_x0: features of t - 1           0.951, and 0.872 in 20 steps: a time that is wrong by 1
                                            does not show

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python diffusion.py --timesteps 10 (then 30, 300): what becomes of modes, near, sw?
    2. python diffusion.py shapes --no-label 0.5 (then 0.02): what do w = 0 and w = 3 lose?
    3. Derive and add Mish in place of SiLU: y = x tanh(log(1 + e^x)) (mish_forward, mish_backward).

Digits (seed 0, 3 minutes of one core)
    python diffusion.py mnist --data mnist --png digits.png (mlp.py --help says where to get it)
    accuracy, Frechet distance, variance: test images 0.972 0.037 1.08, reconstructions 0.986 0.025
    0.92, fitted Gaussian 0.095 1.38 2.63, DDIM in 20 steps 0.953 0.042 1.09, with guidance 0.5
    0.996 0.073 0.58, with guidance 3 1.000 0.176 0.37: guidance draws typical digits only
    python diffusion.py pixels --data mnist         the U-Net; 35 minutes of one core
    test images 0.972 0.037 1.08, DDIM in 20 steps 0.921 0.136 1.19, DDPM in 50 steps 0.932 0.106
    1.18, with guidance 1 0.998 0.123 0.45. The target decides: after 1500 steps DDIM in 20 steps
    has accuracy 0.85 with x_0, 0.70 with v, 0.17 with noise (400 samples)

Papers of these parts: Ronneberger et al. 2015 (U-Net), Heusel et al. 2017 (Frechet distance), Wu
and He 2018 (GroupNorm), Song et al. 2021 (DDIM), Ho and Salimans 2022 (guidance), Salimans and Ho
2022 (v), Rombach et al. 2022 (latent diffusion, cross-attention).
"""

import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import re
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- targets, fewer steps, guidance: python diffusion.py targets ---------------------------------
# Given x_t, any of x_0, the noise e and v = sqrt(abar) e - sqrt(1 - abar) x_0 yields the others. So
# a net may learn any of them; which is best depends on the data. Sampling may skip noise levels:
# with eta = 0 no new noise is added, and few long steps are enough (Song et al. 2021, DDIM).
# Guidance w moves the output away from that without a label: y + w (y - y_none).

@dataclass
class Targets(Config):
    """The ring: three targets in turn, and sampling in fewer steps."""
    target: Literal["noise", "v", "x0"] = "noise"  # what the net outputs in the first training


def noisy_batch(x0, labels, cfg, rng, dtype):
    """Data (N, D), each row at a time of its own, labels (N, L) one-hot or 0.   -> x_t (N, D),
    features of t and labels (N, 2 K + L), what the net is to output (N, D)."""
    t = rng.integers(1, cfg.timesteps + 1, len(x0))
    abar = cosine_schedule(cfg.timesteps)[t, None]
    noise = rng.standard_normal(x0.shape)
    v = np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0
    target = {"noise": noise, "v": v, "x0": x0}[cfg.target]
    c = np.concatenate([time_features(t, cfg), labels], axis=1)
    return [a.astype(dtype) for a in (add_noise(x0, noise, abar), c, target)]


def ring_batch(cfg, step, dtype=np.float32):
    """Points without labels.   -> x_t (N, 2), features of t (N, 2 K), targets (N, 2)."""
    rng = np.random.default_rng((cfg.seed, step))
    x0 = SCALE * draw_ring(rng, cfg.batch_size)
    return noisy_batch(x0, np.zeros((len(x0), 0)), cfg, rng, dtype)


def train_denoiser(title, params, cfg, make_batch, loss_and_grads=loss_and_grads):
    """Train params in place -> losses. A net that outputs 0 is the chance level."""
    size = sum(p.size for p in params.values())
    print(f"\n{title}, target {cfg.target}, {cfg.timesteps} noise levels: {size} parameters")
    *_, target = make_batch(replace(cfg, batch_size=4000), cfg.steps + 1)
    print(f"chance level: loss {(target ** 2).mean():.3f}, all outputs 0")
    return train(params, cfg, make_batch, loss_and_grads)


def draw_samples(net, labels, dim, cfg, sampler, limit=1.0):
    """Samples for labels (N, L) by net(x, c), x_0 within -limit to limit; sampler: steps, eta, w.
    -> x (N, dim) at each time, the x_0 estimated at each time but the last."""
    count, eta, w = sampler
    rng, guesses = np.random.default_rng((cfg.seed, 10 ** 6)), []
    abar = cosine_schedule(cfg.timesteps).tolist()

    def predict(x, t):
        features = time_features(np.full(len(x), t), cfg)
        y = net(x, np.concatenate([features, labels], axis=1).astype(x.dtype))
        if w:
            none = net(x, np.concatenate([features, 0 * labels], axis=1).astype(x.dtype))
            y = y + w * (y - none)
        a, b = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
        x0 = {"noise": (x - b * y) / a, "v": a * x - b * y, "x0": y}[cfg.target]
        guesses.append(np.clip(x0, -limit, limit))
        return guesses[-1]
    T = cfg.timesteps
    times = np.linspace(T, 1, min(count, T)).round().astype(int).tolist()   # first and last level
    x = rng.standard_normal((len(labels), dim)).astype(np.float32)
    return denoise(predict, x, [*times, 0], abar, rng, eta), guesses


FEWER = {"ddpm": (math.inf, 1.0, 0.0), "ddim_50": (50, 0.0, 0.0), "ddim_20": (20, 0.0, 0.0),
         "ddim_10": (10, 0.0, 0.0), "ddim_5": (5, 0.0, 0.0)}        # steps, eta, w
GUIDED = {"guided_half": (20, 0.0, 0.5), "guided_1": (20, 0.0, 1.0), "guided_3": (20, 0.0, 3.0)}
FOR_PIXELS = {"ddim_20": (20, 0.0, 0.0), "ddpm_50": (50, 1.0, 0.0), "guided_1": (50, 1.0, 1.0)}


def print_row(name, metrics, end=""):
    """A line of a table -> metrics, their names begun with name."""
    print(f"  {name:13s}" + "".join(f" {key} {v:<7.4g}" for key, v in metrics.items()) + end)
    return {f"{name}_{key}": value for key, value in metrics.items()}


def compare_samplers(samplers, net, labels, dim, cfg, evaluate, limit=1.0):
    """A line for each sampler: evaluate(samples, labels), seconds.   -> metrics; of the first 100
    samples x at each time (S + 1, 100, dim) and estimated x_0 (S, 100, dim)."""
    metrics, paths = {}, {}
    for name, sampler in samplers.items():
        start = time.perf_counter()
        path, guesses = draw_samples(net, labels, dim, cfg, sampler, limit)
        seconds = time.perf_counter() - start
        metrics.update(print_row(name, evaluate(path[-1], labels), f" | {seconds:.1f} s"))
        paths[name] = [np.stack([x[:100] for x in xs]) for xs in (path, guesses)]
    return metrics, paths


def run_targets(cfg):
    """Learn each target; count good points by the number of steps; draw paths of both samplers."""
    start, metrics, pictures = time.perf_counter(), {}, []
    real = draw_ring(np.random.default_rng((cfg.seed, 10 ** 7)), 4000)

    def evaluate(x, labels):
        shares = mode_shares(x / SCALE)
        return dict(modes=int((shares >= 1 / 80).sum()), near=float(shares.sum()),
                    sw=sliced_wasserstein(x / SCALE, real))
    for target in dict.fromkeys([cfg.target, "noise", "v", "x0"]):
        own = replace(cfg, target=target)
        params = init_params(own, np.random.default_rng(cfg.seed))
        losses = train_denoiser("Eight Gaussians on a ring", params, own, ring_batch)
        print(f"4000 samples, in {cfg.timesteps} steps at most: modes covered, share near a mode, "
              "sliced Wasserstein\ndistance (sw)")
        found, paths = compare_samplers(FEWER, lambda x, c: dense_forward(params, x, c)[0],
                                        np.zeros((4000, 0)), 2, own, evaluate, 1.25)
        metrics.update({f"{target}_{key}": value for key, value in found.items()})
        for path, _ in (paths["ddpm"], paths["ddim_50"]):
            pictures.append(draw_density(path[:, 2:5].reshape(-1, 2) / SCALE))
        if len(losses) < cfg.steps:
            break
    print("\nPaths of three points from noise to data; blank is none, @ is most of their positions")
    side_by_side(["DDPM, new noise in every step", "DDIM, no new noise"], pictures[:2])
    print("\nNext: python diffusion.py targets --timesteps 30      python diffusion.py shapes")
    print_result("targets", cfg, **metrics, steps=len(losses), seconds=time.perf_counter() - start)


# ---- layers of images: convolution, GroupNorm, attention, as in cnn.py and transformer.py --------

def conv_forward(x, W):
    """y[q] = sum_p x[q + p] W[p]; zeros around x, k // 2 deep, keep the size; k is odd.
    x (N, H, W, C), W (k, k, C, M) -> (N, H, W, M)."""
    k, _, C, M = W.shape
    edge = (k // 2, k // 2)
    padded = np.pad(x, ((0, 0), edge, edge, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, k * k * C)        # a patch per row
    y = patches @ W.reshape(-1, M)                      # (N H W, M)
    return y.reshape(*x.shape[:3], M), (patches, W)


def conv_backward(dout, cache):
    """dW = patches^T dout. dx is dout, convolved with W rotated by 180 degrees, C and M swapped."""
    patches, W = cache
    dW = patches.T @ dout.reshape(-1, dout.shape[3])
    dx, _ = conv_forward(dout, W[::-1, ::-1].swapaxes(2, 3))
    return dx, dW.reshape(W.shape)


def groupnorm_forward(x, gamma, beta, groups, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps), mean and var of each image over
    all pixels of a group of channels: no batch is needed (Wu and He 2018).   x (N, H, W, C)."""
    N, H, W, C = x.shape
    xg = x.reshape(N, H * W, groups, C // groups)
    mean, var = xg.mean(axis=(1, 3), keepdims=True), xg.var(axis=(1, 3), keepdims=True)
    inv_std = (var + eps) ** -0.5
    xhat = (xg - mean) * inv_std
    return gamma * xhat.reshape(x.shape) + beta, (xhat, gamma, inv_std)


def groupnorm_backward(dout, cache):
    """g = gamma dout, dx = (g - mean(g) - xhat mean(g xhat)) / std, with means over a group;
    dgamma = sum dout xhat, dbeta = sum dout."""
    xhat, gamma, inv_std = cache
    g = (gamma * dout).reshape(xhat.shape)
    mean_g = g.mean(axis=(1, 3), keepdims=True)
    mean_g_xhat = (g * xhat).mean(axis=(1, 3), keepdims=True)
    dx = (g - mean_g - xhat * mean_g_xhat) * inv_std
    dgamma = (dout * xhat.reshape(dout.shape)).sum(axis=(0, 1, 2))
    return dx.reshape(dout.shape), dgamma, dout.sum(axis=(0, 1, 2))


def attention_forward(q, k, v, mask=True):
    """out = p v, p = softmax(q k^T / sqrt(d)) over the positions where mask is True.
    q (B, H, T, d), k, v (B, H, S, d), mask fit for (B, H, T, S) -> out (B, H, T, d)."""
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5  # (B, H, T, S)
    scores = np.where(mask, scores, -1e9)
    p = np.exp(scores - scores.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    return p @ v, (q, k, v, p)


def attention_backward(dout, cache):
    """dv = p^T dout, dp = dout v^T, ds = p (dp - the sum of p dp over the keys), 0 where p is 0,
    dq = ds k / sqrt(d), dk = ds^T q / sqrt(d)."""
    q, k, v, p = cache
    dv = p.swapaxes(2, 3) @ dout
    dp = dout @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(axis=3, keepdims=True))
    ds *= q.shape[3] ** -0.5
    return ds @ k, ds.swapaxes(2, 3) @ q, dv


def multihead_forward(x, p, heads, B, mask, memory):
    """Attention, queries from x (B T, D), keys and values from memory (B S, D).   -> (B T, D)."""
    D = x.shape[1]
    q, q_cache = linear_forward(x, p["Wq"], p["bq"])
    kv, kv_cache = linear_forward(memory, p["Wkv"], p["bkv"])       # (B S, 2 D)
    q = q.reshape(B, -1, heads, D // heads).swapaxes(1, 2)          # (B, H, T, d)
    kv = kv.reshape(B, -1, 2, heads, D // heads)                    # (B, S, 2, H, d)
    k, v = kv.transpose(2, 0, 3, 1, 4)                              # (B, H, S, d) each
    y, attention = attention_forward(q, k, v, mask)
    y, out = linear_forward(y.swapaxes(1, 2).reshape(x.shape), p["Wo"], p["bo"])
    return y, (q_cache, kv_cache, attention, out, q.shape)


def multihead_backward(dout, cache):
    """multihead_forward in reverse order.   -> dx, gradients, dmemory."""
    q_cache, kv_cache, attention, out, (B, H, T, d) = cache
    g = {}
    dy, g["Wo"], g["bo"] = linear_backward(dout, out)
    dy = dy.reshape(B, T, H, d).swapaxes(1, 2)
    dq, dk, dv = attention_backward(dy, attention)
    dq = dq.swapaxes(1, 2).reshape(B * T, H * d)
    dkv = np.stack([dk, dv]).transpose(1, 3, 0, 2, 4).reshape(-1, 2 * H * d)
    dx, g["Wq"], g["bq"] = linear_backward(dq, q_cache)
    dmemory, g["Wkv"], g["bkv"] = linear_backward(dkv, kv_cache)
    return dx, g, dmemory


def space_to_depth(x):
    """2 x 2 pixels as one of 4 C channels.   (N, H, W, C) -> (N, H / 2, W / 2, 4 C). It only moves
    numbers, so its backward is depth_to_space."""
    N, H, W, C = x.shape
    return x.reshape(N, H // 2, 2, W // 2, 2, C).swapaxes(2, 3).reshape(N, H // 2, W // 2, 4 * C)


def depth_to_space(x):
    """The inverse of space_to_depth."""
    N, H, W, C = x.shape
    return x.reshape(N, H, W, 2, 2, C // 4).swapaxes(2, 3).reshape(N, 2 * H, 2 * W, C // 4)


# ---- U-Net: python diffusion.py shapes -----------------------------------------------------------
#     x -> in -> res1 ------------- skip -------------> merge -> res4 -> out
#                  down -> res2 -> self -> cross -> res3 -> up
# In res blocks time and label are added; self lets distant pixels exchange what they hold; cross
# lets them read four tokens of the label.

GROUPS, HEADS, TOKENS = 4, 4, 4


@dataclass
class Shapes:
    """Ten shapes at four positions, 8 x 8 pixels, drawn by label."""
    target: Literal["noise", "v", "x0"] = "noise"  # what the net outputs
    timesteps: int = 100    # noise levels T
    frequencies: int = 16   # features of t are this many sines, and as many cosines
    channels: int = 32      # channels at half the resolution; half as many again at a quarter
    no_label: float = 0.15  # share of the training images that have no label
    batch_size: int = 32    # images per step
    steps: int = 1100       # optimizer steps
    lr: float = 0.005       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    samples: int = 200      # images to draw
    seed: int = 0           # random seed


SHAPES = "disc ring square frame triangle diamond plus cross lines bars".split()


def draw_templates():
    """Ten shapes at 2 x 2 positions: 40 images of 8 x 8 pixels, of which any two differ in at least
    4 pixels.   -> (40, 64), 1 is ink; rows 4 k to 4 k + 3 show SHAPES[k]."""
    k = np.arange(40)
    center = 3 + np.stack([k // 2 % 2, k % 2])[:, :, None]      # (2, 40, 1)
    y, x = (np.arange(8) - center) / 3.2                # (40, 8) each; the shape is within 1
    y, x = np.broadcast_arrays(y[:, :, None], x[:, None, :])    # (40, 8, 8)
    ax, ay, r = abs(x), abs(y), np.hypot(x, y)
    far, near = np.maximum(ax, ay), np.minimum(ax, ay)
    inside = [r < 1,                                    # disc
              (0.6 < r) & (r < 1),                      # ring
              far < 0.85,                               # square
              (0.45 < far) & (far < 0.85),              # frame
              (y < 0.75) & (ax < (y + 1) * 0.55),       # triangle
              ax + ay < 1.05,                           # diamond
              (near < 0.25) & (far < 1),                # plus
              (abs(ax - ay) < 0.3) & (far < 0.8),       # cross
              (abs(ay - 0.55) < 0.22) & (ax < 0.9),     # lines
              (abs(ax - 0.55) < 0.22) & (ay < 0.9)]     # bars
    return np.choose(k[:, None, None] // 4, inside).reshape(40, 64).astype(float)


TEMPLATES = draw_templates()


def nearest_template(images):
    """images (N, 64), ink where above 0.5 -> index of the nearest template (N,), the number of
    pixels that differ from it (N,)."""
    wrong = ((images > 0.5)[:, None] != (TEMPLATES > 0.5)).sum(axis=2)      # (N, 40)
    return wrong.argmin(axis=1), wrong.min(axis=1)


def draw_gray(images):
    """Images (n, P) from -1 to 1, side by side, one character per pixel: . is -1, @ is 1; of large
    ones every third row and second column."""
    side = math.isqrt(images.shape[1])
    light = shade(0.11 + 0.45 * (np.clip(images, -1, 1) + 1)).reshape(-1, side, side)
    if side > 20:
        light = light[:, ::3, ::2]
    for line in light.swapaxes(0, 1):                   # (n, W)
        print("  ".join("".join(pixels) for pixels in line))


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def prefixed(params, prefix):
    """The inverse of part."""
    return {prefix + name: w for name, w in params.items()}


def training_images(cfg):
    """The training images (n, P), from 0 to 1, and labels (n,) of a task."""
    return digits(cfg.data, "train") if hasattr(cfg, "data") else (TEMPLATES, np.arange(40) // 4)


def image_batch(cfg, step, dtype=np.float32):
    """-> x_t (N, P), features of t and labels (N, 2 K + 10), what the net is to output (N, P)."""
    rng = np.random.default_rng((cfg.seed, step))
    images, labels = training_images(cfg)
    rows = rng.integers(0, len(images), cfg.batch_size)
    known = rng.random((cfg.batch_size, 1)) >= cfg.no_label
    return noisy_batch(2 * images[rows] - 1, np.eye(10)[labels[rows]] * known, cfg, rng, dtype)


def init_unet(cfg, rng, dtype=np.float32):
    """The U-Net of images of one channel. The last layer of every branch begins at 0."""
    def weights(*shape):
        return rng.standard_normal(shape) / math.prod(shape[:-1]) ** 0.5
    C, M, E = cfg.channels, 3 * cfg.channels // 2, 2 * cfg.channels
    params = prefixed(init_dense([2 * cfg.frequencies + 10, E, E], 0, rng, dtype), "time.")
    params.update({
        "label.W": rng.standard_normal((10, TOKENS * M)), "label.b": np.zeros(TOKENS * M),
        "in.W": weights(3, 3, 4, C), "down.W": weights(1, 1, 4 * C, M),
        "up.W": weights(3, 3, M, 4 * C), "merge.W": weights(3, 3, 2 * C, C),
        "out.gamma": np.ones(C), "out.beta": np.zeros(C), "out.W": np.zeros((3, 3, C, 4))})
    for name, n in (("res1.", C), ("res2.", M), ("res3.", M), ("res4.", C)):
        block = {"W1": weights(3, 3, n, n), "V": weights(E, n), "b": np.zeros(n),
                 "W2": np.zeros((3, 3, n, n)), "gamma1": np.ones(n), "beta1": np.zeros(n),
                 "gamma2": np.ones(n), "beta2": np.zeros(n)}
        params.update(prefixed(block, name))
    for name in ("self.", "cross."):
        block = {"gamma": np.ones(M), "beta": np.zeros(M), "Wq": weights(M, M), "bq": np.zeros(M),
                 "Wkv": weights(M, 2 * M), "bkv": np.zeros(2 * M), "Wo": np.zeros((M, M)),
                 "bo": np.zeros(M)}
        params.update(prefixed(block, name))
    return {name: value.astype(dtype) for name, value in params.items()}


def resblock_forward(x, p, c):
    """x + f(x): twice GroupNorm, SiLU, convolution; between them the time is added to every pixel.
    x (N, H, W, C), c (N, E)."""
    y, norm1 = groupnorm_forward(x, p["gamma1"], p["beta1"], GROUPS)
    y, silu1 = silu_forward(y)
    y, conv1 = conv_forward(y, p["W1"])
    shift, time_cache = linear_forward(c, p["V"], p["b"])           # (N, C)
    y, norm2 = groupnorm_forward(y + shift[:, None, None], p["gamma2"], p["beta2"], GROUPS)
    y, silu2 = silu_forward(y)
    y, conv2 = conv_forward(y, p["W2"])
    return x + y, (norm1, silu1, conv1, time_cache, norm2, silu2, conv2)


def resblock_backward(dout, cache):
    """resblock_forward in reverse order -> dx, gradients, dc."""
    norm1, silu1, conv1, time_cache, norm2, silu2, conv2 = cache
    g = {}
    dy, g["W2"] = conv_backward(dout, conv2)
    dy = silu_backward(dy, silu2)
    dy, g["gamma2"], g["beta2"] = groupnorm_backward(dy, norm2)
    dc, g["V"], g["b"] = linear_backward(dy.sum(axis=(1, 2)), time_cache)       # one for all pixels
    dy, g["W1"] = conv_backward(dy, conv1)
    dy = silu_backward(dy, silu1)
    dy, g["gamma1"], g["beta1"] = groupnorm_backward(dy, norm1)
    return dout + dy, g, dc


def attend_forward(x, p, memory):
    """x + attention of pixels, after GroupNorm, to memory.   x (N, H, W, C), memory (N K, C)."""
    y, norm = groupnorm_forward(x, p["gamma"], p["beta"], GROUPS)
    y, attention = multihead_forward(y.reshape(-1, x.shape[3]), p, HEADS, len(x), True, memory)
    return x + y.reshape(x.shape), (norm, attention)


def attend_backward(dout, cache):
    """attend_forward in reverse order -> dx, gradients, dmemory."""
    norm, attention = cache
    dy, g, dmemory = multihead_backward(dout.reshape(-1, dout.shape[3]), attention)
    dy, g["gamma"], g["beta"] = groupnorm_backward(dy.reshape(dout.shape), norm)
    return dout + dy, g, dmemory


def unet_forward(params, x, c):
    """x (N, P) images of one channel, c (N, 2 K + 10) features of t, then the label -> (N, P)."""
    p = functools.partial(part, params)                 # p("res1."): the parameters of res1
    N, side, cache = len(x), math.isqrt(x.shape[1]), {}
    tokens, cache["label"] = linear_forward(c[:, -10:], params["label.W"], params["label.b"])
    c, cache["time"] = dense_forward(p("time."), c, c[:, :0])
    c, cache["silu"] = silu_forward(c)
    x = space_to_depth(x.reshape(N, side, side, 1))
    x, cache["in"] = conv_forward(x, params["in.W"])
    skip, cache["res1"] = resblock_forward(x, p("res1."), c)
    x, cache["down"] = conv_forward(space_to_depth(skip), params["down.W"])
    x, cache["res2"] = resblock_forward(x, p("res2."), c)
    x, cache["self"] = attend_forward(x, p("self."), x.reshape(-1, x.shape[3]))
    x, cache["cross"] = attend_forward(x, p("cross."), tokens.reshape(N * TOKENS, -1))
    x, cache["res3"] = resblock_forward(x, p("res3."), c)
    x, cache["up"] = conv_forward(x, params["up.W"])
    x = np.concatenate([depth_to_space(x), skip], axis=3)
    x, cache["merge"] = conv_forward(x, params["merge.W"])
    x, cache["res4"] = resblock_forward(x, p("res4."), c)
    x, cache["norm"] = groupnorm_forward(x, params["out.gamma"], params["out.beta"], GROUPS)
    x, cache["silu_out"] = silu_forward(x)
    x, cache["out"] = conv_forward(x, params["out.W"])
    return depth_to_space(x).reshape(N, -1), cache


def unet_backward(dout, cache):
    """unet_forward in reverse order -> gradients under the keys of params. The time and the skip
    are used more than once, so their gradients add."""
    g, own, N, side = {}, {}, len(dout), math.isqrt(dout.shape[1])
    dx = space_to_depth(dout.reshape(N, side, side, 1))
    dx, g["out.W"] = conv_backward(dx, cache["out"])
    dx = silu_backward(dx, cache["silu_out"])
    dx, g["out.gamma"], g["out.beta"] = groupnorm_backward(dx, cache["norm"])
    dx, own["res4."], dc4 = resblock_backward(dx, cache["res4"])
    dx, g["merge.W"] = conv_backward(dx, cache["merge"])
    dx, dskip = np.split(dx, 2, axis=3)
    dx, g["up.W"] = conv_backward(space_to_depth(dx), cache["up"])
    dx, own["res3."], dc3 = resblock_backward(dx, cache["res3"])
    dx, own["cross."], dtokens = attend_backward(dx, cache["cross"])
    dx, own["self."], dpixels = attend_backward(dx, cache["self"])
    dx, own["res2."], dc2 = resblock_backward(dx + dpixels.reshape(dx.shape), cache["res2"])
    dx, g["down.W"] = conv_backward(dx, cache["down"])
    dx, own["res1."], dc1 = resblock_backward(depth_to_space(dx) + dskip, cache["res1"])
    _, g["in.W"] = conv_backward(dx, cache["in"])
    dc = silu_backward(dc1 + dc2 + dc3 + dc4, cache["silu"])
    _, own["time."] = dense_backward(dc, cache["time"])
    _, g["label.W"], g["label.b"] = linear_backward(dtokens.reshape(N, -1), cache["label"])
    for prefix, grads in own.items():
        g.update(prefixed(grads, prefix))
    return g


def unet_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, c, target = batch
    y, cache = unet_forward(params, x, c)
    loss, loss_cache = mse_forward(y, target)
    return loss, unet_backward(mse_backward(1.0, loss_cache), cache)


def count_shapes(images, labels):
    """What can be counted, as there are only 40 templates; entropy: of the four positions, mean
    over the labels, at most log 4 = 1.386.   images (N, 64), labels (N, 10) -> metrics."""
    index, wrong = nearest_template(images > 0)
    right = index // 4 == labels.argmax(axis=1)
    n = np.bincount(index[right], minlength=40).reshape(10, 4)
    p = n / np.maximum(1, n.sum(axis=1, keepdims=True))
    entropy = -(p * np.log(np.maximum(p, 1e-9))).sum(axis=1).mean()
    return dict(ok=float((wrong <= 2).mean()), exact=float((wrong == 0).mean()),
                accuracy=float(right.mean()), entropy=float(entropy),
                templates=len(np.unique(index[wrong <= 6])))


def train_unet(cfg, evaluate, legend):
    """Train the denoiser; evaluate samples; show how one comes out of noise.   -> metrics, the
    first 100 images of each sampler, losses."""
    side = math.isqrt(training_images(cfg)[0].shape[1])
    params = init_unet(cfg, np.random.default_rng(cfg.seed))
    title = f"U-Net, {cfg.channels} channels, for {side} x {side} pixels"
    losses = train_denoiser(title, params, cfg, image_batch, unet_loss_and_grads)

    def net(x, c):
        chunks = [slice(i, i + 200) for i in range(0, len(x), 200)]         # saves memory
        return np.concatenate([unet_forward(params, x[chunk], c[chunk])[0] for chunk in chunks])
    print(f"{cfg.samples} samples: {legend}")
    labels = np.eye(10)[np.arange(cfg.samples) % 10]
    samplers = {**FEWER, **GUIDED} if side == 8 else FOR_PIXELS
    metrics, paths = compare_samplers(samplers, net, labels, side * side, cfg, evaluate)
    if side == 8:
        show_denoising(*paths["ddpm"], cfg)
    return metrics, {name: path[-1] for name, (path, _) in paths.items()}, losses


def show_denoising(path, guesses, cfg, label=4):
    """One image at several times, and what the net makes of each."""
    T = cfg.timesteps
    shown = [math.ceil(T * share) for share in (1, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.02)]
    rows = [T - t for t in shown]
    print(f"A {SHAPES[label]} out of noise, ink is @; columns: t =", *shown)
    draw_gray(path[rows, label])
    print("The x_0 that the net estimates from each of them:")
    draw_gray(guesses[rows, label])


def show_guidance(images, label=4, n=8):
    """n images of one label for each guidance, the same noise in each column."""
    for name in ("ddim_20", "guided_1", "guided_3"):
        x = images[name][label::10][:n]
        index, wrong = nearest_template(x > 0)
        marks = [f"{'exact' if w == 0 else str(w) + ' wrong':8s}" if k // 4 == label else "other   "
                 for k, w in zip(index, wrong)]
        print(f"{name}, {SHAPES[label]}, ink is @; columns: samples, in all rows of one noise")
        draw_gray(x)
        print("  ".join(marks).rstrip())


def tile_images(images, columns, scale):
    """Images (N, H, W, C) of 1 or 3 channels in rows of `columns`, in white frames; every pixel
    becomes a square of scale x scale.   -> one image (., ., 3)"""
    images = np.repeat(images.repeat(scale, axis=1).repeat(scale, axis=2), 3 // images.shape[3], 3)
    images = np.pad(images, ((0, -len(images) % columns), (4, 4), (4, 4), (0, 0)),
                    constant_values=1)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return rows.reshape(len(rows) * rows.shape[1], -1, 3)


PNG = b"\x89PNG\r\n\x1a\n"    # the first bytes of every PNG file


def write_png(path, image):
    """Colors (H, W, 3) from 0 to 1 as a PNG file: a signature, then chunks of length, name, content
    and checksum.   Raises InputError."""
    H, W, _ = image.shape
    rows = (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8).reshape(H, 3 * W)
    rows = np.concatenate([np.zeros((H, 1), np.uint8), rows], axis=1)   # 0: an unfiltered row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    raw = b"".join(struct.pack(">I", len(body)) + name + body
                   + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    try:
        Path(path).write_bytes(PNG + raw)
    except OSError as error:
        raise InputError(f"--png {path}: expected a file to write, found: {error}") from None


def try_png(path):
    """Raise InputError if no picture can be written to path, or if something else stands there."""
    if os.path.exists(path):
        own = os.path.isfile(path) and os.access(path, os.R_OK | os.W_OK)
        own = own and Path(path).read_bytes().startswith(PNG)
        require(own, f"--png {path}", "a new file or a PNG", "something else, which stays")
    else:
        write_png(path, np.zeros((1, 1, 3)))            # before the training, not after it
        os.remove(path)


def run_images(cfg):
    """A task with labels: train a denoiser; count or judge its samples, and show some."""
    start = time.perf_counter()
    evaluate = count_shapes
    legend = ("share with at most two wrong pixels (ok), with none (exact), of the\nasked shape "
              "(accuracy); entropy of the four positions; templates hit (at\nmost 6 wrong), of 40")
    if hasattr(cfg, "data"):
        require(cfg.data, "--data", "the folder of MNIST (python mlp.py --help says where)",
                cfg.data)
        if cfg.png:
            try_png(cfg.png)
        cfg = replace(cfg, samples=min(cfg.samples, len(digits(cfg.data, "test")[0]) // 2))
        evaluate, legend = judge_of(cfg)
    train_model = train_unet if hasattr(cfg, "channels") else train_latents
    metrics, images, losses = train_model(cfg, evaluate, legend) if evaluate else ({}, {}, [])
    if images and hasattr(cfg, "data"):
        print("Samples of 0 to 9 with guidance 1; . is 0, @ is 1:")
        draw_gray(images["guided_1"][:5])
        draw_gray(images["guided_1"][5:10])
        if cfg.png:
            hundred = (images["guided_1"][:100].reshape(-1, 28, 28, 1) + 1) / 2
            write_png(cfg.png, tile_images(hundred, 10, 2))
            print(f"{cfg.png}: {len(hundred)} samples, a column per label")
    elif images:
        show_guidance(images)
    *_, task = (name for name, row in TASKS.items() if isinstance(cfg, row.config))
    print("\nNext: " + NEXT[task])
    print_result(task, cfg, **metrics, steps=len(losses), seconds=time.perf_counter() - start)


# ---- latent diffusion: python diffusion.py latent ------------------------------------------------
# An autoencoder (vae.py) turns images into codes of few numbers; diffusion works on codes, which
# costs little (Rombach et al. 2022). A small beta leaves the codes free: their distribution is
# learned, instead of being forced to N(0, I).

@dataclass
class Latent:
    """Shapes by label: diffusion on the codes of an autoencoder."""
    code: int = 6           # numbers per code
    coder: int = 128        # units per hidden layer of the encoder and of the decoder
    beta: float = 0.01      # weight of the KL divergence from N(0, I)
    target: Literal["noise", "v", "x0"] = "v"  # what the denoiser outputs
    timesteps: int = 100    # noise levels T
    frequencies: int = 16   # features of t are this many sines, and as many cosines
    hidden: int = 128       # units per hidden layer of the denoiser
    layers: int = 3         # hidden layers of the denoiser
    no_label: float = 0.15  # share of the training images that have no label
    batch_size: int = 128   # images per step
    steps: int = 3000       # optimizer steps, of the autoencoder and of the denoiser
    lr: float = 0.006       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    samples: int = 2000     # images to draw
    seed: int = 0           # random seed


def init_vae(cfg, rng, dtype=np.float32):
    """Encoder "enc." and decoder "dec.", each with two hidden layers."""
    pixels, H = training_images(cfg)[0].shape[1], cfg.coder
    return {**prefixed(init_dense([pixels, H, H, 2 * cfg.code], 0, rng, dtype), "enc."),
            **prefixed(init_dense([cfg.code, H, H, pixels], 0, rng, dtype), "dec.")}


def vae_batch(cfg, step, dtype=np.float32):
    """-> images (N, P) from 0 to 1, noise for the codes (N, D)."""
    rng = np.random.default_rng((cfg.seed, step))
    images, _ = training_images(cfg)
    x = images[rng.integers(0, len(images), cfg.batch_size)]
    return x.astype(dtype), rng.standard_normal((cfg.batch_size, cfg.code)).astype(dtype)


def vae_loss_and_grads(params, batch, cfg):
    """-log p(x|z) + beta KL, both summed over their dimensions, mean over the images; the gradients
    by the logits, mu and log_var are those of vae.py.   -> loss, gradients."""
    x, e = batch
    y, encoder = dense_forward(part(params, "enc."), x, x[:, :0])
    mu, log_var = np.split(y, 2, axis=1)                # (N, D) each
    sigma = np.exp(0.5 * log_var)
    logits, decoder = dense_forward(part(params, "dec."), mu + sigma * e, x[:, :0])
    nats = np.maximum(logits, 0) + np.log(1 + np.exp(-abs(logits))) - x * logits        # (N, P)
    kl = 0.5 * (mu ** 2 + sigma ** 2 - 1 - log_var)     # (N, D)
    dz, dec = dense_backward((sigmoid(logits) - x) / len(x), decoder)
    dmu = dz + cfg.beta * mu / len(x)
    dlog_var = 0.5 * (dz * e * sigma + cfg.beta * (sigma ** 2 - 1) / len(x))
    _, enc = dense_backward(np.concatenate([dmu, dlog_var], axis=1), encoder)
    loss = nats.sum(axis=1).mean() + cfg.beta * kl.sum(axis=1).mean()
    return loss, {**prefixed(enc, "enc."), **prefixed(dec, "dec.")}


def train_latents(cfg, evaluate, legend):
    """Train the autoencoder, then the denoiser of its codes; evaluate what codes of every source
    decode to.   -> metrics, the first 100 images of each sampler, losses of the last training."""
    images, labels = training_images(cfg)
    vae = init_vae(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in vae.values())
    print(f"\n{len(images)} images of {images.shape[1]} pixels as codes of {cfg.code} numbers: "
          f"autoencoder, {cfg.coder} units per layer, {size} parameters")
    p = images.mean(axis=0).clip(0.01, 0.99)
    chance = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    print(f"chance level: loss {chance:.3f}, every pixel at its mean")
    losses = train(vae, cfg, vae_batch, vae_loss_and_grads)
    if len(losses) < cfg.steps:
        return {}, {}, losses
    x = images.astype(np.float32)
    mu, log_var = np.split(dense_forward(part(vae, "enc."), x, x[:, :0])[0], 2, axis=1)
    sigma = np.exp(0.5 * log_var)
    covariance = np.cov(mu.T) + np.diag((sigma ** 2).mean(axis=0))      # of the codes
    shift, scale = mu.mean(axis=0), np.sqrt(np.diag(covariance))

    def codes_batch(cfg, step, dtype=np.float32):
        rng = np.random.default_rng((cfg.seed, step))
        rows = rng.integers(0, len(mu), cfg.batch_size)
        z = mu[rows] + sigma[rows] * rng.standard_normal((cfg.batch_size, cfg.code))
        known = rng.random((cfg.batch_size, 1)) >= cfg.no_label
        onehot = np.eye(10)[labels[rows]]
        return noisy_batch((z - shift) / scale, onehot * known, cfg, rng, dtype)

    def decode(z):
        z = z.astype(np.float32)
        return 2 * sigmoid(dense_forward(part(vae, "dec."), z, z[:, :0])[0]) - 1
    sizes = [cfg.code] + [cfg.hidden] * cfg.layers + [cfg.code]
    params = init_dense(sizes, 2 * cfg.frequencies + 10, np.random.default_rng(cfg.seed), x.dtype)
    title = f"Diffusion of the codes, net of {cfg.layers} x {cfg.hidden} units"
    losses = train_denoiser(title, params, cfg, codes_batch)
    rng, n, metrics = np.random.default_rng((cfg.seed, 10 ** 6)), cfg.samples, {}
    rows = rng.integers(0, len(mu), n)
    sources = {"reconstructed": mu[rows], "normal": rng.standard_normal((n, cfg.code)),
               "fitted_normal": rng.multivariate_normal(shift, covariance, n)}
    print(f"{n} samples: {legend}")
    for name, z in sources.items():
        metrics.update(print_row(name, evaluate(decode(z), np.eye(10)[labels[rows]])))
    found, paths = compare_samplers(
        {**FEWER, **GUIDED}, lambda x, c: dense_forward(params, x, c)[0],
        np.eye(10)[np.arange(n) % 10], cfg.code, cfg,
        lambda z, labels: evaluate(decode(shift + scale * z), labels), limit=4.0)
    samples = {name: decode(shift + scale * path[-1]) for name, (path, _) in paths.items()}
    return {**metrics, **found}, samples, losses


# ---- handwritten digits: python diffusion.py mnist --data mnist;   pixels ------------------------
# Nothing can be counted here. A judge, a net trained to read digits, is asked instead: is a sample
# read as the digit asked for (accuracy)? How far are the judge's features of samples from those of
# test images (Frechet distance of two Gaussians fitted to them; Heusel et al. 2017)? How much do
# they vary within a class? Both in units of the variance of real images within a class; such
# distances compare for one judge and one number of samples only.

@dataclass
class Mnist(Latent):
    """Handwritten digits by label: diffusion on the codes of an autoencoder."""
    code: int = 24          # numbers per code
    coder: int = 400        # units per hidden layer of the encoder and of the decoder
    beta: float = 0.3       # weight of the KL divergence from N(0, I)
    timesteps: int = 400    # noise levels T
    hidden: int = 512       # units per hidden layer of the denoiser
    layers: int = 4         # hidden layers of the denoiser
    batch_size: int = 256   # images per step
    lr: float = 0.002       # peak learning rate
    steps: int = 2500       # optimizer steps, of each of three trainings
    data: str = ""          # folder with the four files of MNIST
    png: str = ""           # file to write 100 samples to, guidance 1


@dataclass
class Pixels(Shapes):
    """Handwritten digits by label: the U-Net, in pixels."""
    target: Literal["noise", "v", "x0"] = "x0"  # what the net outputs
    timesteps: int = 400    # noise levels T
    batch_size: int = 64    # images per step
    steps: int = 6000       # optimizer steps
    lr: float = 0.002       # peak learning rate
    samples: int = 2000     # images to draw
    data: str = ""          # folder with the four files of MNIST
    png: str = ""           # file to write 100 samples to, guidance 1


def read_idx(path):
    """An IDX file of bytes, gzipped or not: 0 0 8 ndim, sizes as big-endian uint32, the bytes.
    -> array of uint8.   Raises InputError."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a whole gzip file, found: {error}") from None
    known = raw[:3] == b"\0\0\x08" and len(raw) > 3 and len(raw) >= 4 + 4 * raw[3]
    require(known, path, "an IDX file of bytes (0 0 8) with its sizes, gzip or not", raw[:8])
    sizes = np.frombuffer(raw[4:4 + 4 * raw[3]], ">u4").tolist()
    body = np.frombuffer(raw[4 + 4 * raw[3]:], np.uint8)
    expected = f"{' x '.join(map(str, sizes))} bytes after the header"
    require(len(body) == math.prod(sizes), path, expected, len(body))
    return body.reshape(sizes)


@functools.lru_cache
def load_mnist(folder):
    """The four files of MNIST, or of a data set in its format, gzipped or not.   -> dict: train,
    validation (the last 5,000 training images, or a tenth of fewer), test; each images (N, 784)
    with mean 0 and variance 1 on MNIST, labels (N,).   Without a folder noise, for gradient checks.
    Raises InputError."""
    if not folder:
        noise = np.random.default_rng(0).standard_normal((1000, 784)).astype(np.float32)
        return dict.fromkeys(("train", "validation", "test"), (noise, np.arange(1000) % 10))
    flag, parts = f"--data {folder}", {}
    for prefix in ("train", "t10k"):
        for kind, ndim in (("images", 3), ("labels", 1)):       # mirrors name them .idx3-ubyte, too
            paths = sorted(Path(folder).glob(f"{prefix}-{kind}?idx{ndim}-ubyte*"))
            expected = f"a folder with {prefix}-{kind}-idx{ndim}-ubyte.gz"
            require(paths, flag, expected, "no such file in it")
            parts[kind] = read_idx(paths[0])
        images, labels = parts["images"], parts["labels"]
        require(images.shape[1:] == (28, 28) and labels.shape == images.shape[:1], flag,
                f"{prefix}: images of 28 x 28 pixels and as many labels",
                (images.shape, labels.shape))
        require(len(images) >= 20, flag, f"{prefix}: 20 images or more", len(images))
        require(labels.max() < 10, flag, f"{prefix}: labels from 0 to 9",
                f"labels from {labels.min()} to {labels.max()}")
        x = images.reshape(len(images), 784) * np.float32(1 / 255)
        parts[prefix] = (x - np.float32(0.1307)) * np.float32(1 / 0.3081), labels.astype(int)
    x, y = parts["train"]
    n = min(5000, len(x) // 10)
    return {"train": (x[:-n], y[:-n]), "validation": (x[-n:], y[-n:]), "test": parts["t10k"]}


@functools.lru_cache
def digits(folder, split):
    """-> images (n, 784) from 0 to 1, labels (n,)."""
    x, labels = load_mnist(folder)[split]
    return np.clip(x * np.float32(0.3081) + np.float32(0.1307), 0, 1), labels


def judge_batch(cfg, step, dtype=np.float32):
    """-> images (N, 784) from 0 to 1, nothing (N, 0), one-hot labels (N, 10)."""
    images, labels = digits(cfg.data, "train")
    rows = np.random.default_rng((cfg.seed, step)).integers(0, len(images), cfg.batch_size)
    x = images[rows].astype(dtype)
    return x, x[:, :0], np.eye(10, dtype=dtype)[labels[rows]]


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 sqrt(A B)), A and B the covariances.   a, b (n, F)."""
    A, B = np.cov(a.T), np.cov(b.T)
    values, U = np.linalg.eigh(A)
    root = U * np.sqrt(np.maximum(values, 0)) @ U.T     # sqrt(A B) and root B root have one trace
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ B @ root), 0)).sum()
    distance = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return max(0.0, float(distance + np.trace(A) + np.trace(B) - 2 * overlap))


def within_variance(features, labels):
    """Variance of features (n, F) within a class, summed over them, mean over the classes."""
    return float(np.mean([features[labels == k].var(axis=0).sum() for k in np.unique(labels)]))


def judge_of(cfg):
    """Train a net with 64 features in its last hidden layer on one-hot labels, by least squares.
    -> evaluate(images (n, 784) from -1 to 1, labels (n, 10)), None if it was stopped; a legend."""
    own = Mnist(data=cfg.data, steps=min(cfg.steps, Mnist.steps))       # one judge for all seeds
    judge = init_dense([784, 512, 64, 10], 0, np.random.default_rng(0), np.float32)
    print(f"A judge of digits: {sum(p.size for p in judge.values())} parameters")
    print("chance level: loss 0.090, every output 0.1")
    losses = train(judge, own, judge_batch)

    def judged(x):
        y, (_, (features, _), _) = dense_forward(judge, x, x[:, :0])
        return y.argmax(axis=1), features.astype(float)
    x, labels = digits(cfg.data, "test")
    _, real = judged(x[::2])
    unit = within_variance(real, labels[::2])
    require(unit > 0, f"--data {cfg.data}", "images that differ within a class", "equal ones")

    def evaluate(images, labels):
        classes, features = judged((images.astype(np.float32) + 1) / 2)
        labels = labels.argmax(axis=1)
        return dict(accuracy=float((classes == labels).mean()),
                    frechet=frechet_distance(features, real) / unit,
                    variance=within_variance(features, labels) / unit)
    legend = (f"share read as asked for (accuracy); Frechet distance to {len(real)} test images\n"
              "and variance within a class, both divided by the variance of these images")
    print(f"{cfg.samples} other test images: {legend}")
    print_row("test", evaluate(2 * x[1::2][:cfg.samples] - 1,
                               np.eye(10)[labels[1::2][:cfg.samples]]))
    return evaluate if len(losses) == own.steps else None, legend


# ---- flags and errors: the same in every lesson --------------------------------------------------

class InputError(ValueError):
    """A flag, value or file that cannot be used: the program ends with one line, exit status 2."""


def require(ok, what, expected, found):
    """Raise InputError unless ok."""
    if not ok:
        raise InputError(f"{what}: expected {expected}, found {found!r}")


class Task(NamedTuple):
    """What a command runs; gradcheck.py drives the same functions."""
    config: type
    init_params: object
    make_batch: object
    loss_and_grads: object
    main: object


MAY_BE_ZERO = ("seed", "warmup", "top_k", "crop", "window", "fuse", "patch")    # other int: >= 1


ABOVE_ZERO = ("lr", "temperature")                                              # other float: >= 0


def check(cfg):
    """Raise InputError unless every value has the type of its field, is one of its choices, is
    finite and in range, and CONSTRAINTS of this kind of Config hold."""
    for f in fields(cfg):
        flag, value = "--" + f.name.replace("_", "-"), getattr(cfg, f.name)
        if get_args(f.type):
            choices = get_args(f.type)
            require(value in choices, flag, " or ".join(map(str, choices)), value)
        elif f.type in (str, bool):
            require(isinstance(value, f.type), flag, f.type.__name__, value)
        elif f.type is int:
            least = 0 if f.name in MAY_BE_ZERO else 1
            require(type(value) is int, flag, "a whole number", value)
            require(least <= value < 2 ** 31, flag, f"{least} or more, below 2^31", value)
        else:
            require(type(value) in (int, float), flag, "a number", value)
            above = value > 0 if f.name in ABOVE_ZERO else value >= 0
            least = "above 0" if f.name in ABOVE_ZERO else "0 or more"
            require(above and value < math.inf, flag, f"a number {least}, and finite", value)
    for ok, what, expected, found in CONSTRAINTS.get(type(cfg), lambda cfg: [])(cfg):
        require(ok, what, expected, found)


def read_flags(tasks, argv):
    """-> the name of the task that argv begins with (else of the first), its Config: every field is
    a flag, its comment the help text."""
    def fail(message):
        task = argv[0] if argv and argv[0] in tasks else next(iter(tasks))
        words = re.split("[ =]", " ".join(argv))        # --task names, --task=names
        late = [word for word in words[1:] if word in tasks] + ["TASK"] * ("--task" in words)
        program = f"python {Path(sys.argv[0]).name}"
        hint = f"; tasks are commands: {program} {late[0]}" if late else ""
        raise InputError(f"{message} ({program} {task} --help lists the flags{hint})")

    usage = f"%(prog)s [TASK] [--flags]     without TASK: {next(iter(tasks))}"
    about = (__doc__ or "") + MORE                      # python -OO drops docstrings
    parser = argparse.ArgumentParser(usage=usage, description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="task", metavar="task", prog=parser.prog)
    parser.error = fail
    for name, task in tasks.items():
        command = commands.add_parser(name, help=task.config.__doc__, allow_abbrev=False,
                                      description=task.config.__doc__)
        command.error, comments = fail, {}
        with contextlib.suppress(OSError, TypeError):   # no source text in a notebook cell
            for c in reversed(task.config.__mro__[:-1]) if {"-h", "--help"} & set(argv) else ():
                comments.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(c), re.M))
        for f in fields(task.config):
            kind = dict(type=f.type, metavar=f.name.upper())
            if f.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            elif get_args(f.type):
                kind = dict(choices=get_args(f.type))
            text = f"{comments.get(f.name, '')} (default: {f.default!r})".replace("%", "%%")
            flag = "--" + f.name.replace("_", "-")
            command.add_argument(flag, default=f.default, help=text, **kind)
    named = argv and (argv[0] in ("-h", "--help") or not argv[0].startswith("-"))
    flags = vars(parser.parse_args(argv if named else [next(iter(tasks)), *argv]))
    name = flags.pop("task")
    cfg = tasks[name].config(**flags)
    check(cfg)
    return name, cfg


def run(tasks):
    """Run what the command line asks for; user errors end in one line, without a traceback."""
    if sys.stdout and sys.stdout is sys.__stdout__:     # a console, not a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        with contextlib.suppress(AttributeError, ValueError):   # Windows; not the main thread
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it quietly
    np.seterr(over="ignore", invalid="ignore")          # divergence: see progress and check_finite
    pasted = "__file__" not in globals() and sys.argv[:1] != ["-"]      # argv is the notebook's
    try:
        name, cfg = read_flags(tasks, [] if pasted else sys.argv[1:])
        tasks[name].main(cfg)
    except (InputError, FloatingPointError, MemoryError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error) or 'out of memory'}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def images_fit(cfg):
    """The constraints on tasks with labels."""
    channels = getattr(cfg, "channels", 8)
    return [(cfg.samples >= 10, "--samples", "10 or more", cfg.samples),
            (cfg.no_label <= 1, "--no-label", "a share from 0 to 1", cfg.no_label),
            (channels % 8 == 0, "--channels", "a multiple of 8", channels)]


CONSTRAINTS = dict.fromkeys((Shapes, Latent, Mnist, Pixels), images_fit)

GRADCHECK = {
    "conv": ["x 2 5 6 3, W 3 3 3 7", "x 2 7 6 3, W 5 5 3 4"],
    "groupnorm": "x 2 5 3 6, gamma 6, beta 6, groups=3",
    "attention": "q 2 3 5 6, k 2 3 7 6, v 2 3 7 6, mask=True"}

NEXT = {"shapes": "python diffusion.py shapes --target x0      python diffusion.py latent",
        "latent": "python diffusion.py mnist --data mnist      python ssm.py",
        "mnist": "python diffusion.py pixels --data mnist      python ssm.py",
        "pixels": "python diffusion.py mnist --data mnist      python ssm.py"}

TASKS = {"ring": Task(Config, init_params, make_batch, loss_and_grads, main),
         "targets": Task(Targets, init_params, ring_batch, loss_and_grads, run_targets),
         "shapes": Task(Shapes, init_unet, image_batch, unet_loss_and_grads, run_images),
         "latent": Task(Latent, init_vae, vae_batch, vae_loss_and_grads, run_images),
         "mnist": Task(Mnist, init_vae, vae_batch, vae_loss_and_grads, run_images),
         "pixels": Task(Pixels, init_unet, image_batch, unet_loss_and_grads, run_images)}

if __name__ == "__main__":
    run(TASKS)
