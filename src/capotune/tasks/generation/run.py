"""A run that trains a language model to write: find the best hard prompt where some are given, train in steps, test."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.encoded_rows import EncodedRows
from capotune.data.generation import load_samples
from capotune.data.inspect.samples import inspect_samples
from capotune.data.samples import Samples
from capotune.data.split import hold_out
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Recording, how_it_went, train_recorded, with_boundary
from capotune.engine.state import start
from capotune.errors import DataError, SettingError, quoted
from capotune.evaluation.forward import Examples, held_out_score
from capotune.evaluation.generate import generate
from capotune.events import DataInspected, Progress, Reporter, Stage, alive, counter
from capotune.methods import make
from capotune.models.base import Base
from capotune.models.tokenizer_files import tokens_of
from capotune.settings import DecodingSettings, TrainingSettings, TrainSettings
from capotune.tasks.base import Fitted, Scored, TaskRun, held_out_fraction
from capotune.tasks.generation.deciding import decide_by_data, decide_together, matched_share
from capotune.tasks.generation.general import GeneralText, positions_for
from capotune.tasks.generation.giving_back import give_back
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.score import ScoredAs, score_samples
from capotune.tasks.generation.task import Generation
from capotune.tasks.generation.token_cache import encoded_once

_SHOWN = 5  # prompts whose answers stand side by side on the page
_SHOWN_TOKENS = 96  # of a text that goes on, where there is no answer to tell how long one is


class GenerationRun(TaskRun):
    """Text to write, tokenised and split."""

    task: Generation

    def __init__(self, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> None:
        self.seed = settings.seed
        self.candidates = method.candidate_prompts()
        self.tried: list[dict[str, object]] = []
        self.why = ""  # what speaks against exact match, where techniques are not compared by it
        self.data = data = load_samples(
            settings.data,
            test=settings.test,
            prompt_template=settings.prompt_template,
            completion_column=settings.completion_column,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
        )
        self.task = task = self._task_on(base, settings, method, data.train)
        notices = Notices()
        train, self.test_rows = (encoded_once(task, rows, notices, report) for rows in (data.train, data.test))
        found = inspect_samples(
            data,
            train,
            self.test_rows,
            max_length=task.max_length,
            base_length=base.max_length,
            text_of=partial(task.decode, special_tokens=True),
            template_from=task.template_from,
            learn=task.learn,
            notices=list(notices.sentences()),
        )
        report(DataInspected(task=task.name, report=asdict(found)))
        if not data.test.samples and data.train.is_one_text:  # its end is the test
            train, self.test_rows = _end_of(train, settings.test_fraction, str(data.train.source))
        self.train, groups = self._examples(train, data.train)
        self._answer_lengths = train.of_each("in_loss")[train.of_each("in_loss") > 0]
        if not len(groups) or (groups == groups[0]).all():
            raise DataError(
                "one row is not enough: none can be held out to see when to stop.",
                where=str(data.train.source),
                advice="Add rows, or give a text of several windows; a smaller `max_length` makes more of them.",
            )
        fraction = held_out_fraction(settings.validation_fraction, len(groups))
        fit, held = hold_out(np.zeros(len(groups), dtype=np.int64), fraction, settings.seed, groups)
        self.fit_rows, self.held_rows = torch.as_tensor(fit), torch.as_tensor(held)
        self.train_rows = len(self.train.rows.sequences)
        tests = TokenRows(self.test_rows.ids_of(self.test_rows.with_loss), task.pad_id)
        if data.test.samples and not tests.sequences:
            raise DataError(
                f"no test row has a token to score within {task.max_length:,} tokens.",
                where=str(data.test.source),
                advice="Give shorter prompts, a larger `max_length`, or a base with a longer context.",
            )
        self.data_sha256 = f"{self.train.rows.digest()[:32]}{tests.digest()[:32]}"
        positions = positions_for(sum(self.train.rows.lengths))
        self.general = GeneralText.read(task, settings.general, positions)
        self.task = replace(task, scored_as=replace(self._scored_as(settings), general=positions))
        texts = {"candidates": self.candidates, "general": self.general.sequences if settings.general else []}
        self.files_sha256 = {name: _hash(content) for name, content in texts.items() if content}

    # ---------------------------------------------------------------------------------------------- before training

    def choose_prompt(self, assembled: Assembled, report: Reporter) -> Assembled:
        """Of hard prompts, take the best: the one with the least loss on the held-out rows."""
        if not self.candidates:
            return assembled
        report(Stage(text=f"scoring {len(self.candidates)} hard prompts"))
        held = self.train.take(self.held_rows)
        losses: list[tuple[float, str]] = []
        for number, text in enumerate(self.candidates):
            (score,) = held_out_score(assembled, held.after(self._tokens_of(text)), alive(report))
            losses.append((-score, text))
            self.tried.append({"prompt": text, "held_out_loss": -score})
            report(Progress(done=number + 1, total=len(self.candidates)))
        _, best = min(losses)
        report(Stage(text=f"the best hard prompt is {best!r}"))
        chosen = assembled.method.settings.with_prompt(best, len(self._tokens_of(best)))
        return replace(assembled, method=make(chosen))

    def start_tokens(self, method: TrainingSettings) -> list[int]:
        """The tokens of a text, or all that occur in the training rows."""
        if method.starts_from is None:
            return []
        if method.start_text is not None:
            return self._tokens_of(method.start_text)
        return sorted(set().union(*map(set, self.train.rows.sequences)))

    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:  # noqa: ARG002
        """The same as any adapter's; the method is not attached yet, so it has no part in it."""
        return self._score(assembled.bare(), report)

    def measure_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:
        """Its next tokens on general text; once for all runs that read the same, unless nothing is to be stored."""
        if not self.general.sequences:
            return
        report(Stage(text="reading general text with the base"))
        rows = TokenRows(self.general.sequences, self.task.pad_id)
        read = partial(self.general.next_tokens_of_base, assembled, alive(report))
        self.base_next_tokens = cache.features(rows, read, what="next tokens")

    # ---------------------------------------------------------------------------------------------- training

    def fit(
        self,
        recording: Recording,
        assembled: Assembled,
        cache: ActivationCache,
        report: Reporter,
    ) -> Fitted:
        """Train in steps; a hard prompt stays as it is."""
        self.train = self.train.after(assembled.method.virtual_token_ids)
        extra: dict[str, Any] = {"candidates": self.tried} if self.tried else {}
        shown = self.task.objective.shown
        if not assembled.method.settings.trains:
            score = held_out_score(assembled, self.train.take(self.held_rows), alive(report))
            return Fitted(0.0, 0, shown(score), extra)
        parts = [self.train.take(rows) for rows in (self.fit_rows, self.held_rows)]
        fit, held = with_boundary(parts, assembled, cache, report)
        state = recording.state or start(assembled, held_out_score(assembled, held, alive(report)), self.seed)
        state = train_recorded(recording, assembled, fit, held, seed=self.seed, state=state, report=report)
        extra |= how_it_went(state)
        score, part = give_back(assembled, held, state.best_score, report)
        if part is not None:  # the held-out score is of this part then, and not of the best epoch
            extra["part_of_change"] = part
        return Fitted(float(state.epoch), state.best_epoch, shown(score), extra)

    # ---------------------------------------------------------------------------------------------- testing

    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:  # noqa: ARG002
        """Loss and perplexity on every test row; what the model writes for some of them. Before that it is decided by
        which score techniques are compared; last, what training cost on general text."""
        scored_as = self.task.scored_as
        recorded: dict[str, Any] = {"metric_why": self.why} if self.why else {}
        if scored_as.metric == "exact_match":
            report(Stage(text="scoring the held-out rows"))
            share, rows = matched_share(assembled, self.train.take(self.held_rows), alive(report))
            metric, why = decide_together({assembled.method.name: share}, rows)
            recorded = {"metric_why": why, "held_out_exact_match": share, "held_out_rows": rows}
            self.task = replace(self.task, scored_as=replace(scored_as, metric=metric))
        scored = self._score(assembled, report)
        if not self.general.sequences:
            return replace(scored, recorded=recorded)
        report(Stage(text="reading general text with the adapter"))
        cost = self.general.cost(self.base_next_tokens, self.general.next_tokens(assembled, alive(report)))
        return replace(scored, recorded=recorded | {"general": cost.to_json()})

    def _score(self, assembled: Assembled, report: Reporter) -> Scored:
        scored = score_samples(assembled, self.test_rows, self.data.test, self.task.scored_as, report)
        if scored.predictions or not scored.rows or not self.task.scored_as.answers:
            return scored
        return replace(scored, predictions=self._continuations(assembled, report))

    def _continuations(self, assembled: Assembled, report: Reporter) -> list[dict[str, Any]]:
        """How the model continues the start of a few test texts, where no row has an answer."""
        report(Stage(text="continuing test texts"))
        texts = self.test_rows.ids_of(self.test_rows.with_loss)
        chosen = random.Random(self.seed).sample(range(len(texts)), min(_SHOWN, len(texts)))
        starts = [texts[row][: max(1, min(_SHOWN_TOKENS // 2, len(texts[row]) // 2))] for row in sorted(chosen)]
        written = generate(assembled, starts, self.task.scored_as.decoding, counter(report))
        return [
            {"prompt": self.task.decode(ids), "expected": None, "written": text}
            for ids, text in zip(starts, written, strict=True)
        ]

    # ---------------------------------------------------------------------------------------------- the data

    def _task_on(self, base: Base, settings: TrainSettings, method: TrainingSettings, samples: Samples) -> Generation:
        self._base = base
        texts = self.candidates or [text for text in [method.start_text] if text is not None]
        longest = max((len(self._tokens_of(text)) for text in texts), default=0)
        return Generation.on(
            base,
            settings.max_length,
            method.virtual_tokens or longest,  # the prompt takes tokens from the text
            learn=settings.learn,
            chat=samples.are_conversations,
        )

    def _tokens_of(self, text: str) -> list[int]:
        tokens = list(tokens_of(self._base.tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"])
        if not tokens:
            raise SettingError(f"the prompt {quoted(text)}: the tokenizer makes no token of it.", advice="Give words.")
        self._base.check_tokens(tokens, f"the prompt {quoted(text)}")
        return tokens

    def _examples(self, encoded: EncodedRows, samples: Samples) -> tuple[Examples, NDArray[Any]]:
        """Every sequence with a token in the loss, and for each the group that must stay on one side."""
        chosen = encoded.with_loss
        numbers = encoded.rows_of(chosen)
        if len(encoded) and not len(chosen):
            raise DataError(
                f"no row has a token to train on within {self.task.max_length} tokens.",
                where=str(samples.source),
                advice="Give shorter prompts, a larger `max_length`, or a base with a longer context.",
            )
        groups = chosen if samples.is_one_text else samples.facts["question"][numbers]
        rows = TokenRows(encoded.ids_of(chosen), self.task.pad_id)
        return Examples(rows, encoded.labels_of(chosen), where=lambda at: samples.where(int(numbers[at]))), groups

    def _scored_as(self, settings: TrainSettings) -> ScoredAs:
        """As many tokens as the longest training answer and some more; and what is the score to compare by."""
        has_answers = bool(self.data.test.facts["answered"].any())
        if not settings.answers or not has_answers:
            return ScoredAs(DecodingSettings(max_tokens=_SHOWN_TOKENS, seed=settings.seed), settings.answers)
        longest = min(1024, int(1.25 * self._answer_lengths.max()) + 8)
        decoding = DecodingSettings(max_tokens=longest, seed=settings.seed)
        metric, self.why = decide_by_data(self.data.train, self._answer_lengths)
        return ScoredAs(decoding, settings.answers, metric)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _end_of(windows: EncodedRows, fraction: float, source: str) -> tuple[EncodedRows, EncodedRows]:
    """The windows of one text, and as test the last ``fraction`` of them."""
    number = len(windows.lengths)
    count = number - round(fraction * number)
    if fraction and count == number:
        raise DataError(
            "the text is too short for a test at its end.",
            where=source,
            advice="Give a longer text, or `test_fraction=0`.",
        )
    return windows.divided(count)
