"""Conversations: turns, streaming, a change of size in the middle, errors that keep the size."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, fresh
from tokenizers.processors import TemplateProcessing
from transformers import TextIteratorStreamer, pipeline

from stitched_llama import PSTConfig
from stitched_llama.cli import main
from stitched_llama.cli.chat import PAPER, Chat, converse, list_sizes
from stitched_llama.training import InstructionDataset, Row, sample_budgets, template

SETTINGS = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def chatty(tokenizer):
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    chatty.chat_template = template("short", chatty).chat
    return chatty


@pytest.fixture
def chat(stitched, chatty):
    model = stitched("unequal", pst=True)
    return Chat(model, chatty, "#2", **SETTINGS)


def answer(chat, prompt, stitch_id):
    inputs = chat.tokenizer(prompt, return_tensors="pt")
    tokens = chat.model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        stitch_id=stitch_id,
        pad_token_id=0,
        **SETTINGS,
    )
    return chat.tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_pieces_join_to_the_greedy_answer_and_turns_build_on_each_other(chat):
    pieces = list(chat.ask("hello"))
    first = answer(chat, "hello\n> ", 2)
    assert "".join(pieces) == first
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first.strip()}]
    second = "".join(chat.ask("more"))
    assert second == answer(chat, f"hello\n> {first.strip()}</s>\nmore\n> ", 2)
    assert len(chat.messages) == 4


def test_size_changes_in_the_middle(chat):
    first = "".join(chat.ask("hello")).strip()
    assert chat.resize("#4").stitch_id == 4
    assert "".join(chat.ask("more")) == answer(chat, f"hello\n> {first}</s>\nmore\n> ", 4)
    assert chat.resize("#0[0:3]").stitch_id == 0
    largest = chat.model.space.anchor_stitch(-1)
    assert chat.resize(f" {largest.params} ") == largest
    assert answer(chat, "hello\n> ", 2) != answer(chat, "hello\n> ", 4)


@pytest.mark.parametrize(
    ("size", "reason"), [("#99", "ids are 0"), ("3", "too small"), ("big", "cannot be read"), ("", "cannot be read")]
)
def test_an_error_keeps_the_size_and_the_conversation(size, reason, chat):
    list(chat.ask("hello"))
    messages = list(chat.messages)
    with pytest.raises(ValueError, match=reason):
        chat.resize(size)
    assert chat.stitch.stitch_id == 2
    assert chat.messages == messages


def test_a_failure_while_answering_reaches_the_reader(chat, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(chat.model), "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.ask("hello"))
    assert chat.messages == []


def test_paper_settings_answer_in_one_piece(chat):
    chat.settings |= PAPER
    assert PAPER == {"num_beams": 4, "do_sample": True, "top_p": 0.75}
    torch.manual_seed(0)
    (piece,) = chat.ask("hello")
    assert chat.messages[-1]["content"] == piece.strip()


def test_overflow_drops_the_oldest_turns(chat, monkeypatch):
    chat.context = 100
    seen = []
    generate = type(chat.model).generate
    monkeypatch.setattr(
        type(chat.model), "generate", lambda self, *a, **k: seen.append(k["input_ids"]) or generate(self, *a, **k)
    )
    for number in range(9):
        list(chat.ask(f"turn {number} " + "x" * 12))
    lengths = [ids.shape[1] for ids in seen]
    assert max(lengths) <= 100 - SETTINGS["max_new_tokens"]
    assert lengths[0] < lengths[1] < lengths[2]
    text = chat.tokenizer.decode(seen[-1][0])
    assert "turn 0" not in text
    assert text.startswith("turn ")
    assert "turn 8" in text
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * (len(chat.messages) // 2)


@pytest.mark.parametrize("pieces", ["<s> $A", "<s> $A </s>"], ids=["with BOS", "with BOS and EOS"])
def test_prompts_are_tokenised_as_in_training(pieces, chat, monkeypatch):
    """A tokenizer that puts BOS first, as LLaMA's does: training sees BOS, so chat must give it; EOS, where one is added, it
    does not see before the answer.
    """
    tokenizer = chat.tokenizer
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single=pieces, special_tokens=[("<s>", 1), ("</s>", 2)])
    chat.tokenizer = type(tokenizer)(tokenizer_object=backend, **tokenizer.special_tokens_map)
    row = Row("hello", "", "you")
    prompt = template("short", chat.tokenizer)
    chat.tokenizer.chat_template = prompt.chat
    (trained,) = InstructionDataset([row], chat.tokenizer, prompt)
    wanted = [token for token, label in zip(trained["input_ids"], trained["labels"]) if label == -100]
    inputs = chat._inputs([{"role": "user", "content": "hello"}])
    assert inputs["input_ids"][0].tolist() == wanted
    assert wanted[0] == 1
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    seen, generate = [], type(chat.model).generate
    monkeypatch.setattr(
        type(chat.model), "generate", lambda self, **how: seen.append(how["input_ids"]) or generate(self, **how)
    )
    sample_budgets(chat.model, chat.tokenizer, prompt, [row], ["1M"], max_new_tokens=2)
    assert [ids[0].tolist() for ids in seen] == [wanted]


def test_a_tokenizer_without_chat_template_is_refused(stitched, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)  # tests share it
    with pytest.raises(ValueError, match="no chat template"):
        Chat(stitched("unequal"), tokenizer)


def test_a_memory_budget_holds_the_conversation_too(chat, chatty):
    large = chat.model.space.anchor_stitch(-1)
    held = large.weight_bytes + 100 * large.kv_bytes_per_token
    for spare, beams, key in ((0, 1, "1[0:5]"), (-1000, 1, "0[0:3]"), (0, 2, "0[0:3]")):
        settings = SETTINGS | {"num_beams": beams}
        small = Chat(chat.model, chatty, f"{(held + spare) / 1000}kB", context=100, **settings)
        assert small.stitch.key == key
    for context in (0, 10**6):
        with pytest.raises(ValueError, match=f"context of {context} tokens is asked for: 1 to 512 is"):
            Chat(chat.model, chatty, context=context)
    with pytest.raises(ValueError, match="20 new tokens leave no room for a message in a context of 20"):
        Chat(chat.model, chatty, context=20, max_new_tokens=20)


def test_sizes_are_the_published_ones_and_the_current_one(chat):
    lines = list_sizes(chat.model, chat.stitch).splitlines()
    assert [line.split()[-1] for line in lines] == ["0[0:3]", chat.stitch.key, "1[0:5]"]
    assert [line.startswith("->") for line in lines] == [False, True, False]


def test_commands_of_the_conversation(chat, monkeypatch, capsys):
    lines = iter(["", "hello", "/sizes", "/size #4", "/size 3", "/what", "/reset", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    wanted = answer(chat, "hello\n> ", 2)
    converse(chat)
    told = capsys.readouterr().out
    assert told.startswith(wanted)
    assert "->" in told
    assert "stitch 4 (" in told
    assert "too small" in told
    assert "unknown command /what" in told
    assert "forgotten" in told
    assert chat.stitch.stitch_id == 4
    assert chat.messages == []
    assert next(lines) == "never read"


# ---- what goes wrong in a conversation is one line


def interrupt():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_an_interrupt_ends_the_answer_and_its_thread_and_the_conversation_goes_on(chat, monkeypatch, capsys):
    chat.settings["max_new_tokens"] = 100
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    put, seen, threads = TextIteratorStreamer.put, [], threading.active_count()

    def interrupted(self, value):
        put(self, value)
        seen.append(value)
        if len(seen) == 20:
            interrupt()
        elif 20 < len(seen) < 100 and len(chat.messages) == 0:
            time.sleep(0.1)  # the main thread may take its time on a busy machine

    monkeypatch.setattr(TextIteratorStreamer, "put", interrupted)
    lines = iter(["hello", "more", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    try:
        converse(chat)
    finally:
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() == threads
    assert " [interrupted]" in capsys.readouterr().out
    assert [message["content"] for message in chat.messages[::2]] == ["hello", "more"]
    assert 0 < len(chat.messages[1]["content"]) < len(answer(chat, "hello\n> ", 2) * 50)
    assert 20 <= len(seen) - 101 < 100, "the second answer is whole, the first was cut after the interrupt"


def test_an_answer_that_is_not_read_on_ends_its_thread(chat):
    chat.settings["max_new_tokens"], threads = 100, threading.active_count()
    with contextlib.closing(chat.ask("hello")) as pieces:
        next(pieces)
    assert threading.active_count() == threads
    assert len(chat.messages) == 2


@pytest.mark.parametrize("content", ["half \ud83e", "\udcff"])
def test_undecodable_input_is_one_line_and_the_conversation_goes_on(content, chat, monkeypatch, capsys):
    def read(prompt="", lines=iter([content, None, "hello", "/quit"])):
        line = next(lines)
        if line is None:
            b"\xff".decode()
        return line

    monkeypatch.setattr("builtins.input", read)
    converse(chat)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "the message is no UTF-8 text: send it again in UTF-8"
    assert told[1].startswith("the line is no UTF-8 text")
    assert len(chat.messages) == 2


def test_errors_of_a_template_and_of_memory_are_one_line(chat, monkeypatch, capsys):
    good = chat.tokenizer.chat_template
    templates = {
        "broken": "{% for message in messages %}", "alternate": "{{ raise_exception('roles\nmust alternate') }}",
        "type": "{{ messages[0]['content'] + 3 }}", "good": good,
    }  # fmt: skip

    def read(prompt="", names=iter([*templates, "/quit"])):
        name = next(names)
        chat.tokenizer.chat_template = templates.get(name, good)
        return name

    monkeypatch.setattr("builtins.input", read)
    converse(chat)
    told = capsys.readouterr().out.splitlines()
    assert [line.startswith("the chat template does not take this conversation: ") for line in told[:3]] == [True] * 3
    assert "roles" in told[1]
    assert len(chat.messages) == 2

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory\nleft")

    monkeypatch.setattr(type(chat.model), "generate", fail)
    lines = iter(["hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    converse(chat)
    assert capsys.readouterr().out == "OutOfMemoryError: no memory\n"


def test_tokens_beyond_the_vocabulary_are_named(chat, chatty):
    chatty.add_tokens(["[more]"])
    chat.tokenizer = chatty
    with pytest.raises(ValueError, match=r"token 260 \('\[more\]'\) is beyond the model's vocabulary of 260"):
        list(chat.ask("no [more]"))
    assert chat.messages == []
    assert len(list(chat.ask("no more"))) > 0


def test_every_end_token_ends_an_answer(chat, monkeypatch):
    seen, generate = [], type(chat.model).generate
    monkeypatch.setattr(type(chat.model), "generate", lambda self, **how: seen.append(how) or generate(self, **how))
    list(chat.ask("hello"))
    first = chat.tokenizer(chat.messages[-1]["content"]).input_ids[0]
    monkeypatch.setattr(chat.model.generation_config, "eos_token_id", [2, first])
    chat.reset()
    assert "".join(chat.ask("hello")).strip() in ("", chat.tokenizer.decode([first]))
    assert [sorted(how["eos_token_id"]) for how in seen] == [[2], sorted({2, first})]


def test_a_system_message_is_seen_and_never_dropped(stitched, chatty):
    chat = Chat(stitched("unequal", pst=True), chatty, "#2", context=100, system="Be brief.", **SETTINGS)
    for number in range(6):
        list(chat.ask(f"turn {number} " + "x" * 12))
    text = chat.tokenizer.decode(chat._inputs([*chat.messages, {"role": "user", "content": "y"}])["input_ids"][0])
    assert text.startswith("Be brief.\nturn ")
    assert "turn 0" not in text
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_tokenizer_that_cannot_be_read_is_one_line(anchors, chatty, tmp_path, capsys):
    fresh(anchors["unequal"]).save_pretrained(tmp_path)
    chatty.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    assert main(["chat", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stitched-llama:")]
    assert f"the tokenizer of {tmp_path} cannot be read" in line


def test_a_pipeline_asks_what_the_chat_asks(chat):
    """With a tokenizer that puts BOS first by itself: its chat template says so, and a client adds none."""
    backend = type(chat.tokenizer.backend_tokenizer).from_str(chat.tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    chat.tokenizer = type(chat.tokenizer)(tokenizer_object=backend, **chat.tokenizer.special_tokens_map)
    chat.tokenizer.chat_template = template("alpaca", chat.tokenizer).chat
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    ask = pipeline("text-generation", model=chat.model, tokenizer=chat.tokenizer)
    found = ask(asked, stitch_id=2, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]["content"]
    chat.messages = asked[:1]
    assert found == "".join(chat.ask("hello"))
    assert chat._inputs(asked)["input_ids"][0, 0] == 1


def test_a_session_of_its_own_survives_bytes_and_interrupts(anchors, chatty, tmp_path):
    """As a terminal does it: a torch thread that is alive as Python ends would abort the process."""
    fresh(anchors["unequal"], PSTConfig(rank=2)).save_pretrained(tmp_path)
    chatty.save_pretrained(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "stitched_llama", "chat", tmp_path, "--max-new-tokens", "400", "--stitch-id", "2"]
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    how["preexec_fn"] = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # ignored where the tests run in the background
    with subprocess.Popen(command, cwd=ROOT, env=environment, **how) as run:
        assert b"stitch 2" in run.stdout.readline()
        run.stdin.write(b"\xff\xfe\nhello\n")
        run.stdin.flush()
        assert b"no UTF-8 text" in run.stdout.readline()
        assert run.stdout.read(1)
        run.send_signal(signal.SIGINT)
        told, error = run.communicate(b"/size #4\nmore\n/quit\n", timeout=300)
    assert run.returncode == 0, error
    assert b"[interrupted]" in told
    assert b"stitch 4 (" in told


def test_end_of_input_ends_the_conversation(chat, monkeypatch):
    def end(prompt=""):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert converse(chat) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "stitch 5 (1[0:5])"),
        (["--stitch-id", "2"], "stitch 2 ("),
        (["--budget", "1B"], "stitch 5 ("),
        (["--paper", "--stitch-id", "0"], "stitch 0 ("),
        (["--temperature", "0.7", "--top-p", "0.9"], "stitch 5 ("),
    ],
)
def test_command_line(options, told, anchors, chatty, tmp_path, monkeypatch, capsys):
    fresh(anchors["unequal"], PSTConfig(rank=2)).save_pretrained(tmp_path)
    chatty.save_pretrained(tmp_path)
    lines = iter(["hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", str(tmp_path), "--max-new-tokens", "4", *options]) == 0
    shown = capsys.readouterr().out
    assert told in shown.splitlines()[0]
    assert len(shown.splitlines()) >= 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budget", "3"], "too small"),
        (["--budget", "1B", "--stitch-id", "1"], "both given"),
        (["--stitch-id", "77"], "ids are 0"),
    ],
)
def test_command_line_errors_are_one_line(options, told, anchors, chatty, tmp_path, capsys):
    fresh(anchors["unequal"]).save_pretrained(tmp_path)
    chatty.save_pretrained(tmp_path)
    assert main(["chat", str(tmp_path), *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stitched-llama:")]
    assert len(error) == 1
    assert told in error[0]
