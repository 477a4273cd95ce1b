"""Decoding: batches, soft prompts, stop strings, streaming, draws. Tiny random models against a plain loop."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from decoding_models import CONTEXT, END, LETTERS, PAD, SPECIAL, VOCABULARY, make, prompts, settings, stand_in
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from capotune.adapters.assemble import assemble, attach
from capotune.errors import SettingError
from capotune.evaluation import generate as module
from capotune.evaluation import prefill
from capotune.evaluation.generate import context_length, generate, stream
from capotune.kernels import policy
from capotune.methods.base import Start
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import EMBEDDED, embedded_file, find
from capotune.tasks.generation.task import Generation


@torch.no_grad()
def argmax_loop(assembled: Any, prompt: list[int], tokens: int) -> str:
    """Greedy decoding as one writes it down: no cache, no padding, one row."""
    start = [*assembled.method.virtual_token_ids, *prompt]
    ids = list(start)
    for _ in range(tokens):
        choice = int(assembled.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if choice in assembled.task.end_ids:
            break
        ids.append(choice)
    decoded: str = assembled.task.decode_after(prompt, ids[len(start) :])
    return decoded


# Greedy: every way to the same text


@pytest.mark.parametrize(
    ("kind", "virtual", "deep"),
    [*((kind, *prompt) for kind in ("llama", "gpt2") for prompt in ((0, False), (5, False), (5, True))),
     ("windowed", 0, False), ("windowed", 5, True)],
)  # fmt: skip
def test_batched_one_by_one_streamed_and_without_cache_equal_a_plain_loop(
    kind: str, virtual: int, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled, rows = make(kind, virtual, ends=(END, 5, 9), deep=deep), prompts(9)
    expected = [argmax_loop(assembled, row, 10) for row in rows]
    assert len(set(expected)) > 5, "the model says the same to everything; nothing is tested"
    assert len({len(text) for text in expected}) > 1, "no answer ended early"
    assert generate(assembled, rows, settings()) == expected
    assert [generate(assembled, [row], settings())[0] for row in rows] == expected
    assert ["".join(stream(assembled, row, settings())) for row in rows] == expected
    original = module._configuration

    def without_cache(*arguments: Any) -> GenerationConfig:
        configuration = original(*arguments)
        configuration.use_cache = False
        return configuration

    monkeypatch.setattr(module, "_configuration", without_cache)
    assert generate(assembled, rows, settings()) == expected


@pytest.mark.parametrize(("kind", "virtual"), [("llama", 0), ("llama", 4), ("gpt2", 0), ("windowed", 0)])
def test_prompts_of_a_batch_are_read_without_padding(kind: str, virtual: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assembled, rows = make(kind, virtual, ends=()), prompts(9)
    computed: list[int] = []
    assembled.model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, given: computed.append(given[0].numel())
    )
    written = generate(assembled, rows, settings(max_tokens=3))
    of_prompts = sum(len(row) + virtual - 1 for row in rows)  # all but each one's last token, which writes the first
    assert computed[-4:] == [of_prompts, len(rows), len(rows), len(rows)]
    monkeypatch.setattr(policy, "LEAVING_FROM_ROWS", 10)
    assert written == generate(assembled, rows, settings(max_tokens=3))
    assert computed[-3:] == [len(rows) * (virtual + max(map(len, rows))), len(rows), len(rows)]


def test_prompts_are_padded_where_packing_changes_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assembled, rows = make("llama", ends=()), prompts(9)
    expected = generate(assembled, rows, settings())
    read = prefill.read_packed

    def wrong(*arguments: Any) -> Any:
        cache = read(*arguments)
        cache.layers[1].values.mul_(1.01)
        return cache

    monkeypatch.setattr(prefill, "read_packed", wrong)
    assert not prefill.can_read_packed(assembled)
    monkeypatch.setattr(module, "read_packed", wrong)
    assert generate(assembled, rows, settings()) == expected


def test_deep_prompts_are_padded_without_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    assembled = make("llama", 5, ends=(), deep=True)
    monkeypatch.setattr(prefill, "read_packed", lambda *_: pytest.fail("it was tried"))
    assert not prefill.can_read_packed(assembled)


SMOLLM2 = embedded_file("smollm2") is not None


@pytest.mark.skipif(not SMOLLM2, reason=f"not installed: {EMBEDDED['smollm2'].command}")
def test_smollm2_with_an_adapter_writes_the_same_batched_one_by_one_and_without_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Generation.on(find("smollm2"), None, 0)
    assembled = assemble(task, LoraSettings(learning_rate=1e-3, epochs=1), device=torch.device("cpu"))
    attach(assembled, Start(torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for weight in assembled.method.parameters().values():
            weight.normal_(0, 0.002, generator=torch.Generator().manual_seed(len(weight)))
    texts = ("The capital of France is", "1, 2, 3,", "A poem about the sea, in four short lines:")
    rows = [task.encode_prompt(text) for text in texts]
    monkeypatch.setattr(policy, "LEAVING_FROM_ROWS", 2)
    assert prefill.can_read_packed(assembled)
    written = generate(assembled, rows, settings(max_tokens=4))
    assert [generate(assembled, [row], settings(max_tokens=4))[0] for row in rows] == written
    expected = [argmax_loop(assembled, row, 4) for row in rows]
    assert written == expected


def test_a_soft_prompt_changes_the_text() -> None:
    rows = prompts(4)
    assert generate(make("llama", 5), rows, settings()) != generate(make("llama"), rows, settings())


def test_any_end_token_ends_and_none_is_shown() -> None:
    rows = prompts(9)
    assembled = make("llama", ends=(5, 9, END))
    texts = generate(assembled, rows, settings(max_tokens=20))
    assert texts == [argmax_loop(assembled, row, 20) for row in rows]
    assert not any(LETTERS[token] in text for text in texts for token in (5, 9))
    assert any(len(text) < 20 for text in texts)


def test_every_stream_can_be_closed() -> None:
    for values in ({}, {"num_beams": 2}):
        with closing(stream(make("llama"), [5, 6], settings(**values))) as pieces:  # type: ignore[type-var]
            assert next(pieces)


def test_a_stop_string_that_names_a_special_token_ends_as_an_end_token_does() -> None:
    rows = prompts(9)
    expected = [argmax_loop(make("llama", ends=(END, SPECIAL["<special>"])), row, 20) for row in rows]
    assembled, stopping = make("llama"), settings(max_tokens=20, stop=("<special>",))
    assert generate(assembled, rows, stopping) == expected != generate(assembled, rows, settings(max_tokens=20))
    assert ["".join(stream(assembled, row, stopping)) for row in rows] == expected


def test_without_end_tokens_it_writes_as_much_as_is_allowed() -> None:
    assembled = make("gpt2", ends=())
    assert [len(text) for text in generate(assembled, prompts(3), settings(max_tokens=7))] == [7, 7, 7]


def test_small_batches_give_the_same_text_in_the_given_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assembled, rows = make("llama", 3), prompts(11)
    whole = generate(assembled, rows, settings())
    sizes: list[int] = []
    original = module._write

    def counted(assembled: Any, prompts: Any, *rest: Any, **named: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        return original(assembled, prompts, *rest, **named)

    monkeypatch.setattr(module, "_write", counted)
    monkeypatch.setattr(policy, "GENERATE_TOKENS_AT_ONCE", 60)
    seen: list[tuple[int, int]] = []
    assert generate(assembled, rows, settings(), lambda done, total: seen.append((done, total))) == whole
    assert sum(sizes) == 11
    assert 2 <= max(sizes) <= 4
    assert seen[-1] == (11, 11)
    assert sorted({done for done, _ in seen}) == [sum(sizes[:at]) for at in range(len(sizes) + 1)]


def test_no_prompts_no_answers() -> None:
    assert generate(make("llama"), [], settings()) == []


# Beam search


@torch.no_grad()
def beam_on_vectors(assembled: Any, prompt: list[int], tokens: int, beams: int) -> str:
    """Transformers' beam search on embeddings with the soft prompt put before them, as PEFT does it."""
    model = assembled.model
    embedding = model.get_input_embeddings()
    vectors = torch.cat([embedding.prompt, embedding.base_layer(torch.tensor(prompt))])[None]
    configuration = GenerationConfig(
        max_new_tokens=tokens, num_beams=beams, do_sample=False, eos_token_id=END, pad_token_id=PAD
    )
    ids = model.generate(
        inputs_embeds=vectors, attention_mask=torch.ones(vectors.shape[:2], dtype=torch.long),
        generation_config=configuration,
    )[0].tolist()  # fmt: skip
    ids = ids[: ids.index(END)] if END in ids else ids
    decoded: str = assembled.task.decode(ids)
    return decoded


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_beam_search_with_a_soft_prompt_equals_beam_search_on_embeddings(kind: str) -> None:
    assembled, rows = make(kind, 5), prompts(6)
    expected = [beam_on_vectors(assembled, row, 8, 3) for row in rows]
    found = generate(assembled, rows, settings(max_tokens=8, num_beams=3))
    assert found == expected
    assert found != generate(assembled, rows, settings(max_tokens=8))
    assert list(stream(assembled, rows[0], settings(max_tokens=8, num_beams=3))) == [expected[0]]


# Draws


def test_a_seed_decides_the_text_whatever_batch_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assembled, rows = make("llama", 2), prompts(6)
    drawn = settings(temperature=1.5, seed=4)
    whole = generate(assembled, rows, drawn)
    assert whole == generate(assembled, rows, drawn)
    assert whole != generate(assembled, rows, settings(temperature=1.5, seed=5))
    assert "".join(stream(assembled, rows[0], drawn)) == whole[0]
    monkeypatch.setattr(policy, "GENERATE_TOKENS_AT_ONCE", 1)
    assert whole == generate(assembled, rows, drawn)


def test_equal_prompts_are_drawn_differently() -> None:
    assert len(set(generate(make("llama"), [[5, 6, 7]] * 6, settings(temperature=2.0)))) > 3


def test_the_callers_random_numbers_are_not_disturbed() -> None:
    assembled = make("llama")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    generate(assembled, prompts(3), settings(temperature=1.0))
    list(stream(assembled, prompts(1)[0], settings(temperature=1.0)))
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_drawn_tokens_have_the_models_distribution() -> None:
    """One token after the same prompt, many times: frequencies against softmax(logits / temperature), and top-p."""
    assembled, prompt, draws = make("llama", ends=()), [7, 20, 9], 4000
    logits = assembled.model(torch.tensor([prompt])).logits[0, -1] / 3.0
    expected = logits.softmax(0)
    order = expected.argsort(descending=True)
    kept = order[: int((expected[order].cumsum(0) < 0.8).sum()) + 1]
    narrowed = torch.zeros(VOCABULARY)
    narrowed[kept] = expected[kept] / expected[kept].sum()
    assert 5 < len(kept) < VOCABULARY
    for wanted, more in ((expected, {}), (narrowed, {"top_p": 0.8})):
        texts = generate(assembled, [prompt] * draws, settings(max_tokens=1, temperature=3.0, **more))
        found = torch.tensor([texts.count(letter) for letter in LETTERS[2:VOCABULARY]]) / draws
        error = (wanted[2:] * (1 - wanted[2:]) / draws).sqrt()
        assert ((found - wanted[2:]).abs() <= 5 * error + 1e-9).all()


def test_a_low_temperature_is_nearly_greedy() -> None:
    assembled, rows = make("llama"), prompts(5)
    assert generate(assembled, rows, settings(temperature=1e-4)) == generate(assembled, rows, settings())


# Room


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_end_where_the_context_ends(kind: str) -> None:
    assembled = make(kind, 4, ends=())
    rows = [[5] * size for size in (3, 30, 40, 43, 40)]
    assert context_length(assembled) == CONTEXT
    texts = generate(assembled, rows, settings(max_tokens=20))
    assert [len(text) for text in texts] == [20, 14, 4, 1, 4]
    assert texts == [argmax_loop(assembled, row, len(text)) for row, text in zip(rows, texts, strict=True)]


@pytest.mark.parametrize(("virtual", "longest"), [(0, 47), (4, 43)])
def test_a_prompt_without_room_for_an_answer_is_refused_with_the_numbers(virtual: int, longest: int) -> None:
    assembled = make("llama", virtual)
    generate(assembled, [[5] * longest], settings())
    with pytest.raises(
        SettingError, match=rf"prompt 2 is too long: it has {longest + 1} tokens.* {CONTEXT}.*{longest}"
    ):
        generate(assembled, [[5], [5] * (longest + 1)], settings())
    with pytest.raises(SettingError, match="too long"):
        stream(assembled, [5] * (longest + 1), settings())  # at once, not at the first piece


def test_an_empty_prompt_needs_something_to_start_from() -> None:
    with pytest.raises(SettingError, match="the prompt is empty"):
        generate(make("llama"), [[]], settings())
    assembled = make("llama", 3)
    assert generate(assembled, [[], [5]], settings()) == [argmax_loop(assembled, row, 10) for row in ([], [5])]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "`num_beams=2` and `temperature=0.5` exclude"),
        ({"top_p": 0.5}, "`top_p=0.5`: needs a `temperature`"),
        ({"top_k": 5}, "`top_k=5`: needs a `temperature`"),
        ({"min_p": 0.5}, "`min_p=0.5`: needs a `temperature`"),
        ({"stop": ("x", "")}, "`stop`: an empty text"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    for call in (lambda one: generate(make("llama"), [[5]], one), lambda one: stream(make("llama"), [5], one)):
        with pytest.raises(SettingError, match=words):
            call(settings(**values))


# What Transformers would mix in


def test_the_folders_generation_settings_do_not_apply_and_stay() -> None:
    assembled, rows = make("llama"), prompts(5)
    plain = generate(assembled, rows, settings())
    assembled.model.generation_config = GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, top_k=3, max_length=5, no_repeat_ngram_size=1,
        suppress_tokens=[7, 8, 9], bad_words_ids=[[10]], num_beams=3, min_new_tokens=9,
    )  # fmt: skip
    kept = copy.deepcopy(assembled.model.generation_config)
    assert generate(assembled, rows, settings()) == plain
    assert assembled.model.generation_config == kept


def test_nothing_is_said_on_the_way(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assembled, rows = make("gpt2", 3), prompts(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (
            {},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_p": 0.1},
            {"num_beams": 2},
            {"stop": ("A",)},
        ):
            generate(assembled, rows, settings(**values))
            list(stream(assembled, rows[0], settings(**values)))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# A model that says what a script says: stop strings, characters, interruptions


class Scripted(LlamaForCausalLM):
    """Writes ``script`` token by token, whatever the prompt; then end tokens."""

    script: Sequence[int] = ()
    steps = 0

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        token = self.script[self.steps] if self.steps < len(self.script) else END
        if isinstance(token, Exception):
            raise token
        output.logits = nn.functional.one_hot(torch.tensor([[token]]), self.config.vocab_size).float()
        self.steps += 1
        return output


def scripted(script: Sequence[Any], decode: Any = None) -> Any:
    config = LlamaConfig(
        vocab_size=260, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=512,
    )  # fmt: skip
    model = Scripted(config).eval()
    model.script = script
    return stand_in(model, decode=decode or decode_bytes)


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(token - 2 for token in ids).decode("utf-8", errors="replace")


def spell(text: str) -> list[int]:
    """A token a byte, from 2 on."""
    return [byte + 2 for byte in text.encode()]


def pieces(script: Sequence[Any], **values: Any) -> list[str]:
    return list(stream(scripted(script), [5], settings(max_tokens=300, **values)))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo\n", ("\n\n",), "one\ntwo\n"),
        ("aaab rest", ("ab",), "aa"),
        ("<|end", ("<|end|>",), "<|end"),
        ("x User: y", ("\nUser:", "User:"), "x "),
        ("STOP", ("STOP",), ""),
        ("grüße€", ("ß",), "grü"),
        ("never", ("elsewhere", "x"), "never"),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_never_shown(text: str, stop: tuple[str, ...], expected: str) -> None:
    assembled = scripted(spell(text))
    assert generate(assembled, [[5]], settings(max_tokens=300, stop=stop)) == [expected]
    stopped_early = expected != text
    assert (assembled.model.steps < len(spell(text)) + 1) == stopped_early, "it went on writing behind the stop string"
    shown = pieces(spell(text), stop=stop)
    assert "".join(shown) == expected
    assert all(expected.startswith("".join(shown[: at + 1])) for at in range(len(shown)))


def test_pieces_come_as_soon_as_they_are_sure_and_characters_stay_whole() -> None:
    assert pieces(spell("aé€😀b")) == ["a", "é", "€", "😀", "b"]
    assert pieces(spell("a<<b<"), stop=("<<<",)) == ["a", "<<b", "<"]
    assert pieces([*spell("a"), 0xFF + 2, *spell("b")]) == ["a", "\ufffdb"]
    assert pieces(spell("a€")[:-1]) == ["a", "\ufffd"]  # ended in the middle of a character
    assert pieces([]) == []


def test_an_end_token_ends_the_work_too() -> None:
    assembled = scripted(spell("ab"))
    assert generate(assembled, [[5]], settings(max_tokens=300)) == ["ab"]
    assert assembled.model.steps == 3


def test_rows_stop_each_at_their_own_stop_string() -> None:
    assembled, rows = make("llama", ends=()), prompts(8)
    plain = generate(assembled, rows, settings(max_tokens=20))
    letter = max(LETTERS[2:], key=lambda one: sum(0 <= text.find(one) < 15 for text in plain))
    stopped = generate(assembled, rows, settings(max_tokens=20, stop=(letter,)))
    assert stopped == [text.split(letter)[0] for text in plain]
    assert len({len(text) for text in stopped}) > 2


def test_closing_the_stream_stops_the_model() -> None:
    assembled = scripted(spell("x" * 290))
    with closing(stream(assembled, [5], settings(max_tokens=290))) as running:
        assert next(running) == "x"
    steps = assembled.model.steps
    assert steps < 200
    assert not [one for one in threading.enumerate() if one.name.startswith("capotune-stream")]
    assert assembled.model.generation_config.max_new_tokens is None


def test_an_interruption_while_waiting_stops_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assembled = scripted(spell("x" * 290))
    original = module._Cut.ready

    def interrupted(cut: Any, ids: Sequence[int]) -> str:
        if len(ids) == 3:
            raise KeyboardInterrupt
        return original(cut, ids)

    monkeypatch.setattr(module._Cut, "ready", interrupted)
    running: Iterator[str] = stream(assembled, [5], settings(max_tokens=290))
    with pytest.raises(KeyboardInterrupt):
        list(running)
    assert assembled.model.steps < 200
    assert not [one for one in threading.enumerate() if one.name.startswith("capotune-stream")]


def test_what_fails_in_the_thread_is_raised_in_the_caller() -> None:
    running = stream(scripted([*spell("ab"), RuntimeError("out of memory")]), [5], settings())
    shown = [next(running), next(running)]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(running)
    assert shown == ["a", "b"]
