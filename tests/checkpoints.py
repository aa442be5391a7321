"""Small checkpoints on disk, for tests of the command line."""

import json

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(56))]


def save_tokenizer(folder, **names):
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)], pair="<s> $A </s> $B </s>"
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **names}))


def edit(src, **fields):
    path = src / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_one_line(said, *parts):
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), said
