"""Text in, one stream of training windows per group out.

    corpus = load("python+csv")                     # or load(data="my/texts"), your own text
    sampler = Sampler(corpus.train, corpus.groups, window=64, batch=8, seed=0)
    counts = sampler.plan([0.7, 0.3], steps=100)    # windows of each group in the next 100 batches
    x, y, group = sampler.batch()                   # (B, T), (B, T), (B,)

`Sampler` comes first: it is all that mixing needs. Below it, what `load` does for you: your own
text, the tokeniser, the cache, and last the text that is already on this machine. A document (a
file, a line of .jsonl, a block of a long file) is in one split only, and so are its copies.
Nothing is downloaded, unless you ask for one of tiktoken's own encodings, and memory does not
grow with the corpus.
"""
import ast
import base64
import collections
import contextlib
import difflib
import functools
import gc
import gzip
import hashlib
import heapq
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import sysconfig
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from pydoc_data.topics import topics    # the language reference as pydoc prints it: {title: text}
from typing import NamedTuple

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


# ---- windows: T + 1 consecutive tokens from a multiple of T: T inputs, and T targets one further

WHOLE = 10**9       # shares of windows are counted in billionths: integers do not drift
PART = 2**20        # windows that are shuffled at once


class Sampler:
    """Training windows of each group, epoch after epoch, in the proportions asked for.

    Within an epoch no window comes twice. The order of a group's windows is a function of (seed,
    name of the group, epoch) alone: two runs with the same seed read the same sequence within each
    group, whatever their mixtures. So the state is a few counts.
    """

    def __init__(self, tokens, names, window, batch, seed):
        """tokens: m arrays of ids. names: m. window: T tokens. batch: B windows.

        Raises DataError if a group has not one window.
        """
        self.tokens = [np.asarray(ids) for ids in tokens]         # plain views: quicker to slice
        self.names = list(names)
        self.window, self.batch_size, self.seed = window, batch, seed

        self.windows = np.array([(len(ids) - 1) // window for ids in tokens])   # (m,) in an epoch
        for name, ids, count in zip(self.names, tokens, self.windows, strict=True):
            if count < 1:
                raise DataError(f"group {name} has {len(ids)} training tokens, "
                                f"but a window takes {window + 1}: add text")

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
        places = [(np.arange(n) + .5) / n for n in counts if n]
        place = np.concatenate(places or [[]])                    # (N,)
        groups = np.repeat(np.arange(len(counts)), counts)        # (N,)

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
        return int(self.shuffled[j][i]) * self.window

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
    while counts.sum() < total:
        most_behind = np.argmax(owed - counts * WHOLE)            # of equals, the first
        counts[most_behind] += 1
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


def load(groups="all", data=None, encoding="bpe1024", cache=".cache", progress=print):
    """A Corpus of the groups asked for, prepared on the first call, memory-mapped on later ones.

    groups: "all", or names joined by + or commas. data: a folder of your own text, or None for the
    embedded groups. encoding: bpeN or a tiktoken name; bpeN is learnt from all groups there are,
    whichever are asked for, so that numbers of different data sets compare. progress: called with
    short lines, or None. Raises DataError.
    """
    files = dict.fromkeys(GROUPS) if data is None else own_files(Path(data))
    names = names_asked(groups, files, data or "embedded")
    key = cache_key(files, data, encoding)

    try:
        folder = Path(cache) / key
        if not folder.exists():
            prepare(files, folder, encoding, progress or (lambda line: None))
        return open_corpus(folder, names)
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


def open_corpus(folder, names):
    """Memory-map these groups; DataError where one has nothing to train or to be measured on."""
    manifest = json.loads((folder / "manifest.json").read_text())
    dtype = dtype_of(manifest["vocab"])
    arrays = {split: [] for split in SPLITS}
    digests = []

    for name, split in itertools.product(names, SPLITS):
        entry = manifest["groups"][name][split]
        if not entry["tokens"]:
            raise DataError(f"group {name} has no {split} text: "
                            f"give it ten or more different documents, or leave it out")
        path = folder / f"{name}.{split}.bin"
        arrays[split].append(np.memmap(path, dtype, "r", shape=(entry["tokens"],)))
        digests.append(entry["sha256"])

    digest = hashlib.md5("".join(digests).encode()).hexdigest()[:8]
    return Corpus(names, manifest["vocab"], **arrays, manifest=manifest, digest=digest)


def split_of(number):
    """8 : 1 : 1. A rank, unlike a hash, fills each split even of a group of ten documents."""
    return {3: "val", 7: "test"}.get(number % 10, "train")


# ---- your own text: a group per sub-folder or top-level file

TEXT_FILE = r"\.(txt|jsonl)(\.gz)?$"
CLIP = 60_000       # characters of a file: one generated giant must not fill its group


def own_files(root):
    """{group: its files} of a user's folder, in alphabetical order. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"no folder {root}: "
                        f"give one with a sub-folder or a .txt or .jsonl file for each group")

    files = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found = walk(entry, TEXT_FILE)
            visible = [path for name, path in found if not re.search(r"(^|/)\.", name)]
            files.setdefault(entry.name, []).extend(sorted(visible))
        elif re.search(TEXT_FILE, entry.name):
            files.setdefault(re.sub(TEXT_FILE, "", entry.name), []).append(entry)

    for group in files:
        if re.search("[+,]", group):
            raise DataError(f"group {group!r} has one of + and , in its name, "
                            f"which join names: rename it")
    return files


def own_text(files):
    """Yield (split, text) of a user's group while reading its files."""
    few = len(files) < 10
    documents = itertools.chain.from_iterable(own_documents(path, few) for path in files)
    for rank, document in enumerate(documents):
        for text in document:
            yield split_of(rank), text


def own_documents(path, few):
    """Yield a file's documents, each as its pieces of text.

    A document is a line of .jsonl, a whole .txt file or, where the files are few, a block of one.
    """
    if ".jsonl" in path.name:
        for number, line in enumerate(pieces(path, 0), 1):
            if line.strip():
                yield [json_text(path, number, line)]
    elif few:
        size = min(8192, max(256, path.stat().st_size // 40))
        for block in pieces(path, size):
            yield [block]
    else:
        yield pieces(path, CLIP)


def pieces(path, size):
    """Yield a file's text in pieces of at least `size` bytes that end where a line ends.

    size 0: line by line. Raises DataError if the file cannot be read or is not UTF-8.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    start = 0                                                     # of the piece, in bytes
    try:
        with opener(path, "rb") as file:
            blocks = iter(lambda: b"".join(file.readlines(size)), b"")    # until one is empty
            for raw in (blocks if size else file):
                yield raw.decode()
                start += len(raw)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {start + error.start}: "
                        f"convert it or take it away") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({error}): repair it or take it away") from None


def json_text(path, number, line):
    """The text of one line of a .jsonl file; DataError if it has none."""
    try:
        text = json.loads(line.lstrip("\ufeff"))["text"]          # without a byte order mark
        return text.encode("utf-8", "replace").decode()           # JSON can hold half a character
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f'{path}, line {number}, has no "text": '
                        f'each line must be like {{"text": "..."}}') from None


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


def own_encoding(name, folder, groups):
    """bpeN as a tiktoken.Encoding, learnt from training text; DataError if N is out of range.

    groups: {name: counts} of all that is in `folder`, where the encoding is written, too.
    """
    size = int(name.removeprefix("bpe"))
    if not 256 <= size <= 65536:
        raise DataError(f"encoding {name}: bpeN needs an N from 256 to 65536")

    texts = []
    for group, counts in groups.items():
        every = max(1, counts["train"]["bytes"] // SAMPLE)        # so about SAMPLE bytes in all
        with open(folder / f"{group}.train.jsonl") as file:
            texts += map(json.loads, itertools.islice(file, 0, None, every))

    ranks = learn_bpe(texts, size)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / f"{name}.tiktoken").write_text("".join(lines))      # for load_tiktoken_bpe
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def known_encoding(name):
    """One of tiktoken's own encodings; DataError if none has this name or it is out of reach."""
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise DataError(f"no encoding {name!r}{nearest(name, known)}: "
                        f"use bpeN (N tokens, learnt here) or {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise DataError(f"tiktoken could not fetch {name} ({type(error).__name__}): "
                        f"go online once, or use bpe1024") from None


# ---- the cache: <cache>/<key>/<group>.<split>.bin and manifest.json

PREP = 1            # raise it when preparation changes: caches are then made again


def cache_key(files, data, encoding):
    """A folder name that changes with all that the tokens depend on; DataError as file_stats."""
    kind, source = "embedded", versions()
    if data is not None:
        kind, source = "own", [str(Path(data).resolve()), list(files), file_stats(files)]
    digest = hashlib.md5(json.dumps([PREP, source, encoding]).encode()).hexdigest()
    return f"{kind}-{re.sub('[^a-z0-9_]', '-', encoding)}-{digest[:10]}"


def versions():
    """Whose text and whose tokens these are, without importing anything big."""
    packages = ("torch", "sympy", "numpy", "tiktoken")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version()} | found


def file_stats(files):
    """(path, size, time of change) of each of the user's files; DataError if one is not there."""
    try:
        stats = [(path, path.stat()) for path in itertools.chain.from_iterable(files.values())]
    except OSError as error:                                      # a link that leads nowhere
        raise DataError(f"cannot read {error.filename} ({error.strerror}): "
                        f"repair it or take it away") from None
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def prepare(files, folder, encoding, progress):
    """Read, split, tokenise and describe all groups in a temporary folder, then rename it.

    So nothing is ever half-written. Of two processes that prepare at once, the second finds the
    name taken and uses the first's.
    """
    start = time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    learnt = re.fullmatch(r"bpe\d+", encoding)
    if not learnt:
        enc = known_encoding(encoding)                            # fail before an hour's reading

    with tempfile.TemporaryDirectory(prefix="preparing-", dir=folder.parent) as work:
        work = Path(work)
        groups = read_groups(files, work, progress)
        if learnt:
            progress(f"learning {encoding} ...")
            enc = own_encoding(encoding, work, groups)
        for group, counts in groups.items():
            progress(f"encoding {group} ...")
            for split in SPLITS:
                counts[split] |= write_tokens(work, f"{group}.{split}", enc)

        manifest = {"groups": groups, "encoding": encoding, "versions": versions(),
                    "vocab": enc.n_vocab, "seconds": round(time.time() - start, 1)}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        with contextlib.suppress(OSError):
            work.rename(folder)


def read_groups(files, work, progress):
    """Write the documents of all groups into `work`; returns {group: counts as of write_text}."""
    digests = set()                                               # of all text, in whatever group
    groups = {}
    for group, paths in files.items():
        progress(f"reading {group} ...")
        documents = embedded_text(group) if paths is None else own_text(paths)
        if paths is None and group in BOILERPLATE:
            documents = without_repeats(documents, digests)
        groups[group] = write_text(documents, work, group, digests)

    code_and_prose.cache_clear()
    return groups


def without_repeats(documents, digests):
    """Yield the documents (split, text) without long paragraphs that were met before.

    What is left of a document may be one long paragraph alone: write_text then takes it for a copy.
    """
    for split, text in documents:
        paragraphs = text.split("\n\n")
        yield split, "\n\n".join(p for p in paragraphs if len(p) <= 40 or is_new(p, digests))


def write_text(documents, work, group, digests):
    """Write <group>.<split>.jsonl, a document a line, none twice.

    Returns {split: {"documents": their number, "bytes": of their text}}.
    """
    counts = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    with contextlib.ExitStack() as stack:
        gc.disable()                              # syntax trees: a million objects and no cycles
        stack.callback(gc.enable)
        out = {}
        for split in SPLITS:
            out[split] = stack.enter_context(open(work / f"{group}.{split}.jsonl", "w"))
        for split, text in documents:
            if is_new(text, digests):
                counts[split]["documents"] += 1
                counts[split]["bytes"] += len(text.encode())
                out[split].write(json.dumps(text) + "\n")
    return counts


def is_new(text, digests):
    """Whether a text is met for the first time; if so, remember it. Blank text is never new."""
    text = text.strip()
    digest = hashlib.md5(text.encode()).digest()  # 16 bytes a document is all that stays in memory
    if not text or digest in digests:
        return False
    digests.add(digest)
    return True


def write_tokens(work, name, enc):
    """Turn the documents <name>.jsonl into the tokens <name>.bin.

    Returns {"tokens": their number, "sha256": of the file}.
    """
    has_end = "<|endoftext|>" in enc.special_tokens_set
    end = [enc.eot_token] if has_end else enc.encode_ordinary("\n\n")
    dtype = dtype_of(enc.n_vocab)
    tokens, sha = 0, hashlib.sha256()

    with open(work / f"{name}.jsonl") as file, open(work / f"{name}.bin", "wb") as out:
        for lines in iter(lambda: list(itertools.islice(file, 64)), []):      # until none is left
            texts = [json.loads(line) for line in lines]
            for ids in enc.encode_ordinary_batch(texts, num_threads=2):
                raw = np.array(ids + end, dtype).tobytes()
                tokens += len(ids) + len(end)
                sha.update(raw)
                out.write(raw)

    (work / f"{name}.jsonl").unlink()
    return {"tokens": tokens, "sha256": sha.hexdigest()}


def dtype_of(vocab):
    """The smallest type that holds all token ids."""
    return np.uint16 if vocab <= 65535 else np.uint32


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
