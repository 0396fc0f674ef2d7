"""nested_attention.py: attention as a memory that is trained while it reads.

Linear attention (no softmax) outputs the sum of all earlier values v_s, each times k_s . q. That
is M q, where M = sum_s v_s k_s^T is a matrix: a memory. Adding v k^T to M is one step of gradient
descent on the objective -<M k, v>, which is small if M k points along v. So attention is learning,
and its objective, step size and optimizer are choices. Learning happens on two levels:
    fast: the memory M, zero at the start of every sequence, makes one step per token
    slow: embeddings k, q, v and step sizes eta are trained by Adam, through all fast steps

Forward, for the tokens t = 1..T of a sequence:
    y = M q             read before write: token t is not in M yet
    e = c M k - v       c = 0: Hebb's rule, objective -<M k, v>: M' k = M k + v if eta = |k| = 1
                        c = 1: the delta rule, objective |M k - v|^2 / 2: then M' k = v
    M' = M - eta e k^T  e k^T is the slope of the objective by M; M' is the M of token t + 1
Backward, for t = T..1, where A = dM' is the derivative of the loss by M':
    de = -eta A k       dk = -eta A^T e + c M^T de        deta = -e^T A k
    dv = -de            dq = M^T dy
    dM = A + c de k^T + dy q^T      M is used in M', e and y, so three gradients add

Run    python nested_attention.py     (--help lists the other tasks)
Papers: Behrouz et al. 2025 (Nested Learning), Katharopoulos et al. 2020 (linear attention),
Schlag et al. 2021 (its memory with the delta rule), Schmidhuber 1992 (fast weights).
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
    """Recall values by Hebb's rule, then by --rule."""
    rule: Literal["hebb", "delta"] = "delta"  # inner rule: what a token does to the memory
    keys: int = 8           # different keys
    values: int = 8         # different values
    dim: int = 8            # dimension of k, q and v: the memory is a dim x dim matrix
    length: int = 32        # tokens per sequence
    junk: float = 0.25      # share of tokens that are marked as junk
    batch_size: int = 32    # sequences per step
    steps: int = 150        # optimizer steps
    lr: float = 0.05        # learning rate
    seed: int = 0           # random seed


# ---- layers: T tokens, B sequences, keys (d,), values (p,); linear: N rows, D inputs, M outputs --

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


def embedding_forward(ids, E):
    """Row ids of E.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """Row v of dE is the sum of dout over all positions whose id is v."""
    ids, shape = cache
    onehot = (ids.reshape(-1, 1) == np.arange(shape[0])).astype(dout.dtype)     # (positions, V)
    dE = onehot.T @ dout.reshape(len(onehot), -1)       # E[ids] is onehot @ E, a linear layer
    return dE.reshape(shape)


def unit_forward(x):
    """y = x / |x|, row by row.   x (N, D) -> y (N, D) of length 1."""
    norm = (x * x).sum(axis=1, keepdims=True) ** 0.5
    y = x / norm
    return y, (y, norm)


def unit_backward(dout, cache):
    """dx = (dout - y (y . dout)) / |x|: the part of dout along y would only change the length."""
    y, norm = cache
    return (dout - y * (y * dout).sum(axis=1, keepdims=True)) / norm


def memory_forward(k, q, v, eta, c):
    """y = M q, e = c M k - v, M' = M - eta e k^T, token by token; M begins at 0. c = 0: Hebb's
    rule, c = 1: the delta rule.   k, q (T, B, d), v (T, B, p), eta (T, B) -> y (T, B, p)."""
    T, B, d = k.shape
    k, q, v, eta = k[..., None], q[..., None], v[..., None], eta[..., None, None]   # columns
    kT = k.swapaxes(2, 3)                                                           # (T, B, 1, d)
    M = np.zeros((T + 1, B, v.shape[2], d), k.dtype)    # M[t]: before token t
    e = np.empty_like(v)                                                            # (T, B, p, 1)
    for t in range(T):
        e[t] = c * (M[t] @ k[t]) - v[t]
        M[t + 1] = M[t] - eta[t] * e[t] @ kT[t]
    y = M[:-1] @ q                                                                  # (T, B, p, 1)
    return y[..., 0], (M, e, k, q, eta, c)


def memory_backward(dout, cache):
    """The formulas at the top of the file, from the last token to the first.
    dout (T, B, p) -> dk, dq, dv, deta."""
    M, e, k, q, eta, c = cache
    dy, kT, qT = dout[..., None], k.swapaxes(2, 3), q.swapaxes(2, 3)
    dM, de = np.zeros_like(M), np.empty_like(e)         # nothing reads the last M', so its dM is 0
    for t in reversed(range(len(k))):
        de[t] = -eta[t] * (dM[t + 1] @ k[t])
        dM[t] = dM[t + 1] + c * de[t] @ kT[t] + dy[t] @ qT[t]
    A, MT = dM[1:], M[:-1].swapaxes(2, 3)               # A[t] = dM': the rest needs no loop
    dk = MT @ (c * de) - A.swapaxes(2, 3) @ (eta * e)
    dq = MT @ dy
    deta = -(e * (A @ k)).sum(axis=(2, 3))
    return dk[..., 0], dq[..., 0], -de[..., 0], deta


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


# ---- data: tokens such as "key c now has value 3"; junk tokens are to be ignored -----------------

def find_sources(key, junk, keys):
    """The position of the token that holds the answer: the last earlier one with the same key that
    is not junk; -1 if there is none.   key, junk (T, B) -> (T, B)."""
    b = np.arange(key.shape[1])
    last = np.full((len(b), keys), -1)                  # position of the last token of every key
    source = np.empty_like(key)
    for t in range(len(key)):
        source[t] = last[b, key[t]]
        last[b, key[t]] = np.where(junk[t], source[t], t)
    return source


def make_batch(cfg, step, dtype=np.float32):
    """Random tokens -> key, value, junk (0 or 1), targets, each (T, B). The target is the value
    that the key has before the token, -1 if it has none yet."""
    rng = np.random.default_rng((cfg.seed, step))
    shape = (cfg.length, cfg.batch_size)
    key = rng.integers(0, cfg.keys, shape)
    value = rng.integers(0, cfg.values, shape)
    junk = (rng.random(shape) < cfg.junk).astype(int)
    junk[0, 0] = 0                                      # in any batch at least one token has a
    key[-1, 0] = key[0, 0]                              # target: the last one of sequence 0
    source = find_sources(key, junk, cfg.keys)
    targets = np.where(source >= 0, np.take_along_axis(value, source, axis=0), -1)
    return key, value, junk, targets


# ---- model: embeddings, the memory, a linear layer -----------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """Wk, Wq (keys, d), Wv (values, d): embeddings; Wo (d, values), bo: from y to logits; for the
    delta rule eta (2,): step sizes of normal tokens and of junk."""
    Wk = rng.standard_normal((cfg.keys, cfg.dim))
    params = {"Wk": Wk, "Wq": Wk,                       # queries begin as their keys
              "Wv": rng.standard_normal((cfg.values, cfg.dim)),
              "Wo": rng.standard_normal((cfg.dim, cfg.values)) * cfg.dim ** -0.5,
              "bo": np.zeros(cfg.values)}
    if cfg.rule == "delta":
        params["eta"] = np.full(2, 0.5)
    return {name: array.astype(dtype) for name, array in params.items()}


def tokens_forward(params, key, value, junk):
    """Ids (T, B) -> k, q of length 1, v, each (T, B, d), eta (T, B)."""
    k, unit_k = unit_forward(params["Wk"])              # rows, since tokens are more than rows
    q, unit_q = unit_forward(params["Wq"])
    k, rows_k = embedding_forward(key, k)
    q, rows_q = embedding_forward(key, q)
    v, rows_v = embedding_forward(value, params["Wv"])
    eta, rows_eta = embedding_forward(junk, params.get("eta", np.ones(2, k.dtype)))
    return (k, q, v, eta), (unit_k, unit_q, rows_k, rows_q, rows_v, rows_eta)


def tokens_backward(dk, dq, dv, deta, cache):
    """dk, dq, dv (T, B, d), deta (T, B) -> gradients by name."""
    unit_k, unit_q, rows_k, rows_q, rows_v, rows_eta = cache
    return {"Wk": unit_backward(embedding_backward(dk, rows_k), unit_k),
            "Wq": unit_backward(embedding_backward(dq, rows_q), unit_q),
            "Wv": embedding_backward(dv, rows_v),
            "eta": embedding_backward(deta, rows_eta)}


def recall_forward(params, tokens, cfg):
    """tokens: key, value, junk (T, B) -> logits (T B, values) of the value before each token."""
    inputs, tokens_cache = tokens_forward(params, *tokens)
    y, memory = memory_forward(*inputs, c=("hebb", "delta").index(cfg.rule))
    logits, linear = linear_forward(y.reshape(-1, cfg.dim), params["Wo"], params["bo"])
    return logits, (tokens_cache, memory, y.shape, linear)


def recall_backward(dout, cache):
    """recall_forward in reverse order -> gradients by name."""
    tokens_cache, memory, shape, linear = cache
    dy, dWo, dbo = linear_backward(dout, linear)
    dinputs = memory_backward(dy.reshape(shape), memory)
    return {**tokens_backward(*dinputs, tokens_cache), "Wo": dWo, "bo": dbo}


def recall_loss(logits, targets):
    """Cross-entropy where targets (T, B) are not -1 -> loss, dlogits (T B, values), accuracy."""
    known = np.flatnonzero(targets >= 0)
    targets = targets.ravel()[known]
    loss, cache = softmax_cross_entropy_forward(logits[known], targets)
    dlogits = np.zeros_like(logits)
    dlogits[known] = softmax_cross_entropy_backward(1.0, cache)
    accuracy = (logits[known].argmax(axis=1) == targets).mean()
    return loss, dlogits, accuracy


def loss_and_grads(params, batch, cfg, forward=recall_forward, backward=recall_backward):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    *tokens, targets = batch
    logits, cache = forward(params, tokens, cfg)
    loss, dlogits, _ = recall_loss(logits, targets)
    grads = backward(dlogits, cache)
    return loss, {name: grads[name] for name in params}     # Hebb's eta is 1 and not learned


# ---- training ------------------------------------------------------------------------------------

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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        adam_update(params, grads, state, cfg.lr)
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def evaluate_recall(params, cfg, forward=recall_forward):
    """-> loss and accuracy on 8192 tokens of fresh sequences."""
    fresh = replace(cfg, batch_size=math.ceil(8192 / cfg.length))
    *tokens, targets = make_batch(fresh, cfg.steps + 1)
    logits, _ = forward(params, tokens, fresh)
    loss, _, accuracy = recall_loss(logits, targets)
    check_finite(loss, params)
    return float(loss), float(accuracy)


# ---- demo ----------------------------------------------------------------------------------------

def numeric_slope(objective, M, k):
    """Slope of sum(objective(M k)) by M, by central differences, which are exact up to quadratic
    objectives.   M (T, B, p, d), k (T, B, d, 1) -> (T, B, p, d)."""
    slope = np.empty_like(M)
    for i, j in np.ndindex(M.shape[2:]):
        D = np.zeros_like(M)
        D[..., i, j] = 1
        change = objective((M + D) @ k) - objective((M - D) @ k)
        slope[..., i, j] = change.sum(axis=(2, 3)) / 2
    return slope


def check_identities(rng):
    """Compute both sides of three statements on random numbers -> {statement: difference}."""
    k, q, v = rng.standard_normal((3, 6, 1, 4))         # 6 tokens of one sequence
    eta = rng.random((6, 1))
    y, _ = memory_forward(k, q, v, np.ones((6, 1)), c=0)
    scores = np.tril(q[:, 0] @ k[:, 0].T, -1)           # k_s . q_t for s < t, else 0
    found = {"(Q K^T, masked) V, linear attention  =  a memory with Hebb's rule":
             scores @ v[:, 0] - y[:, 0]}
    target = v[..., None]
    for c, objective, statement in (
            (0, lambda Mk: -Mk * target, "Hebb's rule  =  gradient descent on -<M k, v>"),
            (1, lambda Mk: (Mk - target) ** 2 / 2,
             "delta rule  =  gradient descent on |M k - v|^2 / 2")):
        _, (M, *_) = memory_forward(k, q, v, eta, c)    # M from first to last
        step = eta[..., None, None] * numeric_slope(objective, M[:-1], k[..., None])
        found[statement] = M[:-1] - step - M[1:]
    return {statement: float(np.abs(error).max()) for statement, error in found.items()}


def attention_map(forward, k, q, *more):
    """The weight of every v_s in every y_t of forward(k, q, v, *more). If v_s is row s of the
    identity matrix, then y_t lists these weights.   k, q (T, B, d) -> (B, T, T)."""
    T, B, _ = k.shape
    identity = np.repeat(np.eye(T, dtype=k.dtype)[:, None], B, axis=1)
    weights, _ = forward(k, q, identity, *more)
    return weights.swapaxes(0, 1)


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


def memory_map(weights, key, junk):
    """Attention maps (B, T, T), key, junk (T, B) -> the share of tokens with a source whose weight,
    plus or minus, is the largest and is there only; the map of the first sequence as lines."""
    weights, source = np.abs(weights), find_sources(key, junk, key.max() + 1).T     # source (B, T)
    others = np.where(np.arange(len(key)) == source[..., None], 0, weights).max(axis=2)
    share = (others < 0.999 * weights.max(axis=2))[source >= 0].mean()      # an equal is no match
    keys = [chr(97 + number % 26) for number in key[:, 0]]
    marks = [" x"[mark] for mark in junk[:, 0]]
    lines = [f"{a}  {x}  {''.join(row)}" for a, x, row in zip(keys, marks, shade(weights[0]))]
    return float(share), ["      " + "".join(keys), "      " + "".join(marks), *lines]


MAP_LEGEND = """
The memory as attention. Row: the token at which it is read; column: a token (its key; x: junk).
Dark: the column's value has a large weight, plus or minus. Correct is the last column before the
row's token with its key and no x; in the title: how often, of all, it is darker than any other."""


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
    """Check the identities, train both rules, show what they attend to."""
    start, maps = time.perf_counter(), {}
    print("Identities, on random numbers; in front the largest difference (1e-15 is rounding):")
    identities = check_identities(np.random.default_rng(cfg.seed))
    for statement, error in identities.items():
        print(f"  {error:.0e}   {statement}")
    few = dict(keys=min(4, cfg.keys), values=min(9, cfg.values), length=16, batch_size=256)
    key, value, junk, targets = make_batch(replace(cfg, **few), cfg.steps + 2)
    print(f"\nRecall: token c7 gives key c the value 7, except junk ({cfg.junk:.0%}, marked x). The"
          "\ntarget is the value that the key had before, - if none. An example with few keys:")
    print("tokens   " + "".join(f" {chr(97 + a % 26)}{b}{' x'[mark]} "
                                for a, b, mark in zip(key[:, 0], value[:, 0], junk[:, 0])))
    print("targets  " + "".join(f"{b:3d}  " if b >= 0 else "  -  " for b in targets[:, 0]))
    metrics = {"identity_error": max(identities.values())}
    for rule in dict.fromkeys(["hebb", cfg.rule]):
        part = replace(cfg, rule=rule)
        params = init_params(part, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\n{rule}: {cfg.keys} keys, {cfg.values} values, {cfg.length} tokens per sequence, "
              f"memory {cfg.dim} x {cfg.dim}, {size} parameters")
        print(f"chance level: loss {math.log(cfg.values):.3f}, accuracy {1 / cfg.values:.3f}")
        losses = train(params, part)
        loss, accuracy = evaluate_recall(params, part)
        step = "1" if rule == "hebb" else "{:.2f}, for junk {:.2f}".format(*params["eta"])
        print(f"fresh sequences: loss {loss:.4g}, accuracy {accuracy:.3f}; step size {step}")
        (k, q, _, eta), _ = tokens_forward(params, key, value, junk)
        weights = attention_map(memory_forward, k, q, eta, ("hebb", "delta").index(rule))
        share, lines = memory_map(weights, key, junk)
        maps[f"{rule}: {share:.0%}"] = lines
        metrics.update({f"{rule}_accuracy": accuracy, f"{rule}_alignment": share})
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print(MAP_LEGEND)
    side_by_side(maps, maps.values())
    print("\nNext: python nested_attention.py rules      python nested_attention.py identities")
    print_result("recall", cfg, **metrics, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: all inner rules, memories of several time scales, identities, flags. =

MORE = """
Break it (what to change, and what becomes of the accuracy of delta, 100 % as it is)
    memory_backward: return 0 * dk[..., 0], dq[..., 0], 0 * de[..., 0], deta    delta 91 %: keys
        stay as they are. How to write a key is learned only through the memories after it
    memory_backward: drop MT @ (c * de) from dk         delta 100 %, though the gradient is wrong:
        check gradients instead of looking at the loss
    memory_forward: y = M[1:] @ q, a read after the write    delta diverges, and an identity fails;
        with a backward pass to match 43 %: the rule has replaced the value that is asked for
    tokens_forward: eta = 0 * eta + 2.5 before return   36 %; with 2.1 60 %: with keys of length 1
        a step above 2 overshoots by more than the error
    unit_forward: return x, (0 * x, 1)                  15 %: long keys make steps that diverge
    python nested_attention.py rule --rule momentum --mu 0.8     90 %, 47 % at 512 tokens; 0.5:
        99 %, 0.95: 18 % at 512. Momentum goes on writing values that have been replaced
    python nested_attention.py rule --rule adam --beta1 0.9      59 %, for the same reason
    python nested_attention.py rule --keys 12 --steps 300        97 %, 85 % at 512 tokens: in 8
        dimensions 12 keys cannot all be orthogonal. --rule hebb --alpha token has 76 % at 512
        tokens, --rule hebb --eta fixed 26 %
    cms_forward: wait = 1 + 0 * wait    (python nested_attention.py memories)    loss 1.065
        for 0.825: gradients that are gathered in G while a memory waits are never dropped

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Learn the first memory, M0 (p, d), in place of 0. Its gradient is dM[0], summed over what?
    2. Use Wk for queries, too. Which gradients add? Does Hebb's rule become better or worse?
    3. Huber's objective has e = clip(M k - v, -1, 1). Where does de pass on to dM, dk and dv?

Papers of these parts: Kingma and Ba 2015 (Adam), Yang et al. 2024 (gated delta rule). Numbers of
equations are those of arXiv 2512.24695 (Nested Learning).
"""

import argparse
import contextlib
import ctypes
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


# ---- any inner rule: python nested_attention.py rule --rule momentum -----------------------------
# One memory serves four rules (Eq.: numbers in the paper, arXiv 2512.24695):
#     S' = mu S - eta e k^T     momentum: a running sum of steps (Eq. 33)
#     M' = alpha M + S'         alpha < 1 forgets (64); eta and alpha may depend on the token (76)
# Delta gradient descent, dgd (56, 57), has M k + e in place of e: c = 2. In the paper Adam is read
# as a memory (101-105) and trains slow levels; as an inner rule it is ours.
# Memories are read before they are written (94); after it (16), the delta rule would output the
# value just written.

@dataclass
class Rule(Config):
    """Recall by one inner rule, with all its choices."""
    rule: Literal["hebb", "delta", "momentum", "adam", "dgd"] = "delta"  # inner rule
    eta: Literal["fixed", "global", "token"] = "token"  # step size: 1, learned, or two learned ones
    alpha: Literal["fixed", "global", "token"] = "fixed"  # share of M that is kept: 1, or learned
    mu: float = 0.0         # inner momentum; 0: learned
    beta1: float = 0.0      # inner Adam: decay of the average gradient
    beta2: float = 0.9      # inner Adam: decay of the average squared gradient


def momentum_memory_forward(k, q, v, eta, alpha, mu, c):
    """y = M q, e = c M k - v, S' = mu S - eta e k^T, M' = alpha M + S'; S and M begin at 0.
    k, q (T, B, d), v (T, B, p), eta, alpha, mu (T, B) -> y (T, B, p)."""
    T, B, d = k.shape
    k, q, v = k[..., None], q[..., None], v[..., None]                              # columns
    eta, alpha, mu = eta[..., None, None], alpha[..., None, None], mu[..., None, None]
    kT = k.swapaxes(2, 3)                                                           # (T, B, 1, d)
    M = np.zeros((T + 1, B, v.shape[2], d), k.dtype)
    S, e = np.zeros_like(M), np.empty_like(v)
    for t in range(T):
        e[t] = c * (M[t] @ k[t]) - v[t]
        S[t + 1] = mu[t] * S[t] - eta[t] * e[t] @ kT[t]
        M[t + 1] = alpha[t] * M[t] + S[t + 1]
    y = M[:-1] @ q
    return y[..., 0], (M, S, e, k, q, eta, alpha, mu, c)


def momentum_memory_backward(dout, cache):
    """dS' = dM' + mu dS'' of the next token, since S' is used in M' and in S''; then as in
    memory_backward with A = dS', and dM gets alpha dM'; dalpha = <dM', M>, dmu = <dS', S>."""
    M, S, e, k, q, eta, alpha, mu, c = cache
    dy, kT, qT = dout[..., None], k.swapaxes(2, 3), q.swapaxes(2, 3)
    dM, dS, de = np.zeros_like(M), np.zeros_like(M), np.empty_like(e)
    for t in reversed(range(len(k))):
        dS[t + 1] += dM[t + 1]
        dS[t] = mu[t] * dS[t + 1]
        de[t] = -eta[t] * (dS[t + 1] @ k[t])
        dM[t] = alpha[t] * dM[t + 1] + c * de[t] @ kT[t] + dy[t] @ qT[t]
    A, MT = dS[1:], M[:-1].swapaxes(2, 3)
    dk = MT @ (c * de) - A.swapaxes(2, 3) @ (eta * e)
    dq = MT @ dy
    deta = -(e * (A @ k)).sum(axis=(2, 3))
    dalpha = (dM[1:] * M[:-1]).sum(axis=(2, 3))
    dmu = (A * S[:-1]).sum(axis=(2, 3))
    return dk[..., 0], dq[..., 0], -de[..., 0], deta, dalpha, dmu


def adam_memory_forward(k, q, v, eta, alpha, c, beta1, beta2, eps=1e-6):
    """g = e k^T, m and s: moving averages of g and g^2, mhat = m / (1 - beta1^t), shat likewise,
    M' = alpha M - eta mhat / sqrt(shat + eps): eps is in the root, whose slope at 0 is infinite.
    Inputs and output as in momentum_memory."""
    T, B, d = k.shape
    k, q, v = k[..., None], q[..., None], v[..., None]                              # columns
    eta, alpha, kT = eta[..., None, None], alpha[..., None, None], k.swapaxes(2, 3)
    M = np.zeros((T + 1, B, v.shape[2], d), k.dtype)
    mhat, r, e = np.empty_like(M[1:]), np.empty_like(M[1:]), np.empty_like(v)
    m, s = np.zeros_like(M[0]), np.zeros_like(M[0])
    for t in range(T):
        e[t] = c * (M[t] @ k[t]) - v[t]
        g = e[t] @ kT[t]
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * g * g
        mhat[t] = m / (1 - beta1 ** (t + 1))
        r[t] = (s / (1 - beta2 ** (t + 1)) + eps) ** -0.5
        M[t + 1] = alpha[t] * M[t] - eta[t] * mhat[t] * r[t]
    y = M[:-1] @ q
    return y[..., 0], (M, mhat, r, e, k, q, eta, alpha, c, beta1, beta2)


def adam_memory_backward(dout, cache):
    """du = -eta dM' for the step u = mhat r, r = (shat + eps)^-1/2, so dmhat = du r and
    dshat = -1/2 du mhat r^3; m and s are also used at the next token; g is used in both, so
    dg = (1 - beta1) dm + 2 (1 - beta2) g ds; g = e k^T, so de = dg k, dk = dg^T e."""
    M, mhat, r, e, k, q, eta, alpha, c, beta1, beta2 = cache
    dy, kT, qT = dout[..., None], k.swapaxes(2, 3), q.swapaxes(2, 3)
    dM, dg, de = np.zeros_like(M), np.empty_like(mhat), np.empty_like(e)
    dm, ds = np.zeros_like(M[0]), np.zeros_like(M[0])
    for t in reversed(range(len(k))):
        du = -eta[t] * dM[t + 1]
        dm = beta1 * dm + du * r[t] / (1 - beta1 ** (t + 1))
        ds = beta2 * ds - du * mhat[t] * r[t] ** 3 * 0.5 / (1 - beta2 ** (t + 1))
        dg[t] = (1 - beta1) * dm + 2 * (1 - beta2) * (e[t] @ kT[t]) * ds
        de[t] = dg[t] @ k[t]
        dM[t] = alpha[t] * dM[t + 1] + c * de[t] @ kT[t] + dy[t] @ qT[t]
    MT = M[:-1].swapaxes(2, 3)
    dk = MT @ (c * de) + dg.swapaxes(2, 3) @ e
    deta = -(dM[1:] * mhat * r).sum(axis=(2, 3))
    dalpha = (dM[1:] * M[:-1]).sum(axis=(2, 3))
    return dk[..., 0], (MT @ dy)[..., 0], -de[..., 0], deta, dalpha


def sigmoid(z):
    """1 / (1 + e^-z), computed as (1 + tanh(z / 2)) / 2, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def gate_forward(junk, z):
    """sigmoid(z[0]) for every token, or, if z has two entries, sigmoid(z[1]) for junk.
    junk (T, B) of 0 and 1, z (1,) or (2,) -> (T, B)."""
    y = sigmoid(z)
    gate, rows = embedding_forward(junk % len(z), y)
    return gate, (y, rows)


def gate_backward(dout, cache):
    """dz = y (1 - y) times the sum of dout over the tokens that use it."""
    y, rows = cache
    return embedding_backward(dout, rows) * y * (1 - y)


def init_rule(cfg, rng, dtype=np.float32):
    """Wk, Wq, Wv, Wo, bo as before, and those of eta, alpha, mu that are learned."""
    params = init_params(replace(cfg, rule="hebb"), rng, dtype)
    entries = {"fixed": 0, "global": 1, "token": 2}
    params["eta"] = np.full(entries[cfg.eta], 0.5, dtype)
    params["alpha"] = np.full(entries[cfg.alpha], 2.0, dtype)       # alpha, mu: before the sigmoid
    params["mu"] = np.zeros(int(cfg.rule == "momentum" and cfg.mu == 0), dtype)
    return {name: array for name, array in params.items() if array.size}


RULE_C = {"hebb": 0, "delta": 1, "momentum": 1, "adam": 1, "dgd": 2}    # c of e = c M k - v


def inner_memory_forward(k, q, v, eta, alpha, mu, cfg):
    """The memory of cfg.rule -> y (T, B, p)."""
    if cfg.rule == "adam":
        y, cache = adam_memory_forward(k, q, v, eta, alpha, RULE_C["adam"], cfg.beta1, cfg.beta2)
    else:
        y, cache = momentum_memory_forward(k, q, v, eta, alpha, mu, RULE_C[cfg.rule])
    return y, (cfg.rule, cache)


def inner_memory_backward(dout, cache):
    """-> dk, dq, dv, deta, dalpha, dmu (Adam has no mu)."""
    rule, cache = cache
    if rule == "adam":
        return *adam_memory_backward(dout, cache), None
    return momentum_memory_backward(dout, cache)


def rule_forward(params, tokens, cfg):
    """tokens: key, value, junk (T, B) -> logits (T B, values) of the value before each token."""
    key, value, junk = tokens
    rows = junk if cfg.eta == "token" else 0 * junk         # else all tokens use row 0 of eta
    inputs, tokens_cache = tokens_forward(params, key, value, rows)
    gate_caches = {}
    for name, fixed in (("alpha", 1.0), ("mu", cfg.mu if cfg.rule == "momentum" else 0.0)):
        gate = np.full(junk.shape, fixed, params["Wk"].dtype)
        if name in params:
            gate, gate_caches[name] = gate_forward(junk, params[name])
        inputs = *inputs, gate                              # in the end k, q, v, eta, alpha, mu
    y, memory = inner_memory_forward(*inputs, cfg)
    logits, linear = linear_forward(y.reshape(-1, cfg.dim), params["Wo"], params["bo"])
    return logits, (inputs, tokens_cache, gate_caches, memory, y.shape, linear)


def rule_backward(dout, cache):
    """rule_forward in reverse order -> gradients by name."""
    _, tokens_cache, gate_caches, memory, shape, linear = cache
    dy, dWo, dbo = linear_backward(dout, linear)
    *dinputs, dalpha, dmu = inner_memory_backward(dy.reshape(shape), memory)
    grads = {**tokens_backward(*dinputs, tokens_cache), "Wo": dWo, "bo": dbo}
    for name, dgate in (("alpha", dalpha), ("mu", dmu)):
        if name in gate_caches:
            grads[name] = gate_backward(dgate, gate_caches[name])
    return grads


def rule_loss_and_grads(params, batch, cfg):
    """loss_and_grads of the memory of cfg.rule."""
    return loss_and_grads(params, batch, cfg, rule_forward, rule_backward)


# All rules side by side: python nested_attention.py rules

@dataclass
class Rules:
    """Recall by ten inner rules, also in sequences longer than in training."""
    keys: int = 8           # different keys
    length: int = 32        # tokens per sequence
    batch_size: int = 32    # sequences per step
    steps: int = 150        # optimizer steps
    lr: float = 0.05        # learning rate
    seed: int = 0           # random seed


RULES = {   # name in the table: flags of  python nested_attention.py rule  that train the same
    "hebb": dict(rule="hebb", eta="fixed"),
    "hebb, one alpha": dict(rule="hebb", eta="fixed", alpha="global"),
    "hebb, gates": dict(rule="hebb", alpha="token"),    # eta and alpha depend on the token
    "delta, eta 1": dict(rule="delta", eta="fixed"),
    "delta, one eta": dict(rule="delta", eta="global"),
    "delta": dict(rule="delta"),                        # eta depends on the token, as below
    "momentum": dict(rule="momentum"),
    "adam, averaging": dict(rule="adam", beta1=0.9, beta2=0.99),
    "adam": dict(rule="adam"),
    "dgd": dict(rule="dgd"),
}
MAPPED = "hebb", "hebb, gates", "delta, eta 1", "delta"


def train_rule(cfg):
    """-> params, losses; loss and accuracy at 1, 4 and 16 times the trained length, by length."""
    params = init_rule(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"\nrule {cfg.rule}, eta {cfg.eta}, alpha {cfg.alpha}: {size} parameters")
    print(f"chance level: loss {math.log(cfg.values):.3f}, accuracy {1 / cfg.values:.3f}")
    losses = train(params, cfg, make_batch, rule_loss_and_grads)
    tests = {n: evaluate_recall(params, replace(cfg, length=n), rule_forward)
             for n in (cfg.length, 4 * cfg.length, 16 * cfg.length)}
    return params, losses, tests


def key_products(params):
    """|k_i . k_j| of all pairs of keys as a list of lines, and their mean for i != j."""
    k, _ = unit_forward(params["Wk"])
    products = np.abs(k @ k.T)
    lines = ["".join(row) for row in shade(np.repeat(products, 2, axis=1))]
    return lines, float(products[~np.eye(len(k), dtype=bool)].mean())


def run_rules(cfg):
    """Train the rule of cfg, or all of RULES from one start; a table; attention maps; the keys."""
    start, rows, maps, metrics = time.perf_counter(), [], {}, {}
    single = isinstance(cfg, Rule)
    base = Rule(**vars(cfg))
    rules = {cfg.rule: {}} if single else RULES
    few = replace(base, keys=min(4, cfg.keys), length=16, batch_size=256)
    key, _, junk, _ = make_batch(few, cfg.steps + 2)
    lines, overlap = key_products(init_rule(base, np.random.default_rng(cfg.seed)))
    keys = {f"untrained {overlap:.3f}": lines}
    for name, choices in rules.items():
        part = replace(base, **choices)
        params, losses, tests = train_rule(part)
        lines, overlap = key_products(params)
        eta = params.get("eta", np.ones(1))
        rows.append(f"{name:16s}" + "".join(f"{accuracy:11.3f}" for _, accuracy in tests.values())
                    + f"{tests[cfg.length][0]:10.4f}{eta[0]:8.2f}{eta[-1]:8.2f}{overlap:9.3f}")
        if single or name in MAPPED:
            metrics.update({f"{name}_accuracy_{n}": tests[n][1] for n in tests})
            keys[f"{name} {overlap:.3f}"] = lines
            if part.rule != "adam":                     # whose y is not linear in the values
                _, ((k, q, _, *gates), *_) = rule_forward(params, (key, 0 * key, junk), part)
                weights = attention_map(inner_memory_forward, k, q, *gates, part)
                share, lines = memory_map(weights, key, junk)
                maps[f"{name}: {share:.0%}"] = lines
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nAccuracy on fresh sequences as long as in training, 4 and 16 times as long; loss at"
          "\nthe trained length; eta of normal tokens and of junk; mean |k_i . k_j|")
    print(f"{'rule':16s}" + "".join(f"{n:4d} tokens" for n in tests)
          + f"{'loss':>10s}{'eta':>8s}{'junk':>8s}{'keys':>9s}")
    print(*rows, sep="\n")
    if maps:
        print(MAP_LEGEND)
        side_by_side(maps, maps.values())
    print("\nThe slow level makes the fast level's problem easy: if keys are orthogonal, writing v"
          "\nfor one does not change M k for the others. |k_i . k_j| of all pairs of keys; blank is"
          "\n0, @ is 1; in the title the mean for i != j:")
    side_by_side(keys, keys.values())
    print("\nNext: python nested_attention.py rule --rule dgd --keys 12"
          "      python nested_attention.py memories")
    print_result("rule" if single else "rules", cfg,
                 **{name.replace(", ", "_").replace(" ", "_"): x for name, x in metrics.items()},
                 params=sum(p.size for p in params.values()), steps=len(losses),
                 seconds=time.perf_counter() - start)


# ---- memories of several time scales: python nested_attention.py memories ------------------------
# The paper's continuum memory has levels, of which level l gathers gradients and makes a step only
# every C_l tokens (Eq. 71). Summaries say "every 1, 2 to 4, 8 or more steps"; the paper has chunk
# sizes C_l and no such numbers. Its levels are MLPs; ours are matrices M_l whose outputs are added
# (in the manner of its Eq. 74), so that all of them learn from one error.

@dataclass
class Memories:
    """A memory with several update periods, on a stream whose values change and return."""
    periods: str = "1,4,16"  # tokens from update to update, level by level
    shared: bool = False    # one alpha for all levels
    staggered: bool = False  # levels start with the speeds of periods 1, 4, 16, ... in any case
    home: int = 24          # tokens with permanent values at a time
    away: int = 8           # tokens with passing values in between
    keys: int = 6           # different keys
    values: int = 8         # different values
    length: int = 128       # tokens per sequence
    batch_size: int = 16    # sequences per step
    steps: int = 100        # optimizer steps
    lr: float = 0.1         # learning rate
    seed: int = 0           # random seed


def cms_forward(k, v, eta, alpha, w, periods):
    """y = sum_l w_l M_l k, e = y - v, G_l <- G_l + w_l e k^T, and every periods[l] tokens
    M_l <- alpha_l M_l - eta_l G_l, G_l <- 0. In one formula for all tokens and the L levels:
    M <- keep M - rate G, G <- wait G.   k (T, B, d), v (T, B, p), eta, alpha, w (L,)
    -> y (T, B, p)."""
    (T, B, d), L = k.shape, len(periods)
    due = np.arange(1, T + 1)[:, None] % periods == 0                       # (T, L)
    due = due[..., None, None, None].astype(k.dtype)                        # to broadcast over M
    eta, alpha, w = (x[:, None, None, None] for x in (eta, alpha, w))       # (L, 1, 1, 1)
    keep, rate, wait = 1 - due + due * alpha, due * eta, 1 - due            # (T, L, 1, 1, 1)
    k, v = k[..., None], v[..., None]                                       # columns
    kT = k.swapaxes(2, 3)                                                   # (T, B, 1, d)
    M = np.zeros((T + 1, L, B, v.shape[2], d), k.dtype)
    G, e = np.empty_like(M[1:]), np.empty_like(v)
    gathered = np.zeros_like(M[0])
    for t in range(T):
        e[t] = (w * (M[t] @ k[t])).sum(axis=0) - v[t]
        G[t] = gathered + w * (e[t] @ kT[t])                                # (L, B, p, d)
        M[t + 1] = keep[t] * M[t] - rate[t] * G[t]
        gathered = wait[t] * G[t]
    y = e + v
    return y[..., 0], (M, G, e, k, w, due, keep, rate, wait)


def cms_backward(dout, cache):
    """With A = dM': dG = wait (dG of the next token) - rate A, de = sum_l w_l dG_l k,
    dy = dout + de since e = y - v, dM_l = keep_l A_l + w_l dy k^T,
    dk = sum_l w_l (dG_l^T e + M_l^T dy), dw_l = e^T dG_l k + dy^T M_l k, dkeep = <A, M>,
    drate = -<A, G>.   -> dk, dv, deta, dalpha, dw."""
    M, G, e, k, w, due, keep, rate, wait = cache
    kT, dy = k.swapaxes(2, 3), np.empty_like(e)
    dM, dG = np.zeros_like(M), np.empty_like(G)
    dgathered = np.zeros_like(M[0])
    for t in reversed(range(len(k))):
        dG[t] = wait[t] * dgathered - rate[t] * dM[t + 1]
        dy[t] = dout[t, ..., None] + (w * (dG[t] @ k[t])).sum(axis=0)
        dM[t] = keep[t] * dM[t + 1] + w * (dy[t] @ kT[t])
        dgathered = dG[t]
    e, dy, k = e[:, None], dy[:, None], k[:, None]                          # (T, 1, B, ., 1)
    dk = (w * (dG.swapaxes(3, 4) @ e + M[:-1].swapaxes(3, 4) @ dy)).sum(axis=1)
    dw = (e * (dG @ k) + dy * (M[:-1] @ k)).sum(axis=(0, 2, 3, 4))          # (L,)
    dkeep = (dM[1:] * M[:-1]).sum(axis=(2, 3, 4), keepdims=True)            # (T, L, 1, 1, 1)
    drate = -(dM[1:] * G).sum(axis=(2, 3, 4), keepdims=True)
    deta = (due * drate).sum(axis=0).ravel()                                # rate = due eta
    dalpha = (due * dkeep).sum(axis=0).ravel()
    dv = dout - dy[:, 0, ..., 0]                                            # -de
    return dk[..., 0], dv, deta, dalpha, dw


def read_periods(cfg):
    """The update periods as an array."""
    return np.array(cfg.periods.split(","), int)


def init_stream(cfg, rng, dtype=np.float32):
    """log_eta, alpha (before the sigmoid) and w of every level; log_scale of the logits."""
    periods = read_periods(cfg)
    pace = 4.0 ** np.arange(len(periods)) if cfg.staggered else periods
    keep = sigmoid(1.5) ** (periods / pace)             # at equal pace, equal forgetting per token
    alpha = np.log(keep / (1 - keep))
    params = {"log_eta": np.log(0.5 / pace), "alpha": alpha[:1] if cfg.shared else alpha,
              "w": np.ones(len(periods)), "log_scale": np.ones(1)}
    return {name: array.astype(dtype) for name, array in params.items()}


def stream_batch(cfg, step, dtype=np.float32):
    """Home and away in turn -> key, value, away (0 or 1), each (T, B). A sequence has one permanent
    value per key, and one passing value per key and time away. The targets are the values."""
    rng = np.random.default_rng((cfg.seed, step))
    T, B = cfg.length, cfg.batch_size
    key = rng.integers(0, cfg.keys, (T, B))
    cycle, position = np.divmod(np.arange(T), cfg.home + cfg.away)
    away = np.repeat(position[:, None] >= cfg.home, B, axis=1).astype(int)
    permanent = rng.integers(0, cfg.values, (B, cfg.keys))
    passing = rng.integers(0, cfg.values, (cycle[-1] + 1, B, cfg.keys))
    b = np.arange(B)
    value = np.where(away, passing[cycle[:, None], b, key], permanent[b, key])      # (T, B)
    return key, value, away


def stream_forward(params, key, value, cfg):
    """Keys and values one-hot -> logits (T, B, values) of the value before each token."""
    dtype = params["w"].dtype
    k = np.eye(cfg.keys, dtype=dtype)[key]
    v = np.eye(cfg.values, dtype=dtype)[value]
    eta, alpha = np.exp(params["log_eta"]), sigmoid(params["alpha"])
    y, cms = cms_forward(k, v, eta, alpha * np.ones_like(eta), params["w"], read_periods(cfg))
    return np.exp(params["log_scale"]) * y, (cms, eta, alpha)


def stream_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    key, value, _ = batch
    logits, (cms, eta, alpha) = stream_forward(params, key, value, cfg)
    loss, cache = softmax_cross_entropy_forward(logits.reshape(-1, cfg.values), value.ravel())
    dlogits = softmax_cross_entropy_backward(1.0, cache).reshape(logits.shape)
    _, _, deta, dalpha, dw = cms_backward(np.exp(params["log_scale"]) * dlogits, cms)
    if cfg.shared:
        dalpha = dalpha.sum(keepdims=True)              # all levels use it, so gradients add
    return loss, {"log_eta": deta * eta, "alpha": dalpha * alpha * (1 - alpha), "w": dw,
                  "log_scale": (dlogits * logits).sum().reshape(1)}


def train_stream(cfg):
    """-> params, losses; on fresh sequences, four times as long: loss, accuracy, accuracy at the
    first token of each key after a return home."""
    params = init_stream(cfg, np.random.default_rng(cfg.seed))
    losses = train(params, cfg, stream_batch, stream_loss_and_grads)
    fresh = replace(cfg, length=4 * cfg.length, batch_size=math.ceil(2048 / cfg.length))
    key, value, away = stream_batch(fresh, cfg.steps + 1)
    logits, _ = stream_forward(params, key, value, cfg)
    loss, _ = softmax_cross_entropy_forward(logits.reshape(-1, cfg.values), value.ravel())
    check_finite(loss, params)
    right = logits.argmax(axis=2) == value
    t = np.arange(fresh.length)[:, None]
    returned = t - t % (cfg.home + cfg.away)            # when the present time at home began
    first = (away == 0) & (returned > 0) & (find_sources(key, away, cfg.keys) < returned)
    return params, losses, (float(loss), float(right.mean()), float(right[first].mean()))


def draw_timeline(params, cfg, columns=80):
    """What every level holds for one key, from token to token -> list of lines."""
    cycle = cfg.home + cfg.away
    part = replace(cfg, length=cycle + columns, batch_size=16)
    key, value, away = stream_batch(part, cfg.steps + 2)
    _, ((M, *_), _, _) = stream_forward(params, key, value, part)
    key, value, away, M = key[cycle:], value[cycle:], away[cycle:], M[cycle:-1]
    visits = (np.eye(cfg.keys)[key] * away[..., None]).sum(axis=0)          # (B, keys)
    b, a = np.unravel_index(visits.argmax(), visits.shape)  # the key that is seen most when away
    held = params["w"][:, None] * M[:, :, b, :, a]          # (columns, L, values)

    def decode(strengths):                                  # (columns, values) -> text
        text = ""
        for best, most in zip(strengths.argmax(axis=1) % 26, strengths.max(axis=1)):
            text += "." if most < 0.05 else chr(best + (65 if most > 0.5 else 97))
        return text

    seen = [chr(97 + v % 26) if k == a else " " for k, v in zip(key[:, b], value[:, b])]
    lines = ["phase        " + "".join("-#"[phase] for phase in away[:, b]),
             "value seen   " + "".join(seen)]
    for level, period in enumerate(read_periods(cfg)):
        lines.append(f"period {period:4d}  {decode(held[:, level])}")
    return [*lines, "sum          " + decode(held.sum(axis=1))]


OTHERS = {
    "1,1,1": dict(periods="1,1,1"), "4,4,4": dict(periods="4,4,4"),
    "16,16,16": dict(periods="16,16,16"), "1,4,16": dict(periods="1,4,16"),
    "1,4,16 shared": dict(periods="1,4,16", shared=True),
    "1,1,1 staggered": dict(periods="1,1,1", staggered=True),
}


def run_memories(cfg):
    """Train the memory of the flags and show it through time; compare it with others."""
    start, results, sizes, parts = time.perf_counter(), {}, [], {f"{cfg.periods} (flags)": cfg}
    for name, choices in OTHERS.items():
        part = replace(cfg, **{"shared": False, "staggered": False, **choices})
        if part != cfg:
            parts[name] = part
    print(f"A stream of {cfg.keys} keys with {cfg.values} values. Every key has its permanent value"
          f"\nfor {cfg.home} tokens (home), a passing one for {cfg.away} (away), and so on. The"
          "\ntarget is the value, before the memory sees it.")
    for name, part in parts.items():
        sizes.append(sum(p.size for p in init_stream(part, np.random.default_rng(0)).values()))
        print(f"\nperiods {name}: {sizes[-1]} parameters")
        print(f"chance level: loss {math.log(cfg.values):.3f}, accuracy {1 / cfg.values:.3f}")
        params, losses, results[name] = train_stream(part)
        if part is cfg:
            print("\nOne key in time. Column: a token. Phase: - home, # away. Value seen: what"
                  "\nthe token gives to this key, as a character (blank: another key). Below: what"
                  "\neach level and their sum hold for the key (capital: strongly, .: hardly)."
                  "\nWith several periods the sum returns to the permanent value before the key is"
                  "\nseen again.")
            print(*draw_timeline(params, cfg), sep="\n")
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print(f"\nFresh sequences of {4 * cfg.length} tokens. returned: accuracy when a key is first"
          "\nseen after a return; updates: per token; shared: one alpha for all levels; staggered,"
          "\na control: all levels are updated at every token, but start with the speeds of 1,4,16."
          "\nIf the control is as good, speeds are what counts, and periods save updates.")
    print(f"{'periods':20s}{'loss':>10s}{'accuracy':>10s}{'returned':>10s}{'updates':>10s}")
    for name, (loss, accuracy, returned) in results.items():
        updates = (1 / read_periods(parts[name])).sum()
        print(f"{name:20s}{loss:10.3f}{accuracy:10.3f}{returned:10.3f}{updates:10.2f}")
    (_, (loss, accuracy, returned)), *others = results.items()
    gains = {"gain_over_" + name.replace(",", "_").replace(" ", "_"): other[0] - loss
             for name, other in others}
    print("\nNext: python nested_attention.py memories --periods 1,4"
          "      python nested_attention.py inner")
    print_result("memories", cfg, loss=loss, accuracy=accuracy, accuracy_returned=returned,
                 **gains, params=sizes[0], steps=len(losses), seconds=time.perf_counter() - start)


# ---- inner optimizers alone: python nested_attention.py inner ------------------------------------

@dataclass
class Inner:
    """Delta, momentum and Adam without a slow level, on targets v = W k."""
    dim: int = 8            # dimension of keys and targets
    length: int = 128       # tokens per sequence
    batch_size: int = 16    # sequences
    seed: int = 0           # random seed


def draw_keys(kind, cfg, rng):
    """Repeated keys, fresh ones, or fresh ones stretched along the axes or others -> (T, B, d)."""
    T, B, d = cfg.length, cfg.batch_size, cfg.dim
    k = rng.standard_normal((T, B, d))
    if kind == "repeated":
        few = (k[d] + 0.5 * k[:d]) / d ** 0.5                           # d keys that share k[d]
        k = few[np.arange(T) % d]
    if kind in ("axes", "rotated"):
        k = k * 300 ** (-0.5 * np.arange(d) / max(1, d - 1))            # variances 1 to 1 / 300
    if kind == "rotated":
        rotation, _ = np.linalg.qr(rng.standard_normal((B, d, d)))
        k = (rotation @ k[..., None])[..., 0]
    return k


INNER = {   # rule: its memory for inputs k, k, v, step size eta (T, B)
    "delta": lambda k, v, eta: memory_forward(k, k, v, eta, 1),
    "momentum": lambda k, v, eta: momentum_memory_forward(
        k, k, v, eta, np.ones_like(eta), np.full_like(eta, 0.9), 1),
    "adam": lambda k, v, eta: adam_memory_forward(k, k, v, eta, np.ones_like(eta), 1, 0.9, 0.99)}


def run_inner(cfg):
    """A table: the error of three rules on four kinds of keys."""
    start, metrics = time.perf_counter(), {}
    etas = 2.0 ** np.arange(-9, 2)
    print(f"Three rules learn v = W k, a random {cfg.dim} x {cfg.dim} matrix W, from {cfg.length} "
          "tokens. Squared\nerror on the last quarter of them, divided by that of an empty memory, "
          f"at the\nbest of {len(etas)} values of eta: 0 is perfect, 1 is nothing learned.")
    print(f"{'keys':44s}" + "".join(f"{rule:>10s}" for rule in INNER))
    for kind, text in (("repeated", f"{cfg.dim} similar ones, again and again"),
                       ("fresh", "always new, equal in all directions"),
                       ("axes", "always new, stretched along the axes"),
                       ("rotated", "always new, stretched along other directions")):
        rng = np.random.default_rng(cfg.seed)
        W = rng.standard_normal((cfg.batch_size, cfg.dim, cfg.dim))
        k = draw_keys(kind, cfg, rng)
        v = (W @ k[..., None])[..., 0]
        tail = slice(-math.ceil(cfg.length / 4), None)
        error = {}
        for rule, forward in INNER.items():
            with np.errstate(all="ignore"):                             # large steps diverge
                outputs = [forward(k, v, np.full(k.shape[:2], eta))[0] for eta in etas]
                errors = [((y - v)[tail] ** 2).sum() for y in outputs]
            error[rule] = float(np.nanmin(errors) / (v[tail] ** 2).sum())
        print(f"{text:44s}" + "".join(f"{value:10.4f}" for value in error.values()))
        metrics[f"momentum_over_delta_{kind}"] = error["momentum"] / error["delta"]
        metrics[f"adam_over_delta_{kind}"] = error["adam"] / error["delta"]
    print("Momentum and Adam help if keys repeat. Adam also helps if the curvature follows the"
          "\naxes, since it divides entry by entry; after a rotation it does not. If all directions"
          "\nare equal, delta is best. (In the result line: errors over that of delta.)")
    age = np.arange(40)
    print("\nWeights of the last 40 gradients in an update, the newest first; blank is 0, @ is 1:")
    print(f"momentum, mu 0.9      {''.join(shade(0.9 ** age))}  half of the sum in the first 7")
    print(f"level of period 16    {''.join(shade(age < 16))}  gathered, used once, dropped")
    print("\nNext: python nested_attention.py rule --rule momentum --mu 0.95      python cnn.py")
    print_result("inner", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- identities: python nested_attention.py identities -------------------------------------------
# Misprints of the paper: in Eq. 65 the factor (I - eta k k^T) stands to the left of M; for M (p, d)
# it has to stand to the right. In Eq. 92 the minus should be a plus for the stated objective. That
# Adam is the optimal memory (101-105) is exact only if both of its averages have the same beta.

@dataclass
class Identities:
    """Ten statements about memories and optimizers, both sides computed."""
    seed: int = 0           # random seed


def adam_slope(k, v, beta=0.9, eps=1e-6):
    """The slope, at Adam's last step u (with beta for both averages), of what u minimizes entry by
    entry: sum_i w_i (g_i u - sqrt(shat + eps))^2 + eps u^2, for gradients g_i and the weights w_i
    that they have in the averages."""
    one = np.ones(k.shape[:2])
    _, (_, mhat, r, e, *_) = adam_memory_forward(k, k, v, one, one, 0, beta, beta, eps)
    g = e @ k[:, :, None]                               # (T, B, p, d)
    age = np.arange(len(k))[::-1, None, None, None]
    w = beta ** age * (1 - beta) / (1 - beta ** len(k))

    def objective(u):
        return (w * (g * u - 1 / r[-1]) ** 2).sum(axis=0) + eps * u ** 2
    u = mhat[-1] * r[-1]
    return (objective(u + 1) - objective(u - 1)) / 2    # exact: the objective is quadratic


def more_identities(rng):
    """Compute both sides of further statements on random numbers -> {statement: difference}."""
    T, B, d, p = 12, 3, 5, 4
    k, q = rng.standard_normal((2, T, B, d))
    k = k / np.linalg.norm(k, axis=2, keepdims=True)
    v = rng.standard_normal((T, B, p))
    eta, alpha, mu = rng.uniform(0.1, 0.9, (3, T, B))
    k_column, v_column, step = k[..., None], v[..., None], eta[..., None, None]
    kT = k_column.swapaxes(2, 3)
    _, (M, *_) = memory_forward(k, q, v, eta, c=1)                      # delta rule
    _, (M_dgd, *_) = memory_forward(k, q, v, eta, c=2)                  # dgd on |M k - v|^2 / 2
    slope = numeric_slope(lambda Mk: ((Mk - v_column) ** 2 + Mk ** 2) / 2, M_dgd[:-1], k_column)
    found = {
        "delta rule  =  M (I - eta k k^T) + eta v k^T":
            M[:-1] @ (np.eye(d) - step * k_column @ kT) + step * v_column @ kT - M[1:],
        "delta rule  =  dgd on -<M k, v>, which is M - eta (M k - v) k^T":
            M[:-1] - step * (M[:-1] @ k_column - v_column) @ kT - M[1:],
        "dgd on |M k - v|^2 / 2  =  gradient descent on |M k - v|^2 / 2 + |M k|^2 / 2":
            M_dgd[:-1] - step * slope - M_dgd[1:],
        "Adam's last step, beta1 = beta2: slope of a least squares objective  =  0":
            adam_slope(k, v)}
    levels = np.array([0.5, 0.2]), np.array([0.8, 0.9]), np.array([0.7, 0.4]), np.array([1, 3])
    for name, forward, *more in (
            ("delta rule", memory_forward, eta, 1),
            ("momentum", momentum_memory_forward, eta, alpha, mu, 1),
            ("continuum memory", lambda k, q, v, *rest: cms_forward(k, v, *rest), *levels)):
        y, _ = forward(k, q, v, *more)
        found[f"(attention map) V  =  output of the memory ({name})"] = (
            attention_map(forward, k, q, *more) @ v.swapaxes(0, 1) - y.swapaxes(0, 1))
    return {statement: float(np.abs(error).max()) for statement, error in found.items()}


def run_identities(cfg):
    """Print the largest difference between both sides of every statement."""
    start = time.perf_counter()
    found = {**check_identities(np.random.default_rng(cfg.seed)),
             **more_identities(np.random.default_rng(cfg.seed))}
    print("Identities: the left and the right side are computed in two ways, on random numbers."
          "\nIn front stands the largest difference between them; about 1e-15 is rounding. M is the"
          "\nmemory, dgd is delta gradient descent, V has the values of all tokens as rows.")
    for statement, error in found.items():
        print(f"  {error:.0e}   {statement}")
    print("\nNext: python nested_attention.py inner      python nested_attention.py rules")
    print_result("identities", cfg, identities=len(found), identity_error=max(found.values()),
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


def limits(cfg):
    """Constraints: sizes of 2 or more, shares below 1, and what only one task has."""
    rows = []
    for name, value in vars(cfg).items():
        if name in ("keys", "values", "length"):
            rows.append((value >= 2, "--" + name, "2 or more", value))
        if name in ("junk", "mu", "beta1", "beta2"):
            rows.append((value < 1, "--" + name, "below 1", value))
    if isinstance(cfg, Rule):
        ok = cfg.mu == 0 or cfg.rule == "momentum"
        rows.append((ok, "--mu", "0 without --rule momentum", cfg.mu))
    if isinstance(cfg, Memories):
        ok = re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2}){0,7}", cfg.periods)
        rows.append((ok, "--periods", "up to 8 numbers from 1 to 999, as 1,4,16", cfg.periods))
        least = (cfg.home + cfg.away) / 4
        expected = f"more than (--home + --away) / 4 = {least}"
        rows.append((cfg.length > least, "--length", expected, cfg.length))
    if isinstance(cfg, Inner):
        rows.append((cfg.length > cfg.dim, "--length", f"more than --dim {cfg.dim}", cfg.length))
    return rows


CONSTRAINTS = dict.fromkeys((Config, Rule, Rules, Memories, Inner), limits)


def memory_case(rng, *gates, **more):
    """Inputs of a memory for gradcheck.py."""
    k, q, v = (rng.standard_normal((4, 3, size)) for size in (6, 6, 5))
    return dict(k=k, q=q, v=v, **{gate: rng.uniform(0.1, 0.9, (4, 3)) for gate in gates}, **more)


def cms_case(rng, *periods):
    """Inputs of a continuum memory for gradcheck.py."""
    numbers = {name: rng.uniform(0.1, 0.9, len(periods)) for name in ("eta", "alpha", "w")}
    return dict(k=rng.standard_normal((7, 3, 6)), v=rng.standard_normal((7, 3, 5)), **numbers,
                periods=periods)


GRADCHECK = {
    "unit": lambda rng: dict(x=rng.standard_normal((3, 5))),
    "gate": lambda rng: [dict(junk=rng.integers(0, 2, (4, 3)), z=rng.standard_normal(n))
                         for n in (1, 2)],
    "memory": lambda rng: [memory_case(rng, "eta", c=c) for c in (0, 1)],
    "momentum_memory": lambda rng: [memory_case(rng, "eta", "alpha", "mu", c=c) for c in (0, 1, 2)],
    "adam_memory": lambda rng: [memory_case(rng, "eta", "alpha", c=c, beta1=beta1, beta2=0.7)
                                for c, beta1 in ((0, 0.6), (1, 0.6), (2, 0.0))],
    "cms": lambda rng: [cms_case(rng, 1, 2, 3), cms_case(rng, 3, 1), cms_case(rng, 1)]}

TASKS = {"recall": Task(Config, init_params, make_batch, loss_and_grads, main),
         "rule": Task(Rule, init_rule, make_batch, rule_loss_and_grads, run_rules),
         "rules": Task(Rules, None, None, None, run_rules),
         "memories": Task(Memories, init_stream, stream_batch, stream_loss_and_grads, run_memories),
         "inner": Task(Inner, None, None, None, run_inner),
         "identities": Task(Identities, None, None, None, run_identities)}

if __name__ == "__main__":
    run(TASKS)
