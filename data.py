"""Text in, one stream of training windows per group out.

    corpus = load("python+csv")                       # or load(data="my/texts"): a group per folder or file
    sampler = Sampler(corpus.train, corpus.groups, window=64, batch=8, seed=0)
    counts = sampler.plan([0.7, 0.3], steps=100)      # windows of each group in the next 100 batches
    x, y, group = sampler.batch()                     # (B, T), (B, T), (B,)

Read the last part first: `Sampler` is what mixing needs. Above it, in the order of the work: where the embedded text
comes from, how your own is read, the tokeniser, the cache. A document (a file, a line of .jsonl, a block of a long
file) is in one split only, and so are its copies. Nothing is downloaded, unless you ask for one of tiktoken's own
encodings, and memory does not grow with the corpus.
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
import os
import platform
import re
import sysconfig
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from pydoc_data.topics import topics          # the language reference as pydoc prints it: {title: text}
from typing import NamedTuple

import numpy as np
import regex                                  # comes with tiktoken, whose patterns it understands
import tiktoken

GROUPS = ("python", "cpp", "prose", "math", "tables", "csv", "aten")
HEADROOM = ("python+csv", "prose+tables", "python+aten", "cpp+math+tables", "python+prose+csv", "all")
CONTROLS = ("python+prose", "cpp+math")       # uniform should be near the best here: the right answer is to stay
SETS = HEADROOM + CONTROLS                    # fixed beforehand, so that nobody picks them by results

PREP = 1                                      # raise it when preparation changes: caches are then made again
CLIP = 60_000                                 # characters of a file: one generated giant must not fill its group
CAP = 5_000_000                               # characters of an embedded group, before paragraphs met twice go
SAMPLE = 300_000                              # bytes of each group that the tokeniser learns from
SPLITS = ("train", "val", "test")
# GPT-2's pattern: a run of spaces (an indentation) is one piece, so its spaces can merge
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

class DataError(ValueError):
    """The user's text, names or folders are at fault. One line: what is wrong, where, and what to do."""

class Corpus(NamedTuple):
    groups: list          # m names
    vocab: int            # tokens of the encoding
    train: list           # m memory-mapped arrays of token ids, (n_tokens,) uint16 or uint32
    val: list
    test: list
    manifest: dict        # where it comes from: documents, bytes, tokens, sha256, versions, seconds
    text: str = ""        # a digest of all these tokens: results compare where it is the same

# ---- embedded text: what `pip install torch numpy tiktoken` has already put on this machine ----

SKIP = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "include", "encodings"}
SOURCES = {               # group: (package, folder in it, names of files, folders not to enter)
    "python": [("stdlib", "", r"\.py$", SKIP), ("torch", "", r"\.py$", SKIP)],
    "cpp": [("torch", "include", r"\.(h|hpp|cuh)$", {"ops"})],
    "prose": [(package, "", r"\.py$", SKIP) for package in ("stdlib", "torch", "numpy", "sympy")],
    "math": [("sympy", "", r"(^|/)tests/\w+\.py$", {})],
    "tables": [("stdlib", "encodings", r"\.py$", {})],
    "csv": [("numpy", "", r"(umath-validation-set|-testset-)[^/]*\.csv$", {})],
    "aten": [("torch", "include/ATen/ops", r"\.h$", {})],
}
BOILERPLATE = ("cpp", "prose", "aten")        # where long paragraphs repeat (licences, includes): only the first stays

def package_root(package):
    """Folder of an installed package, found without importing it."""
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise DataError(f"the embedded text needs the package {package}: pip install {package}, or give your own text")
    return Path(spec.origin).parent

def walk(root, pattern, skip=()):
    """Yield (relative path, path) of the files under root whose relative path matches."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip]
        for path in (Path(folder, f) for f in files):
            if re.search(pattern, name := path.relative_to(root).as_posix()):
                yield name, path

def split_of(number):
    """8 : 1 : 1. A rank, unlike a hash, fills each split even of a group of ten documents."""
    return {3: "val", 7: "test"}.get(number % 10, "train")

def embedded_text(group):
    """Yield (split, text) of a group's files, in the order of a hash of the path, up to CAP characters.

    Hashed paths start at the package: the result does not depend on where Python is, and a file's code (python) and
    docstrings (prose) fall into the same split."""
    named = [(f"{package}/{folder}/{name}", path) for package, folder, pattern, skip in SOURCES[group]
             for name, path in walk(package_root(package) / folder, pattern, skip)]
    if group == "prose":
        named += [(f"topics/{title}", text) for title, text in topics.items()]
    hashed = sorted((hashlib.md5(name.encode()).digest(), source) for name, source in named)
    few, kept = len(hashed) < 150, 0                              # few files stay whole, and split by rank
    for rank, (digest, source) in enumerate(hashed):
        text = source if isinstance(source, str) else read_source(group, source)
        if len(text) > CLIP and not few:
            text = text[:text.rfind("\n", 0, CLIP) + 1]
        yield split_of(rank if few else digest[-1]), text         # the last byte: the first ones gave the order
        kept += len(text)
        if kept > CAP:
            return

def read_source(group, path):
    """Text of an installed file as its group wants it; "" if it cannot be read, as that is not the user's fault."""
    try:
        text = path.read_text("utf-8")
        if group == "prose" and text.count('"""') < len(text) / 1500:
            return ""                                             # too few docstrings to be worth parsing
        return code_and_prose(text)[group == "prose"] if group in ("python", "prose") else text
    except (OSError, SyntaxError, ValueError):
        return ""

@functools.cache                              # python and prose read many of the same files
def code_and_prose(source):
    """A Python source as (code without docstrings, paragraphs of docstrings without examples)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                           # invalid escapes in other people's strings
        nodes = [ast.parse(source)]
    lines, paragraphs = source.split("\n"), []
    while nodes:                                                  # statements only: much faster than ast.walk
        node = nodes.pop()
        for block in ("body", "orelse", "handlers", "finalbody"):
            nodes += getattr(node, block, ())
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if doc := ast.get_docstring(node):
                first, last = node.body[0].lineno - 1, node.body[0].end_lineno
                lines[first:last] = [None] * (last - first)
                paragraphs += [p for p in doc.split("\n\n") if ">>>" not in p and len(p) > 40]
    return "\n".join(line for line in lines if line is not None), "\n\n".join(paragraphs)

# ---- your own text: a group per sub-folder or top-level file ----

TEXT_FILE = r"\.(txt|jsonl)(\.gz)?$"

def own_files(root):
    """{group: its files} of a user's folder, in alphabetical order."""
    if not root.is_dir():
        raise DataError(f"no folder {root}: give one with a sub-folder or a .txt or .jsonl file for each group")
    found = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            paths = sorted(path for name, path in walk(entry, TEXT_FILE) if not re.search(r"(^|/)\.", name))
            found.setdefault(entry.name, []).extend(paths)
        elif re.search(TEXT_FILE, entry.name):
            found.setdefault(re.sub(TEXT_FILE, "", entry.name), []).append(entry)
    if odd := [name for name in found if re.search("[+,]", name)]:
        raise DataError(f"group {odd[0]!r} has one of + and , in its name, which join names: rename it")
    return found

def own_text(files):
    """Yield (split, text) of a user's group while reading it. A document is a line of .jsonl, a .txt file or, in a
    group of fewer than ten files, a block of one."""
    rank = 0
    for path in files:
        if ".jsonl" in path.name:
            size, texts = 0, (json_text(path, i, line) for i, line in enumerate(pieces(path, 0), 1) if line.strip())
        elif len(files) < 10:
            size = min(8192, max(256, path.stat().st_size // 40))
            texts = pieces(path, size)
        else:
            size, texts = CLIP, pieces(path, CLIP)                # a long file comes in pieces, all of one split
        for text in texts:
            yield split_of(rank), text
            rank += size < CLIP
        rank += size == CLIP

def pieces(path, size):
    """Yield the text of a file in pieces of at least `size` bytes that end where a line ends; size 0: its lines."""
    at = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while raw := b"".join(file.readlines(size)) if size else file.readline():
                yield raw.decode()
                at += len(raw)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {at + error.start}: convert it or take it away") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({error}): repair it or take it away") from None

def json_text(path, number, line):
    """The text of one line of a .jsonl file."""
    try:
        line = line.lstrip("\ufeff")                              # a byte order mark
        return json.loads(line)["text"].encode("utf-8", "replace").decode()    # JSON can hold half a surrogate pair
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f'{path}, line {number}, has no "text": each line must be like {{"text": "..."}}') from None

# ---- the tokeniser ----

def learn_bpe(texts, size):
    """Byte-pair encoding of bytes, learnt from texts: {token: rank} of `size` tokens, fewer if the text has no more pairs.
    The most frequent pair merges first; of equally frequent ones, the one made of earlier tokens.

    Example: learn_bpe(["ab ab"], 257) has the 256 bytes and then b"ab"."""
    counted = collections.Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    words, counts = [list(word.encode()) for word in counted], list(counted.values())
    tokens = [bytes([i]) for i in range(256)]
    ranks = {token: i for i, token in enumerate(tokens)}
    pairs, where = collections.Counter(), collections.defaultdict(set)         # pair: its count; the words it is in
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        if n == 0 or -n != pairs[pair]:                           # out of date: the heap has a newer entry
            continue
        merged = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(merged, len(tokens))               # subtle: should a + bc spell what ab + c made, reuse it
        tokens += [merged] * (new == len(tokens))
        changed = set()
        for w in where.pop(pair):
            for sign in (-1, +1):                                 # take the word's pairs out, merge, put them back
                for p in zip(words[w], words[w][1:]):
                    pairs[p] += sign * counts[w]
                    where[p].add(w)
                    changed.add(p)
                words[w] = merge(words[w], pair, new)
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))
    return ranks

def merge(word, pair, new):
    """Replace each `pair` in a list of token ids by `new`, from the left: merge([1, 2, 1, 2], (1, 2), 3) is [3, 3]."""
    out = []
    for token in word:
        if out and out[-1] == pair[0] and token == pair[1]:
            out[-1] = new                     # never merges twice: `new` is longer than either half
        else:
            out.append(token)
    return out

def known_encoding(name):
    """One of tiktoken's own encodings, by name."""
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise DataError(f"no encoding {name!r}{nearest(name, known)}: use bpeN (N tokens, learnt here) or {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise DataError(f"tiktoken could not fetch {name} ({type(error).__name__}): go online once, or use bpe1024") from None

def own_encoding(name, folder, groups):
    """bpeN as a tiktoken.Encoding, learnt from all training text in `folder`; groups: {name: counts}."""
    size = int(name[3:])
    if not 256 <= size <= 65536:
        raise DataError(f"encoding {name}: bpeN needs an N from 256 to 65536")
    texts = []
    for group, counts in groups.items():                          # every n-th document, about SAMPLE bytes in all
        with open(folder / f"{group}.train.jsonl") as file:
            texts += map(json.loads, itertools.islice(file, 0, None, max(1, counts["train"]["bytes"] // SAMPLE)))
    ranks = learn_bpe(texts, size)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / f"{name}.tiktoken").write_text("".join(lines))      # tiktoken.load.load_tiktoken_bpe reads it
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

def nearest(name, known):
    """", did you mean ...?", where something close exists."""
    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {close[0]}?" if close else ""

# ---- the cache: <cache>/<key>/<group>.<split>.bin and manifest.json ----

def load(groups="all", data=None, encoding="bpe1024", cache=".cache", progress=print):
    """Tokens of the groups asked for, prepared on the first call and memory-mapped on each later one.

    groups: "all", or names joined by + or commas. data: a folder of your own text, or None for the embedded groups.
    encoding: bpeN or a tiktoken name; bpeN is learnt from all groups there are, whichever are asked for, so that
    numbers of different data sets compare. progress: called with short lines, or None. Raises DataError."""
    files = dict.fromkeys(GROUPS) if data is None else own_files(Path(data))
    asked = files if groups == "all" else filter(None, (name.strip() for name in re.split("[+,]", groups)))
    names = list(dict.fromkeys(asked))                            # each once
    for name in names:
        if name not in files:
            raise DataError(f"no group {name!r}{nearest(name, files)}: there are {', '.join(files) or 'none'}")
    if len(names) < 2:
        raise DataError(f"mixing needs at least two groups, not {len(names)}: {data or 'embedded'} has {', '.join(files) or 'none'}")
    try:
        key = cache_key(files, data, encoding)
    except OSError as error:                                      # a link that leads nowhere
        raise DataError(f"cannot read {error.filename} ({error.strerror}): repair it or take it away") from None
    try:
        folder = Path(cache) / key
        if not folder.exists():
            prepare(files, folder, encoding, progress or (lambda line: None))
        return open_corpus(folder, names)
    except OSError as error:
        raise DataError(f"cannot use the cache {cache} ({error.strerror or error}): free it or choose another") from None

def versions():
    """Whose text and whose tokens these are, without importing anything big."""
    packages = ("torch", "sympy", "numpy", "tiktoken")
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}

def cache_key(files, data, encoding):
    """A folder name that changes with all that the tokens depend on: of your own files, size and time."""
    source = versions()
    if data is not None:
        stats = [(str(path), path.stat()) for paths in files.values() for path in paths]
        source = [str(Path(data).resolve()), list(files), [(path, s.st_size, s.st_mtime_ns) for path, s in stats]]
    digest = hashlib.md5(json.dumps([PREP, source, encoding]).encode()).hexdigest()
    return f"{'embedded' if data is None else 'own'}-{re.sub('[^a-z0-9_]', '-', encoding)}-{digest[:10]}"

def prepare(files, folder, encoding, progress):
    """Read, split, tokenise and describe all groups in a temporary folder, then rename it: nothing is ever
    half-written. Of two processes that prepare at once, the second finds the name taken and uses the first's."""
    start, manifest, seen = time.time(), {"groups": {}, "encoding": encoding, "versions": versions()}, set()
    folder.parent.mkdir(parents=True, exist_ok=True)
    enc = None if re.fullmatch(r"bpe\d+", encoding) else known_encoding(encoding)        # fail before an hour's reading
    with tempfile.TemporaryDirectory(prefix="preparing-", dir=folder.parent) as work:
        work = Path(work)
        for group, paths in files.items():
            progress(f"reading {group} ...")
            documents = embedded_text(group) if paths is None else own_text(paths)
            manifest["groups"][group] = write_text(documents, work, group, seen, paths is None and group in BOILERPLATE)
        code_and_prose.cache_clear()
        if enc is None:
            progress(f"learning {encoding} ...")
            enc = own_encoding(encoding, work, manifest["groups"])
        for group in files:
            progress(f"encoding {group} ...")
            for split in SPLITS:
                manifest["groups"][group][split] |= write_tokens(work, f"{group}.{split}", enc)
        manifest |= {"vocab": enc.n_vocab, "seconds": round(time.time() - start, 1)}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        with contextlib.suppress(OSError):
            work.rename(folder)

def write_text(documents, work, group, seen, boilerplate):
    """Write <group>.<split>.jsonl, a document a line, none twice; returns documents and bytes of each split."""
    counts = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    with contextlib.ExitStack() as stack:
        gc.disable()                                              # syntax trees: a million objects and no cycles
        stack.callback(gc.enable)
        out = {split: stack.enter_context(open(work / f"{group}.{split}.jsonl", "w")) for split in SPLITS}
        for split, text in documents:
            if boilerplate:
                text = "\n\n".join(p for p in text.split("\n\n") if len(p) <= 40 or is_new(p, seen))
            if is_new(text, seen):
                counts[split]["documents"] += 1
                counts[split]["bytes"] += len(text.encode())
                out[split].write(json.dumps(text) + "\n")
    return counts

def is_new(text, seen):
    """Whether a text is met for the first time, in whatever group and split; blank text is never new."""
    digest = hashlib.md5(text.strip().encode()).digest()          # 16 bytes a document is all that stays in memory
    return bool(text.strip()) and digest not in seen and not seen.add(digest)

def write_tokens(work, name, enc):
    """Turn the documents <name>.jsonl into the tokens <name>.bin; returns their number and the sha256 of the file."""
    end = [enc.eot_token] if "<|endoftext|>" in enc.special_tokens_set else enc.encode_ordinary("\n\n")
    tokens, sha = 0, hashlib.sha256()
    with open(work / f"{name}.jsonl") as texts, open(work / f"{name}.bin", "wb") as out:
        while batch := [json.loads(line) for line in itertools.islice(texts, 64)]:
            for ids in enc.encode_ordinary_batch(batch, num_threads=2):
                raw = np.array(ids + end, dtype_of(enc.n_vocab)).tobytes()
                tokens += len(ids) + len(end)
                sha.update(raw)
                out.write(raw)
    (work / f"{name}.jsonl").unlink()
    return {"tokens": tokens, "sha256": sha.hexdigest()}

def dtype_of(vocab):
    return np.uint16 if vocab <= 65535 else np.uint32

def open_corpus(folder, names):
    """Memory-map the tokens of these groups; DataError where one has nothing to train or to be measured on."""
    manifest = json.loads((folder / "manifest.json").read_text())
    arrays = {split: [] for split in SPLITS}
    for name, split in itertools.product(names, SPLITS):
        tokens = manifest["groups"][name][split]["tokens"]
        if not tokens:
            raise DataError(f"group {name} has no {split} text: give it ten or more different documents, or leave it out")
        arrays[split].append(np.memmap(folder / f"{name}.{split}.bin", dtype_of(manifest["vocab"]), "r", shape=(tokens,)))
    tokens = [manifest["groups"][name][split]["sha256"] for name, split in itertools.product(names, SPLITS)]
    digest = hashlib.md5("".join(tokens).encode()).hexdigest()[:8]
    return Corpus(names, manifest["vocab"], **arrays, manifest=manifest, text=digest)

# ---- windows: T + 1 consecutive tokens at a multiple of T, so T inputs and the T targets one place further ----

WHOLE = 10**9                                 # `carry` counts billionths of a window: integers do not drift

class Sampler:
    """Training windows of each group without replacement, epoch after epoch, in the proportions asked for.

    The order of a group's windows is a function of (seed, name of the group, epoch) alone: two runs with the same
    seed see the same sequence within each group, whatever their mixtures. So the state is a few counts."""

    def __init__(self, tokens, names, window, batch, seed):
        """tokens: m arrays of ids; names: m; window: T tokens; batch: B windows. DataError if a group has no window."""
        self.tokens, self.names = [np.asarray(t) for t in tokens], list(names)     # plain views: quicker to slice
        self.window, self.size, self.seed = window, batch, seed
        self.windows = np.array([(len(t) - 1) // window for t in tokens])          # (m,) in an epoch
        for name, t, n in zip(names, tokens, self.windows):
            if n < 1:
                raise DataError(f"group {name} has {len(t)} training tokens, but a window takes {window + 1}: add text")
        self.drawn = np.zeros(len(names), np.int64)                                # (m,) windows so far
        self.carry = np.zeros(len(names), np.int64)                                # (m,) asked - planned, billionths
        self.shuffled = [(-1, None)] * len(names)                                  # (epoch, order of its windows)
        self._spread(np.zeros(len(names), np.int64))

    @property
    def epochs(self):
        """(m,) how often each group has been gone through."""
        return self.drawn / self.windows

    def plan(self, p, steps):
        """Begin a request of `steps` batches at mixture p (m,); returns the windows of each group, (m,) int64.

        Largest remainder of all that was asked so far: each group's total stays within one window of its total ask,
        and an ask of whole windows is met exactly (probes rely on it)."""
        p, total = np.asarray(p, float), steps * self.size
        if p.shape != self.drawn.shape or not np.isfinite(p).all() or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
            raise ValueError(f"a mixture of {len(self.names)} groups needs as many shares >= 0 of sum 1, not {p}")
        if self.at < len(self.order):
            raise ValueError(f"{(len(self.order) - self.at) // self.size} batches of the last plan are not drawn yet")
        ask = np.rint(p / p.sum() * total * WHOLE).astype(np.int64)                # (m,) billionths
        ask[np.argmax(p)] += total * WHOLE - ask.sum()
        counts = ask // WHOLE
        if (ask % WHOLE).any():
            owed = self.carry + ask
            counts = np.maximum(owed // WHOLE, 0)                                  # a group may be ahead of a small ask
            while counts.sum() < total:
                counts[np.argmax(owed - counts * WHOLE)] += 1                      # the most behind; of equals, the first
            while counts.sum() > total:
                counts[np.argmin(np.where(counts > 0, owed - counts * WHOLE, np.inf))] -= 1
        self.carry += ask - counts * WHOLE
        self._spread(counts)
        return counts

    def _spread(self, counts):
        """Lay out a plan: the i-th of a group's n windows at (i + 1/2) / n of the way, so that each batch is close to p."""
        place = np.concatenate([(np.arange(n) + .5) / n for n in counts if n] or [[]])         # (N,)
        groups = np.repeat(np.arange(len(counts)), counts)                                     # (N,)
        self.counts, self.order, self.at = counts, groups[np.argsort(place, kind="stable")], 0

    def batch(self):
        """The next batch of the plan, x (B, T), y (B, T) and each window's group (B,), all int64."""
        if self.at >= len(self.order):
            raise ValueError("the plan is used up: call plan() first")
        group = self.order[self.at:self.at + self.size].astype(np.int64)
        rows = np.empty((self.size, self.window + 1), np.int64)
        for row, j in zip(rows, group.tolist()):
            start = self._next(j)
            row[:] = self.tokens[j][start:start + self.window + 1]
        self.at += self.size
        return rows[:, :-1].copy(), rows[:, 1:].copy(), group

    def _next(self, j):
        """Draw group j's next window; returns where it starts, in tokens."""
        epoch, i = divmod(int(self.drawn[j]), int(self.windows[j]))
        if self.shuffled[j][0] != epoch:                                           # only this epoch's order in memory
            rng = np.random.default_rng([self.seed, zlib.crc32(self.names[j].encode()), epoch])
            self.shuffled[j] = epoch, rng.permutation(self.windows[j])
        self.drawn[j] += 1
        return int(self.shuffled[j][1][i]) * self.window

    def _setting(self):
        return [self.names, self.windows.tolist(), self.window, self.size, self.seed]

    def state_dict(self):
        """Where the streams stand, mid-plan too, in plain numbers, strings and lists."""
        return {"setting": self._setting(), "at": self.at, "counts": self.counts.tolist(),
                "drawn": self.drawn.tolist(), "carry": self.carry.tolist()}

    def load_state_dict(self, state):
        """Continue from a state_dict(); ValueError if it is of other groups, text or settings."""
        if state["setting"] != self._setting():
            raise ValueError(f"the saved streams were {state['setting']}, these are {self._setting()}")
        self._spread(np.array(state["counts"], np.int64))
        self.drawn, self.carry = np.array(state["drawn"], np.int64), np.array(state["carry"], np.int64)
        self.at = state["at"]

def fixed_windows(tokens, window, n, seed, name="text"):
    """x and y, (up to n, T) int64: windows that do not overlap, the same at every call, to validate and test on.
    name: of the group, for the DataError if there is not one."""
    count = (len(tokens) - 1) // window
    if count < 1:
        raise DataError(f"group {name} has {len(tokens)} tokens to be measured on, but a window takes {window + 1}: add text")
    starts = np.random.default_rng(seed).permutation(count)[:n] * window                       # (n,)
    rows = np.asarray(tokens)[starts[:, None] + np.arange(window + 1)].astype(np.int64)       # (n, T + 1)
    return rows[:, :-1].copy(), rows[:, 1:].copy()
