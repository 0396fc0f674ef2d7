"""The rules of the house a program can hold: one name, one meaning; imports; the four names; float32; plain ASCII."""
import ast
import importlib.util
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(p for p in ROOT.glob("*.py") if p.name != "gradcheck.py")
OWN = {"Config", "PRESETS", "init_params", "make_batch", "loss_and_grads", "main"}


def load(path):
    """A lesson as a module."""
    spec = importlib.util.spec_from_file_location(path.stem + "_lesson", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_top_level():
    allowed = {"perceptron.py", "mlp.py", "vanilla_rnn.py", "lstm.py", "seq2seq.py", "attention.py",
               "nested_attention.py", "cnn.py", "transformer.py", "mae.py", "gradcheck.py", "README.md", "LICENSE",
               ".gitignore", ".ci", ".git"}
    assert {p.name for p in ROOT.iterdir()} - allowed <= {"__pycache__", ".ruff_cache"}


def test_same_name_same_code():
    seen = {}
    for path in LESSONS:
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                name, text = node.name, ast.get_source_segment(source, node)
            elif isinstance(node, ast.Assign) and node.targets[0].id not in OWN:
                name, text = node.targets[0].id, ast.unparse(node)
            else:
                continue
            first, where = seen.setdefault(name, (text, path.name))
            assert first == text, f"{name} differs in {where} and {path.name}"


@pytest.mark.parametrize("path", [*LESSONS, ROOT / "gradcheck.py"], ids=lambda p: p.name)
def test_file(path):
    source = path.read_text(encoding="utf-8")
    assert source.isascii() and "\t" not in source and max(map(len, source.splitlines())) <= 120
    head = '# /// script\n# requires-python = ">=3.10"\n# dependencies = ["numpy"]\n# ///\n"""'
    assert source.startswith(head + path.name)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names | {"numpy"}, f"imports {name}"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.name)
def test_lesson(path, capsys):
    state = np.random.get_state()[1].copy()
    module = load(path)
    untouched = np.array_equal(state, np.random.get_state()[1])
    assert capsys.readouterr().out == "" and untouched, "something happens at import"
    for heading in ("\nRun\n", "\nBreak it\n", "\nPapers: "):
        assert heading in module.__doc__
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(module.Config), re.M))
    for field in fields(module.Config):
        assert comments.get(field.name), f"{field.name} has no comment"
    for name in (n[:-9] for n in vars(module) if n.endswith("_backward")):
        lines = inspect.getsource(module).splitlines()
        at = {kind: next(i for i, line in enumerate(lines) if line.startswith(f"def {name}_{kind}("))
              for kind in ("forward", "backward")}
        between = [line for line in lines[at["forward"] + 1:at["backward"]] if line.startswith(("def ", "class "))]
        assert not between, f"{name}_forward does not stand directly above {name}_backward"
    for task in module.Config.__dataclass_fields__["task"].type.__args__:
        cfg = module.Config(task=task)
        params = module.init_params(cfg, np.random.default_rng(0), np.float32)
        batch = module.make_batch(cfg, np.random.default_rng(1), np.float32)
        loss, grads = module.loss_and_grads(params, batch, cfg)
        assert list(params) and set(grads) == set(params) and np.isfinite(loss)
        assert all(a.dtype == np.float32 for a in [*params.values(), *grads.values()])
        assert all(getattr(a, "dtype", np.float32) != np.float64 for a in batch)


@pytest.mark.parametrize("name", ["cnn.py", "transformer.py", "mae.py"])
def test_portions_do_not_change_the_gradients(name, monkeypatch):
    module = load(next(path for path in LESSONS if path.name == name))
    cfg = module.Config()
    params = module.init_params(cfg, np.random.default_rng(0), np.float64)
    batch = module.make_batch(cfg, np.random.default_rng(1), np.float64)
    loss, grads = module.loss_and_grads(params, batch, cfg)
    cut, slices = [], module.portions
    monkeypatch.setattr(module, "PORTION", 5000)
    monkeypatch.setattr(module, "portions", lambda *args: cut.append(slices(*args)) or cut[-1])
    again, same = module.loss_and_grads(params, batch, cfg)
    assert max(map(len, cut)) > 2 and abs(loss - again) < 1e-12
    assert all(np.allclose(g, same[key], rtol=0, atol=1e-12) for key, g in grads.items())
