"""Train a language model on groups of text while a method from aioli.py chooses the mixture.

    python train.py --method aioli                      # embedded text, laptop model, CPU or GPU
    python train.py --method stratified --groups python+csv --seed 1
    python train.py --method doge --help                # every flag, that method's own included
    torchrun --nproc_per_node=4 train.py --batch 32     # one process a GPU, results as of one

A method yields requests (aioli.py); the only training loop answers them here. How to read it:
`Config`, then `Run` and `Trainer` (one step, `apply`; one `validate`; an answer per kind of
request), `drive` (the loop), `train` (a whole run). Several runs, side by side, are paper/'s job.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during these imports: no traceback

import argparse
import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from contextlib import (contextmanager, nullcontext, redirect_stderr, redirect_stdout,
                        suppress)
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import aioli
import data
import model


def cosine(t):
    """Share of (peak - last rate) that is left at share t of the decay: from 1 to 0."""
    return (1 + math.cos(math.pi * t)) / 2


def constant(t):
    """As cosine: 1, then in a line to 0 over the last fifth of the decay."""
    return min(1, 5 * (1 - t))


SCHEDULES = dict(cosine=cosine, constant=constant)
LONGEST_NAME = 120          # bytes of a folder's name
OURS = ("history", "checkpoint", "result", "model", "run", "before")    # what a run leaves there
WINDOWS = 9 * 10 ** 9       # of a run: data.py counts their billionths in 64 bits
MANY_REQUESTS = 1000        # in a row that train nothing: a method that never ends
MANY_EPOCHS = 4             # up to here text that is repeated is nearly worth new text
PAPER = dict(preset="pythia-160m", method="aioli_published", steps=5000, lr=5e-4)  # --preset paper
LARGEST_LOSS = 700          # nats per token: beyond it a perplexity is no number any more


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
    encoding: str = "bpe1024"   # bpeN, N tokens learnt from the text; or tiktoken's gpt2; a file
    seed: int = 0               # initial weights, order of windows, probe order
    out: str = ""               # folder of the results; default: out/METHOD-GROUPS-sSEED-...
    cache: str = ".cache"       # folder for token files
    resume: bool = False        # go on from the checkpoint in OUT, or begin if there is none
    save_every: int = 0         # steps between checkpoints; 0: as often as costs under 2 per cent
    past: str = ""              # history.jsonl of a run with the same seed: take its scratch runs
    # extra runs, and composition
    scratch: float = 1.0        # length of extra runs, and of their text, as a share of this run's
    prior: str = ""             # a mixture to begin with, or the method to learn it, in half runs
    first: float = 0.5          # with --prior: share of the main run trained on its mixture
    restart: str = "uniform"    # with --prior: where the method starts, uniform (paper) or prior
    # model and optimiser
    preset: str = "laptop"      # a name in model.PRESETS
    init: str = ""              # weights to begin with: model.safetensors of a Pythia of that shape
    steps: int = 4000           # optimiser steps of the main run, probes included
    batch: int = 8              # windows per step; small batches win at equal tokens on a laptop
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
    max_epochs: float = 0.0     # times that a group may be read; 0: no limit, but a note above 4
    # machine
    device: str = "auto"        # auto, cpu, cuda, mps (Apple's)
    micro_batch: int = 0        # windows in memory at once, to save it; 0: the whole batch
    threads: int = 1            # CPU threads; 0: torch's choice
    compile: bool = False       # torch.compile the model

    def __post_init__(self):
        pick("preset", self.preset, model.PRESETS)
        pick("schedule", self.schedule, SCHEDULES)

        for name in ("steps", "batch", "val_windows", "test_windows", "eval_every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("seed", 0 <= self.seed < 2 ** 63, "at least 0 and below 2^63")
        for name in ("micro_batch", "save_every"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("threads", 0 <= self.threads <= 1024, "at least 0 and at most 1024")
        self.require("cache", self.cache, "a folder")
        self.require("micro_batch", self.micro_batch <= self.batch, f"at most --batch {self.batch}")
        self.require("steps", self.steps * self.batch < WINDOWS, f"below {WINDOWS:.0e} / --batch")
        self.require("max_epochs", 0 <= self.max_epochs < math.inf, "above 0, or 0 for no limit")
        self.require("scratch", 0 < self.scratch <= 1, "a share of the run, above 0 to 1")
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
    """Ctrl-C or a signal to end, taken at the next moment at which the state is whole."""


class Diverged(ValueError):
    """A loss, a gradient norm or a signal is no number any more, or beyond all sense."""


def device(name):
    """torch.device, after trying it out. Raises ValueError if this torch cannot use it."""
    if name == "auto":
        there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
        name = next((kind for kind, usable in there.items() if usable), "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"            # torchrun: a GPU per process
    try:
        number = torch.zeros(1, device=name)
        number.item()                                               # which "meta" does not hold
        return number.device
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

    def __init__(self, name, config, trainer, total_steps):
        corpus, shape = trainer.corpus, trainer.shape
        self.name = name
        generator = torch.Generator().manual_seed(config.seed)      # equal seeds, equal weights
        self.model = model.Transformer(shape, generator)
        if config.init:
            model.load_pythia(self.model, config.init)
        self.model.to(trainer.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        share = 1.0 if name == "main" else config.scratch
        self.sampler = data.Sampler(corpus.train, corpus.groups, shape.window, config.batch,
                                    config.seed, share)

        matrices = [weight for weight in self.model.parameters() if weight.dim() == 2]
        vectors = [weight for weight in self.model.parameters() if weight.dim() < 2]
        parts = [dict(params=matrices, weight_decay=config.weight_decay),
                 dict(params=vectors, weight_decay=0.0)]
        betas = (0.9, config.beta2)
        self.optimizer = torch.optim.AdamW(parts, lr=config.lr, betas=betas, fused=True)
        self.step, self.total_steps, self.diverged = 0, total_steps, False

    def gradient(self, out=None):
        """The gradient in place, flat, (parameters,); 0 where there is none."""
        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad
                 for weight in self.model.parameters()]
        return torch.cat([part.flatten() for part in parts], out=out)

    def set_gradient(self, flat):
        """Put a gradient, flat, (parameters,), in place."""
        weights = list(self.model.parameters())
        parts = flat.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight)

    def put_aside(self):
        """Free what it takes on the device, at its end; it may still be validated."""
        self.optimizer, self.forward = None, self.model
        self.model.to("cpu")

    def state(self):
        """All that the run's future depends on, for torch.save."""
        optimizer = self.optimizer.state_dict() if self.optimizer else None
        return dict(model=self.model.state_dict(), optimizer=optimizer, step=self.step,
                    sampler=self.sampler.state_dict(), total_steps=self.total_steps,
                    diverged=self.diverged)

    def load(self, state):
        """Go to a saved state, which stays as it is and can be loaded again."""
        state = copy.deepcopy(state)                # an optimizer would go on in its very tensors
        self.model.load_state_dict(state["model"])
        if state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.put_aside()
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.diverged = state["step"], state["diverged"]


class Trainer:
    """Answers a method's requests. Owns the runs and the fixed validation and test windows.

    Under torchrun each process has one, and all answer alike: each draws the whole batch, reads
    every world-th window of it, and what they measure is summed. torch's DistributedDataParallel
    sums in every backward pass; here a step may have several, of a group or a micro-batch each.
    """

    def __init__(self, config, corpus):
        torch.set_num_threads(config.threads or torch.get_num_threads())
        self.config, self.corpus, self.m = config, corpus, len(corpus.groups)
        self.device = device(config.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)                      # or all pin memory on the first
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.cast = torch.autocast("cuda", torch.bfloat16) if has_bf16 else nullcontext()
        preset = model.PRESETS[config.preset]
        self.shape = dataclasses.replace(preset, vocab=max(preset.vocab, corpus.vocab))

        self.micro_batch = config.micro_batch or config.batch
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.mine = slice(rank(), None, self.world)                 # windows of this process
        if config.batch % self.world:
            raise ValueError(f"--batch {config.batch} cannot be shared by {self.world} processes; "
                             "take a multiple of them")

        self.val = self.fixed_windows(corpus.val, config.val_windows, seed=1)
        self.test = self.fixed_windows(corpus.test, config.test_windows, seed=2)
        self.targets = np.random.default_rng([config.seed, 2])      # draws what DoGE aims at

        self.runs = {}              # name: Run
        self.peeked = {}            # name: what a Peek left for its Update, {group: part}
        self.gradients = None       # of a Peek's batch and its targets, (2, m, parameters)
        self.done = None            # steps of the Train request in progress
        self.curve = []             # [step, losses] of the main run, between its requests' ends
        self.eval_seconds = 0.0
        self.unseen = []            # numbers of the last steps, on a GPU not looked at yet
        self.last_finite = {}       # (run, what): the last numbers that were finite, their step

    def on_step(self, request, run, loss):
        """Called after every optimiser step; `train` puts its progress line here."""

    def on_whole(self):
        """Called wherever the state is whole; `train` keeps checkpoints here, and stops."""

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
            self.runs[name] = Run(name, self.config, self, length)
        run = self.runs[name]
        if run.optimizer is None:
            run.model.to(self.device)                               # it was put aside
        return run

    def put_aside(self, run):
        """Put a scratch run aside if it is at its end."""
        if (run.step == run.total_steps or run.diverged) and run.name != "main":
            run.put_aside()
            self.gradients = None

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
        return self.to_device(x), self.to_device(y), group

    def to_device(self, array):
        """A tensor. A GPU works behind Python, which draws and, from pinned memory, sends the next
        batch while it computes: batches are prefetched without a thread."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def backward(self, run, x, y):
        """Put the gradient of the mean loss of these windows in place, a micro-batch at a time
        -> the loss of each, (B,), 0 for those of other processes. Nothing here waits for a GPU."""
        losses = torch.zeros(len(x), device=self.device)
        whole, mine, x, y = len(x), losses[self.mine], x[self.mine], y[self.mine]
        for at in range(0, len(x), self.micro_batch):
            part = slice(at, at + self.micro_batch)
            with self.cast:
                loss = run.forward(x[part], y[part])
            (loss.mean() * (len(loss) / whole)).backward()
            mine[part] = loss.detach()
        return losses

    def reduce_gradient(self, run):
        """Sum the gradient in place over all processes."""
        if self.world > 1:
            run.set_gradient(reduce(run.gradient()))

    def per_token(self, forward, x, y):
        """Loss of each token of some windows, (B, T). Of several micro-batches only this is kept,
        and the backward pass reads each again."""
        parts = list(zip(x.split(self.micro_batch), y.split(self.micro_batch), strict=True))
        if len(parts) > 1:
            forward = functools.partial(model.again_in_backward, forward)
        with self.cast:
            return torch.cat([forward(*part, per_token=True) for part in parts])

    def apply(self, run):
        """One optimiser step on the gradients in place. Raises Diverged."""
        if self.config.clip:
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), self.config.clip)
            self.watch(run, "gradient norm", norm)
        for part in run.optimizer.param_groups:
            part["lr"] = self.lr(run)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1

    def watch(self, run, what, values, group=None, limit=math.inf):
        """Require that these numbers of a step are finite, at once or, on a GPU, which does not
        wait for it, some steps later. Arguments as of `require_finite`."""
        self.unseen.append((run, run.step, what, values.detach(), group, limit))
        if self.device.type == "cpu" or len(self.unseen) >= 100:
            self.look()

    def look(self):
        """Require that all numbers that were not looked at yet are finite. Raises Diverged."""
        unseen, self.unseen = self.unseen, []
        for run, step, what, values, group, limit in unseen:
            self.require_finite(run, step, what, values.float().cpu().numpy(), group, limit)

    def require_finite(self, run, step, what, values, group=None, limit=math.inf):
        """Raise Diverged unless numbers are finite and below a limit.

        values: one, or an array whose last axis is of the groups `group`, by default all m."""
        is_bad = ~(np.abs(values) < limit)                          # NaN, too
        if not is_bad.any():
            self.last_finite[run.name, what] = values, step
            return
        before, at = self.last_finite.get((run.name, what), (math.nan, None))
        last = "none" if at is None else f"{np.mean(before):.4g} at step {at}"
        if np.ndim(values):
            group = np.broadcast_to(np.arange(self.m) if group is None else group, is_bad.shape)
            what += " of " + ", ".join(self.corpus.groups[j] for j in np.unique(group[is_bad]))
        value = np.extract(is_bad, values)[0]
        raise Diverged(f"run {run.name}, step {step}: the {what} is {value:.4g} (the last good "
                       f"one: {last}); a lower --lr may help")

    @torch.no_grad()
    def validate(self, run, windows=None):
        """Mean loss of each group on fixed windows, (m,) nats per token. Trains nothing.

        Raises Diverged."""
        began = time.perf_counter()
        x, y, group = windows or self.val
        count = np.bincount(group)
        x, y, group = x[self.mine], y[self.mine], group[self.mine]
        tokens = 1024 if self.device.type == "cpu" else 8192        # fits a cache; a small GPU
        rows = max(1, tokens // self.shape.window)
        with self.cast:
            parts = zip(x.split(rows), y.split(rows), strict=True)
            loss = torch.cat([run.model(*part) for part in parts])
        mean = summed(np.bincount(group, loss.cpu().numpy(), self.m)) / count
        self.eval_seconds += time.perf_counter() - began
        self.require_finite(run, run.step, "validation loss", mean, limit=LARGEST_LOSS)
        return mean

    def answer(self, request):
        """Do what a request asks -> what History.add should say of it."""
        answers = {aioli.Train: self.train, aioli.Peek: self.peek, aioli.Update: self.update}
        return answers[type(request)](request)

    def train(self, request):
        """Answer a Train request. On resume it is taken up again at step `done`.

        A scratch run that diverges ends there, its losses NaN: the method has to do without it.
        Raises ValueError for a run that has come to its end.
        """
        run = self.run(request.on, request.total_steps or request.steps)
        if run.optimizer is None and request.steps and not run.diverged:
            raise ValueError(f"run {request.on} ended after {run.total_steps} steps; give its "
                             "first Train as total_steps what all its requests have together")
        if self.done is None:
            run.sampler.plan(request.p, request.steps)
            self.done = 0
        loss = np.full(self.m, math.nan)
        try:
            if not run.diverged:
                loss = self.steps(run, request)
        except Diverged as error:
            if request.on == "main":
                raise
            print(f"\nnote: {error}; this run counts as diverged", flush=True)
            run.diverged = True
        run.sampler.drop()

        self.done = None
        self.put_aside(run)
        return dict(loss=loss, windows=run.sampler.counts, lr=self.lr(run))

    def steps(self, run, request):
        """The steps of a Train request that are not done -> the losses, (m,), after them."""
        while self.done < request.steps:
            self.on_whole()
            x, y, group = self.batch(run)
            losses = reduce(self.backward(run, x, y))               # (B,)
            self.watch(run, "training loss", losses, group, LARGEST_LOSS)
            self.reduce_gradient(run)
            self.apply(run)
            self.done += 1
            is_due = run.step % self.config.eval_every == 0 and self.done < request.steps
            if request.on == "main" and is_due:
                self.curve.append([run.step, self.validate(run).tolist()])
            self.on_step(request, run, losses.mean())
        self.look()
        return self.validate(run)

    def peek(self, request):
        """Answer a Peek request: draw a batch and measure; the Update that follows steps on it."""
        self.on_whole()
        run = self.run(request.on, request.total_steps)
        counts = run.sampler.plan(request.p, 1)
        batch = self.batch(run)

        if request.against:
            signals, parts = self.excess(run, request.against, batch, counts)
        else:
            signals, parts = self.alignment(run, batch)
        self.peeked[request.on] = parts
        there = np.flatnonzero(counts)                              # others have NaN
        for name, values in signals.items():
            of_those = values[..., there] if np.ndim(values) else values
            self.require_finite(run, run.step, f"signal {name}", of_those, there)
        return dict(signals=signals, windows=counts, lr=self.lr(run))

    def excess(self, run, against, batch, counts):
        """Signals of a Peek against another run, and {group: its loss with its graph}."""
        if against not in self.runs:
            raise ValueError(f"a Peek against {against!r} needs that run to be trained before")
        x, y, group = (part[self.mine] for part in batch)
        loss = self.per_token(run.forward, x, y)                    # (B, T)
        with torch.no_grad():
            gap = loss - self.per_token(self.run(against).model, x, y)
            excess = gap.clamp(min=0).mean(1)                       # (B,)

        total = summed(np.bincount(group, excess.cpu().numpy(), self.m))
        signals = dict(excess=total / np.where(counts, counts, np.nan))
        parts = {}
        for j in np.unique(group):
            rows = np.flatnonzero(group == j)
            parts[j] = loss[rows].mean() * (len(rows) / counts[j])
        return signals, parts

    def alignment(self, run, batch):
        """Signals of a Peek at gradients, and {group: its gradient, flat}."""
        if self.gradients is None:                  # kept: new ones would tear memory to pieces
            parameters = sum(weight.numel() for weight in run.model.parameters())
            self.gradients = torch.empty(2, self.m, parameters, device=self.device)
        of_batch, of_targets = self.gradients                       # (m, parameters) each
        x, y, group = batch
        val_x, val_y, val_group = self.val
        count = max(1, len(x) // self.m)
        aims = [self.targets.choice(np.flatnonzero(val_group == i), count) for i in range(self.m)]

        parts = {}
        of_batch[np.setdiff1d(np.arange(self.m), group)] = math.nan
        for j in np.unique(group):
            rows = np.flatnonzero(group == j)
            parts[j] = self.gradient_of(run, x[rows], y[rows], of_batch[j])
        for i, rows in enumerate(aims):
            self.gradient_of(run, val_x[rows], val_y[rows], of_targets[i])

        reduce(self.gradients)
        A, norm = of_targets @ of_batch.T, of_batch.norm(dim=1)     # (m, m), (m,)
        signals = dict(A=A.cpu().double().numpy(), norm=norm.cpu().double().numpy(),
                       target_norm=float(of_targets.mean(0).norm()))
        return signals, parts

    def gradient_of(self, run, x, y, out):
        """Gradient of the mean loss of these windows, flat, into out, (parameters,) -> out; the
        share of this process."""
        self.backward(run, x, y)
        run.gradient(out)
        run.model.zero_grad(set_to_none=True)
        return out

    def update(self, request):
        """Answer an Update: a step on sum_j w_j (loss of group j), from what the Peek left."""
        if request.on not in self.peeked:
            raise ValueError(f"an Update of run {request.on} needs a Peek at it just before")
        if np.shape(request.w) != (self.m,) or not np.isfinite(request.w).all():
            raise ValueError(f"the weights of an Update must be {self.m} finite numbers, not "
                             f"{request.w}")
        run, parts = self.runs[request.on], self.peeked.pop(request.on)
        total = sum(float(request.w[j]) * part for j, part in parts.items())
        if total.dim() == 0:                                        # a loss
            total.backward()
            self.reduce_gradient(run)
        else:                                                       # a gradient, of all processes
            run.set_gradient(total)
        self.apply(run)
        self.on_step(request, run, None)
        self.put_aside(run)
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


def checked(request):
    """A request as it is now: a method may go on to change its arrays. ValueError if it is none."""
    if type(request) not in VERBS.values():
        raise ValueError(f"a method yields Train, Peek or Update, not {str(request)[:80]!r}")
    for name in ("steps", "total_steps"):
        number = getattr(request, name, 0)
        if not (isinstance(number, (int, np.integer)) and number >= 0):
            raise ValueError(f"{name} of a request must be a whole number >= 0, not {number!r}")
    is_update = isinstance(request, aioli.Update)
    if is_update and request.on == "main":
        raise ValueError("an Update is for a scratch run, as its weights are no mixture; train the "
                         "main run by Train")
    name = "w" if is_update else "p"
    return request._replace(**{name: np.array(getattr(request, name), float)})


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
            request = checked(method.send(reply))
        except StopIteration as end:
            return end.value

        row = None
        if known and same_request(request, known[0].request):
            row = known.pop(0)
        if past:                        # on resume it has the known rows, too: both lists advance
            row = past.pop(0)
            if not same_request(request, row.request):
                raise ValueError("the checkpoint is of another run, or the method asks for other "
                                 "things each time (let it draw from h.rng); use another --out")
        elif trainer.done is not None:                              # half of it is trained
            row = None
        if row:
            history.rows.append(row)
        else:
            check_left(request, history, trainer.config)
            check_moves(request, history, trainer.config)
            began = time.perf_counter()
            measured = trainer.answer(request)
            history.add(request, seconds=round(time.perf_counter() - began, 4), **measured)
            on_row(history.last)
        reply = history.reply


def check_left(request, history, config):
    """Raise ValueError for a request that goes beyond the end of the main run."""
    if request.on != "main":
        return
    done = steps_taken(history.rows)["main"]
    if done + steps_of(request) > config.steps:
        raise ValueError(f"{config.method} asks for {steps_of(request)} steps of the main run at "
                         f"step {done}; they have to add up to --steps {config.steps}")


def check_moves(request, history, config):
    """Raise ValueError for a method that only asks, and would for ever."""
    if steps_of(request) or len(history.rows) < MANY_REQUESTS:
        return
    if not any(steps_of(row.request) for row in history.rows[-MANY_REQUESTS:]):
        raise ValueError(f"{config.method} asks {MANY_REQUESTS} times in a row for no step; the "
                         "steps that it yields have to add up to --steps")


def steps_taken(rows):
    """{run: optimiser steps}, of the main run and of all scratch runs."""
    taken = Counter()
    for row in rows:
        taken[row.request.on] += steps_of(row.request)
    return taken


def row_line(row, at):
    """A row as a line of history.jsonl; at: its run's step count after it."""
    request = row.request
    line = dict(verb=type(request).__name__, **request._asdict(), at=at, **row._asdict())
    del line["request"]
    line = {name: value for name, value in line.items() if value is not None}
    return json.dumps(plain(line), allow_nan=False) + "\n"


def plain(value):
    """numpy, in dicts and lists too, as what JSON can hold; null for what is no finite number."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda name: None)       # NaN, Infinity


VERBS = {verb.__name__: verb for verb in (aioli.Train, aioli.Peek, aioli.Update)}


def from_line(line):
    """The Row that a line of history.jsonl tells of."""
    saved = json.loads(line)
    kind = VERBS[saved["verb"]]
    for name in ("p", "w", "A", "share"):
        if name in saved:
            saved[name] = np.array(saved[name], float)
    request = kind(**{name: saved[name] for name in kind._fields if name in saved})

    reply = saved.get("reply")
    if isinstance(reply, dict):
        reply = {name: np.array(signal, float) for name, signal in reply.items()}   # null is NaN
    elif reply is not None:
        reply = np.array(reply, float)
    windows = np.array(saved["windows"])
    return aioli.Row(request, reply, saved["share"], windows, saved["lr"], saved["seconds"])


def read_history(path):
    """The rows of a history.jsonl, oldest first. Raises ValueError."""
    with reading(path, "the history of a run"):
        return [from_line(line) for line in Path(path).read_text("utf-8").splitlines()]


# --- Files: whole or not there, and refused in a line if they are not what they should be.


def write(path, content):
    """Text, bytes, or a state for torch to load; the file is whole, and on the disk, or as it was.

    Only the first process of several writes."""
    if rank():
        return
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)                                    # of a process that was killed
    try:
        with open(part, "xb") as file:                              # x: new, so through no link
            if isinstance(content, dict):
                torch.save(content, file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):                         # torch's word for a full disk
            raise OSError(f"cannot write {part}, the disk may be full ({error})") from None
        raise


class Unreadable(ValueError):
    """A file is not what it should be."""


@contextmanager
def reading(path, what):
    """Whatever goes wrong in this block is the fault of a file that is not `what`: Unreadable."""
    try:
        yield
    except Unreadable:                                              # of another file
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise Unreadable(f"{path} is not {what} ({type(error).__name__}: {said}); delete it, or "
                         "use another") from None


def is_undamaged(path):
    """Whether a file of torch.save is what was written, to the bit; torch.load does not look."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def read_result(path):
    """A result.json. Raises ValueError unless it is of a finished run."""
    with reading(path, "the result of a run"):
        result = json.loads(Path(path).read_text("utf-8"))
        for name in ("config", "settings", "test_loss", "realised_mixture", "versions"):
            result[name].items()
        result["text"], result["groups"], result["mixtures"][0]
        for name in ("avg_test_ppl", "avg_test_loss", "wall_seconds", "steps", "extra_steps"):
            if not 0 <= result[name] < math.inf:
                raise ValueError(f"{name} {result[name]}")
        return result


@contextmanager
def claimed(folder):
    """Nobody else's run or comparison in this folder meanwhile, where the system can lock.
    ValueError."""
    try:
        import fcntl
    except ImportError:                                             # Windows
        yield
        return

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run or comparison is at work in {folder}; wait for it, or "
                             "use another --out") from None
        yield
    finally:
        os.close(handle)                        # the lock goes with it, after a crash too


class Keeper:
    """What a run leaves on disk as it goes: history.jsonl, a line a row, and checkpoint.pt, which
    has these lines, too. So a run that is killed loses what came after its last checkpoint, and
    nothing else; what it then trains again has the same numbers."""

    def __init__(self, out, trainer, history, flags, save_every, known=()):
        self.out, self.checkpoint = out, out / "checkpoint.pt"
        self.trainer, self.history, self.flags = trainer, history, flags
        self.save_every = save_every
        self.known = known                      # rows taken over from another run
        self.lines, self.at = [], Counter()     # of history.jsonl; steps of each run there
        self.began = self.saved = time.perf_counter()
        self.saved_at = 0                       # steps of all runs at the last checkpoint
        self.patience = 10.0                    # seconds to the next one
        self.scratch_ended = self.stopping = False

    @property
    def wall(self):
        """Seconds of the run so far, with those of the rows that were taken over."""
        seconds = sum(row.seconds for row in self.taken_over())
        return time.perf_counter() - self.began + seconds

    def taken_over(self):
        """The rows of --past that this run asked for."""
        rows = {id(row) for row in self.history.rows}
        return [row for row in self.known if id(row) in rows]

    def set_aside(self):
        """What the same run left here when it was finished goes to the folder `before`."""
        if (self.out / "result.json").exists():
            before = self.out / "before"
            before.mkdir(exist_ok=True)
            for name in ("result.json", "history.jsonl", "model.pt"):
                if (self.out / name).exists():
                    (self.out / name).replace(before / name)
        self.write_lines()

    def resume(self):
        """Bring the trainer to where the last checkpoint was made -> the rows so far. ValueError.

        Without a checkpoint the run begins, and a line says so."""
        if not self.checkpoint.exists():
            print(f"nothing to go on from: there is no {self.checkpoint}; beginning at step 0")
            return []
        with reading(self.checkpoint, "a checkpoint of this run"):
            if not is_undamaged(self.checkpoint):
                raise ValueError("it is damaged")
            saved = torch.load(self.checkpoint, map_location=self.trainer.device,
                               weights_only=True)
            other = difference(saved["flags"], self.flags, MAY_CHANGE)
        if other:
            why = ", from which its rate and its rounds follow" if "--steps" in other else ""
            raise ValueError(f"{self.checkpoint} is of a run with {other}{why}; give the same, or "
                             "another --out")
        with reading(self.checkpoint, "a checkpoint of this run"):
            self.trainer.load(saved["trainer"])
            past = [from_line(line) for line in saved["rows"]]
            self.lines, self.at = saved["rows"], steps_taken(past)
            self.began -= saved["wall"]
        self.write_lines()
        self.saved_at = self.steps()
        return past

    def steps(self):
        """Of all runs."""
        return sum(run.step for run in self.trainer.runs.values())

    def row(self, row):
        """After a row was measured."""
        self.add_rows()
        if isinstance(row.request, aioli.Train) and row.request.on != "main":
            self.scratch_ended = True

    def add_rows(self):
        """Write the rows that history.jsonl does not have."""
        if rank():
            return
        written = len(self.lines)
        if not written:
            self.set_aside()
        for row in self.history.rows[written:]:
            self.at[row.request.on] += steps_of(row.request)
            self.lines.append(row_line(row, self.at[row.request.on]))
        with open(self.out / "history.jsonl", "a", encoding="utf-8") as file:
            file.writelines(self.lines[written:])

    def write_lines(self):
        """Write history.jsonl anew."""
        write(self.out / "history.jsonl", "".join(self.lines))

    def interrupt(self, number, _):
        """A signal to end: stop where the state is whole next; at once after a second Ctrl-C."""
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True

    def whole(self):
        """Where the state is whole: keep it when it is time to, and stop if asked. Raises Stop."""
        stopping, due = in_any_process(self.stopping, not rank() and self.is_due())
        if stopping or due:
            self.save()
        if stopping:
            raise Stop("stopped; go on with the same command and --resume "
                       f"(state in {self.checkpoint})")

    def is_due(self):
        """After a scratch run, and every --save-every steps or, without it, when the time that the
        last checkpoint took is under 2 per cent of the time since."""
        if self.scratch_ended:
            return True
        if self.save_every:
            return self.steps() - self.saved_at >= self.save_every
        return time.perf_counter() - self.saved > self.patience

    def save(self):
        """Make a checkpoint."""
        began = time.perf_counter()
        self.trainer.look()                     # none of a run that diverged
        self.add_rows()
        write(self.checkpoint, dict(trainer=self.trainer.state(), rows=self.lines, wall=self.wall,
                                    flags=self.flags))
        self.saved, self.saved_at = time.perf_counter(), self.steps()
        self.patience = max(10.0, 50 * (self.saved - began))
        self.scratch_ended = False

    def finish(self, result):
        """Keep the model, and the result, whose file says that the run is whole."""
        self.add_rows()
        self.write_lines()
        main = self.trainer.run("main").model
        write(self.out / "model.pt", dict(shape=dataclasses.asdict(main.shape),
                                          weights=main.state_dict()))
        write(self.out / "result.json", json.dumps(plain(result), indent=1, allow_nan=False))
        if not rank():
            self.checkpoint.unlink(missing_ok=True)


# --- Flags: as words, and whether those of two runs are alike.

# flags that change no number; the first four say where the text is, which its digest compares
IDLE = ("data", "text_field", "group_field", "document_mark", "out", "cache", "past", "resume",
        "save_every", "eval_every")
# flags that may change from one part of an interrupted run to the next
MAY_CHANGE = (*IDLE, "threads", "device", "compile", "micro_batch")
# flags that the scratch runs of --past do not depend on
NOT_OF_SCRATCH_RUNS = (*IDLE, "method", "prior", "first", "restart", "max_epochs")
# flags that make a mixture, and none for uniform sampling
OF_MIXTURE = ("method", "past", "prior", "first", "restart", "scratch")


def flag(name):
    """A field's name as it is on the command line."""
    return "--" + name.replace("_", "-")


def flags_given(config, left_out=()):
    """The flags of a Config that are not the default, as words of a command line."""
    return as_flags({name: value for name, value in vars(config).items()
                     if name not in left_out and value != getattr(Config, name)})


def as_flags(values):
    """{name: value} as words of a command line."""
    words = []
    for name, value in values.items():
        if str(value).startswith("-"):
            words += [f"{flag(name)}={value}"]                      # not a flag of its own
        else:
            words += [flag(name)] if value is True else [flag(name), str(value)]
    return words


def flags_of(config, settings, text):
    """All that decides a run, by name: its flags, its method's settings, the digest of its text.

    config: a Config, or one as result.json keeps it, without the flags that are newer."""
    flags = config if isinstance(config, dict) else dataclasses.asdict(config)
    return {**dataclasses.asdict(Config()), **flags, **settings, "text": text}


def difference(theirs, ours, free):
    """The first of our flags, not in `free`, in which another run differs -> "--lr 0.004, not
    0.008" (ours), or "other text", or "". theirs, ours: as flags_of gives them."""
    for name, value in ours.items():
        if name not in free and theirs.get(name) != value:
            word = f"{flag(name)} {theirs.get(name)}, not {value}"
            return "other text" if name == "text" else word
    return ""


def scratch_runs(config, text):
    """The scratch rows of --past, a history.jsonl whose run had this run's seed, text and model.

    Not those of a model that another request goes on with: it has to be there. ValueError."""
    finished = Path(config.past).parent / "result.json"
    if not Path(config.past).is_file() or not finished.is_file():
        raise ValueError(f"--past {config.past}: no finished run is there; name the history.jsonl "
                         "in its folder, or leave it out")
    result = read_result(finished)
    rows = read_history(config.past)
    theirs = flags_of(result["config"], {}, result["text"])
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


# --- One run, from text to result.json.


def load_text(config, groups):
    """data.load of these groups with the flags of a Config."""
    return data.load(groups, config.data or None, config.encoding, config.cache,
                     text_field=config.text_field, group_field=config.group_field,
                     document_mark=config.document_mark, out=config.out or "out")


def train(config, settings, corpus=None):
    """One run from text to result.json -> the result. ValueError for bad input, Stop on Ctrl-C."""
    corpus = corpus or first_alone(lambda: load_text(config, config.groups))
    out = Path(config.out or Path("out", folder_name(config, settings, corpus.groups)))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out {out}: a file is in its way; choose another") from None
    for path in out.iterdir():
        if path.is_dir() != (path.name == "before") and path.name.split(".")[0] in OURS:
            raise ValueError(f"{path} is in the way; take it away, or use another --out")
    with nullcontext() if rank() else claimed(out):
        write(out / "try", "")                  # that it can be written to shows before training
        (out / "try").unlink(missing_ok=True)
        flags, finished = flags_of(config, settings, corpus.digest), out / "result.json"
        refuse_other_run(out, config, flags)
        if config.resume and finished.exists() and not (out / "checkpoint.pt").exists():
            print(f"nothing to do: {out} has this run, finished")
            return read_result(finished)
        return train_in(out, config, settings, corpus, flags)


def train_in(out, config, settings, corpus, flags):
    """As train(), in this folder; flags: all that decides the run, as flags_of gives it."""
    trainer = Trainer(config, corpus)
    sizes = [len(tokens) for tokens in corpus.train]
    history = aioli.History(corpus.groups, sizes, config.batch, seed=config.seed,
                            warmup=config.warmup, window=trainer.shape.window,
                            bytes_per_token=corpus.bytes_per_token("val"),
                            scratch=config.scratch)
    method = program(config, settings, history)
    known = scratch_runs(config, corpus.digest) if config.past else []

    keeper = Keeper(out, trainer, history, flags, config.save_every, known)
    progress = Progress(config, corpus.groups)
    past = keeper.resume() if config.resume else []
    trainer.on_step, trainer.on_whole = progress.step, keeper.whole
    announce(trainer, settings)

    def on_row(row):
        keeper.row(row)
        progress.row(row)

    with handling(keeper.interrupt):
        with no_denormals():
            drive(method, trainer, history, past, known, on_row)
        wall = keeper.wall
        check_steps(config, history, keeper)
        tell_idle(config, history, took_over=keeper.taken_over() or past)
        result = summarise(config, settings, trainer, history, wall)
        report(result)
        keeper.finish(result)
    if not rank():
        against_uniform(config, result, out)
        try:
            picture(result, history, out / "run.png")
        except Exception as error:                                  # of matplotlib's many
            print(f"no picture: {error}")
        print(f"written to {out}")
    return result


def announce(trainer, settings):
    """Say what is trained, and which groups it may read more often than is wise, or asked for."""
    config, corpus = trainer.config, trainer.corpus
    print(f"{config.method} on {'+'.join(corpus.groups)}: {config.steps} steps of {config.batch} "
          f"x {trainer.shape.window} tokens, {config.preset} model, {trainer.device}, "
          f"seed {config.seed}", flush=True)
    total = config.steps * config.batch * trainer.shape.window          # tokens
    sizes = dict(zip(corpus.groups, map(len, corpus.train), strict=True))
    for name, size in sizes.items():
        epochs = total / trainer.m / size
        if epochs > MANY_EPOCHS and not config.max_epochs:
            print(f"note: at equal shares this run reads {name} {epochs:.1f} times; "
                  f"--max-epochs {MANY_EPOCHS} gives it less")
    for windows, name in ((trainer.val, "val"), (trainer.test, "test")):
        for group, count in zip(corpus.groups, np.bincount(windows[2]), strict=True):
            if count < getattr(config, f"{name}_windows"):
                print(f"note: {group} has {count} {name} windows, fewer than --{name}-windows")
    epochs = total / sum(sizes.values())
    for name, most in (("max_epochs", config.max_epochs), ("epochs", settings.get("epochs"))):
        if most and epochs > most:
            print(f"note: this run is as long as all text {epochs:.1f} times and cannot keep to "
                  f"{flag(name)} {most:g}; it reads each group equally often")


def check_steps(config, history, keeper):
    """Raise ValueError if the method did not train the main run for --steps steps; its checkpoint
    is kept, in case that it forgot the last ones."""
    trained = steps_taken(history.rows)["main"]
    if trained != config.steps:
        keeper.save()
        raise ValueError(f"{config.method} trained the main run for {trained} steps; its Train "
                         f"requests have to add up to --steps {config.steps} (if it forgot the "
                         "last ones, add them and go on with --resume)")


def tell_idle(config, history, took_over):
    """Say which flags changed nothing, where only the whole run shows it."""
    if config.past and not took_over:
        print(f"note: --past changed nothing: {config.method} asked for none of its runs")
    if config.scratch < 1 and not set(steps_taken(history.rows)) - {"main"}:
        print("note: --scratch changed nothing: this run needed no extra ones")


def folder_name(config, settings, groups):
    """METHOD-GROUPS-sSEED, and the flags that are not the defaults. (Where two runs share a name,
    as two folders of text may, `refuse_other_run` keeps them apart.)"""
    usual = settings_of(aioli.METHODS.get(config.method, aioli.stratified))
    given = {**dataclasses.asdict(config), **settings, "data": Path(config.data).name}
    usual = {**dataclasses.asdict(Config()), **usual}
    left_out = {"method", "groups", "seed", *MAY_CHANGE} - {"data"}
    words = [f"{name.replace('_', '-')}-{value}" for name, value in given.items()
             if name not in left_out and value != usual[name]]
    name = "-".join([config.method, "+".join(groups), f"s{config.seed}", *words])
    return fit_for_disk(re.sub(r"[^\w.+-]+", "_", name))


def fit_for_disk(name):
    """A name of a folder, cut if it is long; what was cut off is told apart by a digest."""
    raw = name.encode()
    cut = raw[:LONGEST_NAME].decode(errors="ignore")
    return name if len(raw) <= LONGEST_NAME else f"{cut}-{hashlib.md5(raw).hexdigest()[:8]}"


def refuse_other_run(out, config, flags):
    """A folder that holds a stopped run is for going on with it, and one with a finished run for
    the same run again. Raises ValueError."""
    checkpoint, finished = out / "checkpoint.pt", out / "result.json"
    if checkpoint.exists() and not config.resume:
        raise ValueError(f"{checkpoint} is of a run that was stopped; go on with --resume, "
                         f"delete it, or use another --out")
    if finished.exists():
        result = read_result(finished)
        theirs = flags_of(result["config"], result["settings"], result.get("text"))
        other = difference(theirs, flags, MAY_CHANGE)
        if other:
            raise ValueError(f"{out} has a finished run with {other}; use another --out")


def program(config, settings, history):
    """The generator that config asks for: a method, alone or on top of a prior, under --max-epochs.
    ValueError."""
    method = functools.partial(pick("method", config.method, aioli.METHODS), **settings)
    generator = on_prior(config, method, history) if config.prior else method(history, config.steps)
    if not inspect.isgenerator(generator):
        raise ValueError(f"{config.method} is no method: it has to yield its requests")
    if config.max_epochs:
        return aioli.capped(history, config.steps, generator, config.max_epochs)
    return generator


def on_prior(config, method, history):
    """The generator of a method on top of --prior. ValueError."""
    starts_anywhere = "start" in inspect.signature(method).parameters
    if config.restart == "prior" and not starts_anywhere:
        raise ValueError(f"--restart prior: {config.method} always starts from uniform; use "
                         f"--restart uniform or aioli")
    if "+" in config.prior:
        aioli.parse_mixture(config.prior, history.groups, "--prior")
        prior = functools.partial(aioli.fixed, mixture=config.prior)
    else:
        prior = pick("prior", config.prior, aioli.METHODS)
    return aioli.with_prior(history, config.steps, method, prior, config.first, config.restart)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


@contextmanager
def handling(handler):
    """Give the signals that ask a program to end to this function, as long as the block lasts."""
    is_main = threading.current_thread() is threading.main_thread()     # no other can take them
    before = {number: signal.signal(number, handler) for number in SIGNALS if is_main}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def plain_names(names):
    """Names without what all of them begin or end with (train_the_pile_, _val_loss)."""
    to_separator = r".*[_/ ]|"
    backwards = [name[::-1] for name in names]
    front = len(re.match(to_separator, os.path.commonprefix(names))[0])
    back = len(re.match(to_separator, os.path.commonprefix(backwards))[0])
    plain = [name[front:len(name) - back] for name in names]
    return plain if all(plain) else names                           # front and back overlap


class Progress:
    """While training: in a terminal one line that updates itself and one per new mixture, else a
    line every tenth of each run."""

    def __init__(self, config, groups):
        self.batch_tokens = config.batch * model.PRESETS[config.preset].window
        self.groups = [name[:14] for name in plain_names(groups)]
        self.live = sys.stdout.isatty()
        self.began = time.perf_counter()
        self.shown, self.steps = 0.0, 0
        self.where, self.p = "", None

    def step(self, request, run, loss):
        """After a step: the line, five times a second in a terminal, else ten times a run."""
        self.steps += 1
        self.where = f"{run.name} {run.step}/{run.total_steps}"
        if self.live and time.perf_counter() > self.shown + 0.2:
            line = self.line(request, run, loss)[:shutil.get_terminal_size().columns - 1]
            print(f"\r{line}\033[K", end="", flush=True)
            self.shown = time.perf_counter()
        elif not self.live and 10 * run.step % run.total_steps < 10:
            print(self.line(request, run, loss), flush=True)

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
        if self.live and self.p is not None and not np.array_equal(request.p, self.p):
            print(f"\r{self.where}  mixture now {self.mixture(request.p)}  "
                  f"mean validation loss {row.reply.mean():.4f}\033[K")
        self.p = request.p

    def mixture(self, p):
        shares = [f"{share:.3f}".removeprefix("0") for share in p]
        return "  ".join(map(" ".join, zip(self.groups, shares, strict=True)))


# --- The result.


def summarise(config, settings, trainer, history, wall):
    """The result of a finished run, as saved in result.json. wall: seconds so far."""
    groups, main, began = trainer.corpus.groups, trainer.run("main"), time.perf_counter()
    test = trainer.validate(main, trainer.test)                     # (m,)
    wall += time.perf_counter() - began

    rows = [row for row in history.trained() if row.request.steps]
    probes = [row.request.steps for row in rows if row.request.probe]
    steps = steps_taken(history.rows)
    window = config.batch * trainer.shape.window                    # tokens of a step
    training_seconds = max(wall - trainer.eval_seconds, 1e-9)
    speed = sum(steps.values()) * window / training_seconds         # tokens per second
    windows = history.read()[-1]
    mixtures = mixtures_of(history, groups)

    return dict(
        method=config.method, groups=groups, text=trainer.corpus.digest, seed=config.seed,
        preset=config.preset, steps=steps["main"], tokens=steps["main"] * window,
        params=sum(weight.numel() for weight in main.model.parameters()),
        extra_steps=sum(steps.values()) - steps["main"], probe_steps=sum(probes),
        wall_seconds=round(wall, 2), eval_seconds=round(trainer.eval_seconds, 2),
        tokens_per_second=round(speed),
        mfu=model.mfu(main.model, speed / trainer.world, trainer.device),
        test_loss=named(groups, test), test_ppl=named(groups, np.exp(test)),
        avg_test_loss=float(test.mean()), avg_test_ppl=float(np.exp(test).mean()),
        **bits_of(trainer.corpus, test),
        val_loss=named(groups, rows[-1].reply), final_mixture=mixtures[-1][1],
        realised_mixture=named(groups, windows / windows.sum()),
        epochs=named(groups, main.sampler.epochs), mixtures=mixtures, curve=trainer.curve,
        settings=settings, config=dataclasses.asdict(config), versions=versions(config))


def bits_of(corpus, test):
    """Test losses (m,), nats per token, in bits per byte of the test text, whatever the tokeniser:
    test_bits and avg_test_bits of result.json, or neither where the bytes are not known."""
    per_token = corpus.bytes_per_token("test")
    if per_token is None:
        return {}
    bits = test / (math.log(2) * per_token)
    return dict(test_bits=named(corpus.groups, bits), avg_test_bits=float(bits.mean()))


def named(groups, values):
    """{group: value}, as JSON can hold it."""
    return {group: float(value) for group, value in zip(groups, values, strict=True)}


def mixtures_of(history, groups):
    """[step, {group: share}] of each mixture of the main run, probes left out."""
    asked = [row.request for row in history.trained()]
    ends = np.cumsum([request.steps for request in asked]).tolist()
    mixtures = [[end - request.steps, named(groups, request.p)]
                for end, request in zip(ends, asked, strict=True)
                if request.steps and not request.probe]
    return mixtures or [[0, named(groups, asked[0].p)]]             # every step was a probe


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
    bits = f"bits per byte {result['avg_test_bits']:.4f}   " if "avg_test_bits" in result else ""
    print(f"average test perplexity {result['avg_test_ppl']:.3f}   "
          f"average test loss {result['avg_test_loss']:.4f}   {bits}"
          f"{result['wall_seconds']:.0f} s   "
          f"{result['tokens_per_second'] / 1000:.1f}k tok/s   {result['extra_steps']} extra steps"
          + (f"   MFU {result['mfu']:.0%}" if result.get("mfu") else ""))


def against_uniform(config, result, out):
    """The closing line: how uniform sampling does at the same, or which command tells."""
    if config.method == "stratified" and not config.prior:
        return
    usual = {name: getattr(Config, name) for name in (*OF_MIXTURE, "out", "resume")}
    uniform = dataclasses.replace(config, **{**usual, "method": "stratified"})
    found, folder = finished_like(flags_of(uniform, {}, result["text"]), out)
    if found is None:
        command = shlex.join(["python", "train.py", *flags_given(uniform)])
        print(f"for comparison, uniform sampling: {command}")
        return
    ours, theirs = result["avg_test_ppl"], found["avg_test_ppl"]
    print(f"uniform sampling: average test perplexity {theirs:.3f}   "
          f"this run: {ours - theirs:+.3f} ({ours / theirs - 1:+.1%})   ({folder})")


def finished_like(flags, out):
    """A finished stratified run with these flags, beside `out` or in out/ -> its result and its
    folder; None, None if there is none that can be read."""
    for place in (out.parent, Path("out")):
        for path in sorted(place.glob("stratified-*/result.json")):
            with suppress(ValueError):                              # damaged
                found = read_result(path)
                theirs = flags_of(found["config"], {}, found["text"])
                if not difference(theirs, flags, (*MAY_CHANGE, "groups")):
                    return found, path.parent
    return None, None


# --- Pictures.

# Okabe and Ito's, which all eyes can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def pyplot():
    """matplotlib's pyplot, drawing to files, or None after a line that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("for pictures: pip install matplotlib")
        return None
    plt.switch_backend("Agg")
    return plt


def save_figure(figure, path):
    """Write a picture, and free its memory."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # a font that lacks letters says so, each time
        figure.savefig(content, format=path.suffix[1:], dpi=130)
    write(path, content.getvalue())
    pyplot().close(figure)


def picture(result, history, path):
    """run.png: the mixture over steps and the validation losses. Needs matplotlib."""
    plt = pyplot()
    if plt is None:
        return
    at = np.cumsum([row.request.steps for row in history.trained()])
    measured = [*zip(at.tolist(), history.losses().tolist()), *map(tuple, result["curve"])]
    mixtures = [*result["mixtures"], (result["steps"], result["final_mixture"])]
    shares = [list(mixture.values()) for _, mixture in mixtures]    # (n, m)

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for axis in (top, bottom):
        axis.set_prop_cycle(color=COLOURS)
    lines = top.step([step for step, _ in mixtures], shares, where="post")
    bottom.plot(*zip(*sorted(measured)), marker="." if len(measured) == 1 else None)

    names = [name[:14].replace("$", r"\$") for name in plain_names(result["groups"])]
    labels = [f" {name}" if name.startswith("_") else name for name in names]   # _: not shown
    title = f"{result['method']}, seed {result['seed']}"
    top.set(ylabel="mixture (share of windows)", ylim=(0, None), title=title)
    top.legend(lines, labels, ncols=4, fontsize="small", frameon=False)
    bottom.set(xlabel="step", ylabel="validation loss (nats per token)")
    save_figure(figure, path)


# --- Several processes, where torchrun has started them.


@contextmanager
def processes():
    """Join the other processes of torchrun, if there are any. The first alone speaks and writes."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group(timeout=timedelta(days=1))  # the first may prepare text for long
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
        wait()
    except Stop:
        wait()                      # the first still writes, and torchrun ends all with one of them
        raise
    finally:
        dist.destroy_process_group()


def rank():
    """This process's number; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def reduce(tensor):
    """Sum a tensor over all processes, in place -> the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def summed(numbers):
    """The sum over all processes of numbers that are on the CPU, an array."""
    return reduce(torch.from_numpy(np.array(numbers, float))).numpy()


def in_any_process(*wishes):
    """Which of these booleans is true in any process: all act on it alike."""
    return summed(wishes) > 0 if dist.is_initialized() else wishes


def wait():
    """Until all processes are here."""
    reduce(torch.zeros(1))


def first_alone(work):
    """What work() returns, done by the first process before the others: they find its files."""
    if rank():
        wait()
    try:
        return work()
    finally:                        # bad input is told by all alike
        if not rank():
            wait()


# --- The command line: flags are made from Config and from the method's keyword arguments.

# what a single run does not take, flags and, as patterns, values; and which command does
COMPARE, FIDELITY, LAWS = (f"python -m paper.{name}" for name in ("compare", "fidelity", "laws"))
MOVED = {"--quick": COMPARE, "--seeds": COMPARE, "--controls": COMPARE, "--jobs": COMPARE,
         "--fidelity": FIDELITY, "--fork": FIDELITY, "--table": FIDELITY, "--holdout": LAWS,
         "--runs": LAWS}
SEVERAL = dict(method="all|.*[,:].*", prior="all|.*,.*", groups="sets")


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
        else:
            group.add_argument(flag(name), type=type(default), default=default,
                               metavar=name.upper(), help=text)


def settings_of(method):
    """{name: default} of a method's settings, its keyword arguments with a plain default."""
    parameters = inspect.signature(method).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters
            if parameter.default is not parameter.empty and parameter.default is not None}


def defaults_of(argv):
    """The method that a command line names, and the defaults of all flags, {name: value}: those of
    Config, or with --preset paper the paper's. Raises ValueError for what takes a comparison."""
    first = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in (*SEVERAL, "preset"):
        first.add_argument(flag(name))
    given = vars(first.parse_known_args(argv)[0])
    defaults = vars(Config()) | (PAPER if given.get("preset") == "paper" else {})
    for name, pattern in SEVERAL.items():
        if re.fullmatch(pattern, given.get(name, "")):
            raise ValueError(f"{flag(name)} {given[name]} is for a comparison; use {COMPARE}")
    return given.get("method", defaults["method"]), defaults


def check_names(method, settings):
    """Raise ValueError for a setting of a method, {name: default}, that can be no flag."""
    for name, default in settings.items():
        if name in (*vars(Config()), "text", "help"):
            raise ValueError(f"{method}'s setting {name!r} is the name of a flag of every run; "
                             "call it something else")
        if default is True or not isinstance(default, (str, int, float)):
            raise ValueError(f"{method}'s setting {name!r} can be no flag; let its default be a "
                             "number, text or False")


def parse(argv):
    """Command line -> Config, settings of the method. Raises ValueError naming the nearest flag."""
    name, fields = defaults_of(argv)
    method = pick("method", name, aioli.METHODS)
    settings = settings_of(method)
    check_names(name, settings)
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = dict(method=f"how the mixture is chosen: {', '.join(aioli.METHODS)}",
                 preset=f"shape of the model: {', '.join(model.PRESETS)}; or paper: pythia-160m, "
                        "and aioli_published, 5,000 steps and a rate of 5e-4 if not given")
    add_flags(parser.add_argument_group("a run"), fields, help_of(Config) | names)
    if settings:
        add_flags(parser.add_argument_group(f"settings of {name}"), settings, help_of(method))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown(unknown[0], name, sorted(parser._option_string_actions))
    given = vars(given)
    pick("preset", given["preset"], {**model.PRESETS, "paper": None})
    if given["preset"] == "paper":
        given["preset"] = fields["preset"]
    refuse_idle(given)
    settings = {setting: given[setting] for setting in settings}
    aioli.check(**settings)
    return Config(**{field: given[field] for field in fields}), settings


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
    for name in ("first", "restart"):
        if not given["prior"] and given[name] != getattr(Config, name):
            raise ValueError(f"{flag(name)} changes nothing without --prior; leave it out")


class Unbroken:
    """A stream of text that ends no run: its reader may go away, or know few letters."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")               # None: closed at the start
        self.isatty = self.stream.isatty
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")

    def write(self, text):
        """Write and flush, or from now on write to nowhere."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:                                             # what is left would fail, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        """Nothing waits."""


def exit_code(name, command):
    """Call `command` -> 0; 2 for bad input, 1 for a machine or a method that fails, with a line on
    stderr that begins with `name`; 130 after Ctrl-C or a signal to end. Never a traceback."""
    out, err = Unbroken(sys.stdout), Unbroken(sys.stderr)
    with (redirect_stdout(out), redirect_stderr(err), plain_warnings(),
          handling(signal.default_int_handler)):
        try:
            command()
        except (Stop, KeyboardInterrupt) as error:
            print(f"\n{str(error) or 'stopped'}", file=sys.stderr)
            return 130
        except Exception as error:
            print(f"{name}: {in_a_line(error)}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 1
    return 0


@contextmanager
def plain_warnings():
    """A warning is a line that says what is wrong, without the place in the code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"note: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def in_a_line(error):
    """What an error says, what to do if the memory is full, and where, if no `raise` of ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; set --micro-batch, or lower --batch"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the memory is full; lower --steps or --batch"
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"
    ours = frame.line.startswith("raise ")
    return f"{kind}{error}{'' if ours else where}".replace("\n", " ")


def main(argv=None):
    """The command line, or argv -> exit code."""
    def command():
        with processes():
            train(*parse(sys.argv[1:] if argv is None else argv))

    return exit_code("train.py", command)


def leave(code):
    """End this process. Under torchrun at once: at the end of Python torch's threads may still be
    at work, and now and then abort a run that is whole."""
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
