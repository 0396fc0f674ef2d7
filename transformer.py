"""transformer.py: predict the next character with a transformer.

A recurrent network passes what it has read from step to step. Attention lets every position read
from itself and all earlier ones directly: each position emits a query q, a key k and a value v, and
receives the average of those values, weighted by how well their keys match its query.

Forward, a block (prenorm, residual):    x = x + attention(norm(x))        x = x + mlp(norm(x))
    head of size d:    p = softmax(q k^T / sqrt(d) + mask)    out = p v    mask hides the future
    norm:   xhat = (x - mean) / std, y = gamma xhat + beta      mlp:   y = gelu(x W1 + b1) W2 + b2
Backward:
    attention    dv = p^T dout    dp = dout v^T    ds_j = p_j (dp_j - sum_i p_i dp_i)
                 (softmax: p_i changes with score s_j by p_i ((i == j) - p_j), summed over i)
                 dq = ds k / sqrt(d)    dk = ds^T q / sqrt(d)
    norm         g = gamma dout    dx = (g - mean(g) - xhat mean(g xhat)) / std
    used twice   x (by the residual) and E (first and last matrix): their two gradients add

Run    python transformer.py                              a nursery rhyme, learned by heart
       python transformer.py text --data FILE             any UTF-8 text; --help lists more tasks

Papers: Vaswani et al. 2017, Ba et al. 2016 (LayerNorm), Hendrycks 2016 (GELU), Radford 2019 (GPT-2)
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
    """Learn a nursery rhyme by heart, character by character."""
    layers: int = 2         # transformer blocks
    heads: int = 4          # attention heads
    dim: int = 64           # embedding dimension
    context: int = 64       # characters that the model sees
    batch_size: int = 16    # sequences per step
    steps: int = 500        # optimizer steps
    lr: float = 0.003       # peak learning rate
    warmup: int = 100       # steps of linear warmup
    weight_decay: float = 0.01  # AdamW weight decay
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 0           # random seed


# ---- layers: B sequences, T positions, N = B T rows, D dim, H heads, d = D / H, V characters -----

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


def causal_attention_forward(q, k, v):
    """out = p v, p = softmax(q k^T / sqrt(d) + causal mask).   q, k, v, out (B, H, T, d)."""
    T, d = q.shape[2:]
    scores = q @ k.swapaxes(2, 3) * d ** -0.5           # (B, H, T, T)
    scores = np.where(np.tri(T, dtype=bool), scores, -1e9)      # the causal mask hides the future
    p = np.exp(scores - scores.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    return p @ v, (q, k, v, p)


def causal_attention_backward(dout, cache):
    """dv = p^T dout, dp = dout v^T, ds = p (dp - sum_s p dp), dq = ds k / sqrt(d),
    dk = ds^T q / sqrt(d).   The mask needs nothing: where p is 0, so is ds."""
    q, k, v, p = cache
    dv = p.swapaxes(2, 3) @ dout
    dp = dout @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(axis=3, keepdims=True))
    ds *= q.shape[3] ** -0.5
    return ds @ k, ds.swapaxes(2, 3) @ q, dv


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


# ---- data ----------------------------------------------------------------------------------------

VERSES = ["the house that Jack built.", "the malt\nThat lay in", "the rat,\nThat ate",
          "the cat,\nThat killed", "the dog,\nThat worried"]
# The verse of each part stands before all earlier ones: n, n - 1, ..., 0.
RHYME = "\n\n".join("This is " + " ".join(VERSES[n::-1]) for n in range(len(VERSES))) + "\n\n"
CHARS = sorted(set(RHYME))
TEXT = np.array([CHARS.index(c) for c in RHYME])


def make_batch(cfg, step, dtype=np.float32):
    """Random windows of the text -> ids (B, T), targets: the characters that follow (B, T)."""
    rng = np.random.default_rng((cfg.seed, step))
    starts = rng.integers(0, len(TEXT) - cfg.context, cfg.batch_size)
    windows = TEXT[starts[:, None] + np.arange(cfg.context + 1)]    # (B, T + 1), a start per row
    return windows[:, :-1], windows[:, 1:]


# ---- model: embeddings, blocks, a last norm, and the embeddings again ----------------------------

def init_params(cfg, rng, dtype=np.float32, vocab_size=len(CHARS)):
    """E (V, D), P (context, D): embeddings of characters and positions; gamma, beta: last norm;
    in block i, as "i.Wqkv": gamma1, beta1, Wqkv, bqkv, Wo, bo, gamma2, beta2, W1, b1, W2, b2."""
    D = cfg.dim
    params = {"E": 0.02 * rng.standard_normal((vocab_size, D)),
              "P": 0.02 * rng.standard_normal((cfg.context, D))}
    for i in range(cfg.layers):
        for name, n, m in (("qkv", D, 3 * D), ("o", D, D), ("1", D, 4 * D), ("2", 4 * D, D)):
            params[f"{i}.W{name}"] = rng.standard_normal((n, m)) * (2 / (n + m)) ** 0.5
            params[f"{i}.b{name}"] = np.zeros(m)
        for norm in "12":
            params[f"{i}.gamma{norm}"], params[f"{i}.beta{norm}"] = np.ones(D), np.zeros(D)
    params["gamma"], params["beta"] = np.ones(D), np.zeros(D)
    return {name: value.astype(dtype) for name, value in params.items()}


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def block_forward(x, p, heads, B, attend=causal_attention_forward):
    """x + attention(norm(x)), then x + mlp(norm(x)).   x (B T, D) -> (B T, D).   Later parts pass
    another attention."""
    y, norm1 = layernorm_forward(x, p["gamma1"], p["beta1"])
    y, qkv = linear_forward(y, p["Wqkv"], p["bqkv"])
    y = y.reshape(B, -1, 3, heads, x.shape[1] // heads)             # (B, T, 3, H, d)
    q, k, v = y.transpose(2, 0, 3, 1, 4)                            # (B, H, T, d) each
    y, attention = attend(q, k, v)
    y, out = linear_forward(y.swapaxes(1, 2).reshape(x.shape), p["Wo"], p["bo"])
    x = x + y
    y, norm2 = layernorm_forward(x, p["gamma2"], p["beta2"])
    y, up = linear_forward(y, p["W1"], p["b1"])
    y, gelu = gelu_forward(y)
    y, down = linear_forward(y, p["W2"], p["b2"])
    return x + y, (norm1, qkv, attention, out, norm2, up, gelu, down, q.shape)


def block_backward(dout, cache, attend_backward=causal_attention_backward):
    """block_forward in reverse order; x is used twice, so gradients add.   -> dx, gradients."""
    norm1, qkv, attention, out, norm2, up, gelu, down, (B, H, T, d) = cache
    g = {}
    dy, g["W2"], g["b2"] = linear_backward(dout, down)
    dy = gelu_backward(dy, gelu)
    dy, g["W1"], g["b1"] = linear_backward(dy, up)
    dy, g["gamma2"], g["beta2"] = layernorm_backward(dy, norm2)
    dout = dout + dy
    dy, g["Wo"], g["bo"] = linear_backward(dout, out)
    dy = dy.reshape(B, T, H, d).swapaxes(1, 2)                      # (B, H, T, d)
    dqkv = np.stack(attend_backward(dy, attention))                 # (3, B, H, T, d)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B * T, -1)         # (B T, 3 D)
    dy, g["Wqkv"], g["bqkv"] = linear_backward(dqkv, qkv)
    dy, g["gamma1"], g["beta1"] = layernorm_backward(dy, norm1)
    return dout + dy, g


def gpt_forward(params, ids, cfg, attend=causal_attention_forward):
    """ids (B, T) characters -> logits (B T, V) of the next one."""
    B, T = ids.shape
    x = params["E"][ids] + params["P"][:T]                          # (B, T, D)
    x, caches = x.reshape(B * T, -1), []
    for i in range(cfg.layers):
        x, cache = block_forward(x, part(params, f"{i}."), cfg.heads, B, attend)
        caches.append(cache)
    x, norm = layernorm_forward(x, params["gamma"], params["beta"])
    return x @ params["E"].T, (ids, caches, norm, x, params)


def gpt_backward(dout, cache, attend_backward=causal_attention_backward):
    """gpt_forward in reverse order -> gradients under the keys of params."""
    ids, caches, norm, x, params = cache
    grads = {"E": dout.T @ x, "P": np.zeros_like(params["P"])}      # E is used at the end ...
    dx, grads["gamma"], grads["beta"] = layernorm_backward(dout @ params["E"], norm)
    for i in reversed(range(len(caches))):
        dx, g = block_backward(dx, caches[i], attend_backward)
        grads.update({f"{i}.{name}": value for name, value in g.items()})
    np.add.at(grads["E"], ids.ravel(), dx)              # ... and at the beginning; ids may repeat
    grads["P"][:ids.shape[1]] = dx.reshape(*ids.shape, -1).sum(axis=0)      # added to each sequence
    return grads


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    ids, targets = batch
    logits, cache = gpt_forward(params, ids, cfg)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.ravel())
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, gpt_backward(dlogits, cache)


# ---- optimizer and training ----------------------------------------------------------------------

def clip_norm(grads, limit):
    """Scale all gradients so that their joint norm is at most limit, if limit is not 0 (Pascanu et
    al. 2013).   -> the norm before."""
    norm = math.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in grads.values()))
    if norm > limit > 0:
        for g in grads.values():
            g *= limit / norm
    return norm


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
          losses=None, note=lambda: "", after_step=lambda step: None):
    """Train params in place -> losses.   Later parts of the file pass their own functions."""
    state = {} if state is None else state
    losses = [] if losses is None else losses
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        clip_norm(grads, cfg.grad_clip)
        adamw_update(params, grads, state, learning_rate(step, cfg), cfg.weight_decay)
        losses.append(float(loss))
        after_step(step)
    check_finite(losses[-1], params)
    return losses


def print_result(task, cfg, **metrics):
    """The last line of a run, for comparing runs: task, changed fields and seed, metrics."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name == "seed" or getattr(cfg, f.name) != f.default}
    line = f"result: task={task}"
    for name, value in {**changed, **metrics}.items():
        text = f"{value:#.4g}" if isinstance(value, float) else str(value)
        line += f" {name}={text.replace(' ', '_')}"
    print(line)


def generate(params, cfg, ids, count, rng, temperature=0.5):
    """-> ids, continued by count characters, each drawn from softmax(logits / temperature)."""
    for _ in range(count):
        logits, _ = gpt_forward(params, ids[None, -cfg.context:], cfg)
        check_finite(logits[-1].max())
        p = np.exp((logits[-1].astype(float) - logits[-1].max()) / temperature)
        ids = np.append(ids, rng.choice(len(p), p=p / p.sum()))
    return ids


def draw_heads(maps, rows, columns):
    """Attention maps (H, T, S), four side by side: how much each row attends to each column."""
    print('Shades: " " is 0, "-" 0.1, "+" 0.3, "#" 0.5, "@" 1')
    shades = np.array(list(" .:-=+*#%@"))[(maps ** 0.5 * 9.99).astype(int)]
    for h in range(0, len(maps), 4):
        four = shades[h:h + 4]
        print("\n  " + "    ".join(["".join(columns)] * len(four)))
        for t, row in enumerate(rows):
            print("  ".join(f"{row} {''.join(lines[t])}" for lines in four))


def main(cfg):
    """Learn the rhyme, continue it, and show what each head of the last layer attends to."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    params = init_params(cfg, rng)
    size = sum(p.size for p in params.values())
    print(f"A rhyme of {len(TEXT)} characters, {len(CHARS)} different: {cfg.layers} layers, "
          f"{cfg.heads} heads, dim {cfg.dim}, {size} parameters")
    print(f"chance level: loss {math.log(len(CHARS)):.3f}")
    losses = train(params, cfg)
    sample = "".join(CHARS[i] for i in generate(params, cfg, TEXT[:8], 200, rng))
    print(f"\nThe first 8 characters of the rhyme, continued:\n\n{sample}")
    text = RHYME[:min(20, cfg.context)]
    _, (_, caches, *_) = gpt_forward(params, TEXT[None, :len(text)], cfg)
    norm1, qkv, (q, k, v, p), *_ = caches[-1]
    print("\nThe last layer, a map per head: each row attends to the columns up to its own")
    draw_heads(p[0], text, text)
    lines = [line for line in sample.split("\n") if len(line) > 3]
    recited = np.mean([line in RHYME for line in lines])            # share of lines in the rhyme
    print("\nNext: python transformer.py modern      python transformer.py --heads 1 --layers 1")
    print_result("rhyme", cfg, loss=losses[-1], recited=float(recited), params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest: KV cache, the modern block, positions, encoder, encoder-decoder, text, plumbing. ==

MORE = """
Tasks
    python transformer.py generate --prompt "This is the rat" --temperature 1 --top-k 3
    python transformer.py modern                RMSNorm, SwiGLU, rotary positions
    python transformer.py positions             five encodings, at and beyond the trained length
    python transformer.py fill                  masked characters, from both sides
    python transformer.py reverse, or sort      encoder-decoder; --norm prenorm
    python transformer.py text --data tinyshakespeare.txt       1.67 nats per character, 2 minutes
    python transformer.py text --data tinyshakespeare.txt --context 128 --batch-size 32 \\
        --lr 0.004 --steps 1800 --save ts.npz   larger windows: 1.52, 11 minutes
                                                generate --load ts.npz continues a prompt with it
    python transformer.py mnist --data mnist    rows of an image as tokens: 98 %

Break it (what to change, and what comes of it)
    block_forward: x = y and return y, ..., block_backward: dout = dy and return dy, g
        --layers 6: loss 2.71 instead of 0.05; two layers learn without residuals, six do not
    causal_attention_forward: np.where(True, ...)      loss 0.02, and not one line is recited: the
                                                       model reads off the answer from the future
    gpt_forward: 0 * params["P"]                       0.055 instead of 0.052: the causal mask alone
                                                       tells positions apart
    encdec_forward: 0 * table[:S]                      reverse: 23 % instead of 100 %; sort: 95 %,
                                                       for sorting a set is nearly enough
    encdec_forward: source != -1 for source != PAD     reverse: still 100 %, but other padding
                                                       changes the logits by 14
    fill_loss_and_grads, run_fill: without attention_forward, attention_backward (so: causal)
        fill: 88 % instead of 95 %

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python transformer.py --heads 1, 2, 8, 16: which loss, which maps?
    2. Derive and add squared ReLU in place of GELU (relu2_forward, relu2_backward).
    3. Give every head a learned temperature: scores times exp(tau), tau (H,). What is dtau?

Data
    curl -o tinyshakespeare.txt \\
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    mnist: python mlp.py --help says where to get it

Papers of these parts: Devlin et al. 2019 (masked tokens), Zhang and Sennrich 2019 (RMSNorm),
Shazeer 2020 (SwiGLU), Xiong et al. 2020 (prenorm), Dosovitskiy et al. 2021 (images as tokens),
Su et al. 2021 (rotary positions), Press et al. 2022 (ALiBi).
"""

import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import json
import re
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- attention with any mask ---------------------------------------------------------------------
# The sections below pass other kinds of attention to block_forward and gpt_forward: functions of
# q, k, v that return the output and a cache.

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


# ---- KV cache: python transformer.py generate --prompt "This is the rat" --temperature 1 ---------
# A position does not depend on later ones, so its keys and values never change. They are cached,
# and a new character costs the computation of one position instead of all.

@dataclass
class Generate(Config):
    """Continue a prompt with cached keys and values, and without."""
    prompt: str = "This is"  # beginning of the sample
    count: int = 400        # characters to generate
    temperature: float = 0.5  # divisor of the logits: below 1 it favours likely characters
    top_k: int = 0          # number of likeliest characters to draw from; 0: all
    load: str = ""          # checkpoint of the task text; none: learn the rhyme first


def cached_attention(q, k, v, past):
    """Attention of T new positions to those in past, a dict of keys and values, and to themselves;
    theirs are added to past.   q, k, v (B, H, T, d) -> out (B, H, T, d), None: no backward pass."""
    k = past["k"] = np.concatenate([past["k"], k], axis=2)      # (B, H, S, d)
    v = past["v"] = np.concatenate([past["v"], v], axis=2)
    T, S = q.shape[2], k.shape[2]
    causal_mask = np.tri(T, S, S - T, dtype=bool)               # the first of the T is number S - T
    out, _ = attention_forward(q, k, v, causal_mask)
    return out, None


def empty_cache(cfg, dtype):
    """A dict per layer, with the keys and values of no position, each (1, H, 0, d)."""
    none = np.zeros((1, cfg.heads, 0, cfg.dim // cfg.heads), dtype)
    return [{"k": none, "v": none} for _ in range(cfg.layers)]


def gpt_next(params, ids, cfg, past):
    """Logits (V,) of the character after ids (T,), which continue the positions in past."""
    start = past[0]["k"].shape[2]
    x = params["E"][ids] + params["P"][start:start + len(ids)]          # (T, D)
    for i in range(cfg.layers):
        attend = functools.partial(cached_attention, past=past[i])
        x, _ = block_forward(x, part(params, f"{i}."), cfg.heads, 1, attend)
    x, _ = layernorm_forward(x[-1:], params["gamma"], params["beta"])
    return (x @ params["E"].T)[0]


def sample(params, cfg, ids, count, rng, next_logits, temperature=0.5, top_k=0, cached=True):
    """-> the list ids, continued by count characters, each drawn from softmax(logits / temperature)
    of the top_k likeliest. When the context is full, its second half is read anew."""
    ids, past = list(ids), None
    first = max(0, len(ids) - cfg.context)              # where the context begins
    for _ in range(count):
        if len(ids) - first > cfg.context:
            first, past = len(ids) - cfg.context // 2, None
        if past is None or not cached:
            new, past = ids[first:], empty_cache(cfg, params["E"].dtype)
        logits = next_logits(params, np.array(new), cfg, past).astype(float)
        check_finite(logits.max())
        least = np.sort(logits)[-top_k:][0]             # of the top_k; if 0, of all: [-0:] is [0:]
        logits = np.where(logits < least, -np.inf, logits)
        p = np.exp((logits - logits.max()) / temperature)
        new = [int(rng.choice(len(p), p=p / p.sum()))]
        ids += new
    return ids


def run_generate(cfg):
    """Learn the rhyme or load a model, then generate the same text with and without the cache."""
    start, chars, next_logits = time.perf_counter(), CHARS, gpt_next
    params = init_params(cfg, np.random.default_rng(cfg.seed))
    if cfg.load:
        meta, _, arrays = read_checkpoint(cfg.load)
        require(meta.get("model") in MODELS, f"--load {cfg.load}", "a file of transformer.py text",
                meta.get("model"))
        cfg = replace(cfg, **{name: meta[name] for name in ("layers", "heads", "dim", "context")})
        params, chars = part(arrays, "params "), meta["chars"]
        *_, next_logits = MODELS[meta["model"]]
    require(cfg.prompt and set(cfg.prompt) <= set(chars), "--prompt", "characters of the text",
            cfg.prompt)
    print(f"{cfg.load or 'The rhyme'}: {cfg.layers} layers, {cfg.heads} heads, dim {cfg.dim}")
    if not cfg.load:
        print(f"chance level: loss {math.log(len(CHARS)):.3f}")
        train(params, cfg)
    prompt, texts, seconds = [chars.index(c) for c in cfg.prompt], [], []
    for cached in (True, False):
        begin, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
        texts.append(sample(params, cfg, prompt, cfg.count, rng, next_logits, cfg.temperature,
                            cfg.top_k, cached))
        seconds.append(time.perf_counter() - begin)
    print("\n" + "".join(chars[i] for i in texts[0]))
    for name, s in zip(("with the cache", "without"), seconds):
        print(f"{name:>14s}: {1000 * s / cfg.count:.2f} ms per character")
    print("the same text" if texts[0] == texts[1] else "not the same text")
    print("\nNext: python transformer.py --context 32      python transformer.py modern")
    print_result("generate", cfg, same=float(texts[0] == texts[1]), speedup=seconds[1] / seconds[0],
                 seconds=time.perf_counter() - start)


# ---- the modern block: python transformer.py modern ----------------------------------------------
# LLaMA's choices in place of GPT-2's: RMSNorm for LayerNorm, SwiGLU for GELU, rotary positions for
# learned ones, no biases. Shazeer 2020, Su 2021, Touvron 2023, Zhang and Sennrich 2019.

@dataclass
class Modern(Config):
    """Learn the rhyme with RMSNorm, SwiGLU and rotary positions, and as GPT-2 does."""


def rmsnorm_forward(x, gamma, eps=1e-5):
    """y = gamma xhat, xhat = x / sqrt(mean(x^2) + eps), per row.   x (N, D)."""
    inv_rms = ((x * x).mean(axis=1, keepdims=True) + eps) ** -0.5
    xhat = x * inv_rms
    return gamma * xhat, (xhat, gamma, inv_rms)


def rmsnorm_backward(dout, cache):
    """g = gamma dout, dx = (g - xhat mean(g xhat)) / rms, dgamma = sum_n dout xhat."""
    xhat, gamma, inv_rms = cache
    g = gamma * dout
    dx = (g - xhat * (g * xhat).mean(axis=1, keepdims=True)) * inv_rms
    return dx, (dout * xhat).sum(axis=0)


def swiglu_forward(gate, up):
    """y = silu(gate) up, silu(z) = z / (1 + e^-z).   gate, up, y (N, M)."""
    s = 0.5 + 0.5 * np.tanh(0.5 * gate)                 # the sigmoid, without overflow
    return gate * s * up, (gate, up, s)


def swiglu_backward(dout, cache):
    """dgate = dout up (s + gate s (1 - s)), dup = dout silu(gate): the product rule."""
    gate, up, s = cache
    dgate = dout * up * (s + gate * s * (1 - s))
    return dgate, dout * gate * s


def rope_angles(positions, d, dtype):
    """cos and sin of t / 10000^(2 j / d) for all positions t.   -> (T, d / 2) each."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope_forward(x, cos, sin):
    """Rotate each pair (x_j, x_{j + d/2}) of position t by the angle t / 10000^(2 j / d). Then
    q_t k_s depends on t - s, not on t or s alone.   x (B, H, T, d), cos, sin (T, d / 2)."""
    a, b = np.split(x, 2, axis=3)
    y = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=3)
    return y, (cos, sin)


def rope_backward(dout, cache):
    """The inverse rotation: sin changes its sign."""
    cos, sin = cache
    return rope_forward(dout, cos, -sin)[0]


def rotary_attention_forward(q, k, v):
    """Causal attention of rotated queries and keys.   q, k, v (B, H, T, d) -> out (B, H, T, d)."""
    cos, sin = rope_angles(np.arange(q.shape[2]), q.shape[3], q.dtype)
    q, rope = rope_forward(q, cos, sin)
    k, rope = rope_forward(k, cos, sin)
    out, attention = causal_attention_forward(q, k, v)
    return out, (rope, attention)


def rotary_attention_backward(dout, cache):
    """rotary_attention_forward in reverse order.   -> dq, dk, dv."""
    rope, attention = cache
    dq, dk, dv = causal_attention_backward(dout, attention)
    return rope_backward(dq, rope), rope_backward(dk, rope), dv


def init_modern(cfg, rng, dtype=np.float32, vocab_size=len(CHARS)):
    """E (V, D); "0.Wqkv", ... in block 0: gamma1, Wqkv, Wo, gamma2, Wgate, Wup, Wdown; gamma."""
    D, M = cfg.dim, 8 * round(cfg.dim / 3)              # 8 / 3 D: as many parameters as with 4 D
    shapes = dict(Wqkv=(D, 3 * D), Wo=(D, D), Wgate=(D, M), Wup=(D, M), Wdown=(M, D))
    params = {"E": 0.02 * rng.standard_normal((vocab_size, D)), "gamma": np.ones(D)}
    for i in range(cfg.layers):
        params[f"{i}.gamma1"], params[f"{i}.gamma2"] = np.ones(D), np.ones(D)
        for name, (n, m) in shapes.items():
            params[f"{i}.{name}"] = rng.standard_normal((n, m)) * (2 / (n + m)) ** 0.5
    return {name: value.astype(dtype) for name, value in params.items()}


def modern_block_forward(x, p, heads, B, attend=rotary_attention_forward):
    """x + attention(norm(x)), then x + mlp(norm(x)).   x (B T, D) -> (B T, D)."""
    y, norm1 = rmsnorm_forward(x, p["gamma1"])
    qkv = (y @ p["Wqkv"]).reshape(B, -1, 3, heads, x.shape[1] // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)                          # (B, H, T, d) each
    a, attention = attend(q, k, v)
    a = a.swapaxes(1, 2).reshape(x.shape)
    x = x + a @ p["Wo"]
    z, norm2 = rmsnorm_forward(x, p["gamma2"])
    h, swiglu = swiglu_forward(z @ p["Wgate"], z @ p["Wup"])        # (B T, M)
    cache = y, norm1, a, attention, z, norm2, h, swiglu, p, q.shape
    return x + h @ p["Wdown"], cache


def modern_block_backward(dout, cache):
    """modern_block_forward in reverse order.   -> dx, gradients."""
    y, norm1, a, attention, z, norm2, h, swiglu, p, (B, H, T, d) = cache
    g = {"Wdown": h.T @ dout}
    dgate, dup = swiglu_backward(dout @ p["Wdown"].T, swiglu)
    g["Wgate"], g["Wup"] = z.T @ dgate, z.T @ dup
    dz = dgate @ p["Wgate"].T + dup @ p["Wup"].T
    dz, g["gamma2"] = rmsnorm_backward(dz, norm2)
    dout = dout + dz
    g["Wo"] = a.T @ dout
    da = (dout @ p["Wo"].T).reshape(B, T, H, d).swapaxes(1, 2)
    dqkv = np.stack(rotary_attention_backward(da, attention))       # (3, B, H, T, d)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B * T, -1)         # (B T, 3 D)
    g["Wqkv"] = y.T @ dqkv
    dy, g["gamma1"] = rmsnorm_backward(dqkv @ p["Wqkv"].T, norm1)
    return dout + dy, g


def modern_forward(params, ids, cfg):
    """ids (B, T) characters -> logits (B T, V) of the next one."""
    x, caches = params["E"][ids].reshape(ids.size, -1), []
    for i in range(cfg.layers):
        x, cache = modern_block_forward(x, part(params, f"{i}."), cfg.heads, len(ids))
        caches.append(cache)
    x, norm = rmsnorm_forward(x, params["gamma"])
    return x @ params["E"].T, (ids, caches, norm, x, params)


def modern_backward(dout, cache):
    """modern_forward in reverse order -> gradients under the keys of params."""
    ids, caches, norm, x, params = cache
    grads = {"E": dout.T @ x}
    dx, grads["gamma"] = rmsnorm_backward(dout @ params["E"], norm)
    for i in reversed(range(len(caches))):
        dx, g = modern_block_backward(dx, caches[i])
        grads.update({f"{i}.{name}": value for name, value in g.items()})
    np.add.at(grads["E"], ids.ravel(), dx)
    return grads


def modern_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    ids, targets = batch
    logits, cache = modern_forward(params, ids, cfg)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.ravel())
    return loss, modern_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


def cached_rotary_attention(q, k, v, past):
    """cached_attention with rotated queries and keys."""
    start = past["k"].shape[2]
    cos, sin = rope_angles(start + np.arange(q.shape[2]), q.shape[3], q.dtype)
    return cached_attention(rope_forward(q, cos, sin)[0], rope_forward(k, cos, sin)[0], v, past)


def modern_next(params, ids, cfg, past):
    """Logits (V,) of the character after ids (T,), which continue the positions in past."""
    x = params["E"][ids]
    for i in range(cfg.layers):
        attend = functools.partial(cached_rotary_attention, past=past[i])
        x, _ = modern_block_forward(x, part(params, f"{i}."), cfg.heads, 1, attend)
    x, _ = rmsnorm_forward(x[-1:], params["gamma"])
    return (x @ params["E"].T)[0]


MODELS = {"gpt": (init_params, loss_and_grads, gpt_forward, gpt_next),
          "modern": (init_modern, modern_loss_and_grads, modern_forward, modern_next)}


def run_modern(cfg):
    """Train both forms on the rhyme."""
    start, metrics = time.perf_counter(), {}
    print(f"chance level: loss {math.log(len(CHARS)):.3f}")
    for name, (init, loss_of, *_) in MODELS.items():
        params = init(cfg, np.random.default_rng(cfg.seed))
        metrics[f"{name}_params"] = sum(p.size for p in params.values())
        print(f"\n{name}: {metrics[f'{name}_params']} parameters")
        losses = train(params, cfg, loss_and_grads=loss_of)
        metrics[f"{name}_loss"] = losses[-1]
        if len(losses) < cfg.steps:
            break
    print("\nNext: python transformer.py positions      python transformer.py generate")
    print_result("modern", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- positions: python transformer.py positions --------------------------------------------------
# Attention does not depend on the order of its keys, so positions have to be encoded. GPT-2 adds a
# learned vector per position, Vaswani 2017 sines and cosines; Su 2021 rotates q and k; Press 2022
# (ALiBi) lowers scores with distance. Without an encoding the causal mask alone tells positions
# apart.

@dataclass
class Positions(Config):
    """Compare position encodings at the trained length and beyond."""
    context: int = 32       # characters that the model sees in training
    steps: int = 300        # optimizer steps, for each encoding
    position: Literal["learned", "sinusoidal", "none", "rotary", "alibi"] = "learned"  # encoding
    compare: bool = True    # train with all encodings in turn; else with --position only


def sinusoids(T, D, dtype):
    """sin and cos of t / 10000^(2 j / D).   -> (T, D)."""
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :D].astype(dtype)


def alibi_attention_forward(q, k, v):
    """Causal attention with scores q k^T / sqrt(d) - slope_h (t - s), slope_h = 2^(-8 h / H) for
    h = 1 ... H.   q, k, v, out (B, H, T, d)."""
    H, T, d = q.shape[1:]
    slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)
    distance = np.arange(T)[:, None] - np.arange(T)                 # (T, T): t - s
    bias = (-slopes[:, None, None] * distance).astype(q.dtype)      # (H, T, T)
    scores = q @ k.swapaxes(2, 3) * d ** -0.5 + bias                # (B, H, T, T)
    scores = np.where(distance >= 0, scores, -1e9)
    p = np.exp(scores - scores.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    return p @ v, (q, k, v, p)


CAUSAL = causal_attention_forward, causal_attention_backward
POSITIONS = {"learned": CAUSAL, "sinusoidal": CAUSAL, "none": CAUSAL,
             "rotary": (rotary_attention_forward, rotary_attention_backward),
             "alibi": (alibi_attention_forward, causal_attention_backward)}     # a constant bias


def random_verses(rng, B, T):
    """Verses of the rhyme in random order, cut into B windows.   -> ids (B, T)."""
    text = "\n".join(rng.choice(VERSES, B * T // 16 + 1))           # each has over 16 characters
    return np.searchsorted(CHARS, list(text[:B * T])).reshape(B, T)     # indices into CHARS


def positions_batch(cfg, step, dtype=np.float32):
    """Windows of random verses -> ids (B, T), targets (B, T)."""
    rng = np.random.default_rng((cfg.seed, step))
    windows = random_verses(rng, cfg.batch_size, cfg.context + 1)
    return windows[:, :-1], windows[:, 1:]


def init_positions(cfg, rng, dtype=np.float32):
    """init_params with P for four times the context if it is learned, else without P."""
    params = init_params(replace(cfg, context=4 * cfg.context), rng, dtype)
    if cfg.position != "learned":
        del params["P"]
    return params


def positions_forward(params, ids, cfg):
    """gpt_forward with the attention of cfg.position, and with P learned, sinusoidal or 0."""
    T, dtype = ids.shape[1], params["E"].dtype
    fixed = np.zeros((T, cfg.dim), dtype)
    if cfg.position == "sinusoidal":
        fixed = 0.02 * sinusoids(T, cfg.dim, dtype)                 # as large as E at first
    P = params.get("P", fixed)
    attend, _ = POSITIONS[cfg.position]
    return gpt_forward({**params, "P": P}, ids, cfg, attend)


def positions_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    ids, targets = batch
    logits, cache = positions_forward(params, ids, cfg)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.ravel())
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    _, attend_backward = POSITIONS[cfg.position]
    grads = gpt_backward(dlogits, cache, attend_backward)
    return loss, {name: grads[name] for name in params}             # none of a fixed P


def run_positions(cfg):
    """Train with each encoding; measure the loss on fresh verses, at three lengths."""
    start, table, lengths = time.perf_counter(), {}, [n * cfg.context for n in (1, 2, 4)]
    print(f"Verses in random order, windows of {cfg.context}: {cfg.layers} layers, dim {cfg.dim}")
    print(f"chance level: loss {math.log(len(CHARS)):.3f}")
    chosen = {cfg.position: POSITIONS[cfg.position]}
    for position in POSITIONS if cfg.compare else chosen:
        print(f"\n{position}")
        one = replace(cfg, position=position)
        params = init_positions(one, np.random.default_rng(cfg.seed))
        losses = train(params, one, positions_batch, positions_loss_and_grads)
        table[position] = []
        for T in lengths:
            windows = random_verses(np.random.default_rng((cfg.seed, 10 ** 6)), 50, T + 1)
            logits, _ = positions_forward(params, windows[:, :-1], one)
            loss, _ = softmax_cross_entropy_forward(logits, windows[:, 1:].ravel())
            table[position].append(float(loss))
        check_finite(np.max(table[position]), params)
        if len(losses) < cfg.steps:
            break
    floor = math.log(len(VERSES)) / np.mean([len(verse) + 1 for verse in VERSES])
    print(f"\nLoss on fresh verses; at best {floor:.3f}, since their order is random. Columns: "
          f"length of\nthe windows (trained: {cfg.context})")
    print(" " * 12 + "".join(f"{T:8d}" for T in lengths))
    for position, row in table.items():
        print(f"{position:12s}" + "".join(f"{loss:8.3f}" for loss in row))
    print("\nNext: python transformer.py fill      python transformer.py reverse")
    print_result("positions", cfg, **{f"{name}_x4": row[2] for name, row in table.items()},
                 seconds=time.perf_counter() - start)


# ---- the encoder: python transformer.py fill -----------------------------------------------------
# Without the causal mask every position attends to both sides (Devlin 2019, BERT). Predicting the
# next character would be copying, since attention reaches it; so the model fills in masked ones.

@dataclass
class Fill(Config):
    """Fill in masked characters from both sides."""
    context: int = 32       # characters that the model sees
    steps: int = 800        # optimizer steps
    mask_ratio: float = 0.2  # share of masked characters


MASK = len(CHARS)           # the character that stands for a masked one


def fill_batch(cfg, step, dtype=np.float32):
    """-> ids (B, T) with some replaced by MASK, targets (B, T): what they were; -1 elsewhere."""
    rng = np.random.default_rng((cfg.seed, step))
    ids = random_verses(rng, cfg.batch_size, cfg.context)
    masked = rng.random(ids.shape) < cfg.mask_ratio
    masked[~masked.any(axis=1), rng.integers(cfg.context)] = True   # one or more per window
    return np.where(masked, MASK, ids), np.where(masked, ids, -1)


def init_fill(cfg, rng, dtype=np.float32):
    """init_params with one more character: MASK."""
    return init_params(cfg, rng, dtype, len(CHARS) + 1)


def fill_loss_and_grads(params, batch, cfg):
    """The GPT without the causal mask, and a loss on the masked characters only."""
    ids, targets = batch
    masked = np.flatnonzero(targets >= 0)
    logits, cache = gpt_forward(params, ids, cfg, attention_forward)
    loss, loss_cache = softmax_cross_entropy_forward(logits[masked], targets.ravel()[masked])
    dlogits = np.zeros_like(logits)
    dlogits[masked] = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, gpt_backward(dlogits, cache, attention_backward)


def run_fill(cfg):
    """Train, fill in fresh verses, and show what each head of the last layer attends to."""
    start = time.perf_counter()
    params = init_fill(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"Verses in random order, {cfg.mask_ratio:.0%} of the characters masked: {cfg.layers} "
          f"layers, {cfg.heads} heads, dim {cfg.dim}, {size} parameters")
    print(f"chance level: loss {math.log(len(CHARS)):.3f}")
    losses = train(params, cfg, fill_batch, fill_loss_and_grads)
    ids, targets = fill_batch(replace(cfg, batch_size=200), 10 ** 6)
    logits, (_, caches, *_) = gpt_forward(params, ids, cfg, attention_forward)
    guess = logits[:, :MASK].argmax(axis=1).reshape(ids.shape)
    masked = targets >= 0
    right = float((guess == targets)[masked].mean())
    check_finite(logits.max(), params)
    common = np.bincount(targets[masked]).max() / masked.sum()
    shown = [*CHARS, "?"]                                           # MASK is shown as ?
    print()
    for name, row in (("masked", ids[0]), ("filled in", np.where(masked, guess, ids)[0]),
                      ("the text", np.where(masked, targets, ids)[0])):
        print(f"{name:>9s}: " + "".join(shown[i] for i in row).replace("\n", "/"))
    print(f"{right:.1%} of the masked characters of fresh verses right; always the most frequent "
          f"one: {common:.1%}\n")
    norm1, qkv, (q, k, v, p), *_ = caches[-1]
    text = "".join(shown[i] for i in ids[0, :20]).replace("\n", "/")
    print("The last layer, a map per head: each row attends to the columns on both sides")
    draw_heads(p[0, :, :20, :20], text, text)
    print("\nNext: python transformer.py reverse      python transformer.py sort")
    print_result("fill", cfg, right=right, common=common, loss=losses[-1], params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- images: python transformer.py mnist --data mnist --------------------------------------------
# The rows of an image are the tokens (square patches in Dosovitskiy 2021 and mae.py); the mean of
# the encoder's outputs is classified.

@dataclass
class Mnist:
    """Classify handwritten digits, whose rows are the tokens."""
    layers: int = 2         # transformer blocks
    heads: int = 4          # attention heads
    dim: int = 64           # embedding dimension
    batch_size: int = 64    # images per step
    steps: int = 2000       # optimizer steps
    lr: float = 0.002       # peak learning rate
    warmup: int = 100       # steps of linear warmup
    weight_decay: float = 0.01  # AdamW weight decay
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    threads: int = 2        # micro-batches, each on a thread of its own
    data: str = ""          # folder of MNIST
    save: str = ""          # checkpoint file (.npz), written every 200 steps
    load: str = ""          # checkpoint file to resume from
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


def init_mnist(cfg, rng, dtype=np.float32):
    """init_params for 28 positions, where E (10, D) is only the output matrix; Wp (28, D), bp:
    embedding of a row of pixels."""
    params = init_params(Config(cfg.layers, cfg.heads, cfg.dim, 28), rng, dtype, 10)
    params["Wp"] = (rng.standard_normal((28, cfg.dim)) * 28 ** -0.5).astype(dtype)
    params["bp"] = np.zeros(cfg.dim, dtype)
    return params


def mnist_batch(cfg, step, dtype=np.float32):
    """Random images of the training part.   -> images (B, 784), labels (B,)."""
    rng = np.random.default_rng((cfg.seed, step))
    images, labels = load_mnist(cfg.data)["train"]
    pick = rng.integers(0, len(images), cfg.batch_size)
    return images[pick].astype(dtype), labels[pick]


def mnist_forward(params, images, cfg):
    """images (B, 784): T = 28 rows of 28 pixels -> logits (B, 10)."""
    B, T = len(images), 28
    x, embed = linear_forward(images.reshape(B * T, 28), params["Wp"], params["bp"])
    x = x.reshape(B, T, -1) + params["P"]                           # (B, T, D)
    x, caches = x.reshape(B * T, -1), []
    for i in range(cfg.layers):
        p = part(params, f"{i}.")
        x, cache = block_forward(x, p, cfg.heads, B, attention_forward)
        caches.append(cache)
    x, norm = layernorm_forward(x, params["gamma"], params["beta"])
    x = x.reshape(B, T, -1).mean(axis=1)                            # (B, D)
    return x @ params["E"].T, (embed, caches, norm, x, (B, T), params)


def mnist_backward(dout, cache):
    """mnist_forward in reverse order -> gradients under the keys of params."""
    embed, caches, norm, x, (B, T), params = cache
    grads = {"E": dout.T @ x}
    dx = np.repeat(dout @ params["E"] / T, T, axis=0)               # the mean of T tokens
    dx, grads["gamma"], grads["beta"] = layernorm_backward(dx, norm)
    for i in reversed(range(len(caches))):
        dx, g = block_backward(dx, caches[i], attention_backward)
        grads.update({f"{i}.{name}": value for name, value in g.items()})
    grads["P"] = dx.reshape(B, T, -1).sum(axis=0)
    _, grads["Wp"], grads["bp"] = linear_backward(dx, embed)
    return grads


def mnist_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    images, labels = batch
    logits, cache = mnist_forward(params, images, cfg)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels)
    return loss, mnist_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


def classify(params, images, cfg):
    """-> the most probable class of each image (N, 784)."""
    chunks = np.array_split(images, math.ceil(len(images) / 500))
    logits = [mnist_forward(params, chunk, cfg)[0] for chunk in chunks]
    return np.concatenate(logits).argmax(axis=1)


def run_mnist(cfg):
    """Train on MNIST, report the accuracy on the test set, and show errors."""
    start = time.perf_counter()
    require(cfg.data, "--data", "the folder of MNIST (python mlp.py --help says where)", cfg.data)
    data = load_mnist(cfg.data)
    params = init_mnist(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"{len(data['train'][0])} images as 28 rows: {cfg.layers} layers, {cfg.heads} heads, "
          f"dim {cfg.dim}, {size} parameters")
    print("chance level: loss 2.303")

    def accuracy(part, n=None):
        images, labels = data[part]
        return float((classify(params, images[:n], cfg) == labels[:n]).mean())

    meta = dict(task="mnist", heads=cfg.heads)
    losses = train_long(params, cfg, meta, mnist_batch, mnist_loss_and_grads,
                        lambda: f"  validation {accuracy('validation', 1000):.1%}")
    check_finite(losses[-1], params)
    images, labels = data["test"]
    guess = classify(params, images, cfg)
    wrong = np.flatnonzero(guess != labels)[:3]
    ink = (images[wrong].reshape(-1, 14, 2, 28).mean(axis=2) + 0.4) / 3     # about 0 to 1
    print("\nErrors on the test set, drawn with half of their rows; \" \" is paper, \"@\" is ink")
    print("   ".join(f"a {labels[n]}, read as {guess[n]}".ljust(28) for n in wrong))
    shades = np.array(list(" .:-=+*#%@"))[(np.clip(ink, 0, 1) * 9.99).astype(int)]
    for lines in shades.swapaxes(0, 1):
        print("   ".join("".join(line) for line in lines))
    print("\nNext: python transformer.py reverse      python mae.py mnist --data mnist")
    print_result("mnist", cfg, accuracy=float((guess == labels).mean()), params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- the encoder-decoder: python transformer.py reverse, or sort ---------------------------------
# The transformer of 2017: the encoder reads the source; the decoder writes the targets and attends
# to what it has written and to the encoder's output (cross-attention). Around every sublayer f
# stands a residual connection: norm(x + f(x)) in 2017 (postnorm), x + f(norm(x)) since GPT-2, 2019
# (prenorm; Xiong 2020 shows why it trains more easily).

PAD, BOS, EOS = 0, 1, 2     # padding, beginning and end of a sequence
TOKEN_CHARS = " <>0123456789"   # a character per token; digit n is token n + 3


@dataclass
class Reverse(Config):
    """Write a sequence of digits backwards."""
    layers: int = 1         # layers of the encoder, and of the decoder
    norm: Literal["postnorm", "prenorm"] = "postnorm"  # norm(x + f(x)) or x + f(norm(x))
    context: int = 8        # most digits of a sequence
    batch_size: int = 64    # sequences per step
    steps: int = 700        # optimizer steps
    lr: float = 0.005       # peak learning rate


@dataclass
class Sort(Reverse):
    """Write the digits of a sequence in order."""
    batch_size: int = 128   # sequences per step
    steps: int = 900        # optimizer steps


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


def self_attention_forward(x, p, heads, B, mask):
    """multihead_forward with x as its own memory."""
    return multihead_forward(x, p, heads, B, mask, memory=x)


def self_attention_backward(dout, cache):
    """x is used twice, so gradients add.   -> dx, gradients."""
    dx, g, dmemory = multihead_backward(dout, cache)
    return dx + dmemory, g


def ffn_forward(x, p):
    """y = gelu(x W1 + b1) W2 + b2.   x (N, D) -> (N, D)."""
    y, up = linear_forward(x, p["W1"], p["b1"])
    y, gelu = gelu_forward(y)
    y, down = linear_forward(y, p["W2"], p["b2"])
    return y, (up, gelu, down)


def ffn_backward(dout, cache):
    """ffn_forward in reverse order.   -> dx, gradients."""
    up, gelu, down = cache
    g = {}
    dy, g["W2"], g["b2"] = linear_backward(dout, down)
    dy, g["W1"], g["b1"] = linear_backward(gelu_backward(dy, gelu), up)
    return dy, g


def prenorm_forward(x, p, sublayer, *arguments):
    """x + f(norm(x)); sublayer: the functions f_forward, f_backward.   x (N, D) -> (N, D)."""
    f_forward, f_backward = sublayer
    y, norm = layernorm_forward(x, p["gamma"], p["beta"])
    y, cache = f_forward(y, p, *arguments)
    return x + y, (norm, cache, f_backward)


def prenorm_backward(dout, cache):
    """prenorm_forward in reverse order.   -> dx, gradients, and dmemory if f has a memory."""
    norm, cache, f_backward = cache
    dy, g, *dmemory = f_backward(dout, cache)
    dy, g["gamma"], g["beta"] = layernorm_backward(dy, norm)
    return dout + dy, g, *dmemory


def postnorm_forward(x, p, sublayer, *arguments):
    """norm(x + f(x)); sublayer: the functions f_forward, f_backward.   x (N, D) -> (N, D)."""
    f_forward, f_backward = sublayer
    y, cache = f_forward(x, p, *arguments)
    y, norm = layernorm_forward(x + y, p["gamma"], p["beta"])
    return y, (norm, cache, f_backward)


def postnorm_backward(dout, cache):
    """postnorm_forward in reverse order.   -> dx, gradients, and dmemory if f has a memory."""
    norm, cache, f_backward = cache
    dout, dgamma, dbeta = layernorm_backward(dout, norm)
    dx, g, *dmemory = f_backward(dout, cache)
    return dout + dx, {**g, "gamma": dgamma, "beta": dbeta}, *dmemory


SELF_ATTENTION = self_attention_forward, self_attention_backward
CROSS_ATTENTION = multihead_forward, multihead_backward
MLP = ffn_forward, ffn_backward
RESIDUALS = {"prenorm": (prenorm_forward, prenorm_backward),
             "postnorm": (postnorm_forward, postnorm_backward)}


def encdec_layer_forward(x, p, norm, sublayers):
    """The sublayers (name, f, arguments of f) in turn, each in a residual connection.
    x (N, D) -> (N, D)."""
    residual_forward, residual_backward = RESIDUALS[norm]
    caches = {}
    for name, f, *arguments in sublayers:
        x, caches[name] = residual_forward(x, part(p, name + "."), f, *arguments)
    return x, (caches, residual_backward)


def encdec_layer_backward(dout, cache):
    """In reverse order.   -> dx, gradients, and dmemory if an f has a memory."""
    caches, residual_backward = cache
    grads, dmemory = {}, []
    for name in reversed(caches):
        dout, g, *more = residual_backward(dout, caches[name])
        grads.update({f"{name}.{key}": value for key, value in g.items()})
        dmemory += more
    return dout, grads, *dmemory


def init_encdec(cfg, rng, dtype=np.float32):
    """E (V, D): embeddings of source and inputs, and output matrix; "enc0.self.Wq", ...,
    "dec0.cross.Wq", ...; the last norms "enc.gamma", "enc.beta", "dec.gamma", "dec.beta"."""
    D, V = cfg.dim, len(TOKEN_CHARS)
    params = {"E": rng.standard_normal((V, D)) * D ** -0.5}
    attention = {"q": (D, D), "kv": (D, 2 * D), "o": (D, D)}
    mlp = {"1": (D, 4 * D), "2": (4 * D, D)}
    sublayers = [("enc", "self"), ("enc", "mlp"), ("dec", "self"), ("dec", "cross"), ("dec", "mlp")]
    for i in range(cfg.layers):
        for stack, sublayer in sublayers:
            at = f"{stack}{i}.{sublayer}."
            for name, (n, m) in (mlp if sublayer == "mlp" else attention).items():
                params[f"{at}W{name}"] = rng.standard_normal((n, m)) * (2 / (n + m)) ** 0.5
                params[f"{at}b{name}"] = np.zeros(m)
            params[f"{at}gamma"], params[f"{at}beta"] = np.ones(D), np.zeros(D)
    for stack in ("enc", "dec"):
        params[f"{stack}.gamma"], params[f"{stack}.beta"] = np.ones(D), np.zeros(D)
    return {name: value.astype(dtype) for name, value in params.items()}


def encdec_forward(params, source, inputs, cfg):
    """source (B, S), inputs (B, T): BOS and what has been written -> logits (B T, V) of the token
    after each."""
    (B, S), T, D = source.shape, inputs.shape[1], cfg.dim
    padding_mask = (source != PAD)[:, None, None]                   # (B, 1, 1, S)
    causal_mask = np.tri(T, dtype=bool)                             # (T, T)
    table, caches = sinusoids(max(S, T), D, params["E"].dtype), []
    x = (D ** 0.5 * params["E"][source] + table[:S]).reshape(B * S, D)
    encoder = [("self", SELF_ATTENTION, cfg.heads, B, padding_mask), ("mlp", MLP)]
    for i in range(cfg.layers):
        x, cache = encdec_layer_forward(x, part(params, f"enc{i}."), cfg.norm, encoder)
        caches.append(cache)
    memory, enc_norm = layernorm_forward(x, params["enc.gamma"], params["enc.beta"])
    x = (D ** 0.5 * params["E"][inputs] + table[:T]).reshape(B * T, D)
    decoder = [("self", SELF_ATTENTION, cfg.heads, B, causal_mask),
               ("cross", CROSS_ATTENTION, cfg.heads, B, padding_mask, memory), ("mlp", MLP)]
    for i in range(cfg.layers):
        x, cache = encdec_layer_forward(x, part(params, f"dec{i}."), cfg.norm, decoder)
        caches.append(cache)
    x, dec_norm = layernorm_forward(x, params["dec.gamma"], params["dec.beta"])
    return x @ params["E"].T, (source, inputs, caches, enc_norm, dec_norm, x, params, cfg)


def encdec_backward(dout, cache):
    """encdec_forward in reverse order -> gradients under the keys of params."""
    source, inputs, caches, enc_norm, dec_norm, x, params, cfg = cache
    grads, dmemory = {"E": dout.T @ x}, 0
    dx = dout @ params["E"]
    dx, grads["dec.gamma"], grads["dec.beta"] = layernorm_backward(dx, dec_norm)
    for i in reversed(range(cfg.layers)):
        dx, g, dm = encdec_layer_backward(dx, caches[cfg.layers + i])
        dmemory = dmemory + dm                                      # every layer attends to it
        grads.update({f"dec{i}.{name}": value for name, value in g.items()})
    np.add.at(grads["E"], inputs.ravel(), cfg.dim ** 0.5 * dx)
    dx, grads["enc.gamma"], grads["enc.beta"] = layernorm_backward(dmemory, enc_norm)
    for i in reversed(range(cfg.layers)):
        dx, g = encdec_layer_backward(dx, caches[i])
        grads.update({f"enc{i}.{name}": value for name, value in g.items()})
    np.add.at(grads["E"], source.ravel(), cfg.dim ** 0.5 * dx)
    return grads


def encdec_loss_and_grads(params, batch, cfg):
    """Loss over the targets that are not padding, gradients under the keys of params."""
    source, inputs, targets = batch
    real = np.flatnonzero(targets != PAD)
    logits, cache = encdec_forward(params, source, inputs, cfg)
    loss, loss_cache = softmax_cross_entropy_forward(logits[real], targets.ravel()[real])
    dlogits = np.zeros_like(logits)
    dlogits[real] = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, encdec_backward(dlogits, cache)


def encdec_batch(cfg, step, dtype=np.float32):
    """1 to cfg.context digits per row, padded.   -> source, inputs (BOS, digits), targets (digits,
    EOS), each (B, context + 1)."""
    rng = np.random.default_rng((cfg.seed, step))
    batch = np.full((3, cfg.batch_size, cfg.context + 1), PAD)
    for source, inputs, targets in batch.swapaxes(0, 1):            # row by row
        n = rng.integers(1, cfg.context + 1)
        source[:n] = rng.integers(3, 13, n)
        targets[:n] = np.sort(source[:n]) if isinstance(cfg, Sort) else source[:n][::-1]
        targets[n] = EOS
        inputs[0] = BOS
        inputs[1:n + 1] = targets[:n]
    return tuple(batch)


def greedy(params, source, cfg):
    """The most probable token, again and again, up to EOS.   source (B, S) -> (B, context + 1)."""
    inputs = np.full((len(source), 1), BOS)
    for _ in range(cfg.context + 1):
        logits, _ = encdec_forward(params, source, inputs, cfg)
        best = logits.reshape(*inputs.shape, -1)[:, -1].argmax(axis=1)
        ended = (inputs == EOS).any(axis=1)
        inputs = np.column_stack([inputs, np.where(ended, PAD, best)])
    return inputs[:, 1:]


def run_encdec(cfg):
    """Train, write fresh sequences, and show what each head attends to."""
    start, task = time.perf_counter(), type(cfg).__name__.lower()
    params = init_encdec(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"1 to {cfg.context} digits to {task}: {cfg.layers} + {cfg.layers} layers, {cfg.heads} "
          f"heads, dim {cfg.dim}, {cfg.norm}, {size} parameters")
    print(f"chance level: loss {math.log(11):.3f}")
    losses = train(params, cfg, encdec_batch, encdec_loss_and_grads)
    source, inputs, targets = encdec_batch(replace(cfg, batch_size=1000), 10 ** 6)
    logits, (_, _, caches, *_) = encdec_forward(params, source, inputs, cfg)
    check_finite(np.abs(logits).max(), params)
    exact = float((greedy(params, source, cfg) == targets).all(axis=1).mean())
    other = {**params, "E": params["E"].copy()}
    other["E"][PAD] = 1
    changed, _ = encdec_forward(other, source, inputs, cfg)
    real = (targets != PAD).ravel()
    padding = float(np.abs(changed - logits)[real, PAD + 1:].max())     # E is tied: not column PAD
    sublayers, _ = caches[-1]
    norm, cross, _ = sublayers["cross"]
    q_cache, kv_cache, (q, k, v, p), *_ = cross
    lengths = (source != PAD).sum(axis=1)
    S = lengths.max()
    longest = lengths == S                                          # rows without padding
    p = p[longest, :, :S + 1, :S]                                   # (n, H, S + 1, S)
    source, targets = source[longest, :S], targets[longest, :S + 1]
    rows, columns = ([TOKEN_CHARS[i] for i in ids[0, :20]] for ids in (targets, source))
    print("\nThe last layer's cross-attention, a map per head: each row, a digit to be written or\n"
          "> for the end, attends to the columns, the source")
    draw_heads(p[0, :, :20, :20], rows, columns)
    equal = source[:, None, None] == targets[:, None, :S, None]     # (n, 1, S, S)
    share = (p[:, :, :S] * equal).sum(axis=3).mean(axis=(0, 2))     # (H,)
    print("\nShare of each head's attention on digits equal to the one to be written (chance "
          f"{equal.mean():.0%}):\n" + "  ".join(f"{value:.0%}" for value in share))
    print(f"Another embedding of the padding changes the logits by {padding:.0e}")
    print(f"{exact:.1%} of 1000 fresh sequences entirely right")
    print("\nNext: python transformer.py fill      python mae.py")
    print_result(task, cfg, exact=exact, padding=padding, loss=losses[-1], params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- any text: python transformer.py text --data tinyshakespeare.txt -----------------------------

@dataclass
class Text(Config):
    """Predict the next character of a text file."""
    data: str = ""          # UTF-8 text file, its last tenth for validation
    model: Literal["modern", "gpt"] = "modern"  # model of the task modern, or of rhyme
    layers: int = 4         # transformer blocks
    dim: int = 128          # embedding dimension
    batch_size: int = 12    # sequences per step
    steps: int = 2000       # optimizer steps
    lr: float = 0.003       # peak learning rate
    threads: int = 2        # micro-batches, each on a thread of its own
    save: str = ""          # checkpoint file (.npz), written every 200 steps
    load: str = ""          # checkpoint file to resume from


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
def load_text(path, context):
    """-> the characters of the text, sorted; its first nine tenths (training) and its last tenth
    (validation) as indices into them. Without a path the rhyme, ten times.   Raises InputError."""
    text = read_text(path) if path else RHYME * 10
    chars = sorted(set(text))
    ids = np.searchsorted(chars, list(text))
    train, validation = np.split(ids, [len(ids) * 9 // 10])
    require(len(validation) > context, f"--data {path}", f"over {10 * context} characters",
            len(text))
    return chars, train, validation


def init_text(cfg, rng, dtype=np.float32):
    """init_params or init_modern with an embedding for every character of the file."""
    chars, _, _ = load_text(cfg.data, cfg.context)
    return MODELS[cfg.model][0](cfg, rng, dtype, len(chars))


def text_batch(cfg, step, dtype=np.float32):
    """Random windows of the training part -> ids (B, T), targets (B, T)."""
    rng = np.random.default_rng((cfg.seed, step))
    _, train, _ = load_text(cfg.data, cfg.context)
    starts = rng.integers(0, len(train) - cfg.context, cfg.batch_size)
    windows = train[starts[:, None] + np.arange(cfg.context + 1)]
    return windows[:, :-1], windows[:, 1:]


def text_loss_and_grads(params, batch, cfg):
    """loss_and_grads of the model that was chosen."""
    return MODELS[cfg.model][1](params, batch, cfg)


def validation_loss(params, cfg, most=10 ** 9):
    """Mean loss over the windows of the validation part, or about `most` of them, evenly spaced."""
    _, _, ids = load_text(cfg.data, cfg.context)
    starts = np.arange(0, len(ids) - cfg.context, cfg.context)
    starts = starts[::max(1, len(starts) // most)]
    total = 0.0
    for some in np.array_split(starts, math.ceil(len(starts) / 32)):
        windows = ids[some[:, None] + np.arange(cfg.context + 1)]
        logits, _ = MODELS[cfg.model][2](params, windows[:, :-1], cfg)
        loss, _ = softmax_cross_entropy_forward(logits, windows[:, 1:].ravel())
        total += float(loss) * len(some)
    return total / len(starts)


def train_long(params, cfg, meta, make_batch, loss_and_grads, note):
    """train on cfg.threads threads, from the checkpoint cfg.load, with checkpoints to cfg.save."""
    state, losses = {}, []
    if cfg.load:
        load_checkpoint(cfg.load, meta, params, state, losses)
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses, dry_run=True)

    def save(step):
        if cfg.save and step % 200 == 0:
            save_checkpoint(cfg.save, meta, params, state, losses)

    quiet = functools.partial(np.seterr, over="ignore", invalid="ignore")       # as run does
    with ThreadPoolExecutor(cfg.threads, initializer=quiet) as pool:
        threaded = functools.partial(threaded_loss_and_grads, loss_and_grads, pool)
        train(params, cfg, make_batch, threaded, state, losses, note, save)
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses)      # after Ctrl-C as well
    return losses


def run_text(cfg):
    """Train on a text file, report the validation loss, continue the text."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    require(cfg.data, "--data", "a UTF-8 text file (python transformer.py --help says where)",
            cfg.data)
    chars, train, _ = load_text(cfg.data, cfg.context)
    params = init_text(cfg, rng)
    size = sum(p.size for p in params.values())
    print(f"{cfg.data}: {len(train)} characters to learn from, {len(chars)} different\n"
          f"{cfg.model}: {cfg.layers} layers, {cfg.heads} heads, dim {cfg.dim}, {size} parameters")
    print(f"chance level: loss {math.log(len(chars)):.3f}")
    meta = dict(task="text", chars="".join(chars), model=cfg.model, layers=cfg.layers,
                heads=cfg.heads, dim=cfg.dim, context=cfg.context)
    losses = train_long(params, cfg, meta, text_batch, text_loss_and_grads,
                        lambda: f"  validation {validation_loss(params, cfg, 100):.4f}")
    loss = validation_loss(params, cfg)
    check_finite(loss, params)
    ids = sample(params, cfg, train[:1], 300, rng, MODELS[cfg.model][3])
    print("\n" + "".join(chars[i] for i in ids) + "\n")
    half = cfg.context // 2
    windows = np.stack([train[:cfg.context]] * 2)
    windows[1, half:] = 0                                           # the first halves are equal
    logits, _ = MODELS[cfg.model][2](params, windows, cfg)
    logits = logits.reshape(2, cfg.context, -1)[:, :half]
    leak = float(np.abs(logits[0] - logits[1]).max())
    print(f"Other characters in the second half of a window change the logits of the first half by "
          f"{leak:.0e}")
    print("Next: python transformer.py generate      python mae.py")
    print_result("text", cfg, validation=loss, future=leak, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


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


def constraints(cfg):
    """What must hold between the values of a task: (ok, what, expected, found) for each."""
    d = cfg.dim / cfg.heads
    yield d % 1 == 0, "--dim", f"a multiple of --heads {cfg.heads}", cfg.dim
    if isinstance(cfg, (Modern, Positions)) or getattr(cfg, "model", "") == "modern":
        yield d % 2 == 0, "--dim", "an even number per head", d
    if type(cfg) in (Config, Generate, Modern):
        yield 1 < cfg.context < len(TEXT), "--context", f"2 to {len(TEXT) - 1}", cfg.context
    if isinstance(cfg, Text):
        yield cfg.context > 1, "--context", "2 or more", cfg.context
    if isinstance(cfg, Fill):
        yield 0 < cfg.mask_ratio < 1, "--mask-ratio", "between 0 and 1", cfg.mask_ratio
    if isinstance(cfg, (Text, Mnist)):
        most = f"at most --batch-size {cfg.batch_size}"
        yield cfg.threads <= cfg.batch_size, "--threads", most, cfg.threads
        same = os.path.realpath(cfg.save) == os.path.realpath(cfg.data)
        yield not cfg.save or not same, "--save", "another file than --data", cfg.save


TASKS = {
    "rhyme": Task(Config, init_params, make_batch, loss_and_grads, main),
    "generate": Task(Generate, init_params, make_batch, loss_and_grads, run_generate),
    "modern": Task(Modern, init_modern, make_batch, modern_loss_and_grads, run_modern),
    "positions": Task(Positions, init_positions, positions_batch, positions_loss_and_grads,
                      run_positions),
    "fill": Task(Fill, init_fill, fill_batch, fill_loss_and_grads, run_fill),
    "mnist": Task(Mnist, init_mnist, mnist_batch, mnist_loss_and_grads, run_mnist),
    "reverse": Task(Reverse, init_encdec, encdec_batch, encdec_loss_and_grads, run_encdec),
    "sort": Task(Sort, init_encdec, encdec_batch, encdec_loss_and_grads, run_encdec),
    "text": Task(Text, init_text, text_batch, text_loss_and_grads, run_text)}
CONSTRAINTS = {task.config: constraints for task in TASKS.values()}


GRADCHECK = {               # for gradcheck.py, which checks the other operations in their models
    "attention": lambda rng: dict(
        q=rng.standard_normal((2, 3, 5, 6)), k=rng.standard_normal((2, 3, 7, 6)),
        v=rng.standard_normal((2, 3, 7, 6)), mask=rng.random((2, 1, 1, 7)) < 0.7),
    "block": lambda rng: dict(              # B 6, T 5, 3 of q, k, v, H 2, d 4: all sizes differ
        x=rng.standard_normal((30, 8)), p=part(init_params(Config(dim=8), rng, float), "0."),
        heads=2, B=6),
    "modern_block": lambda rng: dict(
        x=rng.standard_normal((30, 8)), p=part(init_modern(Config(dim=8), rng, float), "0."),
        heads=2, B=6)}

if __name__ == "__main__":
    run(TASKS)
