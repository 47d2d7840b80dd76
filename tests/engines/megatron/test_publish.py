"""After a load each data-parallel rank gets what the others own of its weights; where it owns all, nothing is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.engines.megatron.test_support import built
from tests.jobs import text_file
from tests.megatron_jobs import MegatronJob


def published(rank: int, world_size: int, options: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether weights, of which this rank kept only what it restores, are whole after `publish`; how many were not
    before; gathers."""
    import torch

    from resume_kit.engines.choose import adapter_for

    engine = built(options)
    adapter = adapter_for(engine)
    gathers = 0
    for chunk in engine.model_chunks:

        def counted(*arguments: Any, sync: Any = chunk.start_param_sync, **more: Any) -> None:
            nonlocal gathers
            gathers += 1
            sync(*arguments, **more)

        chunk.start_param_sync = counted
    weights = [weight.detach() for chunk in engine.model_chunks for weight in chunk.parameters()]
    before = [weight.clone() for weight in weights]
    mine = [p for p in adapter.pieces() if p.spec.key.kind == "param" and p.restored]
    kept = [piece.data.clone() for piece in mine]
    for weight in weights:
        weight.zero_()
    for piece, data in zip(mine, kept, strict=True):
        piece.data.copy_(data)
    lacking = sum(not torch.equal(now, then) for now, then in zip(weights, before, strict=True))
    adapter.publish()
    return all(torch.equal(now, then) for now, then in zip(weights, before, strict=True)), lacking, gathers


EXPERTS = {"experts": 4, "swiglu": True, "tied": False, "sp": True}


@pytest.mark.parametrize(
    ("world_size", "options", "sent"),
    [(2, {"tp": 2}, False), (2, {}, True), (4, {"tp": 4, "ep": 2, "etp": 1, **EXPERTS}, True)],
    ids=["tp2", "dp2", "experts-alone-are-spread"],
)
def test_only_what_other_ranks_own_is_sent(
    world_size: int, options: dict[str, Any], sent: bool, ranks: Ranks, tmp_path: Path
) -> None:
    job = MegatronJob(data=text_file(tmp_path), **options).to_json()
    for whole, lacking, gathers in ranks.run(published, world_size, job):
        assert whole
        assert (lacking > 0, gathers > 0) == (sent, sent)
