"""The peers of ``engine.py``: PEFT with Transformers' Trainer, TRL, bitsandbytes, scikit-learn, Liger, Unsloth.

Each gets the rows, batches and first weights that Capotune gets. What stands in the classes below only notes losses and
times and hands over the order of the rows; all else is the library's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine_clock import Clock
from _engine_data import DEVICE, VIRTUAL_TOKENS, Job, dtype_of, without_dropout
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

TARGETS = {
    "minilm": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
_PATIENCE = 3  # epochs without a better accuracy after which a head's training stops


def missing(*packages: str, cuda: bool = False) -> Callable[[], str | None]:
    """Why a peer cannot run here; None when it can."""

    def reason() -> str | None:
        absent = [name for name in packages if find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)}"
        return "needs a GPU with CUDA" if cuda and not torch.cuda.is_available() else None

    return reason


# ------------------------------------------------------------------------------------------------------- runners


def run_trainer(job: Job, clock: Clock) -> None:
    """Transformers' Trainer over a PEFT model, or over a model whose last blocks train."""
    torch.set_float32_matmul_precision(job.contender.options.get("precision", "highest"))
    tokenizer = AutoTokenizer.from_pretrained(job.base["folder"])
    collator: Any = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    if job.workload.classifies:
        collator = DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _noting(Trainer, job, clock)(
            model=trainable_model(job),
            args=TrainingArguments(folder, **_arguments(job)),
            train_dataset=_records(job),
            data_collator=collator,
            callbacks=[_Times(clock)],
        )
        trainer.train()


def run_trl(job: Job, clock: Clock) -> None:
    """TRL's SFTTrainer on a dataset that is tokenised already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = _noting(SFTTrainer, job, clock)(
            model=trainable_model(job),
            args=SFTConfig(folder, **_arguments(job)),
            train_dataset=Dataset.from_list(_records(job)),
            processing_class=AutoTokenizer.from_pretrained(job.base["folder"]),
            callbacks=[_Times(clock)],
        )
        if job.workload.method == "qlora":  # TRL made them bf16
            for weight in trainer.model.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()
            _put_start(trainer.model, job.start)
        trainer.train()


def run_liger(job: Job, clock: Clock) -> None:
    """Liger's kernels in the same Trainer."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    run_trainer(job, clock)


def run_head(job: Job, clock: Clock) -> None:
    """Trainer over a linear head on the frozen backbone, an epoch of forward passes for each pass over the rows."""
    torch.manual_seed(0)
    model = classifier(job)
    model.bert.requires_grad_(False)
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(job.base["folder"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _noting(Trainer, job, clock)(
            model=model,
            args=TrainingArguments(folder, **_arguments(job)),
            train_dataset=_records(job),
            data_collator=collator,
            callbacks=[_Accuracy(job, clock)],
        )
        trainer.train()


def run_sklearn(job: Job, clock: Clock) -> None:
    """Features of the last layer computed once, standardised, and scikit-learn's L-BFGS."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = classifier(job).to(DEVICE)
    clock.begin()
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    fitted.fit(_by_length(model.features, job.rows["sequences"]).numpy(), job.rows["targets"])
    clock.step()
    clock.accuracy = fitted.score(_by_length(model.features, job.test["sequences"]).numpy(), job.test["targets"])
    clock.epochs = 1


PEERS: dict[str, tuple[Callable[[Job, Clock], None] | None, Callable[[], str | None]]] = {
    "trainer": (run_trainer, missing("peft", "accelerate")),
    "head": (run_head, missing("accelerate")),
    "trl": (run_trl, missing("peft", "trl")),
    "sklearn": (run_sklearn, missing("sklearn")),
    "liger": (run_liger, missing("liger_kernel", cuda=True)),
    "unsloth": (None, lambda: missing("unsloth", cuda=True)() or "this benchmark has no run of it yet"),
}
"""How each peer runs, and why it cannot, if so."""


# ------------------------------------------------------------------------------------------------------- models


def trainable_model(job: Job) -> Any:
    """The base with what trains, from the given first weights."""
    work = job.workload
    model = classifier(job) if work.classifies else language_model(job)
    if work.method == "feature-extraction":
        model.requires_grad_(False)
        for part in (*model.model.layers[-work.trainable_layers :], model.model.norm):
            part.float().requires_grad_(True)  # as weights that train are everywhere
        return model
    return _with_adapter(job, model)


class MeanClassifier(nn.Module):
    """An encoder, the mean over the text's own tokens, a linear head; named as in Capotune's adapters."""

    def __init__(self, encoder: Any, labels: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.bert = encoder
        self.classifier = nn.Linear(self.config.hidden_size, labels)
        self.virtual_tokens = 0

    @property
    def device(self) -> torch.device:
        """PEFT asks for it."""
        return self.classifier.weight.device

    def features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(rows, hidden)."""
        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        states = self.bert(attention_mask=attention_mask, **given).last_hidden_state[:, self.virtual_tokens :]
        assert attention_mask is not None
        mask = attention_mask[:, self.virtual_tokens :, None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_unused: Any,
    ) -> SequenceClassifierOutput:
        """Logits, and the mean cross-entropy with ``labels``."""
        logits = self.classifier(self.features(input_ids, attention_mask, inputs_embeds))
        return SequenceClassifierOutput(
            loss=None if labels is None else functional.cross_entropy(logits, labels), logits=logits
        )


def classifier(job: Job) -> MeanClassifier:
    """MiniLM as Transformers loads it, with a head."""
    encoder = AutoModel.from_pretrained(job.base["folder"], add_pooling_layer=False, dtype=torch.float32)
    model = MeanClassifier(encoder, len(job.base["labels"]))
    without_dropout(model)
    return model


def language_model(job: Job) -> Any:
    """The Llama shape as Transformers loads it; for QLoRA packed by bitsandbytes."""
    packing = {}
    if job.workload.method == "qlora":
        from transformers import BitsAndBytesConfig

        packing["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype_of(job.workload),
        )
    return AutoModelForCausalLM.from_pretrained(job.base["folder"], dtype=dtype_of(job.workload), **packing)


def _with_adapter(job: Job, model: Any) -> Any:
    """PEFT's model with the given first weights."""
    import peft

    work = job.workload
    config: peft.PeftConfig
    if work.method == "prompt-tuning":
        inner = model.config
        model.virtual_tokens = VIRTUAL_TOKENS
        config = peft.PromptTuningConfig(
            task_type="SEQ_CLS",
            num_virtual_tokens=VIRTUAL_TOKENS,
            token_dim=inner.hidden_size,
            num_transformer_submodules=1,
            num_attention_heads=inner.num_attention_heads,
            num_layers=inner.num_hidden_layers,
        )
    else:
        config = peft.LoraConfig(
            r=work.rank,
            lora_alpha=2 * work.rank,
            target_modules=TARGETS[work.base],
            task_type="SEQ_CLS" if work.classifies else "CAUSAL_LM",
            modules_to_save=["classifier"] if work.classifies else None,
        )
    made = peft.get_peft_model(model, config)
    _put_start(made, job.start)
    return made


def _put_start(model: Any, path: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    start = load_file(path)
    assert start.keys() == get_peft_model_state_dict(model).keys()
    set_peft_model_state_dict(model, start)


# ------------------------------------------------------------------------------------------------------- trainers


def _records(job: Job) -> list[dict[str, Any]]:
    rows = zip(job.rows["sequences"], job.rows["targets"], strict=True)
    return [{"input_ids": ids, "labels": target} for ids, target in rows]


def _arguments(job: Job) -> dict[str, Any]:
    """What makes the work equal; TrainingArguments' own defaults for the rest (clipping at 1, fused AdamW)."""
    options = job.contender.options
    return {
        "per_device_train_batch_size": job.comparison.batch_size,
        "num_train_epochs": job.workload.epochs,
        "learning_rate": options.get("learning_rate", job.workload.learning_rate),
        "lr_scheduler_type": "linear",
        "bf16": dtype_of(job.workload) == torch.bfloat16,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options.get("arguments", {}),
    }


class _Order(Sampler[int]):
    """The job's rows, epoch by epoch."""

    def __init__(self, epochs: list[list[list[int]]]) -> None:
        self.epochs, self.epoch = epochs, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.epochs[0]))

    def __iter__(self) -> Iterator[int]:
        return (row for batch in self.epochs[self.epoch] for row in batch)


def _noting(base: Any, job: Job, clock: Clock) -> Any:
    """A trainer class that takes the job's order and notes each step's loss without waiting for it."""

    class Noting(base):  # type: ignore[misc]
        def _get_train_sampler(self, *_given: Any) -> _Order:
            return _Order(job.rows["epochs"])

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            found = super().compute_loss(*given, **named)
            clock.losses.append((found[0] if isinstance(found, tuple) else found).detach().clone())
            return found

    return Noting


class _Times(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_given: Any, **_named: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_given: Any, **_named: Any) -> None:
        self.clock.step()


class _Accuracy(_Times):
    """Looks at the test rows after each epoch, off the clock; time after the best epoch does not count."""

    def __init__(self, job: Job, clock: Clock) -> None:
        super().__init__(clock)
        self.job, self.found = job, []  # type: ignore[var-annotated]

    def on_step_end(self, *_given: Any, **_named: Any) -> None:
        """Epochs count here, not steps."""

    def on_epoch_end(self, _arguments: Any, _state: Any, control: Any, model: Any = None, **_named: Any) -> None:
        clock = self.clock
        clock.step()
        with clock.stopped():
            model.eval()
            logits = _by_length(lambda **batch: model(**batch).logits, self.job.test["sequences"])
            self.found.append(float((logits.argmax(1) == torch.tensor(self.job.test["targets"])).float().mean()))
        best = int(np.argmax(self.found))
        clock.accuracy, clock.epochs = self.found[best], best + 1
        control.should_training_stop = len(self.found) - 1 - best >= _PATIENCE

    def on_train_end(self, *_given: Any, **_named: Any) -> None:
        self.clock.ends = self.clock.ends[: self.clock.epochs]


@torch.no_grad()
def _by_length(model: Callable[..., torch.Tensor], sequences: list[list[int]], batch_size: int = 64) -> torch.Tensor:
    """What ``model`` gives for each row, (rows, numbers), in their order; rows of like length go together."""
    order = np.argsort([len(ids) for ids in sequences], kind="stable")
    found = []
    for at in range(0, len(order), batch_size):
        rows = [torch.tensor(sequences[row]) for row in order[at : at + batch_size]]
        batch = {
            "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True),
        }
        found.append(model(**{name: part.to(DEVICE) for name, part in batch.items()}).float().cpu())
    return torch.cat(found)[torch.as_tensor(order).argsort()]
