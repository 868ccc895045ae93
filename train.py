"""Train a language model on groups of text while a method from aioli.py chooses the mixture.

    python train.py --method aioli                      # embedded text, laptop model, CPU or GPU
    python train.py --method stratified --groups python+csv --seed 1
    python train.py --method doge --help                # every flag, that method's own included

A method yields requests (aioli.py); the only training loop answers them here. How to read it:
`Config`, then `Run` and `Trainer` (one step, `apply`; one `validate`; an answer per kind of
request), `drive` (the loop), `train` (a whole run). Several runs, side by side, are paper/'s job.
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
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import aioli
import data
import model


def cosine(t):
    """Share of the way from the last learning rate up to the peak, at share t of the decay."""
    return (1 + math.cos(math.pi * t)) / 2


def constant(t):
    """As cosine, for a rate that keeps its peak and falls in the last fifth only."""
    return min(1, 5 * (1 - t))


SCHEDULES = dict(cosine=cosine, constant=constant)


@dataclass(frozen=True)
class Config:
    """One run. Every field is a command-line flag; the text after # is its help. ValueError."""
    # what
    method: str = "aioli"       # a name in aioli.METHODS
    groups: str = "all"         # groups of text, joined by + or comma; or all
    data: str = ""              # folder of your own text, a group per sub-folder or file; hf:NAME
    text_field: str = "text"    # of --data that is no .txt: the field of a document's text
    group_field: str = ""       # of --data: the field, as in meta.source, whose values are groups
    document_mark: str = ""     # of --data: stands between documents of a .txt; <|endoftext|> does
    encoding: str = "bpe1024"   # bpeN learns N byte pairs from the text; tiktoken's gpt2; a file
    seed: int = 0               # initial weights, order of windows, probe order
    out: str = ""               # folder of the results; default: out/METHOD-GROUPS-sSEED
    cache: str = ".cache"       # folder for token files
    resume: bool = False        # go on from the checkpoint in OUT
    runs: tuple = ()            # MIXTURES.csv LOSSES.csv of finished runs, in place of a sweep
    past: str = ""              # history.jsonl of a run with the same seed: take its scratch runs
    # composition
    prior: str = ""             # a mixture to begin with, or the method to learn it, in half runs
    first: float = 0.5          # with --prior: share of the main run trained on its mixture
    restart: str = "uniform"    # with --prior: where the method starts, uniform (paper) or prior
    # model and optimiser
    preset: str = "laptop"      # a name in model.PRESETS
    steps: int = 4000           # optimiser steps of the main run, probes included
    batch: int = 8              # windows per step; small steps win at equal tokens on a laptop
    lr: float = 8e-3            # peak learning rate; the best of .004 to .012 on the laptop model
    warmup: float = 0.1         # share of the steps with rising rate
    schedule: str = "cosine"    # of the rate: cosine; or constant, which falls in the last fifth
    final_lr: float = 0.1       # rate at the end, as a share of the peak
    weight_decay: float = 0.1   # AdamW's, on matrices only
    beta2: float = 0.98         # AdamW's; short runs want a shorter memory than .999
    clip: float = 1.0           # largest gradient norm; 0: no limit
    # measuring
    val_windows: int = 16       # fixed validation windows per group; the noise is in training
    test_windows: int = 384     # fixed test windows per group, used once, after training
    eval_every: int = 100       # steps between points of the loss curve; changes no training
    # machine
    device: str = "auto"        # auto, cpu, cuda
    threads: int = 1            # CPU threads; 0: torch's choice
    compile: bool = False       # torch.compile the model

    def __post_init__(self):
        pick("preset", self.preset, model.PRESETS)
        pick("schedule", self.schedule, SCHEDULES)

        for name in ("steps", "batch", "val_windows", "test_windows", "eval_every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("seed", 0 <= self.seed < 2 ** 63, "at least 0 and below 2^63")
        self.require("threads", self.threads >= 0, "at least 0")
        self.require("first", 0 <= self.first <= 1, "a share of the run, 0 to 1")
        self.require("restart", self.restart in ("uniform", "prior"), "uniform or prior")

        self.require("lr", 0 < self.lr < math.inf, "above 0")                 # NaN is none of these
        self.require("warmup", 0 <= self.warmup < 1, "at least 0 and below 1")
        self.require("final_lr", 0 <= self.final_lr <= 1, "a share of --lr, 0 to 1")
        self.require("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        self.require("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1")
        self.require("clip", self.clip >= 0, "above 0, or 0 for no limit")

    def require(self, name, is_met, what):
        if not is_met:
            raise ValueError(f"{flag(name)} {getattr(self, name)} must be {what}")


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

    def __init__(self, config, trainer, total_steps):
        corpus, shape = trainer.corpus, trainer.shape
        generator = torch.Generator().manual_seed(config.seed)      # equal seeds, equal weights
        self.model = model.Transformer(shape, generator).to(trainer.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.sampler = data.Sampler(corpus.train, corpus.groups, shape.window, config.batch,
                                    config.seed)

        matrices = [weight for weight in self.model.parameters() if weight.dim() == 2]
        vectors = [weight for weight in self.model.parameters() if weight.dim() < 2]
        parts = [dict(params=matrices, weight_decay=config.weight_decay),
                 dict(params=vectors, weight_decay=0.0)]
        betas = (0.9, config.beta2)
        self.optimizer = torch.optim.AdamW(parts, lr=config.lr, betas=betas, fused=True)
        self.step, self.total_steps = 0, total_steps

    def state(self):
        """All that the run's future depends on, for torch.save."""
        optimizer = self.optimizer.state_dict() if self.optimizer else None
        return dict(model=self.model.state_dict(), optimizer=optimizer, step=self.step,
                    sampler=self.sampler.state_dict(), total_steps=self.total_steps)

    def load(self, state):
        """Go to a saved state, which stays as it is and can be loaded again."""
        state = copy.deepcopy(state)                # an optimizer would go on in its very tensors
        self.model.load_state_dict(state["model"])
        if state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer = None
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]


class Trainer:
    """Answers a method's requests. Owns the runs and the fixed validation and test windows."""

    def __init__(self, config, corpus):
        torch.set_num_threads(config.threads or torch.get_num_threads())
        self.config, self.corpus, self.m = config, corpus, len(corpus.groups)
        self.device = device(config.device)
        on_gpu = self.device.type == "cuda"
        self.cast = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()
        preset = model.PRESETS[config.preset]
        self.shape = dataclasses.replace(preset, vocab=max(preset.vocab, corpus.vocab))

        self.val = self.fixed_windows(corpus.val, config.val_windows, seed=1)
        self.test = self.fixed_windows(corpus.test, config.test_windows, seed=2)
        self.targets = np.random.default_rng([config.seed, 2])      # draws what DoGE aims at

        self.runs = {}              # name: Run
        self.peeked = {}            # name: what a Peek left for its Update, a part per group
        self.gradients = None       # of a Peek's batch and its targets, (2, m, parameters)
        self.done = None            # steps of the Train request in progress
        self.curve = []             # [step, losses] of the main run, between its requests' ends
        self.eval_seconds = 0.0
        self.stopping = False

    def on_step(self, request, run, loss):
        """Called after every optimiser step; `train` puts its progress line here."""

    def fixed_windows(self, tokens, count, seed):
        """The same windows of every group at each call: x, y (m count, T), group (m count,)."""
        parts = [data.fixed_windows(text, self.shape.window, count, seed, name)
                 for text, name in zip(tokens, self.corpus.groups, strict=True)]
        x, y = (torch.from_numpy(np.concatenate(side)).to(self.device)
                for side in zip(*parts, strict=True))
        group = np.repeat(np.arange(self.m), [len(inputs) for inputs, _ in parts])
        return x, y, group

    def run(self, name, total_steps=0):
        """The run of that name, begun if there is none; total_steps: of a scratch run."""
        if name not in self.runs:
            length = self.config.steps if name == "main" else total_steps
            self.runs[name] = Run(self.config, self, length)
        return self.runs[name]

    def lr(self, run):
        """Of the step to come: linear warm-up, then by --schedule to final_lr * lr at the end."""
        peak, warmup, final = self.config.lr, self.config.warmup, self.config.final_lr
        t = (run.step + 1) / max(run.total_steps, 1)
        if t < warmup:
            return peak * t / warmup
        left = SCHEDULES[self.config.schedule](min((t - warmup) / (1 - warmup), 1))
        return peak * (final + (1 - final) * left)

    def batch(self, run):
        """The next batch of the run's plan: x, y (B, T) tokens, group (B,)."""
        x, y, group = run.sampler.batch()
        return torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device), group

    def apply(self, run):
        """One optimiser step on the gradients in place."""
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), self.config.clip)
        for part in run.optimizer.param_groups:
            part["lr"] = self.lr(run)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1

    @torch.no_grad()
    def validate(self, run, windows=None):
        """Mean loss of each group on fixed windows, (m,) nats per token. Changes nothing."""
        began = time.perf_counter()
        x, y, group = windows or self.val
        tokens = 1024 if self.device.type == "cpu" else 8192        # fits a cache; a small GPU
        rows = max(1, tokens // self.shape.window)
        with self.cast:
            parts = zip(x.split(rows), y.split(rows), strict=True)
            loss = torch.cat([run.model(*part) for part in parts])
        mean = np.bincount(group, loss.cpu().numpy()) / np.bincount(group)
        self.eval_seconds += time.perf_counter() - began
        return mean

    def answer(self, request):
        """Do what a request asks -> what History.add should say of it."""
        answers = {aioli.Train: self.train, aioli.Peek: self.peek, aioli.Update: self.update}
        return answers[type(request)](request)

    def train(self, request):
        """Answer a Train request. On resume it is taken up again at step `done`."""
        run = self.run(request.on, request.total_steps or request.steps)
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
            is_due = run.step % self.config.eval_every == 0 and self.done < request.steps
            if request.on == "main" and is_due:
                self.curve.append([run.step, self.validate(run).tolist()])
            self.on_step(request, run, loss)

        if run.step == run.total_steps and request.on != "main":
            run.optimizer = None                                    # from now on only validated
        lr, self.done = self.lr(run), None
        return dict(loss=self.validate(run), windows=run.sampler.counts, lr=lr)

    def peek(self, request):
        """Answer a Peek request: draw a batch and measure; the Update that follows steps on it."""
        if self.stopping:
            raise Stop
        run = self.run(request.on, request.total_steps)
        counts = run.sampler.plan(request.p, 1)
        batch = self.batch(run)

        if request.against:
            signals, parts = self.excess(run, request.against, batch, counts)
        else:
            signals, parts = self.alignment(run, batch)
        self.peeked[request.on] = parts
        return dict(signals=signals, windows=counts, lr=self.lr(run))

    def excess(self, run, against, batch, counts):
        """Signals of a Peek against another run, and each group's loss with its graph."""
        x, y, group = batch
        with self.cast:
            loss = run.forward(x, y, per_token=True)                # (B, T)
            with torch.no_grad():
                gap = loss - self.run(against).model(x, y, per_token=True)
                excess = gap.clamp(min=0).mean(1)                   # (B,)

        total = np.bincount(group, excess.cpu().numpy(), self.m)
        signals = dict(excess=total / np.where(counts, counts, np.nan))
        losses = [loss[group == j].mean() if counts[j] else None for j in range(self.m)]
        return signals, losses

    def alignment(self, run, batch):
        """Signals of a Peek at gradients, and each group's gradient, flat."""
        if self.gradients is None:                  # kept: new ones would tear memory to pieces
            parameters = sum(weight.numel() for weight in run.model.parameters())
            self.gradients = torch.empty(2, self.m, parameters, device=self.device)
        of_batch, of_targets = self.gradients                       # (m, parameters) each
        x, y, group = batch
        val_x, val_y, val_group = self.val
        count = max(1, len(x) // self.m)
        aims = [self.targets.choice(np.flatnonzero(val_group == i), count) for i in range(self.m)]

        parts = [None] * self.m
        for j in range(self.m):
            rows = np.flatnonzero(group == j)
            if len(rows):
                parts[j] = self.gradient(run, x[rows], y[rows], of_batch[j])
            else:
                of_batch[j].fill_(math.nan)
        for i, rows in enumerate(aims):
            self.gradient(run, val_x[rows], val_y[rows], of_targets[i])

        A, norm = of_targets @ of_batch.T, of_batch.norm(dim=1)     # (m, m), (m,)
        signals = dict(A=A.cpu().double().numpy(), norm=norm.cpu().double().numpy(),
                       target_norm=float(of_targets.mean(0).norm()))
        return signals, parts

    def gradient(self, run, x, y, out):
        """Gradient of the mean loss of these windows, flat, into out, (parameters,) -> out."""
        with self.cast:
            loss = run.forward(x, y).mean()
        parts = torch.autograd.grad(loss, list(run.model.parameters()))
        return torch.cat([part.flatten() for part in parts], out=out)

    def update(self, request):
        """Answer an Update: a step on sum_j w_j (loss of group j), from what the Peek left."""
        run, parts = self.runs[request.on], self.peeked.pop(request.on)
        total = sum(float(w) * part for w, part in zip(request.w, parts, strict=True)
                    if part is not None)

        if total.dim() == 0:                                        # a loss
            total.backward()
        else:                                                       # a gradient already
            weights = list(run.model.parameters())
            grads = total.split([weight.numel() for weight in weights])
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.view_as(weight)
        self.apply(run)
        self.on_step(request, run, None)
        return {}

    def state(self):
        """All that the answers to come depend on, for torch.save."""
        return dict(runs={name: run.state() for name, run in self.runs.items()}, done=self.done,
                    curve=self.curve, eval_seconds=self.eval_seconds,
                    targets=json.dumps(self.targets.bit_generator.state))

    def load(self, state):
        """Go to a saved state."""
        for name, saved in state["runs"].items():
            self.run(name, saved["total_steps"]).load(saved)
        self.done, self.curve = state["done"], state["curve"]
        self.eval_seconds = state["eval_seconds"]
        self.targets.bit_generator.state = json.loads(state["targets"])


# --- The loop, and the history that it leaves on disk.


def steps_of(request):
    """Optimiser steps that a request takes: a Train's own, one for an Update, none for a Peek."""
    return getattr(request, "steps", int(isinstance(request, aioli.Update)))


def same_request(asked, recorded):
    """Whether a recorded request is the one asked for now, up to rounding of its mixture."""
    return (type(asked) is type(recorded) and asked.on == recorded.on
            and steps_of(asked) == steps_of(recorded)
            and getattr(asked, "total_steps", 0) == getattr(recorded, "total_steps", 0)
            and np.allclose(recorded.p, asked.p, atol=1e-9))


def drive(method, trainer, history, past=(), known=(), on_row=lambda row: None):
    """The one loop: ask the method, let the trainer answer, record -> what the method returns.

    past: rows of an interrupted run; they are replayed to the method instead of trained again,
    and must be what it asks for. known: scratch runs of another run, taken in order as far as
    this method asks for the same. on_row: called with every row that was measured here. Raises
    ValueError if past rows are not what is asked (the settings changed), Stop on Ctrl-C.
    """
    past, known, reply = list(past), list(known), None
    while True:
        try:
            request = method.send(reply)
        except StopIteration as end:
            return end.value

        if past:
            if not same_request(request, past[0].request):
                raise ValueError("the checkpoint is of another run; use another --out")
            history.rows.append(past.pop(0))
        elif known and same_request(request, known[0].request):
            history.rows.append(known.pop(0))
        else:
            began = time.perf_counter()
            measured = trainer.answer(request)
            history.add(request, seconds=round(time.perf_counter() - began, 4), **measured)
            on_row(history.last)
        reply = history.reply


def steps_taken(history):
    """{run: optimiser steps}, of the main run and of all scratch runs."""
    taken = Counter()
    for row in history.rows:
        taken[row.request.on] += steps_of(row.request)
    return taken


def history_lines(history):
    """The text of history.jsonl: a line per row, `at` its run's step count after it."""
    at, lines = Counter(), []
    for row in history.rows:
        request = row.request
        at[request.on] += steps_of(request)
        line = dict(verb=type(request).__name__, **request._asdict(), at=at[request.on])
        line.update(row._asdict())
        line = {name: value for name, value in line.items()
                if name != "request" and value is not None}
        lines.append(json.dumps(line, default=plain) + "\n")
    return "".join(lines)


def from_line(line):
    """The Row that a line of history.jsonl tells of."""
    saved = json.loads(line)
    kind = getattr(aioli, saved["verb"])
    asked = {name: saved[name] for name in kind._fields if name in saved}
    arrays = {name: np.array(asked[name]) for name in ("p", "w", "A") if name in asked}
    request = kind(**{**asked, **arrays})

    reply = saved.get("reply")
    if isinstance(reply, dict):
        reply = {name: np.array(signal) for name, signal in reply.items()}
    elif reply is not None:
        reply = np.array(reply)
    share, windows = np.array(saved["share"]), np.array(saved["windows"])
    return aioli.Row(request, reply, share, windows, saved["lr"], saved["seconds"])


def read_history(path):
    """The rows of a history.jsonl, oldest first."""
    return [from_line(line) for line in Path(path).read_text().splitlines()]


def plain(value):
    """numpy as what JSON can hold, for json.dumps(default=plain)."""
    return value.tolist()


def write(path, content):
    """Text, or a state for torch to load; the file is whole or not there."""
    part = path.with_name(path.name + ".part")
    if isinstance(content, str):
        part.write_text(content, "utf-8")
    else:
        torch.save(content, part)
    part.replace(path)


# --- Whether two runs are alike.

# flags that may change from one part of an interrupted run to the next
MAY_CHANGE = ("out", "cache", "past", "resume", "threads", "device", "compile")
# flags that the scratch runs of --past do not depend on
NOT_OF_SCRATCH_RUNS = ("method", "runs", "prior", "out", "cache", "past", "resume")
# flags that make a mixture, and none for uniform sampling
OF_MIXTURE = ("method", "runs", "past", "prior", "first", "restart")


def flag(name):
    """A field's name as it is on the command line."""
    return "--" + name.replace("_", "-")


def flags_of(config, settings, text):
    """All that decides a run, by name: its flags, its method's settings, the digest of its text.

    config: a Config, or one as result.json keeps it."""
    flags = config if isinstance(config, dict) else dataclasses.asdict(config)
    return {**flags, **settings, "text": text}


def difference(theirs, ours, free):
    """The first of our flags, not in `free`, in which another run differs -> "--lr 0.004, not
    0.008" (ours), or "other text", or "". theirs, ours: as flags_of gives them."""
    theirs, ours = json.loads(json.dumps([theirs, ours]))           # tuples are lists there
    for name, value in ours.items():
        if name in free or theirs.get(name) == value:
            continue
        return "other text" if name == "text" else f"{flag(name)} {theirs.get(name)}, not {value}"
    return ""


def scratch_runs(config, text):
    """The scratch rows of --past, a history.jsonl whose run had this run's seed, text and model.

    Not those of a model that another request goes on with: it has to be there. ValueError."""
    try:
        result = json.loads(Path(config.past).with_name("result.json").read_text())
        theirs = flags_of(result["config"], {}, result["text"])
        rows = read_history(config.past)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--past {config.past} is not the history of a finished run "
                         f"({error})") from None
    other = difference(theirs, flags_of(config, {}, text), NOT_OF_SCRATCH_RUNS)
    if other:
        raise ValueError(f"--past {config.past} is of a run with {other}; its runs are not "
                         f"this run's")

    uses = Counter()
    for row in rows:
        uses.update([row.request.on, getattr(row.request, "against", "")])
    found = [row for row in rows if isinstance(row.request, aioli.Train)
             and row.request.on != "main" and uses[row.request.on] == 1]
    if not found:
        raise ValueError(f"--past {config.past} has no runs that another can take; leave it out")
    return found


# --- Finished runs of others, from CSV files.


def plain_names(names):
    """Names without what all of them begin or end with (train_the_pile_, _val_loss)."""
    to_separator = r".*[_/ ]|"
    backwards = [name[::-1] for name in names]
    front = len(re.match(to_separator, os.path.commonprefix(names))[0])
    back = len(re.match(to_separator, os.path.commonprefix(backwards))[0])
    return [name[front:len(name) - back] for name in names]


def read_table(path):
    """A CSV file with a header, whose first column numbers the runs -> names, {run: numbers}."""
    lines = [line.split(",") for line in Path(path).read_text().split("\n") if line.strip()]
    try:
        head, *rows = lines
        numbers = {row[0]: list(map(float, row[1:])) for row in rows}
    except ValueError:
        raise ValueError(f"{path} is not a table of numbers under a header of names") from None
    return plain_names([name.strip() for name in head[1:]]), numbers


def read_runs(files):
    """MIXTURES.csv, LOSSES.csv -> group names, mixtures (R, m) that sum to 1, names of losses,
    losses (R, n) in the same order, nats per token. Raises ValueError."""
    (groups, mixtures), (targets, losses) = map(read_table, files)
    if mixtures.keys() != losses.keys():
        raise ValueError(f"{' and '.join(files)} do not list the same runs in their first columns")
    P, L = aioli.check_runs(list(mixtures.values()), [losses[run] for run in mixtures], 1)
    return groups, P, targets, L


def runs_for(config, groups):
    """--runs for a History: mixtures (R, m) in the order of the groups, losses (R, n); or None.

    Groups match by their plain_names. Raises ValueError."""
    if not config.runs:
        return None
    theirs, P, _, L = read_runs(config.runs)
    ours = plain_names(groups)
    if set(theirs) != set(ours):
        raise ValueError(f"{config.runs[0]} has the groups {', '.join(theirs)}; the text has "
                         f"{', '.join(groups)}")
    return P[:, [theirs.index(group) for group in ours]], L


# --- One run, from text to result.json.


def load_text(config, groups):
    """data.load of these groups with the flags of a Config."""
    return data.load(groups, config.data or None, config.encoding, config.cache,
                     text_field=config.text_field, group_field=config.group_field,
                     document_mark=config.document_mark, out=config.out or "out")


def train(config, settings, corpus=None):
    """One run from text to result.json -> the result. ValueError for bad input, Stop on Ctrl-C."""
    corpus = corpus or load_text(config, config.groups)
    out = output_folder(config, corpus.groups)
    checkpoint = out / "checkpoint.pt"

    trainer = Trainer(config, corpus)
    sizes = [len(tokens) for tokens in corpus.train]
    history = aioli.History(corpus.groups, sizes, config.batch, seed=config.seed,
                            runs=runs_for(config, corpus.groups), warmup=config.warmup)
    method = program(config, settings, history)
    flags = flags_of(config, settings, corpus.digest)
    known = scratch_runs(config, corpus.digest) if config.past else []
    past, seconds = resume(checkpoint, trainer, flags) if config.resume else ([], 0.0)

    progress = Progress(config, corpus.groups)
    trainer.on_step = progress.step
    print(f"{config.method} on {'+'.join(corpus.groups)}: {config.steps} steps of {config.batch} "
          f"x {trainer.shape.window} tokens, {config.preset} model, {trainer.device}, "
          f"seed {config.seed}", flush=True)

    began = time.perf_counter() - seconds
    with interrupts_wait(trainer):
        try:
            with no_denormals():
                drive(method, trainer, history, past, known, progress.row)
        except Stop:
            wall = wall_seconds(began, known, history)
            write(checkpoint, dict(trainer=trainer.state(), history=history_lines(history),
                                   wall=wall, flags=flags))
            raise Stop("stopped; go on with the same command and --resume "
                       f"(state in {checkpoint})") from None
        wall = wall_seconds(began, known, history)
        check_steps(config, history)
        result = summarise(config, settings, trainer, history, wall)
        write(out / "history.jsonl", history_lines(history))
        write(out / "result.json", json.dumps(result, indent=1))
        checkpoint.unlink(missing_ok=True)

    report(result)
    against_uniform(config, result, out)
    picture(result, history, out / "run.png")
    print(f"written to {out}")
    return result


def check_steps(config, history):
    """Raise ValueError if the method did not train the main run for --steps steps."""
    trained = steps_taken(history)["main"]
    if trained != config.steps:
        raise ValueError(f"{config.method} trained the main run for {trained} steps; its Train "
                         f"requests have to add up to --steps {config.steps}")


def output_folder(config, groups):
    """The folder of the results, there and free to write to. Raises ValueError, OSError."""
    out = Path(config.out or f"out/{config.method}-{'+'.join(groups)}-s{config.seed}")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise OSError(f"cannot write to {out}; choose another --out")
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not config.resume:
        raise ValueError(f"{checkpoint} is of a run that was stopped; go on with --resume, "
                         f"delete it, or use another --out")
    return out


def program(config, settings, history):
    """The generator that config asks for: a method, alone or on top of a prior. ValueError."""
    method = functools.partial(pick("method", config.method, aioli.METHODS), **settings)
    if not config.prior:
        return method(history, config.steps)

    starts_anywhere = "start" in inspect.signature(method).parameters
    if config.restart == "prior" and not starts_anywhere:
        raise ValueError(f"--restart prior: {config.method} always starts from uniform; use "
                         f"--restart uniform or aioli")
    if "+" in config.prior:
        prior = functools.partial(aioli.fixed, mixture=config.prior)
    else:
        prior = pick("prior", config.prior, aioli.METHODS)
    return aioli.with_prior(history, config.steps, method, prior, config.first, config.restart)


def resume(checkpoint, trainer, flags):
    """Bring the trainer to where a run was stopped -> its rows so far, and their seconds.

    Raises ValueError if there is none or it is of another run."""
    if not checkpoint.exists():
        raise ValueError(f"nothing to resume: there is no {checkpoint}")
    saved = torch.load(checkpoint, map_location=trainer.device, weights_only=True)
    other = difference(saved["flags"], flags, MAY_CHANGE)
    if other:
        raise ValueError(f"{checkpoint} is of a run with {other}; delete it, or use another --out")
    trainer.load(saved["trainer"])
    return [from_line(line) for line in saved["history"].splitlines()], saved["wall"]


def wall_seconds(began, known, history):
    """Seconds since `began`, and those of the rows of --past, `known`, that were taken over."""
    rows = {id(row) for row in history.rows}
    return time.perf_counter() - began + sum(row.seconds for row in known if id(row) in rows)


@contextmanager
def interrupts_wait(trainer):
    """Ctrl-C asks the trainer to stop at its next step instead of ending the program at once."""
    def stop(*_):
        trainer.stopping = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Progress:
    """While training: in a terminal one line that updates itself and one per new mixture, else a
    line every tenth of each run."""

    def __init__(self, config, groups):
        self.batch_tokens = config.batch * model.PRESETS[config.preset].window
        self.groups = groups
        self.live = sys.stdout.isatty()
        self.began = time.perf_counter()
        self.next, self.steps = 0.0, 0
        self.where, self.p = "", None

    def step(self, request, run, loss):
        """After a step: the line, if it is due."""
        self.steps += 1
        self.where = f"{request.on} {run.step}/{run.total_steps}"
        if not self.is_due(run):
            return
        line = self.line(request, run, loss)
        if self.live:
            print(f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)
        else:
            print(line, flush=True)

    def is_due(self, run):
        """Five times a second in a terminal, else ten times a run."""
        if not self.live:
            return 10 * run.step // run.total_steps > 10 * (run.step - 1) // run.total_steps
        now = time.perf_counter()
        if now < self.next:
            return False
        self.next = now + 0.2
        return True

    def line(self, request, run, loss):
        """Step, loss, speed, time left, mixture."""
        spent = time.perf_counter() - self.began
        left = (run.total_steps - run.step) * spent / self.steps
        speed = self.steps * self.batch_tokens / spent / 1000
        loss = "" if loss is None else f"loss {loss.item():.3f}  "
        return (f"{self.where} {run.step / run.total_steps:4.0%}  {loss}{speed:.1f}k tok/s  "
                f"{left // 60:.0f}:{left % 60:02.0f} left  {self.mixture(request.p)}")

    def row(self, row):
        """After a request: the mixture it trained on, if it is a new one and no probe."""
        request = row.request
        if not isinstance(request, aioli.Train) or request.probe:
            return
        is_new = self.p is not None and not np.array_equal(request.p, self.p)
        if self.live and is_new:
            print(f"\r{self.where}  mixture now {self.mixture(request.p)}  "
                  f"mean validation loss {row.reply.mean():.4f}\033[K")
        self.p = request.p

    def mixture(self, p):
        shares = [f"{share:.3f}".removeprefix("0") for share in p]
        names = [group[:14] for group in self.groups]
        return "  ".join(map(" ".join, zip(names, shares, strict=True)))


# --- The result.


def summarise(config, settings, trainer, history, wall):
    """The result of a finished run, as saved in result.json. wall: seconds so far."""
    groups, main, began = trainer.corpus.groups, trainer.run("main"), time.perf_counter()
    test = trainer.validate(main, trainer.test)                     # (m,)
    wall += time.perf_counter() - began

    rows = [row for row in history.trained() if row.request.steps]
    probes = [row.request.steps for row in rows if row.request.probe]
    steps = steps_taken(history)
    window = config.batch * trainer.shape.window                    # tokens of a step
    training_seconds = max(wall - trainer.eval_seconds, 1e-9)
    windows = history.windows()[-1]
    mixtures = mixtures_of(history, groups)

    return dict(
        method=config.method, groups=groups, text=trainer.corpus.digest, seed=config.seed,
        preset=config.preset, steps=steps["main"], tokens=steps["main"] * window,
        params=sum(weight.numel() for weight in main.model.parameters()),
        extra_steps=sum(steps.values()) - steps["main"], probe_steps=sum(probes),
        wall_seconds=round(wall, 2), eval_seconds=round(trainer.eval_seconds, 2),
        tokens_per_second=round(sum(steps.values()) * window / training_seconds),
        test_loss=named(groups, test), test_ppl=named(groups, np.exp(test)),
        avg_test_loss=float(test.mean()), avg_test_ppl=float(np.exp(test).mean()),
        val_loss=named(groups, rows[-1].reply), final_mixture=mixtures[-1][1],
        realised_mixture=named(groups, windows / windows.sum()),
        epochs=named(groups, main.sampler.epochs), mixtures=mixtures, curve=trainer.curve,
        settings=settings, config=dataclasses.asdict(config), versions=versions(config))


def named(groups, values):
    """{group: value}, as JSON can hold it."""
    return {group: float(value) for group, value in zip(groups, values, strict=True)}


def mixtures_of(history, groups):
    """[step, {group: share}] of each mixture of the main run, probes left out."""
    mixtures, at = [], 0
    for row in history.trained():
        if row.request.steps and not row.request.probe:
            mixtures.append([at, named(groups, row.request.p)])
        at += row.request.steps
    first = history.trained()[0].request
    return mixtures or [[0, named(groups, first.p)]]                # every step was a probe


def versions(config):
    """What decides the last digits of a run."""
    return dict(device=str(device(config.device)), python=platform.python_version(),
                torch=torch.__version__, numpy=np.__version__, machine=platform.machine(),
                kernels=torch.backends.cpu.get_cpu_capability())


def report(result):
    """The closing table."""
    print(f"\n{'group':<12}{'mixture':>9}{'realised':>10}{'epochs':>8}{'val loss':>10}"
          f"{'test loss':>11}{'test ppl':>10}")
    for group in result["groups"]:
        print(f"{group:<12}{result['final_mixture'][group]:>9.3f}"
              f"{result['realised_mixture'][group]:>10.3f}{result['epochs'][group]:>8.2f}"
              f"{result['val_loss'][group]:>10.3f}{result['test_loss'][group]:>11.3f}"
              f"{result['test_ppl'][group]:>10.2f}")
    print(f"average test perplexity {result['avg_test_ppl']:.3f}   "
          f"average test loss {result['avg_test_loss']:.4f}   {result['wall_seconds']:.0f} s   "
          f"{result['tokens_per_second'] / 1000:.1f}k tok/s   {result['extra_steps']} extra steps")


def against_uniform(config, result, out):
    """The closing line: how uniform sampling does at the same, or which command tells."""
    if config.method == "stratified" and not config.prior:
        return
    uniform, folder = uniform_result(config, result, out)
    if uniform is None:
        print(f"for comparison, uniform sampling: {uniform_command(config)}")
        return
    ours, theirs = result["avg_test_ppl"], uniform["avg_test_ppl"]
    print(f"uniform sampling: average test perplexity {theirs:.3f}   "
          f"this run: {ours - theirs:+.3f} ({ours / theirs - 1:+.1%})   ({folder})")


def uniform_result(config, result, out):
    """A finished stratified run with this run's text, seed and flags, beside it or in out/ -> its
    result and its folder; None, None if there is none that can be read."""
    name = f"stratified-{'+'.join(result['groups'])}-s{config.seed}"
    ours = flags_of(config, {}, result["text"])
    free = (*MAY_CHANGE, *OF_MIXTURE, "groups", "data", "eval_every")         # the digest decides
    for folder in (out.parent / name, Path("out", name)):
        try:
            uniform = json.loads((folder / "result.json").read_text("utf-8"))
            theirs = flags_of(uniform["config"], {}, uniform["text"])
            is_uniform = uniform["method"] == "stratified" and not theirs["prior"]
            is_number = 0 < uniform["avg_test_ppl"] < math.inf
        except (OSError, ValueError, TypeError, KeyError):          # not there, or damaged
            continue
        if is_uniform and is_number and not difference(theirs, ours, free):
            return uniform, folder
    return None, None


def uniform_command(config):
    """The command line of the run that uniform_result looks for."""
    left_out = (*OF_MIXTURE, "out", "resume")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
              if field.name not in left_out and getattr(config, field.name) != field.default}
    return shlex.join(["python", "train.py", "--method", "stratified", *as_flags(values)])


def as_flags(values):
    """{name: value} as words of a command line."""
    words = []
    for name, value in values.items():
        words += [flag(name)] if value is True else [flag(name), str(value)]
    return words


# --- Pictures.

# Okabe and Ito's, which all eyes can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def pyplot():
    """matplotlib's pyplot, drawing to files, or None after a line that says how to get it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return plt
    except ImportError:
        print("for pictures: pip install matplotlib")
        return None


def save_figure(figure, path):
    """Write a picture and free its memory."""
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


def picture(result, history, path):
    """run.png: the mixture over steps and the validation losses. Needs matplotlib."""
    plt = pyplot()
    if plt is None:
        return
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    rows = history.trained()
    at = np.cumsum([row.request.steps for row in rows]).tolist()
    measured = [[step, row.reply.tolist()] for step, row in zip(at, rows, strict=True)]
    points = sorted(measured + result["curve"])
    mixtures = [*result["mixtures"], [result["steps"], result["final_mixture"]]]

    for j, group in enumerate(result["groups"]):
        colour = COLOURS[j % len(COLOURS)]
        steps, shares = [step for step, _ in mixtures], [mixture[group] for _, mixture in mixtures]
        top.step(steps, shares, where="post", label=group, color=colour)
        steps, losses = [step for step, _ in points], [loss[j] for _, loss in points]
        bottom.plot(steps, losses, label=group, color=colour)

    title = f"{result['method']}, seed {result['seed']}"
    top.set(ylabel="mixture (share of windows)", ylim=(0, None), title=title)
    top.legend(ncols=4, fontsize="small", frameon=False)
    bottom.set(xlabel="step", ylabel="validation loss (nats per token)")
    save_figure(figure, path)


# --- The command line: flags are made from Config and from the method's keyword arguments.

# what a single run does not take, and which command does
COMPARE, FIDELITY, LAWS = (f"python -m paper.{name}" for name in ("compare", "fidelity", "laws"))
MOVED = {"--quick": COMPARE, "--seeds": COMPARE, "--controls": COMPARE, "--jobs": COMPARE,
         "--fidelity": FIDELITY, "--fork": FIDELITY, "--table": FIDELITY, "--holdout": LAWS}


class Parser(argparse.ArgumentParser):
    """An argument that is not understood is a ValueError, one line like all others."""

    def error(self, message):
        raise ValueError(message)


def pick(what, name, options):
    """options[name], or a ValueError that names the nearest, or all where none is near."""
    if name in options:
        return options[name]
    near = difflib.get_close_matches(name, options, 1)
    advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(options)}"
    raise ValueError(f"unknown {what} {name!r}; {advice}")


@functools.cache
def help_of(function_or_class):
    """{name: help text}: the comment behind a Config field, or 'name: text.' in a method's
    docstring, and in that of the method whose settings it says it shares ("Settings as aioli")."""
    if inspect.isclass(function_or_class):
        source = inspect.getsource(function_or_class)
        return dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.M))
    doc = inspect.getdoc(function_or_class) or ""
    texts = dict(re.findall(r"(?:^|  )(\w+): ([^\n]*?)\.?(?=  \w+: |$)", doc, re.M))
    shared = re.search(r"Settings as (\w+)", doc)
    return {**help_of(aioli.METHODS[shared[1]]), **texts} if shared else texts


def add_flags(group, defaults, help_texts):
    """A flag of an argparse group for each {name: default}, of the default's type."""
    for name, default in defaults.items():
        text = f"{help_texts.get(name, '')} [{default}]".replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(flag(name), action="store_true", help=text)
        elif isinstance(default, tuple):
            group.add_argument(flag(name), nargs=2, default=default, metavar="CSV", help=text)
        else:
            group.add_argument(flag(name), type=type(default), default=default,
                               metavar=name.upper(), help=text)


def settings_of(method):
    """{name: default} of a method's settings, its keyword arguments with a plain default."""
    parameters = inspect.signature(method).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters
            if parameter.default is not parameter.empty and parameter.default is not None}


def parse(argv):
    """Command line -> Config, settings of the method. Raises ValueError naming the nearest flag."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=Config.method)
    name = first.parse_known_args(argv)[0].method
    refuse_several("method", name, separators=",:")
    method = pick("method", name, aioli.METHODS)

    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    settings = settings_of(method)
    for setting in settings:
        if setting in fields:
            raise ValueError(f"{name}'s setting {setting!r} is the name of a flag of every run; "
                             "call it something else")
        if settings[setting] is True or not isinstance(settings[setting], (str, int, float)):
            raise ValueError(f"{name}'s setting {setting!r} can be no flag; let its default be a "
                             "number, text or False")

    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = dict(method=f"how the mixture is chosen: {', '.join(aioli.METHODS)}",
                 preset=f"shape of the model: {', '.join(model.PRESETS)}")
    add_flags(parser.add_argument_group("a run"), fields, help_of(Config) | names)
    if settings:
        add_flags(parser.add_argument_group(f"settings of {name}"), settings, help_of(method))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown(unknown[0], name, sorted(parser._option_string_actions))
    given = vars(given)
    refuse_idle(given)
    settings = {setting: given[setting] for setting in settings}
    aioli.check(**settings)
    return Config(**{field: given[field] for field in fields}), settings


def refuse_several(name, value, separators=","):
    """A list of methods, or a method with settings in its name, is a comparison. ValueError."""
    if value == "all" or any(separator in value for separator in separators):
        raise ValueError(f"{flag(name)} {value} is for a comparison; use {COMPARE}")


def refuse_unknown(word, method, flags):
    """A word of the command line that no flag took. Raises ValueError."""
    word = word.split("=")[0]
    if word in MOVED:
        raise ValueError(f"{word} is not for a single run; use {MOVED[word]}")
    if not word.startswith("-"):
        raise ValueError(f"{word!r} is not the value of any flag; lists are joined by + or by "
                         "commas, without spaces")
    pick(f"flag for method {method}", word, dict.fromkeys(flags))


def refuse_idle(given):
    """Flags that would change nothing in this run, given {name: value}. Raises ValueError."""
    refuse_several("prior", given["prior"])
    if given["groups"] == "sets":
        raise ValueError(f"--groups sets is for a comparison; use {COMPARE}")
    if given["runs"] and given["steps"] == 0:
        raise ValueError(f"--steps 0 trains nothing; to fit a law to finished runs, use {LAWS}")

    for name in ("first", "restart"):
        if not given["prior"] and given[name] != getattr(Config, name):
            raise ValueError(f"{flag(name)} changes nothing without --prior; leave it out")
    methods = [aioli.METHODS[name] for name in (given["method"], given["prior"])
               if name in aioli.METHODS]
    sweeps = any("points" in settings_of(method) for method in methods)
    if given["runs"] and not sweeps:
        raise ValueError(f"--runs stands in for a sweep, and {given['method']} makes none; "
                         "use grid, dml or power")


def where(error):
    """File, line and function of an error that no `raise` of ours made; "" for the others."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if frame.line.startswith("raise "):
        return ""
    return f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"


def exit_code(name, command):
    """Call `command` -> 0; 2 for bad input, 1 for a machine that refuses, 130 after Ctrl-C, with
    a line on stderr that begins with `name`; never a traceback for these."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}{where(error)}".replace("\n", " "), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except MemoryError:
        print(f"{name}: the memory is full; lower --steps or --batch", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"{name}: the GPU's memory is full; lower --batch, or take a smaller --preset",
              file=sys.stderr)
        return 1
    except (Stop, KeyboardInterrupt) as error:
        print(f"\n{error}", file=sys.stderr)
        return 130
    return 0


def main(argv=None):
    """The command line, or argv -> exit code."""
    def command():
        train(*parse(sys.argv[1:] if argv is None else argv))

    return exit_code("train.py", command)


if __name__ == "__main__":
    sys.exit(main())
