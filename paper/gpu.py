"""What training costs on a GPU: speed, share of the card's peak, memory; every method's whole run.

    python -m paper.gpu                                 # pythia-160m: six minutes on an H100
    python -m paper.gpu --preset laptop --steps 200     # another model; on a CPU, too

Text does not matter here and is random. The first runs warm up, so that compiling is not counted,
and validation is left out of their speed; a method's run is counted whole, as it is used.
That of regmix needs LightGBM (pip install lightgbm).
"""
import argparse
import sys
import time

import numpy as np
import torch

import aioli
import model
import train
from paper import costs

GROUPS = 3
WARM_UP = 20                                # steps
FORMS = {"as it is": {}, "--compile": dict(compile=True), "--micro-batch 2": dict(micro_batch=2)}
SETTINGS = {                                # of methods whose own do not fit into a hundred steps
    "aioli_rounds": dict(rounds=4), "grid": dict(points=4), "dml": dict(points=4),
    "power": dict(points=4), "olmix": dict(points=4), "regmix": dict(points=4)}


def trainer_of(flags, **changes):
    """A Trainer on random tokens of GROUPS groups."""
    config = train.Config(preset=flags.preset, batch=flags.batch, steps=flags.steps, lr=5e-4,
                          device=flags.device, val_windows=4, test_windows=4, **changes)
    vocab = model.PRESETS[flags.preset].vocab
    return train.Trainer(config, costs.made_up(GROUPS, tokens=2_000_000, vocab=vocab))


def gigabytes(trainer):
    """The largest memory that tensors took on the GPU since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2 ** 30 if trainer.device.type == "cuda" else 0.0


def forget_peak(trainer):
    """Count memory from here on."""
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def speed(flags, name, changes):
    """Print the speed of training in one form, validation left out."""
    trainer = trainer_of(flags, **changes)
    uniform = np.full(GROUPS, 1 / GROUPS)
    forget_peak(trainer)
    trainer.answer(aioli.Train(uniform, WARM_UP))

    began, validating = time.perf_counter(), trainer.eval_seconds
    trainer.answer(aioli.Train(uniform, flags.steps))
    seconds = time.perf_counter() - began - (trainer.eval_seconds - validating)
    per_second = flags.steps * flags.batch * trainer.shape.window / seconds
    share = model.mfu(trainer.run("main").model, per_second, trainer.device)
    print(f"{name:<16} {1000 * seconds / flags.steps:8.1f} ms a step {per_second / 1e3:8.1f}k tok/s"
          f"   MFU {share or 0:5.1%}  {gigabytes(trainer):6.1f} GB", flush=True)


def whole_run(flags, name):
    """Print what a method's run takes, scratch runs and validations included. ValueError."""
    trainer = trainer_of(flags)
    sizes = [len(tokens) for tokens in trainer.corpus.train]
    history = aioli.History(trainer.corpus.groups, sizes, flags.batch, window=trainer.shape.window)
    method = aioli.METHODS[name](history, flags.steps, **SETTINGS.get(name, {}))
    forget_peak(trainer)

    began = time.perf_counter()
    train.drive(method, trainer, history)
    seconds = time.perf_counter() - began
    taken = train.steps_taken(history.rows)
    extra = sum(taken.values()) - taken["main"]
    loss = history.losses()[-1].mean()
    print(f"{name:<20} {seconds:7.1f} s  {extra:5} extra steps  "
          f"{1000 * seconds / sum(taken.values()):7.1f} ms a step  {gigabytes(trainer):6.1f} GB  "
          f"validation loss {loss:.3f}", flush=True)


def measure(flags):
    """Measure and print all of it."""
    device = train.device(flags.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shape = model.PRESETS[flags.preset]
    print(f"{name}, torch {torch.__version__}: {flags.preset}, {flags.batch} x {shape.window} "
          f"tokens a step", flush=True)
    for form, changes in FORMS.items():
        speed(flags, form, changes)

    print(f"\nwhole runs of {flags.steps} steps:")
    for method in aioli.METHODS:
        try:
            whole_run(flags, method)
        except ValueError as error:                                     # an optional package
            print(f"{method:<20} {error}")


def main(argv=None):
    """The command line; exit code as train.py's."""
    parser = train.Parser(prog="python -m paper.gpu", description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pythia-160m",
                        help=f"shape of the model: {', '.join(model.PRESETS)} [pythia-160m]")
    parser.add_argument("--batch", type=int, default=8, help="windows per step [8]")
    parser.add_argument("--steps", type=int, default=100, help="of a run [100]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    return train.exit_code("paper.gpu", lambda: measure(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
