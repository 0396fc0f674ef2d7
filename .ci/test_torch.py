"""The lines of the README that take a checkpoint into PyTorch: the same logits as the lesson's."""
import json
import re

import numpy as np
import pytest
from lessons import ROOT, lesson, load, metrics, prose

torch = pytest.importorskip("torch")


def block(file):
    """The indented lines of the README that load this checkpoint."""
    found = re.findall(r"(?:^(?:    .*)?\n)+", (ROOT / "README.md").read_text("utf-8"), re.M)
    [lines] = [text for text in found if f'np.load("{file}")' in text]
    return re.sub("^    ", "", lines, flags=re.M)


def in_torch(file, folder, monkeypatch):
    """Run these lines -> logits, ids, parameters."""
    monkeypatch.chdir(folder)
    names, before = {}, torch.get_default_dtype()       # test_parity.py works in float64
    torch.set_default_dtype(torch.float32)
    try:
        exec(block(file), names)
    finally:
        torch.set_default_dtype(before)
    params = {name: value.numpy() for name, value in names["p"].items()}
    assert json.loads(str(names["saved"]["meta"])) == names["meta"]
    return names["logits"].detach().numpy(), names["ids"].numpy(), params


def test_lstm(tmp_path, monkeypatch):
    metrics(lesson("lstm.py", "text", "--steps", "30", "--save", str(tmp_path / "lstm.npz")))
    theirs, ids, params = in_torch("lstm.npz", tmp_path, monkeypatch)
    module = load("lstm.py")
    zeros = module.zero_states(params, "lstm", 1)
    ours, _ = module.stack_forward(params, ids[:, None], "lstm", zeros)
    ours = ours[0] if isinstance(ours, tuple) else ours
    assert ours.dtype == np.float32 and np.abs(ours[:, 0] - theirs).max() < 1e-5


def test_gpt(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the rat " + prose(), "utf-8")
    metrics(lesson("transformer.py", "text", "--model", "gpt", "--data", str(text), "--steps", "30",
                   "--save", str(tmp_path / "gpt.npz")))
    theirs, ids, params = in_torch("gpt.npz", tmp_path, monkeypatch)
    module = load("transformer.py")
    ours, _ = module.gpt_forward(params, ids[None], module.Text(model="gpt"))
    assert ours.dtype == np.float32 and np.abs(ours - theirs).max() < 1e-5
