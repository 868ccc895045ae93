"""What mixing costs beside training: steps of methods, arithmetic of rounds, batches, preparing.

Measured by `python -m paper.bench`.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import aioli
import data
import train

BATCH = 8
MEGABYTES = 100                             # of text that is prepared
PREPARE = """
import resource, sys, time, data
began = time.perf_counter()
data.load(data=sys.argv[1], cache=sys.argv[2], progress=None)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def seconds_of(action, *arguments):
    """How long a call takes."""
    began = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - began


def made_up(m, tokens=200_000, vocab=1024):
    """A Corpus of m groups of random tokens: costs do not depend on what they say."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, vocab, tokens).astype(np.uint16) for _ in range(m)]
    names = [f"group{j}" for j in range(m)]
    return data.Corpus(names, vocab, texts, texts, texts, manifest={})


# ---- a step of each kind that methods ask for


def step_costs(m, turns, steps=20):
    """{what: its step as a multiple of a plain step}, medians of the turns, m groups."""
    corpus, uniform = made_up(m), np.full(m, 1 / m)
    trainer = train.Trainer(train.Config(preset="laptop", val_windows=4), corpus)
    trainer.answer(aioli.Train(uniform, 1, on="reference"))

    def plain():
        trainer.answer(aioli.Train(uniform, steps))

    def peeking(against):
        for _ in range(steps):
            trainer.answer(aioli.Peek(uniform, 10 ** 6, "proxy", against))
            trainer.answer(aioli.Update(uniform, "proxy"))

    kinds = dict(plain=plain, doremi=lambda: peeking("reference"), doge=lambda: peeking(""))
    seconds = np.empty((turns, len(kinds)))
    with train.no_denormals():
        for row in seconds:
            row[:] = [seconds_of(kind) for kind in kinds.values()]
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    return dict(zip(kinds, ratios))


# ---- batches and rounds


def batches_per_second(m, seconds=1.0):
    """How many batches the sampler draws with m groups."""
    sampler = data.Sampler(made_up(m, tokens=64 * 200).train, [str(j) for j in range(m)], 64, BATCH,
                           seed=0)
    n, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        sampler.plan(np.full(m, 1 / m), 500)
        for _ in range(500):
            sampler.batch()
        n += 500
    return n / (time.perf_counter() - began)


def round_milliseconds(m, turns):
    """Medians of what a round decides with, {what: ms}: a step on a given A, the sampler's plan."""
    rng = np.random.default_rng(0)
    A, p = rng.normal(size=(m, m)), np.full(m, 1 / m)
    sampler = data.Sampler(made_up(m, tokens=64 * 200).train, [str(j) for j in range(m)], 64, BATCH,
                           seed=0)

    def plan():
        sampler.plan(p, 1000)
        sampler.at = len(sampler.order)

    def median(action):
        return 1000 * np.median([seconds_of(action) for _ in range(turns)])

    return dict(step=median(lambda: aioli.lmo_step(p, aioli.normalise(A), .2)), plan=median(plan))


# ---- text


def write_text(folder, megabytes):
    """Two groups of made-up text of so many MB in all, no paragraph twice."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(1, 12, 30_000)])
    for name in ("one", "two"):
        with open(folder / f"{name}.txt", "w") as file:
            while file.tell() < megabytes * 5e5:
                picked = words[np.minimum(rng.zipf(1.3, 20_000), len(words)) - 1]
                file.writelines(" ".join(part) + "\n\n" for part in picked.reshape(-1, 200))


def preparing(megabytes):
    """Prepare made-up text in a process of its own -> MB/s, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text")
        text.mkdir()
        write_text(text, megabytes)
        ended = subprocess.run([sys.executable, "-c", PREPARE, str(text), str(Path(folder, "c"))],
                               capture_output=True, text=True, check=True,
                               cwd=Path(data.__file__).parent)
    seconds, peak = map(float, ended.stdout.split())
    return megabytes / seconds, peak


def measure(turns):
    """Measure and print all of it."""
    speed, peak = preparing(MEGABYTES)
    print(f"preparing {MEGABYTES} MB of text: {speed:.1f} MB/s, peak memory {peak:.0f} MB")
    for m in (2, 3, 7):
        ratios = step_costs(m, turns)
        print(f"{m} groups: a step of DoReMi's proxy costs {ratios['doremi']:.2f}, one of DoGE's "
              f"{ratios['doge']:.2f} plain steps", flush=True)
    few, many = batches_per_second(7), batches_per_second(1000)
    print(f"batches per second: {few:.0f} with 7 groups, {many:.0f} with 1,000")
    parts = [f"{name} {ms:.1f} ms" for name, ms in round_milliseconds(1000, turns).items()]
    print(f"a round with 1,000 groups: {', '.join(parts)}")
