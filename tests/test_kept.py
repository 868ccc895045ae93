"""Nothing lost: what a run keeps as it goes, whatever ends it. Nothing silent: finite or stop."""
import contextlib
import errno
import io
import json
import os
import re
import signal
import warnings

import kill
import numpy as np
import pytest
import torch
from test_train import HALF, interrupt_at, no_pictures          # noqa: F401
from tiny import BASE, measured, run, texts, tiny_preset, trainer       # noqa: F401

import aioli
import model
import train


def stop_at(monkeypatch, tmp_path, count, method="stratified", **about):
    """A run stopped after so many steps -> its folder."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, count)
        with pytest.raises(train.Stop):
            run(tmp_path, method, **about)
    return tmp_path / "out"


# --- Whatever ends it ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_leaves_a_checkpoint_that_the_run_goes_on_from(
        tmp_path, monkeypatch, number):
    monkeypatch.setattr(signal, "SIGINT", number)               # what interrupt_at raises
    whole, _ = run(tmp_path, "natural", name="whole", steps=9)
    stop_at(monkeypatch, tmp_path, 4, "natural", steps=9)
    again, _ = run(tmp_path, "natural", steps=9, resume=True)
    assert measured(again) == measured(whole)


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    def twice(*about):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.Progress, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=9)


@pytest.mark.parametrize("method", ["doge", "aioli --prior doremi"])
def test_a_run_killed_at_any_moment_and_resumed_has_the_same_weights_to_the_bit(
        texts, tmp_path, method):                                               # noqa: F811
    flags = [*BASE, "--data", str(texts), "--cache", str(tmp_path / "c"), "--steps", "200",
             "--save-every", "3"]
    hits, found = kill.kill_and_compare(method, tmp_path, flags, kills=3, seed=0)
    assert hits >= 1 and found == []


def test_a_comparison_of_runs_sees_a_weight_that_differs(tmp_path):
    for name in "ab":
        run(tmp_path, name=name, steps=3)
    assert kill.differences(tmp_path / "a", tmp_path / "b") == []
    saved = torch.load(tmp_path / "b" / "model.pt", weights_only=True)
    saved["weights"]["head.weight"][0, 0] += 1e-7
    torch.save(saved, tmp_path / "b" / "model.pt")
    assert kill.differences(tmp_path / "a", tmp_path / "b") == ["head.weight"]


def test_a_bug_in_a_method_leaves_the_last_checkpoint_and_the_rows_so_far(
        tmp_path, monkeypatch, capsys):
    def mine(h, steps):
        yield aioli.Train(h.uniform, 5, on="scratch")
        yield aioli.Train(h.uniform, steps - 3)
        print(1 / 0 if broken else 1)
        yield aioli.Train(h.uniform, 3)

    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    broken = True
    assert train.exit_code("me", lambda: run(tmp_path, "mine", steps=9, save_every=1)) == 1
    said = capsys.readouterr().err
    assert said.startswith("me: ZeroDivisionError") and said.endswith("in mine)\n")
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["at"] for line in lines] == [5, 6]

    broken = False
    again, rows = run(tmp_path, "mine", steps=9, resume=True)
    whole, _ = run(tmp_path, "mine", steps=9, name="whole")
    assert measured(again) == measured(whole) and len(rows) == 3


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    whole, _ = run(tmp_path, name="whole", steps=9)
    original, replace = os.fsync, []

    def full(handle):
        replace.append(handle)
        if len(replace) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert train.exit_code("me", lambda: run(tmp_path, steps=9, save_every=1)) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.part"))
    again, _ = run(tmp_path, steps=9, resume=True)
    assert measured(again) == measured(whole)


def test_checkpoints_come_after_scratch_runs_and_every_so_many_steps(tmp_path, monkeypatch):
    original, saved_at = train.Keeper.save, []

    def save(self):
        saved_at.append(self.steps())
        original(self)

    monkeypatch.setattr(train.Keeper, "save", save)
    run(tmp_path, name="a", steps=30, save_every=7)
    run(tmp_path, "skillit", name="b", steps=10)
    assert saved_at == [7, 14, 21, 28] + [10, 20]


def test_without_save_every_a_checkpoint_costs_under_2_per_cent(tmp_path, monkeypatch):
    now, saved_at = [0.0], []

    def save(self, state):
        now[0] += 1.0                           # what it takes
        saved_at.append(now[0])

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    keeper = train.Keeper(tmp_path, trainer(), aioli.History(["a", "b"], [1, 1], 8), {}, 0)
    monkeypatch.setattr(train, "write", lambda path, content: save(keeper, content)
                        if path.name == "checkpoint.pt" else None)
    for _ in range(1000):
        now[0] += .5
        keeper.whole()
    assert len(saved_at) >= 5 and min(np.diff(saved_at)) >= 50


def test_the_history_grows_as_requests_are_answered(tmp_path, monkeypatch):
    seen, path = [], tmp_path / "out" / "history.jsonl"
    original = train.Trainer.answer

    def answer(self, request):
        seen.append(path.read_text().count("\n") if path.exists() else 0)
        return original(self, request)

    monkeypatch.setattr(train.Trainer, "answer", answer)
    run(tmp_path, "aioli_rounds", settings={"rounds": 1, "probe": 1, "sweeps": 1}, steps=12)
    assert seen == list(range(len(seen))) and len(seen) > 3


def test_a_resumed_history_goes_on_after_the_rows_of_its_checkpoint(tmp_path, monkeypatch):
    about = dict(settings={"rounds": 1, "probe": 1, "sweeps": 2}, steps=12)
    _, whole = run(tmp_path, "aioli_rounds", name="whole", **about)
    path = stop_at(monkeypatch, tmp_path, 3, "aioli_rounds", **about) / "history.jsonl"
    seen, original = [], train.Trainer.answer
    with open(path, "a") as file:
        file.write("{}\n")                                      # of what the checkpoint lacks

    def answer(self, request):
        seen.append(path.read_text().count("\n"))
        return original(self, request)

    monkeypatch.setattr(train.Trainer, "answer", answer)
    _, rows = run(tmp_path, "aioli_rounds", resume=True, **about)
    assert seen == list(range(4, len(rows))) and len(seen) > 1
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in whole]


# --- Files that are read back ---


class Hostile:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def damaged_checkpoints(good):
    """{what is wrong: the bytes of a checkpoint.pt}; good: a sound one."""
    whole = torch.load(io.BytesIO(good), weights_only=True)
    states = {"hostile": Hostile(), "a list": [1, 2], "no runs": {**whole, "trainer": {}},
              "no rows": {name: part for name, part in whole.items() if name != "rows"},
              "other weights": {**whole, "trainer": {**whole["trainer"], "runs": {"main": {}}}},
              "of another run": {**whole, "flags": {**whole["flags"], "seed": 7}},
              "more rows than the history": {**whole, "rows": 9}}
    found = {"empty": b"", "truncated": good[:len(good) // 2], "text": b"not a checkpoint"}
    for name, state in states.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        found[name] = buffer.getvalue()
    return found


def test_a_checkpoint_that_is_not_of_this_run_is_refused_in_one_line(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = stop_at(monkeypatch, tmp_path, 4, steps=9)
    path = out / "checkpoint.pt"
    for name, content in damaged_checkpoints(path.read_bytes()).items():
        path.write_bytes(content)
        code = train.exit_code("me", lambda: run(tmp_path, steps=9, resume=True))
        said = capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1, (name, said)
        assert str(path) in said or "history.jsonl" in said, name
        assert path.read_bytes() == content                     # nothing is thrown away
    assert not (tmp_path / "hacked").exists()


LINE = ('{"verb": "Train", "p": [0.5, 0.5], "steps": 3, "on": "main", "at": 3, "reply": [1, 2], '
        '"share": [0.5, 0.5], "windows": [12, 12], "lr": 0.1, "seconds": 1}')


@pytest.mark.parametrize("old, new", [
    ('"Train"', '"read_csv"'), ('"Train"', '"__init__"'), ('"Train"', "null"), (LINE, "[]"),
    (LINE, "{"), ('"share": [0.5, 0.5]', '"share": "half"'), (LINE, "\x00"), ('"lr"', '"rl"'),
    ('"Train"', '"LogLinear", "c": [1], "t": [[1, 1]]'),        # which aioli.py has, but no verb
])
def test_a_history_that_is_none_is_refused_in_one_line(tmp_path, old, new):
    path = tmp_path / "history.jsonl"
    path.write_text(LINE + "\n")
    [row] = train.read_history(path)
    assert row.request.steps == 3
    path.write_text(LINE.replace(old, new) + "\n")
    with pytest.raises(ValueError, match="history.jsonl is not the history of a run"):
        train.read_history(path)


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "{}", '{"config": 1}', "\x00\xff", '{"avg_test_ppl": NaN}'])
def test_a_damaged_result_is_never_written_over_and_names_its_file(tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "result.json"
    path.write_text(content)
    assert train.exit_code("me", lambda: run(tmp_path, steps=2)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and path.read_text() == content


def test_numbers_that_are_none_are_null_in_a_history_and_come_back(tmp_path):
    reply = dict(A=np.array([[1., np.nan]]), norm=np.array([np.inf, 0.]))
    row = aioli.Row(aioli.Peek(np.array([1., 0.]), 3, "main"), reply, np.array([1., 0.]),
                    np.array([8, 0]), .1, .2)
    line = train.row_line(row, 0)
    assert "NaN" not in line and "Infinity" not in line
    again = train.from_line(line)
    np.testing.assert_array_equal(again.reply["A"], reply["A"])
    assert np.isnan(again.reply["norm"][0])


# --- Folders ---


def test_the_folders_name_says_what_differs_from_the_defaults():
    def name(*arguments, groups=("a", "b")):
        return train.folder_name(*train.parse(["--method", "aioli", *arguments]), groups)

    assert name() == "aioli-a+b-s0"
    assert name("--threads", "2", "--resume", "--out", "x") == name()
    assert name("--lr", ".004", "--eta", "2") == "aioli-a+b-s0-lr-0.004-eta-2.0"
    assert name("--data", "/my/own texts/") == "aioli-a+b-s0-data-own_texts"
    long = name(groups=[f"a-very-long-name-of-a-group-{i}" for i in range(24)])
    other = name(groups=[f"a-very-long-name-of-a-group-{i}" for i in range(1, 25)])
    assert len(long) < 140 and long != other and "/" not in name("--data", "../..")
    assert len(name(groups=[f"長い名前{i}" for i in range(24)]).encode()) < 140


def test_a_finished_run_is_not_written_over_by_another(tmp_path):
    first, _ = run(tmp_path, steps=3)
    before = (tmp_path / "out" / "result.json").read_bytes()
    for change, says in (({"steps": 4}, "--steps 3, not 4"), ({"lr": 1e-3}, "--lr 0.003, not")):
        with pytest.raises(ValueError, match=f"has a finished run with {says}.*another --out"):
            run(tmp_path, **{"steps": 3, **change})
    with pytest.raises(ValueError, match="has a finished run with --method stratified"):
        run(tmp_path, "natural", steps=3)
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_the_same_run_again_keeps_the_one_before(tmp_path, monkeypatch):
    run(tmp_path, steps=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    out = stop_at(monkeypatch, tmp_path, 2, steps=3)
    assert not (out / "result.json").exists()
    assert {path.name: path.read_bytes() for path in (out / "before").iterdir()} == before


def test_a_folder_has_one_run_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    with train.claimed(tmp_path / "out"):
        with pytest.raises(ValueError, match="at work in .*out; wait for it"):
            run(tmp_path, steps=2)
    run(tmp_path, steps=2)


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(train.Trainer, "answer", lambda *_: pytest.fail("it trains"))
    with pytest.raises(OSError, match="No space"):
        run(tmp_path)


def test_resuming_a_run_that_took_over_others_says_nothing_of_it(tmp_path, monkeypatch, capsys):
    run(tmp_path, "grid", settings={"points": 3}, name="grid", steps=10)
    about = dict(settings={"points": 3}, steps=10, past=str(tmp_path / "grid" / "history.jsonl"))
    stop_at(monkeypatch, tmp_path, 4, "dml", **about)
    capsys.readouterr()
    result, _ = run(tmp_path, "dml", resume=True, **about)
    assert result["extra_steps"] == 30 and "changed nothing" not in capsys.readouterr().out


def test_a_single_bit_of_a_checkpoint_that_fell_over_is_noticed(tmp_path, monkeypatch):
    path = stop_at(monkeypatch, tmp_path, 4, steps=9) / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint of this run .*damaged"):
        run(tmp_path, steps=9, resume=True)


def test_a_mistyped_flag_is_no_reason_to_delete_a_checkpoint(tmp_path, monkeypatch):
    stop_at(monkeypatch, tmp_path, 4, steps=9)
    for change in ({"lr": .1}, {"steps": 10}, {"seed": 1}):
        with pytest.raises(ValueError, match="is of a run with .*; give the same, or ") as refused:
            run(tmp_path, **{"steps": 9, **change}, resume=True)
        assert "delete" not in str(refused.value)


def test_a_finished_run_is_not_made_again_by_resume(tmp_path, monkeypatch, capsys):
    result, _ = run(tmp_path, steps=3)
    monkeypatch.setattr(train.Trainer, "answer", lambda *_: pytest.fail("it trains"))
    again, _ = run(tmp_path, steps=3, resume=True)
    assert again["test_loss"] == result["test_loss"]
    assert "this run, finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.pt", "history.jsonl.part", "checkpoint.pt", "run.png"])
def test_what_is_in_the_way_is_told_before_training(tmp_path, monkeypatch, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    monkeypatch.setattr(train.Trainer, "answer", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=f"{name} is in the way; take it away"):
        run(tmp_path)


def test_a_full_disk_as_torch_tells_it_is_an_error_of_the_machine(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="the disk may be full"):
        train.write(tmp_path / "checkpoint.pt", dict(step=1))
    assert not list(tmp_path.iterdir())


def test_resume_without_a_checkpoint_begins_and_says_so(tmp_path, capsys):
    result, _ = run(tmp_path, steps=3, resume=True)
    assert result["steps"] == 3 and "beginning at step 0" in capsys.readouterr().out


def test_text_that_has_moved_is_the_same_text(texts, tmp_path, capsys):         # noqa: F811
    def arguments(folder):
        return ["--method", "natural", "--preset", "tiny", "--encoding", "bpe300", "--steps", "4",
                "--val-windows", "4", "--test-windows", "4", "--cache", str(tmp_path / "c"),
                "--data", str(folder), "--out", str(tmp_path / "out")]

    assert train.main(arguments(texts)) == 0
    moved = texts.rename(tmp_path / "moved")
    assert train.main(arguments(moved)) == 0
    assert (tmp_path / "out" / "before" / "result.json").exists()      # it is the same run


def test_the_model_is_kept_and_loads_without_anything_else(tmp_path):
    result, _ = run(tmp_path, steps=5)
    t = trainer()
    t.run("main").model = model.load(tmp_path / "out" / "model.pt")
    loss = t.validate(t.run("main"), t.fixed_windows(t.corpus.test, 32, seed=2))
    assert loss.tolist() == list(result["test_loss"].values())


# --- What methods ask for ---


def test_a_method_that_changes_its_mixture_later_does_not_change_the_record(tmp_path, monkeypatch):
    def mine(h, steps):
        p = np.array([.5, .5])
        yield aioli.Train(p, 2)
        p += [.1, -.1]
        yield aioli.Train(p, steps - 2)

    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    result, rows = run(tmp_path, "mine", steps=5)
    shares = [mixture["cycle"] for _, mixture in result["mixtures"]]
    assert shares == pytest.approx([.5, .6]) and rows[0]["p"] == [.5, .5]


@pytest.mark.parametrize("request_, says", [
    (None, "yields Train, Peek or Update, not 'None'"), ((HALF, 3), "yields Train, Peek or Update"),
    (aioli.Train(HALF, -5), "steps of a request must be a whole number >= 0, not -5"),
    (aioli.Train(HALF, 1.5), "whole number"), (aioli.Train(HALF, float("nan")), "whole number"),
    (aioli.Train(HALF, 3, on="x", total_steps=-1), "total_steps of a request"),
    (aioli.Train(np.ones(3) / 3, 3), "a mixture of 2 groups"),
    (aioli.Train(np.array([2., -1.]), 3), "a mixture of 2 groups"),
    (aioli.Update(HALF, "x"), "needs a Peek at it just before"),
    (aioli.Update(HALF, "main"), "an Update is for a scratch run"),
    (aioli.Peek(HALF, 9, "x", against="nobody"), "needs that run to be trained before"),
])
def test_a_request_that_makes_no_sense_is_told_in_a_line(
        tmp_path, monkeypatch, capsys, request_, says):
    def mine(h, steps):
        yield request_

    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    assert train.exit_code("me", lambda: run(tmp_path, "mine", steps=5)) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


# --- Finite or stop ---


def poison(monkeypatch, on, at, times=float("nan")):
    """The last weights of a run are multiplied by NaN, or by less, after so many of its steps."""
    original = train.Trainer.apply

    def apply(self, run):
        original(self, run)
        if run.name == on and run.step == at:
            with torch.no_grad():
                run.model.head.weight *= times

    monkeypatch.setattr(train.Trainer, "apply", apply)


@pytest.mark.parametrize("times, value", [(float("nan"), "nan"), (1e9, "[0-9.e+]{5,}")])
def test_the_first_loss_that_is_not_finite_or_beyond_sense_stops_a_run_and_says_where(
        tmp_path, monkeypatch, times, value):
    poison(monkeypatch, "main", 7, times)
    with pytest.raises(train.Diverged) as stopped:
        run(tmp_path, steps=20)
    assert re.match(rf"run main, step 7: the training loss of cycle, words is {value} \(the last "
                    "good one: ", str(stopped.value))
    assert "at step 6); a lower --lr may help" in str(stopped.value)
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("method, run_name", [("stratified", "main"), ("doge", "proxy")])
def test_a_gradient_norm_that_is_not_finite_stops_a_run(tmp_path, monkeypatch, method, run_name):
    norms = iter([torch.tensor(1.5), torch.tensor(2.5), torch.tensor(float("inf"))])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: next(norms))
    says = rf"run {run_name}, step 2: the gradient norm is inf \(the last good one: 2.5 at step 1"
    with pytest.raises(train.Diverged, match=says):
        run(tmp_path, method, steps=20)


def test_a_rate_far_too_high_stops_a_run(tmp_path):
    with pytest.raises(train.Diverged, match="run main, step"):
        run(tmp_path, steps=60, lr=1e30)


@pytest.mark.parametrize("method", ["doremi", "doge"])
def test_a_signal_that_is_not_finite_stops_a_run(tmp_path, monkeypatch, method):
    poison(monkeypatch, "proxy", 3)
    with pytest.raises(train.Diverged, match="run proxy, step 3: the signal "):
        run(tmp_path, method, steps=20)


@pytest.mark.parametrize("values, group, says", [
    ([1., np.nan], None, "of words is nan"), ([np.inf, 1.], None, "of cycle is inf"),
    ([1., 701.], None, "of words is 701"), ([1., 2., np.nan], [1, 0, 0], "of cycle is nan"),
    (np.nan, None, "loss is nan"), ([[1., 2.], [3., -np.inf]], None, "of words is -inf"),
])
def test_what_is_not_finite_is_named_with_its_group(values, group, says):
    t = trainer()
    with pytest.raises(train.Diverged, match=says):
        t.require_finite(t.run("main"), 3, "training loss", np.array(values), group, limit=700)


def test_on_a_gpu_steps_are_looked_at_later_but_none_is_missed(monkeypatch):
    t = trainer()
    t.device = torch.device("meta")                             # anything but the CPU
    run, bad = t.run("main"), torch.tensor([1., float("nan")])
    t.watch(run, "training loss", bad, [0, 1])
    with pytest.raises(train.Diverged):
        t.look()
    t.look()
    with pytest.raises(train.Diverged):
        for _ in range(100):
            t.watch(run, "training loss", bad, [0, 1])


def test_a_scratch_run_that_diverges_leaves_no_losses_and_the_others_go_on(
        tmp_path, monkeypatch, capsys):
    poison(monkeypatch, "bad", 2)

    def mine(h, steps):
        for name in ("good", "bad", "bad", "fine"):
            yield aioli.Train(h.uniform, 3, on=name, total_steps=9)
        yield aioli.Train(h.uniform, steps)

    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    _, rows = run(tmp_path, "mine", steps=5)
    assert [None in row["reply"] for row in rows] == [False, True, True, False, False]
    assert capsys.readouterr().out.count("run bad, step 2: the training loss") == 1


def test_a_scratch_run_that_has_ended_trains_no_more(tmp_path, monkeypatch):
    def mine(h, steps):
        yield aioli.Train(h.uniform, 3, on="x")
        yield aioli.Train(h.uniform, 0, on="x")                 # but may be measured
        yield aioli.Train(h.uniform, 3, on="x")

    monkeypatch.setitem(aioli.METHODS, "mine", mine)
    with pytest.raises(ValueError, match="run x ended after 3 steps; give its first Train as tot"):
        run(tmp_path, "mine", steps=5)


def test_a_run_that_diverged_is_put_aside(monkeypatch, capsys):
    t = trainer()
    poison(monkeypatch, "bad", 2)
    answer = t.answer(aioli.Train(np.array([.5, .5]), 9, on="bad"))
    assert np.isnan(answer["loss"]).all() and t.run("bad").optimizer is None
    again = t.answer(aioli.Train(np.array([.5, .5]), 9, on="bad"))
    assert np.isnan(again["loss"]).all() and t.run("bad").step == 2
    other = trainer()
    other.load(t.state())
    assert other.run("bad").diverged


# --- Printing ends no run ---


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


def test_a_reader_that_goes_away_ends_no_run(tmp_path):
    with contextlib.redirect_stdout(Gone()):
        assert train.exit_code("me", lambda: run(tmp_path, steps=3)) == 0
    with contextlib.redirect_stdout(None):
        assert train.exit_code("me", lambda: run(tmp_path, steps=3)) == 0
    assert (tmp_path / "out" / "result.json").exists()


def test_a_terminal_that_knows_few_letters_gets_question_marks_and_all_at_once():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(narrow):
        assert train.exit_code("me", lambda: print("größer")) == 0
    assert narrow.buffer.getvalue() == b"gr??er\n"


def test_a_picture_that_fails_is_a_line(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(train, "picture", fails)
    result, _ = run(tmp_path, steps=3)
    assert result["steps"] == 3 and "no picture: no fonts" in capsys.readouterr().out


def test_the_table_is_printed_before_anything_can_go_wrong_with_writing_it(
        tmp_path, monkeypatch, capsys):
    def full(self, result):
        raise OSError("No space left")

    monkeypatch.setattr(train.Keeper, "finish", full)
    with pytest.raises(OSError):
        run(tmp_path, steps=3)
    assert "average test perplexity" in capsys.readouterr().out


def test_groups_that_would_be_read_often_are_named_at_the_start(tmp_path, capsys):
    run(tmp_path, steps=60)                                     # 3840 of 6000 tokens each
    assert "note: at equal shares" not in capsys.readouterr().out
    run(tmp_path, steps=60, batch=60, name="more")
    assert "reads cycle 4.8 times; --max-epochs 4 gives it less" in capsys.readouterr().out


@pytest.mark.parametrize("method, config", [
    ("natural", {}), ("fixed", {}), ("aioli", {}), ("aioli_rounds", {}), ("doremi", {}),
    ("perplexity_weighted", {}), ("aioli", dict(prior=".9+.1", first=.3))])
def test_no_group_is_read_more_often_than_max_epochs(tmp_path, method, config):
    """7,680 tokens of a run, of 6,000 of each group; what the method asks for is one-sided."""
    settings = {"fixed": dict(mixture=".95+.05"), "aioli_rounds": dict(rounds=2, eta=20.0),
                "aioli": dict(eta=20.0)}.get(method, {})
    result, _ = run(tmp_path, method, settings=settings, max_epochs=.65, **config)
    assert max(result["epochs"].values()) <= .65 * (6000 / 16) / 374 + 1 / 374
    assert sum(result["epochs"].values()) * 374 == pytest.approx(480)


def test_a_warning_is_a_line_without_the_place_in_the_code(capsys):
    def warn():
        print(warnings.formatwarning(UserWarning("too\n few"), UserWarning, "aioli.py", 7), end="")

    before = warnings.formatwarning
    assert train.exit_code("me", warn) == 0
    assert capsys.readouterr().out == "note: too few\n" and warnings.formatwarning is before


@pytest.mark.parametrize("settings, warns", [(dict(epochs=.5), True), ({}, False)])
def test_unimax_says_where_a_run_is_too_long_for_its_epochs(settings, warns, tmp_path, capsys):
    run(tmp_path, "unimax", settings=settings)
    assert ("cannot keep to --epochs 0.5" in capsys.readouterr().out) == warns


def test_a_run_that_is_longer_than_all_text_says_so_and_repeats_it_equally(tmp_path, capsys):
    result, _ = run(tmp_path, "fixed", settings=dict(mixture=".9+.1"), steps=60, max_epochs=.5)
    assert "as long as all text 0.6 times" in capsys.readouterr().out
    assert list(result["epochs"].values()) == pytest.approx([240 / 374] * 2)
