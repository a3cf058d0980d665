"""The python in documents runs, and what else stands there in a format that can be read is right."""

import json
import tomllib

import code_rank
import document_blocks
import pytest
from code_contexts import CONTEXTS, Context, Elsewhere
from document_blocks import ROOT

BLOCKS = [block for page in document_blocks.pages() for block in document_blocks.blocks(page)]
PYTHON = ("python", "py", "diff")
PAGES = sorted({block.page for block in BLOCKS if block.language in PYTHON})


def code_of(page):
    """Its blocks, each behind as many empty lines as stand before it: a traceback then names the line of the page."""
    found = [block for block in BLOCKS if block.page == page and block.language in PYTHON]
    return ["\n" * block.line + block.code for block in found]


def test_every_page_with_code_says_what_it_needs_to_run():
    assert sorted(CONTEXTS) == PAGES, "say in tests/documents/code_contexts.py what the code of the page needs to run"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_of_a_page_is_so(page):
    said = CONTEXTS[page]
    if isinstance(said, Elsewhere):
        for test in said.tests:
            path, name = test.split("::")
            assert f"def {name}(" in (ROOT / path).read_text(), test
    else:
        assert all(any(stands in code for code in code_of(page)) for stands in said.smaller)


def test_only_known_languages_are_shown():
    known = (*document_blocks.SHELL, *PYTHON, "toml", "json", "csv", "text")
    assert {block.language for block in BLOCKS} <= set(known)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("toml", "json")], ids=str)
def test_toml_and_json_can_be_read(block):
    {"toml": tomllib.loads, "json": json.loads}[block.language](block.text)


@pytest.mark.job
@pytest.mark.parametrize("page", [page for page in PAGES if isinstance(CONTEXTS.get(page), Context)])
def test_the_code_of_a_page_runs(page, ranks, tmp_path):
    ranks(3)(code_rank.run_page, page, code_of(page), CONTEXTS[page], tmp_path)
