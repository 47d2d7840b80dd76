"""Host memory registered with a GPU, so that copies run at the full speed of the bus and beside the computation.

A new thread's device is the first one, whichever is this rank's: each call here says whose memory it is. Without it,
a rank would make a context, hundreds of MB, on the GPU of another.
"""

from __future__ import annotations

from contextlib import suppress

import torch


def register(address: int, nbytes: int, device: torch.device) -> int:
    """Pin whole pages of host memory. CUDA's error code: 0 where it is pinned."""
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
    return _forgotten(error, device)


def unregister(address: int, device: torch.device) -> int:
    """Undo `register`, before the pages go back: CUDA would go on to take whatever comes to lie there for pinned."""
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]
    return _forgotten(error, device)


def _forgotten(error: int, device: torch.device) -> int:
    """CUDA keeps an error for the next kernel of this thread to raise; this one raises it now, in vain."""
    if error:
        with suppress(RuntimeError):
            torch.ones(1, device=device)
    return error
