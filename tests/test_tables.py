"""Where rows come from: every form reads the same, and what cannot be read is named by file and row."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma

import pytest

from stitched_llama.training import Row, read_rows
from stitched_llama.training.tables import read_table

ROWS = [
    {"instruction": "Name a river.", "input": "in {France}", "output": "The Loire."},
    {"instruction": "Say é.", "input": "", "output": "é 🦙\nin two lines"},
    {"instruction": "When?", "input": "NA", "output": "2020-01-01"},  # no date, no missing value: texts
    {"instruction": "Code", "input": "007", "output": "2020-01-01T10:00:00"},
]
WANTED = [Row(**row) for row in ROWS]


def as_csv(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["instruction", "input", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows)


FORMS = {
    "rows.json": json.dumps(ROWS, ensure_ascii=False),
    "indented.json": " \n" + json.dumps(ROWS, indent=1) + "\n",
    "lines.json": lines(ROWS),
    "rows.jsonl": lines(ROWS) + "\n\n",
    "windows.jsonl": lines(ROWS).replace("\n", "\r\n"),
    "rows.ndjson": lines(ROWS),
    "list.jsonl": json.dumps(ROWS),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "no_suffix": lines(ROWS),
    "rows.csv": as_csv(ROWS),
    "rows.tsv": as_csv(ROWS, "\t"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bom", [False, True])
def test_every_form_of_text_reads_the_same(name, bom, tmp_path):
    raw = FORMS[name].encode("utf-8-sig" if bom else "utf-8")
    (tmp_path / name).write_bytes(raw)
    assert read_rows(str(tmp_path / name)) == WANTED
    if not bom and name.count("rows."):
        for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
            (tmp_path / (name + suffix)).write_bytes(pack(raw))
            assert read_rows(str(tmp_path / (name + suffix))) == WANTED


def test_parquet_arrow_and_data_sets_saved_to_disk_read_the_same(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([{**row, "more": 1} for row in ROWS])
    for part in (table, table.select([1, 3])):  # a file that changes is read anew
        part.to_parquet(str(tmp_path / "rows.parquet"))
        assert read_rows(str(tmp_path / "rows.parquet")) == [Row(**{n: row[n] for n in ROWS[0]}) for row in part]
    table = part
    table.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(train=table, test=table.select([1])).save_to_disk(str(tmp_path / "parts"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for source in (tmp_path / "saved", tmp_path / "parts", arrow):
        assert read_rows(str(source)) == [WANTED[1], WANTED[3]]
    assert read_rows(str(tmp_path / "parts"), split="test") == [WANTED[3]]
    with pytest.raises(ValueError, match="parts has no part 'val': it holds train, test"):
        read_rows(str(tmp_path / "parts"), split="val")


def test_folders_have_parts_and_lose_no_file(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROWS[:3]))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[3:]).encode()))
    assert read_rows(str(tmp_path)) == WANTED[:3]
    assert read_rows(str(tmp_path), split="test") == WANTED[3:]
    assert read_rows(str(tmp_path), split="train+test") == WANTED
    with pytest.raises(ValueError, match="has no part 'val': it holds train, test"):
        read_rows(str(tmp_path), split="val")
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "x"}'))
    with pytest.raises(ValueError, match=r"test\.jsonl\.gz, line 1: output is missing"):
        read_rows(str(tmp_path), split="test")
    (tmp_path / "more.csv").write_text(as_csv(ROWS))  # datasets reads the most frequent form alone
    with pytest.raises(ValueError, match=r"holds more\.csv beside files of another form"):
        read_rows(str(tmp_path))
    (tmp_path / "more.csv").unlink()
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "more.csv").write_text("")
    assert len(read_rows(str(tmp_path))) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a folder of data"):
        read_rows(str(tmp_path / "empty"))


def test_json_of_the_hub_is_read_as_here(tmp_path, monkeypatch):
    """`datasets` would read the dates as timestamps."""
    import datasets

    (tmp_path / "train.jsonl").write_text(lines(ROWS))
    builder = datasets.load_dataset_builder("json", data_files={"train": str(tmp_path / "train.jsonl")})
    builder.config.data_files["train"][:] = ["hf://datasets/me/set@main/train.jsonl"]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    monkeypatch.setattr(datasets.DownloadManager, "download", lambda self, url: str(tmp_path / "train.jsonl"))
    assert read_rows("me/set") == WANTED
    assert next(iter(read_table("me/set")))[0] == "hf://datasets/me/set@main/train.jsonl, line 1"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nobody/nothing is neither a file or folder here, nor a data set of the Hub"):
        read_rows("nobody/nothing")


GOOD = '{"instruction": "x", "output": "y"}'


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.csv", "instruction,output\n", "holds no rows"),
        ("a.json", "[{", "row 0 is not JSON"),
        ("a.json", f"[{GOOD},]", "row 1 is not JSON"),
        ("a.json", f"[{GOOD} {GOOD}]", "row 1 is not JSON: ',' or ']' is needed, '{' was found"),
        ("a.json", f"[{GOOD}", "row 1 is not JSON: ',' or ']' is needed, 'the end' was found"),
        ("a.json", f"[{GOOD}] [", "follows after the end of the list"),
        ("a.jsonl", GOOD + "\n{", "line 2 is not JSON"),
        ("a.jsonl", f"{GOOD}\n\n{GOOD},\n", "line 3 is not JSON"),
        ("a.jsonl", GOOD + "\n" + "[" * 10**5 + "]" * 10**5, "line 2 is nested too deep"),
        ("a.json", f'[{GOOD}, {{"a": {"[" * 10**5}', "row 1 is nested too deep"),
        ("a.csv", 'instruction,output\nx,y\n"x,y\n', "line 3 is not CSV"),
        ("a.csv", "instruction,output\nx,y\nx,y,z\n", "line 3 has 3 fields, the header 2: instruction, output"),
        ("a.csv", "instruction,output\nx\n", "line 2 has 1 fields, the header 2"),
        ("a.csv", "instruction,output,output\nx,y,z\n", "names a column twice: instruction, output, output"),
        ("a.csv", "instruction;output\nx;y\n", r"line 2: instruction is missing \(the row holds \['instruction;output'\]\)"),
        ("a.json.gz", "no gzip", "cannot be read: Not a gzipped file"),
        ("a.json.xz", "no xz", "cannot be read: Input format not supported"),
        ("a.parquet", "PAR1 no more", "cannot be read as parquet: Parquet magic bytes not found"),
        ("a.arrow", "no arrow", "cannot be read as arrow"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.* {reason}"):
        read_rows(str(tmp_path / name))


def test_cut_archives_and_other_encodings_are_named(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode())[:-9])
    with pytest.raises(ValueError, match=r"a\.json\.gz cannot be read: Compressed file ended"):
        read_rows(str(tmp_path / "a.json.gz"))
    for encoding, text in (("latin-1", '[{"instruction": "é"}]'), ("utf-16", "[]")):
        (tmp_path / "a.json").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=r"a\.json is not UTF-8 .*: convert it"):
            read_rows(str(tmp_path / "a.json"))


def test_missing_files_parts_of_a_file_and_unknown_options(tmp_path):
    for name in ("none.json", "none.csv.gz", "none.parquet"):
        with pytest.raises(ValueError, match=f"there is no file .*{name}"):
            read_rows(str(tmp_path / name))
    (tmp_path / "a.json").write_text(f"[{GOOD}]")
    with pytest.raises(ValueError, match=r"a\.json is one file, all of it 'train', and has no part 'test'"):
        read_rows(str(tmp_path / "a.json"), split="test")
    with pytest.raises(ValueError, match="'ignore' is unknown"):
        read_rows(str(tmp_path / "a.json"), on_bad_row="ignore")


def test_long_fields_of_a_csv_are_read_and_the_limit_of_others_stays(tmp_path):
    rows = [{"instruction": "x", "input": "", "output": "long " * 40_000}]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    limit = csv.field_size_limit()
    assert len(read_rows(str(tmp_path / "a.csv"))[0].output) == 199_999
    assert csv.field_size_limit() == limit


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    line = json.dumps({"instruction": "say \u2028 this", "output": "a\u0085b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f'\n{line}\n\n{{"instruction": "x"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: output is missing"):
        read_rows(str(tmp_path / "a.jsonl"))
    assert read_rows(str(tmp_path / "a.jsonl"), "skip")[0].instruction == "say \u2028 this"


# ---- what a row may hold


def test_what_pandas_writes_is_read_whole(tmp_path):
    """A missing input is NaN in an object, null in JSON lines, nothing in a CSV; numbers become their text."""
    import pandas

    frame = pandas.DataFrame(ROWS).assign(input=[float("nan"), "x", float("nan"), "y"], output=[1, 2, 3, 4])
    (tmp_path / "a.json").write_text(json.dumps(frame.to_dict("records")))
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    assert "NaN" in (tmp_path / "a.json").read_text()
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet"):
        found = read_rows(str(tmp_path / name))
        assert [(row.input, row.output) for row in found] == [("", "1"), ("x", "2"), ("", "3"), ("y", "4")], name


def test_numbers_are_the_text_that_stands_in_the_file(tmp_path):
    numbers = ["3", "-0", "1.50", "1e3", "9" * 5000]
    text = ",".join(f'{{"instruction": {n}, "input": {n}, "output": {n}}}' for n in numbers)
    (tmp_path / "a.json").write_text(f"[{text}]")
    assert read_rows(str(tmp_path / "a.json")) == [Row(n, n, n) for n in numbers]


BAD = [
    ({"input": "x", "output": "y"}, r"instruction is missing \(the row holds \['input', 'output'\]\)"),
    ({"instruction": "  ", "output": "y"}, "instruction is blank"),
    ({"instruction": "x"}, "output is missing"),
    ({"instruction": "x", "output": ""}, "output is missing"),
    ({"instruction": "x", "output": float("nan")}, "output is missing"),
    ({"instruction": "x", "output": float("inf")}, "output is inf, a text or a number is needed"),
    ({"instruction": "x", "output": True}, "output is True, a text or a number"),
    ({"instruction": "x", "output": "y", "input": ["z"]}, r"input is \['z'\]"),
    ({"instruction": "x", "output": "y", "input": ["z"] * 10**5}, r"input is \['z', 'z', .{0,40}\.\.\.\]"),
    ({"instruction": "x", "output": "half \ud83e of a llama"}, r"output is no text: half a character .* at 5"),
    ("text", "a str where an object"),
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_row_is_named_by_file_and_row_or_skipped_and_counted(row, reason, kind, tmp_path, caplog):
    path, place = tmp_path / f"rows.{kind}", {"json": "row 4", "jsonl": "line 5"}[kind]
    rows = [*ROWS, row, *ROWS]
    path.write_text(json.dumps(rows) if kind == "json" else lines(rows))
    with pytest.raises(ValueError, match=rf"rows\.{kind}, {place}: {reason}.*--on_bad_row skip"):
        read_rows(str(path))
    with caplog.at_level(logging.WARNING):
        assert len(read_rows(str(path), on_bad_row="skip")) == 8
    assert f"{path}: 1 of 9 rows skipped (1 for " in caplog.text
    assert f"the first is {path}, {place}" in caplog.text


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD + '\n{"output": "x", "instruction": "x", "output": "y"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: output stands twice"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_skipping_never_drops_most_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([GOOD, *3 * ['{"question": "x", "answer": "y"}']]))
    with pytest.raises(
        ValueError,
        match=r"more bad rows than good ones: 3 of 4 .* first is .*line 2: instruction is missing \(the row holds \['question'",
    ):
        read_rows(str(tmp_path / "a.jsonl"), on_bad_row="skip")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="holds no rows that can be used: 1 of 1"):
        read_rows(str(tmp_path / "b.jsonl"), on_bad_row="skip")


def test_columns_that_datasets_made_dates_of_are_refused(tmp_path):
    import datetime

    from datasets import Dataset

    day = datetime.datetime(2020, 1, 1)
    Dataset.from_dict({"instruction": ["x"], "output": [day]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: output is datetime.datetime\(2020"):
        read_rows(str(tmp_path / "a.parquet"))


def test_code_keeps_its_indentation(tmp_path):
    rows = [
        {"instruction": " double it ", "output": "\n  \n    x = 1\n    return x \n"},
        {"instruction": "i", "output": " a"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert read_rows(str(tmp_path / "rows.json")) == [
        Row("double it", "", "    x = 1\n    return x"),
        Row("i", "", "a"),
    ]
