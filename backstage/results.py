"""What a backtest prints: scores beside the opponents', pairs, groups, the portfolio."""
import os

from backstage.checkpoint import SEEN_DATES
from backstage.dates import iso
from backstage.scores import METRICS, RATIOS, WARN, against, at_step

RIVALRY = dict(  # what is compared with opponents
    da="right calls %", logloss="log loss", mae="close MAE", crps="close CRPS",
    range_crps="range CRPS", volume_crps="volume CRPS", path_crps="paths CRPS",
    path_rv_crps="paths volatility")

BANDS = tuple((f"coverage{q}", f"in {q} % band", 100, 2) for q in (50, 80, 90))
SECTIONS = {  # title: (score, label, factor, digits)
    "next close": (("crps", "CRPS", 1, 4), ("mae", "MAE", 1, 4), ("rmse", "RMSE", 1, 4),
                   ("mape", "MAPE %", 1, 4), *BANDS),
    "next range": (("range_crps", "CRPS", 1, 4), ("range_coverage90", "in 90 % band", 100, 2)),
    "next volume": (("volume_crps", "CRPS", 1, 4), ("volume_coverage90", "in 90 % band", 100, 2)),
    "next direction": (("da", "right calls %", 100, 2), ("balanced_accuracy", "balanced %", 100, 2),
                       ("auc", "AUC", 1, 4), ("logloss", "log loss", 1, 4),
                       ("ece", "ECE %", 100, 2), ("ic", "IC", 1, 3), ("rank_ic", "rank IC", 1, 3)),
    "paths": (("path_crps", "CRPS", 1, 4), ("path_mape", "MAPE %", 1, 4),
              *((f"path_{metric}", *how) for metric, *how in BANDS),
              ("path_rv_crps", "volatility", 1, 4)),
    "risk": (("var95_hits", "beyond VaR %", 100, 2), ("es95_ratio", "loss to ES", 1, 3),
             ("extreme_flagged", "! raised %", 100, 2), ("extreme_said", "! chance %", 100, 2),
             ("extreme_came", "! came true %", 100, 2)),
    "trading": (("long_short", "top-bottom bps", 1, 2), ("turnover", "turnover", 1, 2))}
HEADS = ("still", "up", "ar1", "logit", "gauss", "fhs", "har")  # of the baselines
SCALES = {metric: how for rows in SECTIONS.values() for metric, _, *how in rows}


def print_backtest(result, horizon, cost_bps):
    """Each checkpoint's scores with half their intervals, beside the opponents'; pairs; groups."""
    print(f"{result['split']}: targets {result['start']} to {result['end']}, "
          f"{result['blocks']} blocks of time")
    if "overlap" in result["split"]:
        print(SEEN_DATES)
    print("± half the 95 % interval; MAE, RMSE, CRPS in log return x 100, of volume in its")
    print(f"log; ! more than {WARN:.0%} chance of an extreme move; costs of {cost_bps:g} bps\n")
    own = [entry["ckpt"] for entry in result["checkpoints"]]
    print_scores(result["scores"], own, list(result["baselines"]), horizon)
    print_pairs(result, own)
    print_portfolio(result, horizon)
    if result["by"]:
        print_groups(result["by"], len(own) > 1)


def print_scores(scores, own, rivals, horizon):
    """A row for each score; of lists over steps the last, of errors that in the middle too."""
    def row(label, metric, names, step=None):
        line = f"  {label:14}"
        for name in names:
            score = scores[name].get(metric)
            score = score[step] if isinstance(score, list) else score
            line += f"{number(score, *SCALES[metric], name in own):>{15 if name in own else 7}}"
        print(line)

    print(" " * 16 + "".join(f"{stem(name)[-14:]:>15}" for name in own)
          + "".join(f"{head:>7}" for head in HEADS))
    for title, rows in SECTIONS.items():
        if not any(scores[name].get(metric) for metric, *_ in rows for name in (*own, *rivals)):
            continue  # no volume, or too few symbols to trade
        print(f"{title}, bands after {horizon} bars" if title == "paths" else title)
        for metric, label, *_ in rows:
            if metric in ("path_crps", "path_mape"):
                for k in sorted({(horizon + 1) // 2, horizon}):
                    row(f"{label}, bar {k}", metric, (*own, *rivals), k - 1)
            else:
                row(label, metric, (*own, *rivals), -1)
            if metric == "logloss":
                coin = number(scores["coin"][metric], *SCALES[metric], half=False)
                print(f"  {'  of a coin':14}" + f"{coin:>15}" * len(own))


def print_pairs(result, own):
    print("\npaired, 95 % interval: x ratio, + difference to the best opponent of each score")
    rivals = result["baselines"] | dict(coin=dict(logloss=result["scores"]["coin"]["logloss"]))
    for pair in sorted(result["paired"], key=lambda pair: METRICS.index(pair["metric"])):
        metric, score = pair["metric"], pair["ratio"] or pair["difference"]
        if pair["b"] not in own and pair["b"] != best_rival(rivals, metric):
            continue
        label = RIVALRY.get(metric, metric)
        if isinstance(score, list):
            label, score = f"{label}, bar {len(score)}", score[-1]
        if score:
            text = "x " + show(score, 1, 4)
            if not pair["ratio"]:
                text = "  " + show(score, *SCALES.get(metric, (1, 4)), "+")
            print(f"  {label:22}{text:32}{stem(pair['a'])} to {stem(pair['b'])}")


PORTFOLIO = {  # score: (label, factor, digits)
    "crps": ("CRPS", 1, 3), "coverage90": ("in 90 %", 100, 1), "var95_hits": ("< VaR %", 100, 1),
    "spread_crps": ("spread CRPS", 1, 3), "spread_coverage90": ("in 90 %", 100, 1)}


def print_portfolio(result, horizon):
    """Many symbols together: their paths as they move together, and apart, each by itself."""
    own = {entry["ckpt"]: entry["portfolio"] for entry in result["checkpoints"]
           if entry["portfolio"]}
    if not own:
        return
    rivals = {name: entry["portfolio"] for name, entry in result["baselines"].items()
              if "portfolio" in entry}
    first = next(iter(own.values()))
    print(f"\n{first['origins']} portfolios of {first['symbols']} symbols, equal weights, and "
          f"spreads of pairs, bar {horizon}")
    print(f"{'':15}" + "".join(f"{label:>13}" for label, *_ in PORTFOLIO.values()))
    for name, one in (own | rivals).items():
        for label, scores in ((stem(name)[-14:], one), ("  apart", one["apart"])):
            print(f"{label:15}" + "".join(f"{number(scores[metric], *how):>13}"
                                          for metric, (_, *how) in PORTFOLIO.items()))
    for name, one in own.items():
        for other, ratio in one["ratio"].items():
            print(f"  x {show(ratio['crps'], 1, 3):22} spreads x "
                  f"{show(ratio['spread_crps'], 1, 3):22} {stem(name)[-9:]} to {stem(other)[-9:]}")


def print_groups(groups, several):
    labels = dict(da="right calls %", mae="MAE", crps="CRPS", coverage90="in 90 % band")
    print(f"\n{'':12}{'bars':>8}" + "".join(f"{label:>15}" for label in labels.values()))
    for group in groups:
        line = f"{group['group'][:11]:12}{group['bars']:>8,}"
        line += "".join(f"{number(group.get(metric), *SCALES[metric]):>15}" for metric in labels)
        print(line + f"  {stem(group['ckpt'])}" * several)


def number(score, scale, digits, half=True):
    """A score as text, with half its interval where it has one."""
    if score is None:
        return "."
    values = [score["value"] * scale]
    if half and score["lo"] is not None:
        values.append((score["hi"] - score["lo"]) / 2 * scale)
    return " ±".join(f"{v:.{digits if abs(v) < 10 else min(digits, 2)}f}" for v in values)


def show(score, scale, digits, sign=""):
    """A score with its interval, as text."""
    if score is None:
        return "."
    known = [score[k] for k in ("value", "lo", "hi") if score[k] is not None]
    value, *ends = (f"{v * scale:{sign}.{digits}f}" for v in known)
    return f"{value} [{', '.join(ends)}]" if ends else value


def stem(path):
    return os.path.basename(path).removesuffix(".pt")


def best_rival(rivals, metric):
    """The name of the opponent with the best score; of lists over steps, the last."""
    error = {}
    for name, scores in rivals.items():
        score = scores.get(metric)
        score = score[-1] if isinstance(score, list) else score
        if score:
            value = score["value"]
            error[name] = -value if metric == "da" else value       # all others are errors
    return min(error, key=error.get, default=None)


def print_versus(columns, t, rows, versus=(-1, 0)):
    """Forecasters {name: model_scores} side by side; those at the places `versus` also paired.

    rows: (metric, label, scale, digits); of path scores (metric, step or None for their mean) in
    the first place.
    """
    names = list(columns)
    a, b = (names[place] for place in versus)
    print(f"targets {iso(t.time.min())} to {iso(t.time.max())}: {len(t.r):,} bars, "
          f"{t.n_blocks} blocks; {len(t.path_r):,} origins")
    print(f"{'':22}{''.join(f'{name[-9:]:>10}' for name in names)}   {a} to {b}, 95 %")
    for metric, label, scale, digits in rows:
        metric, step = metric if isinstance(metric, tuple) else (metric, -1)
        if metric not in columns[a]:
            continue
        line = f"{label:22}"
        for own in columns.values():
            value = at_step(own, metric, step)[0] * scale if metric in own else None
            line += f"{'.':>10}" if value is None else f"{value:>10.{digits}f}"
        if metric in columns[b]:
            score = against(columns[a], columns[b], metric, t, step)
            line += ("   x " + show(score, 1, 4) if metric in RATIOS
                     else "     " + show(score, scale, digits, "+"))
        print(line)
