"""seq2seq.py: one sequence in, another out, of another length.

A recurrent net with one output per input writes before it has read everything. Two LSTMs need not:
the encoder reads the source; the decoder starts from its last state and writes the target up to
<eos>. So one state of fixed size holds all of the source: the bottleneck; the picture shows where
it fails. In training the decoder reads the target, not its own output: teacher forcing.

Forward, for a source x_1 .. x_S and a target y_1 .. y_T, with y_0 = <bos> and y_T = <eos>:
    h, c = encoder LSTM over x_1 .. x_S, from zeros; padding leaves h and c as they are
    h_t = decoder LSTM over y_0 .. y_{t-1}, from h, c         logits_t = h_t Wo + bo
    loss = mean of -log softmax(logits_t)[y_t] over all y_t but padding
Backward (the LSTM is derived in lstm.py):
    dlogits_t = (softmax(logits_t) - onehot(y_t)) / count     dWo = sum_t h_t^T dlogits_t
    dh_t = dlogits_t Wo^T, and back through the decoder; the dh, dc that leave it at its first step
    are the gradient of the encoder's last state, and all that goes back into the encoder

Run    python seq2seq.py      (reverse up to 6 letters; --help lists the other tasks)
Papers: Sutskever, Vinyals, Le 2014 (two LSTMs), Cho et al. 2014 (encoder and decoder).
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
    """Read 2 to 6 letters, write them in reverse order."""
    length: int = 6         # most letters
    embed_dim: int = 32     # embedding dimension
    hidden: int = 128       # hidden units of the encoder and of the decoder
    batch_size: int = 32    # sequences per step
    steps: int = 1400       # optimizer steps
    lr: float = 0.01        # peak learning rate
    warmup: int = 50        # steps of linear warmup
    seed: int = 0           # random seed


# ---- layers: N sequences, T positions, D inputs, H hidden units, V tokens ------------------------

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
    dE = np.zeros(shape, dout.dtype)
    np.add.at(dE, ids, dout)                            # unlike dE[ids] += dout, adds repeated ids
    return dE


def sigmoid(z):
    """1 / (1 + e^-z), computed as (1 + tanh(z / 2)) / 2, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def masked_lstm_forward(z, h0, c0, Wh, mask):
    """lstm of lstm.py; where mask (T, N, 1) is False (padding), h and c stay as they are.
    z = x Wx + b (T, N, 4 H), h0, c0 (N, H), Wh (H, 4 H) -> every h (T, N, H), the last c (N, H)."""
    N, H = h0.shape
    h, c, gates = [h0], [c0], []
    for t in range(len(z)):
        a = (z[t] + h[t] @ Wh).reshape(N, 4, H)
        i, f, g, o = sigmoid(a[:, 0]), sigmoid(a[:, 1]), np.tanh(a[:, 2]), sigmoid(a[:, 3])
        new_c = f * c[t] + i * g
        new_h = o * np.tanh(new_c)
        c.append(np.where(mask[t], new_c, c[t]))
        h.append(np.where(mask[t], new_h, h[t]))
        gates.append((i, f, g, o))
    h, c, gates = np.array(h), np.array(c), np.array(gates)
    return (h[1:], c[-1]), (h, c, gates, Wh, mask)


def masked_lstm_backward(dh_out, dc, cache):
    """As derived in lstm.py; at padding the gradient passes around the step.   dh_out (T, N, H), dc
    (N, H) of the last c -> dz (T, N, 4 H), dh0, dc0, dWh."""
    h, c, gates, Wh, mask = cache
    i, f, g, o = gates.swapaxes(0, 1)                       # (T, N, H) each
    tanh_c = np.tanh(f * c[:-1] + i * g)
    di, df = g * i * (1 - i), c[:-1] * f * (1 - f)          # dz_i = dc di, dz_f = dc df,
    dg, do = i * (1 - g ** 2), tanh_c * o * (1 - o)         # dz_g = dc dg, dz_o = dh do and
    to_c = o * (1 - tanh_c ** 2)                            # dc += dh to_c, for all steps at once
    T, N, H = dh_out.shape
    dz = np.zeros((T, N, 4 * H), dh_out.dtype)
    dh, WhT = 0, Wh.T.copy()                                # contiguous: faster in the loop
    for t in reversed(range(T)):
        dh = dh + dh_out[t]                                 # from the step after, and from above
        new_dh, new_dc = np.where(mask[t], dh, 0), np.where(mask[t], dc, 0)     # through the step
        new_dc = new_dc + new_dh * to_c[t]
        dz[t] = np.concatenate([new_dc * di[t], new_dc * df[t], new_dc * dg[t], new_dh * do[t]],
                               axis=1)
        dh = np.where(mask[t], dz[t] @ WhT, dh)             # or around it
        dc = np.where(mask[t], new_dc * f[t], dc)
    dWh = h[:-1].reshape(T * N, H).T @ dz.reshape(T * N, 4 * H)
    return dz, dh, dc, dWh


def softmax_cross_entropy_forward(logits, targets):
    """-mean_n log softmax(logits)[n, targets_n].   logits (N, V), targets (N,) ids -> scalar."""
    logits = logits - logits.max(axis=1, keepdims=True)     # the same softmax, without overflow
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(len(targets)), targets].mean()
    return loss, (log_p, targets)


def softmax_cross_entropy_backward(dout, cache):
    """dlogits = (p - onehot(targets)) / N: log p_t changes with logit k by (k == t) - p_k."""
    log_p, targets = cache
    dlogits = np.exp(log_p)
    dlogits[np.arange(len(targets)), targets] -= 1
    return dlogits * (dout / len(targets))


# ---- data and model: an LSTM reads the source, another one writes the target ---------------------

VOCAB = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]
PAD, BOS, EOS = 0, 1, 2     # padding, beginning and end of a sequence


def pad(sequences):
    """Lists of ids -> ids (N, longest), each followed by PAD."""
    ids = np.full((len(sequences), max(map(len, sequences))), PAD)
    for row, sequence in zip(ids, sequences):
        row[:len(sequence)] = sequence
    return ids


def make_batch(cfg, step, dtype=np.float32, held_out=False):
    """-> source (N, S): letters; inputs (N, T): BOS, then the letters in reverse order; targets (N,
    T): these, then EOS. Sequences whose ids sum to a multiple of 11 are held out."""
    rng, source = np.random.default_rng((cfg.seed, step)), []
    for n in rng.integers(2, cfg.length + 1, cfg.batch_size):
        ids = rng.integers(3, len(VOCAB), n)
        while (ids.sum() % 11 == 0) != held_out:
            ids = rng.integers(3, len(VOCAB), n)
        source.append(ids)
    inputs = [[BOS, *ids[::-1]] for ids in source]
    return pad(source), pad(inputs), pad([[*ids[::-1], EOS] for ids in source])


def init_params(cfg, rng, dtype=np.float32, source_size=len(VOCAB), target_size=len(VOCAB)):
    """encoder. and decoder.: E, Wx, Wh, b; Wo, bo. The variance of a matrix (n, m) is 1 / n."""
    H, D = cfg.hidden, cfg.embed_dim
    params = {"Wo": rng.standard_normal((H, target_size)) * H ** -0.5, "bo": np.zeros(target_size)}
    for name, V in (("encoder", source_size), ("decoder", target_size)):
        params[f"{name}.E"] = 0.5 * rng.standard_normal((V, D))
        params[f"{name}.Wx"] = rng.standard_normal((D, 4 * H)) * D ** -0.5
        params[f"{name}.Wh"] = rng.standard_normal((H, 4 * H)) * H ** -0.5
        params[f"{name}.b"] = np.repeat([0.0, 1.0, 0.0, 0.0], H)        # forget gates begin open
    return {name: value.astype(dtype) for name, value in params.items()}


def token_lstm_forward(params, name, ids, state=()):
    """ids (N, T), state: h0 and c0 (N, H), or zeros -> every h (T, N, H), the last c (N, H)."""
    E, Wx, Wh, b = (params[f"{name}.{key}"] for key in ("E", "Wx", "Wh", "b"))
    x, embed = embedding_forward(ids.T, E)                  # (T, N, D)
    T, N, D = x.shape
    h0, c0 = state or np.zeros((2, N, len(Wh)), x.dtype)
    z, project = linear_forward(x.reshape(T * N, D), Wx, b)
    mask = (ids.T != PAD)[:, :, None]                       # (T, N, 1)
    out, lstm = masked_lstm_forward(z.reshape(T, N, -1), h0, c0, Wh, mask)
    return out, (name, embed, project, lstm, x.shape)


def token_lstm_backward(dh, dc, cache):
    """-> gradients under the keys of params, dh0, dc0."""
    name, embed, project, lstm, (T, N, D) = cache
    dz, dh0, dc0, dWh = masked_lstm_backward(dh, dc, lstm)
    dx, dWx, db = linear_backward(dz.reshape(T * N, -1), project)
    dE = embedding_backward(dx.reshape(T, N, D), embed)
    return {f"{name}.E": dE, f"{name}.Wx": dWx, f"{name}.Wh": dWh, f"{name}.b": db}, dh0, dc0


def seq2seq_forward(params, source, inputs):
    """-> logits (count, V): what follows each token of inputs (N, T), without padding."""
    (h_source, c), encoder = token_lstm_forward(params, "encoder", source)
    (h, _), decoder = token_lstm_forward(params, "decoder", inputs, (h_source[-1], c))
    real = inputs.T != PAD                                  # (T, N)
    logits, readout = linear_forward(h[real], params["Wo"], params["bo"])
    return logits, (encoder, decoder, readout, real, h_source.shape, h.shape)


def seq2seq_backward(dlogits, cache):
    """seq2seq_forward from bottom to top -> gradients under the keys of params."""
    encoder, decoder, readout, real, source_shape, shape = cache
    dh, dh_source = np.zeros(shape, dlogits.dtype), np.zeros(source_shape, dlogits.dtype)
    dh[real], dWo, dbo = linear_backward(dlogits, readout)
    grads, dh_source[-1], dc = token_lstm_backward(dh, np.zeros_like(dh[0]), decoder)
    encoder_grads, _, _ = token_lstm_backward(dh_source, dc, encoder)
    return {**grads, **encoder_grads, "Wo": dWo, "bo": dbo}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    source, inputs, targets = batch
    logits, cache = seq2seq_forward(params, source, inputs)
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.T[targets.T != PAD])
    return loss, seq2seq_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads, state=None,
          losses=None, note=lambda: "", update=adam_update):
    """Train params in place -> losses. Later parts pass their own functions, or resume."""
    state = {} if state is None else state
    losses = [] if losses is None else losses
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def decode_greedy(params, source, T):
    """-> ids (N, T), each the likeliest after those before it."""
    (h, c), _ = token_lstm_forward(params, "encoder", source)
    ids = [np.full(len(source), BOS)]
    for _ in range(T):
        (h, c), _ = token_lstm_forward(params, "decoder", ids[-1][:, None], (h[-1], c))
        ids.append((h[0] @ params["Wo"] + params["bo"]).argmax(axis=1))
    return np.stack(ids[1:], axis=1)


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
    """Train; write held-out sequences, as long as those of the training and longer."""
    start, params = time.perf_counter(), init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"Reverse 2 to {cfg.length} letters: hidden {cfg.hidden}, lr {cfg.lr}, batch size "
          f"{cfg.batch_size}, {size} parameters\nchance level: loss {math.log(27):.3f}")
    losses = train(params, cfg)
    source, _, targets = make_batch(replace(cfg, length=cfg.length + 4, batch_size=2000), 0, True)
    written, n = decode_greedy(params, source, targets.shape[1]), (source != PAD).sum(axis=1)
    right = ((written == targets) | (targets == PAD)).all(axis=1)
    exact = float(right[n <= cfg.length].mean())
    check_finite(exact, params)
    for k in (2, cfg.length, cfg.length + 4):
        read, wrote = ("".join(VOCAB[i] for i in ids[n == k][0, :k]) for ids in (source, written))
        print(f"reads {read:{cfg.length + 4}s}    writes {wrote}")
    print(f"exact match: {exact:.2%} of held-out sequences of 2 to {cfg.length} letters\n\n"
          f"Exact match. Rows: letters in the source; in training there were {cfg.length} at most")
    for k in np.unique(n):
        print(f"{k:5d} |{'#' * round(50 * right[n == k].mean()):50s}| {right[n == k].mean():.1%}")
    print("\nNext: python seq2seq.py lengths      python seq2seq.py words")
    print_result("reverse", cfg, exact=exact, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: beam search, scheduled sampling, letters, words, the bottleneck. =====

MORE = """
Break it (what to change, and what comes of it; exact match of the default run is 99.4 %)
    token_lstm_forward: mask all True           20 %: the state runs on through the padding, of
                                                which the held-out batch has more
    seq2seq_forward: (0 * h_source[-1], 0 * c)  2 %: nothing comes from the source
    make_batch: inputs of [*ids[::-1], EOS]     0 %, at a loss of 0.0007: the decoder reads the very
                                                token that it has to write
    seq2seq_backward: 0 * dh_source             99.5 %: wrong, and it learns all the same through
                                                dc; so check gradients, not the loss
    ... and 0 * dc as well                      87 %: an encoder that is not trained at all is still
                                                a memory of some letters
    python seq2seq.py --hidden 32               93 %, 72 % of 6 letters (with 16: 83 %, 48 %)
    python seq2seq.py --length 12               90 %, 50 % of 12 letters
    python seq2seq.py words --teacher-forcing 0 as good as with teacher forcing: such short targets
                                                leave mistakes no time to add up

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Derive and add a second layer in both LSTMs (Sutskever had four). Is the bottleneck wider?
    2. Cho et al. 2014 give the encoder's last state to every step of the decoder, as a part of its
       input. Derive it, add it, compare python seq2seq.py --length 10.
    3. Let the teacher forcing ratio fall from 1 to 0 in the course of the training, as Bengio et
       al. 2015 do. Is it better than a fixed one?

Papers of these parts: Bengio et al. 2015 (scheduled sampling), Wu et al. 2016 (beam search with a
length penalty), Pascanu et al. 2013 (clipping).
"""

import argparse
import contextlib
import ctypes
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Literal, NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- beam search ---------------------------------------------------------------------------------

def log_softmax(logits):
    """log of the softmax of every row.   logits (N, V) -> (N, V)."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def beam_search(step, state, N, limit, beam, length_penalty):
    """Keep the best partial outputs of each of N sequences, K = beam of them, by log_p / length **
    length_penalty; a beam of 1 is greedy decoding. step(ids (N K,), state) -> log_p (N K, V) of the
    next token, state; state: a list of arrays with N K rows.
    -> ids (N, T) of the best outputs, PAD after EOS; their log_p (N,)."""
    row = np.arange(N)[:, None]
    ids = np.full((N, beam, 1), BOS)
    log_p = np.where(np.arange(beam) == 0, 0.0, -1e9) + np.zeros((N, 1))    # at first only one
    length, ended = np.zeros((N, beam), int), np.zeros((N, beam), bool)
    for _ in range(limit):
        next_log_p, state = step(ids[:, :, -1].ravel(), state)
        next_log_p = next_log_p.astype(float).reshape(N, beam, -1)
        V = next_log_p.shape[2]
        only_pad = np.where(np.arange(V) == PAD, 0.0, -1e9)
        next_log_p = np.where(ended[:, :, None], only_pad, next_log_p)
        length = length + ~ended
        total = log_p[:, :, None] + next_log_p              # (N, K, V)
        score = (total / length[:, :, None] ** length_penalty).reshape(N, beam * V)
        best = np.argsort(-score, axis=1, kind="stable")[:, :beam]
        origin, token = best // V, best % V                 # (N, K) each
        log_p = total[row, origin, token]
        ids = np.concatenate([ids[row, origin], token[:, :, None]], axis=2)
        length, ended = length[row, origin], ended[row, origin] | (token == EOS)
        state = [array[(beam * row + origin).ravel()] for array in state]
        if ended.all():
            break
    return ids[:, 0, 1:], log_p[:, 0]


def decode_beam(params, source, limit, beam, length_penalty):
    """-> ids (N, T) that beam_search finds, their log-probabilities (N,)."""
    (h, c), _ = token_lstm_forward(params, "encoder", source)

    def step(ids, state):
        (h, c), _ = token_lstm_forward(params, "decoder", ids[:, None], state)
        logits, _ = linear_forward(h[0], params["Wo"], params["bo"])
        return log_softmax(logits), [h[0], c]

    state = [np.repeat(array, beam, axis=0) for array in (h[-1], c)]
    return beam_search(step, state, len(source), limit, beam, length_penalty)


# ---- scheduled sampling: python seq2seq.py words --teacher-forcing 0.5 ---------------------------
# With teacher forcing the decoder never reads its own mistakes. Bengio et al. 2015 give it, at
# random, now the right token, now the one that it would have written.

def sampled_inputs(params, source, inputs, forced):
    """inputs (N, T), but where forced (N, T) is False, the likeliest token after those before it.
    An argmax has no slope, so no gradient goes through the choice."""
    (h, c), _ = token_lstm_forward(params, "encoder", source)
    inputs = inputs.copy()
    for t in range(inputs.shape[1] - 1):
        (h, c), _ = token_lstm_forward(params, "decoder", inputs[:, t:t + 1], (h[-1], c))
        logits = h[0] @ params["Wo"] + params["bo"]
        likeliest = 1 + logits[:, 1:].argmax(axis=1)        # any but PAD
        inputs[:, t + 1] = np.where(forced[:, t + 1], inputs[:, t + 1], likeliest)
    return inputs


def sampled_loss_and_grads(params, batch, cfg):
    """loss_and_grads; the batch says last where the inputs are those of the target."""
    source, inputs, targets, forced = batch
    if not forced.all():
        inputs = sampled_inputs(params, source, inputs, forced)
    return loss_and_grads(params, (source, inputs, targets), cfg)


def clip_norm(grads, limit):
    """Scale all gradients so that their joint norm is at most limit, if limit is not 0 (Pascanu et
    al. 2013).   -> the norm before."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    if norm > limit > 0:
        for g in grads.values():
            g *= limit / norm
    return norm


# ---- letters and words: python seq2seq.py letters, python seq2seq.py words -----------------------
# A source that is read backwards ends with what is written first (Sutskever et al. 2014).

NUMBERS = [*VOCAB[:3], *map(str, range(26))]
DIGITS = [*VOCAB[:3], *"0123456789"]
WORDS = [*VOCAB[:3], *("zero one two three four five six seven eight nine ten eleven twelve "
                       "thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
                       "thirty forty fifty sixty seventy eighty ninety hundred thousand "
                       "million").split()]


@dataclass
class Letters:
    """Translate 2 to 6 numbers from 0 to 25 into letters from a to z."""
    pairs = "letters"       # a row of PAIRS; without a type it is no flag
    length: int = 6         # most tokens of a source
    reverse_source: bool = True  # the encoder reads the source backwards
    teacher_forcing: float = 1.0  # teacher forcing ratio: share of inputs from the target
    embed_dim: int = 64     # embedding dimension
    hidden: int = 128       # hidden units of the encoder and of the decoder
    batch_size: int = 32    # sequences per step
    steps: int = 1200       # optimizer steps
    lr: float = 0.01        # peak learning rate
    warmup: int = 50        # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm
    beam: int = 4           # beam width: partial outputs kept at each step
    length_penalty: float = 0.7  # exponent of the length that log-probabilities are divided by
    save: str = ""          # checkpoint file (.npz) to write at every line of progress
    load: str = ""          # checkpoint file to resume from
    seed: int = 0           # random seed


@dataclass
class Words(Letters):
    """Write a number of 1 to 6 digits in English: 407 is four hundred seven."""
    pairs = "words"


def number_to_words(n):
    """407 -> ["four", "hundred", "seven"]."""
    if n < 20:
        return [WORDS[3 + n]]
    if n < 100:
        return [WORDS[21 + n // 10]] + (number_to_words(n % 10) if n % 10 else [])
    for size, name in ((10 ** 6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = number_to_words(n % size) if n % size else []
            return [*number_to_words(n // size), name, *rest]


def draw_letters(rng, n, held_out):
    """-> n ids of a source, NUMBERS, held out as in make_batch or not; of its target, VOCAB."""
    while True:
        ids = rng.integers(3, len(VOCAB), n).tolist()
        if (sum(ids) % 11 == 0) == held_out:
            return ids, ids


def draw_reversal(rng, n, held_out):
    """-> n ids of a source, letters, and of its target: the letters in reverse order."""
    ids, _ = draw_letters(rng, n, held_out)
    return ids, ids[::-1]


def draw_number(rng, n, held_out):
    """-> ids of a source, n DIGITS, and of its target, WORDS. From 100 on multiples of 11 are held
    out, below no number is."""
    while True:
        number = int(rng.integers(10 ** (n - 1) * (n > 1), 10 ** n))
        if n < 3 or (number % 11 == 0) == held_out:
            source = [DIGITS.index(digit) for digit in str(number)]
            return source, [WORDS.index(word) for word in number_to_words(number)]


# draws a pair; tokens of sources, of targets; what is between them; fewest; more of them in tests
PAIRS = {"reverse": (draw_reversal, (VOCAB, VOCAB), ("", ""), 2, 4),
         "letters": (draw_letters, (NUMBERS, VOCAB), (" ", ""), 2, 4),
         "words": (draw_number, (DIGITS, WORDS), ("", " "), 1, 0)}      # no million in training


def draw_pairs(cfg, rng, lengths, held_out):
    """Pairs with sources of these lengths -> source, inputs, targets, as of make_batch."""
    draw, *_ = PAIRS[cfg.pairs]
    pairs = [draw(rng, n, held_out) for n in lengths]
    source = pad([ids[::-1] if cfg.reverse_source else ids for ids, _ in pairs])
    inputs = pad([[BOS, *ids] for _, ids in pairs])
    return source, inputs, pad([[*ids, EOS] for _, ids in pairs])


def pairs_batch(cfg, step, dtype=np.float32):
    """-> draw_pairs of random lengths; forced (N, T): where the decoder reads the target."""
    rng, (_, _, _, fewest, _) = np.random.default_rng((cfg.seed, step)), PAIRS[cfg.pairs]
    lengths = rng.integers(fewest, cfg.length + 1, cfg.batch_size)
    source, inputs, targets = draw_pairs(cfg, rng, lengths, False)
    forced = (rng.random(inputs.shape) < cfg.teacher_forcing) | (inputs == PAD)
    return source, inputs, targets, forced


def init_pairs(cfg, rng, dtype=np.float32):
    """init_params for the vocabularies of cfg.pairs."""
    _, vocabs, *_ = PAIRS[cfg.pairs]
    return init_params(cfg, rng, dtype, *map(len, vocabs))


def agree(written, targets):
    """-> (N, T): where written (N, any number) is targets (N, T), or targets is padding."""
    T = targets.shape[1]
    written = np.pad(written, ((0, 0), (0, T)), constant_values=PAD)[:, :T]
    return (written == targets) | (targets == PAD)


def exact_by_length(params, cfg, lengths):
    """Greedy decoding of 200 held-out sources per length -> exact match by length; shares of right
    tokens by position in the target, an array per length."""
    rng, exact, shares = np.random.default_rng((cfg.seed, 10 ** 6)), [], []
    for n in lengths:
        source, _, targets = draw_pairs(cfg, rng, [n] * 200, True)
        right = agree(decode_greedy(params, source, targets.shape[1]), targets)
        real = targets != PAD
        exact.append(float(right.all(axis=1).mean()))
        shares.append((right & real).sum(axis=0) / real.sum(axis=0))
    check_finite(np.sum(exact), params)
    return exact, shares


def text(cfg, ids, side):
    """The tokens of ids before EOS, of a source (side 0) or of a target (side 1)."""
    _, vocabs, between, _, _ = PAIRS[cfg.pairs]
    ids = [*ids, EOS]
    return between[side].join(vocabs[side][i] for i in ids[:ids.index(EOS)] if i != PAD)


def show_search(params, cfg, n):
    """Beam search beside greedy decoding for 200 held-out sources of n tokens.   -> exact match of
    both."""
    rng = np.random.default_rng((cfg.seed, 10 ** 6, n))
    source, _, targets = draw_pairs(cfg, rng, [n] * 200, True)
    limit, found = targets.shape[1] + 2, {}
    for name, beam in (("greedy", 1), (f"beam {cfg.beam}", cfg.beam)):
        ids, log_p = decode_beam(params, source, limit, beam, cfg.length_penalty)
        found[name] = ids, log_p, agree(ids, targets).all(axis=1)
    (_, greedy_p, greedy), *_, (_, beam_p, best) = found.values()
    likelier = np.flatnonzero(beam_p > greedy_p + 1e-5)
    for k in [*likelier, 0, 1][:2]:
        print(f"    {text(cfg, source[k, ::-1 if cfg.reverse_source else 1], 0)}")
        for name, (ids, log_p, right) in found.items():
            wrong = "" if right[k] else "   (wrong)"
            print(f"        {name:8s}{log_p[k]:8.4f}  {text(cfg, ids[k], 1)}{wrong}")
    print(f"    {n} tokens: exact match {greedy.mean():.1%} by greedy decoding, {best.mean():.1%} "
          f"by a beam of {cfg.beam};\n    its output has a higher log-probability for "
          f"{len(likelier)} of 200 sources")
    return float(greedy.mean()), float(best.mean())


def heading(cfg, params):
    """What is learned, and the chance level."""
    _, (_, vocab), _, fewest, _ = PAIRS[cfg.pairs]
    size, reading = sum(p.size for p in params.values()), ("forwards", "backwards")
    print(f"{cfg.pairs}, sources of {fewest} to {cfg.length} tokens, read "
          f"{reading[cfg.reverse_source]}: hidden {cfg.hidden}, lr {cfg.lr},\nbatch size "
          f"{cfg.batch_size}, {size} parameters\nchance level: loss {math.log(len(vocab) - 2):.3f}")
    return size


def run_pairs(cfg):
    """Train; exact match by length; greedy decoding and beam search."""
    start, state, losses = time.perf_counter(), {}, []
    params = init_pairs(cfg, np.random.default_rng(cfg.seed))
    meta = dict(task=cfg.pairs, reverse_source=cfg.reverse_source)
    if cfg.load:
        load_checkpoint(cfg.load, meta, params, state, losses)
    if cfg.save:
        save_checkpoint(cfg.save, meta, params, state, losses, dry_run=True)
    size = heading(cfg, params)

    def note():
        if cfg.save:
            save_checkpoint(cfg.save, meta, params, state, losses)
        return ""

    def clipped_update(params, grads, state, lr):
        clip_norm(grads, cfg.grad_clip)
        adam_update(params, grads, state, lr)

    train(params, cfg, pairs_batch, sampled_loss_and_grads, state, losses, note, clipped_update)
    *_, fewest, more = PAIRS[cfg.pairs]
    lengths = range(fewest, cfg.length + 1)
    shares, _ = exact_by_length(params, cfg, lengths)
    exact = float(np.mean(shares))
    print(f"exact match: {exact:.2%} of held-out sources\n\n"
          "Exact match. Rows: tokens in the source")
    for n, share in zip(lengths, shares):
        print(f"{n:5d} |{'#' * round(50 * share):50s}| {share:.1%}")
    print("\nHeld-out sources, what is written, and the log-probability of it:")
    greedy, beam = show_search(params, cfg, cfg.length)
    if more:
        show_search(params, cfg, cfg.length + 1)
    print("\nNext: python seq2seq.py words --teacher-forcing 0.5      python seq2seq.py lengths")
    print_result(cfg.pairs, cfg, exact=exact, greedy=greedy, beam_exact=beam, params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- the bottleneck: python seq2seq.py lengths ---------------------------------------------------

@dataclass
class Lengths(Config):
    """Exact match by length, inside and beyond training; sources read forwards and backwards."""
    steps: int = 1100       # optimizer steps
    pairs: Literal["reverse", "letters", "words"] = "reverse"  # what is read and written


@dataclass
class Reverse(Letters):
    """Write letters in reverse order."""
    pairs = "reverse"


KINDS = {"reverse": Reverse, "letters": Letters, "words": Words}


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def padding_effect(params, batch, cfg):
    """The largest change of the loss or a gradient when five columns of padding are added, and the
    embedding of padding is another one."""
    longer = [np.pad(array, ((0, 0), (0, 5)), constant_values=PAD) for array in batch]
    other = {**params, "encoder.E": params["encoder.E"].copy()}
    other["encoder.E"][PAD] += 1
    loss, grads = loss_and_grads(params, batch, cfg)
    other_loss, other_grads = loss_and_grads(other, longer, cfg)
    changes = [np.abs(grads[name] - other_grads[name]).max() for name in grads]
    return max(abs(float(loss - other_loss)), float(max(changes)))


def run_lengths(cfg):
    """Train twice; where in the targets the mistakes are; a table."""
    start, rows, metrics = time.perf_counter(), [], {}
    common = {name: value for name, value in vars(cfg).items() if name != "pairs"}
    *_, fewest, more = PAIRS[cfg.pairs]
    lengths = range(fewest, cfg.length + more + 1)
    for reverse_source, reading in ((False, "forwards"), (True, "backwards")):
        kind = KINDS[cfg.pairs](reverse_source=reverse_source, **common)
        params = init_pairs(kind, np.random.default_rng(cfg.seed))
        heading(kind, params)
        losses = train(params, kind, pairs_batch, sampled_loss_and_grads)
        exact, shares = exact_by_length(params, kind, lengths)
        print("\nShare of right tokens. Columns: positions in the target; rows: tokens in the "
              f"source,\nread {reading}, in training {cfg.length} at most; blank is 0, @ is 1")
        for n, share in zip(lengths, shares):
            print(f"{n:5d} |{' '.join(shade(share))}|")
        print()
        rows.append((reading, [100 * x for x in exact]))
        metrics[reading] = float(np.mean(exact[:cfg.length + 1 - fewest]))
        if len(losses) < cfg.steps:                         # Ctrl-C
            break
    print("Exact match (%) by tokens in the source; right of the bar: more than in training")
    for name, cells in (("tokens", lengths), *rows):
        cells = [f"{x:6.3g}" for x in cells]
        cut = cfg.length + 1 - fewest
        print(f"{name:>10s} {''.join(cells[:cut])}  |{''.join(cells[cut:])}")
    source, inputs, targets, _ = pairs_batch(kind, 0)
    change = padding_effect(params, (source, inputs, targets), kind)
    print("\nFive more columns of padding, with another embedding, change the loss and all "
          f"gradients\nby {change:.0e} at most")
    print("\nNext: python seq2seq.py lengths --pairs words      python attention.py lengths")
    print_result("lengths", cfg, **metrics, padding=change,
                 seconds=time.perf_counter() - start)


# ---- checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, meta, params, state, losses, dry_run=False):
    """All that a training needs to go on, in one .npz file; written beside it, then renamed. meta:
    what must agree on loading. dry_run: only try whether it can be written.   Raises InputError."""
    require(not os.path.isdir(path), f"--save {path}", "a file", "a folder")
    check_finite(0.0, params)                           # never over a good one
    arrays = {f"params {name}": value for name, value in params.items()}
    arrays.update({f"state {name}": value for name, value in state.items()})
    beside = f"{path}.{os.getpid()}"
    try:
        with open(beside, "wb") as file:
            np.savez(file, meta=json.dumps(meta), losses=losses, **arrays)
        os.remove(beside) if dry_run else os.replace(beside, path)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            os.remove(beside)
        raise InputError(f"--save {path}: expected a file to write, found: {error}") from None


def read_checkpoint(path):
    """A file of save_checkpoint -> meta, losses, arrays by name.   Raises InputError."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
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


def lengths_fit(cfg):
    """The constraints on lengths."""
    *_, fewest, _ = PAIRS[cfg.pairs]
    most = 9 if cfg.pairs == "words" else 10 ** 6
    return [(fewest <= cfg.length <= most, "--length", f"{fewest} to {most}", cfg.length)]


def letters_and_words_fit(cfg):
    """The constraints on letters and words."""
    ratio = cfg.teacher_forcing
    return [*lengths_fit(cfg), (ratio <= 1, "--teacher-forcing", "at most 1", ratio)]


CONSTRAINTS = {Config: lambda cfg: [(cfg.length >= 2, "--length", "2 or more", cfg.length)],
               Letters: letters_and_words_fit, Words: letters_and_words_fit,
               Lengths: lengths_fit}

GRADCHECK = {"masked_lstm": lambda rng: dict(
    z=rng.standard_normal((5, 3, 24)), h0=rng.standard_normal((3, 6)),
    c0=rng.standard_normal((3, 6)), Wh=rng.standard_normal((6, 24)),
    mask=np.arange(5)[:, None, None] < np.array([5, 3, 2])[:, None])}

TASKS = {"reverse": Task(Config, init_params, make_batch, loss_and_grads, main),
         "letters": Task(Letters, init_pairs, pairs_batch, sampled_loss_and_grads, run_pairs),
         "words": Task(Words, init_pairs, pairs_batch, sampled_loss_and_grads, run_pairs),
         "lengths": Task(Lengths, None, None, None, run_lengths)}

if __name__ == "__main__":
    run(TASKS)
