"""The stages of measurements on a GPU, and the table that README shows of them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, measure, readme
from benchmarks.pages import filled


def outcomes(out):
    return {found["stage"]: found for found in json.loads((out / "gpu.json").read_text())["stages"]}


@pytest.fixture
def stages(monkeypatch):
    """Replace the stages by these. What a stage runs is Python code."""

    def have(**code):
        found = [gpu.Stage(name, [["timeit", "-n1", "-r1", lines]]) for name, lines in code.items()]
        monkeypatch.setattr(gpu, "stages", lambda rehearse, out: found)

    return have


def test_stages_that_ended_well_are_not_run_again(stages, tmp_path, capsys):
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write('x')"
    stages(good=note, bad="raise ValueError('no luck')")
    command = ["--rehearse", "--out", str(tmp_path)]
    assert gpu.main(command) == 1
    found = outcomes(tmp_path)
    assert found["good"]["error"] is None and "status 1" in found["bad"]["error"]
    assert any("no luck" in line for line in found["bad"]["tail"])
    stages(good=note, bad="pass")
    assert gpu.main(command) == 0 and log.read_text() == "x"
    assert gpu.main([*command, "--again", "--stages", "good"]) == 0 and log.read_text() == "xx"


def test_a_stage_is_cut_off(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 2)
    stages(endless="import time; print('begun', flush=True); time.sleep(600)", after="pass")
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    found = outcomes(tmp_path)
    assert found["endless"]["error"] == "cut off after 2 s" and found["endless"]["tail"] == ["begun"]
    assert found["after"]["error"] is None


@pytest.mark.slow
def test_an_ended_benchmark_leaves_no_child(tmp_path):
    """Otherwise the child would go on, and slow down what is measured next."""
    told = tmp_path / "told"
    sleeper = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    (tmp_path / "sleeper.py").write_text(sleeper)
    code = "from benchmarks.measure import run_child; run_child('sleeper', {})"
    path = os.pathsep.join([str(measure.ROOT), str(tmp_path)])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    while not (told.exists() and told.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_no_stage_is_longer_than_eight_minutes(tmp_path):
    assert gpu.LIMIT <= 480
    names = [stage.name for stage in gpu.stages(False, tmp_path)]
    assert names[:2] == ["tests", "states"] and len(set(names)) == len(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_bad_options(tmp_path, capsys):
    for arguments, message in ([], "no CUDA device"), (["--rehearse", "--stages", "nope"], "--stages nope: unknown"):
        with pytest.raises(SystemExit) as end:
            gpu.main([*arguments, "--out", str(tmp_path)])
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every command runs and writes its results."""
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0
    found = outcomes(tmp_path)
    assert list(found) == [stage.name for stage in gpu.stages(True, tmp_path)]
    assert found["tests"]["tests"]["skipped"] > 0 or torch.cuda.is_available()
    (results,) = tmp_path.glob("throughput-*.json")
    parts = json.loads(results.read_text())["parts"]
    assert {part["kind"] for part in parts} == {"speed", "trainer", "limits"}
    (limits,) = (
        {f["contender"]["name"]: f["limits"]["1"] for f in p["found"]} for p in parts if p["kind"] == "limits"
    )
    assert limits["reprop, beta 1"] > limits["plain training"] > 1
    rows = [row for part in parts for row in part.get("rows", ())]
    assert any(row["contender"].get("compiled") for row in rows) and not any(row["error"] for row in rows)


def test_the_table_of_the_readme_shows_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    assert readme.main() == 0
    text = readme.README.read_text()
    assert filled(text.replace(" GB | ", " GB | 1", 1), readme.lines_of) == text
