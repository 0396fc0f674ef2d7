"""What a reader meets who types something wrong, stops a run, pipes it or goes on with it: one clear
line, never a traceback. For the lessons that have a spine; the others are in test_old.py."""
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
from lessons import (ASCII_CONSOLE, NEW, ROOT, comments, data_for, is_refused, lesson, load, metrics, pairs,
                     python, tasks, without_times)

posix = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and limits of POSIX")
SMALL = {"batch_size": 8, "dim": 16, "layers": 2, "context": 16}       # and hidden, where it is int


def small(name, task):
    """Flags that make a model and its batches small."""
    found = [f for f in fields(tasks(name)[task].config)
             if f.type is int and f.name in {**SMALL, "hidden": 16}]
    return [word for f in found
            for word in ("--" + f.name.replace("_", "-"), str(SMALL.get(f.name, 16)))]


def data_flags(name, task, folder):
    """--data with data in miniature, for a task that reads any."""
    if (name, task) not in pairs("data"):
        return []
    folder = folder / "data"
    folder.mkdir(exist_ok=True)
    return ["--data", data_for(task, folder)]


# ---- flags ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("flags, expected", [
    (["--no-such-flag"], ["--no-such-flag"]), (["extra"], ["extra", "choose from"]),
    (["--lr", "abc"], ["--lr", "float", "abc"]), (["--lr", "0"], ["--lr", "above 0", "0.0"]),
    (["--lr", "nan"], ["--lr", "above 0", "nan"]), (["--steps", "0"], ["--steps", "1 or more"]),
    (["--steps", "1.5"], ["--steps", "int", "1.5"]), (["--seed", "-1"], ["--seed", "0 or more"]),
    (["--task", "names"], ["--task", "tasks are commands"]),
    (["--data", "nowhere"], ["--data"]), (["--ste", "3"], ["--ste"])])
def test_wrong_flag(name, flags, expected):
    is_refused(lesson(name, *flags), name, *expected)


@pytest.mark.parametrize("name", NEW)
def test_task_as_a_flag(name):
    """Whoever types a task as a flag, or behind the flags, is told what to type."""
    last = list(load(name).TASKS)[-1]
    for flags in (["--task", last], [f"--task={last}"], ["--seed", "1", last]):
        is_refused(lesson(name, *flags), name, f"tasks are commands: python {name} {last}")


@pytest.mark.parametrize("name, task", pairs())
def test_wrong_value_of_every_flag(name, task):
    """Refused where flags are read, whichever the flag; a default that was edited as well."""
    module, config = load(name), load(name).TASKS[task].config
    wrong = {int: ["abc", "1.5", "-3", "1" + 20 * "0"], float: ["abc", "nan", "inf", "-1"],
             str: [], bool: []}
    edited = {int: ["64", 1.5, None, True, -1], float: ["0.1", float("nan"), None, True, -1.0],
              str: [64, None], bool: ["yes", 1, None]}
    for f in fields(config):
        flag = "--" + f.name.replace("_", "-")
        for value in wrong.get(f.type, ["no-such-choice"]):
            with pytest.raises(module.InputError, match=flag):
                module.read_flags(module.TASKS, [task, flag, value])
        for value in edited.get(f.type, ["no-such-choice", None]):
            with pytest.raises(module.InputError, match=flag):
                module.check(replace(config(), **{f.name: value}))
        if f.name in ("steps", "batch_size", "layers", "heads", "dim", "context", "lr", "threads"):
            with pytest.raises(module.InputError, match=flag):
                module.read_flags(module.TASKS, [task, flag, "0"])




REFUSED = {     # values that do not go together, or are out of range: command, words of the answer
    "perceptron.py": [
        ("gates --inputs 4", "--inputs 2 3 4"), ("gates --inputs 1", "--inputs 2"),
        ("mnist", "--data MNIST"), ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz"),
        ("names --data nowhere", "nowhere"), ("names --data .", ".:")],
    "mlp.py": [
        ("points --hidden 0", "--hidden 0"), ("points --hidden 8,,8", "--hidden 8,,8"),
        ("points --batch-size 3", "--batch-size 4"), ("optimizers --batch-size 2", "--batch-size 4"),
        ("net --hidden 8,x", "--hidden 8,x"), ("net --l2 -1", "--l2 more"),
        ("gates --loss softmax", "--loss binary mse"), ("net --points gates --loss softmax", "--loss"),
        ("optimizers --hidden -8", "--hidden"), ("mnist --hidden 10.5", "--hidden 10.5"),
        ("names --fuse 3", "--fuse 3"), ("names --fuse 2 --context 9", "--fuse --context 9"),
        ("names --fuse 1", "--fuse 1"), ("names --data nowhere", "nowhere"),
        ("names --embed-dim 1", "--embed-dim 2"), ("inits --batch-size 1", "--batch-size 2"),
        ("names --hidden 8,", "--hidden"), ("mnist", "--data MNIST"),
        ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz")],
    "lstm.py": [
        ("add --length 1", "--length 2"), ("gradient --length 1", "--length 2"),
        ("text --threads 5", "--threads --batch-size 4"), ("text --data nowhere", "nowhere"),
        ("add --cell foo", "--cell foo")],
    "nested_attention.py": [
        ("recall --keys 1", "--keys 2"), ("rule --mu 1 --rule momentum", "--mu below 1"),
        ("rule --mu 0.5", "--mu --rule momentum"), ("rule --rule foo", "--rule foo"),
        ("rules --length 1", "--length 2"), ("memories --periods 0", "--periods"),
        ("memories --periods 1,x", "--periods 1,x"), ("memories --length 8", "--length 8.0"),
        ("inner --length 8", "--length --dim 8"), ("recall --junk 1", "--junk below 1")],
    "vanilla_rnn.py": [
        ("wave --length 1", "--length 2"), ("explode --radius -1", "--radius"),
        ("recall --window 0", "--window 1"), ("text --length 1", "--length 2"),
        ("text --threads 5", "--threads --batch-size 4"), ("text --data nowhere", "nowhere")],
    "mae.py": [
        ("shapes --patch-size 3", "--patch-size 16"), ("shapes --patch-size 0", "--patch-size"),
        ("shapes --dim 30", "--dim multiple --heads 4"), ("probe --mask-ratio 0", "--mask-ratio"),
        ("probe --mask-ratio 0.99", "--mask-ratio patch"), ("finetune --labels 0", "--labels"),
        ("finetune --threads 99", "--threads --batch-size"), ("cifar", "--data"), ("mnist", "--data"),
        ("cifar --data nowhere", "nowhere cifar-10-binary.tar.gz"), ("cifar --crop 32", "--crop 32"),
        ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz")],
    "seq2seq.py": [
        ("reverse --length 1", "--length 2"), ("letters --length 1", "--length 2"),
        ("letters --teacher-forcing 1.5", "--teacher-forcing 1"), ("words --length 7", "--length 6"),
        ("lengths --length 1", "--length 2")],
    "attention.py": [
        ("reverse --hidden 7", "--hidden even 7"), ("reverse --length 1", "--length 2"),
        ("copy --length 0", "--length 1"), ("copy --length 1", "--length 2"),
        ("lengths --hidden 7", "--hidden even"), ("dates --hidden 7", "--hidden even"),
        ("reverse --score foo", "--score foo"), ("pairs --hidden 7", "--hidden even"),
        ("pairs --threads 99", "--threads --batch-size"), ("pairs --data nowhere", "nowhere")],
    "vae.py": [
        ("shapes --latent 0", "--latent 1"), ("shapes --beta -1", "--beta more"),
        ("sweep --beta -1", "--beta more"), ("compare --draws 0", "--draws 1"),
        ("mnist", "--data"), ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz")],
    "translation.py": [
        ("headlines --dim 12", "--dim even --heads 4"), ("headlines --dropout 1", "--dropout below"),
        ("headlines --label-smoothing 1", "--label-smoothing below"), ("pairs --context 8", "--context 16"),
        ("pairs --threads 99", "--threads --batch-size"), ("pairs --data nowhere", "nowhere"),
        ("pairs --unit foo", "--unit foo"), ("pairs --beam 0", "--beam 1"),
        ("pairs --load nowhere.npz", "--load nowhere.npz")],
    "rlhf.py": [
        ("leash --dim 9", "--dim multiple --heads 2 9"), ("leash --betas 0,x", "--betas 0,x"),
        ("reward --betas -1", "--betas"), ("best --heads 3", "--dim --heads 3"),
        ("comparisons --heads 5", "--dim --heads 5"),
        ("dpo --heads 3", "--dim --heads 3"), ("grpo --dim 31", "--dim 31"),
        ("grpo --reuse 0", "--reuse 1")],
    "gan.py": [
        ("ring --beta1 1", "--beta1 below 1"), ("game --beta2 1.5", "--beta2 below 1"),
        ("game --loss foo", "--loss foo"), ("shapes --constraint foo", "--constraint foo"),
        ("shapes --critic-steps 0", "--critic-steps 1"), ("shapes --beta1 2", "--beta1 below 1")],
    "cnn.py": [
        ("shapes --size 12", "--size multiple 12"), ("net --crop 16", "--crop 16"),
        ("net --dropout 1", "--dropout"), ("net --label-smoothing 1", "--label-smoothing"),
        ("net --threads 99", "--threads --batch-size"), ("net --warmup-fraction 1", "--warmup-fraction"),
        ("net --model foo", "--model foo"), ("resnet18 --channels 0", "--channels"),
        ("lr-sweep --threads 999", "--threads --batch-size"), ("lr-sweep --data nowhere", "nowhere"),
        ("mnist --crop 32", "--crop 32"), ("mnist", "--data"), ("cifar", "--data"),
        ("cifar --dropout 1", "--dropout"), ("cifar --data nowhere", "nowhere cifar-10-binary.tar.gz"),
        ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz")],
    "transformer.py": [
        ("rhyme --dim 30", "--dim multiple --heads 4 30"), ("generate --context 1", "--context 2"),
        ("rhyme --context 500", "--context 500"), ("modern --dim 12", "--dim even 3.0"),
        ("positions --dim 30", "--dim --heads 4"), ("positions --dim 12", "--dim even"),
        ("fill --mask-ratio 0", "--mask-ratio"), ("fill --mask-ratio 1", "--mask-ratio"),
        ("mnist --dim 30", "--dim multiple --heads 4 30"),
        ("mnist", "--data MNIST"), ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz"),
        ("reverse --dim 30", "--dim --heads 4"), ("sort --dim 30", "--dim --heads 4"),
        ("text --threads 99", "--threads --batch-size"), ("text --data nowhere", "nowhere"),
        ("text --heads 3", "--dim --heads 3")],
    "autodiff.py": [
        ("xor --hidden 0", "--hidden 1"), ("tape --steps 3", "--steps"), ("tape --layers 0", "--layers 1"),
        ("tape --batch-size 0", "--batch-size 1"), ("mnist --dim 0", "--dim"), ("mnist", "--data MNIST"),
        ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz")],
    "faster.py": [
        ("repeat --dim 30 --heads 4", "--dim multiple --heads 4 30"), ("repeat --context 1", "--context 2"),
        ("text --dim 30", "--dim multiple --heads 4"), ("text --context 16", "--context 32"),
        ("text --data nowhere", "nowhere"), ("lengths --length 0", "--length 1"),
        ("patterns --tiles 0", "--tiles 1"), ("exact --drafts 0", "--drafts 1")],
    "diffusion.py": [
        ("shapes --channels 12", "--channels multiple 12"), ("shapes --target foo", "--target foo"),
        ("targets --target foo", "--target foo"), ("pixels --channels 12", "--channels multiple 12"),
        ("latent --samples 9", "--samples 10"), ("mnist --samples 9", "--samples 10"),
        ("shapes --no-label 2", "--no-label from 0 to 1"),
        ("pixels", "--data MNIST"), ("pixels --data nowhere", "nowhere train-images-idx3-ubyte.gz"),
        ("mnist", "--data MNIST"), ("mnist --data nowhere", "nowhere train-images-idx3-ubyte.gz")],
    "lora.py": [
        ("adapt --dim 50", "--dim multiple --heads 4 50"), ("adapt --rank 0", "--rank 1"),
        ("qlora --alpha 0", "--alpha above 0"),
        ("ranks --old 1", "--old below 1"), ("ranks --dim 30", "--dim multiple"),
        ("quantize --dim 30", "--dim multiple"), ("quantize --rank 4", "--rank"),
        ("qlora --heads 5", "--dim multiple --heads 5"), ("speed --repeats 0", "--repeats 1")],
    "moe.py": [
        ("facts --experts 0", "--experts 1"), ("facts --balance -1", "--balance more"),
        ("routes --bias-rate -1", "--bias-rate more"), ("time --repeats 0", "--repeats 1"),
        ("text --context 0", "--context 1"), ("text", "--data"), ("text --data nowhere", "nowhere")],
    "ssm.py": [
        ("induction --length 2", "--length 3"), ("lengths --kernel 0", "--kernel 1"),
        ("copy --length 2", "--length 3"), ("scan --length 1", "--length 3"), ("text --length 2", "--length 3"),
        ("text", "--data"), ("text --data nowhere", "nowhere"), ("text --states 0", "--states 1")],
}


@pytest.mark.parametrize("name, command, expected", [
    (name, *row) for name in NEW for row in REFUSED.get(name, [])])
def test_what_does_not_go_together(name, command, expected, tmp_path):
    data = {"MNIST": "mnist", "NAMES": "names", "TEXT": "text"}
    flags = [data_for(data[w], tmp_path) if w in data else w for w in command.split()]
    is_refused(lesson(name, *flags), name, *expected.split())


@pytest.mark.parametrize("name", NEW)
def test_every_constraint_is_tried(name):
    constrained = {c.__name__ for c in load(name).CONSTRAINTS}
    commands = [row[0].split()[0] for row in REFUSED.get(name, [])]
    assert constrained <= {tasks(name)[task].config.__name__ for task in commands}


@pytest.mark.parametrize("name, task", pairs())
def test_help(name, task, capsys):
    """--help lists the task; TASK --help every flag with its comment and the default that is used."""
    module, config = load(name), tasks(name)[task].config
    for argv in (["--help"], [task, "--help"]):
        with pytest.raises(SystemExit) as ended:
            module.read_flags(module.TASKS, argv)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert module.__doc__.strip() in out and module.MORE.strip() in out
    assert re.search(rf"^    {task}\s+\S", out, re.M), "the task has no line"
    help_text = "".join(out.partition(module.MORE.strip())[2].split())
    for f in fields(config):
        line = f"{comments(config)[f.name]} (default: {f.default!r})"
        assert "".join(line.split()) in help_text, f.name
        assert f"--{f.name.replace('_', '-')}" in help_text
    assert module.read_flags(module.TASKS, [task]) == (task, config())


@pytest.mark.parametrize("name, task", pairs("steps"))
def test_every_flag_is_used(name, task, monkeypatch, tmp_path):
    """A flag that a task does not use does not exist for it."""
    used, config = set(), tasks(name)[task].config

    class Spy(config):
        def __getattribute__(self, key):
            frame = sys._getframe(1)
            if frame.f_globals["__name__"] != "dataclasses" and frame.f_code.co_name not in (
                    "print_result", "<dictcomp>"):
                used.add(key)
            return super().__getattribute__(key)
    keys = {f.name for f in fields(config)}
    cfg = Spy(steps=1)
    cfg = replace(cfg, data=data_for(task, tmp_path)) if "data" in keys else cfg
    cfg = replace(cfg, finetune=True) if "finetune" in keys else cfg
    cfg = replace(cfg, timesteps=10) if "timesteps" in keys else cfg
    with np.errstate(over="ignore"):
        tasks(name)[task].main(cfg)
    assert "__dict__" in used or not keys - used


# ---- checkpoints ---------------------------------------------------------------------------------

STOP = """import signal, sys, {module} as m
signal.signal(signal.SIGINT, signal.default_int_handler)
original = m.progress
def progress(*args, **kwargs):
    for step in original(*args, **kwargs):
        for _ in range({times} if step == {step} else 0):
            signal.raise_signal(signal.SIGINT)
        yield step
m.progress = progress
sys.argv[0] = "{module}.py"
m.run(m.TASKS)"""


def stopped(name, step, *flags, times=1):
    """Run a lesson in which Ctrl-C comes, once or twice, while a step is computed."""
    return python(STOP.format(module=name.removesuffix(".py"), step=step, times=times), *flags)


def outcome(done):
    """What a run prints after its training, without times and the names of checkpoints."""
    metrics(done)
    lines = without_times(done.stdout)
    last = max((i for i, line in enumerate(lines) if line.startswith("step ")), default=-1)
    return [re.sub(r" (save|load)=\S+", "", line) for line in lines[last + 1:]]


@posix
@pytest.mark.parametrize("name, task", pairs("save", "load"))
def test_resume_bit_for_bit(name, task, tmp_path):
    """Stopped by Ctrl-C and resumed: the same as never stopped. What does not agree is refused."""
    common = [task, *small(name, task), *data_flags(name, task, tmp_path), "--steps", "14"]
    half, module = tmp_path / "half.npz", load(name)
    whole = outcome(lesson(name, *common))
    done = stopped(name, 5, *common, "--save", str(half))
    assert done.returncode == 0 and "stopped after step 5;" in done.stdout, done.stderr
    resumed = lesson(name, *common, "--load", str(half), "--save", str(tmp_path / "end.npz"))
    assert outcome(resumed) == whole and "after 5 steps" in resumed.stdout
    ended = lesson(name, *common, "--load", str(tmp_path / "end.npz"))
    assert outcome(ended)[-1] == whole[-1], "a training that is at its end already"
    assert {p.name for p in tmp_path.iterdir()} - {"data"} == {"end.npz", "half.npz"}
    for f in fields(module.TASKS[task].config):
        if f.type is int and f.name in ("hidden", "dim", "layers", "embed_dim"):
            flags = [*common, "--" + f.name.replace("_", "-"), "32", "--load", str(half)]
            is_refused(lesson(name, *flags), "half.npz")
    for other in tasks(name):
        if other != task and (name, other) in pairs("save", "load"):
            data = data_flags(name, other, tmp_path)
            is_refused(lesson(name, other, *data, "--steps", "3", "--load", str(half)), "half.npz")


@pytest.mark.parametrize("name", sorted({name for name, _ in pairs("load")}))
def test_damaged_checkpoint(name, tmp_path):
    module, path = load(name), tmp_path / "a.npz"
    params = {"W": np.arange(6.0).reshape(2, 3)}
    module.save_checkpoint(str(path), {"task": "x"}, params, {"t": 3}, [1.5, 1.25])
    raw = path.read_bytes()
    arrays = dict(np.load(path))

    def is_read():
        found, state, losses = {"W": np.zeros((2, 3))}, {}, []
        module.load_checkpoint(str(path), {"task": "x"}, found, state, losses)
        assert state in ({"t": 3}, {})                  # a zip does not protect its directory
        return np.array_equal(found["W"], params["W"]) and losses == [1.5, 1.25]
    assert is_read()
    for meta, found in (({"task": "y"}, params), ({"task": "x"}, {"W": np.zeros((3, 3))}),
                        ({"task": "x"}, {"W": params["W"], "b": np.zeros(3)}), ({"task": "x"}, {})):
        with pytest.raises(module.InputError, match="a.npz"):
            module.load_checkpoint(str(path), meta, dict(found), {}, [])
    damaged = [b"", b"PK", raw[:20], raw[:len(raw) // 2], raw[:-3], b"some text\n", raw[200:]]
    for k in range(len(raw)):                           # one flipped bit
        damaged.append(raw[:k] + bytes([raw[k] ^ 1 << k % 8]) + raw[k + 1:])
    for data in damaged:
        path.write_bytes(data)
        try:
            assert is_read()                            # a bit that holds a date, for example
        except module.InputError as error:
            assert "a.npz" in str(error)
    for change in (dict(meta=None), dict(losses=None), dict(meta="[]"), dict(meta="no JSON"),
                   dict(losses=np.array(["a", None], object)), {"params W": None}):
        kept = {k: v for k, v in {**arrays, **change}.items() if v is not None}
        np.savez(path, **kept)
        with pytest.raises(module.InputError, match="a.npz"):
            is_read()
    for wrong in (tmp_path, tmp_path / "nowhere.npz"):
        with pytest.raises(module.InputError, match=str(wrong)):
            module.load_checkpoint(str(wrong), {}, {}, {}, [])


@pytest.mark.parametrize("name, task", pairs("save", "load"))
def test_checkpoint_that_cannot_be_written(name, task, tmp_path):
    """Found out before the training."""
    common = [task, *data_flags(name, task, tmp_path), "--steps", "3"]
    for where in ("no/such/folder/a.npz", str(tmp_path)):
        done = lesson(name, *common, "--save", where)
        is_refused(done, f"--save {where}")
        assert not re.search("^step ", done.stdout, re.M)
    is_refused(lesson(name, *common, "--load", "nowhere.npz"), "--load nowhere.npz")
    if os.name != "nt":                                 # the disk is full
        done = subprocess.run(["bash", "-c", 'ulimit -f 1; exec "$@"', "", sys.executable, ROOT / name,
                               *common, "--save", tmp_path / "a.npz"], capture_output=True, text=True)
        is_refused(done, "--save", "a.npz")
        assert not re.search("^step ", done.stdout, re.M)
        assert {p.name for p in tmp_path.iterdir()} <= {"data"}


# ---- ends of a run -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, task", pairs("lr", "steps"))
def test_divergence(name, task, tmp_path):
    """One sentence, status 1, nothing drawn, and no checkpoint over a good one."""
    flags, file = [task, "--lr", "1e39", "--steps", "1"], tmp_path / "a.npz"
    flags += data_flags(name, task, tmp_path)
    if (name, task) in pairs("save"):
        np.savez(file, meta="{}", good=1)
        good = file.read_bytes()
        flags += ["--save", str(file)]
    done = lesson(name, *flags)
    is_refused(done, name, "diverged", "rate", status=1)
    after = done.stdout.rpartition("chance level")[2]   # a picture of the data may stand before
    assert "result:" not in after and "@@" not in after
    assert not file.exists() or file.read_bytes() == good
    assert not list(tmp_path.glob("a.npz.*"))


@pytest.mark.parametrize("name, task", pairs("lr", "steps"))
def test_same_seed_same_numbers(name, task, tmp_path):
    data = data_flags(name, task, tmp_path)
    few = ["--timesteps", "10"] * ((name, task) in pairs("timesteps"))      # samples cost most

    def numbers(*flags):
        done = lesson(name, task, "--steps", "4", *data, *few, *flags)
        metrics(done)
        lines = without_times(done.stdout)
        return [re.sub(r" (lr|seed)=\S+", "", line) for line in lines]
    once = numbers("--seed", "3")
    assert once == numbers("--seed", "3")
    if task == next(iter(tasks(name))):                 # the others have the same train
        assert once != numbers("--seed", "4"), "the seed has no effect"
        assert once != numbers("--seed", "3", "--lr", "3e-2"), "the learning rate has no effect"


@pytest.mark.parametrize("name", NEW)
def test_ascii_console(name):
    done = lesson(name, "--steps", "30", env=ASCII_CONSOLE)
    assert done.stdout.isascii() and "\r" not in done.stdout and metrics(done)["seed"] == "0"
    done = lesson(name, "--help", env=ASCII_CONSOLE)
    assert done.returncode == 0 and "Break it" in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize("name, task", pairs("data"))
def test_text_beyond_ascii(name, task, tmp_path):
    if task in ("mnist", "pixels", "cifar", "lr-sweep"):
        return
    file, change = tmp_path / "other.txt", {"e": "\xe9", "a": "\u03b1", "n": "\u4f60"}
    text = Path(data_for(task, tmp_path)).read_text("utf-8")
    file.write_text("".join(change.get(c, c) for c in text), "utf-8")
    done = lesson(name, task, "--data", str(file), "--steps", "20", env=ASCII_CONSOLE)
    assert metrics(done) and done.stdout.isascii()


@posix
@pytest.mark.parametrize("name, task", pairs("steps"))
def test_interrupt(name, task, tmp_path):
    """The first Ctrl-C ends all training, and what was learned is shown; the second ends the run."""
    data = data_flags(name, task, tmp_path)
    long = ["--epochs", "100000000"] if (name, task) in pairs("epochs") else []
    command = [sys.executable, "-W", "error", ROOT / name, task, "--steps", "100000000", *long, *data]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    threading.Timer(90, process.kill).start()
    for line in process.stdout:
        if "chance level" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err and out.count("stopped after step") == 1, out + err
    assert out.splitlines()[-1].startswith("result: ") and "\nNext: " in out
    assert "\nstep " not in out.partition("stopped after")[2], "it goes on training"
    assert time.perf_counter() - start < 40
    done = stopped(name, 3, task, *long, *data, times=2)
    assert done.returncode == 130 and not done.stderr, done.stderr
    assert "result:" not in done.stdout


@posix
@pytest.mark.parametrize("name", NEW)
def test_head_is_quiet(name):
    done = subprocess.run(f'"{sys.executable}" "{ROOT / name}" | head -3', shell=True, text=True,
                          capture_output=True)
    assert len(done.stdout.splitlines()) == 3 and not done.stderr


# ---- threads -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, task", pairs("threads"))
def test_threads_change_no_gradient(name, task, monkeypatch):
    """In float64: the weighted sum over micro-batches is the gradient of the whole batch."""
    from concurrent.futures import ThreadPoolExecutor
    module, row = load(name), load(name).TASKS[task]
    if row.init_params is None:
        pytest.skip("the model of another task")
    cfg, rng = row.config(threads=3, batch_size=7), np.random.default_rng(0)
    if "norm" in vars(cfg):                             # statistics are those of a micro-batch
        cfg = replace(cfg, norm="none")
    params, batch = row.init_params(cfg, rng, np.float64), row.make_batch(cfg, 1, np.float64)
    loss, grads, *_ = row.loss_and_grads(params, batch, cfg)
    threaded, more = vars(module).get("threaded_loss_and_grads"), []
    if "threaded_with_statistics" in vars(module):
        threaded, more = module.threaded_with_statistics, [{}]
    if threaded is None:                                # it carries hidden states as well
        pytest.skip("see test_threads_change_no_result")
    with ThreadPoolExecutor(3) as pool:
        again, same, *_ = threaded(row.loss_and_grads, pool, params, batch, cfg, *more)
    assert abs(loss - again) < 1e-12 and same.keys() == grads.keys()
    assert all(np.allclose(g, same[key], rtol=0, atol=1e-10) for key, g in grads.items())


@pytest.mark.parametrize("name, task", pairs("threads", "steps"))
def test_threads_change_no_result(name, task, tmp_path):
    data, names = data_flags(name, task, tmp_path), {f.name for f in fields(tasks(name)[task].config)}
    data += ["--norm", "none"] if "norm" in names else []
    if task == "lr-sweep":
        pytest.skip("the net of another task, with statistics of micro-batches")

    def losses(n):
        done = lesson(name, task, *data, "--batch-size", "7", "--steps", "4", "--threads", n)
        assert metrics(done)
        return [float(loss) for loss in re.findall(r"mean loss (\S+)", done.stdout)]
    assert len(losses("1")) >= 4 and np.allclose(losses("1"), losses("3"), rtol=2e-3)


def choices(name, task):
    """(field, choice) of every Literal of a task."""
    return [(f.name, choice) for f in fields(tasks(name)[task].config)
            for choice in get_args(f.type)]


@pytest.mark.parametrize("name, task", [p for p in pairs("steps") if choices(*p)])
def test_every_choice(name, task, tmp_path):
    """Each choice of each Literal runs, one at a time, unless the flags' check refuses it."""
    data = data_flags(name, task, tmp_path)
    ran = 0
    for field, choice in choices(name, task):
        flags = [task, "--" + field.replace("_", "-"), str(choice), "--steps", "2", *data]
        done = lesson(name, *flags)
        if done.returncode == 2:
            is_refused(done, "--")
        else:
            default = getattr(tasks(name)[task].config(), field)
            assert choice == default or metrics(done)[field] == str(choice)
            ran += 1
    assert ran > len(choices(name, task)) / 2
