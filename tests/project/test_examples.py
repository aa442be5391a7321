"""Short runs of the examples and the benchmarks, as a user would start them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*command, code=0):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
    return result


@pytest.mark.slow
def test_image_example_compares(tmp_path):
    result = run("examples/finetune_image.py", "--compare", "--max_steps", 6, "--output_dir", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["method"] for row in found] == ["plain", "checkpointing", "reprop", "pareprop"]
    by_method = {row["method"]: row for row in found}
    assert by_method["reprop"]["accuracy"] == by_method["pareprop"]["accuracy"]
    assert by_method["plain"]["accuracy"] == by_method["checkpointing"]["accuracy"]
    assert all(row["method"] in result.stdout for row in found)
    card = (tmp_path / "pareprop-42" / "README.md").read_text()
    assert "AutoModelForImageClassification" in card and "trained from scratch" in card


@pytest.mark.slow
def test_image_example_learns(tmp_path):
    """Four of its twenty epochs are enough to be far better than chance, and it prints the memory saved."""
    said = run("examples/finetune_image.py", "--num_train_epochs", 4, "--output_dir", tmp_path).stdout
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["accuracy"] > 0.5
    plain, checkpointing, ours = row["beside"]
    assert ours["activation_bytes"] < checkpointing["activation_bytes"] < plain["activation_bytes"]
    assert plain["batch_size"] == plain["largest"] == 64 < checkpointing["largest"] < ours["largest"]
    assert (
        f"Activations take {ours['activation_bytes'] / 2**20:.1f} MB instead of" in said
        and "keep their graphs" in said
    )


@pytest.mark.slow
def test_text_example(tmp_path):
    command = ["examples/finetune_text.py", "--max_steps", 2, "--output_dir", tmp_path, "--max_length", 16]
    result = run(*command, "--beside", False)  # what stands beside the run is tested with images
    assert "AutoModelForSequenceClassification.from_pretrained" in result.stdout
    assert json.loads((tmp_path / "config.json").read_text())["beta"] == 1 / 32


@pytest.mark.slow
def test_annealing_example(tmp_path):
    run("examples/finetune_image.py", "--max_steps", 12, "--anneal_from", 0.3, "--output_dir", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["beta"] == 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_graph_example_needs_cuda():
    assert "no CUDA device" in run("examples/cuda_graph.py", code=2).stderr


@pytest.mark.cuda
def test_cuda_graph_example():
    pytest.importorskip("datasets")
    said = run("examples/cuda_graph.py", "--steps", 60).stdout
    assert "ordinary steps" in said and "one CUDA graph" in said


@pytest.mark.slow
def test_adaptation_example(tmp_path):
    """A few steps bring a converted encoder closer to its original. The result is an ordinary checkpoint."""
    (tmp_path / "texts.txt").write_text("\n".join(f"sentence number {i} of a few" for i in range(40)))
    files = ["--train_file", tmp_path / "texts.txt", "--output_dir", tmp_path / "out"]
    command = ["examples/adapt.py", *files, "--beta", 0.5, "--steps", 8]
    result = run(*command, "--batch_size", 4, "--max_length", 12)
    first, last = (float(part.split()[0]) for part in result.stdout.split("original: ")[1].split(" at first, "))
    assert 0 < last < first
    assert json.loads((tmp_path / "out" / "config.json").read_text())["beta"] == 0.5
    assert "self-distillation" in (tmp_path / "out" / "README.md").read_text()
    assert "40 texts do not fill a batch of 64" in run(*command, "--batch_size", 64, code=1).stderr
    assert "required: --beta" in run("examples/adapt.py", *files, code=2).stderr


@pytest.mark.slow
def test_conversion_study(tmp_path):
    """It writes the plot and the tables of the quickest part. A second run has nothing left to do."""
    results = ROOT / "studies" / "results" / "conversion.json"
    rows = json.loads(results.read_text())["results"]
    (tmp_path / "conversion.json").write_text(json.dumps({"results": rows}))
    result = run("-m", "studies.conversion", "--parts", "main", "--seeds", 1, "--out", tmp_path)
    assert "| stock |" in result.stdout and (tmp_path / "conversion.png").stat().st_size > 10_000
    before = {"model": "antibody-roberta", "beta": 0.5}
    found = run("-m", "studies.conversion", "--child", json.dumps(before)).stdout
    assert '"score": ' in found and '"cosine": ' in found


@pytest.mark.slow
@pytest.mark.every_case
def test_decoder_study(tmp_path):
    """It shows the table of the committed results without running them again, and runs one case."""
    committed = json.loads((ROOT / "studies" / "results" / "decoder.json").read_text())
    (tmp_path / "decoder.json").write_text(json.dumps(committed))
    said = run("-m", "studies.decoder", "--parts", "before", "--seeds", 1, "--out", tmp_path).stdout
    assert "| layers | 1/128 | 7 |" in said and "| sub-blocks | 1/32 | 10 |" in said and " cases: " not in said
    one = {"steps": "layer", "inverse_beta": 128, "seed": None}
    said = run("-m", "studies.decoder", "--child", json.dumps(one)).stdout
    found = json.loads("{" + said.rpartition("{")[2])
    (row,) = (row for row in committed["results"] if row.items() >= one.items())
    assert found["perplexity"] == pytest.approx(
        row["perplexity"], rel=0.2
    )  # other versions of Python have other texts


@pytest.mark.slow
def test_states_benchmark(tmp_path):
    result = run("-m", "benchmarks.states", "--device", "cpu", "--repeats", 1, "--threads", 1, 2, "--out", tmp_path)
    assert all(what in result.stdout for what in ("copies", "checksum", "update, m = 5", "2 threads"))
    times = json.loads((tmp_path / "states-cpu.json").read_text())["times"]
    assert len(times) == 2 * 2 * 11 and all(len(row["ms"]) == 1 and row["copies"] > 0 for row in times)
    assert (tmp_path / "states-cpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_throughput_benchmark(tmp_path):
    """It runs parts of two kinds for the smallest size. A second run has nothing left to do."""
    command = ["-m", "benchmarks.throughput", "--device", "cpu", "--sizes", "vit-s", "--precisions", "bf16"]
    command += ["--max-batch", 1, "--rounds", 1, "--betas", 1, "--caps", "--depths", 1, 2, "--out", tmp_path]
    # Compiling takes minutes; the rehearsal of the GPU stages does it, and looks for the largest batches.
    command += ["--without", "torch.compile", "compiled", "selective", "budget", "autograd"]
    first = run(*command).stdout
    (path,) = tmp_path.glob("throughput-*.json")
    parts = json.loads(path.read_text())["parts"]
    assert [part["kind"] for part in parts] == ["speed", "depths"]
    # Without offloading, which does nothing on a CPU.
    assert all(row["ms"] and not row["error"] for row in parts[0]["rows"]) and len(parts[0]["rows"]) == 4
    assert len(list(tmp_path.glob("*.png"))) == 2
    second = run(*command).stdout
    assert second.count("was done before") == 2
    assert second.split("\n\n", 1)[1] == first.split("\n\n", 1)[1]


@pytest.mark.slow
def test_overlap_benchmark(tmp_path):
    size = ["--size", "vit-s", "--depth", 2, "--rounds", 1, "--name", "x", "--out", tmp_path]
    assert "hidden" in run("-m", "benchmarks.overlap", "--device", "cpu", *size).stdout
    traces = json.loads((tmp_path / "x.json").read_text())["traces"]
    assert set(traces) == {"reprop, beta 0.03125", "pareprop, beta 0.03125"}
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.slow
def test_benchmarks_refuse_bad_arguments():
    assert "--sizes vit-xl: unknown" in run("-m", "benchmarks.throughput", "--sizes", "vit-xl", code=2).stderr
    assert "--betas 0.3: " in run("-m", "benchmarks.throughput", "--betas", 0.3, code=2).stderr
    assert "invalid choice: 'vit-xl'" in run("-m", "benchmarks.overlap", "--size", "vit-xl", code=2).stderr


def test_the_page_shows_the_results():
    """The page passes the check, and a changed page fails."""
    from benchmarks import results_page
    from benchmarks.pages import filled

    text = results_page.PAGE.read_text()
    assert filled(text, results_page.lines_of) == text and not results_page.without_table(text)
    assert filled(text.replace("5718 MB", "1 MB"), results_page.lines_of) == text
    assert results_page.without_table(text.replace("throughput-nvidia", "throughput-nobody")) == [
        "benchmarks/results/throughput-nvidia-h200.json"
    ]


@pytest.mark.slow
def test_the_documentation_builds(tmp_path):
    result = run("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site")
    assert "WARNING" not in result.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {"how-it-works", "results", "reference", "troubleshooting"} <= pages
    assert "to_reversible" in (tmp_path / "site" / "reference" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.every_case
def test_text_example_on_files(tmp_path):
    """A stock checkpoint and data of one's own."""
    import assets

    rows = "".join(f'{{"body": "number {i}", "answer": "{"yes" if i % 2 else "no"}"}}\n' for i in range(8))
    (tmp_path / "rows.json").write_text(rows)
    data = ["--train_file", tmp_path / "rows.json", "--test_file", tmp_path / "rows.json"]
    common = ["--model_name_or_path", assets.english_encoder(), "--max_steps", 1, "--output_dir", tmp_path / "out"]
    columns = ["--text_column", "body", "--label_column", "answer"]
    run("examples/finetune_text.py", *data, *common, *columns)
    failed = run("examples/finetune_text.py", *data, *common, code=1)
    assert "no column 'text'; it has body, answer" in failed.stderr


@pytest.mark.slow
def test_bad_arguments():
    assert "--seeds 0: at least one run" in run("examples/finetune_image.py", "--seeds", 0, code=1).stderr
    assert "--anneal_from 2.0: a fraction" in run("examples/finetune_image.py", "--anneal_from", 2, code=1).stderr
    assert "invalid choice: 'fast'" in run("examples/finetune_image.py", "--method", "fast", code=2).stderr


@pytest.mark.slow
def test_the_notebook(tmp_path):
    """Its cells run one after the other, and give the expected results."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    cells += ["assert ours < plain / 5 and report.exact and report.gradients_equal and accuracy > 0.8 and same"]
    result = subprocess.run([sys.executable, "-c", "\n".join(cells)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "RevViTForImageClassification True ViTForImageClassification" in result.stdout


@pytest.mark.slow
def test_decoder_example(tmp_path):
    """All three methods start with the same loss, checkpointing changes nothing, and the adapters are saved."""
    short = ["--max_steps", 2, "--length", 32, "--test_rows", 2, "--data", "documentation"]
    said = run("examples/finetune_decoder.py", *short, "--output_dir", tmp_path).stdout
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    plain, checkpointing, ours = found
    assert [row["method"] for row in found] == ["plain training", "gradient checkpointing", "reversible"]
    assert plain["losses"] == checkpointing["losses"] != ours["losses"] and len(ours["losses"]) == 2
    assert plain["before"] == checkpointing["before"] == pytest.approx(ours["before"], rel=0.05)
    # 7 side bits for each of 576 elements; the hidden state in fp32 is what checkpointing keeps.
    assert ours["bytes_kept"] == pytest.approx(576 * 7 / 8, rel=0.1)
    assert checkpointing["bytes_kept"] == pytest.approx(576 * 4, rel=0.1) and plain["bytes_kept"] > 20_000
    assert ours["as_stock"] == pytest.approx(ours["after"], rel=0.05)
    assert (tmp_path / "adapter_config.json").exists() and "| reversible |" in said
    assert "invalid choice: 'images'" in run("examples/finetune_decoder.py", "--data", "images", code=2).stderr
