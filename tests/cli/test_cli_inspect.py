from __future__ import annotations

from pathlib import Path

from tests.checkpoints import commit
from tests.cli.conftest import Cli


def test_document(cli: Cli, run: Path) -> None:
    result = cli("inspect", run / "step-000000020", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert (document["step"], document["run_id"], document["attempt"]) == (20, "0123456789ab", 1)
    assert [entry["rank"] for entry in document["ranks"]] == [0, 1]
    assert document["bytes"] == sum(r["data_bytes"] + r["index_bytes"] for r in document["ranks"])
    kinds = {row.pop("kind"): row for row in document["kinds"]}
    assert kinds["master"] == {"tensors": 2, "elements": 55, "bytes_stored": 220, "bytes_cast": 0}
    assert kinds["param"] == {"tensors": 2, "elements": 55, "bytes_stored": 0, "bytes_cast": 110}
    assert kinds["buffer"] == {"tensors": 1, "elements": 4, "bytes_stored": 16, "bytes_cast": 0}
    group = {"lr": 0.003, "members": 2, "betas": [0.9, 0.95], "eps": 1e-08, "weight_decay": 0.1}
    assert document["groups"] == [group]
    assert document["optimizer_scalars"] == [{"values": {"step": 20.0}, "tensors": 2}]
    assert document["state"]["counters"]["global_samples"] == 160
    assert document["data"]["position"] == 160
    assert document["versions"] == {"python": "3.11.7", "torch": "2.9.0"}
    assert document["gate"] == {"loss": 2.5, "grad_norm": 1.25}
    assert "tensors" not in document


def test_a_run_means_its_newest(cli: Cli, run: Path) -> None:
    assert cli("inspect", run, "--json").json["step"] == 30
    (run / "step-000000030" / "manifest.json").unlink()
    result = cli("inspect", run)
    assert result.code == 1
    assert "step-000000030" in result.err


def test_text(cli: Cli, run: Path) -> None:
    text = cli("inspect", run).out
    for word in (
        "deepspeed, zero_stage 3, 2 ranks",
        "position",
        "grad_norm 1.25",
        "WarmupLR",
        "AdamW",
        "0.003",
    ):
        assert word in text
    assert "layers.0.weight" in text  # the tied one
    assert "exp_avg_sq" in text


def test_tensors(cli: Cli, checkpoint: Path) -> None:
    tensors = cli("inspect", checkpoint, "--tensors", "--json").json["tensors"]
    assert len(tensors) == 9
    buffer = tensors[0]
    assert (buffer["kind"], buffer["name"], buffer["shape"]) == ("buffer", "norm.running_mean", [4])
    assert (buffer["owner"], buffer["stored"], len(buffer["fingerprint"])) == (0, True, 16)
    text = cli("inspect", checkpoint, "--tensors").out
    line = next(line for line in text.splitlines() if line.startswith("param") and "layers.0.weight" in line)
    assert "bfloat16" in line and "[8, 6]" in line and "sharded, cast of master" in line


def test_figures_that_json_cannot_say(cli: Cli, tmp_path: Path) -> None:
    user = {"ema": {"decay": float("nan"), "by layer": {1: float("inf")}, "blob": b"\x00\xff"}}
    path = commit(tmp_path, 10, lr=float("-inf"), gate=None, user=user)
    document = cli("inspect", path, "--json").json
    assert document["groups"][0]["lr"] == "-Infinity"
    ema = {"decay": "NaN", "by layer": {"1": "Infinity"}, "blob": "AP8="}
    assert document["state"]["user"] == {"ema": ema}
    assert document["gate"] is None
    assert "not recorded" in cli("inspect", path).out


def test_names_that_a_terminal_would_obey_are_escaped(cli: Cli, tmp_path: Path) -> None:
    path = commit(tmp_path, 10, weights={"evil\x1b[2Jname [bold]x[/bold]\n": (4,)})
    text = cli("inspect", path, "--tensors").out
    assert "\x1b" not in text
    assert "evil\\x1b[2Jname [bold]x[/bold]\\n" in text
