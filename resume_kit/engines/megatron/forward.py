"""What the gate runs on a GPT model chunk."""

from __future__ import annotations

from typing import Any

import torch


def gpt_loss(chunk: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The mean loss of next tokens on the last stage; a hidden state on the others.

    `batch` holds `input_ids` int64 [samples, tokens]. The last token of a sample has no next one and counts nothing.
    """
    tokens: torch.Tensor = batch["input_ids"]
    samples, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(samples, -1)
    output: torch.Tensor = chunk(tokens, positions, None, labels=tokens.roll(-1, dims=1))
    return output[:, :-1].float().mean() if output.dim() == 2 else output
