from __future__ import annotations

import math
from pathlib import Path

import pytest

from shearling.evaluate.intervals import wilson
from shearling.judge.tally import Pair, tally
from shearling.judge.template import SYSTEM, USER, messages, read_verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "first"),
        ("Verdict: B", "second"),
        ("Verdict: tie", "tie"),
        ("Both are fine.\n\n**Verdict: B**", "second"),
        ("**Verdict:** `A`.", "first"),
        ("My verdict is: Answer B", "second"),
        ("Verdict: a tie", "tie"),
        ("Verdict: A tie.", "tie"),
        ("Verdict: A, because B is wrong.", "first"),
        ("Verdict: A is better", "first"),
        ("I first thought Verdict: A, but no.\nVerdict: B", "second"),
        ("[[B]]", "second"),
        ("It is close. [[C]]", "tie"),
        ("B", "second"),
        (" Tie.\n", "tie"),
        ("Answer A", "first"),
        ('{"reason": "short", "verdict": "B"}', "second"),
        ('```json\n{"verdict": "tie"}\n```', "tie"),
        # no verdict, or more than one: not to be guessed
        ("", None),
        ("A is good, B is better.", None),
        ("Verdict: A or B", None),
        ("Verdict: A/B", None),
        ("Verdict: A, B", None),
        ("Verdict: A and B are equal", None),
        ("Verdict: Apples", None),
        ("Verdict: neither better nor worse is", None),
        ("I cannot give a verdict.", None),
        ("Verdict: A\nOn reflection my verdict would be the other one.", None),
        ('{"verdict": 3}', None),
    ],
)
def test_reads_a_verdict_or_none(reply, verdict):
    assert read_verdict(reply) == verdict


def test_answers_stand_in_the_request_as_they_are():
    system, user = messages("say {first}", "one {second}", "two {prompt}")
    assert system == {"role": "system", "content": SYSTEM}
    text = USER.replace("{prompt}", "\0").replace("{first}", "\1").replace("{second}", "\2")
    expected = text.replace("\0", "say {first}").replace("\1", "one {second}")
    assert user["content"] == expected.replace("\2", "two {prompt}")


@pytest.mark.parametrize(
    ("a_first", "b_first", "outcome"),
    [
        ("first", "second", "win"),
        ("second", "first", "loss"),
        ("first", "first", "tie"),  # the position won, not the answer
        ("second", "second", "tie"),
        ("first", "tie", "tie"),
        ("tie", "first", "tie"),
        ("tie", "tie", "tie"),
        (None, "second", None),
        ("first", None, None),
    ],
)
def test_a_win_counts_where_both_orders_agree(a_first, b_first, outcome):
    assert Pair(a_first, b_first).outcome == outcome


def test_counts():
    found = tally(
        [
            Pair("first", "second"),
            Pair("first", "second"),
            Pair("second", "first"),
            Pair("first", "first"),
            Pair("tie", "tie"),
            Pair("first", None),
            Pair(identical=True),
        ]
    )
    assert (found.prompts, found.wins, found.ties, found.losses) == (7, 2, 3, 1)
    assert (found.unreadable, found.unreadable_verdicts, found.identical) == (1, 1, 1)
    assert found.win_rate == pytest.approx((2 + 3 / 2) / 6)
    assert found.first_preferred == pytest.approx(6 / 9)
    assert found.interval == wilson(3.5 / 6, 6)


def test_nothing_readable_is_no_rate():
    found = tally([Pair(None, None), Pair("first", None)])
    assert (found.win_rate, found.interval, found.unreadable) == (None, None, 2)
    assert found.first_preferred == 1.0


@pytest.mark.parametrize(("wins", "count"), [(0, 12), (5, 12), (12, 12), (57, 100), (1, 1)])
def test_wilson_equals_scipy(wins, count):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    theirs = stats.binomtest(wins, count).proportion_ci(method="wilson")
    assert wilson(wins / count, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("rate", "count"), [(3.5 / 6, 6), (0.5, 40), (0.925, 20)])
def test_bounds_of_wilson_are_where_the_score_test_turns(rate, count):
    z = 1.959963984540054  # the normal distribution's 0.975 quantile
    for bound in wilson(rate, count):
        assert abs(rate - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / count))


def test_the_docs_show_what_the_judge_is_asked():
    page = (Path(__file__).parents[2] / "docs" / "judging.md").read_text()
    assert f"```text\n{SYSTEM}\n```" in page
    assert f"```text\n{USER}\n```" in page
