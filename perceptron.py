# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""perceptron.py: one layer, from Rosenblatt's rule to a softmax classifier.

A neuron adds up its inputs, each times a weight, and fires if the sum is positive. In 1958 Rosenblatt gave a rule that
finds the weights from examples, and Novikoff proved that it stops, if any weights do the job. For XOR none do. That is
why the other lessons exist; but first, one layer goes a long way: give it a smooth output, follow the gradient, and
it reads handwritten digits and invents names.

Rosenblatt's rule, y in {-1, +1}, x with a constant 1 appended:
    if y (w . x) <= 0:  w <- w + y x
    mistakes <= (R / margin)^2,  R = max |x|,  margin = min y (u . x) for any unit vector u that separates the classes
XOR cannot be separated, because + on (-1, 1) and (1, -1) asks for -w1 + w2 + b > 0 and w1 - w2 + b > 0, so b > 0;
- on (-1, -1) and (1, 1) asks for -w1 - w2 + b < 0 and w1 + w2 + b < 0, so b < 0. No line; with x1 x2 as a third
input, one weight does it.

The same neuron, smooth:           z = x W + b           forward
    sigmoid, binary cross-entropy:     loss = -mean[ y log s(z) + (1 - y) log(1 - s(z)) ] = mean[ log(1 + e^z) - y z ]
    softmax, K classes:                loss = -mean_n log p[n, y_n],   p = e^z / sum_k e^z_k
and backward. The slope of log(1 + e^z) is s(z), and that of log sum_k e^z_k is p, so both losses have the same one:
    dloss/dz = (s(z) - y) / size       dloss/dz = (p - onehot(y)) / N       (prediction minus truth)
    dloss/dW = x^T dz                  dloss/db = sum_n dz                  dloss/dx = dz W^T

Run
    python perceptron.py                                  the gates, then names from a built-in list
    python perceptron.py --task gates --product           a third input x1 x2: XOR is learned too
    python perceptron.py --task names --data names.txt    a bigram model, counted and learned
        curl -O https://raw.githubusercontent.com/karpathy/makemore/master/names.txt
    python perceptron.py --task mnist --data mnist        a digit reader; mnist is a folder with the four files
        for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        curl --create-dirs -o mnist/$f-ubyte.gz https://ossci-datasets.s3.amazonaws.com/mnist/$f-ubyte.gz; done

Break it
    drop "y += b" in linear_forward, --task gates: every line runs through the middle, the loss ends at 0.43, not 0.17
    0.01 -> 0 in init_params: nothing changes. One layer's loss is a bowl, without a second valley (two layers: mlp.py)
    <= -> < in perceptron_rule: it stops at once with w = 0, which makes no mistake that it would notice
    dz[...] -= 1 -> += 1 in softmax_cross_entropy_backward, --task names: the loss climbs to about 2200
    drop "z = z - z.max(...)", --task names --lr 2000: e^z overflows, the loss is inf; with it, the layer ends at 2.29

Papers: Rosenblatt 1958 (The perceptron); Novikoff 1962 (On convergence proofs on perceptrons);
Minsky and Papert 1969 (Perceptrons).
"""
import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import re
import signal
import sys
import time
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np


@dataclass
class Config:
    """Hyperparameters. Edit a line, or pass its name as a flag: --lr 0.1"""
    task: Literal["demo", "gates", "names", "mnist"] = "demo"  # what to learn; demo is gates, then names
    product: bool = False  # gates: also feed in the product x1 x2
    lr: float = 20.0       # learning rate of gradient descent, falling to 0 on a straight line
    steps: int = 1000      # updates
    batch: int = 1000      # examples an update; the gates are always all four rows
    data: str = ""         # names: a text with a word a line; mnist: the folder of MNIST
    seed: int = 0          # of every random draw

    def __post_init__(self):
        require(0 < self.lr < float("inf"), "--lr", "a number above 0", self.lr)
        require(self.steps >= 1, "--steps", "1 or more", self.steps)
        require(self.batch >= 1, "--batch", "1 or more", self.batch)
        require(self.seed >= 0, "--seed", "0 or more", self.seed)
        reads = not self.data or self.task in ("names", "mnist")
        require(reads, "--data", "--task names or mnist with it", self.task)


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "names": dict(lr=50.0, steps=3000, batch=2000),
    "mnist": dict(lr=0.1, steps=10000, batch=100),
}


# ---- layers: N rows, D inputs, K outputs -----------------------------------------------------------------------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, K), b (K,) -> y (N, K)."""
    y = x @ W
    y += b
    return y, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   dout (N, K) -> dx (N, D), dW (D, K), db (K,)."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)     # b was broadcast over N, so sum over N


def sigmoid(z):
    """1 / (1 + e^-z), written with tanh, which cannot overflow."""
    return 0.5 * np.tanh(0.5 * z) + 0.5


def binary_cross_entropy_forward(z, targets):
    """mean[log(1 + e^z) - y z], cross-entropy of y and sigmoid(z).   z (N, K), targets (N, K) of 0 or 1 -> scalar."""
    return (np.logaddexp(0, z) - targets * z).mean(), (z, targets)


def binary_cross_entropy_backward(dout, cache):
    """dz = (sigmoid(z) - y) / size.   dout scalar -> dz (N, K)."""
    z, targets = cache
    return (sigmoid(z) - targets) * (dout / z.size)     # the mean is over all N K entries


def softmax_cross_entropy_forward(z, targets):
    """-mean_n log p[n, y_n], p = softmax of each row.   z (N, K), targets (N,) class numbers -> scalar."""
    z = z - z.max(axis=1, keepdims=True)                # the same p, and e^z cannot overflow
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(targets)), targets].mean(), (log_p, targets)


def softmax_cross_entropy_backward(dout, cache):
    """dz = (p - onehot(y)) / N.   dout scalar -> dz (N, K)."""
    log_p, targets = cache
    dz = np.exp(log_p)
    dz[np.arange(len(targets)), targets] -= 1
    return dz * (dout / len(targets))


# ---- model: one layer ------------------------------------------------------------------------------------------------

def init_params(cfg, rng, dtype=np.float32):
    """A linear layer that begins at small random weights."""
    if cfg.task == "names":
        D = K = len(load_bigrams(cfg.data)["chars"])
    else:
        D, K = (784, 10) if cfg.task == "mnist" else (2 + cfg.product, 4)
    return {"W": (0.01 * rng.standard_normal((D, K))).astype(dtype), "b": np.zeros(K, dtype)}


def loss_and_grads(params, batch, cfg):
    """One forward and one backward pass -> loss, gradients under the keys of params."""
    x, targets = batch
    loss_forward, loss_backward = {
        False: (softmax_cross_entropy_forward, softmax_cross_entropy_backward),
        True: (binary_cross_entropy_forward, binary_cross_entropy_backward)}[cfg.task in ("demo", "gates")]
    z, linear_cache = linear_forward(x, params["W"], params["b"])
    loss, loss_cache = loss_forward(z, targets)
    dz = loss_backward(1.0, loss_cache)
    _, dW, db = linear_backward(dz, linear_cache)
    return loss, {"W": dW, "b": db}


def perceptron_rule(x, y, epochs=1000):
    """Rosenblatt's rule.   x (N, D), y (N,) of -1 or +1 -> w (D + 1,), mistakes, length of the cycle or 0 if it stops,
    share of right answers at best."""
    x = np.hstack([x, np.ones((len(x), 1))])            # the bias is the weight of a constant 1
    w, mistakes, best, seen = np.zeros(x.shape[1]), 0, 0.0, {}
    for epoch in range(epochs):
        before = mistakes
        for xi, yi in zip(x, y):
            if yi * (w @ xi) <= 0:
                w = w + yi * xi
                mistakes += 1
                best = max(best, (y * (x @ w) > 0).mean())
        if mistakes == before:
            return w, mistakes, 0, best
        if tuple(w) in seen:                            # the same weights again: from here on it repeats for ever
            return w, mistakes, epoch - seen[tuple(w)], best
        seen[tuple(w)] = epoch
    return w, mistakes, epochs, best


# ---- data ------------------------------------------------------------------------------------------------------------

GATES = {"AND": (0, 0, 0, 1), "OR": (0, 1, 1, 1), "NAND": (1, 1, 1, 0), "XOR": (0, 1, 1, 0)}
ROWS = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
WIDEST = {"AND": (1, 1, -1), "OR": (1, 1, 1), "NAND": (-1, -1, 1)}              # w1, w2, b with the widest margin

NAMES = """
aaron abigail adam adrian agnes aidan alan albert alexander alice alma amanda amber amelia amy andrea andrew angela
ann anna anthony antonia april arthur audrey austin barbara beatrice benjamin bernard beth bianca blake brandon brenda
brian bridget bruce bruno caleb calvin cameron carl carla carmen caroline cecilia charles charlotte chloe christian
christina clara claire clement colin connor cora craig cynthia daisy damian daniel daphne david deborah dennis derek
diana dominic donald dora dorothy douglas duncan dylan edgar edith edmund edward eleanor elena elias elizabeth ella
ellen elliot eloise elsa emily emma eric erica erin ernest esther ethan eva evan evelyn fabian faith felix fiona flora
florence frances frank frederick gabriel gareth gemma george gerald gilbert gloria gordon grace graham grant gregory
greta hannah harold harriet harry hazel heather hector helen henry herbert holly hope howard hugh hugo ian ida ingrid
irene iris isaac isabel ivan ivy jack jacob james jane janet jasmine jason jasper jean jeffrey jenna jennifer jeremy
jesse jessica joan joel johanna john jonas jonathan jordan joseph joshua joyce judith julia julian june justin karen
karl kate katherine keith kelly kenneth kevin kyle lara laura lauren lawrence leah lena leo leonard leslie lewis liam
lilian lily linda lisa logan lorna louis louise lucas lucy luke lydia mabel madeline marcus margaret maria marian
marina mark martha martin mary mason matilda matthew maud maurice max megan melanie melissa michael mildred miles
miranda miriam molly monica morgan muriel myra nancy naomi natalie nathan neil nelson nicholas nicole nigel nina noah
nora norman olga olive oliver olivia oscar owen pamela patricia patrick paul paula penelope peter philip phoebe
phyllis quentin rachel ralph raymond rebecca regina richard rita robert robin roger roland rosa rose rowan roy ruby
rupert russell ruth ryan sabrina sally samantha samuel sandra sara scott sean sebastian selina sharon sheila sidney
silvia simon sonia sophia spencer stanley stella stephen steven stuart susan sybil sylvester tamara tanya tara teresa
thelma theodore thomas timothy tobias tracy trevor tristan ursula valerie vanessa vera veronica victor victoria
vincent viola violet virginia vivian walter wanda warren wendy wesley wilfred william winifred yvonne zachary zara
zoe""".split()


def with_product(points):
    """(N, 2) -> (N, 3): x1, x2 and x1 x2."""
    return np.hstack([points, points[:, :1] * points[:, 1:]])


def make_batch(cfg, rng, dtype=np.float32):
    """gates: the four rows, a column of targets a gate; else a random batch of the data to learn from -> x, targets."""
    if cfg.task in ("demo", "gates"):
        x = with_product(ROWS) if cfg.product else ROWS
        return x.astype(dtype), np.array(list(GATES.values())).T.astype(dtype)
    x, targets = (load_bigrams if cfg.task == "names" else load_mnist)(cfg.data)["train"]
    pick = rng.integers(0, len(x), cfg.batch)
    if cfg.task == "names":                             # a letter is a row of zeros with a single 1
        return np.eye(len(load_bigrams(cfg.data)["chars"]), dtype=dtype)[x[pick]], targets[pick]
    return x[pick].astype(dtype, copy=False), targets[pick]


@functools.lru_cache
def load_bigrams(path):
    """Every letter of the names and the one before it -> {"chars": ..., "train": (x, y), "validation", "test"}."""
    words = read_words(path)
    chars = "." + "".join(sorted(set("".join(words))))      # . stands before and behind every word
    index, data = {c: i for i, c in enumerate(chars[1:], 1)}, {"chars": chars}
    for split, part in zip(("train", "validation", "test"), split_words(words)):
        ids = [[0, *(index[c] for c in word), 0] for word in part]
        data[split] = np.array([i for word in ids for i in word[:-1]]), np.array([i for word in ids for i in word[1:]])
    return data


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        require(False, path, "text in UTF-8", f"byte {error.object[error.start]:#x} at {error.start}")
    except OSError as error:
        require(False, path, "a text file", error.strerror)
    require(text.strip(), path, "some text", "an empty file")
    return text


def read_words(path):
    """A text with a word a line, or the built-in names -> list of words."""
    words = [line.strip() for line in read_text(path).splitlines() if line.strip()] if path else NAMES
    require(len(words) >= 20, f"--data {path}", "20 words or more, one a line", len(words))
    return words


def split_words(words):
    """Always the same 80 / 10 / 10 % of the words, in random order, for training, validation and test."""
    order = np.random.default_rng(0).permutation(len(words))
    parts = np.split(order, [int(0.8 * len(words)), int(0.9 * len(words))])
    return [[words[i] for i in part] for part in parts]


def read_idx(path):
    """An IDX file of bytes, gzipped or not: 0 0 8 ndim, the sizes as big-endian uint32, the bytes -> array."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        require(False, path, "a whole gzip file", str(error))
    whole = raw[:3] == b"\0\0\x08" and len(raw) >= 4 + 4 * raw[3]
    require(whole, path, "an IDX file of bytes (0 0 8) with its sizes", raw[:8])
    sizes = np.frombuffer(raw[4:4 + 4 * raw[3]], ">u4").tolist()
    body = np.frombuffer(raw[4 + 4 * raw[3]:], np.uint8)
    require(len(body) == np.prod(sizes), path, f"{' x '.join(map(str, sizes))} bytes after the header", len(body))
    return body.reshape(sizes)


@functools.lru_cache
def load_mnist(folder):
    """The four files of MNIST -> {"train": (x, y), "validation" (the last 5,000 training pictures), "test"}; x (N, 784)
    with mean 0, variance 1, y (N,). With no folder, noise in the same shape: enough to check gradients and speed on."""
    if not folder:
        noise = np.random.default_rng(0).standard_normal((1000, 784)).astype(np.float32)
        return {"train": (noise, np.arange(1000) % 10)}
    parts = {}
    for prefix in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{prefix}-{kind}-ubyte"
            paths = [path for path in (Path(folder) / f"{name}.gz", Path(folder) / name) if path.is_file()]
            require(paths, f"--data {folder}", f"a folder with {name}.gz", "no such file")
            parts[prefix, kind[:6]] = read_idx(paths[0])
        x, y = parts[prefix, "images"], parts[prefix, "labels"]
        require(x.shape == (len(y), 28, 28) and y.max(initial=0) < 10, f"--data {folder}",
                f"{prefix}: as many 28 x 28 pictures as labels from 0 to 9", f"{x.shape} and {y.shape}")
        x = (x.reshape(len(x), 784) * np.float32(1 / 255) - np.float32(0.1307)) * np.float32(1 / 0.3081)
        parts[prefix] = x, y.astype(int)
    x, y = parts["train"]
    return {"train": (x[:-5000], y[:-5000]), "validation": (x[-5000:], y[-5000:]), "test": parts["t10k"]}


# ---- pictures in text ------------------------------------------------------------------------------------------------

SHADES = np.array(list(" .:-=+*#%@"))


def shade(values):
    """Numbers from 0 to 1 -> characters from blank to dark, in an array of the same shape."""
    return SHADES[(np.clip(values, 0, 1) * 9.99).astype(int)]


def loss_curve(losses, width=60):
    """The losses from first to last in one line of text, dark where high (the scale is logarithmic)."""
    means = np.log([np.mean(part) + 1e-12 for part in np.array_split(losses, min(width, len(losses)))])
    return "".join(shade((means - means.min()) / (np.ptp(means) + 1e-12)))


def draw_regions(prob, points, labels, cols=48, rows=24):
    """What a classifier says in the plane, dark where class 1 is likely, and its points as o and x -> lines of text.
    prob: a function (N, 2) -> (N,); points (P, 2); labels (P,)."""
    edge = 1.1 * np.abs(points).max()
    grid = np.stack(np.meshgrid(np.linspace(-edge, edge, cols), np.linspace(edge, -edge, rows)), axis=-1)
    picture = shade(prob(grid.reshape(-1, 2)).reshape(rows, cols))
    column = ((points[:, 0] / edge + 1) / 2 * (cols - 1)).round().astype(int)
    row = ((1 - points[:, 1] / edge) / 2 * (rows - 1)).round().astype(int)
    picture[row, column] = np.where(labels > 0, "x", "o")
    return ["".join(line) for line in picture]


def side_by_side(titles, pictures, gap="   "):
    """Several pictures of equal height, each a list of lines, next to each other under their titles -> text."""
    columns = [[title, *lines] for title, lines in zip(titles, pictures)]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(gap.join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns))


# ---- training and demo -----------------------------------------------------------------------------------------------

def descend(cfg, rng):
    """Gradient descent -> params, progress."""
    params, progress = init_params(cfg, rng), Progress(cfg.steps)
    for step in progress:
        loss, grads = loss_and_grads(params, make_batch(cfg, rng), cfg)
        for name in params:
            params[name] -= cfg.lr * (1 - (step - 1) / cfg.steps) * grads[name]
        progress.report(loss)
    print("loss", loss_curve(progress.losses))
    return params, progress


def show_rule(rng):
    """Rosenblatt's rule on the gates and on a cloud of points, beside Novikoff's bound on its mistakes."""
    print("Rosenblatt's rule. Novikoff's bound on its mistakes is (R / margin)^2.")
    problems = {name: (ROWS, 2 * np.array(y) - 1, WIDEST.get(name)) for name, y in GATES.items()}
    problems["XOR with x1 x2"] = with_product(ROWS), problems["XOR"][1], (0, 0, -1, 0)
    teacher, cloud = rng.standard_normal(3), rng.standard_normal((300, 2))
    distance = (cloud @ teacher[:2] + teacher[2]) / np.linalg.norm(teacher)
    cloud, distance = cloud[np.abs(distance) > 0.1], distance[np.abs(distance) > 0.1]
    problems[f"cloud of {len(cloud)} points"] = cloud, np.sign(distance), teacher
    for name, (x, y, u) in problems.items():
        w, mistakes, cycle, best = perceptron_rule(x, y)
        bound = "  none"
        if u is not None:
            x = np.hstack([x, np.ones((len(x), 1))])
            margin = (y * (x @ u)).min() / np.linalg.norm(u)
            bound = f"{(x ** 2).sum(axis=1).max() / margin ** 2:6.0f}"
        end = "never stops: it goes round in a circle" if cycle else f"stops at w, b = {w.round(2).tolist()}"
        print(f"{name:>19}:  {mistakes:4d} mistakes  bound {bound}  {best:4.0%} right at best  {end}")


def learn_gates(cfg, rng):
    """Four sigmoid neurons, one a gate -> share of right answers by gate, steps."""
    inputs = "x1, x2 and x1 x2" if cfg.product else "x1 and x2"
    print(f"\nSigmoid neurons, one a gate, inputs {inputs}: {4 * (3 + cfg.product)} parameters")
    print("chance level: loss 0.693")
    params, progress = descend(cfg, rng)

    def prob(k):
        def of_points(points):
            z, _ = linear_forward(with_product(points) if cfg.product else points, params["W"], params["b"])
            return sigmoid(z[:, k])
        return of_points
    right = {name: float(((prob(k)(ROWS) > 0.5) == y).mean()) for k, (name, y) in enumerate(GATES.items())}
    print(side_by_side([f"{name}: {share:.0%} right" for name, share in right.items()],
                       [draw_regions(prob(k), ROWS, np.array(y), 17, 9) for k, y in enumerate(GATES.values())]))
    return right, progress


def learn_names(cfg, rng):
    """A bigram model twice: by counting and by gradient descent -> losses in nats a character, steps."""
    data = load_bigrams(cfg.data)
    chars, (x, y), (x_test, y_test) = data["chars"], data["train"], data["test"]
    V = len(chars)
    print(f"\nNames: the next letter from the last one, {(x == 0).sum()} names to learn from, {V} letters, "
          f"{V * V + V} parameters\nchance level: loss {np.log(V):.3f}")
    counts = np.zeros((V, V))
    np.add.at(counts, (x, y), 1)
    counted = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    counting = float(-np.log(counted[x, y]).mean())
    params, progress = descend(cfg, rng)
    z, _ = linear_forward(np.eye(V, dtype=np.float32), params["W"], params["b"])
    trained, heldout = (float(softmax_cross_entropy_forward(z[a], b)[0]) for a, b in ((x, y), (x_test, y_test)))
    learned = np.exp(z - z.max(axis=1, keepdims=True))
    learned /= learned.sum(axis=1, keepdims=True)
    expected = "   (expected on names.txt: 2.45 and at most 2.46)" if cfg.data else ""
    print(f"counting {counting:.3f}, the layer {trained:.3f} on the same names, {heldout:.3f} held out{expected}")
    top = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:30])          # a text of many letters: the commonest
    maps = [["  " + "".join(chars[i] for i in top)] +
            [f"{chars[i]} " + "".join(shade(p[i, top] ** 0.5)) for i in top] for p in (counted, learned)]
    print(side_by_side(["counted: from row to column", "learned"], maps))
    words = []
    for _ in range(10):
        letters = [0]
        while len(letters) == 1 or letters[-1] and len(letters) < 20:
            letters.append(rng.choice(V, p=learned[letters[-1]] / learned[letters[-1]].sum(dtype=np.float64)))
        words.append("".join(chars[i] for i in letters[1:] if i))
    print("invented:", ", ".join(words))
    return {"counting": counting, "layer": trained, "heldout": heldout}, progress


def learn_digits(cfg, rng):
    """Ten neurons read digits -> share of right answers on the test pictures, steps."""
    require(cfg.data, "--data", "the folder of MNIST (--help says where to get it)", cfg.data)
    data = load_mnist(cfg.data)
    x, y = data["test"]
    print(f"\nDigits: {len(data['train'][0])} pictures of 28 x 28 pixels, 7850 parameters\nchance level: loss 2.303")
    params, progress = descend(cfg, rng)
    z, _ = linear_forward(x, params["W"], params["b"])
    right = z.argmax(axis=1) == y
    W = params["W"].reshape(14, 2, 14, 2, 10).mean(axis=(1, 3))                 # quarter the size, to fit on the screen
    pictures = [["".join(row) for row in shade(0.5 + 1.5 * W[:, :, k])] for k in range(10)]
    titles = [f"{k}: {right[y == k].sum() / max((y == k).sum(), 1):.1%} right" for k in range(10)]
    print("What each neuron looks for (dark) and what speaks against it (blank):")
    for k in (0, 5):
        print(side_by_side(titles[k:k + 5], pictures[k:k + 5]))
    print(f"test accuracy {right.mean():.4f} on {len(y)} pictures (expected 0.92)")
    return {"accuracy": float(right.mean())}, progress


def main(cfg):
    """Run one task, or both of the demo."""
    start, rng, figures, steps = time.perf_counter(), np.random.default_rng(cfg.seed), {}, 0
    print(f"perceptron.py: one layer learns by gradient descent, lr {cfg.lr}, {cfg.steps} steps\n")
    if cfg.task in ("demo", "gates"):
        show_rule(rng)
    for task in ("gates", "gates with x1 x2", "names") if cfg.task == "demo" else (cfg.task,):
        part = replace(cfg, task=task.split()[0], product=cfg.product or "with" in task)
        found, progress = {"gates": learn_gates, "names": learn_names, "mnist": learn_digits}[part.task](part, rng)
        ending = "_x1x2" if part.product and part.task == "gates" else ""
        figures.update({name + ending: value for name, value in found.items()})
        steps += progress.step
        if progress.stopped:
            break
    print("\nNext: python perceptron.py --task names --lr 5      python perceptron.py --help      python mlp.py")
    print_result(task=cfg.task, **figures, steps=steps, seconds=time.perf_counter() - start)


# ---- plumbing: the same in every lesson; whoever types along may stop here -------------------------------------------

class InputError(ValueError):
    """A flag, value or file that cannot be used; the program ends with its text in one line and exit status 2."""


def require(ok, what, expected, found):
    """Raise InputError unless ok."""
    if not ok:
        raise InputError(f"{what}: expected {expected}, found {found!r}")


def read_flags(argv=None):
    """Every field of Config is a flag, its comment the help text -> Config."""
    def fail(message):
        raise InputError(f"{message} (--help lists the flags)")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        kind = dict(type=field.type, metavar=field.name.upper())
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif get_args(field.type):
            kind = dict(choices=get_args(field.type))
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=text, **kind)
    known = parser.parse_known_args(argv)[0]
    data, experiment = (getattr(known, name, "") for name in ("data", "experiment"))
    for key in (known.task, f"{known.task} --data" if data else "", experiment):
        parser.set_defaults(**PRESETS.get(key, {}))
    return Config(**vars(parser.parse_args(argv)))


def run(main):
    """Call main with the Config of the flags; what is not a bug ends in one line, not in a traceback."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")      # each line at once, on any console
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)                           # `| head` ends the program quietly
    np.seterr(over="ignore", invalid="ignore")          # a run that diverges shows in its loss, which Progress checks
    with contextlib.suppress(AttributeError, OSError, TypeError):               # Linux: keep freed memory for reuse
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, -1)
    try:
        main(read_flags())
    except (InputError, FloatingPointError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


class Progress:
    """for step in progress: ... progress.report(loss).   Prints about ten lines with the time left. Ctrl-C ends the
    loop after the step at hand, a second one quits. A loss that is not finite raises FloatingPointError."""

    def __init__(self, steps, first=1, quiet=False, lines=10):
        self.steps, self.first, self.quiet, self.lines = steps, first, quiet, lines
        self.step, self.losses, self.printed, self.stopped = first - 1, [], 0, False
        self.start, self.seconds = time.perf_counter(), 0.0

    def __iter__(self):
        previous = signal.signal(signal.SIGINT, self.interrupt)
        try:
            while self.step < self.steps and not self.stopped:
                self.step += 1
                yield self.step
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.stopped:
            print(f"stopped after step {self.step}; this is what has been learned so far")

    def interrupt(self, signum, frame):
        """Called on Ctrl-C."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def report(self, loss, note=lambda: ""):
        """Keep the loss of this step; if a line is due, print it, with what note() says."""
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: training diverged; try a smaller --lr")
        self.losses.append(float(loss))
        self.seconds = time.perf_counter() - self.start
        if not self.quiet and (self.step % -(-self.steps // self.lines) == 0 or self.step == self.steps):
            recent = self.losses[self.printed:]
            self.printed = len(self.losses)
            left = self.seconds / len(self.losses) * (self.steps - self.step)
            print(f"step {self.step:6d}/{self.steps}  loss {sum(recent) / len(recent):.4f}{note()}  |  "
                  f"{self.seconds:.1f} s  ({left:.0f} s left)")


def print_result(**figures):
    """The last line of a run, for comparing runs."""
    print("result: " + " ".join(f"{k}={v:#.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()))


if __name__ == "__main__":
    run(main)
