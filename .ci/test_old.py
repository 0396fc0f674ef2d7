"""The lessons that have no spine yet: their rules and what a reader meets there, until each is rebuilt.
A test of a lesson ends by itself with the rebuilding; this file goes with the last one."""
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from lessons import (ASCII_CONSOLE, OLD, ROOT, cifar_folder, gzip, idx, is_refused, lesson, load,
                     mnist_folder, source, top_level, without_times)

sys.path.insert(0, str(ROOT))
OWN = {"GRADCHECK", "Config", "PRESETS", "init_params", "make_batch", "loss_and_grads", "main", "Expr", "Import",
       "ImportFrom"}
ATTENTION = ["--task", "pairs", "--hidden", "16", "--embed", "8", "--steps", "40", "--batch", "16"]
SMALL = ["--steps", "2", "--layers", "1", "--width", "8", "--merges", "20"]      # for translation.py


def old(*names):
    """A test of these lessons, while they have the old form."""
    return pytest.mark.skipif(not set(names) <= set(OLD), reason="rebuilt")


@pytest.fixture
def needed(tmp_path):
    """Flags without which a lesson does not run: translation.py has no built-in task."""
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"le chat {n}\tthe cat {n}\n" for n in range(40)), encoding="utf-8")
    return lambda name: ["--data", str(file), *SMALL] if name == "translation.py" else []


def test_same_name_same_code():
    seen = {}
    for name in OLD:
        for key, text in top_level(source(name)).items():
            first, where = seen.setdefault(key, (text, name))
            assert key in OWN or first == text, f"{key} differs in {where} and {name}"


@pytest.mark.parametrize("name", OLD)
def test_lesson(name, capsys):
    text, state = source(name), np.random.get_state()[1].copy()
    assert text.isascii() and "\t" not in text and max(map(len, text.splitlines())) <= 120
    module = importlib.import_module(name.removesuffix(".py"))
    untouched = np.array_equal(state, np.random.get_state()[1])
    assert capsys.readouterr().out == "" and untouched, "something happens at import"
    for heading in ("\nRun\n", "\nBreak it\n", "\nPapers: "):
        assert heading in module.__doc__
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(module.Config), re.M))
    assert all(comments.get(field.name) for field in fields(module.Config))
    for task in module.Config.__dataclass_fields__["task"].type.__args__:
        if task == "pairs":                             # needs a file
            continue
        cfg = module.Config(task=task)
        params = module.init_params(cfg, np.random.default_rng(0), np.float32)
        batch = module.make_batch(cfg, np.random.default_rng(1), np.float32)
        loss, grads = module.loss_and_grads(params, batch, cfg)
        assert list(params) and set(grads) == set(params) and np.isfinite(loss)
        assert all(a.dtype == np.float32 for a in [*params.values(), *grads.values()])
        assert all(getattr(a, "dtype", np.float32) != np.float64 for a in batch)


@pytest.mark.parametrize("name", [name for name in OLD if "PORTION" in source(name)])
def test_portions_do_not_change_the_gradients(name, monkeypatch):
    module = load(name)
    if name == "translation.py":                        # without a file: one operation
        x = np.random.default_rng(0).standard_normal((90, 16))
        params = {"W1": np.ones((16, 8)), "b1": np.zeros(8), "W2": np.ones((8, 16)), "b2": np.zeros(16)}
        before, _ = module.feed_forward(x, params, "gelu")
        monkeypatch.setattr(module, "PORTION", 100)
        assert np.allclose(before, module.feed_forward(x, params, "gelu")[0], rtol=0, atol=1e-12)
        return
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


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("flags, words", [
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--lr", "abc"], ["--lr", "float", "abc"]),
    (["--lr", "0"], ["--lr", "above 0", "0.0"]),
    (["--lr", "nan"], ["--lr", "above 0", "nan"]),
    (["--steps", "0"], ["--steps", "1 or more"]),
    (["--steps", "1.5"], ["--steps", "int", "1.5"]),
    (["--batch", "-3"], ["--batch", "1 or more"]),
    (["--seed", "-1"], ["--seed", "0 or more"]),
    (["--task", "foo"], ["--task", "foo", "choose from"]),
    (["extra"], ["extra"]),
])
def test_wrong_flag(name, flags, words):
    is_refused(lesson(name, *flags), name, *words)


@pytest.mark.parametrize("name", [n for n in ("vanilla_rnn.py", "cnn.py") if n in OLD])
def test_data_without_a_task_that_reads_it(name):
    is_refused(lesson(name, "--data", "nowhere"), name, "--data", "--task")


@old("vanilla_rnn.py")
@pytest.mark.parametrize("task", ["text", "wave"])
def test_resume_bit_for_bit(task, tmp_path):
    name, common = "vanilla_rnn.py", ["--task", task, "--hidden", "16", "--steps", "30"]

    def figures(done):
        assert done.returncode == 0, done.stderr
        return re.sub(r"seconds=.*|steps=\S+", "", done.stdout.splitlines()[-1])
    half, whole = str(tmp_path / "half.npz"), figures(lesson(name, *common))
    stop_at(name, 12, *common, "--save", half)
    assert figures(lesson(name, *common, "--load", half)) == whole
    is_refused(lesson(name, *common, "--hidden", "17", "--load", half), "half.npz", "(", "17")
    raw = (tmp_path / "half.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(raw[:len(raw) // 2])
    is_refused(lesson(name, *common, "--load", str(tmp_path / "cut.npz")), "cut.npz")
    if task == "text":
        other = tmp_path / "other.txt"
        other.write_text("This is \u00e9trange. " * 100, encoding="utf-8")
        is_refused(lesson(name, *common, "--load", half, "--data", str(other)), "half.npz", "characters")


@old("nested_attention.py")
@pytest.mark.parametrize("flags, words", [
    (["--periods", "0"], ["--periods", "above 0"]),
    (["--periods", "1,x"], ["--periods", "1,x"]),
    (["--rule", "foo"], ["--rule", "foo", "choose from"]),
    (["--mu", "1"], ["--mu"]),
    (["--keys", "1"], ["--keys"]),
])
def test_wrong_flag_nested(flags, words):
    is_refused(lesson("nested_attention.py", *flags), "nested_attention.py", *words)


@old("vanilla_rnn.py")
@pytest.mark.parametrize("flags, words", [
    (["--length", "1"], ["--length", "2 or more"]),
    (["--bits", "0"], ["--bits", "1 or more"]),
    (["--delay", "0"], ["--delay", "1 or more"]),
    (["--window", "-1"], ["--window", "0 or more"]),
    (["--radius", "-1"], ["--radius", "0 or more"]),
    (["--clip", "nan"], ["--clip", "0 or more"]),
    (["--clip-by", "foo"], ["--clip-by", "foo", "choose from"]),
    (["--save", "a.npz"], ["--save", "--task"]),
    (["--task", "text", "--batch", "5000"], ["--batch", "at most"]),
    (["--task", "text", "--data", "nowhere"], ["nowhere"]),
    (["--task", "wave", "--load", "nowhere.npz"], ["--load nowhere.npz"]),
    (["--task", "wave", "--save", "no/such/folder/a.npz"], ["--save no/such/folder/a.npz"]),
])
def test_wrong_flag_rnn(flags, words):
    is_refused(lesson("vanilla_rnn.py", *flags), "vanilla_rnn.py", *words)


@old("seq2seq.py")
@pytest.mark.parametrize("flags, words", [
    (["--beam", "0"], ["--beam", "1 or more"]),
    (["--length", "0"], ["--length", "1 or more"]),
    (["--length", "9", "--task", "words"], ["--length", "at most 8"]),
    (["--forcing", "1.5"], ["--forcing", "from 0 to 1"]),
    (["--forcing", "nan"], ["--forcing", "from 0 to 1"]),
    (["--penalty", "-1"], ["--penalty", "0 or more"]),
    (["--source", "sideways"], ["--source", "sideways", "choose from"]),
    (["--save", "a.npz"], ["--save", "demo"]),
    (["--task", "words", "--load", "nowhere.npz"], ["--load nowhere.npz"]),
    (["--task", "words", "--save", "no/such/folder/a.npz"], ["--save no/such/folder/a.npz"]),
])
def test_wrong_flag_seq2seq(flags, words):
    is_refused(lesson("seq2seq.py", *flags), "seq2seq.py", *words)


@old("attention.py")
@pytest.mark.parametrize("flags, words", [
    (["--beam", "0"], ["--beam", "1 or more"]),
    (["--length", "0"], ["--length", "1 or more"]),
    (["--hidden", "7"], ["--hidden", "even", "7"]),
    (["--attention", "foo"], ["--attention", "foo", "choose from"]),
    (["--feed", "--attention", "dot"], ["--feed", "additive", "dot"]),
    (["--save", "a.npz"], ["--save", "demo"]),
    (["--task", "pairs", "--data", "nowhere"], ["nowhere"]),
    (["--task", "pairs", "--length", "1"], ["--length", "1"]),
    (["--task", "pairs", "--batch", "5000"], ["--batch", "at most"]),
    (["--task", "dates", "--load", "nowhere.npz"], ["--load nowhere.npz"]),
    (["--task", "dates", "--save", "no/such/folder/a.npz"], ["--save no/such/folder/a.npz"]),
])
def test_wrong_flag_attention(flags, words):
    is_refused(lesson("attention.py", *flags), "attention.py", *words)


@old("cnn.py")
@pytest.mark.parametrize("flags, words", [
    (["--model", "foo"], ["--model", "foo", "choose from"]),
    (["--size", "20"], ["--size", "multiple of 8", "20"]),
    (["--crop", "16"], ["--crop", "less than 16"]),
    (["--dropout", "1"], ["--dropout", "below 1"]),
    (["--smoothing", "-0.1"], ["--smoothing", "0 or more"]),
    (["--workers", "0"], ["--workers", "1 or more"]),
    (["--workers", "4", "--slices", "2"], ["--slices", "--workers 4"]),
    (["--slices", "65"], ["--slices", "--batch 64"]),
    (["--data", "nowhere"], ["--data", "--task"]),
    (["--task", "cifar"], ["--data"]),
    (["--task", "cifar", "--data", "nowhere"], ["nowhere", "cifar-10-binary.tar.gz"]),
    (["--task", "mnist", "--data", "nowhere"], ["nowhere", "train-images-idx3-ubyte.gz"]),
    (["--load", "nowhere.npz"], ["--load nowhere.npz"]),
    (["--save", "no/such/folder/a.npz"], ["--save no/such/folder/a.npz"]),
])
def test_wrong_flag_cnn(flags, words):
    is_refused(lesson("cnn.py", *flags), "cnn.py", *words)


@old("mae.py")
@pytest.mark.parametrize("flags, words", [
    (["--patch", "3"], ["--patch", "divisor of 16", "3"]),
    (["--patch", "0"], ["--patch", "1 or more"]),
    (["--patch", "16"], ["--masked", "one patch hidden and one visible of 1"]),
    (["--masked", "0"], ["--masked", "between 0 and 1", "0.0"]),
    (["--masked", "1"], ["--masked", "between 0 and 1", "1.0"]),
    (["--masked", "nan"], ["--masked", "between 0 and 1"]),
    (["--masked", "0.99"], ["--masked", "one patch hidden and one visible of 16"]),
    (["--width", "66"], ["--width", "multiple of --heads 4", "66"]),
    (["--decoder-width", "30"], ["--decoder-width", "multiple of --heads 4"]),
    (["--decoder-layers", "0"], ["--decoder-layers", "1 or more"]),
    (["--crop", "16"], ["--crop", "less than 16"]),
    (["--labels", "0"], ["--labels", "above 0"]),
    (["--labels", "1.5"], ["--labels", "up to 1"]),
    (["--tune-steps", "0"], ["--tune-steps", "1 or more"]),
    (["--workers", "0"], ["--workers", "1 or more"]),
    (["--workers", "33"], ["--workers", "at most --batch 32"]),
    (["--task", "cifar"], ["--data"]),
    (["--task", "cifar", "--data", "nowhere"], ["nowhere", "cifar-10-binary.tar.gz"]),
    (["--task", "mnist", "--data", "nowhere"], ["nowhere", "train-images-idx3-ubyte.gz"]),
    (["--load", "nowhere.npz"], ["--load nowhere.npz"]),
    (["--save", "no/such/folder/a.npz"], ["--save no/such/folder/a.npz"]),
    (["--png", "no/such/folder/a.png"], ["--png no/such/folder/a.png"]),
])
def test_wrong_flag_mae(flags, words):
    is_refused(lesson("mae.py", *flags), "mae.py", *words)


def stop_at(name, step, *flags):
    """Run a lesson whose training stops after a step, as by Ctrl-C."""
    module = name.removesuffix(".py")
    code = (f"import sys, {module}; original = {module}.Progress.report\n"
            f"def report(self, loss, note=str):\n    original(self, loss, note); self.stopped = self.step == {step}\n"
            f"{module}.Progress.report = report; {module}.run({module}.main)")
    subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, check=True, capture_output=True)


@old("seq2seq.py")
def test_resume_seq2seq(tmp_path):
    def last(*flags):
        done = lesson("seq2seq.py", "--task", "reverse", "--hidden", "16", "--steps", "60", *flags)
        assert done.returncode == 0, done.stderr
        return re.findall(r"\d+%|-\d+\.\d+|[.\d]+\|.*", done.stdout)
    half = str(tmp_path / "half.npz")
    stop_at("seq2seq.py", 25, "--task", "reverse", "--hidden", "16", "--steps", "60", "--save", half)
    whole = last("--save", str(tmp_path / "whole.npz"))
    assert last("--load", half) == whole and len(whole) > 8
    assert last("--load", str(tmp_path / "whole.npz")) == whole
    for flags, words in ((["--hidden", "17"], ["17"]), (["--task", "words"], ["task", "reverse"]),
                         (["--source", "backwards"], ["source", "forwards"])):
        flags = ["--task", "reverse", "--hidden", "16", *flags, "--load", half]
        is_refused(lesson("seq2seq.py", *flags), "half.npz", *words)


@old("attention.py")
def test_pairs_file(tmp_path):
    file = tmp_path / "pairs.tsv"
    good = [f"one {n} two\tzwei {n} eins" for n in range(60)]
    for lines, words in (([*good[:7], "no tab here", *good], ["line 8", "no tab here"]),
                         ([*good[:3], "a\tb\tc", *good], ["line 4"]), ([*good[:2], "\tb", *good], ["line 3"]),
                         (good[:5], ["20 lines"]), ([], ["empty"])):
        file.write_text("\n".join(lines), encoding="utf-8")
        is_refused(lesson("attention.py", *ATTENTION, "--data", str(file)), "pairs.tsv", *words)
    file.write_bytes("caf\xe9\tcoffee\n".encode("latin-1") * 30)
    is_refused(lesson("attention.py", *ATTENTION, "--data", str(file)), "pairs.tsv", "UTF-8", "0xe9")
    file.write_text("\n".join(good), encoding="utf-8")
    is_refused(lesson("attention.py", *ATTENTION, "--data", str(file), "--batch", "99"), "--batch", "at most 54")
    done = lesson("attention.py", *ATTENTION, "--data", str(file))
    assert done.returncode == 0 and "validation=" in done.stdout, done.stderr


@old("attention.py")
def test_resume_attention(tmp_path):
    file, half = tmp_path / "pairs.tsv", str(tmp_path / "half.npz")
    file.write_text("\n".join(f"{n} is\t{7 * n}" for n in range(100)), encoding="utf-8")
    flags = [*ATTENTION, "--data", str(file), "--unit", "letters"]

    def figures(*more):
        done = lesson("attention.py", *flags, *more)
        assert done.returncode == 0, done.stderr
        return re.findall(r"validation=\S+ right=\S+|-\d+\.\d+", done.stdout)
    stop_at("attention.py", 15, *flags, "--save", half)
    assert figures("--load", half) == figures()
    for more, words in ((["--hidden", "18"], ["18"]), (["--attention", "dot"], ["attention", "additive"]),
                        (["--unit", "words"], ["unit", "letters"])):
        is_refused(lesson("attention.py", *flags, *more, "--load", half), "half.npz", *words)
    file.write_text("\n".join(f"{n} is\t{7 * n} \u00e9" for n in range(100)), encoding="utf-8")
    is_refused(lesson("attention.py", *flags, "--load", half), "half.npz", "letters it was trained on")


@old("attention.py")
@pytest.mark.parametrize("kind", ["additive", "fed", "dot", "general", "none"])
def test_padding_gets_no_attention(kind):
    import attention
    cfg = attention.Config(task="dates", attention="additive" if kind == "fed" else kind, feed=kind == "fed", hidden=8)
    rng = np.random.default_rng(0)
    params, (source, mask, *rest) = attention.init_params(cfg, rng, np.float64), attention.make_batch(cfg, rng)
    mask[:, 1] = False                                  # one source is padding altogether
    batches = [(np.where(mask[:, :, 0], source, k), mask, *rest) for k in (0, 3)]
    (loss, grads), (loss2, grads2) = (attention.loss_and_grads(params, batch, cfg) for batch in batches)
    assert np.isfinite(loss) and abs(loss - loss2) < 1e-14
    assert all(np.isfinite(grads[k]).all() and np.abs(grads[k] - grads2[k]).max() < 1e-14 for k in grads)
    if kind != "none":
        w = attention.translator_forward(params, batches[0], cfg)[1][0]
        assert not w[:, ~mask[:, :, 0].T].any() and np.allclose(w[:, mask[0, :, 0]].sum(axis=2), 1)


@old("seq2seq.py")
def test_padding_changes_nothing():
    rng = np.random.default_rng(0)
    import seq2seq
    for task in ("reverse", "translate", "words"):
        cfg = seq2seq.Config(task=task, hidden=8, batch=16)
        params, batch = seq2seq.init_params(cfg, rng, np.float64), seq2seq.make_batch(cfg, rng, np.float64)
        (loss, grads), (loss2, grads2) = (seq2seq.loss_and_grads(params, b, cfg) for b in (
            batch, seq2seq.other_padding(batch)))
        assert abs(loss - loss2) < 1e-14 and all(np.abs(grads[k] - grads2[k]).max() < 1e-14 for k in grads)


@old("cnn.py")
def test_cifar_files(tmp_path):
    small = ["--task", "cifar", "--channels", "2", "--steps", "2", "--batch", "8", "--data"]
    folder, archive = cifar_folder(tmp_path), tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    for where in (archive, folder, tmp_path):           # the archive, its folder, and the folder that holds it
        done = lesson("cnn.py", *small, str(where))
        assert done.returncode == 0 and "accuracy=" in done.stdout.splitlines()[-1], done.stderr
    raw = (folder / "test_batch.bin").read_bytes()
    for changes, words in ((dict(data_batch_2=raw[:-9]), ["data_batch_2.bin", "3073"]),
                           (dict(test_batch=b""), ["test_batch.bin", "3073"]),
                           (dict(test_batch=b"\x0a" + raw[1:]), ["test_batch.bin", "labels"]),
                           (dict(data_batch_5=None), ["data_batch_5.bin", "no such file"])):
        is_refused(lesson("cnn.py", *small, str(cifar_folder(tmp_path, **changes))), *words)
    cut, other = tmp_path / "cut.tar.gz", tmp_path / "cifar-10-python.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-2000])
    with tarfile.open(other, "w:gz") as tar:
        tar.add(folder / "data_batch_1.bin", arcname="cifar-10-batches-py/data_batch_1")
    is_refused(lesson("cnn.py", *small, str(cut)), "cut.tar.gz", "cifar-10-binary.tar.gz")
    is_refused(lesson("cnn.py", *small, str(other)), "cifar-10-python.tar.gz", "data_batch_1.bin")
    cut.write_bytes(b"this is not an archive")
    is_refused(lesson("cnn.py", *small, str(cut)), "cut.tar.gz")


@old("mae.py")
def test_mae_on_cifar(tmp_path):
    common = ["--task", "cifar", "--width", "8", "--layers", "1", "--steps", "12", "--batch", "8", "--warmup", "2"]
    folder, half, png = cifar_folder(tmp_path), str(tmp_path / "half.npz"), tmp_path / "a.png"

    def last(*flags):
        done = lesson("mae.py", *common, "--data", str(folder), *flags)
        assert done.returncode == 0, done.stderr
        return re.findall(r" error=\S+| probe=\S+| finetuned=\S+", done.stdout)
    whole = last("--png", str(png), "--finetune", "--tune-steps", "3")
    assert len(whole) == 3
    raw = png.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[12:24] == b"IHDR" + (102 * 4).to_bytes(4, "big") + (
        12 * 34 * 4).to_bytes(4, "big")
    assert len(zlib.decompress(raw[raw.index(b"IDAT") + 4:-16])) == 12 * 34 * 4 * (1 + 102 * 4 * 3)
    stop_at("mae.py", 5, *common, "--data", str(folder), "--save", half)
    assert last("--load", half) == whole[:2]
    for flags, words in ((["--width", "12"], ["Penc", "(64, 12)", "(64, 8)"]),
                         (["--patch", "8"], ["Pdec", "(16, 64)", "(64, 64)"]),
                         (["--layers", "2"], ["enc1"]), (["--no-norm-pixels"], ["norm_pixels", "True"]),
                         (["--heads", "2"], ["heads 2", "4"])):
        is_refused(lesson("mae.py", *common, "--data", str(folder), "--load", half, *flags), "half.npz", *words)
    is_refused(lesson("mae.py", "--width", "8", "--layers", "1", "--load", half), "half.npz", "task shapes", "cifar")
    (tmp_path / "cut.npz").write_bytes(Path(half).read_bytes()[:-2000])
    is_refused(lesson("mae.py", *common, "--data", str(folder), "--load", str(tmp_path / "cut.npz")), "cut.npz")
    cut = cifar_folder(tmp_path, data_batch_2=(folder / "test_batch.bin").read_bytes()[:-9])
    is_refused(lesson("mae.py", *common, "--data", str(cut)), "data_batch_2.bin", "3073")


@old("mae.py")
def test_mae_sees_nothing_of_what_is_hidden():
    import mae
    rng = np.random.default_rng(0)
    for norm in (False, True):
        cfg = mae.Config(norm_pixels=norm, batch=5)
        params, (x, order) = mae.init_params(cfg, rng, np.float64), mae.make_batch(cfg, rng, np.float64)
        filled, known = mae.reconstruct(params, x, order, cfg)
        other, _ = mae.reconstruct(params, np.where(known > 0, x, rng.standard_normal(x.shape)), order, cfg)
        assert known.mean() == 0.25 and np.array_equal(filled, other)


@old("mae.py")
def test_mae_in_several_processes():
    def losses(*flags):
        done = lesson("mae.py", "--steps", "20", *flags)
        assert done.returncode == 0, done.stderr
        return [float(loss) for loss in re.findall(r"loss (\d\S+)  \|", done.stdout)]
    assert np.allclose(losses(), losses("--workers", "2"), atol=2e-4) and len(losses()) == 10


@old("cnn.py")
def test_resume_cnn(tmp_path):
    def last(done):
        assert done.returncode == 0, done.stderr
        return re.findall(r"accuracy=\S+|step +\d+/30  loss \S+  validation \S+", done.stdout)[-4:]
    common = ["--steps", "30", "--channels", "2", "--optimizer", "momentum", "--dropout", "0.2", "--data",
              str(cifar_folder(tmp_path)), "--task", "cifar", "--batch", "16"]
    half, whole = str(tmp_path / "half.npz"), last(lesson("cnn.py", *common))
    code = ("import sys, cnn; original = cnn.Progress.report\n"
            "def report(self, loss, note=str):\n    original(self, loss, note); self.stopped = self.step == 12\n"
            "cnn.Progress.report = report; cnn.run(cnn.main)")
    subprocess.run([sys.executable, "-c", code, *common, "--save", half], cwd=ROOT, check=True, capture_output=True)
    assert last(lesson("cnn.py", *common, "--load", half)) == whole
    is_refused(lesson("cnn.py", *common, "--load", half, "--model", "resnet"), "half.npz", "model resnet", "plain")
    is_refused(lesson("cnn.py", *common, "--load", half, "--channels", "3"), "half.npz", "(3, 3, 3, 3)", "(3, 3, 3, 2)")
    raw = Path(half).read_bytes()
    (tmp_path / "cut.npz").write_bytes(raw[:len(raw) // 2])
    is_refused(lesson("cnn.py", *common, "--load", str(tmp_path / "cut.npz")), "cut.npz")


def losses(*flags):
    """The losses that a run of cnn.py prints."""
    done = lesson("cnn.py", "--steps", "20", "--channels", "2", *flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [float(v) for v in re.findall(r"step.*loss (\S+)  val", done.stdout)]


@old("cnn.py")
def test_workers_compute_the_same():
    one = losses("--slices", "3")
    assert len(one) == 10 and np.allclose(one, losses("--workers", "3"), atol=2e-4)
    none = losses("--norm", "none")                     # nothing depends on the other pictures of a slice
    assert np.allclose(none, losses("--norm", "none", "--workers", "2"), atol=2e-4)


@old("cnn.py")
def test_workers_where_there_is_no_shared_memory():
    code = ("import multiprocessing.context as context, cnn\n"
            "def refuse(*size): raise OSError('no shared memory')\n"
            "context.BaseContext.RawArray = refuse; cnn.run(cnn.main)")
    done = subprocess.run([sys.executable, "-c", code, "--workers", "2"], cwd=ROOT, capture_output=True, text=True)
    is_refused(done, "--workers 2", "no shared memory", "one process")


@old("cnn.py")
@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files")
def test_disk_full_before_training(tmp_path):
    done = subprocess.run(f'ulimit -f 200; "{sys.executable}" "{ROOT / "cnn.py"}" --save "{tmp_path / "a.npz"}"',
                          shell=True, capture_output=True, text=True)
    is_refused(done, "--save", "a.npz")
    assert "step" not in done.stdout                    # 200 blocks hold the parameters, but not the optimizer's state


@old("cnn.py")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("what", ["worker killed", "interrupted", "killed"])
def test_workers_end(what):
    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False
    process = subprocess.Popen([sys.executable, "-W", "error", ROOT / "cnn.py", "--workers", "2", "--steps", "1000000"],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        for line in process.stdout:
            if "chance level" in line:
                break
        children, deadline = [], time.time() + 60
        while len(children) < 2 and time.time() < deadline:
            time.sleep(0.5)
            children = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
            children = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(children) == 2
        time.sleep(3)
        if what == "worker killed":
            os.kill(children[1], signal.SIGKILL)
        elif what == "interrupted":
            os.killpg(process.pid, signal.SIGINT)       # as a terminal does: every process of the group gets it
        else:
            process.kill()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    if what == "worker killed":
        assert process.returncode == 1 and len(err.splitlines()) == 1 and "worker 2 of 2" in err, err
    elif what == "interrupted":
        assert process.returncode == 0 and not err and out.splitlines()[-1].startswith("result: "), err
    deadline = time.time() + 20
    while any(map(alive, children)) and time.time() < deadline:
        time.sleep(0.2)
    assert not any(map(alive, children))


@old("translation.py")
@pytest.mark.parametrize("flags, words", [
    (["--width", "30", "--heads", "4"], ["--width", "multiple of --heads 4", "30"]),
    (["--position", "rotary", "--width", "12", "--heads", "4"], ["--position", "even", "12 / 4"]),
    (["--heads", "0"], ["--heads", "1 or more"]),
    (["--context", "1"], ["--context", "2 or more"]),
    (["--dropout", "1"], ["--dropout", "0 to 0.9"]),
    (["--beam", "0"], ["--beam", "1 or more"]),
    (["--workers", "0"], ["--workers", "1 or more"]),
    (["--workers", "65"], ["--workers", "at most --batch 64"]),
    (["--tokens", "foo"], ["--tokens", "foo", "choose from"]),
    ([], ["--data", "TAB"]),
    (["--data", "nowhere"], ["nowhere"]),
])
def test_wrong_flag_translation(flags, words):
    is_refused(lesson("translation.py", *flags), "translation.py", *words)


@old("translation.py")
def test_pairs_files(tmp_path):
    file, small = tmp_path / "pairs.tsv", SMALL
    good = "".join(f"le chat {n}\tthe cat {n} \u00e9\n" for n in range(30))
    for text, words in ((good + "no tab\n", ["line 31", "no tab"]), (good + "a\tb\tc\n", ["line 31"]),
                        (good + "\tb\n", ["line 31"]), ("a\tb\n", ["20 lines"]), ("", ["empty"])):
        file.write_text(text, encoding="utf-8")
        is_refused(lesson("translation.py", "--data", str(file), *small), "pairs.tsv", *words)
    file.write_text(good, encoding="utf-8")
    is_refused(lesson("translation.py", "--data", str(file), "--load", "nowhere.npz"), "--load nowhere.npz")
    is_refused(lesson("translation.py", "--data", str(file), "--save", "no/such/folder/a.npz"),
               "--save no/such/folder/a.npz")
    other = tmp_path / "test.tsv"
    other.write_text("un \u03b1\ta \u03b2\n" * 20, encoding="utf-8")       # characters never seen in training
    for flags in (["--tokens", "chars"], ["--tokens", "bpe"], ["--tokens", "chars", "--copy"], ["--copy", "--lower"]):
        done = lesson("translation.py", "--data", str(file), "--test", str(other), *flags, *small)
        assert done.returncode == 0 and re.search("result: task=pairs .*bleu=", done.stdout), done.stderr


@old("translation.py")
def test_resume_translation(needed, tmp_path):
    common, half = [*needed("translation.py"), "--steps", "12"], str(tmp_path / "half.npz")

    def last(*flags):
        done = lesson("translation.py", *common, *flags)
        assert done.returncode == 0, done.stderr
        return re.sub(r" (steps|seconds|examples_per_s)=\S+", "", done.stdout.splitlines()[-1])
    stop_at("translation.py", 5, *common, "--save", half)
    assert last("--load", half) == last()
    for flags, words in ((["--width", "24"], ["(", "24"]), (["--heads", "2"], ["heads"]), (["--layers", "3"], ["dec"])):
        is_refused(lesson("translation.py", *common, *flags, "--load", half), "half.npz", *words)


@old("translation.py")
def test_copying(needed):
    import translation as t
    cfg = t.Config(data=needed("translation.py")[1], tokens="chars", copy=True, width=8, heads=2, batch=4)
    rng = np.random.default_rng(0)
    params = {name: p + 0.5 * rng.standard_normal(p.shape) for name, p in t.init_params(cfg, rng, float).items()}
    source, target, _, *_ = t.make_batch(cfg, rng, float)
    z, _ = t.transformer_forward(params, source, target, cfg)                   # symbols, then places of the source
    p = np.exp(z - z.max(axis=1, keepdims=True))
    V = z.shape[1] - source.shape[1]
    for n in range(len(z)):
        for s, symbol in enumerate(source[n // target.shape[1]]):
            p[n, symbol] += p[n, V + s]
    p = p[:, :V] / p[:, :V].sum(axis=1, keepdims=True)
    memory, _ = t.side_forward(params, source, "enc", cfg, False)
    past = t.new_past(cfg)
    for k in range(target.shape[1]):                                            # token by token, with keys kept
        q = np.exp(t.next_scores(params, target[:, k:k + 1], cfg, past, memory, t.hide_padding(source, float), source))
        assert np.allclose(q / q.sum(axis=1, keepdims=True), p.reshape(*target.shape, V)[:, k], atol=1e-12)


@old("translation.py")
def test_bytes_come_back():
    import translation
    sample = "This is the house that Jack built. This is the malt that lay in the house that Jack built.\n" * 9
    text = sample + "na\u00efve \u4f60\u597d\u4e16\u754c \U0001f600\u200d\n\n  \t x\r\n_1 \x00 \u00a0!"
    for merges in (0, 30, 2000):
        words = translation.Vocabulary("", translation.learn_merges(sample, merges))
        ids = words.encode(text)
        assert words.decode(ids) == text and ids.max() < words.size
        assert words.decode(translation.Vocabulary("", words.merges).encode("\u00e9 \r\r\n")) == "\u00e9 \r\r\n"
    assert len(words.encode(sample)) < len(sample) / 2


@old("translation.py")
def test_scores():
    import translation
    a = ["The cat, 3.5 years old, sat on the mat.", "It's a well-known fact!"]       # as sacrebleu and rouge_score
    b = ["A cat of 3.5 years sat on the mat.", "It is a well-known fact!"]
    found = translation.pair_scores(a, b)
    for name, value in SCORES.items():
        assert abs(found[name] - value) < 1e-9
    assert translation.pair_scores(a, a)["bleu"] > 100 - 1e-9
    assert translation.pair_scores(["a b"], ["a b"])["bleu"] == 0


SCORES = {"bleu": 44.57810148157672, "rouge1": 81.66666666666667, "rouge2": 57.77777777777777,
          "rougeL": 81.66666666666667}


@old("translation.py")
def test_workers_of_translation(needed):
    def run(*flags):
        done = lesson("translation.py", *needed("translation.py"), "--steps", "10", "--dropout", "0.2", *flags)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return [float(v) for v in re.findall(r"step.*?loss (\d\S+)", done.stdout)]
    one = run()
    assert len(one) == 10 and np.allclose(one, run("--workers", "3"), atol=2e-4)


@old("cnn.py")
def test_mnist_files(tmp_path):
    name, task, path = "cnn.py", "mnist", tmp_path / "mnist"
    many = {"train_images_idx3": gzip.compress(idx([6000, 28, 28], bytes(6000 * 784))),
            "train_labels_idx1": gzip.compress(idx([6000], bytes(6000)))}
    ok = lesson(name, "--task", task, "--steps", "20", "--data", mnist_folder(path, **many))
    assert ok.returncode == 0 and ok.stdout.splitlines()[-1].startswith("result: task=" + task), ok.stderr
    is_refused(lesson(name, "--task", task), "--data")
    is_refused(lesson(name, "--task", task, "--data", "nowhere"), "nowhere", "train-images-idx3-ubyte.gz")
    for change, words in (
            (dict(train_images_idx3=many["train_images_idx3"][:-9]), ["train-images-idx3-ubyte.gz", "gzip"]),
            (dict(train_images_idx3=b"this is not gzip"), ["train-images-idx3-ubyte.gz", "gzip"]),
            (dict(train_images_idx3=gzip.compress(idx([6000, 28, 28], bytes(999)))), ["6000 x 28 x 28", "999"]),
            (dict(train_images_idx3=gzip.compress(b"")), ["IDX"]),
            (dict(train_labels_idx1=gzip.compress(idx([5], bytes(5)))), ["labels"])):
        is_refused(lesson(name, "--task", task, "--data", mnist_folder(path, **many | change)), *words)


LONG = {"vanilla_rnn.py": ["--task", "wave"], "attention.py": ["--task", "copy", "--attention", "none"],
        "seq2seq.py": ["--task", "reverse"], "nested_attention.py": ["--task", "recall"]}


def interrupted(name, line, *flags):
    """Ctrl-C after the first line of the output that matches -> the rest of it, seconds."""
    process = subprocess.Popen([sys.executable, "-W", "error", ROOT / name, *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for found in process.stdout:
        if re.search(line, found):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err and out.splitlines()[-1].startswith("result: "), err
    return out, time.perf_counter() - start


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", OLD)
def test_interrupt(name, needed):
    out, _ = interrupted(name, "chance level", *needed(name), *LONG.get(name, []), "--steps", "100000000")
    assert out.count("stopped after step") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", [name for name in OLD if name != "translation.py"])
def test_interrupted_demo(name):
    """One Ctrl-C ends the whole demo: nothing more is trained, and what was learned is shown."""
    out, seconds = interrupted(name, r"^step +\d+/")
    assert out.count("stopped after step") <= 1 and "\nstep " not in out.partition("stopped after")[2], out
    assert seconds < 25


@pytest.mark.skipif(os.name == "nt", reason="pipes")
@pytest.mark.parametrize("name", [name for name in OLD if name != "translation.py"])
def test_head_is_quiet(name):
    done = subprocess.run(f'"{sys.executable}" "{ROOT / name}" | head -3', shell=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 3 and not done.stderr


@pytest.mark.parametrize("name", OLD)
def test_ascii_console(name, needed):
    done = lesson(name, *needed(name), "--steps", "30", env=ASCII_CONSOLE)
    assert done.returncode == 0 and done.stdout.isascii() and "\r" not in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].startswith("result: task=")
    help_text = lesson(name, "--help", env=ASCII_CONSOLE).stdout
    assert "Break it" in help_text and "--seed" in help_text and "(default: 0)" in help_text


@pytest.mark.parametrize("name", OLD)
def test_same_seed_same_numbers(name, needed):
    def numbers():
        return without_times(lesson(name, *needed(name), "--steps", "50", "--seed", "3").stdout)
    assert numbers() == numbers() and len(numbers()) > 5
