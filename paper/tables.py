"""The tables of a comparison: methods x data sets, as Markdown.

    python -m paper.tables paper/compare.csv
"""
import functools
import sys
from typing import NamedTuple

import numpy as np

import train
from paper.rows import (STRATIFIED, Entry, longer, ordered, read_csv, throughout,
                        times_in_all)

LEGEND = ("Differences to stratified of the same seed, ± 95 % t-interval over seeds, bold if all "
          "of it is below 0; time: wall, stratified = 1.")
CONTROLS = ("perplexity_weighted", "natural")       # they measure no A
CHANCE = .025               # that a 95 % interval lies below 0 where there is no difference


class Interval(NamedTuple):
    """mean ± half; half is NaN for a single value."""
    mean: float
    half: float

    @property
    def below(self):
        return self.mean + self.half < 0

    @property
    def above(self):
        return self.mean > self.half


def interval(values):
    """Student's 95 % t-interval for the mean of the values."""
    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)), np.nan)
    angle = (np.arange(100_000) + .5) / 100_000 * np.pi / 2     # t is sqrt(n - 1) tan(angle),
    mass = np.cumsum(np.cos(angle) ** (n - 2))                  # and angles have this density
    t = (n - 1) ** .5 * np.tan(angle[np.searchsorted(mass, .95 * mass[-1])])
    return Interval(float(np.mean(values)), float(t * np.std(values, ddof=1) / n ** .5))


def partner_of(entry, row, against):
    """The run that one is held against, of the same data and seed; against: the kind of it, or one
    of CONTROLS."""
    lines = dict(method=STRATIFIED, average=entry._replace(kind="average"),
                 longer=longer(times_in_all(row)), throughout=throughout(entry.prior))
    lines |= {name: Entry("method", name) for name in CONTROLS}
    return lines[against]._replace(groups=entry.groups, seed=entry.seed)


def partners(rows, line, groups, against="method"):
    """[(row, partner's row)]: the runs of a line on one data set that have a partner."""
    pairs = []
    for entry, row in rows.items():
        if (entry.line, entry.groups) == (line, groups):
            partner = partner_of(entry, row, against)
            pairs += [(row, rows[partner])] if partner in rows else []
    return pairs


def gap(pairs, key):
    """Interval of row minus partner."""
    return interval([row[key] - partner[key] for row, partner in pairs])


def markdown(head, lines):
    """A Markdown table from the cells of its head and of its lines."""
    rows = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def table(rows, title, key, digits, lines, against="method"):
    """One table, and how many of its intervals are below 0; "" if there is nothing in it."""
    _, sets = ordered(rows)
    body, intervals = [], []
    for line in lines:
        pairs = {groups: partners(rows, line, groups, against) for groups in sets}
        pairs = {groups: found for groups, found in pairs.items() if found}
        if not pairs:
            continue
        if line == STRATIFIED:
            cells = {groups: f"{mean_of(found, key):.{digits}f}" for groups, found in pairs.items()}
            counts = ["", ""]
        else:
            gaps = {groups: gap(found, key) for groups, found in pairs.items()}
            cells = {groups: shown(found, digits) for groups, found in gaps.items()}
            counts = [sum(found.mean < 0 for found in gaps.values()),
                      sum(found.below for found in gaps.values())]
            intervals += gaps.values()
        by_set = [cells.get(groups, "") for groups in sets]
        body.append([line.label, *by_set, *counts, *costs(rows, line, sets), seeds(pairs)])

    head = [title, *sets, "better", "interval below 0", "extra runs", "time", "seeds"]
    return "\n\n".join([markdown(head, body), *by_chance(intervals)]) if body else ""


def mean_of(pairs, key):
    """Mean of the rows themselves."""
    return np.mean([row[key] for row, _ in pairs])


def shown(found, digits):
    """An interval as a cell."""
    text = f"{found.mean:+.{digits}f}"
    if not np.isnan(found.half):
        text += f" ± {found.half:.{digits}f}"
    return f"**{text}**" if found.below else text


def costs(rows, line, sets):
    """Extra runs, a mean over the line's runs; wall time over that of stratified, their median."""
    extra = [row["extra_steps"] / row["steps"] for entry, row in rows.items() if entry.line == line]
    ratios = []
    for groups in sets:
        pairs = partners(rows, line, groups)
        ratios += [row["wall_seconds"] / partner["wall_seconds"] for row, partner in pairs]
    return f"{np.mean(extra):.1f}", f"{np.median(ratios):.2f}"


def seeds(pairs):
    """How many seeds, which need not be as many on every data set: 5, or 1-3."""
    counts = sorted(map(len, pairs.values()))
    return "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def by_chance(intervals):
    """A line on how many intervals are below 0, and how many would be without any difference."""
    intervals = [found for found in intervals if not np.isnan(found.half)]
    if not intervals:
        return []
    below = sum(found.below for found in intervals)
    return [f"{below} of {len(intervals)} intervals are below 0; by chance alone one expects "
            f"{CHANCE * len(intervals):.1f} ({100 * CHANCE:g} %)."]


def tally(rows, name, lines):
    """One line on the restricted setting: a method against the mixture of the prior it follows.

    "" if no run with such a mixture throughout is there.
    """
    _, sets = ordered(rows)
    pairs = [partners(rows, line, groups, "throughout") for line in lines for groups in sets]
    gaps = [gap(found, "avg_test_ppl") for found in pairs if found]
    if not gaps:
        return ""
    means = [found.mean for found in gaps]
    intervals = sum(not np.isnan(found.half) for found in gaps)
    return (f"{name} after another method's mixture, against that mixture throughout: better in "
            f"{sum(mean < 0 for mean in means)} of {len(gaps)} (prior, data set); "
            f"{intervals} intervals, {sum(found.below for found in gaps)} of them below 0 and "
            f"{sum(found.above for found in gaps)} above (by chance {CHANCE * intervals:.1f} each);"
            f" difference in perplexity: mean {np.mean(means):+.2f}, "
            f"median {np.median(means):+.2f}")


def tabulate(rows):
    """{Entry: row} -> the legend, the paper's tables and the controls, and the tallies, as text."""
    def of_kind(kind):
        return [line for line in lines if line.kind == kind]

    lines, _ = ordered(rows)
    costly = {entry.line for entry, row in rows.items() if row["extra_steps"]}
    costly = [line for line in of_kind("method") if line in costly]
    averages = [line._replace(kind="method") for line in of_kind("average")]
    after = {}
    for line in sorted(of_kind("after"), key=lambda line: line.name):
        after.setdefault(line.name, []).append(line)
    methods, ppl = of_kind("method"), "avg_test_ppl"
    in_bits = {entry: row for entry, row in rows.items() if "avg_test_bits" in row}

    def against_control(name):
        others = [line for line in methods if line not in (STRATIFIED, Entry("method", name))]
        return show(f"perplexity against the control, {name}", ppl, 2, others, name)

    show = functools.partial(table, rows)
    tables = [
        show("average test perplexity", ppl, 2, methods),
        show("average test loss", "avg_test_loss", 4, methods),
        table(in_bits, "average test bits per byte", "avg_test_bits", 4, methods),
        *map(against_control, CONTROLS),
        show("perplexity against a static run at the method's own average mixture", ppl, 2,
             averages, "average"),
        show("perplexity against stratified with the same total steps", ppl, 2, costly, "longer"),
        show("perplexity of a prior's mixture throughout", ppl, 2, of_kind("throughout")),
        show("perplexity against the prior's mixture throughout", ppl, 2, sum(after.values(), []),
             "throughout")]
    tallies = [tally(rows, name, lines) for name, lines in after.items()]
    return [LEGEND, *filter(None, tables), *filter(None, tallies)]


def main(argv=None):
    """Print the tables of one file; exit code as train.py's."""
    def command():
        paths = sys.argv[1:] if argv is None else argv
        rows = read_csv(paths[0]) if len(paths) == 1 else {}
        if not rows:
            raise ValueError(f"{' '.join(paths) or 'nothing given'}: give the table of a "
                             "comparison, as in python -m paper.tables paper/compare.csv")
        print("\n\n".join(tabulate(rows)))

    return train.exit_code("paper.tables", command)


if __name__ == "__main__":
    sys.exit(main())
