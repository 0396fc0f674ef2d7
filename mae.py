"""mae.py: mask most of an image and learn to fill it in.

A masked autoencoder learns from images without labels: mask three out of four patches, predict
their pixels from the rest. The features that it learns on the way tell images apart, too. Its
encoder, a transformer, processes only the visible patches, which makes it fast. A small decoder
receives the encoder's outputs and, for every masked patch, a mask token, the same vector for all.

Forward, for patches x (N, T, P); Penc, Pdec are learned position embeddings
    encoder    z = blocks(gather(x Wp + bp + Penc, visible))
    decoder    y = blocks(restore([z Wd + bd, mask tokens]) + Pdec),  restore: to the order of x
    loss       mean (gather(y, masked) Wx + bx - gather(x, masked))^2
    block      x = x + attention(norm(x)),   then x = x + mlp(norm(x)),   see transformer.py
Backward
    y = gather(x, ids)            dx = dy at ids, 0 elsewhere: y does not depend on other tokens
    y = [z, mask tokens]          dz = the first part of dy; dtoken = the sum of the second part

Run    python mae.py      (ten shapes; python mae.py --help lists the other tasks)
Papers: Dosovitskiy et al. 2021 (patches as tokens), He et al. 2022 (masked autoencoders).
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
    """Fill in images of ten shapes, at any position, in any size and color."""
    patch_size: int = 4     # pixels per side of a patch; the image has 16 x 16 pixels
    mask_ratio: float = 0.75  # share of masked patches
    layers: int = 2         # blocks of the encoder
    dim: int = 64           # embedding dimension of the encoder
    decoder_layers: int = 1  # blocks of the decoder
    decoder_dim: int = 32   # embedding dimension of the decoder
    heads: int = 4          # attention heads
    batch_size: int = 32    # images per step
    steps: int = 1500       # optimizer steps
    lr: float = 0.004       # peak learning rate
    warmup: int = 100       # steps of linear warmup
    seed: int = 0           # random seed


# ---- layers: N images, T patches of P numbers, K visible, D dim (decoder: E), H heads, d = D / H -

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


def layernorm_forward(x, gamma, beta, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps), per row.   x (N, D)."""
    mean = x.mean(axis=1, keepdims=True)
    inv_std = (x.var(axis=1, keepdims=True) + eps) ** -0.5
    xhat = (x - mean) * inv_std
    return gamma * xhat + beta, (xhat, gamma, inv_std)


def layernorm_backward(dout, cache):
    """g = gamma dout, dx = (g - mean(g) - xhat mean(g xhat)) / std, since every x moves mean and
    std, too; dgamma = sum_n dout xhat, dbeta = sum_n dout."""
    xhat, gamma, inv_std = cache
    g = gamma * dout
    mean_g = g.mean(axis=1, keepdims=True)
    mean_g_xhat = (g * xhat).mean(axis=1, keepdims=True)
    dx = (g - mean_g - xhat * mean_g_xhat) * inv_std
    return dx, (dout * xhat).sum(axis=0), dout.sum(axis=0)


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


def bidirectional_attention_forward(q, k, v):
    """out = p v, p = softmax(q k^T / sqrt(d)).   q, k, v, out (N, H, T, d)."""
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5              # (N, H, T, T)
    p = np.exp(scores - scores.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    return p @ v, (q, k, v, p)


def bidirectional_attention_backward(dout, cache):
    """dv = p^T dout, dp = dout v^T, dscores = p (dp - the sum of p dp over the keys),
    dq = dscores k / sqrt(d), dk = dscores^T q / sqrt(d)."""
    q, k, v, p = cache
    dv = p.swapaxes(2, 3) @ dout
    dp = dout @ v.swapaxes(2, 3)
    dscores = p * (dp - (p * dp).sum(axis=3, keepdims=True))
    dscores *= q.shape[3] ** -0.5                                   # both dq and dk need it
    return dscores @ k, dscores.swapaxes(2, 3) @ q, dv


def gather_forward(x, ids):
    """The tokens at the positions ids, all different.   x (N, T, D), ids (N, K) -> (N, K, D)."""
    return np.take_along_axis(x, ids[:, :, None], axis=1), (ids, x.shape)


def gather_backward(dout, cache):
    """dx = dout at ids, 0 elsewhere; no position is written twice, so nothing has to be added."""
    ids, shape = cache
    dx = np.zeros(shape, dout.dtype)
    np.put_along_axis(dx, ids[:, :, None], dout, axis=1)
    return dx


def mse_forward(y, targets):
    """mean((y - targets)^2).   y, targets (N, M) -> scalar."""
    return ((y - targets) ** 2).mean(), (y, targets)


def mse_backward(dout, cache):
    """dy = 2 (y - targets) / size."""
    y, targets = cache
    return (y - targets) * (2 * dout / y.size)


# ---- data ----------------------------------------------------------------------------------------

SHAPES = "disc ring square frame triangle diamond plus cross lines bars".split()


def draw_shapes(labels, size, rng):
    """Images of ten shapes at any position, in any size and color, with noise.
    labels (N,) indices of SHAPES -> (N, size, size, 3), from about -1 to 1."""
    N = len(labels)
    radius = rng.uniform(0.3, 0.45, (N, 1)) * size
    center = radius + rng.random((2, N, 1)) * (size - 1 - 2 * radius)
    y, x = (np.arange(size) - center) / radius          # (N, size) each; the shape is within 1
    y, x = np.broadcast_arrays(y[:, :, None], x[:, None, :])    # (N, size, size)
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
    mask = np.choose(labels[:, None, None], inside)[..., None]
    ground, ink = rng.random((2, N, 1, 1, 3))
    alike = abs(ink - ground).sum(axis=3, keepdims=True) < 0.75
    ink = np.where(alike, 1 - ground.round(), ink)      # every shape has to be visible
    images = np.where(mask, ink, ground)
    return (images - 0.5) * 2 + 0.2 * rng.standard_normal(images.shape)


def to_patches(x, patch):
    """Cut images into squares.   x (N, S, S, C) -> (N, T, P), P = patch patch C."""
    N, S, _, C = x.shape
    n = S // patch
    x = x.reshape(N, n, patch, n, patch, C).swapaxes(2, 3)
    return x.reshape(N, n * n, patch * patch * C)


def to_images(x, patch, size):
    """to_patches backwards.   x (N, T, P) -> (N, S, S, C)."""
    n = size // patch
    x = x.reshape(len(x), n, n, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(len(x), size, size, -1)


def random_masking(x, cfg, rng):
    """A random order of the patches of each image: the first K are visible, the others masked.
    -> x (N, T, P), ids of the visible ones (N, K), the masked ones (N, T - K), their pixels."""
    N, T, _ = x.shape
    order = rng.random((N, T)).argsort(axis=1)          # a permutation of 0 ... T - 1 in each row
    K = round(T * (1 - cfg.mask_ratio))
    visible, masked = order[:, :K], order[:, K:]
    targets, _ = gather_forward(x, masked)
    return x, visible, masked, targets


def make_batch(cfg, step, dtype=np.float32):
    """New shapes at every step.   -> as random_masking."""
    rng = np.random.default_rng((cfg.seed, step))
    images = draw_shapes(rng.integers(0, 10, cfg.batch_size), 16, rng)
    return random_masking(to_patches(images.astype(dtype), cfg.patch_size), cfg, rng)


# ---- model: encoder, decoder ---------------------------------------------------------------------

def init_params(cfg, rng, dtype=np.float32, size=16, channels=3):
    """Wp, bp, Penc, blocks "enc0.", "enc1.", ..., a norm "enc."; Wd, bd, mask_token, Pdec, blocks
    "dec0.", ..., a norm "dec.", Wx, bx."""
    T, P, E = (size // cfg.patch_size) ** 2, channels * cfg.patch_size ** 2, cfg.decoder_dim
    params = {"mask_token": 0.02 * rng.standard_normal(E)}
    shapes, norms = {"Wp": (P, cfg.dim), "Wd": (cfg.dim, E), "Wx": (E, P)}, []
    for side, D, layers in (("enc", cfg.dim, cfg.layers), ("dec", E, cfg.decoder_layers)):
        params[f"P{side}"] = 0.02 * rng.standard_normal((T, D))
        norms.append((f"{side}.", "", D))               # "enc.gamma", "enc.beta"
        for i in range(layers):
            shapes.update({f"{side}{i}.Wqkv": (D, 3 * D), f"{side}{i}.Wo": (D, D),
                           f"{side}{i}.W1": (D, 4 * D), f"{side}{i}.W2": (4 * D, D)})
            norms += [(f"{side}{i}.", "1", D), (f"{side}{i}.", "2", D)]         # "enc0.gamma1"
    for name, (n, m) in shapes.items():
        params[name] = rng.standard_normal((n, m)) * (2 / (n + m)) ** 0.5
        params[name.replace("W", "b")] = np.zeros(m)    # the bias of Wqkv is bqkv, and so on
    for prefix, k, D in norms:
        params[f"{prefix}gamma{k}"], params[f"{prefix}beta{k}"] = np.ones(D), np.zeros(D)
    return {name: value.astype(dtype) for name, value in params.items()}


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def vit_block_forward(x, p, heads, N):
    """x + attention(norm(x)), then x + mlp(norm(x)).   x (N T, D) -> (N T, D)."""
    y, norm1 = layernorm_forward(x, p["gamma1"], p["beta1"])
    y, qkv = linear_forward(y, p["Wqkv"], p["bqkv"])
    y = y.reshape(N, -1, 3, heads, x.shape[1] // heads)             # (N, T, 3, H, d)
    q, k, v = y.transpose(2, 0, 3, 1, 4)                            # (N, H, T, d) each
    y, attention = bidirectional_attention_forward(q, k, v)
    y, out = linear_forward(y.swapaxes(1, 2).reshape(x.shape), p["Wo"], p["bo"])
    x = x + y
    y, norm2 = layernorm_forward(x, p["gamma2"], p["beta2"])
    y, up = linear_forward(y, p["W1"], p["b1"])
    y, gelu = gelu_forward(y)
    y, down = linear_forward(y, p["W2"], p["b2"])
    return x + y, (norm1, qkv, attention, out, norm2, up, gelu, down)


def vit_block_backward(dout, cache):
    """vit_block_forward in reverse order; x is used twice, so gradients add. -> dx, gradients."""
    norm1, qkv, attention, out, norm2, up, gelu, down = cache
    N, H, T, d = attention[0].shape                                 # of q
    g = {}
    dy, g["W2"], g["b2"] = linear_backward(dout, down)
    dy = gelu_backward(dy, gelu)
    dy, g["W1"], g["b1"] = linear_backward(dy, up)
    dy, g["gamma2"], g["beta2"] = layernorm_backward(dy, norm2)
    dout = dout + dy                                    # the residual path, and that of the mlp
    dy, g["Wo"], g["bo"] = linear_backward(dout, out)
    dy = dy.reshape(N, T, H, d).swapaxes(1, 2)                      # (N, H, T, d)
    dqkv = np.stack(bidirectional_attention_backward(dy, attention))            # (3, N, H, T, d)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(N * T, -1)         # (N T, 3 D)
    dy, g["Wqkv"], g["bqkv"] = linear_backward(dqkv, qkv)
    dy, g["gamma1"], g["beta1"] = layernorm_backward(dy, norm1)
    return dout + dy, g


def blocks_forward(x, params, side, heads):
    """The blocks "enc0.", "enc1.", ... or "dec0.", ..., then a norm.   x (N, T, D) -> (N T, D)."""
    N, T, D = x.shape
    x, caches = x.reshape(N * T, D), []
    while f"{side}{len(caches)}.Wo" in params:          # len(caches): the number of the next block
        x, cache = vit_block_forward(x, part(params, f"{side}{len(caches)}."), heads, N)
        caches.append(cache)
    x, norm = layernorm_forward(x, params[f"{side}.gamma"], params[f"{side}.beta"])
    return x, (caches, norm, side, N)


def blocks_backward(dout, cache):
    """blocks_forward in reverse order.   dout (N T, D) -> dx (N, T, D), gradients."""
    caches, norm, side, N = cache
    grads = {}
    dx, grads[f"{side}.gamma"], grads[f"{side}.beta"] = layernorm_backward(dout, norm)
    for i in reversed(range(len(caches))):
        dx, g = vit_block_backward(dx, caches[i])
        grads.update({f"{side}{i}.{name}": value for name, value in g.items()})
    return dx.reshape(N, -1, dx.shape[1]), grads


def encoder_forward(params, x, visible, heads):
    """Embed all, keep the visible, run the blocks.   x (N, T, P), visible (N, K) -> (N K, D)."""
    N, T, P = x.shape
    x, embed = linear_forward(x.reshape(N * T, P), params["Wp"], params["bp"])
    x = x.reshape(N, T, -1) + params["Penc"]
    x, gather = gather_forward(x, visible)                          # (N, K, D)
    x, blocks = blocks_forward(x, params, "enc", heads)
    return x, (embed, gather, blocks)


def encoder_backward(dout, cache):
    """encoder_forward in reverse order -> gradients under the keys of params."""
    embed, gather, blocks = cache
    dx, grads = blocks_backward(dout, blocks)
    dx = gather_backward(dx, gather)                                # (N, T, D)
    grads["Penc"] = dx.sum(axis=0)
    _, grads["Wp"], grads["bp"] = linear_backward(dx.reshape(-1, dx.shape[2]), embed)
    return grads


def decoder_forward(params, x, visible, masked, heads):
    """x (N K, D) from the encoder, ids of visible and masked patches -> pixels of the masked ones
    (N (T - K), P)."""
    (N, K), E = visible.shape, len(params["mask_token"])
    x, embed = linear_forward(x, params["Wd"], params["bd"])
    tokens = np.broadcast_to(params["mask_token"], (*masked.shape, E))
    x = np.concatenate([x.reshape(N, K, E), tokens], axis=1)        # (N, T, E)
    order = np.concatenate([visible, masked], axis=1)               # the position of each of them
    x, restore = gather_forward(x, order.argsort(axis=1))           # argsort inverts an order
    x, blocks = blocks_forward(x + params["Pdec"], params, "dec", heads)
    x, gather = gather_forward(x.reshape(*order.shape, -1), masked)
    x, pixels = linear_forward(x.reshape(masked.size, -1), params["Wx"], params["bx"])
    return x, (embed, restore, blocks, gather, pixels, K)


def decoder_backward(dout, cache):
    """decoder_forward in reverse order -> dx (N K, D), gradients."""
    embed, restore, blocks, gather, pixels, K = cache
    ids, (N, T, E) = gather                                         # see gather_forward
    dx, dWx, dbx = linear_backward(dout, pixels)
    dx = gather_backward(dx.reshape(*ids.shape, E), gather)         # (N, T, E)
    dx, grads = blocks_backward(dx.reshape(N * T, E), blocks)
    grads.update(Wx=dWx, bx=dbx, Pdec=dx.sum(axis=0))
    dx = gather_backward(dx, restore)                               # K visible, T - K mask tokens
    grads["mask_token"] = dx[:, K:].sum(axis=(0, 1))                # one token, used everywhere
    dx, grads["Wd"], grads["bd"] = linear_backward(dx[:, :K].reshape(N * K, E), embed)
    return dx, grads


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> squared error on masked patches, gradients."""
    x, visible, masked, targets = batch
    z, encoder = encoder_forward(params, x, visible, cfg.heads)
    y, decoder = decoder_forward(params, z, visible, masked, cfg.heads)
    loss, loss_cache = mse_forward(y, targets.reshape(y.shape))
    dz, grads = decoder_backward(mse_backward(1.0, loss_cache), decoder)
    return loss, {**grads, **encoder_backward(dz, encoder)}


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads, update=adam_update,
          state=None, losses=None, note=lambda: "", after_step=lambda step: None):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {} if state is None else state, [] if losses is None else losses
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
        after_step(step)
    check_finite(losses[-1], params)
    return losses


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


def draw_images(columns, size, patch, row_step=1):
    """Images side by side; columns: title -> patches (N, T, P) from -1 to 1, nan is blank. As a
    character is tall, a pixel is two of them, or one where only every other row is drawn."""
    for patches in zip(*columns.values()):              # one image of every column
        images = to_images(np.stack(patches), patch, size)          # (columns, S, S, C)
        strongest = images[0].std(axis=(0, 1)).argmax()             # the color of most contrast
        light = np.clip(0.5 + 0.5 * images[:, ::row_step, :, strongest], 0, 1)
        light = np.where(np.isnan(light), 0, 0.11 + 0.89 * light)   # only masked pixels are blank
        text = shade(light).repeat(2 // row_step, axis=2)
        side_by_side(columns, [["".join(line) for line in image] for image in text], "  ")


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
    """Learn to fill in shapes; show original, visible patches and reconstruction."""
    start = time.perf_counter()
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    x, visible, masked, targets = make_batch(replace(cfg, batch_size=1000), cfg.steps + 1)
    print(f"Ten shapes, 16 x 16 pixels in color, {x.shape[1]} patches, {visible.shape[1]} visible: "
          f"encoder {cfg.layers} x {cfg.dim},\ndecoder {cfg.decoder_layers} x {cfg.decoder_dim}, "
          f"{size} parameters")
    known, _ = gather_forward(x, visible)
    chance = float(((targets - known.mean(axis=1, keepdims=True)) ** 2).mean())
    print(f"chance level: loss {chance:.3f}, every masked patch the mean of the visible ones")
    losses = train(params, cfg)
    z, _ = encoder_forward(params, x, visible, cfg.heads)
    y, _ = decoder_forward(params, z, visible, masked, cfg.heads)
    error, _ = mse_forward(y, targets.reshape(y.shape))
    check_finite(error, params)
    seen, filled = x.copy(), x.copy()
    np.put_along_axis(seen, masked[:, :, None], np.nan, axis=1)
    np.put_along_axis(filled, masked[:, :, None], y.reshape(targets.shape), axis=1)
    print("New images, the color of most contrast, dark (.) to bright (@); blank: masked patches")
    draw_images({"original": x[:3], "visible patches": seen[:3], "reconstruction": filled[:3]},
                16, cfg.patch_size)
    print("Next: python mae.py probe      python mae.py --mask-ratio 0.5")
    print_result("shapes", cfg, error=float(error), mean_patch_error=chance, params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: linear probes, fine-tuning; CIFAR-10, digits; PNG files; flags. ====

MORE = """
Tasks
    python mae.py probe                 what the features are worth to a linear classifier
    python mae.py finetune              the whole encoder on few labels, beside one from scratch
    python mae.py mnist --data mnist
    python mae.py cifar --data cifar-10-binary.tar.gz --save mae.npz --png mae.png
                                        the same with --load mae.npz resumes; 500 labels: 55 %

Break it (python mae.py probe --steps 1500; as it is: error 0.216, probe 30 % with 200 labels and
          61 % with 19,000)
    decoder_forward: x + 0 * params["Pdec"]     error 0.297, 27 %, 53 %: mask tokens without a
                                                position all become the same patch
    --mask-ratio 0.25                           0.184, 30 %, 66 %: small gaps are easy to fill
    --mask-ratio 0.5                            0.190, 33 %, 64 %
    --norm-pixels                               0.255, 33 %, 61 %: in a patch of one color, only
                                                noise is left; on photographs it helps
    encoder_features: only tokens.mean          25 %, 48 %, and 16 % for the untrained encoder: a
                                                mean does not tell how much the patches differ

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python mae.py probe --mask-ratio 0.9: which ratio has the best probe, which the least error?
    2. Let the loss include the visible patches. What do error and probe become, and why?
    3. Derive and add a gate on every token: y = x sigmoid(x w + b) (gate_forward, gate_backward).

Data
    curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    mnist: python mlp.py --help says where to get it
"""

import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import io
import json
import lzma
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- images with labels --------------------------------------------------------------------------

@dataclass
class Probe(Config):
    """Learn features of shapes without labels, then classify shapes with few labels."""
    steps: int = 2400       # optimizer steps
    norm_pixels: bool = False  # targets: patches of mean 0 and variance 1, not pixels
    weight_decay: float = 0.05  # AdamW weight decay
    shift: bool = False     # test on images shifted by a pixel as well, and sum over them
    threads: int = 1        # micro-batches, each on a thread of its own
    png: str = ""           # file to write twelve reconstructions to, in color
    save: str = ""          # checkpoint file (.npz), written every 500 steps
    load: str = ""          # checkpoint file to resume from
    size: ClassVar[int] = 16
    channels: ClassVar[int] = 3
    flip: ClassVar[bool] = False
    crop: ClassVar[int] = 0
    data: ClassVar[str] = "shapes"
    probe: ClassVar[bool] = True
    finetune: ClassVar[bool] = False


@dataclass
class Finetune(Probe):
    """Train the whole encoder on few labels, after learning without labels, and from scratch."""
    steps: int = 1500       # optimizer steps
    labels: float = 0.01    # share of the labels for fine-tuning
    tune_steps: int = 400   # optimizer steps of fine-tuning (no more than --steps are made)
    probe: ClassVar[bool] = False
    finetune: ClassVar[bool] = True


@dataclass
class Cifar(Finetune):
    """Natural images of ten classes, 32 x 32 pixels."""
    norm_pixels: bool = True  # targets: patches of mean 0 and variance 1, not pixels
    layers: int = 4         # blocks of the encoder
    dim: int = 128          # embedding dimension of the encoder
    decoder_layers: int = 2  # blocks of the decoder
    decoder_dim: int = 64   # embedding dimension of the decoder
    batch_size: int = 64    # images per step
    steps: int = 21000      # optimizer steps
    lr: float = 0.0025      # peak learning rate
    warmup: int = 500       # steps of linear warmup
    flip: bool = True       # random mirroring of half of the images
    crop: int = 4           # largest random shift of an image in pixels
    shift: bool = True      # test on images shifted by a pixel as well, and sum over them
    threads: int = 2        # micro-batches, each on a thread of its own
    finetune: bool = False  # fine-tuning on labels afterwards
    data: str = ""          # cifar-10-binary.tar.gz or its folder
    size: ClassVar[int] = 32
    probe: ClassVar[bool] = True


@dataclass
class Mnist(Cifar):
    """Handwritten digits, 28 x 28 pixels."""
    dim: int = 64           # embedding dimension of the encoder
    decoder_dim: int = 32   # embedding dimension of the decoder
    steps: int = 4000       # optimizer steps
    warmup: int = 100       # steps of linear warmup
    flip: bool = False      # random mirroring of half of the images
    crop: int = 2           # largest random shift of an image in pixels
    shift: bool = False     # test on images shifted by a pixel as well, and sum over them
    data: str = ""          # folder with the four files of MNIST
    size: ClassVar[int] = 28
    channels: ClassVar[int] = 1


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


def load_cifar(path):
    """CIFAR-10 in its binary layout, cifar-10-binary.tar.gz or its folder: a label, 32 x 32 reds,
    greens, blues, 10,000 times per file.   -> dict: train, test; each images (N, 32, 32, 3) of
    bytes, labels (N,).   Raises InputError."""
    flag, expected, files = f"--data {path}", "cifar-10-binary.tar.gz or its folder", {}
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    try:
        if Path(path).is_dir():
            paths = [*Path(path).glob("*.bin"), *Path(path).glob("cifar-10-batches-bin/*.bin")]
            files = {file.name: file.read_bytes() for file in paths if file.name in names}
        else:
            raw = Path(path).read_bytes()               # gzip checks its checksum, tarfile does not
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
            with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
                members = {Path(m.name).name: m for m in archive if m.isfile()}
                files = {name: archive.extractfile(m).read() for name, m in members.items()
                         if name in names}
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        found = str(getattr(error, "strerror", None) or error or type(error).__name__)
        raise InputError(f"{flag}: expected {expected}, found: {found.splitlines()[0]}") from None
    parts = []
    for name in names:
        require(name in files, flag, f"{expected}, with {name}", "no such file in it")
        raw = np.frombuffer(files[name], np.uint8)
        require(len(raw) and len(raw) % 3073 == 0, f"{flag}, {name}", "images of 3073 bytes each",
                len(raw))
        labels, pixels = np.split(raw.reshape(-1, 3073), [1], axis=1)
        require(labels.max() < 10, f"{flag}, {name}", "labels from 0 to 9", int(labels.max()))
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((np.ascontiguousarray(images), labels[:, 0].astype(int)))
    return {"train": tuple(map(np.concatenate, zip(*parts[:5]))), "test": parts[5]}


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
def labelled_images(kind, path):
    """kind: a Config class; path: "shapes", a file or folder, or "" for noise, which gradcheck.py
    uses. Images of CIFAR-10 are bytes.   -> dict: train, validation (5,000 of the training images,
    or a tenth of fewer), test; each images (N, S, S, C), labels (N,).   Raises InputError."""
    if path == "shapes":
        rng, labels = np.random.default_rng(99), np.arange(22000) % 10
        images = [draw_shapes(part, 16, rng).astype(np.float32) for part in np.split(labels, 22)]
        images = np.concatenate(images)
        return {"train": (images[:19000], labels[:19000]), "test": (images[20000:], labels[20000:]),
                "validation": (images[19000:20000], labels[19000:20000])}
    if not path:
        rng, labels = np.random.default_rng(0), np.arange(200) % 10
        noise = rng.integers(0, 256, (200, kind.size, kind.size, kind.channels), np.uint8)
        return dict.fromkeys(("train", "validation", "test"), (noise, labels))
    if issubclass(kind, Mnist):
        return {name: (images.reshape(-1, 28, 28, 1), labels)
                for name, (images, labels) in load_mnist(path).items()}
    data = load_cifar(path)
    images, labels = data["train"]
    require(len(images) >= 10, f"--data {path}", "10 training images or more", len(images))
    n = min(5000, len(images) // 10)
    return {"train": (images[:-n], labels[:-n]), "validation": (images[-n:], labels[-n:]),
            "test": data["test"]}


def images_of(cfg, split):
    """-> images, labels of a split of the task's data."""
    return labelled_images(type(cfg), cfg.data)[split]


def standardize(images, dtype=np.float32):
    """Bytes -> numbers with mean 0 and variance 1, roughly; numbers as they are."""
    if images.dtype == np.uint8:
        images = (images - np.array([123.0], dtype)) / np.array([64.0], dtype)
    return images.astype(dtype, copy=False)


def crop_and_flip(images, crop, flip, rng):
    """Data augmentation: shift each image by up to crop pixels, reflecting at the borders; with
    flip mirror half of them.   images (N, H, W, C) -> the same shape."""
    N, H, W, _ = images.shape
    down, right = rng.integers(-crop, crop + 1, (2, N, 1))
    row, col = np.arange(H) + down, np.arange(W) + right            # (N, H), (N, W)
    row = (H - 1) - np.abs((H - 1) - np.abs(row))       # -1 becomes 1, H becomes H - 2
    col = (W - 1) - np.abs((W - 1) - np.abs(col))
    if flip:
        col = np.where(rng.random((N, 1)) < 0.5, col[:, ::-1], col)
    return images[np.arange(N)[:, None, None], row[:, :, None], col[:, None, :]]


def epoch_indices(n, cfg, step):
    """Indices of the batch of this step, where every epoch is a new permutation of n examples."""
    at = np.arange((step - 1) * cfg.batch_size, step * cfg.batch_size)
    order = {e: np.random.default_rng((cfg.seed, e)).permutation(n) for e in np.unique(at // n)}
    return np.array([order[i // n][i % n] for i in at])


def images_batch(cfg, step, dtype=np.float32):
    """make_batch with training images, every one once per epoch, augmented."""
    rng = np.random.default_rng((cfg.seed, step))
    images, _ = images_of(cfg, "train")
    images = images[epoch_indices(len(images), cfg, step)]
    images = standardize(crop_and_flip(images, cfg.crop, cfg.flip, rng), dtype)
    return random_masking(to_patches(images, cfg.patch_size), cfg, rng)


def init_images(cfg, rng, dtype=np.float32):
    """init_params, with Wo and W2 divided by the root of how many they are: a token is the sum of
    their outputs, and is not to grow with the number of layers."""
    params = init_params(cfg, rng, dtype, cfg.size, cfg.channels)
    for side, layers in (("enc", cfg.layers), ("dec", cfg.decoder_layers)):
        for i in range(layers):
            params[f"{side}{i}.Wo"] *= (2 * layers) ** -0.5
            params[f"{side}{i}.W2"] *= (2 * layers) ** -0.5
    return params


# ---- pre-training: pixels, or patches of mean 0 and variance 1 -----------------------------------
# With norm_pixels the loss does not depend on how bright and how rich in contrast a patch is; on
# photographs the features get better (He et al. 2022). To draw a predicted patch, its mean and
# standard deviation are estimated from the visible patches nearby.

def normalized_patches(x):
    """Every patch minus its mean, over its standard deviation.   x (N, T, P)."""
    centered = x - x.mean(axis=2, keepdims=True)
    return centered * ((centered * centered).mean(axis=2, keepdims=True) + 1e-6) ** -0.5


def mae_loss_and_grads(params, batch, cfg):
    """loss_and_grads, where the targets are normalized if cfg.norm_pixels."""
    x, visible, masked, targets = batch
    if cfg.norm_pixels:
        targets = normalized_patches(targets)
    return loss_and_grads(params, (x, visible, masked, targets), cfg)


def estimate_scale(x, visible, masked):
    """Mean and standard deviation of the masked patches, as averages over the visible ones, where
    near ones weigh most.   -> (N, T - K, 1) each."""
    n = round(x.shape[1] ** 0.5)                        # patches per row of the image
    row, col = np.divmod(np.arange(n * n), n)
    distance2 = (row[:, None] - row) ** 2 + (col[:, None] - col) ** 2           # (T, T), squared
    distance2 = distance2[masked[:, :, None], visible[:, None]].astype(x.dtype)     # (N, T - K, K)
    weights = np.exp(-0.5 * (distance2 - distance2.min(axis=2, keepdims=True)))     # the nearest: 1
    weights /= weights.sum(axis=2, keepdims=True)
    known, _ = gather_forward(x, visible)
    return weights @ known.mean(axis=2, keepdims=True), weights @ known.std(axis=2, keepdims=True)


def reconstruct(params, x, visible, masked, cfg):
    """Fill in the masked patches, from the visible ones alone.   x (N, T, P) -> (N, T, P)."""
    z, _ = encoder_forward(params, x, visible, cfg.heads)
    y, _ = decoder_forward(params, z, visible, masked, cfg.heads)
    y = y.reshape(*masked.shape, -1)
    if cfg.norm_pixels:
        mean, std = estimate_scale(x, visible, masked)
        y = mean + std * y
    filled = x.copy()
    np.put_along_axis(filled, masked[:, :, None], y, axis=1)
    return filled


def thread_pool(cfg):
    """cfg.threads threads, each without the warnings that run switches off in its own."""
    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")
    return ThreadPoolExecutor(cfg.threads, initializer=quiet)


def pretrain(cfg):
    """Learn from images without labels, show reconstructions.   -> params, losses, metrics."""
    batches = make_batch if cfg.data == "shapes" else images_batch
    params, state, losses = init_images(cfg, np.random.default_rng(cfg.seed)), {}, []
    x, visible, masked, targets = batches(cfg, 1)
    mean = gather_forward(x, visible)[0].mean(axis=1, keepdims=True)
    if cfg.norm_pixels:
        targets, mean = normalized_patches(targets), 0.0
    print(f"{type(cfg).__name__.lower()}: {cfg.size} x {cfg.size} x {cfg.channels}, "
          f"{x.shape[1]} patches, {visible.shape[1]} visible; encoder {cfg.layers} x {cfg.dim}, "
          f"decoder {cfg.decoder_layers} x {cfg.decoder_dim}, "
          f"{sum(p.size for p in params.values())} parameters")
    print(f"chance level: loss {((targets - mean) ** 2).mean():.3f}, every masked patch "
          + ("its own mean" if cfg.norm_pixels else "the mean of the visible ones"))
    meta = dict(task=type(cfg).__name__, norm_pixels=cfg.norm_pixels, heads=cfg.heads)
    if cfg.png:
        try_png(cfg.png)
    if cfg.load:
        load_checkpoint(cfg.load, meta, params, state, losses)
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses, dry_run=True)

    def save(step):
        if cfg.save and step % 500 == 0:
            save_checkpoint(cfg.save, meta, params, state, losses)

    update = functools.partial(adamw_update, weight_decay=cfg.weight_decay)
    with thread_pool(cfg) as pool:
        threaded = functools.partial(threaded_loss_and_grads, mae_loss_and_grads, pool)
        train(params, cfg, batches, threaded, update, state, losses, after_step=save)
    x = to_patches(standardize(images_of(cfg, "test")[0][:1000]), cfg.patch_size)
    x, visible, masked, targets = random_masking(x, cfg, np.random.default_rng(0))
    filled = reconstruct(params, x, visible, masked, cfg)
    error = float(((targets - gather_forward(filled, masked)[0]) ** 2).mean())
    mean = gather_forward(x, visible)[0].mean(axis=1, keepdims=True)
    mean_error = float(((targets - mean) ** 2).mean())
    check_finite(error, params)
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses)          # after Ctrl-C as well
    show_reconstructions(x[:12], masked[:12], filled[:12], cfg)
    print(f"squared error on the masked pixels of {len(x)} held-out images: {error:.4f}; if every "
          f"masked\npatch is the mean of the visible ones: {mean_error:.4f}")
    return params, losses, {"error": error, "mean_patch_error": mean_error}


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


def tile_images(images, columns, scale):
    """Images (N, H, W, C) of 1 or 3 channels in rows of `columns`, in white frames; every pixel
    becomes a square of scale x scale.   -> one image (., ., 3)"""
    images = np.repeat(images.repeat(scale, axis=1).repeat(scale, axis=2), 3 // images.shape[3], 3)
    images = np.pad(images, ((0, -len(images) % columns), (4, 4), (4, 4), (0, 0)),
                    constant_values=1)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return rows.reshape(len(rows) * rows.shape[1], -1, 3)


def show_reconstructions(x, masked, filled, cfg):
    """Two images as text; with --png twelve in color.   x, filled (N, T, P)."""
    black, white = -1.0, 1.0
    if cfg.data != "shapes":                            # see standardize and load_mnist
        black, white = (-1.92, 2.06) if cfg.channels == 3 else (-0.42, 2.82)
    x, filled = (2 * (a - black) / (white - black) - 1 for a in (x, filled))
    seen = x.copy()
    np.put_along_axis(seen, masked[:, :, None], np.nan, axis=1)
    print("Held-out images, the color of most contrast, dark (.) to bright (@); blank: masked."
          "\nA reconstruction has colors and large forms; edges and texture that no visible patch"
          "\nshows are lost: the mean of all that could be there has the smallest squared error.")
    draw_images({"original": x[:2], "visible patches": seen[:2], "reconstruction": filled[:2]},
                cfg.size, cfg.patch_size, row_step=1 if cfg.size < 20 else 2)
    if cfg.png:
        columns = [to_images(a, cfg.patch_size, cfg.size) for a in (x, np.nan_to_num(seen), filled)]
        images = 0.5 + 0.5 * np.stack(columns, axis=1)                  # (12, 3, S, S, C)
        write_png(cfg.png, tile_images(images.reshape(-1, *images.shape[2:]), 6, 4))
        print(f"{cfg.png}: {len(x)} times original, visible patches (gray: masked), reconstruction")


# ---- linear probe: how much do frozen features tell with few labels? -----------------------------

def encoder_features(params, cfg, images):
    """The frozen encoder on whole images: after every block, the mean of every number over the
    patches, and its standard deviation.   images (N, S, S, C) -> (N, 2 layers D)."""
    x = to_patches(standardize(images), cfg.patch_size)
    N, T, P = x.shape
    x, _ = linear_forward(x.reshape(N * T, P), params["Wp"], params["bp"])
    x = (x.reshape(N, T, -1) + params["Penc"]).reshape(N * T, -1)
    columns = []
    for i in range(cfg.layers):
        x, _ = vit_block_forward(x, part(params, f"enc{i}."), cfg.heads, N)
        tokens = x.reshape(N, T, -1)
        columns += [tokens.mean(axis=1), tokens.std(axis=1)]
    return np.concatenate(columns, axis=1)


def views_of(x, cfg):
    """Test-time augmentation: x; with cfg.shift also x moved by a pixel, once up-left and once
    down-right; with cfg.flip also the mirror images of these.   x (N, H, W, C) -> a list of such.
    """
    views = [x]
    if cfg.shift:
        framed = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        views += [framed[:, 2:, 2:], framed[:, :-2, :-2]]
    if cfg.flip:
        views += [view[:, :, ::-1] for view in views]
    return views


def in_chunks(function, images, cfg):
    """function(images) -> (N, F), 25 images at a time, on cfg.threads threads, which is faster than
    all at once."""
    with thread_pool(cfg) as pool:
        chunks = np.array_split(images, math.ceil(len(images) / 25))
        return np.concatenate([*pool.map(function, chunks)])


def ridge_path(X, Y, penalties):
    """Least squares with a penalty N l |W|^2, for each l: W = (X^T X + N l)^-1 X^T Y, or, the same,
    X^T (X X^T + N l)^-1 Y; one eigendecomposition of the smaller matrix serves all l.
    X (N, F), Y (N, 10) -> W (F, 10), b (10,) for each."""
    x_mean, y_mean, N = X.mean(axis=0), Y.mean(axis=0), len(X)
    X, Y = X - x_mean, Y - y_mean
    wide = X.shape[1] > N
    values, U = np.linalg.eigh(X @ X.T if wide else X.T @ X)
    left, right = (X.T @ U, U.T @ Y) if wide else (U, U.T @ (X.T @ Y))
    for penalty in penalties:
        W = left @ (right / (np.maximum(values, 0) + X.dtype.type(N * penalty))[:, None])
        yield W, y_mean - x_mean @ W


PENALTIES = [10 ** (k / 4) for k in range(-12, 13)]
SHARES = 0.01, 0.1, 1.0         # of the labels


def label_count(share, cfg):
    """How many labels a share of the labels is (of training and validation together)."""
    n = len(images_of(cfg, "train")[1])
    return min(n, max(1, round(share * (n + len(images_of(cfg, "validation")[1])))))


def probe(describe, cfg):
    """A linear classifier on describe(images) -> (N, F), its penalty chosen on validation data.
    -> test accuracy for each of SHARES; mean over three draws where not all labels are used."""
    splits = [images_of(cfg, split) for split in ("train", "validation", "test")]
    parts = [(in_chunks(describe, images, cfg), labels) for images, labels in splits]
    mean, std = parts[0][0].mean(axis=0), parts[0][0].std(axis=0) + 1e-6        # of training data
    (X, y), *held_out = [((F - mean) / std, labels) for F, labels in parts]
    accuracies = []
    for share in SHARES:
        found = []                                      # draws, penalties, validation and test
        for draw in range(3 if share < 1 else 1):
            rows = np.random.default_rng((cfg.seed, draw)).permutation(len(y))
            rows = rows[:label_count(share, cfg)]
            onehot = np.eye(10, dtype=X.dtype)[y[rows]]
            fits = ridge_path(X[rows], onehot, PENALTIES)
            found.append([[((F @ W + b).argmax(axis=1) == labels).mean() for F, labels in held_out]
                          for W, b in fits])
        validation, test = np.mean(found, axis=0).T     # mean over the draws, for each penalty
        accuracies.append(float(test[validation.argmax()]))
    return accuracies


def compare_probes(params, cfg):
    """Linear probes on raw pixels, on an untrained encoder, on this one.   -> metrics."""
    def raw(images):
        return standardize(images).reshape(len(images), -1)

    def over_views(describe, images):
        return sum(describe(view) for view in views_of(images, cfg))
    untrained = init_images(cfg, np.random.default_rng(cfg.seed + 1))
    untrained, trained = (functools.partial(over_views, functools.partial(encoder_features, p, cfg))
                          for p in (untrained, params))
    rows = [("raw", "raw pixels", raw), ("untrained", "untrained encoder", untrained),
            ("probe", "this encoder", trained),
            ("raw_views", "raw pixels, all views", functools.partial(over_views, raw))]
    images, _ = images_of(cfg, "validation")
    views = len(views_of(images[:1], cfg))
    summed = f", summed over {views} views of every image" if views > 1 else ""
    print(f"Linear probe on frozen features{summed}:\ntest accuracy for each number of labels "
          f"({len(images)} more choose the penalty)")
    counts = [label_count(share, cfg) for share in SHARES]
    print(f"{'':22s}" + "".join(f"{count:9d}" for count in counts) + "  labels")
    found, metrics = {}, {}
    for name, text, describe in rows if views > 1 else rows[:3]:
        found[name] = probe(describe, cfg)
        print(f"{text:22s}" + "".join(f"{accuracy:9.2%}" for accuracy in found[name]))
        metrics.update({f"{name}_{count}": a for count, a in zip(counts, found[name])})
    ratios = [a / b for a, b in zip(found["probe"], found["raw"])]
    print(f"{'times raw pixels':22s}" + "".join(f"{ratio:9.2f}" for ratio in ratios))
    return {**metrics, "ratio": ratios[0]}


# ---- fine-tuning: the whole encoder on labels, beside the same net from scratch ------------------

def classifier_forward(params, x, heads):
    """The mean of the encoder's outputs over all patches, a linear layer.   x (N, T, P) -> (N, 10).
    """
    N, T, _ = x.shape
    every = np.tile(np.arange(T), (N, 1))               # nothing is masked
    z, encoder = encoder_forward(params, x, every, heads)
    logits, linear = linear_forward(z.reshape(N, T, -1).mean(axis=1), params["Wy"], params["by"])
    return logits, (encoder, linear, T)


def classifier_backward(dout, cache):
    """classifier_forward in reverse order -> gradients under the keys of params."""
    encoder, linear, T = cache
    dz, dWy, dby = linear_backward(dout, linear)
    dz = np.repeat(dz / T, T, axis=0)                   # each token has 1 / T of the mean
    return {**encoder_backward(dz, encoder), "Wy": dWy, "by": dby}


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


def classifier_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, labels = batch
    logits, cache = classifier_forward(params, x, cfg.heads)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels)
    return loss, classifier_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


def init_classifier(cfg, rng, dtype=np.float32):
    """The encoder's part of init_images; Wy, by."""
    params = {name: value for name, value in init_images(cfg, rng, dtype).items()
              if name[:3] == "enc" or name in ("Wp", "bp", "Penc")}
    params["Wy"] = (rng.standard_normal((cfg.dim, 10)) * (2 / cfg.dim) ** 0.5).astype(dtype)
    params["by"] = np.zeros(10, dtype)
    return params


def labelled_batch(cfg, step, dtype=np.float32):
    """Some of the images whose labels may be used.   -> patches (N, T, P), labels (N,)."""
    rng = np.random.default_rng((cfg.seed, step))
    images, labels = images_of(cfg, "train")
    rows = rng.integers(0, label_count(cfg.labels, cfg), cfg.batch_size)
    images = crop_and_flip(images[rows], cfg.crop, cfg.flip, rng)
    return to_patches(standardize(images, dtype), cfg.patch_size), labels[rows]


def finetune(params, cfg):
    """Train encoder and linear layer on labels, from params and from scratch.   -> metrics."""
    metrics, update = {}, functools.partial(adamw_update, weight_decay=cfg.weight_decay)
    steps = min(cfg.tune_steps, cfg.steps)
    cfg = replace(cfg, steps=steps, warmup=min(cfg.warmup, steps // 5))
    images, labels = images_of(cfg, "test")
    for name, start in (("finetuned", params), ("from_scratch", {})):
        own = init_classifier(cfg, np.random.default_rng(cfg.seed))
        own.update({key: start[key].copy() for key in own.keys() & start.keys()})
        print(f"\n{name.replace('_', ' ')}, on {label_count(cfg.labels, cfg)} labels; "
              "chance level: loss 2.303")
        losses = train(own, cfg, labelled_batch, classifier_loss_and_grads, update)

        def classify(x):
            views = [to_patches(standardize(view), cfg.patch_size) for view in views_of(x, cfg)]
            return sum(classifier_forward(own, view, cfg.heads)[0] for view in views)
        logits = in_chunks(classify, images, cfg)
        check_finite(float(logits.max()), own)
        metrics[name] = float((logits.argmax(axis=1) == labels).mean())
        print(f"{metrics[name]:.2%} of the test images right")
        if len(losses) < cfg.steps:
            break
    return metrics


def run_images(cfg):
    """Pre-train on images without labels, then probe the encoder, fine-tune it, or both."""
    require(cfg.data, "--data", "the data set (python mae.py --help says where)", cfg.data)
    start = time.perf_counter()
    params, losses, metrics = pretrain(cfg)
    if cfg.probe:
        metrics.update(compare_probes(params, cfg))
    if cfg.finetune and len(losses) >= cfg.steps:
        metrics.update(finetune(params, cfg))
    print("\nNext: python mae.py probe --mask-ratio 0.5   python mae.py finetune --labels 0.1   "
          "python vae.py")
    print_result(type(cfg).__name__.lower(), cfg, **metrics,
                 params=sum(p.size for p in params.values()), steps=len(losses),
                 seconds=time.perf_counter() - start)


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


def image_constraints(cfg):
    """What must hold between the values of every task."""
    size = getattr(cfg, "size", 16)                     # of Config: 16
    ok = cfg.patch_size > 0 and size % cfg.patch_size == 0
    yield ok, "--patch-size", f"a divisor of {size}", cfg.patch_size
    patches = (size // cfg.patch_size) ** 2
    for name in ("dim", "decoder_dim"):
        yield (getattr(cfg, name) % cfg.heads == 0, "--" + name.replace("_", "-"),
               f"a multiple of --heads {cfg.heads}", getattr(cfg, name))
    yield 0 < cfg.mask_ratio < 1, "--mask-ratio", "a number between 0 and 1", cfg.mask_ratio
    visible = round(patches * (1 - cfg.mask_ratio))
    yield (0 < visible < patches, "--mask-ratio",
           f"at least one patch masked and one visible of {patches}", cfg.mask_ratio)
    if isinstance(cfg, Probe):
        yield (cfg.threads <= cfg.batch_size, "--threads",
               f"at most --batch-size {cfg.batch_size}", cfg.threads)
        yield cfg.crop < size, "--crop", f"less than {size}", cfg.crop
        same = os.path.realpath(cfg.save) == os.path.realpath(cfg.data)
        yield not cfg.save or not same, "--save", "another file than --data", cfg.save
        yield not cfg.png or cfg.png not in (cfg.data, cfg.save), "--png", "another file", cfg.png
    if isinstance(cfg, Finetune):
        yield 0 < cfg.labels <= 1, "--labels", "a number above 0, up to 1", cfg.labels


CONSTRAINTS = dict.fromkeys((Config, Probe, Finetune, Cifar, Mnist), image_constraints)


def attention_case(rng):
    """Inputs of bidirectional_attention_forward, for gradcheck.py."""
    return dict(zip("qkv", rng.standard_normal((3, 2, 3, 5, 6))))


def gather_case(rng):
    """Inputs of gather_forward, for gradcheck.py."""
    return dict(x=rng.standard_normal((3, 5, 2)), ids=rng.random((3, 5)).argsort(axis=1)[:, :3])


GRADCHECK = {"bidirectional_attention": attention_case, "gather": gather_case}

TASKS = {"shapes": Task(Config, init_params, make_batch, loss_and_grads, main),
         "probe": Task(Probe, init_images, make_batch, mae_loss_and_grads, run_images),
         "finetune": Task(Finetune, init_classifier, labelled_batch, classifier_loss_and_grads,
                          run_images),
         "cifar": Task(Cifar, init_images, images_batch, mae_loss_and_grads, run_images),
         "mnist": Task(Mnist, init_images, images_batch, mae_loss_and_grads, run_images)}

if __name__ == "__main__":
    run(TASKS)
