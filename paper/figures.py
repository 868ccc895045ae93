"""The pictures of a comparison: its table, mixtures over training, landscapes, and Figure 3."""
import json

import numpy as np

import train
from paper.rows import STRATIFIED, Entry, ordered, read_sweep, run_folder
from paper.tables import interval, partners

GRID = Entry("method", "grid")
EDGE = 30                       # per cent: a method can be off by far more than fits
SMALL = dict(fontsize="small")


def draw(rows, out):
    """table.png; and for the first seed of each data set mixtures-SET.png, and landscape-SET.png
    where there is a sweep of two or three groups. Needs matplotlib.

    rows: {Entry: row}; out: the folder of the comparison, which has the runs' mixtures and sweeps.
    """
    lines, sets = ordered(rows)
    lines = [line for line in lines if line.kind == "method" and line != STRATIFIED]
    if train.pyplot() is None or not lines:
        return

    draw_table(rows, lines, sets, out / "table.png")
    for groups in sets:
        seeds = [entry.seed for entry in rows if (entry.line, entry.groups) == (STRATIFIED, groups)]
        if seeds:
            draw_set(rows, lines, groups, min(seeds), out)


def draw_set(rows, lines, groups, seed, out):
    """The pictures of one data set and seed, of the runs whose folders are there."""
    entries = [line._replace(groups=groups, seed=seed) for line in lines]
    paths = {entry: run_folder(out, entry) / "result.json" for entry in entries if entry in rows}
    results = {entry.line: json.loads(path.read_text("utf-8"))
               for entry, path in paths.items() if path.exists()}
    if not results:
        return

    uniform = rows[STRATIFIED._replace(groups=groups, seed=seed)]["avg_test_ppl"]
    end = f"{groups.replace('+', '-')}.png"
    draw_mixtures(results, f"{groups}, seed {seed}; stratified: {uniform:.2f}",
                  out / f"mixtures-{end}")
    if GRID in results and len(results[GRID]["groups"]) <= 3:
        P, L = read_sweep(run_folder(out, GRID._replace(groups=groups, seed=seed)))
        draw_landscape(results, P, L, out / f"landscape-{end}")


def draw_table(rows, lines, sets, path):
    """The table of perplexity as dots and intervals."""
    size = max(7, 1.2 + 1.7 * len(sets)), 1 + .28 * len(lines)
    figure, axes = train.pyplot().subplots(1, len(sets), figsize=size, sharey=True,
                                           layout="constrained", squeeze=False)
    for axis, groups in zip(axes[0], sets):
        for y, line in enumerate(reversed(lines)):
            ratios = [row["avg_test_ppl"] / partner["avg_test_ppl"]
                      for row, partner in partners(rows, line, groups)]
            if ratios:
                draw_interval(axis, y, interval([100 * (ratio - 1) for ratio in ratios]))
        axis.axvline(0, color="black", linewidth=.8)
        axis.set_title(groups.replace("+", "+\n", 1), **SMALL)
        axis.set_xlim(-EDGE - 2, EDGE + 2)
    axes[0][0].set_yticks(range(len(lines)), [line.label for line in reversed(lines)])
    figure.supxlabel("average test perplexity against stratified, per cent; 95 % interval; "
                     "arrow: off the scale", **SMALL)
    train.save_figure(figure, path)


def draw_interval(axis, y, found):
    """A dot with its interval; an arrow at the edge if the mean is beyond it."""
    x = min(max(found.mean, -EDGE), EDGE)
    inside = x == found.mean
    half = found.half if inside and not np.isnan(found.half) else None
    axis.errorbar(x, y, xerr=half, fmt="o" if inside else ">", markersize=4, capsize=2,
                  color=train.COLOURS[0] if found.mean < 0 else train.COLOURS[1])


def draw_mixtures(results, about, path):
    """The mixture of every method over training; results: {line: result.json} of one seed."""
    across, down = 4, -(-len(results) // 4)
    figure, axes = train.pyplot().subplots(down, across, figsize=(9, .6 + 1.5 * down), sharex=True,
                                           sharey=True, layout="constrained", squeeze=False)
    for axis in axes.flat[len(results):]:
        axis.axis("off")
    for axis, (line, result) in zip(axes.flat, results.items()):
        steps = [step for step, _ in result["mixtures"]] + [result["steps"]]
        shares = mixtures_of(result)
        axis.stackplot(steps, np.vstack((shares, shares[-1:])).T, step="post",
                       colors=train.COLOURS, labels=result["groups"])
        axis.set_title(f"{line.label}: {result['avg_test_ppl']:.2f}", **SMALL)
        axis.set(xlim=(0, result["steps"]), ylim=(0, 1))
    figure.supxlabel(f"step ({about}; the number is average test perplexity)", **SMALL)
    figure.supylabel("share of windows", **SMALL)
    legend(figure, axes.flat[0], "upper", 7)
    train.save_figure(figure, path)


def mixtures_of(result):
    """The mixtures of a run, in order, (n, m)."""
    return np.array([list(mixture.values()) for _, mixture in result["mixtures"]])


def legend(figure, axis, side, columns):
    """The axis's legend, above or below the figure."""
    figure.legend(*axis.get_legend_handles_labels(), loc=f"outside {side} center", ncols=columns,
                  frameon=False, **SMALL)


def draw_landscape(results, P, L, path):
    """Average validation loss and perplexity of a sweep, P, L (R, m); where each method went, as a
    line, and its average, as a mark."""
    groups = results[GRID]["groups"]
    background = curve if len(groups) == 2 else triangle
    static = [GRID, Entry("method", "dml"), Entry("method", "power")]      # on the sweep's own dots
    moved = [line for line in results if line not in static]
    figure, axes = train.pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, values, unit in ((axes[0], L.mean(1), "loss, nats per token"),
                               (axes[1], np.exp(L).mean(1), "perplexity")):
        place = background(axis, P, values, groups, f"average validation {unit}")
        for j, line in enumerate(moved):
            went, colour = mixtures_of(results[line]), train.COLOURS[j % 7]
            ends = went[1:] if len(went) > 1 else went
            steps = [np.linspace(p, q, 20) for p, q in zip(went, ends)]     # to follow the curve
            average = np.array([list(results[line]["realised_mixture"].values())])
            axis.plot(*place(np.concatenate(steps)), color=colour, linewidth=1)
            axis.plot(*place(average), "sD^v<>Pp*"[j % 9], color=colour, markeredgecolor="white",
                      markersize=8, label=line.label)
    legend(figure, axes[0], "lower", 5)
    train.save_figure(figure, path)


def curve(axis, P, values, groups, label):
    """The sweep of two groups over the share of the first -> where on it mixtures (n, 2) lie."""
    x, y = zip(*sorted(zip(P[:, 0], values)))
    axis.plot(x, y, "o-", color="grey")
    axis.set(xlabel=f"share of {groups[0]}", ylabel=label)

    def place(p):
        return p[:, 0], np.interp(p[:, 0], x, y, np.nan, np.nan)            # no mark beyond it
    return place


def triangle(axis, P, values, groups, label):
    """The sweep of three groups as discs -> where among them mixtures (n, 3) lie."""
    corners = np.array([[0, 0], [1, 0], [.5, .75 ** .5]])

    def place(p):
        return (p @ corners).T

    axis.fill(*corners.T, fill=False, edgecolor="grey")
    discs = axis.scatter(*place(P), c=values, cmap="Greys", s=160, edgecolors="grey")
    axis.figure.colorbar(discs, ax=axis, label=label)
    for group, (x, y) in zip(groups, corners):
        axis.annotate(group, (x, y), ha="center", va="bottom" if y else "top")
    axis.axis("off")
    return place


def figure3(dots, path):
    """How much lower perplexity is than that of stratified over sim, a dot per method and data set.

    dots: paper/judge.py's, which have name, method, objective, sim {title: sim} and gain. Needs
    matplotlib.
    """
    plt = train.pyplot()
    if plt is None or not dots:
        return
    methods = list(dict.fromkeys(dot.method for dot in dots))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, title in zip(axes, dots[0].sim):
        for name in dict.fromkeys(dot.name for dot in dots):
            shown = [dot for dot in dots if dot.name == name]
            j, twin = methods.index(shown[0].method), shown[0].objective == "perplexity"
            x = [dot.sim[title] for dot in shown]
            y = [max(dot.gain["perplexity"], -16) for dot in shown]
            axis.plot(x, y, "sD^v<>P"[j % 7], color=train.COLOURS[j % 7], alpha=1 if twin else .5,
                      label=name, markeredgecolor="black" if twin else train.COLOURS[j % 7])
        axis.axhline(0, color="black", linewidth=.8)
        axis.set(xlabel=title, xlim=(-1.08, 1.08), ylim=(-17, 15))
    axes[0].set_ylabel("average test perplexity below\nstratified, per cent (cut at -16)")
    legend(figure, axes[0], "upper", 5)
    train.save_figure(figure, path)
