"""Which token comes next: the repetition penalty, top-k and min-p against Transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_models import END, LETTERS, PAD, VOCABULARY, make, prompts, settings
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList

from capotune.evaluation.choosing import processors
from capotune.evaluation.generate import generate


@torch.no_grad()
def transformers_writes(assembled: Any, prompt: list[int], **asked: Any) -> Any:
    """Transformers' own ``generate`` for one prompt, with its own processors."""
    configuration = GenerationConfig(eos_token_id=END, pad_token_id=PAD, **asked)
    return assembled.model.generate(torch.tensor([prompt]), generation_config=configuration)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("penalty", [1.6, 0.7])
def test_a_repetition_penalty_is_transformers_own_whatever_batch_a_prompt_stands_in(penalty: float, beams: int) -> None:
    assembled, rows = make("llama"), prompts(7)
    asked = {"repetition_penalty": penalty, "num_beams": beams}
    found = [transformers_writes(assembled, row, max_new_tokens=10, do_sample=False, **asked) for row in rows]
    written = [ids[0, len(row) :].tolist() for row, ids in zip(rows, found, strict=True)]
    expected = [assembled.task.decode(ids[: ids.index(END)] if END in ids else ids) for ids in written]
    assert generate(assembled, rows, settings(**asked)) == expected
    assert expected != generate(assembled, rows, settings(num_beams=beams))


def test_a_repetition_penalty_leaves_virtual_tokens_and_an_empty_prompt_alone() -> None:
    assembled, rows = make("llama", virtual=5), [[], *prompts(5)]
    whole = generate(assembled, rows, settings(repetition_penalty=1.5))
    assert whole == [generate(assembled, [row], settings(repetition_penalty=1.5))[0] for row in rows]
    assert whole != generate(assembled, rows, settings())


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 4},
        {"top_k": 4000},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_the_draw_is_among_what_transformers_leaves(asked: dict[str, Any]) -> None:
    assembled, prompt = make("llama"), [7, 20, 9, 7]
    asked = {"temperature": 2.5, **asked}
    plain = {"top_k": 0, **asked, "do_sample": True, "max_new_tokens": 1}
    output = transformers_writes(assembled, prompt, return_dict_in_generate=True, output_scores=True, **plain)
    logits = assembled.model(torch.tensor([prompt])).logits[:, -1].detach()
    *chosen, _draw = processors(settings(**asked), [0], [0])
    scores = LogitsProcessorList(chosen)(torch.tensor([prompt]), logits)
    torch.testing.assert_close(scores, output.scores[0])
    left = int(scores.isfinite().sum())
    assert left == VOCABULARY if asked["top_k" if "top_k" in asked else "min_p"] == 4000 else 1 < left < VOCABULARY
    allowed = {LETTERS[at] for at in scores[0].isfinite().nonzero()[:, 0].tolist()} | {""}
    drawn = set(generate(assembled, [prompt] * 200, settings(max_tokens=1, **asked)))
    assert len(drawn) > 2
    assert drawn <= allowed
