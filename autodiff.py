"""autodiff.py: the chain rule as a program.

Every other lesson derives its backward pass by hand; here the machine does. An expression such as
relu(x W + b) is recorded as a graph of Nodes: each has an operation and inputs, and no value yet.
Every operation has a rule: from the gradient of its output to the gradients of its inputs. Nodes go
in, so Nodes come out: applied from the loss down, the rules build a second graph, that of the
gradients. It is a graph like the first, so it can be differentiated again.

Forward     y = a b             y = a @ b              y = e^x       y = softmax(x)
Backward    da = dout b         da = dout b^T          dx = dout y   dx = y (dout - sum(dout y))
            db = dout a         db = a^T dout          dout: the gradient of y
    broadcast repeats, so its rule sums; sum adds up, so its rule repeats
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
    axes = tuple(k for k, (n, m) in enumerate(zip(dout.shape, ones)) if n != m)
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
    """d loss / d variable for each variable, as Nodes.   cache_of(node): what its rule gets."""
    grads = {loss: apply("ones", cache_of(loss)[1])}
    for node in reversed(topological_order([loss])):
        if node in grads and node.op not in ("input", "ones", "greater"):       # they have no rule
            dinputs = operation_backward(grads[node], cache_of(node))
            for x, dx in zip(node.inputs, dinputs if isinstance(dinputs, tuple) else [dinputs]):
                grads[x] = grads[x] + dx if x in grads else dx
    return [grads[x] if x in grads else cache_of(x)[1] * 0.0 for x in variables]


class Evaluator:
    """Computes outputs of a graph: in topological order, found once, each Node once."""
    def __init__(self, outputs):
        self.outputs, self.order = outputs, topological_order(outputs)
    def __call__(self, inputs):
        value = {}
        for node in self.order:
            args = [value[a] if isinstance(a, Node) else a for a in node.args]
            value[node] = inputs[args[0]] if node.op == "input" else COMPUTE[node.op](*args)
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
def compiled(loss_of, shapes, variables):
    """The graph of a loss and its gradients, built once for inputs of these shapes."""
    nodes = {name: Node("input", name, shape) for name, shape in shapes}
    loss = loss_of(nodes)
    return Evaluator([loss, *gradients(loss, [nodes[name] for name in variables])])


def loss_and_grads(params, batch, cfg, loss_of=xor_loss):
    """Run the graph of a loss -> loss, gradients under the keys of params."""
    arrays = {**params, "x": batch[0], "targets": batch[1]}
    shapes = tuple((name, a.shape) for name, a in arrays.items())
    loss, *grads = compiled(loss_of, shapes, tuple(params))(arrays)
    return loss, dict(zip(params, grads))


# ---- training and demo ---------------------------------------------------------------------------

def sgd_update(params, grads, state, lr):
    """w <- w - lr g."""
    for name, g in grads.items():
        params[name] -= lr * g


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


def train(params, cfg, make_batch=make_batch, loss_and_grads=loss_and_grads, update=sgd_update,
          rate=lambda step, cfg: cfg.lr, note=lambda: ""):
    """Train params in place -> losses. The later parts of the file pass their own functions."""
    state, losses = {}, []
    for step in progress(cfg.steps, losses, note):
        loss, grads = loss_and_grads(params, make_batch(cfg, step), cfg)
        update(params, grads, state, rate(step, cfg))
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
    """Learn XOR, print a backward graph, differentiate a function twice and draw it."""
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
    print("\nNext: python autodiff.py tape      python autodiff.py cost")
    print_result("xor", cfg, accuracy=float(((prob > 0.5) == targets).mean()), loss=losses[-1],
                 second_error=error, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ==== A complete program ends here. Typing along? End it with  main(Config())  and run it. ====
# ==== The rest adds to it: a tape, a transformer on digits, the same by hand, memory; flags. ==

MORE = """
Tasks
    python autodiff.py tape                     define-by-run: a loop that stops by itself
    python autodiff.py cost                     a transformer by hand, tape and graph: time, memory
    python autodiff.py mnist --data mnist       the transformer on rows of digits: 97 %, without
                                                residual connections 94 %; 5 minutes

Break it (what to change, and what comes of it)
    gradients: grads[x] = dx                    XOR is learned all the same, for it uses every Node
                                                once; f'' is wrong by 1.0, for f' uses x twice
    rules: "relu": lambda x: dout               XOR is learned, with loss 0.003 instead of 0.0005:
                                                check gradients instead of looking at the loss
    rules: "mul": lambda a, b: (dout * b, dout)     XOR stays at loss 0.693; f'' is wrong by 3.0
    topological_order: return list(found)       KeyError: the value of an input is not there yet
    xor_logits: without relu                    0.693, with right gradients: the net is linear
    python autodiff.py --hidden 2               75 %: two units are not enough from this start
    python autodiff.py --lr 5                   50 %: after a long step no unit is above 0 any more

Exercises (python gradcheck.py my_autodiff.py checks the rules)
    1. Add tanh to COMPUTE and to the rules. Which rules need neither the inputs nor y?
    2. Differentiate the f of main three and four times. How does the number of Nodes grow?
    3. Two Nodes of the same operation, inputs and attributes have the same value. Compute it once
       in Evaluator: how many Nodes of the fourth derivative are left of 137?

Data
    mnist, a folder with four files:
        for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        curl --create-dirs -o mnist/$f-ubyte.gz \\
            https://ossci-datasets.s3.amazonaws.com/mnist/$f-ubyte.gz; done

Sources of these parts: Abadi et al. 2016 (TensorFlow) and the course CSE 599W of the University of
Washington (graphs), Karpathy 2020 (micrograd) and Paszke et al. 2019 (PyTorch: the tape), Chen et
al. 2016 (recomputation), Vaswani et al. 2017, Loshchilov and Hutter 2019 (AdamW).
"""

import argparse
import contextlib
import ctypes
import gzip
import inspect
import re
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import NamedTuple, get_args

with contextlib.suppress(AttributeError, OSError, TypeError):   # Linux: reuse freed memory, which
    libc = ctypes.CDLL(None)                                    # makes a step up to 3 times faster
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, -1)
    libc.mallopt(-8, 1)                                         # one pool for all threads


# ---- the tape: python autodiff.py tape -----------------------------------------------------------
# Define-then-run: the graph is there before any value. It can be printed, its shapes are checked,
# it can be pruned, freed or rearranged, and it runs many times; but `if` and `while` cannot depend
# on a value, and other shapes need another graph. Define-by-run: a Node has its value at once, and
# what has been computed is kept in order, on a tape. Python's own control flow works, a loop may be
# longer every time; but the tape is recorded anew at every step, and nobody sees it before it ends.

class Taped(Node):
    """A Node with a value. By age, the Nodes of a loss are its tape."""
    def __init__(self, op, *args):
        self.op, self.args, self.age = op, args, next(Node.ages)
        self.inputs = [a for a in args if isinstance(a, Node)]
        self.value = args[0] if op == "input" else COMPUTE[op](*values_of(args))
        self.shape = np.shape(self.value)

    def __bool__(self):
        return bool(self.value)


def values_of(args):
    """Arguments of an operation, with values in place of Nodes."""
    return [a.value if isinstance(a, Node) else a for a in args]


def tape_gradients(loss, variables):
    """As gradients, but the rules get values, so that values come out and nothing is recorded."""
    return gradients(loss, variables, lambda node: (node.op, node.value, *values_of(node.args)))


def tape_loss_and_grads(params, batch, cfg, loss_of=xor_loss):
    """As loss_and_grads: record the tape, read it backwards, forget it."""
    arrays = {**params, "x": batch[0], "targets": batch[1]}
    nodes = {name: Taped("input", array) for name, array in arrays.items()}
    loss = loss_of(nodes)
    return loss.value, dict(zip(params, tape_gradients(loss, [nodes[name] for name in params])))


def newton_sqrt(a):
    """The square root of a by Newton's rule: x <- (x + a / x) / 2 until x^2 = a.   -> x, rounds."""
    x, rounds = a, 0
    while (x * x - a) ** 2 > 1e-20:
        x = (x + a / x) * 0.5
        rounds += 1
    return x, rounds


@dataclass
class Tape(Config):
    """XOR by graph and by tape; derivatives of a loop that stops by itself."""


def run_tape(cfg):
    """Train XOR by graph and by tape; differentiate Newton's square root."""
    start, curves, ms = time.perf_counter(), [], {}
    for name, function in (("graph", loss_and_grads), ("tape", tape_loss_and_grads)):
        params = init_params(cfg, np.random.default_rng(cfg.seed))
        print(f"\nXOR by {name}: layers 2,{cfg.hidden},2, lr {cfg.lr}")
        print(f"chance level: loss {math.log(2):.3f}")
        before = time.process_time()
        curves.append(train(params, cfg, loss_and_grads=function))
        ms[name] = 1000 * (time.process_time() - before) / len(curves[-1])
        if len(curves[-1]) < cfg.steps:                 # Ctrl-C
            break
    difference = float(np.abs(np.subtract(curves[0][:len(curves[-1])], curves[-1])).max())
    print(f"largest difference of the losses: {difference:.0e}; processor time of a step:",
          ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()))

    print("\nNewton's square root, on a tape; rounds: how often the loop ran, which depends on a")
    print("        a  rounds      sqrt    slope  1/(2 sqrt a)   second  -1/(4 a sqrt a)")
    errors = []
    for number in (0.25, 2.0, 9.0, 100.0):
        a = Taped("input", np.array(number))
        x, rounds = newton_sqrt(a)
        [first] = gradients(x, [a])                     # recorded, on the same tape ...
        [second] = tape_gradients(first, [a])           # ... so it can be differentiated
        exact = 0.5 * number ** -0.5, -0.25 * number ** -1.5
        print(f"{number:9.2f}{rounds:8d}{x.value:10.5f}{first.value:9.5f}{exact[0]:14.5f}"
              f"{second:9.5f}{exact[1]:17.5f}")
        errors.append(abs(first.value / exact[0] - 1) + abs(second / exact[1] - 1))
    try:
        newton_sqrt(Node("input", "a", ()))
    except TypeError as error:
        print("The same as a graph:", error)
    print("\nNext: python autodiff.py cost      python autodiff.py tape --hidden 4")
    print_result("tape", cfg, loss=curves[0][-1], difference=difference,
                 slope_error=float(max(errors)), params=sum(p.size for p in params.values()),
                 steps=len(curves[-1]), seconds=time.perf_counter() - start)


# ---- a transformer, written as a forward pass ----------------------------------------------------
# B images, T rows of P pixels as tokens, N = B T, D dim. One head, prenorm; works on Nodes, Taped
# Nodes and arrays. p holds parameters and x, as xor_loss.

def part(params, prefix):
    """The parameters whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in params.items() if name.startswith(prefix)}


def attention_block(x, p, B, residual):
    """Attention, then an MLP, each with or without a residual connection.   x (N, D) -> (N, D)."""
    N, D = x.shape
    y = normalize(x) * p["gamma1"] + p["beta1"]
    q, k, v = (reshape(y @ p["W" + s], (B, N // B, D)) for s in "qkv")
    weights = softmax(q @ transpose(k, 1, 2) * D ** -0.5)           # (B, T, T)
    y = reshape(weights @ v, (N, D)) @ p["Wo"] + p["bo"]
    x = x + y if residual else y
    y = normalize(x) * p["gamma2"] + p["beta2"]
    y = relu(y @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]
    return x + y if residual else y


def transformer_states(p, residual):
    """x (B, T, P) -> the embedded tokens (N, D), and what each block makes of them: a list."""
    (B, T, P), D = p["x"].shape, p["bp"].shape[0]
    x = reshape(p["x"], (B * T, P)) @ p["Wp"] + p["bp"]
    states = [reshape(reshape(x, (B, T, D)) + p["P"], (B * T, D))]
    for i in range(sum(name.endswith(".Wq") for name in p)):
        states.append(attention_block(states[-1], part(p, f"{i}."), B, residual))
    return states


def pooled_logits(x, p):
    """The mean of an image's tokens, classified.   x (N, D) -> logits (B, 10)."""
    B, D = p["x"].shape[0], x.shape[1]
    x = reshape(normalize(x) * p["gamma"] + p["beta"], (B, -1, D))
    return reshape(mean(x, 1), (B, D)) @ p["Wy"] + p["by"]


def transformer_logits(p, residual):
    """x (B, T, P) -> logits (B, 10)."""
    return pooled_logits(transformer_states(p, residual)[-1], p)


def plain_loss(p):
    """Without residual connections: what a block has not passed on is lost."""
    return cross_entropy(transformer_logits(p, False), p["targets"])


def residual_loss(p):
    """With residual connections."""
    return cross_entropy(transformer_logits(p, True), p["targets"])


@dataclass
class Mnist:
    """Classify handwritten digits, row by row, without and with residual connections."""
    layers: int = 2         # transformer blocks
    dim: int = 64           # embedding dimension
    batch_size: int = 64    # images per step
    steps: int = 1500       # optimizer steps
    lr: float = 0.002       # peak learning rate
    warmup: int = 100       # steps of linear warmup
    weight_decay: float = 0.01  # AdamW weight decay
    data: str = ""          # folder with the four files of MNIST
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
    with mean 0 and variance 1, labels (N,).   Without a folder noise, for gradient checks.
    Raises InputError."""
    if not folder:
        noise = np.random.default_rng(0).standard_normal((1000, 784)).astype(np.float32)
        return dict.fromkeys(("train", "validation", "test"), (noise, np.arange(1000) % 10))
    flag, parts = f"--data {folder}", {}
    for prefix in ("train", "t10k"):
        for kind, ndim in (("images", 3), ("labels", 1)):       # mirrors name them .idx3-ubyte, too
            paths = sorted(Path(folder).glob(f"{prefix}-{kind}?idx{ndim}-ubyte*"))
            expected = f"a folder with {prefix}-{kind}-idx{ndim}-ubyte.gz"
            require(paths, flag, expected, "no such file")
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
    """Wp (28, D), bp, P (28, D): embedding of rows and positions; "0.Wq", ... in block 0: gamma1,
    beta1, Wq, Wk, Wv, Wo, bo, gamma2, beta2, W1, b1, W2, b2; gamma, beta, Wy, by."""
    D, params = cfg.dim, {}
    sizes = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "1": (D, 4 * D), "2": (4 * D, D)}
    layers = {f"{i}.W{name}": size for i in range(cfg.layers) for name, size in sizes.items()}
    for name, (n, m) in {"Wp": (28, D), **layers, "Wy": (D, 10)}.items():
        params[name] = rng.standard_normal((n, m)) * (2 / (n + m)) ** 0.5
        if name[-1] not in "qkv":                       # these projections have no bias
            params[name.replace("W", "b")] = np.zeros(m)
    for name in [f"{i}.gamma{k}" for i in range(cfg.layers) for k in "12"] + ["gamma"]:
        params[name], params[name.replace("gamma", "beta")] = np.ones(D), np.zeros(D)
    params["P"] = 0.02 * rng.standard_normal((28, D))
    return {name: value.astype(dtype) for name, value in params.items()}


def mnist_batch(cfg, step, dtype=np.float32):
    """Random training images.   -> rows (B, 28, 28), one-hot targets (B, 10)."""
    rng = np.random.default_rng((cfg.seed, step))
    images, labels = load_mnist(cfg.data)["train"]
    pick = rng.integers(0, len(images), cfg.batch_size)
    return images[pick].reshape(-1, 28, 28).astype(dtype), np.eye(10, dtype=dtype)[labels[pick]]


def mnist_loss_and_grads(params, batch, cfg):
    """Loss, gradients of the form with residual connections."""
    return loss_and_grads(params, batch, cfg, residual_loss)


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


def accuracy_of(params, residual, images, labels):
    """The share of images (N, 784) that are classified right; the model runs on arrays here."""
    right = 0
    for k in range(0, len(images), 500):
        x = images[k:k + 500].reshape(-1, 28, 28)
        logits = transformer_logits({**params, "x": x}, residual)
        right += int((logits.argmax(axis=1) == labels[k:k + 500]).sum())
    return right / len(images)


def run_mnist(cfg):
    """Train without and with residual connections; report the accuracy on the test images."""
    start = time.perf_counter()
    require(cfg.data, "--data", "the folder of MNIST (--help says where to get it)", cfg.data)
    data, metrics = load_mnist(cfg.data), {}
    images, labels = data["validation"]
    update = functools.partial(adamw_update, weight_decay=cfg.weight_decay)
    for name, loss_of in (("plain", plain_loss), ("residual", residual_loss)):
        params = init_mnist(cfg, np.random.default_rng(cfg.seed))
        size = sum(p.size for p in params.values())
        print(f"\n{name}: {len(data['train'][0])} images of 28 rows, {cfg.layers} layers, one head,"
              f" dim {cfg.dim}, {size} parameters")
        print("chance level: loss 2.303")
        accuracy = functools.partial(accuracy_of, params, loss_of is residual_loss)
        function = functools.partial(loss_and_grads, loss_of=loss_of)
        losses = train(params, cfg, mnist_batch, function, update, learning_rate, lambda: (
            f"  validation {accuracy(images[:1000], labels[:1000]):.1%}"))
        metrics[name] = accuracy(*data["test"])
        if len(losses) < cfg.steps:                     # Ctrl-C
            break
    print(f"\nAccuracy on {len(data['test'][0])} test images; rows are the two forms, a # is 2 %")
    for name, share in metrics.items():
        print(f"    {name:9s}{share:8.2%}  |{'#' * round(50 * share)}|")
    print("\nNext: python autodiff.py mnist --data mnist --layers 4      python transformer.py")
    print_result("mnist", cfg, **metrics, params=size, steps=len(losses),
                 seconds=time.perf_counter() - start)


# ---- the same by hand ----------------------------------------------------------------------------
# Operations of transformer.py, for the transformer with residual connections, to compare with.

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


def attention_forward(q, k, v, mask=True):
    """out = p v, p = softmax(q k^T / sqrt(d)) over the positions where mask is True.
    q (B, H, T, d), k, v (B, H, S, d), mask fit for (B, H, T, S) -> out (B, H, T, d)."""
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5  # (B, H, T, S)
    scores = np.where(mask, scores, -1e9)
    p = np.exp(scores - scores.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    return p @ v, (q, k, v, p)


def attention_backward(dout, cache):
    """As causal_attention_backward: where the mask has made p 0, ds is 0."""
    q, k, v, p = cache
    dv = p.swapaxes(2, 3) @ dout
    dp = dout @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(axis=3, keepdims=True))
    ds *= q.shape[3] ** -0.5
    return ds @ k, ds.swapaxes(2, 3) @ q, dv


def relu_forward(x):
    """y = max(x, 0), entry by entry."""
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    """dx = dout where x > 0, else 0."""
    x = cache
    return dout * (x > 0)


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


def hand_block_forward(x, p, B):
    """attention_block with residual connections.   x (N, D) -> (N, D)."""
    y, norm1 = layernorm_forward(x, p["gamma1"], p["beta1"])
    qkv, projections = zip(*(linear_forward(y, p["W" + s], 0) for s in "qkv"))
    y, attention = attention_forward(*(z.reshape(B, 1, -1, x.shape[1]) for z in qkv))
    y, out = linear_forward(y.reshape(x.shape), p["Wo"], p["bo"])
    x = x + y
    y, norm2 = layernorm_forward(x, p["gamma2"], p["beta2"])
    y, up = linear_forward(y, p["W1"], p["b1"])
    y, active = relu_forward(y)
    y, down = linear_forward(y, p["W2"], p["b2"])
    return x + y, (norm1, projections, attention, out, norm2, up, active, down)


def hand_block_backward(dout, cache):
    """hand_block_forward from bottom to top; x is used twice, gradients add.   -> dx, gradients."""
    (norm1, projections, attention, out, norm2, up, active, down), g = cache, {}
    dy, g["W2"], g["b2"] = linear_backward(dout, down)
    dy = relu_backward(dy, active)
    dy, g["W1"], g["b1"] = linear_backward(dy, up)
    dy, g["gamma2"], g["beta2"] = layernorm_backward(dy, norm2)
    dout = dout + dy
    dy, g["Wo"], g["bo"] = linear_backward(dout, out)
    dqkv = attention_backward(dy.reshape(attention[0].shape), attention)
    dy = 0                                              # y is used three times
    for s, dz, projection in zip("qkv", dqkv, projections):
        dx, g["W" + s], _ = linear_backward(dz.reshape(dout.shape), projection)
        dy = dy + dx
    dy, g["gamma1"], g["beta1"] = layernorm_backward(dy, norm1)
    return dout + dy, g


def hand_loss_and_grads(params, batch, cfg):
    """Loss of residual_loss, and gradients by hand-derived formulas."""
    (x, targets), caches, p = batch, [], params
    (B, T, P), D, grads = x.shape, cfg.dim, {}
    x, embedding = linear_forward(x.reshape(B * T, P), p["Wp"], p["bp"])
    x = (x.reshape(B, T, D) + p["P"]).reshape(B * T, D)
    for i in range(cfg.layers):
        x, cache = hand_block_forward(x, part(p, f"{i}."), B)
        caches.append(cache)
    x, norm = layernorm_forward(x, p["gamma"], p["beta"])
    logits, last = linear_forward(x.reshape(B, T, D).mean(axis=1), p["Wy"], p["by"])
    loss, loss_cache = softmax_cross_entropy_forward(logits, targets.argmax(axis=1))

    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    dx, grads["Wy"], grads["by"] = linear_backward(dlogits, last)
    dx = np.repeat(dx / T, T, axis=0)                   # the mean of T tokens
    dx, grads["gamma"], grads["beta"] = layernorm_backward(dx, norm)
    for i in reversed(range(cfg.layers)):
        dx, g = hand_block_backward(dx, caches[i])
        grads.update({f"{i}.{name}": value for name, value in g.items()})
    grads["P"] = dx.reshape(B, T, D).sum(axis=0)
    _, grads["Wp"], grads["bp"] = linear_backward(dx, embedding)
    return loss, grads


# ---- memory and cost: python autodiff.py cost ----------------------------------------------------
# Rules need values of the forward pass, which are kept until then: that is the memory of training.
# A graph tells beforehand when a value is used for the last time. What has been forgotten can be
# computed again from a few values that are kept (Griewank and Walther 2008, chapter 12). The tape
# keeps what it has recorded, and every gradient, until the step ends.

class FreeingEvaluator(Evaluator):
    """As Evaluator, but a value is forgotten after its last use."""
    def __init__(self, outputs):
        super().__init__(outputs)
        self.last = {x: node for node in self.order for x in node.inputs}

    def __call__(self, inputs):
        value = {}
        for node in self.order:
            args = [value[a] if isinstance(a, Node) else a for a in node.args]
            value[node] = inputs[args[0]] if node.op == "input" else COMPUTE[node.op](*args)
            for x in {*node.inputs}.difference(self.outputs):
                if self.last[x] is node:
                    del value[x]
        return [value[node] for node in self.outputs]


def recomputed_gradients(loss, variables, keep):
    """As gradients, but the rules get copies of the Nodes of the forward pass, computed from those
    in keep. A copy is made when a rule needs it: so it is younger than the backward pass so far."""
    copies = {x: x for x in keep}

    def copy_of(a):
        if isinstance(a, Node) and a.inputs and a not in copies:
            copies[a] = Node(a.op, *map(copy_of, a.args))
        return copies.get(a, a) if isinstance(a, Node) else a
    return gradients(loss, variables, lambda node: (node.op, *map(copy_of, (node, *node.args))))


def peak_memory(function, *args):
    """-> the largest number of bytes that function(*args) holds at a time."""
    tracemalloc.start()
    function(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@dataclass
class Cost:
    """Gradients of a transformer by hand, graph and tape: equality, time, memory."""
    layers: int = 4         # transformer blocks
    dim: int = 64           # embedding dimension
    batch_size: int = 32    # images
    repeats: int = 10       # runs of each way, of which the fastest counts
    seed: int = 0           # random seed


def noise_batch(cfg, step, dtype=np.float32):
    """Noise in the shape of MNIST.   -> rows (B, 28, 28), one-hot targets (B, 10)."""
    rng = np.random.default_rng((cfg.seed, step))
    x = rng.standard_normal((cfg.batch_size, 28, 28)).astype(dtype)
    return x, np.eye(10, dtype=dtype)[rng.integers(0, 10, cfg.batch_size)]


def ways_of(params, batch):
    """The ways to compute loss and gradients -> {name: function of params, batch}."""
    arrays = {**params, "x": batch[0], "targets": batch[1]}
    nodes = {name: Node("input", name, a.shape) for name, a in arrays.items()}
    states = transformer_states(nodes, True)
    loss = cross_entropy(pooled_logits(states[-1], nodes), nodes["targets"])
    variables = [nodes[name] for name in params]
    outputs = [loss, *gradients(loss, variables)]
    again = [loss, *recomputed_gradients(loss, variables, states)]

    def by(evaluator):
        def function(params, batch, cfg):
            loss, *grads = evaluator({**params, "x": batch[0], "targets": batch[1]})
            return loss, dict(zip(params, grads))
        return function
    return {"by hand": hand_loss_and_grads,
            "tape": functools.partial(tape_loss_and_grads, loss_of=residual_loss),
            "graph, all values kept": by(Evaluator(outputs)),
            "graph, freed after last use": by(FreeingEvaluator(outputs)),
            "graph, blocks recomputed": by(FreeingEvaluator(again))}


def numeric_error(params, grads, batch, cfg, h=1e-7):
    """The largest relative error of gradients on a random step in each array, against central
    differences of the loss."""
    rng, errors = np.random.default_rng(cfg.seed), []
    arrays = {**params, "x": batch[0], "targets": batch[1]}
    for name, w in params.items():
        step = rng.standard_normal(w.shape)
        up, down = (residual_loss({**arrays, name: w + sign * step}) for sign in (h, -h))
        slope, numeric = float((grads[name] * step).sum()), float(up - down) / (2 * h)
        errors.append(abs(slope - numeric) / (abs(slope) + abs(numeric) + 1e-3))
    return max(errors)


def run_cost(cfg):
    """Compare the ways: their gradients in float64, their time and memory in float32."""
    start, batch = time.perf_counter(), noise_batch(cfg, 1, np.float64)
    params = init_mnist(cfg, np.random.default_rng(cfg.seed), np.float64)
    size = sum(p.size for p in params.values())
    print(f"A transformer of {cfg.layers} layers, one head, dim {cfg.dim}, {size} parameters, on "
          f"{cfg.batch_size} images of 28 rows")
    ways, differences = ways_of(params, batch), {}
    _, right = hand_loss_and_grads(params, batch, cfg)
    for way, function in ways.items():
        _, grads = function(params, batch, cfg)
        differences[way] = max(float(np.abs(g - right[name]).max()) for name, g in grads.items())
    few = tuple(a[:2] for a in batch)
    error = numeric_error(params, hand_loss_and_grads(params, few, cfg)[1], few, cfg)
    print(f"central differences on 2 images: largest relative error {error:.0e}")

    params = {name: w.astype(np.float32) for name, w in params.items()}
    batch = noise_batch(cfg, 1)
    seconds = {way: [] for way in ways}
    for way, function in cfg.repeats * list(ways.items()):
        before = time.process_time()
        function(params, batch, cfg)
        seconds[way].append(time.process_time() - before)
    memory = {way: peak_memory(function, params, batch, cfg) for way, function in ways.items()}
    print("\nRows: ways to loss and gradients. Columns: largest difference from the gradients by"
          "\nhand; processor time, also as a multiple; memory at its peak, also as a multiple")
    fastest, metrics = {way: min(times) for way, times in seconds.items()}, {}
    for name, way in zip(("hand", "tape", "kept", "freed", "recomputed"), ways):
        metrics[f"time_{name}"] = slower = fastest[way] / fastest["by hand"]
        metrics[f"memory_{name}"] = larger = memory[way] / memory["by hand"]
        print(f"{way:29s}{differences[way]:9.0e}{1000 * fastest[way]:9.1f} ms{slower:6.2f}"
              f"{memory[way] / 1e6:9.1f} MB{larger:6.2f}")
    print("\nNext: python autodiff.py cost --layers 8      python autodiff.py mnist --data mnist")
    print_result("cost", cfg, difference=max(differences.values()), numeric_error=error, **metrics,
                 params=size, seconds=time.perf_counter() - start)


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


GRADCHECK = {"operation": rule_cases, "attention": "q 2 3 5 6, k 2 3 7 6, v 2 3 7 6"}

CONSTRAINTS = {}

TASKS = {"xor": Task(Config, init_params, make_batch, loss_and_grads, main),
         "tape": Task(Tape, init_params, make_batch, tape_loss_and_grads, run_tape),
         "cost": Task(Cost, init_mnist, noise_batch, hand_loss_and_grads, run_cost),
         "mnist": Task(Mnist, init_mnist, mnist_batch, mnist_loss_and_grads, run_mnist)}

if __name__ == "__main__":
    run(TASKS)
