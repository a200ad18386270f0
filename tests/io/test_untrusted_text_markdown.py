import re

from microdit.io.untrusted_text import block, code, plain


def test_text_in_a_line_is_neither_markup_nor_html_nor_the_end_of_a_cell():
    shown = plain("<img src=x onerror=alert(1)> | **bold** [a](b) `c` _d_ $e$ &lt;\nnext \x1b \u202e")
    assert "<" not in shown
    assert re.findall(r"(?<!\\)[|*`_\[\]$]", shown) == []
    assert shown.startswith("&lt;img")
    assert "&amp;lt; next" in shown
    assert shown.endswith(r"\\u001b \\u202e")
    assert plain("CC-BY 4.0, 12.5%") == "CC-BY 4.0, 12.5%"


def test_overlong_text_is_cut():
    assert len(plain("x" * 10**6)) < 600


def test_a_span_of_code_ends_where_it_should():
    assert code("name") == "`name`"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a`") == "`` `a` ``"
    assert code("two\nlines") == "`two lines`"


def test_a_block_of_code_ends_where_it_should():
    assert block("a: 1\n", "yaml") == "```yaml\na: 1\n```"
    shown = block("a: |\n  ```\n  # no title\n  ````", "yaml").splitlines()
    assert (shown[0], shown[-1]) == ("`````yaml", "`````")
    assert not any(line.strip() == "`````" for line in shown[1:-1])
