# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""vanilla_rnn.py: a network that reads one thing after another, and the chain rule through time.

A layer sees its input once and forgets it. Give it its own last output as a second input, and it has a state: h_t is
what the network has made of everything up to t, and the same three arrays Wx, Wh, b serve at every step, however long
the sequence (Elman 1990). To train it, unroll it: T steps are T layers that share their weights. So run backward from
the last to the first, and add up what every step says about the shared weights (Werbos 1990).

Forward, step by step:        h_t = tanh(x_t Wx + h_{t-1} Wh + b)        y_t = h_t Wo + bo
Backward, from the last step to the first. h_t is used twice, by y_t and by step t + 1, so two gradients add:
    dh_t = dy_t Wo^T + dz_{t+1} Wh^T        dz_t = dh_t (1 - h_t^2)      slope of the tanh
    dWh = sum_t h_{t-1}^T dz_t              dWx = sum_t x_t^T dz_t       db = sum_t dz_t
The way back from step T to step 1 goes T times through Wh^T and the slopes. If Wh makes vectors larger (its spectral
radius, the largest |eigenvalue|, is above 1) the gradient can explode; if it makes them smaller, the gradient vanishes,
and with it all hope of learning what step 1 has to do with step T (Bengio 1994, Pascanu 2013). The cures here:
    clipping     a gradient larger than a limit is scaled down (by norm) or cut off entry by entry (by value)
    truncation   a long sequence is cut into windows; the state goes on from window to window, the gradient does not

Run
    python vanilla_rnn.py                                    wave and recall, exploding gradients and what helps
    python vanilla_rnn.py --task wave --window 10            gradients go back 10 steps at most
    python vanilla_rnn.py --task recall --window 5           seldom as far as the pattern: 87 % of the bits, not 100
    python vanilla_rnn.py --task recall --radius 0.5         a state that fades
    python vanilla_rnn.py --task text                        a nursery rhyme, letter by letter
    python vanilla_rnn.py --task text --data tinyshakespeare.txt --save rnn.npz     1.60 nats a letter or less
        curl -o tinyshakespeare.txt \\
            https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt

Break it
    --task wave --optimizer sgd --lr 0.4 --schedule constant --radius 1.2 --clip 0: the loss overflows by step 60
    --task recall --window 1: 55 % of the bits, hardly more than guessing; no gradient ever reaches the pattern
    --task recall --radius 0: 94 %, and 50 % when the wait is twice as long; a state that begins by forgetting all
    1 - h[1:] * h[1:] -> np.ones_like(h[1:]) in rnn_backward, --task wave: 1.65, where saying 0 has 0.28
    dz[t] @ WhT -> 0 in rnn_backward (twice), --task recall: 65 %; --task wave: left alone, 0.06 instead of 0.003

Papers: Werbos 1990 (backpropagation through time); Elman 1990 (the network); Bengio, Simard, Frasconi 1994 and Pascanu,
Mikolov, Bengio 2013 (vanishing, exploding, clipping); Williams, Peng 1990 (truncation).
"""
import argparse
import contextlib
import ctypes
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np


@dataclass
class Config:
    """Hyperparameters. Edit a line, or pass its name as a flag: --lr 0.1"""
    task: Literal["demo", "wave", "recall", "text"] = "demo"  # what to learn; demo is the first two
    hidden: int = 64        # size of the state
    radius: float = 1.0     # spectral radius of Wh at the start
    embed: int = 32         # text: numbers that stand for a letter
    length: int = 100       # wave: steps
    bits: int = 4           # recall: length of the pattern
    delay: int = 20         # recall: longest wait before it is asked for
    window: int = 0         # steps that a gradient goes back; 0: all (text: 64, since a text has no end)
    clip: float = 1.0       # largest gradient; 0: any
    clip_by: Literal["norm", "value"] = "norm"  # of all together, or of every entry
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd shows what clipping is for
    lr: float = 0.005       # learning rate at its height
    decay: float = 0.0      # adamw: share of every matrix that is taken off, times lr
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # course of the learning rate
    warmup: int = 50        # steps in which it rises from 0
    steps: int = 600        # sequences a reader gets to see; in a text, windows
    batch: int = 64         # readers, each with a sequence of its own
    temperature: float = 0.7  # text: of the samples; small is careful, large is wild
    data: str = ""          # text: a file in UTF-8 (none: a nursery rhyme)
    save: str = ""          # file (.npz) to keep parameters and state of the training in
    load: str = ""          # such a file to go on from
    seed: int = 0           # of every random draw

    def __post_init__(self):
        for name in ("hidden", "embed", "length", "bits", "delay", "steps", "batch"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("radius", "window", "clip", "decay", "warmup", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        for name in ("lr", "temperature"):
            require(0 < getattr(self, name) < math.inf, "--" + name, "a number above 0", getattr(self, name))
        require(self.length >= 2, "--length", "2 or more", self.length)
        require(not self.data or self.task == "text", "--data", "--task text with it", self.task)
        for name in ("save", "load"):
            require(not getattr(self, name) or self.task != "demo", "--" + name, "a --task with it", self.task)
        self.window = self.window or (64 if self.task == "text" else 0)


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "recall": dict(steps=1000),
    "text": dict(hidden=128, lr=0.01, steps=400, batch=16, clip=5.0),
    "text --data": dict(hidden=512, embed=64, lr=0.003, decay=0.01, steps=2000, batch=64, clip=5.0),
}


# ---- layers: T steps, N sequences, D inputs, H hidden, M outputs, V letters ------------------------------------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, K), b (K,) -> y (N, K)."""
    y = x @ W
    y += b
    return y, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   dout (N, K) -> dx (N, D), dW (D, K), db (K,)."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)     # b was broadcast over N, so sum over N


def embedding_forward(ids, E):
    """The row of E that each number names.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """A row of E gets the sum of dout over the places where it stands: a product with a (V, places) table of 0, 1."""
    ids, shape = cache
    stands = np.arange(shape[0])[:, None] == ids.ravel()
    return stands.astype(dout.dtype) @ dout.reshape(-1, shape[1])


def rnn_forward(z, h0, Wh, mask=None):
    """h_t = tanh(z_t + h_{t-1} Wh); where mask is false (padding) the state stays.
    z = x Wx + b (T, N, H), h0 (N, H), Wh (H, H), mask (T, N, 1) -> h (T, N, H)."""
    h = np.empty((len(z) + 1, *h0.shape), z.dtype)
    h[0] = h0
    for t in range(len(z)):
        np.tanh(z[t] + h[t] @ Wh, out=h[t + 1])
        if mask is not None:
            h[t + 1] = np.where(mask[t], h[t + 1], h[t])
    return h[1:], (h, Wh, mask)


def rnn_backward(dout, cache):
    """dz_t = dh_t (1 - h_t^2), dh_{t-1} = dout_{t-1} + dz_t Wh^T, dWh = sum_t h_{t-1}^T dz_t.   -> dz, dh0, dWh."""
    h, Wh, mask = cache
    dz = 1 - h[1:] * h[1:]
    dh, WhT = 0, Wh.T.copy()                            # the products in the loop read it row by row
    for t in reversed(range(len(dz))):
        dh = dout[t] + dh
        dz[t] *= dh
        if mask is None:
            dh = dz[t] @ WhT
        else:                                           # padding: the gradient goes past the step, as the state did
            dz[t] *= mask[t]
            dh = dz[t] @ WhT + np.where(mask[t], 0, dh)
    H = len(Wh)
    return dz, dh, h[:-1].reshape(-1, H).T @ dz.reshape(-1, H)


def mse_forward(z, targets):
    """mean[(z - y)^2].   z (N, K), targets (N, K) -> scalar."""
    return ((z - targets) ** 2).mean(), (z, targets)


def mse_backward(dout, cache):
    """dz = 2 (z - y) / size.   dout scalar -> dz (N, K)."""
    z, targets = cache
    return (z - targets) * (2 * dout / z.size)


def sigmoid(z):
    """1 / (1 + e^-z), written with tanh, which cannot overflow."""
    return 0.5 * np.tanh(0.5 * z) + 0.5


def binary_cross_entropy_forward(z, targets):
    """mean[log(1 + e^z) - y z], cross-entropy of y and sigmoid(z).   z (N, K), targets (N, K) of 0 or 1 -> scalar."""
    return (np.logaddexp(0, z) - targets * z).mean(), (z, targets)


def binary_cross_entropy_backward(dout, cache):
    """dz = (sigmoid(z) - y) / size.   dout scalar -> dz (N, K)."""
    z, targets = cache
    return (sigmoid(z) - targets) * (dout / z.size)     # the mean is over all N K entries


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


# ---- model: input projection, recurrence, output layer ---------------------------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """E for letters; Wx, Wh, b; Wo, bo. Wh is a random rotation times radius: it makes no direction special."""
    H, params = cfg.hidden, {}
    D, M = {"recall": (2, 1), "text": (cfg.embed, 0)}.get(cfg.task, (1, 1))
    if cfg.task == "text":
        M = vocabulary_size(cfg)
        params["E"] = 0.5 * rng.standard_normal((M, D))
    params["Wx"] = rng.standard_normal((D, H)) * D ** -0.5
    params["Wh"] = cfg.radius * np.linalg.qr(rng.standard_normal((H, H)))[0]
    params["b"] = np.zeros(H)
    params["Wo"], params["bo"] = rng.standard_normal((H, M)) * H ** -0.5, np.zeros(M)
    return {name: value.astype(dtype) for name, value in params.items()}


def vanilla_forward(params, x, mask, h0, cfg):
    """x (T, N) letters or (T, N, D) numbers, mask (T, N, 1) or None, h0 (N, H) -> (y (T, N, M), last h), cache."""
    if "E" in params:                                   # V rows x Wx + b, then a look-up, instead of T N rows
        table, project_cache = linear_forward(params["E"], params["Wx"], params["b"])
        z, look_cache = embedding_forward(x, table)
    else:                                               # what does not depend on h is one product for all steps
        z, project_cache = linear_forward(x.reshape(-1, x.shape[2]), params["Wx"], params["b"])
        z, look_cache = z.reshape(*x.shape[:2], -1), None
    h, rnn_cache = rnn_forward(z, h0, params["Wh"], mask)
    y, out_cache = linear_forward(h.reshape(-1, cfg.hidden), params["Wo"], params["bo"])
    return (y.reshape(*x.shape[:2], -1), h[-1]), (project_cache, look_cache, rnn_cache, out_cache)


def vanilla_backward(dy, cache):
    """vanilla_forward from bottom to top -> gradients under the keys of params."""
    (project_cache, look_cache, rnn_cache, out_cache), grads = cache, {}
    dh, grads["Wo"], grads["bo"] = linear_backward(dy.reshape(-1, dy.shape[2]), out_cache)
    dz, _, grads["Wh"] = rnn_backward(dh.reshape(*dy.shape[:2], -1), rnn_cache)
    if look_cache is not None:
        dtable = embedding_backward(dz, look_cache)
        grads["E"], grads["Wx"], grads["b"] = linear_backward(dtable, project_cache)
    else:
        _, grads["Wx"], grads["b"] = linear_backward(dz.reshape(-1, dz.shape[2]), project_cache)
    return grads


LOSSES_OF = {"recall": (binary_cross_entropy_forward, binary_cross_entropy_backward),
             "text": (softmax_cross_entropy_forward, softmax_cross_entropy_backward)}


def loss_and_grads(params, batch, cfg, state=None):
    """One forward and one backward pass -> loss, gradients under the keys of params. The loss counts where batch says.
    state, a list of h: where the batch begins; it gets where the batch ends, and no gradient goes back over that."""
    x, mask, places, targets = batch
    h0 = state[0] if state else np.zeros((x.shape[1], cfg.hidden), params["bo"].dtype)
    (y, last), cache = vanilla_forward(params, x, mask, h0, cfg)
    if state is not None:
        state[:] = [last]
    loss_forward, loss_backward = LOSSES_OF.get(cfg.task, (mse_forward, mse_backward))
    rows = y.reshape(-1, y.shape[2])[places]
    loss, loss_cache = loss_forward(rows, targets)
    dy = np.zeros_like(y)
    dy.reshape(-1, y.shape[2])[places] = loss_backward(1.0, loss_cache)     # elsewhere the output does not matter
    return loss, vanilla_backward(dy, cache)


def sgd_update(params, grads, state, lr):
    """w <- w - lr g."""
    for name, g in grads.items():
        params[name] -= lr * g


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


def adamw_update(params, grads, state, lr, decay=0.01):
    """Adam, and every matrix shrinks by lr decay, whatever its gradient was."""
    for W in params.values():
        if W.ndim > 1:
            W *= 1 - lr * decay
    adam_update(params, grads, state, lr)


def learning_rate(step, cfg):
    """lr at a step: up from 0 in warmup steps; then constant, or a tenth from 60 % and a hundredth from 85 % on (step),
    or down a half cosine to 0."""
    rise, done = min(1, step / max(cfg.warmup, 1)), step / cfg.steps
    course = {"constant": 1, "step": 1 if done < 0.6 else 0.1 if done < 0.85 else 0.01,
              "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return cfg.lr * rise * course[cfg.schedule]


def clip_norm(grads, limit):
    """Scale all gradients so that their common norm is at most limit (Pascanu 2013) -> the norm before."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    if norm > limit > 0:
        for g in grads.values():
            g *= limit / norm
    return norm


def clip_value(grads, limit):
    """Cut every entry of every gradient to -limit .. limit -> the largest |entry| before."""
    largest = max(float(np.abs(g).max()) for g in grads.values())
    if largest > limit > 0:
        for g in grads.values():
            np.clip(g, -limit, limit, out=g)
    return largest


# ---- data ------------------------------------------------------------------------------------------------------------

VERSES = ["the house that Jack built.", "the malt\nThat lay in", "the rat,\nThat ate", "the cat,\nThat killed",
          "the dog,\nThat worried", "the cow with the crumpled horn,\nThat tossed",
          "the maiden all forlorn,\nThat milked", "the man all tattered and torn,\nThat kissed",
          "the priest all shaven and shorn,\nThat married"]
RHYME = "\n" + "\n\n".join("This is " + " ".join(VERSES[n::-1]) for n in range(len(VERSES))) + "\n"


def make_batch(cfg, rng, dtype=np.float32, step=None):
    """-> x (T, N) or (T, N, D), mask (T, N, 1) or None, places that count (numbers t N + n), their targets.
    wave: two sines, amplitudes and phases drawn; what is the next value?    text: the next letter, everywhere.
    recall: a pattern of bits, a wait (its length drawn for each sequence), then a cue: which bits were it?"""
    N = cfg.batch
    if cfg.task == "text":
        ids = load_text(cfg.data, cfg.load)["train"]
        stream, width = len(ids) // N, min(cfg.window, len(ids) // N - 1)
        start = rng.integers(0, stream - width, N) if step is None else (step - 1) * width % (stream - width)
        at = np.arange(width + 1)[:, None] + np.arange(N) * stream + start  # N readers, each in its part of the text
        return ids[at[:-1]], None, np.arange(width * N), ids[at[1:]].ravel()
    if cfg.task == "recall":
        B, T = cfg.bits, 2 * cfg.bits + cfg.delay
        bits, t = rng.integers(0, 2, (B, N)), np.arange(T)[:, None]
        cue = B + rng.integers(1, cfg.delay + 1, N)     # when it is asked for
        asked = (t >= cue) & (t < cue + B)
        shown = np.where(t < B, 2 * bits[np.minimum(t, B - 1), np.arange(N)] - 1, 0)
        answer = bits[np.clip(t - cue, 0, B - 1), np.arange(N)]
        x = np.stack([shown, asked], axis=2).astype(dtype)
        return x, (t < cue + B)[:, :, None], np.flatnonzero(asked), answer[asked][:, None].astype(dtype)
    t = np.arange(cfg.length + 1)[:, None]
    amplitude, phase = rng.uniform(0.2, 0.8, (2, N)), rng.uniform(0, 2 * np.pi, (2, N))
    wave = sum(a * np.sin(2 * np.pi * t / period + p) for a, p, period in zip(amplitude, phase, (25, 9.2)))
    return wave[:-1, :, None].astype(dtype), None, np.arange(cfg.length * N), wave[1:].reshape(-1, 1).astype(dtype)


def windows(batch, steps):
    """The batch, cut into pieces of so many steps; those in which nothing counts have no targets."""
    x, mask, places, targets = batch
    T, N = x.shape[:2]
    for t in range(0, T, steps or T):
        here = (places >= t * N) & (places < (t + (steps or T)) * N)
        part = slice(t, t + (steps or T))
        yield x[part], mask if mask is None else mask[part], places[here] - t * N, targets[here]


@functools.lru_cache
def load_text(path, checkpoint=""):
    """A text as numbers -> {"chars": ..., "train": its first nine tenths, "validation": the last tenth}. The numbers
    stand for the text's own characters or, with a checkpoint, for those that it was trained on."""
    text = read_text(path) if path else RHYME
    require(len(text) >= 1000, f"--data {path}", "1000 characters or more", len(text))
    about = read_checkpoint(checkpoint)[0] if checkpoint else {"chars": "".join(sorted(set(text)))}
    require("chars" in about, f"--load {checkpoint}", "a training on text", f"task {about.get('task')}")
    chars = about["chars"]
    strange = "".join(sorted(set(text) - set(chars)))
    require(not strange, f"--load {checkpoint}", "a text of the characters it was trained on", strange[:10])
    index = {c: i for i, c in enumerate(chars)}
    ids, cut = np.array([index[c] for c in text]), len(text) * 9 // 10
    return {"chars": chars, "train": ids[:cut], "validation": ids[cut:]}


def vocabulary_size(cfg):
    """Number of symbols."""
    return len(load_text(cfg.data, cfg.load)["chars"]) if cfg.task == "text" else 10


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        require(False, path, "text in UTF-8", f"byte {error.object[error.start]:#x} at {error.start}")
    except OSError as error:
        require(False, path, "a text file", error.strerror)
    require(text.strip(), path, "some text", "an empty file")
    return text


# ---- pictures in text ------------------------------------------------------------------------------------------------

SHADES = np.array(list(" .:-=+*#%@"))


def shade(values):
    """Numbers from 0 to 1 -> characters from blank to dark, in an array of the same shape."""
    return SHADES[(np.clip(values, 0, 1) * 9.99).astype(int)]


def loss_curve(losses, width=60):
    """The losses from first to last in one line of text, dark where high (the scale is logarithmic)."""
    means = np.log([np.mean(part) + 1e-12 for part in np.array_split(losses, min(width, len(losses)))])
    return "".join(shade((means - means.min()) / (np.ptp(means) + 1e-12)))


def draw_wave(true, said, rows=9):
    """Two curves over time, one character a step: . the true one, o the other, both @."""
    grid, scale = np.full((rows, len(true)), " "), max(np.abs(true).max(), 1e-9)
    for values, mark in ((true, "."), (said, "o")):
        row = np.clip(np.rint((1 - values / scale) * (rows - 1) / 2), 0, rows - 1).astype(int)
        there = grid[row, np.arange(len(true))]
        grid[row, np.arange(len(true))] = np.where((there != " ") & (there != mark), "@", mark)
    return ["|" + "".join(row) + "|" for row in grid]


# ---- training and demo -----------------------------------------------------------------------------------------------

def train_rnn(cfg, rng, progress=None):
    """-> params, progress, size of the gradient before every update (as clip_by measures it). A sequence is read window
    by window, with an update after each; the state goes on from one to the next. In a text, it goes on for ever."""
    params, optimizer, state, first = init_params(cfg, rng), {}, [], 0
    about = dict(task=cfg.task)
    if cfg.task == "text":
        text = load_text(cfg.data, cfg.load)
        longest = len(text["train"]) // 3
        require(cfg.batch <= longest, "--batch", f"at most {longest} for this text", cfg.batch)
        about["chars"] = text["chars"]
    parts = {"params": params, "adam": optimizer, "state": {}}
    if cfg.load:
        first = load_checkpoint(cfg.load, rng, about, parts)
        h = parts["state"].get("h")
        if h is not None and h.shape == (cfg.batch, cfg.hidden):            # else --batch is another: begin with zeros
            state = [h]
    if cfg.save:
        save_checkpoint(cfg.save, first, rng, about, parts, trial=True)    # before the work, not after it
    progress, sizes = progress or Progress(cfg.steps, first + 1), []
    clip = {"norm": clip_norm, "value": clip_value}[cfg.clip_by]
    for step in progress:
        losses = []
        if cfg.task != "text" or not state:
            state = [np.zeros((cfg.batch, cfg.hidden), np.float32)]
        for part in windows(make_batch(cfg, rng, step=step), cfg.window):
            if not len(part[2]):                        # nothing counts here: no gradient, but the state goes on
                state = [vanilla_forward(params, *part[:2], *state, cfg)[0][1]]
                continue
            loss, grads = loss_and_grads(params, part, cfg, state)
            losses.append(float(loss))
            sizes.append(clip(grads, cfg.clip))
            if cfg.optimizer == "sgd":
                sgd_update(params, grads, optimizer, learning_rate(step, cfg))
            else:
                adamw_update(params, grads, optimizer, learning_rate(step, cfg), cfg.decay)
        progress.report(np.mean(losses), lambda: f"  gradient {cfg.clip_by} {sizes[-1]:.2g}")
        if cfg.save and (step % 1000 == 0 or step == cfg.steps or progress.stopped):
            parts["state"] = {"h": state[0]} if cfg.task == "text" else {}
            save_checkpoint(cfg.save, step, rng, about, parts)
    return params, progress, np.array(sizes)


def answers(params, cfg, seed=1000):
    """What the network says on 1000 fresh sequences, where it counts -> (answers, targets)."""
    x, mask, places, targets = make_batch(replace(cfg, batch=1000), np.random.default_rng(seed))
    (y, _), _ = vanilla_forward(params, x, mask, np.zeros((1000, cfg.hidden), np.float32), cfg)
    return y.reshape(-1, 1)[places], targets


def announce_rnn(cfg, text, chance):
    """What is being learned, and by what."""
    size = sum(p.size for p in init_params(cfg, np.random.default_rng(0)).values())
    window = f"gradients go back {cfg.window} steps" if cfg.window else "gradients go all the way back"
    print(f"\n{text}: hidden {cfg.hidden}, radius {cfg.radius}, {window}, {cfg.optimizer}, lr {cfg.lr}, "
          f"batch {cfg.batch}, {size} parameters")
    print(f"chance level: {chance}")


def announce_clipping(cfg, sizes):
    """How often the gradient was too large, and how large."""
    if len(sizes):
        acted = "never" if not cfg.clip or sizes.max() <= cfg.clip else f"in {(sizes > cfg.clip).sum()}"
        print(f"gradient, by {cfg.clip_by}: median {np.median(sizes):.2g}, largest {sizes.max():.2g}; "
              f"clipped to {cfg.clip:g} {acted} of {len(sizes)} updates")


def show_radius(cfg, rng, T=50):
    """The norm of a gradient on its way back through time, for several spectral radii of Wh."""
    print(f"A gradient of norm 1 at step {T}, on its way back to step 1 (untrained, hidden {cfg.hidden}):")
    for radius in (0.5, 0.9, 1.0, 1.1, 1.5):
        part = replace(cfg, task="wave", radius=radius)
        params = init_params(part, rng, np.float64)
        z = 0.1 * rng.standard_normal((T, cfg.batch, cfg.hidden))
        _, cache = rnn_forward(z, np.zeros(z.shape[1:]), params["Wh"])
        dh = np.zeros(z.shape)
        dh[-1] = rng.standard_normal(dh[-1].shape)
        norm = np.linalg.norm(rnn_backward(dh, cache)[0], axis=(1, 2))
        norm /= norm[-1]
        picture = "".join(shade(0.5 + np.log10(norm + 1e-30) / 8))
        print(f"  spectral radius {radius}   step 1 |{picture}| step {T}   at step 1: {norm[0]:.0e}")
    print("  (the middle shade is 1, each shade more or less: six times more or less; slopes of the tanh are below 1,")
    print("  so a radius a little above 1 does not explode yet)")


def show_clipping(cfg, rng):
    """The same training by plain gradient descent without clipping, and clipped in both ways -> figures, stopped?"""
    cfg = replace(cfg, task="wave", optimizer="sgd", lr=0.4, schedule="constant", radius=1.2, steps=200)
    print(f"\nThe wave by plain gradient descent, lr {cfg.lr}, radius {cfg.radius}, without clipping and with it:")
    columns, seed = [], rng.integers(1 << 30)
    for clip, by in ((0.0, "norm"), (1.0, "norm"), (0.05, "value")):
        part, progress = replace(cfg, clip=clip, clip_by=by), Progress(cfg.steps, quiet=True)
        with contextlib.suppress(FloatingPointError):   # what diverges is what is to be seen
            train_rnn(part, np.random.default_rng(seed), progress)
        if progress.stopped:
            return {}, True
        columns.append(progress.losses)
    print(f"{'loss at step':>16s} {'no clipping':>14s} {'norm <= 1':>14s} {'values <= .05':>14s}")
    for step in (1, 10, 20, 30, 40, 50, 60, 80, 100, cfg.steps):
        cells = [f"{c[step - 1]:.3g}" if step <= len(c) else "gone" for c in columns]
        print(f"{step:16d} {cells[0]:>14s} {cells[1]:>14s} {cells[2]:>14s}")
    if len(columns[0]) < cfg.steps:
        print(f"  without clipping, the loss overflows at step {len(columns[0]) + 1}")
    return {"unclipped_steps": len(columns[0]), "clipped_loss": columns[1][-1], "value_loss": columns[2][-1]}, False


def learn_wave(cfg, rng):
    """The next value of a sum of two sines; then the wave goes on by itself, each answer the next input."""
    announce_rnn(cfg, f"The next value of a wave, {cfg.length} steps", "loss 0.280 (saying 0)")
    params, progress, sizes = train_rnn(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    announce_clipping(cfg, sizes)
    said, true = answers(params, cfg)
    mse = float(((said - true) ** 2).mean())
    x = make_batch(cfg, np.random.default_rng(1000))[0].reshape(-1, cfg.batch)
    now, following = x[:-1].ravel(), x[1:].ravel()
    last_value = float(((following - now * (now @ following) / (now @ now)) ** 2).mean())
    print(f"mean squared error on 1000 fresh waves: {mse:.5f}   (guessed from the last value alone: {last_value:.5f})")
    far = replace(cfg, batch=100, length=cfg.length + 60)
    x = make_batch(far, np.random.default_rng(1001))[0]
    (y, h), _ = vanilla_forward(params, x[:cfg.length], None, np.zeros((100, cfg.hidden), np.float32), cfg)
    own = [y[-1:]]
    while len(own) < 60:
        (y, h), _ = vanilla_forward(params, own[-1], None, h, cfg)
        own.append(y)
    own, true = np.concatenate(own)[:, :, 0], x[cfg.length:, :, 0]
    own_mse = float(((own - true) ** 2).mean())
    print(f"Left alone after {cfg.length} steps, it goes on with its own answers (mean squared error {own_mse:.3f}).")
    print("The first of 100 waves, 60 steps on: . the true one, o the network's, @ both")
    print("\n".join(draw_wave(true[:, 0], own[:, 0])))
    return {"mse": mse, "own_mse": own_mse}, params, progress


def learn_bits(cfg, rng):
    """Bits, a wait, then say them; with shorter windows and longer waits beside it."""
    announce_rnn(cfg, f"Recall {cfg.bits} bits after a wait of 1 to {cfg.delay} steps", "loss 0.693, 50 % of the bits")
    params, progress, sizes = train_rnn(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    announce_clipping(cfg, sizes)

    def share(params, cfg):
        said, true = answers(params, cfg)
        return float(((said > 0) == (true > 0.5)).mean())
    figures = {"bits": share(params, cfg)}
    print(f"{figures['bits']:.1%} of the bits of 1000 fresh patterns are right. The same training with other settings:")
    print(f"{'longest wait':>16s} {'gradients go back':>18s} {'bits right':>11s}")
    print(f"{cfg.delay:16d} {cfg.window or 'all the way':>18} {figures['bits']:11.1%}")
    for delay, window in ((cfg.delay, max(1, cfg.delay // 4)), (2 * cfg.delay, 0)):
        part = replace(cfg, delay=delay, window=window, save="", load="")
        if not progress.stopped:
            found = share(train_rnn(part, rng, Progress(cfg.steps, quiet=True))[0], part)
            figures["bits_cut" if window else "bits_twice"] = found
            print(f"{delay:16d} {window or 'all the way':>18} {found:11.1%}")
    return figures, params, progress


def heldout_loss(params, cfg):
    """Cross-entropy on the last tenth of the text, nats a letter, read by several readers with their states carried."""
    ids = load_text(cfg.data, cfg.load)["validation"]
    N = max(1, min(20, len(ids) // 200))
    stream = len(ids) // N
    parts, h, total, count = ids[:N * stream].reshape(N, stream).T, np.zeros((N, cfg.hidden), np.float32), 0.0, 0
    for start in range(0, stream - 1, 100):
        part = parts[start:start + 101]
        (y, h), _ = vanilla_forward(params, part[:-1], None, h, cfg)
        rows = y.reshape(-1, y.shape[2])
        total += float(softmax_cross_entropy_forward(rows, part[1:].ravel())[0]) * len(rows)
        count += len(rows)
    return total / count


def learn_text_plain(cfg, rng):
    """The next letter of a text."""
    data = load_text(cfg.data, cfg.load)
    V = len(data["chars"])
    announce_rnn(cfg, f"Text, {len(data['train'])} letters of {V} kinds", f"loss {math.log(V):.3f}")
    params, progress, sizes = train_rnn(cfg, rng)
    print("loss", loss_curve(progress.losses or [0]))
    announce_clipping(cfg, sizes)
    print("A sample, letter by letter:")
    h, letter = np.zeros((1, cfg.hidden), np.float32), data["validation"][0]
    for _ in range(500):
        print(data["chars"][letter], end="", flush=True)
        (y, h), _ = vanilla_forward(params, np.array([[letter]]), None, h, cfg)
        y = y[0, 0].astype(float)
        p = np.exp((y - y.max()) / cfg.temperature)
        letter = rng.choice(len(p), p=p / p.sum())
    loss = heldout_loss(params, cfg)
    expected = "   (expected on tinyshakespeare: 1.60)" if cfg.data else ""
    print(f"\n\nvalidation loss {loss:.4f} nats a letter on the last tenth{expected}")
    return {"validation": loss}, params, progress


def main(cfg):
    """Run one task, or the parts of the demo."""
    start, rng, figures = time.perf_counter(), np.random.default_rng(cfg.seed), {}
    learn = {"wave": learn_wave, "recall": learn_bits, "text": learn_text_plain}
    examples, seconds, size, steps, stopped = 0, 0.0, 0, 0, False
    print("vanilla_rnn.py: a network that reads one thing after another")
    if cfg.task == "demo":
        show_radius(cfg, rng)
        figures, stopped = show_clipping(cfg, rng)
    for task in ("wave", "recall") if cfg.task == "demo" else (cfg.task,):
        if stopped:
            break
        part = replace(cfg, task=task)
        if cfg.task == "demo":                          # its presets, but for flags
            own = {k: v for k, v in PRESETS.get(task, {}).items() if getattr(cfg, k) == getattr(Config(), k)}
            part = replace(part, **own)
        found, params, progress = learn[task](part, rng)
        figures.update({f"{task}_{name}" if cfg.task == "demo" else name: value for name, value in found.items()})
        examples, seconds = examples + len(progress.losses) * cfg.batch, seconds + progress.seconds
        size += sum(p.size for p in params.values())
        steps, stopped = steps + progress.step, progress.stopped
    print("\nNext: python vanilla_rnn.py --task recall --delay 40 --steps 5000      python lstm.py")
    print_result(task=cfg.task, **figures, params=size, steps=steps, seconds=time.perf_counter() - start,
                 examples_per_s=int(examples / max(seconds, 1e-9)))


def save_checkpoint(path, step, rng, about, parts, trial=False):
    """Everything that a training needs to go on, in an .npz file that is either whole or not there. about: what has to
    be the same when it goes on; parts: {"params": dict of arrays, ...}, dicts of arrays and numbers. trial: only find
    out whether it can be written, and leave what stands there."""
    require(not os.path.isdir(path), f"--save {path}", "a file", "a folder")
    arrays = {f"{part} {name}": a for part, named in parts.items() for name, a in named.items()}
    arrays["about"] = np.array(json.dumps({**about, "step": step, "rng": rng.bit_generator.state}))
    try:
        with open(path + ".tmp", "wb") as file:
            np.savez(file, **arrays)
        os.remove(path + ".tmp") if trial else os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise InputError(f"--save {path}: expected a place to write to, found: {error.strerror}") from None


def read_checkpoint(path):
    """A file of save_checkpoint -> about, arrays by name."""
    try:
        zipfile.ZipFile(path).close()                   # an .npz is a zip file of arrays; np.load takes others, too
        with np.load(path, allow_pickle=False) as saved:
            arrays = dict(saved)
        about = json.loads(str(arrays.pop("about")))
        return {**about, "step": int(about["step"]), "rng": dict(about["rng"])}, arrays
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(f"--load {path}: expected a file that --save wrote, found: {found}") from None


def load_checkpoint(path, rng, about, parts):
    """Fill rng and parts from a file of save_checkpoint; what it is about must be the same -> number of steps done."""
    found, arrays = read_checkpoint(path)
    for name, value in about.items():
        require(found.get(name) == value, f"--load {path}", f"{name} {value}", found.get(name))
    for part, named in parts.items():
        held = {name[len(part) + 1:]: a if a.ndim else a.item() for name, a in arrays.items()
                if name.startswith(part + " ")}
        for name in sorted(named.keys() | held.keys()) if part == "params" else ():
            shape, other = (np.shape(d[name]) if name in d else "no such array" for d in (named, held))
            require(shape == other, f"--load {path}", f"{name} {shape}", other)
        named.update(held)
    rng.bit_generator.state = found["rng"]
    print(f"going on from {path}, after {found['step']} steps")
    return found["step"]


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
