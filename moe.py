"""moe.py: many experts, of which each token uses one.

A feed-forward layer spends the same work on every token, and more parameters mean more work. A
mixture of experts (MoE) has E feed-forward nets, the experts, and a router that sends each token
to one of them: E times the parameters, the work of one. The price: a choice has no slope, so the
task teaches the router only through the weight of the chosen expert, and an expert without tokens
cannot learn. A second loss, the balance loss, keeps the router from that.

Forward, for tokens x (N, D)
    p = softmax(x Wg)       the router;  e = argmax p, the expert of a token (Switch, top-1)
    y = p_e f_e(x)          the expert f_e(x) = relu(x W1_e) W2_e, for its own tokens only
    balance = E sum_i load_i mean(p_i)     over all experts i; load_i: the share of the choices that
                            fall on i; balance is 1 if all loads are equal
Backward; e is a constant, everything else is smooth
    df = p_e dy             through the expert as through any net; its dx goes to its tokens
    dp_e = dy . f_e(x), 0 for the others          the weight of f_e teaches the router
    dp_i += weight E load_i / N    of the balance loss, for every i; load counts, and has no slope
    dz_i = p_i (dp_i - sum_j p_j dp_j)     z = x Wg, so dWg = x^T dz, dx += dz Wg^T

Run    python moe.py   (2,048 facts: 1 expert keeps about half, 8 keep 98 to 100 %); --help for more

Papers: Jacobs et al. 1991 (mixture of experts), Shazeer et al. 2017, Fedus et al. 2021 (Switch).
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
    """Store 2,048 facts: a net with one expert, and one with several at the same work per fact."""
    experts: int = 8        # number of experts
    hidden: int = 32        # hidden width of an expert
    dim: int = 32           # embedding dimension
    balance: float = 0.03   # weight of the balance loss
    batch_size: int = 256   # tokens per step; here a fact is a token
    steps: int = 1200       # optimizer steps
    lr: float = 0.005       # learning rate of the first step; it falls along half a cosine
    seed: int = 0           # random seed


# ---- layers: N tokens, D dim, E experts of hidden width H, K experts per token (here 1) ----------
# M tokens are those of one expert. params["E"] alone is something else: the embeddings.

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


def softmax_forward(z):
    """p = e^z / sum e^z, per row.   z, p (N, E)."""
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p, p


def softmax_backward(dout, cache):
    """dz = p (dp - sum_e p_e dp_e): p_i changes with z_j by p_i ((i == j) - p_j)."""
    p = cache
    return p * (dout - (p * dout).sum(axis=1, keepdims=True))


def switch_gate_forward(p, chosen):
    """w_nk = p[n, chosen_nk], the weights of the chosen experts.   p (N, E), chosen, w (N, K)."""
    return np.take_along_axis(p, chosen, axis=1), (chosen, p.shape)


def switch_gate_backward(dout, cache):
    """dp is dw for the chosen experts, 0 for the others."""
    chosen, shape = cache
    dp = np.zeros(shape, dout.dtype)
    np.put_along_axis(dp, chosen, dout, axis=1)
    return dp


def experts_forward(x, w, W1, W2, chosen):
    """y_n = sum_k w_nk f_e(x_n), e = chosen_nk, f_e(x) = relu(x W1_e) W2_e.
    x, y (N, D), w, chosen (N, K), W1 (E, D, H), W2 (E, H, D)."""
    y, caches = np.zeros_like(x), []
    for e in range(len(W1)):
        n, k = np.nonzero(chosen == e)                  # (M,): the tokens of this expert
        h = np.maximum(x[n] @ W1[e], 0)                 # (M, H)
        f = h @ W2[e]                                   # (M, D)
        y[n] += w[n, k, None] * f
        caches.append((n, k, h, f))
    return y, (x, w, W1, W2, caches)


def experts_backward(dout, cache):
    """dw_nk = dout_n . f_e(x_n), df = w_nk dout_n, then back through the two products; a token
    gets a dx from each of its experts.   -> dx, dw, dW1, dW2."""
    x, w, W1, W2, caches = cache
    dx, dw, dW1, dW2 = (np.zeros_like(a) for a in (x, w, W1, W2))
    for e, (n, k, h, f) in enumerate(caches):
        dw[n, k] = (dout[n] * f).sum(axis=1)
        df = w[n, k, None] * dout[n]                    # (M, D)
        dW2[e] = h.T @ df
        dh = (df @ W2[e].T) * (h > 0)                   # (M, H)
        dW1[e] = x[n].T @ dh
        dx[n] += dh @ W1[e].T
    return dx, dw, dW1, dW2


def balance_forward(p, chosen):
    """E sum_e load_e mean_n p_ne, load_e: the share of the N K choices that fall on expert e; 1 if
    all get equally many.   p (N, E), chosen (N, K) -> scalar."""
    N, E = p.shape
    sent = chosen[:, :, None] == np.arange(E)           # (N, K, E)
    load = sent.mean(axis=(0, 1), dtype=p.dtype)        # (E,)
    return E * (load * p.mean(axis=0)).sum(), (load, N)


def balance_backward(dout, cache):
    """dp_ne = E load_e / N: load counts tokens, so it has no slope."""
    load, N = cache
    return np.tile(load * (dout * len(load) / N), (N, 1))


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


# ---- data: facts (subject, relation, object), with nothing to generalize -------------------------

TOPICS = 8                                              # topic t: subjects 16 t to 16 t + 15
TOPIC_SIZE = 1.5                                        # how far topics are apart
FACTS = np.stack([np.arange(2048) // 16, 128 + np.arange(2048) % 16], axis=1)   # subject, relation
OBJECTS = np.random.default_rng(0).integers(0, 16, len(FACTS))                  # the answers


def make_batch(cfg, step, dtype=np.float32):
    """Random facts -> ids of subject (0 to 127) and relation (128 to 143) (N, 2), targets (N,)."""
    rng = np.random.default_rng((cfg.seed, step))
    rows = rng.integers(0, len(FACTS), cfg.batch_size)
    return FACTS[rows], OBJECTS[rows]


# ---- model: x = subject + relation, x + experts(norm(x)), norm, logits ---------------------------

def init_params(cfg, rng, dtype=np.float32):
    """E (144, D): embeddings of subjects and relations; Wg, W1, W2: router and experts; Wout
    (D, 16). The subjects of a topic start near the same random point; no label names the topic."""
    D, E, H = cfg.dim, cfg.experts, cfg.hidden
    embeddings = 0.5 * rng.standard_normal((144, D))
    topics = TOPIC_SIZE * rng.standard_normal((TOPICS, D))
    embeddings[:128] += np.repeat(topics, 16, axis=0)
    params = {"E": embeddings, "gamma1": np.ones(D), "gamma2": np.ones(D),
              "Wg": 0.02 * rng.standard_normal((D, E)),
              "W1": rng.standard_normal((E, D, H)) * (2 / (D + H)) ** 0.5,
              "W2": rng.standard_normal((E, H, D)) * (2 / (D + H)) ** 0.5,
              "Wout": rng.standard_normal((D, 16)) * D ** -0.5}
    return {name: value.astype(dtype) for name, value in params.items()}


def best_expert(p):
    """p (N, E) -> the most probable expert of each token (N, 1)."""
    return p.argmax(axis=1)[:, None]


# A route: which experts a token goes to, their weights, and how these weights teach the router.
SWITCH = best_expert, switch_gate_forward, switch_gate_backward


def moe_forward(x, params, route=SWITCH):
    """y = sum of the chosen experts, weighted.   x (N, D) -> y (N, D), aux: the balance loss."""
    choose, gate, gate_back = route
    p, softmax = softmax_forward(x @ params["Wg"])                  # (N, E)
    chosen = choose(p)                                              # (N, K)
    w, gated = gate(p, chosen)                                      # (N, K)
    y, experts = experts_forward(x, w, params["W1"], params["W2"], chosen)
    aux, balance = balance_forward(p, chosen)
    return (y, aux), (chosen, x, params["Wg"], softmax, gate_back, gated, experts, balance)


def moe_backward(dy, daux, cache):
    """moe_forward in reverse order; x is used twice, so gradients add.   -> dx, gradients."""
    chosen, x, Wg, softmax, gate_back, gated, experts, balance = cache
    dx, dw, dW1, dW2 = experts_backward(dy, experts)
    dp = gate_back(dw, gated) + balance_backward(daux, balance)
    dz = softmax_backward(dp, softmax)
    return dx + dz @ Wg.T, {"Wg": x.T @ dz, "W1": dW1, "W2": dW2}


def model_forward(params, ids, route=SWITCH):
    """ids (N, J), whose embeddings add up -> logits (N, V), balance loss."""
    x = params["E"][ids].sum(axis=1)                                # (N, D)
    h, norm1 = rmsnorm_forward(x, params["gamma1"])
    (y, aux), moe = moe_forward(h, params, route)
    h, norm2 = rmsnorm_forward(x + y, params["gamma2"])
    return (h @ params["Wout"], aux), (moe, ids, norm1, norm2, h, params)


def model_backward(dlogits, daux, cache):
    """model_forward in reverse order -> gradients under the keys of params."""
    moe, ids, norm1, norm2, h, params = cache
    grads = {"E": np.zeros_like(params["E"]), "Wout": h.T @ dlogits}
    dx, grads["gamma2"] = rmsnorm_backward(dlogits @ params["Wout"].T, norm2)
    dh, g = moe_backward(dx, daux, moe)
    dh, grads["gamma1"] = rmsnorm_backward(dh, norm1)
    each = np.repeat(dx + dh, ids.shape[1], axis=0)     # x is a sum: all J embeddings get its dx
    np.add.at(grads["E"], ids.ravel(), each)
    return grads | g


def loss_and_grads(params, batch, cfg, route=SWITCH):
    """Cross-entropy + cfg.balance times the balance loss -> loss, gradients."""
    ids, targets = batch
    (logits, aux), cache = model_forward(params, ids, route)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets)
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss + cfg.balance * aux, model_backward(dlogits, cfg.balance, cache)


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads,
          after_step=lambda step: None):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        lr = cfg.lr * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.steps))
        adam_update(params, grads, state, lr)
        losses.append(float(loss))
        after_step(step)
    check_finite(losses[-1], params)
    return losses


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def measure_facts(params, route=SWITCH):
    """All facts -> share of right objects, shares (8, E) of a topic's facts that an expert gets."""
    order = np.random.default_rng(0).permutation(len(FACTS))        # mixed, as in training
    (logits, _), (moe, *_) = model_forward(params, FACTS[order], route)
    check_finite(logits.max(), params)
    chosen, *_ = moe                                    # (2048, K)
    sent = (chosen[:, :, None] == np.arange(params["Wg"].shape[1])).mean(axis=1)    # (2048, E)
    shares = sent[order.argsort()].reshape(TOPICS, 256, -1).mean(axis=1)    # argsort inverts it
    return float((logits.argmax(axis=1) == OBJECTS[order]).mean()), shares


def information(joint):
    """Mutual information of rows and columns in nats.   joint (R, E): shares of all pairs."""
    joint = joint / joint.sum()                         # 1, unless some were dropped
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    return float((joint * np.log((joint + 1e-12) / (apart + 1e-12))).sum())


def draw_topics(shares):
    """The shares of measure_facts, a line per topic; experts are sorted by their main topic."""
    order = np.argsort(shares.argmax(axis=0), kind="stable")
    for topic, row in enumerate(shade(shares[:, order])):
        print(f"topic {topic} |{''.join(4 * cell for cell in row)}|")


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
    """Store the facts in one expert, then in cfg.experts; show which topics each expert gets."""
    start, metrics = time.perf_counter(), {}
    print(f"{len(FACTS)} facts: {TOPICS} topics of 16 subjects, 16 relations, one of 16 objects\n"
          f"for each pair; dim {cfg.dim}, hidden {cfg.hidden}")
    print(f"chance level: loss {math.log(16):.3f}, and {cfg.balance} of balance loss")
    for E in dict.fromkeys((1, cfg.experts)):           # once, if both are 1
        params = init_params(replace(cfg, experts=E), np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\nexperts: {E}, one per fact; {size} parameters")
        losses = train(params, cfg)
        right, shares = measure_facts(params)
        metrics[f"right_{E}"] = right
        print(f"{right:.1%} of all facts right")
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    fullest = float(shares.mean(axis=0).max() * shares.shape[1])
    told = information(shares / TOPICS) / math.log(TOPICS)
    print(f"\nThe fullest expert gets {fullest:.2f} times the mean. Rows: topics, columns: "
          "experts,\nshades: the share of a topic's facts that an expert gets, blank is 0, @ is 1")
    draw_topics(shares)
    print(f"The expert of a fact gives {told:.0%} of the information about its topic (mutual "
          f"information / log {TOPICS})")
    print("\nNext: python moe.py routes      python faster.py")
    print_result("facts", cfg, **metrics, fullest=fullest, information=told, params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: bias-balanced routing, top-2, capacity; time; characters; flags. ====

MORE = """
Tasks (seeds 0 to 4: right answers, load of the fullest expert over the mean)
    python moe.py routes    no balance 87 to 99 %, 1.8 to 3.5, an expert (nearly) without facts each
                            time; loss 98 to 100 %, up to 1.6; bias 97 to 100 %, up to 1.04; top-2
                            100 % at twice the work, 89 to 94 % at equal work, half the parameters
    python moe.py time      at equal FLOPs 2.3 to 2.6 times dense at dim 32, 1.1 to 1.2 at dim 128
    python moe.py text --data tinyshakespeare.txt       25 seconds; 1.98 to 2.00 nats per character
                            with one expert, 1.88 to 1.89 with eight, 1.84 to 1.86 with one as wide
                            as eight

Break it (what to change, and what comes of it, seeds 0 to 2)
    python moe.py --experts 1 --hidden 256      100 %: as many parameters, all used for every fact
    python moe.py --balance 0.001               90 to 99 %, one to four experts nearly without
                                                facts; 0.01: 95 to 99 %, none or one; 1: 99 to 100 %
    TOPIC_SIZE = 0                              100 %, with 1 or 2 % of the information about the
                                                topic: experts divide the facts in another way
    best_expert: return np.arange(len(p))[:, None] % p.shape[1]     24 %: a fact has another expert
                                                in every batch
    switch_gate_backward: return 0 * dp         32 to 36 %: the balance loss alone moves the router;
                                                with --balance 0 nothing does: 82 to 88 %

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. python moe.py --experts 2 (then 4, 16): what is right, and which topics share an expert?
    2. Derive and add a gate with weights sqrt(p) (root_gate_forward, root_gate_backward).
    3. Put the layer in place of the mlp of a block of transformer.py. Where do its dx, daux go?

Data
    curl -o tinyshakespeare.txt \\
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt

Papers of these parts: Bengio et al. 2003 (neural language model), Lepikhin et al. 2020 (capacity),
Jiang et al. 2024 (Mixtral), Wang et al. 2024 (balance by a bias).
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


# ---- a bias on the choice, in place of the balance loss ------------------------------------------

def biased_route(E, rate):
    """DeepSeek: the choice is best_expert(p + bias), the weight stays p_e.   -> the route, and a
    function to call after each update: bias_e rises by rate if load_e < 1 / E, and falls if it is
    larger."""
    bias, load = np.zeros(E, np.float32), np.zeros(E)

    def choose(p):
        chosen = best_expert(p + bias)
        load[:] = (chosen == np.arange(E)).mean(axis=0)
        return chosen

    def move_bias(step):
        bias[:] += rate * np.sign(1 / E - load)
    return (choose, switch_gate_forward, switch_gate_backward), move_bias


# ---- top-2: the weights of two experts add up to 1 (Mixtral) -------------------------------------

def two_best(p):
    """p (N, E) -> the two most probable experts of each token (N, 2)."""
    return np.argsort(-p, axis=1, kind="stable")[:, :2]


def shared_gate_forward(p, chosen):
    """w_k = q_k / sum_k q_k, q_k = p[n, chosen_nk]: the softmax over the chosen logits alone."""
    q = np.take_along_axis(p, chosen, axis=1)           # (N, K)
    total = q.sum(axis=1, keepdims=True)
    return q / total, (q / total, total, chosen, p.shape)


def shared_gate_backward(dout, cache):
    """dq = (dw - sum_k w_k dw_k) / sum_k q_k at the chosen experts. With K = 1 that is 0: w is 1,
    whatever the router does."""
    w, total, chosen, shape = cache
    dq = (dout - (w * dout).sum(axis=1, keepdims=True)) / total
    return switch_gate_backward(dq, (chosen, shape))


# ---- capacity: an expert takes at most C tokens, and drops the rest ------------------------------

def capacity_choice(p, capacity):
    """best_expert, but an expert takes only the first C = capacity N / E (rounded up) of its tokens
    in the batch. The others are dropped: -1 is no expert, y is 0, and the residual alone carries
    them. The balance loss counts what was taken (that of Switch what was wished for).
    p (N, E) -> (N, 1)."""
    N, E = p.shape
    chosen = best_expert(p)
    queue = (chosen == np.arange(E)).cumsum(axis=0)     # (N, E): tokens of e up to this one
    position = np.take_along_axis(queue, chosen, axis=1)
    return np.where(position <= math.ceil(capacity * N / E), chosen, -1)


# ---- the routes side by side: python moe.py routes -----------------------------------------------

@dataclass
class Routes(Config):
    """Balance by a loss or a bias, top-2, capacity: the same facts by other routes."""
    bias_rate: float = 0.003  # change of a bias per step


def run_routes(cfg):
    """Train once for each route; a table, and the loads of the experts during three trainings."""
    start, E, still = time.perf_counter(), cfg.experts, lambda step: None
    two = two_best, shared_gate_forward, shared_gate_backward
    queues = {c: functools.partial(capacity_choice, capacity=c) for c in (1.0, 1.25)}
    half, unbalanced = dict(hidden=max(1, cfg.hidden // 2)), dict(balance=0.0)
    rows = {"none": ("top-1, no balance", unbalanced, SWITCH, still),
            "loss": ("top-1, balance loss", {}, SWITCH, still),
            "bias": ("top-1, bias", unbalanced, *biased_route(E, cfg.bias_rate)),
            "top2": ("top-2, twice the work", {}, two, still),
            "half": ("top-2, half as wide", half, two, still),
            "tight": ("top-1, capacity 1", {}, (queues[1.0], *SWITCH[1:]), still),
            "roomy": ("top-1, capacity 1.25", {}, (queues[1.25], *SWITCH[1:]), still)}
    print(f"{len(FACTS)} facts, {E} experts, dim {cfg.dim}, hidden {cfg.hidden}\n"
          f"chance level: loss {math.log(16):.3f}, and {cfg.balance} of balance loss")
    table, metrics, histories = [], {}, {}
    for name, (title, changes, route, move) in rows.items():
        params = init_params(replace(cfg, **changes), np.random.default_rng(cfg.seed))
        history = histories[name] = []

        def after_step(step):
            move(step)
            if step % math.ceil(cfg.steps / 20) == 0:
                load = measure_facts(params, route)[1].mean(axis=0)
                history.append("".join(2 * cell for cell in shade(load * E / 2)))
        print(f"\n{title}: {sum(p.size for p in params.values())} parameters")
        losses = train(params, replace(cfg, **changes), after_step=after_step,
                       loss_and_grads=functools.partial(loss_and_grads, route=route))
        right, shares = measure_facts(params, route)
        load, told = shares.mean(axis=0) * E, information(shares / TOPICS) / math.log(TOPICS)
        table.append(f"{title:23s}{right:6.1%}{load.max():9.2f}{load.min():10.2f}"
                     f"{max(0, 1 - load.mean()):9.1%}{told:9.0%}")
        metrics.update({f"{name}_right": right, f"{name}_fullest": float(load.max()),
                        f"{name}_emptiest": float(load.min()), f"{name}_information": told})
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print("\nLoad of the experts (columns) from the first steps (top) to the last:\n"
          "blank is 0, = the mean, @ twice the mean or more")
    shown = list(histories)[:3]
    print("   ".join(f"{name:{2 * E}s}" for name in shown))
    for lines in zip(*(histories[name] for name in shown)):
        print("   ".join(lines))
    print("\nFullest, emptiest expert: load over the mean; topic: share of the information about "
          "the\ntopic of a fact that its expert gives\n"
          "route                   right  fullest  emptiest  dropped    topic", *table, sep="\n")
    print("\nNext: python moe.py routes --bias-rate 0.03      python moe.py time")
    print_result("routes", cfg, **metrics, steps=len(losses), seconds=time.perf_counter() - start)


# ---- time: python moe.py time --------------------------------------------------------------------

@dataclass
class Time:
    """Time at equal FLOPs: a forward pass of the layer at three widths."""
    experts: int = 8        # number of experts
    repeats: int = 5        # runs, of which the fastest counts
    seed: int = 0           # random seed


def run_time(cfg):
    """One net, one of several experts, a net of their width, all experts; a bar for each."""
    start, rng, metrics = time.perf_counter(), np.random.default_rng(cfg.seed), {}
    every = (lambda p: np.tile(np.arange(cfg.experts), (len(p), 1)), *SWITCH[1:])
    print("Time of a forward pass; a # is the time of dense, one net as wide as an expert. top1:\n"
          "one expert per token; every: all per token; wide: one net as wide as all experts")
    for D, H, N in ((32, 32, 512), (64, 256, 1024), (128, 512, 1024)):
        print(f"dim {D}, hidden {H}, {N} tokens")
        x, least = rng.standard_normal((N, D)).astype(np.float32), {}
        for name, E, width, route in (("dense", 1, H, SWITCH), ("top1", cfg.experts, H, SWITCH),
                                      ("wide", 1, cfg.experts * H, SWITCH),
                                      ("every", cfg.experts, H, every)):
            params = init_params(Config(experts=E, hidden=width, dim=D), rng)
            least[name] = math.inf
            for _ in range(cfg.repeats):
                before = time.perf_counter()
                moe_forward(x, params, route)
                least[name] = min(least[name], time.perf_counter() - before)
            ratio = least[name] / least["dense"]
            print(f"{name:>8s} {1000 * least[name]:8.2f} ms  {'#' * min(70, round(ratio))}")
        metrics[f"top1_over_dense_{D}"] = least["top1"] / least["dense"]
        metrics[f"wide_over_top1_{D}"] = least["wide"] / least["top1"]
    print("\nNext: python moe.py time --experts 16      python faster.py")
    print_result("time", cfg, **metrics, seconds=time.perf_counter() - start)


# ---- characters: python moe.py text --data tinyshakespeare.txt -----------------------------------

@dataclass
class Text(Config):
    """Predict the next character of a text file from the characters before it."""
    data: str = ""          # UTF-8 text file, its last tenth for validation
    context: int = 8        # characters that the prediction depends on
    hidden: int = 64        # hidden width of an expert
    dim: int = 64           # embedding dimension
    steps: int = 2000       # optimizer steps


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
def split_text(path, length):
    """-> the characters of a text, sorted; its first nine tenths and its last as indices into them.
    Without a path the text of MORE.   Raises InputError."""
    text = read_text(path) if path else MORE * 9
    chars = sorted(set(text))
    ids = np.searchsorted(chars, list(text))
    require(len(ids) > 10 * length, f"--data {path}", f"over {10 * length} characters", len(ids))
    return chars, *np.split(ids, [len(ids) * 9 // 10])


def windows(text, ends, cfg, V):
    """-> ids (N, context): the characters before the positions ends, plus V j at distance j + 1, so
    that each character has an embedding for each distance; targets (N,): those at ends."""
    j = np.arange(cfg.context)
    before = ends[:, None] - 1 - j                      # (N, context) positions
    return text[before] + V * j, text[ends]


def init_text(cfg, rng, dtype=np.float32):
    """init_params, with E (context V, D) and Wout (D, V) for the V characters of the file."""
    V, D = len(split_text(cfg.data, cfg.context)[0]), cfg.dim
    params = init_params(cfg, rng, float)
    params["E"] = rng.standard_normal((cfg.context * V, D)) * cfg.context ** -0.5
    params["Wout"] = rng.standard_normal((D, V)) * D ** -0.5
    return {name: value.astype(dtype) for name, value in params.items()}


def text_batch(cfg, step, dtype=np.float32):
    """Random positions of the training part -> windows."""
    rng = np.random.default_rng((cfg.seed, step))
    chars, train, _ = split_text(cfg.data, cfg.context)
    return windows(train, rng.integers(cfg.context, len(train), cfg.batch_size), cfg, len(chars))


def held_out(params, cfg):
    """All of the validation part -> nats per character; joint (V, E): how often the character
    before is v and the expert is e."""
    chars, _, text = split_text(cfg.data, cfg.context)
    joint, total = np.zeros((len(chars), params["Wg"].shape[1])), 0.0
    ends = np.arange(cfg.context, len(text))
    for some in np.array_split(ends, math.ceil(len(ends) / 4096)):
        ids, targets = windows(text, some, cfg, len(chars))
        (logits, _), (moe, *_) = model_forward(params, ids)
        chosen, *_ = moe
        total += float(softmax_cross_entropy_forward(logits, targets)[0]) * len(some)
        np.add.at(joint, (ids[:, 0], chosen[:, 0]), 1 / len(ends))
    return total / len(ends), joint


def run_text(cfg):
    """One expert, one as wide as all, several; which characters each of them gets."""
    start, metrics = time.perf_counter(), {}
    require(cfg.data, "--data", "a UTF-8 text file (python moe.py --help says where)", cfg.data)
    chars, text, _ = split_text(cfg.data, cfg.context)
    print(f"{cfg.data}: {len(text)} characters to learn from, {len(chars)} different; context "
          f"{cfg.context}, dim {cfg.dim}\nchance level: loss {math.log(len(chars)):.3f}, and "
          f"{cfg.balance} of balance loss")
    for name, E, H in (("dense", 1, cfg.hidden), ("wide", 1, cfg.experts * cfg.hidden),
                       ("moe", cfg.experts, cfg.hidden)):
        own = replace(cfg, experts=E, hidden=H)
        params = init_text(own, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\n{name}: experts {E}, hidden {H}, {size} parameters")
        losses = train(params, own, text_batch)
        metrics[name], joint = held_out(params, own)
        check_finite(metrics[name], params)
        print(f"validation {metrics[name]:.4f} nats per character")
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    often = np.argsort(-joint.sum(axis=1))[:60]
    shares = joint[often] / joint[often].sum(axis=1, keepdims=True).clip(1e-9)
    order = np.argsort(shares.argmax(axis=1), kind="stable")
    print("\nRows: experts, columns: the commonest characters (_ blank, | line end), shades: the "
          "share\nof the tokens with this last character that the expert gets, blank is 0, @ is 1")
    print(" " * 11 + "".join({" ": "_", "\n": "|"}.get(chars[v], chars[v]) for v in often[order]))
    for e, row in enumerate(shade(shares[order].T)):
        print(f"expert {e:2d} |{''.join(row)}|")
    load = joint.sum(axis=0)
    told = information(joint) / max(1e-9, -float((load * np.log(load + 1e-12)).sum()))
    print(f"The last character tells {told:.0%} of the expert (mutual information over entropy)")
    print("\nNext: python moe.py routes      python faster.py")
    print_result("text", cfg, **metrics, information=told, params=size, steps=len(losses),
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


def routed(rng):
    """Inputs for gradcheck.py: probabilities of 4 experts for 5 tokens, two chosen for each."""
    chosen = rng.permuted(np.tile(np.arange(4), (5, 1)), axis=1)[:, :2]
    return dict(p=rng.random((5, 4)) + 0.1, chosen=chosen)


def expert_case(rng):
    """Inputs of experts_forward: 5 tokens, dim 3, 4 experts of hidden width 6."""
    return dict(x=rng.standard_normal((5, 3)), w=rng.standard_normal((5, 2)),
                W1=rng.standard_normal((4, 3, 6)), W2=rng.standard_normal((4, 6, 3)),
                chosen=routed(rng)["chosen"])


GRADCHECK = {"softmax": "z 3 5", "switch_gate": routed, "shared_gate": routed, "balance": routed,
             "experts": expert_case}
CONSTRAINTS = {}

TASKS = {"facts": Task(Config, init_params, make_batch, loss_and_grads, main),
         "routes": Task(Routes, init_params, make_batch, loss_and_grads, run_routes),
         "time": Task(Time, None, None, None, run_time),
         "text": Task(Text, init_text, text_batch, loss_and_grads, run_text)}

if __name__ == "__main__":
    run(TASKS)
