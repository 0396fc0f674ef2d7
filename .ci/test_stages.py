"""A spine is typed in stages, and after each there is something to run."""
import ast
import subprocess
import sys

import pytest
from lessons import NEW, ROOT, spine, top_level

OPTIMIZER = {"clip_norm", "adam_update", "adamw_update", "sgd_update", "learning_rate",
             "perceptron_rule", "train"}
DOUBLED = """
right_loss_and_grads = loss_and_grads


def loss_and_grads(params, batch, cfg):
    loss, grads = right_loss_and_grads(params, batch, cfg)
    return loss, {name: 2 * g for name, g in grads.items()}
"""


def check(path):
    """python gradcheck.py PATH -> CompletedProcess."""
    command = [sys.executable, "-W", "error", ROOT / "gradcheck.py", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def cut(name, after, before):
    """A spine up to the first definition from before that follows the definition of after."""
    text, lines = spine(name), spine(name).splitlines(keepends=True)
    order = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    start = next(i for i, node in enumerate(order) if node.name == after)
    end = next(node for node in order[start + 1:] if node.name in before)
    return "".join(lines[:end.lineno - 1])


@pytest.mark.parametrize("name", NEW)
def test_layers(name, tmp_path):
    """After the layers: every pair of a forward and a backward is checked."""
    copy = tmp_path / "my_copy.py"
    ops = [f for f in top_level(spine(name)) if f.endswith("_backward")]
    text = cut(name, ops[0], OPTIMIZER | {"make_batch", "init_params"})
    copy.write_text(text, "utf-8")
    done = check(copy)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert f"ok    {ops[0].removesuffix('_backward')}" in done.stdout, done.stdout


@pytest.mark.parametrize("name", NEW)
def test_model(name, tmp_path):
    """After the model: the gradients of the whole are checked as well, in a file of any name."""
    copy = tmp_path / "my_copy.py"
    text = cut(name, "loss_and_grads", OPTIMIZER)
    assert "\ndef train(" not in text and "\ndef loss_and_grads(" in text
    copy.write_text(text, "utf-8")
    done = check(copy)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    copy.write_text(text + DOUBLED, "utf-8")
    done = check(copy)
    assert done.returncode == 1 and not done.stderr, "gradcheck.py does not check end to end"


@pytest.mark.parametrize("name", NEW)
def test_spine(name, tmp_path):
    """The whole spine, under another name."""
    copy = tmp_path / "my_copy.py"
    copy.write_text(spine(name), "utf-8")
    done = check(copy)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
