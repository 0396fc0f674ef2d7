"""gradcheck.py: is this derivative right?  Ask the function itself.

The slope of f at x is nearly (f(x + h) - f(x - h)) / 2h. That takes two forward passes per number,
too many for training. But it needs no derivation, so it can tell whether a derivation is right.

Both sides: one side, (f(x + h) - f(x)) / h, is off by about h f''/2; with both that cancels.
h = 1e-5: what is left, h^2 f'''/6, and rounding, about 1e-16 |f| / h, are then about 1e-11, in
    float64. In float32 no h is good: so every lesson takes a dtype.
Relative error: a slope of 1000 that is off by 0.001 is right, a slope of 0.001 is not.
Random weights: a slope belongs to one number. So f sums up all outputs times random numbers R, and
    R is the dout of backward. With R = 1 a softmax has slope 0: its outputs always sum to 1.

Run    python gradcheck.py                   every lesson: each operation, then each task end to end
       python gradcheck.py my_mlp.py         a copy, finished or not: what is wrong, in which line
       python gradcheck.py --teeth mlp.py    plants bugs in every backward: are all of them caught?

op_forward(inputs) -> (out, cache), and op_backward(dout, cache) -> the gradients of the inputs in
the same order, without those of integers, flags and what DATA names, are found by name. CASES says
how to call them; for an operation of your own, say it in your file, with sizes that differ, over 2:
    GRADCHECK = {"my_op": lambda rng: dict(x=rng.standard_normal((3, 5)), w=rng.standard_normal(5))}
A model is checked end to end once Config, init_params, make_batch, loss_and_grads are there.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///

import os

for library in ("OPENBLAS", "MKL", "OMP"):  # the matrices are small: one BLAS thread is fastest
    os.environ.setdefault(library + "_NUM_THREADS", "1")
import numpy as np
TOLERANCE = 1e-6

def slope(f, x, step, middle, h=1e-5):
    """Slope of f() as x moves along step: forth, back, home; middle is f() at home. nan if f bends
    here (relu at 0, a tie in a maximum), since then it has no slope."""
    home = x.copy()
    x[...] = home + h * step
    up = f()
    x[...] = home - h * step
    down = f()
    x[...] = home
    n = (up - down) / (2 * h)
    bends = abs(up - 2 * middle + down) / h > 1e-3 * (1 + abs(n))
    return np.nan if bends else n

def relative_error(a, n, size):
    """|a - n| / (|a| + |n| + 1e-3 size).   size: that of f, whose rounding errors are in n."""
    return abs(a - n) / (abs(a) + abs(n) + 1e-3 * max(1.0, size))

def single_steps(arrays):
    """One operation: each entry of each input moves on its own.   -> list of (name, step)."""
    return [(name, step.reshape(x.shape)) for name, x in arrays.items() for step in np.eye(x.size)]

def random_steps(arrays, rng):
    """One model has too many parameters for that: all entries of an array move at once, each by a
    random number, so that no two errors cancel.   -> list of (name, step)."""
    return [(name, rng.standard_normal(x.shape)) for name, x in arrays.items()]

def compare(d):
    """The check, for both: sum(gradient * step) is the slope along step. False if f has no slope.
    d.wrong: examples of wrong gradients by name; d.worst: the largest error of the others."""
    d.wrong, d.worst = {}, 0.0
    for k, (name, step) in enumerate(d.steps):
        a, n = d.grads[name], d.slopes[k]
        if a.shape != step.shape:
            d.wrong[name] = 0, f": shape {a.shape}, expected {step.shape}"
            continue
        yours, size = float((a * step).sum()), max(d.size, float(np.abs(a * step).sum()))
        if not d.settled and not relative_error(yours, n, size) <= TOLERANCE:
            near = slope(d.f, d.arrays[name], step, d.middle, h=1e-6)
            if not any(relative_error(near, other, size) <= TOLERANCE for other in (n, yours)):
                return False                            # with another h it is another slope
            n = d.slopes[k] = near
        error = relative_error(yours, n, size)
        if error > TOLERANCE:
            at = f"at {np.argwhere(step)[0].tolist()}" if step.sum() == 1 else "in all entries"
            text = f" {at}: yours {yours:.6g}, numeric {n:.6g}"
            d.wrong[name] = max(d.wrong.get(name, (0, "")), (error, text))
        else:
            d.worst = max(d.worst, error)
    return True

# ==== That is the idea. The rest finds operations and models in files and puts it to work. ========

import ast
import contextlib
import copy
import difflib
import functools
import inspect
import io
import itertools
import re
import signal
import sys
import textwrap
import time
import tokenize
import traceback
import types
import warnings
from dataclasses import fields, replace
from pathlib import Path

ORDER = "perceptron mlp vanilla_rnn lstm seq2seq attention nested_attention cnn transformer".split()
FOUR = ("Config", "init_params", "make_batch", "loss_and_grads")

class Failure(Exception):
    """What is wrong; hints, a list; the draw that shows it, if there is one."""
    def __init__(self, message, tips=(), draw=None):
        super().__init__(message)
        self.tips, self.draw = list(tips), draw

def expect(ok, message):
    """Failure unless ok."""
    if not ok:
        raise Failure(message)

def sound(a, what):
    """Failure unless these are finite numbers in float64."""
    expect(isinstance(a, np.ndarray), f"{what} is a {type(a).__name__}, expected an array")
    expect(a.dtype == np.float64, f"{what} is {a.dtype}, expected float64")
    expect(np.isfinite(a).all(), f"{what} has nan or inf")

# ---- how to call the operations that several lessons share ---------------------------------------
# A case names the inputs in forward's order: "x 3 5" is normal numbers (3, 5), "ids<7 3" integers
# below 7, "rate=0.3" a fixed value. A function of rng returns a dict of inputs, or a list of dicts.
# Sizes differ and are above 2, so that a hint can name one. Inputs named in DATA have no gradient.
DATA = {"targets", "running", "mask", "memory_mask", "cos", "sin", "keep"}

def inputs_of(case, rng):
    """The inputs that a case names -> dict."""
    inputs = {}
    for part in case.split(", "):
        name, kind, rest = re.fullmatch(r"(\w+)([ <=])(.*)", part).groups()
        sizes = [int(size) for size in re.findall(r"\d+", rest)]
        inputs[name] = (ast.literal_eval(rest) if kind == "=" else rng.standard_normal(sizes)
                        if kind == " " else rng.integers(0, sizes[0], sizes[1:]))
    return inputs

def each(case, name, *values):
    """A case with one more input, last, that has each of these values.   -> function of rng."""
    return lambda rng: [{**inputs_of(case, rng), name: value} for value in values]

RUNNING = None, (np.arange(5.0), np.arange(1.0, 6.0))               # mean and variance, or not
MASKS = (None, np.arange(7) <= np.arange(2, 7)[:, None],            # the past of 5 of 7 positions
         np.arange(7) < np.array([3, 7])[:, None, None, None])      # two sequences of 3 and 7
CASES = {"linear": "x 3 5, W 5 7, b 7",
    **dict.fromkeys(["relu", "sigmoid", "tanh", "gelu", "silu"], "x 3 5"),
    "swiglu": "gate 3 5, up 3 5", "embedding": "ids<7 3 5, E 7 6",
    "penalty": "W 3 5, l1=0.3, l2=0.7", "dropout": "x 3 5, keep<2 3 5, rate=0.3",
    "layernorm": "x 3 5, gamma 5, beta 5", "rmsnorm": "x 3 5, gamma 5",
    "batchnorm": each("x 6 5, gamma 5, beta 5", "running", *RUNNING),
    "batchnorm2d": each("x 3 6 7 5, gamma 5, beta 5", "running", *RUNNING),
    "mse": "y 3 5, targets 3 5", "binary_cross_entropy": "logits 3 5, targets<2 3 5",
    "softmax_cross_entropy": "logits 3 5, targets<5 3",
    "smoothed_cross_entropy": each("logits 3 5, targets<5 3", "label_smoothing", 0.0, 0.3),
    "rnn": "z 5 3 6, h0 3 6, Wh 6 6", "gru": "z 5 3 18, h0 3 6, Wh 6 18, bn 6",
    "lstm": "z 5 3 24, h0 3 6, c0 3 6, Wh 6 24",
    "rope": "x 3 2 5 6, cos 5 3, sin 5 3", "causal_attention": "q 2 3 5 6, k 2 3 5 6, v 2 3 5 6",
    "attention": each("q 2 3 5 6, k 2 3 7 6, v 2 3 7 6", "mask", *MASKS),
    "x": "x 3 5", "y, targets": "y 3 5, targets 3 5", "x, w, b": "x 3 5, w 5, b ",  # of any name
}

def cases_of(module, name):
    """How its file, its lesson or CASES call an operation.   -> functions of rng -> inputs."""
    plain = name.removeprefix("fast_").removesuffix("_loop")        # a twin is called alike
    lesson, forward = module.lesson and load(module.lesson), vars(module).get(name + "_forward")
    inputs = ", ".join(inspect.signature(forward).parameters) if forward else ""
    own, theirs = (getattr(m, "GRADCHECK", {}) for m in (module, lesson))
    def made(rng, entry, k=slice(None)):
        found = entry(rng) if callable(entry) else entry
        return [inputs_of(case, rng) if isinstance(case, str) else dict(case)
                for case in (found if isinstance(found, list) else [found])][k]
    for table in (own, theirs, CASES):
        entry = table.get(name, table.get(plain, table.get(inputs, [])))
        try:
            first = made(np.random.default_rng(0), entry)
        except Exception as error:
            text = f"GRADCHECK[{name!r}] should return inputs by name, in a dict: {error!r}"
            raise Failure(text) from error
        with contextlib.suppress(TypeError, IndexError):            # another operation, or none
            names = inspect.signature(forward).bind(*first[0].values()).signature.parameters
            if table is own or not {"cfg", "params"} & names.keys():            # those are models
                return [functools.partial(made, entry=entry, k=k) for k in range(len(first))]
    return []

# ---- draws: numbers for an operation or a model, their slopes, the gradients ---------------------
def draw_operation(module, name, case, seed):
    """-> a draw: arrays to move, by name; f, steps, size; given and run(given) -> gradients."""
    rng = np.random.default_rng(seed)
    forward, backward = getattr(module, name + "_forward"), getattr(module, name + "_backward")
    inputs = case(rng)
    before = copy.deepcopy(inputs)
    out, cache = call(forward, inputs.values(), [2])
    for k in inputs:
        expect(same(inputs[k], before[k]), f"{name}_forward: {k} was changed, and not only read")
    outs = copy.deepcopy(out if isinstance(out, tuple) else (out,))  # not a view of x
    R = [rng.standard_normal(np.shape(o))[()] for o in outs]
    wanted = [k for k, x in inputs.items() if k not in DATA
              and (isinstance(x, dict) or getattr(x, "dtype", np.dtype(int)).kind == "f")]
    def by_name(values):                                # a dict of parameters is taken apart
        return {k if key is None else f"{k}[{key!r}]": v for k, value in zip(wanted, values)
                for key, v in (value.items() if isinstance(value, dict) else [(None, value)])
                if key is None or np.asarray(v).dtype.kind == "f"}      # other entries are frozen
    def f():
        out, _ = forward(*inputs.values())
        return sum(float(((o - p) * r).sum()) for o, p, r in zip(out if R[1:] else [out], outs, R))
    def run(given):
        grads = call(backward, [*given["dout"], given["the cache"]])
        expect(grads is not None, f"{name}_backward returns None: is its return missing?")
        grads = (*grads,) if isinstance(grads, (tuple, list)) else (grads,)
        count = f"{name}_backward: returns {len(grads)} gradient(s), expected {len(wanted)}"
        expect(len(grads) == len(wanted), f"{count}: {', '.join(wanted)}")
        return by_name(grads)
    arrays = by_name([inputs[k] for k in wanted])
    for what, x in (*arrays.items(), *((f"{name}_forward: out", np.asarray(o)) for o in outs)):
        sound(x, what)
    size = sum(float(np.sum(np.abs(o * r), where=np.abs(o) < 1e8)) for o, r in zip(outs, R))
    return types.SimpleNamespace(
        title=name, arrays=arrays, f=f, steps=single_steps(arrays), size=size, run=run,
        given={"dout": R, "the cache": cache}, inputs=inputs, outs=outs, wanted=wanted)

def draw_model(model, seed):
    """-> a draw of a model, as of an operation: its parameters are what moves."""
    _, text, cfg, init_params, make_batch, function = model
    rng, title = np.random.default_rng(seed), f"{function.__name__}, {text}"
    params = call(init_params, (cfg, rng, np.float64))
    expect(isinstance(params, dict), f"init_params returns {type(params).__name__}, expected dict")
    for name, p in params.items():
        sound(p, f"init_params: {name}")
        p += 0.3 * rng.standard_normal(p.shape)         # a bias of 0 could hide a mistake
    given = {"a parameter": params, "the batch": draw_batch(make_batch, cfg, rng)}
    with contextlib.suppress(Exception):                # T steps below the context, if it can that
        batch = draw_batch(make_batch, replace(cfg, context=cfg.context // 2 + 1), rng)
        function(params, copy.deepcopy(batch), cfg)
        given["the batch"] = batch
    before = copy.deepcopy(given)
    loss, _, *more = copy.deepcopy(call(function, (*given.values(), cfg), (2, 3)))  # carried over
    expect(same(given, before), f"{title}: the batch or a parameter was changed, and not only read")
    def run(given):
        loss, grads, *_ = call(function, (*given.values(), cfg, *more), [2 + len(more)])
        expect(isinstance(grads, dict), f"{title}: expected: loss_and_grads -> number, dict")
        return dict(grads)
    return types.SimpleNamespace(
        title=title, arrays=params, f=lambda: float(function(*given.values(), cfg, *more)[0]),
        steps=random_steps(params, rng), size=abs(float(loss)), run=run, given=given)

def draw_batch(make_batch, cfg, rng):
    """A batch by make_batch(cfg, step, dtype), or, in some lessons, make_batch(cfg, rng, dtype)."""
    names = list(inspect.signature(make_batch).parameters)
    given = rng if "rng" in names else int(rng.integers(1, 1000))
    return call(make_batch, (cfg, given, np.float64)[:max(2, len(names))])

def settle(draw, *args):
    """draw(*args, seed) with the first seed for which no bend is in the way -> the draw, judged."""
    for seed in range(20):
        d = draw(*args, seed)
        d.settled, d.middle = False, d.f()
        expect(same(d.f(), d.middle), f"{d.title}: called again, its forward gives another value")
        d.slopes = [slope(d.f, d.arrays[name], step, d.middle) for name, step in d.steps]
        if judge(d):
            d.settled = True                            # no need to look at f again
            return d
    raise Failure(f"{d.title}: no slope to compare with after 20 draws, because of bends")

def judge(d):
    """Get the gradients of a draw and compare them with its slopes.   Raises Failure."""
    given = copy.deepcopy(d.given)
    d.grads = copy.deepcopy(d.run(given))               # the next call may change the same object
    for k in given:
        expect(same(given[k], d.given[k]), f"{d.title}: {k} was changed on the way, not only read")
    expect(same(d.grads, d.run(given)), f"{d.title}: a second call gives another result: does a "
           "gradient live on, in a dict made outside or a default argument, and adds up?")
    missing, odd = sorted(d.arrays.keys() - d.grads), sorted(d.grads.keys() - d.arrays)
    expect(not missing, f"{d.title}: no gradient for {missing}")
    expect(not odd, f"{d.title}: gradients {odd} belong to no parameter")
    for name, x in d.arrays.items():
        a, what = np.asarray(d.grads[name]), f"{d.title}, gradient of {name}"
        slopes = [n for (other, _), n in zip(d.steps, d.slopes) if other == name]
        expect(a.any() or any(slopes), f"{what}: all zero, so that the check could not have failed")
        sound(a if a.shape == x.shape else x, what)
        d.grads[name] = a
    return compare(d)

def call(function, args, counts=()):
    """function(*args); an error in it, or a wrong number of results, is a Failure with its line."""
    try:
        result = function(*args)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        tips = [f"line {f.lineno}: {f.line}" for f in frames if "numpy" not in f.filename]
        if "mismatch" in str(error) or "broadcast" in str(error):
            tips.append("the sizes do not fit: is a .T, an axis or keepdims missing or too many?")
        raise Failure(f"{function.__name__} raises {error!r}", tips[-2:]) from error
    expect(not counts or isinstance(result, (tuple, list)) and len(result) in counts,
           f"{function.__name__} should return {counts and counts[0]} results, in a tuple")
    return result

def same(a, b, tolerance=0):
    """Equal (floats up to a relative error) through tuples, lists and dicts."""
    if isinstance(a, dict) and isinstance(b, dict):
        return set(a) == set(b) and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, (np.ndarray, np.generic, float)):
        floats = np.asarray(a).dtype.kind == "f"
        return np.shape(a) == np.shape(b) and (
            np.allclose(a, b, tolerance, tolerance / 100 * (1 + np.abs(b).max(initial=0)))
            if floats and tolerance else np.array_equal(a, b, equal_nan=floats))
    return a is b or (type(a) is type(b) and a == b)

near = functools.partial(same, tolerance=1e-5)          # as far as numeric slopes can tell

# ---- diagnosis: what kind of mistake gives just these numbers? -----------------------------------
def explain_operation(module, d):
    """A wrong gradient of an operation: what is wrong, how, and in which line.   -> Failure."""
    name, tree = next(iter(d.wrong)), module.functions[d.title + "_backward"]
    numeric = {k: np.reshape([n for (other, _), n in zip(d.steps, d.slopes) if other == k], x.shape)
               for k, x in d.arrays.items()}
    tips = [hint for hint in [hints(d.grads[name], name, numeric, d)] if hint]
    ends = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and n.value]
    for node in sorted(ends, key=lambda node: node.lineno)[-1:]:
        position = d.wanted.index(name.partition("[")[0])
        if isinstance(node, ast.Tuple) and position < len(node.elts):
            node = node.elts[position]
        stores = r"[^=(]*\b{0}\b[^=]*=(?!=)|.*\.at\({0}\b".format(getattr(node, "id", "!"))
        lines = [k for k in range(tree.lineno + 1, node.lineno)
                 if re.match(stores, numbered(module, k).partition(": ")[2])]
        tips.append(f"computed in {numbered(module, max(lines, default=node.lineno))}")
    return Failure(f"{d.title}, gradient of {name}{d.wrong[name][1]}", tips, d)

def hints(a, name, numeric, d):
    """How a wrong gradient is related to the right one -> a sentence, or nothing."""
    n = numeric[name]
    for other, m in numeric.items():
        if other != name and near(a, m) and not near(m, n):
            return f"this is the gradient of {other}: is the order that of forward's inputs?"
    if a.ndim > 1 and near(a.T, n):
        return "transposed: a .T is missing or too many"
    if a.shape != n.shape:
        for k in range(a.ndim):
            if near(a.sum(axis=k), n):
                return (f"a missing sum over axis {k}: forward broadcasts {name} along it"
                        if a.shape[k] > 1 else f"axis {k} is too many: keepdims, or brackets?")
        return ""
    ratio = float((a * n).sum() / max((a * a).sum(), 1e-300))
    if near(ratio * a, n) or not a.ndim:
        return "it is 0" if not a.any() else factor(ratio, d) if n.any() else "out ignores it"
    off = ~np.isclose(a, n, rtol=1e-5, atol=1e-7)
    if (n[off] == 0).all():
        return "right where it should not be zero, but these entries should be: a missing mask"
    for what, v in (*zip(("dout", "the second dout"), d.given["dout"]), *d.inputs.items()):
        if isinstance(v, (np.ndarray, float)) and np.asarray(v).dtype.kind == "f":
            if near(n - a, v) or near(a - n, v):
                return f"off by exactly {what}: is a path that goes around missing, or too many?"
            if np.shape(v) in (a.shape, ()) and near(a * v, n):
                return f"times {what} it would be right: a missing factor of the chain rule"
    for k in range(a.ndim):
        rest = n - a - (n - a).mean(axis=k, keepdims=True)
        if a.shape[k] > 1 and near(rest, np.zeros(a.shape)):
            return f"off by the same number along axis {k}: is a sum or mean over it missing?"
    targets, ids, mask = (np.asarray(d.inputs.get(key)) for key in ("targets", "ids", "mask"))
    if targets.ndim == 1 and np.array_equal(off, np.arange(off.shape[-1]) == targets[:, None]):
        return "wrong only at the targets: look at the part with the one-hot vector"
    if mask.ndim and mask.shape[:-1] == off.shape[:-1] and not (off & mask.all(axis=0)).any():
        return "right in sequences without padding: something is missing where mask is false"
    if ids.ndim and not off[np.bincount(ids.ravel(), minlength=len(off))[:len(off)] < 2].any():
        return "wrong only in rows that are named more than once: their gradients add up"
    wrong = off.any(axis=tuple(range(1, off.ndim)))
    if len(wrong) > 2 and wrong.sum() == len(wrong) - 1 and not wrong[[0, -1]].all():
        end, what = ("last", "later") if wrong[0] else ("first", "earlier")
        return f"right only at the {end} of axis 0: is what comes from {what} steps wrong?"
    return ("not this gradient times a factor, with the other sign or transposed: a term, an axis "
            "or a .T is wrong, in it or in the forward")

def factor(ratio, d):
    """Name the number that the gradient must be multiplied by."""
    numbers = [(abs(v), k) for k, v in d.inputs.items() if isinstance(v, float)]
    arrays = [(k, v) for k, v in d.inputs.items() if isinstance(v, np.ndarray)]
    for k, v in (*arrays, *(("out", np.asarray(o)) for o in d.outs)):
        numbers += [(n, f"the size of {k} along axis {axis}") for axis, n in enumerate(v.shape)]
        numbers.append((v.size, f"the number of entries of {k}"))
    powers = ((1, ""), (-1, "1 / "), (0.5, "the root of "), (-0.5, "1 / the root of "))
    for (n, what), (power, text) in itertools.product(numbers, powers):
        value, sign = max(n, 1e-9) ** power, "-" * (ratio < 0)
        if near(abs(ratio), value) and not any(near(value, other) for other in (0.5, 1, 2)):
            return f"a factor is wrong: multiply by {sign}{text}{n:g}, {what}"
    return "the sign is wrong" if near(ratio, -1) else f"a factor is wrong: multiply by {ratio:.6g}"

def explain_model(d):
    """Where, on the way back through a model, do right gradients turn to wrong?   -> Failure."""
    class Watched(np.ndarray):                          # a parameter that notes its first use
        def __array_finalize__(self, source):
            self.name = getattr(source, "name", None)
            order[self.name] = True
        def __array_ufunc__(self, function, method, *args, **options):
            order.update({x.name: True for x in args if isinstance(x, Watched)})
            plain = [np.asarray(x) if isinstance(x, Watched) else x for x in args]
            return getattr(function, method)(*plain, **options)

    order, given = {}, copy.deepcopy(d.given)
    given["a parameter"] = {name: p.view(Watched) for name, p in d.arrays.items()}
    for name, p in given["a parameter"].items():
        p.name = name
    with contextlib.suppress(Exception):
        d.run(given)
    order = [name for name in {**order, **d.arrays} if name][::-1]      # used last, comes first
    bad, good = ([name for name in order if (name in d.wrong) is wrong] for wrong in (True, False))
    tips = [f"in the order of the backward pass, right: {' '.join(good) or 'none'}",
            f"wrong: {' '.join(bad)}"]
    ratios = [n / (d.grads[name] * step).sum() for (name, step), n in zip(d.steps, d.slopes)
              if name in bad and d.grads[name].shape == step.shape]
    if np.isfinite(ratios).all() and all(near(r, round(ratios[0])) for r in ratios):
        tips[:0] = [f"times {ratio:.5g} it would be right" for ratio in ratios[:1]]
    if not good:
        tips.append("all are wrong: look where the way back begins, at the loss")
    elif len(bad) == 1:
        tips.append(f"only {bad[0]} is wrong: its own line, or a second place that uses it")
    elif order[len(good):] == bad:
        tips.append(f"all from {bad[0]} on are wrong: look between {good[-1]} and {bad[0]}")
    return Failure(f"{d.title}: gradient of {bad[0]}{d.wrong[bad[0]][1]}", tips, d)

def numbered(module, line, last=0):
    """Lines of the file without their comments, as "line 12: text"."""
    lines = source(module.__file__).split("\n")[line - 1:max(line, last)]
    return f"line {line}: " + " ".join(re.sub(r"\s\s+#.*", "", text).strip() for text in lines)

# ---- tasks: which configurations of which models -------------------------------------------------
SMALL = dict(score_init_scale=1.0,      # quick to check, where a Config has such a field
    hidden=6, batch_size=5, context=4, embed_dim=3, dim=12, heads=2, length=7, window=7, bits=3,
    delay=4, threads=2, decoder_dim=6, decoder_layers=2, mask_ratio=0.25, size=8, channels=2)
NUMBERS = dict(     # numbers that switch something on
    layers=(1, 2), inputs=(2, 3), l1=(0.0, 0.02), l2=(0.0, 0.03), fuse=(0, 2), dropout=(0.0, 0.4),
    label_smoothing=(0.0, 0.2), patch=(0, 14, 4))
TRAINING = {"optimizer", "schedule", "flip", "lower", "unit"}       # not the gradient

def variants(Config, check):
    """Every two choices meet in some row that check allows -> list of (text, configuration)."""
    default = dict(vars(Config()))
    check(Config())
    for f in fields(Config):
        kinds = {int: int, float: (int, float), str: str, bool: bool}.get(f.type, object)
        expect(isinstance(default[f.name], kinds), f"Config.{f.name}: expected "
               f"{getattr(f.type, '__name__', f.type)}, found {default[f.name]!r}")
    choices = {f.name: getattr(f.type, "__args__", ()) or ((False, True) if f.type is bool else
               [v for v in NUMBERS.get(f.name, ()) if type(v) is type(default[f.name])])
               for f in fields(Config) if f.name not in TRAINING}
    choices = {name: values for name, values in choices.items() if len(values) > 1}
    def allowed(row):
        with contextlib.suppress(ValueError):
            cfg = Config(**row)
            check(cfg)
            return cfg
    for name, value in 2 * [*SMALL.items(), ("hidden", "5,4")]:     # twice: fields are coupled
        if name not in choices and type(default.get(name)) is type(value):
            default[name] = value if allowed({**default, name: value}) else default[name]
    def pairs(row):
        return set(itertools.combinations([(k, row[k]) for k in choices], min(2, len(choices))))
    rng, rows, met = np.random.default_rng(0), [], set()
    while True:
        tries = [{**default, **{k: v[rng.integers(len(v))] for k, v in choices.items()}}
                 for _ in range(200 if choices else 1)]
        best = max(filter(allowed, tries), key=lambda row: len(pairs(row) - met), default=default)
        if rows and pairs(best) <= met:
            break
        rows.append(best)
        met |= pairs(best)
    return [(", ".join(f"{k}={v}" for k, v in row.items() if k in choices and v != default[k])
             or "default", allowed(row)) for row in rows]

def models(module):
    """By TASKS or the FOUR names -> list of (task, text, cfg, init, make_batch, loss_and_grads)."""
    found, have = {}, vars(module)
    tasks = have.get("TASKS") or {"": [have.get(name) for name in FOUR]}
    for task, (Config, *functions) in [(task, row[:4]) for task, row in tasks.items() if row[0]]:
        expect(hasattr(Config, "__dataclass_fields__"), "Config: does @dataclass stand above it?")
        rows = variants(Config, have.get("check", id)) if all(functions) else ()
        for k, (text, cfg) in enumerate(rows):
            key = (functions[2], text) if k else task           # other data: once is enough
            found.setdefault(key, (task, f"{task} {text}".strip(), cfg, *functions))
    return list(found.values())

# ---- a copy and its lesson -----------------------------------------------------------------------
@functools.lru_cache
def lessons():
    """The lessons here, in order: files with Config that begin with their own name."""
    found = [path for path in Path(__file__).resolve().parent.glob("[!.]*.py") if path.is_file()
             and re.search(rf'^"""{path.name}: (?s:.*)^class Config(?s:.*)^TASKS\b',
                           path.read_text("utf-8", "ignore"), re.M)]
    return sorted(found, key=lambda p: (ORDER.index(p.stem) if p.stem in ORDER else 99, p.name))

def names_in(path, end="\0"):
    """The functions, classes and CONSTANTS of a file, in order; those above end."""
    names = r"^(?:def |class |(?=[A-Z\d_, ]+ = ))(\w+)"
    return re.findall(names, source(path).partition(end)[0], re.M)

def closest_lesson(path, names):
    """The lesson that a copy with these functions is most like -> path; None if none is."""
    found = []
    for k, other in enumerate(() if path in lessons() else lessons()):
        shared, spine = names & set(names_in(other)), set(names_in(other, "\n# ===="))
        score = len(shared) + 3 * (other.stem in path.stem), len(names & spine) / len(spine), -k
        found += [(score, other)] * bool(score[0])
    return max(found)[1] if found else None

def pieces(module, name):
    """The statements of a function, the lines of a table -> list of (text, line as it stands)."""
    tree = module.nodes[name]
    nodes, found = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)], []
    for n in sorted(nodes, key=lambda n: n.lineno):
        last = n.body[0].lineno - 1 if hasattr(n, "body") else n.end_lineno
        text = ast.unparse(n).splitlines()[0]
        if isinstance(n, ast.Assign) and (n is tree or last > n.lineno + 3):    # line by line
            lines = [numbered(module, k) for k in range(n.lineno, last + 1)]
            found += [(line.partition(": ")[2], line) for line in lines]
        elif text[0] not in "'\"":                      # without the docstring
            found.append((text, numbered(module, n.lineno, last)))
    return found

def diff(module, lesson, names, most=6):
    """Where functions and tables of a copy differ from the lesson's, if they are alike -> lines."""
    lines = []
    for name in [n for n in dict.fromkeys(names) if n in {*module.nodes} & {*lesson.nodes}]:
        mine, its = (pieces(m, name) for m in (module, lesson))
        texts = [[text for text, _ in side] for side in (mine, its)]
        words = [re.findall(r"\w+|\S", " ".join(side)) for side in texts]
        alike = difflib.SequenceMatcher(None, *words, False).ratio() > 0.6
        for what, i, ii, j, jj in difflib.SequenceMatcher(None, *texts, False).get_opcodes():
            if alike and what != "equal":
                whose = f"{Path(lesson.__file__).name}, {name}: "
                yours = [f"yours, {line}" for _, line in mine[i:ii]]
                right = [whose + line.partition(": ")[2] for _, line in its[j:jj]]
                lines += [x for pair in itertools.zip_longest(yours, right) for x in pair if x]
    return lines[:most] + ["..."] * (len(lines) > most)

def other_values(module, draws, good):
    """Where does a copy give other values than its lesson?   -> {name: note}; names that agree."""
    lesson, whose, notes, agree = load(module.lesson), module.lesson.name + "'s", {}, set()
    def compared(name, yours, right, text):
        uses = reached(module, name)
        if same(yours, right, 1e-9):
            agree.add(name)
        elif not {*uses} & notes.keys():                # else it has been said
            lines = diff(module, lesson, [name]) or diff(module, lesson, uses)
            notes[name] = [text, *(lines or ["no line can be compared; look at what it uses"])]
    for name in [name for name in module.nodes if name in {*vars(module)} & {*lesson.nodes}]:
        data = isinstance(vars(lesson)[name], (int, float, list, np.ndarray))
        if data and diff(module, lesson, reached(module, name)):
            compared(name, vars(module)[name], vars(lesson)[name], f"{name} is not {whose}")
    for d in draws:
        name, right = d.title + "_forward", forward_values(lesson, d.title, d.inputs)
        if [*map(np.shape, right)] == [*map(np.shape, d.outs)]:
            compared(name, d.outs, right, f"{name} gives other values than {whose}")
    for name in [name for name in module.functions if name in lesson.functions]:
        yours, right = (three_steps(m, name, lesson) for m in (module, lesson))
        if yours and right:
            compared(name, yours, right, f"{name} gives other values than {whose}")
    spine = [vars(lesson)[name] for name in FOUR]       # which tasks may do without
    for _, text, cfg, *theirs in [("", "default", spine[0](), *spine[1:]), *models(lesson)]:
        names, Mine = [f.__name__ for f in theirs], vars(module).get(type(cfg).__name__)
        with contextlib.suppress(Exception):            # a model of its own, or not there yet
            mine = Mine(**{k: v for k, v in vars(cfg).items() if hasattr(Mine, k)})
            sides = [([vars(module)[name] for name in names], mine), (theirs, cfg)]
            rng = functools.partial(np.random.default_rng, 0)
            yours, right = ((init(c, rng(), np.float64), draw_batch(make, c, rng()))
                            for (init, make, _), c in sides)
            alike = all(yours[0][k].shape == p.shape for k, p in right[0].items())
            for name, a, b in zip(names, yours, right):
                if alike or good and diff(module, lesson, [name]):
                    compared(name, a, b, f"{name}, {text}: other numbers than {whose}, same seed")
            assert alike
            for p in right[0].values():
                p += 0.3 * rng().standard_normal(p.shape)
            a, b = (float(function(*copy.deepcopy(right), c)[0]) for (*_, function), c in sides)
            compared(names[2], a, b, f"the loss, {text}: yours {a:.6g}, {whose} {b:.6g}")
    return notes, agree

def forward_values(module, name, inputs):
    """The outputs of an operation for these inputs; none if it cannot be called like that."""
    with contextlib.suppress(Exception):
        out, _ = getattr(module, name + "_forward")(*copy.deepcopy(inputs).values())
        return out if isinstance(out, tuple) else (out,)
    return ()

def three_steps(module, name, lesson=None):
    """Three steps of an update rule -> list of (parameters, gradients, result, ascent)."""
    rng, found = np.random.default_rng(0), []
    kit = {"params": {"W": rng.standard_normal((3, 5)), "b": rng.standard_normal(5)}, "state": {},
           "lr": 0.1, "limit": 2.0, "weight_decay": 0.1, "cfg": lesson and lesson.Config()}
    updates = name.endswith("_update") or name in ("clip_norm", "learning_rate")
    with contextlib.suppress(Exception):                # other arguments
        wanted = inspect.signature(vars(module)[name]).parameters
        for step in (1, 20, 300) if updates else ():
            before = copy.deepcopy(kit["params"])
            grads = {k: rng.standard_normal(p.shape) for k, p in before.items()}
            kit.update(step=step, grads=copy.deepcopy(grads))
            result = vars(module)[name](**{k: kit[k] for k in wanted if k in kit})
            ascent = sum(((kit["params"][k] - before[k]) * g).sum() for k, g in grads.items())
            found.append(copy.deepcopy((kit["params"], kit["grads"], result, ascent)))
    return found

# ---- planting bugs, and trying repairs -----------------------------------------------------------
# What a tired person would type, and the other way round; a, b, c, d stand for pieces of program.
ORDERS = ["axis=0 -> axis=1", "axis=1 -> axis=0", "axis=2 -> axis=0", "axis=3 -> axis=0",
          "axis=-1 -> axis=0", "return a, b -> return b, a",
          "return a, b, c -> return b, a, c or return a, c, b",
          "return a, b, c, d -> return b, a, c, d or return a, c, b, d or return a, b, d, c"]
EDITS = ["a + b -> a - b or a or b", "a - b -> a + b or a or b", "-a -> a", "a * b -> a or b",
         "a / b -> a", "a @ b -> b @ a or a", "a ** b -> a", "a.T -> a", "a.sum -> a.mean",
         "a.sum() -> a", "a.sum(axis=b) -> a", "a.sum(axis=b, keepdims=c) -> a", "np.exp(a) -> a",
         "np.sign(a) -> a", "np.sqrt(a) -> a", "np.where(a, b, c) -> b", "a > b -> a <= b",
         "a < b -> a > b", "a is b -> a is not b", "a == b -> a != b", "not a -> a", "~a -> a",
         "a += b -> a = b or pass", "a -= b -> pass", "a *= b -> pass", "a[b] = c -> pass", *ORDERS]
REPAIRS = [["-a -> a", "a + b -> a - b", "a - b -> a + b", "a * b -> a or b", "a / b -> a",
            "a @ b -> b @ a or a.T @ b or a @ b.T or b.T @ a or b @ a.T", "a.T -> a",
            "a.mean -> a.sum", "a > b -> a <= b", "a < b -> a >= b", *ORDERS],
           ["a -> -a or a.sum(axis=0)"]]

@functools.lru_cache
def template(text):
    """A piece of program as a syntax tree."""
    axis = text.startswith("axis=")                     # an argument, which needs a call around it
    node = ast.parse(f"f({text})" if axis else text).body[0]
    return node.value.keywords[0] if axis else node.value if isinstance(node, ast.Expr) else node

def matches(pattern, node, found):
    """Is a piece of program of this form? found: what a, b, c, d stand for."""
    if isinstance(pattern, ast.Name) and len(pattern.id) == 1:
        found[pattern.id] = node
        return isinstance(node, ast.expr)
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(map(matches, pattern, node, [found] * len(node)))
    if isinstance(pattern, ast.AST) and type(pattern) is type(node):
        return all(matches(value, getattr(node, field), found)
                   for field, value in ast.iter_fields(pattern) if field != "ctx")
    return pattern == node

def mutants(tree, rules):
    """Every function that is one change away from this one -> (line, text, piece, new tree)."""
    loops = any(isinstance(n, ast.While) for n in ast.walk(tree))   # changed, it might never end
    for node, rule in itertools.product(() if loops else ast.walk(tree), rules):
        (left, rights), found = rule.split(" -> "), {}
        if type(getattr(node, "ctx", 0)) is not ast.Store and matches(template(left), node, found):
            for right in rights.split(" or "):
                new = template(right)
                bound = {id(n): found[n.id] for n in ast.walk(new) if getattr(n, "id", 0) in found}
                changed = copy.deepcopy(tree, {id(node): copy.deepcopy(new, bound)})
                yield getattr(node, "lineno", 0), f"{left} -> {right}", node, changed

@contextlib.contextmanager
def planted(module, tree):
    """For a while, this function stands in place of the one of its name."""
    function = inspect.unwrap(vars(module)[tree.name])
    code, whole = function.__code__, ast.fix_missing_locations(ast.Module([tree], []))
    codes = compile(whole, module.__file__, "exec").co_consts
    function.__code__ = next(c for c in codes if getattr(c, "co_name", "") == tree.name)
    try:
        yield
    finally:
        function.__code__ = code

def noticed(d):
    """Are the gradients of a draw wrong now?"""
    with contextlib.suppress(Exception, SystemExit):
        judge(d)
        return bool(d.wrong)
    return True

def repair(module, names, draw):
    """Try repairs on these functions -> a hint on one after which the draw passes, in a list."""
    end = time.perf_counter() + 10
    trees = [module.functions[name] for name in names if name in module.functions]
    for rules, tree in itertools.product(REPAIRS, trees):
        for line, text, _, new in mutants(tree, rules):
            with contextlib.suppress(SyntaxError, ValueError, TypeError), planted(module, new):
                if time.perf_counter() < end and not noticed(draw):
                    sides = zip(*(ast.unparse(t).splitlines() for t in (tree, new)))
                    after = [b.strip() for a, b in sides if a != b][0]
                    return [f"line {line} ({text}), and it passes: {after}"]
    return []

def check_teeth(path):
    """Plant bugs, one at a time, in every backward -> number caught, number that survived."""
    module, caught, harmless, survivors = run_file(path), 0, 0, []
    whole = [(d, called_by(module, d)) for d in [settle(draw_model, m) for m in models(module)]]
    for name in operations(module):
        tree = module.functions[name + "_backward"]
        draws = [settle(draw_operation, module, name, case) for case in cases_of(module, name)]
        draws += [d for d, called in whole if tree.name in called]
        expect(draws and not any(map(noticed, draws)), f"{name} is wrong, or nothing calls it")
        right = [d.grads for d in draws]
        for line, text, node, new in mutants(tree, EDITS):
            with planted(module, new):
                if any(map(noticed, draws)):
                    caught += 1
                    continue
            equal = all(same(d.grads, grads, 1e-9) for d, grads in zip(draws, right))
            axis = "axis=" * isinstance(node, ast.keyword)
            stop = template(axis + "not_defined")       # would anybody notice an error here?
            stop = ast.Expr(stop) if isinstance(node, ast.stmt) else stop
            with planted(module, copy.deepcopy(tree, {id(node): stop})):
                run = any(map(noticed, draws))
            harmless += equal and run                   # then it was no bug
            survivors += [] if equal and run else [
                f"survived: {tree.name}, line {line}: {text}" + " (never run)" * (not run)]
    total = caught + harmless + len(survivors)
    say("teeth", f"caught {caught} / {total} planted; {harmless} change no gradient", survivors)
    return caught, len(survivors), 0

# ---- files ---------------------------------------------------------------------------------------
@functools.lru_cache
def source(path):
    """The text of a file of Python, in the encoding that it names.   Raises Failure."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise Failure(f"it cannot be read: {error}") from error
    line = 1 + text.partition("\0")[0].count("\n")
    expect("\0" not in text, f"line {line} holds a NUL byte: expected a text file")
    return text

def parse(text):
    """Read a file as far as it goes -> syntax tree; what is wrong then; what is only unfinished."""
    lines, end, at, wrong = text.split("\n"), None, 0, ""
    while True:
        try:
            tree = ast.parse("\n".join(lines[:end]))
            more = any(re.match(r"[\w@]", line) for line in lines[at:])
            if not wrong or more and "triple-quoted" not in wrong:
                return tree, wrong, []
            return tree, "", [f"not there yet: {wrong}"]
        except SyntaxError as error:
            at = at or error.lineno or 1
            wrong = wrong or f"line {at} cannot be read: {error.msg}: {str(error.text).strip()}"
            starts = [k for k, line in enumerate(lines[:at if end is None else end])
                      if re.match(r"[\w@]", line)]
            end = starts[-1] if starts else 0           # all above the line where something begins

def run_file(path):
    """Run a file as a module, statement by statement.   module.absent: what is not there yet."""
    module = sys.modules["checked"] = types.ModuleType("checked")
    tree, module.broken, module.absent = parse(source(path))
    module.__file__, module.typed = str(path), path not in lessons()
    module.print = lambda *words, **options: None       # a function may print a hundred times
    module.functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    module.nodes = {t.id: n for n in tree.body if isinstance(n, ast.Assign) for target in n.targets
                    for t in getattr(target, "elts", [target]) if isinstance(t, ast.Name)}
    module.nodes.update(module.functions)
    module.lesson = closest_lesson(path, module.functions.keys() - FOUR)
    module.known = set(names_in(module.lesson) if module.lesson else ())
    last = getattr(tree.body[-1], "name", "") if tree.body else ""
    if last in module.functions and last.endswith(("_forward", "_backward", *FOUR)):
        if not any(isinstance(n, ast.Return) for n in module.functions[last].body):
            module.absent.append(f"the end of {last} is not there yet")
            tree.body.remove(module.functions.pop(last))
    for node in tree.body:
        used = {getattr(n, "id", "") for n in ast.walk(node)} & module.functions.keys()
        starts = isinstance(node, (ast.Expr, ast.For, ast.Try, ast.With)) and used
        if starts or isinstance(node, ast.While):
            continue                                    # it starts a training
        try:
            exec(compile(ast.Module([node], []), str(path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            if not not_yet(module, error):
                below = ['put it below  if __name__ == "__main__":']
                tips = [numbered(module, node.lineno)]
                tips += below * isinstance(error, (SystemExit, EOFError))
                raise Failure(f"it does not run: {error!r}", tips) from error
            module.absent.append(f"line {node.lineno}: {not_yet(module, error)}")
            module.functions.pop(getattr(node, "name", ""), None)
    return module

load = functools.lru_cache(run_file)                    # for lessons

def not_yet(module, error):
    """If an error comes of what a copy has not got yet, but its lesson has: a sentence."""
    error, there = error.__cause__ or error, vars(load(module.lesson)) if module.lesson else {}
    name, have = getattr(error, "name", None), vars(module)
    if isinstance(error, AttributeError) and error.obj is not module:
        kind = type(error.obj).__name__
        there, have = getattr(there.get(kind), "__dataclass_fields__", ()), ()
    if isinstance(error, (NameError, AttributeError)) and name in there and name not in have:
        line = re.search(rf"^(import|from) .*\b{name}\b.*", source(module.lesson), re.M)
        what = f"{kind}.{name}" if not have else f"`{line[0]}`" if line else name
        return f"{what} is not there yet; {module.lesson.name} has it"

def reached(module, *names):
    """These functions and tables of a file, and all that they use, directly or not."""
    found = [*dict.fromkeys(names)]
    for name in found:                                  # the list grows on the way
        for n in ast.walk(module.nodes.get(name, ast.Module([], []))):
            used = getattr(n, "id", name)
            if used in module.nodes and used not in found:
                found.append(used)
    return found

def operations(module):
    """The operations with a backward, those that others are built of first."""
    names = [name[:-9] for name in module.functions if name.endswith("_backward")]
    return sorted(names, key=lambda name: len(reached(module, name + "_backward")))

def called_by(module, d):
    """The names of the functions of the file that are called for the gradients of a draw."""
    called, given = set(), copy.deepcopy(d.given)
    sys.setprofile(lambda frame, event, arg: called.add(frame.f_code))
    try:
        d.run(given)
    finally:
        sys.setprofile(None)
    return {code.co_name for code in called if code.co_filename == module.__file__}

# ---- the report ----------------------------------------------------------------------------------
def say(word, text, lines=()):
    """Print a finding (ok, FAIL, DIFF: other values, later: not there yet, note), lines on it."""
    for start, line in zip([f"  {word:5s} ", *[" " * 8] * len(lines)], [text, *lines]):
        print(start + "\n            ".join(textwrap.wrap(line, 86, break_on_hyphens=False)))

def examined(module, names, wrong, draw, *args):
    """A draw that is right, or a Failure with hints on these functions."""
    try:
        d = settle(draw, *args)
        if d.wrong:
            raise explain_operation(module, d) if "inputs" in vars(d) else explain_model(d)
        return d
    except Failure as error:
        lesson, lines, d = module.lesson and load(module.lesson), [], error.draw
        broken = [name for name in wrong if name + "_backward" in reached(module, *names)]
        if broken:
            error.tips = ["mend first: " + ", ".join(broken)]
        if broken or not module.typed or not_yet(module, error):
            raise
        error.tips += [f"checked with {args[0][2]}"] if draw is draw_model and not d else []
        forward = names[0].replace("_backward", "_forward")
        makers = [f.__name__ for f in args[0][3:5]] if draw is draw_model else []
        groups = [names, reached(module, *names, forward), reached(module, *makers)]
        if forward not in names and str(error).startswith(forward):
            groups = [reached(module, forward)]
        elif lesson and "inputs" in vars(d or error):   # backward differs only if forward agrees
            if not same(d.outs, forward_values(lesson, d.title, d.inputs), 1e-9):
                groups.insert(0, reached(module, forward))
        for group in groups if lesson else ():
            lines = lines or diff(module, lesson, group)
        if d and (not lines or len(lines) > 4):
            lines = repair(module, names, d) or lines
        error.tips += lines
        raise

def operation_draws(module, name, wrong):
    """An operation in all its cases, held equal to its plain twin.   -> draws, what to say."""
    expect(name + "_forward" in module.nodes, f"{name}_backward has no {name}_forward")
    draws, plain, twin = [], name.removeprefix("fast_").removesuffix("_loop"), ""
    for case in cases_of(module, name):
        d = examined(module, [name + "_backward"], wrong, draw_operation, module, name, case)
        if plain + "_backward" in module.functions and plain not in [name, *wrong]:
            other, twin = settle(draw_operation, module, plain, case), f", as {plain}"
            expect(same([d.outs, [*d.grads.values()]], [other.outs, [*other.grads.values()]], 1e-9),
                   f"{name} and {plain} give different results")
        draws.append(d)
    worst = max((d.worst for d in draws), default=0)
    return draws, f"{len(draws)} case(s), worst relative error {worst:.0e}{twin}"

def task_draws(module, group, wrong):
    """All variants of a task, end to end.   -> draws, what to say."""
    name = group[0][-1].__name__
    names = [n for n in reached(module, name) if n == name or n.endswith("_backward")]
    draws = [examined(module, names, wrong, draw_model, model) for model in group]
    return draws, f"{len(draws)} variant(s), {sum(len(d.arrays) for d in draws)} arrays"

def check_file(path):
    """Check every operation of a file, then its tasks -> how many passed, failed, differ."""
    module, passed, wrong, draws, alone = run_file(path), 0, [], [], []
    own, names, tasks = getattr(module, "GRADCHECK", {}), operations(module), {}
    expect(isinstance(own, dict), "GRADCHECK: expected a dict, of functions of rng")
    def attempt(title, action, *args):
        try:
            return action(*args)
        except (Exception, SystemExit) as error:
            if not_yet(module, error):
                module.absent.append(not_yet(module, error))
                return say("later", f"{title}: {module.absent[-1]}")
            wrong.append(title)
            what = str(error) if isinstance(error, Failure) else f"{title}: {error!r}"
            return say("FAIL", what, getattr(error, "tips", ()))
    for text in module.absent:
        say("later", text)
    attempt("", expect, not module.broken, module.broken)
    for name in own:
        attempt(name, expect, name in names, f"GRADCHECK[{name!r}]: there is no {name}_backward")
    for name in names:
        found, text = attempt(name, operation_draws, module, name, wrong) or (None, "")
        draws += found or []
        passed += bool(found)
        if found:
            say("ok", f"{name:24s} {text}")
        elif found == []:                               # no case, so that a model has to call it
            alone.append(name)
    missing = [n for n in FOUR if n not in vars(module) and not hasattr(module, "TASKS")]
    called = {*FOUR} if missing else set()              # what is checked, if not now then later
    if missing and names:
        what = ", ".join(["end to end", *(n for n in alone if n + "_backward" in module.known)])
        say("later", f"{what}: not there yet: {', '.join(missing)}")
    for model in [] if missing else attempt("end to end", models, module) or []:
        tasks.setdefault(model[-1], []).append(model)   # together if of one function
    good = bool(tasks)
    for group in tasks.values():
        title = " ".join(["end to end", *dict.fromkeys(model[0] for model in group)]).strip()
        found, text = attempt(title, task_draws, module, group, wrong) or ([], "")
        here = {name for d in found for name in called_by(module, d)}
        passed, good = passed + bool(found), good and bool(found)
        called |= here or {f.__name__ for f in group[0][3:]}
        if found:
            also = [name for name in alone if name + "_backward" in here]
            say("ok", f"{title:24s} {', '.join([text, *also])}")
    for name in alone:
        if (missing or good) and name + "_backward" not in {*called, *module.known}:
            text = f'add to the file: GRADCHECK = {{"{name}": lambda rng: dict(...)}}'
            attempt(name, expect, False, f"{name}: nobody says how to call it; {text}")
    shared = [n for n in module.functions if n in module.known and n.endswith("_forward")]
    started = shared or module.lesson and module.lesson.stem in path.stem
    if not (names or started or wrong or module.absent or "Config" in vars(module)):
        attempt("", expect, False, "no op_backward in it: nothing to check")
    differ = notes(module, draws, attempt, called, good) if module.typed and names or started else 0
    return passed, len(wrong), differ

def notes(module, draws, attempt, called, good):
    """On a copy: what differs, goes uphill, is typed, is not checked.   -> how many differ."""
    lesson, mine, names = module.lesson, module.functions.keys() - FOUR, operations(module)
    different, agree = other_values(module, draws, good) if lesson else ({}, set())
    for text, *lines in different.values():
        say("DIFF", text, lines)
    for name, ascent in [(n, a) for n in mine for *_, a in three_steps(module, n)[:1]]:
        what = "goes uphill: it adds the gradient" if ascent > 0 else "yields nan: a root below 0?"
        attempt(name, expect, ascent <= 0, f"{name} {what}")
    if not mine or len(mine & module.known) > len(mine) / 2:
        spine = names_in(lesson, "\n# ====")
        parts = [n[:-9] for n in spine if n.endswith("_backward")]
        done = [n for n in parts if {n + "_forward", n + "_backward"} <= mine]
        first = min(k for k, n in enumerate([*spine, ""]) if n in {"", *vars(module)})
        absent = [re.match(r"(?:[^:]+: )?(.+?) (?:is not|cannot)", n)[1] for n in module.absent]
        rest = absent + [n for n in spine[first:] + spine if n not in vars(module)]
        then = f"next: {rest[0]}" if rest else "the spine is complete"
        alike = [name for name in module.functions if name in agree - {"loss_and_grads"}]
        if alike:
            say("ok", f"same values as in {lesson.name}: {', '.join(alike)}")
        say("note" if names else "later",
            f"{len(done)} of {len(parts)} operations of the spine of {lesson.name}; {then}")
    other = any(name.endswith("_forward") or name.isupper() for name in different)
    if good and not other and "loss_and_grads" not in {*different, *agree}:
        say("note", "no lesson has this model, so nobody compared values: a wrong mask would pass")
    told = [*different, *agree, *called, *(n + e for n in names for e in ("_forward", "_backward"))]
    told = [*reached(module, *told), *(reached(load(lesson), *told) if lesson else ())]
    rest = [name for name in module.functions if name not in told]
    if rest:
        say("note", "nobody compares these; do both files print the same? " + ", ".join(rest))
    return len(different)

def main(words):
    """Check these files, or all lessons beside this program -> exit status."""
    start, total = time.perf_counter(), np.zeros(3, int)
    flags = {word for word in words if word.startswith("-")}
    if flags & {"-h", "--help"}:
        return print(__doc__)
    check = check_teeth if "--teeth" in flags else check_file
    paths = [Path(os.path.realpath(word)) for word in words if word not in flags] or lessons()
    errors = [f"{flag}: unknown flag, see --help" for flag in flags - {"--teeth"}]
    errors += [f"{p}: expected a Python file, found none" for p in paths if not p.is_file()]
    if errors:
        print("gradcheck.py:", errors[0], file=sys.stderr)
        return 2
    for path in paths:
        print(path.name)
        try:
            with warnings.catch_warnings(), np.errstate():      # as before, afterwards
                if check is check_teeth or path not in lessons():
                    np.seterr(all="ignore")             # the report alone shall say what is wrong
                    warnings.simplefilter("ignore")
                total += check(path)
        except Failure as error:
            total[1] += 1
            say("FAIL", str(error), error.tips)
    also = f", {total[2]} differ{'s' * int(total[2] == 1)} from the lesson" if total[2] else ""
    print(f"{time.perf_counter() - start:.1f} s\n{total[0]} passed, {total[1]} failed{also}")
    return int(total[1] > 0)

if __name__ == "__main__":
    if sys.stdout is sys.__stdout__:                    # a console, not a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        with contextlib.suppress(AttributeError, ValueError):   # Windows; not the main thread
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it quietly
    stdin, sys.stdin, status = sys.stdin, io.StringIO(), 130        # nobody answers input()
    with contextlib.suppress(KeyboardInterrupt):
        status = main(sys.argv[1:])
    sys.stdin = stdin
    if status:                                          # a notebook shows even sys.exit(0)
        sys.exit(status)
