INSTRUCTIONS: str

def weighted_sums(
    addresses: tuple[int, ...],
    itemsizes: tuple[int, ...],
    first: int,
    length: int,
    grid: tuple[tuple[int, int, int], ...],
    begin: int,
    end: int,
) -> tuple[int, ...]: ...
