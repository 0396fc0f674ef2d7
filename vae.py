"""vae.py: an autoencoder whose codes can be drawn at random.

An autoencoder maps every image to a code, a point z, and back. Between the codes lies nothing that
it has been trained on, so a random z decodes to nonsense. A variational autoencoder (VAE) maps an
image to a cloud, N(mu, sigma^2), and a penalty, the KL divergence, keeps the clouds near N(0, I):
together they fill it, and a draw from N(0, I) decodes to a new image. Its loss is not ad hoc: it
bounds -log p(x) from above, in nats. Here the true log p(x) is known, too, and stands beside it.

Forward, for images x (N, P) of 0 and 1; e is a draw from N(0, I), made before
    mu, log_var = encoder(x)      z = mu + sigma e, sigma = exp(log_var / 2)      a = decoder(z)
    distortion   -log p(x|z) = sum_p log(1 + e^a) - x a          the cost of x if z is known
    rate         KL = sum_d (mu^2 + sigma^2 - 1 - log_var) / 2   the cost of z
    loss         mean_n (distortion + beta rate);   beta = 1: minus the ELBO, and ELBO <= log p(x)
Backward
    da = (sigmoid(a) - x) / N     then the decoder, as in mlp.py, down to dz
    dmu      = dz + beta mu / N
    dlog_var = dz e sigma / 2 + beta (sigma^2 - 1) / (2 N):   the gradient passes the draw, since
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


# ---- layers: N images of P pixels, D latent numbers ----------------------------------------------

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
    """dmu = mu / N, dlog_var = (sigma^2 - 1) / (2 N)."""
    mu, var = cache
    dout = dout / len(mu)
    return dout * mu, 0.5 * dout * (var - 1)


def bernoulli_forward(logits, targets):
    """-log p(targets) in nats if pixel p is 1 with probability sigmoid(logits), summed over the
    pixels, mean over the images: mean_n sum_p log(1 + e^a) - t a.   (N, P) each -> scalar."""
    nats = np.maximum(logits, 0) + np.log(1 + np.exp(-abs(logits))) - targets * logits
    return nats.sum(axis=1).mean(), (logits, targets)


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
    return abs(x - (rng.random(x.shape) < FLIP))


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
    """enc.W1, enc.b1, ..., enc.W3, enc.b3; dec.W1, ..., dec.b3. W (D, M) with standard deviation
    sqrt(2 / (D + M)) (Glorot and Bengio 2010)."""
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
    """coder_forward from bottom to top -> dx, gradients under the keys of params."""
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
        raise FloatingPointError(f"training diverged (loss {loss:.4g}); try a smaller --lr")


def progress(steps, losses, note=lambda: ""):
    """for step in progress(steps, losses): ... losses.append(loss).   Prints ten lines, or one per
    minute: the mean loss since the line before, note(), the time left. Ctrl-C ends the loop after
    the step at hand, a second Ctrl-C the program. A loss that is not finite raises an error."""
    stopped = []

    def stop(*signal_and_frame):
        stopped.append(True)
        signal.signal(signal.SIGINT, previous)          # the next Ctrl-C ends the program
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
    """KL divergence and -log p(x|z) in nats, mean over x (N, P); their sum is minus the ELBO."""
    mu, log_var = encode_images(params, x)
    e = rng.standard_normal(mu.shape).astype(mu.dtype)
    z, _ = reparameterize_forward(mu, log_var, e)
    logits, _ = coder_forward(z, params, "dec")
    return float(gaussian_kl_forward(mu, log_var)[0]), float(bernoulli_forward(logits, x)[0])


def quality(images):
    """images (N, 64) -> share with at most 2 wrong pixels, share with none, number of templates
    hit: those that at least every 400th image shows with at most 6 wrong pixels."""
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
    across, down = ([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)] for n in (cols, rows))
    z = np.zeros((rows * cols, D))
    z[:, :2] = np.stack(np.meshgrid(across, down[::-1]), axis=2).reshape(-1, 2)[:, :D]
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
    """Images for measuring, the same in every run; their loss if pixels were independent, which is
    the chance level; their exact log-likelihood.   -> (n, 64), two numbers."""
    x = noisy_templates(np.random.default_rng(10 ** 6), n)
    p = FLIP + (1 - 2 * FLIP) * TEMPLATES.mean(axis=0)  # how often a pixel is 1
    chance = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum(axis=1).mean()
    return x.astype(np.float32), float(chance), float(log_likelihood(x).mean())


def main(cfg):
    """Learn the images; show the bound beside the truth, samples, the map of the codes."""
    start = time.perf_counter()
    rng = np.random.default_rng(cfg.seed)
    params = init_params(cfg, rng)
    size = sum(p.size for p in params.values())
    x, chance, exact = new_images()
    print(f"40 templates of 8 x 8 pixels, {FLIP:.0%} of the pixels flipped; {cfg.latent} latent "
          f"numbers, hidden\nlayers of {cfg.hidden}, {size} parameters")
    print(f"chance level: loss {chance:.2f}, independent pixels; the lowest loss possible is "
          f"{-exact:.2f}")
    losses = train(params, cfg)
    rate, distortion = rate_and_distortion(params, x, rng)
    elbo = -rate - distortion
    check_finite(elbo, params)
    print(f"{len(x)} new images, nats per image, summed over pixels and latent numbers:\n"
          f"  ELBO {elbo:.2f} = -(rate {rate:.2f} + distortion {distortion:.2f});  exact log p(x) "
          f"{exact:.2f}")
    samples = decode_images(params, rng.standard_normal((4000, cfg.latent)))
    ok, perfect, hit = quality(samples)
    print(f"{len(samples)} draws of z from N(0, I), decoded: {ok:.0%} have at most 2 wrong pixels, "
          f"{perfect:.0%} none;\n{hit} of 40 templates occur. Ten samples, dark (.) to bright (@):")
    draw_row(samples[:10])
    print("What the codes decode to. Columns and rows: quantiles of z1 and z2, all characters are "
          "equally\nprobable: o disc, r ring, S square, F frame, t triangle, d diamond, + plus, x "
          "cross, = lines,\nI bars; . where more than 4 pixels differ from every template")
    draw_latent_map(params, cfg.latent)
    print("Next: python vae.py autoencoder      python vae.py --beta 10      python vae.py bounds")
    print_result("shapes", cfg, elbo=elbo, exact=exact, rate=rate, ok=ok, perfect=perfect,
                 templates=hit, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: autoencoder, tighter bounds, beta, interpolation, digits; flags. ====

MORE = """
Tasks
    python vae.py autoencoder --png ae.png      samples of an autoencoder beside those of a VAE
    python vae.py bounds                importance-weighted bounds beside the exact log p(x)
    python vae.py sweep                 beta from 0.1 to 10: rate, distortion, posterior collapse
    python vae.py interpolate           from image to image, between codes and between pixels
    python vae.py mnist --data mnist    the net and the measure of Burda et al. 2016

Break it (python vae.py; as it is: ELBO -17.94, 76 % of the samples with at most 2 wrong pixels)
    python vae.py --beta 10                         ELBO -32.66, as with independent pixels, 0 %: z
                                                    does not depend on the image (collapse)
    bernoulli_forward: nats.mean(),                 the same collapse: a mean over 64 pixels instead
        _backward: dout / logits.size               of their sum is beta = 64
    reparameterize_forward: return mu, (sigma, e)   ELBO -12.78, above log p(x) = -16.32: without
                                                    the draw it bounds nothing; 66 %
    reparameterize_backward: 0 * dout for log_var   ELBO -28.51, 4 %: sigma is trained by the KL
                                                    divergence alone, so the clouds overlap

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python vae.py --latent 1, 3, 8: ELBO, rate, samples. Why is the rate of a good model above
       log 40 = 3.69 nats?
    2. Derive and add a Gaussian likelihood: sum_p (y - targets)^2 / (2 s^2) + log s, mean over N
       (gaussian_nll_forward(y, targets, s), _backward without ds). Which s acts as which beta?
    3. Let beta rise from 0 to 1 in the first 1000 steps (warm-up). How many latent numbers of
       python vae.py autoencoder are active then?

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- an autoencoder beside it: python vae.py autoencoder -----------------------------------------
# The same layers with z = mu, no draw and no KL divergence: the codes lie where training left them.

@dataclass
class Autoencoder(Config):
    """Sample from an autoencoder and from a VAE with the same layers."""
    latent: int = 8         # numbers in a code z
    steps: int = 7000       # optimizer steps
    png: str = ""           # file to write 100 samples of each model to


def autoencoder_loss_and_grads(params, batch, cfg):
    """loss_and_grads with z = mu; log_var is not used.   -> distortion, gradients."""
    x, _ = batch
    code, encoder = coder_forward(x, params, "enc")
    mu, log_var = np.split(code, 2, axis=1)
    logits, decoder = coder_forward(mu, params, "dec")
    loss, bernoulli = bernoulli_forward(logits, x)
    dmu, grads = coder_backward(bernoulli_backward(1.0, bernoulli), decoder)
    _, encoder_grads = coder_backward(np.concatenate([dmu, 0 * log_var], axis=1), encoder)
    return loss, {**grads, **encoder_grads}


def fit(title, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads):
    """Train a new model.   -> params, losses."""
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    print(f"\n{title}: {cfg.latent} latent numbers, hidden layers of {cfg.hidden}\n"
          f"chance level: loss {new_images()[1]:.2f}, independent pixels")
    return params, train(params, cfg, make_batch, loss_and_grads)


def latent_rates(mu, log_var):
    """-> KL divergence of every latent number, mean over the images (N, D), in descending order;
    how many are active: the variance of mu over the images is above 0.01 (Burda et al. 2016)."""
    rates = 0.5 * (mu * mu + np.exp(log_var) - 1 - log_var).mean(axis=0)
    return np.sort(rates)[::-1], int((mu.var(axis=0) > 0.01).sum())


def run_autoencoder(cfg):
    """Train both; decode draws from N(0, I), and from a Gaussian fitted to the codes."""
    start, rng, (x, _, _) = time.perf_counter(), np.random.default_rng(cfg.seed), new_images()
    if cfg.png:
        try_png(cfg.png)
    plain, losses = fit("Autoencoder", cfg, loss_and_grads=autoencoder_loss_and_grads)
    mu, _ = encode_images(plain, x)
    fitted = rng.multivariate_normal(mu.mean(axis=0), np.atleast_2d(np.cov(mu.T)), 4000)
    prior = rng.standard_normal(fitted.shape)
    rows = {"ae": ("autoencoder, N(0, I)", plain, prior),
            "fitted": ("autoencoder, fitted Gaussian", plain, fitted)}
    if len(losses) == cfg.steps:
        vae, losses = fit("VAE", cfg)
        rows["vae"] = "VAE, N(0, I)", vae, prior
    print("\nlog p(x|mu) of new images, and 4000 samples; the flipped pixels alone cost 12.70 nats")
    print(f"{'model, source of z':30s}{'log p(x|mu)':>12s}{'within 2 pixels':>17s}{'equal':>8s}"
          f"{'templates':>11s}")
    metrics, samples = {}, {}
    for name, (title, params, z) in rows.items():
        mu, log_var = encode_images(params, x)
        distortion, _ = bernoulli_forward(coder_forward(mu, params, "dec")[0], x)
        check_finite(distortion, params)
        samples[title] = decode_images(params, z)
        ok, perfect, hit = quality(samples[title])
        print(f"{title:30s}{-distortion:12.2f}{ok:17.1%}{perfect:8.1%}{hit:8d}/40")
        metrics.update({f"{name}_ok": ok, f"{name}_templates": hit})
    if "vae" in rows:
        rates, metrics["active"] = latent_rates(mu, log_var)
        print("KL divergence of each latent number of the VAE:", *(f"{rate:.2f}" for rate in rates))
    print("Samples, dark (.) to bright (@):")
    for title, images in samples.items():
        print(title)
        draw_row(images[:10])
    if cfg.png:
        write_png(cfg.png, np.concatenate([tile_images(images[:100].reshape(100, 8, 8, 1), 10, 4)
                                           for images in samples.values()], axis=1))
        print(f"{cfg.png}: 100 samples each, " + "; ".join(samples))
    print("\nNext: python vae.py interpolate      python vae.py sweep")
    print_result("autoencoder", cfg, **metrics, params=sum(p.size for p in params.values()),
                 steps=len(losses), seconds=time.perf_counter() - start)


def tile_images(images, columns, scale):
    """Images (N, H, W, C) of 1 or 3 channels in rows of `columns`, in white frames; every pixel
    becomes a square of scale x scale.   -> one image (., ., 3)"""
    images = np.repeat(images.repeat(scale, axis=1).repeat(scale, axis=2), 3 // images.shape[3], 3)
    images = np.pad(images, ((0, -len(images) % columns), (4, 4), (4, 4), (0, 0)),
                    constant_values=1)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return rows.reshape(len(rows) * rows.shape[1], -1, 3)


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
        Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + raw)
    except OSError as error:
        raise InputError(f"--png {path}: expected a file to write, found: {error}") from None


def try_png(path):
    """Raise InputError if no picture can be written to path: before the training, not after it."""
    require(not os.path.isdir(path), f"--png {path}", "a file", "a folder")
    write_png(f"{path}.{os.getpid()}", np.zeros((1, 1, 3)))
    os.remove(f"{path}.{os.getpid()}")


# ---- tighter bounds: python vae.py bounds --------------------------------------------------------
# p(x) is the mean of w = p(x|z) p(z) / q(z|x) over draws z from the encoder's q(z|x). So the log of
# a mean of K weights is a bound, L_K, that rises with K; L_1 is the ELBO (Burda et al. 2016).

@dataclass
class Bounds(Config):
    """Importance-weighted bounds beside the exact likelihood; train with one of them."""
    latent: int = 8         # numbers in a code z
    draws: int = 5          # draws of z per image in the second training
    batch_size: int = 32    # images per step
    steps: int = 5000       # optimizer steps


def log_weight_forward(logits, z, log_var, e, targets):
    """log w = log p(targets|z) + log p(z) - log q(z|targets) = sum_p (t a - log(1 + e^a)) + sum_d
    (log_var + e^2 - z^2) / 2; both Gaussians have 2 pi.   logits (N, K, P), z, e (N, K, D), log_var
    (N, D), targets (N, P) -> (N, K)."""
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


def importance_forward(params, x, e):
    """Encoder, K draws per image, decoder.   x (N, P), e (N, K, D) -> log w (N, K)."""
    code, encoder = coder_forward(x, params, "enc")
    mu, log_var = np.split(code, 2, axis=1)
    z, draw = reparameterize_forward(mu[:, None], log_var[:, None], e)          # (N, K, D)
    logits, decoder = coder_forward(z.reshape(-1, z.shape[2]), params, "dec")
    logits = logits.reshape(*z.shape[:2], -1)                       # (N, K, P)
    log_w, weight = log_weight_forward(logits, z, log_var, e, x)
    return log_w, (encoder, draw, decoder, weight)


def importance_backward(dout, cache):
    """importance_forward from bottom to top; all K draws use the same mu and log_var, so their
    gradients add.   dout (N, K) -> gradients under the keys of params."""
    encoder, draw, decoder, weight = cache
    dlogits, dz_weight, dlog_var, _ = log_weight_backward(dout, weight)
    dz, grads = coder_backward(dlogits.reshape(dout.size, -1), decoder)
    dz = dz.reshape(dz_weight.shape) + dz_weight
    dmu, dlog_var_draw, _ = reparameterize_backward(dz, draw)       # (N, K, D) each
    dcode = np.concatenate([dmu.sum(axis=1), dlog_var + dlog_var_draw.sum(axis=1)], axis=1)
    _, encoder_grads = coder_backward(dcode, encoder)
    return {**grads, **encoder_grads}


def importance_batch(cfg, step, dtype=np.float32):
    """New images.   -> x (N, 64), e (N, K, D)."""
    rng = np.random.default_rng((cfg.seed, step))
    x = noisy_templates(rng, cfg.batch_size)
    e = rng.standard_normal((cfg.batch_size, cfg.draws, cfg.latent))
    return x.astype(dtype), e.astype(dtype)


def importance_loss_and_grads(params, batch, cfg):
    """loss = -mean_n log mean_k w; its derivative by log w_k is -(w_k / sum w) / N."""
    x, e = batch
    log_w, cache = importance_forward(params, x, e)
    weights = np.exp(log_w - log_w.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)                   # (N, K)
    return -log_mean_exp(log_w).mean(), importance_backward(-weights / len(x), cache)


def log_weights(params, x, i, draws, seed):
    """log w of many draws for image i of x (N, P), 500 at a time.   -> (draws,)."""
    rng, D, parts = np.random.default_rng((seed, i)), len(params["dec.W1"]), []
    for n in range(0, draws, 500):
        e = rng.standard_normal((1, min(500, draws - n), D), np.float32)
        parts.append(importance_forward(params, x[i:i + 1], e)[0][0])
    return np.concatenate(parts)


def run_bounds(cfg):
    """The same net trained with the ELBO and with the bound of cfg.draws draws."""
    start, metrics, (x, _, exact) = time.perf_counter(), {}, new_images(500)
    for name, title, *functions in (
            ("vae", "VAE, trained with the ELBO", make_batch, loss_and_grads),
            ("iwae", f"IWAE, trained with the bound of {cfg.draws} draws", importance_batch,
             importance_loss_and_grads)):
        params, losses = fit(title, cfg, *functions)
        log_w = np.stack([log_weights(params, x, i, 1000, cfg.seed) for i in range(len(x))])
        check_finite(float(log_w.mean()), params)
        print(f"Rows: bounds on log p(x) of {len(x)} new images, in nats; a # is 0.1 above "
              f"{exact - 4:.2f}")
        rows = {f"L_{K}": float(log_mean_exp(log_w.reshape(len(x), -1, K)).mean())
                for K in (1, 10, 100, 1000)}
        for bound, value in {**rows, "exact": exact}.items():
            print(f"  {bound:6s} {value:7.2f}  " + "#" * round(10 * max(0, 4 + value - exact)))
        metrics.update({f"{name}_{bound}": value for bound, value in rows.items()})
        if len(losses) < cfg.steps:
            break
    print("\nNext: python vae.py bounds --draws 20      python gan.py")
    print_result("bounds", cfg, exact=exact, **metrics, params=sum(p.size for p in params.values()),
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- beta, and posterior collapse: python vae.py sweep -------------------------------------------
# beta is the price of a nat of rate. If it is too high, z does not depend on the image (collapse).

BETAS = (0.1, 0.5, 1.0, 2.0, 4.0, 10.0)


@dataclass
class Sweep:
    """Train VAEs with six weights of the KL divergence."""
    latent: int = 8         # numbers in a code z
    hidden: int = 128       # width of the hidden layers
    batch_size: int = 64    # images per step
    steps: int = 2000       # optimizer steps of each training
    lr: float = 0.005       # peak learning rate
    warmup: int = 100       # steps of linear warmup
    seed: int = 0           # random seed


def run_sweep(cfg):
    """One training for each of BETAS; rate against distortion."""
    start, metrics, lines, (x, chance, exact) = time.perf_counter(), {}, [], new_images()
    for beta in BETAS:
        params, losses = fit(f"beta {beta:g}", Config(beta=beta, **vars(cfg)))
        rng = np.random.default_rng(cfg.seed)
        rate, distortion = rate_and_distortion(params, x, rng)
        check_finite(rate + distortion, params)
        _, active = latent_rates(*encode_images(params, x))
        ok, _, hit = quality(decode_images(params, rng.standard_normal((4000, cfg.latent))))
        lines.append(f"{beta:5g}{-rate - distortion:9.2f}{active:7d}{ok:7.0%}{hit:6d}/40   "
                     + "=" * round(rate) + "#" * round(distortion))
        name = f"{beta:g}".replace(".", "_")
        metrics.update({f"elbo_{name}": -rate - distortion, f"rate_{name}": rate})
        if len(losses) < cfg.steps:
            break
    print("\nColumns: ELBO; active latent numbers; samples with at most 2 wrong pixels; templates "
          "hit;\na = is a nat of rate, a # is a nat of distortion. The exact log p(x) is "
          f"{exact:.2f}")
    print(" beta     ELBO active     ok  templates", *lines, sep="\n")
    print("\nNext: python vae.py --beta 0.1      python vae.py bounds")
    print_result("sweep", cfg, exact=exact, chance=chance, **metrics, steps=len(losses),
                 params=sum(p.size for p in params.values()), seconds=time.perf_counter() - start)


# ---- interpolation: python vae.py interpolate ----------------------------------------------------
# Between two codes lie the codes of other images; between two images lie two half-shaded images.

@dataclass
class Interpolate(Config):
    """Walk from one image to another, in codes and in pixels."""


def gray_distance(images):
    """sum_p |pixel - template|, of the nearest template, without a threshold.   (N, 64) -> (N,)."""
    return abs(images[:, None] - TEMPLATES).sum(axis=2).min(axis=1)


def run_interpolate(cfg):
    """Ten images on the way from one template to another: decoded from codes, mixed from pixels."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    params, losses = fit("VAE", cfg)
    a, b = rng.permutation(40).reshape(2, 20)           # 20 pairs of templates
    mu, _ = encode_images(params, TEMPLATES.astype(np.float32))
    share = np.linspace(0, 1, 10)[:, None]
    ways = {}
    for name, ends in (("codes", mu), ("pixels", TEMPLATES)):
        points = ends[a, None] * (1 - share) + ends[b, None] * share            # (20, 10, D or 64)
        points = points.reshape(200, -1)
        ways[name] = decode_images(params, points) if name == "codes" else points
    check_finite(ways["codes"], params)
    pair = int(abs(TEMPLATES[a] - TEMPLATES[b]).sum(axis=1).argmax())           # differs most
    print(f"\nFrom {SHAPES[a[pair] // 4]} to {SHAPES[b[pair] // 4]}, dark (.) to bright (@):")
    metrics = {}
    for name, images in ways.items():
        print(f"between {name}")
        draw_row(images.reshape(20, 10, 64)[pair])
        distance = gray_distance(images).reshape(20, 10).mean(axis=0)
        metrics[f"{name}_halfway"] = float(distance[4:6].mean())
        print("  ".join(f"{value:<8.1f}" for value in distance).rstrip())
    print("The numbers: sum of |differences| from the nearest template, mean over 20 pairs")
    print("\nNext: python vae.py interpolate --latent 8      python vae.py sweep")
    print_result("interpolate", cfg, **metrics, params=sum(p.size for p in params.values()),
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- digits: python vae.py mnist --data mnist ----------------------------------------------------
# The net and the measure of Burda et al. 2016. A gray value is the probability that its pixel is 1:
# training images are drawn anew each time, test images once. Other papers draw the training images
# once, which is 1 to 2 nats worse: figures of the two kinds cannot be compared.

@dataclass
class Mnist(Config):
    """Handwritten digits, binarized: ELBO, and an importance-weighted bound."""
    latent: int = 50        # numbers in a code z
    hidden: int = 200       # width of the hidden layers
    batch_size: int = 100   # images per step
    steps: int = 60000      # optimizer steps
    lr: float = 0.002       # peak learning rate
    threads: int = 2        # micro-batches, each on a thread of its own
    bound_draws: int = 5000  # draws of z per image for the bound
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
    with mean 0 and variance 1, labels (N,).   Without a folder noise, for gradient checks.
    Raises InputError."""
    if not folder:
        noise = np.random.default_rng(0).standard_normal((1000, 784)).astype(np.float32)
        return dict.fromkeys(("train", "validation", "test"), (noise, np.arange(1000) % 10))
    flag, parts = f"--data {folder}", {}
    for prefix in ("train", "t10k"):
        for kind, ndim in (("images", 3), ("labels", 1)):       # mirrors name them .idx3-ubyte, too
            paths = sorted(Path(folder).glob(f"{prefix}-{kind}?idx{ndim}-ubyte*"))
            expected = f"a folder with {prefix}-{kind}-idx{ndim}-ubyte.gz"
            require(paths, flag, expected, "no such file")
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


def run_mnist(cfg):
    """Train; ELBO and bound on test images; draw samples."""
    require(cfg.data, "--data", "the folder of MNIST (--help says where to get it)", cfg.data)
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    if cfg.png:
        try_png(cfg.png)
    params = init_mnist(cfg, rng)
    size = sum(p.size for p in params.values())
    test = binarize(gray_images(cfg.data, "test"), np.random.default_rng(0))
    held_out = binarize(gray_images(cfg.data, "validation")[:1000], np.random.default_rng(0))
    chance, _ = bernoulli_forward(np.broadcast_to(params["dec.b3"], test.shape), test)
    print(f"MNIST, 28 x 28 pixels, binarized anew for each use; {cfg.latent} latent numbers, "
          f"hidden layers of\n{cfg.hidden}, {size} parameters; nats per image, summed over pixels "
          f"and latent numbers\nchance level: loss {chance:.1f}, independent pixels")

    def note():
        return f"  validation {sum(rate_and_distortion(params, held_out, rng)):.2f}"
    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")       # as run does
    with ThreadPoolExecutor(cfg.threads, initializer=quiet) as pool:
        threaded = functools.partial(threaded_loss_and_grads, loss_and_grads, pool)
        losses = train(params, cfg, mnist_batch, threaded, note)
        rate, distortion = rate_and_distortion(params, test, rng)
        check_finite(rate + distortion, params)
        some = test[::max(1, len(test) // 1000)][:1000]
        print(f"{cfg.bound_draws} draws of z for each of {len(some)} test images ...", flush=True)
        log_w = np.stack(list(pool.map(
            lambda i: log_weights(params, some, i, cfg.bound_draws, cfg.seed), range(len(some)))))
    rates, active = latent_rates(*encode_images(params, test))
    print("KL divergence of each latent number:", *(f"{rate:.2f}" for rate in rates[:active]),
          f"and {cfg.latent - active} unused ones")
    bounds = {f"L_{K}": log_mean_exp(log_w[:, :K]) for K in (10, 100, 1000, cfg.bound_draws)
              if K <= cfg.bound_draws}
    print(f"{len(test)} test images: ELBO {-rate - distortion:.2f} = -(rate {rate:.2f} + "
          f"distortion {distortion:.2f})\n{len(some)} of them:",
          ", ".join(f"{name} {bound.mean():.2f}" for name, bound in bounds.items()),
          f"+- {log_mean_exp(log_w).std() / len(some) ** 0.5:.2f} (standard error)")
    samples = decode_images(params, rng.standard_normal((100, cfg.latent)))
    print("Samples; blank is 0, @ is 1")
    for images in samples[:6].reshape(2, 3, 14, 2, 28).mean(axis=3):       # two rows in one
        for line in shade(images).swapaxes(0, 1):                          # (3, 28)
            print("  ".join("".join(pixels) for pixels in line).rstrip())
    if cfg.png:
        write_png(cfg.png, tile_images(samples.reshape(100, 28, 28, 1), 10, 2))
        print(f"{cfg.png}: 100 samples")
    print("\nNext: python vae.py bounds      python gan.py")
    metrics = {name: float(bound.mean()) for name, bound in bounds.items()}
    print_result("mnist", cfg, elbo=-rate - distortion, rate=rate, active=active, **metrics,
                 params=size, steps=len(losses), seconds=time.perf_counter() - start)


# ---- threads: micro-batches on several cores -----------------------------------------------------

def split_batch(batch, n):
    """n micro-batches, each with its share of the loss terms (here: of the rows)."""
    parts = zip(*(np.array_split(array, n) for array in batch))
    return [(len(part[0]) / len(batch[0]), part) for part in parts]


def threaded_loss_and_grads(loss_and_grads, pool, params, batch, cfg):
    """Every thread takes a micro-batch: NumPy releases the interpreter lock while it computes. The
    gradient of a mean is the mean of the gradients, weighted by the shares of the loss terms."""
    shares, parts = zip(*split_batch(batch, cfg.threads))
    results = list(pool.map(lambda part: loss_and_grads(params, part, cfg), parts))
    loss = sum(share * loss for share, (loss, _) in zip(shares, results))
    grads = {name: sum(share * g[name] for share, (_, g) in zip(shares, results))
             for name in params}
    return loss, grads


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
    parser = argparse.ArgumentParser(usage=usage, description=__doc__ + MORE, allow_abbrev=False,
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
    pasted = "ipykernel" in sys.argv[0]                 # into a notebook cell: argv is not ours
    try:
        name, cfg = read_flags(tasks, [] if pasted else sys.argv[1:])
        tasks[name].main(cfg)
    except (InputError, FloatingPointError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def threads_fit(cfg):
    """The constraint on --threads."""
    return (cfg.threads <= cfg.batch_size, "--threads", f"at most --batch-size {cfg.batch_size}",
            cfg.threads)


CONSTRAINTS = {Mnist: lambda cfg: [threads_fit(cfg)]}


def normal(rng, **shapes):
    """Inputs by name, for gradcheck.py; targets are 0 or 1."""
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return inputs | {name: x > 0 for name, x in inputs.items() if name == "targets"}


GRADCHECK = {
    "reparameterize": lambda rng: normal(rng, mu=(5, 4), log_var=(5, 4), e=(5, 4)),
    "gaussian_kl": lambda rng: normal(rng, mu=(5, 4), log_var=(5, 4)),
    "bernoulli": lambda rng: normal(rng, logits=(5, 4), targets=(5, 4)),
    "log_weight": lambda rng: normal(rng, logits=(5, 3, 7), z=(5, 3, 4), log_var=(5, 4),
                                     e=(5, 3, 4), targets=(5, 7))}

TASKS = {"shapes": Task(Config, init_params, make_batch, loss_and_grads, main),
         "autoencoder": Task(Autoencoder, init_params, make_batch, autoencoder_loss_and_grads,
                             run_autoencoder),
         "bounds": Task(Bounds, init_params, importance_batch, importance_loss_and_grads,
                        run_bounds),
         "sweep": Task(Sweep, None, None, None, run_sweep),
         "interpolate": Task(Interpolate, init_params, make_batch, loss_and_grads,
                             run_interpolate),
         "mnist": Task(Mnist, init_mnist, mnist_batch, loss_and_grads, run_mnist)}

if __name__ == "__main__":
    run(TASKS)
