"""Claims of section 5: what forks measure, how sure A* is, what sim sees, what is made of it."""
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import aioli
import data
import train
from paper import compare, fidelity, judge
from paper.rows import parse_method, run_folder, write_csv
import tiny
from worlds import rng_of, same, seeds

texts, tiny_preset = tiny.texts, tiny.tiny_preset               # fixtures
ms = st.integers(2, 6)


# ---- standard errors and sim


@given(ms, st.integers(2, 6), seeds)
def test_the_errors_of_A_are_those_of_a_mean_when_each_probe_is_of_one_group(m, times, seed):
    """Then A[i, j] is the mean of `times` falls, and its error their pooled deviation, with R - m
    degrees of freedom, over sqrt(times)."""
    P = np.tile(np.eye(m), (times, 1))
    drops = rng_of(seed).normal(size=(times * m, m + 1))
    A = aioli.fit_linear_dynamic(P, drops)
    cells = drops.reshape(times, m, m + 1)                      # repeats, group trained on, loss
    pooled = ((cells - cells.mean(0)) ** 2).sum((0, 1)) / (m * (times - 1))               # (m + 1,)
    same(A, cells.mean(0).T)
    expected = np.sqrt(pooled / times)[:, None] * np.ones(m)
    same(fidelity.standard_errors(P, drops, A), expected, rtol=1e-9)


def test_the_errors_of_A_are_as_large_as_they_are_said_to_be():
    rng, ratios = rng_of(0), []
    A, P = rng.normal(size=(3, 3)), aioli.cover(3, 9, rng_of(0))
    for _ in range(300):
        drops = P @ A.T + rng.normal(size=(9, 3)) * [.1, 1, 10]
        fitted = aioli.fit_linear_dynamic(P, drops)
        ratios.append((fitted - A) / fidelity.standard_errors(P, drops, fitted))
    expected = 6 / 4                                            # Student's t, 6 degrees of freedom
    assert np.mean(np.square(ratios)) == pytest.approx(expected, rel=.15)


@given(ms, seeds, st.booleans())
def test_sim_is_half_cosine_half_rank_correlation_of_column_sums(m, seed, centred):
    A, B = rng_of(seed).normal(size=(2, 3, m))
    a, b = A.sum(0), B.sum(0)
    order = np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]
    cosine = np.corrcoef(a, b)[0, 1] if centred else a @ b / np.sqrt((a @ a) * (b @ b))
    same(judge.similarity(A, B, centred), (cosine + order) / 2, rtol=1e-9)
    same(judge.similarity(A, 3 * A[::-1], centred), 1, rtol=1e-9)
    same(judge.similarity(A, -A, centred), -1, rtol=1e-9)


@given(ms, seeds)
def test_only_the_centred_sim_ignores_what_no_step_can_see(m, seed):
    """A number added to a whole row changes no egd step, and yet the plain sim."""
    rng = rng_of(seed)
    A, B, r = rng.normal(size=(m, m)), rng.normal(size=(m, m)), rng.normal(size=(m, 1))
    same(judge.similarity(A, B + r, True), judge.similarity(A, B, True), rtol=1e-7, atol=1e-7)
    up, down = np.diag([1., 0.]), np.diag([0., 1.])
    assert judge.similarity(up, down, True) == pytest.approx(-1)
    assert judge.similarity(up + 9, down + 9) > -.01


def test_a_matrix_that_favours_no_group_is_similar_to_nothing():
    assert judge.similarity(np.ones((2, 2)), np.diag([1., 0.]), True) == 0
    assert judge.similarity(np.zeros((2, 2)), np.diag([1., 0.])) == 0


# ---- forks


def test_forks_leave_the_run_where_it_was_and_read_different_text():
    t, read = tiny.trainer(batch=4), []
    t.answer(aioli.Train(np.array([.5, .5]), 2))
    saved, sampler = copy.deepcopy(t.run("main").state()), t.run("main").sampler
    following = sampler._next

    def spy(j):
        read.append((j, following(j)))
        return read[-1][1]

    sampler._next = spy
    P = np.array([[.75, .25], [.25, .75], [.75, .25]])
    shares, drops = fidelity.forks(t, saved, P, 2, t.val)
    np.testing.assert_allclose(shares, P)
    assert len(read) == len(set(read)) == 24 and not np.allclose(drops[0], drops[2])
    assert drops.mean() > 0                                     # the loss falls at first

    again = t.run("main").state()
    assert again["step"] == 2 and str(again["sampler"]) == str(saved["sampler"])
    for name, weights in again["model"].items():
        assert torch.equal(weights, saved["model"][name])
    for name, state in again["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg"], saved["optimizer"]["state"][name]["exp_avg"])


def test_each_fork_is_a_run_that_goes_on_from_the_same_state_at_its_mixture():
    """Its falls are those of a run that simply trains on, past the text of the fork before it."""
    P, forked = np.array([[.75, .25], [.25, .75]]), tiny.trainer(batch=4)
    forked.answer(aioli.Train(np.array([.5, .5]), 3))
    saved = copy.deepcopy(forked.run("main").state())
    _, drops = fidelity.forks(forked, saved, P, 2, forked.val)

    drawn = 0
    for p, drop in zip(P, drops):
        t = tiny.trainer(batch=4)
        before = t.answer(aioli.Train(np.array([.5, .5]), 3))["loss"]
        t.run("main").sampler.drawn[:] += drawn
        answer = t.answer(aioli.Train(p, 2))
        np.testing.assert_array_equal(drop, before - answer["loss"])
        drawn = drawn + answer["windows"]


# ---- what is made of the points


def test_each_A_is_held_against_the_true_one_as_its_own_objective_weighs_it():
    """Column sums by hand; exp(L) = (1, 3). Two groups: the rank part is 1 where both sides favour
    the same group, else -1."""
    matrices = dict(doge=[[0, 1], [0, 0]], aioli_rounds=[[3, 0], [0, 2]], horizon=[[2, 0], [0, 1]])
    point = dict(loss=[0., np.log(3)], A=[[1, 2], [3, 3]], matrices=matrices,
                 halves=[[[1, 0], [0, 2]], [[4, 0], [0, 2]]])
    plain, centred = (judge.similarities(point, centred) for centred in (False, True))

    expected = {"doge": ((0, 1), (4, 5), 1), "aioli_rounds": ((3, 2), (4, 5), -1),
                "ceiling": ((1, 2), (4, 2), -1), "identity:perplexity": ((1, 3), (10, 11), 1),
                "aioli_rounds:perplexity": ((3, 6), (10, 11), 1),
                "horizon:perplexity": ((2, 3), (10, 11), 1),
                "ceiling:perplexity": ((1, 6), (4, 6), 1)}
    for name, (a, b, rank_part) in expected.items():
        cosine = np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert plain[name] == pytest.approx((cosine + rank_part) / 2)
        assert centred[name] == pytest.approx(rank_part)

    identity = np.dot((1, 1), (4, 5)) / np.sqrt(2 * 41)         # no A: no order, nothing centred
    assert plain["identity"] == pytest.approx(identity / 2) and centred["identity"] == 0
    both = ("aioli_rounds", "horizon", "ceiling", "identity")
    assert set(plain) == {"doge", *both, *(f"{name}:perplexity" for name in both)}


SIMS = {"skillit": .2, "doremi": .4, "doge": -.8, "aioli_rounds": -.1, "horizon": .9,
        "horizon:perplexity": -1.}
CENTRED = {"skillit": .1, "doremi": -.3, "doge": .5, "aioli_rounds": -.9, "horizon": .2,
           "horizon:perplexity": .3}


def a_row(ppl, loss=2.5, text="same", flags=""):
    return dict(steps=100, extra_steps=0, wall_seconds=1., avg_test_ppl=ppl, avg_test_loss=loss,
                test_loss=dict(a=loss), realised_mixture=dict(a=1.), text=text, flags=flags,
                machine="any")


def entry(name, groups="a+b", seed=0):
    return parse_method(name)._replace(groups=groups, seed=seed)


def a_table(gains, groups="a+b", seed=0):
    """Rows whose improvement over stratified is 10 per cent of perplexity times the number given,
    and as its cube in loss."""
    rows = {entry("stratified", groups, seed): a_row(20., 2.)}
    for name, gain in gains.items():
        rows[entry(name, groups, seed)] = a_row(20 - 2 * gain, 2 - gain ** 3)
    return rows


@pytest.fixture
def known_sims(monkeypatch):
    """Points whose sims are given, and whose ceiling is what they say."""
    def given_sims(point, centred):
        return {"ceiling": point["ceiling"][centred], **(CENTRED if centred else SIMS)}

    monkeypatch.setattr(judge, "similarities", given_sims)
    point = dict(step=5, A=[[1, 2], [3, 4]], error=[[.3, 0], [.4, .1]], ceiling=[.95, .85],
                 matrices={"doge": [[1, 0], [2, 1]]})
    fits = [dict(law="log-linear, static", runs=9, mse=.5, r2=.99)]
    return dict(groups=["a", "b"], fits=fits, points=[point, {**point, "ceiling": [.85, .75]}])


def test_tables_are_means_of_points_and_sets_and_show_errors_of_column_sums(known_sims, tmp_path):
    other = dict(known_sims, fits=[dict(law="log-linear, static", runs=9, mse=1.5, r2=.89)])
    summary, details = judge.judge({"a+b": known_sims, "b+c": other}, {}, tmp_path / "f.png")
    plain, centred = [line for line in summary.splitlines() if line.startswith("| ceiling")]
    assert plain == "| ceiling | 0.900 | 0.900 | 0.900 |"
    assert centred == "| ceiling | 0.800 | 0.800 | 0.800 |"
    assert "| log-linear, static | 0.990 | 0.890 | 0.940 |" in summary
    assert "| log-linear, static | 0.500 | 1.500 | 1.000 |" in summary
    assert "| +4.0000 ± 0.5000 | +6.0000 ± 0.1000 |" in details
    assert "| doge, in parts | +0.750 | +0.250 |" in details
    assert "Figure 3" not in summary and not (tmp_path / "f.png").exists()


def test_a_law_without_a_fit_on_one_set_leaves_its_cell_empty(known_sims, tmp_path):
    found = {"a+b": known_sims, "b+c": dict(known_sims, fits=[])}
    summary, _ = judge.judge(found, {}, tmp_path / "f.png")
    assert "| log-linear, static | 0.990 |  | 0.990 |" in summary


def test_figure_3_sets_the_improvement_of_each_method_against_its_similarity(known_sims, tmp_path):
    summary, _ = judge.judge({"a+b": known_sims}, a_table(SIMS), tmp_path / "figure3.png")
    head = "- average test perplexity, sim of A with A*: "
    assert head + "1.000 (r +1.00, of ranks +1.00; 6 dots)" in summary
    r = np.corrcoef(list(SIMS.values()), list(CENTRED.values()))[0, 1]
    line = f"{r * r:.3f} (r {r:+.2f}, of ranks -0.43; 6 dots)"  # ranks 4 5 2 3 6 1, 3 2 6 1 4 5
    assert "- average test perplexity, sim with A*, centred: " + line in summary
    [loss] = [line for line in summary.splitlines()
              if line.startswith("- average test loss, sim of A with A*: 0.")]
    assert loss.endswith("of ranks +1.00; 5 dots)")             # a cube: in order, but no line


def test_figure_3_is_drawn_where_matplotlib_is(known_sims, tmp_path):
    pytest.importorskip("matplotlib")
    judge.judge({"a+b": known_sims}, a_table(SIMS), tmp_path / "figure3.png")
    assert (tmp_path / "figure3.png").stat().st_size > 9999


def test_improvements_are_of_the_same_seed_and_data_and_averaged_over_seeds():
    rows = a_table({"skillit": 1.}) | a_table({"skillit": 3.}, seed=1)
    rows |= a_table({"doge": 5.}, "b+c")
    rows |= {entry("stratified", seed=2): a_row(5.), entry("skillit:eta=3"): a_row(1.),
             entry("skillit")._replace(kind="average"): a_row(1.), entry("doge", "c+d"): a_row(1.)}
    sims = {title: {("skillit", "a+b"): .5, ("doge", "b+c"): .7, ("doge", "c+d"): .9}
            for title in judge.SIMS}
    dots = judge.dots_of(sims, ["a+b", "b+c", "c+d"], rows)
    assert [(dot.name, dot.groups) for dot in dots] == [("skillit", "a+b"), ("doge", "b+c")]
    assert [dot.gain["perplexity"] for dot in dots] == pytest.approx([20, 50])
    assert [dot.gain["loss"] for dot in dots] == pytest.approx([50 * 14, 50 * 125])
    assert dots[0].sim == dict.fromkeys(judge.SIMS, .5)


# ---- the command


def small(texts, folder):
    """Flags of a comparison's runs on tiny text."""
    return ["--data", str(texts), "--cache", str(folder / "c"), "--encoding", "bpe300", "--steps",
            "100", "--batch", "4", "--val-windows", "1", "--preset", "tiny"]


def a_comparison(arguments, folder):
    """A table of a comparison with these flags on code+law, and grid's run folder with a sweep in
    which loss 1 rises with the share of group 0 -> path of the table."""
    _, config = compare.parse(arguments)
    text = data.load("code+law", config.data, config.encoding, config.cache).digest
    alike = dict(text=text, flags=" ".join(compare.shared_flags(config)))
    ppl = dict(stratified=20., skillit=19., doremi=18., doge=25., aioli_rounds=20.5, horizon=17.,
               grid=19.)
    rows = {entry(name, "code+law"): a_row(value, 3 - .01 * value, **alike)
            for name, value in ppl.items()}
    write_csv(folder / "compare.csv", rows)

    history = aioli.History(["code", "law"], [1, 1], 4)
    for r, a in enumerate(np.linspace(.1, .9, 9)):
        request = aioli.Train(np.array([a, 1 - a]), 100, on=f"sweep-{r}")
        history.add(request, loss=[3 - a + a * a, 2 + a * a / 2])
    history.add(aioli.Train(np.array([.5, .5]), 100), loss=[9., 9.])        # the main run
    home = run_folder(folder, entry("grid", "code+law"))
    home.mkdir(parents=True)
    lines = [train.row_line(row, at=100) for row in history.rows]
    (home / "history.jsonl").write_text("".join(lines))
    return folder / "compare.csv"


def check_point(point, fits):
    """A* and what stands beside it are what the point's own forks give."""
    P, D, A = (np.array(point[key]) for key in ("shares", "drops", "A"))
    assert P.shape == D.shape == (18, 2)                        # nine mixtures, twice
    sides = slice(18), slice(9), slice(9, 18)
    fitted = [np.linalg.lstsq(P[side], D[side], rcond=None)[0].T for side in sides]
    np.testing.assert_allclose(A, fitted[0], atol=1e-12)
    np.testing.assert_allclose(point["halves"], fitted[1:], atol=1e-12)
    np.testing.assert_allclose(point["error"], fidelity.standard_errors(P, D, A))
    assert len(point["loss"]) == 2 and 0 < min(point["loss"]) and max(point["loss"]) < 6

    [fit] = [fit for fit in fits if fit["law"] == f"linear, dynamic, step {point['step']}"]
    unexplained = ((D - P @ A.T) ** 2).sum(0) / ((D - D.mean(0)) ** 2).sum(0)
    assert fit["r2"] == pytest.approx(np.mean(1 - unexplained)) and fit["runs"] == 18
    assert fit["mse"] == pytest.approx(1000 * np.mean((D - P @ A.T) ** 2))


def test_fidelity_holds_every_methods_A_against_the_forks(texts, tmp_path, capsys):
    arguments = small(texts, tmp_path)
    table = a_comparison(arguments, tmp_path)
    arguments += ["--groups", "code+law", "--fork", "1", "--table", str(table), "--out",
                  str(tmp_path / "o")]
    assert fidelity.main(arguments) == 0
    assert fidelity.main(arguments) == 0                        # nothing is measured again
    printed = capsys.readouterr().out
    assert printed.count("step 50 of 100, 18 forks of 1 steps") == 1
    assert "left out" not in printed and "no Figure 3" not in printed

    result = json.loads((tmp_path / "o" / "fidelity.json").read_text())
    points = result["points"]
    assert [point["step"] for point in points] == [25, 50, 75]
    for point in points:
        check_point(point, result["fits"])
        matrices = {name: np.array(A) for name, A in point["matrices"].items()}
        assert list(matrices) == list(judge.FOR_LOSS)
        assert all(A.shape == (2, 2) for A in matrices.values())
        for name in ("doremi", "horizon"):                      # excess; a group's own tokens
            A = matrices[name]
            assert A[0, 1] == A[1, 0] == 0 and (np.diag(A) >= 0).all()
        for name in ("dml", "power"):
            assert matrices[name][1, 0] < matrices[name][1, 1]

    first, last = points[0]["matrices"], points[2]["matrices"]
    assert first["dml"] == last["dml"] and \
        first["aioli_rounds"] != last["aioli_rounds"]
    ratio = np.divide(first["skillit"], last["skillit"])        # L_i^t G_ij: only L moves
    np.testing.assert_allclose(ratio[:, 0], ratio[:, 1])
    assert not np.allclose(ratio, 1, rtol=1e-6)

    assert "average test loss, sim of A with A*" in printed
    assert printed.count("; 5 dots)") == 2 * 4                  # judged each time
    written = (tmp_path / "o" / "fidelity.md").read_text()
    assert "| linear, dynamic, step 50 |" in written and "code+law: column sums of A" in written


def test_a_table_made_with_other_flags_or_from_other_text_is_refused(texts, tmp_path, capsys):
    arguments = small(texts, tmp_path)
    table = ["--groups", "code+law", "--table", str(a_comparison(arguments, tmp_path))]
    out = ["--out", str(tmp_path / "o")]
    assert fidelity.main([*arguments, *table, *out, "--lr", ".001"]) == 2
    assert "take the same, or another --table" in capsys.readouterr().err
    (texts / "law.txt").write_text((texts / "law.txt").read_text() + "\n\nmore law")
    assert fidelity.main([*arguments, *table, *out]) == 2
    assert "other text" in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.fixture
def instant(monkeypatch):
    """No training, no fits, no tables -> a list of what was to be measured: seed, fork, laws."""
    calls = []

    def follow(trainer, fork, laws):
        calls.append((trainer.config.seed, fork, sorted(laws)))
        return []

    def law(P, L):
        return aioli.LogLinear(np.zeros(2), np.eye(2))

    monkeypatch.setattr(fidelity, "follow", follow)
    monkeypatch.setattr(fidelity, "SMOOTH", dict(dml=law, power=law))
    monkeypatch.setattr(fidelity, "judge", lambda found, rows, path: (", ".join(found), "details"))
    return calls


def test_without_a_sweep_of_this_seed_static_laws_are_left_out_with_a_line(
        texts, tmp_path, capsys, instant):
    arguments = small(texts, tmp_path)
    table = a_comparison(arguments, tmp_path)
    arguments += ["--groups", "code+law", "--out", str(tmp_path / "o")]
    for more, laws in (([], ["dml", "power"]), (["--seed", "1"], []),
                       (["--table", str(tmp_path / "none.csv")], [])):
        given = ["--table", str(table), *more]
        assert fidelity.main([*arguments, *given]) == 0
        assert instant[-1] == (1 if "--seed" in more else 0, 50, laws)
        assert ("dml and power are left out" in capsys.readouterr().out) == (not laws)


def test_a_measurement_is_repeated_when_a_flag_or_the_sweep_has_changed(texts, tmp_path, instant):
    arguments = small(texts, tmp_path)
    table = a_comparison(arguments, tmp_path)
    base = [*arguments, "--groups", "code+law", "--out", str(tmp_path / "o"), "--table", str(table)]
    for repeated in (True, False):
        measured = len(instant)
        assert fidelity.main(base) == 0
        assert (len(instant) > measured) == repeated
    for more in (["--fork", "3"], ["--seed", "1"], []):
        measured = len(instant)
        assert fidelity.main([*base, *more]) == 0 and len(instant) == measured + 1
    history = run_folder(tmp_path, entry("grid", "code+law")) / "history.jsonl"
    history.write_text(history.read_text().replace("2.0", "2.1"))
    assert fidelity.main([*base, "--jobs", "1"]) == 0 and len(instant) == measured + 2
    assert fidelity.main([*base, "--jobs", "2"]) == 0 and len(instant) == measured + 2


def test_each_data_set_is_measured_in_a_process_of_its_own_with_the_same_flags(
        texts, tmp_path, capsys, monkeypatch, instant):
    started = []

    def here(name, command, **output):
        assert command[:2] == ["-m", "paper.fidelity"]
        started.append(name)
        assert fidelity.main(command[2:]) == 0

    monkeypatch.setattr(data, "SETS", ("code+law", "all"))
    monkeypatch.setattr(compare, "separately", here)
    arguments = [*small(texts, tmp_path), "--groups", "sets", "--fork", "7", "--seed", "3",
                 "--jobs", "1", "--table", str(tmp_path / "none.csv"), "--out", str(tmp_path / "o")]
    assert fidelity.main(arguments) == 0
    assert started == ["code+law", "all"] and instant == [(3, 7, [])] * 2
    assert "\ncode+law, all\n" in capsys.readouterr().out
    for groups in started:
        asked = json.loads((tmp_path / "o" / groups / "fidelity.json").read_text())["asked"]
        expected = dict(groups=groups, seed=3, fork=7, steps=100, preset="tiny", val_windows=1)
        assert {name: asked[name] for name in expected} == expected


@pytest.mark.parametrize("arguments, says", [
    (["--fork", "0"], "--fork at least 1"),
    (["--steps", "99"], "100 or more"),
    (["--method", "aioli"], "--method"),
    (["--prior", "grid"], "--prior"),
    (["--forks", "3"], "did you mean '--fork'"),
    (["--steps", "100", "--warmup", ".2"], "--warmup 0.2 leaves horizon"),
    (["--groups", "code+lav"], "lav"),
])
def test_what_does_not_apply_gets_one_line_and_exit_code_2(
        texts, tmp_path, capsys, arguments, says):
    base = [*small(texts, tmp_path), "--groups", "code+law", "--out", str(tmp_path / "o"),
            "--table", str(tmp_path / "none.csv")]
    assert fidelity.main([*base, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and not (tmp_path / "o").exists()


def test_help_explains_every_flag():
    with pytest.raises(SystemExit) as stop:
        fidelity.main(["--help"])
    assert stop.value.code == 0
    assert set(train.help_of(fidelity.Flags)) == set(fidelity.Flags.__dataclass_fields__)
