"""vae.py: an autoencoder whose codes can be drawn at random.

An autoencoder maps every image to a code, a point z, and the code back to the image. Between the
codes its decoder is not trained, so a random z decodes to nonsense. A variational autoencoder (VAE)
maps an image to a distribution of codes, N(mu, sigma^2), and a penalty, the KL divergence, keeps
these near N(0, I). Together they fill N(0, I), so a draw from it decodes to a new image. On average
over the data no model has a lower loss (in nats) than -log p(x) of the process that makes the data.

Forward, for images x (N, P) of 0 and 1; e is a draw from N(0, I), which the batch contains
    mu, log_var = encoder(x)      z = mu + sigma e, sigma = exp(log_var / 2)      a = decoder(z)
    distortion   -log p(x|z) = sum over pixels of (log(1 + exp(a)) - x a)    the cost of x given z
    rate         KL = sum_d (mu^2 + sigma^2 - 1 - log_var) / 2   the cost of z
    loss         mean_n (distortion + beta rate);   beta = 1: minus the ELBO, the evidence lower
                 bound: log p(x) = log mean_q(p(x|z) p(z) / q(z)) >= mean_q(log p(x|z)) - KL
Backward
    da = (sigmoid(a) - x) / N     then the decoder, as in mlp.py, down to dz
    dmu      = dz + beta mu / N
    dlog_var = dz e sigma / 2 + beta (sigma^2 - 1) / (2 N):   a draw of z has a gradient, because
               e does not depend on the parameters (the reparameterization trick)

Run    python vae.py      (40 small images; python vae.py --help lists the other tasks)

Papers: Kingma and Welling 2014, Rezende et al. 2014 (VAE), Higgins et al. 2017 (beta).
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
from statistics import NormalDist

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np


@dataclass
class Config:
    """Learn to generate noisy images of ten shapes from two random numbers."""
    latent: int = 2         # numbers in a code z
    hidden: int = 128       # width of the hidden layers
    beta: float = 1.0       # weight of the KL divergence
    batch_size: int = 64    # images per step
    steps: int = 5000       # optimizer steps
    lr: float = 0.005       # peak learning rate
    warmup: int = 100       # steps of linear warmup
    seed: int = 0           # random seed


# ---- layers: N images of P pixels, D latent numbers; in linear D inputs and M outputs ------------

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


def reparameterize_forward(mu, log_var, e):
    """z = mu + sigma e, sigma = exp(log_var / 2): if e is a draw from N(0, I), z is one from N(mu,
    sigma^2).   (N, D) each."""
    sigma = np.exp(0.5 * log_var)
    return mu + sigma * e, (sigma, e)


def reparameterize_backward(dout, cache):
    """dmu = dz, dlog_var = dz e sigma / 2, de = dz sigma."""
    sigma, e = cache
    return dout, 0.5 * dout * e * sigma, dout * sigma


def gaussian_kl_forward(mu, log_var):
    """KL divergence of N(mu, sigma^2) from N(0, I) in nats, summed over D, mean over N: mean_n
    sum_d (mu^2 + sigma^2 - 1 - log_var) / 2.   (N, D) each -> scalar."""
    var = np.exp(log_var)
    kl = 0.5 * (mu * mu + var - 1 - log_var)            # (N, D)
    return kl.sum(axis=1).mean(), (mu, var)


def gaussian_kl_backward(dout, cache):
    """dmu = mu / N, dlog_var = (sigma^2 - 1) / (2 N), times dout, which is beta in the loss."""
    mu, var = cache
    dout = dout / len(mu)
    return dout * mu, 0.5 * dout * (var - 1)


def bernoulli_forward(logits, targets):
    """-log p(targets) in nats if a pixel is 1 with probability sigmoid(a), a = logits, t = targets;
    summed over pixels: mean_n sum_p (log(1 + exp(a)) - t a).   (N, P) each -> scalar."""
    softplus = np.maximum(logits, 0) + np.log(1 + np.exp(-abs(logits)))     # log(1 + exp(a))
    return (softplus - targets * logits).sum(axis=1).mean(), (logits, targets)


def bernoulli_backward(dout, cache):
    """dlogits = (sigmoid(logits) - targets) / N."""
    logits, targets = cache
    return (sigmoid(logits) - targets) * (dout / len(logits))


# ---- data: 40 templates, pixels flipped at random; everything about them can be counted ----------

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


FLIP = 0.05                                             # probability that a pixel is flipped


def noisy_templates(rng, n):
    """n random templates, every pixel flipped with probability FLIP.   -> (n, 64) of 0 and 1."""
    x = TEMPLATES[rng.integers(0, 40, n)]
    return abs(x - (rng.random(x.shape) < FLIP))        # 1 - x where a pixel is flipped


def log_mean_exp(values):
    """log mean exp over the last axis, the mean of probabilities given as logarithms."""
    largest = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values - largest).mean(axis=-1)) + largest[..., 0]


def log_likelihood(x):
    """The exact log p(x) of noisy_templates, in nats: p(x) = mean_m FLIP^h (1 - FLIP)^(64 - h), h =
    the number of pixels in which x differs from template m.   x (N, 64) -> (N,)."""
    h = (x[:, None] != TEMPLATES).sum(axis=2)           # (N, 40)
    return log_mean_exp(h * math.log(FLIP) + (64 - h) * math.log(1 - FLIP))


def make_batch(cfg, step, dtype=np.float32):
    """New images at every step.   -> x (N, 64), e (N, D) from N(0, I)."""
    rng = np.random.default_rng((cfg.seed, step))
    x = noisy_templates(rng, cfg.batch_size)
    e = rng.standard_normal((cfg.batch_size, cfg.latent))
    return x.astype(dtype), e.astype(dtype)


# ---- model: encoder and decoder ------------------------------------------------------------------

def init_params(cfg, rng, dtype=np.float32, pixels=64):
    """enc.W1, enc.b1, ..., dec.b3; W (D, M) with standard deviation sqrt(2 / (D + M)) (Glorot and
    Bengio 2010). The encoder's outputs are mu and log_var, which may be any numbers."""
    params, H = {}, cfg.hidden
    sizes_of = {"enc": (pixels, H, H, 2 * cfg.latent), "dec": (cfg.latent, H, H, pixels)}
    for side, sizes in sizes_of.items():
        for i, (D, M) in enumerate(zip(sizes, sizes[1:]), 1):
            params[f"{side}.W{i}"] = rng.standard_normal((D, M)) * (2 / (D + M)) ** 0.5
            params[f"{side}.b{i}"] = np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def coder_forward(x, params, side):
    """linear, tanh, linear, tanh, linear, of the encoder ("enc") or the decoder ("dec")."""
    x, linear1 = linear_forward(x, params[f"{side}.W1"], params[f"{side}.b1"])
    x, tanh1 = tanh_forward(x)
    x, linear2 = linear_forward(x, params[f"{side}.W2"], params[f"{side}.b2"])
    x, tanh2 = tanh_forward(x)
    x, linear3 = linear_forward(x, params[f"{side}.W3"], params[f"{side}.b3"])
    return x, (side, linear1, tanh1, linear2, tanh2, linear3)


def coder_backward(dout, cache):
    """coder_forward in reverse order -> dx, gradients under the keys of params."""
    side, linear1, tanh1, linear2, tanh2, linear3 = cache
    dx, dW3, db3 = linear_backward(dout, linear3)
    dx = tanh_backward(dx, tanh2)
    dx, dW2, db2 = linear_backward(dx, linear2)
    dx = tanh_backward(dx, tanh1)
    dx, dW1, db1 = linear_backward(dx, linear1)
    grads = dict(W1=dW1, b1=db1, W2=dW2, b2=db2, W3=dW3, b3=db3)
    return dx, {f"{side}.{name}": g for name, g in grads.items()}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, e = batch
    code, encoder = coder_forward(x, params, "enc")
    mu, log_var = np.split(code, 2, axis=1)
    z, draw = reparameterize_forward(mu, log_var, e)
    logits, decoder = coder_forward(z, params, "dec")
    distortion, bernoulli = bernoulli_forward(logits, x)
    rate, kl = gaussian_kl_forward(mu, log_var)
    dz, grads = coder_backward(bernoulli_backward(1.0, bernoulli), decoder)
    dmu, dlog_var, _ = reparameterize_backward(dz, draw)
    dmu_kl, dlog_var_kl = gaussian_kl_backward(cfg.beta, kl)
    dcode = np.concatenate([dmu + dmu_kl, dlog_var + dlog_var_kl], axis=1)
    _, encoder_grads = coder_backward(dcode, encoder)
    return distortion + cfg.beta * rate, {**grads, **encoder_grads}


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads, note=lambda: ""):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        adam_update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def encode_images(params, x):
    """x (N, P) -> mu, log_var (N, D)."""
    return np.split(coder_forward(x, params, "enc")[0], 2, axis=1)


def decode_images(params, z):
    """z (N, D) -> the probability that a pixel is 1 (N, P)."""
    return sigmoid(coder_forward(z.astype(np.float32), params, "dec")[0])


def rate_and_distortion(params, x, rng):
    """KL divergence and -log p(x|z) in nats, mean over x (N, P); their sum estimates -ELBO."""
    mu, log_var = encode_images(params, x)
    e = rng.standard_normal(mu.shape).astype(mu.dtype)
    z, _ = reparameterize_forward(mu, log_var, e)
    logits, _ = coder_forward(z, params, "dec")
    return float(gaussian_kl_forward(mu, log_var)[0]), float(bernoulli_forward(logits, x)[0])


def quality(images):
    """images (N, 64) -> share with at most 2 wrong pixels, share with none, number of templates
    hit: of every 400 images at least one is nearest to it, with at most 6 wrong pixels."""
    index, wrong = nearest_template(images)
    hits = np.bincount(index[wrong <= 6], minlength=40) / len(images)
    return float((wrong <= 2).mean()), float((wrong == 0).mean()), int((hits >= 1 / 400).sum())


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def draw_row(images, gap="  "):
    """Images (n, 64) from 0 to 1, side by side, one character per pixel: . is 0, @ is 1."""
    light = shade(0.11 + 0.89 * np.clip(images, 0, 1)).reshape(-1, 8, 8)    # 0.11 is not blank
    for line in light.swapaxes(0, 1):                   # (n, 8)
        print(gap.join("".join(pixels) for pixels in line))


def draw_latent_map(params, D, cols=80, rows=20):
    """The shape that z decodes to; columns and rows are quantiles of z1 and z2, other z are 0."""
    across = [NormalDist().inv_cdf((i + 0.5) / cols) for i in range(cols)]
    up = [NormalDist().inv_cdf((i + 0.5) / rows) for i in range(rows)]
    z1, z2 = np.meshgrid(across, up[::-1])              # (rows, cols) each; the top row is first
    z = np.zeros((rows * cols, D))
    z[:, :2] = np.stack([z1.ravel(), z2.ravel()][:D], axis=1)       # D may be 1
    index, wrong = nearest_template(decode_images(params, z))
    marks = np.array(list("orSFtd+x=I"))                # in the order of SHAPES
    picture = np.where(wrong <= 4, marks[index // 4], ".").reshape(rows, cols)
    print("\n".join("".join(line) for line in picture))


def print_result(task, cfg, **metrics):
    """The last line of a run, for comparing runs: task, changed fields and seed, metrics."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name == "seed" or getattr(cfg, f.name) != f.default}
    line = f"result: task={task}"
    for name, value in {**changed, **metrics}.items():
        text = f"{value:#.4g}" if isinstance(value, float) else str(value)
        line += f" {name}={text.replace(' ', '_')}"
    print(line)


def new_images(n=4000):
    """-> held-out images (n, 64), the same in every run; the chance level, which is their loss if
    pixels were independent; their exact log-likelihood."""
    x = noisy_templates(np.random.default_rng(10 ** 6), n)
    p = FLIP + (1 - 2 * FLIP) * TEMPLATES.mean(axis=0)  # how often a pixel is 1
    chance = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum(axis=1).mean()
    return x.astype(np.float32), float(chance), float(log_likelihood(x).mean())


def main(cfg):
    """Learn the images; show the bound beside the truth, samples, the map of the codes."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    params = init_params(cfg, rng)
    size = sum(p.size for p in params.values())
    x, chance, exact = new_images()
    print(f"40 templates of 8 x 8 pixels, {FLIP:.0%} of the pixels flipped; {cfg.latent} latent "
          f"numbers, hidden\nlayers of {cfg.hidden}, {size} parameters")
    print(f"chance level: loss {chance:.2f}, independent pixels; no model's -ELBO is below "
          f"{-exact:.2f} on average")
    losses = train(params, cfg)
    rate, distortion = rate_and_distortion(params, x, rng)
    elbo = -rate - distortion
    check_finite(elbo, params)
    print(f"{len(x)} new images, nats per image, summed over pixels and latent numbers:\n"
          f"  ELBO {elbo:.2f} = -(rate {rate:.2f} + distortion {distortion:.2f});  log p(x) of "
          f"the data {exact:.2f}")
    samples = decode_images(params, rng.standard_normal((4000, cfg.latent)))
    ok, perfect, hit = quality(samples)
    print(f"{len(samples)} draws of z from N(0, I), decoded: {ok:.0%} have at most 2 wrong pixels, "
          f"{perfect:.0%} none;\n{hit} of 40 templates occur. Ten samples, dark (.) to bright (@):")
    draw_row(samples[:10])
    print("What the codes decode to. Columns and rows: quantiles of z1 and z2, equally probable; "
          "any other z\nis 0. o disc, r ring, S square, F frame, t triangle, d diamond, + plus, "
          "x cross, = lines, I bars;\n. where more than 4 pixels differ from every template")
    draw_latent_map(params, cfg.latent)
    print("Next: python vae.py --beta 10      python vae.py compare      python vae.py sweep")
    print_result("shapes", cfg, elbo=elbo, exact=exact, rate=rate, ok=ok, perfect=perfect,
                 templates=hit, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)

# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: an autoencoder, tighter bounds, six weights of the KL; digits; flags. ==

MORE = """
Tasks
    python vae.py compare               an autoencoder, a VAE, a VAE trained with a tighter bound:
                                        1 to 2, 65 to 67 and 78 to 80 % of the samples have at most
                                        2 wrong pixels (seeds 0 to 4)
    python vae.py sweep                 beta from 0.1 to 10: rate, distortion, posterior collapse
    python vae.py mnist --data mnist --png digits.png   net and measure of Burda et al. 2016

Break it (python vae.py, seed 0; as it is: ELBO -17.94, 76 % of the samples with at most 2 wrong
pixels; seeds 0 to 4: -17.94 to -17.78, 75 to 80 %)
    python vae.py --beta 10                         ELBO -32.66, as with independent pixels, 0 %: z
                                                    does not depend on the image (collapse)
    bernoulli_forward: nats.mean(),                 the same collapse: a mean over 64 pixels instead
        _backward: dout / logits.size               of their sum is beta = 64; ELBO -0.51 is per
                                                    pixel
    reparameterize_forward: return mu, (sigma, e)   ELBO -12.85, above log p(x) = -16.32: without
                                                    the draw it bounds nothing; 70 %
    reparameterize_backward: 0 * dout for log_var   ELBO -28.51, 4 %: sigma is trained by the KL
                                                    divergence alone, so the clouds overlap

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python vae.py --latent 1 (then 3, 8): ELBO, rate, samples. Why is the rate of a good model
       above log 40 = 3.69 nats?
    2. Derive and add a Gaussian likelihood: sum_p ((y - t)^2 / (2 s^2) + log s + log(2 pi) / 2),
       t = targets, mean over N (gaussian_nll_forward(y, targets, s), _backward without ds). Which s
       acts as which beta?
    3. Let beta rise from 0 to 1 in the first 1000 steps. How many latent numbers of python vae.py
       compare are active then?

Data
    mnist: python mlp.py --help says where to get it

Papers of these parts: Burda et al. 2016 (importance-weighted bound), Bowman et al. 2016 and Lucas
et al. 2019 (collapse), Alemi et al. 2018 (rate and distortion), Rainforth et al. 2018 (with many
draws the bound gets tighter, but the encoder's gradient is lost in noise; not shown here).
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
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- a tighter bound -----------------------------------------------------------------------------
# p(x) is the mean of w = p(x|z) p(z) / q(z|x) over draws z from the encoder's q(z|x). The log of a
# mean of K weights is on average at most log p(x), as the log is concave: a bound, L_K, that rises
# with K; L_1 is the ELBO (Burda et al. 2016).

def log_weight_forward(logits, z, log_var, e, targets):
    """log w = log p(t|z) + log p(z) - log q(z|t) = sum_p (t a - log(1 + exp(a))) + sum_d (log_var +
    e^2 - z^2) / 2, as the 2 pi cancel; a = logits (N, K, P), t = targets (N, P), z, e (N, K, D),
    log_var (N, D) -> (N, K)."""
    targets = targets[:, None]
    nats = np.maximum(logits, 0) + np.log(1 + np.exp(-abs(logits))) - targets * logits
    log_ratio = 0.5 * (log_var[:, None] + e * e - z * z)            # (N, K, D)
    return log_ratio.sum(axis=2) - nats.sum(axis=2), (logits, z, e, targets)


def log_weight_backward(dout, cache):
    """dlogits = dout (targets - sigmoid(logits)), dz = -dout z, dlog_var = sum_k dout / 2,
    de = dout e."""
    logits, z, e, targets = cache
    dout = dout[:, :, None]                                         # (N, K, 1)
    dlog_var = 0.5 * dout.sum(axis=1)                               # (N, 1), the same for every d
    dlog_var = np.broadcast_to(dlog_var, (len(z), z.shape[2]))
    return dout * (targets - sigmoid(logits)), -dout * z, dlog_var, dout * e


def importance_weights(params, x, e):
    """Encoder, K draws per image, decoder.   x (N, P), e (N, K, D) -> log w (N, K), cache."""
    code, encoder = coder_forward(x, params, "enc")
    mu, log_var = np.split(code, 2, axis=1)
    z, draw = reparameterize_forward(mu[:, None], log_var[:, None], e)          # (N, K, D)
    logits, decoder = coder_forward(z.reshape(-1, z.shape[2]), params, "dec")
    logits = logits.reshape(*z.shape[:2], -1)                       # (N, K, P)
    log_w, weight = log_weight_forward(logits, z, log_var, e, x)
    return log_w, (encoder, draw, decoder, weight)


def importance_loss_and_grads(params, batch, cfg):
    """loss = -mean_n log mean_k w; its derivative by log w_k is -(w_k / sum w) / N. All K draws use
    the same mu and log_var, so their gradients add. cfg.beta plays no part."""
    x, e = batch
    log_w, (encoder, draw, decoder, weight) = importance_weights(params, x, e)
    w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
    w /= w.sum(axis=1, keepdims=True)                               # (N, K)
    dlogits, dz_weight, dlog_var, _ = log_weight_backward(-w / len(x), weight)
    dz, grads = coder_backward(dlogits.reshape(w.size, -1), decoder)
    dmu, dlog_var_draw, _ = reparameterize_backward(dz.reshape(e.shape) + dz_weight, draw)
    dcode = np.concatenate([dmu.sum(axis=1), dlog_var + dlog_var_draw.sum(axis=1)], axis=1)
    _, encoder_grads = coder_backward(dcode, encoder)
    return -log_mean_exp(log_w).mean(), {**grads, **encoder_grads}


def importance_batch(cfg, step, dtype=np.float32):
    """New images.   -> x (N, 64), e (N, K, D)."""
    rng = np.random.default_rng((cfg.seed, step))
    x = noisy_templates(rng, cfg.batch_size)
    e = rng.standard_normal((cfg.batch_size, cfg.draws, cfg.latent))
    return x.astype(dtype), e.astype(dtype)


def log_weights(params, x, draws, rng):
    """log w of x (N, P), for one image and 500 draws at a time, which needs less memory.
    -> (N, draws)."""
    D, rows = len(params["dec.W1"]), []
    for image in x[:, None]:                            # (1, P)
        e = rng.standard_normal((draws // 500, 1, 500, D), np.float32)
        rows.append(np.concatenate([importance_weights(params, image, some)[0][0] for some in e]))
    return np.stack(rows)


def measure(params, cfg, x, draws, **known):
    """Print rate, distortion and bounds on the model's log p(x), beside known values: those of the
    process that makes the data are on average above them.   -> metrics."""
    rng = np.random.default_rng(cfg.seed)
    rate, distortion = rate_and_distortion(params, x, rng)
    check_finite(rate + distortion, params)
    mu, log_var = encode_images(params, x)
    rates = 0.5 * (mu * mu + np.exp(log_var) - 1 - log_var).mean(axis=0)                    # (D,)
    active = int((mu.var(axis=0) > 0.01).sum())         # as Burda et al. 2016 count them
    largest = " ".join(f"{value:.2f}" for value in np.sort(rates)[::-1][:12])
    print(f"{len(x)} new images: rate {rate:.2f}, distortion {distortion:.2f} nats\n"
          f"{active} active latent numbers; the largest rates: {largest}")
    log_w = log_weights(params, x, draws, rng)
    bounds = {f"L_{K}": float(log_mean_exp(log_w.reshape(len(x), -1, K)).mean())
              for K in (1, 10, 100, 1000, 5000) if K <= draws}
    print("Bounds on log p(x); a # is 0.1 above L_1:")
    for name, value in {**bounds, **known}.items():
        print(f"  {name:6s} {value:8.2f}  " + "#" * min(80, round(10 * (value - bounds["L_1"]))))
    return dict(elbo=-rate - distortion, rate=rate, active=active, **bounds)


# ---- models measured alike: python vae.py compare, python vae.py sweep ---------------------------
# An autoencoder is a VAE with e = 0 and beta = 0: there is no draw, and nothing keeps the codes
# near N(0, I); its sigma is not trained, so its bounds hold, but tell nothing. beta is the price of
# a nat of rate; if beta is too high, z does not depend on the image (posterior collapse).

@dataclass
class Compare(Config):
    """An autoencoder, a VAE, and a VAE that is trained with a tighter bound."""
    latent: int = 8         # numbers in a code z
    draws: int = 5          # draws of z per image for the tighter bound
    steps: int = 6000       # optimizer steps of each training
    lr: float = 0.006       # peak learning rate


@dataclass
class Sweep(Config):
    """VAEs with six weights of the KL divergence."""
    latent: int = 8         # numbers in a code z
    beta: float = 1.0       # weight of the KL divergence, times 0.1, 0.5, 1, 2, 4 and 10
    steps: int = 2000       # optimizer steps of each training
    lr: float = 0.01        # peak learning rate


def autoencoder_batch(cfg, step):
    """make_batch without the draw."""
    x, e = make_batch(cfg, step)
    return x, 0 * e


def samples_and_ways(params, cfg, x):
    """Decode draws from N(0, I), and from a Gaussian fitted to the codes of x (N, P); show ten, and
    ten images on the way between two codes.   -> metrics."""
    rng = np.random.default_rng(cfg.seed)
    mu, _ = encode_images(params, x)
    images = decode_images(params, rng.standard_normal((4000, cfg.latent)))
    ok, _, hit = quality(images)
    codes = rng.multivariate_normal(mu.mean(axis=0), np.atleast_2d(np.cov(mu.T)), len(images))
    fitted_ok, _, _ = quality(decode_images(params, codes))
    log_p, _ = bernoulli_forward(coder_forward(mu, params, "dec")[0], x)
    ends, _ = encode_images(params, TEMPLATES[[0, -1]].astype(np.float32))
    print("Ten samples; then from the code of a disc to that of bars; dark (.) to bright (@)")
    draw_row(images[:10])
    print()
    draw_row(decode_images(params, np.linspace(*ends, 10)))
    return dict(log_p=-float(log_p), ok=ok, fitted_ok=fitted_ok, templates=hit)


def compare(task, cfg, models):
    """Train and measure each of models: name -> configuration, make_batch, loss_and_grads."""
    start, table = time.perf_counter(), {}
    x, chance, exact = new_images(300)
    for name, (own, batch, function) in models.items():
        print(f"\n{name}: {own.latent} latent numbers, beta {own.beta:g}, hidden layers of "
              f"{own.hidden}\nchance level: loss {chance:.2f}, independent pixels")
        params = init_params(own, np.random.default_rng(own.seed))
        losses = train(params, own, batch, function)
        table[name] = measure(params, own, x, 1000, exact=exact) | samples_and_ways(params, own, x)
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nFrom the pixels of the disc to those of the bars")
    draw_row(np.linspace(*TEMPLATES[[0, -1]], 10))
    print("\nColumns: nats per image; log p(x|mu); samples with at most 2 wrong pixels, z from "
          "N(0, I) and\nfrom a Gaussian fitted to the codes; templates in samples of N(0, I)\n"
          f"{'':10s}    ELBO  L_1000    rate  active   x | mu  N(0, I)  fitted  templates")
    for name, row in table.items():
        print(f"{name:10s}{row['elbo']:8.2f}{row['L_1000']:8.2f}{row['rate']:8.2f}"
              f"{row['active']:8d}{row['log_p']:9.2f}{row['ok']:9.1%}{row['fitted_ok']:8.1%}"
              f"{row['templates']:8d}/40")
    print("Rate (=) and distortion (#), a sign per nat, at most 80")
    for name, row in table.items():
        bar = "=" * round(row["rate"]) + "#" * round(-row["elbo"] - row["rate"])
        print(f"{name:10s} {bar[:80]}")
    print("\nNext: python vae.py --latent 8      python vae.py --beta 0.1      python gan.py")
    metrics = {f"{name}_{key}": value for name, row in table.items() for key, value in row.items()}
    print_result(task, cfg, exact=exact, **metrics, params=sum(p.size for p in params.values()),
                 steps=len(losses), seconds=time.perf_counter() - start)


def run_compare(cfg):
    """The autoencoder; the same layers trained with the ELBO, and with the bound of cfg.draws."""
    compare("compare", cfg, {"ae": (replace(cfg, beta=0.0), autoencoder_batch, loss_and_grads),
                             "vae": (cfg, make_batch, loss_and_grads),
                             "iwae": (replace(cfg, beta=1.0), importance_batch,
                                      importance_loss_and_grads)})


def run_sweep(cfg):
    """A VAE for each weight of the KL divergence."""
    models = {}
    for beta in [cfg.beta * factor for factor in (0.1, 0.5, 1, 2, 4, 10)]:
        name = f"beta_{beta:g}".replace(".", "_")
        models[name] = replace(cfg, beta=beta), make_batch, loss_and_grads
    compare("sweep", cfg, models)


# ---- digits: python vae.py mnist --data mnist ----------------------------------------------------
# The net and the measure of Burda et al. 2016. A gray value is the probability that its pixel is 1:
# training images are binarized anew each time, test images once. Other papers binarize the training
# images once, too, which is 1 to 2 nats worse: figures of the two kinds cannot be compared.

@dataclass
class Mnist(Config):
    """Handwritten digits, binarized: ELBO, and an importance-weighted bound."""
    latent: int = 50        # numbers in a code z
    hidden: int = 200       # width of the hidden layers
    batch_size: int = 100   # images per step
    steps: int = 60000      # optimizer steps
    lr: float = 0.002       # peak learning rate
    data: str = ""          # folder with the four files of MNIST
    png: str = ""           # file to write 100 samples to


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
def gray_images(folder, split):
    """The images of a split, with gray values from 0 to 1.   -> (N, 784)."""
    x, _ = load_mnist(folder)[split]
    return np.clip(x * np.float32(0.3081) + np.float32(0.1307), 0, 1)


def binarize(gray, rng):
    """Every pixel is 1 with the probability that its gray value gives.   (N, 784) -> (N, 784)."""
    return (rng.random(gray.shape, np.float32) < gray).astype(np.float32)


def mnist_batch(cfg, step, dtype=np.float32):
    """Random training images, binarized anew.   -> x (N, 784), e (N, D)."""
    rng = np.random.default_rng((cfg.seed, step))
    gray = gray_images(cfg.data, "train")
    x = binarize(gray[rng.integers(0, len(gray), cfg.batch_size)], rng)
    e = rng.standard_normal((cfg.batch_size, cfg.latent))
    return x.astype(dtype), e.astype(dtype)


def init_mnist(cfg, rng, dtype=np.float32):
    """init_params; the last bias is that of independent pixels, log(p / (1 - p)), p = mean of x."""
    params = init_params(cfg, rng, dtype, 784)
    p = np.clip(gray_images(cfg.data, "train").mean(axis=0), 0.001, 0.999)
    params["dec.b3"] = np.log(p / (1 - p)).astype(dtype)
    return params


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


def run_mnist(cfg):
    """Train; ELBO and bounds on test images; draw samples."""
    require(cfg.data, "--data", "the folder of MNIST (python mlp.py --help says where)", cfg.data)
    if cfg.png:
        try_png(cfg.png)
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    params = init_mnist(cfg, rng)
    size = sum(p.size for p in params.values())
    test, held_out = (binarize(gray_images(cfg.data, split), np.random.default_rng(0))
                      for split in ("test", "validation"))
    chance, _ = bernoulli_forward(np.broadcast_to(params["dec.b3"], test.shape), test)
    print(f"MNIST, 28 x 28 pixels, binarized anew for each use; {cfg.latent} latent numbers, "
          f"hidden layers of\n{cfg.hidden}, {size} parameters; nats per image, summed over pixels "
          f"and latent numbers\nchance level: loss {chance:.1f}, independent pixels")

    def note():
        return f"  validation {sum(rate_and_distortion(params, held_out[:1000], rng)):.2f}"
    losses = train(params, cfg, mnist_batch, note=note)
    some = test[::max(1, len(test) // 1000)][:1000]     # 1,000 of all classes
    metrics = measure(params, cfg, some, 5000)
    elbo = -sum(rate_and_distortion(params, test, rng))
    print(f"ELBO of all {len(test)} test images: {elbo:.2f}")
    samples = decode_images(params, rng.standard_normal((100, cfg.latent)))
    if cfg.png:
        write_png(cfg.png, tile_images(samples.reshape(100, 28, 28, 1), 10, 2))
        print(f"{cfg.png}: 100 samples")
    print("Samples; blank is 0, @ is 1")
    halved = samples[:6].reshape(2, 3, 14, 2, 28).mean(axis=3)      # two rows of pixels in one
    for images in halved:                                           # (3, 14, 28)
        for line in shade(images).swapaxes(0, 1):                   # (3, 28)
            print("  ".join("".join(pixels) for pixels in line).rstrip())
    print("\nNext: python vae.py compare      python gan.py")
    print_result("mnist", cfg, all_elbo=elbo, **metrics, params=size, steps=len(losses),
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


CONSTRAINTS = {}

GRADCHECK = {"reparameterize": "mu 5 4, log_var 5 4, e 5 4", "gaussian_kl": "mu 5 4, log_var 5 4",
             "bernoulli": "logits 5 4, targets<2 5 4",
             "log_weight": "logits 5 3 7, z 5 3 4, log_var 5 4, e 5 3 4, targets<2 5 7"}

TASKS = {"shapes": Task(Config, init_params, make_batch, loss_and_grads, main),
         "compare": Task(Compare, init_params, importance_batch, importance_loss_and_grads,
                         run_compare),
         "sweep": Task(Sweep, None, None, None, run_sweep),
         "mnist": Task(Mnist, init_mnist, mnist_batch, loss_and_grads, run_mnist)}

if __name__ == "__main__":
    run(TASKS)
