"""The loop end to end on tiny made-up text: what it promises about seeds, budgets, results and errors."""
import copy
import dataclasses
import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import aioli
import data
import model
import train

KEYS = {"method", "groups", "seed", "preset", "steps", "tokens", "params", "extra_steps", "probe_steps", "wall_seconds",
        "eval_seconds", "tokens_per_second", "test_loss", "test_ppl", "avg_test_ppl", "final_mixture",
        "realised_mixture", "mixtures", "versions"}


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(model.PRESETS, "tiny", model.Config(layers=1, heads=2, width=32, window=16, vocab=48))


def corpus(*groups):
    """Groups of made-up text: "cycle" repeats a pattern, "words" is a Markov chain, "noise" cannot be learnt."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(48, .05), 48).cumsum(1)

    def text(group, n):
        if group == "cycle":
            return np.arange(n) % 11
        if group == "noise":
            return rng.integers(0, 48, n)
        out = np.zeros(n, int)
        for i in range(1, n):
            out[i] = min(np.searchsorted(chain[out[i - 1]], rng.random()), 47)
        return out

    splits = {split: [text(g, n).astype(np.uint16) for g in groups] for split, n in
              (("train", 6000), ("val", 1500), ("test", 1500))}
    return data.Corpus(groups=list(groups), vocab=48, manifest={}, **splits)


def run(tmp_path, method="stratified", groups=("cycle", "words"), settings=None, name="out", **config):
    config = dict(dict(steps=60, preset="tiny", out=str(tmp_path / name), val_windows=16, test_windows=32, lr=3e-3), **config)
    _, defaults = train.parse(["--method", method])
    result = train.train(train.Config(method=method, **config), {**defaults, **(settings or {})}, corpus(*groups))
    lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def measured(result):
    """All of a result that must not depend on the clock."""
    return {k: result[k] for k in ("test_loss", "mixtures", "realised_mixture", "val_loss", "probe_steps", "epochs")}


def test_the_loss_falls_and_text_with_a_pattern_is_learnt(tmp_path):
    result, rows = run(tmp_path, steps=150)
    assert result["test_loss"]["cycle"] < .5 < np.log(48) - 1 and result["curve"][0][1][0] > result["test_loss"]["cycle"]


@pytest.mark.parametrize("method", aioli.METHODS)
def test_every_method_runs_to_a_whole_result_with_its_whole_cost_in_it(tmp_path, method, capsys):
    m, steps = 3, 30
    small = {"points": 4} if method in ("grid", "dml", "power") else {"rounds": 2} if method == "skillit" else \
        {"sweeps": 2, "probe": 1} | ({} if method == "aioli_static" else {"rounds": 2}) if "aioli" in method else {}
    result, rows = run(tmp_path, method, ("cycle", "words", "noise"), small, steps=steps)
    assert KEYS <= set(result) and result["steps"] == steps == sum(
        row.get("steps", 0) for row in rows if row["on"] == "main")
    extra = {"grid": 4, "dml": 4, "power": 4, "skillit": m, "doremi": 2, "doge": 1}.get(method, 0)
    assert result["extra_steps"] == extra * steps
    arms = m - 1 if method == "aioli_ood" else m
    assert result["probe_steps"] == (0 if "aioli" not in method else arms * 2 * (1 if method == "aioli_static" else 2))
    for mixture in [result["final_mixture"], result["realised_mixture"]] + [p for _, p in result["mixtures"]]:
        assert list(mixture) == ["cycle", "words", "noise"] and abs(sum(mixture.values()) - 1) < 1e-9
    assert result["avg_test_ppl"] == pytest.approx(np.mean(np.exp(list(result["test_loss"].values()))))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["avg_test_ppl"] == result["avg_test_ppl"]
    assert result["tokens"] == steps * 8 * 16
    asked = sum(np.array(row["p"]) * row["steps"] * 8 for row in rows if row["on"] == "main")
    got = sum(np.array(row["windows"]) for row in rows if row["on"] == "main")
    assert np.abs(asked - got).max() < 1 + 1e-9 or method in ("aioli_ood", "dml", "power")    # within a window of the ask


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    a, b, c = (run(tmp_path, "aioli", settings={"rounds": 2}, name=n, seed=s)[0] for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert measured(a) == measured(b) and measured(a) != measured(c)


def test_how_often_one_evaluates_changes_nothing_in_training(tmp_path):
    often, seldom = (run(tmp_path, name=n, eval_every=e)[0] for n, e in (("a", 3), ("b", 1000)))
    assert len(often["curve"]) == 19 and seldom["curve"] == [] and measured(often) == measured(seldom)


def test_two_methods_with_one_seed_start_from_the_same_weights_and_read_the_same_text(tmp_path, monkeypatch):
    seen, weights, original = {}, {}, train.Trainer.batch

    def spy(self, run):
        weights.setdefault(self.config.method, [w.clone() for w in run.model.parameters()])
        x, y, group = original(self, run)
        for window, g in zip(x.tolist(), group):
            seen.setdefault((self.config.method, int(g)), []).append(window)
        return x, y, group

    monkeypatch.setattr(train.Trainer, "batch", spy)
    run(tmp_path, "stratified", name="a")
    run(tmp_path, "natural", settings={"alpha": 0.0}, name="b", steps=40)
    run(tmp_path, "aioli", settings={"rounds": 2}, name="c")
    for other in ("natural", "aioli"):
        assert all(torch.equal(a, b) for a, b in zip(weights["stratified"], weights[other]))
        for g in (0, 1):
            a, b = seen["stratified", g], seen[other, g]
            n = min(len(a), len(b))
            assert n > 100 and a[:n] == b[:n]


def test_aioli_moves_the_mixture_to_the_group_that_can_be_learnt(tmp_path):
    """Noise cannot be learnt, so training on it lowers no loss; what is left of the mixture goes to the chain."""
    result, rows = run(tmp_path, "aioli", ("words", "noise"), {"rounds": 4, "sweeps": 4, "eta": 2.0}, steps=200, val_windows=64)
    shares = [p["words"] for _, p in result["mixtures"]]
    assert shares[-1] > .6 and result["probe_steps"] == 4 * 2 * 4 * 4
    A = np.array([row["A"] for row in rows if "A" in row])                       # (4, 2, 2), kept for the reader
    assert A.shape == (4, 2, 2) and A[:, :, 0].sum() > A[:, :, 1].sum()


def test_a_run_stopped_anywhere_and_resumed_is_the_run_that_was_not_stopped(tmp_path, monkeypatch, capsys):
    for method, cut in (("aioli", 7), ("aioli", 29), ("doremi", 75), ("doge", 25)):       # in rounds; in the main run; on a proxy
        settings = {"rounds": 2} if method == "aioli" else {}
        whole, rows = run(tmp_path, method, settings=settings, name=f"whole-{method}", steps=34)
        steps, original = [0], train.Progress.step

        def interrupt(self, *args):
            steps[0] += 1
            if steps[0] == cut:
                signal.raise_signal(signal.SIGINT)
            original(self, *args)

        monkeypatch.setattr(train.Progress, "step", interrupt)
        name = f"cut-{method}-{cut}"
        with pytest.raises(train.Stop, match="--resume"):
            run(tmp_path, method, settings=settings, name=name, steps=34)
        assert not (tmp_path / name / "result.json").exists()
        monkeypatch.undo()
        monkeypatch.setitem(model.PRESETS, "tiny", model.Config(layers=1, heads=2, width=32, window=16, vocab=48))
        with pytest.raises(ValueError, match="a run that was stopped; go on with --resume"):
            run(tmp_path, method, settings=settings, name=name, steps=34)                 # does not write over it
        again, rows_again = run(tmp_path, method, settings=settings, name=name, steps=34, resume=True)
        assert measured(again) == measured(whole) and len(rows) == len(rows_again)
        assert not (tmp_path / name / "checkpoint.pt").exists()


def test_resuming_with_other_settings_is_refused(tmp_path, monkeypatch):
    original = train.Progress.step
    monkeypatch.setattr(train.Progress, "step", lambda self, r, run, loss: run.step == 50 and signal.raise_signal(signal.SIGINT))
    with pytest.raises(train.Stop):
        run(tmp_path, "aioli", settings={"rounds": 2})
    monkeypatch.setattr(train.Progress, "step", original)
    for settings, config, says in (({"eta": .5}, {}, "--eta 0.2, not 0.5"), ({}, {"lr": 1e-3}, "--lr 0.003, not 0.001")):
        with pytest.raises(ValueError, match=f"of a run with {says}"):
            run(tmp_path, "aioli", settings={"rounds": 2, **settings}, resume=True, **config)
    assert run(tmp_path, "aioli", settings={"rounds": 2}, resume=True, threads=0)[0]["steps"] == 60     # but on another machine


def test_a_finished_run_is_kept_whatever_comes_while_it_is_tested(tmp_path, monkeypatch):
    original = train.summarise
    monkeypatch.setattr(train, "summarise", lambda *about: signal.raise_signal(signal.SIGINT) or original(*about))
    assert run(tmp_path, steps=5)[0]["steps"] == 5
    with pytest.raises(data.DataError, match="group cycle has 9 tokens"):                 # before hours of training, not after them
        train.Trainer(train.Config(preset="tiny"), corpus("cycle", "words")._replace(test=[np.arange(9), np.arange(9)]))


def trainer(**config):
    config = train.Config(preset="tiny", val_windows=8, lr=3e-3, **config)
    return train.Trainer(config, corpus("cycle", "words"))


def test_peek_measures_excess_loss_clipped_token_by_token():
    t = trainer(batch=4)
    t.answer(aioli.Train(np.array([.5, .5]), 20, on="reference"))
    seen = t.answer(aioli.Peek(np.array([.5, .5]), 20, on="proxy", against="reference"))["signals"]["excess"]
    again = trainer(batch=4).run("proxy", 20)
    again.sampler.plan([.5, .5], 1)
    x, y, group = again.sampler.batch()
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    with torch.no_grad():
        gap = again.model(x, y, per_token=True) - t.run("reference").model(x, y, per_token=True)      # (B, T)
    for j in (0, 1):
        kept = [max(float(v), 0) for v in gap[group == j].flatten()]
        assert seen[j] == pytest.approx(sum(kept) / len(kept), rel=1e-5)


def test_gradients_are_kept_in_the_same_memory_step_after_step():
    """New ones each step, between the small arrays that a history keeps, made a run of doge grow by 20 MB a step."""
    t, places = trainer(batch=4), set()
    for _ in range(3):
        t.answer(aioli.Peek(np.array([.5, .5]), 20, on="proxy"))
        places.add(tuple(g.data_ptr() for g in t.peeked["proxy"]))
        t.answer(aioli.Update(np.array([.5, .5]), on="proxy"))
    assert len(places) == 1


def test_an_absent_group_is_marked_and_the_others_take_their_step():
    t = trainer(batch=4)
    seen = t.answer(aioli.Peek(np.array([1., 0.]), 20, on="proxy"))["signals"]
    assert np.isnan(seen["A"][:, 1]).all() and np.isfinite(seen["A"][:, 0]).all() and np.isnan(seen["norm"][1])
    before = [w.clone() for w in t.run("proxy").model.parameters()]
    t.answer(aioli.Update(np.array([.5, .5]), on="proxy"))
    assert t.run("proxy").step == 1 and any((a != b).any() for a, b in zip(before, t.run("proxy").model.parameters()))


@pytest.mark.parametrize("against", ["", "reference"])
def test_an_update_steps_on_the_weighted_loss_whether_the_peek_left_gradients_or_losses(against):
    """lmo.md E3: the weighted group gradients are the gradient of the weighted loss; one backward per group's rows."""
    t, w, found = trainer(batch=8), np.array([.9, .2]), []
    t.answer(aioli.Train(np.array([.5, .5]), 1, on="reference"))
    t.answer(aioli.Peek(np.array([.5, .5]), 20, "proxy", against))
    t.apply = lambda run: found.append(torch.cat([w.grad.flatten() for w in run.model.parameters()]))
    t.answer(aioli.Update(w, "proxy"))
    run_ = trainer(batch=8).run("proxy", 20)
    run_.sampler.plan([.5, .5], 1)
    x, y, group = run_.sampler.batch()
    loss = run_.model(torch.from_numpy(x), torch.from_numpy(y))
    sum(w[j] * loss[group == j].mean() for j in (0, 1)).backward()
    whole = torch.cat([w.grad.flatten() for w in run_.model.parameters()])
    torch.testing.assert_close(found[0], whole, rtol=1e-4, atol=1e-6)


def test_A_of_a_peek_is_gradients_of_validation_text_times_gradients_of_the_batch():
    t, drawn, calls = trainer(batch=4), [], {}
    rows, original = t.val[0].tolist(), t.batch
    t.batch = lambda run: drawn.append(original(run)) or drawn[-1]

    def gradient(run, x, y, out):                                             # random, and a note of what it would be of
        text = [row in rows for row in x.tolist()]
        which = {int(t.val[2][rows.index(row)]) if known else int(drawn[0][2][drawn[0][0].tolist().index(row)])
                 for row, known in zip(x.tolist(), text)}
        assert len(which) == len(set(text)) == 1
        calls["held out" if text[0] else "batch", which.pop()] = out.normal_().clone()
    t.gradient = gradient
    seen = t.answer(aioli.Peek(np.array([.5, .5]), 20, on="proxy"))["signals"]
    for i in (0, 1):
        assert seen["norm"][i] == pytest.approx(float(calls["batch", i].norm()), rel=1e-5)
        for j in (0, 1):
            assert seen["A"][i, j] == pytest.approx(float(calls["held out", i] @ calls["batch", j]), rel=1e-3)
    mean = (calls["held out", 0] + calls["held out", 1]) / 2
    assert seen["target_norm"] == pytest.approx(float(mean.norm()), rel=1e-5)


def test_a_step_has_the_rate_of_its_run_clipped_gradients_and_decays_matrices_only():
    t, seen = trainer(batch=4, clip=.01), []
    run_, rates = t.run("short", 20), []
    run_.optimizer.step = lambda: seen.append(([part["lr"] for part in run_.optimizer.param_groups],
                                               float(torch.cat([w.grad.flatten() for w in run_.model.parameters()]).norm())))
    for _ in range(4):
        rates.append(t.lr(run_))
        t.answer(aioli.Train(np.array([.5, .5]), 1, on="short"))
    assert run_.of == 20 and t.run("whole", 7).of == 7 and t.run("main").of == t.config.steps
    assert [rate for rate, _ in seen] == [[rate] * 2 for rate in rates] and len(set(rates)) == 4
    assert all(norm <= .01 * (1 + 1e-4) for _, norm in seen)
    for part in run_.optimizer.param_groups:
        assert {w.dim() for w in part["params"]} == ({2} if part["weight_decay"] else {1})
    assert sum(len(part["params"]) for part in run_.optimizer.param_groups) == len(list(run_.model.parameters()))


def test_a_scratch_run_without_a_length_of_its_own_ends_with_its_request():
    t = trainer()
    t.answer(aioli.Train(np.array([.5, .5]), 3, on="alone"))
    t.answer(aioli.Train(np.array([.5, .5]), 3, on="part", of=9))
    assert t.run("alone").of == 3 and t.run("alone").optimizer is None and t.run("part").of == 9 and t.run("part").optimizer


def test_what_is_reported_is_the_loss_on_test_text(tmp_path):
    text = corpus("cycle", "words")
    text = text._replace(test=[corpus("noise", "words").test[0], text.test[1]])
    config = train.Config(method="stratified", steps=60, preset="tiny", out=str(tmp_path / "o"), lr=3e-3)
    result = train.train(config, {}, text)
    assert result["test_loss"]["cycle"] > 1 + result["val_loss"]["cycle"]     # noise is in its test text only


def test_the_seed_decides_the_text_and_the_history_knows_the_training_text(tmp_path, monkeypatch):
    told, windows, original, batch = [], [], aioli.History, train.Trainer.batch
    monkeypatch.setattr(aioli, "History", lambda *a: told.append(a) or original(*a))
    monkeypatch.setattr(train.Trainer, "batch", lambda self, run: windows.append(batch(self, run)) or windows[-1])
    for seed in (3, 4):
        run(tmp_path, "natural", seed=seed, steps=2)
    (names, sizes, width, seed, runs), _ = told
    assert (names, sizes, width, seed, runs) == (["cycle", "words"], [6000, 6000], 8, 3, None) and told[1][3] == 4
    assert not np.array_equal(windows[0][0], windows[2][0])


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    t = trainer(steps=100)
    main, rates = t.run("main"), []
    for main.step in range(100):
        rates.append(t.lr(main))
    assert rates[0] == pytest.approx(.003 / 10) and max(rates) == pytest.approx(.003) and np.argmax(rates) == 9
    assert rates[-1] == pytest.approx(.0003) and (np.diff(rates[9:]) < 0).all()


def test_a_constant_rate_falls_in_the_last_fifth_only():
    t = trainer(steps=110, warmup=.1 / 1.1, schedule="constant")              # 10 steps of warm-up, 100 after it
    main, rates = t.run("main"), []
    for main.step in range(110):
        rates.append(t.lr(main))
    assert rates[9:90] == pytest.approx([.003] * 81) and rates[-1] == pytest.approx(.0003)
    assert np.diff(rates[89:]) == pytest.approx([-.0027 / 20] * 20)           # in a straight line


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("law", "code"):
        words = [name + str(i) for i in range(40)]
        paragraphs = [" ".join(rng.choice(words, 60)) for _ in range(400)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder


BASE = ["--preset", "tiny", "--encoding", "bpe300", "--steps", "40", "--val-windows", "4", "--test-windows", "4"]


def test_your_own_text_from_the_command_line(texts, tmp_path, capsys):
    code = train.main([*BASE, "--method", "aioli", "--rounds", "2", "--data", str(texts), "--cache", str(tmp_path / "c"),
                       "--out", str(tmp_path / "o")])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "average test perplexity" in said.out and "\r" not in said.out       # quiet when not a terminal
    assert json.loads((tmp_path / "o" / "result.json").read_text())["groups"] == ["code", "law"]


def test_a_prior_comes_first_and_its_runs_are_counted(texts, tmp_path, capsys):
    code = train.main([*BASE, "--method", "aioli", "--prior", "skillit", "--rounds", "1", "--probe", "2", "--data",
                       str(texts), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o")])
    assert code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["steps"] == 40 and result["extra_steps"] == 20 * 2 + 20


@pytest.mark.parametrize("arguments, says, code", [
    (["--method", "aioly"], "did you mean 'aioli'", 2),
    (["--sead", "3"], "did you mean '--seed'", 2),
    (["--preset", "lapdog"], "did you mean 'laptop'", 2),
    (["--schedule", "cosin"], "did you mean 'cosine'", 2),
    (["--groups", "code+lav"], "lav", 2),
    (["--groups", "code"], "two groups", 2),
    (["--data", "nowhere"], "nowhere", 2),
    (["--f", "0.5"], "does not favour", 2),
    (["--rounds", "10"], "leave 4 a round", 2),
    (["--rounds", "100"], "cannot be cut", 2),
    (["--method", "horizon", "--rounds", "10"], "raise --rounds or --wait", 2),
    (["--steps", "0"], "at least 1", 2),
    (["--warmup", "1"], "below 1", 2),
    (["--threads", "-1"], "at least 0", 2),
    (["--groups", "code", "law"], "'law' is not the value of any flag", 2),
    (["--objective", "bleu", "--rounds", "2"], "neither loss nor perplexity", 2),
    (["--method", "aioli_ood", "--target", "lav"], "there are code, law", 2),
    (["--method", "aioli_ood"], "give three groups", 2),
    (["--prior", "grid", "--restart", "best"], "neither uniform nor prior", 2),
    (["--method", "skillit", "--prior", "grid", "--restart", "prior"], "always starts from uniform", 2),
    (["--prior", "dlm"], "did you mean 'dml'", 2),
    (["--resume"], "nothing to resume", 2),
    (["--device", "gpu"], "device", 2),
    (["--out", "/proc/nobody/may/write"], "/proc/nobody", 1),
])
def test_bad_input_gets_one_line_an_exit_code_and_leaves_nothing(texts, tmp_path, capsys, arguments, says, code):
    base = [*BASE, "--data", str(texts), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o")]
    assert train.main([*base, *arguments]) == code
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and "Traceback" not in error
    assert not list(tmp_path.glob("o/*"))


def finished_runs(folder, names, law, runs=12):
    """CSV files of runs that this law made, as others keep them: the losses in another order, names with common ends."""
    P = aioli.cover(len(names), runs, np.random.default_rng(0))
    for file, columns, table in (("p.csv", [f"train_the_{name}" for name in names], P),
                                 ("l.csv", [f"valid_{name}_loss" for name in names], law(P))):
        lines = [",".join(map(str, [i, *table[i]])) for i in (range(runs) if file == "p.csv" else reversed(range(runs)))]
        (folder / file).write_text("\n".join(["run," + ",".join(columns), *lines]) + "\n")
    return [str(folder / "p.csv"), str(folder / "l.csv")]


def test_a_law_is_fitted_to_finished_runs_from_files(tmp_path, capsys):
    law = aioli.LogLinear(np.array([1., 2.]), np.array([[-1.5, .2], [.1, -.7]]))
    (tmp_path / "others").mkdir()
    others = finished_runs(tmp_path / "others", ("law", "web"), lambda P: law(P) + .2)     # what the law does not foresee
    files, best = finished_runs(tmp_path, ("law", "web"), law), aioli.solve_static(law)
    assert train.main(["--method", "dml", "--steps", "0", "--runs", *files, "--holdout", *others]) == 0
    said = capsys.readouterr().out
    assert f"law {best[0]:.3f}  web {best[1]:.3f}" in said and "2 losses, fitted to 12 runs" in said
    assert "\nlaw " in said and "\nweb " in said and said.count("1.0000") == 3                     # R^2 of both and of their mean
    assert said.count("0.04000") == 3 and said.count("100.00") == 6           # errors of the others, whose order is right
    (tmp_path / "l.csv").write_text("run,a,b\n7,1,2\n")
    assert train.main(["--method", "dml", "--steps", "0", "--runs", *files]) == 2 and "same runs" in capsys.readouterr().err
    (tmp_path / "l.csv").write_text("run,a,b\n7,one,2\n")
    assert train.main(["--method", "dml", "--steps", "0", "--runs", *files]) == 2 and "table of numbers" in capsys.readouterr().err


def test_a_run_takes_its_mixture_from_finished_runs_of_its_groups_in_whatever_order(tmp_path):
    """Groups match when what all names begin with is left out, on either side."""
    law = aioli.LogLinear(np.array([1., 1.]), np.array([[-1.5, 0], [0, -.5]]))
    files, best = finished_runs(tmp_path, ("words", "cycle"), law), aioli.solve_static(law)
    text = corpus("cycle", "words")._replace(groups=["my_cycle", "my_words"])
    config = train.Config(method="dml", steps=10, preset="tiny", out=str(tmp_path / "o"), runs=tuple(files))
    result = train.train(config, {}, text)
    assert list(result["final_mixture"].values()) == pytest.approx(best[::-1], abs=1e-3) and result["extra_steps"] == 0
    with pytest.raises(ValueError, match="has the groups words, cycle; the text has cycle, noise"):
        train.train(config, {}, corpus("cycle", "noise"))


def test_a_gpu_too_small_is_one_line(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
    monkeypatch.setattr(train, "train", full)
    assert train.main([]) == 1 and "lower --batch" in capsys.readouterr().err


@pytest.mark.parametrize("method", aioli.METHODS)
def test_help_explains_every_flag(method, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--method", method, "--help"])
    assert stop.value.code == 0
    texts = {**train.help_of(train.Config), **train.help_of(aioli.METHODS[method])}
    _, settings = train.parse(["--method", method])
    inherits = "Settings as aioli" in (aioli.METHODS[method].__doc__ or "")
    texts = {**(train.help_of(aioli.aioli) if inherits else {}), **texts}
    assert all(texts.get(name) for name in [*settings, *(f.name for f in dataclasses.fields(train.Config))])


def test_numbers_too_small_to_be_normal_are_zero_in_training_only():
    tiny = torch.full((8,), 1e-30)
    with train.no_denormals():
        assert (tiny * 1e-10 == 0).all()
    assert (tiny * 1e-10 > 0).all()


# --- the comparison ---------------------------------------------------------------------------------------------------


def row(name, groups, seed, ppl, loss=3.0, extra=0, wall=10.0, **more):
    return dict(name=name, groups=groups, seed=seed, avg_test_ppl=ppl, avg_test_loss=loss, extra_steps=extra, steps=100,
                wall_seconds=wall, **more)


def tables(rows):
    return "\n".join(train.tabulate({(r["name"], r["groups"], r["seed"]): r for r in rows}))


def test_intervals_are_students_t():
    """Quantiles .975 from the tables: 12.706 (1 degree of freedom), 4.303 (2), 2.776 (4), 2.262 (9)."""
    for n, t in ((2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)):
        values = list(range(n))
        mean, half = train.interval(values)
        assert mean == np.mean(values) and half == pytest.approx(t * np.std(values, ddof=1) / n ** .5, rel=2e-4)
    assert np.isnan(train.interval([1.0])[1])


def test_the_table_pairs_each_run_with_stratified_of_its_own_seed_and_set():
    rows = [row("stratified", "a+b", 0, 20.), row("stratified", "a+b", 1, 30.), row("stratified", "c+d", 0, 50.),
            row("dml", "a+b", 0, 19., extra=900), row("dml", "a+b", 1, 29.2, extra=900, wall=11.0), row("dml", "c+d", 0, 51., extra=900)]
    text = tables(rows)
    [line, loss] = [line for line in text.splitlines() if line.startswith("| dml")]
    assert line == "| dml | **-0.90 ± 1.27** | +1.00 | 1 | 0 | 9.0 | 1.00 | 1-2 |".replace("**", "")     # the interval holds 0
    assert "| stratified | 25.00 | 50.00 |" in text and "+0.0000" in loss


def test_the_table_marks_what_is_surely_better_and_compares_with_the_controls():
    rows = [row("stratified", "a+b", s, 20.) for s in (0, 1)] + [row("aioli", "a+b", s, 18. + s / 50) for s in (0, 1)] \
        + [row("average of aioli", "a+b", s, 17.) for s in (0, 1)] + [row("grid", "a+b", 0, 19., extra=900), row("stratified x10", "a+b", 0, 15.)]
    text = tables(rows)
    lines = [line for line in text.splitlines() if line.startswith(("| aioli", "| grid"))]
    assert lines[0].startswith("| grid | -1.00 | 1 | 0 |") and lines[1].startswith("| aioli | **-1.99 ± 0.13** | 1 | 1 |")
    assert any(line.startswith("| aioli | +1.01 ± 0.13 |") for line in lines[2:])          # against its own average mixture
    assert any(line.startswith("| grid | +4.00 |") for line in lines[2:])                  # against as many steps of uniform


def test_the_restricted_setting_is_held_against_the_priors_own_mixture_and_counted():
    rows = [row(name, "a+b", s, ppl + s / 100, extra=450) for s in (0, 1) for name, ppl in
            (("stratified", 30.), ("half grid", 20.), ("half dml", 25.), ("aioli after grid", 19.), ("aioli after dml", 26.))]
    text = tables(rows)
    assert "| half grid | **-10.00 ± 0.00** |" in text and "| aioli after grid | **-1.00 ± 0.00** |" in text
    assert "aioli after another method's mixture, against that mixture throughout: better in 1 of 2 (prior, data set), " \
           "surely in 1, surely worse in 1; difference in perplexity: mean +0.00, median +0.00" in text


def compare_here(monkeypatch, arguments):
    """A comparison whose runs have no processes of their own, which is quicker; only a main thread may handle Ctrl-C."""
    with monkeypatch.context() as patch:
        patch.setattr(train.signal, "signal", lambda *_: None)
        patch.setattr(train, "separately", lambda name, flags, **output: train.train(*train.parse(flags)))
        return train.main([*arguments, "--jobs", "1"])


def test_a_prior_of_the_comparison_is_learnt_once_on_half_length_runs_and_who_follows_pays_for_it(texts, tmp_path, monkeypatch):
    small = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--steps", "6", "--batch", "2",
             "--val-windows", "1", "--test-windows", "1", "--out", str(tmp_path / "o"), "--groups", "code+law", "--seeds", "1"]
    assert compare_here(monkeypatch, [*small, "--method", "natural", "--prior", "doremi"]) == 0
    rows = {name: row for (name, *_), row in train.rows_of(tmp_path / "o" / "compare.json").items()}
    learnt, after = rows["half doremi"], rows["natural after doremi"]
    own = json.loads((tmp_path / "o" / "code+law" / "natural-after-doremi-s0" / "result.json").read_text())["wall_seconds"]
    assert after["wall_seconds"] == pytest.approx(own + learnt["wall_seconds"] / 2)       # 6 steps of learning, 6 of its own
    assert learnt["extra_steps"] == after["extra_steps"] == 2 * 3 and learnt["steps"] == after["steps"] == 6
    assert len(learnt["mixtures"]) == 1                                                   # throughout
    (at, first), (half, _) = after["mixtures"]
    assert (at, half) == (0, 3) and first == pytest.approx(learnt["mixtures"][0][1])
    history = (tmp_path / "o" / "code+law" / "natural-after-doremi-s0" / "history.jsonl").read_text()
    assert all(json.loads(line)["on"] == "main" for line in history.splitlines())         # nothing was learnt again


def test_what_others_wait_for_comes_first_and_all_halves_share_one_sweep():
    names = ["half dml", "aioli after dml", "half grid", "horizon:perplexity after grid", "half doge", "aioli after doge"]
    jobs = train.jobs_of({name: () for name in names}, "a+b", 0, controls=False)
    needs, order = {job.name: job.needs for job in jobs}, [job.name for job in jobs]
    assert needs == {"half dml": "", "half grid": "half dml", "half doge": "", "aioli after dml": "half dml",
                     "horizon:perplexity after grid": "half grid", "aioli after doge": "half doge"}
    assert all(order.index(needs[name]) < order.index(name) for name in names if needs[name])


def test_a_method_that_could_be_a_prior_may_come_after_one():
    names = ["half doremi", "grid:perplexity after doremi", "horizon after doremi", "horizon"]
    jobs = train.jobs_of({name: () for name in names}, "a+b", 0, controls=True)
    assert [(job.name, job.needs) for job in jobs] == [("half doremi", ""), ("horizon", ""), (names[1], names[0]),
                                                       (names[2], names[0]), ("average of horizon", "horizon")]


def test_where_a_method_restarts_is_nothing_to_a_mixture_that_stays(tmp_path):
    config, _ = train.parse(["--method", "aioli", "--prior", "grid", "--restart", "prior"])
    flags = [*train.shared_flags(config), *train.method_flags(config, {}, "half grid")]
    config, settings = train.parse(flags)
    train.program(config, settings, aioli.History("ab", [1, 1], 8))             # raises if it cannot


def test_runs_that_others_go_on_with_are_not_taken_over(tmp_path):
    """DoReMi's proxy is scored with the reference model itself, not with its losses."""
    for method, taken in (("doremi", 0), ("doge", 0), ("grid", 3)):
        result, _ = run(tmp_path, method, steps=9, settings={"points": 3} if method == "grid" else {}, name=method)
        config = train.Config(**{**result["config"], "runs": (), "holdout": (), "past": str(tmp_path / method / "history.jsonl")})
        assert len(train.scratch_runs(config, "")) == taken
        with pytest.raises(ValueError, match="a run with other text"):
            train.scratch_runs(config, "0123abcd")


def test_a_row_may_have_settings_of_its_own():
    flags = lambda name: train.method_flags(train.parse(["--method", "a,b"])[0], {}, name)
    assert flags("aioli:perplexity:eta=2:probe=3") == ("--method", "aioli", "--objective", "perplexity", "--eta", "2", "--probe", "3")
    assert flags("horizon:last=.6 after grid") == ("--method", "horizon", "--last", ".6")
    assert train.parse(flags("aioli:eta=2"))[1]["eta"] == 2.0


def test_a_comparison_runs_what_is_missing_shares_its_sweep_and_goes_on_where_it_was(texts, tmp_path, capsys, monkeypatch):
    small = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--steps", "3", "--batch", "2",
             "--val-windows", "1", "--test-windows", "1", "--out", str(tmp_path / "o"), "--groups", "code+law", "--seeds", "1"]
    assert compare_here(monkeypatch, [*small, "--method", "grid,grid:perplexity"]) == 0
    said = capsys.readouterr().out
    assert "3/3" in said and "| grid:perplexity |" in said
    rows = json.loads((tmp_path / "o" / "compare.json").read_text())["rows"]
    assert [r["extra_steps"] for r in sorted(rows, key=lambda r: r["name"])] == [27, 27, 0]      # a shared sweep still counts
    second = (tmp_path / "o" / "code+law" / "grid-perplexity-s0" / "history.jsonl").read_text().splitlines()
    first = (tmp_path / "o" / "code+law" / "grid-s0" / "history.jsonl").read_text().splitlines()
    assert second[:9] == first[:9]                                                # its very rows, seconds included
    wall = json.loads((tmp_path / "o" / "code+law" / "grid-perplexity-s0" / "result.json").read_text())["wall_seconds"]
    assert wall > sum(json.loads(line)["seconds"] for line in first[:9])          # and what they cost
    made = json.loads((tmp_path / "o" / "compare.json").read_text())
    (tmp_path / "o" / "compare.json").write_text(json.dumps(made | dict(versions=made["versions"] | dict(kernels="other"))))
    assert train.main([*small, "--method", "fixed"]) == 0
    versions = json.loads((tmp_path / "o" / "compare.json").read_text())["versions"]
    assert versions == made["versions"] | dict(kernels=f"other or {made['versions']['kernels']}")
    said = capsys.readouterr().out
    assert "1/1" in said and "grid " not in said.split("Differences")[0] and "| grid |" in said
    assert compare_here(monkeypatch, [*small, "--method", "aioli_ood,natural"]) == 2      # the one needs three groups
    told = capsys.readouterr()
    assert "| natural |" in told.out and "1 runs failed" in told.err and "give three groups" in told.err


def test_the_controls_train_on_the_average_mixture_and_for_all_the_steps(texts, tmp_path, monkeypatch):
    small = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--steps", "20", "--batch", "4",
             "--val-windows", "1", "--test-windows", "1", "--out", str(tmp_path / "o"), "--groups", "code+law", "--seeds", "1"]
    assert compare_here(monkeypatch, [*small, "--method", "skillit:eta=30", "--controls"]) == 0
    rows = {name: row for (name, _, _), row in train.rows_of(tmp_path / "o" / "compare.json").items()}
    assert set(rows) == {"stratified", "skillit:eta=30", "average of skillit:eta=30", "stratified x3"}
    moved, still = rows["skillit:eta=30"], rows["average of skillit:eta=30"]
    assert still["realised_mixture"] == pytest.approx(moved["realised_mixture"], abs=1.01 / 80)          # a window
    assert abs(moved["mixtures"][0][1]["law"] - moved["realised_mixture"]["law"]) > .05 and len(still["mixtures"]) == 1
    assert rows["stratified x3"]["steps"] == 60 == moved["steps"] + moved["extra_steps"]


def test_whole_comparisons_of_several_sets_and_seeds_and_the_quick_one(texts, tmp_path, capsys, monkeypatch):
    small = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--steps", "3", "--batch", "2",
             "--val-windows", "1", "--test-windows", "1", "--out", str(tmp_path / "o")]
    for name in ("SETS", "QUICK", "ROWS"):
        monkeypatch.setattr(data if name == "SETS" else train, name, ("stratified", "natural") if name == "ROWS" else ("code+law", "law+code"))
    assert compare_here(monkeypatch, [*small, "--groups", "sets", "--seeds", "2", "--method", "all"]) == 0
    rows = train.rows_of(tmp_path / "o" / "compare.json")
    assert set(rows) == {(name, g, seed) for name in train.ROWS for g in data.SETS for seed in (0, 1)}
    assert " ± " in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| natural |"))
    assert compare_here(monkeypatch, [*small[:-1], str(tmp_path / "q"), "--quick"]) == 0
    assert set(train.rows_of(tmp_path / "q" / "compare.json")) == {(name, g, 0) for name in train.ROWS for g in train.QUICK}


def test_side_by_side_a_job_waits_for_the_one_that_it_needs(tmp_path, monkeypatch, capsys):
    told = []

    def work(config, job, rows, folder):
        told.append(("begins", job.name))
        time.sleep(.2 if job.name == "first" else 0)
        told.append(("ends", job.name))
        return row(job.name, "a+b", 0, 20.)
    monkeypatch.setattr(train, "run_job", work)
    jobs = [train.Job("first", "a+b", 0, ()), train.Job("second", "a+b", 0, (), "first"), train.Job("third", "a+b", 0, ())]
    rows = {}
    assert train.run_all(train.Config(jobs=3), jobs, rows, tmp_path) == []
    assert told.index(("ends", "first")) < told.index(("begins", "second")) and told.index(("ends", "third")) < told.index(("ends", "first"))
    assert len(rows) == len(train.rows_of(tmp_path / "compare.json")) == 3


def test_a_row_with_other_settings_is_run_again_and_so_is_what_builds_on_it(texts, tmp_path, monkeypatch):
    kept, settings = [], lambda name: train.parse(["--method", name])[1]
    asked = []
    monkeypatch.setattr(train, "run_all", lambda config, jobs, rows, folder: kept.append({name for name, *_ in rows}) or asked.append(jobs) or [])
    monkeypatch.setattr(train, "pyplot", lambda: None)
    names = {"stratified": {}, "aioli": settings("aioli"), "horizon": settings("horizon"), "half grid": {"mixture": ""},
             "average of aioli": {"mixture": ".5+.5"}, "average of horizon": {"mixture": ".5+.5"}, "aioli after grid": settings("aioli")}
    rows = [row(name, "code+law", 0, 20., settings=own, extra=200 * (name == "horizon")) for name, own in names.items()]
    small = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--groups", "code+law", "--seeds", "1",
             "--out", str(tmp_path)]
    for method, again in ((["aioli"], set()), (["aioli", "--eta", "3"], {"aioli", "average of aioli"}),
                          (["aioli", "--eta", "3", "--prior", "grid,dml"], {"aioli after grid"})):
        flags = train.shared_flags(train.parse(small)[0])
        (tmp_path / "compare.json").write_text(json.dumps(dict(flags=flags, rows=rows)))
        assert train.main([*small, "--method", *method]) == 0 and kept[-1] == set(names) - again
    more = [dict(r, seed=1) for r in rows]
    (tmp_path / "compare.json").write_text(json.dumps(dict(flags=flags, rows=rows + more)))
    assert train.main([*small, "--method", "aioli", "--eta", "3"]) == 2                   # seed 1 would lose its row
    assert len(train.rows_of(tmp_path / "compare.json")) == len(rows + more)
    assert train.main([*small, "--method", "horizon", "--controls"]) == 0
    assert [job[:3] for job in asked[-1]] == [("stratified x3", "code+law", 0)] and asked[-1][0].flags[-2:] == ("--steps", "3000")


@pytest.mark.parametrize("arguments, says", [
    (["--method", "dml,aioly"], "did you mean 'aioli'"),
    (["--method", "aioli after grid,dml"], "unknown method 'aioli after grid'"),
    (["--seeds", "-1"], "at least 0"),
    (["--method", "stratified:loss,dml"], "no objective"),
    (["--method", "doge:perplexity"], "no objective"),
    (["--method", "aioli:rate=2"], "no rate"),
    (["--quick", "--method", "aioli,dml"], "its own methods"),
    (["--seeds", "2", "--past", "nowhere.jsonl"], "leave out"),
    (["--fidelity", "--seeds", "2"], "at one --seed"),
    (["--method", "aioli", "--prior", "grid:perplexity"], "unknown prior"),
    (["--method", "stratified:eta=2"], "no settings"),
    (["--method", "grid", "--past", "nowhere.jsonl"], "not the history"),
])
def test_a_comparison_refuses_what_it_cannot_run(texts, tmp_path, capsys, arguments, says):
    test_bad_input_gets_one_line_an_exit_code_and_leaves_nothing(texts, tmp_path, capsys, arguments, says, 2)


def test_rows_of_another_machine_are_used_but_not_without_a_word(tmp_path, capsys):
    path, here = tmp_path / "compare.json", train.versions(train.Config())
    for versions, said in ((here, ""), (here | dict(kernels="other"), f"kernels other, not {here['kernels']}")):
        path.write_text(json.dumps(dict(flags=[], versions=versions, rows=[])))
        assert train.rows_made_alike(path, train.Config(), "--out", {}) == {}
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)
    both = here | dict(kernels=f"other or {here['kernels']}")
    for _ in range(2):                                                        # what this machine adds does not hide them
        assert train.all_versions(path, train.Config()) == both
        path.write_text(json.dumps(dict(flags=[], versions=both, rows=[])))
    train.rows_made_alike(path, train.Config(), "--out", {})
    assert "note: " in capsys.readouterr().out


def test_rows_made_from_other_text_are_not_paired(texts, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine"
    shutil.copytree(texts, mine)
    small = ["--data", str(mine), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--steps", "3", "--batch", "2",
             "--val-windows", "1", "--test-windows", "1", "--out", str(tmp_path / "o"), "--seeds", "1", "--method", "fixed"]
    assert compare_here(monkeypatch, small) == 0 and compare_here(monkeypatch, small) == 0
    rows, path = train.rows_of(tmp_path / "o" / "compare.json"), tmp_path / "o" / "compare.json"
    before = path.read_text()
    with open(next(p for p in mine.rglob("*") if p.is_file()), "a") as file:
        file.write("and some more of it\n")
    capsys.readouterr()
    assert compare_here(monkeypatch, small) == 2 and "was made from other text" in capsys.readouterr().err
    assert path.read_text() == before and all(row["text"] for row in rows.values())
    path.unlink()
    assert compare_here(monkeypatch, small) == 0                              # finished runs of the old text do not count, either
    assert all(row["text"] != rows[key]["text"] for key, row in train.rows_of(path).items())


def test_two_comparisons_do_not_share_a_folder_at_once(texts, tmp_path, capsys, monkeypatch):
    small = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--steps", "3", "--batch", "2",
             "--val-windows", "1", "--test-windows", "1", "--out", str(tmp_path), "--seeds", "1", "--method", "stratified"]
    with train.claimed(tmp_path):
        assert train.main(small) == 2 and "another comparison is at work" in capsys.readouterr().err
    assert not (tmp_path / "compare.json").exists() and compare_here(monkeypatch, small) == 0


def test_a_setting_named_like_a_flag_of_every_run_is_refused(monkeypatch):
    def mine(h, steps, seed=3):
        """My method.  seed: of mine."""
        yield aioli.Train(h.uniform, steps)
    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    with pytest.raises(ValueError, match="'seed' is the name of a flag"):
        train.parse(["--method", "mine"])


# --- fidelity ---------------------------------------------------------------------------------------------------------


def test_forks_leave_the_run_where_it_was_and_read_different_text():
    t, read = trainer(batch=4), []
    t.answer(aioli.Train(np.array([.5, .5]), 2))
    saved, sampler = copy.deepcopy(t.run("main").state()), t.run("main").sampler
    following = sampler._next
    sampler._next = lambda j: read.append((j, following(j))) or read[-1][1]
    shares, drops = train.forks(t, saved, np.array([[.75, .25], [.25, .75], [.75, .25]]), 2, t.val)
    np.testing.assert_allclose(shares, [[.75, .25], [.25, .75], [.75, .25]])
    assert len(read) == len(set(read)) == 24 and not np.allclose(drops[0], drops[2])
    assert drops.mean() > 0                                                               # the loss falls at first
    again = t.run("main").state()
    assert again["step"] == 2 and str(again["sampler"]) == str(saved["sampler"])
    assert all(torch.equal(a, b) for a, b in zip(again["model"].values(), saved["model"].values()))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in
               zip(again["optimizer"]["state"].values(), saved["optimizer"]["state"].values()))


def test_each_A_is_held_against_the_true_one_as_its_own_objective_weighs_it():
    """Column sums by hand; exp(L) = (1, 3). Two groups: the rank part is 1 where both sides favour the same group, else -1."""
    point = dict(loss=[0., np.log(3)], A=[[1, 2], [3, 3]], halves=[[[1, 0], [0, 2]], [[4, 0], [0, 2]]],
                 own=dict(doge=[[0, 1], [0, 0]], aioli=[[3, 0], [0, 2]], horizon=[[2, 0], [0, 1]]))
    found = train.similarities(point)
    cos = lambda a, b: np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    for name, (mine, true, same) in {"doge": ((0, 1), (4, 5), 1), "aioli": ((3, 2), (4, 5), -1), "ceiling": ((1, 2), (4, 2), -1),
                                     "identity:perplexity": ((1, 3), (10, 11), 1),
                                     "aioli:perplexity": ((3, 6), (10, 11), 1), "horizon:perplexity": ((2, 3), (10, 11), 1),
                                     "ceiling:perplexity": ((1, 6), (4, 6), 1)}.items():
        assert found[name] == pytest.approx(((cos(mine, true) + same) / 2, same))
    assert found["identity"] == pytest.approx((cos((1, 1), (4, 5)) / 2, 0))                # no A: no order, nothing centred
    assert set(found) == {f"{name}{end}" for name in ("aioli", "horizon", "ceiling", "identity") for end in ("", ":perplexity")} | {"doge"}


def test_figure_3_sets_the_improvement_of_each_method_against_its_similarity(tmp_path, monkeypatch):
    sims = {"skillit": .2, "doremi": .4, "doge": -.8, "aioli": -.1, "horizon": .9, "horizon:perplexity": -1.}
    centred = {"skillit": .1, "doremi": -.3, "doge": .5, "aioli": -.9, "horizon": .2, "horizon:perplexity": .3}
    monkeypatch.setattr(train, "similarities", lambda point: {"ceiling": point["ceiling"], **{x: (sims[x], centred[x]) for x in sims}})
    point = dict(step=5, A=[[1, 2], [3, 4]], error=[[.3, 0], [.4, .1]], ceiling=[.95, .85], own={"doge": [[1, 0], [2, 1]]})
    rows = [row("stratified", "a+b", 0, 20., loss=2.)] + [row(name, "a+b", 0, 20 - 2 * x, loss=2 + x ** 3) for name, x in sims.items()]
    (tmp_path / "compare.json").write_text(json.dumps(dict(rows=rows)))
    fits = [dict(law="log-linear, static", runs=9, mse=.5, r2=.99)]
    result = dict(groups=["a", "b"], fits=fits, points=[point, {**point, "ceiling": [.85, .75]}])
    summary, details = train.judge({"a+b": result}, tmp_path / "compare.json", tmp_path)
    first, second = [line for line in summary.splitlines() if line.startswith("| ceiling")]
    assert first.startswith("| ceiling | 0.900 |") and second.startswith("| ceiling | 0.800 |")        # means of the points
    assert "average test perplexity, sim of A with A*: 1.000 (r +1.00, of ranks +1.00; 6 dots)" in summary
    r = np.corrcoef(list(sims.values()), list(centred.values()))[0, 1]                    # ranks: 4 5 2 3 6 1 and 3 2 6 1 4 5
    assert f"average test perplexity, sim with A*, centred: {r * r:.3f} (r {r:+.2f}, of ranks -0.43; 6 dots)" in summary
    [loss] = [line for line in summary.splitlines() if line.startswith("- average test loss, sim of A with A*: 0.")]
    assert loss.endswith("of ranks -1.00; 5 dots)")                                       # a cube: in order, but no line
    assert "| +4.0000 ± 0.5000 | +6.0000 ± 0.1000 |" in details and "| doge, in parts | +0.750 | +0.250 |" in details


def test_fidelity_holds_every_methods_A_against_the_forks_and_draws_figure_3(texts, tmp_path, capsys):
    table = tmp_path / "compare.json"
    sweep = [[[a, 1 - a], [3 - a + a * a, 2 + a * a / 2]] for a in np.linspace(.1, .9, 9).tolist()]
    rows = [row(name, "code+law", 0, ppl, 3 - .01 * ppl) for name, ppl in
            (("stratified", 20.), ("skillit", 19.), ("doremi", 18.), ("doge", 25.), ("aioli", 20.5), ("horizon", 17.))]
    small = ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300", "--steps", "100", "--batch", "4",
             "--val-windows", "1", "--out", str(tmp_path / "o"), "--groups", "code+law", "--fork", "1", "--fidelity",
             "--preset", "tiny"]
    flags = train.shared_flags(train.parse(small)[0])
    table.write_text(json.dumps(dict(flags=flags, rows=[*rows, row("grid", "code+law", 0, 19., sweep=sweep)])))
    assert train.main([*small, "--table", str(table)]) == 0
    assert train.main([*small, "--table", str(table)]) == 0                               # what is there is not measured again
    said = capsys.readouterr().out
    assert train.main([*small, "--table", str(table), "--lr", ".001"]) == 2 and "was made with the flags" in capsys.readouterr().err
    result = json.loads((tmp_path / "o" / "fidelity.json").read_text())
    assert [point["step"] for point in result["points"]] == [25, 50, 75]
    for point in result["points"]:
        assert set(point["own"]) == {name for name in train.JUDGED if ":" not in name} and np.shape(point["A"]) == np.shape(point["error"]) == (2, 2)
        P, D, A = (np.array(point[key]) for key in ("shares", "drops", "A"))
        assert P.shape == D.shape == (18, 2)                                              # nine mixtures, twice
        fits = [np.linalg.lstsq(P[side], D[side], rcond=None)[0].T for side in (slice(18), slice(9), slice(9, 18))]
        np.testing.assert_allclose(A, fits[0], atol=1e-12)
        np.testing.assert_allclose(point["error"], aioli.standard_errors(P, D, A))
        np.testing.assert_allclose(point["halves"], fits[1:], atol=1e-12)
        assert len(point["loss"]) == 2 and 0 < min(point["loss"]) and max(point["loss"]) < 6
        [fit] = [fit for fit in result["fits"] if fit["law"].endswith(f"step {point['step']}")]
        assert fit["r2"] == pytest.approx(np.mean(1 - ((D - P @ A.T) ** 2).sum(0) / ((D - D.mean(0)) ** 2).sum(0)))
        for name in ("doremi", "horizon"):                                                # excess losses; a group's own tokens
            own = np.array(point["own"][name])
            assert own[0, 1] == own[1, 0] == 0 and (np.diag(own) >= 0).all()
        for name in ("dml", "power"):                                                     # the sweep has loss 1 rise with group 0
            assert point["own"][name][1][0] < point["own"][name][1][1]
    assert result["points"][0]["own"]["dml"] == result["points"][2]["own"]["dml"]         # static: the same everywhere
    assert result["points"][0]["own"]["aioli"] != result["points"][2]["own"]["aioli"]
    ratio = np.divide(*(result["points"][k]["own"]["skillit"] for k in (0, 2)))           # L_i^t G_ij: only L moves
    np.testing.assert_allclose(ratio[:, 0], ratio[:, 1])
    assert not np.allclose(ratio, 1, rtol=1e-6)
    assert said.count("step 50 of 100") == 1 and "| linear, dynamic, step 50 |" in said
    assert "average test loss, sim of A with A*" in said and said.count("; 5 dots)") == 2 * 4    # judged each time
    assert train.judge({"code+law": result}, tmp_path / "none", tmp_path)[0].endswith(f"there is no comparison in {tmp_path / 'none'}")
