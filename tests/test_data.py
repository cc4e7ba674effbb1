"""Templates, labels, batches: what a row becomes."""

import time
from functools import cache

import pytest
from conftest import SHARED

from stitched_llama.training import (
    TEMPLATES,
    Collator,
    InstructionDataset,
    Row,
    batches,
    encode_prompt,
    end_ids,
    load_tokenizer,
    pad_token_id,
    render_chat,
    split_rows,
    template,
)

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


def test_alpaca_template_is_the_published_text(tokenizer):
    assert template("alpaca", tokenizer).render("Name a river.") == ALPACA
    assert template("alpaca", tokenizer).render("Name a river.", "in {France}") == ALPACA_INPUT
    assert template("short", tokenizer).render("Reverse", "abc") == "Reverse: abc\n> "
    assert template("short", tokenizer).render("Hi") == "Hi\n> "
    assert template("alpaca").render("Name a river.", "in {France}") == ALPACA_INPUT
    with pytest.raises(ValueError, match="'alpacca' is unknown; one of auto, chat, alpaca"):
        template("alpacca", tokenizer)
    with pytest.raises(ValueError, match="'chat' is unknown; one of alpaca, short"):
        template("chat")  # whose?


def test_a_template_in_words_is_made_for_the_tokenizer(tokenizer):
    for made in (tokenizer, with_pieces(tokenizer, "<s> $A")):
        words, bound = (
            InstructionDataset([ROW], made, given)[0] for given in (template("short"), template("short", made))
        )
        assert words == bound


def with_pieces(tokenizer, single, **how):
    """The byte tokenizer, which adds special tokens to a text as `single` says."""
    from tokenizers.processors import TemplateProcessing

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return type(tokenizer)(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **how)


CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '[sys]Be kind.[/]\n' }}{% endif %}"
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@cache
def llama_tokenizer(**how):
    folder = SHARED / "data" / "llama_tokenizer"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/llama_tokenizer")
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(str(folder), add_bos_token=True, **how)


TOKENIZERS = {
    "bytes": lambda made: with_pieces(made, "$A"),
    "BOS": lambda made: with_pieces(made, "<s> $A"),
    "BOS and EOS": lambda made: with_pieces(made, "<s> $A </s>"),
    "ChatML": lambda made: with_pieces(made, "$A", chat_template=CHATML, extra_special_tokens=["<end>"]),
    "LLaMA": lambda made: llama_tokenizer(),
    "LLaMA as of old": lambda made: llama_tokenizer(legacy=True),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", [*TEMPLATES, "chat"])
def test_a_row_that_trains_is_a_conversation_of_the_chat_template(name, kind, tokenizer):
    """Token for token: as a client that knows nothing but the saved tokenizer sees it."""
    tokenizer = TOKENIZERS[kind](tokenizer)
    if "LLaMA" in kind:
        tokenizer.chat_template = None
    if name == "chat" and not tokenizer.chat_template:
        with pytest.raises(ValueError, match="no chat template of its own: take one of alpaca, short"):
            template("chat", tokenizer)
        return
    prompt = template(name, tokenizer)
    row = Row("Name 'a'\n\"{river}\".\\n", "", "The Loire é.")
    (example,) = InstructionDataset([row], tokenizer, prompt)
    tokenizer.chat_template = prompt.chat
    turns = [{"role": "user", "content": row.instruction}, {"role": "assistant", "content": row.output}]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True).input_ids
    whole = tokenizer.apply_chat_template(turns).input_ids
    assert [i for i, label in zip(example["input_ids"], example["labels"]) if label == -100] == asked
    if whole[: len(asked)] == asked:
        assert whole[: len(example["input_ids"])] == example["input_ids"]
        assert tokenizer.decode(whole[len(example["input_ids"]) :]).strip() == ""
    else:  # a piece of a whole conversation spans the border between prompt and answer
        assert (name, kind[:5]) == ("short", "LLaMA")
        assert tokenizer.decode(whole).strip() == tokenizer.decode(example["input_ids"])
    assert (asked[0] == tokenizer.bos_token_id) == (kind not in ("bytes", "ChatML"))
    assert asked.count(tokenizer.bos_token_id) <= 1
    assert example["input_ids"][-1] in end_ids(tokenizer, None, prompt)
    more = render_chat(tokenizer, [*turns, {"role": "user", "content": "Another."}])
    assert more.startswith(render_chat(tokenizer, turns, add_generation_prompt=False))  # turns build on each other


@pytest.mark.parametrize("kind", ["LLaMA", "LLaMA as of old"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_read_as_llamas_tokenizer_reads_them_by_itself(name, kind, tokenizer):
    llama = TOKENIZERS[kind](tokenizer)
    for row in (Row("Name a river.", "in {France}", "The Loire."), Row("Sum", "", "3\n4"), Row("x", "", "né à 東京")):
        prompt = template(name, llama).render(row.instruction, row.input)
        text = TEMPLATES[name].render(row.instruction, row.input)
        assert encode_prompt(llama, prompt) == llama(text).input_ids
        (found,) = InstructionDataset([row], llama, template(name, llama))
        assert found["input_ids"][0] == llama.bos_token_id
        assert found["input_ids"][-1] == llama.eos_token_id
        assert llama.decode(found["input_ids"], skip_special_tokens=True).strip() == text + row.output


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_message_is_rendered_and_strange_roles_are_refused(name, tokenizer):
    tokenizer = with_pieces(tokenizer, "<s> $A", chat_template=template(name, tokenizer).chat)
    user = {"role": "user", "content": "Name a river."}
    text = render_chat(tokenizer, [{"role": "system", "content": "Be brief."}, user])
    assert text.startswith("Be brief.\n")
    assert text.endswith(TEMPLATES[name].render("Name a river.").removeprefix(TEMPLATES[name].preamble))
    for turns in ([user, {"role": "system", "content": "x"}], [{"role": "tool", "content": "x"}]):
        with pytest.raises(ValueError, match=f"does not take .*: the {name} template has .* no {turns[-1]['role']}"):
            render_chat(tokenizer, turns)


def test_automatic_is_the_tokenizers_own_chat_template_or_alpaca(tokenizer, tmp_path):
    assert template("auto", tokenizer).name == "alpaca"
    assert template("auto", TOKENIZERS["ChatML"](tokenizer)).name == "chat"
    for name in TEMPLATES:  # of a tokenizer that a run of ours saved: with its form for rows with an input
        for pieces in ("$A", "<s> $A"):
            saved = with_pieces(tokenizer, pieces, chat_template=template(name, with_pieces(tokenizer, pieces)).chat)
            saved.save_pretrained(tmp_path)
            assert template("auto", load_tokenizer(tmp_path)).name == template("auto", saved).name == name
            assert template("auto", saved).render("a", "b").endswith(TEMPLATES[name].render("a", "b"))


def test_an_own_chat_template_is_trained_in_its_own_format(tokenizer):
    tokenizer = TOKENIZERS["ChatML"](tokenizer)
    made = template("chat", tokenizer)
    assert made.render("Sum up.", "a text") == "[sys]Be kind.[/]\n[user]Sum up.\n\na text<end>\n[assistant]"
    assert (made.begin, made.end) == ("", "<end>")
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end_ids(tokenizer, None, made) == sorted({tokenizer.eos_token_id, end})
    config = type("Config", (), {"eos_token_id": [7, 2]})
    assert end_ids(tokenizer, config, made) == sorted({2, 7, end})
    thinks = CHATML.replace(
        "'[' + message['role'] + ']'",
        "'[' + message['role'] + ']' + ('(no thought) ' if message['role'] == 'assistant' else '')",
    )
    tokenizer.chat_template = thinks
    assert (template("chat", tokenizer).begin, template("chat", tokenizer).end) == ("(no thought) ", "<end>")
    tokenizer.chat_template = CHATML.replace("<end>", "")
    assert template("chat", tokenizer).end == "</s>"
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not continue the prompt .* take --template alpaca or short"):
        template("chat", tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] + 3 }}"
    with pytest.raises(ValueError, match="chat template does not take this conversation: .*concatenate"):
        template("chat", tokenizer)


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
    return InstructionDataset(list(rows), tokenizer, template(name, tokenizer), **options)


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


@pytest.mark.parametrize("kind", ["BOS", "BOS and EOS"])
def test_bos_is_kept_by_truncation(kind, tokenizer):
    with_bos = TOKENIZERS[kind](tokenizer)
    for length in (12, 200):
        for prompt in (40, 12 * 16 * 3):
            (row,) = dataset(with_bos, [Row("p" * prompt, "", "r" * 9)], max_length=length)
            assert row["input_ids"][0] == 1
            assert row["input_ids"].count(1) == 1
            assert row["labels"][0] == -100
            assert with_bos.decode(row["input_ids"][1:]).startswith("p")
    assert pad_token_id(with_bos) == with_bos.unk_token_id


def test_a_pad_token_beyond_the_vocabulary_is_not_taken_and_other_tokens_beyond_it_are_named(tokenizer):
    """Alpaca's old habit: `[PAD]` is added behind the vocabulary, and the embedding is not resized."""
    added = with_pieces(tokenizer, "<s> $A", pad_token="[PAD]")
    size = len(tokenizer)
    assert added.pad_token_id == size
    assert pad_token_id(added, size) == added.unk_token_id
    assert pad_token_id(added, size + 1) == size
    assert pad_token_id(type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer), 10) == 0
    dataset(added, vocab_size=size)
    with pytest.raises(
        ValueError, match=rf"row 1 of the data set has token {size} \('\[PAD\]'\), .* ends at {size - 1}"
    ):
        dataset(added, [ROW, Row("x", "", "[PAD]")], vocab_size=size)


def words(count, seed):
    import random

    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghé", k=rng.randint(1, 9))) for _ in range(count))


@pytest.mark.parametrize("kind", ["BOS", "LLaMA"])
def test_a_row_of_megabytes_is_cut_before_it_is_tokenised_to_the_same_ids(kind, tokenizer, monkeypatch):
    from stitched_llama.training import data

    made = TOKENIZERS[kind](tokenizer)
    rows = [
        Row(words(3000, 0), "", words(9, 1)),
        Row("x", "", words(3000, 2)),
        Row(words(3000, 3), words(3000, 4), "x" * 9000),
    ]
    found = [dataset(made, [row], "alpaca", max_length=64)[0] for row in rows]
    monkeypatch.setattr(data, "_CHARACTERS", 10**9)
    assert [dataset(made, [row], "alpaca", max_length=64)[0] for row in rows] == found
    monkeypatch.undo()
    start = time.time()
    huge = dataset(
        made, [Row(rows[0].instruction * 300, " " * 5_000_000 + "x", rows[1].output * 300)], "alpaca", max_length=64
    )
    assert time.time() - start < 5
    assert len(huge[0]["input_ids"]) == 64
