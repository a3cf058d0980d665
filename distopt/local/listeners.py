"""Who listens to pseudo-gradients: rounds are told one after the other, their fragments as parts."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from distopt.gradients import GradientObserver


class Ear:
    """One observer, and what it has heard of the round; `remove` ends it.

    Args:
        observer: Who listens.
        listeners: That this is one of.
    """

    def __init__(self, observer: GradientObserver, listeners: "Listeners") -> None:
        self.observer, self._listeners = observer, listeners
        self.is_listening = False

    def remove(self) -> None:
        """Tells the observer nothing any more; once is enough."""
        self._listeners.drop(self)


class Listeners:
    """See the module.

    Args:
        parameters: Of each fragment.
    """

    def __init__(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._ears: list[Ear] = []
        self._under_way: set[int] = set()  # fragments of the round that is told
        self._told: set[int] = set()  # and which of them have been

    def add(self, observer: GradientObserver) -> Ear:
        """From the next round on."""
        self._ears.append(Ear(observer, self))
        return self._ears[-1]

    def drop(self, ear: Ear) -> None:
        """See `Ear.remove`."""
        if ear in self._ears:
            self._ears.remove(ear)

    def forget(self) -> None:
        """The round is not told to its end."""
        self._under_way.clear()
        for ear in self._ears:
            ear.is_listening = False

    def state_dict(self) -> dict[str, list[int]]:
        """How far the round is told, and by number who listens to it."""
        return {
            "under_way": sorted(self._under_way),
            "told": sorted(self._told),
            "listening": [number for number, ear in enumerate(self._ears) if ear.is_listening],
        }

    def load_state_dict(self, state_dict: Mapping[str, list[int]]) -> None:
        """The round is told to its end, to those who listened then and have taken their own states back."""
        self._under_way, self._told = set(state_dict["under_way"]), set(state_dict["told"])
        for number, ear in enumerate(self._ears):
            ear.is_listening = number in state_dict["listening"]

    def wants(self, fragment: int) -> bool:
        """Before a fragment is sent: whether somebody listens. A round may begin to be told with the first."""
        if fragment == 0 and not self._under_way and self._ears:
            for ear in self._ears:
                ear.is_listening = bool(ear.observer.begin())
            if any(ear.is_listening for ear in self._ears):
                self._under_way = set(range(len(self._parameters)))
                self._told = {0}
                return True
            return False
        if fragment in self._under_way and fragment not in self._told:
            self._told.add(fragment)
            return True
        return False

    def local(self, fragment: int, deltas: Sequence[Tensor]) -> None:
        """This rank's own."""
        for ear in self._ears:
            if ear.is_listening:
                ear.observer.local(self._parameters[fragment], deltas)

    def hear(self, fragment: int) -> bool:
        """Whether somebody listens to this fragment of the round that is told."""
        return fragment in self._under_way and fragment in self._told

    def mean(self, fragment: int, means: Sequence[Tensor]) -> None:
        """Of the same fragment, over the ranks."""
        for ear in self._ears:
            if ear.is_listening:
                ear.observer.mean(self._parameters[fragment], means)

    def taken(self, fragment: int) -> None:
        """It is over with this fragment; with the last one, the round is told."""
        if not self.hear(fragment):
            return
        self._under_way.discard(fragment)
        if not self._under_way:
            for ear in list(self._ears):
                if ear.is_listening:
                    ear.is_listening = False
                    ear.observer.end()
