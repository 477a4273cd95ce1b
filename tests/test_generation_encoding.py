"""What a record becomes: which tokens are read, which are learned, and that a model is asked as it was taught."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generation_helpers import (
    BOS,
    CHATML,
    END,
    TURN_END,
    conversation,
    encode,
    encode_one,
    learned_parts,
    make_task,
    make_tokenizer,
    pairs,
    samples_of,
    turn,
    with_tokenizer,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from capotune.data.batches import IGNORE_INDEX
from capotune.data.samples import Conversation, Document, Pair, Sample
from capotune.errors import DataError, ModelError, SettingError
from capotune.tasks.generation import Generation
from capotune.tasks.generation.chat_template import PLAIN_TEMPLATE

QUESTIONS = Conversation(
    (
        turn("system", "You are my friend."),
        turn("user", "What colour is grass?"),
        turn("assistant", "green"),
        turn("user", "What colour is snow?"),
        turn("assistant", "white, my friend"),
    )
)
LONGEST = 4096
"""Room enough for every text of these tests."""


@pytest.fixture(scope="module")
def make(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Generation]:
    """The task on a base whose tokenizer is made with the given options."""
    made: dict[str, Path] = {}

    def build(chat_template: str | None = CHATML, learn: Any = "all", separator: str = "", **options: Any) -> Any:
        key = repr((chat_template, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("bases") / "base"
            made[key] = with_tokenizer(llama_writer, folder, chat_template=chat_template, **options)
        task = make_task(made[key], learn=learn, chat=True)
        return replace(task, max_length=LONGEST, separator=separator)

    return build


def text_of(task: Generation, ids: list[int]) -> str:
    return str(task.tokenizer.decode(ids))


def test_an_answer_is_read_where_no_token_ends_it(make: Callable[..., Generation]) -> None:
    task = replace(make(CHATML), end_ids=())
    before, answer = (task.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("What?", " green"))
    assert task.decode_after(before, answer) == " green"


# ------------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize(("learn", "answers"), [("all", ["green", "white, my friend"]), ("last", ["white, my friend"])])
def test_just_the_answers_and_their_ends_are_learned(
    make: Callable[..., Generation], learn: str, answers: list[str]
) -> None:
    task = make(CHATML, learn, eos=TURN_END)
    one = encode_one(task, QUESTIONS)
    assert text_of(task, one.ids) == (
        "<|im_start|>system\nYou are my friend.<|im_end|>\n<|im_start|>user\nWhat colour is grass?<|im_end|>\n"
        "<|im_start|>assistant\ngreen<|im_end|>\n<|im_start|>user\nWhat colour is snow?<|im_end|>\n"
        "<|im_start|>assistant\nwhite, my friend<|im_end|>\n"
    )
    assert learned_parts(task, one) == [answer + TURN_END for answer in answers]
    assert [label for label in one.labels if label != IGNORE_INDEX] == [
        token for token, label in zip(one.ids, one.labels, strict=True) if label != IGNORE_INDEX
    ]
    assert one.tokens == len(one.ids) == len(one.labels)
    assert not one.answer_cut
    assert not one.end_cut


@pytest.mark.parametrize(("learn", "answers"), [("all", ["green", "white, my friend"]), ("last", ["white, my friend"])])
def test_a_model_without_a_template_gets_the_plain_form(
    make: Callable[..., Generation], learn: str, answers: list[str]
) -> None:
    task = make(None, learn)
    assert task.chat_template == PLAIN_TEMPLATE
    assert "no chat template" in task.template_from
    one = encode_one(task, QUESTIONS)
    assert text_of(task, one.ids) == (
        f"System:\nYou are my friend.\n\nUser:\nWhat colour is grass?\n\nAssistant:\ngreen{END}\n\n"
        f"User:\nWhat colour is snow?\n\nAssistant:\nwhite, my friend{END}\n\n"
    )
    assert learned_parts(task, one) == [answer + END for answer in answers]


def test_the_models_own_template_is_the_one_used(make: Callable[..., Generation]) -> None:
    task = make(CHATML)
    assert task.chat_template == CHATML
    assert "own" in task.template_from
    without = make_task_without_chat(make)
    assert without.chat_template is None
    with pytest.raises(SettingError, match="has no chat template"):
        without.encode_chat([turn("user", "hi")])


def make_task_without_chat(make: Callable[..., Generation]) -> Generation:
    """Nothing needs a template, and none is put in its place."""
    folder = Path(make(None).tokenizer.name_or_path)
    return make_task(folder)


def test_of_several_templates_the_default_is_taken(llama_writer: Path, tmp_path: Path) -> None:
    template: Any = {"default": CHATML, "tool_use": "{{ 'another' }}"}
    folder = with_tokenizer(llama_writer, tmp_path / "base", chat_template=template)
    assert make_task(folder).chat_template == CHATML
    folder = with_tokenizer(llama_writer, tmp_path / "no-default", chat_template={"rag": CHATML, "tool_use": CHATML})
    assert make_task(folder).chat_template is None
    assert make_task(folder, chat=True).chat_template == PLAIN_TEMPLATE


def test_what_follows_the_last_answer_is_read_or_left_and_never_learned(make: Callable[..., Generation]) -> None:
    for learn in ("all", "last"):
        task = make(CHATML, learn, eos=TURN_END)
        one = encode_one(task, Conversation((*QUESTIONS.messages, turn("user", "And snow now?"))))
        assert learned_parts(task, one)[-1] == "white, my friend" + TURN_END
        assert text_of(task, one.ids).endswith("user\nAnd snow now?<|im_end|>\n")


def test_earlier_answers_that_are_part_of_the_prompt_are_not_learned(make: Callable[..., Generation]) -> None:
    task = make(CHATML, eos=TURN_END)
    one = encode_one(task, replace(QUESTIONS, read_only=frozenset({2})))
    assert learned_parts(task, one) == ["white, my friend" + TURN_END]


def test_tools_and_calls_are_kept(make: Callable[..., Generation]) -> None:
    task = make(CHATML, eos=TURN_END)
    tools = ({"type": "function", "function": {"name": "colour_of", "parameters": {"thing": "string"}}},)
    calls = [{"type": "function", "function": {"name": "colour_of", "arguments": {"thing": "snow"}}}]
    messages = (
        turn("user", "What colour is snow?"),
        turn("assistant", "", tool_calls=calls),
        turn("tool", "white"),
        turn("assistant", "It is white."),
    )
    one = encode_one(task, Conversation(messages, tools))
    assert '"name": "colour_of", "parameters"' in text_of(task, one.ids)
    call, answer = learned_parts(task, one)
    assert '"arguments": {"thing": "snow"}' in call
    assert call.endswith(TURN_END)
    assert answer == "It is white." + TURN_END
    question = task.encode_question(Conversation(messages, tools))
    assert one.ids[: len(question)] == question
    assert "parameters" not in text_of(task, encode_one(task, Conversation(messages)).ids)


def test_a_template_that_writes_no_end_is_ended(make: Callable[..., Generation]) -> None:
    """The next turn ends the one before, and after the last one stands the end of the text."""
    template = "{% for one in messages %}{{ one.role + ': ' + one.content + ' ' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    task = make(template)
    ended = [" green user:", " white, my friend " + END]  # the first token holds the space that asks for it
    assert learned_parts(task, encode_one(task, QUESTIONS)) == ended


def test_an_answer_that_does_not_follow_its_question_is_refused(make: Callable[..., Generation]) -> None:
    template = "{% for one in messages %}{{ '[' + one.role + ']' + one.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ '[answer]' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template does not write an answer after"):
        encode(make(template), QUESTIONS)


@pytest.mark.parametrize("broken", ["{{ raise_exception('no tools here') }}", "{{ messages[0].content + 1 }}"])
def test_a_template_that_refuses_is_named_with_its_line(make: Callable[..., Generation], broken: str) -> None:
    task = make("{% if messages[-1].role == 'tool' %}" + broken + "{% endif %}" + CHATML)
    asked = (*QUESTIONS.messages, turn("tool", "white"))
    with pytest.raises(DataError, match=r"data\.jsonl:2: the chat template refuses the conversation"):
        task.encode(samples_of(QUESTIONS, Conversation(asked)))
    with pytest.raises(SettingError, match="the chat template refuses these messages"):
        task.encode_chat(asked)


def test_chat_is_asked_as_it_was_taught(make: Callable[..., Generation]) -> None:
    for template in (CHATML, None):
        task = make(template, eos=TURN_END)
        one = encode_one(task, QUESTIONS)
        for messages in (QUESTIONS.messages[:2], QUESTIONS.messages[:4]):
            asked = task.encode_chat(messages)
            assert one.ids[: len(asked)] == asked
            assert one.labels[len(asked) - 1] == IGNORE_INDEX
            assert one.labels[len(asked)] != IGNORE_INDEX


# --------------------------------------------------------------------------------------------- prompts with completions


@pytest.mark.parametrize("separator", ["", "\n"])
def test_the_completion_and_its_end_are_learned(make: Callable[..., Generation], separator: str) -> None:
    task = make(separator=separator)
    one = encode_one(task, Pair("What colour is grass?", "green"))
    assert text_of(task, one.ids) == f"What colour is grass?{separator}green{END}"
    assert learned_parts(task, one) == ["green" + END]
    assert encode_one(task, Pair("What colour is grass?\n", "green")).ids == (
        one.ids if separator else encode_one(make(separator="\n"), Pair("What colour is grass?", "green")).ids
    )


def test_the_tokenizers_own_end_is_learned_first(make: Callable[..., Generation], qwen2_writer: Path) -> None:
    task = make_task(qwen2_writer)
    assert [text_of(task, [end]) for end in task.end_ids] == [TURN_END, END]
    assert learned_parts(task, encode_one(task, Pair("a", "b"))) == ["b" + TURN_END]
    assert [text_of(task, [end]) for end in make().end_ids] == [END, TURN_END], "as the chat template ends a turn"


# ------------------------------------------------------------------------------------------ cut to length

CUT: dict[str, Sample] = {
    "pair": Pair("What colour is grass?", "green, my friend"),
    "conversation": QUESTIONS,
    "one answer": conversation(1),
}


@pytest.mark.parametrize("sample", CUT)
def test_what_is_cut_is_said(make: Callable[..., Generation], sample: str) -> None:
    task = make(CHATML, eos=TURN_END)
    whole = encode_one(task, CUT[sample])
    learned = [at for at, label in enumerate(whole.labels) if label != IGNORE_INDEX]
    ends = [at for at in learned if whole.ids[at] in task.end_ids]
    for longest in range(2, len(whole.ids) + 2):
        one = encode_one(replace(task, max_length=longest), CUT[sample])
        assert one.ids == whole.ids[:longest]
        assert one.labels == whole.labels[:longest]
        assert one.tokens == len(whole.ids)
        assert one.end_cut == any(at >= longest for at in ends)
        assert one.answer_cut == any(at >= longest for at in learned if at not in ends)
        assert one.tokens_in_loss == sum(at < longest for at in learned)


# ------------------------------------------------------------------------------------------ plain text


@pytest.mark.parametrize("bos", [False, True])
def test_a_long_text_is_read_in_windows_that_lose_nothing(make: Callable[..., Generation], bos: bool) -> None:
    text = "Once upon a time there was a parcel. It was late, and nobody knew where it was. " * 3
    task = make(bos=bos)
    (whole,) = encode(task, Document(text))
    assert text_of(task, whole.ids) == (BOS if bos else "") + text + END
    for longest in [*range(2, 12), len(whole.ids) - 1, len(whole.ids), len(whole.ids) + 1]:
        windows = encode(replace(task, max_length=longest), Document(text))
        assert [token for one in windows for token in one.ids] == whole.ids
        assert max(len(one.ids) for one in windows) <= longest
        assert len(windows) == -(-len(whole.ids) // longest)
        assert windows[-1].labels[-1] == task.end_ids[0], "the end is learned"
        assert all(one.labels == [IGNORE_INDEX, *one.ids[1:]] for one in windows)
        assert not any(one.answer_cut or one.end_cut for one in windows)
        assert sum(one.tokens for one in windows) == len(whole.ids)


def test_a_short_text_is_one_window(make: Callable[..., Generation]) -> None:
    task = make()
    (one,) = encode(task, Document("a"))
    assert text_of(task, one.ids) == "a" + END
    assert learned_parts(task, one) == [END]
    question = task.encode_question(Document("a"))
    assert question == one.ids[:1]


# ------------------------------------------------------------------------------------------ start of the text


def test_a_token_that_starts_every_text_stands_there_once(make: Callable[..., Generation]) -> None:
    template = "{{ bos_token }}" + CHATML
    task = make(template, bos=True, eos=TURN_END)
    samples = [QUESTIONS, Pair("What colour is grass?", "green"), Document("Once upon a time")]
    for sample in samples:
        one = encode_one(task, sample)
        assert [at for at, token in enumerate(one.ids) if text_of(task, [token]) == BOS] == [0]
        assert one.labels[0] == IGNORE_INDEX
        question = task.encode_question(sample)
        assert one.ids[: len(question)] == question
    assert text_of(task, task.encode_prompt("grass")) == f"{BOS}grass"
    assert text_of(task, task.encode_chat([turn("user", "hi")])).count(BOS) == 1


def test_the_plain_form_starts_as_every_text_does(make: Callable[..., Generation]) -> None:
    """The base has never seen a text without it."""
    task = make(None, bos=True)
    one = encode_one(task, QUESTIONS)
    assert text_of(task, one.ids).startswith(f"{BOS}System:\nYou")
    asked = task.encode_chat(QUESTIONS.messages[:4])
    assert one.ids[: len(asked)] == asked


# --------------------------------------------------------------------------------------------- asked as it was taught

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
SPACED = st.builds(
    "".join,
    st.tuples(st.sampled_from(["", " ", "\n", "\n\n", "\t ", "é"]), TEXT, st.sampled_from(["", " ", "\n\n", " \n"])),
)
CHECKS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def own_ids(task: Generation, text: str, after: int) -> tuple[list[int], list[int]]:
    """The tokenizer's ids of a text, and those of them that hold a character from ``after`` on."""
    found = task.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in found["offset_mapping"]]
    return found["input_ids"], [one for one, end in zip(found["input_ids"], ends, strict=True) if end > after]


def assert_asked_as_taught(task: Generation, sample: Sample) -> None:
    """A plain text is asked with its first tokens; of others, what is asked has the tokens of its own text."""
    one = encode_one(task, sample)
    question = task.encode_question(sample)
    if isinstance(sample, Document):
        assert one.ids[: len(question)] == question
        return
    in_loss = [label != IGNORE_INDEX for label in one.labels]
    last = len(in_loss) - in_loss[::-1].index(True)
    assert one.ids[last - 1] in task.end_ids
    if isinstance(sample, Pair):
        assert question == [*task._added[0], *own_ids(task, task._parted(sample.prompt), 0)[0]]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("separator", ["", "\n"])
@given(prompt=SPACED, completion=SPACED)
@example(prompt="What colour? ", completion="green")
@example(prompt="What colour?", completion=" green")
@example(prompt="a\n", completion="\nb")
@CHECKS
def test_a_prompt_is_asked_as_it_was_taught(
    make: Callable[..., Generation], separator: str, bos: bool, prompt: str, completion: str
) -> None:
    task = make(separator=separator, bos=bos)
    sample = Pair(prompt, completion)
    assert_asked_as_taught(task, sample)
    question, one = task.encode_question(sample), encode_one(task, sample)
    assert question == task.encode_prompt(prompt)
    front = task.tokenizer.convert_tokens_to_ids([BOS]) if bos else []
    read = prompt if prompt[-1].isspace() else prompt + separator
    assert question == front + own_ids(task, read, 0)[0]
    whole, in_loss = own_ids(task, read + completion, len(read))
    assert one.ids == [*front, *whole, task.end_ids[0]]
    labels = [IGNORE_INDEX] * (len(one.ids) - len(in_loss) - 1) + [*in_loss, task.end_ids[0]]
    assert one.labels == [IGNORE_INDEX, *labels[1:]]


@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("template", ["chatml", "plain", "endless"])
@given(texts=st.lists(st.tuples(SPACED, SPACED), min_size=1, max_size=3), system=st.none() | SPACED)
@example(texts=[("a", "\nb"), ("c", "\n\nd\n\n")], system=None)
@example(texts=[("a ", " b"), (" c", "d")], system=" \n")
@example(texts=[("a", "b "), ("c", " d")], system=None)
@CHECKS
def test_a_conversation_is_asked_as_it_was_taught(
    make: Callable[..., Generation], template: str, learn: str, texts: list[tuple[str, str]], system: str | None
) -> None:
    templates = {
        "chatml": CHATML,
        "plain": None,
        "endless": "{% for one in messages %}{{ one.role + ':' + one.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    }
    task = make(templates[template], learn, eos=TURN_END)
    turns = [one for asked, answer in texts for one in (turn("user", asked), turn("assistant", answer))]
    messages = (*([turn("system", system)] if system else []), *turns)
    assert_asked_as_taught(task, Conversation(messages))
    assert task.encode_question(Conversation(messages)) == task.encode_chat(messages[:-1])
    one = encode_one(task, Conversation(messages))
    if template == "chatml":
        assert one.ids == task.tokenizer.apply_chat_template(messages)["input_ids"]
    parts = learned_parts(task, one)
    answers = [answer for _, answer in (texts if learn == "all" else texts[-1:])]
    begins_next = "user:" if template == "endless" else TURN_END
    for part, answer, end in zip(parts, answers, [*[begins_next] * (len(parts) - 1), TURN_END], strict=True):
        asks, found, rest = part.partition(answer + end)
        assert found
        assert "assistant:\n".endswith(asks.lower())
        assert not rest.strip()


@given(text=SPACED)
@CHECKS
def test_a_text_is_gone_on_with_as_it_was_taught(make: Callable[..., Generation], text: str) -> None:
    task = make(bos=True)
    assert_asked_as_taught(task, Document(text))
    (one,) = encode(task, Document(text))
    assert text_of(task, one.ids) == BOS + text + END


@needs_shared
def test_a_sentencepiece_model_is_asked_as_it_was_taught() -> None:
    """Its tokenizer puts a space before every piece that it is given, and ``<s>`` before every text."""
    folder, chooser = SHARED / "models" / "stories260K", random.Random(0)
    words = [*"Once upon a time there was a girl named Lily".split(), ".", "!", "é", "日本", "\n"]  # noqa: SIM905
    for separator in ("", "\n"):
        task = replace(make_task(folder, chat=True), max_length=LONGEST, separator=separator)
        assert "no chat template" in task.template_from
        for _ in range(20):
            texts = [" ".join(chooser.choices(words, k=chooser.randint(1, 8))) for _ in range(4)]
            turns = [turn(("user", "assistant")[at % 2], text) for at, text in enumerate(texts)]
            for sample in (Pair(*texts[:2]), Conversation(tuple(turns)), Document(texts[0])):
                assert_asked_as_taught(task, sample)
                ids = encode_one(task, sample).ids
                assert ids[0] == task.tokenizer.bos_token_id
                assert ids.count(task.tokenizer.bos_token_id) == 1


# ------------------------------------------------------------------------------------------ the model


def test_many_samples_are_encoded_as_each_alone(make: Callable[..., Generation]) -> None:
    task = replace(make(), max_length=16)
    samples: list[Sample] = [*pairs(5), *(conversation(at, 1 + at % 3) for at in range(5)), Document("Once upon " * 30)]
    together = task.encode(samples_of(*samples))
    assert together == [encode(task, sample) for sample in samples]
    assert task.encode(samples_of()) == []


def test_a_tokenizer_without_an_end_is_refused(llama_writer: Path, tmp_path: Path) -> None:
    from generation_helpers import change_config

    folder = with_tokenizer(llama_writer, tmp_path / "endless", eos=None)
    assert make_task(folder).end_ids == (0,)  # the model's configuration names one
    change_config(folder, eos_token_id=None)
    with pytest.raises(ModelError, match=r"names no end-of-text token.*eos_token.*tokenizer_config\.json"):
        make_task(folder)
    change_config(folder, eos_token_id=9999)  # of another tokenizer
    with pytest.raises(ModelError, match="names no end-of-text token"):
        make_task(folder)


def test_a_tokenizer_without_padding_has_a_filler(gpt2_writer: Path) -> None:
    assert make_tokenizer(pad=None).pad_token_id is None
    assert make_task(gpt2_writer).pad_id == 0


def test_room_is_what_the_base_and_a_prompt_leave(llama_writer: Path) -> None:
    assert make_task(llama_writer).max_length == 96
    assert make_task(llama_writer, 40).max_length == 40
    with pytest.raises(SettingError, match=r"`max_length=97`: this base takes at most 96 tokens.*Allowed: 2 to 96"):
        make_task(llama_writer, 97)
    with pytest.raises(SettingError, match="`max_length=1`:"):
        make_task(llama_writer, 1)


# ------------------------------------------------------------------------------------------ tokens beyond the embedding


@pytest.fixture(scope="module")
def longer(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer has two tokens more than its embedding has rows, and pads with the first of them."""
    from transformers import AutoTokenizer

    folder = with_tokenizer(llama_writer, tmp_path_factory.mktemp("bases") / "longer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spare = make_task(folder).base.vocabulary_size - len(tokenizer)
    tokenizer.add_tokens([f"<spare {at}>" for at in range(spare)])
    tokenizer.add_special_tokens({"pad_token": "<beyond>", "additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_row_with_a_token_beyond_the_embedding_is_refused_by_its_line(longer: Path) -> None:
    task = make_task(longer, chat=True)
    asked = Conversation((turn("user", "<extra>"), turn("assistant", "b")))
    for broken in (Pair("a <extra>", "b"), Pair("a", "b<extra>"), Document("a <extra> b"), asked):
        with pytest.raises(DataError, match=r"data\.jsonl:2: holds the token '<extra>', whose id 361 .* has 360 rows"):
            task.encode(samples_of(Pair("a", "b"), broken))
    with pytest.raises(DataError, match="holds the token '<extra>'"):
        task.encode_prompt("a <extra>")
    with pytest.raises(DataError, match="holds the token '<extra>'"):
        task.encode_chat([turn("user", "a <extra>")])


@pytest.mark.parametrize("virtual", [0, 3])
def test_padding_beyond_the_embedding_is_never_read(longer: Path, virtual: int) -> None:
    """Neither is a soft prompt's vector, whose ids are the same: rows of unlike lengths, together and alone."""
    from generation_helpers import on_base

    from capotune.evaluation.generate import generate
    from capotune.methods.prompt_tuning.settings import PromptTuningSettings
    from capotune.settings import DecodingSettings

    prompt = PromptTuningSettings(init="vocabulary", num_virtual_tokens=virtual) if virtual else None
    assembled = on_base(longer, prompt, attached=bool(virtual))
    assert assembled.task.tokenizer.pad_token_id == 360
    prompts, decoding = [[9, 10, 11, 12, 13], [14], [15, 16]], DecodingSettings(max_tokens=4)
    alone = [generate(assembled, [prompt], decoding)[0] for prompt in prompts]
    assert generate(assembled, prompts, decoding) == alone
    assert 0 <= assembled.task.pad_id < 360


def test_an_end_token_beyond_the_embedding_is_none(longer: Path) -> None:
    task = make_task(longer)
    assert "<beyond>" not in task.tokenizer.convert_ids_to_tokens(list(task.end_ids))
    task.tokenizer.eos_token = "<extra>"
    assert task.base.end_tokens == (0,), "the configuration's is left"
