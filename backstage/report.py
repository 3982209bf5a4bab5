"""What a forecast says: rows of the table, the portfolio, options, ranks, files."""
import csv
import math

import numpy as np

from backstage.clock import future_times, times_ahead
from backstage.dates import iso
from backstage.files import csv_text, open_regular, write_atomic
from backstage.pictures import QUANTILES
from backstage.scores import EXTREME, USUAL_BARS, WARN, chance_extreme, usual_sigma
from backstage.script import UserError, printable
from backstage.series import COLUMNS, DAY, FORECAST, YEAR

STALE = 5  # horizons, and a holiday, after which a symbol without new bars is left out of ranks
MOST_LEVERAGE = 10  # that the sizes of a portfolio's shares add up to; more are percent


def describe(bars, paths, p_up, strikes=(), rate=0.0, times=None):
    """One symbol's row: what the paths [paths, horizon, 6] say, as fractions; VaR and ES are
    losses, so positive.

    p_up: of the next bar, given that it moves; p_up_horizon: the share of the paths that end above
    the last close; p_extreme: the share that end further than EXTREME long-run sigmas from it.
    """
    last, horizon = bars.ohlcva[-1, 3], paths.shape[1]
    close = paths[:, -1, 3]  # (paths,): where they end
    move = close / last - 1
    q05, q50, q95 = np.quantile(close, (0.05, 0.5, 0.95))
    p_extreme = chance_extreme(np.log(close / last), usual_sigma(bars.ohlcva[:, 3]), horizon)
    times = future_times(bars.time, horizon) if times is None else times
    years = (times[-1] - bars.time[-1]) / YEAR
    return dict(symbol=bars.symbol, last_time=iso(bars.time[-1]), last_close=last, p_up=p_up,
                p_up_horizon=(close > last).mean(), expected_return=move.mean(), q05=q05, q50=q50, q95=q95,
                var95=1 - q05 / last, es95=-move[close <= q05].mean(), p_extreme=float(p_extreme), rank=None,
                options=[option(close, last, strike, years, rate) for strike in strikes])


def portfolio_of(histories, ohlcva, weights, seed):
    """What the paths say of a portfolio of n symbols, and of each symbol beside the others.

    weights [n]: shares of the value. -> (dict of the portfolio's figures, {p_best, p_beats: [n]}).
    `apart` has the same figures for paths that do not move together.
    """
    last = np.array([bars.ohlcva[-1, 3] for bars in histories])
    moves = ohlcva[:, :, -1, 3] / last[:, None] - 1                         # (n, paths)
    shuffled = np.random.default_rng([seed, 3]).permuted(moves, axis=1)
    found = dict(weights={bars.symbol: float(w) for bars, w in zip(histories, weights)},
                 **figures(weights @ moves), apart=figures(weights @ shuffled))
    best = np.bincount(moves.argmax(0), minlength=len(moves)) / moves.shape[1]
    return found, dict(p_best=best, p_beats=(moves > moves.mean(0)).mean(1))


def figures(move):
    """Of returns [paths] over the horizon; VaR and ES are losses, so positive."""
    q05, q50, q95 = np.quantile(move, (0.05, 0.5, 0.95))
    return dict(expected_return=move.mean(), q05=q05, q50=q50, q95=q95, var95=-q05,
                es95=-move[move <= q05].mean())


def weights_of(given, histories, horizon):
    """Shares of the portfolio [n], from texts such as AAPL=0.6 or a CSV of symbol,weight; None:
    equal, of the symbols that did not end long before the others.

    UserError for an unknown symbol or a weight that is no number. A symbol without one has 0.
    """
    if given is None:
        live = live_of(histories, horizon)
        return live / live.sum()
    texts = [text for item in given for text in item.split(",")]
    if len(given) == 1 and "=" not in given[0]:
        try:
            with open_regular(given[0]) as f:
                lines = f.read(1 << 20).decode("utf-8-sig", "replace").splitlines()
        except OSError as e:
            raise UserError(f"--weights {given[0]}: cannot be read ({e.strerror}); write "
                            f"{histories[0].symbol}=0.6, or name a CSV of symbol,weight")
        texts = [line.replace(",", "=") for line in lines if line.strip()]
        if texts and texts[0].lower().startswith("symbol"):
            texts = texts[1:]
    place = {bars.symbol: i for i, bars in enumerate(histories)}
    weights = np.zeros(len(histories))
    for text in texts:
        symbol, _, weight = (part.strip() for part in text.partition("="))
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if symbol not in place:
            raise UserError(f"--weights {text}: no such symbol to forecast; write "
                            f"{histories[0].symbol}=0.6")
        if not abs(value) < 1e9:
            raise UserError(f"--weights {text}: not a share; write {symbol}=0.6")
        if weights[place[symbol]]:
            raise UserError(f"--weights {text}: {symbol} is named twice; give it one share")
        weights[place[symbol]] = value
    if not weights.any():
        raise UserError("--weights: all are 0; give at least one symbol a share")
    if abs(weights).sum() > MOST_LEVERAGE:
        raise UserError(f"--weights: {abs(weights).sum():g} times the value in all; they are "
                        f"shares of it: write {symbol}=0.6 for 60 %")
    return weights


def option(close, spot, strike, years, rate):
    """European call and put from the paths' last closes, discounted.

    The paths are scaled so that their mean is the forward spot e^(rT): the market's drift, the
    model's volatility.
    """
    k = float(strike[:-1]) * spot if strike.endswith("x") else float(strike)
    gain = close * (spot * math.exp(rate * years) / close.mean()) - k
    discount = math.exp(-rate * years)
    return dict(strike=k, years=years, call=discount * np.maximum(gain, 0).mean(),
                put=discount * np.maximum(-gain, 0).mean())


def live_of(histories, horizon):
    """Which symbols did not end long before the others, bool [n]."""
    newest = max(bars.time[-1] for bars in histories)
    return np.array([newest - DAY <= bars.time[-1]
                     or newest - DAY <= future_times(bars.time, STALE * horizon)[-1] for bars in histories])


def give_ranks(rows, histories, horizon):
    """Rank by P(up) the rows of the symbols that did not end long before the others; return their
    P(up)s."""
    live = [row for row, lives in zip(rows, live_of(histories, horizon))
            if lives and not math.isnan(row["p_up"])]
    for rank, row in enumerate(sorted(live, key=lambda row: row["p_up"], reverse=True), 1):
        row["rank"] = rank
    return np.array([row["p_up"] for row in live])


def print_report(rows, horizon, breadth, mean_p_up):
    """The rows of `describe` as a table of 80 columns (more where a name is long), best rank
    first."""
    names = {r["symbol"]: printable(r["symbol"]) for r in rows}
    width = max(7, *map(len, names.values()))
    ahead = f"in {horizon}"
    print(f"{'':{width}} {'':>8} {'P(up) %':>11} {'return':>6} {'close ' + ahead + ' bars':^26} {'95 % risk':>11}")
    print(f"{'symbol':{width}} {'close':>8} {'next':>5} {ahead:>5} {'%':>6} {'5 %':>8} {'50 %':>8} {'95 %':>8} "
          f"{'VaR':>5} {'ES':>4}{'rank':>5}")
    for r in sorted(rows, key=lambda row: row["rank"] or math.inf):
        p_up, p_end, mean, var, es = (100 * r[k] for k in ("p_up", "p_up_horizon", "expected_return", "var95", "es95"))
        shown = "." if math.isnan(p_up) else f"{p_up:.1f}"
        rank = r["rank"] or (" stands" if math.isnan(r["p_up"]) else f" ended {r['last_time'][:10]}")
        print(f"{names[r['symbol']]:{width}} {r['last_close']:>8.6g} {shown:>5} {p_end:>5.1f} {mean:>+6.2f} "
              f"{r['q05']:>8.6g} {r['q50']:>8.6g} {r['q95']:>8.6g} {var:>5.1f} {es:>4.1f}{rank:>5}"
              f"{' !' if r['p_extreme'] > WARN else ''}")
    n_ranked = sum(r["rank"] is not None for r in rows)
    if n_ranked:
        print(f"breadth: {breadth:.1%} of {n_ranked} symbols lean up, mean P(up) {mean_p_up:.1%}")
    if n_ranked < len(rows):
        print(f"{len(rows) - n_ranked} symbols ended long before the others, or nearly never move: "
              f"without a rank, and not in the breadth; those that ended only in a portfolio of --weights")
    if any(r["p_extreme"] > WARN for r in rows):
        print(f"! more than {WARN:.0%} chance of a move beyond {EXTREME} sigma of the last {USUAL_BARS} bars")
    if rows[0]["options"]:
        print("\noptions (drift: the forward's; volatility: the model's own)")
        print(f"{'symbol':{width}} {'strike':>10} {'years':>8} {'call':>10} {'put':>10}")
    for r in rows:
        for o in r["options"]:
            print(f"{names[r['symbol']]:{width}} {o['strike']:>10.6g} {o['years']:>8.3g} "
                  f"{o['call']:>10.4g} {o['put']:>10.4g}")


def print_portfolio(portfolio, rows, horizon):
    """The portfolio in one line, beside what paths that do not move together would say."""
    if portfolio is None:
        return
    own, apart = portfolio, portfolio["apart"]
    best = max(rows, key=lambda row: row["p_best"])
    print(f"portfolio in {horizon} bars: {own['expected_return']:+.2%}, 5 to 95 % {own['q05']:+.2%} to "
          f"{own['q95']:+.2%}, VaR {own['var95']:.2%}, ES {own['es95']:.2%}\n"
          f"(symbols apart would say {apart['q05']:+.2%} to {apart['q95']:+.2%}); most likely to end "
          f"first: {printable(best['symbol'])}, {best['p_best']:.0%}")


def print_record(record, calibration, meta, histories):
    """What the model was worth on these very bars, in plain words."""
    if calibration is None:
        return
    if record is None:
        print("no record: too few past bars that move and that the weights have not seen")
    else:
        right, ratios = record["da"], (
            f"{name} {record[name]:.3f}" for name in ("close", "range", "volume")
            if record[name] is not None)
        calls = f"{right['value']:.1%} right calls [{right['lo']:.1%}, {right['hi']:.1%}]"
        if right["lo"] == right["hi"]:
            calls = "no direction called"
        print(f"record, the last {record['bars']:,} bars of these: {calls}, the 90 % band held "
              f"{record['coverage90']:.1%};\nCRPS to HAR, refitted: {', '.join(ratios)}")
        if right["lo"] <= 0.5:
            print(f"no better than a coin on these bars: P(up) is trusted by {calibration.k:.0%}")
    border = meta["splits"][1] if meta.get("splits") else None
    if border is not None and max(bars.time[-1] for bars in histories) < border:
        print(f"weights of {iso(border)[:10]}: they have seen years after these bars, if of others")


def summary(histories, ohlcva, times=None):
    """One row a bar of every forecast, as a dict of columns [n H] that pandas.DataFrame takes.

    time (datetime64, UTC), symbol, step; p_up, the share of paths above the last close; quantiles
    and mean of close; medians of all columns, a valid candle, NaN where the history has no such
    column. histories: Bars; ohlcva [n, paths, H, 6]: see simulate; times [n, H]: its stamps.
    """
    times = times_ahead(histories, ohlcva.shape[2], times)
    close = ohlcva[..., 3]                                                  # (n, paths, H)
    last = np.array([bars.ohlcva[-1, 3] for bars in histories])[:, None]
    medians = np.median(ohlcva, axis=1)                                     # (n, H, 6)
    for row, bars in zip(medians, histories):
        row[:, np.isnan(bars.ohlcva).all(0)] = np.nan
    columns = [times.astype("datetime64[s]"),
               np.repeat([bars.symbol for bars in histories], times.shape[1]),
               np.broadcast_to(np.arange(1, times.shape[1] + 1), times.shape),
               (close > last[..., None]).mean(1), *np.quantile(close, QUANTILES, axis=1),
               close.mean(1), *np.moveaxis(medians, -1, 0)]
    names = [*FORECAST, *(f"q{q * 100:02.0f}" for q in QUANTILES), "mean", *COLUMNS]
    return {name: column.ravel() for name, column in zip(names, columns)}


def write_csv(path, histories, ohlcva, times):
    """The summary as a CSV file."""
    columns = summary(histories, ohlcva, times)
    with write_atomic(path, text=True) as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        for when, symbol, step, *values in zip(*columns.values()):
            texts = ["" if math.isnan(v) else f"{v:.8g}" for v in values]
            writer.writerow([f"{when}Z", csv_text(symbol), step, *texts])


def jsonable(value):
    """Plain JSON values; what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
