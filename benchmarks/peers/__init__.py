"""What the kit is measured beside, one file a system; `benchmarks.peers.registry` lists them."""
