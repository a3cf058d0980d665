"""What documents hold that can go stale: fenced blocks, the commands in them, and links."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELL = ("", "sh", "bash", "console", "shell")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page relative to the clone, its line there, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"

    @property
    def code(self):
        """Of python what stands there; of a diff what it makes."""
        if self.language != "diff":
            return self.text
        return "\n".join(line[2:] for line in self.text.splitlines() if not line.startswith("-"))

    @property
    def commands(self):
        """One string each, without comments; a line that ends in a backslash goes on in the next one."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        bare = (re.sub(r"(^|\s)#\s.*$", "", line).removeprefix("$ ") for line in lines)
        return [" ".join(line.split()) for line in bare if line.strip()]


def pages():
    """All documents of the clone, relative to it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in names if name and (ROOT / name).exists())


def blocks(page):
    text = (ROOT / page).read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[2], re.sub(f"(?m)^{found[1]}", "", found[3]))
        for found in FENCE.finditer(text)
    ]


def links(page):
    """(path, anchor) of each link that is not to another site; the path is empty for one within the page."""
    text = FENCE.sub("", (ROOT / page).read_text())
    found = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", text)
    return [pair for pair in found if any(pair)]


def anchors(path):
    """The anchors of a document's headings, as they are made of them where it is read."""
    made = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w -]", "", plain.lower()).strip().replace(" ", "-")
        made.add(next(name for name in [anchor, *(f"{anchor}-{n}" for n in range(1, 99))] if name not in made))
    return made
