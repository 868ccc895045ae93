"""What a method gains over equal shares, by the length of the runs.

    python -m paper.lengths paper/lengths/*.csv

Each file holds the rows of comparisons at one length (compare.csv of `python -m paper.compare
--steps N`); lines are data sets and methods, columns are lengths.
"""
import sys

import train
from paper.rows import STRATIFIED, ordered, read_csv
from paper.tables import LEGEND, gap, markdown, mean_of, partners, shown


def by_length(paths):
    """{steps: {Entry: row}}, shortest first. Raises ValueError for a file with none, or several."""
    found = {}
    for path in paths:
        rows = read_csv(path)
        steps = {row["steps"] for entry, row in rows.items() if entry.kind == "method"}
        if len(steps) != 1 or steps & set(found):
            raise ValueError(f"{path}: give files of comparisons, one for each length")
        found[steps.pop()] = rows
    if not found:
        raise ValueError("give the tables of comparisons, as in "
                         "python -m paper.lengths paper/lengths/*.csv")
    return dict(sorted(found.items()))


def tabulate(found, title, key, digits):
    """The table: a line per data set and method, a column per length."""
    everything = {entry: row for rows in found.values() for entry, row in rows.items()}
    lines, sets = ordered(everything)
    body = []
    for groups in sets:
        for line in lines:
            cells = [cell(rows, line, groups, key, digits) for rows in found.values()]
            if any(cells):
                body.append([groups, line.label, *cells])
    return markdown([title, "method", *(f"{steps:,} steps" for steps in found)], body)


def cell(rows, line, groups, key, digits):
    """The value for stratified, the difference to it for others, "" where there is no run."""
    pairs = partners(rows, line, groups)
    if not pairs:
        return ""
    if line == STRATIFIED:
        return f"{mean_of(pairs, key):.{digits}f}"
    return f"{shown(gap(pairs, key), digits)} ({len(pairs)})"


def main(argv=None):
    """Print the tables of perplexity and of loss; exit code as train.py's."""
    def command():
        found = by_length(sys.argv[1:] if argv is None else argv)
        print(LEGEND.split(";")[0] + "; in brackets: seeds.\n")
        print(tabulate(found, "average test perplexity", "avg_test_ppl", 2) + "\n")
        print(tabulate(found, "average test loss", "avg_test_loss", 4))

    return train.exit_code("paper.lengths", command)


if __name__ == "__main__":
    sys.exit(main())
