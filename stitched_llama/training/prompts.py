"""Prompt templates: a row as text, and the equivalent chat template.

Special tokens are part of the text and none are added by the tokenizer, which is Transformers' convention for chat templates. So a
training row, `tokenizer.apply_chat_template` and a text pipeline give the same token ids.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from stitched_llama.space import first_line


@dataclass(frozen=True)
class Template:
    """A prompt template bound to one tokenizer: the prompt, then the response.

    Attributes:
        name: of `TEMPLATES`, or `"chat"` for the tokenizer's own.
        render: (instruction, input) -> the prompt, including special tokens that the tokenizer would add in front.
        start: the token ids that every prompt begins with: BOS if the tokenizer adds one, else none.
        begin, end: text before and after a response in a conversation; `end` ends with a special token.
        chat: a Jinja chat template that renders a conversation of one turn as this prompt and response.
    """

    name: str
    render: Callable[..., str]
    start: list[int]
    begin: str
    end: str
    chat: Any


@dataclass(frozen=True)
class TextTemplate:
    """A prompt template as format strings of `{instruction}` and `{input}`, not bound to a tokenizer.

    Attributes:
        name: of `TEMPLATES`.
        preamble: beginning of a conversation; a system message replaces it.
        turn: a user turn, with `{instruction}`.
        asks: text before each response.
        gap: text between a response and the next turn.
        preamble_with_input, turn_with_input: the same for rows with an input.
    """

    name: str
    preamble: str
    turn: str
    asks: str
    gap: str
    preamble_with_input: str
    turn_with_input: str

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt of one row, without special tokens."""
        if input:
            turn = self.turn_with_input.format(instruction=instruction, input=input)
            return self.preamble_with_input + turn + self.asks
        return self.preamble + self.turn.format(instruction=instruction) + self.asks

    def of(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template for one tokenizer.

        Raises:
            ValueError: the tokenizer has no EOS.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, so a model could not learn to stop: set tokenizer.eos_token"
            )
        start = _start_text(tokenizer)

        def render(instruction: str, input: str = "") -> str:
            return start + self.render(instruction, input)

        return Template(self.name, render, start_ids(tokenizer), "", tokenizer.eos_token, self.chat(tokenizer))

    def chat(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The Jinja chat template."""
        start, bos_token = _start_text(tokenizer), tokenizer.bos_token
        if bos_token and start.startswith(bos_token):
            start = "{{ bos_token }}" + start.removeprefix(bos_token)
        before, after = self.turn.split("{instruction}")
        user = " + ".join([json.dumps(before), "message['content']", json.dumps(after)])
        strange = json.dumps(f"the {self.name} template has a system message first, then user and assistant, no ")
        gap = json.dumps(self.gap)
        return (
            f"{start}{{% if messages[0]['role'] == 'system' %}}"
            f"{{{{ messages[0]['content'] + {gap} }}}}{{% set turns = messages[1:] %}}"
            f"{{% else %}}{{{{ {json.dumps(self.preamble)} }}}}{{% set turns = messages %}}{{% endif %}}"
            "{% for message in turns %}"
            f"{{% if message['role'] == 'user' %}}{{{{ {user} }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ {json.dumps(self.asks)} + message['content'] + eos_token + {gap} }}}}"
            f"{{% else %}}{{{{ raise_exception({strange} + message['role']) }}}}{{% endif %}}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {json.dumps(self.asks)} }}}}{{% endif %}}"
        )


_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)

# "alpaca" is the published template of Stanford Alpaca in the form that Alpaca-LoRA trains on.
TEMPLATES = {
    "alpaca": TextTemplate(
        name="alpaca",
        preamble=_ALPACA.format(""),
        turn="### Instruction:\n{instruction}\n\n",
        asks="### Response:\n",
        gap="\n\n",
        preamble_with_input=_ALPACA.format(", paired with an input that provides further context"),
        turn_with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n",
    ),
    "short": TextTemplate(
        name="short",
        preamble="",
        turn="{instruction}\n",
        asks="> ",
        gap="\n",
        preamble_with_input="",
        turn_with_input="{instruction}: {input}\n",
    ),
}


def template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Template | TextTemplate:
    """A template by name: bound to `tokenizer` if given, else a `TextTemplate`, which `InstructionDataset` binds to its tokenizer.

    Args:
        name: of `TEMPLATES`; `"chat"` is the tokenizer's own chat template, with an input after its instruction and an empty
            line; `"auto"` is `"chat"` if the tokenizer has a chat template, else `"alpaca"`.

    Raises:
        ValueError: there is none of that name, the tokenizer has no EOS, or its chat template cannot be trained on.
    """
    if tokenizer is not None and name == "auto":
        name = _automatic(tokenizer)
    if tokenizer is not None and name == "chat":
        return _own_chat(tokenizer)
    if name not in TEMPLATES:
        names = f"{'' if tokenizer is None else 'auto, chat, '}{', '.join(TEMPLATES)}"
        raise ValueError(f"template {name!r} is unknown; one of {names} is needed")
    return TEMPLATES[name] if tokenizer is None else TEMPLATES[name].of(tokenizer)


def _automatic(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    if not own:
        return "alpaca"
    # a chat template written by `template` is recognised, as that template has a format of its own for inputs
    return next((name for name, text in TEMPLATES.items() if text.chat(tokenizer) == own), "chat")


def _own_chat(tokenizer: PreTrainedTokenizerBase) -> Template:
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer has no chat template of its own: take one of {', '.join(TEMPLATES)}")

    def render(instruction: str, input: str = "") -> str:
        content = f"{instruction}\n\n{input}" if input else instruction
        return render_chat(tokenizer, [{"role": "user", "content": content}])

    asked, answer = "Name a river.", "The Loire."
    prompt = render(asked)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    whole = render_chat(tokenizer, turns, add_generation_prompt=False)
    begin, found, end = whole.removeprefix(prompt).partition(answer)
    if not whole.startswith(prompt) or not found:
        raise ValueError(
            f"the tokenizer's chat template does not continue the prompt {prompt!r} by the answer, it gives {whole!r}: "
            f"take --template {' or '.join(TEMPLATES)}"
        )
    end = end.rstrip()
    if not encode_prompt(tokenizer, end)[-1:] or encode_prompt(tokenizer, end)[-1] not in _special_ids(tokenizer):
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "neither the chat template nor the tokenizer has a token that ends: set tokenizer.eos_token"
            )
        end += tokenizer.eos_token
    start = start_ids(tokenizer)
    start = start if encode_prompt(tokenizer, prompt)[: len(start)] == start else []
    return Template("chat", render, start, begin, end, tokenizer.chat_template)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """A conversation as text.

    Raises:
        ValueError: the chat template cannot render it.
    """
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a chat template may raise anything
        raise ValueError(f"the chat template does not take this conversation: {first_line(error)}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text that contains its special tokens; none are added."""
    return tokenizer(prompt, add_special_tokens=False).input_ids


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of special tokens that the tokenizer adds in front of a text: BOS, or none."""
    plain, full = encode_prompt(tokenizer, _PROBE), tokenizer(_PROBE).input_ids
    starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    return full[: starts[0]] if starts else []


def _start_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """`start_ids` as text; with a trailing space where the tokenizer would otherwise encode the first word after them differently
    (SentencePiece)."""
    ids = start_ids(tokenizer)
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    wanted = ids + encode_prompt(tokenizer, _PROBE)
    spaced = text + " "
    return (
        spaced
        if encode_prompt(tokenizer, text + _PROBE) != wanted == encode_prompt(tokenizer, spaced + _PROBE)
        else text
    )


_PROBE = "Below is"


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def end_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any = None, prompt: Template | None = None
) -> list[int]:
    """Token ids that end a response: those of the generation config, the tokenizer's EOS and the template's end token."""
    configured = getattr(generation_config, "eos_token_id", None)
    found = {*(configured if isinstance(configured, list | tuple) else [configured]), tokenizer.eos_token_id}
    if prompt is not None:
        found.add(encode_prompt(tokenizer, prompt.end)[-1])
    return sorted(found - {None})
