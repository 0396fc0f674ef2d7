"""gradcheck.py names what is wrong in a typed copy, line and kind of mistake."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(path, *flags):
    """Run gradcheck.py on a file -> CompletedProcess."""
    return subprocess.run([sys.executable, "-W", "error", ROOT / "gradcheck.py", *flags, path], capture_output=True,
                          text=True, timeout=300)


BUGS = [    # in mlp.py: the right code, the wrong code, what the report must say
    ("return dout @ W.T, x.T", "return dout @ W, x.T",
     ["linear_backward raises", "is a .T missing", "return dout @ W, x.T"]),
    ("x.T @ dout, dout.sum", "dout.T @ x, dout.sum", ["linear, gradient of W", "transposed", "line "]),
    ("dout.sum(axis=0)     # b was", "dout     # b was", ["linear, gradient of b", "a missing sum over axis 0"]),
    ("dout.sum(axis=0)     # b was", "dout.mean(axis=0)     # b was", ["linear, gradient of b at [", "multiply by 3"]),
    ("(sigmoid(z) - targets) * (dout", "(targets - sigmoid(z)) * (dout", ["binary_cross_entropy", "the sign is wrong"]),
    ("(2 * dout / z.size)", "(dout / z.size)", ["mse, gradient of z at [", "yours ", "numeric ", "multiply by 2"]),
    ("return dz * (dout / len(targets))", "return dz * dout", ["softmax_cross_entropy", "multiply by 1 / 3"]),
    ("(gamma * inv_std), dgamma, dbeta\n    return (", "(gamma * inv_std), dbeta, dgamma\n    return (",
     ["batchnorm, gradient of gamma", "this is the gradient of beta"]),
    ("return dout * (x > 0)", "return dout", ["relu, gradient of x", "a missing mask"]),
    ("return dout * (1 - y * y)", "return 1 - y * y", ["tanh, gradient of x", "times dout it would be right"]),
    ("(dout - (dbeta + xhat * dgamma) / len(dout))", "(dout - xhat * dgamma / len(dout))",
     ["batchnorm, gradient of x", "the same along axis 0", "mlp.py, batchnorm_backward: return (dout - (dbeta"]),
    ("    x = cache\n    return dout * (x > 0)", "    x = cache\n    dout *= x > 0\n    return dout",
     ["relu: dout was changed"]),
    ("grads[name] = grads[name] + penalty", "grads[name] = penalty",
     ["loss_and_grads", "the operations are right", "yours, line "]),
    ("            dout = act_backward(dout, act_cache)\n", "            pass\n",
     ["mlp.py, mlp_backward: dout = act_backward"]),
    ('        grads["E"] = embedding_backward(dout, ids_cache)', "        pass",
     ["no gradient for ['E']"]),
    ("return dout @ W.T, x.T", "return dout @ w.T, x.T", ["NameError", "line "]),
    ("dz = np.exp(log_p)\n", "dz = np.exp(log_p).astype(np.float32)\n", ["is float32, expected float64"]),
    ("x.T @ dout, dout.sum(axis=0)", "x.T @ dout", ["returns 2 gradient(s), expected 3: x, W, b"]),
    ("def penalty_forward", "penalty_forward = None\n\n\ndef other_forward",
     ["penalty_backward has no penalty_forward"]),
    ("def relu_backward", "def my_relu_backward", ["my_relu"]),
]


MORE = [    # the same in other lessons
    ("vanilla_rnn.py", "dh, WhT = 0, Wh.T.copy()", "dh, WhT = 0, Wh.copy()",
     ["rnn, gradient of z", "right only at the last of axis 0",
      "vanilla_rnn.py, rnn_backward: dh, WhT = 0, Wh.T.copy()"]),
    ("vanilla_rnn.py", "            dz[t] *= mask[t]\n", "",
     ["rnn, gradient of z", "right in sequences without padding"]),
    ("lstm.py", "    return stands.astype(dout.dtype) @ dout.reshape(-1, shape[1])",
     "    dE = np.zeros(shape)\n    dE[ids] = dout\n    return dE",
     ["embedding, gradient of E", "named more than once", "yours, line ", "mend first: embedding"]),
    ("seq2seq.py", "dE[kinds] = drows", "dE[:len(kinds)] = drows",
     ["project_symbols, gradient of E", "FAIL  symbol_lstm", "mend first: project_symbols\n"]),
]


@pytest.mark.parametrize("lesson, right, wrong, words", [("mlp.py", *bug) for bug in BUGS] + MORE,
                         ids=[bug[-1][0][:40] for bug in BUGS + MORE])
def test_diagnosis(lesson, right, wrong, words, tmp_path):
    source = (ROOT / lesson).read_text(encoding="utf-8")
    assert source.count(right) == 1
    copy = tmp_path / "my_copy.py"
    copy.write_text(source.replace(right, wrong), encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1 and not done.stderr, done.stderr
    for word in words:
        assert word in done.stdout, done.stdout
    assert done.stdout.splitlines()[-1].endswith(" failed") and not done.stdout.endswith(" 0 failed\n")


VALUES = [  # right derivatives of a wrong forward pass: lesson, changes, what the note must say
    ("mlp.py", [("np.maximum(x, 0), x", "np.maximum(x, 0.1), x"), ("return dout * (x > 0)", "return dout * (x > 0.1)")],
     ["relu_forward gives other values", "yours, line ", "mlp.py, relu_forward: return np.maximum(x, 0), x"]),
    ("mlp.py", [("GELU_C = (2 / math.pi)", "GELU_C = (1 / math.pi)")],
     ["gelu_forward gives other values", "mlp.py, between the functions: GELU_C = (2 / math.pi)"]),
    ("transformer.py", [("causal & (distance < 0)", "causal & (distance < -1)")],
     ["the loss, ", "transformer.py, where_to_look: mask = np.where(causal & (distance < 0)"]),
    ("lstm.py", [("def init_params(cfg, rng, dtype=np.float32):",
                  "def init_params(cfg, rng, dtype=np.float32):\n    rng.random()")],
     ["init_params, ", "other numbers than lstm.py's"]),
]


@pytest.mark.parametrize("lesson, changes, words", VALUES, ids=[words[0] for *_, words in VALUES])
def test_other_values(lesson, changes, words, tmp_path):
    source = (ROOT / lesson).read_text(encoding="utf-8")
    copy = tmp_path / "my_copy.py"
    copy.write_text(source, encoding="utf-8")
    done = check(copy)
    assert done.returncode == 0 and done.stdout.count("note") == 1, done.stdout
    for right, wrong in changes:
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    copy.write_text(source, encoding="utf-8")
    done = check(copy)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    for word in words:
        assert word in done.stdout, done.stdout


def test_unfinished_copy(tmp_path):
    source = (ROOT / "mlp.py").read_text(encoding="utf-8")
    copy = tmp_path / "half.py"
    start, end = source.index("def linear_forward"), source.index("def sigmoid_forward")
    copy.write_text("import numpy as np\n" + source[start:end], encoding="utf-8")
    done = check(copy)
    assert done.returncode == 0 and "not checked end to end" in done.stdout, done.stdout
    copy.write_text("import numpy as np\n", encoding="utf-8")
    assert check(copy).returncode == 1
    copy.write_text("def f(:\n", encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1 and "SyntaxError" in done.stdout and not done.stderr
    half = "import numpy as np\n" + source[start:end] + "def next_forward(x):\n    return (x,\n"
    copy.write_text(half, encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1 and "SyntaxError" in done.stdout and "ok    linear" in done.stdout, done.stdout
    assert check(tmp_path / "missing.py").returncode == 2


ODD = [    # in perceptron.py: what is replaced, by what; the exit status; what the report must say
    ("# ---- plumbing", None, 0, ["4 passed, 0 failed"]),                      # it ends there, as the lesson allows
    ("0.5 * np.tanh(0.5 * z)", "0.5 * np.tanh(z)", 1, ["perceptron.py, sigmoid: return 0.5 * np.tanh(0.5 * z) + 0.5"]),
    ("    y += b\n", "    y += b\n    y += b\n", 1, ["yours, line ", ": y += b", "mend first: linear"]),
    ("@dataclass\nclass Config", "class Config", 1, ["Config: TypeError"]),
    ("return loss, {\"W\": dW, \"b\": db}", "return loss, (dW, db)", 1, ["expected: init_params -> dict"]),
    ("SHADES =", "sys.exit()\nSHADES =", 1, ["it does not run: SystemExit", "__main__"]),
    ("# /// script", "\ufeff# /// script", 0, ["4 passed, 0 failed"]),
]


@pytest.mark.parametrize("right, wrong, status, words", ODD, ids=[odd[0][:20] for odd in ODD])
def test_odd_copies(right, wrong, status, words, tmp_path):
    source = (ROOT / "perceptron.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    copy = tmp_path / "my_copy.py"
    copy.write_text(source[:source.index(right)] if wrong is None else source.replace(right, wrong), encoding="utf-8")
    done = check(copy)
    assert done.returncode == status and not done.stderr, done.stdout + done.stderr
    for word in words:
        assert word in done.stdout, done.stdout


OWN = """
import numpy as np

def double_forward(x):
    return 2 * x, None

def double_backward(dout, cache):
    return {slope} * dout
{case}
"""
CASE = 'GRADCHECK = {"double": lambda rng: dict(x=rng.standard_normal((3, 4)))}'


def test_own_operation(tmp_path):
    copy = tmp_path / "own.py"
    copy.write_text(OWN.format(slope=2, case=CASE), encoding="utf-8")
    assert check(copy).returncode == 0
    copy.write_text(OWN.format(slope=3, case=CASE), encoding="utf-8")
    assert check(copy).returncode == 1
    copy.write_text(OWN.format(slope=2, case=""), encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1 and "GRADCHECK" in done.stdout
    copy.write_text(OWN.format(slope=0, case=CASE).replace("2 * x", "0 * x"), encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1 and "could not have failed" in done.stdout


@pytest.mark.parametrize("path", sorted(p for p in ROOT.glob("*.py") if p.name != "gradcheck.py"), ids=lambda p: p.name)
def test_teeth(path):
    done = check(path, "--teeth")
    assert done.returncode == 0 and "caught" in done.stdout and "survived" not in done.stdout, done.stdout
