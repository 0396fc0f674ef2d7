"""What only translation.py has: tokens, copies, search, scores, files of pairs."""
import itertools
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from lessons import is_refused, lesson, load, metrics, sentence_pairs

NAME = "translation.py"
SMALL = ["pairs", "--steps", "3", "--dim", "16", "--batch-size", "8", "--threads", "1"]
UNITS = ["bpe", "words", "characters"]


@pytest.fixture(scope="module")
def t():
    return load(NAME)


def small(t, path="", **changes):
    """A configuration and random parameters for the pairs of a file."""
    cfg = t.Pairs(**{"data": str(path), "dim": 16, "heads": 2, "context": 24, **changes})
    return cfg, t.init_pairs(cfg, np.random.default_rng(0), np.float64)


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


# ---- byte-pair encoding --------------------------------------------------------------------------

def texts_of_any_kind():
    rng, alphabet = random.Random(0), "ab c\t\n.,'\xe9\xdf\u0301\u4f60\u597d\U0001f600\u200d\x00\xa0"
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(30))) for _ in range(200)]
    return [*texts, "", " ", "  a  ", "".join(map(chr, range(0x500)))]


@pytest.mark.parametrize("unit", UNITS)
def test_round_trip(t, unit):
    """Whatever the text, the tokens put together are its bytes; of bytes, none is unknown."""
    texts = texts_of_any_kind()
    pieces = Counter(piece for text in texts[::2] for piece in t.PIECES.findall(text))
    merges = t.find_merges(pieces, 60) if unit == "bpe" else []
    tokenize, vocab = t.make_tokenizer(unit, merges), {bytes([b]) for b in range(256)}
    vocab |= {a + b for a, b in merges}
    for text in texts:
        tokens = tokenize(text)
        assert b"".join(tokens).decode() == text
        assert unit != "bpe" or vocab >= set(tokens)


def test_merges_are_the_most_frequent_pairs(t):
    """Against counting all pairs anew for every merge."""
    counts = Counter(t.PIECES.findall(sentence_pairs(20) + "aaaa aaa banana bandana " * 3))
    tokens = {piece: [bytes([b]) for b in piece.encode()] for piece in counts}
    for pair in t.find_merges(counts, 50):
        total = Counter()
        for piece, some in tokens.items():
            for other in zip(some, some[1:]):
                total[other] += counts[piece]
        assert total[pair] == max(total.values()) >= 2
        tokens = {piece: t.merge_pair(some, pair) for piece, some in tokens.items()}
    tokenize = t.make_tokenizer("bpe", t.find_merges(counts, 50))
    assert all(tokenize(piece) == tokens[piece] for piece in counts)


def test_merge_by_merge(tmp_path):
    done = lesson(NAME, *SMALL, "--data", str(write(tmp_path / "a.tsv", sentence_pairs().splitlines())))
    assert metrics(done)
    lines = done.stdout.partition("merge by merge")[2].partition("chance level")[0].splitlines()[1:]
    assert len(lines) > 4 and len({line.replace("|", "").strip() for line in lines}) == 1
    bars = [line.count("|") for line in lines]
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[-1]


# ---- beam search ---------------------------------------------------------------------------------

@pytest.mark.parametrize("penalty", [0.0, 0.45, 1.0])
def test_beam_search_is_exhaustive(t, penalty):
    """As wide as there are sequences, it finds the best of all."""
    V, limit = 5, 4                                     # PAD, BOS, EOS and two more
    for seed in range(6):
        rng = np.random.default_rng(seed)
        table = {}

        def log_p(prefix):
            z = table.setdefault(prefix, rng.standard_normal(V) * 2)
            z = np.where(np.isin(np.arange(V), (t.PAD, t.BOS)), -1e9, z)
            return z - np.log(np.exp(z).sum())

        def step(ids, state):
            prefixes = np.column_stack([*state, ids])
            rows = np.array([log_p(tuple(row[1:])) for row in prefixes])
            return rows, [prefixes]

        best = None
        for n in range(1, limit + 1):
            for sequence in itertools.product((2, 3, 4), repeat=n):
                if t.EOS in sequence[:-1] or (n < limit and sequence[-1] != t.EOS):
                    continue
                total = sum(log_p(sequence[:k])[sequence[k]] for k in range(n))
                best = max(best or (-1e9,), (total / n ** penalty, sequence, total))
        beam = 3 ** limit
        ids, found = t.beam_search(step, [np.zeros((beam, 0), int)], 1, limit, beam, penalty)
        assert tuple(i for i in ids[0] if i != t.PAD) == best[1] and abs(found[0] - best[2]) < 1e-9


@pytest.mark.parametrize("pointer", [False, True])
def test_log_probability_of_an_output(t, pointer):
    """That of the search is that of teacher forcing, all ways to output a token added up."""
    cfg, params = small(t, pointer=pointer, unit="words", vocab_size=20, context=20)
    source = t.pad([a for a, *_ in t.encode_texts(t.texts_of(cfg)["test"][:6], cfg)])
    full, V = t.with_pointer(params), len(params["E"])
    ids, log_p = t.find_targets(full, source, cfg, 3)
    target = np.column_stack([np.full(len(ids), t.BOS), ids[:, :-1]])
    _, p, _ = t.write(full, source, target, cfg, pointer)
    if not pointer:
        assert not p[:, :, V:].any() and ids.max() < V
    p = np.pad(p[:, :, :V], ((0, 0), (0, 0), (0, source.shape[1]))) + 0
    _, p_all, _ = t.write(full, source, target, cfg, pointer)
    for n, row in enumerate(source):
        for s, token in enumerate(row):
            p[n, :, token] += p_all[n, :, V + s]
    p[:, :, [t.PAD, t.BOS]] = 0
    chosen = np.take_along_axis(p, ids[:, :, None], axis=2)[:, :, 0]
    assert np.allclose(np.where(ids == t.PAD, 0, np.log(np.maximum(chosen, 1e-300))).sum(axis=1), log_p)


# ---- the model -----------------------------------------------------------------------------------

@pytest.mark.parametrize("pointer", [False, True])
def test_padding_changes_nothing(t, pointer):
    cfg = t.Config(dim=8, heads=2, batch_size=6, dropout=0.0)
    params = t.init_params(cfg, np.random.default_rng(0), np.float64)
    pairs = t.draw_headlines(np.random.default_rng(1), 6, t.UNSEEN)
    ids = [t.encode_pair(a[:9 + k], b[:2 + k % 5], t.IDS) for k, (a, b) in enumerate(pairs)]
    loss, grads = t.loss_and_grads(
        params, t.padded_batch(ids, cfg, np.random.default_rng(0), np.float64), cfg, pointer)
    single = [t.loss_and_grads(params, t.padded_batch(
        [pair], cfg, np.random.default_rng(0), np.float64), cfg, pointer) for pair in ids]
    terms = [len(b) + 1 for _, b in ids]
    assert abs(np.average([one for one, _ in single], weights=terms) - loss) < 1e-12
    for key, g in grads.items():
        parts = sum(n * other[key] for n, (_, other) in zip(terms, single)) / sum(terms)
        assert np.abs(parts - g).max() < 1e-12, key


def test_the_future_changes_nothing(t):
    cfg = t.Config(dim=8, heads=2, batch_size=4)
    params = t.init_params(cfg, np.random.default_rng(0), np.float64)
    source, target, *_ = t.make_batch(cfg, 1)
    other = target.copy()
    other[:, 4:] = 7
    a, b = (t.write(params, source, some, cfg)[1] for some in (target, other))
    assert np.array_equal(a[:, :4], b[:, :4]) and not np.array_equal(a[:, 4:], b[:, 4:])


def test_names_never_seen_in_training(t):
    """They are in no batch, have no embedding, and only the pointer can output them."""
    seen = set()
    for step in range(1, 200):
        rng = np.random.default_rng((0, step))
        words = len(t.RARE) // len(t.KNOWN) * t.KNOWN + t.RARE
        seen.update(w for a, b in t.draw_headlines(rng, 32, words) for w in a + b)
    assert not seen & set(t.UNSEEN) and not set(t.TOKENS) & set(t.UNSEEN + t.RARE)
    assert seen >= set(t.KNOWN) and len(t.UNSEEN) >= 40


# ---- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pointer", [False, True])
def test_sources_of_unknown_characters(t, unit, pointer, tmp_path):
    """Fifty sources of nothing else are translated; with the pointer the characters can be output."""
    path = write(tmp_path / "a.tsv", sentence_pairs().splitlines())
    cfg, params = small(t, path, unit=unit, pointer=pointer)
    texts = [("\u4f60\u597d" * (1 + k % 3), "x \u4f60") for k in range(50)]
    with ThreadPoolExecutor(1) as pool:
        outputs, log_p = t.translate_texts(params, texts, cfg, 2, pool)
    assert len(outputs) == 50 and np.isfinite(log_p) and np.isfinite(t.loss_on(
            params, cfg, [pair[:2] for pair in t.encode_texts(texts, cfg)]))
    V = len(params["E"])
    for source, _, tokens in t.encode_texts(texts, cfg):
        text = b"".join(tokens[i] for i in source)
        assert text.decode() == " " + texts[len(text.decode()) // 2 - 1][0] and t.PAD not in source
        assert (max(source) >= V) == (unit != "bpe")
    if pointer:                                         # make the pointer certain
        params = {**params, "E": params["E"] * 0}
        p = t.write(t.with_pointer(params), np.array([source]), np.array([[t.BOS]]), cfg)[1]
        assert p[0, 0, V:].sum() > 0


def test_unknown_tokens_are_counted_as_such(t, tmp_path):
    path = write(tmp_path / "a.tsv", [f"w{n} is here\tw{n}" for n in range(200)])
    cfg, params = small(t, path, unit="words", vocab_size=5)
    assert len(t.texts_of(cfg)["ids"]) == 9             # four special tokens
    (source, target, tokens), = t.encode_texts([("v1 is here", "v1 v2")], cfg)
    assert source[0] == target[0] >= 9 and target[1] == t.UNK and tokens[source[0]] == b" v1"


@pytest.mark.parametrize("unit", UNITS)
def test_long_targets_are_left_out(t, unit, tmp_path):
    """Never cut and taught to end there: left out, counted, and said."""
    long = [f"a b {n}\t" + " ".join(f"{k}x" for k in range(40)) for n in range(30)]
    short = [f"{'so long ' * 30}a {n}\tb {n}" for n in range(60)]
    path = write(tmp_path / "a.tsv", [*itertools.chain(*zip(long, short)), *short[30:]])
    cfg, _ = small(t, path, unit=unit, vocab_size=300)
    data, kept = t.texts_of(cfg), len(t.texts_of(cfg)["train"])
    full = [data["tokenize"](" " + b) for _, b in t.read_pairs(str(path))[0]]
    assert max(len(b) for _, b in data["train"]) < cfg.context
    counted = re.findall(r"(\w+): (\d+) pairs.*\n.*: (\d+) sources, cut; (\d+) targets, left out", data["note"])
    assert [name for name, *_ in counted] == ["train", "validation"]
    for name, n, cut, left in counted:
        assert int(n) - int(left) == len(data[name]) and int(cut) > 0
    assert 0 < int(counted[0][3]) <= 30 and len([b for b in full if len(b) < 24]) >= kept > 0
    source, target, targets, *_ = t.pairs_batch(cfg, 1)
    lengths = (targets != t.PAD).sum(axis=1)
    assert (targets[np.arange(len(targets)), lengths - 1] == t.EOS).all() and source.shape[1] <= 24
    lines = [f"a\t{'no ' * 90}{n}" for n in range(40)]
    done = lesson(NAME, *SMALL, "--data", str(write(tmp_path / "b.tsv", lines)), "--unit", "characters")
    is_refused(done, "--context", "48")


def test_special_tokens_in_the_data(t, tmp_path):
    """Words that are spelled as a special token are words."""
    lines = [f"<eos> {n} . <pad> <bos>\t{n} <unk> <eos>" for n in range(100)]
    path = write(tmp_path / "a.tsv", lines)
    for unit in UNITS:
        cfg, params = small(t, path, unit=unit)
        data = t.texts_of(cfg)
        assert len(set(data["ids"].values())) == len(data["ids"]) == len(params["E"])
        for pair, (source, target, tokens) in zip(data["test"], t.encode_texts(data["test"], cfg)):
            for text, ids in zip(pair, (source, target)):
                assert min(ids) > t.UNK and b"".join(tokens[i] for i in ids) == f" {text}".encode()


def test_bytes_that_are_not_utf8(tmp_path):
    good, bad = write(tmp_path / "a.tsv", sentence_pairs().splitlines()), tmp_path / "b.tsv"
    for raw in ("caf\xe9\tcoffee\n".encode("latin-1") * 30, "a\tb\n".encode("utf-16") * 30):
        bad.write_bytes(raw)
        for flag in ("--data", "--validation", "--test"):
            is_refused(lesson(NAME, *SMALL, "--data", str(good), flag, str(bad)), "b.tsv", "UTF-8")


def test_columns(tmp_path):
    """The first two columns are used, and it is said; lines without a TAB are dropped, and it is said."""
    outputs = []
    for more in ("", "\tthree", "\tthree\tfour"):
        path = write(tmp_path / "a.tsv", [f"{n} is\t{7 * n}{more}" for n in range(100)])
        outputs.append(lesson(NAME, *SMALL, "--data", str(path)))
    assert "first two" not in outputs[0].stdout
    assert all("only the first two columns are used, 100 lines" in done.stdout for done in outputs[1:])
    assert len({metrics(done)["validation_loss"] for done in outputs}) == 1
    path = write(tmp_path / "a.tsv", ["no tab", *(f"{n} is\t{7 * n}" for n in range(100)), "\tb"])
    assert "dropped: 2 without TAB" in lesson(NAME, *SMALL, "--data", str(path)).stdout
    is_refused(lesson(NAME, *SMALL, "--data", str(write(path, ["no tab"] * 50))), "20", "TAB")


def test_more_threads_than_pairs(tmp_path):
    path = write(tmp_path / "a.tsv", [f"{n} is\t{7 * n}" for n in range(20)])
    is_refused(lesson(NAME, *SMALL, "--data", str(path), "--batch-size", "20", "--threads", "20"), "--threads", "17")


def test_validation_and_test_files(t, tmp_path):
    a, b, c = (write(tmp_path / f"{x}.tsv", [f"{x} {n}\t{x}{n}" for n in range(30)]) for x in "abc")
    cfg = t.Pairs(data=str(a), validation=str(b), test=str(c), lower=True)
    data = t.texts_of(cfg)
    assert [len(data[name]) for name in ("train", "validation", "test")] == [30, 30, 30]
    assert data["test"][0] == ["c 0", "c0"]
    data = t.texts_of(replace(cfg, validation="", test=""))
    assert [len(data[name]) for name in ("train", "validation", "test")] == [25, 2, 3]


# ---- scores --------------------------------------------------------------------------------------

def corpora():
    """400 pairs of corpora with entities, punctuation, numbers, other alphabets, empty lines."""
    rng = random.Random(0)
    words = ("the a cat dog's sat on mats , . ; ( ) - -- 3.5 1,000 10-year &quot;yes&quot; R&amp;D &lt;b&gt; "
             "<skipped> caf\xe9 \u4f60\u597d U.S. don't ... 50% $7 it's [x] {y} a/b \u201cq\u201d e.g.").split()
    for _ in range(400):
        n, vocab = rng.randrange(1, 6), rng.sample(words, rng.randrange(3, len(words)))
        references = [[rng.choice(vocab) for _ in range(rng.randrange(1, 14))] for _ in range(n)]
        outputs = [[w for w in line if rng.random() < 0.9] if rng.random() < 0.7 else
                   [rng.choice(vocab) for _ in range(rng.randrange(0, 12))] for line in references]
        yield [" ".join(line) for line in outputs], [" ".join(line) for line in references]


def test_bleu_as_sacrebleu(t):
    sacrebleu = pytest.importorskip("sacrebleu")
    for outputs, references in corpora():
        theirs = sacrebleu.corpus_bleu(outputs, [references], force=True).score
        assert abs(t.bleu(outputs, references) - theirs) < 1e-9, (outputs, references)


def test_rouge_as_rouge_score(t):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for outputs, references in corpora():
        theirs = [scorer.score(b, a) for a, b in zip(outputs, references)]
        for name, ours in t.rouge(outputs, references).items():
            assert abs(ours - 100 * np.mean([s[name].fmeasure for s in theirs])) < 1e-9


def test_scores_by_hand(t):
    assert t.bleu_tokens("&quot;R&amp;D&quot;<skipped>, 1,000.5 10-year U.S.") == [
        '"', "R", "&", "D", '"', ",", "1,000.5", "10", "-", "year", "U", ".", "S", "."]
    lines = ["a cat sat on the mat .", "it is 3.5 m"]
    assert abs(t.bleu(lines, lines) - 100) < 1e-9 and t.bleu(["x"] * 2, lines) == 0
    assert abs(t.bleu(["a cat sat on"], ["a cat sat on the mat"]) - 100 * np.exp(1 - 6 / 4)) < 1e-9
    scores = t.rouge(["a b c d"], ["a c b d x"])
    assert np.allclose(list(scores.values()), [200 * 4 / 9, 0, 200 * 3 / 9])


# ---- the headlines of Reuters-21578 --------------------------------------------------------------

ARTICLE = """<REUTERS TOPICS="YES" LEWISSPLIT="TRAIN" CGISPLIT="TRAINING-SET" OLDID="{n}" NEWID="{n}">
<DATE>26-FEB-1987 15:01:01.79</DATE>
<TOPICS><D>cocoa</D></TOPICS>
<UNKNOWN>
&#5;&#5;&#5;C T
&#22;&#22;&#1;f0704&#31;reute</UNKNOWN>
<TEXT>&#2;
<TITLE>{title}</TITLE>
<DATELINE>    SALVADOR, Feb 26 - </DATELINE><BODY>{body}
 Reuter
&#3;</BODY></TEXT>
</REUTERS>
"""


def test_headlines_file(t, tmp_path):
    """The lines of MORE make the file from an archive of the publisher's format."""
    body = "Showers continued throughout\nthe  week at A&amp;P of &lt;Bahia>, 5.93 mln dlrs " * 5
    articles = [(f"BAHIA COCOA {n} REVIEW &lt;A>", f"No. {n} {body}") for n in range(60)]
    articles += [("TOO SHORT", "few words"), ("TWO WORDS", body), ("", body), ("ALL OF NUMBERS", "1 2 " * 30)]
    for k in range(2):
        text = "<!DOCTYPE lewis SYSTEM \"lewis.dtd\">\n" + "".join(
            ARTICLE.format(n=n, title=title, body=body) for n, (title, body) in enumerate(articles[k::2]))
        (tmp_path / f"reut2-00{k}.sgm").write_bytes((text + "\xfc").encode("latin-1"))
    code = t.MORE.partition("    import glob")[2].partition("\n\n")[0]
    code = re.sub("^    ", "", "    import glob" + code, flags=re.M)
    done = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    pairs, note = t.read_pairs(str(tmp_path / "reuters-headlines.tsv"))
    assert len(pairs) == 60 and note.endswith("60 lines")
    first = " ".join("Showers continued throughout the week at A&P of <Bahia>, 5.93 mln dlrs".split() * 5)
    assert pairs[0] == (f"No. 0 {first}", "BAHIA COCOA 0 REVIEW <A>")
    done = lesson(NAME, *SMALL, "--data", str(tmp_path / "reuters-headlines.tsv"), "--pointer", "--lower")
    assert {"bleu", "rouge1", "rouge2", "rougeL"} <= metrics(done).keys()


def test_what_a_checkpoint_was_trained_on(tmp_path):
    """Flags that change the tokens or the model are refused, not ignored."""
    file = str(tmp_path / "a.npz")
    common = ["pairs", "--steps", "2", "--dim", "16", "--layers", "1"]
    assert metrics(lesson("translation.py", *common, "--save", file))
    for flags, word in ((["--unit", "words"], "unit"), (["--lower"], "lower"), (["--pointer"], "pointer"),
                        (["--heads", "1"], "heads"), (["--dim", "32"], "E (")):
        is_refused(lesson("translation.py", *common, *flags, "--load", file), "a.npz", word)
