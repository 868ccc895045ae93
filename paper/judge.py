"""What the forks of paper/fidelity.py say: sim of every method's A with A*, tables, and Figure 3.

How to read it: `similarity` is the paper's measure, `similarities` applies it at one point of a
run, and `judge` makes the tables of all data sets from what fidelity.measure found on each.
"""
from typing import NamedTuple

import numpy as np

from paper import figures
from paper.laws import correlation, ranks
from paper.rows import Entry
from paper.tables import markdown, partners

FOR_LOSS = ("dml", "power", "skillit", "doremi", "doge", "aioli_rounds",
            "horizon")
FOR_PERPLEXITY = ("power", "aioli_rounds", "horizon")
JUDGED = [*(Entry("method", method) for method in FOR_LOSS),
          *(Entry("method", method, (("objective", "perplexity"),)) for method in FOR_PERPLEXITY)]

SIMS = {"sim of A with A*": False, "sim with A*, centred": True}    # title: whether it is centred


def similarity(A, B, centred=False):
    """The paper's sim: (cosine + Spearman) / 2 of two matrices' column sums, in [-1, 1]; Spearman
    is 0 where one of them is constant, and so is the centred cosine. A, B: (n, m).

    A number added to a whole row moves all column sums alike and no egd step, but it moves the
    cosine: matrices that disagree in every step can be alike. centred=True takes each side's mean
    off first, and only differences count.
    """
    a, b = np.sum(A, axis=0), np.sum(B, axis=0)                     # (m,) each
    spearman = correlation(ranks(a), ranks(b))
    if centred:
        a, b = a - a.mean(), b - b.mean()
    return (cosine(a, b) + spearman) / 2


def cosine(a, b):
    """Of two vectors; 0 if one of them is 0."""
    return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)


def similarities(point, centred):
    """{name: sim} at one point of a run. "ceiling": A* of one half of the forks with that of the
    other; "identity": no A at all.

    NAME:perplexity: both sides with row i times exp(L_i), as the column sums of that are what
    lowers average perplexity.
    """
    A, matrices = np.array(point["A"]), point["matrices"]           # (m, m) each
    matrices = matrices | dict(identity=np.eye(len(A)))
    pairs = dict(ceiling=point["halves"]) | {name: (B, A) for name, B in matrices.items()}

    weights = np.exp(point["loss"])[:, None]                        # (m, 1)
    for name in ("ceiling", *FOR_PERPLEXITY, "identity"):
        if name in pairs:
            first, second = pairs[name]
            pairs[f"{name}:perplexity"] = weights * first, weights * second
    return {name: similarity(*pair, centred) for name, pair in pairs.items()}


def mean_similarities(found, centred):
    """{(name, data set): the mean of its sim over the points of the run}."""
    means = {}
    for groups, result in found.items():
        points = [similarities(point, centred) for point in result["points"]]
        for name in points[0]:
            means[name, groups] = np.mean([sims[name] for sims in points])
    return means


# ---- tables


def per_set(title, names, sets, cells):
    """Markdown: a line a name, a column a data set, and the mean; cells: {(name, set): number}."""
    lines = []
    for name in names:
        values = {groups: cells[name, groups] for groups in sets if (name, groups) in cells}
        if values:
            shown = [f"{values[groups]:.3f}" if groups in values else "" for groups in sets]
            lines.append([name, *shown, f"{np.mean(list(values.values())):.3f}"])
    return markdown([title, *sets, "mean"], lines)


def fit_table(found, title, key):
    """Markdown: how well each law fits on each data set, R^2 or mean squared error."""
    cells = {}
    for groups, result in found.items():
        cells |= {(fit["law"], groups): fit[key] for fit in result["fits"]}
    laws = dict.fromkeys(law for law, _ in cells)
    return per_set(f"fit of each law: {title}", laws, found, cells)


def column_sums(groups, result):
    """Markdown: what each method would raise and lower on one data set. A* with standard errors,
    and every method's own A."""
    lines = []
    for point in result["points"]:
        sums = np.sum(point["A"], axis=0)
        errors = np.sqrt(np.sum(np.square(point["error"]), axis=0))
        cells = [f"{s:+.4f} ± {error:.4f}" for s, error in zip(sums, errors)]
        lines.append([f"A*, step {point['step']}, nats per fork ± standard error", *cells])

        for name, A in point["matrices"].items():
            sums = np.sum(A, axis=0)
            parts = sums / np.abs(sums).sum()
            lines.append([f"{name}, in parts", *(f"{part:+.3f}" for part in parts)])
    return markdown([f"{groups}: column sums of A", *result["groups"]], lines)


# ---- Figure 3


class Dot(NamedTuple):
    """One method on one data set."""
    name: str                   # METHOD or METHOD:perplexity
    method: str
    objective: str              # loss or perplexity: what its average is to be low in
    groups: str
    sim: dict                   # {title of SIMS: mean over the points}
    gain: dict                  # {"perplexity", "loss": how much lower than stratified's, per cent}


def dots_of(sims, sets, rows):
    """The dots of Figure 3; sims: {title of SIMS: mean_similarities}, rows: of a comparison."""
    def gain(pairs, key):
        return np.mean([100 * (1 - row[key] / stratified[key]) for row, stratified in pairs])

    dots = []
    for line in JUDGED:
        objective = "perplexity" if line.settings else "loss"
        for groups in sets:
            pairs, at = partners(rows, line, groups), (line.name, groups)
            sim = {title: means[at] for title, means in sims.items() if at in means}
            if pairs and sim:
                gains = dict(perplexity=gain(pairs, "avg_test_ppl"),
                             loss=gain(pairs, "avg_test_loss"))
                dots.append(Dot(line.name, line.method, objective, groups, sim, gains))
    return dots


def correlations(dots):
    """Markdown: whether whose A is closer to A* does better."""
    lines = ["Figure 3, R^2 of the improvement over stratified in per cent, a dot per method and "
             "data set (the paper: 0.491):"]
    for objective in ("perplexity", "loss"):
        # what minimises perplexity is not after loss
        judged = [dot for dot in dots if objective == "perplexity" or dot.objective == "loss"]
        for title in SIMS:
            x, y = [dot.sim[title] for dot in judged], [dot.gain[objective] for dot in judged]
            if len(judged) > 2:
                r, rho = correlation(x, y), correlation(ranks(x), ranks(y))
                lines.append(f"- average test {objective}, {title}: {r * r:.3f} (r {r:+.2f}, "
                             f"of ranks {rho:+.2f}; {len(judged)} dots)")
    return "\n".join(lines)


def judge(found, rows, path):
    """{data set: what fidelity.measure found} -> summary, details, both Markdown; and Figure 3 at
    `path`, if there are rows of a comparison."""
    names = [line.name for line in JUDGED]
    names = ["ceiling", "ceiling:perplexity", *names, "identity", "identity:perplexity"]
    sims = {title: mean_similarities(found, centred) for title, centred in SIMS.items()}

    parts = [fit_table(found, "R^2", "r2"), fit_table(found, "MSE, in 0.001 nats^2", "mse")]
    for title, means in sims.items():
        parts.append(per_set(f"{title}; mean of three points", names, found, means))
    if rows:
        dots = dots_of(sims, found, rows)
        parts.append(correlations(dots))
        figures.figure3(dots, path)

    details = [column_sums(groups, result) for groups, result in found.items()]
    return "\n\n".join(parts), "\n\n".join(details)
