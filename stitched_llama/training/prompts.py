"""Prompt templates: rows of Alpaca's schema to text, and the same template for chats."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """How an instruction becomes a prompt; the response follows it directly and ends with EOS.

    Attributes:
        with_input, without_input: formats of `{instruction}` and `{input}`.
        chat: the same as a Jinja chat template, for `tokenizer.apply_chat_template`; several turns follow each other.
    """

    with_input: str
    without_input: str
    chat: str

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt of one row."""
        if input:
            return self.with_input.format(instruction=instruction, input=input)
        return self.without_input.format(instruction=instruction)


_TURNS = (
    "{{% for message in messages %}}{{% if message['role'] == 'user' %}}{user}"
    "{{% elif message['role'] == 'assistant' %}}{assistant}{{% endif %}}{{% endfor %}}"
)
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)

# "alpaca" is the published template of Stanford Alpaca in the form that Alpaca-LoRA trains on.
TEMPLATES = {
    "alpaca": Template(
        with_input=_ALPACA.format(", paired with an input that provides further context")
        + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        without_input=_ALPACA.format("") + "### Instruction:\n{instruction}\n\n### Response:\n",
        chat=_ALPACA.format("").replace("\n", "\\n").join(["{{ '", "' }}"])
        + _TURNS.format(
            user="{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}",
            assistant="{{ message['content'] + '\\n\\n' }}",
        ),
    ),
    "short": Template(
        with_input="{instruction}: {input}\n> ",
        without_input="{instruction}\n> ",
        chat=_TURNS.format(user="{{ message['content'] + '\\n> ' }}", assistant="{{ message['content'] + '\\n' }}"),
    ),
}


def template(name: str) -> Template:
    """A template by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r} is unknown; one of {', '.join(TEMPLATES)} is needed")
    return TEMPLATES[name]
