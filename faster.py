"""faster.py: the same answer for less: attention in tiles, text by drafts.

Attention weighs every position against every other: T x T weights, which the backward pass needs
again. They need never exist together. Cut the table into tiles and visit one after the other: a
running maximum m and a running sum l make the softmax exact, in any order. The forward pass keeps
one number per row, lse = log sum exp; with it the backward pass computes each tile again.

Forward, for every tile (i, j); c = 1 / sqrt(d); at first m = -inf, l = 0, out = 0
    s = c q_i k_j^T (i = j: hide the future)    m' = max(m, rowmax s)    p = exp(s - m')
    f = exp(m - m')    l = f l + rowsum p       out = f out + p v_j      m = m'
    at the end    out = out / l                 lse = m + log l
Backward, for every tile (i, j); delta = rowsum(dout out) = rowsum(p dp), over the whole row
    p = exp(s - lse)   dv_j += p^T dout_i       dp = dout_i v_j^T        ds = p (dp - delta)
    dq_i += c ds k_j   dk_j += c ds^T q_i

Run    python faster.py     (repeat 128 characters; what it costs; --help lists the other tasks)

Papers: Milakov and Gimelshein 2018 (running softmax), Rabe and Staats 2021, Dao et al. 2022
(FlashAttention), Leviathan et al. 2022 and Chen et al. 2023 (drafts).
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
import tracemalloc
from dataclasses import dataclass, fields

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np


@dataclass
class Config:
    """Repeat random characters that stand far back."""
    context: int = 256      # positions, of which the second half repeats the first
    tile: int = 64          # positions per side of a tile
    layers: int = 1         # blocks of attention and MLP
    heads: int = 1          # attention heads
    dim: int = 64           # embedding dimension
    batch_size: int = 8     # sequences per step
    steps: int = 240        # optimizer steps
    lr: float = 0.01        # learning rate
    seed: int = 0           # random seed


# ---- layers: B sequences, T positions, N rows, D dim, H heads, d = D / H, V characters -----------

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


def causal_tiles(T, tile):
    """The tiles (i, j) on and below the diagonal, row by row."""
    side = math.ceil(T / tile)
    return [(i, j) for i in range(side) for j in range(i + 1)]


def tile_scores(q, k, i, j, tile):
    """Scores of tile (i, j) of the T x T table, and its position.   q, k (B, H, T, d) -> (B, H,
    tile, tile), slice of the queries, slice of the keys."""
    rows, columns = slice(i * tile, (i + 1) * tile), slice(j * tile, (j + 1) * tile)
    s = (q[:, :, rows] * q.shape[3] ** -0.5) @ k[:, :, columns].swapaxes(2, 3)
    if i == j:                                          # on the diagonal: hide the future
        s = np.where(np.tri(s.shape[2], dtype=bool), s, -1e9)
    return s, rows, columns


def tiled_attention_forward(q, k, v, tiles, tile):
    """causal_attention_forward without a T x T array, over the tiles that are listed, in any order.
    q, k, v, out (B, H, T, d), tiles: pairs (i, j), j <= i, at least one for each i."""
    out = np.zeros_like(q)
    l = np.zeros_like(q[:, :, :, :1])                   # (B, H, T, 1)
    m = l - np.inf
    for i, j in tiles:
        s, rows, columns = tile_scores(q, k, i, j, tile)
        new_m = np.maximum(m[:, :, rows], s.max(axis=3, keepdims=True))
        p = np.exp(s - new_m)                           # (B, H, tile, tile)
        f = np.exp(m[:, :, rows] - new_m)               # l and out so far refer to the old maximum
        l[:, :, rows] = f * l[:, :, rows] + p.sum(axis=3, keepdims=True)
        out[:, :, rows] = f * out[:, :, rows] + p @ v[:, :, columns]
        m[:, :, rows] = new_m
    out /= l
    return out, (q, k, v, out, m + np.log(l), tiles, tile)


def tiled_attention_backward(dout, cache):
    """p again, from lse; delta = sum p dp = dout . out, so no row is needed as a whole; dv = p^T
    dout, ds = p (dp - delta), dq = ds k / sqrt(d), dk = ds^T q / sqrt(d), summed over the tiles."""
    q, k, v, out, lse, tiles, tile = cache
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    c, delta = q.shape[3] ** -0.5, (dout * out).sum(axis=3, keepdims=True)      # (B, H, T, 1)
    for i, j in tiles:
        s, rows, columns = tile_scores(q, k, i, j, tile)
        p = np.exp(s - lse[:, :, rows])                 # (B, H, tile, tile)
        dp = dout[:, :, rows] @ v[:, :, columns].swapaxes(2, 3)
        ds = p * (dp - delta[:, :, rows])
        dv[:, :, columns] += p.swapaxes(2, 3) @ dout[:, :, rows]
        dq[:, :, rows] += c * (ds @ k[:, :, columns])
        dk[:, :, columns] += c * (ds.swapaxes(2, 3) @ q[:, :, rows])
    return dq, dk, dv


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

VOCAB_SIZE = 16


def make_batch(cfg, step, dtype=np.float32):
    """Random characters, then the same again.   -> ids (B, T), targets (B, S): what follows the
    last S positions, the second half."""
    rng, half = np.random.default_rng((cfg.seed, step)), (cfg.context + 1) // 2
    ids = rng.integers(0, VOCAB_SIZE, (cfg.batch_size, half))
    ids = np.concatenate([ids, ids, ids], axis=1)[:, :cfg.context + 1]
    return ids[:, :-1], ids[:, half:]


# ---- model: embeddings, blocks, logits; no norms and no biases -----------------------------------

def init_params(cfg, rng, dtype=np.float32, vocab_size=VOCAB_SIZE):
    """E (V, D) and P (context, D): embeddings of characters and positions; "0.Wqkv", ... in block
    0: Wqkv, Wo, W1, W2; U (D, V)."""
    D = cfg.dim
    params = {"E": 0.5 * rng.standard_normal((vocab_size, D)),
              "P": 0.5 * rng.standard_normal((cfg.context, D))}
    for i in range(cfg.layers):
        for name, n, m in (("qkv", D, 3 * D), ("o", D, D), ("1", D, 4 * D), ("2", 4 * D, D)):
            params[f"{i}.W{name}"] = n ** -0.5 * rng.standard_normal((n, m))
    params["U"] = D ** -0.5 * rng.standard_normal((D, vocab_size))
    return {name: value.astype(dtype) for name, value in params.items()}


def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def plain_block_forward(x, p, heads, B, tiles, tile):
    """x + attention(x), then x + mlp(x), mlp(x) = max(x W1, 0) W2.   x (B T, D) -> (B T, D)."""
    qkv = (x @ p["Wqkv"]).reshape(B, -1, 3, heads, x.shape[1] // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)                          # (B, H, T, d) each
    a, attention = tiled_attention_forward(q, k, v, tiles, tile)
    a = a.swapaxes(1, 2).reshape(x.shape)                           # (B T, D)
    y = x + a @ p["Wo"]
    h = np.maximum(y @ p["W1"], 0)                                  # (B T, 4 D)
    return y + h @ p["W2"], (x, attention, a, y, h, p)


def plain_block_backward(dout, cache):
    """plain_block_forward in reverse order: x and y are used twice, so gradients add."""
    x, attention, a, y, h, p = cache
    B, H, T, d = attention[0].shape                                 # attention[0] is q
    dh = (dout @ p["W2"].T) * (h > 0)
    dy = dout + dh @ p["W1"].T
    da = (dy @ p["Wo"].T).reshape(B, T, H, d).swapaxes(1, 2)        # (B, H, T, d)
    dqkv = np.stack(tiled_attention_backward(da, attention))        # (3, B, H, T, d)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B * T, -1)         # (B T, 3 D)
    grads = {"Wqkv": x.T @ dqkv, "Wo": a.T @ dy, "W1": y.T @ dh, "W2": h.T @ dout}
    return dy + dqkv @ p["Wqkv"].T, grads


def plain_gpt_forward(params, ids, cfg, tiles):
    """ids (B, T) characters -> logits (B, T, V) of the next one."""
    B, T = ids.shape
    x = params["E"][ids] + params["P"][:T]                          # (B, T, D)
    x, caches = x.reshape(B * T, -1), []
    for i in range(cfg.layers):
        x, cache = plain_block_forward(x, part(params, f"{i}."), cfg.heads, B, tiles, cfg.tile)
        caches.append(cache)
    return (x @ params["U"]).reshape(B, T, -1), (ids, caches, x, params)


def plain_gpt_backward(dout, cache):
    """plain_gpt_forward in reverse order -> gradients under the keys of params."""
    ids, caches, x, params = cache
    dout = dout.reshape(len(x), -1)                                 # (B T, V)
    grads = {name: np.zeros_like(params[name]) for name in "EP"} | {"U": x.T @ dout}
    dx = dout @ params["U"].T
    for i in reversed(range(len(caches))):
        dx, g = plain_block_backward(dx, caches[i])
        grads.update({f"{i}.{name}": value for name, value in g.items()})
    np.add.at(grads["E"], ids.ravel(), dx)
    grads["P"][:ids.shape[1]] = dx.reshape(*ids.shape, -1).sum(axis=0)
    return grads


def loss_and_grads(params, batch, cfg, tiles_of=causal_tiles):
    """One forward and one backward pass -> loss, gradients under the keys of params. targets (B, S)
    belong to the last S positions."""
    ids, targets = batch
    logits, cache = plain_gpt_forward(params, ids, cfg, tiles_of(ids.shape[1], cfg.tile))
    dlogits = np.zeros_like(logits)                                 # (B, T, V)
    last = np.s_[:, -targets.shape[1]:]                             # the last S positions
    logits = logits[last].reshape(targets.size, -1)                 # (B S, V)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.ravel())
    dlogits[last] = softmax_cross_entropy_backward(1.0, loss_cache).reshape(dlogits[last].shape)
    return loss, plain_gpt_backward(dlogits, cache)


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
        adam_update(params, grads, state, cfg.lr)
        losses.append(float(loss))
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


# ---- what it costs, and demo ---------------------------------------------------------------------

QUADRATIC = causal_attention_forward, causal_attention_backward
TILED = tiled_attention_forward, tiled_attention_backward


def both_passes(attention, q, k, v, dout, *more):
    """-> out, dq, dk, dv; more: what a kind of attention needs besides q, k, v."""
    forward, backward = attention
    out, cache = forward(q, k, v, *more)
    return out, *backward(dout, cache)


def peak_memory(function, *args):
    """-> the largest number of bytes that function(*args) holds at one time."""
    tracemalloc.start()
    function(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def cost(attention, T, *more):
    """Both passes of one head with d = 64 -> milliseconds of processor time, bytes at the peak."""
    arrays = np.random.default_rng(0).standard_normal((4, 1, 1, T, 64), np.float32)
    peak, seconds = peak_memory(both_passes, attention, *arrays, *more), []
    for _ in range(2):
        before = time.process_time()
        both_passes(attention, *arrays, *more)
        seconds.append(time.process_time() - before)
    return 1000 * min(seconds), max(1, peak)


def draw_running(q, k, v, tile):
    """How m, l and out of the last of T rows change from tile to tile.   q, k, v (T, d)."""
    m, l, out = -math.inf, 0.0, 0.0
    for start in range(0, len(k), tile):
        s = k[start:start + tile] @ q[-1] * len(q[0]) ** -0.5
        new_m = max(m, s.max())
        p, f = np.exp(s - new_m), math.exp(m - new_m)
        l = f * l + p.sum()
        out = f * out + p @ v[start:start + tile]
        m = new_m
        print(f"keys from {start:4d}   m {m:7.2f}   f {f:7.1e}   l {l:7.2f}   |out / l| "
              f"{np.linalg.norm(out / l):7.3f}")


def main(cfg):
    """Learn to repeat; hold the tiles against the quadratic form; measure what both cost."""
    start, rng = time.perf_counter(), np.random.default_rng(cfg.seed)
    params, tiles = init_params(cfg, rng), causal_tiles(cfg.context, cfg.tile)
    size = sum(p.size for p in params.values())
    print(f"{cfg.context // 2} random characters and the same again; {cfg.layers} layers, "
          f"{cfg.heads} heads, dim {cfg.dim}, {size} parameters\n{len(tiles)} tiles of "
          f"{cfg.tile} x {cfg.tile} for the attention among {cfg.context} positions")
    print(f"chance level: loss {math.log(VOCAB_SIZE):.3f}")
    losses = train(params, cfg)
    ids, targets = make_batch(cfg, 2 ** 31)             # a step that no training has
    logits, (_, caches, *_) = plain_gpt_forward(params, ids, cfg, tiles)
    accuracy = float((logits.argmax(axis=2)[:, -targets.shape[1]:] == targets).mean())
    check_finite(accuracy, params)
    print(f"new characters: {accuracy:.1%} of the second half predicted")
    _, attention, *_ = caches[-1]                       # of the last block
    q, k, v = (a.astype(float) for a in attention[:3])
    print("\nRows: the tiles of one position. Columns: running maximum, factor, running sum,\n"
          "length of the output so far")
    draw_running(q[0, 0, :-1], k[0, 0, :-1], v[0, 0, :-1], cfg.tile)
    dout = rng.standard_normal(q.shape)
    pairs = zip(both_passes(TILED, q, k, v, dout, tiles, cfg.tile),
                both_passes(QUADRATIC, q, k, v, dout))
    difference = max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
    print(f"Output and gradients differ from those of the quadratic form by {difference:.0e}")
    print("\nOne head with d = 64, both passes, tiles of 128. Rows: positions. Columns: peak "
          "memory,\nwith one # more for each factor of 1.4; processor time")
    for T in (512, 1024, 2048, 4096):
        costs = cost(QUADRATIC, T), cost(TILED, T, causal_tiles(T, 128), 128)
        for name, (ms, peak) in zip(("quadratic", "tiles"), costs):
            bar = "#" * round(2 * math.log2(peak / 2 ** 18))
            print(f"{T:5d}  {name:9s} {peak / 2 ** 20:6.1f} MiB  |{bar:.<20s}|  {ms:.1f} ms")
    (slow, large), (fast, small) = costs
    print("\nNext: python faster.py lengths      python faster.py patterns")
    print_result("repeat", cfg, loss=losses[-1], accuracy=accuracy, difference=difference,
                 memory_ratio=large / small, speedup=slow / fast, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: row blocks, patterns of tiles, drafts, drafts of text; flags. ====

MORE = """
Tasks
    python faster.py text --data tinyshakespeare.txt --steps 3000       2 minutes; validation 1.90
        nats per character; 70 % of the drafts are accepted; 12 layers are 2.0 times as fast

Break it (python faster.py; as it is: accuracy 100 %, difference from the quadratic form 2e-15)
    tiled_attention_forward: no f * in the line of out (or of l)    7 % (8 %): nothing is learned
        np.log(l) for m + np.log(l)         8 %: out is right, but gradients are e^m times too large
        new_m = s.max(3, keepdims=True)     100 %, 2e-15: any m is exact, until f overflows
    tiled_attention_backward: ds = p * dp   7 %, although out and dv are right
    tile_scores: if False:                  100 %, but off by 1.4: rows see ahead within their tile
    main: causal_tiles(cfg.context, cfg.tile)[::-1]     2e-15: the order does not matter

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Give loss_and_grads (tiles_of) and main (tiles) only tiles with i - j <= 2: with --context 64
       --tile 8 --lr 0.003 --steps 350 one layer repeats 4 %, two (--layers 2) repeat 86 %. Why?
    2. Derive and add s <- 30 tanh(s / 30) (Gemma 2) to tile_scores. What changes in ds?
    3. Let speculate draw from ps[k] after a refusal, too. Which p has python faster.py exact then?

Data
    curl -o tinyshakespeare.txt \\
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

import argparse
import contextlib
import ctypes
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- row blocks, the honest rival: python faster.py lengths --------------------------------------
# A block of rows with all its keys is small, too, and needs no running softmax. In NumPy that is as
# fast; its memory grows with block times T. Tiles are for hardware such as a GPU, which computes in
# a small, fast memory: a tile fits into it, whatever T is.

@dataclass
class Lengths:
    """Time and memory of attention in tiles, in row blocks, in a window."""
    length: int = 4096      # positions


def row_block(q, k, block, end):
    """The softmax of the rows before end over their keys.   -> (B, H, block, end)."""
    s = (q[:, :, end - block:end] * q.shape[3] ** -0.5) @ k[:, :, :end].swapaxes(2, 3)
    seen = np.tri(*s.shape[2:], end - block, dtype=bool)    # row 0 is position end - block
    s = np.where(seen, s, -1e9)
    p = np.exp(s - s.max(axis=3, keepdims=True))
    return p / p.sum(axis=3, keepdims=True)


def row_block_attention_forward(q, k, v, block):
    """causal_attention_forward, a block of rows at a time; nothing but the inputs is kept."""
    out = np.zeros_like(q)
    for end in range(block, q.shape[2] + block, block):
        out[:, :, end - block:end] = row_block(q, k, block, end) @ v[:, :, :end]
    return out, (q, k, v, block)


def row_block_attention_backward(dout, cache):
    """causal_attention_backward of each block; p is computed again."""
    q, k, v, block = cache
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for end in range(block, q.shape[2] + block, block):
        rows = np.s_[:, :, end - block:end]
        p, g = row_block(q, k, block, end), dout[rows]
        dv[:, :, :end] += p.swapaxes(2, 3) @ g
        dp = g @ v[:, :, :end].swapaxes(2, 3)
        ds = p * (dp - (p * dp).sum(axis=3, keepdims=True)) * q.shape[3] ** -0.5
        dq[rows] = ds @ k[:, :, :end]
        dk[:, :, :end] += ds.swapaxes(2, 3) @ q[rows]
    return dq, dk, dv


def run_lengths(cfg):
    """Measure every way; the result line compares them with the quadratic form."""
    start, T = time.perf_counter(), cfg.length
    row_blocks = row_block_attention_forward, row_block_attention_backward
    window = [(i, j) for i, j in causal_tiles(T, 128) if j == 0 or i - j < 2]
    ways = {"quadratic": (QUADRATIC,), "row_blocks_128": (row_blocks, 128),
            **{f"tiles_{n}": (TILED, causal_tiles(T, n), n) for n in (32, 64, 128, 256)},
            "window_2_tiles_128": (TILED, window, 128)}
    costs = {name: cost(attention, T, *more) for name, (attention, *more) in ways.items()}
    print(f"One head with d = 64, {T} positions, both passes. Rows: ways (window: two tiles and "
          "the first).\nColumns: peak memory, one # more for a factor of 1.4; processor time")
    for name, (ms, peak) in costs.items():
        bar = "#" * round(2 * math.log2(peak / 2 ** 18))
        print(f"{name:18s}  {peak / 2 ** 20:6.1f} MiB  |{bar:.<24s}|  {ms:.1f} ms")
    slow, large = costs.pop("quadratic")
    metrics = {f"{name}_memory_ratio": large / peak for name, (ms, peak) in costs.items()}
    metrics |= {f"{name}_speedup": slow / ms for name, (ms, peak) in costs.items()}
    print("\nNext: python faster.py lengths --length 1024      python faster.py patterns")
    print_result("lengths", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- patterns: python faster.py patterns ---------------------------------------------------------
# Fewer tiles cost less, but give another answer. What a position does not see in a layer may reach
# it in a later one, over a position that has seen it: one hop per layer. The backward pass is that
# of the spine.

@dataclass
class Patterns:
    """Draw which tiles are seen, and count the layers until every tile has reached every other."""
    tiles: int = 64         # tiles per side for counting
    seed: int = 0           # random seed


def seen_tiles(side, causal, seed, window, first=False, draws=0):
    """Which tiles are seen: those at most window away; if first, the first row and column (a global
    tile, Longformer); draws random ones per row (BigBird).   -> (side, side)."""
    rng, (i, j) = np.random.default_rng(seed), np.indices((side, side))
    seen = abs(i - j) <= window
    if first:
        seen |= (i == 0) | (j == 0)
    for row in range(side):
        seen[row, rng.integers(0, row + 1 if causal else side, draws)] = True
    return seen & (j <= i) if causal else seen


def hops(seen, causal):
    """Layers until every tile (if causal, every earlier one) can have reached every tile."""
    wanted = np.tri(len(seen), dtype=bool) if causal else np.ones_like(seen)
    reached, count = seen, 1
    while not reached[wanted].all():
        reached, count = reached @ seen, count + 1
    return count


def run_patterns(cfg):
    """Draw patterns, both directions and causal, and count hops."""
    start, metrics = time.perf_counter(), {}
    rows = {"window 1": (1,), "window 3": (3,), "window 1, first": (1, True),
            "window 1, random": (1, False, 1), "window 1, 2 random": (1, False, 2)}
    print("Rows: 16 tiles; columns: the tiles that they see (#); both directions, then causal.\n"
          f"Hops: layers until all of {cfg.tiles} tiles (causal: all earlier ones) have reached "
          "each; mean of 3")
    for causal in (False, True):
        print("\n" + "".join(f"{name:19s}" for name in rows))
        seen = [seen_tiles(16, causal, cfg.seed, *row) for row in rows.values()]
        for lines in zip(*np.where(seen, "#", ".")):
            print("   ".join("".join(line) for line in lines))
        for name, row in rows.items():
            draws = [seen_tiles(cfg.tiles, causal, (cfg.seed, k), *row) for k in range(3)]
            mean = sum(hops(seen, causal) for seen in draws) / 3
            print(f"{f'{mean:.1f} hops':19s}", end="")
            metrics[name.replace(",", "").replace(" ", "_") + "_causal" * causal] = mean
        print()
    print("\nNext: python faster.py patterns --tiles 128      python faster.py exact")
    print_result("patterns", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- drafts: python faster.py exact --------------------------------------------------------------
# A large model needs a pass per token, since each depends on the one before. A small one drafts k
# tokens from its distributions q, and the large one checks them in one pass, which gives its p of
# every position. Token x is accepted with probability min(1, p(x) / q(x)). The first refused token
# is replaced by a draw from (p - q)+; those after it are dropped. The result is distributed as p:
#     q min(1, p / q) + (1 - sum min(p, q)) (p - q)+ / sum (p - q)+ = min(p, q) + (p - q)+ = p
# An accepted token costs no pass; a share of sum min(p, q) = 1 - TV(p, q) is accepted.

DRAFT_RULES = {       # probability that token x is accepted; the weights to draw from if it is not
    "right": (lambda p, q, x: p[x] / q[x], lambda p, q: np.maximum(p - q, 0)),
    "redraw_from_p": (lambda p, q, x: p[x] / q[x], lambda p, q: p),
    "accept_always": (lambda p, q, x: 1.0, lambda p, q: p),
    "accept_q_by_p": (lambda p, q, x: q[x] / p[x], lambda p, q: np.maximum(p - q, 0))}


def draw_token(weights, rng):
    """A random index, with a probability in proportion to its weight."""
    total = np.cumsum(weights)
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))


def speculate(target, draft, ids, count, k, rng, rule="right"):
    """Continue the list ids by count tokens; k are drafted at a time, 0: none. target and draft map
    ids and n to the distributions (n, V) of what follows each of the last n ids. -> ids, marks: per
    token " " accepted, "^" drawn after a refusal, "+" drawn when all had been accepted."""
    accept, redraw = DRAFT_RULES[rule]
    ids, marks, end = list(ids), "", len(ids) + count
    while len(ids) < end:
        drafted, qs = list(ids), []
        for _ in range(k):
            qs.append(draft(drafted, 1)[0])
            drafted.append(draw_token(qs[-1], rng))
        ps = target(drafted, k + 1)                     # one pass for all
        for x, p, q in zip(drafted[len(ids):], ps, qs):
            if rng.random() >= accept(p, q, x):         # refused
                ids.append(draw_token(redraw(p, q), rng))
                marks += "^"
                break
            ids.append(x)
            marks += " "
        else:                                           # none was refused: one more from p
            ids.append(draw_token(ps[k], rng))
            marks += "+"
    return ids[:end], marks


@dataclass
class Exact:
    """Test whether drafts change the distribution, by the right and by wrong rules."""
    samples: int = 12000    # strings of three tokens
    drafts: int = 3         # tokens drafted per pass
    seed: int = 0           # random seed


def chi_square_test(counts, expected):
    """-> chi square; the probability that it is as large by chance (Wilson and Hilferty 1931)."""
    chi2, n = float(((counts - expected) ** 2 / expected).sum()), counts.size - 1
    z = ((chi2 / n) ** (1 / 3) - 1 + 2 / (9 * n)) / (2 / (9 * n)) ** 0.5
    return chi2, 0.5 * math.erfc(z / 2 ** 0.5)


def table_reader(table):
    """A model of V tokens that depends on the last two alone.   table (V, V, V) -> function."""
    def read(ids, n):
        return table[ids[-n - 1:-1], ids[-n:]]          # (n, V)
    return read


def run_exact(cfg):
    """Draw strings by every rule and compare them with the target's distribution."""
    start, V, metrics = time.perf_counter(), 5, {}
    weights = np.exp(np.random.default_rng(cfg.seed).standard_normal((2, V, V, V)))
    P, Q = weights / weights.sum(axis=3, keepdims=True)
    target, draft = table_reader(P), table_reader(Q)
    expected = np.einsum("a,ab,abc->abc", P[0, 0], P[0], P)         # after 0, 0: (V, V, V)
    print(f"Target and draft are random tables: {V} tokens, {cfg.drafts} drafts per pass, "
          f"{cfg.samples} strings of three.\nRows: rules. Columns: chi square of {V ** 3} counts, "
          "its probability by chance")
    for name in DRAFT_RULES:
        rng, counts = np.random.default_rng(cfg.seed), np.zeros((V, V, V))
        for _ in range(cfg.samples):
            ids, _ = speculate(target, draft, [0, 0], 3, cfg.drafts, rng, name)
            counts[tuple(ids[2:])] += 1
        chi2, p = chi_square_test(counts, cfg.samples * expected)
        print(f"{name:16s}{chi2:12.1f}{p:10.1e}")
        metrics |= {f"{name}_chi2": chi2, f"{name}_p": p}
    print("\nNext: python faster.py exact --drafts 1      python faster.py text")
    print_result("exact", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- drafts of text: python faster.py text, or text --data tinyshakespeare.txt -------------------
# Target: the spine's model on text, with its keys and values kept. Drafts: counts of what followed
# the last one or three characters; and the target itself, as good as can be, and as slow.

@dataclass
class Text(Config):
    """Train a model on text; draft for it with counted characters."""
    data: str = ""          # UTF-8 text file, its last tenth for validation; none: sentences
    context: int = 64       # positions
    layers: int = 3         # blocks of attention and MLP
    heads: int = 4          # attention heads
    batch_size: int = 16    # sequences per step
    steps: int = 300        # optimizer steps
    lr: float = 0.003       # learning rate


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


NOUNS = "cat dog king fox bird girl tree".split()
VERBS = "sleep sing wait fall sink".split()


@functools.lru_cache
def load_corpus(path, context):
    """-> the characters of the text, sorted; its first nine tenths and its last as indices into
    them. Without a path: sentences, the verb of which agrees with the first noun."""
    if path:
        text = read_text(path)
    else:
        draws = np.random.default_rng(0).integers(0, [7, 2, 7, 2, 5], (2000, 5)).tolist()
        text = ""
        for a, many, b, more, c in draws:               # many, more: 0 or 1
            text += f"the {NOUNS[a]}{'s' * many} by the {NOUNS[b]}{'s' * more} "
            text += f"{VERBS[c]}{'s' * (1 - many)}.\n"
    chars = sorted(set(text))
    ids = np.searchsorted(chars, list(text))
    train_ids, validation = np.split(ids, [len(ids) * 9 // 10])
    require(len(validation) > context, f"--context {context}, --data {path or 'the sentences'}",
            f"over {10 * context} characters", len(ids))
    return chars, train_ids, validation


def init_text(cfg, rng, dtype=np.float32):
    """init_params with an embedding for every character of the file."""
    return init_params(cfg, rng, dtype, len(load_corpus(cfg.data, cfg.context)[0]))


def text_batch(cfg, step, dtype=np.float32, split=1):
    """Random windows of the training part (split 1) or of the validation part (2)   -> ids (B, T),
    targets (B, T)."""
    rng, ids = np.random.default_rng((cfg.seed, step)), load_corpus(cfg.data, cfg.context)[split]
    starts = rng.integers(0, len(ids) - cfg.context, cfg.batch_size)
    windows = ids[starts[:, None] + np.arange(cfg.context + 1)]     # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def probabilities(logits):
    """Probabilities in float64, over the last axis."""
    p = np.exp(logits.astype(float) - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def cached_reader(params, cfg):
    """The model with its keys and values kept. Those of refused drafts stay in the cache until they
    are overwritten: known, a number, is how many entries count.   -> a function of ids, n."""
    D, H, known = cfg.dim, cfg.heads, 0
    blocks = [part(params, f"{i}.") for i in range(len(params) // 4)]
    kept = np.zeros((len(blocks), 2, H, cfg.context, D // H), params["P"].dtype)

    def read(ids, n):
        nonlocal known
        start, known = min(known, len(ids) - n), len(ids)
        x = params["E"][ids[start:]] + params["P"][start:known]     # (T, D)
        mask = np.tri(len(x), known, start, dtype=bool)
        for p, (keys, values) in zip(blocks, kept):
            qkv = (x @ p["Wqkv"]).reshape(-1, 3, H, D // H)
            q, keys[:, start:known], values[:, start:known] = qkv.transpose(1, 2, 0, 3)
            s = q @ keys[:, :known].swapaxes(1, 2) * (D // H) ** -0.5
            s = np.where(mask, s, -1e9)                             # (H, T, known)
            w = np.exp(s - s.max(axis=2, keepdims=True))
            a = w @ values[:, :known] / w.sum(axis=2, keepdims=True)            # (H, T, d)
            x = x + a.swapaxes(0, 1).reshape(x.shape) @ p["Wo"]
            x = x + np.maximum(x @ p["W1"], 0) @ p["W2"]
        return probabilities(x[-n:] @ params["U"])
    return read


def counted_reader(ids, n, V):
    """A model that has counted what follows n characters in ids, mixed with what follows n - 1 of
    them as if that had been seen 5 times, and so on down to none.   -> a function of ids, n."""
    tables = []
    for m in range(n + 1):                              # contexts of m characters, as numbers
        codes = np.zeros(len(ids) - n, int)
        for k in range(m):
            codes += V ** k * ids[n - 1 - k:-1 - k]     # the character k + 1 before ids[n:]
        order = codes.argsort(kind="stable")
        tables.append((codes[order], ids[n:][order]))   # contexts, and the characters after them

    @functools.lru_cache(None)
    def follows(context):
        codes, tokens = tables[len(context)]
        code = sum(V ** k * c for k, c in enumerate(reversed(context)))
        first, end = np.searchsorted(codes, [code, code + 1])
        counts = np.bincount(tokens[first:end], minlength=V)
        shorter = follows(context[1:]) if context else np.full(V, 1 / V)
        return (counts + 5 * shorter) / (counts.sum() + 5)
    return lambda ids, n_rows: follows(tuple(ids[-n:]))[None]


def measure_drafts(params, cfg, draft, k, prompt, samples=20):
    """Continue the prompt with k drafts per pass, by the model itself if draft is None.   -> the
    last sample, its marks, share accepted, characters per pass, milliseconds per character."""
    rng, every, count = np.random.default_rng(cfg.seed), "", cfg.context - len(prompt) - 8
    seconds = []
    for _ in range(samples):
        before = time.process_time()
        target, other = cached_reader(params, cfg), draft or cached_reader(params, cfg)
        ids, marks = speculate(target, other, prompt, count, k, rng)
        seconds.append(time.process_time() - before)
        every += marks
    ms = 1000 * float(np.median(seconds)) / count       # other programs disturb a few samples
    accepted, refused, all_accepted = (every.count(mark) for mark in " ^+")
    share = accepted / max(1, accepted + refused)
    return ids[len(prompt):], marks, share, len(every) / (refused + all_accepted), ms


def run_text(cfg):
    """Train the target; compare drafts, their number, and a deeper target."""
    start = time.perf_counter()
    chars, train_ids, validation = load_corpus(cfg.data, cfg.context)
    params = init_text(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"{cfg.data or 'sentences'}: {len(train_ids)} characters to learn from, {len(chars)} "
          f"different\n{cfg.layers} layers, {cfg.heads} heads, dim {cfg.dim}, {size} parameters\n"
          f"chance level: loss {math.log(len(chars)):.3f}")
    losses = train(params, cfg, text_batch)
    held_out = [text_batch(cfg, k, split=2) for k in range(1, 21)]
    loss = float(np.mean([loss_and_grads(params, batch, cfg)[0] for batch in held_out]))
    check_finite(loss, params)
    ids, _ = held_out[0]
    logits, _ = plain_gpt_forward(params, ids, cfg, causal_tiles(cfg.context, cfg.tile))
    P = probabilities(logits)                                       # (B, T, V)

    deep, block = dict(params), part(params, "0.").items()
    depths = cfg.layers, max(12, cfg.layers)
    for i in range(*depths):                            # blocks that add 0, and cost what others do
        deep |= {f"{i}.{name}": w * (name in ("Wqkv", "W1")) for name, w in block}
    counted, overlap = {n: counted_reader(train_ids, n, len(chars)) for n in (1, 3)}, {0: 1.0}
    for n, read in counted.items():                     # of the same positions, from the fourth on
        Q = [[read(row[:t], 1)[0] for t in range(4, len(row) + 1)] for row in ids.tolist()]
        overlap[n] = float(np.minimum(P[:, 3:], Q).sum(axis=2).mean())
    print(f"validation {loss:.3f}\n\nRows: n, the characters that a draft depends on (0: the draft "
          "is the target); k, how\nmany are drafted. Columns: 1 - TV on validation text, what both "
          "distributions share;\naccepted; characters per pass (predicted); time per character")
    metrics, prompt = {"gap": 0.0}, validation[:8].tolist()
    for depth, target in zip(depths, (params, deep)):
        *_, plain = measure_drafts(target, cfg, None, 0, prompt)
        print(f"{depth} layers, no drafts: {plain:.2f} ms")
        for n, k in ((1, 4), (0, 4), (3, 1), (3, 2), (3, 8), (3, 4)):
            text, marks, a, per_pass, ms = measure_drafts(target, cfg, counted.get(n), k, prompt)
            predicted = sum(a ** j for j in range(k + 1))           # (1 - a^(k + 1)) / (1 - a)
            print(f"  n {n}  k {k}   {overlap[n]:.2f}  {a:.2f}   {per_pass:.2f} ({predicted:.2f})"
                  f"   {ms:.2f} ms, speedup={plain / ms:.2f}")
            metrics |= {f"accepted_{n}_{k}": a, f"per_pass_{n}_{k}": per_pass,
                        f"layers_{depth}_{n}_{k}_speedup": plain / ms,
                        "gap": max(metrics["gap"], abs(a - overlap[n]))}
    print('\nA sample; below it: " " accepted, "^" drawn after a refusal, "+" drawn after all k '
          "were accepted")
    print("".join(chars[c] for c in text).replace("\n", "/") + "\n" + marks[:len(text)])
    print("\nNext: python faster.py text --steps 1000      python lora.py")
    print_result("text", cfg, validation=loss, **metrics, params=size, steps=len(losses),
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


def dim_fits(cfg):
    """What must hold between the values of a task that trains: (ok, what, expected, found)."""
    yield cfg.dim % cfg.heads == 0, "--dim", f"a multiple of --heads {cfg.heads}", cfg.dim
    least = 32 if isinstance(cfg, Text) else 2
    yield cfg.context >= least, "--context", f"{least} or more", cfg.context


CONSTRAINTS = {Config: dim_fits, Text: dim_fits}


def tiled_cases(rng):
    """Inputs of tiled_attention_forward, for gradcheck.py: 3 tiles, all, and with one left out."""
    q, k, v = rng.standard_normal((3, 2, 3, 7, 5))
    return [dict(q=q, k=k, v=v, tiles=tiles, tile=3)
            for tiles in (causal_tiles(7, 3)[::-1], [(0, 0), (1, 1), (2, 2), (2, 0)])]


GRADCHECK = {"tiled_attention": tiled_cases,
             "row_block_attention": "q 2 3 7 5, k 2 3 7 5, v 2 3 7 5, block=3"}

TASKS = {"repeat": Task(Config, init_params, make_batch, loss_and_grads, main),
         "lengths": Task(Lengths, None, None, None, run_lengths),
         "patterns": Task(Patterns, None, None, None, run_patterns),
         "exact": Task(Exact, None, None, None, run_exact),
         "text": Task(Text, init_text, text_batch, loss_and_grads, run_text)}

if __name__ == "__main__":
    run(TASKS)
