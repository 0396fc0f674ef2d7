"""What a program can see of the house rules, in every lesson that has a spine."""
import ast
import builtins
import random
import re
import symtable
import sys
from dataclasses import fields

import numpy as np
import pytest
from lessons import BUDGET, LESSONS, MARKER, NEW, ROOT, comments, load, pairs, source, spine, tasks, top_level

HEAD = '\n\n# /// script\n# requires-python = ">=3.10"\n# dependencies = ["numpy"]\n# ///\n\nimport '
FREE = (r"main|train|characters|TASKS|CONSTRAINTS|MORE|GRADCHECK|RESULTS?|Expr|Import|ImportFrom"
        r"|(run|init)_\w+|(\w+_)?batch|(\w+_)?loss_and_grads")
BRANCHES = {}   # "file, function": why its mathematics demands an if
LATER = {}      # "file, function": why it names something that the reader meets below it
WORDS = {       # in code and text: what to write instead
    r"portions?": "chunk", r"where_to_look": "causal_mask", r"hide_padding": "padding_mask",
    r"put_back": "scatter", r"channelnorm": "batchnorm2d", r"rows_of": "im2col",
    r"at its height": "peak", r"places": "positions", r"symbols?": "token",
    r"whoever": "readers who", r"letters?": "character", r"nats an?": "nats per",
    r"(it|model|net|network|decoder|encoder|head|layer) (says|said|knows|knew|looks|looked)":
        "outputs, depends, attends"}
ALLOWED = {     # "file, word": why it is right there
    "nested_attention.py, letters?": "keys are drawn as a to z",
    "attention.py, letters?": "words of a to z are reversed and copied",
    "seq2seq.py, letters?": "words of a to z are reversed and translated"}
NAMES = {       # of variables, functions, fields
    "answers": "targets", "kinds": "tokens", "Vocabulary": "tokenizer", "spell": "decode",
    "START": "BOS", "STOP": "EOS", "END": "EOS", "figures": "metrics", "corners": "window",
    "forcing": "teacher_forcing", "feed": "ffn", "slices": "micro_batches",
    "decay": "weight_decay", "readers": "states", "solved": "exact"}
FLAGS = {"task", "batch", "width", "clip", "smoothing", "penalty", "masked", "order", "workers",
         "group", "place", "tokens", "inner", "embed"} | NAMES.keys()             # not the name of a flag
TOP = {f"{name}.py" for name in BUDGET} | {"README.md", "LICENSE", ".gitignore", ".ci", ".github"}


def test_top_level():
    assert {p.name for p in ROOT.iterdir()} - TOP <= {
        ".git", ".venv", "__pycache__", ".ruff_cache", ".pytest_cache"}


@pytest.mark.parametrize("name", NEW)
def test_loads(name):
    assert load(name).TASKS


def test_same_name_same_code():
    seen, differ = {}, []
    for name in NEW:
        for key, text in top_level(source(name)).items():
            free = re.fullmatch(FREE, key) or text.startswith("@dataclass")
            first, where = seen.setdefault(key, (text, name))
            if first != text and not free:
                differ.append(f"{key} in {where} and {name}")
    assert not differ


@pytest.mark.parametrize("name", [*NEW, "gradcheck.py"])
def test_file(name):
    text = source(name)
    assert text.isascii() and "\t" not in text and "\r" not in text
    long = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not long, f"lines over 100 characters: {long}"
    tree = ast.parse(text)
    doc = tree.body[0]
    assert text.startswith(f'"""{name}: ') and doc.end_lineno <= 30, doc.end_lineno
    assert "\n".join(text.splitlines()[doc.end_lineno - 1:]).startswith(f'"""{HEAD}')
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for imported in names:
            assert imported.split(".")[0] in sys.stdlib_module_names | {"numpy"}, imported
            assert f"{imported}.py" not in LESSONS
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in tree.body:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("name", NEW)
def test_budget(name):
    assert len(spine(name).splitlines()) + 2 <= BUDGET[name.removesuffix(".py")][0]     # two are blank
    first = next(n.lineno for n in ast.parse(source(name)).body if isinstance(n, ast.FunctionDef))
    assert first < 70, f"the first function stands at line {first}"


@pytest.mark.parametrize("name", NEW)
def test_parts_of_a_lesson(name):
    text = source(name)
    assert text.count(f"\n{MARKER} Typing along? End it with  main(Config())  and run it. ====\n"
                      "# ==== The rest") == 1
    doc, more = ast.get_docstring(ast.parse(text)), load(name).MORE
    for heading in (r"^Run ", r"^Papers: "):
        assert re.search(heading, doc, re.M), heading
    assert re.search(r"^Break it", more, re.M)
    assert text.endswith('\n\nif __name__ == "__main__":\n    run(TASKS)\n')
    sections = re.findall(r"^# ---- ([^:\n]*?)(?:: .*)? -*$", spine(name), re.M)
    for first, second in (("layers", "data"), ("data", "model"), ("model", "optimizer"),
                          ("optimizer", "training")):
        at = [[i for i, s in enumerate(sections) if s.startswith(x)][:1] for x in (first, second)]
        assert not all(at) or at[0] < at[1], f"{first} stands below {second}"


def length(name, section, last=None):
    """Lines from the heading of a section to the next heading, or to the end of a function."""
    lines = source(name).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"# ---- {section}"))
    end = next((i for i, line in enumerate(lines) if i > start and line.startswith("# ----")),
               len(lines))
    for node in ast.parse(source(name)).body:
        if getattr(node, "name", "") == last:
            end = node.end_lineno
    return len("\n".join(lines[start:end]).rstrip().splitlines())


@pytest.mark.parametrize("name", NEW)
def test_plumbing(name):
    assert length(name, "flags and errors", "run") <= 120
    for function, section, most in (("save_checkpoint", "checkpoints", 47),
                                    ("threaded_loss_and_grads", "threads", 25)):
        if function in top_level(source(name)):
            assert length(name, section) <= most, section


@pytest.mark.parametrize("name", NEW)
def test_operations(name):
    tree, missing = ast.parse(source(name)), []
    for above, node in zip([None, *tree.body], tree.body):
        op = getattr(node, "name", "")
        if op.endswith("_backward") and getattr(above, "name", "") != op[:-8] + "forward":
            missing.append(op)
    assert not missing, "its forward does not stand directly above it"
    for node in ast.parse(spine(name)).body:
        if re.search("_(forward|backward)$", getattr(node, "name", "")):
            branches = [n for n in ast.walk(node) if isinstance(n, (ast.If, ast.IfExp))]
            assert not branches or f"{name}, {node.name}" in BRANCHES, node.name


def global_names(table):
    """(function, name) for every name of the top level that a symbol table and those in it use."""
    inside = table.get_type() == "function"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield table.get_name() if inside else "", symbol.get_name()
    for child in table.get_children():
        for function, used in global_names(child):
            yield table.get_name() if inside else function, used


@pytest.mark.parametrize("name", NEW)
def test_spine_stands_alone(name):
    text = spine(name)
    table = symtable.symtable(text, name, "exec")
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = set(global_names(table))
    unknown = {n for _, n in used} - defined - set(dir(builtins)) - {"__name__", "__doc__"}
    assert not unknown, "defined below the line, or nowhere"
    imported = {s.get_name() for s in table.get_symbols() if s.is_imported()}
    assert not imported - {n for _, n in used}, "imported and not used in the spine"
    order = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    below = {f"{name}, {f}: {n}" for f, n in used if f in order and n in order
             and order.index(n) > order.index(f) and f"{name}, {f}" not in LATER}
    assert not below, "the reader meets a name before its definition"


@pytest.mark.parametrize("name", NEW)
def test_words(name):
    found = []
    for number, line in enumerate(source(name).splitlines(), 1):
        for word, better in WORDS.items():
            match = re.search(rf"\b{word}\b", line, re.I)
            if match and f"{name}, {word}" not in ALLOWED and "a-z" not in line:
                found.append(f"{number}: {match[0]} -> {better}")
    for node in ast.walk(ast.parse(source(name))):
        used = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", "")
        if used in NAMES or str(used).startswith("learn_"):
            found.append(f"{node.lineno}: {used} -> {NAMES.get(used, 'run_...')}")
    for task, row in tasks(name).items():
        found += [f"{task} --{f.name}" for f in fields(row.config) if f.name in FLAGS]
    assert not found


def test_import_leaves_random_numbers_alone():
    np.random.seed(12345), random.seed(12345)
    before = np.random.get_state()[1].copy(), random.getstate()
    for name in NEW:
        exec(compile(source(name), name, "exec"), {"__name__": "imported"})
        assert np.array_equal(np.random.get_state()[1], before[0]), name
        assert random.getstate() == before[1], name


@pytest.mark.parametrize("name", NEW)
def test_import_prints_nothing(name, capsys):
    exec(compile(source(name), name, "exec"), {"__name__": "imported"})
    assert capsys.readouterr() == ("", "")


def arrays(value):
    """All arrays in nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [array for item in value for array in arrays(item)]
    return [value] if isinstance(value, np.ndarray) else []


@pytest.mark.parametrize("name, task", pairs())
def test_task(name, task):
    """Comments for help; a batch depends on nothing but cfg and step; float32 stays float32."""
    row = tasks(name)[task]
    for config in row.config.__mro__[:-1]:
        assert config.__doc__ and not config.__doc__.startswith(config.__name__ + "(")
    assert not {f.name for f in fields(row.config)} - comments(row.config).keys()
    assert len(fields(load(name).Config)) <= 12
    load(name).check(row.config())
    if row[1:4] == (None, None, None):                  # it compares trainings of other tasks
        return
    cfg, state = row.config(), np.random.get_state()[1].copy()
    params = row.init_params(cfg, np.random.default_rng(0), np.float32)
    batch = row.make_batch(cfg, 1, np.float32)
    again, other = row.make_batch(cfg, 1, np.float32), row.make_batch(cfg, 2, np.float32)
    before = [a.copy() for a in arrays([params, batch])]
    loss, grads, *_ = row.loss_and_grads(params, batch, cfg)
    assert list(params) and set(grads) == set(params) and np.isfinite(loss) and loss > 0
    assert all(grads[key].shape == value.shape for key, value in params.items())
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays([params, batch])))
    assert all(np.array_equal(a, b) for a, b in zip(arrays(batch), arrays(again)))
    assert all(a.dtype == np.float32 for a in arrays([params, grads]))
    assert not any(a.dtype == np.float64 for a in arrays([batch, other]))
    double = row.init_params(cfg, np.random.default_rng(0), np.float64)
    assert all(a.dtype == np.float64 for a in double.values())
    assert np.array_equal(state, np.random.get_state()[1])
