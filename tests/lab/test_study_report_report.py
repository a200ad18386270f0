import re

from microdit.lab.study import Claim
from microdit.lab.study_report import ClaimResult, Spread, claim_cells


def test_claims_and_arms_are_text_and_end_no_cell():
    claim = Claim("<b>a</b> | `c` is better", "a|b", "<i>")
    spread = Spread(1.0, 0.5, 3)
    says, found, _ = claim_cells(ClaimResult(claim, True, spread, spread, "p = 0.01, 3 and 3 seeds"))
    assert says == r"&lt;b&gt;a&lt;/b&gt; \| \`c\` is better"
    assert re.findall(r"(?<!\\)[|<>]", found) == []
    assert r"a\|b 1 ± 0.5, &lt;i&gt; 1 ± 0.5; p = 0.01, 3 and 3 seeds" in found
