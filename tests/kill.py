"""Runs that are killed at random moments and resumed end as if nothing had happened, to the bit.

    python tests/kill.py                                # 10 kills a method: a table, 20 minutes
    python tests/kill.py --kills 2 --methods doge

Each method trains once in peace. Then the same command is killed (SIGKILL) again and again, and
given again with --resume until it ends. Losses, mixtures and the weights in model.pt must be the
same. Moments are drawn over the whole run, in scratch runs, probes, validations, between a Peek and
its Update and while a checkpoint is written, of which there is one every few steps here.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train                                                # noqa: E402

METHODS = ("stratified", "skillit", "doremi", "doge", "grape", "dml", "aioli", "aioli_published",
           "horizon", "aioli --prior doge")
SMALL = ["--groups", "tables+csv", "--steps", "120", "--val-windows", "4", "--test-windows", "8",
         "--save-every", "3"]


def work(arguments):
    """The life of a process: one run."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(train.main(arguments))


def start(method, out, flags):
    """Begin the run, or go on -> its process, once it has made a checkpoint or has ended."""
    checkpoint, before = out / "checkpoint.pt", moved(out / "checkpoint.pt")
    arguments = ["--method", *method.split(), "--out", str(out), *flags, "--resume"]
    process = multiprocessing.get_context("fork").Process(target=work, args=[arguments])
    process.start()
    while process.is_alive() and moved(checkpoint) <= before:
        time.sleep(.002)
    return process


def end(process):
    """Wait for its end, which must be a good one."""
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a run ended with code {process.exitcode}")


def killed(method, out, flags, kills, seconds, rng):
    """The run with kills, spread over the seconds that it takes -> how many hit it."""
    for hits in range(kills):
        process = start(method, out, flags)
        time.sleep(rng.uniform(0, 1.2 * seconds / kills))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return hits                                     # it was quicker
    end(start(method, out, flags))
    return kills


def moved(path):
    """When a file was last changed, 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def differences(one, two):
    """In what two finished runs differ, a word each."""
    found = []
    results = [json.loads((out / "result.json").read_text()) for out in (one, two)]
    for name in ("test_loss", "val_loss", "mixtures", "curve", "realised_mixture", "epochs"):
        if results[0][name] != results[1][name]:
            found.append(name)
    weights = [torch.load(out / "model.pt", weights_only=True)["weights"] for out in (one, two)]
    found += [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    return found


def kill_and_compare(method, folder, flags, kills, seed):
    """-> kills that hit the run, and what it differs in from the one in peace."""
    name = method.replace(" ", "-")
    whole, cut = folder / f"{name}-whole", folder / f"{name}-cut"
    process = start(method, whole, flags)
    began = time.perf_counter()
    end(process)
    seconds = time.perf_counter() - began
    hits = killed(method, cut, flags, kills, seconds, random.Random(seed))
    return hits, differences(whole, cut)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    mismatches = 0
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods:
            hits, found = kill_and_compare(method, Path(folder), SMALL, given.kills, given.seed)
            mismatches += bool(found)
            print(f"{method:<20}{hits:>3} kills   {', '.join(found) or 'the same to the bit'}",
                  flush=True)
    return mismatches


if __name__ == "__main__":
    sys.exit(main())
