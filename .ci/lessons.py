"""What the tests share: which lessons there are; how one is cut, loaded and run; data in miniature."""
import ast
import functools
import gzip
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MARKER = "# ==== A complete program ends here."
BUDGET = {      # lines of the spine, of the whole file (which is to aim at, not enforced)
    "perceptron": (250, 450), "mlp": (280, 850), "vanilla_rnn": (280, 620), "lstm": (300, 720),
    "seq2seq": (360, 680), "attention": (480, 950), "nested_attention": (440, 920),
    "cnn": (430, 1080), "transformer": (390, 1250), "translation": (480, 1000), "mae": (490, 1000),
    "autodiff": (360, 750), "vae": (420, 850), "gan": (380, 800), "diffusion": (450, 1100),
    "ssm": (450, 900), "moe": (400, 800), "faster": (400, 950), "lora": (460, 950),
    "rlhf": (460, 950), "gradcheck": (0, 1000)}
ASCII_CONSOLE = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}


def source(name):
    """The text of a lesson."""
    return (ROOT / name).read_text(encoding="utf-8")


LESSONS = sorted(p.name for p in ROOT.glob("*.py") if p.name != "gradcheck.py")
NEW = [name for name in LESSONS if f"\n{MARKER}" in source(name)]       # rebuilt: spine, then sections


def spine(name):
    """The text above the marker."""
    return source(name).partition(f"\n{MARKER}")[0].rstrip() + "\n"


@functools.lru_cache
def load(name):
    """A lesson as a module; its source may be anywhere."""
    module_spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    return module


def tasks(name):
    """The table TASKS of a rebuilt lesson; empty if it cannot be loaded, which test_house reports."""
    try:
        return load(name).TASKS
    except Exception:
        return {}


def comments(config):
    """The comment on every field of a Config class, those of its parents included."""
    found = {}
    for c in reversed(config.__mro__[:-1]):
        found.update(re.findall(r"^    (\w+): .*?  # (\S.*)$", inspect.getsource(c), re.M))
    return found


def pairs(*needed):
    """(lesson, task) for all tasks of rebuilt lessons whose Config has the needed fields."""
    return [(name, task) for name in NEW for task, row in tasks(name).items()
            if {f.name for f in fields(row.config)} >= set(needed)]


def lesson(name, *flags, **options):
    """Run a lesson, with warnings as errors -> CompletedProcess."""
    options = dict(capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL) | options
    return subprocess.run([sys.executable, "-W", "error", ROOT / name, *flags], **options)


def python(code, *flags, **options):
    """Run a piece of code in the folder of the lessons -> CompletedProcess."""
    options = dict(capture_output=True, text=True, timeout=300, cwd=ROOT) | options
    return subprocess.run([sys.executable, "-W", "error", "-c", code, *flags], **options)


def metrics(done):
    """A run that ended well -> the entries of its last line."""
    assert done.returncode == 0 and not done.stderr, done.stdout[-1000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("result: task="), last
    return dict(re.findall(r"(\S+)=(\S*)", last))


def is_refused(done, *words, status=2):
    """It ended with this status, one line on stderr, and these words in it."""
    assert done.returncode == status, done.stdout[-1000:] + done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    for word in words:
        assert word in done.stderr, done.stderr


def without_times(text):
    """The lines of an output, without what differs between two equal runs."""
    times = r"\| +[\d.]+ s\b.*|[.\d]+ ms|\S*speedup=\S+|\S*seconds=\S+|\S+_per_s=\S+"
    return [re.sub(times, "", line) for line in text.splitlines()]


def top_level(text):
    """Every statement of a file's top level -> {name: its text}, decorators included."""
    found, lines = {}, text.splitlines()
    for node in ast.parse(text).body:
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        name = getattr(node, "name", None) or type(node).__name__
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        found[name] = "\n".join(lines[first - 1:node.end_lineno])
    return found


# ---- data in miniature, in the format of its publisher -------------------------------------------

def idx(sizes, body):
    """The bytes of an IDX file."""
    sizes = [int(n).to_bytes(4, "big") for n in sizes]
    return b"\0\0\x08" + bytes([len(sizes)]) + b"".join(sizes) + body


def mnist_files(train=200, test=40):
    """{name: bytes} of an MNIST of random images."""
    rng, files = np.random.default_rng(0), {}
    for prefix, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx(images.shape, images.tobytes()))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels.shape, labels.tobytes()))
    return files


def mnist_folder(folder, **changes):
    """Write a miniature MNIST, some files replaced (train_images_idx3=bytes) -> its path."""
    folder.mkdir(exist_ok=True)
    changed = {name.replace("_", "-") + "-ubyte.gz": raw for name, raw in changes.items()}
    for name, raw in {**mnist_files(), **changed}.items():
        (folder / name).write_bytes(raw)
    return str(folder)


def cifar_folder(folder, **changes):
    """A miniature CIFAR-10 in its binary layout, some files replaced (None: left out) -> its folder."""
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).integers(0, 256, (20, 3073), np.uint8)
    rows[:, 0] = np.arange(20) % 10
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        file, raw = inner / f"{name}.bin", changes.get(name, rows.tobytes())
        if raw is not None:
            file.write_bytes(raw)
        elif file.exists():
            file.unlink()
    return inner


def cifar_archive(folder):
    """The same as the archive that is distributed -> its path."""
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(cifar_folder(folder), arcname="cifar-10-batches-bin")
    return str(path)


def words(n=100):
    """n names of characters a to z, one per line."""
    rng = np.random.default_rng(0)
    return "".join("".join(rng.choice(list("aeiklmnrstuz"), 3 + k % 5)) + "\n" for k in range(n))


def prose(n=40000):
    """n characters of sentences."""
    rng, subjects = np.random.default_rng(0), "The cat;A dog;My old hat;No one".split(";")
    parts = [f"{rng.choice(subjects)} ran {k} miles, or {k * k % 97}.\n" for k in range(n // 20)]
    return "".join(parts)[:n]


def sentence_pairs(n=200):
    """n lines of source TAB target."""
    return "".join(f"le chat {k} dort\tthe cat {k} sleeps\n" for k in range(n))


def data_for(task, folder):
    """A file or folder that --data of a task of this name reads -> its path."""
    if task in ("mnist", "pixels"):
        return mnist_folder(folder / "mnist")
    if task in ("cifar", "lr-sweep"):
        return cifar_archive(folder)
    path = folder / f"{task}.txt"
    path.write_text({"names": words, "text": prose, "pairs": sentence_pairs}[task](), "utf-8")
    return str(path)
