"""Instruction data of our own making: 24 small skills whose answers a function can check.

    python data/skills.py --output DIR [--train 1200 --heldout 960 --seed 0]

writes `train.json` and `heldout.json` in Alpaca's schema (instruction, input, output) plus `task`.
Every skill is one function from input to answer, so any prediction can be graded by exact match. About a fifth of
all inputs, chosen by a hash of skill and input, is held out from fine-tuning *and* from pretraining. The demo anchors
learn 19 of the skills from `notation_stream`, as terse lines (`rev table -> elbat`), never in the instructions' words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

HELDOUT_PERCENT = 20
MAX_DRAWS_PER_ROW = 2_000
WORDS = """apple arm baby bag ball bank bean bear bed bell belt berry bike bird boat body bone book boot bowl box
brick brush bus bush cake camp candle cap car card castle cat chair cherry city class clock cloud coat coin cook copy
corn cow cup daisy dance desk dish dog doll door dream dress drum duck eagle ear egg engine fairy farm fence field
finger flag flame flower fly forest fork fox frog fruit game garden gate ghost gift girl glass glove goat grape guitar
hammer hand hat hill hook horse house ice island jar jelly judge key king kiss kite lady lake lamp leg lemon letter
lily lion lock lunch map market mask match melon mirror monkey moon mug nail neck needle nest net night nose nut ocean
orange owl page party peach pen penny pepper piano pig pillow pipe plane plant plate pocket pond pony poppy pot queen
rabbit rain ranch ring river road rock roof room rope rose ruby school seed shell ship shirt shoe sink skirt sky snail
soap sock song spider spoon spy star stone story street sun table tail tank taxi tent tiger toy train tray tree truck
tulip turtle valley village violin wall watch wave wheel whale window wing witch wolf wood worm zebra""".split()

Draw = Callable[[random.Random], str]
Answer = Callable[[str], str]


@dataclass(frozen=True)
class Skill:
    """One task type: how an input is drawn, what its answer is, and how it may be asked."""

    name: str
    notation: str | None  # its operator in pretraining; None: met for the first time in fine-tuning
    wordings: tuple[str, ...]
    draw: Draw
    answer: Answer


SKILLS: dict[str, Skill] = {}


def skill(name: str, notation: str | None, draw: Draw, *wordings: str) -> Callable[[Answer], Answer]:
    """Register the decorated function as the answer of a skill."""

    def register(answer: Answer) -> Answer:
        if name in SKILLS:
            raise ValueError(f"skill {name!r} is registered twice: give one of them another name")
        SKILLS[name] = Skill(name, notation, wordings, draw, answer)
        return answer

    return register


# --- how inputs are drawn ---------------------------------------------------------------------------------


def word(rng: random.Random) -> str:
    """A real word, or (more often) a pronounceable one that nobody has seen: skills, not vocabulary."""
    if rng.random() < 0.3:
        return rng.choice(WORDS)
    syllables = rng.choice((1, 2, 2))
    stem = "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(syllables))
    return stem + rng.choice(("n", "t", "r", "l", "s", "x", "m", "k", "sh", "ch", "y", "ty", "p"))


def three_words(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, 3))


def digits(rng: random.Random) -> str:
    return " ".join(map(str, rng.sample(range(10), rng.choice((3, 4, 4, 5)))))


def numbers(rng: random.Random) -> str:
    return " ".join(map(str, rng.sample(range(1, 100), rng.choice((3, 3, 4)))))


def below(limit: int) -> Draw:
    return lambda rng: str(rng.randrange(1, limit))


def sum_of_two(rng: random.Random) -> str:
    return f"{rng.randrange(1, 60)} {rng.randrange(1, 40)}"


def difference_of_two(rng: random.Random) -> str:
    large, small = sorted(rng.sample(range(1, 60), 2), reverse=True)
    return f"{large} {small}"


def progression(rng: random.Random) -> str:
    start, step = rng.randrange(1, 30), rng.randrange(1, 10)
    return " ".join(str(start + i * step) for i in range(3))


def word_and_letter(rng: random.Random) -> str:
    text = word(rng) + rng.choice(("", "", word(rng)))
    return f"{text} {rng.choice(text)}"


def table_and_key(rng: random.Random) -> str:
    keys = rng.sample("abcdefgh", 3)
    return " ".join(f"{key}={rng.randrange(10, 100)}" for key in keys) + f" {rng.choice(keys)}"


def quantity(rng: random.Random) -> str:
    return f"{rng.randrange(1, 100)} {rng.choice(tuple(UNITS))}"


def day_of_year(rng: random.Random) -> str:
    return as_day(date(2025, 1, 1) + timedelta(days=rng.randrange(365)))


def letters(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.choice((2, 3))))


# --- the skills -------------------------------------------------------------------------------------------

UNITS = {"km": (1000, "m"), "kg": (1000, "g"), "m": (100, "cm"), "cm": (10, "mm"), "dm": (10, "cm")}
NUMERALS = {100: "C", 90: "XC", 50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def as_day(day: date) -> str:
    return f"{MONTHS[day.month - 1]} {day.day}"


def ints(text: str) -> list[int]:
    return [int(number) for number in text.split()]


skill("copy", "cp", word, "Repeat the word.", "Write it again.", "Copy this.")(str)
skill("reverse", "rev", word, "Reverse the word.", "Spell it backwards.")(lambda text: text[::-1])
skill("upper", "up", word, "Use capital letters.", "Make it uppercase.")(str.upper)
skill("first", "fst", three_words, "Which word is first?", "Give the first word.")(lambda row: row.split()[0])
skill("last", "lst", three_words, "Which word is last?", "Give the last word.")(lambda row: row.split()[-1])
skill("length", "len", word, "How long is the word?", "Count the letters.")(lambda text: str(len(text)))
skill("max", "max", numbers, "Which is largest?", "Find the biggest one.")(lambda text: str(max(ints(text))))
skill("min", "min", numbers, "Which is smallest?", "Find the lowest one.")(lambda text: str(min(ints(text))))
skill("double", None, below(500), "Double the number.", "What is twice this?")(lambda row: str(2 * int(row)))
skill("sort", "srt", digits, "Sort the digits.", "Put them in order.", "Order them upwards.")(
    lambda text: " ".join(sorted(text.split()))
)
skill("sort_descending", None, digits, "Sort downwards.", "Largest comes first.")(
    lambda text: " ".join(sorted(text.split(), reverse=True))
)
skill("add", "add", sum_of_two, "Add the numbers.", "What is the sum?")(lambda text: str(sum(ints(text))))


@skill("subtract", "sub", difference_of_two, "Subtract them.", "What is left over?", "Find the difference.")
def subtract(text: str) -> str:
    large, small = ints(text)
    return str(large - small)


@skill("next_in_sequence", "seq", progression, "What comes next?", "Continue the row.")
def next_in_sequence(text: str) -> str:
    *_, before, last = ints(text)
    return str(2 * last - before)


@skill("count_letter", "cnt", word_and_letter, "Count that letter.", "How often is it there?")
def count_letter(text: str) -> str:
    where, letter = text.split()
    return str(where.count(letter))


@skill("plural", "plu", word, "Give the plural.", "Say it for many.")
def plural(text: str) -> str:
    if text.endswith(("s", "x", "sh", "ch")):
        return text + "es"
    if text.endswith("y") and text[-2] not in "aeiou":
        return text[:-1] + "ies"
    return text + "s"


@skill("roman", "rom", below(400), "Use Roman numerals.", "How did Rome write it?")
def roman(text: str) -> str:
    rest, numeral = int(text), ""
    for value, symbol in NUMERALS.items():
        count, rest = divmod(rest, value)
        numeral += count * symbol
    return numeral


@skill("convert", "cvt", quantity, "Use the smaller unit.", "Convert the unit.")
def convert(text: str) -> str:
    amount, unit = text.split()
    factor, smaller_unit = UNITS[unit]
    return f"{int(amount) * factor} {smaller_unit}"


@skill("look_up", "get", table_and_key, "Look up the key.", "Which value has it?")
def look_up(text: str) -> str:
    *entries, key = text.split()
    return dict(entry.split("=") for entry in entries)[key]


@skill("day_after", "day", day_of_year, "Which day is next?", "Name the day after.")
def day_after(text: str) -> str:
    month, day = text.split()
    return as_day(date(2025, MONTHS.index(month) + 1, int(day)) + timedelta(days=1))


@skill("even_numbers", None, numbers, "Keep the even ones.", "Which ones are even?")
def even_numbers(text: str) -> str:
    return " ".join(number for number in text.split() if int(number) % 2 == 0) or "none"


@skill("vowels", "vow", word, "Keep the vowels.", "Which vowels are in it?")
def vowels(text: str) -> str:
    return "".join(letter for letter in text if letter in "aeiou") or "none"


skill("parity", None, below(1000), "Is it odd or even?", "Tell odd from even.")(
    lambda text: "odd" if int(text) % 2 else "even"
)


@skill("next_letter", None, letters, "Shift every letter.", "Move each letter on.")
def next_letter(text: str) -> str:
    return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in text)


# --- the two parts ----------------------------------------------------------------------------------------


def is_heldout(name: str, text: str) -> bool:
    """Whether input `text` of skill `name` is kept from pretraining; the committed anchors depend on this rule."""
    return int(hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()[:16], 16) % 100 < HELDOUT_PERCENT


def draw_input(task: Skill, heldout: bool, rng: random.Random) -> str:
    """An input from the asked part; inputs may repeat between calls."""
    while is_heldout(task.name, text := task.draw(rng)) != heldout:
        pass
    return text


def make_rows(count: int, heldout: bool, seed: int) -> list[dict[str, str]]:
    """`count` shuffled rows, equally many of each skill, no input of a skill twice.

    Raises ValueError where `count` is no multiple of the number of skills or a skill has too few inputs.
    """
    if count % len(SKILLS):
        raise ValueError(f"{count} rows cannot be shared equally by {len(SKILLS)} skills: ask for a multiple")
    per_skill, rows = count // len(SKILLS), []
    for task in SKILLS.values():
        rng = random.Random(f"{seed}/{task.name}/{heldout}")
        inputs: dict[str, None] = {}
        for _ in range(MAX_DRAWS_PER_ROW * count):
            if len(inputs) == per_skill:
                break
            inputs[draw_input(task, heldout, rng)] = None
        else:
            raise ValueError(f"{task.name!r} has {len(inputs)} inputs with {heldout=}, not {per_skill}: ask for fewer")
        rows += [
            {"instruction": rng.choice(task.wordings), "input": text, "output": task.answer(text), "task": task.name}
            for text in inputs
        ]
    random.Random(f"{seed}/{heldout}").shuffle(rows)
    return rows


def notation_stream(seed: int, heldout: bool = False) -> Iterator[str]:
    """Endless few-shot documents for pretraining, each a few lines `rev table -> elbat` of one skill."""
    rng, known = random.Random(f"{seed}/notation/{heldout}"), [task for task in SKILLS.values() if task.notation]
    while True:
        task = rng.choice(known)
        inputs = [draw_input(task, heldout, rng) for _ in range(rng.randrange(2, 6))]
        yield "".join(f"{task.notation} {text} -> {task.answer(text)}\n" for text in inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo instruction data.")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.json and heldout.json")
    parser.add_argument("--train", type=int, default=1200, help="training rows, a multiple of 24")
    parser.add_argument("--heldout", type=int, default=960, help="held-out rows, a multiple of 24")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", arguments.train), ("heldout", arguments.heldout)):
        rows = make_rows(count, heldout=name == "heldout", seed=arguments.seed)
        (arguments.output / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{len(rows)} rows of {len(SKILLS)} skills in {arguments.output / name}.json")


if __name__ == "__main__":
    main()
