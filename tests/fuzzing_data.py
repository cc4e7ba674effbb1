"""Hostile data files, from a seed: read as plain `json`, `csv` and `pyarrow` read them, or refused by file and row.

`cases(rng)` yields (name, run) without end; `run()` returns what was refused, or None, and raises AssertionError where rows are
silently different, an error names no file, or a library's own exception comes through.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

from stitched_llama.training import InstructionDataset, Row, byte_tokenizer, read_rows, template

try:
    from fuzzing import Different
except ImportError:
    Different = AssertionError

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
UNPACK = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
NAMES = ("instruction", "input", "output")
TEXTS = (
    "2020-01-01", "2020-01-01T10:00:00", "NA", "None", "null", "nan", "007", "1e5", "", " ", "\n", "\n    code\n  x\n", 'say "x"',
    "a,b;c\td", "\u2028\u0085", "\0", "é🦙", "\ud800", "</s>", "{instruction}", "[1]", "'", "\\", "\r\n", "\ufeffx", "x" * 5000,
)  # fmt: skip


class Raw(str):
    """JSON as it stands in the file."""


def some_value(rng):
    kind = rng.randrange(12)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind < 7:
        return "".join(rng.choices("ab \n\"',\\{}é", k=rng.randrange(30))) + "x"
    special = (
        None, True, rng.randrange(-9, 10**6), rng.random(), Raw("NaN"), Raw("-Infinity"), Raw("1.50"), Raw("-0"), Raw("9" * 5000),
        Raw("[" * 3000 + "]" * 3000), ["x"], {"a": 1}, Raw("1E400"),
    )  # fmt: skip
    return rng.choice(special)


def some_row(rng):
    if rng.random() < 0.02:
        return rng.choice([[], "text", 3, None, {}])
    row = {name: rng.choice(TEXTS[:9]) + "y" for name in NAMES}
    while rng.random() < 0.3:
        row[rng.choice([*NAMES, "id"])] = some_value(rng)
    if rng.random() < 0.1:
        row.pop(rng.choice(NAMES))
    return row


def dumped(value, rng, indent=""):
    """JSON text of a value; a key may stand twice."""
    if isinstance(value, Raw):
        return str(value)
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=rng.random() < 0.5)
    pairs = list(value.items())
    rng.shuffle(pairs)
    if pairs and rng.random() < 0.01:
        pairs.append(pairs[0])
    return "{" + f",{indent}".join(f"{json.dumps(key)}: {dumped(item, rng)}" for key, item in pairs) + "}"


def damaged(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, width = rng.randrange(len(raw) + 1), rng.choice([1, 1, 3, 40])
        kind = rng.randrange(4)
        if kind == 0:
            raw[at : at + width] = b""
        elif kind == 1:
            raw[at:at] = rng.choice([rng.randbytes(width), b'"', b"{", b"]", b",", b"\n", b"\xff", b"\xef\xbb\xbf"])
        elif kind == 2:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        else:
            raw[at:] = raw[at : at + width]
    return bytes(raw)


# ---- a plain reader


class Repeated(dict):
    pass


def plain_object(pairs):
    return dict(pairs) if len(dict(pairs)) == len(pairs) else Repeated(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=plain_object, parse_int=str, parse_float=str)


def plain_rows(name, raw):
    """The rows of a file as the standard library reads them; None where it does not."""
    try:
        suffix = Path(name).suffix
        text = (UNPACK[suffix](raw) if suffix in UNPACK else raw).decode("utf-8-sig")
        form = Path(name.removesuffix(suffix)).suffix if suffix in UNPACK else suffix
        if form in (".csv", ".tsv"):
            return plain_csv(text, "\t" if form == ".tsv" else ",")
        text = text.strip(" \t\r\n")
        if text.startswith("["):
            return DECODER.decode(text)
        rows = []
        while text:
            row, end = DECODER.raw_decode(text)
            rows.append(row)
            text = text[end:].lstrip(" \t\r\n")
        return rows
    except Exception:
        return None


def plain_csv(text, delimiter):
    limit = csv.field_size_limit(sys.maxsize)
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter) if line]
    finally:
        csv.field_size_limit(limit)
    header, *lines = lines or [[]]
    if len(set(header)) < len(header) or any(len(line) != len(header) for line in lines):
        return None
    return [dict(zip(header, line)) for line in lines]


def plain_row(row):
    """What a row means; None where it is none."""
    if not isinstance(row, dict) or isinstance(row, Repeated):
        return None
    found = []
    for name in NAMES:
        value = row.get(name)
        if value is None or value != value:
            value = ""
        if isinstance(value, bool) or (isinstance(value, float) and math.isinf(value)):
            return None
        if isinstance(value, int | float):
            value = str(value)
        if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
            return None
        found.append(value)
    if not found[0].strip() or not found[2].strip():
        return None
    output = found[2].strip()
    if "\n" in output:
        kept = found[2].rstrip().split("\n")
        while not kept[0].strip():
            kept.pop(0)
        output = "\n".join(kept)
    return Row(found[0].strip(), found[1].strip(), output)


# ---- cases


def text_file(rng):
    """(name, bytes, whether they are as written)."""
    rows = [some_row(rng) for _ in range(rng.choice([0, 1, 1, 2, 3, 9]))]
    form = rng.choice(["json", "jsonl", "ndjson", "csv", "tsv", "txt"])
    if form in ("csv", "tsv"):
        text, names = io.StringIO(newline=""), [*NAMES, "id"]
        writer = csv.writer(
            text, delimiter="\t" if form == "tsv" else ",", quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        )
        writer.writerow(names)
        writer.writerows([row.get(name) for name in names] for row in rows if isinstance(row, dict))
        text = text.getvalue()
    elif rng.random() < 0.5:
        text = "[" + rng.choice([",", " ,\n"]).join(dumped(row, rng, rng.choice(["", "\n "])) for row in rows) + "]"
    else:
        text = rng.choice(["\n", "\r\n", "\n\n", " "]).join(dumped(row, rng, rng.choice(["", "\n "])) for row in rows)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        raw = b"\xef\xbb\xbf" + raw
    packed = rng.choice(["", "", "", "", *PACK])
    whole = rng.random() < 0.5
    if not whole and rng.random() < 0.7:
        raw = damaged(raw, rng)
    raw = PACK[packed](raw)
    return f"rows.{form}{packed}", raw if whole else rng.choice([raw, damaged(raw, rng)]), whole


def attempted(call, *args):
    """(what it returns, None) or (None, what it refuses)."""
    try:
        return call(*args), None
    except ValueError as error:
        return None, str(error)
    except Exception as error:
        raise AssertionError(f"a library's own {type(error).__name__}: {error}") from error


def check_rows(path, rows, whole):
    """`rows` as a plain reader has them, or None; a file that is `whole` must not be refused where they are good."""
    wanted = None if rows is None else [plain_row(row) for row in rows]
    good = None if wanted is None else [row for row in wanted if row is not None]
    for on_bad_row in ("skip", "error"):
        found, refusal = attempted(read_rows, str(path), on_bad_row)
        if refusal is not None:
            assert str(path) in refusal, f"names no file: {refusal}"
            assert len(refusal) < 2000, f"a message of {len(refusal)} characters"
            may_skip = on_bad_row == "skip" and good and len(good) >= len(wanted) / 2
            assert not (whole and wanted and (may_skip or None not in wanted)), f"refused: {refusal}"
            continue
        assert wanted is not None, f"read, though a plain reader does not: {found!r:.200}"
        assert on_bad_row == "skip" or None not in wanted, "a bad row was read"
        if found != good:
            raise Different(f"other rows: {found!r:.300} for {good!r:.300}")
        check_tokens(found)
    return refusal


TOKENIZER = byte_tokenizer()
SHORT_TEMPLATE = template("short", TOKENIZER)


def check_tokens(rows):
    for example, row in zip(InstructionDataset(rows, TOKENIZER, SHORT_TEMPLATE, 64).examples, rows):
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == len(labels) <= 64
        answer = TOKENIZER.decode([i for i, label in zip(ids, labels) if label != -100], skip_special_tokens=True)
        if "</s>" not in row.output and len(row.output.encode()) < 16:
            assert answer == row.output


def run_text(seed):
    with tempfile.TemporaryDirectory() as folder:
        name, raw, whole = text_file(Random(seed))
        path = Path(folder) / name
        path.write_bytes(raw)
        return check_rows(path, plain_rows(name, raw), whole)


def run_parquet(seed):
    import pyarrow
    import pyarrow.parquet

    rng, buffer = Random(seed), io.BytesIO()
    columns = {}
    for name in (*NAMES, "id"):
        kind = rng.choice(["text", "text", "text", "int", "float", "null"])
        make = {
            "text": lambda: rng.choice([t for t in TEXTS if t.isprintable() or "\n" in t]) + "y", "int": lambda: rng.randrange(99),
            "float": lambda: rng.choice([0.5, 3.0, float("nan"), float("inf")]), "null": lambda: None,
        }[kind]  # fmt: skip
        columns[name] = [None if rng.random() < 0.1 else make() for _ in range(4)]
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    raw, whole = buffer.getvalue(), rng.random() < 0.7
    if not whole:
        raw = raw[: rng.randrange(len(raw))] if rng.random() < 0.5 else damaged(raw[-60:], rng).join([raw[:-60], b""])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        path.write_bytes(raw)
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except Exception:
            rows = None
        return check_rows(path, rows, whole)


def cases(rng):
    for number in count(rng.randrange(20)):
        run = run_parquet if number % 20 == 19 else run_text
        seed = rng.getrandbits(64)
        yield f"{run.__name__}-{seed:x}", partial(run, seed)


def framed(cases):
    """The same cases as (name, mutate, check), which write no files of the caller's and refuse by ValueError."""

    def check(run, case):
        if (refusal := run()) is not None:
            raise ValueError(refusal)

    def endless(rng):
        for name, run in cases(rng):
            yield name, lambda case: None, partial(check, run)

    return endless


KINDS = {"data": (lambda folder: folder.mkdir(parents=True), framed(cases), 1000)}
