"""A run that learns to write: train in steps, then measure the loss on test rows and compare answers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from capotune.adapters.assemble import Assembled, generation_task
from capotune.data.batches import IGNORE_INDEX, Encoded, TokenRows
from capotune.data.generation import load_samples
from capotune.data.inspect.samples import inspect_samples
from capotune.data.samples import Conversation, Pair, Samples, answer_of, asked, question_of
from capotune.data.split import hold_out, normalised
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.loop import Examples, TrainingState, held_out_score, outputs, start
from capotune.errors import DataError, SettingError
from capotune.evaluation.answers import answer_rows
from capotune.evaluation.generate import generate
from capotune.evaluation.metrics import mean_interval, metric, perplexity
from capotune.evaluation.pairs import RowCounts
from capotune.methods import Untouched, make
from capotune.models.load import find
from capotune.runs.task_run import (
    MOST_HELD_OUT,
    Fitted,
    Reporter,
    TaskRun,
    Tested,
    counter,
    train_in_steps,
    with_boundary,
)
from capotune.settings import (
    DecodingSettings,
    FeatureExtractionSettings,
    MethodSettings,
    PromptTuningSettings,
    TrainSettings,
)
from capotune.tasks.generation import Generation

_SHORT_ANSWER = 48  # tokens; answers that are mostly at most this long are compared word for word
_SHOWN = 5  # prompts whose answers stand side by side on the page
_SHOWN_TOKENS = 96  # of a text that goes on, where there is no answer to tell how long one is


class GenerationRun(TaskRun):
    """Text to write, tokenised and split."""

    task: Generation

    def __init__(self, settings: TrainSettings, method: MethodSettings, report: Reporter) -> None:
        """Read and check the data, tokenise it for the base, hold rows out, and report what was found."""
        _refuse_what_is_for_labels(settings, method)
        self.settings = settings
        self.candidates = _read_candidates(method)
        data = load_samples(
            settings.data,
            test=settings.test,
            prompt_template=settings.prompt_template,
            completion_column=settings.completion_column,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
        )
        assert settings.model is not None
        self.source = find(settings.model)
        self.task = task = self._make_task(settings, method, data.train)
        train, test = task.encode(data.train), task.encode(data.test)
        found = inspect_samples(
            data,
            train,
            test,
            max_length=task.max_length,
            tokens_of=task.token_texts,
            template_from=task.template_from,
            learn=task.learn,
        )
        report({"kind": "data", "task": task.name, "report": asdict(found)})
        if not data.test.samples and len(data.train) == 1:  # one running text: its end is the test
            train, test = _end_of(train[0], settings.test_fraction)
        self.data = data
        self.train, groups = self._examples(train, data.train)
        self._test, _ = self._examples(test, data.test)
        fraction = min(settings.validation_fraction, MOST_HELD_OUT / len(groups))
        if len(set(groups)) < 2:
            raise DataError(
                "one row is not enough: none can be held out to see when to stop.", where=str(settings.data)
            )
        fit, held = hold_out([0] * len(groups), fraction, settings.seed, groups)
        self.fit_rows, self.held_rows = torch.as_tensor(fit), torch.as_tensor(held)
        self.train_rows = len(self.train.rows.sequences)
        self.data_sha256 = f"{self.train.rows.digest()[:32]}{self._test.rows.digest()[:32]}"
        self.decoding, self.metric = self._how_to_answer(settings)
        self.tried: list[dict[str, object]] = []

    # ---------------------------------------------------------------------------------------------- before training

    def settle(self, assembled: Assembled, report: Reporter) -> Assembled:
        """Of hard prompts, keep the best: the one with the least loss on the held-out rows."""
        method = assembled.method.settings
        if not isinstance(method, PromptTuningSettings) or not (self.candidates or method.hard):
            return assembled
        candidates = self.candidates or [method.init_text or ""]
        report({"kind": "stage", "text": f"trying {len(candidates)} hard prompts"})
        held = self.train.take(self.held_rows)
        losses: list[tuple[float, str]] = []
        for number, text in enumerate(candidates):
            (score,) = held_out_score(assembled, held.after(self._tokens_of(text)))
            losses.append((-score, text))
            self.tried.append({"prompt": text, "held_out_loss": -score})
            report({"kind": "step", "step": number + 1, "total": len(candidates), "loss": -score})
        _, best = min(losses)
        report({"kind": "stage", "text": f"the best hard prompt is {best!r}"})
        chosen = method.model_copy(
            update={
                "candidates": None,
                "init": "text",
                "init_text": best,
                "num_virtual_tokens": len(self._tokens_of(best)),
            }
        )
        return replace(assembled, method=make(chosen))

    def start_tokens(self, method: MethodSettings) -> list[int]:
        """The tokens of ``init_text``, or all that occur in the training rows."""
        if not isinstance(method, PromptTuningSettings):
            return []
        if method.init_text is not None:
            return self._tokens_of(method.init_text)
        return sorted({token for sequence in self.train.rows.sequences for token in sequence})

    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Tested:
        """The same as any adapter's; the method is not attached yet, so it has no part in it."""
        return self.test(replace(assembled, method=Untouched(assembled.method.quantization)), cache, report)

    def before_attach(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:
        """Nothing."""

    # ---------------------------------------------------------------------------------------------- training

    def fit(
        self,
        settings: TrainSettings,
        assembled: Assembled,
        cache: ActivationCache,
        report: Reporter,
        state: TrainingState | None,
    ) -> Fitted:
        """Train in steps; a hard prompt stays as it is."""
        prefix = assembled.method.virtual_token_ids
        self.train, self._test = self.train.after(prefix), self._test.after(prefix)
        also = {"candidates": self.tried} if self.tried else {}
        if getattr(assembled.method.settings, "hard", False):
            held_score = held_out_score(assembled, self.train.take(self.held_rows))
            return Fitted(0.0, 0, self.task.shown(held_score), also)
        fit, held = (
            with_boundary(self.train.take(rows), assembled, cache, report) for rows in (self.fit_rows, self.held_rows)
        )
        state = state or start(assembled, held_out_score(assembled, held), settings.seed)
        state = train_in_steps(settings.out, assembled, fit, held, seed=settings.seed, state=state, report=report)
        return Fitted(float(state.epoch), state.best_epoch, self.task.shown(state.best_score), also)

    # ---------------------------------------------------------------------------------------------- testing

    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Tested:  # noqa: ARG002
        """Loss and perplexity on every test row; what the model writes for some of them."""
        if not self._test.rows.sequences:
            return Tested(self.metric, None, {}, {}, 0, [])
        found = outputs(assembled, self._test, counter(report))
        loss = -self.task.score(found, self._test.targets)[0]
        scores = {"perplexity": perplexity(loss), "loss": loss}
        intervals = {}
        if spread := mean_interval(found[:, 0].tolist(), [int(count) for count in found[:, 1].tolist()]):
            intervals["perplexity"] = (perplexity(spread[0]), perplexity(spread[1]))
        counts = RowCounts.of(metric("perplexity"), found.numpy())
        predictions = self._write(assembled, report)
        if self._has_answers:
            report({"kind": "stage", "text": "answering test rows"})
            answers = answer_rows(assembled, self.data.test, self.settings.answers, self.decoding, counter(report))
            scores |= answers.scores
            intervals |= answers.intervals
            test = self.data.test
            predictions = [
                {
                    "line": test.lines[row],
                    "prompt": question_of(test.samples[row]),
                    "expected": expected,
                    "written": written,
                }
                for row, expected, written in zip(answers.rows, answers.expected, answers.written, strict=True)
            ]
        name = self.metric if self.metric in scores else "perplexity"
        if name == "exact_match":
            counts = answers.counts
        return Tested(name, scores[name], scores, intervals, len(counts.counts), predictions, counts)

    def _write(self, assembled: Assembled, report: Reporter) -> list[dict[str, object]]:
        """How the model goes on with the start of the first test texts, where no row has an answer."""
        if self._has_answers or not self.settings.answers:
            return []
        report({"kind": "stage", "text": "going on with test texts"})
        chosen = random.Random(self.settings.seed).sample(
            range(len(self._test.rows.sequences)), min(_SHOWN, len(self._test.rows.sequences))
        )
        texts = [self._test.rows.sequences[row] for row in sorted(chosen)]
        starts = [ids[: max(1, min(_SHOWN_TOKENS // 2, len(ids) // 2))] for ids in texts]
        written = generate(assembled, starts, self.decoding)
        return [
            {"prompt": self.task.decode(ids), "expected": None, "written": text}
            for ids, text in zip(starts, written, strict=True)
        ]

    @property
    def _has_answers(self) -> bool:
        return self.settings.answers > 0 and any(answer_of(sample) is not None for sample in self.data.test.samples)

    # ---------------------------------------------------------------------------------------------- the data

    def _make_task(self, settings: TrainSettings, method: MethodSettings, samples: Samples) -> Generation:
        task = generation_task(
            self.source,
            settings.max_length,
            0,
            learn=settings.learn,
            separator=_separator(samples),
            chat=any(isinstance(sample, Conversation) for sample in samples.samples),
            trust=settings.trust_remote_code,
        )
        self._tokenizer = task.tokenizer
        prompts = self.candidates or [text for text in [getattr(method, "init_text", None)] if text is not None]
        lengths = [len(self._tokens_of(text)) for text in prompts]
        virtual = getattr(method, "num_virtual_tokens", None) or max(lengths, default=0)
        # once more, now that the longest prompt's length is known: it takes room from the text
        return generation_task(
            self.source,
            settings.max_length,
            virtual,
            learn=settings.learn,
            separator=task.separator,
            chat=task.chat,
            trust=settings.trust_remote_code,
        )

    def _tokens_of(self, text: str) -> list[int]:
        tokens = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not tokens:
            raise SettingError(f"the prompt {text!r}: the tokenizer makes no token of it. Give words.")
        return tokens

    def _examples(self, encoded: Sequence[Sequence[Encoded]], samples: Samples) -> tuple[Examples, list[str]]:
        """Every sequence that something is learned from, and for each the group that must stay on one side."""
        chosen, groups = [], []
        for number, of_sample in enumerate(encoded):
            running = len(samples) <= 1
            for part, one in enumerate(of_sample):
                if one.tokens_in_loss:
                    chosen.append(one)
                    groups.append(f"window {number} {part}" if running else normalised(asked(samples.samples[number])))
        if encoded and not chosen:
            raise DataError(
                f"{samples.source}: no row has anything to learn within {self.task.max_length} tokens. Give shorter "
                "prompts, a larger --max-length, or a base with a longer context."
            )
        rows = TokenRows([one.ids for one in chosen], self.task.pad_id)
        return Examples(rows, [one.labels for one in chosen]), groups

    def _how_to_answer(self, settings: TrainSettings) -> tuple[DecodingSettings, str]:
        """As many tokens as the longest training answer and some more; and what is the score to compare by."""
        if not self._has_answers:
            return DecodingSettings(max_tokens=_SHOWN_TOKENS, seed=settings.seed), "perplexity"
        lengths = [sum(label != IGNORE_INDEX for label in labels) for labels in self.train.targets]
        longest = min(1024, int(1.25 * max(lengths)) + 8)
        metric = "exact_match" if statistics.median(lengths) <= _SHORT_ANSWER else "perplexity"
        return DecodingSettings(max_tokens=longest, seed=settings.seed), metric


def _refuse_what_is_for_labels(settings: TrainSettings, method: MethodSettings) -> None:
    for name in ("text_column", "label_column"):
        if getattr(settings, name) is not None:
            flag = name.replace("_", "-")
            raise SettingError(f"--{flag} is for labelled text; this data is text to write. Use --prompt-template.")
    if isinstance(method, FeatureExtractionSettings) and method.trainable_layers == 0:
        raise SettingError("--trainable-layers 0 trains a head alone, and text has none of its own; give 1 or more.")
    if isinstance(method, PromptTuningSettings) and method.init == "labels":
        raise SettingError("--init labels: this data is text to write and has no labels. Give vocabulary or text.")


def _read_candidates(method: MethodSettings) -> list[str]:
    """Prompts that people wrote, one a line; a typed \\n stands for a line break."""
    name = getattr(method, "candidates", None)
    if name is None:
        return []
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--candidates {name}: cannot be read as UTF-8 text ({error}). Give a text file.") from None
    found = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not found:
        raise SettingError(f"--candidates {name}: holds no prompt. Write one on each line.")
    return list(dict.fromkeys(found))


def _separator(samples: Samples) -> str:
    """What parts prompt and completion: a line break, unless most pairs have white space there already."""
    pairs = [sample for sample in samples.samples if isinstance(sample, Pair)]
    parted = sum(pair.prompt[-1:].isspace() or pair.completion[:1].isspace() for pair in pairs)
    return "\n" if pairs and parted <= len(pairs) / 2 else ""


def _end_of(windows: Sequence[Encoded], fraction: float) -> tuple[list[list[Encoded]], list[list[Encoded]]]:
    """The windows of one text, and as test the last ``fraction`` of them."""
    kept = len(windows) - round(fraction * len(windows))
    if fraction and kept == len(windows):
        raise DataError("the text is too short for a test at its end. Give a longer text, or --test-fraction 0.")
    return [list(windows[:kept])], [list(windows[kept:])] if kept < len(windows) else []
