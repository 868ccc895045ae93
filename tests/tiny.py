"""Tiny made-up text, a tiny model and short runs, for all tests that train.

    from tiny import run, texts, tiny_preset      # noqa: F401, fixtures
"""
import functools
import json

import numpy as np
import pytest

import aioli
import data
import model
import train

TINY = model.Shape(layers=1, heads=2, width=32, window=16, vocab=48)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    """`--preset tiny`, in every test of a module that imports this name."""
    monkeypatch.setitem(model.PRESETS, "tiny", TINY)


@functools.cache
def corpus(*groups):
    """Made-up text: "cycle" repeats a pattern, "words" is a Markov chain, "noise" is noise."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(48, .05), 48).cumsum(1)

    def tokens(group, n):
        if group == "cycle":
            return np.arange(n) % 11
        if group == "noise":
            return rng.integers(0, 48, n)
        out = np.zeros(n, int)
        for i in range(1, n):
            out[i] = min(np.searchsorted(chain[out[i - 1]], rng.random()), 47)
        return out

    splits = {}
    for split, n in (("train", 6000), ("val", 1500), ("test", 1500)):
        splits[split] = [tokens(group, n).astype(np.uint16) for group in groups]
    return data.Corpus(groups=list(groups), vocab=48, manifest={}, **splits)


def run(tmp_path, method="stratified", groups=("cycle", "words"), settings=None, name="out",
        **config):
    """One run of 60 steps -> its result and the lines of its history.jsonl, decoded."""
    usual = dict(steps=60, preset="tiny", out=str(tmp_path / name), val_windows=16, test_windows=32,
                 lr=3e-3)
    _, defaults = train.parse(["--method", method])
    config = train.Config(method=method, **{**usual, **config})
    result = train.train(config, {**defaults, **(settings or {})}, corpus(*groups))
    lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def measured(result):
    """All of a result that must not depend on the clock."""
    keys = ("test_loss", "mixtures", "realised_mixture", "val_loss", "probe_steps", "epochs")
    return {key: result[key] for key in keys}


def trainer(**config):
    """A Trainer of the tiny model on "cycle" and "words"."""
    config = train.Config(preset="tiny", val_windows=8, lr=3e-3, **config)
    return train.Trainer(config, corpus("cycle", "words"))


@pytest.fixture
def texts(tmp_path):
    """A folder of own text: two groups, code and law, of 40 words each."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("law", "code"):
        words = [name + str(i) for i in range(40)]
        paragraphs = [" ".join(rng.choice(words, 60)) for _ in range(400)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder


# the shared flags of a run on `texts`; add --data, --cache and --out
BASE = ["--preset", "tiny", "--encoding", "bpe300", "--steps", "40", "--val-windows", "4",
        "--test-windows", "4"]


def finished_runs(folder, names, law, runs=12):
    """CSV files of runs that this law made, as others keep them: the losses in another order,
    names with common ends -> the two paths."""
    P = aioli.cover(len(names), runs, np.random.default_rng(0))
    mixtures = [f"train_the_{name}" for name in names]
    losses = [f"valid_{name}_loss" for name in names]
    return [write_table(folder / "p.csv", mixtures, P, range(runs)),
            write_table(folder / "l.csv", losses, law(P), reversed(range(runs)))]


def write_table(path, columns, table, order):
    """A CSV file whose first column numbers the runs -> its path."""
    lines = [",".join(map(str, [i, *table[i]])) for i in order]
    path.write_text("\n".join(["run," + ",".join(columns), *lines]) + "\n")
    return str(path)
