"""Names of columns as people write them -> time, open, high, low, close, volume, amount."""
import functools
import re

from backstage.series import COLUMNS

HEADERS = {column: names.split() for column, names in {  # best first, as `folded` leaves them
    "time": """candledatetime timeperiodstart time timeopen timestamp timestamps datetime date
        opentime tradetime tradedate windowstart barstart begin starttime startat exchangedate
        traddt candlebegintime bartime bardate tradingdate tradingday startdate periodstart start
        day trddt gmttime localtime utctime utc dtyyyymmdd unix unixtime unixtimestamp epoch ts
        tsevent mts dt ds t datum zeit data fecha tarih дата 时间 日期 交易日期 日付 날짜 일자""",
    "clock": """time hour clock minute timeofday tradetime localtime starttime opentime bartime
        timestamp zeit uhrzeit hora время 时间""",
    "open": """open opening bidopen erster eröffnung eröffn mido pxopen opnpric openprc dayopen
        24hopen opnprc apertura abertura ouv ouvert otwarcie açılış откр открытие 开盘 开盘价 開盤價
        始値 시가 o""",
    "high": """high bidhigh hoch máximo máxima tageshoch midh pxhigh hghpric askhi highest dayhigh
        dayshigh 24hhigh hiprc maximum max massimo plushaut haut najwyzszy najwyższy yüksek макс
        максимум 最高 最高价 最高價 高値 고가 h""",
    "low": """low bidlow tief mínimo mínima tagestief midl pxlow lwpric bidlo lowest daylow dayslow
        24hlow loprc minimum min minimo plusbas bas najnizszy najniższy düşük мин минимум 最低 最低价
        最低價 安値 저가 l""",
    "close": """close bidclose closelast adjclose last settle price midc pxlast clspric prc trade
        closing clsprc schlusskurs schluss zuletzt letzter último ultimo cierre dernier clot
        zamkniecie zamknięcie şimdi kapanış цена закрытие 收盘 收盘价 收盤價 終値 종가 c""",
    "volume": """volume tickvol vol volumecoin tickvolume totalvolume volumetraded tradedvolume
        sharestraded noofshares totaltradedquantity tottrdqty ttltradgvol pxvolume numberofshares
        tickqty basevolume baseassetvolume tradevolume tradingvolume totaltradequantity
        tradedquantity candleacctradevolume adjvolume shares contracts lots dnshrtrd quantity qty
        stuecke stücke volumen wolumen hac hacim объём объем 成交量 成交股數 总手 出来高 거래량 v
        volumemoney""",
    "amount": """amount turnover quotevolume quoteassetvolume value volumemoney money totalturnover
        tottrdval ttltrfval candleacctrade tradingmoney dnvaltrd umsatz volumen 成交额 成交金额
        成交金額 거래대금 金额""",
    "symbol": """symbol ticker tckrsymb tscode code name instrument instrumentname indexname pair
        asset secid stock stockcode stockid stocksymbol tradingsymbol security contract coin ric
        isin stkcd orderbookid uniqueid itemid 股票代码 代码 名称""",
    "interval": "timeframe interval resolution per granularity freq frequency",
}.items()}
PRICES = COLUMNS[:4]
MONEY = """usd usdt usdc busd tusd dai eur gbp jpy krw chf cad aud nzd cny inr brl rub try pln sek
    mxn zar idr currency quote to""".split()  # "Volume USDT" is an amount
COINS = """btc xbt eth xrp ltc bch bsv bnb sol ada doge dot trx link matic pol avax xlm etc eos neo
    dash zec xmr xtz atom uni aave algo fil icp near apt arb sui ton shib pepe hbar vet grt mana
    sand axs ftm inj imx rune ldo mkr snx crv comp bat omg qtum ont iota waves zil ksm xem theta chz
    kava flow gala ape sei tia wld bonk wif stx kas cro okb base coin from shares lots contracts
    units""".split()  # "Volume BTC" is a volume, "Volume MA" is neither
FIELD = "(?P<field>adj close|adjusted|open|high|low|close|volume)"
BETWEEN = r"[\s_:.,'\"()|/-]+"  # it and its symbol: AAPL.Open, Close_AAPL, ('Close', 'AAPL')
FIELD_FIRST = re.compile(f"{FIELD}{BETWEEN}(?P<ticker>.+)", re.I)
TICKER_FIRST = re.compile(f"(?P<ticker>.+?){BETWEEN}{FIELD}", re.I)


@functools.lru_cache(10_000)
def folded(name):
    """A name in lower case, letters and digits only, without "1. ", "(USD)", "Price", "_utc"."""
    name = re.sub(r"(?<=Volume)(?=[A-Z])", " ", name.strip()).lower()
    name = re.sub(r"^\d+[a-z]?\.\s+", "", name)
    letters = re.sub(r"[\W_]", "", name)
    if re.match(r"turnover \((pcs|shares)", name):
        return "volume"
    what = re.fullmatch(r"vol(?:ume)?[ _(]+([a-z]{2,})\)?|volume(to|from)", name)
    unit = what and (what[1] or what[2])
    if unit:
        return "volumemoney" if unit in MONEY else "volumecoin" if unit in COINS else letters
    short = re.sub(r"[\W_]", "", re.sub(r"[(\[].*?[)\]]", "", name)) or letters
    when = re.sub(r"(utc|gmt|iso|ms|ns|millis|unix)$", "", short)
    if when in HEADERS["time"]:
        return when
    in_money = re.fullmatch(rf"(\w+)price({'|'.join(MONEY)})", short)      # openPriceUsd
    return in_money[1] if in_money else short.removeprefix("price").removesuffix("price") or short


def n_known(fields):
    """How many of time, open, high, low, close and volume have a column."""
    fields = set(fields)
    wanted = "time", *PRICES, "volume"
    return sum(not fields.isdisjoint(HEADERS[column]) for column in wanted)


def names_of(cells):
    """(field, ticker) of each column of a header: as they stand, or AAPL.Open taken apart."""
    fields = [folded(cell) for cell in cells]
    named = [(field, "") for field in fields]
    if n_known(fields) > 2:
        return named
    texts = [cell.strip(" '\"()") for cell in cells]
    parts = [FIELD_FIRST.fullmatch(text) or TICKER_FIRST.fullmatch(text) for text in texts]
    if n_known(folded(part["field"]) for part in parts if part) < 4:
        return named
    tickers = {part["ticker"] for part in parts if part}
    for i, (part, field) in enumerate(zip(parts, fields)):
        if part:
            named[i] = (folded(part["field"]), part["ticker"])
        elif len(tickers) == 1 and field in HEADERS["volume"]:  # A.Open,A.High,A.Low,A.Close,Volume
            named[i] = (field, *tickers)
    return named
