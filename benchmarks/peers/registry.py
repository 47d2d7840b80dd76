"""All peers by the key that `--peers` takes. A new one is a class in a file of its own, and a line here."""

from __future__ import annotations

from benchmarks.peers.bytecheckpoint import ByteCheckpoint
from benchmarks.peers.dcp import Dcp, DcpPinned, DcpProcess, DcpThread
from benchmarks.peers.deepspeed_fast import DeepSpeedFast
from benchmarks.peers.deepspeed_native import DeepSpeedNative
from benchmarks.peers.megatron_core import MegatronAsync, MegatronPlain, MegatronReshardable
from benchmarks.peers.peer import Peer
from benchmarks.peers.torch_checkpointing import TorchCheckpointing

PEERS: dict[str, type[Peer]] = {
    peer.key: peer
    for peer in (
        DeepSpeedNative,
        DeepSpeedFast,
        Dcp,
        DcpThread,
        DcpProcess,
        DcpPinned,
        TorchCheckpointing,
        MegatronPlain,
        MegatronAsync,
        MegatronReshardable,
        ByteCheckpoint,
    )
}
