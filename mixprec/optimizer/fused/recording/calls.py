"""What a recorder notes of a call of torch, beside what it writes down for it.

A scalar of a program is mostly a number that some call was given: `p.mul_(1 - lr * decay)`. To find
the scalars of another step without writing all down anew, one has to know which argument each came
from, and that the number decided nothing else: `x ** n` is a square where `n` is 2. So numbers are
handed to translations as `Lifted`, which remember their place and whether anything looked at them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Lifted(float):
    """A number that was given to a call.

    Attributes:
        key: the argument's index or keyword.
        place: which tensor of the lists, for a call on lists.
        looked: whether it was compared or computed with, so that more follows from its value than
            a scalar.

    >>> number = Call().lift(3, "alpha")
    >>> float(number), number.looked, number in {2: "square"}, number.looked
    (3.0, False, False, True)
    """

    key: int | str
    place: int | None
    looked: bool = False


def _looking(name: str) -> Any:
    plain = getattr(float, name)

    def look(self: Lifted, *others: Any) -> Any:
        self.looked = True
        return plain(self, *others)

    return look


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "trunc", "round"):
    setattr(Lifted, f"__{_name}__", _looking(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Lifted, f"__{_name}__", _looking(f"__{_name}__"))
    setattr(Lifted, f"__r{_name}__", _looking(f"__r{_name}__"))
for _name in ("neg", "pos", "abs"):
    setattr(Lifted, f"__{_name}__", _looking(f"__{_name}__"))


@dataclass
class Call:
    """One call of torch that a recorder wrote down.

    Attributes:
        func: the function, as a dispatch mode is given it.
        args, kwargs, result: its very objects.
        is_view: whether it names memory anew and computes nothing.
        lifted: the numbers that it was given, 0-d tensors among them.
        sources: where each scalar that was written down for it came from, or its value if from no
            argument.
    """

    func: Any = None
    args: Any = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    is_view: bool = False
    lifted: list[Lifted] = field(default_factory=list)
    sources: list[Lifted | float] = field(default_factory=list)

    def lift(self, value: float, key: int | str, place: int | None = None) -> Lifted:
        """The value as a number that remembers where it was given."""
        number = Lifted(value)
        number.key, number.place = key, place
        self.lifted.append(number)
        return number
