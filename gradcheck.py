# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""gradcheck.py: is this derivative right?  Ask the function itself.

The slope of f at x is nearly (f(x + h) - f(x - h)) / 2h. Nobody would train with that, because it takes two runs of the
forward pass for every single number; but it needs no derivation, so it can tell whether yours is right.

Why both sides? One side, (f(x + h) - f(x)) / h, is off by about h f''/2; with both that cancels, h^2 f'''/6 is left.
Why h = 1e-5? A smaller h makes that error smaller, but the two values of f then agree in ever more digits, and what is
left of their difference is rounding: about 1e-16 |f| / h. Both errors are about 1e-11 at h = 1e-5, in float64. (In
float32 no h is good. That is why every lesson takes a dtype.)
Why relative error? A slope of 1000 that is off by 0.001 is right, a slope of 0.001 that is off by 0.001 is not.
Why a random projection? An operation has many outputs, a slope belongs to a single number. So the outputs are summed
with random weights R, f = sum(out * R); R is then just the dout that backward gets. With weights of 1 instead, many a
wrong backward passes: the outputs of a softmax, for one, always add up to 1, and the slope of that is 0.

    python gradcheck.py                      every lesson: each operation, then each whole model, end to end
    python gradcheck.py lstm.py              one lesson
    python gradcheck.py ~/my_lstm.py         your own copy, finished or not: which gradient is wrong, and which line;
                                             and where its values are not the lesson's
    python gradcheck.py --teeth mlp.py       is the checker any good? plant bugs in every backward; each must be caught

A file is checked by the names in it. Every op_backward(dout, cache) needs an op_forward(inputs) -> (out, cache); it
returns the gradients of the inputs in forward's order, without those of integers, flags and data. How to call the
operations of the lessons stands below, in CASES; for one of your own, say it in your file, sizes different, above 1:
    GRADCHECK = {"my_op": lambda rng: dict(x=rng.standard_normal((3, 4)), w=rng.standard_normal(4))}
"""
import argparse
import ast
import contextlib
import copy
import difflib
import inspect
import io
import itertools
import linecache
import signal
import sys
import time
import tokenize
import traceback
import types
import warnings
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np


def numeric_gradient(f, x, entries=None, h=1e-5):
    """Slope of f() by every entry of x, or by the given ones: move the entry both ways, look, move it back."""
    slopes, middle = [], f()
    for i in entries if entries is not None else np.ndindex(x.shape):
        keep = x[i]
        x[i] = keep + h
        up = f()
        x[i] = keep - h
        down = f()
        x[i] = keep
        slopes.append((up - down) / (2 * h))
        if abs(up - 2 * middle + down) / h > 1e-3 * (1 + abs(slopes[-1])):
            raise Kink(f"the slopes to the left and to the right of {keep:.4f} differ")
    return np.array(slopes).reshape(x.shape if entries is None else -1)


def relative_error(a, n, size):
    """|a - n| / (|a| + |n| + floor); the floor is 1e-3 of the size of f: rounding errors are 1e-11 or so of it."""
    return np.abs(a - n) / (np.abs(a) + np.abs(n) + 1e-3 * max(1.0, size))


TOLERANCE = 1e-6
LESSONS = ["perceptron.py", "mlp.py", "vanilla_rnn.py", "lstm.py", "seq2seq.py", "attention.py", "nested_attention.py",
           "cnn.py", "transformer.py", "mae.py"]


class Kink(Exception):
    """f bends sharply here (relu at 0, a tie in a maximum): it has no slope to compare with, so draw other numbers."""


class Failure(Exception):
    """A gradient, or a check that could not have failed. args: what is wrong, hints (a list)."""


# ---- how to call the operations: one case or more, by name -----------------------------------------------------------

STEPS = ("clip_norm", "clip_value", "learning_rate", "rate_at", "work_through")  # what turns gradients into training
DATA = {"targets", "running", "mask", "memory_mask", "features"}   # inputs by these names get no gradient


def normal(*shape):
    """A case's input: standard normal numbers of this shape."""
    return lambda rng: rng.standard_normal(shape)


def integers(high, *shape):
    """A case's input: integers from 0 to high - 1."""
    return lambda rng: rng.integers(0, high, shape)


def gates(T, B, *names):
    """A case's input: a dict of standard normal numbers, for every name (T, B) of them."""
    return lambda rng: {name: rng.standard_normal((T, B)) for name in names}


def padding(rng):
    """A case's input: which of 5 steps of 3 sequences count; one sequence counts as a whole, one hardly."""
    return np.arange(5)[:, None, None] < np.array([5, 1, 3])[:, None]


def weights(D, K=0, norm=""):
    """A case's input: the parameters of an attention of width D or, with K, of a feed-forward net; and of a norm."""
    shapes = dict(W1=(D, K), b1=K, W2=(K // (2 if "swiglu" in norm else 1), D), b2=D) if K else dict(
        Wqkv=(D, 3 * D), bqkv=3 * D, Wo=(D, D), bo=D)
    shapes.update({"layer": dict(gamma=D, beta=D), "rms": dict(gamma=D)}.get(norm.split()[0] if norm else "", {}))
    return lambda rng: {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def block_weights(D, K, norm, *names):
    """A case's input: the parameters of a block: attn, cross if it is among the names, feed."""
    return lambda rng: {f"{name}.{key}": value for name in ("attn", *names, "feed")
                        for key, value in weights(D, K * (name == "feed"), norm)(rng).items()}


def pointer_weights(D):
    """A case's input: the parameters of a pointer of width D."""
    shapes = dict(Wq=(D, D), bq=D, Wk=(2 * D, D), bk=D)
    return lambda rng: {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def vit_weights(D):
    """A case's input: the parameters of a block of width D that has a name for each."""
    shapes = dict(Wqkv=(D, 3 * D), bqkv=3 * D, Wo=(D, D), bo=D, W1=(D, 4 * D), b1=4 * D, W2=(4 * D, D), b2=D,
                  gamma1=D, beta1=D, gamma2=D, beta2=D)
    return lambda rng: {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def permutations(rng, N, T):
    """N orders of T places, one a row."""
    return rng.random((N, T)).argsort(axis=1)


def future(rng):
    """A case's input: the mask of 5 positions, the last of 7, which must not look ahead."""
    return np.where(np.arange(7) > np.arange(2, 7)[:, None], -1e9, 0.0)


def ended(rng):
    """A case's input: the mask of 2 sequences of 7 of which one ends after 3."""
    return np.where(np.arange(7) < np.array([3, 7])[:, None, None, None], 0.0, -1e9)


def places(rng):
    """A case's input: which of 5 places of 3 sequences count; in one all, in one two, in one none at all."""
    return np.arange(5) < np.array([5, 2, 0])[:, None]


TWINS = {"conv": "conv_loop"}    # the fast one, and the one that reads like the definition
CONV = [dict(x=normal(2, H, W, c), W=normal(k, k, c // groups, m), stride=stride, padding=padding, dilation=dilation,
             groups=groups)
        for H, W, c, m, k, stride, padding, dilation, groups in (
            (5, 4, 3, 2, 3, 1, 1, 1, 1), (6, 5, 2, 3, 3, 2, 1, 1, 1), (7, 5, 2, 3, 2, 1, 0, 2, 1),
            (5, 4, 4, 6, 3, 1, 1, 1, 2), (8, 7, 3, 3, 3, 2, 2, 2, 3), (5, 6, 2, 3, 1, 2, 0, 1, 1),
            (7, 6, 6, 4, 2, 3, 3, 1, 2), (4, 5, 3, 2, 2, 1, 2, 1, 1))]

CASES = {   # by name: a list of cases; a case: its inputs in forward's order, functions of rng or fixed values
    "linear": [dict(x=normal(3, 4), W=normal(4, 5), b=normal(5))],
    "relu": [dict(x=normal(3, 4))],
    "sigmoid": [dict(x=normal(3, 4))],
    "tanh": [dict(x=normal(3, 4))],
    "gelu": [dict(x=normal(3, 4))],
    "silu": [dict(x=normal(3, 4))],
    "batchnorm": [dict(x=normal(6, 4), gamma=normal(4), beta=normal(4)),
                  dict(x=normal(6, 4), gamma=normal(4), beta=normal(4),
                       running=lambda rng: (rng.standard_normal(4), rng.uniform(0.5, 2, 4)))],
    "embedding": [dict(ids=integers(5, 3, 4), E=normal(5, 2))],
    "penalty": [dict(W=normal(3, 4), l1=0.3, l2=0.2)],
    "mse": [dict(z=normal(3, 4), targets=normal(3, 4))],
    "binary_cross_entropy": [dict(z=normal(3, 4), targets=lambda rng: rng.integers(0, 2, (3, 4)).astype(float))],
    "softmax_cross_entropy": [dict(z=normal(3, 4), targets=integers(4, 3))],
    "rnn": [dict(z=normal(5, 3, 4), h0=normal(3, 4), Wh=normal(4, 4), mask=mask) for mask in (None, padding)],
    "lstm": [dict(z=normal(5, 3, 8), h0=normal(3, 2), c0=normal(3, 2), Wh=normal(2, 8), mask=mask)
             for mask in (None, padding)],
    "project_symbols": [dict(ids=integers(6, 5, 3), E=normal(6, 4), Wx=normal(4, 2), b=normal(2))],
    "symbol_lstm": [dict(ids=integers(6, 5, 3), E=normal(6, 4), Wx=normal(4, 8), b=normal(8), h0=normal(3, 2),
                         c0=normal(3, 2), Wh=normal(2, 8), mask=mask) for mask in (None, padding)],
    "masked_softmax": [dict(scores=normal(2, 3, 5), mask=places)],
    "dot_attention": [dict(q=normal(2, 3, 4), keys=normal(3, 5, 4), values=normal(3, 5, 6), mask=places)],
    "additive_attention": [dict(q=normal(2, 3, 4), keys=normal(3, 5, 4), u=normal(4), values=normal(3, 5, 6),
                                mask=places)],
    "bahdanau": [dict(z=normal(4, 3, 8), h0=normal(3, 2), c0=normal(3, 2), Wh=normal(2, 8), Wc=normal(6, 8),
                      Wq=normal(2, 7), u=normal(7), keys=normal(3, 5, 7), values=normal(3, 5, 6), mask=places)],
    "gru": [dict(z=normal(5, 3, 6), h0=normal(3, 2), Wh=normal(2, 6), bn=normal(2), mask=mask)
            for mask in (None, padding)],
    "conv_loop": CONV,
    "conv": CONV,
    "bias": [dict(x=normal(2, 3, 4, 5), b=normal(5))],
    "maxpool": [dict(x=normal(2, 6, 4, 3)), dict(x=normal(2, 6, 9, 4), size=3), dict(x=normal(2, 5, 7, 3))],
    "avgpool": [dict(x=normal(2, 6, 4, 3)), dict(x=normal(2, 6, 9, 4), size=3), dict(x=normal(2, 5, 7, 3))],
    "globalpool": [dict(x=normal(2, 5, 4, 3))],
    "channelnorm": [dict(x=normal(3, 4, 2, 5), gamma=normal(5), beta=normal(5)),
                    dict(x=normal(3, 4, 2, 5), gamma=normal(5), beta=normal(5),
                         running=lambda rng: (rng.standard_normal(5), rng.uniform(0.5, 2, 5)))],
    "groupnorm": [dict(x=normal(2, 5, 3, 6), gamma=normal(6), beta=normal(6), groups=3),
                  dict(x=normal(3, 2, 4, 2), gamma=normal(2), beta=normal(2), groups=1)],
    "gd": [dict(M=normal(3, 4, 5), k=normal(3, 5), e=normal(3, 4), eta=normal(3), alpha=normal(3))],
    "momentum": [dict(M=normal(3, 4, 5), S=normal(3, 4, 5), k=normal(3, 5), e=normal(3, 4), eta=normal(3),
                      alpha=normal(3), mu=normal(3))],
    "adam": [dict(M=normal(3, 4, 5), m=normal(3, 4, 5), s=lambda rng: rng.uniform(0.5, 2, (3, 4, 5)), k=normal(3, 5),
                  e=normal(3, 4), eta=normal(3), alpha=normal(3), t=t, beta1=beta1, beta2=0.7)
             for t, beta1 in ((1, 0.6), (3, 0.6), (2, 0.2))],
    "dgd": [dict(M=normal(3, 4, 5), k=normal(3, 5), e=normal(3, 4), eta=normal(3), alpha=normal(3))],
    "memory": [dict(k=normal(4, 3, 2), q=normal(4, 3, 2), v=normal(4, 3, 5),
                    gates=gates(4, 3, *names, *["mu"] * (rule == "momentum")), M0=normal(5, 2), rule=rule,
                    objective=objective, betas=(beta1, 0.7))
               for rule, beta1 in (("hebb", 0.0), ("delta", 0.0), ("momentum", 0.0), ("adam", 0.6), ("adam", 0.0),
                                   ("dgd", 0.0))
               for objective in ("l2", "dot") for names in (("eta", "alpha"), ("eta",), ())],
    "cms": [dict(k=normal(T, 3, 2), v=normal(T, 3, 5), eta=normal(len(periods)), alpha=normal(len(periods)),
                 w=normal(len(periods)), periods=periods)
            for T, periods in ((7, [1, 2, 3]), (6, [3, 1]), (5, [2, 2, 5]), (4, [1]), (8, [4, 3, 2, 1]))],
    "unit": [dict(x=normal(3, 4))],
    "gate": [dict(features=normal(3, 4, 2), c=normal(2))],
    "scale": [dict(x=normal(3, 4), s=normal(1))],
    "layernorm": [dict(x=normal(3, 4), gamma=normal(4), beta=normal(4))],
    "rmsnorm": [dict(x=normal(3, 4), gamma=normal(4))],
    "dropout": [dict(x=normal(3, 4), keep=lambda rng: np.arange(12).reshape(3, 4) % 3 > 0, rate=0.25)],
    "rotary": [dict(x=normal(2, 5, 3, 4), turn=lambda rng: tuple(rng.standard_normal((2, 5, 1, 2))))],
    "attention": [dict(q=normal(2, 5, 3, 4), k=normal(2, 7, 3, 4), v=normal(2, 7, 3, 4), mask=mask)
                  for mask in (None, future, ended)],
    "multihead": [dict(x=normal(14, 6), p=weights(6), heads=3, B=2, mask=ended),
                  dict(x=normal(14, 6), p=weights(6), heads=3, B=2, mask=None, memory=None,
                       turn=lambda rng: tuple(rng.standard_normal((2, 7, 1, 1)))),
                  dict(x=normal(10, 6), p=weights(6), heads=3, B=2, mask=future, memory=normal(14, 6))],
    "swiglu": [dict(x=normal(3, 8))],
    "feed": [dict(x=normal(3, 4), p=weights(4, 6, "swiglu" * (feed == "swiglu")), activation=feed)
             for feed in ("gelu", "relu", "swiglu")],
    "block": [dict(x=normal(10, 4), p=block_weights(4, 6, f"{norm} {feed}", *["cross"] * memory), heads=2, B=2,
                   mask=None, memory=normal(14, 4) if memory else None, memory_mask=ended if memory else None,
                   turn=None, keep=None if rate == 0 else lambda rng, n=2 + memory: rng.random((n, 10, 4)) > 0.3,
                   rate=rate, norm=norm, activation=feed, order=order)
              for memory, norm, feed, order, rate in (
                  (True, "layer", "gelu", "pre", 0.3), (True, "rms", "swiglu", "post", 0.0),
                  (False, "layer", "relu", "post", 0.3), (False, "rms", "gelu", "pre", 0.0))],
    "lookup": [dict(ids=integers(5, 3, 4), E=normal(5, 2)), dict(ids=integers(50, 3, 4), E=normal(50, 2))],
    "project": [dict(x=normal(3, 4), E=normal(5, 4))],
    "smoothed_cross_entropy": [dict(z=normal(3, 4), targets=integers(4, 3), smoothing=s) for s in (0.0, 0.3)],
    "pointer": [dict(x=normal(10, 3), memory=normal(14, 3), p=pointer_weights(3), B=2, mask=mask)
                for mask in (None, normal(2, 1, 1, 7))],
    "copy_cross_entropy": [dict(z=normal(4, 5 + 6), targets=integers(5, 4), source=integers(5, 4, 6), smoothing=s)
                           for s in (0.0, 0.3)],
    "vit_block": [dict(x=normal(10, 4), p=vit_weights(4), heads=2, N=2),
                  dict(x=normal(6, 3), p=vit_weights(3), heads=1, N=3)],
    "gather": [dict(x=normal(3, 5, 4), places=lambda rng: permutations(rng, 3, 5)[:, :2])],
    "scatter": [dict(x=normal(3, 2, 4), token=normal(4), order=lambda rng: permutations(rng, 3, 5))],
}


def cases_of(module, name):
    """The cases of an operation, functions of rng: those that the file itself brings, if any, else ours."""
    own = getattr(module, "GRADCHECK", {}).get(name)
    if own is None:
        return [lambda rng, case=case: {k: v(rng) if callable(v) else v for k, v in case.items()}
                for case in CASES.get(name, [])]

    def made(rng):
        try:
            cases = own(rng)
            cases = cases if isinstance(cases, list) else [cases]
            assert cases and all(isinstance(case, dict) for case in cases)
        except Exception as error:
            raise Failure(f"GRADCHECK[{name!r}] should be a function of rng that returns the inputs by name, in a dict",
                          [f"it raises {type(error).__name__}: {error}"] if str(error) else []) from error
        return cases
    return [lambda rng, k=k: made(rng)[k] for k in range(len(made(np.random.default_rng(0))))]


# ---- one operation ---------------------------------------------------------------------------------------------------

def check_operation(module, name, make_case, seed=0):
    """Compare op_backward with numeric slopes on one case -> worst relative error; raises Failure."""
    for attempt in range(20):
        try:
            rng = np.random.default_rng(seed + attempt)
            return check_once(module, name, make_case(rng), rng)
        except Kink as error:
            reason = error
    raise Failure(f"{name}: no slope to compare with after 20 draws: {reason}", [])


def check_once(module, name, case, rng):
    """check_operation on given inputs; raises Kink where there is no slope."""
    forward, backward = getattr(module, name + "_forward"), getattr(module, name + "_backward")
    args = list(case.values())
    for k, v in case.items():
        if isinstance(v, np.ndarray) and v.dtype.kind == "f":
            sound(v, np.float64, f"{name}, the case's input {k}")
    before = copy.deepcopy(args)
    out, cache = call(forward, args, 2)
    outs = out if isinstance(out, tuple) else (out,)
    for o in outs:
        sound(np.asarray(o), np.float64, f"{name}_forward: out")
    R = [rng.standard_normal(np.shape(o)) if np.ndim(o) else float(rng.standard_normal()) for o in outs]
    held = copy.deepcopy((R, cache))
    grads = call(backward, [*R, cache])
    for what, now, then in (("an input of forward", args, before), ("dout", R, held[0]), ("the cache", cache, held[1])):
        if not same(now, then):
            raise Failure(f"{name}: {what} was changed on the way; operations only read what they are given", [])
    if not same(grads, call(backward, [*R, cache])):
        raise Failure(f"{name}_backward: a second call with the same cache gives another result", [])

    wanted = [k for k, a in case.items() if k not in DATA and floats(a)]
    if grads is None:
        raise Failure(f"{name}_backward returns None: is its return missing?", [])
    grads = grads if isinstance(grads, tuple) else (grads,)
    if len(grads) != len(wanted):
        expected = f"expected {len(wanted)}: {', '.join(wanted)}"
        raise Failure(f"{name}_backward: returns {len(grads)} gradient(s), {expected}", [])
    pairs = {}                                          # label -> input, gradient; a dict of parameters is taken apart
    for k, g in zip(wanted, grads):
        if isinstance(case[k], dict):
            if not isinstance(g, dict) or set(g) != set(case[k]):
                raise Failure(f"{name}_backward: d{k} should be a dict with the keys {sorted(case[k])}", [])
            pairs.update({f"{k}[{key!r}]": (case[k][key], g[key]) for key in case[k]})
        else:
            pairs[k] = case[k], g

    def f():
        values = forward(*args)[0]
        return sum(float((o * r).sum()) if np.ndim(o) else float(o * r)
                   for o, r in zip(values if isinstance(values, tuple) else (values,), R))
    size = max(sum(float(np.abs(o * r).sum()) for o, r in zip(outs, R)), 0.0)
    numeric = {k: numeric_gradient(f, x) for k, (x, _) in pairs.items()}
    worst = 0.0
    for position, (k, (_, a)) in enumerate(pairs.items()):
        n, a = numeric[k], np.asarray(a)
        if a.shape != n.shape:
            raise Failure(f"{name}, gradient of {k}: shape {a.shape}, expected {n.shape}",
                          hints(a, n, k, numeric, case, R, outs) + source_line(module, name, position, [*R, cache]))
        sound(a, np.float64, f"{name}, gradient of {k}")
        if not n.any() and not a.any():
            raise Failure(f"{name}, gradient of {k}: all zero, in this case; such a check could not have failed", [])
        error = relative_error(a, n, size)
        worst = max(worst, error.max())
        if error.max() > TOLERANCE:
            i = np.unravel_index(error.argmax(), a.shape)
            raise Failure(f"{name}, gradient of {k} at {list(map(int, i))}: yours {a[i]:.6g}, numeric {n[i]:.6g}",
                          hints(a, n, k, numeric, case, R, outs) + source_line(module, name, position, [*R, cache]))
    return worst


def call(function, args, count=None):
    """function(*args), with anything it raises, or the wrong number of results, as a Failure that names the line."""
    try:
        result = function(*args)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "numpy" not in Path(f.filename).parts]
        where = [f"line {f.lineno}: {f.line}" for f in frames[-1:]]
        fit = ["the sizes do not fit: is a .T missing or too many, or an operand in the wrong place?"]
        raise Failure(f"{function.__name__} raises {type(error).__name__}: {error}",
                      (fit if "mismatch" in str(error) or "broadcast" in str(error) else []) + where) from error
    if count and (not isinstance(result, tuple) or len(result) != count):
        raise Failure(f"{function.__name__} should return {count} results", [])
    return result


def sound(a, dtype, what):
    """Finite numbers of this dtype, or Failure."""
    if a.dtype != dtype:
        raise Failure(f"{what} is {a.dtype}, expected {np.dtype(dtype)}: does a constant or a cast change it?", [])
    if not np.isfinite(a).all():
        raise Failure(f"{what} holds nan or inf", [])


def floats(a):
    """Is this an array of floats, or a dict of such arrays? Those get gradients."""
    if isinstance(a, dict):
        return all(map(floats, a.values()))
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"


def same(a, b):
    """Equal to the last bit, through tuples, lists and dicts."""
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (np.ndarray, np.generic)):
        return np.shape(a) == np.shape(b) and np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
    return a is b or a == b


def check_twins(module, name, twin):
    """Two operations that compute the same, one slow and clear, one fast, on every stride, padding, dilation and number
    of groups, and on a large input: outputs and gradients must agree -> number of cases; raises Failure."""
    sizes = [*itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 4))]
    for count, (k, stride, padding, dilation, groups) in enumerate([*sizes, (5, 1, 2, 1, 1)], 1):
        rng, (N, H, W) = np.random.default_rng(count), (30, 20, 16) if k == 5 else (2, 8, 7)
        x, kernel = rng.standard_normal((N, H, W, 4)), rng.standard_normal((k, k, 4 // groups, 8))
        results = []
        for op in (name, twin):
            out, cache = call(getattr(module, op + "_forward"), (x, kernel, stride, padding, dilation, groups), 2)
            dout = np.random.default_rng(0).standard_normal(out.shape)
            results.append((out, *call(getattr(module, op + "_backward"), (dout, cache), 2)))
        for what, a, b in zip(("out", "the gradient of x", "the gradient of W"), *results):
            if not all_close(a, b):
                raise Failure(f"{name} and {twin} differ in {what}: kernel {k}, stride {stride}, padding {padding}, "
                              f"dilation {dilation}, {groups} group(s)", [])
    return count


# ---- diagnosis: what kind of mistake gives just these numbers? -------------------------------------------------------

def hints(a, n, label, numeric, case, R, outs):
    """A sentence on how the wrong gradient a is related to the right one n."""
    def close(u, v):
        return np.shape(u) == np.shape(v) and np.allclose(u, v, rtol=1e-5, atol=1e-7 * (1 + np.abs(v).max(initial=0)))
    for other, m in numeric.items():
        if other != label and close(a, m) and not close(m, n):
            return [f"this is the gradient of {other}: are the returned gradients in the order of forward's inputs?"]
    if a.ndim > 1 and close(a.T, n):
        return ["transposed: a .T is missing or too many"]
    if a.shape != n.shape:
        for k in range(a.ndim):
            if close(a.sum(axis=k), n):
                return [f"a missing sum over axis {k}: forward broadcasts {label} along it, so its gradients add up"]
        return ["the right numbers in the wrong shape"] if a.size == n.size and close(a.reshape(n.shape), n) else []
    ratio = float((a * n).sum() / max((a * a).sum(), 1e-300))
    if close(ratio * a, n) and a.any():
        return [factor(ratio, case, outs)]
    off = ~np.isclose(a, n, rtol=1e-5, atol=1e-7)
    if (n[off] == 0).all():
        return ["right where it should not be zero, but these entries should be: a missing mask"]
    if (a[off] == 0).all():
        return ["right where it is not zero, but these entries got nothing: a mask too many, or only a part of a sum"]
    for what, v in [*((f"dout ({i})" if len(R) > 1 else "dout", r) for i, r in enumerate(R)), *case.items()]:
        if floats(v) and not isinstance(v, dict) or isinstance(v, float):
            if close(n - a, v) or close(a - n, v):
                return [f"off by exactly {what}: a term is missing or one too many, such as a path that goes around"]
            if np.shape(v) in (a.shape, ()) and close(a * v, n):
                return [f"times {what} it would be right: a missing factor of the chain rule"]
    mask, ids = case.get("mask"), case.get("ids")
    if isinstance(mask, np.ndarray) and mask.shape[:-1] == off.shape[:-1] and not (off & mask.all(axis=0)).any():
        return ["right in sequences without padding: something is missing where mask is false"]
    if isinstance(ids, np.ndarray):
        often = np.bincount(ids.ravel(), minlength=len(off)) > 1
        if off.any(axis=1)[:len(often)].sum() and not off[~often[:len(off)]].any():
            return ["wrong only in rows that are named more than once: their gradients add up"]
    for k in range(a.ndim):
        wrong = off.any(axis=tuple(set(range(a.ndim)) - {k}))
        if k == 0 and len(wrong) > 2 and wrong.sum() == len(wrong) - 1 and not wrong[[0, -1]].all():
            end, what = ("last", "later") if wrong[0] else ("first", "earlier")
            return [f"right only at the {end} of axis {k}: if that is time, what comes from {what} steps is wrong"]
        if 0 < wrong.sum() < len(wrong):
            where = f"{np.flatnonzero(wrong).tolist()} of axis {k}, of {len(wrong)}"
            return [f"wrong only at {where}: one step, one gate or one class?"]
    for k in range(a.ndim):
        if a.shape[k] > 1 and close((n - a) - (n - a).mean(axis=k, keepdims=True), np.zeros(a.shape)):
            return [f"off by a number that is the same along axis {k}: "
                    "a sum or mean over it is missing or too many"]
    return ["not a factor, a sign or a transposition: a term is missing or wrong"]


def factor(ratio, case, outs):
    """Name the number that the gradient must be multiplied with."""
    if abs(ratio + 1) < 1e-5:
        return "the sign is wrong"
    sizes = {}
    for k, v in [*case.items(), *(("out", o) for o in outs)]:
        if isinstance(v, float):
            sizes[abs(v)] = k
        for axis, s in enumerate(np.shape(v) if isinstance(v, np.ndarray) else ()):
            sizes.setdefault(float(s), f"the size of {k} along axis {axis}")
        if isinstance(v, np.ndarray):
            sizes.setdefault(float(v.size), f"the number of entries of {k}")
    for size, what in sizes.items():
        for power, text in ((1, ""), (-1, "1 / "), (0.5, "the root of "), (-0.5, "1 / the root of ")):
            value = max(size, 1e-9) ** power
            if abs(abs(ratio) - value) < 1e-5 * value and min(abs(value - v) for v in (0.5, 1, 2)) > 1e-5:
                return f"a factor is wrong: multiply by {'-' * (ratio < 0)}{text}{size:g}, {what}"
    return f"a factor is wrong: multiply by {ratio:.6g}"


def function_tree(module, name):
    """The syntax tree of a top-level function of the file, or None."""
    return next((n for n in module.tree.body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def source_line(module, name, position, args):
    """The line in which op_backward computes the gradient that it returns in this place."""
    tree, lines = function_tree(module, name + "_backward"), []

    def trace(frame, event, arg):                       # which of its lines does it run? The last one is the return
        if frame.f_code.co_name == name + "_backward":
            lines.append(frame.f_lineno)
            return trace
    if tree is None or sys.gettrace() is not None:
        return []
    sys.settrace(trace)
    try:
        getattr(module, name + "_backward")(*args)
    finally:
        sys.settrace(None)
    returned = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and n.lineno <= lines[-1] <= n.end_lineno]
    if not returned:
        return []
    node = returned[0]
    node = node.elts[position] if isinstance(node, ast.Tuple) and position < len(node.elts) else node
    stored = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == getattr(node, "id", "")
              and isinstance(n.ctx, ast.Store) and n.lineno in lines]
    line = max(stored, default=node.lineno)
    return [f"computed in line {line}: {linecache.getline(module.__file__, line).strip()}"]


# ---- a whole model, end to end ---------------------------------------------------------------------------------------

SMALL = {"hidden": ("5,4", 4), "batch": 5, "context": 4, "embed": 3, "keys": 3, "values": 4, "width": 8, "length": 7,
         "periods": "1,2,3", "home": 3, "away": 2, "heads": 2, "inner": 6, "size": 8, "channels": 2,
         "decoder_width": 6, "decoder_layers": 2, "masked": 0.25,
         "window": 7, "bits": 3, "delay": 4}
# (quick to check, if a Config has a field of this name and type)
NUMBERS = {"l1": (0.0, 0.02), "l2": (0.0, 0.03), "group": (0, 2), "mu": (0.0, 0.6), "beta1": (0.0, 0.6),
           "layers": (1, 2), "dropout": (0.0, 0.4), "smoothing": (0.0, 0.2), "patch": (0, 14, 4), "forcing": (1.0, 0.4)}
# (numbers that switch something on)
TRAINING = {"optimizer", "schedule", "experiment", "flip", "tokens", "lower", "unit", "sharp"}
# (no gradient depends on these)


def variants(Config):
    """Configs in which every two values of flags that choose something meet at least once, if the Config allows it."""
    default = {f.name: f.default for f in fields(Config)}
    for name, values in SMALL.items():
        for value in values if isinstance(values, tuple) else (values,):
            if type(default.get(name)) is type(value):
                default[name] = value
    choices = {f.name: get_args(f.type) or ((False, True) if f.type is bool else NUMBERS.get(f.name, ()))
               for f in fields(Config) if f.name not in TRAINING and (f.name, f.default) != ("model", "auto")}
    choices = {name: values for name, values in choices.items() if values}
    every = list(itertools.islice(itertools.product(*choices.values()), 200_000))
    np.random.default_rng(0).shuffle(every)
    met, found = set(), []
    for values in every:
        pairs = set(itertools.combinations([(name, str(v)) for name, v in zip(choices, values)], min(2, len(choices))))
        if not pairs <= met or not found:
            values = {k: type(default[k])(v) for k, v in zip(choices, values)}
            try:
                cfg = Config(**{**default, **values})
            except ValueError:
                continue
            met |= pairs
            found.append((", ".join(f"{k}={v}" for k, v in values.items() if v != default[k]) or "default", cfg))
    return found


def check_model(module, text, cfg, seed=0):
    """Compare gradients of loss_and_grads in a variant with numeric slopes -> number of parameters; raises Failure."""
    for attempt in range(20):
        try:
            return check_model_once(module, cfg, np.random.default_rng(seed + attempt))
        except Kink as error:
            reason = error
        except Failure as error:
            raise Failure(f"loss_and_grads, {text}: {error.args[0]}", error.args[1]) from error
    raise Failure(f"loss_and_grads, {text}: no slope to compare with after 20 draws: {reason}", [])


def slope(f, x, i, expected, size):
    """numeric_gradient by one entry. A model has so many bends (relu) that some are near at all times: if it is not the
    expected one, a step ten times smaller tells whether a bend was in the way; if that is another one still, Kink."""
    n = numeric_gradient(f, x, [i])[0]
    if relative_error(expected, n, size) > TOLERANCE:
        near = numeric_gradient(f, x, [i], 1e-6)[0]
        if relative_error(expected, near, size) < TOLERANCE:
            return near
        if relative_error(n, near, size) > TOLERANCE:
            raise Kink(f"slope {n:.8g}, and {near:.8g} with a smaller step")
    return n


def check_model_once(module, cfg, rng):
    """check_model on one draw; raises Kink where there is no slope."""
    params = call(module.init_params, (cfg, rng, np.float64))
    for name, p in params.items():
        sound(p, np.float64, f"init_params: {name}")
        p += 0.3 * rng.standard_normal(p.shape)                             # a bias of 0 could hide a mistake
    batch = call(module.make_batch, (cfg, rng, np.float64))
    before = copy.deepcopy((params, batch))
    loss, grads = call(module.loss_and_grads, (params, batch, cfg), 2)
    if not same((params, batch), before):
        raise Failure("the parameters or the batch were changed on the way", [])
    if not same((loss, grads), module.loss_and_grads(params, batch, cfg)):
        raise Failure("a second call gives another result", [])
    if set(grads) != set(params):
        missing, odd = sorted(set(params) - set(grads)), sorted(set(grads) - set(params))
        raise Failure(f"no gradient for {missing}" if missing else f"gradients {odd} belong to no parameter", [])

    def f():
        return float(module.loss_and_grads(params, batch, cfg)[0])
    for name, p in params.items():
        a = np.asarray(grads[name])
        if a.shape != p.shape:
            raise Failure(f"gradient of {name}: shape {a.shape}, expected {p.shape}", [])
        sound(a, np.float64, f"gradient of {name}")
        if not a.any():
            raise Failure(f"gradient of {name}: all zero",
                          ["does backward leave it out, or does forward not use it? A check that cannot fail is none"])
        order = np.abs(a).ravel().argsort()
        entries = {np.unravel_index(k, a.shape) for k in (*order[-2:], *rng.integers(0, a.size, 2))}
        found = [(i, a[i], slope(f, p, i, a[i], abs(loss))) for i in entries]
        for i, yours, n in found:
            if relative_error(yours, n, abs(loss)) > TOLERANCE:
                ratios = [n / yours if yours else np.inf for _, yours, n in found]
                hint = f"times {ratios[0]:.5g} it would be right" if abs(ratios[0] + 1) > 1e-5 else "the sign is wrong"
                if not all(abs(ratio - ratios[0]) < 1e-5 * abs(ratios[0]) for ratio in ratios):
                    hint = "not by one factor: a term is missing or wrong"
                raise Failure(f"gradient of {name} at {list(map(int, i))}: yours {yours:.6g}, numeric {n:.6g}", [hint])
        direction, here, t = rng.standard_normal(p.shape), p.copy(), np.zeros(1)

        def along(p=p, here=here, t=t, direction=direction):
            p[...] = here + t[0] * direction
            return f()
        whole, scale = float((a * direction).sum()), max(abs(loss), float(np.abs(a * direction).sum()))
        n = slope(along, t, (0,), whole, scale)
        p[...] = here
        if relative_error(whole, n, scale) > TOLERANCE:
            yours = f"yours {whole:.6g}, numeric {n:.6g}"
            raise Failure(f"gradient of {name} along a random direction: {yours}", [])
    small = {name: p.astype(np.float32) for name, p in params.items()}
    batch = module.make_batch(cfg, rng, np.float32)
    for name, g in module.loss_and_grads(small, batch, cfg)[1].items():
        if g.dtype != np.float32:
            raise Failure(f"gradient of {name} is {g.dtype} though parameters and batch are float32: that is slow", [])
    return len(params)


# ---- planting bugs ---------------------------------------------------------------------------------------------------

def edits(node):
    """Small changes to a piece of program, each with a name: what a tired person would type."""
    def like(**parts):
        new = copy.copy(node)
        for k, v in parts.items():
            setattr(new, k, v)
        return new
    if isinstance(node, ast.BinOp):
        left, right, op = node.left, node.right, type(node.op)
        if op in (ast.Add, ast.Sub):
            yield "flip a sign", like(op=ast.Sub() if op is ast.Add else ast.Add())
            yield "drop a term", left
            yield "drop a term", right
        elif op is ast.Mult:
            yield "drop a factor", left
            yield "drop a factor", right
        elif op is ast.Div:
            yield "drop a factor", left
        elif op is ast.MatMult:
            yield "swap operands", like(left=right, right=left)
            yield "drop a factor", left
        elif op is ast.Pow:
            yield "drop a power", left
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "flip a sign", node.operand
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
        yield "turn a condition around", node.operand
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield "drop a transpose", node.value
    elif isinstance(node, ast.keyword) and node.arg == "axis" and isinstance(node.value, (ast.Constant, ast.UnaryOp)):
        yield "change an axis", like(value=ast.Constant(1 if ast.literal_eval(node.value) == 0 else 0))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sum":
        yield "mean for sum", like(func=ast.Attribute(node.func.value, "mean", ast.Load()))
        if getattr(node.func.value, "id", "") != "np":
            yield "drop a sum", node.func.value
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("exp", "sign", "sqrt", "where"):
        yield f"drop {node.func.attr}", node.args[node.func.attr == "where"]
    elif isinstance(node, ast.Compare):
        yield "turn a condition around", like(ops=[ast.LtE() if isinstance(node.ops[0], ast.Gt) else ast.Gt()])
    elif isinstance(node, ast.AugAssign):
        yield "skip an accumulation", ast.Assign([node.target], node.value, lineno=node.lineno)
        yield "skip an accumulation", ast.copy_location(ast.Pass(), node)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        yield "skip an assignment", ast.copy_location(ast.Pass(), node)
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        e = node.value.elts
        for k in range(len(e) - 1):
            yield "swap returned values", like(value=ast.Tuple([*e[:k], e[k + 1], e[k], *e[k + 2:]], ast.Load()))


def repairs(node):
    """The same changes the other way: some are their own opposite, the others put back what was dropped."""
    yield from ((what, new) for what, new in edits(node) if what in (
        "flip a sign", "swap operands", "change an axis", "swap returned values", "turn a condition around",
        "drop a transpose", "drop a factor"))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        for side in ("left", "right"):
            new = copy.copy(node)
            setattr(new, side, ast.Attribute(getattr(node, side), "T", ast.Load()))
            yield "add a transpose", new
        yield "transpose and swap", ast.BinOp(ast.Attribute(node.right, "T", ast.Load()), node.op, node.left)
        yield "transpose and swap", ast.BinOp(node.right, node.op, ast.Attribute(node.left, "T", ast.Load()))
    if isinstance(node, (ast.BinOp, ast.Name, ast.Call)) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        yield "add a minus", ast.UnaryOp(ast.USub(), node)
        yield "add a sum", ast.Call(ast.Attribute(node, "sum", ast.Load()), [], [ast.keyword("axis", ast.Constant(0))])


def mutants(tree, kind=edits):
    """Every function that is one edit away from this one -> what was done, line, new tree."""
    for node in ast.walk(tree):
        for what, new in kind(node):
            # a deep copy in which new stands for node: to deepcopy, node has "already been copied", to new
            yield what, getattr(node, "lineno", tree.lineno), copy.deepcopy(tree, {id(node): copy.deepcopy(new)})


def with_function(module, new):
    """The module again, with this function in place of the one of the same name."""
    tree = copy.copy(module.tree)
    tree.body = [new if isinstance(n, ast.FunctionDef) and n.name == new.name else n for n in tree.body]
    return make_module(module.__file__, ast.fix_missing_locations(tree))


def repair(module, name, make_case):
    """Try the repairs on op_backward -> the hint that names a change which makes the case pass, in a list, or []."""
    tree, start = function_tree(module, name + "_backward"), time.perf_counter()
    for what, line, new in mutants(tree, repairs) if tree else ():
        if time.perf_counter() - start > 20:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_operation(with_function(module, new), name, make_case)
        except Exception:
            continue
        old, new = (ast.unparse(t).splitlines() for t in (tree, new))
        return [f"line {line} ({what}), and it passes: {b.strip()}" for a, b in zip(old, new) if a != b][:1]
    return []


def closest_lesson(module):
    """The lesson that a typed copy is most like -> path, or None; function_lines of the copy, of the lesson."""
    mine, found = function_lines(read(module.__file__)), []
    for path in map(Path(__file__).resolve().parent.joinpath, LESSONS):
        if path.is_file() and path != Path(module.__file__).resolve():
            theirs = function_lines(read(path))
            equal = sum([t for t, _ in theirs.get(name, [])] == [t for t, _ in lines] for name, lines in mine.items())
            found.append((equal, len(mine.keys() & theirs.keys()), path, theirs))
    *_, path, theirs = max(found, default=(0, 0, None, {}), key=lambda item: item[:2])
    return path, mine, theirs


def lesson_lines(module, names, most=6):
    """Where these functions of a typed copy differ from the lesson that is most like it -> lines, numbered. The name
    "" stands for what is between the functions, where only what differs counts, not what is missing."""
    path, mine, theirs = closest_lesson(module)
    lines = []
    for name in names:
        if name in mine and name in theirs:
            left, right = ([text for text, _ in side[name]] for side in (mine, theirs))
            for what, i, ii, j, jj in difflib.SequenceMatcher(None, left, right, False).get_opcodes():
                if what == "equal" or name == "" and what != "replace":
                    continue
                yours = [f"yours, line {number}: {text}" for text, number in mine[name][i:ii]]
                right_ones = [f"{path.name}, {name or 'between the functions'}: {text}" for text in right[j:jj]]
                lines += [line for pair in itertools.zip_longest(yours, right_ones) for line in pair if line]
    return [shorten(line) for line in lines[:most]] + ["..."] * (len(lines) > most)


def shorten(line):
    """A line that is not longer than a screen is wide."""
    return line if len(line) <= 170 else line[:167] + "..."


def called_by(module, names):
    """The functions of the file that these functions name."""
    known = [n.name for n in module.tree.body if isinstance(n, ast.FunctionDef)]
    used = {n.id for name in names for n in ast.walk(function_tree(module, name) or ast.Module([]))
            if isinstance(n, ast.Name)}
    return [name for name in known if name in used and name not in names]


def other_values(module, names):
    """A forward pass can be wrong and its derivative right. So: where does a typed copy, on the same inputs, give other
    values than the lesson that it is most like? -> notes, each a list of lines; whoever meant it needs no mending."""
    path, notes, other = closest_lesson(module)[0], [], []
    if path is None:
        return notes
    lesson = make_module(path, ast.parse(read(path)))
    for name in names:
        known = name + "_forward" in vars(lesson) and not any(part in other for part in uses(module, name))
        for case in cases_of(module, name) if known else ():
            case = case(np.random.default_rng(0))
            with contextlib.suppress(Exception):        # other inputs than the lesson's: an operation of its own
                yours, theirs = (getattr(m, name + "_forward")(*copy.deepcopy(list(case.values())))[0]
                                 for m in (module, lesson))
                if not all_close(yours, theirs):
                    other.append(name)
                    notes.append([f"{name}_forward gives other values than {path.name}'s on the same inputs",
                                  *found_lines(module, [name + "_forward"])])
                    break
    for text, cfg in variants(lesson.Config) if "loss_and_grads" in vars(module) else ():
        if not notes:
            with contextlib.suppress(Exception):        # another model
                values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
                notes += other_model(module, lesson, text, values, [name for name in names if cases_of(module, name)])
    return notes


def found_lines(module, names):
    """Where these functions differ from the lesson's; if nowhere, those that they call, or the constants."""
    return (lesson_lines(module, names) or lesson_lines(module, called_by(module, names)) or lesson_lines(module, [""])
            or ["its lines are the lesson's; so look at what it uses"])


def other_model(module, lesson, text, values, compared):
    """Does a typed copy, in this variant, begin with other parameters or batches, or reach another loss? (Operations
    that have been compared are not to blame.) -> notes."""
    notes, whose, both, made = [], Path(lesson.__file__).name, (module, lesson), ("init_params", "make_batch")
    cfgs = [m.Config(**{f.name: values[f.name] for f in fields(m.Config) if f.name in values}) for m in both]
    pairs = [[getattr(m, what)(cfg, np.random.default_rng(0), np.float64) for m, cfg in zip(both, cfgs)]
             for what in made]
    for what, pair in zip(made, pairs):
        if not all_close(*pair):
            notes.append([f"{what}, {text}: other numbers than {whose}'s from the same seed",
                          *found_lines(module, [what])])
    (_, params), (_, batch) = pairs
    for p in params.values():
        p += 0.3 * np.random.default_rng(1).standard_normal(p.shape)
    yours, theirs = (float(m.loss_and_grads(params, batch, cfg)[0]) for m, cfg in zip(both, cfgs))
    if not all_close(yours, theirs):
        reached = ["loss_and_grads"]
        for name in reached:                            # it grows on the way
            reached += [other for other in called_by(module, [name]) if other not in reached]
        reached = [name for name in reached if name.rsplit("_", 1)[0] not in compared]
        notes.append([f"the loss, {text}: yours {yours:.6g}, {whose}'s {theirs:.6g}, with equal parameters and batch",
                      *(lesson_lines(module, reached) or lesson_lines(module, list(vars(lesson)))
                        or lesson_lines(module, [""]))])
    return notes


def function_lines(source):
    """The top-level functions of a file -> {name: [(a line of it, without comments and indentation, its number)]}; and
    under the name "" the assignments between them."""
    functions, name, words = {}, None, []
    with contextlib.suppress(tokenize.TokenError, SyntaxError):             # a file that breaks off: as far as it goes
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE:
                if words[0].start[1] == 0:
                    name = words[1].string if words[0].string == "def" else None
                    if len(words) > 1 and words[1].string == "=":
                        name = ""
                if name is not None and not (len(words) == 1 and words[0].type == tokenize.STRING):     # a docstring
                    text = "".join(" " * (a.end != b.start) + b.string for a, b in zip(words[:1] + words, words))
                    functions.setdefault(name, []).append((text.strip(), words[0].start[0]))
                words = []
            elif token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
                words.append(token)
    return functions


def gradients(module, name, make_case, seed):
    """What op_backward returns on a case, for comparison."""
    case, rng = make_case(np.random.default_rng(seed)), np.random.default_rng(seed)
    out, cache = getattr(module, name + "_forward")(*case.values())
    outs = out if isinstance(out, tuple) else (out,)
    return getattr(module, name + "_backward")(*[rng.standard_normal(np.shape(o)) for o in outs], cache)


def all_close(a, b):
    """Nearly equal, through tuples, lists and dicts; what is not of floats, equal."""
    if isinstance(a, (tuple, list, dict)):
        keys = a if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(all_close(a[k], b[k]) for k in keys)
    if np.asarray(a).dtype.kind != "f":
        return same(a, b)
    return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-9, atol=1e-12)


def teeth(module):
    """Plant bugs, one at a time, in every backward -> number planted, caught, and those that survived."""
    planted, caught, survivors, models = 0, 0, [], variants(module.Config)
    for name in operations(module):
        cases = cases_of(module, name)
        for what, line, new in mutants(function_tree(module, name + "_backward")):
            planted += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    mutant = with_function(module, new)
                    for case in cases:
                        check_operation(mutant, name, case)
                    for text, cfg in models if not cases else ():
                        check_model(mutant, text, cfg)
            except Failure:
                caught += 1
                continue
            if cases:
                same_gradient = all(all_close(gradients(m, name, c, s), gradients(module, name, c, s))
                                    for m in (mutant,) for c in cases for s in range(3))
            else:
                same_gradient = False
            note = " (changes no gradient in any case)" if same_gradient else ""
            survivors.append(f"{name}_backward, line {line}: {what}{note}")
    return planted, caught, survivors


# ---- files -----------------------------------------------------------------------------------------------------------

def read(path):
    """The text of a file of Python."""
    return Path(path).read_text(encoding="utf-8-sig")


def parse(source):
    """A file that ends in the middle, or has a slip in it, is worth checking up to there -> syntax tree of as much as
    can be read, and in a list, what is wrong with the rest."""
    try:
        return ast.parse(source), []
    except SyntaxError as error:
        lines, wrong = source.splitlines(), f"line {error.lineno} cannot be read: SyntaxError: {error.msg}"
    for end in reversed(range(len(lines))):
        if lines[end][:1].strip():                      # something begins here: perhaps all above is whole
            with contextlib.suppress(SyntaxError):
                return ast.parse("\n".join(lines[:end])), [wrong]
    return ast.parse(""), [wrong]


def require(ok, what, expected, found):
    """As in the lessons."""
    if not ok:
        raise ValueError(f"{what}: expected {expected}, found {found!r}")


def make_module(path, tree):
    """Run a syntax tree as a module of its own."""
    module = types.ModuleType("checked")
    module.__file__, module.tree = str(path), tree
    module.InputError, module.require = ValueError, require         # of the plumbing, which few will type
    sys.modules["checked"] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def operations(module):
    """Names of the operations with a backward, each after those that it is built of."""
    names = [n.name[:-9] for n in module.tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_backward")]
    return list(dict.fromkeys(other for name in names for other in [*uses(module, name), name]))


def uses(module, name, above=()):
    """The operations that op_backward is built of, directly or not, each after those that it is built of itself."""
    tree = function_tree(module, name + "_backward") or ast.Module([])
    tables = {getattr(n.targets[0], "id", ""): n for n in module.tree.body if isinstance(n, ast.Assign)}
    parts = [tree, *(tables[n.id] for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in tables)]
    found = [n.id[:-9] for part in parts for n in ast.walk(part)
             if isinstance(n, ast.Name) and n.id.endswith("_backward")]
    found = [other for other in found if other not in (name, *above) and function_tree(module, other + "_backward")]
    return [deep for other in found for deep in [*uses(module, other, (*above, name)), other]]


def check_file(path):
    """Check every operation of a file, then its models -> number of checks that passed, that failed."""
    print(f"{path}")
    try:
        tree, broken = parse(read(path))
        module = make_module(path, tree)
    except (Exception, SystemExit) as error:
        print(f"  FAIL  it does not run: {type(error).__name__}: {error}")
        if isinstance(error, SystemExit):
            print('        does it lack the line  if __name__ == "__main__":  above the call that starts it?')
        return 0, 1
    if not isinstance(getattr(module, "GRADCHECK", {}), dict):
        print("  FAIL  GRADCHECK: expected a dict, of functions of rng that return the inputs by name, in a dict")
        return 0, 1
    names, passed, failed, called = operations(module), 0, broken, set()
    typed = Path(path).resolve() not in map(Path(__file__).resolve().parent.joinpath, LESSONS)
    if typed:                                           # whatever goes wrong in it shall be said by the report alone
        np.seterr(all="ignore")
        warnings.simplefilter("ignore")
    if broken:
        print(f"  FAIL  {broken[0]}" + "\n        checked is what stands above it" * bool(names))
    for name in set(getattr(module, "GRADCHECK", {})) - set(names):
        failed.append(name)
        print(f"  FAIL  GRADCHECK[{name!r}]: there is no {name}_backward")
    if not names and not broken:
        failed.append("nothing")
        print("  FAIL  no op_backward in it: nothing to check")
    modelled = []
    for name in names:
        worst, twins, forward = 0.0, "", getattr(module, name + "_forward", None)
        try:
            cases = cases_of(module, name)
            if forward is None:
                raise Failure(f"{name}_backward has no {name}_forward", [])
            if not cases and "cfg" in inspect.signature(forward).parameters:
                modelled.append(name)           # it needs a whole Config: its case is the model that calls it
                continue
            if not cases:
                raise Failure(f"{name}: nobody says how to call it",
                              [f'add to the file: GRADCHECK = {{"{name}": lambda rng: dict(...)}}'])
            for case in cases:
                try:
                    worst = max(worst, check_operation(module, name, case))
                except Failure as error:
                    wrong = [other for other in failed if other != name and other in uses(module, name)]
                    if wrong:
                        raise Failure(error.args[0], ["mend first: " + ", ".join(wrong)]) from error
                    both = [name + "_forward", name + "_backward"]
                    lines = lesson_lines(module, both, 4) or lesson_lines(module, called_by(module, both), 4)
                    if len(lines) > 4:                  # another way of writing it, so look for the slip itself
                        lines = repair(module, name, case) or lines
                    known = [hint for hint in error.args[1] if not (lines and hint.startswith("computed in "))]
                    raise Failure(error.args[0], known + (lines or repair(module, name, case))) from error
            if TWINS.get(name) in names:
                twins = f", as {TWINS[name]} in {check_twins(module, name, TWINS[name])} cases"
        except Failure as error:
            failed.append(name)
            print(f"  FAIL  {error.args[0]}" + "".join(f"\n        {hint}" for hint in error.args[1]))
        else:
            passed += 1
            print(f"  ok    {name:24s} {len(cases)} case(s), worst relative error {worst:.0e}{twins}")
    for lines in other_values(module, [name for name in names if name not in failed]) if typed else ():
        print("\n        ".join(["  note  " + lines[0], *lines[1:]]))
    missing = [n for n in ("Config", "init_params", "make_batch", "loss_and_grads") if not hasattr(module, n)]
    if missing:
        print("  not checked" + "".join(f" {name}," for name in modelled) + " end to end: the file has no "
              + ", ".join(missing) + " (yet)")
        return passed, len(failed)
    for name in modelled:
        setattr(module, name + "_backward", watched(getattr(module, name + "_backward"), called))
    found = []
    try:
        try:
            found = variants(module.Config)
        except Exception as error:
            raise Failure(f"Config: {type(error).__name__}: {error}", []) from error
        count = sum(check_model(module, text, cfg) for text, cfg in found)
        for name in modelled:
            if name + "_backward" not in called:
                raise Failure(f"{name}_backward is never called by loss_and_grads", [])
    except Exception as error:
        if not isinstance(error, Failure):
            error = Failure(f"loss_and_grads: {type(error).__name__}: {error}",
                            ["expected: init_params -> dict of arrays, loss_and_grads -> number, dict of arrays"])
        wrong = [name for name in failed if name in names]
        whole = ["loss_and_grads", *(name + end for name in modelled for end in ("_forward", "_backward"))]
        failed.append("loss_and_grads")
        print(f"  FAIL  {error.args[0]}" + "".join(f"\n        {hint}" for hint in error.args[1] if not wrong))
        lines = ["mend first: " + ", ".join(wrong)] if wrong else lesson_lines(module, whole)
        if not wrong and names and not any(word in error.args[0] for word in (" is float", "raises")):
            lines = ["the operations are right, those that were checked, so look at how the model puts them together",
                     *lines]
        print("".join(f"        {line}\n" for line in lines), end="")
    else:
        passed += 1 + len(modelled)
        print(f"  ok    {'end to end':24s} " + ", ".join([f"{len(found)} variants", f"{count} parameters", *modelled]))
    if typed:
        steps = [name for name in vars(module) if name.endswith("_update") or name in STEPS]
        lines = lesson_lines(module, steps)
        note = ("not checked, as no derivatives, but unlike the lesson's:" if lines else
                "not checked, as no derivatives: optimizers, training, pictures")
        print("\n        ".join(["  note  " + note, *lines]))
    return passed, len(failed)


def watched(function, called):
    """The function, which now also notes that it has been called."""
    def wrapper(*args, **kwargs):
        called.add(function.__name__)
        return function(*args, **kwargs)
    return wrapper


def main():
    """Check the files of the command line, or all lessons beside this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files to check (default: every lesson beside this program)")
    parser.add_argument("--teeth", action="store_true", help="plant bugs in every backward; each must be caught")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent
    files = options.files or [here / name for name in LESSONS if (here / name).is_file()]
    for path in files:
        if not Path(path).is_file():
            print(f"gradcheck.py: {path}: expected a Python file, found none", file=sys.stderr)
            sys.exit(2)
    start, passed, failed = time.perf_counter(), 0, 0
    for path in files:
        if options.teeth:
            tree, broken = parse(read(path))
            if broken:
                print(f"gradcheck.py: {path}: {broken[0]}", file=sys.stderr)
                sys.exit(2)
            planted, caught, survivors = teeth(make_module(path, tree))
            print(f"{path}: caught {caught} / {planted} planted" + "".join(f"\n  survived: {s}" for s in survivors))
            passed, failed = passed + caught, failed + len(survivors)
        else:
            p, f = check_file(path)
            passed, failed = passed + p, failed + f
    print(f"{time.perf_counter() - start:.1f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head` ends the program quietly
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
