"""Training speed beside nanoGPT's: tokens per second, in one run.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python -m paper.bench --nanogpt ../nanoGPT

Both train on random tokens with the same layers, heads, width, window, batch, vocabulary and
threads: ours as train.py does, nanoGPT with its own model, optimiser, clipping and way to draw a
batch. Each is a process of its own. They take turns; what is printed are the medians of the turns,
and the median of their ratios.
"""
import argparse
import contextlib
import importlib.util
import io
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import aioli
import model
import train

SHAPES = {
    "laptop": model.PRESETS["laptop"],
    "3.4M": model.Shape(layers=4, heads=4, width=256, window=128, vocab=1024, rotary=1, shift=.5),
}
BATCH = 8                                   # windows per step


def random_tokens(shape):
    """A million tokens, which no model can learn: speed does not depend on them."""
    return np.random.default_rng(0).integers(0, shape.vocab, 10 ** 6).astype(np.uint16)


def ours(name, threads):
    """A function that trains n steps as train.py does -> seconds without validation."""
    shape = model.PRESETS[name] = SHAPES[name]
    config = train.Config(preset=name, batch=BATCH, threads=threads, steps=10 ** 9, val_windows=1,
                          eval_every=10 ** 9)
    text = [random_tokens(shape)]
    corpus = SimpleNamespace(groups=["random"], train=text, val=text, test=text, vocab=shape.vocab)
    trainer = train.Trainer(config, corpus)

    def steps(n):
        began, validation = time.perf_counter(), trainer.eval_seconds
        with train.no_denormals():
            trainer.answer(aioli.Train(np.ones(1), n))
        return time.perf_counter() - began - (trainer.eval_seconds - validation)

    return steps


def nanogpt(folder, name, threads):
    """As ours(), with the model and the optimiser of a nanoGPT checkout."""
    torch.set_num_threads(threads)
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = theirs
    spec.loader.exec_module(theirs)

    shape = SHAPES[name]
    config = theirs.GPTConfig(block_size=shape.window, vocab_size=shape.vocab, bias=True,
                              n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width)
    with contextlib.redirect_stdout(io.StringIO()):
        gpt = theirs.GPT(config)
        optimizer = gpt.configure_optimizers(.1, 1e-3, (.9, .95), "cpu")
    text = torch.from_numpy(random_tokens(shape).astype(np.int64))

    def steps(n):
        began = time.perf_counter()
        for _ in range(n):
            starts = torch.randint(len(text) - shape.window, (BATCH,))
            x = torch.stack([text[i:i + shape.window] for i in starts])
            y = torch.stack([text[i + 1:i + 1 + shape.window] for i in starts])
            _, loss = gpt(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return steps


def take_turns(flags):
    """The process of one side: for each number on a line of its input, train so many steps."""
    side = nanogpt(flags.nanogpt, flags.shape, flags.threads) if flags.side == "nanogpt" \
        else ours(flags.shape, flags.threads)
    for line in sys.stdin:
        print(side(int(line)), flush=True)


def start(flags, name, side):
    """A process that trains as many steps as it is told, and answers with the seconds."""
    command = [sys.executable, "-m", "paper.bench", "--nanogpt", flags.nanogpt, "--shape", name,
               "--threads", str(flags.threads), "--side", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(process, steps):
    """Let one side train -> seconds per step."""
    print(steps, file=process.stdin, flush=True)
    return float(process.stdout.readline()) / steps


def compare(flags, name):
    """Let the two sides take turns and print a line."""
    sides = [start(flags, name, side) for side in ("ours", "nanogpt")]
    for side in sides:
        turn(side, 5)                                           # warm-up
    steps = max(1, round(flags.seconds / turn(sides[1], 5)))
    seconds = np.empty((flags.turns, 2))                        # of a step: ours, nanoGPT's
    for row in seconds:
        row[:] = [turn(side, steps) for side in sides]
    for side in sides:
        side.communicate()

    tokens = BATCH * SHAPES[name].window / 1e3
    ours_speed, their_speed = tokens / np.median(seconds, axis=0)
    ratios = seconds[:, 1] / seconds[:, 0]
    low, high = np.percentile(ratios, [25, 75])
    print(f"{name:8} ours {ours_speed:6.1f}k tok/s   nanoGPT {their_speed:6.1f}k tok/s   "
          f"ratio {np.median(ratios):.2f} (half of {flags.turns} turns: {low:.2f} to {high:.2f})")


def parse(argv):
    """The command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nanogpt", required=True, help="folder of a nanoGPT checkout")
    parser.add_argument("--threads", type=int, default=1, help="of each side [1]")
    parser.add_argument("--turns", type=int, default=15, help="of each side [15]")
    parser.add_argument("--seconds", type=float, default=2, help="that a turn takes, about [2]")
    parser.add_argument("--side", choices=("ours", "nanogpt"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    """Measure all shapes, or be one side of it; exit code as train.py's."""
    def command():
        flags = parse(argv)
        if not (Path(flags.nanogpt) / "model.py").exists():
            raise ValueError(f"no model.py in {flags.nanogpt}; give the folder of a nanoGPT "
                             "checkout")
        if flags.side:
            return take_turns(flags)
        print(f"torch {torch.__version__}, {flags.threads} thread(s) a side, two processes in turn")
        for name in SHAPES:
            compare(flags, name)

    return train.exit_code("paper.bench", command)


if __name__ == "__main__":
    sys.exit(main())
