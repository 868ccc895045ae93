"""Claims of data.py: text is split without leaks, tokens decode to it, streams realise asks."""
import collections
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import types

import numpy as np
import pytest
import tiktoken
import tiktoken.load
from hypothesis import example, given, settings, strategies as st

import data
from data import DataError, Sampler, fixed_windows, learn_bpe, load

# ---- helpers

WORDS = "the of a mixture language model learns from each group and every token counts".split()


def prose(n, seed=0):
    """n different lines of ten words."""
    rng = np.random.default_rng(seed)
    return "".join(" ".join([str(i), *rng.choice(WORDS, 10)]) + "\n" for i in range(n))


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def folder(tmp_path, **groups):
    """A folder of one's own text: name=text of a top-level file."""
    root = tmp_path / "texts"
    root.mkdir(exist_ok=True)
    for name, text in groups.items():
        (root / f"{name}.txt").write_text(text)
    return root


def two_groups(tmp_path):
    return folder(tmp_path, alpha=prose(300), beta=prose(300, 1))


def quiet_load(root, tmp_path, **options):
    defaults = {"data": root, "encoding": "bpe300", "cache": tmp_path / "cache", "progress": None}
    return load(**defaults | options)


def decoder(tmp_path, name="bpe300"):
    path = next((tmp_path / "cache").glob(f"*/{name}.tiktoken"))
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    return tiktoken.Encoding(name, pat_str=data.PATTERN, mergeable_ranks=ranks, special_tokens={})


def texts_of(corpus, group, tmp_path):
    """{split: text} of a group, decoded."""
    j = corpus.groups.index(group)
    decode = decoder(tmp_path).decode
    return {split: decode(getattr(corpus, split)[j].tolist()) for split in data.SPLITS}


def sampler(sizes=(501, 333, 1000), names=None, window=10, batch=4, seed=0, share=1.0):
    """Groups of consecutive numbers: a window's first token says which window it is."""
    names = names or [f"g{j}" for j in range(len(sizes))]
    tokens = [np.arange(n, dtype=np.uint16) for n in sizes]
    return Sampler(tokens, names, window, batch, seed, share)


def draw(s, p, steps):
    """Windows (group, start) of a plan, in order."""
    s.plan(p, steps)
    windows = []
    for _ in range(steps):
        x, y, groups = s.batch()
        assert x.shape == y.shape == (s.batch_size, s.window) and (x[:, 1:] == y[:, :-1]).all()
        assert (y[:, -1] == x[:, -1] + 1).all()
        windows += zip(groups.tolist(), x[:, 0].tolist(), strict=True)
    return windows


def starts(windows, group):
    return [start for g, start in windows if g == group]


@st.composite
def mixtures(draw, m):
    """Points of the simplex, corners and near-corners among them."""
    share = st.one_of(st.integers(0, 4), st.floats(1e-6, 1))
    w = np.array(draw(st.lists(share, min_size=m, max_size=m)), float)
    return np.full(m, 1 / m) if w.sum() == 0 else w / w.sum()


def plan_only(s, p, steps):
    """Plan, and skip the drawing: for claims on counts over many requests."""
    counts = s.plan(p, steps)
    s.at = len(s.order)
    return counts


# ---- streams

def test_no_window_repeats_within_an_epoch():
    s = sampler()
    drawn = starts(draw(s, [0, 1, 0], 33 * 3 // 4), 1)            # 33 windows: almost three epochs
    for epoch in range(2):
        assert sorted(drawn[33 * epoch:33 * (epoch + 1)]) == list(range(0, 330, 10))
    assert drawn[:33] != drawn[33:66]                             # each epoch has its own order
    assert s.drawn.tolist() == [0, 96, 0] and s.epochs.tolist() == [0, 96 / 33, 0]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 3))
def test_a_large_epoch_has_each_window_once_in_parts_that_span_the_text(count, part, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PART", part)
        orders = [data.shuffled(count, [seed, 5], i).tolist() for i in range(-(-count // part))]
    assert sorted(itertools.chain(*orders)) == list(range(count))
    assert all(len(order) == part for order in orders[:-1])
    if part >= 20:
        assert all(np.ptp(order) > count / 2 for order in orders[:-1])


@given(st.floats(.001, 1), st.integers(11, 3000), st.integers(0, 3))
def test_a_share_of_a_text_is_evenly_spaced_windows_that_repeat_as_the_whole_does(
        share, tokens, seed):
    s = sampler((tokens, 501), batch=1, seed=seed, share=share)
    there = (tokens - 1) // 10
    n = max(1, int(share * there))
    drawn = starts(draw(s, [1, 0], 2 * n), 0)
    assert sorted(drawn[:n]) == sorted(drawn[n:]) and s.epochs[0] == 2
    gaps = np.diff(sorted(drawn[:n])) / 10
    assert len(set(drawn)) == n and max(drawn) <= 10 * (there - 1) and min(drawn) == 0
    assert all(abs(gap - 1 / share) < 1 for gap in gaps)


def test_parts_of_an_epoch_have_orders_of_their_own(monkeypatch):
    small = np.random.default_rng([0, 5]).permutation(33)
    assert (data.shuffled(33, [0, 5]) == small).all()
    monkeypatch.setattr(data, "PART", 33)
    parts = [data.shuffled(99, [0, 5], part) for part in range(3)]
    orders = [parts[i] * 25 % 99 - 33 * i for i in range(3)]      # as 25 * 4 is 1, and around
    assert (orders[0] == small).all() and all(sorted(order) == list(range(33)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3

    windows = starts(draw(sampler(sizes=(1001, 11, 11), batch=5), [1, 0, 0], 20), 0)
    assert sorted(windows) == list(range(0, 1000, 10))            # of two parts, through a Sampler


@given(mixtures(3), mixtures(3), st.integers(0, 5))
def test_same_seed_same_windows_within_each_group_whatever_the_mixtures(p, q, seed):
    other = sampler((1000, 77, 501, 333), ["g2", "new", "g0", "g1"], seed=seed)
    a = draw(sampler(seed=seed), p, 40)
    b = draw(other, [*q[:1], 0, *q[1:]], 25)
    for name, i, j in (("g0", 0, 2), ("g1", 1, 3), ("g2", 2, 0)):     # other order, one more group
        in_a, in_b = starts(a, i), starts(b, j)
        n = min(len(in_a), len(in_b))
        assert in_a[:n] == in_b[:n], name


def test_another_seed_and_another_group_have_another_order():
    assert draw(sampler(seed=0), [1, 0, 0], 12) != draw(sampler(seed=1), [1, 0, 0], 12)
    windows = draw(sampler(sizes=(501, 501)), [.5, .5], 24)
    assert starts(windows, 0) != starts(windows, 1)


@given(st.data(), st.integers(2, 6), st.integers(1, 20))
def test_realised_counts_stay_within_one_window_of_the_ask_for_ever(d, m, batch):
    s = sampler(sizes=(50,) * m, batch=batch)
    p, off = d.draw(mixtures(m)), np.zeros(m)
    for steps in d.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)) * 12:
        counts = plan_only(s, p, steps)
        assert counts.sum() == steps * batch and (counts >= 0).all()
        off += steps * batch * p - counts
        assert (abs(off) < 1 + 1e-6).all() and s.carry.sum() == 0


@given(st.data(), st.integers(2, 6))
def test_counts_stay_within_one_window_of_changing_asks_that_are_not_below_one(d, m):
    s, off = sampler(sizes=(50,) * m, batch=16), np.zeros(m)
    asks = st.lists(st.tuples(mixtures(m), st.integers(1, 9)), min_size=1, max_size=20)
    for p, steps in d.draw(asks):
        p = 1 / 16 + (1 - m / 16) * p                             # batch * p >= 1
        counts = plan_only(s, p, steps)
        off += steps * 16 * p - counts
        assert (abs(off) < 1 + 1e-6).all() and (counts >= 0).all()


@given(st.data(), st.integers(2, 6))
def test_integer_asks_are_realised_exactly_whatever_came_before(d, m):
    s = sampler(sizes=(50,) * m, batch=7)
    for p, steps in d.draw(st.lists(st.tuples(mixtures(m), st.integers(1, 5)), max_size=10)):
        plan_only(s, p, steps)
    ask = np.array(d.draw(st.lists(st.integers(0, 40), min_size=m, max_size=m)))
    ask[0] += -ask.sum() % 7 + 7
    assert (plan_only(s, ask / ask.sum(), int(ask.sum()) // 7) == ask).all()


@given(mixtures(4), st.integers(1, 40))
def test_every_batch_is_close_to_the_mixture(p, steps):
    s = sampler(sizes=(99,) * 4, batch=8)
    s.plan(p, steps)
    counts = np.zeros(4)
    for t in range(1, steps + 1):
        _, _, groups = s.batch()
        counts += np.bincount(groups, minlength=4)
        assert (abs(counts - 8 * t * p) < 2).all()
    assert (counts == s.counts).all() and (s.drawn == counts).all()


def test_a_rare_group_comes_in_the_middle_of_its_stretch():
    windows = draw(sampler(sizes=(99, 99), batch=3), [8 / 9, 1 / 9], 3)
    assert [group for group, _ in windows] == [0, 0, 0, 0, 1, 0, 0, 0, 0]


@given(mixtures(3), st.integers(0, 19), st.integers(0, 3))
def test_a_sampler_restored_mid_plan_continues_identically(p, cut, seed):
    a, b = sampler(seed=seed), sampler(seed=seed)
    draw(a, p[::-1], 7)
    a.plan(p, 20)
    for _ in range(cut):
        a.batch()
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))     # plain numbers only
    for _ in range(20 - cut):
        for from_a, from_b in zip(a.batch(), b.batch(), strict=True):
            assert (from_a == from_b).all()
    assert draw(a, p, 9) == draw(b, p, 9) and (a.epochs == b.epochs).all()


def test_streams_of_other_data_are_not_restored():
    with pytest.raises(ValueError, match="saved streams"):
        sampler(seed=1).load_state_dict(sampler(seed=2).state_dict())


NO_MIXTURES = [[.5, .5], [.5, .6, 0], [1.5, -.5, 0], [np.nan, .5, .5], [np.inf, 0, 0], [[1, 0, 0]]]


@pytest.mark.parametrize("p", NO_MIXTURES)
def test_what_is_not_a_mixture_is_refused(p):
    with pytest.raises(ValueError, match="mixture of 3 groups"):
        sampler().plan(p, 3)


def test_plans_are_drawn_to_their_end_and_no_further():
    s = sampler()
    with pytest.raises(ValueError, match="used up"):
        s.batch()
    s.plan([1, 0, 0], 2)
    s.batch()
    with pytest.raises(ValueError, match="1 batches"):
        s.plan([1, 0, 0], 2)


def test_a_group_shorter_than_a_window_is_named_with_its_tokens():
    with pytest.raises(DataError, match="group g1 has 10 training tokens, but a window takes 11"):
        sampler(sizes=(11, 10))
    assert sampler(sizes=(11, 21)).windows.tolist() == [1, 2]


@given(st.integers(11, 300), st.integers(1, 40))
def test_fixed_windows_are_distinct_and_the_same_every_time(n, k):
    tokens = np.arange(n, dtype=np.uint16)
    x, y = fixed_windows(tokens, 10, k, seed=3)
    assert len(x) == min(k, (n - 1) // 10) and len(set(x.ravel())) == x.size and (y == x + 1).all()
    assert (x == fixed_windows(tokens, 10, k, seed=3)[0]).all() and x.dtype == np.int64


def test_fixed_windows_come_from_the_whole_text_and_another_seed_takes_others():
    first = {seed: fixed_windows(np.arange(1001), 10, 20, seed)[0][:, 0] for seed in range(3)}
    assert all(places.min() < 300 and places.max() > 700 for places in first.values())
    assert set(first[0]) != set(first[1]) != set(first[2])


def test_no_fixed_window_is_an_error():
    with pytest.raises(DataError, match="group law has 10 tokens to be measured on"):
        fixed_windows(np.arange(10), 10, 5, seed=0, name="law")


# ---- tokeniser

def replace_pair(word, pair, new):
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i:i + 2] = [new]
        i += 1


def naive_bpe(texts, size):
    """The definition: count all pairs anew for each merge."""
    pieces = [piece for text in texts for piece in data.regex.findall(data.PATTERN, text)]
    words = [list(piece.encode()) for piece in pieces]
    tokens = [bytes([i]) for i in range(256)]

    while len(tokens) < size:
        pairs = collections.Counter()
        for word in words:
            pairs.update(itertools.pairwise(word))
        if not pairs:
            break
        most = max(pairs.values())
        best = min(pair for pair, count in pairs.items() if count == most)
        for word in words:
            replace_pair(word, best, len(tokens))
        tokens.append(b"".join(tokens[i] for i in best))
    return tokens


@settings(max_examples=60)
@given(st.lists(st.text("ab c\n", max_size=40), max_size=5), st.integers(256, 290))
@example(["aaaa aaa aaaaa"], 262)
@example(["abc abc bcab bca cabc abcabc aabbcc"], 290)
def test_merges_equal_those_of_a_naive_trainer(texts, size):
    assert list(learn_bpe(texts, size)) == naive_bpe(texts, size)


def test_merges_on_real_words_equal_those_of_a_naive_trainer():
    texts = [prose(60), "def f(x):\n    return x\n" * 3 + "        if x:\n" * 2]
    ranks = learn_bpe(texts, 330)
    assert list(ranks) == naive_bpe(texts, 330) and list(ranks.values()) == list(range(330))
    assert b"\n   " in ranks                                      # an indentation


def test_text_is_cut_before_words_and_after_indentations():
    pieces = data.regex.findall(data.PATTERN, "I don't:\n    été 42_x  \n")
    assert pieces == ["I", " don", "'t", ":", "\n   ", " été", " 42", "_", "x", "  \n"]


RANKS = learn_bpe([prose(200), "0x3f80, 1.0\n\n    é"], 400)
ENCODING = tiktoken.Encoding("t", pat_str=data.PATTERN, mergeable_ranks=RANKS, special_tokens={})
ANY_BYTES = st.binary(max_size=200).map(lambda raw: raw.decode("latin-1"))


@given(st.one_of(st.text(max_size=200), ANY_BYTES))
def test_text_survives_the_tokeniser(text):
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text


def test_the_tokeniser_learns_from_training_text_of_all_groups_alone(tmp_path, monkeypatch):
    root, training, calls = folder(tmp_path), [], []
    for name in "abc":
        documents = [f"{name} {i:03} " + "word " * 38 for i in range(100)]      # of 196 bytes
        (root / f"{name}.jsonl").write_text(json_lines(documents))
        kept = [text for i, text in enumerate(documents) if i % 10 not in (3, 7)]
        training += kept[::4]

    def recorded(texts, size):
        calls.append(texts)
        return learn_bpe(texts, size)

    monkeypatch.setattr(data, "learn_bpe", recorded)
    monkeypatch.setattr(data, "SAMPLE", 80 * 196 // 4)            # every fourth of the 80
    quiet_load(root, tmp_path, groups="a+b")
    assert calls == [training]


def test_what_the_tokeniser_reads_of_a_group_is_bounded(monkeypatch):
    giants = ["x" * 2000 if i % 5 == 0 else "y" for i in range(100)]
    monkeypatch.setattr(data, "SAMPLE", 8000)                     # every fifth of 40,080 bytes
    taken = list(data.sample(giants, sum(map(len, giants))))
    assert 4 <= len(taken) <= 9 and set(taken) == {"x" * 2000}


def test_a_merge_of_a_long_word_counts_anew_only_what_stands_beside_it(monkeypatch):
    letters = np.random.default_rng(0).choice(list("acgt"), 20_000)
    words, calls = data.Words(["".join(letters)]), []
    assert len(words.words) == 1

    def count(*args):
        calls.append(args)
        return real(*args)

    real = words._count
    monkeypatch.setattr(words, "_count", count)
    for new in range(256, 300):
        best = max(words.pairs, key=words.pairs.get)
        words.merge(best, chr(new))
    assert len(calls) <= 4 * (20_000 - len(words.words[0]))       # four for each that went
    assert words.pairs + collections.Counter() == collections.Counter(
        map("".join, itertools.pairwise(words.words[0])))


def test_a_file_of_ranks_is_an_encoding_whatever_its_path(tmp_path):
    root = two_groups(tmp_path)
    learnt = quiet_load(root, tmp_path)
    ranks = shutil.copy(next((tmp_path / "cache").glob("*/bpe300.tiktoken")), tmp_path / "my.ranks")
    corpus = quiet_load(root, tmp_path, encoding=str(ranks))
    assert corpus.digest == learnt.digest and corpus.vocab == 300

    lines = ranks.read_text().splitlines(keepends=True)
    huge = [lines[0].replace(" 0", " 99999999999"), *lines[1:]]
    for wrong in (lines[1:], [lines[0].replace(" 0", " 1"), *lines[1:]], huge):
        ranks.write_text("".join(wrong))                          # another file, not the cache's
        with pytest.raises(DataError, match="my.ranks is no file of tiktoken ranks: it needs all"):
            quiet_load(root, tmp_path, encoding=str(ranks))


def test_a_tokenizer_json_encodes_all_of_a_text_and_marks_as_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    root = two_groups(tmp_path)
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator([prose(300)], tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[data.MARK], show_progress=False))
    found.enable_truncation(5)
    found.enable_padding(length=9)
    found.save(str(tmp_path / "tokenizer.json"))

    corpus = quiet_load(root, tmp_path, encoding=str(tmp_path / "tokenizer.json"))
    end = found.token_to_id(data.MARK)
    train = corpus.train[0]
    assert corpus.vocab == found.get_vocab_size() and train[-1] == end
    assert (train == end).sum() == corpus.manifest["groups"]["alpha"]["train"]["documents"]
    whole = "".join(found.decode(ids.tolist()) for ids in (corpus.train[0], corpus.val[0],
                                                           corpus.test[0]))
    assert sorted(whole.split("\n")) == sorted(prose(300).split("\n"))
    tokeniser = data.json_encoding(str(tmp_path / "tokenizer.json"))
    assert end not in tokeniser.encode([data.MARK])[0] and tokeniser.end == [end]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json is no tokenizer.json"):
        quiet_load(root, tmp_path, encoding=str(tmp_path / "tokenizer.json"))


# ---- your own text

def test_groups_are_folders_and_files_plain_or_compressed(tmp_path):
    root = folder(tmp_path, plain=prose(300, 1))
    lines = json_lines(prose(300, 2).splitlines())
    (root / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "folder" / "deeper").mkdir(parents=True)
    for i in range(20):
        path = root / "folder" / "deeper" / f"{i}.txt.gz"
        path.write_bytes(gzip.compress(prose(20, 10 + i).encode()))
    (root / "notes.md").write_text("not text to learn")
    for hidden in (".#plain.txt", "folder/.#0.txt"):              # an editor's lock, leads nowhere
        (root / hidden).symlink_to("nowhere")

    corpus = quiet_load(root, tmp_path)
    assert corpus.groups == ["folder", "lines", "plain"] and corpus.vocab == 300
    counts = corpus.manifest["groups"]["folder"]
    assert [counts[split]["documents"] for split in data.SPLITS] == [16, 2, 2]
    assert quiet_load(root, tmp_path, groups="plain, folder").groups == ["plain", "folder"]

    whole = "".join(texts_of(corpus, "plain", tmp_path).values())
    lines = [line for line in whole.split("\n") if line]
    assert sorted(lines) == sorted(prose(300, 1).splitlines())    # all, and each once


def test_a_folder_and_files_of_one_name_are_one_group(tmp_path):
    root = two_groups(tmp_path)
    (root / "alpha").mkdir()
    (root / "alpha" / "more.txt").write_text("folder " * 100)
    (root / "alpha.jsonl").write_text(json_lines(["jsonl " * 10]))
    corpus = quiet_load(root, tmp_path)
    assert corpus.groups == ["alpha", "beta"]
    whole = "".join(texts_of(corpus, "alpha", tmp_path).values())
    assert whole.count("folder") == 100 and whole.count("jsonl") == 10 and "299 " in whole


def test_no_text_is_in_two_splits_or_groups(tmp_path):
    copies = [f"document {i % 40} of forty different ones" for i in range(400)]
    root = folder(tmp_path, other=prose(300))
    (root / "copies.jsonl").write_text(json_lines(copies))
    (root / "again.jsonl").write_text(json_lines(copies + [f"new {i}" for i in range(30)]))

    lines = []
    groups = quiet_load(root, tmp_path, groups="again+other", progress=lines.append)
    groups = groups.manifest["groups"]
    assert sum(groups["again"][split]["documents"] for split in data.SPLITS) == 70
    assert sum(groups["copies"][split]["documents"] for split in data.SPLITS) == 0
    assert groups["again"]["copies"] == {"again": 360} and groups["copies"]["copies"] == {
        "again": 400}
    assert "copies: 0 documents, without 400 copies of text in again" in lines

    decode, texts = decoder(tmp_path).decode, []
    for path in (tmp_path / "cache").glob("*/*.bin"):
        texts += decode(np.fromfile(path, np.uint16).tolist()).split("\n\n")
    texts = [text for text in texts if text.strip()]
    assert len(texts) == len(set(texts)) > 70


def test_of_each_ten_documents_one_is_to_validate_and_one_to_test_on(tmp_path):
    root = two_groups(tmp_path)
    (root / "ten.jsonl").write_text(json_lines(f"number{i}" for i in range(10)))
    texts = texts_of(quiet_load(root, tmp_path), "ten", tmp_path)
    assert texts["val"] == "number3\n\n" and texts["test"] == "number7\n\n"   # each with its end
    assert texts["train"].count("\n\n") == texts["train"].count("number") == 8


def test_ten_different_documents_fill_every_split_however_often_they_come(tmp_path):
    root = two_groups(tmp_path)
    (root / "twice.jsonl").write_text(json_lines(f"number{i // 2}" for i in range(20)))
    texts = texts_of(quiet_load(root, tmp_path), "twice", tmp_path)
    assert texts["val"] == "number3\n\n" and texts["test"] == "number7\n\n"


@given(st.text("ab \n#", max_size=200), st.sampled_from(["#", "##", "\n\n", "b#a"]),
       st.integers(1, 9), st.lists(st.integers(0, 200), max_size=5))
def test_blocks_are_the_text_and_documents_are_what_stands_between_marks(text, mark, size, cuts):
    places = [0, *sorted(cuts), len(text)]
    texts = [text[start:end] for start, end in itertools.pairwise(places)]
    documents = []
    for starts, block in data.blocks(texts, size, mark):
        assert len(block) <= 2 * size + len(mark)
        if starts:
            documents.append("")
        documents[-1] += block
    assert documents == text.split(mark)


def test_blocks_end_where_a_line_ends_or_else_a_word():
    assert data.cut("one\ntwo\nthree\n", 5) == ["one\ntwo\n", "three\n", ""]
    assert data.cut("a bc def ghij klmno", 4) == ["a bc ", "def ", "ghij ", "klmno"]
    assert data.cut("abcdefghij", 2) == ["abcd", "efgh", "ij"]


ONE_LINE = [prose(3000).replace("\n", " "), "acgt" * 50_000, "\u4e00\u4e01" * 50_000]


@pytest.mark.parametrize("text", ONE_LINE, ids=["words", "ascii", "chinese"])
def test_a_corpus_in_a_single_line_is_cut_into_blocks(text, tmp_path):
    root = folder(tmp_path, line=text)
    found = list(data.own_documents([root / "line.txt"], data.Form(), print))
    assert "".join(block for _, _, block in found) == text and 10 <= len(found) <= 80
    assert all(starts for _, starts, _ in found)


@pytest.mark.parametrize("options, mark", [({}, "<|endoftext|>"),
                                           ({"document_mark": "\n\n"}, "\n\n")])
def test_documents_of_a_text_file_are_divided_at_a_mark_and_it_is_said(options, mark, tmp_path):
    root, lines = two_groups(tmp_path), []
    texts = [f"number{i}\n" + "word " * 30 for i in range(10)]
    (root / "ten.txt").write_text(mark.join(texts) + mark)
    corpus = quiet_load(root, tmp_path, progress=lines.append, **options)
    assert texts_of(corpus, "ten", tmp_path)["val"] == texts[3] + "\n\n"
    assert f"1 of 1 files are cut into documents at {data.printable(mark)}" in lines


def slim_pajama(seed):
    """Lines like SlimPajama's, of three sets in turn."""
    sets = ["RedPajamaC4", "RedPajamaBook", "RedPajamaGithub"]
    rows = [{"text": text, "meta": {"redpajama_set_name": sets[i % 3]}}
            for i, text in enumerate(prose(300, seed).splitlines())]
    return sets, "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_the_values_of_a_field_are_the_groups_of_all_files(tmp_path):
    root, lines = two_groups(tmp_path), []
    (root / "chunk1").mkdir()
    sets, first = slim_pajama(0)
    (root / "chunk1" / "a.jsonl").write_bytes(first)
    (root / "chunk1" / "b.json.gz").write_bytes(gzip.compress(slim_pajama(1)[1]))
    corpus = quiet_load(root, tmp_path, group_field="meta.redpajama_set_name",
                        progress=lines.append)
    assert corpus.groups == sets
    for name in sets:
        counts = corpus.manifest["groups"][name]
        assert [counts[split]["documents"] for split in data.SPLITS] == [160, 20, 20]
    assert lines[0] == "not read, as files of its ending are not read: alpha.txt, beta.txt"
    with pytest.raises(DataError, match="no group 'RedPajamaC5', did you mean RedPajamaC4"):
        quiet_load(root, tmp_path, groups="RedPajamaC5+RedPajamaBook",
                   group_field="meta.redpajama_set_name")


def test_a_field_may_have_a_dot_in_its_own_name(tmp_path):
    record = {"a.b": "x", "a": {"b": "y", "c": "z"}}
    assert [data.field(record, name, str, "", "") for name in ("a.b", "a.c")] == ["x", "z"]


def test_zst_is_read_and_half_of_it_is_not(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    root = folder(tmp_path)
    sets, lines = slim_pajama(0)
    with pyarrow.output_stream(str(root / "a.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    options = {"group_field": "meta.redpajama_set_name"}
    assert quiet_load(root, tmp_path, **options).groups == sets
    whole = (root / "a.jsonl.zst").read_bytes()
    (root / "a.jsonl.zst").write_bytes(whole[:-9])
    with pytest.raises(DataError, match="cannot read .*a.jsonl.zst .Truncated"):
        quiet_load(root, tmp_path, **options)


def test_parquet_arrow_and_arrays_are_read_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    root = folder(tmp_path, alpha=prose(300))
    texts = prose(50, 1).splitlines()
    rows = datasets.Dataset.from_dict({"body": texts})
    rows.save_to_disk(str(root / "saved"))
    rows.to_parquet(str(root / "table [1]*.parquet"))
    (root / "array.json").write_text(json.dumps([{"body": text} for text in texts], indent=1))

    for path in root.glob("*[!t]/*.arrow"), root.glob("*.parquet"), root.glob("*.json"):
        records = [record for _, record in data.records(next(path))]
        assert records == [{"body": text} for text in texts]
    files, skipped = data.own_files(root, data.Form(), {})
    assert files["saved"] == [root / "saved" / "data-00000-of-00001.arrow"]
    assert set(skipped) == {"saved/dataset_info.json", "saved/state.json"}

    (root / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="datasets cannot read .*bad.parquet .ArrowInvalid"):
        quiet_load(root, tmp_path, text_field="body")


def test_a_data_set_of_the_hub_is_streamed(tmp_path, monkeypatch):
    def load_dataset(*source, **options):
        assert source == ("me/texts", "en") and options["streaming"]
        for i, text in enumerate(prose(100).splitlines()):
            yield {"text": text, "kind": i % 2}
        if (tmp_path / "fail").exists():
            raise ConnectionError("Max retries\nexceeded")

    fake = types.SimpleNamespace(load_dataset=load_dataset, logging=types.SimpleNamespace(
        CRITICAL=50, set_verbosity=lambda level: None))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    corpus = quiet_load("hf:me/texts:en", tmp_path, group_field="kind")
    assert corpus.groups == ["0", "1"]
    assert corpus.manifest["groups"]["0"]["train"]["documents"] == 40

    (tmp_path / "fail").touch()
    message = "datasets cannot read hf:me/texts:en .ConnectionError: Max retries.exceeded"
    with pytest.raises(DataError, match=message):
        quiet_load("hf:me/texts:en", tmp_path, group_field="kind", cache=tmp_path / "other")


@pytest.mark.parametrize("name, package", [("a.parquet", "datasets"), ("a.jsonl.zst", "pyarrow"),
                                           ("a.json", "datasets")])
def test_a_package_that_is_missing_is_named_and_what_for(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)               # as if not installed
    root = two_groups(tmp_path)
    (root / name).write_text("[]")
    with pytest.raises(DataError, match=f"{name} needs the package {package}: pip install"):
        quiet_load(root, tmp_path)


def test_the_flags_of_a_run_reach_its_text(monkeypatch):
    import train
    calls = []
    monkeypatch.setattr(data, "load", lambda *args, **options: calls.append((args, options)))
    words = ["--data", "texts", "--encoding", "gpt2", "--cache", "c", "--text-field", "body",
             "--group-field", "kind", "--document-mark", "##"]
    for out in ([], ["--out", "o"]):
        config, _ = train.parse([*words, *out])
        train.load_text(config, "a+b")
    options = {"text_field": "body", "group_field": "kind", "document_mark": "##"}
    positional = ("a+b", "texts", "gpt2", "c")
    assert calls == [(positional, options | {"out": out}) for out in ("out", "o")]


def test_a_long_file_of_a_large_folder_is_in_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CLIP", 1000)
    root = folder(tmp_path, other=prose(300))
    (root / "many").mkdir()
    for i in range(12):
        text = f"file{i:02} " + prose(50, i).replace("\n", f"\nfile{i:02} ")
        (root / "many" / f"{i:02}.txt").write_text(text)

    splits = collections.defaultdict(set)
    for split, text in texts_of(quiet_load(root, tmp_path), "many", tmp_path).items():
        for word in re.findall(r"file\d\d", text):
            splits[word].add(split)
    assert len(splits) == 12 and all(len(where) == 1 for where in splits.values())


def test_the_second_load_is_from_the_cache_until_a_file_changes(tmp_path):
    root, lines = folder(tmp_path, a=prose(300), b=prose(300, 1)), []
    first = quiet_load(root, tmp_path, progress=lines.append)
    assert lines[0] == "reading a ..." and all("\n" not in line for line in lines)
    lines.clear()
    again = quiet_load(root, tmp_path, progress=lines.append)
    assert not lines and again.manifest == first.manifest

    for tokens, name in zip(again.train, "ab", strict=True):
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
        entry = again.manifest["groups"][name]["train"]
        assert entry["tokens"] == len(tokens)
        assert entry["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()

    (root / "a.txt").write_text(prose(301))
    assert quiet_load(root, tmp_path, progress=lines.append).manifest != first.manifest and lines


def same_size(path):
    """Another text of the same length, one second later."""
    modified = path.stat().st_mtime_ns + 10**9
    path.write_text(path.read_text().replace("mixture", "MIXTURE"))
    os.utime(path, ns=(modified, modified))


def same_time(path):
    """A longer text with the same time of change."""
    modified = path.stat().st_mtime_ns
    path.write_text(path.read_text() + "one more\n")
    os.utime(path, ns=(modified, modified))


@pytest.mark.parametrize("change", [same_size, same_time])
def test_a_change_of_a_files_time_or_size_alone_is_noticed(change, tmp_path):
    root = two_groups(tmp_path)
    first = quiet_load(root, tmp_path)
    change(root / "beta.txt")
    assert quiet_load(root, tmp_path).digest != first.digest


def test_a_cache_of_other_packages_or_of_an_older_preparation_is_not_used(monkeypatch):
    files = dict.fromkeys(data.GROUPS)

    def key(encoding="bpe1024"):
        return data.cache_key(files, None, encoding, data.Form())

    keys = [key(), key("bpe512")]
    monkeypatch.setattr(data, "PREP", data.PREP + 1)
    keys.append(key())
    monkeypatch.setattr(data, "versions", lambda: {"torch": "another"})
    keys.append(key())
    assert len(set(keys)) == 4 and all(re.fullmatch(r"embedded-bpe\d+-\w{10}", key) for key in keys)


def cut_manifest(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-30])


def other_json(folder):
    (folder / "manifest.json").write_text("[1, 2]")


def other_vocabulary(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab": 300', '"vocab": 299'))


def cut_tokens(folder):
    path = folder / "beta.val.bin"
    path.write_bytes(path.read_bytes()[:-2])


def other_tokens(folder):
    path = folder / "beta.test.bin"
    path.write_bytes(path.read_bytes()[::-1])


def no_tokens(folder):
    (folder / "alpha.train.bin").unlink()


@pytest.mark.parametrize("damage", [cut_manifest, other_json, other_vocabulary, cut_tokens,
                                    other_tokens, no_tokens])
def test_a_cache_that_is_not_as_it_was_written_is_prepared_again(damage, tmp_path, monkeypatch):
    root, lines = two_groups(tmp_path), []
    if damage is cut_tokens:
        monkeypatch.setattr(data, "CHEAP", 0)                     # its size is enough
    first = quiet_load(root, tmp_path)
    [folder] = (tmp_path / "cache").iterdir()
    tokens = (folder / "alpha.train.bin").read_bytes()
    damage(folder)
    again = quiet_load(root, tmp_path, progress=lines.append)
    assert lines[0] == f"{folder} is not as it was written: preparing again"
    assert again.digest == first.digest and (folder / "alpha.train.bin").read_bytes() == tokens
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_text_that_is_moved_has_the_same_digest(tmp_path):
    root = two_groups(tmp_path)
    (root / "gamma").mkdir()
    for name in "bca":
        (root / "gamma" / f"{name}.txt").write_text(prose(60, ord(name)))
    first = quiet_load(root, tmp_path)
    moved = shutil.move(root, tmp_path / "zzz")
    assert quiet_load(moved, tmp_path).digest == first.digest
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_digest_of_the_text_changes_with_the_last_test_document(tmp_path):
    root = folder(tmp_path, alpha=prose(300))
    documents = prose(300, 1).splitlines()
    digests = set()
    for last in ("seven", "eight"):
        (root / "beta.jsonl").write_text(json_lines(documents[:297] + [last] + documents[298:]))
        digests.add(quiet_load(root, tmp_path).digest)
    assert len(digests) == 2


def test_what_a_killed_run_left_half_prepared_goes_away_a_day_later(tmp_path):
    old, new = (tmp_path / "cache" / f"preparing-{name}" for name in ("old", "new"))
    for work in (old, new):
        work.mkdir(parents=True)
        (work / "a.bin").write_bytes(b"1")
        os.utime(work, (0, 0))
    os.utime(old / "a.bin", (0, 0))
    quiet_load(two_groups(tmp_path), tmp_path)
    assert not old.exists() and new.exists()


def test_preparing_twice_gives_the_same_bytes_and_at_once_does_no_harm(tmp_path):
    root, corpora = folder(tmp_path, a=prose(2000), b=prose(2000, 1)), []

    def prepare():
        corpora.append(quiet_load(root, tmp_path))

    threads = [threading.Thread(target=prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other = quiet_load(root, tmp_path, cache=tmp_path / "elsewhere")
    assert len(corpora) == 3
    assert all(corpus.manifest["groups"] == other.manifest["groups"] for corpus in corpora)
    assert len(list((tmp_path / "cache").iterdir())) == 1         # nothing half-written stays


def test_documents_end_with_endoftext_where_the_encoding_has_it(tmp_path, monkeypatch):
    end = {"<|endoftext|>": 99_999}
    big = tiktoken.Encoding("big", pat_str=data.PATTERN, mergeable_ranks=RANKS, special_tokens=end)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: big)
    corpus = quiet_load(two_groups(tmp_path), tmp_path, encoding="gpt2")

    train = corpus.train[0]
    assert corpus.vocab == 100_000 and train.dtype == np.uint32   # large ids fit
    documents = corpus.manifest["groups"]["alpha"]["train"]["documents"]
    assert train[-1] == 99_999 and (train == 99_999).sum() == documents


TYPES = [(256, np.uint16), (65_535, np.uint16), (65_537, np.uint32), (100_000, np.uint32)]


@pytest.mark.parametrize("vocab, dtype", TYPES)
def test_token_ids_fit_their_type(vocab, dtype):
    assert data.dtype_of(vocab) is dtype and np.iinfo(dtype).max >= vocab - 1


# ---- what can be wrong with it

GOOD = prose(300).encode()
LATIN = GOOD + b"caf\xe9 au lait\n"
BAD_LINE = b'{"text": "a"}\n' * 100 + b'{"text": "\xff"}\n'
NO_TEXT = b'{"text": "a"}\n\n{"body": "b", "meta": {"set": "c"}}\n'
BAD = {      # what is wrong: (files, options of load, the error)
    "not UTF-8": ({"bad.txt": LATIN}, {}, rf"bad.txt is not UTF-8 at byte {len(GOOD) + 3}: "),
    "not UTF-8 in a folder": ({"c/x.txt": b"\xff"}, {}, "x.txt is not UTF-8 at byte 0"),
    "cut in a character": ({"bad.txt": "é".encode()[:1]}, {}, "bad.txt is not UTF-8 at byte 0"),
    "not UTF-8 in jsonl": ({"bad.jsonl": BAD_LINE}, {}, "bad.jsonl is not UTF-8 at byte 1410"),
    "UTF-16 without a mark": ({"bad.txt": GOOD.decode().encode("utf-16-le")}, {},
                              "bad.txt is full of NUL characters, as UTF-16 without"),
    "no text key": ({"bad.jsonl": NO_TEXT}, {}, 'bad.jsonl, line 3, has no "text" .*: '
                                                "its fields are body, meta.set; .*--text-field"),
    "no field of groups": ({"bad.jsonl": NO_TEXT}, {"group_field": "meta.set"},
                           'bad.jsonl, line 1, has no "meta.set" .*: .* text; .*--group-field'),
    "a field of names": ({"bad.jsonl": b"".join(b'{"text": "%d"}\n' % i for i in range(200))},
                         {"group_field": "text"}, "--group-field text has over 100 values"),
    "fields of embedded text": ({}, {"data": None, "text_field": "body"}, "name its folder"),
    "a data set without groups": ({}, {"data": "hf:allenai/c4:en"}, "needs --group-field"),
    "text is a number": ({"bad.jsonl": b'{"text": 3}'}, {}, 'bad.jsonl, line 1, has no "text"'),
    "not JSON": ({"bad.jsonl": b"{"}, {}, "bad.jsonl, line 1, is not a JSON object"),
    "nested too deeply": ({"bad.jsonl": b'{"a":' * 10**5}, {}, "line 1, is not a JSON object"),
    "an object on many lines": ({"bad.json": b'{\n"text": "a"\n}'}, {}, "bad.json, line 1, is not"),
    "two groups of one name": ({"C++/a.txt": b"int a;", "C,+.txt": b"c"}, {},
                               "groups 'C,\\+' and 'C\\+\\+' would both be called C__"),
    "a control character": ({"a\033[1m\n.txt": b"\xff"}, {}, r"a\?\[1m\?.txt is not UTF-8"),
    "not gzip": ({"bad.txt.gz": GOOD}, {}, "cannot read .*bad.txt.gz"),
    "cut gzip": ({"bad.txt.gz": gzip.compress(GOOD)[:-9]}, {}, "cannot read .*bad.txt.gz"),
    "empty file": ({"empty.txt": b" \n"}, {}, "group empty has no train text"),
    "no text in a folder": ({"empty/a.md": b"x", "empty/.b": b"x"}, {},
                            "group empty has no text .not read, as it is hidden: empty/.b; not "
                            "read, as files of its ending are not read: empty/a.md.: give .*.txt"),
    "all copies": ({"gamma.txt": GOOD}, {}, "gamma has no train text .0 documents, without "
                                            "\\d+ copies of text in alpha.: give"),
    "one document": ({"one.jsonl": b'{"text": "a"}'}, {}, "group one has no val text"),
    "unknown group": ({}, {"groups": "alpha+bete"},
                      "no group 'bete', did you mean beta\\?: there are alpha, beta"),
    "one group": ({}, {"groups": "alpha"}, "at least two groups, not 1"),
    "one group twice": ({}, {"groups": "alpha,alpha"}, "at least two groups, not 1"),
    "no group": ({}, {"groups": ""}, "at least two groups, not 0"),
    "unknown encoding": ({}, {"encoding": "gpt-2"}, "no encoding 'gpt-2', did you mean gpt2"),
    "no file of ranks": ({}, {"encoding": __file__}, "test_data.py is no file of tiktoken ranks"),
    "tiny bpe": ({}, {"encoding": "bpe255"}, "from 256 to 65536"),
    "huge bpe": ({}, {"encoding": "bpe65537"}, "from 256 to 65536"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_is_one_line_that_says_where_and_leaves_nothing_behind(case, tmp_path):
    files, options, message = BAD[case]
    root = two_groups(tmp_path)
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        quiet_load(root, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("preparing-*"))


def fifo(path):
    os.mkfifo(path)


def nowhere(path):
    path.symlink_to("nowhere")


def itself(path):
    path.symlink_to(path.name)


def device(path):
    path.symlink_to("/dev/zero")


CANNOT = [(fifo, "gamma.txt is a pipe or a device"), (device, "gamma.txt is a pipe or a device"),
          (nowhere, "cannot read .*gamma.txt"), (itself, "cannot read .*gamma.txt")]


@pytest.mark.parametrize("make, message", CANNOT)
def test_what_is_named_like_text_and_is_no_file_is_refused(make, message, tmp_path):
    root = two_groups(tmp_path)
    make(root / "gamma.txt")
    with pytest.raises(DataError, match=message):
        quiet_load(root, tmp_path)


def test_all_that_is_not_read_is_named_with_its_reason_at_every_load(tmp_path):
    root, lines = two_groups(tmp_path), []
    (root / "gamma").mkdir()
    (root / "gamma" / "text.txt").write_text(prose(300, 2))
    for i in range(12):
        (root / "gamma" / f"{i:02}.md").write_text("not text to learn")
    (root / "gamma" / "up").symlink_to("..")
    (root / "linked").symlink_to("gamma")
    os.link(root / "alpha.txt", root / "gamma" / "alpha.txt")
    os.mkfifo(root / "pipe")
    (root / ".git").mkdir()
    (root / "out").mkdir()
    (root / "out" / "history.jsonl").write_text('{"no": "text"}')

    for _ in range(2):
        lines.clear()
        corpus = quiet_load(root, tmp_path, progress=lines.append, cache=root / "cache",
                            out=root / "out")
        assert corpus.groups == ["alpha", "beta", "gamma"]
    names = ", ".join(f"gamma/{i:02}.md" for i in range(10))
    endings = f"not read, as files of its ending are not read: {names} and 3 more"
    assert sorted(lines) == [
        endings,
        "not read, as it is all of it again: gamma/up",
        "not read, as it is alpha.txt: gamma/alpha.txt",
        "not read, as it is for results: out",
        "not read, as it is gamma: linked",
        "not read, as it is hidden: .git",
        "not read, as it is the cache: cache"]
    assert len(corpus.manifest["skipped"]) == 18 and (root / "out" / "history.jsonl").exists()
    with pytest.raises(DataError, match="as it is the cache: use another folder"):
        quiet_load(root, tmp_path, cache=root)


NAMES = {"C++": "C__", "..\\..\\x,y": "_.._x_y", "g..": "g", "a\nb\033[1m": "a_b_[1m",
         "\N{PARROT} zoo": "\N{PARROT} zoo", "x" * 240: "x" * 80, "caf\udce9": "caf_",
         "é" * 60: "é" * 40}


def test_names_of_groups_can_be_printed_listed_and_lead_nowhere(tmp_path):
    root = two_groups(tmp_path)
    for i, raw in enumerate(NAMES):
        raw = raw if raw[0] != "." else "_" + raw                 # else it is hidden
        (root / raw).mkdir()
        (root / raw / "a.txt").write_text(prose(60, i))
    for raw, name in NAMES.items():
        assert data.clean(raw) == name
    assert data.clean("..") == data.clean("") == data.clean("/") == "_"

    corpus = quiet_load(root, tmp_path)
    assert len(corpus.groups) == 2 + len(NAMES) and all(map(str.isprintable, corpus.groups))
    again = quiet_load(root, tmp_path, groups="+".join(corpus.groups))
    assert again.groups == corpus.groups and again.digest == corpus.digest
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "cache"}


def test_a_byte_order_mark_is_no_text(tmp_path):
    root = folder(tmp_path, beta=prose(300, 1))
    lines = json_lines(prose(300).splitlines())
    (root / "alpha.jsonl").write_text(lines)
    plain = quiet_load(root, tmp_path)
    (root / "alpha.jsonl").write_text("\ufeff" + lines)
    assert quiet_load(root, tmp_path).digest == plain.digest
    (root / "alpha.jsonl").write_text(lines + json.dumps({"text": "one more"}))
    other = quiet_load(root, tmp_path)
    assert other.digest != plain.digest and len(plain.digest) == 8


def test_half_a_character_in_json_is_no_error(tmp_path):
    root = two_groups(tmp_path)
    (root / "gamma.jsonl").write_text(json_lines(f"{i} half \ud83d" for i in range(20)))
    whole = "".join(texts_of(quiet_load(root, tmp_path), "gamma", tmp_path).values())
    assert whole.count("half ?") == 20


def test_a_missing_folder_and_an_unwritable_cache_are_named(tmp_path):
    with pytest.raises(DataError, match="no folder .*nowhere"):
        quiet_load(tmp_path / "nowhere", tmp_path)
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(DataError, match="cannot use the cache .*taken"):
        quiet_load(two_groups(tmp_path), tmp_path, cache=tmp_path / "taken")


def test_an_encoding_that_cannot_be_fetched_is_one_clear_line(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("Max retries\nexceeded")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    message = "tiktoken could not fetch gpt2 .*go online once, or use bpe1024"
    with pytest.raises(DataError, match=message) as error:
        quiet_load(two_groups(tmp_path), tmp_path, encoding="gpt2")
    assert "\n" not in str(error.value)


# ---- embedded text

def test_every_embedded_group_is_large_enough_to_train_and_to_measure_on(embedded):
    corpus, _ = embedded
    assert tuple(corpus.groups) == data.GROUPS and corpus.vocab == 1024
    for j, name in enumerate(corpus.groups):
        assert corpus.manifest["groups"][name]["train"]["bytes"] >= 1e6, name
        assert min(len(corpus.val[j]), len(corpus.test[j])) >= 30_000, name
        assert corpus.train[j].max() < 1024


def test_every_named_set_loads_at_once_with_the_same_tokens(embedded):
    corpus, cache = embedded
    for name in data.SETS:
        part = load(name, cache=cache, progress=pytest.fail)
        for group, tokens in zip(part.groups, part.train, strict=True):
            assert np.array_equal(tokens, corpus.train[data.GROUPS.index(group)])


def test_no_long_stretch_of_held_out_text_is_in_the_training_text_of_its_group(embedded):
    """Checked on 40 stretches of 256 tokens a group, wherever they fall.

    `tables` is left out: its files differ, but one code page repeats long runs of another (half of
    the stretches), which is what makes this group low in entropy.
    """
    corpus, _ = embedded
    for j, name in enumerate(corpus.groups):
        if name == "tables":
            continue
        train = np.asarray(corpus.train[j]).tobytes()
        for tokens in (corpus.val[j], corpus.test[j]):
            places = range(0, len(tokens) - 256, len(tokens) // 20)
            assert sum(tokens[i:i + 256].tobytes() in train for i in places) <= 1, name


def test_few_files_are_split_by_their_rank_and_the_same_at_every_reading():
    first, second = list(data.embedded_text("csv")), list(data.embedded_text("csv"))
    assert first == second and len(first) == 30
    counts = collections.Counter(split for split, _ in first)
    assert counts == {"train": 24, "val": 3, "test": 3}


def installed(root, monkeypatch, texts, groups=("python", "prose")):
    """Make the files f000.py, ... of these texts the source of embedded groups."""
    for i, text in enumerate(texts):
        (root / f"f{i:03}.py").write_text(text)
    sources = dict.fromkeys(groups, [("stdlib", "", r"\.py$", {})])
    monkeypatch.setattr(data, "GROUPS", groups)
    monkeypatch.setattr(data, "SOURCES", sources)
    monkeypatch.setattr(data, "topics", {})
    monkeypatch.setattr(data, "package_root", lambda package: root)


def test_a_files_code_and_its_docstrings_are_in_the_same_split(tmp_path, monkeypatch):
    docstring = '"""The file{0:03} is told of here, in more than forty characters."""'
    texts = [f"{docstring.format(i)}\nx = 'file{i:03}'\n" for i in range(200)]
    installed(tmp_path, monkeypatch, texts)
    topics = {f"topic {i}": "A topic is told of here" for i in range(5)}      # shift prose's ranks
    monkeypatch.setattr(data, "topics", topics)

    splits = {"python": {}, "prose": {}}
    for group, found in splits.items():
        for split, text in data.embedded_text(group):
            assert ("is told of" in text) == (group == "prose") != ("x = " in text)
            found |= dict.fromkeys(re.findall(r"file\d{3}", text), split)
    assert splits["python"] == splits["prose"] and len(splits["python"]) == 200
    assert set(splits["python"].values()) == set(data.SPLITS)


def test_a_giant_file_is_clipped_at_a_line_unless_files_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CLIP", 1000)
    installed(tmp_path, monkeypatch, ["line = 1\n" * 500] + [f"x = {i}\n" for i in range(149)])
    longest = max((text for _, text in data.embedded_text("python")), key=len)
    assert longest == "line = 1\n" * (1000 // 9)

    (tmp_path / "f149.py").unlink()                               # 149 files are few
    assert max(len(text) for _, text in data.embedded_text("python")) == 4500


def test_files_come_in_an_order_that_is_not_the_disks_up_to_a_cap(tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch, [f"x = {i}\n" for i in range(100, 300)])
    whole = list(data.embedded_text("python"))
    assert len(whole) == 200 and whole != sorted(whole, key=str)

    forwards = data.walk
    monkeypatch.setattr(data, "walk", lambda *args: reversed(list(forwards(*args))))
    assert list(data.embedded_text("python")) == whole
    monkeypatch.setattr(data, "CAP", 8 * 20)
    assert list(data.embedded_text("python")) == whole[:21]


def test_a_long_paragraph_stays_in_the_first_file_only_where_licences_repeat(tmp_path, monkeypatch):
    licence = "// Permission is granted to copy this paragraph to as many files as you like"
    texts = [f"{licence}\n\n// short\n\nint only_here_{i} = 0;\n" for i in range(30)]
    installed(tmp_path, monkeypatch, texts, groups=("cpp", "math"))
    corpus = load(encoding="bpe300", cache=tmp_path / "cache", progress=None)

    cpp, math = ("".join(texts_of(corpus, g, tmp_path).values()) for g in corpus.groups)
    assert cpp.count(licence) == 1
    assert cpp.count("// short") == cpp.count("only_here_") == 30
    assert math.count(licence) == math.count("only_here_") == 29  # one is a copy of cpp's first


def test_docstrings_are_cut_from_code_and_examples_from_prose():
    source = '''"""A module with a first line long enough to keep.

>>> f(1)  # an example that is long enough to keep

Too short to keep.
"""
def f(x):
    """What f does, told in more than forty characters."""
    if x:
        class C:
            "A class inside, described in more than forty letters"
            y = """not a docstring"""
    return x'''
    code, text = data.code_and_prose(source)
    assert code.split("\n") == ["def f(x):", "    if x:", "        class C:",
                                '            y = """not a docstring"""', "    return x"]
    assert ">>>" not in text and "short" not in text and len(text.split("\n\n")) == 3


def test_an_unknown_embedded_group_is_named_with_the_nearest(tmp_path):
    message = "no group 'pyton', did you mean python\\?: there are python, cpp"
    with pytest.raises(DataError, match=message):
        load("pyton+csv", cache=tmp_path, progress=None)
