"""What it costs: training beside nanoGPT, a method's step, its arithmetic, a batch, preparing text.

    python -m paper.bench                               # what needs no nanoGPT: two minutes
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python -m paper.bench --nanogpt ../nanoGPT          # all of it: half an hour

Every figure is a ratio of two things that took turns in one run, or a median of several. nanoGPT
and ours train on the same text with the same layers, heads, width, window, batch, vocabulary and
threads: ours as train.py does, nanoGPT with its own model, optimiser, clipping, schedule and way to
draw a batch. Each is a process of its own. The rest is measured in paper/costs.py.
"""
import argparse
import contextlib
import importlib.util
import io
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import aioli
import data
import model
import train
from paper import costs

SHAPES = {
    "laptop": model.PRESETS["laptop"],
    "3.4M": model.Shape(layers=4, heads=4, width=256, window=128, vocab=1024, rotary=1, shift=.5),
}
BATCH = 8                                   # windows per step
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)    # learning rates that each side may choose from
POINTS = 40                                 # of a race's loss curve
WINDOWS = 64                                # of each group, to validate on


class Ours:
    """Training as train.py does it, on equal shares of all groups."""

    def __init__(self, flags):
        model.PRESETS[flags.shape] = SHAPES[flags.shape]
        config = train.Config(preset=flags.shape, batch=BATCH, threads=flags.threads,
                              steps=flags.steps, lr=flags.lr, val_windows=WINDOWS,
                              eval_every=10 ** 9)
        corpus = data.load(progress=None)
        self.trainer, self.p = train.Trainer(config, corpus), np.ones(len(corpus.groups))
        self.p /= self.p.sum()

    def train(self, n):
        """n steps -> their seconds, without validation."""
        began, validation = time.perf_counter(), self.trainer.eval_seconds
        with train.no_denormals():
            self.trainer.answer(aioli.Train(self.p, n))
        return time.perf_counter() - began - (self.trainer.eval_seconds - validation)

    def loss(self):
        """Validation loss, the mean over groups, nats per token."""
        return float(self.trainer.validate(self.trainer.run("main")).mean())


class NanoGPT:
    """The same with the model and the optimiser of a nanoGPT checkout, as its train.py does it."""

    def __init__(self, flags):
        torch.set_num_threads(flags.threads)
        torch.manual_seed(0)
        theirs = load_module(Path(flags.nanogpt) / "model.py")
        shape, self.flags, self.step = SHAPES[flags.shape], flags, 0
        config = theirs.GPTConfig(block_size=shape.window, vocab_size=shape.vocab, bias=True,
                                  dropout=0.0, n_layer=shape.layers, n_head=shape.heads,
                                  n_embd=shape.width)
        with contextlib.redirect_stdout(io.StringIO()):
            self.gpt = theirs.GPT(config)
            self.optimizer = self.gpt.configure_optimizers(.1, flags.lr, (.9, .95), "cpu")

        corpus = data.load(progress=None)
        self.window = shape.window
        self.texts = [torch.from_numpy(tokens.astype(np.int64)) for tokens in corpus.train]
        parts = [data.fixed_windows(text, self.window, WINDOWS, 1, name)
                 for text, name in zip(corpus.val, corpus.groups)]
        self.val = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in parts]

    def batch(self):
        """BATCH windows, each at a random place of a random group: x, y (B, T)."""
        texts = [self.texts[j] for j in torch.randint(len(self.texts), (BATCH,))]
        starts = [int(torch.randint(len(text) - self.window, (1,))) for text in texts]
        rows = [text[i:i + self.window + 1] for text, i in zip(texts, starts)]
        return torch.stack([row[:-1] for row in rows]), torch.stack([row[1:] for row in rows])

    def rate(self):
        """Linear warm-up in a tenth of the steps, then a cosine to a tenth of the rate."""
        t, warmup = (self.step + 1) / self.flags.steps, .1
        if t < warmup:
            return self.flags.lr * t / warmup
        left = (1 + math.cos(math.pi * min(1, (t - warmup) / (1 - warmup)))) / 2
        return self.flags.lr * (.1 + .9 * left)

    def train(self, n):
        """As Ours."""
        began = time.perf_counter()
        for _ in range(n):
            for part in self.optimizer.param_groups:
                part["lr"] = self.rate()
            _, loss = self.gpt(*self.batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return time.perf_counter() - began

    @torch.no_grad()
    def loss(self):
        """As Ours."""
        return float(np.mean([float(self.gpt(x, y)[1]) for x, y in self.val]))


SIDES = dict(ours=Ours, nanogpt=NanoGPT)


def load_module(path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    return module


def be_a_side(flags):
    """The process of one side: each line of its input says what to do; it answers with a number."""
    side = SIDES[flags.side](flags)
    for line in sys.stdin:
        action, *number = line.split()
        print(getattr(side, action)(*map(int, number)), flush=True)


class Process:
    """A side in a process of its own, which does what it is told."""

    def __init__(self, flags, side, shape, lr=RATES[0], steps=10 ** 9):
        command = [sys.executable, "-m", "paper.bench", "--nanogpt", flags.nanogpt, "--side", side,
                   "--shape", shape, "--threads", str(flags.threads), "--lr", str(lr),
                   "--steps", str(steps)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, *words):
        """-> its answer, a number."""
        print(*words, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


# ---- the two measurements


def speed(flags, name):
    """Seconds of a step, (turns, 2): ours and nanoGPT's, who take turns; a line is printed."""
    sides = [Process(flags, side, name) for side in SIDES]
    for side in sides:
        side.ask("train", 5)                                    # warm-up
    steps = max(1, round(flags.seconds / sides[1].ask("train", 5) * 5))
    seconds = np.empty((flags.turns, 2))
    for row in seconds:
        row[:] = [side.ask("train", steps) / steps for side in sides]
    for side in sides:
        side.end()

    tokens = BATCH * SHAPES[name].window / 1e3
    ours_speed, their_speed = tokens / np.median(seconds, axis=0)
    ratios = seconds[:, 1] / seconds[:, 0]
    low, high = np.percentile(ratios, [25, 75])
    print(f"{name:8} ours {ours_speed:6.1f}k tok/s   nanoGPT {their_speed:6.1f}k tok/s   "
          f"ratio {np.median(ratios):.2f} (half of {flags.turns} turns: {low:.2f} to {high:.2f})",
          flush=True)
    return seconds


def curve(flags, side, lr):
    """The validation losses of a run of --race steps, (POINTS,), at this peak learning rate."""
    process = Process(flags, side, "laptop", lr, flags.race)
    losses = []
    for n in aioli.split(flags.race, POINTS):
        process.ask("train", n)
        losses.append(process.ask("loss"))
    process.end()
    return np.array(losses)


def race(flags, seconds):
    """Print how soon ours has nanoGPT's final loss, each at its best rate.

    seconds: of a step, as speed() returns them."""
    best = {}
    with ThreadPoolExecutor(2) as pool:                         # a side each
        for side in SIDES:
            best[side] = pool.submit(search, flags, side)
    (our_lr, ours), (their_lr, theirs) = (best[side].result() for side in SIDES)

    ends = np.cumsum(aioli.split(flags.race, POINTS))
    reached = np.flatnonzero(ours <= theirs[-1])
    print(f"nanoGPT, lr {their_lr:g}: {theirs[-1]:.3f} nats after {flags.race} steps; ours, "
          f"lr {our_lr:g}: {ours[-1]:.3f}")
    if not len(reached):
        return print("which ours does not reach")
    share = ends[reached[0]] / flags.race
    ratio = share * np.median(seconds[:, 0] / seconds[:, 1])
    print(f"ours is there after {ends[reached[0]]} steps, {ratio:.2f} of nanoGPT's seconds")


def search(flags, side):
    """The best of RATES for a side, by its final loss -> rate, losses (POINTS,)."""
    found = [(lr, curve(flags, side, lr)) for lr in RATES]
    return min(found, key=lambda pair: pair[1][-1])


def parse(argv):
    """The command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nanogpt", default="", help="folder of a nanoGPT checkout")
    parser.add_argument("--threads", type=int, default=1, help="of each side [1]")
    parser.add_argument("--turns", type=int, default=15, help="of each side [15]")
    parser.add_argument("--seconds", type=float, default=2, help="that a turn takes, about [2]")
    parser.add_argument("--race", type=int, default=2000, help="steps of a run; 0: no race [2000]")
    for name, kind in (("side", str), ("shape", str), ("lr", float), ("steps", int)):
        parser.add_argument("--" + name, type=kind, help=argparse.SUPPRESS)      # of a process
    return parser.parse_args(argv)


def main(argv=None):
    """Measure everything, or be one side of it; exit code as train.py's."""
    def command():
        flags = parse(argv)
        if flags.side:
            return be_a_side(flags)
        if flags.nanogpt and not (Path(flags.nanogpt) / "model.py").exists():
            raise ValueError(f"no model.py in {flags.nanogpt}; give the folder of a nanoGPT "
                             "checkout")
        data.load(progress=None)                                # before two processes want it
        print(f"torch {torch.__version__}, {flags.threads} thread(s) a process", flush=True)
        if flags.nanogpt:
            seconds = {name: speed(flags, name) for name in SHAPES}
            if flags.race:
                race(flags, seconds["laptop"])
        costs.measure(flags.turns)

    return train.exit_code("paper.bench", command)


if __name__ == "__main__":
    sys.exit(main())
