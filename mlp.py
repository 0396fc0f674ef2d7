# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""mlp.py: layers on layers, trained by backpropagation.

One layer can only draw a line. A second layer, fed with the outputs of the first, can bend it, if there is a
nonlinearity in between. What was missing until 1986 was a way to tell the inner weights what to do, because no one
knows what an inner neuron should have said. Backpropagation tells them: it is the chain rule, applied from the loss
back to the input, each operation passing on the slope that it was handed.

Forward, layer by layer:     z = x W + b     a = f(z), the input of the next layer     loss = L(z of the last layer)
Backward, in reverse. Call da, dz, dW, ... the derivatives of the loss by a, z, W, ...
    dz = da f'(z)            each entry of a depends on the same entry of z only
    dW = x^T dz              W[d, m] reaches the loss through z[n, m] = ... + x[n, d] W[d, m], for every n
    db = sum_n dz            b[m] is added to every row
    dx = dz W^T              x[n, d] feeds every z[n, m]; this dx is the da of the layer before
Slopes f'(z):   relu 1 or 0    sigmoid s (1 - s)    tanh 1 - a^2    silu s + z s (1 - s)    gelu: see below
Slopes of L:    mse 2 (z - y) / size    binary cross-entropy (s(z) - y) / size    softmax ... (p - onehot y) / N
BatchNorm:      xhat = (x - mean) / std over the batch,  y = gamma xhat + beta. Each x moves mean and std too, and so
                dx = gamma / std (dy - mean(dy) - xhat mean(dy xhat)): dy without its part along 1 and along xhat

Run
    python mlp.py                                         XOR, two spirals, initialisations, optimizers
    python mlp.py --task spirals --activation relu --init he --optimizer momentum --lr 0.1
    python mlp.py --task gates --hidden 4
    python mlp.py --task mnist --data mnist               digits; mnist is a folder with the four files
        for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        curl --create-dirs -o mnist/$f-ubyte.gz https://ossci-datasets.s3.amazonaws.com/mnist/$f-ubyte.gz; done
    python mlp.py --task names --data names.txt           the next letter from the last eight
        curl -O https://raw.githubusercontent.com/karpathy/makemore/master/names.txt
    python mlp.py --task names --data names.txt --group 2     joins neighbours level by level, as WaveNet does

Break it
    act_forward(x) -> (x, act_forward(x)[1]) in mlp_forward, --task xor: layers of lines are a line, loss 0.693, 50 %
    rng.standard_normal -> 0 * rng.standard_normal for W in init_params, --task xor: loss 0.693, 50 %; neurons that
        begin alike get the same gradient for ever
    dout * (1 - y * y) -> dout in tanh_backward, --task spirals: 62 %. It still learns something! So check gradients
    --task spirals --hidden 16,16,16,16,16,16,16,16,16,16 --init small: loss 0.693, chance, the signal dies in ten
        layers; with --batchnorm as well: 99.9 %
    --task xor --hidden 2 --seed 1: 50 %, stuck; seed 0 gets through. More neurons than needed make luck unnecessary
    --task spirals --loss mse --optimizer sgd --lr 30: the loss is inf after a dozen steps

Papers: Rumelhart, Hinton, Williams 1986 (backpropagation); Bengio et al. 2003 (a neural probabilistic language model);
Glorot, Bengio 2010 and He et al. 2015 (initialisation); Ioffe, Szegedy 2015 (BatchNorm); Kingma, Ba 2015 (Adam);
Hendrycks, Gimpel 2016 (gelu); van den Oord et al. 2016 (WaveNet); Loshchilov, Hutter 2017 and 2019 (cosine, AdamW).
"""
import argparse
import contextlib
import ctypes
import functools
import gzip
import inspect
import math
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
    task: Literal["demo", "xor", "gates", "spirals", "names", "mnist"] = "demo"  # what to learn; demo: xor, spirals
    experiment: Literal["none", "init", "optimizers"] = "none"  # instead: compare initialisations or optimizers
    hidden: str = "32,32"   # width of every hidden layer
    activation: Literal["relu", "sigmoid", "tanh", "gelu", "silu"] = "tanh"  # what follows every hidden layer
    init: Literal["he", "xavier", "normal", "small"] = "xavier"  # spread of the first weights; normal is 1, small 0.01
    loss: Literal["auto", "mse", "binary", "softmax"] = "auto"  # auto: binary for xor and gates, else softmax
    batchnorm: bool = False  # normalise what enters every activation
    l1: float = 0.0         # penalty on sum |W|
    l2: float = 0.0         # penalty on sum W^2 / 2
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "adam"  # how a gradient becomes a step
    lr: float = 0.01        # learning rate at its height
    decay: float = 0.01     # adamw: share of every matrix that is taken off, times lr
    schedule: Literal["constant", "step", "cosine"] = "cosine"  # course of the learning rate
    warmup: int = 50        # steps in which it rises from 0
    steps: int = 2000       # updates
    batch: int = 128        # examples an update; xor and gates are always all four rows
    context: int = 8        # names: letters that the next one is guessed from
    embed: int = 24         # names: numbers that stand for a letter
    group: int = 0          # names: neighbours that a layer joins; 0: the first layer joins all
    data: str = ""          # names: a text with a word a line; mnist: the folder of MNIST
    seed: int = 0           # of every random draw

    def __post_init__(self):
        widths = re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.hidden)
        require(widths, "--hidden", "widths above 0, such as 64,32", self.hidden)
        for name in ("steps", "batch", "context", "embed"):
            require(getattr(self, name) >= 1, "--" + name, "1 or more", getattr(self, name))
        for name in ("l1", "l2", "decay", "warmup", "seed"):
            require(0 <= getattr(self, name) < math.inf, "--" + name, "0 or more", getattr(self, name))
        require(0 < self.lr < math.inf, "--lr", "a number above 0", self.lr)
        require(not self.data or self.task in ("names", "mnist"), "--data", "--task names or mnist with it", self.task)
        require((self.task, self.loss) != ("gates", "softmax"), "--loss", "binary or mse for yes or no", self.loss)
        joined = self.group ** (self.hidden.count(",") + 2)
        require(self.group == 0 or self.group > 1 and joined % self.context == 0, "--group",
                f"a number whose powers reach --context {self.context} within the layers", self.group)


PRESETS = {     # what a task changes above, unless a flag says otherwise
    "names": dict(hidden="128,128,128", activation="gelu", batchnorm=True, lr=0.003, optimizer="adamw", decay=1.0,
                  steps=20000, batch=256),
    "mnist": dict(hidden="512,256", activation="relu", init="he", batchnorm=True, lr=0.003, optimizer="adamw",
                  steps=8000),
}


# ---- layers: N rows, D inputs, M outputs, K classes ------------------------------------------------------------------

def linear_forward(x, W, b):
    """y = x W + b.   x (N, D), W (D, K), b (K,) -> y (N, K)."""
    y = x @ W
    y += b
    return y, (x, W)


def linear_backward(dout, cache):
    """dx = dout W^T, dW = x^T dout, db = sum_n dout.   dout (N, K) -> dx (N, D), dW (D, K), db (K,)."""
    x, W = cache
    return dout @ W.T, x.T @ dout, dout.sum(axis=0)     # b was broadcast over N, so sum over N


def relu_forward(x):
    """y = max(x, 0), entry by entry."""
    return np.maximum(x, 0), x


def relu_backward(dout, cache):
    """dx = dout where x > 0, else 0."""
    x = cache
    return dout * (x > 0)


def sigmoid(z):
    """1 / (1 + e^-z), written with tanh, which cannot overflow."""
    return 0.5 * np.tanh(0.5 * z) + 0.5


def sigmoid_forward(x):
    """y = 1 / (1 + e^-x)."""
    y = sigmoid(x)
    return y, y


def sigmoid_backward(dout, cache):
    """dx = dout y (1 - y)."""
    y = cache
    return dout * y * (1 - y)


def tanh_forward(x):
    """y = tanh x."""
    y = np.tanh(x)
    return y, y


def tanh_backward(dout, cache):
    """dx = dout (1 - y^2)."""
    y = cache
    return dout * (1 - y * y)


def silu_forward(x):
    """y = x s(x), s the sigmoid (Elfwing et al. 2017)."""
    s = sigmoid(x)
    return x * s, (x, s)


def silu_backward(dout, cache):
    """dx = dout (s + x s (1 - s)), the product rule."""
    x, s = cache
    return dout * (s + x * s * (1 - s))


GELU_C = (2 / math.pi) ** 0.5


def gelu_forward(x):
    """y = x h, h = 1/2 + tanh(c (x + 0.044715 x^3)) / 2, c = sqrt(2 / pi): x times the normal distribution, nearly."""
    h = x * x                                           # in place: passes over memory are what takes the time
    h *= GELU_C * 0.044715
    h += GELU_C
    h *= x
    np.tanh(h, out=h)
    h *= 0.5
    h += 0.5
    return x * h, (x, h)


def gelu_backward(dout, cache):
    """dx = dout (h + x h'), and h' = 2 h (1 - h) c (1 + 3 0.044715 x^2), as for a sigmoid.   The order of the lines is
    dx = (((6 0.044715 c x^2 + 2 c) x (1 - h)) + 1) h dout."""
    x, h = cache
    dx = x * x
    dx *= 6 * 0.044715 * GELU_C
    dx += 2 * GELU_C
    dx *= x
    dx *= 1 - h
    dx += 1
    dx *= h
    dx *= dout
    return dx


def batchnorm_forward(x, gamma, beta, running=None, eps=1e-5):
    """y = gamma xhat + beta, xhat = (x - mean) / sqrt(var + eps), over the rows of x, or in evaluation by the running
    (mean, var) from training.   x (N, D), gamma, beta, mean, var (D,) -> y (N, D)."""
    mean = x.mean(axis=0) if running is None else running[0]
    xhat = x - mean
    var = (xhat * xhat).mean(axis=0) if running is None else running[1]
    inv_std = (var + eps) ** -0.5
    xhat *= inv_std
    return gamma * xhat + beta, (xhat, gamma, inv_std, running is None, mean, var)


def batchnorm_backward(dout, cache):
    """dgamma = sum_n dout xhat, dbeta = sum_n dout, dx as derived above; in evaluation mean and std are constants."""
    xhat, gamma, inv_std, training, _, _ = cache
    dgamma, dbeta = (dout * xhat).sum(axis=0), dout.sum(axis=0)
    if not training:
        return dout * (gamma * inv_std), dgamma, dbeta
    return (dout - (dbeta + xhat * dgamma) / len(dout)) * (gamma * inv_std), dgamma, dbeta


def embedding_forward(ids, E):
    """The row of E that each number names.   ids (...) integers, E (V, D) -> (..., D)."""
    return E[ids], (ids, E.shape)


def embedding_backward(dout, cache):
    """A row of E gets the sum of dout over the places where it stands: a product with a (V, places) table of 0, 1."""
    ids, shape = cache
    stands = np.arange(shape[0])[:, None] == ids.ravel()
    return stands.astype(dout.dtype) @ dout.reshape(-1, shape[1])


def mse_forward(z, targets):
    """mean[(z - y)^2].   z (N, K), targets (N, K) -> scalar."""
    return ((z - targets) ** 2).mean(), (z, targets)


def mse_backward(dout, cache):
    """dz = 2 (z - y) / size.   dout scalar -> dz (N, K)."""
    z, targets = cache
    return (z - targets) * (2 * dout / z.size)


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


def penalty_forward(W, l1, l2):
    """l1 sum |W| + l2 / 2 sum W^2: large weights cost.   W (D, M), l1 and l2 numbers -> scalar."""
    return l1 * np.abs(W).sum() + 0.5 * l2 * (W * W).sum(), (W, l1, l2)


def penalty_backward(dout, cache):
    """dW = dout (l1 sign W + l2 W)."""
    W, l1, l2 = cache
    return dout * (l1 * np.sign(W) + l2 * W)


ACTIVATIONS = {"relu": (relu_forward, relu_backward), "sigmoid": (sigmoid_forward, sigmoid_backward),
               "tanh": (tanh_forward, tanh_backward), "gelu": (gelu_forward, gelu_backward),
               "silu": (silu_forward, silu_backward)}
LOSSES = {"mse": (mse_forward, mse_backward),
          "binary": (binary_cross_entropy_forward, binary_cross_entropy_backward),
          "softmax": (softmax_cross_entropy_forward, softmax_cross_entropy_backward)}
INITS = {"he": lambda D, M: (2 / D) ** 0.5, "xavier": lambda D, M: (2 / (D + M)) ** 0.5,
         "normal": lambda D, M: 1.0, "small": lambda D, M: 0.01}                # standard deviation of W (D, M)


# ---- model: L hidden layers, then a linear one -----------------------------------------------------------------------

def loss_name(cfg):
    """The loss that auto stands for."""
    return cfg.loss if cfg.loss != "auto" else "binary" if cfg.task in ("demo", "xor", "gates") else "softmax"


def init_params(cfg, rng, dtype=np.float32):
    """W0, b0, W1, b1, ...; under BatchNorm gamma and beta in place of b; E, the embedding of the letters, for names."""
    D, K = task_sizes(cfg)
    params, left = {}, cfg.context if cfg.task == "names" else 1            # left: positions still to be joined
    if cfg.task == "names":
        params["E"], D = rng.standard_normal((K, cfg.embed)), cfg.embed
    widths = [int(w) for w in cfg.hidden.split(",")]
    for i, M in enumerate([*widths, 1 if K == 2 and loss_name(cfg) != "softmax" else K]):
        join = min(cfg.group or left, left)
        params[f"W{i}"] = rng.standard_normal((join * D, M)) * INITS[cfg.init](join * D, M)
        if cfg.batchnorm and i < len(widths):
            params[f"gamma{i}"], params[f"beta{i}"] = np.ones(M), np.zeros(M)
        else:
            params[f"b{i}"] = np.zeros(M)
        D, left = M, left // join
    return {name: value.astype(dtype) for name, value in params.items()}


def mlp_forward(params, x, cfg, running=None):
    """x (N, D), or for names letters (N, context) -> z (N, K). With running, the BatchNorm statistics, it evaluates."""
    layers, ids_cache, depth = [], None, cfg.hidden.count(",") + 1
    act_forward, _ = ACTIVATIONS[cfg.activation]
    if "E" in params:
        x, ids_cache = embedding_forward(x, params["E"])
    for i in range(depth + 1):
        shape, W = x.shape, params[f"W{i}"]
        x = x.reshape(-1, len(W))       # names: the rows of neighbouring letters become one row; elsewhere no change
        norm_cache = act_cache = None
        x, linear_cache = linear_forward(x, W, params.get(f"b{i}", 0.0))
        if f"gamma{i}" in params:       # it takes the mean away, and any bias with it, so there is none
            x, norm_cache = batchnorm_forward(x, params[f"gamma{i}"], params[f"beta{i}"], running and running[i])
        if i < depth:
            x, act_cache = act_forward(x)
        layers.append((shape, linear_cache, norm_cache, act_cache))
    return x, (ids_cache, layers, cfg)


def mlp_backward(dout, cache):
    """mlp_forward from bottom to top -> gradients under the keys of params."""
    (ids_cache, layers, cfg), grads = cache, {}
    _, act_backward = ACTIVATIONS[cfg.activation]
    for i, (shape, linear_cache, norm_cache, act_cache) in reversed(list(enumerate(layers))):
        if i < len(layers) - 1:
            dout = act_backward(dout, act_cache)
        if norm_cache is not None:
            dout, grads[f"gamma{i}"], grads[f"beta{i}"] = batchnorm_backward(dout, norm_cache)
        dout, grads[f"W{i}"], db = linear_backward(dout, linear_cache)
        if norm_cache is None:
            grads[f"b{i}"] = db
        dout = dout.reshape(shape)
    if ids_cache is not None:
        grads["E"] = embedding_backward(dout, ids_cache)
    return grads


def loss_and_grads(params, batch, cfg, running=None):
    """One forward and one backward pass -> loss, gradients under the keys of params. If given, running, a list of
    BatchNorm's (mean, var) by layer, moves a tenth of the way to the statistics of this batch."""
    x, targets = batch
    loss_forward, loss_backward = LOSSES[loss_name(cfg)]
    z, cache = mlp_forward(params, x, cfg)
    loss, loss_cache = loss_forward(z, targets)
    grads = mlp_backward(loss_backward(1.0, loss_cache), cache)
    for name, W in params.items():
        if name[0] == "W" and (cfg.l1 or cfg.l2):
            cost, penalty_cache = penalty_forward(W, cfg.l1, cfg.l2)
            loss = loss + cost
            grads[name] = grads[name] + penalty_backward(1.0, penalty_cache)    # W is used twice, so gradients add
    if running is not None:
        for i, (_, _, norm_cache, _) in enumerate(cache[1][:len(running)]):
            running[i] = tuple(0.9 * old + 0.1 * new for old, new in zip(running[i], norm_cache[-2:]))
    return loss, grads


# ---- optimizers: how a gradient becomes a step -----------------------------------------------------------------------

def sgd_update(params, grads, state, lr):
    """w <- w - lr g."""
    for name, g in grads.items():
        params[name] -= lr * g


def momentum_update(params, grads, state, lr, mu=0.9):
    """s <- mu s + g,  w <- w - lr s: a ball that keeps rolling."""
    for name, g in grads.items():
        s = state[name] = mu * state.get(name, 0.0) + g
        params[name] -= lr * s


def adam_update(params, grads, state, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """m, v: running means of g and g^2, over 1 - beta^t since they start at 0;  w <- w - lr m / (sqrt v + eps)."""
    t = state["t"] = state.get("t", 0) + 1
    step, scale = lr / (1 - beta1 ** t), (1 - beta2 ** t) ** -0.5
    for name, g in grads.items():
        if "m " + name not in state:
            state["m " + name], state["v " + name] = np.zeros_like(g), np.zeros_like(g)
        m, v = state["m " + name], state["v " + name]
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        params[name] -= step * m / (np.sqrt(v) * scale + eps)


def adamw_update(params, grads, state, lr, decay=0.01):
    """Adam, and every matrix shrinks by lr decay, whatever its gradient was."""
    for W in params.values():
        if W.ndim > 1:
            W *= 1 - lr * decay
    adam_update(params, grads, state, lr)


UPDATES = {"sgd": sgd_update, "momentum": momentum_update, "adam": adam_update, "adamw": adamw_update}


def learning_rate(step, cfg):
    """lr at a step: up from 0 in warmup steps; then constant, or a tenth from 60 % and a hundredth from 85 % on (step),
    or down a half cosine to 0."""
    rise, done = min(1, step / max(cfg.warmup, 1)), step / cfg.steps
    course = {"constant": 1, "step": 1 if done < 0.6 else 0.1 if done < 0.85 else 0.01,
              "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return cfg.lr * rise * course[cfg.schedule]


# ---- data ------------------------------------------------------------------------------------------------------------

GATES = {"AND": (0, 0, 0, 1), "OR": (0, 1, 1, 1), "NAND": (1, 1, 1, 0), "XOR": (0, 1, 1, 0)}
ROWS = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])

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


def task_sizes(cfg):
    """Inputs and classes; of gates, yes-or-no answers; of names, letters twice."""
    if cfg.task == "names":
        V = len(load_windows(cfg.data, cfg.context)["chars"])
        return V, V
    return {"gates": (2, 4), "mnist": (784, 10)}.get(cfg.task, (2, 2))


def make_batch(cfg, rng, dtype=np.float32):
    """The four rows, fresh points on two spirals, or a random batch of the training data -> x, targets."""
    if cfg.task in ("names", "mnist"):
        x, labels = load_split(cfg, "train")
        pick = rng.integers(0, len(x), cfg.batch)
        return encode(x[pick], labels[pick], cfg, dtype)
    if cfg.task == "spirals":
        labels = np.arange(cfg.batch) % 2
        turn = 3 * np.pi * np.sqrt(rng.random(cfg.batch))
        x = turn / 2 * np.array([np.cos(turn + np.pi * labels), np.sin(turn + np.pi * labels)])
        return encode(x.T + 0.1 * rng.standard_normal((cfg.batch, 2)), labels, cfg, dtype)
    return encode(ROWS, np.array(list(GATES.values())).T if cfg.task == "gates" else np.array(GATES["XOR"]), cfg, dtype)


def encode(x, labels, cfg, dtype=np.float32):
    """Inputs in dtype, but letters as they are; class numbers for softmax, columns of 0 and 1 for the other losses."""
    if loss_name(cfg) != "softmax":
        K = task_sizes(cfg)[1]
        labels = (labels if labels.ndim == 2 else labels[:, None] if K == 2 else np.eye(K)[labels]).astype(dtype)
    return x if cfg.task == "names" else x.astype(dtype, copy=False), labels


def load_split(cfg, split):
    """train, validation or test of a task with a data set -> x, labels."""
    return (load_mnist(cfg.data) if cfg.task == "mnist" else load_windows(cfg.data, cfg.context))[split]


@functools.lru_cache
def load_windows(path, context):
    """Every letter of the names, and the letters before it -> {"chars": ..., "train": (x, y), "validation", "test"}."""
    words = read_words(path)
    chars = "." + "".join(sorted(set("".join(words))))      # . stands before and behind every word
    index, data = {c: i for i, c in enumerate(chars[1:], 1)}, {"chars": chars}
    for split, part in zip(("train", "validation", "test"), split_words(words)):
        stream, real = [], []
        for word in part:
            stream += [0] * context + [index[c] for c in word] + [0]
            real += [False] * context + [True] * (len(word) + 1)
        windows = np.lib.stride_tricks.sliding_window_view(stream, context + 1)[np.array(real[context:])]
        data[split] = windows[:, :-1].copy(), windows[:, -1].copy()
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

def train_mlp(cfg, rng, quiet=False):
    """-> params, running statistics of BatchNorm (or None), progress."""
    params, state = init_params(cfg, rng), {}
    running = [(0 * params[name], params[name]) for name in params if name[:5] == "gamma"] or None     # mean 0, var 1
    update = functools.partial(adamw_update, decay=cfg.decay) if cfg.optimizer == "adamw" else UPDATES[cfg.optimizer]
    progress = Progress(cfg.steps, quiet=quiet)
    for step in progress:
        loss, grads = loss_and_grads(params, make_batch(cfg, rng), cfg, running)
        update(params, grads, state, learning_rate(step, cfg))
        progress.report(loss, lambda: "  validation {:.4f}, {:.2%} right".format(
            *evaluate(params, running, cfg, "validation")) if cfg.task in ("names", "mnist") else "")
    return params, running, progress


def evaluate(params, running, cfg, split):
    """Loss without penalty, share of right answers: on the rows of xor, gates; fresh points of spirals; a split."""
    if cfg.task in ("names", "mnist"):
        x, targets = encode(*load_split(cfg, split), cfg)
    else:
        x, targets = make_batch(replace(cfg, batch=2000), np.random.default_rng(cfg.seed + 1000))
    z = np.concatenate([mlp_forward(params, part, cfg, running)[0] for part in np.array_split(x, -(-len(x) // 2000))])
    loss = LOSSES[loss_name(cfg)][0](z, targets)[0]
    if targets.ndim == 1:
        right = z.argmax(axis=1) == targets
    elif cfg.task in ("names", "mnist"):
        right = z.argmax(axis=1) == targets.argmax(axis=1)
    else:
        right = (z > (0.5 if loss_name(cfg) == "mse" else 0)) == targets
    return float(loss), float(right.mean())


def announce(cfg, params, text):
    """What is being learned, and by what."""
    print(f"\n{text}: hidden {cfg.hidden}, {cfg.activation}, init {cfg.init}, batchnorm {cfg.batchnorm}, "
          f"{cfg.optimizer}, lr {cfg.lr}, {sum(p.size for p in params.values())} parameters")
    K = task_sizes(cfg)[1]
    share = 1 / K if cfg.task in ("names", "mnist") else 1 / 2                  # of 1 among the targets
    chance = {"softmax": math.log(K), "binary": math.log(2), "mse": share * (1 - share)}
    print(f"chance level: loss {chance[loss_name(cfg)]:.3f}")


def learn_plane(cfg, rng):
    """xor, gates or spirals, with a picture of what every output says in the plane."""
    text = {"xor": "XOR", "gates": "Four gates at once", "spirals": "Two spirals"}[cfg.task]
    announce(cfg, init_params(cfg, rng), text)
    params, running, progress = train_mlp(cfg, rng)
    loss, right = evaluate(params, running, cfg, "test")
    print("loss", loss_curve(progress.losses))

    def prob(k):
        def of_points(points):
            z, _ = mlp_forward(params, points.astype(np.float32), cfg, running)
            if loss_name(cfg) == "softmax":
                return sigmoid(z[:, 1] - z[:, 0])           # softmax of two classes is a sigmoid
            return sigmoid(z[:, k]) if loss_name(cfg) == "binary" else z[:, k]
        return of_points
    x, targets = make_batch(replace(cfg, batch=200), rng)
    targets = targets.reshape(len(x), -1).T
    size = (64, 32) if cfg.task == "spirals" else (24, 12)
    print(side_by_side(list(GATES) if cfg.task == "gates" else ["dark: the net says x"],
                       [draw_regions(prob(k), x, y, *size) for k, y in enumerate(targets)]))
    fresh = "2000 fresh points" if cfg.task == "spirals" else "the four rows"
    print(f"loss {loss:.6f}, {right:.2%} right on {fresh}")
    return {"accuracy": right, "loss": loss}, params, progress


def learn_letters(cfg, rng):
    """The next letter of a name, from the letters before it."""
    data = load_windows(cfg.data, cfg.context)
    chars = data["chars"]
    announce(cfg, init_params(cfg, rng), f"Names, {len(data['train'][0])} letters to guess from {cfg.context} before, "
             + (f"joined {cfg.group} at a time" if cfg.group else "joined at once"))
    params, running, progress = train_mlp(cfg, rng)
    print("loss", loss_curve(progress.losses))
    E = params["E"] / np.linalg.norm(params["E"], axis=1, keepdims=True)
    near = (E @ E.T - 2 * np.eye(len(E))).argmax(axis=1)
    print("nearest in the embedding:", " ".join(f"{a}-{chars[b]}" for a, b in zip(chars, near)))
    names = []
    for _ in range(10):
        letters = [0] * cfg.context
        while len(letters) == cfg.context or letters[-1] and len(letters) < cfg.context + 20:
            z, _ = mlp_forward(params, np.array([letters[-cfg.context:]]), cfg, running)
            p = np.exp(z[0].astype(float) - z.max())
            letters.append(rng.choice(len(p), p=p / p.sum()))
        names.append("".join(chars[i] for i in letters[cfg.context:] if i))
    print("invented:", ", ".join(names))
    loss, right = evaluate(params, running, cfg, "test")
    expected = f"   (expected on names.txt: {2.0 if cfg.group else 2.1})" if cfg.data else ""
    print(f"test loss {loss:.4f} nats a letter{expected}")
    return {"loss": loss, "accuracy": right}, params, progress


def learn_digits_deep(cfg, rng):
    """Handwritten digits."""
    require(cfg.data, "--data", "the folder of MNIST (--help says where to get it)", cfg.data)
    x, y = load_split(cfg, "test")
    announce(cfg, init_params(cfg, rng), f"Digits, {len(load_split(cfg, 'train')[0])} pictures of 28 x 28 pixels")
    params, running, progress = train_mlp(cfg, rng)
    print("loss", loss_curve(progress.losses))
    guess = mlp_forward(params, x, cfg, running)[0].argmax(axis=1)
    wrong = np.flatnonzero(guess != y)[:5]
    ink = (x[wrong].reshape(-1, 14, 2, 28).mean(axis=2) + 0.4) / 3              # half the rows: letters are tall
    print(side_by_side([f"a {y[n]} read as {guess[n]}" for n in wrong],
                       [["".join(row) for row in shade(picture)] for picture in ink]))
    loss, right = evaluate(params, running, cfg, "test")
    print(f"test accuracy {right:.4f} on {len(y)} pictures (expected 0.984)")
    return {"accuracy": right, "loss": loss}, params, progress


def compare_inits(cfg, rng):
    """Spread of activations and of weight gradients, layer by layer, before any training."""
    print("\nWhy initialisation matters: 8 layers of 100 before training, standard deviation of activations (a) and\n"
          "of the gradients of W (dW) by layer. It should neither grow nor vanish from left to right (a), "
          "right to left (dW).")
    print(f"{'':26s}" + "".join(f"{f'layer {i}':>9s}" for i in range(1, 9)))
    for activation in ("tanh", "relu"):
        for init in INITS:
            part = replace(cfg, task="mnist", data="", hidden="100" + ",100" * 7, activation=activation, init=init)
            params, batch = init_params(part, rng), make_batch(part, rng)
            _, (_, layers, _) = mlp_forward(params, batch[0], part)
            _, grads = loss_and_grads(params, batch, part)
            spread = {"a": [layer[1][0].std() for layer in layers[1:]], "dW": [grads[f"W{i}"].std() for i in range(8)]}
            for name, values in spread.items():
                print(f"{activation:>8s} {init:>12s} {name:>4s}" + "".join(f"{v:9.1e}" for v in values))
    return {}


def compare_optimizers(cfg, rng):
    """The same net on the same problem from the same start, once with every optimizer."""
    print(f"\nEvery optimizer on two spirals, {cfg.steps} steps from the same start; loss from first to last:")
    figures = {}
    for name, lr in (("sgd", 0.5), ("momentum", 0.1), ("adam", 0.01), ("adamw", 0.01)):
        part = replace(cfg, task="spirals", optimizer=name, lr=lr)
        params, running, progress = train_mlp(part, np.random.default_rng(cfg.seed), quiet=True)
        if progress.stopped:
            break
        loss, right = evaluate(params, running, part, "test")
        curve = loss_curve(progress.losses, 50)
        print(f"{name:>8s}  lr {lr:<5}|{curve}|  loss {loss:.4f}  {right:.2%} right on fresh points")
        figures[name] = right
    return figures


def main(cfg):
    """Run one task or experiment, or all parts of the demo."""
    start, rng, figures = time.perf_counter(), np.random.default_rng(cfg.seed), {}
    learn = {"names": learn_letters, "mnist": learn_digits_deep}
    examples, seconds, size, steps, demo = 0, 0.0, 0, 0, False
    print("mlp.py: layers on layers, trained by backpropagation")
    if cfg.experiment == "none":
        for task in ("xor", "spirals") if cfg.task == "demo" else (cfg.task,):
            found, params, progress = learn.get(task, learn_plane)(replace(cfg, task=task), rng)
            figures.update({f"{task}_{name}" if cfg.task == "demo" else name: value for name, value in found.items()})
            examples += progress.step * (4 if task in ("xor", "gates") else cfg.batch)
            seconds, steps = seconds + progress.seconds, steps + progress.step
            size, demo = sum(p.size for p in params.values()), cfg.task == "demo" and not progress.stopped
            if progress.stopped:
                break
    if cfg.experiment == "init" or demo:
        figures.update(compare_inits(cfg, rng))
    if cfg.experiment == "optimizers" or demo:
        figures.update(compare_optimizers(cfg, rng))
    print("\nNext: python mlp.py --hidden 2      python mlp.py --task spirals --activation relu --lr 0.003")
    print_result(task=cfg.task, **figures, params=size, steps=steps, seconds=time.perf_counter() - start,
                 examples_per_s=int(examples / max(seconds, 1e-9)))


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
