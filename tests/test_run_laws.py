"""Claims of paper/laws.py: what it says of a law's quality, and what the law proposes."""
from pathlib import Path

import numpy as np
import pytest

import aioli
from paper import laws
from paper.runs import read_runs
from tiny import finished_runs
from worlds import Static, drive, history, rng_of, same


def a_law(m=2):
    """A log-linear law in which each group helps its own loss most."""
    t = np.full((m, m), .1) - np.diag(np.linspace(1.6, .8, m))
    return aioli.LogLinear(np.linspace(1, 2, m), t)


def run(*arguments):
    return laws.main([str(argument) for argument in arguments])


def test_ranks_begin_at_one_and_ties_share_their_mean_rank():
    same(laws.ranks([.3, -2., 7.]), [2, 1, 3])
    same(laws.ranks([5., 1., 5., 5., 0.]), [4, 2, 4, 4, 1])
    same(laws.ranks([2., 2.]), [1.5, 1.5])
    same(laws.ranks([1 + 2e-16, 0., 1 - 1e-16, 1 / 3]), [3.5, 1, 3.5, 2])     # off by rounding
    same(laws.ranks([3e-12, 2e-12, -1e-12, 0.]), [4, 3, 1, 2])


def test_what_is_constant_up_to_rounding_has_no_correlation():
    assert laws.correlation([1., 1 + 2e-16, 1.], [1., 2., 3.]) == 0
    assert laws.correlation([1., 2., 3.], [7., 7., 7.]) == 0
    assert laws.correlation([1., 2., 3.], [9., 8., 7.]) == pytest.approx(-1)


def test_quality_is_r_squared_the_mean_squared_error_and_the_correlation_of_ranks():
    P, law = aioli.cover(3, 12, rng_of(0)), a_law(3)
    L = law(P) + np.array([.1, 0, 0]) + rng_of(1).normal(0, .05, (12, 3))
    L[:, 1] = np.exp(3 * law(P)[:, 1])                          # another scale, the same order
    r2, mse, rho = laws.quality(law, P, L)

    for i in range(3):
        gap, mean = L[:, i] - law(P)[:, i], L[:, i].sum() / 12
        same(mse[i], sum(gap ** 2) / 12)
        same(r2[i], 1 - sum(gap ** 2) / sum((L[:, i] - mean) ** 2))
    x, y = (np.argsort(np.argsort(values)) - 5.5 for values in (law(P)[:, 0], L[:, 0]))
    same(rho[0], x @ y / (x @ x))
    same(rho[1], 1)
    assert .3 < rho[0] < .999


def test_quality_takes_shares_in_percent_and_refuses_a_single_run():
    P, law = aioli.cover(3, 5, rng_of(0)), a_law(3)
    _, mse, _ = laws.quality(law, 100 * P, law(P))
    same(mse, np.zeros(3), atol=1e-20)
    with pytest.raises(ValueError, match="at least 2 runs"):
        laws.quality(law, P[:1], law(P[:1]))


def test_a_law_is_fitted_to_finished_runs_and_judged_on_others(tmp_path, capsys):
    law, best = a_law(), aioli.solve_static(a_law())                # inside of what runs had
    (tmp_path / "others").mkdir()
    files = finished_runs(tmp_path, ("law", "web"), law)
    others = finished_runs(tmp_path / "others", ("law", "web"), lambda P: law(P) + .2)
    assert run("dml", "--runs", *files, "--holdout", *others) == 0

    printed = capsys.readouterr().out
    head, _, columns, *losses, mean, proposal, command = printed.splitlines()
    assert "2 losses, fitted to 12 runs" in head and columns.count("Spearman") == 2
    assert proposal == f"proposed mixture: law {best[0]:.3f}  web {best[1]:.3f}"
    assert [line.split()[0] for line in (*losses, mean)] == ["law", "web", "mean"]
    for line in (*losses, mean):
        _, r2, mse, rho, other_r2, other_mse, other_rho = line.split()
        assert (r2, mse, rho) == ("1.0000", "0.00000", "100.00")
        assert (other_mse, other_rho) == ("0.04000", "100.00") and float(other_r2) < .99


def test_without_holdout_there_is_one_column_and_the_mean_is_over_the_losses(tmp_path, capsys):
    def curved(P):
        return a_law()(P) + np.array([.1, .4]) * np.sin(9 * P[:, :1])

    assert run("power", "--runs", *finished_runs(tmp_path, ("law", "web"), curved, runs=6)) == 0
    _, _, columns, *table, _, _ = capsys.readouterr().out.splitlines()
    assert columns.count("Spearman") == 1

    P = aioli.cover(2, 6, rng_of(0))
    r2, mse, rho = laws.quality(aioli.fit_power_law(P, curved(P)), P, curved(P))
    expected = np.column_stack((r2, mse, 100 * rho))
    numbers = np.array([line.split()[1:] for line in table], float)
    np.testing.assert_allclose(numbers, [*expected, expected.mean(0)], atol=.006)
    assert not np.allclose(numbers[0], numbers[1], atol=.05)


def proposal(capsys, *arguments):
    """{group: share} that a command proposes, and the last line that it prints."""
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    words = next(line for line in lines if line.startswith("proposed mixture: ")).split()[2:]
    shares = dict(zip(words[::2], map(float, words[1::2])))
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    return shares, lines[-1]


@pytest.mark.parametrize("objective", ["loss", "perplexity"])
def test_the_proposal_is_what_the_method_trains_on_the_largest_share_first(
        objective, tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law(), runs=9)
    found, command = proposal(capsys, "dml", "--runs", *files, "--objective", objective)

    h = history(2)
    drive(aioli.dml(h, 10, objective=objective), Static(a_law()), h)
    p = h.last.request.p
    assert [found["law"], found["web"]] == pytest.approx(p, abs=6e-4)
    start, mixture = command.rsplit(" ", 1)
    assert start == "python train.py --method fixed --groups law+web --mixture"
    assert aioli.parse_mixture(mixture, ["law", "web"]) == pytest.approx(p, abs=1e-4)


TARGETS = ["law", "web"]


def test_losses_that_are_named_are_minimised_by_their_weights_and_no_others_are_looked_at(
        tmp_path, capsys):
    law = aioli.LogLinear(np.array([1., 1.]), np.array([[-1.5, 0], [0, -1.]]))
    files = finished_runs(tmp_path, ("law", "web"), law)
    for text, w in (("law", [1, 0]), ("law,web", [1, 1]), ("web=3,law", [1, 3])):
        assert np.array_equal(laws.weights_of(text, TARGETS), w)
        found, _ = proposal(capsys, "dml", "--runs", *files, "--target", text)
        P = aioli.cover(2, 12, None)
        best = aioli.solve_static(law, weights=w, floor=P.min(), caps=P.max(0))
        assert found["law"] == pytest.approx(best[0], abs=2e-3)
    assert run("dml", "--runs", *files, "--target", "web", "--holdout", *files) == 0
    assert "law of 2 shares for 1 losses" in capsys.readouterr().out
    found, _ = proposal(capsys, "dml", "--runs", *files, "--target", "law=-1")
    assert found["web"] == pytest.approx(12 / 13, abs=1e-3)


def test_a_prior_draws_the_proposal_and_a_group_that_no_run_had_more_of_is_named(tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    assert run("dml", "--runs", *files, "--target", "law") == 0
    assert "no run had more of: law 0.923\n" in capsys.readouterr().out
    found, _ = proposal(capsys, "dml", "--runs", *files, "--target", "law", "--kl", "1e4",
                        "--mixture-prior", "1+3")
    assert found == {"law": .25, "web": .75}
    found, _ = proposal(capsys, "dml", "--runs", *files, "--target", "law", "--kl", "1e4")
    assert found == {"law": .5, "web": .5}
    assert run("dml", "--runs", *files) == 0
    assert "no run had more" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments, says", [
    (["--target", "wbe"], "unknown loss 'wbe'; did you mean 'web'?"),
    (["--target", "web=x"], "'web=x' is not a loss and its weight"),
    (["--target", "web=0"], "'web=0' is not"), (["--target", "web=nan"], "'web=nan' is not"),
    (["--target", "law=-1", "--objective", "perplexity"], "a score, which has no perplexity"),
    (["--target", "law=2, web , law"], "--target names law twice"),
    (["--kl", "-1"], "--kl -1.0 is out of range"),
    (["--mixture-prior", "1+3"], "--mixture-prior changes nothing without --kl"),
    (["--kl", ".1", "--mixture-prior", "1+1+1"], "'1+1+1' is not 2 shares joined by +"),
    (["--kl", ".1", "--mixture-prior", "0+1"], "a prior must be 2 shares above 0"),
])
def test_a_goal_that_is_none_gets_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    assert run("dml", "--runs", *files, *arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and "\n" not in printed.err.strip()


@pytest.mark.parametrize("losses, says", [("run,a,b\n7,1,2\n", "same runs"),
                                          ("run,a,b\n7,one,2\n", "line 2, column a: 'one'")])
def test_files_that_do_not_match_get_one_line_and_exit_code_2(losses, says, tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    (tmp_path / "l.csv").write_text(losses)
    assert run("dml", "--runs", *files) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


@pytest.mark.parametrize("others", [("law", "art"), ("web", "law")])    # one that is new; the order
@pytest.mark.parametrize("file", [0, 1])
def test_runs_held_out_have_the_same_groups_and_losses(others, file, tmp_path, capsys):
    (tmp_path / "others").mkdir()
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    holdout = list(files)
    holdout[file] = finished_runs(tmp_path / "others", others, a_law())[file]
    assert run("dml", "--runs", *files, "--holdout", *holdout) == 2
    printed = capsys.readouterr()
    assert "--holdout" in printed.err and "\n" not in printed.err.strip() and not printed.out


def test_a_law_whose_losses_only_fall_takes_no_weight_below_0(tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    assert run("power", "--runs", *files, "--target", "web=-1") == 2
    error = capsys.readouterr().err.strip()
    assert "not for the law power" in error and "\n" not in error


def test_a_law_of_more_numbers_than_runs_says_so(tmp_path):
    files = finished_runs(tmp_path, ("law", "web"), a_law(), runs=3)
    with pytest.warns(UserWarning, match="6 numbers of a law are fitted to 3 runs"):
        assert run("power", "--runs", *files) == 0


@pytest.mark.parametrize("law, objective, says", [("dlm", "loss", "did you mean 'dml'"),
                                                  ("dml", "bleu", "neither loss nor perplexity")])
def test_what_there_is_not_gets_one_line_and_exit_code_2(law, objective, says, tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    assert run(law, "--runs", *files, "--objective", objective) == 2
    printed = capsys.readouterr()
    assert says in printed.err and "\n" not in printed.err.strip() and not printed.out


@pytest.mark.parametrize("arguments, says", [(["dml"], "--runs"), ([], "LAW"),
                                             (["dml", "--run", "a", "b"], "--run")])
def test_a_command_without_runs_or_with_unknown_flags_gets_one_line(arguments, says, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


# ---- the files of others

MIXTURES, LOSSES = "run,law,web\n1,.2,.8\n2,.5,.5\n3,.9,.1\n", "run,law,web\n1,3,4\n2,3,3\n3,4,3\n"
P, L = [[.2, .8], [.5, .5], [.9, .1]], [[3, 4], [3, 3], [4, 3]]
OLMIX = ("run,name,index,law,web\nzx,swarm-1,0,.2,.8\nab,swarm-2,1,.5,.5\nq,swarm-3,2,.9,.1\n",
         "run,name,index,eval/law/BPB,eval/web/BPB\nzx,a,0,3,4\nab,b,1,3,3\nq,c,2,4,3\n")


def reading(folder, mixtures=MIXTURES, losses=LOSSES):
    for name, text in (("p.csv", mixtures), ("l.csv", losses)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_runs([str(folder / "p.csv"), str(folder / "l.csv")])


@pytest.mark.parametrize("mixtures, losses", [
    (MIXTURES, LOSSES), OLMIX,
    (MIXTURES.replace(",", ";"), LOSSES.replace(",", "\t")),
    ("\ufeff" + MIXTURES, LOSSES.encode("utf-16")),
    ("\ufefflaw,web,run\n.2,.8,1\n.5,.5,2\n.9,.1,3\n", LOSSES),
    (MIXTURES.replace(",", "\t").encode("utf-16"), b"\xfe\xff" + LOSSES.encode("utf-16-be")),
    (MIXTURES.replace("\n", "\r\n"), LOSSES.replace("\n", "\r")),
    ('"run","law", "web"\n"1",".2",".8"\n2, .5 ,5e-1\n\n  \n3,.9,.1', LOSSES + ",,\n"),
    (MIXTURES.replace("run", ""), "\n" + LOSSES.replace("run", "index")),
    (MIXTURES.replace(".2,.8", "20,80"), "run,law,web\n3,4,3\n2,3,3\n1,3,4\n"),
    (",run,law,web\n0,1,.2,.8\n1,2,.5,.5\n2,3,.9,.1\n", LOSSES.replace("run", "run_id")),
    ("Run,en_law_x,en_web_x\n1,.2,.8\n2,.5,.5\n3,.9,.1\n", LOSSES),
])
def test_tables_of_all_kinds_are_the_same_runs(mixtures, losses, tmp_path):
    groups, shares, targets, found = reading(tmp_path, mixtures, losses)
    assert groups == targets == ["law", "web"]
    assert np.allclose(shares, P, rtol=1e-12) and np.array_equal(found, L)


def test_a_name_may_hold_what_separates_cells(tmp_path):
    groups, *_ = reading(tmp_path, MIXTURES.replace("law", '"law; old, ""new"""'))
    assert groups == ['law; old, "new"', "web"]


def test_years_are_names_of_groups_and_one_loss_is_enough(tmp_path):
    losses = "run,metric/avg_loss\n1,3\n2,4\n3,5\n"
    groups, _, targets, _ = reading(tmp_path, MIXTURES.replace("law,web", "2019,2020"), losses)
    assert groups == ["2019", "2020"] and targets == ["metric/avg_loss"]


@pytest.mark.parametrize("cell, instead, says", [
    (".5,.5", ",.5", "p.csv, line 3, column law: '' is not a number >= 0"),
    (".5,.5", ".5,n/a", "p.csv, line 3, column web: 'n/a' is not"),
    (".5,.5", "nan,.5", "p.csv, line 3, column law: 'nan' is not"),
    (".5,.5", "-.5,1.5", "p.csv, line 3, column law: '-.5' is not a number >= 0"),
    (".5,.5", '"0,5",.5', "p.csv, line 3, column law: '0,5' is not .* with a decimal point"),
    (".5,.5", "50%,50%", "p.csv, line 3, column law: '50%' is not"),
    (".5,.5", "0,5,0,5", "p.csv, line 3: 5 cells under 3 names"),
    (".5,.5", ".5", "p.csv, line 3: 2 cells under 3 names"),
    (".5,.5", "1.5,.5", "p.csv, run 2: the shares sum to 2, neither to 1 nor to 100"),
    (".5,.5", "0,0", "p.csv, run 2: the shares sum to 0"),
    ("3,.9", "2,.9", "p.csv, line 4, column run: the run '2' has no name, or that of an earlier"),
    ("3,.9", ",.9", "p.csv, line 4, column run: the run '' has no name"),
    ("3,.9", "4,.9", "do not list the same runs: '3' is in one of them only"),
    ("web", "law", "p.csv, line 1: column 3, 'law', has no name, or that of an earlier one"),
    ("web", "", "p.csv, line 1: column 3, '', has no name"),
    (",web", "", "p.csv, line 2: 3 cells under 2 names"),
    ("web", "name", "p.csv, run 1: the shares sum to 0.2"),             # not a group
    ("run,law,web\n", "", "p.csv, line 1 is no header of names over a line for each run"),
    (MIXTURES, "", "p.csv, line 1 is no header"), (MIXTURES, "run,law,web", "line 1 is no header"),
    (",", "|", "p.csv, line 1 is no header"), (MIXTURES, "run\n1\n", "p.csv, line 1 is no header"),
    ("law", '"law', "p.csv, line 4: unexpected end of data"),
    ("law", '"law"s', "p.csv, line 1: ',' expected after '\"'"),
    (MIXTURES, b"\xff\x00run", "p.csv is not text in UTF-8"), (MIXTURES, LOSSES, "are the same"),
])
def test_a_table_that_is_none_is_refused_by_line_and_column(cell, instead, says, tmp_path):
    whole = cell == MIXTURES
    with pytest.raises(ValueError, match=says):
        reading(tmp_path, instead if whole else MIXTURES.replace(cell, instead))


@pytest.mark.parametrize("loss", ["nan", "inf", "1e300", ""])
def test_a_loss_is_a_finite_number(loss, tmp_path):
    with pytest.raises(ValueError, match=f"l.csv, line 3, column web: '{loss}' is not a number,"):
        reading(tmp_path, losses=LOSSES.replace("3,3\n3", f"3,{loss}\n3"))


@pytest.mark.parametrize("score", ["0", "-1"])
def test_a_score_may_be_0_or_below_where_it_is_not_what_is_minimised(score, tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    head, first, *others = Path(files[1]).read_text().splitlines()
    scores = [f"{head},valid_score_loss", f"{first},{score}", *(f"{line},.5" for line in others)]
    expected, _ = proposal(capsys, "dml", "--runs", *files)
    Path(files[1]).write_text("\n".join(scores))
    assert proposal(capsys, "dml", "--runs", *files, "--target", "law,web")[0] == expected
    for target in ([], ["--target", "score=-1"]):
        assert run("dml", "--runs", *files, *target) == 2
        error = capsys.readouterr().err.strip()
        assert f"the loss score is {score} in a run" in error and "\n" not in error


def test_mixtures_and_losses_in_the_wrong_order_are_noticed(tmp_path):
    with pytest.raises(ValueError, match="p.csv, run 1: the shares sum to 7"):
        reading(tmp_path, LOSSES, MIXTURES)


@pytest.mark.parametrize("law", ["dml", "power"])
def test_runs_that_determine_no_law_are_refused(law, tmp_path, capsys):
    reading(tmp_path, "run,law,web\n1,.5,.5\n2,.5,.5\n3,.5,.5\n")
    assert run(law, "--runs", tmp_path / "p.csv", tmp_path / "l.csv") == 2
    assert "3 mixtures do not tell 2 groups apart" in capsys.readouterr().err


def test_a_loss_that_is_the_same_in_all_runs_is_no_measure_of_a_law(tmp_path, capsys):
    reading(tmp_path, losses="run,law,web\n1,3,4\n2,3,3\n3,3,3\n")
    assert run("power", "--runs", tmp_path / "p.csv", tmp_path / "l.csv") == 2
    assert "the loss law is the same in all runs" in capsys.readouterr().err


def test_power_is_not_asked_for_what_should_rise(tmp_path, capsys):
    reading(tmp_path, losses="run,law,web\n1,3,4\n2,3.5,3\n3,3,3\n")
    files = tmp_path / "p.csv", tmp_path / "l.csv"
    assert run("power", "--runs", *files, "--target", "web=-1") == 2
    assert "not for the law power" in capsys.readouterr().err


def test_a_name_with_an_equals_sign_can_be_a_target():
    np.testing.assert_array_equal(laws.weights_of("b, a=b=2", ["a=b", "b", "c"]), [2, 1, 0])


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert run("dml", "--runs", tmp_path / "p.csv", tmp_path / "l.csv") == 2
    assert "cannot read" in capsys.readouterr().err


def test_regmix_searches_by_what_it_fits(tmp_path, capsys):
    """Around the prior, for the losses that are named; it has no slope, and so no --kl."""
    files = finished_runs(tmp_path, ("law", "web"), a_law())
    _, P, _, L = read_runs(files)
    for target, prior, w in (("law", ".3+.7", [1, 0]), ("web=-2", ".5+.5", [0, -2])):
        found, _ = proposal(capsys, "regmix", "--runs", *files, "--target", target,
                            "--mixture-prior", prior)
        best = aioli.search(P, L, np.array(prior.split("+"), float), weights=w)
        same([found[group] for group in ("law", "web")], best, 0, 6e-4)
    equal, _ = proposal(capsys, "regmix", "--runs", *files)
    same(equal["law"], aioli.search(P, L, np.array([.5, .5]))[0], 0, 6e-4)
    assert run("regmix", "--runs", *files, "--kl", ".1") == 2
    assert "regmix searches around --mixture-prior" in capsys.readouterr().err


def test_the_column_of_runs_may_be_anywhere_and_an_index_of_pandas_is_none(tmp_path):
    (tmp_path / "p.csv").write_text("code,law,run\n.2,.8,a\n.5,.5,b\n.6,.4,c\n")
    (tmp_path / "l.csv").write_text(",run,law,code\n0,a,3,4\n1,b,3.5,3\n2,c,3,3.2\n")
    groups, P, targets, L = read_runs((tmp_path / "p.csv", tmp_path / "l.csv"))
    assert (groups, targets) == (["code", "law"], ["law", "code"])
    np.testing.assert_allclose(P[0], [.2, .8])
    np.testing.assert_allclose(L[1], [3.5, 3])
