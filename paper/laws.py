"""Laws fitted to runs that are finished: how well they predict, and which mixture they propose.

    python -m paper.laws power --runs MIXTURES.csv LOSSES.csv
    python -m paper.laws dml --runs MIXTURES.csv LOSSES.csv --holdout MIXTURES2.csv LOSSES2.csv
    python -m paper.laws power --runs MIXTURES.csv LOSSES.csv --target code --kl .05

A CSV file has a header and a line a run: the number of the run, then a share per group, or a loss
each; losses need not be of the groups, and only those minimised need be above 0. Olmix's ratios.csv
and metrics.csv are such files too. The last line that is printed is the command that trains on the
proposed mixture.
"""
import argparse
import shlex
import sys
import time

import numpy as np

import aioli
import data
import train
from paper.runs import read_runs

SMOOTH = dict(dml=aioli.fit_log_linear, power=aioli.fit_power_law)
LAWS = SMOOTH | dict(regmix=aioli.fit_trees)                            # which has no slope


def ranks(x):
    """Ranks of x (R,), from 1, ties averaged -> (R,). What differs by rounding alone is a tie."""
    x = np.asarray(x, float)
    _, where, count = np.unique(np.round(x / max(np.abs(x).max(), 1e-300), 9),
                                return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[where]


def correlation(x, y):
    """Of x and y (R,); 0 where one of them is constant, up to rounding."""
    if not (np.ptp(ranks(x)) and np.ptp(ranks(y))):
        return 0.0
    return np.corrcoef(x, y)[0, 1]


def quality(law, mixtures, losses):
    """How well a law predicts runs, mixtures (R, m) and losses (R, n), R >= 2 -> R^2, mean squared
    error in nats^2, and Spearman's rank correlation, each (n,), one per loss. Raises ValueError."""
    P, L = aioli.check_runs(mixtures, losses, 2)
    predicted = law(P)                                                  # (R, n)

    error = ((predicted - L) ** 2).mean(0)
    r2 = 1 - error / L.var(0)
    rho = [correlation(ranks(a), ranks(b)) for a, b in zip(predicted.T, L.T)]
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


def check_varies(targets, L):
    """Raise ValueError for runs, losses (R, n), that no law can be judged by."""
    if len(L) < 2:
        raise ValueError("one run is too few to judge a law by; give two or more")
    same = np.array(targets)[np.ptp(L, axis=0) == 0]
    if len(same):
        raise ValueError(f"the loss {same[0]} is the same in all runs, and no law can be judged by "
                         "it; leave its column out")


def check_above_0(targets, L):
    """Raise ValueError for losses (R, n) that a law is not for."""
    lowest = L.min(axis=0)
    if lowest.min() <= 0:
        i = lowest.argmin()
        raise ValueError(f"the loss {targets[i]} is {lowest[i]:g} in a run, but laws are of "
                         "numbers above 0; if it is a score, add a number to its column, or leave "
                         "it out by --target")


def read_holdout(files, groups, targets):
    """Runs to test a law on -> mixtures (R, m), losses (R, n). Raises ValueError unless they are of
    these groups and losses, in this order."""
    other_groups, P, other_targets, L = read_runs(files)
    if (other_groups, other_targets) != (groups, targets):
        raise ValueError(f"--holdout {' '.join(files)} has other groups than --runs, or in another "
                         "order; give files with the same columns")
    return P, L


def weights_of(text, targets):
    """What each loss counts: names of losses, or NAME=W, joined by commas -> (n,). Default 1 each;
    those not named count nothing. Raises ValueError."""
    if not text:
        return np.ones(len(targets))
    w = dict.fromkeys(targets, 0.0)
    for part in map(str.strip, text.split(",")):
        name, _, weight = (part, "", 1) if part in w else part.rpartition("=")
        train.pick("loss", name or part, w)
        if w[name]:
            raise ValueError(f"--target names {name} twice; give it one weight")
        try:
            w[name] = float(weight)
        except ValueError:
            w[name] = np.nan
        if not (w[name] and aioli.finite(w[name])):
            raise ValueError(f"{part!r} is not a loss and its weight, as in {name}=2, or {name}=-1 "
                             "for one that should rise")
    return np.array(list(w.values()))


def check_falls(method, objective, w):
    """Raise ValueError for a weight below 0, (n,), where losses can only fall."""
    if w.min() < 0 and objective == "perplexity":
        raise ValueError("a weight below 0 in --target is for a score, which has no perplexity; "
                         "leave out --objective")
    if w.min() < 0 and method == "power":
        raise ValueError("a weight below 0 in --target is not for the law power, whose losses only "
                         "fall; take dml or regmix")


def print_proposal(groups, mixture, P):
    """The mixture, largest share first, which of its groups no run had more of, and a command."""
    shares = sorted(zip(groups, mixture), key=lambda pair: -pair[1])
    print("proposed mixture: " + "  ".join(f"{group} {p:.3f}" for group, p in shares))
    held = [f"{group} {most:.3f}" for group, p, most in zip(groups, mixture, P.max(0))
            if p > .999 * most]
    if held:
        print(f"no run had more of: {'  '.join(held)}")
    command = dict(method="fixed", groups="+".join(map(data.clean, groups)),
                   mixture="+".join(f"{p:.4f}" for p in mixture))
    print(shlex.join(["python", "train.py", *train.as_flags(command)]))


def study(method, runs, holdout=(), objective="loss", target="", kl=0.0, mixture_prior=""):
    """Fit a law to finished runs and print how good it is and what it proposes.

    method: a name in LAWS. runs, holdout: two CSV files each, as read_runs takes them. objective:
    the proposal has the least average of it, over the losses that `target` names (see weights_of),
    plus kl times its divergence from mixture_prior, shares joined by +. Raises ValueError.
    """
    fit = train.pick("law", method, LAWS)
    aioli.check_form(objective)
    aioli.check(kl=kl)
    if method in SMOOTH:
        aioli.check_prior_counts(kl, mixture_prior)
    elif kl:
        raise ValueError("--kl is for dml and power; regmix searches around --mixture-prior")
    groups, P, targets, L = read_runs(runs)
    prior = aioli.parse_mixture(mixture_prior, groups, "--mixture-prior") if mixture_prior else None
    w = weights_of(target, targets)
    check_falls(method, objective, w)
    tests = [(P, L), read_holdout(holdout, groups, targets)] if holdout else [(P, L)]
    counts = w != 0
    tests = [(mixtures, losses[:, counts]) for mixtures, losses in tests]
    targets = np.array(targets)[counts]
    for _, losses in tests:
        check_above_0(targets, losses)
        check_varies(targets, losses)

    began = time.perf_counter()
    law = fit(*tests[0])
    spent = time.perf_counter() - began
    if method in SMOOTH:
        mixture = aioli.propose(law, P, objective, w[counts], kl, prior)
    else:
        prior = np.full(len(groups), 1 / len(groups)) if prior is None else prior
        mixture = aioli.search(P, L[:, counts], prior, objective, w[counts])
    print(f"{method}: law of {len(groups)} shares for {sum(counts)} losses, "
          f"fitted to {len(P)} runs in {spent:.1f} s")

    print_quality(targets, [quality(law, *test) for test in tests])
    print_proposal(groups, mixture, P)


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
    parser.add_argument("--target", default="", metavar="NAME[=W],...",
                        help="the losses that are minimised, with weights; a weight below 0 is for "
                             "what should rise [all, alike]")
    parser.add_argument("--kl", type=float, default=0.0,
                        help="nats that a nat of divergence from the prior must gain [0.0]")
    parser.add_argument("--mixture-prior", default="", metavar="A+B+...",
                        help="shares to stay near, or for regmix to search around, in the order of "
                             "the columns [equal]")
    return vars(parser.parse_args(argv))


def main(argv=None):
    """The command line, or argv -> exit code."""
    return train.exit_code("paper.laws", lambda: study(**parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
