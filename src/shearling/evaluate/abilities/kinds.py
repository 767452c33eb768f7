"""The kinds of items. Each shows two or three solved examples in plain text, and then asks.

No word says what to do, so that base and instruct models are asked alike, in any language.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random

from shearling.evaluate.abilities.items import END, Ability, Item
from shearling.evaluate.abilities.words import (
    ADJECTIVES,
    BEGINNINGS,
    CITIES,
    COLOURS,
    ENGLISH,
    LANGUAGES,
    MONTHS,
    NAMES,
    PLACES,
    VERBS,
    Language,
)

Make = Callable[[Random, int], Item]
LENGTHS = (8, 16, 32, 64)  # sentences of filler around a number
DEPTHS = (0.0, 1 / 3, 2 / 3, 1.0)  # where among them the number stands
LINES = 6  # of a small dictionary
SHOWN = 4  # members of a list that is to be continued


def by_example(solved: Sequence[tuple[str, str]]) -> Item:
    """Pairs of a question and its answer, a line each; the last answer is asked for."""
    *shown, (question, answer) = solved
    lines = [f"{before} {after}{END}" for before, after in shown]
    return Item("".join(lines) + question, f" {answer}")


def copying(words: Sequence[str]) -> Make:
    """Four to seven words once more."""

    def make(draw: Random, number: int) -> Item:
        rows = [" ".join(draw.sample(words, n)) for n in (3, 5, 4 + number % 4)]
        return by_example([(f"{row} ->", row) for row in rows])

    return make


def looking_up(words: Sequence[str]) -> Make:
    """One line of a small dictionary, after another was looked up."""

    def make(draw: Random, number: int) -> Item:
        drawn = draw.sample(words, 2 * LINES)
        pairs = list(zip(drawn[:LINES], drawn[LINES:], strict=True))
        first, second = draw.sample(range(LINES), 2)
        lines = "".join(f"{key} = {value}{END}" for key, value in pairs)
        shown = by_example([(f"{pairs[n][0]} =", pairs[n][1]) for n in (first, second)])
        return Item(f"{lines}{END}{shown.prompt}", shown.answer)

    return make


def spelling(words: Sequence[str]) -> Make:
    """The letters of a word."""

    def make(draw: Random, number: int) -> Item:
        return by_example([(f"{word}:", "-".join(word)) for word in draw.sample(words, 3)])

    return make


def counting(words: Sequence[str]) -> Make:
    """How often a word stands in a row of words."""

    def make(draw: Random, number: int) -> Item:
        solved = []
        for times in (*draw.sample(range(1, 6), 2), 1 + number % 5):
            asked, *others = draw.sample(words, 3)
            row = [asked] * times + [draw.choice(others) for _ in range(draw.randint(1, 3))]
            draw.shuffle(row)
            solved.append((f"{' '.join(row)}; {asked}:", str(times)))
        return by_example(solved)

    return make


def continuing(series: Sequence[Sequence[str]]) -> Make:
    """The next two members of a list, such as days, after others of its kind."""

    def make(draw: Random, number: int) -> Item:
        members = series[number % len(series)]
        starts = draw.sample(range(len(members) - SHOWN - 1), 2)
        rows = [members[start : start + SHOWN + 2] for start in starts]
        return by_example([(_listed(row[:SHOWN]) + ",", _listed(row[SHOWN:])) for row in rows])

    return make


def continuing_lists(draw: Random, number: int) -> Item:
    """Of numbers with one step, of days, months and letters."""
    if number % 2:
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        return continuing([ENGLISH.days * 2, MONTHS * 2, letters])(draw, number // 2)
    solved = []
    for step in draw.sample((1, 2, 3, 5, 10, -1, -2), 3):
        start = draw.randint(20, 60)
        row = [str(start + step * n) for n in range(SHOWN + 2)]
        solved.append((_listed(row[:SHOWN]) + ",", _listed(row[SHOWN:])))
    return by_example(solved)


def sums(draw: Random, number: int) -> Item:
    """Of two numbers, of one digit or two."""
    pairs = _pairs(draw, number)
    return by_example([(f"{a} + {b} =", str(a + b)) for a, b in pairs])


def differences(draw: Random, number: int) -> Item:
    """Of two numbers, the smaller from the larger."""
    pairs = [(max(pair), min(pair)) for pair in _pairs(draw, number)]
    return by_example([(f"{a} - {b} =", str(a - b)) for a, b in pairs])


def sorting(draw: Random, number: int) -> Item:
    """Three to five words or numbers, put in order."""
    solved = []
    for length in (3, 4, 3 + number // 2 % 3):
        if number % 2:
            row = draw.sample(ENGLISH.nouns, length)
            ordered = sorted(row)
        else:
            drawn = draw.sample(range(1, 100), length)
            row, ordered = [str(n) for n in drawn], [str(n) for n in sorted(drawn)]
        solved.append((f"{' '.join(row)} ->", " ".join(ordered)))
    return by_example(solved)


def formatting(draw: Random, number: int) -> Item:
    """JSON: an object with given keys, or a list of so many items."""
    return by_example([(_records if number % 2 else _repeats)(draw) for _ in range(3)])


def finding(draw: Random, number: int) -> Item:
    """A number in filler: of each length at each depth."""
    length = LENGTHS[number % len(LENGTHS)]
    depth = DEPTHS[number // len(LENGTHS) % len(DEPTHS)]
    shown, asked = draw.sample(PLACES, 2)
    codes = [str(code) for code in draw.sample(range(1000, 10000), 2)]
    sentences = [_filler(draw) for _ in range(length)]
    sentences.insert(draw.randint(0, length), f"The code of the {shown} is {codes[0]}.")
    sentences.insert(round(depth * len(sentences)), f"The code of the {asked} is {codes[1]}.")
    questions = [(f"{place}:", code) for place, code in zip((shown, asked), codes, strict=True)]
    item = by_example(questions)
    return Item(f"{' '.join(sentences)}{END}{END}{item.prompt}", item.answer)


def programming(draw: Random, number: int) -> Item:
    """The last line of a short function, which its docstring states."""
    asked = number % len(FUNCTIONS)
    others = draw.sample([n for n in range(len(FUNCTIONS)) if n != asked], 2)
    solved = []
    for place in (*others, asked):
        name, says, body = FUNCTIONS[place]
        first, second = draw.choice(PARAMETERS)
        given = f"{first}, {second}" if "{b}" in body else first
        said = says.format(a=first, b=second)
        head = f'def {name}({given}):\n    """Return {said}."""\n    return'
        solved.append((head, body.format(a=first, b=second) + "\n"))
    item = by_example(solved)
    return Item(item.prompt, item.answer.removesuffix("\n"))


PARAMETERS = (
    ("x", "y"), ("a", "b"), ("left", "right"), ("first", "second"), ("p", "q"), ("n", "m"),
    ("value", "other"), ("this", "that"),
)  # fmt: skip
FUNCTIONS = (  # name, what the docstring says, the expression
    ("add", "{a} plus {b}", "{a} + {b}"),
    ("last", "the last element of {a}", "{a}[-1]"),
    ("multiply", "{a} times {b}", "{a} * {b}"),
    ("size", "the number of elements of {a}", "len({a})"),
    ("is_equal", "whether {a} equals {b}", "{a} == {b}"),
    ("first_element", "the first element of {a}", "{a}[0]"),
    ("subtract", "{a} minus {b}", "{a} - {b}"),
    ("largest", "the larger one of {a} and {b}", "max({a}, {b})"),
    ("total", "the sum of the elements of {a}", "sum({a})"),
    ("is_greater", "whether {a} is greater than {b}", "{a} > {b}"),
    ("absolute", "the absolute value of {a}", "abs({a})"),
    ("smallest", "the smaller one of {a} and {b}", "min({a}, {b})"),
    ("is_even", "whether {a} is even", "{a} % 2 == 0"),
    ("ordered", "the elements of {a} in order", "sorted({a})"),
    ("as_text", "{a} as text", "str({a})"),
    ("both", "whether {a} and {b} are true", "{a} and {b}"),
)


def in_language(language: Language) -> Make:
    """Copying, looking up, spelling, counting and continuing, in turns, in its words."""
    words, series = language.nouns, (language.numbers, language.days * 2)
    kinds = (copying, looking_up, spelling, counting)
    makes = (*(kind(words) for kind in kinds), continuing(series))

    def make(draw: Random, number: int) -> Item:
        return makes[number % len(makes)](draw, number // len(makes))

    return make


def _listed(members: Sequence[str]) -> str:
    return ", ".join(members)


def _pairs(draw: Random, number: int) -> list[tuple[int, int]]:
    """Four pairs of numbers; the last one's size goes with the item's number."""
    most = (9, 49, 99)[number % 3]
    pairs: list[tuple[int, int]] = []
    while len(pairs) < 4:
        pair = (draw.randint(1, most), draw.randint(1, most))
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def _records(draw: Random) -> tuple[str, str]:
    values = {
        "name": draw.choice(NAMES), "age": draw.randint(18, 80), "city": draw.choice(CITIES),
        "colour": draw.choice(COLOURS),
    }  # fmt: skip
    keys = draw.sample(list(values), 3)
    record = {key: values[key] for key in keys}
    return _listed([f"{key} {value}" for key, value in record.items()]) + " ->", json.dumps(record)


def _repeats(draw: Random) -> tuple[str, str]:
    count, word = draw.randint(2, 5), draw.choice(ENGLISH.nouns)
    return f"{count} x {word} ->", json.dumps([word] * count)


def _filler(draw: Random) -> str:
    noun, other = draw.sample(ENGLISH.nouns, 2)
    return (
        f"The {draw.choice(ADJECTIVES)} {noun} {draw.choice(VERBS)} near the "
        f"{draw.choice(ADJECTIVES)} {other}."
    )


ABILITIES = (
    Ability("copying", "A row of four to seven words once more.", copying(ENGLISH.nouns), 16),
    Ability(
        "finding",
        "A number among 8, 16, 32 or 64 sentences of filler: at the beginning, at a third, at two "
        "thirds and at the end of each.",
        finding,
        16,
    ),
    Ability("looking up", "An entry of a small dictionary.", looking_up(ENGLISH.nouns), 16),
    Ability("sums", "Of two numbers of one digit or two.", sums, 24),
    Ability("differences", "The same, the smaller number from the larger.", differences, 24),
    Ability("spelling", "The letters of a word.", spelling(ENGLISH.nouns), 16),
    Ability("sorting", "Three to five words or numbers in order.", sorting, 16),
    Ability("counting", "How often a word stands in a row of words.", counting(ENGLISH.nouns), 16),
    Ability("formatting", "JSON with given keys, or with so many items.", formatting, 16),
    Ability(
        "continuing",
        "The next two members of a list: numbers with one step, days, months, letters.",
        continuing_lists,
        16,
    ),
    Ability(
        "programming",
        "The last line of a short function with a docstring, judged by its text.",
        programming,
        16,
    ),
    *(
        Ability(
            language.name,
            f"Copying, looking up, spelling, counting and continuing in {language.name.title()} "
            "words.",
            in_language(language),
            10,
        )
        for language in LANGUAGES
    ),
)


def beginning(draw: Random, number: int) -> str:
    """Of a text that is to be written on."""
    return BEGINNINGS[number % len(BEGINNINGS)].format(
        adjective=draw.choice(ADJECTIVES),
        noun=draw.choice(ENGLISH.nouns),
        place=draw.choice(PLACES),
        name=draw.choice(NAMES),
    )
