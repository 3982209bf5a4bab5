"""Bars from files: each kind of export in a few hand-written lines, beside the bars that a person reads off them."""
import bz2
import gzip
import io
import lzma
import os
import re
import zipfile

import numpy as np
import pytest

from backstage.frame import check_histories
from backstage.dates import iso
from backstage.inputs import read_times
from backstage.mapped import write_folder
from backstage.reader import read_files
from backstage.series import DAY, HOUR
from backstage.report import give_ranks, write_csv as write_forecast
import data
from conftest import write_csv
from data import Bars, UserError


def read(tmp_path, text, name="a.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return data.load(str(path))


def stamps(bars):
    """Times as text, to the minute, without a clock of midnight."""
    return [data.iso(t) for t in bars.time]


def first(bars):
    """The first bar, None where a number is missing."""
    return [None if np.isnan(v) else v for v in bars.ohlcva[0]]


def days(n=40, row="1,3,0.5,2,7", first=0):
    """Rows of n days, from 2020-01-01 plus `first` on."""
    return "".join(f"{np.datetime64('2020-01-01') + first + d},{row}\n" for d in range(n))


# ---- dates: (first cells of rows, their stamps), each in one file

DATES = {
    "ISO": (["2020-01-02", "2020-01-03"], ["2020-01-02", "2020-01-03"]),
    "ISO, zone": (["2020-01-02T00:00:00Z", "2020-01-02T01:00:00Z"], ["2020-01-02", "2020-01-02 01:00"]),
    "ISO, offset": (["2020-01-02 00:00:00-05:00", "2020-01-02 01:00:00-05:00"], ["2020-01-02 05:00", "2020-01-02 06:00"]),
    "ISO, nanoseconds": (["2020-01-02T10:00:00.000000000Z"], ["2020-01-02 10:00"]),
    "slashes": (["2020/01/02", "2020/01/03"], ["2020-01-02", "2020-01-03"]),
    "unpadded": (["2020/1/2 9:05", "2020/1/2 10:05"], ["2020-01-02 09:05", "2020-01-02 10:05"]),
    "dots, year first": (["2020.01.02 00:05", "2020.01.02 00:10"], ["2020-01-02 00:05", "2020-01-02 00:10"]),
    "day first": (["02/01/2020", "13/01/2020"], ["2020-01-02", "2020-01-13"]),
    "month first": (["01/02/2020", "01/13/2020"], ["2020-01-02", "2020-01-13"]),
    "month first, two digits": (["01/02/20", "01/31/20"], ["2020-01-02", "2020-01-31"]),
    "day first, two digits": (["02/01/20", "31/01/20"], ["2020-01-02", "2020-01-31"]),
    "last century": (["12/31/98", "01/04/99"], ["1998-12-31", "1999-01-04"]),
    "dots are day first": (["02.01.2020", "03.01.2020"], ["2020-01-02", "2020-01-03"]),
    "one day both ways": (["01/01/2020"], ["2020-01-01"]),
    "month by name": (["02-Jan-2020", "03-JAN-2020"], ["2020-01-02", "2020-01-03"]),
    "month by name, two digits": (["02-Jan-20", "03-Jan-20"], ["2020-01-02", "2020-01-03"]),
    "month by name, first": (['"Jan 02, 2020"', '"Jan 03, 2020"'], ["2020-01-02", "2020-01-03"]),
    "month in full": (["2 January 2020", "3 January 2020"], ["2020-01-02", "2020-01-03"]),
    "Chinese": (["2020年1月2日", "2020年1月3日"], ["2020-01-02", "2020-01-03"]),
    "half days": (["1/13/2020 12:30:00 AM", "1/13/2020 12:30:00 PM", "1/13/2020 1:30 PM"],
                  ["2020-01-13 00:30", "2020-01-13 12:30", "2020-01-13 13:30"]),
    "hours of half days": (["2020-01-13 11-AM", "2020-01-13 12-PM"], ["2020-01-13 11:00", "2020-01-13 12:00"]),
    "zone by name": (["2020-01-02 14:30:00 UTC", "2020-01-02 14:31:00 UTC"], ["2020-01-02 14:30", "2020-01-02 14:31"]),
    "zone of a city": (["20200102 09:30:00 US/Eastern", "20200702 09:30:00 US/Eastern"], ["2020-01-02 14:30", "2020-07-02 13:30"]),
    "two blanks": (["20200102  14:30:00", "20200102  14:31:00"], ["2020-01-02 14:30", "2020-01-02 14:31"]),
    "offset of Greenwich": (["15.01.2020 15:30:00.000 GMT+0100"], ["2020-01-15 14:30"]),
    "weekday, then day": (['"Thu, 02 Jan 2020"', '"Fri, 03 Jan 2020"'], ["2020-01-02", "2020-01-03"]),
    "weekday, then month": (["Thu Jan 02 2020 01:00:00 GMT+0100", "Fri Jan 03 2020 01:00:00 GMT+0100"], ["2020-01-02", "2020-01-03"]),
    "weekday in full": (['"Monday, January 13, 2020"'], ["2020-01-13"]),
    "clock with a dot": (["13.01.2020 16.30", "13.01.2020 16.31"], ["2020-01-13 16:30", "2020-01-13 16:31"]),
    "clock with an h": (["13/01/2020 16h30", "14/01/2020 16h30"], ["2020-01-13 16:30", "2020-01-14 16:30"]),
    "year of the Republic": (["109/01/02", "109/01/03"], ["2020-01-02", "2020-01-03"]),
    "text to a spreadsheet": (["'13/01/2020", "'14/01/2020"], ["2020-01-13", "2020-01-14"]),
    "a formula": (['"=""2020-01-02"""', '"=""2020-01-03"""'], ["2020-01-02", "2020-01-03"]),
    "SAS": (["02JAN2020", "03JAN2020"], ["2020-01-02", "2020-01-03"]),
    "FIX": (["20200102-09:30:00", "20200102-09:31:00"], ["2020-01-02 09:30", "2020-01-02 09:31"]),
    "Java": (["2020-01-02T01:00:00+01:00[Europe/Paris]"], ["2020-01-02"]),
    "Korean": (["2020년 1월 2일", "2020년 1월 3일"], ["2020-01-02", "2020-01-03"]),
    "compact": (["20200102 143000", "20200102 143100"], ["2020-01-02 14:30", "2020-01-02 14:31"]),
    "YYYYMMDD": (["20200102", "20200103"], ["2020-01-02", "2020-01-03"]),
    "YYYYMMDDHHMM": (["202001020930", "202001020931"], ["2020-01-02 09:30", "2020-01-02 09:31"]),
    "YYYYMMDDHHMMSS": (["20200102093000", "20200102093100"], ["2020-01-02 09:30", "2020-01-02 09:31"]),
    "YYYYMMDDHHMMSSmmm": (["20200102093000000", "20200102093100000"], ["2020-01-02 09:30", "2020-01-02 09:31"]),
    "YYYYMMDDHH": (["2020010209", "2020010210", "2020010211"], ["2020-01-02 09:00", "2020-01-02 10:00", "2020-01-02 11:00"]),
    "YYMMDD": (["200102", "200115", "200131"], ["2020-01-02", "2020-01-15", "2020-01-31"]),
    "YYMMDDHHMM": (["2001020930", "2001020931", "2001020932"], ["2020-01-02 09:30", "2020-01-02 09:31", "2020-01-02 09:32"]),
    "months": (["2019-12", "2020-01"], ["2019-12-01", "2020-01-01"]),
    "YYYYMM": (["201911", "201912", "202001"], ["2019-11-01", "2019-12-01", "2020-01-01"]),
    "s": (["1577923200", "1577923260"], ["2020-01-02", "2020-01-02 00:01"]),
    "ms": (["1577923200000", "1577923260000"], ["2020-01-02", "2020-01-02 00:01"]),
    "us": (["1577923200000000", "1577923260000000"], ["2020-01-02", "2020-01-02 00:01"]),
    "ns": (["1577923200000000000", "1577923260000000000"], ["2020-01-02", "2020-01-02 00:01"]),
    "ms, then us": (["1735686000000", "1735689600000000"], ["2024-12-31 23:00", "2025-01-01"]),
    "ms around 1970": (["-126057600000", "0", "189302400000"], ["1966-01-03", "1970-01-01", "1976-01-01"]),
}


@pytest.mark.parametrize("form", DATES)
def test_dates_are_read_in_the_one_form_that_fits_the_file(tmp_path, form):
    cells, want = DATES[form]
    [bars] = read(tmp_path, "time,open,high,low,close\n" + "".join(f"{cell},1,3,0.5,2\n" for cell in cells))
    assert stamps(bars) == want and bars.time.dtype == np.int64 and first(bars) == [1, 3, 0.5, 2, None, None]


@pytest.mark.parametrize("cells, words", [
    (["03/04/2020", "04/04/2020"], "2020-04-03 (day/month/year) or 2020-03-04 (month/day/year)"),
    (["20-01-02", "20-01-03"], "2020-01-02 (year-month-day) or 2002-01-20 (day/month/year)"),
    (["201001", "201002", "201003"], "2010-01-01 (YYYYMM) or 2020-10-01 (YYMMDD)"),
    (["0", "1", "2"], "a clock, a count, a year"),
    (["143000", "143100"], "a clock, a count, a year"),
    (["14:30", "14:31"], "is no date"),
    (["2019", "2020"], "a clock, a count, a year"),
    (["43832", "43833"], "a spreadsheet's number"),
    (["45355.604167", "45355.604861"], "a spreadsheet's number"),
    (["52200000", "52260000"], "a clock, a count"),
    (["86400000", "172800000", "259200000"], "a clock, a count"),  # days of 1970 in ms
    (["638451594000000000", "638451594600000000"], "a clock, a count"),  # .NET
    (["132224000000000000", "132224000600000000"], "a clock, a count"),  # FILETIME
    (["4102444800", "4102444860"], "no date"),
    (["soon", "later"], "'soon' is no date"),
    (["2020-01-02 CST", "2020-01-03 CST"], "no date"),
])
def test_what_may_be_no_date_or_two_is_refused(tmp_path, cells, words):
    with pytest.raises(UserError) as e:
        read(tmp_path, "time,open,high,low,close\n" + "".join(f"{cell},1,3,0.5,2\n" for cell in cells))
    assert words in str(e.value) and f"a.csv:2: time '{cells[0]}'" in str(e.value) and "\n" not in str(e.value)


def test_prices_named_with_their_currency(tmp_path):
    bars, = read(tmp_path, "datetime,openPriceUsd,closePriceUsd,highPriceUsd,lowPriceUsd,volume,marketcap\n"
                           "2018-05-14 00:00:00+00:00,8713.1,8465.3,8813.2,8367.9,6.28e9,1.46e12\n")
    assert bars.ohlcva[0, :5].tolist() == [8713.1, 8813.2, 8367.9, 8465.3, 6.28e9]


@pytest.mark.parametrize("header, rows, want", [
    ("Date,Time", ["2020-01-02,14:30", "2020-01-02,14:31:30"], ["14:30", "14:31"]),
    ("Date,Time", ["2020-01-02,02:30 PM", "2020-01-02,12:01 AM"], ["00:01", "14:30"]),
    ("Trade Date,Time", ["2020-01-02,143000", "2020-01-02,143100"], ["14:30", "14:31"]),
    ("<DATE>,<TIME>", ["20200102,0", "20200102,100", "20200102,2300"], ["", "01:00", "23:00"]),
    ("<DATE>,<TIME>", ["20200102,500", "20200102,3000", "20200102,13000"], ["00:05", "00:30", "01:30"]),
    ("date,time", ["2020-01-02,20200102093500000", "2020-01-02,20200102094000000"], ["09:35", "09:40"]),
    ("Date,Time", ["2020-01-02,93000.0", "2020-01-02,94500.0"], ["09:30", "09:45"]),
    ("Date,Time", ["2020-01-02,93000000", "2020-01-02,103000000"], ["09:30", "10:30"]),
    ("Date,Time", ["2020-01-02,9.30", "2020-01-02,9.45"], ["09:30", "09:45"]),
    ("Date,Local Time", ["2020-01-02,09:30", "2020-01-02,09:45"], ["09:30", "09:45"]),
    ("Day,Start Time,End Time", ["2020-01-02,09:30,09:45", "2020-01-02,09:45,10:00"], ["09:30", "09:45"]),
    ("timestamp_ms", ["1577957400000", "1577957460000"], ["09:30", "09:31"]),
    ("datetime_utc", ["2020-01-02 09:30", "2020-01-02 09:31"], ["09:30", "09:31"]),
    ("Date,Time,Half", ["2020-01-02,01:03,PM", "2020-01-02,12:01,AM"], ["00:01", "13:03"]),
    ("Start Date,End Date", ["2020-01-02 09:30,2020-01-02 09:31"], ["09:30"]),
    ("Date,Hour", ["2020-01-02,9", "2020-01-02,14"], ["09:00", "14:00"]),
    ("Datetime,Date", ["2020-01-02 09:30:00,2020-01-02", "2020-01-02 09:31:00,2020-01-02"], ["09:30", "09:31"]),
    ("Unix,Date", ["1577957400000,2020-01-02", "1577957460000,2020-01-02"], ["09:30", "09:31"]),
    ("trade_date,minute", ["20200102,9:30", "20200102,9:31"], ["09:30", "09:31"]),
    ("Time (EET)", ["2020.01.02 11:30:00", "2020.01.02 11:31:00"], ["09:30", "09:31"]),
    (",bar_start", ["0,1577957400", "1,1577957460"], ["09:30", "09:31"]),
    ("start,stop", ["1577957400000000000,1577957460000000000", "1577957460000000000,1577957520000000000"], ["09:30", "09:31"]),
])
def test_a_date_takes_the_clock_beside_it(tmp_path, header, rows, want):
    [bars] = read(tmp_path, f"{header},open,high,low,close\n" + "".join(f"{row},1,3,0.5,2\n" for row in rows))
    assert stamps(bars) == [f"2020-01-02 {clock}".strip() for clock in want]


# ---- layouts: name -> (text, {symbol: (first stamp, first bar)})

BAR = [1, 3, 0.5, 2, 7, None]
LAYOUTS = {
    "yfinance": ("Date,Open,High,Low,Close,Adj Close,Volume\n2020-01-02,1,3,0.5,2,1.9,7\n2020-01-03,2,3,1,2,1.9,8\n", "a", BAR),
    "yfinance, three lines": ("Price,Close,High,Low,Open,Volume\nTicker,LOW,LOW,LOW,LOW,LOW\nDate,,,,,\n2020-01-02,2,3,0.5,1,7\n", "LOW", BAR),
    "yfinance, ticker first": ("Ticker,EURUSD=X,EURUSD=X,EURUSD=X,EURUSD=X,EURUSD=X\nPrice,Open,High,Low,Close,Volume\nDate,,,,,\n"
                               "2020-01-02,1,3,0.5,2,7\n", "EURUSD=X", BAR),
    "yfinance, without names": (",Close,High,Low,Open,Volume\n,BRK-B,BRK-B,BRK-B,BRK-B,BRK-B\nDate,,,,,\n2020-01-02,2,3,0.5,1,7\n", "BRK-B", BAR),
    "yfinance, flattened": ("Date,\"('Close', 'BTC-USD')\",\"('High', 'BTC-USD')\",\"('Low', 'BTC-USD')\",\"('Open', 'BTC-USD')\",\"('Volume', 'BTC-USD')\"\n"
                            "2020-01-02,2,3,0.5,1,7\n", "BTC-USD", BAR),
    "quantmod": ('"","AAPL.Open","AAPL.High","AAPL.Low","AAPL.Close","AAPL.Volume","AAPL.Adjusted"\n"2020-01-02",1,3,0.5,2,7,2\n', "AAPL", BAR),
    "colons": (",BTC:open,BTC:high,BTC:low,BTC:close,BTC:volume\n2020-01-02,1,3,0.5,2,7\n", "BTC", BAR),
    "Binance": ("1577923200000,1,3,0.5,2,7,1577923259999,9,5,1,1,0\n1577923260000,2,3,1,2,8,1577923319999,9,5,1,1,0\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "Binance, names with blanks": ("Open time,Open,High,Low,Close,Volume,Close time,Quote asset volume\n"
                                   "1577923200000,1,3,0.5,2,7,1577923259999,9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "camel case": ("openTime,open,high,low,close,volume,closeTime,quoteAssetVolume\n1577923200000,1,3,0.5,2,7,1577923259999,9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "TradingView": ("time,open,high,low,close,Volume,Volume MA\n1577923200,1,3,0.5,2,7,6.5\n1577926800,2,3,1,2,8,\n", "a", BAR),
    "Stooq, bulk": ("<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>\nA.US,D,20200102,000000,1,3,0.5,2,7,0\n", "A.US", BAR),
    "Tushare": ("ts_code,trade_date,open,high,low,close,pre_close,vol,amount\n000001.SZ,20200103,2,3,1,2,2,8,16\n000001.SZ,20200102,1,3,0.5,2,1,7,9\n",
                "000001.SZ", [1, 3, 0.5, 2, 7, 9]),
    "AkShare": ("日期,股票代码,开盘,收盘,最高,最低,成交量,成交额,振幅,换手率\n2020-01-02,000001,1,2,3,0.5,7,9,1,1\n", "000001", [1, 3, 0.5, 2, 7, 9]),
    "MetaTrader": ("<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>\n2020.01.02\t00:00:00\t1\t3\t0.5\t2\t7\t0\t1\n", "a", BAR),
    "MetaTrader, no header": ("2020.01.02,00:00,1,3,0.5,2,7\n2020.01.02,00:05,1,3,0.5,2,8\n", "a", BAR),
    "Kraken, no header": ("1577923200,1,3,0.5,2,7,12\n1577923260,2,3,1,2,8,12\n", "a", BAR),
    "ccxt through pandas": ("0,1,2,3,4,5\n1577923200000,1,3,0.5,2,7\n1577923260000,2,3,1,2,8\n", "a", BAR),
    "HistData": ("20200102 000000;1;3;0.5;2;7\n20200102 000100;2;3;1;2;8\n", "a", BAR),
    "Kronos": ("timestamps,open,high,low,close,volume,amount\n2020-01-02 00:00:00,1,3,0.5,2,7,9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "Alpha Vantage": ("timestamp,1. open,2. high,3. low,4. close,5. volume\n2020-01-02,1,3,0.5,2,7\n", "a", BAR),
    "qlib": ("instrument,datetime,$open,$high,$low,$close,$volume,$factor\nSH600000,2020-01-02,1,3,0.5,2,7,1.0\n", "SH600000", BAR),
    "frames of forecasting libraries": ("unique_id,ds,open,high,low,close,volume\nA,2020-01-02,1,3,0.5,2,7\n", "A", BAR),
    "Polygon": ("ticker,volume,open,close,high,low,window_start,transactions\nA,7,1,2,3,0.5,1577923200000000000,7\n", "A", BAR),
    "letters": ("v,vw,o,c,h,l,t,n\n7,2,1,2,3,0.5,1577923200000,7\n", "a", BAR),
    "NASDAQ": ("Date,Close/Last,Volume,Open,High,Low\n01/13/2020,$2,7,$1,$3,$0.5\n", "a", BAR),
    "Investing.com": ('"Date","Price","Open","High","Low","Vol.","Change %"\n"01/13/2020","2,000.5","1,000.5","3,000.5","500.5","8.78M","0.37%"\n',
                      "a", [1000.5, 3000.5, 500.5, 2000.5, 8.78e6, None]),
    "Investing.com, German": ('"Datum","Zuletzt","Eröffn.","Hoch","Tief","Vol.","+/- %"\n"13.01.2020","2.000,5","1.000,5","3.000,5","500,5","8,78K","0%"\n',
                              "a", [1000.5, 3000.5, 500.5, 2000.5, 8.78e3, None]),
    "Russian": ("Дата;Откр.;Макс.;Мин.;Цена;Объём\n13.01.2020;1,5;3;0,5;2;7\n", "a", [1.5, 3, 0.5, 2, 7, None]),
    "Japanese": ("日付,始値,高値,安値,終値,出来高\n2020/1/2,1,3,0.5,2,7\n", "a", BAR),
    "Kaggle": ("Timestamp,Open,High,Low,Close,Volume_(BTC),Volume_(Currency),Weighted_Price\n1577923200,1,3,0.5,2,7,9,1\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "CryptoCompare": ("time,high,low,open,volumefrom,volumeto,close\n1577923200,3,0.5,1,7,9,2\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "CryptoDataDownload": ("https://www.CryptoDataDownload.com\nUnix,Date,Symbol,Open,High,Low,Close,Volume BTC,Volume USDT\n"
                           "1577923200000,2020-01-02 00:00:00,BTC/USDT,1,3,0.5,2,7,9\n", "BTC/USDT", [1, 3, 0.5, 2, 7, 9]),
    "money alone": ("Date,Open,High,Low,Close,Volume USD\n2020-01-02,1,3,0.5,2,7\n", "a", BAR),
    "NSE": ("SYMBOL,SERIES,OPEN,HIGH,LOW,CLOSE,LAST,TOTTRDQTY,TOTTRDVAL,TIMESTAMP,\nTCS,EQ,1,3,0.5,2,2,7,9,02-JAN-2020,\n", "TCS", [1, 3, 0.5, 2, 7, 9]),
    "BSE": ("Date,Open Price,High Price,Low Price,Close Price,WAP,No.of Shares,Total Turnover (Rs.)\n2-January-2020,1,3,0.5,2,1,7,9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "only adjusted": ("Date,Open,High,Low,Adj Close,Volume\n2020-01-02,1,3,0.5,2,7\n", "a", BAR),
    "futures": ("Date,Open,High,Low,Last,Change,Settle,Volume\n2020-01-02,1,3,0.5,2,,2.2,7\n", "a", BAR),
    "MOEX": ("candles\n\nopen;close;high;low;value;volume;begin;end\n1;2;3;0.5;9;7;2020-01-02 00:00:00;2020-01-02 00:09:59\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "title, comment, note": ("Some exchange, all rights reserved\n# a comment\nDate,Open,High,Low,Close,Volume\n2020-01-02,1,3,0.5,2,7\nSource: us\n", "a", BAR),
    "numpy.savetxt": ("# time,open,high,low,close,volume\n1577923200,1,3,0.5,2,7\n", "a", BAR),
    "ariva": ("Datum;Erster;Hoch;Tief;Schlusskurs;Stuecke;Volumen\n2020-01-02;1;3;0,5;2;7;9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "Excel, separator and total": ("sep=;\nDate;Open;High;Low;Close;Volume\n2020-01-02;1;3;0,5;2;7\nTotal;;;;;7\n", "a", BAR),
    "blanks before quotes": ('Date, "Open", High, Low, Close, Volume\n2020-01-02, "1", "3", 0.5, 2, 7\n', "a", BAR),
    "pipes": ("date|open|high|low|close|volume\n2020-01-02|1|3|0.5|2|7\n", "a", BAR),
    "blanks": ("date    open high  low close volume\n2020-01-02 1 3  0.5 2 7\n", "a", BAR),
    "code of a row": ("date,open,high,low,close,volume,code\n2020-01-02,1,3,0.5,2,7,0\n2020-01-03,1,3,0.5,2,7,1\n2020-01-04,1,3,0.5,2,7,0\n", "a", BAR),
    "OKX": ("instrument_name,open,high,low,close,vol,vol_ccy,vol_quote,open_time,confirm\nBTC-USDT,1,3,0.5,2,7,7,9,1577923200000,1\n", "BTC-USDT", [1, 3, 0.5, 2, 7, 9]),
    "Bybit": ("start_at,symbol,period,open,high,low,close\n1577923200,BTCUSDT,1,1,3,0.5,2\n", "BTCUSDT", [1, 3, 0.5, 2, None, None]),
    "Bitfinex": ("MTS,OPEN,CLOSE,HIGH,LOW,VOLUME\n1577923200000,1,2,3,0.5,7\n", "a", BAR),
    "Databento": ("ts_event,rtype,publisher_id,open,high,low,close,volume,symbol\n2020-01-02T00:00:00.000000000Z,33,1,1,3,0.5,2,7,ESH0\n", "ESH0", BAR),
    "Oanda": ("time,complete,volume,mid.o,mid.h,mid.l,mid.c\n2020-01-02T00:00:00.000000000Z,True,7,1,3,0.5,2\n", "a", BAR),
    "FXCM": ("DateTime,BidOpen,BidHigh,BidLow,BidClose,AskOpen,AskHigh,AskLow,AskClose,TickQty\n01/13/2020 00:00:00,1,3,0.5,2,2,4,1,3,7\n", "a", BAR),
    "Bloomberg": ("Date,PX_OPEN,PX_HIGH,PX_LOW,PX_LAST,PX_VOLUME\n1/13/2020,1,3,0.5,2,7\n", "a", BAR),
    "Refinitiv": ("Exchange Date;Close;Net;%Chg;Open;Low;High;Volume;Turnover\n02-Jan-2020;2;0;0;1;0.5;3;7;9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "CRSP": ("PERMNO,date,TICKER,BIDLO,ASKHI,PRC,VOL,OPENPRC\n10001,20200102,A,0.5,3,2,7,1\n", "A", BAR),
    "Euronext": ('"Historical Data"\n"From 2020-01-01 to 2020-01-31"\n\nDate;Open;High;Low;Last;Close;"Number of Shares";"Number of Trades";Turnover;vwap\n'
                 "'13/01/2020;1;3;0.5;2;2;7;1;9;1.5\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "Deutsche Börse": ("Date;Open;Close;High;Low;Turnover (pcs.);Turnover (€)\n13.01.2020;1;2;3;0,5;7;9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "onvista": ("Datum;Eröffnung;Tageshoch;Tagestief;Schlusskurs;Volumen\n13.01.2020;1;3;0,5;2;7\n", "a", BAR),
    "Boursorama": ("date\touvert\thaut\tbas\tclot\tvol\tdevise\t\n13/01/2020 00:00\t1\t3\t0.5\t2\t7\tEUR\t\n", "a", BAR),
    "ABC Bourse": ("FR0000120404;13/01/20;1;3;0,5;2;7\nFR0000120404;31/01/20;1;3;0,5;2;7\n", "FR0000120404", BAR),
    "Madrid": ("Fecha;Cierre;Apertura;Máximo;Mínimo;Volumen\n13/01/2020;2,0;1,0;3,0;0,5;7\n", "a", BAR),
    "Turkish": ('"Tarih","Şimdi","Açılış","Yüksek","Düşük","Hac.","Fark %"\n"13.01.2020","2,0","1,0","3,0","0,5","7,00K","0,1%"\n', "a", [1, 3, 0.5, 2, 7000, None]),
    "Polish": ("Data,Otwarcie,Najwyzszy,Najnizszy,Zamkniecie,Wolumen\n2020-01-02,1,3,0.5,2,7\n", "a", BAR),
    "KRX": ("일자,종가,대비,시가,고가,저가,거래량,거래대금\n2020/01/02,2,0,1,3,0.5,7,9\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "ASX, no header": ("BHP,20200102,1,3,0.5,2,7\nBHP,20200103,1,3,0.5,2,7\n", "BHP", BAR),
    "NSE, of every day": ("TradDt,ISIN,TckrSymb,SctySrs,OpnPric,HghPric,LwPric,ClsPric,LastPric,TtlTradgVol,TtlTrfVal\n"
                          "2020-01-02,IN1,TCS,EQ,1,3,0.5,2,2,7,9\n", "TCS", [1, 3, 0.5, 2, 7, 9]),
    "NSE, index": ("Index Name,Date,Open,High,Low,Close,Shares Traded,Turnover (Rs. Cr)\nNIFTY 50,02 Jan 2020,1,3,0.5,2,7,9\n", "NIFTY 50", [1, 3, 0.5, 2, 7, 9]),
    "comma behind each row": ("Date,Open,High,Low,Close,Volume\n2020-01-02,1,3,0.5,2,7,\n2020-01-03,1,3,0.5,2,7,\n", "a", BAR),
    "comma behind the header": ("Date,Open,High,Low,Close,Volume,\n2020-01-02,1,3,0.5,2,7\n2020-01-03,1,3,0.5,2,7\n", "a", BAR),
    "Upbit": ("market,candle_date_time_utc,candle_date_time_kst,opening_price,high_price,low_price,trade_price,timestamp,"
              "candle_acc_trade_price,candle_acc_trade_volume,unit\n"
              "KRW-BTC,2020-01-02T00:00:00,2020-01-02T09:00:00,1,3,0.5,2,1577923259999,9,7,1\n", "a", [1, 3, 0.5, 2, 7, 9]),
    "CoinAPI": ("time_period_start,time_open,time_close,price_open,price_high,price_low,price_close,volume_traded\n"
                "2020-01-02T00:00:00.0000000Z,2020-01-02T00:00:01.0000000Z,2020-01-02T00:00:59.0000000Z,1,3,0.5,2,7\n", "a", BAR),
    "Coindesk": ("Currency,Date,Closing Price (USD),24h Open (USD),24h High (USD),24h Low (USD)\nBTC,2020-01-02,2,1,3,0.5\n", "a", [1, 3, 0.5, 2, None, None]),
    "FinMind": ("date,stock_id,Trading_Volume,Trading_money,open,max,min,close,spread\n2020-01-02,2330,7,9,1,3,0.5,2,0\n", "2330", [1, 3, 0.5, 2, 7, 9]),
    "CSMAR": ("Stkcd,Trddt,Opnprc,Hiprc,Loprc,Clsprc,Dnshrtrd,Dnvaltrd\n000001,2020-01-02,1,3,0.5,2,7,9\n", "000001", [1, 3, 0.5, 2, 7, 9]),
    "one symbol before prices alone": ("Date,A.Open,A.High,A.Low,A.Close,Volume\n2020-01-02,1,3,0.5,2,7\n", "A", BAR),
    "symbol left empty": ("symbol,date,open,high,low,close,volume\n,2020-01-02,1,3,0.5,2,7\n", "a", BAR),
    "ticker before name": ("date,name,ticker,open,high,low,close,volume\n2020-01-02,Long Name,B,1,3,0.5,2,7\n", "B", BAR),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_people_have_are_read_as_they_are(tmp_path, layout):
    text, symbol, bar = LAYOUTS[layout]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        [bars] = read(tmp_path, text, encoding=encoding)
        assert bars.symbol == symbol and first(bars) == bar
        assert bars.time[0] in (1577923200, 1578873600)  # 2020-01-02, or 13 where the form of the date needs it


def test_encodings_of_other_languages(tmp_path):
    for layout, encoding in (("AkShare", "gb18030"), ("Japanese", "shift_jis"), ("Russian", "cp1251"), ("Investing.com, German", "latin-1")):
        text, _, bar = LAYOUTS[layout]
        [bars] = read(tmp_path, text, encoding=encoding)
        assert first(bars) == bar
    [bars] = read(tmp_path, LAYOUTS["yfinance"][0].encode() + bytes(5000))  # the machine died while it wrote
    assert first(bars) == BAR


def test_several_symbols_side_by_side_and_one_below_the_other(tmp_path):
    wide = ("Price,Close,Close,High,High,Low,Low,Open,Open,Volume,Volume\nTicker,A,B,A,B,A,B,A,B,A,B\nDate,,,,,,,,,,\n"
            "2020-01-02,2,20,3,30,1,10,2,20,7,70\n2020-01-03,2,,3,,1,,2,,8,\n")
    a, b = read(tmp_path, wide)
    assert (a.symbol, len(a), b.symbol, len(b)) == ("A", 2, "B", 1) and first(b) == [20, 30, 10, 20, 70, None]
    long = "time,symbol,open,high,low,close\n2020-01-03,B,2,2,2,2\n2020-01-02,A,1,1,1,1\n2020-01-02,B,3,3,3,3\n"
    assert {bars.symbol: bars.ohlcva[:, 3].tolist() for bars in read(tmp_path, long)} == {"A": [1], "B": [3, 2]}


@pytest.mark.parametrize("delimiter, cells, want", [
    (",", '"1,234.50","1,237.98","1,216.98","1,224.64","8,782,270"', [1234.5, 1237.98, 1216.98, 1224.64, 8782270]),
    (",", '"1,21,500.20","1,21,700.00","1,21,400.00","1,21,600.00","12,345"', [121500.2, 121700, 121400, 121600, 12345]),
    (";", "1.234,50;1.237,98;1.216,98;1.224,64;8.782.270", [1234.5, 1237.98, 1216.98, 1224.64, 8782270]),
    (";", "14,300;14,541;14,248;14,483;1112499", [14.3, 14.541, 14.248, 14.483, 1112499]),
    (";", "12.345;12.380;12.170;12.246;8.782.270", [12345, 12380, 12170, 12246, 8782270]),
    (";", "1 234,50;1 237,98;1 216,98;1\u00a0224,64;7", [1234.5, 1237.98, 1216.98, 1224.64, 7]),
    (";", "1'234.50;1'237.98;1'216.98;1'224.64;7", [1234.5, 1237.98, 1216.98, 1224.64, 7]),
    (",", "$10.5,$12,$9,$11,8.78M", [10.5, 12, 9, 11, 8.78e6]),
    (",", "10.5,12,9,11,1.2亿", [10.5, 12, 9, 11, 1.2e8]),
    (";", "10,5;12;9;11;1,5 Mio.", [10.5, 12, 9, 11, 1.5e6]),
    (",", "10.5,1.2e1,9,11,1.5K", [10.5, 12, 9, 11, 1500]),
    (",", "10.5,12,9,11,-", [10.5, 12, 9, 11, None]),
    (",", "10.5,12,9,11,N/A", [10.5, 12, 9, 11, None]),
    (",", "10.5,12,9,11,null", [10.5, 12, 9, 11, None]),
])
def test_numbers_in_the_one_format_of_the_file(tmp_path, delimiter, cells, want):
    header = "Date,Open,High,Low,Close,Volume".replace(",", delimiter)
    [bars] = read(tmp_path, f"{header}\n2020-01-02{delimiter}{cells}\n2020-01-03{delimiter}{cells}\n")
    assert [first(bars)[:5]] * 2 == [want, first(bars[1:])[:5]]


def test_one_mistyped_number_decides_nothing(tmp_path, capfd):
    rows = "".join(f"2020-01-{d:02d};{d},300;{d},541;{d},248;{d},483;11124\n" for d in range(1, 29))
    [bars] = read(tmp_path, "date;open;high;low;close;volume\n" + rows + "2020-01-29;9,300;1,009,541;9,248;9,483;11124\n")
    assert len(bars) == 28 and first(bars) == [1.3, 1.541, 1.248, 1.483, 11124, None]
    assert "a.csv:30: high '1,009,541' is not a number" in capfd.readouterr().err


# ---- faults

@pytest.mark.parametrize("row, why", [
    ("2020-03-03,1,2,0.5,x,1", "close 'x' is not a number"),
    ("2020-03-03,1,2,0.5,1'16,1", "close \"1'16\" is not a number"),
    ("2020-03-03,1,2,0.5,1x,1", "close '1x' is not a number"),
    ("2020-03-03,1,2,0.5,1e1k,1", "close '1e1k' is not a number"),
    ("2020-03-03,1,2,0.5,inf,1", "not finite"),
    ("2020-03-03,1,2,0.5,,1", "a price is missing"),
    ("2020-03-03,0,2,0,1,1", "zero or negative"),
    ("2020-03-03,-1,2,-1,1,1", "zero or negative"),
    ("2020-03-03,1,0.5,2,1,1", "high below low"),
    ("2020-03-03,1,2,0.5,3,1", "high below open or close"),
    ("2020-03-03,1,2,1.5,2,1", "low above open or close"),
    ("2020-03-03,1e200,1e200,1e200,1e200,1", "outside of 1e-30 to 1e30"),
    ("2020-03-03,1,2,0.5,1,1e40", "above 1e30"),
    ("2020-03-03,1,2,0.5,1,1e-320", "below 1e-30"),
    ("9000-01-03,1,2,0.5,1,1", "no date"),
    ("2020-03-03,1,2,0.5,1,-3", "negative volume"),
    ("2020-02-30,1,2,0.5,1,3", "time '2020-02-30' is no date"),
    ("today,1,2,0.5,1,3", "time 'today' is no date"),
    ("2020-03-03,1,2,0.5", "4 cells where the header has 6"),
    ("1920-01-15,1,2,0.5,1,3", "a year or more off"),
])
def test_bad_rows_are_dropped_counted_and_named(tmp_path, capfd, row, why):
    text = "time,open,high,low,close,volume\n" + days(40) + row + "\n2020-03-04,1,3,0.5,2,7\n"
    [bars] = read(tmp_path, text)
    err = capfd.readouterr().err
    assert len(bars) == 41 and "1 bad row of 42 dropped" in err and "a.csv:42: " in err and why in err


def test_a_long_file_with_quoted_texts(tmp_path):
    rows = "".join(f'{1577923200 + 60 * t},"{"AB"[t % 2]}",1,3,0.5,2\n' for t in range(4000))
    assert [(bars.symbol, len(bars)) for bars in read(tmp_path, '"time","symbol","open","high","low","close"\n' + rows)] == [("A", 2000), ("B", 2000)]


def test_of_equal_times_the_last_wins(tmp_path):
    rows = days(40).splitlines()[::-1] + ["2020-01-03,1,3,0.5,1.9,7", "2020-01-03,1,3,0.5,1.8,7"]
    [bars] = read(tmp_path, "time,open,high,low,close,volume\n" + "\n".join(rows))
    assert len(bars) == 40 and bars.ohlcva[2, 3] == 1.8


def test_fast_and_slow_reading_agree(tmp_path):
    bars = data.synthetic(n_symbols=1, n_bars=2000)[0][0]
    write_csv(tmp_path / "fast.csv", bars)
    lines = (tmp_path / "fast.csv").read_text().splitlines()
    texts = {"slow": "\r\n".join([lines[0]] + ['"' + '","'.join(line.split(",")) + '"' for line in lines[1:]]),
             "holes": "\r".join([lines[0] + ",more"] + [line + "," for line in lines[1:]])}
    series = data.load(str(tmp_path / "fast.csv")) + [read(tmp_path, text)[0] for text in texts.values()]
    for got in series:
        np.testing.assert_array_equal(got.time, bars.time)
        np.testing.assert_array_equal(got.ohlcva, bars.ohlcva)


@pytest.mark.parametrize("text, words", [
    ("", "empty"),
    ("\n \n", "empty"),
    ("   ,,,\n", "no header"),
    (b"\xef\xbb\xbf\n", "empty"),
    (b"\x89PNG\0\0\0a", "binary"),
    (b"PAR1\0\0", "it is Parquet"),
    ('[{"time": 1}]', "it is JSON"),
    ("1,2,3,4\n", "a.csv:1: no header"),
    ("2020-01-01,1,1,1,1\n", "a.csv:1: no header"),
    ("2020-01-02,10,12,9,11,10.9,100\n2020-01-03,10,12,9,11,10.9,100\n", "looks like a price"),
    ("2020-01-02,12,9,11,10,100\n2020-01-03,12,9,11,10,100\n", "put a first line such as"),
    ("<!DOCTYPE html>\n<html></html>\n", "no bars in '<!DOCTYPE html>'"),
    ("time,ask,bid,askvol,bidvol\n2020-01-02 14:30:00,2,1,1,1\n", "no bars in 'time,ask,bid,askvol,bidvol'"),
    ("time,open,high,low,volume\n2020-01-02,1,1,1,1\n", "a.csv:1: no column 'close'"),
    ("open,high,low,close,volume\n1,1,1,1,1\n", "a.csv:1: no column 'time'"),
    ("time,open,high,low,close\n", "a.csv:2: no rows"),
    ("time,open,high,low,close\n# none\nTotal,,\n", "a.csv:2: no rows"),
    ("time,open,high,low,close,Close\n2020-01-02,1,1,1,1,1\n", "a.csv:1: 'close' and 'Close' in the header are both a close"),
    ("time,open,high,low,close\n2020-01-01,1,1,1,1\n\"2020-01-02,1,1,1,1\n2020-01-03,1,1,1,1\n", "a.csv:3: not a CSV row (a quote is opened"),
    ("time,symbol,open,high,low,close\n2020-01-01,\"A,1,3,0.5,2\n2020-01-02,B\",1,3,0.5,2\n", "a.csv:2: not a CSV row (a quote is opened"),
    ("time,open,high,low,close\n2020-01-02,,,,\n", "no row has a price"),
    ("time;open;high;low;close\n" + days(9, "1,1,1,1"), "a.csv:2: not the cells of the header; use one delimiter"),
    ("time,open,high,low,close\n" + days(9, "1,1,1,1") + "2020-02-01,0,0,0,0\n", "a.csv:11: a price is zero or negative, and has no logarithm; 1 of 10"),
    ("time,open,high,low,close\n2020-01-02,1,1,2,1\n", "check the columns"),
    ("symbol,timeframe,time,open,high,low,close\nA,1h,2020-01-02,1,1,1,1\nA,1d,2020-01-03,1,1,1,1\n", "several intervals (1d, 1h)"),
    ("symbol,expiry,date,open,high,low,close\nA,x,2020-01-02,1,1,1,1\nA,y,2020-01-02,2,2,2,2\n", "a.csv:3: 1 of 2 rows of A have the time of another"),
    ("time,open,high,low,close\n2020-01-02,1,1,1,1\n2020-01-02,2,2,2,2\n", "a.csv:3: 1 of 2 rows of a have the time of another"),
    ("date,time,open,high,low,close\n20200102,34200000,1,1,1,1\n20200102,34260000,2,2,2,2\n", "have the time of another"),  # ms of the day
    ("\ttime\x1b,open,high,low,close\n5,1,1,1,1\n", "a.csv:2: time\\x1b '5' is no date"),
    ("time,open,high,low,close\n1.57792E+12,1,1,1,1\n1.57792E+12,2,2,2,2\n", "rounded by a spreadsheet"),
])
def test_unusable_files_get_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as e:
        read(tmp_path, text)
    assert words in str(e.value) and "a.csv" in str(e.value) and "\n" not in str(e.value)


MINUTES = "".join(f"{1577923200 + 60 * t},1,3,0.5,2,7\n" for t in range(4000))  # numpy reads these: it names no line


@pytest.mark.parametrize("text, n, said", [
    (days(20) + days(20, "4,12,2,8,7", first=20), 40, "moves by a factor of 4.00 at 2020-01-21: an unadjusted split?"),
    (days(20) + "2020-01-21,100,300,50,200,7\n" + days(19, first=21), 40, "by a factor of 100.00 at 2020-01-21 and back"),
    (days(20) + "2020-02-20,0,3,0.5,2,7\n2020-02-21,,3,0.5,2,7\n", 22, "2 of 22 rows have no open"),
    (days(20) + "2020-02-20,,,,,\n" * 5, 20, "5 of 25 rows have no price"),
    (days(40) + "2020-01-03,1,3,0.5,1.9,7\n", 40, "1 of 41 rows have the time of a later one"),
    (days(40) + days(40), 40, ""),
    (days(40) + "2020-01-03,1,3,5,1.9,7\n", 40, "1 bad row of 41"),
    (days(20) + "time,open,high,low,close,volume\n" + days(20, first=20), 40, ""),
    (",USD,USD,USD,USD,shares\n" + days(40), 40, "a.csv:2: open 'USD' is not a number"),
    (MINUTES + "4102444800,1,3,0.5,2,7\n", 4000, "a.csv:4002: time '4102444800' is no date"),
    (MINUTES.replace("\n1578103200,1,3,0.5,", "\n\n1578103200,1,3,3,"), 3999, "a.csv:3003: low above open or close"),  # a blank line, too
    ("2020-01-02,1.5,1.999999999,1,2,7\n2020-01-03,1.5,2,1.500000001,2,7\n", 2, ""),
])
def test_what_is_mended_or_odd_is_said(tmp_path, capfd, text, n, said):
    [bars] = read(tmp_path, "time,open,high,low,close,volume\n" + text)
    err = capfd.readouterr().err
    assert len(bars) == n and said in err and err.count("\n") == bool(said)
    o, h, l, c = bars.ohlcva[:, :4].T
    assert (h >= np.maximum(o, c)).all() and (l <= np.minimum(o, c)).all()


def test_an_open_that_is_missing_is_the_close_before_within_the_bar(tmp_path):
    [bars] = read(tmp_path, "time,open,high,low,close\n2020-01-01,1,3,0.5,2\n2020-01-02,0,3,0.5,2.5\n2020-01-03,,2.2,1,2\n")
    assert bars.ohlcva[:, 0].tolist() == [1, 2, 2.2]


@pytest.mark.parametrize("names, cells, want, said", [
    ("volume,turnover", "700,0.005", [700, None], "'turnover' is not volume times price"),
    ("volume,amount", "700,1400", [700, 1400], ""),
    ("volume,value", "700,140000", [700, 140000], ""),  # lots of 100
    ("Up,Down", "7,8", [None, None], "no volume is read, for none of 'Up', 'Down' is known"),
    ("RSI,Volume_rank", "7,8", [None, None], "no volume is read, for none of 'Volume_rank', 'RSI' is known"),
    ("Vol (ann)", "0.2", [None, None], "none of 'Vol (ann)' is known"),
    ("Volume Up,Volume Down", "7,8", [None, None], "none of 'Volume Up', 'Volume Down' is known"),
    ("volume,time", "-1,", [None, None], ""),
    ("volume,value", "7,high", [7, None], "'value' holds 'high', which is not a number; no amount is read"),
    ("time", "", [None, None], ""),
    *((names, "7,9", [7, 9], "") for names in (
        "Base Asset Volume,Quote Asset Volume", "base_volume,quote_volume", "Volume_(BTC),Volume_(Currency)", "VolumeBTC,VolumeUSD",
        "volume_base,volume_quote", "Trade Volume,Turnover (Rs.)", "Shares,Value", "Total Trade Quantity,Volume USD", "Adj. Volume,amount")),
])
def test_volumes_and_amounts(tmp_path, capfd, names, cells, want, said):
    """An amount is volume times price; a volume that is not read is named."""
    [bars] = read(tmp_path, f"date,open,high,low,close,{names}\n2020-01-02,1,3,0.5,2,{cells}\n")
    err = capfd.readouterr().err
    assert first(bars)[4:] == want and said in err and err.count("\n") == bool(said)


def test_amounts_and_volumes_that_changed_places(tmp_path, capfd):
    [bars] = read(tmp_path, "date,open,high,low,close,volume,amount\n2020-01-02,10,30,5,20,140,7\n")
    assert first(bars)[4:] == [7, 140] and "they change places" in capfd.readouterr().err


def test_the_time_of_the_download_is_not_that_of_the_bars(tmp_path):
    rows = "".join(f"2020-01-{d:02d},1,3,0.5,2,2024-05-01T09:00:{d:02d}\n" for d in range(1, 21))
    [bars] = read(tmp_path, "date,open,high,low,close,timestamp\n" + rows)
    assert stamps(bars)[::19] == ["2020-01-01", "2020-01-20"]


def test_consecutive_weekdays_tell_day_from_month_or_the_order_is_given(tmp_path):
    rows = [f"11/{d}/2019 {h}:30,1,3,0.5,2\n" for d in range(5, 9) for h in range(9, 16)]
    [bars] = read(tmp_path, "time,open,high,low,close\n" + "".join(rows))
    assert stamps(bars)[0] == "2019-11-05 09:30" and stamps(bars)[-1] == "2019-11-08 15:30"
    (tmp_path / "a.csv").write_text("time,open,high,low,close\n" + "".join(f"0{d}/04/2020,1,3,0.5,2\n" for d in (3, 4)))
    for order, want in (("day/month/year", "2020-04-03"), ("month/day/year", "2020-03-04")):
        assert stamps(data.load(str(tmp_path / "a.csv"), order)[0])[0] == want
        out = str(tmp_path / want)
        data.main(["--data", str(tmp_path / "a.csv"), "--order", order, "--out", out])
        assert stamps(data.load(out)[0])[0] == want
    with pytest.raises(UserError, match="may be 2020-04-03 .* or 2020-03-04 .* say which by python data.py --order"):
        data.load(str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="--order dmy: must be one of"):
        data.main(["--data", str(tmp_path / "a.csv"), "--order", "dmy"])


@pytest.mark.parametrize("step, ended, is_ranked", [
    (60, 20 * HOUR, True), (60, 2 * DAY, False), (HOUR, 2 * DAY, True), (HOUR, 4 * DAY, False), (DAY, 40 * DAY, True), (DAY, 60 * DAY, False)])
def test_a_symbol_that_ended_long_before_the_others_has_no_rank(step, ended, is_ranked):
    """Long: more than a day and five horizons, here of ten bars."""
    time = step * np.arange(300)
    histories = [Bars(name, time - ago, np.ones((300, 6))) for name, ago in (("A", 0), ("OLD", ended), ("B", 0))]
    rows = [dict(p_up=p_up, rank=None) for p_up in (0.4, 0.9, 0.6)]
    give_ranks(rows, histories, 10)
    assert [row["rank"] for row in rows] == ([3, 1, 2] if is_ranked else [2, None, 1])


@pytest.mark.parametrize("text, want", [
    ("1970-01-06\n1970-01-08\n\n1970-01-09\n", [[6, 8], [6, 8]]), ("Date\n1970-01-08\n1970-01-06\n1970-01-06\n", [[6, 8], [6, 8]]),
    ("symbol,time\nA,1970-01-04\nB,1970-01-06\nA,1970-01-05\nB,1970-01-09\n", [[4, 5], [6, 9]]),
    ("date\n06/01/1970\n13/01/1970\n", [[6, 13], [6, 13]]), ("open_time,Symbol\n1970-01-04,A\n1970-01-06,B\n1970-01-09,A\n1970-01-09,B\n", [[4, 9], [6, 9]]),
    ("time,symbol\n1970-01-04,A\n1970-01-05,A\n", "0 stamps after the last bar of B, 1970-01-05; 2 are needed"),
    ("symbol,time\nA,1970-01-04\nB,soon\n", "t.csv:3: 'B,soon' is no time"), ("symbol,time\nA\n", "t.csv:2: 'A' is no time"),
    ("", "0 stamps after the last bar of A"), ("2" * 200_000, "cannot be read"), ("a\xff\0", r"'aÿ\x00' is no time")])
def test_stamps_to_come_of_all_symbols_or_of_each(tmp_path, text, want):
    """Two symbols whose last bars are of 3 and 5 January 1970."""
    histories = [Bars(name, np.arange(n) * DAY, np.ones((n, 6))) for name, n in (("A", 3), ("B", 5))]
    (tmp_path / "t.csv").write_text(text)
    if isinstance(want, str):
        with pytest.raises(UserError, match=re.escape(want)):
            read_times(str(tmp_path / "t.csv"), histories, 2)
    else:
        days = read_times(str(tmp_path / "t.csv"), histories, 2) // DAY + 1
        assert days.tolist() == want


@pytest.mark.parametrize("text, encoding", [
    ("日期,開盤價,最高價,最低價,收盤價,成交股數\n2020-01-02,1,3,0.5,2,7\n", "big5"),
    ("날짜,시가,고가,저가,종가,거래량\n2020-01-02,1,3,0.5,2,7\n", "cp949"),
    ("Data;Otwarcie;Najwyższy;Najniższy;Zamknięcie;Wolumen\n2020-01-02;1;3;0,5;2;7\n", "cp1250"),
    ("Tarih;Şimdi;Açılış;Yüksek;Düşük;Hac.\n02.01.2020;2;1;3;0,5;7\n", "cp1254"),
    ('"Date,Open,High,Low,Close,Volume"\n"2020-01-02,1,3,0.5,2,7"\n', "utf-8"),
    ("# time,open,high,low,close,volume,\n1577923200000,1,3,0.5,2,7,1577923259999,9,5,1,1,0\n", "utf-8"),
    ("Date,Open,High,Low,Close,Volume\n2020-01-02,1,3,0.5,2,7\n12345\n", "utf-8"),
    ("Date,Open,High,Low,Close,Volume\n2020-01-02,1,3,0.5,-2,7\n", "utf-8"),
    ("Date,Open,High,Low,Close,Volume\n2020-01-02,1,3,0.5,2,7\n2020-01-03,0,0,0,2,0\n", "utf-8"),
])
def test_what_else_is_read_as_one_bar(tmp_path, text, encoding):
    [bars] = read(tmp_path, text, encoding=encoding)
    assert stamps(bars) == ["2020-01-02"] and first(bars) == BAR


def test_frames_are_read_as_files_are():
    class Frame(dict):
        index = np.array(["2020-01-03", "2020-01-02"], "datetime64[ns]")

    bars = data.from_frame(Frame(Open=[2, 1], High=[4, 3], Low=[1, 0.5], Close=[3, 2], Volume=[8, 7]), "A")
    assert bars.symbol == "A" and stamps(bars) == ["2020-01-02", "2020-01-03"] and first(bars) == BAR
    for frame, words in (([1], "no named columns"), (dict(time=["2020-01-02"], open=[1]), "no column 'high'"),
                         (dict(time=["2020-01-02"], open=[1, 2]), "each needs one value a bar")):
        with pytest.raises(UserError, match=words):
            data.from_frame(frame)


@pytest.mark.parametrize("spoil, words", [
    (dict(symbol=5), "symbol 5: must be a text"),
    (dict(time=np.arange(3) * 1.0), "A: time is float64"),
    (dict(time=np.arange(3).astype("datetime64[s]")), "A: time is datetime64"),
    (dict(time=np.arange(3) + 10**18), "give UTC seconds, not ms or ns"),
    (dict(time=np.array([0, 2, 2])), "A: row 2: its time is not after"),
    (dict(ohlcva=np.ones((3, 5))), r"A: ohlcva is float64 \[3, 5\]"),
    (dict(ohlcva=np.tile([1, 0.5, 3, 2, 7, np.nan], (3, 1))), "A: row 0: high below low"),
    (dict(ohlcva=np.tile([np.nan, 3, 0.5, 2, 7, 9], (3, 1))), "A: row 0: a price is missing"),
])
def test_arrays_that_are_no_bars_are_refused(spoil, words):
    good = dict(symbol="A", time=np.arange(3), ohlcva=np.tile([1, 3, 0.5, 2, 7, np.nan], (3, 1)))
    check_histories([Bars(**good)])
    for histories in ([Bars(**good | spoil)], [Bars(**good), Bars(**good | spoil)]):
        with pytest.raises(UserError, match=words):
            check_histories(histories)


# ---- containers, folders, names

CSV = "time,open,high,low,close,volume\n2020-01-01,10,12,9,11,100\n2020-01-02,11,13,10,12,200\n2020-01-03,11,13,10,12,200\n"


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as f:
        for name, text in files.items():
            f.writestr(name.replace("X__", "X/"), text)
    return buffer.getvalue()


def test_containers_are_told_by_content(tmp_path):
    raw = CSV.encode()
    for name, packed in (("a.csv", gzip.compress(raw)), ("a.csv.gz", raw), ("a.csv.bz2", bz2.compress(raw)), ("a.csv.xz", lzma.compress(raw)),
                         ("a.zip", zipped(b=raw, __MACOSX__b=b"")), ("a.zip", zipped(b=gzip.compress(raw)))):
        [bars] = read(tmp_path, packed, name)
        assert bars.symbol == "a" and bars.ohlcva[:, 3].tolist() == [11, 12, 12]
    for packed, words in ((zipped(a=raw, b=raw), "it holds 2 files"), (zipped(**{"[Content_Types].xml": b""}), "Excel"),
                          (gzip.compress(raw * 50)[:60], "cannot be read"), (bz2.compress(raw)[:-9], "cannot be read"),
                          (lzma.compress(raw)[:-9], "cannot be read"), (zipped(a=raw)[:50], "cannot be read")):
        with pytest.raises(UserError, match=words):
            read(tmp_path, packed)


def test_folder_glob_and_a_symbol_in_two_files(tmp_path, capfd):
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    (tmp_path / "y.csv").write_text("time,symbol,open,high,low,close\n2020-01-04,x,1,1,1,1\n2020-01-02,x,5,5,5,5\n")
    (tmp_path / "notes.md").write_text("no bars")
    for paths in (str(tmp_path), str(tmp_path / "*.csv*"), [str(tmp_path / "x.csv.gz"), str(tmp_path / "y.csv")]):
        [bars] = data.load(paths)
        assert bars.symbol == "x" and bars.ohlcva[:, 3].tolist() == [11, 5, 12, 1]
        assert "x: 1 of 4 bars differ between files; the last read counts\n" in capfd.readouterr().err


def test_of_a_folder_the_useless_files_are_skipped_and_counted(tmp_path, capfd):
    for name, text in (("A.csv", CSV), ("B.csv", CSV), ("._A.csv", "\0\0"), ("~$A.csv", "lock"), (".hidden.csv", "x"),
                       ("none.csv", "time,open,high,low,close\n"), ("void.csv", " \n"), ("page.csv", "<html>")):
        (tmp_path / name).write_text(text)
    assert [bars.symbol for bars in data.load(str(tmp_path))] == ["A", "B"]
    err = capfd.readouterr().err
    assert "3 of 5 files skipped" in err and "none.csv:2: no rows" in err and "page.csv:1: no header" in err and err.count("\n") == 1
    with pytest.raises(UserError, match="page.csv:1: no header"):  # who names a file means it
        data.load([str(tmp_path / "A.csv"), str(tmp_path / "page.csv")])
    for name in "AB":
        (tmp_path / f"{name}.csv").write_text("<html>")  # with A more are bad than good; with B none is good
        with pytest.raises(UserError, match="A.csv:1: no header"):
            data.load(str(tmp_path))
    for path, words in ((tmp_path / "no.csv", "no such file"), (tmp_path / "empty", "no CSV")):
        os.makedirs(tmp_path / "empty", exist_ok=True)
        with pytest.raises(UserError, match=words):
            data.load(str(path))


@pytest.mark.parametrize("names, symbols", [
    (["BTCUSDT-1h-2020-01.csv"], ["BTCUSDT-1h-2020-01"]),
    (["BTCUSDT-1h-2020-01.zip", "BTCUSDT-1h-2020-02.csv"], ["BTCUSDT"]),
    (["A_2019.csv", "A_2020.csv", "B.csv"], ["A", "B"]),
    (["A_20200101_20200131.csv", "A_20200201_20200229.csv"], ["A"]),
    (["SPY-1.csv", "SPY-2.csv"], ["SPY-1", "SPY-2"]),
])
def test_files_that_differ_by_date_alone_are_one_symbol(tmp_path, names, symbols):
    for k, name in enumerate(names):
        (tmp_path / name).write_text(CSV.replace("2020-01", f"2020-0{k + 1}"))
    assert sorted(bars.symbol for bars in data.load(str(tmp_path))) == symbols


def test_intervals_are_not_mixed(tmp_path):
    hours = "time,symbol,open,high,low,close\n" + "".join(f"2020-01-02 {h:02d}:00,A,1,3,0.5,2\n" for h in range(20))
    (tmp_path / "h.csv").write_text(hours)
    (tmp_path / "d.csv").write_text("time,symbol,open,high,low,close\n" + days(20, "A,1,3,0.5,2"))
    with pytest.raises(UserError, match="A: bars every 3,600 s in one file and every 86,400 s in another"):
        data.load(str(tmp_path))
    with pytest.raises(UserError, match="one interval"):
        write_folder(read_files(str(tmp_path)), tmp_path / "out")
    (tmp_path / "d.csv").write_text(hours.replace("01-02", "01-03").replace("03:00", "03:30"))  # an odd bar is no interval
    assert len(data.load(str(tmp_path))[0]) == 40


def test_odd_bytes_in_names_and_symbols(tmp_path):
    path = os.fsencode(tmp_path) + b"/a\xff\x1b[31m.csv"
    with open(path, "wb") as f:
        f.write(CSV.encode())
    [bars] = data.load(os.fsdecode(path))
    assert bars.symbol == "a\\udcff\\x1b[31m"
    rows = days(20, "A,1,3,0.5,2")
    [bars] = read(tmp_path, f"time,symbol,open,high,low,close\n{rows}2020-03-01,\x1b[31m,1,3,0.5,2\n")
    assert bars.symbol == "A" and len(bars) == 20


def test_dates_of_any_year_are_written():
    assert [iso(t) for t in (0, -60, 86_399, 253_402_300_800)] == [
        "1970-01-01", "1969-12-31 23:59", "1970-01-01 23:59", "10000-01-01"]


def test_parse_time():
    assert data.parse_time("2020-01-02 10:00") == data.parse_time("1577959200") == data.parse_time("20200102T100000Z") == 1577959200
    assert data.parse_time(" 13/01/2020 ") == data.parse_time("20200113") == 1578873600
    assert data.parse_time("2100-01-01") == 4102444800
    for text in ("", "3", "soon", "9000-01-03", "2020-02-30", "03/04/2020", "1e300", "nan", "9" * 5000):
        assert np.isnan(data.parse_time(text)), text


# ---- the memory-mapped form

def edits(folder):
    """(what, function that spoils the folder) for each field of a folder, in a dozen ways."""
    names = folder / "symbols.json"
    for text in ("", "5", "[]", "{", "{}", "null", "nan", '{"a": 1}', "[[[", "[1, 2]", '["A", "B"]', '[["A", 0, 9], ["A", 9, 70010]]',
                 '[["A\\u001b[31m", 0, 70010]]', '[["A", 0, 9]]', '[["A", 0, 10], ["B", 9, 70010]]', '[["A", 0, 9], ["B", 9, 1e5]]', "[" * 5000):
        yield f"symbols.json {text[:20]}", lambda text=text: names.write_text(text)
    for name in ("bars.time", "bars.ohlcva"):
        path = folder / name
        for raw in (b"", path.read_bytes()[:-8], bytes(500), path.read_bytes() + bytes(8), bytes(path.stat().st_size)):
            yield f"{name} {len(raw)}", lambda path=path, raw=raw: path.write_bytes(raw)
        yield f"{name} gone", path.unlink
        yield f"{name} a pipe", lambda path=path: (path.unlink(), os.mkfifo(path))
    times = np.fromfile(folder / "bars.time", "<i8")
    for at in (5, 9 + (1 << 16), 70_009, 1 << 16):
        spoiled = times.copy()
        spoiled[at:] -= 9
        yield f"times fall at {at}", lambda spoiled=spoiled: spoiled.tofile(folder / "bars.time")
    bars = np.fromfile(folder / "bars.ohlcva", "<f8").reshape(-1, 6)
    for row, column, value in [(0, c, v) for c in range(4) for v in (0, -1, np.nan, np.inf, 1e40)] + [(70_000, 3, 0), (9, 4, -1), (9, 5, -1)]:
        spoiled = bars.copy()
        spoiled[row, column] = value
        yield f"bar {row} {column} {value}", lambda spoiled=spoiled: spoiled.tofile(folder / "bars.ohlcva")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_spoiled_folder_is_refused_in_one_line(tmp_path):
    n = 70_001  # the last bar in a second piece
    bars = np.tile([1.0, 3.0, 0.5, 2.0, 7.0, np.nan], (n, 1))
    series = [Bars("A", np.arange(9), bars[:9]), Bars("B", np.arange(n), bars)]
    write_folder(series, tmp_path / "set")
    whole = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    for what, spoil in list(edits(tmp_path / "set")):
        spoil()
        try:
            data.load(str(tmp_path / "set"))
            why = "nothing"
        except UserError as e:
            why = str(e)
        assert "not a whole data set" in why and "\n" not in why, (what, why)
        for path, raw in whole.items():
            path.unlink(missing_ok=True)
            path.write_bytes(raw)
    assert [len(b) for b in data.load(str(tmp_path / "set"))] == [9, n]


# ---- files of others

def test_bombs_devices_forecasts_and_long_cells_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(2**25)))
    (tmp_path / "forecast.csv").write_text("time,symbol,step,p_up,q05,open,high,low,close,volume,amount\n2020-01-02,A,1,0.5,1,1,3,0.5,2,7,\n")
    (tmp_path / "quote.csv").write_text("time,open,high,low,close\n2020-01-02,1,3,0.5,\"" + "2" * 200_000)
    (tmp_path / "dots.csv").write_text("." * 20_000 + ",time,open,high,low\n2020-01-02,1,3,0.5,2\n")
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("a.gz", "unpacks to over 16 MB"), ("forecast.csv", "a forecast"), ("quote.csv", "not CSV"), ("dots.csv", "no "),
                      ("pipe", "not a regular file"), ("/dev/zero", "not a regular file")):
        with pytest.raises(UserError, match=why) as e:
            data.load(str(tmp_path / name))
        assert "\n" not in str(e.value)


def test_a_data_set_never_hides_what_lies_in_its_folder(tmp_path):
    (tmp_path / "A.csv").write_text(CSV)
    (tmp_path / "B.csv").write_text(CSV)
    with pytest.raises(UserError, match="holds '[AB].csv'; choose a new folder"):
        data.main(["--data", str(tmp_path / "A.csv"), "--out", str(tmp_path)])
    assert sorted(os.listdir(tmp_path)) == ["A.csv", "B.csv"] and len(data.load(str(tmp_path))) == 2


def test_what_unpacks_to_more_is_read_where_that_is_allowed(tmp_path):
    text = "time,open,high,low,close\n" + days(9, "1,3,0.5,2")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((text + "\n" * 2**24).encode()))
    with pytest.raises(UserError, match="python data.py --max_unpacked"):
        data.load(str(tmp_path / "a.csv.gz"))
    data.main(["--data", str(tmp_path / "a.csv.gz"), "--max_unpacked", "17", "--out", str(tmp_path / "set")])
    [bars] = data.load(str(tmp_path / "set"))
    assert bars.symbol == "a" and len(bars) == 9
    with pytest.raises(UserError, match="--max_unpacked 0"):
        data.main(["--data", str(tmp_path / "a.csv.gz"), "--max_unpacked", "0"])


def test_a_forecast_among_bars_is_no_history(tmp_path, capfd):
    """What sample.py --out wrote into the folder that it read: left out, with a line; alone it is refused."""
    [bars] = read(tmp_path, CSV, "A.csv")
    times = bars.time[-1] + DAY * np.arange(1, 4)
    write_forecast(tmp_path / "forecast.csv", [bars], np.ones((1, 5, 3, 6)), times[None])
    [again] = data.load(str(tmp_path))
    assert again.symbol == "A" and np.array_equal(again.time, bars.time)
    err = capfd.readouterr().err
    assert "1 of 2 files skipped" in err and "forecast.csv:1: a forecast of sample.py" in err
    with pytest.raises(UserError, match="a forecast of sample.py, which is no history"):
        data.load(str(tmp_path / "forecast.csv"))


def test_more_symbols_than_files_may_be_open(tmp_path):
    one = np.tile([1.0, 3.0, 0.5, 2.0, 7.0, np.nan], (2, 1))
    write_folder((Bars(f"S{i}", np.arange(2), one) for i in range(3000)), tmp_path / "set")
    before = len(os.listdir("/dev/fd"))
    series = data.load(str(tmp_path / "set"))
    assert len(series) == 3000 and len(os.listdir("/dev/fd")) <= before + 2


# ---- whatever the bytes

def test_csv_with_bytes_changed_is_read_right_or_refused(tmp_path):
    """400 edits of good files: each ends in valid bars or in a UserError of one line.

    Where they lie behind the header, which says what a number is, all but a few bars are those of the whole file.
    """
    rng = np.random.default_rng(0)
    rows = [f"2020-{m:02d}-{d:02d},1{d}.5,1{d}.9,1{d}.1,1{d}.{m},{d}00" for m in (1, 2) for d in range(1, 29)]
    plain = "\n".join(["time,open,high,low,close,volume", *rows]) + "\n"
    texts = [plain, plain.replace(",", ";").replace(".", ","), re.sub(r"(\d{4})-(\d\d)-(\d\d)", r"\3/\2/\1", plain),
             re.sub(r"(\d{4})-(\d\d)-(\d\d),", r"\1\2\3,930,", plain).replace("time,", "date,time,")]
    words = ["nan", "", "-", "1e400", "x", '"', ",", "\n", "\0", "\xff", "9" * 30, "2024-13-45", "0", "-1", "#", ";", "inf", "1,5", "1.234.567", "today"]
    series = [read(tmp_path, text)[0] for text in texts]
    for k in range(400):
        whole = series[k % 4]
        raw = bytearray(texts[k % 4].encode())
        at = int(rng.integers(40, len(raw)))
        edit = rng.integers(4) if k < 300 else 4
        if edit == 0:
            raw[at] = rng.integers(256)
        elif edit == 1:
            raw = raw[:at]
        elif edit == 2:
            raw[at:at] = words[rng.integers(len(words))].encode()
        elif edit == 3:
            raw[at:at + 9] = rng.integers(0, 256, 9, dtype=np.uint8).tobytes()
        else:
            for at in rng.integers(len(raw), size=rng.choice([1, 3, 30])):
                raw[at] ^= 1 << rng.integers(8)
        try:
            [bars] = read(tmp_path, bytes(raw))
        except UserError as e:
            assert "\n" not in str(e), raw
            continue
        at = np.searchsorted(whole.time, bars.time) % len(whole)
        same = (whole.time[at] == bars.time) & (whole.ohlcva[at, :5] == bars.ohlcva[:, :5]).all(1)
        assert (edit == 4 or (~same).sum() <= 2) and (np.diff(bars.time) > 0).all(), raw
        o, h, l, c, v, _ = bars.ohlcva.T
        assert (l > 0).all() and (l <= np.minimum(o, c)).all() and (h >= np.maximum(o, c)).all() and not (v < 0).any()
        assert np.isfinite(data.features(bars)[0]).all()
