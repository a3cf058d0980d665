"""The meetings that are held at a rank's board.

Whoever wants another crew posts there, and is told the crew when the meeting ends. Meanwhile the rank calls those who
are missing: members of its own crew and of the crews that others come from. Of those, it waits

* not at all for whoever has said goodbye, or whose board refuses connections: that process has ended;
* at most `patience_s` for a rank whose board answers: it comes as soon as it is through with an exchange;
* at most `grace_s` for one whose board does not answer, because the process is stopped or the network cut, and for one
  that another has waited for in an exchange for `patience_s` already.

Who comes late is called to the next meeting by his own: the crew takes him in again.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from distopt.comm.crew.board import GoneError, Line, ask_all
from distopt.comm.crew.roster import Roster

_log = logging.getLogger("distopt")
_POLL_S = 0.05
_CALL_S = 0.5  # between two calls of those who are missing
_LOOK_S = 1.0  # between two looks for lower ranks
_HOLD_S = 1.0  # between two signs of life to those who wait


class _Window:
    """One meeting: posts by number, then the crew that has come of it.

    Attributes:
        number: Of the meeting, counted by this rank.
        posts: What each has said.
        began: When the first came; 0.0 before.
        outcome: What all of them are told.
        values: What members of the crew lay down for each other.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.posts: dict[int, Any] = {}
        self.began = 0.0
        self.outcome: dict[str, Any] | None = None
        self.values: dict[str, Any] = {}


class Meetings:
    """Answers what is asked at this rank's board, and leads the meetings there in a thread of its own.

    Args:
        roster: Of this rank.
        secret: The job's, if it has one.
        patience_s: See the module.
        grace_s: See the module.
    """

    def __init__(self, roster: Roster, secret: bytes | None, *, patience_s: float, grace_s: float) -> None:
        self._roster, self._secret = roster, secret
        self._patience_s, self._grace_s = patience_s, grace_s
        self._news = threading.Condition()
        self._window = _Window(0)
        self._past: dict[int, _Window] = {}
        self._called_at = 0.0
        self._states: dict[int, str] = {}  # of those who are missing: "gone", "silent" or "there"
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="distopt-crew-meetings", daemon=True)
        self._thread.start()

    # -- questions ---------------------------------------------------------------------------------------------------

    def answer(self, question: Any, line: Line) -> Any:
        """See `Board`."""
        kind = question["kind"]
        if kind == "hello":
            return {**self._roster.told(), "facts": self._roster.facts}
        if question["job"] != self._roster.job:
            return None
        if kind == "call":
            self._roster.called.set()
            return True
        if kind == "left":
            self._roster.learn(left=[int(question["number"])])
            return True
        if kind == "post":
            return self._post(question, line)
        if kind == "put":
            return self._put(int(question["window"]), question["values"], question["forget"])
        if kind == "get":
            within_s = min(float(question["within_s"]), self._patience_s)
            return self._get(int(question["window"]), [str(key) for key in question["keys"]], within_s, line)
        return None

    def _post(self, said: Any, line: Line) -> Any:
        post = _understood(said)
        self._roster.learn(said["known"], said["left"])
        with self._news:
            window = self._window
            number = post["number"]
            if self._is_taken(number, post["address"]):
                number = 1 + max([*self._roster.known, *self._roster.left, *window.posts])
            window.posts[number] = post
            window.began = window.began or time.monotonic()
            self._roster.learn({number: post["address"]})
            self._roster.called.set()
            self._news.notify_all()
            while window.outcome is None:
                self._news.wait(_HOLD_S)
                if not line.hold():
                    if window.posts.get(number) is post:  # he may have come again meanwhile
                        del window.posts[number]
                    if not window.posts and window.outcome is None:
                        window.began = 0.0
                    return None
            return {**window.outcome, "you": number}

    def _is_taken(self, number: int, address: Any) -> bool:
        """Whether another has this number: ranks without one ask for -1."""
        known = self._roster.known.get(number)
        return number < 0 or number in self._roster.left or (known is not None and known != address)

    def _put(self, number: int, values: Mapping[str, Any], forget: str | None) -> bool:
        with self._news:
            if number in self._past:
                self._past[number].values.update(values)
                if forget is not None:
                    self._past[number].values.pop(forget, None)
                self._news.notify_all()
                return True
            return False

    def _get(self, number: int, keys: list[str], within_s: float, line: Line) -> Any:
        """All that was laid down beside these keys, once they are there: most likely it is asked for next."""
        beside = {key.rpartition("/")[0] for key in keys}
        with self._news:
            end = time.monotonic() + within_s
            while (window := self._past.get(number)) is not None and time.monotonic() < end:
                if all(key in window.values for key in keys):
                    found = {key: value for key, value in window.values.items() if key.rpartition("/")[0] in beside}
                    return {"values": found}
                if self._window.began or self._window.number > number + 1:
                    break
                self._news.wait(_HOLD_S)
                if not line.hold():
                    return None
            return {"void": True}

    # -- this rank's own part ----------------------------------------------------------------------------------------

    def send_elsewhere(self) -> None:
        """This rank attends a meeting at another's board: nobody is to wait here."""
        with self._news:
            if self._window.began:
                self._end({"elsewhere": True})

    def close(self) -> None:
        """Ends the thread, and the meeting if there is one."""
        with self._news:
            self._closing = True
            self._end({"elsewhere": True})
        self._thread.join()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            with self._news:
                self._news.wait(_POLL_S if self._window.began else _LOOK_S)
                if self._closing:
                    return
                window = self._window
            if window.began:
                self._lead(window)
            elif time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                self._look_for_lower()

    def _lead(self, window: _Window) -> None:
        roster = self._roster
        with self._news:
            posts = dict(window.posts)
        if not posts:
            return
        expected = set(roster.members).union(*(post["members"] for post in posts.values()))
        missing = expected - set(posts) - roster.left
        now = time.monotonic()
        if missing and now - self._called_at > _CALL_S:
            self._called_at = now
            self._call(missing)
            if any(self._states.get(number) == "there" for number in missing if number < roster.number):
                self.send_elsewhere()  # meetings are held at the board of the lowest that answers
                return
        accused = {number for post in posts.values() for number in post["silent"]}
        waited = now - window.began
        waiting = [
            number
            for number in missing
            if (state := self._states.get(number, "there")) != "gone"
            and waited < (self._patience_s if state == "there" and number not in accused else self._grace_s)
        ]
        # A moment for those that nobody expects: the other part of a network, or somebody new.
        if not waiting and waited > 2 * _POLL_S:
            with self._news:
                if window is self._window and window.posts.keys() == posts.keys():
                    self._end(self._crew(posts))

    def _call(self, missing: set[int]) -> None:
        known = self._roster.known
        places = {number: known[number] for number in missing if number in known and number != self._roster.number}
        if self._roster.number in missing:
            self._roster.called.set()
        for number, said in ask_all(places, self._question("call"), self._secret).items():
            self._states[number] = "gone" if isinstance(said, GoneError) else "there" if said is True else "silent"

    def _crew(self, posts: Mapping[int, Any]) -> dict[str, Any]:
        return {
            "window": self._window.number,
            "members": sorted(posts),
            "rounds": {str(number): [post["from"], post["round"]] for number, post in posts.items()},
            "states": {str(number): post["state"] for number, post in posts.items()},
            "new": sorted(number for number, post in posts.items() if post["new"]),
            "known": self._roster.told()["known"],
            "left": sorted(self._roster.left),
        }

    def _end(self, outcome: dict[str, Any]) -> None:
        """With the condition's lock: tells all who have come, and opens the next meeting."""
        self._window.outcome = outcome
        number = self._window.number
        self._past = {each: window for each, window in self._past.items() if each >= number - 1}
        self._past[number] = self._window
        self._window = _Window(number + 1)
        self._states.clear()
        self._called_at = 0.0
        self._news.notify_all()

    def _look_for_lower(self) -> None:
        """The crew of a lead that is not the lowest known rank may be one of several: it looks for the others."""
        roster = self._roster
        if roster.lead != roster.number:
            return
        lower = {number: place for number, place in roster.known.items() if number < roster.number}
        found = ask_all(lower, self._question("hello"), self._secret).values()
        if any(isinstance(each, dict) and each["job"] == roster.job for each in found) and roster.lead == roster.number:
            _log.info("ranks: rank %d has found ranks that its crew had lost", roster.number)
            roster.called.set()
            self._call(set(roster.members))

    def _question(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "job": self._roster.job}


def _understood(said: Any) -> dict[str, Any]:
    """What a post says, checked here: the thread that leads meetings relies on it."""
    host, port = said["address"]
    came_from = said["from"]
    return {
        "number": int(said["number"]),
        "address": (str(host), int(port)),
        "round": int(said["round"]),
        "new": bool(said["new"]),
        "state": said.get("state"),
        "members": [int(number) for number in said["members"]],
        "silent": [int(number) for number in said["silent"]],
        "from": None if came_from is None else [int(part) for part in came_from],
    }


def say_goodbye(roster: Roster, secret: bytes | None) -> None:
    """Tells the lead and the two lowest others, so that it is known also when one of them dies."""
    known = roster.known
    others = [number for number in sorted(known) if number != roster.number and number in roster.members]
    told = {*others[:2], *(each for each in others if each == roster.lead)}
    question = {"kind": "left", "job": roster.job, "number": roster.number}
    ask_all({number: known[number] for number in told}, question, secret)
