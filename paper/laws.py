"""Laws fitted to runs that are finished: how well they predict, and which mixture they propose.

    python -m paper.laws power --runs MIXTURES.csv LOSSES.csv
    python -m paper.laws dml --runs MIXTURES.csv LOSSES.csv --holdout MIXTURES2.csv LOSSES2.csv

A CSV file has a header and a line a run: the number of the run, then a share or a loss per group.
Olmix's ratios.csv and metrics.csv are such files too.
`train.py --method power --runs MIXTURES.csv LOSSES.csv` trains a model on what such runs propose.
"""
import argparse
import sys
import time

import numpy as np

import aioli
import train

LAWS = dict(dml=aioli.fit_log_linear, power=aioli.fit_power_law)


def ranks(x):
    """Ranks of x (R,), from 1, ties averaged -> (R,)."""
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[where]


def quality(law, mixtures, losses):
    """How well a law predicts runs, mixtures (R, m) and losses (R, n), R >= 2 -> R^2, mean squared
    error in nats^2, and Spearman's rank correlation, each (n,), one per loss. Raises ValueError."""
    P, L = aioli.check_runs(mixtures, losses, 2)
    if not np.ptp(L, axis=0).all():
        raise ValueError("a loss is the same in all runs, so that no law can be judged by it; "
                         "leave its column out")
    predicted = law(P)                                                  # (R, n)

    error = ((predicted - L) ** 2).mean(0)
    r2 = 1 - error / L.var(0)
    rho = [np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in zip(predicted.T, L.T)]
    return r2, error, np.array(rho)


def print_quality(targets, columns):
    """A line per loss and one of their means; columns: a quality() of the fit, and one held out."""
    print(f"{'':<20}{'fit':>29}" + (f"{'held out':>32}" if len(columns) > 1 else ""))
    print(f"{'loss':<20}" + "   ".join([f"{'R^2':>9}{'MSE':>10}{'Spearman':>10}"] * len(columns)))

    def line(name, cells):
        parts = [f"{r2:>9.4f}{mse:>10.5f}{100 * rho:>10.2f}" for r2, mse, rho in cells]
        print(f"{name:<20}" + "   ".join(parts))

    for i, name in enumerate(targets):
        line(name, np.array(columns)[:, :, i])
    line("mean", np.mean(columns, axis=2))


def propose(method, groups, P, L, objective):
    """The mixture that a static method chooses after the runs P (R, m), L (R, n) -> (m,)."""
    history = aioli.History(groups, np.ones(len(groups)), batch=1, runs=(P, L))
    request = next(aioli.METHODS[method](history, 0, objective=objective))
    return request.p


def read_holdout(files, groups, targets):
    """Runs to test a law on -> mixtures (R, m), losses (R, n). Raises ValueError unless they are of
    these groups and losses, in this order."""
    other_groups, P, other_targets, L = train.read_runs(files)
    if (other_groups, other_targets) != (groups, targets):
        raise ValueError(f"--holdout {' '.join(files)} has other groups than --runs, or in another "
                         "order; give files with the same columns")
    return P, L


def study(method, runs, holdout=(), objective="loss"):
    """Fit a law to finished runs and print how good it is and what it proposes.

    method: a name in LAWS. runs, holdout: two CSV files each, as train.read_runs takes them.
    objective: the proposal has the least average of it. Raises ValueError.
    """
    fit = train.pick("law", method, LAWS)
    groups, P, targets, L = train.read_runs(runs)
    tests = [(P, L)]
    if holdout:
        tests.append(read_holdout(holdout, groups, targets))
    mixture = propose(method, groups, P, L, objective)

    began = time.perf_counter()
    law = fit(P, L)
    spent = time.perf_counter() - began
    print(f"{method}: law of {len(groups)} shares for {len(targets)} losses, "
          f"fitted to {len(P)} runs in {spent:.1f} s")

    print_quality(targets, [quality(law, *test) for test in tests])
    shares = sorted(zip(groups, mixture), key=lambda pair: -pair[1])
    print("proposed mixture: " + "  ".join(f"{group} {p:.3f}" for group, p in shares))


def parse(argv):
    """Command line -> the arguments of study(). Raises ValueError."""
    parser = train.Parser(prog="python -m paper.laws", description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", metavar="LAW", help=f"the law to fit: {' or '.join(LAWS)}")
    parser.add_argument("--runs", nargs=2, metavar="CSV", required=True,
                        help="mixtures and final losses of the runs to fit")
    parser.add_argument("--holdout", nargs=2, metavar="CSV", default=(),
                        help="two more such files, to test the law on")
    parser.add_argument("--objective", default="loss",
                        help="loss or perplexity, whose average is minimised [loss]")
    return vars(parser.parse_args(argv))


def main(argv=None):
    """The command line, or argv -> exit code."""
    return train.exit_code("paper.laws", lambda: study(**parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
