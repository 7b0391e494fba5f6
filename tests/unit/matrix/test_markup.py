"""Markdown to HTML and back, and long texts in parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclaw_matrix.markdown_html import markdown_of
from nanoclaw_matrix.markup import PART_BYTES, clean, html_of, split


@given(st.text())
def test_a_text_is_whole_when_its_parts_are_put_together(text: str) -> None:
    parts = split(text, 200)

    assert all(len(part.encode()) <= 200 for part in parts)
    assert split(text, 200) == parts
    if "```" not in text and "~~~" not in text:
        assert "".join("".join(parts).split()) == "".join(text.split())


def test_it_is_cut_between_paragraphs_else_lines_sentences_and_words() -> None:
    paragraph = "A sentence of some words. " * 5
    paragraphs = "\n\n".join([paragraph.strip()] * 3)
    assert split(paragraphs, 250) == [paragraph.strip()] * 3
    assert all(part.endswith("words.") for part in split((paragraph * 3).strip(), 264))
    assert all(part.endswith("word") for part in split(" ".join(["word"] * 200), 264))
    assert "".join(split("€" * 400, 264)) == "€" * 400


def test_a_block_of_code_that_is_cut_is_closed_and_opened_again() -> None:
    code = "\n".join(f"line_{number} = {number}" for number in range(100))

    parts = split(f"See:\n\n```python\n{code}\n```\n\nThat is all.", 400)

    assert len(parts) > 3
    assert all(part.count("```") == 2 for part in parts)
    assert all(part.startswith("```python\n") for part in parts[1:])
    assert all(f"line_{number} = {number}\n" in "\n".join(parts) for number in range(100))


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("plain & simple", None),
        ("two\nlines", None),
        ("a **b**", "<p>a <strong>b</strong></p>"),
        ("<b>not ours</b> *x*", "<p>&lt;b&gt;not ours&lt;/b&gt; <em>x</em></p>"),
        ("[x](javascript:alert(1)) *y*", "<p>[x](javascript:alert(1)) <em>y</em></p>"),
        ("![spy](https://evil.example/x.png)", '<p>!<a href="https://evil.example/x.png">spy</a></p>'),
        ("```sh\nls\n```", '<pre><code class="language-sh">ls\n</code></pre>'),
    ],
)
def test_markdown_becomes_html_that_loads_nothing(markdown: str, html: str | None) -> None:
    assert html_of(markdown) == html


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>a <strong>b</strong> <em>c</em> <del>d</del></p>", "a **b** *c* ~~d~~"),
        ("one<br/>two", "one\ntwo"),
        ("<ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>", "- a\n- b\n   1. c"),
        ('<ol start="3"><li>c</li><li>d</li></ol>', "3. c\n4. d"),
        ("<blockquote><p>q</p><p>r</p></blockquote>after", "> q\n>\n> r\n\nafter"),
        ('<pre><code class="language-py">x = "&lt;"\n  y</code></pre>', '```py\nx = "<"\n  y\n```'),
        ('<a href="https://matrix.to/#/@bot:x">Bot</a>: hi', "Bot: hi"),
        ('<a href="https://example.org">there</a>', "[there](https://example.org)"),
        ("<mx-reply><blockquote>old</blockquote></mx-reply>new", "new"),
        ("<script>x</script>a<unknown>b</unknown>", "xab"),
    ],
)
def test_html_becomes_markdown(html: str, markdown: str) -> None:
    assert markdown_of(html) == markdown


@given(st.text())
def test_any_html_becomes_some_markdown(html: str) -> None:
    assert isinstance(markdown_of(f"<blockquote><ul><li><a>{html}"), str)


def test_hostile_html_takes_no_time() -> None:
    markdown_of("<blockquote>" * 3000 + "x" * 30_000)
    markdown_of("<ul><li>" * 3000)
    html_of("[" * PART_BYTES)


def test_control_characters_are_left_out() -> None:
    assert clean("a\x00b\x1b[31mc\n\td\ud800") == "ab[31mc\n\td?"
