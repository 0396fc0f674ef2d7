# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""nested_attention.py: attention as learning inside learning.

Linear attention keeps a matrix M, adds v k^T for every token, and answers a query with M q. Now take the objective
-<M k, v>, "M k should point along v". Its slope by M is -v k^T, so M + v k^T is one step of gradient descent on it,
with step size 1: linear attention is a memory that is trained while the text goes by. Seen so, everything about it can
be chosen anew: the objective, the optimizer, the step size, what is forgotten, how often it is updated. Nested
Learning calls such a model levels of optimization. Here are two:
    fast level: the memory M, new for every sequence, one step of an inner rule a token
    slow level: embeddings, step sizes, forgetting, momentum, first memory; trained over many sequences by Adam, through
                the unrolled steps of the fast level, so that it learns how the fast level should learn

Forward, for tokens t = 1..T with key k (length 1), query q, value v; e is the inner error:
    y = M q                   read, before the write
    e = M k - v  (l2: the objective is |M k - v|^2 / 2)     or  e = -v  (dot: -<M k, v>);  the slope by M is e k^T
    hebb, delta   M' = alpha M - eta e k^T                  hebb on dot: linear attention; delta on l2: the delta rule
    momentum      S' = mu S - eta e k^T,  M' = alpha M + S'
    adam          M' = alpha M - eta m / sqrt(s + eps)      m, s: running means of e k^T and of its square
    dgd           M' = alpha M - eta (M k + e) k^T          delta gradient descent
    continuum     several M_l, y = sum_l w_l M_l k; each gathers w_l e k^T and steps only every C_l tokens
Backward, for t = T..1, with A = dM', what the later steps want M' to be:
    dalpha = <A, M>     deta = -e^T A k     de = -eta A k     dk = -eta A^T e     dM = alpha A        (hebb, delta)
    l2:   dM += de k^T,  dk += M^T de       either:  dv = -de       read:  dM += dy q^T,  dq = M^T dy
    M was used in up to three places, so three slopes add. Embeddings of keys and values that are only written get no
    slope but through the later memories: without the way back through M' the slow level could not learn what to store.

The paper's: the view, read-before-write (its Eq. 94), momentum as an inner rule (33), delta gradient descent (56, 57),
the continuum's gathered updates (71). Ours: the continuum here is heads of one linear memory in the manner of Eq. 74,
where the paper's are MLPs; Adam as an inner rule, which the paper reads as a memory (App. B) but uses outside only;
periods such as 1, 4, 16, where it has chunk sizes C^(l) and no fixed ones. Misprints: in Eq. 65 the factor
(I - eta k k^T) must stand to the right of M, and in Eq. 92 the minus should be a plus for the stated objective; "Adam
is the optimal memory" is exact only when both of its means have equal weights.

Run
    python nested_attention.py                            everything, on two seeds
    python nested_attention.py --task recall --rule hebb --eta fixed      one rule: linear attention
    python nested_attention.py --task recall --keys 12 --steps 300        more keys than dimensions
    python nested_attention.py --task stream --periods 1,8                a continuum memory of two levels
    python nested_attention.py --task identities

Break it
    return 0 * dk, dasked[..., 0], 0 * dv in memory_backward, --task recall: no slope through what was written. The keys
        cannot become orthogonal (mean overlap stays 0.31), 94 % right, 56 % at 512 tokens. 0 * dv alone: 100 %
    dk += 0 * dasked[..., 1] in the same place: a wrong gradient, and still 100 %. Learning proves no derivative right
    y[t] = mv(M_new, asked[t, :, :, 0]) above M = M_new, the read after the write: the delta rule then answers with the
        new value, which nobody asked for, 34 %; with the backward to match, 40 %
    2.5 * np.ones((T, B), ...) for eta in memory_forward, --task recall --eta fixed: 34 %, at 512 tokens 14 %: steps
        above 2 overshoot, and the error of a key grows at each visit. 2.1: 59 %, 17 %
    --task recall --rule momentum --mu 0.5, 0.8, 0.95: 99.5 %, 90 %, 79 %; old slopes push for values out of date
    --task recall --rule adam --beta1 0.5, 0.9: 92 %, 55 %, for the same reason (0: 99.9 %)
    1 + 0 * due for 1 - due in cms_forward, --task stream: slopes are never emptied, loss 1.05 for 0.83
    --task recall --keys 12 --steps 300: 96 %, at 512 tokens 86 %; with --rule hebb --alpha token 89 % and 76 %

Papers: Behrouz, Razaviyayn, Zhong, Mirrokni 2025 (Nested Learning: the illusion of deep learning architectures);
Schmidhuber 1992 (fast weights); Katharopoulos et al. 2020 (linear attention); Schlag, Irie, Schmidhuber 2021 (linear
transformers are fast weight programmers); Yang et al. 2024 (gated delta networks); Kingma, Ba 2015 (Adam).
"""
import argparse
import contextlib
import ctypes
import inspect
import math
import re
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np


@dataclass
class Config:
    """Hyperparameters. Edit a line, or pass its name as a flag: --lr 0.1"""
    task: Literal["demo", "identities", "recall", "stream", "optimizers"] = "demo"  # which part to run; demo is all
    rule: Literal["hebb", "delta", "momentum", "adam", "dgd"] = "delta"  # recall: what one token does to the memory
    objective: Literal["l2", "dot"] = "l2"  # what momentum, adam and dgd descend (hebb is always dot, delta always l2)
    eta: Literal["fixed", "global", "token"] = "token"  # inner step size: 1, learned, or learned and given by the token
    alpha: Literal["fixed", "global", "token"] = "fixed"  # the share of the memory that a step keeps: the same choices
    mu: float = 0.0         # inner momentum; 0 lets the slow level learn it
    beta1: float = 0.0      # inner Adam: memory of its mean gradient
    beta2: float = 0.9      # inner Adam: memory of its mean squared gradient
    keys: int = 8           # different keys
    values: int = 8         # different values
    width: int = 8          # recall: d and p, the memory is a width x width matrix
    junk: float = 0.25      # recall: share of the tokens that are flagged and must not be stored
    periods: str = "1,4,16"  # stream: every how many steps a level of the continuum memory is updated
    shared: bool = False    # stream: one alpha for all levels
    staggered: bool = False  # stream: level l begins as if its period were 4^l, whatever it is
    home: int = 24          # stream: steps with the permanent values
    away: int = 8           # stream: steps with passing values, before the permanent ones return
    length: int = 32        # tokens in a sequence
    lr: float = 0.05        # learning rate of the slow level, falling to a tenth on a straight line
    clip: float = 1.0       # largest norm of the gradient; 0: any
    steps: int = 150        # updates
    batch: int = 32         # sequences an update
    seed: int = 0           # of every random draw

    def __post_init__(self):
        require(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.periods), "--periods",
                "steps above 0, such as 1,4,16", self.periods)
        for name in ("keys", "values", "width", "length", "home", "away"):
            require(getattr(self, name) >= 2, "--" + name, "2 or more", getattr(self, name))
        for name in ("mu", "beta1", "beta2", "junk"):
            require(0 <= getattr(self, name) < 1, "--" + name, "0 or more and below 1", getattr(self, name))
        for name in ("steps", "batch"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("clip", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        require(0 < self.lr < math.inf, "--lr", "a number above 0", self.lr)


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "stream": dict(keys=6, length=128, lr=0.07, steps=80, batch=16),
}


# ---- layers: T tokens in time, B sequences, d width of a key, p of a value, L levels; memories (B, p, d) -------------

def mv(M, x):
    """M x, one matrix and one vector for each sequence.   M (..., p, d), x (..., d) -> (..., p)."""
    return (M @ x[..., None])[..., 0]


def mv_T(M, x):
    """M^T x.   M (..., p, d), x (..., p) -> (..., d)."""
    return (x[..., None, :] @ M)[..., 0, :]


def outer(a, b):
    """a b^T.   a (..., p), b (..., d) -> (..., p, d)."""
    return a[..., :, None] * b[..., None, :]


def inner(A, B):
    """<A, B>, the sum of all products of entries.   A, B (..., p, d) -> (...)."""
    shape = A.shape[:-2]
    return (A.reshape(*shape, 1, -1) @ B.reshape(*shape, -1, 1))[..., 0, 0]


def col(x):
    """A number for each sequence, made to multiply matrices.   (...) -> (..., 1, 1)."""
    return x[..., None, None]


def forget(alpha, M):
    """alpha M, one number for each sequence; None stands for 1.   alpha (B,), M (B, p, d)."""
    return M if alpha is None else col(alpha) * M


def gd_forward(M, k, e, eta, alpha):
    """M' = alpha M - eta e k^T: a gradient step, e k^T being the slope of the objective by M, and forgetting.
    M (B, p, d), k (B, d), e (B, p), eta, alpha (B,) -> (M',)."""
    return (forget(alpha, M) - outer(eta[:, None] * e, k),), (M, k, e, eta, alpha)


def gd_backward(dM, cache):
    """A = dM': dM = alpha A, dk = -eta A^T e, de = -eta A k, deta = -e^T A k, dalpha = <A, M>."""
    M, k, e, eta, alpha = cache
    Ak = mv(dM, k)
    return (forget(alpha, dM), mv_T(dM, -eta[:, None] * e), -eta[:, None] * Ak, -(e * Ak).sum(axis=1), inner(dM, M))


def momentum_forward(M, S, k, e, eta, alpha, mu):
    """S' = mu S - eta e k^T,  M' = alpha M + S'.   S (B, p, d), mu (B,), others as in gd -> (M', S')."""
    S_new = col(mu) * S - outer(eta[:, None] * e, k)
    return (forget(alpha, M) + S_new, S_new), (M, S, k, e, eta, alpha, mu)


def momentum_backward(dM, dS, cache):
    """S' leads to M' and the next S, so its slope is D = dM' + dS'; from there as in gd; dS = mu D, dmu = <D, S>."""
    M, S, k, e, eta, alpha, mu = cache
    D = dM + dS
    Dk = mv(D, k)
    return (forget(alpha, dM), col(mu) * D, mv_T(D, -eta[:, None] * e), -eta[:, None] * Dk, -(e * Dk).sum(axis=1),
            inner(dM, M), inner(D, S))


def adam_forward(M, m, s, k, e, eta, alpha, t, beta1, beta2, eps=1e-6):
    """g = e k^T;  m' = b1 m + (1 - b1) g,  s' = b2 s + (1 - b2) g^2;  u = m_hat / sqrt(s_hat + eps), where
    m_hat = m'/(1 - b1^t), s_hat likewise; eps is inside the root, whose slope at 0 is infinite;  M' = alpha M - eta u.
    m, s (B, p, d), t the number of the token, others as in gd -> (M', m', s')."""
    g = outer(e, k)
    m, s = beta1 * m + (1 - beta1) * g, beta2 * s + (1 - beta2) * (g * g)
    m_hat, r = m * (1 / (1 - beta1 ** t)), (s * (1 / (1 - beta2 ** t)) + eps) ** -0.5
    return (forget(alpha, M) - col(eta) * (m_hat * r), m, s), (M, g, m_hat, r, k, e, eta, alpha, t, beta1, beta2)


def adam_backward(dM, dm, ds, cache):
    """du = -eta dM';  u = m_hat r, r = (s_hat + eps)^-1/2, so dm_hat = du r, ds_hat = -1/2 du m_hat r^3;  g is used in
    m' and in s':  dg = (1 - b1) dm' + 2 (1 - b2) g ds';  g = e k^T:  de = dg k, dk = dg^T e;  deta = -<dM', u>."""
    M, g, m_hat, r, k, e, eta, alpha, t, beta1, beta2 = cache
    du = -col(eta) * dM
    dm = dm + du * r * (1 / (1 - beta1 ** t))                       # m' is also the m of the next step
    ds = ds - du * m_hat * (r * r * r) * (0.5 / (1 - beta2 ** t))   # and s' its s
    dg = (1 - beta1) * dm + 2 * (1 - beta2) * (g * ds)
    return (forget(alpha, dM), beta1 * dm, beta2 * ds, mv_T(dg, e), mv(dg, k), -inner(dM, m_hat * r), inner(dM, M))


def dgd_forward(M, k, e, eta, alpha):
    """Delta gradient descent, M' = alpha M - eta (M k + e) k^T: besides the step, what M said to k is taken out.
    Inputs as in gd -> (M',)."""
    w = mv(M, k) + e
    return (forget(alpha, M) - outer(eta[:, None] * w, k),), (M, k, w, eta, alpha)


def dgd_backward(dM, cache):
    """gd with w = M k + e in place of e, so de = dw, and M and k get what comes through w: M += dw k^T, k += M^T dw."""
    M, k, w, eta, alpha = cache
    Ak = mv(dM, k)
    dw = -eta[:, None] * Ak
    return (forget(alpha, dM) + outer(dw, k), mv_T(dM, -eta[:, None] * w) + mv_T(M, dw), dw, -(w * Ak).sum(axis=1),
            inner(dM, M))


INNER_RULES = {     # forward, backward, number of matrices besides M
    "hebb": (gd_forward, gd_backward, 0), "delta": (gd_forward, gd_backward, 0), "dgd": (dgd_forward, dgd_backward, 0),
    "momentum": (momentum_forward, momentum_backward, 1), "adam": (adam_forward, adam_backward, 2)}


def memory_forward(k, q, v, gates, M0, rule, objective, betas=(0.0, 0.9)):
    """The fast level, token after token: read y = M q, then write (k, v) by one step of the rule on the objective.
    k, q (T, B, d), v (T, B, p), M0 (p, d), gates: a dict of eta, alpha (1 if left out) and, for momentum, mu, each
    (T, B), rule and objective as in Config, betas of the inner Adam -> y (T, B, p)."""
    (T, B, _), (step_forward, _, count) = k.shape, INNER_RULES[rule]
    eta, alpha = gates.get("eta", np.ones((T, B), k.dtype)), gates.get("alpha", [None] * T)
    asked = np.stack([q, k] if objective == "l2" else [q], axis=3)      # all that M is multiplied with
    M, y, caches = M0 + np.zeros((B, 1, 1), k.dtype), np.empty_like(v), []
    state = [np.zeros_like(M)] * count                  # momentum's S, or Adam's m and s
    for t in range(T):
        answers = M @ asked[t]
        y[t] = answers[:, :, 0]                         # before the write: not what it is just being told
        e = answers[:, :, 1] - v[t] if objective == "l2" else -v[t]
        extra = (gates["mu"][t],) if rule == "momentum" else (t + 1, *betas) if rule == "adam" else ()
        (M_new, *state), cache = step_forward(M, *state, k[t], e, eta[t], alpha[t], *extra)
        caches.append((M, cache))
        M = M_new
    return y, (caches, asked, gates, rule, objective)


def memory_backward(dout, cache):
    """From the last token to the first. dM is the slope by the memory after the step, and becomes that by the memory
    before it, which was used in the step and in the answers.   dout (T, B, p) -> dk, dq, dv, dgates, dM0."""
    caches, asked, gates, rule, objective = cache
    _, step_backward, count = INNER_RULES[rule]
    dk, dv, dasked = np.empty_like(asked[..., 0]), np.empty_like(dout), np.empty_like(asked)
    dgates = {name: np.empty_like(gate) for name, gate in gates.items()}
    dM = np.zeros_like(caches[0][0])                    # nobody reads the memory after the last token, or its state
    dstate = [dM] * count
    for t in reversed(range(len(dout))):
        M, step_cache = caches[t]
        grads = step_backward(dM, *dstate, step_cache)
        dM, dstate, (dk[t], de, *dextra) = grads[0], grads[1:1 + count], grads[1 + count:]
        for name, g in zip(("eta", "alpha", "mu"), dextra):
            if name in gates:
                dgates[name][t] = g
        dv[t] = -de
        danswers = np.stack([dout[t], de] if objective == "l2" else [dout[t]], axis=2)
        dM = dM + danswers @ asked[t].swapaxes(1, 2)    # dy q^T + de k^T
        dasked[t] = M.swapaxes(1, 2) @ danswers         # M^T dy and M^T de
    if objective == "l2":
        dk += dasked[..., 1]                            # k was used in the step and in the error
    return dk, dasked[..., 0], dv, dgates, dM.sum(axis=0)       # every sequence begins with M0, so sum over them


def cms_forward(k, v, eta, alpha, w, periods):
    """Continuum memory: y = sum_l w_l M_l k, e = y - v, G_l += w_l e k^T, and every periods[l] tokens
    M_l <- alpha_l M_l - eta_l G_l, G_l <- 0. Written as one memory of L d columns with keys K = (w_1 k, ..., w_L k), in
    which a column whose turn it is not has alpha 1 and eta 0.
    k (T, B, d), v (T, B, p), eta, alpha, w (L,) -> y (T, B, p)."""
    (T, B, d), L = k.shape, len(periods)
    due = np.array([[t % C == 0 for C in periods] for t in range(1, T + 1)]).astype(k.dtype)            # (T, L)
    keep, rate, wait = (np.repeat(a, d, axis=1) for a in (1 + due * (alpha - 1), due * eta, 1 - due))   # (T, L d)
    K = (w[:, None] * k[:, :, None]).reshape(T, B, L * d)
    M = G = np.zeros((B, v.shape[2], L * d), k.dtype)
    y, caches = np.empty_like(v), []
    for t in range(T):
        y[t] = mv(M, K[t])
        e = y[t] - v[t]
        G = G + outer(e, K[t])
        caches.append((M, G, e))
        M, G = keep[t] * M - rate[t] * G, wait[t] * G
    return y, (caches, k, K, w, due, keep, rate, wait)


def cms_backward(dout, cache):
    """From the last token to the first, A = dM', C = dG'. Write: dM = keep A, dG = wait C - rate A; dkeep and drate are
    the sums of A M and -A G by column. Gathering: de = dG K. Reading: dy = dout + de, dM += dy K^T.
    dout (T, B, p) -> dk, dv, deta, dalpha, dw."""
    caches, k, K, w, due, keep, rate, wait = cache
    dK, dv, dkeep, drate = np.empty_like(K), np.empty_like(dout), np.empty_like(keep), np.empty_like(rate)
    A = C = np.zeros_like(caches[0][0])
    for t in reversed(range(len(k))):
        M, G, e = caches[t]
        dkeep[t], drate[t] = (A * M).sum(axis=(0, 1)), -(A * G).sum(axis=(0, 1))
        C = wait[t] * C - rate[t] * A
        de = mv(C, K[t])
        dy = dout[t] + de                               # e = y - v, so what e wants, y wants as well
        dv[t] = -de
        dK[t] = mv_T(C, e) + mv_T(M, dy)                # K is used to gather and to read
        A = keep[t] * A + outer(dy, K[t])
    T, B, d = k.shape
    dK = dK.reshape(T, B, len(w), d)                    # K = w k
    deta, dalpha = ((due * x.reshape(T, len(w), d).sum(axis=2)).sum(axis=0) for x in (drate, dkeep))
    return (w[:, None] * dK).sum(axis=2), dv, deta, dalpha, (dK * k[:, :, None]).sum(axis=(0, 1, 3))


def unit_forward(x):
    """y = x / |x|, row by row: keys of length 1.   x (N, d) -> y (N, d)."""
    size = (x * x).sum(axis=1, keepdims=True) ** 0.5
    y = x / size
    return y, (y, size)


def unit_backward(dout, cache):
    """dx = (dout - y (y . dout)) / |x|: what points along y only changes the length, which is divided out."""
    y, size = cache
    return (dout - y * (y * dout).sum(axis=1, keepdims=True)) / size


def gate_forward(features, c):
    """y = sigmoid(features c), from 0 to 1 for every token.   features (T, B, F) are data, c (F,) -> (T, B)."""
    y = sigmoid(features @ c)
    return y, (y, features)


def gate_backward(dout, cache):
    """dc = sum over all tokens of dout y (1 - y) features."""
    y, features = cache
    return (dout * y * (1 - y)).reshape(-1) @ features.reshape(-1, features.shape[-1])


def scale_forward(x, s):
    """y = e^s x, a factor that stays positive.   s (1,)."""
    y = np.exp(s) * x
    return y, (y, s)


def scale_backward(dout, cache):
    """dx = e^s dout, ds = sum dout y."""
    y, s = cache
    return np.exp(s) * dout, (dout * y).sum().reshape(1)


def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, K), b (K,) -> y (N, K)."""
    y = x @ W
    y += b
    return y, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   dout (N, K) -> dx (N, D), dW (D, K), db (K,)."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)     # b was broadcast over N, so sum over N


def sigmoid(z):
    """1 / (1 + e^-z), written with tanh, which cannot overflow."""
    return 0.5 * np.tanh(0.5 * z) + 0.5


def embedding_forward(ids, E):
    """The row of E that each number names.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """A row of E gets the sum of dout over the places where it stands: a product with a (V, places) table of 0, 1."""
    ids, shape = cache
    stands = np.arange(shape[0])[:, None] == ids.ravel()
    return stands.astype(dout.dtype) @ dout.reshape(-1, shape[1])


def softmax_cross_entropy_forward(z, targets):
    """-mean_n log p[n, y_n], p = softmax of each row.   z (N, K), targets (N,) class numbers -> scalar."""
    z = z - z.max(axis=1, keepdims=True)                # the same p, and e^z cannot overflow
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(targets)), targets].mean(), (log_p, targets)


def softmax_cross_entropy_backward(dout, cache):
    """dz = (p - onehot(y)) / N.   dout scalar -> dz (N, K)."""
    log_p, targets = cache
    dz = np.exp(log_p)
    dz[np.arange(len(targets)), targets] -= 1
    return dz * (dout / len(targets))


# ---- model: the slow level, which learns how the fast level learns ---------------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """recall: embeddings of keys, to write (Wk) and to read (Wq), and of values; first memory, gates, scale and layer
    of the logits. stream: eta (its logarithm), alpha (before the sigmoid) and weight of every level, that scale."""
    if cfg.task == "stream":
        C = np.array(read_periods(cfg), float)
        pace = 4.0 ** np.arange(len(C)) if cfg.staggered else C
        keep = sigmoid(1.5) ** (C / pace)               # forgets as fast as one update every pace tokens would
        params = {"eta": np.log(0.5 / pace), "alpha": np.log(keep / (1 - keep)), "w": np.ones(len(C)),
                  "scale": np.ones(1)}
        params["alpha"] = params["alpha"][:1] if cfg.shared else params["alpha"]
        return {name: value.astype(dtype) for name, value in params.items()}
    d = p = cfg.width
    params = {"Wk": rng.standard_normal((cfg.keys, d)), "Wq": rng.standard_normal((cfg.keys, d)),
              "Wv": rng.standard_normal((cfg.values, p)), "M0": np.zeros((p, d)), "scale": np.zeros(1),
              "Wo": rng.standard_normal((p, cfg.values)) * p ** -0.5, "bo": np.zeros(cfg.values)}
    for name, choice, start in (("eta", cfg.eta, 1.0), ("alpha", cfg.alpha, 2.0)):
        if choice != "fixed":
            params[name] = np.array([start, 0.0][:2 if choice == "token" else 1])
    if cfg.rule == "momentum" and not cfg.mu:
        params["mu"] = np.zeros(1)
    return {name: value.astype(dtype) for name, value in params.items()}


def read_periods(cfg):
    """The update periods of the continuum memory, as numbers."""
    return [int(C) for C in cfg.periods.split(",")]


def tokens_forward(params, tokens, cfg):
    """What the tokens hand to the fast level.   key, value (T, B) integers, junk (T, B) -> k, q, v, gates of memory."""
    (key, value, junk), gates, cache = tokens, {}, {}
    k, cache["Wk"] = unit_forward(params["Wk"])         # all rows before the look-up: there are fewer than tokens
    q, cache["Wq"] = unit_forward(params["Wq"])
    k, cache["k"] = embedding_forward(key, k)
    q, cache["q"] = embedding_forward(key, q)
    v, cache["Wv"] = embedding_forward(value, params["Wv"])
    features = np.stack([np.ones_like(junk), junk], axis=2)
    for name in ("eta", "alpha", "mu"):
        if name in params:
            gates[name], cache[name] = gate_forward(features[..., :len(params[name])], params[name])
    if cfg.rule == "momentum" and cfg.mu:
        gates["mu"] = np.full_like(junk, cfg.mu)
    return (k, q, v, gates), cache


def tokens_backward(dk, dq, dv, dgates, cache):
    """-> gradients of the embeddings and of the gates."""
    grads = {name: gate_backward(d, cache[name]) for name, d in dgates.items() if name in cache}
    grads["Wk"] = unit_backward(embedding_backward(dk, cache["k"]), cache["Wk"])
    grads["Wq"] = unit_backward(embedding_backward(dq, cache["q"]), cache["Wq"])
    grads["Wv"] = embedding_backward(dv, cache["Wv"])
    return grads


def inner_objective(cfg):
    """What the inner rule descends: hebb is the step on dot and delta the same on l2; the others take either."""
    return {"hebb": "dot", "delta": "l2"}.get(cfg.rule, cfg.objective)


def recall_forward(params, tokens, cfg):
    """tokens: key, value (T, B) integers, junk (T, B) -> logits of the value that belongs to the key (T, B, V)."""
    inputs, tokens_cache = tokens_forward(params, tokens, cfg)
    y, memory_cache = memory_forward(*inputs, params["M0"], cfg.rule, inner_objective(cfg), (cfg.beta1, cfg.beta2))
    y, scale_cache = scale_forward(y, params["scale"])
    z, linear_cache = linear_forward(y.reshape(-1, cfg.width), params["Wo"], params["bo"])
    return z.reshape(*y.shape[:2], -1), (tokens_cache, memory_cache, scale_cache, linear_cache)


def recall_backward(dout, cache):
    """recall_forward from bottom to top -> gradients under the keys of params."""
    (tokens_cache, memory_cache, scale_cache, linear_cache), grads = cache, {}
    T, B, V = dout.shape
    dy, grads["Wo"], grads["bo"] = linear_backward(dout.reshape(-1, V), linear_cache)
    dy, grads["scale"] = scale_backward(dy.reshape(T, B, -1), scale_cache)
    *dinputs, grads["M0"] = memory_backward(dy, memory_cache)
    return {**grads, **tokens_backward(*dinputs, tokens_cache)}


def stream_forward(params, tokens, cfg):
    """tokens: key, value (T, B) integers, away (T, B) -> logits of the value that belongs to the key (T, B, V)."""
    key, value, away = tokens
    k, v = np.eye(cfg.keys, dtype=away.dtype)[key], np.eye(cfg.values, dtype=away.dtype)[value]
    eta, alpha = np.exp(params["eta"]), sigmoid(params["alpha"])
    y, cms_cache = cms_forward(k, v, eta, alpha + np.zeros_like(eta), params["w"], read_periods(cfg))
    z, scale_cache = scale_forward(y, params["scale"])
    return z, (cms_cache, scale_cache, eta, alpha)


def stream_backward(dout, cache):
    """stream_forward from bottom to top -> gradients under the keys of params."""
    cms_cache, scale_cache, eta, alpha = cache
    dy, dscale = scale_backward(dout, scale_cache)
    _, _, deta, dalpha, dw = cms_backward(dy, cms_cache)
    dalpha = dalpha if len(alpha) > 1 else dalpha.sum(keepdims=True)    # shared by all levels, so gradients add
    return {"eta": deta * eta, "alpha": dalpha * alpha * (1 - alpha), "w": dw, "scale": dscale}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass, through every inner step -> loss, gradients under the keys of params."""
    *tokens, targets = batch
    stream = cfg.task == "stream"
    z, cache = (stream_forward if stream else recall_forward)(params, tokens, cfg)
    known = targets >= 0                        # what has not been seen yet cannot be asked for
    loss, loss_cache = softmax_cross_entropy_forward(z[known], targets[known])
    dz = np.zeros_like(z)
    dz[known] = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, (stream_backward if stream else recall_backward)(dz, cache)


# ---- data ------------------------------------------------------------------------------------------------------------

def make_batch(cfg, rng, dtype=np.float32):
    """recall: every token gives a random key a new value, unless it is junk. stream: see home and away in Config. The
    target is the key's value before the token, -1 if none  -> key, value, flag (junk or away), targets, each (T, B)."""
    T, B = cfg.length, cfg.batch
    key, rows = rng.integers(0, cfg.keys, (T, B)), np.arange(B)
    if cfg.task == "stream":
        cycle, place = np.divmod(np.arange(T), cfg.home + cfg.away)
        flag = np.repeat(place[:, None] >= cfg.home, B, axis=1)
        base = rng.integers(0, cfg.values, (B, cfg.keys))
        passing = rng.integers(0, cfg.values, (cycle[-1] + 1, B, cfg.keys))
        value = np.where(flag, passing[cycle[:, None], rows, key], base[rows, key])
        return key, value, flag.astype(dtype), value
    value, flag = rng.integers(0, cfg.values, (T, B)), rng.random((T, B)) < cfg.junk
    key[-1, 0], flag[0, 0] = key[0, 0], False           # so that one question at least has an answer
    targets, current = np.empty((T, B), int), np.full((B, cfg.keys), -1)
    for t in range(T):
        targets[t] = current[rows, key[t]]
        current[rows, key[t]] = np.where(flag[t], targets[t], value[t])
    return key, value, flag.astype(dtype), targets


# ---- training and measuring ------------------------------------------------------------------------------------------

def adam_update(params, grads, state, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """m, v: running means of g and g^2, over 1 - beta^t since they start at 0;  w <- w - lr m / (sqrt v + eps)."""
    t = state["t"] = state.get("t", 0) + 1
    step, scale = lr / (1 - beta1 ** t), (1 - beta2 ** t) ** -0.5
    for name, g in grads.items():
        if "m " + name not in state:
            state["m " + name], state["v " + name] = np.zeros_like(g), np.zeros_like(g)
        m, v = state["m " + name], state["v " + name]
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        params[name] -= step * m / (np.sqrt(v) * scale + eps)


def clip_norm(grads, limit):
    """Scale all gradients so that their common norm is at most limit (Pascanu 2013) -> the norm before."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    if norm > limit > 0:
        for g in grads.values():
            g *= limit / norm
    return norm


def train_slow_level(cfg, rng, quiet=True):
    """Adam on the slow level, the learning rate falling to a tenth -> params, progress."""
    params, state, progress = init_params(cfg, rng), {}, Progress(cfg.steps, quiet=quiet)
    for step in progress:
        loss, grads = loss_and_grads(params, make_batch(cfg, rng), cfg)
        clip_norm(grads, cfg.clip)
        adam_update(params, grads, state, cfg.lr * (1 - 0.9 * (step - 1) / cfg.steps), beta2=0.99)
        progress.report(loss)
    return params, progress


def score_fresh(params, cfg, length):
    """Fresh sequences of this length -> share of right answers, cross-entropy, (stream) the share of right answers at
    the first visit of every key after the permanent values have returned."""
    batch = max(8, 8192 // length)
    rng = np.random.default_rng(cfg.seed + 1000)
    key, value, flag, targets = make_batch(replace(cfg, length=length, batch=batch), rng)
    z, _ = (stream_forward if cfg.task == "stream" else recall_forward)(params, (key, value, flag), cfg)
    known, right, first = targets >= 0, z.argmax(axis=2) == targets, math.nan
    loss = softmax_cross_entropy_forward(z[known], targets[known])[0]
    if cfg.task == "stream" and length > cfg.home + cfg.away:
        visit, seen = np.zeros(key.shape, bool), np.ones((batch, cfg.keys), bool)
        for t in range(1, length):
            if flag[t - 1, 0] > flag[t, 0]:
                seen[:] = False                         # home again, and no key visited
            if not flag[t, 0]:
                visit[t] = ~seen[np.arange(batch), key[t]]
                seen[np.arange(batch), key[t]] = True
        first = float(right[visit].mean())
    return float(right[known].mean()), float(loss), first


def attention_map(params, tokens, cfg):
    """What the memory pays attention to: with the identity as values, row t of the answers says how much of every v_s
    is in y_t. All rules but adam are linear in v, so A V is their answer (from an empty memory)  -> A (B, T, T)."""
    (k, q, _, gates), _ = tokens_forward(params, tokens, cfg)
    T, B, _ = k.shape
    identity = np.repeat(np.eye(T, dtype=k.dtype)[:, None], B, axis=1)
    A, _ = memory_forward(k, q, identity, gates, np.zeros((T, k.shape[2]), k.dtype), cfg.rule, inner_objective(cfg))
    return A.swapaxes(0, 1)


def source_of(tokens):
    """For every token the place of the token that says its key's value, the last one with this key that is no junk;
    -1: none  -> (B, T)."""
    key, _, junk = tokens
    T, B = key.shape
    source = np.full((B, T), -1)
    for t in range(T):
        for s in range(t):
            source[:, t] = np.where((key[s] == key[t]) & (junk[s] == 0), s, source[:, t])
    return source


def key_gram(params):
    """|k_i . k_j| for all pairs of keys -> (K, K)."""
    k, _ = unit_forward(params["Wk"])
    return np.abs(k @ k.T)


def mean_overlap(gram):
    """The mean of a key Gram matrix without its diagonal."""
    return float(gram[~np.eye(len(gram), dtype=bool)].mean())


def check_identities(rng):
    """Both sides of eight statements, in float64 on random numbers -> [(statement, largest difference)]."""
    T, B, d, p = 12, 3, 5, 4
    k, q, v = (rng.standard_normal((T, B, n)) for n in (d, d, p))
    eta, alpha, mu = (rng.uniform(0.1, 0.9, (T, B)) for _ in range(3))
    k, q = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (k, q))
    M0, M = rng.standard_normal((p, d)), rng.standard_normal((B, p, d))
    one = np.ones(B)
    found = []

    def say(text, a, b):
        found.append((text, float(np.abs(a - b).max())))
    (step,), _ = gd_forward(M, k[0], -v[0], one, one)
    say("hebb: one gradient step of size 1 on -<M k, v> adds v k^T", step, M + outer(v[0], k[0]))
    y, _ = memory_forward(k, q, v, {}, 0 * M0, "hebb", "dot")
    scores = np.tril((q.swapaxes(0, 1) @ k.transpose(1, 2, 0)), -1)
    say("hebb over a sequence = masked (Q K^T) V, linear attention", y.swapaxes(0, 1), scores @ v.swapaxes(0, 1))
    (step,), _ = gd_forward(M, k[0], mv(M, k[0]) - v[0], eta[0], one)
    kk = np.eye(d) - col(eta[0]) * outer(k[0], k[0])
    say("a gradient step on |M k - v|^2 / 2 = delta rule M (I - eta k k^T) + eta v k^T", step,
        M @ kk + col(eta[0]) * outer(v[0], k[0]))
    (dgd,), _ = dgd_forward(M, k[0], -v[0], eta[0], one)
    say("delta gradient descent on the dot objective = delta rule", dgd, step)
    (dgd,), _ = dgd_forward(M, k[0], mv(M, k[0]) - v[0], eta[0], one)
    say("delta gradient descent on L = gradient step on L + |M k|^2 / 2", dgd,
        M - col(eta[0]) * (outer(mv(M, k[0]) - v[0], k[0]) + M @ outer(k[0], k[0])))
    m = s = np.zeros((B, p, d))
    b, eps, old = 0.9, 1e-6, M
    for t in range(T):
        (new, m, s), (_, g, m_hat, r, *_) = adam_forward(old, m, s, k[t], -v[t], one, one, t + 1, b, b, eps)
        u, old = old - new, new
    past = np.stack([outer(-v[t], k[t]) for t in range(T)])
    c = (b ** np.arange(T - 1, -1, -1) * (1 - b) / (1 - b ** T)) ** 0.5         # roots of the weights of past slopes
    best = [np.linalg.lstsq(np.append(c * past[(slice(None), *i)], eps ** 0.5)[:, None],        # eps is a small ridge
                            np.append(c / r[i], 0), rcond=None)[0][0] for i in np.ndindex(r.shape)]
    say("Adam's step, beta1 = beta2 = least squares from the past slopes to their size", u.ravel(), np.array(best))
    worst = 0.0
    for rule, objective in (("hebb", "dot"), ("delta", "l2"), ("momentum", "l2"), ("dgd", "l2")):
        gates = {"eta": eta, "alpha": alpha, "mu": mu}
        A, _ = memory_forward(k, q, np.repeat(np.eye(T)[:, None], B, axis=1), gates, np.zeros((T, d)), rule, objective)
        y, _ = memory_forward(k, q, v, gates, 0 * M0, rule, objective)
        worst = max(worst, np.abs(A.swapaxes(0, 1) @ v.swapaxes(0, 1) - y.swapaxes(0, 1)).max())
    found.append(("attention map of the memory times V = its answers (hebb, delta, momentum, dgd)", float(worst)))
    level = np.array([0.5, 0.2]), np.array([0.8, 0.9]), np.array([0.7, 0.4])
    A, y = (cms_forward(k, x, *level, [1, 3])[0].swapaxes(0, 1) for x in (np.repeat(np.eye(T)[:, None], B, axis=1), v))
    say("and the same for a continuum memory", A @ v.swapaxes(0, 1), y)
    return found


# ---- pictures in text ------------------------------------------------------------------------------------------------

SHADES = np.array(list(" .:-=+*#%@"))


def shade(values):
    """Numbers from 0 to 1 -> characters from blank to dark, in an array of the same shape."""
    return SHADES[(np.clip(values, 0, 1) * 9.99).astype(int)]


def loss_curve(losses, width=60):
    """The losses from first to last in one line of text, dark where high (the scale is logarithmic)."""
    means = np.log([np.mean(part) + 1e-12 for part in np.array_split(losses, min(width, len(losses)))])
    return "".join(shade((means - means.min()) / (np.ptp(means) + 1e-12)))


def side_by_side(titles, pictures, gap="   "):
    """Several pictures of equal height, each a list of lines, next to each other under their titles -> text."""
    columns = [[title, *lines] for title, lines in zip(titles, pictures)]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(gap.join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns))


def draw_map(A, tokens):
    """One attention map, tokens and flags of junk on both axes; a row is a question -> lines of text.   A (T, T)."""
    letters, flags = "".join(chr(97 + a % 26) for a in tokens[0][:, 0]), "".join(" x"[int(f)] for f in tokens[2][:, 0])
    rows = [f"  {a} {f}{''.join(row)}" for a, f, row in zip(letters, flags, shade(np.abs(A)))]
    return [f"     {letters}", f"junk {flags}", *rows]


def draw_timeline(params, cfg, columns=96):
    """What each level of a continuum memory holds for one key before every token: the letter of the value, a capital if
    strong, . if there is next to nothing; and what the levels say together -> text."""
    cycle = cfg.home + cfg.away
    part = replace(cfg, length=cycle + columns, batch=16)
    key, value, away = tokens = make_batch(part, np.random.default_rng(cfg.seed + 2000))[:3]
    (caches, _, _, w, *_), *_ = stream_forward(params, tokens, part)[1]
    times = np.arange(cycle, part.length)
    visits = (np.eye(cfg.keys)[key[times]] * away[times, :, None]).sum(axis=0)
    b, a = np.unravel_index(visits.argmax(), visits.shape)              # the key that is rebound and seen most
    held = np.stack([caches[t][0][b].reshape(-1, len(w), cfg.keys)[:, :, a] * w for t in times])     # (times, V, L)

    def letters(values):
        best, size = values.argmax(axis=1), values.max(axis=1)
        return "".join("." if s < 0.05 else chr((65 if s > 0.5 else 97) + v % 26) for v, s in zip(best, size))
    seen = "".join(chr(97 + value[t, b] % 26) if key[t, b] == a else " " for t in times)
    lines = ["phase      " + "".join("-#"[int(away[t, b])] for t in times) + "   - home  # away", "seen       " + seen]
    lines += [f"period {C:3d} {letters(held[:, :, level])}" for level, C in enumerate(read_periods(cfg))]
    return "\n".join([*lines, "together   " + letters(held.sum(axis=2))])


# ---- demo ------------------------------------------------------------------------------------------------------------

def learn_recall(cfg, rng):
    """Train one inner rule on rebinding, and look into it -> figures, params, progress."""
    before = init_params(cfg, np.random.default_rng(cfg.seed))
    print(f"\nRecall: which value does a key have by now? {cfg.keys} keys, {cfg.values} values, {cfg.length} tokens, "
          f"{cfg.junk:.0%} of them junk.\n"
          f"Inner rule {cfg.rule}, eta {cfg.eta}, alpha {cfg.alpha}, memory {cfg.width} x {cfg.width}, "
          f"{sum(p.size for p in before.values())} parameters of the slow level")
    if cfg.keys > cfg.width:
        bound = ((cfg.keys - cfg.width) / (cfg.width * (cfg.keys - 1))) ** 0.5
        print(f"{cfg.keys} keys in {cfg.width} dimensions cannot all be orthogonal, so writing one disturbs others: "
              f"root mean\nsquare overlap at least {bound:.2f} (Welch's bound). Learning can only spread the harm.")
    print(f"chance level: loss {math.log(cfg.values):.3f}, accuracy {1 / cfg.values:.3f}; "
          f"untrained {score_fresh(before, cfg, cfg.length)[0]:.3f}")
    params, progress = train_slow_level(cfg, rng, quiet=False)
    print("loss", loss_curve(progress.losses))
    figures = {}
    for length in (cfg.length, 4 * cfg.length, 16 * cfg.length):
        right, loss, _ = score_fresh(params, cfg, length)
        figures.update({"accuracy": right, "loss": loss} if length == cfg.length else {f"accuracy_{length}": right})
        print(f"fresh sequences of {length:4d} tokens: {right:.3f} right, loss {loss:.3f}"
              + ("" if length == cfg.length else "   (longer than any it was trained on)"))
    grams = key_gram(before), key_gram(params)
    figures["gram"] = mean_overlap(grams[1])
    print("\nThe slow level makes the fast level's problem easy: |k_i . k_j| of all keys, dark is 1")
    print(side_by_side([f"before: mean {mean_overlap(grams[0]):.3f}", f"after: mean {figures['gram']:.3f}"],
                       [["".join(np.repeat(row, 2)) for row in shade(gram)] for gram in grams], "        "))
    for name, choice, start in (("eta", cfg.eta, before), ("alpha", cfg.alpha, before)):
        if choice == "token":
            both = [sigmoid(float(p[name] @ f)) for p in (start, params) for f in np.array([(1, 0), (1, 1)])]
            print(f"{name}: begins at {both[0]:.2f}; learned: clean token {both[2]:.2f}, junk {both[3]:.2f}")
    return figures, params, progress


RULES = {       # rows of the table of inner rules
    "Hebb (linear attention)": dict(rule="hebb", eta="fixed"),
    "Hebb + learned decay": dict(rule="hebb", eta="fixed", alpha="global"),
    "Hebb + eta_t, alpha_t": dict(rule="hebb", eta="token", alpha="token"),
    "delta, eta = 1": dict(rule="delta", eta="fixed"),
    "delta, learned eta": dict(rule="delta", eta="global"),
    "delta + eta_t": dict(rule="delta", eta="token"),
    "delta + eta_t + momentum": dict(rule="momentum", eta="token", objective="l2"),
    "Adam (.9, .99)": dict(rule="adam", eta="token", objective="l2", beta1=0.9, beta2=0.99),
    "Adam (0, .9)": dict(rule="adam", eta="token", objective="l2", beta1=0.0, beta2=0.9),
    "DGD + eta_t": dict(rule="dgd", eta="token", objective="l2"),
}


def compare_rules(cfg):
    """Every inner rule on the recall task, on two seeds, and what four of them attend to -> figures, {} if stopped."""
    print(f"\nInner rules, {cfg.steps} steps on {cfg.length} tokens, two seeds: right answers on fresh sequences")
    lengths = (cfg.length, 4 * cfg.length, 16 * cfg.length)
    print(f"{'':26s}" + "".join(f"{f'{n} tokens':>16s}" for n in lengths) + f"{'loss':>16s}   loss while learning")
    kept, scores = {}, {}
    for name, change in RULES.items():
        parts = [replace(cfg, **{"alpha": "fixed", "mu": 0.0, "seed": cfg.seed + i, **change}) for i in (0, 1)]
        runs = [train_slow_level(part, np.random.default_rng(part.seed)) for part in parts]
        if any(progress.stopped for _, progress in runs):
            return {}
        tests = [[score_fresh(params, part, n) for n in lengths] for part, (params, _) in zip(parts, runs)]
        print(f"{name:26s}" + "".join(f"{tests[0][n][0]:10.3f} {tests[1][n][0]:5.3f}" for n in range(3))
              + f"{tests[0][0][1]:10.3f} {tests[1][0][1]:5.3f}   {loss_curve(runs[0][1].losses, 20)}")
        kept[name], scores[name] = (parts[0], runs[0][0]), tests
    shown = ["Hebb (linear attention)", "Hebb + eta_t, alpha_t", "delta, eta = 1", "delta + eta_t"]
    few = replace(cfg, keys=min(4, cfg.keys), length=16, batch=64)
    tokens = make_batch(few, np.random.default_rng(cfg.seed + 3))[:3]
    source, pictures = source_of(tokens), []
    for name in shown:
        A = np.abs(attention_map(kept[name][1], tokens, kept[name][0]))
        share = A[np.arange(64)[:, None], np.arange(16), source] / np.maximum(A.sum(axis=2), 1e-9)
        pictures.append([*draw_map(A[0], tokens), f"on its source: {share[source >= 0].mean():.2f}"])
    print("\nWhat they attend to: no softmax and no stored past, and yet every memory has an attention map. A row\n"
          "is a token, its columns those before; right is the last one with its letter and no x, which marks junk.")
    print(side_by_side(shown, pictures))
    delta, hebb = scores["delta + eta_t"], scores["Hebb (linear attention)"]
    return {"delta": min(t[0][0] for t in delta), "hebb": max(t[0][0] for t in hebb),
            **{f"delta_{lengths[i]}": min(t[i][0] for t in delta) for i in (1, 2)}}


def learn_stream(cfg, rng):
    """Train one continuum memory on the stream of home and away -> figures, params, progress."""
    params = init_params(cfg, rng)
    print(f"\nStream: {cfg.keys} keys with permanent values; after every {cfg.home} steps at home come {cfg.away} "
          f"away, where all\nhave other values. Continuum memory with update periods {cfg.periods}, "
          f"{sum(p.size for p in params.values())} parameters of the slow level\n"
          f"chance level: loss {math.log(cfg.values):.3f}, accuracy {1 / cfg.values:.3f}")
    params, progress = train_slow_level(cfg, rng, quiet=False)
    print("loss", loss_curve(progress.losses))
    right, loss, first = score_fresh(params, cfg, 4 * cfg.length)
    print(f"fresh sequences of {4 * cfg.length} tokens: loss {loss:.3f}, {right:.3f} right, {first:.3f} at first "
          "visits after a return\n\nOne key through time. With several periods the fast level takes up the passing "
          "value, slow ones keep\nthe permanent one, and so the memory can return to it before it is seen again.")
    print(draw_timeline(params, cfg))
    return {"nll": loss, "accuracy": right, "first": first}, params, progress


def compare_periods(cfg):
    """Update periods at equal size of the state, on two seeds -> figures, {} if stopped."""
    print(f"\nUpdate periods, three levels each, {cfg.steps} steps, two seeds; on {4 * cfg.length} fresh tokens:")
    print(f"{'':38s}{'loss':>14s}{'right':>14s}{'first visit':>14s}  writes a step")
    losses = {}
    for name, shared, staggered in (
            ("1,1,1", False, False), ("4,4,4", False, False), ("16,16,16", False, False), ("1,4,16", False, False),
            ("1,4,16 with one alpha", True, False), ("1,1,1 with a staggered beginning", False, True)):
        part = replace(cfg, periods=name.split()[0], shared=shared, staggered=staggered)
        parts = [part, replace(part, seed=cfg.seed + 1)]
        runs = [train_slow_level(part, np.random.default_rng(part.seed)) for part in parts]
        if any(progress.stopped for _, progress in runs):
            return {}
        tests = [score_fresh(params, part, 4 * part.length) for part, (params, _) in zip(parts, runs)]
        print(f"{name:38s}" + "".join(f"{tests[0][n]:8.3f} {tests[1][n]:5.3f}" for n in (1, 0, 2))
              + f"{sum(1 / C for C in read_periods(parts[0])):15.2f}")
        losses[name] = np.array([t[1] for t in tests])
    gain = {name: float((losses[name] - losses["1,4,16"]).min()) for name in ("1,1,1", "4,4,4", "16,16,16")}
    print("Several time scales beat one: a single slot cannot hold both the rule and the exception. But the period\n"
          "does not do it: the last row, the control, updates all levels at every step and does as well, since they\n"
          "begin apart and learn to forget at different speeds; it takes 2.3 times the writes. Levels with one period\n"
          "and one beginning get the same gradients, and never part. Nor are three needed: --periods 1,4 does as well.")
    return {"periods_gain": min(gain.values()), "control": float(losses["1,1,1 with a staggered beginning"].mean())}


def race_inner_rules(cfg):
    """Inner optimizers without a slow level on targets v = W k, each with its best step size -> errors over gd's."""
    T, B, d, etas = 128, 16, 8, 2.0 ** np.arange(-9, 2)
    print(f"\nInner optimizers alone, on v = W k in {d} dimensions: squared error on the last {T // 4} of {T} tokens, "
          f"as a\nshare of that of knowing nothing, each rule with its best step size of {len(etas)}")
    print(f"{'':46s}{'gd':>10s}{'momentum':>10s}{'adam':>10s}")
    figures = {}
    for name, kind in (("8 correlated keys, again and again", "repeat"),
                       ("fresh keys, alike in all directions", "fresh"),
                       ("fresh keys, stretched along the axes (300 : 1)", "axes"), ("the same, rotated", "rotated")):
        rng = np.random.default_rng(cfg.seed)
        W = rng.standard_normal((B, d, d))
        k = rng.standard_normal((T, B, d))
        if kind == "repeat":
            k = np.tile((k[8] + 0.5 * k[:8]) / d ** 0.5, (T // 8, 1, 1))
        if kind in ("axes", "rotated"):
            k = k * 300.0 ** (-0.5 * np.arange(d) / (d - 1))            # condition 300 of the covariance
        if kind == "rotated":
            k = mv(np.linalg.qr(rng.standard_normal((B, d, d)))[0], k)
        v, grid = mv(W, k), [np.repeat(x, len(etas), axis=1) for x in (k, mv(W, k))]
        gates = {"eta": np.tile(etas, (T, B)), "mu": np.full((T, B * len(etas)), 0.9)}
        row = []
        for rule in ("delta", "momentum", "adam"):
            y, _ = memory_forward(grid[0], grid[0], grid[1], gates, np.zeros((d, d)), rule, "l2", (0.9, 0.99))
            error = ((y - grid[1])[-T // 4:] ** 2).sum(axis=2).reshape(T // 4, B, len(etas)).mean(axis=(0, 1))
            row.append(float(np.nanmin(error) / (v[-T // 4:] ** 2).sum(axis=2).mean()))
        print(f"{name:46s}" + "".join(f"{x:10.4f}" for x in row))
        figures.update({"repeat": {"momentum_repeat": row[1] / row[0]}, "axes": {"adam_axes": row[2] / row[0]},
                        "rotated": {"adam_rotated": row[2] / row[0]}}.get(kind, {}))
    print("Momentum and Adam help where keys repeat; Adam most where the curvature follows the axes, which dividing\n"
          "entry by entry can see, and no longer when the problem is rotated. On fresh keys that are alike, gd wins.")
    n = np.arange(48)
    print("\nHow far back does a step look? Weights of the last 48 slopes, newest first:")
    print(f"momentum, mu .9       {''.join(shade(0.9 ** n))}   half of the weight on the last 7")
    print(f"buffer of period 16   {''.join(shade((n < 16).astype(float)))}   equal, then written and emptied")
    return figures


def main(cfg):
    """Run one task, or all parts of the demo."""
    start, demo, figures, params = time.perf_counter(), cfg.task == "demo", {}, {}
    examples, seconds, steps = 0, 0.0, 0
    print("nested_attention.py: attention as learning inside learning")
    if cfg.task in ("demo", "identities"):
        print("\nIdentities, largest absolute difference of both sides:")
        found = check_identities(np.random.default_rng(cfg.seed))
        for text, difference in found:
            print(f"  {difference:.0e}  {text}")
        figures["d1"] = max(difference for _, difference in found)
    recall = replace(cfg, task="recall")
    stream = replace(cfg, **({} if cfg.task == "stream" else PRESETS["stream"]), task="stream")
    for part, learn, compare in ((recall, learn_recall, compare_rules), (stream, learn_stream, compare_periods)):
        if demo or cfg.task == part.task:
            found, params, progress = learn(part, np.random.default_rng(cfg.seed))
            examples, seconds = examples + progress.step * part.batch, seconds + progress.seconds
            steps += progress.step
            compared = {} if progress.stopped or not demo else compare(part)
            figures.update(compared or found)
            demo = demo and bool(compared)              # Ctrl-C ends the demo as well
    if demo or cfg.task == "optimizers":
        figures.update(race_inner_rules(cfg))
    print("\nNext: python nested_attention.py --task recall --keys 12 --steps 300      python transformer.py\n"
          "      python nested_attention.py --task recall --rule dgd                 "
          "python nested_attention.py --task stream --periods 1,4")
    print_result(task=cfg.task, **figures, params=sum(p.size for p in params.values()), steps=steps,
                 seconds=time.perf_counter() - start, examples_per_s=int(examples / max(seconds, 1e-9)))


# ---- plumbing: the same in every lesson; whoever types along may stop here -------------------------------------------

class InputError(ValueError):
    """A flag, value or file that cannot be used; the program ends with its text in one line and exit status 2."""


def require(ok, what, expected, found):
    """Raise InputError unless ok."""
    if not ok:
        raise InputError(f"{what}: expected {expected}, found {found!r}")


def read_flags(argv=None):
    """Every field of Config is a flag, its comment the help text -> Config."""
    def fail(message):
        raise InputError(f"{message} (--help lists the flags)")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        kind = dict(type=field.type, metavar=field.name.upper())
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif get_args(field.type):
            kind = dict(choices=get_args(field.type))
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=text, **kind)
    known = parser.parse_known_args(argv)[0]
    data, experiment = (getattr(known, name, "") for name in ("data", "experiment"))
    for key in (known.task, f"{known.task} --data" if data else "", experiment):
        parser.set_defaults(**PRESETS.get(key, {}))
    return Config(**vars(parser.parse_args(argv)))


def run(main):
    """Call main with the Config of the flags; what is not a bug ends in one line, not in a traceback."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")      # each line at once, on any console
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)                           # `| head` ends the program quietly
    np.seterr(over="ignore", invalid="ignore")          # a run that diverges shows in its loss, which Progress checks
    with contextlib.suppress(AttributeError, OSError, TypeError):               # Linux: keep freed memory for reuse
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, -1)
    try:
        main(read_flags())
    except (InputError, FloatingPointError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


class Progress:
    """for step in progress: ... progress.report(loss).   Prints about ten lines with the time left. Ctrl-C ends the
    loop after the step at hand, a second one quits. A loss that is not finite raises FloatingPointError."""

    def __init__(self, steps, first=1, quiet=False, lines=10):
        self.steps, self.first, self.quiet, self.lines = steps, first, quiet, lines
        self.step, self.losses, self.printed, self.stopped = first - 1, [], 0, False
        self.start, self.seconds = time.perf_counter(), 0.0

    def __iter__(self):
        previous = signal.signal(signal.SIGINT, self.interrupt)
        try:
            while self.step < self.steps and not self.stopped:
                self.step += 1
                yield self.step
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.stopped:
            print(f"stopped after step {self.step}; this is what has been learned so far")

    def interrupt(self, signum, frame):
        """Called on Ctrl-C."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def report(self, loss, note=lambda: ""):
        """Keep the loss of this step; if a line is due, print it, with what note() says."""
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: training diverged; try a smaller --lr")
        self.losses.append(float(loss))
        self.seconds = time.perf_counter() - self.start
        if not self.quiet and (self.step % -(-self.steps // self.lines) == 0 or self.step == self.steps):
            recent = self.losses[self.printed:]
            self.printed = len(self.losses)
            left = self.seconds / len(self.losses) * (self.steps - self.step)
            print(f"step {self.step:6d}/{self.steps}  loss {sum(recent) / len(recent):.4f}{note()}  |  "
                  f"{self.seconds:.1f} s  ({left:.0f} s left)")


def print_result(**figures):
    """The last line of a run, for comparing runs."""
    print("result: " + " ".join(f"{k}={v:#.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()))


if __name__ == "__main__":
    run(main)
