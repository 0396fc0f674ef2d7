"""Every command that a docstring, MORE, a comment, a run or the README prints really runs."""
import ast
import io
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from dataclasses import fields

import pytest
from lessons import (LESSONS, NEW, ROOT, cifar_archive, is_refused, load, metrics, mnist_folder, pairs,
                     prose, sentence_pairs, source, tasks, words)

WORD = r"""(?:"[^"\n]*"|[^\s|()`#;"'\\]*[^\s|()`#;"'\\,.:])"""       # its last character is no comma
COMMAND = re.compile(rf"(?<![\w/])python (?=(\w+\.py(?: (?!---){WORD})*))")


def texts(name):
    """All strings and comments of a lesson, or the README as it is."""
    if name == "README.md":
        return [re.sub(r"`(?:python )?(\w+\.py[^`]*)`", r"`python \1`", source(name))]
    nodes = list(ast.walk(ast.parse(source(name))))
    pieces = {id(v) for node in nodes if isinstance(node, ast.JoinedStr) for v in node.values}
    return [ast.unparse(node) if isinstance(node, ast.JoinedStr) else node.value for node in nodes
            if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant)
            and isinstance(node.value, str) and id(node) not in pieces] + [
        token.string for token in tokenize.generate_tokens(io.StringIO(source(name)).readline)
        if token.type == tokenize.COMMENT]


def commands(text):
    """What stands behind "python" in a text, up to two blanks or the end of the line; a word that
    is neither a task nor follows a flag belongs to the sentence."""
    found, text = [], re.sub(r" *\\\n *", " ", text)
    for match in COMMAND.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1:match.start()]
        loops = dict(re.findall(r"for (\w+) in (\S+)", line))
        command = match[1]
        for variable, value in loops.items():
            command = command.replace(f"${variable}", value)
        accepted = shlex.split(command)[:2]
        for word in shlex.split(command)[2:]:
            follows = word.startswith("-") or accepted[-1].startswith("-")
            if not follows or accepted[-1] == "--help":
                break
            accepted.append(word)
        if "{" not in command:                          # else: see what a run proposes
            found.append(shlex.join(accepted))
    return found


def all_commands():
    """(where, command) of every text, once each."""
    seen = {}
    for name in [*LESSONS, "gradcheck.py", "README.md"]:
        for text in texts(name):
            for command in commands(text):
                seen.setdefault(command, name)
    long = [c for c in seen if c == "gradcheck.py" or "--teeth" in c]   # .ci/run, test_gradcheck.py
    return sorted((where, command) for command, where in seen.items() if command not in long)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with the lessons and with data in miniature under the names that the texts use."""
    folder = tmp_path_factory.mktemp("reader")
    for name in [*LESSONS, "gradcheck.py"]:
        shutil.copy(ROOT / name, folder / name)
        shutil.copy(ROOT / name, folder / f"my_{name}")
    for name in ("my_copy.py", "my_answer.py", "my_lesson.py", "FILE.py"):
        shutil.copy(ROOT / "mlp.py", folder / name)
    for name in ("mnist", "DIR"):
        mnist_folder(folder / name)
    cifar_archive(folder)
    (folder / "names.txt").write_text(words(), "utf-8")
    for name in ("tinyshakespeare.txt", "ts", "text.txt", "FILE", "FILE.txt"):
        (folder / name).write_text(prose(), "utf-8")
    for name in ("train.tsv", "val.tsv", "test_2016_flickr.tsv", "reuters-headlines.tsv", "pairs.tsv"):
        (folder / name).write_text(sentence_pairs(), "utf-8")
    shutil.copy(folder / "cifar-10-binary.tar.gz", folder / "cifar")
    return folder


def runs(command, folder):
    """Run a command with few steps; a checkpoint that it loads is written first."""
    name, *flags = shlex.split(command.replace("~/", ""))
    if name in LESSONS and "--help" not in flags:
        steps = "--steps" in source(name) or name not in NEW
        if name in NEW:
            task = flags[0] if flags and not flags[0].startswith("-") else next(iter(tasks(name)))
            steps = "steps" in {f.name for f in fields(tasks(name)[task].config)}
        flags += ["--steps", "3"] if steps else []
        if "--load" in flags and not (folder / flags[flags.index("--load") + 1]).exists():
            before = ["--save" if flag == "--load" else flag for flag in flags]
            subprocess.run([sys.executable, name, *before], cwd=folder, check=True, timeout=300,
                           capture_output=True)
    return subprocess.run([sys.executable, "-W", "error", name, *flags], cwd=folder, text=True,
                          capture_output=True, timeout=300, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("where, command", all_commands())
def test_command(where, command, folder):
    done = runs(command, folder)
    assert done.returncode == 0 and not done.stderr, done.stdout[-1000:] + done.stderr[-2000:]


def test_there_are_commands():
    for name in LESSONS:
        assert sum(where == name for where, _ in all_commands()) >= 1, name
    assert commands('x  python a.py b --c "d e"  and\n python b.py \\\n   --d 3,4  # python c.py, or') == [
        "a.py b --c 'd e'", "b.py --d 3,4", "c.py"]
    assert commands("see python a.py b --c 3 or python a.py --d and more") == [
        "a.py b --c 3", "a.py --d and"]
    assert commands("for lr in 0.1 1; do python a.py --lr $lr | tail -1; done") == ["a.py --lr 0.1"]


@pytest.mark.parametrize("name, task", pairs("steps"))
def test_task_and_what_it_proposes(name, task, folder):
    """--steps 1 --seed 3 works for every task; what is typed holds, and the last line has it; Next:
    names two or three other commands, which run."""
    done = runs_task = subprocess.run(
        [sys.executable, "-W", "error", name, task, "--steps", "1", "--seed", "3"], cwd=folder,
        text=True, capture_output=True, timeout=300)
    if done.returncode == 2:
        is_refused(runs_task, "--data")                 # a task without a built-in miniature
        return
    found = metrics(done)
    assert found["task"] == task and found["steps"] == "1" and found["seed"] == "3", found
    assert set(re.findall(r"^step +(\d+/\d+)", done.stdout, re.M)) == {"1/1"}, done.stdout
    changed = {f.name for f in fields(load(name).TASKS[task].config)} - {"steps", "seed"}
    assert not changed & found.keys(), "flags that nobody has changed"
    assert re.search(r"chance level: loss \d", done.stdout), done.stdout
    _, _, proposed = done.stdout.rpartition("\nNext: ")
    proposed = commands(proposed)
    assert 2 <= len(proposed) <= 3, proposed
    assert f"{name} {task}" not in proposed
    assert task != next(iter(tasks(name))) or name not in proposed
    for command in proposed:
        again = runs(command, folder)
        assert again.returncode == 0 and not again.stderr, command + again.stderr[-2000:]
