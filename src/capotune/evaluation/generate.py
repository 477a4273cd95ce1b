"""Text from a language model: many prompts in batches, or one in pieces as they are written.

Decoding is Transformers' ``generate``. Its configuration is made here: what a model folder's ``generation_config.json``
asks for (many set a temperature or a repetition penalty) does not apply, so equal settings mean the same on every base.

A batch is padded on the left; a soft prompt's virtual tokens stand inside the padding, right before their text:

    pad pad virtual virtual text text text → answer

The padding is not computed where a model can do without (``prefill``), and rows leave a batch once they are done
(``leaving``). The next token is chosen as ``choosing`` says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from queue import SimpleQueue
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from capotune.adapters.assemble import Assembled
from capotune.errors import SettingError
from capotune.evaluation.choosing import check_choosing, processors
from capotune.evaluation.leaving import ByRow, can_leave, write_leaving
from capotune.evaluation.prefill import can_read_packed, read_packed
from capotune.kernels import policy
from capotune.models.base import longest_input
from capotune.models.sequence_packing import TOLERANCE, changes_beyond
from capotune.settings import DecodingSettings


def generate(
    assembled: Assembled,
    prompts: Sequence[list[int]],
    decoding: DecodingSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The text that the model writes after each prompt (token ids), in the prompts' order, without the prompt.

    ``progress`` is called with (prompts answered, all prompts), also after every token: an exception in it stops the
    model. Raises ``SettingError`` for a prompt that leaves no token in the model's context, an empty one that the model
    cannot start from, and settings that exclude each other.
    """
    _check(decoding)
    answers = [""] * len(prompts)
    done, how = 0, _ways(assembled, prompts, decoding)
    for rows, tokens in _batches(assembled, prompts, decoding, how):
        alive = [_Alive(partial(progress, done, len(prompts)))] if progress else []
        written = _write(assembled, [prompts[row] for row in rows], rows, decoding, tokens, *alive, how=how)
        for row, ids in zip(rows, written, strict=True):
            answers[row] = _Cut(assembled.task, prompts[row], decoding.stop).text(ids)
        done += len(rows)
        if progress:
            progress(done, len(prompts))
    return answers


def stream(assembled: Assembled, prompt: list[int], decoding: DecodingSettings) -> Iterator[str]:
    """The text that ``generate`` gives for one prompt, piece by piece as it is written.

    A piece never ends inside a character, and no part of a stop string is given away. Closing the iterator, or an
    exception such as ``KeyboardInterrupt`` in it, stops the model after the token in flight. Beam search knows its text
    only at the end: it comes as one piece. Raises as ``generate``, at once.
    """
    _check(decoding)
    tokens = _allowed(assembled, prompt, decoding, "the prompt")
    if decoding.num_beams > 1:
        return (text for text in generate(assembled, [prompt], decoding))  # which can be closed, as other iterators
    return _pieces(assembled, prompt, decoding, tokens)


def context_length(assembled: Assembled) -> int:
    """Most tokens that the model can hold: soft prompt, prompt and answer together."""
    return longest_input(assembled.task.tokenizer, assembled.model.config.get_text_config())


def tokens_left(assembled: Assembled, prompt: list[int]) -> int:
    """Tokens that the context leaves for an answer to a prompt; none or fewer when it is too long."""
    return context_length(assembled) - len(assembled.method.virtual_token_ids) - len(prompt)


def _pieces(assembled: Assembled, prompt: list[int], decoding: DecodingSettings, tokens: int) -> Iterator[str]:
    relay, cut, shown, ids = _Relay(), _Cut(assembled.task, prompt, decoding.stop), "", list[int]()
    with ThreadPoolExecutor(1, thread_name_prefix="capotune-stream") as pool:  # waits for the thread when left
        writing = pool.submit(relay.run, lambda: _write(assembled, [prompt], [0], decoding, tokens, relay, how=_Ways()))
        try:
            while (token := relay.queue.get()) is not None:
                ids.append(token)
                ready = cut.ready(ids)
                if len(ready) > len(shown) and ready.startswith(shown):
                    yield ready[len(shown) :]
                    shown = ready
            writing.result()  # raises here what was raised there
        finally:
            relay.stopped.set()
    if rest := cut.text(ids)[len(shown) :]:
        yield rest


class _Alive(StoppingCriteria):  # type: ignore[misc]
    """Calls a function after every token."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """ids (rows, tokens so far) → no row is done (rows,)."""
        self.call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Relay(StoppingCriteria):  # type: ignore[misc]
    """Hands each new token to another thread, and stops the decoding when told to."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        """Tokens in order; None: there are no more."""
        self.stopped = threading.Event()

    def run(self, write: Callable[[], Any]) -> None:
        """Call ``write``; whatever becomes of it, the reader hears of the end."""
        try:
            write()
        finally:
            self.queue.put(None)

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """ids (rows, tokens so far) → which rows are done (rows,)."""
        self.queue.put(int(input_ids[0, -1]))
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class _Cut:
    """What an answer reads like after its prompt, and where it ends: before an end token, before a stop string."""

    task: Any
    prompt: Sequence[int]
    stop: tuple[str, ...]

    def text(self, ids: Sequence[int]) -> str:
        """The answer in ``ids``, which may go on after its end."""
        return self._before_stop(self._decode(ids))

    def ready(self, ids: Sequence[int]) -> str:
        """The part of the answer that no later token can change: no half character, no beginning of a stop string."""
        whole = self._decode(self.task.without_open_bytes(ids))
        if (text := self._before_stop(whole)) != whole:
            return text
        text = whole.rstrip("\ufffd")  # what the bytes of an unfinished character decode to
        begun = [
            size for one in self.stop for size in range(1, min(len(one), len(text) + 1)) if text.endswith(one[:size])
        ]
        return text[: len(text) - max(begun, default=0)]

    def stopped(self, ids: Sequence[int]) -> bool:
        """Whether a stop string stands in the answer."""
        text = self._decode(ids)
        return any(one in text for one in self.stop)

    def _before_stop(self, text: str) -> str:
        return text[: min((at for one in self.stop if (at := text.find(one)) >= 0), default=len(text))]

    def _decode(self, ids: Sequence[int]) -> str:
        end = next((at for at, token in enumerate(ids) if token in self._ends), len(ids))
        decoded: str = self.task.decode_after(self.prompt, list(ids[:end]))
        return decoded

    @cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(_ends(self.task, self.stop))


@dataclass(frozen=True)
class _AtStop(StoppingCriteria, ByRow):  # type: ignore[misc]
    """A row is done when one of the stop strings stands in its answer."""

    cuts: Sequence[_Cut]
    """One for each row."""
    start: int
    """Where answers begin in the batch."""

    def of(self, rows: Sequence[int]) -> _AtStop:
        """The same for these rows."""
        return _AtStop([self.cuts[row] for row in rows], self.start)

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """ids (rows, tokens so far) → which rows are done (rows,)."""
        answers = input_ids[:, self.start :].tolist()
        done = [cut.stopped(ids) for cut, ids in zip(self.cuts, answers, strict=True)]
        return torch.tensor(done, device=input_ids.device)


@dataclass(frozen=True)
class _Ways:
    """How prompts are answered together."""

    equal_lengths: bool = False
    """Only equally long ones are: the model reads padding."""
    leaving: bool = False
    """Rows leave their batch when they are done."""
    packed: bool = False
    """Prompts are read without padding; rows then leave, which was tried with it."""


def _ways(assembled: Assembled, prompts: Sequence[list[int]], decoding: DecodingSettings) -> _Ways:
    """Found by trying, what is best first. With beams rows belong together, and few are not worth more than they
    need."""
    padded = len(set(map(len, prompts))) > 1
    many = len(prompts) >= policy.LEAVING_FROM_ROWS and decoding.num_beams == 1
    with _own_configuration(assembled.model):
        if many and padded and can_read_packed(assembled):
            return _Ways(leaving=True, packed=True)
        return _Ways(
            equal_lengths=padded and _reads_padding(assembled),
            leaving=many and can_leave(assembled.model, assembled.task.pad_id),
        )


def _check(decoding: DecodingSettings) -> None:
    check_choosing(decoding)
    if "" in decoding.stop:
        raise SettingError(
            "an empty text would end every answer at once.", setting="stop", advice="Give at least one character."
        )


def _allowed(
    assembled: Assembled, prompt: list[int], decoding: DecodingSettings, name: str, advice: str = "Shorten it."
) -> int:
    """Most tokens to write after a prompt, which a message calls ``name``; ``advice`` is for one that is too long."""
    if not prompt and not assembled.method.virtual_token_ids:
        raise SettingError(
            f"{name} is empty, and this model has no token that starts a text.", advice="Give at least one word."
        )
    left = tokens_left(assembled, prompt)
    if left < 1:
        virtual = len(assembled.method.virtual_token_ids)
        soft = f" and the soft prompt {virtual}" if virtual else ""
        raise SettingError(
            f"{name} is too long: it has {len(prompt):,} tokens{soft}, and the model holds "
            f"{context_length(assembled):,}. At most {len(prompt) + left - 1:,} leave tokens for an answer.",
            advice=advice,
        )
    return min(left, decoding.max_tokens)


def _batches(
    assembled: Assembled, prompts: Sequence[list[int]], decoding: DecodingSettings, how: _Ways
) -> Iterator[tuple[list[int], int]]:
    """(positions of the prompts, most tokens to write), longest first; a batch's prompts have as many tokens left."""
    names = ["the prompt"] if len(prompts) == 1 else [f"prompt {number + 1}" for number in range(len(prompts))]
    others = sum(tokens_left(assembled, prompt) < 1 for prompt in prompts) - 1
    advice = f"Shorten it, and {others:,} more of the {len(prompts):,} prompts." if others > 0 else "Shorten it."
    tokens = [_allowed(assembled, prompt, decoding, name, advice) for prompt, name in zip(prompts, names, strict=True)]
    virtual, batch = len(assembled.method.virtual_token_ids), list[int]()
    for row in sorted(range(len(prompts)), key=lambda row: (tokens[row], -len(prompts[row]))):
        if batch:
            width = virtual + len(prompts[batch[0]]) + tokens[row]
            together = (len(batch) + 1) * width * decoding.num_beams
            apart = how.equal_lengths and len(prompts[row]) != len(prompts[batch[0]])
            if apart or tokens[row] != tokens[batch[0]] or together > policy.GENERATE_TOKENS_AT_ONCE:
                yield batch, tokens[batch[0]]
                batch = []
        batch.append(row)
    if batch:
        yield batch, tokens[batch[0]]


@torch.no_grad()
def _reads_padding(assembled: Assembled) -> bool:
    """Whether padding before a prompt changes what the model writes: where masks are not for all of its parts (RWKV),
    or are laid elsewhere once there is a cache (GIT), where blocks of tokens are compressed (DeepSeek-V4), and where
    the longest row of a batch decides how all are placed (longrope)."""
    model, pad = assembled.model, assembled.task.pad_id
    if changes_beyond(model.config.get_text_config()) is not None:
        return True
    twice = GenerationConfig(max_new_tokens=2, pad_token_id=pad, output_logits=True, return_dict_in_generate=True)
    words, found = [token for token in range(1, 11) if token != pad], list[torch.Tensor]()
    for padding in (0, 2):
        ids = torch.tensor([[pad] * padding + words], device=model.device)
        mask = torch.tensor([[0] * padding + [1] * len(words)], device=model.device)
        written = model.generate(
            ids,
            attention_mask=mask,
            generation_config=twice,
            prefix_allowed_tokens_fn=lambda *_: words[:1],  # the same first token, so that the second compares
        )
        found.append(torch.cat(written.logits).float())
    alone, padded = found
    return bool(((alone - padded).abs().amax(1) > TOLERANCE.get(model.dtype, 1e-4) * alone.std(1)).any())


def _write(
    assembled: Assembled,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    decoding: DecodingSettings,
    tokens: int,
    *criteria: StoppingCriteria,
    how: _Ways,
) -> list[list[int]]:
    """The ids that the model writes after each prompt of a batch; padding or more may follow an answer's end."""
    task: Any = assembled.task
    model: Any = assembled.model
    whole = [[*assembled.method.virtual_token_ids, *prompt] for prompt in prompts]
    width = max(map(len, whole))
    input_ids = torch.tensor([[task.pad_id] * (width - len(ids)) + ids for ids in whole])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in whole])
    if decoding.stop:
        cuts = [_Cut(task, prompt, decoding.stop) for prompt in prompts for _ in range(decoding.num_beams)]
        criteria = (*criteria, _AtStop(cuts, width))
    configuration = _configuration(task, decoding, tokens)
    chosen = processors(decoding, rows, [width - len(prompt) for prompt in prompts])
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    with _own_configuration(model):
        if how.leaving and configuration.use_cache:
            is_padded = len(set(map(len, whole))) > 1
            cache = read_packed(assembled, whole) if how.packed and is_padded else None
            return write_leaving(model, input_ids, mask, configuration, chosen, criteria, cache)
        written = model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=configuration,
            logits_processor=LogitsProcessorList(chosen),
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    ids: list[list[int]] = written[:, width:].tolist()
    return ids


def _configuration(task: Any, decoding: DecodingSettings, tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,  # ``choosing`` draws
        num_beams=decoding.num_beams,
        eos_token_id=_ends(task, decoding.stop) or None,
        pad_token_id=task.pad_id,
        use_cache=True,
    )


def _ends(task: Any, stop: Sequence[str]) -> list[int]:
    """Tokens that end an answer: the task's own, and stop strings that name a special token, which no text shows."""
    return [*task.end_ids, *task.special_ids(stop)]


@contextmanager
def _own_configuration(model: Any) -> Iterator[None]:
    """The folder's generation settings set aside: ``generate`` fills in from them whatever is left open."""
    folders = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = folders
