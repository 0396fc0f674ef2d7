"""vanilla_rnn.py: a network with a state, trained by backpropagation through time.

A recurrent network reads a sequence step by step; the hidden state h of one step is an input of the
next, so h_t depends on all inputs up to step t. For the gradient, unroll the loop: T steps are T
layers that share Wx, Wh and b, and the gradient of a shared weight is the sum over all steps.

Forward, t = 1 ... T:    h_t = tanh(z_t + h_{t-1} Wh), z_t = x_t Wx + b       y_t = h_t Wo + bo
Backward, t = T ... 1:   dh_t = dy_t Wo^T + dz_{t+1} Wh^T    h_t enters both y_t and h_{t+1}
                         dz_t = dh_t (1 - h_t^2)             slope of tanh
                         dWh = sum_t h_{t-1}^T dz_t    dWx = sum_t x_t^T dz_t    db = sum_t dz_t
Each step back multiplies the gradient by Wh^T and by slopes of tanh, which are at most 1. If the
largest singular value of Wh is above 1, the gradient may explode; clipping scales it to a given
norm. If it is below 1, the gradient vanishes: step 1 does not learn what step T needs.

Run    python vanilla_rnn.py      (the next value of a wave; --help lists the other tasks)
Papers: Elman 1990, Werbos 1990, Pascanu et al. 2013 (clipping), Kingma and Ba 2015 (Adam).
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
    """Learn the next value of a wave, then continue the wave alone."""
    hidden: int = 64        # size of the hidden state
    radius: float = 1.0     # all singular values of Wh before training
    length: int = 80        # time steps of a sequence
    batch_size: int = 64    # sequences per optimizer step
    steps: int = 1000       # optimizer steps
    lr: float = 0.001       # learning rate
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 0           # random seed


# ---- layers: T time steps, N sequences, D inputs, H hidden, M outputs ----------------------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


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


def mse_forward(y, targets):
    """mean((y - targets)^2).   y, targets (N, M) -> scalar."""
    return ((y - targets) ** 2).mean(), (y, targets)


def mse_backward(dout, cache):
    """dy = 2 (y - targets) / size."""
    y, targets = cache
    return (y - targets) * (2 * dout / y.size)


# ---- data ----------------------------------------------------------------------------------------

def make_batch(cfg, step, dtype=np.float32):
    """Random sums of two sines, of periods 25 and 9.2 -> x, targets (T, N, 1): the next x."""
    rng = np.random.default_rng((cfg.seed, step))
    t = 2 * np.pi * np.arange(cfg.length + 1)[:, None, None]
    a, b = rng.uniform(0.2, 0.8, (2, cfg.batch_size, 1))                        # amplitudes
    p, q = rng.uniform(0, 2 * np.pi, (2, cfg.batch_size, 1))                    # phases
    waves = (a * np.sin(t / 25 + p) + b * np.sin(t / 9.2 + q)).astype(dtype)    # (T + 1, N, 1)
    return waves[:-1], waves[1:]


# ---- model: input projection, recurrence, output layer -------------------------------------------

def init_params(cfg, rng, dtype=np.float32, inputs=1, outputs=1):
    """Wx, Wh, b, Wo, bo. Wh is radius times an orthogonal matrix: its singular values."""
    H = cfg.hidden
    params = {"Wx": rng.standard_normal((inputs, H)) * inputs ** -0.5,
              "Wh": cfg.radius * np.linalg.qr(rng.standard_normal((H, H)))[0], "b": np.zeros(H),
              "Wo": rng.standard_normal((H, outputs)) * H ** -0.5, "bo": np.zeros(outputs)}
    return {name: value.astype(dtype) for name, value in params.items()}


def elman_forward(params, x, h0):
    """x (T, N, D), h0 (N, H) -> (y (T, N, M), the last h (N, H)), cache."""
    T, N, D = x.shape
    z, project = linear_forward(x.reshape(T * N, D), params["Wx"], params["b"])     # for all steps
    h, rnn = rnn_forward(z.reshape(T, N, -1), h0, params["Wh"])
    y, out = linear_forward(h.reshape(T * N, -1), params["Wo"], params["bo"])
    return (y.reshape(T, N, -1), h[-1]), (project, rnn, out)


def elman_backward(dy, cache, rnn_backward=rnn_backward):
    """elman_forward in reverse order -> dx, gradients under the keys of params."""
    project, rnn, out = cache
    T, N, M = dy.shape
    dh, dWo, dbo = linear_backward(dy.reshape(T * N, M), out)
    dz, _, dWh = rnn_backward(dh.reshape(T, N, -1), rnn)
    dx, dWx, db = linear_backward(dz.reshape(T * N, -1), project)
    return dx.reshape(T, N, -1), {"Wo": dWo, "bo": dbo, "Wh": dWh, "Wx": dWx, "b": db}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, targets = batch
    (y, _), cache = elman_forward(params, x, np.zeros((x.shape[1], cfg.hidden), x.dtype))
    loss, loss_cache = mse_forward(y, targets)
    _, grads = elman_backward(mse_backward(1.0, loss_cache), cache)
    return loss, grads


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads, update=adam_update,
          rate=lambda step, cfg: cfg.lr, state=None, losses=None, note=lambda: ""):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state = {} if state is None else state
    losses = [] if losses is None else losses
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        clip_norm(grads, cfg.grad_clip)
        update(params, grads, state, rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def gradient_norms(params, x, h0):
    """log10 of (the norm of d (last output) / d z_t, divided by that for the last t).   -> (T,)."""
    (_, h), (_, rnn, _) = elman_forward(params, x, h0)
    dh = np.zeros((len(x), *h.shape), h.dtype)
    dh[-1] = params["Wo"][:, 0]                         # y = h Wo + bo
    dz, _, _ = rnn_backward(dh, rnn)
    norms = np.linalg.norm(dz.astype(float), axis=(1, 2))
    return np.log10(norms / norms[-1] + 1e-30)


def draw_curves(a, b, rows=9):
    """Print two curves, . for a, o for b, @ for both; before each row its value.   a, b (T,)."""
    levels = np.linspace(max(a.max(), b.max()), min(a.min(), b.min()), rows)
    row_a = abs(levels[:, None] - a).argmin(axis=0)     # (T,), the nearest row
    row_b = abs(levels[:, None] - b).argmin(axis=0)
    for row, level in enumerate(levels):
        marks = (row_a == row) + 2 * (row_b == row)     # 0: no curve, 1: a, 2: b, 3: both
        print(f"{level:6.2f} |{''.join(' .o@'[k] for k in marks)}|")


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
    """Learn the wave, continue it, and show how the gradient fades on its way back through time."""
    start = time.perf_counter()
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    fresh = replace(cfg, batch_size=500, length=cfg.length + 59)    # 60 targets beyond the input
    waves, targets = make_batch(fresh, 0)
    x, h0 = waves[:cfg.length], np.zeros((500, cfg.hidden), waves.dtype)
    before = gradient_norms(params, x, h0)
    print(f"The next value of a wave, {cfg.length} steps: hidden {cfg.hidden}, radius {cfg.radius}"
          f", lr {cfg.lr}, {size} parameters\nchance level: loss 0.280")
    losses = train(params, cfg)
    after = gradient_norms(params, x, h0)
    (y, h), _ = elman_forward(params, x, h0)
    while len(y) < len(targets):                        # now every output is the next input
        (next_y, h), _ = elman_forward(params, y[-1:], h)
        y = np.concatenate([y, next_y])
    errors = ((y - targets) ** 2).mean(axis=(1, 2))
    mse, free_mse = float(errors[:-60].mean()), float(errors[-60:].mean())
    check_finite(free_mse, params)
    print(f"mean squared error {mse:.5f} on 500 fresh waves, {free_mse:.5f} on their next 60 values"
          ",\nwhere outputs become inputs. Columns: the last 80 steps; . true, o predicted, @ both")
    draw_curves(targets[-80:, 0, 0], y[-80:, 0, 0])
    print("log10 of the norm of the last output's gradient by step: . before training, o after it")
    draw_curves(before[-80:], after[-80:])
    print("\nNext: python vanilla_rnn.py explode      python vanilla_rnn.py --radius 0.5")
    print_result("wave", cfg, mse=mse, free_mse=free_mse, gradient=float(10 ** after[0]),
                 params=size, steps=len(losses), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: explosion and clipping; recall and truncation; text; flags. =========

MORE = """
Break it (what to change, and what comes of it)
    rnn_backward: dz = np.ones_like(h[1:])      diverges: the gradient grows on its way back
    rnn_backward: dh = 0 * dz[t]                0.0029, not 0.0020, and 0.07, not 0.007, on the next
                                                60 values: no gradient goes back through time
    rnn_backward: h[1:] in place of h[:-1]      0.05 to 0.3, by seed: the loss falls, so only a
                                                gradient check shows the error
    python vanilla_rnn.py --radius 0            0.0026, and 0.03: with Wh = 0 there is no memory yet
    python vanilla_rnn.py explode --radius 1.7  does not diverge, even without clipping
    python vanilla_rnn.py recall --window 1     76 % (windows of 2) and 67 % of the bits, not 100 %

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Derive and add a recurrence with ReLU, and start it with Wh = identity (Le et al. 2015).
    2. Derive and add a second layer whose inputs are the h of the first (then see lstm.py).
    3. python vanilla_rnn.py recall --delay 40: how many steps does full backpropagation need?

Data
    curl -o tinyshakespeare.txt \\
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python vanilla_rnn.py text --data tinyshakespeare.txt --hidden 512 --batch-size 64 --steps 2000

Papers of these parts: Williams and Peng 1990 (truncation), Bengio et al. 1994 (why gradients
vanish), Mikolov 2012 (text by recurrent nets).
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
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- exploding gradients, and clipping: python vanilla_rnn.py explode ----------------------------

@dataclass
class Explode(Config):
    """Gradients through time for five spectral radii; the wave with and without clipping."""
    radius: float = 1.8     # all singular values of Wh before training
    steps: int = 300        # optimizer steps of each training
    lr: float = 0.1         # learning rate of plain gradient descent
    grad_clip: float = 2.0  # largest gradient norm in the clipped training


def sgd_update(params, grads, state, lr):
    """w <- w - lr g."""
    for name, g in grads.items():
        params[name] -= lr * g


def descend(cfg):
    """Learn the wave by plain gradient descent, which may diverge without clipping.
    -> losses, norms of the gradients before clipping."""
    params, losses, norms = init_params(cfg, np.random.default_rng(cfg.seed)), [], []

    def measured(params, batch, cfg):
        loss, grads = loss_and_grads(params, batch, cfg)
        norms.append(clip_norm(grads, 0))               # limit 0: the norm, no clipping
        return loss, grads
    try:
        train(params, cfg, loss_and_grads=measured, update=sgd_update, losses=losses)
    except FloatingPointError as error:
        if cfg.grad_clip > 0:
            raise
        print(f"at step {len(losses)}: {error}")
    return losses, norms


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def run_explode(cfg):
    """The gradient on its way back for five radii; then the wave with and without clipping."""
    start, metrics, rows = time.perf_counter(), {}, []
    print("The norm of a gradient from step 50 back to step 1, before training. Columns: steps.\n"
          "Shades: = is about norm 1; one shade darker is 6 times more, lighter 6 times less")
    for radius in (0.5, 0.9, 1.0, 1.1, 1.5):
        rng = np.random.default_rng(cfg.seed)
        params = init_params(replace(cfg, radius=radius), rng, np.float64)
        z, dh = rng.standard_normal((2, 50, cfg.batch_size, cfg.hidden))
        dh[:-1] = 0                                     # it starts at the last step
        _, cache = rnn_forward(0.1 * z, np.zeros_like(z[0]), params["Wh"])
        dz, _, _ = rnn_backward(dh, cache)
        norms = np.linalg.norm(dz, axis=(1, 2))
        norms /= norms[-1]
        strip = "".join(shade(0.45 + np.log10(norms + 1e-30) / 8))
        print(f"radius {radius}   step 1 |{strip}| step 50   at step 1: {norms[0]:.0e}")
        metrics[f"radius_{radius}".replace(".", "_")] = float(norms[0])
    print("Slopes of tanh are below 1, so a radius slightly above 1 does not explode the gradient.")
    shown = [k for k in (1, 3, 10, 30, 100) if k < cfg.steps] + [cfg.steps]
    for name, radius, limit in (("control", 1.0, 0.0), ("unclipped", cfg.radius, 0.0),
                                ("clipped", cfg.radius, cfg.grad_clip)):
        print(f"\n{name}: the wave by plain gradient descent, lr {cfg.lr}, radius {radius}, "
              f"clipping {f'at {limit}' if limit else 'off'}\nchance level: loss 0.280")
        losses, norms = descend(replace(cfg, radius=radius, grad_clip=limit))
        cells = [f"{losses[k - 1]:.3g}" if k <= len(losses) else "" for k in shown]
        cells += [sum(norm > limit > 0 for norm in norms), f"{max(norms):.2g}"]
        rows.append(f"{name:10s}" + "".join(f"{cell:>10}" for cell in cells))
        metrics.update({f"{name}_loss": losses[-1], f"{name}_steps": len(losses)})
        if losses[-1] < 1e10 and len(losses) < cfg.steps:       # Ctrl-C
            break
    print("\nLoss by step (blank: diverged), number of clipped updates, largest gradient norm")
    heads = [f"step {k}" for k in shown] + ["clipped", "largest"]
    print(" " * 10 + "".join(f"{head:>10}" for head in heads))
    print("\n".join(rows))
    print("\nNext: python vanilla_rnn.py explode --radius 1.7      python vanilla_rnn.py recall")
    print_result("explode", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- memory, and truncated backpropagation: python vanilla_rnn.py recall -------------------------
# A pattern of bits, a random delay, then a cue; during the cue the targets are the bits in order.
# Truncated backpropagation cuts a sequence into windows. The hidden state passes from each window
# to the next; the gradient does not pass back.

@dataclass
class Recall:
    """Recall a pattern of bits after a delay; truncated backpropagation beside full."""
    bits: int = 4           # length of the pattern
    delay: int = 20         # longest delay between pattern and cue
    window: int = 5         # steps of a window where backpropagation is truncated
    hidden: int = 64        # size of the hidden state
    radius: float = 1.0     # all singular values of Wh before training
    batch_size: int = 64    # sequences per optimizer step
    steps: int = 1000       # optimizer steps of each training
    lr: float = 0.005       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 0           # random seed


def sigmoid(z):
    """1 / (1 + e^-z), computed as (1 + tanh(z / 2)) / 2, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def binary_cross_entropy_forward(logits, targets):
    """mean(log(1 + e^z) - t z), z logits (before a sigmoid), t targets 0 or 1, (N, M) -> scalar."""
    return (np.logaddexp(0, logits) - targets * logits).mean(), (logits, targets)


def binary_cross_entropy_backward(dout, cache):
    """dlogits = (sigmoid(logits) - targets) / size."""
    logits, targets = cache
    return (sigmoid(logits) - targets) * (dout / logits.size)


def learning_rate(step, cfg):
    """Linear warmup times half a cosine, from step 1 on; the last step is small, not 0."""
    warmup = min(1, step / max(1, cfg.warmup))
    return cfg.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.steps))


def draw_patterns(cfg, rng, n, dtype=np.float32):
    """-> x (T, n, 2): bits as -1 and 1, and the cue; asked (T, n): True during the cue, where the
    output counts; targets (T, n, 1); delays (n,)."""
    t = np.arange(2 * cfg.bits + cfg.delay)[:, None]
    bits = rng.integers(0, 2, (cfg.bits, n))
    delays = rng.integers(1, cfg.delay + 1, n)
    since = t - cfg.bits - delays                       # (T, n), steps since the cue begins
    asked = (since >= 0) & (since < cfg.bits)
    x = np.zeros((len(t), n, 2), dtype)
    x[:cfg.bits, :, 0] = 2 * bits - 1
    x[:, :, 1] = asked
    targets = bits[since % cfg.bits, np.arange(n)]      # of no meaning where nothing is asked
    return x, asked, targets[:, :, None].astype(dtype), delays


def recall_batch(cfg, step, dtype=np.float32):
    """Fresh patterns at every step.   -> x, asked, targets of draw_patterns."""
    rng = np.random.default_rng((cfg.seed, step))
    return draw_patterns(cfg, rng, cfg.batch_size, dtype)[:3]


def init_recall(cfg, rng, dtype=np.float32):
    """-> the parameters of init_params: two inputs, one output."""
    return init_params(cfg, rng, dtype, inputs=2)


def truncated(dout, cache, window):
    """rnn_backward of every window alone: no gradient passes back to the window before it."""
    h, Wh = cache                                       # h (T + 1, N, H), from h0 on
    parts = []
    for t in range(0, len(dout), window):
        part = h[t:t + window + 1], Wh                  # begins with the h before the window
        parts.append(rnn_backward(dout[t:t + window], part))
    dz, dh0, dWh = zip(*parts)
    return np.concatenate(dz), dh0[0], sum(dWh)


def recall_loss_and_grads(params, batch, cfg, rnn_backward=rnn_backward):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, asked, targets = batch
    (y, _), cache = elman_forward(params, x, np.zeros((x.shape[1], cfg.hidden), x.dtype))
    loss, loss_cache = binary_cross_entropy_forward(y[asked], targets[asked])
    dy = np.zeros_like(y)                               # where nothing is asked, y does not count
    dy[asked] = binary_cross_entropy_backward(1.0, loss_cache)
    _, grads = elman_backward(dy, cache, rnn_backward)
    return loss, grads


def run_recall(cfg):
    """The same training with full and with truncated backpropagation; the accuracy by delay."""
    start, metrics, rows = time.perf_counter(), {}, []
    x, asked, targets, delays = draw_patterns(cfg, np.random.default_rng((cfg.seed, 0)), 2000)
    ranges = [r for r in np.array_split(np.arange(1, cfg.delay + 1), 4) if len(r)]
    print(f"{cfg.bits} bits after a delay of 1 to {cfg.delay} steps: hidden {cfg.hidden}, radius "
          f"{cfg.radius}, lr {cfg.lr}")
    windows = [len(x)] + [w for w in (2 * cfg.window, cfg.window) if w < len(x)]
    for window in windows:
        name = f"windows of {window}" if window < len(x) else "full"
        params = init_recall(cfg, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\nbackpropagation: {name}, {size} parameters\n"
              "chance level: loss 0.693, 50 % of the bits")
        backward = functools.partial(truncated, window=window)
        loss_of = functools.partial(recall_loss_and_grads, rnn_backward=backward)
        losses = train(params, cfg, recall_batch, loss_of, rate=learning_rate)
        (y, _), _ = elman_forward(params, x, np.zeros((2000, cfg.hidden), x.dtype))
        check_finite(y.sum(), params)
        right = asked & ((y > 0) == targets)[:, :, 0]
        right = right.sum(axis=0) / cfg.bits            # (2000,), by pattern
        shares = [right[np.isin(delays, r)].mean() for r in ranges] + [right.mean()]
        rows.append(f"{name:>16s}" + "".join(f"{share:9.1%}" for share in shares))
        metrics[name.replace("windows of ", "window_")] = float(right.mean())
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nBits recalled of 2000 fresh patterns, by delay (columns)")
    heads = [f"{r[0]}-{r[-1]}" for r in ranges] + ["all"]
    print(f"{'backpropagation':>16s}" + "".join(f"{head:>9s}" for head in heads))
    print("\n".join(rows))
    print("Every row: as many updates, on the same patterns. With truncation, the gradient of an\n"
          "output ends where its window begins: nothing trains earlier steps to store the bits.\n"
          "(In a long text an update follows every window, so truncation also means more updates.)")
    print("\nNext: python vanilla_rnn.py recall --radius 0.5      python vanilla_rnn.py text")
    print_result("recall", cfg, **metrics, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ---- text: python vanilla_rnn.py text --data tinyshakespeare.txt ---------------------------------
# A text is one long sequence, cut into N streams: the columns of a batch. Each step reads the next
# window of every stream. The hidden state is carried over from window to window, the gradient is
# not (truncation). From the end of the streams it goes on at their beginning, a little shifted.

@dataclass
class Text(Config):
    """Predict the next character of a text."""
    embed_dim: int = 64     # embedding dimension
    length: int = 64        # characters per window
    hidden: int = 128       # size of the hidden state
    batch_size: int = 4     # windows per step
    steps: int = 400        # optimizer steps
    lr: float = 0.003       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 5.0  # largest gradient norm; 0: no limit
    temperature: float = 0.7  # sampling temperature: logits are divided by it
    threads: int = 2        # micro-batches, each on a thread of its own
    data: str = ""          # UTF-8 text file, its last tenth for validation; none: a rhyme
    save: str = ""          # checkpoint file (.npz), written at every line of progress
    load: str = ""          # checkpoint file to resume from


ALL_VERSES = ["the house that Jack built.", "the malt\nThat lay in", "the rat,\nThat ate",
          "the cat,\nThat killed", "the dog,\nThat worried",
          "the cow with the crumpled horn,\nThat tossed", "the maiden all forlorn,\nThat milked",
          "the man all tattered and torn,\nThat kissed",
          "the priest all shaven and shorn,\nThat married"]
LONG_RHYME = "\n" + "\n\n".join(
    "This is " + " ".join(ALL_VERSES[n::-1]) for n in range(len(ALL_VERSES))) + "\n"


def embedding_forward(ids, E):
    """Row ids of E.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """Row v of dE is the sum of dout over all positions whose id is v."""
    ids, shape = cache
    onehot = (ids.reshape(-1, 1) == np.arange(shape[0])).astype(dout.dtype)     # (positions, V)
    dE = onehot.T @ dout.reshape(len(onehot), -1)       # E[ids] is onehot @ E, a linear layer
    return dE.reshape(shape)


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


def cut_text(ids, N):
    """Cut ids into N streams of equal length, one per column; a rest of less than N is dropped."""
    return ids[:len(ids) // N * N].reshape(N, -1).T


def text_batch(cfg, step, dtype=np.float32):
    """The next window of all streams -> ids (T, N), targets (T, N): the next characters."""
    streams = cut_text(load_characters(cfg.data, cfg.load)[1], cfg.batch_size)
    T = min(cfg.length, len(streams) - 1)
    start = (step - 1) * T % (len(streams) - T)
    return streams[start:start + T], streams[start + 1:start + T + 1]


def init_text(cfg, rng, dtype=np.float32):
    """E (V, D) and the parameters of init_params."""
    V = len(load_characters(cfg.data, cfg.load)[0])
    E = 0.5 * rng.standard_normal((V, cfg.embed_dim)).astype(dtype)
    return {"E": E, **init_params(cfg, rng, dtype, cfg.embed_dim, V)}


def text_forward(params, ids, states):
    """ids (T, N), states (1, N, H): h before -> (logits (T, N, V), h after, (1, N, H)), cache."""
    x, embedding = embedding_forward(ids, params["E"])          # (T, N, D)
    (logits, h), elman = elman_forward(params, x, states[0])
    return (logits, h[None]), (embedding, elman)


def tokens_loss_and_grads(params, batch, cfg, states=None):
    """states: the last h of the previous window, or None for zeros -> loss, gradients, last h."""
    ids, targets = batch
    if states is None:
        states = np.zeros((1, ids.shape[1], cfg.hidden), params["E"].dtype)
    (logits, states), (embedding, elman) = text_forward(params, ids, states)
    rows = logits.reshape(-1, logits.shape[2])                  # (T N, V)
    loss, loss_cache = softmax_cross_entropy_forward(rows, targets.ravel())
    drows = softmax_cross_entropy_backward(1.0, loss_cache)
    dx, grads = elman_backward(drows.reshape(logits.shape), elman)
    grads["E"] = embedding_backward(dx, embedding)
    return loss, grads, states


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


def heldout_loss(params, cfg):
    """Mean loss over the last tenth of the text, cut into streams; h is carried over."""
    ids = load_characters(cfg.data, cfg.load)[2]
    streams = cut_text(ids, min(20, math.ceil(len(ids) / 200)))         # (length, N)
    states, total = np.zeros((1, streams.shape[1], cfg.hidden), np.float32), 0.0
    for t in range(0, len(streams) - 1, 100):
        window = streams[t:t + 101]
        (logits, states), _ = text_forward(params, window[:-1], states)
        rows = logits.reshape(-1, logits.shape[2])
        total += float(softmax_cross_entropy_forward(rows, window[1:].ravel())[0]) * len(rows)
    return total / streams[1:].size


def sample_characters(params, cfg, ids, count, rng):
    """Append count characters to the list ids, each drawn from softmax(logits / temperature)."""
    states = np.zeros((1, 1, cfg.hidden), np.float32)
    for _ in range(count):
        (logits, states), _ = text_forward(params, np.array([ids[-1:]]), states)
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
    params, losses, meta = init_text(cfg, rng), [], dict(task="text", chars=chars)
    zeros = np.zeros((1, cfg.batch_size, cfg.hidden), np.float32)
    state = {"states": zeros}
    if cfg.load:
        load_checkpoint(cfg.load, meta, params, state, losses)
    if state["states"].shape != zeros.shape:            # another --batch-size
        state["states"] = zeros
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses, dry_run=True)
    size = sum(p.size for p in params.values())
    print(f"{cfg.data or 'A rhyme'}: {len(train_ids)} training characters, {len(chars)} distinct\n"
          f"hidden {cfg.hidden}, lr {cfg.lr}, {size} parameters\n"
          f"chance level: loss {math.log(len(chars)):.3f}")

    def note():
        loss = heldout_loss(params, cfg)
        check_finite(loss)
        if cfg.save:
            save_checkpoint(cfg.save, meta, params, state, losses)
        return f"  validation {loss:.4f}"

    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")       # as run does
    with ThreadPoolExecutor(cfg.threads, initializer=quiet) as pool:
        step = functools.partial(threaded_text_loss_and_grads, pool, state)
        train(params, cfg, text_batch, step, rate=learning_rate, state=state, losses=losses,
              note=note)
    loss = heldout_loss(params, cfg)
    check_finite(loss, params)
    sample = sample_characters(params, cfg, [train_ids[0]], 500, rng)
    print("\n" + "".join(chars[i] for i in sample) + "\n")
    print(f"validation loss {loss:.4f} nats per character, on the last tenth of the text")
    print("\nNext: python vanilla_rnn.py text --radius 0.5      python lstm.py")
    print_result("text", cfg, validation=loss, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


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


CONSTRAINTS = {Config: lambda cfg: [(cfg.length >= 2, "--length", "2 or more", cfg.length)],
               Recall: lambda cfg: [(cfg.window >= 1, "--window", "1 or more", cfg.window)],
               Text: lambda cfg: [(cfg.length >= 2, "--length", "2 or more", cfg.length),
                                  (cfg.threads <= cfg.batch_size, "--threads",
                                   f"at most --batch-size {cfg.batch_size}", cfg.threads),
                                  (not cfg.save or os.path.realpath(cfg.save)
                                   != os.path.realpath(cfg.data), "--save",
                                   "another file than --data", cfg.save)]}

TASKS = {"wave": Task(Config, init_params, make_batch, loss_and_grads, main),
         "explode": Task(Explode, None, None, None, run_explode),
         "recall": Task(Recall, init_recall, recall_batch, recall_loss_and_grads, run_recall),
         "text": Task(Text, init_text, text_batch, tokens_loss_and_grads, run_text)}

if __name__ == "__main__":
    run(TASKS)
