"""Section 5 of the paper: whose A is the right one, and does that decide who wins?

    python -m paper.fidelity --groups python+csv     # one data set
    python -m paper.fidelity --groups sets           # all: half an hour, after paper.compare

At 1/4, 1/2 and 3/4 of a uniform run, short runs fork off at 9 mixtures or more, twice each, every
one on text of its own. A* is the A of the linear law L^{t+1} = L^t - A p that fits best how much
the losses fall in the forks. Beside it stands what each method would take for A there.

How to read it: `measure` is one data set, `follow` its uniform run, `measure_point` a moment of it.
What they found is judged in paper/judge.py.
"""
import copy
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import aioli
import data
import train
from paper import compare
from paper.judge import judge
from paper.laws import SMOOTH, quality
from paper.rows import Entry, read_csv, read_sweep, run_folder

LAW_NAMES = dict(dml="log-linear, static", power="power, static")
PEEKS = 16                        # batches that the A of DoReMi and that of DoGE are averaged over


@dataclass(frozen=True)
class Flags:
    """What is measured, beside the flags of all runs; the text after # is the help."""
    groups: str = "all"         # groups of text, joined by +; all; or sets: all data sets
    seed: int = 0               # of the run, and of the sweep that dml and power are fitted to
    fork: int = 50              # steps of a fork
    table: str = "out/compare/compare.csv"  # the comparison with its sweeps and improvements
    jobs: int = 0               # processes side by side; 0: one a GPU, or one a core
    out: str = ""               # folder of what is found; default: out/fidelity/GROUPS
    cache: str = ".cache"       # folder for token files

    def __post_init__(self):
        if min(self.seed, self.jobs) < 0 or self.fork < 1:
            raise ValueError("--seed and --jobs must be at least 0, and --fork at least 1")

    @property
    def folder(self):
        default = "out/fidelity" if self.groups == "sets" else f"out/fidelity/{self.groups}"
        return Path(self.out or default)


def standard_errors(mixtures, drops, A):
    """Of fit_linear_dynamic's A, from its residuals: mixtures (R, m), drops (R, n), A (n, m), R > m
    -> (n, m), in the unit of A."""
    P = np.asarray(mixtures, float)
    residuals = np.asarray(drops, float) - P @ A.T
    variance = (residuals ** 2).sum(0) / (len(P) - P.shape[1])          # (n,)
    return np.sqrt(np.outer(variance, np.diag(np.linalg.inv(P.T @ P))))


def forks(trainer, saved, P, steps, windows):
    """Short runs from one state, each at a mixture of P (R, m) -> realised mixtures (R, m), falls
    of each loss (R, m), nats per token on these windows. The run is then in that state again.

    Each goes on in every group's text where the one before it stopped, so no two read the same.
    """
    main, shares, drops = trainer.run("main"), [], []
    before, drawn = trainer.validate(main, windows), np.array(main.sampler.drawn)

    for p in P:
        main.load(saved)
        main.sampler.drawn[:] = drawn
        counts = trainer.answer(aioli.Train(p, steps))["windows"]
        drawn += counts
        shares.append(counts / counts.sum())
        drops.append(before - trainer.validate(main, windows))

    main.load(saved)
    return np.array(shares), np.array(drops)


def method_matrices(trainer, history, saved, G, laws):
    """{method: the A^t, (m, m), that it would take here}: at a point of a uniform run, which is in
    the state `saved` again afterwards.

    history: of the run so far; G: Skill-It's graph (m, m); laws: the fitted laws of dml and power.
    """
    uniform, main, steps = history.uniform, trainer.run("main"), trainer.config.steps

    def mean_signal(name, against=""):
        request = aioli.Peek(uniform, steps, "main", against)
        batches = [trainer.answer(request)["signals"][name] for _ in range(PEEKS)]
        return np.nanmean(batches, axis=0)

    matrices = {name: -law.gradient(uniform) for name, law in laws.items()}
    matrices["skillit"] = G * trainer.validate(main)[:, None]
    matrices["doremi"] = np.diag(mean_signal("excess", against="reference"))
    matrices["doge"] = mean_signal("A")

    main.load(saved)
    probes = new_history(trainer)
    probes.add(aioli.Train(uniform, 0), loss=trainer.validate(main))
    program = aioli.learn_params(probes, np.arange(history.m))
    matrices["aioli_rounds"] = train.drive(program, trainer, probes)
    main.load(saved)

    law = aioli.forecast_end(history, steps * history.batch)
    return matrices | dict(horizon=-law.gradient(uniform))


def new_history(trainer):
    """An empty History for the trainer's text."""
    config, corpus = trainer.config, trainer.corpus
    sizes = [len(tokens) for tokens in corpus.train]
    return aioli.History(corpus.groups, sizes, config.batch, config.seed, warmup=config.warmup)


def measure_point(trainer, history, fork, G, laws):
    """A* with its errors and every method's A, at this moment of the uniform run -> dict."""
    main, m = trainer.run("main"), history.m
    saved = copy.deepcopy(main.state())
    windows = trainer.fixed_windows(trainer.corpus.val, 4 * trainer.config.val_windows, seed=1)
    P = aioli.cover(m, max(9, 2 * m + 1), np.random.default_rng(0))

    shares, drops = forks(trainer, saved, np.concatenate((P, P)), fork, windows)
    A = aioli.fit_linear_dynamic(shares, drops)
    sides = slice(len(P)), slice(len(P), None)
    halves = [aioli.fit_linear_dynamic(shares[side], drops[side]) for side in sides]

    matrices = method_matrices(trainer, history, saved, G, laws)
    return dict(step=main.step, loss=trainer.validate(main, windows), shares=shares, drops=drops,
                A=A, error=standard_errors(shares, drops, A), halves=halves, matrices=matrices)


def follow(trainer, fork, laws):
    """Train one uniform run to 3/4 of its steps -> its three points, as measure_point gives them.

    Beside it, a reference run for DoReMi and one run per group for Skill-It."""
    steps, history, points = trainer.config.steps, new_history(trainer), []
    graph = new_history(trainer)
    G = train.drive(aioli.skill_graph(graph, steps), trainer, graph)
    trainer.answer(aioli.Train(history.uniform, steps, on="reference"))

    for part, n in enumerate(aioli.split(steps, 20)[:15], 1):           # as often as horizon needs
        request = aioli.Train(history.uniform, n)
        history.add(request, **trainer.answer(request))
        if part % 5 == 0:
            point = measure_point(trainer, history, fork, G, laws)
            points.append(point)
            print(f"{trainer.config.groups}: step {point['step']} of {steps}, "
                  f"{len(point['shares'])} forks of {fork} steps", flush=True)
    return points


def sweep_of(config, rows, out):
    """The sweep of grid with this seed, in a comparison whose rows and folder are given
    -> mixtures (R, m) and final losses (R, m); () after a line that says so, if there is none."""
    grid = Entry("method", "grid", groups=config.groups, seed=config.seed)
    folder = run_folder(out, grid)
    if grid in rows and (folder / "history.jsonl").exists():
        return read_sweep(folder)
    print(f"{config.groups}: no run of grid with seed {config.seed} in {out}, so dml and power are "
          "left out")
    return ()


def fit_of(law, runs, r2, mse):
    """A line of the tables of law fits; r2, mse: (n,), per loss."""
    return dict(law=law, runs=runs, mse=1000 * float(mse.mean()), r2=float(r2.mean()))


def law_fits(laws, runs, points):
    """How well each law fits what it was fitted to: static ones the runs, linear ones the forks of
    their point -> a dict per law."""
    fits = []
    for name, law in laws.items():
        r2, mse, _ = quality(law, *runs)
        fits.append(fit_of(LAW_NAMES[name], len(runs[0]), r2, mse))
    for point in points:
        drops, name = point["drops"], f"linear, dynamic, step {point['step']}"
        mse = ((drops - point["shares"] @ point["A"].T) ** 2).mean(0)
        fits.append(fit_of(name, len(drops), 1 - mse / drops.var(0), mse))
    return fits


def measure(config, fork, table, folder):
    """One data set -> its fidelity.json in `folder`: law fits, A* with standard errors, every
    method's A beside it. Raises ValueError.

    fork: steps of a fork. table: a compare.csv; static laws are fitted to the sweep beside it. What
    was measured already, with these flags and this sweep, is not measured again.
    """
    if config.steps < 100:
        raise ValueError(f"--steps {config.steps} is too short to fork off; take 100 or more")
    validated = np.arange(1, 6) / 20                # of the run, up to the first point
    if aioli.past_warmup(config.warmup, validated).sum() < 3:
        raise ValueError(f"--warmup {config.warmup} leaves horizon less than three validations to "
                         "forecast from at a quarter of the run; take .18 or less")
    corpus = train.load_text(config, config.groups)
    rows = compare.read_rows(table, config, {config.groups: corpus.digest}, "--table")
    runs = sweep_of(config, rows, table.parent)

    path = folder / "fidelity.json"
    asked = dict(dataclasses.asdict(config), fork=fork, text=corpus.digest,
                 sweep=[side.tolist() for side in runs])
    if path.exists():
        saved = read_found(path)
        if not train.difference(saved.get("asked", {}), asked, train.MAY_CHANGE):
            return saved

    folder.mkdir(parents=True, exist_ok=True)
    laws = {name: fit(*runs) for name, fit in SMOOTH.items() if runs}
    with train.no_denormals():
        points = follow(train.Trainer(config, corpus), fork, laws)
    found = dict(groups=corpus.groups, fits=law_fits(laws, runs, points), points=points,
                 asked=asked, versions=train.versions(config))
    train.write(path, json.dumps(train.plain(found), allow_nan=False))
    return found


def read_found(path):
    """A fidelity.json. Raises ValueError."""
    with train.reading(path, "what paper.fidelity measures"):
        found = json.loads(path.read_text("utf-8"))
        for point in found["points"]:
            np.array([point["A"], point["error"]], float) @ np.ones(len(found["groups"]))
        return found


def measure_sets(config, flags):
    """measure() of all data sets, a process each -> {data set: what was found}. ValueError."""
    for groups in data.SETS:            # tokens first, before two processes want them at once
        train.load_text(config, groups)
    same = dict(seed=flags.seed, fork=flags.fork, table=flags.table, cache=flags.cache)

    def work(groups):
        out = flags.folder / groups
        flags_of_set = train.as_flags(same | dict(groups=groups, out=out))
        command = ["-m", "paper.fidelity", *flags_of_set, *compare.shared_flags(config)]
        compare.separately(groups, command, stdout=subprocess.DEVNULL)
        return read_found(out / "fidelity.json")

    found = {}
    with compare.workers(flags.jobs) as pool:
        for groups, result in zip(data.SETS, pool.map(work, data.SETS)):
            found[groups] = result
            print(f"{groups}: done, {len(found)} of {len(data.SETS)}", flush=True)
    return found


def fidelity(flags, config):
    """Measure one data set, or all; print and keep the tables, draw Figure 3. Raises ValueError."""
    table, folder = Path(flags.table), flags.folder
    config = dataclasses.replace(config, groups=flags.groups, seed=flags.seed)
    if flags.groups == "sets":
        found = measure_sets(config, flags)
    else:
        found = {flags.groups: measure(config, flags.fork, table, folder)}

    rows = read_csv(table)
    summary, details = judge(found, rows, folder / "figure3.png")
    if not rows:
        summary += f"\n\nno Figure 3: there is no comparison in {table}"
    train.write(folder / "fidelity.md", f"{summary}\n\n{details}\n")
    print(f"\n{summary}\n\nevery column sum of every method: {folder}/fidelity.md")


def main(argv=None):
    """The command line, or argv -> exit code."""
    def command():
        arguments = sys.argv[1:] if argv is None else argv
        fidelity(*compare.parse_flags(arguments, Flags, "paper.fidelity", __doc__,
                                      hidden=(*compare.ONLY_AFTER, "max_epochs", "scratch")))

    return train.exit_code("paper.fidelity", command)


if __name__ == "__main__":
    sys.exit(main())
