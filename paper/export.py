"""The mixture of a finished run, in the words of the trainer that will use it.

    python -m paper.export out/mine --format megatron --path data/{group}_text_document > blend.txt
    python -m paper.export out/mine --format olmo-core --tokens 30e9 --path 'data/{group}/*.npy'
    python -m paper.export out/mine --format hf --mean-tokens code=900 law=2400
    python -m paper.export out/mine --format levanter --schedule --steps 50000 --batch 512

The shares are what the run has read on average, or with --schedule its mixtures one after another.
What they are shares of, and the epochs that they mean, is said in a comment, or on stderr where the
format has none.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

import aioli
import train
from paper.runs import number

BLOCK = 2048                # levanter's default mixture_block_size, sequences


class Source(NamedTuple):
    """What a trainer is told of a group."""
    group: str
    path: str
    share: str
    epochs: float


class Export(NamedTuple):
    """stages: {first step: {group: share}}, of `unit`, each summing to 1; one, from step 0, without
    a schedule. paths, epochs: by group; epochs are those of `tokens` tokens."""
    unit: str
    stages: dict
    paths: dict
    epochs: dict
    tokens: int

    def sources(self, step=0):
        """[Source] of the groups that have a share in a stage: a 0 is refused by Megatron, Energon
        and OLMo-core, and Hugging Face would wait for its set to be exhausted."""
        return [Source(group, self.paths[group], decimal(p), self.epochs[group])
                for group, p in self.stages[step].items() if p]


def decimal(share):
    """A share without an exponent: most readers of YAML take 1e-05 for a string."""
    return np.format_float_positional(share, precision=15, fractional=False, trim="0")


def quoted(text):
    """A string as it is written in YAML and in Python alike, in ASCII, on one line."""
    def escape(match):
        code = ord(match[0])
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + re.sub(r"[^ -~]", escape, text.replace("\\", r"\\").replace('"', r'\"')) + '"'


def listed(sources):
    """Their paths and their shares, as lists in YAML and in Python alike."""
    paths, shares = [quoted(one.path) for one in sources], [one.share for one in sources]
    return f"[{', '.join(paths)}]", f"[{', '.join(shares)}]"


def mapped(shares):
    """{group: share} in YAML."""
    return f"{{{', '.join(f'{quoted(group)}: {decimal(p)}' for group, p in shares.items())}}}"


# --- The formats: an Export -> lines.


def megatron(export):
    """For --data-args-path; --data-path takes the same words."""
    return [f"{one.share} {one.path}" for one in export.sources()]


def megatron_json(export):
    """For --per-split-data-args-path, which asks for all three splits, and takes null."""
    pairs = [[one.share, one.path] for one in export.sources()]
    return [json.dumps(dict(train=sum(pairs, []), valid=None, test=None), indent=1)]


def olmo_core(export):
    """For SourceMixtureList.from_yaml, which refuses to repeat a source unless it is told to."""
    lines = ["sources:"]
    for one in export.sources():
        lines += [f"- source_name: {quoted(one.group)}", f"  target_ratio: {one.share}",
                  f"  paths: [{quoted(one.path)}]"]
        if one.epochs > 1:
            lines.append(f"  max_repetition_ratio: {math.ceil(100 * one.epochs) / 100}")
    return lines


def hf(export):
    """For Hugging Face datasets; with other stopping strategies the mixture shifts, or ends."""
    paths, shares = listed(export.sources())
    return ["from datasets import interleave_datasets, load_dataset", "",
            f"paths = {paths}", f"probabilities = {shares}",
            'parts = [load_dataset(path, split="train", streaming=True) for path in paths]',
            "dataset = interleave_datasets(parts, probabilities=probabilities, seed=0,",
            '                              stopping_strategy="all_exhausted")']


def mosaic(export):
    """For llm-foundry's YAML; a stream's keys are the arguments of streaming.Stream."""
    streams = [f"{quoted(one.group)}: {{local: {quoted(one.path)}, proportion: {one.share}}}"
               for one in export.sources()]
    return ["train_loader:", "  dataset:", "    streams:", *(f"      {one}" for one in streams)]


def levanter(export):
    """For levanter's YAML. Weights of 0 stay, as it may ask for the same names in both maps."""
    lines = ["data:", f"  mixture_block_size: {BLOCK}", "  stop_strategy: restart", "  components:"]
    for group, path in export.paths.items():
        lines.append(f"    {quoted(group)}: {{cache_dir: {quoted(path)}}}")
    if len(export.stages) == 1:
        return [*lines, f"  train_weights: {mapped(export.stages[0])}"]
    stages = [f"  - [{at}, {mapped(shares)}]" for at, shares in export.stages.items()]
    return [*lines, "  train_weights:", *stages]


def nanotron(export):
    """For nanotron's YAML, which counts steps from 1."""
    lines = ["data_stages:"]
    for at in export.stages:
        paths, shares = listed(export.sources(at))
        lines += [f"- name: from step {at + 1}", f"  start_training_step: {at + 1}", "  data:",
                  "    dataset:", f"      dataset_folder: {paths}",
                  f"      dataset_weights: {shares}", "    seed: 0"]
    return lines


def llama_factory(export):
    """For LLaMA-Factory's YAML; a path is a name in its dataset_info.json."""
    names = ",".join(one.path for one in export.sources())
    shares = ",".join(one.share for one in export.sources())
    return [f"dataset: {quoted(names)}", "mix_strategy: interleave_over",
            f"interleave_probs: {quoted(shares)}"]


def energon(export):
    """A metadataset of Megatron-Energon; paths are relative to its file."""
    return ["__module__: megatron.energon", "__class__: MetadatasetV2", "splits:", "  train:",
            "    blend:", *(f"    - {{weight: {one.share}, path: {quoted(one.path)}}}"
                            for one in export.sources())]


def plain_json(export):
    """For programs."""
    return [json.dumps(dict(export._asdict(), stages=list(export.stages.items())), indent=1)]


class Format(NamedTuple):
    """units: what its weights may be shares of. has_comments: in lines after a #. block: sequences
    between changes of the mixture, 0 if it cannot change. forbids: what no path may contain."""
    write: Callable
    units: tuple
    has_comments: bool = True
    block: int = 0
    forbids: str = r"(?!)"                                              # nothing


ENDS, INTERPOLATED = r"^\s|\s$", r"\$\{"                # what is stripped; what OmegaConf fills in
FORMATS = {
    "megatron": Format(megatron, ("windows",), has_comments=False, forbids=r"\s"),
    "megatron-json": Format(megatron_json, ("windows",), has_comments=False, forbids=ENDS),
    "olmo-core": Format(olmo_core, ("tokens",), forbids=INTERPOLATED),
    "hf": Format(hf, ("documents",)),
    "mosaic": Format(mosaic, ("windows", "documents"), forbids=INTERPOLATED),
    "levanter": Format(levanter, ("windows",), block=BLOCK),
    "nanotron": Format(nanotron, ("windows",), block=1),
    "llama-factory": Format(llama_factory, ("documents",), forbids=f",|{ENDS}|{INTERPOLATED}"),
    "energon": Format(energon, ("documents",)),
    "json": Format(plain_json, ("tokens", "documents"), has_comments=False, block=1)}
UNITS = dict(tokens="tokens", windows="windows of a fixed number of tokens",
             documents="documents, after the mean tokens of one in each group")


# --- From the result of a run to an Export.


def mean_tokens(words, groups):
    """["GROUP=N", ...], where "N" is for all others -> mean tokens of a document, (m,).
    ValueError."""
    given = {}
    for word in words:
        group, equals, cell = word.rpartition("=")
        tokens = number(cell, 1e-9, f"--mean-tokens {word}")
        if equals:
            train.pick("group", group, dict.fromkeys(groups))
        if group in given:
            raise ValueError(f"--mean-tokens {word}: {group or 'all others'} is given twice; once "
                             "will do")
        given[group] = tokens                                           # "": all others
    missing = [group for group in groups if group not in given and "" not in given]
    if missing:
        raise ValueError(f"--mean-tokens leaves out {', '.join(missing)}; give GROUP=N for each "
                         "group, or N alone where all documents have the same length")
    return np.array([given[group if group in given else ""] for group in groups])


def mixture(shares, groups, means):
    """{group: share of tokens} -> {group: share of documents of `means` (m,) tokens}, in the order
    of the groups, summing to 1. Raises ValueError."""
    p = np.array([shares[group] for group in groups], float)
    if not (aioli.finite(p).all() and p.min() >= 0 and abs(p.sum() - 1) < 1e-6):
        raise ValueError("shares that do not sum to 1")
    p = p / means
    return dict(zip(groups, (p / p.sum()).tolist()))


def stages_of(result, groups, means, steps, grid):
    """The mixtures of a run, {first step: {group: share}}, stretched to `steps` steps; each begins
    at the last multiple of `grid` before its time. Raises ValueError."""
    stages, changes, before, last = {}, 0, -1, None
    for at, shares in result["mixtures"]:
        if not before < at < result["steps"]:
            raise ValueError(f"a mixture from step {at} on, after {before}")
        shares = mixture(shares, groups, means)
        start = int(at * steps // (result["steps"] * grid)) * grid
        if shares != last:
            stages[start if stages else 0] = shares                     # probes may have been first
            changes += 1
        before, last = at, shares
    if changes > len(stages):
        print(f"note: {changes - len(stages)} of {changes} mixtures are left out, as others begin "
              f"at the same step of the format, a multiple of {grid}", file=sys.stderr)
    return stages


def paths_of(template, groups, format):
    """{group: path}, the template with {group} filled in. Raises ValueError."""
    if "{group}" not in template:
        raise ValueError(f"--path {template} is one path for all groups; put {{group}} into it")
    paths = {group: template.replace("{group}", group) for group in groups}
    for path in paths.values():
        found = re.search(FORMATS[format].forbids, path)
        if found:
            raise ValueError(f"{format} cannot read the path {path!r}, because of {found[0]!r}; "
                             "give --format json, and the data another name")
    return paths


def read(flags):
    """The Export that the command line asks for. Raises ValueError."""
    path = Path(flags.out) / "result.json"
    if not path.exists():
        raise ValueError(f"no finished run in {flags.out}: there is no {path}; finish it with "
                         "--resume, or name another folder")
    result = train.read_result(path)
    groups, kind = list(result["realised_mixture"]), FORMATS[flags.format]
    means = mean_tokens(flags.mean_tokens, groups) if flags.mean_tokens else 1
    unit = "documents" if flags.mean_tokens else kind.units[0]

    with train.reading(path, "the result of a run"):
        tokens, batch = flags.tokens or result["tokens"], flags.batch or result["config"]["batch"]
        epochs = {group: result["epochs"][group] * tokens / result["tokens"] for group in groups}
        if not aioli.finite(list(epochs.values())).all():
            raise ValueError("epochs that are not finite")
        stages = {0: mixture(result["realised_mixture"], groups, means)}
        if flags.schedule:
            grid = kind.block // math.gcd(kind.block, batch)
            stages = stages_of(result, groups, means, flags.steps or result["steps"], grid)
    return Export(unit, stages, paths_of(flags.path, groups, flags.format), epochs, tokens)


def export(flags):
    """Print the mixture of a run; flags: as parse gives them. Raises ValueError, OSError."""
    found, kind = read(flags), FORMATS[flags.format]
    what = "the run's mixtures without probes" if flags.schedule else "what the run read on average"
    epochs = [f"{quoted(group)} {times:.3g}" for group, times in found.epochs.items()]
    notes = [f"{what}, in shares of {UNITS[found.unit]}",
             f"epochs in {found.tokens} tokens, of the text of the run: {', '.join(epochs)}"]
    lines = kind.write(found)
    if kind.has_comments:
        lines = [*(f"# {note}" for note in notes), *lines]
    else:
        print("\n".join(notes), file=sys.stderr)
    # past sys.stdout, which would lose in silence what a full disk, or a terminal, does not take
    with open(sys.stdout.stream.fileno(), "w", encoding="utf-8", closefd=False) as file:
        file.write("\n".join([*lines, ""]))


def count(word):
    """A whole number, 3e9 too."""
    return int(number(word, 1, "a count"))


def parse(argv):
    """Command line -> its flags. Raises ValueError."""
    parser = train.Parser(prog="python -m paper.export", description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="the folder of a finished run")
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--path", default="{group}", help="where the data of a group is [{group}]")
    parser.add_argument("--mean-tokens", nargs="+", action="extend", default=[], metavar="GROUP=N",
                        help="tokens of a mean document, where the trainer draws documents")
    parser.add_argument("--tokens", type=count, help="budget that the epochs are of [the run's]")
    parser.add_argument("--schedule", action="store_true", help="mixtures and when they begin")
    parser.add_argument("--steps", type=count, help="length that --schedule is for [the run's]")
    parser.add_argument("--batch", type=count, help="sequences in a step of it [the run's]")
    flags = parser.parse_args(argv)
    refuse(flags, train.pick("format", flags.format, FORMATS))
    return flags


def refuse(flags, kind):
    """Flags that a format has no use for, or misses. Raises ValueError."""
    if flags.schedule and not kind.block:
        able = ", ".join(name for name, other in FORMATS.items() if other.block)
        raise ValueError(f"{flags.format} has no schedules; leave --schedule out, or use {able}")
    if (flags.steps or flags.batch) and not flags.schedule:
        raise ValueError("--steps and --batch change nothing without --schedule; leave them out")
    if flags.mean_tokens and "documents" not in kind.units:
        raise ValueError(f"{flags.format} draws {kind.units[0]}; leave --mean-tokens out")
    # a share of tokens taken for one of documents is wrong by the ratio of their lengths, unseen
    if kind.units == ("documents",) and not flags.mean_tokens:
        raise ValueError(f"{flags.format} draws documents; give --mean-tokens GROUP=N for each "
                         "group, or --mean-tokens 1 where all documents have the same length")


def main(argv=None):
    """The command line, or argv -> exit code."""
    return train.exit_code("paper.export", lambda: export(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
