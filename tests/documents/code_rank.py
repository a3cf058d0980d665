"""What ranks run for the test of the documents' code."""

import contextlib
import io
import os


def run_page(page, blocks, context, folder):
    """Runs the blocks in a folder, one after the other; what they printed."""
    said, names, before = io.StringIO(), {}, os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said):
            exec(context.first, names)
            for block in blocks:
                names["block"] = block
                exec(context.each, names)
                for stands, smaller in context.smaller.items():
                    block = block.replace(stands, smaller)
                exec(compile(block, page, "exec"), names)
    finally:
        os.chdir(before)
        for name in ("attachment", "attached", "coded"):
            if name in names:
                names[name].detach()
    return said.getvalue()
