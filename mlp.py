"""mlp.py: layers on layers, trained by backpropagation.

One layer separates two classes by a line. A hidden layer with a nonlinearity bends the line. But
no data say what a hidden neuron should output. Backpropagation computes it by the chain rule: from
loss to input, each operation turns the gradient of its output into the gradients of its inputs.

Forward, layer by layer:   z = x W + b   a = tanh(z), the x of the next layer   loss = L(last z)
Backward, in reverse order; dz, dW, da, ... are the derivatives of the loss by z, W, a, ...
    dz = (sigmoid(z) - t) / size   at the last layer: mean binary cross-entropy of targets t
    dW = x^T dz         z[n, m] = ... + x[n, d] W[d, m] for every row n, so dW sums over the rows
    db = sum_n dz       b[m] is added to every row
    dx = dz W^T         x[n, d] enters z[n, m] for every m, so dx sums over the outputs
    dz = da (1 - a^2)   for a = tanh(z), entry by entry; da is the dx of the next layer

Run    python mlp.py      (XOR, then two spirals; --help lists the other tasks)
Papers: Rumelhart et al. 1986 (backpropagation), Glorot and Bengio 2010, Kingma and Ba 2015 (Adam).
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
from typing import Literal

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np


@dataclass
class Config:
    """Learn XOR, then the points of --points."""
    points: Literal["xor", "spirals"] = "spirals"  # points in the plane, of two classes
    hidden: str = "32,32"   # widths of the hidden layers
    batch_size: int = 128   # points per step
    steps: int = 3000       # optimizer steps
    lr: float = 0.01        # learning rate
    seed: int = 0           # random seed


# ---- layers: N rows, D inputs, M outputs ---------------------------------------------------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


def tanh_forward(x):
    """y = tanh(x), entry by entry."""
    y = np.tanh(x)
    return y, y


def tanh_backward(dout, cache):
    """dx = dout (1 - y^2)."""
    y = cache
    return dout * (1 - y * y)


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


# ---- data ----------------------------------------------------------------------------------------

def xor_points(rng, n):
    """The corners of a square in turn (rng is not used); class 1 where the signs differ.
    -> x (n, 2), labels (n,)."""
    x = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])[np.arange(n) % 4]
    return x, x[:, 0] != x[:, 1]


def spiral_points(rng, n):
    """Two spiral arms, one per class, one and a half turns long.   -> x (n, 2), labels (n,)."""
    labels = np.arange(n) % 2
    angle = 3 * np.pi * np.sqrt(rng.random(n))          # sqrt: nearly even density along an arm
    turned = angle + np.pi * labels                     # one arm is opposite the other
    x = angle[:, None] / 2 * np.stack([np.cos(turned), np.sin(turned)], axis=1)
    return x + 0.1 * rng.standard_normal((n, 2)), labels


def make_batch(cfg, step, dtype=np.float32):
    """Fresh points at every step.   -> x (N, 2), targets (N, 1) of 0 or 1."""
    rng = np.random.default_rng((cfg.seed, step))
    draw_points = {"xor": xor_points, "spirals": spiral_points}[cfg.points]
    x, labels = draw_points(rng, cfg.batch_size)
    return x.astype(dtype), labels[:, None].astype(dtype)


# ---- model: linear, tanh, linear, tanh, ..., linear ----------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """W0, b0, W1, b1, ...; W (D, M) with standard deviation sqrt(2 / (D + M)) (Glorot 2010)."""
    sizes = [2, *map(int, cfg.hidden.split(",")), 1]
    params = {}
    for i, (D, M) in enumerate(zip(sizes, sizes[1:])):
        params[f"W{i}"] = rng.standard_normal((D, M)) * (2 / (D + M)) ** 0.5
        params[f"b{i}"] = np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def mlp_forward(params, x):
    """x (N, 2) -> logits (N, 1)."""
    caches = []
    last = len(params) // 2 - 1                         # every layer has two parameters, W and b
    for i in range(last):
        x, linear = linear_forward(x, params[f"W{i}"], params[f"b{i}"])
        x, tanh = tanh_forward(x)
        caches.append((linear, tanh))
    logits, linear = linear_forward(x, params[f"W{last}"], params[f"b{last}"])
    return logits, (caches, linear)


def mlp_backward(dout, cache):
    """mlp_forward in reverse order -> gradients under the keys of params."""
    caches, linear = cache
    grads = {}
    last = len(caches)
    dx, grads[f"W{last}"], grads[f"b{last}"] = linear_backward(dout, linear)
    for i in reversed(range(last)):
        linear, tanh = caches[i]
        dx = tanh_backward(dx, tanh)
        dx, grads[f"W{i}"], grads[f"b{i}"] = linear_backward(dx, linear)
    return grads


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, targets = batch
    logits, cache = mlp_forward(params, x)
    loss, loss_cache = binary_cross_entropy_forward(logits, targets)
    dlogits = binary_cross_entropy_backward(1.0, loss_cache)
    return loss, mlp_backward(dlogits, cache)


# ---- training and demo ---------------------------------------------------------------------------

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
          rate=lambda step, cfg: cfg.lr, note=lambda: ""):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        update(params, grads, state, rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def draw_regions(prob, points, labels, cols=48, rows=24):
    """A classifier in the plane: dark where prob is near 1; points of class 0 are o, of class 1 x.
    prob (N, 2) -> (N,), points (P, 2), labels (P,) -> list of lines."""
    edge = 1.1 * np.abs(points).max()
    x1, x2 = np.meshgrid(np.linspace(-edge, edge, cols), np.linspace(edge, -edge, rows))
    grid = np.stack([x1.ravel(), x2.ravel()], axis=1)
    picture = shade(prob(grid).reshape(rows, cols))
    col = ((1 + points[:, 0] / edge) / 2 * (cols - 1)).round().astype(int)
    row = ((1 - points[:, 1] / edge) / 2 * (rows - 1)).round().astype(int)
    picture[row, col] = np.where(labels > 0, "x", "o")
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
    """Learn XOR, then the points of the configuration; draw the output of the net in the plane."""
    start, metrics = time.perf_counter(), {}
    for points in dict.fromkeys(["xor", cfg.points]):   # once, if they are the same
        part = replace(cfg, points=points)
        params = init_params(part, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\n{points}: layers 2,{cfg.hidden},1, {size} parameters, lr {cfg.lr}")
        print(f"chance level: loss {math.log(2):.3f}")
        losses = train(params, part)
        x, targets = make_batch(replace(part, batch_size=2000), cfg.steps + 1)      # fresh points
        logits, _ = mlp_forward(params, x)
        loss, _ = binary_cross_entropy_forward(logits, targets)
        check_finite(loss, params)
        accuracy = ((logits > 0) == targets).mean()
        print(f"{accuracy:.2%} of {len(x)} points right, loss {loss:.3g}. The picture is dark where"
              "\nthe net outputs class x, blank where it outputs class o; some points are marked")
        print(*draw_regions(lambda grid: sigmoid(mlp_forward(params, grid)[0]),
                            x[:200], targets[:200, 0]), sep="\n")
        metrics.update({f"{points}_accuracy": float(accuracy), f"{points}_loss": float(loss)})
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nNext: python mlp.py net --activation relu      python mlp.py inits")
    metrics.update(params=size, steps=len(losses), seconds=time.perf_counter() - start)
    print_result("points", cfg, **metrics)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: activations, losses, BatchNorm, optimizers; names; digits; flags. ==

MORE = """
Break it (what to change, and what comes of it)
    tanh_forward: return x, 0 * x               XOR stays at loss 0.693, spirals at 65 %: without a
                                                nonlinearity, all layers together are one layer
    init_params: 0 * rng.standard_normal        50 %: hidden neurons start equal and stay equal
    tanh_backward: return dout                  XOR 75 %, spirals 65 %: the loss falls, so only a
                                                gradient check shows the error
    python mlp.py net --hidden 16,16,16,16,16,16,16,16,16,16 --init small     50 %: the signal fades
    python mlp.py net --hidden 16,16,16,16,16,16,16,16,16,16 --init small --norm batch        99 %
    python mlp.py net --points xor --hidden 2 --seed 1      stuck at 50 %; seed 2 reaches 100 %
    python mlp.py net --loss mse --optimizer sgd --lr 30    diverges within a few steps

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python mlp.py net --points xor --hidden 2 for ten seeds: how many succeed? And with 3, 4, 8?
    2. Derive and add leaky ReLU: y = x where x > 0, else 0.1 x (leaky_relu_forward, _backward).
    3. Derive and add the Huber loss: e^2 / 2 where |e| < 1, else |e| - 1/2, for e = y - targets.

Data
    names.txt: curl -O https://raw.githubusercontent.com/karpathy/makemore/master/names.txt
    mnist, a folder with four files:
        for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        curl --create-dirs -o mnist/$f-ubyte.gz \\
            https://ossci-datasets.s3.amazonaws.com/mnist/$f-ubyte.gz; done

Papers of these parts: Bengio et al. 2003 (neural language model), He et al. 2015 (initialisation),
Ioffe and Szegedy 2015 (BatchNorm), Hendrycks and Gimpel 2016 (GELU), van den Oord et al. 2016
(WaveNet), Elfwing et al. 2017 (SiLU), Loshchilov and Hutter 2017, 2019 (cosine, AdamW).
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
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- choices: activations, BatchNorm, losses, penalties ------------------------------------------

def relu_forward(x):
    """y = max(x, 0), entry by entry."""
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    """dx = dout where x > 0, else 0."""
    x = cache
    return dout * (x > 0)


def sigmoid_forward(x):
    """y = 1 / (1 + e^-x), entry by entry."""
    y = sigmoid(x)
    return y, y


def sigmoid_backward(dout, cache):
    """dx = dout y (1 - y)."""
    y = cache
    return dout * y * (1 - y)


def gelu_forward(x):
    """y = x h, h = (1 + tanh(c (x + 0.044715 x^3))) / 2, c = sqrt(2 / pi): nearly x times the
    cumulative normal distribution at x."""
    c = (2 / math.pi) ** 0.5
    h = 0.5 + 0.5 * np.tanh(c * (x + 0.044715 * x * x * x))
    return x * h, (x, h)


def gelu_backward(dout, cache):
    """dx = dout (h + x h'), h' = 2 h (1 - h) c (1 + 3 0.044715 x^2)."""
    x, h = cache
    c = (2 / math.pi) ** 0.5
    dh = 2 * h * (1 - h) * c * (1 + 3 * 0.044715 * x * x)
    return dout * (h + x * dh)


def silu_forward(x):
    """y = x s(x), s the sigmoid (Elfwing et al. 2017)."""
    s = sigmoid(x)
    return x * s, (x, s)


def silu_backward(dout, cache):
    """dx = dout (s + x s (1 - s)): the product rule."""
    x, s = cache
    return dout * (s + x * s * (1 - s))


def batchnorm_forward(x, gamma, beta, running=None, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps), mean and var over the rows of x,
    or, in evaluation, running = (mean, var) of the training data.   x (N, D), gamma, beta (D,)."""
    mean, var = running or (x.mean(axis=0), x.var(axis=0))
    inv_std = (var + eps) ** -0.5
    xhat = (x - mean) * inv_std
    return gamma * xhat + beta, (xhat, gamma, inv_std, running)


def batchnorm_backward(dout, cache):
    """g = gamma dout, dx = (g - mean(g) - xhat mean(g xhat)) / std: mean and std depend on every x;
    in evaluation they are constants. dgamma = sum_n dout xhat, dbeta = sum_n dout."""
    xhat, gamma, inv_std, running = cache
    g = gamma * dout
    if running is None:
        g = g - g.mean(axis=0) - xhat * (g * xhat).mean(axis=0)
    return g * inv_std, (dout * xhat).sum(axis=0), dout.sum(axis=0)


def mse_forward(y, targets):
    """mean((y - targets)^2).   y, targets (N, M) -> scalar."""
    return ((y - targets) ** 2).mean(), (y, targets)


def mse_backward(dout, cache):
    """dy = 2 (y - targets) / size."""
    y, targets = cache
    return (y - targets) * (2 * dout / y.size)


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


def penalty_forward(W, l1, l2):
    """l1 sum |W| + l2 / 2 sum W^2: large weights cost.   W (D, M), numbers l1, l2 -> scalar."""
    return l1 * np.abs(W).sum() + 0.5 * l2 * (W * W).sum(), (W, l1, l2)


def penalty_backward(dout, cache):
    """dW = dout (l1 sign(W) + l2 W)."""
    W, l1, l2 = cache
    return dout * (l1 * np.sign(W) + l2 * W)


ACTIVATIONS = {"relu": (relu_forward, relu_backward), "tanh": (tanh_forward, tanh_backward),
               "sigmoid": (sigmoid_forward, sigmoid_backward),
               "gelu": (gelu_forward, gelu_backward), "silu": (silu_forward, silu_backward)}
LOSSES = {"mse": (mse_forward, mse_backward),
          "binary": (binary_cross_entropy_forward, binary_cross_entropy_backward),
          "softmax": (softmax_cross_entropy_forward, softmax_cross_entropy_backward)}


# ---- a net with choices: python mlp.py net --activation relu --norm batch ------------------------
# A hidden layer is act(x W + b) or act(batchnorm(x W)), without b: BatchNorm would subtract b with
# the mean.

@dataclass
class Net(Config):
    """A net of any depth and width on points in the plane, with a choice of every part."""
    points: Literal["spirals", "xor", "gates"] = "spirals"  # points and their classes
    activation: Literal["relu", "sigmoid", "tanh", "gelu", "silu"] = "tanh"  # nonlinearity
    init: Literal["he", "xavier", "normal", "small"] = "xavier"  # scale of the first weights
    norm: Literal["none", "batch"] = "none"  # normalisation before each nonlinearity
    loss: Literal["binary", "softmax", "mse"] = "binary"  # loss function
    l1: float = 0.0         # penalty on sum |W|
    l2: float = 0.0         # penalty on sum W^2 / 2
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "adam"  # update rule
    weight_decay: float = 0.01  # weight decay of adamw
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # learning rate over the steps
    warmup: int = 50        # steps of linear warmup
    steps: int = 2000       # optimizer steps
    png: str = ""           # file to write the picture to, in color


@dataclass
class Gates(Net):
    """AND, OR, NAND and XOR, four outputs of one net."""
    points: Literal["spirals", "xor", "gates"] = "gates"  # points and their classes
    hidden: str = "4"       # widths of the hidden layers


GATES = {"AND": (0, 0, 0, 1), "OR": (0, 1, 1, 1), "NAND": (1, 1, 1, 0), "XOR": (0, 1, 1, 0)}


def gate_points(rng, n):
    """The corners of a square in turn; a column for each gate.   -> x (n, 2), labels (n, 4)."""
    x, _ = xor_points(rng, n)
    table = np.array(list(GATES.values())).T            # (4 corners, 4 gates)
    return x, table[np.arange(n) % 4]


POINTS = {"spirals": spiral_points, "xor": xor_points, "gates": gate_points}


def net_batch(cfg, step, dtype=np.float32):
    """Fresh points -> x (N, 2), targets: classes (N,) for softmax, else K columns of 0 or 1."""
    rng = np.random.default_rng((cfg.seed, step))
    x, labels = POINTS[cfg.points](rng, cfg.batch_size)
    if cfg.loss == "softmax":
        return x.astype(dtype), labels.astype(int)
    return x.astype(dtype), labels.reshape(len(x), -1).astype(dtype)


def init_layers(shapes, init, norm, rng, dtype):
    """W0, b0, W1, b1, ... of shapes [(D, M), ...]; with BatchNorm gamma, beta in place of b, except
    in the last layer."""
    with_norm = {"none": False, "batch": True}[norm]
    params = {}
    for i, (D, M) in enumerate(shapes):
        std = {"he": (2 / D) ** 0.5, "xavier": (2 / (D + M)) ** 0.5, "normal": 1.0, "small": 0.01}
        params[f"W{i}"] = rng.standard_normal((D, M)) * std[init]
        if with_norm and i < len(shapes) - 1:
            params[f"gamma{i}"], params[f"beta{i}"] = np.ones(M), np.zeros(M)
        else:
            params[f"b{i}"] = np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def init_net(cfg, rng, dtype=np.float32):
    """-> the parameters of init_layers."""
    outputs = 2 if cfg.loss == "softmax" else 1
    if cfg.points == "gates":
        outputs = len(GATES)
    sizes = [2, *map(int, cfg.hidden.split(",")), outputs]
    return init_layers(list(zip(sizes, sizes[1:])), cfg.init, cfg.norm, rng, dtype)


def layer_params(params, i):
    """The parameters of layer i under the names W, b, gamma, beta."""
    names = [name for name in ("W", "b", "gamma", "beta") if f"{name}{i}" in params]
    return {name: params[f"{name}{i}"] for name in names}


def hidden_layer_forward(x, p, activation, running=None):
    """act(x W + b), or act(batchnorm(x W)) if p has gamma.   x (N, D) -> (N, M)."""
    y, linear = linear_forward(x, p["W"], p.get("b", 0.0))
    norm = None
    if "gamma" in p:
        y, norm = batchnorm_forward(y, p["gamma"], p["beta"], running)
    y, act = ACTIVATIONS[activation][0](y)
    return y, (linear, norm, act, activation)


def hidden_layer_backward(dout, cache):
    """hidden_layer_forward in reverse order -> dx, gradients under the keys of p."""
    linear, norm, act, activation = cache
    g = {}
    dy = ACTIVATIONS[activation][1](dout, act)
    if norm is not None:
        dy, g["gamma"], g["beta"] = batchnorm_backward(dy, norm)
    dx, g["W"], db = linear_backward(dy, linear)
    if norm is None:
        g["b"] = db
    return dx, g


def net_forward(params, x, activation, running=None):
    """x (N, D) -> logits (N, K).   running: in evaluation a pair (mean, var) for every BatchNorm.
    The task names has x (N, T, D): a layer whose W has n D rows joins n neighbours of the T."""
    last = sum(name[0] == "W" for name in params) - 1
    caches = []
    for i in range(last):
        p = layer_params(params, i)
        shape = x.shape
        x = x.reshape(-1, len(p["W"]))                  # no change, except where neighbours join
        x, cache = hidden_layer_forward(x, p, activation, running[i] if running else None)
        caches.append((shape, cache))
    logits, linear = linear_forward(x, params[f"W{last}"], params[f"b{last}"])
    return logits, (caches, linear)


def net_backward(dout, cache):
    """net_forward in reverse order -> dx, gradients under the keys of params."""
    caches, linear = cache
    grads = {}
    last = len(caches)
    dx, grads[f"W{last}"], grads[f"b{last}"] = linear_backward(dout, linear)
    for i in reversed(range(last)):
        shape, hidden = caches[i]
        dx, g = hidden_layer_backward(dx, hidden)
        grads.update({f"{name}{i}": value for name, value in g.items()})
        dx = dx.reshape(shape)
    return dx, grads


def net_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss with penalties, gradients."""
    x, targets = batch
    loss_forward, loss_backward = LOSSES[cfg.loss]
    logits, cache = net_forward(params, x, cfg.activation)
    loss, loss_cache = loss_forward(logits, targets)
    _, grads = net_backward(loss_backward(1.0, loss_cache), cache)
    for name in params:
        if name[0] == "W":                              # W is used twice, so two gradients add
            penalty, penalty_cache = penalty_forward(params[name], cfg.l1, cfg.l2)
            loss = loss + penalty
            grads[name] = grads[name] + penalty_backward(1.0, penalty_cache)
    return loss, grads


def batch_statistics(params, x, activation):
    """Mean and var of every x W over training data x, for evaluation (Ioffe and Szegedy 2015,
    algorithm 2).   -> a list of pairs, or None without BatchNorm."""
    running = []
    for i in range(sum(name[:5] == "gamma" for name in params)):
        p = layer_params(params, i)
        x = x.reshape(-1, len(p["W"]))
        y = x @ p["W"]
        running.append((y.mean(axis=0), y.var(axis=0)))
        x, _ = hidden_layer_forward(x, p, activation)
    return running or None


def sgd_update(params, grads, state, lr):
    """w <- w - lr g."""
    for name, g in grads.items():
        params[name] -= lr * g


def momentum_update(params, grads, state, lr, mu=0.9):
    """s <- mu s + g,  w <- w - lr s: a sum of gradients, each weighted by mu^(its age in steps)."""
    for name, g in grads.items():
        s = state[name] = mu * state.get(name, 0) + g
        params[name] -= lr * s


def adamw_update(params, grads, state, lr, weight_decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """m, v: moving averages of g and g^2, divided by 1 - beta^t to correct for their start at 0;
    w <- w - lr (m / (sqrt(v) + eps) + weight_decay w), the last term for matrices only."""
    t = state["t"] = state.get("t", 0) + 1
    for name, g in grads.items():
        m = state["m " + name] = beta1 * state.get("m " + name, 0) + (1 - beta1) * g
        v = state["v " + name] = beta2 * state.get("v " + name, 0) + (1 - beta2) * g * g
        m = m / (1 - beta1 ** t)
        v = v / (1 - beta2 ** t)
        direction = m / (np.sqrt(v) + eps)
        if g.ndim > 1:
            direction += weight_decay * params[name]
        params[name] -= lr * direction


def learning_rate(step, cfg):
    """Linear warmup times half a cosine, from step 1 on; the last step is small, not 0."""
    warmup = min(1, step / max(1, cfg.warmup))
    return cfg.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.steps))


def scheduled_rate(step, cfg):
    """Linear warmup, then cfg.lr (constant), or cfg.lr times 0.1 after 60 % and times 0.01 after
    85 % of the steps (step), or learning_rate (cosine)."""
    done = (step - 1) / cfg.steps
    drops = (done >= 0.6) + (done >= 0.85)              # 0, 1 or 2
    lr = cfg.lr * min(1, step / max(1, cfg.warmup))
    rates = {"constant": lr, "step": lr * 0.1 ** drops, "cosine": learning_rate(step, cfg)}
    return rates[cfg.schedule]


def side_by_side(titles, pictures, gap="   "):
    """Print several pictures, each a list of lines, next to each other under their titles."""
    columns = [[title, *lines] for title, lines in zip(titles, pictures)]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns):
        print(gap.join(map(str.ljust, row, widths)).rstrip())


def loss_curve(losses, width=60):
    """Losses from first to last as one line of text, dark where high, on a logarithmic scale."""
    parts = np.array_split(losses, min(width, len(losses)))
    logs = np.log([np.mean(part) + 1e-12 for part in parts])
    return "".join(shade((logs - logs.min()) / (np.ptp(logs) + 1e-12)))


def class_probability(logits, loss):
    """Logits -> (N, K), near 1 for class 1. A softmax over two logits is a sigmoid of their
    difference."""
    return {"mse": logits, "binary": sigmoid(logits),
            "softmax": sigmoid(logits[:, -1:] - logits[:, :1])}[loss]


def train_net(cfg):
    """-> params, running statistics of BatchNorm, losses, test loss, test accuracy."""
    update = {"sgd": sgd_update, "momentum": momentum_update, "adam": adam_update,
              "adamw": functools.partial(adamw_update, weight_decay=cfg.weight_decay)}
    params = init_net(cfg, np.random.default_rng(cfg.seed))
    losses = train(params, cfg, net_batch, net_loss_and_grads, update[cfg.optimizer],
                   scheduled_rate)
    x, targets = net_batch(replace(cfg, batch_size=2000), cfg.steps + 1)        # fresh points
    sample, _ = net_batch(replace(cfg, batch_size=2000), cfg.steps + 3)         # for BatchNorm
    running = batch_statistics(params, sample, cfg.activation)
    logits, _ = net_forward(params, x, cfg.activation, running)
    loss_forward, _ = LOSSES[cfg.loss]
    loss, _ = loss_forward(logits, targets)
    check_finite(loss, params)
    right = (class_probability(logits, cfg.loss) > 0.5) == targets.reshape(len(x), -1)
    return params, running, losses, float(loss), float(right.mean())


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


def color_regions(prob, points, labels, size=400):
    """draw_regions in color: orange where prob is near 1, blue where it is near 0, a dark square
    for every point, a white frame.   -> (size + 8, size + 8, 3)"""
    edge = 1.1 * np.abs(points).max()
    x1, x2 = np.meshgrid(np.linspace(-edge, edge, size), np.linspace(edge, -edge, size))
    p = prob(np.stack([x1.ravel(), x2.ravel()], axis=1)).reshape(size, size, 1)
    blue, orange = np.array([0.45, 0.65, 0.95]), np.array([1.0, 0.7, 0.35])
    image = (1 - p) * blue + p * orange
    cols = ((1 + points[:, 0] / edge) / 2 * (size - 1)).round().astype(int)
    rows = ((1 - points[:, 1] / edge) / 2 * (size - 1)).round().astype(int)
    for row, col, label in zip(rows, cols, labels):
        image[row - 3:row + 4, col - 3:col + 4] = 0.5 * (orange if label > 0 else blue)
    return np.pad(image, ((4, 4), (4, 4), (0, 0)), constant_values=1)


def run_net(cfg):
    """Train a net with the choices of the configuration; draw every output in the plane."""
    start = time.perf_counter()
    if cfg.png:
        try_png(cfg.png)
    size = sum(p.size for p in init_net(cfg, np.random.default_rng(0)).values())
    print(f"{cfg.points}: hidden layers {cfg.hidden}, {cfg.activation}, init {cfg.init}, "
          f"norm {cfg.norm}, {cfg.optimizer}, lr {cfg.lr}, {size} parameters")
    print(f"chance level: loss {0.25 if cfg.loss == 'mse' else math.log(2):.3f}")
    params, running, losses, loss, accuracy = train_net(cfg)
    x, targets = net_batch(replace(cfg, batch_size=200), cfg.steps + 2)
    labels = targets.reshape(len(x), -1)

    def prob(grid):
        logits, _ = net_forward(params, grid, cfg.activation, running)
        return class_probability(logits, cfg.loss)      # (N, K), one column per output
    titles = list(GATES) if cfg.points == "gates" else [cfg.points]
    cols, rows = (48, 24) if len(titles) == 1 else (21, 11)
    outputs = range(len(titles))
    print("The plane: dark where an output is near 1 (class x), blank where it is near 0 (class o)")
    side_by_side(titles, [draw_regions(lambda grid: prob(grid)[:, k], x, labels[:, k], cols, rows)
                          for k in outputs])
    if cfg.png:
        images = [color_regions(lambda grid: prob(grid)[:, k], x, labels[:, k]) for k in outputs]
        write_png(cfg.png, np.concatenate(images, axis=1))
        print(f"{cfg.png}: {', '.join(titles)}; orange is class x, blue is class o")
    print(f"test loss {loss:.3g}, {accuracy:.2%} right on "
          + ("2000 fresh points" if cfg.points == "spirals" else "the four corners"))
    print("\nNext: python mlp.py inits      python mlp.py optimizers      python vanilla_rnn.py")
    task = "gates" if type(cfg) is Gates else "net"
    print_result(task, cfg, accuracy=accuracy, test_loss=loss, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ---- why initialisation matters: python mlp.py inits ---------------------------------------------

@dataclass
class Inits:
    """Print the spread of activations and gradients by layer, before training."""
    layers: int = 8         # hidden layers
    dim: int = 100          # width of each layer
    batch_size: int = 128   # rows of noise
    seed: int = 0           # random seed


def run_inits(cfg):
    """Print the spread of activations and weight gradients by layer, for two activations and four
    initialisations."""
    start, metrics = time.perf_counter(), {}
    rng = np.random.default_rng((cfg.seed, 1))
    x = rng.standard_normal((cfg.batch_size, 784)).astype(np.float32)
    targets = np.arange(cfg.batch_size) % 10
    print(f"{cfg.layers} layers of width {cfg.dim} before training, on noise. Standard deviation\n"
          "of the activations (a) and of the gradients of W (dW) in each layer: it should neither\n"
          "grow nor vanish, from left to right (a) or from right to left (dW).")
    print(f"{'':20s}" + "".join(f"{f'layer {i}':>9s}" for i in range(1, cfg.layers + 1)))
    sizes = [784] + cfg.layers * [cfg.dim] + [10]
    shapes = list(zip(sizes, sizes[1:]))
    for activation in ("tanh", "relu"):
        for init in ("he", "xavier", "normal", "small"):
            rng = np.random.default_rng(cfg.seed)
            params = init_layers(shapes, init, "none", rng, np.float32)
            logits, cache = net_forward(params, x, activation)
            _, loss_cache = softmax_cross_entropy_forward(logits, targets)
            _, grads = net_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)
            y, a, dW = x, [], []
            for i in range(cfg.layers):
                y, _ = hidden_layer_forward(y, layer_params(params, i), activation)
                a.append(float(y.std()))
                dW.append(float(grads[f"W{i}"].std()))
            for name, values in (("a", a), ("dW", dW)):
                print(f"{activation:>6s} {init:>8s} {name:>3s} "
                      + "".join(f"{value:9.1e}" for value in values))
            metrics[f"{activation}_{init}"] = a[-1] / max(a[0], 1e-30)
    print("In the result line: spread of the last layer's activations over that of the first.")
    print("\nNext: python mlp.py net --hidden 16,16,16,16,16,16,16,16,16,16 --init small")
    print_result("inits", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- optimizers side by side: python mlp.py optimizers -------------------------------------------

@dataclass
class Optimizers:
    """Learn two spirals by sgd, momentum, adam and adamw, from the same initial weights."""
    hidden: str = "32,32"   # widths of the hidden layers
    batch_size: int = 128   # points per step
    steps: int = 2000       # optimizer steps
    seed: int = 0           # random seed


def run_optimizers(cfg):
    """Train the same net with every optimizer; show the losses from first to last."""
    start, metrics, lines = time.perf_counter(), {}, []
    for name, lr in (("sgd", 0.5), ("momentum", 0.1), ("adam", 0.01), ("adamw", 0.01)):
        print(f"\n{name}, lr {lr}; chance level: loss {math.log(2):.3f}")
        _, _, losses, loss, accuracy = train_net(Net(optimizer=name, lr=lr, **vars(cfg)))
        curve = loss_curve(losses, 50)
        lines.append(f"{name:>8s}  lr {lr:<5}|{curve}|  {loss:.4f}  {accuracy:.2%}")
        metrics[name] = accuracy
        if len(losses) < cfg.steps:
            break
    print("\nTraining loss from first to last step (dark is high; logarithmic shades); then loss"
          "\nand accuracy on 2000 fresh points:")
    print("\n".join(lines))
    print("\nNext: python mlp.py net --optimizer sgd --lr 0.05      python vanilla_rnn.py")
    print_result("optimizers", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- names: python mlp.py names --data names.txt -------------------------------------------------
# Predict the next character of a name from the T = context characters before it (Bengio et al.
# 2003). Each of these is a row of E. The first layer joins all T rows; with --fuse 2 the first one
# joins neighbours to pairs, the second layer joins pairs to fours, and so on (WaveNet).

@dataclass
class Names:
    """Predict the next character of a name."""
    hidden: str = "128,128,128"  # widths of the hidden layers
    context: int = 8        # characters before the next one
    embed_dim: int = 24     # embedding dimension
    fuse: int = 0           # neighbours that a layer joins; 0: the first layer joins all
    batch_size: int = 256   # characters per step
    steps: int = 20000      # optimizer steps at most
    epochs: int = 28        # passes over the data at most
    lr: float = 0.003       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    weight_decay: float = 1.0  # AdamW weight decay
    data: str = ""          # text file with one name per line; none: the built-in names
    seed: int = 0           # random seed


NAMES = """
aaron adrian alan alice amber andrea ann antonia audrey beatrice beth brandon bridget caleb carl
caroline charlotte christina clement cora daisy daphne dennis dominic dorothy dylan edmund elena
ella eloise emma erin ethan evelyn felix florence frederick gemma gilbert grace gregory harold
hazel helen holly hugh ida iris ivan jacob janet jasper jenna jesse joel jonas joseph judith june
karl keith kevin laura leah leonard liam linda lorna lucas lydia marcus marian martha mason maud
megan michael miranda monica myra natalie nelson nigel nora olive oscar patricia paula philip
quentin raymond richard robin rosa roy russell sabrina samuel scott selina sidney sonia stanley
steven sybil tanya thelma timothy trevor valerie veronica vincent virginia wanda wesley winifred
zara""".split()


def embedding_forward(ids, E):
    """Row ids of E.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """Row v of dE is the sum of dout over all positions whose id is v."""
    ids, shape = cache
    onehot = (ids.reshape(-1, 1) == np.arange(shape[0])).astype(dout.dtype)     # (positions, V)
    dE = onehot.T @ dout.reshape(len(onehot), -1)       # E[ids] is onehot @ E, a linear layer
    return dE.reshape(shape)


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


def read_words(path):
    """One word per line of a text file, or the built-in names.   -> list.   Raises InputError."""
    lines = read_text(path).split("\n") if path else NAMES
    words = [line.strip() for line in lines if line.strip()]
    require(len(words) >= 20, f"--data {path}", "20 words or more, one per line", len(words))
    return words


def split_words(words):
    """80 / 10 / 10 % of the words for training, validation and test, the same in every run."""
    order = np.random.default_rng(0).permutation(len(words))
    parts = np.split(order, [int(0.8 * len(words)), int(0.9 * len(words))])
    return [[words[i] for i in part] for part in parts]


@functools.lru_cache
def load_windows(path, context):
    """Every character of the names with the characters before it.   -> dict: chars; train,
    validation, test, each ids (N, context), targets (N,)."""
    words = read_words(path)
    chars = "." + "".join(sorted(set("".join(words)) - {"."}))      # . begins and ends every name
    index, data = {c: i for i, c in enumerate(chars)}, {"chars": chars}
    for split, part in zip(("train", "validation", "test"), split_words(words)):
        ids, targets = [], []
        for word in part:
            name = [0] * context + [index[c] for c in word] + [0]
            for t in range(context, len(name)):
                ids.append(name[t - context:t])
                targets.append(name[t])
        data[split] = np.array(ids), np.array(targets)
    return data


def names_batch(cfg, step, dtype=np.float32):
    """-> ids (N, context), targets (N,)."""
    rng = np.random.default_rng((cfg.seed, step))
    ids, targets = load_windows(cfg.data, cfg.context)["train"]
    rows = rng.integers(0, len(ids), cfg.batch_size)
    return ids[rows], targets[rows]


def init_names(cfg, rng, dtype=np.float32):
    """E (V, D) and the layers of init_layers; a layer that joins n rows has W (n D, M)."""
    V, D, rows = len(load_windows(cfg.data, cfg.context)["chars"]), cfg.embed_dim, cfg.context
    E = rng.standard_normal((V, D)).astype(dtype)
    shapes = []
    for M in [*map(int, cfg.hidden.split(",")), V]:
        n = rows if cfg.fuse == 0 else min(cfg.fuse, rows)
        shapes.append((n * D, M))
        D, rows = M, rows // n
    return {"E": E, **init_layers(shapes, "xavier", "batch", rng, dtype)}


def names_forward(params, ids, running=None):
    """ids (N, context) -> logits (N, V)."""
    layers = {name: value for name, value in params.items() if name != "E"}
    x, embedding = embedding_forward(ids, params["E"])      # (N, context, D)
    logits, net = net_forward(layers, x, "gelu", running)
    return logits, (embedding, net)


def names_backward(dout, cache):
    """names_forward in reverse order -> gradients under the keys of params."""
    embedding, net = cache
    dx, grads = net_backward(dout, net)
    return {**grads, "E": embedding_backward(dx, embedding)}


def names_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    ids, targets = batch
    logits, cache = names_forward(params, ids)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets)
    return loss, names_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


def evaluate(forward, x, targets):
    """-> mean cross-entropy, accuracy of forward(x) -> logits, 2,000 rows at a time."""
    parts = np.array_split(x, math.ceil(len(x) / 2000))
    logits = np.concatenate([forward(part) for part in parts])
    loss, _ = softmax_cross_entropy_forward(logits, targets)
    return float(loss), float((logits.argmax(axis=1) == targets).mean())


def draw_embedding(E, chars, cols=64, rows=16):
    """Print the first 40 characters in the plane of the two principal components of E (V, D)."""
    centered = (E - E.mean(axis=0))[:40]
    _, _, components = np.linalg.svd(centered, full_matrices=False)
    xy = centered @ components[:2].T                    # (V, 2)
    xy = (xy - xy.min(axis=0)) / (np.ptp(xy, axis=0) + 1e-9)
    picture = np.full((rows, cols), " ")
    for (x, y), char in zip(xy, chars):
        picture[round(float(y) * (rows - 1)), round(float(x) * (cols - 1))] = char
    print("Embeddings of the characters, in the plane in which they differ most:")
    print("\n".join("".join(line) for line in picture))


def run_names(cfg):
    """Learn names, sample new ones, print the test loss."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    data = load_windows(cfg.data, cfg.context)
    chars, (ids, _) = data["chars"], data["train"]
    epoch = math.ceil(len(ids) / cfg.batch_size)        # steps of one pass over the data
    cfg = replace(cfg, steps=min(cfg.steps, cfg.epochs * epoch))
    params = init_names(cfg, rng)
    size = sum(p.size for p in params.values())
    print(f"{cfg.data or 'the built-in names'}: {len(ids)} characters to predict, each from the "
          f"{cfg.context} before it,\n{len(chars)} different ones; hidden layers {cfg.hidden}, "
          f"{size} parameters,\n{cfg.steps} steps (--epochs {cfg.epochs} at most)")
    print(f"chance level: loss {math.log(len(chars)):.3f}")
    sample = ids[np.random.default_rng(0).permutation(len(ids))[:10000]]    # for BatchNorm
    validation = []

    def measure(split):
        running = batch_statistics(params, params["E"][sample], "gelu")
        return evaluate(lambda part: names_forward(params, part, running)[0], *data[split])

    def note():
        validation.append(measure("validation")[0])
        return f"  validation {validation[-1]:.4f}"
    update = functools.partial(adamw_update, weight_decay=cfg.weight_decay)
    losses = train(params, cfg, names_batch, names_loss_and_grads, update, learning_rate, note)
    loss, accuracy = measure("test")
    check_finite(loss, params)
    draw_embedding(params["E"], chars)
    running, names = batch_statistics(params, params["E"][sample], "gelu"), []
    for _ in range(10):
        name = [0] * cfg.context                        # before a name there are only dots
        for _ in range(20):
            logits, _ = names_forward(params, np.array([name[-cfg.context:]]), running)
            p = np.exp(logits[0].astype(float) - logits.max())
            name.append(rng.choice(len(p), p=p / p.sum()))
            if name[-1] == 0:
                break
        names.append("".join(chars[i] for i in name if i > 0))
    print(textwrap.fill(f"samples: {', '.join(names)}", 100))
    print(f"lowest validation loss {min(validation):.4f}, last {validation[-1]:.4f} (a rise is "
          "overfitting)")
    expected = f"   (expected on names.txt: {2.0 if cfg.fuse == 0 else 1.97})" if cfg.data else ""
    print(f"test loss {loss:.4f} nats per character{expected}")
    print("\nNext: python mlp.py names --fuse 2      python vanilla_rnn.py")
    print_result("names", cfg, test_loss=loss, accuracy=accuracy, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ---- handwritten digits: python mlp.py mnist --data mnist ----------------------------------------

@dataclass
class Mnist:
    """Classify handwritten digits, with ReLU, He initialisation, BatchNorm and AdamW."""
    hidden: str = "512,256"  # widths of the hidden layers
    batch_size: int = 128   # images per step
    steps: int = 8000       # optimizer steps
    lr: float = 0.003       # peak learning rate
    warmup: int = 50        # steps of linear warmup
    weight_decay: float = 0.01  # AdamW weight decay
    data: str = ""          # folder with the four files of MNIST
    seed: int = 0           # random seed


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


def mnist_batch(cfg, step, dtype=np.float32):
    """Random training images.   -> x (N, 784), labels (N,)."""
    rng = np.random.default_rng((cfg.seed, step))
    x, labels = load_mnist(cfg.data)["train"]
    rows = rng.integers(0, len(x), cfg.batch_size)
    return x[rows].astype(dtype, copy=False), labels[rows]


def init_mnist(cfg, rng, dtype=np.float32):
    """-> the parameters of init_layers."""
    sizes = [784, *map(int, cfg.hidden.split(",")), 10]
    return init_layers(list(zip(sizes, sizes[1:])), "he", "batch", rng, dtype)


def mnist_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, labels = batch
    logits, cache = net_forward(params, x, "relu")
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels)
    _, grads = net_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)
    return loss, grads


def run_mnist(cfg):
    """Learn to read digits; draw three that the net gets wrong."""
    require(cfg.data, "--data", "the folder of MNIST (python mlp.py --help says where)", cfg.data)
    start, data = time.perf_counter(), load_mnist(cfg.data)
    params = init_mnist(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"{len(data['train'][0])} images of 28 x 28 pixels: hidden layers {cfg.hidden}, "
          f"{size} parameters")
    print("chance level: loss 2.303")

    def net_now():
        """The net with the statistics of BatchNorm that its weights have now."""
        running = batch_statistics(params, data["train"][0][:10000], "relu")
        return lambda x: net_forward(params, x, "relu", running)[0]

    def note():
        loss, accuracy = evaluate(net_now(), *data["validation"])
        return f"  validation {loss:.4f}, {accuracy:.2%} right"
    update = functools.partial(adamw_update, weight_decay=cfg.weight_decay)
    losses = train(params, cfg, mnist_batch, mnist_loss_and_grads, update, learning_rate, note)
    (x, labels), forward = data["test"], net_now()
    loss, accuracy = evaluate(forward, x, labels)
    check_finite(loss, params)
    outputs = forward(x[:2000]).argmax(axis=1)
    wrong = np.flatnonzero(outputs != labels[:2000])[:3]
    ink = (x[wrong].reshape(-1, 14, 2, 28).mean(axis=2) + 0.4) / 3      # characters are tall
    print("Test images that the net gets wrong: blank is 0, @ is 1; a line is two rows of pixels")
    side_by_side([f"{labels[n]} taken for {outputs[n]}" for n in wrong],
                 [["".join(row) for row in shade(image)] for image in ink])
    print(f"test accuracy {accuracy:.2%} of {len(x)} images (expected on MNIST: 98.5 %)")
    print("\nNext: python mlp.py mnist --data DIR --hidden 1000      python vanilla_rnn.py")
    print_result("mnist", cfg, accuracy=accuracy, test_loss=loss, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


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


GRADCHECK = {"hidden_layer": lambda rng: [                # with a bias; with BatchNorm
    dict(x=rng.standard_normal((6, 3)), p={"W": rng.standard_normal((3, 5)),
         "b": rng.standard_normal(5)}, activation="tanh"),
    dict(x=rng.standard_normal((6, 3)), p={"W": rng.standard_normal((3, 5)),
         "gamma": rng.standard_normal(5), "beta": rng.standard_normal(5)}, activation="gelu")]}


def widths_are_right(cfg):
    """The constraint on --hidden."""
    ok = re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", cfg.hidden)
    return ok, "--hidden", "widths above 0, such as 64,32", cfg.hidden


def loss_fits(cfg):
    """The constraint on --loss: softmax needs exactly one right class, but each gate is 0 or 1."""
    ok = (cfg.points, cfg.loss) != ("gates", "softmax")
    return ok, "--loss", "binary or mse for gates", cfg.loss


def fuse_fits(cfg):
    """The constraint on --fuse: the hidden layers must join all characters of the context."""
    layers = cfg.hidden.count(",") + 1
    ok = cfg.fuse == 0 or cfg.context in [cfg.fuse ** (k + 1) for k in range(layers)]
    expected = f"0, or a number with --context {cfg.context} among its first {layers} powers"
    return ok, "--fuse", expected, cfg.fuse


def two_or_more(flag, value):
    """The constraint on a number whose spread is taken, or of which two are drawn."""
    return value > 1, flag, "2 or more", value


def every_corner(cfg):
    """The constraint on batches of points, which come in turn from four corners or two arms."""
    return cfg.batch_size > 3, "--batch-size", "4 or more: every class in it", cfg.batch_size


CONSTRAINTS = {Config: lambda cfg: [widths_are_right(cfg), every_corner(cfg)],
               Net: lambda cfg: [widths_are_right(cfg), loss_fits(cfg), every_corner(cfg)],
               Gates: lambda cfg: [widths_are_right(cfg), loss_fits(cfg), every_corner(cfg)],
               Optimizers: lambda cfg: [widths_are_right(cfg), every_corner(cfg)],
               Inits: lambda cfg: [two_or_more("--batch-size", cfg.batch_size)],
               Names: lambda cfg: [widths_are_right(cfg), fuse_fits(cfg),
                                   two_or_more("--embed-dim", cfg.embed_dim)],
               Mnist: lambda cfg: [widths_are_right(cfg)]}

TASKS = {"points": Task(Config, init_params, make_batch, loss_and_grads, main),
         "net": Task(Net, init_net, net_batch, net_loss_and_grads, run_net),
         "gates": Task(Gates, init_net, net_batch, net_loss_and_grads, run_net),
         "inits": Task(Inits, None, None, None, run_inits),
         "optimizers": Task(Optimizers, None, None, None, run_optimizers),
         "names": Task(Names, init_names, names_batch, names_loss_and_grads, run_names),
         "mnist": Task(Mnist, init_mnist, mnist_batch, mnist_loss_and_grads, run_mnist)}

if __name__ == "__main__":
    run(TASKS)
