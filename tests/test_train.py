"""One run on tiny made-up text: what it promises about seeds, budgets, results and errors."""
import copy
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
import warnings

import numpy as np
import pytest
import tiny
import torch
from tiny import (                                              # noqa: F401
    BASE,
    TINY,
    corpus,
    finished_runs,
    measured,
    run,
    texts,
    tiny_preset,
    trainer,
)

import aioli
import data
import model
import train

KEYS = {"method", "groups", "text", "seed", "preset", "steps", "tokens", "params", "extra_steps",
        "probe_steps", "wall_seconds", "eval_seconds", "tokens_per_second", "test_loss", "test_ppl",
        "avg_test_loss", "avg_test_ppl", "val_loss", "final_mixture", "realised_mixture", "epochs",
        "mixtures", "curve", "settings", "config", "versions", "mfu"}
HALF = np.array([.5, .5])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the runs; two tests draw them again."""
    monkeypatch.setattr(train, "pyplot", lambda: None)


def gradient_of(run):
    return torch.cat([weight.grad.flatten() for weight in run.model.parameters()])


def weights_of(run):
    return torch.cat([weight.detach().flatten() for weight in run.model.parameters()])


def next_batch(run, p):
    """What the run's next batch at mixture p holds, drawn from its sampler: x, y, group."""
    run.sampler.plan(p, 1)
    x, y, group = run.sampler.batch()
    return torch.from_numpy(x), torch.from_numpy(y), group


def spy_on_steps(t):
    """The gradients, flat, of the optimiser steps to come, before anything cuts them."""
    gradients, original = [], t.apply

    def apply(run):
        gradients.append(gradient_of(run))
        original(run)

    t.apply = apply
    return gradients


def interrupt_at(monkeypatch, count):
    """Ctrl-C at the count-th optimiser step of all runs together."""
    steps, original = itertools.count(1), train.Progress.step

    def step(self, *about):
        if next(steps) == count:
            signal.raise_signal(signal.SIGINT)
        original(self, *about)

    monkeypatch.setattr(train.Progress, "step", step)


# --- A whole run ---


def test_the_loss_falls_and_text_with_a_pattern_is_learnt(tmp_path):
    result, _ = run(tmp_path, steps=150)
    (_, first), *_ = result["curve"]
    assert result["test_loss"]["cycle"] < .5 < np.log(48) - 1
    assert first[0] > result["test_loss"]["cycle"]


GROUPS = ["cycle", "words", "noise"]


def requests_of(method, steps, settings):
    """All that a method asks for when it is told made-up losses and signals."""
    rng, m = np.random.default_rng(0), len(GROUPS)
    history = aioli.History(GROUPS, [6000] * len(GROUPS), batch=8, window=16)
    program, reply = method(history, steps, **settings), None
    while True:
        try:
            request = program.send(reply)
        except StopIteration:
            return [row.request for row in history.rows]
        if isinstance(request, aioli.Train):
            history.add(request, loss=4 - request.p)
        elif isinstance(request, aioli.Update):
            history.add(request)
        elif request.against:
            history.add(request, signals=dict(excess=rng.random(m)))
        else:
            signals = dict(A=rng.random((m, m)), norm=rng.random(m), target_norm=1.)
            history.add(request, signals=signals)
        reply = history.reply


def small_and_asked(name, steps):
    """Settings with which a method fits into few steps, and what it then asks for."""
    method, small = aioli.METHODS[name], dict(points=4, rounds=2, sweeps=2, probe=1)
    small = {key: value for key, value in small.items() if key in train.settings_of(method)}
    try:
        return small, requests_of(method, steps, small)
    except ValueError:                                          # too few for it: its own defaults
        return {}, requests_of(method, steps, {})


@pytest.mark.parametrize("method", aioli.METHODS)
def test_every_method_runs_to_a_whole_result_with_its_whole_cost_in_it(tmp_path, method):
    published = method in ("aioli_published", "aioli_static", "aioli_diagonal", "aioli_ood")
    steps = 80 if published else 30                             # a round of the paper's is long
    small, asked = small_and_asked(method, steps)
    result, rows = run(tmp_path, method, GROUPS, small, steps=steps)

    assert KEYS == set(result) and result["steps"] == steps
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved == json.loads(json.dumps(result))
    extra = [train.steps_of(request) for request in asked if request.on != "main"]
    probes = [request.steps for request in asked if getattr(request, "probe", False)]
    assert result["extra_steps"] == sum(extra) and result["probe_steps"] == sum(probes)
    assert [row["on"] for row in rows] == [request.on for request in asked]

    mixtures = [result["final_mixture"], result["realised_mixture"]]
    for mixture in mixtures + [mixture for _, mixture in result["mixtures"]]:
        assert list(mixture) == GROUPS
        assert sum(mixture.values()) == pytest.approx(1, abs=1e-9)
    main = [row for row in rows if row["on"] == "main" and row["verb"] == "Train"]
    wanted = sum(np.array(row["p"]) * row["steps"] * 8 for row in main)
    assert np.abs(wanted - sum(np.array(row["windows"]) for row in main)).max() < 2


def test_a_result_says_what_was_measured(tmp_path):
    settings = {"rounds": 3, "probe": 2}
    result, rows = run(tmp_path, "aioli_rounds", ("cycle", "noise"), settings, steps=60)
    main = [row for row in rows if row["on"] == "main"]
    windows = sum(np.array(row["windows"]) for row in main)

    assert list(result["val_loss"].values()) == main[-1]["reply"]
    assert list(result["final_mixture"].values()) == main[-1]["p"] == rows[-1]["p"]
    assert list(result["realised_mixture"].values()) == pytest.approx(windows / windows.sum())
    assert list(result["epochs"].values()) == pytest.approx(windows / (5999 // 16))
    losses = np.array(list(result["test_loss"].values()))
    assert list(result["test_ppl"].values()) == pytest.approx(np.exp(losses))
    assert result["avg_test_loss"] == pytest.approx(losses.mean())
    assert result["avg_test_ppl"] == pytest.approx(np.exp(losses).mean())

    new = [row for row in main if row["steps"] and not row.get("probe")]
    assert [at for at, _ in result["mixtures"]] == [row["at"] - row["steps"] for row in new]
    assert [list(p.values()) for _, p in result["mixtures"]] == [row["p"] for row in new]
    assert result["tokens"] == 60 * 8 * 16 and result["seed"] == 0 and result["text"] == ""
    assert result["params"] == weights_of(trainer().run("main")).numel()
    assert result["settings"]["rounds"] == 3 and result["config"]["lr"] == 3e-3
    assert result["versions"]["torch"] == torch.__version__


def with_bytes(found):
    """This Corpus with a manifest: a token of a group has 2, 3, ... bytes, in test text 3 more."""
    counts = {}
    for j, group in enumerate(found.groups):
        counts[group] = {split: dict(tokens=10, bytes=10 * (2 + j + 3 * (split == "test")))
                         for split in data.SPLITS}
    return found._replace(manifest=dict(groups=counts))


def test_bits_per_byte_are_told_where_the_bytes_are_known(tmp_path, monkeypatch, capsys):
    made_up, _ = run(tmp_path, steps=4)
    assert not {"test_bits", "avg_test_bits"} & set(made_up)
    assert "bits per byte" not in capsys.readouterr().out

    known = with_bytes(tiny.corpus("cycle", "words"))
    monkeypatch.setattr(tiny, "corpus", lambda *groups: known)
    result, _ = run(tmp_path, steps=4, name="known")
    by_hand = {group: loss / np.log(2) / b
               for (group, loss), b in zip(result["test_loss"].items(), (5, 6))}
    assert result["test_bits"] == pytest.approx(by_hand)
    assert result["avg_test_bits"] == pytest.approx(sum(by_hand.values()) / 2)
    assert f"   bits per byte {result['avg_test_bits']:.4f}   " in capsys.readouterr().out
    assert train.read_result(tmp_path / "known" / "result.json")["test_bits"] == result["test_bits"]


def test_the_bytes_of_a_token_are_counted_in_the_text(texts, tmp_path):       # noqa: F811
    """Where tokens are single bytes all are of the text but two line ends after each document."""
    found = data.load(data=str(texts), encoding="bpe256", cache=str(tmp_path / "cache"))
    for split in data.SPLITS:
        counts = [found.manifest["groups"][group][split] for group in ("code", "law")]
        sizes = map(len, getattr(found, split))
        by_hand = [1 - 2 * count["documents"] / size for count, size in zip(counts, sizes)]
        assert found.bytes_per_token(split) == pytest.approx(by_hand) and max(by_hand) < 1
    assert found._replace(manifest={}).bytes_per_token("val") is None


def test_bits_as_an_objective_are_those_of_the_validation_text(tmp_path, monkeypatch):
    known = with_bytes(tiny.corpus("cycle", "words"))
    monkeypatch.setattr(tiny, "corpus", lambda *groups: known)
    found = {objective: run(tmp_path, "horizon", settings=dict(objective=objective), name=objective)
             for objective in ("bits", "3+2", "loss")}
    mixtures = {name: [list(p.values()) for _, p in result["mixtures"]]
                for name, (result, _) in found.items()}
    np.testing.assert_allclose(mixtures["bits"], mixtures["3+2"], atol=1e-6)
    assert abs(mixtures["bits"][-1][0] - mixtures["loss"][-1][0]) > 1e-3


def test_speed_counts_the_tokens_of_scratch_runs_and_not_the_seconds_of_evaluation(tmp_path):
    t = trainer(steps=4)
    history = aioli.History(t.corpus.groups, [6000, 6000], 8)
    requests = [aioli.Train(HALF, 6, on="scratch"), aioli.Peek(HALF, 9, on="proxy"),
                aioli.Update(HALF, on="proxy"), aioli.Train(HALF, 4)]
    for request in requests:
        history.add(request, **t.answer(request))
    t.eval_seconds = 50.
    result = train.summarise(t.config, {}, t, history, wall=100.)

    assert [train.steps_of(request) for request in requests] == [6, 0, 1, 4]
    assert train.steps_taken(history.rows) == dict(scratch=6, proxy=1, main=4)
    assert (result["steps"], result["extra_steps"]) == (4, 7)
    assert result["tokens_per_second"] == pytest.approx(11 * 8 * 16 / 50, abs=1)
    assert 100 <= result["wall_seconds"] < 110 and 50 <= result["eval_seconds"] < 60


def test_a_run_of_nothing_but_probes_has_the_mixture_that_it_began_with(tmp_path):
    settings = {"rounds": 1, "sweeps": 2, "probe": 3}
    result, _ = run(tmp_path, "aioli_rounds", settings=settings, steps=12)
    assert result["probe_steps"] == 12
    assert result["mixtures"] == [[0, {"cycle": .5, "words": .5}]]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    a, b, c = (run(tmp_path, "aioli_rounds", settings={"rounds": 2}, name=name, seed=seed)[0]
               for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert measured(a) == measured(b) and measured(a) != measured(c)


def test_how_often_one_evaluates_changes_nothing_in_training(tmp_path):
    often, seldom = (run(tmp_path, name=str(every), eval_every=every)[0] for every in (3, 1000))
    assert [step for step, _ in often["curve"]] == list(range(3, 60, 3))
    assert seldom["curve"] == [] and measured(often) == measured(seldom)


def test_two_methods_with_one_seed_start_from_the_same_weights_and_read_the_same_text(
        tmp_path, monkeypatch):
    read, weights, original = {}, {}, train.Trainer.batch

    def spy(self, run):
        weights.setdefault(self.config.method, weights_of(run).clone())
        x, y, group = original(self, run)
        for window, g in zip(x.tolist(), group, strict=True):
            read.setdefault((self.config.method, int(g)), []).append(window)
        return x, y, group

    monkeypatch.setattr(train.Trainer, "batch", spy)
    run(tmp_path, "stratified", name="a")
    run(tmp_path, "natural", settings={"alpha": 0.0}, name="b", steps=40)
    run(tmp_path, "aioli_rounds", settings={"rounds": 2}, name="c")
    for other in ("natural", "aioli_rounds"):
        assert torch.equal(weights["stratified"], weights[other])
        for g in (0, 1):
            a, b = read["stratified", g], read[other, g]
            n = min(len(a), len(b))
            assert n > 100 and a[:n] == b[:n]


def test_aioli_moves_the_mixture_to_the_group_that_can_be_learnt(tmp_path):
    """Training on noise lowers no loss; what is left of the mixture goes to the chain."""
    settings = {"rounds": 4, "sweeps": 4, "eta": 2.0}
    result, rows = run(tmp_path, "aioli_rounds", ("words", "noise"), settings, steps=200,
                       val_windows=64)
    shares = [mixture["words"] for _, mixture in result["mixtures"]]
    assert shares[-1] > .6 and result["probe_steps"] == 4 * 2 * 4 * 4
    A = np.array([row["A"] for row in rows if "A" in row])
    assert A.shape == (4, 2, 2) and A[:, :, 0].sum() > A[:, :, 1].sum()


def test_what_is_reported_is_the_loss_on_test_text_and_methods_see_validation_text(tmp_path):
    """Group 0 is a pattern in training; noise is in its test text, or in its validation text."""
    text, noise = corpus("cycle", "words"), corpus("noise", "words")
    config = train.Config(method="stratified", steps=60, preset="tiny", out=str(tmp_path), lr=3e-3)
    in_test = train.train(config, {}, text._replace(test=noise.test))
    in_val = train.train(config, {}, text._replace(val=noise.val))
    assert in_test["test_loss"]["cycle"] > 1 + in_test["val_loss"]["cycle"]
    assert in_val["val_loss"]["cycle"] > 1 + in_val["test_loss"]["cycle"]


def test_the_seed_decides_the_text_and_the_history_knows_the_run(tmp_path, monkeypatch):
    histories, batches, batch = [], [], train.Trainer.batch
    original = aioli.History

    def history(*about, **more):
        histories.append(original(*about, **more))
        return histories[-1]

    def spy(self, run):
        batches.append(batch(self, run))
        return batches[-1]

    monkeypatch.setattr(aioli, "History", history)
    monkeypatch.setattr(train.Trainer, "batch", spy)
    for seed in (3, 4):
        run(tmp_path, "natural", name=str(seed), seed=seed, steps=2, warmup=.3, batch=4)
    one, two = histories
    assert one.groups == ["cycle", "words"] and one.sizes.tolist() == [6000, 6000]
    assert (one.batch, one.seed, one.warmup, two.seed) == (4, 3, .3, 4)
    assert not torch.equal(batches[0][0], batches[2][0])


def test_training_has_no_denormals_and_measuring_the_test_loss_has(tmp_path, monkeypatch):
    small, drive, summarise = torch.full((8,), 1e-30), train.drive, train.summarise
    flushed = []

    def spied(function):
        def spy(*about, **more):
            flushed.append(bool((small * 1e-10 == 0).all()))
            return function(*about, **more)
        return spy

    monkeypatch.setattr(train, "drive", spied(drive))
    monkeypatch.setattr(train, "summarise", spied(summarise))
    run(tmp_path, steps=2)
    assert flushed == [True, False] and (small * 1e-10 > 0).all()


# --- Stopped and resumed ---


@pytest.mark.parametrize("method, prior, cut", [
    ("aioli_rounds", "", 7), ("aioli_rounds", "", 29), ("aioli", "", 11), ("doremi", "", 75),
    ("doge", "", 25), ("natural", "skillit", 8),
])
def test_a_run_stopped_anywhere_and_resumed_is_the_run_that_was_not_stopped(
        tmp_path, monkeypatch, method, prior, cut):
    """In a round; in the main run; on a proxy with losses, or gradients; on a prior's half run."""
    settings = {"rounds": 2} if method == "aioli_rounds" else {}
    about = dict(settings=settings, prior=prior, steps=34, eval_every=5)
    whole, rows = run(tmp_path, method, name="whole", **about)

    with monkeypatch.context() as patch:
        interrupt_at(patch, cut)
        with pytest.raises(train.Stop, match="--resume"):
            run(tmp_path, method, name="cut", **about)
    assert not (tmp_path / "cut" / "result.json").exists()
    saved = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert 0 <= saved["trainer"]["eval_seconds"] < saved["wall"]
    with pytest.raises(ValueError, match="a run that was stopped; go on with --resume"):
        run(tmp_path, method, name="cut", **about)              # does not write over it

    again, rows_again = run(tmp_path, method, name="cut", resume=True, **about)
    assert measured(again) == measured(whole) and again["curve"] == whole["curve"]
    assert [row["p" if "p" in row else "w"] for row in rows] == \
        [row["p" if "p" in row else "w"] for row in rows_again]
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_the_time_before_a_stop_is_counted(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(train.Stop):
            run(tmp_path, steps=5)
    path = tmp_path / "out" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["wall"] += 1000
    saved["trainer"]["eval_seconds"] += 400
    torch.save(saved, path)
    result, _ = run(tmp_path, steps=5, resume=True)
    assert 1000 < result["wall_seconds"] < 1100 and 400 <= result["eval_seconds"] < 500


def test_resuming_with_other_settings_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 50)
        with pytest.raises(train.Stop):
            run(tmp_path, "aioli_rounds", settings={"rounds": 2})
    for settings, config, says in (({"eta": .5}, {}, "--eta 0.2, not 0.5"),
                                   ({}, {"lr": 1e-3}, "--lr 0.003, not 0.001")):
        with pytest.raises(ValueError, match=f"of a run with {says}"):
            run(tmp_path, "aioli_rounds", settings={"rounds": 2, **settings}, resume=True, **config)
    result, _ = run(tmp_path, "aioli_rounds", settings={"rounds": 2}, resume=True, device="cpu")
    assert result["steps"] == 60                                # but on another machine


def test_a_finished_run_is_kept_whatever_comes_while_it_is_tested(tmp_path, monkeypatch):
    original, before = train.summarise, signal.getsignal(signal.SIGINT)

    def interrupted(*about):
        signal.raise_signal(signal.SIGINT)
        return original(*about)

    monkeypatch.setattr(train, "summarise", interrupted)
    result, _ = run(tmp_path, steps=5)
    assert result["steps"] == 5 and signal.getsignal(signal.SIGINT) is before


def test_text_too_short_to_be_tested_on_is_refused_before_the_run():
    short = corpus("cycle", "words")._replace(test=[np.arange(9), np.arange(9)])
    with pytest.raises(data.DataError, match="group cycle has 9 tokens"):
        train.Trainer(train.Config(preset="tiny"), short)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train.write(path, dict(step=1))

    def fails(content, file):
        file.write(b"half of")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError):
        train.write(path, dict(step=2))
    assert torch.load(path) == dict(step=1) and list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_through_no_link_and_over_what_a_killed_process_left(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "result.json.part").symlink_to(other)
    train.write(tmp_path / "result.json", "new")
    assert other.read_text() == "mine" and (tmp_path / "result.json").read_text() == "new"


# --- The history ---


@pytest.mark.parametrize("method", ["aioli_rounds", "doremi", "doge"])
def test_a_history_that_is_read_again_is_the_one_that_was_written(tmp_path, method):
    settings = {"rounds": 2, "probe": 1} if method == "aioli_rounds" else {}
    run(tmp_path, method, settings=settings, steps=16)
    rows = train.read_history(tmp_path / "out" / "history.jsonl")
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines(keepends=True)
    assert [train.row_line(row, json.loads(line)["at"]) for row, line in zip(rows, lines)] == lines
    assert not any("NaN" in line for line in lines)
    request = rows[-1].request
    assert isinstance(request.p, np.ndarray) and request.steps and request.on == "main"


class Counting:
    """A trainer that answers Train requests with the number of the answer."""

    def __init__(self, done=None):
        self.answered, self.done = [], done
        self.config = train.Config(steps=10 ** 6)

    def answer(self, request):
        self.answered.append(request)
        loss = np.full(2, float(len(self.answered)))
        return dict(loss=loss, windows=request.steps * 8 * request.p)


def ask(*requests):
    """A method that asks for these -> what it was told."""
    told = []
    for request in requests:
        told.append((yield request))
    return told


def drive(requests, done=None, **rows):
    """What a method was told, which requests were trained, the rows of the history, in order.
    done: steps of the first request that a checkpoint has."""
    t, history = Counting(done), aioli.History("ab", [1, 1], 8)
    told = train.drive(ask(*requests), t, history, **rows)
    return [float(loss[0]) for loss in told], list(map(str, t.answered)), history.rows


def row_of(request, loss):
    return aioli.Row(request, np.full(2, loss), request.p, request.steps * 8 * request.p)


A, B = np.array([.75, .25]), np.array([.25, .75])
SWEEP = [aioli.Train(A, 5, on="sweep-0"), aioli.Train(B, 5, on="sweep-1"), aioli.Train(A, 5)]


def test_known_runs_are_taken_as_far_as_they_are_what_is_asked():
    known = [row_of(SWEEP[0], 70.), row_of(SWEEP[1], 80.)]
    fresh = []
    told, trained, rows = drive(SWEEP, known=known, on_row=fresh.append)
    assert told == [70., 80., 1.] and trained == list(map(str, SWEEP[2:]))
    assert rows[:2] == known and fresh == rows[2:]

    told, trained, _ = drive([aioli.Train(HALF, 0), *SWEEP], known=known)
    assert told == [1., 70., 80., 2.]
    for change in (dict(p=B), dict(steps=6), dict(on="sweep-9"), dict(total_steps=50)):
        other = SWEEP[0]._replace(**change)
        told, trained, _ = drive([other, *SWEEP[1:]], known=known)
        assert told == [1., 2., 3.] and len(trained) == 3
    told, _, _ = drive([SWEEP[0]._replace(p=A + [1e-12, -1e-12]), *SWEEP[1:]], known=known)
    assert told == [70., 80., 1.]


def test_a_run_that_is_trained_in_part_is_trained_to_its_end_not_taken_from_another():
    known = [row_of(SWEEP[0], 70.)]
    told, trained, _ = drive(SWEEP[:1], known=known, done=2)
    assert told == [1.] and len(trained) == 1


def test_past_rows_are_replayed_and_have_to_be_what_is_asked():
    past = [row_of(SWEEP[0], 70.)]
    told, trained, rows = drive(SWEEP, past=past)
    assert told == [70., 1., 2.] and trained == list(map(str, SWEEP[1:]))
    assert len(rows) == 3 and len(past) == 1
    with pytest.raises(ValueError, match="of another run"):
        drive(SWEEP[1:], past=past)


def test_the_cost_of_runs_taken_over_is_counted(tmp_path):
    first, _ = run(tmp_path, "grid", settings={"points": 3}, name="grid", steps=10)
    lines = (tmp_path / "grid" / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [dict(row, seconds=1000.) if row["on"] != "main" else row for row in rows]
    past = tmp_path / "grid" / "history.jsonl"
    past.write_text("\n".join(map(json.dumps, rows)))
    again, lines = run(tmp_path, "dml", settings={"points": 3}, steps=10, past=str(past))
    assert 3000 < again["wall_seconds"] < 3100
    assert again["extra_steps"] == first["extra_steps"] == 30
    assert [line["seconds"] for line in lines[:3]] == [1000.] * 3


def test_past_runs_that_nobody_asks_for_are_told(tmp_path, capsys):
    run(tmp_path, "grid", settings={"points": 3}, name="grid", steps=10)
    past = str(tmp_path / "grid" / "history.jsonl")
    run(tmp_path, "natural", steps=10, past=past, name="natural")
    assert "--past changed nothing: natural asked for none" in capsys.readouterr().out
    run(tmp_path, "dml", settings={"points": 3}, steps=10, past=past, name="dml")
    assert "--past changed nothing" not in capsys.readouterr().out


def test_short_extra_runs_read_their_share_of_the_text_and_repeat_as_the_long_run(tmp_path, capsys):
    """So what is learnt in an eighth of the steps is of as many epochs."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "put_aside", lambda self, run: seen.append(run))
        result, _ = run(tmp_path, "grid", settings={"points": 3}, steps=160, scratch=.125)
    epochs = {run.name: sum(run.sampler.epochs) for run in seen}
    assert result["steps"] == 160 and result["extra_steps"] == 3 * 20
    assert [epochs[f"sweep-{i}"] for i in range(3)] == pytest.approx([epochs["main"]] * 3, rel=.03)
    assert "--scratch changed nothing" not in capsys.readouterr().out
    run(tmp_path, "natural", steps=10, scratch=.125, name="natural")
    assert "--scratch changed nothing: this run needed no extra ones" in capsys.readouterr().out


def test_runs_that_others_go_on_with_are_not_taken_over(tmp_path):
    """DoReMi's proxy is scored with the reference model itself, not with its losses."""
    for method in ("doremi", "doge"):
        run(tmp_path, method, steps=9, name=method)
        with pytest.raises(ValueError, match="has no runs that another can take"):
            run(tmp_path, method, steps=9, past=str(tmp_path / method / "history.jsonl"))


def test_runs_of_another_seed_rate_or_text_are_not_taken_over(tmp_path):
    result, _ = run(tmp_path, "grid", steps=9, settings={"points": 3})
    past = str(tmp_path / "out" / "history.jsonl")
    config = train.Config(**{**result["config"], "past": past})
    assert len(train.scratch_runs(config, "")) == 3
    for other, text, says in ((config, "0123abcd", "other text"),
                              (dataclasses.replace(config, seed=1), "", "--seed 0, not 1"),
                              (dataclasses.replace(config, lr=.1), "", "--lr 0.003, not 0.1")):
        with pytest.raises(ValueError, match=f"a run with {says}"):
            train.scratch_runs(other, text)


def test_two_runs_differ_in_the_first_flag_that_is_not_free():
    ours = train.flags_of(train.Config(lr=.1, threads=2), {"eta": .2}, "abc")
    theirs = {**json.loads(json.dumps(ours)), "threads": 1}
    assert train.difference(theirs, ours, train.MAY_CHANGE) == ""
    assert train.difference(theirs, ours, ()) == "--threads 1, not 2"
    assert train.difference({**theirs, "eta": .5}, ours, ("threads",)) == "--eta 0.5, not 0.2"
    assert train.difference({**theirs, "text": ""}, ours, ("threads",)) == "other text"
    without = {name: value for name, value in theirs.items() if name != "weight_decay"}
    assert train.difference(without, ours, ("threads",)) == "--weight-decay None, not 0.1"


# --- One step ---


def test_peek_measures_excess_loss_clipped_token_by_token():
    t = trainer(batch=4)
    t.answer(aioli.Train(HALF, 20, on="reference"))
    peek = aioli.Peek(HALF, 20, on="proxy", against="reference")
    excess = t.answer(peek)["signals"]["excess"]

    x, y, group = next_batch(trainer(batch=4).run("proxy", 20), HALF)
    with torch.no_grad():
        loss = trainer(batch=4).run("proxy", 20).model(x, y, per_token=True)              # (B, T)
        gap = loss - t.run("reference").model(x, y, per_token=True)
    assert (gap < 0).any()
    for j in (0, 1):
        kept = [max(float(v), 0) for v in gap[group == j].flatten()]
        assert excess[j] == pytest.approx(sum(kept) / len(kept), rel=1e-5)


def test_gradients_are_kept_in_the_same_memory_step_after_step():
    """New ones each step, between a history's small arrays, made doge grow by 20 MB a step."""
    t, places = trainer(batch=4), set()
    for _ in range(3):
        t.answer(aioli.Peek(HALF, 20, on="proxy"))
        places.add(tuple(part.data_ptr() for part in t.peeked["proxy"].values()))
        t.answer(aioli.Update(HALF, on="proxy"))
    assert len(places) == 1


@pytest.mark.parametrize("against", ["", "reference"])
def test_an_absent_group_is_marked_and_the_others_take_their_step(against):
    t = trainer(batch=4)
    t.answer(aioli.Train(HALF, 1, on="reference"))
    only = np.array([1., 0.])
    answer = t.answer(aioli.Peek(only, 20, "proxy", against))
    signals = answer["signals"]
    assert answer["windows"].tolist() == [4, 0] and answer["lr"] == t.lr(t.run("proxy"))
    if against:
        assert np.isnan(signals["excess"][1]) and signals["excess"][0] > 0
    else:
        assert np.isnan(signals["A"][:, 1]).all() and np.isfinite(signals["A"][:, 0]).all()
        assert np.isnan(signals["norm"][1]) and np.isfinite(signals["norm"][0])

    gradients = spy_on_steps(t)
    t.answer(aioli.Update(np.array([.3, .7]), on="proxy"))
    twin = trainer(batch=4).run("proxy", 20)
    x, y, _ = next_batch(twin, only)
    (.3 * twin.model(x, y).mean()).backward()
    torch.testing.assert_close(gradients[0], gradient_of(twin), rtol=1e-4, atol=1e-6)
    assert t.run("proxy").step == 1 and t.peeked == {}


@pytest.mark.parametrize("against", ["", "reference"])
def test_an_update_steps_on_the_weighted_loss_whether_the_peek_left_gradients_or_losses(against):
    """Weighted gradients of groups are the gradient of the weighted loss."""
    t, w = trainer(batch=8), np.array([.9, .2])
    t.answer(aioli.Train(HALF, 1, on="reference"))
    t.answer(aioli.Peek(HALF, 20, "proxy", against))
    gradients = spy_on_steps(t)
    t.answer(aioli.Update(w, "proxy"))

    twin = trainer(batch=8).run("proxy", 20)
    x, y, group = next_batch(twin, HALF)
    loss = twin.model(x, y)
    sum(w[j] * loss[group == j].mean() for j in (0, 1)).backward()
    torch.testing.assert_close(gradients[0], gradient_of(twin), rtol=1e-4, atol=1e-6)


def spy_on_gradients(t, calls):
    """Random gradients instead, and a note of (kind of text, group, windows, gradient) of each."""
    rows, batches, original = t.val[0].tolist(), [], t.batch
    generator = torch.Generator().manual_seed(0)

    def batch(run):
        batches.append(original(run))
        return batches[-1]

    def gradient(run, x, y, out):
        x = x.tolist()
        held_out = [row in rows for row in x]
        drawn, _, group = batches[-1]
        drawn = drawn.tolist()
        groups = {int(t.val[2][rows.index(row)]) if row in rows else int(group[drawn.index(row)])
                  for row in x}
        assert len(set(held_out)) == len(groups) == 1
        out.normal_(generator=generator)
        kind = "held out" if held_out[0] else "batch"
        calls.append((kind, groups.pop(), x, out.clone()))
        return out

    t.batch, t.gradient_of = batch, gradient


def test_A_of_a_peek_is_gradients_of_validation_text_times_gradients_of_the_batch():
    t, calls = train.Trainer(train.Config(preset="tiny", batch=4), corpus("words", "noise")), []
    spy_on_gradients(t, calls)
    signals = t.answer(aioli.Peek(HALF, 20, on="proxy"))["signals"]
    of = {(kind, group): gradient for kind, group, _, gradient in calls}
    assert len(calls) == 4
    for i in (0, 1):
        assert signals["norm"][i] == pytest.approx(float(of["batch", i].norm()), rel=1e-5)
        for j in (0, 1):
            product = float(of["held out", i] @ of["batch", j])
            assert signals["A"][i, j] == pytest.approx(product, rel=1e-3, abs=1e-2)
    mean = (of["held out", 0] + of["held out", 1]) / 2
    assert signals["target_norm"] == pytest.approx(float(mean.norm()), rel=1e-5)


def test_the_targets_of_gradients_are_drawn_anew_each_step_from_all_validation_windows():
    def aims_of(seed):
        config = train.Config(preset="tiny", val_windows=8, seed=seed)
        t, calls = train.Trainer(config, corpus("words", "noise")), []
        spy_on_gradients(t, calls)
        for _ in range(12):
            t.answer(aioli.Peek(HALF, 20, on="proxy"))
        return [(group, x) for kind, group, x, _ in calls if kind == "held out"]

    aims = aims_of(0)
    for j in (0, 1):
        of_group = [x for group, x in aims if group == j]
        assert {len(x) for x in of_group} == {4}                # as many as its own windows
        windows = {tuple(window) for window in itertools.chain(*of_group)}
        assert len(windows) == 8                                # --val-windows
    assert aims_of(0) == aims_of(0) != aims_of(1)


def test_a_step_has_the_rate_of_its_run_clipped_gradients_and_decays_matrices_only():
    t, steps = trainer(batch=4, clip=.01, beta2=.7, weight_decay=.3), []
    short, rates = t.run("short", 20), []
    parts = short.optimizer.param_groups

    def step():
        steps.append(([part["lr"] for part in parts], float(gradient_of(short).norm())))

    short.optimizer.step = step
    for _ in range(4):
        rates.append(t.lr(short))
        t.answer(aioli.Train(HALF, 1, on="short"))
    assert short.total_steps == 20 and t.run("whole", 7).total_steps == 7
    assert t.run("main").total_steps == t.config.steps
    assert [rate for rate, _ in steps] == [[rate] * 2 for rate in rates] and len(set(rates)) == 4
    assert all(norm <= .01 * (1 + 1e-4) for _, norm in steps)

    for part in parts:
        assert part["betas"] == (.9, .7)
        matrices = {weight.dim() for weight in part["params"]} == {2}
        assert part["weight_decay"] == (.3 if matrices else 0)
    assert sum(len(part["params"]) for part in parts) == len(list(short.model.parameters()))


def test_a_clip_of_0_is_none():
    """A thousand times the loss, a thousand times the gradient: nothing cut it."""
    t, norms = trainer(batch=4, clip=0.), []
    once = t.run("once", 20)

    def step():
        norms.append(float(gradient_of(once).norm()))

    once.optimizer.step = step
    x, y, _ = next_batch(once, HALF)
    for factor in (1, 1000):
        (factor * once.model(x, y).mean()).backward()
        t.apply(once)
    assert norms[1] == pytest.approx(1000 * norms[0], rel=1e-4) and norms[0] > 0


def test_no_gradient_is_left_from_the_step_before():
    t = trainer(batch=4)
    t.answer(aioli.Train(HALF, 2))
    assert all(weight.grad is None for weight in t.run("main").model.parameters())


def test_a_scratch_run_without_a_length_of_its_own_ends_with_its_request():
    t = trainer()
    t.answer(aioli.Train(HALF, 3, on="alone"))
    t.answer(aioli.Train(HALF, 3, on="part", total_steps=9))
    assert t.run("alone").total_steps == 3 and t.run("alone").optimizer is None
    assert t.run("part").total_steps == 9 and t.run("part").optimizer


def test_a_state_can_be_loaded_twice():
    t = trainer()
    t.answer(aioli.Train(HALF, 2, on="part", total_steps=9))
    part = t.run("part")
    saved = copy.deepcopy(part.state())
    ends = []
    for _ in range(2):
        part.load(saved)
        assert part.step == 2
        t.answer(aioli.Train(HALF, 3, on="part", total_steps=9))
        ends.append(weights_of(part).clone())
    assert torch.equal(*ends)


def test_evaluation_keeps_its_own_clock(monkeypatch):
    t, clock = trainer(), itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    main = t.run("main")
    before = weights_of(main).clone()
    t.validate(main)
    t.validate(main, t.test)
    assert t.eval_seconds == 2 and torch.equal(before, weights_of(main))


def test_seeds_begin_with_weights_of_their_own_and_all_runs_of_a_seed_with_the_same():
    t = trainer()
    main, scratch = weights_of(t.run("main")), weights_of(t.run("scratch", 9))
    assert torch.equal(main, scratch)
    assert not torch.equal(main, weights_of(trainer(seed=1).run("main")))


def test_all_seeds_and_batches_are_measured_on_the_same_windows():
    a, b = trainer(seed=0), trainer(seed=1, batch=3)
    for ours, theirs in ((a.val, b.val), (a.test, b.test)):
        assert all(map(np.array_equal, ours, theirs))
    assert len(a.val[0]) == 2 * 8 and a.val[2].tolist() == [0] * 8 + [1] * 8
    losses = a.validate(a.run("main"))
    x, y, group = a.val
    with torch.no_grad():
        each = a.run("main").model(x, y).numpy()
    assert losses == pytest.approx([each[group == j].mean() for j in (0, 1)], rel=1e-5)


@pytest.mark.parametrize("name, steps", [("main", 100), ("scratch", 7)])
def test_the_learning_rate_warms_up_and_falls_to_its_floor_at_the_runs_own_length(name, steps):
    t, rates = trainer(steps=steps), []
    run_ = t.run(name, 100)
    for run_.step in range(100):
        rates.append(t.lr(run_))
    assert rates[:10] == pytest.approx(.003 * np.arange(1, 11) / 10)
    assert max(rates) == pytest.approx(.003) and np.argmax(rates) == 9
    assert rates[54] == pytest.approx(.003 * (.1 + .9 / 2))     # half of the way down
    assert rates[-1] == pytest.approx(.0003) and (np.diff(rates[9:]) < 0).all()


def test_a_constant_rate_falls_in_the_last_fifth_only():
    t = trainer(steps=110, warmup=.1 / 1.1, schedule="constant")              # 10 steps of warm-up
    main, rates = t.run("main"), []
    for main.step in range(110):
        rates.append(t.lr(main))
    assert rates[9:90] == pytest.approx([.003] * 81) and rates[-1] == pytest.approx(.0003)
    assert np.diff(rates[89:]) == pytest.approx([-.0027 / 20] * 20)           # in a straight line


def test_a_rate_may_fall_to_nothing_and_need_not_warm_up():
    t = trainer(steps=10, warmup=0., final_lr=0.)
    main = t.run("main")
    assert t.lr(main) == pytest.approx(.003 * (1 + np.cos(np.pi / 10)) / 2)
    main.step = 9
    assert t.lr(main) == 0


def test_threads_are_as_asked():
    before = torch.get_num_threads()
    try:
        trainer(threads=2)
        assert torch.get_num_threads() == 2
        trainer(threads=0)
        assert torch.get_num_threads() == 2
        trainer()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_numbers_too_small_to_be_normal_are_zero_in_training_only():
    small = torch.full((8,), 1e-30)
    with train.no_denormals():
        assert (small * 1e-10 == 0).all()
    assert (small * 1e-10 > 0).all()


# --- What a run says ---


def test_off_a_terminal_a_line_tells_of_every_tenth_of_a_run(tmp_path, capsys):
    run(tmp_path, "grid", settings={"points": 2}, steps=30)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "tok/s" in line and " left " in line]
    assert "\r" not in said and len(lines) == 30                # two scratch runs and the main run
    assert [line.split()[1] for line in lines if line.startswith("main")] == \
        [f"{step}/30" for step in range(3, 31, 3)]
    assert lines[0].startswith("sweep-0 3/30  10%  loss ") and "cycle .333  words .667" in lines[0]
    assert lines[19].startswith("sweep-1 30/30 100%") and "0:00 left" in lines[19]


def test_the_time_left_goes_by_the_steps_so_far(monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))      # 0, then 10
    t = trainer(steps=100, batch=4)
    progress, main = train.Progress(t.config, t.corpus.groups), t.run("main")
    progress.steps, main.step, progress.where = 5, 5, "main 5/100"
    line = progress.line(aioli.Train(A, 100), main, torch.tensor(2.5))
    assert line == "main 5/100   5%  loss 2.500  0.0k tok/s  3:10 left  cycle .750  words .250"


def test_in_a_terminal_every_change_of_the_mixture_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(train.shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    result, _ = run(tmp_path, "aioli_rounds", settings={"rounds": 3, "eta": 1e-3})
    said = capsys.readouterr().out
    shares = [p["cycle"] for _, p in result["mixtures"]]
    assert max(shares) - min(shares) < .005 and len(set(shares)) == 3
    assert said.count("mixture now") == 3 and said.count("mean validation loss") == 3
    live = [line for line in said.split("\r")[1:] if "mixture" not in line]
    assert live and all(line.endswith("\033[K") and len(line) <= 39 + 3 for line in live)

    capsys.readouterr()
    run(tmp_path, "stratified", name="uniform")
    assert "mixture now" not in capsys.readouterr().out


def test_a_run_ends_with_how_uniform_sampling_does_or_how_to_find_out(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = dict(steps=10, lr=3e-3, method="natural", preset="tiny", val_windows=4, test_windows=8)
    text = corpus("cycle", "words")

    def closing(**config):
        result = train.train(train.Config(**{**base, **config}), {}, text)
        said = capsys.readouterr().out.splitlines()
        return result, [line for line in said if "uniform sampling" in line]

    _, [line] = closing(threads=0)
    command = line.removeprefix("for comparison, uniform sampling: ").split()
    assert command[:4] == ["python", "train.py", "--method", "stratified"]
    config, _ = train.parse(command[2:])
    assert config == train.Config(**{**base, "method": "stratified", "threads": 0})

    uniform, lines = closing(method="stratified", threads=0)
    assert lines == []
    for more in ({}, {"eval_every": 3}, {"out": str(tmp_path / "elsewhere")}):
        ours, [line] = closing(**more)
        theirs = uniform["avg_test_ppl"]
        assert f"uniform sampling: average test perplexity {theirs:.3f} " in line
        assert f"this run: {ours['avg_test_ppl'] - theirs:+.3f} " in line
    for more in ({"seed": 1}, {"steps": 9}, {"beta2": .9}):     # not of that run
        assert "python train.py" in closing(**more)[1][0]
    text = text._replace(digest="0123abcd")
    assert "python train.py" in closing(out=str(tmp_path / "other"))[1][0]


def test_uniform_sampling_is_found_beside_the_run_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, steps=5, name="sub/stratified-cycle+words-s0")
    run(tmp_path, "natural", steps=5, name="sub/mine")
    assert "this run: " in capsys.readouterr().out
    run(tmp_path, "natural", steps=5, name="mine")
    assert "this run: " not in capsys.readouterr().out


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "{}", '{"config": {}}', '{"config": null, "text": ""}', "folder",
    '{"config": {"prior": ""}, "text": "", "method": "stratified", "avg_test_ppl": NaN}',
    '{"config": {"prior": ""}, "text": "", "method": "stratified", "avg_test_ppl": 0}'])
def test_a_damaged_result_of_uniform_sampling_does_not_harm_a_finished_run(
        tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stratified-cycle+words-s0" / "result.json"
    path.parent.mkdir()
    path.mkdir() if content == "folder" else path.write_text(content)
    assert run(tmp_path, "natural", steps=2, name="mine")[0]["steps"] == 2
    assert "for comparison, uniform sampling" in capsys.readouterr().out


def test_a_run_may_write_into_the_folder_that_one_is_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = train.Config(method="natural", steps=2, preset="tiny", out=".", val_windows=4,
                          test_windows=8)
    train.train(config, {}, corpus("cycle", "words"))
    assert "written to ." in capsys.readouterr().out and (tmp_path / "result.json").exists()


def test_a_prior_before_uniform_sampling_is_not_uniform_sampling(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, steps=6, prior=".9+.1", name="stratified-cycle+words-s0")
    assert "for comparison, uniform sampling" in capsys.readouterr().out
    run(tmp_path, "natural", steps=6, name="mine")
    assert "for comparison, uniform sampling" in capsys.readouterr().out


def test_a_run_draws_its_mixture_and_its_losses(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    monkeypatch.setitem(model.PRESETS, "tiny", TINY)
    run(tmp_path, "aioli_rounds", settings={"rounds": 2}, eval_every=7)
    assert (tmp_path / "out" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_run_says_how_to_get_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setitem(model.PRESETS, "tiny", TINY)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(tmp_path, steps=2)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "out" / "run.png").exists()


# --- The command line ---


def test_your_own_text_from_the_command_line(texts, tmp_path, capsys):        # noqa: F811
    code = train.main([*BASE, "--method", "aioli", "--rounds", "30", "--data", str(texts),
                       "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o")])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "average test perplexity" in said.out and f"written to {tmp_path / 'o'}" in said.out
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["groups"] == ["code", "law"] and result["text"]


def test_a_prior_comes_first_and_its_runs_are_counted(texts, tmp_path, capsys):           # noqa: F811
    code = train.main([*BASE, "--method", "aioli_rounds", "--prior", "skillit", "--rounds", "1",
                       "--probe", "2", "--data", str(texts), "--cache", str(tmp_path / "c"),
                       "--out", str(tmp_path / "o")])
    assert code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["steps"] == 40 and result["extra_steps"] == 20 * 2 + 20


def test_a_prior_may_be_a_mixture_and_a_method_may_go_on_from_it(tmp_path):
    settings = {"rounds": 1, "probe": 1, "sweeps": 1, "eta": 0.}
    for restart, after in (("prior", .9), ("uniform", .5)):
        result, _ = run(tmp_path, "aioli_rounds", settings=settings, steps=20, prior=".9+.1",
                        first=.4, restart=restart, name=restart)
        assert result["mixtures"][0] == [0, pytest.approx({"cycle": .9, "words": .1})]
        assert result["mixtures"][1][0] == 8 + 2
        assert result["final_mixture"]["cycle"] == pytest.approx(after)
        assert result["extra_steps"] == 0


@pytest.mark.parametrize("arguments, says, code", [
    (["--method", "aioly"], "did you mean 'aioli'", 2),
    (["--sead", "3"], "did you mean '--seed'", 2),
    (["--preset", "lapdog"], "did you mean 'laptop'", 2),
    (["--schedule", "cosin"], "did you mean 'cosine'", 2),
    (["--groups", "code+lav"], "lav", 2),
    (["--groups", "code"], "two groups", 2),
    (["--data", "nowhere"], "nowhere", 2),
    (["--method", "aioli_rounds", "--f", "0.5"], "does not favour", 2),
    (["--method", "aioli_rounds", "--rounds", "10"], "leave 4 a round", 2),
    (["--method", "aioli_rounds", "--rounds", "100"], "cannot be cut", 2),
    (["--method", "aioli_rounds", "--sweeps", "0"], "--sweeps 0", 2),
    (["--method", "aioli_rounds", "--ema", "2"], "--ema 2", 2),
    (["--rounds", "5"], "raise --rounds or --wait", 2),
    (["--wait", "2"], "--wait 2", 2),
    (["--eta", "nan"], "--eta nan", 2),
    (["--method", "doge", "--mu", "0"], "--mu 0", 2),
    (["--method", "skillit", "--window", "0"], "--window 0", 2),
    (["--method", "doremi", "--smoothing", "2"], "--smoothing 2", 2),
    (["--method", "grid", "--points", "0"], "--points 0", 2),
    (["--method", "horizon", "--last", "3"], "--last 3", 2),
    (["--method", "horizon", "--reach", "-1"], "--reach -1", 2),
    (["--method", "horizon", "--rounds", "10"], "raise --rounds or --wait", 2),
    (["--groups", "code", "law"], "'law' is not the value of any flag", 2),
    (["--objective", "bleu"], "neither loss, perplexity nor bits", 2),
    (["--objective", "1+x"], "neither loss, perplexity nor bits", 2),
    (["--objective", "2+1+1"], "not 2 shares", 2),
    (["--method", "aioli_ood", "--target", "lav"], "there are code, law", 2),
    (["--method", "aioli_ood"], "give three groups", 2),
    (["--method", "fixed", "--mixture", "1+1+1"], "not 2 shares", 2),
    (["--prior", "grid", "--restart", "best"], "uniform or prior", 2),
    (["--groups", "code+law", "--prior", ".5+.3+.2"], "--prior '.5+.3+.2' is not 2 shares", 2),
    (["--method", "skillit", "--prior", "grid", "--restart", "prior"], "always starts from", 2),
    (["--prior", "dmml"], "did you mean 'dml'", 2),
    (["--prior", "grid:perplexity"], "unknown prior 'grid:perplexity'", 2),
    (["--device", "gpu"], "device", 2),
    (["--steps", "many"], "invalid int value", 2),
    (["--steps"], "expected one argument", 2),
    (["--method", "grid", "--past", "nowhere.jsonl"], "no finished run is there", 2),
    (["--out", "/proc/nobody/may/write"], "/proc/nobody", 1),
    (["--out", __file__], "a file is in its way", 2),
    (["--cache", ""], "must be a folder", 2),
    (["--threads", "100000"], "at most 1024", 2),
    (["--cache", __file__], "cannot use the cache", 2),
    (["--steps", "0"], "--steps 0 must be at least 1", 2),
    (["--steps", "-3"], "--steps -3", 2),
    (["--steps", "1e3"], "invalid int value", 2),
    (["--steps", str(10 ** 30)], "below 9e+09 / --batch", 2),
    (["--batch", "0"], "--batch 0", 2),
    (["--lr", "nan"], "--lr nan", 2),
    (["--lr", "inf"], "--lr inf", 2),
    (["--lr", "1e30"], "run main, step", 2),
    (["--warmup", "1"], "--warmup 1", 2),
    (["--final-lr", "1.1"], "--final-lr 1.1", 2),
    (["--beta2", "1"], "--beta2 1", 2),
    (["--clip", "-1"], "--clip -1", 2),
    (["--weight-decay", "-inf"], "--weight-decay", 2),
    (["--seed", str(2 ** 63)], "below 2^63", 2),
    (["--threads", "-1"], "--threads -1", 2),
    (["--micro-batch", "-1"], "--micro-batch -1", 2),
    (["--micro-batch", "9"], "at most --batch 8", 2),
    (["--save-every", "-1"], "--save-every -1", 2),
    (["--max-epochs", "-1"], "--max-epochs -1", 2),
    (["--eval-every", "0"], "--eval-every 0", 2),
    (["--val-windows", "0"], "--val-windows 0", 2),
    (["--init", "nowhere.safetensors"], "--init", 2),
    (["--device", "meta"], "try auto or cpu", 2),
    (["--device", ""], "device", 2),
    (["--encoding", "bpe9"], "an N from 256 to 65536", 2),
    (["--encoding", "gtp2"], "did you mean gpt2", 2),
    (["--encoding", __file__], "no file of tiktoken ranks", 2),
    (["--group-field", "source"], "has no file with fields (not read, as files of", 2),
    (["--groups", ""], "two groups", 2),
    (["--first", ".3"], "changes nothing without --prior", 2),
    (["--scratch", "0"], "--scratch 0.0 must be a share", 2),
    (["--scratch", "1.5"], "--scratch 1.5 must be a share", 2),
    (["--scratch", "nan"], "--scratch nan must be a share", 2),
    (["--method", ""], "unknown method", 2),
    (["--wait", ".5", "--last", ".4"], "nothing is forecast", 2),
])
def test_bad_input_gets_one_line_an_exit_code_and_leaves_nothing(
        texts, tmp_path, capsys, arguments, says, code):                      # noqa: F811
    places = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o")]
    assert train.main([*BASE, *places, *arguments]) == code
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and "Traceback" not in error
    assert not list(tmp_path.glob("o/*"))


@pytest.mark.parametrize("name, values", [
    ("steps", [0, -1]), ("batch", [0]), ("val_windows", [0]), ("test_windows", [0]),
    ("eval_every", [0]), ("seed", [-1, 2 ** 64]), ("threads", [-1]), ("micro_batch", [-1]),
    ("lr", [0., -1., np.inf]),
    ("warmup", [-.1, 1.]), ("final_lr", [-.1, 1.1]), ("weight_decay", [-.1, np.inf]),
    ("beta2", [-.1, 1.]), ("clip", [-1.]), ("first", [-.1, 1.1]), ("restart", ["best"]),
])
def test_a_flag_out_of_range_is_one_line(name, values):
    if isinstance(getattr(train.Config, name), float):
        values = [*values, np.nan]
    for value in values:
        with pytest.raises(ValueError) as error:
            train.Config(**{name: value})
        said = str(error.value)
        assert said.startswith(f"{train.flag(name)} {value} must be ") and "\n" not in said


def test_the_ends_of_ranges_are_allowed():
    train.Config(steps=1, batch=1, val_windows=1, test_windows=1, eval_every=1, seed=0, threads=0,
                 warmup=0., final_lr=0., weight_decay=0., beta2=0., clip=0., first=0.)
    train.Config(final_lr=1., first=1., restart="prior", schedule="constant", seed=2 ** 63 - 1)


@pytest.mark.parametrize("arguments, where", [
    (["--quick"], "compare"), (["--seeds", "3"], "compare"), (["--controls"], "compare"),
    (["--jobs=2"], "compare"), (["--fidelity"], "fidelity"), (["--fork", "50"], "fidelity"),
    (["--table", "x.csv"], "fidelity"), (["--holdout", "m.csv", "l.csv"], "laws"),
    (["--method", "dml", "--runs", "m.csv", "l.csv"], "laws"),
    (["--method", "aioli,dml"], "compare"), (["--method", "all"], "compare"),
    (["--method", "aioli:perplexity"], "compare"), (["--prior", "all"], "compare"),
    (["--prior", "grid,dml"], "compare"), (["--groups", "sets"], "compare"),
])
def test_what_takes_several_runs_is_sent_to_where_it_is_done(arguments, where, capsys):
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith(f"use python -m paper.{where}") and "\n" not in error


@pytest.mark.parametrize("arguments, says", [
    (["--first", ".3"], "--first changes nothing without --prior"),
    (["--restart", "prior"], "--restart changes nothing without --prior"),
])
def test_a_flag_that_would_change_nothing_is_refused(arguments, says, capsys):
    assert train.main(arguments) == 2
    assert says in capsys.readouterr().err
    train.parse(["--prior", "grid", "--first", ".3"])


@pytest.mark.parametrize("method", aioli.METHODS)
def test_help_lists_and_explains_what_a_run_takes_and_nothing_else(method, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--method", method, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    options = said[said.index("a run:"):].split("\n  --")[1:]
    _, settings = train.parse(["--method", method])
    fields = [field.name for field in dataclasses.fields(train.Config)]
    assert [option.split()[0] for option in options] == \
        [name.replace("_", "-") for name in (*fields, *settings)]
    explained = {**train.help_of(train.Config), **train.help_of(aioli.METHODS[method])}
    assert all(explained.get(name) for name in (*fields, *settings))


def test_the_papers_command_runs_on_a_folder_in_the_form_of_slimpajama(tmp_path, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "pythia-160m", TINY)
    rng, names = np.random.default_rng(0), ("RedPajamaArXiv", "RedPajamaGithub", "RedPajamaBook")
    for file in range(2):
        lines = [json.dumps({"text": " ".join(map(str, rng.integers(0, 99, 40))),
                             "meta": {"redpajama_set_name": names[number % 3]}})
                 for number in range(90)]
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"chunk{file}.jsonl").write_text("\n".join(lines))

    command = ["--preset", "paper", "--steps", "80", "--data", str(tmp_path / "text"),
               "--group-field", "meta.redpajama_set_name", "--encoding", "bpe300",
               "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert train.main(command) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["method"] == "aioli_published" and result["probe_steps"] == 72
    assert sorted(result["groups"]) == sorted(names)


def test_every_default_is_that_of_the_method_and_of_the_config():
    config, settings = train.parse([])
    assert config == train.Config()
    assert settings == dict(rounds=25, wait=.16, last=.4, eta=.5, objective="perplexity")
    argv = "--method doge --mu .01 --val-windows 3 --compile --lr .1".split()
    config, settings = train.parse(argv)
    assert (settings["mu"], config.method, config.val_windows) == (.01, "doge", 3)
    assert config.compile and config.lr == .1


def test_the_papers_preset_is_its_model_its_aioli_and_its_rate_and_flags_still_count():
    config, settings = train.parse(["--preset", "paper"])
    assert (config.method, config.preset, config.steps, config.lr, config.warmup, config.batch) == (
        "aioli_published", "pythia-160m", 5000, 5e-4, .1, 8)
    assert settings == train.parse(["--method", "aioli_published"])[1]
    other, _ = train.parse(["--preset", "paper", "--method", "doge", "--steps", "2"])
    assert (other.method, other.steps, other.lr) == ("doge", 2, 5e-4)
    with pytest.raises(ValueError, match="unknown preset 'papers'"):
        train.parse(["--preset", "papers"])


def test_a_setting_out_of_range_is_refused_before_any_text_is_read():
    for method, flag, value in (("aioli_rounds", "--sweeps", "0"), ("doge", "--mu", "0"),
                                ("horizon", "--last", "nan"), ("grid", "--objective", "bleu"),
                                ("dml", "--objective", "1+-1")):
        with pytest.raises(ValueError, match=f"^{flag} "):
            train.parse(["--method", method, flag, value])


@pytest.mark.parametrize("default", [True, (1, 2), [1], np.ones(2)])
def test_a_setting_that_can_be_no_flag_is_refused(monkeypatch, default):
    def mine(h, steps, weights=default):
        """My method.  weights: of mine."""
        yield aioli.Train(h.uniform, steps)
    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    with pytest.raises(ValueError, match="'weights' can be no flag"):
        train.parse(["--method", "mine"])


@pytest.mark.parametrize("factor", [.5, 2])
def test_a_method_that_trains_for_other_than_the_steps_asked_for_gets_no_result(
        tmp_path, monkeypatch, factor):
    def mine(h, steps):
        """My method."""
        yield aioli.Train(h.uniform, int(factor * steps))
    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    with pytest.raises(ValueError, match="^mine .* the main run .* have to add up to --steps 20"
                                         r"( \(if it forgot the last ones, .* --resume\))?$"):
        run(tmp_path, "mine", steps=20)
    assert not (tmp_path / "out" / "result.json").exists()


def test_the_last_steps_that_a_method_forgot_are_added_on_resume(tmp_path, monkeypatch):
    def mine(parts):
        def method(h, steps):
            for n in parts:
                yield aioli.Train(h.uniform, n)
        return method

    monkeypatch.setitem(aioli.METHODS, "mine", mine([8, 8]))
    with pytest.raises(ValueError, match="go on with --resume"):
        run(tmp_path, "mine", steps=20)
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    monkeypatch.setitem(aioli.METHODS, "mine", mine([8, 8, 4]))
    mended = run(tmp_path, "mine", steps=20, resume=True)
    whole = run(tmp_path, "mine", steps=20, name="whole")
    assert measured(mended[0]) == measured(whole[0])


def test_a_method_that_goes_on_is_stopped_at_the_end_of_the_run(tmp_path, monkeypatch):
    def mine(h, steps):
        """My method."""
        for _ in range(100):
            yield aioli.Train(h.uniform, 3)
    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    with pytest.raises(ValueError, match="asks for 3 steps of the main run at step 6"):
        run(tmp_path, "mine", steps=8)


@pytest.mark.parametrize("on", ["main", "proxy"])
def test_a_method_that_only_asks_is_stopped(on, tmp_path, monkeypatch):
    def mine(h, steps):
        """My method."""
        yield aioli.Train(h.uniform, 1, on=on)
        for _ in range(100):
            yield aioli.Train(h.uniform, 0, on=on)
    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    monkeypatch.setattr(train, "MANY_REQUESTS", 20)
    with pytest.raises(ValueError, match="^mine asks 20 times in a row for no step"):
        run(tmp_path, "mine", steps=8)


def test_a_method_may_ask_often_between_its_steps(tmp_path, monkeypatch):
    def mine(h, steps):
        """My method."""
        for n in (*[0] * 20, 4, *[0] * 20, 4):
            yield aioli.Train(h.uniform, n)
    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    monkeypatch.setattr(train, "MANY_REQUESTS", 20)
    result, _ = run(tmp_path, "mine", steps=8)
    assert result["steps"] == 8


def test_a_method_that_returns_its_requests_is_no_method(tmp_path, monkeypatch):
    monkeypatch.setitem(aioli.METHODS, "mine", lambda h, steps: aioli.Train(h.uniform, steps))
    with pytest.raises(ValueError, match="^mine is no method: it has to yield its requests$"):
        run(tmp_path, "mine", steps=8)


@pytest.mark.parametrize("w", [[.5, np.nan], [.5, .25, .25], 1.])
def test_weights_of_a_step_are_a_number_a_group(w, tmp_path, monkeypatch):
    def mine(h, steps):
        """My method."""
        yield aioli.Peek(h.uniform, steps, on="proxy")
        yield aioli.Update(w, on="proxy")
    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    with pytest.raises(ValueError, match="weights of an Update must be 2 finite numbers"):
        run(tmp_path, "mine", steps=8)


def test_a_value_that_looks_like_a_flag_stays_one():
    words = train.as_flags(dict(groups="-x+y", seed=3, resume=True, eta=-1.0))
    assert words == ["--groups=-x+y", "--seed", "3", "--resume", "--eta=-1.0"]
    config, _ = train.parse(train.as_flags(dict(groups="-x+y")))
    assert config.groups == "-x+y"


def test_names_of_groups_are_drawn_as_they_are(tmp_path):
    """matplotlib leaves out a name that begins with _, sets what is between $ as formulas, and
    warns of letters that a font lacks."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    groups, h = ["_misc", "$a$", "日本語"], aioli.History("abc", [1, 1, 1], 8)
    h.add(aioli.Train(h.uniform, 3), loss=[3., 2., 1.])
    shares = dict.fromkeys(groups, 1 / 3)
    result = dict(groups=groups, mixtures=[[0, shares]], final_mixture=shares, steps=3, curve=[],
                  method="mine", seed=0)
    drawn = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(pyplot, "close", drawn.append)
        patch.setattr(train, "pyplot", lambda: pyplot)
        train.picture(result, h, tmp_path / "run.png")
    [legend] = [axis.get_legend() for axis in drawn[0].axes if axis.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == [" _misc", r"\$a\$", "日本語"]
    pyplot.close("all")


def test_a_bug_in_a_method_is_told_with_its_line_and_bad_input_without(capsys):
    def bug():
        return np.ones(2) + np.ones(3)

    def refusal():
        raise ValueError("take another")
    assert train.exit_code("me", bug) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(r"shapes .*\(test_train.py, line \d+, in bug\)$", said)
    assert train.exit_code("me", refusal) == 2
    assert capsys.readouterr().err == "me: take another\n"


def test_a_setting_named_like_a_flag_of_every_run_is_refused(monkeypatch):
    def mine(h, steps, seed=3):
        """My method.  seed: of mine."""
        yield aioli.Train(h.uniform, steps)

    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    with pytest.raises(ValueError, match="'seed' is the name of a flag"):
        train.parse(["--method", "mine"])


@pytest.mark.parametrize("error, code, says", [
    (ValueError("two\nlines"), 2, "me: two lines\n"), (OSError("disk"), 1, "me: disk\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 1, "lower --batch"),
    (train.Stop("stopped"), 130, "stopped"), (KeyboardInterrupt(), 130, "\nstopped\n"),
    (None, 0, ""),
])
def test_a_program_ends_with_a_code_and_a_line(error, code, says, capsys):
    def command():
        if error:
            raise error

    assert train.exit_code("me", command) == code
    assert says in capsys.readouterr().err


def test_names_lose_what_they_share_up_to_a_separator():
    assert train.plain_names(["train_the_law", "train_the_lab"]) == ["law", "lab"]
    assert train.plain_names(["law_val_loss", "web_val_loss"]) == ["law", "web"]
    assert train.plain_names(["law", "lab"]) == ["law", "lab"]
