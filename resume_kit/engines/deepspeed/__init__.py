"""The DeepSpeed ZeRO-1/2/3 adapter."""
