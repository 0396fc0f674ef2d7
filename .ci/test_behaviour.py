"""What a reader meets who types something wrong, stops a run, or pipes it: one clear line, never a traceback."""
import gzip
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LESSONS = sorted(p.name for p in ROOT.glob("*.py") if p.name != "gradcheck.py")


def lesson(name, *flags, **options):
    """Run a lesson -> CompletedProcess."""
    return subprocess.run([sys.executable, "-W", "error", ROOT / name, *flags], capture_output=True, text=True,
                          timeout=120, **options)


def is_refused(done, *words):
    """Exit status 2, nothing but one line on stderr, and these words in it."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize("name", LESSONS)
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


@pytest.mark.parametrize("name", ["perceptron.py", "mlp.py", "vanilla_rnn.py", "lstm.py", "cnn.py", "transformer.py"])
def test_data_without_a_task_that_reads_it(name):
    is_refused(lesson(name, "--data", "nowhere"), name, "--data", "--task")


@pytest.mark.parametrize("flags, words", [
    (["--hidden", "0"], ["--hidden", "above 0", "'0'"]),
    (["--hidden", "8,,8"], ["--hidden", "8,,8"]),
    (["--hidden", "8,x"], ["--hidden", "8,x"]),
    (["--activation", "foo"], ["--activation", "foo", "choose from"]),
    (["--loss", "softmax", "--task", "gates"], ["--loss", "binary or mse"]),
    (["--group", "3", "--task", "names"], ["--group", "3"]),
    (["--group", "2", "--task", "names", "--hidden", "9"], ["--group", "--context 8"]),
    (["--group", "1", "--task", "names"], ["--group"]),
    (["--l2", "-1"], ["--l2", "0 or more"]),
])
def test_wrong_flag_mlp(flags, words):
    is_refused(lesson("mlp.py", *flags), "mlp.py", *words)


@pytest.mark.parametrize("flags, words", [
    (["--periods", "0"], ["--periods", "above 0"]),
    (["--periods", "1,x"], ["--periods", "1,x"]),
    (["--rule", "foo"], ["--rule", "foo", "choose from"]),
    (["--mu", "1"], ["--mu"]),
    (["--keys", "1"], ["--keys"]),
])
def test_wrong_flag_nested(flags, words):
    is_refused(lesson("nested_attention.py", *flags), "nested_attention.py", *words)


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


@pytest.mark.parametrize("flags, words", [
    (["--hidden", "0"], ["--hidden", "1 or more"]),
    (["--cell", "foo"], ["--cell", "foo", "choose from"]),
    (["--length", "0"], ["--length", "2 or more"]),
    (["--temperature", "0"], ["--temperature", "above 0"]),
    (["--task", "text", "--batch", "5000"], ["--batch", "at most"]),
    (["--task", "text", "--data", "nowhere"], ["nowhere"]),
    (["--task", "text", "--load", "nowhere.npz"], ["--load nowhere.npz"]),
    (["--task", "text", "--save", "no/such/folder/a.npz"], ["--save no/such/folder/a.npz"]),
])
def test_wrong_flag_lstm(flags, words):
    is_refused(lesson("lstm.py", *flags), "lstm.py", *words)


RESUME = [("vanilla_rnn.py", ["--task", "text", "--hidden", "16", "--steps", "30"]),
          ("vanilla_rnn.py", ["--task", "wave", "--hidden", "16", "--steps", "30"]),
          ("lstm.py", ["--task", "text", "--hidden", "16", "--steps", "30"]),
          ("lstm.py", ["--task", "reverse", "--hidden", "16", "--steps", "30"])]


@pytest.mark.parametrize("name, common", RESUME, ids=lambda value: value if isinstance(value, str) else value[1])
def test_resume_bit_for_bit(name, common, tmp_path):
    def figures(done):
        assert done.returncode == 0, done.stderr
        return re.sub(r"seconds=.*", "", done.stdout.splitlines()[-1])
    half, whole = str(tmp_path / "half.npz"), figures(lesson(name, *common))
    code = (f"import sys, {name[:-3]} as m; original = m.Progress.report\n"
            "def report(self, loss, note=str):\n    original(self, loss, note); self.stopped = self.step == 12\n"
            "m.Progress.report = report; m.run(m.main)")
    subprocess.run([sys.executable, "-c", code, *common, "--save", half], cwd=ROOT, check=True, capture_output=True)
    resumed = figures(lesson(name, *common, "--load", half))
    assert re.sub(r"steps=\S+", "", resumed) == re.sub(r"steps=\S+", "", whole)
    is_refused(lesson(name, *common, "--hidden", "17", "--load", half), "half.npz", "(", "17")
    raw = (tmp_path / "half.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(raw[:len(raw) // 2])
    is_refused(lesson(name, *common, "--load", str(tmp_path / "cut.npz")), "cut.npz")
    other = tmp_path / "other.txt"
    other.write_text("This is \u00e9trange. " * 100, encoding="utf-8")
    if "text" in common:
        is_refused(lesson(name, *common, "--load", half, "--data", str(other)), "half.npz", "characters")
        other.write_text("That house. " * 100, encoding="utf-8")            # fewer kinds of letters: that is fine
        assert lesson(name, *common, "--embed", "32", "--load", half, "--data", str(other)).returncode == 0


def test_load_of_another_cell(tmp_path):
    half, common = str(tmp_path / "half.npz"), ["--task", "text", "--hidden", "16", "--steps", "3"]
    assert lesson("lstm.py", *common, "--save", half).returncode == 0
    is_refused(lesson("lstm.py", *common, "--cell", "gru", "--load", half), "half.npz", "gru")
    is_refused(lesson("vanilla_rnn.py", *common, "--load", half), "half.npz")


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


def stop_at(name, step, *flags):
    """Run a lesson whose training stops after a step, as by Ctrl-C."""
    module = name.removesuffix(".py")
    code = (f"import sys, {module}; original = {module}.Progress.report\n"
            f"def report(self, loss, note=str):\n    original(self, loss, note); self.stopped = self.step == {step}\n"
            f"{module}.Progress.report = report; {module}.run({module}.main)")
    subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, check=True, capture_output=True)


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


ATTENTION = ["--task", "pairs", "--hidden", "16", "--embed", "8", "--steps", "40", "--batch", "16"]


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


def test_padding_changes_nothing():
    rng = np.random.default_rng(0)
    import seq2seq
    for task in ("reverse", "translate", "words"):
        cfg = seq2seq.Config(task=task, hidden=8, batch=16)
        params, batch = seq2seq.init_params(cfg, rng, np.float64), seq2seq.make_batch(cfg, rng, np.float64)
        (loss, grads), (loss2, grads2) = (seq2seq.loss_and_grads(params, b, cfg) for b in (
            batch, seq2seq.other_padding(batch)))
        assert abs(loss - loss2) < 1e-14 and all(np.abs(grads[k] - grads2[k]).max() < 1e-14 for k in grads)


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


def cifar_files(folder, **changes):
    """A tiny CIFAR-10 in its binary layout, some files replaced (None: left out) -> its folder."""
    (folder / "cifar-10-batches-bin").mkdir(exist_ok=True)
    rows = np.random.default_rng(0).integers(0, 256, (20, 3073), np.uint8)
    rows[:, 0] = np.arange(20) % 10
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        file, raw = folder / "cifar-10-batches-bin" / f"{name}.bin", changes.get(name, rows.tobytes())
        file.unlink() if raw is None and file.exists() else file.write_bytes(raw or b"")
    return folder / "cifar-10-batches-bin"


def test_cifar_files(tmp_path):
    small = ["--task", "cifar", "--channels", "2", "--steps", "2", "--batch", "8", "--data"]
    folder, archive = cifar_files(tmp_path), tmp_path / "cifar-10-binary.tar.gz"
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
        is_refused(lesson("cnn.py", *small, str(cifar_files(tmp_path, **changes))), *words)
    cut, other = tmp_path / "cut.tar.gz", tmp_path / "cifar-10-python.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-2000])
    with tarfile.open(other, "w:gz") as tar:
        tar.add(folder / "data_batch_1.bin", arcname="cifar-10-batches-py/data_batch_1")
    is_refused(lesson("cnn.py", *small, str(cut)), "cut.tar.gz", "cifar-10-binary.tar.gz")
    is_refused(lesson("cnn.py", *small, str(other)), "cifar-10-python.tar.gz", "data_batch_1.bin")
    cut.write_bytes(b"this is not an archive")
    is_refused(lesson("cnn.py", *small, str(cut)), "cut.tar.gz")


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


def test_mae_on_cifar(tmp_path):
    common = ["--task", "cifar", "--width", "8", "--layers", "1", "--steps", "12", "--batch", "8", "--warmup", "2"]
    folder, half, png = cifar_files(tmp_path), str(tmp_path / "half.npz"), tmp_path / "a.png"

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
    cut = cifar_files(tmp_path, data_batch_2=(folder / "test_batch.bin").read_bytes()[:-9])
    is_refused(lesson("mae.py", *common, "--data", str(cut)), "data_batch_2.bin", "3073")


def test_mae_sees_nothing_of_what_is_hidden():
    import mae
    rng = np.random.default_rng(0)
    for norm in (False, True):
        cfg = mae.Config(norm_pixels=norm, batch=5)
        params, (x, order) = mae.init_params(cfg, rng, np.float64), mae.make_batch(cfg, rng, np.float64)
        filled, known = mae.reconstruct(params, x, order, cfg)
        other, _ = mae.reconstruct(params, np.where(known > 0, x, rng.standard_normal(x.shape)), order, cfg)
        assert known.mean() == 0.25 and np.array_equal(filled, other)


def test_mae_in_several_processes():
    def losses(*flags):
        done = lesson("mae.py", "--steps", "20", *flags)
        assert done.returncode == 0, done.stderr
        return [float(loss) for loss in re.findall(r"loss (\d\S+)  \|", done.stdout)]
    assert np.allclose(losses(), losses("--workers", "2"), atol=2e-4) and len(losses()) == 10


def test_resume_cnn(tmp_path):
    def last(done):
        assert done.returncode == 0, done.stderr
        return re.findall(r"accuracy=\S+|step +\d+/30  loss \S+  validation \S+", done.stdout)[-4:]
    common = ["--steps", "30", "--channels", "2", "--optimizer", "momentum", "--dropout", "0.2", "--data",
              str(cifar_files(tmp_path)), "--task", "cifar", "--batch", "16"]
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


def test_workers_compute_the_same():
    one = losses("--slices", "3")
    assert len(one) == 10 and np.allclose(one, losses("--workers", "3"), atol=2e-4)
    none = losses("--norm", "none")                     # nothing depends on the other pictures of a slice
    assert np.allclose(none, losses("--norm", "none", "--workers", "2"), atol=2e-4)


def test_workers_where_there_is_no_shared_memory():
    code = ("import multiprocessing.context as context, cnn\n"
            "def refuse(*size): raise OSError('no shared memory')\n"
            "context.BaseContext.RawArray = refuse; cnn.run(cnn.main)")
    done = subprocess.run([sys.executable, "-c", code, "--workers", "2"], cwd=ROOT, capture_output=True, text=True)
    is_refused(done, "--workers 2", "no shared memory", "one process")


@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files")
def test_disk_full_before_training(tmp_path):
    done = subprocess.run(f'ulimit -f 200; "{sys.executable}" "{ROOT / "cnn.py"}" --save "{tmp_path / "a.npz"}"',
                          shell=True, capture_output=True, text=True)
    is_refused(done, "--save", "a.npz")
    assert "step" not in done.stdout                    # 200 blocks hold the parameters, but not the optimizer's state


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


@pytest.mark.parametrize("flags, words", [
    (["--width", "30", "--heads", "4"], ["--width", "multiple of --heads 4", "30"]),
    (["--position", "rotary", "--width", "12", "--heads", "4"], ["--position", "even", "12 / 4"]),
    (["--heads", "0"], ["--heads", "1 or more"]),
    (["--context", "1"], ["--context", "2 or more"]),
    (["--dropout", "1"], ["--dropout", "0 to 0.9"]),
    (["--test", "a.tsv"], ["--test", "--task pairs"]),
    (["--task", "text", "--copy"], ["--copy", "--task sort, reverse or pairs", "text"]),
    (["--masked", "0"], ["--masked"]),
    (["--patch", "5"], ["--patch", "divisor of 28"]),
    (["--beam", "0"], ["--beam", "1 or more"]),
    (["--top-k", "-1"], ["--top-k", "0 or more"]),
    (["--workers", "0"], ["--workers", "1 or more"]),
    (["--workers", "33"], ["--workers", "at most --batch 32"]),
    (["--model", "gpt", "--task", "sort"], ["--model gpt", "text", "sort"]),
    (["--model", "foo"], ["--model", "foo", "choose from"]),
    (["--save", "a.npz"], ["--save", "demo"]),
    (["--task", "text", "--prompt", "\u00e9t\u00e9"], ["--prompt", "characters of the text"]),
    (["--task", "text", "--context", "500"], ["--context 500", "tokens"]),
    (["--task", "letters", "--context", "500"], ["--context 500", "tokens"]),
    (["--task", "pairs"], ["--data", "TAB"]),
    (["--task", "pairs", "--data", "nowhere"], ["nowhere"]),
    (["--task", "sort", "--load", "nowhere.npz"], ["--load nowhere.npz"]),
    (["--task", "sort", "--save", "no/such/folder/a.npz"], ["--save no/such/folder/a.npz"]),
])
def test_wrong_flag_transformer(flags, words):
    is_refused(lesson("transformer.py", *flags), "transformer.py", *words)


def test_pairs_files(tmp_path):
    file, small = tmp_path / "pairs.tsv", ["--steps", "2", "--layers", "1", "--width", "8", "--merges", "20"]
    good = "".join(f"le chat {n}\tthe cat {n} \u00e9\n" for n in range(30))
    for text, words in ((good + "no tab\n", ["line 31", "no tab"]), (good + "a\tb\tc\n", ["line 31"]),
                        (good + "\tb\n", ["line 31"]), ("a\tb\n", ["20 lines"]), ("", ["empty"])):
        file.write_text(text, encoding="utf-8")
        is_refused(lesson("transformer.py", "--task", "pairs", "--data", str(file), *small), "pairs.tsv", *words)
    file.write_text(good, encoding="utf-8")
    other = tmp_path / "test.tsv"
    other.write_text("un \u03b1\ta \u03b2\n" * 20, encoding="utf-8")       # characters never seen in training
    for flags in (["--tokens", "chars"], ["--tokens", "bpe"], ["--tokens", "chars", "--copy"], ["--copy", "--lower"]):
        done = lesson("transformer.py", "--model", "seq2seq", "--data", str(file), "--test", str(other), *flags, *small)
        assert done.returncode == 0 and re.search("result: task=pairs .*bleu=", done.stdout), done.stderr


def test_copying():
    import transformer as t
    cfg = t.Config(task="sort", copy=True, width=8, heads=2, batch=4)
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
    done = lesson("transformer.py", "--task", "sort", "--copy", "--steps", "20")
    assert " padding=0.000 " in done.stdout, done.stdout + done.stderr


def test_generation():
    for flags in (["--position", "rotary"], ["--position", "alibi", "--norm", "rms"], ["--position", "sinusoidal"],
                  ["--order", "post", "--tokens", "bpe", "--merges", "50"]):
        done = lesson("transformer.py", "--task", "text", "--steps", "20", "--context", "32", "--sample", "100", *flags)
        assert "same=1.000" in done.stdout and " future=0.000 " in done.stdout, done.stdout + done.stderr


def test_bytes_come_back():
    import transformer
    text = transformer.RHYME + "na\u00efve \u4f60\u597d\u4e16\u754c \U0001f600\u200d\n\n  \t x\r\n_1 \x00 \u00a0!"
    for merges in (0, 30, 2000):
        words = transformer.Vocabulary("", transformer.learn_merges(transformer.RHYME, merges))
        ids = words.encode(text)
        assert words.decode(ids) == text and ids.max() < words.size
        assert words.decode(transformer.Vocabulary("", words.merges).encode("\u00e9 \r\r\n")) == "\u00e9 \r\r\n"
    assert len(words.encode(transformer.RHYME)) < len(transformer.RHYME) / 2


def test_scores():
    import transformer
    a = ["The cat, 3.5 years old, sat on the mat.", "It's a well-known fact!"]       # as sacrebleu and rouge_score
    b = ["A cat of 3.5 years sat on the mat.", "It is a well-known fact!"]
    found = transformer.pair_scores(a, b)
    for name, value in SCORES.items():
        assert abs(found[name] - value) < 1e-9
    assert transformer.pair_scores(a, a)["bleu"] > 100 - 1e-9 and transformer.pair_scores(["a b"], ["a b"])["bleu"] == 0


SCORES = {"bleu": 44.57810148157672, "rouge1": 81.66666666666667, "rouge2": 57.77777777777777,
          "rougeL": 81.66666666666667}


@pytest.mark.parametrize("task", ["text", "reverse", "letters"])
def test_workers_of_transformer(task):
    def run(*flags):
        done = lesson("transformer.py", "--task", task, "--steps", "10", "--dropout", "0.2", "--sample", "2", *flags)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return [float(v) for v in re.findall(r"step.*?loss (\d\S+)", done.stdout)]
    one = run()
    assert len(one) == 10 and np.allclose(one, run("--workers", "3"), atol=2e-4)


def test_resume_transformer(tmp_path):
    common = ["--task", "text", "--width", "16", "--steps", "30", "--dropout", "0.1", "--sample", "20"]

    def last(*flags):
        done = lesson("transformer.py", *common, *flags)
        assert done.returncode == 0, done.stderr
        return re.sub(r"speedup=.*|steps=\S+", "", done.stdout.splitlines()[-1])
    half = str(tmp_path / "half.npz")
    stop_at("transformer.py", 12, *common, "--save", half)
    assert last("--load", half) == last()
    for flags, words in ((["--width", "24"], ["(", "24"]), (["--heads", "2"], ["heads"]),
                         (["--layers", "3"], ["dec2"]), (["--position", "alibi"], ["position"])):
        is_refused(lesson("transformer.py", *common, *flags, "--load", half), "half.npz", *words)
    other = tmp_path / "other.txt"
    other.write_text("This is \u00e9trange. " * 100, encoding="utf-8")
    is_refused(lesson("transformer.py", *common, "--load", half, "--data", str(other)), "half.npz", "characters")


def idx(array_sizes, body):
    """The bytes of an IDX file."""
    return b"\0\0\x08" + bytes([len(array_sizes)]) + b"".join(n.to_bytes(4, "big") for n in array_sizes) + body


def mnist_folder(folder, **changes):
    """A tiny MNIST folder, some of its files replaced -> its path."""
    files = {"train-images-idx3-ubyte": idx([6000, 28, 28], bytes(6000 * 784)),
             "train-labels-idx1-ubyte": idx([6000], bytes(6000)),
             "t10k-images-idx3-ubyte": idx([20, 28, 28], bytes(20 * 784)),
             "t10k-labels-idx1-ubyte": idx([20], bytes(20))}
    files = {name + ".gz": gzip.compress(raw) for name, raw in files.items()}
    files.update({name.replace("_", "-") + "-ubyte.gz": raw for name, raw in changes.items()})
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return str(folder)


DIGITS = [("perceptron.py", "mnist"), ("mlp.py", "mnist"), ("cnn.py", "mnist"),
          ("transformer.py", "mnist")]


@pytest.mark.parametrize("name, task", DIGITS)
def test_mnist_files(name, task, tmp_path):
    ok = lesson(name, "--task", task, "--steps", "20", "--data", mnist_folder(tmp_path))
    assert ok.returncode == 0 and ok.stdout.splitlines()[-1].startswith("result: task=" + task), ok.stderr
    is_refused(lesson(name, "--task", task), "--data")
    is_refused(lesson(name, "--task", task, "--data", "nowhere"), "nowhere", "train-images-idx3-ubyte.gz")
    whole = gzip.compress(idx([6000, 28, 28], bytes(6000 * 784)))
    for change, words in (
            (dict(train_images_idx3=whole[:-9]), ["train-images-idx3-ubyte.gz", "gzip"]),
            (dict(train_images_idx3=b"this is not gzip"), ["train-images-idx3-ubyte.gz", "gzip"]),
            (dict(train_images_idx3=gzip.compress(idx([6000, 28, 28], bytes(999)))), ["6000 x 28 x 28", "999"]),
            (dict(train_images_idx3=gzip.compress(b"")), ["IDX"]),
            (dict(train_images_idx3=gzip.compress(b"\0\0\x0d\x03" + bytes(40))), ["IDX"]),
            (dict(train_images_idx3=gzip.compress(b"\0\0\x08\x03\0\0")), ["IDX"]),
            (dict(train_labels_idx1=gzip.compress(idx([5], bytes(5)))), ["labels"]),
            (dict(train_labels_idx1=gzip.compress(idx([6000], bytes([10] * 6000)))), ["labels"])):
        is_refused(lesson(name, "--task", task, "--data", mnist_folder(tmp_path, **change)), *words)


@pytest.mark.parametrize("name", ["perceptron.py", "mlp.py"])
def test_text_files(name, tmp_path):
    file = tmp_path / "names.txt"
    for raw, words in (("Jos\xe9\n".encode("latin-1"), ["UTF-8", "0xe9"]), (b"", ["empty"]), (b"\n \n", ["empty"]),
                       (b"anna\n", ["words"])):
        file.write_bytes(raw)
        is_refused(lesson(name, "--task", "names", "--data", str(file)), "names.txt", *words)
    is_refused(lesson(name, "--task", "names", "--data", "nowhere"), "nowhere")
    is_refused(lesson(name, "--task", "names", "--data", str(tmp_path)), str(tmp_path))
    file.write_text("\n".join(["jos\xe9", "\u03b1\u03b2\u03b3", "o'neil", "a.b"] * 20), encoding="utf-8")
    done = lesson(name, "--task", "names", "--data", str(file), "--steps", "50",
                  env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0 and done.stdout.isascii(), done.stderr


@pytest.mark.parametrize("name, flags", [
    ("perceptron.py", ["--task", "gates", "--lr", "1e300"]),
    ("mlp.py", ["--task", "spirals", "--loss", "mse", "--optimizer", "sgd", "--lr", "30"]),
])
def test_divergence_ends_in_one_sentence(name, flags):
    done = lesson(name, *flags)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(r"step \d+: training diverged; try a smaller --lr", done.stderr)


LONG = {name: ["--steps", "100000000"] for name in LESSONS}
LONG["perceptron.py"] = ["--task", "gates", "--steps", "100000000"]
LONG["mlp.py"] = ["--task", "xor", "--steps", "100000000"]
LONG["vanilla_rnn.py"] = ["--task", "wave", "--steps", "100000000"]
LONG["lstm.py"] = ["--task", "text", "--hidden", "16", "--steps", "100000000"]
LONG["attention.py"] = ["--task", "copy", "--attention", "none", "--steps", "100000000"]
LONG["seq2seq.py"] = ["--task", "reverse", "--steps", "100000000"]
LONG["transformer.py"] = ["--task", "text", "--sample", "5", "--steps", "100000000"]
LONG["nested_attention.py"] = ["--task", "recall", "--steps", "100000000"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", LESSONS)
def test_interrupt(name):
    def start():
        process = subprocess.Popen([sys.executable, "-W", "error", ROOT / name, *LONG[name]], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for line in process.stdout:
            if "chance level" in line:
                time.sleep(0.5)
                return process
    process = start()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err and out.count("stopped after step") == 1, err
    assert out.splitlines()[-1].startswith("result: ")


@pytest.mark.skipif(os.name == "nt", reason="pipes")
@pytest.mark.parametrize("name", LESSONS)
def test_head_is_quiet(name):
    done = subprocess.run(f'"{sys.executable}" "{ROOT / name}" | head -3', shell=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 3 and not done.stderr


@pytest.mark.parametrize("name", LESSONS)
def test_ascii_console(name):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = lesson(name, "--steps", "30", env=env)
    assert done.returncode == 0 and done.stdout.isascii() and "\r" not in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].startswith("result: task=")
    help_text = lesson(name, "--help", env=env).stdout
    assert "Break it" in help_text and "--seed" in help_text and "(default: 0)" in help_text


@pytest.mark.parametrize("name", LESSONS)
def test_same_seed_same_numbers(name):
    def numbers():
        lines = lesson(name, "--steps", "50", "--seed", "3").stdout.splitlines()
        times = r"\| +[\d.]+ s .*|[.\d]+ ms|speedup=\S+|seconds=\S+|examples_per_s=\S+"
        return [re.sub(times, "", line) for line in lines]
    assert numbers() == numbers()


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", LESSONS)
def test_interrupted_demo(name):
    """One Ctrl-C ends the whole demo: nothing more is trained, and what was learned is shown."""
    process = subprocess.Popen([sys.executable, "-W", "error", ROOT / name], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    for line in process.stdout:
        if re.match(r"step +\d+/", line):
            break
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err and out.splitlines()[-1].startswith("result: "), err
    assert out.count("stopped after step") <= 1 and "\nstep " not in out.partition("stopped after")[2], out
    assert time.perf_counter() - start < 25
