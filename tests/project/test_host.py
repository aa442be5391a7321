"""What a training step takes the host, in kernels and views, which are the same in every run."""

import json

from benchmarks import host
from hf_pareprop.tools.contenders import STOCK, Contender


def test_a_layer_launches_no_more_than_in_the_results():
    assert not host.check()


def test_more_is_noticed(tmp_path):
    """The same counts, compared with results in which a layer takes less."""
    results = json.loads(host.FILE.read_text())
    results["rows"] = [row for row in results["rows"] if row["way"] == "reprop, beta 1" and row["family"] == "vit"]
    results["rows"][0]["counts"]["kernels"] -= 1
    (tmp_path / "host.json").write_text(json.dumps(results))
    (line,) = host.check(tmp_path / "host.json")
    assert line.startswith("vit, reprop, beta 1: ") and "kernels a layer, where the results have" in line


def test_a_rebuild_launches_what_the_forward_pass_launches_and_more():
    plain, stored, rebuilt = (
        host.counts_of("vit", way)["kernels"] for way in (STOCK, Contender("autograd", 1.0), Contender("reprop", 1.0))
    )
    assert plain < stored < rebuilt < 2 * stored
