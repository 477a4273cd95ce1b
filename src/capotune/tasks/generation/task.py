"""Generation as a task: a causal language model that writes text, by its own output layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import pydantic
import torch
from torch import nn

from capotune.adapters.assemble import Assembled
from capotune.adapters.files import read_text
from capotune.adapters.store import StoredAdapter, StoredRecord
from capotune.adapters.task_model import CardWords
from capotune.data.batches import Encoded
from capotune.data.generation import looks_like_generation, read_samples_to_score
from capotune.data.inspect.samples import GenerationReport, describe_samples, lost_samples
from capotune.data_blocks import Block
from capotune.device import compute_dtype
from capotune.errors import DataError, SettingError
from capotune.events import OnProgress, Reporter, Stage, Warned, alive
from capotune.kernels import policy
from capotune.methods.base import Method, Untouched
from capotune.models.architecture import text_part
from capotune.models.base import Base
from capotune.models.load import load_causal_lm
from capotune.sections import Section
from capotune.settings import DataSettings, EvaluateSettings, TrainingSettings, TrainSettings
from capotune.tasks.base import Scored, Task, TaskRun, untested
from capotune.tasks.generation import page
from capotune.tasks.generation.chat_template import ChatTemplate
from capotune.tasks.generation.deciding import decide_together
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.facade import Generator
from capotune.tasks.generation.general import GeneralText
from capotune.tasks.generation.merged import AskedAs, asked_as, plain_template, write_merged_files
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.objective import TokenCrossEntropy, head_is_plain, looks_ahead
from capotune.tasks.generation.score import ScoredAs, StoredScoredAs, score_samples
from capotune.tasks.generation.token_cache import encoded_once
from capotune.tasks.room import text_length

PLAIN_FORM: Final = "a plain form 'User: … Assistant: …', as the model has no chat template"


class _Record(StoredRecord):
    chat_template: str | None
    template_from: str
    learn: Literal["all", "last"]
    separator: str
    chat: bool
    tool_template: str | None = None
    """Missing in adapters written before models' several templates were used."""
    scored_as: StoredScoredAs | None = None
    """Missing in adapters written before decoding was stored."""


@dataclass(frozen=True)
class Generation(TextEncoder, Task):
    """The task: how text becomes tokens, and how answers are scored."""

    scored_as: ScoredAs = field(default_factory=ScoredAs)
    objective: TokenCrossEntropy = field(default_factory=TokenCrossEntropy)

    name: ClassVar[str] = "generation"
    title: ClassVar[str] = "text to write"
    gives: ClassVar[str] = "writes text and knows no labels"
    command: ClassVar[str] = "generate"
    default_models: ClassVar[tuple[str, ...]] = ("smollm2", "capo-tiny")
    base_label: ClassVar[str] = "base (not fine-tuned)"
    base_note: ClassVar[str] = "The base as it is, without fine-tuning."
    sample: ClassVar[str] = "your prompt"
    has_head: ClassVar[bool] = False
    validation_fraction: ClassVar[float | None] = None
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    data_settings: ClassVar[frozenset[str]] = frozenset({"prompt_template", "completion_column", "general"})
    Record = _Record

    @classmethod
    def on(
        cls,
        base: Base,
        max_length: int | None,
        virtual_tokens: int,
        *,
        learn: Literal["all", "last"] = "all",
        chat: bool = False,
    ) -> Generation:
        """The task on a base with its own chat template; where ``chat`` needs one and there is none, a plain form.

        Raises ``ModelError`` when it is no causal language model, or its tokenizer names no end-of-text token.
        """
        base.check_writes_text()
        ends = base.end_tokens
        if not ends:
            raise base.error(
                "its tokenizer names no end-of-text token, so the model could never be trained to stop.",
                advice=f"Set 'eos_token' in {base.folder / 'tokenizer_config.json'}.",
            )
        length = text_length(base, max_length, virtual_tokens, 1)
        template, origin, tool_template = base.tokenizer.chat_template, "the model's own chat template", None
        if template is not None and not isinstance(template, str):  # several by name
            template, tool_template = template.get("default"), template.get("tool_use")
        if template is None:
            origin, tool_template = "no chat template, which plain text does without", None
            if chat:
                template = plain_template(base.tokenizer)
                origin = PLAIN_FORM
        ends = _with_turn_end(ends, base, template, tool_template)
        return cls(base, length, ends, template, origin, learn, chat=chat, tool_template=tool_template)

    @classmethod
    def of_model(cls, base: Base) -> Generation:
        """The task on a model without an adapter; a merged one is asked and scored as its adapter was."""
        asked = asked_as(base)
        if asked is None:
            return cls.on(base, None, 0)
        task = cls.on(base, asked.max_length, 0, learn=asked.learn, chat=asked.chat)
        return replace(task, separator=asked.separator, scored_as=ScoredAs.from_json(asked.scored_as))

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:
        """Conversations, prompts with completions, plain text, or a prompt template."""
        named = settings.pair_columns or settings.label_columns
        return not named and looks_like_generation(settings.data, settings.prompt_template)

    @classmethod
    def prepare(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> TaskRun:
        """Samples, tokenised and split."""
        from capotune.tasks.generation.run import GenerationRun

        return GenerationRun(settings, method, base, report)

    # -------------------------------------------------------------------------------------------------------- the model

    def compute_dtype(self, device: torch.device, quantized: bool) -> torch.dtype:
        """bf16 where the device is fast in it, else fp32."""
        return compute_dtype(device, quantized=quantized and self.base.hidden_size >= policy.BF16_HIDDEN_SIZE)

    def load_base(self, method: Method, dtype: torch.dtype, progress: OnProgress | None) -> Any:
        """Transformers' own causal language model."""
        return load_causal_lm(self.base, dtype=dtype, quantization=method.quantization, progress=progress)

    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:  # noqa: ARG002
        """The same model: its own output layer writes."""
        return loaded, text_part(loaded)

    def with_model(self, model: Any) -> Generation:
        """Whether the output layer is plain shows in the loaded model. ``ModelError`` for one that looks ahead."""
        backbone = text_part(model)
        if looks_ahead(model):
            raise self.base.error(
                f"this {self.base.config.model_type} model predicts a token from those after it too, so it cannot "
                "write text token by token.",
                advice="Give a causal language model (Llama, Qwen, Mistral, Gemma, GPT-2, Phi …; embedded: capo-tiny).",
            )
        return replace(self, objective=TokenCrossEntropy(backbone, head_is_plain(model, backbone)))

    def head_parameters(self, model: Any) -> dict[str, nn.Parameter]:  # noqa: ARG002 - the base's own head stays frozen
        """None."""
        return {}

    def expected_head(self, model: Any) -> int:  # noqa: ARG002
        """0."""
        return 0

    # --------------------------------------------------------------------------------------------- to and from adapters

    def record(self, model: Any) -> dict[str, Any]:  # noqa: ARG002
        """Template, separator, lengths and decoding, as stored beside an adapter."""
        names = ("max_length", "chat_template", "tool_template", "template_from", "learn", "separator", "chat")
        return {
            "task": self.name,
            **{name: getattr(self, name) for name in names},
            "scored_as": self.scored_as.to_json(),
        }

    @classmethod
    def restore(cls, base: Base, record: dict[str, Any]) -> Generation:
        """The task of a stored adapter."""
        task = cls.on(base, record["max_length"], 0, learn=record["learn"], chat=record["chat"])
        stored = {name: record[name] for name in ("chat_template", "template_from", "separator")}
        stored["tool_template"] = record.get("tool_template")
        stored["end_ids"] = _with_turn_end(task.end_ids, base, stored["chat_template"], stored["tool_template"])
        scored_as = ScoredAs()
        if record.get("scored_as"):
            compared = {"metric": record["trained"]["metric"]} if "metric" in record["trained"] else {}
            scored_as = ScoredAs.from_json(record["scored_as"] | compared)
        return replace(task, **stored, scored_as=scored_as)

    @classmethod
    def of_peft(cls, base: Base, stored: StoredAdapter) -> Generation:
        """The task on the base alone, with the chat template that may lie beside the adapter."""
        task = cls.on(base, None, stored.settings.virtual_tokens)
        template = read_text(stored.folder, "chat_template.jinja")
        if template is None:
            return task
        ends = _with_turn_end(base.end_tokens, base, template, None)
        return replace(task, chat_template=template, template_from="beside the adapter", end_ids=ends, chat=True)

    def write_merged_files(self, folder: Path) -> list[str]:
        """Chat template, generation settings, and how the adapter was asked."""
        asked = AskedAs(
            chat=self.chat,
            learn=self.learn,
            separator=self.separator,
            max_length=self.max_length,
            scored_as=self.scored_as.to_json() | {"metric": self.scored_as.metric},
        )
        return write_merged_files(self, asked, folder)

    def rows_to_compare(self, data: Any, count: int) -> list[Encoded]:
        """Samples with the tokens that are in the loss."""
        samples = read_samples_to_score(data)
        chosen = samples.take(range(min(count, len(samples))))
        return [one for of_sample in self.encode(chosen) for one in of_sample][:count]

    def facade(self, assembled: Assembled) -> Generator:
        """A ``Generator``."""
        return Generator(assembled)

    def golden_logits(self, assembled: Assembled, text: str) -> torch.Tensor:
        """(1, vocabulary): what the next token is chosen by."""
        ids = [*assembled.method.virtual_token_ids, *self.encode_prompt(text)]
        logits: torch.Tensor = assembled.model(input_ids=torch.tensor([ids], device=assembled.model.device)).logits
        return logits[0, -1:]

    def evaluate(self, assembled: Assembled, settings: EvaluateSettings, report: Reporter) -> Scored:
        """Loss, perplexity, and where the data holds answers exact match and ROUGE-L, decoded as in the run; of an
        adapter also what it costs on general text, for which it is taken off last."""
        alone = isinstance(assembled.method, Untouched)
        if settings.general and alone:
            raise SettingError(
                "a model alone has no base to be compared with.",
                setting="general",
                given=settings.general,
                advice="Leave it out.",
            )
        general = GeneralText.read(self, settings.general, 0 if alone else self.scored_as.general)
        scored = self._score(assembled, settings, report)
        if not general.sequences:
            return scored
        report(Stage(text="reading general text"))
        cost = general.cost_of(assembled, alive(report))
        return replace(scored, extra=scored.extra | {"general": cost.to_json()})

    def _score(self, assembled: Assembled, settings: EvaluateSettings, report: Reporter) -> Scored:
        samples = read_samples_to_score(
            settings.data, prompt_template=settings.prompt_template, completion_column=settings.completion_column
        )
        if self.chat_template is None and samples.are_conversations:
            report(Warned(text=f"conversations are written in {PLAIN_FORM}; training writes them so too."))
            assembled = replace(assembled, task=replace(assembled.task, chat_template=plain_template(self.tokenizer)))
        notices = Notices()
        encoded = encoded_once(assembled.task, samples, notices, report)
        for text in (*notices.sentences(), *lost_samples(samples, encoded, self.max_length)):
            report(Warned(text=text))
        answers = self.scored_as.answers if settings.answers is None else settings.answers
        scored_as = replace(self.scored_as, answers=answers)
        scored = score_samples(assembled, encoded, samples, scored_as, report)
        if not scored.rows:
            raise DataError(
                f"no row has a token to score within {self.max_length:,} tokens.",
                where=str(samples.source),
                advice="Give shorter prompts, or a model that was trained with a larger `max_length`.",
            )
        return scored

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The report in words, the lengths of the rows, and some rows."""
        return describe_samples(pydantic.TypeAdapter(GenerationReport).validate_python(report))

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """What it writes, every score, and how to ask it."""
        trained = record["trained"]
        scores = {name: value for name, value in (trained.get("scores") or {}).items() if value is not None}
        named = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items())
        score = untested(trained, "perplexity")
        if trained["test_rows"]:
            score = f"On test rows: {named}"  # not all scores are of as many
        chat = record["chat"]
        what = "answers in a conversation" if chat else "text"
        general = trained.get("general")
        elsewhere = f" Against its base it is {general['words']}." if general else ""
        return CardWords(
            f"Writes {what}. Chat template: {record['template_from']}.{elsewhere}",
            score,
            "capo chat ADAPTER" if chat else 'capo generate ADAPTER "your prompt"',
            'model = capotune.load(adapter)\nmodel.generate(["your prompt"])',
        )

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """How it writes."""
        names = ("chat", "chat_template", "template_from", "learn", "max_length", "separator")
        return {name: record[name] for name in names}

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """What it writes, its template, and what it was trained on."""
        turns = " assistant turn" if facts["learn"] == "last" else " assistant turns"
        trained_on = f", trained on: {facts['learn']}{turns}" if facts["chat"] else ""
        parted = [("separator", f"{facts['separator']!r} is put after a prompt that ends in no white space")]
        return [
            ("writes", "answers in a conversation" if facts["chat"] else "text that continues a prompt"),
            ("template", facts["template_from"]),
            ("text", f"up to {facts['max_length']} tokens{trained_on}"),
            *(parted if facts["separator"] else []),
        ]

    @classmethod
    def decide(cls, results: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
        """By the held-out rows that any of the techniques would answer to the letter; else as the data decides."""
        decided = {method: result for method, result in results.items() if "held_out_exact_match" in result}
        if not decided:
            return super().decide(results)
        shares = {method: result["held_out_exact_match"] for method, result in decided.items()}
        return decide_together(shares, next(iter(decided.values()))["held_out_rows"])

    @classmethod
    def further_columns(cls, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:
        """All, but the loss where perplexity, its exponential, has a column."""
        further = [name for name in scores if name != metric]
        return tuple(name for name in further if name != "loss" or "perplexity" not in scores)

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],  # noqa: ARG003
        recommended: str,  # noqa: ARG003
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],
    ) -> list[Section]:
        """The same prompts, answered by the base and every technique."""
        return page.sections({"base": of_base, **predictions})


def _with_turn_end(
    ends: tuple[int, ...], base: Base, chat_template: str | None, tool_template: str | None
) -> tuple[int, ...]:
    """The tokens that end a text, and those that the chat template ends a turn with."""
    if chat_template is None:
        return ends
    template = ChatTemplate(base.tokenizer, chat_template, tool_template)
    tokens = [token for token in (template.turn_end.token, template.call_end) if token is not None]
    return tuple(dict.fromkeys((*ends, *base.tokenizer.convert_tokens_to_ids(tokens))))
