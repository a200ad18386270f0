"""Notebooks as pages: text as it is, code and printed text fenced, pictures in the page."""

import json

import pytest

from website.notebook_page import notebook_page


def page_of(*cells: dict) -> str:
    return notebook_page(json.dumps({"cells": list(cells), "nbformat": 4}))


def code(source: str | list[str], *outputs: dict) -> dict:
    return {"cell_type": "code", "source": source, "outputs": list(outputs)}


def test_text_stays_and_code_is_fenced():
    page = page_of({"cell_type": "markdown", "source": ["# A title\n", "with [a link](x.md)"]}, code("print(1)"))
    assert page == "# A title\nwith [a link](x.md)\n\n````python\nprint(1)\n````\n"


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ({"output_type": "stream", "text": ["one\n", "two\n"]}, "````text\none\ntwo\n````"),
        ({"output_type": "execute_result", "data": {"text/plain": "3"}}, "````text\n3\n````"),
        (
            {"output_type": "display_data", "data": {"image/jpeg": "ab\ncd\n", "text/plain": "<Image>"}},
            "![drawn by the cell above](data:image/jpeg;base64,abcd)",
        ),
    ],
)
def test_outputs_follow_their_cell(output, shown):
    assert page_of(code("f()", output)) == f"````python\nf()\n````\n\n{shown}\n"


def test_a_cell_that_printed_nothing_has_no_empty_block():
    assert page_of(code("x = 1", {"output_type": "stream", "text": "\n"})) == "````python\nx = 1\n````\n"
