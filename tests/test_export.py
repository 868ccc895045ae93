"""paper.export: each format is read back here by the rules of its trainer, not by the writer's."""
import ast
import json
import math
import re
import sys
import types

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paper import export
from tiny import run, tiny_preset                       # noqa: F401, a fixture

DOCUMENTS = [name for name, kind in export.FORMATS.items() if kind.units == ("documents",)]
SCHEDULES = [name for name, kind in export.FORMATS.items() if kind.block]
SHARES = dict(code=.5, law=.3, math=.2, old=.0)
EARLY, LATE = dict(code=.25, law=.25, math=.25, old=.25), dict(code=.75, law=.25, math=0., old=0.)


def result_of(shares, mixtures=None, **other):
    """A result.json of a run of 100 steps, with 2 epochs for each unit of share."""
    named = dict(realised_mixture=shares, test_loss=shares, settings={}, versions={},
                 config=dict(batch=16), epochs={group: 2 * p for group, p in shares.items()})
    plain = dict(avg_test_ppl=1., avg_test_loss=1., wall_seconds=1., extra_steps=0, steps=100,
                 tokens=1000, text="", groups=list(shares), mixtures=mixtures or [[0, shares]])
    return {**named, **plain, **other}


@pytest.fixture
def out(tmp_path):
    """The folder of a run whose mixture moved."""
    return left(tmp_path, result_of(SHARES, [[0, EARLY], [40, EARLY], [60, LATE]]))


def left(folder, result):
    """The folder, with this result in it."""
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def written(out, format, *argv):
    """The text of an export, without its notes; documents are all as long where nothing is said."""
    plain = ["--mean-tokens", "1"] if format in DOCUMENTS and "--mean-tokens" not in argv else []
    found = export.read(export.parse([out, "--format", format, *argv, *plain]))
    return "\n".join([*export.FORMATS[format].write(found), ""])


def said(capfd, *argv):
    """What a command prints, and where: exit code, stdout, stderr."""
    code = export.main(list(argv))
    return code, *capfd.readouterr()


# ---- YAML, as much of it as is written, by the rules of YAML 1.1

STRING = r'"(?:\\.|[^"\\])*"'


def scalar(word):
    """A number has a point, or digits alone."""
    if word.startswith('"'):
        return ast.literal_eval(word)
    return float(word) if re.fullmatch(r"\d+\.\d+", word) else int(word) if word.isdigit() else word


def flow(words):
    """What the words begin with; it is taken away from them."""
    word = words.pop(0)
    if word not in "[{":
        return scalar(word)
    items = [] if word == "[" else {}
    while words[0] not in "]}":
        item = flow(words)
        if word == "[":
            items.append(item)
        else:
            assert words.pop(0) == ":"
            items[item] = flow(words)
        if words[0] == ",":
            words.pop(0)
    words.pop(0)
    return items


def nested(lines, indent):
    """What the lines, [(indent, text)], begin with at this depth; it is taken away from them."""
    if lines[0][1].startswith("- "):
        items = []
        while lines and lines[0][0] == indent and lines[0][1].startswith("- "):
            lines[0] = (indent + 2, lines[0][1][2:])
            items.append(nested(lines, indent + 2))
        return items
    if not re.match(rf"({STRING}|\w+):( |$)", lines[0][1]):
        return flow(re.findall(rf"{STRING}|[][{{}},:]|[^][{{}},:\s]+", lines.pop(0)[1]))
    items = {}
    while lines and lines[0][0] == indent and not lines[0][1].startswith("- "):
        key, _, rest = re.match(rf"({STRING}|\w+):( |$)(.*)", lines.pop(0)[1]).groups()
        if rest and rest[0] not in '[{"':
            items[scalar(key)] = scalar(rest)
        else:
            lines[:0] = [(indent + 1, rest)] if rest else []
            items[scalar(key)] = nested(lines, lines[0][0])
    return items


def yaml_of(text):
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    assert all(line.isprintable() and line.isascii() for line in lines)
    found = nested([(len(line) - len(line.lstrip()), line.lstrip()) for line in lines], 0)
    try:
        import yaml
    except ImportError:
        return found
    assert yaml.safe_load(text) == found
    return found


# ---- the trainers: a text -> [(path, share)] of what they draw, or of each stage


def megatron(words):
    """get_blend_from_list; BlendedDataset asks for weights above 0."""
    assert len(words) % 2 == 0
    weights = [float(word) for word in words[::2]]
    assert all(weight > 0 for weight in weights)
    return list(zip([word.strip() for word in words[1::2]], weights))


def megatron_json(text):
    splits = json.loads(text)
    assert {"train", "valid", "test"} <= set(splits)
    return megatron(splits["train"])


def olmo_core(text):
    """SourceMixtureConfig.validate and SourceMixtureList.validate."""
    sources = yaml_of(text)["sources"]
    for source in sources:
        assert 0 < source["target_ratio"] <= 1 and source.get("max_repetition_ratio", 1) >= 1
        assert len(source["paths"]) == 1 and isinstance(source["source_name"], str)
    return [(source["paths"][0], source["target_ratio"]) for source in sources]


def hf(text):
    """As Python, with a datasets that notes its arguments."""
    def interleave_datasets(parts, probabilities, seed, stopping_strategy):
        assert stopping_strategy == "all_exhausted" and all(p > 0 for p in probabilities)
        return list(zip(parts, probabilities, strict=True))

    stand_in = types.SimpleNamespace(interleave_datasets=interleave_datasets,
                                     load_dataset=lambda path, split, streaming: path)
    before, space = sys.modules.get("datasets"), {}
    sys.modules["datasets"] = stand_in
    try:
        exec(text, space)
    finally:
        sys.modules.pop("datasets")
        sys.modules.update(dict(datasets=before) if before else {})
    return space["dataset"]


def mosaic(text):
    """build_streams of llm-foundry; a stream has one kind of weight."""
    streams = yaml_of(text)["train_loader"]["dataset"]["streams"].values()
    assert all(set(stream) == {"local", "proportion"} for stream in streams)
    return [(stream["local"], stream["proportion"]) for stream in streams]


def levanter(text, batch=16):
    """LmDataConfig, which makes sequences of steps, and MixtureDataset."""
    data = yaml_of(text)["data"]
    schedule = data["train_weights"]
    schedule = schedule if isinstance(schedule, list) else [[0, schedule]]
    starts = [at * batch for at, _ in schedule]
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert all(start % data["mixture_block_size"] == 0 for start in starts)
    stages = {}
    for at, weights in schedule:
        assert set(weights) == set(data["components"])
        folders = {name: part["cache_dir"] for name, part in data["components"].items()}
        stages[at] = [(folders[name], p) for name, p in weights.items() if p]
    return stages


def nanotron(text):
    """Config.__post_init__ and NanosetDatasetsArgs; steps from 0 here, from 1 there."""
    stages = {}
    for stage in yaml_of(text)["data_stages"]:
        part = stage["data"]["dataset"]
        assert isinstance(stage["name"], str) and isinstance(stage["data"]["seed"], int)
        stages[stage["start_training_step"] - 1] = list(
            zip(part["dataset_folder"], part["dataset_weights"], strict=True))
    assert 0 in stages and list(stages) == sorted(stages)
    return stages


def llama_factory(text):
    """DataArguments.__post_init__."""
    found = yaml_of(text)
    assert found["mix_strategy"] == "interleave_over"
    names = [item.strip() for item in found["dataset"].split(",")]
    return list(zip(names, map(float, found["interleave_probs"].split(",")), strict=True))


def energon(text):
    """A metadataset; BlendDataset asks for weights above 0."""
    found = yaml_of(text)
    assert (found["__module__"], found["__class__"]) == ("megatron.energon", "MetadatasetV2")
    return [(part["path"], part["weight"]) for part in found["splits"]["train"]["blend"]]


def plain_json(text):
    found = json.loads(text)
    return {at: [(found["paths"][group], p) for group, p in shares.items() if p]
            for at, shares in found["stages"]}


READERS = {"megatron": lambda text: megatron(text.split()), "megatron-json": megatron_json,
           "olmo-core": olmo_core, "hf": hf, "mosaic": mosaic, "levanter": levanter,
           "nanotron": nanotron, "llama-factory": llama_factory, "energon": energon,
           "json": plain_json}


def stages_in(text, format, **how):
    """{first step: {path: share}}; one, from step 0, where the format has no schedule."""
    found = READERS[format](text, **how)
    stages = found if isinstance(found, dict) else {0: found}
    for pairs in stages.values():
        assert abs(sum(share for _, share in pairs) - 1) < 1e-9
    return {at: dict(pairs) for at, pairs in stages.items()}


def near(shares):
    """What shares are read as: those of 0 are not there."""
    return pytest.approx({name: p for name, p in shares.items() if p}, rel=1e-9, abs=0)


# ---- what is written is what the run read


def test_every_format_has_a_reader_here():
    assert set(READERS) == set(export.FORMATS)


@pytest.mark.parametrize("format", READERS)
def test_a_trainer_reads_the_average_of_the_run_and_no_share_of_0(out, format):
    text = written(out, format, "--path", "data/{group}/x")
    assert stages_in(text, format) == {0: near({f"data/{name}/x": p for name, p in SHARES.items()})}


NASTY = "- .\"'\\:#{}[],&*!|>%@`\n\r\t\x00\x7f\x85\u2028\ufeffé😀=~$/?<"
NAMES = st.lists(st.text(st.sampled_from(NASTY) | st.characters(exclude_categories=["Cs"]),
                         min_size=1, max_size=8), min_size=1, max_size=5, unique=True)


@pytest.mark.parametrize("format", READERS)
@given(names=NAMES, weights=st.lists(st.sampled_from([0., 1e-9, 1e-5, .3, 1., 7.]), min_size=5,
                                     max_size=5))
@example(names=["-rf", "null", "1e3", "~", "a b"], weights=[1., 1., 1e-5, 0., 1.])
@example(names=['say "it\'s"', "a.b", "é😀", "{group}", "- x: #"], weights=[1., 1., 1., 1., 1.])
def test_a_name_of_any_letters_comes_back_or_is_refused(format, names, weights, tmp_path_factory):
    p = np.array([1., *weights[1:len(names)]])
    shares = dict(zip(names, (p / p.sum()).tolist()))
    out = left(tmp_path_factory.getbasetemp(), result_of(shares))
    if any(re.search(export.FORMATS[format].forbids, name) for name in names):
        with pytest.raises(ValueError, match="cannot read the path"):
            written(out, format)
    else:
        assert stages_in(written(out, format), format) == {0: near(shares)}


@pytest.mark.parametrize("format, bad", [
    ("megatron", "a b"), ("megatron", "a\u3000b"), ("megatron-json", " a"),
    ("llama-factory", "a,b"), ("llama-factory", "a "), ("llama-factory", "${a}"),
    ("mosaic", "${a}"), ("olmo-core", "${a}")])
def test_a_path_that_a_trainer_would_misread_is_refused(tmp_path, format, bad):
    with pytest.raises(ValueError, match="cannot read the path"):
        written(left(tmp_path, result_of({bad: .5, "b": .5})), format)


@pytest.mark.parametrize("format", [*DOCUMENTS, "mosaic", "json"])
def test_shares_of_documents_are_those_of_tokens_by_the_length_of_a_document(out, format):
    lengths = dict(code=1000, law=250, math=500, old=1)
    words = [f"{group}={length}" for group, length in lengths.items() if group != "law"]
    drawn = stages_in(written(out, format, "--mean-tokens", *words, "250"), format)[0]
    tokens = {group: drawn[group] * lengths[group] for group in drawn}
    assert {group: n / sum(tokens.values()) for group, n in tokens.items()} == near(SHARES)


# ---- schedules


@pytest.mark.parametrize("format", SCHEDULES)
def test_a_schedule_is_stretched_and_says_nothing_twice(out, format):
    argv = ["--schedule", "--steps", "1e5", "--batch", "16"]
    found = stages_in(written(out, format, *argv), format)
    late = 60_000 if format != "levanter" else 60_000 // 128 * 128      # of 2048 sequences
    assert found == {0: near(EARLY), late: near(LATE)}


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True), st.integers(1, 5000),
       st.integers(1, 5000))
def test_levanter_may_change_the_mixture_at_every_start_of_a_stage(tmp_path_factory, starts, steps,
                                                                   batch):
    mixtures = [[at, dict(a=at / 100, b=1 - at / 100)] for at in sorted(starts)]
    folder = left(tmp_path_factory.getbasetemp(), result_of(dict(a=.5, b=.5), mixtures))
    text = written(folder, "levanter", "--schedule", "--steps", str(steps), "--batch", str(batch))
    stages = levanter(text, batch)
    assert max(stages) < steps
    assert dict(stages[max(stages)])["b"] == pytest.approx(1 - max(starts) / 100)


def test_a_run_of_train_py_exports_its_own_numbers(tmp_path):
    result, _ = run(tmp_path, "perplexity_weighted", settings=dict(rounds=3), steps=12)
    out, average = str(tmp_path / "out"), result["realised_mixture"]
    changes = {at: near(shares) for at, shares in result["mixtures"]}
    assert len(changes) == 3
    for format in SCHEDULES:
        assert stages_in(written(out, format), format) == {0: near(average)}
        how = dict(batch=2048) if format == "levanter" else {}
        text = written(out, format, "--schedule", "--batch", "2048")
        assert stages_in(text, format, **how) == changes


# ---- units and epochs


@pytest.mark.parametrize("format", READERS)
def test_the_unit_and_the_epochs_are_said_once(out, capfd, format):
    argv = ["--mean-tokens", "1"] if format in DOCUMENTS else []
    code, text, notes = said(capfd, out, "--format", format, "--tokens", "4e3", *argv)
    unit = export.FORMATS[format].units[0]
    assert code == 0 and (bool(notes) != export.FORMATS[format].has_comments)
    comments = notes or "\n".join(line for line in text.split("\n") if line.startswith("#"))
    assert f"in shares of {unit}" in comments and text.count("#") in (0, 2)
    assert 'epochs in 4000 tokens, of the text of the run: "code" 4, "law" 2.4,' in comments
    stages_in(text, format)


def test_a_group_with_a_newline_in_its_name_stays_in_the_comment(tmp_path):
    out = left(tmp_path, result_of({"a\n- source_name: evil": 1.}))
    assert len(yaml_of(written(out, "olmo-core"))["sources"]) == 1


@given(st.floats(.01, 1000))
def test_olmo_core_may_repeat_a_source_as_often_as_it_has_to(tmp_path_factory, epochs):
    result = result_of(dict(a=.5, b=.5), epochs=dict(a=epochs, b=.5))
    text = written(left(tmp_path_factory.getbasetemp(), result), "olmo-core")
    repeated, once = yaml_of(text)["sources"]
    assert repeated.get("max_repetition_ratio", 1) >= epochs and "max_repetition_ratio" not in once
    assert repeated.get("max_repetition_ratio", 1) < max(1, epochs) + .0101


def test_the_json_has_all_numbers(out):
    found = json.loads(written(out, "json", "--tokens", "500"))
    assert found["unit"] == "tokens" and found["tokens"] == 500
    assert found["epochs"] == dict(code=.5, law=.3, math=.2, old=0)


# ---- bad input


@pytest.mark.parametrize("argv, words", [
    (["--format", "megatorn"], "did you mean 'megatron'"),
    ([], "--format"),
    (["--format", "hf"], "give --mean-tokens GROUP=N"),
    (["--format", "hf", "--schedule", "--mean-tokens", "1"], "has no schedules"),
    (["--format", "megatron", "--mean-tokens", "1"], "draws windows"),
    (["--format", "hf", "--mean-tokens", "code=1", "law=2"], "leaves out math, old"),
    (["--format", "hf", "--mean-tokens", "1", "cod=3"], "did you mean 'code'"),
    (["--format", "hf", "--mean-tokens", "1", "code=3", "code=4"], "code=4: code is given twice"),
    (["--format", "hf", "--mean-tokens", "1", "2"], "2: all others is given twice"),
    (["--format", "hf", "--mean-tokens", "1", "code="], "code=: '' is not a number"),
    (["--format", "hf", "--mean-tokens", "nan"], "'nan' is not a number above 0"),
    (["--format", "hf", "--mean-tokens", "-5"], "--mean-tokens"),
    (["--format", "hf", "--mean-tokens=0"], "'0' is not a number above 0"),
    (["--format", "json", "--tokens", "inf"], "--tokens"),
    (["--format", "json", "--tokens", "0"], "--tokens"),
    (["--format", "json", "--steps", "10"], "change nothing without --schedule"),
    (["--format", "json", "--batch", "10"], "change nothing without --schedule"),
    (["--format", "json", "--path", "data"], "put {group} into it"),
    (["--format", "json", "--final"], "--final")])
def test_a_mistake_on_the_command_line_is_a_line(out, capfd, argv, words):
    code, text, notes = said(capfd, out, *argv)
    assert (code, text, notes.count("\n")) == (2, "", 1) and words in notes


@pytest.mark.parametrize("damage", [
    dict(realised_mixture=dict(SHARES, code=math.nan)), dict(realised_mixture=dict(code=1.)),
    dict(realised_mixture=dict(SHARES, code=.6)),
    dict(realised_mixture=dict(SHARES, code=.9, law=-.1)),
    dict(epochs=dict(SHARES, law=math.inf)), dict(epochs={}), dict(tokens=0),
    dict(realised_mixture={}), dict(config={}), dict(steps=None), dict(mixtures=[[0, {}]]),
    dict(mixtures=[[60, EARLY], [40, LATE]]), dict(mixtures=[[100, EARLY]]), dict(mixtures=[0]),
    dict(mixtures=[["0", EARLY]]), dict(mixtures=[[0, dict(EARLY, code="x")]])])
def test_a_damaged_result_is_a_line(tmp_path, capfd, damage):
    out = left(tmp_path, {**result_of(SHARES), **damage})
    code, text, notes = said(capfd, out, "--format", "json", "--schedule")
    assert (code, text, notes.count("\n")) == (2, "", 1) and "is not the result of a run" in notes


def test_a_folder_without_a_result_is_a_line(tmp_path, capfd):
    code, text, notes = said(capfd, str(tmp_path), "--format", "json")
    assert (code, text, notes.count("\n")) == (2, "", 1) and "result.json" in notes


def test_a_disk_that_is_full_is_no_success(out, capfd, monkeypatch):
    try:
        full = open("/dev/full", "w")
    except OSError:
        pytest.skip("no /dev/full here")
    with full:
        monkeypatch.setattr(sys, "stdout", full)
        assert export.main([out, "--format", "json"]) == 1


# ---- the trainers' own code, where it is installed


def test_hugging_face_draws_the_shares(tmp_path):
    pytest.importorskip("datasets")
    for group in SHARES:
        (tmp_path / group).mkdir()
        rows = [json.dumps(dict(group=group))] * 2000
        (tmp_path / group / "train.jsonl").write_text("\n".join(rows))
    space = {}
    exec(written(left(tmp_path, result_of(SHARES)), "hf", "--path", f"{tmp_path}/{{group}}"), space)
    drawn = [row["group"] for row in space["dataset"].take(2000)]
    for group, p in SHARES.items():
        assert abs(drawn.count(group) / 2000 - p) <= 4 * (p * (1 - p) / 2000) ** .5


def test_mosaic_draws_the_shares(out):
    streaming = pytest.importorskip("streaming", exc_type=ImportError)
    settings = yaml_of(written(out, "mosaic"))["train_loader"]["dataset"]["streams"].values()
    streams = [streaming.Stream(**stream) for stream in settings]
    streaming.Stream.apply_weights(streams, np.array([900, 300, 50]), 1000, 0)
    assert [stream.choose for stream in streams] == [500, 300, 200]


@pytest.mark.parametrize("format", ["olmo-core", "mosaic", "llama-factory"])
@given(names=NAMES)
def test_omegaconf_fills_nothing_in(format, names, tmp_path_factory):
    omegaconf = pytest.importorskip("omegaconf")
    shares = {name: 1 / len(names) for name in names}
    out = left(tmp_path_factory.getbasetemp(), result_of(shares))
    if not any(re.search(export.FORMATS[format].forbids, name) for name in names):
        text = written(out, format)
        read = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(text), resolve=True)
        assert read == yaml_of(text)
