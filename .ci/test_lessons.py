"""What only one lesson has: its data files, its masks, its identities."""
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
from lessons import (LESSONS, NEW, cifar_archive, cifar_folder, is_refused, lesson, load, metrics,
                     mnist_folder)
from tasks import FILE, FLOORS


# ---- pictures ------------------------------------------------------------------------------------

def pixels(path):
    """A PNG file, read chunk by chunk -> (H, W, 3); every checksum has to hold."""
    raw, body, at = path.read_bytes(), b"", 8
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(raw):
        size, name = int.from_bytes(raw[at:at + 4], "big"), raw[at + 4:at + 8]
        chunk = raw[at + 8:at + 8 + size]
        assert zlib.crc32(name + chunk) == int.from_bytes(raw[at + 8 + size:at + 12 + size], "big")
        if name == b"IHDR":
            width, height = (int.from_bytes(chunk[k:k + 4], "big") for k in (0, 4))
        body += chunk * (name == b"IDAT")
        at += 12 + size
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, 1 + 3 * width)
    assert name == b"IEND" and not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


DIGITS = [("vae.py", "mnist"), ("diffusion.py", "mnist")]


def drawing_tasks():
    """(lesson, task) of every built-in task with --png, and of those that draw digits."""
    return [(name, task) for name in NEW for task, row in load(name).TASKS.items()
            if "png" in {f.name for f in fields(row.config)}
            and (FLOORS[name][task] != FILE or (name, task) in DIGITS)]


@pytest.mark.parametrize("name, task", drawing_tasks())
def test_picture(name, task, tmp_path):
    """There is something in it; a folder, or a place where nothing can be written, is refused."""
    file, few = tmp_path / "a.png", [task, "--steps", "2"]
    if (name, task) in DIGITS:
        few += ["--data", mnist_folder(tmp_path / "mnist")]
    done = lesson(name, *few, "--png", str(file))
    assert metrics(done) and f"{file}: " in done.stdout
    assert len(np.unique(pixels(file).reshape(-1, 3), axis=0)) > 2
    assert {path.name for path in tmp_path.iterdir()} <= {"a.png", "mnist"}
    for wrong in (tmp_path, tmp_path / "nowhere" / "a.png"):
        is_refused(lesson(name, *few, "--png", str(wrong)), "--png", str(wrong))


# ---- what several lessons have -------------------------------------------------------------------

def lessons_with(function):
    return [name for name in LESSONS if hasattr(load(name), function)]


@pytest.mark.parametrize("name", lessons_with("clip_norm"))
def test_clipping_of_what_explodes(name):
    """Squares of 1e20 are infinite in float32; the gradient has to keep its direction all the same."""
    grads = {"a": np.array([3e20, 0], np.float32), "b": np.array([[4e20]], np.float32)}
    assert abs(load(name).clip_norm(grads, 1.0) / 5e20 - 1) < 1e-6
    assert np.allclose(grads["a"], [0.6, 0]) and np.allclose(grads["b"], 0.8)


@pytest.mark.parametrize("name, task", [("attention.py", "pairs"), ("translation.py", "pairs"),
                                        ("transformer.py", "text"), ("mae.py", "probe")])
def test_threads_keep_float32(name, task):
    m = load(name)
    row = m.TASKS[task]
    cfg = row.config(batch_size=5, threads=2)
    params, batch = row.init_params(cfg, np.random.default_rng(0)), row.make_batch(cfg, 1)
    with ThreadPoolExecutor(2) as pool:
        loss, grads = m.threaded_loss_and_grads(row.loss_and_grads, pool, params, batch, cfg)
    assert {g.dtype for g in grads.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", lessons_with("draw_map"))
def test_a_map_with_long_names(name, capsys):
    """Every weight stands below the name of its column, however long the name of its row is."""
    load(name).draw_map(np.eye(2), ["a", "a restaurant"], ["left", "right"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.index("@") for line in lines[-2:]] == [lines[-3].index("t"), lines[-3].rindex("t")]


# ---- attention.py --------------------------------------------------------------------------------

PAIRS = ["pairs", "--steps", "20", "--hidden", "16", "--batch-size", "8", "--vocab-size", "100"]


def test_pairs_file(tmp_path):
    file = tmp_path / "pairs.tsv"
    good = [f"one {n} two\tzwei {n} eins" for n in range(60)]
    for lines, words in ((good[:5], ["20"]), ([], ["empty"]), (["no tab"] * 40, ["20", "TAB"])):
        file.write_text("\n".join(lines), encoding="utf-8")
        is_refused(lesson("attention.py", *PAIRS, "--data", str(file)), "pairs.tsv", *words)
    file.write_bytes("caf\xe9\tcoffee\n".encode("latin-1") * 30)
    is_refused(lesson("attention.py", *PAIRS, "--data", str(file)), "pairs.tsv", "UTF-8", "0xe9")
    file.write_text("\n".join([*good[:7], "no tab here", "\tb", *good[7:]]), encoding="utf-8")
    is_refused(lesson("attention.py", *PAIRS, "--data", str(file), "--batch-size", "99"),
               "--batch-size", "at most 54")
    done = lesson("attention.py", *PAIRS, "--data", str(file))
    assert "validation" in metrics(done) and "dropped: 2 without TAB or a side" in done.stdout


def test_pairs_with_more_columns(tmp_path):
    """The first two columns are used, and it is said."""
    file, outputs = tmp_path / "pairs.tsv", []
    for more in ("", "\tthree"):
        file.write_text("".join(f"{n} is\t{7 * n}{more}\n" for n in range(100)), encoding="utf-8")
        outputs.append(lesson("attention.py", *PAIRS, "--data", str(file)))
    assert "first two" in outputs[1].stdout and "first two" not in outputs[0].stdout
    plain, extra = (re.search(r"validation=\S+", done.stdout)[0] for done in outputs)
    assert plain == extra


def test_pairs_that_hold_special_tokens(tmp_path):
    """Words of the data that are spelled as a special token are words."""
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"<eos> {n} . <pad>\t{n} <bos> .\n" for n in range(100)), encoding="utf-8")
    attention = load("attention.py")
    data = attention.pairs_of(attention.Pairs(data=str(file)))
    assert all(len(set(vocab)) == len(vocab) for vocab in data["vocabs"])
    for pair in data["train"]:
        for tokens, ids in zip(pair, data["ids"]):
            assert min(attention.encode(tokens, ids)) >= attention.UNK


@pytest.mark.parametrize("score", ["additive", "dot", "general"])
@pytest.mark.parametrize("input_feeding", [False, True])
def test_padding_gets_no_attention(score, input_feeding):
    a = load("attention.py")
    cfg = a.Dates(score=score, input_feeding=input_feeding, hidden=8, batch_size=6)
    params = a.init_dates(cfg, np.random.default_rng(0), np.float64)
    padding_changes_nothing(a, cfg, params, a.dates_batch(cfg, 1), a.model_loss_and_grads)
    source, target = a.dates_batch(cfg, 1)
    _, (w, *_) = a.translator_forward(params, source, target, a.decoder_of(cfg)[0])
    on_padding = np.broadcast_to((source == a.PAD)[:, None], w.shape)
    assert on_padding.any() and not w[on_padding].any() and np.allclose(w.sum(axis=2), 1)


def test_padding_without_attention():
    a = load("attention.py")
    cfg = a.Lengths(hidden=8, batch_size=6)
    params = a.init_bottleneck(cfg, np.random.default_rng(0), np.float64)
    padding_changes_nothing(a, cfg, params, a.make_batch(cfg, 1), a.bottleneck_loss_and_grads)


def padding_changes_nothing(module, cfg, params, batch, loss_and_grads):
    """Neither loss nor gradients depend on columns of padding, nor on the embedding of padding."""
    source, target, *rest = batch
    loss, grads = loss_and_grads(params, batch, cfg)
    other = {**params, "E_source": params["E_source"].copy()}
    other["E_source"][module.PAD] += 3
    longer = [np.pad(ids, ((0, 0), (0, 4)), constant_values=module.PAD) for ids in (source, target)]
    loss2, grads2 = loss_and_grads(other, (*longer, *rest), cfg)
    assert abs(loss - loss2) < 1e-13
    for name, g in grads.items():
        assert np.isfinite(g).all() and np.abs(g - grads2[name]).max() < 1e-13, name
    assert not grads["E_source"][module.PAD].any()


# ---- mae.py --------------------------------------------------------------------------------------

def test_mae_depends_on_visible_patches_only():
    mae = load("mae.py")
    rng, (x, visible, masked) = np.random.default_rng(0), mae.make_batch(mae.Config(batch_size=5), 1, np.float64)[:3]
    for norm in (False, True):
        cfg = mae.Probe(norm_pixels=norm, batch_size=5)
        params = mae.init_images(cfg, rng, np.float64)
        other = x.copy()
        np.put_along_axis(other, masked[:, :, None], rng.standard_normal((*masked.shape, x.shape[2])), axis=1)
        a, b = (mae.reconstruct(params, images, visible, masked, cfg) for images in (x, other))
        a, b = (out[0] if isinstance(out, tuple) else out for out in (a, b))
        assert np.array_equal(a, b) and masked.shape[1] == 3 * visible.shape[1]


def test_mae_on_cifar(tmp_path):
    common = ["cifar", "--dim", "8", "--layers", "1", "--steps", "6", "--batch-size", "8", "--warmup", "2"]
    archive, png = cifar_archive(tmp_path), tmp_path / "a.png"
    done = lesson("mae.py", *common, "--data", archive, "--png", str(png), "--finetune", "--shift")
    assert "summed over 6 views" in done.stdout and {"error", "finetuned"} <= metrics(done).keys()
    assert pixels(png).shape == (6 * (4 * 32 + 8), 6 * (4 * 32 + 8), 3)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_features_of_views(shift, flip, monkeypatch, capsys):
    """The probe's features are the sum over the image shifted and mirrored; pixels are as they are."""
    m, rng, described = load("mae.py"), np.random.default_rng(0), []
    cfg = m.Cifar(dim=8, layers=2, shift=shift, flip=flip)
    params, images = m.init_images(cfg, rng, np.float64), m.images_of(cfg, "test")[0][:7]
    monkeypatch.setattr(m, "probe", lambda describe, cfg: described.append(describe) or [1.0, 1.0, 1.0])
    m.compare_probes(params, cfg)
    views = []
    for offset in (-1, 0, 1) if shift else (0,):
        at = abs(np.arange(32) + offset)                # -1 becomes 1
        at = 31 - abs(31 - at)                          # 32 becomes 30
        views += [images[:, at][:, :, columns] for columns in ((at, at[::-1]) if flip else (at,))]
    raw, untrained, trained, *raw_views = [describe(images) for describe in described]
    expected = sum(m.encoder_features(params, cfg, view) for view in views)
    assert np.allclose(trained, expected, rtol=1e-6) and not np.allclose(untrained, expected, rtol=1e-2)
    flat = [m.standardize(view).reshape(7, -1) for view in (images, *views)]
    assert np.array_equal(raw, flat[0]) and len(raw_views) == (len(views) > 1)
    assert all(np.allclose(pixels, sum(flat[1:]), atol=1e-4) for pixels in raw_views)
    assert ("summed over" in capsys.readouterr().out) == (len(views) > 1)


def test_cifar_files(tmp_path):
    """Cut, damaged, or another archive: one line each that says what was expected."""
    folder = cifar_folder(tmp_path)
    lessons = [name for name in ("mae.py", "cnn.py") if "cifar" in getattr(load(name), "TASKS", {})]
    for name in lessons:
        task = [name, "cifar", "--steps", "2", "--batch-size", "8", "--data"]
        archive = tmp_path / "cifar-10-binary.tar.gz"
        assert metrics(lesson(*task, cifar_archive(tmp_path)))["task"] == "cifar"
        raw = archive.read_bytes()
        for damaged, words in ((raw[:-2000], "cifar-10-binary.tar.gz"), (b"no archive", "cifar")):
            archive.write_bytes(damaged)
            is_refused(lesson(*task, str(archive)), words)
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder / "data_batch_1.bin", arcname="cifar-10-batches-py/data_batch_1")
        is_refused(lesson(*task, str(archive)), "data_batch_1.bin")
        good = (folder / "test_batch.bin").read_bytes()
        is_refused(lesson(*task, str(cifar_folder(tmp_path, data_batch_2=good[:-9]))), "data_batch_2", "3073")
        cifar_folder(tmp_path, data_batch_2=good)


# ---- cnn.py --------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_views(shift, flip):
    """In evaluation the logits of an image are the sum over the image shifted and mirrored."""
    m, rng = load("cnn.py"), np.random.default_rng(0)
    cfg = m.Net(channels=2, shift=shift, flip=flip, threads=2)
    params, x = m.init_net(cfg, rng, np.float64), rng.standard_normal((120, 16, 16, 3))
    _, _, running = m.net_loss_and_grads(params, m.net_batch(cfg, 1, np.float64), cfg)
    expected = 0
    for offset in (-1, 0, 1) if shift else (0,):
        at = abs(np.arange(16) + offset)                # -1 becomes 1
        at = 15 - abs(15 - at)                          # 16 becomes 14
        for columns in (at, at[::-1]) if flip else (at,):
            view = x[:, at][:, :, columns]
            expected = expected + m.convnet_forward(params, view, cfg, None, running)[0]
    assert np.allclose(m.predict(params, x, cfg, running), expected, rtol=1e-12, atol=1e-12)


# ---- nested_attention.py, transformer.py, gan.py, lstm.py ----------------------------------------

def test_share_of_the_memory_map():
    """A token counts if its source has the largest weight alone."""
    m = load("nested_attention.py")
    key, junk = np.zeros((4, 1), int), np.array([[0], [0], [0], [0]])
    weights = np.zeros((1, 4, 4))
    for row, values in ((1, [1]), (2, [1, 1]), (3, [0, 0, -2])):    # right, undecided, right
        weights[0, row, :len(values)] = values
    assert m.memory_map(weights, key, junk)[0] == 2 / 3


def test_share_of_masked_characters():
    m = load("transformer.py")
    for ratio in (0.2, 0.001):
        ids, targets = m.fill_batch(m.Fill(mask_ratio=ratio, batch_size=2000), 1)
        masked = ids == m.MASK
        assert masked.any(axis=1).all() and np.array_equal(masked, targets >= 0)
        assert abs(masked.mean() - max(ratio, 1 / ids.shape[1])) < 0.005


def test_a_digit_per_mode():
    m = load("gan.py")
    ring = m.draw_ring(np.random.default_rng(0), 4000)
    angle = np.arctan2(ring[:, 1], ring[:, 0])
    for points in (ring, ring[abs(angle) < 0.2]):
        digits = m.mode_digits(points)
        assert len(digits) == 8 and not set(digits) - set(".0123456789")
    assert sorted(digits) == [*"......."[:7], "9"]


def test_cells_that_matter_at_the_end(capsys):
    """Of a long sequence the first 70 steps are drawn; the cells are those of its last step."""
    m, rng = load("lstm.py"), np.random.default_rng(0)
    params, x = m.init_params(m.Config(), rng), rng.uniform(-1, 1, (101, 1, 1)).astype(np.float32)
    m.draw_cells(params, x)
    _, (_, (h, *_), _, _) = m.remember_forward(params, x)
    largest = np.argsort(-abs(h[-1, 0] * params["Wo"][:, 0]))[:4]
    rows = re.findall(r"cell +(\d+) \|(.*)\|", capsys.readouterr().out)
    assert [int(cell) for cell, _ in rows[:4]] == largest.tolist()
    assert {len(row) for _, row in rows} == {70}


# ---- lora.py -------------------------------------------------------------------------------------

def small_adapter():
    """A network and an adapter that changes it."""
    m = load("lora.py")
    cfg = m.Config(dim=8, heads=2, digits=3, rank=3, alpha=2.1)
    params = m.init_params(cfg, np.random.default_rng(0), np.float64)
    adapter = m.init_adapter(cfg, np.random.default_rng(1), np.float64)
    return m, cfg, params, adapter


def test_adapter():
    """B = 0 changes nothing and gives A no gradient; merged it is the same; A = B = 0 stays there."""
    m, cfg, params, adapter = small_adapter()
    batch = m.adapter_batch(cfg, 1, np.float64, params)
    before, _ = m.layer_gpt_forward(params, batch[0], cfg)
    on, _ = m.layer_gpt_forward({**params, **adapter}, batch[0], cfg, m.adapted(cfg))
    assert np.array_equal(before, on)
    _, grads = m.adapter_loss_and_grads(adapter, batch, cfg)
    assert not any(grads[name].any() for name in grads if ".A" in name)
    assert all(grads[name].any() for name in grads if ".B" in name)
    _, grads = m.adapter_loss_and_grads({name: 0 * a for name, a in adapter.items()}, batch, cfg)
    assert not any(g.any() for g in grads.values())
    adapter = {name: a + 0.3 * np.random.default_rng(2).standard_normal(a.shape) for name, a in adapter.items()}
    on, _ = m.layer_gpt_forward({**params, **adapter}, batch[0], cfg, m.adapted(cfg))
    whole, _ = m.layer_gpt_forward(m.merged(params, adapter, cfg), batch[0], cfg)
    assert np.abs(on - whole).max() < 1e-12 < np.abs(on - before).max()


def test_e4m3():
    """The 253 finite numbers of the format, from their bits; what lies between goes to the nearest."""
    m = load("lora.py")
    codes = [(s, e, f) for s in (1, -1) for e in range(16) for f in range(8) if (e, f) != (15, 7)]
    values = np.unique([s * (f / 8 * 2.0 ** -6 if e == 0 else (1 + f / 8) * 2.0 ** (e - 7)) for s, e, f in codes])
    assert len(values) == 253 and values.max() == 448 and np.array_equal(m.e4m3(values), values)
    x = np.random.default_rng(0).standard_normal(5000) * np.exp(np.linspace(-12, 7, 5000))
    nearest = np.abs(x[:, None] - values).min(axis=1)
    assert np.allclose(np.abs(m.e4m3(x) - x), nearest, rtol=0, atol=1e-12)


def test_same_function():
    """Outliers, and smoothing them, change no output; the rounding has 2 Q + 1 levels per column."""
    m, cfg, params, _ = small_adapter()
    for changed in (m.plant(params, cfg, 400), m.smooth(m.plant(params, cfg, 400), cfg)):
        ours, theirs = (m.try_job(p, cfg, "sort")[2] for p in (params, changed))
        assert np.abs(ours - theirs).max() < 1e-10
    W = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    for bits, levels in ((2, 3), (3, 7), (4, 15)):
        Wq = m.quantize(W, bits, axis=0)
        t = np.abs(W).max(axis=0) / (levels // 2)
        assert [len(np.unique(column)) for column in Wq.T] == 3 * [levels]
        assert (np.abs(Wq - W) <= t / 2 + 1e-9).all() and np.allclose(Wq / t, np.round(Wq / t))


# ---- autodiff.py ---------------------------------------------------------------------------------

def test_graph(monkeypatch):
    """Sizes are checked where a Node is made; no `if`; each Node once; slopes of what is not there are 0."""
    a, calls = load("autodiff.py"), []
    x, W = a.Node("input", "x", (4, 3)), a.Node("input", "W", (3, 2))
    for wrong in (lambda: W @ x, lambda: x + W, lambda: a.reshape(x, (5, 3))):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError, match="no value"):
        a.newton_sqrt(a.Node("input", "a", ()))
    monkeypatch.setitem(a.COMPUTE, "exp", lambda x: calls.append(1) or np.exp(x))
    y = a.exp(x)
    calls.clear()
    loss = a.total(y * y + y, None)
    grads = a.Evaluator([*a.gradients(loss, [x, W]), loss])
    calls.clear()
    dx, dW, value = grads({"x": np.full((4, 3), 0.5), "W": np.ones((3, 2))})
    assert len(calls) == 1 and np.allclose(dx, 2 * np.e + np.exp(0.5)) and dW.shape == (3, 2) and not dW.any()
    assert np.allclose(value, 12 * (np.e + np.exp(0.5)))


def test_ways_to_the_same_gradients():
    a = load("autodiff.py")
    cfg = a.Tape(layers=2, dim=8, batch_size=3)
    params, batch = a.init_mnist(cfg, np.random.default_rng(0), np.float64), a.mnist_batch(cfg, 1, np.float64)
    right_loss, right = a.hand_loss_and_grads(params, batch, cfg)
    for way, function in a.WAYS.items():
        loss, grads = function(params, batch, cfg)
        assert abs(loss - right_loss) < 1e-13 and grads.keys() == right.keys(), way
        assert all(np.abs(g - right[name]).max() < 1e-13 for name, g in grads.items()), way
