"""The rows of a comparison: which run each one is of, what is kept of it, and the CSV file of them.

How to read it: `Entry` names a run, `row_of` says what is kept of its result.json, and `write_csv`
and `read_csv` are the file, a line a run.
"""
import ast
import csv
import hashlib
import inspect
import io
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

import aioli
import data
import train

METHODS = ("stratified", "grid", "dml", "power", "skillit", "doremi", "doge", "aioli_published",
           "perplexity_weighted", "aioli", "horizon", "grid:perplexity", "power:perplexity",
           "horizon:perplexity")
KINDS = ("method", "throughout", "after", "average", "longer")


class Entry(NamedTuple):
    """One run of a comparison; without groups, a line of a table, which has a run in every cell.

    kind: "method"; "throughout", the mixture that `prior` learnt for the whole run; "after", the
    method on top of that mixture; "average", a static run at the method's own average mixture;
    "longer", the method for `times` as many steps.
    settings: (name, value) pairs that differ from the method's defaults, in the order given.
    """
    kind: str
    method: str
    settings: tuple = ()
    prior: str = ""
    groups: str = ""
    seed: int = 0

    @property
    def line(self):
        return self._replace(groups="", seed=0)

    @property
    def name(self):
        """The method with its settings, as on the command line: aioli:perplexity:eta=2."""
        parts = [spell(value) if name == "objective" else f"{name}={spell(value)}"
                 for name, value in self.settings]
        return ":".join([self.method, *parts])

    @property
    def label(self):
        """What tables and folders call it."""
        times = dict(self.settings).get("times")
        labels = dict(method=self.name, throughout=f"half {self.prior}",
                      after=f"{self.name} after {self.prior}", average=f"average of {self.name}",
                      longer=f"{self.method} x{times}")
        return labels[self.kind]


STRATIFIED = Entry("method", "stratified")


def throughout(prior):
    """The line of a prior's mixture for the whole run."""
    return Entry("throughout", "fixed", prior=prior)


def longer(times):
    """The line of uniform sampling for `times` as many steps, 10 or 2.125."""
    return Entry("longer", "stratified", (("times", int(times) if times % 1 == 0 else times),))


def times_in_all(row):
    """Steps of a run and its extra runs, over its own."""
    return round(1 + row["extra_steps"] / row["steps"], 4)


def spell(value):
    """2.0 as 2; everything else as Python writes it, in full."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def parse_method(text):
    """METHOD, METHOD:OBJECTIVE or METHOD:SETTING=VALUE:... -> Entry. Raises ValueError."""
    method, *parts = text.split(":")
    defaults, given = train.settings_of(train.pick("method", method, aioli.METHODS)), {}
    for part in parts:
        name, value = part.split("=", 1) if "=" in part else ("objective", part)
        if name not in defaults:
            choice = ", ".join(defaults) or "no settings"
            raise ValueError(f"{text}: {method} has no {name} to choose, but {choice}")
        if value.split() != [value]:
            raise ValueError(f"{text}: {name} {value!r} is empty or has a space; choose another")
        try:
            given[name] = read_value(type(defaults[name]), value)
        except ValueError:
            kinds = {bool: "True or False", int: "a number, int", float: "a number, float"}
            kind = kinds[type(defaults[name])]
            raise ValueError(f"{text}: {name} is {kind}, not {value!r}") from None
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    return Entry("method", method, tuple(changed.items()))


def read_value(kind, text):
    """The value of a setting, of that type. Raises ValueError."""
    return bool(("False", "True").index(text)) if kind is bool else kind(text)


def ordered(rows):
    """Lines and data sets of the rows, as the tables show them; those not known here come last."""
    def place(name, known):
        return known.index(name) if name in known else len(known), name

    def order(line):
        return *place(line.name, METHODS), *place(line.prior, METHODS)

    lines = sorted({entry.line for entry in rows}, key=order)
    sets = sorted({entry.groups for entry in rows}, key=lambda groups: place(groups, data.SETS))
    return lines, sets


# ---- what a run leaves: its folder, and its row


def code_of(entry):
    """A digest of the code of a run's method and prior, without its name, comments and docstring,
    and without what it calls; "" where Python does not know the code."""
    digests = []
    for name in filter(None, (entry.method, entry.prior)):
        try:
            source = textwrap.dedent(inspect.getsource(aioli.METHODS[name]))
            [function] = ast.parse(source).body
            body = function.body[1:] if ast.get_docstring(function) else function.body
        except (TypeError, OSError, SyntaxError, ValueError):
            return ""
        words = ast.dump(function.args) + "".join(map(ast.dump, body))
        digests.append(hashlib.md5(words.encode()).hexdigest()[:8])
    return "+".join(digests)


def run_folder(out, entry):
    """The folder of one run."""
    name = f"{re.sub('[ :=]', '-', entry.label)}-s{entry.seed}"
    return Path(out) / train.fit_for_disk(entry.groups) / train.fit_for_disk(name)


def read_sweep(folder):
    """The sweep in a run folder of grid -> mixtures (R, m), final losses (R, m), nats per token."""
    history = train.read_history(folder / "history.jsonl")
    scratch = [row for row in history if row.request.on != "main"]
    return np.array([row.request.p for row in scratch]), np.array([row.reply for row in scratch])


RUN = ("kind", "method", "settings", "prior", "groups", "seed")     # the columns
TEXTS = ("text", "flags", "machine")
WHOLE = ("steps", "extra_steps")
REAL = ("wall_seconds", "avg_test_ppl", "avg_test_loss")
NEWER = ("avg_test_bits",)      # real, too, but a row of an older result or file does not have it
PER_GROUP = ("test_loss", "realised_mixture")


def row_of(result, flags, learnt=None):
    """What the table keeps of a result.json -> row.

    flags: those that all runs share. learnt: the row of the prior that the run builds on, whose
    scratch runs it pays for.
    """
    row = {key: result[key] for key in ("text", *WHOLE, *REAL, *PER_GROUP)}
    row |= {key: result[key] for key in NEWER if key in result}
    row |= dict(flags=" ".join(flags), machine=machine(result["versions"]))
    if learnt:
        scratch = learnt["extra_steps"] / (learnt["extra_steps"] + learnt["steps"])
        row["extra_steps"] += learnt["extra_steps"]
        row["wall_seconds"] += scratch * learnt["wall_seconds"]
    return row


def machine(versions):
    """What decides the last digits of a run, as one string."""
    return joined(versions)


# ---- the file


def joined(values):
    """{name: value} as "name=value name=value", numbers in full."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def numbers(text):
    """{name: number} of what joined() wrote; a name may hold spaces."""
    pairs = re.findall(r"(.+?)=([^ =]+)(?: |$)", text)
    return {name: float(value) for name, value in pairs}


def write_csv(path, rows):
    """{Entry: row} as a file, sorted, so that differences can be read."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow([*RUN, *TEXTS, *WHOLE, *REAL, *NEWER, *PER_GROUP, "code"])
    for entry, row in sorted(rows.items()):
        run = entry._replace(settings=joined(dict(entry.settings)))
        values = [row[key] for key in (*TEXTS, *WHOLE, *REAL)]
        values += [row.get(key, "") for key in NEWER]
        values += [joined(row[key]) for key in PER_GROUP]
        table.writerow([*run, *values, row.get("code", "")])
    train.write(path, file.getvalue())


def read_csv(path):
    """A file -> {Entry: row}; {} if it is not there. Raises ValueError naming the line."""
    if not Path(path).exists():
        return {}
    rows = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        try:
            for cells in table:
                entry = read_entry(cells)
                if entry in rows:
                    raise ValueError(f"a second line for {entry.label}, seed {entry.seed}")
                rows[entry] = read_row(cells)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError,
                csv.Error) as error:
            where = f"{path}, line {table.line_num}"
            raise ValueError(f"{where} is not of a comparison ({error}); take the line out, or use "
                             "another file") from None
    return rows


def read_entry(cells):
    """The Entry that a line of the file, {column: text}, is of."""
    if cells["kind"] not in KINDS:
        raise ValueError(f"no kind of run is called {cells['kind']!r}")
    if not cells["groups"] or int(cells["seed"]) < 0:
        raise ValueError("it does not say which groups and which seed")
    if cells["kind"] == "longer":
        times = numbers(cells["settings"])["times"]
        if not 1 < times < np.inf:
            raise ValueError(f"it cannot be {times} times as long")
        line = longer(times)
    else:
        line = parse_method(":".join([cells["method"], *cells["settings"].split()]))
    return line._replace(kind=cells["kind"], prior=cells["prior"], groups=cells["groups"],
                         seed=int(cells["seed"]))


def read_row(cells):
    """What a line of the file, {column: text}, says of its run."""
    row = {key: cells[key] for key in TEXTS} | dict(code=cells.get("code") or "")
    row |= {key: int(cells[key]) for key in WHOLE}
    real = (*REAL, *(key for key in NEWER if cells.get(key)))
    row |= {key: float(cells[key]) for key in real}
    row |= {key: numbers(cells[key]) for key in PER_GROUP}

    if row["steps"] < 1 or row["extra_steps"] < 0:
        raise ValueError("its steps cannot be")
    for key in real:
        if not 0 < row[key] < np.inf:
            raise ValueError(f"its {key} is {cells[key]}")
    for key in PER_GROUP:
        if not row[key]:
            raise ValueError(f"its {key} cannot be read")
    return row
