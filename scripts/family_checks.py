"""What Capotune does on one base, each answer compared with what Transformers computes of one row at a time.

A check returns how far the two are apart. It raises a ``CapotuneError`` where Capotune refuses the base, and anything
else is a fault.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

import capotune
from capotune import methods
from capotune.adapters.assemble import Assembled, assemble
from capotune.data.batches import IGNORE_INDEX, Encoded
from capotune.data.generation import read_samples_to_score
from capotune.data.readers import as_source
from capotune.errors import CapotuneError, ModelError
from capotune.kernels.prefix import LayerPrefix
from capotune.models.base import Base, find, quiet
from capotune.settings import Context
from capotune.tasks.generation import Generation
from capotune.tasks.text_targets.features import compute_features
from capotune.tasks.text_targets.model import pool, pooled_positions

TOLERANCE = 1e-4
_MOST_WORDS = 600
CPU = torch.device("cpu")
SHORT = {"epochs": 1, "batch_size": 4, "cache": False}
BLOCKS = {"trainable_layers": 1, "learning_rate": 1e-3}
"""A few steps that move the weights."""

_BODIES = (
    "The keeper wrote down the weather.",
    "How do I change the address on my order?",
    "My invoice shows two payments.",
    "One winter the boat did not come for six weeks, so he mended the old sail.",
    "Please send the money back.",
    "Ships passed.",
)
PAIRS = [{"prompt": f"{body} Then", "completion": f" {_BODIES[(at + 1) % 6]}"} for at, body in enumerate(_BODIES)]
LONG = " ".join(_BODIES * 3)
"""More tokens than a tiny model with learned positions takes."""
LABELLED = [{"text": body, "label": "ab"[at % 2]} for at, body in enumerate((*_BODIES, LONG, LONG + " Then"))]
_OTHER = [row["text"].replace("the", "a") + " Yes" for row in LABELLED]
TRAINED_ON = {
    "text": [{"prompt": row["prompt"] + " so", "completion": row["completion"]} for row in PAIRS],
    "labels": [{"text": text, "label": "ab"[at % 2]} for at, text in enumerate(_OTHER)],
}
PROMPTS = ["The keeper", "How do I change the address on", "Two ships"]

Check = Callable[[], float]
Prompt = torch.Tensor | Sequence[LayerPrefix] | None
Outcome = Literal["works", "differs", "refused", "fault"]


@dataclass(frozen=True)
class Cell:
    """What came of one check."""

    outcome: Outcome
    words: str = ""
    """The message, the difference, or where the fault was."""


def run(check: Check, folder: Path) -> Cell:
    """The cell of one check; paths in its words are left out."""
    try:
        with quiet():
            difference = check()
    except CapotuneError as error:
        return Cell("refused", _without_paths(str(error), folder))
    except Exception as error:  # noqa: BLE001 - whatever comes is what is looked for
        at = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in at if "capotune" in frame.filename] or at[-1:]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} ← {Path(at[-1].filename).name}:{at[-1].lineno}"
        return Cell("fault", _without_paths(f"{type(error).__name__}: {error} ({where})", folder))
    if difference <= TOLERANCE:
        return Cell("works")
    return Cell("differs", f"by {difference:.2g}")


def _without_paths(words: str, folder: Path) -> str:
    short = " ".join(words.replace(str(folder), "MODEL").split())
    return short if len(short) < _MOST_WORDS else f"{short[:_MOST_WORDS]} … {short[-80:]}"


class Checks:
    """All checks of one base folder; what they write goes into ``out``."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out

    @cached_property
    def base(self) -> Base:
        """The folder as Capotune reads it."""
        return find(str(self.folder))

    def all(self) -> dict[str, Check]:
        """Every check by its column's name, in order; later ones use what earlier ones wrote."""
        return {
            "evaluate": self.evaluates,
            "generate": self.generates,
            "text: last block": partial(self.text, "feature-extraction", **BLOCKS),
            "text: lora": partial(self.text, "lora", rank=4),
            "text: qlora": partial(self.text, "qlora", rank=4),
            "text: prompt": self.text_prompt,
            "text: deep prompt": self.text_deep_prompt,
            "merge": self.merges,
            "labels: head": self.labels_head,
            "labels: last block": partial(self.labels, "feature-extraction", **BLOCKS),
            "labels: lora": partial(self.labels, "lora", rank=4),
            "labels: qlora": partial(self.labels, "qlora", rank=4),
            "labels: prompt": partial(self.labels, "prompt-tuning", num_virtual_tokens=3, deep=False),
            "labels: deep prompt": partial(self.labels, "prompt-tuning", num_virtual_tokens=3, deep=True),
            "labels: merge": self.merges_labels,
            "quantize": self.quantizes,
        }

    # ------------------------------------------------------------------------------------------------------------ text

    def evaluates(self) -> float:
        """The base's loss."""
        found = capotune.evaluate(self.folder, data=PAIRS, answers=0)["loss"]
        return abs(float(found) - self._loss(_causal(self.folder)))

    def generates(self) -> float:
        """Text in a batch, one by one, and as Transformers writes it; 1 where it is another."""
        generator = capotune.load_model(self.folder)
        together = generator.generate(PROMPTS, max_tokens=6)
        alone = [generator.generate([prompt], max_tokens=6)[0] for prompt in PROMPTS]
        theirs = [self._written(prompt) for prompt in PROMPTS]
        return float(together != alone or alone != theirs)

    def text(self, method: str, **settings: Any) -> float:
        """Train on text: the loss at the end of the run, and of the stored adapter row by row."""
        loaded, trained = self._trained(method, PAIRS, "text", **settings)
        return abs(self._loss(loaded.model) - trained["loss"])

    def text_prompt(self) -> float:
        """The same for a soft prompt, against Transformers' model with the vectors as ``inputs_embeds``, which nearly
        every family takes; else against the stored adapter with the virtual tokens before each row."""
        loaded, trained = self._trained(
            "prompt-tuning", PAIRS, "text", num_virtual_tokens=3, deep=False, learning_rate=0.1
        )
        model, prompt = _causal(self.folder), loaded.method.parameters()["prompt_embeddings"].detach()
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            virtual = torch.tensor(loaded._assembled.method.virtual_token_ids)
            return abs(self._loss(loaded.model, virtual) - trained["loss"])
        return abs(self._loss(model, prompt) - trained["loss"])

    def text_deep_prompt(self) -> float:
        """A deep prompt: the stored adapter with placeholders before each row, and Transformers' model with its keys
        and values in the cache, as PEFT gives them, against the run's score, which read no placeholders."""
        loaded, trained = self._trained(
            "prompt-tuning", PAIRS, "text", num_virtual_tokens=3, deep=True, learning_rate=0.1
        )
        virtual = torch.tensor(loaded._assembled.method.virtual_token_ids)
        alone = self._loss(loaded.model, virtual)
        theirs = self._loss(_causal(self.folder), loaded.method.embedding.prefixes())
        return max(abs(alone - trained["loss"]), abs(theirs - trained["loss"]))

    def merges(self) -> float:
        """A merged lora adapter in Transformers against the run's own score."""
        trained = self._scores("lora", "text")
        out = self.out / "merged"
        capotune.merge(self.out / "lora-text" / "adapter", out=out)
        return max(
            abs(self._loss(_causal(out)) - trained["loss"]),
            abs(float(capotune.evaluate(out, data=PAIRS, answers=0)["loss"]) - trained["loss"]),
        )

    def quantizes(self) -> float:
        """The written 4 bits, read again, against the base quantized as it is loaded."""
        out = self.out / "quantized"
        capotune.quantize(str(self.folder), out=out)
        settings = methods.settings_class("qlora")().completed(Context(self.base.hidden_size, False))
        try:
            on_load = assemble(Generation.on(self.base, None, 0), settings, device=CPU)
        except ModelError:  # it writes no text
            return self._quantized_labels(out, settings)
        return abs(float(capotune.evaluate(out, data=PAIRS, answers=0)["loss"]) - self._loss(on_load.model))

    # ---------------------------------------------------------------------------------------------------------- labels

    def labels_head(self) -> float:
        """A head on frozen features: the features of all layers, and the stored head's answers."""
        loaded, trained = self._trained("feature-extraction", LABELLED, "labels", trainable_layers=0)
        assembled: Assembled = loaded._assembled
        rows = assembled.task.encode([row["text"] for row in LABELLED])
        with quiet():
            backbone = self.base.backbone_class.from_pretrained(self.folder).eval()
        skipped, layers = assembled.model.virtual_tokens, assembled.model.feature_layers
        theirs = torch.cat([_pooled(backbone, ids, assembled.task.pooling, layers) for ids in rows])
        assert not skipped
        logits = assembled.model.classifier(theirs)
        return max(
            _apart(logits.softmax(1), self._probabilities(loaded)), abs(self._cross_entropy(logits) - trained["loss"])
        )

    def labels(self, method: str, **settings: Any) -> float:
        """Train on labels: the answers in batches, one by one, and at the end of the run."""
        loaded, trained = self._trained(method, LABELLED, "labels", **settings)
        return self._labels_apart(loaded, trained["loss"])

    def merges_labels(self) -> float:
        """A merged lora adapter's head on the merged model, against the run's own score."""
        trained = self._scores("lora", "labels")
        capotune.merge(self.out / "lora-labels" / "adapter", out=self.out / "merged-labels")
        return self._labels_apart(capotune.load(self.out / "merged-labels" / "adapter"), trained["loss"])

    def _labels_apart(self, loaded: Any, loss: float) -> float:
        assembled: Assembled = loaded._assembled
        rows = assembled.task.encode([row["text"] for row in LABELLED])
        virtual = list(assembled.method.virtual_token_ids)
        with torch.no_grad():
            alone = torch.cat([assembled.model(torch.tensor([[*virtual, *ids]])).logits for ids in rows])
        apart = _apart(alone.softmax(1), self._probabilities(loaded))
        return max(apart, abs(self._cross_entropy(alone) - loss))

    def _quantized_labels(self, out: Path, settings: Any) -> float:
        from capotune.data.batches import TokenRows
        from capotune.tasks.classification import Classification

        found = []
        for base, own in ((self.base, settings), (find(str(out)), settings)):
            assembled = assemble(Classification.on(base, ["a", "b"], None, 0), own, device=CPU)
            rows = TokenRows(assembled.task.encode([row["text"] for row in LABELLED]), assembled.task.pad_id)
            found.append(compute_features(assembled, (-1,), rows, None, reduced=False))
        return _apart(*found)

    def _probabilities(self, loaded: Any) -> torch.Tensor:
        return torch.as_tensor(loaded.predict_proba([row["text"] for row in LABELLED]))

    @staticmethod
    def _cross_entropy(logits: torch.Tensor) -> float:
        return float(functional.cross_entropy(logits.detach(), torch.tensor([at % 2 for at in range(len(logits))])))

    # -------------------------------------------------------------------------------------------------------- shared

    def _trained(
        self, method: str, rows: list[dict[str, str]], kind: str, **settings: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The adapter of a short run, read from disk, and the run's scores."""
        which = "deep" if settings.get("deep") else settings.get("trainable_layers", "")
        out = self.out / f"{method}-{kind}-{which}".rstrip("-")
        given = {**SHORT, **settings, "test": rows, "model": str(self.folder), "out": out}
        result = capotune.train(method, data=TRAINED_ON[kind], **given, **({"answers": 0} if kind == "text" else {}))[
            "result"
        ]
        return capotune.load(out / "adapter"), result["scores"]

    def _scores(self, method: str, kind: str) -> dict[str, Any]:
        import json

        path = self.out / f"{method}-{kind}" / "run.json"
        if not path.is_file():
            raise CapotuneError(f"{method} wrote no adapter.")
        scores: dict[str, Any] = json.loads(path.read_text())["result"]["scores"]
        return scores

    @torch.no_grad()
    def _loss(self, model: Any, prompt: Prompt = None) -> float:
        """Mean cross-entropy per token in the loss, each row by itself; ``prompt``: ids, vectors, or each block's keys
        and values before each."""
        task = Generation.on(self.base, None, 0 if prompt is None else len(prompt))
        encoded = [one for of_row in task.encode(read_samples_to_score(as_source(PAIRS))) for one in of_row]
        sums = [_row_loss(model, one, prompt) for one in encoded]
        return sum(sums) / sum(one.tokens_in_loss for one in encoded)

    def _written(self, prompt: str) -> str:
        task = Generation.on(self.base, None, 0)
        ids = task.encode_prompt(prompt)
        ends = list(task.end_ids)
        written = _causal(self.folder).generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=6,
            do_sample=False, eos_token_id=ends, pad_token_id=task.pad_id,
        )[0, len(ids) :].tolist()  # fmt: skip
        end = next((at for at, token in enumerate(written) if token in ends), len(written))
        return str(task.decode(written[:end]))


def _causal(folder: Path) -> Any:
    with quiet():
        wraps = type(AutoConfig.from_pretrained(folder)) not in AutoModelForCausalLM._model_mapping
        auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=torch.float32).eval()


def _row_loss(model: Any, row: Encoded, prompt: Prompt) -> float:
    """Sum of the cross-entropies of one sequence."""
    ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels)
    before = len(prompt) if isinstance(prompt, torch.Tensor) else 0
    inputs: dict[str, Any]
    if prompt is None:
        inputs = {"input_ids": ids}
    elif not isinstance(prompt, torch.Tensor):
        inputs = {"input_ids": ids, "past_key_values": _cache(prompt), "use_cache": True}
    elif prompt.dim() == 1:
        inputs = {"input_ids": torch.cat([prompt[None], ids], 1)}
    else:
        vectors = model.get_input_embeddings()(ids)
        inputs = {"inputs_embeds": torch.cat([prompt[None].to(vectors.dtype), vectors], 1)}
        if hasattr(model.base_model, "get_per_layer_inputs"):  # which also looks ids up; vectors count as id 0
            inputs["per_layer_inputs"] = model.base_model.get_per_layer_inputs(functional.pad(ids, (before, 0)))
    logits = model(**inputs).logits[0, before:]
    return float(functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum", ignore_index=IGNORE_INDEX))


def _cache(prefixes: Sequence[LayerPrefix]) -> DynamicCache:
    """Their keys and values, as those of tokens that were read before."""
    cache = DynamicCache()
    for number, one in enumerate(prefixes):
        cache.update(one.keys.detach().transpose(0, 1)[None], one.values.detach().transpose(0, 1)[None], number)
    return cache


@torch.no_grad()
def _pooled(backbone: Any, ids: Sequence[int], pooling: Any, layers: tuple[int, ...]) -> torch.Tensor:
    """One row's features (1, layers·hidden), from Transformers' hidden states."""
    states = backbone(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    starts = torch.tensor([0, len(ids)])
    at = pooled_positions(starts, pooling, 0)
    chosen = [states[layer][0] if at is None else states[layer][0][at] for layer in layers]
    return torch.cat([pool(one, starts, pooling, 0) for one in chosen], 1)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    difference = (one.detach().float() - other.float()).abs().max()
    return float("inf") if bool(difference.isnan()) else float(difference)
