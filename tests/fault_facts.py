"""What a rank of `rank_job.Job` says and is told."""

import json
import time
from pathlib import Path

LONGEST_S = 150.0  # then it ends, whatever happens


class Rank:
    """Says what happens to it, a line of JSON each."""

    def __init__(self, options):
        self.options = options
        self.folder = Path(options["folder"])
        self._file = (self.folder / f"{options['label']}.jsonl").open("w", buffering=1)
        self.began = time.monotonic()

    def say(self, **event):
        self._file.write(json.dumps({"at": round(time.monotonic() - self.began, 3), **event}) + "\n")

    def is_told(self, what):
        assert time.monotonic() - self.began < LONGEST_S, "the job has taken too long"
        return (self.folder / what).exists()
