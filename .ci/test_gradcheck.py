"""gradcheck.py says what is wrong in a typed copy, where, and what it has not checked."""
import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(p for p in ROOT.glob("*.py") if p.name != "gradcheck.py")
ENDS = "\n# ==== A complete program ends here."
UNSEEN = "nobody compares these; do both files print the same?"


def check(path, *flags, **options):
    """Run gradcheck.py on a file -> its words, joined by single spaces; exit status."""
    options = dict(capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL) | options
    done = subprocess.run([sys.executable, "-W", "error", ROOT / "gradcheck.py", *flags, path], **options)
    assert not done.stderr, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100 or "--teeth" in flags, done.stdout
    last = r"\d+ passed, \d+ failed(, 1 differs from the lesson|, \d+ differ from the lesson)?"
    assert re.fullmatch(last, done.stdout.splitlines()[-1]), done.stdout
    return " ".join(done.stdout.split()), done.returncode


def lesson(name):
    """The text of a lesson."""
    return (ROOT / name).read_text(encoding="utf-8")


def spine(name):
    """A lesson up to the line where the complete program ends."""
    return lesson(name).partition(ENDS)[0] + "\n"


def home(name, *functions):
    """The text of a lesson, only its spine if these functions are in it, which is quicker."""
    text = spine(name)
    return text if all(f and f"\ndef {f}(" in text for f in functions) else lesson(name)


def with_slip(source, function, right, wrong):
    """The source with a slip in one function; function "" stands for anywhere."""
    found = re.search(rf"^def {function}\(.*?(?=^\S|\Z)", source, re.M | re.S)
    start, end = found.span() if function else (0, len(source))
    body = source[start:end]
    assert body.count(right) == 1, f"{function}: {right!r} stands there {body.count(right)} times"
    return source[:start] + body.replace(right, wrong) + source[end:]


def report(folder, source, name="my_copy.py", **options):
    """gradcheck's words on a file with this text; exit status."""
    path = folder / name
    path.write_bytes(source) if isinstance(source, bytes) else path.write_text(source, encoding="utf-8")
    return check(path, **options)


def says(found, words, status):
    """The report ends with this status and holds these words, in this order."""
    text, code = found
    at = 0
    for word in words:
        assert word in text[at:], f"{word!r} is missing in: {text}"
        at = text.index(word, at) + len(word)
    assert code == status, text


# ---- slips in copies of lessons: function, right, wrong, what the report must say ----------------

SLIPS = [
    ("vanilla_rnn.py", "rnn_forward", "h = [h0]", "h = [0 * h0]", ["rnn, gradient of h0", "out ignores it"]),
    ("mlp.py", "linear_backward", "dout @ W.T", "dout @ W",
     ["linear_backward raises", "is a .T", "dout @ W"]),
    ("mlp.py", "linear_backward", "x.T @ dout", "dout.T @ x",
     ["linear, gradient of W", "transposed", "computed in line "]),
    ("mlp.py", "linear_backward", "dout.sum(axis=0)", "dout",
     ["linear, gradient of b", "a missing sum over axis 0"]),
    ("mlp.py", "linear_backward", "dout.sum(axis=0)", "dout.mean(axis=0)",
     ["linear, gradient of b at [", "multiply by 3, the size of x along axis 0"]),
    ("mlp.py", "linear_backward", "dout @ W.T", "dout @ w.T", ["NameError", "line "]),
    ("mlp.py", "binary_cross_entropy_backward", "return (sigmoid(logits) - targets)",
     "return (targets - sigmoid(logits))", ["binary_cross_entropy", "the sign is wrong"]),
    ("mlp.py", "mse_backward", "2 * dout", "dout",
     ["mse, gradient of y at [", "yours ", "numeric ", "multiply by 2"]),
    ("mlp.py", "softmax_cross_entropy_backward", "dlogits * (dout / len(targets))",
     "dlogits * dout", ["softmax_cross_entropy", "multiply by 1 / 3"]),
    ("mlp.py", "softmax_cross_entropy_backward", "np.exp(log_p)\n",
     "np.exp(log_p).astype(np.float32)\n", ["is float32, expected float64"]),
    ("mlp.py", "batchnorm_backward", "(dout * xhat).sum(axis=0), dout.sum(axis=0)",
     "dout.sum(axis=0), (dout * xhat).sum(axis=0)",
     ["batchnorm, gradient of gamma", "this is the gradient of beta", "the order", "forward's inputs"]),
    ("mlp.py", "batchnorm_backward", "g - g.mean(axis=0) - xhat", "g - xhat",
     ["batchnorm, gradient of x", "the same number along axis 0", "mlp.py, batchnorm_backward: g = g - g"]),
    ("mlp.py", "relu_backward", "dout * (x > 0)", "dout", ["relu, gradient of x", "a missing mask"]),
    ("mlp.py", "relu_backward", "    return dout * (x > 0)", "    dout *= x > 0\n    return dout",
     ["relu: dout was changed on the way"]),
    ("mlp.py", "relu_backward", "return", "result =", ["relu_backward returns None"]),
    ("mlp.py", "tanh_backward", "dout * (1 - y * y)", "1 - y * y",
     ["tanh, gradient of x", "times dout it would be right"]),
    ("mlp.py", "net_loss_and_grads", "grads[name] = grads[name] + ", "grads[name] = ",
     ["net_loss_and_grads", "wrong: ", "yours, line "]),
    ("mlp.py", "mlp_backward", "        dx = tanh_backward(dx, tanh)\n", "",
     ["right: ", "wrong: ", "all from ", "are wrong: look between ",
      "mlp.py, mlp_backward: dx = tanh_backward"]),
    ("mlp.py", "", "def penalty_forward", "def other_forward",
     ["penalty_backward has no penalty_forward"]),
    ("mlp.py", "", "def relu_backward", "def my_relu_backward", ["my_relu"]),
    ("mlp.py", "embedding_backward", "    return dE.", "    dE = 0 * dE\n    dE[ids] += dout\n    return dE.",
     ["embedding, gradient of E", "named more than once", "yours, line ", "mend first: embedding"]),
]
"""The sixteen slips of a reader who typed lessons, and what they come to now."""
SLIPS += [
    ("mlp.py", "softmax_cross_entropy_backward", "targets] -= 1", "targets] += 1",        # 1
     ["softmax_cross_entropy, gradient of logits", "wrong only at the targets", "one-hot",
      "yours, line ", "+= 1"]),
    ("mlp.py", "adam_update", "params[name] -= lr", "params[name] += lr",                 # 1b
     ["adam_update gives other values than mlp.py's", "+= lr", "FAIL adam_update goes uphill"]),
    ("transformer.py", "causal_attention_backward", "dout @ v.swapaxes(2, 3)", "dout @ v",  # 2
     ["causal_attention_backward raises", "the sizes do not fit", "dout @ v"]),
    ("transformer.py", "causal_attention_backward", "ds.swapaxes(2, 3) @ q", "ds @ q",    # 2b
     ["causal_attention, gradient of k", "a term, an axis or a .T is wrong", "computed in line ",
      "ds.swapaxes(2, 3) @ q"]),
    ("transformer.py", "causal_attention_backward", "p.swapaxes(2, 3) @ dout", "p @ dout",
     ["causal_attention, gradient of v", "not this gradient times a factor, with the other sign or transposed",
      "a term, an axis or a .T is wrong", "computed in line ", "dv = p @ dout"]),
    ("transformer.py", "linear_backward", "dout.sum(axis=0)", "dout",                     # 3
     ["linear, gradient of b", "a missing sum over axis 0: forward broadcasts b along it"]),
    ("transformer.py", "layernorm_backward", "(dout * xhat).sum(axis=0)",                 # 3b
     "(dout * xhat).mean(axis=0)", ["layernorm, gradient of gamma", "multiply by 3"]),
    ("transformer.py", "causal_attention_backward", "q.shape[3] ** -0.5", "1",            # 5
     ["causal_attention, gradient of q", "multiply by 1 / the root of 6, the size of q along axis 3"]),
    ("transformer.py", "causal_attention_backward", "ds @ k, ds.swapaxes(2, 3) @ q, dv",  # 8, 8b
     "ds @ k, dv, ds.swapaxes(2, 3) @ q", ["this is the gradient of v", "forward's inputs"]),
    ("vanilla_rnn.py", "rnn_backward", "dz[t] @ Wh.T", "dz[t] @ Wh",
     ["rnn, gradient of z", "right only at the last of axis 0"]),
    ("lstm.py", "masked_lstm_backward", "np.where(mask[t], dh, 0), np.where(mask[t], dc, 0)",   # 4b
     "dh, dc", ["masked_lstm, gradient of z", "these entries should be: a missing mask", "yours, line "]),
    ("lstm.py", "masked_lstm_backward", "dh = np.where(mask[t], dz[t] @ WhT, dh)", "dh = dz[t] @ WhT",
     ["masked_lstm, gradient of z", "right in sequences without padding", "yours, line "]),
    ("lstm.py", "lstm_backward", "dWh = h[:-1]", "dWh = h[1:]",                           # 7
     ["lstm, gradient of Wh", "computed in line ", "h[1:]", "lstm.py, lstm_backward: dWh = h[:-1]"]),
    ("lstm.py", "lstm_backward", "c[:-1] * f", "c[1:] * f",                               # 7c
     ["lstm, gradient of z", "yours, line ", "c[1:] * f", "lstm.py, lstm_backward: di, df = "]),
]


@pytest.mark.parametrize("name, function, right, wrong, words", SLIPS,
                         ids=[f"{s[0][:-3]}-{s[1]}-{s[4][0][:20]}" for s in SLIPS])
def test_slip_in_a_copy(name, function, right, wrong, words, tmp_path):
    says(report(tmp_path, with_slip(home(name, function), function, right, wrong)), words, 1)


VALUES = [      # right derivatives of a wrong forward pass, and what else only values show
    ("mlp.py", [("relu_forward", "np.maximum(x, 0)", "np.maximum(x, 0.1)"),
                ("relu_backward", "(x > 0)", "(x > 0.1)")],
     ["relu_forward gives other values", "yours, line ", "mlp.py, relu_forward: return np.maximum(x, 0)"]),
    ("mlp.py", [("gelu_forward", "(2 / math.pi)", "(1 / math.pi)"),
                ("gelu_backward", "(2 / math.pi)", "(1 / math.pi)")],
     ["gelu_forward gives other values", "mlp.py, gelu_forward: c = (2 / math.pi)"]),
    ("attention.py", [("translator_forward", "source != PAD", "source == source")],
     ["the loss, default: ", "yours, line ", "source == source"]),
    ("attention.py", [("init_params", "[0.0, 1.0, 0.0, 0.0]", "[1.0, 0.0, 0.0, 0.0]")],
     ["init_params, default: other numbers", "yours, line "]),
    ("mlp.py", [("init_params", "    params = {}", "    params = {}\n    rng.random()")],
     ["init_params, ", "other numbers than mlp.py's"]),
    ("mlp.py", [("adam_update", "        v = v / (1 - beta2 ** t)\n", "")],
     ["adam_update gives other values than mlp.py's", "v = v / (1 - beta2 ** t)"]),
    ("transformer.py", [("causal_attention_forward", "np.tri(T, ", "np.tri(T, k=1, ")],      # 4
     ["causal_attention_forward gives other values", "np.tri(T, k=1"]),
    ("transformer.py", [("causal_attention_forward", " * d ** -0.5", ""),                    # 5b
                        ("causal_attention_backward", "    ds *= q.shape[3] ** -0.5\n", "")],
     ["causal_attention_forward gives other values", "d ** -0.5"]),
    ("transformer.py", [("make_batch", "windows[:, 1:]", "windows[:, :-1]")],                # 7b
     ["make_batch, ", "other numbers than transformer.py's", "windows[:, :-1], windows[:, :-1]"]),
    ("transformer.py", [("clip_norm", "limit / norm", "limit")], ["clip_norm gives other values"]),
    ("transformer.py", [("learning_rate", "(step - 1)", "step")],
     ["learning_rate gives other values", "yours, line "]),
]


@pytest.mark.parametrize("name, changes, words", VALUES, ids=[words[0][:30] for *_, words in VALUES])
def test_other_values(name, changes, words, tmp_path):
    source = home(name, *(function for function, *_ in changes))
    for change in changes:
        source = with_slip(source, *change)
    says(report(tmp_path, source), ["DIFF " + words[0], *words[1:]], 0)


def test_a_right_copy_is_quiet(tmp_path):
    for name in ("mlp.py", "transformer.py", "seq2seq.py"):
        text, status = report(tmp_path, lesson(name))
        assert status == 0 and "other values" not in text and "no lesson has" not in text, text
        assert UNSEEN in text and "adam" not in text.split(UNSEEN)[1] and " differ" not in text, text


@pytest.mark.parametrize("function, changes", [
    ("mlp_backward", [("def mlp_backward(dout, cache):", "KEPT = {}\n\n\ndef mlp_backward(dout, cache):")]),
    ("mlp_backward", [("def mlp_backward(dout, cache):", "def mlp_backward(dout, cache, KEPT={}):")]),
    ("embedding_backward", [("def embedding_backward", "KEPT = {}\n\n\ndef embedding_backward"),
                            ("dE = onehot", "dE = KEPT[shape] = KEPT.get(shape, 0) + onehot")]),
], ids=["a dict outside", "a default argument", "a buffer"])
def test_a_gradient_that_lives_on(function, changes, tmp_path):            # slip 6
    source = lesson("mlp.py")
    for right, wrong in changes:
        source = with_slip(source, "", right, wrong)
    if function == "mlp_backward":
        source = with_slip(source, function, "    for i in reversed", (
            "    for name, g in grads.items():\n"
            "        KEPT[name] = KEPT.get(name, 0) + g\n"
            "    grads = KEPT\n    for i in reversed"))
    says(report(tmp_path, source), ["a second call gives another result", "does a gradient live on",
                                    "a dict made outside or a default argument"], 1)


# ---- restyled: right, but not in the lesson's words ----------------------------------------------

def test_restyled_lines_do_not_hide_the_slip(tmp_path):
    source = re.sub(r"def linear_forward.*?(?=\n\n\ndef tanh)", textwrap.dedent('''
        def linear_forward(a, kernel, bias):
            """Mine."""
            product = np.dot(a, kernel)
            return product + bias, (a, kernel)


        def linear_backward(upstream, saved):
            """Mine."""
            a, kernel = saved
            da = np.dot(upstream, kernel.T)
            dkernel = np.dot(a.T, upstream)
            dbias = upstream.mean(axis=0)
            return da, dkernel, dbias''').strip(), spine("mlp.py"), flags=re.S)
    line = 1 + source[:source.index("dbias = ")].count("\n")
    text, status = report(tmp_path, source)
    says((text, status), ["linear, gradient of b", "multiply by 3",
                          f"computed in line {line}: dbias = upstream.mean(axis=0)"], 1)
    assert "linear_forward:" not in text and "it passes: dbias = upstream.sum(axis=0)" in text, text


def test_a_cache_that_is_changed(tmp_path):
    source = with_slip(lesson("mlp.py"), "softmax_cross_entropy_backward", "dlogits = np.exp(log_p)",
                       "dlogits = np.exp(log_p, out=log_p)")
    says(report(tmp_path, source), ["softmax_cross_entropy: the cache was changed on the way"], 1)


def test_a_batch_that_is_changed(tmp_path):
    source = with_slip(spine("mlp.py"), "loss_and_grads", "x, targets = batch",
                       "x, targets = batch\n    x -= x.mean(axis=0)")
    says(report(tmp_path, source), ["the batch or a parameter was changed", "x -= x.mean(axis=0)"], 1)


@pytest.mark.parametrize("function, right, words", [
    ("init_params", "return ", ["init_params returns NoneType, expected dict"]),
    ("loss_and_grads", "return loss", ["loss_and_grads should return 2 results", "yours, line"]),
])
def test_a_forgotten_return(function, right, words, tmp_path):
    source = with_slip(spine("mlp.py"), function, right, right.replace("return", "_ ="))
    says(report(tmp_path, source), words, 1)


# ---- one's own operations and models -------------------------------------------------------------

OWN = """
import numpy as np

def double_forward(x):
    return 2 * x, None

def double_backward(dout, cache):
    return {slope} * dout
{case}
"""
CASE = 'GRADCHECK = {"double": lambda rng: dict(x=rng.standard_normal((3, 5)))}'


@pytest.mark.parametrize("slope, case, change, words, status", [
    (2, CASE, "", ["ok double"], 0),
    (2, 'GRADCHECK = {"double": "x 3 5"}', "", ["ok double"], 0),
    (3, CASE, "", ["double, gradient of x", "multiply by 0.666667"], 1),
    (2, "", "", ["ok double"], 0),                     # one argument, called x: an array is tried
    (3, "", "", ["double, gradient of x", "multiply by 0.666667"], 1),
    (2, "", "x, strength", ["FAIL double: nobody says how to call it", "GRADCHECK"], 1),
    (0, CASE, "0 * x", ["all zero", "could not have failed"], 1),
    (2, "GRADCHECK = [1]", "", ["GRADCHECK: expected a dict"], 1),
    (2, 'GRADCHECK = {"double": lambda rng: 5}', "", ["GRADCHECK['double'] should return inputs"], 1),
    (2, 'GRADCHECK = {"triple": lambda rng: dict()}', "", ["there is no triple_backward"], 1),
])
def test_own_operation(slope, case, change, words, status, tmp_path):
    source = OWN.format(slope=slope, case=case)
    if "," in change:
        source = source.replace("double_forward(x)", f"double_forward({change})")
    else:
        source = source.replace("2 * x", change or "2 * x")
    says(report(tmp_path, source), words, status)


WORDS = '''
import numpy as np

def scale_forward(x, w):
    return x * w, (x, w)

def scale_backward(dout, cache):
    x, w = cache
    dx = {dx}
    dw = {dw}
    return {both}

def squash_forward(x):
    y = np.tanh(x)
    return y, y

def squash_backward(dout, cache):
    y = cache
    return {squash}

def average_forward(x):
    return x.mean(axis=1), x.shape

def average_backward(dout, cache):
    return {average}

GRADCHECK = {{"scale": lambda rng: dict(x=rng.standard_normal((3, 5)), w=rng.standard_normal(5)),
             "squash": lambda rng: dict(x=rng.standard_normal((3, 5))),
             "average": lambda rng: dict(x=rng.standard_normal((3, 5)))}}
'''
RIGHT = dict(dx="dout * w", dw="(dout * x).sum(axis=0)", both="dx, dw", squash="dout * (1 - y * y)",
             average="np.broadcast_to(dout[:, None], cache) / cache[1]")


@pytest.mark.parametrize("change, words", [
    (dict(), None),
    (dict(dx="-dout * w"), ["the sign is wrong", "computed in line ", "it passes: dx = dout * w"]),
    (dict(dw="dout * x"), ["a missing sum over axis 0"]),
    (dict(dw="(dout * x).mean(axis=0)"), ["multiply by 3", "it passes: dw = (dout * x).sum(axis=0)"]),
    (dict(both="dw, dx"), ["scale, gradient of x: shape (5,), expected (3, 5)", "it passes: return (dx, dw)"]),
    (dict(squash="1 - y * y"), ["times dout it would be right"]),
    (dict(squash="dout * (1 + y * y)"), ["squash, gradient of x at", "it passes: return dout * (1 - y * y)"]),
    (dict(squash="-(dout * (1 - y * y))"), ["the sign is wrong", "it passes: return dout * (1 - y * y)"]),
    (dict(average="np.broadcast_to(dout[:, None], cache) * 1.0"),
     ["multiply by 1 / 5, the size of x along axis 1"]),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_own_words(change, words, tmp_path):
    source = WORDS.format(**{**RIGHT, **change})
    says(report(tmp_path, source), words or ["ok average"], 1 if words else 0)


ALL_KINDS = """
import numpy as np

def scores_forward(q, k):
    return np.where(np.tri(3, 4, dtype=bool), q @ k.T, -1e9), (q, k)

def scores_backward(dout, cache):
    q, k = cache
    dout = np.where(np.tri(3, 4, dtype=bool), dout, 0)
    return [{dq}, dout.T @ q]

def powers_forward(x):
    return x + x ** 2 + x ** 4, x

def powers_backward(dout, cache):
    dx, k = dout, 1
    while k < 4:
        dx = dx + {power} * k * dout * cache ** (2 * k - 1)
        k = k * 2
    return dx

def table_forward(E):
    return 2 * E[np.array([1, 1, 0])], E.shape

def table_backward(dout, cache):
    def half(v):
        return v / 2
    dE = np.zeros(cache)
    np.add.at(dE, np.array([1, 1, 0]), {row})
    return dE

GRADCHECK = {{"scores": lambda rng: dict(q=rng.standard_normal((3, 5)), k=rng.standard_normal((4, 5))),
             "powers": lambda rng: dict(x=rng.standard_normal((3, 5))),
             "table": lambda rng: dict(E=rng.standard_normal((4, 5)))}}
"""


@pytest.mark.parametrize("change, words", [
    (dict(), []),
    (dict(dq="dout @ k * 2"), ["scores, gradient of q", "multiply by 0.5", "dout @ k * 2"]),
    (dict(power="3"), ["powers, gradient of x"]),
    (dict(row="dout"), ["table, gradient of E", "multiply by 2", "computed in line", "np.add.at"]),
], ids=["right", "masked", "while", "add.at"])
def test_own_kinds(change, words, tmp_path):
    """Masked scores of -1e9; lists; loops that a repair could make endless; sums at indices."""
    source = ALL_KINDS.format(**{**dict(dq="dout @ k", power="2", row="2 * dout"), **change})
    says(report(tmp_path, source, timeout=60), words or ["ok scores"], 1 if words else 0)


NET = '''
from dataclasses import dataclass
import numpy as np

@dataclass
class Config:
    tokens: int = 7
    width: int = 6
    context: int = 5
    lr: float = 0.1
    steps: int = 10

def init_params(cfg, rng, dtype=np.float64):
    D = cfg.width
    shapes = dict(table=(cfg.tokens, D), spots=(cfg.context, D), w1=(D, D), c1=(D,), w2=(D, D), c2=(D,))
    return {k: rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}

def make_batch(cfg, step, dtype=np.float64):
    rng = np.random.default_rng((1, step))
    ids = rng.integers(0, cfg.tokens, (3, cfg.context + 1))
    return ids[:, :-1], ids[:, 1:]

def bend_forward(x):
    y = np.tanh(x)
    return y, y

def bend_backward(dout, cache):
    return dout * (1 - cache * cache)

def loss_and_grads(params, batch, cfg):
    ids, targets = batch
    p, grads = params, {}
    h0 = p["table"][ids] + p["spots"]
    a1, bend1 = bend_forward(h0 @ p["w1"] + p["c1"])
    h1 = h0 + a1
    a2, bend2 = bend_forward(h1 @ p["w2"] + p["c2"])
    h2 = h1 + a2
    scores = h2 @ p["table"].T
    scores = scores - scores.max(axis=2, keepdims=True)
    prob = np.exp(scores)
    prob /= prob.sum(axis=2, keepdims=True)
    hit = np.eye(len(p["table"]))[targets]
    loss = -(np.log(prob) * hit).sum() / targets.size
    dscores = (prob - hit).astype(h0.dtype) / targets.size
    dh2 = dscores @ p["table"]
    d2 = bend_backward(dh2, bend2)
    grads["w2"] = np.einsum("btd,bte->de", h1, d2)
    grads["c2"] = d2.sum(axis=(0, 1))
    dh1 = dh2 + d2 @ p["w2"].T
    d1 = bend_backward(dh1, bend1)
    grads["w1"] = np.einsum("btd,bte->de", h0, d1)
    grads["c1"] = d1.sum(axis=(0, 1))
    dh0 = dh1 + d1 @ p["w1"].T
    grads["spots"] = dh0.sum(axis=0)
    grads["table"] = np.einsum("btv,btd->vd", dscores, h2)
    np.add.at(grads["table"], ids, dh0)
    return loss, grads

def sgd_update(params, grads, lr):
    for name in grads:
        params[name] -= lr * grads[name]

GRADCHECK = {"bend": lambda rng: dict(x=rng.standard_normal((3, 5)))}
'''


@pytest.mark.parametrize("right, wrong, words", [
    ("dh1 = dh2 + d2", "dh1 = d2", ["right: c2 w2", "wrong: c1 w1", "all from c1 on are wrong",
                                    "look between w2 and c1"]),                    # a residual
    ("    d1 = bend_backward(dh1, bend1)\n", "    d1 = dh1\n",                           # a layer
     ["right: c2 w2", "wrong: c1 w1", "all from c1 on"]),
    ("bend_backward(dh1, bend1)", "bend_backward(dh1, bend2)", ["right: c2 w2", "all from c1"]),
    ('    np.add.at(grads["table"], ids, dh0)\n', "",
     ["right: c2 w2 c1 w1 spots", "wrong: table", "only table is wrong", "a second place that uses it"]),
    ('np.einsum("btd,bte->de", h1, d2)', 'np.einsum("btd,bte->de", h0, d2)', ["only w2 is wrong"]),
    ("grads[\"spots\"] = dh0.sum(axis=0)", "grads[\"spots\"] = dh0",
     ["gradient of spots: shape (3, 4, 6), expected (4, 6)"]),
    ("(prob - hit)", "(hit - prob)", ["times -1 it would be right", "right: none", "all are wrong"]),
    ('    grads["c1"] = d1.sum(axis=(0, 1))\n', "", ["no gradient for ['c1']"]),
    ('    grads["c1"]', '    grads["c3"] = grads["c1"]', ["gradients ['c3'] belong to no parameter"]),
    ("    return loss, grads", "    return loss, list(grads)", ["loss_and_grads -> number, dict"]),
])
def test_own_model_is_located(right, wrong, words, tmp_path):
    assert NET.count(right) == 1
    text, status = report(tmp_path, NET.replace(right, wrong))
    says((text, status), words, 1)
    assert "py, " not in text, f"compared with a function that is not alike: {text}"


@pytest.mark.parametrize("right, wrong, words, status", [
    ("", "", ["no lesson has this model, so nobody compared values", UNSEEN], 0),
    ("ids[:, 1:]", "ids[:, :-1]", ["no lesson has this model, so nobody compared values"], 0),
    ("] -= lr", "] += lr", ["sgd_update goes uphill"], 1),
])
def test_own_model_says_what_nobody_checked(right, wrong, words, status, tmp_path):
    text, code = report(tmp_path, NET.replace(right, wrong))
    says((text, code), words, status)
    assert f"{UNSEEN} init_params, make_batch" in text, text


# ---- unfinished copies ---------------------------------------------------------------------------

NEW = [path.name for path in LESSONS if ENDS in lesson(path.name)]


def cuts(name, every):
    """A spine cut after every so many lines, and the whole."""
    lines = spine(name).splitlines(keepends=True)
    first = next(k for k, line in enumerate(lines) if line.startswith("class Config")) + 2
    return ["".join(lines[:end]) for end in [*range(first, len(lines), every), len(lines)]]


@pytest.mark.parametrize("name", NEW)
def test_unfinished_is_not_wrong(name, tmp_path):
    files = []
    for k, text in enumerate(cuts(name, 13)):
        files.append(tmp_path / f"my_{k}_{name}")
        files[-1].write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "gradcheck.py", *files], capture_output=True, text=True)
    assert "FAIL" not in done.stdout and done.returncode == 0, done.stdout
    assert done.stdout.count("not there yet") > 5 and "the spine is complete" in done.stdout


@pytest.mark.parametrize("name", NEW)
def test_stages(name, tmp_path):
    """Layers; then the model, end to end; then the whole spine, with a call that trains."""
    source = spine(name)
    operations = [n[:-9] for n in re.findall(r"^def (\w+)", source, re.M) if n.endswith("_backward")]
    model = re.search(r"^def loss_and_grads.*?(?=^\S|\Z)", source, re.M | re.S).end()
    says(report(tmp_path, source[:model]),
         ["ok end to end", f"{len(operations)} of {len(operations)} operations of the spine of {name}; next: "], 0)
    text, status = report(tmp_path, source + "\nmain(Config())\n")
    says((text, status), ["ok end to end", "same values as in " + name, "the spine is complete"], 0)
    assert "nobody compared values" not in text and "make_batch" not in text.split("nobody compares")[-1], text
    assert cpu_seconds(tmp_path / "my_copy.py") < 4


def test_half_a_copy(tmp_path):
    source = spine("mlp.py")
    linear, sigmoid = source.index("def linear_forward"), source.index("def sigmoid(")
    head = "import numpy as np\n\n\n"
    says(report(tmp_path, head + source[linear:sigmoid], "my_mlp.py"),
         ["ok linear", "ok tanh", "end to end: not there yet: Config, init_params",
          "2 of 4 operations of the spine of mlp.py; next: sigmoid"], 0)
    no_sigmoid = source[:sigmoid] + source[source.index("def binary_cross"):]
    says(report(tmp_path, no_sigmoid), ["binary_cross_entropy: sigmoid is not there yet; mlp.py has it"], 0)
    no_field = source.replace(re.search(r"    hidden: .*\n", source)[0], "", 1)
    says(report(tmp_path, no_field), ["end to end", "Config.hidden is not there yet; mlp.py has it"], 0)
    half = source[:source.index("def tanh_backward")]
    says(report(tmp_path, half), ["1 of 4 operations of the spine of mlp.py; next: tanh_backward"], 0)
    says(report(tmp_path, head + source[linear:sigmoid] + "def next_forward(x):\n    return (x,\n"),
         ["later not there yet: line 28 cannot be read: '(' was never closed: return (x,", "ok linear",
          "; next: line 28"], 0)
    says(report(tmp_path, head), ["nothing to check"], 1)
    says(report(tmp_path, "def f(:\n"), ["line 1 cannot be read: invalid syntax: def f(:"], 0)
    middle = source.replace("return y, y\n", "return y y\n", 1)
    says(report(tmp_path, middle), ["FAIL line ", "cannot be read: invalid syntax: return y y", "ok linear"], 1)


def test_a_section_without_the_tables(tmp_path):
    """The operations of a later part are checked as soon as they are typed, by the lesson's cases."""
    source = lesson("mlp.py")
    names = source.index("\nMORE = ")
    cut = source[:names] + "\nimport functools\nfrom typing import Literal\n" + source[
        source.index("\ndef relu_forward"):source.index("\nGATES = ")]
    says(report(tmp_path, cut), ["ok relu", "ok batchnorm", "ok end to end"], 0)
    lines = re.search(r"^def hidden_layer_forward.*?(?=^def net_forward)", source, re.M | re.S)[0]
    says(report(tmp_path, cut + lines.replace("\ndef hidden_layer_backward", "\ndef hidden_layer_backward")),
         ["ok hidden_layer", "2 case(s)"], 0)


# ---- what a newcomer ran into --------------------------------------------------------------------

def without(source, *pieces):
    """The source without these pieces, each a regular expression that is found once."""
    for piece in pieces:
        source, count = re.subn(piece, "", source, flags=re.M | re.S)
        assert count == 1, piece
    return source


def function(name):
    """A regular expression for a definition."""
    return rf"^(@\w+\n)?(def|class) {name}\b.*?(?=^[^\s)])"


@pytest.mark.parametrize("name, pieces, words, silent", [
    ("mlp.py", [function("adam_update")], ["later line ", "adam_update is not there yet", "ok end to end",
                                           "4 of 4 operations", "next: adam_update"], "complete"),
    ("transformer.py", [r"^VERSES = .*?(?=^def )"], ["CHARS is not there yet", "7 of 7", "next: CHARS"], "complete"),
    ("mlp.py", [r"^import numpy as np\n"], ["line ", "`import numpy as np` is not there yet; mlp.py has it",
                                           "ok linear", "next: `import numpy as np`"], "complete"),
    ("transformer.py", [r"^import math\n"], ["later gelu: `import math` is not there yet", "next: `import math`"],
     "complete"),
    ("transformer.py", [r"^    heads: .*?\n"], ["Config.heads is not there yet", "next: Config.heads"], "complete"),
    ("transformer.py", [r"^VERSES = .*\Z"], ["ok causal_attention", "next: VERSES"], UNSEEN),
    ("transformer.py", [r"^RHYME = .*\Z"], ["next: RHYME"], "next: make_batch"),
    ("perceptron.py", [r"^GATES = .*?\n.*\Z"], ["next: GATES"], "next: gates"),
], ids=["default", "constants", "import", "import in a function", "field", "verses", "rhyme", "gates"])
def test_what_is_not_there_yet(name, pieces, words, silent, tmp_path):
    text, status = report(tmp_path, without(spine(name), *pieces), f"my_{name}")
    says((text, status), words, 0)
    assert "FAIL" not in text and "Traceback" not in text and silent not in text, text


def test_an_operation_whose_default_is_not_there_yet(tmp_path):
    for end in ("forward(x", "backward(dout, cache"):
        source = with_slip(spine("mlp.py"), "", f"def tanh_{end}", f"def tanh_{end}, part=train")
        text, status = report(tmp_path, source)
        says((text, status), ["train is not there yet", "ok linear"], 0)
        assert "FAIL" not in text, text


def test_first_steps(tmp_path):
    """Nothing is wrong yet with one function, or none, in a file that is a lesson's to be."""
    source = spine("mlp.py")
    head = "import numpy as np\n\n\n"
    text, status = report(tmp_path, head + re.search(function("linear_forward"), source, re.M | re.S)[0])
    says((text, status), ["later 0 of ", "next: linear_backward", "0 passed, 0 failed"], 0)
    says(report(tmp_path, head, "my_mlp.py"), ["later 0 of 4 operations of the spine of mlp.py; next: Config"], 0)
    config = re.search(r".*?(?=^# ---- layers)", source, re.M | re.S)[0]
    says(report(tmp_path, config, "my_mlp.py"), ["later 0 of 4 operations", "next: linear_forward"], 0)
    says(report(tmp_path, "def main():\n    pass\n"), ["FAIL no op_backward in it: nothing to check"], 1)


@pytest.mark.parametrize("name, right, wrong, words", [
    ("mlp.py", "zip(sizes, sizes[1:])", "zip(sizes, sizes[2:])",
     ["yours, line ", "sizes[2:]", "mlp.py, init_params: for i"]),
    ("transformer.py", '("2", 4 * D, D)', '("2", D, 4 * D)', ["mismatch", "transformer.py, init_params: for name"]),
    ("transformer.py", 'for norm in "12"', 'for norm in "1"',
     ["KeyError('gamma2')", 'yours, line ', 'for norm in "1":', 'init_params: for norm in "12":']),
], ids=["sizes", "matrix", "missing"])
def test_wrong_shapes_of_parameters(name, right, wrong, words, tmp_path):
    text, status = report(tmp_path, with_slip(spine(name), "init_params", right, wrong))
    says((text, status), ["FAIL loss_and_grads raises", *words], 1)
    assert text.count("init_params: for ") == 1, f"said twice: {text}"


def test_other_shapes_that_fit(tmp_path):
    source = with_slip(spine("transformer.py"), "init_params", '("1", D, 4 * D), ("2", 4 * D, D)',
                       '("1", D, 2 * D), ("2", 2 * D, D)')
    says(report(tmp_path, source), ["DIFF init_params, ", "other numbers", "2 * D", "4 * D"], 0)


def test_swapped_heads(tmp_path):
    """In block's case all sizes differ, so that no two axes can be exchanged unseen."""
    right, wrong = "reshape(B, -1, 3, heads, ", "reshape(B, -1, heads, 3, "
    source = with_slip(spine("transformer.py"), "block_forward", right, wrong)
    says(report(tmp_path, source), ["FAIL block_forward raises", "yours, line ", "-1, heads, 3,"], 1)
    source = with_slip(lesson("transformer.py"), "modern_block_forward", right, wrong)
    says(report(tmp_path, source), ["FAIL modern_block_forward raises"], 1)


@pytest.mark.parametrize("source, others, unseen", [
    (with_slip(spine("mlp.py"), "linear_backward", "dout.sum(axis=0)", "dout.mean(axis=0)"),
     "linear_ sigmoid xor_points spiral_points make_batch mlp_ loss_and_grads adam_update", "check_finite, progress"),
    (without(spine("transformer.py"), r"^import math\n"), "gelu_ block_ gpt_ loss_and_grads make_batch", "generate"),
    (with_slip(spine("mlp.py"), "mlp_backward", "tanh_backward(dx, tanh)", "tanh"),
     "init_params make_batch mlp_", "train"),
    (with_slip(spine("mlp.py"), "", "steps: int = 3000", "steps: int = 3e3"), "init_params mlp_ loss_and", "train"),
    (spine("mlp.py").partition("def mlp_forward")[0], "xor_points spiral_points make_batch init_params", ""),
], ids=["failed", "later", "model", "Config", "half"])
def test_what_nobody_compares(source, others, unseen, tmp_path):
    """What a check has found wrong, or will look at, is not in the list; an empty one is not shown."""
    text, _ = report(tmp_path, source)
    listed = text.partition(UNSEEN)[2]
    assert unseen in listed and "not checked" not in text and (unseen or UNSEEN not in text), text
    assert not [name for name in others.split() if name in listed], listed


@pytest.mark.parametrize("right, wrong, words", [
    ("steps: int = 3000", 'steps: int = "3000"', ["Config.steps: expected int, found '3000'"]),
    ("steps: int = 3000", "steps: int = 3e3", ["Config.steps: expected int, found 3000.0"]),
    ('hidden: str = "32,32"', "hidden: str = 32", ["Config.hidden: expected str, found 32"]),
    ("lr: float = 0.01 ", 'lr: float = "0.01" ', ["Config.lr: expected float, found '0.01'"]),
    ("seed: int = 0 ", "seed: int = None ", ["Config.seed: expected int, found None"]),
])
def test_type_of_a_field(right, wrong, words, tmp_path):
    says(report(tmp_path, with_slip(spine("mlp.py"), "", right, wrong)), ["FAIL", *words], 1)


def test_the_check_of_a_whole_lesson_comes_first(tmp_path):
    source = lesson("mlp.py").replace("steps: int = 3000 ", "steps: int = -30 ", 1)
    says(report(tmp_path, source), ["--steps: expected 1 or more, below 2^31, found -30"], 1)
    fits = with_slip(spine("mlp.py"), "", "lr: float = 0.01 ", "lr: float = 1 ")
    says(report(tmp_path, fits), ["ok end to end"], 0)


@pytest.mark.parametrize("right, wrong, words", [
    ("the cat,", "the bat,", ["DIFF VERSES is not transformer.py's", "yours, line ", '"the bat,',
                              "transformer.py, VERSES: ", '"the cat,', "1 differs from the lesson"]),
    ("the cat,", "the zat,", ["DIFF VERSES is not transformer.py's", '"the zat,']),     # another letter
    ("VERSES[n::-1]", "VERSES[n:0:-1]", ["is not transformer.py's", "transformer.py, RHYME: "]),
])
def test_slip_in_a_table(right, wrong, words, tmp_path):
    text, status = report(tmp_path, with_slip(spine("transformer.py"), "", right, wrong))
    says((text, status), words, 0)
    assert "no line can be compared" not in text and "no lesson has" not in text, text


def test_lines_of_one_statement(tmp_path):
    """A slip in the second line of a statement is shown, not only the first line."""
    source = with_slip(spine("transformer.py"), "init_params", '"P": 0.02 *', '"P": 0.2 *')
    says(report(tmp_path, source), ["DIFF init_params", "yours, line ", '"P": 0.2 *', '"P": 0.02 *'], 0)


def test_positions_beyond_the_batch(tmp_path):
    """A batch may be shorter than the context: P has rows without a gradient."""
    source = with_slip(spine("transformer.py"), "gpt_backward", 'grads["P"][:ids.shape[1]] = ', 'grads["P"] = ')
    says(report(tmp_path, source), ["gradient of P: shape ", "only P is wrong", "yours, line ", 'grads["P"] = '], 1)


def test_the_last_lines(tmp_path):
    """Arrays are called arrays; as many checks have passed as there are lines with ok."""
    text, _ = report(tmp_path, spine("mlp.py"))
    says((text, 0), ["ok end to end", "2 variant(s), 12 arrays, mlp", "4 passed, 0 failed"], 0)
    assert text.count(" ok ") == 5
    source = spine("mlp.py")
    for change in [("relu_forward", "np.maximum(x, 0)", "np.maximum(x, 0.1)"),
                   ("relu_backward", "(x > 0)", "(x > 0.1)"), ("gelu_forward", "(2 / math.pi)", "(1 / math.pi)"),
                   ("gelu_backward", "(2 / math.pi)", "(1 / math.pi)")]:
        source = with_slip(source if change[0] != "relu_forward" else lesson("mlp.py"), *change)
    says(report(tmp_path, source), [" passed, 0 failed, 2 differ from the lesson"], 0)


def test_unknown_flag():
    for flags in (["--foo"], ["--foo", "mlp.py"], ["--teeth", "-x", "mlp.py"]):
        done = subprocess.run([sys.executable, ROOT / "gradcheck.py", *flags], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1, done
        assert "unknown flag" in done.stderr and flags[-2 if len(flags) > 1 else 0] in done.stderr


# ---- odd files -----------------------------------------------------------------------------------

HALF = """import numpy as np


def relu_forward(x):
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    return dout * (cache > 0)

"""
ODD = {
    "nul": (HALF.encode() + b"\0", ["line 11 holds a NUL byte"], 1),
    "utf-16": (HALF.encode("utf-16"), ["it cannot be read"], 1),
    "latin-1": (b"# coding: latin-1\n# \xe9\n" + HALF.encode(), ["ok relu"], 0),
    "not utf-8": (b"# \xe9\n" + HALF.encode(), ["it cannot be read"], 1),
    "unknown coding": (b"# coding: klingon\n" + HALF.encode(), ["it cannot be read", "klingon"], 1),
    "byte order mark": (b"\xef\xbb\xbf" + HALF.encode(), ["ok relu"], 0),
    "windows": (HALF.replace("\n", "\r\n").encode(), ["ok relu"], 0),
    "tabs": (HALF.replace("    ", "\t").encode(), ["ok relu"], 0),
    "tabs and spaces": ((HALF.replace("def relu_backward(dout, cache):\n", (
        "def relu_backward(dout, cache):\n\tx = cache\n"))).encode(), ["line 10 cannot be read"], None),
    "input": (HALF + 'name = input("your name? ")\n', ["EOFError", "line 11", "__main__"], 1),
    "exit": (HALF + "import sys\nsys.exit()\n", ["it does not run: SystemExit", "__main__"], 1),
    "endless": (HALF + "while True:\n    pass\n", ["ok relu"], 0),
    "loop": (HALF + "for n in range(3):\n    relu_forward(np.zeros(10 ** 11))\n", ["ok relu"], 0),
    "try": (HALF + "try:\n    while True:\n        relu_forward(np.zeros(1))\nexcept KeyboardInterrupt:\n"
            "    pass\n", ["ok relu"], 0),
    "exit in a function": (HALF.replace("    return dout", "    exit()\n    return dout"), ["SystemExit"], 1),
    "prints in a function": (HALF.replace("    return dout", '    print("hello")\n    return dout'),
                             ["ok relu"], 0),
    "form feed": ("\f\n" + HALF.replace("(cache > 0)", "(cache < 0)"), ["yours, line 10"], None),
    "prints": (HALF + 'print("hello")\n', ["ok relu"], 0),
    "main": (HALF + "def main():\n    while True:\n        pass\n\n\nmain()\n", ["ok relu"], 0),
    "no import": (HALF.partition("\n")[2], ["`import numpy as np` is not there yet"], 0),
    "empty": ("", ["nothing to check"], 1),
}


@pytest.mark.parametrize("source, words, status", ODD.values(), ids=ODD)
def test_odd_files(source, words, status, tmp_path):
    text, code = report(tmp_path, source)
    says((text, code), words, code if status is None else status)
    assert "hello" not in text and "Traceback" not in text


def test_config_without_dataclass(tmp_path):
    says(report(tmp_path, with_slip(spine("mlp.py"), "", "@dataclass\nclass Config", "class Config")),
         ["Config: does @dataclass stand above it?"], 1)


def test_missing_file(tmp_path):
    for flags in ((), ("--teeth",)):
        done = subprocess.run([sys.executable, ROOT / "gradcheck.py", *flags, tmp_path / "none.py"],
                              capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
        assert "expected a Python file" in done.stderr


# ---- both forms, third values, twins -------------------------------------------------------------

STATES = '''
from dataclasses import dataclass
from typing import NamedTuple
import numpy as np

@dataclass
class Config:
    hidden: int = 8
    carry: bool = False

def init_params(cfg, rng, dtype=np.float64):
    return {"U": rng.standard_normal((cfg.hidden, cfg.hidden)).astype(dtype), "c": np.zeros(cfg.hidden, dtype)}

def make_batch(cfg, STEP, dtype=np.float64):
    RNG
    return (rng.standard_normal((3, cfg.hidden)).astype(dtype),)

def loss_and_grads(params, batch, cfg, states=None):
    x, = batch
    h = x if states is None else x + states
    y = np.tanh(h @ params["U"] + params["c"])
    d = y * (1 - y * y)
    return (0.5 * y * y).sum(), {"U": WRONG.T @ d, "c": d.sum(axis=0)}, y

class Task(NamedTuple):
    config: type
    init_params: object
    make_batch: object
    loss_and_grads: object
    main: object

def check(cfg):
    if cfg.carry:
        raise ValueError("refused")

GRADCHECK = {}
TASKS = {"rows": Task(Config, init_params, make_batch, loss_and_grads, None),
         "tables": Task(Config, None, None, None, None)}

def square_forward(x):
    return x * x, x

def square_backward(dout, cache):
    return 2 * dout * cache

def fast_square_forward(x):
    return np.square(x), x

def fast_square_backward(dout, cache):
    return FAST * cache * dout

GRADCHECK["square"] = lambda rng: dict(x=rng.standard_normal((3, 5)))
'''


@pytest.mark.parametrize("change, words, status", [
    ({}, ["ok fast_square", "as square", "ok end to end rows 1 variant(s), 2 arrays"], 0),
    ({"STEP": "rng", "RNG": "pass"}, ["ok end to end rows"], 0),
    ({"WRONG": "x"}, ["loss_and_grads, rows default", "only U is wrong"], 1),   # what is carried over
    ({"FAST": "3"}, ["fast_square, gradient of x"], 1),
    ({"np.square(x), x": "np.square(x) + 1, x"}, ["fast_square and square give different results"], 1),
])
def test_tasks_states_and_twins(change, words, status, tmp_path):
    source = STATES
    for old, new in {"STEP": "step", "RNG": "rng = np.random.default_rng(step)", "WRONG": "h", "FAST": "2",
                     **{k: v for k, v in change.items() if len(k) > 5}, **change}.items():
        source = source.replace(old, change.get(old, new))
    says(report(tmp_path, source), words, status)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.name)
def test_lessons_have_no_unexercised_backward(path):
    """Every operation of a lesson is named in its report."""
    text, status = check(path)
    assert status == 0 and "later" not in text and "note" not in text, text
    for name in re.findall(r"^def (\w+)_backward", lesson(path.name), re.M):
        assert re.search(rf"\b{name}\b", text), name


# ---- itself: notebooks, speed, size --------------------------------------------------------------

def test_in_a_notebook(tmp_path):
    """As %run does it: __main__ has another name, standard output is no console, argv is set."""
    code = textwrap.dedent('''
        import io, runpy, sys
        class Console(io.StringIO):
            reconfigure = None
        sys.argv = ["gradcheck.py", "perceptron.py"]
        sys.stdout = Console()
        runpy.run_path("gradcheck.py", run_name="__main__")
        text, sys.stdout = sys.stdout.getvalue(), sys.__stdout__
        print(text.splitlines()[-1])''')
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(" 0 failed\n") and not done.stderr, done


def cpu_seconds(*files):
    """User time of gradcheck.py on these files."""
    code = ("import json, resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
            "print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime))")
    done = subprocess.run([sys.executable, "-c", code, sys.executable, ROOT / "gradcheck.py", *files],
                          capture_output=True, text=True)
    return json.loads(done.stdout)


def test_speed(tmp_path):
    """A typed operation in a second, a small model in two; all lessons in 35 on two cores."""
    source = spine("mlp.py")
    typed = tmp_path / "my_mlp.py"
    typed.write_text("import numpy as np\n" + source[source.index("def linear_f"):source.index("def tanh_f")])
    assert cpu_seconds(typed) < 1
    typed.write_text(NET)
    assert cpu_seconds(typed) < 2
    assert cpu_seconds() < 2 * 35


def test_itself():
    source = lesson("gradcheck.py")
    lines = source.splitlines()
    assert source.isascii() and "\t" not in source and len(lines) <= 1000
    assert max(map(len, lines)) <= 100
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in tree.body:
            assert ast.get_docstring(node), node.name
    idea = 1 + source[:source.index("# ==== That is the idea")].count("\n")
    assert idea <= 120, "the idea stands on the first two screens"


def test_a_copy_elsewhere_needs_no_lessons(tmp_path):
    """gradcheck.py alone, without lessons beside it."""
    shutil.copy(ROOT / "gradcheck.py", tmp_path)
    (tmp_path / "mine.py").write_text(HALF)
    done = subprocess.run([sys.executable, tmp_path / "gradcheck.py", tmp_path / "mine.py"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "ok    relu" in done.stdout, done


# ---- is the checker any good? (slow, so last) ----------------------------------------------------

def test_teeth_find_what_no_case_runs(tmp_path):
    """Code that no case runs survives; what runs and changes no gradient is counted apart."""
    source = HALF.replace("    return dout * (cache > 0)\n", (
        "    if len(dout) > 100:\n        return dout + cache\n    return dout * (cache > 0) * abs(-1)\n"))
    assert report(tmp_path, source)[1] == 0
    text, status = check(tmp_path / "my_copy.py", "--teeth")
    assert status == 1 and "survived: relu_backward, line 10: a + b -> a (never run)" in text, text
    assert "-a -> a" not in text and " change no gradient" in text and "; 0 change" not in text, text


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.name)
def test_teeth(path):
    text, status = check(path, "--teeth")
    assert status == 0 and "caught" in text and "survived" not in text, text
