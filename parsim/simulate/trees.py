"""Double binary trees over ranks 0 to n − 1: who passes data on to whom.

Source: P. Sanders, J. Speck and J. L. Träff, "Two-tree algorithms for full bandwidth broadcast,
reduction and scan", Parallel Computing 35, 2009; the numbering is that of NCCL's trees.
"""

from __future__ import annotations


def binary_tree(n: int) -> list[int]:
    """The parent of every rank, -1 at the root 0: odd ranks are leaves, ceil(log2 n) links high.

    A rank's parent clears its lowest set bit and sets the next one, or only clears it beyond the end.

    >>> binary_tree(6)
    [-1, 2, 4, 2, 0, 4]
    """
    parents = [-1]
    for rank in range(1, n):
        bit = rank & -rank
        above = (rank ^ bit) | bit << 1
        parents.append(above if above < n else rank ^ bit)
    return parents


def double_tree(n: int) -> tuple[list[int], list[int]]:
    """Two trees that each carry half of the data: a rank has children in one of them at most.

    The second is the first in a mirror, or shifted by one where n is odd (then rank 0 has one in both).

    >>> double_tree(4)
    ([-1, 2, 0, 2], [1, 3, 1, -1])
    """
    first = binary_tree(n)

    def moved(rank: int) -> int:
        return (rank + 1) % n if n % 2 else n - 1 - rank

    second = [-1] * n
    for rank, parent in enumerate(first):
        if parent >= 0:
            second[moved(rank)] = moved(parent)
    return first, second
