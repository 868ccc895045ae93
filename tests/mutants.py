"""Break aioli.py on purpose, one line at a time, and show that the suite notices every time.

    pytest tests/mutants.py            # half an hour: each mutant is a copy of the repository with its own pytest run

Not part of the default `pytest` (the file name does not start with test_). A mutant is (what is broken, the line as it
is, the line as it would be); a line that no longer exists in aioli.py fails too, so the list cannot rot.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = ["tests/test_lmo.py", "tests/test_methods.py", "tests/test_laws.py", "tests/test_first_order.py"]

MUTANTS = [
    ("egd forgets the old mixture", "z = np.log(p) + eta * np.asarray(s)", "z = 0 * np.log(p) + eta * np.asarray(s)"),
    ("egd steps downhill", "z = np.log(p) + eta * np.asarray(s)", "z = np.log(p) - eta * np.asarray(s)"),
    ("egd overflows on large scores", "q = np.exp(z - z.max())", "q = np.exp(z)"),
    ("rounds lose the odd steps", "np.diff(np.arange(rounds + 1) * steps // rounds).tolist()", "[steps // rounds] * rounds"),
    ("normalise does not lift", "A = A - min(A.min(), 0)", "A = A - 0 * min(A.min(), 0)"),
    ("normalise always lifts", "A = A - min(A.min(), 0)", "A = A - A.min()"),
    ("normalise does not divide", "return A / A.sum() if A.sum() > 0", "return A if A.sum() > 0"),
    ("normalise divides nothing by nothing", "if A.sum() > 0 else np.zeros_like(A)", "if True else np.zeros_like(A)"),
    ("A comes out transposed", "np.asarray(drops, float), rcond=None)[0].T", "np.asarray(drops, float), rcond=None)[0]"),
    ("too few mixtures are accepted", "if np.linalg.matrix_rank(P) < P.shape[1]:", "if False:"),
    ("the static solver ignores the weights", "return w @ weigh(law(p), objective)", "return np.sum(weigh(law(p), objective))"),
    ("the static solver ascends", "-slope, eta)", "slope, eta)"),
    ("the log-linear gradient keeps the floor", "return self.t * (self(p) - self.c)[:, None]", "return self.t * self(p)[:, None]"),
    ("the power law forgets its exponents' factor", "return -self.a * self.g * p", "return -self.a * p"),
    ("fits keep the worst start", "better = error < best_error", "better = (error > best_error) | np.isinf(best_error)"),
    ("natural weighs by rank of size", "egd(h.uniform, np.log(h.sizes), alpha)", "egd(h.uniform, h.sizes / h.sizes.sum(), alpha)"),
    ("grid keeps the worst", ".mean(1).argmin()]", ".mean(1).argmax()]"),
    ("dml reports A with the wrong sign", "steps, A=-law.t)", "steps, A=law.t)"),
    ("Skill-It's graph is transposed", "G[:, j] = (before - after) / before", "G[j, :] = (before - after) / before"),
    ("Skill-It's graph is absolute", "G[:, j] = (before - after) / before", "G[:, j] = before - after"),
    ("Skill-It starts from uniform", "A, seen = G, []", "A, seen = 0 * G, []"),
    ("Skill-It's window is one short", "seen[-window:]", "seen[-window + 1:]"),
    ("Skill-It averages its window", "np.sum(seen[-window:], axis=0)", "np.mean(seen[-window:], axis=0)"),
    ("Skill-It weighs columns by loss", "np.sum(seen[-window:], axis=0)[:, None]", "np.sum(seen[-window:], axis=0)[None, :]"),
    ("Skill-It accumulates from the last mixture", "        p = egd(h.uniform, A.sum(0), eta)\n        seen", "        p = egd(p if seen else h.uniform, A.sum(0), eta)\n        seen"),
    ("DoReMi does not smooth", "w = (1 - smoothing) * egd(w, A.sum(0), eta) + smoothing * h.uniform", "w = egd(w, A.sum(0), eta)"),
    ("DoReMi smooths toward twice uniform", "+ smoothing * h.uniform\n", "+ 2 * smoothing * h.uniform\n"),
    ("DoReMi forgets absent groups", "excess = np.where(np.isnan(seen), excess, seen)", "excess = np.nan_to_num(seen)"),
    ("DoReMi returns the last weights", "        total += w\n    yield Train(total / steps, steps)\n\ndef doge", "        total = steps * w\n    yield Train(total / steps, steps)\n\ndef doge"),
    ("DoReMi's proxy steps with the old weights", "        w = (1 - smoothing) * egd(w, A.sum(0), eta) + smoothing * h.uniform\n        yield Update(w, on=\"proxy\")", "        old = w\n        w = (1 - smoothing) * egd(w, A.sum(0), eta) + smoothing * h.uniform\n        yield Update(old, on=\"proxy\")"),
    ("DoGE sums the wrong way", "s = lr * A.sum(0) /", "s = lr * A.sum(1) /"),
    ("DoGE forgets the learning rate", "s = lr * A.sum(0) /", "s = A.sum(0) /"),
    ("DoGE does not cut below", "np.clip(s, 0, cap * lr)", "np.clip(s, -np.inf, cap * lr)"),
    ("DoGE does not cut above", "np.clip(s, 0, cap * lr)", "np.clip(s, 0, np.inf)"),
    ("DoGE multiplies by mu", "cap * lr), 1 / mu)", "cap * lr), mu)"),
    ("DoGE does not clip gradients", "cut = np.minimum(1, 1 / np.maximum(norm, 1e-12))", "cut = np.ones(h.m)"),
    ("DoGE sums targets", "* cut / h.m ", "* cut "),
    ("probes below uniform are accepted", "if not 1 / k < f <= 1 or", "if not 0 < f <= 1 or 0 *"),
    ("the rest of a probe goes to one group", "counts[row, others] = np.diff(np.arange(k) * (windows - own) // (k - 1))", "counts[row, others[0]] = windows - own"),
    ("A is solved from nominal mixtures", "shares.append(h.last.share[arms])", "shares.append((f * np.eye(len(arms)) + (1 - f) / (len(arms) - 1) * (1 - np.eye(len(arms))))[row])"),
    ("drops have the wrong sign", "drops.append(before - after)", "drops.append(after - before)"),
    ("drops are measured from the start of the round", "            before = h.losses()[-1]\n", "            before = h.losses()[-1 - len(drops)]\n"),
    ("second sweeps are not reversed", "order[::-1] if again % 2", "order if again % 2"),
    ("the diagonal ablation keeps everything", "return np.diag(np.diag(A)) if diagonal else A", "return A"),
    ("Aioli sums rows", "score[arms] = scaled.sum(0)\n            p = egd(p, score, eta)", "score[arms] = scaled.sum(1)\n            p = egd(p, score, eta)"),
    ("Aioli does not normalise", "scaled = normalise((w[:, None] * A)[np.ix_(rows, arms)])", "scaled = (w[:, None] * A)[np.ix_(rows, arms)]"),
    ("Aioli forgets its last mixture", "score[arms] = scaled.sum(0)\n            p = egd(p, score, eta)", "score[arms] = scaled.sum(0)\n            p = egd(p > 0, score, eta)"),
    ("the EMA variant accumulates", "p = egd(p > 0, score, eta)", "p = egd(p, score, eta)"),
    ("the EMA weights are swapped", "(1 - ema) * scaled + ema * blend", "ema * scaled + (1 - ema) * blend"),
    ("probe steps come on top of the budget", "yield Train(p, n - cost, A=A)", "yield Train(p, n, A=A)"),
    ("perplexity weighs by loss", "w = np.exp(h.losses()[-1]) if", "w = h.losses()[-1] if"),
    ("the static ablation keeps learning", "yield from adjust(h, steps, 1, eta, f=f", "yield from adjust(h, steps, 2, eta, f=f"),
    ("the target group is trained on", "start = (np.arange(h.m) != i) / (h.m - 1)", "start = h.uniform"),
    ("the target's column counts, not its row", "start=start, rows=[i], f=f", "start=start, rows=None, f=f"),
    ("a prior is learnt on the main run", "for field in (\"on\", \"against\")", "for field in (\"against\",)"),
    ("a prior is learnt on full-length runs", "p = yield from learn(prior, h, steps // 2)", "p = yield from learn(prior, h, steps)"),
    ("after a prior the method always starts from it", "if restart == \"prior\":", "if True:"),
    ("a forecast's slope forgets what is kept alive", "per_share = (1 - self.o) * (1 - self.n.sum()) + self.o", "per_share = 1 - self.n.sum()"),
    ("a forecast's past does not count", "(1 - self.o) * (self.n + (1 - self.n.sum()) * p)", "(1 - self.o) * ((1 - self.n.sum()) * p)"),
    ("the fit of a forecast counts tokens only", "E = (1 - o) * n + o * n.sum(1, keepdims=True) * share", "E = (1 - 0 * o) * n"),
    ("horizon plans for the other objective", "plan = solve_static(law, objective=objective, floor=floor)", "plan = solve_static(law, floor=floor)"),
    ("horizon leaps", "np.clip(np.log(plan / p), -reach, reach)", "np.log(plan / p)"),
    ("horizon never holds", "sum(ends <= last * steps)", "rounds"),
    ("horizon forgets that a prior came first", "sum(before) + steps * h.batch", "steps * h.batch"),
    ("horizon does not wait", "if done >= wait * steps:", "if done >= .12 * steps:"),
    ("forecasts are fitted to the warm-up too", "ready = seen.sum(1) > WARM", "ready = seen.sum(1) > 0"),
    ("grid picks by loss alone", "weigh(L, objective).mean(1).argmin()", "L.mean(1).argmin()"),
    ("dml minimises the loss alone", "solve_static(law, objective=objective), steps, A=-law.t", "solve_static(law), steps, A=-law.t"),
    ("power minimises the loss alone", "solve_static(law, objective=objective, starts=1 + h.m", "solve_static(law, starts=1 + h.m"),
    ("the proxy of DoReMi does not know its length", 'Peek(h.uniform, steps, on="proxy", against', 'Peek(h.uniform, 0, on="proxy", against'),
    ("out of distribution is always the last group", "i = h.groups.index(target)", "i = h.m - 1"),
    ("R^2 forgets the mean", "L.var(0)", "(L ** 2).mean(0)"),
    ("Spearman is Pearson", "np.corrcoef(ranks(a), ranks(b))", "np.corrcoef(a, b)"),
    ("power extrapolates to a corner", "starts=1 + h.m, floor=min(P.min(), .5 / h.m))", "starts=1 + h.m)"),
    ("standard errors forget the degrees of freedom", "(error ** 2).sum(0) / (len(P) - P.shape[1])", "(error ** 2).mean(0)"),
    ("standard errors are those of one probe", "np.diag(np.linalg.inv(P.T @ P))", "np.ones(P.shape[1])"),
    ("sim is never centred", "(x - x.mean() for x in (a, b)) if centred else (a, b)", "(a, b)"),
    ("sim compares row sums", "(np.sum(X, axis=0) for X in (A, B))", "(np.sum(X, axis=1) for X in (A, B))"),
    ("sim is the cosine alone", "for x, y in ((a, b), order)) / 2", "for x, y in ((a, b), (a, b))) / 2"),
]


@pytest.mark.parametrize("what, line, instead", MUTANTS, ids=[what for what, _, _ in MUTANTS])
def test_the_suite_notices_when(what, line, instead, tmp_path):
    source = (ROOT / "aioli.py").read_text()
    assert source.count(line) >= 1, "this line is no longer in aioli.py; update the mutant"
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "aioli.py").write_text(source.replace(line, instead, 1))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", *SUITE]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 1, f"survived:\n{ended.stdout[-2000:]}"
