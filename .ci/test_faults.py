"""Faults that use brought to light, each with all of its kind, in the lessons that have a spine."""
import gzip
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from lessons import (NEW, ROOT, data_for, idx, is_refused, lesson, load, metrics, mnist_files,
                     mnist_folder, pairs, prose, python, tasks, without_times, words)

posix = pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
TEXTS = [(name, task) for name, task in pairs("data") if task in ("names", "text")]
DIGITS = [(name, task) for name, task in pairs("data") if task == "mnist"]


def small_config(name, task, folder, **changes):
    """The Config of a task, with one step and with data in miniature."""
    config = tasks(name)[task].config
    keys = {f.name for f in fields(config)}
    wanted = {"steps": 1, "data": data_for(task, folder) if "data" in keys else ""} | changes
    return config(**{key: value for key, value in wanted.items() if key in keys})


# ---- rules for what is typed, applied to configurations that the lesson derives ------------------

@pytest.mark.parametrize("name", NEW)
def test_values_are_checked_where_flags_are_read_only(name, monkeypatch, tmp_path, capsys):
    module, task = load(name), next(iter(tasks(name)))
    config = tasks(name)[task].config
    for f in fields(config):
        config(**{f.name: -1})                          # a program derives what it likes

    def fail(cfg):
        raise AssertionError("check was called by a run")
    monkeypatch.setattr(module, "check", fail)
    with np.errstate(over="ignore", invalid="ignore"):
        tasks(name)[task].main(small_config(name, task, tmp_path))
    text = capsys.readouterr().out
    assert "\nresult: task=" in text
    shades_stand_below_a_legend(text.splitlines())


def shades_stand_below_a_legend(lines):
    """A line before them says what dark or @ means, or what rows and columns are."""
    shades = [i for i, line in enumerate(lines) if re.search(r"[:=+*#%@]{4}", line)
              and not re.search(r"[a-z]{4}", line)]
    said = [i for i, line in enumerate(lines)
            if re.search(r"@|dark|shade|blank|a # is|\(#\)", line) and re.search(r"[a-z]{4}.*[a-z]{2}", line)]
    assert not shades or said and said[0] < shades[0], lines[shades[0]]


# ---- a console process with a source file taken for granted --------------------------------------

RUN = """import sys; sys.argv = [{path!r}, "--steps", "3"]
"""
WAYS = {    # what a notebook, an editor or a program does with a lesson
    "run_path": 'import runpy\nrunpy.run_path({path!r}, run_name="__main__")',
    "exec": 'text = READ\nexec(text.replace("steps: int = ", "steps: int = 3  # "), '
            '{{"__name__": "__main__"}})',
    "pasted into a cell": 'text = READ\n'
                          'sys.argv = ["/x/ipykernel_launcher.py", "-f", "kernel.json"]\n'
                          'exec(text.replace("steps: int = ", "steps: int = 3  # "), '
                          '{{"__name__": "__main__"}})',
    "pasted into another console": 'text = READ\n'
                                   'sys.argv = ["/x/pydevconsole.py", "--port=1"]\n'
                                   'exec(text.replace("steps: int = ", "steps: int = 3  # "), '
                                   '{{"__name__": "__main__"}})',
    "redirect_stdout": 'import contextlib, io, runpy\nout = io.StringIO()\n'
                       'with contextlib.redirect_stdout(out):\n'
                       '    runpy.run_path({path!r}, run_name="__main__")\n'
                       'print(out.getvalue(), end="")',
    "no stdout": 'import runpy\nout, sys.stdout = sys.stdout, None\n'
                 'runpy.run_path({path!r}, run_name="__main__")\nprint("result: task=", file=out)',
    "thread": 'import threading, runpy\n'
              'thread = threading.Thread(target=runpy.run_path, args=[{path!r}, None, "__main__"])\n'
              'thread.start(); thread.join()',
    "two threads": 'import threading, runpy\nspace = runpy.run_path({path!r})\n'
                   'cfg = space["Config"](steps=3)\n'
                   'threads = [threading.Thread(target=space["main"], args=[cfg]) for _ in "12"]\n'
                   '[t.start() for t in threads], [t.join() for t in threads]',
    "spine in a notebook": 'text = READ.partition("\\n# ==== A")[0]\n'
                           'space = {{"__name__": "cell"}}\nexec(text, space)\n'
                           'space["main"](space["Config"](steps=3))',
}


OF_MAIN = ("two threads", "no stdout", "spine in a notebook")   # the others are of run, which is one
SOME = ("mlp.py", "transformer.py", "vae.py")


@pytest.mark.parametrize("name, way", [(name, way) for name in NEW for way in WAYS
                                       if way in OF_MAIN or name in SOME])
def test_way_to_run(name, way):
    code = (RUN + WAYS[way]).replace("READ", "__import__('pathlib').Path({path!r}).read_text('utf-8')")
    done = python(code.format(path=str(ROOT / name)))
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    assert "result: task=" in done.stdout


@pytest.mark.parametrize("name", SOME)
def test_without_docstrings(name):
    done = subprocess.run([sys.executable, "-OO", ROOT / name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "Break it" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
@pytest.mark.parametrize("name", SOME)
def test_full_disk(name):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / name, "--steps", "3"], stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("module", ["cProfile", "trace --count --coverdir=FOLDER", ""])
@pytest.mark.parametrize("name", SOME)
def test_run_by_a_module(name, module, tmp_path):
    """python -m cProfile FILE, python -m trace ... FILE, python - < FILE."""
    how = ["-m", *module.replace("FOLDER", str(tmp_path)).split(), ROOT / name] if module else ["-"]
    done = subprocess.run([sys.executable, *how, "--steps", "3"], capture_output=True, text=True,
                          stdin=open(ROOT / name), timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    assert "\nresult: task=" in done.stdout and "steps=3" in done.stdout


# ---- a word that is no choice, a value of another type -------------------------------------------

@pytest.mark.parametrize("name, task", pairs())
def test_wrong_word_does_not_train(name, task, tmp_path):
    for f in fields(tasks(name)[task].config):
        if get_args(f.type):
            cfg = small_config(name, task, tmp_path, **{f.name: "no-such-choice"})
            with pytest.raises((KeyError, ValueError)), np.errstate(all="ignore"):
                tasks(name)[task].main(cfg)


# ---- what users' files hold ----------------------------------------------------------------------

def results(name, task, file, *flags):
    """The output of a short run on a file, without times and its name."""
    done = lesson(name, task, "--data", str(file), "--steps", "5", *flags)
    metrics(done)
    return [line.replace(str(file), "FILE") for line in without_times(done.stdout)]


@pytest.mark.parametrize("name, task", TEXTS)
def test_byte_order_mark_and_line_ends(name, task, tmp_path):
    plain = (words() if task == "names" else prose()).encode()
    outputs = []
    for kind, raw in (("plain", plain), ("mark", b"\xef\xbb\xbf" + plain),
                      ("windows", plain.replace(b"\n", b"\r\n")), ("no-end", plain.rstrip(b"\n"))):
        file = tmp_path / f"{kind}.txt"
        file.write_bytes(raw)
        outputs.append(results(name, task, file))
    assert outputs[0] == outputs[1] == outputs[2]
    assert task != "names" or outputs[0] == outputs[3]


@pytest.mark.parametrize("name, task", TEXTS)
def test_texts_of_any_kind(name, task, tmp_path):
    """No line break, capitals, digits, other alphabets; one character only."""
    file = tmp_path / "data.txt"
    texts = {"names": ["Anna\n" * 40, "\u4f60\u597d\u4e16\n\u754c\u4f60\n" * 30, "a b-c'd 1\n" * 40],
             "text": [prose().replace("\n", " "), "ab" * 20000, "\u4f60\u597d\u4e16\u754c " * 8000]}
    for text in texts[task]:
        file.write_text(text, "utf-8")
        assert results(name, task, file)


@pytest.mark.parametrize("name, task", TEXTS)
def test_texts_that_cannot_be_used(name, task, tmp_path):
    file = tmp_path / "data.txt"
    for raw, expected in (("Jos\xe9\n".encode("latin-1") * 99, ["UTF-8", "0xe9"]), (b"", ["empty"]),
                          (b"\n \n", ["empty"]), (b"ab\n", ["--data"]),
                          ("text".encode("utf-16"), ["UTF-8"])):
        file.write_bytes(raw)
        is_refused(lesson(name, task, "--data", str(file)), "data.txt", *expected)
    is_refused(lesson(name, task, "--data", "nowhere"), "nowhere")
    is_refused(lesson(name, task, "--data", str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("name, task", TEXTS)
def test_large_vocabulary(name, task, tmp_path):
    """The cost of a step grows with the batch, not with the number of different characters."""
    rng, file = np.random.default_rng(0), tmp_path / "data.txt"
    chars = [chr(0x4e00 + k) for k in range(3000)]
    text = "".join(chars) + "".join(rng.choice(chars, 30000))
    lines = "\n".join(text[k:k + 6] for k in range(0, len(text), 6))
    file.write_text(lines if task == "names" else text, "utf-8")
    before = sum(os.times()[2:4])
    metrics(lesson(name, task, "--data", str(file), "--steps", "10"))
    assert sum(os.times()[2:4]) - before < 20, "seconds of the processor"


# ---- MNIST and what has its format ---------------------------------------------------------------

@pytest.mark.parametrize("name, task", DIGITS)
@pytest.mark.parametrize("n", [20, 200, 5001])
def test_sets_of_any_size(name, task, n, tmp_path):
    """A tenth for validation."""
    for file, raw in mnist_files(n, 20).items():
        (tmp_path / file).write_bytes(raw)
    metrics(lesson(name, task, "--data", str(tmp_path), "--steps", "3"))
    train, _ = load(name).load_mnist(str(tmp_path))["train"]
    validation, _ = load(name).load_mnist(str(tmp_path))["validation"]
    assert len(train) + len(validation) == n and len(validation) == max(1, n // 10)


@pytest.mark.parametrize("name", sorted({name for name, _ in DIGITS}))
def test_names_that_mirrors_and_browsers_give(name, tmp_path):
    module, expected = load(name), load(name).load_mnist(mnist_folder(tmp_path / "0"))
    changes = {"unpacked": lambda file, raw: (file.removesuffix(".gz"), gzip.decompress(raw)),
               "by the browser": lambda file, raw: (file, gzip.decompress(raw)),
               "no suffix": lambda file, raw: (file.removesuffix(".gz"), raw),
               "dot": lambda file, raw: (file.replace("-idx", ".idx"), raw),
               "dot unpacked": lambda file, raw: (
                   file.replace("-idx", ".idx").removesuffix(".gz"), gzip.decompress(raw))}
    for kind, change in changes.items():
        (tmp_path / kind).mkdir()
        for file, raw in mnist_files().items():
            new, data = change(file, raw)
            (tmp_path / kind / new).write_bytes(data)
        found = module.load_mnist(str(tmp_path / kind))
        assert all(np.array_equal(a, b) for split in expected
                   for a, b in zip(expected[split], found[split])), kind


@pytest.mark.parametrize("name, task", DIGITS)
def test_mnist_files(name, task, tmp_path):
    """Damaged, of another format, or not there: one line that shows what is wrong."""
    good = mnist_files()
    whole = good["train-images-idx3-ubyte.gz"]

    def images(raw):
        return {"train_images_idx3": gzip.compress(raw)}
    for change, expected in (
            ({}, None), ({"train_images_idx3": whole[:-9]}, "train-images-idx3-ubyte.gz gzip"),
            ({"train_images_idx3": b"not gzip"}, "train-images-idx3-ubyte.gz IDX"),
            (images(idx([200, 28, 28], bytes(999))), "200 x 28 x 28 999"),
            (images(idx([200, 30, 28], bytes(200 * 840))), "28 x 28 (200, 30, 28)"),
            (images(b""), "IDX"), (images(b"\0\0\x0d\x03" + bytes(40)), "IDX"),
            (images(b"\0\0\x08"), "IDX"), (images(b"\0\0\x08\x03\0\0"), "IDX"),
            ({"train_labels_idx1": gzip.compress(idx([5], bytes(5)))}, "labels"),
            ({"train_labels_idx1": gzip.compress(idx([200], bytes(range(1, 27)) * 7 + bytes(18)))},
             "labels 26"),
            ({"t10k_labels_idx1": gzip.compress(idx([40], bytes([10] * 40)))}, "t10k labels 10")):
        folder = mnist_folder(tmp_path, **change)
        done = lesson(name, task, "--steps", "2", "--data", folder)
        if expected is None:
            assert metrics(done)["task"] == task
        else:
            is_refused(done, *expected.split())
    is_refused(lesson(name, task, "--data", "nowhere"), "nowhere", "train-images-idx3-ubyte.gz")


@pytest.mark.parametrize("name", sorted({name for name, _ in DIGITS}))
def test_flipped_bits(name, tmp_path):
    module, path = load(name), tmp_path / "file.gz"
    raw = gzip.compress(idx([20, 3], bytes(60)), mtime=0)
    for k in range(8 * len(raw)):
        path.write_bytes(raw[:k // 8] + bytes([raw[k // 8] ^ 1 << k % 8]) + raw[k // 8 + 1:])
        try:
            assert not module.read_idx(path).any() or k < 32, k     # a date, for example
        except module.InputError as error:
            assert "file.gz" in str(error)


# ---- sizes beyond memory -------------------------------------------------------------------------

@posix
@pytest.mark.parametrize("name, task", pairs("batch_size", "steps"))
def test_beyond_memory(name, task, tmp_path):
    """One line, and no traceback, with 3 GB of address space."""
    data = ["--data", data_for(task, tmp_path)] if (name, task) in pairs("data") else []
    command = [sys.executable, ROOT / name, task, *data, "--batch-size", "2000000000", "--steps", "1"]
    done = subprocess.run(["bash", "-c", 'ulimit -v 3000000; exec "$@"', "", *command], text=True,
                          capture_output=True, timeout=300)
    if done.returncode == 0 and "result:" in done.stdout:
        return                                          # the data are smaller than a batch
    assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1, done.stderr[-1000:]
    assert re.search("allocate|at most|batch-size", done.stderr), "what was wrong is not said"


# ---- the first and the last step -----------------------------------------------------------------

@pytest.mark.parametrize("name, task", pairs("steps", "lr"))
def test_every_step_learns(name, task):
    module = load(name)
    rates = [f for key, f in vars(module).items() if key in ("learning_rate", "scheduled_rate")]
    for steps in (1, 2, 10):
        cfg = tasks(name)[task].config(steps=steps)
        keys = {f.name: get_args(f.type) for f in fields(cfg)}
        for choice in keys.get("schedule", [None]):
            now = replace(cfg, schedule=choice) if choice else cfg
            for rate in rates:
                if {"warmup"} <= keys.keys() and (rate.__name__ != "scheduled_rate" or choice):
                    values = [rate(step, now) for step in range(1, steps + 1)]
                    assert min(values) > 0 and max(values) <= cfg.lr


# ---- files to save to ----------------------------------------------------------------------------

@pytest.mark.parametrize("name, task", pairs("save", "data"))
def test_save_onto_the_data(name, task, tmp_path):
    file = data_for(task, tmp_path)
    if os.path.isdir(file):                             # no file can take its place
        return is_refused(lesson(name, task, "--data", file, "--save", file, "--steps", "1"), "--save")
    before = open(file, "rb").read()
    same = os.path.join(os.path.dirname(file), ".", os.path.basename(file))
    for path in (file, same):
        is_refused(lesson(name, task, "--data", file, "--save", path, "--steps", "1"), "--save", "--data")
        assert open(file, "rb").read() == before


@pytest.mark.parametrize("name, task", pairs("save", "data"))
def test_save_onto_something_else(name, task, tmp_path):
    file = data_for(task, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    np.savez(tmp_path / "arrays.npz", mine=1)
    for path in (tmp_path / "notes.txt", tmp_path / "arrays.npz", Path(os.devnull)):
        before = path.read_bytes()
        is_refused(lesson(name, task, "--data", file, "--save", str(path), "--steps", "1"),
                   "--save", "a new file or one of --save")
        assert path.read_bytes() == before


@pytest.mark.parametrize("name, task", pairs("png"))
def test_png_onto_something_else(name, task, tmp_path):
    """Before any training, and a picture of before is replaced."""
    notes, module = tmp_path / "notes.txt", load(name)
    notes.write_text("mine")
    flags = ["--data", data_for(task, tmp_path)] if (name, task) in pairs("data") else []
    is_refused(lesson(name, task, *flags, "--png", str(notes)), "--png", "a new file or a PNG")
    is_refused(lesson(name, task, *flags, "--png", str(tmp_path / "none" / "a.png")), "--png", "a.png'")
    assert notes.read_text() == "mine"
    for path in (tmp_path / "a.png", tmp_path / "a.png"):
        module.try_png(str(path))
        module.write_png(str(path), np.zeros((2, 3, 3)))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted({name for name, _ in pairs("save")}))
def test_two_runs_with_one_save(name, tmp_path, monkeypatch):
    """Each has a temporary file of its own, and what arrives is whole."""
    module, opened, real = load(name), [], open

    def record(path, mode="r", *args, **kwargs):
        opened.append(str(path))
        return real(path, mode, *args, **kwargs)
    monkeypatch.setattr(module, "open", record, raising=False)
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        module.save_checkpoint(str(tmp_path / "a.npz"), {}, {"W": np.ones(3)}, {}, [1.0])
    assert len(set(opened)) == 2 and str(tmp_path / "a.npz") not in opened
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


# ---- what is typed holds, and a run says what was run --------------------------------------------

@pytest.mark.parametrize("name, task", pairs("steps"))
def test_result_line(name, task, tmp_path):
    """Keys once each, with values; the flags that differ from the defaults, and no others."""
    data = ["--data", data_for(task, tmp_path)] if (name, task) in pairs("data") else []
    config = tasks(name)[task].config()
    typed = [f for f in fields(config) if f.type in (int, float) and f.name not in ("steps", "layers")
             and f.name in ("lr", "seed", "batch_size", "weight_decay", "warmup", "grad_clip", "hidden")]
    flags, expected = [], {"steps": "2"}
    for f in typed:
        value = getattr(config, f.name) + 2 if f.type is int else getattr(config, f.name) * 0.5 + 1e-4
        expected[f.name] = f"{value:#.4g}" if f.type is float else str(value)
        flags += ["--" + f.name.replace("_", "-"), str(value)]
    done = lesson(name, task, "--steps", "2", *flags, *data)
    last = metrics(done)
    words_of_it = done.stdout.splitlines()[-1].split()[1:]
    assert all(re.fullmatch(r"[A-Za-z]\w*=\S+", word) for word in words_of_it), words_of_it
    assert len({word.partition("=")[0] for word in words_of_it}) == len(words_of_it)
    assert expected.items() <= last.items(), (expected, last)
    assert "seconds" in last
    if not hasattr(config, "epochs"):                   # which counts where there is data
        assert set(re.findall(r"^step +\d+/(\d+)", done.stdout, re.M)) in ({"2"}, {"1", "2"})


@pytest.mark.parametrize("name, task", pairs("steps"))
def test_default_that_is_typed(name, task, tmp_path):
    """A flag equal to its default changes nothing; the default of the first task is not imposed."""
    data = ["--data", data_for(task, tmp_path)] if (name, task) in pairs("data") else []
    module, config, first = load(name), tasks(name)[task].config(), load(name).Config()
    typed = [word for f in fields(config) if f.type in (int, float) and f.name != "steps"
             for word in ("--" + f.name.replace("_", "-"), str(getattr(config, f.name)))]
    plain = module.read_flags(tasks(name), [task, "--steps", "3", *data])
    assert plain == module.read_flags(tasks(name), [task, "--steps", "3", *typed, *data])
    steps = first.steps if hasattr(first, "steps") else config.steps
    _, cfg = module.read_flags(tasks(name), [task, "--steps", str(steps), *data])
    assert cfg.steps == steps, "it does not take the steps that were typed"
