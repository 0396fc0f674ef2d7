"""gan.py: two networks in a game: one generates points, the other tells them from real ones.

A generator G turns noise z into points. A discriminator D outputs the logit of a point being real.
D learns to tell the points x of a data set from those of G, and G learns to make points that D
takes for real. No likelihood is computed: all that G learns about the data is the derivative of D
by its input. Each player has a loss of its own, in which the other one, its rival, is a constant.

Forward: a is an output of D, bce(a, t) = log(1 + e^a) - t a the cross-entropy of a target t
    loss of D    mean bce(D(x), 1) + mean bce(D(G(z)), 0)       real is 1, generated is 0
    loss of G    mean bce(D(G(z)), 1)                           non-saturating
Backward:
    both         da = (sigmoid(a) - t) / N, then back through the layers of D
    loss of D    takes the gradients of D's weights, and stops at its input
    loss of G    takes dx, the gradient of D's input; dx is the dout of G's last layer
Nothing in the loss of G asks for points like all of the data. G may settle on a small part of the
data: mode collapse. The losses do not show it, so this file measures the generated points.

Run    python gan.py      (eight Gaussians; python gan.py --help lists the other tasks)
Papers: Goodfellow et al. 2014 (GAN), Radford et al. 2016 (DCGAN: Adam with beta1 0.5), Metz et al.
2017 (the ring), Lin et al. 2018 (modes and high-quality samples, counted).
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
    """Generate points of eight Gaussians on a ring."""
    noise_dim: int = 32     # numbers of noise per generated point
    hidden: int = 64        # width of the hidden layers, two in each network
    batch_size: int = 128   # real points, and as many generated ones, per step
    critic_steps: int = 2   # steps of the discriminator per step of the generator
    steps: int = 6000       # steps of the discriminator
    lr: float = 0.003       # learning rate, which falls to 0 over the second half of the steps
    beta1: float = 0.5      # Adam: weight of the past in the average of gradients
    beta2: float = 0.9      # Adam: weight of the past in the average of squared gradients
    seed: int = 0           # random seed


# ---- layers: N rows; in linear D inputs and M outputs, elsewhere D is the discriminator ----------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


def relu_forward(x):
    """y = max(x, 0), entry by entry."""
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    """dx = dout where x > 0, else 0."""
    x = cache
    return dout * (x > 0)


def leaky_relu_forward(x):
    """y = x where x > 0, else 0.2 x: no input is without a gradient."""
    return np.where(x > 0, x, 0.2 * x), x


def leaky_relu_backward(dout, cache):
    """dx = dout where x > 0, else 0.2 dout."""
    x = cache
    return np.where(x > 0, dout, 0.2 * dout)


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


# ---- model: a generator and a discriminator; Z numbers of noise, P numbers per point -------------

def init_params(cfg, rng, dtype=np.float32, size=2):
    """g_W1, g_b1, ..., g_b3 of the generator, d_W1, ..., d_W3 of the discriminator, without d_b3;
    W (n, m) with standard deviation sqrt(2 / n) (He 2015). size: P, the numbers per point."""
    H, params = cfg.hidden, {}
    for player, sizes in (("g", (cfg.noise_dim, H, H, size)), ("d", (size, H, H, 1))):
        for i in (1, 2, 3):
            n, m = sizes[i - 1], sizes[i]
            params[f"{player}_W{i}"] = rng.standard_normal((n, m)) * (2 / n) ** 0.5
            params[f"{player}_b{i}"] = np.zeros(m)
    del params["d_b3"]                                  # it would add the same to every logit
    return {name: value.astype(dtype) for name, value in params.items()}


def generator_forward(params, noise):
    """noise (N, Z) -> points (N, P)."""
    y, linear1 = linear_forward(noise, params["g_W1"], params["g_b1"])
    y, relu1 = relu_forward(y)
    y, linear2 = linear_forward(y, params["g_W2"], params["g_b2"])
    y, relu2 = relu_forward(y)
    y, linear3 = linear_forward(y, params["g_W3"], params["g_b3"])
    return y, (linear1, relu1, linear2, relu2, linear3)


def generator_backward(dout, cache):
    """generator_forward in reverse order -> gradients under the keys of params."""
    linear1, relu1, linear2, relu2, linear3 = cache
    grads = {}
    dy, grads["g_W3"], grads["g_b3"] = linear_backward(dout, linear3)
    dy = relu_backward(dy, relu2)
    dy, grads["g_W2"], grads["g_b2"] = linear_backward(dy, linear2)
    dy = relu_backward(dy, relu1)
    _, grads["g_W1"], grads["g_b1"] = linear_backward(dy, linear1)
    return grads


def discriminator_forward(params, x):
    """points x (N, P) -> logits (N, 1) of being real."""
    y, linear1 = linear_forward(x, params["d_W1"], params["d_b1"])
    y, leaky1 = leaky_relu_forward(y)
    y, linear2 = linear_forward(y, params["d_W2"], params["d_b2"])
    y, leaky2 = leaky_relu_forward(y)
    logits, linear3 = linear_forward(y, params["d_W3"], 0.0)        # without d_b3
    return logits, (linear1, leaky1, linear2, leaky2, linear3)


def discriminator_backward(dout, cache):
    """discriminator_forward in reverse order -> dx, gradients under the keys of params."""
    linear1, leaky1, linear2, leaky2, linear3 = cache
    grads = {}
    dy, grads["d_W3"], _ = linear_backward(dout, linear3)
    dy = leaky_relu_backward(dy, leaky2)
    dy, grads["d_W2"], grads["d_b2"] = linear_backward(dy, linear2)
    dy = leaky_relu_backward(dy, leaky1)
    dx, grads["d_W1"], grads["d_b1"] = linear_backward(dy, linear1)
    return dx, grads


def make_batch(cfg, step, dtype=np.float32, rivals=None):
    """-> real points (N, 2), noise (N, Z), the parameters of the rivals that each network plays
    against: in training the same as params; if none are given, those of init_params."""
    rng = np.random.default_rng((cfg.seed, step))
    real = draw_ring(rng, cfg.batch_size).astype(dtype)
    noise = rng.standard_normal((cfg.batch_size, cfg.noise_dim)).astype(dtype)
    return real, noise, rivals or init_params(cfg, np.random.default_rng(cfg.seed), dtype)


def loss_and_grads(params, batch, cfg):
    """The discriminator against the rival generator, the generator against the rival discriminator.
    -> the sum of both losses, the gradients of each network's own loss."""
    real, noise, rivals = batch
    fake, _ = generator_forward(rivals, noise)
    logits, discriminator = discriminator_forward(params, np.concatenate([real, fake]))
    targets = np.concatenate([np.ones_like(real[:, :1]), np.zeros_like(fake[:, :1])])
    d_loss, loss_cache = binary_cross_entropy_forward(logits, targets)
    dlogits = binary_cross_entropy_backward(2.0, loss_cache)        # 2: two means of N, not of 2 N
    _, d_grads = discriminator_backward(dlogits, discriminator)

    fake, generator = generator_forward(params, noise)
    logits, discriminator = discriminator_forward(rivals, fake)
    g_loss, loss_cache = binary_cross_entropy_forward(logits, np.ones_like(logits))
    dlogits = binary_cross_entropy_backward(1.0, loss_cache)
    dfake, _ = discriminator_backward(dlogits, discriminator)
    return 2 * d_loss + g_loss, {**d_grads, **generator_backward(dfake, generator)}


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


def decayed_rate(step, cfg):
    """cfg.lr over the first half of the steps, then linearly to nearly 0."""
    return cfg.lr * min(1, 2 * (1 - (step - 1) / cfg.steps))


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
          note=lambda: ""):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    states, losses = {"d": {}, "g": {}}, []
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step, rivals=params), cfg)
        players = ["d", "g"] if step % cfg.critic_steps == 0 else ["d"]
        for player in players:
            own = {name: g for name, g in grads.items() if name[0] == player}
            update(params, own, states[player], decayed_rate(step, cfg), cfg.beta1, cfg.beta2)
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def generated(params, cfg, n):
    """n generated points; their noise is not that of the training, and the same in every call."""
    rng = np.random.default_rng((cfg.seed, 10 ** 6))
    noise = rng.standard_normal((n, cfg.noise_dim)).astype(np.float32)
    return generator_forward(params, noise)[0]


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


def mode_digits(points):
    """Tenths of the points on each mode; 9 is 0.85 or more, a dot is below 1/80."""
    return "".join(str(min(9, round(10 * s))) if s > 1 / 80 else "." for s in mode_shares(points))


def show_ring(points, cfg):
    """Compare generated points with real ones, draw both.   -> metrics."""
    rng = np.random.default_rng((cfg.seed, 10 ** 6 + 1))
    real, more = draw_ring(rng, len(points)), draw_ring(rng, len(points))
    shares, distance = mode_shares(points), sliced_wasserstein(points, real)
    print("Density in the plane, blank where there are no points, @ where most are:")
    side_by_side(["real", "generated"], [draw_density(real), draw_density(points)])
    modes = int((shares > 1 / 80).sum())
    print(f"{modes} of 8 modes covered; {shares.sum():.1%} of the points within three standard "
          f"deviations of one\n(real: {mode_shares(real).sum():.1%}); distance to real points "
          f"{distance:.3f} (of real points: {sliced_wasserstein(more, real):.3f})")
    return dict(modes=modes, quality=float(shares.sum()), distance=distance)


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
    """Play the game on the ring; show what the generator has settled on."""
    start = time.perf_counter()
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    size, H = sum(p.size for p in params.values()), cfg.hidden
    print(f"Eight Gaussians on a ring: generator {cfg.noise_dim}-{H}-{H}-2, discriminator "
          f"2-{H}-{H}-1, {size} parameters")
    print(f"chance level: loss {3 * math.log(2):.3f}, D guesses: {2 * math.log(2):.3f} of D, "
          f"{math.log(2):.3f} of G")
    print("modes: tenths of the points on each of the eight; 9 is 0.85 or more, a dot below 1/80")
    losses = train(params, cfg, note=lambda: f"  modes {mode_digits(generated(params, cfg, 1000))}")
    points = generated(params, cfg, 4000)
    check_finite(np.abs(points).max(), params)
    metrics = show_ring(points, cfg)
    print("Next: python gan.py --noise-dim 2      python gan.py game      python gan.py shapes")
    print_result("ring", cfg, **metrics, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: other losses, constraints on the slope of D; images of shapes; flags. ==

MORE = """
Break it (the ring, seeds 0 to 4: modes covered, share of points near one, distance to real points)
    python gan.py                       1, 0.92 to 0.98, 1.51 to 1.55: as it is
    python gan.py --noise-dim 8         2 to 6, 0.86 to 0.97, 0.24 to 1.29
    python gan.py --noise-dim 2         7 or 8, 0.91 to 0.96, 0.07 to 0.33: no collapse
    python gan.py game                  8, 0.84 to 0.87, 0.05 to 0.06; gap and dist fall together
    python gan.py game --lr 0.0005      0 or 1, 0.06 to 0.08, 0.34 to 0.38: too slow
    python gan.py game --loss hinge     8, 0.68 to 0.85, 0.05 to 0.10
    python gan.py game --loss non-saturating --constraint r1        8, 0.80 to 0.89, 0.04 to 0.05:
                                        the slope of D matters more than the loss
    python gan.py game --loss hinge --constraint spectral           0 to 2, 0.05 to 0.07, 0.43 to
                                        0.76: smeared
    python gan.py game --constraint none --steps 2000               0 to 2, 0.00 to 0.08, 1.19 to
                                        3.85: G is driven off
    python gan.py game --constraint clipping --strength 0.3 --beta1 0 --critic-steps 5 \\
        --lr 0.001 --steps 7500         0 to 2, 0.07 to 0.09, 0.29 to 0.33: smeared over the square
    python gan.py shapes                88 to 94 % good, 8 to 18 templates; with the penalty 47 to
                                        51 %, all 40

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python gan.py --noise-dim 2, then 8, for five seeds: how many modes are covered, and why?
    2. Derive and add least squares, mean (a - t)^2 (Mao et al. 2017): least_squares_forward,
       least_squares_backward, a row of GAMES. Does it cover more modes than the spine?
    3. Let D use tanh: the masks are then 1 - h^2, which depend on x W1 + b1. Derive the term that
       input_gradient_backward has to return for it.

Papers of these parts: Arjovsky et al. 2017 (Wasserstein GAN, clipping), Gulrajani et al. 2017
(gradient penalty), Lim and Ye 2017 (hinge), Miyato et al. 2018 (spectral norm), Mescheder et al.
2018 (R1).
"""

import argparse
import contextlib
import ctypes
import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- losses of a player: a = logits, t = targets, s = 2 t - 1, the sign of a target --------------
# Both players have a loss on real and generated points. The targets of D are 1 for real points and
# 0 for generated ones, those of G are exchanged (to G, the terms of real points are constants).

def hinge_forward(logits, targets):
    """mean max(0, 1 - s a): 0 where a has the right sign and |a| > 1."""
    sign = 2 * targets - 1
    return np.maximum(0, 1 - sign * logits).mean(), (logits, sign)


def hinge_backward(dout, cache):
    """da = -s / size where s a < 1, else 0."""
    logits, sign = cache
    return -sign * (sign * logits < 1) * (dout / logits.size)


def wasserstein_forward(logits, targets):
    """mean(-s a). Summed over real and generated points: mean D(G(z)) - mean D(x). The least that a
    function D with slopes of at most 1 can reach is -1 times the Wasserstein distance."""
    sign = 2 * targets - 1
    return -(sign * logits).mean(), sign


def wasserstein_backward(dout, cache):
    """da = -s / size."""
    sign = cache
    return -sign * (dout / sign.size)


def minimax_forward(logits, targets):
    """-mean bce(a, 1 - t): for G the loss of D with the other sign, as the game was first posed."""
    loss, cache = binary_cross_entropy_forward(logits, 1 - targets)
    return -loss, cache


def minimax_backward(dout, cache):
    """da = -(sigmoid(a) - (1 - t)) / size: nearly 0 for G (t = 1) where D is sure: a << 0."""
    return binary_cross_entropy_backward(-dout, cache)


BCE = binary_cross_entropy_forward, binary_cross_entropy_backward
WASSERSTEIN = wasserstein_forward, wasserstein_backward
GAMES = {"non-saturating": (BCE, BCE), "minimax": (BCE, (minimax_forward, minimax_backward)),
         "hinge": ((hinge_forward, hinge_backward), WASSERSTEIN),
         "wasserstein": (WASSERSTEIN, WASSERSTEIN)}     # the losses of D, of G


# ---- constraints on the slope of D ---------------------------------------------------------------
# The slope is g = dD/dx, the dx of discriminator_backward for dout = 1. A penalty on g has to be
# differentiated once more, by the weights. The slopes m1, m2 of the leaky ReLUs are constants
# between the kinks. So g is the output of a net without biases that runs through the layers of D
# from last to first, V3 -> V2 -> V1 -> g, and its backward pass runs from first to last.

def input_gradient_forward(masks, W1, W2, W3):
    """g = V1 W1^T,  V1 = m1 (V2 W2^T),  V2 = m2 (V3 W3^T),  V3 = 1.
    masks m1, m2 (N, H): slopes of the leaky ReLUs; W1 (D, H), W2 (H, H), W3 (H, 1) -> g (N, D)."""
    m1, m2 = masks
    V2 = m2 * W3.T                                      # (N, H)
    V1 = m1 * (V2 @ W2.T)                               # (N, H)
    return V1 @ W1.T, (m1, m2, V1, V2, W1, W2)


def input_gradient_backward(dout, cache):
    """dW1 = dg^T V1, R1 = m1 (dg W1), dW2 = R1^T V2, R2 = m2 (R1 W2), dW3 = R2^T V3: dg goes
    through the layers of D; at each, its product with the V of this layer is dW."""
    m1, m2, V1, V2, W1, W2 = cache
    R1 = m1 * (dout @ W1)                               # (N, H)
    R2 = m2 * (R1 @ W2)                                 # (N, H)
    return dout.T @ V1, R1.T @ V2, R2.sum(axis=0)[:, None]


def gradient_penalty_forward(g, target):
    """mean_n (|g_n| - target)^2.   g (N, D), target a number -> scalar."""
    length = np.sqrt((g * g).sum(axis=1, keepdims=True) + 1e-12)    # (N, 1), never 0
    return ((length - target) ** 2).mean(), (g, length, target)


def gradient_penalty_backward(dout, cache):
    """dg = 2 (|g| - target) g / |g| / N."""
    g, length, target = cache
    return (length - target) / length * g * (2 * dout / len(g))


def spectral_norm_forward(W, vectors):
    """W / sigma, sigma = v^T W u.   W (n, m), u (m,) and v (n,) constants: see singular_vectors."""
    u, v = vectors
    sigma = v @ W @ u
    return W / sigma, (W / sigma, sigma, u, v)


def spectral_norm_backward(dout, cache):
    """dW = (dout - sum(dout W / sigma) v u^T) / sigma, since the derivative of sigma by W is v u^T.
    """
    normed, sigma, u, v = cache
    return (dout - (dout * normed).sum() * v[:, None] * u) / sigma


def singular_vectors(W, rounds=10):
    """Power iteration -> u, v for which v^T W u is close to the largest singular value of W."""
    u = W[0]
    for _ in range(rounds):
        v = W @ u
        v = v / np.sqrt((v * v).sum())
        u = W.T @ v
        u = u / np.sqrt((u * u).sum())
    return u, v


# ---- any loss with any constraint: python gan.py game --loss hinge --constraint spectral ---------

@dataclass
class Game(Config):
    """The ring with other losses and constraints on the slope of the discriminator."""
    loss: Literal["non-saturating", "minimax", "hinge", "wasserstein"] = "wasserstein"  # the losses
    constraint: Literal["none", "clipping", "spectral", "penalty", "r1"] = "penalty"  # on D
    strength: float = 0.1   # weight of the penalty; with clipping the largest weight


SLOPES = {"none": None, "clipping": None, "spectral": None, "penalty": 1.0, "r1": 0.0}  # targets


def game_batch(cfg, step, dtype=np.float32, rivals=None):
    """make_batch, and before rivals mix (N, 1) from 0 to 1: mix real + (1 - mix) generated points
    are those at which the gradient penalty is measured."""
    real, noise, rivals = make_batch(cfg, step, dtype, rivals)
    mix = np.random.default_rng((cfg.seed, step, 1)).random((cfg.batch_size, 1)).astype(dtype)
    return real, noise, mix, rivals


def normalize_weights(params, rivals):
    """Each W of D divided by its largest singular value. The singular vectors are constants, those
    of the rivals, which in training are params.   -> all parameters, caches by name."""
    params, caches = dict(params), {}
    for name in ("d_W1", "d_W2", "d_W3"):
        vectors = singular_vectors(rivals[name])
        params[name], caches[name] = spectral_norm_forward(params[name], vectors)
    return params, caches


def penalty_and_grads(params, x, target):
    """Gradient penalty at the points x -> penalty, gradients of the weights of D by name."""
    _, (_, before1, _, before2, _) = discriminator_forward(params, x)
    masks = [leaky_relu_backward(np.ones_like(a), a) for a in (before1, before2)]
    g, cache = input_gradient_forward(masks, params["d_W1"], params["d_W2"], params["d_W3"])
    penalty, penalty_cache = gradient_penalty_forward(g, target)
    dW = input_gradient_backward(gradient_penalty_backward(1.0, penalty_cache), cache)
    return penalty, dict(zip(("d_W1", "d_W2", "d_W3"), dW))


def game_loss_and_grads(params, batch, cfg):
    """loss_and_grads with the losses and the constraint of the configuration."""
    real, noise, mix, rivals = batch
    (d_forward, d_backward), (g_forward, g_backward) = GAMES[cfg.loss]
    target, caches = SLOPES[cfg.constraint], {}
    if cfg.constraint == "spectral":
        params, caches = normalize_weights(params, rivals)
        rivals, _ = normalize_weights(rivals, rivals)
    fake, _ = generator_forward(rivals, noise)
    logits, discriminator = discriminator_forward(params, np.concatenate([real, fake]))
    targets = np.concatenate([np.ones_like(real[:, :1]), np.zeros_like(fake[:, :1])])
    d_loss, loss_cache = d_forward(logits, targets)
    _, grads = discriminator_backward(d_backward(2.0, loss_cache), discriminator)
    loss = 2 * d_loss
    if target is not None:
        x = mix * real + (1 - mix) * fake if target else real       # R1: only at real points
        penalty, more = penalty_and_grads(params, x, target)
        loss = loss + cfg.strength * penalty
        grads.update({name: grads[name] + cfg.strength * g for name, g in more.items()})
    for name, cache in caches.items():
        grads[name] = spectral_norm_backward(grads[name], cache)

    fake, generator = generator_forward(params, noise)
    logits_real, _ = discriminator_forward(rivals, real)
    logits, discriminator = discriminator_forward(rivals, fake)
    g_loss, loss_cache = g_forward(np.concatenate([logits_real, logits]), 1 - targets)
    dlogits = g_backward(2.0, loss_cache)[len(real):]
    dfake, _ = discriminator_backward(dlogits, discriminator)
    return loss + 2 * g_loss, {**grads, **generator_backward(dfake, generator)}


def play(cfg, title, note, init=init_params, batch=game_batch):
    """Train with the losses and the constraint of the configuration; with clipping, every parameter
    of D is moved into [-strength, strength] after a step.   -> params, 4000 points of G, losses."""
    params = init(cfg, np.random.default_rng(cfg.seed))
    (d_forward, _), (g_forward, _) = GAMES[cfg.loss]
    logits, targets = np.zeros(2), np.array([1, 0])     # of a real and of a generated point
    guess = 2 * (d_forward(logits, targets)[0] + g_forward(logits, 1 - targets)[0])
    slope = SLOPES[cfg.constraint] or 0                 # g is 0: the penalty is slope^2
    print(f"\n{title}: loss {cfg.loss}, constraint {cfg.constraint}, "
          f"{sum(p.size for p in params.values())} parameters\nchance level: loss "
          f"{guess + cfg.strength * slope ** 2:.3f}, D outputs 0 (the sum of both losses)")

    def update(params, grads, *state):
        adam_update(params, grads, *state)
        for name in grads:
            if cfg.constraint == "clipping" and name[0] == "d":
                params[name] = np.clip(params[name], -cfg.strength, cfg.strength)
    losses = train(params, cfg, batch, game_loss_and_grads, update, lambda: note(params))
    points = generated(params, cfg, 4000)
    check_finite(np.abs(points).max(), params)
    return params, points, losses


def draw_critic(critic, edge=2.6, cols=40, rows=20):
    """Draw the output of D in the plane.   -> mean length of dD/dx."""
    x1, x2 = np.meshgrid(np.linspace(-edge, edge, cols), np.linspace(edge, -edge, rows))
    logits, cache = discriminator_forward(critic, np.stack([x1.ravel(), x2.ravel()], axis=1))
    slopes, _ = discriminator_backward(np.ones_like(logits), cache)
    slope = float(np.hypot(*slopes.T).mean())
    check_finite(slope + np.ptp(logits), critic)
    print("Output of D in the same square, blank where lowest, @ where highest; mean length of "
          f"dD/dx {slope:.3f}:")
    height = (logits - logits.min()) / (np.ptp(logits) + 1e-12)
    print("\n".join("".join(line) for line in shade(height.reshape(rows, cols))))
    return slope


def run_game(cfg):
    """Play the game of the configuration on the ring; draw what G and D have learned."""
    start = time.perf_counter()
    real = draw_ring(np.random.default_rng((cfg.seed, 10 ** 6 + 2)), 1000)
    print("modes: tenths of the points on each of the eight; 9 is 0.85 or more, a dot below 1/80\n"
          "dist: distance to real points; gap: mean output of D on real points minus on generated")

    def critic(params):
        return normalize_weights(params, params)[0] if cfg.constraint == "spectral" else params

    def note(params):
        points = generated(params, cfg, 1000)
        on_real, on_made = (discriminator_forward(critic(params), x)[0] for x in (real, points))
        return (f"  modes {mode_digits(points)}  dist {sliced_wasserstein(points, real):.2f}  "
                f"gap {on_real.mean() - on_made.mean():.2f}")
    params, points, losses = play(cfg, "Eight Gaussians", note)
    metrics = show_ring(points, cfg)
    slope = draw_critic(critic(params))
    print("Next: python gan.py shapes      python gan.py game --constraint clipping --strength 0.3")
    print_result("game", cfg, **metrics, slope=slope, steps=len(losses),
                 params=sum(p.size for p in params.values()), seconds=time.perf_counter() - start)


# ---- images of shapes: python gan.py shapes ------------------------------------------------------

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


def quality(images):
    """images (N, 64) -> share with at most 2 wrong pixels, share with none, number of templates
    hit: of every 400 images at least one is nearest to it, with at most 6 wrong pixels."""
    index, wrong = nearest_template(images)
    hits = np.bincount(index[wrong <= 6], minlength=40) / len(images)
    return float((wrong <= 2).mean()), float((wrong == 0).mean()), int((hits >= 1 / 400).sum())


@dataclass
class Shapes(Game):
    """Images of ten shapes."""
    noise_dim: int = 16     # numbers of noise per generated image
    hidden: int = 128       # width of the hidden layers, two in each network
    batch_size: int = 64    # real images, and as many generated ones, per step
    steps: int = 5000       # steps of the discriminator
    lr: float = 0.001       # learning rate, which falls to 0 over the second half of the steps
    strength: float = 1.0   # weight of the penalty; with clipping the largest weight


def init_shapes(cfg, rng, dtype=np.float32):
    """init_params for images of 64 pixels."""
    return init_params(cfg, rng, dtype, 64)


def shapes_batch(cfg, step, dtype=np.float32, rivals=None):
    """Random templates, from -1 to 1, with noise of standard deviation 0.1.   -> as game_batch."""
    rng = np.random.default_rng((cfg.seed, step))
    real = 2 * TEMPLATES[rng.integers(0, 40, cfg.batch_size)] - 1
    real = (real + 0.1 * rng.standard_normal(real.shape)).astype(dtype)
    noise = rng.standard_normal((cfg.batch_size, cfg.noise_dim)).astype(dtype)
    mix = rng.random((cfg.batch_size, 1)).astype(dtype)
    return real, noise, mix, rivals or init_shapes(cfg, np.random.default_rng(cfg.seed), dtype)


def draw_row(images, gap="  "):
    """Images (n, 64) from 0 to 1, side by side, one character per pixel: . is 0, @ is 1."""
    light = shade(0.11 + 0.89 * np.clip(images, 0, 1)).reshape(-1, 8, 8)    # 0.11 is not blank
    for line in light.swapaxes(0, 1):                   # (n, 8)
        print(gap.join("".join(pixels) for pixels in line))


def run_shapes(cfg):
    """Images of shapes by the plain game, then by that of the configuration: quality, coverage."""
    start, metrics, bars = time.perf_counter(), {}, {}
    plain = replace(cfg, loss="non-saturating", constraint="none")
    for name, game in {"plain": plain, "game": cfg}.items():
        def note(params, game=game):
            good, _, templates = quality(generated(params, game, 1000) > 0)
            return f"  good {good:.0%}, {templates} templates"
        params, images, losses = play(game, "Ten shapes at four positions, 8 x 8 pixels", note,
                                      init_shapes, shapes_batch)
        good, exact, templates = quality(images > 0)
        index, wrong = nearest_template(images > 0)
        shares = np.bincount(index[wrong <= 6], minlength=40) / len(images)
        bars[name] = shares
        shapes = int((shares.reshape(10, 4).max(axis=1) >= 1 / 400).sum())
        print(f"{good:.0%} of 4000 images have at most 2 wrong pixels, {exact:.0%} none. In all\n"
              f"{templates} of 40 templates, {shapes} of 10 shapes occur. The first ten, @ is ink:")
        draw_row(images[:10] / 2 + 0.5)
        metrics.update({f"{name}_good": good, f"{name}_exact": exact,
                        f"{name}_templates": templates, f"{name}_shapes": shapes})
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nShare of each template, four positions for each shape; blank is none, = or + is 1/40 "
          "as in\nthe data:\n" + " " * 7 + " ".join(shape[:4].ljust(4) for shape in SHAPES))
    for name, shares in bars.items():
        print(f"{name:7s}" + " ".join("".join(four) for four in shade(20 * shares).reshape(10, 4)))
    print("Next: python gan.py shapes --constraint r1 --loss hinge      python diffusion.py")
    print_result("shapes", cfg, **metrics, params=sum(p.size for p in params.values()),
                 steps=len(losses), seconds=time.perf_counter() - start)


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


def game_constraints(cfg):
    """What must hold between the values of every task."""
    return [(cfg.beta1 < 1, "--beta1", "a number below 1", cfg.beta1),
            (cfg.beta2 < 1, "--beta2", "a number below 1", cfg.beta2)]


CONSTRAINTS = dict.fromkeys((Config, Game, Shapes), game_constraints)

GRADCHECK = {
    **dict.fromkeys(("hinge", "wasserstein", "minimax"), "logits 3 5, targets<2 3 5"),
    "gradient_penalty": "g 5 3, target=0.7",
    "input_gradient": "masks<2 2 3 6, W1 5 6, W2 6 6, W3 6 1",
    "spectral_norm": lambda rng: dict(W=rng.standard_normal((3, 5)), vectors=(
        rng.standard_normal(5), rng.standard_normal(3)))}

TASKS = {"ring": Task(Config, init_params, make_batch, loss_and_grads, main),
         "game": Task(Game, init_params, game_batch, game_loss_and_grads, run_game),
         "shapes": Task(Shapes, init_shapes, shapes_batch, game_loss_and_grads, run_shapes)}

if __name__ == "__main__":
    run(TASKS)
