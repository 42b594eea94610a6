"""Reading a command's JSON document, which may come from a file that anybody wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from parsim.errors import ParsimError


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A table of a document, and where it stands; its methods raise ParsimError naming a wrong key."""

    data: Mapping[str, Any]
    where: str

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._refuse(key, "a number")
        return float(value)

    def positive(self, key: str) -> float:
        """A finite number above zero."""
        value = self.number(key)
        return value if value > 0 else self._refuse(key, "a number above zero")

    def optional(self, key: str) -> float | None:
        """A finite number, or None where there is none."""
        return self.number(key) if key in self else None

    def optional_count(self, key: str) -> int | None:
        """A whole number above zero, or None where there is none."""
        if key not in self:
            return None
        value = self.number(key)
        return int(value) if value >= 1 and value == int(value) else self._refuse(key, "1, 2, 3, …")

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self.data.get(key, default)
        if not isinstance(value, str):
            self._refuse(key, "a text")
        return value

    def truth(self, key: str) -> bool:
        """A truth value."""
        value = self.data.get(key)
        if not isinstance(value, bool):
            self._refuse(key, "true or false")
        return value

    def table(self, key: str) -> Node:
        """A table inside this one."""
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            self._refuse(key, "a table")
        return Node(data=value, where=f"{self.where}: {key}")

    def tables(self, key: str) -> list[Node]:
        """A list of tables."""
        return [
            Node(data=value, where=f"{self.where}: {key}[{i}]")
            if isinstance(value, Mapping)
            else self._refuse(f"{key}[{i}]", "a table")
            for i, value in enumerate(self._list(key))
        ]

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers."""
        listed = enumerate(self._list(key))
        node = Node(data={f"{key}[{i}]": value for i, value in listed}, where=self.where)
        return [node.number(place) for place in node.data]

    def series(self, key: str) -> list[float]:
        """A list of finite numbers, one or more."""
        return self.numbers(key) or self._refuse(key, "one number or more")

    def pair(self, key: str) -> tuple[float, float]:
        """Two finite numbers."""
        found = self.numbers(key)
        return (found[0], found[1]) if len(found) == 2 else self._refuse(key, "two numbers")

    def truths(self, key: str) -> list[bool]:
        """A list of truth values; none where the key is missing."""
        values = self._list(key) if key in self else []
        node = Node(data={f"{key}[{i}]": value for i, value in enumerate(values)}, where=self.where)
        return [node.truth(place) for place in node.data]

    def texts(self, key: str) -> list[str]:
        """A list of texts; none where the key is missing."""
        values = self._list(key) if key in self else []
        node = Node(data={f"{key}[{i}]": value for i, value in enumerate(values)}, where=self.where)
        return [node.text(place) for place in node.data]

    def seconds(self, key: str) -> dict[str, float]:
        """A table of numbers, such as breakdown_s."""
        table = self.table(key)
        return {name: table.number(name) for name in table.data}

    def each(self) -> Iterator[tuple[str, Node]]:
        """The tables in this one, by name."""
        for name in self.data:
            yield name, self.table(name)

    def _list(self, key: str) -> list[Any]:
        value = self.data.get(key)
        if not isinstance(value, list):
            self._refuse(key, "a list")
        return value

    def _refuse(self, key: str, expected: str) -> NoReturn:
        raise ParsimError(
            "this document is not what parsim writes",
            where=f"{self.where}: {key}",
            got=self.data.get(key),
            expected=expected,
        )
