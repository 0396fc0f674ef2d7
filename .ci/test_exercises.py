"""The operations that exercises ask for: gradcheck.py checks an answer, right or wrong, as it stands."""
import subprocess
import sys

import pytest
from lessons import NEW, ROOT, load

ANSWERS = {     # name of the operation: right answer, what to replace in it, by what
    "leaky_relu": ("""
def leaky_relu_forward(x):
    return np.where(x > 0, x, 0.1 * x), x


def leaky_relu_backward(dout, cache):
    return dout * np.where(cache > 0, 1, 0.1)
""", "1, 0.1)", "1, 0)"),
    "huber": ("""
def huber_forward(y, targets):
    e = y - targets
    return np.where(abs(e) < 1, e * e / 2, abs(e) - 0.5).mean(), e


def huber_backward(dout, cache):
    return dout * np.clip(cache, -1, 1) / cache.size
""", "np.clip(cache, -1, 1)", "np.sign(cache)"),
    "relu2": ("""
def relu2_forward(x):
    return np.maximum(x, 0) ** 2, x


def relu2_backward(dout, cache):
    return dout * 2 * np.maximum(cache, 0)
""", "2 * ", ""),
    "gate": ("""
def gate_forward(x, w, b):
    s = 1 / (1 + np.exp(-(x @ w + b)))
    return x * s[:, None], (x, w, s)


def gate_backward(dout, cache):
    x, w, s = cache
    ds = (dout * x).sum(axis=1) * s * (1 - s)
    return dout * s[:, None] + ds[:, None] * w, x.T @ ds, ds.sum()
""", " + ds[:, None] * w", ""),
}


def report(text, folder):
    file = folder / "my_answer.py"
    file.write_text("import numpy as np\n\n" + text, encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "gradcheck.py", file], capture_output=True, text=True)
    return done.stdout, done.returncode


@pytest.mark.parametrize("name", ANSWERS)
def test_answer(name, tmp_path):
    right, old, new = ANSWERS[name]
    text, status = report(right, tmp_path)
    assert f"ok    {name} " in text and status == 0, text
    assert right.count(old) >= 1
    text, status = report(right.replace(old, new), tmp_path)
    assert f"FAIL  {name}, gradient of " in text and "line " in text and status == 1, text


@pytest.mark.parametrize("name", NEW)
def test_three_exercises(name):
    exercises = load(name).MORE.partition("\nExercises")[2]
    assert all(f"\n    {k}. " in exercises for k in (1, 2, 3)), exercises
