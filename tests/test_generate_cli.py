"""Letting a model write, from the command line and from Python; scoring it; what is said of bad input."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import Result, capo, start

import capotune
from capotune import api
from capotune.errors import AdapterError, DataError, ModelError, SettingError

PROMPTS = ["What colour is grass?", "tell me", "Once upon a time", "ü€ 😀"]


@pytest.fixture(scope="module")
def adapters(
    untied_writer: Path, bert: Path, colour_pairs: Path, colour_chats: Path, tickets: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:  # fmt: skip
    """Adapters that write: from pairs, from conversations, a soft and a hard prompt; and one that gives labels."""
    folder = tmp_path_factory.mktemp("trained")
    candidates = folder / "candidates.txt"
    candidates.write_text("Tell me the colour.\nmy friend\n", encoding="utf-8")
    once = ("--epochs", 1, "--learning-rate", 0.05, "--batch-size", 32)
    runs: dict[str, tuple[Any, ...]] = {
        "pairs": ("lora", "--data", colour_pairs, "--model", untied_writer, *once),
        "chats": ("lora", "--data", colour_chats, "--model", untied_writer, *once),
        "soft": (
            "prompt-tuning",
            "--data",
            colour_pairs,
            "--model",
            untied_writer,
            *once,
            "--num-virtual-tokens",
            4,
            "--deep",
            "False",
        ),
        "hard": (
            *("prompt-tuning", "--data", colour_pairs, "--model", untied_writer, "--hard"),
            *("--candidates", candidates, "--test-fraction", 0),
        ),
        "labels": ("feature-extraction", "--data", tickets, "--model", bert, "--no-cache"),
    }
    for name, (method, *flags) in runs.items():
        made = capo("train", method, *flags, "--out", folder / name)
        assert made.code == 0, made.err
    return {name: folder / name / "adapter" for name in runs}


def written(adapter: Path, prompts: list[str], **decoding: Any) -> list[str]:
    loaded = capotune.load(adapter)
    assert isinstance(loaded, capotune.Generator)
    return loaded.generate(prompts, **{"max_tokens": 12, **decoding})


def generate(*arguments: object) -> Result:
    return capo("generate", *arguments, "--max-tokens", 12)


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


# capo generate


@pytest.mark.parametrize("name", ["pairs", "soft", "hard"])
def test_one_prompt_is_written_as_python_writes_it(adapters: dict[str, Path], name: str) -> None:
    (text,) = written(adapters[name], PROMPTS[:1])
    shown = generate(adapters[name], PROMPTS[0])
    assert shown == Result(0, text if text.endswith("\n") else text + "\n", "")
    assert text


def test_several_prompts_are_blocks_or_json_lines(adapters: dict[str, Path]) -> None:
    prompts = [*PROMPTS, "two\nlines"]
    texts = written(adapters["pairs"], prompts)
    assert len(set(texts)) > 2
    lines = generate(adapters["pairs"], *prompts, "--json").out.split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [
        {"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
    ]
    blocks = "".join(f"{asked}\n{text}\n\n" for asked, text in zip(
        ["> What colour is grass?", "> tell me", "> Once upon a time", "> ü€ 😀", "> two\n> lines"], texts, strict=True
    ))  # fmt: skip
    assert generate(adapters["pairs"], *prompts).out == blocks


def test_standard_input_is_one_prompt(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, "Once upon\na time €\n".encode())
    shown = generate(adapters["pairs"], "--json")
    assert json.loads(shown.out) == {
        "prompt": "Once upon\na time €",
        "text": written(adapters["pairs"], ["Once upon\na time €"])[0],
    }


@pytest.mark.parametrize(
    ("name", "content", "flags", "prompts"),
    [
        ("p.jsonl", '{"prompt": "tell me", "n": 1}\n{"prompt": "my friend", "n": 2}\n', (), ["tell me", "my friend"]),
        ("p.csv", "asked,number\ntell me,1\n", ("--prompt-column", "asked"), ["tell me"]),
        ("p.txt", "tell me\nmy friend\n", (), ["tell me\nmy friend"]),
    ],
)
def test_a_file_of_prompts(
    adapters: dict[str, Path], tmp_path: Path, name: str, content: str, flags: tuple[str, ...], prompts: list[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    shown = generate(adapters["pairs"], "--file", tmp_path / name, *flags, "--json")
    assert [json.loads(line)["prompt"] for line in shown.out.splitlines()] == prompts


def test_decoding_settings_reach_the_model(adapters: dict[str, Path]) -> None:
    adapter = adapters["pairs"]
    drawn = {"temperature": 1.5, "top_p": 0.9, "top_k": 30, "min_p": 0.001, "repetition_penalty": 1.1, "seed": 3}
    flags = tuple(part for name, value in drawn.items() for part in (f"--{name.replace('_', '-')}", value))
    (text,) = written(adapter, PROMPTS[:1], **drawn)
    assert json.loads(generate(adapter, *flags, PROMPTS[0], "--json").out)["text"] == text
    assert text not in (written(adapter, PROMPTS[:1])[0], written(adapter, PROMPTS[:1], **{**drawn, "seed": 4})[0])
    (beams,) = written(adapter, PROMPTS[:1], num_beams=3)
    assert json.loads(generate(adapter, "--num-beams", 3, PROMPTS[0], "--json").out)["text"] == beams
    stop = text[2:4]
    stopped = generate(adapter, *flags, "--stop", "\x00", "--stop", stop, PROMPTS[0], "--json")
    assert json.loads(stopped.out)["text"] == text.split(stop)[0]
    assert len(text) > len(
        json.loads(capo("generate", adapter, *flags, PROMPTS[0], "--json", "--max-tokens", 3).out)["text"]
    )


@pytest.mark.parametrize("flags", [(), ("--chat",), ("--raw",)])
@pytest.mark.parametrize("texts", [[""], ["yes"], ["", "yes", "\n"]])
def test_a_model_made_to_chat_that_writes_nothing_is_said_to_want_its_template(
    flags: tuple[str, ...], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any, **__: Any) -> list[str]:
        return texts

    def pieces(*_: Any, **__: Any) -> Any:
        yield texts[0]

    silent = SimpleNamespace(
        chats=False, has_chat_template=True, generate=answer, chat_each=answer, stream=pieces, stream_chat=pieces
    )
    monkeypatch.setattr(api, "load_generator", lambda *_, **__: silent)
    said = capo("generate", "model", *["prompt"] * len(texts), *flags).err.splitlines()
    hints = [line for line in said if "--chat" in line]
    if flags or texts == ["yes"]:
        assert not hints
    else:
        which = "the prompt" if len(texts) == 1 else "2 of 3 prompts"
        assert hints == [f"The model wrote nothing after {which}. It has a chat template: --chat asks in it."]


def test_an_adapter_trained_on_conversations_is_asked_in_its_template(adapters: dict[str, Path]) -> None:
    generator = capotune.load(adapters["chats"])
    assert isinstance(generator, capotune.Generator)
    assert generator.chats
    asked = generator.chat([{"role": "user", "content": PROMPTS[0]}], max_tokens=12)
    plain = generator.generate(PROMPTS[:1], max_tokens=12)[0]
    assert asked != plain
    assert json.loads(generate(adapters["chats"], PROMPTS[0], "--json").out)["text"] == asked
    assert generate(adapters["chats"], PROMPTS[0]).out.removesuffix("\n") == asked.removesuffix("\n")
    assert json.loads(generate(adapters["chats"], PROMPTS[0], "--raw", "--json").out)["text"] == plain
    several = generate(adapters["chats"], *PROMPTS, "--json").out.splitlines()
    assert json.loads(several[0])["text"] == asked


def test_chat_needs_a_template(adapters: dict[str, Path], llama_writer: Path) -> None:
    refused = generate(adapters["pairs"], "hello", "--chat")
    assert refused.code == 2
    assert "no chat template" in refused.err
    assert generate(llama_writer, "hello", "--chat").code == 0


def test_a_model_alone_writes(untied_writer: Path, adapters: dict[str, Path]) -> None:
    text = capotune.load_model(untied_writer).generate(PROMPTS[:1], max_tokens=12)[0]
    assert json.loads(generate(untied_writer, PROMPTS[0], "--json").out)["text"] == text
    assert text != written(adapters["pairs"], PROMPTS[:1])[0]


def test_an_empty_prompt_needs_a_token_that_starts_a_text(adapters: dict[str, Path]) -> None:
    assert generate(adapters["soft"], "").code == 0  # the vectors are there to start from
    assert generate(adapters["pairs"], "").code in (0, 2)


def test_pieces_are_flushed_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from capotune.cli.generate import show

    happened: list[str] = []

    class Recorder(io.StringIO):
        def write(self, text: str) -> int:
            happened.append(text)
            return len(text)

        def flush(self) -> None:
            happened.append("flush")

    def pieces() -> Any:
        for piece in ("a", "b"):
            happened.append(f"made {piece}")
            yield piece

    monkeypatch.setattr(sys, "stdout", Recorder())
    show(pieces())
    assert happened == ["made a", "a", "flush", "made b", "b", "flush", "\n", "flush"]


def test_a_reader_that_goes_away_is_no_error(adapters: dict[str, Path], tmp_path: Path) -> None:
    process = start("generate", adapters["pairs"], "tell me", "--max-tokens", 60, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(120)
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.returncode == 0


def test_a_terminal_that_knows_few_characters_is_no_error(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start("generate", adapters["pairs"], "tell me", "é", "--max-tokens", 5, cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "> \\xe9" in out


# What is refused, and how


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "{labels}", "hello"], ["gives labels and writes no text", "capo predict"]),
        (["chat", "{labels}"], ["gives labels and writes no text", "capo predict"]),
        (["predict", "{pairs}", "hello"], ["writes text and knows no labels", "capo generate"]),
        (["generate", "no-such", "hello"], ["no-such: no such adapter folder, and no model either", "capo-tiny"]),
        (["generate", "{pairs}/..", "hello"], ["capotune.json is missing", "Did you mean", "/adapter?"]),
        (["generate", "{bert}", "hello"], ["capo: --model {bert}", "reads text and does not write it"]),
        (["generate", "{base}", "hello", "--model", "{base}"], ["belongs to an adapter", "Leave it out"]),
        (["generate", "{pairs}", "hello", "--model", "{llama}"], ["belongs to another base"]),
        (["generate", "{pairs}", "hello", "--temperature", "-1"], ["--temperature -1", "than or equal to 0"]),
        (["generate", "{pairs}", "hello", "--temperature", "nan"], ["--temperature nan", "finite"]),
        (["generate", "{pairs}", "hello", "--max-tokens", "0"], ["--max-tokens 0", "greater than or equal to 1"]),
        (["generate", "{pairs}", "hello", "--top-p", "0.5"], ["--top-p 0.5: needs a --temperature above 0"]),
        (["generate", "{pairs}", "hello", "--top-k", "5"], ["--top-k 5: needs a --temperature above 0"]),
        (["generate", "{pairs}", "hello", "--min-p", "1.5"], ["--min-p 1.5", "less than or equal to 1"]),
        (["generate", "{pairs}", "hello", "--repetition-penalty", "0"], ["--repetition-penalty 0", "greater than 0"]),
        (["chat", "{pairs}", "--top-k", "-1"], ["--top-k -1", "than or equal to 0"]),
        (["generate", "{pairs}", "hello", "--num-beams", "2", "--temperature", "1"], ["exclude each other"]),
        (["generate", "{pairs}", "hello", "--stop", ""], ["--stop: an empty text"]),
        (["generate", "{pairs}", "hello", "--chat", "--raw"], ["--chat and --raw exclude each other"]),
        (["generate", "{pairs}", "hello", "--file", "x.txt"], ["prompts or --file, not both"]),
        (["generate", "{pairs}", "hello", "--prompt-column", "x"], ["--prompt-column x: belongs to a --file"]),
        (["generate", "{pairs}", "--file", "no-such.txt"], ["no-such.txt: no such file"]),
        (["generate", "{pairs}", "tell me " * 80], ["the prompt is too long: it has", "the model holds 96", "Shorten"]),
        (["generate", "{pairs}", "hello", "tell me " * 80], ["prompt 2 is too long: it has", "the model holds 96"]),
        (["generate", "{pairs}", "bad \udc80 bytes"], ["not UTF-8"]),
        (["generate"], ["Adapter folder", "required"]),
        (["evaluate", "{pairs}", "--data", "{pairs_data}", "--text-column", "x"], ["--text-column x", "Leave it out"]),
        (["evaluate", "{labels}", "--data", "{tickets}", "--prompt-template", "{x}"], ["--prompt-template", "Leave"]),
        (["evaluate", "{labels}", "--data", "{tickets}", "--answers", "-1"], ["--answers -1"]),
        (["evaluate", "{bert}", "--data", "{pairs_data}"], ["reads text and does not write it"]),
        (["data", "no-such.csv"], ["no-such.csv: no such file"]),
        (["demo"], ["required"]),
        (["demo", "classification"], ["generation"]),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_message(
    arguments: list[str], words: list[str], adapters: dict[str, Path], bert: Path, untied_writer: Path,
    llama_writer: Path, colour_pairs: Path, tickets: Path,
) -> None:  # fmt: skip
    places = {**adapters, "bert": bert, "base": untied_writer, "llama": llama_writer, "tickets": tickets}
    places["pairs_data"] = colour_pairs
    for name, path in places.items():
        arguments = [argument.replace(f"{{{name}}}", str(path)) for argument in arguments]
        words = [word.replace(f"{{{name}}}", str(path)) for word in words]
    refused = capo(*arguments)
    assert refused.code == 2
    assert not refused.out
    assert "Traceback" not in refused.err
    for word in words:
        assert word in refused.said


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfe\x00\x80", "not UTF-8"), (b"", "holds no prompt"), (b"\n", "holds no prompt")]
)
def test_standard_input_without_text_is_refused(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    piped(monkeypatch, content)
    refused = generate(adapters["pairs"])
    assert refused.code == 2
    assert words in refused.err


@pytest.mark.parametrize(
    "arguments", [["generate", "--help"], ["chat", "--help"], ["data", "--help"], ["demo", "--help"]]
)
def test_help_needs_no_framework(arguments: list[str]) -> None:
    program = (
        "import sys; from capotune.cli import main; code = main(sys.argv[1:])\n"
        "print(code, sorted({'torch', 'transformers', 'sklearn', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"
    assert done.stdout.startswith(f"usage: capo {arguments[0]}")
    assert f"capo {arguments[0]}" in capo("--help").out


# capo evaluate


def test_evaluate_agrees_with_the_run_and_with_a_plain_computation(
    adapters: dict[str, Path], colour_pairs: Path
) -> None:
    import torch

    record = json.loads((adapters["pairs"].parent / "run.json").read_text(encoding="utf-8"))["result"]
    shown = capo("evaluate", adapters["pairs"], "--data", colour_pairs, "--json")
    scores = json.loads(shown.out)
    assert scores["rows"] == record["test_rows"] == 8
    for name in ("loss", "perplexity"):
        assert scores[name] == pytest.approx(record["scores"][name], rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["answered"] == 8
    assert {"exact_match", "rouge_l"} < set(scores)
    for name, (low, high) in scores["intervals"].items():
        assert low <= scores[name] <= high
    generator = capotune.load(adapters["pairs"])
    nats, tokens = 0.0, 0
    for line in colour_pairs.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["split"] == "test":
            found = generator.tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
            first = next(at for at, (_, end) in enumerate(found["offset_mapping"]) if end > len(row["prompt"]))
            answer = [*found["input_ids"][first:], 0]
            with torch.no_grad():
                logits = generator.model(torch.tensor([[*found["input_ids"], 0]])).logits[0, first - 1 : -1]
            nats -= float(logits.log_softmax(1)[torch.arange(len(answer)), torch.tensor(answer)].sum())
            tokens += len(answer)
    assert scores["tokens"] == tokens
    assert scores["loss"] == pytest.approx(nats / tokens, rel=1e-4)


def test_evaluate_takes_a_model_alone_and_says_how_many_rows_it_answered(
    untied_writer: Path, adapters: dict[str, Path], colour_pairs: Path, colour_chats: Path
) -> None:
    alone = json.loads(capo("evaluate", untied_writer, "--data", colour_pairs, "--json", "--answers", 3).out)
    trained = json.loads(capo("evaluate", adapters["pairs"], "--data", colour_pairs, "--json", "--answers", 0).out)
    assert alone["loss"] > trained["loss"]
    assert alone["answered"] == 3
    assert trained["answered"] == 0
    assert "exact_match" not in trained
    said = capo("evaluate", untied_writer, "--data", colour_pairs, "--answers", 3).said
    assert "on 3 of 8 rows, drawn by a fixed seed" in said
    perplexity = api.metric("perplexity").text(alone["perplexity"], 2)
    assert f"perplexity {perplexity} on {alone['tokens']} tokens of 8 rows (95 % interval" in said
    chats = json.loads(capo("evaluate", adapters["chats"], "--data", colour_chats, "--json", "--answers", 4).out)
    assert (chats["metric"], chats["rows"], chats["answered"]) == ("perplexity", 40, 4)
    assert chats["measured_on"]["loss"].endswith(" tokens of 40 rows")


def test_evaluate_of_plain_text_has_no_answers(adapters: dict[str, Path], story: Path) -> None:
    scores = json.loads(capo("evaluate", adapters["pairs"], "--data", story, "--json").out)
    assert scores["answered"] == 0
    assert set(scores["intervals"]) <= {"loss", "perplexity"}
    assert "exact_match" not in scores


# capo info, capo data, capo demo


def test_info_says_how_it_writes(adapters: dict[str, Path]) -> None:
    facts = {
        name: json.loads(capo("info", adapters[name], "--json").out) for name in ("pairs", "chats", "soft", "hard")
    }
    assert {one["task"] for one in facts.values()} == {"generation"}
    assert not any("labels" in one or "pooling" in one for one in facts.values())
    assert (facts["pairs"]["chat"], facts["pairs"]["chat_template"]) == (False, None)
    assert facts["chats"]["chat"]
    assert "Assistant" in facts["chats"]["chat_template"]
    assert len(facts["soft"]["nearest_tokens"]) == 4
    assert facts["hard"]["hard_prompt"] in ("Tell me the colour.", "my friend")
    assert "nearest_tokens" not in facts["hard"]
    assert "text that continues a prompt" in capo("info", adapters["pairs"]).said
    assert "answers in a conversation" in capo("info", adapters["chats"]).said
    assert f"'{facts['hard']['hard_prompt']}'" in capo("info", adapters["hard"]).said
    soft = capo("info", adapters["soft"]).said
    assert "vector 3" in soft
    assert "an adapter for peft; nothing for vllm, sglang, llama.cpp, ollama, transformers" in " ".join(soft.split())
    assert json.loads(capo("info", adapters["labels"], "--json").out)["labels"] == ["broken", "late", "money"]


def test_data_shows_the_report_of_either_task(
    colour_pairs: Path, tickets: Path, untied_writer: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = capo("data", colour_pairs, "--model", untied_writer)
    assert text.code == 0, text.err
    assert "Read as text to write" in text.said
    assert "40 to train, 8 to test" in text.said
    labels = capo("data", tickets, "--model", bert)
    assert labels.code == 0, labels.err
    assert "Read as labelled text" in labels.said
    found = json.loads(capo("data", tickets, "--model", bert, "--json").out)
    assert (found["task"], found["model"]) == ("classification", str(bert))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("desktop", [True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_demo_compares_the_packaged_data_and_opens_the_page_where_there_is_a_desktop(
    desktop: bool, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webbrowser

    from capotune.cli.demo import EXPRESSIONS, MESSAGES

    monkeypatch.setattr("capotune.api.install_command", lambda _name: None if installed else "pip install it")

    ran: list[Any] = []
    opened: list[str] = []
    monkeypatch.setattr(sys.modules["capotune.cli.main"], "compare", lambda *given: ran.append(given) or 0)
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address) or True))
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    if desktop:
        monkeypatch.setenv("DISPLAY", ":0")
    out = tmp_path / "a b"
    shown = capo("demo", "generation", "--out", out)
    assert shown.code == 0, shown.err
    ((settings, command),) = ran
    data, model = (MESSAGES, "smollm2") if installed else (EXPRESSIONS, "capo-tiny")
    assert (settings.data, settings.model, settings.out) == (str(data), model, out)
    assert ("pip install it" in shown.err) == (not installed)
    assert command == "capo demo generation"  # the page does not know where it is
    assert opened == ([(out / "compare.html").as_uri()] if desktop else [])
    assert str(out / "compare.html") in shown.out
    if desktop:
        assert capo("demo", "generation", "--out", out, "--no-open").code == 0
        monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 5 6.7.8.9 22")
        assert capo("demo", "generation", "--out", out).code == 0
        assert len(opened) == 1


# From Python


def test_load_gives_what_the_adapter_was_trained_for(adapters: dict[str, Path], untied_writer: Path) -> None:
    assert isinstance(capotune.load(adapters["labels"]), capotune.Classifier)
    generator = capotune.load(adapters["soft"])
    assert isinstance(generator, capotune.Generator)
    assert generator.method.name == "prompt-tuning"
    assert generator.model.config.model_type == "llama"
    assert generator.context_length == 96
    assert not generator.has_chat_template
    assert capotune.load_model(untied_writer).method.name == "base"
    texts = capotune.generate(adapters["soft"], PROMPTS, max_tokens=12)
    assert texts == generator.generate(PROMPTS, max_tokens=12)
    assert texts == ["".join(generator.stream(prompt, max_tokens=12)) for prompt in PROMPTS]
    assert capotune.generate(untied_writer, PROMPTS, max_tokens=5) != [text[:5] for text in texts]


def test_use_switches_in_place(adapters: dict[str, Path], untied_writer: Path) -> None:
    alone = capotune.load_model(untied_writer).generate(PROMPTS, max_tokens=12)
    expected = {name: written(adapters[name], PROMPTS) for name in ("pairs", "chats", "soft", "hard")}
    assert len({tuple(texts) for texts in (alone, *expected.values())}) == 5
    generator = capotune.load(adapters["pairs"])
    assert isinstance(generator, capotune.Generator)
    model = generator.model
    for name in ("soft", "pairs", "chats", "hard", "soft"):
        generator.use(adapters[name])
        assert generator.generate(PROMPTS, max_tokens=12) == expected[name]
    generator.use(None)
    assert generator.generate(PROMPTS, max_tokens=12) == alone
    assert generator.model is model
    with pytest.raises(AdapterError, match="gives labels and writes no text"):
        generator.use(adapters["labels"])
    assert generator.generate(PROMPTS, max_tokens=12) == alone


def test_the_base_is_asked_in_the_template_of_the_adapter_before(adapters: dict[str, Path], llama_writer: Path) -> None:
    generator = capotune.load(adapters["chats"])
    assert isinstance(generator, capotune.Generator)
    hello = [{"role": "user", "content": "hello"}]
    trained = generator.chat(hello, max_tokens=12)
    generator.use(None)
    assert generator.chat(hello, max_tokens=12) != trained
    own = capotune.load_model(llama_writer)
    assert own.has_chat_template
    assert not own.chats
    assert own.tokens_left(hello) == 96 - len(
        own.tokenizer.apply_chat_template(hello, add_generation_prompt=True)["input_ids"]
    )


def test_merged_writes_the_same(adapters: dict[str, Path]) -> None:
    generator = capotune.load(adapters["pairs"])
    assert isinstance(generator, capotune.Generator)
    before = generator.generate(PROMPTS, max_tokens=12)
    assert generator.merge()
    assert generator.generate(PROMPTS, max_tokens=12) == before


def test_python_mistakes_are_errors_of_ours(adapters: dict[str, Path], bert: Path) -> None:
    generator = capotune.load(adapters["chats"])
    assert isinstance(generator, capotune.Generator)
    with pytest.raises(DataError, match="a list of texts is needed"):
        generator.generate("one string")
    with pytest.raises(DataError, match="a string is needed, found int"):
        generator.generate([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="a list of messages is needed"):
        generator.chat("hello")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a list of messages is needed"):
        generator.chat([{"content": "hello"}])
    with pytest.raises(SettingError, match=r"unknown setting 'max_token'\. Did you mean 'max_tokens'\?"):
        generator.generate(["hello"], max_token=3)
    with pytest.raises(ModelError, match="reads text and does not write it"):
        capotune.load_model(bert)
    with pytest.raises(AdapterError, match="gives labels and writes no text"):
        capotune.generate(adapters["labels"], ["hello"])
    with pytest.raises(AdapterError, match="writes text and knows no labels"):
        capotune.predict(adapters["pairs"], ["hello"])
