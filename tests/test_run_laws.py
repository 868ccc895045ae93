"""Claims of paper/laws.py: what it says of a law's quality, and what the law proposes."""
import numpy as np
import pytest

import aioli
from paper import laws
from tiny import finished_runs
from worlds import rng_of, same


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
    law, best = a_law(), aioli.solve_static(a_law())
    (tmp_path / "others").mkdir()
    files = finished_runs(tmp_path, ("law", "web"), law)
    others = finished_runs(tmp_path / "others", ("law", "web"), lambda P: law(P) + .2)
    assert run("dml", "--runs", *files, "--holdout", *others) == 0

    printed = capsys.readouterr().out
    head, _, columns, *losses, mean, proposal = printed.splitlines()
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
    _, _, columns, *table, _ = capsys.readouterr().out.splitlines()
    assert columns.count("Spearman") == 1

    P = aioli.cover(2, 6, rng_of(0))
    r2, mse, rho = laws.quality(aioli.fit_power_law(P, curved(P)), P, curved(P))
    expected = np.column_stack((r2, mse, 100 * rho))
    numbers = np.array([line.split()[1:] for line in table], float)
    np.testing.assert_allclose(numbers, [*expected, expected.mean(0)], atol=.006)
    assert not np.allclose(numbers[0], numbers[1], atol=.05)


@pytest.mark.parametrize("objective", ["loss", "perplexity"])
def test_the_proposal_is_what_the_method_trains_on_the_largest_share_first(
        objective, tmp_path, capsys):
    files = finished_runs(tmp_path, ("law", "web"), a_law(), runs=8)
    assert run("dml", "--runs", *files, "--objective", objective) == 0
    words = capsys.readouterr().out.splitlines()[-1].removeprefix("proposed mixture: ").split()
    proposal = dict(zip(words[::2], map(float, words[1::2])))

    P = aioli.cover(2, 8, rng_of(0))
    history = aioli.History(["law", "web"], [1, 1], 1, runs=(P, a_law()(P)))
    p = next(aioli.dml(history, 10, objective=objective)).p
    assert [proposal["law"], proposal["web"]] == pytest.approx(p, abs=6e-4)
    assert list(proposal.values()) == sorted(proposal.values(), reverse=True)


@pytest.mark.parametrize("losses, says", [("run,a,b\n7,1,2\n", "same runs"),
                                          ("run,a,b\n7,one,2\n", "table of numbers")])
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


def test_a_file_that_is_not_there_is_exit_code_1(tmp_path, capsys):
    assert run("dml", "--runs", tmp_path / "p.csv", tmp_path / "l.csv") == 1
    assert "p.csv" in capsys.readouterr().err
