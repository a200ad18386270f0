import re

import pytest

from microdit.lab.claims import ClaimResult, SeedsNeeded, Spread
from microdit.lab.study import Claim
from microdit.lab.study_report import claim_cells


def test_claims_and_arms_are_text_and_end_no_cell():
    claim = Claim("<b>a</b> | `c` is better", "a|b", "<i>")
    spread = Spread(1.0, 0.5, 3)
    says, found, _ = claim_cells(ClaimResult(claim, True, spread, spread, "p = 0.01, 3 and 3 seeds", 0.01), 0.02)
    assert says == r"&lt;b&gt;a&lt;/b&gt; \| \`c\` is better"
    assert re.findall(r"(?<!\\)[|<>]", found) == []
    assert r"a\|b 1 ± 0.5, &lt;i&gt; 1 ± 0.5; p = 0.01, 3 and 3 seeds" in found


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ({"holds": True, "chance": 0.01}, "**holds**, p = 0.03 corrected (equal FLOPs)"),
        ({"holds": False, "chance": 0.04}, "**does not hold**, p = 0.12 corrected, not clear after correction (equal FLOPs)"),
        (
            {"needed": SeedsNeeded(0.05, "seen here", 0.02, 7, 4500.0)},
            "**open**: 7 seeds for a difference of 5.0% (seen here), 1 h 15 min of training (equal FLOPs)",
        ),
        (
            {"needed": SeedsNeeded(0.002, "seen here", 0.02, 1570, 144_000.0)},
            "**not decidable at this size**: 1,570 seeds for a difference of 0.2% (seen here), 40 h 00 min of training (equal FLOPs)",
        ),
        (
            {"needed": SeedsNeeded(1e-5, "seen here", 0.02, None, None)},
            "**not decidable at this size**: a difference of 0.0% (seen here) needs over 10,000 seeds (equal FLOPs)",
        ),
        (
            {"needed": SeedsNeeded(0.3, "published", 0.02, 2, 0.0), "excluded": True},
            "**does not show**: a difference of 30.0% (published) lies outside the 95% interval (equal FLOPs)",
        ),
        ({}, "**not decidable**: an arm diverges (equal FLOPs)"),
    ],
)
def test_every_verdict_says_what_it_rests_on(outcome, words):
    result = ClaimResult(**{"claim": Claim("a", "a", "b"), "holds": None, "better": None, "worse": None, "why": "p", **outcome})
    corrected = None if result.chance is None else result.chance * 3
    assert claim_cells(result, corrected)[2] == words
