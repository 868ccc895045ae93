"""Train a language model on several groups of text while a method from aioli.py chooses the mixture.

    python train.py --method aioli                          # embedded text, laptop model, CPU or GPU
    python train.py --method stratified --groups python+csv --seed 1
    python train.py --method doge --help                    # every setting, that method's own included

A method yields requests (aioli.py); the only training loop answers them here. How to read it: `Config`, then
`Trainer` (one step, `apply`, one `validate`, and an answer per kind of request), `drive` (the loop), `train` (a run).
The second half of the file compares methods, draws, and holds their A against the true one; training needs none of it.
"""
import argparse
import copy
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import aioli
import data
import model

SCHEDULES = dict(cosine=lambda t: (1 + math.cos(math.pi * t)) / 2,            # t: share of the steps after the warm-up
                 constant=lambda t: min(1, 5 * (1 - t)))

@dataclass(frozen=True)
class Config:
    """One run. Every field is a command-line flag; the text after # is its help."""
    # what
    method: str = "aioli"         # how the mixture is chosen: a name in aioli.METHODS
    groups: str = "all"           # groups of text, joined by + or comma; all; or sets: with a comparison, all data sets
    data: str = ""                # folder of your own text, one group per sub-folder or file; default: embedded text
    encoding: str = "bpe1024"     # bpeN learns N byte pairs from the text; or a name tiktoken knows (gpt2)
    seed: int = 0                 # initial weights, order of windows, probe order
    out: str = ""                 # folder for history.jsonl and result.json; default: out/METHOD-GROUPS-sSEED
    cache: str = ".cache"         # folder for token files
    resume: bool = False          # go on from the checkpoint in OUT
    runs: tuple = ()              # grid, dml, power: MIXTURES.csv LOSSES.csv of finished runs, instead of a sweep
    holdout: tuple = ()           # with --runs and --steps 0: two more such files, to test the law on
    # comparison: several methods (--method a,b,c or all), or --seeds, or --quick
    seeds: int = 0                # run each method with this many seeds, from --seed on, in pairs, and tabulate
    quick: bool = False           # a first look: one seed, two data sets
    controls: bool = False        # with a comparison: the controls of equal compute and of equal average mixture, too
    jobs: int = 0                 # with a comparison or --fidelity: processes side by side; 0: as many as there are cores
    fidelity: bool = False        # hold every method's A against the true one, measured with forks of a uniform run
    fork: int = 50                # with --fidelity: steps of a fork
    table: str = "out/compare/compare.json"    # with --fidelity: the comparison that gives sweeps and improvements
    past: str = ""                # history.jsonl of a run with the same seed: take its scratch runs instead of repeating
    # composition
    prior: str = ""               # learn a mixture with this method on half-length runs, start from it; or (one run) a mixture
    first: float = 0.5            # with --prior: share of the main run trained on its mixture
    restart: str = "uniform"      # with --prior: where the method then starts, uniform (as the paper) or prior
    # model and optimiser
    preset: str = "laptop"        # shape of the model: a name in model.PRESETS
    steps: int = 1000             # optimiser steps of the main run, probes included
    batch: int = 8                # windows per step; small steps win at equal tokens on a laptop
    lr: float = 8e-3              # peak learning rate; the best of .004 to .012 on the laptop model
    warmup: float = 0.1           # share of the steps with rising rate
    schedule: str = "cosine"      # of the rate after the warm-up: cosine; or constant, which falls in the last fifth only
    final_lr: float = 0.1         # rate at the end, as a share of the peak
    weight_decay: float = 0.1     # AdamW's, on matrices only
    beta2: float = 0.98           # AdamW's; short runs want a shorter memory than .999
    clip: float = 1.0             # largest gradient norm
    # measuring
    val_windows: int = 16         # fixed validation windows per group: the noise is in training, not in these
    test_windows: int = 384       # fixed test windows per group, used once, after training
    eval_every: int = 100         # steps between the points of the loss curve; changes nothing in training
    # machine
    device: str = "auto"          # auto, cpu, cuda
    threads: int = 1              # CPU threads; 0: torch's choice
    compile: bool = False         # torch.compile the model

    def __post_init__(self):
        pick("preset", self.preset, model.PRESETS)
        pick("schedule", self.schedule, SCHEDULES)
        if min(self.batch, self.val_windows, self.test_windows, self.eval_every, self.steps or bool(self.runs)) < 1:
            raise ValueError("--steps, --batch, --val-windows, --test-windows and --eval-every must be at least 1")
        if min(self.seed, self.seeds, self.threads, self.jobs) < 0 or not 0 <= self.warmup < 1:
            raise ValueError("--seed, --seeds, --threads and --jobs must be at least 0, and --warmup at least 0 and below 1")

class Stop(Exception):
    """Ctrl-C, taken at the next moment at which the state is whole."""

def device(name):
    """torch.device, after trying it out. Raises ValueError if this torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: this torch cannot use it; try auto or cpu") from None

@contextmanager
def no_denormals():
    """Tiny gradients must not slow a CPU down; what comes after keeps IEEE arithmetic."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)

class Run:
    """One model in training: "main", or a scratch run that a method asked for."""

    def __init__(self, config, trainer, of):
        torch_seed = torch.Generator().manual_seed(config.seed)               # equal seeds: equal initial weights
        self.model = model.Transformer(trainer.shape, torch_seed).to(trainer.device)
        self.sampler = data.Sampler(trainer.corpus.train, trainer.corpus.groups, trainer.shape.window, config.batch,
                                    config.seed)
        matrices = [w for w in self.model.parameters() if w.dim() == 2]
        vectors = [w for w in self.model.parameters() if w.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)],
            lr=config.lr, betas=(0.9, config.beta2), fused=True)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.step, self.of = 0, of

    def state(self):
        return dict(model=self.model.state_dict(), optimizer=self.optimizer and self.optimizer.state_dict(),
                    sampler=self.sampler.state_dict(), step=self.step, of=self.of)

    def load(self, state):
        """Go to a saved state, which stays as it is and can be loaded again."""
        state = copy.deepcopy(state)                                          # an optimizer would go on in its very tensors
        self.model.load_state_dict(state["model"])
        if state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer = None
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]

class Trainer:
    """Answers a method's requests. Owns the runs, the fixed validation and test windows, and the clock."""

    def __init__(self, config, corpus):
        torch.set_num_threads(config.threads or torch.get_num_threads())
        self.config, self.corpus, self.m = config, corpus, len(corpus.groups)
        self.device = device(config.device)
        self.cast = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        preset = model.PRESETS[config.preset]
        self.shape = dataclasses.replace(preset, vocab=max(preset.vocab, corpus.vocab))
        self.val = self.fixed(corpus.val, config.val_windows, seed=1)
        self.test = self.fixed(corpus.test, config.test_windows, seed=2)
        self.targets = np.random.default_rng([config.seed, 2])                # which validation windows DoGE aims at
        self.runs, self.peeked, self.flat, self.done, self.curve = {}, {}, None, None, []
        self.stopping, self.eval_seconds, self.on_step = False, 0.0, lambda *_: None

    def fixed(self, tokens, count, seed):
        """The same windows of every group on every call: x, y (m * count, T) and the group of each (m * count,)."""
        parts = [data.fixed_windows(t, self.shape.window, count, seed, g) for t, g in zip(tokens, self.corpus.groups)]
        x, y = (torch.from_numpy(np.concatenate(side)).to(self.device) for side in zip(*parts))
        return x, y, np.repeat(np.arange(self.m), [len(part[0]) for part in parts])

    def run(self, name, of=0):
        if name not in self.runs:
            self.runs[name] = Run(self.config, self, self.config.steps if name == "main" else of)
        return self.runs[name]

    def lr(self, run):
        """Linear warm-up, then by --schedule to final_lr * lr at the run's full length."""
        c, t = self.config, (run.step + 1) / max(run.of, 1)
        if t < c.warmup:
            return c.lr * t / c.warmup
        left = SCHEDULES[c.schedule](min((t - c.warmup) / (1 - c.warmup), 1))
        return c.lr * (c.final_lr + (1 - c.final_lr) * left)

    def batch(self, run):
        x, y, group = run.sampler.batch()
        x, y = (torch.from_numpy(a).to(self.device) for a in (x, y))
        return x, y, group                                                    # (B, T), (B, T), (B,)

    def apply(self, run):
        """One optimiser step on the gradients in place."""
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), self.config.clip)
        for part in run.optimizer.param_groups:
            part["lr"] = self.lr(run)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1

    @torch.no_grad()
    def validate(self, run, windows=None):
        """Mean loss of each group on fixed windows, (m,) nats per token. Changes nothing."""
        began, (x, y, group) = time.perf_counter(), windows or self.val
        rows = max(1, (4096 if self.device.type == "cpu" else 8192) // self.shape.window)     # fits a cache; a small GPU
        with self.cast:
            loss = torch.cat([run.model(a, b) for a, b in zip(x.split(rows), y.split(rows))])
        mean = np.bincount(group, loss.cpu().numpy()) / np.bincount(group)
        self.eval_seconds += time.perf_counter() - began
        return mean

    def train(self, request):
        """Answer a Train request -> reply and what the row should say. Taken up again at step `done` on resume."""
        run, c = self.run(request.on, request.of or request.steps), self.config
        if self.done is None:
            run.sampler.plan(request.p, request.steps)
            self.done = 0
        while self.done < request.steps:
            if self.stopping:
                raise Stop
            x, y, _ = self.batch(run)
            with self.cast:
                loss = run.forward(x, y).mean()
            loss.backward()
            self.apply(run)
            self.done += 1
            if request.on == "main" and run.step % c.eval_every == 0 and self.done < request.steps:
                self.curve.append([run.step, self.validate(run).tolist()])
            self.on_step(request, run, loss)
        if run.step == run.of and request.on != "main":
            run.optimizer = None                                              # a finished scratch run only validates
        lr, self.done = self.lr(run), None
        return dict(loss=self.validate(run), windows=run.sampler.counts, lr=lr)

    def peek(self, request):
        """Answer a Peek request: draw a batch, leave its losses (or gradients) for the Update that follows."""
        run = self.run(request.on, request.of)
        if self.stopping:
            raise Stop
        counts = run.sampler.plan(request.p, 1)
        x, y, group = self.batch(run)
        if request.against:
            with self.cast:
                loss = run.forward(x, y, per_token=True)                      # (B, T)
                with torch.no_grad():
                    excess = (loss - self.run(request.against).model(x, y, per_token=True)).clamp(min=0).mean(1)
            self.peeked[request.on] = [loss[group == j].mean() if counts[j] else None for j in range(self.m)]
            signals = dict(excess=np.bincount(group, excess.cpu().numpy(), self.m) / np.where(counts, counts, np.nan))
        else:
            val_x, val_y, of_group = self.val
            own = [np.flatnonzero(group == j) for j in range(self.m)]
            aim = [self.targets.choice(np.flatnonzero(of_group == i), max(1, len(x) // self.m)) for i in range(self.m)]
            if self.flat is None:                                             # kept: 2 m new ones a step would tear memory to pieces
                self.flat = torch.empty(2, self.m, sum(w.numel() for w in run.model.parameters()), device=self.device)
            G, V = self.flat                                                  # (m, parameters) each
            for rows, out in zip(own, G):
                self.gradient(run, x[rows], y[rows], out) if len(rows) else out.fill_(math.nan)
            for rows, out in zip(aim, V):
                self.gradient(run, val_x[rows], val_y[rows], out)
            self.peeked[request.on] = [g if len(rows) else None for rows, g in zip(own, G)]
            signals = dict(A=(V @ G.T).cpu().double().numpy(), norm=G.norm(dim=1).cpu().double().numpy(),
                           target_norm=float(V.mean(0).norm()))
        return dict(signals=signals, windows=counts, lr=self.lr(run))

    def gradient(self, run, x, y, out):
        """Gradient of the mean loss of these windows, flat, into out: (parameters,)."""
        with self.cast:
            loss = run.forward(x, y).mean()
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(run.model.parameters()))], out=out)

    def update(self, request):
        """Answer an Update request: a step on sum_j w_j (loss of group j), from what Peek left."""
        run, parts = self.runs[request.on], self.peeked.pop(request.on)
        total = sum(float(w) * part for w, part in zip(request.w, parts) if part is not None)
        if total.dim() == 0:                                                  # a loss
            total.backward()
        else:                                                                 # already a gradient
            for weight, grad in zip(run.model.parameters(), total.split([w.numel() for w in run.model.parameters()])):
                weight.grad = grad.view_as(weight)
        self.apply(run)
        self.on_step(request, run, None)
        return {}

    def answer(self, request):
        return {aioli.Train: self.train, aioli.Peek: self.peek, aioli.Update: self.update}[type(request)](request)

    def state(self):
        return dict(runs={name: run.state() for name, run in self.runs.items()}, done=self.done, curve=self.curve,
                    eval_seconds=self.eval_seconds, targets=json.dumps(self.targets.bit_generator.state))

    def load(self, state):
        for name, saved in state["runs"].items():
            self.run(name, saved["of"]).load(saved)
        self.done, self.curve, self.eval_seconds = state["done"], state["curve"], state["eval_seconds"]
        self.targets.bit_generator.state = json.loads(state["targets"])

# ---------------------------------------------------------------------------------------------------------------------
# The loop, and what it leaves on disk.

def plain(value):
    """numpy as what JSON can hold, for json.dumps(default=plain)."""
    return value.tolist()

def history_lines(history):
    """Steps taken by each run, and the text of history.jsonl: a line per row, `at` its run's step count after it."""
    at, lines = {}, []
    for row in history.rows:
        r = row.request
        at[r.on] = at.get(r.on, 0) + getattr(r, "steps", isinstance(r, aioli.Update))
        said = dict(verb=type(r).__name__, **r._asdict(), at=at[r.on], **row._asdict())
        lines.append(json.dumps({k: v for k, v in said.items() if k != "request" and v is not None}, default=plain) + "\n")
    return at, "".join(lines)

def from_line(line):
    """The Row that a line of history.jsonl tells of."""
    seen = json.loads(line)
    kind = getattr(aioli, seen["verb"])
    asked = kind(**{f: np.array(seen[f]) if f in ("p", "w", "A") else seen[f] for f in kind._fields if f in seen})
    reply = seen.get("reply")
    reply = {k: np.array(v) for k, v in reply.items()} if isinstance(reply, dict) else np.array(reply)
    return aioli.Row(asked, reply, np.array(seen["share"]), np.array(seen["windows"]), seen["lr"], seen["seconds"])

def drive(method, trainer, history, past=(), known=(), on_row=lambda row: None):
    """The one loop: ask the method, let the trainer answer, record, tell the method -> what the method returns.

    past: rows of an interrupted run; they are replayed to the method instead of trained again, and must be what it
    asks for. known: scratch runs of another method, replayed in order as far as this one asks for the same. Raises
    ValueError if past rows are not what is asked (the settings changed), Stop on Ctrl-C.
    """
    past, known, reply = list(past), list(known), None

    def same(row):
        return type(row.request) is type(request) and row.request.on == request.on \
            and np.allclose(row.request[0], request[0], atol=1e-9) and row.request[1:2] == request[1:2]
    while True:
        try:
            request = method.send(reply)
        except StopIteration as end:
            return end.value
        if past:
            if not same(past[0]):
                raise ValueError("the checkpoint belongs to a run with other settings; use another --out")
            history.rows.append(past.pop(0))
        elif known and same(known[0]):
            history.rows.append(known.pop(0))
        else:
            began = time.perf_counter()
            measured = trainer.answer(request)
            history.add(request, seconds=round(time.perf_counter() - began, 4), **measured)
            on_row(history.last)
        reply = history.reply

def write(path, content):
    """Text, or a state for torch to load; the file is whole or not there."""
    part = path.with_name(path.name + ".part")
    part.write_text(content, "utf-8") if isinstance(content, str) else torch.save(content, part)
    part.replace(path)

class Progress:
    """One line that updates while training, and one per new mixture; nothing when the output is not a terminal."""

    def __init__(self, config, groups, window):
        self.c, self.groups, self.window, self.shown = config, groups, window, None
        self.live, self.began, self.next, self.tokens = sys.stdout.isatty(), time.perf_counter(), 0.0, 0

    def mixture(self, p):
        return "  ".join(f"{g[:14]} {share:.2f}".replace(" 0.", " .") for g, share in zip(self.groups, p))

    def step(self, request, run, loss):
        self.tokens += self.c.batch * self.window
        self.where, now = f"{request.on} {run.step}/{run.of}", time.perf_counter()
        if not self.live or now < self.next:
            return
        self.next, spent = now + 0.2, now - self.began
        left = (run.of - run.step) * spent / (self.tokens / self.c.batch / self.window)
        loss = "" if loss is None else f"loss {loss.item():.3f}  "
        line = (f"{self.where} {run.step / run.of:4.0%}  {loss}{self.tokens / spent / 1000:.1f}k tok/s  "
                f"{left // 60:.0f}:{left % 60:02.0f} left  {self.mixture(request[0])}")
        print(f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)     # a second line would stay

    def row(self, row):
        r = row.request
        if not isinstance(r, aioli.Train) or not r.steps or r.probe:
            return
        if self.live and self.shown is not None and np.abs(r.p - self.shown).max() > .005:
            print(f"\r{self.where}  mixture now {self.mixture(r.p)}  mean validation loss {row.reply.mean():.4f}\033[K")
        self.shown = r.p

def summarise(config, settings, trainer, history, wall):
    """The result of a finished run, as saved in result.json."""
    groups, main, began = trainer.corpus.groups, trainer.run("main"), time.perf_counter()
    rows = [row for row in history.trained() if row.request.steps]
    at = np.cumsum([0] + [row.request.steps for row in rows])
    test = trainer.validate(main, trainer.test)
    wall += time.perf_counter() - began
    windows = history.windows()[-1]
    steps, _ = history_lines(history)
    window = config.batch * trainer.shape.window
    tokens = sum(steps.values()) * window
    named = lambda values: dict(zip(groups, (float(v) for v in values)))
    mixtures = [[int(t), named(row.request.p)] for t, row in zip(at, rows) if not row.request.probe] \
        or [[0, named(history.trained()[0].request.p)]]                       # every step was a probe
    return dict(
        method=config.method, groups=groups, text=trainer.corpus.text, seed=config.seed, preset=config.preset,
        steps=steps["main"], tokens=steps["main"] * window, params=sum(w.numel() for w in main.model.parameters()),
        extra_steps=sum(steps.values()) - steps["main"], probe_steps=sum(r.request.steps for r in rows if r.request.probe),
        wall_seconds=round(wall, 2), eval_seconds=round(trainer.eval_seconds, 2),
        tokens_per_second=round(tokens / max(wall - trainer.eval_seconds, 1e-9)),
        test_loss=named(test), test_ppl=named(np.exp(test)), avg_test_loss=float(test.mean()),
        avg_test_ppl=float(np.exp(test).mean()), val_loss=named(rows[-1].reply), final_mixture=mixtures[-1][1],
        realised_mixture=named(windows / windows.sum()), epochs=named(main.sampler.epochs), mixtures=mixtures,
        curve=trainer.curve, settings=settings, config=dataclasses.asdict(config),
        versions=versions(config))

def versions(config):
    """What decides the last digits of a run."""
    return dict(device=str(device(config.device)), python=platform.python_version(), torch=torch.__version__,
                numpy=np.__version__, machine=platform.machine(), kernels=torch.backends.cpu.get_cpu_capability())

def report(result):
    """The closing table."""
    print(f"\n{'group':<12}{'mixture':>9}{'realised':>10}{'epochs':>8}{'val loss':>10}{'test loss':>11}{'test ppl':>10}")
    for g in result["groups"]:
        print(f"{g:<12}{result['final_mixture'][g]:>9.3f}{result['realised_mixture'][g]:>10.3f}{result['epochs'][g]:>8.2f}"
              f"{result['val_loss'][g]:>10.3f}{result['test_loss'][g]:>11.3f}{result['test_ppl'][g]:>10.2f}")
    print(f"average test perplexity {result['avg_test_ppl']:.3f}   average test loss {result['avg_test_loss']:.4f}   "
          f"{result['wall_seconds']:.0f} s   {result['tokens_per_second'] / 1000:.1f}k tok/s   "
          f"{result['extra_steps']} extra steps")

def pyplot():
    """matplotlib's pyplot, drawing to files, or None after a line that says how to get it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return plt
    except ImportError:
        print("for pictures: pip install matplotlib")

def save(plt, figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")     # Okabe and Ito: safe for all eyes

def picture(result, history, path):
    """run.png: the mixture over steps and the validation losses. Needs matplotlib."""
    if (plt := pyplot()) is None:
        return
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    rows = history.trained()
    at = np.cumsum([row.request.steps for row in rows])
    points = sorted([[int(t), row.reply.tolist()] for t, row in zip(at, rows)] + result["curve"])
    for j, g in enumerate(result["groups"]):
        t, p = zip(*[(t, mix[g]) for t, mix in result["mixtures"]] + [(result["steps"], result["final_mixture"][g])])
        top.step(t, p, where="post", label=g, color=COLOURS[j % 7])
        bottom.plot([t for t, _ in points], [L[j] for _, L in points], label=g, color=COLOURS[j % 7])
    top.set(ylabel="mixture (share of windows)", ylim=(0, None), title=f"{result['method']}, seed {result['seed']}")
    bottom.set(xlabel="step", ylabel="validation loss (nats per token)")
    top.legend(ncols=4, fontsize="small", frameon=False)
    save(plt, figure, path)

def pick(what, name, options):
    """options[name], or an error that names the nearest."""
    if name in options:
        return options[name]
    near = difflib.get_close_matches(name, options, 1, 0)
    raise ValueError(f"unknown {what} {name!r}; did you mean {near[0]!r}? (python train.py --help lists them)")

LAWS = dict(dml=aioli.fit_log_linear, power=aioli.fit_power_law)

def plain_names(names):
    """Names without what all of them begin or end with, up to a separator (train_the_pile_, _val_loss)."""
    front = re.match(r".*[_/ ]|", os.path.commonprefix(names))[0]
    back = re.match(r".*[_/ ]|", os.path.commonprefix([n[::-1] for n in names]))[0]
    return [n[len(front):len(n) - len(back)] for n in names]

def read_runs(files):
    """MIXTURES.csv, LOSSES.csv -> group names, mixtures (R, m) that sum to 1, loss names, losses (R, n), in the same order.

    Both have a header, and a first column that numbers the runs. Groups match by their plain_names. Raises ValueError.
    """
    tables = []
    for path in files:
        try:
            head, *rows = [line.split(",") for line in Path(path).read_text().split("\n") if line.strip()]
            table = {row[0]: [float(v) for v in row[1:]] for row in rows}
        except ValueError:
            raise ValueError(f"{path} is not a table of numbers under a header of names") from None
        tables.append((plain_names([name.strip() for name in head[1:]]), table))
    (groups, P), (targets, L) = tables
    if P.keys() != L.keys():
        raise ValueError(f"{files[0]} and {files[1]} do not list the same runs in their first columns")
    P, L = aioli.check_runs(list(P.values()), [L[key] for key in P], 1)
    return groups, P, targets, L

def laws(config, settings):
    """--runs with --steps 0: fit the method's law to finished runs, print how good it is and what it proposes."""
    groups, P, targets, L = read_runs(config.runs)
    began = time.perf_counter()
    law = pick("method with a law", config.method, LAWS)(P, L)
    print(f"{config.method}: law of {len(groups)} shares for {len(targets)} losses, fitted to {len(P)} runs in "
          f"{time.perf_counter() - began:.1f} s")
    columns = [aioli.quality(law, P, L)]
    if config.holdout:
        others, Q, same, M = read_runs(config.holdout)
        if (others, same) != (groups, targets):
            raise ValueError("--holdout has other groups than --runs")
        columns.append(aioli.quality(law, Q, M))
    head = f"{'R^2':>9}{'MSE':>10}{'Spearman':>10}"
    print(f"{'':<20}{'fit':>29}" + (f"{'held out':>32}" if config.holdout else ""))
    print(f"{'loss':<20}" + "   ".join([head] * len(columns)))
    for i, name in [*enumerate(targets), (None, "mean")]:
        cells = [[v.mean() if i is None else v[i] for v in column] for column in columns]
        print(f"{name:<20}" + "   ".join(f"{r2:>9.4f}{mse:>10.5f}{100 * rho:>10.2f}" for r2, mse, rho in cells))
    history = aioli.History(groups, np.ones(len(groups)), 1, config.seed, (P, L))
    p = next(aioli.METHODS[config.method](history, 0, **settings)).p
    print("proposed mixture: " + "  ".join(f"{g} {share:.3f}" for g, share in sorted(zip(groups, p), key=lambda x: -x[1])))

def program(config, settings, history):
    """The generator that config asks for: a method, alone or on top of a prior."""
    method = functools.partial(pick("method", config.method, aioli.METHODS), **settings)
    if not config.prior:
        return method(history, config.steps)
    if config.restart == "prior" and "start" not in inspect.signature(method).parameters:
        raise ValueError(f"--restart prior: {config.method} always starts from uniform; use --restart uniform or aioli")
    mixture = functools.partial(aioli.fixed, mixture=config.prior)
    prior = mixture if "+" in config.prior else pick("prior", config.prior, aioli.METHODS)
    return aioli.with_prior(history, config.steps, method, prior, config.first, config.restart)

def train(config, settings, corpus=None):
    """One run from text to result.json -> the result. Raises ValueError for bad input, Stop on Ctrl-C."""
    if config.runs and config.steps == 0:
        return laws(config, settings)
    corpus = corpus or data.load(config.groups, config.data or None, config.encoding, config.cache)
    out = Path(config.out or f"out/{config.method}-{'+'.join(corpus.groups)}-s{config.seed}")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise OSError(f"cannot write to {out}; choose another --out")
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not config.resume:
        raise ValueError(f"{checkpoint} is of a run that was stopped; go on with --resume, delete it, or use another --out")
    trainer = Trainer(config, corpus)
    runs, mine = None, plain_names(corpus.groups)
    if config.runs:
        groups, P, targets, L = read_runs(config.runs)
        if set(groups) != set(mine):
            raise ValueError(f"{config.runs[0]} has the groups {', '.join(groups)}; the text has {', '.join(corpus.groups)}")
        runs = P[:, [groups.index(g) for g in mine]], L
    history = aioli.History(corpus.groups, [len(t) for t in corpus.train], config.batch, config.seed, runs)
    method, past, wall = program(config, settings, history), [], 0.0
    flags = dataclasses.asdict(config) | settings | dict(text=corpus.text)
    known = scratch_runs(config, corpus.text) if config.past else []
    if config.resume:
        if not checkpoint.exists():
            raise ValueError(f"nothing to resume: there is no {checkpoint}")
        saved = torch.load(checkpoint, map_location=trainer.device, weights_only=True)
        if told := difference(saved.get("flags", {}), flags, MAY_CHANGE):
            raise ValueError(f"{checkpoint} is of a run with {told}; delete it, or use another --out")
        trainer.load(saved["trainer"])
        past, wall = [from_line(line) for line in saved["history"].splitlines()], saved["wall"]
    progress = Progress(config, corpus.groups, trainer.shape.window)
    trainer.on_step, began = progress.step, time.perf_counter()
    print(f"{config.method} on {'+'.join(corpus.groups)}: {config.steps} steps of {config.batch} x {trainer.shape.window} "
          f"tokens, {config.preset} model, {trainer.device}, seed {config.seed}", flush=True)

    def spent():                                                              # what was taken over from other runs cost, too
        return wall + time.perf_counter() - began + sum(row.seconds for row in known if any(row is r for r in history.rows))

    before = signal.signal(signal.SIGINT, lambda *_: setattr(trainer, "stopping", True))
    try:
        with no_denormals():
            drive(method, trainer, history, past, known, progress.row)
        result = summarise(config, settings, trainer, history, spent())
        write(out / "history.jsonl", history_lines(history)[1])
        write(out / "result.json", json.dumps(result, indent=1))
        checkpoint.unlink(missing_ok=True)
    except Stop:
        write(checkpoint, dict(trainer=trainer.state(), history=history_lines(history)[1], wall=spent(), flags=flags))
        raise Stop(f"stopped; go on with the same command and --resume (state in {checkpoint})") from None
    finally:
        signal.signal(signal.SIGINT, before)
    report(result)
    picture(result, history, out / "run.png")
    print(f"written to {out}")
    return result

# ---------------------------------------------------------------------------------------------------------------------
# The comparison: every method on every data set with every seed, each run a process of its own, differences in pairs.

ROWS = ("stratified", "grid", "dml", "power", "skillit", "doremi", "doge", "aioli", "horizon",
        "grid:perplexity", "power:perplexity", "aioli:perplexity", "horizon:perplexity")
QUICK = ("python+csv", "python+prose")
NOT_SHARED = ("method", "groups", "seed", "out", "resume", "runs", "holdout", "seeds", "quick", "controls", "jobs", "past",
              "fidelity", "fork", "table", "prior", "cache")
PRIORS = ("grid", "dml", "power", "skillit", "doremi", "doge")

MAY_CHANGE = ("out", "cache", "past", "resume", "jobs", "threads", "device", "compile")    # from one part of a run to the next

def difference(theirs, mine, free):
    """The first flag, not in `free`, in which two runs differ, as "--lr 0.004, not 0.008"; or "other text"; or ""."""
    theirs, mine = json.loads(json.dumps([theirs, mine]))                     # tuples are lists there
    return next((f"--{name.replace('_', '-')} {theirs.get(name)}, not {value}" if name != "text" else "other text"
                 for name, value in mine.items() if name not in free and theirs.get(name) != value), "")

def scratch_runs(config, text):
    """The scratch rows of --past, a history.jsonl whose run had this run's seed, text and model. Raises ValueError."""
    try:
        theirs = json.loads(Path(config.past).with_name("result.json").read_text())
        theirs = theirs["config"] | dict(text=theirs["text"])
        rows = [from_line(line) for line in Path(config.past).read_text().splitlines()]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"--past {config.past} is not the history of a finished run ({error})") from None
    if told := difference(theirs, dataclasses.asdict(config) | dict(text=text), set(NOT_SHARED) - {"groups", "seed"}):
        raise ValueError(f"--past {config.past} is of a run with {told}; its runs are not this run's")
    asked = [name for row in rows for name in (row.request.on, getattr(row.request, "against", ""))]
    return [row for row in rows if isinstance(row.request, aioli.Train) and row.request.on != "main"
            and asked.count(row.request.on) == 1]                             # a model that others go on with has to be there

def base(name):
    """The row that a control or a restricted row builds on; "" for others."""
    method, after, prior = name.partition(" after ")
    return f"half {prior}" if after else name.removeprefix("average of ") if name.startswith("average of ") else ""

class Job(NamedTuple):
    """One run of the comparison. `name` is its row in the table: METHOD, METHOD:OBJECTIVE or METHOD:SETTING=VALUE:...,
    alone or "after PRIOR"; "half PRIOR", that prior's mixture for the whole run; or a control, "average of METHOD" or
    "stratified xK"."""
    name: str
    groups: str
    seed: int
    flags: tuple                  # what it has beside the flags that all runs share
    needs: str = ""               # the job, of the same data set and seed, that has to be finished first

def as_flags(values):
    """{name: value} as a command line."""
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    return [part for flag, value in flags for part in ([flag] if value is True else [flag, str(value)])]

def method_flags(config, settings, name):
    """The flags of a row, the same for all data; of the method's own flags only those of --method alone count."""
    if name.startswith("half "):
        return "--method", "fixed", "--prior", name.removeprefix("half "), "--first", "1", "--restart", "uniform"
    row = name.partition(" after ")[0]
    method, *given = row.split(":")
    parameters, changed = inspect.signature(pick("method", method, aioli.METHODS)).parameters, {}
    for part in given:
        key, value = part.split("=", 1) if "=" in part else ("objective", part)
        if key not in list(parameters)[2:]:
            raise ValueError(f"{name}: {method} has no {key} to choose, but {', '.join(list(parameters)[2:]) or 'no settings'}")
        changed[key] = value
    own = {key: value for key, value in settings.items() if row == config.method and value != parameters[key].default}
    return ("--method", method, *as_flags(own | changed))

def shared_flags(config):
    """The flags that all runs of a comparison get, where they are not the default."""
    return as_flags({f.name: getattr(config, f.name) for f in dataclasses.fields(config)
                     if f.name not in NOT_SHARED and getattr(config, f.name) != f.default})

def jobs_of(flags, groups, seed, controls):
    """The runs of one data set and seed, dear ones first; flags: {name: its flags}. All that start with a sweep share one."""
    after = {name: base(name) for name in flags if " after " in name}
    plain = [name for name in flags if name not in after]
    swept = [name for name in plain if name.removeprefix("half ").split(":")[0] in ("grid", "dml", "power")]
    order = swept[:1] + [name for name in plain if name not in swept] + swept[1:] + list(after)
    needs = dict.fromkeys(swept[1:], swept[0] if swept else "") | after
    jobs = [Job(name, groups, seed, flags[name], needs.get(name, "")) for name in order]
    moving = [name for name in plain if name.split(":")[0] in ("skillit", "aioli", "horizon")] if controls else []
    return jobs + [Job(f"average of {name}", groups, seed, ("--method", "fixed"), name) for name in moving]

def separately(name, flags, **output):
    """train.py in a process of its own. Raises Stop after Ctrl-C, ValueError with what it said last if it failed."""
    ended = subprocess.run([sys.executable, __file__, *flags], stderr=subprocess.PIPE, text=True, **output)
    if ended.returncode == 130:
        raise Stop
    if ended.returncode:
        raise ValueError(f"{name}: {(ended.stderr.strip() or f'exit code {ended.returncode}').splitlines()[-1]}")

def run_job(config, job, rows, folder):
    """Run one job in a process of its own, unless its result is there already -> its row."""
    home = lambda name: folder / job.groups / f"{re.sub('[ :=]', '-', name)}-s{job.seed}"
    out, past = home(job.name), home(job.needs) / "history.jsonl"
    flags = ["--groups", job.groups, "--seed", str(job.seed), "--out", str(out), "--cache", config.cache,
             *shared_flags(config), *job.flags]
    first, joined = rows.get((job.needs, job.groups, job.seed)), lambda mixture: "+".join(map(str, mixture.values()))
    if job.name.startswith("average of "):
        flags += ["--mixture", joined(first["realised_mixture"])]
    elif " after " in job.name:
        flags += ["--prior", joined(first["mixtures"][0][1])]                 # learnt already, and paid for below
    elif job.needs and past.exists():
        flags += ["--past", str(past)]
    finished, (asked, settings) = out / "result.json", parse(flags)
    had = json.loads(finished.read_text()) if finished.exists() else dict(config={}, settings={})
    text = data.load(job.groups, config.data or None, config.encoding, config.cache).text
    if difference(had["config"] | had["settings"] | dict(text=had.get("text")),
                  dataclasses.asdict(asked) | settings | dict(text=text), MAY_CHANGE):
        flags += ["--resume"] if (out / "checkpoint.pt").exists() else []
        separately(f"{job.name} on {job.groups}, seed {job.seed}", flags, stdout=subprocess.DEVNULL)
    result = json.loads(finished.read_text())
    keep = ("steps", "extra_steps", "wall_seconds", "avg_test_ppl", "avg_test_loss", "test_loss", "realised_mixture",
            "mixtures", "settings", "text")
    row = dict(name=job.name, groups=job.groups, seed=job.seed, **{key: result[key] for key in keep})
    if " after " in job.name:
        learnt = first["extra_steps"] / (first["extra_steps"] + first["steps"])            # the rest was the half row's own
        row["extra_steps"] += first["extra_steps"]
        row["wall_seconds"] += learnt * first["wall_seconds"]
    if job.name == "grid":                                                    # the landscape: mixtures and losses
        told = [from_line(line) for line in (out / "history.jsonl").read_text().splitlines()]
        row["sweep"] = [[r.request.p.tolist(), r.reply.tolist()] for r in told if r.request.on != "main"]
    return row

def compare(config, settings):
    """Run what is missing of the comparison, print it as Markdown tables, and keep it in compare.json -> its rows.

    Any number of interruptions repeat no finished run: a row is in compare.json as soon as its run has ended.
    """
    if config.quick and (config.method, config.groups) != (Config.method, Config.groups):
        raise ValueError("--quick has its own methods and data sets; leave it out to choose yours")
    if config.runs or config.past or config.resume:
        raise ValueError("a comparison makes its own runs and goes on by itself; leave out --runs, --past and --resume")
    names = list(ROWS) if config.quick or config.method == "all" else config.method.split(",")
    for name in names:
        pick("method", name.split(":")[0], aioli.METHODS)
    if config.prior:
        priors = PRIORS if config.prior == "all" else config.prior.split(",")
        for prior in priors:
            pick("prior", prior, aioli.METHODS)
        names = [f"half {prior}" for prior in priors] + [f"{name} after {prior}" for name in names if name != "stratified"
                                                         for prior in priors]
    names = list(dict.fromkeys(["stratified", *names]))
    flags = {name: method_flags(config, settings, name) for name in names}
    settings = {name: parse(flags[name])[1] for name in names}
    sets = QUICK if config.quick else data.SETS if config.groups == "sets" else [config.groups]
    folder = Path(config.out or ("out/quick" if config.quick else "out/compare"))
    folder.mkdir(parents=True, exist_ok=True)
    texts = {groups: data.load(groups, config.data or None, config.encoding, config.cache).text for groups in sets}
    path = folder / "compare.json"
    cells = [(groups, seed) for seed in range(config.seed, config.seed + max(config.seeds, 1)) for groups in sets]
    with claimed(folder):
        rows = rows_made_alike(path, config, "--out", texts)
        again = {key for key, row in rows.items() if settings.get(row["name"], row["settings"]) != row["settings"]}
        if lost := [name for name, *cell in again if tuple(cell) not in cells]:
            raise ValueError(f"{path} has {lost[0]} with other settings on more data sets or seeds; use another --out, or make "
                             f"it a row of its own, {lost[0]}:SETTING=VALUE")
        rows = {key: row for key, row in rows.items() if key not in again and (base(key[0]), *key[1:]) not in again}
        failed = run_all(config, [job for cell in cells for job in jobs_of(flags, *cell, config.controls)], rows, folder)
        if config.controls:
            budgets = {(groups, seed, round(1 + row["extra_steps"] / row["steps"]))
                       for (name, groups, seed), row in rows.items() if name in names and " " not in name}
            longer = {k: ("--method", "stratified", "--steps", str(k * config.steps)) for _, _, k in budgets if k > 1}
            failed += run_all(config, [Job(f"stratified x{k}", groups, seed, longer[k]) for groups, seed, k in sorted(budgets)
                                       if k in longer and (groups, seed) in cells], rows, folder)
    tables = "\n\n".join(tabulate(rows))
    write(folder / "compare.md", tables + "\n")
    print("\n" + tables + f"\n\nwritten to {folder}")
    compare_pictures(rows, folder)
    if failed:
        raise ValueError(f"{len(failed)} runs failed, the others are kept; the first: {failed[0]}")
    return rows

@contextmanager
def claimed(folder):
    """Nobody else's comparison in this folder meanwhile, where the system can lock. Raises ValueError if one is at work."""
    try:
        import fcntl
    except ImportError:                                                       # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another comparison is at work in {folder}; wait for it, or use another --out") from None
        yield
    finally:
        os.close(handle)                                                      # the lock goes with it, after a crash too

@contextmanager
def workers(config):
    """A pool of --jobs threads, each to wait for a process of its own; Ctrl-C cancels what has not begun."""
    with ThreadPoolExecutor(config.jobs or os.cpu_count()) as pool:
        try:
            yield pool
        except BaseException as error:                                        # whatever it is, begin nothing more
            pool.shutdown(cancel_futures=True)
            if isinstance(error, (KeyboardInterrupt, Stop)):
                raise Stop("stopped; what is finished is kept, and the same command goes on") from None
            raise

def run_all(config, jobs, rows, folder):
    """Run the jobs that have no row yet, a few side by side, in order -> what failed, a line each, to be told at the end."""
    todo, made_with = [job for job in jobs if job[:3] not in rows], all_versions(folder / "compare.json", config)
    began, ended, failed, futures = time.perf_counter(), 0, [], {}

    def work(job):
        if (job.needs, *job[1:3]) in futures:
            futures[job.needs, job.groups, job.seed].result()
        rows[job[:3]] = run_job(config, job, rows, folder)
        return rows[job[:3]]

    with workers(config) as pool:
        for job in todo:
            futures[job[:3]] = pool.submit(work, job)
        for future in as_completed(futures.values()):
            ended += 1
            try:
                row = future.result()
            except ValueError as error:
                failed.append(str(error))
                continue
            saved = dict(flags=shared_flags(config), versions=made_with, rows=list(rows.values()))
            write(folder / "compare.json", json.dumps(saved))
            spent = time.perf_counter() - began
            print(f"{ended:>4}/{len(todo)}  {row['name']:<34}{row['groups']:<18} seed {row['seed']}  perplexity "
                  f"{row['avg_test_ppl']:7.3f}  {spent / 60:5.1f} min, about {spent / ended * (len(todo) - ended) / 60:.0f} left",
                  flush=True)
    return failed

def interval(values):
    """Mean and half-width of the 95 % t-interval; half-width NaN for a single value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    angle = (np.arange(100_000) + .5) / 100_000 * np.pi / 2                   # Student's t is sqrt(n - 1) tan(angle)
    mass = np.cumsum(np.cos(angle) ** (n - 2))                                # with angles of this density
    t = (n - 1) ** .5 * np.tan(angle[np.searchsorted(mass, .95 * mass[-1])])
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / n ** .5)

def rows_of(path):
    """{(name, groups, seed): row} of a compare.json; empty if there is none."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(row["name"], row["groups"], row["seed"]): row for row in rows}

def all_versions(path, config):
    """versions() of this run and of all before it that added to a compare.json, as "AVX2 or AVX512"."""
    had = json.loads(path.read_text()).get("versions", {}) if path.exists() else {}
    return {name: had.get(name, now) if now in had.get(name, now).split(" or ") else f"{had[name]} or {now}"
            for name, now in versions(config).items()}

def rows_made_alike(path, config, flag, texts):
    """rows_of a compare.json whose runs had the shared flags of this one, and its text, {data set: digest}. Raises
    ValueError; flag: what names the file."""
    made = json.loads(path.read_text()) if path.exists() else dict(flags=shared_flags(config))
    if made["flags"] != shared_flags(config):
        raise ValueError(f"{path} was made with the flags {' '.join(made['flags']) or '(none)'}; take the same, or another {flag}")
    rows, here = rows_of(path), versions(config)
    if any(row.get("text", texts.get(groups)) != texts.get(groups, row.get("text")) for (_, groups, _), row in rows.items()):
        raise ValueError(f"{path} was made from other text; take another {flag}")
    if other := [f"{name} {value}, not {here.get(name)}" for name, value in made.get("versions", {}).items() if value != here.get(name)]:
        print(f"note: {path} was made with {', '.join(other)}: what is paired across the two differs by more than its method")
    return rows

def ordered(rows):
    """Names and data sets of a comparison's rows, in the order of ROWS and SETS, others last -> [name], [data set]."""
    def sort(column, known):
        found = dict.fromkeys(key[column] for key in rows)
        return sorted(found, key=lambda one: known.index(one) if one in known else len(known))
    return sort(0, ROWS), sort(1, data.SETS)

def partners(rows, name, groups, against=lambda row: "stratified"):
    """[(row, partner)]: the runs of one row of the table and those of the same data and seed that they are held against."""
    return [(row, rows[against(row), groups, seed]) for (n, g, seed), row in rows.items()
            if (n, g) == (name, groups) and (against(row), g, seed) in rows]

def markdown(head, lines):
    """A Markdown table from the cells of its head and of its lines."""
    rows = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])

def table(rows, sets, title, key, digits, names, against=lambda row: "stratified"):
    """One Markdown table, rows x data sets: differences to the partner runs, and how many data sets are better."""
    lines = []
    for name in names:
        pairs = {groups: partners(rows, name, groups, against) for groups in sets}
        mine = [row for (n, g, _), row in rows.items() if n == name and g in sets]
        found = {g: interval([row[key] - other[key] for row, other in pair]) for g, pair in pairs.items() if pair}
        if not found:
            continue
        shown = {g: f"{mean:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}") for g, (mean, half) in found.items()}
        shown = {g: f"**{shown[g]}**" if mean + half < 0 else shown[g] for g, (mean, half) in found.items()}
        counts = [sum(mean < 0 for mean, _ in found.values()), sum(mean + half < 0 for mean, half in found.values())]
        if name == "stratified":
            shown, counts = {g: f"{np.mean([row[key] for row, _ in pairs[g]]):.{digits}f}" for g in found}, ["", ""]
        extra = np.mean([row["extra_steps"] / row["steps"] for row in mine])
        ratio = np.median([row["wall_seconds"] / other["wall_seconds"] for g in sets for row, other in partners(rows, name, g)])
        seeds = sorted(len(pair) for pair in pairs.values() if pair)          # not always as many on every data set
        lines.append([name, *(shown.get(g, "") for g in sets), *counts, f"{extra:.1f}", f"{ratio:.2f}",
                      "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))])
    return lines and markdown([title, *sets, "better", "surely", "extra runs", "time", "seeds"], lines)

def tally(rows, sets, method, priors):
    """One line on the restricted setting: in how many (prior, data set) the method is better than the prior's mixture."""
    gaps = [interval([row["avg_test_ppl"] - other["avg_test_ppl"] for row, other in pair]) for prior in priors for g in sets
            if (pair := partners(rows, f"{method} after {prior}", g, lambda row: f"half {prior}"))]
    mean, half = np.array(gaps).reshape(-1, 2).T
    return (f"{method} after another method's mixture, against that mixture throughout: better in {(mean < 0).sum()} of "
            f"{len(mean)} (prior, data set), surely in {(mean + half < 0).sum()}, surely worse in {(mean > half).sum()}; "
            f"difference in perplexity: mean {np.mean(mean):+.2f}, median {np.median(mean):+.2f}")

def tabulate(rows):
    """The paper's tables, methods x data sets, as Markdown, one string each; rows: {(name, groups, seed): row}."""
    names, sets = ordered(rows)
    real = [name for name in names if " " not in name]
    after = sorted((name for name in names if " after " in name), key=lambda name: name.split(" ")[0])
    averages = [name.removeprefix("average of ") for name in names if name.startswith("average of ")]
    costly = [name for name in real if any(n == name and row["extra_steps"] for (n, _, _), row in rows.items())]
    halves = [name for name in names if name.startswith("half ")]
    show = functools.partial(table, rows, sets)
    out = ["Differences to stratified of the same seed, ± 95 % t-interval over seeds, bold if all of it is below 0; "
           "time: wall, stratified = 1.",
           show("average test perplexity", "avg_test_ppl", 2, real + halves),
           show("average test loss", "avg_test_loss", 4, real + halves),
           show("perplexity against a static run at the method's own average mixture", "avg_test_ppl", 2, averages,
                lambda row: f"average of {row['name']}"),
           show("perplexity against stratified with the same total steps", "avg_test_ppl", 2, costly,
                lambda row: f"stratified x{round(1 + row['extra_steps'] / row['steps'])}"),
           show("perplexity against the prior's mixture throughout", "avg_test_ppl", 2, after,
                lambda row: base(row["name"]))]
    return [*filter(None, out)] + [
        tally(rows, sets, method, [name.split(" after ")[1] for name in after if name.startswith(method + " after ")])
        for method in dict.fromkeys(name.split(" after ")[0] for name in after)]

def compare_pictures(rows, folder):
    """table.png; and for the first seed of each data set mixtures-SET.png, and landscape-SET.png where there is a sweep of
    two or three groups."""
    if (plt := pyplot()) is None:
        return
    names, sets = ordered(rows)
    names = [name for name in names if " " not in name and name != "stratified"]
    if not names:
        return
    table_picture(plt, rows, names, sets, folder / "table.png")
    for groups in sets:
        seed = min((s for name, g, s in rows if (name, g) == ("stratified", groups)), default=None)
        mine = {name: rows[name, groups, seed] for name in names if (name, groups, seed) in rows}
        if not mine:
            continue
        parts, end = list(next(iter(mine.values()))["realised_mixture"]), f"{groups.replace('+', '-')}.png"
        mixtures_picture(plt, mine, parts, f"{groups}, seed {seed}; stratified: {rows['stratified', groups, seed]['avg_test_ppl']:.2f}",
                         folder / f"mixtures-{end}")
        if "sweep" in mine.get("grid", {}) and len(parts) <= 3:
            landscape(plt, mine, parts, folder / f"landscape-{end}")

def table_picture(plt, rows, names, sets, path):
    """The table as dots and intervals."""
    figure, axes = plt.subplots(1, len(sets), figsize=(max(7, 1.2 + 1.7 * len(sets)), 1 + .28 * len(names)), sharey=True,
                                layout="constrained", squeeze=False)
    for axis, groups in zip(axes[0], sets):
        for y, name in enumerate(reversed(names)):
            if pairs := partners(rows, name, groups):
                mean, half = interval([100 * (row["avg_test_ppl"] / other["avg_test_ppl"] - 1) for row, other in pairs])
                shown = min(max(mean, -30), 30)                               # a method can be off by far more
                axis.errorbar(shown, y, xerr=None if math.isnan(half) or shown != mean else half, fmt="o" if shown == mean else ">",
                              color=COLOURS[0] if mean < 0 else COLOURS[1], markersize=4, capsize=2)
        axis.axvline(0, color="black", linewidth=.8)
        axis.set_title(groups.replace("+", "+\n", 1), fontsize="small")
        axis.set_xlim(-32, 32)
    axes[0][0].set_yticks(range(len(names)), reversed(names))
    figure.supxlabel("average test perplexity against stratified, per cent; 95 % interval; arrow: off the scale", fontsize="small")
    save(plt, figure, path)

def mixtures_picture(plt, mine, parts, about, path):
    """The mixture of every method over training; mine: {name: row} of one data set and seed."""
    across = 4
    figure, axes = plt.subplots(-(-len(mine) // across), across, figsize=(9, .6 + 1.5 * -(-len(mine) // across)), sharex=True,
                                sharey=True, layout="constrained", squeeze=False)
    for axis in axes.flat[len(mine):]:
        axis.axis("off")
    for axis, (name, row) in zip(axes.flat, mine.items()):
        steps = [t for t, _ in row["mixtures"]] + [row["steps"]]
        shares = np.array([[mixture[g] for g in parts] for _, mixture in row["mixtures"]])
        axis.stackplot(steps, np.vstack((shares, shares[-1:])).T, step="post", colors=COLOURS, labels=parts)
        axis.set_title(f"{name}: {row['avg_test_ppl']:.2f}", fontsize="small")
        axis.set(xlim=(0, row["steps"]), ylim=(0, 1))
    figure.supxlabel(f"step ({about}; the number is average test perplexity)", fontsize="small")
    figure.supylabel("share of windows", fontsize="small")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize="small", frameon=False)
    save(plt, figure, path)

def landscape(plt, mine, parts, path):
    """Average validation loss and perplexity of the sweep's mixtures; where each method went (line) and was on average."""
    P, L = map(np.array, zip(*mine["grid"]["sweep"]))
    shown = {name: row for name, row in mine.items() if ":" in name or name in ("skillit", "doremi", "doge", "aioli", "horizon")}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, values, unit in ((axes[0], L.mean(1), "loss, nats per token"), (axes[1], np.exp(L).mean(1), "perplexity")):
        if len(parts) == 2:
            known = sorted(zip(P[:, 0], values))
            place = lambda p: (p[:, 0], np.interp(p[:, 0], *zip(*known), np.nan, np.nan))      # beyond the sweep: no mark
            axis.plot(*zip(*known), "o-", color="grey")
            axis.set(xlabel=f"share of {parts[0]}", ylabel=f"average validation {unit}")
        else:
            corner = np.array([[0, 0], [1, 0], [.5, .75 ** .5]])
            place = lambda p: (p @ corner).T
            axis.fill(*corner.T, fill=False, edgecolor="grey")
            dots = axis.scatter(*place(P), c=values, cmap="Greys", s=160, edgecolors="grey")
            figure.colorbar(dots, ax=axis, label=f"average validation {unit}")
            for part, (x, y) in zip(parts, corner):
                axis.annotate(part, (x, y), ha="center", va="bottom" if y else "top")
            axis.axis("off")
        for j, (name, row) in enumerate(shown.items()):
            went, average = [list(p.values()) for _, p in row["mixtures"]], [list(row["realised_mixture"].values())]
            line = [np.linspace(p, q, 20) for p, q in zip(went, went[1:] or went)]         # fine enough to follow the curve
            axis.plot(*place(np.concatenate(line)), color=COLOURS[j % 7], linewidth=1)
            axis.plot(*place(np.array(average)), "sD^v<>Pp*"[j % 9], color=COLOURS[j % 7], markeredgecolor="white", markersize=8,
                      label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    save(plt, figure, path)

# ---------------------------------------------------------------------------------------------------------------------
# Fidelity, the paper's section 5: how well the laws fit, whose A is the right one, and whether that decides who wins.

JUDGED = ("dml", "power", "skillit", "doremi", "doge", "aioli", "horizon", "power:perplexity", "aioli:perplexity",
          "horizon:perplexity")
LAW_NAMES = dict(dml="log-linear, static", power="power, static")

def own_matrices(trainer, history, saved, G, fitted):
    """Every method's A^t, (m, m), at a point of a uniform run, whose state is `saved`; afterwards the run is there again.

    G: Skill-It's graph; fitted: {name: law} of dml and power."""
    u, steps, m, main = history.uniform, trainer.config.steps, history.m, trainer.run("main")
    own = {name: -law.gradient(u) for name, law in fitted.items()}
    own["skillit"] = G * trainer.validate(main)[:, None]
    excess = [trainer.answer(aioli.Peek(u, steps, "main", "reference"))["signals"]["excess"] for _ in range(16)]
    own["doremi"] = np.diag(np.nanmean(excess, axis=0))
    own["doge"] = np.nanmean([trainer.answer(aioli.Peek(u, steps, "main"))["signals"]["A"] for _ in range(16)], axis=0)
    main.load(saved)
    probes = aioli.History(history.groups, history.sizes, history.batch, history.seed)
    probes.add(aioli.Train(u, 0), loss=trainer.validate(main))
    own["aioli"] = drive(aioli.learn_params(probes, np.arange(m)), trainer, probes)
    main.load(saved)
    own["horizon"] = -aioli.forecast(history, steps * history.batch).gradient(u)
    return {name: own[name] for name in JUDGED if name in own}

def forks(trainer, saved, P, steps, windows):
    """Short runs from one state, each at a mixture of P -> realised mixtures, falls of each loss.

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

def fidelity(config):
    """One data set -> fidelity.json: law fits, A* with its standard errors, every method's A beside it. ValueError.

    Along one uniform run, at 1/4, 1/2 and 3/4 of it: fork twice at each of 9 mixtures or more, fit the linear dynamic
    law to the falls (A*), and measure what each method would take for A there. Ceiling: A* of one half of the forks
    against the other's. Costs a reference run and one run per group beside the forks; static laws use the table's sweep.
    What was measured already, with these flags and this sweep, is not measured again.
    """
    if config.fork < 1 or config.steps < 100:
        raise ValueError("--fidelity needs --fork of 1 or more and --steps of 100 or more")
    corpus = data.load(config.groups, config.data or None, config.encoding, config.cache)
    path = Path(config.out or f"out/fidelity/{config.groups}") / "fidelity.json"
    rows = rows_made_alike(Path(config.table), config, "--table", {config.groups: corpus.text})
    if not (sweep := rows.get(("grid", config.groups, config.seed), {}).get("sweep")):
        print(f"{config.groups}: no run of grid with seed {config.seed} in {config.table}, so dml and power are left out")
    if path.exists():
        had = json.loads(path.read_text())
        mine = dataclasses.asdict(config) | dict(text=corpus.text)
        if had["sweep"] == sweep and not difference(had["config"] | dict(text=had.get("text")), mine, MAY_CHANGE):
            return had
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, corpus)
    history = aioli.History(corpus.groups, [len(t) for t in corpus.train], config.batch, config.seed)
    windows = trainer.fixed(corpus.val, 4 * config.val_windows, seed=1)
    P = aioli.cover(history.m, max(9, 2 * history.m + 1), np.random.default_rng(0))
    Q, L = map(np.array, zip(*sweep)) if sweep else ([], [])
    fitted = {name: LAWS[name](Q, L) for name in LAWS} if sweep else {}
    fits = [dict(law=LAW_NAMES[name], runs=len(Q), mse=1000 * float(mse.mean()), r2=float(r2.mean()))
            for name, law in fitted.items() for r2, mse, _ in [aioli.quality(law, Q, L)]]
    with no_denormals():
        G = drive(aioli.skill_graph(history, config.steps), trainer, history)
        trainer.answer(aioli.Train(history.uniform, config.steps, on="reference"))
        history.rows, points = [], []
        for part, n in enumerate(aioli.split(config.steps, 20)[:15], 1):      # validations every 1/20, as horizon needs them
            request = aioli.Train(history.uniform, n)
            history.add(request, **trainer.answer(request))
            if part not in (5, 10, 15):
                continue
            saved = copy.deepcopy(trainer.run("main").state())
            shares, drops = forks(trainer, saved, np.concatenate((P, P)), config.fork, windows)
            A = aioli.fit_linear_dynamic(shares, drops)
            halves = [aioli.fit_linear_dynamic(shares[side], drops[side]) for side in (slice(len(P)), slice(len(P), None))]
            own = own_matrices(trainer, history, saved, G, fitted)
            step, error = trainer.run("main").step, ((drops - shares @ A.T) ** 2).mean(0)
            fits.append(dict(law=f"linear, dynamic, step {step}", runs=len(shares), mse=1000 * float(error.mean()),
                             r2=float((1 - error / drops.var(0)).mean())))
            points.append(dict(step=step, loss=trainer.validate(trainer.run("main"), windows), shares=shares, drops=drops,
                               A=A, error=aioli.standard_errors(shares, drops, A), halves=halves, own=own))
            print(f"{config.groups}: step {step} of {config.steps}, {len(shares)} forks of {config.fork} steps", flush=True)
    result = dict(groups=corpus.groups, text=corpus.text, fits=fits, points=points, sweep=sweep,
                  config=dataclasses.asdict(config), versions=versions(config))
    write(path, json.dumps(result, default=plain))
    return result

def fidelities(config):
    """fidelity() of one data set, or of all, a process each -> tables on the terminal and in fidelity.md, figure3.png.
    Raises ValueError."""
    if config.groups != "sets":
        folder, found = Path(config.out or f"out/fidelity/{config.groups}"), {config.groups: fidelity(config)}
    else:
        folder, found = Path(config.out or "out/fidelity"), {}
        same = ["--fidelity", "--fork", str(config.fork), "--table", config.table, "--seed", str(config.seed), "--cache",
                config.cache, *shared_flags(config)]

        def work(groups):
            separately(groups, [*same, "--groups", groups, "--out", str(folder / groups)], stdout=subprocess.DEVNULL)
            return json.loads((folder / groups / "fidelity.json").read_text())

        for groups in data.SETS:
            data.load(groups, config.data or None, config.encoding, config.cache)          # once, before two want it at once
        with workers(config) as pool:
            for groups, result in zip(data.SETS, pool.map(work, data.SETS)):
                found[groups] = result
                print(f"{groups}: done, {len(found)} of {len(data.SETS)}", flush=True)
    summary, details = judge(found, Path(config.table), folder)
    write(folder / "fidelity.md", f"{summary}\n\n{details}\n")
    print(f"\n{summary}\n\nevery column sum of every method: {folder}/fidelity.md")

SIMS = ("sim of A with A*", "sim with A*, centred")

def similarities(point):
    """{name: its two SIMS} at one point of fidelity(); "ceiling": A* of one half of the forks against that of the other;
    "identity": no A at all.

    METHOD:perplexity: both sides with row i times exp(L_i), as what lowers average perplexity is the column sums of that."""
    own = point["own"] | dict(identity=np.eye(len(point["A"])))
    pairs = dict(ceiling=point["halves"], **{name: (B, point["A"]) for name, B in own.items()})
    weights = np.exp(point["loss"])[:, None]                                  # (m, 1)
    pairs |= {f"{name}:perplexity": [weights * B for B in pairs[name]] for name in ("ceiling", "power", "aioli", "horizon", "identity")
              if name in pairs}
    return {name: (aioli.similarity(*pair), aioli.similarity(*pair, centred=True)) for name, pair in pairs.items()}

def judge(found, path, folder):
    """What the results of fidelity(), {data set: result}, say -> summary, details, both Markdown; and figure3.png, if
    there is a comparison at `path`."""
    def per_set(title, names, cells):
        lines = []
        for name in names:
            if own := {g: cells[name, g] for g in found if (name, g) in cells}:
                lines.append([name, *(f"{own[g]:.3f}" if g in own else "" for g in found), f"{np.mean([*own.values()]):.3f}"])
        return markdown([title, *found, "mean"], lines)

    fits = {(fit["law"], g): fit for g, result in found.items() for fit in result["fits"]}
    parts = [per_set(f"fit of each law: {title}", dict.fromkeys(law for law, _ in fits), {at: fit[key] for at, fit in fits.items()})
             for title, key in (("R^2", "r2"), ("MSE, in 0.001 nats^2", "mse"))]
    told = {g: [similarities(point) for point in result["points"]] for g, result in found.items()}
    sims = [{(name, g): np.mean([point[name][k] for point in points]) for g, points in told.items() for name in points[0]}
            for k in (0, 1)]
    parts += [per_set(f"{title}; mean of three points",
                      ("ceiling", "ceiling:perplexity", *JUDGED, "identity", "identity:perplexity"), cells)
              for title, cells in zip(SIMS, sims)]
    parts.append(correlate(found, sims, rows, folder) if (rows := rows_of(path)) else f"no Figure 3: there is no comparison in {path}")
    return "\n\n".join(parts), "\n\n".join(column_sums(result, g) for g, result in found.items())

def column_sums(result, groups):
    """What each method would raise and lower, one data set, as Markdown: A* with standard errors, and everyone's own A."""
    lines = []
    for point in result["points"]:
        A, error = np.array(point["A"]), np.array(point["error"])
        sums = [f"{s:+.4f} ± {e:.4f}" for s, e in zip(A.sum(0), np.sqrt((error ** 2).sum(0)))]
        lines.append([f"A*, step {point['step']}, nats per fork ± standard error", *sums])
        for name, B in point["own"].items():
            s = np.sum(B, axis=0)
            lines.append([f"{name}, in parts", *(f"{v:+.3f}" for v in s / np.abs(s).sum())])
    return markdown([f"{groups}: column sums of A", *result["groups"]], lines)

def correlate(found, sims, rows, folder):
    """Figure 3: whether whose A is closer to A* does better -> Markdown, and figure3.png. sims: for each of SIMS
    {(method, data set): sim}; rows: the comparison."""
    gain = {(name, g, key): np.mean([100 * (1 - row[key] / other[key]) for row, other in pairs]) for name in JUDGED
            for g in found if (pairs := partners(rows, name, g)) for key in ("avg_test_ppl", "avg_test_loss")}
    lines = ["Figure 3, R^2 of the improvement over stratified in per cent, a dot per method and data set (the paper: 0.491):"]
    for key, what in (("avg_test_ppl", "perplexity"), ("avg_test_loss", "loss")):
        for title, cells in zip(SIMS, sims):
            dots = np.array([(cells[at], gain[(*at, key)]) for at in cells if (*at, key) in gain
                             and (what == "perplexity" or ":" not in at[0])])             # METHOD:perplexity is not after loss
            if len(dots) > 2:
                r, rho = np.corrcoef(dots.T)[0, 1], np.corrcoef(*map(aioli.ranks, dots.T))[0, 1]
                lines.append(f"- average test {what}, {title}: {r * r:.3f} (r {r:+.2f}, of ranks {rho:+.2f}; {len(dots)} dots)")
    figure3(sims, gain, folder / "figure3.png")
    return "\n".join(lines)

def figure3(sims, gain, path):
    """Improvement in average test perplexity over each of SIMS, a dot per method and data set. Needs matplotlib."""
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, title, cells in zip(axes, SIMS, sims):
        for j, name in enumerate(JUDGED):                                     # what minimises perplexity is like its twin, with an edge
            colour = COLOURS[JUDGED.index(name.split(":")[0])]
            dots = [(x, max(gain[(*at, "avg_test_ppl")], -16)) for at, x in cells.items()
                    if at[0] == name and (*at, "avg_test_ppl") in gain]
            if dots:
                axis.plot(*zip(*dots), "sD^v<>PD>P"[j], color=colour, markeredgecolor="black" if ":" in name else colour,
                          alpha=1 if ":" in name else .5, label=name)
        axis.axhline(0, color="black", linewidth=.8)
        axis.set(xlabel=title, xlim=(-1.08, 1.08), ylim=(-17, 15))
    axes[0].set_ylabel("average test perplexity below\nstratified, per cent (cut at -16)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small", frameon=False)
    save(plt, figure, path)

# ---------------------------------------------------------------------------------------------------------------------
# The command line: flags are made from Config and from the method's keyword arguments.

@functools.cache                              # inspect.getsource is not for several threads; compare() asks before it has them
def help_of(function_or_class):
    """{name: help text}: the comment behind a Config field, or 'name: text.' in a method's docstring."""
    if inspect.isclass(function_or_class):
        return dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(function_or_class), re.M))
    return dict(re.findall(r"(?:^|  )(\w+): ([^\n]*?)\.?(?=  \w+: |$)", inspect.getdoc(function_or_class) or "", re.M))

def parse(argv):
    """Command line -> Config, settings of the method. Raises ValueError naming the nearest flag or method."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=Config.method)
    argv, method = list(argv), None
    name = first.parse_known_args(argv)[0].method
    if not many(name):
        method = pick("method", name, aioli.METHODS)
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, defaults, texts):
        for name, default in defaults.items():
            flag, text = "--" + name.replace("_", "-"), f"{texts.get(name, '')} [{default}]".replace("%", "%%")
            if isinstance(default, bool):
                group.add_argument(flag, action="store_true", help=text)
            elif isinstance(default, tuple):
                group.add_argument(flag, nargs=2, default=default, metavar="CSV", help=text)
            else:
                group.add_argument(flag, type=type(default), default=default, metavar=name.upper(), help=text)

    fields = {f.name: f.default for f in dataclasses.fields(Config)}
    add(parser.add_argument_group("a run"), fields, help_of(Config))
    settings = {} if method is None else {
        name: p.default for name, p in inspect.signature(method).parameters.items()
        if p.default is not p.empty and p.default is not None}
    if clash := [name for name in settings if name in fields]:
        raise ValueError(f"{name}'s setting {clash[0]!r} is the name of a flag of every run; call it something else")
    if settings:
        add(parser.add_argument_group(f"settings of {name}"), settings, help_of(method))
    seen, unknown = parser.parse_known_args(argv)
    if unknown:
        if not unknown[0].startswith("-"):
            raise ValueError(f"{unknown[0]!r} is not the value of any flag; lists are joined by + or by commas, without spaces")
        pick(f"flag for method {name}", unknown[0].split("=")[0], sorted(parser._option_string_actions))
    seen = vars(seen)
    return Config(**{name: seen[name] for name in fields}), {name: seen[name] for name in settings}

def many(method):
    """Whether --method or --prior asks for a comparison."""
    return "," in method or ":" in method or method == "all"

def main(argv=None):
    """Exit code 0, 2 for bad input, 1 for a machine that refuses, 130 after Ctrl-C; never a traceback for these."""
    try:
        config, settings = parse(sys.argv[1:] if argv is None else argv)
        several = many(config.method) or many(config.prior) or config.seeds or config.quick
        if several and config.fidelity:
            raise ValueError("--fidelity judges all methods at one --seed; leave out --seeds, --quick and lists of methods")
        if several:
            compare(config, settings)
        elif config.fidelity:
            fidelities(config)
        else:
            train(config, settings)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}".replace("\n", " "), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except torch.OutOfMemoryError:
        print("train.py: the GPU's memory is full; lower --batch, or take a smaller --preset", file=sys.stderr)
        return 1
    except (Stop, KeyboardInterrupt) as error:
        print(f"\n{error}", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
