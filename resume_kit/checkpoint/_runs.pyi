import numpy as np
from numpy.typing import NDArray

def read_runs(file: int, memory: memoryview, origin: int, runs: NDArray[np.int64], ahead: bool) -> int: ...
