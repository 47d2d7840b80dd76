"""The checkpoint format on disk: names, manifest, rank index, data file layout, digests, verification. No torch."""
