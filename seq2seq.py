"""seq2seq.py: one sequence in, another out, of another length.

A recurrent net with one output per input writes before it has read everything. Two LSTMs need not:
the encoder reads the source; the decoder starts from the encoder's last state and writes the target
up to <eos>. So one state of fixed size has to hold the whole source. This is the bottleneck: after
a training on up to 12 letters, --length 12, only 55 % of those of 12 letters are written without a
mistake. In training the decoder's inputs are the tokens of the target, not its own outputs: teacher
forcing.

Forward, for a source x_1 .. x_S and a target y_1 .. y_T, with y_0 = <bos> and y_T = <eos>:
    h, c = encoder LSTM over x_1 .. x_S, from zeros; padding leaves h and c as they are
    h_t = decoder LSTM over y_0 .. y_{t-1}, from h, c         logits_t = h_t Wo + bo
    loss = mean of -log softmax(logits_t)[y_t] over the targets y_t that are not padding; count is
    their number
Backward (the LSTM is derived in lstm.py):
    dlogits_t = (softmax(logits_t) - onehot(y_t)) / count     dWo = sum_t h_t^T dlogits_t
    dh_t = dlogits_t Wo^T, then back through the decoder to its first state, which is the encoder's
    last one: the dh, dc that arrive there are all of the gradient that the encoder gets; at padding
    dz_t = 0, and dh, dc go on to the step before, unchanged

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


# ---- layers: N sequences or rows, T positions, D inputs, M outputs, H hidden units, V tokens -----

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
    tanh_c = np.tanh(c[1:])                                 # not used at padding: dz is 0 there
    # factors of all steps: dz_i = dc di, dz_f = dc df, dz_g = dc dg, dz_o = dh do, dc += dh to_c
    di, df = g * i * (1 - i), c[:-1] * f * (1 - f)
    dg, do = i * (1 - g ** 2), tanh_c * o * (1 - o)
    to_c = o * (1 - tanh_c ** 2)
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
    """dlogits = (p - onehot(targets)) / N: -log p_y changes with logit k by p_k - (k == y)."""
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
    T): the letters in reverse order, then EOS. Sequences whose ids sum to a multiple of 11 are held
    out: training draws only the others, tests only these. dtype is unused, as ids are integers."""
    rng = np.random.default_rng((cfg.seed, step))
    source = []
    for n in rng.integers(2, cfg.length + 1, cfg.batch_size):
        ids = rng.integers(3, len(VOCAB), n)
        while (ids.sum() % 11 == 0) != held_out:            # draw again
            ids = rng.integers(3, len(VOCAB), n)
        source.append(ids)
    inputs = [[BOS, *ids[::-1]] for ids in source]
    targets = [[*ids[::-1], EOS] for ids in source]
    return pad(source), pad(inputs), pad(targets)


def init_params(cfg, rng, dtype=np.float32, source_size=len(VOCAB), target_size=len(VOCAB)):
    """encoder.E, .Wx, .Wh, .b, the same of the decoder; Wo, bo. The variance of W (n, m) is 1 / n,
    that of E 1 / 4. Later parts have other vocabularies."""
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
    h0, c0 = state or np.zeros((2, N, len(Wh)), x.dtype)    # state is () or (h0, c0)
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
    """source (N, S), inputs (N, T) -> logits (count, V), a row for every input that is not padding:
    first those of all sequences at position 0, then at position 1, and so on."""
    (h_source, c), encoder = token_lstm_forward(params, "encoder", source)
    (h, _), decoder = token_lstm_forward(params, "decoder", inputs, (h_source[-1], c))
    real = inputs.T != PAD                                  # (T, N)
    logits, readout = linear_forward(h[real], params["Wo"], params["bo"])
    return logits, (encoder, decoder, readout, real, h_source.shape, h.shape)


def seq2seq_backward(dlogits, cache):
    """seq2seq_forward in reverse order -> gradients under the keys of params."""
    encoder, decoder, readout, real, source_shape, shape = cache
    drows, dWo, dbo = linear_backward(dlogits, readout)     # (count, H)
    dh = np.zeros(shape, dlogits.dtype)
    dh[real] = drows                                        # padding has no logits
    last_dc = np.zeros_like(dh[0])                          # no output depends on the last c
    grads, dh0, dc0 = token_lstm_backward(dh, last_dc, decoder)
    dh_source = np.zeros(source_shape, dlogits.dtype)
    dh_source[-1] = dh0                                     # no other h of the source is read
    encoder_grads, _, _ = token_lstm_backward(dh_source, dc0, encoder)
    return {**grads, **encoder_grads, "Wo": dWo, "bo": dbo}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    source, inputs, targets = batch
    logits, cache = seq2seq_forward(params, source, inputs)
    targets = targets.T[targets.T != PAD]                   # in the order of the rows of logits
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets)
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
        adam_update(params, grads, state, learning_rate(step, cfg))
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def decode_greedy(params, source, T):
    """source (N, S) -> ids (N, T): every token is the likeliest one after those before it."""
    (h, c), _ = token_lstm_forward(params, "encoder", source)
    ids = [np.full(len(source), BOS)]
    for _ in range(T):                                      # h: of the source, then of one token
        (h, c), _ = token_lstm_forward(params, "decoder", ids[-1][:, None], (h[-1], c))
        ids.append((h[-1] @ params["Wo"] + params["bo"]).argmax(axis=1))
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
    longer = replace(cfg, length=cfg.length + 4, batch_size=2000)
    source, _, targets = make_batch(longer, 0, held_out=True)
    written = decode_greedy(params, source, targets.shape[1])
    right = ((written == targets) | (targets == PAD)).all(axis=1)       # up to EOS
    n = (source != PAD).sum(axis=1)                         # letters of every source
    exact = float(right[n <= cfg.length].mean())
    check_finite(exact, params)
    for k in (2, cfg.length, cfg.length + 4):
        row = (n == k).argmax()                             # the first source of k letters
        read = "".join(VOCAB[i] for i in source[row, :k])
        wrote = "".join(VOCAB[i] for i in written[row, :k])
        print(f"reads {read:{cfg.length + 4}s}    writes {wrote}")
    print(f"exact match: {exact:.2%} of held-out sequences of 2 to {cfg.length} letters\n\n"
          f"Exact match. Rows: letters in the source; in training there were {cfg.length} at most")
    for k in np.unique(n):
        print(f"{k:5d} |{'#' * round(50 * right[n == k].mean()):50s}| {right[n == k].mean():.1%}")
    print("\nNext: python seq2seq.py lengths      python seq2seq.py words")
    print_result("reverse", cfg, exact=exact, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: beam search, scheduled sampling, letters, words, the bottleneck. ====

MORE = """
Break it (what to change, and what comes of it; exact match of the default run is 99.4 %)
    token_lstm_forward: mask = np.full((T, N, 1), True)
                                                19 %: the state runs on through the padding, of
                                                which the held-out batch has more
    seq2seq_forward: (0 * h_source[-1], 0 * c)  2 %: nothing comes from the source
    make_batch: return pad(source), pad(targets), pad(targets)
                                                0 %, at a loss of 0.0001: the decoder reads the very
                                                token that it has to write
    seq2seq_backward: 0 * dh_source             99.5 %: the gradient is wrong, but the encoder
                                                learns through dc0; so check gradients, not the loss
    ... and 0 * dc0 as well                     86 %: an encoder that is not trained at all still
                                                remembers some letters
    python seq2seq.py --hidden 32               94 %, 75 % of 6 letters (with 16: 82 %, 48 %)
    python seq2seq.py --length 12               91 %, 55 % of 12 letters
    python seq2seq.py words --teacher-forcing 0    100 %, as with teacher forcing: in such short
                                                targets few mistakes can add up

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Derive and add a second layer in both LSTMs (Sutskever had four). Is the bottleneck wider?
    2. Cho et al. 2014 give the encoder's last state to every step of the decoder, as a part of its
       input, beside x. Derive it, add it, compare main(Config(length=10)).
    3. Let the teacher forcing ratio fall from 1 to 0 in the course of the training, as Bengio et
       al. 2015 do. Is it better than a fixed one?

Papers of these parts: Bengio et al. 2015 (scheduled sampling), Wu et al. 2016 (beam search with a
length penalty).
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
    """source (N, S) -> ids (N, T) that beam_search finds, their log-probabilities (N,)."""
    (h, c), _ = token_lstm_forward(params, "encoder", source)

    def step(ids, state):
        (h, c), _ = token_lstm_forward(params, "decoder", ids[:, None], state)
        logits, _ = linear_forward(h[0], params["Wo"], params["bo"])
        return log_softmax(logits), [h[0], c]

    state = [np.repeat(array, beam, axis=0) for array in (h[-1], c)]    # (N K, H)
    return beam_search(step, state, len(source), limit, beam, length_penalty)


# ---- scheduled sampling: python seq2seq.py words --teacher-forcing 0.5 ---------------------------
# With teacher forcing the decoder is never trained on its own mistakes. Bengio et al. 2015 draw
# every input at random: the token of the target, or the one that the decoder would have written.

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
    """loss_and_grads of inputs that come from the target only where forced (N, T) is True."""
    source, inputs, targets, forced = batch
    if not forced.all():
        inputs = sampled_inputs(params, source, inputs, forced)
    return loss_and_grads(params, (source, inputs, targets), cfg)


# ---- letters and words: python seq2seq.py letters, python seq2seq.py words -----------------------
# A source that is read backwards ends with what is written first (Sutskever et al. 2014).

NUMBERS = [*VOCAB[:3], *map(str, range(26))]
DIGITS = [*VOCAB[:3], *"0123456789"]
WORDS = [*VOCAB[:3], *("zero one two three four five six seven eight nine ten eleven twelve "
                       "thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
                       "thirty forty fifty sixty seventy eighty ninety hundred thousand").split()]


def number_to_words(number):
    """407 -> ["four", "hundred", "seven"]."""
    if number < 20:
        return [WORDS[3 + number]]                          # WORDS[3] is zero
    if number < 100:
        unit, words = 10, [WORDS[21 + number // 10]]        # WORDS[23] is twenty
    else:
        unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
        words = [*number_to_words(number // unit), name]
    rest = number % unit
    return words + number_to_words(rest) if rest else words


def draw_letters(rng, n, held_out):
    """-> n ids of NUMBERS, and the same ids, of VOCAB. Held out as in make_batch."""
    while True:
        ids = rng.integers(3, len(VOCAB), n).tolist()
        if (sum(ids) % 11 == 0) == held_out:
            return ids, ids


def draw_number(rng, n, held_out):
    """A number of n digits -> its ids of DIGITS, of WORDS. Multiples of 11 from 100 on are held
    out; below 100 no number is."""
    least = 10 ** (n - 1) if n > 1 else 0
    while True:
        number = int(rng.integers(least, 10 ** n))
        if n < 3 or (number % 11 == 0) == held_out:
            source = [DIGITS.index(digit) for digit in str(number)]
            return source, [WORDS.index(word) for word in number_to_words(number)]


class PairTask(NamedTuple):
    """What differs between the tasks letters and words."""
    name: str
    draw: object            # (rng, n, held_out) -> ids of a source of n tokens, of its target
    fewest: int             # tokens of a source
    beyond: int             # tokens that tests have more than training
    source_vocab: list
    target_vocab: list
    source_gap: str         # what is printed between two tokens
    target_gap: str


@dataclass
class Letters(Config):
    """Translate 2 to 6 numbers from 0 to 25 into letters from a to z."""
    pairs = PairTask("letters", draw_letters, 2, 1, NUMBERS, VOCAB, " ", "")  # no type, so no flag
    length: int = 6         # most tokens of a source
    embed_dim: int = 64     # embedding dimension
    steps: int = 1200       # optimizer steps
    reverse_source: bool = True  # the encoder reads the source backwards
    teacher_forcing: float = 1.0  # teacher forcing ratio: share of inputs from the target
    beam: int = 4           # beam width: partial outputs kept at each step
    length_penalty: float = 0.7  # exponent of the length that log-probabilities are divided by


@dataclass
class Words(Letters):
    """Write a number of 1 to 6 digits in English: 407 is four hundred seven."""
    pairs = PairTask("words", draw_number, 1, 0, DIGITS, WORDS, "", " ")   # no million in training


def draw_pairs(cfg, rng, lengths, held_out):
    """Pairs with sources of these lengths -> source, inputs, targets, as of make_batch."""
    pairs = [cfg.pairs.draw(rng, n, held_out) for n in lengths]
    source = pad([ids[::-1] if cfg.reverse_source else ids for ids, _ in pairs])
    inputs = pad([[BOS, *ids] for _, ids in pairs])
    targets = pad([[*ids, EOS] for _, ids in pairs])
    return source, inputs, targets


def pairs_batch(cfg, step, dtype=np.float32):
    """-> draw_pairs of random lengths; forced (N, T): where the decoder reads the target."""
    rng = np.random.default_rng((cfg.seed, step))
    lengths = rng.integers(cfg.pairs.fewest, cfg.length + 1, cfg.batch_size)
    source, inputs, targets = draw_pairs(cfg, rng, lengths, held_out=False)
    forced = (rng.random(inputs.shape) < cfg.teacher_forcing) | (inputs == PAD)
    return source, inputs, targets, forced


def init_pairs(cfg, rng, dtype=np.float32):
    """init_params for the vocabularies of the task."""
    source_size, target_size = len(cfg.pairs.source_vocab), len(cfg.pairs.target_vocab)
    return init_params(cfg, rng, dtype, source_size, target_size)


def exact_match(written, targets):
    """-> (N,): does written (N, any length) begin with the targets (N, T), padding apart?"""
    T = targets.shape[1]
    written = np.pad(written, ((0, 0), (0, T)), constant_values=PAD)[:, :T]
    return ((written == targets) | (targets == PAD)).all(axis=1)


def show_text(label, ids, vocab, gap, note=""):
    """Print the tokens of ids before EOS, without padding."""
    ids = [*ids, EOS]
    text = gap.join(vocab[i] for i in ids[:ids.index(EOS)] if i != PAD)
    print(f"    {label:20s}{text}{note}")


def run_pairs(cfg):
    """Train; greedy decoding beside beam search on held-out sources of every length."""
    start, pairs = time.perf_counter(), cfg.pairs
    params = init_pairs(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"{pairs.name}, sources of {pairs.fewest} to {cfg.length} tokens, read "
          f"{'backwards' if cfg.reverse_source else 'forwards'}: hidden {cfg.hidden}, lr {cfg.lr},"
          f"\nbatch size {cfg.batch_size}, {size} parameters"
          f"\nchance level: loss {math.log(len(pairs.target_vocab) - 2):.3f}")
    losses = train(params, cfg, pairs_batch, sampled_loss_and_grads)
    print(f"\nExact match of 200 held-out sources per length (#: greedy decoding), with a beam of "
          f"{cfg.beam}, and\nfor how many sources the beam's output has the higher probability. "
          f"Rows: tokens in the source,\nin training {cfg.length} at most"
          + "; of numbers with 1 or 2 digits, none is held out" * (pairs.name == "words"))
    rng, greedy_exact, beam_exact = np.random.default_rng((cfg.seed, 10 ** 6)), [], []
    for n in range(pairs.fewest, cfg.length + 1 + pairs.beyond):
        source, _, targets = draw_pairs(cfg, rng, [n] * 200, held_out=True)
        limit = targets.shape[1] + 2
        greedy, greedy_log_p = decode_beam(params, source, limit, 1, cfg.length_penalty)
        best, best_log_p = decode_beam(params, source, limit, cfg.beam, cfg.length_penalty)
        right = exact_match(greedy, targets)
        greedy_exact.append(float(right.mean()))
        beam_exact.append(float(exact_match(best, targets).mean()))
        gain = best_log_p - greedy_log_p
        print(f"{n:5d} |{'#' * round(50 * greedy_exact[-1]):50s}| {greedy_exact[-1]:6.1%}   beam "
              f"{beam_exact[-1]:6.1%}   {(gain > 1e-5).sum():3d} of 200")
    trained = cfg.length + 1 - pairs.fewest                 # lengths of the training
    exact = float(np.mean(greedy_exact[:trained]))
    check_finite(exact, params)
    print("\nThe longest sources for which the beam gains most, with log-probabilities:")
    for k in np.argsort(-gain, kind="stable")[:2]:
        read = source[k, ::-1] if cfg.reverse_source else source[k]
        show_text("source", read, pairs.source_vocab, pairs.source_gap)
        for name, ids, log_p in (("greedy", greedy, greedy_log_p), ("beam", best, best_log_p)):
            wrong = "" if exact_match(ids, targets)[k] else "   (wrong)"
            show_text(f"{name:8s}{log_p[k]:8.4f}", ids[k], pairs.target_vocab, pairs.target_gap,
                      wrong)
    print("\nNext: python seq2seq.py words --teacher-forcing 0.5      python seq2seq.py lengths")
    print_result(pairs.name, cfg, exact=exact, beam_exact=float(np.mean(beam_exact[:trained])),
                 params=size, steps=len(losses), seconds=time.perf_counter() - start)


# ---- the bottleneck: python seq2seq.py lengths ---------------------------------------------------

@dataclass
class Lengths(Config):
    """Exact match by length, inside and beyond training; sources read forwards and backwards."""
    steps: int = 1100       # optimizer steps


def backwards_batch(cfg, step, dtype=np.float32, held_out=False):
    """make_batch with every source reversed: now what is read first has to be written first."""
    source, inputs, targets = make_batch(cfg, step, dtype, held_out)
    return pad([ids[ids != PAD][::-1] for ids in source]), inputs, targets


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
    start, table, metrics = time.perf_counter(), {}, {}
    longer = replace(cfg, length=cfg.length + 4, batch_size=2000)
    for reading, draw_batch in (("forwards", make_batch), ("backwards", backwards_batch)):
        params = init_params(cfg, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"Reverse 2 to {cfg.length} letters, read {reading}: {size} parameters\n"
              f"chance level: loss {math.log(27):.3f}")
        losses = train(params, cfg, draw_batch)
        source, _, targets = draw_batch(longer, 0, held_out=True)
        right = decode_greedy(params, source, targets.shape[1]) == targets
        n = (source != PAD).sum(axis=1)
        print("\nShare of right tokens. Columns: positions in the target; rows: letters in the "
              f"source,\nread {reading}, in training {cfg.length} at most; blank is 0, @ is 1")
        table[reading] = []
        for k in np.unique(n):
            rows = right[n == k, :k + 1]                    # k letters and EOS
            print(f"{k:5d} |{' '.join(shade(rows.mean(axis=0)))}|")
            table[reading].append(100 * rows.all(axis=1).mean())
        print()
        metrics[reading] = float(np.mean(table[reading][:cfg.length - 1])) / 100
        check_finite(metrics[reading], params)
        if len(losses) < cfg.steps:                         # Ctrl-C
            break
    print("Exact match (%) by letters in the source; right of the bar: more than in training")
    for name, cells in (("letters", np.unique(n)), *table.items()):
        cells = [f"{x:6.3g}" for x in cells]
        print(f"{name:>10s}{''.join(cells[:cfg.length - 1])}  |{''.join(cells[cfg.length - 1:])}")
    change = padding_effect(params, make_batch(cfg, 0), cfg)
    print("\nFive more columns of padding, with another embedding, change the loss and all "
          f"gradients\nby {change:.0e} at most")
    print("\nNext: python seq2seq.py lengths --hidden 256      python attention.py lengths")
    print_result("lengths", cfg, **metrics, padding=change, params=size, steps=len(losses),
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


def length_limits(cfg):
    """Constraints on the length of sources and on the teacher forcing ratio."""
    rows = [(cfg.length >= 2, "--length", "2 or more", cfg.length)]
    if isinstance(cfg, Letters):
        ratio = cfg.teacher_forcing
        rows.append((ratio <= 1, "--teacher-forcing", "at most 1", ratio))
    if isinstance(cfg, Words):
        rows.append((cfg.length <= 6, "--length", "at most 6", cfg.length))
    return rows


CONSTRAINTS = dict.fromkeys((Config, Letters, Words, Lengths), length_limits)

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
