"""The demo: kill a real ZeRO-3 run twice, resume it, and compare it with one that ran through."""
