"""Rows, templates, labels: what a row becomes, and which rows are refused."""

import json
import logging

import pytest
from conftest import SHARED

from stitched_llama.training import (
    TEMPLATES,
    Collator,
    InstructionDataset,
    Row,
    batches,
    pad_token_id,
    read_rows,
    split_rows,
    template,
)  # fmt: skip

# as tatsu-lab/stanford_alpaca publishes them (train.py, PROMPT_DICT), with Alpaca-LoRA's newline before the response
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a river.\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a river.\n\n### Input:\nin {France}\n\n### Response:\n"
)
ROWS = [
    {"instruction": "Name a river.", "input": "in {France}", "output": "The Loire."},
    {"instruction": "Say é.", "input": "", "output": "é"},
    {"instruction": "Add 1 and 2.", "output": "3"},
]


def test_alpaca_template_is_the_published_text():
    assert template("alpaca").render("Name a river.") == ALPACA
    assert template("alpaca").render("Name a river.", "in {France}") == ALPACA_INPUT
    assert template("short").render("Reverse", "abc") == "Reverse: abc\n> "
    assert template("short").render("Hi") == "Hi\n> "
    with pytest.raises(ValueError, match="'alpacca' is unknown; one of alpaca"):
        template("alpacca")


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_is_the_same_for_one_turn_and_ends_ready_for_more(name, tokenizer):
    text = "Name 'a'\n{river}.\\n"
    turn = {"role": "user", "content": text}
    show = {"chat_template": TEMPLATES[name].chat, "tokenize": False, "add_generation_prompt": True}
    first = tokenizer.apply_chat_template([turn], **show)
    assert first == template(name).render(text)
    answer = {"role": "assistant", "content": "The Loire."}
    second = tokenizer.apply_chat_template([turn, answer, {"role": "user", "content": "Another."}], **show)
    assert second.startswith(first + "The Loire.\n")
    assert second.endswith(template(name).render("Another.")[-20:])


def write(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    else:
        from datasets import Dataset

        Dataset.from_list([{"input": None, **row} for row in rows]).to_parquet(str(path))
    return str(path)


def test_every_format_reads_the_same(tmp_path):
    wanted = [Row("Name a river.", "in {France}", "The Loire."), Row("Say é.", "", "é"), Row("Add 1 and 2.", "", "3")]
    for kind in ("json", "jsonl", "parquet"):
        assert read_rows(write(tmp_path, kind, ROWS)) == wanted, kind


BAD = [
    ({"input": "x", "output": "y"}, "instruction is missing"),
    ({"instruction": "  ", "output": "y"}, "instruction is '  '"),
    ({"instruction": "x"}, "output is missing"),
    ({"instruction": "x", "output": ""}, "output is ''"),
    ({"instruction": "x", "output": 3}, "output is 3"),
    ({"instruction": "x", "output": "y", "input": ["z"]}, r"input is \['z'\]"),
    ("text", "a str where an object"),
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_row_is_named_by_file_and_row_or_skipped_and_counted(row, reason, kind, tmp_path, caplog):
    path, place = write(tmp_path, kind, [*ROWS, row, *ROWS]), {"json": "row 3", "jsonl": "line 4"}[kind]
    with pytest.raises(ValueError, match=rf"rows\.{kind}, {place}: {reason}.*--on_bad_row skip"):
        read_rows(path)
    with caplog.at_level(logging.WARNING):
        assert len(read_rows(path, on_bad_row="skip")) == 6
    assert f"{path}: 1 of 7 rows skipped, the first is {place}" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", '{"instruction": "x"}', "holds a dict where a list"),
        ("a.json", "[{", "is not JSON"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{', "line 2 is not JSON"),
    ],
)
def test_unreadable_files_are_named(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.* {reason}"):
        read_rows(str(tmp_path / name))


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


def test_missing_file_empty_after_skipping_and_unknown_option(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*none.json"):
        read_rows(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(write(tmp_path, "json", [{}]), on_bad_row="skip")
    with pytest.raises(ValueError, match="'ignore' is unknown"):
        read_rows(write(tmp_path, "json", ROWS), on_bad_row="ignore")


def test_split_is_disjoint_complete_and_repeats():
    rows = [Row(str(i), "", "x") for i in range(40)]
    train, held_out = split_rows(rows, 10, seed=1)
    assert (len(train), len(held_out)) == (30, 10)
    assert set(train) | set(held_out) == set(rows)
    assert split_rows(rows, 10, seed=1) == (train, held_out) != split_rows(rows, 10, seed=2)
    for wrong in (0, 40, -1):
        with pytest.raises(ValueError, match=f"{wrong} of 40 rows held out"):
            split_rows(rows, wrong, 0)


ROW = Row("Name a river.", "", "The Loire.")


def dataset(tokenizer, rows=(ROW,), name="short", **options):
    return InstructionDataset(list(rows), tokenizer, template(name), **options)


def test_labels_are_the_response_and_its_eos(tokenizer):
    (row,) = dataset(tokenizer)
    prompt = tokenizer("Name a river.\n> ").input_ids
    wanted = [*tokenizer("The Loire.").input_ids, tokenizer.eos_token_id]
    assert row == {"input_ids": prompt + wanted, "labels": [-100] * len(prompt) + wanted}
    (row,) = dataset(tokenizer, train_on_prompt=True)
    assert row["labels"] == row["input_ids"] == prompt + wanted


@pytest.mark.parametrize("length", [8, 11, 16, 20, 24, 27, 200])
@pytest.mark.parametrize("prompt_length", [1, 9, 60])
@pytest.mark.parametrize("response_length", [1, 9, 60])
def test_truncation_always_leaves_labels(length, prompt_length, response_length, tokenizer, caplog):
    row = Row("p" * prompt_length, "", "r" * response_length)
    made = dataset(tokenizer, [row], max_length=length)
    found, whole = made[0], prompt_length + 3 + response_length + 1
    assert len(found["input_ids"]) == len(found["labels"]) == min(length, whole)
    kept = [i for i in found["labels"] if i != -100]
    assert len(kept) >= min(response_length + 1, length // 4) > 0
    assert found["input_ids"][-len(kept) :] == kept
    assert made.truncated == (whole > length)
    cut = len(kept) <= response_length
    assert (kept[-1] == tokenizer.eos_token_id) == (not cut)  # a cut response has not ended
    assert ("cut to" in caplog.text) == (whole > length)


def test_settings_that_cannot_work_are_named(tokenizer):
    with pytest.raises(ValueError, match="max_length is 7"):
        dataset(tokenizer, max_length=7)
    dumb = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no EOS token"):
        dataset(dumb)
    with pytest.raises(ValueError, match="neither pad, unk nor EOS"):
        pad_token_id(dumb)


def test_batches_are_padded_on_the_right(tokenizer):
    made = dataset(tokenizer, [ROW, Row("Hi", "", "Ho"), Row("A longer instruction.", "", "x")])
    found = list(batches(made, Collator(pad_token_id(tokenizer)), 2))
    assert [len(batch["input_ids"]) for batch in found] == [2, 1]
    for number, batch in enumerate(found):
        for offset, (ids, mask, labels) in enumerate(
            zip(*(batch[n] for n in ("input_ids", "attention_mask", "labels")))
        ):
            row, length = made[2 * number + offset], int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert ids[:length].tolist() == row["input_ids"]
            assert (ids[length:] == tokenizer.pad_token_id).all()
            assert labels[:length].tolist() == row["labels"]
            assert (labels[length:] == -100).all()
    assert len(list(batches(made, Collator(0), 2, limit=1))) == 1


def test_bos_is_kept_by_truncation(tokenizer):
    from tokenizers.processors import TemplateProcessing

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    with_bos = type(tokenizer)(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for length in (12, 200):
        (row,) = dataset(with_bos, [Row("p" * 40, "", "r" * 9)], max_length=length)
        assert row["input_ids"][0] == 1
        assert row["input_ids"].count(1) == 1
        assert row["labels"][0] == -100
    assert pad_token_id(with_bos) == with_bos.unk_token_id


def test_llama_tokenizer():
    """Real LLaMA pieces: BOS first, EOS last, the text comes back, and prompts are cut as generation sees them."""
    folder = SHARED / "data" / "llama_tokenizer"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/llama_tokenizer")
    from transformers import LlamaTokenizer

    llama = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=True)
    for row in (Row("Name a river.", "in {France}", "The Loire."), Row("Sum", "", " 3\n4"), Row("x", "", "né à 東京")):
        (found,) = dataset(llama, [row], "alpaca")
        kept = [i for i in found["labels"] if i != -100]
        prompt = template("alpaca").render(row.instruction, row.input)
        assert found["input_ids"][: -len(kept)] == llama(prompt).input_ids
        assert found["input_ids"][0] == llama.bos_token_id
        assert kept[-1] == llama.eos_token_id
        assert llama.decode(found["input_ids"], skip_special_tokens=True) == prompt + row.output


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    line = json.dumps({"instruction": "say \u2028 this", "output": "a\u0085b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n\n" + '{"instruction": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: output is missing"):
        read_rows(str(tmp_path / "a.jsonl"))
    assert read_rows(str(tmp_path / "a.jsonl"), "skip")[0].instruction == "say \u2028 this"


@pytest.mark.parametrize(
    ("name", "raw", "reason"),
    [
        ("a.json", "[{'é'}]".encode("latin-1"), "is not UTF-8"),
        ("a.parquet", b"PAR1 no more", "cannot be read as a Parquet"),
    ],
)
def test_files_of_another_encoding_or_kind_are_named(name, raw, reason, tmp_path):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
        read_rows(str(tmp_path / name))
    with pytest.raises(ValueError, match="is a folder"):
        read_rows(str(tmp_path))
