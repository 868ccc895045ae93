"""Finished runs of others, read from two CSV files: mixtures and losses, a line a run."""
import csv
import math
import re
from pathlib import Path

import numpy as np

import aioli
from train import plain_names

NO_GROUPS = ("run", "run_id", "name", "index")              # columns of Olmix's ratios and metrics


def read_cells(path):
    """A CSV file, UTF-8 or UTF-16 -> [(line number, cells)] of the lines that have any. ValueError.

    The comma, semicolon or tab separates them, whichever is most often in the first line."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); give another file") from None
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        lines = content.decode(encoding).splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None
    first = re.sub('"[^"]*"', "", next(filter(str.strip, lines), ""))
    separator = max(",;\t", key=first.count)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        cells = [(reader.line_num, list(map(str.strip, row))) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return [(line, row) for line, row in cells if any(row)]


def read_table(path, lowest=-math.inf):
    """A CSV file, a run a line under a header of names -> names, {run: numbers}. ValueError.

    The column run or run_id, else the first, names the runs; NO_GROUPS have no numbers either. No
    number may be below `lowest`, 0 or none."""
    (line, head), *rows = read_cells(path) or [(1, [""])]
    names = [name.lower() for name in head]
    key = next((i for i, name in enumerate(names) if name in ("run", "run_id")), 0)
    columns = [i for i, name in enumerate(names) if i != key and name not in NO_GROUPS]
    if names[0] in ("", "unnamed: 0"):                                  # an index of pandas
        columns = [i for i in columns if i]
    if not (rows and columns) or head[0].replace(".", "").isdigit():
        raise ValueError(f"{path}, line {line} is no header of names over a line for each run")
    for i in columns:
        if not head[i] or head[i] in head[:i]:
            raise ValueError(f"{path}, line {line}: column {i + 1}, {head[i]!r}, has no name, or "
                             "that of an earlier one")

    numbers = {}
    for line, cells in rows:
        if len(cells) != len(head):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells under {len(head)} names")
        run = cells[key]
        if not run or run in numbers:
            raise ValueError(f"{path}, line {line}, column {head[key]}: the run {run!r} has no "
                             "name, or that of an earlier one")
        places = [(cells[i], f"{path}, line {line}, column {head[i]}") for i in columns]
        numbers[run] = [number(cell, lowest, place) for cell, place in places]
    return plain_names([head[i] for i in columns]), numbers


def number(cell, lowest, place):
    """The finite number in a cell, or a ValueError that says where it is not, or below `lowest`."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (aioli.finite(value) and value >= lowest):
        bound = {-math.inf: "", 0.0: " >= 0"}.get(lowest, " above 0")
        raise ValueError(f"{place}: {cell!r} is not a number{bound}, with a decimal point")
    return value


def read_runs(files):
    """MIXTURES.csv, LOSSES.csv -> group names, mixtures (R, m) that sum to 1, names of losses,
    losses (R, n), or scores, in the same order. Raises ValueError."""
    groups, mixtures = read_table(files[0], lowest=0.0)
    targets, losses = read_table(files[1])
    alone = mixtures.keys() ^ losses.keys()
    if alone:
        raise ValueError(f"{' and '.join(files)} do not list the same runs: {min(alone)!r} is in "
                         "one of them only")
    if mixtures == losses:
        raise ValueError(f"{files[0]} and {files[1]} are the same; give mixtures, then losses")
    for run, shares in mixtures.items():
        total = sum(shares)
        if not (.98 < total < 1.02 or 98 < total < 102):                # rounded shares will do
            raise ValueError(f"{files[0]}, run {run}: the shares sum to {total:g}, neither to 1 "
                             "nor to 100")
    if len(groups) < 2:
        raise ValueError(f"{files[0]} has one group, {groups[0]}; mixing needs two or more")
    P = np.array(list(mixtures.values()))
    L = np.array([losses[run] for run in mixtures])
    return groups, P / P.sum(1, keepdims=True), targets, L
