"""The comparison: what its rows are called and hold, how they are paired, how runs are made."""
# ruff: noqa: F811                                          fixtures of tiny.py
import csv
import json
import re
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import run, texts, tiny_preset                    # noqa: F401

import aioli
import data
import train
from paper import compare, figures, rows, tables
from paper.rows import Entry, longer, parse_method, throughout

PYPLOT = train.pyplot
METHODS = st.sampled_from(["stratified", "grid", "doremi", "aioli", "horizon", "skillit"])
NUMBERS = st.floats(.001, 1000) | st.integers(1, 9).map(float)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the runs."""
    monkeypatch.setattr(train, "pyplot", lambda: None)


@st.composite
def lines(draw):
    """A line of a table, of any kind."""
    kind = draw(st.sampled_from(rows.KINDS))
    if kind == "throughout":
        return throughout(draw(METHODS))
    if kind == "longer":
        return longer(draw(st.integers(2, 99) | st.sampled_from([1.125, 2.25, 9.3333])))
    method = draw(METHODS)
    settings = []
    for name, default in train.settings_of(aioli.METHODS[method]).items():
        if name == "objective":
            value = draw(st.sampled_from(["loss", "perplexity", "bits", "2+1", "2+1.0"]))
        else:
            value = type(default)(draw(NUMBERS))
        if value != default and draw(st.booleans()):
            settings.append((name, value))
    prior = draw(METHODS) if kind == "after" else ""
    return Entry(kind, method, tuple(draw(st.permutations(settings))), prior)


SHARES = st.dictionaries(st.sampled_from(["law", "my own text", "数学", "a=b"]), st.floats(0, 1),
                         min_size=2)


@st.composite
def tables_of_runs(draw):
    """{Entry: row} of any runs."""
    found = {}
    for line in draw(st.lists(lines(), max_size=4)):
        groups = draw(st.sampled_from(["all", "python+csv", "law+my own text"]))
        entry = line._replace(groups=groups, seed=draw(st.integers(0, 9)))
        values = dict(text=["", "0a1b2c3d"], flags=["", "--lr 0.1"], code=["", "1a2b+3c4d"],
                      machine=["", "device=cpu a=b"])
        drawn = {key: draw(st.sampled_from(options)) for key, options in values.items()}
        drawn |= {key: draw(st.integers(1, 999)) for key in rows.WHOLE}
        drawn |= {key: draw(NUMBERS) for key in rows.REAL}
        drawn |= {key: draw(NUMBERS) for key in rows.NEWER if draw(st.booleans())}
        found[entry] = drawn | {key: draw(SHARES) for key in rows.PER_GROUP}
    return found


def row(ppl, loss=3.0, extra=0, wall=10.0, **more):
    """A row as the file holds it, of 100 steps on two groups."""
    usual = dict(text="0a1b2c3d", flags="", machine="device=cpu", code="", steps=100,
                 extra_steps=extra, wall_seconds=wall, avg_test_ppl=ppl, avg_test_loss=loss,
                 test_loss=dict(a=loss, b=loss), realised_mixture=dict(a=.5, b=.5))
    return usual | more


def at(line, seed=0, groups="a+b"):
    """The run of a line, or of a method's name, in a cell of the table."""
    line = parse_method(line) if isinstance(line, str) else line
    return line._replace(groups=groups, seed=seed)


def after(name, prior):
    return parse_method(name)._replace(kind="after", prior=prior)


def average_of(name):
    return parse_method(name)._replace(kind="average")


def text_of(found):
    return "\n".join(tables.tabulate(found))


# --- what a run is called


@given(lines())
def test_a_method_is_called_as_it_is_asked_for_on_the_command_line(line):
    method = line._replace(kind="method", prior="")
    if line.kind != "longer":
        assert parse_method(line.name) == method and parse_method(line.name).label == line.name


@given(lines(), lines())
def test_no_two_lines_share_a_label(a, b):
    assert (a == b) == (a.label == b.label)


@pytest.mark.parametrize("line, label", [
    (parse_method("horizon:perplexity:reach=2"), "horizon:perplexity:reach=2"),
    (throughout("grid"), "half grid"), (after("aioli", "grid"), "aioli after grid"),
    (after("horizon:last=.6", "grid"), "horizon:last=0.6 after grid"),
    (average_of("skillit:eta=30"), "average of skillit:eta=30"), (longer(3), "stratified x3"),
    (longer(3.), "stratified x3"), (longer(2.125), "stratified x2.125")])
def test_labels_are_those_of_the_tables_published_so_far(line, label):
    assert line.label == label


def test_a_setting_has_its_type_and_one_that_is_the_default_is_none():
    entry = parse_method("aioli_rounds:perplexity:eta=2:probe=3")
    assert entry.settings == (("objective", "perplexity"), ("eta", 2.0), ("probe", 3))
    for text in ("horizon:bits", "horizon:objective=bits", "horizon:2+1.0:reach=2"):
        assert parse_method(parse_method(text).name) == parse_method(text)
    assert [type(value) for _, value in entry.settings] == [str, float, int]
    assert parse_method("aioli:perplexity") == parse_method("aioli:eta=.5") == parse_method("aioli")


@given(tables_of_runs())
def test_a_file_of_rows_gives_them_back_to_the_last_digit_and_is_sorted(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("csv") / "compare.csv"
    rows.write_csv(path, found)
    again = rows.read_csv(path)
    assert again == found and list(again) == sorted(found)
    assert len(path.read_text("utf-8").splitlines()) == 1 + len(found)        # a line a run


def test_a_spreadsheet_reads_the_file(tmp_path):
    rows.write_csv(tmp_path / "t.csv", {at("aioli_rounds:perplexity:eta=2"): row(20.)})
    [line] = csv.DictReader((tmp_path / "t.csv").open())
    assert line["settings"] == "objective=perplexity eta=2.0" and line["test_loss"] == "a=3.0 b=3.0"
    assert (line["method"], line["groups"], line["avg_test_ppl"]) == ("aioli_rounds", "a+b", "20.0")


@pytest.mark.parametrize("old, new, says", [
    ("aioli", "aioly", "line 2 .*did you mean 'aioli'.*take the line out"),
    ("method,aioli", "wrong,aioli", "'wrong'"),
    ("20.0", "twenty", "line 2 .*twenty"), ("eta=2.0", "rate=2.0", "no rate"),
    ("avg_test_ppl", "perplexity", "line 2 .*avg_test_ppl"), ("20.0", "nan", "avg_test_ppl is nan"),
    ("a=3.0 b=3.0", "3.0 3.0", "test_loss cannot be read"), (",a+b,", ",,", "which groups"),
    ("aioli", '"' + 200_000 * "a" + '"', "line 1 .*field larger")])
def test_a_line_that_is_no_row_is_named(tmp_path, old, new, says):
    path = tmp_path / "t.csv"
    rows.write_csv(path, {at("aioli:eta=2"): row(20.)})
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=says):
        rows.read_csv(path)


def test_a_file_from_before_there_were_bits_is_read_and_its_rows_have_none(tmp_path):
    path = tmp_path / "t.csv"
    rows.write_csv(path, {at("aioli"): row(20., avg_test_bits=1.5)})
    with_bits = path.read_text()
    assert rows.read_csv(path)[at("aioli")]["avg_test_bits"] == 1.5
    for old in (with_bits.replace(",1.5,", ",,"),
                with_bits.replace(",avg_test_bits", "").replace(",1.5,", ",")):
        path.write_text(old)
        assert rows.read_csv(path) == {at("aioli"): row(20.)}
    for bad in ("nan", "-1", "0", "none"):
        path.write_text(with_bits.replace(",1.5,", f",{bad},"))
        with pytest.raises(ValueError, match=f"line 2 .*{bad}"):
            rows.read_csv(path)


# --- the tables


def test_bits_per_byte_have_a_table_of_the_rows_that_know_them():
    old = {at("stratified"): row(20.), at("aioli"): row(19.)}
    assert "bits per byte" not in text_of(old)
    known = {at("stratified"): row(20., avg_test_bits=1.5),
             at("aioli"): row(19., avg_test_bits=1.4)}
    [table] = [table for table in tables.tabulate(known) if "bits per byte" in table]
    assert "| average test bits per byte | a+b |" in table
    assert "| stratified | 1.5000 |" in table and "| aioli | -0.1000 |" in table
    mixed = text_of(known | {at("dml"): row(18.)})
    assert table in mixed and "| dml | -2.00 |" in mixed
    assert "bits per byte" not in text_of(old | {at("aioli"): row(19., avg_test_bits=1.4)})


def test_a_row_has_the_bits_of_its_result_or_none():
    result = row(20.) | dict(versions={})
    assert "avg_test_bits" not in rows.row_of(result, [])
    assert rows.row_of(result | dict(avg_test_bits=1.5), [])["avg_test_bits"] == 1.5


def test_intervals_are_students_t():
    """Quantiles .975: for 1, 2 and 4 degrees of freedom in closed form; for 9 from a table."""
    p = .975
    angle = np.arccos((4 * p * (1 - p)) ** .5)
    quantiles = {2: np.tan(np.pi * (p - .5)), 3: (2 * p - 1) / (2 * p * (1 - p)) ** .5,
                 5: 2 * (np.cos(angle / 3) / np.cos(angle) - 1) ** .5, 10: 2.262157}
    for n, t in quantiles.items():
        values = list(range(n))
        mean, half = tables.interval(values)
        assert mean == np.mean(values)
        assert half == pytest.approx(t * np.std(values, ddof=1) / n ** .5, rel=2e-4)


def test_a_single_value_has_no_interval_and_is_neither_below_0_nor_above():
    found = tables.interval([-1.0])
    assert np.isnan(found.half) and not found.below and not found.above


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=5))
def test_an_interval_is_below_0_above_or_holds_it(values):
    found = tables.interval(values)
    ends = found.mean - found.half, found.mean + found.half
    assert found.below == (max(ends) < 0) and found.above == (min(ends) > 0)


def test_a_run_is_paired_with_stratified_of_its_own_seed_and_set():
    found = {at("stratified", 0): row(20.), at("stratified", 1): row(30.),
             at("stratified", 0, "c+d"): row(50.), at("dml", 0): row(19., extra=900),
             at("dml", 1): row(29.2, extra=900, wall=11.0), at("dml", 2): row(1., extra=900),
             at("dml", 0, "c+d"): row(51., extra=900)}
    [line, loss] = [line for line in text_of(found).splitlines() if line.startswith("| dml")]
    assert line == "| dml | -0.90 ± 1.27 | +1.00 | 1 | 0 | 9.0 | 1.00 | 1-2 |"
    assert "| stratified | 25.00 | 50.00 |" in text_of(found) and "+0.0000" in loss


def test_what_is_below_0_is_bold_and_the_controls_have_partners_of_their_own():
    found = {at("stratified", s): row(20.) for s in (0, 1)}
    found |= {at("aioli", s): row(18. + s / 50) for s in (0, 1)}
    found |= {at(average_of("aioli"), s): row(17.) for s in (0, 1)}
    found |= {at("grid"): row(19., extra=900), at(longer(10)): row(15.), at(longer(9)): row(1.)}
    lines = [line for line in text_of(found).splitlines() if line.startswith(("| aioli", "| grid"))]
    assert lines[0].startswith("| grid | -1.00 | 1 | 0 |")
    assert lines[1].startswith("| aioli | **-1.99 ± 0.13** | 1 | 1 |")
    assert any(line.startswith("| aioli | +1.01 ± 0.13 |") for line in lines[2:])
    assert any(line.startswith("| grid | +4.00 |") for line in lines[2:])


@pytest.mark.parametrize("name", ["perplexity_weighted", "natural"])
def test_methods_are_held_against_each_control_that_measures_no_a(name):
    found = {at("stratified", s): row(20.) for s in (0, 1)}
    found |= {at(name, s): row(19. + s) for s in (0, 1)}
    found |= {at("aioli", s): row(18.5 + s) for s in (0, 1)}
    [_, _, _, control] = tables.tabulate(found)
    assert f"against the control, {name}" in control
    assert "| aioli | **-0.50 ± 0.00** | 1 | 1 |" in control
    assert "| stratified" not in control and f"| {name} |" not in control


def test_a_table_says_how_many_intervals_it_shows_and_what_chance_would_give():
    found = {at("stratified", s, g): row(20.) for s in (0, 1) for g in ("a+b", "c+d")}
    found |= {at("aioli", s, g): row(18. + s / 50) for s in (0, 1) for g in ("a+b", "c+d")}
    found |= {at("dml", s): row(21. + s / 50) for s in (0, 1)} | {at("dml", 0, "c+d"): row(1.)}
    said = "of 3 intervals are below 0; by chance alone one expects 0.1 (2.5 %)."
    perplexity, loss = tables.tabulate(found)[1:]
    assert "| interval below 0 |" in perplexity and perplexity.endswith(f"\n\n2 {said}")
    assert loss.endswith(f"\n\n0 {said}")
    alone = {entry: row for entry, row in found.items() if entry.seed == 0}
    assert "chance" not in text_of(alone)                               # no interval is shown


def test_what_follows_a_prior_is_held_against_its_mixture_and_counted():
    perplexity = {parse_method("stratified"): 30., throughout("grid"): 20., throughout("dml"): 25.,
                  after("aioli", "grid"): 19., after("aioli", "dml"): 26.}
    text = text_of({at(line, s): row(ppl + s / 100, extra=450) for s in (0, 1)
                    for line, ppl in perplexity.items()})
    assert "| half grid | **-10.00 ± 0.00** |" in text
    assert "| aioli after grid | **-1.00 ± 0.00** |" in text
    assert ("aioli after another method's mixture, against that mixture throughout: better in 1 of "
            "2 (prior, data set); 2 intervals, 1 of them below 0 and 1 above (by chance 0.1 each); "
            "difference in perplexity: mean +0.00, median +0.00") in text


def test_lines_and_data_sets_have_one_order_whatever_that_of_the_runs():
    names = ["aioli", "horizon", "grid:perplexity", "aioli:eta=2", "natural"]
    found = {at(name, groups=g): row(20.) for g in ("own", *reversed(data.SETS)) for name in names}
    order, sets = rows.ordered(found)
    assert [line.label for line in order] == ["aioli", "horizon", "grid:perplexity", "aioli:eta=2",
                                              "natural"]
    assert sets == [*data.SETS, "own"]
    assert rows.ordered(dict(reversed(found.items()))) == (order, sets)


def test_the_command_prints_the_tables_of_a_file(tmp_path, capsys):
    rows.write_csv(tmp_path / "t.csv", {at("stratified"): row(20.), at("aioli"): row(18.)})
    assert tables.main([str(tmp_path / "t.csv")]) == 0
    assert "| aioli | -2.00 | 1 | 0 | 0.0 | 1.00 | 1 |" in capsys.readouterr().out
    assert tables.main([str(tmp_path / "none.csv")]) == tables.main([]) == 2
    assert capsys.readouterr().err.count("give the table of a comparison") == 2


# --- which runs, and in which order


def test_what_others_wait_for_comes_first_and_all_priors_share_one_sweep():
    first, second, third = map(throughout, ("dml", "grid", "doge"))
    followers = {after("aioli", "dml"): first, after("horizon:perplexity", "grid"): second,
                 after("aioli", "doge"): third}
    jobs = compare.jobs_of([third, *followers, first, second], "a+b", 0)
    needs = {job.entry.line: job.needs and job.needs.line for job in jobs}
    assert needs == {first: None, second: first, third: None, **followers}
    order = [job.entry.line for job in jobs]
    assert order[0] == first and all(order.index(line) < order.index(follower)
                                     for follower, line in followers.items())
    assert {(job.entry.groups, job.entry.seed) for job in jobs} == {("a+b", 0)}


def test_the_dear_runs_come_first_and_the_controls_last():
    lines = [parse_method(name) for name in ("stratified", "dml", "aioli", "grid:perplexity")]
    jobs = compare.jobs_of(lines, "a+b", 3, controls=True)
    assert [(job.entry.label, job.needs and job.needs.label) for job in jobs] == [
        ("dml", None), ("stratified", None), ("aioli", None), ("grid:perplexity", "dml"),
        ("average of aioli", "aioli")]


def test_a_method_that_could_be_a_prior_may_come_after_one():
    prior, horizon = throughout("doremi"), parse_method("horizon")
    followers = [after("grid:perplexity", "doremi"), after("horizon", "doremi")]
    jobs = compare.jobs_of([prior, *followers, horizon], "a+b", 0, controls=True)
    found = [(job.entry.line, job.needs and job.needs.line) for job in jobs]
    assert found == [(prior, None), (horizon, None), (followers[0], prior), (followers[1], prior),
                     (average_of("horizon"), horizon)]


def test_uniform_sampling_is_run_for_as_many_steps_as_the_methods_asked_for_took():
    found = {at("horizon", s): row(20., extra=200) for s in (0, 1)}
    found |= {at("aioli"): row(20.), at("grid"): row(20., extra=900),
              at(after("horizon", "grid")): row(20., extra=500)}
    lines = [parse_method("horizon"), parse_method("aioli"), after("horizon", "grid")]
    jobs = compare.longer_jobs(found, lines, [("a+b", 0)])
    assert [job.entry for job in jobs] == [at(longer(3))]
    setup = compare.Setup(None, train.Config(steps=7), {}, 1)
    assert compare.own_flags(jobs[0], None, setup) == ["--method", "stratified", "--steps", "21"]


def test_short_extra_runs_are_held_against_uniform_sampling_of_exactly_as_many_steps():
    found = {at("dml"): row(20., extra=112.5), at("doge"): row(20., extra=12.5)}
    jobs = compare.longer_jobs(found, [parse_method("dml"), parse_method("doge")], [("a+b", 0)])
    assert [job.entry for job in jobs] == [at(longer(1.125)), at(longer(2.125))]
    setup = compare.Setup(None, train.Config(steps=4000), {}, 1)
    assert compare.own_flags(jobs[1], None, setup) == ["--method", "stratified", "--steps", "8500"]
    assert tables.partner_of(at("dml"), found[at("dml")], "longer") == at(longer(2.125))


def test_the_lines_asked_for_are_in_order_once_and_with_uniform_sampling():
    def labels(*arguments):
        flags, _ = compare.parse(arguments)
        return [line.label for line in compare.lines_of(flags)]

    assert labels() == labels("--quick") == list(rows.METHODS)
    assert labels("--method", "dml,aioli,aioli:perplexity") == ["stratified", "dml", "aioli"]
    assert labels("--method", "stratified,aioli", "--prior", "grid,doge") == [
        "stratified", "half grid", "half doge", "aioli after grid", "aioli after doge"]
    assert len(labels("--prior", "all")) == 1 + 6 + (len(rows.METHODS) - 1) * 6


def test_how_a_method_starts_after_a_prior_is_a_flag_of_those_runs_alone(tmp_path):
    _, config = compare.parse(["--prior", "grid", "--restart", "prior", "--lr", ".004"])
    assert compare.shared_flags(config) == ["--lr", "0.004"]
    assert compare.shared_flags(config, "after") == ["--restart", "prior", "--lr", "0.004"]
    setup = compare.Setup(tmp_path, config, {}, 1)
    flags = compare.own_flags(compare.Job(at(throughout("grid"))), None, setup)
    run_config, settings = train.parse([*compare.shared_flags(config, "throughout"), *flags])
    train.program(run_config, settings, aioli.History("ab", [1, 1], 8))       # raises if it cannot


# --- rows that do not go together


@pytest.mark.parametrize("change, says", [
    (dict(flags="--lr 0.1"), "was made with the flags --lr 0.1; take the same, or another --table"),
    (dict(text=""), "does not say from which text its rows of a.b are; take another --table"),
    (dict(text="ffffffff"), "was made from other text of a.b; take another --table")])
def test_rows_of_other_flags_or_text_are_refused(tmp_path, change, says):
    path = tmp_path / "t.csv"
    rows.write_csv(path, {at("stratified"): row(20.)})
    texts = {"a+b": "0a1b2c3d"}
    assert len(compare.read_rows(path, train.Config(), texts, "--table")) == 1
    rows.write_csv(path, {at("stratified"): row(20.) | change})
    with pytest.raises(ValueError, match=says):
        compare.read_rows(path, train.Config(), texts, "--table")


def test_rows_of_a_set_that_is_not_asked_for_must_be_of_one_text_too(tmp_path):
    path = tmp_path / "t.csv"
    rows.write_csv(path, {at("stratified"): row(20.), at("aioli"): row(20., text="ffffffff")})
    with pytest.raises(ValueError, match="other text"):
        compare.read_rows(path, train.Config(), {})
    assert compare.read_rows(tmp_path / "none.csv", train.Config(), {}) == {}


def test_flags_of_runs_after_a_prior_do_not_part_them_from_the_others(tmp_path):
    path, config = tmp_path / "t.csv", train.Config(first=.3)
    found = {at("stratified"): row(20.), at(after("aioli", "grid")): row(20., flags="--first 0.3")}
    rows.write_csv(path, found)
    assert compare.read_rows(path, config, {}) == found
    with pytest.raises(ValueError, match="flags --first 0.3"):
        compare.read_rows(path, train.Config(), {})


def test_rows_of_another_machine_are_used_but_not_without_a_word(tmp_path, capsys):
    path, here = tmp_path / "t.csv", train.versions(train.Config())
    for versions, said in ((here, ""), (here | dict(kernels="other"), "kernels=other, here it is")):
        rows.write_csv(path, {at("aioli"): row(20., machine=rows.machine(versions))})
        assert len(compare.read_rows(path, train.Config(), {})) == 1
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)


@pytest.mark.parametrize("arguments, says", [
    (["--method", "dml,aioly"], "did you mean 'aioli'"),
    (["--method", "aioli after grid,dml"], "unknown method 'aioli after grid'"),
    (["--method", "stratified:loss,dml"], "no objective"),
    (["--method", "doge:perplexity"], "no objective"),
    (["--method", "aioli:bleu"], "neither loss, perplexity nor bits"),
    (["--method", "horizon:2+1+1"], "on code+law: --objective '2+1+1' is not 2 shares"),
    (["--method", "aioli:rate=2"], "no rate"),
    (["--method", "stratified,aioli_rounds:sweeps=0"], "--sweeps 0 is out of range"),
    (["--method", "aioli:eta=two"], "eta is a number"),
    (["--method", "aioli_rounds:probe=1.5"], "probe is a number"),
    (["--method", "stratified:eta=2"], "no settings"),
    (["--method", "fixed:mixture=.5 + .5"], "has a space"),
    (["--method", "aioli", "--prior", "grid:perplexity"], "unknown prior"),
    (["--seeds", "0"], "--seeds at least 1"),
    (["--jobs", "-1"], "at least 0"),
    (["--jobs", "two"], "--jobs"),
    (["--steps", "0"], "--steps"),
    (["--quick", "--method", "aioli,dml"], "its own methods"),
    (["--quick", "--groups", "code+law"], "its own methods"),
    (["--controls", "--prior", "grid"], "--controls is for runs without --prior"),
    (["--first", ".3"], "changes nothing without --prior"),
    (["--restart", "prior"], "changes nothing without --prior"),
    (["--past", "nowhere.jsonl"], "unknown flag of paper.compare '--past'"),
    (["--resume"], "unknown flag of paper.compare '--resume'"),
    (["--eta", "2"], "unknown flag of paper.compare '--eta'"),
    (["--groups", "code", "law"], "unknown flag of paper.compare 'law'"),
    (["--groups", "code+lav"], "lav"),
])
def test_a_comparison_refuses_what_it_cannot_run(texts, tmp_path, capsys, arguments, says):
    assert compare.main([*small(texts, tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and not (tmp_path / "out").exists()


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--fidelity" not in said and "--resume" not in said
    texts = train.help_of(compare.Flags)
    assert all(texts.get(name) for name in compare.Flags.__dataclass_fields__)


# --- runs in processes of their own


def small(texts, tmp_path):
    """Flags of the smallest runs on the fixture's texts, into tmp_path/out."""
    return ["--data", str(texts), "--cache", str(tmp_path / "c"), "--encoding", "bpe300",
            "--preset", "tiny", "--steps", "6", "--batch", "2", "--val-windows", "1",
            "--test-windows", "1", "--groups", "code+law", "--out", str(tmp_path / "out"),
            "--jobs", "1"]


@pytest.fixture
def compare_here(monkeypatch, texts, tmp_path):
    """A comparison whose runs have no processes of their own, which is quicker -> its exit code."""
    started = []

    def here(name, command, **output):
        assert command[0] == compare.TRAIN
        started.append(command[1:])
        train.train(*train.parse(command[1:]))

    def call(*arguments):
        started.clear()
        with monkeypatch.context() as patch:
            patch.setattr(compare, "separately", here)
            return compare.main([*small(texts, tmp_path), *arguments])

    call.started = started
    return call


def rows_in(folder):
    """{label: row} of a comparison of one data set and seed."""
    return {entry.label: row for entry, row in rows.read_csv(folder / "compare.csv").items()}


def result_of(folder, name):
    return json.loads((folder / "code+law" / name / "result.json").read_text())


def test_a_comparison_makes_what_is_missing_and_shares_its_sweep(compare_here, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare_here("--method", "grid,grid:perplexity") == 0
    said = capsys.readouterr().out
    assert "3/3" in said and "| grid:perplexity |" in said
    assert (out / "compare.md").read_text() in said
    assert {label: row["extra_steps"] for label, row in rows_in(out).items()} == {
        "grid": 54, "grid:perplexity": 54, "stratified": 0}         # a shared sweep counts, too
    first, second = ((out / "code+law" / name / "history.jsonl").read_text().splitlines()
                     for name in ("grid-s0", "grid-perplexity-s0"))
    assert second[:9] == first[:9]                                          # its very rows
    seconds = sum(json.loads(line)["seconds"] for line in first[:9])
    assert result_of(out, "grid-perplexity-s0")["wall_seconds"] > seconds   # and what they cost

    before = rows_in(out)
    assert compare_here("--method", "fixed") == 0 and len(compare_here.started) == 1
    said = capsys.readouterr().out
    assert "1/1" in said and "| grid |" in said             # what is there stays in the tables
    assert before.items() < rows_in(out).items()
    (out / "compare.csv").unlink()                          # results are taken from the folders
    assert compare_here("--method", "grid,grid:perplexity,fixed") == 0 and not compare_here.started
    assert rows_in(out).keys() == before.keys() | {"fixed"}


def of_half(h, steps, share=.5):
    """A method of one's own."""
    yield aioli.Train(np.array([share, 1 - share]), steps)


def of_half_as_it_was(h, steps, share=.5):
    """Other words."""
    yield aioli.Train(np.array([share, 1 - share]), steps)      # and a comment


def of_more(h, steps, share=.75):
    yield aioli.Train(np.array([share, 1 - share]), steps)


def test_the_runs_of_a_method_whose_code_has_changed_are_made_again(
        compare_here, tmp_path, capsys, monkeypatch):
    found = []
    for method, runs in ((of_half, 3), (of_half_as_it_was, 0), (of_more, 2)):
        monkeypatch.setitem(aioli.METHODS, "mine", method)
        assert compare_here("--method", "mine", "--controls") == 0
        assert len(compare_here.started) == runs
        found.append(rows_in(tmp_path / "out")["mine"]["realised_mixture"]["code"])
        assert ("note: mine has changed since its runs" in capsys.readouterr().out) == (runs == 2)
    assert found == pytest.approx([.5, .5, .75])
    folder = tmp_path / "out" / "code+law" / "mine-s0"
    assert (folder / "result.json.old").exists() and (folder / "result.json").exists()


def test_a_method_that_yields_nothing_is_refused_before_any_trains(
        compare_here, capsys, monkeypatch):
    monkeypatch.setitem(aioli.METHODS, "mine", lambda h, steps: aioli.Train(h.uniform, steps))
    assert compare_here("--method", "mine") == 2 and not compare_here.started
    assert "mine is no method: it has to yield its requests" in capsys.readouterr().err


def test_a_run_that_fails_is_told_at_the_end_and_others_are_kept(compare_here, tmp_path, capsys):
    """Probes fit into the run but not into the half of it that is left after a prior."""
    assert compare_here("--steps", "8", "--prior", "natural", "--method",
                        "natural,aioli_rounds:rounds=1:sweeps=2:probe=2:f=.8") == 2
    said = capsys.readouterr()
    assert "| natural after natural |" in said.out
    assert "1 runs failed" in said.err and "raise --steps to 8" in said.err
    assert set(rows_in(tmp_path / "out")) == {"stratified", "half natural", "natural after natural"}


def test_a_method_that_cannot_run_on_a_data_set_is_refused_before_any_trains(
        compare_here, tmp_path, capsys):
    for method, says in (("aioli_ood", "aioli_ood on code[+]law: .*give three groups"),
                         ("fixed:mixture=1+2+3", "fixed:mixture=1.2.3 on .*is not 2 shares"),
                         ("horizon:floor=.6", "a floor of 0.6"), ("grid:bleu", "'bleu' is neither"),
                         ("aioli_rounds:rounds=5000", "into 5000 rounds"),
                         ("aioli_rounds:rounds=2:sweeps=1", "raise --steps to 16")):
        assert compare_here("--method", f"natural,{method}") == 2 and not compare_here.started
        assert re.search(says, capsys.readouterr().err)
        assert not (tmp_path / "out" / "compare.csv").exists()


def test_a_row_holds_what_the_result_says_and_where_it_was_made(compare_here, tmp_path):
    assert compare_here("--method", "stratified", "--lr", ".004") == 0
    result = result_of(tmp_path / "out", "stratified-s0")
    [made] = rows_in(tmp_path / "out").values()
    assert {key: result[key] for key in made if key in result} == {
        key: value for key, value in made.items() if key in result}
    assert "--lr 0.004 " in made["flags"] and made["machine"] == rows.machine(result["versions"])
    corpus = data.load("code+law", tmp_path / "texts", "bpe300", tmp_path / "c")
    assert made["text"] == corpus.digest


def test_a_prior_is_learnt_once_on_half_the_steps_and_followers_pay_for_it(compare_here, tmp_path):
    out = tmp_path / "out"
    assert compare_here("--method", "natural", "--prior", "doremi") == 0
    learnt, follower = (rows_in(out)[name] for name in ("half doremi", "natural after doremi"))
    result = result_of(out, "natural-after-doremi-s0")
    spent = result["wall_seconds"] + learnt["wall_seconds"] / 2
    assert follower["wall_seconds"] == pytest.approx(spent)
    assert learnt["extra_steps"] == follower["extra_steps"] == 2 * 3
    assert learnt["steps"] == follower["steps"] == 6

    [(_, mixture)] = result_of(out, "half-doremi-s0")["mixtures"]
    (begin, first), (half, _) = result["mixtures"]
    assert (begin, half) == (0, 3) and first == pytest.approx(mixture)
    history = train.read_history(out / "code+law" / "natural-after-doremi-s0" / "history.jsonl")
    assert {row.request.on for row in history} == {"main"}          # nothing was learnt again


def test_a_prior_whose_run_is_gone_is_asked_for(compare_here, tmp_path, capsys):
    assert compare_here("--method", "natural", "--prior", "fixed") == 0
    shutil.rmtree(tmp_path / "out" / "code+law")
    assert compare_here("--method", "natural:alpha=.5", "--prior", "fixed") == 2
    assert "take its line out of compare.csv" in capsys.readouterr().err


def test_a_method_of_ones_own_has_its_control(monkeypatch):
    monkeypatch.setitem(aioli.METHODS, "mine", aioli.aioli)
    lines = [parse_method(name) for name in ("stratified", "mine", "aioli_diagonal", "unimax")]
    jobs = compare.jobs_of(lines, "a+b", 0, controls=True)
    controlled = [job.needs.method for job in jobs if job.entry.kind == "average"]
    assert controlled == ["mine", "aioli_diagonal"]


def test_the_controls_train_on_the_average_mixture_and_for_all_the_steps(compare_here, tmp_path):
    out = tmp_path / "out"
    assert compare_here("--method", "skillit:eta=30", "--controls", "--steps", "20") == 0
    found = rows_in(out)
    moved, still = found["skillit:eta=30"], found["average of skillit:eta=30"]
    assert len(found) == 4 and "stratified" in found
    window = 1 / (20 * 2)
    assert still["realised_mixture"] == pytest.approx(moved["realised_mixture"], abs=1.01 * window)
    mixtures = result_of(out, "skillit-eta-30-s0")["mixtures"]
    assert abs(mixtures[0][1]["law"] - moved["realised_mixture"]["law"]) > .05
    assert len(result_of(out, "average-of-skillit-eta-30-s0")["mixtures"]) == 1
    assert found["stratified x3"]["steps"] == 60 == moved["steps"] + moved["extra_steps"]


def test_several_sets_and_seeds_and_the_quick_look(compare_here, tmp_path, capsys, monkeypatch):
    sets, methods = ("code+law", "law+code"), ("stratified", "natural")
    monkeypatch.setattr(data, "SETS", sets)
    monkeypatch.setattr(compare, "QUICK", sets)
    monkeypatch.setattr(compare, "METHODS", methods)
    assert compare_here("--groups", "sets", "--seeds", "2", "--seed", "3") == 0
    assert set(rows.read_csv(tmp_path / "out" / "compare.csv")) == {
        at(name, seed, g) for name in methods for g in sets for seed in (3, 4)}
    assert " ± " in re.search(r"^\| natural .*$", capsys.readouterr().out, re.M)[0]
    assert compare_here("--groups", "all", "--quick", "--out", str(tmp_path / "q")) == 0
    assert set(rows.read_csv(tmp_path / "q" / "compare.csv")) == {
        at(name, 0, g) for name in methods for g in sets}


def test_rows_made_from_other_text_are_not_paired(compare_here, texts, tmp_path, capsys):
    path = tmp_path / "out" / "compare.csv"
    assert compare_here("--method", "fixed") == compare_here("--method", "fixed") == 0
    before = path.read_text()
    with (texts / "law.txt").open("a") as file:
        file.write("\n\nand some more of it\n")
    capsys.readouterr()
    assert compare_here("--method", "fixed") == 2
    assert "was made from other text of code+law" in capsys.readouterr().err
    assert path.read_text() == before
    path.unlink()
    assert compare_here("--method", "fixed") == 2           # nor does it write over its runs
    assert "has a finished run with other text; use another --out" in capsys.readouterr().err


def test_text_that_changes_meanwhile_is_noticed(compare_here, texts, tmp_path, monkeypatch, capsys):
    def edit_first(job, needed, setup):
        with (texts / "law.txt").open("a") as file:
            file.write("\n\nand some more of it\n")
        return run_job(job, needed, setup)

    run_job = compare.run_job
    monkeypatch.setattr(compare, "run_job", edit_first)
    assert compare_here("--method", "stratified") == 2
    assert "the text is not that of the beginning" in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.csv").exists()


def test_an_interrupted_run_is_resumed(compare_here, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def stopped(config, settings):
        if config.method == "natural":
            (out / "code+law" / "natural-s0").mkdir(exist_ok=True)
            train.write(out / "code+law" / "natural-s0" / "checkpoint.pt", {"a": "sound one"})
            raise train.Stop
        return train_as_before(config, settings)

    train_as_before = train.train
    monkeypatch.setattr(train, "train", stopped)
    assert compare_here("--method", "natural,fixed,doge,doremi,natural:alpha=.5") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert set(rows_in(out)) == {"stratified"}                      # is kept
    assert len(compare_here.started) < 5                            # and little more was begun

    assert compare_here("--method", "natural") == 130 and len(compare_here.started) == 1
    assert "--resume" in compare_here.started[0]


def test_a_damaged_result_or_checkpoint_of_a_run_is_made_again(
        compare_here, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert compare_here("--method", "natural") == 0
    made = rows_in(out)["natural"]
    (out / "compare.csv").unlink()
    (out / "code+law" / "natural-s0" / "result.json").write_text("{")
    assert compare_here("--method", "natural") == 0 and len(compare_here.started) == 1
    assert "its run is made again" in capsys.readouterr().out
    assert rows_in(out)["natural"]["test_loss"] == made["test_loss"]

    (out / "compare.csv").unlink()
    (out / "code+law" / "natural-s0" / "result.json").unlink()
    (out / "code+law" / "natural-s0" / "checkpoint.pt").write_bytes(b"half of")
    assert compare_here("--method", "natural") == 0
    assert ["--resume" in command for command in compare_here.started] == [False]
    assert (out / "code+law" / "natural-s0" / "checkpoint.pt.bad").read_bytes() == b"half of"
    assert rows_in(out)["natural"]["test_loss"] == made["test_loss"]


def test_a_child_that_a_signal_ends_was_stopped_and_none_is_begun_after():
    end = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    with pytest.raises(train.Stop):
        compare.separately("a run", ["-c", end])
    with pytest.raises(train.Stop), compare.workers(1):
        raise KeyboardInterrupt
    with pytest.raises(train.Stop):
        compare.separately("a run", ["-c", "raise ValueError"])
    with compare.workers(1):
        compare.separately("a run", ["-c", ""])


def test_ending_a_comparison_ends_its_children():
    began = time.perf_counter()
    with pytest.raises(train.Stop, match="the same command goes on"):
        with compare.workers(1) as pool:
            pool.submit(compare.separately, "a run", ["-c", "import time; time.sleep(60)"])
            while not compare.CHILDREN:
                time.sleep(.01)
            raise KeyboardInterrupt
    assert not compare.CHILDREN and time.perf_counter() - began < 50


def test_a_run_is_a_process_of_its_own(texts, tmp_path, capsys):
    flags = [flag if flag != "tiny" else "laptop" for flag in small(texts, tmp_path)]
    assert compare.main([*flags, "--method", "stratified"]) == 0, capsys.readouterr().err
    assert set(rows_in(tmp_path / "out")) == {"stratified"}


def test_a_process_that_fails_says_why_in_its_last_line_and_ctrl_c_is_passed_on():
    compare.separately("fine", ["-c", "print(1)"], stdout=subprocess.DEVNULL)
    for program, says in (("raise ValueError('no luck')", "^a run: ValueError: no luck$"),
                          ("raise SystemExit(3)", "^a run: exit code 3$")):
        with pytest.raises(ValueError, match=says):
            compare.separately("a run", ["-c", program])
    with pytest.raises(train.Stop):
        compare.separately("a run", ["-c", "raise SystemExit(130)"])


def test_side_by_side_a_run_waits_for_the_one_that_it_needs(tmp_path, monkeypatch):
    events, needed_rows = [], {}

    def work(job, needed, setup):
        events.append(("begins", job.entry.seed))
        needed_rows[job.entry.seed] = needed
        time.sleep(.2 if job.entry.seed == 0 else 0)
        events.append(("ends", job.entry.seed))
        return row(20. + job.entry.seed)

    monkeypatch.setattr(compare, "run_job", work)
    first, second, third = (at("stratified", seed) for seed in range(3))
    jobs = [compare.Job(first), compare.Job(second, first), compare.Job(third)]
    found = {}
    assert compare.run_all(compare.Setup(tmp_path, train.Config(), {}, 3), jobs, found) == []
    assert events.index(("ends", 0)) < events.index(("begins", 1))
    assert events.index(("ends", 2)) < events.index(("ends", 0))
    assert needed_rows[1] == found[first] and needed_rows[2] is None
    assert found == rows.read_csv(tmp_path / "compare.csv") and len(found) == 3


def test_a_run_that_waits_takes_no_place_from_one_that_could_begin(tmp_path, monkeypatch):
    begun = threading.Event()

    def work(job, needed, setup):
        if job.entry.seed == 2:
            begun.set()
        assert begun.wait(20)                   # the first: until the third is at work beside it
        return row(20.)

    monkeypatch.setattr(compare, "run_job", work)
    first, second, third = (at("stratified", seed) for seed in range(3))
    jobs = [compare.Job(first), compare.Job(second, first), compare.Job(third)]
    assert compare.run_all(compare.Setup(tmp_path, train.Config(), {}, 2), jobs, {}) == []


def test_one_after_the_other_runs_keep_their_order_and_what_was_awaited_comes_first(
        tmp_path, monkeypatch):
    made = []

    def work(job, needed, setup):
        made.append(job.entry.seed)
        return row(20.)

    monkeypatch.setattr(compare, "run_job", work)
    first, second, third, fourth = (at("stratified", seed) for seed in range(4))
    jobs = [compare.Job(first, third), compare.Job(second), compare.Job(third),
            compare.Job(fourth)]
    assert compare.run_all(compare.Setup(tmp_path, train.Config(), {}, 1), jobs, {}) == []
    assert made == [1, 2, 0, 3]


def test_what_needs_a_run_that_failed_fails_with_it(tmp_path, monkeypatch):
    def work(job, needed, setup):
        if job.entry.seed == 0:
            raise ValueError("out of luck")
        return row(20.)

    monkeypatch.setattr(compare, "run_job", work)
    first, second, third = (at("stratified", seed) for seed in range(3))
    jobs, found = [compare.Job(first), compare.Job(second, first), compare.Job(third)], {}
    failed = compare.run_all(compare.Setup(tmp_path, train.Config(), {}, 2), jobs, found)
    assert failed == ["out of luck"] * 2 and set(found) == {third}


def test_two_comparisons_do_not_share_a_folder_at_once(compare_here, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with train.claimed(tmp_path / "out"):
        assert compare_here("--method", "stratified") == 2
        assert "another run or comparison is at work" in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.csv").exists()
    assert compare_here("--method", "stratified") == 0


# --- pictures


def test_the_pictures_of_a_comparison_are_drawn(compare_here, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(train, "pyplot", PYPLOT)
    monkeypatch.setattr(train, "picture", lambda *_: None)          # of a run
    out = tmp_path / "out"
    assert compare_here("--method", "grid,aioli_rounds:rounds=1:probe=1:sweeps=1,natural") == 0
    assert {path.name for path in out.glob("*.png")} == {
        "table.png", "mixtures-code-law.png", "landscape-code-law.png"}
    alone = tmp_path / "alone"
    alone.mkdir()
    figures.draw(rows.read_csv(out / "compare.csv"), alone)                 # the rows alone
    assert [path.name for path in alone.glob("*")] == ["table.png"]


def test_a_sweep_of_three_groups_is_drawn_as_a_triangle(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    groups = ("cycle", "words", "noise")
    result, _ = run(tmp_path, "grid", groups, dict(points=4), steps=5)
    moved, _ = run(tmp_path, "skillit", groups, dict(rounds=2), name="moved", steps=5)
    monkeypatch.setattr(train, "pyplot", PYPLOT)
    P, L = rows.read_sweep(tmp_path / "out")
    assert P.shape == L.shape == (4, 3) and P.sum(1) == pytest.approx(1) and (L > 0).all()
    results = {parse_method("grid"): result, parse_method("skillit"): moved}
    figures.draw_landscape(results, P, L, tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").stat().st_size > 1000
