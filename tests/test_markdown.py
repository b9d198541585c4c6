"""Tables and the part of a page between two markers."""

import pytest

from peft_variator.markdown import make_table, replace_between


BEGIN, END = "<!-- results -->", "<!-- /results -->"


def test_a_table():
    assert make_table(["", "k", "ms"], [["base", "1", "2.0"]], text_columns=2) == (
        "|  | k | ms |\n| --- | --- | ---: |\n| base | 1 | 2.0 |"
    )


def test_what_is_between_the_markers_is_replaced_and_nothing_else():
    page = f"A\n{BEGIN}\nold\n{END}\nB\n<!-- parts -->\nkept\n<!-- /parts -->\n"
    new = replace_between(page, "results", "new \\1")
    assert new == f"A\n{BEGIN}\n\nnew \\1\n\n{END}\nB\n<!-- parts -->\nkept\n<!-- /parts -->\n"
    assert replace_between(new, "results", "new \\1") == new


@pytest.mark.parametrize("page", ["", BEGIN, END + BEGIN, BEGIN + END + END, BEGIN + BEGIN + END])
def test_a_page_without_its_markers(page):
    with pytest.raises(ValueError, match="must have the lines .* once each, in this order"):
        replace_between(page, "results", "new")
