"""Items of abilities: the same each time, and every answer is right by another way to it."""

from __future__ import annotations

import calendar
import itertools
import json
import re
import string
from collections.abc import Callable, Iterator

import pytest

from shearling.evaluate.abilities.items import Item
from shearling.evaluate.abilities.kinds import ABILITIES, DEPTHS, LENGTHS
from shearling.evaluate.abilities.measure import Asking
from shearling.evaluate.abilities.words import LANGUAGES

BY_NAME = {one.name: one for one in ABILITIES}
CYCLES = [
    list(calendar.day_name) * 2, list(calendar.month_name)[1:] * 2, list(string.ascii_lowercase),
    *(list(one.numbers) for one in LANGUAGES), *(list(one.days) * 2 for one in LANGUAGES),
]  # fmt: skip
FUNCTIONS: dict[str, Callable[..., object]] = {
    r"(\w+) plus (\w+)": lambda a, b: a + b,
    r"(\w+) minus (\w+)": lambda a, b: a - b,
    r"(\w+) times (\w+)": lambda a, b: a * b,
    r"whether (\w+) equals (\w+)": lambda a, b: a == b,
    r"whether (\w+) is greater than (\w+)": lambda a, b: not a <= b,
    r"whether (\w+) is even": lambda a: not a & 1,
    r"whether (\w+) and (\w+) are true": lambda a, b: b if a else a,
    r"the larger one of (\w+) and (\w+)": lambda a, b: sorted((a, b))[1],
    r"the smaller one of (\w+) and (\w+)": lambda a, b: sorted((a, b))[0],
    r"the absolute value of (\w+)": lambda a: a if a > 0 else -a,
    r"(\w+) as text": lambda a: f"{a}",
}
OF_LISTS: dict[str, Callable[..., object]] = {
    r"the first element of (\w+)": lambda a: next(iter(a)),
    r"the last element of (\w+)": lambda a: next(reversed(a)),
    r"the number of elements of (\w+)": lambda a: sum(1 for _ in a),
    r"the sum of the elements of (\w+)": lambda a: a[0] + a[1] + a[2],
    r"the elements of (\w+) in order": lambda a: [min(a), a[2], max(a)],
}


def lines(item: Item) -> list[str]:
    return (item.prompt + item.answer).split("\n")


def right(line: str) -> bool:
    """Whether a solved line is right, by its form."""
    if match := re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line):
        first, sign, second, result = match.groups()
        return int(first) == int(result) - int(second) * (1 if sign == "+" else -1)
    if match := re.fullmatch(r"(\d) x (\w+) -> (.*)", line):
        listed = json.loads(match[3])
        return len(listed) == int(match[1]) and set(listed) == {match[2]}
    if " -> {" in line:
        asked, _, answer = line.partition(" -> ")
        record = json.loads(answer)
        return [f"{key} {value}" for key, value in record.items()] == asked.split(", ")
    if "; " in line:
        row, _, rest = line.partition("; ")
        word, _, times = rest.partition(": ")
        return len(re.findall(rf"(?<!\w){word}(?!\w)", row)) == int(times)
    if ": " in line:
        word, _, letters = line.partition(": ")
        return letters[::2] == word and set(letters[1::2]) <= {"-"}
    members = line.split(", ")
    if members[0].isdigit():
        steps = {int(b) - int(a) for a, b in itertools.pairwise(members)}
        return len(steps) == 1
    return any(members == cycle[n : n + 6] for cycle in CYCLES for n in range(len(cycle)))


@pytest.mark.parametrize(
    "name", ["sums", "differences", "spelling", "counting", "formatting", "continuing"]
)
def test_every_line_is_right(name: str) -> None:
    items = [item for seed in range(3) for item in BY_NAME[name].items(seed)]
    assert len({item.prompt for item in items}) > 0.9 * len(items)
    for item in items:
        assert len(lines(item)) >= 2
        assert all(right(line) for line in lines(item)), item


def copied(item: Item) -> bool:
    rows = [line.split(" -> ") for line in lines(item)]
    return all(before == after for before, after in rows)


def looked_up(item: Item) -> bool:
    table, _, asked = (item.prompt + item.answer).partition("\n\n")
    keys = [line.split(" = ")[0] for line in table.split("\n")]
    first, second = asked.split("\n")
    return {first, second} <= set(table.split("\n")) and first != second and len(set(keys)) == 6


def test_rows_are_copied_and_entries_looked_up() -> None:
    assert all(copied(item) for item in BY_NAME["copying"].items(1))
    assert all(looked_up(item) for item in BY_NAME["looking up"].items(1))


def test_rows_are_sorted() -> None:
    for item in BY_NAME["sorting"].items(2):
        for line in lines(item):
            before, after = (side.split(" ") for side in line.split(" -> "))

            def key(word: str) -> tuple[int, str]:
                return (len(word) * word.isdigit(), word)

            assert sorted(before, key=key) == after


def test_numbers_stand_at_their_depth_in_their_length() -> None:
    items = BY_NAME["finding"].items(0)
    places = set()
    for item in items:
        text, _, asked = (item.prompt + item.answer).partition("\n\n")
        codes = dict(re.findall(r"The code of the (\w+) is (\d+)\.", text))
        assert dict(line.split(": ") for line in asked.split("\n")) == codes
        assert len(codes) == 2
        sentences = text.split(". ")
        place = next(n for n, one in enumerate(sentences) if asked.split("\n")[1][:-4].split(":")[0]
                     in one)  # fmt: skip
        places.add((len(sentences) - 2, round(place / (len(sentences) - 1), 1)))
    assert len(items) == len(places) == len(LENGTHS) * len(DEPTHS)
    assert {length for length, _ in places} == set(LENGTHS)


def functions(item: Item) -> Iterator[tuple[list[str], str, str]]:
    """Parameters, what the docstring says, and the expression, of every function of an item."""
    for text in (item.prompt + item.answer).split("\n\n"):
        match = re.fullmatch(
            r'def \w+\(([\w, ]+)\):\n    """Return (.+)\."""\n    return (.+)', text.rstrip("\n")
        )
        assert match, text
        yield match[1].split(", "), match[2], match[3]


def test_functions_do_what_they_say() -> None:
    said = set()
    for item in BY_NAME["programming"].items(0):
        assert len(list(functions(item))) == 3
        for names, says, body in functions(item):
            both = {**FUNCTIONS, **OF_LISTS}
            pattern = next(one for one in both if re.fullmatch(one, says))
            match = re.fullmatch(pattern, says)
            assert match is not None
            assert list(match.groups()) == names
            tries = [([3, 9, 5],)] if pattern in OF_LISTS else [(-3, 8), (4, 4), (7, 0)]
            for values in tries:
                given = values[: len(names)]
                ours = eval(body, {}, dict(zip(names, given, strict=True)))
                theirs = both[pattern](*given)
                assert (ours, type(ours)) == (theirs, type(theirs))
            said.add(pattern)
    assert said == {*FUNCTIONS, *OF_LISTS}


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda one: one.name)
def test_languages(language: object) -> None:
    words = {*language.nouns, *language.numbers, *language.days}  # ty: ignore
    for number, item in enumerate(BY_NAME[language.name].items(3)):  # ty: ignore
        form = number % 5
        if form == 0:
            assert copied(item)
        elif form == 1:
            assert looked_up(item)
        else:
            assert all(right(line) for line in lines(item)), item
        used = {word for line in lines(item) for word in re.findall(r"[^\W\d_]+", line)}
        assert form == 2 or used <= words
    assert len(set(words)) == len(language.nouns) + 17  # ty: ignore
    assert len(language.nouns) >= 20  # ty: ignore


def test_an_item_follows_from_the_seed_and_its_number() -> None:
    for ability in ABILITIES:
        items = ability.items(5)
        assert items == ability.items(5)
        assert items[:2] == ability.items(5, 2)
        assert len(items) == ability.count
        assert items != ability.items(6)
        assert ability.items(5, 10**6) == items


def test_prompts_are_by_example_and_answers_of_one_line() -> None:
    for ability in ABILITIES:
        for item in ability.items(0):
            assert not item.prompt[-1].isspace()
            assert item.answer[0] == " "
            assert not item.answer[1].isspace()
            assert "\n" not in item.answer
            assert "\n" in item.prompt


def test_all_that_is_asked_stays_as_it_is() -> None:
    # Of another digest, results of two versions do not compare; then say so in the changelog.
    assert Asking().digest() == "b3262cbb40bb5f79d1f51c41a3329acfba0445ba86881af79a4d8603d1913ace"
    assert Asking(seed=1).digest() != Asking().digest() != Asking(limit=3).digest()
