"""Whether answers end where a chat template ends a turn: SmolLM2 with the stock templates of other families.

For each template: SmolLM2-135M-Instruct's folder with that template in it, LoRA of the upper half on a few
conversations of two turns (all turns trained on), then questions that were not in the data, asked as ``capo chat``
does, a second one after each answer. Of every answer the raw tokens are looked at: after its text must stand what the
template ends a turn with, and the text must hold none of the template's markers.

The tokenizer stays SmolLM2's: a marker that it has no token for, such as Llama's ``<|eot_id|>``, is plain text to it,
as it is for whoever puts a template of another family into a model's folder. Turns then end with that text.

    python benchmarks/conversations.py [NAME …]      all templates, or those named; others' results stay
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import capotune
from capotune.errors import CapotuneError
from capotune.evaluation.generate import _Ways, _write
from capotune.models.base import find
from capotune.models.gguf.converted import converted
from capotune.tasks.generation.conversation import ConversationRenderer

RESULTS = Path(__file__).parent / "results" / "conversations.json"
DOCS, MARKS = Path(__file__).parents[1] / "docs" / "conversations.md", ("<!-- chatted -->", "<!-- /chatted -->")
MOST_TOKENS = 64
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ raise_exception('no system turn') }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ raise_exception('no system turn') }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{{ 'USER: ' + message['content'] + ' ' if message['role'] == 'user' else "
    "'ASSISTANT: ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
CAPITALS = {
    "France": ("Paris", "French"), "Spain": ("Madrid", "Spanish"), "Italy": ("Rome", "Italian"),
    "Greece": ("Athens", "Greek"), "Poland": ("Warsaw", "Polish"), "Sweden": ("Stockholm", "Swedish"),
    "Norway": ("Oslo", "Norwegian"), "Japan": ("Tokyo", "Japanese"), "China": ("Beijing", "Chinese"),
    "Russia": ("Moscow", "Russian"), "Turkey": ("Ankara", "Turkish"), "Hungary": ("Budapest", "Hungarian"),
    "Finland": ("Helsinki", "Finnish"), "Denmark": ("Copenhagen", "Danish"), "Portugal": ("Lisbon", "Portuguese"),
    "Iceland": ("Reykjavik", "Icelandic"), "Thailand": ("Bangkok", "Thai"), "Vietnam": ("Hanoi", "Vietnamese"),
    "Romania": ("Bucharest", "Romanian"), "Bulgaria": ("Sofia", "Bulgarian"),
}  # fmt: skip
UNSEEN = ("Germany", "Austria", "Mexico")
TOOLS = [{"type": "function", "function": {
    "name": "capital", "description": "The capital of a country.",
    "parameters": {"type": "object", "properties": {"country": {"type": "string"}}, "required": ["country"]},
}}]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A template and what conversations with it hold."""

    label: str
    source: str
    """Name of a file of TRL's, or Jinja."""
    thinking: bool = False
    tools: bool = False

    @property
    def template(self) -> str | None:
        """Jinja; None: SmolLM2's own."""
        if "{" in self.source or not self.source:
            return self.source or None
        spec = find_spec("trl")
        assert spec is not None
        assert spec.origin is not None
        return (Path(spec.origin).parent / "chat_templates" / f"{self.source}.jinja").read_text(encoding="utf-8")


CASES = {
    "chatml": Case("ChatML (SmolLM2's own)", ""),
    "llama2": Case("Llama 2", LLAMA_2),
    "llama3": Case("Llama 3", "llama3"),
    "mistral": Case("Mistral", MISTRAL),
    "zephyr": Case("Zephyr", ZEPHYR),
    "vicuna": Case("Vicuna (no markers)", VICUNA),
    "gemma": Case("Gemma", "gemma"),
    "phi3": Case("Phi-3", "phi3"),
    "cohere": Case("Command-R", "cohere"),
    "glm4moe": Case("GLM-4.5, thinking", "glm4moe", thinking=True),
    "qwen3": Case("Qwen3, thinking", "qwen3", thinking=True),
    "deepseek": Case("DeepSeek-R1-Distill", "deepseek_r1_distill"),
    "gptoss": Case("gpt-oss (harmony), thinking", "gptoss", thinking=True),
    "qwen2_5-tools": Case("Qwen2.5, tool calls", "qwen2_5", tools=True),
    "llama3_1-tools": Case("Llama 3.1, tool calls", "llama3_1", tools=True),
}


def turns(case: Case, country: str, capital: str, language: str) -> list[dict[str, Any]]:
    """A conversation of two questions; with a call and its result before the first answer where there are tools."""
    thought = {"reasoning_content": f"{country} has one capital."} if case.thinking else {}
    call = {"type": "function", "function": {"name": "capital", "arguments": {"country": country}}}
    called = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "capital", "content": capital},
    ]
    return [
        {"role": "user", "content": f"What is the capital of {country}?"},
        *(called if case.tools else []),
        {"role": "assistant", "content": f"The capital of {country} is {capital}.", **thought},
        {"role": "user", "content": "What do people speak there?"},
        {"role": "assistant", "content": f"They speak {language}.", **thought},
    ]


def base_with(template: str | None, folder: Path) -> Path:
    """SmolLM2's folder with this template in it."""
    folder.mkdir()
    for path in converted(find("smollm2"), None).folder.iterdir():
        shutil.copy(path, folder / path.name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def answered(generator: Any, case: Case, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer: its text as ``capo chat`` shows it, and whether the turn ended as the template ends it."""
    tools = TOOLS if case.tools else ()
    try:
        generator.tokens_left(messages, tools)
    except CapotuneError as error:  # an answer that cannot stand in the conversation
        return {"text": "", "raw": str(error), "ended": False, "markers": False}
    text = "".join(generator.stream_chat(messages, tools, max_tokens=MOST_TOKENS))
    assembled = generator._assembled
    task, decoding = assembled.task, generator._chat_settings({"max_tokens": MOST_TOKENS})
    (ids,) = _write(assembled, [generator._encode_chat(messages, tools)], [0], decoding, MOST_TOKENS, how=_Ways())
    raw = task.decode(ids, special_tokens=True)
    renderer: ConversationRenderer = task._renderer
    end, call_end = renderer.template.turn_end, renderer.template.call_end
    # where the template writes no end, the end of the text is trained after a last answer
    end_of_text = None if end.end else task.decode([task.end_ids[0]], special_tokens=True)
    ends = {part.strip() for part in (end.end, end.next, call_end, end_of_text) if part and part.strip()}
    ended = any(raw.rstrip().endswith(one) for one in ends) or any(stop in raw for stop in decoding.stop)
    own = (r"</?think>", r"</?tool_call>") if case.thinking or case.tools else ()
    shown = re.sub("|".join(own), "", text) if own else text
    return {
        "text": text,
        "raw": raw,
        "ended": ended,
        "markers": bool(re.search(r"<[|/｜]?[\w▁|｜]+[|｜]?>|\[/?INST\]", shown)),
    }


def called(text: str) -> dict[str, Any] | None:
    """The call in an answer: the outermost JSON object with a name."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        call = json.loads(found[0]) if found else {}
    except json.JSONDecodeError:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    return {"name": call["name"], "arguments": arguments} if "name" in call and arguments is not None else None


def conversation(generator: Any, case: Case, country: str) -> list[dict[str, Any]]:
    """Both answers about a country, and before them the call where there are tools."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"What is the capital of {country}?"}]
    answers = []
    if case.tools:
        first = answered(generator, case, messages)
        call = called(first["text"])
        answers.append({**first, "call": call})
        function = call or {"name": "capital", "arguments": {"country": country}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "name": "capital", "content": "Berlin"},
        ]
    for further in ("What do people speak there?", None):
        answers.append(answered(generator, case, messages))
        messages.append({"role": "assistant", "content": answers[-1]["text"]})
        if further:
            messages.append({"role": "user", "content": further})
    return answers


def measure(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Train, then chat."""
    base, data = base_with(case.template, folder / name), folder / f"{name}.jsonl"
    rows = [
        {"messages": turns(case, country, *facts), **({"tools": TOOLS} if case.tools else {})}
        for country, facts in list(CAPITALS.items())[:12]
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    start = time.perf_counter()
    capotune.train(
        "lora", data=data, model=str(base), out=folder / f"{name}-run", test_fraction=0.0, answers=0,
        epochs=4, batch_size=2, layers=tuple(range(15, 30)),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    generator = capotune.load(folder / f"{name}-run" / "adapter", model=str(base))
    answers = [answer for country in UNSEEN for answer in conversation(generator, case, country)]
    end = generator._assembled.task._template.turn_end
    return {
        "label": case.label,
        "end": end.end.strip() or end.next.strip(),
        "end_is_token": end.token is not None,
        "seconds": round(seconds),
        "answers": len(answers),
        "ended": sum(answer["ended"] for answer in answers),
        "without_markers": sum(not answer["markers"] for answer in answers),
        "calls": sum("call" in answer for answer in answers),
        "calls_parsed": sum(answer.get("call") is not None for answer in answers),
        "example": [answer["text"] for answer in answers[: 3 if case.tools else 2]],
        "not_ended": [answer["raw"] for answer in answers if not answer["ended"] or answer["markers"]][:4],
    }


def write_table(found: dict[str, Any]) -> None:
    """Fill the marked place of docs/conversations.md."""
    lines = ["| template | a turn ends with | answers | ended there | without markers | calls that can be read |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for name in [name for name in CASES if name in found]:
        one = found[name]
        end = f"`{one['end']}`" + ("" if one["end_is_token"] else " (text)")
        calls = f"{one['calls_parsed']} of {one['calls']}" if one["calls"] else "–"
        cells = [one["label"], end, one["answers"], one["ended"], one["without_markers"], calls]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    DOCS.write_text(
        f"{before}{MARKS[0]}\n{chr(10).join(lines)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8"
    )


def main() -> None:
    """The templates named on the command line, or all."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or CASES:
            found[name] = measure(name, CASES[name], Path(folder))
            print(name, json.dumps(found[name], ensure_ascii=False), flush=True)
            RESULTS.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            write_table(found)


if __name__ == "__main__":
    main()
