"""Time, evaluations and loss of the linear head against plain L-BFGS and scikit-learn, one thread.

``python benchmarks/linear_head.py [FEATURES.pt] [--sklearn]``: the file holds (train, targets, test, test targets,
rows to fit, rows held out); without it, clusters made up with a spectrum like a transformer's stand in. λ is chosen,
then the head is solved on all rows, as training does. Writes ``benchmarks/results/linear_head.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from capotune.engine import linear_head
from capotune.engine.linear_head import LinearHead, choose_regularization, solve


class Count:
    """Counts calls of ``torch.log_softmax``: one for each evaluation of loss and gradient in both solvers."""

    def __init__(self) -> None:
        self.evaluations, self._real = 0, torch.log_softmax
        torch.log_softmax = self  # type: ignore[assignment]

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.evaluations += 1
        return self._real(*arguments, **named)


class Plain:
    """The solver this one replaced: torch's L-BFGS in standardised coordinates."""

    def solve(
        self, x: torch.Tensor, targets: torch.Tensor, labels: int, lam: float, start: torch.Tensor | None = None
    ) -> tuple[LinearHead, torch.Tensor]:
        mean, scale = x.mean(0), x.std(0, correction=0).reciprocal()
        x = (x - mean).mul_(scale)
        packed = x.new_zeros(x.shape[1] + 1, labels) if start is None else start.clone()
        rows = torch.arange(len(x))
        solver = torch.optim.LBFGS(
            [packed], max_iter=100, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5,
            tolerance_change=1e-7,
        )  # fmt: skip

        @torch.no_grad()
        def closure() -> torch.Tensor:
            log_p = torch.log_softmax(torch.addmm(packed[-1], x, packed[:-1]), dim=1)
            loss = -log_p[rows, targets].mean() + lam * packed[:-1].square().sum()
            residual = log_p.exp_()
            residual[rows, targets] -= 1
            residual /= len(x)
            packed.grad = torch.cat([x.t() @ residual + 2 * lam * packed[:-1], residual.sum(0, keepdim=True)])
            return loss

        solver.step(closure)
        weight = (packed[:-1] * scale[:, None]).t().contiguous()
        return LinearHead(weight, packed[-1] - weight @ mean, lam), packed

    def choose(
        self, x: torch.Tensor, targets: torch.Tensor, held_x: torch.Tensor, held_targets: torch.Tensor, labels: int
    ) -> tuple[LinearHead, float]:
        best, worse, start = (float("inf"), None), 0, None
        for lam in linear_head._PATH:
            head, start = self.solve(x, targets, labels, lam, start)
            loss = float(functional.cross_entropy(head.logits(held_x), held_targets))
            worse = 0 if loss < best[0] else worse + 1
            best = (loss, head) if loss < best[0] else best
            if worse == 2:
                break
        assert best[1] is not None
        return best[1], best[1].regularization


def objective(head: LinearHead, x: torch.Tensor, targets: torch.Tensor) -> float:
    """In double precision."""
    weight, x = head.weight.double(), x.double()
    loss = functional.cross_entropy(functional.linear(x, weight, head.bias.double()), targets)
    return float(loss + head.regularization * (weight * x.std(0, correction=0)).square().sum())


def made_up() -> tuple[torch.Tensor, ...]:
    """4,000 + 1,000 rows, 1,500 features, 40 labels."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 40, (5000,), generator=generator)
    spectrum = torch.arange(1, 1501) ** -0.6
    x = torch.randn(40, 1500, generator=generator)[targets] * 0.5 + torch.randn(5000, 1500, generator=generator)
    x = x * spectrum @ torch.linalg.qr(torch.randn(1500, 1500, generator=generator))[0]
    held = torch.arange(0, 4000, 20)
    fit = torch.tensor([row for row in range(4000) if row % 20])
    return x[:4000], targets[:4000], x[4000:], targets[4000:], fit, held


def main() -> None:
    torch.set_num_threads(1)
    files = [word for word in sys.argv[1:] if not word.startswith("--")]
    data = torch.load(files[0]) if files else made_up()
    x, targets, test, test_targets, fit, held = data
    varying = x[fit].std(0, correction=0) > 1e-6  # so that all solve the same problem: others do not drop the rest
    x, test, labels = x[:, varying], test[:, varying], int(targets.max()) + 1
    results: dict[str, Any] = {}
    heads: dict[str, LinearHead] = {}
    count = Count()

    def measure(name: str, work: Callable[[], Any]) -> Any:
        count.evaluations, begun = 0, (time.perf_counter(), time.process_time())
        value = work()
        results[name] = {
            "seconds": round(time.perf_counter() - begun[0], 2),
            "cpu_seconds": round(time.process_time() - begun[1], 2),
            "evaluations": count.evaluations,
        }
        return value

    parts = x[fit], targets[fit], x[held], targets[held], labels
    chosen, lam = measure("choose", lambda: choose_regularization(*parts))
    heads["solve"] = measure("solve", lambda: solve(x, targets, labels, lam, near=chosen))
    plain = Plain()
    _, plain_lam = measure("plain choose", lambda: plain.choose(*parts))
    heads["plain solve"] = measure("plain solve", lambda: plain.solve(x, targets, labels, lam)[0])
    best = measure("reference", lambda: solve(x, targets, labels, lam, 1e-6))
    if "--sklearn" in sys.argv:
        mean, std = x.mean(0), x.std(0, correction=0)
        model = LogisticRegression(C=1 / (2 * lam * len(x)), tol=1e-5, max_iter=300)
        measure("scikit-learn", lambda: model.fit(((x - mean) / std).numpy(), targets.numpy()))
        weight = torch.as_tensor(model.coef_).float() / std
        heads["scikit-learn"] = LinearHead(weight, torch.as_tensor(model.intercept_).float() - weight @ mean, lam)
    optimum = objective(best, x, targets)
    for name, head in heads.items():
        results[name] |= {
            "relative_loss_gap": objective(head, x, targets) / optimum - 1,
            "test_accuracy": float((head.logits(test).argmax(1) == test_targets).float().mean()),
        }
    results["reference"]["test_accuracy"] = float((best.logits(test).argmax(1) == test_targets).float().mean())
    new, old = (
        sum(results[name]["cpu_seconds"] for name in names)
        for names in (("choose", "solve"), ("plain choose", "plain solve"))
    )
    results |= {
        "rows": len(x), "features": x.shape[1], "labels": labels, "threads": 1, "made_up": not files,
        "regularization": lam, "plain_regularization": plain_lam, "speedup_cpu": round(old / new, 2),
    }  # fmt: skip
    out = Path(__file__).parent / "results" / "linear_head.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
