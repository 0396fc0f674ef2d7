"""lstm.py: a memory that gates protect.

A plain recurrent cell, h' = tanh(x Wx + h Wh + b), rewrites its whole state at every step, so old
inputs are lost. Gradients are lost as well: each step back multiplies them by Wh^T and by slopes
below 1. The LSTM has a second state, the cell c; three gates between 0 and 1 scale c, what is added
to it, and what is put out. With a forget gate near 1, old content and its gradient pass unchanged.

Forward, from h, c to h', c' (z = x Wx + b and Wh have four blocks of columns; s is the sigmoid):
    i = s(z_i + h W_i)       input gate: how much is written
    f = s(z_f + h W_f)       forget gate: how much is kept
    g = tanh(z_g + h W_g)    what is written
    o = s(z_o + h W_o)       output gate: how much of c' is put out
    c' = f c + i g           h' = o tanh(c')
Backward, from the last step to the first; dh and dc are the gradients of h' and c':
    dh = (of the output at this step) + (of the next step);    dc = (of the next step)
    dc += dh o (1 - tanh(c')^2)                       c' reaches the loss through h' as well
    dz_i = dc g i (1 - i)      dz_g = dc i (1 - g^2)
    dz_f = dc c f (1 - f)      dz_o = dh tanh(c') o (1 - o)
    dWh = sum over steps of h^T dz     for the step before: dh = dz Wh^T, dc = dc f

Run    python lstm.py      (remember a number through noise; --help lists the other tasks)
Papers: Hochreiter and Schmidhuber 1997 (LSTM), Gers et al. 2000 (the forget gate).
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
from dataclasses import dataclass, fields, replace

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np


@dataclass
class Config:
    """Remember the first of many numbers; all others are noise."""
    length: int = 14        # steps of noise
    hidden: int = 32        # hidden units
    batch_size: int = 64    # sequences per step
    steps: int = 3000       # optimizer steps
    lr: float = 0.02        # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 0           # random seed


# ---- layers: T steps, N sequences, D inputs, H hidden units, M outputs ---------------------------

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


def lstm_forward(z, h0, c0, Wh):
    """c' = f c + i g, h' = o tanh(c'), as derived in lstm.py; i, f, g, o: four blocks of H columns.
    z = x Wx + b (T, N, 4 H), h0, c0 (N, H), Wh (H, 4 H) -> every h (T, N, H), the last c (N, H)."""
    N, H = h0.shape
    h, c, gates = [h0], [c0], []
    for t in range(len(z)):
        a = (z[t] + h[t] @ Wh).reshape(N, 4, H)
        i, f, g, o = sigmoid(a[:, 0]), sigmoid(a[:, 1]), np.tanh(a[:, 2]), sigmoid(a[:, 3])
        c.append(f * c[t] + i * g)
        h.append(o * np.tanh(c[t + 1]))
        gates.append((i, f, g, o))
    h, c, gates = np.array(h), np.array(c), np.array(gates)
    return (h[1:], c[-1]), (h, c, gates, Wh)


def lstm_backward(dh_out, dc, cache):
    """From the last step to the first, as derived in lstm.py.   dh_out (T, N, H), dc (N, H) of the
    last c -> dz (T, N, 4 H), dh0, dc0, dWh."""
    h, c, gates, Wh = cache
    i, f, g, o = gates.swapaxes(0, 1)                       # (T, N, H) each
    tanh_c = np.tanh(c[1:])                                 # factors, for all steps at once:
    di, df = g * i * (1 - i), c[:-1] * f * (1 - f)          # dz_i = dc di, dz_f = dc df,
    dg, do = i * (1 - g ** 2), tanh_c * o * (1 - o)         # dz_g = dc dg, dz_o = dh do,
    to_c = o * (1 - tanh_c ** 2)                            # dc += dh to_c
    T, N, H = dh_out.shape
    dz = np.zeros((T, N, 4 * H), dh_out.dtype)
    dh, WhT = 0, Wh.T.copy()                                # contiguous: faster in the loop
    for t in reversed(range(T)):
        dh = dh + dh_out[t]                                 # from the step after, and from above
        dc = dc + dh * to_c[t]
        dz[t] = np.concatenate([dc * di[t], dc * df[t], dc * dg[t], dh * do[t]], axis=1)
        dh = dz[t] @ WhT
        dc = dc * f[t]
    dWh = h[:-1].reshape(T * N, H).T @ dz.reshape(T * N, 4 * H)
    return dz, dh, dc, dWh


def mse_forward(y, targets):
    """mean((y - targets)^2).   y, targets (N, M) -> scalar."""
    return ((y - targets) ** 2).mean(), (y, targets)


def mse_backward(dout, cache):
    """dy = 2 (y - targets) / size."""
    y, targets = cache
    return (y - targets) * (2 * dout / y.size)


# ---- data and model: an LSTM layer, and a linear layer on its last h -----------------------------

def make_batch(cfg, step, dtype=np.float32):
    """x (T, N, 1): sequences of T = 1 + length numbers; targets (N, 1): the first of each."""
    rng = np.random.default_rng((cfg.seed, step))
    x = rng.uniform(-1, 1, (1 + cfg.length, cfg.batch_size, 1)).astype(dtype)
    return x, x[0]


def init_params(cfg, rng, dtype=np.float32):
    """Wx (1, 4 H), Wh (H, 4 H), b; Wo (H, 1), bo. The variance of W (D, M) is 1 / D."""
    H = cfg.hidden
    params = {"Wx": rng.standard_normal((1, 4 * H)),
              "Wh": rng.standard_normal((H, 4 * H)) * H ** -0.5,
              "b": np.zeros(4 * H),
              "Wo": rng.standard_normal((H, 1)) * H ** -0.5, "bo": np.zeros(1)}
    params["b"][H:2 * H] = 1                                # the forget gate begins at s(1) = 0.73
    return {name: value.astype(dtype) for name, value in params.items()}


def remember_forward(params, x):
    """An LSTM layer on x (T, N, D), then a linear layer on its last h -> y (N, M)."""
    T, N, D = x.shape
    zeros = np.zeros((N, len(params["Wh"])), x.dtype)
    z, project = linear_forward(x.reshape(T * N, D), params["Wx"], params["b"])
    (h, _), lstm = lstm_forward(z.reshape(T, N, -1), zeros, zeros, params["Wh"])
    y, readout = linear_forward(h[-1], params["Wo"], params["bo"])
    return y, (project, lstm, readout, h.shape)


def remember_backward(dy, cache):
    """remember_forward in reverse order -> gradients under the keys of params."""
    project, lstm, readout, (T, N, H) = cache
    dh = np.zeros((T, N, H), dy.dtype)                      # 0 but for the last h
    dh[-1], dWo, dbo = linear_backward(dy, readout)
    dz, _, _, dWh = lstm_backward(dh, np.zeros_like(dh[-1]), lstm)
    _, dWx, db = linear_backward(dz.reshape(T * N, 4 * H), project)
    return {"Wo": dWo, "bo": dbo, "Wh": dWh, "Wx": dWx, "b": db}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, targets = batch
    y, cache = remember_forward(params, x)
    loss, loss_cache = mse_forward(y, targets)
    return loss, remember_backward(mse_backward(1.0, loss_cache), cache)


# ---- training and demo ---------------------------------------------------------------------------

def clip_norm(grads, limit):
    """Scale all gradients so that their joint norm is at most limit, if limit is not 0 (Pascanu et
    al. 2013).   -> the norm before."""
    norm = math.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in grads.values()))
    if norm > limit > 0:
        for g in grads.values():
            g *= limit / norm
    return norm


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads, state=None,
          losses=None, note=lambda: ""):
    """Train params in place -> losses. Later parts pass their own functions, or resume."""
    state = {} if state is None else state
    losses = [] if losses is None else losses
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        clip_norm(grads, cfg.grad_clip)
        adam_update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def draw_cells(params, x):
    """Gates and contents of four cells over time, 70 steps at most, for a sequence x (T, 1, 1)."""
    _, (_, lstm, _, _) = remember_forward(params, x)
    h, c, gates, _ = lstm
    i, f, g, o = gates[:70, :, 0].swapaxes(0, 1)            # (T, H) each, T at most 70
    tanh_c = np.tanh(c[1:71, 0])
    largest = np.argsort(-np.abs(h[-1, 0] * params["Wo"][:, 0]))[:4]
    print(f"\nOne sequence: {x[0, 0, 0]:.2f} at step 1, then noise. Columns: steps; rows: the cells"
          "\nthat matter most for the output. Blank is 0, @ is 1. While f is near 1, c is kept.")
    for name, values in (("input gate i", i), ("forget gate f", f), ("output gate o", o),
                         ("|tanh(c)|", np.abs(tanh_c))):
        for k in largest:
            print(f"{name:>14s}  cell {k:2d} |{''.join(shade(values[:, k]))}|")
            name = ""                                       # stands before the first cell only


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
    """Learn to remember; print the error on fresh sequences; draw gates and cells."""
    start = time.perf_counter()
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"Remember the first of {1 + cfg.length} numbers: LSTM, hidden {cfg.hidden}, "
          f"lr {cfg.lr}, {size} parameters\nchance level: loss 0.333, mean error 0.5")
    losses = train(params, cfg)
    x, targets = make_batch(replace(cfg, batch_size=1000), 0)     # fresh: training starts at 1
    error = float(np.abs(remember_forward(params, x)[0] - targets).mean())
    check_finite(error, params)
    print(f"mean error {error:.4f} on 1000 fresh sequences; the output 0 for all has 0.5")
    draw_cells(params, x[:, :1])
    print("\nNext: python lstm.py long      python lstm.py add      python lstm.py gradient")
    print_result("remember", cfg, error=error, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: longer gaps, plain cell, GRU, masks, layers; sums, reversal, text. ==

MORE = """
Break it (what to change, and what comes of it)
    init_params: a forget bias of -3            mean error 0.49, as for guessing: cells that begin
                                                by forgetting send no gradient to the first step
    lstm_backward: dc = 0 * dc                  0.49: no gradient goes back through c
    lstm_backward: df = f * (1 - f)             0.006 to 0.02, by seed, not 0.003: the error falls,
                                                so only a gradient check shows the slip
    masked_lstm_forward: always new_h, new_c    reverse: other padding changes logits by 20
    python lstm.py --length 40                  0.49: 40 steps are too many at first (see long)

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Derive and add peepholes (Gers and Schmidhuber 2000): i and f read c, o reads c', each
       through a vector of weights.
    2. Derive and add the GRU of Cho et al. 2014: n = tanh(z_n + (r h) W_n).
    3. python lstm.py reverse --length 10: which lengths fail first? And with --layers 2?

Data
    curl -o tinyshakespeare.txt \\
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python lstm.py text --data tinyshakespeare.txt --hidden 512 --batch-size 64 --steps 2000

Papers of these parts: Elman 1990 (the plain cell), Cho et al. 2014 (GRU), Jozefowicz et al. 2015 (a
forget bias of 1), Pascanu et al. 2013 (clipping), Williams and Peng 1990 (truncation).
"""

import argparse
import contextlib
import ctypes
import functools
import inspect
import json
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- longer gaps: python lstm.py long ------------------------------------------------------------

@dataclass
class Long(Config):
    """Remember through 14 steps of noise, then, by way of 40, through 100."""


def run_long(cfg):
    """Train with cfg.length steps of noise; with 40, and 100, for a tenth of the steps each."""
    start, metrics = time.perf_counter(), {}
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    later = replace(cfg, steps=math.ceil(cfg.steps / 10), lr=cfg.lr / 3)
    x, targets = make_batch(replace(cfg, length=100, batch_size=1000), 0)
    for part in (cfg, replace(later, length=40), replace(later, length=100)):
        print(f"\nRemember the first of {1 + part.length} numbers: LSTM, hidden {cfg.hidden}, "
              f"lr {part.lr:.3g}\nchance level: loss 0.333, mean error 0.5")
        losses = train(params, part)
        error = float(np.abs(remember_forward(params, x)[0] - targets).mean())
        check_finite(error, params)
        metrics[f"error_after_{part.length}"] = error
        print(f"mean error after 100 steps of noise: {error:.4f}; the output 0 for all has 0.5")
        if len(losses) < part.steps:                        # Ctrl-C
            break
    draw_cells(params, x[:, :1])
    print("\nNext: python lstm.py add      python lstm.py gradient")
    print_result("long", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- the plain cell and the GRU: their only state is h -------------------------------------------

def rnn_forward(z, h0, Wh):
    """h_t = tanh(z_t + h_{t-1} Wh), z_t = x_t Wx + b.   z (T, N, H), h0 (N, H) -> h (T, N, H)."""
    h = [h0]
    for t in range(len(z)):
        h.append(np.tanh(z[t] + h[t] @ Wh))
    h = np.stack(h)                                     # (T + 1, N, H), from h0 on
    return h[1:], (h, Wh)


def rnn_backward(dout, cache):
    """dh_t = dout_t + dz_{t+1} Wh^T, dz_t = dh_t (1 - h_t^2), dWh = sum_t h_{t-1}^T dz_t."""
    h, Wh = cache
    dz = 1 - h[1:] * h[1:]                              # slopes of tanh, times dh_t in the loop
    dh = np.zeros_like(h[0])                            # no step comes after the last
    for t in reversed(range(len(dz))):
        dz[t] *= dout[t] + dh
        dh = dz[t] @ Wh.T
    H = len(Wh)
    return dz, dh, h[:-1].reshape(-1, H).T @ dz.reshape(-1, H)


def gru_forward(z, h0, Wh, bn):
    """h' = (1 - u) n + u h: the gate u = s(z_u + h W_u) mixes the old state h and a new one,
    n = tanh(z_n + r (h W_n + bn)). The gate r = s(z_r + h W_r) scales what h adds to n.
    z = x Wx + b (T, N, 3 H), h0 (N, H), Wh (H, 3 H), bn (H,) -> h (T, N, H)."""
    N, H = h0.shape
    h, gates = [h0], []
    for t in range(len(z)):
        z_r, z_u, z_n = z[t].reshape(N, 3, H).swapaxes(0, 1)
        a_r, a_u, a_n = (h[t] @ Wh).reshape(N, 3, H).swapaxes(0, 1)
        r, u, q = sigmoid(z_r + a_r), sigmoid(z_u + a_u), a_n + bn
        n = np.tanh(z_n + r * q)
        h.append((1 - u) * n + u * h[t])
        gates.append((r, u, n, q))
    h = np.array(h)
    return h[1:], (h, np.array(gates), Wh)


def gru_backward(dout, cache):
    """dz_n = dh (1 - u) (1 - n^2), dz_u = dh (h - n) u (1 - u). With q = h W_n + bn: dq = dz_n r,
    dz_r = dz_n q r (1 - r). For the step before: dh = dh u + (dz_r, dz_u, dq) Wh^T.
    -> dz (T, N, 3 H), dh0, dWh, dbn."""
    h, gates, Wh = cache
    r, u, n, q = gates.swapaxes(0, 1)                       # (T, N, H) each
    dn, du = (1 - u) * (1 - n ** 2), (h[:-1] - n) * u * (1 - u)     # dz_n = dh dn, dz_u = dh du
    dr = dn * q * r * (1 - r)                               # and dz_r = dh dr
    T, N, H = dout.shape
    dz, da = np.zeros((2, T, N, 3 * H), dout.dtype)         # a = h Wh; a_n gets dq, not dz_n
    dh, WhT = 0, Wh.T.copy()
    for t in reversed(range(T)):
        dh = dh + dout[t]
        dz_r, dz_u, dz_n = dh * dr[t], dh * du[t], dh * dn[t]
        dz[t] = np.concatenate([dz_r, dz_u, dz_n], axis=1)
        da[t] = np.concatenate([dz_r, dz_u, dz_n * r[t]], axis=1)
        dh = dh * u[t] + da[t] @ WhT
    da = da.reshape(T * N, 3 * H)
    return dz, dh, h[:-1].reshape(T * N, H).T @ da, da[:, 2 * H:].sum(axis=0)


# ---- masks: padding in a batch of sequences of different lengths ---------------------------------

def masked_lstm_forward(z, h0, c0, Wh, mask):
    """lstm of lstm.py; where mask (T, N, 1) is False (padding), h and c stay as they are.
    z = x Wx + b (T, N, 4 H), h0, c0 (N, H), Wh (H, 4 H) -> every h (T, N, H), the last c (N, H)."""
    N, H = h0.shape
    h, c, gates = [h0], [c0], []
    for t in range(len(z)):
        a = (z[t] + h[t] @ Wh).reshape(N, 4, H)
        i, f, g, o = sigmoid(a[:, 0]), sigmoid(a[:, 1]), np.tanh(a[:, 2]), sigmoid(a[:, 3])
        new_c = f * c[t] + i * g
        new_h = o * np.tanh(new_c)
        c.append(np.where(mask[t], new_c, c[t]))
        h.append(np.where(mask[t], new_h, h[t]))
        gates.append((i, f, g, o))
    h, c, gates = np.array(h), np.array(c), np.array(gates)
    return (h[1:], c[-1]), (h, c, gates, Wh, mask)


def masked_lstm_backward(dh_out, dc, cache):
    """As derived in lstm.py; at padding the gradient passes around the step.   dh_out (T, N, H), dc
    (N, H) of the last c -> dz (T, N, 4 H), dh0, dc0, dWh."""
    h, c, gates, Wh, mask = cache
    i, f, g, o = gates.swapaxes(0, 1)                       # (T, N, H) each
    tanh_c = np.tanh(c[1:])                                 # not used at padding: dz is 0 there
    # factors of all steps: dz_i = dc di, dz_f = dc df, dz_g = dc dg, dz_o = dh do, dc += dh to_c
    di, df = g * i * (1 - i), c[:-1] * f * (1 - f)
    dg, do = i * (1 - g ** 2), tanh_c * o * (1 - o)
    to_c = o * (1 - tanh_c ** 2)
    T, N, H = dh_out.shape
    dz = np.zeros((T, N, 4 * H), dh_out.dtype)
    dh, WhT = 0, Wh.T.copy()                                # contiguous: faster in the loop
    for t in reversed(range(T)):
        dh = dh + dh_out[t]                                 # from the step after, and from above
        new_dh, new_dc = np.where(mask[t], dh, 0), np.where(mask[t], dc, 0)     # through the step
        new_dc = new_dc + new_dh * to_c[t]
        dz[t] = np.concatenate([new_dc * di[t], new_dc * df[t], new_dc * dg[t], new_dh * do[t]],
                               axis=1)
        dh = np.where(mask[t], dz[t] @ WhT, dh)             # or around it
        dc = np.where(mask[t], new_dc * f[t], dc)
    dWh = h[:-1].reshape(T * N, H).T @ dz.reshape(T * N, 4 * H)
    return dz, dh, dc, dWh


# ---- several layers of any cell: each reads the h of the layer below -----------------------------

# kind: (blocks of H columns in Wx, Wh and b; states: h, or h and c; forward, backward)
CELLS = {"rnn": (1, 1, rnn_forward, rnn_backward),
         "gru": (3, 1, gru_forward, gru_backward),
         "lstm": (4, 2, lstm_forward, lstm_backward),
         "masked_lstm": (4, 2, masked_lstm_forward, masked_lstm_backward)}


def embedding_forward(ids, E):
    """Row ids of E.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """Row v of dE is the sum of dout over all positions whose id is v."""
    ids, shape = cache
    onehot = (ids.reshape(-1, 1) == np.arange(shape[0])).astype(dout.dtype)     # (positions, V)
    dE = onehot.T @ dout.reshape(len(onehot), -1)       # E[ids] is onehot @ E, a linear layer
    return dE.reshape(shape)


def init_stack(cell, V, D, M, cfg, rng, dtype):
    """V > 0: inputs are tokens, rows of E (V, D); V = 0: inputs are D numbers. For layer k: Wxk,
    Whk, bk, and bnk for a GRU; Wo, bo for M outputs."""
    H, blocks = cfg.hidden, CELLS[cell][0]
    params = {"E": 0.5 * rng.standard_normal((V, D))} if V else {}
    for k in range(cfg.layers):
        params[f"Wx{k}"] = rng.standard_normal((D, blocks * H)) * D ** -0.5
        params[f"Wh{k}"] = rng.standard_normal((H, blocks * H)) * H ** -0.5
        params[f"b{k}"] = np.zeros(blocks * H)
        if "lstm" in cell:
            params[f"b{k}"][H:2 * H] = 1
        if cell == "gru":
            params[f"bn{k}"] = np.zeros(H)
        D = H                                               # of the next layer
    params["Wo"], params["bo"] = rng.standard_normal((H, M)) * H ** -0.5, np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def zero_states(params, cell, N):
    """The states before the first step, of N sequences -> (layers, N, 1 or 2, H)."""
    layers = sum(name.startswith("Wh") for name in params)
    return np.zeros((layers, N, CELLS[cell][1], len(params["Wo"])), params["Wo"].dtype)


def stack_forward(params, x, cell, states, *mask):
    """x (T, N, D) numbers or (T, N) tokens -> (outputs (T, N, M), states after the last step),
    cache. mask only for the cell masked_lstm."""
    T, N = x.shape[:2]
    _, n_states, forward, _ = CELLS[cell]
    lookup, layers, last = None, [], []
    if "E" in params:
        x, lookup = embedding_forward(x, params["E"])
    for k, state in enumerate(states):                      # state: h0, or h0 and c0
        names = [name for name in (f"Wh{k}", f"bn{k}") if name in params]
        weights = [params[name] for name in names]
        z, project = linear_forward(x.reshape(T * N, -1), params[f"Wx{k}"], params[f"b{k}"])
        out, cache = forward(z.reshape(T, N, -1), *state.swapaxes(0, 1), *weights, *mask)
        x, *c = out if n_states == 2 else [out]             # every h; the last c, if there is one
        last.append(np.stack([x[-1], *c], axis=1))
        layers.append((project, cache, names))
    y, readout = linear_forward(x.reshape(T * N, -1), params["Wo"], params["bo"])
    return (y.reshape(T, N, -1), np.array(last)), (lookup, layers, readout, cell)


def stack_backward(dy, cache):
    """stack_forward in reverse order -> dx, gradients under the keys of params."""
    lookup, layers, readout, cell = cache
    grads = {}
    T, N, M = dy.shape
    _, n_states, _, backward = CELLS[cell]
    dx, grads["Wo"], grads["bo"] = linear_backward(dy.reshape(T * N, M), readout)
    for k in reversed(range(len(layers))):
        project, cell_cache, names = layers[k]
        dh = dx.reshape(T, N, -1)
        dc = [np.zeros_like(dh[0])] * (n_states - 1)        # nothing depends on the last c
        dz, *rest = backward(dh, *dc, cell_cache)           # rest: of states, then of names
        grads.update(zip(names, rest[n_states:]))
        dx, grads[f"Wx{k}"], grads[f"b{k}"] = linear_backward(dz.reshape(T * N, -1), project)
    dx = dx.reshape(T, N, -1)
    if lookup:
        grads["E"] = embedding_backward(dx, lookup)
    return dx, grads


# ---- sums: python lstm.py add --------------------------------------------------------------------

@dataclass
class Add(Config):
    """Add the two marked numbers of a sequence, beside the plain cell (Hochreiter 1997)."""
    cell: Literal["lstm", "gru", "rnn"] = "lstm"  # kind of cell; rnn is the plain one
    layers: int = 1         # recurrent layers
    length: int = 50        # numbers per sequence
    hidden: int = 64        # hidden units
    steps: int = 1000       # optimizer steps
    lr: float = 0.02        # peak learning rate


def init_add(cfg, rng, dtype=np.float32):
    """init_stack for two inputs and one output."""
    return init_stack(cfg.cell, 0, 2, 1, cfg, rng, dtype)


def add_batch(cfg, step, dtype=np.float32):
    """x (T, N, 2): numbers from 0 to 1, and marks: 1 at one step in each half, else 0.
    -> x, targets (N, 1): the sum of the marked numbers."""
    rng = np.random.default_rng((cfg.seed, step))
    T, N = cfg.length, cfg.batch_size
    x = np.stack([rng.random((T, N)), np.zeros((T, N))], axis=2)
    for t in (rng.integers(0, T // 2, N), rng.integers(T // 2, T, N)):
        x[t, np.arange(N), 1] = 1
    targets = (x[:, :, :1] * x[:, :, 1:]).sum(axis=0)
    return x.astype(dtype), targets.astype(dtype)


def add_loss_and_grads(params, batch, cfg):
    """Mean squared error of the output at the last step -> loss, gradients."""
    x, targets = batch
    states = zero_states(params, cfg.cell, x.shape[1])
    (y, _), cache = stack_forward(params, x, cfg.cell, states)
    loss, loss_cache = mse_forward(y[-1], targets)
    dy = np.zeros_like(y)
    dy[-1] = mse_backward(1.0, loss_cache)
    return loss, stack_backward(dy, cache)[1]


def run_add(cfg):
    """Train the chosen cell, then the plain one."""
    start, metrics, curves = time.perf_counter(), {}, []
    for cell in dict.fromkeys((cfg.cell, "rnn")):
        part = replace(cfg, cell=cell)
        params = init_add(part, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\nAdd the two marked of {cfg.length} numbers: {cell}, layers {cfg.layers}, hidden "
              f"{cfg.hidden}, lr {cfg.lr}, {size} parameters\nchance level: loss 0.167")
        losses = train(params, part, add_batch, add_loss_and_grads)
        mse, _ = add_loss_and_grads(params, add_batch(replace(part, batch_size=1000), 0), part)
        check_finite(mse, params)
        metrics[f"{cell}_mse"] = float(mse)
        print(f"mean squared error {mse:.5f} on 1000 fresh sequences; the output 1 has 0.167")
        means = [np.mean(chunk) for chunk in np.array_split(losses, min(60, len(losses)))]
        curves.append(f"{cell:>5s} |{''.join(shade(1 + np.log10(means) / 4))}|")
        if len(losses) < cfg.steps:                         # Ctrl-C
            break
    print("\nTraining loss from the first step to the last: @ is 1, blank is 0.0001 (logarithmic)")
    print("\n".join(curves))
    print("\nNext: python lstm.py gradient      python lstm.py reverse")
    print_result("add", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- a gradient on its way back: python lstm.py gradient -----------------------------------------

@dataclass
class Gradient:
    """Norm of a gradient on its way back: plain cell, GRU and LSTM, untrained."""
    length: int = 50        # numbers per sequence
    hidden: int = 64        # hidden units
    layers: int = 1         # recurrent layers
    batch_size: int = 64    # sequences
    seed: int = 0           # random seed


def run_gradient(cfg):
    """Print for each cell the norm of d (last output) / d (input) at every step."""
    start, metrics = time.perf_counter(), {}
    print(f"The gradient of the last output by the input of every step, before training, hidden "
          f"{cfg.hidden}.\nColumns: the last 70 steps. Norm over that of the last step, geometric "
          "mean over 10\ndraws of the weights: @ is 1, blank 1e-8.")
    for cell in ("rnn", "gru", "lstm"):
        part, exponents = Add(cell=cell, **vars(cfg)), []
        for draw in range(10):
            params = init_add(part, np.random.default_rng((cfg.seed, draw)), np.float64)
            x, _ = add_batch(part, draw, np.float64)
            zeros = zero_states(params, cell, cfg.batch_size)
            (y, _), cache = stack_forward(params, x, cell, zeros)
            dy = np.zeros_like(y)
            dy[-1] = 1
            dx, _ = stack_backward(dy, cache)
            norm = np.linalg.norm(dx, axis=(1, 2))
            exponents.append(np.log10(norm / norm[-1] + 1e-30))
        exponent = np.mean(exponents, axis=0)
        norm = 10 ** exponent
        picture = "".join(shade(1 + exponent[-70:] / 8))
        rate = norm[0] ** (1 / (cfg.length - 1))
        print(f"{cell:>5s} |{picture}| {norm[0]:.0e} at step 1, {rate:.2f} per step")
        metrics[cell] = float(norm[0])
    print("Training can move a gate (f of the LSTM, u of the GRU) to 1, where a gradient keeps its "
          "norm.\nThe plain cell has no such gate.")
    print("\nNext: python lstm.py add --cell gru      python lstm.py reverse")
    print_result("gradient", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- reversal: python lstm.py reverse ------------------------------------------------------------

BOS, PAD = 8, 9             # tokens, printed as ?; 0 to 7 are the characters A to H


@dataclass
class Reverse(Config):
    """Read up to 5 characters, then write them in reverse order."""
    cell = "masked_lstm"    # without a type it is no flag
    layers: int = 1         # recurrent layers
    embed_dim: int = 32     # embedding dimension
    length: int = 5         # most characters
    hidden: int = 128       # hidden units
    steps: int = 1500       # optimizer steps
    lr: float = 0.005       # peak learning rate


def init_reverse(cfg, rng, dtype=np.float32):
    """init_stack for ten tokens."""
    return init_stack(cfg.cell, 10, cfg.embed_dim, 10, cfg, rng, dtype)


def reverse_batch(cfg, step, dtype=np.float32):
    """-> ids (2 T, N): n characters and T - n PAD, then BOS while the net writes; targets (2 T, N):
    T times -1, then the characters in reverse and T - n times -1; mask (2 T, N, 1)."""
    rng = np.random.default_rng((cfg.seed, step))
    T, N = cfg.length, cfg.batch_size
    characters, n = rng.integers(0, 8, (T, N)), rng.integers(1, T + 1, N)
    t = np.arange(T)[:, None]
    real = t < n                                            # (T, N), False for padding
    backwards = characters[np.maximum(n - 1 - t, 0), np.arange(N)]      # where real
    ids = np.concatenate([np.where(real, characters, PAD), np.full((T, N), BOS)])
    targets = np.concatenate([np.full((T, N), -1), np.where(real, backwards, -1)])
    return ids, targets, np.concatenate([real, real])[:, :, None]


def softmax_cross_entropy_forward(logits, targets):
    """-mean_n log softmax(logits)[n, targets_n].   logits (N, V), targets (N,) ids -> scalar."""
    logits = logits - logits.max(axis=1, keepdims=True)     # the same softmax, without overflow
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(len(targets)), targets].mean()
    return loss, (log_p, targets)


def softmax_cross_entropy_backward(dout, cache):
    """dlogits = (p - onehot(targets)) / N: -log p_y changes with logit k by p_k - (k == y)."""
    log_p, targets = cache
    dlogits = np.exp(log_p)
    dlogits[np.arange(len(targets)), targets] -= 1
    return dlogits * (dout / len(targets))


def tokens_loss_and_grads(params, batch, cfg, states=None):
    """batch: tokens, targets (-1 where the output does not count), a mask if the cell needs one.
    -> loss, gradients, states after the last step."""
    ids, targets, *mask = batch
    if states is None:
        states = zero_states(params, cfg.cell, ids.shape[1])
    (logits, states), cache = stack_forward(params, ids, cfg.cell, states, *mask)
    counts = targets >= 0
    loss, loss_cache = softmax_cross_entropy_forward(logits[counts], targets[counts])
    dlogits = np.zeros_like(logits)
    dlogits[counts] = softmax_cross_entropy_backward(1.0, loss_cache)
    _, grads = stack_backward(dlogits, cache)
    return loss, grads, states


def reverse_loss_and_grads(params, batch, cfg):
    """tokens_loss_and_grads without the states, which are not carried over."""
    return tokens_loss_and_grads(params, batch, cfg)[:2]


def run_reverse(cfg):
    """Learn to reverse; print some outputs, and the influence of padding."""
    start = time.perf_counter()
    params = init_reverse(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"Reverse up to {cfg.length} characters: LSTM, layers {cfg.layers}, hidden {cfg.hidden}, "
          f"lr {cfg.lr}, {size} parameters\nchance level: loss {math.log(8):.3f}")
    losses = train(params, cfg, reverse_batch, reverse_loss_and_grads)
    ids, targets, mask = reverse_batch(replace(cfg, batch_size=1000), 0)
    states = zero_states(params, cfg.cell, 1000)
    (logits, _), _ = stack_forward(params, ids, cfg.cell, states, mask)
    other_ids = np.where(mask[:, :, 0], ids, 0)             # A, not PAD, in the padding
    (other, _), _ = stack_forward(params, other_ids, cfg.cell, states, mask)
    check_finite(logits.sum(), params)
    written = logits.argmax(axis=2)
    exact = float(((written == targets) | (targets < 0)).all(axis=0).mean())
    padding = float(np.abs(other - logits)[targets >= 0].max())
    for k in range(4):
        n = mask[:, k].sum() // 2
        read = "".join("ABCDEFGH"[i] for i in ids[:n, k])
        wrote = "".join("ABCDEFGH??"[i] for i in written[cfg.length:cfg.length + n, k])
        print(f"   reads {read:{cfg.length}s}   writes {wrote}")
    print(f"{exact:.2%} of 1000 fresh sequences are right in every character. With other tokens in "
          f"the padding,\nthe largest change of a logit is {padding:.0e}")
    print("\nNext: python lstm.py text      python seq2seq.py")
    print_result("reverse", cfg, exact=exact, padding=padding, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ---- text: python lstm.py text --data tinyshakespeare.txt ----------------------------------------
# A text is one long sequence, cut into N streams: the columns of a batch. Each step reads the next
# window of every stream. States are carried over from window to window, gradients are not:
# truncated backpropagation through time. From the end of the streams it goes on at their beginning,
# a little shifted.

ALL_VERSES = ["the house that Jack built.", "the malt\nThat lay in", "the rat,\nThat ate",
          "the cat,\nThat killed", "the dog,\nThat worried",
          "the cow with the crumpled horn,\nThat tossed", "the maiden all forlorn,\nThat milked",
          "the man all tattered and torn,\nThat kissed",
          "the priest all shaven and shorn,\nThat married"]
LONG_RHYME = "\n" + "\n\n".join(
    "This is " + " ".join(ALL_VERSES[n::-1]) for n in range(len(ALL_VERSES))) + "\n"


@dataclass
class Text(Add):
    """Predict the next character of a text."""
    embed_dim: int = 64     # embedding dimension
    length: int = 64        # characters per window
    hidden: int = 128       # hidden units
    batch_size: int = 4     # windows per step
    steps: int = 600        # optimizer steps
    lr: float = 0.003       # peak learning rate
    grad_clip: float = 5.0  # largest gradient norm; 0: no limit
    temperature: float = 0.7  # sampling temperature: logits are divided by it
    threads: int = 2        # micro-batches, each on a thread of its own
    data: str = ""          # UTF-8 text file, its last tenth for validation; none: a rhyme
    save: str = ""          # checkpoint file (.npz), written at every line of progress
    load: str = ""          # checkpoint file to resume from


@functools.lru_cache
def load_characters(path, checkpoint):
    """-> characters (those of the checkpoint, if there is one), ids for training, for validation
    (the last tenth).   Raises InputError."""
    text = read_text(path) if path else LONG_RHYME
    require(len(text) >= 1000, f"--data {path}", "1000 characters or more", len(text))
    chars = "".join(sorted(set(text)))
    if checkpoint:
        chars = read_checkpoint(checkpoint)[0].get("chars", chars)
    unknown = "".join(sorted(set(text) - set(chars)))
    require(not unknown, f"--load {checkpoint}", "a text of its characters", unknown[:10])
    index = {c: i for i, c in enumerate(chars)}
    ids = np.array([index[c] for c in text])
    train, validation = np.split(ids, [len(ids) * 9 // 10])
    return chars, train, validation


def init_text(cfg, rng, dtype=np.float32):
    """init_stack for the characters of the text."""
    V = len(load_characters(cfg.data, cfg.load)[0])
    return init_stack(cfg.cell, V, cfg.embed_dim, V, cfg, rng, dtype)


def cut_text(ids, N):
    """Cut ids into N streams of equal length, one per column; a rest of less than N is dropped."""
    return ids[:len(ids) // N * N].reshape(N, -1).T


def text_batch(cfg, step, dtype=np.float32):
    """The next window of all streams -> ids (T, N), targets (T, N): the next characters."""
    streams = cut_text(load_characters(cfg.data, cfg.load)[1], cfg.batch_size)
    T = min(cfg.length, len(streams) - 1)
    start = (step - 1) * T % (len(streams) - T)
    return streams[start:start + T], streams[start + 1:start + T + 1]


def threaded_text_loss_and_grads(pool, state, params, batch, cfg):
    """Every thread takes a part of the streams, with their states: NumPy releases the interpreter
    lock while it computes. Gradients of means are averaged, weighted by the sizes of the parts."""
    ids, targets = (np.array_split(a, cfg.threads, axis=1) for a in batch)      # lists of parts
    states = np.array_split(state["states"], cfg.threads, axis=1)
    shares = [part.shape[1] / cfg.batch_size for part in ids]
    results = pool.map(lambda i, t, s: tokens_loss_and_grads(params, (i, t), cfg, s),
                       ids, targets, states)
    losses, grads, states = zip(*results)
    state["states"] = np.concatenate(states, axis=1)
    loss = sum(share * loss for share, loss in zip(shares, losses))
    return loss, {name: sum(share * g[name] for share, g in zip(shares, grads)) for name in params}


def text_validation(params, cfg):
    """Mean loss over the last tenth of the text, cut into streams, with states carried over."""
    _, _, ids = load_characters(cfg.data, cfg.load)
    N = min(20, math.ceil(len(ids) / 200))
    streams = cut_text(ids, N)
    states, total = zero_states(params, cfg.cell, N), 0.0
    for t in range(0, len(streams) - 1, 100):
        window = streams[t:t + 101]
        (logits, states), _ = stack_forward(params, window[:-1], cfg.cell, states)
        rows = logits.reshape(-1, logits.shape[2])
        total += float(softmax_cross_entropy_forward(rows, window[1:].ravel())[0]) * len(rows)
    return total / streams[1:].size


def continue_text(params, cfg, ids, count, rng):
    """Append count characters to the list ids, each drawn from softmax(logits / temperature)."""
    states = zero_states(params, cfg.cell, 1)
    for _ in range(count):
        (logits, states), _ = stack_forward(params, np.array([ids[-1:]]), cfg.cell, states)
        logits = logits[0, 0].astype(float)
        p = np.exp((logits - logits.max()) / cfg.temperature)
        ids.append(rng.choice(len(p), p=p / p.sum()))
    return ids


def run_text(cfg):
    """Learn a text, print the validation loss and a sample."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    chars, train_ids, _ = load_characters(cfg.data, cfg.load)
    most = len(train_ids) // 3
    require(cfg.batch_size <= most, "--batch-size", f"at most {most} for this text", cfg.batch_size)
    params, losses = init_text(cfg, rng), []
    zeros = zero_states(params, cfg.cell, cfg.batch_size)
    state, meta = {"states": zeros}, dict(task="text", cell=cfg.cell, chars=chars)
    if cfg.load:
        load_checkpoint(cfg.load, meta, params, state, losses)
    if state["states"].shape != zeros.shape:                # another --batch-size
        state["states"] = zeros
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses, dry_run=True)
    size = sum(p.size for p in params.values())
    print(f"{cfg.data or 'A rhyme'}: {len(train_ids)} training characters, {len(chars)} distinct\n"
          f"{cfg.cell}, layers {cfg.layers}, hidden {cfg.hidden}, lr {cfg.lr}, {size} parameters\n"
          f"chance level: loss {math.log(len(chars)):.3f}")

    def note():
        loss = text_validation(params, cfg)
        check_finite(loss)
        if cfg.save:
            save_checkpoint(cfg.save, meta, params, state, losses)
        return f"  validation {loss:.4f}"

    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")       # as run does
    with ThreadPoolExecutor(cfg.threads, initializer=quiet) as pool:
        step = functools.partial(threaded_text_loss_and_grads, pool, state)
        train(params, cfg, text_batch, step, state, losses, note)
    loss = text_validation(params, cfg)
    check_finite(loss, params)
    sample = continue_text(params, cfg, [train_ids[0]], 500, rng)
    print("\n" + "".join(chars[i] for i in sample) + "\n")
    print(f"validation loss {loss:.4f} nats per character, on the last tenth of the text")
    print("\nNext: python lstm.py text --cell gru      python seq2seq.py")
    print_result("text", cfg, validation=loss, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark.   Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at {error.start}"
        raise InputError(f"{path}: expected UTF-8 text, found {found}") from None
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: expected a text file, found: {found}") from None
    require(text.strip(), path, "some text", "an empty file")
    return text


# ---- checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, meta, params, state, losses, dry_run=False):
    """All that a training needs to go on, as a .npz file; dry_run: try it.   Raises InputError."""
    own = os.path.isfile(path) and zipfile.is_zipfile(path)
    own = own and "meta.npy" in zipfile.ZipFile(path).namelist() or not os.path.exists(path)
    require(own, f"--save {path}", "a new file or one of --save", "something else, which stays")
    check_finite(0.0, params)                           # never over a good one
    arrays = {f"params {k}": v for k, v in params.items()}
    arrays.update({f"state {k}": v for k, v in state.items()})
    beside = f"{path}.{os.getpid()}"                    # renamed when it is complete
    try:
        with open(beside, "wb") as file:
            np.savez(file, meta=json.dumps(meta), losses=losses, **arrays)
        os.replace(beside, beside if dry_run else path)
    except (OSError, ValueError) as error:
        raise InputError(f"--save {path}: expected a file to write, found: {error}") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.remove(beside)                           # of a dry run, an error or Ctrl-C


def read_checkpoint(path):
    """A file of save_checkpoint -> meta, losses, arrays by name.   Raises InputError."""
    try:
        with zipfile.ZipFile(path), open(path, "rb") as file, np.load(file) as saved:
            arrays = dict(saved)
        meta, losses = json.loads(str(arrays.pop("meta"))), arrays.pop("losses").tolist()
        return dict(meta), list(losses), arrays
    except Exception as error:                          # there are many ways to be damaged
        raise InputError(f"--load {path}: expected a file of --save, found: {error}") from None


def load_checkpoint(path, meta, params, state, losses):
    """Fill params, state, losses from a file of save_checkpoint; meta and shapes must agree."""
    found, past, arrays = read_checkpoint(path)
    for name, value in meta.items():
        require(found.get(name) == value, f"--load {path}", f"{name} {value!r}", found.get(name))
    saved = {name[7:]: value for name, value in arrays.items() if name.startswith("params ")}
    for name in sorted(saved.keys() | params.keys()):
        old, new = (d[name].shape if name in d else "no such array" for d in (saved, params))
        require(old == new, f"--load {path}", f"{name} {new}", old)
    params.update(saved)
    state.update({name[6:]: value if value.ndim else value.item()
                  for name, value in arrays.items() if name.startswith("state ")})
    losses.extend(past)
    print(f"resuming {path} after {len(past)} steps")


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


CONSTRAINTS = {Add: lambda cfg: [(cfg.length >= 2, "--length", "2 or more", cfg.length)],
               Gradient: lambda cfg: [(cfg.length >= 2, "--length", "2 or more", cfg.length)],
               Text: lambda cfg: [(cfg.threads <= cfg.batch_size, "--threads",
                                   f"at most --batch-size {cfg.batch_size}", cfg.threads),
                                  (not cfg.save or os.path.realpath(cfg.save)
                                   != os.path.realpath(cfg.data), "--save",
                                   "another file than --data", cfg.save)]}

GRADCHECK = {"masked_lstm": lambda rng: dict(
    z=rng.standard_normal((5, 3, 24)), h0=rng.standard_normal((3, 6)),
    c0=rng.standard_normal((3, 6)), Wh=rng.standard_normal((6, 24)),
    mask=np.arange(5)[:, None, None] < np.array([5, 3, 2])[:, None])}

TASKS = {"remember": Task(Config, init_params, make_batch, loss_and_grads, main),
         "long": Task(Long, init_params, make_batch, loss_and_grads, run_long),
         "gradient": Task(Gradient, None, None, None, run_gradient),
         "add": Task(Add, init_add, add_batch, add_loss_and_grads, run_add),
         "reverse": Task(Reverse, init_reverse, reverse_batch, reverse_loss_and_grads, run_reverse),
         "text": Task(Text, init_text, text_batch, tokens_loss_and_grads, run_text)}

if __name__ == "__main__":
    run(TASKS)
