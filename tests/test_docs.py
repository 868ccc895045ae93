"""What README, paper/README and the docstrings say is run or looked up here, so that it stays true.

Last come the rules of the house: which module may import which, and how long a function may be.
"""
import ast
import doctest
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import aioli
import data
import train
from paper import bench, compare, export, fidelity, gpu, laws, lengths, tables
from tiny import run, tiny_preset                       # noqa: F401, a fixture
from worlds import rng_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "paper/README.md", "paper/exercises.md")
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README, RESULTS, EXERCISES = TEXT.values()
MODULES = ("aioli.py", "model.py", "data.py", "train.py")
SOURCES = (*MODULES, *(f"paper/{path.name}" for path in sorted((ROOT / "paper").glob("*.py"))))


# ---- reading a page


def blocks(text, language=""):
    """The fenced blocks of a page in one language, without their indentation."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.M | re.S)
    return [textwrap.dedent(code) for _, name, code in found if name == language]


def block(text, marker):
    """The one block of Python that contains this."""
    [code] = [code for code in blocks(text, "python") if marker in code]
    return code


def prose(text):
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def code_spans(text):
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(text):
    """Every command line of a page, from its blocks and from its prose."""
    lines = [line for code in blocks(text) for line in code.splitlines()] + code_spans(text)
    begins = re.compile(r"(\w+=\S+ )*(python (train\.py|-m)|pip|pytest|ruff) ")
    return [re.sub(r"  +#.*", "", line) for line in lines if begins.match(line + " ")]


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables_of(text):
    """The tables of a page: lists of lines, each a list of cells; the first is the head."""
    found = [table.splitlines() for table in re.findall(r"(?:^ *\|.*\|$\n?)+", text, re.M)]
    return [[cells(head), *map(cells, body)] for head, _, *body in found]


def full_tables(text):
    """Those of a whole comparison."""
    return [table for table in tables_of(text) if {"interval below 0", "time"} <= set(table[0])]


# ---- the README


@pytest.mark.parametrize("page", ["README.md", "paper/README.md", "paper/exercises.md"])
def test_code_to_paste_keeps_to_100_columns(page):
    for code in re.findall(r"^ *```python\n(.*?)^ *```", (ROOT / page).read_text(), re.S | re.M):
        for line in textwrap.dedent(code).splitlines():
            assert len(line) <= 100, line


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2000


def test_the_example_of_the_idea_is_right():
    example = doctest.DocTestParser().get_doctest(block(README, ">>>"), {}, "the idea", None, 0)
    result = doctest.DocTestRunner().run(example)
    assert result.attempted >= 3 and result.failed == 0


def test_the_versions_that_the_readme_names_are_those_that_are_pinned():
    pins = re.findall(r"^(\w+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert {"torch", "numpy", "tiktoken", "sympy"} <= {name for name, _ in pins}
    for name, version in pins:
        assert name in ("pytest", "hypothesis") or f"{name} {version}" in README


def test_the_output_that_the_readme_shows_is_laid_out_as_that_of_a_run(capsys):
    """The closing table, printed again from its own numbers."""
    [shown] = [code for code in blocks(README) if code.startswith("group ")]
    lines = shown.splitlines()[1:-2]
    columns = ("final_mixture", "realised_mixture", "epochs", "val_loss", "test_loss", "test_ppl")
    result = {name: {} for name in columns}
    for line in lines:
        group, *numbers = line.split()
        for name, number in zip(columns, numbers, strict=True):
            result[name][group] = float(number)
    last = [float(number) for number in re.findall(r"[\d.]+", shown.splitlines()[-2])]
    ppl, loss, bits, seconds, speed, extra = last
    result |= dict(avg_test_ppl=ppl, avg_test_loss=loss, avg_test_bits=bits, wall_seconds=seconds,
                   tokens_per_second=1000 * speed, extra_steps=int(extra),
                   groups=list(result["epochs"]), text="not that of any run")
    train.report(result)
    train.against_uniform(train.Config(), result, Path("out/aioli"))
    assert capsys.readouterr().out.strip() == shown.strip()


def test_the_reference_file_works_in_another_trainer():
    """The README's loop, with a trainer that is three lines of numpy."""
    model = {"read": np.full(2, 50.), "steps": 0}

    def my_training_step(p):
        model["read"] += p
        model["steps"] += 1

    def my_validation_losses():
        return 1 + np.array([40., 20.]) / np.sqrt(model["read"])        # group 0 has more to learn

    space = dict(my_training_step=my_training_step, my_validation_losses=my_validation_losses)
    code = block(README, "my_training_step")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(code, space)
    assert model["steps"] == 2000 and space["request"].p[0] > .55


SHIPPED = {"stratified", "fixed", "natural", "unimax", "skillit", "doremi", "doge",
           "aioli_rounds", "aioli_published", "aioli_static", "aioli_diagonal", "aioli_ood",
           "perplexity_weighted", "odm", "grape", "grid", "dml", "power", "olmix", "regmix",
           "aioli", "horizon", "ado"}


def test_the_table_of_methods_names_those_that_are_there():
    """All that are shipped; one that a reader adds need not be in it."""
    [table] = [table for table in tables_of(README) if table[0][0] == "method"]
    first = " ".join(line[0] for line in table[1:])
    named = set(re.findall(r"`(\w+)`", first))
    assert SHIPPED <= named <= set(aioli.METHODS)


def test_the_tests_that_the_pages_name_exist():
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", "".join(TEXT.values()))
    assert len(named) >= 3
    for name in named:
        assert f"def {name}(" in source


def test_the_table_of_the_readme_is_a_part_of_that_of_the_results():
    [part] = [table for table in tables_of(README) if table[0][0] == "average test perplexity"]
    whole = full_tables(RESULTS)[0]
    assert len(part[0]) == 1 + len(data.SETS) and len(part) >= 6
    cut = [line[:len(part[0])] for line in whole]
    assert part == [line for line in cut if line in part]           # in the same order


# ---- add your own method


@pytest.fixture(scope="module")
def extended(tmp_path_factory, embedded):
    """A copy of the repository in which the recipe has been followed to the letter."""
    copy = tmp_path_factory.mktemp("recipe") / "repository"
    left_out = shutil.ignore_patterns(".*cache", ".git", ".hypothesis", "__pycache__", "out")
    shutil.copytree(ROOT, copy, ignore=left_out)
    assert "Paste this at the end of `aioli.py`:\n\n```python\ndef by_loss" in README
    with open(copy / "aioli.py", "a") as file:
        file.write("\n\n" + block(README, "def by_loss"))
    (copy / ".cache").symlink_to(embedded[1])
    return copy


def in_the_copy(copy, *words):
    done = subprocess.run([sys.executable, *words], cwd=copy, text=True, capture_output=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="120"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_new_method_is_five_lines():
    code = [line for line in block(README, "def by_loss").splitlines() if line.strip()]
    assert len(code) <= 7 and code[1].strip().startswith('"""')     # and its line in METHODS


def test_a_new_method_leaves_the_tests_green(extended):
    """Those that ask every method, and those that ask about the methods."""
    tests = (extended / "tests").glob("test_*.py")
    files = [str(path) for path in tests if "METHODS" in path.read_text()]
    asked = "by_loss or test_docs and (methods or aioli.py or worked_examples)"
    told = in_the_copy(extended, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files,
                       "-k", f"({asked}) and not new_method and not exercises")
    assert int(re.search(r"(\d+) passed", told)[1]) >= 10


def test_the_help_knows_a_new_method(monkeypatch, capsys):
    add_methods(monkeypatch, block(README, "def by_loss").split("\n\n\nMETHODS[")[0])
    with pytest.raises(SystemExit, match="0"):
        train.main(["--method", "by_loss", "--help"])
    told = capsys.readouterr().out
    assert "settings of by_loss" in told and "updates of the mixture [10]" in told


def test_a_new_method_is_in_a_table_beside_others(extended, tmp_path):
    for name in ("code", "law"):
        lines = [f"{name} {i} is not {i * i}" for i in range(4000)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    small = "--encoding bpe300 --steps 10 --batch 2 --val-windows 2 --test-windows 2".split()
    told = in_the_copy(extended, "-m", "paper.compare", "--method", "by_loss", "--out", "out/mine",
                       "--data", str(tmp_path), *small)
    assert "| stratified |" in told and "| by_loss |" in told


# ---- the exercises


def add_methods(monkeypatch, code):
    """Paste this at the end of aioli.py and add its methods to METHODS -> their names."""
    space = dict(vars(aioli))
    exec(code, space)
    names = [name for name in re.findall(r"^def (\w+)\(h, ", code, re.M) if name in space]
    for name in names:
        monkeypatch.setitem(aioli.METHODS, name, space[name])
    return names


@pytest.mark.parametrize("name", ["aioli_gradients", "aioli_sure"])
def test_the_methods_of_the_exercises_run_when_they_are_pasted(tmp_path, monkeypatch, name):
    assert add_methods(monkeypatch, block(EXERCISES, f"def {name}")) == [name]
    result, rows = run(tmp_path, name, settings=dict(rounds=3), steps=60)
    mixtures = [list(p.values()) for _, p in result["mixtures"]]
    assert result["steps"] == 60 and result["extra_steps"] == 0 and mixtures[0] != mixtures[-1]
    _, settings = train.parse(["--method", name])
    assert settings and set(settings) <= set(train.help_of(aioli.METHODS[name]))


def test_the_standard_errors_of_the_exercises_are_those_of_the_fidelity_study():
    space = dict(np=np)
    exec(block(EXERCISES, "def standard_errors").split("\n\n\n")[0], space)
    rng = rng_of(0)
    P, drops = rng.dirichlet(np.ones(3), 9), rng.random((9, 3))
    A = aioli.fit_linear_dynamic(P, drops)
    theirs = fidelity.standard_errors(P, drops, A)
    assert space["standard_errors"](P, drops, A) == pytest.approx(theirs)


def some_run():
    """Nine validations of a run whose mixture changes: read, share, losses, (9, 3) each."""
    rng = rng_of(0)
    read = rng.dirichlet([3.] * 3, 9).cumsum(0) / 25
    share = rng.dirichlet([3.] * 3, 9)
    return read, share, np.linspace(4, 3, 9)[:, None] + rng.random(3)


def test_averaged_over_what_it_forgets_a_forecast_is_one_still():
    lines = inspect.getsource(aioli.fit_forecast).rstrip().splitlines()
    instead = textwrap.indent(block(EXERCISES, "w = np.exp((misfit"), "    ")
    space = dict(vars(aioli))
    exec("\n".join([*lines[:-2], instead]), space)
    plain, mean = aioli.fit_forecast(*some_run()), space["fit_forecast"](*some_run())
    assert (mean.o != plain.o).all() and (mean.read == plain.read).all()
    assert ((0 < mean.o) & (mean.o < 1)).all()


def test_a_forecast_with_transfer_has_a_right_gradient():
    """The changes of the last exercise, as it describes them."""
    changes = (("(self.read + left * p)", "(count(self.read) + left * count(p))"),
               ("+ self.o * p", "+ self.o * count(p)"),
               ("per_share = (1 - self.o) * (1 - self.read.sum()) + self.o",
                "per_share = .9 * ((1 - self.o) * (1 - self.read.sum()) + self.o)"),
               ("(1 - o) * read + o * read.sum(1, keepdims=True) * share",
                "(1 - o) * count(read) + o * read.sum(1, keepdims=True) * count(share)"))
    source = "\n\n".join(map(inspect.getsource, (aioli.Forecast, aioli.fit_forecast)))
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)

    space = dict(vars(aioli))
    exec(block(EXERCISES, "def count") + source, space)
    law, plain = space["fit_forecast"](*some_run()), aioli.fit_forecast(*some_run())
    p, d = np.array([.5, .2, .3]), np.array([1e-6, -1e-6, 0])
    assert (law(p + d) - law(p - d)) / 2 == pytest.approx(law.gradient(p) @ d, rel=1e-4)
    assert (law.gradient(p) != plain.gradient(p)).any()


def test_without_forgetting_only_tokens_count():
    """Exercise 2 changes one line of fit_forecast."""
    source = inspect.getsource(aioli.fit_forecast)
    [line] = [line for line in source.splitlines() if line.startswith("    o = ")]
    space = dict(vars(aioli))
    exec(source.replace(line, "    o = np.zeros((1, 1, 1))"), space)
    assert "`o = np.zeros((1, 1, 1))`" in EXERCISES
    assert (space["fit_forecast"](*some_run()).o == 0).all()


# ---- commands, flags and links of all pages


@pytest.fixture
def every_method(monkeypatch):
    """METHODS with those of the README and the exercises added."""
    for page in (README, EXERCISES):
        for code in blocks(page, "python"):
            if re.search(r"^def \w+\(h, ", code, re.M):
                add_methods(monkeypatch, code.split("\n\n\nMETHODS[")[0])


PROGRAMS = {                    # and what each calls once it has read its command line
    "train.py": (train, "train"), "paper.compare": (compare, "compare"),
    "paper.fidelity": (fidelity, "fidelity"), "paper.laws": (laws, "study"),
    "paper.export": (export, "export"), "paper.gpu": (gpu, "measure")}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_understood(page, every_method, monkeypatch, capsys):
    done, seen = [], 0
    for module, work in PROGRAMS.values():
        monkeypatch.setattr(module, work, lambda *given, **_: done.append(given))
    for command in commands(TEXT[page]):
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "python":
            seen += understand(*words[1:], done=done)
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:]), command
        elif "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).exists(), command
    assert seen >= 5
    capsys.readouterr()


def understand(*words, done):
    """Give a command line to its program, which notes in `done` what it would do -> 1."""
    program, *argv = words[1:] if words[0] == "-m" else words
    if program in ("paper.tables", "paper.lengths"):
        files = [str(path) for name in argv for path in sorted(ROOT.glob(name))]
        assert (tables if program == "paper.tables" else lengths).main(files) == 0
        return 1
    if program == "paper.bench":
        assert bench.parse(argv)
        return 1
    if program == "tests/kill.py":
        assert (ROOT / program).exists() and not argv
        return 1
    module, _ = PROGRAMS[program]
    done.clear()
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            module.main(argv)
        return 1
    assert module.main(argv) == 0 and len(done) == 1, " ".join(words)
    if module is compare:
        flags, _ = done[0]
        assert compare.lines_of(flags)
        assert set("+".join(flags.sets).split("+")) <= {*data.GROUPS, "all"}
    return 1


def test_every_flag_that_a_page_names_is_one(every_method, capsys):
    asked = [(train, ["--method", method]) for method in aioli.METHODS]
    asked += [(module, []) for module in (compare, fidelity, laws, export, gpu)]
    for module, argv in asked:
        with pytest.raises(SystemExit):
            module.main([*argv, "--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    for page, text in TEXT.items():
        named = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", "\n".join(code_spans(text)))
        assert set(named) <= known, page


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(TEXT[page]))
    inside = [link for link in links if not link.startswith("http")]
    assert len(inside) >= 3
    for link in inside:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


# ---- the results


def test_the_tables_of_the_results_are_those_of_the_committed_comparison(capsys):
    """The tables of a file, and their lines, may stand in another order; of those of the sweeps and
    of those with short extra runs, two and three are shown."""
    def made_of(*names):
        for name in names:
            assert tables.main([str(ROOT / "paper" / name)]) == 0
        return sorted(map(sorted, full_tables(capsys.readouterr().out)))

    shown = sorted(map(sorted, full_tables(RESULTS)))
    whole = made_of("compare.csv", "compare-1000.csv")
    some = made_of("sweeps.csv", "scratch.csv", "scratch-quarter.csv")
    assert len(whole) == 5 + 6 and len(shown) == 5 + 6 + 2 + 3
    assert [table for table in shown if table not in some] == whole


def test_the_rows_of_the_ablation_are_those_of_its_comparison(capsys):
    assert tables.main([str(ROOT / "paper" / "ablation.csv")]) == 0
    made = {line[0]: line[1:9] for line in full_tables(capsys.readouterr().out)[0]}
    [shown] = [table for table in tables_of(RESULTS) if table[0][0] == "change, perplexity"]
    assert [line[2:] for line in shown[1:]] == [made[line[1]] for line in shown[1:]]


def test_the_tables_of_lengths_are_those_of_the_committed_comparisons(capsys):
    files = sorted((ROOT / "paper" / "lengths").glob("*.csv"))
    assert len(files) >= 2 and lengths.main([str(path) for path in files]) == 0
    made = tables_of(capsys.readouterr().out)
    shown = [table for table in tables_of(RESULTS) if table[0][-1].endswith("steps")]
    assert made == shown


def test_the_intervals_said_to_be_below_0_are_those_that_a_table_shows():
    said = (r"((?:^\|.*\|$\n)+)\n(\d+) of (\d+) intervals are below 0; "
            r"by chance alone one expects ([\d.]+) \(2\.5 %\)")
    found = re.findall(said, RESULTS, re.M)
    assert len(found) >= 4 and len(found) == RESULTS.count("by chance alone")
    for table, below, total, chance in found:
        shown = re.findall(r"(\*?)[+-][\d.]+ ± ", table)
        assert len(shown) == int(total) and shown.count("*") == int(below)
        assert abs(float(chance) - .025 * len(shown)) <= .05


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_surer_than_an_interval(page):
    assert not re.search(r"\bsurely\b|\blmo\.md\b", TEXT[page])


# ---- docstrings and the rules of the house


def test_worked_examples_in_the_docstrings_are_right():
    result = doctest.testmod(aioli)
    assert result.attempted >= 7 and result.failed == 0


def tree(source):
    return ast.parse((ROOT / source).read_text())


@pytest.mark.parametrize("source", SOURCES)
def test_public_functions_have_docstrings(source):
    """All but those that say in a line or two what their name says."""
    for node in tree(source).body:
        if isinstance(node, ast.FunctionDef):
            short = node.end_lineno - node.lineno < 4
            assert ast.get_docstring(node) or short, f"{source}: {node.name}"


def imports_of(nodes):
    """The modules that these statements import, paper.x in full, others by their first name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            whole = node.module == "paper"
            found |= {f"paper.{alias.name}" for alias in node.names} if whole else {node.module}
    return {name if name.startswith("paper.") else name.split(".")[0] for name in found}


def test_the_reference_file_imports_numpy_alone_and_others_only_to_fit_a_law():
    allowed = {"numpy", *sys.stdlib_module_names}
    assert "numpy" in imports_of(tree("aioli.py").body)
    assert imports_of(ast.walk(tree("aioli.py"))) <= allowed
    fits = re.findall(r'package\("(\w+)"\)', (ROOT / "aioli.py").read_text())
    assert set(fits) == {"torch", "lightgbm"}


def test_modules_import_one_way_only():
    """paper -> train -> aioli, model, data; and inside paper, tables and figures know no study."""
    ours = {source: {name for name in imports_of(ast.walk(tree(source)))
                     if name.startswith("paper") or f"{name}.py" in MODULES} for source in SOURCES}
    assert not ours["aioli.py"] and not ours["model.py"] and not ours["data.py"]
    assert ours["train.py"] <= {"aioli", "model", "data"}
    for source in ("paper/tables.py", "paper/figures.py"):
        assert not ours[source] & {"paper.compare", "paper.fidelity"}
    assert not ours["paper/compare.py"] & {"paper.fidelity", "paper.laws"}


@pytest.mark.parametrize("source", SOURCES)
def test_no_function_is_over_50_lines(source):
    for node in ast.walk(tree(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, f"{source}: {node.name}"


@pytest.mark.parametrize("source", SOURCES)
def test_no_line_is_over_100_columns(source):
    for number, line in enumerate((ROOT / source).read_text().splitlines(), 1):
        assert len(line) <= 100, f"{source}, line {number}"


@pytest.mark.parametrize("source", SOURCES)
def test_no_walrus_and_no_comprehension_in_a_comprehension(source):
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(tree(source)):
        assert not isinstance(node, ast.NamedExpr), f"{source}, line {node.lineno}"
        if isinstance(node, comprehensions):
            inside = [inner for inner in ast.walk(node) if isinstance(inner, comprehensions)]
            assert inside == [node], f"{source}, line {node.lineno}"
