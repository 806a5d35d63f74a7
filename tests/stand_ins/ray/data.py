"""A pipeline of one step, run as its rows are read."""

from collections.abc import Iterator
from typing import Any

import numpy as np


def ActorPoolStrategy(size: int) -> int:
    return size


class _Pipeline:
    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def map_batches(
        self,
        actor: Any,
        fn_constructor_kwargs: dict[str, Any],
        batch_size: int,
        compute: int,
        num_cpus: float,
        num_gpus: float | None,
    ) -> "_Pipeline":
        work = actor(**fn_constructor_kwargs)
        rows = []
        for start in range(0, len(self.items), batch_size):
            names = [item["name"] for item in self.items[start : start + batch_size]]
            made = work({"name": np.array(names)})
            rows += [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]
        return _Pipeline(rows)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)


from_items = _Pipeline
