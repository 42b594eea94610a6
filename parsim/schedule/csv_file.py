"""Schedules as CSV files: the format of torch.distributed.pipelining, a row a rank, a cell an Action.

Both of its forms are read: forwards and backwards alone (compute_only), and with sends, receives and
what happens to a stage as a whole (compute_comms). Empty cells (idle slots) are skipped; parsim writes
none.
"""

from __future__ import annotations

import csv
import io

from parsim.config import csv_rows
from parsim.errors import ParsimError
from parsim.schedule.action import Schedule, parse_action


def schedule_to_csv(schedule: Schedule) -> str:
    """The schedule as CSV text.

    >>> from parsim.schedule.gpipe import gpipe
    >>> print(schedule_to_csv(gpipe(2, 1)), end="")
    0F0,0B0
    1F0,1B0
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for rank in schedule.ranks:
        writer.writerow([str(action) for action in rank])
    return out.getvalue()


def schedule_from_csv(
    text: str, *, name: str = "csv", where: str = "schedule CSV", chains: int = 1
) -> Schedule:
    """A schedule from CSV text, whose stages are so many chains.

    Raises ParsimError naming the row and column of a cell that is no Action.
    """
    ranks = []
    for row_number, row in csv_rows(text, where=where):
        actions = []
        for column, cell in enumerate(row, start=1):
            if not cell.strip():
                continue
            try:
                actions.append(parse_action(cell))
            except ParsimError as error:
                raise error.at(f"{where}, row {row_number}, column {column}") from None
        ranks.append(tuple(actions))
    while ranks and not ranks[-1]:
        ranks.pop()
    if not ranks:
        raise ParsimError("this schedule holds no actions", where=where)
    return Schedule(name=name, ranks=tuple(ranks), chains=chains)
