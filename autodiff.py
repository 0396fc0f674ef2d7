"""autodiff.py: the chain rule as a program.

Every other lesson derives its backward pass by hand; here a program does. An expression such as
relu(x W + b) is recorded as a graph of Nodes: each has an operation and inputs, and no value yet.
Every operation has a rule: from the gradient of its output to the gradients of its inputs. A rule
takes and returns Nodes. So the rules, applied from the loss back to the inputs, build a second
graph, which computes the gradients. This graph can be differentiated again, like the first.

Forward     y = a b             y = a @ b              y = e^x       y = softmax(x)
Backward    da = dout b         da = dout b^T          dx = dout y   dx = y (dout - sum(dout y))
            db = dout a         db = a^T dout          dout: the gradient of y
    broadcast repeats entries, so its rule sums; sum adds entries, so its rule repeats
    a Node that is used several times gets the sum of the gradients of its uses
Order: an input is older than what uses it. From the oldest Node to the youngest all values can be
    computed; from the youngest to the oldest a gradient is complete before it is passed on.

Run    python autodiff.py       (XOR, a backward graph, a second derivative; --help lists the tasks)
Papers: Linnainmaa 1970 (reverse mode), Griewank and Walther 2008, Baydin et al. 2018 (survey).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///

import functools
import itertools
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
    """Learn XOR with no backward pass written."""
    hidden: int = 16        # hidden units
    steps: int = 500        # optimizer steps
    lr: float = 0.5         # learning rate
    seed: int = 0           # random seed


# ---- graph: Nodes, and what makes them -----------------------------------------------------------

def apply(op, *args):
    """An operation on Nodes -> a Node; on arrays -> an array.   args: inputs, then attributes."""
    if isinstance(args[0], Node):
        return type(args[0])(op, *args)
    return COMPUTE[op](*args)


def binary(op, a, b):
    """op of two Nodes, which are repeated to their common shape, or of a Node and a number."""
    if isinstance(b, Node):
        shape = np.broadcast_shapes(a.shape, b.shape)
        a, b = (x if x.shape == shape else broadcast(x, shape) for x in (a, b))
    return apply(op, a, b)


class Node:
    """A value to be computed: an operation, its inputs (Nodes) and attributes, the shape."""
    ages = itertools.count()

    def __init__(self, op, *args):
        self.op, self.args, self.age = op, args, next(Node.ages)
        self.inputs = [a for a in args if isinstance(a, Node)]
        ones = [np.ones(a.shape) if isinstance(a, Node) else a for a in args]
        self.shape = np.shape(COMPUTE[op](*ones))       # sizes that do not fit fail here

    def __add__(self, other):
        return binary("add", self, other)
    def __sub__(self, other):
        return self + -other
    def __neg__(self):
        return self * -1.0
    def __mul__(self, other):
        return binary("mul", self, other)
    def __truediv__(self, other):
        return binary("div", self, other)
    def __matmul__(self, other):
        return apply("matmul", self, other)
    def __pow__(self, number):
        return apply("power", self, number)
    def __gt__(self, number):
        return apply("greater", self, number)
    def __bool__(self):
        raise TypeError("a Node has no value yet, so that `if` cannot depend on it")


# Functions of Nodes or arrays: exp(x) is apply("exp", x); total is the operation "sum".
exp, log, sqrt, relu, softmax, log_softmax = (
    functools.partial(apply, op) for op in "exp log sqrt relu softmax log_softmax".split())
normalize, total, mean, broadcast, reshape, transpose = (
    functools.partial(apply, op) for op in "normalize sum mean broadcast reshape transpose".split())


# ---- layers: what every operation computes, and its rule -----------------------------------------

def log_softmax_of(x):
    """x - log sum e^x along the last axis of an array."""
    x = x - x.max(axis=-1, keepdims=True)               # the same softmax, without overflow
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def std(x):
    """The standard deviation along the last axis, of a Node or an array."""
    return sqrt(mean((x - mean(x, -1)) ** 2, -1) + 1e-5)


COMPUTE = {     # from the values of the inputs, and the attributes
    "input": lambda name, shape: np.ones(shape),        # its values are given to the Evaluator
    "ones": np.ones_like, "greater": np.greater, "add": np.add, "mul": np.multiply,
    "div": np.divide, "sqrt": np.sqrt, "exp": np.exp, "log": np.log, "matmul": np.matmul,
    "transpose": np.swapaxes, "reshape": np.reshape, "broadcast": np.broadcast_to,
    "power": lambda x, n: x ** n, "relu": lambda x: np.maximum(x, 0),
    "sum": lambda x, axes: x.sum(axis=axes, keepdims=True),
    "mean": lambda x, axes: x.mean(axis=axes, keepdims=True),
    "softmax": lambda x: np.exp(log_softmax_of(x)),
    "log_softmax": log_softmax_of,
    "normalize": lambda x: (x - mean(x, -1)) / std(x)}


def sum_to(dout, shape):
    """Sum all entries of dout that broadcast has made of the same entry of shape."""
    ones = (1,) * (len(dout.shape) - len(shape)) + shape            # new axes stand in front
    axes = tuple(k for k in range(len(ones)) if dout.shape[k] != ones[k])
    return reshape(total(dout, axes), shape)


def operation_forward(op, *args):
    """y = op(*args).   args: inputs, then attributes."""
    y = COMPUTE[op](*args)
    return y, (op, y, *args)


def operation_backward(dout, cache):
    """dout, the gradient of y -> the gradients of the inputs. All are arrays, or all are Nodes."""
    op, y, *args = cache
    rules = {
        "add": lambda a, b: (dout, dout),
        "mul": lambda a, b: (dout * b, dout * a),
        "div": lambda a, b: (dout / b, -dout * y / b),
        "power": lambda x, n: dout * x ** (n - 1) * n,
        "sqrt": lambda x: dout / (y * 2),
        "exp": lambda x: dout * y,
        "log": lambda x: dout / x,
        "relu": lambda x: dout * (x > 0),
        "matmul": lambda a, b: (dout @ transpose(b, -1, -2), transpose(a, -1, -2) @ dout),
        "transpose": lambda x, i, j: transpose(dout, i, j),
        "reshape": lambda x, shape: reshape(dout, x.shape),
        "broadcast": lambda x, shape: sum_to(dout, x.shape),
        "sum": lambda x, axes: broadcast(dout, x.shape),
        "mean": lambda x, axes: broadcast(dout * math.prod(y.shape) / math.prod(x.shape), x.shape),
        "softmax": lambda x: y * (dout - total(dout * y, -1)),
        "log_softmax": lambda x: dout - exp(y) * total(dout, -1),
        "normalize": lambda x: (dout - mean(dout, -1) - y * mean(dout * y, -1)) / std(x)}
    return rules[op](*args)


# ---- backward graph and evaluation ---------------------------------------------------------------

def topological_order(outputs):
    """All Nodes that the outputs depend on, inputs first: an input is older than what uses it."""
    found, left = set(), list(outputs)
    for node in left:                                   # the list grows
        if node not in found:
            found.add(node)
            left += node.inputs
    return sorted(found, key=lambda node: node.age)


def gradients(loss, variables, cache_of=lambda node: (node.op, node, *node.args)):
    """d loss / d variable for each variable, as Nodes.   cache_of(node): for operation_backward."""
    grads = {loss: apply("ones", cache_of(loss)[1])}
    for node in reversed(topological_order([loss])):
        if node in grads and node.op not in ("input", "ones", "greater"):       # they have no rule
            dinputs = operation_backward(grads[node], cache_of(node))
            if not isinstance(dinputs, tuple):          # a rule for one input
                dinputs = (dinputs,)
            for x, dx in zip(node.inputs, dinputs):
                grads[x] = grads[x] + dx if x in grads else dx
    return [grads[x] if x in grads else cache_of(x)[1] * 0.0 for x in variables]


class Evaluator:
    """Computes outputs of a graph: in topological order, each once, kept until its last use."""
    def __init__(self, outputs):
        self.outputs, self.order = outputs, topological_order(outputs)
        self.last_use = {x: node for node in self.order for x in node.inputs}
        self.last_use.update(dict.fromkeys(outputs))    # None: they are kept
    def __call__(self, inputs):
        value = {}
        for node in self.order:
            args = [value[a] if isinstance(a, Node) else a for a in node.args]
            value[node] = inputs[args[0]] if node.op == "input" else COMPUTE[node.op](*args)
            for x in set(node.inputs):
                if self.last_use[x] is node:
                    del value[x]
        return [value[node] for node in self.outputs]


# ---- data ----------------------------------------------------------------------------------------

def make_batch(cfg, step, dtype=np.float32):
    """All of XOR, at every step.   -> x (4, 2), one-hot targets (4, 2): do the signs differ?"""
    x = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)], dtype)
    return x, np.eye(2, dtype=dtype)[[0, 1, 1, 0]]


# ---- model: a forward pass, for Nodes or arrays --------------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """W0 (2, H), b0 (H,), W1 (H, 2), b1 (2,)."""
    params = {"W0": rng.standard_normal((2, cfg.hidden)), "b0": np.zeros(cfg.hidden),
              "W1": rng.standard_normal((cfg.hidden, 2)) * cfg.hidden ** -0.5, "b1": np.zeros(2)}
    return {name: value.astype(dtype) for name, value in params.items()}


def xor_logits(p):
    """p: parameters, x (N, 2) -> logits (N, 2)."""
    return relu(p["x"] @ p["W0"] + p["b0"]) @ p["W1"] + p["b1"]


def cross_entropy(logits, targets):
    """-mean_n sum_k targets_nk log softmax(logits)_nk.   logits, targets (N, K) -> scalar."""
    return reshape(mean(-total(targets * log_softmax(logits), -1), (0, 1)), ())


def xor_loss(p):
    """p: parameters, x (N, 2), targets (N, 2) -> scalar."""
    return cross_entropy(xor_logits(p), p["targets"])


@functools.lru_cache
def compiled(loss_of, gradients, shapes, variables):
    """The graph of a loss and its gradients, built once for inputs of these shapes."""
    nodes = {name: Node("input", name, shape) for name, shape in shapes}
    loss = loss_of(nodes)
    return Evaluator([loss, *gradients(loss, [nodes[name] for name in variables])])


def loss_and_grads(params, batch, cfg, loss_of=xor_loss, gradients=gradients):
    """Run the graph of a loss -> loss, gradients under the keys of params."""
    arrays = {**params, "x": batch[0], "targets": batch[1]}
    shapes = tuple((name, a.shape) for name, a in arrays.items())
    loss, *grads = compiled(loss_of, gradients, shapes, tuple(params))(arrays)
    return loss, dict(zip(params, grads))


# ---- training and demo ---------------------------------------------------------------------------

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
    """w <- w - lr g, in place.   -> losses. Later parts of the file pass their own functions."""
    losses = []
    for step in progress(cfg.steps, losses):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        for name, g in grads.items():
            params[name] -= cfg.lr * g
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


def draw_graph(node, known, depth=1):
    """Print a Node, and below it what it is computed from, unless it is known."""
    words = [node.op, *(a for a in node.args if isinstance(a, str)), str(node.shape)]
    print("    " * depth + " ".join(words) + "  *" * (node in known))
    for x in [] if node in known else node.inputs:
        draw_graph(x, known, depth + 1)


def main(cfg):
    """Learn XOR; print a backward graph; differentiate a function twice, and draw it."""
    start, params = time.perf_counter(), init_params(cfg, np.random.default_rng(cfg.seed))
    size = sum(p.size for p in params.values())
    print(f"XOR: layers 2,{cfg.hidden},2, {size} parameters, lr {cfg.lr}, no backward pass written")
    print(f"chance level: loss {math.log(2):.3f}")
    losses = train(params, cfg)
    x, targets = make_batch(cfg, 1)
    prob = softmax(xor_logits({**params, "x": x}))
    print("probability of class 1:", prob[:, 1].round(3), " targets:", targets[:, 1])

    x, W = Node("input", "x", (4, 3)), Node("input", "W", (3, 2))
    loss = total(relu(x @ W), (0, 1))
    print("\nThe graph of dW for loss = sum(relu(x W)). Rows: an operation and the shape of its"
          "\noutput; its inputs are below it, one step to the right; * is part of the forward pass")
    draw_graph(gradients(loss, [W])[0], topological_order([loss]))

    x, grid = Node("input", "x", (64,)), np.linspace(-4, 4, 64)
    f = exp(x ** 2 * -0.5)
    [slope] = gradients(f, [x])
    curves = Evaluator([f, slope, *gradients(slope, [x])])
    numeric = (curves({"x": grid + 1e-5})[1] - curves({"x": grid - 1e-5})[1]) / 2e-5
    rows = dict(zip(("f", "f'", "f''", "numeric f''"), [*curves({"x": grid}), numeric]))
    print("\nf = exp(-x^2 / 2) for x from -4 to 4; each row from \" \" (least) to \"@\" (largest)")
    for name, y in rows.items():
        levels = ((y - y.min()) / np.ptp(y) * 9.99).astype(int)
        print(f"    {name:12s}|{''.join(np.array(list(' .:-=+*#%@'))[levels])}|")
    error = float(np.abs(rows["f''"] - numeric).max())
    print(f"largest difference of f'' from central differences of f': {error:.0e}")
    print("\nNext: python autodiff.py tape      python autodiff.py mnist --data mnist")
    print_result("xor", cfg, accuracy=float(((prob > 0.5) == targets).mean()), loss=losses[-1],
                 second_error=error, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds a tape; a transformer on digits, its time and memory; the flags. ==============

MORE = """
Break it (what to change, and what comes of it)
    gradients: grads[x] = dx            f'' is wrong by 1.0, since f' uses x twice; XOR is learned
    rules: "relu": lambda x: dout       XOR is learned, with loss 0.003 instead of 0.0005
    rules: "mul": lambda a, b: (dout * b, dout)     XOR stays at loss 0.693; f'' is wrong by 3.0
    topological_order: list(found)      KeyError: the value of an input is not there yet
    xor_logits: without relu            0.693, with right gradients: the net is linear
    python autodiff.py --lr 5           50 %: after too long a step all hidden units remain 0

Exercises (python gradcheck.py my_autodiff.py checks the rules)
    1. Add tanh to COMPUTE and to the rules. Which rules need neither the inputs nor y?
    2. Differentiate the f of main three and four times. How does the number of Nodes grow?
    3. Nodes with the same operation, inputs and attributes have the same value. Compute it once:
       how many Nodes of the fourth derivative are left of 137?

MNIST is a folder with four files (python autodiff.py mnist --data mnist: 96.1 %; without
residual connections 90.0 %):
    for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
    curl --create-dirs -o mnist/$f-ubyte.gz \\
        https://ossci-datasets.s3.amazonaws.com/mnist/$f-ubyte.gz; done

Sources: Abadi et al. 2016, the course CSE 599W (graphs); Karpathy's micrograd, Paszke et al. 2019
(tapes); Chen et al. 2016 (recomputation); Vaswani et al. 2017 (the transformer).
"""

import argparse
import contextlib
import ctypes
import gzip
import inspect
import re
import sys
import timeit
import tracemalloc
import zlib
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)      # older ones allow no more
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- the tape ------------------------------------------------------------------------------------
# Define-then-run: the whole graph exists before any value. It can be printed, checked, rearranged
# and run many times; but `if` and `while` cannot depend on a value. Define-by-run: a Node has its
# value at once, and the Nodes, ordered by age, are a tape. A loop may run a different number of
# times in every step; but the tape is recorded anew in every step, and is not known before its end.

class Taped(Node):
    """A Node with a value. The Nodes of a loss, ordered by age, are its tape."""
    def __init__(self, op, *args):
        self.op, self.args, self.age = op, args, next(Node.ages)
        self.inputs = [a for a in args if isinstance(a, Node)]
        self.values = [a.value if isinstance(a, Node) else a for a in args]
        self.value = args[0] if op == "input" else COMPUTE[op](*self.values)
        self.shape = np.shape(self.value)
    def __bool__(self):
        return bool(self.value)


def tape_loss_and_grads(params, batch, cfg, loss_of=xor_loss):
    """As loss_and_grads. The rules get arrays, so they return arrays, and nothing is recorded."""
    arrays = {**params, "x": batch[0], "targets": batch[1]}
    nodes = {name: Taped("input", array) for name, array in arrays.items()}
    loss, variables = loss_of(nodes), [nodes[name] for name in params]
    grads = gradients(loss, variables, lambda node: (node.op, node.value, *node.values))
    return loss.value, dict(zip(params, grads))


def newton_sqrt(a):
    """The square root of a by Newton's rule: x <- (x + a / x) / 2 until x^2 = a.   -> x, rounds."""
    x, rounds = a, 0
    while (x * x - a) ** 2 > 1e-20:
        x = (x + a / x) * 0.5
        rounds += 1
    return x, rounds


def show_newton():
    """Print square roots and their derivatives, from tapes.   -> relative error of the last."""
    print("Newton's square root, on a tape; rounds: how often the loop ran, which depends on a")
    print("        a  rounds      sqrt     slope  1/(2 sqrt a)   second  -1/(4 a sqrt a)")
    for a in (0.25, 2.0, 9.0, 100.0):
        node = Taped("input", np.array(a))
        x, rounds = newton_sqrt(node)
        [slope] = gradients(x, [node])                  # recorded, on the same tape ...
        [second] = gradients(slope, [node])             # ... so it can be differentiated
        print(f"{a:9.2f}{rounds:8d}{x.value:10.5f}{slope.value:10.5f}{0.5 * a ** -0.5:14.5f}"
              f"{second.value:9.5f}{-0.25 * a ** -1.5:17.5f}")
    try:
        newton_sqrt(Node("input", "a", ()))
    except TypeError as error:
        print("The same as a graph:", error)
    return abs(float(slope.value) / (0.5 * a ** -0.5) - 1)


# ---- a transformer on rows of digits -------------------------------------------------------------
# B images, T rows of pixels as tokens, N = B T, D dim. One head, prenorm; no biases, gamma, beta.
# The forward pass takes Nodes, Taped Nodes or arrays. The backward pass by hand, with the formulas
# of linear, layernorm and attention in transformer.py, is there to compare with.

def layernorm_dx(dout, y, x):
    """The gradient of x, for y = normalize(x): every x moves y, the mean and std."""
    return (dout - mean(dout, -1) - y * mean(dout * y, -1)) / std(x)


def layer_forward(x, W, B, residual=True):
    """Attention, then an MLP, each with or without a residual connection.   x (N, D) -> (N, D)."""
    N, D = x.shape
    y = normalize(x)
    q, k, v = (reshape(y @ W[s], (B, N // B, D)) for s in "qkv")
    weights = softmax(q @ transpose(k, 1, 2) * D ** -0.5)       # (B, T, T)
    head = reshape(weights @ v, (N, D))
    mid = x + head @ W["o"] if residual else head @ W["o"]
    z = normalize(mid)
    h = relu(z @ W["u"])
    out = mid + h @ W["d"] if residual else h @ W["d"]
    return out, (W, x, y, q, k, v, weights, head, mid, z, h)


def layer_backward(dout, cache):
    """layer_forward with residual connections in reverse order, by hand.   -> dx, dW."""
    W, x, y, q, k, v, weights, head, mid, z, h = cache
    dh = dout @ W["d"].T * (h > 0)
    dmid = dout + layernorm_dx(dh @ W["u"].T, z, mid)
    dhead = (dmid @ W["o"].T).reshape(q.shape)
    dweights = dhead @ v.swapaxes(1, 2)
    ds = weights * (dweights - (weights * dweights).sum(axis=2, keepdims=True))
    ds *= q.shape[2] ** -0.5
    dqkv = ds @ k, ds.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ dhead
    dW = {"d": h.T @ dout, "u": z.T @ dh, "o": head.T @ dmid}
    dy = 0                                              # y is used three times
    for s, g in zip("qkv", dqkv):
        g = g.reshape(x.shape)
        dW[s] = y.T @ g
        dy = dy + g @ W[s].T
    return dmid + layernorm_dx(dy, y, x), dW


def transformer_forward(p, residual=True):
    """p: parameters, x (B, T, pixels) -> logits (B, 10), cache."""
    (B, T, pixels), D = p["x"].shape, p["Wp"].shape[1]
    x = reshape(p["x"], (B * T, pixels)) @ p["Wp"]              # (N, D)
    x = reshape(x, (B, T, D)) + p["P"]                          # positions
    x, caches = reshape(x, (B * T, D)), []
    for i in range(sum(name.startswith("Wq") for name in p)):
        x, cache = layer_forward(x, {s: p[f"W{s}{i}"] for s in "qkvoud"}, B, residual)
        caches.append(cache)
    y = normalize(x)
    pooled = reshape(mean(reshape(y, (B, T, D)), 1), (B, D))
    return pooled @ p["Wy"], (caches, x, y, pooled)


def transformer_loss(p, residual=True):
    """p: parameters, x (B, T, pixels), targets (B, 10) -> scalar."""
    return cross_entropy(transformer_forward(p, residual)[0], p["targets"])


def mnist_loss_and_grads(params, batch, cfg, loss_of=transformer_loss, **options):
    """loss_and_grads of the transformer, by the graph."""
    return loss_and_grads(params, batch, cfg, loss_of, **options)


def hand_loss_and_grads(params, batch, cfg):
    """transformer_loss, and its gradients by hand."""
    x, targets = batch
    B, T, pixels = x.shape
    logits, (caches, last, y, pooled) = transformer_forward({**params, "x": x})
    dlogits = (softmax(logits) - targets) / B
    grads = {"Wy": pooled.T @ dlogits}
    dy = np.repeat(dlogits @ params["Wy"].T / T, T, axis=0)     # the mean of T tokens
    dx = layernorm_dx(dy, y, last)
    for i in reversed(range(cfg.layers)):
        dx, dW = layer_backward(dx, caches[i])
        grads |= {f"W{s}{i}": dw for s, dw in dW.items()}
    grads["P"] = dx.reshape(B, T, -1).sum(axis=0)
    grads["Wp"] = x.reshape(B * T, pixels).T @ dx
    return cross_entropy(logits, targets), grads


def init_mnist(cfg, rng, dtype=np.float32):
    """Wp, P: embedding of rows and positions; layer i: Wqi, Wki, Wvi, Woi, Wui (up), Wdi (down)."""
    D = cfg.dim
    layer = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "u": (D, 4 * D), "d": (4 * D, D)}
    shapes = {f"W{s}{i}": shape for i in range(cfg.layers) for s, shape in layer.items()}
    shapes |= {"Wp": (28, D), "P": (28, D), "Wy": (D, 10)}
    return {name: (rng.standard_normal(shape) * (2 / sum(shape)) ** 0.5).astype(dtype)
            for name, shape in shapes.items()}


# ---- memory and cost: python autodiff.py tape ----------------------------------------------------
# Rules need values of the forward pass, which are kept until then: that is the memory of training.
# The tape keeps all that it has recorded, and every gradient, until the step ends. Of a graph one
# knows before it runs when a value is used for the last time; the Evaluator deletes it then. What
# was deleted can be computed again, from a few values that are kept (Griewank, Walther, ch. 12).

@dataclass
class Tape:
    """A loop that stops by itself; a transformer by hand, tape and graph: time and memory."""
    layers: int = 2         # transformer layers
    dim: int = 64           # embedding dimension
    batch_size: int = 64    # images per step
    seed: int = 0           # random seed
    data = ""               # no field, and no flag: noise in the shape of MNIST


def recomputed_gradients(loss, variables):
    """As gradients, but of the forward pass only inputs and sums are kept, such as x and mid of all
    layers. For other Nodes the rules get copies. These are younger than the backward pass so far,
    so they are computed when it has come so far."""
    copies = {x: x for x in topological_order([loss]) if x.op in ("input", "add")}

    def copy_of(a):                                     # a Node, or an attribute
        if isinstance(a, Node) and a not in copies:
            copies[a] = Node(a.op, *map(copy_of, a.args))
        return copies[a] if isinstance(a, Node) else a
    return gradients(loss, variables, lambda node: (node.op, *map(copy_of, (node, *node.args))))


WAYS = {"hand": hand_loss_and_grads,
        "tape": functools.partial(tape_loss_and_grads, loss_of=transformer_loss),
        "graph": mnist_loss_and_grads,
        "recomputed": functools.partial(mnist_loss_and_grads, gradients=recomputed_gradients)}


def run_tape(cfg):
    """Differentiate a loop; compare the WAYS: gradients in float64, time and memory in float32."""
    start, rng, slope_error = time.perf_counter(), np.random.default_rng(cfg.seed), show_newton()
    batch, params = mnist_batch(cfg, 1, np.float64), init_mnist(cfg, rng, np.float64)
    size = sum(w.size for w in params.values())
    print(f"\nA transformer of {cfg.layers} layers, one head, dim {cfg.dim}, {size} parameters, on "
          f"{cfg.batch_size} images of 28 rows")
    by_way = [function(params, batch, cfg)[1] for function in WAYS.values()]
    difference = max(float(np.abs(g[k] - by_way[0][k]).max()) for g in by_way for k in params)
    print(f"gradients by hand, by tape and by graphs: largest difference {difference:.0e}")
    inputs, errors, h = {**params, "x": batch[0], "targets": batch[1]}, [], 1e-8
    for name, w in params.items():
        step = rng.standard_normal(w.shape)
        up = transformer_loss({**inputs, name: w + h * step})
        down = transformer_loss({**inputs, name: w - h * step})
        slope, numeric = float((by_way[0][name] * step).sum()), float(up - down) / (2 * h)
        errors.append(abs(slope - numeric) / (abs(slope) + 1e-3))
    print(f"compared with central differences: largest relative error {max(errors):.0e}")

    print("\nRows: ways to compute loss and gradients. Columns: processor time, peak memory; after "
          "each,\nthe multiple of the first row")
    small = {name: w.astype(np.float32) for name, w in params.items()}, mnist_batch(cfg, 1), cfg
    costs, metrics = [], {}
    for way, function in WAYS.items():
        call = functools.partial(function, *small)
        ms = 1000 * min(timeit.repeat(call, timer=time.process_time, repeat=20, number=1))
        tracemalloc.start()
        call()
        costs.append((ms, tracemalloc.get_traced_memory()[1] / 1e6))
        tracemalloc.stop()
        slower, larger = np.divide(costs[-1], costs[0]).tolist()
        metrics |= {f"time_{way}": slower, f"memory_{way}": larger}
        print(f"{way:12s}{ms:9.1f} ms{slower:6.2f}{costs[-1][1]:9.1f} MB{larger:6.2f}")
    print("\nNext: python autodiff.py tape --layers 8      python autodiff.py mnist --data mnist")
    print_result("tape", cfg, slope_error=slope_error, difference=difference,
                 numeric_error=max(errors), **metrics, params=size,
                 seconds=time.perf_counter() - start)


# ---- real data: python autodiff.py mnist --data mnist --------------------------------------------

@dataclass
class Mnist(Tape):
    """Classify handwritten digits, row by row, without and with residual connections."""
    steps: int = 3000       # optimizer steps
    lr: float = 0.2         # learning rate
    data: str = ""          # folder with the four files of MNIST


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


def mnist_batch(cfg, step, dtype=np.float32):
    """Random training images.   -> rows (B, 28, 28), one-hot targets (B, 10)."""
    rng = np.random.default_rng((cfg.seed, step))
    images, labels = load_mnist(cfg.data)["train"]
    pick = rng.integers(0, len(images), cfg.batch_size)
    return images[pick].reshape(-1, 28, 28).astype(dtype), np.eye(10, dtype=dtype)[labels[pick]]


def run_mnist(cfg):
    """Train without and with residual connections; report the accuracy on the test images."""
    start = time.perf_counter()
    require(cfg.data, "--data", "the folder of MNIST (python mlp.py --help says where)", cfg.data)
    data, metrics = load_mnist(cfg.data), {}
    images, labels = data["test"]
    for name, residual in (("plain", False), ("residual", True)):
        params = init_mnist(cfg, np.random.default_rng(cfg.seed))
        size = sum(w.size for w in params.values())
        print(f"\n{name}: {len(data['train'][0])} images of 28 rows, {cfg.layers} layers, dim "
              f"{cfg.dim}, {size} parameters\nchance level: loss 2.303")
        loss_of = functools.partial(transformer_loss, residual=residual)
        losses = train(params, cfg, mnist_batch, functools.partial(loss_and_grads, loss_of=loss_of))
        right = 0
        for k in range(0, len(images), 500):            # the model runs on arrays here
            p = {**params, "x": images[k:k + 500].reshape(-1, 28, 28)}
            logits, _ = transformer_forward(p, residual)
            right += int((logits.argmax(axis=1) == labels[k:k + 500]).sum())
        metrics[name] = right / len(images)
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print(f"\nAccuracy on {len(images)} test images. Rows: without and with residual connections; "
          "a # is 2 %")
    for name, share in metrics.items():
        print(f"    {name:9s}{share:8.2%}  |{'#' * round(50 * share)}|")
    print("\nNext: python autodiff.py mnist --data mnist --layers 4      python transformer.py")
    print_result("mnist", cfg, **metrics, params=size, steps=len(losses),
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


def rule_cases(rng):
    """Inputs of every operation for gradcheck.py; an input has the operation in its name."""
    x, a, b = (rng.standard_normal((3, 5)) for _ in range(3))
    positive = 0.3 + rng.random((3, 5))
    cases = {"add": (a, b), "mul": (a, b), "div": (a, positive), "power": (positive, 2.5),
             "sqrt": (positive,), "exp": (x,), "log": (positive,), "relu": (x,),
             "matmul": (rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 5, 4))),
             "transpose": (rng.standard_normal((2, 3, 5)), 0, 2), "reshape": (x, (5, 3)),
             "broadcast": (rng.standard_normal((3, 1)), (4, 3, 5)), "sum": (x, (0, 1)),
             "mean": (x, -1), "softmax": (x,), "log_softmax": (x,), "normalize": (x,)}
    return [{"op": op, **{f"input {k} of {op}": value for k, value in enumerate(args)}}
            for op, args in cases.items()]


GRADCHECK = {"operation": rule_cases}

CONSTRAINTS = {}

TASKS = {"xor": Task(Config, init_params, make_batch, loss_and_grads, main),
         "tape": Task(Tape, init_mnist, mnist_batch, hand_loss_and_grads, run_tape),
         "mnist": Task(Mnist, init_mnist, mnist_batch, mnist_loss_and_grads, run_mnist)}

if __name__ == "__main__":
    run(TASKS)
