"""Text in, one stream of training windows per group out.

    corpus = load("python+csv")                     # or load(data="my/texts"), your own text
    sampler = Sampler(corpus.train, corpus.groups, window=64, batch=8, seed=0)
    counts = sampler.plan([0.7, 0.3], steps=100)    # windows of each group in the next 100 batches
    x, y, group = sampler.batch()                   # (B, T), (B, T), (B,)

`Sampler` comes first: it is all that mixing needs. Below it, what `load` does for you: your own
text, the tokeniser, the cache, and last the text that is already on this machine. A document (a
file, a line of .jsonl, a block of a long file) is in one split only, and so are its copies.
Nothing is downloaded, unless you ask for one of tiktoken's own encodings or for hf:NAME, and of a
document only 100 bytes stay in memory.
"""
import ast
import base64
import codecs
import collections
import contextlib
import difflib
import functools
import glob
import gzip
import hashlib
import heapq
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from pydoc_data.topics import topics    # the language reference as pydoc prints it: {title: text}
from typing import Callable, NamedTuple

import numpy as np
import regex                            # comes with tiktoken, whose patterns it understands
import tiktoken

GROUPS = ("python", "cpp", "prose", "math", "tables", "csv", "aten")
HEADROOM = ("python+csv", "prose+tables", "python+aten",
            "cpp+math+tables", "python+prose+csv", "all")
CONTROLS = ("python+prose", "cpp+math")     # uniform should be near the best here: stay there
SETS = HEADROOM + CONTROLS                  # fixed beforehand, so that nobody picks by results
SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """The user's text, names or folders are at fault. One line: what, where, what to do."""

    def __init__(self, line):
        super().__init__(printable(line))


def printable(text):
    """A text without control characters: names of files can hold line breaks and escapes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- windows: T + 1 consecutive tokens from a multiple of T: T inputs, and T targets one further

WHOLE = 10**9       # shares of windows are counted in billionths: integers do not drift
PART = 2**20        # windows that are shuffled at once


class Sampler:
    """Training windows of each group, epoch after epoch, in the proportions asked for.

    Within an epoch no window comes twice. The order of a group's windows is a function of (seed,
    name of the group, epoch) alone: two runs with the same seed read the same sequence within each
    group, whatever their mixtures. So the state is a few counts.
    """

    def __init__(self, tokens, names, window, batch, seed, share=1.0):
        """tokens: m arrays of ids. names: m. window: T tokens. batch: B windows. share: only this
        share of each group's windows, evenly spaced, so that a short run repeats as a long one.

        Raises DataError if a group has not one window.
        """
        self.tokens = [np.asarray(ids) for ids in tokens]         # plain views: quicker to slice
        self.names = list(names)
        self.window, self.batch_size, self.seed = window, batch, seed

        available = np.array([(len(ids) - 1) // window for ids in tokens])      # (m,)
        for name, ids, count in zip(self.names, tokens, available, strict=True):
            if count < 1:
                raise DataError(f"group {name} has {len(ids)} training tokens, "
                                f"but a window takes {window + 1}: add text")

        self.spacing = 1 / share                                  # from one to the next
        self.windows = np.maximum(1, (available * share).astype(int))           # (m,) of an epoch
        self.drawn = np.zeros(len(self.names), np.int64)          # (m,) windows so far
        self.carry = np.zeros(len(self.names), np.int64)          # (m,) asked - planned, billionths
        self.shuffled_part = [None] * len(self.names)             # which part `shuffled` holds
        self.shuffled = [None] * len(self.names)                  # m orders of windows
        self._spread(np.zeros(len(self.names), np.int64))

    @property
    def epochs(self):
        """(m,) how often each group has been gone through."""
        return self.drawn / self.windows

    def plan(self, p, steps):
        """Begin a request of `steps` batches at mixture p (m,).

        Returns the windows of each group, (m,) int64, by largest remainder of all that was asked so
        far: each group's total stays within one window of its total ask, and an ask of whole
        windows is met exactly (probes rely on it). Raises ValueError if p is not a mixture, or if
        the last plan is not drawn to its end.
        """
        p = np.asarray(p, float)
        self._check(p)

        total = steps * self.batch_size
        ask = billionths(p, total)
        counts = ask // WHOLE
        if (ask % WHOLE).any():
            counts = largest_remainder(self.carry + ask, total)

        self.carry += ask - counts * WHOLE
        self._spread(counts)
        return counts

    def batch(self):
        """The next batch of the plan: x (B, T), y (B, T) and each window's group (B,), all int64.

        Raises ValueError if the plan is used up.
        """
        if self.at >= len(self.order):
            raise ValueError("the plan is used up: call plan() first")

        group = self.order[self.at:self.at + self.batch_size].astype(np.int64)
        rows = np.empty((self.batch_size, self.window + 1), np.int64)
        for row, j in zip(rows, group.tolist(), strict=True):
            start = self._next(j)
            row[:] = self.tokens[j][start:start + self.window + 1]

        self.at += self.batch_size
        return rows[:, :-1].copy(), rows[:, 1:].copy(), group

    def drop(self):
        """Leave out what is left of the plan."""
        self.at = len(self.order)

    def state_dict(self):
        """Where the streams stand, mid-plan too, in plain numbers, strings and lists."""
        return {"setting": self._setting(), "at": self.at, "counts": self.counts.tolist(),
                "drawn": self.drawn.tolist(), "carry": self.carry.tolist()}

    def load_state_dict(self, state):
        """Continue from a state_dict(); ValueError if it is of other groups, text or settings."""
        if state["setting"] != self._setting():
            raise ValueError(f"the saved streams were {state['setting']}, "
                             f"these are {self._setting()}")
        self._spread(np.array(state["counts"], np.int64))
        self.drawn = np.array(state["drawn"], np.int64)
        self.carry = np.array(state["carry"], np.int64)
        self.at = state["at"]

    def _check(self, p):
        """ValueError if p (m,) is not a mixture, or if it comes before the last plan's end."""
        right_shape = p.shape == self.drawn.shape
        if not right_shape or not (p >= 0).all() or not abs(p.sum() - 1) <= 1e-6:
            raise ValueError(f"a mixture of {len(self.names)} groups needs as many shares >= 0 "
                             f"of sum 1, not {p}")
        if self.at < len(self.order):
            batches = (len(self.order) - self.at) // self.batch_size
            raise ValueError(f"{batches} batches of the last plan are not drawn yet")

    def _spread(self, counts):
        """Lay out a plan: the i-th of a group's n windows comes at (i + 1/2) / n of the way.

        So each batch is close to the mixture.
        """
        groups = np.repeat(np.arange(len(counts)), counts)        # (N,)
        first = np.cumsum(counts) - counts                        # (m,) of each group's windows
        place = (np.arange(len(groups)) - first[groups] + .5) / counts[groups]

        self.counts = counts
        self.order = groups[np.argsort(place, kind="stable")]     # (N,) the group of each window
        self.at = 0                                               # windows of the plan drawn

    def _next(self, j):
        """Draw group j's next window; returns where it starts, in tokens."""
        epoch, i = divmod(int(self.drawn[j]), int(self.windows[j]))
        part, i = divmod(i, PART)
        if self.shuffled_part[j] != (epoch, part):                # only one order is in memory
            seed = [self.seed, zlib.crc32(self.names[j].encode()), epoch]
            self.shuffled[j] = shuffled(int(self.windows[j]), seed, part)
            self.shuffled_part[j] = (epoch, part)
        self.drawn[j] += 1
        return int(self.shuffled[j][i] * self.spacing) * self.window

    def _setting(self):
        return [self.names, self.windows.tolist(), self.window, self.batch_size, self.seed]


def shuffled(count, seed, part=0):
    """Windows 0 ... count - 1 in random order; of more than 2^20, only this part: (up to 2^20,).

    A part is spread over the whole text: it takes every k-th window. So no array is as long as the
    corpus, and the parts 0, 1, ... together have each window once.
    """
    size = min(PART, count - part * PART)
    seed = [*seed, part] if part else seed
    order = np.random.default_rng(seed).permutation(size)
    parts = -(-count // PART)
    stride = next(k for k in itertools.count(parts) if math.gcd(k, count) == 1)    # to miss none
    return (part * PART + order) * stride % count


def billionths(p, total):
    """A mixture p (m,) of `total` windows, in billionths of a window: (m,) int64, exact in sum."""
    ask = np.rint(p / p.sum() * total * WHOLE).astype(np.int64)
    ask[np.argmax(p)] += total * WHOLE - ask.sum()
    return ask


def largest_remainder(owed, total):
    """Round what is owed, (m,) billionths of a window, to whole windows >= 0 of sum `total`."""
    counts = np.maximum(owed // WHOLE, 0)                         # a group may be ahead of its ask
    most_behind = np.argsort(counts * WHOLE - owed, kind="stable")      # of equals, the first
    counts[most_behind[:max(0, total - counts.sum())]] += 1
    while counts.sum() > total:
        most_ahead = np.argmin(np.where(counts > 0, owed - counts * WHOLE, np.inf))
        counts[most_ahead] -= 1
    return counts


def fixed_windows(tokens, window, n, seed, name="text"):
    """x and y, (up to n, T) int64: windows that do not overlap, the same at every call.

    They are there to validate and test on. name: of the group, for the DataError that is raised if
    it has not one window.
    """
    available = (len(tokens) - 1) // window
    if available < 1:
        raise DataError(f"group {name} has {len(tokens)} tokens to be measured on, "
                        f"but a window takes {window + 1}: add text")

    starts = shuffled(available, seed)[:n] * window                                 # (n,)
    places = starts[:, None] + np.arange(window + 1)                                # (n, T + 1)
    rows = np.asarray(tokens)[places].astype(np.int64)
    return rows[:, :-1].copy(), rows[:, 1:].copy()


# ---- load: the tokens of the groups asked for

class Corpus(NamedTuple):
    groups: list        # m names
    vocab: int          # tokens of the encoding
    train: list         # m memory-mapped arrays of token ids, (n_tokens,) uint16 or uint32
    val: list
    test: list
    manifest: dict      # where it comes from: documents, bytes, tokens, sha256, versions, seconds
    digest: str = ""    # of all these tokens: results compare where it is the same

    def bytes_per_token(self, split):
        """UTF-8 bytes of a split's text per token, (m,); ends of documents are tokens, no bytes.
        None for a Corpus whose manifest does not say."""
        counts = self.manifest.get("groups")
        if not counts:
            return None
        entries = [counts[group][split] for group in self.groups]
        return np.array([entry["bytes"] / entry["tokens"] for entry in entries])


def load(groups="all", data=None, encoding="bpe1024", cache=".cache", progress=print, *,
         text_field="text", group_field="", document_mark="", out="out"):
    """A Corpus of the groups asked for, prepared on the first call, memory-mapped on later ones.

    groups: "all", or names joined by + or commas. data: a folder of your own text, hf:NAME or
    hf:NAME:CONFIG of a data set on the Hugging Face hub, or None for the embedded groups. encoding:
    bpeN, a tiktoken name, or a file (tiktoken ranks, tokenizer.json); bpeN is learnt from all
    groups there are, whichever are asked for, so that numbers of different data sets compare.
    progress: called with short lines, or None. text_field, group_field, document_mark: see Form.
    out: a folder of results, which are no text even where they are inside `data`. Raises DataError.
    """
    def say(line):
        if progress:
            progress(printable(line))

    form = Form(text_field, group_field, document_mark)
    files, skipped = dict.fromkeys(GROUPS), {}
    if data is not None:
        apart = {Path(cache): "it is the cache", Path(out): "it is for results"}
        files, skipped = own_files(Path(data), form, apart)
    elif form != Form():
        raise DataError("fields and marks are of your own text: name its folder, too")
    for line in skipped_lines(skipped):
        say(line)
    if not group_field:                                           # else the text tells, not files
        for name in names_asked(groups, files, data or "embedded"):
            check_not_empty(name, files[name], skipped)

    folder = Path(cache) / cache_key(files, data, encoding, form)
    try:
        if not is_whole(folder):
            if folder.exists():
                say(f"{folder} is not as it was written: preparing again")
                shutil.rmtree(folder, ignore_errors=True)
            prepare(files, folder, encoding, form, skipped, say)
        return open_corpus(folder, groups, data or "embedded")
    except OSError as error:
        raise DataError(f"cannot use the cache {cache} ({error.strerror or error}): "
                        f"free it or choose another") from None


def names_asked(groups, known, place):
    """The names in `groups`, each once; DataError if one is not known or there are not two."""
    parts = known
    if groups != "all":
        parts = [name.strip() for name in re.split("[+,]", groups)]
    names = [name for name in dict.fromkeys(parts) if name]

    for name in names:
        if name not in known:
            raise DataError(f"no group {name!r}{nearest(name, known)}: "
                            f"there are {', '.join(known) or 'none'}")
    if len(names) < 2:
        raise DataError(f"mixing needs at least two groups, not {len(names)}: "
                        f"{place} has {', '.join(known) or 'none'}")
    return names


def nearest(name, known):
    """", did you mean ...?", where something close exists."""
    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {close[0]}?" if close else ""


def open_corpus(folder, groups, place):
    """Memory-map these groups; DataError where one has nothing to train or to be measured on."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = names_asked(groups, manifest["groups"], place)
    dtype = dtype_of(manifest["vocab"])
    arrays = {split: [] for split in SPLITS}
    digests = []

    for name, split in itertools.product(names, SPLITS):
        counts = manifest["groups"][name]
        entry = counts[split]
        if not entry["tokens"]:
            raise DataError(f"group {name} has no {split} text ({of_copies(counts)}): "
                            f"give it ten or more different documents, or leave it out")
        path = folder / f"{name}.{split}.bin"
        arrays[split].append(np.memmap(path, dtype, "r", shape=(entry["tokens"],)))
        digests.append(entry["sha256"])

    digest = hashlib.md5("".join(digests).encode()).hexdigest()[:8]
    return Corpus(names, manifest["vocab"], **arrays, manifest=manifest, digest=digest)


def split_of(number):
    """8 : 1 : 1. A rank, unlike a hash, fills each split even of a group of ten documents."""
    return {3: "val", 7: "test"}.get(number % 10, "train")


# ---- your own text: a group per sub-folder or top-level file, or per value of a field

TEXT = r"\.txt(\.gz|\.zst)?$"
LINES = r"\.jsonl?(\.gz|\.zst)?$"       # an object a line; where all is one array, see rows_of
TABLE = r"\.(parquet|arrow)$"
NEEDS = {".parquet": "datasets", ".arrow": "datasets", ".zst": "pyarrow"}   # optional packages
NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HUB = "hf:"
MARK = "<|endoftext|>"
CLIP = 60_000       # characters of a file: one generated giant must not fill its group
MOST_GROUPS = 100   # values of a field: one with more is hardly the kind of a text


class Form(NamedTuple):
    """What a user's documents look like; a.b is field b of the object in field a."""
    text: str = "text"      # the field of a document's text
    group: str = ""         # the field whose values are the groups; "": folders and files are
    mark: str = ""          # stands between the documents of a .txt; "": MARK, if it does


def own_files(root, form, apart):
    """({group: its files}, {name of what is not read: why}) of a user's folder, in order of names.

    Links are followed, but nothing is read twice. apart: {folder: what it is instead of text}.
    Raises DataError.
    """
    if str(root).startswith(HUB) and not form.group:
        raise DataError(f"{root} needs --group-field: the field whose values are the groups")
    if str(root).startswith(HUB):
        return {str(root): [root]}, {}
    if not root.is_dir():
        raise DataError(f"no folder {root}: "
                        f"give one with a sub-folder or a .txt or .jsonl file for each group")
    known = f"{LINES}|{TABLE}" if form.group else f"{TEXT}|{LINES}|{TABLE}"
    files, skipped, raw_names = {}, {}, {}

    try:
        met = {identity(folder): what for folder, what in apart.items() if folder.exists()}
        if identity(root) in met:
            raise DataError(f"cannot read {root}, as {met[identity(root)]}: use another folder")
        met[identity(root)] = "it is all of it again"
        ahead = sorted(root.iterdir(), reverse=True)
        while ahead:
            path = ahead.pop()
            name = path.relative_to(root)
            why = why_not(path, known, met)
            if why:
                skipped[str(name)] = why
                continue
            met[identity(path)] = f"it is {name}"
            is_alone = path.is_file() and len(name.parts) == 1
            top = re.sub(known, "", path.name) if is_alone else name.parts[0]
            group = files.setdefault(group_name(top, raw_names), [])
            if path.is_dir():
                ahead += sorted(path.iterdir(), reverse=True)
            else:
                group.append(path)
    except OSError as error:                                      # a link that leads nowhere
        raise DataError(f"cannot read {error.filename} ({error.strerror}): "
                        f"repair it or take it away") from None
    if form.group and not any(files.values()):
        why = "; ".join(skipped_lines(skipped)) or "it is empty"
        raise DataError(f"{root} has no file with fields ({why}): --group-field is for .jsonl, "
                        f".json, .parquet and .arrow")
    return files, skipped


def identity(path):
    """What a file or folder and all links to it have in common; OSError if it is not there."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def why_not(path, known, met):
    """Why a file or folder is not read, or ""; OSError, DataError if it has to be but cannot.

    met: {identity: what it is} of what is read already or never.
    """
    if path.name.startswith("."):
        return "it is hidden"
    if identity(path) in met or path.is_dir():
        return met.get(identity(path), "")
    if path.name in NOTES:
        return "it describes a data set"
    if not re.search(known, path.name):
        return "files of its ending are not read"
    if not path.is_file():
        raise DataError(f"{path} is a pipe or a device, not a file: take it away")
    return ""


def skipped_lines(skipped):
    """Yield a line for each reason, with ten names at most."""
    reasons = collections.defaultdict(list)
    for name, why in skipped.items():
        reasons[why].append(name)
    for why, names in reasons.items():
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        yield f"not read, as {why}: {', '.join(names[:10])}{more}"


def check_not_empty(group, files, skipped):
    """Raise DataError, with what there is instead, if a group has no file to read."""
    inside = {name: why for name, why in skipped.items() if clean(Path(name).parts[0]) == group}
    if files == []:
        why = "; ".join(skipped_lines(inside)) or "its folder is empty"
        raise DataError(f"group {group} has no text ({why}): "
                        f"give it .txt, .jsonl, .json, .parquet or .arrow, or leave it out")


def clean(name):
    """A group's name as it can be printed, be part of a path, and of a list joined by + or commas.
    """
    safe = re.sub(r"[?/\\+,]", "_", printable(name)).encode()[:80].decode(errors="ignore")
    return safe.strip(" .") or "_"


def group_name(raw, raw_names):
    """clean(raw), if no other name becomes the same. raw_names: {name: raw} so far. DataError."""
    name = clean(raw)
    if raw_names.setdefault(name, raw) != raw:
        raise DataError(f"groups {raw!r} and {raw_names[name]!r} would both be called {name}: "
                        f"rename one")
    return name


def own_documents(files, form, say):
    """Yield (value of the group field or "", whether a document starts here, text) of files.

    A document is a line of .jsonl, a row, what stands between marks, a whole .txt file or, where
    the files are few, a block of one. A long one comes in blocks.
    """
    few, marked = len(files) < 10, 0
    for path in files:
        if re.search(TEXT, path.name):
            marked += yield from text_documents(path, few, form.mark or MARK)
            continue
        for where, record in records(path):
            text = field(record, form.text, str, where, "--text-field")
            group = ""
            if form.group:
                group = field(record, form.group, (str, int), where, "--group-field")
            for number, block in enumerate(cut(text, CLIP)):
                yield group, number == 0, block
    if marked or form.mark:
        say(f"{marked} of {len(files)} files are cut into documents at {form.mark or MARK}")


def text_documents(path, few, mark):
    """As own_documents, of a .txt file; returns whether the mark is in its first megabyte."""
    texts = read(path, 2**20)
    first = next(texts, "")
    is_marked = mark in first
    in_blocks = few and not is_marked
    size = min(8192, max(256, path.stat().st_size // 80)) if in_blocks else CLIP
    for starts, block in blocks(itertools.chain([first], texts), size, mark):
        yield "", starts or in_blocks, block
    return is_marked


def blocks(texts, size, mark):
    """Yield (whether a document starts, block) of texts, joined, with a mark between documents."""
    starts, held = True, ""
    for text in texts:
        *whole, last = (held + text).split(mark)
        for document in whole:
            for block in cut(document, size):
                yield starts, block
                starts = False
            starts = True
        *begun, rest = cut(last[:-len(mark)], size)
        held = rest + last[-len(mark):]                           # a mark may have begun there
        for block in begun:
            yield starts, block
            starts = False
    yield starts, held


def cut(text, size):
    """A text as blocks that end at the first end of a line after `size` characters, or, if that
    takes twice that, at a space. The last is what is left."""
    found, start = [], 0
    while True:
        longest = start + 2 * size
        end = text.find("\n", start + size, longest) + 1
        if not end and len(text) < longest:
            return [*found, text[start:]]
        end = end or text.rfind(" ", start, longest) + 1 or longest
        found.append(text[start:end])
        start = end


def read(path, size):
    """Yield a file's text in pieces of `size` bytes, or line by line if size is 0.

    Raises DataError if the file cannot be read or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()         # without a byte order mark
    end = 0                                                       # of the piece, in bytes
    try:
        with opened(path) as file:
            pieces = iter(lambda: file.read(size), b"") if size else file
            for raw in itertools.chain(pieces, [b""]):
                end += len(raw)
                text = decoder.decode(raw, final=not raw)
                if text.count("\0") > len(text) / 8:
                    raise DataError(f"{path} is full of NUL characters, as UTF-16 without a byte "
                                    "order mark is: convert it or take it away")
                yield text
    except UnicodeDecodeError as error:
        place = end - len(error.object) + error.start
        raise DataError(f"{path} is not UTF-8 at byte {place}: "
                        f"convert it or take it away") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({error}): repair it or take it away") from None


def opened(path):
    """A file of bytes, decompressed."""
    if path.suffix == ".zst":
        return io.BufferedReader(optional("pyarrow", path).input_stream(path, compression="zstd"))
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def optional(package, what):
    """An imported package that requirements.txt does not name; DataError if it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DataError(f"{what} needs the package {package}: pip install {package}") from None


def records(path):
    """Yield (where it is, object) for each line of JSON, or each row of other formats."""
    is_lines = re.search(LINES, path.name)
    if is_lines and not next(read(path, 2**10), "").lstrip().startswith("["):
        for number, line in enumerate(read(path, 0), 1):
            if line.strip():
                where = f"{path}, line {number},"
                yield where, json_object(line, where)
    else:
        for number, row in enumerate(rows_of(path), 1):
            yield f"{path}, row {number},", row


def json_object(line, where):
    """The object of one line of JSON; DataError if there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f'{where} is not a JSON object like {{"text": "..."}}: '
                        f'each line must be one')
    return found


def field(record, name, kind, where, flag):
    """The field a.b.c of an object, as text; DataError if it has none of this kind."""
    value = record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, kind):
        raise DataError(f'{where} has no "{name}" that is text: its fields are '
                        f'{", ".join(fields(record))[:500]}; name one with {flag}')
    return str(value).encode("utf-8", "replace").decode()         # JSON can hold half a character


def fields(record):
    """Yield the names of an object's fields, and of those of objects in it."""
    for name, value in record.items():
        inner = value if isinstance(value, dict) else ()
        yield from [f"{name}.{each}" for each in inner] or [name]


def rows_of(path):
    """Yield the rows, as dicts, of a parquet, arrow or JSON file or of hf:NAME, while reading.

    The package datasets does it; whatever it raises becomes a DataError.
    """
    datasets = optional("datasets", path)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)     # the error says it all
    kind, files = [{".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix, "json")], None
    if str(path).startswith(HUB):
        kind = str(path).removeprefix(HUB).split(":")             # NAME or NAME:CONFIG
    else:
        files = glob.escape(str(path))
    try:
        yield from datasets.load_dataset(*kind, data_files=files, split="train", streaming=True)
    except Exception as error:
        raise DataError(f"datasets cannot read {path} ({type(error).__name__}: {error}): "
                        f"repair it or take it away") from None


# ---- the tokeniser: byte-pair encoding

SAMPLE = 300_000    # bytes of each group that the tokeniser learns from
# GPT-2's pattern: a run of spaces (an indentation) is one piece, so its spaces can merge
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def learn_bpe(texts, size):
    """Byte-pair encoding learnt from texts: {token as bytes: rank}, by age.

    There are `size` tokens, fewer if the text has no more pairs. The most frequent pair merges
    first; of equally frequent ones, the one made of earlier tokens.

    Example: learn_bpe(["ab ab"], 257) has the 256 bytes and then b"ab".
    """
    words = Words(texts)
    tokens = [bytes([i]) for i in range(256)]
    heap = [(-count, pair) for pair, count in words.pairs.items()]
    heapq.heapify(heap)

    while len(tokens) < size and heap:
        negative_count, pair = heapq.heappop(heap)
        if negative_count == 0 or -negative_count != words.pairs[pair]:
            continue                                              # the heap has a newer entry

        for changed in words.merge(pair, chr(len(tokens))):
            heapq.heappush(heap, (-words.pairs[changed], changed))
        left, right = map(ord, pair)
        tokens.append(tokens[left] + tokens[right])               # no other pair spells the same
    return {token: rank for rank, token in enumerate(tokens)}


class Words:
    """The distinct pieces of some texts, and how often pairs of tokens occur in them.

    A token is the character of its number: a piece is a string, and a pair is two characters.
    """

    def __init__(self, texts):
        counter = collections.Counter()
        for text in texts:
            counter.update(regex.findall(PATTERN, text))

        self.words = [word.encode().decode("latin-1") for word in counter]
        self.counts = list(counter.values())
        self.pairs = collections.Counter()                        # pair: how often it occurs
        self.where = collections.defaultdict(set)                 # pair: the words it may be in
        for word, tokens in enumerate(self.words):
            for left, right in itertools.pairwise(tokens):
                self._count(left + right, word, +1)

    def merge(self, pair, new):
        """Make `pair` one token `new` in all words; returns the pairs whose counts this changed.

        Only what stands beside the pair is counted anew, so that long words are no slower.
        """
        left, right = pair
        changed = set()
        for word in self.where.pop(pair):
            parts = self.words[word].split(pair)
            self.words[word] = new.join(parts)
            for i, (before, after) in enumerate(itertools.pairwise(parts)):
                if before or i:                                   # else the word begins with it
                    changed.add(self._count((before[-1:] or right) + left, word, -1))
                    changed.add(self._count((before[-1:] or new) + new, word, +1))
                if after:                                         # else it is before the next one
                    changed.add(self._count(right + after[0], word, -1))
                    changed.add(self._count(new + after[0], word, +1))
        self.pairs[pair] = 0
        return changed

    def _count(self, pair, word, sign):
        """Put a pair of a word into the counts (+1) or take it out (-1); returns it."""
        self.pairs[pair] += sign * self.counts[word]
        self.where[pair].add(word)
        return pair


class Tokeniser(NamedTuple):
    vocab: int          # all ids are below
    end: list           # the ids that end a document
    encode: Callable    # list of texts -> list of lists of ids


def of_tiktoken(enc):
    """A tiktoken.Encoding as a Tokeniser."""
    has_end = MARK in enc.special_tokens_set
    end = [enc.eot_token] if has_end else enc.encode_ordinary("\n\n")
    encode = functools.partial(enc.encode_ordinary_batch, num_threads=os.cpu_count() or 1)
    return Tokeniser(enc.n_vocab, end, encode)


def own_encoding(name, folder, groups):
    """bpeN, learnt from training text, as a Tokeniser.

    groups: {name: counts} of all that is in `folder`, where the encoding is written, too.
    """
    texts = []
    for group, counts in groups.items():
        with open(folder / f"{group}.train.jsonl") as file:
            texts += sample(map(json.loads, file), counts["train"]["bytes"])

    ranks = learn_bpe(texts, int(name.removeprefix("bpe")))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / f"{name}.tiktoken").write_text("".join(lines))
    return of_tiktoken(ranked(name, ranks))


def sample(texts, total):
    """Yield every k-th of texts of `total` bytes: SAMPLE bytes or so, and not many more."""
    every = max(1, total // SAMPLE)
    seen = taken = 0
    for number, text in enumerate(texts):
        size = len(text.encode())
        seen += size
        if number % every == 0 and taken <= SAMPLE * (1 + seen / total):
            taken += size
            yield text


def ranked(name, ranks):
    """The tiktoken.Encoding of {token as bytes: rank}."""
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def known_encoding(name):
    """A tiktoken encoding or a file's, as a Tokeniser; DataError if there is none, or no way to it.
    """
    known = tiktoken.list_encoding_names()
    if name not in known and Path(name).is_file():
        return json_encoding(name) if name.endswith(".json") else rank_encoding(name)
    if name not in known:
        raise DataError(f"no encoding {name!r}{nearest(name, known)}: use bpeN (N tokens, learnt "
                        f"here), {', '.join(known)}, or a file of ranks or tokenizer.json")
    try:
        return of_tiktoken(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        raise DataError(f"tiktoken could not fetch {name} ({type(error).__name__}): "
                        f"go online once, or use bpe1024") from None


def rank_encoding(path):
    """A file of lines "token in base64, rank", read with GPT-2's pattern, as a Tokeniser."""
    try:
        lines = [line.split() for line in Path(path).read_text("utf-8").splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no file of tiktoken ranks ({error})") from None
    ids = set(ranks.values())
    has_bytes = all(bytes([i]) in ranks for i in range(256))
    if not has_bytes or len(ids) < len(ranks) or min(ids) < 0 or max(ids) >= 2**31:
        raise DataError(f"{path} is no file of tiktoken ranks: it needs all 256 single bytes, and "
                        f"for each token a rank of its own")
    return of_tiktoken(ranked(Path(path).name, ranks))


def json_encoding(path):
    """A tokenizer.json as a Tokeniser. All of a text is encoded: nothing is cut off or added."""
    package = optional("tokenizers", path)
    try:
        found = package.Tokenizer.from_file(str(path))
    except Exception as error:
        raise DataError(f"{path} is no tokenizer.json ({error})") from None
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True                            # a mark in a text is text

    def encode(texts):
        return [each.ids for each in found.encode_batch(texts, add_special_tokens=False)]

    ids = found.get_vocab()
    ends = [ids[name] for name in (MARK, "</s>", "<|end_of_text|>") if name in ids]
    return Tokeniser(max(ids.values()) + 1, ends[:1] or encode(["\n\n"])[0], encode)


# ---- the cache: <cache>/<key>/<group>.<split>.bin and manifest.json

PREP = 2            # raise it when preparation changes: caches are then made again
CHEAP = 2**23       # bytes of a token file up to which it is read to see whether it is whole


def cache_key(files, data, encoding, form):
    """A folder name that changes with all that the tokens depend on."""
    kind, source = "embedded", versions()
    if data is not None:
        paths = [path for path in itertools.chain(*files.values()) if path != Path(data)]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        kind, source = "own", [str(Path(data).resolve()), form, list(files), stats]
    if Path(encoding).is_file():
        source = [source, hashlib.md5(Path(encoding).read_bytes()).hexdigest()]
    digest = hashlib.md5(json.dumps([PREP, source, encoding]).encode()).hexdigest()
    name = re.sub("[^a-z0-9_]", "-", Path(encoding).name[:40])
    return f"{kind}-{name}-{digest[:10]}"


def versions():
    """Whose text and whose tokens these are, without importing anything big."""
    packages = ("torch", "sympy", "numpy", "tiktoken")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version()} | found


def prepare(files, folder, encoding, form, skipped, say):
    """Read, split, tokenise and describe all groups in a temporary folder, then rename it.

    So nothing is ever half-written. Of two processes that prepare at once, the second finds the
    name taken and uses the first's.
    """
    start = time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_killed(folder.parent)
    learnt = re.fullmatch(r"bpe(\d+)", encoding)
    if learnt and not 256 <= int(learnt[1]) <= 65536:             # fail before an hour's reading
        raise DataError(f"encoding {encoding}: bpeN needs an N from 256 to 65536")
    if not learnt:
        tokeniser = known_encoding(encoding)
    for path in itertools.chain(*filter(None, files.values())):
        if path.suffix in NEEDS:
            optional(NEEDS[path.suffix], path)

    with tempfile.TemporaryDirectory(prefix="preparing-", dir=folder.parent) as work:
        work = Path(work)
        groups = read_groups(files, form, work, say)
        if learnt:
            say(f"learning {encoding} ...")
            tokeniser = own_encoding(encoding, work, groups)
        for group, counts in groups.items():
            say(f"encoding {group} ...")
            for split in SPLITS:
                counts[split] |= write_tokens(work, f"{group}.{split}", tokeniser)

        manifest = {"groups": groups, "encoding": encoding, "form": form._asdict(),
                    "skipped": skipped, "versions": versions(), "vocab": tokeniser.vocab,
                    "seconds": round(time.time() - start, 1)}
        manifest["checksum"] = checksum(manifest)
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        with contextlib.suppress(OSError):
            work.rename(folder)


def clear_killed(cache):
    """Take away what was left by runs that were killed here: folders that did not change for a
    day."""
    for work in cache.glob("preparing-*"):
        with contextlib.suppress(OSError):                        # another one takes it away
            changed = max(path.stat().st_mtime for path in (work, *work.iterdir()))
            if changed < time.time() - 86_400:
                shutil.rmtree(work)


def checksum(manifest):
    """Of all else that a manifest says: one that was cut or edited is not believed."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.md5(json.dumps(rest).encode()).hexdigest()


def is_whole(folder):
    """Whether a prepared folder is as it was written: files by their size, small ones by sha256."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["checksum"] != checksum(manifest):
            return False
        width = np.dtype(dtype_of(manifest["vocab"])).itemsize
        for group, split in itertools.product(manifest["groups"], SPLITS):
            path, entry = folder / f"{group}.{split}.bin", manifest["groups"][group][split]
            size = path.stat().st_size
            if size != width * entry["tokens"]:
                return False
            if size <= CHEAP and hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                return False
        return True
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def read_groups(files, form, work, say):
    """Write the documents of all groups into `work`; returns {group: counts as of a Writer}."""
    digests = {}                                                  # {of a text: the group it is in}
    writers, raw_names = {}, {}
    for group, paths in files.items():
        say(f"reading {group} ...")
        if not form.group:
            writers[group] = Writer(work, group, digests)
        if paths is None:
            for split, text in embedded_text(group):
                if group in BOILERPLATE:
                    text = without_repeats(text, digests, group)
                writers[group].add(text, split=split)
            continue
        for value, starts, text in own_documents(paths, form, say):
            name = group_name(value, raw_names) if form.group else group
            if name not in writers:
                writers[name] = Writer(work, name, digests)
            writers[name].add(text, starts)
            if len(raw_names) > MOST_GROUPS:
                raise DataError(f"--group-field {form.group} has over {MOST_GROUPS} values, one "
                                f"is {value!r}: name a field of kinds of text")

    code_and_prose.cache_clear()
    for name, writer in writers.items():
        writer.flush()
        if writer.counts["copies"]:
            say(f"{name}: {of_copies(writer.counts)}")
    return {name: writer.counts for name, writer in writers.items()}


def of_copies(counts):
    """How many documents of a group are left, and of which groups those dropped were copies."""
    lost = [f"{count} copies of text in {group}" for group, count in counts["copies"].items()]
    kept = sum(counts[split]["documents"] for split in SPLITS)
    return f"{kept} documents, without {' and '.join(lost) or 'copies'}"


class Writer:
    """Writes a group's documents to <group>.<split>.jsonl in a folder, a text a line, none twice.

    counts: {split: {"documents": their number, "bytes": of their text}, "copies": {group that has
    a text already: how often it was dropped here}}.
    """

    def __init__(self, folder, group, digests):
        self.folder, self.group, self.digests = folder, group, digests
        self.counts = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
        self.counts["copies"] = collections.Counter()
        self.rank, self.is_kept = 0, False                        # of the document in progress
        self.lines, self.held = {split: [] for split in SPLITS}, 0
        self.flush()

    def add(self, text, starts=True, split=None):
        """Take a text, unless it is blank or was met before. starts: whether a document does.

        Without a split, the rank of its document among those that are kept decides.
        """
        if starts and self.is_kept:
            self.rank, self.is_kept = self.rank + 1, False
        earlier = met_in(text, self.digests, self.group)
        if earlier:
            self.counts["copies"][earlier] += 1
        if earlier is not None:
            return

        self.is_kept = True
        split = split or split_of(self.rank)
        self.counts[split]["documents"] += 1
        self.counts[split]["bytes"] += len(text.encode())
        self.lines[split].append(json.dumps(text) + "\n")
        self.held += len(text)
        if self.held > 2**18:
            self.flush()

    def flush(self):
        """Write what is held. No file stays open, however many groups there are."""
        for split, lines in self.lines.items():
            with open(self.folder / f"{self.group}.{split}.jsonl", "a") as file:
                file.writelines(lines)
            lines.clear()
        self.held = 0


def met_in(text, digests, group):
    """The group that a text was met in before, or None, and then remember it. Blank text: ""."""
    text = text.strip()
    digest = int.from_bytes(hashlib.md5(text.encode()).digest()[:7])    # in little memory
    if text and digest not in digests:
        digests[digest] = group
        return None
    return digests[digest] if text else ""


def without_repeats(text, digests, group):
    """A text without the long paragraphs that were met before.

    What is left may be one long paragraph alone: a Writer then takes it for a copy.
    """
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if len(paragraph) <= 40
                       or met_in(paragraph, digests, group) is None)


def write_tokens(work, name, tokeniser):
    """Turn the documents <name>.jsonl into the tokens <name>.bin.

    Returns {"tokens": their number, "sha256": of the file}.
    """
    dtype = dtype_of(tokeniser.vocab)
    tokens, sha = 0, hashlib.sha256()

    with open(work / f"{name}.jsonl") as file, open(work / f"{name}.bin", "wb") as out:
        for lines in iter(lambda: file.readlines(2**20), []):     # until none is left
            for ids in tokeniser.encode([json.loads(line) for line in lines]):
                raw = np.array(ids + tokeniser.end, dtype).tobytes()
                tokens += len(ids) + len(tokeniser.end)
                sha.update(raw)
                out.write(raw)

    (work / f"{name}.jsonl").unlink()
    return {"tokens": tokens, "sha256": sha.hexdigest()}


def dtype_of(vocab):
    """The smallest type that holds all token ids."""
    return np.uint16 if vocab <= 65536 else np.uint32


# ---- embedded text: what installing requirements.txt has put on this machine

CAP = 5_000_000     # characters of a group, before paragraphs met twice go
SKIP = {"__pycache__", "site-packages", "dist-packages",
        "test", "tests", "idle_test", "include", "encodings"}
SOURCES = {         # group: (package, folder in it, names of files, folders not to enter)
    "python": [("stdlib", "", r"\.py$", SKIP), ("torch", "", r"\.py$", SKIP)],
    "cpp": [("torch", "include", r"\.(h|hpp|cuh)$", {"ops"})],
    "prose": [(package, "", r"\.py$", SKIP) for package in ("stdlib", "torch", "numpy", "sympy")],
    "math": [("sympy", "", r"(^|/)tests/\w+\.py$", {})],
    "tables": [("stdlib", "encodings", r"\.py$", {})],
    "csv": [("numpy", "", r"(umath-validation-set|-testset-)[^/]*\.csv$", {})],
    "aten": [("torch", "include/ATen/ops", r"\.h$", {})],
}
# where long paragraphs repeat (licences, includes): only the first stays
BOILERPLATE = ("cpp", "prose", "aten")


def embedded_text(group):
    """Yield (split, text) of a group's files, in the order of a hash of the path, up to CAP.

    Hashed names start at the package: the result does not depend on where Python is, and a file's
    code (python) and docstrings (prose) fall into the same split.
    """
    sources = embedded_sources(group)
    hashed = sorted((hashlib.md5(name.encode()).digest(), source) for name, source in sources)
    few = len(hashed) < 150                                       # they stay whole, split by rank

    characters = 0
    for rank, (digest, source) in enumerate(hashed):
        text = source if isinstance(source, str) else read_source(group, source)
        if len(text) > CLIP and not few:
            text = text[:text.rfind("\n", 0, CLIP) + 1]
        last_byte = digest[-1]                                    # the first ones gave the order
        yield split_of(rank if few else last_byte), text

        characters += len(text)
        if characters > CAP:
            return


def embedded_sources(group):
    """Yield (name, path of a file) of a group, and for prose (title, text) of pydoc's topics."""
    for package, folder, pattern, skip in SOURCES[group]:
        for name, path in walk(package_root(package) / folder, pattern, skip):
            yield f"{package}/{folder}/{name}", path
    if group == "prose":
        for title, text in topics.items():
            yield f"topics/{title}", text


def package_root(package):
    """Folder of an installed package, found without importing it; DataError if there is none."""
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise DataError(f"the embedded text needs the package {package}: "
                        f"pip install {package}, or give your own text")
    return Path(spec.origin).parent


def walk(root, pattern, skip=()):
    """Yield (relative path, path) of the files under root whose relative path matches."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if re.search(pattern, name):
                yield name, path


def read_source(group, path):
    """Text of an installed file as its group wants it; "" if it cannot be read.

    That is no error, as it is not the user's fault.
    """
    try:
        text = path.read_text("utf-8")
        if group not in ("python", "prose"):
            return text
        if group == "prose" and text.count('"""') < len(text) / 1500:
            return ""                                 # too few docstrings to be worth parsing
        code, prose = code_and_prose(text)
        return prose if group == "prose" else code
    except (OSError, SyntaxError, ValueError):
        return ""


@functools.cache                                      # python and prose read many of the same files
def code_and_prose(source):
    """A Python source as (code without docstrings, paragraphs of docstrings without examples)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")               # invalid escapes in other people's strings
        nodes = [ast.parse(source)]
    lines = source.split("\n")
    paragraphs = []

    while nodes:                                      # statements only: much faster than ast.walk
        node = nodes.pop()
        for block in ("body", "orelse", "handlers", "finalbody"):
            nodes += getattr(node, block, ())
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue

        docstring = ast.get_docstring(node)
        if docstring:
            statement = node.body[0]
            first, end = statement.lineno - 1, statement.end_lineno
            lines[first:end] = [None] * (end - first)
            parts = docstring.split("\n\n")
            paragraphs += [text for text in parts if ">>>" not in text and len(text) > 40]

    code = "\n".join(line for line in lines if line is not None)
    return code, "\n\n".join(paragraphs)
