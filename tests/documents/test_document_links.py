"""Links between documents, and from them to files of the clone, lead somewhere."""

import document_blocks
import pytest
from document_blocks import ROOT


@pytest.mark.parametrize("page", document_blocks.pages())
def test_links_lead_somewhere(page):
    for target, anchor in document_blocks.links(page):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in document_blocks.anchors(path), f"{page}: {target}#{anchor}"
