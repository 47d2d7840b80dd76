from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from resume_kit.engines import casts as module  # noqa: E402
from resume_kit.engines.casts import cast_mismatches  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 65504.0, 65519.9, 65520.0, 3.4e38, float("inf"), float("-inf"), float("nan")]


def masters(device: str) -> torch.Tensor:
    """fp32 of all magnitudes, halfway cases and NaNs with payloads among them."""
    some = torch.randint(-(2**31), 2**31, (5000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    halfway = (torch.randint(-(2**15), 2**15, (500,), dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    return torch.cat([torch.tensor(SPECIAL), some, halfway]).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_torchs_own_casts_match_and_each_changed_bit_counts(dtype: torch.dtype, device: str) -> None:
    master = masters(device)
    data = master.to(dtype)
    wrong = data.clone()
    for at in (0, 17, master.numel() - 1):
        wrong.view(torch.uint8)[at * dtype.itemsize] ^= 1
    found = cast_mismatches([(data, master), (wrong, master), (data[:0], master[:0]), (wrong[1:], master[1:])])
    assert found.dtype is torch.int64 and found.device.type == device
    assert found.tolist() == [0, 3, 0, 2]


def test_cutting_off_instead_of_rounding_is_seen() -> None:
    master = torch.tensor([1.0, 1.00390625 + 2**-10, -2.999])
    cut = (master.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert cast_mismatches([(cut, master)]).tolist() == [int((cut != master.to(torch.bfloat16)).sum())] != [0]


@pytest.mark.parametrize("chunk", [1, 7, 5000])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CPU_CHUNK", chunk)
    master = masters("cpu")[:200]
    data = master.to(torch.bfloat16)
    data.view(torch.int16)[[3, 50, 199]] ^= 2
    assert cast_mismatches([(data, master)]).tolist() == [3]


def test_the_parameter_and_its_autograd_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16))
    found = cast_mismatches([(weight, weight.detach().float())])
    assert found.tolist() == [0] and not found.requires_grad
    assert cast_mismatches([]).tolist() == []
