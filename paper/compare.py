"""The comparison: every method on every data set with every seed, held against uniform sampling.

    python -m paper.compare --quick                     # a first look: one seed, two data sets
    python -m paper.compare --groups sets --seeds 5     # the methods of rows.py, all data sets
    python -m paper.compare --method aioli:eta=2,horizon:perplexity --seeds 3 --lr .004
    python -m paper.compare --groups sets --prior all --method aioli,horizon:perplexity

Each run is a process of its own, `python train.py ...`. Runs of one seed have the same initial
weights and read the same text. Interrupt it as you like: the same command goes on where it was, and
no finished run is made again. In OUT: compare.csv, a line a run; compare.md, the tables; pictures.
"""
import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import aioli
import data
import model
import train
from paper.figures import draw
from paper.rows import (METHODS, STRATIFIED, Entry, code_of, longer, machine, parse_method,
                        read_csv, row_of, run_folder, throughout, times_in_all, write_csv)
from paper.tables import tabulate

TRAIN = str(Path(train.__file__).resolve())
QUICK = ("python+csv", "python+prose")
PRIORS = ("grid", "dml", "power", "skillit", "doremi", "doge")
SWEPT = ("grid", "dml", "power", "olmix", "regmix")     # they begin with the same scratch runs
STILL = ("stratified", "fixed", "natural", "unimax", "doremi", "doge", *SWEPT)  # one mixture a run
NOT_SHARED = ("method", "groups", "seed", "out", "cache", "resume", "past", "prior")
ONLY_AFTER = ("first", "restart")           # flags of runs on top of a prior
worker = threading.local()                  # .environment: what its processes get beside ours


@dataclass(frozen=True)
class Flags:
    """What a comparison takes beside the flags of its runs. The text after # is the help."""
    method: str = "all"     # all, or METHOD, METHOD:OBJECTIVE, METHOD:SETTING=VALUE:..., by commas
    groups: str = "all"     # groups of text, joined by +; all: one set of all; sets: all data sets
    seed: int = 0           # the first seed
    seeds: int = 1          # how many
    quick: bool = False     # a first look: all methods, one seed, two data sets
    prior: str = ""         # all, or methods by commas: --method on top of what each one learns
    controls: bool = False  # static runs at the average mixture; uniform ones with as many steps
    jobs: int = 0           # processes side by side; 0: one a GPU or, without any, one a core
    out: str = ""           # folder of runs, tables and pictures; default: out/compare, out/quick
    cache: str = ".cache"   # folder for token files

    def __post_init__(self):
        if min(self.seed, self.jobs) < 0 or self.seeds < 1:
            raise ValueError("--seed and --jobs must be at least 0, and --seeds at least 1")
        if self.controls and self.prior:
            raise ValueError("--controls is for runs without --prior; leave out one of them")
        if self.quick and (self.method, self.groups) != (Flags.method, Flags.groups):
            raise ValueError("--quick has its own methods and data sets; leave it out to choose")

    @property
    def folder(self):
        return Path(self.out or ("out/quick" if self.quick else "out/compare"))

    @property
    def sets(self):
        """The data sets."""
        if self.quick:
            return QUICK
        return data.SETS if self.groups == "sets" else (self.groups,)


class Setup(NamedTuple):
    """What all runs of a comparison have in common."""
    folder: Path
    config: train.Config    # its shared flags and its cache
    texts: dict             # {data set: digest of its text}
    jobs: int


class Job(NamedTuple):
    """A run, and the one of the same data set and seed that has to be there first."""
    entry: Entry
    needs: Entry | None = None


# ---- one run


def shared_flags(config, kind="method"):
    """The flags of a train.Config that all runs of a kind get, where not the default -> list."""
    left_out = NOT_SHARED if kind == "after" else (*NOT_SHARED, *ONLY_AFTER)
    return train.flags_given(config, left_out)


def mixture_flag(mixture):
    """{group: share} as train.py takes it."""
    return "+".join(map(str, mixture.values()))


def own_flags(job, needed, setup):
    """The flags that make a run what its entry says; needed: the row of job.needs."""
    kind, method = job.entry.kind, job.entry.method
    if kind == "throughout":
        return ["--method", method, "--prior", job.entry.prior, "--first", "1"]
    if kind == "average":
        return ["--method", "fixed", "--mixture", mixture_flag(needed["realised_mixture"])]
    if kind == "longer":
        steps = round(dict(job.entry.settings)["times"] * setup.config.steps)
        return ["--method", method, "--steps", str(steps)]

    flags = ["--method", method, *train.as_flags(dict(job.entry.settings))]
    if kind == "after":                     # learnt already; row_of counts what that cost
        learnt = first_mixture(run_folder(setup.folder, job.needs))
        flags += ["--prior", mixture_flag(learnt)]
    return flags


def first_mixture(folder):
    """The first mixture of a finished run, {group: share}. Raises ValueError if there is none."""
    path = folder / "result.json"
    if not path.exists():
        raise ValueError(f"there is no {path} to take a prior's mixture from; take its line out of "
                         "compare.csv, and it is made again")
    with train.reading(path, "the result of a run on a prior"):
        _, mixture = train.read_result(path)["mixtures"][0]
        mixture_flag(mixture)
    return mixture


CHILDREN = set()            # processes at work
stopping = threading.Event()                # no more are begun


def separately(name, command, **output):
    """`python COMMAND...` in a process of its own; output: as subprocess.Popen takes it.

    Raises Stop after Ctrl-C, and ValueError with `name` and the last thing said if it failed.
    """
    environment = {**os.environ, **getattr(worker, "environment", {})}
    if stopping.is_set():
        raise train.Stop
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True,
                               env=environment, **output)
    CHILDREN.add(process)
    if stopping.is_set():                       # meanwhile
        process.terminate()
    _, said = process.communicate()
    CHILDREN.remove(process)
    if process.returncode == 130 or -process.returncode in train.SIGNALS:
        raise train.Stop
    if process.returncode:
        said = said.strip() or f"exit code {process.returncode}"
        raise ValueError(f"{name}: {said.splitlines()[-1]}")


def run_job(job, needed, setup):
    """Make a run, unless its result is there already -> its row. Raises ValueError.

    needed: the row of job.needs.
    """
    entry, text = job.entry, setup.texts[job.entry.groups]
    out, shared = run_folder(setup.folder, entry), shared_flags(setup.config, entry.kind)
    places = dict(groups=entry.groups, seed=entry.seed, out=out, cache=setup.config.cache)
    flags = [*train.as_flags(places), *shared, *own_flags(job, needed, setup)]
    if job.needs and entry.kind in ("method", "throughout"):        # the same sweep
        past = run_folder(setup.folder, job.needs) / "history.jsonl"
        flags += ["--past", str(past)] if past.exists() else []

    name = f"{entry.label} on {entry.groups}, seed {entry.seed}"
    if not is_finished(out / "result.json", flags, text):
        train_separately(name, flags, out / "checkpoint.pt")
    result = train.read_result(out / "result.json")
    if result["text"] != text:
        raise ValueError(f"{name}: the text is not that of the beginning; use another --out")
    row = row_of(result, shared, learnt=needed if entry.kind == "after" else None)
    return row | dict(code=code_of(entry))


def train_separately(name, flags, checkpoint):
    """A run in a process of its own, from its checkpoint if there is one; one that is damaged is
    set aside. Raises Stop, ValueError."""
    if checkpoint.exists() and not train.is_undamaged(checkpoint):
        print(f"note: {checkpoint} is damaged; its run begins again")
        checkpoint.replace(checkpoint.with_name("checkpoint.pt.bad"))
    resume = ["--resume"] if checkpoint.exists() else []
    separately(name, [TRAIN, *flags, *resume], stdout=subprocess.DEVNULL)


def is_finished(path, flags, text):
    """Whether a result.json is of a run with these flags and this text; one that is damaged is
    taken away."""
    if not path.exists():
        return False
    try:
        result = train.read_result(path)
    except ValueError as error:
        print(f"note: {error}; its run is made again")
        path.unlink()
        return False
    config, settings = train.parse(flags)
    theirs = train.flags_of(result["config"], result["settings"], result.get("text"))
    return not train.difference(theirs, train.flags_of(config, settings, text), train.MAY_CHANGE)


# ---- all runs


def lines_of(flags):
    """The lines of the table that are asked for, uniform sampling first. Raises ValueError."""
    names = METHODS if flags.method == "all" else flags.method.split(",")
    lines = [parse_method(name) for name in names]
    for line in lines:
        aioli.check(**dict(line.settings))
    if flags.prior:
        priors = PRIORS if flags.prior == "all" else flags.prior.split(",")
        for prior in priors:
            train.pick("prior", prior, aioli.METHODS)
        methods = [line for line in lines if line != STRATIFIED]
        after = [line._replace(kind="after", prior=prior) for line in methods for prior in priors]
        lines = [*map(throughout, priors), *after]
    return list(dict.fromkeys([STRATIFIED, *lines]))


def hear_first_requests(lines, corpora, config):
    """Let each method of the table begin on each data set, so that it complains before any trains.

    Raises ValueError.
    """
    for line in lines:
        for groups, corpus in corpora.items():
            sizes = [len(tokens) for tokens in corpus.train]
            history = aioli.History(corpus.groups, sizes, config.batch, warmup=config.warmup,
                                    window=model.PRESETS[config.preset].window,
                                    bytes_per_token=corpus.bytes_per_token("val"))
            try:
                alone = dataclasses.replace(config, method=line.method)
                next(train.program(alone, dict(line.settings), history))
            except ValueError as error:
                raise ValueError(f"{line.name} on {groups}: {error}") from None


def jobs_of(lines, groups, seed, controls=False):
    """The runs of one data set and seed, long ones first. All that start with a sweep share one."""
    plain = [line for line in lines if line.kind != "after"]
    after = [line for line in lines if line.kind == "after"]
    swept = [line for line in plain if (line.prior or line.method) in SWEPT]
    others = [line for line in plain if line not in swept]
    moving = [line for line in plain if line.kind == "method" and line.method not in STILL]
    averages = {line._replace(kind="average"): line for line in moving} if controls else {}

    needs = {line: swept[0] for line in swept[1:]} | averages
    needs |= {line: throughout(line.prior) for line in after}
    jobs = []
    for line in [*swept[:1], *others, *swept[1:], *after, *averages]:
        needed = needs.get(line)
        jobs.append(Job(line._replace(groups=groups, seed=seed),
                        needed and needed._replace(groups=groups, seed=seed)))
    return jobs


def longer_jobs(rows, lines, cells):
    """Uniform runs, in these cells, of as many steps as the methods of these lines took in all."""
    wanted = set()
    for entry, row in rows.items():
        times = times_in_all(row)
        if entry.kind == "method" and entry.line in lines and times > 1:
            wanted.add((entry.groups, entry.seed, times))
    return [Job(longer(times)._replace(groups=groups, seed=seed))
            for groups, seed, times in sorted(wanted) if (groups, seed) in cells]


def ready(todo, running):
    """The jobs that can begin, in their order: none waits for one of these."""
    unmade = {job.entry for job in (*todo, *running)}
    return [job for job in todo if job.needs not in unmade]


def run_all(setup, jobs, rows):
    """Make the runs that have no row yet, a few side by side, and add their rows, to the file, too.

    No more are begun than have a place, so that a job takes none while it waits for another.
    -> what failed, a line each; what needs a run that failed fails with it.
    """
    todo, running, failed = [job for job in jobs if job.entry not in rows], {}, {}
    count, began = len(todo), time.perf_counter()

    def work(job):
        if job.needs in failed:
            raise ValueError(failed[job.needs])
        return run_job(job, rows.get(job.needs), setup)

    with workers(setup.jobs) as pool:
        while todo or running:
            free = places(setup.jobs) - len(running)
            for job in ready(todo, running.values())[:free]:
                todo.remove(job)
                running[pool.submit(work, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    rows[job.entry] = future.result()
                except train.Stop:
                    raise
                except Exception as error:      # of this run; the others go on
                    failed[job.entry] = train.in_a_line(error)
                    continue
                write_csv(setup.folder / "compare.csv", rows)
                ended = count - len(todo) - len(running)
                tell(job.entry, rows[job.entry], ended, count, time.perf_counter() - began)
    return list(failed.values())


def tell(entry, row, ended, count, seconds):
    """A line for a run that has ended, the number `ended` of `count` after so many seconds."""
    minutes = seconds / 60
    print(f"{ended:>4}/{count}  {entry.label:<34}{entry.groups:<18} seed {entry.seed}  "
          f"perplexity {row['avg_test_ppl']:7.3f}  {minutes:5.1f} min, "
          f"about {minutes / ended * (count - ended):.0f} left", flush=True)


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpus():
    """CUDA_VISIBLE_DEVICES with one GPU alone, of each that may be used here in turn."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",")[:count]]


def places(jobs):
    """How many processes run side by side; jobs: as --jobs, 0: one a GPU, or a core."""
    return jobs or len(gpus()) or cores()


@contextmanager
def workers(jobs):
    """A pool of threads, each to wait for a process of its own, and with a GPU for it where there
    are any; jobs: as --jobs.

    Ctrl-C or a signal to end cancels what has not begun, lets what has keep its state, and raises
    Stop.
    """
    turns = itertools.cycle(gpus() or [{}])
    stopping.clear()

    def take_gpu():
        worker.environment = next(turns)

    with ThreadPoolExecutor(places(jobs), initializer=take_gpu) as pool:
        try:
            yield pool
        except BaseException as error:          # whatever it is, begin nothing more
            pool.shutdown(wait=False, cancel_futures=True)
            stopping.set()
            for process in list(CHILDREN):
                process.terminate()
            if isinstance(error, (KeyboardInterrupt, train.Stop)):
                said = "stopped; what is finished is kept, and the same command goes on"
                raise train.Stop(said) from None
            raise


def read_rows(path, config, texts, flag="--out"):
    """The rows of a compare.csv made with the shared flags of a train.Config from these texts.

    texts: {data set: digest}. flag: the one that names the file. Raises ValueError for rows of
    other flags or text. Rows of another machine are taken, and a line says so.
    """
    rows, digests = read_csv(path), dict(texts)
    for entry, row in rows.items():
        groups = entry.groups
        if row["flags"] != " ".join(shared_flags(config, entry.kind)):
            raise ValueError(f"{path} was made with the flags {row['flags'] or '(none)'}; take the "
                             f"same, or another {flag}")
        if not row["text"]:
            raise ValueError(f"{path} does not say from which text its rows of {groups} are; take "
                             f"another {flag}")
        if row["text"] != digests.setdefault(groups, row["text"]):
            raise ValueError(f"{path} was made from other text of {groups}; take another {flag}")

    here = machine(train.versions(config))
    for other in sorted({row["machine"] for row in rows.values()} - {here}):
        print(f"note: {path} has rows made with {other}, here it is {here}: what is paired across "
              "the two differs by more than its method")
    return rows


def forget_changed(rows, folder):
    """Take out the rows of methods whose code is not what it was, so that they are made again; a
    line says so. Their results stay, as result.json.old."""
    changed = [entry for entry, row in rows.items() if row["code"] not in ("", code_of(entry))]
    for label in dict.fromkeys(entry.label for entry in changed):
        print(f"note: {label} has changed since its runs; they are made again")
    for entry in changed:
        result = run_folder(folder, entry) / "result.json"
        if result.exists():
            result.replace(result.with_name("result.json.old"))
        del rows[entry]


def compare(flags, config):
    """Make what is missing of the comparison; print its tables, keep them, draw -> {Entry: row}.

    config: a train.Config with the shared flags and the cache. Raises ValueError.
    """
    lines, folder = lines_of(flags), flags.folder
    cells = [(groups, flags.seed + n) for n in range(flags.seeds) for groups in flags.sets]
    corpora = {groups: train.load_text(config, groups) for groups in flags.sets}
    texts = {groups: corpus.digest for groups, corpus in corpora.items()}
    methods = [line for line in lines if line.kind == "method"]
    hear_first_requests(methods, corpora, config)
    folder.mkdir(parents=True, exist_ok=True)
    setup = Setup(folder, config, texts, flags.jobs)

    with train.claimed(folder):
        rows, jobs = read_rows(folder / "compare.csv", config, texts), []
        forget_changed(rows, folder)
        for groups, seed in cells:
            jobs += jobs_of(lines, groups, seed, flags.controls)
        failed = run_all(setup, jobs, rows)
        if flags.controls:
            failed += run_all(setup, longer_jobs(rows, lines, cells), rows)

    tables = "\n\n".join(tabulate(rows))
    train.write(folder / "compare.md", tables + "\n")
    print(f"\n{tables}\n\nwritten to {folder}")
    draw(rows, folder)
    if failed:
        raise ValueError(f"{len(failed)} runs failed, the others are kept; the first: {failed[0]}")
    return rows


def parse_flags(argv, kind, program, about, hidden=()):
    """Command line -> `kind`, a dataclass of flags, and a train.Config with those of all runs.

    program: its module; about: text for --help; hidden: flags of runs that it does not take. Raises
    ValueError.
    """
    parser = train.Parser(prog=f"python -m {program}", description=about, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    own = {field.name: field.default for field in dataclasses.fields(kind)}
    shared = {field.name: field.default for field in dataclasses.fields(train.Config)
              if field.name not in (*NOT_SHARED, *hidden)}
    train.add_flags(parser.add_argument_group(program), own, train.help_of(kind))
    train.add_flags(parser.add_argument_group("its runs"), shared, train.help_of(train.Config))

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        train.pick(f"flag of {program}", word, sorted(parser._option_string_actions))
    given = vars(given)
    config = train.Config(**{name: given[name] for name in shared}, cache=given["cache"])
    return kind(**{name: given[name] for name in own}), config


def parse(argv):
    """Command line -> Flags, train.Config. Raises ValueError."""
    flags, config = parse_flags(argv, Flags, "paper.compare", __doc__)
    for name in ONLY_AFTER:
        if not flags.prior and getattr(config, name) != getattr(train.Config, name):
            raise ValueError(f"{train.flag(name)} changes nothing without --prior; leave it out")
    return flags, config


def main(argv=None):
    """Exit code, as that of train.py."""
    argv = sys.argv[1:] if argv is None else argv
    return train.exit_code("paper.compare", lambda: compare(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
