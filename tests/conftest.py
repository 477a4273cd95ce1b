"""Small real models, made here: no network, no downloads. Random weights in Transformers' own architectures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

FILLER = ["the", "a", "my", "parcel", "order", "please", "help", "was", "not"]
WORDS = {"late": ["late", "when", "here"], "broken": ["broken", "lamp", "is"], "money": ["paid", "twice", "refund"]}

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

ON_A_BUSY_MACHINE = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("capotune", ON_A_BUSY_MACHINE)
hypothesis.settings.load_profile("capotune")


def pytest_configure() -> None:
    """Before any test file asks what the machine can do."""
    if os.environ.get("SOFTWARE_AMX") == "1":
        import software_amx

        software_amx.install()
    import subprocess

    import warm

    subprocess.Popen = warm.Popen  # type: ignore[misc]


def pytest_report_header() -> str:
    """What the kernels are compiled for, where that is not all that the machine has (levels.py)."""
    asked = ("CAPOTUNE_CPU_LEVEL", "CAPOTUNE_NATIVE", "SOFTWARE_AMX")
    return "kernels: " + (" ".join(f"{name}={os.environ[name]}" for name in asked if name in os.environ) or "all")


LONGEST = ("readme", "interrupt", "sequence_packing", "generation_parity", "triton", "packaging", "toy_method",
           "token_classification", "toy_task", "token_classification_contract")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where processes share the files out, one would end with one of them while the others
    wait."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _no_users_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nor does what is made once for many tests, before the cache of the first of them is set."""
    os.environ["CAPOTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache of activations."""
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors: with more threads a busy machine waits for the last one to start. A test that shares work out
    sets their number itself."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def all_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are composed of their parts, with PyTorch's products: for tests of how they are. That products at 16 bits
    are near, and blocks in one call, is tested by themselves (test_linear.py, test_native_block.py)."""
    from capotune.kernels import linear, prepacked

    monkeypatch.setattr(linear, "amx_kernels", lambda: None)
    monkeypatch.setattr(prepacked, "_vectors_are_faster", lambda: False)


def _save(folder: Path, config: object) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    words = [*FILLER, *(word for chosen in WORDS.values() for word in chosen), "card", "lost", "where"]
    vocabulary = {token: at for at, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with 3 blocks of width 32: mean pooling, no padding token trained."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("models") / "bert", config)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 2 blocks of width 32 and grouped key/value heads: last-token pooling."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("models") / "llama", config)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with 2 blocks of width 32: Conv1D layers, whose weights are stored (in, out)."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    return _save(tmp_path_factory.mktemp("models") / "gpt2", config)


@pytest.fixture(scope="session")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 short texts in 3 labels that words decide, 24 of them marked as test rows."""
    import random

    chooser = random.Random(0)
    rows = ["text,label,split"]
    for number in range(96):
        label = list(WORDS)[number % 3]
        text = chooser.choices(FILLER, k=chooser.randint(2, 9)) + chooser.sample(WORDS[label], 2)
        chooser.shuffle(text)
        rows.append(f"{' '.join(text)} {number},{label},{'test' if number % 4 == 3 else 'train'}")
    path = tmp_path_factory.mktemp("data") / "tickets.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def _save_writer(folder: Path, config: object, **tokenizer: object) -> Path:
    """A language model with random weights and a byte-level tokenizer. Biases and norms are not as they are made, so
    that a test sees when they are lost."""
    import torch
    from generation_helpers import make_tokenizer
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    make_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def _llama_config(tied: bool) -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=360, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=96, initializer_range=0.1, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def llama_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 blocks whose output layer is its embedding; a chat template, an end and a padding token."""
    from generation_helpers import CHATML

    return _save_writer(tmp_path_factory.mktemp("models") / "llama-writer", _llama_config(True), chat_template=CHATML)


@pytest.fixture(scope="session")
def untied_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an output layer of its own; its tokenizer has neither chat template nor padding token."""
    return _save_writer(tmp_path_factory.mktemp("models") / "untied-writer", _llama_config(False), pad=None)


@pytest.fixture(scope="session")
def gpt2_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 3 blocks: Conv1D layers, learned positions, tied output layer, dropout; no chat template, no padding
    token."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=360, n_embd=32, n_layer=3, n_head=4, n_positions=96, initializer_range=0.1, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    return _save_writer(tmp_path_factory.mktemp("models") / "gpt2-writer", config, pad=None)


@pytest.fixture(scope="session")
def qwen2_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of 3 blocks: biases in queries, keys and values; its turns end with <|im_end|>, its texts also."""
    from generation_helpers import CHATML, TURN_END
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=360, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=96, initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=[4, 0], pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "qwen2-writer"
    return _save_writer(folder, config, eos=TURN_END, chat_template=CHATML)


@pytest.fixture(scope="session")
def writers(llama_writer: Path, gpt2_writer: Path, qwen2_writer: Path) -> dict[str, Path]:
    """The language models of three families, by name."""
    return {"llama": llama_writer, "gpt2": gpt2_writer, "qwen2": qwen2_writer}


@pytest.fixture(scope="session")
def colour_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 prompts with completions, 8 of them marked as test rows."""
    from generation_helpers import pairs, write_jsonl

    rows = [
        {
            "prompt": f"{number}: {pair.prompt}",
            "completion": pair.completion,
            "split": "test" if number % 6 == 5 else "train",
        }
        for number, pair in enumerate(pairs(48))
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def colour_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 conversations of one and two turns."""
    from generation_helpers import conversation, write_jsonl

    rows = [{"messages": conversation(number, 1 + number % 2).messages} for number in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text of some thousand tokens."""
    from generation_helpers import document

    return document(tmp_path_factory.mktemp("data") / "story.txt")
