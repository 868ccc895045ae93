"""What is measured besides the comparison: gains by length of a run, and speed beside nanoGPT's."""
import functools
import re
from pathlib import Path

import numpy as np
import pytest

import aioli
from paper import bench, costs, gpu, lengths, rows
from paper.rows import parse_method
from tiny import tiny_preset                            # noqa: F401, a fixture

ROOT = Path(__file__).resolve().parent.parent


def file_of(path, steps, ppl):
    """The rows of a comparison at one length; ppl: {method: a perplexity for each seed}."""
    found = {}
    for method, values in ppl.items():
        for seed, value in enumerate(values):
            entry = parse_method(method)._replace(groups="a+b", seed=seed)
            found[entry] = dict(text="0a1b2c3d", flags="", machine="", steps=steps, extra_steps=0,
                                wall_seconds=1.0, avg_test_ppl=value, avg_test_loss=value / 10,
                                test_loss=dict(a=1.0), realised_mixture=dict(a=1.0))
    rows.write_csv(path, found)
    return str(path)


def test_a_column_is_a_length_and_a_cell_the_difference_to_stratified(tmp_path, capsys):
    long = file_of(tmp_path / "long.csv", 2000, {"stratified": [10., 11.], "aioli": [9., 10.]})
    short = file_of(tmp_path / "short.csv", 500, {"stratified": [20.], "horizon:perplexity": [21.]})
    assert lengths.main([long, short]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "| average test perplexity | method | 500 steps | 2,000 steps |" in said
    assert "| a+b | stratified | 20.00 | 10.50 |" in said
    assert "| a+b | aioli |  | **-1.00 ± 0.00** (2) |" in said
    assert "| a+b | horizon:perplexity | +1.00 (1) |  |" in said
    assert "| a+b | aioli |  | **-0.1000 ± 0.0000** (2) |" in said


@pytest.mark.parametrize("steps", [[], [500, 500]])
def test_files_of_no_length_or_of_the_same_one_are_refused_in_a_line(tmp_path, capsys, steps):
    files = [file_of(tmp_path / f"{i}.csv", n, {"stratified": [1.]}) for i, n in enumerate(steps)]
    assert lengths.main(files) == 2
    assert capsys.readouterr().err.count("\n") == 1


NANOGPT = '''
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool
    dropout: float

class GPT(torch.nn.Linear):
    def __init__(self, config):
        super().__init__(1, 1)

    def configure_optimizers(self, *settings):
        return torch.optim.SGD(self.parameters(), lr=.1)

    def forward(self, x, y):
        return None, super().forward(torch.ones(1)).sum()
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch, embedded):
    """The folder of a stand-in for nanoGPT, which does next to nothing, and is faster."""
    nanogpt = tmp_path / "nanogpt"
    nanogpt.mkdir()
    (nanogpt / "model.py").write_text(NANOGPT)
    (tmp_path / ".cache").symlink_to(embedded[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(bench, "SHAPES", {"laptop": bench.SHAPES["laptop"]})
    monkeypatch.setattr(bench.costs, "measure", lambda turns: None)
    return str(nanogpt)


def test_the_bench_trains_both_sides_and_says_how_fast(checkout, capsys):
    assert bench.main(["--nanogpt", checkout, "--turns", "1", "--seconds", "0", "--race",
                       "0"]) == 0
    words = capsys.readouterr().out.split()
    assert words[words.index("ours") + 2] == "tok/s" and float(words[words.index("ratio") + 1]) < 1


class Here:
    """A bench.Process that is none."""

    def __init__(self, flags, side, shape, lr, steps):
        flags = bench.parse(["--nanogpt", flags.nanogpt, "--shape", shape, "--lr", str(lr),
                             "--steps", str(steps)])
        self.side = bench.SIDES[side](flags)

    def ask(self, action, *numbers):
        return getattr(self.side, action)(*numbers)

    def end(self):
        pass


@pytest.mark.parametrize("their_loss, says", [
    (0., "which ours does not reach"), (99., "ours is there after 1 steps, 0.50 of nanoGPT's")])
def test_a_race_says_how_soon_ours_is_where_the_other_ends(
        checkout, monkeypatch, capsys, their_loss, says):
    monkeypatch.setattr(bench, "RATES", (.004, .008))
    monkeypatch.setattr(bench, "POINTS", 4)
    monkeypatch.setattr(bench, "WINDOWS", 1)
    monkeypatch.setattr(bench, "Process", Here)
    monkeypatch.setattr(bench.NanoGPT, "loss", lambda self: their_loss)
    flags = bench.parse(["--nanogpt", checkout, "--race", "4"])
    bench.race(flags, np.array([[2., 1.], [4., 2.]]))
    assert says in capsys.readouterr().out


def test_what_mixing_costs_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(costs, "MEGABYTES", .2)
    monkeypatch.setattr(costs, "batches_per_second", lambda m: 1e4)
    monkeypatch.setattr(costs, "step_costs", functools.partial(costs.step_costs, steps=1))
    costs.measure(1)
    said = capsys.readouterr().out
    assert said.count("plain steps") == 3 and "MB/s, peak memory" in said
    assert "10000 with 7 groups" in said and "a round with 1,000 groups: step" in said


def test_costs_are_multiples_of_a_plain_step_on_the_same_text():
    assert costs.step_costs(2, turns=1, steps=1)["plain"] == 1
    assert costs.batches_per_second(3, seconds=.01) > 0


def test_the_bench_wants_a_checkout(tmp_path, capsys):
    assert bench.main(["--nanogpt", str(tmp_path)]) == 2
    assert "no model.py in" in capsys.readouterr().err


def test_the_costs_on_a_gpu_are_those_of_every_methods_whole_run(monkeypatch, capsys):
    def needs_more(h, steps):
        raise ValueError("pip install more")

    methods = {name: aioli.METHODS[name] for name in ("stratified", "unimax", "doremi", "aioli")}
    monkeypatch.setattr(aioli, "METHODS", methods | dict(other=needs_more))
    monkeypatch.setattr(gpu, "FORMS", {"as it is": {}, "--micro-batch 2": dict(micro_batch=2)})
    assert gpu.main("--preset tiny --steps 40 --device cpu".split()) == 0
    said = capsys.readouterr().out
    assert re.search(r"micro-batch 2 .* ms a step .*k tok/s", said)
    extra = dict(re.findall(r"^(\w+) .* s +(\d+) extra steps", said, re.M))
    assert extra == dict(stratified="0", unimax="0", doremi="80", aioli="0")
    assert "other                pip install more" in said
