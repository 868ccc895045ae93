"""What the README and the docstrings say is run or looked up here, so that it cannot drift."""
import doctest
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import aioli
import test_train
import train
from test_train import tiny_preset                       # noqa: F401, a fixture

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def block(marker):
    [code] = [code for code in BLOCKS if marker in code]
    return code


def test_worked_examples_in_the_docstrings_are_right():
    result = doctest.testmod(aioli)
    assert result.attempted >= 7 and result.failed == 0


def test_the_reference_file_imports_numpy_and_the_standard_library_only():
    imports = re.findall(r"^(?:from|import) (\w+)", inspect.getsource(aioli), re.M)
    assert "numpy" in imports and set(imports) - {"numpy"} <= set(sys.stdlib_module_names)


def test_the_reference_file_works_in_another_trainer():
    """The README's example of lifting `aioli`, run with a trainer that is three lines of numpy."""
    model = {"L": np.array([7., 6.9]), "steps": 0}

    def my_training_step(p):
        model["L"] = model["L"] - np.array([[3e-3, 1e-3], [0, 1e-3]]) @ p
        model["steps"] += 1

    space = dict(my_training_step=my_training_step, my_validation_losses=lambda: model["L"])
    code = block("my_training_step")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(code, space)
    assert model["steps"] == 2000 and space["request"].p[0] > .55       # group 0 lowers the losses more


def test_a_new_method_is_five_lines_and_runs_like_the_others(tmp_path, monkeypatch):
    space = {}
    exec(block("def by_loss"), space)
    lines = [line for line in inspect.cleandoc(block("def by_loss")).splitlines() if not line.startswith(("from", "import"))]
    assert len([line for line in lines if line.strip()]) <= 8           # five of code, the docstring, the line in the table
    monkeypatch.setitem(aioli.METHODS, "by_loss", space["by_loss"])
    source = block("def by_loss")
    monkeypatch.setattr(inspect, "getsource", lambda f, old=inspect.getsource: source if f is space["by_loss"] else old(f))
    result, rows = test_train.run(tmp_path, "by_loss")
    assert result["steps"] == 60 and result["final_mixture"]["words"] > .5       # the harder group gets more


@pytest.mark.parametrize("name", ["aioli_gradients", "aioli_sure", "by_perplexity"])
def test_the_methods_of_the_exercises_run_when_they_are_pasted_into_aioli(tmp_path, monkeypatch, name):
    source = textwrap.dedent(block(f"def {name}"))
    exec(source, space := dict(vars(aioli)))
    monkeypatch.setitem(aioli.METHODS, name, space[name])
    monkeypatch.setattr(inspect, "getsource", lambda f, old=inspect.getsource: source if f is space[name] else old(f))
    result, rows = test_train.run(tmp_path, name, settings=dict(rounds=3), steps=60)
    mixtures = [list(p.values()) for _, p in result["mixtures"]]
    assert result["steps"] == 60 and result["extra_steps"] == 0 and mixtures[0] != mixtures[-1]
    assert all(text for text in map(train.help_of(space[name]).get, train.parse(["--method", name])[1]))


def test_the_changes_of_the_last_exercise_fit_the_forecast_that_they_change():
    """Averaged over o, a forecast is one still; and with shares that count a tenth of the others, it has a right gradient."""
    rng, fit, law = np.random.default_rng(0), inspect.getsource(aioli.fit_forecast), inspect.getsource(aioli.Forecast)
    n, share, L = rng.dirichlet([3.] * 3, 9).cumsum(0) / 25, rng.dirichlet([3.] * 3, 9), np.linspace(4, 3, 9)[:, None] + rng.random(3)
    averaged = "\n".join(fit.rstrip().splitlines()[:-2]) + "\n" + textwrap.indent(textwrap.dedent(block("error.min(0)")), "    ")
    exec(averaged, space := dict(vars(aioli)))
    plain, mean = aioli.fit_forecast(n, share, L), space["fit_forecast"](n, share, L)
    assert (mean.o != plain.o).all() and ((0 < mean.o) & (mean.o < 1)).all() and (mean.n == plain.n).all()

    for old, new in (("* p)", "* count(p))"), ("self.o * p ", "self.o * count(p) "), ("* (self.n +", "* (count(self.n) +"),
                     ("(1 - self.o) * (1 - self.n.sum()) + self.o\n", ".9 * ((1 - self.o) * (1 - self.n.sum()) + self.o)\n")):
        assert law.count(old) == 1
        law = law.replace(old, new)
    exec(textwrap.dedent(block("def count")) + law, space)
    shared, p, d = space["Forecast"](*plain), share[0], np.array([1e-6, -1e-6, 0])
    assert (shared(p + d) - shared(p - d)) / 2 == pytest.approx(shared.gradient(p) @ d, rel=1e-4)


def test_the_table_of_methods_names_every_method_and_links_to_its_line():
    source = inspect.getsource(aioli).splitlines()
    links = re.findall(r"\[`(\w+)`\]\(aioli\.py#L(\d+)\)", README)
    assert {name for name, _ in links} >= set(aioli.METHODS)
    for name, line in links:
        assert source[int(line) - 1].startswith((f"def {name}(", f"class {name}(")), f"{name} is not at line {line}"


@pytest.mark.parametrize("name", ["aioli", "model", "data", "train"])
def test_public_functions_have_docstrings(name):
    module = importlib.import_module(name)
    for f in vars(module).values():
        if inspect.isfunction(f) and f.__module__ == name and not f.__name__.startswith("_"):
            assert f.__doc__ or len(inspect.getsource(f).splitlines()) <= 4, f"{name}.{f.__name__}"


def test_flags_in_the_readme_exist():
    for command in re.findall(r"^python train\.py (.*?)(?:  #.*)?$", README, re.M):
        if "--help" not in command:
            train.parse(command.split())


def test_the_tables_of_the_readme_are_those_of_the_committed_comparison():
    def tables(text):
        found = [table.split("\n") for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)]
        return {head: {line for line in lines if line and not line.startswith("| half ")}             # left out there
                for head, *lines in found if "| better | surely | extra runs |" in head}
    made = tables("\n\n".join(train.tabulate(train.rows_of(ROOT / "assets" / "compare.json"))))
    assert tables(README) == made and len(made) == 5
