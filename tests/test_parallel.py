"""Several processes, micro-batches and what a GPU gets: the same mixtures and losses as without.

    torchrun --standalone --nproc_per_node=2 tests/test_parallel.py FOLDER TEXT

is the worker of these tests: it makes their runs, as one of two processes.
"""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                   # a worker has no conftest.py

import aioli                                                            # noqa: E402
import model                                                            # noqa: E402
import train                                                            # noqa: E402
from paper import compare                                               # noqa: E402
from tiny import TINY, corpus, run, tiny_preset, trainer                # noqa: E402, F401

METHODS = ("stratified", "aioli", "doremi", "doge", "horizon")
SHORT = dict(preset="tiny", steps=26, batch=6, lr=3e-3, val_windows=5, test_windows=8, eval_every=7)
HALF = np.array([.5, .5])


# --- Several processes ---


def run_all(folder):
    """A short run of each method, in FOLDER/METHOD."""
    for method in METHODS:
        config, settings = short(method, folder / method)
        train.train(config, settings, corpus("cycle", "words", "noise"))


def short(method, out, **more):
    """The Config and the settings of a short run."""
    _, settings = train.parse(["--method", method])
    return train.Config(method=method, out=str(out), **SHORT, **more), settings


def own_text(folder, text):
    """A short run of doremi, in FOLDER/own, on a folder of text."""
    return short("doremi", folder / "own", data=str(text), encoding="bpe300",
                 cache=str(folder / "cache"))


def interrupted(config, settings):
    """A run that the second process alone is asked to stop, and that then goes on."""
    step = train.Progress.step

    def stop_once(self, *about):
        if train.rank() == 1 and self.steps == 33:
            signal.raise_signal(signal.SIGINT)
        step(self, *about)

    train.Progress.step = stop_once
    with pytest.raises(train.Stop):
        train.train(config, settings)
    train.Progress.step = step
    train.wait()                                                # for the checkpoint to be there
    train.train(dataclasses.replace(config, resume=True), settings)


def worker(folder, text):
    """One of two processes. All make the same calls; each names a folder of its own."""
    model.PRESETS["tiny"], train.pyplot = TINY, lambda: None
    with train.processes():
        run_all(Path(folder, f"process-{train.rank()}"))
        interrupted(*own_text(Path(folder), text))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder that two workers wrote to, that of their text, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    text = folder / "texts"
    text.mkdir()
    rng = np.random.default_rng(0)
    for name in ("law", "code"):
        paragraphs = [" ".join(f"{name}{i}" for i in rng.integers(0, 40, 60)) for _ in range(200)]
        (text / f"{name}.txt").write_text("\n\n".join(paragraphs))

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run([*launch, __file__, folder, text], text=True, capture_output=True,
                           env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, text, ended.stdout


def numbers(result):
    """All losses and mixtures of a result, or of the folder that it is in, flat."""
    if isinstance(result, Path):
        result = json.loads((result / "result.json").read_text())
    rows = [result["test_loss"], result["val_loss"], result["realised_mixture"]]
    rows += [mixture for _, mixture in result["mixtures"]]
    curve = [loss for _, losses in result["curve"] for loss in losses]
    return [number for row in rows for number in row.values()] + curve


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The folder of the same runs, made here."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", TINY)
        patch.setattr(train, "pyplot", lambda: None)
        run_all(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method, two_processes, one_process):
    ours = numbers(two_processes[0] / "process-0" / method)
    theirs = numbers(one_process / method)
    assert len(ours) > 20 and ours == pytest.approx(theirs, abs=1e-5)


def test_two_processes_stop_when_one_is_asked_to_and_go_on_as_if_never_stopped(
        two_processes, tmp_path, monkeypatch):
    folder, text, _ = two_processes
    monkeypatch.setattr(train, "pyplot", lambda: None)
    whole = train.train(*own_text(tmp_path, text))
    assert numbers(folder / "own") == pytest.approx(numbers(whole), abs=1e-5)
    assert not (folder / "own" / "checkpoint.pt").exists()


def test_the_first_process_alone_speaks_and_writes(two_processes):
    folder, _, said = two_processes
    assert said.count(" steps of 6 x 16 tokens") == len(METHODS) + 2        # one began twice
    written = {path.parent.name for path in (folder / "process-0").glob("*/*")}
    assert written == set(METHODS) and not list((folder / "process-1").glob("*/*"))


def test_a_batch_that_processes_cannot_share_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 3)
    assert trainer(batch=6).world == 3
    with pytest.raises(ValueError, match="^--batch 8 cannot be shared by 3 processes; .*$"):
        trainer(batch=8)


# --- Micro-batches ---


@pytest.mark.parametrize("method", ["stratified", "doremi", "doge"])
def test_micro_batches_give_what_the_whole_batch_gives(tmp_path, method, monkeypatch):
    monkeypatch.setattr(train, "pyplot", lambda: None)
    whole, parts = (run(tmp_path, method, steps=20, micro_batch=size)[0] for size in (0, 3))
    assert numbers(parts) == pytest.approx(numbers(whole), abs=1e-5)


def saved(work):
    """How many numbers work() keeps for its backward passes, at the moment of the most."""
    kept, most = {}, [0]

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept[id(self)] = tensor.numel()
            most[0] = max(most[0], sum(kept.values()))

        def __del__(self):
            del kept[id(self)]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        work()
    return most[0]


EXCESS = [aioli.Peek(HALF, 9, "proxy", "reference"), aioli.Update(HALF, "proxy")]
GRADIENTS = [aioli.Peek(HALF, 9, "proxy"), aioli.Update(HALF, "proxy")]


@pytest.mark.parametrize("requests", [[aioli.Train(HALF, 1)], EXCESS, GRADIENTS])
def test_micro_batches_take_less_memory(requests):
    def work(size):
        t = trainer(batch=32, micro_batch=size)
        t.answer(aioli.Train(HALF, 1, on="reference"))
        weights = sum(weight.numel() for weight in t.run("reference").model.parameters())
        return saved(lambda: list(map(t.answer, requests))) - weights

    assert work(2) < work(0) / 3


# --- What a GPU gets ---


class Looks(TorchDispatchMode):
    """Counts how often Python asks a device for a number, which makes it wait for a GPU."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += "_local_scalar_dense" in name or "nonzero" in name
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_its_numbers():
    t = trainer(steps=9, micro_batch=3)
    main = t.run("main")
    t.validate = lambda run: np.zeros(2)
    with Looks() as looks:
        t.answer(aioli.Train(HALF, 4))
        assert looks.count == 0 and main.step == 4
        main.model.embed.weight.detach().sum().item()
        assert looks.count == 1


def test_a_batch_is_sent_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    t, sent = trainer(), []
    main = t.run("main")
    main.sampler.plan(HALF, 1)
    t.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sent.append("pin") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *place, **how: sent.append(how))
    t.batch(main)
    assert sent == ["pin", dict(non_blocking=True)] * 2


def test_half_precision_reaches_attention_and_costs_little(monkeypatch):
    """The CPU's bfloat16 in place of a GPU's."""
    t, types = trainer(steps=20), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*inputs, **how):
        types.append({tensor.dtype for tensor in inputs})
        return attention(*inputs, **how)

    full = trainer(steps=20).answer(aioli.Train(HALF, 20))["loss"]
    t.cast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    half = t.answer(aioli.Train(HALF, 20))["loss"]
    assert types and all(found == {torch.bfloat16} for found in types)
    assert half == pytest.approx(full, rel=.02) and not np.array_equal(half, full)
    assert all(weight.dtype == torch.float32 for weight in t.run("main").model.parameters())


def test_a_compiled_model_is_one_graph_and_learns_the_same(monkeypatch):
    """Without a compiler behind it, slow and perhaps not there. The loss is in one part."""
    compiled = torch.compile

    def traced(net):
        return compiled(net, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(model, "LOGITS", 50 * 48)               # of 8 x 16 x 48: in parts
    parts, again = [], model.again_in_backward
    monkeypatch.setattr(model, "again_in_backward", lambda *some: parts.append(1) or again(*some))
    plain, fast = (trainer(steps=5, compile=on) for on in (False, True))
    fast.validate = lambda run: np.zeros(2)                     # which is not compiled
    fast.answer(aioli.Train(HALF, 1))
    assert not parts
    del fast.validate
    losses = [t.answer(aioli.Train(HALF, n))["loss"] for t, n in ((plain, 5), (fast, 4))]
    assert fast.run("main").forward is not fast.run("main").model
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_finished_scratch_run_leaves_the_device_and_may_come_back(monkeypatch):
    t, moved, to = trainer(batch=4), [], model.Transformer.to
    monkeypatch.setattr(model.Transformer, "to", lambda net, place: moved.append(place) or to(
        net, place))
    t.device = torch.device("cpu", 0)                           # another name of the same place
    loss = t.answer(aioli.Train(HALF, 2, on="reference"))["loss"]
    t.answer(aioli.Peek(HALF, 1, "proxy"))
    t.answer(aioli.Update(HALF, "proxy"))
    reference, proxy = t.runs["reference"], t.runs["proxy"]
    assert moved == [t.device, "cpu", t.device, "cpu"] and t.gradients is None
    assert reference.optimizer is None and proxy.optimizer is None
    assert t.answer(aioli.Train(HALF, 0, on="reference"))["loss"].tolist() == loss.tolist()
    assert moved[4:] == [t.device, "cpu"]


@pytest.mark.parametrize("name, there, says", [
    ("meta", {}, "--device meta"), ("cuda", {}, "--device cuda:3"),
    ("auto", {"mps"}, "--device mps"), ("auto", {"cuda", "mps"}, "--device cuda:3"),
])
def test_a_device_is_tried_before_it_is_used(name, there, says, monkeypatch):
    """There is none here: the error names the one that was taken."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in there)
    with pytest.raises(ValueError, match=f"^{says}: this torch cannot use it; try auto or cpu$"):
        train.device(name)


@pytest.mark.parametrize("visible, count, expected", [
    ("", 0, []), ("", 2, ["0", "1"]), ("4,7", 2, ["4", "7"]), ("4", 1, ["4"]),
])
def test_each_process_of_a_comparison_has_a_gpu_of_its_own(monkeypatch, visible, count, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    given, all_begun = [], threading.Barrier(len(expected) or 1)

    def begin(command, env, **about):
        all_begun.wait(10)
        given.append(env["CUDA_VISIBLE_DEVICES"])
        return Process()

    class Process:
        returncode = 0

        def communicate(self):
            return None, ""

    monkeypatch.setattr(compare.subprocess, "Popen", begin)
    with compare.workers(0) as pool:
        list(pool.map(lambda _: compare.separately("a run", []), expected or [""]))
    assert sorted(given) == (expected or [""])


def test_a_process_of_torchrun_ends_at_once_with_its_code(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit, match="3"):
        train.leave(3)
    monkeypatch.setattr(train.dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(SystemExit):                                 # as _exit returned here
        train.leave(2)
    assert ended == [2]


if __name__ == "__main__":
    worker(*sys.argv[1:])
    train.leave(0)
