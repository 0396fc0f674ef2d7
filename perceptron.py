"""perceptron.py: one neuron, taught by Rosenblatt's rule and by gradient descent.

A neuron multiplies each input by a weight, adds the products and a bias, and fires if the sum is
positive. Rosenblatt's rule changes the weights after each mistake. Novikoff proved that the number
of mistakes is finite if some weights classify every example correctly. For XOR, no weights do. With
a smooth output, the weights can follow the gradient of a loss, as in all other lessons.

Perceptron rule, for y = -1 or +1 and x with a constant 1 appended, whose weight is the bias:
    if y (w . x) <= 0:  w <- w + y x     (w = 0 at the start)
    mistakes <= (R / margin)^2,  R = max |x|, margin = min y (w . x) / |w| of any w without mistakes
XOR of inputs -1 and +1 requires w1 - w2 + b > 0 and -w1 + w2 + b > 0; their mean is b > 0. It also
requires w1 + w2 + b < 0 and -w1 - w2 + b < 0; their mean is b < 0. With a third input, x1 x2, XOR
is solved by the weight -1 for x1 x2 and 0 for all others.

Sigmoid neuron, for t = 0 or 1:
    forward     z = x W + b     s = 1 / (1 + e^-z)
                loss = -mean(t log s + (1 - t) log(1 - s)) = mean(log(1 + e^z) - t z)
    backward    dz = (s - t) / size     size: number of z; s is the derivative of log(1 + e^z)
                dW = x^T dz     db = sum_n dz     n: rows of x;  W <- W - lr dW,  b <- b - lr db

Run    python perceptron.py                            AND, OR, NAND, XOR
       python perceptron.py names --data names.txt     a bigram model, counted and trained
       python perceptron.py mnist --data mnist         softmax regression on handwritten digits

Papers: Rosenblatt 1958, Novikoff 1962, Minsky and Papert 1969 (Perceptrons).
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
    """Learn the gates AND, OR, NAND and XOR, one neuron each."""
    inputs: int = 2         # inputs at the start: 2 (x1, x2) or 3 (x1, x2, x1 x2)
    lr: float = 20.0        # initial learning rate, falling to 0
    steps: int = 1000       # updates
    seed: int = 0           # random seed


# ---- the perceptron rule on truth tables: false is -1 as an input, 0 as a target -----------------

X1 = np.array([-1, -1, 1, 1])
X2 = np.array([-1, 1, -1, 1])
GATES = {"AND": (0, 0, 0, 1), "OR": (0, 1, 1, 1), "NAND": (1, 1, 1, 0), "XOR": (0, 1, 1, 0)}
TARGETS = np.array(list(GATES.values())).T              # (4 rows of the table, 4 gates)


def features(x1, x2, inputs):
    """The first columns of x1, x2, x1 x2.   x1, x2 (N,) -> (N, inputs)."""
    return np.column_stack([x1, x2, x1 * x2])[:, :inputs]


def perceptron_rule(x, y, epochs=100):
    """For each example, in each epoch: if y (w . x) <= 0, then w <- w + y x.
    x (N, D), y (N,) of -1 or +1 -> w (D,), number of mistakes, best accuracy after an update."""
    w = np.zeros_like(x[0])
    mistakes, best = 0, 0.0
    for _ in range(epochs):
        for example, label in zip(x, y):
            if label * (w @ example) <= 0:
                w = w + label * example
                mistakes += 1
                best = max(best, np.mean(y * (x @ w) > 0))
    return w, mistakes, best


def show_rule(inputs):
    """Train on every gate by the perceptron rule; print mistakes, bound, accuracy and weights."""
    x = np.column_stack([features(X1, X2, inputs), np.ones(4, int)])    # (4, inputs + 1)
    for name, y in zip(GATES, 2 * TARGETS.T - 1):                       # targets 0, 1 -> -1, +1
        w, mistakes, best = perceptron_rule(x, y)
        bound = "none"
        if best == 1:
            margin = min(y * (x @ w)) / np.linalg.norm(w)
            bound = round(max((x * x).sum(axis=1)) / margin ** 2)
        print(f"{name:>6}: mistakes {mistakes}, bound {bound}, best accuracy {best:.0%}, w = {w}")


# ---- the sigmoid neuron: N examples, D inputs, M neurons (one per gate) --------------------------

def make_batch(cfg, step, dtype=np.float32):
    """All rows of the truth table at every step -> x (4, inputs), targets (4, 4)."""
    return features(X1, X2, cfg.inputs).astype(dtype), TARGETS.astype(dtype)


def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, M), b (M,) -> y (N, M)."""
    return x @ W + b, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout: b is added to every row."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)


def sigmoid(z):
    """1 / (1 + e^-z), computed as (1 + tanh(z / 2)) / 2, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def binary_cross_entropy_forward(logits, targets):
    """mean(log(1 + e^z) - t z), z logits (before a sigmoid), t targets 0 or 1, (N, M) -> scalar."""
    return (np.logaddexp(0, logits) - targets * logits).mean(), (logits, targets)


def binary_cross_entropy_backward(dout, cache):
    """dlogits = (sigmoid(logits) - targets) / size."""
    logits, targets = cache
    return (sigmoid(logits) - targets) * (dout / logits.size)


def init_params(cfg, rng, dtype=np.float32):
    """Small random weights W (inputs, 4), a column per gate, and biases b (4,)."""
    return {"W": 0.01 * rng.standard_normal((cfg.inputs, 4), dtype), "b": np.zeros(4, dtype)}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, targets = batch
    logits, linear_cache = linear_forward(x, params["W"], params["b"])
    loss, loss_cache = binary_cross_entropy_forward(logits, targets)
    dlogits = binary_cross_entropy_backward(1.0, loss_cache)
    _, dW, db = linear_backward(dlogits, linear_cache)
    return loss, {"W": dW, "b": db}


# ---- training and pictures -----------------------------------------------------------------------

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
    """Gradient descent on params, in place -> losses. Later parts pass their own functions."""
    losses = []
    for step in progress(cfg.steps, losses):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        lr = cfg.lr * (1 - (step - 1) / cfg.steps)      # falls to 0 on a straight line
        for name in params:
            params[name] -= lr * grads[name]
        losses.append(float(loss))
    check_finite(losses[-1], params)
    return losses


def shade(values):
    """Numbers from 0 to 1 -> characters from blank (0) to @ (1), in an array of the same shape."""
    shades = np.array(list(" .:-=+*#%@"))
    return shades[(np.clip(values, 0, 1) * 9.99).astype(int)]


def draw_gates(params, cfg):
    """Print the four outputs in the plane, side by side, with o or x at the corners (targets)."""
    x1, x2 = np.meshgrid(np.linspace(-1, 1, 17), np.linspace(1, -1, 9))     # 9 lines of 17
    x = features(x1.ravel(), x2.ravel(), cfg.inputs)
    logits, _ = linear_forward(x, params["W"], params["b"])
    pictures = shade(sigmoid(logits)).reshape(9, 17, 4)
    for a, b, targets in zip(X1, X2, TARGETS):
        pictures[4 - 4 * b, 8 + 8 * a] = np.where(targets, "x", "o")    # where x1 = a, x2 = b
    for line in pictures.transpose(0, 2, 1):                            # (4 gates, 17)
        print("    ".join("".join(part) for part in line))


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
    """Learn the gates by both methods from x1 and x2, then from x1, x2 and x1 x2."""
    start = time.perf_counter()
    metrics = {}
    for inputs in range(cfg.inputs, 4):
        net = replace(cfg, inputs=inputs)
        names = ", ".join(["x1", "x2", "x1 x2"][:inputs])
        print(f"Perceptron rule, inputs {names}, 1: mistakes in 100 epochs and Novikoff's bound")
        show_rule(inputs)
        params = init_params(net, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"Sigmoid neurons, inputs {names}, {size} parameters\nchance level: loss 0.693")
        losses = train(params, net)
        logits, _ = linear_forward(features(X1, X2, inputs), params["W"], params["b"])
        check_finite(logits.sum(), params)
        accuracy = np.mean((logits > 0) == TARGETS, axis=0).tolist()
        print("Outputs: blank is 0, @ is 1; x1 to the right, x2 up; targets: o is 0, x is 1")
        for name, share in zip(GATES, accuracy):
            metrics[f"{name}_{inputs}"] = share
        print(*[f"{name}: {share:.0%} right".ljust(20) for name, share in zip(GATES, accuracy)])
        draw_gates(params, net)
        if len(losses) < cfg.steps:
            break
    print("Next: python perceptron.py --lr 1      python perceptron.py names      python mlp.py")
    print_result("gates", cfg, **metrics, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: a bigram language model, softmax regression on MNIST, flags. =======

MORE = """
Break it (what to change, and what comes of it)
    linear_forward: drop + b         all boundaries pass through the origin: OR and NAND 50 % right,
                                     loss 0.43 in place of 0.17
    init_params: 0.01 -> 0, or 10    the same final loss, 0.174: the loss is convex in W and b
    features: x1 * x2 -> x1 + x2     XOR 75 % right at best: a sum tells the neuron nothing new
    X1, X2: -1 -> 0                  the margin shrinks: AND takes 18 mistakes; the bound is 87
    perceptron_rule: <= -> <         w = 0 never makes a mistake, so nothing is learned
    names, softmax_cross_entropy_backward: -= 1 -> += 1     the loss climbs to 1400
    names, embedding_backward: dE = np.zeros(shape, dout.dtype), then dE[ids] += dout
                                     of repeated ids only one counts: 2.18, not 2.14
    names --lr 2000 without "- logits.max(...)"             loss inf; with it, 2.14 in the end

Exercises (python gradcheck.py my_answer.py checks the gradients of an answer)
    1. Separate two clouds of random points, with a gap between them, by perceptron_rule. How do
       the mistakes and Novikoff's bound grow when the gap shrinks?
    2. Derive and add the loss mean(max(0, -y z)) (perceptron_loss_forward, _backward). With lr = 1
       and batches of one example, gradient descent on this loss is the perceptron rule, except in
       one case. Which?
    3. names: add 1 to the count of every pair. What are the loss of the counts and the test loss?

Data
    names.txt: curl -O https://raw.githubusercontent.com/karpathy/makemore/master/names.txt
    mnist, a folder with four files:
        for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        curl --create-dirs -o mnist/$f-ubyte.gz \\
            https://ossci-datasets.s3.amazonaws.com/mnist/$f-ubyte.gz; done
"""

import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import re
import sys
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- softmax over V classes, for the next two parts ----------------------------------------------
# The loss log(sum_v e^z_v) - z_target has the derivative p - onehot(target) by z, p = softmax(z):
# output minus target, as in the sigmoid neuron.

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


# ---- a bigram language model: python perceptron.py names --data names.txt ------------------------
# The probability of the next character, given the last one, is a table of V x V numbers: the counts
# of all pairs, each row divided by its sum. A softmax layer with input onehot(last) learns the same
# table. onehot(last) @ W is a row of W, so the forward pass only selects rows.

@dataclass
class Names:
    """Predict the next character of a name from the last one, by counting and by training."""
    lr: float = 20.0        # initial learning rate, falling to 0
    steps: int = 5000       # updates
    batch_size: int = 500   # pairs of characters per update
    data: str = ""          # text file, one word per line; none: the built-in names
    seed: int = 0           # random seed


NAMES = """
aaron adrian alan alice amber andrea ann antonia audrey beatrice beth brandon bridget caleb carl
caroline charlotte christina clement cora daisy daphne dennis dominic dorothy dylan edmund elena
ella eloise emma erin ethan evelyn felix florence frederick gemma gilbert grace gregory harold
hazel helen holly hugh ida iris ivan jacob janet jasper jenna jesse joel jonas joseph judith june
karl keith kevin laura leah leonard liam linda lorna lucas lydia marcus marian martha mason maud
megan michael miranda monica myra natalie nelson nigel nora olive oscar patricia paula philip
quentin raymond richard robin rosa roy russell sabrina samuel scott selina sidney sonia stanley
steven sybil tanya thelma timothy trevor valerie veronica vincent virginia wanda wesley winifred
zara""".split()


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


def read_words(path):
    """One word per line of a text file, or the built-in names.   -> list.   Raises InputError."""
    lines = read_text(path).split("\n") if path else NAMES
    words = [line.strip() for line in lines if line.strip()]
    require(len(words) >= 20, f"--data {path}", "20 words or more, one per line", len(words))
    return words


def split_words(words):
    """80 / 10 / 10 % of the words for training, validation and test, the same in every run."""
    order = np.random.default_rng(0).permutation(len(words))
    parts = np.split(order, [int(0.8 * len(words)), int(0.9 * len(words))])
    return [[words[i] for i in part] for part in parts]


@functools.lru_cache
def bigrams(path):
    """-> dict: chars, of which the first, ".", begins and ends every word; train, validation, test:
    each ids of characters (N,), targets (N,): ids of the next characters."""
    words = read_words(path)
    chars = "." + "".join(sorted(set("".join(words)) - {"."}))
    index = {c: i for i, c in enumerate(chars)}
    data = {"chars": chars}
    for split, part in zip(("train", "validation", "test"), split_words(words)):
        ids = np.array([index[c] for c in "." + ".".join(part) + "."])
        data[split] = ids[:-1], ids[1:]
    return data


def embedding_forward(ids, E):
    """Row ids of E.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """Row v of dE is the sum of dout over all positions whose id is v."""
    ids, shape = cache
    onehot = (ids.reshape(-1, 1) == np.arange(shape[0])).astype(dout.dtype)     # (positions, V)
    dE = onehot.T @ dout.reshape(len(onehot), -1)       # E[ids] is onehot @ E, a linear layer
    return dE.reshape(shape)


def init_names(cfg, rng, dtype=np.float32):
    """Small random weights W (V, V), a row per last character, and biases b (V,)."""
    V = len(bigrams(cfg.data)["chars"])
    return {"W": 0.01 * rng.standard_normal((V, V), dtype), "b": np.zeros(V, dtype)}


def names_batch(cfg, step, dtype=np.float32):
    """Random pairs of the training split -> ids (N,), targets (N,)."""
    rng = np.random.default_rng((cfg.seed, step))
    ids, targets = bigrams(cfg.data)["train"]
    pick = rng.integers(0, len(ids), cfg.batch_size)
    return ids[pick], targets[pick]


def names_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    ids, targets = batch
    rows, rows_cache = embedding_forward(ids, params["W"])
    loss, loss_cache = softmax_cross_entropy_forward(rows + params["b"], targets)
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    return loss, {"W": embedding_backward(dlogits, rows_cache), "b": dlogits.sum(axis=0)}


def run_names(cfg):
    """Count all pairs, train on the same pairs, compare the two tables, sample new words."""
    start, data = time.perf_counter(), bigrams(cfg.data)
    chars, (ids, targets) = data["chars"], data["train"]
    test_ids, test_targets = data["test"]
    V = len(chars)
    size = V * V + V
    print(f"{cfg.data or 'Built-in names'}: {len(ids)} pairs of {V} characters, {size} parameters")
    print(f"chance level: loss {math.log(V):.3f}")
    counts = np.zeros((V, V))
    np.add.at(counts, (ids, targets), 1)
    p_counted = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    counted = float(-np.log(p_counted[ids, targets]).mean())

    rng = np.random.default_rng(cfg.seed)
    params = init_names(cfg, rng)
    losses = train(params, cfg, names_batch, names_loss_and_grads)
    logits = params["W"].astype(float) + params["b"]                    # (V, V)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    p = np.exp(log_p)
    trained = float(-log_p[ids, targets].mean())
    test = float(-log_p[test_ids, test_targets].mean())
    check_finite(trained + test, params)
    print(f"mean loss: counted {counted:.3f}, trained {trained:.3f}, on test words {test:.3f}")
    if cfg.data:
        print("expected on names.txt: counted 2.455, trained 2.46 at most, on test words 2.45")
    else:
        print("the test loss is high: many pairs of the test names do not occur in so few names")

    shown = chars[:45]                                                  # more are too wide
    print("Counted (left) and trained (right) probabilities. Rows: a character; columns: the next;"
          "\na . begins and ends a word. Shades: square root of a probability, blank is 0, @ is 1")
    print(f"  {shown}     {shown}")
    for i, char in enumerate(shown):
        left, right = ["".join(shade(table[i, :45] ** 0.5)) for table in (p_counted, p)]
        print(f"{char} {left}   {char} {right}")
    words = []
    for _ in range(10):
        word = [rng.choice(V, p=p[0])]
        while word[-1] != 0 and len(word) < 20:
            word.append(rng.choice(V, p=p[word[-1]]))
        words.append("".join(chars[i] for i in word).rstrip("."))
    print(textwrap.fill(f"samples: {', '.join(words)}", 100))
    print("Next: python perceptron.py mnist --data mnist      python mlp.py names")
    print_result("names", cfg, counted=counted, trained=trained, test=test, params=size,
                 steps=len(losses), seconds=time.perf_counter() - start)


# ---- softmax regression on handwritten digits: python perceptron.py mnist --data mnist -----------

@dataclass
class Mnist(Names):
    """Classify handwritten digits with one neuron per digit."""
    lr: float = 0.1         # initial learning rate, falling to 0
    steps: int = 10000      # updates
    batch_size: int = 100   # images per update
    data: str = ""          # folder of the four MNIST files


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
    """Small random weights W (784, 10), a column per digit, and biases b (10,)."""
    return {"W": 0.01 * rng.standard_normal((784, 10), dtype), "b": np.zeros(10, dtype)}


def mnist_batch(cfg, step, dtype=np.float32):
    """Random training images -> x (N, 784), labels (N,)."""
    rng = np.random.default_rng((cfg.seed, step))
    x, labels = load_mnist(cfg.data)["train"]
    pick = rng.integers(0, len(x), cfg.batch_size)
    return x[pick].astype(dtype), labels[pick]


def mnist_loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, targets = batch
    logits, linear_cache = linear_forward(x, params["W"], params["b"])
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets)
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    _, dW, db = linear_backward(dlogits, linear_cache)
    return loss, {"W": dW, "b": db}


def run_mnist(cfg):
    """Train on MNIST, draw the weights of each neuron, print the test accuracy."""
    start = time.perf_counter()
    require(cfg.data, "--data", "the folder of MNIST (python perceptron.py --help says where)",
            cfg.data)
    data = load_mnist(cfg.data)
    x, labels = data["test"]
    print(f"{cfg.data}: {len(data['train'][0])} images of 28 x 28 pixels, 7850 parameters")
    print("chance level: loss 2.303")
    params = init_mnist(cfg, np.random.default_rng(cfg.seed))
    losses = train(params, cfg, mnist_batch, mnist_loss_and_grads)
    logits, _ = linear_forward(x, params["W"], params["b"])
    check_finite(logits.sum(), params)
    right = logits.argmax(axis=1) == labels
    sizes = np.bincount(labels, minlength=10)
    shares = np.bincount(labels, right, minlength=10) / np.maximum(sizes, 1)
    W = params["W"].reshape(14, 2, 14, 2, 10).mean(axis=(1, 3))         # means of 2 x 2 pixels
    pictures = shade(0.5 + 1.5 * W)                                     # (14, 14, 10 digits)
    print("Weights of each neuron: @ is evidence for its digit, blank is evidence against it")
    for k in (0, 5):
        print("   ".join(f"{d}: {shares[d]:.1%} right".ljust(14) for d in range(k, k + 5)))
        for line in pictures[:, :, k:k + 5].transpose(0, 2, 1):         # (5 digits, 14)
            print("   ".join("".join(part) for part in line))
    print(f"test accuracy {right.mean():.4f} on {len(x)} images (expected on MNIST: 0.925)")
    print("Next: python perceptron.py names      python mlp.py mnist --data mnist")
    print_result("mnist", cfg, accuracy=float(right.mean()), params=7850, steps=len(losses),
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


CONSTRAINTS = {Config: lambda cfg: [(cfg.inputs in (2, 3), "--inputs", "2 or 3", cfg.inputs)]}

TASKS = {"gates": Task(Config, init_params, make_batch, loss_and_grads, main),
         "names": Task(Names, init_names, names_batch, names_loss_and_grads, run_names),
         "mnist": Task(Mnist, init_mnist, mnist_batch, mnist_loss_and_grads, run_mnist)}

if __name__ == "__main__":
    run(TASKS)
